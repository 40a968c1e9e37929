"""What the default run learned, by judges that did and did not pay for it.

    for S in 0 1 2; do python train.py --seed $S --eval_judge lexical --out runs/default-$S; done
    python tests/evidence/default_run.py runs/default-0 runs/default-1 runs/default-2

The held-out answers before and after training, from samples.jsonl, are scored again (HealthBench's
points) by each examiner: the judges without a network on the whole rubric, the checks alone, which
no judge decides, and the judged criteria alone. The difference is paired by prompt. A row per run
has the bootstrap over its prompts; the last row resamples prompts and runs, and has Student's t
interval over the runs: believe the wider (intervals.py). Below the table, per run: rewards, time,
length, the forms that were learned, and whether what is judged is met more often on the training
prompts.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "evidence"))

from intervals import (
    crossed_bootstrap,
    paired_differences,
    score_table,
    seed_means,
    t_interval,
)

import rar
from judge import LexicalJudge, Verdict, offline_judge
from train import read_log


def points(example: rar.Example, text: str, judge, part: str) -> float:
    """The answer's points on a part of the rubric: all, checks, judged; nan without any to win."""
    rubric = []
    for criterion in example.rubric:
        if part == "all" or bool(criterion.check) == (part == "checks"):
            rubric.append(criterion)
    if not any(criterion.weight > 0 for criterion in rubric):
        return float("nan")

    # Checks are verdicts already, the rest goes to the judge.
    items = rar.criterion_questions(example, text, rubric)
    asked = [item for item in items if not isinstance(item, Verdict)]
    answers = iter(judge.ask(asked))
    scores = []
    for item in items:
        verdict = item if isinstance(item, Verdict) else next(answers)
        scores.append(verdict.score)
    return rar.points_reward(rubric, scores)


def reward_line(folder: Path) -> str:
    """Training reward in the first and last five steps, and the time of judging."""
    rows = [row for row in read_log(folder / "metrics.jsonl") if "reward" in row]
    first = statistics.fmean(row["reward"] for row in rows[:5])
    last = statistics.fmean(row["reward"] for row in rows[-5:])
    judge = sum(row["seconds_judge"] for row in rows)
    rest = sum(row["seconds_rollout"] + row["seconds_train"] for row in rows)
    ties = sum(row.get("judge_ties", 0) for row in rows)
    share = f"judging {100 * judge / (judge + rest):.0f} % of {(judge + rest) / 60:.1f} minutes"
    return f"reward {first:.3f} -> {last:.3f}, {share}, {ties} ties"


def form_lines(rows: list[dict], examples: dict[str, rar.Example]) -> list[str]:
    """Length, and the share of held-out answers that are right in a form, before and after.

    Forms: the checks that at least four held-out prompts have.
    """
    last = max(row["step"] for row in rows)
    tokens = defaultdict(list)
    shares = defaultdict(list)
    for row in rows:
        if row["step"] not in (0, last):
            continue
        tokens[row["step"]].append(row["tokens"])
        for criterion, verdict in zip(examples[row["id"]].rubric, row["verdicts"]):
            if criterion.check:
                right = rar.satisfied(criterion, verdict["score"])
                shares[criterion.title, row["step"]].append(right)

    means = [statistics.fmean(tokens[step]) for step in (0, last)]
    lines = [f"tokens per answer {means[0]:.0f} -> {means[1]:.0f}"]
    for title in sorted({title for title, _ in shares}):
        before = shares[title, 0]
        after = shares[title, last]
        if len(before) >= 4:
            change = f"{statistics.fmean(before):4.0%} -> {statistics.fmean(after):4.0%}"
            lines.append(f"{title}, {len(before)} prompts: {change}")
    return lines


def share_met(rows: list[dict], steps: list[int], examples: dict[str, rar.Example]) -> list:
    """(prompt, 0, share of the judged criteria with a positive weight that its rollouts meet)."""
    scores = defaultdict(list)
    for row in rows:
        if row["step"] not in steps:
            continue
        for criterion, verdict in zip(examples[row["id"]].rubric, row["verdicts"]):
            is_judged = not criterion.check and criterion.weight > 0
            if is_judged and verdict["score"] is not None:
                scores[row["id"]].append(verdict["score"])
    return [(prompt, 0, statistics.fmean(values)) for prompt, values in scores.items()]


def judged_line(rows: list[dict], examples: dict[str, rar.Example]) -> str:
    """What is judged, on the training prompts: the first five steps and the last five.

    Five steps see every training prompt once. The interval resamples prompts.
    """
    steps = sorted({row["step"] for row in rows})
    first = share_met(rows, steps[:5], examples)
    last = share_met(rows, steps[-5:], examples)

    means = [statistics.fmean(share for _, _, share in shares) for shares in (first, last)]
    gain = crossed_bootstrap(score_table(paired_differences(last, first)))
    interval = f"{gain.mean:+.3f}, {gain.low:+.3f} to {gain.high:+.3f}"
    return f"judged criteria met on training prompts {means[0]:.3f} -> {means[1]:.3f} ({interval})"


def main() -> None:
    """Prints a table, and lines per run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    folders = parser.parse_args().runs
    examples = {e.id: e for e in rar.read_examples(ROOT / "data" / "heldout.jsonl")}
    samples = defaultdict(list)
    for folder in folders:
        for row in read_log(folder / "samples.jsonl"):
            samples[folder, row["split"]].append(row)

    offline = offline_judge()
    examiners = {
        "offline": (offline, "all"),
        "lexical": (LexicalJudge(), "all"),
        "checks alone": (LexicalJudge(), "checks"),
        "judged alone, by offline": (offline, "judged"),
        "judged alone, by lexical": (LexicalJudge(), "judged"),
    }

    print("| examiner | run | before | after | gain (95 %) |\n|---|---|---|---|---|")
    for name, (judge, part) in examiners.items():
        scores = {"before": [], "after": []}
        for number, folder in enumerate(folders):
            rows = samples[folder, "heldout"]
            last = max(row["step"] for row in rows)
            for arm, step in (("before", 0), ("after", last)):
                for row in rows:
                    if row["step"] == step:
                        score = points(examples[row["id"]], row["text"], judge, part)
                        scores[arm].append((row["id"], number, score))

        # Each run for itself, then all of them.
        gains = paired_differences(scores["after"], scores["before"])
        for number in [*range(len(folders)), None]:
            means = []
            for arm in ("before", "after"):
                chosen = [s for _, n, s in scores[arm] if number in (n, None)]
                means.append(f"{np.nanmean(chosen):.3f}")
            table = score_table([gain for gain in gains if number in (gain[1], None)])
            gain = crossed_bootstrap(table)
            shown = f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
            if number is None and len(folders) > 1:
                over_runs = t_interval(seed_means(gains))
                shown += f"; over runs {over_runs.low:+.3f} to {over_runs.high:+.3f}"
            label = "all" if number is None else folders[number].name
            print(f"| {name} | {label} | {means[0]} | {means[1]} | {shown} |")
    trained = {e.id: e for e in rar.read_examples(ROOT / "data" / "train.jsonl")}
    for folder in folders:
        print(f"\n{folder.name}: {reward_line(folder)}")
        print(judged_line(samples[folder, "train"], trained))
        print("\n".join(form_lines(samples[folder, "heldout"], examples)))


if __name__ == "__main__":
    main()
