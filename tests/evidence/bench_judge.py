"""How close the judge client comes to the ideal, and what a failing server costs it.

    python tests/evidence/bench_judge.py         # 4,096 questions, 64 workers, 50 ms per answer
    python tests/evidence/bench_judge.py --k 0   # 4,096 calls, each with all 8 of a response
    python tests/evidence/bench_judge.py --offline   # 256 verdicts of the embedded judge

Prints one JSON line per measurement. The server is a process of its own on this machine, the
cache a new SQLite file. ideal = calls / workers * 50 ms. Memory is the growth of this process's
peak, questions and verdicts included. The embedded judge reads 32 answers of 64 tokens, the length
limit of the default run, with 8 statements about each; the first batch reads the statements too.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from judge_server import truth

from judge import LLMJudge, Question, offline_judge, render_conversation
from rar import read_examples

CALLS = 4096
STATEMENTS = 8  # about each response
WORKERS = 64
DELAY = 0.05


def start_server(faults: float) -> tuple[subprocess.Popen, str]:
    """A server process with this share of failing requests, and its URL."""
    command = [sys.executable, str(ROOT / "tests" / "judge_server.py"), "--delay", str(DELAY)]
    command += ["--faults", str(faults), "--slow", "1.5"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().strip()


def make_questions(count: int) -> list[Question]:
    """Several statements about each of many responses of a thousand characters."""
    messages = [{"role": "user", "content": "What helps against a cold? " * 10}]
    conversation = render_conversation(messages)
    questions = []
    for i in range(count):
        response = f"Response {i // STATEMENTS}. " * 60
        questions.append(Question(conversation, response, f"Statement number {i}."))
    return questions


def peak_memory() -> float:
    """The largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(faults: float, k: int) -> dict:
    """One batch through a fresh server, with a cold cache. k: statements per call, 0 for all."""
    count = CALLS * (k or STATEMENTS)
    server, url = start_server(faults)
    try:
        warm = LLMJudge(url, "warm-up", workers=4, max_missing=1)
        warm.ask([Question("c", "r", f"{i}") for i in range(8)])
        before = peak_memory()
        questions = make_questions(count)
        with tempfile.TemporaryDirectory() as folder:
            judge = LLMJudge(
                url,
                "model",
                k=k,
                workers=WORKERS,
                timeout=(2, 0.5),
                patience=60,
                max_missing=1,
                cache_path=f"{folder}/cache.sqlite",
            )
            judge.probe()
            started = time.perf_counter()
            verdicts = judge.ask(questions)
            seconds = time.perf_counter() - started
            stats = judge.take_stats()
    finally:
        server.kill()

    wrong = 0
    missing = 0
    for question, verdict in zip(questions, verdicts):
        if verdict.score is None:
            missing += 1
        elif verdict.score != float(truth(question.statement)):
            wrong += 1
    ideal = CALLS / WORKERS * DELAY
    kinds = {name: n for name, n in stats.items() if name.startswith("judge_missing_")}
    return {
        "questions": count,
        "k": k,
        "workers": WORKERS,
        "faults": faults,
        "seconds": round(seconds, 2),
        "ideal": ideal,
        "ratio": round(seconds / ideal, 3),
        "wrong": wrong,
        "missing": missing,
        "retries": stats["judge_retries"],
        "p50_ms": round(1000 * stats["judge_p50_seconds"], 1),
        "memory_mb": round(peak_memory() - before, 1),
    } | kinds


def measure_offline() -> None:
    """The embedded judge: batches of 256 verdicts on texts of the built-in prompts."""
    judge = offline_judge()
    judge.load()
    examples = read_examples(ROOT / "data" / "train.jsonl")
    examples += read_examples(ROOT / "data" / "heldout.jsonl")
    statements = []
    for example in examples:
        for criterion in example.rubric:
            if not criterion.check:
                statements.append(criterion.text)

    for batch in range(4):
        # Other answers each time, about the same prompts: what a training step finds.
        questions = []
        for i in range(32):
            example = examples[i]
            ids = judge.tokenizer(f"{batch} {example.reference} " * 4)["input_ids"][:64]
            response = judge.tokenizer.decode(ids)
            for statement in statements[8 * (i // 8) : 8 * (i // 8) + 8]:
                questions.append(Question(example.question, response, statement))
        started = time.perf_counter()
        judge.ask(questions)
        seconds = time.perf_counter() - started
        row = {"verdicts": len(questions), "batch": batch + 1, "seconds": round(seconds, 2)}
        print(json.dumps(row), flush=True)


def main() -> None:
    """Three faultless batches, then one with 30 % faults of all kinds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=1, choices=(0, 1), help="0: all of a response")
    parser.add_argument("--offline", action="store_true", help="the embedded judge instead")
    args = parser.parse_args()
    if args.offline:
        measure_offline()
        return
    seconds = []
    for _ in range(3):
        row = measure(0.0, args.k)
        seconds.append(row["seconds"])
        print(json.dumps(row), flush=True)
    faulty = measure(0.3, args.k)
    times = round(faulty["seconds"] / min(seconds), 2)
    print(json.dumps(faulty | {"times_the_faultless_run": times}))


if __name__ == "__main__":
    main()
