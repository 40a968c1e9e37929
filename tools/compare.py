"""How good is a model on held-out prompts, and is another one better? One JSON line says it.

    difference  =  mean over prompts of  score of OTHER - score of MODEL      (paired by prompt)

Prompts differ far more among themselves than two checkpoints do, so the interval is that of the
paired differences. Answers are greedy: the same weights score the same every time.

    python tools/compare.py smollm2                                # default model, built-in prompts
    python tools/compare.py smollm2 RUN                            # before and after a run, paired
    python tools/compare.py smollm2 RUN --eval_data FILE.jsonl     # on other prompts
    python tools/compare.py RUN --judge http://localhost:8000/v1 --judge_model NAME
    python tools/compare.py eval-a.jsonl eval-b.jsonl              # answers of earlier evaluations

A name is smollm2, a run's folder, a checkpoint, a hub id, or answers (.jsonl) that an evaluation
saved. A run answers its own held-out prompts with its own --max_new_tokens, --template_kwargs and
--dtype, and so does a model that is compared with it; a flag that is given counts for both. The
judge is offline unless --judge names another. Tables go to stderr; stdout holds the one line, for a
script to read.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rar
import train
from judge import JudgeError
from rar import DataError
from tools.report import (
    Parser,
    interval_text,
    printable,
    question_means,
    read_config,
    read_number,
    read_text,
    run_tool,
    write_file,
)

# What a run's own evaluations are made with: its answers would be other ones without.
OF_A_RUN = ("max_new_tokens", "template_kwargs", "dtype")
# Where its held-out prompts are.
PROMPTS = ("data", "eval_data")
# What two evaluations must share, or their difference is not one of the models alone.
MADE_WITH = ("judge", *OF_A_RUN)

# ----------------------------------------------------------------------------- saved answers


def result_rows(groups: list) -> list[dict]:
    """One row per evaluated answer, with the benchmark's canary: what `compare` needs.

    item: what several runs of one multiple-choice question share; of other examples the id.
    """
    rows = []
    # Greedy: one rollout per prompt.
    for example, [rollout] in groups:
        row = {
            "id": example.id,
            "item": example.question_id,
            "score": rollout.reward,
            "verdicts": [verdict.score for verdict in rollout.verdicts],
            "text": rollout.text,
        }
        # The mark by which a benchmark asks to stay out of training data goes where its rows go.
        if example.canary:
            row["canary"] = example.canary
        rows.append(row)
    return rows


def read_answers(path: str) -> list[dict]:
    """The rows that an earlier evaluation saved. Raises DataError."""
    rows = []
    ids = set()
    for where, row in rar.read_rows(path):
        # Prompts are .jsonl as well, and easily named in the place of answers.
        if not isinstance(row, dict) or not {"id", "item", "score"} <= row.keys():
            advice = "give a file that compare.py named"
            raise DataError(f"{where}: not an answer of an evaluation; {advice}")

        # JSON has no nan: what was not scored was saved as null.
        score = read_number(row, "score", where)
        answer = {"id": read_text(row, "id", where), "item": read_text(row, "item", where)}
        answer["score"] = math.nan if score is None else score
        if answer["id"] in ids:
            raise DataError(f"{where}: a second answer to {answer['id']!r}; leave one of them out")
        ids.add(answer["id"])

        # Answers of an older version do not say what they were made with.
        for key in MADE_WITH:
            if key in row:
                answer[key] = row[key]
        rows.append(answer)
    if not rows:
        raise DataError(f"{path}: no answers; give a file that compare.py named")
    return rows


def compare(before: list[dict], after: list[dict]) -> dict:
    """Mean difference of the scores on the prompts that both have, with a paired bootstrap.

    What either could not score is left out. Raises DataError.

    >>> def rows(*scores):
    ...     return [{"id": k, "item": k, "score": score} for k, score in enumerate(scores)]
    >>> compare(rows(0.0, 0.5, 0.5, 0.25), rows(0.5, 0.5, 1.0, math.nan))
    {'difference': 0.3333333333333333, 'difference_ci': (0.0, 0.5), 'n': 3}
    """
    # By id: the second evaluation may have had a longer context, and so more prompts.
    scores_before = {row["id"]: row["score"] for row in before}
    # nan wherever one of the two is missing, which must not count as 0.
    gains = [row["score"] - scores_before.get(row["id"], math.nan) for row in after]

    # A question that is asked several times counts once: its runs are not independent.
    differences = question_means(gains, [row["item"] for row in after])
    if not differences:
        advice = "evaluate both on the same --eval_data"
        raise DataError(f"the two evaluations share no scored prompt; {advice}")
    return {
        "difference": rar.nanmean(differences),
        "difference_ci": rar.bootstrap(differences),
        "n": len(differences),
    }


# ----------------------------------------------------------------------------- one evaluation


def metrics_table(metrics: dict) -> str:
    """The metrics of `rar.evaluate` for a person: figure, prompts behind it."""
    # Multiple choice has one criterion, right or wrong.
    low, high = metrics["eval_ci"]
    name = "accuracy" if "eval_unboxed" in metrics else "score, unclipped"
    head = f"{name:<34}{metrics['eval_score']:>8.3f}"
    # Without a scored prompt there is nothing to resample.
    interval = interval_text(low, high) if metrics["eval_n"] else "nothing was scored"
    lines = [f"{head}  n {metrics['eval_n']}   {interval}"]
    for key, value in metrics.items():
        # These are in the first line; numbers of prompts stand beside their figures.
        if key in ("eval_score", "eval_ci") or key.startswith("eval_n"):
            continue
        line = f"{key.removeprefix('eval_').replace('/', ' '):<34}{value:>8.3f}"
        n = metrics.get(key.replace("eval_", "eval_n/"))
        lines.append(line if n is None else f"{line}  n {n}")
    return printable("\n".join(lines))


def checkpoint_folder(name: str) -> Path:
    """The folder of a run's checkpoint, or the name as it is. Raises DataError."""
    folder = Path(name)
    # Only runs have a log; all else is for the loader to find out.
    if not (folder / "metrics.jsonl").exists():
        return folder
    checkpoint = train.find_checkpoint(folder)
    if checkpoint is None:
        raise DataError(f"{name}: a run without a checkpoint yet; go on with --resume {name}")
    return checkpoint


