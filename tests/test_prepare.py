"""Foreign rows: every format of data/prepare.py, told apart by values, bad rows named."""

import copy
import csv
import gzip
import json
import random
import subprocess
import sys
import time
import tracemalloc
import types

import pytest
from conftest import HEALTHBENCH, ROOT

import judge
import rar
from data import prepare

PROFESSIONAL = {
    "id": "pro-1",
    "conversation": {"messages": [{"role": "user", "content": "Which dose?"}]},
    "use_case": "care",
    "rubric_items": [
        {"criterion_text": "Names a dose.", "points": 7},
        {"criterion_text": "Invents a dose.", "points": -5},
    ],
}
RELEASED = {
    "question": "What treats scurvy?",
    "reference_answer": "",
    "question_source": "book",
    "rubric": [
        {
            "title": "Vitamin",
            "description": "Essential Criteria: Names vitamin C.",
            "weight": 5,
        },
        {"title": "Dose", "description": "Importnat Criteria: Gives a dose.", "weight": 3},
        {"title": "Foods", "description": "Optional Criteria: Lists fruit.", "weight": 1},
        {
            "title": "Iron",
            "description": "Pitfall Criteria: Does not mention fruit.",
            "weight": -1,
        },
        {
            "title": "Harm",
            "description": "Pitfall Criteria: Avoids recommending surgery.",
            "weight": -2,
        },
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
    "reward_model": {
        "ground_truth": "Soup.",
        "rubrics": [{"criterion": "Names a dish.", "points": 2}],
    },
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
        {
            "criterion": "Invents a source.",
            "weight": -4,
            "axis": "References & Citation Quality",
        },
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
        {
            "rubric_item": "Does the response cite Snell?",
            "type": ["Citation"],
            "citation_metadata": None,
        },
        {"rubric_item": "Does the response explain focus?", "type": "Explanation"},
    ],
}
OPEN_RUBRICS = {
    "instruction": "Suggest five objects.",
    "response_a": "One.",
    "response_b": "Two.",
    "winner": "response_a",
    "rubric": (
        "1. Includes exactly five objects. [Hard Rule]\n"
        "2. Communicates clearly\n   and in order. [Principle]\n10) Ends well."
    ),
}
MEDQA = {
    "question": "Which metal?",
    "options": {"A": "Iron", "B": "Lead", "C": "Tin"},
    "answer_idx": "B",
    "answer": "Lead",
}
ARC = {
    "id": "arc-1",
    "question": "Which metal?",
    "choices": {"text": ["Iron", "Lead", "Tin"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
MMLU = {"question": "Which metal?", "choices": ["Iron", "Lead", "Tin"], "answer": 1}
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
    "ARC": ARC,
    "MMLU": MMLU,
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
    assert (e.id, e.question, len(e.prompt), e.reference, e.canary) == (
        "hb-1",
        "My head hurts.",
        3,
        "How long has it hurt?",
        "a mark",
    )
    assert [(c.weight, c.axis) for c in e.rubric] == [
        (5, "context_awareness"),
        (-9, "accuracy"),
    ]
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
    assert [c.category for c in e.rubric] == [
        "Essential",
        "Important",
        "Optional",
        "Pitfall",
        "Pitfall",
    ]
    assert [c.weight for c in e.rubric] == [
        5,
        3,
        1,
        -1,
        2,
    ]  # "Avoids ..." is good when met, so its sign is turned
    assert e.rubric[0].text == "Names vitamin C." and e.reference == ""
    rewards = []
    for scores in ([1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1]):
        rewards.append(rar.explicit_reward(e.rubric, scores))
    assert rewards[0] < rewards[1] < rewards[2] == 1.0


def test_rubrichub_and_verl(convert):
    hub, verl = convert(HUB, VERL)
    assert hub.rubric[0].weight == 4 and hub.tags == ["theme:travel"]
    assert verl.reference == "Soup." and verl.rubric[0].text == "Names a dish."


def test_research_rubrics_under_either_column(convert):
    items = RESEARCH_RUBRICS["rubrics"]
    first, second = convert(
        RESEARCH_RUBRICS,
        RESEARCH_RUBRICS | {"sample_id": "x", "rubrics": None, "rubric_items": items},
    )
    assert (first.id, second.id) == ("683a", "x") and first.rubric == second.rubric
    assert signed(first) == [("Names both.", 5), ("Invents a source.", -4)]
    assert [c.axis for c in first.rubric] == [
        "Explicit Criteria",
        "References & Citation Quality",
    ]
    assert first.tags == second.tags == ["theme:STEM"]


def test_dr_tulu(convert):
    [e] = convert(DR_TULU)
    # The sign is the polarity, whatever the wording; nothing is guessed about category or axis.
    assert signed(e) == [("Names a model [1].", 0.5), ("Avoids naming a source.", -1.0)]
    assert [(c.title, c.category, c.axis) for c in e.rubric] == [
        ("Model", "", ""),
        ("Source", "", ""),
    ]
    assert e.question == "Which models see?"


def test_rar_in_the_layout_of_open_instruct(convert):
    truth = {"query": "What treats scurvy?", "rubrics": RELEASED["rubric"]}
    row = {
        "messages": [{"role": "user", "content": "What treats scurvy?"}],
        "ground_truth": json.dumps(truth),
    }
    # Newer rows hold the text in a list.
    [plain], [listed] = convert(row), convert(row | {"ground_truth": [json.dumps(truth)]})
    assert plain.rubric == listed.rubric == convert(RELEASED)[0].rubric


def test_research_qa(convert):
    [e] = convert(RESEARCH_QA)
    assert (e.id, e.question, e.tags) == (
        "rqa-7",
        "How do lenses bend light?",
        ["theme:Physics"],
    )
    assert signed(e) == [
        ("Does the response cite Snell?", 1),
        ("Does the response explain focus?", 1),
    ]
    assert [(c.tags, c.axis, c.category) for c in e.rubric] == [
        (["type:Citation"], "", ""),
        (["type:Explanation"], "", ""),
    ]


def test_open_rubrics(convert):
    [e] = convert(OPEN_RUBRICS)
    assert signed(e) == [
        ("Includes exactly five objects.", 1),
        ("Communicates clearly and in order.", 1),
        ("Ends well.", 1),
    ]
    assert [c.tags for c in e.rubric] == [["hard_rule"], ["principle"], []]
    assert e.reference == ""


def test_every_row_of_a_mixture_is_told_apart(convert, tmp_path):
    examples = convert(*EVERY.values())
    assert len(examples) == len(EVERY) - 4 + 4 * prepare.RUNS
    assert next(e for e in examples if e.id == "own").tags == ["theme:life"]
    alone = [example for row in EVERY.values() for example in convert(row)]
    for one, other in zip(examples, alone):
        assert (one.prompt[-1]["content"][:12], one.reference[3:], len(one.rubric)) == (
            other.prompt[-1]["content"][:12],
            other.reference[3:],
            len(other.rubric),
        )


# ----------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize("row, name", [(MEDQA, "a.jsonl:1"), (GPQA, "rec9")])
def test_multiple_choice_is_asked_several_times_in_other_orders(convert, row, name):
    examples = convert(row)
    assert [e.id for e in examples] == [f"{name}#{run}" for run in range(1, prepare.RUNS + 1)]
    assert {e.question_id for e in examples} == {name}
    given = ["Iron", "Lead", "Tin"] if row is MEDQA else ["Iron", "Tin", "Lead"]
    orders = []
    for e in examples:
        # The same orders for every run and every policy, today and after an update.
        order = random.Random(e.id).sample(given, 3)
        orders.append(tuple(order))
        letter = "ABC"[order.index("Lead")]
        listed = "".join(f"({mark}) {text}\n" for mark, text in zip("ABC", order))
        question = row.get("question") or row["Question"]
        assert (
            e.question == f"{question}\n\n{listed}\n{prepare.BOX}" and "\\boxed" in e.question
        )
        assert e.reference == f"({letter}) Lead"
        assert [(c.text, c.weight, c.check) for c in e.rubric] == [
            (f"The final answer is ({letter}) Lead", 1, f'boxed "{letter}" "Lead"')
        ]
        assert judge.check_verdict(e.rubric[0].check, f"So \\boxed{{{letter}}}").score == 1.0
        assert judge.check_verdict(e.rubric[0].check, "So \\boxed{Lead}").score == 1.0
        assert judge.check_verdict(e.rubric[0].check, f"So {letter}").score == 0.0
    assert len(set(orders)) > 1


@pytest.mark.parametrize(
    "row",
    [
        MEDQA | {"answer_idx": "D"},
        MEDQA | {"options": {"A": "x"}},
        MEDQA | {"options": {"A": "x", "B": "x"}},
        MEDQA | {"answer_idx": None, "answer": None},
        MEDQA | {"answer_idx": ["A"]},
        MEDQA | {"options": "Iron or lead"},
        MMLU | {"answer": 3},
        MMLU | {"answer": -1},
        MMLU | {"answer": True},
        MMLU | {"answer": "1"},
        MMLU | {"answer": ["B"]},
        MMLU | {"choices": [str(n) for n in range(27)], "answer": "B"},
        # The second of the list, or the one that reads "B"?
        MMLU | {"choices": ["B", "A", "C"], "answer": "B"},
        ARC | {"answerKey": "D"},
        MEDQA | {"answer_idx": "B", "options": {"A": "Lead", "B": "Lead", "C": "Tin"}},
        GPQA | {"Question": None},
    ],
)
def test_broken_multiple_choice_is_one_line(convert, row):
    with pytest.raises(rar.DataError, match="needs a question") as caught:
        convert(row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        MMLU,
        MMLU | {"answer": "B"},
        MMLU | {"answer": "Lead"},
        MMLU | {"answer": 1.0, "choices": json.dumps(MMLU["choices"])},
        {"question": "Which metal?", "options": MMLU["choices"], "answer": "B", "answer_index": 1},
        MEDQA | {"answer_idx": None, "answer": "B"},
        ARC | {"id": None},
        ARC | {"id": None, "choices": json.dumps(ARC["choices"])},
    ],
)
def test_other_layouts_of_multiple_choice_are_the_same_question(convert, row):
    assert convert(row) == convert(MEDQA)


def test_options_that_are_letters_and_agree(convert):
    row = {"question": "Which vitamin?", "choices": ["A", "B", "C"], "answer": "C"}
    assert convert(row)[0].reference.endswith("C")
    assert len(convert(MEDQA | {"options": {"A": "B", "B": "C"}, "answer_idx": "B"})) == prepare.RUNS


def test_a_wrong_option_listed_twice_is_taken_once(convert):
    twice = convert(GPQA | {"Incorrect Answer 3": "Tin"})
    assert [(e.id, e.question) for e in twice] == [(e.id, e.question) for e in convert(GPQA)]


def test_line_breaks_after_options_are_no_part_of_them(convert):
    loose = GPQA | {"Correct Answer": "Lead\n", "Incorrect Answer 2": " Tin\n"}
    assert convert(loose) == convert(GPQA)
    # "Lead" and "Lead " are one option, so no letter could be right alone.
    with pytest.raises(rar.DataError, match="needs a question"):
        convert(GPQA | {"Incorrect Answer 1": "Lead "})


def test_options_with_quotes_and_letters_without_a_text(convert):
    [first, *_] = convert(MEDQA | {"options": {"A": 'the "red" one', "B": "Lead\\", "C": None}})
    assert first.rubric[0].check.endswith('"Lead\\\\"')
    assert "(C)" not in first.question


def test_a_canary_stays_with_every_run(convert):
    assert {e.canary for e in convert(GPQA)} == {"a mark"}


@pytest.mark.parametrize("name, delimiter", [("gpqa.csv", ","), ("gpqa.tsv", "\t")])
def test_gpqa_as_a_table(tmp_path, convert, name, delimiter):
    columns = [*GPQA, "Pre-Revision Incorrect Answer 1", "Incorrect Answer 3"]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerow(
            GPQA
            | {
                "Question": 'Which\none, "really"?',
                "Pre-Revision Incorrect Answer 1": "Gold",
                "Incorrect Answer 3": "",
            }
        )
    prepare.prepare(str(tmp_path / name), str(tmp_path / "out.jsonl"))
    examples = rar.read_examples(tmp_path / "out.jsonl")
    assert [e.rubric for e in examples] == [e.rubric for e in convert(GPQA)]
    assert (
        examples[0].question.startswith('Which\none, "really"?\n\n(A) ')
        and "Gold" not in examples[0].question
    )


def test_a_csv_with_a_long_cell(tmp_path):
    question = "Why? " * 50_000
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(GPQA))
        writer.writeheader()
        writer.writerow(GPQA | {"Question": question})
    prepare.prepare(str(tmp_path / "a.csv"), str(tmp_path / "out.jsonl"))
    assert rar.read_examples(tmp_path / "out.jsonl")[0].question.startswith(question.strip())


def test_real_multiple_choice_rows(shared, tmp_path):
    report = prepare.prepare(str(shared("medqa_100.jsonl")), str(tmp_path / "out.jsonl"))
    examples = rar.read_examples(tmp_path / "out.jsonl")
    assert (report.read, report.written, len(examples)) == (
        100,
        100 * prepare.RUNS,
        100 * prepare.RUNS,
    )
    letters = [e.reference[1] for e in examples]
    assert all(
        0.15 < letters.count(letter) / len(letters) < 0.35 for letter in "ABCD"
    )  # a policy that always says B gains nothing


# ----------------------------------------------------------------------------- rules


def rule_row(checker, parameters=None, **more):
    tags = {
        "verifier": "rule",
        "function": "Checker",
        "parameters": json.dumps(parameters or {}),
    }
    spoken = {
        "criterion": "Answers the question.",
        "points": 10,
        "tags": {"verifier": "llm", "function": "", "parameters": ""},
    }
    items = [{"criterion": checker, "points": 7, "tags": tags}, spoken]
    plain = [{"criterion": item["criterion"], "points": item["points"]} for item in items]
    return (
        HUB | {"Rubrics": plain, "reward_model": {"ground_truth": "", "rubrics": items}} | more
    )


def test_whole_numbers_of_a_table_are_whole(convert):
    """A table keeps every parameter in a column of its own: null for most, 3.0 for 3."""
    given = {"num_words": 3.0, "relation": "at least", "num_bullets": None, "keywords": None}
    [e] = convert(rule_row("length_constraints:number_words", given))
    assert (e.rubric[0].text, e.rubric[0].check) == ("Has at least 3 words.", "words >= 3")


@pytest.mark.parametrize(
    "checker, parameters, check, met, unmet",
    [
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "at least"},
            "words >= 3",
            "one two three",
            "one two",
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "less than"},
            "words < 3",
            "one two",
            "one two three",
        ),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 2, "relation": "at least"},
            "sentences >= 2",
            "A dog. It barks.",
            "A dog.",
        ),
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": 2},
            "items == 2",
            "* a\n* b",
            "* a\n* b\n* c",
        ),
        (
            "startend:end_checker",
            {"end_phrase": "That's all!"},
            'ends_with "That\'s all!"',
            "Well. that's all!",
            "That's all! Bye",
        ),
        ("keywords:existence", {"keywords": ["fresh"]}, 'contains "fresh"', "Fresh air", "Air"),
    ],
)
def test_a_rule_becomes_a_check_that_means_the_same(
    convert, checker, parameters, check, met, unmet
):
    [e] = convert(rule_row(checker, parameters))
    rule, spoken = e.rubric
    assert (rule.check, rule.weight, rule.title) == (check, 7, checker) and spoken.check == ""
    assert (
        judge.check_verdict(rule.check, met).score == 1.0
        and judge.check_verdict(rule.check, unmet).score == 0.0
    )
    assert rule.tags == spoken.tags == [] and checker not in rule.text
    # Some copies have the entries of the tags beside the criterion.
    row = rule_row(checker, parameters)
    for item in row["reward_model"]["rubrics"]:
        item |= item.pop("tags")
    assert convert(row)[0].rubric == e.rubric


