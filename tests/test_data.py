"""The built-in prompts: complete, balanced, self-contained, and held out for real."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT

import judge
import rar

ROWS = {}
for name in ("train", "heldout"):
    text = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf8")
    ROWS[name] = [json.loads(line) for line in text.split("\n") if line]
ALL = ROWS["train"] + ROWS["heldout"]


def criteria_of(rows):
    """(row, criterion) for every criterion of the rows."""
    pairs = []
    for row in rows:
        for c in row["rubric"]:
            pairs.append((row, c))
    return pairs


CRITERIA = criteria_of(ALL)

# The range of weights that goes with a category.
WEIGHTS = {"Essential": (5, 5), "Important": (3, 4), "Optional": (1, 2), "Pitfall": (-5, -2)}

# The sentences that can be counted, and what decides them.
CHECKS = {
    r"Is at most (\d+) words long\.": "words <= {}",
    r"Has at most (two|three) sentences\.": "sentences <= {}",
    r"Is written as a list with at least three items\.": "items >= 3",
    r"Is written as running text without a list\.": "items <= 1",
    r"Ends with a complete sentence instead of breaking off\.": "ends_complete",
    r"Addresses the reader directly as 'you'\.": "addresses_reader",
    r"Gives an example from everyday life, introduced by words such as 'for example'\.": (
        "gives_example"
    ),
    r"Repeats the same words or sentences over and over\.": "repetition > 0.2",
}
NUMBERS = {"two": "2", "three": "3"}


def expected_check(text):
    """The check that goes with a sentence, or None."""
    for sentence, check in CHECKS.items():
        match = re.fullmatch(sentence, text)
        if match:
            numbers = [NUMBERS.get(group, group) for group in match.groups()]
            return check.format(*numbers)
    return None


def test_sizes_and_schema():
    assert len(ROWS["train"]) >= 64 and len(ROWS["heldout"]) >= 24
    assert len({row["id"] for row in ALL}) == len(ALL)
    for row in ALL:
        assert set(row) == {"id", "topic", "question", "reference", "rubric"}
        assert 5 <= len(row["rubric"]) <= 9, row["id"]
        assert 8 <= len(row["question"].split()) <= 35, row["id"]
        assert 15 <= len(row["reference"].split()) <= 60, row["id"]
        for c in row["rubric"]:
            assert set(c) - {"check"} == {"title", "text", "category", "weight", "axis"}
            assert c["axis"] in rar.AXES
            low, high = WEIGHTS[c["category"]]
            assert low <= c["weight"] <= high
        texts = [c["text"] for c in row["rubric"]]
        assert len(set(texts)) == len(texts)
    for name, rows in ROWS.items():
        assert len(rar.read_examples(ROOT / "data" / f"{name}.jsonl")) == len(rows)


def test_what_can_be_counted_has_its_check_and_nothing_else_has():
    for row, c in CRITERIA:
        assert c.get("check") == expected_check(c["text"]), (row["id"], c["text"])
    asked = {"Use at most 40 words.": "words <= 40", "Answer in at most two": "sentences <= 2"}
    asked["Answer in at most three"] = "sentences <= 3"
    asked["Give a list"] = "items >= 3"
    for row in ALL:
        checks = [c.get("check") for c in row["rubric"]]
        for words, check in asked.items():
            assert words not in row["question"] or check in checks, row["id"]


@pytest.mark.parametrize("name", ROWS)
def test_balance(name):
    rows = ROWS[name]
    axes = Counter(c["axis"] for _, c in criteria_of(rows))
    total = sum(axes.values())
    assert all(axes[axis] / total >= 0.10 for axis in rar.AXES), axes
    topics = Counter(row["topic"] for row in rows)
    assert min(topics["health"], topics["science"]) / len(rows) >= 0.4
    for row in rows:
        categories = Counter(c["category"] for c in row["rubric"])
        assert categories["Essential"] >= 1 and categories["Pitfall"] >= 1, row["id"]
        assert sum(c["weight"] for c in row["rubric"] if c["weight"] > 0) > 0


RECURRING = (
    r"(,? and when should (I|they) |Say also when|(Give|Add) an (everyday )?example|"
    r"Use at most|Answer in|Give a list|Write plain)"
)


def subject(question: str) -> set[str]:
    """Content words without the requests that recur: format, example, when to see a doctor."""
    return set(judge.content_words(re.split(RECURRING, question)[0]))


def overlap(one: set[str], other: set[str]) -> float:
    """Share of the words that both have."""
    return len(one & other) / len(one | other)


def test_no_heldout_prompt_is_a_near_copy_of_a_training_prompt():
    for row in ROWS["heldout"]:
        mine = subject(row["question"])
        for other in ROWS["train"]:
            share = overlap(mine, subject(other["question"]))
            assert share < 0.5, (row["question"], other["question"])
    questions = [row["question"] for row in ALL]
    assert len(set(questions)) == len(questions)
    # The check can fail: a light rewording of one question is caught.
    one = subject("How can I soothe a sore throat at home?")
    other = subject("At home, how can I soothe my sore throat today?")
    assert overlap(one, other) >= 0.5


def test_every_criterion_stands_alone():
    """No pronoun that points outside the sentence, no mention of question or other criteria."""
    pointing = r"\b(it|this|these|those|aforementioned|the question|criterion)\b"
    for _, c in CRITERIA:
        assert not re.search(pointing, c["text"], re.IGNORECASE), c["text"]
        assert len(judge.content_words(c["text"])) >= 2 or "check" in c, c["text"]
        assert c["text"].endswith(".") and len(c["text"].split()) >= 3


GOOD = {"States", "Mentions", "Explains", "Advises", "Gives", "Ends", "Addresses", "Is", "Has"}
GOOD |= {"Recommends", "Notes", "Says"}
BAD = {"Claims", "Recommends", "Tells", "Repeats", "Advises", "States", "Suggests"}
NEGATED = r"(?i)(the response )?(avoids|does not|doesn't|never|refrains from|is free of)\b"


def test_polarity_is_explicit():
    """A pitfall names the fault itself, with a negative weight; all else is good. No 'avoids'."""
    for row, c in CRITERIA:
        first = c["text"].split()[0]
        assert first in (BAD if c["weight"] < 0 else GOOD), (row["id"], c["text"])
        assert (c["category"] == "Pitfall") == (c["weight"] < 0)
        assert not re.match(NEGATED, c["text"]), c["text"]
        assert not rar.names_avoidance(c["text"]), c["text"]


def mean_reward(method, pairs):
    """Mean reward of (example, text) pairs, and the verdicts on all pitfalls."""
    groups = []
    for example, text in pairs:
        groups.append(rar.Group(example, [SimpleNamespace(text=text)]))
    method.score(groups)
    rewards = []
    pitfalls = []
    for example, [rollout] in groups:
        rewards.append(rollout.reward)
        for c, verdict in zip(example.rubric, rollout.verdicts):
            if c.weight < 0:
                pitfalls.append(verdict.score)
    return sum(rewards) / len(rewards), sum(pitfalls) / len(pitfalls)


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_answers_earn_their_rubrics(name):
    """The offline judge gives references nearly everything, those of other prompts far less."""
    examples = rar.read_examples(ROOT / "data" / f"{name}.jsonl")
    others = examples[1:] + examples[:1]
    config = SimpleNamespace(method="points", advantage="std")
    method = rar.RubricReward(judge.LexicalJudge(), config)
    right, pitfalls = mean_reward(method, [(e, e.reference) for e in examples])
    wrong, _ = mean_reward(method, [(e, o.reference) for e, o in zip(examples, others)])
    assert right > 0.9
    assert wrong < 0.6
    assert pitfalls < 0.1


@pytest.mark.parametrize("name", ROWS)
def test_the_checks_are_criteria_that_recur(name):
    """They appear in both parts, so what is learned about them carries over."""
    criteria = criteria_of(ROWS[name])
    checks = [c["check"] for _, c in criteria if "check" in c]
    assert len(checks) / len(criteria) > 0.3
    assert "ends_complete" in checks
