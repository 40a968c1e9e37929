"""What wrong and failed verdicts do to rubric rewards: two simulated studies, no model, no judge.

All that both know about answers is `simulated_group`: a made-up rubric of HealthBench's shape and
verdicts from a logistic model. Figures are means over seeds 0 to 4; the largest standard error is
printed with them.

  --missing       verdicts fail: by the rule that treats them, the correlation of GRPO's advantages
                  with those of complete verdicts. The rule of `rar.group_rewards` is one of the
                  rows; failures are independent of everything.
  --judge_noise   verdicts are flipped: the share of pairs of answers that a reward still puts in
                  the right order.

    python tests/evidence/reproduce_rar.py --missing
    python tests/evidence/reproduce_rar.py --judge_noise --plot tests/evidence/judge_noise.png

What they do not show: how often a real judge errs or fails, whether its errors come together (a
long answer, a hard item: here they are independent), and whether explicit beats implicit with a
real judge. In the paper implicit wins; a judge that weighs better than the category weights is not
in the model.
"""

import argparse
import math
import random
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from grpo import advantages
from rar import Criterion, explicit_reward, group_rewards, points_reward, satisfied

SEEDS = range(5)


def simulated_group(
    rng: random.Random, size: int = 8, items: int = 12
) -> tuple[list[Criterion], list[list[float]]]:
    """(rubric, verdicts [size][items]) of a made-up group.

    A third of the items are faults, the points are those of HealthBench. Verdicts come from a
    logistic model with a difficulty per item and a quality per answer. Quality raises the chance of
    the good items and lowers that of the faults.
    """
    rubric = []
    for _ in range(items):
        points = rng.choice((3, 5, 7, 10))
        if rng.random() <= 0.33:
            points = -points
        rubric.append(Criterion("", points))
    hard = [rng.gauss(0, 1.5) for _ in rubric]
    quality = [rng.gauss(0, 0.5) for _ in range(size)]

    matrix = []
    for q in quality:
        row = []
        for criterion, h in zip(rubric, hard):
            chance = 1 / (1 + math.exp(h - math.copysign(q, criterion.weight)))
            row.append(float(rng.random() < chance))
        matrix.append(row)
    return rubric, matrix


def left_out(rubric: list[Criterion], scores: list[float | None]) -> float:
    """The points over the criteria that were judged: this compares rollouts on other rubrics."""
    judged = [k for k, score in enumerate(scores) if score is not None]
    return points_reward([rubric[k] for k in judged], [scores[k] for k in judged])


def zero_filled(row: list[float | None]) -> list[float]:
    """The verdicts with a missing one counted as 0."""
    return [0.0 if score is None else score for score in row]


def rewards_by_rule(
    rubric: list[Criterion], full: list[list[float]], holes: list[list[float | None]]
) -> dict[str, list[float]]:
    """Rewards [G] of a group by each rule for what is missing in `holes`."""
    # The criteria of which no verdict failed in the whole group.
    complete = []
    for k, column in enumerate(zip(*holes)):
        if None not in column:
            complete.append(k)
    complete_rubric = [rubric[k] for k in complete]

    dropped = []
    for row in holes:
        dropped.append(left_out(complete_rubric, [row[k] for k in complete]))
    return {
        "complete": [points_reward(rubric, row) for row in full],
        "counted as 0": [points_reward(rubric, zero_filled(row)) for row in holes],
        "left out per rollout": [left_out(rubric, row) for row in holes],
        "criterion dropped for the group": dropped,
        "rollout unscored": [points_reward(rubric, row) for row in holes],
        "group mean (used here)": group_rewards(points_reward, rubric, holes),
    }


def simulate_missing(rate: float, groups: int = 1000, seed: int = 0) -> dict[str, float]:
    """Correlation of the advantages with those of complete verdicts when `rate` of them fail."""
    rng = random.Random(seed)
    rewards = defaultdict(list)
    for _ in range(groups):
        # Every rule sees the same groups and the same failures.
        rubric, full = simulated_group(rng)
        holes = []
        for row in full:
            holes.append([None if rng.random() < rate else score for score in row])
        for rule, values in rewards_by_rule(rubric, full, holes).items():
            rewards[rule].append(values)

    # The advantages are what the policy learns from, so they are compared and not the rewards.
    learned = {}
    for rule, values in rewards.items():
        learned[rule] = advantages(torch.tensor(values), "std").flatten().tolist()
    clean = learned.pop("complete")
    return {rule: statistics.correlation(clean, values) for rule, values in learned.items()}


