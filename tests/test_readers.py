"""Every format of rows that rar.py reads, told apart by its keys."""

import gzip
import json
import sys

import pytest

import rar

HEALTHBENCH = {
    "prompt_id": "hb-1",
    "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "My head hurts."}],
    "rubrics": [
        {"criterion": "Asks how long.", "points": 5, "tags": ["level:example", "axis:context_awareness"]},
        {"criterion": "Recommends opioids.", "points": -9, "tags": [["level:cluster"], ["axis:accuracy", ["cluster:pain"]]]},
    ],
    "example_tags": ["theme:context_seeking", ["physician_agreed_category:not-enough-context"]],
    "ideal_completions_data": {"ideal_completion": "How long has it hurt?"},
    "canary": "a mark",
}
RELEASED = {
    "question": "What treats scurvy?",
    "reference_answer": "",
    "rubric": [
        {"title": "Vitamin", "description": "Essential Criteria: Names vitamin C.", "weight": 5},
        {"title": "Dose", "description": "Importnat Criteria: Gives a dose.", "weight": 3},
        {"title": "Foods", "description": "Optional Criteria: Lists fruit.", "weight": 1},
        {"title": "Iron", "description": "Pitfall Criteria: Does not mention fruit.", "weight": -1},
        {"title": "Harm", "description": "Pitfall Criteria: Avoids recommending surgery.", "weight": -2},
    ],
}
HUB = {"prompt": [{"role": "user", "content": "Plan a trip."}], "Rubrics": [{"criterion": "Names a city.", "points": 4}], "ability": "travel"}
VERL = {"prompt": "Plan a meal.", "reward_model": {"ground_truth": "Soup.", "rubrics": [{"criterion": "Names a dish.", "points": 2}]}}
OWN = {"id": "own", "question": "Why?", "reference": "So.", "rubric": [{"text": "Says so.", "weight": 1, "axis": "accuracy"}], "topic": "life"}
MEDQA = {"question": "Which metal?", "options": {"A": "Iron", "B": "Lead", "C": "Tin"}, "answer_idx": "B", "answer": "Lead"}
GPQA = {"Question": "Which one?", "Correct Answer": "Lead", "Incorrect Answer 1": "Iron", "Incorrect Answer 2": "Tin", "Record ID": "rec9"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def test_healthbench(tmp_path):
    [e] = rar.read_examples(write(tmp_path / "a.jsonl", HEALTHBENCH))
    assert (e.id, e.question, len(e.prompt), e.reference, e.canary) == ("hb-1", "My head hurts.", 3, "How long has it hurt?", "a mark")
    assert [(c.weight, c.axis) for c in e.rubric] == [(5, "context_awareness"), (-9, "accuracy")]
    assert e.rubric[1].tags == ["level:cluster", "axis:accuracy", "cluster:pain"]
    assert e.tags == ["theme:context_seeking", "physician_agreed_category:not-enough-context"]
    [plain] = rar.read_examples(write(tmp_path / "b.jsonl", HEALTHBENCH | {"ideal_completions_data": None}))
    assert plain.reference == ""


def test_rar_as_released(tmp_path):
    [e] = rar.read_examples(write(tmp_path / "a.jsonl", RELEASED))
    assert [c.category for c in e.rubric] == ["Essential", "Important", "Optional", "Pitfall", "Pitfall"]
    assert [c.weight for c in e.rubric] == [5, 3, 1, -1, 2]  # "Avoids ..." is good when met, so its sign is turned
    assert e.rubric[0].text == "Names vitamin C." and e.reference == ""
    reward = lambda *scores: rar.explicit_reward(e.rubric, list(scores))
    assert reward(1, 1, 1, 0, 1) == 1.0 and reward(1, 1, 1, 1, 0) < reward(1, 1, 1, 1, 1) < 1.0


def test_rubrichub_and_verl(tmp_path):
    hub, verl = rar.read_examples(write(tmp_path / "a.jsonl", HUB, VERL))
    assert hub.rubric[0].weight == 4 and hub.tags == ["theme:travel"] and verl.reference == "Soup." and verl.rubric[0].text == "Names a dish."


def test_every_row_of_a_mixture_is_told_apart(tmp_path):
    examples = rar.read_examples(write(tmp_path / "a.jsonl", OWN, HEALTHBENCH, RELEASED, HUB, MEDQA))
    assert len(examples) == 4 + rar.RUNS and examples[0].id == "own" and examples[0].tags == ["theme:life"]


@pytest.mark.parametrize("row", [MEDQA, GPQA])
def test_multiple_choice_is_asked_several_times_in_other_orders(tmp_path, row):
    examples = rar.read_examples(write(tmp_path / "a.jsonl", row))
    assert len(examples) == rar.RUNS and len({e.item for e in examples}) == 1 and len({e.id for e in examples}) == rar.RUNS
    for e in examples:
        assert e.options[e.answer] == "Lead" and sorted(e.options.values()) == ["Iron", "Lead", "Tin"]
        assert all(f"({letter}) {text}" in e.question for letter, text in e.options.items()) and "\\boxed" in e.question
    assert len({tuple(e.options.values()) for e in examples}) > 1
    again = rar.read_examples(tmp_path / "a.jsonl")
    assert [e.options for e in again] == [e.options for e in examples]  # the same orders for every run and policy


@pytest.mark.parametrize("row", [MEDQA | {"answer_idx": "D"}, MEDQA | {"options": {"A": "x"}}, MEDQA | {"options": {"A": "x", "B": "x"}}, MEDQA | {"options": ["Iron", "Lead"]}, GPQA | {"Question": None}])
def test_broken_multiple_choice_is_one_line(tmp_path, row):
    with pytest.raises(rar.DataError, match=r"a\.jsonl:1: needs a question"):
        rar.read_examples(write(tmp_path / "a.jsonl", row))


WRONG = [OWN | {"example_tags": 3}, OWN | {"rubric": [OWN["rubric"][0] | {"tags": [3]}]}, OWN | {"rubric": [OWN["rubric"][0] | {"axis": 3}]},
         HUB | {"reward_model": ["x"]}, MEDQA | {"answer_idx": ["A"]}]  # fmt: skip


@pytest.mark.parametrize("row", WRONG)
def test_values_of_the_wrong_kind_are_one_line(tmp_path, row):
    with pytest.raises(rar.DataError, match=r"a\.jsonl:1: a value of the wrong kind") as caught:
        rar.read_examples(write(tmp_path / "a.jsonl", row))
    assert "\n" not in str(caught.value)


def test_numbers_where_texts_are_usual_become_texts(tmp_path):
    [example] = rar.read_examples(write(tmp_path / "a.jsonl", OWN | {"reference": 42, "rubric": [OWN["rubric"][0] | {"title": 7}]}))
    assert example.reference == "42" and example.rubric[0].title == "7"


def test_real_multiple_choice_rows(shared):
    examples = rar.read_examples(shared("medqa_100.jsonl"))
    assert len(examples) == 100 * rar.RUNS
    letters = [e.answer for e in examples]
    assert all(0.15 < letters.count(letter) / len(letters) < 0.35 for letter in "ABCD")  # a policy that always says B gains nothing


def test_files_of_every_kind(tmp_path):
    write(tmp_path / "one.jsonl", OWN)
    (tmp_path / "two.json").write_text(json.dumps([HUB, VERL]))
    with gzip.open(tmp_path / "three.jsonl.gz", "wt") as file:
        file.write(json.dumps(HEALTHBENCH) + "\n")
    (tmp_path / "notes.txt").write_text("not a row")
    assert len(rar.read_examples(tmp_path)) == 4  # the folder
    for name, n in (("one.jsonl", 1), ("two.json", 2), ("three.jsonl.gz", 1)):
        assert len(rar.read_examples(tmp_path / name)) == n


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([HUB, HUB | {"prompt": [{"role": "user", "content": "Other."}]}])
    table.to_parquet(tmp_path / "a.parquet")
    first, second = rar.read_examples(tmp_path / "a.parquet")
    assert first.question == "Plan a trip." and second.rubric[0].weight == 4 and second.id == "a.parquet:2"
    assert len(rar.read_examples(tmp_path)) == 2  # also among the files of a folder
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(rar.DataError, match="a.parquet: ") as caught:
        rar.read_examples(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_packages_that_are_not_there_cost_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(rar.DataError, match="pip install datasets"):
        rar.read_examples(tmp_path / "a.parquet")
    with pytest.raises(rar.DataError, match="pip install datasets"):
        rar.read_examples("someone/some-rows")


def test_rows_of_the_hub(monkeypatch):
    """The package's own interface: load_dataset gives a mapping from split to rows."""
    import types

    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda name: {"train": [HUB], "test": [VERL]} if name == "someone/rows" else (_ for _ in ()).throw(OSError("no such data set\nmore"))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert [e.question for e in rar.read_examples("someone/rows")] == ["Plan a trip.", "Plan a meal."]
    assert [e.question for e in rar.read_examples("someone/rows:test")] == ["Plan a meal."]
    with pytest.raises(rar.DataError, match="no such data set") as caught:
        rar.read_examples("someone/else")
    assert "\n" not in str(caught.value)
    with pytest.raises(rar.DataError, match="someone/rows:dev: .*'dev'"):
        rar.read_examples("someone/rows:dev")


def test_a_question_in_two_files_is_reported(tmp_path, capsys):
    other = {**OWN, "id": "other", "question": "  why? "}
    write(tmp_path / "train.jsonl", OWN)
    write(tmp_path / "test.jsonl", other)
    assert len(rar.read_examples(tmp_path)) == 2
    assert "1 questions stand in more than one file" in capsys.readouterr().err
    rar.read_examples(write(tmp_path / "same.jsonl", OWN, other))
    assert "stand in more" not in capsys.readouterr().err  # within one file it is no leak


def test_labels_of_physicians_are_no_prompts(tmp_path):
    row = {"prompt": HEALTHBENCH["prompt"], "completion": "x", "rubric": "Asks how long.", "binary_labels": [True, False]}
    with pytest.raises(rar.DataError, match="meta-evaluation"):
        rar.read_examples(write(tmp_path / "a.jsonl", row))


def test_released():
    assert rar.released("Pitfall Criteria: Warns against smoking.", -1) == ("Warns against smoking.", 1, "Pitfall")
    assert [rar.released("Names a dose.", w)[2] for w in (5, 4, 3, 2, 1)] == ["Essential", "Important", "Important", "Optional", "Optional"]
