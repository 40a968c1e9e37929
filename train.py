"""Reinforcement learning from rubric rewards: the wiring. One command, from prompts with rubrics to a better model.

    data/*.jsonl -> Example -> grpo.sample -> Rollout x G -> method.score -> grpo.advantages -> grpo.update -> next step
                    (prompt,    (a group       (text, ids,    (judge: a        (nan = could      (loss, backward,
                     rubric)     a prompt)      log-probs)     verdict each)    not be scored)    optimiser)

    python train.py                                        # SmolLM2-135M on the built-in prompts, two CPU cores, ~10 minutes
    python train.py --method points --steps 20 --seed 1    # every field of Config below is a flag
    python train.py --data FILE.jsonl --steps 3            # own prompts or HealthBench rows
    python train.py --eval_only RUN/checkpoint             # only the held-out score
    python train.py --resume RUN                           # go on where a run stopped

A run's folder holds config.json, metrics.jsonl (a line a step), samples.jsonl (a line a rollout, with every verdict),
report.png, report.html and checkpoint/ (loads with transformers). The sampling of step s is drawn from (seed, s) alone, so a
resumed run needs no saved random state and is the same run.
"""

import argparse
import ast
import base64
import ctypes
import difflib
import gc
import html
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import partial, partialmethod
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

import arlrr
import grpo
import rar
import rler
from judge import JudgeError, LLMJudge, NoOfflineRule, OfflineJudge, fill

HERE = Path(__file__).resolve().parent


@dataclass
class Config:
    method: str = "explicit"
    "reward: explicit (RaR, Eq. 1), points (HealthBench: signed points over positive points), rler (evolving rubrics), arlrr (one class of criteria at a time)"
    evolve: str = "std"
    "rler: which evolving rubrics stay: std (they tell rollouts apart), fifo, random, static (nothing evolves)"
    rubrics_kept: int = 5
    "rler: evolving rubrics kept for a prompt (K)"
    form_share: float = 0.0
    "rler: share of the reward for form: a complete last sentence, stopping before the length limit"
    flaws: str = ""
    "rler: faults of the released code to switch on, a comma between them; see rler.FLAWS"
    schedule: str = "search"
    "arlrr: the next class by search, lowest_score, cyclic or random; or no turns: points, axis_mean, gdpo (see arlrr.py)"
    stage: int = 5
    "arlrr: updates before the next class is chosen"
    stage_by: str = "updates"
    "arlrr: a stage is --stage updates, an epoch of the class's prompts, or --stage in proportion to the class's weight"
    trial: int = 1
    "arlrr: updates of a class that the search tries out and takes back"
    validation: int = 12
    "arlrr: training prompts kept back, by which search and lowest_score choose"
    classes: str = "axis"
    "arlrr: what makes a class: axis, category, or the kind of a tag (level, cluster)"
    negative_only: str = "skip"
    "arlrr: prompts whose criteria in the class are all negative: skip them, or count them as a penalty"
    audit: float = 0.25
    "arlrr: share of the groups judged by the whole rubric to measure variance contraction"
    model: str = "smollm2"
    "policy: smollm2 (embedded default), a folder, or a hub id"
    data: str = ""
    "training prompts, a JSONL file in our own or HealthBench's format; default: data/train.jsonl"
    eval_data: str = ""
    "held-out prompts; default: data/heldout.jsonl, or a tenth of --data (at most 24 prompts)"
    judge: str = "offline"
    "who gives the verdicts: offline (lexical, see judge.py), or the base URL of an OpenAI-compatible server"
    judge_model: str = ""
    "the model's name on that server; the key comes from the environment, JUDGE_API_KEY"
    judge_k: int = 1
    "criteria in one call to the judge; 0 = all of a response's"
    judge_max_missing: float = 0.1
    "stop the run when a larger share of a step's verdicts is missing"
    judge_cache: str = "runs/judge_cache.jsonl"
    "answers of the model judge: cache and audit log, shared by runs"
    sampler: str = "torch"
    "who decodes the rollouts: torch (this process, any machine) or vllm (its engine in this process; for a GPU node)"
    vllm_memory: float = 4.0
    "GiB for the engine's keys and values; weights and trainer come on top"
    vllm_sleep: int = 0
    "1: the engine gives its memory back while the policy trains (larger models; costs seconds a step)"
    steps: int = 25
    "updates of the policy"
    prompts: int = 0
    "use only the first so many training prompts; 0 = all of --data, 20 of the built-in ones (each comes back five times)"
    prompts_per_step: int = 4
    "prompts in a step"
    group_size: int = 8
    "rollouts for each prompt (G)"
    max_new_tokens: int = 64
    "length limit of a completion"
    temperature: float = 0.7
    "of sampling and of scoring: a small model rambles at 1.0"
    lr: float = 1e-4
    "learning rate of AdamW, after a linear warm-up over a tenth of the steps; 1e-6 to 5e-6 for models of 7B"
    beta: float = 0.0
    "weight of the KL penalty towards the starting model; 0 = only measure it"
    loss: str = "dr_grpo"
    "token weights: dr_grpo (constant), grpo (sequence mean: at this lr answers shrink to a third), dapo (token mean)"
    advantage: str = "std"
    "(r - mean) / std of the group: std; r - mean: mean; r alone, no baseline: none"
    epochs: int = 1
    "passes over a batch of rollouts"
    minibatches: int = 1
    "optimiser steps in an epoch"
    clip_low: float = 0.2
    "PPO's clip: how far below 1 the probability ratio may count (no effect with one epoch and one minibatch)"
    clip_high: float = 0.0
    "how far above 1; 0 = 0.28 with --loss dapo (clip-higher), else the same as clip_low"
    tis_cap: float = -1.0
    "truncated importance sampling against the sampler's own probabilities; -1 = 2 with --sampler vllm, else off (0)"
    mask_truncated: int = 0
    "1: completions cut off by the length limit stay out of the loss"
    checkpointing: int = 0
    "1: gradient checkpointing, for models that do not fit"
    dtype: str = "auto"
    "arithmetic of the layers: float32, bfloat16 (weights stay float32), auto = bfloat16 on a GPU"
    seed: int = 0
    "of prompt order and sampling"
    out: str = ""
    "the run's folder; default: runs/<method>-seed<seed>-<time>"
    resume: str = ""
    "the folder of a run to go on with"
    eval_only: str = ""
    "only evaluate: a run, a checkpoint, smollm2, or saved answers (.jsonl); two of them with a comma between: their difference"
    plot: str = ""
    "only draw the curves of runs: their folders with a comma between; the picture goes to --out, default runs.png"
    eval_every: int = 10
    "steps between held-out evaluations (there is always one before and one after)"
    save_every: int = 10
    "steps between checkpoints (there is always one at the end)"


