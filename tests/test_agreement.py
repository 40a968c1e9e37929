"""tools/agreement.py: what it is given is only read, and what is no label or no cache is one line."""

import hashlib
import json
import shutil
import sqlite3

import pytest
from judge_server import JudgeServer

from judge import LexicalJudge, LLMJudge, Question
from tools import agreement


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path):
    """A cache with three paid answers, by a judge that is still there: its log is not merged."""
    path = tmp_path / "a #1?.sqlite"
    with JudgeServer() as server:
        judge = LLMJudge(server.url, "m", cache_path=str(path))
        judge.ask([Question("Q", "r", f"States {n}.") for n in range(3)])
        yield path


def ends_in_one_line(capsys, flags, words):
    assert agreement.main([str(flag) for flag in flags]) == 2
    said, error = capsys.readouterr()
    assert words in error and error.count("\n") == 1 and not said


def test_an_export_never_writes_over_a_file(cache, tmp_path, capsys):
    """The worst one is the cache itself: its verdicts were paid for."""
    precious = tmp_path / "precious.jsonl"
    precious.write_text("mine")
    for out in (cache, precious):
        before = digest(out)
        ends_in_one_line(capsys, ["--cache", cache, "--export", out], "is there already")
        assert digest(out) == before
    assert agreement.main(["--cache", str(cache), "--export", str(tmp_path / "new.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 3
    assert (tmp_path / "new.jsonl").read_text().count("\n") == 3


def test_a_cache_is_only_looked_at(cache, tmp_path, capsys):
    before = digest(cache)
    assert agreement.main(["--cache", str(cache)]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 3
    assert digest(cache) == before

    # Of a run that has ended there is no log, and then nothing new stands beside the file.
    with sqlite3.connect(cache) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    alone = tmp_path / "alone" / "cache.sqlite"
    alone.parent.mkdir()
    shutil.copy(cache, alone)
    assert agreement.main(["--cache", str(alone)]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 3
    assert list(alone.parent.iterdir()) == [alone]

    # Somebody else's database, and a file that is none.
    theirs = tmp_path / "theirs.sqlite"
    with sqlite3.connect(theirs) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    (tmp_path / "notes").write_text("no database, but some text that is long enough " * 99)
    (tmp_path / "empty").write_text("")
    for path in (theirs, tmp_path / "notes", tmp_path / "empty"):
        before = digest(path)
        out = tmp_path / "out.jsonl"
        ends_in_one_line(capsys, ["--cache", path, "--export", out], "not a judge's cache")
        assert digest(path) == before and not out.exists()


@pytest.mark.parametrize("question", [["a"], None, 1, {}])
def test_a_question_is_a_text(question, tmp_path, capsys):
    row = {"response": "a", "criterion": "b", "met": True}
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'question': question})}\n")
    ends_in_one_line(capsys, [path], "labels.jsonl:2: needs the keys")


def test_labels_without_a_question_are_resampled_by_response():
    """As one question they were one cluster, and the interval of two clusters meant nothing."""
    rows = []
    for n in range(12):
        response = f"Drink water {n} times."
        rows.append({"response": response, "criterion": "Mentions water.", "met": n % 4 > 0})
        rows.append({"response": response, "criterion": "Mentions bread.", "met": n % 3 == 0})
    got = agreement.judge_labels(LexicalJudge(), rows)
    asked = [row | {"question": row["response"]} for row in rows]
    # The same clusters by another name, up to what the judge makes of the question.
    low, high = got["kappa_ci"]
    assert low < got["kappa"] < high
    assert got["kappa_ci"] == agreement.judge_labels(LexicalJudge(), asked)["kappa_ci"]
    # A row that does have one changes nothing for the others.
    rows[0]["question"] = "Thirst?"
    assert agreement.judge_labels(LexicalJudge(), rows)["kappa_ci"] == pytest.approx((low, high), abs=0.2)
