"""arlrr.py: class rewards on real rubrics, whose turn it is, and a search that leaves no trace."""

import importlib.util
import json
import math
import random
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_train import lines, run

import arlrr
import grpo
import rar
import train
from arlrr import ARLRR, GDPO, AxisMean
from judge import LexicalJudge, Verdict
from rar import Criterion, DataError, Example, Group


def settings(method="arlrr", **changes):
    """Settings as train.Config has them, those that arlrr.py reads."""
    values = {"schedule": "cyclic", "stage": 5, "class_by": "axis", "seed": 0, "advantage": "std"}
    values.update(changes)
    return SimpleNamespace(method=method, **values)


def alternating(schedule="cyclic", judge=None, **changes):
    return ARLRR(judge or LexicalJudge(), settings(schedule=schedule, **changes))


def example(name: str, *rubric: tuple[str, float, str]) -> Example:
    prompt = [{"role": "user", "content": f"What is {name}?"}]
    criteria = [Criterion(text, weight, axis=axis) for text, weight, axis in rubric]
    return Example(name, prompt, criteria)


def group(example: Example, *texts: str) -> Group:
    return Group(example, [grpo.Rollout([1], [2], [0.0], "stop", text) for text in texts])


RAIN = example(
    "rain",
    ("Mentions clouds.", 4, "accuracy"),
    ("Mentions warm air.", 3, "completeness"),
    ("Mentions the moon.", -2, "accuracy"),
    ("Mentions cheese.", -5, "tone"),
)
ICE = example("ice", ("Mentions water.", 2, "accuracy"), ("Mentions cheese.", -5, "tone"))
SNOW = example("snow", ("Mentions crystals.", 2, "completeness"))


# ---------------------------------------------------------------------- rewards


def plainly(criteria, scores):
    """r_c said in the simplest way: what was earned, over what could be earned."""
    earned, possible = 0.0, 0.0
    for criterion, score in zip(criteria, scores):
        earned += criterion.weight * score
        if criterion.weight > 0:
            possible += criterion.weight
    return earned / possible if possible else None


def test_class_rewards_are_healthbenchs_axis_scores():
    rng = random.Random(0)
    for e in rar.read_examples(ROOT / "data" / "train.jsonl"):
        scores = [float(rng.random() < 0.5) for _ in e.rubric]
        rewards = arlrr.class_rewards(e.rubric, [scores])
        assert {axis: reward for axis, [reward] in rewards.items()} == rar.axis_scores(e.rubric, scores)


def by_axis(rubric, scores):
    """Axis -> (its criteria, their scores)."""
    parts = {}
    for criterion, score in zip(rubric, scores):
        criteria, values = parts.setdefault(criterion.axis, ([], []))
        criteria.append(criterion)
        values.append(score)
    return parts


def test_class_rewards_and_the_identity_on_all_real_rubrics(shared):
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    rng = random.Random(0)
    remainders = 0
    assert len(examples) == 200
    for e in examples:
        scores = [float(rng.random() < 0.4) for _ in e.rubric]
        rewards = arlrr.class_rewards(e.rubric, [scores])
        weights = arlrr.class_weights(e.rubric)
        assert set(rewards) == set(weights) == set(rar.axis_scores(e.rubric, scores))
        assert sum(weights.values()) == pytest.approx(1, abs=1e-12)

        total = sum(c.weight for c in e.rubric if c.weight > 0)
        remainder = 0.0
        for axis, (criteria, values) in by_axis(e.rubric, scores).items():
            expected = plainly(criteria, values)
            assert (axis in rewards) == (expected is not None)
            if expected is None:
                remainder += sum(c.weight * v for c, v in zip(criteria, values)) / total
            else:
                assert rewards[axis] == [pytest.approx(expected, abs=1e-12)]
        remainders += remainder != 0
        weighted = sum(weights[k] * r for k, [r] in rewards.items())
        points = rar.points_reward(e.rubric, scores)
        assert points == pytest.approx(weighted + remainder, abs=1e-12)
    assert remainders > 20  # the identity's last term is not always 0


def test_contraction_holds_on_real_rubrics_without_a_penalty_only_class(shared):
    rng = random.Random(1)
    tried = 0
    for e in rar.read_examples(shared("healthbench_200.jsonl")):
        weights = arlrr.class_weights(e.rubric)
        if set(weights) != {c.axis for c in e.rubric}:
            continue
        tried += 1
        matrix = []
        for _ in range(8):
            matrix.append([float(rng.random() < 0.5) for _ in e.rubric])
        rewards = arlrr.class_rewards(e.rubric, matrix)
        total, parts = arlrr.contraction([weights[k] for k in rewards], list(rewards.values()))
        points = [rar.points_reward(e.rubric, row) for row in matrix]
        assert total == pytest.approx(statistics.pvariance(points), abs=1e-12)
        assert total <= parts + 1e-12
    assert tried > 100