CHOICES = {"method": (*rar.METHODS, "rler", "arlrr"), "evolve": rler.SELECTIONS, "loss": ("grpo", "dr_grpo", "dapo"), "advantage": ("std", "mean", "none")}
CHOICES |= {"schedule": (*arlrr.TURNS, *arlrr.SCALARS), "stage_by": ("updates", "epoch", "weight"), "negative_only": ("skip", "penalty")}
CHOICES |= {"dtype": ("auto", "float32", "bfloat16"), "sampler": ("torch", "vllm")}
MINIMUM = dict.fromkeys(("steps", "rubrics_kept", "prompts_per_step", "max_new_tokens", "eval_every", "save_every", "epochs", "minibatches", "stage", "trial", "validation"), 1)
MINIMUM |= {"group_size": 2, "prompts": 0, "judge_k": 0}  # a group of one has no other answer to be better than
COSTS = ("updates", "rollouts", "verdicts", "tokens")  # what a comparison at equal budgets counts, besides seconds
RESUMABLE = {"steps", "eval_every", "save_every", "resume", "judge_cache"}  # may differ from the run that is resumed


class UserError(Exception):
    """Something the user can put right: printed as one line, exit status 2."""


# ------------------------------------------------------------------------------------------- settings


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest right flag."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments:"):
            flag = message.split(":", 1)[1].split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            message = f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise UserError(message)


def field_notes() -> dict[str, str]:
    """The string under each field of Config, which Python itself throws away."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    pairs = zip(body, body[1:])
    return {a.target.id: b.value.value for a, b in pairs if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}


def parse_config(argv: list[str]) -> tuple[Config, set[str]]:
    """Flags from the fields of Config. Returns the config and the names that were given. Raises UserError."""
    plain = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the text at the top of this file
    parser = Parser(prog="train.py", description=__doc__, formatter_class=plain, allow_abbrev=False)
    notes = field_notes()
    for f in fields(Config):
        note = notes[f.name] + (f" [{f.default}]" if f.default != "" else "")
        # SUPPRESS keeps flags that were not given out of the result: a resumed run must know which ones were.
        options = {"type": f.type, "default": argparse.SUPPRESS, "choices": CHOICES.get(f.name)}
        parser.add_argument(f"--{f.name}", help=note.replace("%", "%%"), **options)
    given = vars(parser.parse_args(argv))
    config = Config(**given)
    for name, low in MINIMUM.items():
        if getattr(config, name) < low:
            raise UserError(f"--{name} {getattr(config, name)}: give at least {low}")
    for name in ("temperature", "lr"):
        if not (math.isfinite(getattr(config, name)) and getattr(config, name) > 0):
            raise UserError(f"--{name} {getattr(config, name)}: give a number above 0")
    if not (math.isfinite(config.beta) and config.beta >= 0):
        raise UserError(f"--beta {config.beta}: give 0 or more")
    return config, set(given)


# ------------------------------------------------------------------------------------------- data


def read_data(config: Config) -> tuple[list[rar.Example], list[rar.Example]]:
    """Training and held-out examples. Read before the model is loaded: a bad row should cost no half minute."""
    train = rar.read_examples(config.data or HERE / "data" / "train.jsonl")
    if config.eval_data or not config.data:
        return train, rar.read_examples(config.eval_data or HERE / "data" / "heldout.jsonl")
    if len(train) < 2:
        raise UserError(f"{config.data}: one row cannot be both trained on and held out; give --eval_data or more rows")
    # No held-out file: keep back a tenth, by a shuffle that is the same for every seed, and never train on it.
    random.Random(0).shuffle(train)
    size = min(24, max(1, len(train) // 10))
    return train[size:], train[:size]


def fitting(examples: list[rar.Example], policy: "Policy", config: Config, name: str) -> list[rar.Example]:
    """Sets example.tokens and leaves out prompts that do not fit the model's context; says how many. Raises UserError."""
    for example in examples:
        example.tokens = grpo.encode(policy.tokenizer, example.prompt)
    short = [e for e in examples if len(e.tokens) + config.max_new_tokens <= policy.context]
    limit = f"the model's context of {policy.context} tokens (with --max_new_tokens {config.max_new_tokens})"
    if not short:
        raise UserError(f"no {name} prompt fits {limit}; shorten them, or lower --max_new_tokens")
    if len(short) < len(examples):
        print(f"skipped {len(examples) - len(short)} of {len(examples)} {name} prompts: longer than {limit}")
    return short


def batch(examples: list[rar.Example], config: Config, step: int) -> list[rar.Example]:
    """The prompts of a step: laps over all prompts, each lap in its own order.

    The order follows from (seed, lap) alone, so that a resumed run finds its place by arithmetic: no cursor to save.
    """
    chosen = []
    for position in range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step):
        lap, place = divmod(position, len(examples))
        order = list(range(len(examples)))
        random.Random(f"{config.seed}-{lap}").shuffle(order)
        chosen.append(examples[order[place]])
    return chosen


# ------------------------------------------------------------------------------------------- acting and judging


