"""Where turns win and where they lose: ARL-RR's arms on a tiny policy, simulated, many times.

A training run of a language model takes minutes and answers one question about one setting. Here a
policy is one row of a table and a run takes milliseconds, so that every arm can be tried over the
number of classes, their correlation, the judge's noise, the advantage and the length of a stage.
What comes out is arithmetic about the reward, not about language: everything is made up but the
rules, which are those of arlrr.py and grpo.py themselves.

The model world, all of it:

  policy     an answer is a vector a = theta + noise (std 1); theta is the row of the table. The
             greedy answer is theta. Starts at 0.
  class c    a direction u_c in that space; all pairs of directions have the cosine `correlation`.
             Negative: what is good for one class is bad for the others.
  criterion  m per class: met when u_c a + b > tau, with thresholds tau at 0, 1, 2, 3, and b how
             easy the prompt is for the class (std 0.5, drawn for each prompt).
  judge      a share of the verdicts is flipped. `flips` does so independently of all else;
             `liking` replaces that share (twice over) by whether the answer has a habit that no
             criterion asks for, a direction of its own: length, say. All classes share it.
  language   24 more coordinates that no criterion asks for. Updates move them by chance alone;
             theta there costs the language, as too large a rate does in a real run.
  score      the share of all criteria that the policy's answers truly meet, weighted by the points
             of their class, times what is left of the language, exp(-|theta there|^2 / 24):
             computed exactly, not sampled.

One update is 4 prompts x 8 rollouts and one step of the optimiser along the policy gradient
(grpo.py's loss at ratio 1). An arm is compared with the scalar reward after as many updates, after
as many verdicts, and after as many rollouts; trials and validation of a schedule are counted.
Learning rates are tried in a grid: "same rate" is the one that is best for the scalar reward,
"own rate" the one that is best for the arm.

    python tests/evidence/laboratory.py                                  # all tables
    python tests/evidence/laboratory.py --png tests/evidence/laboratory.png
    python tests/evidence/laboratory.py --part arithmetic                # or arms, noise, map
"""

import argparse
import math
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from intervals import holm, t_interval
from reproduce_arlrr import DecliningARLRR

import arlrr
import grpo
from judge import LexicalJudge, Verdict
from rar import Criterion, Example, Group, points_reward

PROMPTS = 4  # per update
ROLLOUTS = 8  # per prompt
VALIDATION = 12  # prompts that a schedule may look at
THRESHOLDS = (0.0, 1.0, 2.0, 3.0)  # one criterion each
EASE_STD = 0.5  # of a prompt, for each class
UPDATES = 40  # of the scalar arm: its budget is everybody's
RATES = {"adam": (0.02, 0.04, 0.08, 0.16, 0.32), "sgd": (0.1, 0.2, 0.4, 0.8, 1.6)}
LANGUAGE = 24  # coordinates that no criterion asks for
# A plain step is as long as the advantages, which are a few times shorter without the division.
PLAIN_FACTOR = {"std": 1.0, "mean": 4.0}
# The points of HealthBench's axes, in parts of all.
HEALTHBENCH = (0.40, 0.31, 0.15, 0.09, 0.05)


@dataclass(frozen=True)
class World:
    """One setting of the model world; see the module's docstring."""

    classes: int = 5
    correlation: float = 0.0
    flips: float = 0.0
    liking: float = 0.0
    points: tuple[float, ...] = ()  # per class, summing to one; empty: all alike
    advantage: str = "std"
    optimiser: str = "adam"

    @property
    def weights(self) -> torch.Tensor:
        """The share of each class in all points [K]."""
        # Unequal points are what the scalar follows and axis_mean does not.
        if self.points:
            return torch.tensor(self.points)
        return torch.full((self.classes,), 1 / self.classes)


class Arm(NamedTuple):
    """How an arm makes a reward of the classes: by turns, or all at once."""

    schedule: str = ""  # of arlrr.SCHEDULES; "": all classes in every update
    stage: int = 1
    reward: str = "points"  # all at once: points, axis_mean or gdpo
    may_decline: bool = False


