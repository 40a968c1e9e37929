"""Attacks on a run from outside: kills at each file operation, edited folders, odd flags, full disks, closed pipes.

Each has a short form, which always runs, and a long one under the marker `long`.
"""

import builtins
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FULL, ROOT, some_of
from judge_server import JudgeServer
from safetensors.torch import load_file, save_file
from test_survival import lines_so_far, quietly, same_run, spawn
from test_train import interrupted, lines

import train

FEW_STEPS = ["--steps", "3", "--prompts_per_step", "2", "--group_size", "2", "--max_new_tokens", "6", "--eval_every", "3", "--save_every", "1", "--prompts", "4", "--judge", "lexical"]


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """(flags of a short run, the folder of that run, finished)."""
    folder = tmp_path_factory.mktemp("attacks")
    rows = (ROOT / "data" / "heldout.jsonl").read_text(encoding="utf8").split("\n")[:2]
    (folder / "few.jsonl").write_text("\n".join(rows) + "\n", encoding="utf8")
    flags = ["--model", str(tiny), "--eval_data", str(folder / "few.jsonl"), *FEW_STEPS]
    assert train.main([*flags, "--out", str(folder / "whole")]) == 0
    return flags, folder / "whole"


def one_line(capsys) -> str:
    """The error of a run: its one line."""
    printed = capsys.readouterr().err
    errors = [line for line in printed.split("\n") if line.startswith("train.py: ")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return errors[0]


# ---------------------------------------------------------------------- a folder belongs to one run


def claim(barrier, queue, done):
    """Starts a run without --out at the same moment as others do."""
    barrier.wait()
    folder = train.RunFolder(train.Config())
    queue.put(str(folder.path))
    done.wait()


def test_a_sweep_started_at_once_shares_no_folder(tmp_path, monkeypatch):
    """Twenty times four runs, begun within the same millisecond."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        barrier, queue, done = context.Barrier(4), context.Queue(), context.Event()
        arguments = {"target": claim, "args": (barrier, queue, done), "daemon": True}
        processes = [context.Process(**arguments) for _ in range(4)]
        for process in processes:
            process.start()
        claimed = [queue.get(timeout=60) for _ in processes]
        done.set()
        for process in processes:
            process.join()
        assert len(set(claimed)) == 4


def begin_together(barrier, flags, log):
    """A whole run without --out that begins when the others do."""
    barrier.wait()
    quietly(flags, log)


@pytest.mark.long
def test_sweeps_of_whole_runs_share_no_folder(server, base, tmp_path, monkeypatch):
    """Four whole runs of one command started together; each folder holds one run, of all its steps."""
    monkeypatch.chdir(tmp_path)
    sweeps = 20 if FULL else 2
    for _ in range(sweeps):
        barrier = server.Barrier(4)
        arguments = (barrier, [*base[0], "--steps", "2"], str(tmp_path / "log"))
        processes = [server.Process(target=begin_together, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0, (tmp_path / "log").read_text()
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 4 * sweeps
    first = lines(folders[0] / "samples.jsonl")
    for folder in folders:
        assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [0, 1, 2]
        assert lines(folder / "samples.jsonl") == first


def hold(path, ready, done):
    """Holds the lock of a run, as a run that is under way does."""
    folder = train.RunFolder(train.Config(resume=path))
    ready.set()
    done.wait()
    folder.release()


def test_a_run_under_way_is_not_resumed_by_another(base, tmp_path, capsys):
    shutil.copytree(base[1], tmp_path / "run", symlinks=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), ready, done), daemon=True)
    process.start()
    assert ready.wait(60)
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "5"]) == 2
    assert f"in use by process {process.pid} on " in one_line(capsys)
    assert train.main([*base[0], "--out", str(tmp_path / "run")]) == 2
    assert "in use by process" in one_line(capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    process.kill()  # the system gives the lock back
    process.join()
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert not (tmp_path / "run" / "lock").exists()


def test_the_same_out_twice_runs_once(base, tmp_path, capsys):
    assert train.main([*base[0], "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    capsys.readouterr()
    assert train.main([*base[0], "--steps", "2", "--out", str(tmp_path / "run")]) == 2
    assert "holds a run already" in one_line(capsys)
    assert lines(tmp_path / "run" / "metrics.jsonl") == rows


# ---------------------------------------------------------------------- kills at file operations

WRITES = ("replace", "rename", "mkdir", "symlink", "unlink", "rmdir")


class Torn:
    """A file whose write number `last` is cut in the middle by SIGKILL."""

    def __init__(self, file, count, last):
        self.file, self.count, self.last = file, count, last

    def write(self, data):
        if next(self.count) == self.last:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def killed_at(last: int, flags: list[str], log: str) -> None:
    """A run that kills itself at its file operation number `last`; the log's last line counts them."""
    count = itertools.count(1)

    def counted(original):
        def operation(*arguments, **more):
            if next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        return operation

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))
    original_open = builtins.open

    def opened(file, mode="r", *arguments, **more):
        made = original_open(file, mode, *arguments, **more)
        if str(file).endswith(".jsonl") and "a" in mode:
            return Torn(made, count, last)
        return made

    builtins.open = opened
    sys.stdout = sys.stderr = original_open(log, "a")
    torch.set_num_threads(1)
    status = train.main(flags)
    print(f"\noperations {next(count)}", flush=True)
    os._exit(status)