def test_the_theorem_is_measured_as_predicted(capsys):
    rows = arlrr.demo(n_groups=400)
    assert len(rows) == 4
    for rho, measured, predicted, corr, predicted_corr in rows:
        assert predicted == pytest.approx(0.2 + 0.8 * rho)
        assert measured == pytest.approx(predicted, abs=0.03)
        assert corr <= 1 + 1e-12
        assert corr == pytest.approx(predicted_corr, abs=0.05)
    assert "predicted" in capsys.readouterr().out


def test_contraction_metrics_by_hand():
    rubric = [Criterion("", 1, axis="a"), Criterion("", 3, axis="b")]
    matrices = [[[1, 0], [0, 1]], [[1, 1], [1, 1]], [[1, None], [0, 0]]]
    metrics = arlrr.contraction_metrics([(rubric, matrix) for matrix in matrices])
    # First group: R = 0.25, 0.75 (variance 1/16), r_a and r_b have variance 1/4 each and are
    # opposite. Second: all alike. Third: left out.
    assert metrics["var_ratio"] == pytest.approx(0.25)
    assert metrics["std_scalar"] == pytest.approx(0.125)
    assert metrics["std/a"] == 0.25
    assert metrics["dead_scalar"] == 0.5 == metrics["dead/b"]
    assert metrics["corr/a/b"] == pytest.approx(-1)


def test_gdpo_gives_every_class_its_say():
    rewards = {"loud": [4.0, 0.0, 4.0, 0.0], "quiet": [0.0, 0.01, 0.01, 0.0]}
    alone = arlrr.normalise(rewards["quiet"])
    both = arlrr.gdpo([rewards])[0]
    assert statistics.fmean(both) == pytest.approx(0, abs=1e-12)
    assert statistics.pstdev(both) == pytest.approx(1, abs=1e-4)
    # quiet decides between equals ...
    assert both[2] > both[0] and both[1] > both[3]
    # ... and weighs as much as loud
    assert abs(both[0] - both[1]) < 1e-3 < abs(alone[0] - alone[1])
    assert arlrr.gdpo([{"a": [1.0, 1.0]}]) == [[0.0, 0.0]]
    assert arlrr.normalise([1.0, math.nan, 0.0])[1] == 0
    torch_way = grpo.advantages(torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64), "std")
    assert arlrr.normalise([1.0, 0.0, 0.5]) == pytest.approx(torch_way[0].tolist(), abs=1e-12)


# ---------------------------------------------------------------------- whose turn


class ScriptedLab:
    """In the place of arlrr.Lab: validation scores per trial are given, the calls are recorded."""

    def __init__(self, scores, method, verdicts=(1, 1, 0, 0)):
        self.scores = scores
        self.method = method
        self.verdicts = verdicts
        self.calls = []
        self.trial = ""

    def save(self):
        self.calls.append("save")
        return "start"

    def restore(self, state):
        self.calls.append(f"restore {state}")
        self.trial = ""

    def update(self):
        self.trial = self.method.active_class
        self.calls.append(self.trial)

    def validate(self):
        """After a trial of class c every prompt scores scores[c]; without a trial scores[""]."""
        self.calls.append("validate")
        groups = []
        for score in self.scores[self.trial]:
            groups.append(group(RAIN, "text"))
            groups[-1].rollouts[0].reward = score
            groups[-1].rollouts[0].verdicts = [Verdict(v) for v in self.verdicts]
        return groups

    def spent(self):
        return {"search_updates": len(self.calls)}


def turns(method, examples, lab, steps):
    """The class of each step."""
    taken = []
    for step in range(steps):
        method.before_step(step, examples, lab)
        taken.append(method.active_class)
        pool = method.pool(examples)
        assert pool
        for e in pool:
            assert taken[-1] in arlrr.meta_classes(e.rubric, method.config.class_by)
        method.after_step([])
    return taken


def test_cyclic_and_random_turns():
    examples = [RAIN, ICE, SNOW, RAIN]
    taken = turns(alternating(stage=2), examples, None, 6)
    assert taken == ["accuracy"] * 2 + ["completeness"] * 2 + ["accuracy"] * 2
    draws = []
    for seed in (0, 0, 1):
        draws.append(turns(alternating("random", stage=1, seed=seed), examples, None, 30))
    assert draws[0] == draws[1] != draws[2]
    assert {"accuracy", "completeness"} == set(draws[0])


def test_a_resumed_method_goes_on_in_its_stage():
    """The step alone says where a stage ends: the state is nothing but the history."""
    examples = [RAIN, ICE, SNOW]
    for schedule in ("cyclic", "random"):
        expected = turns(alternating(schedule, stage=3), examples, None, 12)
        for cut in range(1, 12):
            first, second = alternating(schedule, stage=3), alternating(schedule, stage=3)
            taken = turns(first, examples, None, cut)
            state = json.loads(json.dumps(first.state_dict()))
            assert list(state) == ["history"]
            second.load_state_dict(state)
            for step in range(cut, 12):
                second.before_step(step, examples)
                taken.append(second.active_class)
            assert taken == expected


