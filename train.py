"""Reinforcement learning from rubric rewards: one command from prompts with rubrics to a better model.

    data/*.jsonl -> Example -> policy.rollouts -> Rollout x G -> method.score -> advantages -> grpo.update
                    (prompt,    (one group         (text, ids,    (judge: one     (nan = not    (loss, backward,
                     rubric)     per prompt)        log-probs)     verdict per     scored)       optimiser)
                                                                   criterion)

    python train.py                                      # SmolLM2-135M, built-in prompts, two CPU cores: ten minutes
    python train.py --method points --steps 20 --seed 1  # every field of Config is a flag
    python train.py --data FILE.jsonl --steps 3          # own prompts or HealthBench rows
    python train.py --resume RUN                         # continue a run that was stopped

A run's folder holds config.json, prompts.jsonl, metrics.jsonl (one line per step), samples.jsonl (one line per rollout,
with every verdict), report.html, report.png, and checkpoint (loads with transformers). `python tools/report.py RUN RUN`
compares runs; `python tools/compare.py RUN` evaluates one.

Reading order: Config; data; Policy; train_step and loop (the whole idea, on one screen); evaluation; the run's folder;
resuming; main. Under torchrun each process samples its share of the prompts, the first one judges, and all of them
compute the same update.
"""

import argparse
import ctypes
import difflib
import fcntl
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
import transformers

import arlrr
import grpo
import rar
import rler
from judge import JudgeError, LexicalJudge, LLMJudge, progress_bar
from tools import report

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something that the user can put right: printed as one line, exit status 2."""


# ------------------------------------------------------------------------------------------- settings


def setting(default, help: str, at_least=None, above=None, at_most=None):
    """A field of Config: its default, its help text, and the values that make sense."""
    limits = {"help": help, "at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata=limits)


Method = Literal[
    "explicit",
    "points",
    "predefined",
    "implicit",
    "likert",
    "reference_likert",
    "axis_mean",
    "gdpo",
    "rler",
    "arlrr",
]


@dataclass
class Config:
    """Every setting of a run, each a flag of the command line."""

    # what is trained, on what, and who judges
    method: Method = setting(
        "explicit",
        "reward: explicit (RaR, Eq. 1), points (HealthBench), rler (evolving rubrics), arlrr (one class of "
        "criteria at a time), axis_mean and gdpo (all classes, weighed alike); with a model as judge also "
        "predefined, implicit, likert, reference_likert",
    )
    model: str = setting("smollm2", "policy: smollm2 (embedded default), a folder, or a hub id")
    data: str = setting("", "training prompts, own format or HealthBench rows; default: data/train.jsonl")
    eval_data: str = setting(
        "", "held-out prompts; default: data/heldout.jsonl, or a tenth of --data (at most 24 prompts)"
    )
    prompts: int = setting(
        0,
        "use only the first so many training prompts; 0 = all of --data, 20 of the built-in ones",
        at_least=0,
    )
    judge: str = setting(
        "offline", "offline (lexical, see judge.py), or the base URL of an OpenAI-compatible server"
    )
    judge_model: str = setting(
        "", "the model's name on that server; its key comes from the environment, JUDGE_API_KEY"
    )
    judge_k: int = setting(
        1, "criteria per call to the judge; 0 = all of a response's", at_least=0, at_most=1000
    )
    judge_max_missing: float = setting(
        0.1, "stop when a larger share of a step's verdicts is missing", at_least=0, at_most=1
    )

    # one step: rollouts
    steps: int = setting(25, "updates of the policy", at_least=1, at_most=10**7)
    prompts_per_step: int = setting(4, "prompts per step", at_least=1, at_most=10**5)
    # A group of one has no other answer to be better than.
    group_size: int = setting(8, "rollouts per prompt (G)", at_least=2, at_most=10**4)
    temperature: float = setting(
        0.7, "of sampling and of scoring: a small model rambles at 1.0", above=0, at_most=100
    )
    max_new_tokens: int = setting(64, "length limit of a completion", at_least=1, at_most=10**6)
    sampler: Literal["torch", "vllm"] = setting(
        "torch", "who decodes: torch (any machine) or vllm (its engine in this process, for a GPU)"
    )
    vllm_memory: float = setting(
        4.0, "GiB for the engine's keys and values; weights and trainer come on top", above=0, at_most=10**4
    )
    vllm_sleep: Literal[0, 1] = setting(
        0, "1: the engine gives its memory back while the policy trains (costs seconds per step)"
    )

    # one step: the update
    loss: Literal["grpo", "dr_grpo", "dapo"] = setting(
        "dr_grpo",
        "token weights: dr_grpo (constant), grpo (sequence mean: at this lr answers shrink to a third), "
        "dapo (token mean)",
    )
    advantage: Literal["std", "mean", "none"] = setting(
        "std", "(r - mean) / std of the group: std; r - mean: mean; r alone, no baseline: none"
    )
    lr: float = setting(
        1e-4,
        "learning rate of AdamW, after a linear warm-up over a tenth of the steps; 1e-6 to 5e-6 at 7B",
        above=0,
    )
    epochs: int = setting(
        1, "passes over a batch of rollouts; from the second on the clip has work", at_least=1, at_most=1000
    )
    minibatches: int = setting(
        1, "optimiser steps per epoch, each on its own part of the groups", at_least=1, at_most=10**5
    )
    clip_low: float = setting(
        0.2, "PPO's clip: how far below 1 the probability ratio may count", at_least=0, at_most=1
    )
    clip_high: float = setting(
        0.0, "how far above 1; 0 = 0.28 with --loss dapo (clip-higher), else as clip_low", at_least=0
    )
    beta: float = setting(
        0.0, "weight of the KL penalty towards the starting model; 0 = only measure it", at_least=0
    )
    tis_cap: float = setting(
        -1.0,
        "truncated importance sampling against the sampler's own probabilities: cap on a token's weight, "
        "0 = off, -1 = 2 with --sampler vllm, whose kernels differ from the trainer's, else off",
        at_least=-1,
    )
    mask_truncated: Literal[0, 1] = setting(
        0, "1: completions cut off by the length limit stay out of the loss (but in the baseline)"
    )
    pass_tokens: int = setting(
        3072, "tokens per training pass; the result does not depend on it", at_least=1, at_most=10**9
    )
    checkpointing: Literal[0, 1] = setting(
        0, "1: gradient checkpointing, for models that do not fit in memory"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "arithmetic of the layers (weights stay float32); auto = bfloat16 on a GPU that has it"
    )

    # the methods' own
    evolve: Literal["std", "static"] = setting(
        "std", "rler: keep the evolving rubrics that tell rollouts apart best (std); static: none evolve"
    )
    rubrics_kept: int = setting(
        5, "rler: evolving rubrics kept per prompt (K)", at_least=1, at_most=1000
    )
    schedule: Literal["search", "lowest_score", "cyclic", "random"] = setting(
        "search", "arlrr: how the next class of criteria is chosen"
    )
    stage: int = setting(5, "arlrr: updates before the next class is chosen", at_least=1)
    class_by: str = setting(
        "axis", "arlrr, axis_mean, gdpo: what makes a class: axis, category, or the kind of a tag"
    )
    validation: int = setting(
        12, "arlrr: training prompts held back, by which search and lowest_score choose", at_least=1
    )

    # the run
    seed: int = setting(0, "of prompt order and sampling", at_least=0, at_most=2**63 - 1)
    out: str = setting("", "the run's folder; default: runs/<method>-seed<seed>-<time>")
    resume: str = setting("", "the folder of a run to continue")
    eval_every: int = setting(
        10, "steps between held-out evaluations (one before and one after are always made)", at_least=1
    )
    save_every: int = setting(10, "steps between checkpoints (one is always made at the end)", at_least=1)

    def __post_init__(self):
        if self.tis_cap < 0:
            self.tis_cap = 0.0
            if self.sampler == "vllm":
                self.tis_cap = 2.0


# What may differ from the run that is resumed: how long it is, how often it looks, and where a model as judge is served.
# Anything else would make one log out of two experiments.
RESUMABLE = {"steps", "eval_every", "save_every", "resume", "judge"}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest flag: a mistyped flag that passes costs a run of hours."""

    def error(self, message: str):
        """Raises UserError."""
        if message.startswith("unrecognized arguments:"):
            flag = message.split(":", 1)[1].split()[0].split("=")[0]
            similar = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            message = f"unknown flag {flag}; see --help"
            if similar:
                message = f"unknown flag {flag}; did you mean {similar[0]}?"
        raise UserError(message)