ARMS = {
    "scalar": Arm(),
    "axis_mean": Arm(reward="axis_mean"),
    "gdpo": Arm(reward="gdpo"),
    "cyclic, stage 1": Arm("cyclic", 1),
    "cyclic, stage 5": Arm("cyclic", 5),
    "random, stage 5": Arm("random", 5),
    "lowest_score, stage 5": Arm("lowest_score", 5),
    "search, stage 5": Arm("search", 5),
    "search, may decline": Arm("search", 5, may_decline=True),
}


class Curve(NamedTuple):
    """What several runs did, update by update: each [updates + 1, runs]."""

    scores: torch.Tensor  # true scores
    verdicts: torch.Tensor  # paid until then, trials and validation included
    rollouts: torch.Tensor

    def at_updates(self, updates: int) -> torch.Tensor:
        """The scores [runs] after so many updates."""
        return self.scores[updates]

    def at_budget(self, paid: torch.Tensor, budget: int) -> torch.Tensor:
        """The scores [runs] after the last update that the budget still pays for.

        paid: `verdicts` or `rollouts`.
        """
        # Paid amounts only grow, so counting those within the budget finds the last one.
        last = (paid <= budget).sum(0) - 1
        return self.scores.gather(0, last[None])[0]


# ------------------------------------------------------------------------- the model world


def coordinates(world: World) -> int:
    """D: those of the classes, the habit, the language."""
    return world.classes + 1 + LANGUAGE


def directions(world: World) -> torch.Tensor:
    """The classes' directions [K, D]: unit vectors, every pair with the same cosine.

    The D coordinates: K for the classes, one for the habit that the judge may like, and those of
    the language. No class asks for the last ones.
    """
    # By symmetry one number says how all classes get on with each other.
    k = world.classes
    cosines = torch.full((k, k), world.correlation)
    cosines.fill_diagonal_(1.0)
    # The rows of a Cholesky factor are vectors that have these cosines.
    vectors = torch.zeros(k, coordinates(world))
    vectors[:, :k] = torch.linalg.cholesky(cosines.double()).float()
    return vectors


def true_scores(world: World, theta: torch.Tensor) -> torch.Tensor:
    """The expected share of points [runs] that sampled answers truly meet, times the language.

    theta: [runs, D].
    """
    # How far the policy has come along each class, before the noise of an answer.
    quality = theta @ directions(world).T
    # The answer's noise and the prompt's ease are both normal, so the chance has a closed form.
    spread = math.sqrt(1 + EASE_STD**2)
    margins = (quality.unsqueeze(-1) - torch.tensor(THRESHOLDS)) / spread
    chances = torch.special.ndtr(margins)
    # Unseen by every judge, as lost language often is.
    drift = theta[:, world.classes + 1 :].square().mean(-1)
    return (chances.mean(-1) @ world.weights) * torch.exp(-drift)