def survive(server, base, tmp_path, kills):
    """A run that is killed at these file operations, each time when it was resumed, is the same run."""
    flags, whole = base
    tmp_path.mkdir(exist_ok=True)
    cut = tmp_path / "cut"
    log = str(tmp_path / "log")
    for number in [*kills, 0]:
        arguments = [*flags, "--out", str(cut)]
        if (cut / "config.json").exists():
            arguments = ["--resume", str(cut)]
        process = server.Process(target=killed_at, args=(number, arguments, log))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path(log).read_text()
    assert process.exitcode == 0
    same_run(whole, cut)
    assert (cut / "report.html").stat().st_size and not list(cut.glob("*.tmp"))
    return int(Path(log).read_text().rpartition("operations ")[2])


@pytest.mark.long
def test_killed_at_a_file_operation_it_is_the_same_run(server, base, tmp_path):
    total = survive(server, base, tmp_path / "unharmed", [])
    rng = random.Random(0)
    survive(server, base, tmp_path / "twice", [rng.randrange(1, total), rng.randrange(1, total // 2)])
    survive(server, base, tmp_path / "thrice", [total // 2, total // 3, total // 4])


@pytest.mark.long
def test_killed_at_each_file_operation_it_is_the_same_run(server, base, tmp_path):
    total = survive(server, base, tmp_path / "unharmed", [])
    assert total > 20
    rng = random.Random(1)
    for number in some_of(range(1, total), 3):
        kills = [number]
        if number % 5 == 0:  # sometimes the resumed run is killed as well
            kills.append(rng.randrange(1, total))
        survive(server, base, tmp_path / str(number), kills)
        shutil.rmtree(tmp_path / str(number))


# ---------------------------------------------------------------------- edited folders


def edit_config(change):
    """An edit of config.json; change takes the settings."""

    def edit(run):
        settings = json.loads((run / "config.json").read_text())
        change(settings)
        (run / "config.json").write_text(json.dumps(settings))

    return edit


def setting_to(name, value):
    return edit_config(lambda settings: settings.update({name: value}))


def write(name, content):
    """An edit that gives a file another content."""

    def edit(run):
        (run / name).write_bytes(content)

    return edit


def cut(name, share):
    """An edit that cuts a file off."""

    def edit(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(len(content) * share)])

    return edit


def delete(name):
    """An edit that deletes a file, a link, or a folder."""
    return lambda run: train.remove(run / name)


def append(name, content):
    """An edit that adds bytes to a file."""

    def edit(run):
        with open(run / name, "ab") as file:
            file.write(content)

    return edit


def edit_state(change):
    """An edit of trainer.pt; change takes the state."""

    def edit(run):
        path = run / "checkpoint" / "trainer.pt"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return edit


def state_to(name, value):
    return edit_state(lambda state: state.update({name: value}))


def encoded(name, prefix=b"", encoding="utf8", ends="\n"):
    """An edit that saves a file as other editors do."""

    def edit(run):
        text = (run / name).read_text(encoding="utf8")
        (run / name).write_bytes(prefix + text.replace("\n", ends).encode(encoding))

    return edit


def folder_for(name):
    """An edit that puts a folder where a file was."""

    def edit(run):
        train.remove(run / name)
        (run / name).mkdir()

    return edit


def link_for(name, target):
    """An edit that puts a link in the place of a file or a link."""

    def edit(run):
        train.remove(run / name)
        (run / name).symlink_to(target)

    return edit


def empty_folder(name):
    """An edit that adds a folder: what a kill can leave."""
    return lambda run: (run / name).mkdir()


def edit_weights(change):
    """An edit of the checkpoint's weights; change takes name -> tensor."""

    def edit(run):
        path = run / "checkpoint" / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return edit


def edit_json(name, **values):
    """An edit of settings in a JSON file."""

    def edit(run):
        settings = json.loads((run / name).read_text(encoding="utf8"))
        (run / name).write_text(json.dumps(settings | values), encoding="utf8")

    return edit


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def evil_pickle(run):
    (run / "checkpoint" / "trainer.pt").write_bytes(pickle.dumps(Evil()))


def replace_checkpoint_by_a_file(run):
    (run / "checkpoint").unlink()
    (run / "checkpoint").write_bytes(b"")


def empty_checkpoint_without_link(run):
    (run / "checkpoint").unlink()
    (run / "checkpoint-99").mkdir()


def link_to_itself(run):
    (run / "checkpoint").unlink()
    (run / "checkpoint").symlink_to("checkpoint")


def without_links(run):
    """As a copy that follows links has it."""
    (run / "checkpoint").unlink()
    shutil.copytree(run / "checkpoint-3", run / "checkpoint")


def elsewhere(run):
    """A checkpoint moved to a larger disk, with a link in its place."""
    shutil.move(run / "checkpoint-3", run.parent / "large")
    (run / "checkpoint-3").symlink_to(run.parent / "large")


def with_crlf(run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def without_a_row(run):
    rows = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join(rows[:1] + rows[2:]))


def no_checkpoint_but_a_long_log(run):
    train.remove(run / "checkpoint")
    shutil.rmtree(run / "checkpoint-3")


DEEP = b"[" * 100_000
TORN = '{"step": 4, "text": "\u00e9'.encode()[:-1]
# What must resume (0) and what must be refused in one line (2).
EDITS = {
    "a row cut inside a character": (append("samples.jsonl", TORN), 0),
    "no log": (delete("metrics.jsonl"), 2),
    "a log that lacks a step": (without_a_row, 2),
    "a row without a step": (append("metrics.jsonl", b'{"reward": 1}\n'), 0),
    "a row nested deep": (append("metrics.jsonl", DEEP), 0),
    "config {}": (write("config.json", b"{}"), 2),
    "config cut": (cut("config.json", 0.5), 2),
    "no trainer state": (delete("checkpoint-3/trainer.pt"), 2),
    "a pickle that runs code": (evil_pickle, 2),
    "no checkpoint, but steps": (no_checkpoint_but_a_long_log, 2),
    "a copy without links": (without_links, 0),
    "a checkpoint elsewhere": (elsewhere, 0),
    "steps a text": (setting_to("prompts_per_step", "many"), 2),
    "clip_low -1": (setting_to("clip_low", -1), 2),
}
MORE_EDITS = {
    "a row with a step of another kind": (append("metrics.jsonl", b'{"step": "3"}\n{"step": NaN}\n{"step": true}\n'), 0),
    "a row that is no object": (append("samples.jsonl", b"[3]\nnull\n3\n"), 0),
    "bytes that are no text": (append("samples.jsonl", b"\xff\xfe\x00\n"), 0),
    "lines with CRLF": (with_crlf, 0),
    "an empty samples.jsonl": (write("samples.jsonl", b""), 0),
    "no samples.jsonl": (delete("samples.jsonl"), 0),
    "no prompts.jsonl": (delete("prompts.jsonl"), 0),
    "no report": (delete("report.html"), 0),
    "no link": (delete("checkpoint"), 0),
    "config empty": (write("config.json", b""), 2),
    "config a list": (write("config.json", b"[]"), 2),
    "config null": (write("config.json", b"null"), 2),
    "config no text": (write("config.json", b"\xff\xfe\xfd"), 2),
    "config deep": (write("config.json", DEEP), 2),
    "config without method": (edit_config(lambda settings: settings.pop("method")), 2),
    "steps 1.5": (setting_to("prompts_per_step", 1.5), 2),
    "steps true": (setting_to("prompts_per_step", True), 2),
    "steps null": (setting_to("prompts_per_step", None), 2),
    "steps a list": (setting_to("prompts_per_step", [3]), 2),
    "lr nan": (setting_to("lr", float("nan")), 2),
    "lr infinite": (setting_to("lr", float("inf")), 2),
    "method unknown": (setting_to("method", "nope"), 2),
    "method a list": (setting_to("method", ["points"]), 2),
    "seed of 24 digits": (setting_to("seed", int("9" * 24)), 2),
    "model gone": (setting_to("model", "no/such/folder"), 2),
    "data gone": (setting_to("data", "no/such/file.jsonl"), 2),
    "an escape sequence in a name": (setting_to("model", "\x1b[2J"), 2),
    "trainer state empty": (write("checkpoint-3/trainer.pt", b""), 2),
    "trainer state cut": (cut("checkpoint-3/trainer.pt", 0.5), 2),
    "trainer state a text": (write("checkpoint-3/trainer.pt", b"hello"), 2),
    "trainer state a list": (lambda run: torch.save([1], run / "checkpoint" / "trainer.pt"), 2),
    "state without step": (edit_state(lambda state: state.pop("step")), 2),
    "state without optimizer": (edit_state(lambda state: state.pop("optimizer")), 2),
    "state without versions": (edit_state(lambda state: state.pop("versions")), 2),
    "step -1": (state_to("step", -1), 2),
    "step a text": (state_to("step", "3"), 2),
    "versions a number": (state_to("versions", 3), 2),
    "optimizer empty": (state_to("optimizer", {}), 2),
    "optimizer of another model": (edit_state(lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))), 2),
    "moments missing": (edit_state(lambda state: state["optimizer"]["state"][0].pop("exp_avg")), 2),
    "weights cut": (cut("checkpoint-3/model.safetensors", 0.5), 2),
    "weights gone": (delete("checkpoint-3/model.safetensors"), 2),
    "weights empty": (write("checkpoint-3/model.safetensors", b""), 2),
    "model config broken": (write("checkpoint-3/config.json", b"{"), 2),
    "model config empty": (write("checkpoint-3/config.json", b"{}"), 2),
    "tokenizer broken": (write("checkpoint-3/tokenizer.json", b"{"), 2),
    "a link to itself": (link_to_itself, 0),
}


# The third set: with the other two 99.
EVEN_MORE_EDITS = {
    "config twice": (append("config.json", b"{}"), 2),
    "config with a mark of UTF-8": (encoded("config.json", b"\xef\xbb\xbf"), 0),
    "config in UTF-16": (encoded("config.json", encoding="utf-16"), 0),
    "config with CRLF": (encoded("config.json", ends="\r\n"), 0),
    "config with a setting of its own": (setting_to("mine", 3), 0),
    "config a folder": (folder_for("config.json"), 2),
    "config a link to nothing": (link_for("config.json", "nothing"), 2),
    "lr a text": (setting_to("lr", "1e-4"), 2),
    "lr of 400 digits": (setting_to("lr", 10**400), 2),
    "seed of 400 digits": (setting_to("seed", 10**400), 2),
    "seed negative": (setting_to("seed", -1), 2),
    "group_size 1": (setting_to("group_size", 1), 2),
    "temperature 0": (setting_to("temperature", 0), 2),
    "steps 0": (setting_to("steps", 0), 2),
    "judge null": (setting_to("judge", None), 2),
    "judge without a port": (setting_to("judge", "http://h:99999/v1"), 2),
    "judge_model half a character": (setting_to("judge_model", "\ud800"), 2),
    "template_kwargs a list": (setting_to("template_kwargs", "[1]"), 2),
    "data without rows": (setting_to("data", os.devnull), 2),
    "max_new_tokens too many": (setting_to("max_new_tokens", 10**6), 2),
    "another method": (setting_to("method", "rler"), 2),
    "metrics a folder": (folder_for("metrics.jsonl"), 2),
    "samples a link to nowhere": (link_for("samples.jsonl", "no/such/place"), 2),
    "a log that ends in zeros": (append("metrics.jsonl", bytes(4096)), 0),
    "a row of ten million letters": (append("samples.jsonl", b"x" * 10_000_000), 0),
    "a row of a later step": (append("metrics.jsonl", b'{"step": 9}\n'), 0),
    "a lock that was left": (write("lock", b"process 1 on a machine"), 0),
    "a lock that is a folder": (folder_for("lock"), 2),
    "half a checkpoint": (empty_folder("checkpoint-4.tmp"), 0),
    "a link to a checkpoint that is gone": (link_for("checkpoint", "checkpoint-9"), 0),
    "a checkpoint that is a file": (replace_checkpoint_by_a_file, 2),
    "an empty checkpoint beside it": (empty_folder("checkpoint-99"), 0),
    "an empty checkpoint and no link": (empty_checkpoint_without_link, 2),
    "step true": (state_to("step", True), 2),
    "step of 30 digits": (state_to("step", 10**30), 2),
    "groups of parameters missing": (edit_state(lambda state: state["optimizer"].update(param_groups=[])), 2),
    "unfinished a text": (state_to("unfinished", "x"), 2),
    "digests of other data": (state_to("data", {"data": "0", "eval_data": "0"}), 2),
    "weights not a number": (edit_weights(lambda weights: weights["model.norm.weight"].fill_(float("nan"))), 2),
    "another group_size": (setting_to("group_size", 3), 2),
    "another seed": (setting_to("seed", 77), 2),
    "another lr": (setting_to("lr", 1e-3), 2),
    "no settings in the state": (edit_state(lambda state: state.pop("settings")), 2),
    "settings of the state a number": (state_to("settings", 1), 2),
    "the chat template gone": (lambda run: (run / "checkpoint-3/chat_template.jinja").unlink(), 2),
    "another chat template": (append("checkpoint-3/chat_template.jinja", b"x"), 2),
    "a tensor of the weights missing": (edit_weights(lambda weights: weights.pop("model.norm.weight")), 2),
}
STATES = EDITS | MORE_EDITS | EVEN_MORE_EDITS


def test_there_are_99_edits():
    assert len(STATES) >= 99


def attack(base, tmp_path, capsys, edit, wanted):
    """The edited run, resumed."""
    folder = tmp_path / "run"
    shutil.copytree(base[1], folder, symlinks=True)
    edit(folder)
    rows = lines_so_far_or_none(folder)
    capsys.readouterr()
    status = train.main(["--resume", str(folder), "--steps", "4"])
    if status == 2:
        one_line(capsys)
        assert lines_so_far_or_none(folder) == rows  # what is refused is left as it was
    assert status == wanted
    if status == 0:
        steps = [row["step"] for row in lines(folder / "metrics.jsonl")]
        assert steps == [0, 1, 2, 3, 4] and (folder / "report.html").exists()
        assert train.find_checkpoint(folder).name == "checkpoint-4"
    assert not Path("owned").exists() and not (folder / "lock").is_file()


def lines_so_far_or_none(folder):
    """The bytes of the log, if it has any."""
    path = folder / "metrics.jsonl"
    return path.read_bytes() if path.is_file() else None


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_run_resumes_or_is_refused_in_one_line(base, tmp_path, capsys, name):
    attack(base, tmp_path, capsys, *EDITS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", some_of(MORE_EDITS | EVEN_MORE_EDITS, 3))
def test_many_edited_runs_resume_or_are_refused_in_one_line(base, tmp_path, capsys, name):
    attack(base, tmp_path, capsys, *STATES[name])


def test_a_finished_run_that_was_killed_before_its_report_gets_one(base, tmp_path, capsys):
    shutil.copytree(base[1], tmp_path / "run", symlinks=True)
    for name in ("report.html", "report.png"):
        (tmp_path / "run" / name).unlink()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "report.png").exists()
    assert "held-out score" in capsys.readouterr().out


def test_a_folder_of_somebodys_own_is_not_pruned(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "run", symlinks=True)
    shutil.copytree(base[1] / "checkpoint-3", tmp_path / "run" / "checkpoint-best")
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint*"))
    assert left == ["checkpoint", "checkpoint-4", "checkpoint-best"]


def test_a_save_that_failed_at_once_keeps_the_checkpoint_it_began_with(base, tmp_path, monkeypatch):
    """A resumed run whose first step fails saves nothing: the checkpoint of that step is there already, by any name."""
    run = tmp_path / "run"
    shutil.copytree(base[1], run, symlinks=True)
    (run / "checkpoint").unlink()
    (run / "checkpoint").symlink_to((run / "checkpoint-3").resolve())
    before = (run / "checkpoint-3").stat().st_ino

    def fails(*arguments, **more):
        raise FloatingPointError("the gradient is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", fails)
        assert train.main(["--resume", str(run), "--steps", "4"]) == 2
    assert (run / "checkpoint-3").stat().st_ino == before
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0


def test_a_long_way_to_the_first_checkpoint_is_no_lost_one(base, tmp_path, monkeypatch, capsys):
    """Killed before the first save of --save_every 100, and resumed with a smaller one, the run begins again."""
    run = tmp_path / "run"
    flags = [*base[0], "--save_every", "100", "--out", str(run)]
    assert interrupted(monkeypatch, 2, lambda: train.main(flags)) == 130
    assert not (run / "checkpoint").exists() and len(lines(run / "metrics.jsonl")) == 3
    assert train.main(["--resume", str(run), "--save_every", "1"]) == 0
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_second_interruption_after_a_copy_without_links(base, tmp_path, monkeypatch):
    """The save that follows puts a link where the folder was."""
    shutil.copytree(base[1], tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint").is_dir() and not (tmp_path / "run" / "checkpoint").is_symlink()

    def resume():
        return train.main(["--resume", str(tmp_path / "run"), "--steps", "6"])

    assert interrupted(monkeypatch, 5, resume) == 130
    assert (tmp_path / "run" / "checkpoint").is_symlink()
    assert resume() == 0


# ---------------------------------------------------------------------- flags

VALUES = [
    "", "nan", "inf", "-inf", "1e308", "-1e308", "1e400", "-1", "0", "1", "2.5", "9" * 24, "9" * 5000, "0x10", "1_000", "٣",
    "True", "None", "null", "[]", "{}", "[" * 5000, '{"a": NaN}', "\x1b[31m", "\x00", "\udc80", "a\nb", "-", "--", "--steps", "/",
    "offline", "http://h:99999/v1", "http://", "smollm2", "points", "x" * 10_000, " ", "%s", "%(default)s", "é\u202e",
]  # fmt: skip


def fuzz(seed, count):
    """Random flags with random values: a config within its limits, or a UserError of one line."""
    rng = random.Random(seed)
    names = [entry.name for entry in train.fields(train.Config)]
    accepted = 0
    for _ in range(count):
        argv = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            flag = "--" + rng.choice(names)
            if rng.random() < 0.1:
                flag = flag[: rng.randrange(2, len(flag))] + rng.choice("x-=_")
            value = rng.choice(VALUES)
            if rng.random() < 0.2:
                value = "".join(rng.choice("0123456789-.e+{}\"'\\ \t\x07é") for _ in range(rng.randrange(12)))
            argv += rng.choice(([flag, value], [f"{flag}={value}"], [flag]))
        try:
            config, given = train.parse_config(argv)
        except train.UserError as error:
            assert str(error)
            continue
        accepted += 1
        for name in given.keys() - {"tis_cap"}:
            assert train.setting_problem(name, getattr(config, name)) == "" and getattr(config, name) != ""
    return accepted


def test_random_flags_are_a_config_or_one_line():
    assert fuzz(0, 400) > 20


@pytest.mark.long
def test_many_random_flags_are_a_config_or_one_line():
    assert fuzz(1, 10_000) > 500


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "9" * 24], "--seed 999999999999999999999999: give at most"),
        (["--clip_low", "-1"], "--clip_low -1.0: give at least 0"),
        (["--clip_low", "nan"], "give a finite number"),
        (["--beta", "inf"], "give a finite number"),
        (["--judge", "http://h:99999/v1", "--judge_model", "m"], "not a URL"),
        (["--judge", "http://localhost:1/v1"], "--judge_model"),
        (["--judge", "offline,offline,offline", "--judge_model", "a,b"], "3 judges and 2 names"),
        (["--eval_judge", "nowhere", "--eval_judge_model", "m"], "not a URL"),
        (["--judge", "http://a/v1", "--judge_model", "m", "--eval_judge", "http://b/v1", "--eval_judge_model", "m"], "give another model"),
        (["--judge", "lexical", "--eval_judge", "lexical"], "--eval_judge lexical: the judge that pays"),
        (["--resume", ""], "--resume: empty"),
        (["--data", ""], "--data: empty"),
        (["--template_kwargs", "[1]"], "not a JSON object"),
        (["--model", "\x1b[2J"], "give a text without control characters"),
        (["--mask_truncated", "2"], "--mask_truncated"),
        (["--prompts_per_step", "1000000000"], "give at most"),
        (["--seed", "9" * 400], "give a finite number"),
        (["--data", "x" * 400], "File name too long"),
        (["--resume", "x" * 400], "File name too long"),
    ],
)
def test_odd_values_cost_one_line(base, tmp_path, capsys, flags, words):
    assert train.main([*base[0], "--out", str(tmp_path / "run"), *flags]) == 2
    error = one_line(capsys)
    assert words in error and "\x1b" not in error
    assert not (tmp_path / "run").exists()


