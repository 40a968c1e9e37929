"""The statistics of the evidence, against values known from elsewhere and by simulation."""

import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "evidence"))
import intervals
from intervals import (
    crossed_bootstrap,
    holm,
    paired_differences,
    score_table,
    t_interval,
)


def simulated(rng, prompts=24, seeds=3, prompt_std=1.0, seed_std=0.0, noise_std=0.0, mean=0.0):
    """A table [prompts, seeds] of a mean plus an effect per prompt, per seed and per cell."""
    of_prompt = rng.normal(0, prompt_std, (prompts, 1))
    of_seed = rng.normal(0, seed_std, (1, seeds))
    return mean + of_prompt + of_seed + rng.normal(0, noise_std, (prompts, seeds))


def coverage(trials=300, **shape):
    """Share of simulated studies whose interval holds the true mean, 0.3."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(trials):
        interval = crossed_bootstrap(simulated(rng, mean=0.3, **shape), resamples=600)
        hits += interval.low <= 0.3 <= interval.high
    return hits / trials


# ------------------------------------------------------------------------- the interval


def test_the_width_is_that_of_the_clusters():
    """Without noise per cell, three seeds tell nothing that one does not: by arithmetic."""
    rng = np.random.default_rng(1)
    column = rng.normal(0, 1, (40, 1))
    table = np.repeat(column, 3, axis=1)
    interval = crossed_bootstrap(table)
    half = 1.96 * column.std(ddof=1) / math.sqrt(40)
    assert interval.mean == pytest.approx(column.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)
    # Taken as 120 independent values it would be 1.7 times too narrow.
    naive = 1.96 * table.std(ddof=1) / math.sqrt(120)
    assert half / naive == pytest.approx(math.sqrt(3), rel=0.02)


def test_the_width_follows_the_seeds_where_they_differ():
    table = np.tile(np.linspace(-1, 1, 12), (30, 1))
    interval = crossed_bootstrap(table)
    half = 1.96 * table[0].std(ddof=1) / math.sqrt(12)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)


def test_it_covers_what_it_says():
    assert 0.90 <= coverage(prompts=40, seeds=3) <= 0.99  # prompts differ, seeds do not
    assert 0.90 <= coverage(prompts=40, seeds=3, prompt_std=0.7, noise_std=1.0) <= 1.0
    assert 0.88 <= coverage(prompts=40, seeds=10, prompt_std=0.5, seed_std=0.5) <= 0.99


def test_three_seeds_are_too_few_for_a_bootstrap_and_t_says_so():
    rng = np.random.default_rng(2)
    hits = {"bootstrap": 0, "t": 0}
    for _ in range(300):
        table = simulated(rng, prompt_std=0.0, seed_std=1.0)
        both = {
            "bootstrap": crossed_bootstrap(table, resamples=600),
            "t": t_interval(list(table.mean(0))),
        }
        for name, interval in both.items():
            hits[name] += interval.low <= 0 <= interval.high
    assert 0.92 <= hits["t"] / 300 <= 0.98 and hits["bootstrap"] / 300 < 0.9


def test_holes_are_left_out_and_it_is_repeatable():
    rng = np.random.default_rng(3)
    table = simulated(rng, noise_std=0.3)
    table[rng.random(table.shape) < 0.2] = math.nan
    interval = crossed_bootstrap(table)
    assert interval == crossed_bootstrap(table)
    assert interval.mean == pytest.approx(np.nanmean(table))
    assert interval.low < interval.mean < interval.high
    # The order of rows and columns is no information.
    turned = crossed_bootstrap(table[::-1, ::-1])
    assert turned.low == pytest.approx(interval.low, abs=0.05)
    assert math.isnan(crossed_bootstrap(np.full((3, 2), math.nan)).mean)


def test_p_and_the_interval_agree():
    rng = np.random.default_rng(4)
    for _ in range(40):
        interval = crossed_bootstrap(simulated(rng, mean=rng.normal(0, 0.5), noise_std=0.3))
        outside = interval.low > 0 or interval.high < 0
        assert outside == (interval.p < 0.05) or abs(interval.p - 0.05) < 0.005


def test_t_is_the_textbooks():
    # The values of a table of Student's t: 2 and 9 degrees of freedom.
    assert t_interval([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    values = [float(k) for k in range(10)]
    half = 2.2622 * statistics.stdev(values) / math.sqrt(10)
    assert t_interval(values).low == pytest.approx(4.5 - half, abs=1e-4)
    assert math.isnan(t_interval([1.0]).low) and math.isnan(t_interval([]).mean)
    # The 97.5 % quantiles leave 5 % on both sides, whatever the degrees of freedom.
    for degrees, quantile in enumerate(intervals.T_QUANTILES, 1):
        assert intervals.t_tail(quantile, degrees) == pytest.approx(0.05, abs=2e-5)
    assert intervals.t_tail(0.0, 4) == 1 and intervals.t_tail(-2.0, 3) == intervals.t_tail(2.0, 3)


@pytest.mark.parametrize("values", [[0.1] * 3, [0.1 + 0.2, 0.3, 0.3], [0.0] * 3, [1 / 3] * 7])
def test_values_without_any_spread_are_no_test(values):
    """Their standard deviation is 1e-17 by rounding, which made the smallest p-value of all."""
    interval = t_interval(values)
    assert math.isnan(interval.p) and interval.low == interval.high == round(values[0], 4)


def test_the_larger_p_value_counts():
    """Three seeds that agree a little: a resampling is sure, Student's t is not."""
    base = [(prompt, seed, 0.0) for prompt in "abcd" for seed in range(3)]
    arm = [(prompt, seed, 0.1 + 0.2 * seed) for prompt in "abcd" for seed in range(3)]
    [row] = intervals.compare_arms({"arm": arm, "base": base}, "base")
    assert row.crossed.p < 0.05 < row.seeds.p == row.p_holm
    [first, second] = intervals.compare_pairs({"one": (base, arm), "two": (base, arm)})
    assert (first.arm, second.arm) == ("one", "two")
    assert first.p_holm == pytest.approx(2 * row.p_holm)