def judged(
    world: World, answers: torch.Tensor, ease: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """The judge's verdicts [..., K, m] on answers [..., D]; ease: [..., K]."""
    # A prompt may be easy for one class and hard for another, as rubrics are.
    quality = answers @ directions(world).T + ease
    verdicts = (quality.unsqueeze(-1) > torch.tensor(THRESHOLDS)).float()

    # Flipped, whatever the answer is.
    if world.flips > 0:
        is_flipped = torch.rand(verdicts.shape, generator=rng) < world.flips
        verdicts = torch.where(is_flipped, 1 - verdicts, verdicts)

    # Replaced by what the judge likes in an answer: wrong half of the time, as with the flips.
    if world.liking > 0:
        is_replaced = torch.rand(verdicts.shape, generator=rng) < 2 * world.liking
        has_habit = (answers[..., world.classes] > 0).float()
        verdicts = torch.where(is_replaced, has_habit[..., None, None], verdicts)
    return verdicts


# ------------------------------------------------------------------------- rewards and updates


def group_advantages(world: World, rewards: torch.Tensor) -> torch.Tensor:
    """grpo.advantages of rewards [runs, P, G], group by group."""
    # A group of any run is a row: groups know nothing of each other.
    flat = rewards.reshape(-1, rewards.shape[-1])
    return grpo.advantages(flat, world.advantage).reshape(rewards.shape)


def gdpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """arlrr.gdpo, for many runs at once: class rewards [runs, P, G, K] -> [runs, P, G]."""
    # Each class in its group, then the sums over the run's batch: twice the same division.
    by_class = rewards.movedim(-1, 2)
    normalised = grpo.advantages(by_class.reshape(-1, rewards.shape[2]), "std")
    sums = normalised.reshape(by_class.shape).sum(2)
    batch = grpo.advantages(sums.reshape(len(sums), -1), "std")
    return batch.reshape(sums.shape)


def arm_advantages(
    world: World, arm: Arm, rewards: torch.Tensor, active: list[str]
) -> torch.Tensor:
    """Advantages [runs, P, G] of class rewards [runs, P, G, K]; active: each run's class."""
    # GDPO has advantages of its own; all other arms differ in the reward alone.
    if not arm.schedule and arm.reward == "gdpo":
        return gdpo_advantages(rewards)
    if not arm.schedule and arm.reward == "axis_mean":
        return group_advantages(world, rewards.mean(-1))

    # What each run adds up: all points, or its class alone.
    rows = {}
    for c, name in enumerate(class_names(world)):
        rows[name] = torch.eye(world.classes)[c]
    weights = torch.stack([rows.get(name, world.weights) for name in active])
    return group_advantages(world, torch.einsum("rpgk,rk->rpg", rewards, weights))


class Batch:
    """Several runs of one arm in one world: their weights, optimiser and schedules."""

    def __init__(self, world: World, arm: Arm, rate: float, runs: int, seed: int):
        self.world = world
        self.arm = arm
        self.runs = runs
        self.rng = torch.Generator().manual_seed(seed)
        # Validation draws its own numbers: an update is the same with and without a look at it.
        self.look_rng = torch.Generator().manual_seed(seed + 1)
        self.look_ease = self.draw((runs, VALIDATION, world.classes), self.look_rng) * EASE_STD

        self.theta = torch.zeros(runs, coordinates(world), requires_grad=True)
        if world.optimiser == "adam":
            # As in train.py.
            options = {"betas": (0.9, 0.95), "weight_decay": 0.0}
            self.optimiser = torch.optim.AdamW([self.theta], lr=rate, **options)
        else:
            # GDPO divides whatever the setting says.
            if arm.reward != "gdpo":
                rate *= PLAIN_FACTOR[world.advantage]
            self.optimiser = torch.optim.SGD([self.theta], lr=rate)

        # One schedule per run, each with its own history and its own lots; but the fixed order is
        # the same in all runs.
        self.example = one_of_each_class(world)
        self.methods = []
        if arm.schedule == "cyclic":
            self.methods = [make_schedule(world, arm, seed)]
        elif arm.schedule:
            for run in range(runs):
                self.methods.append(make_schedule(world, arm, seed * runs + run))

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=rng)

    def update(self, active: list[str], declined: list[bool] | None = None) -> int:
        """One update of every run by its active class. Returns the verdicts paid per run.

        declined: runs that roll out and judge, and then do not move.
        """
        world = self.world
        # All draws of an update come from one generator: a trial is repeated by its state.
        shape = (self.runs, PROMPTS, ROLLOUTS, coordinates(world))
        noise = self.draw(shape, self.rng)
        ease = self.draw((self.runs, PROMPTS, 1, world.classes), self.rng) * EASE_STD
        answers = self.theta.detach()[:, None, None] + noise

        # Turns pay for one class only; the others are judged here as well and thrown away, so
        # that all arms see the same random numbers.
        rewards = judged(world, answers, ease, self.rng).mean(-1)
        advantages = arm_advantages(world, self.arm, rewards, active)

        # grpo.py's loss at ratio 1 is -A log p; of a normal policy the gradient is -A noise.
        gradient = -(advantages.unsqueeze(-1) * noise).mean((1, 2))
        still = torch.tensor(declined or [False])
        before = self.moving_parts() if still.any() else []
        self.theta.grad = gradient
        self.optimiser.step()

        # Without a gradient Adam would still move by its moments: what has declined is put back.
        if before:
            with torch.no_grad():
                for part, old in zip(self.moving_parts(copy=False), before, strict=True):
                    part[still] = old[still]

        # A turn asks about one class: this is all that it saves.
        n_judged = 1 if self.arm.schedule else world.classes
        return PROMPTS * ROLLOUTS * n_judged * len(THRESHOLDS)

    def moving_parts(self, copy: bool = True) -> list[torch.Tensor]:
        """Weights and moments, each [runs, D]."""
        # Adam keeps two moments per coordinate, plain steps none.
        parts = [self.theta.detach()]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = self.optimiser.state[self.theta].get(name)
            # Before the first step there is none: it begins at 0.
            if moment is None:
                moment = torch.zeros_like(parts[0])
            parts.append(moment)
        if copy:
            parts = [part.clone() for part in parts]
        return parts

    def look(self) -> torch.Tensor:
        """The judge's verdicts [runs, V, K, m] on the greedy answers to the validation prompts."""
        # The same prompts at every look, so that trials can be compared prompt by prompt.
        greedy = self.theta.detach()[:, None].expand(-1, VALIDATION, -1)
        return judged(self.world, greedy, self.look_ease, self.look_rng)

    def save(self) -> tuple:
        """What an update changes."""
        # The optimiser changes its tensors in place: only a copy is a state.
        state = deepcopy(self.optimiser.state_dict())
        return self.theta.detach().clone(), state, self.rng.get_state()

    def restore(self, saved: tuple) -> None:
        """Takes updates back."""
        theta, state, numbers = saved
        # The copy is copied again, because the next trial is taken back to it as well.
        with torch.no_grad():
            self.theta.copy_(theta)
        self.optimiser.load_state_dict(deepcopy(state))
        self.rng.set_state(numbers)