def test_the_metrics_of_a_stage_come_once():
    method = alternating(stage=2)
    metrics = [method.before_step(step, [RAIN, ICE, SNOW]) for step in range(3)]
    assert metrics[0] == {"class": "accuracy", "stage": 1}
    assert metrics[1] == {"class": "accuracy"}
    assert metrics[2] == {"class": "completeness", "stage": 2}
    assert method.history[1] == {"step": 2, "class": "completeness"}


def test_the_lowest_score_goes_first_and_ties_to_the_one_that_waited():
    method = alternating("lowest_score", stage=1)
    lab = ScriptedLab({"": [0.5] * 4}, method, verdicts=(1, 0, 0, 0))
    assert turns(method, [RAIN], lab, 3) == ["completeness"] * 3
    assert method.history[0]["validation/accuracy"] == 1
    assert method.history[0]["validation/completeness"] == 0

    method = alternating("lowest_score", stage=1)
    lab = ScriptedLab({"": [0.5] * 4}, method, verdicts=(1, 1, 0, 0))
    assert turns(method, [RAIN], lab, 4) == ["accuracy", "completeness"] * 2


def test_search_takes_the_best_trial_and_calls_noise_a_tie():
    method = alternating("search", stage=1)
    scores = {"": [0.1] * 4, "accuracy": [0.2] * 4, "completeness": [0.4, 0.4, 0.5, 0.5]}
    lab = ScriptedLab(scores, method)
    assert turns(method, [RAIN, ICE], lab, 3) == ["completeness"] * 3
    first = method.history[0]
    assert first["trial/completeness"] == pytest.approx(0.35)
    assert first["trial/accuracy"] == pytest.approx(0.1)
    assert first["search_tied"] == 1

    # The state is saved after the first validation, so that every trial begins alike.
    trials = ["accuracy", "validate", "restore start", "completeness", "validate", "restore start"]
    assert lab.calls[:8] == ["validate", "save", *trials]

    # Means 0.5 and 0.525, and differences prompt by prompt that are much larger.
    noisy = {"": [0.1] * 4, "accuracy": [0.2, 0.9, 0.1, 0.8], "completeness": [0.9, 0.2, 0.8, 0.2]}
    method = alternating("search", stage=1)
    lab = ScriptedLab(noisy, method)
    assert turns(method, [RAIN, ICE], lab, 4) == ["accuracy", "completeness"] * 2
    assert method.history[0]["search_tied"] == 2


def test_a_search_in_which_nothing_could_be_judged_takes_turns():
    """The first class of the order won every time."""
    unjudged = {"a": [math.nan] * 3, "b": [math.nan] * 3}
    assert arlrr.within_one_se(unjudged, ["a", "b"]) == ["a", "b"]
    assert arlrr.within_one_se(unjudged | {"c": [math.nan, 0.1, 0.2]}, ["a", "b", "c"]) == ["c"]

    method = alternating("search", stage=1)
    scores = {"": [math.nan] * 2, "accuracy": [math.nan] * 2, "completeness": [math.nan] * 2}
    lab = ScriptedLab(scores, method)
    assert turns(method, [RAIN, ICE], lab, 4) == ["accuracy", "completeness"] * 2
    assert method.history[0]["search_tied"] == 2
    assert math.isnan(method.history[0]["trial/accuracy"])


def test_search_cannot_decline():
    """Every trial makes the score worse: the class that makes it worse by least has its turn."""
    method = alternating("search", stage=1)
    scores = {"": [0.5] * 4, "accuracy": [0.1] * 4, "completeness": [0.3] * 4}
    assert turns(method, [RAIN, ICE], ScriptedLab(scores, method), 1) == ["completeness"]
    assert method.history[0]["trial/completeness"] == pytest.approx(-0.2)


def test_a_search_that_breaks_off_leaves_the_state_from_before():
    method = alternating("search", stage=1)
    lab = ScriptedLab({"": [0.1], "accuracy": [0.2], "completeness": [0.3]}, method)
    turns(method, [RAIN], lab, 2)
    state = method.state_dict()
    active = method.active_class

    def breaks():
        raise KeyboardInterrupt

    lab.update = breaks
    with pytest.raises(KeyboardInterrupt):
        method.before_step(2, [RAIN], lab)
    assert method.state_dict() == state
    assert method.active_class == active
    assert lab.calls[-1] == "restore start"


def test_counting_classes_takes_one_pass():
    """5,000 prompts took minutes per stage when every class of every prompt counted them all."""
    examples = [RAIN, ICE, SNOW] * 1700
    started = time.process_time()
    assert arlrr.classes_by_frequency(examples) == ["accuracy", "completeness"]
    assert time.process_time() - started < 1


