"""Does a run fit? What each process would hold, from the model's config.json and train.py's flags.

    python tools/memory.py --model Qwen/Qwen2.5-1.5B-Instruct --checkpointing 1
    python tools/memory.py --cards 8 --card_gb 141 --model FOLDER --sampler vllm --group_size 16

For a machine that is not there: nothing is loaded, and no GPU is needed. The estimate is train.py's
own memory line (grpo.estimate_memory), for layers that compute in bfloat16 unless --dtype float32
is given. Exit status 2 with one line that names the settings to change when the run cannot fit.
"""

import argparse
import math
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpo
import train
from rar import DataError
from tools.report import Parser, run_tool


def plan(argv: list[str] | None) -> None:
    """Prints the memory line. Raises UserError when the run cannot fit."""
    names = " ".join(f"--{entry.name}" for entry in fields(train.Config))
    parser = Parser(
        prog="memory.py",
        description=__doc__,
        epilog=f"and every flag of train.py, see there: {names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cards", type=int, default=1, help="torchrun's processes, one per card")
    # What the driver and CUDA take of 80 GiB is not free.
    parser.add_argument("--card_gb", type=float, default=84.0, help="free GB (10^9) of each card")
    args, others = parser.parse_known_args(argv)
    if args.cards < 1:
        raise train.UserError(f"--cards {args.cards}: give at least 1")
    # nan is compared as false, so that everything would fit.
    if not 0 < args.card_gb < math.inf:
        raise train.UserError(f"--card_gb {args.card_gb:g}: give a finite number above 0")
    config, _ = train.parse_config(others)

    examples, heldout = train.read_data(config)
    bfloat16 = config.dtype != "float32"
    try:
        parts = train.estimate_run(config, examples, heldout, args.cards, bfloat16)
    except Exception as error:  # noqa: BLE001  (a folder can be broken in many ways)
        why = train.first_line(error)
        raise train.UserError(f"--model {config.model}: {why}") from None
    print(f"{args.cards} x {args.card_gb:g} GB; GB of each: {grpo.memory_line(parts)}")
    train.refuse_too_much(config, parts, args.cards, args.card_gb * 1e9)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    return run_tool("memory.py", plan, argv, (DataError, train.UserError, ImportError, OSError))


if __name__ == "__main__":
    sys.exit(main())