# ------------------------------------------------------------------------- the schedules


def class_names(world: World) -> list[str]:
    """The classes' names, in the order that arlrr.py breaks ties by."""
    return [f"class {c}" for c in range(world.classes)]


def one_of_each_class(world: World) -> Example:
    """A prompt whose rubric has all classes, with as many points as the world gives them."""
    # Weights of one class are alike: what a class is worth is spread over its criteria.
    rubric = []
    for name, weight in zip(class_names(world), world.weights.tolist()):
        for _ in THRESHOLDS:
            rubric.append(Criterion(name, weight, axis=name))
    return Example("prompt", [{"role": "user", "content": "?"}], rubric)


def make_schedule(world: World, arm: Arm, seed: int) -> arlrr.ARLRR:
    """The method of arlrr.py itself: here only its turns are used."""
    # The settings of train.py that a schedule reads.
    config = SimpleNamespace(
        method="arlrr",
        schedule=arm.schedule,
        stage=arm.stage,
        class_by="axis",
        advantage=world.advantage,
        seed=seed,
    )
    if arm.may_decline:
        return DecliningARLRR(LexicalJudge(), config)
    return arlrr.ARLRR(LexicalJudge(), config)


class Replay:
    """The lab of one run for arlrr.py's schedules: its trials were made before, for all runs."""

    def __init__(self, example: Example, looks: list[torch.Tensor]):
        self.example = example
        self.looks = looks  # [V, K, m] each: before any trial, then after each class's trial

    def validate(self) -> list[Group]:
        """The next look: one greedy answer per validation prompt, judged by the full rubric."""
        groups = []
        # Each look is used once, in the order in which the schedule asks for them.
        for scores in self.looks.pop(0).flatten(1).tolist():
            rollout = SimpleNamespace(text="greedy", reward=0.0, verdicts=[])
            rollout.verdicts = [Verdict(score) for score in scores]
            rollout.reward = points_reward(self.example.rubric, scores)
            groups.append(Group(self.example, [rollout]))
        return groups

    def save(self) -> None:
        """Nothing: Batch.restore has taken every trial back."""

    def restore(self, state: None) -> None:
        """Nothing."""

    def update(self) -> None:
        """Nothing: the trial is in the next look."""

    def spent(self) -> dict:
        """Nothing: `choose_classes` counts for all runs."""
        return {}


class Choice(NamedTuple):
    """What the schedules of all runs have chosen before an update: one entry per run."""

    active: list[str]  # the class
    declined: list[bool]  # no class is worth an update
    verdicts: torch.Tensor  # paid for the choice
    rollouts: torch.Tensor


def begins_stage(method: arlrr.ARLRR, step: int) -> bool:
    """Whether the method chooses before this step; what has declined chooses again."""
    return method.needs_rest(step) or getattr(method, "has_declined", False)


