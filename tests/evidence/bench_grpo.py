"""How fast are the sampler and a step, against the machine's limit, transformers and TRL?

One JSON line per figure.

    python tests/evidence/bench_grpo.py     # SmolLM2, float32; 10 minutes on two cores, 20 with TRL

Machines are shared and noisy: every ratio is taken from runs that alternate in one process, by the
median; the range is the smallest and the largest ratio that any of these runs would have given.
  bound      the matrix products of a decode step alone, on 64 rows, as if all else were free
  generate   transformers' own `generate`, on the same prompts, with as many new tokens
  TRL        one step of GRPOTrainer (same prompts, completions, lengths, optimiser), with trl
Completions are not allowed to end early here, so that everyone does the same work.
"""

import argparse
import importlib.util
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

import grpo
import rar
import train

TOKENS = 48
GROUP = 8


def settings(max_new_tokens: int):
    """What grpo.update reads."""
    return SimpleNamespace(
        loss="dapo",
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        epochs=1,
        minibatches=1,
        clip_low=0.2,
        clip_high=0.0,
        beta=0.0,
        tis_cap=0.0,
        mask_truncated=0,
        pass_tokens=3072,
        checkpointing=0,
    )


def sample(model, asked: list[list[int]], group_size: int, tokens: int, seed: int):
    """Completions of exactly so many tokens."""
    uniform = grpo.uniform_numbers(len(asked), group_size, tokens, seed)
    return grpo.sample(model, asked, group_size, tokens, 1.0, set(), uniform)


def timed(*functions, repeats: int = 5) -> list[list[float]]:
    """Seconds of each run of each function, called in turns."""
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for function, spent in zip(functions, seconds):
            started = time.perf_counter()
            function()
            spent.append(time.perf_counter() - started)
    return seconds


def ratio(longer: list[float], shorter: list[float]) -> dict:
    """Ratio of the medians, with its range."""
    middle = statistics.median(longer) / statistics.median(shorter)
    low = min(longer) / max(shorter)
    high = max(longer) / min(shorter)
    return {"ratio": round(middle, 3), "range": [round(low, 3), round(high, 3)]}


def show(name: str, **figures) -> None:
    """One line."""
    row = {"figure": name}
    for key, value in figures.items():
        row[key] = round(value, 3) if isinstance(value, float) else value
    print(json.dumps(row), flush=True)


def prompts(tokenizer, count: int, words: int = 0) -> list[list[int]]:
    """Token ids of built-in prompts; with `words`, drawn out to HealthBench's length."""
    examples = rar.read_examples(ROOT / "data" / "train.jsonl")
    rng = random.Random(0)
    chosen = []
    for example in examples[:count]:
        talk = [{"role": "user", "content": example.question}]
        if words:
            other = [e.reference for e in rng.sample(examples, 40)]
            length = rng.randint(words * 4 // 5, words * 6 // 5)
            story = " ".join(" ".join(other).split()[:length])
            talk = [
                {"role": "user", "content": story},
                {"role": "assistant", "content": "I see."},
                *talk,
            ]
        chosen.append(grpo.encode(tokenizer, talk))
    return chosen


def sampling(model, tokenizer) -> None:
    """Tokens per second at 64 rows: ours, generate's, and what matrix products alone allow."""
    asked = prompts(tokenizer, 8)
    usual = deepcopy(model)
    usual.set_attn_implementation("sdpa")  # what transformers takes by itself

    # generate wants its padding on the left.
    width = max(len(prompt) for prompt in asked)
    left = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    _, mask = grpo.pad(asked, model.device)
    real = mask.flip(1).long()
    rows = 8 * GROUP
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in linears}

    def ours():
        sample(model, asked, GROUP, TOKENS, 0)

    def theirs():
        usual.generate(
            left,
            attention_mask=real,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=GROUP,
            pad_token_id=0,
        )

    @torch.no_grad()
    def bound():
        for _ in range(TOKENS):
            for w in linears:
                torch.nn.functional.linear(inputs[w.shape[1]], w)

    mine, generate, limit = timed(ours, theirs, bound)
    show(
        "sampling at 64 rows",
        tokens_per_second=rows * TOKENS / statistics.median(mine),
        generate=rows * TOKENS / statistics.median(generate),
        bound=rows * TOKENS / statistics.median(limit),
        of_the_bound=ratio(limit, mine),
        times_generate=ratio(generate, mine),
    )


def our_step(model, optimizer, asked: list[list[int]], seed: int) -> dict:
    """Sample, random rewards, update: seconds of each part."""
    start = time.perf_counter()
    groups = sample(model, asked, GROUP, TOKENS, seed)
    sampled = time.perf_counter()
    rewards = torch.rand(len(groups), GROUP, generator=torch.Generator().manual_seed(seed))
    for group, row in zip(groups, grpo.advantages(rewards).tolist()):
        for rollout, advantage in zip(group, row):
            rollout.advantage = advantage
    grpo.update(model, optimizer, groups, settings(TOKENS))
    trained = time.perf_counter()
    return {"rollout": sampled - start, "train": trained - sampled, "step": trained - start}