def test_values_at_the_edge_end_a_run_or_one_line(base, tmp_path, capsys):
    """Accepted by the limits and absurd: the arithmetic may fail, the program may not."""
    extremes = (["--lr", "1e300"], ["--beta", "1e308"], ["--clip_high", "1e308"], ["--tis_cap", "1e308"], ["--group_size", "10000", "--prompts_per_step", "10000", "--max_new_tokens", "1900"])
    for number, flags in enumerate(extremes):
        status = train.main([*base[0], "--steps", "2", "--out", str(tmp_path / str(number)), *flags])
        if status == 2:
            one_line(capsys)
        assert status in (0, 2)


# Of whole runs, not only of the parser: 26 values of each setting, 1,040 and more in all.
VALUES_OF_RUNS = [
    "", "nan", "inf", "-inf", "1e308", "1e400", "-1", "0", "1", "2.5", "9" * 24, "9" * 400, "0x10", "٣", "True", "null", "[]",
    '{"a": NaN}', "\x1b[31m", "\x00", "\udc80", "a\nb", "--steps", "offline", "http://h:99999/v1", "x" * 10_000,
]  # fmt: skip


def ends_well(flags, capsys):
    """A run with these flags ends, or is refused in one line; its status."""
    capsys.readouterr()
    status = train.main(flags)
    if status == 2:
        assert "\x1b" not in one_line(capsys)
    assert status in (0, 2), flags
    return status


