"""ARL-RR, alternating reinforcement learning with rubric rewards (arXiv 2603.15646): one meta-class of criteria at a time.

A rubric is a vector of verdicts. Added up, it is one number, and answers that differ in kind come out alike. The paper
keeps the classes of criteria (meta-classes) apart and takes turns:

    repeat:  k = the next class                                   # cyclic, random, lowest score, or a search
             for a stage of updates: roll out prompts that have class k; the judge sees the criteria of class k only;
                            r_k(y) = points of met criteria of class k / its positive points;  advantages, update as ever

WHOSE IDEA IS WHAT. Only the paper's abstract was available to us. From the paper: rewards are vectors; existing work adds
them up with fixed weights; ARL-RR optimises one semantic meta-class at a time; adding up causes *variance contraction*, which
helps to explain the gains; a light search over task performance picks the next class; better than scalar rewards on
HealthBench at 1.7B to 14B. No number, algorithm box or theorem was available. Everything below is OUR READING:

1. A class is an axis of HealthBench (or of our data), or any tag of the criteria. r_k is HealthBench's own axis score.
2. A prompt without any criterion in the class is not rolled out. One whose criteria in it are all negative is not either
   (negative_only "skip"), or has r_k = points / sum of |points|, at most 0 ("penalty").
3. A stage is a number of updates, an epoch of the class's prompts, or updates in proportion to the class's mean weight.
   Optimiser state and the KL reference carry over. Each class has its own place in the data.
4. The search tries every class: a short trial from the same state, judged by the overall score on a validation slice, taken
   back bit by bit. The best wins; what lies within one standard error of it is a tie, and goes to the class trained longest
   ago. Trials cost rollouts and verdicts, and are counted. Cyclic, random and lowest score are there to compare with.
5. r_k can fall to -6 (a rubric with heavy penalties): it is clipped to [-1, 1] when advantages are not divided by the std.
6. The variance theorem at `contraction` is textbook mathematics. Whether it is the paper's, we cannot tell.

Reading order: classes, the three scalar rewards to compare with, contraction, ARLRR (the method object, as RubricReward is in
rar.py), search and what it may try out (Lab).

    python arlrr.py                                             # the theorem on made-up classes: measured and predicted
    python arlrr.py --structure data/train.jsonl                # which classes a data set has, and what each costs to judge
    python train.py --method arlrr --schedule search            # also: cyclic, random, lowest_score; points, axis_mean, gdpo
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import torch
from tqdm import tqdm

from rar import FLAT, Criterion, DataError, Example, bootstrap, correlation, group_rewards, judge_groups, mean
from rar import points_reward, read_examples, require

TURNS = ("cyclic", "random", "lowest_score", "search")
SCALARS = ("points", "axis_mean", "gdpo")  # no turns: every class, every step

# ------------------------------------------------------------------------------------------- meta-classes


def class_of(criterion: Criterion, by: str = "axis") -> str:
    """The criterion's class: its axis, its category, or what follows `by:` in its first tag of that kind; else "other".

    >>> class_of(Criterion("", 1, axis="accuracy")), class_of(Criterion("", 1, tags=["level:cluster"]), "level")
    ('accuracy', 'cluster')
    """
    if by in ("axis", "category"):
        return getattr(criterion, by) or "other"
    return next((tag.partition(":")[2] for tag in criterion.tags if tag.startswith(by + ":")), "other")


def check_classes(examples: list[Example], by: str) -> None:
    """Raises DataError where no criterion has a class of this kind: all would stand in "other", and a turn be every turn."""
    known = {class_of(criterion, by) for example in examples for criterion in example.rubric} != {"other"}
    require(known, f"--classes {by}: no criterion has one; use axis, category, or the kind of a tag")


def classes(rubric: list[Criterion], by: str = "axis", negative_only: str = "skip") -> dict[str, list[int]]:
    """Class -> places of its criteria, for the classes that have a reward (decision 2).

    >>> rubric = [Criterion("", 4, axis="accuracy"), Criterion("", -3, axis="tone"), Criterion("", -2, axis="accuracy")]
    >>> classes(rubric), classes(rubric, negative_only="penalty")
    ({'accuracy': [0, 2]}, {'accuracy': [0, 2], 'tone': [1]})
    """
    places: dict[str, list[int]] = {}
    for place, criterion in enumerate(rubric):
        places.setdefault(class_of(criterion, by), []).append(place)
    return {k: part for k, part in places.items() if negative_only == "penalty" or any(rubric[i].weight > 0 for i in part)}


def class_reward(rubric: list[Criterion], scores: list[float | None]) -> float:
    """r_k = sum_i p_i v_i / (sum of positive p_i, or of |p_i| where none is positive); nan when a verdict is missing.

    >>> class_reward([Criterion("", 4), Criterion("", -2)], [1, 1]), class_reward([Criterion("", -3), Criterion("", -1)], [1, 0])
    (0.5, -0.75)
    """
    if None in scores:
        return math.nan
    positive = sum(c.weight for c in rubric if c.weight > 0)
    return sum(c.weight * s for c, s in zip(rubric, scores)) / (positive or sum(abs(c.weight) for c in rubric))


def shares(rubric: list[Criterion], by: str = "axis") -> dict[str, float]:
    """w_k = P_k / P, the weight that HealthBench's score gives to class k: its part of the prompt's positive points."""
    total = sum(c.weight for c in rubric if c.weight > 0)
    return {k: sum(max(rubric[i].weight, 0) for i in part) / total for k, part in classes(rubric, by).items()}


def vector(rubric: list[Criterion], matrix: list[list[float | None]], by: str = "axis", negative_only: str = "skip") -> dict:
    """Class -> [G] rewards of a group, from its verdicts [G][K]; missing verdicts as in rar.group_rewards.

    HealthBench's score R is this vector, weighted, plus the points of classes that have negative criteria only, which no
    r_k contains: R = sum_k (P_k / P) r_k + remainder.

    >>> rubric = [Criterion("", 6, axis="a"), Criterion("", 2, axis="b"), Criterion("", -2, axis="b"), Criterion("", -4, axis="c")]
    >>> scores, w = [1, 0, 1, 1], shares(rubric)
    >>> r = vector(rubric, [scores])
    >>> points_reward(rubric, scores), sum(w[k] * r[k][0] for k in r) + -4 / 8
    (0.0, 0.0)
    """
    found = {}
    for k, part in classes(rubric, by, negative_only).items():
        rows = [[row[i] for i in part] for row in matrix]
        found[k] = group_rewards(class_reward, [rubric[i] for i in part], rows)
    return found


# ------------------------------------------------------------------------------------------- scalar rewards to compare with


def axis_mean(rewards: dict[str, list[float]]) -> list[float]:
    """[G]: every class counts alike, however many points it has.

    >>> axis_mean({"accuracy": [1.0, 0.0], "completeness": [0.5, 0.5]})
    [0.75, 0.25]
    """
    return [statistics.fmean(row) for row in zip(*rewards.values())]


def normalised(rewards: list[float]) -> list[float]:
    """(r - mean) / std over what is known (population std, as grpo.advantages); 0 where there is no spread or no reward."""
    known = [r for r in rewards if not math.isnan(r)]
    spread = statistics.pstdev(known) if known else 0.0
    if spread <= 1e-6:
        return [0.0] * len(rewards)
    return [0.0 if math.isnan(r) else (r - statistics.fmean(known)) / spread for r in rewards]


def gdpo(groups: list[dict[str, list[float]]]) -> list[list[float]]:
    """Group-decoupled normalisation (GDPO, arXiv 2601.05242): each class normalised in its group, added, then the batch.

    Adding first and normalising after lets the class with the widest spread drown the others; this way each has its say.

    >>> [[round(a, 2) for a in row] for row in gdpo([{"accuracy": [1, 1, 0], "tone": [0.01, 0.02, 0.02]}])]
    [[-0.71, 1.41, -0.71]]
    """
    sums = [[sum(row) for row in zip(*map(normalised, rewards.values()))] for rewards in groups]
    flat = iter(normalised([a for row in sums for a in row]))
    return [[next(flat) for _ in row] for row in sums]


# ------------------------------------------------------------------------------------------- variance contraction


def contraction(weights: list[float], rewards: list[list[float]]) -> tuple[float, float]:
    """(Var(R), sum_k w_k Var(r_k)) over a group; weights [K] that sum to one, rewards [K][G], R = sum_k w_k r_k.

    The first is never larger (Cauchy-Schwarz, then Jensen), and the gap is the weighted disagreement of the classes:

        sum_k w_k Var(r_k) - Var(R) = sum_{k<l} w_k w_l Var(r_k - r_l)

    Equal spreads, equal weights 1/K, mean correlation rho: Var(R) = (1/K + (1 - 1/K) rho) Var(r_k). Five classes that have
    nothing to do with each other leave a fifth of the variance.

    What it means for learning: without division by the std the update shrinks with std(R), the root of Var(R). With division
    plain shrinkage cancels; what stays is that the *direction* is diluted (corr(r_k, R) < 1) and that noise of the judge weighs
    more.

    >>> w, r = [0.5, 0.3, 0.2], [[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 1.0, 0.0], [1.0, 0.0, 0.25, 0.5]]
    >>> total, parts = contraction(w, r)
    >>> pairs = [(0, 1), (0, 2), (1, 2)]
    >>> gap = sum(w[k] * w[l] * statistics.pvariance([a - b for a, b in zip(r[k], r[l])]) for k, l in pairs)
    >>> round(total, 4), round(parts, 4), abs(parts - total - gap) < 1e-12
    (0.0817, 0.1898, True)
    """
    combined = [sum(w * r for w, r in zip(weights, row)) for row in zip(*rewards)]
    return statistics.pvariance(combined), sum(w * statistics.pvariance(r) for w, r in zip(weights, rewards))


def spreads(groups: list[tuple[list[Criterion], list[list[float | None]]]], by: str = "axis") -> dict[str, float]:
    """What the step's fully judged groups say about contraction: (rubric, verdicts [G][K]) each. Means over groups.

    var_ratio: Var(sum_k w_k r_k) / sum_k w_k Var(r_k) with w_k = P_k / P; std_scalar, std/<class>: within the group;
    dead_scalar, dead/<class>: share of groups without any spread; corr/<a>/<b>: correlation of two classes within a group.
    The scalar is HealthBench's score, with the points of classes that have negative criteria only (see `vector`). Groups with a
    missing verdict are left out.
    """
    found: dict[str, list[float]] = {}
    note = lambda key, value: found.setdefault(key, []).append(float(value))
    for rubric, matrix in groups:
        if any(None in row for row in matrix):
            continue
        rewards, weights = vector(rubric, matrix, by), shares(rubric, by)
        total, parts = contraction([weights[k] for k in rewards], list(rewards.values()))
        note("var_ratio", total / parts if parts > FLAT**2 else math.nan)
        scalar = [points_reward(rubric, row) for row in matrix]
        for key, values in [("_scalar", scalar), *((f"/{k}", r) for k, r in rewards.items())]:
            note("std" + key, statistics.pstdev(values))
            note("dead" + key, statistics.pstdev(values) <= FLAT)
        for a in rewards:
            for b in rewards:
                if a < b:
                    note(f"corr/{a}/{b}", correlation(rewards[a], rewards[b]))
    return {key: mean(values) for key, values in sorted(found.items())}


# ------------------------------------------------------------------------------------------- the method


@dataclass
class Settings:
    """Flags of train.py for --method arlrr: the comment above a field is its help. The last three are those of every run."""

    # arlrr: the next class by search, lowest_score, cyclic or random; or no turns: points, axis_mean, gdpo (see arlrr.py)
    schedule: Literal[*TURNS, *SCALARS] = "search"
    # arlrr: updates before the next class is chosen
    stage: int = 5
    # arlrr: a stage is --stage updates, an epoch of the class's prompts, or --stage in proportion to the class's weight
    stage_by: Literal["updates", "epoch", "weight"] = "updates"
    # arlrr: updates of a class that the search tries out and takes back
    trial: int = 1
    # arlrr: training prompts kept back, by which search and lowest_score choose
    validation: int = 12
    # arlrr: what makes a class: axis, category, or the kind of a tag (level, cluster)
    classes: str = "axis"
    # arlrr: prompts whose criteria in the class are all negative: skip them, or count them as a penalty
    negative_only: Literal["skip", "penalty"] = "skip"
    # arlrr: share of the groups judged by their whole rubric to measure variance contraction; it never changes a reward
    audit: float = 0.25
    advantage: str = "std"
    prompts_per_step: int = 4
    seed: int = 0


@dataclass
class Turns:
    """Where the alternation stands: what a checkpoint holds."""

    step: int = 0
    active: str = ""  # the class of the stage under way
    left: int = 0  # updates until the stage ends
    updates: dict[str, int] = field(default_factory=dict)  # class -> updates so far: its place in the data
    history: list[dict] = field(default_factory=list)  # a stage each: its first step, its class, what the choice was based on


class ARLRR:
    """The method object: rar.RubricReward's interface; `before_step` chooses the class, `pool` its prompts."""

    of_step = ("audited", "extra")

    def __init__(self, judge, settings: Settings | None = None):
        self.judge, self.settings, self.turns = judge, settings or Settings(), Turns()
        self.scalar = self.settings.schedule in SCALARS
        self.own_advantages = self.settings.schedule == "gdpo"  # normalised here, not by grpo.advantages
        self.trying = False  # inside a trial nothing is audited
        # Of the step under way: (rubric, verdicts) of the audited groups, and how many verdicts only the audit asked for.
        self.audited, self.extra = [], 0

    def places(self, example: Example) -> dict[str, list[int]]:
        """Class -> places of its criteria in the example's rubric."""
        return classes(example.rubric, self.settings.classes, self.settings.negative_only)

    def vector(self, rubric: list[Criterion], matrix: list[list[float | None]]) -> dict[str, list[float]]:
        """Class -> [G] rewards of a group."""
        return vector(rubric, matrix, self.settings.classes, self.settings.negative_only)

    def eligible(self, example: Example) -> bool:
        """Whether any class of the example has a reward."""
        return bool(self.places(example))

    # ---- which class, which prompts

    def before_step(self, examples: list[Example], lab) -> dict:
        """Begins a new stage where the last one has ended. Returns metrics.

        lab: what a schedule may try out; in other people's trainers None. Raises DataError when the schedule needs one.
        """
        if self.scalar or self.turns.left:
            return {"class": self.turns.active or "all"}
        schedule = self.settings.schedule
        require(lab or schedule in ("cyclic", "random"), f"--schedule {schedule} needs train.py; elsewhere use cyclic or random")
        counts = {k: sum(k in self.places(e) for e in examples) for e in examples for k in self.places(e)}
        order = sorted(counts, key=lambda k: (-counts[k], k))  # the class that most prompts have goes first
        chosen, found = getattr(self, schedule)(order, lab)  # the method of its name, below
        stage = {"step": self.turns.step + 1, "class": chosen, **found}
        self.turns.history.append(stage)
        self.turns.active, self.turns.left = chosen, self.length(chosen, order, examples)
        return {key: value for key, value in stage.items() if key != "step"} | {"stage": len(self.turns.history)}

    def length(self, k: str, order: list[str], examples: list[Example]) -> int:
        """Updates of a stage on class k (decision 3)."""
        s = self.settings
        if s.stage_by == "epoch":
            return math.ceil(sum(k in self.places(e) for e in examples) / s.prompts_per_step)
        if s.stage_by == "weight":
            share = statistics.fmean(shares(e.rubric, s.classes).get(k, 0.0) for e in examples)
            return max(1, round(s.stage * len(order) * share))
        return s.stage

    def pool(self, examples: list[Example], step: int) -> tuple[list[Example], int]:
        """(prompts to draw from, how many batches were drawn from them before)."""
        if self.scalar:
            return examples, step
        active = self.turns.active
        return [e for e in examples if active in self.places(e)], self.turns.updates.get(active, 0)

    def oldest(self, order: list[str]) -> str:
        """The class trained longest ago; one never trained before all others, then by order."""
        last = {stage["class"]: number for number, stage in enumerate(self.turns.history)}
        return min(order, key=lambda k: (last.get(k, -1), order.index(k)))

    def cyclic(self, order: list[str], lab) -> tuple[str, dict]:
        """One after the other."""
        return self.oldest(order), {}

    def random(self, order: list[str], lab) -> tuple[str, dict]:
        """The control: any class, drawn from the seed and the number of the stage."""
        return random.Random(f"{self.settings.seed}-{len(self.turns.history)}").choice(order), {}

    def lowest_score(self, order: list[str], lab) -> tuple[str, dict]:
        """The class with the lowest score on the validation prompts."""
        groups = lab.validate()
        found: dict[str, list[float]] = {k: [] for k in order}
        for example, [rollout] in groups:
            for k, [reward] in self.vector(example.rubric, [[v.score for v in rollout.verdicts]]).items():
                found.setdefault(k, []).append(reward)
        scores = {k: mean(found[k]) for k in order}
        known = [s for s in scores.values() if not math.isnan(s)]
        lowest = [k for k in order if known and scores[k] <= min(known) + FLAT]
        return self.oldest(lowest or order), {f"validation/{k}": s for k, s in scores.items()} | lab.spent()

    def search(self, order: list[str], lab) -> tuple[str, dict]:
        """One-step look-ahead: a trial of each class from here, the policy put back after each; see decision 4.

        Every trial of a class starts with the batch and the random numbers that its stage would start with.
        """
        start, before, found = lab.save(), self.state_dict(), {}
        base = [rollout.reward for _, [rollout] in lab.validate()]
        for k in tqdm(order, desc="search", unit="class", leave=False, disable=None):
            try:
                self.trying, self.turns.active = True, k
                for ahead in range(self.settings.trial):
                    lab.update(ahead)
                    self.turns.updates[k] = self.turns.updates.get(k, 0) + 1
                found[k] = [rollout.reward for _, [rollout] in lab.validate()]
            finally:  # also when the judge fails or the user stops: what is saved then must be the state before the search
                lab.restore(start)
                self.load_state_dict(before)
                self.trying = False
        gains = {k: mean(b - a for a, b in zip(base, scores)) for k, scores in found.items()}
        return self.oldest(contenders(found, order)), {f"trial/{k}": gain for k, gain in gains.items()} | lab.spent()

    # ---- the reward

    def score(self, groups: list[tuple[Example, list]], progress: bool = False) -> None:
        """Judges what the stage is about (and, in audited groups, the rest); sets rollout.criteria, .verdicts and .reward."""
        active, self.audited, self.extra = self.turns.active, [], 0
        wanted = [list(range(len(e.rubric))) if self.scalar else self.places(e)[active] for e, _ in groups]
        whole, rubrics = [self.is_audited(example) for example, _ in groups], []
        for (example, _), part, more in zip(groups, wanted, whole):
            # The criteria of the stage come first, so that the rewards below can cut off what the audit added.
            others = [i for i in range(len(example.rubric)) if i not in part] if more else []
            rubrics.append([example.rubric[i] for i in part + others])
        judge_groups(self.judge, groups, progress, rubrics)
        for (_, rollouts), part, rubric, more in zip(groups, wanted, rubrics, whole):
            matrix = [[v.score for v in rollout.verdicts] for rollout in rollouts]
            if more:
                self.audited.append((rubric, matrix))
                self.extra += (len(rubric) - len(part)) * len(rollouts)
            mine, rows = rubric[: len(part)], [row[: len(part)] for row in matrix]
            rewards = self.rewards(mine, rows)
            for rollout, reward in zip(rollouts, rewards):
                if self.settings.advantage != "std" and not math.isnan(reward):  # decision 5; min(1.0, nan) would be 1.0
                    reward = max(-1.0, min(1.0, reward))
                rollout.reward = reward if rollout.text.strip() else min(0.0, reward)  # silence is not a way out (nan becomes 0)

    def advantages(self, groups: list[tuple[Example, list]]) -> list[list[float]]:
        """gdpo's, over the whole batch; every other schedule leaves them to grpo.advantages."""
        found = []
        for _, rollouts in groups:
            rewards = self.vector(rollouts[0].criteria, [[v.score for v in r.verdicts] for r in rollouts])
            bounded = lambda reward, rollout: reward if rollout.text.strip() else min(0.0, reward)  # silence is not a way out
            found.append({k: list(map(bounded, row, rollouts)) for k, row in rewards.items()})
        return gdpo(found)

    def rewards(self, rubric: list[Criterion], matrix: list[list[float | None]]) -> list[float]:
        """[G]: r_k of the active class, or the scalar that the schedule names (of gdpo the axis mean, for the log only)."""
        if not self.scalar:
            return group_rewards(class_reward, rubric, matrix)
        if self.settings.schedule == "points":
            return group_rewards(points_reward, rubric, matrix)
        return axis_mean(self.vector(rubric, matrix))

    def is_audited(self, example: Example) -> bool:
        """Whether this step's group is judged by its full rubric: a draw that each process and each resumed run repeats."""
        drawn = random.Random(f"{self.settings.seed}-{self.turns.step}-{example.id}").random()
        return not self.trying and drawn < self.settings.audit

    def after_step(self, groups: list[tuple[Example, list]]) -> dict:
        """Moves the turn on by one update. Returns `spreads` of the audited groups and the verdicts that only they cost."""
        turns = self.turns
        turns.step += 1
        if not self.scalar:
            turns.updates[turns.active] = turns.updates.get(turns.active, 0) + 1
            turns.left -= 1
        rewards = [[r.reward for r in rollouts if not math.isnan(r.reward)] for _, rollouts in groups]
        dead = mean(float(statistics.pstdev(row) <= FLAT) for row in rewards if row)
        return {"dead": dead, "audit_verdicts": self.extra, **spreads(self.audited, self.settings.classes)}

    def state_dict(self) -> dict:
        """Where the alternation stands, as plain values: what a checkpoint holds."""
        return deepcopy(vars(self.turns))

    def load_state_dict(self, state: dict) -> None:
        """Restores exactly what state_dict gave."""
        self.turns = Turns(**deepcopy(state))


