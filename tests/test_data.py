"""The built-in prompts: complete, balanced, self-contained, and held out for real."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

import judge
import rar

ROWS = {name: [json.loads(line) for line in (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf8").split("\n") if line] for name in ("train", "heldout")}
ALL = ROWS["train"] + ROWS["heldout"]
CRITERIA = [(row, c) for row in ALL for c in row["rubric"]]


def test_sizes_and_schema():
    assert len(ROWS["train"]) >= 64 and len(ROWS["heldout"]) >= 24
    assert len({row["id"] for row in ALL}) == len(ALL)
    for row in ALL:
        assert set(row) == {"id", "topic", "question", "reference", "rubric"}
        assert 5 <= len(row["rubric"]) <= 9, row["id"]
        assert 8 <= len(row["question"].split()) <= 35 and 15 <= len(row["reference"].split()) <= 60, row["id"]
        for c in row["rubric"]:
            assert set(c) == {"title", "text", "category", "weight", "axis"}
            assert c["category"] in ("Essential", "Important", "Optional", "Pitfall") and c["axis"] in rar.AXES
            low, high = {"Essential": (5, 5), "Important": (3, 4), "Optional": (1, 2), "Pitfall": (-5, -2)}[c["category"]]
            assert low <= c["weight"] <= high
        texts = [c["text"] for c in row["rubric"]]
        assert len(set(texts)) == len(texts)
    for name in ROWS:
        assert len(rar.read_examples(ROOT / "data" / f"{name}.jsonl")) == len(ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_balance(name):
    rows = ROWS[name]
    axes = Counter(c["axis"] for row in rows for c in row["rubric"])
    total = sum(axes.values())
    assert all(axes[axis] / total >= 0.10 for axis in rar.AXES), axes
    topics = Counter(row["topic"] for row in rows)
    assert min(topics["health"], topics["science"]) / len(rows) >= 0.4
    for row in rows:
        categories = Counter(c["category"] for c in row["rubric"])
        assert categories["Essential"] >= 1 and categories["Pitfall"] >= 1, row["id"]
        assert sum(c["weight"] for c in row["rubric"] if c["weight"] > 0) > 0


def subject(question: str) -> set[str]:
    """Content words of a question without the requests that recur: the format, an example, when to see a doctor."""
    recurring = r"(,? and when should (I|they) |Say also when|(Give|Add) an (everyday )?example|Use at most|Answer in|Give a list|Write plain)"
    return set(judge.content_words(re.split(recurring, question)[0]))


def test_no_heldout_prompt_is_a_near_copy_of_a_training_prompt():
    for row in ROWS["heldout"]:
        mine = subject(row["question"])
        for other in ROWS["train"]:
            theirs = subject(other["question"])
            assert len(mine & theirs) / len(mine | theirs) < 0.5, (row["question"], other["question"])
    questions = [row["question"] for row in ALL]
    assert len(set(questions)) == len(questions)
    # the check can fail: a light rewording of one question is caught
    a, b = subject("How can I soothe a sore throat at home?"), subject("At home, how can I soothe my sore throat today?")
    assert len(a & b) / len(a | b) >= 0.5


def test_every_criterion_stands_alone():
    """No pronoun that points outside the sentence, no mention of the question or of other criteria."""
    for row, c in CRITERIA:
        assert not re.search(r"\b(it|this|these|those|aforementioned|the question|criterion)\b", c["text"], re.I), c["text"]
        assert len(judge.content_words(c["text"])) >= 2 or judge.form_verdict(c["text"], "x"), c["text"]
        assert c["text"].endswith(".") and len(c["text"].split()) >= 3


def test_polarity_is_explicit():
    """A pitfall names the fault itself with a negative weight; everything else describes something good. No 'avoids'."""
    good = {"States", "Mentions", "Explains", "Advises", "Gives", "Ends", "Addresses", "Is", "Has", "Recommends", "Notes", "Says"}
    bad = {"Claims", "Recommends", "Tells", "Repeats", "Advises", "States", "Suggests"}
    for row, c in CRITERIA:
        first = c["text"].split()[0]
        assert first in (bad if c["weight"] < 0 else good), (row["id"], c["text"])
        assert (c["category"] == "Pitfall") == (c["weight"] < 0)
        assert not judge.NEGATED.match(c["text"]), c["text"]


def test_the_reference_answers_earn_their_rubrics():
    """The offline judge gives the references nearly everything, and the reference of another prompt far less."""

    class Rollout:
        def __init__(self, text):
            self.text = text

    for name in ROWS:
        examples = rar.read_examples(ROOT / "data" / f"{name}.jsonl")
        right = [(e, [Rollout(e.reference)]) for e in examples]
        wrong = [(e, [Rollout(other.reference)]) for e, other in zip(examples, examples[1:] + examples[:1])]
        method = rar.RubricReward(judge.OfflineJudge(), "points")
        method.score(right), method.score(wrong)
        mean = lambda groups: sum(r.reward for _, [r] in groups) / len(groups)
        assert mean(right) > 0.9
        assert mean(wrong) < 0.6
        pitfalls = [v.score for e, [r] in right for c, v in zip(e.rubric, r.verdicts) if c.weight < 0]
        assert sum(pitfalls) / len(pitfalls) < 0.1


def test_the_form_criteria_are_the_ones_that_recur():
    """They are decided by counting and appear in both parts, so what is learned about them carries over."""
    for name in ROWS:
        form = [c["text"] for row in ROWS[name] for c in row["rubric"] if judge.form_verdict(c["text"], "x")]
        assert len(form) / sum(len(row["rubric"]) for row in ROWS[name]) > 0.3
        assert "Ends with a complete sentence instead of breaking off." in form