def to_ten(reward: float) -> int:
    """The reward as one of ten grades."""
    return round(9 * reward)


def simulate_noise(rate: float, groups: int = 400, seed: int = 0) -> dict[str, float]:
    """How often a reward orders two answers right (ties count half) when verdicts are flipped.

    rate: share of flipped verdicts. These are all the assumptions: answers come from
    `simulated_group`; the better of two has the higher Eq. 1 by true verdicts; each verdict is
    flipped independently.

      explicit        Eq. 1 of the flipped verdicts
      implicit-like   the same sum, said as a whole number from 1 to 10: one coarse answer
      Likert-like     without the rubric the judge thinks of half of the criteria, holds them
                      equally important, flips them at the same rate, and says a whole number
                      from 1 to 10

    So implicit-like cannot beat explicit here.
    """
    rng = random.Random(seed)
    right = Counter()
    pairs = 0
    for _ in range(groups):
        rubric, truth = simulated_group(rng)
        seen = []
        for row in truth:
            seen.append([1 - score if rng.random() < rate else score for score in row])

        # What is true, and what each reward makes of what the judge says.
        true_rewards = [explicit_reward(rubric, row) for row in truth]
        explicit = [explicit_reward(rubric, row) for row in seen]
        likert = []
        for row in seen:
            half = zip(rubric[::2], row[::2])
            likert.append(statistics.fmean(satisfied(c, score) for c, score in half))
        by_reward = {
            "explicit": explicit,
            "implicit-like": [to_ten(reward) for reward in explicit],
            "Likert-like": [to_ten(reward) for reward in likert],
        }

        # Only pairs of which one is truly better can be ordered wrong.
        for a in range(len(truth)):
            for b in range(len(truth)):
                if true_rewards[a] <= true_rewards[b] + 1e-9:
                    continue
                pairs += 1
                for name, rewards in by_reward.items():
                    right[name] += order_score(rewards[a], rewards[b])
    return {name: share / pairs for name, share in right.items()}


def order_score(better: float, worse: float) -> float:
    """1 when a reward puts the better answer first, 0.5 for a tie, else 0."""
    if better > worse + 1e-9:
        return 1.0
    if better > worse - 1e-9:
        return 0.5
    return 0.0


def print_study(title: str, simulate, rates: tuple[float, ...]) -> dict[str, list[float]]:
    """A table of means over the seeds: one line per rule or reward, one column per rate."""
    several = defaultdict(list)
    for rate in tqdm(rates, leave=False, disable=None):
        results = [simulate(rate, seed=seed) for seed in SEEDS]
        for name in results[0]:
            several[name].append([result[name] for result in results])

    header = "".join(f"{rate:>8.0%}" for rate in rates)
    print(f"simulated: {title}\n\n{'':<34}{header}")
    table = {}
    errors = []
    for name, columns in several.items():
        table[name] = [statistics.fmean(values) for values in columns]
        errors += [statistics.stdev(values) / len(SEEDS) ** 0.5 for values in columns]
        print(f"{name:<34}" + "".join(f"{value:>8.3f}" for value in table[name]))
    print(f"\nmeans over seeds 0 to 4; standard error at most {max(errors):.4f}")
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


def main(argv: list[str] | None = None) -> int:
    """Command line; one of the two studies must be named."""
    parser = argparse.ArgumentParser(description="Wrong and failed verdicts, simulated.")
    parser.add_argument("--judge_noise", action="store_true", help="flipped verdicts")
    parser.add_argument("--missing", action="store_true", help="failed verdicts")
    default = "judge_noise.png"
    parser.add_argument("--plot", metavar="PNG", default=default, help="for --judge_noise")
    args = parser.parse_args(argv)

    if args.judge_noise:
        rates = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
        title = "share of pairs of answers in the right order, by share of flipped verdicts"
        draw(print_study(title, simulate_noise, rates), rates, args.plot)
    elif args.missing:
        title = "correlation of the advantages with those of complete verdicts, by share that fails"
        print_study(title, simulate_missing, (0.01, 0.02, 0.05, 0.10, 0.25))
    else:
        parser.error("name a study: --missing or --judge_noise")
    return 0


if __name__ == "__main__":
    sys.exit(main())