# ------------------------------------------------------------------------------------------- search


def contenders(found: dict[str, list[float]], order: list[str]) -> list[str]:
    """The classes whose trial was the best, or worse by no more than the standard error of the paired difference.

    found: class -> overall score of each validation prompt after the trial; nan where it could not be judged.

    >>> contenders({"a": [0.5, 0.5, 0.6], "b": [0.9, 0.8, 0.9], "c": [0.8, 0.9, 0.9]}, ["a", "b", "c"])
    ['b', 'c']
    """
    best = max(order, key=lambda k: -math.inf if math.isnan(mean(found[k])) else mean(found[k]))
    close = []
    for k in order:
        gaps = [b - a for a, b in zip(found[k], found[best]) if not math.isnan(b - a)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
        if k == best or (gaps and statistics.fmean(gaps) <= error + FLAT):
            close.append(k)
    return close


def snapshot(model, optimizer) -> dict:
    """Everything that an update changes, copied: weights, moments, random states."""
    return {
        "model": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "optimizer": deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def restore(model, optimizer, state: dict) -> None:
    """Puts back, bit by bit, what `snapshot` copied; the snapshot can be used again."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state["model"][name])
    optimizer.zero_grad(set_to_none=True)
    optimizer.load_state_dict(deepcopy(state["optimizer"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])


COSTS = ("updates", "rollouts", "verdicts", "tokens")  # what a comparison at equal budgets counts, besides seconds


class Lab:
    """What a schedule may try out between two steps: updates that are taken back, a look at the validation prompts.

    Everything is counted, because a search pays for its trials in every comparison. update(step) does the run's own update
    of that step and returns its metrics; validate() gives groups of one judged rollout; restored() is called when old
    weights are back, for a sampler that holds a copy of them.
    """

    def __init__(self, model, optimizer, update, validate, restored=lambda: None):
        self.model, self.optimizer = model, optimizer
        self.do_update, self.do_validate, self.restored = update, validate, restored
        self.at(0)

    def at(self, step: int) -> "Lab":
        """Opens a new account, for the decision before this step."""
        self.step, self.cost, self.started = step, Counter(), time.perf_counter()
        return self

    def save(self) -> dict:
        """The state to come back to."""
        return snapshot(self.model, self.optimizer)

    def restore(self, state: dict) -> None:
        """Takes back every update since `save`."""
        restore(self.model, self.optimizer, state)
        self.restored()

    def update(self, ahead: int) -> None:
        """The update that the run would do now, or `ahead` steps from now."""
        metrics = self.do_update(self.step + ahead)
        # Counter.update adds.
        self.cost.update({"updates": 1} | {key: metrics[key] for key in COSTS[1:]})

    def validate(self) -> list[tuple[Example, list]]:
        """The greedy answers to the validation prompts, judged by their whole rubrics: groups of one rollout."""
        groups = self.do_validate()
        answers = [rollout for _, [rollout] in groups]
        verdicts, tokens = sum(len(r.verdicts) for r in answers), sum(len(r.ids) for r in answers)
        self.cost.update(rollouts=len(answers), verdicts=verdicts, tokens=tokens)
        return groups

    def spent(self) -> dict:
        """What this decision has cost so far, as metrics."""
        return {f"search_{key}": self.cost[key] for key in COSTS} | {"search_seconds": time.perf_counter() - self.started}


# ------------------------------------------------------------------------------------------- command line


def demonstrate(K: int = 5, G: int = 8, groups: int = 2000, seed: int = 0) -> list[tuple[float, ...]]:
    """The theorem on K made-up classes of equal spread and correlation rho, in groups of G; prints a table.

    Returns (rho, Var(R) / Var(r_k) measured, low, high, predicted, corr(r_k, R) measured, predicted) for each rho.
    """
    rng, rows = random.Random(seed), []
    print(f"{K} classes, {groups} groups of {G}, seed {seed}; R = mean of the classes; 95 % bootstrap interval over groups\n")
    print("  rho   Var(R) / mean Var(r_k)                    corr(r_k, R)\n        measured                  1/K+(1-1/K)rho  measured  predicted")
    for rho in (0.0, 0.3, 0.6, 1.0):
        pairs, follows = [], []
        for _ in range(groups):
            shared = [rng.gauss(0, 1) for _ in range(G)]  # what makes an answer good in every class at once
            r = [[math.sqrt(rho) * s + math.sqrt(1 - rho) * rng.gauss(0, 1) for s in shared] for _ in range(K)]
            pairs.append(contraction([1 / K] * K, r))
            follows.append(correlation(r[0], axis_mean(dict(enumerate(r)))))
        ratio = sum(total for total, _ in pairs) / sum(parts for _, parts in pairs)
        # Of a ratio of sums: the interval of its numerator's mean over the denominator's.
        low, high = (edge / statistics.fmean(parts for _, parts in pairs) + ratio for edge in bootstrap([t - ratio * p for t, p in pairs]))
        predicted = 1 / K + (1 - 1 / K) * rho
        rows.append((rho, ratio, low, high, predicted, mean(follows), math.sqrt(predicted)))
        print("  {:.1f}   {:.3f} ({:.3f} to {:.3f})    {:.3f}           {:.3f}     {:.3f}".format(*rows[-1]))
    print("\nDividing advantages by the group's std undoes the shrinking, not the dilution of corr(r_k, R).\n"
          "The correlation in a group of 8 lies a little off that of infinitely many answers, which is what is predicted.")  # fmt: skip
    return rows


def structure(examples: list[Example], by: str = "axis") -> list[dict]:
    """A row a class: its items and their share, its prompts, the verdicts a stage costs beside those of the full rubric."""
    kinds: dict[str, dict[str, list[Criterion]]] = {}  # class -> prompt -> its criteria
    for example in examples:
        for criterion in example.rubric:
            kinds.setdefault(class_of(criterion, by), {}).setdefault(example.id, []).append(criterion)
    total, weights, table = sum(len(e.rubric) for e in examples), [shares(e.rubric, by) for e in examples], []
    for k, prompts in sorted(kinds.items(), key=lambda pair: -sum(map(len, pair[1].values()))):
        items = [c for part in prompts.values() for c in part]
        usable = [part for part in prompts.values() if any(c.weight > 0 for c in part)]
        per_prompt = mean(float(len(part)) for part in usable)
        table.append({
            "class": k, "items": len(items), "share": len(items) / total, "negative": mean(float(c.weight < 0) for c in items),
            "prompts": len(usable) / len(examples), "items_a_prompt": per_prompt,
            "one_item": mean(float(len(part) == 1) for part in usable),
            "weight": statistics.fmean(w.get(k, 0.0) for w in weights), "verdicts": per_prompt / (total / len(examples)),
        })  # fmt: skip
    return table


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description="Variance contraction, measured and predicted; the classes of a data set.")
    parser.add_argument("--structure", metavar="FILE", help="prompts with rubrics: print their classes and what each costs to judge")
    parser.add_argument("--classes", default="axis", help="axis, category, or the kind of a tag (level, cluster) [axis]")
    args = parser.parse_args(argv)
    if not args.structure:
        demonstrate()
        return 0
    try:
        examples = read_examples(args.structure)
        check_classes(examples, args.classes)
    except DataError as error:
        print(f"arlrr.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(examples)} prompts, {sum(len(e.rubric) for e in examples)} criteria. Verdicts: a stage's on a prompt, beside the full rubric's\n")
    head = ("items", "share", "negative", "prompts", "items a prompt", "one item", "mean weight", "verdicts")
    print(f"{'class':<24}" + "".join(f"{name:>15}" for name in head))
    for row in structure(examples, args.classes):
        cells = [f"{v:.1f}" if key == "items_a_prompt" else str(v) if key == "items" else f"{v:.0%}" for key, v in row.items() if key != "class"]
        print(f"{row['class']:<24}" + "".join(f"{cell:>15}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