def judge_name(config: train.Config) -> str:
    """The judges' names: of a server that of its model, which says more than its address."""
    names = []
    for address, model in train.named_urls(config.judge, config.judge_model):
        names.append(model if "://" in address else address)
    return ",".join(names)


def answers_path(config: train.Config, name: str, folder: Path) -> Path:
    """Where the answers go: beside the checkpoint, or into runs/, unless --out says otherwise."""
    out = Path(config.out)
    if not config.out:
        out = folder.parent if folder.is_dir() else Path("runs")

    # The end of a path tells runs apart; all of it would be too long for a file's name.
    words = re.findall(r"[\w.]+", name)[-3:]
    data = Path(config.eval_data or config.data or "heldout").stem
    return out / "-".join(["eval", *words, f"{data}.jsonl"])


def save_answers(wanted: Path, rows: list[dict]) -> Path:
    """Writes a new file, with a number after its name where that is taken. Raises DataError."""
    # Never over earlier answers: they may be another judge's, with another limit, or to data of the
    # same name in another folder.
    make_folder(wanted.parent)
    path = wanted
    number = 1
    while True:
        try:
            with open(path, "x", encoding="utf8"):
                break
        except FileExistsError:
            number += 1
            path = wanted.with_stem(f"{wanted.stem}-{number}")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None

    # The name is ours now; without answers it is given back.
    try:
        write_file(path, train.json_lines(rows))
    except DataError:
        path.unlink()
        raise
    return path


