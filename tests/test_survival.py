"""Runs that are killed, stopped, or run out of room: nothing is lost, and what happened is said in one line."""

import json
import multiprocessing
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
from conftest import ROOT
from judge_server import JudgeServer
from test_train import lines, run

import train

METHODS = {
    "explicit": [],
    "points": "--method points --epochs 2 --minibatches 2 --beta 0.1".split(),
    "rler": ["--method", "rler"],
    "arlrr": "--method arlrr --schedule search --stage 2 --validation 3".split(),
}
LONG = "--steps 6 --prompts_per_step 2 --group_size 3 --max_new_tokens 24 --eval_every 3 --save_every 2 --prompts 6 --lr 0.01".split()


def quietly(flags: list[str], log: str) -> None:
    """A run in a process of its own, its words in a file."""
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115  (until the process ends)
    torch.set_num_threads(1)
    os._exit(train.main(flags))


def same_run(a: Path, b: Path) -> None:
    """Logs equal but for seconds, weights and saved state equal in every bit."""
    assert lines(a / "metrics.jsonl") == lines(b / "metrics.jsonl")
    assert lines(a / "samples.jsonl") == lines(b / "samples.jsonl")
    assert (a / "checkpoint" / "model.safetensors").read_bytes() == (b / "checkpoint" / "model.safetensors").read_bytes()
    one, two = (torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True) for folder in (a, b))
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], two["optimizer"]["state"][number][key]) for key in moments)


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_random_moments_it_is_the_same_run(tiny, few, forms, tmp_path, name):
    """Seven SIGKILLs a method, 28 in all, at moments drawn over a whole run: importing, rolling out, searching, judging, in the
    backward pass, while logs and checkpoints are written. The processes come from a server that has imported everything."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "transformers.models.llama.modeling_llama"])
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *LONG, *METHODS[name]]
    whole, cut, rng, kills = tmp_path / "whole", tmp_path / "cut", random.Random(name), 0

    def start(folder):
        begun = (folder / "config.json").exists()
        process = server.Process(target=quietly, args=(["--resume", str(folder)] if begun else [*flags, "--out", str(folder)], f"{folder}.log"))
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
    for _ in range(60):
        process, unfinished = start(cut), kills < 7 or len(reached) < 2
        process.join(rng.uniform(0.2, 0.9) * duration * max(1, kills / 7) ** 2 if unfinished else None)  # a busy machine: later kills
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            reached.add(len(lines_so_far(cut / "metrics.jsonl")))
        elif unfinished:  # it came to its end in spite of everything: the next one begins anew
            assert process.exitcode == 0, Path(f"{cut}.log").read_text()
            same_run(whole, cut)
            cut = tmp_path / f"cut{kills}-{len(reached)}-{rng.random()}"
        else:
            break
    assert kills >= 7 and process.exitcode == 0, Path(f"{cut}.log").read_text()
    same_run(whole, cut)
    assert len(reached) > 1  # not always the same moment


def lines_so_far(path: Path) -> list[str]:
    return path.read_text(encoding="utf8").split("\n")[:-1] if path.exists() else []


def spawn(tmp_path, *flags, **more):
    """train.py as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_and_saves(tiny, few, forms, tmp_path, number):
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *LONG, "--steps", "400", "--save_every", "1000"]
    process = spawn(tmp_path, *flags, "--out", "run")
    while not len(lines_so_far(tmp_path / "run" / "metrics.jsonl")) > 2:
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "stopping after this step" in said and "--resume run" in said
    step = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 0 < step < 400 and torch.load(tmp_path / "run" / "checkpoint" / "trainer.pt", weights_only=True)["step"] == step
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", str(step + 1)]) == 0


@pytest.mark.parametrize("where", ["save", "samples", "report", "append"])
def test_a_signal_at_any_place_of_the_loop_leaves_a_checkpoint_of_the_last_step(tiny, few, tmp_path, monkeypatch, where):
    """Also after the step's checkpoint was passed over, or while it is written."""
    owner, calls = (train, 0) if where == "report" else (train.Run, 0)
    original = getattr(owner, where)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(owner, where, interrupted)
    flags = ["--steps", "8", "--save_every", "2" if where == "save" else "100", "--eval_every", "1"]
    assert run(tiny, few, tmp_path / "run", *flags) == 130
    step = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 0 < step < 8 and torch.load(tmp_path / "run" / "checkpoint" / "trainer.pt", weights_only=True)["step"] == step


