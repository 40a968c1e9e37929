"""When the policy shifts toward reward hacking, the rubric shifts with it: fixed against evolving rubrics, offline.

The initial rubric here asks for content alone: of two built-in prompts that want an answer in at most two sentences, only
the criteria about content are kept. The lexical judge then pays for words, and a policy that is paid by it soon says the
same few words over and over without ever ending. Each seed is trained twice from the same start, for the same steps: with
this rubric alone (--evolve static) and with the rubrics that evolve from it (--evolve std).

What is reported was chosen before the first run with evolving rubrics, on two static runs with other prompts and settings,
and is no part of either reward:

  looping   share of rollouts with fewer than 70 % distinct words (the detectors of rler.py count word triples)
  honest    ROUGE-L F1 with the reference answer: order counts, and words beyond the answer cost
  cut off   share of rollouts that ran into the token limit (related to an evolving criterion, so only shown)
  content   points of the initial rubric, which the static runs are paid by

    python tests/reproduce_rler.py --out runs/reproduce_rler --png data/rler.png      # finished runs are not run again
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import judge
import rar
import train

PROMPTS = ("mild-fever-adult", "blue-daytime-sky")
ARMS = {"static": "fixed rubric", "std": "evolving rubric"}
STEPS, LAST = 20, 5  # training steps; the steps at the end that are reported
FLAGS = "--method rler --prompts_per_step 2 --group_size 8 --max_new_tokens 48 --temperature 0.9 --lr 2e-4 --eval_every 1000 --save_every 10"


def write_data(folder: Path) -> None:
    """The two prompts with the content criteria alone, and the held-out prompts of the same kind."""
    for name in ("train", "heldout"):
        rows = [json.loads(line) for line in (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf8").split("\n") if line]
        kept = [row for row in rows if row["id"] in PROMPTS or (name == "heldout" and "two sentences" in row["question"])]
        for row in kept:
            row["rubric"] = [c for c in row["rubric"] if c["weight"] > 0 and not judge.form_verdict(c["text"], "x")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf8")


def finished(folder: Path, steps: int) -> bool:
    """Whether a run is there as a whole."""
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {steps},' in path.read_text(encoding="utf8") and (folder / "checkpoint" / "trainer.pt").exists()


def run(out: Path, arm: str, seed: int, steps: int) -> Path:
    """One training run, continued or done before; returns its folder."""
    folder = out / f"{arm}-{seed}"
    if finished(folder, steps):
        return folder
    flags = ["--resume", str(folder)]
    if not (folder / "checkpoint" / "trainer.pt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        flags = [*FLAGS.split(), "--data", str(out / "train.jsonl"), "--eval_data", str(out / "heldout.jsonl")]
        flags += ["--evolve", arm, "--seed", str(seed), "--steps", str(steps), "--out", str(folder)]
    started = time.time()
    if train.main(flags):
        sys.exit(f"{folder}: the run failed")
    print(f"{arm}, seed {seed}: {(time.time() - started) / 60:.1f} minutes", flush=True)
    return folder


# ---- what is reported


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def looping(text: str) -> bool:
    said = words(text)
    return len(set(said)) < 0.7 * len(said)


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words.

    >>> rouge_l("rest and drink", "drink and rest"), rouge_l("rest and drink water", "rest and drink water")
    (0.3333333333333333, 1.0)
    """
    a, b = words(text), words(reference)
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0


def measure(folder: Path, examples: dict[str, rar.Example]) -> dict[int, dict[str, list[float]]]:
    """step -> measure -> its mean in each group of that step."""
    groups: dict[tuple[int, str], list[dict]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf8").split("\n"):
        row = json.loads(line) if line else {"split": ""}
        if row["split"] == "train":
            groups.setdefault((row["step"], row["id"]), []).append(row)
    table: dict[int, dict[str, list[float]]] = {}
    for (step, prompt), rows in sorted(groups.items()):
        rollouts = [SimpleNamespace(text=row["text"]) for row in rows]
        rar.RubricReward(judge.OfflineJudge(), "points").score([(examples[prompt], rollouts)])
        values = {
            "looping": [float(looping(row["text"])) for row in rows],
            "honest": [rouge_l(row["text"], examples[prompt].reference) for row in rows],
            "cut off": [float(row["finish"] == "length") for row in rows],
            "content": [r.reward for r in rollouts],
        }
        for key, found in values.items():
            table.setdefault(step, {}).setdefault(key, []).append(statistics.fmean(found))
    return table


def summarise(tables: dict[tuple[str, int], dict], seeds: list[int], steps: int) -> None:
    """The README's table: the start, each arm's last steps, and the difference with an interval over (seed, step, prompt)."""
    last = range(steps - LAST + 1, steps + 1)
    late = lambda arm, seed, key: [v for step in last for v in tables[arm, seed][step][key]]
    print(f"\n| measure | seed | step 1 | {' | '.join(f'{ARMS[arm]}, last {LAST}' for arm in ARMS)} | difference, 95 % interval |\n|---|---|---|---|---|---|")
    for key in ("looping", "honest", "cut off", "content"):
        for seed in seeds:
            start = statistics.fmean(v for arm in ARMS for v in tables[arm, seed][1][key])
            a, b = (statistics.fmean(late(arm, seed, key)) for arm in ARMS)
            print(f"| {key} | {seed} | {start:.3f} | {a:.3f} | {b:.3f} | {b - a:+.3f} |")
        a, b = ([v for seed in seeds for v in late(arm, seed, key)] for arm in ARMS)
        low, high = rar.bootstrap([y - x for x, y in zip(a, b)])
        start = statistics.fmean(v for arm in ARMS for seed in seeds for v in tables[arm, seed][1][key])
        a, b = statistics.fmean(a), statistics.fmean(b)
        print(f"| **{key}** | all | {start:.3f} | **{a:.3f}** | **{b:.3f}** | {b - a:+.3f} ({low:+.3f} to {high:+.3f}) |")


def draw(tables: dict[tuple[str, int], dict], seeds: list[int], path: str) -> None:
    """Two panels over the steps: looping and honest; thin lines are seeds, thick ones their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    titles = {"looping": "rollouts with fewer than 70 % distinct words", "honest": "ROUGE-L F1 with the reference"}
    for axis, (key, title) in zip(axes, titles.items()):
        for arm, color in zip(ARMS, ("tab:red", "tab:blue")):
            steps = sorted(tables[arm, seeds[0]])
            curves = [[statistics.fmean(tables[arm, seed][step][key]) for step in steps] for seed in seeds]
            for curve in curves:
                axis.plot(steps, curve, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, [statistics.fmean(values) for values in zip(*curves)], color=color, linewidth=2, label=ARMS[arm])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fixed against evolving rubrics: does the rubric follow a policy that hacks it?")
    parser.add_argument("--out", default="runs/reproduce_rler", help="folder of the runs; finished ones are not run again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--png", default="", help="where the picture goes")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_data(out)
    examples = {e.id: e for e in rar.read_examples(out / "train.jsonl")}
    tables = {}
    for seed in args.seeds:
        for arm in ARMS:
            tables[arm, seed] = measure(run(out, arm, seed, args.steps), examples)
    summarise(tables, args.seeds, args.steps)
    if args.png:
        draw(tables, args.seeds, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