def test_a_tie_is_one_standard_error_not_one_deviation():
    scores = {"a": [0.5] * 4, "b": [0.5, 0.9, 0.5, 0.9]}
    assert arlrr.within_one_se(scores, ["a", "b"]) == ["b"]


def test_a_schedule_that_tries_things_out_needs_the_trainer():
    for schedule in ("search", "lowest_score"):
        with pytest.raises(DataError, match=f"--schedule {schedule} needs train.py"):
            alternating(schedule).before_step(0, [RAIN])


# ---------------------------------------------------------------------- what a stage judges


def rewards_of(group: Group) -> list[float]:
    return [rollout.reward for rollout in group.rollouts]


def test_a_stage_judges_its_class_only():
    method = alternating()
    method.before_step(0, [RAIN])
    judged = group(RAIN, "Clouds and warm air.", "Clouds on the moon, and cheese.", "No idea.", "")
    method.score([judged])
    assert rewards_of(judged) == [1.0, 0.5, 0.0, 0.0]
    for rollout in judged.rollouts:
        assert [c.text for c in rollout.criteria] == ["Mentions clouds.", "Mentions the moon."]
        assert len(rollout.verdicts) == 2
    assert method.after_step([judged]) == {"dead": 0.0}


def test_prompts_without_the_class_are_not_rolled_out():
    tone = example("tone", ("Mentions cheese.", -5, "tone"), ("Mentions wine.", 1, "accuracy"))
    method = alternating()
    method.before_step(0, [tone, SNOW])
    # A class of penalties only has no reward.
    assert set(arlrr.meta_classes(tone.rubric)) == {"accuracy"}
    assert method.active_class == "accuracy"
    assert method.pool([tone, SNOW, ICE]) == [tone, ICE]
    only_faults = example("faults", ("Mentions cheese.", -5, "tone"))
    assert method.can_learn_from(tone) and not method.can_learn_from(only_faults)


class SilentJudge(LexicalJudge):
    """Every verdict is missing."""

    def ask(self, questions, show_progress=False):
        return [Verdict(None) for _ in questions]


def test_class_rewards_are_clipped_where_advantages_are_not_divided():
    # Divided by the widest of the group, say: a fork's own kind.
    assert arlrr.clip_rewards([0.5, -6.0], "range") == [0.5, -6.0]
    harsh = example("harsh", ("Mentions clouds.", 1, "accuracy"), ("Mentions cheese.", -6, "accuracy"))
    for advantage, expected in (("std", -6), ("mean", -1), ("none", -1)):
        method = alternating(advantage=advantage)
        method.before_step(0, [harsh])
        for kind in (method, AxisMean(LexicalJudge(), settings("axis_mean", advantage=advantage))):
            judged = group(harsh, "Cheese.")
            kind.score([judged])
            assert rewards_of(judged) == [expected]


@pytest.mark.parametrize("advantage", ["std", "mean", "none"])
@pytest.mark.parametrize("kind", [ARLRR, AxisMean, GDPO])
def test_what_was_not_judged_is_not_scored(kind, advantage):
    """min(1.0, nan) would be 1.0: the best reward for an answer that nobody judged."""
    method = kind(SilentJudge(), settings(kind.__name__.lower(), advantage=advantage))
    method.before_step(0, [RAIN])
    judged = group(RAIN, "Clouds.", "Air.")
    method.score([judged])
    assert all(math.isnan(reward) for reward in rewards_of(judged))
    method.set_advantages([judged])
    assert all(rollout.advantage == 0 for rollout in judged.rollouts)
    metrics = method.after_step([judged])
    assert "std_scalar" not in metrics and math.isnan(metrics["dead"])


class PraisingJudge(LexicalJudge):
    """Praises silence for what it avoids, as a model may; the judge that counts words does not."""

    def ask(self, questions, show_progress=False):
        verdicts = super().ask(questions)
        for number, question in enumerate(questions):
            if question.statement.startswith("Avoids") and not question.response.strip():
                verdicts[number] = Verdict(1.0)
        return verdicts


def test_silence_is_not_a_way_out_in_turns():
    safe = example("safe", ("Avoids recommending cheese.", 3, "accuracy"))
    method = alternating(judge=PraisingJudge())
    method.before_step(0, [safe])
    judged = group(safe, "", "Bread.")
    method.score([judged])
    assert [r.verdicts[0].score for r in judged.rollouts] == [1.0, 1.0]
    assert rewards_of(judged) == [0.0, 1.0]


def test_silence_gets_the_lowest_reward_where_that_is_negative():
    method = alternating()
    faults = example("faults", ("Mentions clouds.", 1, "accuracy"), ("Mentions cheese.", -2, "accuracy"))
    method.before_step(0, [faults])
    judged = group(faults, "", "Cheese.", "Clouds.")
    method.score([judged])
    assert rewards_of(judged) == [-2.0, -2.0, 1.0]


