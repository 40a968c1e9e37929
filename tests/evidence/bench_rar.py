"""Reading 10,000 rows and scoring a step's verdicts: one JSON line. A benchmark, not a timed test: python tests/bench_rar.py"""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rar

ROWS, PROMPTS, GROUP, CRITERIA = 10_000, 64, 16, 20


def rows(rng: random.Random, number: int) -> dict:
    """A row as large as HealthBench's: 12 criteria of 120 to 250 characters, a conversation of one to three turns."""
    words = lambda n: " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(n))
    talk = [{"role": ("user", "assistant")[k % 2], "content": words(60)} for k in range(rng.choice((1, 1, 3)))]
    items = [{"criterion": words(30), "points": p, "tags": ["level:example", f"axis:{rng.choice(rar.AXES)}"]} for p in (7, 5, 10, 3, 8, 2, 6, 9, -6, -3, -8, 4)]
    return {"prompt_id": str(number), "prompt": talk, "rubrics": items, "example_tags": ["theme:hedging"]}


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with open(path, "w", encoding="utf8") as file:
            for number in range(ROWS):
                file.write(json.dumps(rows(rng, number)) + "\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        examples = rar.read_examples(path)
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = path.stat().st_size
    rubric = [rar.Criterion("", rng.choice((-3, 1, 2, 5)), category="") for _ in range(CRITERIA)]
    steps = [[[float(rng.random() < 0.5) for _ in range(CRITERIA)] for _ in range(GROUP)] for _ in range(PROMPTS)]
    times = {}
    for name, matrices in (("", steps), ("_with_missing", [[[None if rng.random() < 0.05 else v for v in row] for row in m] for m in steps])):
        for method, aggregate in rar.AGGREGATIONS.items():
            started = time.perf_counter()
            for matrix in matrices:
                rar.group_rewards(aggregate, rubric, matrix)
            times[f"score_{method}{name}_ms"] = round(1000 * (time.perf_counter() - started), 1)
    print(json.dumps({"rows": len(examples), "file_mb": round(size / 1e6), "read_seconds": round(seconds, 2),
                      "process_mb": round(memory / 1024), "added_mb": round((memory - before) / 1024), **times}))  # fmt: skip


if __name__ == "__main__":
    main()
