"""One class of criteria at a time against all at once: ARL-RR beside scalar rewards, offline.

Every arm starts from the same model, sees the same training prompts, does the same number of
updates of as many rollouts, and is scored by the held-out prompts (greedy answers, the whole
rubric). Two comparisons, because an update of the alternating arms needs a fifth of the verdicts:

  equal updates    the arm at its end beside the scalar arm at its end
  equal verdicts   the arm at its end beside the scalar arm at the evaluation up to which it had
                   paid as many verdicts (trials and validation of a search counted)

The arms with "mean" do not divide advantages by the group's std: if variance contraction is why
alternation helps, it should help more there. `axis_mean` is the scalar that weighs all classes
alike. Contraction is measured on the rollouts of the scalar arm, which are judged by their whole
rubrics.

Intervals and p-values are those of intervals.py: prompts and seeds are resampled together, and
p-values hold for all arms.

    python tests/evidence/reproduce_arlrr.py --jobs 2 --png tests/evidence/arlrr.png
    python tests/evidence/reproduce_arlrr.py --report          # only from the runs that are there
    python tests/evidence/reproduce_arlrr.py --structure data/train.jsonl    # a data set's classes

Finished runs are not run again.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from intervals import (
    Row,
    compare_pairs,
    comparison_table,
    crossed_bootstrap,
    score_table,
)

import arlrr
import rar

ARMS = {
    "scalar": "--method points",
    "cyclic": "--method arlrr --schedule cyclic",
    "search": "--method arlrr --schedule search",
    "random": "--method arlrr --schedule random",
    "scalar, mean": "--method points --advantage mean",
    "cyclic, mean": "--method arlrr --schedule cyclic --advantage mean",
    "axis_mean": "--method axis_mean",
}
# What each arm is compared with: the scalar reward under the same advantages.
BASES = {arm: "scalar" for arm in ARMS if arm != "scalar"}
BASES["cyclic, mean"] = "scalar, mean"
COLORS = {
    "scalar": "black",
    "cyclic": "tab:blue",
    "search": "tab:red",
    "random": "tab:orange",
    "scalar, mean": "tab:gray",
    "cyclic, mean": "tab:cyan",
    "axis_mean": "tab:green",
}
STEPS = 20
FLAGS = (
    "--stage 2 --prompts 8 --prompts_per_step 2 --group_size 8 --max_new_tokens 48 --lr 1e-4 "
    "--validation 8 --eval_every 4 --save_every 4"
)
COSTS = ("updates", "rollouts", "verdicts", "tokens", "seconds")


# ---------------------------------------------------------------------- the runs


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(', ', '-')}-{seed}"


def lines(path: Path) -> list[dict]:
    """The rows of a JSONL file; none when there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").split("\n") if line]


def has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint" / "trainer.pt").exists()


def finished(folder: Path) -> bool:
    """Whether the run's last checkpoint and last evaluation are there."""
    if not has_checkpoint(folder):
        return False
    rows = lines(folder / "metrics.jsonl")
    return bool(rows) and rows[-1]["step"] == STEPS and "eval_score" in rows[-1]


