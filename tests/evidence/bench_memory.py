"""2,000 steps of a tiny random model with the offline judge: is more memory held at the end than after 100 steps?

Prints one JSON line: resident MB at step 100, at the end, their ratio. A benchmark: OMP_NUM_THREADS=1 python tests/bench_memory.py
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import conftest

import train


def resident() -> float:
    """Megabytes held now (not the peak)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--method", default="explicit")
    args = parser.parse_args()
    held, original = {}, train.Run.append

    def append(self, name, rows):
        original(self, name, rows)
        if name == "metrics.jsonl":
            held[rows[-1]["step"]] = resident()

    train.Run.append = append
    with tempfile.TemporaryDirectory() as folder:
        model = conftest.tiny.__wrapped__(SimpleNamespace(mktemp=lambda name: Path(folder, name)))
        flags = "--prompts_per_step 2 --group_size 4 --max_new_tokens 16 --eval_every 50 --save_every 50".split()
        sys.stdout, shown = sys.stderr, sys.stdout
        status = train.main(["--model", str(model), "--method", args.method, "--steps", str(args.steps), *flags, "--out", str(Path(folder, "run"))])
        sys.stdout = shown
    first, last = held[min(100, args.steps)], held[args.steps]
    print(json.dumps({"status": status, "method": args.method, "steps": args.steps, "mb_at_100": round(first), "mb_at_end": round(last), "mb_between": [round(held[n]) for n in range(250, args.steps, 250)], "ratio": round(last / first, 4)}))


if __name__ == "__main__":
    main()
