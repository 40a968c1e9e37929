"""How sure a difference between two arms of a study is: the statistics of every table, once.

A study runs each arm with several seeds and scores every run on the same prompts. The scores of
one prompt under three seeds are no three independent values: a hard prompt is hard in all of them.
Nor are the scores of one seed on 24 prompts: a lucky run is lucky on many. So

1. differences are paired: the same prompt and seed under both arms;
2. whole prompts are resampled, and whole seeds, both at once (the crossed bootstrap of Owen 2007,
   "The pigeonhole bootstrap"), which errs towards wide intervals;
3. of n prompts or seeds n - 1 are drawn (Rao and Wu 1988): drawing n understates the variance of a
   mean by (n - 1) / n, a third for 3 seeds;
4. with few seeds the t interval over the seeds' means stands beside it, because no resampling of
   three values knows their tails; believe the wider one: the p-value is the larger of the two;
5. an arm that is the best of several is so by luck too: p-values are corrected for the number of
   arms compared (Holm 1979).

    from intervals import compare_arms, comparison_table
    print(comparison_table(compare_arms(arms, baseline="points")))

arms: {name: rows}, rows: (prompt, seed, score). The module is not called statistics, because
scripts in this folder would then import it in place of Python's.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
# Student's t, 97.5 % quantile, by degrees of freedom 1 to 30; beyond that 2.04 to 1.96.
T_QUANTILES = [
    12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
]  # fmt: skip

# A spread up to here is none: equal values have one of 1e-17 by rounding (rar.py has the same).
ZERO_STD = 1e-6

Row = tuple[str, int, float]  # prompt, seed, score


class Interval(NamedTuple):
    """A mean with its 95 % interval and the two-sided p-value of "the mean is 0"."""

    mean: float
    low: float
    high: float
    p: float


class Comparison(NamedTuple):
    """An arm minus the baseline.

    crossed: over prompts and seeds. seeds: Student's t over the seeds' mean differences.
    p_holm: the larger p-value of the two, corrected for the number of arms compared.
    """

    arm: str
    crossed: Interval
    seeds: Interval
    p_holm: float
    n_prompts: int
    n_seeds: int


# ------------------------------------------------------------------------- from rows to a table


def score_table(rows: list[Row]) -> np.ndarray:
    """Scores [prompts, seeds], nan where a run has no score on a prompt.

    >>> score_table([("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.1)])
    array([[0.5, 0.7],
           [0.1, nan]])
    """
    prompts = sorted({prompt for prompt, _, _ in rows})
    seeds = sorted({seed for _, seed, _ in rows})
    table = np.full((len(prompts), len(seeds)), math.nan)
    for prompt, seed, score in rows:
        place = (prompts.index(prompt), seeds.index(seed))
        # A cell that is filled twice means that two runs have been mixed.
        if not math.isnan(table[place]):
            raise ValueError(f"prompt {prompt!r} has two scores with seed {seed}")
        table[place] = score
    return table


def paired_differences(rows: list[Row], baseline: list[Row]) -> list[Row]:
    """The arm's score minus the baseline's, for each prompt and seed that both have.

    >>> paired_differences([("a", 0, 0.75), ("b", 0, 0.5)], [("a", 0, 0.25), ("c", 0, 0.1)])
    [('a', 0, 0.5)]
    """
    score_of = {(prompt, seed): score for prompt, seed, score in baseline}
    differences = []
    for prompt, seed, score in rows:
        difference = score - score_of.get((prompt, seed), math.nan)
        # What one of the two could not score says nothing about their difference.
        if not math.isnan(difference):
            differences.append((prompt, seed, difference))
    return differences


# ------------------------------------------------------------------------- intervals


def draws(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """How often each of n clusters is drawn, per resample: [resamples, n]."""
    # A single one cannot be resampled: the interval then says nothing about others.
    if n == 1:
        return np.ones((resamples, 1))
    return rng.multinomial(n - 1, [1 / n] * n, size=resamples).astype(float)


def crossed_bootstrap(table: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of a table [prompts, seeds] with its 95 % percentile interval, repeatable.

    Each resample draws prompts and seeds independently; a cell counts as often as its prompt
    times its seed was drawn. nan cells count nowhere.

    >>> crossed_bootstrap(np.array([[0.25, 0.25], [0.25, 0.25]]))
    Interval(mean=0.25, low=0.25, high=0.25, p=0.0002)
    >>> crossed_bootstrap(np.array([[0.5]]))
    Interval(mean=0.5, low=nan, high=nan, p=nan)
    """
    scored = ~np.isnan(table)
    mean = float(table[scored].mean()) if scored.any() else math.nan
    if scored.sum() < 2:
        return Interval(mean, math.nan, math.nan, math.nan)

    rng = np.random.default_rng(seed)
    n_prompts, n_seeds = table.shape
    prompt_draws = draws(rng, n_prompts, resamples)
    seed_draws = draws(rng, n_seeds, resamples)

    # Sums over the drawn cells; a resample that hits holes only has no mean.
    sums = (prompt_draws @ np.nan_to_num(table) * seed_draws).sum(1)
    counts = (prompt_draws @ scored.astype(float) * seed_draws).sum(1)
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [0.025, 0.975])

    # The p-value that goes with a percentile interval: below 0.05 where 0 is outside. Plus 1:
    # no number of resamples proves that something never happens.
    below = int((means <= 0).sum())
    above = int((means >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1))
    return Interval(mean, round(float(low), 4), round(float(high), 4), round(p, 4))


def t_interval(values: list[float]) -> Interval:
    """Mean, 95 % interval and p-value of independent values by Student's t.

    >>> t_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.4841, high=4.4841, p=0.0742)
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan)
    quantile = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    spread = float(np.std(values, ddof=1))
    error = spread / math.sqrt(n)

    # Without any spread the values say that they are never another one: no test can use that.
    p = math.nan
    if spread > ZERO_STD:
        p = round(t_tail(mean / error, n - 1), 4)
    half = quantile * error
    return Interval(mean, round(mean - half, 4), round(mean + half, 4), p)


def t_tail(t: float, degrees: int) -> float:
    """How likely Student's t is to be at least this far from 0, on either side.

    The finite series for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3, 26.7.4).

    >>> [round(t_tail(t, degrees), 4) for t, degrees in ((12.7062, 1), (4.30265, 2), (2.262, 9))]
    [0.05, 0.05, 0.05]
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine = math.sin(angle)
    cosine = math.cos(angle)

    # The series of an odd number begins with cos, that of an even number with 1; each term comes
    # from the one before it.
    is_odd = degrees % 2 == 1
    power = 1 if is_odd else 0
    term = cosine if is_odd else 1.0
    total = 0.0
    while power <= degrees - 2:
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
        power += 2

    inside = sine * total
    if is_odd:
        inside = 2 / math.pi * (angle + inside)
    return 1 - inside


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's correction: p-values that hold for all comparisons together.

    The smallest is multiplied by the number of comparisons, the next by one less, and so on; none
    may be smaller than one before it.

    >>> adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    >>> {name: round(p, 3) for name, p in adjusted.items()}
    {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': 0.02}
    """
    # What could not be tested (nan) is no comparison.
    tested = [name for name in p_values if not math.isnan(p_values[name])]
    adjusted = dict.fromkeys(p_values, math.nan)
    largest = 0.0
    for rank, name in enumerate(sorted(tested, key=lambda name: p_values[name])):
        largest = max(largest, (len(tested) - rank) * p_values[name])
        adjusted[name] = min(1.0, largest)
    return adjusted


# ------------------------------------------------------------------------- a study's table


def seed_means(rows: list[Row]) -> list[float]:
    """The mean score of each seed's run."""
    scores_of = defaultdict(list)
    for _, seed, score in rows:
        scores_of[seed].append(score)
    return [float(np.mean(scores_of[seed])) for seed in sorted(scores_of)]


def compare_arms(arms: dict[str, list[Row]], baseline: str) -> list[Comparison]:
    """Every other arm against the baseline, the largest difference first.

    Raises ValueError for an arm that shares no prompt and seed with the baseline.
    """
    crossed = {}
    by_seed = {}
    shapes = {}
    for arm, rows in arms.items():
        if arm == baseline:
            continue
        differences = paired_differences(rows, arms[baseline])
        if not differences:
            raise ValueError(f"{arm} and {baseline} share no prompt and seed")
        table = score_table(differences)
        crossed[arm] = crossed_bootstrap(table)
        by_seed[arm] = t_interval(seed_means(differences))
        shapes[arm] = table.shape

    # The larger of the two: a resampling of three seeds is too sure of itself.
    p_values = {}
    for arm, interval in crossed.items():
        p_values[arm] = larger_p(interval, by_seed[arm])
    p_holm = holm(p_values)

    comparisons = []
    for arm, interval in crossed.items():
        n_prompts, n_seeds = shapes[arm]
        row = Comparison(arm, interval, by_seed[arm], p_holm[arm], n_prompts, n_seeds)
        comparisons.append(row)
    return sorted(comparisons, key=lambda row: -row.crossed.mean)


def larger_p(crossed: Interval, seeds: Interval) -> float:
    """The p-value of the wider interval; where one has none (a single seed), that of the other."""
    p_values = [interval.p for interval in (crossed, seeds) if not math.isnan(interval.p)]
    return max(p_values, default=math.nan)


def compare_pairs(pairs: dict[str, tuple[list[Row], list[Row]]]) -> list[Comparison]:
    """Comparisons of (before, after), each with a baseline of its own, in the order given.

    The p-values are corrected for the number of pairs.
    """
    comparisons = []
    for name, (before, after) in pairs.items():
        comparisons += compare_arms({name: after, "baseline": before}, "baseline")

    # Each was corrected for itself alone, that is not at all.
    p_holm = holm({row.arm: row.p_holm for row in comparisons})
    return [row._replace(p_holm=p_holm[row.arm]) for row in comparisons]


def comparison_table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table, with the number of arms that were compared."""
    lines = ["| arm | difference | over prompts and seeds | over seeds (t) | p, Holm |"]
    lines.append("|---|---|---|---|---|")
    for row in comparisons:
        cells = [row.arm, f"{row.crossed.mean:+.3f}"]
        for interval in (row.crossed, row.seeds):
            cells.append(f"{interval.low:+.3f} to {interval.high:+.3f}")
        cells.append(f"{row.p_holm:.3f}")
        lines.append("| " + " | ".join(cells) + " |")

    n_prompts = min(row.n_prompts for row in comparisons)
    n_seeds = min(row.n_seeds for row in comparisons)
    sizes = f"{n_prompts} prompts, {n_seeds} seeds"
    lines.append(f"\n95 % intervals, {sizes}; p-values corrected for {len(comparisons)} arms.")
    return "\n".join(lines)