class Policy:
    """Model, tokenizer and what sampling needs to know about them."""

    def __init__(self, name: str, dtype: str = "auto"):
        try:
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
            self.model, self.tokenizer = grpo.load_policy(name, self.device, None if dtype == "auto" else dtype == "bfloat16")
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"--model {name}: cannot be loaded ({why}); give smollm2, a folder or a hub id") from None
        self.ends = grpo.end_tokens(self.model, self.tokenizer)
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        self.engine = None

    def start_engine(self, config: Config, examples: list) -> None:
        """vLLM beside the policy, with room for the longest of these prompts. Raises UserError without vLLM."""
        context = max(len(e.tokens) for e in examples) + config.max_new_tokens
        folder, bf16 = self.model.config._name_or_path, self.model.bfloat16_layers
        try:
            self.engine = grpo.VLLMSampler(folder, context, bf16, config.vllm_memory, bool(config.vllm_sleep))
        except ImportError as error:
            raise UserError(f"--sampler vllm: vLLM cannot be imported ({error}); pip install vllm==0.32.0") from None

    def rollouts(self, examples: list, group_size: int, max_new_tokens: int, temperature: float, seed: int, name: str):
        """Groups of rollouts with their text, sampled together under a progress bar that counts tokens."""
        share = rank, world = grpo.ranks()  # of several processes each rolls out every world-th prompt
        mine = examples[rank::world]
        with tqdm(total=len(mine) * group_size * max_new_tokens, desc=name, unit="tok", leave=False, disable=None) as bar:
            prompts = [e.tokens for e in examples]
            decode = self.engine.sample if self.engine else partial(grpo.sample, self.model)
            groups = decode(prompts, group_size, max_new_tokens, temperature, self.ends, seed, bar.update, share)
        for group in groups:
            for rollout in group:
                rollout.text = self.tokenizer.decode(rollout.ids, skip_special_tokens=True)
        return list(zip(mine, groups))


def make_judge(config: Config):
    """The judge that the settings name. Raises UserError."""
    if config.judge == "offline":
        return OfflineJudge()
    if not config.judge_model:
        raise UserError("--judge needs --judge_model: the name under which the server knows its model")
    settings = {"k": config.judge_k, "cache_path": config.judge_cache, "max_missing": config.judge_max_missing}
    return LLMJudge(config.judge, config.judge_model, **settings)


def make_method(config: Config, judge):
    """The reward that the settings name: all methods have the interface of rar.RubricReward."""
    if config.method == "arlrr":
        if not 0 <= config.audit <= 1:
            raise UserError(f"--audit {config.audit}: give a share from 0 to 1")
        names = ("schedule", "stage", "stage_by", "negative_only", "audit", "trial", "seed", "prompts_per_step")
        values = {name: getattr(config, name) for name in names}
        return arlrr.ARLRR(judge, by=config.classes, clip=config.advantage != "std", **values)
    if config.method != "rler":
        return rar.RubricReward(judge, config.method)
    flaws = [flaw for flaw in config.flaws.split(",") if flaw]
    if unknown := set(flaws) - set(rler.FLAWS):
        raise UserError(f"--flaws {', '.join(sorted(unknown))}: not known; use {', '.join(rler.FLAWS)}")
    if not 0 <= config.form_share <= 1:
        raise UserError(f"--form_share {config.form_share}: give a share from 0 to 1")
    return rler.RLER(judge, config.rubrics_kept, config.evolve, flaws, config.form_share)


class Lab:
    """What a method may try out between two steps: an update that can be taken back, a look at the validation prompts."""

    def __init__(self, policy: Policy, reference, optimizer, method, examples: list, validation: list, config: Config):
        self.policy, self.reference, self.optimizer, self.method = policy, reference, optimizer, method
        self.examples, self.validation, self.config, self.step = examples, validation, config, 0
        self.cost, self.started = Counter(), 0.0

    def at(self, step: int) -> "Lab":
        """Starts a new account, for the decision before this step."""
        self.step, self.cost, self.started = step, Counter(), time.perf_counter()
        return self

    def save(self) -> dict:
        """The state to come back to: weights, moments, random states."""
        return arlrr.snapshot(self.policy.model, self.optimizer)

    def restore(self, state: dict) -> None:
        """Takes back every update since `save`."""
        arlrr.restore(self.policy.model, self.optimizer, state)
        if self.policy.engine:
            self.policy.engine.sync(self.policy.model)

    def update(self, ahead: int) -> None:
        """The update that the run would do now, or `ahead` steps from now."""
        pool, visit = self.method.pool(self.examples, self.step + ahead)
        prompts, measure = batch(pool, self.config, visit), self.reference if self.config.beta else None
        metrics, _ = one_step(self.policy, measure, self.optimizer, self.method, prompts, self.config, self.step + ahead)
        self.cost += Counter(updates=1) + Counter({key: metrics[key] for key in ("rollouts", "verdicts", "tokens")})

    def validate(self) -> list[tuple[rar.Example, list]]:
        """The greedy answers to the validation prompts, judged by their whole rubrics: groups of one rollout."""
        _, groups = evaluate(self.policy, self.method.judge, self.validation, self.config.max_new_tokens)
        answers = [rollout for _, [rollout] in groups]
        self.cost += Counter(rollouts=len(answers), verdicts=sum(len(r.verdicts) for r in answers), tokens=sum(len(r.ids) for r in answers))
        return groups

    def spent(self) -> dict:
        """What the trials of this decision cost, as metrics."""
        return {f"search_{key}": self.cost[key] for key in COSTS} | {"search_seconds": time.perf_counter() - self.started}


def evaluate(policy: Policy, judge, examples: list[rar.Example], max_new_tokens: int, max_tokens: int = 8192):
    """Greedy answers to the held-out prompts, scored by rar.evaluate. Returns (metrics, groups of one rollout)."""
    batches: list[list[rar.Example]] = [[]]
    for example in examples:  # as many prompts at once as fit into max_tokens, padding counted
        grown = [*batches[-1], example]
        if len(grown) > 1 and len(grown) * (max(len(e.tokens) for e in grown) + max_new_tokens) > max_tokens:
            batches.append([example])
        else:
            batches[-1] = grown
    groups = [group for batch in batches for group in policy.rollouts(batch, 1, max_new_tokens, 0.0, 0, "held-out")]
    rank, world = grpo.ranks()
    if world == 1:
        return rar.evaluate(judge, groups), groups
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, groups)
    order = {e.id: place for place, e in enumerate(examples)}
    groups = sorted((group for part in everyone for group in part), key=lambda group: order[group[0].id])
    result = [(rar.evaluate(judge, groups), groups) if rank == 0 else None]  # one asks the judge, all get the answer
    torch.distributed.broadcast_object_list(result)
    return result[0]