def trl_trainer(folder: Path, tokenizer, asked: list[list[int]]):
    """A GRPOTrainer whose steps do the same work: transformers' generate, one step, no KL."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    texts = [tokenizer.decode(ids) for ids in asked]
    rng = random.Random(0)
    # 32 full sequences of 700 tokens do not fit into 24 GB: one group per pass of long prompts.
    passes = len(asked) if max(map(len, asked)) > 200 else 1
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=GROUP * len(asked) // passes,
            gradient_accumulation_steps=passes,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            max_steps=3,
            beta=0.0,
            loss_type="dapo",
            temperature=1.0,
            learning_rate=1e-6,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            generation_kwargs={"min_new_tokens": TOKENS},
            model_init_kwargs={"dtype": torch.float32},
            shuffle_dataset=False,
        )
        data = Dataset.from_list([{"prompt": text} for text in texts] * 8)

        def reward(completions, **more):
            """Random: only the work is compared."""
            return [rng.random() for _ in completions]

        return GRPOTrainer(
            model=str(folder),
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
        )


def trl_steps(trainer) -> list[float]:
    """Seconds of each step after the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the beginning to the end of each step."""

        def __init__(self):
            self.begun = 0.0
            self.seconds = []

        def on_step_begin(self, *args, **more):
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **more):
            self.seconds.append(time.perf_counter() - self.begun)

    clock = Clock()
    trainer.add_callback(clock)
    whole = time.perf_counter()
    trainer.train()
    show("TRL's own run", seconds=time.perf_counter() - whole, steps=len(clock.seconds))
    return clock.seconds[1:]


def steps(folder: Path, model, tokenizer, name: str, asked: list[list[int]]) -> None:
    """A whole step of ours and of TRL's, in turns of the same process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    our_step(model, optimizer, asked, 0)
    mine = [our_step(model, optimizer, asked, seed) for seed in (1, 2)]
    theirs = (
        trl_steps(trl_trainer(folder, tokenizer, asked)) if importlib.util.find_spec("trl") else []
    )
    mine += [our_step(model, optimizer, asked, seed) for seed in (3, 4)]
    middle = {part: statistics.median(m[part] for m in mine) for part in mine[0]}
    figures = {"seconds": middle["step"], "rollout": middle["rollout"], "train": middle["train"]}
    if theirs:
        figures |= {
            "trl": statistics.median(theirs),
            "times_trl": ratio(theirs, [m["step"] for m in mine]),
        }
    lengths = sorted(len(prompt) for prompt in asked)
    show(
        f"step, {name}",
        prompt_tokens=[lengths[0], lengths[-1]],
        rollouts=GROUP * len(asked),
        **figures,
    )


def overhead() -> None:
    """Share of a step, logs included, outside of sampling, learning and measuring the KL."""
    inside = [0.0]

    def clocked(function):
        """The function, its seconds counted."""

        def call(*args, **more):
            started = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                inside[0] += time.perf_counter() - started

        return call

    for name in ("sample", "update", "measure_kl"):
        setattr(grpo, name, clocked(getattr(grpo, name)))
    shares = []
    with tempfile.TemporaryDirectory() as parent:
        flags = ["--max_new_tokens", str(TOKENS), "--out", str(Path(parent, "run"))]
        config, _ = train.parse_config(flags)
        folder = train.RunFolder(config)
        run = train.begin(config, folder.path, None)
        for step in range(3):
            inside[0] = 0.0
            started = time.perf_counter()
            metrics, groups = train.train_step(run, step)
            folder.write_samples(step, "train", groups)
            folder.append("metrics.jsonl", [metrics])
            seconds = time.perf_counter() - started
            shares.append((seconds - inside[0]) / seconds)
        folder.release()
    show("share of a step outside sampling, learning and KL", share=statistics.median(shares))


def growth(model, tokenizer) -> None:
    """Seconds of a step over 2, 4 and 8 prompts: does twice the work cost twice the time?"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    our_step(model, optimizer, prompts(tokenizer, 2), 0)
    figures = {}
    for count in (2, 4, 8):
        asked = prompts(tokenizer, count)
        runs = [our_step(model, optimizer, asked, seed)["step"] for seed in range(2)]
        figures[f"at_{count * GROUP}"] = statistics.median(runs)
    figures["for_twice_32"] = figures["at_64"] / figures["at_32"]
    show("seconds per step by rollouts", **figures)


def main() -> int:
    """All figures, or the named part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("sampling", "short", "long", "memory", "overhead", "growth")
    parser.add_argument("--part", choices=parts, help="only this part")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="for memory: tokens of a completion"
    )
    args = parser.parse_args()
    part = args.part
    train.reuse_memory()
    torch.manual_seed(0)
    folder = grpo.smollm2_folder()
    model, tokenizer = grpo.load_policy("smollm2")
    if part == "memory":  # in a process of its own: a peak never falls
        asked = [(prompts(tokenizer, 1, 700)[0] * 2)[:600]]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        groups = sample(model, asked, 16, args.tokens, 0)
        for rollout, advantage in zip(groups[0], [1.0, -1.0] * 8):
            rollout.advantage = advantage
        grpo.update(model, optimizer, groups, settings(args.tokens))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        show(f"peak memory, 600 prompt tokens, 16 completions of {args.tokens}", gb=peak)
        return 0
    if part in (None, "growth"):
        growth(model, tokenizer)
    if part in (None, "sampling"):
        sampling(model, tokenizer)
    if part in (None, "short"):
        steps(folder, model, tokenizer, "short prompts", prompts(tokenizer, 4))
    if part in (None, "long"):
        steps(folder, model, tokenizer, "HealthBench-sized prompts", prompts(tokenizer, 4, 420))
    if part in (None, "overhead"):
        overhead()
    return 0


if __name__ == "__main__":
    sys.exit(main())
