"""The laboratory of the ARL-RR arms: its rewards are those of the six files, its figures follow the arithmetic."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import arlrr
import grpo
import rar

sys.path.append(str(ROOT / "tests" / "evidence"))
import laboratory
from laboratory import ARMS, HEALTHBENCH, THRESHOLDS, World


def a_judged_group(world, seed=0):
    """(rubric, verdicts [P, G, K, m]) of one batch in this world."""
    rng = torch.Generator().manual_seed(seed)
    shape = (1, laboratory.PROMPTS, laboratory.ROLLOUTS, laboratory.coordinates(world))
    answers = torch.randn(shape, generator=rng)
    verdicts = laboratory.judged(world, answers, torch.zeros(world.classes), rng)
    return laboratory.one_of_each_class(world).rubric, verdicts


def test_rewards_and_advantages_are_those_of_the_six_files():
    world = World(points=HEALTHBENCH, flips=0.1)
    rubric, verdicts = a_judged_group(world)
    rewards = verdicts.mean(-1)
    matrices = verdicts[0].flatten(2).tolist()

    scalar = [[rar.points_reward(rubric, row) for row in matrix] for matrix in matrices]
    expected = grpo.advantages(torch.tensor(scalar), "std")
    made = laboratory.arm_advantages(world, ARMS["scalar"], rewards, ["all"])[0]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)

    by_class = [arlrr.class_rewards(rubric, matrix) for matrix in matrices]
    made = laboratory.arm_advantages(world, ARMS["gdpo"], rewards, ["all"])[0]
    torch.testing.assert_close(made, torch.tensor(arlrr.gdpo(by_class)), atol=1e-4, rtol=0)

    expected = grpo.advantages(torch.tensor([arlrr.mean_over_classes(r) for r in by_class]), "std")
    made = laboratory.arm_advantages(world, ARMS["axis_mean"], rewards, ["all"])[0]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)

    expected = grpo.advantages(torch.tensor([r["class 2"] for r in by_class]), "std")
    made = laboratory.arm_advantages(world, ARMS["cyclic, stage 1"], rewards, ["class 2"])[0]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_the_world_is_as_described():
    for classes, correlation in ((2, -0.9), (5, -0.2), (5, 0.6)):
        world = World(classes=classes, correlation=correlation)
        vectors = laboratory.directions(world)
        cosines = vectors @ vectors.T
        assert torch.allclose(cosines.diagonal(), torch.ones(classes), atol=1e-5)
        off = cosines[~torch.eye(classes, dtype=torch.bool)]
        assert torch.allclose(off, torch.full_like(off, correlation), atol=1e-5)

    # The true score is what sampled answers meet: by counting half a million verdicts.
    world = World(correlation=0.3)
    theta = torch.zeros(1, laboratory.coordinates(world))
    theta[0, 0] = 1.5
    rng = torch.Generator().manual_seed(0)
    answers = theta + torch.randn((20_000, theta.shape[1]), generator=rng)
    ease = torch.randn((20_000, world.classes), generator=rng) * laboratory.EASE_STD
    counted = laboratory.judged(world, answers, ease, rng).mean().item()
    assert laboratory.true_scores(world, theta).item() == pytest.approx(counted, abs=0.004)
    # Drift costs the language, and no verdict.
    theta[0, -1] = math.sqrt(laboratory.LANGUAGE)
    assert laboratory.true_scores(world, theta).item() == pytest.approx(counted / math.e, abs=0.004)

    # Both kinds of noise turn that share of the verdicts, on average over the answers.
    for noisy in (replace(world, flips=0.2), replace(world, liking=0.2)):
        ease = torch.zeros(world.classes)
        exact = laboratory.judged(replace(noisy, flips=0.0, liking=0.0), answers, ease, rng)
        verdicts = laboratory.judged(noisy, answers, ease, rng)
        assert (verdicts != exact).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_the_arithmetic():
    """With independent classes sqrt(K) with the division, 1 without it, a K-th of the verdicts."""
    for classes in (2, 5):
        plain = World(classes=classes, optimiser="sgd")
        assert laboratory.predicted_ratio(plain) == pytest.approx(math.sqrt(classes), rel=0.05)
        for advantage, predicted in (("std", math.sqrt(classes)), ("mean", 1.0)):
            world = replace(plain, advantage=advantage)
            ratio, error = laboratory.measured_ratio(world, classes, 1e-3, runs=400)
            assert ratio == pytest.approx(predicted, abs=max(3 * error, 0.07 * predicted))

        scalar = laboratory.simulate(plain, ARMS["scalar"], 0.1, 3, 2)
        turns = laboratory.simulate(plain, ARMS["cyclic, stage 1"], 0.1, 3, 2)
        assert scalar.verdicts[-1].tolist() == [classes * paid for paid in turns.verdicts[-1].tolist()]
        assert scalar.rollouts[-1].tolist() == turns.rollouts[-1].tolist() == [3 * 32] * 2


def test_a_search_costs_what_it_tries_and_changes_nothing_else():
    """The first update after a search is its winner's trial: taken back and done again, bit for bit."""
    world = World(classes=3)
    batch = laboratory.Batch(world, ARMS["search, stage 5"], 0.1, 4, 0)
    before = batch.theta.detach().clone()
    choice = laboratory.choose_classes(batch, 0)
    assert torch.equal(batch.theta, before)
    per_update = laboratory.PROMPTS * laboratory.ROLLOUTS
    assert choice.rollouts.tolist() == [3 * per_update + 4 * laboratory.VALIDATION] * 4
    paid = len(THRESHOLDS) * (3 * per_update + 4 * laboratory.VALIDATION * 3)
    assert choice.verdicts.tolist() == [paid] * 4

    assert batch.update(choice.active) == per_update * len(THRESHOLDS)
    again = laboratory.Batch(world, ARMS["cyclic, stage 1"], 0.1, 4, 0)
    again.update(choice.active)
    assert torch.equal(batch.theta, again.theta)
    # A schedule looks only where a stage begins.
    next_choice = laboratory.choose_classes(batch, 1)
    assert next_choice.active == choice.active and next_choice.verdicts.sum() == 0