def test_a_run_without_a_checkpoint_begins_again(tiny, few, tmp_path, monkeypatch):
    def breaks(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "one_step", breaks)
        assert run(tiny, few, tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "checkpoint").exists()
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert run(tiny, few, tmp_path / "whole") == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tiny, few, tmp_path):
    """A limit on file size stands for the full disk: the write really fails, in the library that writes."""
    assert run(tiny, few, tmp_path / "run") == 0
    before = (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes()
    small = len(before) // 2
    process = spawn(tmp_path, "--resume", "run", "--steps", "4", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    said = process.communicate(timeout=120)[0].strip().split("\n")
    assert process.returncode == 2 and "checkpoint: cannot be written" in said[-1] and "--resume" in said[-1]
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").read_bytes() == before and not (tmp_path / "run" / "checkpoint.tmp").exists()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_while_logging_is_one_line(tiny, few, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").symlink_to("/dev/full")
    assert run(tiny, few, tmp_path / "run") == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert "samples.jsonl: cannot be written (No space left on device)" in said and "--resume" in said


def test_a_judge_that_goes_away_stops_the_run_with_its_checkpoint(tiny, few, tmp_path, capsys):
    with JudgeServer() as server:
        flags = ["--judge", server.url, "--judge_model", "m", "--judge_cache", str(tmp_path / "cache.jsonl")]
        assert run(tiny, few, tmp_path / "run", *flags) == 0
        port = server.port
        server.status = 404  # the model was unloaded
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "5"]) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert "step 4" in said and "404" in said and f"--resume {tmp_path / 'run'}" in said
    with JudgeServer(port=port):
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "5"]) == 0
        assert run(tiny, few, tmp_path / "whole", *flags, "--steps", "5", "--judge_cache", str(tmp_path / "other.jsonl")) == 0
    assert [row["reward"] for row in lines(tmp_path / "run" / "samples.jsonl")][:6] == [row["reward"] for row in lines(tmp_path / "whole" / "samples.jsonl")][:6]


@pytest.mark.parametrize(("error", "words"), [(FloatingPointError("the gradient is not finite"), "step 2: the gradient is not finite"),
                                              (torch.OutOfMemoryError("CUDA out of memory"), "step 2: the GPU's memory is full")])  # fmt: skip
def test_what_breaks_a_step_is_one_line_and_the_checkpoint_stays(tiny, few, tmp_path, capsys, monkeypatch, error, words):
    original = train.one_step

    def breaks(*args):
        if args[-1] == 1:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "one_step", breaks)
        assert run(tiny, few, tmp_path / "run") == 2
    assert words in capsys.readouterr().err.strip().split("\n")[-1]
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert run(tiny, few, tmp_path / "whole") == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_gradient_that_is_not_finite_leaves_the_weights(tiny, few, tmp_path, capsys):
    """A real one: the learning rate is so high that the second step's numbers overflow."""
    assert run(tiny, few, tmp_path / "run", "--lr", "1e30", "--steps", "4", "--advantage", "none") == 2
    said = capsys.readouterr().err.strip()
    assert "not finite" in said and "lower --lr" in said and "\n" not in said.split("train.py: ")[-1]
    weights = torch.load(tmp_path / "run" / "checkpoint" / "trainer.pt", weights_only=True)
    assert weights["step"] >= 1 and set(weights["versions"]) == {"python", "torch", "transformers", "threads", "device"}


def test_other_versions_are_named(tiny, few, tmp_path, capsys):
    assert run(tiny, few, tmp_path / "run") == 0
    file = tmp_path / "run" / "checkpoint" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    state["versions"]["torch"] = "1.0"
    torch.save(state, file)
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert "other torch: " in capsys.readouterr().out


def test_logs_can_be_read_while_they_are_written(tiny, few, forms, tmp_path):
    process = spawn(tmp_path, "--model", str(tiny), "--data", forms, "--eval_data", few, *LONG, "--steps", "12", "--out", "run")
    looks = 0
    while process.poll() is None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            for line in lines_so_far(tmp_path / "run" / name):
                json.loads(line)
                looks += 1
    assert process.wait() == 0 and looks > 20
