"""The study of the six designs, with a real server behind the judge and figures worked out by hand."""

import json
import sys

import pytest
from conftest import ROOT
from judge_server import JudgeServer

sys.path.append(str(ROOT / "tests" / "evidence"))
import judge_study


class Rater(JudgeServer):
    """Finds met what the response says word for word; rates by the number of stars in the response."""

    def verdict(self, body):
        text = body["messages"][-1]["content"]
        if "garbled" in text:
            return "I cannot say."
        if '"rating"' in text[-100:]:
            return json.dumps({"reason": "stars", "rating": 1 + text.count("*")})
        material, _, statement = text.rpartition("\n\nStatement: ")
        statement = statement.partition("\n\nFirst give")[0]
        return json.dumps({"reason": "by its words", "met": statement in material})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


def question(name, *answers, **more):
    rubric = [{"text": "Rest helps.", "weight": 2}, {"text": "Water helps.", "weight": 1}]
    entries = [{"text": text, "human": human} for text, human in answers]
    return {"id": name, "question": "A cold?", "rubric": rubric, "answers": entries} | more


ROWS = [
    # By the rubric right, by the stars wrong.
    question("a", ("Rest helps. Water helps.", 3), ("Water helps. **", 1), ("Nothing. ***", 0)),
    # By the rubric a tie, by the stars right; the only one with a reference.
    question("b", ("Rest helps. *", 1), ("Rest helps.", 0.5), reference="Rest."),
    # One answer that the judge cannot say anything about.
    question("c", ("garbled", 1), ("Water helps.", 0)),
    # People tell nothing apart here: left out.
    question("d", ("Rest helps.", 1), ("Water helps.", 1)),
]


def cells_of(printed):
    table = {}
    for line in printed.split("\n"):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) > 5 and cells[0] != "---":
            table[cells[0]] = cells
    return table


def test_six_designs_over_http_by_hand(tmp_path, capsys):
    path = write(tmp_path / "answers.jsonl", ROWS)
    with Rater() as server:
        flags = ["--data", path, "--judge", server.url, "--judge_model", "m"]
        assert judge_study.main(flags) == 0
        n_calls = len(server.bodies)
    table = cells_of(capsys.readouterr().out)
    head = table.pop("design")
    assert len(table) == 6 and head[1:5] == ["questions", "pairs", "unscored", "ties"]

    # explicit: question a has three pairs in the right order, b a tie, c is unscored.
    assert table["explicit"][1:6] == ["2", "5", "1", "1", "0.750"]
    assert table["points"][1:6] == ["2", "5", "1", "1", "0.750"]
    # Both ask the same, which is asked once: points pays for what had no answer, 2 x 2 calls of 7.
    assert (table["explicit"][9], table["points"][9]) == ("2.3", "0.6")
    # Stars: a is wrong in every pair, b is right.
    assert table["likert"][1:6] == table["implicit"][1:6] == ["2", "5", "1", "0", "0.500"]
    # Only b has a reference.
    assert table["reference_likert"][1:6] == ["1", "1", "0", "0", "1.000"]
    # The generic criteria are said by nobody: all ties.
    assert table["predefined"][1:6] == ["2", "5", "1", "4", "0.500"]
    assert table["likert"][7].startswith("-0.250 (")
    # Seven answers; the garbled one is asked twice.
    assert n_calls >= 7 * (2 + 4 + 1 + 1)


def test_labels_of_statements_are_questions_with_a_rubric(tmp_path, capsys):
    rows = []
    for response, met in (("Rest helps. Water helps.", (True, True)), ("Water helps.", (False, True))):
        for criterion, category, label in zip(("Rest.", "Water."), ("Must_have", "Nice_to_have"), met):
            row = {"question": "A cold?", "response": response, "criterion": criterion}
            rows.append(row | {"category": category, "met": label})
    [read] = judge_study.read_questions(write(tmp_path / "labels.jsonl", rows))
    assert [criterion.weight for criterion in read.example.rubric] == [1.0, 0.3]
    assert read.human == [1.0, pytest.approx(0.3 / 1.3)]
    assert read.pairs() == [(0, 1)]
    assert judge_study.main(["--data", str(tmp_path / "labels.jsonl"), "--judge", "lexical"]) == 0
    table = cells_of(capsys.readouterr().out)
    # Offline there are the two designs that need no opinion.
    assert set(table) == {"design", "explicit", "points"} and table["explicit"][5] == "1.000"

    # One answer per question has no pair.
    assert judge_study.main(["--data", write(tmp_path / "one.jsonl", rows[:2])]) == 2
    assert "no question has two answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, words",
    [
        ([question("a", ("x", True), ("y", 0))], "answer 1 needs 'text' and a number 'human'"),
        ([question("a", ("x", 1), ("y", 0)) | {"answers": None}], "no 'answers'"),
        ([question("a", ("x", 1), ("y", 0))] * 2, "id 'a' twice"),
        ([{"question": "?", "response": "x", "criterion": "", "met": True}], "a label needs"),
        ([{"question": "?", "response": "x", "criterion": "y", "met": 1}], "'met' must be"),
        ([{"question": "?"}], "no rubric"),
        ([], "no question has two answers"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, rows, words):
    path = write(tmp_path / "data.jsonl", rows)
    assert judge_study.main(["--data", path]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
