"""Reinforcement learning from rubric rewards: one command, from prompts to a better model.

    data/*.jsonl -> Example -> policy.rollouts -> Rollout x G -> method.score -> grpo.update -> ...
                    (prompt,    (one group         (text, ids,    (one verdict    (loss,
                     rubric)     per prompt)        log-probs)     per criterion)  backward)

    python train.py                                 # SmolLM2-135M, two CPU cores, ten minutes
    python train.py --method points --seed 1        # every field of Config is a flag
    python train.py --data FILE.jsonl --steps 3     # own prompts or HealthBench rows
    python train.py --resume RUN                    # continue a run that was stopped
    torchrun --nproc_per_node 8 train.py            # several processes

A run's folder holds config.json, prompts.jsonl, metrics.jsonl (one line per step), samples.jsonl
(one line per rollout, with every verdict), report.html, report.png and checkpoint (loads with
transformers). tools/report.py compares runs, tools/compare.py evaluates one.

Read Config, data, Policy, the loop, evaluation and `begin`, in this order: the first third of the
file. The rest keeps a run safe, and can be skipped: processes, terminal, flags, the run's folder,
logs, checkpoints, resuming, signals, judging ahead, main. Of several processes each samples its
share of the prompts, the first one judges, each takes the gradient of its share of the rollouts
(grpo.update), and all of them step by the sum. Each holds a slice of the policy (grpo.shard).
"""

import argparse
import ctypes
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import transformers

import arlrr
import grpo
import rar
import rler
from judge import (
    JudgeError,
    LexicalJudge,
    LLMJudge,
    Panel,
    Verdict,
    offline_judge,
    progress_bar,
    without_password,
)
from tools import report
from tools.report import (
    interval_text,
    printable,
    summarise,
    without_secrets,
    write_report,
)

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something that the user can put right: printed as one line, exit status 2."""


# ---------------------------------------------------------------------- settings


class Limits(NamedTuple):
    """The values of a number that make sense."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf


# As annotated types: what a setting is, what it does (its help text), and its limits.
COUNT = Limits(at_least=1, at_most=10**6)
SHARE = Limits(at_least=0, at_most=1)
POSITIVE = Limits(above=0)
NOT_NEGATIVE = Limits(at_least=0)
ONE_IF_ON = Literal[0, 1]
METHODS = Literal[
    "explicit", "points", "predefined", "implicit", "likert", "reference_likert",
    "axis_mean", "gdpo", "rler", "arlrr",
]  # fmt: skip


@dataclass
class Config:
    """Every setting of a run, once. Each is a flag of the command line."""

    method: Annotated[
        METHODS,
        "reward: explicit (RaR, Eq. 1; where rows have categories these are the weights), points "
        "(HealthBench; by the rows' weights), rler (evolving rubrics), arlrr (one class of "
        "criteria at a time), axis_mean and gdpo (all classes count alike); with a model as judge "
        "also predefined, implicit, likert, reference_likert",
    ] = "explicit"
    model: Annotated[str, "policy: smollm2 (embedded), a folder, or a hub id"] = "smollm2"
    lora_rank: Annotated[
        int,
        "0: all weights are trained; 32, for example: adapters of this rank on every linear layer "
        "(LoRA), for a model of which a GPU holds little more than the weights",
        Limits(0, 10**4),
    ] = 0
    data: Annotated[str, "training prompts, own format or HealthBench's [data/train.jsonl]"] = ""
    eval_data: Annotated[str, "held-out prompts [data/heldout.jsonl; 1/10 of --data, <= 24]"] = ""
    prompts: Annotated[
        int, "how many training prompts; 0: all of --data, or 20 of the built-in", NOT_NEGATIVE
    ] = 0

    judge: Annotated[
        str,
        "offline (a small model compares words in context), lexical (compares words as strings), "
        "or the base URL of an OpenAI-like server; URL,URL: their mean",
    ] = "offline"
    judge_model: Annotated[str, "the model's name there (key: environment, JUDGE_API_KEY)"] = ""
    judge_k: Annotated[int, "criteria per call to the judge; 0: all", NOT_NEGATIVE] = 1
    judge_rpm: Annotated[float, "requests per minute; 0: no limit", NOT_NEGATIVE] = 0.0
    judge_tpm: Annotated[float, "tokens per minute; 0: no limit", NOT_NEGATIVE] = 0.0
    judge_ahead: Annotated[
        ONE_IF_ON,
        "1: the next batch is judged while the model trains on this one, so rollouts are one "
        "update old (--tis_cap corrects that)",
    ] = 0
    eval_judge: Annotated[str, "a second judge, of held-out answers only: no part of a reward"] = ""
    eval_judge_model: Annotated[str, "its model's name"] = ""

    steps: Annotated[int, "updates of the policy", COUNT] = 25
    prompts_per_step: Annotated[int, "prompts per step", Limits(1, 10**4)] = 4
    # A group of one has no other answer to be better than.
    group_size: Annotated[int, "rollouts per prompt (G)", Limits(2, 10**4)] = 8
    temperature: Annotated[
        float, "of sampling and of scoring; a small model rambles at 1.0", Limits(0.01, 100)
    ] = 0.7
    max_new_tokens: Annotated[int, "length limit of a completion", COUNT] = 64
    template_kwargs: Annotated[
        str, 'JSON for the chat template, such as {"enable_thinking": false}'
    ] = ""
    sampler: Annotated[
        Literal["torch", "vllm", "vllm_sleep"],
        "torch (any machine), vllm (in this process, for a GPU), or vllm_sleep, which frees the "
        "engine's memory during updates and is slower",
    ] = "torch"
    vllm_memory: Annotated[float, "GiB for the engine's keys and values", POSITIVE] = 4.0

    loss: Annotated[
        Literal["grpo", "dr_grpo", "dapo"],
        "token weights: dr_grpo (constant), grpo (sequence mean; shrank the default run's answers "
        "to a third), dapo (token mean)",
    ] = "dr_grpo"
    advantage: Annotated[
        Literal["std", "mean", "none"], "(r - mean) / std of the group, r - mean, or r alone"
    ] = "std"
    lr: Annotated[
        float,
        "AdamW's, after a warm-up; 1e-6 to 5e-6 at 7B, with --lora_rank ten times that; 0: 1e-4, "
        "with --lora_rank 1e-3",
        NOT_NEGATIVE,
    ] = 0.0
    epochs: Annotated[int, "passes over a batch of rollouts", COUNT] = 1
    minibatches: Annotated[int, "optimiser steps per epoch, each on a part", COUNT] = 1
    clip_low: Annotated[float, "PPO's clip: ratio at least 1 - this", SHARE] = 0.2
    clip_high: Annotated[
        float, "ratio at most 1 + this; 0: 0.28 with --loss dapo, else as clip_low", NOT_NEGATIVE
    ] = 0.0
    beta: Annotated[
        float,
        "weight of the KL penalty; 0: only measured; -1: not measured either, so that no second "
        "model is held",
        Limits(at_least=-1),
    ] = 0.0
    tis_cap: Annotated[
        float,
        "truncated importance sampling against the sampler's log-probs: cap on a token's weight; "
        "0: off; -1: 2 where they differ (vllm's kernels, judge_ahead's older policy), else off",
        Limits(at_least=-1),
    ] = -1.0
    mask_truncated: Annotated[ONE_IF_ON, "1: cut-off completions stay out of the loss"] = 0
    pass_tokens: Annotated[int, "tokens per training pass (memory)", Limits(at_least=1)] = 3072
    checkpointing: Annotated[ONE_IF_ON, "1: gradient checkpointing (memory)"] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], "of the layers' arithmetic; weights are float32"
    ] = "auto"

    rubrics_kept: Annotated[int, "rler: evolving rubrics kept per prompt (K)", COUNT] = 5
    schedule: Annotated[
        Literal["search", "lowest_score", "cyclic", "random"], "arlrr: how a class is chosen"
    ] = "search"
    stage: Annotated[int, "arlrr: updates before the next class is chosen", COUNT] = 5
    class_by: Annotated[str, "what makes a class: axis, category, or a kind of tag"] = "axis"
    validation: Annotated[int, "arlrr: training prompts held back to choose by", COUNT] = 12

    seed: Annotated[int, "of prompt order and sampling", Limits(0, 2**63 - 1)] = 0
    out: Annotated[str, "the run's folder [runs/<method>-seed<seed>-<time>]"] = ""
    resume: Annotated[
        str, "the folder of a run to continue; --steps, --eval_every and --save_every may change"
    ] = ""
    eval_every: Annotated[int, "steps between evaluations (first and last are made)", COUNT] = 10
    save_every: Annotated[int, "steps between checkpoints (the last is made)", COUNT] = 10

    def __post_init__(self):
        # Resolved here, so that config.json holds the number that was used. Adapters begin at 0
        # and are few: they take, and need, larger steps (see LORA_ALPHA in grpo.py).
        if self.lr == 0:
            self.lr = 1e-3 if self.lora_rank else 1e-4

        # vLLM's kernels give other log-probs than the trainer's, and so does a policy one update
        # older; torch's sampler and the trainer agree (in bfloat16 to a few thousandths).
        if self.tis_cap < 0:
            self.tis_cap = 0.0
            if self.sampler != "torch" or self.judge_ahead:
                self.tis_cap = 2.0


# ---------------------------------------------------------------------- data