def train(out: Path, arm: str, seed: int, threads: int) -> None:
    """One training run in a process of its own: new, resumed, or done before."""
    folder = folder_of(out, arm, seed)
    if finished(folder):
        return
    if has_checkpoint(folder):
        flags = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        flags = [*FLAGS.split(), *ARMS[arm].split(), "--seed", str(seed)]
        flags += ["--steps", str(STEPS), "--out", str(folder)]

    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(out / f"{folder.name}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    outcome = "done" if done.returncode == 0 else f"failed, see {folder.name}.log"
    print(f"{arm}, seed {seed}: {outcome}", flush=True)


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


def held_out(folder: Path, seed: int, step: int) -> list[Row]:
    """(prompt, seed, held-out score) at a step."""
    rows = []
    for row in lines(folder / "samples.jsonl"):
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
    """Score and cost of every arm."""
    print_head(["arm", "seeds", "held-out score", *COSTS])
    for arm, seeds in runs.items():
        rows = []
        for seed in seeds:
            rows += held_out(folder_of(out, arm, seed), seed, STEPS)
        score = crossed_bootstrap(score_table(rows))
        cost = [spent(logs[arm, seed], STEPS) for seed in seeds]
        means = [f"{statistics.fmean(c[key] for c in cost):,.0f}" for key in COSTS]
        cell = f"{score.mean:.3f} ({score.low:.3f} to {score.high:.3f})"
        print_row([arm, len(seeds), cell, *means])


def difference_tables(out: Path, runs: dict[str, list[int]], logs: dict) -> None:
    """Every arm against the scalar one, after as many updates and after as many verdicts."""
    evaluated = []
    for row in logs["scalar", runs["scalar"][0]]:
        if "eval_score" in row:
            evaluated.append(row["step"])

    equal_updates = {}
    equal_verdicts = {}
    steps = {}
    for arm, seeds in runs.items():
        base = BASES.get(arm)
        at_end = []
        at_cost = []
        after = []
        steps_of_arm = []
        for seed in seeds:
            if seed not in runs.get(base, []):
                continue
            after += held_out(folder_of(out, arm, seed), seed, STEPS)
            at_end += held_out(folder_of(out, base, seed), seed, STEPS)

            # The last evaluation of the scalar arm that had cost no more verdicts.
            budget = spent(logs[arm, seed], STEPS)["verdicts"]
            base_log = logs[base, seed]
            paid = [step for step in evaluated if spent(base_log, step)["verdicts"] <= budget]
            steps_of_arm.append(max(paid))
            at_cost += held_out(folder_of(out, base, seed), seed, max(paid))
        if after:
            equal_updates[arm] = (at_end, after)
            equal_verdicts[arm] = (at_cost, after)
            steps[arm] = statistics.fmean(steps_of_arm)

    if not steps:
        return
    print("\nAgainst the scalar arm, equal updates:\n")
    print(comparison_table(compare_pairs(equal_updates)))
    print("\nAgainst the scalar arm, equal verdicts:\n")
    print(comparison_table(compare_pairs(equal_verdicts)))
    cells = [f"{arm} {step:.0f}" for arm, step in steps.items()]
    print(f"\nThe scalar arm's step with as many verdicts: {'; '.join(cells)}.")


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
    for example in rar.read_examples(ROOT / "data" / "train.jsonl"):
        rubrics[example.id] = example.rubric

    steps = []
    for seed in seeds:
        groups = defaultdict(lambda: defaultdict(list))
        for row in lines(folder_of(out, "scalar", seed) / "samples.jsonl"):
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
    for axis in rar.AXES:
        names[f"std/{axis}"] = f"std of {axis.replace('_', ' ')}"
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
    for arm in ("search", "random"):
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
            logs[arm, seed] = lines(folder_of(out, arm, seed) / "metrics.jsonl")
    arm_table(out, runs, logs)
    difference_tables(out, runs, logs)
    axis_table(runs, logs)
    contraction_table(out, runs, logs)


def draw(out: Path, runs: dict[str, list[int]], path: str) -> None:
    """Held-out score over updates and over verdicts: mean of the seeds, band of their error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for arm, seeds in runs.items():
        logs = [lines(folder_of(out, arm, seed) / "metrics.jsonl") for seed in seeds]
        steps = [row["step"] for row in logs[0] if "eval_score" in row]
        means = []
        lows = []
        highs = []
        verdicts = []
        for step in steps:
            scores = []
            for rows in logs:
                scores += [row["eval_score"] for row in rows if row["step"] == step]
            mean = statistics.fmean(scores)
            error = 0.0
            if len(scores) > 1:
                error = statistics.stdev(scores) / math.sqrt(len(scores))
            means.append(mean)
            lows.append(mean - error)
            highs.append(mean + error)
            verdicts.append(statistics.fmean(spent(rows, step)["verdicts"] for rows in logs))

        style = "--" if arm.endswith(", mean") else "-"
        label = f"{arm} ({len(seeds)} seeds)"
        for axis, x in zip(axes, (steps, verdicts)):
            axis.plot(x, means, color=COLORS[arm], linestyle=style, marker=".", label=label)
            axis.fill_between(x, lows, highs, color=COLORS[arm], alpha=0.1)

    for axis, name in zip(axes, ("updates", "verdicts paid, search included")):
        axis.set_xlabel(name, fontsize=9)
        axis.grid(alpha=0.25)
    axes[1].set_xscale("symlog", linthresh=100)
    axes[0].set_ylabel("held-out score", fontsize=9)
    axes[0].legend(fontsize=7)
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
    if not args.report:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            for seed in args.seeds:
                for arm in args.arms:
                    pool.submit(train, out, arm, seed, threads)

    runs = {}
    for arm in args.arms:
        seeds = [seed for seed in args.seeds if finished(folder_of(out, arm, seed))]
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
