"""Payer against examiner, worked out by hand; test_rler.py has it on real runs."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "evidence"))
import examiner

GOOD = "Rest, and drink plenty of water."


def sample(step, name, text, reward, split="train"):
    return {"step": step, "split": split, "id": name, "text": text, "finish": "stop", "reward": reward}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


def data(path):
    rubric = [{"text": "Drinks water.", "weight": 2}, {"text": "Is whole.", "weight": 4, "check": "ends_complete"}]
    rubric.append({"text": "Is long.", "weight": -1, "check": "words > 8"})
    return write(path, [{"id": "cold", "question": "A cold?", "rubric": rubric}])


def test_the_payer_rises_and_the_examiner_does_not(tmp_path, capsys):
    """By hand: the reward that was paid climbs, and the answers come to break off."""
    rows = []
    for step, text, reward in ((1, GOOD, 0.2), (2, GOOD, 0.4), (3, "water water", 0.6), (4, "water", 1.0)):
        rows += [sample(step, "cold", text, reward), sample(step, "cold", text, None)]
    rows.append(sample(4, "cold", GOOD, 0.9, split="heldout"))
    write(tmp_path / "gamed-0" / "samples.jsonl", rows)
    run = str(tmp_path / "gamed-0")
    flags = ["--runs", run, "--data", data(tmp_path / "data.jsonl"), "--png", str(tmp_path / "picture.png")]
    assert examiner.main(flags) == 0
    printed = capsys.readouterr().out
    assert "| gamed, payer | 0.300 | 0.800 | +0.500 |" in printed
    assert "| gamed, examiner | 1.000 | 0.000 | -1.000 |" in printed
    assert (tmp_path / "picture.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--runs", "nowhere", "--data", "data/train.jsonl"], "no such file; give the folder of a run"),
        (["--runs", "RUN", "--data", "nowhere.jsonl"], "no such file"),
        (["--runs", "RUN", "--data", "data/heldout.jsonl"], "has none of the prompts"),
        (["--runs", "RUN", "--data", "data/train.jsonl", "--examiner", "http://127.0.0.1:9/v1"], "--judge_model"),
    ],
)
def test_what_cannot_be_examined_is_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(ROOT)
    write(tmp_path / "run" / "samples.jsonl", [sample(1, "cold", GOOD, 1.0)])
    assert examiner.main([str(tmp_path / "run") if flag == "RUN" else flag for flag in flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