def read_data(config: Config) -> tuple[list[rar.Example], list[rar.Example]]:
    """Training and held-out examples. Raises DataError, UserError."""
    # A file of one's own is never tested on the built-in prompts: they are about other things.
    train = rar.read_examples(config.data or HERE / "data" / "train.jsonl")
    if config.eval_data:
        return train, rar.read_examples(config.eval_data)
    if not config.data:
        return train, rar.read_examples(HERE / "data" / "heldout.jsonl")

    # No held-out file: hold back a tenth, by a shuffle that is the same for every seed, and never
    # train on it.
    random.Random(0).shuffle(train)
    heldout, train = hold_back(train, min(24, max(1, len(train) // 10)))
    if not train:
        problem = "one prompt cannot be both trained on and held out; give --eval_data or more rows"
        raise UserError(f"{config.data}: {problem}")
    return train, heldout


def hold_back(
    examples: list[rar.Example], size: int
) -> tuple[list[rar.Example], list[rar.Example]]:
    """(the rows of the first questions, as many as fit into `size`, all other rows)."""
    # A question may have several rows, its options in other orders: it goes to one side whole.
    rows_of = defaultdict(list)
    for example in examples:
        rows_of[rar.question_key(example)].append(example)
    held = set()
    for rows in rows_of.values():
        if len(held) + len(rows) <= size:
            held.update(example.id for example in rows)
    # Where no question is so small, the smallest one.
    if not held:
        held.update(example.id for example in min(rows_of.values(), key=len))
    chosen = [example for example in examples if example.id in held]
    rest = [example for example in examples if example.id not in held]
    return chosen, rest


def separate(
    config: Config, examples: list[rar.Example], heldout: list[rar.Example]
) -> list[rar.Example]:
    """The held-out prompts, with ids of their own. Raises UserError where some are trained on."""
    questions = {rar.question_key(example) for example in examples}
    both = [example for example in heldout if rar.question_key(example) in questions]
    if both:
        which = f"{len(both)} of its prompts, {both[0].id!r:.100} for one, are in --data as well"
        raise UserError(f"--eval_data {config.eval_data}: {which}; take them out of one of the two")

    # Samples, and a report, name prompts by their ids: both files may count from 0, or have none.
    ids = {example.id for example in examples}
    separated = []
    for example in heldout:
        if example.id in ids:
            example = replace(example, id=f"held out {example.id}")
        separated.append(example)
    return separated


def next_batch(examples: list[rar.Example], config: Config, step: int) -> list[rar.Example]:
    """The prompts of a step: laps over all examples, each lap in an order of its own.

    A prompt appears twice where a lap ends inside the batch, or where the batch is the larger one.
    """
    batch = []
    start = step * config.prompts_per_step
    for position in range(start, start + config.prompts_per_step):
        lap, place = divmod(position, len(examples))
        order = lap_order(len(examples), config.seed, lap)
        batch.append(examples[order[place]])
    return batch


@lru_cache(maxsize=1)
def lap_order(size: int, seed: int, lap: int) -> list[int]:
    """The order of so many examples in a lap."""
    # It follows from (seed, lap) alone: a resumed run finds its place without a cursor. The last
    # one is kept: steps of the same lap need not shuffle all of the data again.
    order = list(range(size))
    random.Random(f"{seed}-{lap}").shuffle(order)
    return order


# ---------------------------------------------------------------------- the policy


class Policy:
    """Model, tokenizer, and what sampling needs to know of them."""

    def __init__(
        self,
        name: str,
        dtype: str = "auto",
        template_kwargs: dict | None = None,
        lora_rank: int = 0,
        attention: str = "",
    ):
        """name: smollm2, a folder, or a hub id. lora_rank, attention: see grpo.load_policy.

        Raises UserError when it cannot be loaded.
        """
        self.template_kwargs = template_kwargs
        self.device = "cpu"
        if torch.cuda.is_available():
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        # None lets the device decide.
        bfloat16 = {"auto": None, "bfloat16": True, "float32": False}[dtype]
        try:
            loaded = grpo.load_policy(name, self.device, bfloat16, lora_rank, attention)
            self.model, self.tokenizer = loaded
        except ImportError:
            # It names the package to install.
            raise
        except Exception as error:  # noqa: BLE001  (a folder can be broken in many ways)
            why = f"cannot be loaded as a model ({first_line(error)})"
            raise UserError(f"{name}: {why}; give smollm2, a folder or a hub id") from None

        self.ends = grpo.end_tokens(self.model, self.tokenizer)
        self.context = grpo.context_length(self.model)
        self.engine = None  # vLLM's, see start_engine

    def encode(self, example: rar.Example) -> list[int]:
        """Token ids of the example's prompt, ready for the assistant's turn."""
        return grpo.encode(self.tokenizer, example.prompt, self.template_kwargs)

    def rollouts(
        self,
        examples: list[rar.Example],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int = 0,
        description: str = "rollouts",
    ) -> list[rar.Group]:
        """One group of rollouts per example, with their text.

        Each process samples its share; all of them get all groups.
        """
        rank, world = grpo.rank_and_world()
        prompts = [self.encode(example) for example in examples]
        mine = prompts[rank::world]
        common = (group_size, max_new_tokens, temperature, self.ends)

        # The bar counts tokens as if every completion reached the length limit.
        total = len(mine) * group_size * max_new_tokens
        with progress_bar(total, description, "tok", is_first()) as bar:
            if self.engine:
                # vLLM gives the n completions of a request the seeds seed, seed + 1, ...: none may
                # come twice.
                seeds = [seed + place * group_size for place in range(len(prompts))]
                sampled = self.engine.sample(mine, seeds[rank::world], *common, bar.update)
            else:
                # Drawn for the whole batch, then cut: the number of processes changes nothing.
                uniform = None
                if temperature > 0:
                    uniform = grpo.uniform_numbers(len(prompts), group_size, max_new_tokens, seed)
                    uniform = uniform[rank::world]
                sampled = grpo.sample(self.model, mine, *common, uniform, bar.update)

        # A judge reads the answer, without thoughts and special tokens; the loss sees all ids.
        for group in sampled:
            for rollout in group:
                grpo.set_text(self.tokenizer, rollout)

        # Prompt i was sampled by process i % world, as its group number i // world.
        by_rank = gather(sampled)
        groups = []
        for place, example in enumerate(examples):
            groups.append(rar.Group(example, by_rank[place % world][place // world]))
        return groups

    def free_engine_memory(self) -> None:
        """With --sampler vllm_sleep: gives the engine's memory to the update, until `sync`."""
        if self.engine:
            self.engine.sleep()

    def sync(self) -> None:
        """Copies the weights into the engine, if there is one, and wakes it."""
        # Otherwise the next rollouts would come from the policy before the update.
        if self.engine:
            self.engine.sync(self.model)


# ---------------------------------------------------------------------- the loop


@dataclass
class Run:
    """What a run holds in memory. It trains on `examples` and measures on `heldout`."""

    config: Config
    policy: Policy
    reference: torch.nn.Module | None  # the starting model, frozen: for the KL
    optimizer: torch.optim.Optimizer
    method: rar.RubricReward
    examples: list[rar.Example]
    heldout: list[rar.Example]
    validation: list[rar.Example]  # what the schedules of arlrr.py choose by; else empty
    eval_judge: object = None  # grades held-out answers besides the judge that pays
    pending: "Batch | None" = None  # the next rollouts, see --judge_ahead
    digests: dict[str, str] = field(default_factory=dict)  # of the files with the prompts


def train_step(run: Run, step: int, is_trial: bool = False) -> tuple[dict, list[rar.Group]]:
    """One update: roll out, judge, learn. Returns its metrics and groups.

    step: updates before this one (the log counts from 1). is_trial: arlrr's search takes it back.
    """
    # 1. Roll out G completions per prompt.
    started = time.perf_counter()
    groups = roll_out(run, step)

    # 2. Judge: one verdict per (completion, criterion), one reward per completion; nan: not scored.
    #    The first process asks, in one batch of calls; the others get its groups.
    rolled_out = time.perf_counter()
    groups = from_rank_zero(scored, run.method, groups)

    # 3. Learn from being better or worse than the rest of the group. A batch comes from the policy
    #    that learns from it, and is then thrown away.
    judged = time.perf_counter()
    run.method.set_advantages(groups)
    log = learn(run, step, groups, is_trial)
    return log | phases(log, started, rolled_out, judged), groups


def loop(run: Run, folder: "RunFolder", step: int, stop: "Stop") -> None:
    """From `step` to config.steps: update, evaluate, log, save."""
    config = run.config
    lab = make_lab(run)
    score = first_score(run, folder, step)
    with progress_bar(config.steps, "steps", "step", is_first()) as bar:
        bar.update(step)
        while step < config.steps and not stop.signal:
            # A judge that fails: what is done is saved, and one line says how to go on.
            with explained(run, folder, step, f"step {step + 1}"):
                # Only ARL-RR decides something here, and uses the lab; the others return {}.
                log = run.method.before_step(step, run.examples, lab.at(step))
                metrics, groups = train_step(run, step)
                log |= metrics

            # All processes agree here whether to stop. stop.signal changes only here, so that they
            # all take the same branch where the step is saved.
            stop.agree()

            # RLER retires rubrics; its buffers live in the first process only.
            log |= from_rank_zero(run.method.after_step, groups)
            step += 1
            log = finish_step(run, folder, step, log, groups, stop)
            score = log.get("eval_score", score)
            show_step(bar, config, log, score)


def roll_out(run: Run, step: int) -> list[rar.Group]:
    """The step's batch of prompts, each with G completions of the policy as it is now."""
    # pool: the prompts that the method uses now. Only in arlrr not all: those of its class.
    config = run.config
    batch = next_batch(run.method.pool(run.examples), config, step)

    # The draws follow from (seed, step) alone: a resumed run repeats them.
    seed = random.Random(f"{config.seed}-{step}").getrandbits(62)
    sampling = (config.group_size, config.max_new_tokens, config.temperature)
    return run.policy.rollouts(batch, *sampling, seed)


def learn(run: Run, step: int, groups: list[rar.Group], is_trial: bool = False) -> dict:
    """The update itself, from groups whose advantages are set. Returns the step's metrics."""
    config = run.config
    policy = run.policy
    set_learning_rate(run.optimizer, config, step)
    policy.free_engine_memory()
    rollouts = [group.rollouts for group in groups]
    with progress_bar(len(groups) * config.group_size, "train", "row", is_first()) as bar:
        learned = grpo.update(
            policy.model, run.optimizer, rollouts, config, run.reference, bar.update
        )
    if learned["kl"] is None and run.reference is not None and not is_trial:
        # The loss did not need it (beta is 0). From the rollouts' own log-probs, so of the policy
        # that sampled them.
        sizes = (config.temperature, config.pass_tokens)
        learned["kl"] = grpo.measure_kl(run.reference, rollouts, *sizes)
    policy.sync()
    return {"step": step + 1} | group_metrics(groups) | learned


def finish_step(
    run: Run,
    folder: "RunFolder",
    step: int,
    log: dict,
    groups: list[rar.Group],
    stop: "Stop",
) -> dict:
    """Logs, evaluates and saves, after `step` updates. Returns the row of metrics.jsonl."""
    # Logged before it is saved: resuming can cut a log that is ahead of the checkpoint, but it
    # cannot fill one that lags.
    config = run.config
    folder.write_samples(step, "train", groups)
    log = log_step(run, folder, step, log, groups)
    if step == config.steps or stop.signal or step % config.save_every == 0:
        folder.save_checkpoint(run, step)
    if "eval_score" in log:
        folder.write_report()
    return log


def log_step(run: Run, folder: "RunFolder", step: int, log: dict, groups: list[rar.Group]) -> dict:
    """Evaluates when it is time, and writes the step's row of metrics.jsonl. Returns it."""
    config = run.config
    is_evaluated = step == config.steps or step % config.eval_every == 0
    if is_evaluated:
        # If the judge fails in here, `explained` still saves the rows of the update that was made.
        unfinished = unlogged_rows(step, log, groups)
        with explained(run, folder, step, f"evaluation after step {step}", unfinished):
            metrics, answers = evaluate_heldout(run)
        log = log | metrics
        folder.write_samples(step, "heldout", answers)

    # With judge_ahead the row has its own numbers already, and those that the judge counts now
    # are the next row's; only an evaluation's are to be added.
    if is_evaluated or not config.judge_ahead:
        log = add_stats(log, run.method.judge.take_stats())
    folder.append("metrics.jsonl", [log])
    return log


def scored(method: rar.RubricReward, groups: list[rar.Group]) -> list[rar.Group]:
    """The groups, with the verdicts and the reward of every rollout."""
    method.score(groups, show_progress=True)
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Linear warm-up over a tenth of the steps."""
    # Because Adam's first steps divide by the moments of a single gradient. The rate follows from
    # step and --steps, so there is no scheduler to save. Resumed with a larger --steps, a run warms
    # up again where it has done less than a tenth of the new number.
    warm_up = max(1, round(config.steps * 0.1))
    for options in optimizer.param_groups:
        options["lr"] = config.lr * min(1.0, (step + 1) / warm_up)


def group_metrics(groups: list[rar.Group]) -> dict:
    """What the rollouts of a step say about the policy and the reward."""
    rollouts = []
    scores = []
    spreads = []
    correlations = []
    for group in groups:
        # A reward of nan counts in none of the means; judge_missing says how much that is.
        with_reward = [r for r in group.rollouts if not math.isnan(r.reward)]
        rewards = [r.reward for r in with_reward]
        lengths = [float(len(r.ids)) for r in with_reward]
        if rewards:
            spreads.append(statistics.pstdev(rewards))
        correlations.append(rar.correlation(lengths, rewards))
        rollouts.extend(group.rollouts)
        for rollout in group.rollouts:
            scores.extend(verdict.score for verdict in rollout.verdicts)

    # No criterion, no verdict: then the share is missing as well.
    judge_missing = math.nan
    if scores:
        judge_missing = scores.count(None) / len(scores)

    # Thoughts are tokens as well: they are sampled, paid for and learned from.
    tokens = sum(len(r.ids) for r in rollouts)
    return {
        "reward": rar.nanmean([r.reward for r in rollouts]),
        "reward_std": rar.nanmean(spreads),
        "judge_missing": judge_missing,
        "completion_tokens": tokens / len(rollouts),
        "answer_characters": statistics.fmean(len(r.text) for r in rollouts),
        "thought_characters": statistics.fmean(len(r.thoughts) for r in rollouts),
        # Silent, or with thoughts that were never closed.
        "unanswered": sum(not r.text.strip() for r in rollouts) / len(rollouts),
        "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        # Within the groups. A high value: length is being paid for.
        "length_reward_corr": rar.nanmean(correlations),
        "rollouts": len(rollouts),
        "verdicts": len(scores),
        "tokens": tokens,
    }


def phases(log: dict, started: float, rolled_out: float, judged: float) -> dict:
    """Seconds of the three phases of a step that ends now, and the sampler's speed."""
    rollout = rolled_out - started
    return {
        "seconds_rollout": rollout,
        "seconds_judge": judged - rolled_out,
        "seconds_train": time.perf_counter() - judged,
        "tokens_per_second": log["tokens"] / rollout,
    }


def add_stats(log: dict, stats: dict) -> dict:
    """The row with what a judge has counted. Counts that it has already add up; the rest stays.

    >>> add_stats({"judge_calls": 3, "judge_p50_seconds": 0.2}, {"judge_calls": 1})
    {'judge_calls': 4, 'judge_p50_seconds': 0.2}
    """
    # Times and shares do not add up, and a median of two medians is none.
    total = dict(log)
    for name, value in stats.items():
        if name not in total:
            total[name] = value
        elif type(value) is int:
            total[name] += value
    return total


def make_lab(run: Run) -> arlrr.Lab:
    """What a schedule of arlrr.py may try out between two steps."""

    # The run's own update and evaluation, so that a trial is what the stage would be.
    def run_update(step: int) -> dict:
        """The metrics of one update, which is going to be taken back."""
        metrics, _ = train_step(run, step, is_trial=True)
        return metrics

    def run_validation() -> list[rar.Group]:
        """Judged greedy answers to the validation prompts."""
        limit = run.config.max_new_tokens
        _, groups = evaluate(run.policy, run.method.judge, run.validation, limit)
        return groups

    return arlrr.Lab(run.policy.model, run.optimizer, run_update, run_validation, run.policy.sync)


# ---------------------------------------------------------------------- evaluation


# Tokens of the held-out answers that are sampled together, padding counted: as many as keep the
# keys and values small.
EVALUATED_TOGETHER = 8192


def evaluate(
    policy: Policy, judge, examples: list[rar.Example], max_new_tokens: int, other_judge=None
) -> tuple[dict, list[rar.Group]]:
    """Greedy answers scored by rar.evaluate: (metrics, groups of one rollout), on all processes.

    other_judge: grades them too; its score is eval_other_score.
    """
    # In parts. All of a part are padded to its width, that of its longest prompt with an answer.
    parts = []
    width = 0
    for example in examples:
        length = len(policy.encode(example)) + max_new_tokens
        wider = max(width, length)
        if parts and (len(parts[-1]) + 1) * wider <= EVALUATED_TOGETHER:
            parts[-1].append(example)
            width = wider
        else:
            parts.append([example])
            width = length

    # Greedy, so that two checkpoints differ by their weights alone.
    groups = []
    for part in parts:
        groups += policy.rollouts(part, 1, max_new_tokens, 0.0, description="held-out")
    return from_rank_zero(graded, judge, groups, other_judge)


def graded(judge, groups: list[rar.Group], other_judge) -> tuple[dict, list[rar.Group]]:
    """(metrics, the groups with the verdicts of `judge`)."""
    other = {}
    if other_judge:
        # Before the judge that pays: each overwrites the rollouts' verdicts, and samples.jsonl gets
        # those that came last.
        metrics = rar.evaluate(other_judge, groups, show_progress=True)
        for name in ("score", "ci", "n"):
            other[f"eval_other_{name}"] = metrics[f"eval_{name}"]
        for name, value in other_judge.take_stats().items():
            other[f"eval_other_{name}"] = value

    # A policy learns the taste of the judge that pays: the gap climbs where only that judge's score
    # climbs.
    metrics = rar.evaluate(judge, groups, show_progress=True)
    if other:
        other["eval_judge_gap"] = metrics["eval_score"] - other["eval_other_score"]
    return metrics | other, groups


def evaluate_heldout(run: Run) -> tuple[dict, list[rar.Group]]:
    """`evaluate` on the run's held-out examples."""
    # A judge takes one batch at a time.
    if run.pending:
        run.pending.wait()
    limit = run.config.max_new_tokens
    return evaluate(run.policy, run.method.judge, run.heldout, limit, run.eval_judge)


def first_score(run: Run, folder: "RunFolder", step: int) -> float:
    """The held-out score that the run begins with."""
    if step == 0:
        # Without this evaluation nobody could tell what was learned from what was there.
        with explained(run, folder, step, "evaluation before training"):
            metrics, groups = evaluate_heldout(run)
        folder.append("metrics.jsonl", [{"step": 0} | metrics | run.method.judge.take_stats()])
        folder.write_samples(0, "heldout", groups)
        score = metrics["eval_score"]
        say(f"held-out score before training: {score:.3f}  ({interval_text(*metrics['eval_ci'])})")
        return score

    # A resumed run finds it in its log.
    _, score = last_evaluation(folder.path, step)
    return score


# ---------------------------------------------------------------------- the wiring


def make_judge(config: Config):
    """The judge that pays: its verdicts become the rewards. One of your own goes here.

    It needs `ask` and `take_stats`.
    """
    return judge_at(config, config.judge, config.judge_model)


def make_method(config: Config, judge) -> rar.RubricReward:
    """The reward that the settings name. A reward of your own goes here."""
    # The loop never asks which method it is: they differ in their hooks. Only `begin` and
    # `choose_prompts` ask, for what the classes of arlrr.py need of the data.
    methods = {
        "rler": rler.RLER,
        "arlrr": arlrr.ARLRR,
        "axis_mean": arlrr.AxisMean,
        "gdpo": arlrr.GDPO,
    }
    method = methods.get(config.method, rar.RubricReward)
    return method(judge, config)


def begin(config: Config, folder: Path, state: dict | None) -> Run:
    """A run in memory, new or as its checkpoint has it. Raises UserError, DataError, JudgeError."""
    # What is cheap to check comes first: a wrong flag should not cost the loading of a model.
    examples, heldout = read_data(config)
    heldout = separate(config, examples, heldout)
    digests = {name: digest(path) for name, path in data_files(config).items()}
    digests["model"] = model_digest(config)
    if state:
        check_data(config, digests, state["data"])
    if config.method in ("arlrr", "axis_mean", "gdpo"):
        arlrr.check_classes(examples, config.class_by)
    if config.method == "arlrr":
        hold_back_last(examples, config)
    template_kwargs = parse_template_kwargs(config.template_kwargs)
    judge = make_judge(config)
    eval_judge = make_eval_judge(config)
    method = make_method(config, judge)
    from_rank_zero(probe, judge)
    if eval_judge is not None:
        from_rank_zero(probe, eval_judge)

    check_memory(config, examples, heldout)
    policy = load_run_policy(config, folder, template_kwargs, is_new=not state)
    if state:
        check_reading(policy, state, folder)
    examples = fitting(examples, policy, config.max_new_tokens, "training")
    heldout = fitting(heldout, policy, config.max_new_tokens, "held-out")
    examples, validation = choose_prompts(examples, config, method)

    # Moments that forget in about 20 steps (0.95, not 0.999): a run has tens to hundreds of steps.
    # No weight decay: it would pull the policy away from its start, whatever the reward says.
    options = {"lr": config.lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    trained = [p for p in policy.model.parameters() if p.requires_grad]  # with LoRA not all
    optimizer = torch.optim.AdamW(trained, **options)

    reference = make_reference(config, policy, is_new=not state)
    if state:
        load_state(optimizer, method, state, folder)
    if config.sampler != "torch":
        start_engine(policy, config, examples + heldout + validation)
    run = Run(
        config, policy, reference, optimizer, method, examples, heldout, validation, eval_judge
    )
    run.digests = digests
    return run


# ---------------------------------------------------------------------- what keeps a run safe

# A first reader can stop here: what follows keeps a run safe. Processes, terminal, flags, judges'
# URLs, loading, the run's folder, logs, checkpoints, resuming, errors and signals, judging ahead,
# main.


# ---------------------------------------------------------------------- processes


def is_first() -> bool:
    """Whether this process is the one that judges, writes and speaks."""
    rank, _ = grpo.rank_and_world()
    return rank == 0


def gather(value) -> list:
    """The values of all processes, in the order of their ranks."""
    # A meeting point as well: nobody leaves before all have come.
    _, world = grpo.rank_and_world()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank_zero(function, *arguments):
    """Calls the function in the first process only; all get its result or raise its error."""
    _, world = grpo.rank_and_world()
    if world == 1:
        return function(*arguments)

    # An error travels like a result: a process that left alone would keep the others waiting.
    outcome = [None, None]
    if is_first():
        try:
            outcome[0] = function(*arguments)
        except Exception as error:  # noqa: BLE001  (raised again below)
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def join_processes() -> None:
    """Joins the others when torchrun has started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    # nccl talks between GPUs, gloo between CPUs.
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first one judges, and a model may take longer than ten minutes.
    dist.init_process_group(backend, timeout=timedelta(hours=12))


def leave(status: int) -> None:
    """Ends this process with the exit status where Python's own end may abort it; else returns."""
    is_judging = any(thread.name == JUDGING for thread in threading.enumerate())
    if dist.is_initialized():
        if status == 0:
            # The first one may still be writing.
            gather(None)
        dist.destroy_process_group()
    elif not is_judging:
        return

    # A thread that comes back from C++ while Python is ending aborts the process. It may be one of
    # gloo, which lets go of its last tensor only now (PyTorch issue 190489; 7 of 60 runs of two
    # processes on two busy cores), or a judge of --judge_ahead that could not be interrupted.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


# ---------------------------------------------------------------------- the terminal


class Stream:
    """stdout or stderr that falls silent when nobody reads it, whoever prints."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        """As a file's."""
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments) -> None:
        """Calls the function; an error of the system ends the printing, not the run."""
        try:
            function(*arguments)
        except OSError:
            # `| head -1` has read enough, or the disk behind `> log` is full: training needs
            # neither. Python itself would fail once more when it closes the stream at its end.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def patient_streams():
    """While it is open, a closed pipe ends no run."""
    streams = (sys.stdout, sys.stderr)
    sys.stdout = Stream(sys.stdout)
    sys.stderr = Stream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def write_line(stream, text: str) -> None:
    """Prints a line to a terminal, which obeys some characters and may lack others."""
    # What a model or a server says must not move the cursor or set the title.
    encoding = getattr(stream, "encoding", None) or "utf8"
    line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=stream, flush=True)


def say(text: str) -> None:
    """A line on stdout, from the first process."""
    if is_first():
        write_line(sys.stdout, text)


def warn(text: str) -> None:
    """A line on stderr, from the first process."""
    if is_first():
        write_line(sys.stderr, text)


def first_line(error: Exception) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    # Libraries explain themselves over many lines; the first one says what is wrong.
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def show_step(bar, config: Config, log: dict, score: float) -> None:
    """One more step on the bar, or a line of text where there is no terminal to draw it on."""
    # The three phases of the step: which one is worth making faster?
    seconds = [f"{log[f'seconds_{phase}']:.0f}" for phase in ("rollout", "judge", "train")]
    note = {
        "reward": f"{log['reward']:.3f}",
        "held-out": f"{score:.3f}",
        "seconds": "+".join(seconds),
    }
    # Such groups teach nothing; where all are so, the step has changed nothing.
    if log["zero_std_groups"]:
        n_groups = log["rollouts"] // config.group_size
        note["groups alike"] = f"{log['zero_std_groups']}/{n_groups}"
    if "class" in log:
        note["class"] = printable(log["class"])
    bar.set_postfix(note)
    bar.update()
    if bar.disable:
        pairs = [f"{key} {value}" for key, value in note.items()]
        say(f"step {log['step']}/{config.steps}  " + "  ".join(pairs))


def announce(run: Run, folder: Path) -> None:
    """Says what is about to happen."""
    # Before the first step, while it is cheap to press Ctrl-C.
    config = run.config
    prompts = f"{len(run.examples)} training and {len(run.heldout)} held-out prompts"
    shape = f"{config.prompts_per_step} x {config.group_size} rollouts"
    say(f"{prompts}, {config.steps} steps of {shape}, into {folder}/")
    servers = [url for url in split_urls(config.judge) if url not in WITHOUT_CALLS]
    if servers:
        # Who pays for calls wants to know before the first one.
        calls = 0.0
        for example in run.examples:
            # What is counted comes back as a verdict already.
            items = run.method.questions(example, "", example.rubric)
            n_asked = sum(not isinstance(item, Verdict) for item in items)
            calls += math.ceil(n_asked / (config.judge_k or max(1, n_asked)))
        calls *= len(servers) * config.prompts_per_step * config.group_size / len(run.examples)
        say(
            f"judge {config.judge_model}: up to {calls:.0f} calls per step for the rollouts, "
            f"{calls * config.steps:.0f} in all, less what repeats; evaluations, a search's trials "
            "and the writing of criteria come on top"
        )
        # A judge of one's own that was changed would be given its old answers.
        say(
            f"its answers are kept in {cache_path(config)} by the name {config.judge_model}: "
            "delete the file, or change the name, when the judge itself has changed"
        )
    elif config.data:
        say(
            f"The judge {config.judge} is a stand-in: it compares words and counts form, it does "
            "not understand. Read its scores as a smoke test."
        )


# ---------------------------------------------------------------------- flags


# What may differ from the run that is resumed: its length, how often it looks, and how fast a judge
# is asked. Anything else would make one log out of two experiments.
RESUMABLE = {"steps", "eval_every", "save_every", "resume", "judge_rpm", "judge_tpm"}
# A model as judge may also have moved to another URL: see `resumed_config`.
JUDGES = ("judge", "eval_judge")


# The names that other trainers give to settings.
KNOWN_AS = {
    "--learning_rate": "--lr",
    "--batch_size": "--prompts_per_step",
    "--num_generations": "--group_size",
    "--max_completion_length": "--max_new_tokens",
    "--kl_coef": "--beta",
    "--max_steps": "--steps",
    "--output_dir": "--out",
    "--epsilon": "--clip_low",
}


class Parser(report.Parser):
    """argparse with one-line errors that name the nearest flag."""

    def error(self, message: str):
        """Raises UserError."""
        # A judge's address may stand where it is not expected.
        message = without_secrets(message, self.words)
        # A mistyped flag that passes costs a run of hours.
        if message.startswith("unrecognized arguments:"):
            flag = message.split(":", 1)[1].split()[0].split("=")[0]
            similar = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            if KNOWN_AS.get(flag) in self._option_string_actions:
                similar = [KNOWN_AS[flag]]
            message = f"unknown flag {flag}; see --help"
            if similar:
                message = f"unknown flag {flag}; did you mean {similar[0]}?"
        raise UserError(message)


def parse_config(argv: list[str]) -> tuple[Config, dict]:
    """The settings, and those that were given: name -> value. Raises UserError."""
    # No abbreviations: --step would pass for --steps today and be ambiguous tomorrow.
    parser = Parser(
        prog="train.py",
        usage="python train.py [--flag value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for entry in fields(Config):
        # The annotation holds the type, the help text and the limits.
        kind, about, *_ = get_args(entry.type)
        choices = get_args(kind) or None
        if choices:
            kind = type(choices[0])
        if entry.default != "":
            about = f"{about} [{entry.default}]"

        # SUPPRESS leaves out what was not given: a resumed run must know the difference.
        options = {"type": kind, "choices": choices, "default": argparse.SUPPRESS}
        parser.add_argument(f"--{entry.name}", help=about.replace("%", "%%"), **options)

    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        # An empty value is a script's unset variable; the default would be another experiment.
        if value == "":
            raise UserError(f"--{name}: empty; give a value, or leave the flag out")
        problem = setting_problem(name, value)
        if problem:
            raise UserError(f"--{name} {shown(name, value)}: {problem}")
    return Config(**given), given


def setting_problem(name: str, value) -> str:
    """What is wrong with a setting, given as a flag or read from a file; "" when nothing is."""
    kind, _, *limits = get_args(Config.__dataclass_fields__[name].type)
    choices = get_args(kind)
    if choices:
        # True and 1.0 equal 1, but they are not what the flag takes.
        if value in choices and type(value) is type(choices[0]):
            return ""
        return "give one of " + ", ".join(str(choice) for choice in choices)
    if kind is str:
        # Names are printed and written into JSON; an escape sequence would be neither.
        if isinstance(value, str) and printable(value) == value:
            return ""
        return "give a text without control characters"

    # A whole number will do where a float is wanted, not the other way round.
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"give a number ({kind.__name__})"

    # nan compares as false with every limit, so it is asked for first.
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        # An integer that is larger than any float.
        is_finite = False
    if not is_finite:
        return "give a finite number"
    for limit in limits:
        if value < limit.at_least:
            return f"give at least {limit.at_least}"
        if value > limit.at_most:
            return f"give at most {limit.at_most}"
        if value <= limit.above:
            return f"give a number above {limit.above}"
    return ""


def shown(name: str, value) -> str:
    """A setting as it may be printed: without a password, and not endless."""
    if name in JUDGES and isinstance(value, str):
        value = without_passwords(value)
    return printable(str(value))[:200]


def parse_template_kwargs(text: str) -> dict | None:
    """Arguments for the chat template. Raises UserError."""
    # Only the template knows which ones it takes; it ignores the others.
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        example = '{"enable_thinking": false}'
        raise UserError(f"--template_kwargs {text[:80]}: not a JSON object such as {example}")
    return value


# ---------------------------------------------------------------------- the judges' URLs


# Judges that are no server: no calls, no cache.
WITHOUT_CALLS = ("offline", "lexical")


def split_urls(text: str) -> list[str]:
    """The URLs (or "offline", "lexical") of a judge; a comma inside a password separates nothing.

    >>> split_urls("http://me:a,b@host/v1,offline")
    ['http://me:a,b@host/v1', 'offline']
    """
    return re.split(r",(?=https?://|(?:offline|lexical)(?:,|$))", text)


def without_passwords(urls: str) -> str:
    """The URLs of a judge as they may be shown and stored."""
    return ",".join(without_password(url) for url in split_urls(urls))


def named_urls(urls: str, models: str) -> list[tuple[str, str]]:
    """(URL or one of WITHOUT_CALLS, name of the model) of each judge. Raises UserError."""
    # One name for all of them, or one for each.
    addresses = split_urls(urls)
    names = models.split(",")
    if len(names) == 1:
        names = names * len(addresses)
    if len(names) != len(addresses):
        raise UserError(f"{len(addresses)} judges and {len(names)} names of models: give one each")
    return list(zip(addresses, names))


def cache_path(config: Config) -> Path:
    """Where the answers of judges are kept: beside the run's folder, so that runs share them."""
    # Resolved, because "." has no parent by name.
    folder = Path(config.resume or config.out or "runs/run").resolve()
    return folder.parent / "judge_cache.sqlite"


def judge_kinds(urls: str) -> list[str]:
    """What each judge is, wherever its server is.

    >>> judge_kinds("http://host/v1,lexical"), judge_kinds("")
    (['server', 'lexical'], [''])
    """
    return [url if url in ("", *WITHOUT_CALLS) else "server" for url in split_urls(urls)]


def judge_at(config: Config, urls: str, models: str):
    """The judge at these URLs, with commas between several: a panel. Raises JudgeError."""
    options = {
        "k": config.judge_k,
        "cache_path": str(cache_path(config)),
        "rpm": config.judge_rpm,
        "tpm": config.judge_tpm,
    }
    addresses = named_urls(urls, models)
    # Perhaps the URL was forgotten, and a stand-in would pay. A run of an earlier version goes on.
    if models and not config.resume and set(split_urls(urls)) <= {*WITHOUT_CALLS}:
        raise UserError(f"the model {models} is to judge, and {urls} asks no model; give its URL")
    judges = []
    for address, name in addresses:
        if address == "offline":
            judges.append(offline_judge())
        elif address == "lexical":
            judges.append(LexicalJudge())
        else:
            judges.append(LLMJudge(address, name, **options))
    if len(judges) == 1:
        return judges[0]
    return Panel(judges)


def make_eval_judge(config: Config):
    """The judge that only grades held-out answers; None without one. Raises UserError."""
    if not config.eval_judge:
        return None
    # The cache knows a judge by its model's name: the second one would be given the first one's
    # answers. Those without calls have no cache.
    paying = set()
    for address, name in named_urls(config.judge, config.judge_model):
        paying.add(address if address in WITHOUT_CALLS else name)
    for address, name in named_urls(config.eval_judge, config.eval_judge_model):
        if address in paying:
            raise UserError(f"--eval_judge {address}: the judge that pays; give another one")
        if address not in WITHOUT_CALLS and name in paying:
            raise UserError(f"--eval_judge_model {name}: the judge that pays; give another model")
    return judge_at(config, config.eval_judge, config.eval_judge_model)


def probe(judge) -> None:
    """Says what the judge's server can do. Raises JudgeError when it cannot be used."""
    # A judge of one's own need not have it.
    if hasattr(judge, "probe"):
        line = judge.probe()
        if line:
            say(line)


# ---------------------------------------------------------------------- memory


# A run is refused when not even this share of the estimate fits: measured runs held more of it.
SURELY_NEEDED = 0.8


def longest_prompt(examples: list[rar.Example]) -> int:
    """Tokens of the longest prompt, about: no tokenizer is loaded yet, so four characters each."""
    characters = 0
    for example in examples:
        characters = max(characters, sum(len(message["content"]) for message in example.prompt))
    return 16 + characters // 4


def estimate_run(
    config: Config,
    examples: list[rar.Example],
    heldout: list[rar.Example],
    world: int,
    bfloat16: bool,
) -> dict[str, float]:
    """grpo.estimate_memory of a run. Of the model only its config is read."""
    folder = config.model
    if folder == "smollm2":
        folder = grpo.smollm2_folder()
    model_config = transformers.AutoConfig.from_pretrained(grpo.base_model(folder))

    # Few held-out prompts fill no part of an evaluation.
    evaluated = len(heldout) * (longest_prompt(heldout) + config.max_new_tokens)
    evaluated = min(evaluated, EVALUATED_TOGETHER)
    longest = longest_prompt(examples)
    return grpo.estimate_memory(model_config, config, longest, evaluated, world, bfloat16)


def free_memory() -> tuple[float, str]:
    """(bytes that this process may take, words for them)."""
    if torch.cuda.is_available():
        # What other programs, a judge's server for example, have taken is not free.
        free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
        return float(free), "free on the card"
    # All of the machine's and not what is free now: caches give way.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        # A container may have less.
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return total / n_processes, "of the machine"


def check_memory(config: Config, examples: list[rar.Example], heldout: list[rar.Example]) -> None:
    """Says what each process is going to hold. Raises UserError when that cannot fit."""
    # Before the model is loaded: large ones take minutes, and fail in the first update.
    _, world = grpo.rank_and_world()
    bfloat16 = config.dtype == "bfloat16"
    if config.dtype == "auto":
        bfloat16 = torch.cuda.is_available()
    try:
        parts = from_rank_zero(estimate_run, config, examples, heldout, world, bfloat16)
    except Exception as error:  # noqa: BLE001  (architectures fail in many ways)
        # What is wrong with a model is said when it is loaded.
        say(f"memory: not estimated ({first_line(error)})")
        return

    # Other programs may have taken more of one card than of another.
    free, where = min(gather(free_memory()))
    say(f"memory, GB: {grpo.memory_line(parts)}; {free / 1e9:.1f} {where}")
    refuse_too_much(config, parts, world, free)


def refuse_too_much(config: Config, parts: dict[str, float], world: int, free: float) -> None:
    """Raises UserError when what is estimated cannot fit; warns when it may not."""
    needed = grpo.largest_phase(parts)
    if SURELY_NEEDED * needed > free:
        advice = ", ".join(memory_knobs(config, world))
        why = f"needs about {needed / 1e9:.1f} GB per process, and there are {free / 1e9:.1f}"
        raise UserError(f"--model {config.model}: {why}; try {advice}")
    if needed > free:
        warn("memory: perhaps a little too much; the estimate is right within a fifth")


def memory_knobs(config: Config, world: int) -> list[str]:
    """The settings that would save memory, the most helpful ones first."""
    knobs = []
    if not config.lora_rank:
        knobs.append("--lora_rank 32")
    if not config.checkpointing:
        knobs.append("--checkpointing 1")
    if config.beta == 0 and not config.lora_rank:
        knobs.append("--beta -1")
    if config.sampler == "vllm":
        knobs.append("--sampler vllm_sleep")
    if config.sampler != "torch":
        knobs.append("less --vllm_memory")
    if world == 1 and not config.lora_rank:
        knobs.append("several cards (torchrun)")
    return [*knobs, "less --pass_tokens or --max_new_tokens", "a smaller --model"]


# ---------------------------------------------------------------------- loading


def load_run_policy(
    config: Config, folder: Path, template_kwargs: dict | None, is_new: bool
) -> Policy:
    """The policy of a run, new or as its checkpoint has it. Raises UserError."""
    checkpoint = find_checkpoint(folder)
    if is_new:
        return Policy(config.model, config.dtype, template_kwargs, config.lora_rank)
    if not config.lora_rank:
        return Policy(str(checkpoint), config.dtype, template_kwargs)

    # Of a LoRA run the checkpoint holds the adapters only.
    policy = Policy(config.model, config.dtype, template_kwargs, config.lora_rank)
    try:
        grpo.load_adapters(policy.model, checkpoint)
    except Exception as error:  # noqa: BLE001  (a file is broken in many ways)
        why = f"its adapters cannot be read ({first_line(error)})"
        raise UserError(f"{checkpoint}: {why}; put them back, or start a new run") from None
    return policy


def make_reference(config: Config, policy: Policy, is_new: bool):
    """The model that the run began with, frozen; None with --beta -1."""
    if config.beta < 0:
        return None
    # With LoRA it is the policy without its adapters, see grpo.adapters_off.
    if config.lora_rank:
        return policy.model
    # A resumed policy is not the start any more, and a sharded one cannot be copied.
    _, world = grpo.rank_and_world()
    if is_new and world == 1:
        return grpo.freeze(policy.model)
    attention = policy.model.config._attn_implementation
    loaded = Policy(config.model, config.dtype, attention=attention)
    return loaded.model.requires_grad_(False)


def fitting(
    examples: list[rar.Example], policy: "Policy", max_new_tokens: int, split: str
) -> list[rar.Example]:
    """The examples whose prompts fit the model's context. Raises UserError when none does."""
    # A prompt that is too long is left out and not cut: the rubric was written for all of it.
    short = []
    for example in examples:
        try:
            length = len(policy.encode(example))
        except ValueError as error:
            # The chat template refuses it: it takes no system message, or wants the roles in turn.
            raise UserError(f"{split} prompt {example.id!r}: {error}") from None
        if length + max_new_tokens <= policy.context:
            short.append(example)

    context = f"the model's context of {policy.context} tokens"
    limit = f"{context} (with --max_new_tokens {max_new_tokens})"
    if not short:
        raise UserError(f"no {split} prompt fits {limit}; shorten them, or lower --max_new_tokens")
    skipped = len(examples) - len(short)
    if skipped:
        warn(f"skipped {skipped} of {len(examples)} {split} prompts: longer than {limit}")
    return short


def choose_prompts(
    examples: list[rar.Example], config: Config, method: rar.RubricReward
) -> tuple[list[rar.Example], list[rar.Example]]:
    """(prompts to train on, prompts held back for arlrr's schedules). Raises UserError."""
    # Held back for every schedule, so that all of them train on the same prompts.
    validation = []
    if config.method == "arlrr":
        validation, examples = hold_back_last(examples, config)

    # Few prompts that come back often show learning in ten minutes; own data are used in full.
    size = config.prompts
    if size == 0:
        size = len(examples) if config.data else 20
    chosen = [example for example in examples[:size] if method.can_learn_from(example)]

    # Some rows have no reference to compare with, some no criterion of any class.
    if not chosen:
        why = "can learn from none of the training prompts (reference_likert needs references)"
        raise UserError(f"--method {config.method} {why}")
    return chosen, validation


def hold_back_last(
    examples: list[rar.Example], config: Config
) -> tuple[list[rar.Example], list[rar.Example]]:
    """(the last --validation prompts, all others). Raises UserError when no other is left."""
    last_first, rest = hold_back(examples[::-1], config.validation)
    if not rest:
        why = f"only {len(examples)} training prompts, of which some must be left"
        raise UserError(f"--validation {config.validation}: {why}; give fewer, or more rows")
    return last_first[::-1], rest[::-1]


def start_engine(policy: Policy, config: Config, examples: list[rar.Example]) -> None:
    """Starts vLLM next to the policy. Raises UserError when it is missing or does not fit."""
    # Room for the longest of these prompts and not more: it is taken from the trainer.
    longest = max(len(policy.encode(example)) for example in examples)
    context = longest + config.max_new_tokens
    folder = policy.model.config._name_or_path
    bfloat16 = policy.model.bfloat16_layers
    sleep = config.sampler == "vllm_sleep"
    try:
        policy.engine = grpo.VLLMSampler(folder, context, bfloat16, config.vllm_memory, sleep)
    except ImportError as error:
        advice = "pip install vllm==0.32.0"
        raise UserError(f"--sampler vllm: cannot be imported ({error}); {advice}") from None
    except (ValueError, RuntimeError) as error:
        advice = "free memory on the card, or lower --vllm_memory"
        raise UserError(f"--sampler vllm: {first_line(error)}; {advice}") from None
    # What it has read from the folder is the model without adapters.
    policy.sync()


# ---------------------------------------------------------------------- the run's folder


@contextmanager
def writing(path: Path, advice: str):
    """Turns what cannot be written into one line. Raises UserError."""
    try:
        yield
    except (UserError, rar.DataError):
        raise
    except Exception as error:  # noqa: BLE001  (each library has its own error for a full disk)
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written ({why}); {advice}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a whole file."""
    # Aside and then renamed: a kill leaves the old one or the new one.
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


class RunFolder:
    """The folder of a run. One run owns it at a time; of its processes the first one writes.

    Logs are opened, appended to and closed at each step: `tail -f` shows whole lines, and a kill
    costs at most the last one.
    """

    def __init__(self, config: Config):
        """Makes the folder, or finds that of --resume, and locks it. Raises UserError."""
        self.started = time.monotonic()
        self.lock = None
        self.is_new = False
        self.path = from_rank_zero(self.claim, config)
        self.advice = f"make room there, then python train.py --resume {self.path}"

    def claim(self, config: Config) -> Path:
        """The folder, locked. Called before anything is loaded: a second run must not begin."""
        if config.resume:
            # The run itself, also when it still runs: then it holds the lock.
            path = Path(config.resume)
            if not (path / "config.json").is_file():
                raise UserError(f"--resume {path}: no run there; start one with --out {path}")
            self.take_lock(path)
            return path

        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(config.out or f"runs/{config.method}-seed{config.seed}-{stamp}")
        refuse_inside_data(config, path)
        with writing(path, "choose another --out"):
            # A folder that was given may exist, as long as no run is in it; an invented name must
            # be new, because the runs of a sweep start within the same second.
            if config.out:
                self.is_new = not path.exists()
                path.mkdir(parents=True, exist_ok=True)
            else:
                path = make_unused(path)
                self.is_new = True
        # Looked for under the lock: otherwise two runs could both find nothing.
        self.take_lock(path)
        with writing(path, "choose another --out"):
            taken = files_of_a_run(path)
        if taken:
            self.release()
            if "config.json" in taken:
                advice = f"continue it with --resume {path}, or choose another --out"
                raise UserError(f"{path}: holds a run already; {advice}")
            what = f"holds {taken[0]} already, which is a name of a run's file"
            raise UserError(f"{path}: {what}; choose another --out")
        return path

    def take_lock(self, path: Path) -> None:
        """Locks RUN/lock until the process ends, however it ends. Raises UserError."""
        # The system gives a lock back when its process ends, killed or not; a file that says
        # "in use" would stay.
        name = path / "lock"
        with writing(name, "choose another --out"):
            lock = open(name, "a+", encoding="utf8")  # noqa: SIM115  (open as long as the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(200).strip() or "another process"
            lock.close()
            raise UserError(f"{path}: in use by {holder}; wait for it, or stop it") from None
        except OSError:
            warn(f"{path}: its file system has no locks; start no second run there")

        # The last holder may have deleted the file between our opening and our locking it.
        if not name.exists() or not os.path.samestat(os.fstat(lock.fileno()), name.stat()):
            lock.close()
            self.take_lock(path)
            return
        # For the message that a second run prints.
        with writing(name, "choose another --out"):
            lock.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            lock.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            lock.flush()
        self.lock = lock

    def release(self) -> None:
        """Gives the folder back."""
        # Deleted while it is still locked, see take_lock.
        if self.lock:
            with suppress(OSError):
                os.unlink(self.lock.name)
            self.lock.close()
            self.lock = None

    def abandon(self) -> None:
        """Gives the folder back, and removes it if this run has made it and written nothing."""
        self.release()
        if self.is_new:
            # rmdir refuses a folder that holds anything.
            with suppress(OSError):
                self.path.rmdir()

    def write_start(self, run: Run) -> None:
        """config.json, and prompts.jsonl: samples.jsonl names prompts by their ids only."""
        if not is_first():
            return
        # config.json first: it makes the folder a run, and one that is resumed writes both again.
        prompts = []
        for example in run.examples + run.heldout:
            prompts.append({"id": example.id, "prompt": example.prompt, "tags": example.tags})
        # A password is given again with --resume; it is in no file.
        settings = asdict(run.config)
        for name in JUDGES:
            settings[name] = without_passwords(settings[name])
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        with writing(self.path, "choose another --out"):
            replace_file(self.path / "config.json", text.encode("utf8"))
            replace_file(self.path / "prompts.jsonl", json_lines(prompts))

    def append(self, name: str, rows: list[dict]) -> None:
        """Adds lines to a log. Raises UserError."""
        # In one write: a kill cuts the last line at most.
        if is_first():
            path = self.path / name
            with writing(path, self.advice), open(path, "ab") as file:
                file.write(json_lines(rows))

    def write_samples(self, step: int, split: str, groups: list[rar.Group]) -> None:
        """One line per rollout: what it says, what the judge says about it, what it is worth."""
        rows = []
        for example, rollouts in groups:
            for rollout in rollouts:
                rows.append(sample_row(step, split, example, rollout))
        self.append("samples.jsonl", rows)

    def write_report(self) -> None:
        """report.html and report.png, from the files written so far. Raises UserError."""
        if is_first():
            with writing(self.path / "report.html", self.advice):
                write_report(self.path)

    def save_checkpoint(self, run: Run, step: int, unfinished: dict | None = None) -> None:
        """Writes checkpoint-STEP, then makes `checkpoint` name it. Raises UserError.

        unfinished: the rows of a step whose evaluation failed, see `unlogged_rows`. All processes
        have to call.
        """
        # The last one is of this step already when a resumed run fails before its first update.
        if from_rank_zero(self.is_saved, step):
            return

        # What several processes share is gathered by all of them. Then the first one writes and the
        # others wait: a process that ends makes torchrun end them all.
        weights = grpo.gathered_weights(run.policy.model)
        state = {
            "step": step,
            "versions": versions(),
            "settings": kept_settings(asdict(run.config)),
            "reading": reading_digest(run.policy),
            "data": run.digests,
            "optimizer": grpo.gathered_moments(run.optimizer),
            "method": run.method.state_dict(),
            "judge": type(run.method.judge).__name__,
            "unfinished": unfinished,
            "pending": None,
        }
        if run.pending:
            state["pending"] = run.pending.state_dict()
        from_rank_zero(self.write_checkpoint, run.policy, weights, state)

    def is_saved(self, step: int) -> bool:
        """Whether `checkpoint` is of this step."""
        target = self.path / f"checkpoint-{step}"
        last = find_checkpoint(self.path)
        return bool(last) and target.exists() and last.samefile(target)

    def write_checkpoint(self, policy: Policy, weights: dict | None, state: dict) -> None:
        """Writes the files of a checkpoint. weights: None for those of the policy itself."""
        step = state["step"]
        target = self.path / f"checkpoint-{step}"

        # Written aside, renamed, then named by the link: at every moment `checkpoint` is complete.
        aside = self.path / f"checkpoint-{step}.tmp"
        try:
            with writing(self.path / "checkpoint", self.advice):
                remove(aside)
                if grpo.lora_layers(policy.model):
                    grpo.save_adapters(policy.model, aside)
                else:
                    policy.model.save_pretrained(aside, state_dict=weights)
                policy.tokenizer.save_pretrained(aside)
                torch.save(state, aside / "trainer.pt")
                # One of this step is there when a kill came before the link was changed.
                remove(target)
                os.replace(aside, target)
                point_to(self.path / "checkpoint", target.name)
        finally:
            # What a full disk leaves half written takes room that is needed.
            with suppress(OSError):
                remove(aside)

        # Only now the older ones, and what a kill has left half written; nothing that somebody else
        # has put there.
        for other in self.path.glob("checkpoint-*"):
            is_ours = other.suffix == ".tmp" or (other / "trainer.pt").is_file()
            if other != target and is_ours and CHECKPOINT.fullmatch(other.name):
                with suppress(OSError):
                    remove(other)

    def truncate(self, step: int) -> None:
        """Drops the logs' rows after `step`, and lines that are no rows. Raises UserError."""
        # The resumed run draws the same numbers, so it writes the same rows again.
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if not path.is_file():
                continue
            lines = []
            for line in path.read_bytes().split(b"\n"):
                row = parse_row(line)
                if row is not None and row["step"] <= step:
                    lines.append(line + b"\n")
            with writing(path, self.advice):
                replace_file(path, b"".join(lines))


CHECKPOINT = re.compile(r"checkpoint(?:-\d+(?:\.tmp)?)?")
FILES = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "prompts.jsonl",
    "report.html",
    "report.png",
)


def files_of_a_run(path: Path) -> list[str]:
    """Names in a folder that a run would write over, or mix its own with."""
    taken = [name for name in FILES if (path / name).exists()]
    # Other trainers call theirs so as well.
    for entry in path.iterdir():
        if CHECKPOINT.fullmatch(entry.name):
            taken.append(entry.name)
    return taken


def refuse_inside_data(config: Config, path: Path) -> None:
    """Raises UserError when the run's folder is in a folder of rows: its logs would be rows."""
    for name in ("data", "eval_data"):
        source = Path(getattr(config, name) or os.devnull)
        if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
            raise UserError(
                f"--{name} {source}: the run's folder {path} is in it; give another --out"
            )


def make_unused(wanted: Path) -> Path:
    """Makes a folder of this name, or with a number after it where that is taken."""
    # mkdir lets only one of several processes win.
    wanted.parent.mkdir(parents=True, exist_ok=True)
    path = wanted
    number = 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")


def remove(path: Path) -> None:
    """Deletes a file, a folder, or a link (not what it names), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def point_to(link: Path, name: str) -> None:
    """Makes the link name a folder beside it, in one move."""
    # A link cannot be written over, but a new one can be renamed over it.
    aside = link.with_name(link.name + ".link.tmp")
    remove(aside)
    aside.symlink_to(name)
    if link.is_dir() and not link.is_symlink():
        # A copy of the run that followed links. The new checkpoint is complete already.
        remove(link)
    os.replace(aside, link)


# ---------------------------------------------------------------------- logs


def sample_row(step: int, split: str, example: rar.Example, rollout: grpo.Rollout) -> dict:
    """A row of samples.jsonl."""
    # With the criterion: those of an evolving rubric are in no other file.
    verdicts = []
    for criterion, verdict in zip(rollout.criteria, rollout.verdicts, strict=True):
        title = criterion.title or criterion.text[:60]
        about = {"title": title, "weight": criterion.weight, "axis": criterion.axis}
        verdicts.append(about | {"score": verdict.score, "reason": verdict.reason})
    row = {
        "step": step,
        "split": split,
        "id": example.id,
        "text": rollout.text,
        "finish": rollout.finish,
        "tokens": len(rollout.ids),
        "verdicts": verdicts,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
    }
    if rollout.thoughts:
        # Thoughts that are never closed have no answer after them.
        row["thoughts"] = rollout.thoughts
        row["thoughts_closed"] = bool(rollout.text)
    return row


def unlogged_rows(step: int, log: dict, groups: list[rar.Group]) -> dict:
    """What a checkpoint keeps of a step whose evaluation failed: its row, and those of its samples.

    Without them a resumed run would have the update, but not the lines.
    """
    samples = []
    for example, rollouts in groups:
        for rollout in rollouts:
            samples.append(sample_row(step, "train", example, rollout))
    return finite({"log": log, "samples": samples})


def json_lines(rows: list[dict]) -> bytes:
    """Lines of JSON in UTF-8."""
    lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows]
    # Half of a surrogate pair has no UTF-8.
    return "".join(lines).encode("utf8", "replace")


def finite(value):
    """The value with nan and infinity as None (JSON has neither), rounded, at any depth.

    >>> finite({"reward": math.nan, "scores": [1 / 3, 2], "kl": 3.14159265e-7})
    {'reward': None, 'scores': [0.333333, 2], 'kl': 3.14159e-07}
    """
    if isinstance(value, float):
        # Not 0: what is missing must not enter a mean.
        if not math.isfinite(value):
            return None
        # Six decimals; of a small number, such as an early KL, six digits: 0 would be another fact.
        if abs(value) < 1e-3:
            return float(f"{value:.6g}")
        return round(value, 6)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def parse_row(line: bytes) -> dict | None:
    """A row of a log; None for a line that a kill or a full disk has cut, or an editor broken.

    >>> parse_row(b'{"step": 3}'), parse_row(b'{"step": 3, "rew'), parse_row(b'{"step": "3"}')
    ({'step': 3}, None, None)
    """
    # A ValueError: no JSON, or no UTF-8 (half a character). A RecursionError: nested too deep.
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row


def read_log(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or samples.jsonl."""
    # A run that was killed early may have no log yet.
    if not path.is_file():
        return []

    rows = []
    # Bytes, split at "\n" only: a text can hold other line ends, and a cut can fall inside one of
    # its characters.
    for line in path.read_bytes().split(b"\n"):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
    return rows


def last_evaluation(folder: Path, step: int) -> tuple[int, float]:
    """(step, held-out score) of the last evaluation up to this step; nan for a score of null."""
    last = 0
    score = math.nan
    for row in read_log(folder / "metrics.jsonl"):
        if "eval_score" in row and row["step"] <= step:
            last = row["step"]
            score = row["eval_score"]
    if score is None:
        score = math.nan
    return last, score


# ---------------------------------------------------------------------- resuming


def find_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint: what `checkpoint` names, else the newest checkpoint-STEP, else None."""
    # The folder itself, not the link: a save compares it with the name that it is going to write.
    link = folder / "checkpoint"
    if link.is_symlink() and link.exists():
        return folder / os.readlink(link)
    if link.exists():
        return link

    # Killed before the first link, or copied without it. These are complete: they were renamed.
    newest = None
    newest_step = -1
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and int(number) > newest_step:
            newest = path
            newest_step = int(number)
    return newest


def versions() -> dict[str, str]:
    """What a resumed run must share to be the same run, bit for bit."""
    _, world = grpo.rank_and_world()
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        # These two decide in which order partial sums are added.
        "threads": str(torch.get_num_threads()),
        "processes": str(world),
        "device": device,
    }


def read_saved(folder: Path) -> dict:
    """The settings in a run's config.json, checked like flags. Raises UserError."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; put it back, or start a new run") from None
    names = [entry.name for entry in fields(Config)]
    missing = names
    if isinstance(saved, dict):
        missing = [name for name in names if name not in saved]
    if missing:
        # A default in its place could be another experiment.
        lacks = ", ".join(missing[:5])
        raise UserError(f"{path}: lacks {lacks}; edited, or of another version of train.py")

    # Settings from a file are checked like flags: somebody may have edited it.
    settings = {name: saved[name] for name in names}
    for name, value in settings.items():
        problem = setting_problem(name, value)
        if problem:
            raise UserError(f"{path}: {name} {shown(name, value)}: {problem}")
    return settings


def resumed_config(saved: dict, given: dict, folder: Path) -> Config:
    """The saved settings, with what may be given anew. Raises UserError."""
    # Together, because a default can depend on another setting: --tis_cap -1 on the sampler.
    config = Config(**(saved | given))
    changed = []
    for name in sorted(given.keys() - RESUMABLE):
        value = getattr(config, name)
        if saved[name] == value:
            continue
        # A server may have moved; but judges without a server, a model and none are different ones.
        if name in JUDGES and judge_kinds(saved[name]) == judge_kinds(value):
            continue
        changed.append(f"--{name} {shown(name, value)} (the run has {shown(name, saved[name])})")
    if changed:
        advice = "leave them out or start a new run"
        differences = ", ".join(changed)
        raise UserError(f"--resume {folder}: would mix two experiments: {differences}; {advice}")
    return config


def read_state(folder: Path, save_every: int) -> dict | None:
    """The state in the last checkpoint; None when the run has none yet. Raises UserError.

    save_every: the run's own so far, not one that is given anew.
    """
    checkpoint = find_checkpoint(folder)
    advice = "put it back, or start a new run"
    if checkpoint is None:
        # The log is at most one save ahead. Further, there was a checkpoint, and beginning again
        # would drop its steps.
        steps = [row["step"] for row in read_log(folder / "metrics.jsonl")]
        if steps and max(steps) > save_every:
            why = f"the log is at step {max(steps)}, but there is no checkpoint"
            raise UserError(f"--resume {folder}: {why}; {advice}")
        return None

    path = checkpoint / "trainer.pt"
    if not path.is_file():
        raise UserError(f"{path}: missing, and the run cannot be resumed without it; {advice}")
    try:
        # weights_only: never a pickle that could run code. To the CPU: the optimiser moves its
        # moments to the device of their weights, and all processes would load to the first GPU.
        # mmap: processes on one machine share the memory.
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        step = state["step"]
        made_with = dict(state["versions"])
        # Looked at here, so that what is no state is found before a model is loaded.
        dict(state["data"])
        dict(state["settings"])
        str(state["reading"])
        unfinished = state.get("unfinished")
        if unfinished:
            dict(unfinished["log"])
            list(unfinished["samples"])
    except Exception as error:  # noqa: BLE001  (a file is broken in many ways)
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {advice}") from None
    if type(step) is not int or step < 1:
        raise UserError(f"{path}: step {step!r:.100} is none; {advice}")

    # Not an error: a newer library may be why the run is resumed.
    other = [name for name, value in versions().items() if made_with.get(name, value) != value]
    if other:
        names = ", ".join(other)
        say(f"the checkpoint was made with other {names}: from here on not the same bit for bit")
    return state


def kept_settings(settings: dict) -> dict:
    """Those that a run has to its end."""
    changeable = {*RESUMABLE, *JUDGES, "out"}
    return {name: value for name, value in settings.items() if name not in changeable}


def check_settings(saved: dict, state: dict, folder: Path) -> None:
    """Raises UserError when config.json says otherwise than the checkpoint of its run."""
    edited = []
    for name, value in kept_settings(saved).items():
        then = state["settings"].get(name)
        if value != then:
            edited.append(f"{name} {shown(name, value)} (the checkpoint has {shown(name, then)})")
    if edited:
        why = "edited; put it back, or start a new run"
        raise UserError(f"{folder}/config.json: {', '.join(edited)}: {why}")


def reading_digest(policy: Policy) -> str:
    """SHA-256 of what makes token ids of a prompt and ends an answer."""
    tokenizer = policy.tokenizer
    # Not a rendered prompt: a template may write today's date. Line ends do not survive a file.
    template = json.dumps(tokenizer.chat_template, sort_keys=True).replace("\\r\\n", "\\n")
    ids = tokenizer("Does it read this text, 1 2 3, as before?")["input_ids"]
    read = f"{template} {ids} {sorted(policy.ends)}"
    return hashlib.sha256(read.encode("utf8")).hexdigest()


def check_reading(policy: Policy, state: dict, folder: Path) -> None:
    """Raises UserError when the checkpoint's tokenizer is no longer that of its run."""
    if reading_digest(policy) != state["reading"]:
        why = "its tokenizer or chat template is not that of the run"
        raise UserError(f"{folder}/checkpoint: {why}; put its own back, or start a new run")


def data_files(config: Config) -> dict[str, Path]:
    """The files or folders that `read_data` reads, by the setting that names them."""
    files = {}
    if config.data:
        files["data"] = Path(config.data)
    else:
        files["data"] = HERE / "data" / "train.jsonl"
        files["eval_data"] = HERE / "data" / "heldout.jsonl"
    if config.eval_data:
        files["eval_data"] = Path(config.eval_data)
    return files


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's rows."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(rar.SUFFIXES))
    total = hashlib.sha256()
    for file in files:
        # With its name: rows without an id are called after their file.
        name = str(file.relative_to(path))
        total.update(name.encode("utf8", "replace"))
        if file.is_file():
            with open(file, "rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


SAMPLES = 64  # of each file with weights, for its digest
SAMPLE = 2**16  # bytes of one


def model_digest(config: Config) -> str:
    """SHA-256 of samples of the model's weights; "" where a resumed run does not read it again."""
    # With LoRA the adapters belong to it, with --beta it is the reference.
    if config.beta < 0 and not config.lora_rank:
        return ""
    folder = Path(config.model)
    if config.model == "smollm2":
        folder = Path(grpo.smollm2_folder())
    total = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")]
    for file in sorted(files):
        # Not the whole file: training changes all weights, and reading 15 GB takes a minute.
        size = file.stat().st_size
        total.update(f"{file.name} {size}".encode("utf8", "replace"))
        with open(file, "rb") as opened:
            for number in range(SAMPLES):
                opened.seek(size * number // SAMPLES)
                total.update(opened.read(SAMPLE))
    return total.hexdigest()


def check_data(config: Config, now: dict[str, str], then: dict[str, str]) -> None:
    """now, then: digests by setting. Raises UserError where prompts or the model have changed."""
    # With others the steps to come would be another experiment in the same log.
    changed = []
    # Checkpoints of earlier versions do not have the model's.
    then = {"model": now["model"]} | then
    files = data_files(config) | {"model": Path(config.model)}
    for name, path in files.items():
        if now[name] != then.get(name):
            changed.append(f"--{name} {path}")
    if changed:
        why = "changed since the run began; put it back, or start a new run"
        raise UserError(f"{', '.join(changed)}: {why}")


def check_log(folder: Path, step: int) -> None:
    """Raises UserError when the log lacks a step up to this one, which the checkpoint has done."""
    # A step is logged before it is saved, so neither a kill nor a full disk loses one; a resumed
    # run could not fill the gap, and its curve would pass over it.
    path = folder / "metrics.jsonl"
    logged = {row["step"] for row in read_log(path)}
    n_missing = step + 1 - sum(0 <= number <= step for number in logged)
    if n_missing:
        # Counted up from 0, not listed: an edited state may say any step.
        first = 0
        while first in logged:
            first += 1
        why = f"lacks step {first}, which the checkpoint has done ({n_missing} in all)"
        raise UserError(f"{path}: {why}; put it back, or start a new run")


def load_state(optimizer, method: rar.RubricReward, state: dict, folder: Path) -> None:
    """Puts back the optimiser's moments and the method's state. Raises UserError."""
    # `offline` is another judge where the embedded model's package is missing.
    judge = type(method.judge).__name__
    if state.get("judge", judge) != judge:
        why = f"was paid by {state['judge']}, and here the judge is {judge}"
        raise UserError(f"--resume {folder}: {why}; install the same packages, or start a new run")
    try:
        grpo.load_moments(optimizer, state["optimizer"])
        method.load_state_dict(state["method"])
    except Exception as error:  # noqa: BLE001  (of another run or edited)
        why = f"does not belong to this run ({first_line(error)})"
        raise UserError(f"{folder}/checkpoint/trainer.pt: {why}; put its own back") from None


# ---------------------------------------------------------------------- errors and signals


@contextmanager
def explained(
    run: Run,
    folder: "RunFolder",
    step: int,
    where: str,
    unfinished: dict | None = None,
    saves: bool = True,
):
    """Turns what can break an update, or an evaluation, into one line that says what to do.

    step: updates done. where: words for the line. unfinished: see `save_checkpoint`. saves: False
    where the run is not as it was after `step` updates.
    """
    try:
        yield
    except (JudgeError, FloatingPointError) as error:
        # All processes raise these two, so all of them come here. The policy is that of `step`
        # updates, but for a FloatingPointError with several minibatches or epochs: part of the
        # next update is then in it, and a run resumed from there would be no run at all.
        is_whole = isinstance(error, JudgeError) or run.config.epochs * run.config.minibatches == 1
        if step and is_whole and saves:
            folder.save_checkpoint(run, step, unfinished)
        advice = f"when that is put right: python train.py --resume {folder.path}"
        raise type(error)(f"{where}: {error}; {advice}") from None
    except (MemoryError, RuntimeError) as error:
        # A CPU's allocator has no error class of its own.
        whose = ""
        if isinstance(error, torch.OutOfMemoryError):
            whose = "GPU's "
        elif not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        # Perhaps in the middle of an update, so nothing is saved.
        _, world = grpo.rank_and_world()
        advice = ", ".join(memory_knobs(run.config, world))
        why = f"{where}: the {whose}memory is full"
        raise UserError(f"{why}; try {advice} in a new run") from None


class Stop:
    """While it is open, Ctrl-C and SIGTERM are noted, and the loop ends after the step.

    Clusters send SIGTERM some minutes before they take a machine back: time for a step and a save.
    """

    def __init__(self):
        self.noted = 0  # the signal that came
        self.signal = 0  # the one for which all processes have agreed to stop
        self.handlers = {}

    def __enter__(self):
        # Python takes handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        """The handler. The second signal ends the step as well."""
        # A handler that printed nothing would make people press again. Noted, and not raised: in
        # a destructor Python would drop the exception.
        if self.noted:
            raise KeyboardInterrupt
        self.noted = number
        warn("\nstopping after this step; once more to stop now")

    def agree(self) -> None:
        """Makes all processes stop after the same step, when one of them was asked to."""
        # One that stopped alone would leave the others waiting in the next step.
        self.signal = max(gather(int(self.noted)))

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def stopped(folder: RunFolder, stop: Stop) -> int:
    """Says how to continue. Returns the exit status, as shells have it for a signal."""
    advice = "nothing is saved yet"
    if (folder.path / "config.json").exists():
        advice = f"continue with: python train.py --resume {folder.path}"
        advice += f"\nwhat there is so far: python tools/report.py {folder.path}"
    say(f"\nstopped; {advice}")
    return 128 + stop.signal


# ---------------------------------------------------------------------- judging ahead

# With --judge_ahead 1 batch t + 1 is judged while the model trains on batch t and rolls out t + 2:
#
#     this process   | roll out 2 | train 1 | roll out 3 | train 2 | roll out 4 | train 3 |
#     its thread     | judge 1    | judge 2              | judge 3              | judge 4
#
# A step takes as long as the slower of the two, not both. The price: a batch comes from the policy
# one update before the one that learns from it. The importance weights of grpo.pass_loss correct
# that (--tis_cap); in the log, logp_gap says how far the two are apart, and kl is that of the
# older one.
#
# On-policy all the same: the first batch, the first one after a run's last step where that run is
# made longer, and those before which `needs_rest` is true (the first of each stage of arlrr).

SAMPLED = ("prompt_ids", "ids", "logp", "finish", "text", "thoughts")  # of a rollout, by sampling
LONGEST_END = 10  # seconds that a run which stops waits for its judge
JUDGING = "judging ahead"  # the thread's name


class Batch:
    """The rollouts of a step, and their verdicts, for which a thread of the first process asks.

    While it does, nothing else may ask the judge or use the method's `score`.
    """

    def __init__(self, log: dict, groups: list[rar.Group], seconds_rollout: float):
        """log: what before_step said of the step."""
        self.log = log
        self.groups = groups
        self.seconds_rollout = seconds_rollout
        self.seconds_judge = 0.0
        self.stats = {}
        self.error = None
        self.thread = None

    def start(self, method: rar.RubricReward) -> None:
        """Begins the judging."""
        # A daemon: a judge that hangs must not keep a run that was told to end.
        if is_first():
            work = {"target": self.work, "args": (method,), "name": JUDGING}
            self.thread = threading.Thread(**work, daemon=True)
            self.thread.start()

    def work(self, method: rar.RubricReward) -> None:
        """The thread."""
        started = time.perf_counter()
        try:
            # Without a bar: the one of the training is on the screen.
            method.score(self.groups)
            # Taken here: what the judge counts from now on is not this step's.
            self.stats = method.judge.take_stats()
        except Exception as error:  # noqa: BLE001  (raised again by `result`)
            self.error = error
        self.seconds_judge = time.perf_counter() - started

    def wait(self) -> None:
        """Returns when the judge is free."""
        if self.thread:
            self.thread.join()

    def result(self) -> tuple[list[rar.Group], dict]:
        """(groups with verdicts and rewards, metrics). Raises the error of the judging.

        Called through from_rank_zero: all processes get the groups, or the error.
        """
        waiting = time.perf_counter()
        self.wait()
        if self.error:
            raise self.error
        seconds = {
            "seconds_rollout": self.seconds_rollout,
            "seconds_judge": self.seconds_judge,
            "seconds_wait": time.perf_counter() - waiting,
        }
        return self.groups, self.log | self.stats | seconds

    def end(self, judge) -> None:
        """Ends the judging, for a run that stops."""
        # More than once: a method may ask for several batches (RLER's writer, then its judge). A
        # judge of one's own need not have `interrupt`.
        until = time.monotonic() + LONGEST_END
        while self.thread and self.thread.is_alive() and time.monotonic() < until:
            if hasattr(judge, "interrupt"):
                judge.interrupt()
            self.thread.join(0.1)

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the rollouts come from a policy that is gone by then."""
        # Without verdicts. The judge is asked again; its answers are in its cache.
        groups = []
        for group in self.groups:
            rows = []
            for rollout in group.rollouts:
                rows.append({name: getattr(rollout, name) for name in SAMPLED})
            groups.append(rows)
        return {"log": self.log, "groups": groups, "seconds_rollout": self.seconds_rollout}


def read_batch(run: Run, step: int, saved: dict, folder: Path) -> Batch:
    """The pending batch of a checkpoint after `step` updates. Raises UserError."""
    examples = next_batch(run.method.pool(run.examples), run.config, step)
    groups = []
    try:
        for example, rows in zip(examples, saved["groups"], strict=True):
            rollouts = [grpo.Rollout(**row) for row in rows]
            # Its answers would be judged by another prompt's rubric.
            if rollouts[0].prompt_ids != run.policy.encode(example):
                raise ValueError(f"pending rollouts of another prompt than {example.id!r}")
            groups.append(rar.Group(example, rollouts))
        return Batch(dict(saved["log"]), groups, float(saved["seconds_rollout"]))
    except Exception as error:  # noqa: BLE001  (of another run or edited)
        why = f"does not belong to this run ({first_line(error)})"
        raise UserError(f"{folder}/checkpoint/trainer.pt: {why}; put its own back") from None


def begin_batch(run: Run, step: int, lab: arlrr.Lab) -> Batch:
    """A batch of the policy that learns from it, as in `loop`; it is being judged."""
    log = run.method.before_step(step, run.examples, lab.at(step))
    started = time.perf_counter()
    groups = roll_out(run, step)
    batch = Batch(log, groups, time.perf_counter() - started)
    batch.start(run.method)
    return batch


def loop_ahead(run: Run, folder: RunFolder, step: int, stop: Stop) -> None:
    """`loop` for --judge_ahead 1: while the judge reads a batch, the model trains on another."""
    config = run.config
    lab = make_lab(run)
    score = first_score(run, folder, step)
    try:
        if run.pending:
            # Of the checkpoint. What before_step decided is in it; what it keeps in memory is not.
            run.method.before_step(step, run.examples, lab.at(step))
            run.pending.start(run.method)
        with progress_bar(config.steps, "steps", "step", is_first()) as bar:
            bar.update(step)
            while step < config.steps and not stop.signal:
                log, groups = ahead_step(run, folder, step, lab)
                stop.agree()
                step += 1
                log = finish_step(run, folder, step, log, groups, stop)
                score = log.get("eval_score", score)
                show_step(bar, config, log, score)
    finally:
        if run.pending:
            run.pending.end(run.method.judge)


def ahead_step(
    run: Run, folder: RunFolder, step: int, lab: arlrr.Lab
) -> tuple[dict, list[rar.Group]]:
    """One update on the pending batch; the next one is pending afterwards, and being judged.

    Returns the update's metrics and groups.
    """
    method = run.method
    where = f"step {step + 1}"
    with explained(run, folder, step, where):
        if run.pending is None:
            run.pending = begin_batch(run, step, lab)

        # The next batch, by the same policy: its prompts do not depend on this one's verdicts.
        following = None
        if step + 1 < run.config.steps and not method.needs_rest(step + 1):
            started = time.perf_counter()
            groups = roll_out(run, step + 1)
            following = Batch({}, groups, time.perf_counter() - started)

        # A judge that fails raises here, in all processes, and the batch is saved as pending.
        groups, log = from_rank_zero(run.pending.result)

    # From here on the method is ahead of the policy: a checkpoint would fit neither.
    with explained(run, folder, step, where, saves=False):
        method.set_advantages(groups)
        log |= from_rank_zero(method.after_step, groups)
        run.pending = following
        if following:
            following.log = method.before_step(step + 1, run.examples, lab.at(step + 1))
            following.start(method)

        judged = time.perf_counter()
        log |= learn(run, step, groups)
        log["seconds_train"] = time.perf_counter() - judged
        log["tokens_per_second"] = log["tokens"] / log["seconds_rollout"]
    return log, groups


# ---------------------------------------------------------------------- main


def train(config: Config, given: dict) -> int:
    """A run, new or resumed. Returns the exit status: 0, or 128 + the signal that stopped it."""
    folder = RunFolder(config)
    stop = Stop()
    try:
        with stop:
            return train_in(folder, config, given, stop)
    except KeyboardInterrupt:
        # Asked twice: the step under way is lost, the last checkpoint is not.
        stop.signal = stop.noted or signal.SIGINT
        return stopped(folder, stop)
    finally:
        # Also after an error while loading: a new folder with nothing in it goes again.
        folder.abandon()


def train_in(folder: RunFolder, config: Config, given: dict, stop: Stop) -> int:
    """Loading, the loop, and the words around them. Returns the exit status."""
    state = None
    step = 0
    unfinished = None
    if config.resume:
        saved = read_saved(folder.path)
        config = resumed_config(saved, given, folder.path)
        state = read_state(folder.path, saved["save_every"])
    if state:
        check_settings(saved, state, folder.path)
        step = state["step"]
        unfinished = state.get("unfinished")
        last, _ = last_evaluation(folder.path, step)
        check_log(folder.path, step - 1 if unfinished else step)
        if step >= config.steps and last < step and not unfinished:
            # There would be no "after" to show.
            why = f"the run is at step {step} already, and was not evaluated there"
            raise UserError(f"--steps {config.steps}: {why}; give more")

    # For models that draw by themselves, as dropout does. The sampler has a generator of its own.
    torch.manual_seed(config.seed)
    run = begin(config, folder.path, state)
    if state and state.get("pending"):
        run.pending = read_batch(run, step, state["pending"], folder.path)
    stop.agree()
    if stop.signal:
        return stopped(folder, stop)

    if config.resume:
        # Step 0 was logged too: a run killed before its first checkpoint begins again.
        logged = -1
        if state:
            logged = step
        if unfinished:
            logged = step - 1
        from_rank_zero(folder.truncate, logged)
    folder.write_start(run)
    announce(run, folder.path)
    was_finished = step >= config.steps
    if was_finished:
        say(f"all {step} steps are done; --steps {2 * step} would go on")
    if unfinished:
        # Its update is in the checkpoint, its rows as well; what is missing is the evaluation.
        folder.append("samples.jsonl", unfinished["samples"])
        log_step(run, folder, step, unfinished["log"], [])
    if config.judge_ahead:
        loop_ahead(run, folder, step, stop)
    else:
        loop(run, folder, step, stop)

    if stop.signal:
        status = stopped(folder, stop)
        # The first one may still be writing, and a process that ends makes torchrun end the others.
        gather(None)
        return status

    if was_finished:
        # It may have been killed before its last report.
        folder.write_report()
    if is_first():
        say(summarise(folder.path))
    minutes = (time.monotonic() - folder.started) / 60
    files = "report.html, report.png, metrics.jsonl, samples.jsonl, prompts.jsonl, config.json"
    if config.lora_rank:
        files += ", checkpoint (adapters, as peft has them; python grpo.py merge makes it a model)"
    else:
        files += ", checkpoint (loads with transformers)"
    say(f"\n{minutes:.1f} minutes. In {folder.path}/: {files}")
    return 0


def reuse_memory() -> None:
    """Tells glibc to reuse freed memory."""
    # By default every large tensor is given back to the system and faulted in anew: an eighth of a
    # step's time on two cores. On other systems than Linux nothing happens here.
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings, so that freed blocks can be used again
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 with one line (what is wrong, where, what to do); 128 + the signal."""
    reuse_memory()
    join_processes()
    if argv is None:
        argv = sys.argv[1:]
    with patient_streams():
        try:
            config, given = parse_config(argv)
            status = train(config, given)
        except (
            UserError,
            rar.DataError,
            JudgeError,
            FloatingPointError,
            ImportError,
            OSError,  # what a file system says of a name: too long, no permission
        ) as error:
            # Any process may be the one with the error. Most errors are those of all: the first one
            # prints its line and ends, and torchrun ends the others while they wait.
            if not is_first():
                time.sleep(3)
            # Whatever word an address was taken for: what is printed may be kept.
            line = without_secrets(str(error), argv)
            write_line(sys.stderr, "train.py: " + " ".join(line.split()))
            status = 2
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
    return status


if __name__ == "__main__":
    exit_status = main()
    leave(exit_status)
    sys.exit(exit_status)
