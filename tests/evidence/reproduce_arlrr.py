"""One class of criteria at a time against all at once: ARL-RR beside scalar rewards, offline.

The rubrics are those of five_classes.py: five meta-classes of five checks, decided exactly, so that
what differs between arms is the method and not its judge. Every arm starts from the same model,
sees the same training prompts, does the same number of updates of as many rollouts, and is scored
by the held-out prompts (greedy answers, the whole rubric, exact). Three comparisons:

  equal updates    both arms at their ends
  equal verdicts   each at its last evaluation that had cost no more verdicts than either's total
  equal rollouts   the same for rollouts (a search's trials and validation are counted)

What to expect where nothing but arithmetic is at work, K classes of equal spread, small steps: the
scalar's advantage divides by std(R), which averaging has made sqrt(K) times smaller than std(r_c);
so per update it moves sqrt(K) times as far along each class as a turn of that class divided by K
(laboratory.py). Without the division ("mean") both move alike. A turn pays a K-th of the verdicts.
What differs from this is the finding.

"flip 10 %": a verdict in ten of those that pay is wrong, always the same one for the same text.
"may decline": a search whose trials all made the score worse skips its stage's first update and
searches again.

Intervals and p-values are those of intervals.py: prompts and seeds are resampled together, and
p-values hold for all arms.

    python tests/evidence/reproduce_arlrr.py --jobs 2 --png tests/evidence/arlrr.png
    python tests/evidence/reproduce_arlrr.py --report          # only from the runs that are there
    python tests/evidence/reproduce_arlrr.py --structure data/train.jsonl    # a data set's classes

Finished runs are not run again, and one that was stopped goes on.
"""

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import five_classes
import torch
from intervals import (
    Row,
    compare_pairs,
    comparison_table,
    crossed_bootstrap,
    paired_differences,
    score_table,
)
from runs import flags_of_run, is_finished

import arlrr
import rar
import train as trainer

# What follows the comma changes a method: no division by the std, or how many verdicts are wrong.
SCHEDULE = "--method arlrr --schedule"
ARMS = {
    "scalar": "--method points",
    "axis_mean": "--method axis_mean",
    "gdpo": "--method gdpo",
    "cyclic 1": f"{SCHEDULE} cyclic --stage 1",
    "cyclic 5": f"{SCHEDULE} cyclic --stage 5",
    "random": f"{SCHEDULE} random --stage 5",
    "lowest_score": f"{SCHEDULE} lowest_score --stage 5",
    "search": f"{SCHEDULE} search --stage 5",
    "search, may decline": f"{SCHEDULE} search --stage 5",
    "scalar, mean": "--method points --advantage mean",
    "cyclic 1, mean": f"{SCHEDULE} cyclic --stage 1 --advantage mean",
    "cyclic 5, mean": f"{SCHEDULE} cyclic --stage 5 --advantage mean",
    "scalar, flip 10 %": "--method points",
    "cyclic 1, flip 10 %": f"{SCHEDULE} cyclic --stage 1",
    "scalar, flip 20 %": "--method points",
    "cyclic 1, flip 20 %": f"{SCHEDULE} cyclic --stage 1",
}
# An arm is compared with the scalar reward under the same change.
BASES = {}
for name in ARMS:
    _, comma, change = name.partition(", ")
    base = "scalar"
    if comma and change != "may decline":
        base = f"scalar, {change}"
    if name != base:
        BASES[name] = base