# ------------------------------------------------------------------------------------------- the run's folder


class Run:
    """Files of a run: config, metrics, samples, checkpoint. Each line is written and flushed whole."""

    def __init__(self, folder: Path, config: Config, examples: list[rar.Example] = ()):
        self.folder, self.config = folder, config
        self.prompts = {e.id: e.prompt for e in examples}  # for the report: samples.jsonl holds only their ids
        self.shown = {"train": {}, "heldout": {}}  # step -> lines of samples.jsonl, of the first and the last step
        self.writes = grpo.ranks()[0] == 0  # of several processes the first one
        if not self.writes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", asdict(config))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None

    def write_json(self, name: str, value: dict) -> None:
        """A small JSON file, replaced as a whole."""
        side = self.folder / (name + ".tmp")
        side.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        os.replace(side, self.folder / name)

    def append(self, name: str, rows: list[dict]) -> None:
        """Lines of JSONL; nan becomes null, which every JSON reader knows. Raises UserError."""
        if not self.writes:
            return
        try:
            with open(self.folder / name, "a", encoding="utf8") as file:
                file.write("".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise UserError(self.unwritable(name, error)) from None

    def unwritable(self, name: str, error: Exception) -> str:
        """What to say when a file of the run cannot be written; what was there before is still there."""
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return f"{self.folder / name}: cannot be written ({why}); make room there, then go on with --resume {self.folder}"

    def rows(self, name: str):
        """The lines of a log so far, one at a time."""
        return (row for _, row in rar.rows(self.folder / name)) if (self.folder / name).exists() else iter(())

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl so far."""
        return list(self.rows("metrics.jsonl"))

    def samples(self, step: int, split: str, groups: list) -> None:
        """One line a rollout: what was said, what the judge found, what it was worth."""
        rows = []
        for example, rollouts in groups:
            for r in rollouts:
                found = zip(r.criteria, r.verdicts)
                verdicts = [{"title": c.title or c.text[:60], "weight": c.weight, "score": v.score, "reason": v.reason} for c, v in found]
                row = {"step": step, "split": split, "id": example.id, "text": r.text, "finish": r.finish}
                rows.append(finite(row | {"tokens": len(r.ids), "verdicts": verdicts, "reward": r.reward, "advantage": r.advantage}))
        self.append("samples.jsonl", rows)
        for row in rows:
            self.show(row)

    def show(self, row: dict) -> None:
        """Remembers a line for the report and the summary, which would have to read a long run's rollouts again each time."""
        kept = self.shown[row["split"]]
        if len(kept) == 2 and row["step"] not in kept:
            kept.pop(max(kept))
        kept.setdefault(row["step"], []).append(row)

    def save(self, policy: Policy, optimizer, method, step: int) -> None:
        """checkpoint/: written to one side, then renamed, so that a kill leaves the old one or the new one. Raises UserError."""
        if not self.writes:
            return
        side, final, old = (self.folder / name for name in ("checkpoint.tmp", "checkpoint", "checkpoint.old"))
        state = {"step": step, "optimizer": optimizer.state_dict(), "method": method.state_dict(), "versions": versions()}
        shutil.rmtree(side, ignore_errors=True)
        if final.exists():  # else the old one is all there is: a run killed between the two renames
            shutil.rmtree(old, ignore_errors=True)
        try:
            with grpo.quiet():
                policy.model.save_pretrained(side)
            policy.tokenizer.save_pretrained(side)
            torch.save(state, side / "trainer.pt")
            if final.exists():
                os.replace(final, old)
            os.replace(side, final)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own word for a full disk
            shutil.rmtree(side, ignore_errors=True)
            raise UserError(self.unwritable("checkpoint", error)) from None
        shutil.rmtree(old, ignore_errors=True)

    def truncate(self, step: int) -> None:
        """Drops lines after `step` and a last line cut off by a kill: a resumed run writes them again."""

        def wanted(line: str) -> bool:
            try:
                return json.loads(line)["step"] <= step
            except ValueError:
                return False

        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if self.writes and path.exists():
                kept = [line for line in path.read_text(encoding="utf8").split("\n") if line and wanted(line)]
                path.write_text("".join(line + "\n" for line in kept), encoding="utf8")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others read what the first one has just rewritten
        for row in self.rows("samples.jsonl"):
            self.show(row)


def versions() -> dict[str, str]:
    """What a resumed run must share to be the same run, bit for bit."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__,
            "threads": str(torch.get_num_threads()), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}  # fmt: skip


def finite(value):
    """The same value with nan and infinity replaced by None, at any depth."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


PANELS = (
    ("reward", "training reward, mean of a step", "tab:blue"),
    ("eval_score", "held-out score (points met / positive points)", "tab:green"),
    ("completion_tokens", "tokens of a completion", "tab:orange"),
    ("kl", "KL to the starting model, a token", "tab:red"),
)


def curve(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, without the steps that do not have it."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def panels(title: str):
    """An empty figure with one panel a metric. -> (figure, metric -> its axes)"""
    from matplotlib.figure import Figure  # not pyplot: runs happen on machines without a screen

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = {key: axis for (key, _, _), axis in zip(PANELS, figure.subplots(2, 2).flat)}
    for key, name, _ in PANELS:
        axes[key].set_title(name, fontsize=10)
        axes[key].set_xlabel("step", fontsize=9)
        axes[key].grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    return figure, axes


def report(run: Run) -> None:
    """report.png: the four curves of PANELS, from metrics.jsonl alone. report.html: the same, and rollouts to open."""
    if not run.writes:
        return
    c, rows = run.config, run.metrics()
    figure, axes = panels(f"{c.model}, {c.method}, seed {c.seed}, judge {c.judge}")
    for key, _, color in PANELS:
        steps, values = curve(rows, key)
        if key == "eval_score":
            axes[key].plot(steps, values, color=color, marker="o")
            continue
        recent = [statistics.fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
        axes[key].plot(steps, values, color=color, alpha=0.35, marker=".", linewidth=1)
        axes[key].plot(steps, recent, color=color, linewidth=2, label="mean of the last five")
    trained = [row for row in rows if row.get("reward") is not None]
    low, high = ([row["reward"] + sign * (row["reward_std"] or 0) for row in trained] for sign in (-1, 1))
    axes["reward"].fill_between([row["step"] for row in trained], low, high, color="tab:blue", alpha=0.12, label="± std in groups")
    axes["reward"].legend(fontsize=8, loc="lower right")
    for row in rows:
        if None not in row.get("eval_ci", [None]):  # one held-out prompt has no interval
            axes["eval_score"].plot([row["step"]] * 2, row["eval_ci"], color="tab:green")
    figure.savefig(run.folder / "report.png", dpi=110)
    del figure, axes
    gc.collect()  # a figure is a knot of references; uncollected, each holds four megabytes
    (run.folder / "report.html").write_text(page(run, rows), encoding="utf8", errors="replace")


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; color: #222; background: #fff}
h1 {font-size: 1.3rem} h2 {font-size: 1.05rem; margin-top: 2rem} img {max-width: 100%; height: auto}
details {border-top: 1px solid #ddd; padding: .35rem 0} summary {cursor: pointer} summary span {color: #555; font-variant-numeric: tabular-nums}
pre {white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; margin: .4rem 0; font-size: .85rem}
div {overflow-x: auto} table {border-collapse: collapse; font-size: .85rem} td, th {border: 1px solid #ddd; padding: .2rem .5rem; text-align: left}
.good {background: #e8f5e9} .bad {background: #fdecea} .none {background: #fff8e1}
</style></head><body><h1>{title}</h1><p>{settings}</p><details><summary>Last line of metrics.jsonl</summary><p>{last}</p></details><img alt="reward, held-out score, length and KL over the steps" src="data:image/png;base64,{png}">
{rollouts}</body></html>
"""


def page(run: Run, rows: list[dict]) -> str:
    """report.html: curves, and the rollouts of the first and the last step and evaluation. Nothing a model said can run:
    every text is escaped, and the page's own policy forbids scripts."""
    names, parts = {"train": "Rollouts of training step", "heldout": "Held-out answers at step"}, []
    for split, kept in run.shown.items():
        for step, found in kept.items():
            parts.append(f"<h2>{names[split]} {step}</h2>" + "".join(rollout_html(run, row) for row in found))
    shown = ", ".join(f"{k} {v}" for k, v in asdict(run.config).items() if v != getattr(Config, k))
    last = {k: v for k, v in rows[-1].items() if isinstance(v, (int, float)) and not k.startswith("eval_n")}
    values = {
        "title": f"{run.config.method}, seed {run.config.seed}: {run.folder.name}",
        "settings": "Settings other than the defaults: " + (shown or "none"),
        "last": ", ".join(f"{k} {v:.4g}" for k, v in last.items()),
    }
    png = base64.b64encode((run.folder / "report.png").read_bytes()).decode()
    return fill(PAGE, **{k: html.escape(v) for k, v in values.items()}, png=png, rollouts="".join(parts))


def rollout_html(run: Run, row: dict) -> str:
    """A rollout to open: prompt, response, and each criterion with weight, verdict and the judge's reason."""
    number = lambda value: "not scored" if value is None else f"{value:+.3f}"
    said = "\n\n".join(f"{m['role']}: {m['content']}" for m in run.prompts.get(row["id"], []))
    lines = []
    for v in row["verdicts"]:
        v = {"weight": 1.0} | v  # older runs did not write it
        good = None if v["score"] is None else v["score"] if v["weight"] > 0 else 1 - v["score"]
        kind = "none" if good is None else "good" if good > 0.5 else "bad"
        points = "" if v["score"] is None else f"{v['weight'] * v['score'] or 0:g}"
        cells = (v["title"], f"{v['weight']:+g}", "missing" if v["score"] is None else f"{v['score']:g}", points, v["reason"])
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    figures = f"reward {number(row['reward'])}, advantage {number(row['advantage'])}, {row['tokens']} tokens, {row['finish']}"
    return (
        f"<details><summary>{html.escape(row['id'])} <span>{figures}</span></summary><pre>{html.escape(said)}</pre><pre>{html.escape(row['text'])}</pre>"
        "<div><table><tr><th>criterion</th><th>weight</th><th>verdict</th><th>points</th><th>reason</th></tr>" + "".join(lines) + "</table></div></details>"
    )


def plot(folders: list[str], out: str) -> int:
    """--plot: the curves of several runs in one picture; runs whose settings differ in the seed alone are one line with a band."""
    kinds: dict[str, list[list[dict]]] = {}
    settings = [json.loads(path.read_text(encoding="utf8")) if (path := Path(f, "config.json")).is_file() else None for f in folders]
    for folder, found in zip(folders, settings):
        if found is None:
            raise UserError(f"--plot {folder}: no run there; give folders of runs")
    differing = [k for k in settings[0] if k not in ("seed", "out", "resume", "plot") and len({str(s.get(k)) for s in settings}) > 1]
    for folder, found in zip(folders, settings):
        rows = [row for _, row in rar.rows(Path(folder, "metrics.jsonl"))]
        kinds.setdefault(", ".join(f"{k} {found[k]}" for k in differing if found.get(k) != "") or found["method"], []).append(rows)
    figure, axes = panels("mean over seeds, band: one standard deviation")
    for name, runs in kinds.items():
        for key, _, _ in PANELS:
            values: dict[int, list[float]] = {}
            for rows in runs:
                for step, value in zip(*curve(rows, key)):
                    values.setdefault(step, []).append(value)
            steps = sorted(values)
            middle, spread = ([f(values[s]) for s in steps] for f in (statistics.fmean, statistics.pstdev))
            [line] = axes[key].plot(steps, middle, label=f"{name} ({len(runs)})", linewidth=1.6, marker="." if key == "eval_score" else "")
            axes[key].fill_between(steps, [m - d for m, d in zip(middle, spread)], [m + d for m, d in zip(middle, spread)], color=line.get_color(), alpha=0.15)
    axes["reward"].legend(fontsize=8)
    figure.savefig(out, dpi=110)
    print(f"{len(folders)} runs: {out}")
    return 0


# ------------------------------------------------------------------------------------------- the loop


def one_step(policy: Policy, reference, optimizer, method, examples: list, config: Config, step: int) -> tuple[dict, list]:
    """Roll out, judge, learn. Returns the step's metrics and its groups."""
    clock = [time.perf_counter()]
    # 1. Roll out. The random numbers follow from (seed, step) alone: a resumed run draws what the first would have drawn.
    seed = random.Random(f"{config.seed}-{step}").getrandbits(62)
    groups = policy.rollouts(examples, config.group_size, config.max_new_tokens, config.temperature, seed, "rollouts")
    clock.append(time.perf_counter())
    # 2. Judge: verdicts and one reward a rollout, all groups in one batch.
    method.score(groups, progress=True)
    groups = exchanged(groups, method)
    clock.append(time.perf_counter())
    # 3. Learn: better or worse than the other answers to the same prompt?
    rewards = torch.tensor([[r.reward for r in rollouts] for _, rollouts in groups])  # [P, G]
    own = getattr(method, "own_advantages", False)
    advantages = method.advantages(groups) if own else grpo.advantages(rewards, config.advantage).tolist()
    for (_, rollouts), row in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(rollouts, row):
            rollout.advantage = advantage
    for options in optimizer.param_groups:
        options["lr"] = config.lr * min(1.0, (step + 1) / max(1, round(config.steps * 0.1)))
    only_rollouts = [rollouts for _, rollouts in groups]
    all_rollouts = [r for rollouts in only_rollouts for r in rollouts]
    if policy.engine:
        policy.engine.sleep()
    with tqdm(total=len(all_rollouts), desc="train", unit="row", leave=False, disable=None) as bar:
        learned = grpo.update(policy.model, optimizer, only_rollouts, settings(config), reference, bar.update)
    if learned["kl"] is None and reference:  # beta is 0: nothing needed it, but a reader wants to see how far the policy has gone
        learned["kl"] = grpo.measure_kl(reference, only_rollouts, config.temperature)
    if policy.engine:
        policy.engine.sync(policy.model)
    clock.append(time.perf_counter())
    lengths = [len(r.ids) for r in all_rollouts]
    verdicts = [v.score for r in all_rollouts for v in r.verdicts]
    scored = [[r.reward for r in rollouts if not math.isnan(r.reward)] for rollouts in only_rollouts]
    return {
        "step": step + 1,
        "reward": rar.mean(r.reward for r in all_rollouts),
        "reward_std": rar.mean(statistics.pstdev(row) for row in scored if row),
        "judge_missing": sum(v is None for v in verdicts) / len(verdicts),
        "completion_tokens": statistics.fmean(lengths),
        "truncated": rar.mean(float(r.finish == "length") for r in all_rollouts),
        "length_reward_corr": correlation(groups),
        **learned,
        "seconds_rollout": clock[1] - clock[0],
        "seconds_judge": clock[2] - clock[1],
        "seconds_train": clock[3] - clock[2],
        "tokens_per_second": sum(lengths) / (clock[1] - clock[0]),
        "rollouts": len(all_rollouts),
        "verdicts": len(verdicts),
        "tokens": sum(lengths),
        **method.judge.take_stats(),
    }, groups


def exchanged(groups: list, method) -> list:
    """Several processes: the groups that all of them rolled out and judged, in the batch's order, and what the method noted
    about them. Everything after this is computed by each process from the same values."""
    rank, world = grpo.ranks()
    if world == 1:
        return groups
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, (groups, {name: getattr(method, name) for name in method.of_step}))
    for name in method.of_step:
        first, *others = (noted[name] for _, noted in everyone)
        for other in others:
            first = first | other if type(first) is dict else first + other
        setattr(method, name, first)
    return [everyone[place % world][0][place // world] for place in range(sum(len(part) for part, _ in everyone))]


def settings(config: Config) -> grpo.Settings:
    """What grpo.update needs to know: the fields of the same name, and the two whose default follows from others."""
    values = {f.name: getattr(config, f.name) for f in fields(grpo.Settings) if hasattr(config, f.name)}
    values["clip_high"] = config.clip_high or (0.28 if config.loss == "dapo" else config.clip_low)
    values["tis_cap"] = config.tis_cap if config.tis_cap >= 0 else 2.0 * (config.sampler == "vllm")
    return grpo.Settings(**values)


def correlation(groups: list) -> float:
    """Mean correlation of length with reward within the groups: high values mean that length is being paid for."""
    values = []
    for _, rollouts in groups:
        pairs = [(float(len(r.ids)), r.reward) for r in rollouts if not math.isnan(r.reward)]
        if len({a for a, _ in pairs}) > 1 and len({b for _, b in pairs}) > 1:
            values.append(statistics.correlation(*zip(*pairs)))
    return rar.mean(values)


def train(config: Config, given: set[str]) -> int:
    """A whole run, new or resumed."""
    state, folder = None, Path(config.out or f"runs/{config.method}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume:
        folder = Path(config.resume)
        config = resumed_config(config, given, folder)
        saved = folder / "checkpoint" / "trainer.pt"
        state = torch.load(saved, weights_only=True) if saved.exists() else None
        if state and (other := {k: v for k, v in versions().items() if v != state.get("versions", {}).get(k, v)}):
            print(f"the checkpoint was made with other {', '.join(other)}: the run goes on, but not bit for bit as it would have")
    elif (folder / "config.json").exists() or (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
    started = time.time()
    torch.manual_seed(config.seed)
    train_set, heldout = read_data(config)
    judge = make_judge(config)
    method = make_method(config, judge)  # before the model: a method that this judge cannot serve should cost no half minute
    policy = Policy(str(folder / "checkpoint") if state else config.model, config.dtype)
    train_set, heldout = fitting(train_set, policy, config, "training"), fitting(heldout, policy, config, "held-out")
    validation = []
    if config.method == "arlrr":  # for every schedule, so that all of them train on the same prompts
        if len(train_set) <= config.validation:
            raise UserError(f"--validation {config.validation}: only {len(train_set)} training prompts; keep fewer back")
        train_set, validation = train_set[: -config.validation], train_set[-config.validation :]
    # Few prompts that come back often show learning in ten minutes; a data set of one's own is used whole.
    train_set = train_set[: config.prompts or (len(train_set) if config.data else 20)]
    run = Run(folder, config, train_set + heldout)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    reference = grpo.freeze(policy.model if not state else Policy(config.model, config.dtype).model)
    step = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
        step = state["step"]
    if config.resume:
        run.truncate(step if state else -1)  # killed before the first checkpoint: the run begins again
    train_set = [e for e in train_set if method.eligible(e)]
    if not train_set:
        raise UserError(f"--method {config.method} can learn from none of the training prompts (reference_likert needs references)")
    if config.sampler == "vllm":
        policy.start_engine(config, train_set + heldout + validation)
    announce(config, train_set, heldout, folder)
    lab, stop = Lab(policy, reference, optimizer, method, train_set, validation, config), Stop()
    try:
        with stop:
            loop(run, policy, reference, optimizer, method, train_set, heldout, step, lab, stop)
    except KeyboardInterrupt:  # asked twice: the step under way is lost, the last checkpoint is not
        stop.asked = stop.asked or signal.SIGINT
    if stop.asked:
        print(f"\nstopped; go on with: python train.py --resume {folder}")
        return 128 + stop.asked
    if run.writes:
        summary(run, heldout, time.time() - started)
    return 0


class Stop:
    """While it is open, Ctrl-C and SIGTERM are noted: the loop ends after the step. The second one ends the step as well."""

    def __init__(self):
        self.asked, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        """The handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        print("\nstopping after this step; once more to stop now", file=sys.stderr, flush=True)

    def agree(self) -> bool:
        """Whether this step is the last one. Of several processes all stop after the same step, when one of them was asked."""
        asked = [int(self.asked)] * grpo.ranks()[1]
        if len(asked) > 1:
            torch.distributed.all_gather_object(asked, asked[0])
        self.asked = max(self.asked, *asked)
        return any(asked)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def announce(config: Config, train_set: list, heldout: list, folder: Path) -> None:
    """What is about to happen, and what it will ask of the judge."""
    per_step = config.prompts_per_step * config.group_size
    print(f"{len(train_set)} training and {len(heldout)} held-out prompts, {config.steps} steps of "
          f"{config.prompts_per_step} x {config.group_size} rollouts, into {folder}/")  # fmt: skip
    if config.judge != "offline":
        k = config.judge_k or 10**9
        calls = per_step * rar.mean(float(math.ceil(len(e.rubric) / k)) for e in train_set)
        print(f"judge {config.judge_model}: up to {calls:.0f} calls a step, {calls * config.steps:.0f} in all, less what repeats")
    elif config.data:
        print("The offline judge is a stand-in: it compares words and counts form, it does not understand. "
              "Read its scores as a smoke test.")  # fmt: skip


def loop(run: Run, policy: Policy, reference, optimizer, method, train_set: list, heldout: list, step: int, lab: Lab, stop: Stop) -> None:
    """Steps, evaluations, logs and checkpoints until config.steps."""
    config = run.config
    if step == 0:
        metrics, groups = evaluate(policy, method.judge, heldout, config.max_new_tokens)
        run.append("metrics.jsonl", [{"step": 0} | metrics])
        run.samples(0, "heldout", groups)
        low, high = metrics["eval_ci"]
        print(f"held-out score before training: {metrics['eval_score']:.3f}  (95 % interval {low:.3f} to {high:.3f})")
        score = metrics["eval_score"]
    else:
        score = [row["eval_score"] for row in run.metrics() if "eval_score" in row][-1]
    with tqdm(total=config.steps, initial=step, desc="steps", unit="step", disable=None) as bar:
        ending = False
        while step < config.steps and not ending:
            try:
                chosen = method.before_step(train_set, lab.at(step))
                pool, visit = method.pool(train_set, step)
                metrics, groups = one_step(policy, reference, optimizer, method, batch(pool, config, visit), config, step)
            except (JudgeError, FloatingPointError) as error:
                if step:  # the policy still is what the last step left: keep it, then say what is wrong
                    run.save(policy, optimizer, method, step)
                raise type(error)(f"step {step + 1}: {error}; when that is put right: python train.py --resume {run.folder}") from None
            except torch.OutOfMemoryError:  # perhaps in the middle of an update, so nothing is saved
                raise UserError(f"step {step + 1}: the GPU's memory is full; try --checkpointing 1, --vllm_sleep 1, fewer "
                                f"--prompts_per_step or --max_new_tokens in a new run") from None  # fmt: skip
            ending = stop.agree()  # asked once a step: a signal from here on is for the next one, so that no step goes unsaved
            metrics |= chosen | method.after_step(groups)
            step += 1
            run.samples(step, "train", groups)
            if step % config.eval_every == 0 or step == config.steps:
                evaluated, answers = evaluate(policy, method.judge, heldout, config.max_new_tokens)
                run.samples(step, "heldout", answers)
                metrics |= evaluated
                score = metrics["eval_score"]
            run.append("metrics.jsonl", [metrics])
            if step % config.save_every == 0 or step == config.steps or ending:
                run.save(policy, optimizer, method, step)
            if "eval_score" in metrics:
                report(run)
            seconds = "+".join(f"{metrics[f'seconds_{part}']:.0f}" for part in ("rollout", "judge", "train"))
            note = {"reward": f"{metrics['reward']:.3f}", "held-out": f"{score:.3f}", "seconds": seconds}
            bar.set_postfix(note)
            bar.update()
            if bar.disable:
                print(f"step {step}/{config.steps}  " + "  ".join(f"{k} {v}" for k, v in note.items()), flush=True)


def resumed_config(config: Config, given: set[str], folder: Path) -> Config:
    """The settings of the run in `folder`; only those in RESUMABLE may be given anew. Raises UserError."""
    if (folder / "checkpoint.old").exists() and not (folder / "checkpoint").exists():
        os.replace(folder / "checkpoint.old", folder / "checkpoint")  # killed between the two renames of Run.save
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: no run there; start one with --out {folder}")
    saved = json.loads((folder / "config.json").read_text(encoding="utf8"))
    changed = [name for name in given - RESUMABLE if saved.get(name) != getattr(config, name)]
    if changed:
        said = ", ".join(f"--{name} {getattr(config, name)} (the run has {saved.get(name)})" for name in sorted(changed))
        raise UserError(f"--resume {folder}: would mix two experiments: {said}; leave them out or start a new run")
    known = {f.name for f in fields(Config)}
    return Config(**{k: v for k, v in saved.items() if k in known} | {name: getattr(config, name) for name in given})


# ------------------------------------------------------------------------------------------- the closing summary


def summary(run: Run, heldout: list[rar.Example], seconds: float) -> None:
    """Before and after on the held-out prompts: score with interval, criteria that changed most, one answer, the files."""
    before, after = ({row["id"]: row for row in run.shown["heldout"][step]} for step in sorted(run.shown["heldout"]))
    reward = lambda part, i: math.nan if part[i]["reward"] is None else part[i]["reward"]
    gains = [reward(after, i) - reward(before, i) for i in before]
    low, high = rar.bootstrap(gains)
    old, new = (rar.mean(reward(part, i) for i in part) for part in (before, after))
    print(f"\nheld-out score  {old:.3f} -> {new:.3f}   gain {rar.mean(gains):+.3f}, 95 % interval {low:+.3f} to {high:+.3f} "
          f"({len(gains)} prompts, paired bootstrap)")  # fmt: skip
    rewards = [r["reward"] for r in run.metrics() if r.get("reward") is not None]
    if len(rewards) >= 10:
        first, final = statistics.fmean(rewards[:5]), statistics.fmean(rewards[-5:])
        print(f"training reward {first:.3f} -> {final:.3f}   (mean of the first and of the last five steps)")
    print("\ncriteria that changed most (share of held-out answers that are right in this respect):")
    for title, a, b, n in rar.changed_criteria(heldout, before, after)[:5]:
        print(f"  {title:<22} {a:4.0%} -> {b:4.0%}   ({n} prompts)")
    gained = dict(zip(before, gains))
    example = max(heldout, key=lambda e: -math.inf if math.isnan(gained[e.id]) else gained[e.id])
    print(f"\none answer, before and after\n  question: {example.question}")
    for name, part in (("before", before), ("after", after)):
        print(f"  {name:<8}: {part[example.id]['text'].strip()}   [{reward(part, example.id):.2f}]")
    print(f"\n{seconds / 60:.1f} minutes. In {run.folder}/: report.html, report.png, metrics.jsonl, samples.jsonl, config.json, "
          "checkpoint/ (loads with transformers)")  # fmt: skip


def evaluate_only(config: Config) -> int:
    """Greedy held-out answers of one model, or of two with a comma between: tables on stderr, one JSON line on stdout."""
    names = config.eval_only.split(",")
    if len(names) > 2:
        raise UserError(f"--eval_only {config.eval_only}: give one model, or two with a comma between")
    judge = make_judge(config)
    metrics, answers = zip(*(evaluate_one(config, name, judge) for name in names))
    line = metrics[0] if len(names) == 1 else {"before": metrics[0], "after": metrics[1], **rar.compare(*answers)}
    if len(names) == 2:
        low, high = line["difference_ci"]
        print(f"{names[1]} minus {names[0]}: {line['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} "
              f"({line['n']} prompts, paired bootstrap)", file=sys.stderr)  # fmt: skip
    print(json.dumps(finite(line)))
    return 0


def evaluate_one(config: Config, name: str, judge) -> tuple[dict, list[dict]]:
    """(metrics, a row an answer) of a model, or of the answers that an earlier evaluation saved. Saves and tells where."""
    if name.endswith(".jsonl"):
        saved = [row for _, row in rar.rows(name)]
        if not all(isinstance(row, dict) and {"id", "item", "score"} <= row.keys() for row in saved):
            raise UserError(f"{name}: not the answers of an evaluation; give the file that --eval_only named")
        return {"answers": name}, saved
    _, heldout = read_data(config)
    folder = Path(name, "checkpoint") if Path(name, "checkpoint").is_dir() else Path(name)
    policy = Policy(str(folder))
    heldout = fitting(heldout, policy, config, "held-out")
    metrics, groups = evaluate(policy, judge, heldout, config.max_new_tokens)
    out = Path(config.out or (folder.parent if folder.is_dir() else "runs"))
    file = out / "-".join(["eval", *re.findall(r"[\w.]+", name)[-3:], f"{Path(config.eval_data or config.data or 'heldout').stem}.jsonl"])
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rar.result_rows(groups)), encoding="utf8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); give --out") from None
    print(f"{name}\n{rar.eval_table(metrics)}\nanswers: {file}", file=sys.stderr)
    settings = {"model": name, "n": len(heldout), "judge": config.judge_model or config.judge, "max_new_tokens": config.max_new_tokens}
    return settings | {"answers": str(file)} | metrics, rar.result_rows(groups)


def keep_memory() -> None:
    """Tells glibc to keep freed memory. By default every large tensor is given back and faulted in anew, which cost an
    eighth of a step's time on two cores. Elsewhere than on Linux nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings, so that freed blocks can be used again
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def several_processes() -> None:
    """Joins the others when torchrun has started more than one of us; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if grpo.ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    keep_memory()
    several_processes()
    try:
        config, given = parse_config(sys.argv[1:] if argv is None else argv)
        if config.plot:
            status = plot(config.plot.split(","), config.out or "runs.png")
        else:
            status = evaluate_only(config) if config.eval_only else train(config, given)
    except (UserError, rar.DataError, NoOfflineRule, JudgeError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        status = 2
    if torch.distributed.is_initialized():
        if status == 0:
            torch.distributed.barrier()  # the first one may still be writing
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