def choose_classes(batch: Batch, step: int) -> Choice:
    """Every run's choice before an update: that of before_step in arlrr.py."""
    # All classes at once have nothing to choose.
    arm = batch.arm
    none = torch.zeros(batch.runs, dtype=torch.long)
    if not arm.schedule:
        return Choice(["all"] * batch.runs, [False] * batch.runs, none, none)
    world = batch.world
    examples = [batch.example]

    # What the schedules may look at: where a run stands, and one trial per class. Made for all
    # runs as soon as one of them chooses; those that do not choose neither see nor pay it.
    choosing = [begins_stage(method, step) for method in batch.methods]
    looks = []
    n_trials = 0
    if any(choosing) and arm.schedule in ("search", "lowest_score"):
        looks.append(batch.look())
    if any(choosing) and arm.schedule == "search":
        saved = batch.save()
        for name in arlrr.classes_by_frequency(examples):
            batch.update([name] * batch.runs)
            looks.append(batch.look())
            batch.restore(saved)
            n_trials += 1

    active = []
    declined = []
    for run, method in enumerate(batch.methods):
        # Each run sees its own row of every look, and nothing of the others.
        lab = Replay(batch.example, [look[run] for look in looks])
        method.before_step(step, examples, lab)
        active.append(method.active_class)
        declined.append(getattr(method, "has_declined", False))
    if len(batch.methods) == 1:
        return Choice(active * batch.runs, declined * batch.runs, none, none)

    # What a search pays is counted in every comparison, or it would look free.
    per_trial = PROMPTS * ROLLOUTS
    criteria = world.classes * len(THRESHOLDS)
    verdicts = n_trials * per_trial * len(THRESHOLDS) + len(looks) * VALIDATION * criteria
    rollouts = n_trials * per_trial + len(looks) * VALIDATION
    paying = torch.tensor(choosing).long()
    return Choice(active, declined, verdicts * paying, rollouts * paying)


def simulate(
    world: World,
    arm: Arm,
    rate: float,
    updates: int,
    runs: int,
    verdict_budget: int = 0,
    seed: int = 0,
) -> Curve:
    """Runs of one arm in one world from one start; each run draws its own random numbers.

    They go on for `updates`, and then until every run has paid the verdict budget.
    """
    # Before the first update nothing is paid, and every run has the same score.
    batch = Batch(world, arm, rate, runs, seed)
    verdicts = torch.zeros(runs, dtype=torch.long)
    rollouts = torch.zeros(runs, dtype=torch.long)
    scores_at = [true_scores(world, batch.theta.detach())]
    verdicts_at = [verdicts]
    rollouts_at = [rollouts]
    step = 0
    while step < updates or verdicts.min() <= verdict_budget:
        # The choice is paid before the update that follows from it.
        choice = choose_classes(batch, step)
        verdicts = verdicts + choice.verdicts + batch.update(choice.active, choice.declined)
        rollouts = rollouts + choice.rollouts + PROMPTS * ROLLOUTS
        step += 1

        scores_at.append(true_scores(world, batch.theta.detach()))
        verdicts_at.append(verdicts)
        rollouts_at.append(rollouts)
    return Curve(torch.stack(scores_at), torch.stack(verdicts_at), torch.stack(rollouts_at))


# ------------------------------------------------------------------------- the arithmetic


def predicted_ratio(world: World, runs: int = 4000, seed: int = 0) -> float:
    """By how much farther the scalar reward moves the policy per update than a turn, small steps.

    Let g be the gradient of the mean of all classes. A turn moves along it by cov(r_c, g), on
    average over the classes, and the scalar R = mean of r_c by cov(R, g): the same. Divided by
    the std, the two differ by std(r_c) / std(R), the root of what arlrr.contraction gives; with
    independent classes that is sqrt(K).
    """
    # Without the division there is nothing that could differ.
    if world.advantage == "mean":
        return 1.0
    rng = torch.Generator().manual_seed(seed)
    # At the start, where the policy has not moved: that is what small steps see.
    answers = torch.randn((runs, coordinates(world)), generator=rng)
    ease = torch.zeros(runs, world.classes)
    rewards = judged(world, answers, ease, rng).mean(-1)
    weights = world.weights.tolist()
    of_sum, of_classes = arlrr.contraction(weights, rewards.T.tolist())
    return math.sqrt(of_classes / of_sum)


