"""What wrong and failed verdicts do to rubric rewards: two simulated studies, seconds each, no model and no judge.

All that both know about answers is `simulated_group`: a made-up rubric of HealthBench's shape and verdicts from a logistic
model. Figures are means over seeds 0 to 4; the largest standard error is printed with them.

  --missing       verdicts fail: by the rule that treats them, the correlation of GRPO's advantages with those of complete
                  verdicts. The rule of `rar.group_rewards` is one of the rows; failures are independent of everything.
  --judge_noise   verdicts are flipped: the share of pairs of answers that a reward still puts in the right order.

    python tests/reproduce_rar.py --missing                                       # also: python rar.py --missing
    python tests/reproduce_rar.py --judge_noise --plot data/judge_noise.png       # also: python rar.py --judge_noise

What they do not show: how often a real judge errs or fails, whether its errors come together (a long answer, a hard item: here
they are independent), and whether explicit beats implicit with a real judge. In the paper implicit wins; a judge that weighs
better than the category weights is not in the model.
"""

import argparse
import math
import random
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grpo import advantages
from rar import Criterion, explicit_reward, good, group_rewards, points_reward


def simulated_group(rng: random.Random, size: int = 8, items: int = 12) -> tuple[list[Criterion], list[list[float]]]:
    """(rubric, verdicts [size][items]) of a made-up group.

    A third of the items are faults, the points are those of HealthBench; verdicts come from a logistic model with a difficulty
    for each item and a quality for each answer. Quality raises the chance of the good items and lowers that of the faults.
    """
    rubric = [Criterion("", rng.choice((3, 5, 7, 10)) * (1 if rng.random() > 0.33 else -1)) for _ in range(items)]
    hard = [rng.gauss(0, 1.5) for _ in rubric]
    quality = [rng.gauss(0, 0.5) for _ in range(size)]
    chance = lambda q, c, h: 1 / (1 + math.exp(h - math.copysign(q, c.weight)))
    return rubric, [[float(rng.random() < chance(q, c, h)) for c, h in zip(rubric, hard)] for q in quality]


def left_out(rubric: list[Criterion], scores: list[float | None]) -> float:
    """The points over the criteria that were judged: the rule that compares rollouts on different rubrics."""
    judged = [(c, s) for c, s in zip(rubric, scores) if s is not None]
    return points_reward([c for c, _ in judged], [s for _, s in judged])


def simulate_missing(rate: float, groups: int = 1000, seed: int = 0) -> dict[str, float]:
    """Correlation of GRPO's advantages with those of complete verdicts when `rate` of them fail, by rule."""
    rng, rewards = random.Random(seed), {}
    for _ in range(groups):
        rubric, full = simulated_group(rng)
        holes = [[None if rng.random() < rate else v for v in row] for row in full]
        whole = [k for k in range(len(rubric)) if all(row[k] is not None for row in holes)]
        for rule, values in {
            "complete": [points_reward(rubric, row) for row in full],
            "counted as 0": [points_reward(rubric, [v or 0.0 for v in row]) for row in holes],
            "left out per rollout": [left_out(rubric, row) for row in holes],
            "criterion dropped for the group": [left_out([rubric[k] for k in whole], [row[k] for k in whole]) for row in holes],
            "rollout unscored": [points_reward(rubric, row) for row in holes],
            "group mean (used here)": group_rewards(points_reward, rubric, holes),
        }.items():
            rewards.setdefault(rule, []).append(values)
    learned = {rule: advantages(torch.tensor(values)).flatten().tolist() for rule, values in rewards.items()}
    clean = learned.pop("complete")
    return {rule: statistics.correlation(clean, values) for rule, values in learned.items()}


