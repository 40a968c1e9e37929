"""When a policy shifts to reward hacking, does its rubric shift, too? Fixed against evolving rubrics.

The initial rubric here asks for content alone: of two built-in prompts that want an answer in at
most two sentences, only the criteria about content are kept. The lexical judge then pays for words,
and a policy that is paid by it soon says the same few words over and over without ever ending. Each
seed is trained twice from the same start, for the same steps: with this rubric alone (--evolve
static) and with the rubrics that evolve from it (--evolve std).

What is reported was chosen before the first run with evolving rubrics, on two static runs with
other prompts and settings, and is no part of either reward:

  looping   share of rollouts with fewer than 70 % distinct words (the detectors count triples)
  honest    ROUGE-L F1 with the reference: order counts, and words beyond the answer cost
  cut off   share of rollouts that run into the token limit (related to an evolving criterion, so
            only shown)
  content   points of the initial rubric, which the static runs are paid by

Finished runs are not run again.

    python tests/evidence/reproduce_rler.py --png tests/evidence/rler.png
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import rar
import train
from judge import LexicalJudge

PROMPTS = ("mild-fever-adult", "blue-daytime-sky")
ARMS = {"static": "fixed rubric", "std": "evolving rubric"}
MEASURES = ("looping", "honest", "cut off", "content")
STEPS = 20
LAST = 5  # steps at the end that are reported
FLAGS = (
    "--method rler --prompts_per_step 2 --group_size 8 --max_new_tokens 48 "
    "--temperature 0.9 --lr 2e-4 --eval_every 1000 --save_every 10"
)

# ------------------------------------------------------------------------------------ the runs


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    lines = path.read_text(encoding="utf8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_data(folder: Path) -> None:
    """The two prompts with the content criteria alone, and held-out prompts of the same kind."""
    for name in ("train", "heldout"):
        rows = []
        for row in read_lines(ROOT / "data" / f"{name}.jsonl"):
            is_alike = name == "heldout" and "two sentences" in row["question"]
            if row["id"] not in PROMPTS and not is_alike:
                continue
            # What has a check is about form.
            criteria = row["rubric"]
            row["rubric"] = [c for c in criteria if c["weight"] > 0 and not c.get("check")]
            rows.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf8")


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run is there as a whole."""
    path = folder / "metrics.jsonl"
    if not path.exists() or not (folder / "checkpoint" / "trainer.pt").exists():
        return False
    return f'"step": {steps},' in path.read_text(encoding="utf8")


def run(out: Path, arm: str, seed: int, steps: int) -> Path:
    """One training run, continued or done before; returns its folder."""
    folder = out / f"{arm}-{seed}"
    if is_finished(folder, steps):
        return folder

    if (folder / "checkpoint" / "trainer.pt").exists():
        flags = ["--resume", str(folder)]
    else:
        # Killed before its first checkpoint: from the beginning.
        shutil.rmtree(folder, ignore_errors=True)
        flags = [*FLAGS.split(), "--evolve", arm, "--seed", str(seed), "--steps", str(steps)]
        flags += ["--data", str(out / "train.jsonl"), "--eval_data", str(out / "heldout.jsonl")]
        flags += ["--out", str(folder)]

    started = time.time()
    if train.main(flags):
        sys.exit(f"{folder}: the run failed")
    print(f"{arm}, seed {seed}: {(time.time() - started) / 60:.1f} minutes", flush=True)
    return folder