def measured_ratio(world: World, updates: int, rate: float, runs: int) -> tuple[float, float]:
    """(ratio, its standard error): the scalar's move along the mean quality over that of turns."""
    moves = []
    for arm in (ARMS["scalar"], ARMS["cyclic, stage 1"]):
        batch = Batch(world, arm, rate, runs, seed=0)
        for step in range(updates):
            batch.update(choose_classes(batch, step).active)
        # One number per run: how far it has come in all classes together.
        quality = batch.theta.detach() @ directions(world).T
        moves.append(quality.mean(-1))

    # The error of a ratio of two means, paired run by run (delta method).
    scalar, turns = moves
    ratio = (scalar.mean() / turns.mean()).item()
    residual = (scalar - ratio * turns) / turns.mean()
    return ratio, (residual.std() / math.sqrt(runs)).item()


def arithmetic_table(runs: int) -> None:
    """How far the scalar moves per update, in parts of what turns do: measured and predicted."""
    print("\nThe scalar's move per update over that of turns, small steps, and the verdicts per")
    print("update that it pays for, in parts of a turn's\n")
    names = ["plain steps, std", "predicted", "plain steps, mean", "predicted", "Adam, std"]
    print_head(["classes", "correlation", "judge", *names, "Adam, mean", "verdicts"])
    # One thing at a time is changed from five independent classes and an exact judge.
    settings = []
    for classes in (2, 5, 8):
        settings.append(World(classes=classes))
    settings.append(World(correlation=-0.2))
    settings.append(World(correlation=0.5))
    settings.append(World(flips=0.2))
    settings.append(World(liking=0.2))
    for world in settings:
        # The judge in words, for the table.
        judge = "exact"
        if world.flips:
            judge = f"{world.flips:.0%} flipped"
        if world.liking:
            judge = f"{world.liking:.0%} by liking"
        cells = [world.classes, f"{world.correlation:+.1f}", judge]
        for optimiser, rate in (("sgd", 1e-3), ("adam", 1e-4)):
            for advantage in ("std", "mean"):
                case = replace(world, optimiser=optimiser, advantage=advantage)
                # Plain steps add up; Adam's moments need several cycles to settle.
                cycles = 1 if optimiser == "sgd" else 12
                updates = cycles * world.classes
                ratio, error = measured_ratio(case, updates, rate, runs)
                cells.append(f"{ratio:.2f} ± {1.96 * error:.2f}")
                if optimiser == "sgd":
                    cells.append(f"{predicted_ratio(case):.2f}")
        print_row([*cells, world.classes])


# ------------------------------------------------------------------------- comparisons


BUDGETS = ("updates", "verdicts", "rollouts")


def verdict_budget(world: World) -> int:
    """The verdicts that the scalar arm pays."""
    return UPDATES * PROMPTS * ROLLOUTS * world.classes * len(THRESHOLDS)


@cache
def scores_by_budget(
    world: World, arm: Arm, runs: int, seed: int
) -> dict[str, dict[float, torch.Tensor]]:
    """budget -> rate -> the scores [runs] of an arm when that budget is spent."""
    # One simulation per rate serves all three budgets: it is only read off at other points.
    scores = {budget: {} for budget in BUDGETS}
    for rate in RATES[world.optimiser]:
        # Turns go on until they have paid as many verdicts as the scalar reward.
        to_pay = verdict_budget(world) if arm.schedule else 0
        curve = simulate(world, arm, rate, UPDATES, runs, to_pay, seed)
        rollouts = UPDATES * PROMPTS * ROLLOUTS
        scores["updates"][rate] = curve.at_updates(UPDATES)
        scores["verdicts"][rate] = curve.at_budget(curve.verdicts, verdict_budget(world))
        scores["rollouts"][rate] = curve.at_budget(curve.rollouts, rollouts)
    return scores


def best_rate(scores: dict[float, torch.Tensor]) -> float:
    """The rate with the best mean score."""
    return max(scores, key=lambda rate: scores[rate].mean().item())


