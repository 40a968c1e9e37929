"""How close the judge client comes to the ideal, and what a failing server costs it. One JSON line a figure.

    python tests/bench_judge.py          # 4,096 questions, 64 workers, a server process that takes 50 ms each

The server is a process of its own on this machine. ideal = questions / workers * 50 ms. Memory is the growth of this
process's peak, questions and verdicts included.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from judge_server import truth  # noqa: E402

from judge import LLMJudge, Question, material  # noqa: E402

COUNT, WORKERS, DELAY = 4096, 64, 0.05


def measure(faults: float) -> dict:
    """One batch through a fresh server with this share of failing requests."""
    command = [sys.executable, Path(__file__).with_name("judge_server.py"), "--delay", str(DELAY), "--faults", str(faults), "--slow", "1.5"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        LLMJudge(url, "warm-up", workers=4, max_missing=1).ask([Question("c", f"{i}") for i in range(8)])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        talk = [{"role": "user", "content": "What helps against a cold? " * 10}]
        contexts = [material(talk, f"Response {i}. " * 60) for i in range(COUNT // 8)]
        asked = [Question(contexts[i // 8], f"Statement number {i}.") for i in range(COUNT)]
        judge = LLMJudge(url, "model", workers=WORKERS, timeout=(2, 0.5), patience=60, max_missing=1)
        started = time.perf_counter()
        verdicts = judge.ask(asked)
        seconds = time.perf_counter() - started
    finally:
        server.kill()
    wrong = sum(v.score is not None and v.score != float(truth(q.statement)) for q, v in zip(asked, verdicts))
    ideal = COUNT / WORKERS * DELAY
    return {
        "questions": COUNT, "workers": WORKERS, "faults": faults, "seconds": round(seconds, 2), "ideal": ideal, "ratio": round(seconds / ideal, 3),
        "wrong": wrong, "missing": sum(v.score is None for v in verdicts), "retries": judge.stats["retries"],
        "p50_ms": round(1000 * sorted(judge.latency)[len(judge.latency) // 2], 1),
        "memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
    }  # fmt: skip


if __name__ == "__main__":
    clean = [measure(0.0) for _ in range(3)]
    for row in clean:
        print(json.dumps(row), flush=True)
    faulty = measure(0.3)
    print(json.dumps(faulty | {"times_the_faultless_run": round(faulty["seconds"] / min(r["seconds"] for r in clean), 2)}))
