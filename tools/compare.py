"""How good is a model on held-out prompts, and is another one better? One JSON line says it.

    difference  =  mean over prompts of  score of OTHER - score of MODEL      (paired by prompt)

Prompts differ far more among themselves than two checkpoints do, so the interval is that of the
paired differences. Answers are greedy: the same weights score the same every time.

    python tools/compare.py smollm2                                # the default model, built-in prompts
    python tools/compare.py smollm2 RUN --eval_data FILE.jsonl     # before and after a run, paired
    python tools/compare.py RUN --judge http://localhost:8000/v1 --judge_model NAME
    python tools/compare.py eval-a.jsonl eval-b.jsonl              # answers of earlier evaluations

A name is smollm2, a run's folder, a checkpoint, a hub id, or answers (.jsonl) that an evaluation
saved. Tables go to stderr; stdout holds the one line, for a script to read.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpo
import rar
import train
from judge import JudgeError
from rar import DataError
from tools.report import interval_text, printable, read_number, read_text, write_file

# ---------------------------------------------------------------------------------- saved answers


def result_rows(groups: list) -> list[dict]:
    """One row per evaluated answer, with the benchmark's canary: what `compare` needs.

    item: what several runs of one multiple-choice question share; of other examples the id.
    """
    rows = []
    for example, [rollout] in groups:
        row = {
            "id": example.id,
            "item": example.question_id,
            "score": rollout.reward,
            "verdicts": [verdict.score for verdict in rollout.verdicts],
            "text": rollout.text,
        }
        # The mark by which a benchmark asks to stay out of training data goes wherever its rows go.
        if example.canary:
            row["canary"] = example.canary
        rows.append(row)
    return rows


def read_answers(path: str) -> list[dict]:
    """The rows that an earlier evaluation saved. Raises DataError."""
    rows = []
    for where, row in rar.read_rows(path):
        if not isinstance(row, dict) or not {"id", "item", "score"} <= row.keys():
            raise DataError(f"{where}: not an answer of an evaluation; give a file that compare.py named")
        score = read_number(row, "score", where)
        rows.append(
            {
                "id": read_text(row, "id", where),
                "item": read_text(row, "item", where),
                "score": math.nan if score is None else score,
            }
        )
    if not rows:
        raise DataError(f"{path}: no answers; give a file that compare.py named")
    return rows


def compare(before: list[dict], after: list[dict]) -> dict:
    """Mean difference of the scores on the prompts that both have, with a paired bootstrap.

    What either could not score is left out. Raises DataError.

    >>> def rows(*scores):
    ...     return [{"id": str(k), "item": str(k), "score": score} for k, score in enumerate(scores)]
    >>> compare(rows(0.0, 0.5, 0.5, 0.25), rows(0.5, 0.5, 1.0, math.nan))
    {'difference': 0.3333333333333333, 'difference_ci': (0.0, 0.5), 'n': 3}
    """
    scores_before = {row["id"]: row["score"] for row in before}
    gains: dict[str, list[float]] = {}
    for row in after:
        gain = row["score"] - scores_before.get(row["id"], math.nan)
        if not math.isnan(gain):
            gains.setdefault(row["item"], []).append(gain)
    if not gains:
        raise DataError(
            "the two evaluations share no scored prompt; evaluate both on the same --eval_data"
        )

    # A question that is asked several times counts once: its runs are not independent.
    differences = [rar.nanmean(values) for values in gains.values()]
    return {
        "difference": rar.nanmean(differences),
        "difference_ci": rar.bootstrap(differences),
        "n": len(differences),
    }


# ---------------------------------------------------------------------------------- one evaluation


def metrics_table(metrics: dict) -> str:
    """The metrics of `rar.evaluate` for a person: figure, prompts behind it."""
    low, high = metrics["eval_ci"]
    name = "accuracy" if "eval_unboxed" in metrics else "score, unclipped"
    head = f"{name:<34}{metrics['eval_score']:>8.3f}"
    lines = [f"{head}  n {metrics['eval_n']}   {interval_text(low, high)}"]
    for key, value in metrics.items():
        if key in ("eval_score", "eval_ci") or key.startswith("eval_n"):
            continue
        line = f"{key.removeprefix('eval_').replace('/', ' '):<34}{value:>8.3f}"
        n = metrics.get(key.replace("eval_", "eval_n/"))
        lines.append(line if n is None else f"{line}  n {n}")
    return printable("\n".join(lines))


def checkpoint_folder(name: str) -> Path:
    """The folder of a run's checkpoint, or the name as it is. Raises DataError."""
    folder = Path(name)
    if (folder / "checkpoint").is_dir():
        return folder / "checkpoint"
    if (folder / "metrics.jsonl").exists():
        raise DataError(f"{name}: a run without a checkpoint yet; go on with --resume {name}")
    return folder


