"""Does a long run of a tiny random model with the lexical judge hold more and more memory?

Prints one JSON line: resident MB at step 100 and at the end, and their ratio.

    OMP_NUM_THREADS=1 python tests/evidence/bench_memory.py [--method rler] [--steps 2000]
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import conftest

import train


def resident() -> float:
    """Megabytes held now (not the peak)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """One run, looked at after each line of its log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--method", default="explicit")
    args = parser.parse_args()
    megabytes = {}
    original = train.RunFolder.append

    def append(self, name, rows):
        """Writes the line, and notes the memory."""
        original(self, name, rows)
        if name == "metrics.jsonl":
            megabytes[rows[-1]["step"]] = resident()

    train.RunFolder.append = append
    with tempfile.TemporaryDirectory() as folder:

        def make_folder(name):
            """What pytest gives to the fixture."""
            return Path(folder, name)

        factory = SimpleNamespace(mktemp=make_folder)
        Path(folder, "tiny").mkdir()
        model = conftest.tiny.__wrapped__(factory)
        flags = ["--prompts_per_step", "2", "--group_size", "4", "--max_new_tokens", "16"]
        flags += ["--eval_every", "50", "--save_every", "50", "--steps", str(args.steps)]
        flags += ["--judge", "lexical", "--model", str(model), "--method", args.method, "--out", f"{folder}/run"]
        with redirect_stdout(sys.stderr):
            status = train.main(flags)

    first = megabytes[min(100, args.steps)]
    last = megabytes[args.steps]
    row = {
        "status": status,
        "method": args.method,
        "steps": args.steps,
        "mb_at_100": round(first),
        "mb_at_end": round(last),
        "mb_between": [round(megabytes[step]) for step in range(250, args.steps, 250)],
        "ratio": round(last / first, 4),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