# ------------------------------------------------------------------------- several arms


def test_holm_by_hand():
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    adjusted = holm(dict(zip("abcde", (0.01, 0.02, 0.03, 0.04, 0.05))))
    assert list(adjusted.values()) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.02}) == {"a": 0.02} and holm({}) == {}
    assert holm({"a": 0.02, "b": math.nan})["a"] == 0.02


def test_holm_keeps_the_promise_over_seven_arms_that_are_all_alike():
    """At most about 5 % of such studies may call any arm different."""
    rng = np.random.default_rng(5)
    wrong = {"plain": 0, "holm": 0}
    for _ in range(100):
        p_values = {}
        for arm in range(7):
            table = simulated(rng, prompts=40, prompt_std=0.5, noise_std=0.5)
            p_values[str(arm)] = crossed_bootstrap(table, resamples=1000).p
        wrong["plain"] += min(p_values.values()) < 0.05
        wrong["holm"] += min(holm(p_values).values()) < 0.05
    assert wrong["holm"] / 100 < 0.1 < wrong["plain"] / 100


def test_arms_are_compared_where_both_have_a_score():
    arms = {"base": [], "better": [], "same": []}
    rng = np.random.default_rng(6)
    for prompt in range(20):
        hard = rng.normal(0, 2)
        for seed in range(3):
            arms["base"].append((f"p{prompt}", seed, hard))
            arms["better"].append((f"p{prompt}", seed, hard + 0.3 + rng.normal(0, 0.1)))
            arms["same"].append((f"p{prompt}", seed, hard + rng.normal(0, 0.1)))
    arms["better"].append(("extra", 0, 100.0))
    arms["same"][0] = ("p0", 0, math.nan)
    better, same = intervals.compare_arms(arms, "base")
    assert (better.arm, better.n_prompts, better.n_seeds) == ("better", 20, 3)
    # Pairing takes out the spread between prompts, which is twenty times as wide.
    assert better.crossed.low > 0.2 and better.crossed.high < 0.4 and better.p_holm < 0.01
    assert same.crossed.low < 0 < same.crossed.high and same.p_holm > 0.05
    table = intervals.comparison_table([better, same])
    assert "20 prompts, 3 seeds" in table and "corrected for 2 arms" in table
    with pytest.raises(ValueError, match="share no prompt"):
        intervals.compare_arms({"a": [("x", 0, 1.0)], "b": [("y", 0, 1.0)]}, "a")


def test_rows_that_were_mixed_are_refused():
    with pytest.raises(ValueError, match="two scores with seed 1"):
        score_table([("a", 1, 0.5), ("a", 1, 0.6)])
    assert paired_differences([("a", 0, 1.0)], [("a", 1, 1.0)]) == []


def test_scripts_of_the_folder_still_have_pythons_statistics():
    folder = ROOT / "tests" / "evidence"
    code = "import sys; sys.path.insert(0, '.'); import statistics; statistics.fmean([1])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