def test_what_has_declined_does_not_move_and_searches_again():
    world = World(classes=3)
    batch = laboratory.Batch(world, ARMS["search, may decline"], 0.1, 2, 0)
    # Every trial of the first run made things worse; in the second one class 2 helped.
    start = torch.ones(2, laboratory.VALIDATION, 3, len(THRESHOLDS))
    worse = start.clone()
    worse[:, :, 0] = 0.0
    mixed = worse.clone()
    mixed[1] = start[1]
    start[1, :, 1] = 0.0
    looks = []
    batch.look = lambda: looks.pop(0)
    # Moments from before, by which Adam would move without a gradient.
    batch.update(["class 0", "class 0"])
    for step in range(2):
        looks[:] = [start, worse, worse, mixed]
        choice = laboratory.choose_classes(batch, step)
        assert choice.declined == [True, False] and choice.active[1] == "class 2"
        # The second run is in its stage by then, and pays for no search.
        assert (choice.verdicts > 0).tolist() == [True, step == 0]
        before = batch.moving_parts()
        batch.update(choice.active, choice.declined)
        for old, new in zip(before, batch.moving_parts(), strict=True):
            assert torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])


def test_the_budgets():
    scores = torch.tensor([[0.0, 0.0], [0.1, 0.2], [0.3, 0.4]])
    paid = torch.tensor([[0, 0], [5, 6], [10, 12]])
    curve = laboratory.Curve(scores, paid, paid)
    assert curve.at_budget(curve.verdicts, 10).tolist() == pytest.approx([0.3, 0.2])
    assert curve.at_updates(1).tolist() == pytest.approx([0.1, 0.2])


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(laboratory, "UPDATES", 2)
    monkeypatch.setattr(laboratory, "RATES", {"adam": (0.1,), "sgd": (0.1,)})
    small = {"classes": {"2": (World(classes=2), ARMS["cyclic, stage 1"])}}
    monkeypatch.setattr(laboratory, "map_panels", lambda: small)
    picture = tmp_path / "map.png"
    assert laboratory.main(["--part", "map", "--runs", "2", "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "| updates | classes | 2 |" in printed and "| verdicts | classes | 2 |" in printed
    assert picture.stat().st_size > 10_000


def test_the_schedules_are_those_of_the_method():
    """The schedules are arlrr.py's own: what before_step says is what is trained."""
    world = World(classes=3)
    batch = laboratory.Batch(world, ARMS["lowest_score, stage 5"], 0.1, 2, 0)
    look = torch.ones(2, laboratory.VALIDATION, 3, len(THRESHOLDS))
    look[0, :, 1] = 0.0
    look[1, :, 2] = 0.5
    batch.look = lambda: look
    assert laboratory.choose_classes(batch, 0).active == ["class 1", "class 2"]
    assert isinstance(batch.methods[0], arlrr.ARLRR)
    assert batch.methods[0].config == SimpleNamespace(
        method="arlrr", schedule="lowest_score", stage=5, class_by="axis", advantage="std", seed=0
    )