@pytest.mark.parametrize("kind", [ARLRR, AxisMean, GDPO])
def test_a_group_that_is_silent_throughout_teaches_nothing(kind):
    method = kind(LexicalJudge(), settings(kind.__name__.lower()))
    method.before_step(0, [RAIN])
    judged = [group(RAIN, "", " "), group(RAIN, "Clouds and warm air.", "No idea.")]
    method.score(judged)
    assert rewards_of(judged[0]) == [0.0, 0.0]
    method.set_advantages(judged)
    assert [rollout.advantage for rollout in judged[0].rollouts] == [0, 0]
    assert judged[1].rollouts[0].advantage > 0 > judged[1].rollouts[1].advantage
    assert method.after_step(judged)["dead"] == 0.5


def test_silence_is_not_a_way_out_for_gdpo_either():
    """Its advantages come from the verdicts: what silence is praised for must not count there."""
    safe = example(
        "safe",
        ("Avoids recommending cheese.", 3, "accuracy"),
        ("Mentions clouds.", 2, "completeness"),
    )
    method = GDPO(PraisingJudge(), settings("gdpo"))
    judged = group(safe, "", "Eat cheese, recommending cheese.", "Clouds.")
    method.score([judged])
    [row] = method.advantages([judged])
    assert [v.score for v in judged.rollouts[0].verdicts] == [1.0, 0.0]
    assert row[0] == pytest.approx(row[1])
    assert row[2] > 1


def test_the_methods_to_compare_with_use_all_classes():
    texts = ("Clouds and warm air.", "Clouds on the moon, and cheese.", "Warm air.")
    scored = {}
    for name, kind in (("points", rar.RubricReward), ("axis_mean", AxisMean), ("gdpo", GDPO)):
        method = kind(LexicalJudge(), settings(name))
        assert method.before_step(0, [RAIN]) == {}
        assert method.pool([RAIN, SNOW]) == [RAIN, SNOW]
        groups = [group(RAIN, *texts), group(SNOW, "Crystals.", "Sand.", "Crystals.")]
        method.score(groups)
        method.set_advantages(groups)
        scored[name] = groups
    assert rewards_of(scored["points"][0]) == [1.0, (4 - 2 - 5) / 7, 3 / 7]
    assert rewards_of(scored["axis_mean"][0]) == [1.0, 0.25, 0.5] == rewards_of(scored["gdpo"][0])

    # GDPO normalises over the batch, the others within a group.
    flat = []
    for _, rollouts in scored["gdpo"]:
        flat.extend(rollout.advantage for rollout in rollouts)
    assert statistics.fmean(flat) == pytest.approx(0, abs=1e-9)
    assert statistics.pstdev(flat) == pytest.approx(1, abs=1e-3)
    for _, rollouts in scored["axis_mean"]:
        advantages = [rollout.advantage for rollout in rollouts]
        assert statistics.fmean(advantages) == pytest.approx(0, abs=1e-6)


def test_axis_mean_measures_the_contraction():
    method = AxisMean(LexicalJudge(), settings("axis_mean"))
    judged = group(RAIN, "Clouds and warm air.", "Clouds on the moon, and cheese.", "Warm air.")
    method.score([judged])
    metrics = method.after_step([judged])
    expected = {"dead", "var_ratio", "std_scalar", "dead_scalar", "std/accuracy", "std/completeness"}
    assert set(metrics) >= {*expected, "corr/accuracy/completeness"}
    # Verdicts by axis: accuracy 1, 0.5, 0; completeness 1, 0, 1.
    assert metrics["std/accuracy"] == pytest.approx(statistics.pstdev([1, 0.5, 0]))
    assert metrics["dead"] == 0


def test_dead_is_the_share_of_groups_without_spread():
    groups = []
    for rewards in ((1.0, 1.0), (0.0, 1.0), (0.5, 0.5)):
        groups.append(group(RAIN, "x", "y"))
        for rollout, reward in zip(groups[-1].rollouts, rewards):
            rollout.reward = reward
    assert alternating().after_step(groups)["dead"] == pytest.approx(2 / 3)


def test_classes_from_any_tag(shared):
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    assert set(arlrr.classes_by_frequency(examples, "level")) == {"cluster", "example"}
    method = alternating(class_by="level", stage=1)
    assert sorted(turns(method, examples, None, 2)) == ["cluster", "example"]
    built_in = rar.read_examples(ROOT / "data" / "train.jsonl")
    assert "Essential" in arlrr.classes_by_frequency(built_in, "category")
    needed = "--class_by axes: two classes with a positive criterion are needed"
    with pytest.raises(DataError, match=f'{needed}, the data have only "other"; use axis'):
        arlrr.check_classes(examples, "axes")


