"""Is the memory line right? Real runs of train.py, each in a process of its own, against the estimate.

One JSON line per setting: the estimate that train.py prints before it loads anything, the growth of
the process's resident memory over the whole run at its peak, and the ratio of the two.

    OMP_NUM_THREADS=1 python tests/evidence/check_memory.py             # all, on a CPU
    OMP_NUM_THREADS=1 python tests/evidence/check_memory.py --only 3 4  # some, by number
    OMP_NUM_THREADS=1 python tests/evidence/check_memory.py --heap      # as users have it

What is estimated is what tensors take. So freed blocks are given back at once here, while in a
user's run the heap keeps them for the next tensor (train.reuse_memory); --heap shows that as well.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import grpo
import train

# A step's rollouts fill two passes or more: gradients are there while the second one runs.
COMMON = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "8", "--eval_every", "100"]

# Name of the model, and what else is set.
SETTINGS = [
    ("smollm2", "--max_new_tokens 48 --pass_tokens 512"),
    ("smollm2", "--max_new_tokens 48 --pass_tokens 512 --checkpointing 1"),
    ("smollm2", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16"),
    ("smollm2", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16 --checkpointing 1"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256 --checkpointing 1"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16 --checkpointing 1"),
]


def write_model(folder: str) -> None:
    """A random Llama of 0.3 billion parameters with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(grpo.smollm2_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident() -> float:
    """GB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def leave_alone() -> None:
    """In the place of train.reuse_memory."""


def run_setting(model: str, flags: str) -> dict:
    """One run in this process: what was estimated, and by how much the process grew."""
    estimates = []
    original = grpo.estimate_memory

    def remember(*arguments, **options):
        """The estimate of the run itself."""
        parts = original(*arguments, **options)
        estimates.append(parts)
        return parts

    # The line rounds; the run's own numbers do not.
    grpo.estimate_memory = remember
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        train.reuse_memory = leave_alone
    before = resident()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        rows = (ROOT / "data" / "heldout.jsonl").read_text(encoding="utf8").split("\n")[:2]
        held_out = Path(folder, "few.jsonl")
        held_out.write_text("\n".join(rows) + "\n", encoding="utf8")
        arguments = ["--model", model, *COMMON, "--eval_data", str(held_out), *flags.split()]
        status = train.main([*arguments, "--judge", "lexical", "--out", f"{folder}/run"])

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    [parts] = estimates
    estimate = grpo.largest_phase(parts) / 1e9
    measured = peak - before
    return {
        "status": status,
        "estimated_gb": round(estimate, 2),
        "measured_gb": round(measured, 2),
        "ratio": round(estimate / measured, 3),
        "parts_gb": {name: round(size / 1e9, 2) for name, size in parts.items()},
    }


def main() -> int:
    """All settings, each in a process of its own: a peak never falls."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", help="these settings, by their numbers")
    parser.add_argument("--heap", action="store_true", help="freed memory stays with the process")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        number, path = args.inside
        name, flags = SETTINGS[int(number)]
        row = {"model": name, "flags": flags} | run_setting(path, flags)
        print(json.dumps(row), flush=True)
        return row["status"]

    environment = dict(os.environ)
    if not args.heap:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        random_model = str(Path(folder, "llama-300m"))
        write_model(random_model)
        for number, (name, _) in enumerate(SETTINGS):
            if args.only and number not in args.only:
                continue
            path = "smollm2" if name == "smollm2" else random_model
            command = [sys.executable, __file__, "--inside", str(number), path]
            done = subprocess.run(command, env=environment, check=False)
            status = max(status, done.returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
