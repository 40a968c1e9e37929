"""arlrr.py: class rewards on real rubrics, whose turn it is, and a search that leaves no trace."""

import itertools
import json
import math
import random
import statistics

import pytest
import torch
from conftest import ROOT
from test_train import lines, run

import arlrr
import grpo
import rar
import rler
import train
from arlrr import ARLRR, Settings
from judge import OfflineJudge, Verdict
from rar import Criterion, Example


def example(name: str, *rubric: tuple[str, float, str]) -> Example:
    return Example(name, [{"role": "user", "content": f"What is {name}?"}], [Criterion(text, w, axis=axis) for text, w, axis in rubric])


def rollouts(*texts):
    return [grpo.Rollout([1], [2], [0.0], "stop", text) for text in texts]


RAIN = example("rain", ("Mentions clouds.", 4, "accuracy"), ("Mentions warm air.", 3, "completeness"),
               ("Mentions the moon.", -2, "accuracy"), ("Mentions cheese.", -5, "tone"))  # fmt: skip
ICE = example("ice", ("Mentions water.", 2, "accuracy"), ("Mentions cheese.", -5, "tone"))
SNOW = example("snow", ("Mentions crystals.", 2, "completeness"))


# ------------------------------------------------------------------------------------------- rewards


def plainly(criteria, scores):
    """r_k said in the simplest way: what was earned, over what could be earned."""
    earned, possible = 0.0, 0.0
    for criterion, score in zip(criteria, scores):
        earned += criterion.weight * score
        if criterion.weight > 0:
            possible += criterion.weight
    return earned / possible if possible else None


def test_class_rewards_and_the_identity_on_all_real_rubrics(shared):
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    rng, remainders = random.Random(0), 0
    assert len(examples) == 200
    for e in examples:
        scores = [float(rng.random() < 0.4) for _ in e.rubric]
        rewards, weights = arlrr.vector(e.rubric, [scores]), arlrr.shares(e.rubric)
        assert set(rewards) == set(weights) == set(rar.axis_scores(e.rubric, scores))
        assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
        parts = {axis: [(c, s) for c, s in zip(e.rubric, scores) if c.axis == axis] for axis in {c.axis for c in e.rubric}}
        for axis, part in parts.items():
            expected = plainly(*zip(*part))
            assert (axis in rewards) == (expected is not None)
            if expected is not None:
                assert rewards[axis] == [pytest.approx(expected, abs=1e-12)]
        total = sum(c.weight for c in e.rubric if c.weight > 0)
        remainder = sum(c.weight * s for axis, part in parts.items() if axis not in rewards for c, s in part) / total
        remainders += remainder != 0
        assert rar.points_reward(e.rubric, scores) == pytest.approx(sum(weights[k] * r for k, [r] in rewards.items()) + remainder, abs=1e-12)
        penalties = arlrr.vector(e.rubric, [scores], negative_only="penalty")
        assert set(penalties) == set(parts) and all(-1 <= r <= 0 for k, [r] in penalties.items() if k not in rewards)
    assert remainders > 20  # the identity's last term is not always 0


def test_contraction_holds_on_real_rubrics_without_a_penalty_only_class(shared):
    examples = [e for e in rar.read_examples(shared("healthbench_200.jsonl")) if set(arlrr.shares(e.rubric)) == {c.axis for c in e.rubric}]
    rng = random.Random(1)
    assert len(examples) > 100
    for e in examples:
        matrix = [[float(rng.random() < 0.5) for _ in e.rubric] for _ in range(8)]
        rewards, weights = arlrr.vector(e.rubric, matrix), arlrr.shares(e.rubric)
        total, parts = arlrr.contraction([weights[k] for k in rewards], list(rewards.values()))
        assert total == pytest.approx(statistics.pvariance([rar.points_reward(e.rubric, row) for row in matrix]), abs=1e-12)
        assert total <= parts + 1e-12