def test_one_class_is_none():
    """Every turn would be the same, whatever the schedule."""
    arlrr.check_classes([RAIN], "axis")
    arlrr.check_classes([ICE, SNOW], "axis")
    # One class in all criteria, and a second class that has penalties only.
    for examples in ([SNOW], [ICE]):
        with pytest.raises(DataError, match="two classes with a positive criterion are needed"):
            arlrr.check_classes(examples, "axis")

    # The only class that is named has penalties only: what is left is "other".
    rubric = [Criterion("States A.", 3), Criterion("Mentions B.", -2, axis="tone")]
    with pytest.raises(DataError, match='the data have only "other"'):
        arlrr.check_classes([Example("one", [], rubric)], "axis")
    with pytest.raises(DataError, match="the data have none"):
        arlrr.check_classes([Example("one", [], rubric[1:])], "axis")


def test_pitfalls_are_a_category_that_is_never_trained():
    """The score by which a search chooses counts them nevertheless."""
    rubric = [Criterion("States A.", 4, category="Essential")]
    rubric += [Criterion("Mentions B.", -2, category="Pitfall")]
    assert arlrr.meta_classes(rubric, "category") == {"Essential": [0]}
    assert rar.points_reward(rubric, [1, 1]) == 0.5


def test_the_subclasses_override_only_where_their_papers_differ():
    hooks = {"needs_rest", "before_step", "pool", "rubric_for", "questions", "aggregate", "advantages"}
    hooks |= {"after_step", "state_dict", "load_state_dict"}
    overridden = {name for name in vars(ARLRR) if not name.startswith("_")}
    assert overridden - {"can_learn_from"} == hooks - {"questions", "advantages"}
    assert {name for name in vars(GDPO) if not name.startswith("_")} == {"advantages"}
    assert issubclass(ARLRR, rar.RubricReward) and issubclass(AxisMean, rar.RubricReward)


# ---------------------------------------------------------------------- a search leaves no trace


def test_a_look_at_the_validation_prompts_is_counted():
    judged = group(RAIN, "Clouds.")
    judged.rollouts[0].verdicts = [Verdict(1.0)] * 4
    lab = arlrr.Lab(None, None, None, lambda: [judged] * 3, None)
    lab.validate()
    assert [lab.spent()[f"search_{key}"] for key in arlrr.COSTS] == [0, 3, 12, 3]
    assert lab.at(1).spent()["search_rollouts"] == 0


def everything(policy, optimizer):
    """Every parameter, moment and random state, as bytes."""
    tensors = dict(policy.model.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{number} {key}"] = value
    values = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    values["torch"] = torch.get_rng_state().numpy().tobytes()
    values["python"] = random.getstate()
    return values


@pytest.mark.parametrize("trained", [0, 2])
def test_a_trial_is_taken_back_bit_by_bit(tiny, forms, trained):
    config = train.Config(
        method="arlrr", group_size=4, max_new_tokens=24, prompts_per_step=2, lr=0.01
    )
    policy = train.Policy(str(tiny))
    method = train.make_method(config, LexicalJudge())
    examples = rar.read_examples(forms)[:6]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    reference = grpo.freeze(policy.model)
    session = train.Run(
        config, policy, reference, optimizer, method, examples[:4], [], examples[4:]
    )
    lab = train.make_lab(session)
    method.active_class = "communication_quality"
    for step in range(trained):
        lab.at(step).update()

    before = everything(policy, optimizer)
    start = lab.save()
    for _ in range(2):  # a snapshot can be used again
        lab.update()
        random.random(), torch.rand(1)
        changed = everything(policy, optimizer)
        name = "model.embed_tokens.weight"
        assert changed[name] != before[name]
        assert changed["torch"] != before["torch"]
        lab.restore(start)
        assert everything(policy, optimizer) == before

    method.active_class = ""
    metrics = method.before_step(trained, examples[:4], lab.at(trained))
    assert everything(policy, optimizer) == before
    assert metrics["search_updates"] == 2
    assert metrics["search_rollouts"] == 2 * 8 + 3 * 2
    assert metrics["search_verdicts"] > 0
    assert len([key for key in metrics if key.startswith("trial/")]) == 2
    assert len(method.history) == 1


def test_a_trial_is_the_first_update_of_the_stage(tiny, forms):
    """What the search tried, from the same state, with the same batch and random numbers."""
    config = train.Config(
        method="arlrr", group_size=4, max_new_tokens=24, prompts_per_step=2, lr=0.01
    )
    policy = train.Policy(str(tiny))
    method = train.make_method(config, LexicalJudge())
    examples = rar.read_examples(forms)[:6]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    session = train.Run(
        config, policy, grpo.freeze(policy.model), optimizer, method, examples[:4], [], examples[4:]
    )
    lab = train.make_lab(session)
    after_trial = {}
    update = lab.update

    def recorded():
        update()
        after_trial[method.active_class] = everything(policy, optimizer)

    lab.update = recorded
    method.before_step(0, examples[:4], lab.at(0))
    train.train_step(session, 0)
    assert everything(policy, optimizer) == after_trial[method.active_class]


FLAGS = "--method arlrr --stage 2 --validation 3 --prompts 6 --steps 5 --lr 0.01 --max_new_tokens 24 --judge lexical"
ALTERNATING = FLAGS.split()


def killed(monkeypatch, when):
    """Makes train.train_step raise at the call number `when`."""
    original = train.train_step
    calls = []

    def counts(*args, **more):
        calls.append(args)
        if len(calls) == when:
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr(train, "train_step", counts)


def comparable(folder):
    """The method's state in a checkpoint, without what a clock says."""
    state = torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)["method"]
    history = []
    for stage in state["history"]:
        history.append({key: value for key, value in stage.items() if "seconds" not in key})
    return json.dumps(history, default=str)


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "when", "at"),
    [("cyclic", 4, 3), ("search", 6, 2), ("search", 9, 4), ("lowest_score", 2, 1)],
)
def test_killed_inside_a_stage_or_a_trial_it_is_the_same_run(
    tiny, few, forms, tmp_path, monkeypatch, schedule, when, at
):
    """A search's first stage is two trials and two steps: calls 5 and 6 are the next trials."""
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    flags = [*ALTERNATING, "--data", forms, "--schedule", schedule]
    assert run(tiny, few, whole, *flags) == 0
    with monkeypatch.context() as patch:
        killed(patch, when)
        assert run(tiny, few, cut, *flags) == 130
    assert lines(cut / "metrics.jsonl")[-1]["step"] == at
    assert train.main(["--resume", str(cut)]) == 0
    assert lines(whole / "metrics.jsonl") == lines(cut / "metrics.jsonl")
    assert lines(whole / "samples.jsonl") == lines(cut / "samples.jsonl")
    weights = "checkpoint/model.safetensors"
    assert (whole / weights).read_bytes() == (cut / weights).read_bytes()
    assert comparable(whole) == comparable(cut)


