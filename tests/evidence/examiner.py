"""Payer against examiner: is the policy getting better, or better at its judge?

A policy learns the taste of the judge that pays. A second judge, which does not pay, tells the two
apart: where both scores rise there is something to it, and where only the payer's does the reward
is being gamed. The picture has both curves over the steps, for two runs that make the difference
(the first two arms of reproduce_rler.py, whose runs are used if they are there):

  fixed      paid by the lexical judge for content alone: words can be stuffed
  evolving   the same start, but criteria evolve that the stuffed answers fail

The payer's score is what the lexical judge gives for the initial rubric, in both. The examiner is
one that words cannot fool: by default the exact checks of the same prompts in data/train.jsonl
(length, complete ending, repetition, example), which the initial rubric leaves out. In the second
run one of them (the complete ending) comes to be paid as well, which makes it the milder test.

    python tests/evidence/examiner.py --png tests/evidence/examiner.png
    python tests/evidence/examiner.py --examiner offline    # or a URL, with --examiner_model NAME
    python tests/evidence/examiner.py --runs RUN [RUN ...] --data FILE --examiner URL ...

With --runs: of runs of one's own, every rollout in samples.jsonl. Their payer's score is the reward
that was paid, the examiner's its points for the criteria in FILE that it decides: the counted ones
(checks), or all others. Runs whose names end in -0, -1, ... are one kind, with several seeds.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import reproduce_rler
from intervals import Row, compare_pairs

import rar
from judge import JudgeError, LexicalJudge, LLMJudge, offline_judge
from train import read_log

ENDS = 5  # visits of a prompt at each end that are compared
ARMS = ("fixed", "evolving")
COLORS = {"payer": "tab:red", "examiner": "tab:blue"}

# curves[run][judge][step][prompt]: the mean score of a prompt's rollouts in a step
Curves = dict[str, dict[str, dict[int, dict[str, float]]]]


# ------------------------------------------------------------------------- scores


def make_judge(name: str, model: str):
    """The examiner. Raises JudgeError."""
    # Checks are decided by counting whichever judge there is.
    if name in ("lexical", "checks"):
        return LexicalJudge()
    if name == "offline":
        return offline_judge()
    return LLMJudge(name, model)


def examined(examples: dict[str, rar.Example], by_checks: bool) -> dict[str, rar.Example]:
    """The same prompts with the criteria that the examiner decides: counted ones, or all others.

    Raises DataError where no prompt has any.
    """
    result = {}
    for name, example in examples.items():
        # A check says the same whoever examines: a judge is asked about the rest.
        criteria = [c for c in example.rubric if bool(c.check) == by_checks]
        if any(criterion.weight > 0 for criterion in criteria):
            result[name] = replace(example, rubric=criteria)
    if not result:
        kind = "with a check" if by_checks else "without a check"
        raise rar.DataError(f"no prompt has a criterion {kind}; give another --examiner")
    return result


def points_by_step(
    judge, examples: dict[str, rar.Example], rows: list[dict]
) -> dict[int, dict[str, float]]:
    """step -> prompt -> mean points of its rollouts, by the prompt's rubric in `examples`."""
    # Prompts that the file does not know cannot be examined.
    texts = defaultdict(list)
    for row in rows:
        if row["id"] in examples:
            texts[row["step"], row["id"]].append(row["text"])

    # One batch for the whole run: a model judge is asked as in training, all at once.
    groups = []
    for (_, prompt), answers in texts.items():
        rollouts = [SimpleNamespace(text=text) for text in answers]
        groups.append(rar.Group(examples[prompt], rollouts))
    config = SimpleNamespace(method="points", advantage="std")
    rar.RubricReward(judge, config).score(groups, show_progress=True)

    # Per prompt, because the same prompts do not come in every step.
    table = defaultdict(dict)
    for (step, prompt), (_, rollouts) in zip(texts, groups, strict=True):
        # What could not be judged is left out, not 0.
        table[step][prompt] = rar.nanmean([rollout.reward for rollout in rollouts])
    return table


def rewards_by_step(rows: list[dict]) -> dict[int, dict[str, float]]:
    """step -> prompt -> mean of the rewards that were paid."""
    # A rollout that was not scored was not paid: it has no reward, not 0.
    paid = defaultdict(list)
    for row in rows:
        if row["reward"] is not None:
            paid[row["step"], row["id"]].append(row["reward"])
    table = defaultdict(dict)
    for (step, prompt), rewards in paid.items():
        table[step][prompt] = statistics.fmean(rewards)
    return table


def training_rows(folder: Path) -> list[dict]:
    """The rollouts of a run's updates, in the order of the steps. Raises DataError."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise rar.DataError(f"{path}: no such file; give the folder of a run")
    # Held-out answers are in the same file, and no reward was paid for them.
    rows = []
    for row in read_log(path):
        if row["split"] == "train":
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


# ------------------------------------------------------------------------- the runs


def study_curves(out: Path, seeds: list[int], steps: int, judge, by_checks: bool) -> Curves:
    """Payer and examiner in both arms, which are run where they are not there yet."""
    # The data are written as the study does it, so that its runs are found again.
    out.mkdir(parents=True, exist_ok=True)
    reproduce_rler.write_data(out)
    content = {example.id: example for example in rar.read_examples(out / "train.jsonl")}
    whole = {e.id: e for e in rar.read_examples(ROOT / "data" / "train.jsonl")}
    asked = content
    if by_checks:
        asked = examined({name: whole[name] for name in content}, by_checks)

    curves = {}
    for seed in seeds:
        for arm in ARMS:
            reproduce_rler.run(out, arm, seed, steps)
            rows = training_rows(out / f"{arm}-{seed}")
            curves[f"{arm}-{seed}"] = {
                "payer": points_by_step(LexicalJudge(), content, rows),
                "examiner": points_by_step(judge, asked, rows),
            }
    return curves


def run_curves(folders: list[Path], data: str, judge, by_checks: bool) -> Curves:
    """The rewards paid and the examiner's points in runs of one's own. Raises DataError."""
    # By id: a run names its prompts by nothing else.
    examples = {example.id: example for example in rar.read_examples(data)}
    asked = examined(examples, by_checks)
    curves = {}
    for folder in folders:
        rows = training_rows(folder)
        points = points_by_step(judge, asked, rows)
        if not points:
            raise rar.DataError(f"{data}: has none of the prompts of {folder}")
        curves[folder.name] = {"payer": rewards_by_step(rows), "examiner": points}
    return curves


# ------------------------------------------------------------------------- the report


def kind_of(run: str) -> str:
    """The arm of a study's run; the runs of one arm are its seeds."""
    return run.rpartition("-")[0] or run


