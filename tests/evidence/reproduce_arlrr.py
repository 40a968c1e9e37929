"""One class of criteria at a time against all at once: ARL-RR beside scalar rewards, offline, on the built-in prompts.

Every arm starts from the same model, sees the same training prompts, does the same number of updates of as many rollouts, and
is scored by the held-out prompts (greedy answers, the whole rubric). Two comparisons, because an update of the alternating
arms needs a fifth of the verdicts:

  equal updates    the arm at its end beside the scalar arm at its end
  equal verdicts   the arm at its end beside the scalar arm at the evaluation up to which it had paid as many verdicts (trials
                   and validation of a search counted, the audit that only measures left out)

The arms with "mean" do not divide advantages by the group's std: if variance contraction is why alternation helps, it should
help more there. `axis_mean` is the scalar that weighs all classes alike, as taking turns does.

    python tests/reproduce_arlrr.py --jobs 2 --out runs/reproduce_arlrr --png data/arlrr.png   # finished runs are not run again
    python tests/reproduce_arlrr.py --report ...                                               # only from the runs that are there
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rar

ARMS = {
    "scalar": "--schedule points",
    "cyclic": "--schedule cyclic",
    "search": "--schedule search",
    "random": "--schedule random",
    "scalar, mean": "--schedule points --advantage mean",
    "cyclic, mean": "--schedule cyclic --advantage mean",
    "axis_mean": "--schedule axis_mean",
}
STEPS = 20
FLAGS = (
    "--method arlrr --stage 2 --prompts 8 --prompts_per_step 2 --group_size 8 --max_new_tokens 48 --lr 1e-4 --validation 8 "
    "--audit 0.5 --eval_every 4 --save_every 4"
)
COLORS = dict(zip(ARMS, ("black", "tab:blue", "tab:red", "tab:orange", "tab:gray", "tab:cyan", "tab:green")))


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(', ', '-')}-{seed}"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").split("\n") if line] if path.exists() else []


def finished(folder: Path) -> bool:
    """Whether the run's last checkpoint and last evaluation are there."""
    rows = lines(folder / "metrics.jsonl") if (folder / "checkpoint" / "trainer.pt").exists() else []
    return bool(rows) and rows[-1]["step"] == STEPS and "eval_score" in rows[-1]