def test_a_search_costs_trials_and_the_metrics_count_them(tiny, few, forms, tmp_path):
    flags = [*ALTERNATING, "--data", forms, "--schedule", "search"]
    assert run(tiny, few, tmp_path / "run", *flags) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [row.get("search_updates", 0) for row in rows] == [2, 0, 2, 0, 2]
    assert [row.get("stage") for row in rows] == [1, None, 2, None, 3]
    for row in rows:
        assert row["class"] in rar.AXES
        assert row["rollouts"] == 6 and row["verdicts"] > 0


@pytest.mark.parametrize("method", ["arlrr", "axis_mean", "gdpo"])
def test_every_method_trains(tiny, few, forms, tmp_path, method):
    flags = [*ALTERNATING, "--data", forms, "--schedule", "random", "--method", method]
    assert run(tiny, few, tmp_path / "run", *flags) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert any(row["dead"] < 1 for row in rows)
    assert all(0 <= row["dead"] <= 1 for row in rows)
    assert all(("std_scalar" in row) == (method != "arlrr") for row in rows)
    advantages = []
    for row in lines(tmp_path / "run" / "samples.jsonl"):
        if row["split"] == "train":
            advantages.append(row["advantage"])
    assert sum(map(bool, advantages)) > 5
    assert sum(advantages) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--validation", "100"], "--validation 100: only"),
        (["--schedule", "sometimes"], "--schedule"),
        (["--class_by", "axes"], "--class_by axes: two classes with a positive criterion are needed"),
        (["--stage", "0"], "--stage 0: give at least 1"),
    ],
)
def test_bad_settings_cost_one_line(tiny, few, tmp_path, capsys, flags, words):
    assert run(tiny, few, tmp_path / "run", "--method", "arlrr", *flags) == 2
    printed = capsys.readouterr().err.strip()
    assert words in printed and "\n" not in printed


# ---------------------------------------------------------------------- the evidence