def answers_path(config: train.Config, name: str, folder: Path) -> Path:
    """Where the answers go: beside the checkpoint, or into runs/, unless --out says otherwise."""
    out = Path(config.out or (folder.parent if folder.is_dir() else "runs"))
    words = re.findall(r"[\w.]+", name)[-3:]
    data = Path(config.eval_data or "heldout").stem
    return out / "-".join(["eval", *words, f"{data}.jsonl"])


def evaluate_model(config: train.Config, name: str, judge) -> tuple[dict, list[dict]]:
    """(metrics, one row per answer) of a model. Saves the answers and says where."""
    folder = checkpoint_folder(name)
    _, examples = train.read_data(config)
    policy = train.Policy(str(folder), config.dtype)
    examples = train.fitting(examples, policy, config, "held-out")
    metrics, groups = train.evaluate(policy, judge, examples, config.max_new_tokens)

    answers = result_rows(groups)
    path = answers_path(config, name, folder)
    if grpo.rank_and_world()[0] == 0:
        write_file(path, train.jsonl(answers).encode("utf8"))
        data = config.eval_data or "data/heldout.jsonl"
        print(f"{printable(name)} on {data}\n{metrics_table(metrics)}\nanswers: {path}", file=sys.stderr)
    how = {
        "model": name,
        "n": len(examples),
        "judge": config.judge_model or config.judge,
        "max_new_tokens": config.max_new_tokens,
        "answers": str(path),
    }
    return {**how, **metrics}, answers


def evaluate_one(config: train.Config, name: str, judge) -> tuple[dict, list[dict]]:
    """(metrics, one row per answer) of a model, or of answers that were saved."""
    if name.endswith(".jsonl"):
        return {"answers": name}, read_answers(name)
    return evaluate_model(config, name, judge)


# ---------------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """Evaluates one or two models. Raises DataError, JudgeError, train.UserError."""
    if len(args.model) > 2:
        raise DataError(f"{' '.join(args.model)}: give one model, or two")
    config = train.Config(
        eval_data=args.eval_data,
        judge=args.judge,
        judge_model=args.judge_model,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        out=args.out,
    )
    # Both are judged by one judge, whose cache then serves both.
    judge = train.make_judge(config)
    metrics, answers = evaluate_one(config, args.model[0], judge)
    line = metrics
    if len(args.model) == 2:
        other_metrics, other_answers = evaluate_one(config, args.model[1], judge)
        difference = compare(answers, other_answers)
        line = {"before": metrics, "after": other_metrics, **difference}
        interval = interval_text(*difference["difference_ci"], "+")
        print(
            f"{args.model[1]} minus {args.model[0]}: {difference['difference']:+.3f}, {interval} "
            f"({difference['n']} prompts, paired bootstrap)",
            file=sys.stderr,
        )
    print(json.dumps(train.finite(line)))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    defaults = train.Config()
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="+", help="one model, run or file of answers, or two")
    parser.add_argument("--eval_data", default="", help="held-out prompts [data/heldout.jsonl]")
    parser.add_argument("--judge", default=defaults.judge, help="offline, or a server's base URL [offline]")
    parser.add_argument("--judge_model", default="", help="the model's name on that server")
    parser.add_argument(
        "--max_new_tokens", type=int, default=defaults.max_new_tokens, help="per answer [%(default)s]"
    )
    parser.add_argument("--dtype", default=defaults.dtype, help="auto, float32 or bfloat16 [auto]")
    parser.add_argument("--out", default="", help="folder for the answers [beside the checkpoint, or runs]")
    args = parser.parse_args(argv)
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head -1`). Nothing is wrong, and Python must not write on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, JudgeError, train.UserError, OSError) as error:
        print(f"compare.py: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
