"""How fast the sampler and a whole step are, against the machine's limit, transformers and TRL. One JSON line a figure.

    python tests/bench_grpo.py                  # SmolLM2-135M, float32; 10 minutes on two cores, 20 with TRL installed

Machines are shared and noisy: every ratio is taken from runs that alternate in one process, by the median; a range beside it
is the smallest and the largest ratio that any of these runs would have given.
  bound      the matrix products of a decode step alone, on 64 rows, as if all else were free
  generate   transformers' own `generate`, on the same prompts, with as many new tokens
  TRL        one step of GRPOTrainer (same prompts, completions, lengths and optimiser), when trl can be imported
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import grpo  # noqa: E402
import rar  # noqa: E402
import train  # noqa: E402

TOKENS, GROUP = 48, 8


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
    return {"ratio": round(middle, 3), "range": [round(min(longer) / max(shorter), 3), round(max(longer) / min(shorter), 3)]}


def show(name: str, **figures) -> None:
    """One line."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"figure": name, **rounded}), flush=True)


def prompts(tokenizer, count: int, words: int = 0) -> list[list[int]]:
    """Token ids of built-in prompts; with `words`, drawn out to conversations of HealthBench's length."""
    examples = rar.read_examples(train.HERE / "data" / "train.jsonl")
    rng, chosen = random.Random(0), []
    for example in examples[:count]:
        talk = [{"role": "user", "content": example.question}]
        if words:
            other = [e.reference for e in rng.sample(examples, 40)]
            length = rng.randint(words * 4 // 5, words * 6 // 5)
            story = " ".join(" ".join(other).split()[:length])
            talk = [{"role": "user", "content": story}, {"role": "assistant", "content": "I see."}, *talk]
        chosen.append(grpo.encode(tokenizer, talk))
    return chosen


def sampling(model, tokenizer) -> None:
    """Tokens a second at 64 rows: ours, generate's, and what the matrix products alone would allow."""
    asked, usual = prompts(tokenizer, 8), deepcopy(model)
    usual.set_attn_implementation("sdpa")  # what transformers takes by itself; ours only speeds up one query a row
    ids, mask = grpo.padded(asked, model.device)
    left, real = ids.flip(1), mask.flip(1)  # generate wants its padding on the left
    left = torch.stack([torch.cat([row.new_zeros(len(row) - int(m.sum())), row[: int(m.sum())]]) for row, m in zip(ids, mask)])
    real = mask.flip(1).long()
    rows = 8 * GROUP
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in linears}

    def ours():
        grpo.sample(model, asked, GROUP, TOKENS, 1.0, set(), 0)

    def theirs():
        usual.generate(left, attention_mask=real, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=True, temperature=1.0,
                       top_k=0, top_p=1.0, num_return_sequences=GROUP, pad_token_id=0)  # fmt: skip

    @torch.no_grad()
    def bound():
        for _ in range(TOKENS):
            for w in linears:
                torch.nn.functional.linear(inputs[w.shape[1]], w)

    mine, generate, limit = timed(ours, theirs, bound)
    speed = lambda seconds: rows * TOKENS / statistics.median(seconds)
    show("sampling at 64 rows", tokens_per_second=speed(mine), generate=speed(generate), bound=speed(limit),
         of_the_bound=ratio(limit, mine), times_generate=ratio(generate, mine))  # fmt: skip


def our_step(model, optimizer, asked: list[list[int]], seed: int) -> dict:
    """Sample, random rewards, update: seconds of each part."""
    clock = [time.perf_counter()]
    groups = grpo.sample(model, asked, GROUP, TOKENS, 1.0, set(), seed)
    clock.append(time.perf_counter())
    rewards = torch.rand(len(groups), GROUP, generator=torch.Generator().manual_seed(seed))
    for group, row in zip(groups, grpo.advantages(rewards).tolist()):
        for rollout, advantage in zip(group, row):
            rollout.advantage = advantage
    grpo.update(model, optimizer, groups, grpo.Settings(loss="dapo", max_new_tokens=TOKENS))
    clock.append(time.perf_counter())
    return {"rollout": clock[1] - clock[0], "train": clock[2] - clock[1], "step": clock[2] - clock[0]}


