"""ARL-RR, alternating reinforcement learning with rubric rewards (arXiv 2603.15646).

A rubric gives a vector of verdicts. Added up they are one number, and answers that differ in
kind look alike. The paper keeps the classes of criteria (meta-classes) apart and optimises them
in turn:

    repeat:  choose the next class c             # search, lowest_score, cyclic or random
             for a stage of updates:
                 roll out G completions for prompts whose rubric has class c
                 judge the criteria of class c only
                 r_c(y) = sum_{i in c} p_i v_i(y) / (positive points of c)
                 advantages and update as in any GRPO step

    p_i: points of criterion i; v_i: its verdict.
    In shapes: P prompts, G completions of a prompt, K criteria, C classes.

What is the paper's. Only its abstract was available to us: rewards are vectors; existing work
adds them up with fixed weights; ARL-RR optimises one semantic meta-class at a time; adding up
causes *variance contraction*, which helps to explain the gains; a light search over task
performance picks the next class; it is better than scalar rewards on HealthBench at 1.7B to
14B.

What is ours. No number, algorithm box or theorem was available, so these decisions are our
reading:

1. A class is an axis of HealthBench (or of our data), a category, or any tag of the criteria.
   r_c is HealthBench's own axis score.
2. A prompt whose class has penalties only has no r_c (it would be divided by 0 points): it is
   not rolled out for that class, and these penalties are never trained. With --class_by category
   that is the class "pitfall", unless the rubric also has a pitfall worded as avoidance (weight
   > 0). The search chooses by the score over the whole rubric, which counts these penalties.
3. A stage is a fixed number of updates (--stage). Optimiser state and the KL reference carry
   over from stage to stage.
4. The search tries one update per class, from the same state, and takes each back bit by bit.
   The best class wins; see `choose_by_search`. Cyclic, random and lowest_score are there to
   compare with.
5. r_c has no lower bound: a class with 1 positive point and a penalty of 6 can give -6. Dividing
   advantages by the group's std (--advantage std) evens this out; without it (mean, none) r_c is
   clipped to [-1, 1].
6. The theorem at `contraction` is textbook mathematics. Whether it is the paper's, we cannot
   tell.

    python arlrr.py                                     # the theorem, measured and predicted
    python train.py --method arlrr --schedule search    # also cyclic, random, lowest_score
    python train.py --method axis_mean   # all classes in every step: the mean of the r_c
    python train.py --method gdpo        # ... advantages per class, then their mean
"""

import math
import random
import statistics
import time
from collections import Counter, defaultdict
from copy import deepcopy

import torch

from judge import progress_bar
from rar import (
    ZERO_STD,
    Criterion,
    DataError,
    Example,
    Group,
    Matrix,
    Rubric,
    RubricReward,
    correlation,
    drop_nan,
    group_rewards,
    nanmean,
    points_reward,
    score_matrix,
    silence_rule,
    with_text,
)

# ---------------------------------------------------------------------- meta-classes


def class_of(criterion: Criterion, class_by: str = "axis") -> str:
    """The criterion's class; "other" where it has none.

    class_by: "axis", "category", or the kind of a tag, "level" for tags like "level:cluster".

    >>> class_of(Criterion("", 1, axis="accuracy"))
    'accuracy'
    >>> class_of(Criterion("", 1, tags=["level:cluster"]), "level")
    'cluster'
    """
    if class_by == "axis":
        name = criterion.axis
    elif class_by == "category":
        name = criterion.category
    else:
        name = tag_value(criterion.tags, class_by)

    # Criteria without a class are a class too: they earn their turn like any other.
    if name == "":
        return "other"
    return name


def tag_value(tags: list[str], kind: str) -> str:
    """The value of the first tag "kind:value"; "" where there is none."""
    for tag in tags:
        tag_kind, _, value = tag.partition(":")
        if tag_kind == kind:
            return value
    return ""


