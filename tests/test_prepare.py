"""Foreign rows: every format of data/prepare.py, told apart by values, bad rows counted and named."""

import csv
import gzip
import json
import random
import sys
import types

import pytest

import rar
from data import prepare

HEALTHBENCH = {
    "prompt_id": "hb-1",
    "prompt": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "My head hurts."},
    ],
    "rubrics": [
        {"criterion": "Asks how long.", "points": 5, "tags": ["level:example", "axis:context_awareness"]},
        {"criterion": "Recommends opioids.", "points": -9, "tags": [["level:cluster"], ["axis:accuracy", ["cluster:pain"]]]},
    ],
    "example_tags": ["theme:context_seeking", ["physician_agreed_category:not-enough-context"]],
    "ideal_completions_data": {"ideal_completion": "How long has it hurt?"},
    "canary": "a mark",
}
PROFESSIONAL = {
    "id": "pro-1",
    "conversation": {"messages": [{"role": "user", "content": "Which dose?"}]},
    "use_case": "care",
    "rubric_items": [{"criterion_text": "Names a dose.", "points": 7}, {"criterion_text": "Invents a dose.", "points": -5}],
}
RELEASED = {
    "question": "What treats scurvy?",
    "reference_answer": "",
    "question_source": "book",
    "rubric": [
        {"title": "Vitamin", "description": "Essential Criteria: Names vitamin C.", "weight": 5},
        {"title": "Dose", "description": "Importnat Criteria: Gives a dose.", "weight": 3},
        {"title": "Foods", "description": "Optional Criteria: Lists fruit.", "weight": 1},
        {"title": "Iron", "description": "Pitfall Criteria: Does not mention fruit.", "weight": -1},
        {"title": "Harm", "description": "Pitfall Criteria: Avoids recommending surgery.", "weight": -2},
    ],
    "rubric_list": ["Essential Criteria: Names vitamin C."],
    "rubric_count": 5,
}
HUB = {
    "prompt": [{"role": "user", "content": "Plan a trip."}],
    "Rubrics": [{"criterion": "Names a city.", "points": 4}],
    "ability": "travel",
}
VERL = {
    "data_source": "meals",
    "prompt": "Plan a meal.",
    "reward_model": {"ground_truth": "Soup.", "rubrics": [{"criterion": "Names a dish.", "points": 2}]},
}
OWN = {
    "id": "own",
    "question": "Why?",
    "reference": "So.",
    "rubric": [{"text": "Says so.", "weight": 1, "axis": "accuracy"}],
    "topic": "life",
}
RESEARCH_RUBRICS = {
    "sample_id": "683a",
    "prompt": "Compare two batteries.",
    "domain": "STEM",
    "rubrics": [
        {"criterion": "Names both.", "weight": 5, "axis": "Explicit Criteria"},
        {"criterion": "Invents a source.", "weight": -4, "axis": "References & Citation Quality"},
    ],
}
DR_TULU = {
    "messages": [{"role": "user", "content": "Which models see?"}],
    "ground_truth": json.dumps(
        {
            "query": "Which models see?",
            "rubrics": [
                {"description": "Names a model [1].", "title": "Model", "weight": 0.5},
                {"description": "Avoids naming a source.", "title": "Source", "weight": -1.0},
            ],
        }
    ),
    "dataset": "rubric",
    "source": "rl_rag_train_sqa",
}
RESEARCH_QA = {
    "id": "rqa-7",
    "general_domain": "Physics",
    "field": "Optics",
    "query": "How do lenses bend light?",
    "date": "2020",
    "rubric": [
        {"rubric_item": "Does the response cite Snell?", "type": ["Citation"], "citation_metadata": None},
        {"rubric_item": "Does the response explain focus?", "type": "Explanation"},
    ],
}
OPEN_RUBRICS = {
    "instruction": "Suggest five objects.",
    "response_a": "One.",
    "response_b": "Two.",
    "winner": "response_a",
    "rubric": "1. Includes exactly five objects. [Hard Rule]\n2. Communicates clearly\n   and in order. [Principle]\n10) Ends well.",
}
MEDQA = {"question": "Which metal?", "options": {"A": "Iron", "B": "Lead", "C": "Tin"}, "answer_idx": "B", "answer": "Lead"}
GPQA = {
    "Question": "Which one?",
    "Correct Answer": "Lead",
    "Incorrect Answer 1": "Iron",
    "Incorrect Answer 2": "Tin",
    "Record ID": "rec9",
    "Canary String": "a mark",
}
EVERY = {
    "HealthBench": HEALTHBENCH,
    "Professional": PROFESSIONAL,
    "RaR": RELEASED,
    "RubricHub": HUB,
    "verl": VERL,
    "own": OWN,
    "ResearchRubrics": RESEARCH_RUBRICS,
    "DR Tulu": DR_TULU,
    "ResearchQA": RESEARCH_QA,
    "OpenRubrics": OPEN_RUBRICS,
    "MedQA": MEDQA,
    "GPQA": GPQA,
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


@pytest.fixture
def convert(tmp_path):
    """A function rows -> the examples that rar.py reads from their converted file."""

    def converted(*rows, **options):
        source = write(tmp_path / "a.jsonl", *rows)
        prepare.prepare(str(source), str(tmp_path / "out.jsonl"), force=True, **options)
        return rar.read_examples(tmp_path / "out.jsonl")

    return converted


def signed(example):
    return [(c.text, c.weight) for c in example.rubric]


# ----------------------------------------------------------------------------- one test per format


def test_healthbench(convert):
    [e] = convert(HEALTHBENCH)
    assert (e.id, e.question, len(e.prompt), e.reference, e.canary) == ("hb-1", "My head hurts.", 3, "How long has it hurt?", "a mark")
    assert [(c.weight, c.axis) for c in e.rubric] == [(5, "context_awareness"), (-9, "accuracy")]
    assert e.rubric[1].tags == ["level:cluster", "axis:accuracy", "cluster:pain"]
    assert e.tags == ["theme:context_seeking", "physician_agreed_category:not-enough-context"]
    [plain] = convert(HEALTHBENCH | {"ideal_completions_data": None})
    assert plain.reference == ""


def test_real_healthbench_rows_are_the_same_converted_or_read_directly(shared, tmp_path):
    path = shared("healthbench_200.jsonl")
    report = prepare.prepare(str(path), str(tmp_path / "out.jsonl"))
    assert (report.read, report.written, report.skipped) == (200, 200, 0)
    assert rar.read_examples(tmp_path / "out.jsonl") == rar.read_examples(path)


def test_healthbench_professional(convert):
    [e] = convert(PROFESSIONAL)
    assert (e.id, e.question, e.tags) == ("pro-1", "Which dose?", ["theme:care"])
    assert signed(e) == [("Names a dose.", 7), ("Invents a dose.", -5)]


def test_rar_as_released(convert):
    [e] = convert(RELEASED)
    assert [c.category for c in e.rubric] == ["Essential", "Important", "Optional", "Pitfall", "Pitfall"]
    assert [c.weight for c in e.rubric] == [5, 3, 1, -1, 2]  # "Avoids ..." is good when met, so its sign is turned
    assert e.rubric[0].text == "Names vitamin C." and e.reference == ""
    reward = lambda *scores: rar.explicit_reward(e.rubric, list(scores))
    assert reward(1, 1, 1, 0, 1) == 1.0 and reward(1, 1, 1, 1, 0) < reward(1, 1, 1, 1, 1) < 1.0


def test_rubrichub_and_verl(convert):
    hub, verl = convert(HUB, VERL)
    assert hub.rubric[0].weight == 4 and hub.tags == ["theme:travel"]
    assert verl.reference == "Soup." and verl.rubric[0].text == "Names a dish."


def test_research_rubrics_under_either_column(convert):
    items = RESEARCH_RUBRICS["rubrics"]
    first, second = convert(RESEARCH_RUBRICS, RESEARCH_RUBRICS | {"sample_id": "x", "rubrics": None, "rubric_items": items})
    assert (first.id, second.id) == ("683a", "x") and first.rubric == second.rubric
    assert signed(first) == [("Names both.", 5), ("Invents a source.", -4)]
    assert [c.axis for c in first.rubric] == ["Explicit Criteria", "References & Citation Quality"]
    assert first.tags == second.tags == ["theme:STEM"]


def test_dr_tulu(convert):
    [e] = convert(DR_TULU)
    # The sign is the polarity, whatever the wording; nothing is guessed about category or axis.
    assert signed(e) == [("Names a model [1].", 0.5), ("Avoids naming a source.", -1.0)]
    assert [(c.title, c.category, c.axis) for c in e.rubric] == [("Model", "", ""), ("Source", "", "")]
    assert e.question == "Which models see?"


def test_rar_in_the_layout_of_open_instruct(convert):
    truth = {"query": "What treats scurvy?", "rubrics": RELEASED["rubric"]}
    row = {"messages": [{"role": "user", "content": "What treats scurvy?"}], "ground_truth": json.dumps(truth)}
    # Newer rows hold the text in a list.
    [plain], [listed] = convert(row), convert(row | {"ground_truth": [json.dumps(truth)]})
    assert plain.rubric == listed.rubric == convert(RELEASED)[0].rubric


def test_research_qa(convert):
    [e] = convert(RESEARCH_QA)
    assert (e.id, e.question, e.tags) == ("rqa-7", "How do lenses bend light?", ["theme:Physics"])
    assert signed(e) == [("Does the response cite Snell?", 1), ("Does the response explain focus?", 1)]
    assert [(c.tags, c.axis, c.category) for c in e.rubric] == [(["type:Citation"], "", ""), (["type:Explanation"], "", "")]


def test_open_rubrics(convert):
    [e] = convert(OPEN_RUBRICS)
    assert signed(e) == [("Includes exactly five objects.", 1), ("Communicates clearly and in order.", 1), ("Ends well.", 1)]
    assert [c.tags for c in e.rubric] == [["hard_rule"], ["principle"], []]
    assert e.reference == ""


def test_every_row_of_a_mixture_is_told_apart(convert, tmp_path):
    examples = convert(*EVERY.values())
    assert len(examples) == len(EVERY) - 2 + 2 * prepare.RUNS
    assert next(e for e in examples if e.id == "own").tags == ["theme:life"]
    alone = [example for row in EVERY.values() for example in convert(row)]
    for one, other in zip(examples, alone):
        assert (one.prompt[-1]["content"][:12], one.reference[3:], len(one.rubric)) == (other.prompt[-1]["content"][:12], other.reference[3:], len(other.rubric))