@pytest.mark.long
def test_any_value_of_any_flag_ends_a_run_or_one_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # "offline" may be somebody's model
    pairs = list(itertools.product([entry.name for entry in train.fields(train.Config)], VALUES_OF_RUNS))
    assert len(pairs) >= 1_040
    counts = {0: 0, 2: 0}
    for number, (name, value) in enumerate(some_of(pairs, 23)):
        out = ["--out", f"run{number}"]
        if name == "resume":
            out = []
        counts[ends_well([*base[0], "--steps", "1", *out, f"--{name}={value}"], capsys)] += 1
    print(counts)
    assert min(counts.values()) > 5


CHOICES = {
    "method": ("explicit", "points", "rler", "arlrr", "axis_mean", "gdpo"),
    "loss": ("grpo", "dr_grpo", "dapo"),
    "advantage": ("std", "mean", "none"),
    "temperature": ("0.01", "0.7", "100"),
    "group_size": ("2", "5"),
    "prompts_per_step": ("1", "3", "9"),
    "max_new_tokens": ("1", "7"),
    "lr": ("1e-6", "1"),
    "epochs": ("1", "2"),
    "minibatches": ("1", "2", "7"),
    "clip_low": ("0", "0.2", "1"),
    "clip_high": ("0", "5"),
    "beta": ("0", "0.1", "10"),
    "tis_cap": ("-1", "0", "2"),
    "mask_truncated": ("0", "1"),
    "pass_tokens": ("1", "64", "3072"),
    "checkpointing": ("0", "1"),
    "dtype": ("auto", "float32", "bfloat16"),
    "rubrics_kept": ("1", "5"),
    "schedule": ("search", "lowest_score", "cyclic", "random"),
    "stage": ("1", "3"),
    "class_by": ("axis", "category", "nothing"),
    "validation": ("1", "3"),
    "prompts": ("0", "1", "4"),
    "eval_every": ("1", "100"),
    "save_every": ("1", "100"),
    "judge_ahead": ("0", "1"),
}


