"""Reading many rows and scoring a step's verdicts: one JSON line. A benchmark, not a timed test.

    python tests/evidence/bench_rar.py                   # 10,000 rows of HealthBench's size
    python tests/evidence/bench_rar.py --rows 100000
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rar

PROMPTS = 64
GROUP = 16
CRITERIA = 20
POINTS = (7, 5, 10, 3, 8, 2, 6, 9, -6, -3, -8, 4)


def some_words(rng: random.Random, n: int) -> str:
    """A text of n made-up words."""
    words = []
    for _ in range(n):
        words.append("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))))
    return " ".join(words)


def some_row(rng: random.Random, number: int) -> dict:
    """A row as large as HealthBench's: 12 criteria, a conversation of one to three turns."""
    messages = []
    for turn in range(rng.choice((1, 1, 3))):
        role = ("user", "assistant")[turn % 2]
        messages.append({"role": role, "content": some_words(rng, 60)})
    rubrics = []
    for points in POINTS:
        tags = ["level:example", f"axis:{rng.choice(rar.AXES)}"]
        rubrics.append({"criterion": some_words(rng, 30), "points": points, "tags": tags})
    return {
        "prompt_id": str(number),
        "prompt": messages,
        "rubrics": rubrics,
        "example_tags": ["theme:hedging"],
    }


def some_verdicts(rng: random.Random, missing: float) -> list[list[list[float | None]]]:
    """Verdicts [P][G][K] of a step, a share of them missing."""
    step = []
    for _ in range(PROMPTS):
        matrix = []
        for _ in range(GROUP):
            row = [float(rng.random() < 0.5) for _ in range(CRITERIA)]
            matrix.append([None if rng.random() < missing else score for score in row])
        step.append(matrix)
    return step


def peak_mb() -> float:
    """The most memory this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_reading(rng: random.Random, rows: int) -> dict:
    """Seconds and memory for reading so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with open(path, "w", encoding="utf8") as file:
            file.writelines(json.dumps(some_row(rng, number)) + "\n" for number in range(rows))

        before = peak_mb()
        # Beside the clock the processor's time: other work on the machine does not count in it.
        started = time.perf_counter()
        started_cpu = time.process_time()
        examples = rar.read_examples(path)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - started_cpu
        size = path.stat().st_size
    return {
        "rows": len(examples),
        "file_mb": round(size / 1e6),
        "read_seconds": round(seconds, 2),
        "read_cpu_seconds": round(cpu_seconds, 2),
        "process_mb": round(peak_mb()),
        "added_mb": round(peak_mb() - before),
    }


def bench_scoring(rng: random.Random) -> dict:
    """Milliseconds for the rewards of a step, by design, without and with missing verdicts."""
    weights = [rng.choice((-3, 1, 2, 5)) for _ in range(CRITERIA)]
    rubric = [rar.Criterion("", weight) for weight in weights]
    times = {}
    for label, missing in (("", 0.0), ("_with_missing", 0.05)):
        step = some_verdicts(rng, missing)
        for name in ("explicit", "points"):
            started = time.perf_counter()
            for matrix in step:
                rar.group_rewards(rar.DESIGNS[name].response_reward, rubric, matrix)
            milliseconds = 1000 * (time.perf_counter() - started)
            times[f"score_{name}{label}_ms"] = round(milliseconds, 1)
    return times


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Reading rows and scoring a step, timed.")
    parser.add_argument("--rows", type=int, default=10_000, help="rows to read [10000]")
    args = parser.parse_args(argv)
    rng = random.Random(0)
    print(json.dumps(bench_reading(rng, args.rows) | bench_scoring(rng)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
