"""Rubrics as Rewards: readers, polarity, Eq. 1, HealthBench's score."""

import json
import math
import random
from dataclasses import dataclass, field

import pytest
from judge_server import JudgeServer

import rar
from judge import LLMJudge, OfflineJudge, Verdict
from rar import Criterion, DataError, Example, group_rewards


@dataclass
class Rollout:
    text: str
    verdicts: list = field(default_factory=list)
    reward: float = math.nan


RUBRIC = [
    Criterion("States that rest helps a cold.", 5, "Rest", "Essential", "accuracy"),
    Criterion("Mentions drinking water.", 3, "Water", "Important", "completeness"),
    Criterion("Has at most two sentences.", 1, "Short", "Optional", "instruction_following"),
    Criterion("Recommends antibiotics against a cold.", -4, "Antibiotics", "Pitfall", "accuracy"),
]


def test_explicit_is_equation_one_with_the_papers_weights():
    for bits in range(16):
        scores = [float(bits >> k & 1) for k in range(4)]
        by_hand = (1.0 * scores[0] + 0.7 * scores[1] + 0.3 * scores[2] + 0.9 * (1 - scores[3])) / (1.0 + 0.7 + 0.3 + 0.9)
        assert rar.explicit_reward(RUBRIC, scores) == pytest.approx(by_hand, abs=1e-12)


def test_contains_rlvr():
    """Remark 1: one criterion of weight 1 is the verifiable reward itself."""
    one = [Criterion("The final answer is 42.", 1, category="Essential")]
    assert [rar.explicit_reward(one, [s]) for s in (0.0, 1.0)] == [0.0, 1.0]


def test_points_worked_vector():
    rubric = [Criterion("", p) for p in (7, 5, 10, -6)]
    assert rar.points_reward(rubric, [1, 0, 1, 1]) == 0.5
    assert rar.points_reward(rubric, [0, 0, 0, 1]) == -6 / 22  # unclipped


