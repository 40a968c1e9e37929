"""Runs that are killed, stopped, or run out of room: nothing is lost, and what happened is said in one line."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FULL, ROOT
from judge_server import JudgeServer
from test_train import lines, run

import train

pytestmark = pytest.mark.long  # runs of whole processes take minutes: pytest --long

METHODS = {
    "explicit": [],
    "points": ["--method", "points", "--epochs", "2", "--minibatches", "2", "--beta", "0.1"],
    "rler": ["--method", "rler"],
    "arlrr": ["--method", "arlrr", "--schedule", "search", "--stage", "2", "--validation", "3"],
}
LONG = ["--steps", "6", "--prompts_per_step", "2", "--group_size", "3", "--max_new_tokens", "24", "--eval_every", "3", "--save_every", "2", "--prompts", "6", "--lr", "0.01", "--judge", "lexical"]


def quietly(flags: list[str], log: str) -> None:
    """A run in a process of its own, its words in a file."""
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115  (until the process ends)
    torch.set_num_threads(1)
    status = train.main(flags)
    sys.stdout.flush()
    os._exit(status)


def saved_state(folder: Path) -> dict:
    """What a run's checkpoint holds besides the weights."""
    return torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)


def same_run(a: Path, b: Path) -> None:
    """Logs equal but for seconds, weights and saved state equal in every bit."""
    assert lines(a / "metrics.jsonl") == lines(b / "metrics.jsonl")
    assert lines(a / "samples.jsonl") == lines(b / "samples.jsonl")
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]
    one, two = saved_state(a), saved_state(b)
    for number, moments in one["optimizer"]["state"].items():
        for key in moments:
            assert torch.equal(moments[key], two["optimizer"]["state"][number][key])


def lines_so_far(path: Path) -> list[str]:
    """The whole lines of a log that is being written."""
    if not path.exists():
        return []
    # Split as bytes: the last line may end inside a character.
    return [line.decode("utf8") for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_killed_at_random_moments_it_is_the_same_run(server, tiny, few, forms, tmp_path, name):
    """Seven SIGKILLs per method, 28 with FULL_COUNTS, at moments drawn over a whole run: importing, rolling out, searching, judging,
    in the backward pass, while logs and checkpoints are written. The processes come from a server that has imported all."""
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *LONG, *METHODS[name]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rng, kills, wanted = random.Random(name), 0, 28 if FULL else 7

    def start(folder):
        begun = (folder / "config.json").exists()
        arguments = ["--resume", str(folder)] if begun else [*flags, "--out", str(folder)]
        process = server.Process(target=quietly, args=(arguments, f"{folder}.log"))
        process.start()
        return process

    idle = server.Process(target=time.sleep, args=(0,))  # until the server has imported everything
    idle.start()
    idle.join()
    started = time.time()
    process = start(whole)
    process.join()
    duration, reached = time.time() - started, set()
    assert process.exitcode == 0, Path(f"{whole}.log").read_text()
    for _ in range(8 * wanted):
        is_whole, started = not (cut / "config.json").exists(), time.time()
        process, unfinished = start(cut), kills < wanted or len(reached) < 2
        limit = None
        if unfinished:  # a busy machine: later kills
            limit = rng.uniform(0.2, 0.9) * duration * max(1, kills / wanted) ** 2
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            reached.add(len(lines_so_far(cut / "metrics.jsonl")))
        elif unfinished:  # it came to its end in spite of everything: the next one begins anew
            assert process.exitcode == 0, Path(f"{cut}.log").read_text()
            same_run(whole, cut)
            if is_whole:  # a machine that has become faster: earlier kills
                duration = min(duration, time.time() - started)
            cut = tmp_path / f"cut{kills}-{len(reached)}-{rng.random()}"
        else:
            break
    assert kills >= wanted and process.exitcode == 0, Path(f"{cut}.log").read_text()
    same_run(whole, cut)
    assert len(reached) > 1  # not always the same moment


def spawn(tmp_path, *flags, **more):
    """train.py as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_and_saves(tiny, few, forms, tmp_path, number):
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *LONG, "--steps", "400", "--save_every", "1000"]
    process = spawn(tmp_path, *flags, "--out", "run")
    while len(lines_so_far(tmp_path / "run" / "metrics.jsonl")) <= 2:
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "stopping after this step" in printed and "--resume run" in printed
    step = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 0 < step < 400 and saved_state(tmp_path / "run")["step"] == step
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", str(step + 1)]) == 0


@pytest.mark.parametrize("where", ["save_checkpoint", "write_samples", "write_report", "append"])
def test_a_signal_at_any_place_of_the_loop_leaves_a_checkpoint_of_the_last_step(tiny, few, tmp_path, monkeypatch, where):
    """Also after the step's checkpoint was passed over, or while it is written."""
    calls = 0
    original = getattr(train.RunFolder, where)

    def signalled(*arguments):
        nonlocal calls
        calls += 1
        original(*arguments)
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train.RunFolder, where, signalled)
    save_every = "2" if where == "save_checkpoint" else "100"
    assert run(tiny, few, tmp_path / "run", "--steps", "8", "--save_every", save_every, "--eval_every", "1") == 130
    step = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 0 < step < 8 and saved_state(tmp_path / "run")["step"] == step