# ------------------------------------------------------------------------------------ the measures


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def is_looping(text: str) -> bool:
    """Whether fewer than 70 % of the words are distinct."""
    all_words = words(text)
    return len(set(all_words)) < 0.7 * len(all_words)


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words.

    >>> rouge_l("rest and drink", "drink and rest")
    0.3333333333333333
    >>> rouge_l("rest and drink water", "rest and drink water")
    1.0
    """
    a = words(text)
    b = words(reference)
    if not a or not b:
        return 0.0

    # longest[j]: of the words of a so far and the first j words of b.
    longest = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = longest[j]
            longest[j] = diagonal + 1 if x == y else max(above, longest[j - 1])
            diagonal = above
    return 2 * longest[-1] / (len(a) + len(b))


def measure(folder: Path, examples: dict[str, rar.Example]) -> dict:
    """table[step][measure] = its mean in each group of that step."""
    groups = defaultdict(list)
    for row in read_lines(folder / "samples.jsonl"):
        if row["split"] == "train":
            groups[row["step"], row["id"]].append(row)

    points = rar.RubricReward(LexicalJudge(), SimpleNamespace(method="points", advantage="std"))
    table = defaultdict(lambda: defaultdict(list))
    for (step, prompt), rows in sorted(groups.items()):
        example = examples[prompt]
        rollouts = [SimpleNamespace(text=row["text"]) for row in rows]
        points.score([rar.Group(example, rollouts)])
        values = {
            "looping": [float(is_looping(row["text"])) for row in rows],
            "honest": [rouge_l(row["text"], example.reference) for row in rows],
            "cut off": [float(row["finish"] == "length") for row in rows],
            "content": [rollout.reward for rollout in rollouts],
        }
        for key in MEASURES:
            table[step][key].append(statistics.fmean(values[key]))
    return table


# ------------------------------------------------------------------------------------ the report


def late(tables: dict, arm: str, seed: int, key: str, steps: int) -> list[float]:
    """The values of a run's last steps, one per group."""
    values = []
    for step in range(steps - LAST + 1, steps + 1):
        values += tables[arm, seed][step][key]
    return values


def summarise(tables: dict, seeds: list[int], steps: int) -> None:
    """Prints a table: start, each arm's last steps, difference with an interval.

    The interval is over (seed, step, prompt).
    """
    heads = [f"{name}, last {LAST}" for name in ARMS.values()]
    print(f"\n| measure | seed | step 1 | {' | '.join(heads)} | difference, 95 % interval |")
    print("|---|---|---|---|---|---|")
    for key in MEASURES:
        starts = []
        fixed = []
        evolving = []
        for seed in seeds:
            start = []
            for arm in ARMS:
                start += tables[arm, seed][1][key]
            a = late(tables, "static", seed, key, steps)
            b = late(tables, "std", seed, key, steps)
            means = [statistics.fmean(values) for values in (start, a, b)]
            cells = " | ".join(f"{mean:.3f}" for mean in means)
            print(f"| {key} | {seed} | {cells} | {means[2] - means[1]:+.3f} |")
            starts += start
            fixed += a
            evolving += b

        low, high = rar.bootstrap([y - x for x, y in zip(fixed, evolving, strict=True)])
        start, a, b = [statistics.fmean(values) for values in (starts, fixed, evolving)]
        cells = f"{start:.3f} | **{a:.3f}** | **{b:.3f}** | {b - a:+.3f}"
        print(f"| **{key}** | all | {cells} ({low:+.3f} to {high:+.3f}) |")


def draw(tables: dict, seeds: list[int], path: str) -> None:
    """Two panels over the steps: looping and honest; thin lines: seeds, thick ones: their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    titles = {
        "looping": "rollouts with fewer than 70 % distinct words",
        "honest": "ROUGE-L F1 with the reference",
    }
    for axis, (key, title) in zip(figure.subplots(1, 2), titles.items()):
        for arm, color in zip(ARMS, ("tab:red", "tab:blue")):
            steps = sorted(tables[arm, seeds[0]])
            curves = []
            for seed in seeds:
                curve = [statistics.fmean(tables[arm, seed][step][key]) for step in steps]
                axis.plot(steps, curve, color=color, alpha=0.25, linewidth=0.8)
                curves.append(curve)
            mean = [statistics.fmean(values) for values in zip(*curves)]
            axis.plot(steps, mean, color=color, linewidth=2, label=ARMS[arm])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> int:
    """Runs what is not there yet, prints the table, draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/reproduce_rler", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--png", default="", help="where the picture goes")
    args = parser.parse_args(argv)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_data(out)
    examples = {example.id: example for example in rar.read_examples(out / "train.jsonl")}
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
