"""The rubric writer against a real server that answers as a model would, well and badly."""

import json

import pytest
from conftest import ROOT
from judge_server import JudgeServer

import rar
from judge import LLMJudge

QUESTIONS = [
    {"id": "cold", "question": "What helps against a cold?", "reference": "Rest and drink plenty of fluids until the cold has passed, and see a doctor after ten days."},
    {"id": "sky", "question": "Why is the sky blue?"},
]


def item(k, **changes):
    good = {"title": f"Point {k}", "description": f"States fact number {k} about the subject.", "category": "Important", "weight": 3, "axis": "accuracy"}
    return good | changes


def rubric(*changed, n=7):
    """n items, the first Essential, the last ones replaced by those given."""
    items = [item(0, category="Essential", weight=5), *(item(k) for k in range(1, n))]
    return [*items[: n - len(changed)], *changed]


class Writer(JudgeServer):
    """Says what `said` holds for the question, one after the other; then a good rubric."""

    said: dict = {}

    def verdict(self, body):
        prompt = body["messages"][0]["content"]
        waiting = next((texts for question, texts in self.said.items() if question in prompt), [])
        return waiting.pop(0) if waiting else json.dumps({"rubric": rubric()})


def written(server, questions, out):
    return rar.write_rubrics(LLMJudge(server.url, "m"), str(questions), str(out), rar.writer_prompt, rar.checked_rubric)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def test_rubrics_are_written_in_the_format_that_is_read(questions, tmp_path, capsys):
    out = tmp_path / "rubrics.jsonl"
    pitfall = item(9, description="Recommends antibiotics against a cold.", category="Pitfall", weight=-2)
    with Writer() as server:
        server.said = {"What helps": ["Here: " + json.dumps({"rubric": rubric(pitfall)})]}
        assert rar.main(["--write", str(questions), "--judge", server.url, "--judge_model", "m", "--out", str(out)]) == 0
        prompts = {b["messages"][0]["content"] for b in server.bodies}
    report = json.loads(capsys.readouterr().out)
    assert report["written"] == 2 and report["dropped"] == [] and report["already_there"] == 0
    examples = {e.id: e for e in rar.read_examples(out)}
    assert examples["cold"].rubric[-1].weight == -2 and examples["cold"].reference == QUESTIONS[0]["reference"] and len(examples["sky"].rubric) == 7
    with_reference, without = sorted(prompts, key=lambda p: "sky" in p)
    assert "A reference answer" in with_reference and QUESTIONS[0]["reference"] in with_reference and "eference" not in without.partition("7 to 20")[0]
    assert "Do not copy sentences of the reference answer." in with_reference and "Do not copy" not in without


def test_what_others_wrote_into_the_file_is_kept(questions, tmp_path):
    """A whole row without its newline stays; a cut one goes; rows of another kind, and names that mean another format, are refused."""
    out = tmp_path / "rubrics.jsonl"
    mine = {"id": "mine", "question": "Why?", "rubric": [{"text": "States A.", "weight": 1}]}
    for text, kept in ((json.dumps(mine), ["mine", "cold", "sky"]), (json.dumps(mine) + '\n{"id": "co', ["mine", "cold", "sky"]), ('{"id": "co', ["cold", "sky"])):
        out.write_text(text)
        with Writer() as server:
            assert written(server, questions, out)["written"] == 2
        assert [e.id for e in rar.read_examples(out)] == kept
    out.write_text('{"prompt_id": "x"}\n')
    with Writer() as server:
        with pytest.raises(rar.DataError, match=r"rubrics\.jsonl:1: not a row that was written here"):
            written(server, questions, out)
        with pytest.raises(rar.DataError, match="name a .jsonl file"):
            written(server, questions, tmp_path / "rubrics.jsonl.gz")
    assert out.read_text() == '{"prompt_id": "x"}\n'


@pytest.mark.parametrize("text, away", [("Gives the reference range of serum potassium.", False), ("Names the frame of reference.", False),
                                        ("Agrees with the reference.", True), ("Says what the reference answer says.", True)])  # fmt: skip
def test_items_that_point_away(text, away):
    assert bool(rar.POINTS_AWAY.search(text)) == away


