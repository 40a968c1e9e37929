"""Is the memory line right? Real runs of train.py, each in its own process, and the estimate.

One JSON line per setting: the estimate that train.py prints before it loads anything, the growth of
the process's resident memory over the whole run at its peak, and the ratio of the two. Growth that
the same run shows with a model of two small layers (libraries, tokenizer, report) is taken off.

    OMP_NUM_THREADS=1 python tests/evidence/check_memory.py             # all, on a CPU
    OMP_NUM_THREADS=1 python tests/evidence/check_memory.py --only 3 4  # some, by number
    OMP_NUM_THREADS=1 python tests/evidence/check_memory.py --heap      # as users have it

What is estimated is what tensors take. So freed blocks are given back at once here, while in a
user's run the heap keeps them for the next tensor (train.reuse_memory); --heap shows that as well.
"""

import argparse
import json
import os
import re
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
    ("tiny", "--max_new_tokens 24 --pass_tokens 256"),
    ("smollm2", "--max_new_tokens 48 --pass_tokens 512"),
    ("smollm2", "--max_new_tokens 48 --pass_tokens 512 --checkpointing 1"),
    ("smollm2", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16"),
    ("smollm2", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16 --checkpointing 1"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256 --checkpointing 1"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16"),
    ("llama-300m", "--max_new_tokens 24 --pass_tokens 256 --lora_rank 16 --checkpointing 1"),
]


# Random models: hidden, layers. The second has 0.3 billion parameters.
SHAPES = {"tiny": (64, 2), "llama-300m": (1024, 20)}


def write_model(name: str, folder: str) -> None:
    """A random Llama with the embedded model's tokenizer."""
    hidden, layers = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(grpo.smollm2_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(source: Path, path: Path, count: int) -> str:
    """So many prompts of a file with rubrics about the number of words; the new file's name.

    Words of a random model's answers differ in number and in nothing else that a rubric asks for,
    and a group without a difference would be left out of the update: no gradients, no moments.
    """
    rubric = []
    for words in range(4, 48, 2):
        rubric.append({"text": f"Has at most {words} words.", "check": f"words <= {words}"})
    rows = []
    for line in source.read_text(encoding="utf8").split("\n")[:count]:
        rows.append(json.loads(line) | {"rubric": [c | {"weight": 1} for c in rubric]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


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
        data = write_rows(ROOT / "data" / "train.jsonl", Path(folder, "train.jsonl"), 20)
        held_out = write_rows(ROOT / "data" / "heldout.jsonl", Path(folder, "few.jsonl"), 2)
        arguments = ["--model", model, *COMMON, *flags.split(), "--data", data]
        arguments += ["--eval_data", held_out, "--judge", "lexical", "--out", f"{folder}/run"]
        status = train.main(arguments)
        # Nothing is measured where no group had anything to learn from.
        for row in train.read_log(Path(folder, "run", "metrics.jsonl"))[1:]:
            if row["zero_std_groups"] == 2:
                sys.exit(f"step {row['step']} made no update")

    # Not getrusage: its peak begins with that of the process that started this one.
    status_file = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status_file)[1]) * 1024 / 1e9
    [parts] = estimates
    estimate = grpo.largest_phase(parts) / 1e9
    measured = peak - before
    return {
        "status": status,
        "estimated_gb": round(estimate, 2),
        "measured_gb": round(measured, 2),
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
    libraries = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, _) in enumerate(SETTINGS):
            # The first one is what the others are compared with.
            if args.only and number not in [0, *args.only]:
                continue
            path = name
            if name in SHAPES:
                path = str(Path(folder, name))
                if not Path(path).exists():
                    write_model(name, path)
            command = [sys.executable, __file__, "--inside", str(number), path]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
            status = max(status, done.returncode)
            row = json.loads(done.stdout)
            if number == 0:
                libraries = row["measured_gb"] - row["estimated_gb"]
            row["libraries_gb"] = round(libraries, 2)
            row["ratio"] = round(row["estimated_gb"] / (row["measured_gb"] - libraries), 3)
            print(json.dumps(row), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