def meta_classes(rubric: Rubric, class_by: str = "axis") -> dict[str, list[int]]:
    """Class -> indices of its criteria, for the classes that have a reward (decision 2).

    >>> rubric = [Criterion("", 4, axis="accuracy"), Criterion("", -3, axis="tone")]
    >>> meta_classes(rubric + [Criterion("", -2, axis="accuracy")])
    {'accuracy': [0, 2]}
    """
    members = defaultdict(list)
    has_reward = set()
    for index, criterion in enumerate(rubric):
        name = class_of(criterion, class_by)
        members[name].append(index)
        if criterion.weight > 0:
            has_reward.add(name)

    # A class that has penalties only has no positive points to divide by.
    rewarded = {}
    for name in members:
        if name in has_reward:
            rewarded[name] = members[name]
    return rewarded


def select(values: list, indices: list[int]) -> list:
    """The values at these indices: the criteria of a class, or their verdicts."""
    return [values[i] for i in indices]


def classes_by_frequency(examples: list[Example], class_by: str = "axis") -> list[str]:
    """The classes that have a reward, that of most prompts first; ties by the alphabet."""
    counts = Counter()
    for example in examples:
        for name in meta_classes(example.rubric, class_by):
            counts[name] += 1
    return sorted(counts, key=lambda name: (-counts[name], name))


def check_classes(examples: list[Example], class_by: str) -> None:
    """Raises DataError when fewer than two classes of the data have a reward."""
    # With one class every turn is the same. A misspelt class_by makes all criteria "other".
    names = classes_by_frequency(examples, class_by)
    if len(names) < 2:
        present = f'only "{names[0]}"' if names else "none"
        raise DataError(
            f"--class_by {class_by}: two classes with a positive criterion are needed, the data "
            f"have {present}; use axis, category, or the kind of a tag"
        )


# ---------------------------------------------------------------------- class rewards


def class_rewards(
    rubric: Rubric,
    matrix: Matrix,
    class_by: str = "axis",
) -> dict[str, list[float]]:
    """Class -> rewards r_c [G] of a group, from its verdicts [G][K].

    Missing verdicts are treated as in rar.group_rewards. For axis_mean, gdpo and measurements:
    ARLRR is given the verdicts of one class only, and has nothing to split.

    >>> rubric = [Criterion("", 6, axis="a"), Criterion("", 2, axis="b")]
    >>> class_rewards(rubric + [Criterion("", -2, axis="b")], [[1, 0, 0], [1, 1, 1]])
    {'a': [1.0, 1.0], 'b': [0.0, 0.0]}
    """
    rewards = {}
    for name, indices in meta_classes(rubric, class_by).items():
        # The columns of the matrix that are about criteria of this class.
        verdicts = []
        for row in matrix:
            verdicts.append(select(row, indices))
        rewards[name] = group_rewards(points_reward, select(rubric, indices), verdicts)
    return rewards


def clip_rewards(rewards: list[float], advantage: str) -> list[float]:
    """Rewards [G], clipped to [-1, 1] where advantages are left at their scale (decision 5).

    advantage: "mean" and "none" leave it. Any other kind is taken for one that scales, as "std"
    does, and gets the rewards as they are.

    >>> clip_rewards([0.5, -6.0, math.nan], "mean"), clip_rewards([-6.0], "std")
    ([0.5, -1.0, nan], [-6.0])
    """
    if advantage not in ("mean", "none"):
        return rewards

    # Without a division, one answer with a reward of -6 would outweigh the rest of the batch.
    clipped = []
    for reward in rewards:
        # nan is "not scored" and has to stay nan: min(1.0, nan) would make it 1.0, the best.
        if math.isnan(reward):
            clipped.append(reward)
        else:
            clipped.append(max(-1.0, min(1.0, reward)))
    return clipped


def dead_share(groups: list[Group]) -> float:
    """Share of the groups whose rewards have no spread: nothing is learned from them."""
    dead = []
    for _, rollouts in groups:
        rewards = drop_nan([rollout.reward for rollout in rollouts])
        # A group that was not scored at all is neither dead nor alive.
        if rewards:
            dead.append(float(statistics.pstdev(rewards) <= ZERO_STD))
    return nanmean(dead)


# ---------------------------------------------------------------------- the method