def run(out: Path, arm: str, seed: int, threads: int) -> None:
    """One training run in a process of its own: new, continued, or done before."""
    folder = folder_of(out, arm, seed)
    if finished(folder):
        return
    flags = ["--resume", str(folder)]
    if not (folder / "checkpoint" / "trainer.pt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        flags = [*FLAGS.split(), *ARMS[arm].split(), "--seed", str(seed), "--steps", str(STEPS), "--out", str(folder)]
    with open(out / f"{folder.name}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], stdout=log, stderr=log, env=environment, check=False)
    print(f"{arm}, seed {seed}: " + ("done" if done.returncode == 0 else f"failed, see {folder.name}.log"), flush=True)


def spent(rows: list[dict], step: int) -> Counter:
    """What a run had cost up to a step: its training and its search; `verdicts` without the audit's."""
    total: Counter = Counter()
    for row in rows:
        if 0 < row["step"] <= step:
            total["updates"] += 1
            for key in ("rollouts", "verdicts", "tokens"):
                total[key] += row[key]
            total["verdicts"] -= row["audit_verdicts"]
            for key in ("updates", "rollouts", "verdicts", "tokens", "seconds"):
                total[key] += row.get(f"search_{key}", 0)
            total["seconds"] += sum(row[f"seconds_{part}"] for part in ("rollout", "judge", "train"))
    return total


def held_out(folder: Path, step: int) -> dict[str, float]:
    """Prompt -> held-out score at a step."""
    return {row["id"]: row["reward"] for row in lines(folder / "samples.jsonl") if row["split"] == "heldout" and row["step"] == step}


def difference(pairs: list[tuple[dict, dict]]) -> str:
    """Mean of after - before over (seed, prompt), with its paired bootstrap interval."""
    gaps = [after[key] - before[key] for before, after in pairs for key in before]
    low, high = rar.bootstrap(gaps)
    return f"{statistics.fmean(gaps):+.3f} ({low:+.3f} to {high:+.3f})"


def table(out: Path, runs: dict[str, list[int]]) -> None:
    """The README's tables: score and cost, axes, what was measured of variance contraction."""
    logs = {(arm, seed): lines(folder_of(out, arm, seed) / "metrics.jsonl") for arm in runs for seed in runs[arm]}
    evaluated = [row["step"] for row in logs["scalar", runs["scalar"][0]] if "eval_score" in row]
    print("| arm | seeds | held-out score | against scalar, equal updates | against scalar, equal verdicts | updates | rollouts | verdicts | tokens | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for arm, seeds in runs.items():
        last = {seed: held_out(folder_of(out, arm, seed), STEPS) for seed in seeds}
        values = [score for seed in seeds for score in last[seed].values()]
        low, high = rar.bootstrap(values)
        cost = [spent(logs[arm, seed], STEPS) for seed in seeds]
        base = "scalar, mean" if arm.endswith("mean") and arm.startswith(("scalar,", "cyclic,")) else "scalar"
        equal, cheap, steps = [], [], []
        for seed in seeds:
            if arm != base and seed in runs.get(base, []):
                equal.append((held_out(folder_of(out, base, seed), STEPS), last[seed]))
                paid = [step for step in evaluated if spent(logs[base, seed], step)["verdicts"] <= spent(logs[arm, seed], STEPS)["verdicts"]]
                steps.append(max(paid))
                cheap.append((held_out(folder_of(out, base, seed), max(paid)), last[seed]))
        marks = f"{difference(equal)} | {difference(cheap)} at step {statistics.fmean(steps):.0f}" if equal else " | "
        means = [f"{statistics.fmean(c[key] for c in cost):,.0f}" for key in ("updates", "rollouts", "verdicts", "tokens", "seconds")]
        print(f"| {arm} | {len(seeds)} | {statistics.fmean(values):.3f} ({low:.3f} to {high:.3f}) | {marks} | " + " | ".join(means) + " |")
    starts = [rows[0] for rows in logs.values()]
    print(f"\nBefore training: {starts[0]['eval_score']:.3f} ({starts[0]['eval_ci'][0]:.3f} to {starts[0]['eval_ci'][1]:.3f}), every arm.\n")
    axes = sorted(key for key in starts[0] if key.startswith("eval_axis/"))
    print("| arm | " + " | ".join(axis.split("/")[1].replace("_", " ") for axis in axes) + " |\n|---" + "|---" * len(axes) + "|")
    print("| before training | " + " | ".join(f"{starts[0][axis]:.3f}" for axis in axes) + " |")
    for arm, seeds in runs.items():
        ends = [[logs[arm, seed][-1][axis] for seed in seeds] for axis in axes]
        print(f"| {arm} | " + " | ".join(f"{statistics.fmean(v):.3f} ± {statistics.pstdev(v):.3f}" for v in ends) + " |")
    print("\n± is the std over seeds.\n\n| measured on the audited groups | " + " | ".join(runs) + " |\n|---" + "|---" * len(runs) + "|")
    steps = {arm: [row for seed in runs[arm] for row in logs[arm, seed] if row["step"]] for arm in runs}
    measured = {"var_ratio": "Var(R) / sum w Var(r_k)", "std_scalar": "std of R in a group", "dead_scalar": "groups without spread in R"}
    measured |= {f"std/{axis.split('/')[1]}": f"std of {axis.split('/')[1].replace('_', ' ')}" for axis in axes}
    measured |= {"dead": "groups without spread in the training reward"}
    for key, name in measured.items():
        cells = []
        for arm in runs:
            values = [row[key] for row in steps[arm] if row.get(key) is not None]
            low, high = rar.bootstrap(values)
            cells.append(f"{statistics.fmean(values):.3f} ({low:.3f} to {high:.3f})" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    pairs = sorted({key for rows in steps.values() for row in rows for key in row if key.startswith("corr/")})
    values = {pair: [row[pair] for row in steps["scalar"] if row.get(pair) is not None] for pair in pairs}
    said = [f"{pair[5:].replace('/', ' and ')} {statistics.fmean(v):+.2f} ({len(v)})" for pair, v in values.items() if v]
    print("\nCorrelation of two classes within a group, scalar arm (groups behind it): " + "; ".join(said) + ".")
    turns = Counter((arm, row["class"]) for arm in ("search", "random") if arm in runs for row in steps[arm] if row.get("stage"))
    print("\nStages by class: " + "; ".join(f"{arm} {k} {n}" for (arm, k), n in sorted(turns.items())) + ".")


def draw(out: Path, runs: dict[str, list[int]], path: str) -> None:
    """Held-out score over updates and over verdicts: mean of the seeds, band of their standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for arm, seeds in runs.items():
        logs = [lines(folder_of(out, arm, seed) / "metrics.jsonl") for seed in seeds]
        steps = [row["step"] for row in logs[0] if "eval_score" in row]
        scores = [[row["eval_score"] for rows in logs for row in rows if row["step"] == step] for step in steps]
        mean = [statistics.fmean(s) for s in scores]
        error = [statistics.stdev(s) / math.sqrt(len(s)) if len(s) > 1 else 0.0 for s in scores]
        verdicts = [statistics.fmean(spent(rows, step)["verdicts"] for rows in logs) for step in steps]
        for axis, x in zip(axes, (steps, verdicts)):
            style = "--" if arm.endswith(", mean") else "-"
            axis.plot(x, mean, color=COLORS[arm], linestyle=style, marker=".", label=f"{arm} ({len(seeds)} seeds)")
            axis.fill_between(x, [m - e for m, e in zip(mean, error)], [m + e for m, e in zip(mean, error)], color=COLORS[arm], alpha=0.1)
    for axis, name in zip(axes, ("updates", "verdicts paid, search included (the audit not)")):
        axis.set_xlabel(name, fontsize=9)
        axis.grid(alpha=0.25)
    axes[1].set_xscale("symlog", linthresh=100)
    axes[0].set_ylabel("held-out score, 24 prompts", fontsize=9)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Alternating against scalar rubric rewards, at equal updates and at equal verdicts.")
    parser.add_argument("--out", default="runs/reproduce_arlrr", help="folder of the runs; finished ones are not run again")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared among them")
    parser.add_argument("--png", default="", help="where the picture goes")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    todo = [(arm, seed) for seed in args.seeds for arm in args.arms]
    if not args.report:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda pair: run(out, *pair, threads), todo))
    runs = {arm: [seed for seed in args.seeds if finished(folder_of(out, arm, seed))] for arm in args.arms}
    runs = {arm: seeds for arm, seeds in runs.items() if seeds}
    if "scalar" not in runs:
        print("no finished scalar run to compare with")
        return 1
    table(out, runs)
    if args.png:
        draw(out, runs, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