@pytest.mark.parametrize(
    "broken, why",
    [
        (rubric()[:6], "7 to 20 items, not 6"),
        (rubric(n=21), "7 to 20 items, not 21"),
        (rubric({"title": "T", "description": "D."}), "must have exactly the keys"),
        (rubric(item(1, category="Vital")), "category 'Vital'"),
        (rubric(item(1, weight=-3)), "a Pitfall names a fault"),
        (rubric(item(1, weight=9)), "weight 9 does not go with Important"),
        (rubric(item(1, axis="style")), "axis 'style'"),
        (rubric(item(1, description="Agrees with the reference answer.")), "cannot be checked alone"),
        (rubric(item(1, description="Avoids antibiotics.", category="Pitfall", weight=-1)), "must name the mistake itself"),
        (rubric(item(1, description="Warns against smoking.", category="Pitfall", weight=-1)), "must name the mistake itself"),
        (rubric(item(1, description=QUESTIONS[0]["reference"])), "copies 12 words or more"),
        (rubric(item(1), item(1)), "stands there twice"),
        ([item(k) for k in range(7)], "no Essential item"),
    ],
)
def test_a_broken_rubric_is_asked_for_once_more_then_dropped_and_reported(questions, tmp_path, broken, why):
    out = tmp_path / "rubrics.jsonl"
    with Writer() as server:
        server.said = {"What helps": [json.dumps({"rubric": broken})] * 2}
        report = written(server, questions, out)
        corrections = [b["messages"][2]["content"] for b in server.bodies if len(b["messages"]) == 3]
    assert report["dropped"] == ["cold"] and report["written"] == 1 and len(corrections) == 1 and why in corrections[0]
    assert sum(report["refused"].values()) == 2 and [e.id for e in rar.read_examples(out)] == ["sky"]
    with Writer() as server:  # the next run asks only for what is not there
        report = written(server, questions, out)
        assert report["written"] == 1 and report["already_there"] == 1 and len(server.bodies) == 1
    assert [e.id for e in rar.read_examples(out)] == ["sky", "cold"]


def test_a_line_cut_off_by_a_kill_is_written_again(questions, tmp_path):
    out = tmp_path / "rubrics.jsonl"
    with Writer() as server:
        written(server, questions, out)
        whole = out.read_bytes()
        for cut in (0, 10, whole.index(b"\n") + 1, whole.index(b"\n") + 30, len(whole) - 1):
            out.write_bytes(whole[:cut])
            written(server, questions, out)
            assert out.read_bytes() == whole


def test_a_question_that_stands_twice_is_asked_once_and_written_twice(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(QUESTIONS[1] | {"id": name}) + "\n" for name in ("sky", "air")))
    with Writer() as server:
        report = written(server, path, tmp_path / "out.jsonl")
        assert report["written"] == 2 and report["dropped"] == [] and len(server.bodies) == 1
    assert [e.id for e in rar.read_examples(tmp_path / "out.jsonl")] == ["sky", "air"]


def test_what_cannot_work_is_one_line(questions, tmp_path, capsys):
    assert rar.main(["--write", str(questions)]) == 2
    assert "give --judge URL and --judge_model NAME" in capsys.readouterr().err
    assert rar.main(["--write", str(tmp_path / "none.jsonl"), "--judge", "http://127.0.0.1:9", "--judge_model", "m", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "none.jsonl" in error and error.count("\n") == 1
    assert rar.main(["--write", str(questions), "--judge", "http://127.0.0.1:9", "--judge_model", "m", "--out", str(tmp_path / "o.json")]) == 2
    assert "name a .jsonl file" in capsys.readouterr().err and not (tmp_path / "o.json").exists()


def test_more_than_a_batch_the_domain_and_the_canary(tmp_path):
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{n}", "question": f"Why {n}?", "canary": "mark"}) + "\n" for n in range(40)))
    with Writer() as server:
        assert rar.main(["--write", str(path), "--judge", server.url, "--judge_model", "m", "--domain", "science", "--out", str(out)]) == 0
        role = json.loads((ROOT / "data" / "rubric_domains.json").read_text())["science"]["role"]
        assert len(server.bodies) == 40 and all(role in b["messages"][0]["content"] for b in server.bodies)
    assert [(e.id, e.canary) for e in rar.read_examples(out)] == [(f"q{n}", "mark") for n in range(40)]