def compare(world: World, arm: Arm, runs: int) -> dict[tuple[str, str], torch.Tensor]:
    """(rate, budget) -> the arm's scores minus those of the scalar reward, run by run [runs].

    rate: "same", the best one for the scalar reward, or "own", the best one for the arm. budget:
    one of BUDGETS.
    """
    # Rates are chosen on other runs than those reported: the best of five is so by luck too.
    tried = scores_by_budget(world, arm, runs, seed=1)
    reported = scores_by_budget(world, arm, runs, seed=0)
    scalar = ARMS["scalar"]
    base_rate = best_rate(scores_by_budget(world, scalar, runs, seed=1)["updates"])
    base = scores_by_budget(world, scalar, runs, seed=0)["updates"][base_rate]

    differences = {}
    for budget in BUDGETS:
        own_rate = best_rate(tried[budget])
        differences["same", budget] = reported[budget][base_rate] - base
        differences["own", budget] = reported[budget][own_rate] - base
    return differences


# ------------------------------------------------------------------------- tables


def print_row(cells: list) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(str(value) for value in cells) + " |", flush=True)


def print_head(cells: list) -> None:
    """The head of a Markdown table."""
    print_row(cells)
    print_row(["---"] * len(cells))


def sure_keys(differences: dict) -> set:
    """The keys whose mean differs from 0 at 5 %, corrected for the number of them (Holm)."""
    p_values = {key: t_interval(values.tolist()).p for key, values in differences.items()}
    return {key for key, p in holm(p_values).items() if p < 0.05}


def difference_cell(differences: torch.Tensor, is_sure: bool) -> str:
    """A mean difference with half of its 95 % interval over runs (Student's t)."""
    # Runs are independent of each other here, so plain Student is right.
    interval = t_interval(differences.tolist())
    cell = f"{interval.mean:+.3f} ± {(interval.high - interval.low) / 2:.3f}"
    return cell if is_sure else f"({cell})"


def arms_table(runs: int) -> None:
    """Every arm in five worlds of five classes, with an exact judge."""
    worlds = {
        "independent classes": World(),
        "classes in conflict": World(correlation=-0.2),
        "classes that agree": World(correlation=0.5),
        "HealthBench's points": World(points=HEALTHBENCH),
        "plain steps, no division": World(optimiser="sgd", advantage="mean"),
    }
    # All differences first: what is sure depends on how many there are.
    table = {}
    for title, world in worlds.items():
        for name, arm in ARMS.items():
            if name == "scalar":
                continue
            for case, differences in compare(world, arm, runs).items():
                table[title, name, *case] = differences

    sure = sure_keys(table)
    print(f"\nMinus the scalar reward; ± is half of the 95 % interval over {runs} runs; (): not")
    print(f"different from 0 at 5 % with Holm's correction for {len(table)} differences\n")
    heads = ["world", "arm"]
    for rate in ("same", "own"):
        heads += [f"{rate} rate, equal {budget}" for budget in BUDGETS]
    print_head(heads)
    for title in worlds:
        for name in ARMS:
            cells = [title, name]
            for rate in ("same", "own"):
                for budget in BUDGETS:
                    key = (title, name, rate, budget)
                    if key in table:
                        cells.append(difference_cell(table[key], key in sure))
            if name != "scalar":
                print_row(cells)


# ------------------------------------------------------------------------- the map

CORRELATIONS = {"conflict": None, "0": 0.0, "0.3": 0.3, "0.6": 0.6}


def correlation_of(label: str, classes: int) -> float:
    """The cosine behind a column of the map; "conflict": nine tenths of the most there can be."""
    if label == "conflict":
        # K directions cannot all be farther apart than -1 / (K - 1).
        return -0.9 / (classes - 1)
    return CORRELATIONS[label]


def map_panels() -> dict[str, dict[str, tuple[World, Arm]]]:
    """Panel -> row -> (world without its correlation, arm of turns)."""
    # Every panel changes one thing, and has the correlation along its other side.
    cyclic = ARMS["cyclic, stage 1"]
    panels = {"classes": {}, "verdicts flipped": {}, "verdicts by liking": {}, "stage": {}}
    for classes in (2, 3, 5, 8):
        panels["classes"][str(classes)] = (World(classes=classes), cyclic)
    for share in (0.0, 0.1, 0.2, 0.3):
        panels["verdicts flipped"][f"{share:.0%}"] = (World(flips=share), cyclic)
        panels["verdicts by liking"][f"{share:.0%}"] = (World(liking=share), cyclic)
    for stage in (1, 2, 5, 10):
        panels["stage"][str(stage)] = (World(), Arm("cyclic", stage))
    return panels


