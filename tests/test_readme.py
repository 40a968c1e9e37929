"""What the two READMEs say can be done can be done: names, files and flags exist, the forks apply and run."""

import importlib
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import SMALL, lines

import rar
import train

README = (ROOT / "README.md").read_text(encoding="utf8")
EVIDENCE = (ROOT / "tests" / "evidence" / "README.md").read_text(encoding="utf8")
BOTH = README + EVIDENCE


def test_it_is_short():
    assert len(README.encode()) <= 10_000


def test_every_function_and_test_that_it_names_exists():
    functions = set(re.findall(r"`((?:rar|judge|grpo|rler|arlrr|train)\.\w+)`", BOTH)) - {"rar.py", "judge.py", "grpo.py", "rler.py", "arlrr.py", "train.py"}
    assert len(functions) >= 4
    for name in functions:
        module, _, attribute = name.partition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    tests = re.findall(r"`(test_\w+\.py)::(\w+)`", BOTH)
    assert len(tests) >= 3
    for file, test in tests:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf8"), (file, test)


def test_its_row_is_read_and_trained_on(few, tiny, tmp_path):
    [row] = re.findall(r"```json\n(.+?)\n```", README, re.DOTALL)
    rows = [row, row.replace("nosebleed", "cold")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf8")
    examples = rar.read_examples(tmp_path / "rows.jsonl")
    assert [(c.weight, bool(c.check), c.category) for c in examples[0].rubric] == [(5, False, "Essential"), (3, True, "Important"), (-4, False, "Pitfall")]
    flags = ["--model", str(tiny), "--data", str(tmp_path / "rows.jsonl"), *SMALL, "--steps", "1", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0


def test_every_file_that_it_names_is_there():
    pictures = re.findall(r"\]\((\w+\.png)\)", EVIDENCE)
    assert pictures
    for name in pictures:
        assert (ROOT / "tests" / "evidence" / name).is_file(), name
    programs = set(re.findall(r"(?:python|torchrun \S+) ((?:[\w]+/)*\w+\.py)", BOTH)) | set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", BOTH))
    assert len(programs) > 8
    for name in programs:
        assert (ROOT / name).exists(), name


def help_of(program, monkeypatch, capsys):
    """What `python PROGRAM --help` prints, in this process: each start would import torch anew."""
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert not ended.value.code
    return capsys.readouterr().out


def test_every_flag_in_its_commands_exists(monkeypatch, capsys):
    plain = re.sub(r"\\?\n(?=[^\n])", " ", BOTH)  # commands and sentences go over several lines
    commands = re.findall(r"(?:python|torchrun [^`]*?) ((?:\w+/)*\w+\.py)([^`|]*)", plain)
    assert len(commands) > 15
    used = {}
    for program, rest in commands:
        used.setdefault(program, set()).update(re.findall(r"(?<!\S)--\w+", rest.split("&&")[0]))
    for program, flags in used.items():
        if flags:
            known = set(re.findall(r"--\w+", help_of(program, monkeypatch, capsys)))
            assert flags <= known, (program, flags - known)


def test_every_metric_to_watch_is_logged(tiny, few, tmp_path):
    import train

    assert train.main(["--model", str(tiny), "--eval_data", few, *SMALL, "--out", str(tmp_path / "run")]) == 0
    logged = set()
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        logged |= set(row)
    table = README.partition("## Ten metrics")[2].partition("\n## ")[0]
    named = []
    for row in table.split("\n"):
        if row.startswith("| `"):
            named += re.findall(r"`(\w+)`", row.split("|")[1])
    assert len(named) >= 10
    assert set(named) <= logged, set(named) - logged


# ---------------------------------------------------------------------- the forks

FORKS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL) + re.findall(r"```diff\n(.*?)```", EVIDENCE, re.DOTALL)


def test_there_are_three_forks_of_under_twenty_lines():
    assert len(FORKS) == 3
    for diff in FORKS:
        changed = [line for line in diff.split("\n") if re.match(r"[+-](?![+-]{2} )", line)]
        assert 3 <= len(changed) < 20


def train_there(folder, flags, log):
    """`python train.py` in a copy, in a process that has imported everything but the copy's own files."""
    for name in ("judge", "rar", "grpo", "rler", "arlrr", "train", *[name for name in sys.modules if name.startswith("tools")]):
        sys.modules.pop(name, None)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["train.py", *flags]
    sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115  (until the process ends)
    runpy.run_path("train.py", run_name="__main__")


def forked(server, fork, few, number, *flags):
    """The copy with one fork applied, and a short training run in it."""
    done = subprocess.run(["git", "apply", "-"], cwd=fork, input=FORKS[number].encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    flags = [*SMALL, "--steps", "2", "--eval_data", few, "--out", "run", *map(str, flags)]
    process = server.Process(target=train_there, args=(fork, flags, fork / "log"))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (fork / "log").read_text(encoding="utf8")
    return lines(fork / "run" / "samples.jsonl")


def test_a_new_reward(server, fork, few, tiny):
    for row in forked(server, fork, few, 0, "--model", tiny, "--method", "weakest"):
        if row["split"] == "train" and row["text"].strip():
            wrong = [verdict for verdict in row["verdicts"] if verdict["score"] != (verdict["weight"] > 0)]
            assert 0 <= row["reward"] <= 1
            assert (row["reward"] == 1) == (not wrong)


def test_a_new_judge(server, fork, few, tiny):
    rows = forked(server, fork, few, 1, "--model", tiny)
    reasons = {verdict["reason"] for row in rows for verdict in row["verdicts"]}
    assert "flipped" in reasons
    assert len(reasons) > 1


def test_a_new_schedule(server, fork, few, tiny):
    forked(server, fork, few, 2, "--model", tiny, "--method", "arlrr", "--schedule", "sticky", "--stage", "1", "--validation", "2")
    rows = lines(fork / "run" / "metrics.jsonl")
    assert [row["stage"] for row in rows[1:]] == [1, 2]