class ARLRR(RubricReward):
    """One class per stage: `before_step` chooses it; `pool` and `rubric_for` follow it.

    config: schedule, stage (updates per stage), class_by, seed, advantage. All processes make
    the same choice: the step, the examples, the seed, the history and the validation scores, on
    which it depends, are the same in all of them.
    """

    def __init__(self, judge, config):
        super().__init__(judge, config)
        # One entry per stage, {"step", "class", ...}: the updates done before it, its class, and
        # what the choice was based on.
        self.history: list[dict] = []

        # The class that is judged now: that of the last stage, or the one that a search tries.
        self.active_class = ""

    def can_learn_from(self, example: Example) -> bool:
        """Whether any class of the example has a reward."""
        return bool(meta_classes(example.rubric, self.config.class_by))

    def needs_rest(self, step: int) -> bool:
        """Whether a stage begins with this step."""
        # The end of a stage follows from the step, so there is no counter to save.
        return not self.history or step >= self.history[-1]["step"] + self.config.stage

    def before_step(self, step: int, examples: list[Example], lab: "Lab | None" = None) -> dict:
        """Begins a new stage when the last one has ended; returns the choice as metrics.

        step: updates done so far. lab: lets a schedule run and undo an update, and validate; None
        under other trainers (tools/adapters.py). Raises DataError when the schedule needs one.
        """
        if not self.needs_rest(step):
            return {"class": self.active_class}

        # Other trainers cannot take an update back, and give us no validation prompts.
        schedule = self.config.schedule
        if lab is None and schedule in ("search", "lowest_score"):
            raise DataError(
                f"--schedule {schedule} needs train.py; in other trainers use cyclic or random"
            )

        order = classes_by_frequency(examples, self.config.class_by)
        chosen, metrics = SCHEDULES[schedule](self, order, lab)

        # In the log, "stage" is the number of the stage; config.stage is its length in updates.
        self.history.append({"step": step, "class": chosen, **metrics})
        self.active_class = chosen
        return {"class": chosen, **metrics, "stage": len(self.history)}

    def pool(self, examples: list[Example]) -> list[Example]:
        """The prompts that have the active class."""
        pool = []
        for example in examples:
            if self.active_class in meta_classes(example.rubric, self.config.class_by):
                pool.append(example)
        return pool

    def rubric_for(self, example: Example) -> Rubric:
        """The criteria of the active class: the judge is asked about no other."""
        classes = meta_classes(example.rubric, self.config.class_by)
        return select(example.rubric, classes[self.active_class])

    def aggregate(self, rubric: Rubric, matrix: Matrix) -> list[float]:
        """r_c [G]: HealthBench's score, computed within the active class."""
        rewards = group_rewards(points_reward, rubric, matrix)
        return clip_rewards(rewards, self.config.advantage)

    def after_step(self, groups: list[Group]) -> dict:
        """Returns the share of groups without spread, of which small classes have many."""
        return {"dead": dead_share(groups)}

    def state_dict(self) -> dict:
        """The history, as plain values: everything else follows from it and the step."""
        return {"history": deepcopy(self.history)}

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict gave."""
        self.history = deepcopy(state["history"])
        self.active_class = self.history[-1]["class"] if self.history else ""


# ---------------------------------------------------------------------- schedules

# A schedule takes the method, the classes that have a reward (most frequent first) and the lab,
# and returns the class of the next stage and what to log of the choice. The other two schedules,
# random and lowest_score, are near the end of the file.


def longest_ago(history: list[dict], order: list[str]) -> str:
    """The class of `order` whose last stage is longest ago; ties by the order.

    >>> longest_ago([{"class": "a"}, {"class": "b"}, {"class": "a"}], ["a", "b"])
    'b'
    """
    # A class that had no turn yet comes before all that had one.
    last_stage = dict.fromkeys(order, -1)
    for number, stage in enumerate(history):
        last_stage[stage["class"]] = number

    # min takes the first of equals, so ties follow the order.
    return min(order, key=lambda name: last_stage[name])


def choose_cyclic(method: ARLRR, order: list[str], lab: "Lab | None") -> tuple[str, dict]:
    """One class after the other."""
    return longest_ago(method.history, order), {}


# What the search needs of the lab (class Lab, below): validate() is one greedy answer per
# validation prompt, judged by its full rubric; update() is one update by the active class; save()
# and restore(state) copy and put back all that an update changes; spent() is what they have cost.


def choose_by_search(method: ARLRR, order: list[str], lab: "Lab") -> tuple[str, dict]:
    """Looks one update ahead with every class, and takes the best (decision 4).

    1. Score the validation prompts as they are: what the gains in the log are measured against.
    2. For each class: one update, score again, take the update back. The update is the first one
       of the stage that it tries: the same weights, batch and random numbers.
    3. The best class has the highest mean overall score; classes within one standard error of it
       are tied with it.
    4. Of these the one trained longest ago is chosen. With a short validation slice often all are
       tied: the search is then cyclic (`search_tied` in the log is their number).

    It cannot decline: when every trial makes the score worse, one of the least bad is chosen.

    Cost per stage: C updates (the winner's is done again by the stage) and C + 1 validations.
    """
    baseline = overall_scores(lab.validate())

    # What every trial starts from.
    start = lab.save()
    active_before = method.active_class

    scores_after = {}
    with progress_bar(len(order), "search", "class") as bar:
        for name in order:
            try:
                method.active_class = name
                lab.update()
                scores_after[name] = overall_scores(lab.validate())
            finally:
                # Also when the judge fails or the user stops: a checkpoint written then has to
                # hold the state from before the search.
                lab.restore(start)
                method.active_class = active_before
            bar.update()

    # The choice compares the trials with each other, not with what was before.
    best = within_one_se(scores_after, order)

    metrics = {}
    for name, scores in scores_after.items():
        metrics[f"trial/{name}"] = nanmean([b - a for a, b in zip(baseline, scores)])
    metrics["search_tied"] = len(best)
    metrics.update(lab.spent())
    return longest_ago(method.history, best), metrics


def overall_scores(groups: list[Group]) -> list[float]:
    """HealthBench's score over all classes, for each validation prompt; nan: could not be judged.

    It is not r_c: `Lab.validate` judges the full rubric, penalties of all classes included.
    """
    # Validation answers are greedy, so there is one rollout per prompt.
    scores = []
    for _, [rollout] in groups:
        scores.append(rollout.reward)
    return scores


def within_one_se(scores: dict[str, list[float]], order: list[str]) -> list[str]:
    """The class with the best mean score, and those within one standard error of it.

    scores: class -> overall score of each validation prompt after the class's trial; nan where
    it could not be judged. The error is that of the paired difference, prompt by prompt.

    >>> scores = {"a": [0.5, 0.5, 0.6], "b": [0.9, 0.8, 0.9], "c": [0.8, 0.9, 0.8]}
    >>> within_one_se(scores, ["a", "b", "c"])  # c is lower by 0.033, with an error of 0.067
    ['b', 'c']
    """
    means = {name: nanmean(scores[name]) for name in order}

    # A trial that could not be judged at all is no winner. Where none could be, there is nothing
    # to choose by, and the classes take turns.
    judged = [name for name in order if not math.isnan(means[name])]
    if not judged:
        return order
    best = max(judged, key=lambda name: means[name])

    # Prompts differ more than trials do. Paired, what a prompt is worth cancels.
    tied = []
    for name in judged:
        gaps = drop_nan([b - a for a, b in zip(scores[name], scores[best])])

        # Without a prompt that both could be judged on, nothing is known to be a tie.
        if not gaps:
            continue

        # A single prompt gives no error: only an equal score is then a tie.
        error = 0.0
        if len(gaps) > 1:
            error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        if statistics.fmean(gaps) <= error + ZERO_STD:  # the latter for rounding errors
            tied.append(name)
    return tied


# ---------------------------------------------------------------------- what may be tried out

# What a comparison at equal budgets counts, besides seconds.
COSTS = ("updates", "rollouts", "verdicts", "tokens")


class Lab:
    """What a schedule may try out between two steps, and what that has cost.

    run_update(step)    the run's own update of that step; returns its metrics
    run_validation()    greedy answers to the validation prompts, judged: groups of one rollout
    after_restore()     called when old weights are back, for a sampler that has a copy of them
    """

    def __init__(self, model, optimizer, run_update, run_validation, after_restore):
        self.model = model
        self.optimizer = optimizer
        self.run_update = run_update
        self.run_validation = run_validation
        self.after_restore = after_restore
        self.at(0)

    def at(self, step: int) -> "Lab":
        """Sets the step that is decided about, and all costs to zero."""
        self.step = step
        self.cost = Counter()
        self.started = time.perf_counter()
        return self

    def save(self) -> dict:
        """Everything that an update changes, copied: weights, moments, random states."""
        # Copied, since the next update changes the tensors in place. What is frozen stays as it is.
        weights = {}
        for name, tensor in self.model.named_parameters():
            if tensor.requires_grad:
                weights[name] = tensor.detach().clone()
        state = {
            "model": weights,
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "cuda": [],
        }

        # Sampling on a GPU draws from the GPU's own generators.
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def restore(self, state: dict) -> None:
        """Puts back, bit by bit, what `save` copied. The copy can be used again."""
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                if tensor.requires_grad:
                    tensor.copy_(state["model"][name])

        # A trial that broke off may have left gradients.
        self.optimizer.zero_grad(set_to_none=True)

        # The optimiser keeps the tensors that it is given and changes them in place: give a copy.
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))

        # Without the random states the stage would not begin as its trial did.
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        self.after_restore()

    def update(self) -> None:
        """The update that the run would do now."""
        metrics = self.run_update(self.step)

        # Counted, because a search pays for its trials in every comparison.
        self.cost["updates"] += 1
        self.cost["rollouts"] += metrics["rollouts"]
        self.cost["verdicts"] += metrics["verdicts"]
        self.cost["tokens"] += metrics["tokens"]

    def validate(self) -> list[Group]:
        """Greedy answers to the validation prompts, judged by their full rubrics, not by a class.

        Their rewards are overall scores: rar.points_reward over all criteria.
        """
        groups = self.run_validation()
        for _, rollouts in groups:
            for rollout in rollouts:
                self.cost["rollouts"] += 1
                self.cost["verdicts"] += len(rollout.verdicts)
                self.cost["tokens"] += len(rollout.ids)
        return groups

    def spent(self) -> dict:
        """What this decision has cost so far, as metrics."""
        metrics = {f"search_{key}": self.cost[key] for key in COSTS}
        metrics["search_seconds"] = time.perf_counter() - self.started
        return metrics


# ---------------------------------------------------------------------- variance contraction


def class_weights(rubric: Rubric, class_by: str = "axis") -> dict[str, float]:
    """w_c [C]: class c's share of the rubric's positive points. The shares sum to one.

    HealthBench's score is R = sum_c w_c r_c + n / (all positive points), where n are the (negative)
    points of met criteria in classes that have penalties only. "tone" is such a class, n = -4:

    >>> rubric = [Criterion("", 6, axis="a"), Criterion("", 2, axis="b")]
    >>> rubric += [Criterion("", -2, axis="b"), Criterion("", -4, axis="tone")]
    >>> scores = [1, 0, 1, 1]
    >>> class_rewards(rubric, [scores]), class_weights(rubric)
    ({'a': [1.0], 'b': [-1.0]}, {'a': 0.75, 'b': 0.25})
    >>> points_reward(rubric, scores), 0.75 * 1.0 + 0.25 * -1.0 + -4 / 8
    (0.0, 0.0)
    """
    # Of the whole rubric: classes without a reward have no positive points to add.
    total = positive_points(rubric)
    weights = {}
    for name, indices in meta_classes(rubric, class_by).items():
        weights[name] = positive_points(select(rubric, indices)) / total
    return weights


def positive_points(criteria: Rubric) -> float:
    """What a perfect answer earns."""
    return sum(criterion.weight for criterion in criteria if criterion.weight > 0)


def contraction(weights: list[float], rewards: list[list[float]]) -> tuple[float, float]:
    """(Var(R), sum_c w_c Var(r_c)) over a group, where R = sum_c w_c r_c.

    weights: [C], summing to one. rewards: [C][G].

    The theorem: the first is never larger, because the gap is a weighted sum of variances,

        sum_c w_c Var(r_c) - Var(R) = sum_{c<d} w_c w_d Var(r_c - r_d)

    With equal spreads, equal weights 1/C and mean correlation rho:

        Var(R) = (1/C + (1 - 1/C) rho) Var(r_c)

    Five classes that have nothing to do with each other leave a fifth of the variance.

    What it means for learning: without division by the std, the update shrinks with std(R).
    With the division, the size of R no longer matters. Two effects remain. (a) R is only partly
    about class c: corr(r_c, R) < 1. (b) Averaging shrinks what one class says alone, but not the
    noise that all classes share, such as a judge's liking for long answers. Beside the signal of
    class c the noise is larger in R than in r_c.

    >>> w = [0.5, 0.3, 0.2]
    >>> r = [[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 1.0, 0.0], [1.0, 0.0, 0.25, 0.5]]
    >>> of_sum, of_classes = contraction(w, r)
    >>> gap = 0.0
    >>> for c, d in [(0, 1), (0, 2), (1, 2)]:
    ...     gap += w[c] * w[d] * statistics.pvariance([a - b for a, b in zip(r[c], r[d])])
    >>> round(of_sum, 4), round(of_classes, 4), abs(of_classes - of_sum - gap) < 1e-12
    (0.0817, 0.1898, True)
    """
    # R of each rollout: the rewards are [C][G], so a column holds one rollout's classes.
    combined = []
    for column in zip(*rewards):
        combined.append(sum(w * r for w, r in zip(weights, column)))

    # What the classes vary by, each on its own.
    of_classes = sum(w * statistics.pvariance(r) for w, r in zip(weights, rewards))
    return statistics.pvariance(combined), of_classes


# A first reader can stop here: what follows is there to measure or to compare with.

# ---------------------------------------------------------------------- schedules to compare with


def choose_random(method: ARLRR, order: list[str], lab: "Lab | None") -> tuple[str, dict]:
    """The control: any class, drawn from the seed and the number of the stage."""
    # A generator of its own: a resumed run draws the same class, and sampling is not disturbed.
    generator = random.Random(f"{method.config.seed}-{len(method.history)}")
    return generator.choice(order), {}


def choose_lowest_score(method: ARLRR, order: list[str], lab: "Lab") -> tuple[str, dict]:
    """The class with the lowest mean r_c on the validation prompts.

    Unclipped: a single answer of -6 can make a class the lowest.
    """
    # The validation answers were judged by their full rubrics, so every class can be scored.
    rewards_of_class = defaultdict(list)
    for example, rollouts in lab.validate():
        matrix = score_matrix(rollouts)
        for name, row in class_rewards(example.rubric, matrix, method.config.class_by).items():
            rewards_of_class[name].extend(row)
    scores = {name: nanmean(rewards_of_class[name]) for name in order}

    # A class that no validation prompt has cannot be the lowest. Where no class has a score,
    # there is nothing to choose by, and the classes take turns.
    scored = drop_nan(scores.values())
    lowest = order
    if scored:
        bound = min(scored) + ZERO_STD
        lowest = [name for name in order if scores[name] <= bound]

    metrics = {f"validation/{name}": score for name, score in scores.items()}
    metrics.update(lab.spent())
    return longest_ago(method.history, lowest), metrics


SCHEDULES = {
    "search": choose_by_search,
    "lowest_score": choose_lowest_score,
    "cyclic": choose_cyclic,
    "random": choose_random,
}

# ---------------------------------------------------------------------- all classes at once


def contraction_metrics(
    judged: list[tuple[Rubric, Matrix]],
    class_by: str = "axis",
) -> dict[str, float]:
    """What a step's groups show of the contraction.

    judged: (rubric, verdicts [G][K]) per group. Means over those without a missing verdict:

      var_ratio                    Var(sum_c w_c r_c) / sum_c w_c Var(r_c); as a mean of ratios it
                                   is biased low in small groups of positively correlated classes
      std_scalar, std/<class>      std within the group
      dead_scalar, dead/<class>    share of groups without any spread
      corr/<a>/<b>                 correlation of two classes within a group

    The scalar is HealthBench's score, which counts the classes of penalties only as well.
    """
    values = defaultdict(list)
    for rubric, matrix in judged:
        # A missing verdict is replaced by its column's mean, which hides variance: leave out.
        if any(None in row for row in matrix):
            continue
        rewards = class_rewards(rubric, matrix, class_by)
        weights = class_weights(rubric, class_by)

        # Weights and rewards have the classes in the same order, that of the rubric. Where no
        # class has any spread, there is nothing to contract.
        of_sum, of_classes = contraction(list(weights.values()), list(rewards.values()))
        if of_classes > ZERO_STD**2:
            values["var_ratio"].append(of_sum / of_classes)
        else:
            values["var_ratio"].append(math.nan)

        # What a scalar reward would learn from, in the same group.
        scalar = [points_reward(rubric, row) for row in matrix]
        spread = statistics.pstdev(scalar)
        values["std_scalar"].append(spread)
        values["dead_scalar"].append(float(spread <= ZERO_STD))

        # What the turn of each class would learn from.
        for name, row in rewards.items():
            spread = statistics.pstdev(row)
            values[f"std/{name}"].append(spread)
            values[f"dead/{name}"].append(float(spread <= ZERO_STD))

        # Each pair once, named in alphabetical order whatever the order in the rubric.
        for a in rewards:
            for b in rewards:
                if a < b:
                    values[f"corr/{a}/{b}"].append(correlation(rewards[a], rewards[b]))
    return {key: nanmean(values[key]) for key in sorted(values)}


def mean_over_classes(rewards: dict[str, list[float]]) -> list[float]:
    """[G]: every class counts alike, however many points it has.

    >>> mean_over_classes({"accuracy": [1.0, 0.0], "completeness": [0.5, 0.5]})
    [0.75, 0.25]
    """
    return [statistics.fmean(row) for row in zip(*rewards.values())]


def normalise(rewards: list[float]) -> list[float]:
    """(r - mean) / std [G] over the scored rewards; 0 where there is no spread or no reward."""
    # The population std, as in grpo.advantages.
    scored = drop_nan(rewards)
    spread = statistics.pstdev(scored) if scored else 0.0

    # All alike: the class says nothing about which rollout is better.
    if spread <= ZERO_STD:
        return [0.0] * len(rewards)

    mean = statistics.fmean(scored)
    normalised = []
    for reward in rewards:
        # What was not scored moves neither up nor down.
        if math.isnan(reward):
            normalised.append(0.0)
        else:
            normalised.append((reward - mean) / spread)
    return normalised


def gdpo(groups: list[dict[str, list[float]]]) -> list[list[float]]:
    """Advantages [P][G] by group-decoupled normalisation (GDPO, arXiv 2601.05242).

    groups: for each, class -> rewards [G]. Each class is normalised in its group, the classes
    are added, and the sums are normalised over the batch. Added first and normalised after, the
    class with the widest spread would drown the others.

    >>> [advantages] = gdpo([{"accuracy": [1, 1, 0], "tone": [0.01, 0.02, 0.02]}])
    >>> [round(a, 2) for a in advantages]
    [-0.71, 1.41, -0.71]
    """
    # Within a group: after normalising, every class has the same say.
    sums = []
    for rewards in groups:
        normalised = [normalise(row) for row in rewards.values()]
        sums.append([sum(column) for column in zip(*normalised)])

    # Over the batch: more classes make larger sums, and the step size should not follow them.
    batch = []
    for row in sums:
        batch.extend(row)
    batch = normalise(batch)

    # Cut the batch into its groups again. They may differ in size.
    advantages = []
    start = 0
    for row in sums:
        advantages.append(batch[start : start + len(row)])
        start += len(row)
    return advantages


class AxisMean(RubricReward):
    """A scalar reward: the mean of the class rewards, however many points a class has."""

    def can_learn_from(self, example: Example) -> bool:
        """Whether any class of the example has a reward."""
        return bool(meta_classes(example.rubric, self.config.class_by))

    def aggregate(self, rubric: Rubric, matrix: Matrix) -> list[float]:
        """The group's rewards [G] from its verdicts [G][K]."""
        rewards = mean_over_classes(class_rewards(rubric, matrix, self.config.class_by))
        return clip_rewards(rewards, self.config.advantage)

    def after_step(self, groups: list[Group]) -> dict:
        """Returns what the step shows of variance contraction."""
        # Every group was judged by its full rubric, so all classes can be compared within it.
        judged = []
        for _, rollouts in groups:
            judged.append((rollouts[0].criteria, score_matrix(rollouts)))
        metrics = {"dead": dead_share(groups)}
        metrics.update(contraction_metrics(judged, self.config.class_by))
        return metrics


class GDPO(AxisMean):
    """All classes at once, each normalised by itself, see `gdpo`.

    `reward` and `dead` in the log are those of AxisMean, the mean of the classes; nothing is
    learned from them. --advantage has no effect: GDPO is a division by the std.
    """

    def advantages(self, groups: list[Group]) -> list[list[float]]:
        """Advantages [P][G]; class by class they need the verdicts, not the rewards."""
        rewards_of_groups = []
        for _, rollouts in groups:
            matrix = score_matrix(with_text(rollouts))
            by_class = class_rewards(rollouts[0].criteria, matrix, self.config.class_by)

            # Once more, class by class: `score` has applied the rule to the mean only, and the
            # verdicts used here are of the rollouts with text.
            rewards = {}
            for name, row in by_class.items():
                rewards[name] = silence_rule(rollouts, row)
            rewards_of_groups.append(rewards)
        return gdpo(rewards_of_groups)


# ---------------------------------------------------------------------- demo


def simulate(
    rho: float,
    n_classes: int,
    group_size: int,
    n_groups: int,
    rng: random.Random,
) -> tuple[float, float]:
    """(Var(R) / Var(r_c), corr(r_c, R)) of made-up classes of unit spread and correlation rho."""
    weights = [1 / n_classes] * n_classes
    variances_of_sum = []
    variances_of_classes = []
    correlations = []
    for _ in range(n_groups):
        # What makes an answer good in all classes at once. Each class adds its own.
        shared = [rng.gauss(0, 1) for _ in range(group_size)]
        rewards = []
        for _ in range(n_classes):
            # Weights whose squares sum to one keep the spread at 1 and the correlation at rho.
            row = [math.sqrt(rho) * s + math.sqrt(1 - rho) * rng.gauss(0, 1) for s in shared]
            rewards.append(row)

        of_sum, of_classes = contraction(weights, rewards)
        variances_of_sum.append(of_sum)
        variances_of_classes.append(of_classes)

        # One class per group is enough: by symmetry all follow the sum alike.
        scalar = [statistics.fmean(column) for column in zip(*rewards)]
        correlations.append(correlation(rewards[0], scalar))

    # A ratio of sums, not a mean of ratios, which is biased in small groups.
    return sum(variances_of_sum) / sum(variances_of_classes), nanmean(correlations)


def demo(
    n_classes: int = 5,
    group_size: int = 8,
    n_groups: int = 2000,
    seed: int = 0,
) -> list[tuple[float, ...]]:
    """Prints the theorem on made-up classes, measured and predicted.

    Returns (rho, Var(R) / Var(r_c) measured, predicted, corr(r_c, R) measured, predicted) per rho.
    """
    print(f"{n_classes} classes, {n_groups} groups of {group_size}, seed {seed}")
    print("R = mean of the classes\n")
    print("  rho   Var(R) / mean Var(r_c)      corr(r_c, R)")
    print("        measured  1/C+(1-1/C)rho    measured  predicted")

    # From classes that have nothing in common to classes that are all the same.
    rng = random.Random(seed)
    table = []
    for rho in (0.0, 0.3, 0.6, 1.0):
        ratio, corr = simulate(rho, n_classes, group_size, n_groups, rng)

        # By the theorem, and for classes of equal spread corr(r_c, R) is the root of the ratio.
        predicted = 1 / n_classes + (1 - 1 / n_classes) * rho
        predicted_corr = math.sqrt(predicted)
        print(
            f"  {rho:.1f}   {ratio:.3f}     {predicted:.3f}             "
            f"{corr:.3f}     {predicted_corr:.3f}"
        )
        table.append((rho, ratio, predicted, corr, predicted_corr))
    print("\nDividing advantages by the group's std undoes the shrinking,")
    print("not the dilution of corr(r_c, R).")
    print("The correlation is predicted for infinitely many answers: a group of 8 is a bit off.")
    return table


if __name__ == "__main__":
    demo()