def simulate_noise(rate: float, groups: int = 400, seed: int = 0) -> dict[str, float]:
    """How often a reward orders two answers right (ties count half) when `rate` of the judge's verdicts are flipped.

    These are all the assumptions: answers come from `simulated_group`; the better of two has the higher Eq. 1 by true verdicts;
    each verdict is flipped independently.

      explicit        Eq. 1 of the flipped verdicts
      implicit-like   the same sum, said as a whole number from 1 to 10: the whole rubric in view, one coarse answer
      Likert-like     without the rubric the judge thinks of half of the criteria, holds them equally important, flips them at
                      the same rate, and says a whole number from 1 to 10

    So implicit-like cannot beat explicit here.
    """
    rng, right, pairs = random.Random(seed), Counter(), 0
    to_ten = lambda r: round(9 * r)
    for _ in range(groups):
        rubric, truth = simulated_group(rng)
        seen = [[1 - v if rng.random() < rate else v for v in row] for row in truth]
        half = rubric[::2]
        best = [explicit_reward(rubric, row) for row in truth]
        explicit = [explicit_reward(rubric, row) for row in seen]
        likert = [statistics.fmean(good(c, v) for c, v in zip(half, row[::2])) for row in seen]
        by_reward = {"explicit": explicit, "implicit-like": list(map(to_ten, explicit)), "Likert-like": list(map(to_ten, likert))}
        for a in range(len(truth)):
            for b in range(len(truth)):
                if best[a] > best[b] + 1e-9:
                    pairs += 1
                    for name, r in by_reward.items():
                        right[name] += 1.0 if r[a] > r[b] + 1e-9 else 0.5 if r[a] > r[b] - 1e-9 else 0.0
    return {name: share / pairs for name, share in right.items()}


def print_study(title: str, simulate, rates: tuple[float, ...]) -> dict[str, list[float]]:
    """A table of means over five seeds: one line a rule or reward, one column a rate. Returns the lines."""
    columns = [[simulate(rate, seed=seed) for seed in range(5)] for rate in tqdm(rates, leave=False, disable=None)]
    print(f"simulated: {title}\n\n{'':<34}" + "".join(f"{rate:>8.0%}" for rate in rates))
    several = {name: [[found[name] for found in column] for column in columns] for name in columns[0][0]}
    table = {name: list(map(statistics.fmean, values)) for name, values in several.items()}
    for name, values in table.items():
        print(f"{name:<34}" + "".join(f"{value:>8.3f}" for value in values))
    error = max(statistics.stdev(v) / 5**0.5 for values in several.values() for v in values)
    print(f"\nmeans over seeds 0 to 4; standard error at most {error:.4f}")
    return table


def draw(table: dict[str, list[float]], rates: tuple[float, ...], picture: str) -> None:
    """The table of `simulate_noise` as curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, values in table.items():
        axis.plot(rates, values, marker="o", label=name)
    axis.axhline(0.5, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="share of verdicts flipped", ylabel="pairs in the right order")
    axis.set_title("simulated answers and judge, see simulate_noise")
    axis.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    print(f"\npicture: {picture}")


def main(argv: list[str] | None = None) -> None:
    """Command line; at least one of the two studies must be named. rar.py hands its own arguments on."""
    parser = argparse.ArgumentParser(description="What wrong and failed verdicts do to rubric rewards, simulated.")
    parser.add_argument("--judge_noise", action="store_true", help="what flipped verdicts do to the order of answers")
    parser.add_argument("--plot", metavar="PNG", default="judge_noise.png", help="for --judge_noise: the picture")
    parser.add_argument("--missing", action="store_true", help="what failed verdicts do to the advantages")
    args = parser.parse_args(argv)
    if args.judge_noise:
        rates = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
        title = "share of pairs of answers in the right order, by share of flipped verdicts"
        draw(print_study(title, simulate_noise, rates), rates, args.plot)
    elif args.missing:
        title = "correlation of the advantages with those of complete verdicts, by share of verdicts that fail"
        print_study(title, simulate_missing, (0.01, 0.02, 0.05, 0.10, 0.25))
    else:
        parser.error("name a study: --missing or --judge_noise")


if __name__ == "__main__":
    main()