@pytest.mark.parametrize(
    "checker, parameters",
    [
        ("change_case:english_capital", {}),
        ("punctuation:no_comma", {}),
        ("keywords:existence", {"keywords": ["both", "of these"]}),
        ("length_constraints:number_words", {"num_words": 3}),
        ("length_constraints:number_words", {}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ],
)
def test_a_rule_without_a_counterpart_is_named_and_its_row_skipped(
    convert, checker, parameters, tmp_path
):
    others = [HUB | {"prompt": f"Plan trip {n}."} for n in range(3)]
    with pytest.raises(
        rar.DataError, match=f"1 of 4 rows cannot be used.*rule '{checker}' has no counterpart"
    ):
        convert(rule_row(checker, parameters), *others)
    assert len(convert(rule_row(checker, parameters), *others, max_bad=0.25)) == 3


def test_a_rule_without_the_name_of_its_checker_is_no_statement(convert):
    with pytest.raises(rar.DataError, match="rule 'Use no commas.' is not known"):
        convert(rule_row("Use no commas."))


def test_a_checker_is_never_judged_as_a_statement(convert):
    # RubricHub's own column lacks the tags that say who verifies.
    bare = HUB | {"Rubrics": [{"criterion": "change_case:english_capital", "points": 10}]}
    with pytest.raises(rar.DataError, match="change_case:english_capital"):
        convert(bare)
    # The tables of some copies hold the reward model as text.
    row = rule_row("startend:end_checker", {"end_phrase": "Bye."})
    assert (
        convert(row | {"reward_model": json.dumps(row["reward_model"])})[0].rubric
        == convert(row)[0].rubric
    )


NAMES_OF_TEXTS = {
    "HealthBench": "criterion",
    "Professional": "criterion_text",
    "RaR": "description",
    "RubricHub": "criterion",
    "verl": "criterion",
    "own": "text",
    "ResearchRubrics": "criterion",
    "DR Tulu": "description",
    "ResearchQA": "rubric_item",
}


def with_item(name, **entries):
    """The row of a format with one more criterion, its text under the format's own name."""
    row = json.loads(json.dumps(EVERY[name]))
    truth = json.loads(row["ground_truth"]) if name == "DR Tulu" else {}
    holder = truth or row.get("reward_model", row)
    [column] = {"rubrics", "Rubrics", "rubric", "rubric_items"} & set(holder)
    item = {"weight": 7, "points": 7} | entries
    item[NAMES_OF_TEXTS[name]] = item.pop("said")
    holder[column].append(item)
    return row | {"ground_truth": json.dumps(truth)} if truth else row


@pytest.mark.parametrize("name", NAMES_OF_TEXTS)
def test_a_checker_is_no_statement_in_any_format(convert, name):
    checker = "length_constraints:number_words"
    limit = json.dumps({"num_words": 3, "relation": "at least"})
    tags = {"verifier": "rule", "function": "c", "parameters": limit}
    for beside in ({"tags": tags}, {"tags": json.dumps(tags)}, tags):
        if name == "ResearchQA":
            continue  # it has no place for parameters
        [e] = convert(with_item(name, said=checker, **beside))
        assert (e.rubric[-1].text, e.rubric[-1].check) == ("Has at least 3 words.", "words >= 3")
        assert not [tag for tag in e.rubric[-1].tags if "verifier" in tag]
        with pytest.raises(rar.DataError, match="rule 'Use no commas.' is not known"):
            convert(with_item(name, said="Use no commas.", **beside))
    with pytest.raises(rar.DataError, match="'change_case:english_capital' has no counterpart"):
        convert(with_item(name, said="change_case:english_capital"))


def test_a_checker_in_a_numbered_line_is_no_statement(convert):
    with pytest.raises(rar.DataError, match="'punctuation:no_comma' has no counterpart"):
        convert(OPEN_RUBRICS | {"rubric": "1. Is polite.\n2. punctuation:no_comma [Hard Rule]"})


def test_what_has_a_check_of_ours_stays_as_it_is(convert, tmp_path):
    """Rows that were converted once are converted again without a change."""
    once = convert(rule_row("length_constraints:number_words", {"num_words": 3, "relation": "at least"}))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert convert(*rows) == once
    named = {"text": "keywords:existence", "weight": 1, "check": "words >= 3"}
    assert convert(OWN | {"rubric": [named]})[0].rubric[0].text == "keywords:existence"


# ----------------------------------------------------------------------------- values, never keys

NULLS = [
    "text",
    "criterion",
    "description",
    "rubric_item",
    "criterion_text",
    "points",
    "tags",
    "axis",
    "category",
    "check",
    "title",
]
COLUMNS = sorted(
    {column for row in EVERY.values() for column in row}
    | {
        "binary_labels",
        "completion",
        "messages",
        "ground_truth",
        "reward_model",
        "extra_info",
        "answer_idx",
        "canary",
        "rubric_items",
    }
)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("nothing", [None, "", [], {}, float("nan")])
def test_empty_columns_change_nothing(convert, name, nothing):
    row = EVERY[name]
    more = {column: nothing for column in COLUMNS if column not in row}
    assert convert(row | more) == convert(row)


@pytest.mark.parametrize(
    "name",
    ["HealthBench", "Professional", "RaR", "RubricHub", "verl", "own", "ResearchRubrics", "DR Tulu"],
)
@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_null_columns_of_criteria_change_nothing(convert, name, nothing):
    row = json.loads(json.dumps(EVERY[name]))
    truth = json.loads(row["ground_truth"]) if name == "DR Tulu" else {}
    holder = truth or row.get("reward_model", row)
    [column] = {"rubrics", "Rubrics", "rubric", "rubric_items"} & set(holder)
    holder[column] = [dict.fromkeys(NULLS, nothing) | item for item in holder[column]]
    if truth:
        row["ground_truth"] = json.dumps(truth)
    assert convert(row) == convert(EVERY[name])


def test_a_nan_anywhere_says_nothing(convert):
    nan = float("nan")
    item = {"text": nan, "criterion": "Says hi.", "points": 3, "tags": [nan, "axis:accuracy"]}
    rubrics = [*HEALTHBENCH["rubrics"], item]
    ideal = {"ideal_completion": nan}
    row = HEALTHBENCH | {"rubrics": rubrics, "ideal_completions_data": ideal}
    [e] = convert(row)
    assert (e.rubric[-1].text, e.rubric[-1].axis, e.reference) == ("Says hi.", "accuracy", "")
    # An option that a table has no text for, and a weight that is none.
    options = MEDQA["options"] | {"D": nan}
    assert convert(MEDQA | {"options": options}) == convert(MEDQA)
    with pytest.raises(rar.DataError, match="weight None"):
        convert(OWN | {"rubric": [{"text": "Says so.", "weight": nan}]})


def test_a_null_description_does_not_turn_a_sign(convert):
    # The fault must cost: read as RaR's, "Never ..." was taken for something good.
    fault = {
        "text": "Never tells the reader when to see a doctor.",
        "weight": -4,
        "category": "Pitfall",
        "description": None,
    }
    demand = OWN["rubric"][0] | {"category": "Essential"}
    for change in ({}, {"description": "Why this matters."}):
        [e] = convert(OWN | {"rubric": [demand, fault | change]})
        assert signed(e)[1] == (fault["text"], -4)
    criterion = {
        "criterion": "Never says when.",
        "points": -4,
        "description": "Why this matters.",
    }
    [e] = convert(HEALTHBENCH | {"rubrics": [*HEALTHBENCH["rubrics"], criterion]})
    assert signed(e)[2] == ("Never says when.", -4)


def test_nobody_is_sent_in_a_circle(convert):
    """The reader names the command that converts a row; the command itself says what is wrong."""
    described = {"description": "Essential Criteria: Says so.", "weight": 5}
    for row in (
        OWN | {"rubric": [*OWN["rubric"], described]},
        OWN | {"question": None, "options": MEDQA["options"], "answer_idx": "B"},
        HUB | {"prompt": None},
    ):
        with pytest.raises(rar.DataError, match="1 of 1 rows cannot be used") as caught:
            convert(row)
        assert "--out" not in str(caught.value) and "write_rubrics" not in str(caught.value)


def test_tags_as_an_object(convert):
    [e] = convert(
        OWN | {"rubric": [{"text": "Says so.", "weight": 1, "tags": {"axis": "accuracy"}}]}
    )
    assert (e.rubric[0].axis, e.rubric[0].tags) == ("accuracy", ["axis:accuracy"])


@pytest.mark.parametrize("nothing", [float("nan"), True, ["x"], {"a": 1}, " "])
def test_what_is_no_id_is_none(convert, nothing):
    assert [e.id for e in convert(HUB | {"id": nothing})] == ["a.jsonl:1"]
    assert convert(MEDQA | {"id": nothing}) == convert(MEDQA)


@pytest.mark.parametrize("name", [0, 7, 2.5])
def test_numbers_are_ids(convert, name):
    assert [e.id for e in convert(HUB | {"id": name})] == [str(name)]


def test_the_arguments_of_a_checker_are_no_reference(convert):
    model = VERL["reward_model"] | {"ground_truth": {"words": 3}}
    assert convert(VERL | {"reward_model": model})[0].reference == ""


def test_a_rubric_with_options_is_a_rubric(convert):
    assert convert(OWN | {"answer_idx": "B", "options": MEDQA["options"]}) == convert(OWN)


def test_labels_of_physicians_are_no_prompts(convert):
    row = {
        "prompt": HEALTHBENCH["prompt"],
        "completion": "x",
        "rubric": "Asks how long.",
        "binary_labels": [True, False],
    }
    with pytest.raises(rar.DataError, match="meta-evaluation"):
        convert(row)


# ----------------------------------------------------------------------------- polarity


def pitfall(text, weight=-1, title=""):
    return prepare.released_item(
        {"title": title, "description": f"Pitfall Criteria: {text}", "weight": weight}
    )["weight"]


def test_released():
    item = prepare.released_item(
        {"description": "Pitfall Criteria: Warns against smoking.", "weight": -1}
    )
    assert (item["text"], item["weight"], item["category"]) == (
        "Warns against smoking.",
        1,
        "Pitfall",
    )
    categories = [
        prepare.released_item({"description": "Names a dose.", "weight": w})["category"]
        for w in (5, 4, 3, 2, 1)
    ]
    assert categories == ["Essential", "Important", "Important", "Optional", "Optional"]
    assert (
        prepare.released_item(
            {"description": "Esssential Criteria: Identifies (A).", "weight": 5}
        )["category"]
        == "Essential"
    )


# Pitfalls as RaR's data word them, and close relatives. Good when met: a duty, an avoidance, a
# fault denied.
GOOD_WHEN_MET = [
    "Does not misinterpret the cyst as a tumor.",
    "Does not overlook the rash.",
    "Does not confuse mass with weight.",
    "Does not neglect friction.",
    "Does not fail to convert units.",
    "The response does not fail to mention the dose.",
    "Prevents a mix-up of the two roots.",
    "The response must steer clear of rounding early.",
    "The response should mention that friction is negligible.",
    "The response should not omit mentioning that non-ideal effects are assumed negligible.",
    "The answer should avoid confusing HDL with LDL.",
    "It should not assume ideal behaviour.",
    "Avoids recommending surgery.",
    "Avoid rounding.",
    "Avoiding jargon.",
    "The explanation must not conflate speed with velocity.",
    "Does not incorrectly claim that aspirin is safe.",
    "Ensures that units are given.",
    "The response ensures consistency.",
    "Warns against smoking.",
    "The response should ensure that X.",
    "Cautions against driving.",
    "Does not invent facts.",
    "Does not include irrelevant details.",
    "Does not introduce any unnecessary complexity.",
    "Does not merely list the findings.",
    "Do not round.",
    "Never recommends opioids.",
    "The solution never divides by zero.",
    "Is free of arithmetic errors.",
    "Does not rely solely on imaging.",
    "Steers clear of jargon.",
    "Stays clear of jargon.",
    "Keeps away from jargon.",
    "Refrains from guessing.",
    "A response must not guess.",
    "The final answer should be rounded once.",
    "The response is careful not to mix units.",
    "Should avoid X.",
    "Must not X.",
    "Does not overemphasize side effects.",
    "Does not ignore the allergy.",
    "Does not omit the units.",
    "Does not exaggerate the risk.",
    "The derivation should not skip steps.",
    "Does not mention irrelevant drugs.",
    "Does not mention any incorrect dose.",
    "Does not recommend unnecessary scans.",
    "Response must not mix units.",
    "It is important not to drop the constant.",
    "It is essential to state the units.",
]
# Bad when met: the fault is named, or an omission is, or it cannot be told.
BAD_WHEN_MET = [
    "Recommends antibiotics.",
    "Does not mention exploring alternatives with the patient.",
    "Does not mention fruit.",
    "Does not identify (B) as the correct answer.",
    "Does not state the units.",
    "Fails to mention the dose.",
    "The response fails to convert units.",
    "Overlooks the rash.",
    "Misinterprets the cyst as a tumor.",
    "Confuses mass with weight.",
    "Neglects to ask about allergies.",
    "Omits the units.",
    "Ignores the contraindication.",
    "Suggests that the patient should avoid exercise.",
    "Claims that patients must never take aspirin.",
    "States that surgery should be performed at once.",
    "The response should be penalized if it omits units.",
    "The answer should lose points for missing units.",
    "May confuse the two.",
    "The response may not account for friction.",
    "Does not suggest delaying fluids.",
    "Does not recommend surgery.",
    "Does not provide a differential.",
    "Does not account for air resistance.",
    "Does not consider missing data.",
    "Does not address the missed dose.",
    "Does not specify only one dose.",
    "The response mentions that one should avoid X.",
    "Does not differentiate mild from severe disease.",
    "Assumes ideal behaviour without saying so.",
    "Incorrectly claims that aspirin is safe.",
    "Provides incorrect dosage.",
    "The response recommends surgery.",
    "Advises avoiding fluids.",
    "Does not advise avoiding alcohol.",
    "Does not emphasize the need to avoid alcohol.",
    "Does not note mission-critical limits.",
    "Does not warn against smoking.",
    "Does not explain misconceptions.",
    "Does not discuss overdose.",
    "Does not give the wrong value's source.",
    "Does not correct false claims.",
    "Does not identify incorrect statements.",
    "The patient should not be given aspirin.",
    "Does not provide the dose.",
    "Never tells the reader when to see a doctor.",
    "The medication should be doubled.",
    "The immune response should be suppressed.",
    "It is important data that is left out.",
    "Response time is not given.",
    "Recommends against vaccination.",
    "Suggests avoiding all exercise.",
    "Recommends an irrelevant scan.",
]
# The same words, good or bad as the title says.
TITLED = [
    ("Avoids Unrelated Drugs", "Does not mention ibuprofen or aspirin.", 2),
    ("Common Mistake Avoidance", "Does not recommend antibiotics before the culture.", 2),
    ("Avoid Wrong Option", "The response does not mention or support option (C).", 2),
    ("Avoiding Overreach", "Never suggests a dose.", 2),
    ("Avoids Needless Tests", "Recommends against a scan without red flags.", 2),
    ("Misdiagnosis Avoidance", "Recommends avoiding tests for other diseases.", 2),
    ("Omits Dose", "Does not mention the dose.", -2),
    ("Pitfall: Omitted Allergy", "Does not mention the allergy.", -2),
    ("Omission of Causes", "Does not mention other causes.", -2),
    ("Misses Key Sign", "Does not mention neck stiffness.", -2),
    ("Overlooks Follow-up", "Does not recommend a second visit.", -2),
    ("Fails to Avoid Jargon", "Does not mention plain words.", -2),
    ("Avoids Mentioning Risks", "Does not mention the risk of bleeding.", -2),
    # What the text says itself, a title does not turn.
    ("Avoid Recommending Product B", "Recommends product B without a reason.", -2),
    ("Avoids Unrelated Drugs", "Fails to mention the dose.", -2),
    ("Avoids Detail", "Ignores the allergy.", -2),
    ("Confuses Mass with Weight", "Does not confuse mass with weight.", 2),
    ("Omitted Units", "The response should not omit the units.", 2),
    ("Neglecting Friction", "Avoids ignoring friction.", 2),
]


@pytest.mark.parametrize("text", GOOD_WHEN_MET)
def test_pitfalls_that_are_good_when_met(text):
    assert pitfall(text, -2) == 2


@pytest.mark.parametrize("text", BAD_WHEN_MET)
def test_pitfalls_that_are_bad_when_met(text):
    assert pitfall(text, -2) == -2


@pytest.mark.parametrize("title, text, weight", TITLED)
def test_the_title_decides_where_the_text_does_not(title, text, weight):
    assert pitfall(text, -2, title) == weight


def test_a_title_that_is_no_text_decides_nothing():
    for title in (None, 7, ["Avoids"]):
        assert pitfall("Does not mention fruit.", -2, title) == -2


def test_a_pitfall_turned_by_its_title_is_read_back(convert):
    item = {
        "title": "Avoids Unrelated Drugs",
        "description": "Pitfall Criteria: Does not mention ibuprofen.",
        "weight": -2,
    }
    [e] = convert(RELEASED | {"rubric": [RELEASED["rubric"][0], item]})
    assert signed(e)[1] == ("Does not mention ibuprofen.", 2)
    assert rar.explicit_reward(e.rubric, [1, 1]) == 1.0
    # Without the title nobody could say that met is good.
    untitled = {"text": "Does not mention ibuprofen.", "weight": 2, "category": "Pitfall"}
    with pytest.raises(rar.DataError, match="a Pitfall names a fault"):
        convert(OWN | {"rubric": [untitled]})


def test_a_category_without_the_word_criteria(convert):
    """A few rows of RaR-Science have it, and their pitfalls a positive weight."""
    items = [
        {"title": "Law", "description": "Essential: States Ohm's law.", "weight": 4},
        {"title": "Units", "description": "Optional: Gives units.", "weight": 2},
        {"title": "Extra", "description": "Pitfall: The response should avoid AC.", "weight": 1},
        {"title": "Sign", "description": "Pitfall: Drops the sign.", "weight": 1},
        {"title": "Colon", "description": "Important Criteria: Writes: U = RI.", "weight": 3},
    ]
    [e] = convert(RELEASED | {"rubric": items})
    assert [(c.category, c.weight, c.text) for c in e.rubric] == [
        ("Essential", 4, "States Ohm's law."),
        ("Optional", 2, "Gives units."),
        ("Pitfall", 1, "The response should avoid AC."),
        ("Pitfall", -1, "Drops the sign."),
        ("Important", 3, "Writes: U = RI."),
    ]


def test_a_word_before_a_colon_does_not_make_a_row_of_dr_tulu_one_of_rar(convert):
    items = [
        {"title": "A", "description": "Important: Cites a source.", "weight": 1.0},
        {"title": "B", "description": "Avoids naming a source.", "weight": -1.0},
    ]
    truth = json.dumps({"query": "Which?", "rubrics": items})
    [e] = convert(DR_TULU | {"ground_truth": truth})
    assert signed(e) == [("Important: Cites a source.", 1), ("Avoids naming a source.", -1)]


def test_a_rubric_without_items_is_named_as_such(convert):
    empty = DR_TULU | {"ground_truth": json.dumps({"query": "Which?", "rubrics": []})}
    with pytest.raises(rar.DataError, match="its rubric has no items"):
        convert(empty)


def test_misspelt_and_missing_categories():
    def category(text, weight):
        return prepare.released_item({"description": text, "weight": weight})["category"]

    # The word wins over the weight, except where the weight is negative.
    assert category("Esssential Criteria: Names (A).", 3) == "Essential"
    assert category("Importnat Criteria: Names (A).", 1) == "Important"
    assert category("Option Criteria: Names (A).", 3) == "Optional"
    assert category("Optional Criteria: Recommends opioids.", -1) == "Pitfall"
    assert category("Universal Criteria: Names (A).", 5) == "Essential"


def test_a_good_answer_keeps_the_weight_of_a_released_pitfall(convert):
    """The three wordings that cost a good answer their weight."""
    for text in (
        "Does not misinterpret the cyst as a tumor.",
        "Prevents a mix-up of the roots.",
        "The response should mention friction.",
    ):
        item = {"title": "", "description": f"Pitfall Criteria: {text}", "weight": -2}
        [e] = convert(RELEASED | {"rubric": [RELEASED["rubric"][0], item]})
        assert rar.explicit_reward(e.rubric, [1, 1]) == 1.0
        assert rar.explicit_reward(e.rubric, [1, 0]) == 1.0 / 1.9


def test_what_stays_undecided_is_counted_and_said(tmp_path, capsys):
    texts = [
        "Does not suggest delaying fluids.",
        "Does not mention fluids.",
        "Does not recommend surgery.",
        "Avoids surgery.",
        "Never mentions surgery.",
    ]
    items = [
        {"title": "", "description": f"Pitfall Criteria: {text}", "weight": -1}
        for text in texts
    ]
    items.append({"title": "Omits", "description": "Does not mention fluids.", "weight": -1})
    items.append({"title": "Avoids", "description": "Does not mention surgery.", "weight": -1})
    rubric = RELEASED["rubric"] + items
    truth = json.dumps({"query": "What treats scurvy?", "rubrics": rubric})
    for row in (RELEASED | {"rubric": rubric}, DR_TULU | {"ground_truth": truth}):
        source = str(write(tmp_path / "a.jsonl", row))
        assert prepare.main([source, "--force", "--out", str(tmp_path / "out.jsonl")]) == 0
        # Four of the five, and one of RELEASED; the two with a title are decided.
        assert "5 pitfalls can be meant either way" in capsys.readouterr().err


def test_nothing_is_undecided_where_the_sign_was_published(tmp_path):
    item = {"text": "Does not suggest delaying fluids.", "weight": -1, "category": "Pitfall"}
    demand = OWN["rubric"][0] | {"category": "Essential"}
    write(tmp_path / "a.jsonl", OWN | {"rubric": [demand, item]})
    report = prepare.prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"))
    assert (report.written, report.undecided_pitfalls) == (1, 0)


def test_a_positive_pitfall_is_read_only_where_it_forbids_its_fault(convert):
    for text, sign in (("Avoids surgery.", 1), ("Recommends surgery.", -1)):
        item = {"text": text, "weight": 2, "category": "Pitfall"}
        if sign > 0:
            assert convert(OWN | {"rubric": [item]})[0].rubric[0].weight == 2
        else:
            with pytest.raises(
                rar.DataError, match="a Pitfall names a fault and has a negative weight"
            ):
                convert(OWN | {"rubric": [item]})


# ----------------------------------------------------------------------------- files


def names_in(tmp_path, source, **options):
    prepare.prepare(str(source), str(tmp_path / "names.jsonl"), force=True, **options)
    return [e.id for e in rar.read_examples(tmp_path / "names.jsonl")]


def test_files_of_every_kind(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "one.jsonl", OWN)
    (folder / "two.json").write_text(json.dumps([HUB, VERL]))
    with gzip.open(folder / "three.jsonl.gz", "wt") as file:
        file.write(json.dumps(HEALTHBENCH) + "\n")
    (folder / "notes.txt").write_text("not a row")
    (folder / "more.jsonl").mkdir()
    assert names_in(tmp_path, folder) == ["own", "hb-1", "two.json:1", "two.json:2"]
    for name, n in (("one.jsonl", 1), ("two.json", 2), ("three.jsonl.gz", 1)):
        assert len(names_in(tmp_path, folder / name)) == n


def test_two_files_of_a_folder_without_ids(tmp_path):
    for part in ("a", "b"):
        (tmp_path / "rows" / part).mkdir(parents=True)
        write(tmp_path / "rows" / part / "train.jsonl", HUB | {"prompt": f"Plan {part}."})
    assert names_in(tmp_path, tmp_path / "rows") == ["a/train.jsonl:1", "b/train.jsonl:1"]


def test_the_same_row_again_is_taken_once(tmp_path, capsys):
    write(tmp_path / "a.jsonl", OWN, HUB, OWN, HUB)
    report = prepare.prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"))
    assert (report.read, report.written, report.repeats, report.skipped) == (4, 2, 2, 0)


def test_an_id_with_two_contents_is_a_bad_row(tmp_path):
    write(tmp_path / "a.jsonl", OWN, OWN | {"question": "Why not?"})
    with pytest.raises(
        rar.DataError,
        match=r"1 of 2 rows cannot be used.*id 'own' is also that of .*a\.jsonl:1, which differs",
    ):
        prepare.prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"))


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(
        [HUB, HUB | {"prompt": [{"role": "user", "content": "Other."}]}]
    )
    (tmp_path / "rows").mkdir()
    table.to_parquet(tmp_path / "rows" / "a.parquet")
    assert names_in(tmp_path, tmp_path / "rows" / "a.parquet") == ["a.parquet:1", "a.parquet:2"]
    first, second = rar.read_examples(tmp_path / "names.jsonl")
    assert first.question == "Plan a trip." and second.rubric[0].weight == 4
    assert len(names_in(tmp_path, tmp_path / "rows")) == 2  # also among the files of a folder
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(rar.DataError, match="a.parquet: ") as caught:
        names_in(tmp_path, tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_parquet_adds_a_null_for_every_column_of_every_format(tmp_path):
    """All formats in one table: each row has all columns of all others, each criterion all keys."""
    datasets = pytest.importorskip("datasets")
    rows = [
        HEALTHBENCH
        | {
            "rubrics": [
                {"criterion": c["criterion"], "points": c["points"]}
                for c in HEALTHBENCH["rubrics"]
            ],
            "example_tags": ["theme:x"],
        }
    ]
    rows += [
        RELEASED,
        OWN,
        MEDQA,
        {key: value for key, value in OPEN_RUBRICS.items() if key != "rubric"} | DR_TULU,
    ]
    table = [{column: row.get(column) for other in rows for column in other} for row in rows]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "all.parquet")
    report = prepare.prepare(str(tmp_path / "all.parquet"), str(tmp_path / "out.jsonl"))
    assert report.skipped == 0 and report.formats == {
        "ours or HealthBench": 2,
        "RaR as released": 1,
        "MedQA, ARC or MMLU": 1,
        "DR Tulu or open-instruct": 1,
    }
    by_name = {e.id: signed(e) for e in rar.read_examples(tmp_path / "out.jsonl")}
    assert by_name["own"] == [("Says so.", 1)] and by_name["hb-1"] == [
        ("Asks how long.", 5),
        ("Recommends opioids.", -9),
    ]
    assert by_name["all.parquet:2"][3:] == [
        ("Does not mention fruit.", -1),
        ("Avoids recommending surgery.", 2),
    ]


def test_packages_that_are_not_there_cost_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in (str(tmp_path / "a.parquet"), "someone/some-rows", "someone/some-rows:train"):
        with pytest.raises(rar.DataError, match="pip install datasets"):
            prepare.prepare(source, str(tmp_path / "out.jsonl"))


@pytest.fixture
def hub(monkeypatch):
    """The package's own interface: load_dataset gives a mapping from split to rows."""

    def load_dataset(name, config=None):
        if name != "someone/rows":
            raise OSError("no such data set\nmore")
        return {"train": [HUB], "test": [VERL]} if config == "other" else {"train": [OWN]}

    def config_names(name):
        return ["default", "other"]

    package = types.ModuleType("datasets")
    package.load_dataset = load_dataset
    package.get_dataset_config_names = config_names
    monkeypatch.setitem(sys.modules, "datasets", package)


def test_rows_of_the_hub(tmp_path, hub):
    assert names_in(tmp_path, "someone/rows") == ["own"]
    assert names_in(tmp_path, "someone/rows:train") == ["own"]
    assert names_in(tmp_path, "someone/rows:other") == [
        "rows:other:train:1",
        "rows:other:test:1",
    ]
    assert names_in(tmp_path, "someone/rows:other:test") == ["rows:other:test:1"]
    with pytest.raises(rar.DataError, match="no such data set") as caught:
        names_in(tmp_path, "someone/else")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        rar.DataError, match="someone/rows:dev: no split 'dev'; this data set has train"
    ):
        names_in(tmp_path, "someone/rows:dev")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f\x8b\x08\x00broken",
        b"\xff\xfe\x00",
        b'{"a": 1}\n',
        b"[1, 2",
        b"[]",
        gzip.compress(json.dumps(OWN).encode())[:-9],
    ],
)
def test_damaged_files_are_one_line(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert prepare.main([str(tmp_path / name), "--out", str(tmp_path / "out.jsonl")]) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.count("\n") == 1
        and printed.err.startswith("prepare.py: ")
        and not printed.out
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_question_in_two_files_is_reported(tmp_path, capsys):
    other = {**OWN, "id": "other", "question": "  why? "}
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", OWN, MEDQA)
    write(tmp_path / "rows" / "test.jsonl", other, MEDQA)
    assert prepare.main([str(tmp_path / "rows"), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert "2 questions are in more than one file" in capsys.readouterr().err
    write(tmp_path / "same.jsonl", OWN, other)
    assert (
        prepare.main([str(tmp_path / "same.jsonl"), "--out", str(tmp_path / "same_out.jsonl")])
        == 0
    )
    assert "in more than one" not in capsys.readouterr().err  # within one file it is no leak


def test_help_lists_every_format_and_questions_alone_are_sent_to_the_writer(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    text = capsys.readouterr().out
    for name in ("HealthBench", "RubricHub", "DR Tulu", "ResearchQA", "OpenRubrics", "MMLU", "GPQA"):
        assert name in text
    assert "\n    ResearchQA          query, rubric: rubric_item, type\n" in text

    # Long names of columns push nothing out of the message.
    row = {"question": "Why?"} | {f"c{n}" * 90: 1 for n in range(12)}
    write(tmp_path / "a.jsonl", row)
    assert prepare.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "questions without rubrics, as 'question' or 'prompt': python tools/write_rubrics.py" in error
    assert error.endswith("python data/prepare.py --help lists the formats\n") and error.count("\n") == 1


# ----------------------------------------------------------------------------- bad rows


def bad_and_good(path, bad, good):
    rows = [OWN | {"id": str(n)} for n in range(good)]
    lines = ['{"oops\n'] * (bad > 0) + [
        json.dumps(OWN | {"id": f"b{n}", "rubric": [{"text": "x", "weight": 0}]}) + "\n"
        for n in range(1, bad)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "".join(lines))
    return str(path)


def test_a_few_bad_rows_are_skipped_counted_and_named(tmp_path, capsys):
    source = bad_and_good(tmp_path / "a.jsonl", 20, 1000)
    assert prepare.main([source, "--out", str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr()
    lines = printed.err.strip().split("\n")
    assert len(lines) == 11 and lines[-1] == "skipped 10 more"
    assert (
        "a.jsonl:1001: not a line of JSON" in lines[0]
        and "a.jsonl:1002: criterion 1: weight 0" in lines[1]
    )
    counts = json.loads(printed.out)
    assert (counts["read"], counts["written"], counts["skipped"]) == (1020, 1000, 20)
    assert len(rar.read_examples(tmp_path / "out.jsonl")) == 1000


def test_too_many_bad_rows_are_an_error_before_anything_is_written(tmp_path, capsys):
    source = bad_and_good(tmp_path / "a.jsonl", 21, 1000)
    out = tmp_path / "out.jsonl"
    out.write_text("what was there")
    assert prepare.main([source, "--out", str(out), "--force"]) == 2
    printed = capsys.readouterr()
    assert (
        "21 of 1021 rows cannot be used, 20 because: criterion 1: weight 0" in printed.err
        and "--max_bad" in printed.err
    )
    assert out.read_text() == "what was there" and sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["a.jsonl", "out.jsonl"]
    assert prepare.main([source, "--out", str(out), "--force", "--max_bad", "0.03"]) == 0
    assert len(rar.read_examples(out)) == 1000


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """The largest size of a file is set below what the rows need; the process is a real one."""
    source = bad_and_good(tmp_path / "a.jsonl", 0, 1000)
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); from data import prepare; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "sys.exit(prepare.main(sys.argv[2:]))"
    )
    arguments = [
        sys.executable,
        "-c",
        code,
        str(ROOT),
        source,
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("prepare.py: ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_deep_nests_and_long_numbers(convert):
    nest = "x"
    for _ in range(500):
        nest = [nest]
    row = OWN | {"rubric": [OWN["rubric"][0] | {"tags": nest}]}
    assert convert(row)[0].rubric[0].tags == ["x"]
    for line in (b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"):
        with pytest.raises(rar.DataError, match="f:1: not a line of JSON"):
            prepare.convert_row(line, prepare.Place("f", "f", 1))


def test_no_file_without_rows(tmp_path):
    source = bad_and_good(tmp_path / "a.jsonl", 3, 0)
    with pytest.raises(rar.DataError, match="3 of 3 rows cannot be used, .*lists the formats"):
        prepare.prepare(source, str(tmp_path / "out.jsonl"), max_bad=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_no_file_of_somebody_else_is_touched(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", OWN)
    notes = tmp_path / "notes.md"
    notes.write_text("no newline at the end")
    old = write(tmp_path / "old.jsonl", HUB)
    (tmp_path / "folder.jsonl").mkdir()
    for out, words in (
        (notes, "name a .jsonl file"),
        (old, "--force"),
        (source, "the source itself"),
        (tmp_path / "folder.jsonl", "a folder"),
    ):
        for force in ([], ["--force"]) if out is not old else ([],):
            assert prepare.main([str(source), "--out", str(out), *force]) == 2
            assert words in capsys.readouterr().err
    with pytest.raises(rar.DataError, match="inside the folder to read"):
        prepare.prepare(str(tmp_path), str(tmp_path / "new.jsonl"))
    assert notes.read_text() == "no newline at the end" and json.loads(old.read_text()) == HUB
    assert prepare.main([str(source), "--out", str(old), "--force"]) == 0
    assert rar.read_examples(old)[0].id == "own"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_bad", "nan"], "from 0 to 1"),
        (["--max_bad", "2"], "from 0 to 1"),
        (["--max_bad", "-1"], "from 0 to 1"),
    ],
)
def test_flags_that_cannot_be(tmp_path, capsys, flags, words):
    source = write(tmp_path / "a.jsonl", OWN)
    assert prepare.main([str(source), "--out", str(tmp_path / "out.jsonl"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_what_is_not_there(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source, words in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "empty", "no file in this folder"),
        ("x", "no such file"),
        ("someone/none.jsonl", "no such file"),
    ):
        assert prepare.main([str(source), "--out", str(tmp_path / "out.jsonl")]) == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1


def test_a_terminal_is_not_commanded_by_a_row(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", {"\x1b]0;owned\x07\nmore": 1})
    assert prepare.main([str(source), "--out", str(tmp_path / "out.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and printed.count("\n") == 1


# ----------------------------------------------------------------------------- what must survive

ODD = (
    "Was hilft?\u2028Что помогает? \x85 何が\u2029 عربي \U0001f9ea "
    '<cite id="s1">x</cite> [1] \\boxed{1}\t\ud7ff'
)


def test_any_text_survives_byte_for_byte(convert):
    row = json.loads(
        json.dumps(HEALTHBENCH)
        .replace("My head hurts.", "@@")
        .replace("a mark", "@@")
        .replace("Asks how long.", "@@")
    )
    row = json.loads(json.dumps(row).replace("@@", json.dumps(ODD)[1:-1]))
    row["ideal_completions_data"] = {"ideal_completion": ODD}
    row["example_tags"] = [f"theme:{ODD}"]
    row["rubrics"][0]["tags"] = [f"axis:{ODD}"]
    [e] = convert(row)
    assert e.question == e.canary == e.reference == ODD and e.tags == [f"theme:{ODD}"]
    # Criteria are stripped, as they have always been; inside nothing changes.
    assert e.rubric[0].text == ODD.strip() and e.rubric[0].axis == ODD
    for name, text in (
        ("DR Tulu", "Which models see?"),
        ("ResearchQA", "How do lenses bend light?"),
        ("RaR", "What treats scurvy?"),
        ("OpenRubrics", "Suggest five objects."),
    ):
        row = json.loads(json.dumps(EVERY[name]))
        for key, value in row.items():
            if value == text:
                row[key] = ODD
        if name == "DR Tulu":
            row["messages"][0]["content"] = ODD
        assert convert(row)[0].question == ODD


def test_half_a_character_costs_its_row_only(convert):
    rows = [OWN | {"id": str(n)} for n in range(60)]
    examples = convert(*rows, OWN | {"id": "half", "question": "Why \ud83d?"})
    assert [e.id for e in examples] == [str(n) for n in range(60)]


def test_a_prompt_ends_with_a_question(convert):
    for messages in (
        [{"role": "user", "content": " "}],
        [{"role": "system", "content": "x"}],
        [*HUB["prompt"], {"role": "assistant", "content": "x"}],
    ):
        with pytest.raises(rar.DataError, match="must end with a message of the user"):
            convert(HUB | {"prompt": messages})


# ----------------------------------------------------------------------------- random rows

WORDS = ["fever", "Fieber", "発熱", "dose", "λ", "a\u2028b", "[1]", "rest."]
POINTS = [-10, -3, 1, 2, 5, 0.5, 7.25]


def words(rng):
    """A short text."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def points(rng):
    """The weights of a rubric, the last one positive."""
    return [*rng.choices(POINTS, k=rng.randint(1, 9)), 4]


def messages(rng):
    """A prompt of one or three messages."""
    last = {"role": "user", "content": words(rng)}
    if rng.random() < 0.7:
        return [last]
    first = {"role": "user", "content": words(rng)}
    return [first, {"role": "assistant", "content": words(rng)}, last]


def random_healthbench(rng):
    items = []
    for weight in points(rng):
        axis = rng.choice(["axis:accuracy", "axis:completeness", "cluster:pain"])
        items.append({"criterion": words(rng), "points": weight, "tags": ["level:x", axis]})
    ideal = rng.choice([None, {"ideal_completion": words(rng)}])
    changes = {"prompt": messages(rng), "rubrics": items, "ideal_completions_data": ideal}
    return HEALTHBENCH | changes


def random_professional(rng):
    items = [{"criterion_text": words(rng), "points": weight} for weight in points(rng)]
    return PROFESSIONAL | {"conversation": {"messages": messages(rng)}, "rubric_items": items}


def random_research_rubrics(rng):
    items = []
    for weight in points(rng):
        items.append({"criterion": words(rng), "weight": weight, "axis": words(rng)})
    return RESEARCH_RUBRICS | {"prompt": words(rng), "rubrics": items}


def random_verl(rng):
    tags = {"function": "", "parameters": "", "verifier": "llm"}
    items = [
        {"criterion": words(rng), "points": weight, "tags": tags} for weight in points(rng)
    ]
    model = {"ground_truth": words(rng), "rubrics": items}
    return {"data_source": "x", "prompt": messages(rng), "reward_model": model}


def random_rubrichub(rng):
    row = random_verl(rng)
    items = row["reward_model"]["rubrics"]
    plain = [{"criterion": item["criterion"], "points": item["points"]} for item in items]
    return row | {"Rubrics": plain, "ability": words(rng)}


def random_dr_tulu(rng):
    items = []
    for weight in points(rng):
        items.append({"description": words(rng), "title": words(rng), "weight": weight})
    truth = {"query": words(rng), "rubrics": items}
    return DR_TULU | {"messages": messages(rng), "ground_truth": json.dumps(truth)}


def random_research_qa(rng):
    items = [{"rubric_item": words(rng), "type": words(rng)} for _ in points(rng)]
    return RESEARCH_QA | {"query": words(rng), "rubric": items}


def random_open_rubrics(rng):
    lines = []
    for number, _ in enumerate(points(rng), 1):
        kind = rng.choice([" [Hard Rule]", " [Principle]", ""])
        lines.append(f"{number}. {words(rng)}{kind}")
    return OPEN_RUBRICS | {"instruction": words(rng), "rubric": "\n".join(lines)}


def random_released(rng):
    items = []
    for _ in points(rng):
        kind = rng.choice(["Essential", "Important", "Optional"])
        text = f"{kind} Criteria: {words(rng)}"
        items.append({"title": words(rng), "description": text, "weight": rng.randint(1, 5)})
    for _ in range(rng.randint(0, 3)):
        # Wordings whose polarity is settled above, alone or by their title.
        title = words(rng)
        text = rng.choice(GOOD_WHEN_MET + BAD_WHEN_MET)
        if rng.random() < 0.3:
            title, text, _ = rng.choice(TITLED)
        text = f"Pitfall Criteria: {text}"
        items.append({"title": title, "description": text, "weight": -rng.randint(1, 2)})
    return RELEASED | {"question": words(rng), "reference_answer": words(rng), "rubric": items}


def random_own(rng):
    items = []
    for weight in points(rng):
        item = {"text": words(rng), "weight": weight, "axis": words(rng), "title": words(rng)}
        items.append(item)
    return OWN | {"question": words(rng), "reference": words(rng), "rubric": items}


def random_medqa(rng):
    return MEDQA | {"question": words(rng)}


def random_gpqa(rng):
    return GPQA | {"Question": words(rng)}


RANDOM = {
    "HealthBench": random_healthbench,
    "Professional": random_professional,
    "ResearchRubrics": random_research_rubrics,
    "verl": random_verl,
    "RubricHub": random_rubrichub,
    "DR Tulu": random_dr_tulu,
    "ResearchQA": random_research_qa,
    "OpenRubrics": random_open_rubrics,
    "RaR": random_released,
    "own": random_own,
    "MedQA": random_medqa,
    "GPQA": random_gpqa,
}


# ----------------------------------------------------------------------------- plain readings

# One function per format, written without data/prepare.py: the criteria as (text, weight, axis,
# category), the text of the prompt's last message, and the reference answer.


def plainly(items, text, weight, axis=""):
    criteria = []
    for item in items:
        criteria.append((item[text].strip(), item[weight], item[axis] if axis else "", ""))
    return criteria


def plain_healthbench(row):
    criteria = []
    for item in row["rubrics"]:
        axis = item["tags"][1].replace("axis:", "") if "axis:" in item["tags"][1] else ""
        criteria.append((item["criterion"].strip(), item["points"], axis, ""))
    ideal = row["ideal_completions_data"]
    return criteria, row["prompt"][-1]["content"], ideal["ideal_completion"] if ideal else ""


def plain_professional(row):
    criteria = plainly(row["rubric_items"], "criterion_text", "points")
    return criteria, row["conversation"]["messages"][-1]["content"], ""


def plain_research_rubrics(row):
    return plainly(row["rubrics"], "criterion", "weight", "axis"), row["prompt"], ""


def plain_verl(row):
    model = row["reward_model"]
    criteria = plainly(model["rubrics"], "criterion", "points")
    return criteria, row["prompt"][-1]["content"], model["ground_truth"]


def plain_dr_tulu(row):
    truth = json.loads(row["ground_truth"])
    criteria = plainly(truth["rubrics"], "description", "weight")
    return criteria, row["messages"][-1]["content"], ""


def plain_research_qa(row):
    criteria = [(item["rubric_item"].strip(), 1, "", "") for item in row["rubric"]]
    return criteria, row["query"], ""


def plain_open_rubrics(row):
    criteria = []
    for line in row["rubric"].split("\n"):
        text = line.split(". ", 1)[1]
        text = text.replace(" [Hard Rule]", "").replace(" [Principle]", "")
        criteria.append((text.strip(), 1, "", ""))
    return criteria, row["instruction"], ""


def plain_released(row):
    criteria = []
    for item in row["rubric"]:
        kind, text = item["description"].split(" Criteria: ", 1)
        weight = item["weight"]
        by_title = (item["title"], text, 2) in TITLED
        if kind == "Pitfall" and (text in GOOD_WHEN_MET or by_title):
            weight = -weight
        criteria.append((text.strip(), weight, "", kind))
    return criteria, row["question"], row["reference_answer"]


def plain_own(row):
    criteria = plainly(row["rubric"], "text", "weight", "axis")
    return criteria, row["question"], row["reference"]


PLAIN = {
    "HealthBench": plain_healthbench,
    "Professional": plain_professional,
    "ResearchRubrics": plain_research_rubrics,
    "verl": plain_verl,
    "RubricHub": plain_verl,
    "DR Tulu": plain_dr_tulu,
    "ResearchQA": plain_research_qa,
    "OpenRubrics": plain_open_rubrics,
    "RaR": plain_released,
    "own": plain_own,
}


@pytest.mark.parametrize("name", PLAIN)
def test_no_weight_polarity_axis_or_text_differs_from_a_plain_reading(name):
    rng = random.Random(name)
    for number in range(200):
        row = RANDOM[name](rng)
        raw = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()
        place = prepare.Place("f.jsonl", "f.jsonl", number)
        [line] = prepare.convert_row(raw, place).lines
        example = rar.parse_example(json.loads(line), "out:1")
        criteria = [(c.text, c.weight, c.axis, c.category) for c in example.rubric]
        assert (criteria, example.question, example.reference) == PLAIN[name](row)


# ----------------------------------------------------------------------------- mutated rows

ANYTHING = [
    *(None, True, False, 0, 3, -1.5, float("nan"), float("inf"), 10**400, 1e308),
    *("", " ", "text", "\ud83d", "\x1b[2J", "[1, 2", '{"a": 1}', "change_case:english_capital"),
    *([], [[]], ["x"], [None], [{"criterion": "x", "points": 1}]),
    *({}, {"a": None}, {"role": "user", "content": "x"}, {"rubrics": 3}),
]


def paths(value, path=()):
    """The path to every place in a value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list):
        for key in range(len(value)):
            yield from paths(value[key], (*path, key))


def mutate(rng, row):
    """Replaces, removes, doubles or renames something at a random place of the row."""
    *parents, key = rng.choice([path for path in paths(row) if path])
    holder = row
    for parent in parents:
        holder = holder[parent]

    action = rng.random()
    if action < 0.5:
        holder[key] = copy.deepcopy(rng.choice(ANYTHING))
    elif action < 0.65:
        del holder[key]
    elif action < 0.8:
        # JSON text where the value itself should be: how tables keep lists.
        holder[key] = json.dumps(holder[key])
    elif isinstance(holder, dict):
        holder[rng.choice([*COLUMNS, *NULLS, "weight"])] = holder.pop(key)
    else:
        holder.append(copy.deepcopy(rng.choice(ANYTHING)))


def survive(n, seed):
    """Converts n mutated rows and returns how many were converted; only DataError is caught."""
    rng = random.Random(seed)
    converted = 0
    for number in range(n):
        row = json.loads(json.dumps(RANDOM[rng.choice(list(RANDOM))](rng)))
        for _ in range(rng.randint(1, 4)):
            if row:
                mutate(rng, row)

        # Objects as tables give them, lines as files do, some of those cut or damaged.
        raw = row if rng.random() < 0.3 else json.dumps(row).encode()
        if isinstance(raw, bytes) and rng.random() < 0.02:
            raw = raw[: rng.randrange(len(raw))] + rng.choice([b"", b"\xff", b"[" * 5000])

        try:
            result = prepare.convert_row(raw, prepare.Place("f.jsonl", "f.jsonl", number))
        except rar.DataError as error:
            printed = prepare.one_line(error)
            assert (
                printed.startswith(f"f.jsonl:{number}: ")
                and len(printed) > 20
                and "\n" not in printed
            )
            continue
        converted += 1
        for example, line in zip(result.examples, result.lines):
            # What is written is what was checked.
            assert line.endswith(b"\n") and line.count(b"\n") == 1
            assert rar.parse_example(json.loads(line), "out:1") == example
    return converted


def test_random_and_mutated_rows_end_in_a_dataerror_or_as_what_is_read_back():
    assert 200 < survive(2000, seed=1) < 1800


@pytest.mark.long
def test_twelve_thousand_rows_end_in_a_dataerror_or_as_what_is_read_back():
    assert 1_200 < survive(12_000, seed=2) < 10_800


WRONG = [
    {"example_tags": 3},
    {"rubric": [OWN["rubric"][0] | {"tags": [3]}]},
    {"rubric": [OWN["rubric"][0] | {"axis": 3}]},
    {"rubric": [OWN["rubric"][0] | {"weight": 10**400}]},
    {"rubric": ["text"]},
]


@pytest.mark.parametrize("change", WRONG)
def test_values_of_the_wrong_kind_are_one_line(convert, change):
    with pytest.raises(rar.DataError, match="1 of 1 rows cannot be used") as caught:
        convert(OWN | change)
    assert "\n" not in str(caught.value)


def test_columns_of_the_wrong_kind_that_no_format_needs_change_nothing(convert):
    assert convert(HUB | {"reward_model": ["x"]}) == convert(HUB)
    columns = "in its columns: answer, query, question"
    with pytest.raises(rar.DataError, match=columns):
        convert({"question": "Which metal?", "answer": ["A"], "query": 3})


# ----------------------------------------------------------------------------- many rows


def test_many_rows_in_little_time_and_memory(tmp_path):
    """Of a row that was written, a hash and an id are kept; time is per row."""
    item = {"criterion": "States a fact about the fever. " * 6, "points": 3}
    item["tags"] = ["level:example", "axis:accuracy"]
    lines = []
    for number in range(3000):
        lines.append(
            json.dumps(HEALTHBENCH | {"prompt_id": str(number), "rubrics": [item] * 11})
        )
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    began = time.process_time()
    prepare.prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"))
    took = time.process_time() - began

    # Measured apart: tracing makes it several times slower.
    tracemalloc.start()
    prepare.prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"), force=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 3 and peak < (tmp_path / "a.jsonl").stat().st_size / 3