def trl_trainer(folder: Path, tokenizer, asked: list[list[int]]):
    """A GRPOTrainer whose steps do the same work: generate with transformers, one optimiser step a batch, no KL."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    texts = [tokenizer.decode(ids) for ids in asked]
    rng = random.Random(0)
    # 32 full sequences of 700 tokens in one pass do not fit into 24 GB: long prompts are trained on a group at a time.
    passes = len(asked) if max(map(len, asked)) > 200 else 1
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=GROUP * len(asked) // passes, gradient_accumulation_steps=passes,
            num_generations=GROUP, max_completion_length=TOKENS, max_steps=3, beta=0.0, loss_type="dapo", temperature=1.0, learning_rate=1e-6, report_to=[], save_strategy="no",
            logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            generation_kwargs={"min_new_tokens": TOKENS}, model_init_kwargs={"dtype": torch.float32}, shuffle_dataset=False,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": t} for t in texts] * 8)
        reward = lambda completions, **more: [rng.random() for _ in completions]
        return GRPOTrainer(model=str(folder), reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)


def trl_steps(trainer) -> list[float]:
    """Seconds of each step after the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begun, seconds = 0.0, []

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
    theirs = trl_steps(trl_trainer(folder, tokenizer, asked)) if importlib.util.find_spec("trl") else []
    mine += [our_step(model, optimizer, asked, seed) for seed in (3, 4)]
    middle = {part: statistics.median(m[part] for m in mine) for part in mine[0]}
    figures = {"seconds": middle["step"], "rollout": middle["rollout"], "train": middle["train"]}
    if theirs:
        figures |= {"trl": statistics.median(theirs), "times_trl": ratio(theirs, [m["step"] for m in mine])}
    show(f"step, {name}", prompt_tokens=[min(map(len, asked)), max(map(len, asked))], rollouts=GROUP * len(asked), **figures)


def overhead() -> None:
    """Share of a training step, logs included, that is spent outside of sampling, learning and measuring the KL."""
    config, _ = train.parse_config(["--max_new_tokens", str(TOKENS)])
    policy = train.Policy("smollm2")
    examples = train.fitting(rar.read_examples(train.HERE / "data" / "train.jsonl"), policy, config, "training")[:4]
    method = rar.RubricReward(train.OfflineJudge())
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-6, fused=True)
    session, inside = train.Session(config, policy, grpo.freeze(policy.model), optimizer, method, examples, [], []), [0.0]

    def clocked(function):
        def call(*args, **more):
            started = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                inside[0] += time.perf_counter() - started

        return call

    for name in ("sample", "update", "measure_kl"):
        setattr(grpo, name, clocked(getattr(grpo, name)))
    with tempfile.TemporaryDirectory() as folder:
        run, shares = train.Run(Path(folder, "run"), config), []
        for step in range(3):
            inside[0], started = 0.0, time.perf_counter()
            metrics, groups = train.one_step(session, examples, step)
            run.samples(step, "train", groups)
            run.append("metrics.jsonl", [metrics])
            whole = time.perf_counter() - started
            shares.append((whole - inside[0]) / whole)
    show("share of a step outside sampling, learning and KL", share=statistics.median(shares))


def growth(model, tokenizer) -> None:
    """Seconds of a step over 2, 4 and 8 prompts: does twice the work cost twice the time?"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    our_step(model, optimizer, prompts(tokenizer, 2), 0)
    seconds = {n * GROUP: statistics.median(our_step(model, optimizer, prompts(tokenizer, n), k)["step"] for k in range(2)) for n in (2, 4, 8)}
    show("seconds a step by rollouts", **{f"at_{n}": s for n, s in seconds.items()}, for_twice_32=seconds[64] / seconds[32])


def main() -> int:
    """All figures, or the named part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("sampling", "short", "long", "memory", "overhead", "growth"), help="only this part")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="for memory: tokens of a completion")
    args = parser.parse_args()
    part = args.part
    train.keep_memory()
    torch.manual_seed(0)
    folder = grpo.smollm2_folder()
    model, tokenizer = grpo.load_policy("smollm2")
    if part == "memory":  # in a process of its own: a peak never falls
        asked = [(prompts(tokenizer, 1, 700)[0] * 2)[:600]]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        groups = grpo.sample(model, asked, 16, args.tokens, 1.0, set(), 0)
        for rollout, advantage in zip(groups[0], [1.0, -1.0] * 8):
            rollout.advantage = advantage
        grpo.update(model, optimizer, groups, grpo.Settings(max_new_tokens=args.tokens))
        show(f"peak memory, 600 prompt tokens, 16 completions of {args.tokens}", gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
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
