"""What the two READMEs say can be done can be done: names, files and flags exist, the forks apply and run."""

import importlib
import re
import subprocess
import sys
from functools import lru_cache

from conftest import ROOT
from test_train import SMALL, lines

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


def test_every_file_that_it_names_is_there():
    pictures = re.findall(r"\]\((\w+\.png)\)", EVIDENCE)
    assert pictures
    for name in pictures:
        assert (ROOT / "tests" / "evidence" / name).is_file(), name
    programs = set(re.findall(r"(?:python|torchrun \S+) ((?:[\w]+/)*\w+\.py)", BOTH)) | set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", BOTH))
    assert len(programs) > 8
    for name in programs:
        assert (ROOT / name).exists(), name


@lru_cache
def help_of(program: str) -> str:
    return subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_flag_in_its_commands_exists():
    plain = re.sub(r"\\?\n(?=[^\n])", " ", BOTH)  # commands and sentences go over several lines
    commands = re.findall(r"(?:python|torchrun [^`]*?) ((?:\w+/)*\w+\.py)([^`|]*)", plain)
    assert len(commands) > 15
    for program, rest in commands:
        flags = set(re.findall(r"(?<!\S)--\w+", rest.split("&&")[0]))
        if flags:
            known = set(re.findall(r"--\w+", help_of(program)))
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


def forked(fork, few, number, *flags):
    """The copy with one fork applied, and a short training run in it."""
    done = subprocess.run(["git", "apply", "-"], cwd=fork, input=FORKS[number].encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    command = [sys.executable, "train.py", *SMALL, "--steps", "2", "--eval_data", few, "--out", "run", *map(str, flags)]
    done = subprocess.run(command, cwd=fork, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return lines(fork / "run" / "samples.jsonl")


def test_a_new_reward(fork, few, tiny):
    for row in forked(fork, few, 0, "--model", tiny, "--method", "weakest"):
        if row["split"] == "train" and row["text"].strip():
            wrong = [verdict for verdict in row["verdicts"] if verdict["score"] != (verdict["weight"] > 0)]
            assert 0 <= row["reward"] <= 1
            assert (row["reward"] == 1) == (not wrong)


def test_a_new_judge(fork, few, tiny):
    rows = forked(fork, few, 1, "--model", tiny)
    reasons = {verdict["reason"] for row in rows for verdict in row["verdicts"]}
    assert "flipped" in reasons
    assert len(reasons) > 1


def test_a_new_schedule(fork, few, tiny):
    forked(fork, few, 2, "--model", tiny, "--method", "arlrr", "--schedule", "sticky", "--stage", "1", "--validation", "2")
    rows = lines(fork / "run" / "metrics.jsonl")
    assert [row["stage"] for row in rows[1:]] == [1, 2]
