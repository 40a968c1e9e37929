"""When a policy shifts to reward hacking, does its rubric shift too? Does the selection matter?

The initial rubric here asks for content alone: of two built-in prompts that want an answer in at
most two sentences, only the criteria about content are kept. The lexical judge then pays for words,
and a policy that is paid by it soon says the same few words over and over without ever ending. Each
seed is trained three times from the same start, for the same steps:

  fixed      with this rubric alone
  evolving   with criteria that evolve from it, as in rler.py: those of widest spread stay
  random     the same, but which criteria stay is drawn by lot

The arms are subclasses of rler.RLER, below, each of one hook. The detectors, which propose here,
choose by spread themselves, in all arms that evolve: `random` draws among what they propose.

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
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from intervals import Row, compare_pairs
from runs import flags_of_run, is_finished

import rar
import rler
import train
from judge import LexicalJudge

PROMPTS = ("mild-fever-adult", "blue-daytime-sky")
MEASURES = ("looping", "honest", "cut off", "content")
STEPS = 20
LAST = 5  # steps at the end that are reported
FLAGS = (
    "--judge lexical --method rler --prompts_per_step 2 --group_size 8 --max_new_tokens 48 "
    "--temperature 0.9 --lr 2e-4 --eval_every 1000 --save_every 10"
)

# ------------------------------------------------------------------------------------ the arms


class Fixed(rler.RLER):
    """Nothing evolves: nobody is asked for criteria."""

    def propose(self, show_progress: bool) -> dict:
        """No proposals."""
        return {}


class AtRandom(rler.RLER):
    """The criteria that stay are drawn by lot, whatever their spread."""

    def select(self, visit: rler.Visit, with_spread: list) -> list:
        """K of all active criteria, drawn."""
        # From the seed, the step and the prompt: a resumed run draws the same.
        name = f"{self.config.seed}-{self.step}-{visit.example.id}"
        drawn = list(visit.buffer.active)
        random.Random(name).shuffle(drawn)
        for criterion in drawn[self.config.rubrics_kept :]:
            criterion.why = "drawn by lot"
        return drawn[: self.config.rubrics_kept]


ARMS = {"fixed": Fixed, "evolving": rler.RLER, "random": AtRandom}
COLORS = {"fixed": "tab:red", "evolving": "tab:blue", "random": "tab:orange"}
# (after, before): does evolving help, does it help without the selection, does the selection?
COMPARED = (("evolving", "fixed"), ("random", "fixed"), ("evolving", "random"))

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


def run(out: Path, arm: str, seed: int, steps: int) -> None:
    """One training run: new, continued, or done before."""
    folder = out / f"{arm}-{seed}"
    if is_finished(folder, steps):
        return

    flags = [*FLAGS.split(), "--seed", str(seed), "--steps", str(steps)]
    flags += ["--data", str(out / "train.jsonl"), "--eval_data", str(out / "heldout.jsonl")]
    flags = flags_of_run(folder, flags)

    # `--method rler` is the class of that name: for this run it is the arm's.
    original = rler.RLER
    started = time.time()
    rler.RLER = ARMS[arm]
    try:
        status = train.main(flags)
    finally:
        rler.RLER = original
    if status:
        sys.exit(f"{folder}: the run failed")
    print(f"{arm}, seed {seed}: {(time.time() - started) / 60:.1f} minutes", flush=True)


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
    """table[step][measure][prompt] = its mean in the prompt's group of that step."""
    groups = defaultdict(list)
    for row in train.read_log(folder / "samples.jsonl"):
        if row["split"] == "train":
            groups[row["step"], row["id"]].append(row)

    points = rar.RubricReward(LexicalJudge(), SimpleNamespace(method="points", advantage="std"))
    table = defaultdict(lambda: defaultdict(dict))
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
            table[step][key][prompt] = statistics.fmean(values[key])
    return table


# ------------------------------------------------------------------------------------ the report


def rows_of(tables: dict, arm: str, key: str, steps: list[int]) -> list[Row]:
    """(prompt, seed, mean over these steps) of an arm's runs: one row per prompt and seed."""
    rows = []
    for (of_arm, seed), table in tables.items():
        if of_arm != arm:
            continue
        for prompt in PROMPTS:
            values = [table[step][key][prompt] for step in steps]
            rows.append((prompt, seed, statistics.fmean(values)))
    return rows


def mean_of(rows: list[Row]) -> float:
    """The mean score of some rows."""
    return statistics.fmean(score for _, _, score in rows)


def summarise(tables: dict, steps: int) -> None:
    """Prints each arm's start and last steps, then the differences with their intervals.

    p-values are corrected for the three comparisons of a measure.
    """
    last = list(range(steps - LAST + 1, steps + 1))
    print(f"\n| measure | step 1 | {' | '.join(ARMS)} |")
    print("|---" * (2 + len(ARMS)) + "|")
    for key in MEASURES:
        # All arms start alike: the first step's rollouts come before the first update.
        cells = [key, f"{mean_of(rows_of(tables, 'fixed', key, [1])):.3f}"]
        for arm in ARMS:
            cells.append(f"{mean_of(rows_of(tables, arm, key, last)):.3f}")
        print("| " + " | ".join(cells) + " |")

    heads = ("measure", "comparison", "difference", "over prompts and seeds", "over seeds (t)")
    print(f"\n| {' | '.join(heads)} | p, Holm |")
    print("|---" * (len(heads) + 1) + "|")
    for key in MEASURES:
        pairs = {}
        for after, before in COMPARED:
            of_both = (rows_of(tables, before, key, last), rows_of(tables, after, key, last))
            pairs[f"{after} - {before}"] = of_both
        for row in compare_pairs(pairs):
            cells = [key, row.arm, f"{row.crossed.mean:+.3f}"]
            for interval in (row.crossed, row.seeds):
                cells.append(f"{interval.low:+.3f} to {interval.high:+.3f}")
            print("| " + " | ".join([*cells, f"{row.p_holm:.3f}"]) + " |")


def draw(tables: dict, seeds: list[int], path: str) -> None:
    """Two panels over the steps: looping and honest; thin lines: seeds, thick ones: their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    titles = {
        "looping": "rollouts with fewer than 70 % distinct words",
        "honest": "ROUGE-L F1 with the reference",
    }
    for axis, (key, title) in zip(figure.subplots(1, 2), titles.items()):
        for arm, color in COLORS.items():
            steps = sorted(tables[arm, seeds[0]])
            curves = []
            for seed in seeds:
                table = tables[arm, seed]
                curve = [statistics.fmean(table[step][key].values()) for step in steps]
                axis.plot(steps, curve, color=color, alpha=0.25, linewidth=0.8)
                curves.append(curve)
            mean = [statistics.fmean(values) for values in zip(*curves)]
            axis.plot(steps, mean, color=color, linewidth=2, label=arm)
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
    # Seed by seed, so that a study that is stopped has whole seeds.
    tables = {}
    for seed in args.seeds:
        for arm in ARMS:
            run(out, arm, seed, args.steps)
            tables[arm, seed] = measure(out / f"{arm}-{seed}", examples)

    summarise(tables, args.steps)
    if args.png:
        draw(tables, args.seeds, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