def test_a_run_without_a_checkpoint_begins_again(tiny, few, tmp_path, monkeypatch):
    def breaks(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", breaks)
        assert run(tiny, few, tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "checkpoint").exists()
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert run(tiny, few, tmp_path / "whole") == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tiny, few, tmp_path):
    """A limit on file size stands for the full disk: the write really fails, in the library that writes."""
    assert run(tiny, few, tmp_path / "run") == 0
    weights = tmp_path / "run" / "checkpoint" / "model.safetensors"
    before = weights.read_bytes()
    small = len(before) // 2

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))

    process = spawn(tmp_path, "--resume", "run", "--steps", "4", preexec_fn=limit_files)
    printed = process.communicate(timeout=120)[0].strip().split("\n")
    assert process.returncode == 2 and "checkpoint: cannot be written" in printed[-1] and "--resume" in printed[-1]
    assert weights.read_bytes() == before and not list((tmp_path / "run").glob("*.tmp"))
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_while_logging_is_one_line(tiny, few, tmp_path, capsys, monkeypatch):
    original = train.RunFolder.write_start

    def fills_up(folder, made):
        original(folder, made)
        (folder.path / "samples.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(train.RunFolder, "write_start", fills_up)
    assert run(tiny, few, tmp_path / "run") == 2
    printed = capsys.readouterr().err.strip().split("\n")[-1]
    assert "samples.jsonl: cannot be written (No space left on device)" in printed and "--resume" in printed


def test_a_judge_that_goes_away_stops_the_run_with_its_checkpoint(tiny, few, tmp_path, capsys, monkeypatch):
    original = train.train_step
    with JudgeServer() as server:
        flags = ["--judge", server.url, "--judge_model", "m"]
        assert run(tiny, few, tmp_path / "run", *flags) == 0

        def unloaded(made, step, **more):
            server.status = 404
            return original(made, step, **more)

        resume = ["--resume", str(tmp_path / "run"), "--steps", "5"]
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", unloaded)
            assert train.main(resume) == 2
        printed = capsys.readouterr().err.strip().split("\n")[-1]
        assert "step 4" in printed and "404" in printed and f"--resume {tmp_path / 'run'}" in printed
        assert train.main(resume) == 2  # found out before anything is loaded
        assert "404" in capsys.readouterr().err.strip().split("\n")[-1]
        server.status = None  # the model is there again
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "5"]) == 0
        other = tmp_path / "other" / "whole"  # with a cache of its own
        assert run(tiny, few, other, *flags, "--steps", "5") == 0
    rewards = [row["reward"] for row in lines(tmp_path / "run" / "samples.jsonl")]
    assert rewards[:6] == [row["reward"] for row in lines(other / "samples.jsonl")][:6]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FloatingPointError("the gradient is not finite"), "step 2: the gradient is not finite"),
        (torch.OutOfMemoryError("CUDA out of memory"), "step 2: the GPU's memory is full"),
    ],
)
def test_what_breaks_a_step_is_one_line_and_the_checkpoint_stays(tiny, few, tmp_path, capsys, monkeypatch, error, words):
    original = train.train_step

    def breaks(made, step, **more):
        if step == 1:
            raise error
        return original(made, step, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", breaks)
        assert run(tiny, few, tmp_path / "run") == 2
    assert words in capsys.readouterr().err.strip().split("\n")[-1]
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert run(tiny, few, tmp_path / "whole") == 0
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("method", ["explicit", "rler"])
def test_a_judge_that_goes_away_during_an_evaluation_costs_no_step(tiny, few, tmp_path, capsys, monkeypatch, method):
    """The update is in the checkpoint with its rows; the resumed run evaluates first, and is the same run. Twice, and at the end."""
    original = train.evaluate_heldout
    flags = ["--method", method, "--steps", "4", "--save_every", "100", "--eval_every", "2"]
    calls = []

    def goes_away(made):
        calls.append(1)
        if len(calls) in (2, 3, 5):
            raise train.JudgeError("the judge is gone")
        return original(made)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_heldout", goes_away)
        assert run(tiny, few, tmp_path / "cut", *flags) == 2
        for _ in range(2):
            printed = capsys.readouterr().err.strip().split("\n")[-1]
            assert "evaluation after step 2: the judge is gone" in printed and "--resume" in printed
            assert saved_state(tmp_path / "cut")["step"] == 2
            status = train.main(["--resume", str(tmp_path / "cut")])
            assert status == 2
        assert "evaluation after step 4: the judge is gone" in capsys.readouterr().err
        assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert "held-out score" in capsys.readouterr().out
    assert run(tiny, few, tmp_path / "whole", *flags) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_judge_that_is_gone_before_the_first_step_is_one_line(tiny, few, tmp_path, capsys, monkeypatch):
    def gone(made):
        raise train.JudgeError("the judge is gone")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_heldout", gone)
        assert run(tiny, few, tmp_path / "run") == 2
    printed = capsys.readouterr().err.strip().split("\n")[-1]
    assert "evaluation before training: the judge is gone" in printed and "--resume" in printed
    assert train.main(["--resume", str(tmp_path / "run")]) == 0


def test_a_gradient_that_is_not_finite_leaves_the_weights(tiny, few, tmp_path, capsys):
    """A real one: the learning rate is so high that the second step's numbers overflow."""
    assert run(tiny, few, tmp_path / "run", "--lr", "1e30", "--steps", "4", "--advantage", "none") == 2
    printed = capsys.readouterr().err.strip()
    assert "not finite" in printed and "lower --lr" in printed and "\n" not in printed.split("train.py: ")[-1]
    state = saved_state(tmp_path / "run")
    assert state["step"] >= 1
    assert set(state["versions"]) == {"python", "torch", "transformers", "threads", "processes", "device"}


def test_other_versions_are_named(tiny, few, tmp_path, capsys):
    assert run(tiny, few, tmp_path / "run") == 0
    state = saved_state(tmp_path / "run")
    state["versions"]["torch"] = "1.0"
    torch.save(state, tmp_path / "run" / "checkpoint" / "trainer.pt")
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert "other torch: " in capsys.readouterr().out


def test_logs_can_be_read_while_they_are_written(tiny, few, forms, tmp_path):
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *LONG, "--steps", "12", "--out", "run"]
    process = spawn(tmp_path, *flags)
    looks = 0
    while process.poll() is None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            for line in lines_so_far(tmp_path / "run" / name):
                json.loads(line)
                looks += 1
        time.sleep(0.01)
    assert process.wait() == 0 and looks > 20