@pytest.mark.long
def test_any_combination_of_flags_ends_a_run_or_one_line(base, tmp_path, capsys):
    """135 of them by a fixed seed, each with up to a dozen flags; every third run is resumed as well."""
    rng = random.Random(0)
    ended = 0
    for number in range(135 if FULL else 9):
        flags = [*base[0], "--steps", "2", "--out", str(tmp_path / str(number))]
        for name in rng.sample(sorted(CHOICES), rng.randint(3, 12)):
            flags += [f"--{name}", rng.choice(CHOICES[name])]
        status = ends_well(flags, capsys)
        ended += status == 0
        if status == 0 and number % 3 == 0:
            assert ends_well(["--resume", str(tmp_path / str(number)), "--steps", "3"], capsys) == 0
            steps = [row["step"] for row in lines(tmp_path / str(number) / "metrics.jsonl")]
            assert steps == [0, 1, 2, 3]
    assert ended > (90 if FULL else 4)


# ---------------------------------------------------------------------- disks


def with_little_room(size: int, flags: list[str], log: str) -> None:
    """A run in which no file can grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    quietly(flags, log)


def room(server, base, tmp_path, size):
    """Ends well or in one line; then it is the same run with more room."""
    flags, whole = base
    cut = tmp_path / "cut"
    process = server.Process(target=with_little_room, args=(size, [*flags, "--out", str(cut)], str(tmp_path / "log")))
    process.start()
    process.join()
    printed = (tmp_path / "log").read_text()
    assert process.exitcode in (0, 2) and "Traceback" not in printed, printed
    more = ["--resume", str(cut)]
    if not (cut / "config.json").exists():
        more = [*flags, "--out", str(cut)]
    assert train.main(more) == 0
    assert lines(cut / "samples.jsonl") == lines(whole / "samples.jsonl")


def test_a_full_disk_ends_in_one_line(server, base, tmp_path):
    for size in (5_000, 60_000):
        (tmp_path / str(size)).mkdir()
        room(server, base, tmp_path / str(size), size)


# With the two above 34.
SIZES = [
    1, 10, 50, 100, 200, 350, 500, 750, 1_000, 1_500, 2_000, 2_500, 3_000, 4_000, 6_000, 7_000, 8_500, 10_000, 15_000, 20_000,
    25_000, 30_000, 37_000, 45_000, 80_000, 100_000, 120_000, 160_000, 200_000, 300_000, 400_000, 800_000,
]  # fmt: skip


@pytest.mark.long
def test_disks_of_many_sizes_end_in_one_line(server, base, tmp_path):
    for size in some_of(SIZES, 3):
        (tmp_path / str(size)).mkdir()
        room(server, base, tmp_path / str(size), size)


# ---------------------------------------------------------------------- terminals and secrets


@pytest.mark.long
def test_a_closed_pipe_does_not_end_the_training(base, tmp_path):
    """As `python train.py | head -1` leaves it."""
    process = spawn(tmp_path, *base[0], "--steps", "4", "--out", "run")
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert len(lines_so_far(tmp_path / "run" / "metrics.jsonl")) == 5


def test_nothing_that_is_printed_moves_the_terminal(capsys):
    train.say("\x1b]0;title\x07 \x9b2J caf\u00e9 \u202e")
    train.warn("\x1b[31m")
    shown = capsys.readouterr()
    assert "caf\u00e9" in shown.out and "\\x1b" in shown.out and "\\x1b" in shown.err
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown.out + shown.err)


def test_a_servers_words_are_printed_as_text(base, tmp_path, capsys):
    class Rude(JudgeServer):
        def verdict(self, body):
            return "\x1b[2J no verdict"

    with Rude() as server:
        flags = ["--judge", server.url, "--judge_model", "m", "--out", str(tmp_path / "run")]
        assert train.main([*base[0], *flags]) == 2
    assert "\x1b" not in one_line(capsys)


def test_a_password_in_the_judges_url_is_in_no_file(base, tmp_path, capsys):
    password = "s3cr,t@w/rd"
    with JudgeServer() as server:
        url = server.url.replace("http://", f"http://me:{password}@")
        flags = ["--judge", url, "--judge_model", "m", "--eval_judge", url, "--eval_judge_model", "n"]
        assert train.main([*base[0], *flags, "--out", str(tmp_path / "run")]) == 0
        assert server.url in json.loads((tmp_path / "run" / "config.json").read_text())["judge"]
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4", "--judge", url]) == 0
        assert train.main(["--resume", str(tmp_path / "run"), "--judge", "offline"]) == 2
        assert train.main([*base[0], *flags, "--judge", url + "\x1b", "--out", str(tmp_path / "other")]) == 2
    shown = capsys.readouterr()
    assert "s3cr" not in shown.out + shown.err
    assert train.without_passwords(f"http://me:{password}@h/{'x' * 300},offline") == f"http://h/{'x' * 300},offline"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"s3cr" not in path.read_bytes(), path


def test_a_signal_before_the_first_step_ends_quietly(base, tmp_path):
    process = spawn(tmp_path, *base[0], "--out", "run")
    while not (tmp_path / "run").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in printed, printed