@pytest.fixture
def evidence():
    """tests/evidence/reproduce_arlrr.py as a module."""
    path = ROOT / "tests" / "evidence" / "reproduce_arlrr.py"
    specification = importlib.util.spec_from_file_location("reproduce_arlrr", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_structure_of_the_real_rows(shared, evidence):
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    table = {row["class"]: row for row in evidence.structure(examples)}
    # Measured on 500 other rows of the benchmark; 200 rows may differ by a few points.
    measured = {
        "completeness": (0.392, 0.83, 5.5),
        "accuracy": (0.322, 0.86, 4.4),
        "context_awareness": (0.15, 0.63, 2.7),
        "communication_quality": (0.092, 0.5, 1.9),
        "instruction_following": (0.045, 0.23, 2.0),
    }
    for axis, (share, prompts, items) in measured.items():
        assert table[axis]["share"] == pytest.approx(share, abs=0.02)
        assert table[axis]["prompts"] == pytest.approx(prompts, abs=0.05)
        assert table[axis]["items_per_prompt"] == pytest.approx(items, abs=0.3)
    assert sum(row["share"] for row in table.values()) == pytest.approx(1)
    levels = {row["class"] for row in evidence.structure(examples, "level")}
    assert levels == {"cluster", "example"}


def test_structure_by_hand(evidence):
    table = {row["class"]: row for row in evidence.structure([RAIN, ICE])}
    row = table["accuracy"]  # RAIN 2 of 4 criteria, ICE 1 of 2
    assert (row["items_per_prompt"], row["one_item"], row["verdicts"]) == (1.5, 0.5, 0.5)
    assert row["negative"] == pytest.approx(1 / 3)
    assert row["weight"] == pytest.approx((4 / 7 + 1) / 2)
    assert table["tone"]["prompts"] == 0


def test_structure_on_the_command_line(evidence, capsys, tmp_path):
    assert evidence.main(["--structure", str(ROOT / "data" / "train.jsonl")]) == 0
    assert "instruction_following" in capsys.readouterr().out
    assert evidence.main(["--structure", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_search_that_declines_does_nothing_and_searches_again(evidence, monkeypatch):
    gains = iter([{"trial/a": -0.2, "trial/b": -0.1}, {"trial/a": -0.2, "trial/b": 0.1}])
    searched = []

    def search(method, order, lab):
        # A trial is an ordinary update, whatever the last stage was.
        groups = [Group(RAIN, [SimpleNamespace(text="x", reward=r) for r in (0.0, 1.0)])]
        searched.append(method.advantages(groups))
        return "accuracy", next(gains)

    monkeypatch.setitem(arlrr.SCHEDULES, "search", search)
    method = evidence.DecliningARLRR(None, settings(schedule="search"))
    groups = [Group(RAIN, [SimpleNamespace(text="x", reward=r) for r in (0.0, 1.0)])]
    assert method.before_step(0, [RAIN, ICE], object())["declined"] == 1
    assert method.advantages(groups) == [[0, 0]]
    # Searched again after one step, not after five; then the stage lasts.
    assert method.before_step(1, [RAIN, ICE], object())["declined"] == 0
    assert method.advantages(groups) == [[-1, 1]]
    assert method.before_step(2, [RAIN, ICE], object())["declined"] == 0
    assert searched == [[[-1, 1]], [[-1, 1]]]


def test_flipped_verdicts_are_the_share_asked_for_and_always_the_same(evidence, tmp_path):
    [example, *_] = rar.read_examples(evidence.five_classes.write(tmp_path)[0])
    exact = rar.criterion_questions
    flipped = evidence.flipped_questions(exact, 0.2, seed=0)
    wrong = 0
    for number in range(200):
        response = f"1. Water it {number} times.\n2. Keep it warm. Good luck!"
        truth = exact(example, response, example.rubric)
        told = flipped(example, response, example.rubric)
        assert told == flipped(example, response, example.rubric)
        wrong += sum(a.score != b.score for a, b in zip(truth, told))
    assert wrong / (200 * 25) == pytest.approx(0.2, abs=0.02)


def test_the_five_classes_weigh_alike_and_have_checks_only(evidence, tmp_path):
    examples = rar.read_examples(evidence.five_classes.write(tmp_path)[0])
    assert len(examples) == 16
    for example in examples:
        assert set(arlrr.class_weights(example.rubric).values()) == {0.2}
        assert all(criterion.check for criterion in example.rubric)


@pytest.mark.long
def test_the_evidence_is_made_from_real_runs(evidence, tiny, tmp_path, monkeypatch, capsys):
    flags = f"--model {tiny} --judge lexical --prompts 3 --prompts_per_step 1 "
    flags += "--group_size 3 --max_new_tokens 12 --validation 2 --eval_every 1 --save_every 1"
    monkeypatch.setattr(evidence, "FLAGS", flags)
    monkeypatch.setattr(evidence, "STEPS", 2)
    picture = tmp_path / "picture.png"
    names = ["scalar", "search, may decline", "scalar, flip 20 %", "cyclic 1, flip 20 %"]
    arms = ["--arms", *names, "--seeds", "0", "--png", str(picture)]
    assert evidence.main(["--out", str(tmp_path / "runs"), *arms]) == 0
    printed = capsys.readouterr().out
    assert "| search, may decline | 1 | " in printed and "std of structure" in printed
    for cost in ("updates", "verdicts", "rollouts"):
        assert f"equal {cost}" in printed
    assert "p-values corrected for 2 arms" in printed
    assert "Stages by class: search, may decline" in printed and picture.stat().st_size > 1000
    # Finished runs are not run again.
    assert evidence.main(["--out", str(tmp_path / "runs"), *arms]) == 0
    assert "seed 0: done" not in capsys.readouterr().out