# Comparisons within turn-taking: by the length of a stage, and by who chooses.
OTHERS = {
    "cyclic 5": "cyclic 1",
    "cyclic 5, mean": "cyclic 1, mean",
    "random": "cyclic 5",
    "lowest_score": "cyclic 5",
    "search": "cyclic 5",
}
STEPS = 25
GROUP_SIZE = 8
FLAGS = (
    f"--judge lexical --prompts 8 --prompts_per_step 2 --group_size {GROUP_SIZE} "
    "--max_new_tokens 56 --lr 1e-4 --beta -1 --validation 8 --eval_every 5 --save_every 5"
)
COLORS = {
    "scalar": "black", "axis_mean": "gray", "gdpo": "green", "cyclic 1": "blue",
    "cyclic 5": "deepskyblue", "random": "orange", "lowest_score": "brown", "search": "red",
}  # fmt: skip
STYLES = {"mean": "--", "flip 10 %": "-.", "flip 20 %": ":", "may decline": ":"}
# The picture's columns: title, and the changes whose arms are drawn beside scalar and cyclic 1.
PANELS = {
    "which class is next": ("", "may decline"),
    "without division by the std": ("mean",),
    "wrong verdicts": ("flip 10 %", "flip 20 %"),
}
COSTS = ("updates", "rollouts", "verdicts", "tokens", "seconds")


# ---------------------------------------------------------------------- the runs


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """An arm's name without what shells and file systems stumble over."""
    name = arm.replace(", ", "-").replace(" %", "").replace(" ", "_")
    return out / f"{name}-{seed}"


