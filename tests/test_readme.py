"""What the README says can be done can be done: names exist, flags exist, and its three worked examples apply and run."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from judge_server import JudgeServer
from test_train import SMALL, lines

import train

TEXT = (ROOT / "README.md").read_text(encoding="utf8")


def test_every_name_in_the_table_of_papers_exists():
    part = TEXT.partition("## From paper to function to test")[2].partition("\n## ")[0]
    functions = re.findall(r"`((?:rar|judge|grpo|rler|arlrr)\.\w+)`", part)
    assert len(functions) >= 10
    for name in functions:
        module, _, attribute = name.partition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    tests = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", part)
    assert len(tests) >= 10
    for file, test in tests:
        assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf8"), (file, test)


def test_every_picture_and_file_it_names_is_there():
    named = re.findall(r"\]\((data/[\w.]+)\)", TEXT) + re.findall(r"python ((?:tests/)?\w+\.py)", TEXT)
    assert len(set(named)) > 8
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_flag_in_its_commands_exists(capsys):
    known = {"train": {f"--{f.name}" for f in fields(train.Config)}}
    for name in ("rar", "judge", "rler", "arlrr"):
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        known[name] = set(re.findall(r"--\w+", capsys.readouterr().out))
    commands = re.findall(r"(?:python |torchrun [^`\n]*?)(rar|judge|rler|arlrr|train)\.py([^`\n|]*)", TEXT)
    assert len(commands) > 15
    for file, rest in commands:
        flags = set(re.findall(r"(?<!\S)--\w+", rest))
        assert flags <= known[file] | {"--png"}, (file, flags - known[file])


EXAMPLES = re.findall(r"```diff\n(.*?)```", TEXT, re.S)


def test_there_are_three_worked_examples_of_under_twenty_lines():
    assert len(EXAMPLES) == 3
    for diff in EXAMPLES:
        changed = [line for line in diff.split("\n") if re.match(r"[+-](?![+-]{2} )", line)]
        assert 3 <= len(changed) < 20


def forked(fork, few, number, *flags):
    """The fork with one example applied, and one step of training in it."""
    diff = EXAMPLES[number].encode()
    done = subprocess.run(["git", "apply", "-"], cwd=fork, input=diff, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    command = [sys.executable, "train.py", *SMALL, "--steps", "2", "--eval_data", few, "--out", "run", *map(str, flags)]
    done = subprocess.run(command, cwd=fork, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return lines(fork / "run" / "samples.jsonl")


def test_a_new_aggregation(fork, few, tiny):
    rows = [row for row in forked(fork, few, 0, "--model", tiny, "--method", "weakest") if row["split"] == "train" and row["text"].strip()]
    for row in rows:
        wrong = [v for v in row["verdicts"] if v["score"] != (v["weight"] > 0)]
        assert 0 <= row["reward"] <= 1 and (row["reward"] == 1) == (not wrong)


def test_a_new_judge(fork, few, tiny):
    with JudgeServer() as one, JudgeServer() as two:
        flags = ["--model", tiny, "--judge", f"{one.url},{two.url}", "--judge_model", "m,n", "--judge_cache", "cache.jsonl"]
        rows = forked(fork, few, 1, *flags)
        assert len(one.bodies) > 10 and len(one.bodies) == len(two.bodies)  # both are asked
    assert all(v["score"] in (0, 0.5, 1) for row in rows for v in row["verdicts"])
    code = """if True:
        from types import SimpleNamespace
        from judge import Panel, Verdict
        judges = [SimpleNamespace(ask=lambda q, p, s=s: [Verdict(x) for x in s], take_stats=dict) for s in ((0.0, 1.0, None, None), (1.0, 1.0, 0.0, None))]
        print([v.score for v in Panel(judges).ask([None] * 4)])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=fork, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0.5, 1.0, 0.0, None]"


def test_a_new_schedule(fork, few, tiny):
    forked(fork, few, 2, "--model", tiny, "--method", "arlrr", "--schedule", "sticky", "--stage", "1", "--prompts", "10")
    assert [row["stage"] for row in lines(fork / "run" / "metrics.jsonl")[1:]] == [1, 2]