def measure_map(runs: int) -> dict[tuple[str, str, str, str], torch.Tensor]:
    """(panel, row, column, budget) -> turns minus scalar [runs], each at its own rate."""
    table = {}
    for panel, rows in map_panels().items():
        for row, (world, arm) in rows.items():
            for column in CORRELATIONS:
                correlation = correlation_of(column, world.classes)
                # The fairest comparison: each arm at the rate that suits it.
                differences = compare(replace(world, correlation=correlation), arm, runs)
                for budget in ("updates", "verdicts"):
                    table[panel, row, column, budget] = differences["own", budget]
    return table


def print_map(table: dict) -> None:
    """The map as a table, with how many of its cells are sure."""
    sure = sure_keys(table)
    print("\nCyclic turns minus the scalar reward, each at its best rate; (): not different from 0")
    print(f"at 5 % with Holm's correction for {len(table)} cells\n")
    print_head(["equal", "panel", "", *CORRELATIONS])
    for budget in ("updates", "verdicts"):
        for panel, rows in map_panels().items():
            for row in rows:
                cells = []
                for column in CORRELATIONS:
                    key = (panel, row, column, budget)
                    cell = f"{table[key].mean().item():+.3f}"
                    cells.append(cell if key in sure else f"({cell})")
                print_row([budget, panel, row, *cells])
    for budget in ("updates", "verdicts"):
        # The panels meet in one row, five classes and an exact judge: counted once.
        outcomes = {}
        for panel, rows in map_panels().items():
            for row, setting in rows.items():
                for column in CORRELATIONS:
                    key = (panel, row, column, budget)
                    outcomes[setting, column] = 0.0
                    if key in sure:
                        outcomes[setting, column] = table[key].mean().item()
        won = sum(value > 0 for value in outcomes.values())
        lost = sum(value < 0 for value in outcomes.values())
        print(f"\nequal {budget}: of {len(outcomes)} different cells turns win {won}, lose {lost}")


def draw(table: dict, path: str) -> None:
    """The map: one panel per setting, one row per budget; blue where turns win."""
    from matplotlib.figure import Figure

    # Figure, not pyplot: no display and no global state.
    panels = map_panels()
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    image = None
    for line, budget in enumerate(("updates", "verdicts")):
        for place, (panel, rows) in enumerate(panels.items()):
            axis = axes[line][place]
            # A cell is the mean over runs; its sureness is in the table.
            values = []
            for row in rows:
                means = [table[panel, row, column, budget].mean() for column in CORRELATIONS]
                values.append([mean.item() for mean in means])
            image = axis.imshow(values, cmap="RdBu", vmin=-0.3, vmax=0.3, aspect="auto")
            for y, of_row in enumerate(values):
                for x, value in enumerate(of_row):
                    # Black on the darkest cells cannot be read.
                    color = "white" if abs(value) > 0.18 else "black"
                    place_in = {"ha": "center", "va": "center", "color": color, "fontsize": 7}
                    axis.text(x, y, f"{value:+.2f}", **place_in)
            axis.set_xticks(range(len(CORRELATIONS)), list(CORRELATIONS), fontsize=7)
            axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
            axis.set_title(f"{panel}, equal {budget}", fontsize=8)
            axis.set_xlabel("correlation of the classes", fontsize=7)
    figure.colorbar(image, ax=axes, label="turns minus scalar", shrink=0.7)
    figure.suptitle("Simulated: where one class at a time wins (blue) and loses (red)", fontsize=9)
    figure.savefig(path, dpi=90)


PARTS = ("arithmetic", "arms", "map")


def main(argv: list[str] | None = None) -> int:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=64, help="runs behind each figure")
    parser.add_argument("--png", default="", help="where the picture of the map goes")
    args = parser.parse_args(argv)

    # The tensors are small: threads would wait for each other.
    torch.set_num_threads(1)
    started = time.process_time()
    if "arithmetic" in args.part:
        arithmetic_table(runs=32 * args.runs)
    if "arms" in args.part:
        arms_table(args.runs)
    # Each part prints as soon as it is done: a run that is stopped has shown the others.
    if "map" in args.part:
        table = measure_map(args.runs)
        print_map(table)
        if args.png:
            draw(table, args.png)
    print(f"\nsimulated; {time.process_time() - started:.0f} seconds of one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