def make_folder(path: Path) -> None:
    """Makes the folder of the answers. Raises DataError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written ({error.strerror})") from None


def say(text: str) -> None:
    """A text for a person, on stderr: stdout is for the one line that a script may read."""
    if train.is_first():
        print(printable(text), file=sys.stderr)


def is_answers(name: str) -> bool:
    """Whether the name is that of saved answers."""
    return name.endswith(".jsonl")


def evaluate_one(config: train.Config, name: str, judge) -> tuple[dict, list[dict]]:
    """(metrics, one row per answer) of a model, or of answers that were saved."""
    if is_answers(name):
        answers = read_answers(name)
        made_with = {key: answers[0][key] for key in MADE_WITH if key in answers[0]}
        return {"answers": name} | made_with, answers

    # Data before the model: a bad row should cost no half minute.
    folder = checkpoint_folder(name)
    _, examples = train.read_data(config)
    template_kwargs = train.parse_template_kwargs(config.template_kwargs)
    policy = train.Policy(str(folder), config.dtype, template_kwargs)
    examples = train.fitting(examples, policy, config.max_new_tokens, "held-out")
    metrics, groups = train.evaluate(policy, judge, examples, config.max_new_tokens)

    # A score without them cannot be compared with another one.
    made_with = {"judge": judge_name(config)}
    for key in OF_A_RUN:
        made_with[key] = getattr(config, key)

    # Saved before anything is said of them: a model as judge is paid for.
    answers = [row | made_with for row in result_rows(groups)]
    path = answers_path(config, name, folder)
    if train.is_first():
        path = save_answers(path, answers)
    how = f"at most {config.max_new_tokens} tokens"
    if config.template_kwargs:
        how += f", template_kwargs {config.template_kwargs}"
    say(f"{name} on {heldout_name(config)} ({how})\n{metrics_table(metrics)}\nanswers: {path}")
    settings = {"model": name, "n": len(examples), "answers": str(path)}
    return settings | made_with | metrics, answers


# ----------------------------------------------------------------------------- command line


def read_configs(args: argparse.Namespace) -> list[train.Config]:
    """The settings of each evaluation, checked like those of a run. Raises DataError, UserError."""
    # An empty text is a flag that was not given.
    given = {name: value for name, value in vars(args).items() if value != ""}
    names = given.pop("model")
    # train.py's rules, one by one: an evaluation has no others.
    for name, value in given.items():
        problem = train.setting_problem(name, value)
        if problem:
            raise DataError(f"--{name} {train.shown(name, value)}: {problem}")

    of_names = [run_settings(name) for name in names]
    runs = [settings for settings in of_names if settings]
    configs = []
    for settings in of_names:
        # A model that is no run answers like the run that it is compared with.
        if runs and not settings:
            settings = runs[0]
        if "eval_data" in given:
            settings = settings | {"data": ""}
        config = train.Config(**(settings | given))
        train.parse_template_kwargs(config.template_kwargs)
        configs.append(config)
    if len({heldout_name(config) for config in configs}) > 1:
        raise DataError("the two runs have other held-out prompts; give --eval_data for both")
    return configs


def heldout_name(config: train.Config) -> str:
    """Where the held-out prompts are, in words."""
    if config.data and not config.eval_data:
        return f"the held-out tenth of {config.data}"
    return config.eval_data or "data/heldout.jsonl"


def run_settings(name: str) -> dict:
    """What a run is evaluated with, by its folder or a checkpoint; {} for all else.

    Raises DataError.
    """
    folder = Path(name).absolute()
    if folder.name.startswith("checkpoint") and (folder.parent / "metrics.jsonl").exists():
        folder = folder.parent
    # Only runs have a log.
    if not (folder / "metrics.jsonl").exists():
        return {}

    saved = read_config(folder)
    settings = {}
    for key in (*OF_A_RUN, *PROMPTS):
        # A run of an older version may lack one, whose default it then had.
        if key in saved:
            problem = train.setting_problem(key, saved[key])
            if problem:
                raise DataError(f"{folder / 'config.json'}: {key}: {problem}")
            settings[key] = saved[key]
    return settings


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises DataError."""
    parser = Parser(
        prog="compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The trainer's defaults; a run's own evaluations are repeated to the digit.
    defaults = train.Config()
    of_a_run = {"default": argparse.SUPPRESS}
    add = parser.add_argument
    add("model", nargs="+", help="one model, run or file of answers, or two")
    add("--eval_data", default="", help="held-out prompts [the run's, or data/heldout.jsonl]")
    add("--judge", default=defaults.judge, help="offline, lexical, or a server's URL [%(default)s]")
    add("--judge_model", default="", help="the model's name on that server")
    limit = f"length limit of an answer [the run's, or {defaults.max_new_tokens}]"
    add("--max_new_tokens", type=int, help=limit, **of_a_run)
    template = 'JSON for the chat template, such as {"enable_thinking": false} [the run\'s]'
    add("--template_kwargs", help=template, **of_a_run)
    dtype = f"auto, float32 or bfloat16 [the run's, or {defaults.dtype}]"
    add("--dtype", help=dtype, **of_a_run)
    add("--out", default="", help="folder of the answers [beside the checkpoint, or runs]")
    args = parser.parse_args(argv)
    if len(args.model) > 2:
        raise DataError(f"{' '.join(args.model)}: give one model, or two")
    return args


def check_names(names: list[str], out: str) -> None:
    """Whether answers can be read, runs have checkpoints, and --out can be. Raises DataError."""
    # A wrong second name should not cost the evaluation of the first.
    for name in names:
        if is_answers(name):
            read_answers(name)
        else:
            checkpoint_folder(name)
    if out:
        make_folder(Path(out))


def evaluate_all(argv: list[str] | None) -> None:
    """Evaluates one model, or two and their difference. Raises DataError, UserError, JudgeError."""
    args = parse_arguments(argv)
    check_names(args.model, args.out)
    configs = read_configs(args)
    train.reuse_memory()
    train.join_processes()

    # Both are judged by one judge, whose cache serves both.
    judge = train.make_judge(configs[0])
    evaluations = []
    for config, name in zip(configs, args.model):
        evaluations.append(evaluate_one(config, name, judge))
    line = evaluations[0][0]
    if len(evaluations) == 2:
        line = compare_evaluations(args.model, evaluations)

    # Under torchrun all processes have the same line.
    if train.is_first():
        print(json.dumps(train.finite(line)))


def compare_evaluations(names: list[str], evaluations: list[tuple[dict, list[dict]]]) -> dict:
    """The line of a comparison; in words on stderr. Raises DataError."""
    before, after = evaluations
    for key in MADE_WITH:
        # Not refused: to compare two judges, or two limits, can be the purpose.
        values = [part[key] for part, _ in evaluations if key in part]
        if len(values) == 2 and values[0] != values[1]:
            say(f"not alike: {key} {values[0]!r} and {values[1]!r}")

    # Of the answers, not of the two scores: only they can be paired.
    difference = compare(before[1], after[1])
    interval = interval_text(*difference["difference_ci"], "+")
    prompts = f"{difference['n']} prompts, paired bootstrap"
    say(f"{names[1]} minus {names[0]}: {difference['difference']:+.3f}, {interval} ({prompts})")
    return {"before": before[0], "after": after[0], **difference}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    # A policy whose log-probs are nan cannot be sampled from; vLLM or a package may be missing.
    errors = (DataError, JudgeError, train.UserError, FloatingPointError, ImportError, OSError)
    status = run_tool("compare.py", evaluate_all, argv, errors)
    # Under torchrun; else there is nothing to leave.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