def train(out: Path, arm: str, seed: int, threads: int) -> None:
    """One training run in a process of its own: new, resumed, or done before."""
    folder = folder_of(out, arm, seed)
    if is_finished(folder, STEPS):
        return
    flags = [*FLAGS.split(), *ARMS[arm].split(), "--seed", str(seed), "--steps", str(STEPS)]
    flags += ["--data", str(out / "train.jsonl"), "--eval_data", str(out / "heldout.jsonl")]
    flags = flags_of_run(folder, flags)

    command = [sys.executable, __file__, "--run", arm, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(out / f"{folder.name}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    outcome = "done" if done.returncode == 0 else f"failed, see {folder.name}.log"
    print(f"{arm}, seed {seed}: {outcome}", flush=True)


# ---------------------------------------------------------------------- what no flag changes


def flipped_questions(questions, rate: float, seed: int):
    """The method's `questions` with a share of wrong verdicts, the same for the same text."""

    def flipped(example: rar.Example, response: str, rubric: rar.Rubric) -> list:
        """The verdicts on a response; all of them are checks here."""
        verdicts = []
        for criterion, verdict in zip(rubric, questions(example, response, rubric)):
            # A judge at temperature 0 errs again on the same text.
            draw = random.Random(f"{seed}-{example.id}-{criterion.check}-{response}").random()
            if draw < rate:
                verdict = verdict._replace(score=1 - verdict.score)
            verdicts.append(verdict)
        return verdicts

    return flipped


class DecliningARLRR(arlrr.ARLRR):
    """A search that found every trial worse than doing nothing does nothing, and searches again."""

    @property
    def has_declined(self) -> bool:
        """Whether the last stage's trials all lowered the score."""
        gains = []
        for name, value in self.history[-1].items():
            if name.startswith("trial/"):
                gains.append(value)
        return bool(gains) and max(gains) < 0

    def before_step(self, step: int, examples: list, lab=None) -> dict:
        """A stage that was declined ends after one step."""
        if self.history and self.has_declined and step > self.history[-1]["step"]:
            # By the rule of the base class: a stage has ended when its first step is long ago.
            self.history[-1]["step"] = step - self.config.stage
        self.is_choosing = True
        metrics = super().before_step(step, examples, lab)
        self.is_choosing = False
        return metrics | {"declined": float(self.has_declined)}

    def advantages(self, groups: list) -> list[list[float]]:
        """No advantage, no update. Trials, which are made while it chooses, are ordinary ones."""
        rows = super().advantages(groups)
        if self.is_choosing or not self.has_declined:
            return rows
        return [[0.0] * len(row) for row in rows]


def run_arm(arm: str, argv: list[str]) -> int:
    """train.py with the arm's change. Returns its exit status."""
    make_method = trainer.make_method

    def make_changed_method(config, judge):
        """The method of the settings, or with a change."""
        if arm.endswith("may decline"):
            return DecliningARLRR(judge, config)
        method = make_method(config, judge)
        if "flip" in arm:
            rate = int(arm.split()[-2]) / 100
            method.questions = flipped_questions(method.questions, rate, config.seed)
        return method

    trainer.make_method = make_changed_method
    return trainer.main(argv)


# ---------------------------------------------------------------------- costs and scores


def spent(rows: list[dict], step: int) -> Counter:
    """What a run had cost up to a step: its training and its search."""
    total = Counter()
    for row in rows:
        if not 0 < row["step"] <= step:
            continue
        total["updates"] += 1
        for key in ("rollouts", "verdicts", "tokens"):
            total[key] += row[key]
        for key in ("rollout", "judge", "train"):
            total["seconds"] += row[f"seconds_{key}"]
        for key in COSTS:
            total[key] += row.get(f"search_{key}", 0)
    return total


def share_alike(rows: list[dict]) -> float:
    """The share of a run's groups whose rollouts all earn the same: they teach nothing."""
    alike = 0
    groups = 0
    for row in rows:
        if row["step"] > 0:
            alike += row["zero_std_groups"]
            groups += row["rollouts"] / GROUP_SIZE
    return alike / groups


def held_out(folder: Path, seed: int, step: int) -> list[Row]:
    """(prompt, seed, held-out score) at a step."""
    rows = []
    for row in trainer.read_log(folder / "samples.jsonl"):
        if row["split"] == "heldout" and row["step"] == step:
            score = math.nan if row["reward"] is None else row["reward"]
            rows.append((row["id"], seed, score))
    return rows


# ---------------------------------------------------------------------- the tables


def print_row(cells: list) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def print_head(cells: list) -> None:
    print_row(cells)
    print_row(["---"] * len(cells))


def arm_table(out: Path, runs: dict[str, list[int]], logs: dict) -> None:
    """Score and cost of every arm, and how many of its groups had nothing to tell apart."""
    print_head(["arm", "seeds", "held-out score", "groups alike", *COSTS])
    for arm, seeds in runs.items():
        rows = []
        for seed in seeds:
            rows += held_out(folder_of(out, arm, seed), seed, STEPS)
        score = crossed_bootstrap(score_table(rows))
        cost = [spent(logs[arm, seed], STEPS) for seed in seeds]
        means = [f"{statistics.fmean(c[key] for c in cost):,.0f}" for key in COSTS]
        cell = f"{score.mean:.3f} ({score.low:.3f} to {score.high:.3f})"
        alike = statistics.fmean(share_alike(logs[arm, seed]) for seed in seeds)
        print_row([arm, len(seeds), cell, f"{alike:.0%}", *means])


def paid_up_to(rows: list[dict], cost: str, budget: float) -> int:
    """The last evaluated step up to which a run had cost no more than the budget."""
    steps = [row["step"] for row in rows if "eval_score" in row]
    return max(step for step in steps if spent(rows, step)[cost] <= budget)


def difference_tables(out: Path, runs: dict[str, list[int]], logs: dict) -> None:
    """Every arm against its scalar one, at equal updates, verdicts and rollouts."""
    for cost in ("updates", "verdicts", "rollouts"):
        pairs = {}
        places = []
        for arm, seeds in runs.items():
            base = BASES.get(arm)
            before = []
            after = []
            for seed in seeds:
                if seed not in runs.get(base, []):
                    continue
                # What both can afford: the smaller of the two totals.
                logs_of_pair = (logs[arm, seed], logs[base, seed])
                budget = min(spent(rows, STEPS)[cost] for rows in logs_of_pair)
                step, base_step = [paid_up_to(rows, cost, budget) for rows in logs_of_pair]
                after += held_out(folder_of(out, arm, seed), seed, step)
                before += held_out(folder_of(out, base, seed), seed, base_step)
            if after:
                pairs[arm] = (before, after)
                places.append(f"{arm} {step} against {base_step}")
        if pairs:
            print(f"\nAgainst the scalar arm, equal {cost}:\n")
            print(comparison_table(compare_pairs(pairs)))
            print(f"\nSteps compared (last seed): {'; '.join(places)}.")


def at_end(out: Path, runs: dict[str, list[int]], arm: str) -> list[Row]:
    """(prompt, seed, held-out score) of an arm's last step."""
    rows = []
    for seed in runs[arm]:
        rows += held_out(folder_of(out, arm, seed), seed, STEPS)
    return rows


def more_tables(out: Path, runs: dict[str, list[int]]) -> None:
    """At the ends of runs: arms against others than the scalar, and what a change changes."""
    others = {}
    for arm, other in OTHERS.items():
        if arm in runs and other in runs:
            others[f"{arm} - {other}"] = (at_end(out, runs, other), at_end(out, runs, arm))

    # An arm under a change against itself without; and the difference to the scalar, likewise.
    without = {}
    differences = {}
    for arm in runs:
        plain, _, change = arm.partition(", ")
        scalar = f"scalar, {change}"
        if not change or not {plain, "scalar"} <= runs.keys():
            continue
        changed = at_end(out, runs, arm)
        unchanged = at_end(out, runs, plain)
        without[arm] = (unchanged, changed)
        if plain != "scalar" and scalar in runs:
            before = paired_differences(unchanged, at_end(out, runs, "scalar"))
            after = paired_differences(changed, at_end(out, runs, scalar))
            differences[arm] = (before, after)

    titles = {
        "Arms against one another, equal updates": others,
        "Each arm against itself without its change": without,
        "What the change adds to the difference to the scalar": differences,
    }
    for title, pairs in titles.items():
        if pairs:
            print(f"\n{title}:\n")
            print(comparison_table(compare_pairs(pairs)))


def alike_table(runs: dict[str, list[int]], logs: dict) -> None:
    """The share of groups whose rollouts all earn the same, by the class that is optimised."""
    shares = defaultdict(list)
    for arm, seeds in runs.items():
        for seed in seeds:
            for row in logs[arm, seed]:
                if row["step"] > 0 and "class" in row:
                    alike = row["zero_std_groups"] * GROUP_SIZE / row["rollouts"]
                    shares[arm, row["class"]].append(alike)
    print("\nGroups alike by class (updates of it in all seeds):\n")
    for (arm, name), values in sorted(shares.items()):
        print(f"{arm}, {name}: {statistics.fmean(values):.0%} ({len(values)})")


def axis_table(runs: dict[str, list[int]], logs: dict) -> None:
    """Held-out score within each axis, before and after."""
    start = logs["scalar", runs["scalar"][0]][0]
    low, high = start["eval_ci"]
    print(f"\nBefore training: {start['eval_score']:.3f} ({low:.3f} to {high:.3f}), every arm.\n")
    axes = sorted(key for key in start if key.startswith("eval_axis/"))
    print_head(["arm", *[axis.split("/")[1].replace("_", " ") for axis in axes]])
    print_row(["before training", *[f"{start[axis]:.3f}" for axis in axes]])
    for arm, seeds in runs.items():
        cells = [arm]
        for axis in axes:
            ends = [logs[arm, seed][-1][axis] for seed in seeds]
            cells.append(f"{statistics.fmean(ends):.3f} ± {statistics.pstdev(ends):.3f}")
        print_row(cells)
    print("\n± is the std over seeds.\n")


def measured_contraction(out: Path, seeds: list[int]) -> list[dict]:
    """What `arlrr.contraction_metrics` says of each step of the scalar arm, from its samples."""
    rubrics = {}
    for example in rar.read_examples(out / "train.jsonl"):
        rubrics[example.id] = example.rubric

    steps = []
    for seed in seeds:
        groups = defaultdict(lambda: defaultdict(list))
        for row in trainer.read_log(folder_of(out, "scalar", seed) / "samples.jsonl"):
            if row["split"] == "train":
                scores = [verdict["score"] for verdict in row["verdicts"]]
                groups[row["step"]][row["id"]].append(scores)
        for of_step in groups.values():
            judged = [(rubrics[prompt], matrix) for prompt, matrix in of_step.items()]
            steps.append(arlrr.contraction_metrics(judged))
    return steps


def contraction_table(out: Path, runs: dict[str, list[int]], logs: dict) -> None:
    """Variance contraction in the scalar arm, and groups without spread in every arm."""
    steps = measured_contraction(out, runs["scalar"])
    names = {
        "var_ratio": "Var(R) / sum w Var(r_c)",
        "std_scalar": "std of R in a group",
        "dead_scalar": "groups without spread in R",
    }
    for name in five_classes.COMMON | {"wording": []}:
        names[f"std/{name}"] = f"std of {name}"
    print_head(["measured on the scalar arm's rollouts", "mean over steps and seeds"])
    for key, name in names.items():
        values = [row[key] for row in steps if key in row]
        low, high = rar.bootstrap(values)
        print_row([name, f"{rar.nanmean(values):.3f} ({low:.3f} to {high:.3f})"])

    correlations = defaultdict(list)
    for row in steps:
        for key, value in row.items():
            if key.startswith("corr/") and not math.isnan(value):
                correlations[key.removeprefix("corr/").replace("/", " and ")].append(value)
    cells = []
    for pair, values in sorted(correlations.items()):
        cells.append(f"{pair} {statistics.fmean(values):+.2f} ({len(values)})")
    print("\nCorrelation of two classes within a group (steps behind it): ", end="")
    print("; ".join(cells) + ".")

    turns = Counter()
    for arm in ("search", "search, may decline", "random", "lowest_score"):
        for seed in runs.get(arm, []):
            for row in logs[arm, seed]:
                if row.get("stage"):
                    turns[arm, row["class"]] += 1
    cells = [f"{arm} {name} {count}" for (arm, name), count in sorted(turns.items())]
    print("\nStages by class: " + "; ".join(cells) + ".")


def report(out: Path, runs: dict[str, list[int]]) -> None:
    """All tables."""
    logs = {}
    for arm, seeds in runs.items():
        for seed in seeds:
            logs[arm, seed] = trainer.read_log(folder_of(out, arm, seed) / "metrics.jsonl")
    arm_table(out, runs, logs)
    difference_tables(out, runs, logs)
    more_tables(out, runs)
    alike_table(runs, logs)
    axis_table(runs, logs)
    contraction_table(out, runs, logs)


def curve(out: Path, arm: str, seeds: list[int]) -> dict[str, list[float]]:
    """An arm at each evaluation: updates, verdicts paid, mean over seeds, its standard error."""
    logs = [trainer.read_log(folder_of(out, arm, seed) / "metrics.jsonl") for seed in seeds]
    points = defaultdict(list)
    for step in [row["step"] for row in logs[0] if "eval_score" in row]:
        scores = []
        for rows in logs:
            scores += [row["eval_score"] for row in rows if row["step"] == step]
        error = 0.0
        if len(scores) > 1:
            error = statistics.stdev(scores) / math.sqrt(len(scores))
        points["updates"].append(step)
        points["verdicts"].append(statistics.fmean(spent(rows, step)["verdicts"] for rows in logs))
        points["mean"].append(statistics.fmean(scores))
        points["error"].append(error)
    return points


def draw(out: Path, runs: dict[str, list[int]], path: str) -> None:
    """Held-out score over updates and over verdicts: mean of the seeds, band of their error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 7), layout="constrained", sharey=True)
    for column, (title, changes) in enumerate(PANELS.items()):
        for arm, seeds in runs.items():
            name, _, change = arm.partition(", ")
            if arm not in ("scalar", "cyclic 1") and change not in changes:
                continue
            points = curve(out, arm, seeds)
            lows = [mean - error for mean, error in zip(points["mean"], points["error"])]
            highs = [mean + error for mean, error in zip(points["mean"], points["error"])]
            style = {"color": COLORS[name], "linestyle": STYLES.get(change, "-")}
            for row, cost in enumerate(("updates", "verdicts")):
                axis = grid[row][column]
                axis.plot(points[cost], points["mean"], marker=".", label=arm, **style)
                axis.fill_between(points[cost], lows, highs, color=COLORS[name], alpha=0.08)

        grid[0][column].set_title(title, fontsize=10)
        # Between the two rows, where it covers no curve.
        grid[0][column].legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        grid[0][column].set_xlabel("updates", fontsize=9)
        grid[1][column].set_xlabel("verdicts paid, search included", fontsize=9)
        grid[1][column].set_xscale("symlog", linthresh=100)
        for row in (0, 1):
            grid[row][column].grid(alpha=0.25)
    for row in (0, 1):
        grid[row][0].set_ylabel("held-out score", fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------- the classes of a data set


def structure(examples: list[rar.Example], class_by: str = "axis") -> list[dict]:
    """One row per class: its criteria, its prompts, and what judging a stage of it costs.

    class, items; share: of all criteria; negative: share with a negative weight; prompts: share
    that can be rolled out for it; items_per_prompt and one_item: of these; weight: mean w_c;
    verdicts: a stage's per prompt, in parts of those that the full rubric needs.
    """
    criteria_of = defaultdict(lambda: defaultdict(list))
    weights_of = defaultdict(float)
    total = 0
    for example in examples:
        total += len(example.rubric)
        for criterion in example.rubric:
            name = arlrr.class_of(criterion, class_by)
            criteria_of[name][example.id].append(criterion)
        for name, weight in arlrr.class_weights(example.rubric, class_by).items():
            weights_of[name] += weight

    table = []
    for name, of_prompt in criteria_of.items():
        items = 0
        negative = 0
        sizes = []
        for criteria in of_prompt.values():
            below = sum(c.weight < 0 for c in criteria)
            items += len(criteria)
            negative += below
            # Without a positive criterion the prompt is not rolled out for this class.
            if below < len(criteria):
                sizes.append(float(len(criteria)))
        per_prompt = rar.nanmean(sizes)
        table.append({
            "class": name,
            "items": items,
            "share": items / total,
            "negative": negative / items,
            "prompts": len(sizes) / len(examples),
            "items_per_prompt": per_prompt,
            "one_item": rar.nanmean([float(size == 1) for size in sizes]),
            "weight": weights_of[name] / len(examples),
            "verdicts": per_prompt / (total / len(examples)),
        })
    return sorted(table, key=lambda row: -row["items"])


def print_structure(path: str, class_by: str) -> None:
    """The table of `structure`. Raises DataError."""
    examples = rar.read_examples(path)
    arlrr.check_classes(examples, class_by)
    total = sum(len(example.rubric) for example in examples)
    print(f"{len(examples)} prompts, {total} criteria. verdicts: a stage's per prompt, in parts of")
    print("those of the full rubric\n")
    head = ["items", "share", "negative", "prompts", "items/prompt", "one item", "weight"]
    print(f"{'class':<24}" + "".join(f"{name:>14}" for name in [*head, "verdicts"]))
    for row in structure(examples, class_by):
        line = f"{row['class']:<24}{row['items']:>14}{row['share']:>14.0%}{row['negative']:>14.0%}"
        line += f"{row['prompts']:>14.0%}{row['items_per_prompt']:>14.1f}{row['one_item']:>14.0%}"
        print(line + f"{row['weight']:>14.0%}{row['verdicts']:>14.0%}")


# ---------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 without a run to compare with, 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/reproduce_arlrr", help="folder of the runs")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--png", default="", help="where the picture goes")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--structure", metavar="FILE", help="only print a data set's classes")
    parser.add_argument("--class_by", default="axis", help="axis, category, or the kind of a tag")
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["--run"]:
        # A process of one run, see `train`.
        return run_arm(argv[1], argv[2:])
    args = parser.parse_args(argv)
    if args.structure:
        try:
            print_structure(args.structure, args.class_by)
        except rar.DataError as error:
            print(f"reproduce_arlrr.py: {error}", file=sys.stderr)
            return 2
        return 0

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    five_classes.write(out)
    if not args.report:
        threads = max(1, torch.get_num_threads() // args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            for seed in args.seeds:
                for arm in args.arms:
                    pool.submit(train, out, arm, seed, threads)

    runs = {}
    for arm in args.arms:
        seeds = [seed for seed in args.seeds if is_finished(folder_of(out, arm, seed), STEPS)]
        if seeds:
            runs[arm] = seeds
    if "scalar" not in runs:
        print("no finished scalar run to compare with", file=sys.stderr)
        return 1
    report(out, runs)
    if args.png:
        draw(out, runs, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