def test_the_theorem_is_measured_as_predicted(capsys):
    rows = arlrr.demonstrate(groups=400)
    assert len(rows) == 4
    for rho, measured, low, high, predicted, follows, _ in rows:
        assert predicted == pytest.approx(0.2 + 0.8 * rho) and measured == pytest.approx(predicted, abs=0.03) and low <= measured <= high
        assert follows <= 1 + 1e-12
    assert "predicted" in capsys.readouterr().out


def test_spreads_by_hand():
    rubric = [Criterion("", 1, axis="a"), Criterion("", 3, axis="b")]
    found = arlrr.spreads([(rubric, [[1, 0], [0, 1]]), (rubric, [[1, 1], [1, 1]]), (rubric, [[1, None], [0, 0]])])
    # First group: R = 0.25, 0.75 (variance 1/16), r_a and r_b have variance 1/4 each and are opposite. Second: all alike.
    assert found["var_ratio"] == pytest.approx(0.25) and found["std_scalar"] == pytest.approx(0.125)
    assert found["std/a"] == 0.25 and found["dead_scalar"] == 0.5 == found["dead/b"] and found["corr/a/b"] == pytest.approx(-1)


def test_gdpo_hears_every_class():
    rewards = {"loud": [4.0, 0.0, 4.0, 0.0], "quiet": [0.0, 0.01, 0.01, 0.0]}
    alone, both = arlrr.normalised(rewards["quiet"]), arlrr.gdpo([rewards])[0]
    assert statistics.fmean(both) == pytest.approx(0, abs=1e-12) and statistics.pstdev(both) == pytest.approx(1, abs=1e-4)
    assert both[2] > both[0] and both[1] > both[3]  # quiet decides between equals ...
    assert abs(both[0] - both[1]) < 1e-3 < abs(alone[0] - alone[1])  # ... and weighs as much as loud
    assert arlrr.gdpo([{"a": [1.0, 1.0]}]) == [[0.0, 0.0]]
    assert arlrr.normalised([1.0, math.nan, 0.0])[1] == 0
    torch_way = grpo.advantages(torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64))[0].tolist()
    assert arlrr.normalised([1.0, 0.0, 0.5]) == pytest.approx(torch_way, abs=1e-12)


# ------------------------------------------------------------------------------------------- whose turn


class Script:
    """Stands for arlrr.Lab: validation scores per class and per trial are given, and what is asked of it is recorded."""

    def __init__(self, scores, method):
        self.scores, self.method, self.asked = scores, method, []

    def save(self):
        self.asked.append("save")
        return "start"

    def restore(self, state):
        self.asked.append(f"restore {state}")

    def update(self, ahead):
        self.asked.append(f"{self.method.turns.active} {ahead}")

    def validate(self):
        """After a trial of class k every prompt scores scores[k]; without a trial scores[""]."""
        trial = self.method.turns.active if self.method.trying else ""
        groups = []
        for score in self.scores[trial]:
            rollout = grpo.Rollout([1], [2], [0.0], "stop", "text", reward=score)
            rollout.verdicts = [rar.Verdict(s, "") for s in self.scores.get("verdicts", [1, 1, 0, 0])]
            groups.append((RAIN, [rollout]))
        return groups

    def spent(self):
        return {"search_updates": len(self.asked)}


def turns(method, examples, lab, steps):
    """The class of each step."""
    taken = []
    for step in range(steps):
        method.before_step(examples, lab)
        taken.append(method.turns.active)
        pool, visit = method.pool(examples, step)
        assert pool and all(taken[-1] in method.places(e) for e in pool)
        assert visit == taken[:-1].count(taken[-1])  # each class has its own place in the data
        method.after_step([])
    return taken