def rows_at(curves: Curves, kind: str, judge: str, at_end: bool) -> list[Row]:
    """(prompt, seed, mean) over the first or the last steps in which the prompt was visited."""
    rows = []
    # Runs of one kind are seeds of one arm, whatever their numbers are.
    runs = [run for run in curves if kind_of(run) == kind]
    for seed, run in enumerate(runs):
        # Visits, not steps: with many prompts each comes only now and then.
        visits = defaultdict(list)
        for step in sorted(curves[run][judge]):
            for prompt, score in curves[run][judge][step].items():
                visits[prompt].append(score)
        for prompt, scores in visits.items():
            # A prompt with few visits is halved; one with a single visit has no two ends.
            n = min(ENDS, len(scores) // 2)
            if n:
                ends = scores[-n:] if at_end else scores[:n]
                rows.append((prompt, seed, rar.nanmean(ends)))
    return rows


def report(curves: Curves) -> None:
    """A table: how much each judge's score has risen in each kind of run."""
    # Last against first, the same prompt and seed: each pair is one row of the table.
    pairs = {}
    for kind in dict.fromkeys(kind_of(run) for run in curves):
        for judge in COLORS:
            before = rows_at(curves, kind, judge, at_end=False)
            after = rows_at(curves, kind, judge, at_end=True)
            pairs[f"{kind}, {judge}"] = (before, after)

    heads = ("run, judge", "first visits", "last visits", "rise", "over prompts and seeds")
    print(f"\n| {' | '.join(heads)} | over seeds (t) | p, Holm |")
    print("|---" * (len(heads) + 2) + "|")
    for row in compare_pairs(pairs):
        cells = [row.arm]
        for rows in pairs[row.arm]:
            cells.append(f"{rar.nanmean([score for _, _, score in rows]):.3f}")
        cells.append(f"{row.crossed.mean:+.3f}")
        for interval in (row.crossed, row.seeds):
            # A single run has no interval over seeds.
            known = not math.isnan(interval.low)
            cells.append(f"{interval.low:+.3f} to {interval.high:+.3f}" if known else "")
        print("| " + " | ".join([*cells, f"{row.p_holm:.3f}"]) + " |")


def draw(curves: Curves, path: str) -> None:
    """One panel per kind of run; thin lines: runs, thick ones: their mean."""
    from matplotlib.figure import Figure

    # One scale for all panels: the eye compares heights.
    kinds = list(dict.fromkeys(kind_of(run) for run in curves))
    figure = Figure(figsize=(4.5 * len(kinds), 3.2), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axis, kind in zip(axes, kinds):
        for judge, color in COLORS.items():
            means = defaultdict(list)
            for run, of_run in curves.items():
                if kind_of(run) != kind:
                    continue
                # Faint: a single run is noise that the mean line should not hide.
                steps = sorted(of_run[judge])
                values = [rar.nanmean(of_run[judge][step].values()) for step in steps]
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                for step, value in zip(steps, values):
                    means[step].append(value)
            mean = [rar.nanmean(means[step]) for step in sorted(means)]
            axis.plot(sorted(means), mean, color=color, linewidth=2, label=judge)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("score of the rollouts", fontsize=8)
    figure.savefig(path, dpi=90)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        """Ends the program with status 2."""
        self.exit(2, f"examiner.py: {message}; --help shows how\n")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 2 after one line about what is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examiner", default="checks", help="checks, offline, lexical, or a URL")
    parser.add_argument("--examiner_model", default="", metavar="NAME", help="its model's name")
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="runs of one's own")
    parser.add_argument("--data", default="", metavar="FILE", help="with --runs: their rubrics")
    parser.add_argument("--out", default="runs/reproduce_rler", help="folder of the study's runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=reproduce_rler.STEPS)
    parser.add_argument("--png", default="", help="where the picture goes")
    args = parser.parse_args(argv)
    # A rubric file for the study, or runs without one, would be ignored silently.
    if bool(args.runs) != bool(args.data):
        parser.error("give --runs and --data together, or neither")

    # Checks are no judge but a part of the rubric, which changes what is asked.
    by_checks = args.examiner == "checks"
    try:
        judge = make_judge(args.examiner, args.examiner_model)
        if args.runs:
            folders = [Path(run) for run in args.runs]
            curves = run_curves(folders, args.data, judge, by_checks)
        else:
            curves = study_curves(Path(args.out), args.seeds, args.steps, judge, by_checks)
    except (rar.DataError, JudgeError, OSError) as error:
        print(f"examiner.py: {error}", file=sys.stderr)
        return 2
    report(curves)
    if args.png:
        draw(curves, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