def parse_config(argv: list[str]) -> tuple[Config, set[str]]:
    """The settings, and the names of those that were given. Raises UserError."""
    parser = Parser(
        prog="train.py",
        usage="python train.py [--flag value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for entry in fields(Config):
        choices = get_args(entry.type) or None
        kind = entry.type
        if choices:
            kind = type(choices[0])
        about = entry.metadata["help"]
        if entry.default != "":
            about += f" [{entry.default}]"

        # SUPPRESS leaves out what was not given: a resumed run must know the difference.
        parser.add_argument(
            f"--{entry.name}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            help=about.replace("%", "%%"),
        )

    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        # An empty value is an unset variable of a script: its default would be another experiment.
        if value == "":
            raise UserError(f"--{name}: empty; give a value, or leave the flag out")
    config = Config(**given)
    check_settings(config, given)
    return config, set(given)


def check_settings(config: Config, names) -> None:
    """Checks the values of these settings, whether they come from flags or from a file. Raises UserError."""
    for entry in fields(Config):
        if entry.name not in names:
            continue
        value = getattr(config, entry.name)
        problem = setting_problem(entry, value)
        if problem:
            raise UserError(f"--{entry.name} {printable(str(value))[:200]}: {problem}")


def setting_problem(entry, value) -> str:
    """What is wrong with the value of a field of Config; "" when nothing is."""
    choices = get_args(entry.type)
    if choices:
        # 1.0 and True equal 1, but they are not what the flag takes.
        if value not in choices or type(value) is not type(choices[0]):
            return "give one of " + ", ".join(str(choice) for choice in choices)
        return ""
    if entry.type is str:
        if not isinstance(value, str) or printable(value) != value:
            return "give a text without control characters"
        return ""
    number = type(value) is int or (entry.type is float and type(value) is float)
    if not number:
        return f"give a number ({entry.type.__name__})"

    limits = entry.metadata
    if not math.isfinite(value):
        return "give a finite number"
    if limits["at_least"] is not None and value < limits["at_least"]:
        return f"give at least {limits['at_least']}"
    if limits["above"] is not None and value <= limits["above"]:
        return f"give a number above {limits['above']}"
    if limits["at_most"] is not None and value > limits["at_most"]:
        return f"give at most {limits['at_most']}"
    return ""


def make_judge(config: Config):
    """The judge that the settings name. A judge of your own goes here: `ask` and `take_stats` are all it needs."""
    if config.judge == "offline":
        return LexicalJudge()
    return LLMJudge(
        config.judge,
        config.judge_model,
        k=config.judge_k,
        cache_path=judge_cache(config),
        max_missing=config.judge_max_missing,
    )


def judge_cache(config: Config) -> str:
    """Answers of the model judge are cached beside the run's folder, so that all runs there share them."""
    if config.resume or config.out:
        folder = Path(config.resume or config.out)
        return str(folder.parent / "judge_cache.jsonl")
    return "runs/judge_cache.jsonl"


def make_method(config: Config, judge):
    """The reward that the settings name; nothing below asks which one it is. A reward of your own goes here."""
    if config.method == "rler":
        return rler.RLER(judge, config)
    if config.method == "arlrr":
        return arlrr.ARLRR(judge, config)
    if config.method == "axis_mean":
        return arlrr.AxisMean(judge, config)
    if config.method == "gdpo":
        return arlrr.GDPO(judge, config)
    return rar.RubricReward(judge, config)


# ------------------------------------------------------------------------------------------- data


def read_data(config: Config) -> tuple[list[rar.Example], list[rar.Example]]:
    """Training and held-out examples. Raises DataError, UserError."""
    train = rar.read_examples(config.data or HERE / "data" / "train.jsonl")
    if config.eval_data:
        return train, rar.read_examples(config.eval_data)
    if not config.data:
        return train, rar.read_examples(HERE / "data" / "heldout.jsonl")

    # No held-out file: hold back a tenth, by a shuffle that is the same for every seed, and never train on it.
    if len(train) < 2:
        raise UserError(
            f"{config.data}: one row cannot be both trained on and held out; give --eval_data or more rows"
        )
    random.Random(0).shuffle(train)
    size = min(24, max(1, len(train) // 10))
    return train[size:], train[:size]


def fitting(
    examples: list[rar.Example],
    policy: "Policy",
    max_new_tokens: int,
    split: str,
) -> list[rar.Example]:
    """The examples whose prompts fit the model's context; says how many do not. Raises UserError when none does."""
    # A prompt that is too long is left out and not cut: the rubric was written for all of it.
    short = []
    for example in examples:
        if len(policy.encode(example)) + max_new_tokens <= policy.context:
            short.append(example)

    limit = f"the model's context of {policy.context} tokens (with --max_new_tokens {max_new_tokens})"
    if not short:
        raise UserError(f"no {split} prompt fits {limit}; shorten them, or lower --max_new_tokens")
    skipped = len(examples) - len(short)
    if skipped:
        warn(f"skipped {skipped} of {len(examples)} {split} prompts: longer than {limit}")
    return short


def next_batch(examples: list[rar.Example], config: Config, step: int) -> list[rar.Example]:
    """The prompts of a step: laps over all examples, each lap in an order of its own.

    A prompt appears twice where a lap ends inside the batch, or where there are fewer prompts than places.
    """
    batch = []
    start = step * config.prompts_per_step
    for position in range(start, start + config.prompts_per_step):
        lap, place = divmod(position, len(examples))

        # The order follows from (seed, lap) alone: a resumed run finds its place without a saved cursor.
        order = list(range(len(examples)))
        random.Random(f"{config.seed}-{lap}").shuffle(order)
        batch.append(examples[order[place]])
    return batch


# ------------------------------------------------------------------------------------------- the policy


class Policy:
    """Model, tokenizer, and what sampling needs to know about them. Every process holds all of it."""

    def __init__(self, name: str, dtype: str = "auto"):
        """name: smollm2, a folder, or a hub id. Raises UserError when it cannot be loaded."""
        self.device = "cpu"
        if torch.cuda.is_available():
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        bfloat16 = None
        if dtype != "auto":
            bfloat16 = dtype == "bfloat16"

        try:
            self.model, self.tokenizer = grpo.load_policy(name, self.device, bfloat16)
        except ImportError:
            raise  # it names the package to install
        except Exception as error:  # a folder can be broken in as many ways as there are libraries
            raise UserError(
                f"{name}: cannot be loaded as a model ({first_line(error)}); give smollm2, a folder or a hub id"
            ) from None

        self.ends = grpo.end_tokens(self.model, self.tokenizer)
        # Some models have no limit.
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        self.engine = None

    def encode(self, example: rar.Example) -> list[int]:
        """Token ids of the example's prompt, ready for the assistant's turn."""
        return grpo.encode(self.tokenizer, example.prompt)

    def start_engine(self, config: Config, examples: list[rar.Example]) -> None:
        """Starts vLLM next to the policy. Raises UserError when it is missing or does not fit."""
        # Room for the longest of these prompts and not more: it would be taken from the trainer.
        longest = max(len(self.encode(example)) for example in examples)
        try:
            self.engine = grpo.VLLMSampler(
                self.model.config._name_or_path,
                longest + config.max_new_tokens,
                self.model.bfloat16_layers,
                config.vllm_memory,
                bool(config.vllm_sleep),
            )
        except ImportError as error:
            raise UserError(
                f"--sampler vllm: vLLM cannot be imported ({error}); pip install vllm==0.32.0"
            ) from None
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--sampler vllm: {first_line(error)}; free memory on the card, or lower --vllm_memory"
            ) from None

    def sleep(self) -> None:
        """Frees the engine's memory for the update, where --vllm_sleep asks for it."""
        if self.engine:
            self.engine.sleep()

    def sync(self) -> None:
        """Copies the weights into the engine, if there is one."""
        if self.engine:
            self.engine.sync(self.model)

    def rollouts(
        self,
        examples: list[rar.Example],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int = 0,
        description: str = "rollouts",
    ) -> list[rar.Group]:
        """One group of rollouts per example, with their text. Each process samples its share; all get all groups."""
        rank, world = grpo.rank_and_world()
        prompts = [self.encode(example) for example in examples]
        mine = prompts[rank::world]

        # The bar counts tokens as if every completion reached the length limit.
        total = len(mine) * group_size * max_new_tokens
        with progress_bar(total, description, "tok", show=rank == 0) as bar:
            if self.engine:
                # vLLM gives the n completions of a request the seeds seed, seed + 1, ...: none may come twice.
                seeds = [seed + place * group_size for place in range(len(prompts))]
                sampled = self.engine.sample(
                    mine, seeds[rank::world], group_size, max_new_tokens, temperature, self.ends, bar.update
                )
            else:
                # Drawn for the whole batch and then cut, so that the number of processes changes nothing.
                uniform = None
                if temperature > 0:
                    uniform = grpo.uniform_numbers(len(prompts), group_size, max_new_tokens, seed)
                    uniform = uniform[rank::world]
                sampled = grpo.sample(
                    self.model, mine, group_size, max_new_tokens, temperature, self.ends, uniform, bar.update
                )

        # A judge reads the text without special tokens; the loss sees the ids, the end token among them.
        for group in sampled:
            for rollout in group:
                rollout.text = self.tokenizer.decode(rollout.ids, skip_special_tokens=True)

        # Prompt number i was sampled by process i % world, as its group number i // world.
        by_rank = gather(sampled)
        groups = []
        for place, example in enumerate(examples):
            groups.append(rar.Group(example, by_rank[place % world][place // world]))
        return groups


# ------------------------------------------------------------------------------------------- the loop


@dataclass
class Run:
    """What a run holds in memory. It trains on examples; heldout is only measured; validation is for arlrr."""

    config: Config
    policy: Policy
    reference: torch.nn.Module  # the frozen starting model, for the KL
    optimizer: torch.optim.Optimizer
    method: rar.RubricReward
    examples: list[rar.Example]
    heldout: list[rar.Example]
    validation: list[rar.Example]


def train_step(run: Run, step: int, measure_kl: bool = True) -> tuple[dict, list[rar.Group]]:
    """One update: roll out, judge, learn. Returns its metrics and groups. arlrr's trials call it too.

    step: number of updates before this one (the log counts from 1).
    """
    config = run.config
    policy = run.policy
    method = run.method
    batch = next_batch(method.pool(run.examples), config, step)

    # 1. Roll out G completions per prompt. Seeded by (seed, step) alone: a resumed run draws the same numbers.
    started = time.perf_counter()
    seed = random.Random(f"{config.seed}-{step}").getrandbits(62)
    groups = policy.rollouts(batch, config.group_size, config.max_new_tokens, config.temperature, seed)

    # 2. Judge: one verdict per (completion, criterion), one reward per completion; nan = could not be scored.
    #    One process asks, in one batch of calls, and the others get its groups.
    rolled_out = time.perf_counter()
    groups = from_rank_zero(scored, method, groups)

    # 3. Learn from being better or worse than the rest of the group. Every batch comes from the policy that learns
    #    from it, and is then thrown away; with several epochs or minibatches the clip bounds the drift.
    judged = time.perf_counter()
    method.set_advantages(groups)
    set_learning_rate(run.optimizer, config, step)
    policy.sleep()
    rollouts = [group.rollouts for group in groups]
    with progress_bar(len(groups) * config.group_size, "train", "row", show=is_first()) as bar:
        learned = grpo.update(policy.model, run.optimizer, rollouts, config, run.reference, bar.update)
    if learned["kl"] is None and measure_kl:
        # beta is 0: the loss did not need it, but it shows how far the policy has moved.
        learned["kl"] = grpo.measure_kl(run.reference, rollouts, config.temperature)
    policy.sync()
    learned["seconds_rollout"] = rolled_out - started
    learned["seconds_judge"] = judged - rolled_out
    learned["seconds_train"] = time.perf_counter() - judged
    return {"step": step + 1, **group_metrics(groups), **learned}, groups


def loop(run: Run, folder: "RunFolder", step: int, stop: "Stop") -> None:
    """Steps, evaluations, logs and checkpoints from `step` to config.steps."""
    config = run.config
    method = run.method
    lab = make_lab(run)
    score = first_score(run, folder, step)

    with progress_bar(config.steps, "steps", "step", show=is_first(), initial=step) as bar:
        while step < config.steps and not stop.signal:
            with explained(run, folder, step):
                log = method.before_step(step, run.examples, lab.at(step))  # ARL-RR: choose (or search) the class
                metrics, groups = train_step(run, step)
            log |= metrics

            # Asked once per step: a signal from here on is for the next one, so that no step is left unsaved.
            stop.agree()
            log |= from_rank_zero(method.after_step, groups)  # RLER: admit, retire; others: their own metrics
            step += 1

            # 4. Evaluate and log, then save. In this order: resuming can cut the log back to the checkpoint, but cannot
            #    write lines that are missing. So what fails here (a disk, a judge) costs steps and not the run.
            folder.write_samples(step, "train", groups)
            is_last = step == config.steps
            evaluates = is_last or step % config.eval_every == 0
            if evaluates:
                heldout_metrics, answers = evaluate_heldout(run)
                log |= heldout_metrics
                folder.write_samples(step, "heldout", answers)
                score = log["eval_score"]
            folder.append("metrics.jsonl", [log | method.judge.take_stats()])
            if is_last or stop.signal or step % config.save_every == 0:
                folder.save_checkpoint(run, step)
            if evaluates:
                folder.write_report()
            show_progress(bar, config, log, score)


def scored(method: rar.RubricReward, groups: list[rar.Group]) -> list[rar.Group]:
    """The groups, with the verdicts and the reward of every rollout."""
    method.score(groups, show_progress=True)
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Linear warm-up over a tenth of the steps: Adam's first steps divide by moments of a single gradient.

    It follows from step and --steps, so that there is no scheduler to save.
    """
    warm_up = max(1, round(config.steps * 0.1))
    for options in optimizer.param_groups:
        options["lr"] = config.lr * min(1.0, (step + 1) / warm_up)


def group_metrics(groups: list[rar.Group]) -> dict:
    """What the rollouts of a step say. A nan reward counts in none of the means; judge_missing says how many there are."""
    rollouts = []
    spreads = []
    correlations = []
    for group in groups:
        rollouts.extend(group.rollouts)
        is_scored = [r for r in group.rollouts if not math.isnan(r.reward)]
        rewards = [r.reward for r in is_scored]
        lengths = [float(len(r.ids)) for r in is_scored]
        if rewards:
            spreads.append(statistics.pstdev(rewards))
        correlations.append(rar.correlation(lengths, rewards))

    scores = []
    for rollout in rollouts:
        scores.extend(verdict.score for verdict in rollout.verdicts)
    tokens = sum(len(r.ids) for r in rollouts)
    return {
        "reward": rar.nanmean([r.reward for r in rollouts]),
        "reward_std": rar.nanmean(spreads),
        "judge_missing": scores.count(None) / len(scores),
        "completion_tokens": tokens / len(rollouts),
        "truncated": statistics.fmean(r.finish == "length" for r in rollouts),
        # Within the groups; high values mean that length is being paid for.
        "length_reward_corr": rar.nanmean(correlations),
        "rollouts": len(rollouts),
        "verdicts": len(scores),
        "tokens": tokens,
    }


def make_lab(run: Run) -> arlrr.Lab:
    """What a schedule of arlrr.py may try out between two steps: the run's own update and its own evaluation."""

    def run_update(step: int) -> dict:
        metrics, _ = train_step(run, step, measure_kl=False)
        return metrics

    def run_validation() -> list[rar.Group]:
        config = run.config
        _, groups = evaluate(run.policy, run.method.judge, run.validation, config.max_new_tokens)
        return groups

    return arlrr.Lab(run.policy.model, run.optimizer, run_update, run_validation, run.policy.sync)


@contextmanager
def explained(run: Run, folder: "RunFolder", step: int):
    """Turns what can break a step into one line that says what to do, and saves the policy as of the last good step."""
    try:
        yield
    except (JudgeError, FloatingPointError) as error:
        if step:
            folder.save_checkpoint(run, step)
        advice = f"when that is put right: python train.py --resume {folder.path}"
        raise type(error)(f"step {step + 1}: {error}; {advice}") from None
    except torch.OutOfMemoryError:
        # Perhaps in the middle of an update, so nothing is saved.
        raise UserError(
            f"step {step + 1}: the GPU's memory is full; try --checkpointing 1, --vllm_sleep 1, fewer "
            "--prompts_per_step or --max_new_tokens in a new run"
        ) from None


def show_progress(bar, config: Config, log: dict, score: float) -> None:
    """One more step on the bar; where there is no terminal to draw it on, one line of text."""
    seconds = [f"{log[f'seconds_{phase}']:.0f}" for phase in ("rollout", "judge", "train")]
    note = {"reward": f"{log['reward']:.3f}", "held-out": f"{score:.3f}", "seconds": "+".join(seconds)}
    bar.set_postfix(note)
    bar.update()
    if bar.disable:
        pairs = [f"{key} {value}" for key, value in note.items()]
        say(f"step {log['step']}/{config.steps}  " + "  ".join(pairs))


# ------------------------------------------------------------------------------------------- evaluation


def evaluate(
    policy: Policy,
    judge,
    examples: list[rar.Example],
    max_new_tokens: int,
) -> tuple[dict, list[rar.Group]]:
    """Greedy answers scored by rar.evaluate. Returns (metrics, groups of one rollout), the same on all processes."""
    # As many prompts together as keep keys and values small, padding counted.
    parts = []
    longest = 0
    for example in examples:
        longest = max(longest, len(policy.encode(example)))
        if parts and (len(parts[-1]) + 1) * (longest + max_new_tokens) <= 8192:
            parts[-1].append(example)
        else:
            parts.append([example])
            longest = len(policy.encode(example))

    # Greedy: the same weights score the same each time, and two checkpoints differ by their weights alone.
    groups = []
    for part in parts:
        groups.extend(policy.rollouts(part, 1, max_new_tokens, 0.0, description="held-out"))
    return from_rank_zero(graded, judge, groups)


def graded(judge, groups: list[rar.Group]) -> tuple[dict, list[rar.Group]]:
    """(metrics, the groups with their verdicts)."""
    metrics = rar.evaluate(judge, groups, show_progress=True)
    return metrics, groups


def evaluate_heldout(run: Run) -> tuple[dict, list[rar.Group]]:
    """`evaluate` on the run's held-out examples."""
    return evaluate(run.policy, run.method.judge, run.heldout, run.config.max_new_tokens)


def first_score(run: Run, folder: "RunFolder", step: int) -> float:
    """The held-out score that a run begins with: measured in a new run, read from the log in a resumed one."""
    config = run.config
    if step == 0:
        # Without this evaluation nobody could tell what was learned from what was there.
        metrics, groups = evaluate_heldout(run)
        folder.append("metrics.jsonl", [{"step": 0} | metrics | run.method.judge.take_stats()])
        folder.write_samples(0, "heldout", groups)
        score = metrics["eval_score"]
        say(f"held-out score before training: {score:.3f}  ({interval(*metrics['eval_ci'])})")
        return score

    score = math.nan
    evaluated_at = -1
    for row in read_log(folder.path / "metrics.jsonl"):
        if row.get("eval_score") is not None:
            score = row["eval_score"]
        if "eval_score" in row:
            evaluated_at = row["step"]
    if step >= config.steps and evaluated_at < step:
        raise UserError(
            f"--steps {config.steps}: the run is at step {step} already, and was not evaluated there; give more"
        )
    return score


def interval(low: float, high: float) -> str:
    """A 95 % interval in words. A single prompt has none: resampling one value gives that value."""
    if math.isnan(low):
        return "one prompt: no interval"
    return f"95 % interval {low:.3f} to {high:.3f}"


# ------------------------------------------------------------------------------------------- several processes


def is_first() -> bool:
    """Whether this process is the one that judges, writes and speaks."""
    rank, _ = grpo.rank_and_world()
    return rank == 0


def gather(value) -> list:
    """The values of all processes, in the order of their ranks."""
    _, world = grpo.rank_and_world()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank_zero(function, *arguments):
    """Calls the function in the first process only. All get its result, or raise the error that it raised.

    All raise the same, so that none waits for another that has left.
    """
    _, world = grpo.rank_and_world()
    if world == 1:
        return function(*arguments)

    outcome = [None, None]
    if is_first():
        try:
            outcome[0] = function(*arguments)
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def join_processes() -> None:
    """Joins the others when torchrun has started several processes. nccl talks between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first one judges, and a model judge may take longer than the usual ten minutes.
    dist.init_process_group(backend, timeout=timedelta(hours=12))


# ------------------------------------------------------------------------------------------- the terminal


def printable(text: str) -> str:
    """The text with what a terminal would obey (escape sequences, reversed writing) shown instead of sent.

    >>> printable("caf\u00e9 \u4f60\\x1b[31m")
    'caf\u00e9 \u4f60\\\\x1b[31m'
    """
    shown = []
    for character in text:
        # Control characters, halves of surrogate pairs, and marks that turn the direction of writing.
        obeyed = unicodedata.category(character) in ("Cc", "Cs")
        turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
        if (obeyed or turns) and character not in "\n\t":
            character = ascii(character)[1:-1]
        shown.append(character)
    return "".join(shown)


def write_line(stream, text: str) -> None:
    """Prints to a stream that may not know every character and whose reader may be gone."""
    encoding = getattr(stream, "encoding", None) or "utf8"
    line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(line, file=stream, flush=True)
    except OSError:
        # `| head -1` has read enough, or the disk behind `> log` is full: training needs neither.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


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
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


# ------------------------------------------------------------------------------------------- the run's folder


@contextmanager
def writing(path: Path, advice: str):
    """Turns what cannot be written into one line; what was there before is still there. Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own error for a full disk, the tokenizer's a bare Exception
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written ({why}); {advice}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it: a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def json_lines(rows: list[dict]) -> bytes:
    """Lines of JSON in UTF-8; nan is written as null, which every JSON reader knows."""
    lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows]
    # A lone surrogate has no UTF-8; "?" keeps the log readable.
    return "".join(lines).encode("utf8", "replace")


def finite(value):
    """The value with nan and infinity replaced by None (JSON knows neither), and six decimals, at any depth.

    >>> finite({"reward": math.nan, "scores": [1 / 3, 2]})
    {'reward': None, 'scores': [0.333333, 2]}
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value, 6)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def parse_row(line: bytes) -> dict | None:
    """A row of a log; None for what is none: cut by a kill or a full disk, or broken by an editor.

    >>> parse_row(b'{"step": 3}'), parse_row(b'{"step": 3, "rew'), parse_row(b'[3]'), parse_row(b'{"step": "3"}')
    ({'step': 3}, None, None, None)
    """
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row


def read_log(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or samples.jsonl, without lines that are none."""
    if not path.is_file():
        return []
    rows = [parse_row(line) for line in path.read_bytes().split(b"\n")]
    return [row for row in rows if row is not None]


def versions() -> dict[str, str]:
    """What a resumed run must share to be the same run, bit for bit."""
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        # It decides in which order partial sums are added.
        "threads": str(torch.get_num_threads()),
        "device": device,
    }


class RunFolder:
    """The folder of a run, owned by one run at a time. Of several processes only the first touches the files.

    Logs are opened, appended to and closed at each step: `tail -f` shows whole lines, and a kill costs at most the last.
    """

    def __init__(self, config: Config):
        """Makes the folder (or finds that of --resume) and locks it. Raises UserError."""
        self.lock = None
        self.is_new = False
        self.path = from_rank_zero(self.claim, config)
        self.advice = f"make room there, then python train.py --resume {self.path}"

    def claim(self, config: Config) -> Path:
        """Claimed before anything is loaded, so that of two runs started together the second one does not begin."""
        if config.resume:
            path = Path(config.resume)
            if not (path / "config.json").is_file():
                raise UserError(f"--resume {path}: no run there; start one with --out {path}")
            self.take_lock(path)
            return path

        with writing(Path(config.out or "runs"), "choose another --out"):
            if config.out:
                path = Path(config.out)
                self.is_new = not path.exists()
                path.mkdir(parents=True, exist_ok=True)
            else:
                path = unused_folder(f"runs/{config.method}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
                self.is_new = True
        self.take_lock(path)
        for name in ("config.json", "metrics.jsonl"):
            if (path / name).exists():
                self.release()
                raise UserError(
                    f"{path}: holds a run already; continue it with --resume {path}, or choose another --out"
                )
        return path

    def take_lock(self, path: Path) -> None:
        """Locks RUN/lock until the process ends, however it ends. Raises UserError that says who holds it."""
        name = path / "lock"
        with writing(name, "choose another --out"):
            lock = open(name, "a+", encoding="utf8")  # noqa: SIM115  (open as long as the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = printable(lock.read(200)).strip() or "another process"
            lock.close()
            raise UserError(f"{path}: in use by {holder}; wait for it, or stop it") from None
        except OSError:
            warn(f"{path}: its file system has no locks; start no second run in it")

        # The last holder may have deleted the file between our opening it and locking it.
        if not name.exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(name)):
            lock.close()
            return self.take_lock(path)
        with writing(name, "choose another --out"):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            lock.flush()
        self.lock = lock

    def release(self) -> None:
        """Gives the folder back."""
        if self.lock:
            with suppress(OSError):
                os.unlink(self.lock.name)
            self.lock.close()
            self.lock = None

    def abandon(self) -> None:
        """Gives the folder back, and removes it if this run has made it and written nothing."""
        self.release()
        if self.is_new and is_first():
            with suppress(OSError):
                self.path.rmdir()

    def write_start(self, config: Config, examples: list[rar.Example]) -> None:
        """config.json, and prompts.jsonl: samples.jsonl names prompts by their ids only."""
        if not is_first():
            return
        prompts = []
        for example in examples:
            prompts.append({"id": example.id, "prompt": example.prompt, "tags": example.tags})
        settings = json.dumps(asdict(config), indent=1, ensure_ascii=False) + "\n"
        with writing(self.path, "choose another --out"):
            replace_file(self.path / "prompts.jsonl", json_lines(prompts))
            replace_file(self.path / "config.json", settings.encode("utf8"))

    def append(self, name: str, rows: list[dict]) -> None:
        """Adds lines to a log. Raises UserError."""
        if not is_first():
            return
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
        """report.html and report.png, from the files written so far."""
        if is_first():
            with writing(self.path / "report.html", self.advice):
                report.write_report(self.path)

    def save_checkpoint(self, run: Run, step: int) -> None:
        """Writes checkpoint-STEP aside and renames it; then `checkpoint`, a link, names it, and older ones go.

        So at every moment `checkpoint` is whole. Raises UserError.
        """
        target = self.path / f"checkpoint-{step}"
        if not is_first() or find_checkpoint(self.path) == target:
            return
        aside = self.path / f"checkpoint-{step}.tmp"
        state = {
            "step": step,
            "versions": versions(),
            "optimizer": run.optimizer.state_dict(),
            "method": run.method.state_dict(),
        }
        try:
            with writing(self.path / "checkpoint", self.advice):
                remove(aside)
                run.policy.model.save_pretrained(aside)
                run.policy.tokenizer.save_pretrained(aside)
                torch.save(state, aside / "trainer.pt")

                # One of this step is left where a kill came before the link was changed.
                remove(target)
                os.replace(aside, target)
                point_to(self.path / "checkpoint", target.name)
        finally:
            # What a full disk leaves half written takes room that is needed.
            with suppress(OSError):
                remove(aside)
        for other in self.path.glob("checkpoint-*"):
            if other != target:
                with suppress(OSError):
                    remove(other)

    def truncate(self, step: int) -> None:
        """Drops the log's rows after `step`, and lines that are no rows.

        The resumed run writes those steps again, and as it draws the same numbers they will be the same rows.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if not path.is_file():
                continue
            lines = []
            for line in path.read_bytes().split(b"\n"):
                row = parse_row(line)
                if row is not None and row["step"] <= step:
                    lines.append(line.strip().removeprefix(b"\xef\xbb\xbf") + b"\n")
            with writing(path, self.advice):
                replace_file(path, b"".join(lines))


def unused_folder(wanted: str) -> Path:
    """Makes a folder of this name, or with a number after it where that is taken: mkdir lets only one process win."""
    number = 1
    while True:
        path = Path(wanted)
        if number > 1:
            path = Path(f"{wanted}-{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def sample_row(step: int, split: str, example: rar.Example, rollout: grpo.Rollout) -> dict:
    """A row of samples.jsonl."""
    verdicts = []
    for criterion, verdict in zip(rollout.criteria, rollout.verdicts, strict=True):
        verdicts.append(
            {
                "title": criterion.title or criterion.text[:60],
                "weight": criterion.weight,
                "axis": criterion.axis,
                "score": verdict.score,
                "reason": verdict.reason,
            }
        )
    return {
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


def remove(path: Path) -> None:
    """Deletes a folder, or a link to one (not what it names), if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def point_to(link: Path, name: str) -> None:
    """Makes the link name another folder beside it, in one move."""
    aside = link.with_name(link.name + "-link.tmp")
    remove(aside)
    aside.symlink_to(name)
    if link.is_dir() and not link.is_symlink():
        # The run was copied by something that follows links. The new checkpoint is whole already.
        remove(link)
    os.replace(aside, link)


# ------------------------------------------------------------------------------------------- resuming


def find_checkpoint(folder: Path) -> Path | None:
    """The run's last checkpoint: what `checkpoint` names, else the newest checkpoint-STEP, else None."""
    link = folder / "checkpoint"
    if link.is_symlink() and link.exists():
        return folder / os.readlink(link)
    if link.exists():
        return link

    # A run that was killed before the first link, or copied without it. The folders are whole: they were renamed.
    newest = None
    newest_step = -1
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and int(number) > newest_step:
            newest = path
            newest_step = int(number)
    return newest


def resumed_config(config: Config, given: set[str], folder: Path) -> Config:
    """The settings of the run in the folder, with what may be given anew. Raises UserError."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: cannot be read as JSON; the run cannot be resumed without its settings") from None
    names = [entry.name for entry in fields(Config)]
    if not isinstance(saved, dict):
        saved = {}
    missing = [name for name in names if name not in saved]
    if missing:
        # A default in their place could be another experiment.
        raise UserError(f"{path}: lacks {', '.join(missing[:5])}; edited, or of another version of train.py")

    fixed = given - RESUMABLE
    if "offline" in (saved["judge"], config.judge) and "judge" in given:
        # A server may have moved; the offline judge and a model are two different rewards.
        fixed = fixed | {"judge"}
    changed = []
    for name in sorted(fixed):
        if saved[name] != getattr(config, name):
            changed.append(f"--{name} {getattr(config, name)} (the run has {saved[name]})")
    if changed:
        raise UserError(
            f"--resume {folder}: would mix two experiments: {', '.join(changed)}; leave them out or start a new run"
        )

    settings = {name: saved[name] for name in names}
    for name in given:
        settings[name] = getattr(config, name)
    for entry in fields(Config):
        problem = setting_problem(entry, settings[entry.name])
        if problem:
            raise UserError(f"{path}: {entry.name} {printable(str(settings[entry.name]))[:200]}: {problem}")
    return Config(**settings)


def read_state(folder: Path, saved: Config) -> dict | None:
    """The state in the run's checkpoint; None when the run was killed before the first one. Raises UserError."""
    last_step = 0
    for row in read_log(folder / "metrics.jsonl"):
        last_step = max(last_step, row["step"])
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        # The log may be one save ahead of the checkpoints, not more.
        if last_step > saved.save_every:
            raise UserError(
                f"--resume {folder}: its log goes to step {last_step}, but its checkpoint is missing; put it back, "
                "or start a new run"
            )
        return None

    path = checkpoint / "trainer.pt"
    if not path.is_file():
        raise UserError(f"{path}: missing; without it the run cannot be resumed: put it back, or start a new run")
    try:
        # weights_only: never a pickle that could run code.
        state = torch.load(path, weights_only=True)
        step = state["step"]
        other = dict(state["versions"])
        state["optimizer"]["state"], state["method"]
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); put back a whole one, or start a new run") from None
    if type(step) is not int or step < 1:
        raise UserError(f"{path}: its step is {step!r}; put back a whole one, or start a new run")

    changed = [name for name, value in versions().items() if other.get(name, value) != value]
    if changed:
        say(f"the checkpoint was made with other {', '.join(changed)}: the run continues, but not bit for bit as it would have")
    return state


# ------------------------------------------------------------------------------------------- the process


class Stop:
    """While it is open, Ctrl-C and SIGTERM are noted and the loop ends after the step; the second one ends the step too.

    Clusters send SIGTERM some minutes before they take a machine back: time enough for a step and a checkpoint.
    """

    def __init__(self):
        self.noted = 0  # the signal that came
        self.signal = 0  # the signal that all processes have agreed to stop for
        self.handlers = {}

    def __enter__(self):
        # Python takes handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        """The handler."""
        if self.noted:
            raise KeyboardInterrupt
        self.noted = number
        warn("\nstopping after this step; once more to stop now")

    def agree(self) -> None:
        """Makes all processes stop after the same step, when one of them was asked to."""
        self.signal = max(gather(int(self.noted)))

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def train(config: Config, given: set[str]) -> int:
    """A run from start to end, new or resumed. Returns the exit status: 0, or 128 + the signal that stopped it."""
    started = time.time()
    folder = RunFolder(config)
    state = None
    try:
        if config.resume:
            config = resumed_config(config, given, folder.path)
            state = read_state(folder.path, config)
        torch.manual_seed(config.seed)
        run = begin(config, folder.path, state)
        if not config.resume:
            folder.write_start(config, run.examples + run.heldout)
    except BaseException:
        folder.abandon()
        raise

    try:
        return train_in(folder, run, state, started)
    finally:
        folder.release()


def train_in(folder: RunFolder, run: Run, state: dict | None, started: float) -> int:
    """The loop, and the words before and after it. Returns the exit status."""
    config = run.config
    step = 0
    if state:
        step = state["step"]
    if config.resume:
        # A run killed before its first checkpoint begins again.
        last_step = step
        if step == 0:
            last_step = -1
        from_rank_zero(folder.truncate, last_step)
        folder.write_start(config, run.examples + run.heldout)
    announce(run, folder.path)

    stop = Stop()
    is_finished = step >= config.steps
    try:
        with stop:
            loop(run, folder, step, stop)
    except KeyboardInterrupt:
        # Asked twice: the step under way is lost, the last checkpoint is not.
        stop.signal = stop.noted or signal.SIGINT
    if stop.signal:
        say(f"\nstopped; continue with: python train.py --resume {folder.path}")
        return 128 + stop.signal

    if is_finished:
        # It may have been killed before its last report.
        folder.write_report()
    if is_first():
        say(report.summarise(folder.path))
    say(
        f"\n{(time.time() - started) / 60:.1f} minutes. In {folder.path}/: report.html, report.png, metrics.jsonl, "
        "samples.jsonl, prompts.jsonl, config.json, checkpoint (loads with transformers)"
    )
    return 0


def begin(config: Config, folder: Path, state: dict | None) -> Run:
    """Data, judge, method, policy and optimiser, new or as the checkpoint in `folder` has them. Raises UserError."""
    # In the order of what it costs to be wrong: data and flags first, the model after them.
    examples, heldout = read_data(config)
    method = make_method(config, make_judge(config))
    name = config.model
    if state:
        name = str(find_checkpoint(folder))
    policy = Policy(name, config.dtype)
    examples = fitting(examples, policy, config.max_new_tokens, "training")
    heldout = fitting(heldout, policy, config.max_new_tokens, "held-out")

    # For every schedule, so that all of them train on the same prompts.
    validation = []
    if config.method == "arlrr":
        if len(examples) <= config.validation:
            raise UserError(
                f"--validation {config.validation}: only {len(examples)} training prompts; hold fewer back, at least "
                "one must be left"
            )
        validation = examples[-config.validation :]
        examples = examples[: -config.validation]

    # Few prompts that come back often show learning in ten minutes; a data set of one's own is used whole.
    size = config.prompts
    if size == 0:
        size = len(examples) if config.data else 20
    examples = [example for example in examples[:size] if method.can_learn_from(example)]
    if not examples:
        raise UserError(
            f"--method {config.method} can learn from none of the training prompts (reference_likert needs references)"
        )

    # Second moments that forget in about 20 steps (0.95, not 0.999): a run has tens to hundreds of steps. No weight
    # decay: it would pull the policy away from where it started, whatever the reward says.
    optimizer = torch.optim.AdamW(
        policy.model.parameters(),
        lr=config.lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    # The reference is the model that the run began with, also when the policy comes from a checkpoint.
    if state:
        reference = Policy(config.model, config.dtype).model.requires_grad_(False)
        load_state(optimizer, method, state, folder)
    else:
        reference = grpo.freeze(policy.model)
    if config.sampler == "vllm":
        policy.start_engine(config, examples + heldout + validation)
    return Run(config, policy, reference, optimizer, method, examples, heldout, validation)


def load_state(optimizer, method: rar.RubricReward, state: dict, folder: Path) -> None:
    """Puts back the optimiser's moments and the method's state. Raises UserError when they are of another run."""
    try:
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
        for options in optimizer.param_groups:
            for parameter in options["params"]:
                for moment in optimizer.state[parameter].values():
                    if moment.ndim and moment.shape != parameter.shape:
                        raise ValueError("moments of another model")
    except Exception as error:
        raise UserError(
            f"{folder / 'checkpoint' / 'trainer.pt'}: does not belong to this run ({first_line(error)}); put back its "
            "own, or start a new run"
        ) from None


def announce(run: Run, folder: Path) -> None:
    """Says what is about to happen, and what it will ask of the judge: who pays for calls wants to know before."""
    config = run.config
    say(
        f"{len(run.examples)} training and {len(run.heldout)} held-out prompts, {config.steps} steps of "
        f"{config.prompts_per_step} x {config.group_size} rollouts, into {folder}/"
    )
    if config.judge != "offline":
        calls_per_rollout = []
        for example in run.examples:
            per_call = config.judge_k or len(example.rubric)
            calls_per_rollout.append(math.ceil(len(example.rubric) / per_call))
        calls = config.prompts_per_step * config.group_size * statistics.fmean(calls_per_rollout)
        say(
            f"judge {config.judge_model}: up to {calls:.0f} calls per step for the rollouts, {calls * config.steps:.0f} "
            "in all, less what repeats; evaluations, a search's trials and the writing of criteria come on top"
        )
    elif config.data:
        say(
            "The offline judge is a stand-in: it compares words and counts form, it does not understand. "
            "Read its scores as a smoke test."
        )


def keep_memory() -> None:
    """Tells glibc to reuse freed memory. By default it gives every large tensor back to the system and faults it in anew.

    That costs an eighth of a step's time on two cores. On other systems than Linux nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings, so that freed blocks can be used again
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 with one line that says what is wrong, where, and what to do; 128 + the signal that stopped it."""
    keep_memory()
    join_processes()
    if argv is None:
        argv = sys.argv[1:]
    try:
        config, given = parse_config(argv)
        status = train(config, given)
    except (UserError, rar.DataError, JudgeError, FloatingPointError, ImportError) as error:
        # Any process may be the one with the error, so whoever has one prints it.
        write_line(sys.stderr, "train.py: " + " ".join(str(error).split()))
        status = 2
    except KeyboardInterrupt:
        warn("stopped before the first step")
        status = 128 + signal.SIGINT
    if dist.is_initialized():
        if status == 0:
            gather(None)  # the first one may still be writing
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
