"""What `--judge_ahead 1` saves, and what it costs in learning.

    python tests/evidence/bench_ahead.py                   # 50 ms, 500 ms and 2 s per call
    python tests/evidence/bench_ahead.py --model smollm2   # the default policy; or a folder
    python tests/evidence/bench_ahead.py --learning 8                   # seeds 0 to 7, form only
    python tests/evidence/bench_ahead.py --learning 3 --model smollm2   # the default run

The policy is a random model of four layers, so that a step takes about as long as its judge. Prints
one JSON line per server, which is a process of its own on this machine and only waits. Both runs of
a line do the same work: cold caches, the torch sampler, no evaluation in the steps that are timed
(all but the first and the last). judge, rest: seconds per step of judging, and of rollout and
training; after / ahead: of the run that judges after rolling out, and of the one that judges ahead.
share_of_ideal: the larger of judge_ahead and rest_ahead, over ahead: no order of phases beats it.

--learning compares rewards over the run, and held-out scores after it, by prompt and seed
(intervals.py). Without --model: the tests' random model of bytes, on prompts whose criteria are
about length, which are counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "evidence")]

import torch
from conftest import make_tiny
from intervals import compare_arms, comparison_table
from runs import flags_of_run, is_finished
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import grpo
import train


def make_small_model(folder: Path) -> str:
    """A random model with SmolLM2's tokenizer; its folder."""
    original = grpo.smollm2_folder()
    config = AutoConfig.from_pretrained(original)
    config.update({"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return str(folder)


def start_server(delay: float) -> tuple[subprocess.Popen, str]:
    """A server process that takes `delay` seconds per call, and its URL."""
    command = [sys.executable, str(ROOT / "tests" / "judge_server.py"), "--delay", str(delay)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().strip()


def time_run(flags: list[str], folder: str) -> tuple[float, dict]:
    """(seconds per step, means of the rows of the log) of one run."""
    # A step ends where its line is shown.
    ends = []
    show_step = train.show_step

    def noted(*arguments) -> None:
        """train.show_step, with a look at the clock."""
        ends.append(time.perf_counter())
        show_step(*arguments)

    train.show_step = noted
    try:
        status = train.main([*flags, "--out", f"{folder}/run"])
    finally:
        train.show_step = show_step
    if status:
        sys.exit(status)

    # The first step has nothing to overlap with, the last one evaluates.
    seconds = (ends[-2] - ends[0]) / (len(ends) - 2)
    rows = train.read_log(Path(folder) / "run" / "metrics.jsonl")[2:-1]
    means = {}
    for name in ("seconds_rollout", "seconds_judge", "seconds_train", "judge_calls", "tokens"):
        means[name] = statistics.fmean(row[name] for row in rows)
    return seconds, means


def measure(delay: float, flags: list[str]) -> dict:
    """Both runs with a server of this speed."""
    server, url = start_server(delay)
    flags = [*flags, "--judge", url, "--judge_model", "m"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            after, means = time_run([*flags, "--judge_ahead", "0"], folder)
        with tempfile.TemporaryDirectory() as folder:
            ahead, means_ahead = time_run([*flags, "--judge_ahead", "1"], folder)
    finally:
        server.kill()

    rest = means["seconds_rollout"] + means["seconds_train"]
    rest_ahead = means_ahead["seconds_rollout"] + means_ahead["seconds_train"]
    return {
        "seconds_per_call": delay,
        "calls": round(means["judge_calls"]),
        "judge": round(means["seconds_judge"], 2),
        "rest": round(rest, 2),
        "after": round(after, 2),
        "judge_ahead": round(means_ahead["seconds_judge"], 2),
        "rest_ahead": round(rest_ahead, 2),
        "ahead": round(ahead, 2),
        "share_of_ideal": round(max(means_ahead["seconds_judge"], rest_ahead) / ahead, 3),
        "load": round(os.getloadavg()[0], 1),
    }


# ------------------------------------------------------------------------- learning

LENGTHS = (("words <= 1", 3), ("words <= 3", 2), ("words >= 2", 1))
# A random policy has further to go than a trained one: more steps, and larger ones.
FORM_RUN = ["--judge", "lexical", "--lr", "0.003", "--steps", "40", "--max_new_tokens", "24"]
FORM_RUN += ["--eval_every", "1000", "--save_every", "1000"]


def write_form_rows(path: Path, numbers: range) -> str:
    """Prompts whose answers are judged by their length alone; the file's name."""
    rubric = []
    for check, weight in LENGTHS:
        rubric.append({"text": f"Keeps to {check}.", "weight": weight, "check": check})
    rows = []
    for number in numbers:
        question = f"What is {number} plus {number}?"
        rows.append({"id": f"p{number}", "question": question, "rubric": rubric})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf8")
    return str(path)


def mean_rewards(rows: list[dict]) -> dict[str, float]:
    """Prompt -> mean reward of these rows of samples.jsonl."""
    rewards = {}
    for row in rows:
        rewards.setdefault(row["id"], []).append(row["reward"])
    return {prompt: statistics.fmean(values) for prompt, values in rewards.items()}


def read_rewards(folder: Path) -> dict[str, dict[str, float]]:
    """Rewards by prompt: of all training rollouts, of the last five steps', of the last answers."""
    rows = train.read_log(folder / "samples.jsonl")
    last = rows[-1]["step"]
    training = [row for row in rows if row["split"] == "train"]
    late = [row for row in training if row["step"] > last - 5]
    heldout = [row for row in rows if row["split"] == "heldout" and row["step"] == last]
    return {
        "training": mean_rewards(training),
        "last five steps": mean_rewards(late),
        "held-out": mean_rewards(heldout),
    }


def compare_learning(flags: list[str], seeds: int, out: Path) -> None:
    """Prints each run's means, and the difference that judging ahead makes to each of them."""
    config, _ = train.parse_config(flags)
    steps = config.steps
    arms = {}
    for seed in range(seeds):
        for setting, arm in enumerate(("after", "ahead")):
            run = out / f"{arm}-{seed}"
            if not is_finished(run, steps):
                own = [*flags, "--seed", str(seed), "--judge_ahead", str(setting)]
                if train.main(flags_of_run(run, own)):
                    sys.exit(1)
            rewards = read_rewards(run)
            line = {"arm": arm, "seed": seed}
            for name, by_prompt in rewards.items():
                line[name] = round(statistics.fmean(by_prompt.values()), 3)
                table = arms.setdefault(name, {"after": [], "ahead": []})
                table[arm] += [(prompt, seed, reward) for prompt, reward in by_prompt.items()]
            print(json.dumps(line), flush=True)
    for name, rows in arms.items():
        print(f"\n{name}\n{comparison_table(compare_arms(rows, baseline='after'))}", flush=True)


# ------------------------------------------------------------------------- the command


def main() -> None:
    """One line per speed of the judge; or the comparison of learning."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delays", type=float, nargs="+", default=[0.05, 0.5, 2.0])
    parser.add_argument("--model", default="", help="smollm2 or a folder [a random small one]")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4, help="per step")
    parser.add_argument("--rollouts", type=int, default=4, help="per prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--learning", type=int, default=0, help="compare so many seeds instead")
    parser.add_argument("--out", default="runs/bench_ahead", help="with --learning: its runs")
    args = parser.parse_args()

    if args.learning and args.model:
        # Hours: kept, so that what was stopped goes on and what is finished is not run again.
        compare_learning(["--model", args.model], args.learning, Path(args.out))
        return
    if args.learning:
        with tempfile.TemporaryDirectory() as folder:
            model = make_tiny(Path(folder) / "tiny")
            flags = ["--model", str(model), *FORM_RUN]
            flags += ["--data", write_form_rows(Path(folder) / "train.jsonl", range(20))]
            heldout = write_form_rows(Path(folder) / "heldout.jsonl", range(20, 32))
            flags += ["--eval_data", heldout]
            compare_learning(flags, args.learning, Path(folder) / "runs")
        return

    with tempfile.TemporaryDirectory() as folder:
        # Two held-out prompts: evaluations are not what is measured.
        lines = (ROOT / "data" / "heldout.jsonl").read_text(encoding="utf8").split("\n")
        few = Path(folder) / "few.jsonl"
        few.write_text("\n".join(lines[:2]) + "\n", encoding="utf8")
        model = args.model or make_small_model(Path(folder) / "small")
        flags = ["--model", model, "--eval_data", str(few), "--steps", str(args.steps)]
        flags += ["--prompts_per_step", str(args.prompts), "--group_size", str(args.rollouts)]
        flags += ["--max_new_tokens", str(args.tokens)]
        flags += ["--eval_every", "1000", "--save_every", "1000"]
        for delay in args.delays:
            print(json.dumps(measure(delay, flags)), flush=True)


if __name__ == "__main__":
    main()