@pytest.mark.parametrize("aggregate", rar.AGGREGATIONS.values())
def test_committing_exactly_one_pitfall_scores_lower(aggregate):
    safe, unsafe = [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    assert aggregate(RUBRIC, unsafe) < aggregate(RUBRIC, safe) == 1.0


@pytest.mark.parametrize("method", rar.AGGREGATIONS)
def test_pitfall_costs_reward_through_the_judge_and_every_reader(method):
    own = rar.parse_row({"id": "a", "question": "Cold?", "rubric": [{"text": c.text, "weight": c.weight, "category": c.category} for c in RUBRIC]}, "x:1")
    hb = rar.parse_row({"prompt_id": "a", "prompt": [{"role": "user", "content": "Cold?"}], "rubrics": [{"criterion": c.text, "points": c.weight} for c in RUBRIC]}, "x:1")
    for example in (own, hb):
        safe = Rollout("Rest helps a cold. Try drinking water.")
        unsafe = Rollout("Rest helps a cold, antibiotics against a cold are what I recommend. Try drinking water.")
        rar.RubricReward(OfflineJudge(), method).score([(example, [safe, unsafe])])
        assert [v.score for v in safe.verdicts] == [1, 1, 1, 0] and [v.score for v in unsafe.verdicts] == [1, 1, 1, 1]
        assert unsafe.reward < safe.reward


@pytest.mark.parametrize("method", rar.AGGREGATIONS)
def test_missing_is_neutral_or_unscored_and_never_zero(method):
    """One missing verdict counts as the group's mean on that criterion; a rollout with too many has no reward at all."""

    class Broken:
        def ask(self, questions, progress=False):
            one, two, three = [1.0, 1.0, None, 0.0], [1.0, 0.0, 1.0, 0.0], [None, None, None, 0.0]
            return [Verdict(score, "no answer" if score is None else "") for score in one + two + three]

    example = Example("a", [{"role": "user", "content": "Cold?"}], RUBRIC)
    rollouts = [Rollout("one"), Rollout("two"), Rollout("three")]
    rar.RubricReward(Broken(), method).score([(example, rollouts)])
    aggregate = rar.AGGREGATIONS[method]
    assert rollouts[0].reward == aggregate(RUBRIC, [1.0, 1.0, 1.0, 0.0])  # the only other verdict on it says 1
    assert rollouts[1].reward == aggregate(RUBRIC, [1.0, 0.0, 1.0, 0.0])
    assert math.isnan(rollouts[2].reward)


def test_silence_earns_nothing():
    example = Example("a", [{"role": "user", "content": "Cold?"}], RUBRIC)
    for method in rar.AGGREGATIONS:
        silent = Rollout("  ")
        rar.RubricReward(OfflineJudge(), method).score([(example, [silent])])
        assert silent.reward == 0.0


def test_one_flat_batch_and_a_model_is_asked_identical_questions_once():
    class Counting(LLMJudge):
        calls = []

        def ask(self, questions, progress=False):
            self.calls.append(len(questions))
            return super().ask(questions, progress)

    a, b = (Example(i, [{"role": "user", "content": f"Cold {i}?"}], RUBRIC) for i in "ab")
    groups = [(a, [Rollout("same"), Rollout("same"), Rollout("other")]), (b, [Rollout("same")])]
    with JudgeServer() as server:
        judge = Counting(server.url, "model")
        rar.RubricReward(judge).score(groups)
        assert judge.calls == [4 * len(RUBRIC)] and len(server.bodies) == 3 * len(RUBRIC)  # a/same, a/other, b/same
    assert groups[0][1][0].verdicts == groups[0][1][1].verdicts


def test_judged_by_other_criteria_than_the_examples_own():
    example = Example("a", [{"role": "user", "content": "Cold?"}], RUBRIC)
    groups = [(example, [Rollout("Rest helps a cold."), Rollout("No.")]), (example, [Rollout("Drinking water.")])]
    rar.judge_groups(OfflineJudge(), groups, rubrics=[RUBRIC[:1], RUBRIC[1:3]])
    assert [[v.score for v in r.verdicts] for _, rollouts in groups for r in rollouts] == [[1.0], [0.0], [1.0, 1.0]]
    assert [r.criteria for _, rollouts in groups for r in rollouts] == [RUBRIC[:1], RUBRIC[:1], RUBRIC[1:3]]
    with pytest.raises(ValueError):
        rar.judge_groups(OfflineJudge(), groups, rubrics=[RUBRIC])


def test_healthbench_rows_agree_with_a_plain_computation(shared):
    path = shared("healthbench_200.jsonl")
    examples = rar.read_examples(path)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(examples) == len(rows) == 200
    rng = random.Random(0)
    for example, row in zip(examples, rows):
        assert [m["content"] for m in example.prompt] == [m["content"] for m in row["prompt"]]
        met = [rng.random() < 0.5 for _ in row["rubrics"]]
        got = sum(r["points"] for r, m in zip(row["rubrics"], met) if m)
        possible = sum(r["points"] for r in row["rubrics"] if r["points"] > 0)
        assert rar.points_reward(example.rubric, [float(m) for m in met]) == pytest.approx(got / possible, abs=1e-12)
        for axis, score in rar.axis_scores(example.rubric, [float(m) for m in met]).items():
            mine = [(r["points"], m) for r, m in zip(row["rubrics"], met) if f"axis:{axis}" in r["tags"]]
            assert score == pytest.approx(sum(p for p, m in mine if m) / sum(p for p, m in mine if p > 0), abs=1e-12)
        assert sum(c.axis == "accuracy" for c in example.rubric) == sum("axis:accuracy" in r["tags"] for r in row["rubrics"])
        assert all(c.axis in rar.AXES for c in example.rubric)


GOOD = {"id": "a", "question": "What helps?", "reference": "Rest.", "rubric": [{"title": "Rest", "text": "States that rest helps.", "category": "Essential", "weight": 5, "axis": "accuracy"}]}


def with_criterion(**change):
    return {**GOOD, "rubric": [{**GOOD["rubric"][0], **change}]}


@pytest.mark.parametrize(
    "row, words",
    [
        ("{oops", "not a line of JSON"),
        ("[1, 2]", "not an object"),
        ({**GOOD, "question": ""}, "no prompt"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "'role' and 'content'"),
        ({**GOOD, "rubric": []}, "no rubric"),
        ({**GOOD, "rubric": ["text"]}, "criterion 1: a str"),
        (with_criterion(text=" "), "criterion 1: no text"),
        (with_criterion(weight="five"), "weight 'five'"),
        (with_criterion(weight=math.nan), "weight nan"),
        (with_criterion(weight=math.inf), "weight inf"),
        (with_criterion(weight=0), "weight 0"),
        (with_criterion(weight=True), "weight True"),
        (with_criterion(category="Vital"), "category 'Vital'"),
        (with_criterion(weight=-3), "a Pitfall names a fault"),
        (with_criterion(weight=-3, category=""), "no criterion with a positive weight"),
    ],
)
def test_bad_rows_name_file_line_and_remedy(tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "first"}) + "\n\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n", encoding="utf8")
    with pytest.raises(DataError, match="rows.jsonl:3: ") as error:
        rar.read_examples(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_empty_missing_and_duplicate(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        rar.read_examples(empty)
    with pytest.raises(DataError, match="no such file"):
        rar.read_examples(tmp_path / "none.jsonl")
    twice = tmp_path / "twice.jsonl"
    twice.write_text((json.dumps(GOOD) + "\n") * 2)
    with pytest.raises(DataError, match="twice.jsonl:2: id 'a' already stands in .*twice.jsonl:1;"):
        rar.read_examples(twice)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a line of JSON"):
        rar.read_examples(binary)


def test_any_language_and_odd_separators_survive(tmp_path):
    text = "Was hilft?\u2028Что помогает? \x85 何が\u2029 عربي"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**GOOD, "question": text}, ensure_ascii=False) + "\r\n", encoding="utf8", newline="")
    [example] = rar.read_examples(path)
    assert example.question == text