def test_cyclic_and_random_turns():
    examples = [RAIN, ICE, SNOW, RAIN]
    method = ARLRR(OfflineJudge(), Settings("cyclic", stage=2))
    assert turns(method, examples, None, 6) == ["accuracy"] * 2 + ["completeness"] * 2 + ["accuracy"] * 2
    draws = [turns(ARLRR(OfflineJudge(), Settings("random", stage=1, seed=seed)), examples, None, 30) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and {"accuracy", "completeness"} == set(draws[0])


def test_lengths_of_a_stage():
    examples = [RAIN, ICE, SNOW, RAIN, RAIN]
    assert ARLRR(OfflineJudge(), Settings("cyclic", stage_by="epoch", prompts_per_step=2)).length("accuracy", ["accuracy"], examples) == 2
    weighted = ARLRR(OfflineJudge(), Settings("cyclic", stage=10, stage_by="weight"))
    order = ["accuracy", "completeness"]  # mean shares: (3 * 4/7 + 1) / 5 and (3 * 3/7 + 1) / 5
    assert [weighted.length(k, order, examples) for k in order] == [11, 9]
    assert weighted.length("nobody has it", order, examples) == 1


def test_the_lowest_score_goes_first_and_ties_to_the_one_that_waited():
    method = ARLRR(OfflineJudge(), Settings("lowest_score", stage=1))
    lab = Script({"": [0.5] * 4, "verdicts": [1, 0, 0, 0]}, method)  # accuracy 1, completeness 0
    assert turns(method, [RAIN], lab, 3) == ["completeness"] * 3
    assert method.turns.history[0]["validation/accuracy"] == 1 and method.turns.history[0]["validation/completeness"] == 0
    method = ARLRR(OfflineJudge(), Settings("lowest_score", stage=1))
    lab = Script({"": [0.5] * 4, "verdicts": [1, 1, 0, 0]}, method)
    assert turns(method, [RAIN], lab, 4) == ["accuracy", "completeness"] * 2


def test_search_takes_the_best_trial_and_calls_noise_a_tie():
    method = ARLRR(OfflineJudge(), Settings("search", stage=1, trial=2))
    lab = Script({"": [0.1] * 4, "accuracy": [0.2] * 4, "completeness": [0.4, 0.4, 0.5, 0.5]}, method)
    assert turns(method, [RAIN, ICE], lab, 3) == ["completeness"] * 3
    first = method.turns.history[0]
    assert first["trial/completeness"] == pytest.approx(0.35) and first["trial/accuracy"] == pytest.approx(0.1)
    accuracy, completeness = ["accuracy 0", "accuracy 1", "restore start"], ["completeness 0", "completeness 1", "restore start"]
    assert lab.asked[:7] == ["save", *accuracy, *completeness]
    noisy = {"": [0.1] * 4, "accuracy": [0.2, 0.9, 0.1, 0.8], "completeness": [0.9, 0.2, 0.8, 0.2]}  # 0.5 and 0.525
    method = ARLRR(OfflineJudge(), Settings("search", stage=1))
    assert turns(method, [RAIN, ICE], Script(noisy, method), 4) == ["accuracy", "completeness"] * 2


def test_a_search_that_breaks_off_leaves_the_state_from_before():
    method = ARLRR(OfflineJudge(), Settings("search", stage=1))
    lab = Script({"": [0.1], "accuracy": [0.2], "completeness": [0.3]}, method)
    turns(method, [RAIN], lab, 2)
    before = method.state_dict()

    def breaks(ahead):
        raise KeyboardInterrupt

    lab.update = breaks
    with pytest.raises(KeyboardInterrupt):
        method.before_step([RAIN], lab)
    assert method.state_dict() == before and lab.asked[-1] == "restore start" and not method.trying


# ------------------------------------------------------------------------------------------- what a stage judges


def test_a_stage_judges_its_class_only_and_an_audit_changes_no_reward():
    texts = ("Clouds and warm air.", "Clouds on the moon, and cheese.", "No idea.", "")
    plain, audited = ARLRR(OfflineJudge(), Settings("cyclic", audit=0)), ARLRR(OfflineJudge(), Settings("cyclic", audit=1))
    found = []
    for method in (plain, audited):
        method.before_step([RAIN], None)
        groups = [(RAIN, rollouts(*texts))]
        method.score(groups)
        found.append(groups[0][1])
    assert [r.reward for r in found[0]] == [r.reward for r in found[1]] == [1.0, 0.5, 0.0, 0.0]
    assert [len(r.verdicts) for r in found[0]] == [2] * 4 and [len(r.verdicts) for r in found[1]] == [4] * 4
    assert [c.text for c in found[1][0].criteria] == ["Mentions clouds.", "Mentions the moon.", "Mentions warm air.", "Mentions cheese."]
    quiet, metrics = plain.after_step([(RAIN, found[0])]), audited.after_step([(RAIN, found[1])])
    assert quiet["audit_verdicts"] == 0 and "var_ratio" not in quiet and metrics["audit_verdicts"] == 2 * 4
    assert set(metrics) >= {"var_ratio", "std_scalar", "std/accuracy", "std/completeness", "corr/accuracy/completeness", "dead", "dead_scalar"}


def test_the_audit_takes_its_share():
    method, taken = ARLRR(OfflineJudge(), Settings("cyclic", audit=0.25)), []
    for _ in range(400):
        taken += [method.is_audited(RAIN), method.is_audited(ICE)]
        method.turns.step += 1
    assert 0.2 < statistics.fmean(taken) < 0.3 and taken[0::2] != taken[1::2]
    method.trying = True
    assert not any(method.is_audited(e) for e in (RAIN, ICE, SNOW))  # a trial measures nothing
    assert not any(ARLRR(OfflineJudge(), Settings("cyclic", audit=0)).is_audited(e) for e in (RAIN, ICE, SNOW))


def test_prompts_without_the_class_are_not_rolled_out():
    tone = example("tone", ("Mentions cheese.", -5, "tone"), ("Mentions wine.", 1, "accuracy"))
    skip, penalty = (ARLRR(OfflineJudge(), Settings("cyclic", negative_only=kind)) for kind in ("skip", "penalty"))
    for method, expected in ((skip, {"accuracy"}), (penalty, {"accuracy", "tone"})):
        method.before_step([tone, SNOW], None)
        assert set(method.places(tone)) == expected
    penalty.turns.active = "tone"
    assert penalty.pool([tone, SNOW, ICE], 0)[0] == [tone, ICE]
    groups = [(tone, rollouts("Cheese.", "Bread."))]
    penalty.score(groups)
    assert [r.reward for r in groups[0][1]] == [-1.0, 0.0]


def test_clipping_and_missing_verdicts():
    harsh = example("harsh", ("Mentions clouds.", 1, "accuracy"), ("Mentions cheese.", -6, "accuracy"))
    for clip, expected in ((False, -6), (True, -1)):
        method = ARLRR(OfflineJudge(), Settings("cyclic", advantage="mean" if clip else "std"))
        method.before_step([harsh], None)
        groups = [(harsh, rollouts("Cheese."))]
        method.score(groups)
        assert groups[0][1][0].reward == expected

    class Silent(OfflineJudge):
        def ask(self, questions, progress=False):
            return [v._replace(score=None) for v in super().ask(questions, progress)]

    for schedule, advantage in itertools.product(("cyclic", *arlrr.SCALARS), ("std", "mean", "none")):
        method = ARLRR(Silent(), Settings(schedule, audit=1, advantage=advantage))
        method.before_step([RAIN], None)
        groups = [(RAIN, rollouts("Clouds.", "Air."))]
        method.score(groups)
        assert all(math.isnan(r.reward) and r.advantage == 0 for r in groups[0][1])
        assert "std_scalar" not in method.after_step(groups)


def test_silence_is_not_a_way_out_for_gdpo_either():
    """Its advantages come from the verdicts: an empty response that a judge praises for what it avoids gains nothing."""
    safe = example("safe", ("Avoids recommending cheese.", 3, "accuracy"), ("Mentions clouds.", 2, "completeness"))
    method = ARLRR(OfflineJudge(), Settings("gdpo"))
    groups = [(safe, rollouts("", "Eat cheese, recommending cheese.", "Clouds."))]
    method.score(groups)
    [row] = method.advantages(groups)
    assert [v.score for v in groups[0][1][0].verdicts] == [1.0, 0.0] and row[0] == pytest.approx(row[1]) and row[2] > 1


def test_a_schedule_that_tries_things_out_needs_the_trainer():
    for schedule in ("search", "lowest_score"):
        with pytest.raises(rar.DataError, match=f"--schedule {schedule} needs train.py"):
            ARLRR(OfflineJudge(), Settings(schedule)).before_step([RAIN], None)


def test_scalars_are_the_known_ones():
    texts = ("Clouds and warm air.", "Clouds on the moon, and cheese.", "Warm air.")
    scored = {}
    for schedule in arlrr.SCALARS:
        method = ARLRR(OfflineJudge(), Settings(schedule))
        assert method.before_step([RAIN], None) == {"class": "all"} and method.pool([RAIN, SNOW], 7) == ([RAIN, SNOW], 7)
        groups = [(RAIN, rollouts(*texts)), (SNOW, rollouts("Crystals.", "Sand.", "Crystals."))]
        method.score(groups)
        scored[schedule] = groups
    reference = [(RAIN, rollouts(*texts))]
    rar.RubricReward(OfflineJudge(), "points").score(reference)
    assert [r.reward for r in scored["points"][0][1]] == [r.reward for r in reference[0][1]] == [1.0, (4 - 2 - 5) / 7, 3 / 7]
    assert [r.reward for r in scored["axis_mean"][0][1]] == [1.0, 0.25, 0.5]
    flat = [a for row in ARLRR(OfflineJudge(), Settings("gdpo")).advantages(scored["gdpo"]) for a in row]
    assert statistics.fmean(flat) == pytest.approx(0, abs=1e-9) and statistics.pstdev(flat) == pytest.approx(1, abs=1e-3)
    assert all(r.advantage == 0 for r in scored["points"][0][1])  # grpo.advantages' job there


def test_structure_of_the_real_rows(shared):
    table = {row["class"]: row for row in arlrr.structure(rar.read_examples(shared("healthbench_200.jsonl")))}
    # Measured on 500 other rows of the benchmark; 200 rows may differ by a few points.
    for axis, share, prompts, items in (("completeness", 0.392, 0.83, 5.5), ("accuracy", 0.322, 0.86, 4.4), ("context_awareness", 0.15, 0.63, 2.7),
                                        ("communication_quality", 0.092, 0.5, 1.9), ("instruction_following", 0.045, 0.23, 2.0)):  # fmt: skip
        assert table[axis]["share"] == pytest.approx(share, abs=0.02) and table[axis]["prompts"] == pytest.approx(prompts, abs=0.05)
        assert table[axis]["items_a_prompt"] == pytest.approx(items, abs=0.3)
    assert sum(row["share"] for row in table.values()) == pytest.approx(1)


def test_classes_from_any_tag(shared):
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    table = {row["class"]: row for row in arlrr.structure(examples, "level")}
    assert set(table) == {"cluster", "example"}
    method = ARLRR(OfflineJudge(), Settings("cyclic", classes="level", stage=1))
    assert sorted(turns(method, examples, None, 2)) == ["cluster", "example"]
    assert {row["class"] for row in arlrr.structure(rar.read_examples(ROOT / "data" / "train.jsonl"), "category")} >= {"Essential", "Pitfall"}


def test_the_command_line(capsys, tmp_path):
    assert arlrr.main(["--structure", str(ROOT / "data" / "train.jsonl")]) == 0
    assert "instruction_following" in capsys.readouterr().out
    assert arlrr.main(["--structure", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- a search leaves no trace


def everything(policy, optimizer):
    """Every parameter, moment and random state, as bytes."""
    tensors = [*policy.model.state_dict().items()]
    for number, state in optimizer.state_dict()["state"].items():
        tensors += [(f"{number} {key}", value) for key, value in state.items()]
    plain = {name: tensor.numpy().tobytes() for name, tensor in tensors}
    return plain | {"torch": torch.get_rng_state().numpy().tobytes(), "python": random.getstate()}


@pytest.mark.parametrize("trained", [0, 2])
def test_a_trial_is_taken_back_bit_by_bit(tiny, forms, trained):
    config, _ = train.parse_config(["--method", "arlrr", "--group_size", "4", "--max_new_tokens", "24", "--prompts_per_step", "2", "--lr", "0.01"])
    policy, method = train.Policy(str(tiny)), train.make_method(config, OfflineJudge())
    examples = rar.read_examples(forms)[:6]
    for e in examples:
        e.tokens = grpo.encode(policy.tokenizer, e.prompt)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01)
    lab = train.lab_of(train.Session(config, policy, None, optimizer, method, examples[:4], [], examples[4:])).at(0)
    method.turns.active = "communication_quality"
    for ahead in range(trained):
        lab.update(ahead)
    before, start = everything(policy, optimizer), lab.save()
    for _ in range(2):  # a snapshot can be used again
        lab.update(0)
        random.random(), torch.rand(1)
        changed = everything(policy, optimizer)
        assert changed["model.embed_tokens.weight"] != before["model.embed_tokens.weight"] and changed["torch"] != before["torch"]
        lab.restore(start)
        assert everything(policy, optimizer) == before
    method.turns.active = ""
    state = method.state_dict()
    metrics = method.before_step(examples[:4], lab.at(0))
    assert everything(policy, optimizer) == before
    assert metrics["search_updates"] == 2 and metrics["search_rollouts"] == 2 * 8 + 3 * 2 and metrics["search_verdicts"] > 0
    assert method.turns.updates == state["updates"] == {} and len([k for k in metrics if k.startswith("trial/")]) == 2


ALTERNATING = "--method arlrr --stage 2 --validation 3 --prompts 6 --steps 5 --lr 0.01 --max_new_tokens 24".split()


def killed(monkeypatch, when):
    """Makes train.one_step raise at the call number `when`."""
    original, calls = train.one_step, []

    def counts(*args):
        calls.append(args[-1])
        if len(calls) == when:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "one_step", counts)


@pytest.mark.parametrize(("schedule", "when", "at"), [("cyclic", 4, 3), ("search", 6, 2), ("search", 9, 4), ("lowest_score", 2, 1)])
def test_killed_inside_a_stage_or_a_trial_it_is_the_same_run(tiny, few, forms, tmp_path, monkeypatch, schedule, when, at):
    """A search's first stage is two trials and two steps: calls 5 and 6 are the next trials, 9 and 10 those after."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tiny, few, whole, *ALTERNATING, "--data", forms, "--schedule", schedule) == 0
    with monkeypatch.context() as patch:
        killed(patch, when)
        assert run(tiny, few, cut, *ALTERNATING, "--data", forms, "--schedule", schedule) == 130
    assert lines(cut / "metrics.jsonl")[-1]["step"] == at
    assert train.main(["--resume", str(cut)]) == 0
    assert lines(whole / "metrics.jsonl") == lines(cut / "metrics.jsonl")
    assert lines(whole / "samples.jsonl") == lines(cut / "samples.jsonl")
    assert (whole / "checkpoint" / "model.safetensors").read_bytes() == (cut / "checkpoint" / "model.safetensors").read_bytes()
    states = [torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)["method"] for folder in (whole, cut)]
    same = lambda state: json.dumps(state, default=str).replace("NaN", "null")
    strip = lambda state: {**state, "history": [{k: v for k, v in row.items() if "seconds" not in k} for row in state["history"]]}
    assert same(strip(states[0])) == same(strip(states[1]))


def test_a_search_costs_trials_and_the_metrics_count_them(tiny, few, forms, tmp_path):
    assert run(tiny, few, tmp_path / "run", *ALTERNATING, "--data", forms, "--schedule", "search") == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [row.get("search_updates", 0) for row in rows] == [2, 0, 2, 0, 2]
    assert all(row["class"] in rar.AXES and row["rollouts"] == 6 and row["verdicts"] > 0 for row in rows)
    assert [row.get("stage") for row in rows] == [1, None, 2, None, 3]


@pytest.mark.parametrize("schedule", ["random", "points", "axis_mean", "gdpo"])
def test_every_schedule_trains(tiny, few, forms, tmp_path, schedule):
    assert run(tiny, few, tmp_path / "run", *ALTERNATING, "--data", forms, "--schedule", schedule, "--stage_by", "epoch", "--audit", "1") == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert any(row["dead"] < 1 for row in rows) and all(0 <= row["dead"] <= 1 and "std_scalar" in row for row in rows)
    advantages = [row["advantage"] for row in lines(tmp_path / "run" / "samples.jsonl") if row["split"] == "train"]
    assert sum(map(bool, advantages)) > 5 and sum(advantages) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--audit", "2"], "--audit 2.0: give a share from 0 to 1"),
        (["--validation", "100"], "--validation 100: only"),
        (["--schedule", "sometimes"], "--schedule"),
        (["--classes", "axes"], "--classes axes: no criterion has one"),
        (["--stage", "0"], "--stage 0: give at least 1"),
    ],
)
def test_bad_settings_cost_one_line(tiny, few, tmp_path, capsys, flags, words):
    assert run(tiny, few, tmp_path / "run", "--method", "arlrr", *flags) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_the_three_methods_have_one_interface():
    public = lambda kind: {name for name in vars(kind) if not name.startswith("_")}
    shared = {"of_step", "eligible", "before_step", "pool", "score", "after_step", "state_dict", "load_state_dict"}
    assert public(rar.RubricReward) == shared <= public(rler.RLER) & public(ARLRR)


def test_a_tie_is_one_standard_error_not_one_deviation():
    assert arlrr.contenders({"a": [0.5] * 4, "b": [0.5, 0.9, 0.5, 0.9]}, ["a", "b"]) == ["b"]


def test_dead_is_the_share_of_groups_without_spread():
    groups = [(RAIN, rollouts("x", "y")) for _ in range(3)]
    for (_, group), rewards in zip(groups, ((1.0, 1.0), (0.0, 1.0), (0.5, 0.5))):
        for r, r.reward in zip(group, rewards):
            pass
    assert ARLRR(OfflineJudge(), Settings("cyclic")).after_step(groups)["dead"] == pytest.approx(2 / 3)


def test_structure_by_hand():
    table = {row["class"]: row for row in arlrr.structure([RAIN, ICE])}
    row = table["accuracy"]  # RAIN 2 of 4 criteria, ICE 1 of 2
    assert (row["items_a_prompt"], row["one_item"], row["verdicts"], row["negative"]) == (1.5, 0.5, 0.5, pytest.approx(1 / 3))
    assert row["weight"] == pytest.approx((4 / 7 + 1) / 2) and table["tone"]["prompts"] == 0


def test_a_look_at_the_validation_prompts_is_counted():
    group = rollouts("Clouds.")
    group[0].verdicts = [Verdict(1.0)] * 4
    lab = arlrr.Lab(None, None, None, lambda: [(RAIN, group)] * 3)
    lab.validate()
    assert [lab.spent()[f"search_{key}"] for key in arlrr.COSTS] == [0, 3, 12, 3]


def test_silence_is_not_a_way_out_in_turns_either():
    safe = example("safe", ("Avoids recommending cheese.", 3, "accuracy"))
    method = ARLRR(OfflineJudge(), Settings("cyclic"))
    method.before_step([safe], None)
    groups = [(safe, rollouts("", "Bread."))]
    method.score(groups)
    assert [r.reward for r in groups[0][1]] == [0.0, 1.0]