def test_the_order_of_rollouts_does_not_matter():
    example = Example("a", [{"role": "user", "content": "Cold?"}], RUBRIC)
    texts = ["Rest helps a cold.", "Drink water.", "No."]
    forward, backward = ([Rollout(t) for t in order] for order in (texts, texts[::-1]))
    rar.RubricReward(OfflineJudge()).score([(example, forward)])
    rar.RubricReward(OfflineJudge()).score([(example, backward)])
    assert [r.reward for r in forward] == [r.reward for r in backward][::-1]


def test_bootstrap_covers_and_is_repeatable():
    rng = random.Random(1)
    hits = 0
    for trial in range(200):
        low, high = rar.bootstrap([rng.gauss(0.3, 1) for _ in range(40)], resamples=400)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert rar.bootstrap([0.1, 0.5, 0.9]) == rar.bootstrap([0.1, 0.5, 0.9])
    assert all(math.isnan(x) for x in rar.bootstrap([1.0]))


def test_half_is_counted_by_weight_and_what_nobody_knows_is_dropped():
    rubric = [Criterion("", 5, category="Essential"), Criterion("", 1, category="Optional"), Criterion("", 1, category="Optional")]
    heavy, light = group_rewards(rar.explicit_reward, rubric, [[1, None, None], [None, 1, 1]])
    assert heavy == 1.0 and math.isnan(light)
    assert group_rewards(rar.explicit_reward, rubric, [[1, 1, None], [0, 1, None]]) == [1.0, pytest.approx(0.3 / 1.3)]


def test_a_good_avoids_is_not_broken_by_staying_on_the_subject():
    said = rar.offline_rule(Criterion("Avoids claiming that a sore throat needs antibiotics.", 2), "Warm tea soothes a sore throat.")
    assert said.score == 1.0
