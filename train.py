"""Reinforcement learning from rubric rewards: the wiring. One command, from prompts with rubrics to a better model.

    data/*.jsonl -> Example -> grpo.sample -> Rollout x G -> method.score -> grpo.advantages -> grpo.update -> next step
                    (prompt,    (a group       (text, ids,    (judge: a        (nan = could      (loss, backward,
                     rubric)     a prompt)      log-probs)     verdict each)    not be scored)    optimiser)

    python train.py                                        # SmolLM2-135M on the built-in prompts, two CPU cores, ~10 minutes
    python train.py --method points --steps 20 --seed 1    # every field of Config, here and in the other files, is a flag
    python train.py --data FILE.jsonl --steps 3            # own prompts or HealthBench rows
    python train.py --eval_only RUN/checkpoint             # only the held-out score
    python train.py --resume RUN                           # go on where a run stopped

A run's folder holds config.json, metrics.jsonl (a line a step), samples.jsonl (a line a rollout, with every verdict),
report.png, report.html and checkpoint/ (loads with transformers). The sampling of step s is drawn from (seed, s) alone, so a
resumed run needs no saved random state and is the same run.

Reading order: Config, one_step (roll out, judge, learn: the whole idea in forty lines), loop, and then what surrounds them:
data, evaluation, the run's folder, the report, stopping and resuming. Several processes (torchrun) each roll out and judge
their share of the prompts and then compute the rest from the same values; only the first of them writes and speaks.
"""

import argparse
import ctypes
import difflib
import gc
import inspect
import json
import math
import os
import platform
import random
import re
import secrets
import shutil
import signal
import statistics
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Literal, get_args

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

import arlrr
import grpo
import rar
from judge import JudgeError, LLMJudge, NoOfflineRule, OfflineJudge, fill

try:
    import rler
except ModuleNotFoundError:  # who needs no evolving rubrics may delete that file: all but its own flags goes on working
    rler = None

HERE = Path(__file__).resolve().parent


@dataclass
class Config(grpo.Settings, arlrr.Settings, rler.Settings if rler else object):
    """Every setting of a run: the fields below and the Settings of grpo.py, rler.py and arlrr.py. Each is a flag of the command
    line, and the comment above it the flag's help."""

    # reward: explicit (RaR, Eq. 1), points (HealthBench: signed points over positive points), rler (evolving rubrics), arlrr
    # (one class of criteria at a time); with a model as judge also implicit, predefined, likert, reference_likert
    method: Literal[*rar.METHODS, *["rler"] * bool(rler), "arlrr"] = "explicit"
    # policy: smollm2 (embedded default), a folder, or a hub id
    model: str = "smollm2"
    # training prompts, in any format that rar.read_examples knows; default: data/train.jsonl
    data: str = ""
    # held-out prompts; default: data/heldout.jsonl, or a tenth of --data (at most 24 prompts)
    eval_data: str = ""
    # use only the first so many training prompts; 0 = all of --data, 20 of the built-in ones (each comes back five times)
    prompts: int = 0

    # who gives the verdicts: offline (lexical, see judge.py), or the base URL of an OpenAI-compatible server
    judge: str = "offline"
    # the model's name on that server; the key comes from the environment, JUDGE_API_KEY
    judge_model: str = ""
    # criteria in one call to the judge; 0 = all of a response's
    judge_k: int = 1
    # stop the run when a larger share of a step's verdicts is missing
    judge_max_missing: float = 0.1
    # answers of the model judge: cache and audit log, shared by runs
    judge_cache: str = "runs/judge_cache.jsonl"

    # updates of the policy
    steps: int = 25
    # prompts in a step
    prompts_per_step: int = 4
    # rollouts for each prompt (G)
    group_size: int = 8
    # of sampling and of scoring: a small model rambles at 1.0
    temperature: float = 0.7
    # who decodes the rollouts: torch (this process, any machine) or vllm (its engine in this process; for a GPU node)
    sampler: Literal["torch", "vllm"] = "torch"
    # GiB for the engine's keys and values; weights and trainer come on top
    vllm_memory: float = 4.0
    # 1: the engine gives its memory back while the policy trains (larger models; costs seconds a step)
    vllm_sleep: int = 0

    # learning rate of AdamW, after a linear warm-up over a tenth of the steps; 1e-6 to 5e-6 for models of 7B
    lr: float = 1e-4
    # token weights: dr_grpo (constant), grpo (sequence mean: at this lr answers shrink to a third), dapo (token mean)
    loss: Literal["grpo", "dr_grpo", "dapo"] = "dr_grpo"
    # (r - mean) / std of the group: std; r - mean: mean; r alone, no baseline: none
    advantage: Literal["std", "mean", "none"] = "std"
    # truncated importance sampling against the sampler's own probabilities: the cap on a token's weight, 0: off. Default (-1): 2
    # with --sampler vllm, whose kernels give other log-probs than the trainer's, and off with torch, where all would be 1
    tis_cap: float = -1.0
    # arithmetic of the layers: float32, bfloat16 (weights stay float32), auto = bfloat16 on a GPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    # of prompt order and sampling
    seed: int = 0
    # the run's folder; default: runs/<method>-seed<seed>-<time>
    out: str = ""
    # the folder of a run to go on with
    resume: str = ""
    # steps between held-out evaluations (there is always one before and one after)
    eval_every: int = 10
    # steps between checkpoints (there is always one at the end)
    save_every: int = 10
    # only evaluate: a run, a checkpoint, smollm2, or saved answers (.jsonl); two of them: their difference, paired
    eval_only: str = ""
    # only draw the curves of runs (their folders); the picture goes to --out, default runs.png
    plot: str = ""

    def __post_init__(self):
        if self.tis_cap < 0:
            self.tis_cap = 2.0 * (self.sampler == "vllm")


LIMITS = {  # what to give: (flags, what holds of a good value)
    "at least 1": ("steps prompts_per_step max_new_tokens eval_every save_every epochs minibatches pass_tokens rubrics_kept stage "
                   "trial validation", lambda v: v >= 1),
    "at least 2": ("group_size", lambda v: v >= 2),  # a group of one has no other answer to be better than
    "0 or more": ("prompts judge_k beta", lambda v: 0 <= v < math.inf),
    "a number above 0": ("temperature lr max_grad_norm", lambda v: 0 < v < math.inf),
    "a share from 0 to 1": ("audit form_share judge_max_missing", lambda v: 0 <= v <= 1),
}  # fmt: skip
# What may differ from the run that is resumed (a model as judge may have moved). Everything else would make one log out of two
# experiments.
RESUMABLE = {"steps", "eval_every", "save_every", "resume", "judge", "judge_cache"}


class UserError(Exception):
    """Something the user can put right: printed as one line, exit status 2."""


# ------------------------------------------------------------------------------------------- settings


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest right flag: a mistyped flag that passes costs a run of hours."""

    def error(self, message: str):
        """Raises UserError."""
        if message.startswith("unrecognized arguments:"):
            flag = message.split(":", 1)[1].split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            message = f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise UserError(message)


def field_notes() -> dict[str, str]:
    """Field of Config -> the comment above it, which is its help text."""
    source = "".join(inspect.getsource(part) for part in Config.__mro__[:-1])  # what it says itself comes first
    notes: dict[str, str] = {}
    for note, name in re.findall(r"((?:^    # .*\n)+)    (\w+):", source, re.M):
        notes.setdefault(name, " ".join(line.strip(" #") for line in note.splitlines()))
    return notes


def parse_config(argv: list[str]) -> tuple[Config, set[str]]:
    """Flags from the fields of Config: a Literal's values are the choices, any other type reads the text. Returns the config
    and the names that were given. Raises UserError."""
    plain = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the text at the top of this file
    parser = Parser(prog="train.py", usage="python train.py [--flag value ...]", description=__doc__, formatter_class=plain, allow_abbrev=False)
    found, notes = {f.name: f for f in fields(Config)}, field_notes()
    for name, note in notes.items():
        kind, default = found[name].type, found[name].default
        about = {"choices": get_args(kind)} if get_args(kind) else {"type": kind}
        about |= {"nargs": "+"} if name in ("plot", "eval_only") else {}
        about["help"] = (note + (f" [{default}]" if default != "" else "")).replace("%", "%%")
        # SUPPRESS keeps flags that were not given out of the result: a resumed run must know which ones were.
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **about)
    given = {k: ",".join(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    config = Config(**given)
    for wanted, (names, holds) in LIMITS.items():
        for name in names.split():
            if name in notes and not holds(value := getattr(config, name)):  # without rler.py its flags are not there
                raise UserError(f"--{name} {value}: give {wanted}")
    return config, set(given)


def resumed(config: Config, given: set[str], folder: Path) -> tuple[Config, dict | None]:
    """(settings of the run in `folder`, its checkpoint's state if it has one). Only what is in RESUMABLE may be given anew.
    Raises UserError."""
    if (folder / "checkpoint.old").exists() and not (folder / "checkpoint").exists():
        os.replace(folder / "checkpoint.old", folder / "checkpoint")  # killed between the two renames of Run.save
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: no run there; start one with --out {folder}")
    saved = json.loads((folder / "config.json").read_text(encoding="utf8"))
    fixed = given - RESUMABLE | given & ({"judge"} if "offline" in (saved.get("judge"), config.judge) else set())
    changed = sorted(name for name in fixed if saved.get(name) != getattr(config, name))
    if changed:
        said = ", ".join(f"--{name} {getattr(config, name)} (the run has {saved.get(name)})" for name in changed)
        raise UserError(f"--resume {folder}: would mix two experiments: {said}; leave them out or start a new run")
    known = {f.name for f in fields(Config)}  # a run of an earlier version may have had others
    config = Config(**{k: v for k, v in saved.items() if k in known} | {name: getattr(config, name) for name in given})
    path = folder / "checkpoint" / "trainer.pt"
    state = torch.load(path, weights_only=True) if path.exists() else None  # never a pickle that could run code
    if state and (other := {k: v for k, v in versions().items() if v != state.get("versions", {}).get(k, v)}):
        print(f"the checkpoint was made with other {', '.join(other)}: the run goes on, but not bit for bit as it would have")
    return config, state


def make_judge(config: Config):
    """The judge that the settings name. A judge of your own goes here: `ask` and `take_stats` are all that is asked of it."""
    if config.judge == "offline":
        return OfflineJudge()
    more = {"k": config.judge_k, "cache_path": config.judge_cache, "max_missing": config.judge_max_missing}
    return LLMJudge(config.judge, config.judge_model, **more)


def make_method(config: Config, judge):
    """The reward that the settings name. All methods have the interface of rar.RubricReward, and nothing below asks which one
    it holds. A reward of your own goes here."""
    if config.method == "rler":
        return rler.RLER(judge, config)
    return arlrr.ARLRR(judge, config) if config.method == "arlrr" else rar.RubricReward(judge, config.method)


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
    """Sets example.tokens and leaves out prompts that do not fit the model's context; says how many. Raises UserError.

    Cutting such a prompt would be worse: the rubric was written for the whole of it.
    """
    for example in examples:
        example.tokens = grpo.encode(policy.tokenizer, example.prompt)
    short = [e for e in examples if len(e.tokens) + config.max_new_tokens <= policy.context]
    limit = f"the model's context of {policy.context} tokens (with --max_new_tokens {config.max_new_tokens})"
    if not short:
        raise UserError(f"no {name} prompt fits {limit}; shorten them, or lower --max_new_tokens")
    if len(short) < len(examples):  # to stderr: the stdout of --eval_only is one line of JSON
        print(f"skipped {len(examples) - len(short)} of {len(examples)} {name} prompts: longer than {limit}", file=sys.stderr)
    return short


def batch(examples: list[rar.Example], config: Config, number: int) -> list[rar.Example]:
    """The prompts of a step: laps over all prompts, each lap in its own order. number: batches drawn from them before.

    A prompt stands twice in a batch where a lap ends inside it, or where there are fewer prompts than places. The order follows
    from (seed, lap) alone, so that a resumed run finds its place by arithmetic: no cursor to save.
    """
    chosen = []
    for position in range(number * config.prompts_per_step, (number + 1) * config.prompts_per_step):
        lap, place = divmod(position, len(examples))
        order = list(range(len(examples)))
        random.Random(f"{config.seed}-{lap}").shuffle(order)
        chosen.append(examples[order[place]])
    return chosen


# ------------------------------------------------------------------------------------------- the policy


class Policy:
    """Model, tokenizer and what sampling needs to know about them. Of several processes each holds a whole one."""

    def __init__(self, name: str, dtype: str = "auto"):
        """name: smollm2, a folder, or a hub id. Raises UserError."""
        try:
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
            self.model, self.tokenizer = grpo.load_policy(name, self.device, None if dtype == "auto" else dtype == "bfloat16")
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{name}: cannot be loaded as a model ({why}); give smollm2, a folder or a hub id") from None
        self.ends = grpo.end_tokens(self.model, self.tokenizer)
        self.context = getattr(self.model.config, "max_position_embeddings", None) or 10**9  # some models have no limit
        self.engine = None  # vLLM, where the flags ask for it

    def start_engine(self, config: Config, examples: list) -> None:
        """vLLM beside the policy, with room for the longest of these prompts (a longer context would take memory from the
        trainer). Started after the data are known, and never for --eval_only. Raises UserError without vLLM."""
        context = max(len(e.tokens) for e in examples) + config.max_new_tokens
        folder, bf16 = self.model.config._name_or_path, self.model.bfloat16_layers
        try:
            self.engine = grpo.VLLMSampler(folder, context, bf16, config.vllm_memory, bool(config.vllm_sleep))
        except ImportError as error:
            raise UserError(f"--sampler vllm: vLLM cannot be imported ({error}); pip install vllm==0.32.0") from None
        except (ValueError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            raise UserError(f"--sampler vllm: {why}; free memory on the card, or lower --vllm_memory") from None

    def sync(self) -> None:
        """The weights into the engine, if there is one."""
        if self.engine:
            self.engine.sync(self.model)

    def rollouts(self, examples: list, group_size: int, max_new_tokens: int, temperature: float, seed: int, name: str):
        """(example, its group of rollouts with their text) for each example, sampled together; of several processes the
        one of rank r takes every world-th example from the r-th on.

        The bar counts tokens, as if every row went to the length limit. The text is without special tokens, as a judge should
        read it; the loss sees the ids, the end token among them.
        """
        share = rank, world = grpo.ranks()
        mine = examples[rank::world]
        with tqdm(total=len(mine) * group_size * max_new_tokens, desc=name, unit="tok", leave=False, disable=None) as bar:
            prompts = [e.tokens for e in examples]
            decode = self.engine.sample if self.engine else partial(grpo.sample, self.model)
            groups = decode(prompts, group_size, max_new_tokens, temperature, self.ends, seed, bar.update, share)
        for rollout in (rollout for group in groups for rollout in group):
            rollout.text = self.tokenizer.decode(rollout.ids, skip_special_tokens=True)
        return list(zip(mine, groups))


def gathered(value) -> list:
    """The value of each process, in the order of their ranks; of a single process [value].

    It is a meeting point as well: nobody leaves before all have come. Where one process has ended with an error, torchrun ends
    the others, which would wait here.
    """
    everyone = [value] * grpo.ranks()[1]
    if len(everyone) > 1:
        torch.distributed.all_gather_object(everyone, value)
    return everyone


def evaluate(policy: Policy, judge, examples: list[rar.Example], max_new_tokens: int) -> tuple[dict, list]:
    """Greedy answers to the held-out prompts, scored by rar.evaluate. Returns (metrics, groups of one rollout)."""
    # As many prompts at once as keep keys and values small, padding counted. Greedy, so the same weights score the same each
    # time and two checkpoints differ by their weights alone.
    parts = grpo.packed(examples, lambda part: len(part) * (max(len(e.tokens) for e in part) + max_new_tokens) <= 8192)
    groups = [group for part in parts for group in policy.rollouts(part, 1, max_new_tokens, 0.0, 0, "held-out")]
    place = {e.id: number for number, e in enumerate(examples)}
    groups = sorted((group for part in gathered(groups) for group in part), key=lambda group: place[group[0].id])
    # One process asks the judge; all get its answer, because the search of arlrr.py decides by it and all must decide alike.
    return gathered((rar.evaluate(judge, groups), groups) if grpo.ranks()[0] == 0 else None)[0]


# ------------------------------------------------------------------------------------------- one step


@dataclass
class Session:
    """What a run holds in memory. It trains on `examples`; heldout it only looks at, and validation is for arlrr's search."""

    config: Config
    policy: Policy
    reference: torch.nn.Module | None  # the frozen starting model, for the KL; None: not measured
    optimizer: torch.optim.Optimizer
    method: object
    examples: list[rar.Example]
    heldout: list[rar.Example]
    validation: list[rar.Example]


def one_step(session: Session, examples: list[rar.Example], step: int) -> tuple[dict, list]:
    """Roll out, judge, learn. step: updates before this one (the log counts from 1). Returns the step's metrics and its groups:
    (example, G rollouts) each.

    On-policy: every batch is rolled out by the policy that learns from it, and then thrown away. With more than one epoch or
    minibatch the later updates are a little off-policy, which is what the clip is for.
    """
    config, policy, method = session.config, session.policy, session.method
    clock = [time.perf_counter()]
    # 1. Roll out. The random numbers follow from (seed, step) alone: a resumed run draws what the first would have drawn.
    seed = random.Random(f"{config.seed}-{step}").getrandbits(62)
    groups = policy.rollouts(examples, config.group_size, config.max_new_tokens, config.temperature, seed, "rollouts")
    clock.append(time.perf_counter())
    # 2. Judge: verdicts and one reward a rollout. All groups go out in one batch: the calls to a model judge, a thousand and
    # more in a step, then wait for nothing but each other's slowest.
    method.score(groups, progress=True)
    groups = exchanged(groups, method)
    clock.append(time.perf_counter())
    # 3. Learn: better or worse than the other answers to the same prompt? A method may normalise for itself (gdpo, which
    # needs the rewards of each class before they are added up).
    rewards = torch.tensor([[r.reward for r in rollouts] for _, rollouts in groups])  # [P, G]
    own = getattr(method, "own_advantages", False)
    advantages = method.advantages(groups) if own else grpo.advantages(rewards, config.advantage).tolist()
    for (_, rollouts), row in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(rollouts, row):
            rollout.advantage = advantage
    learned = learn(session, [rollouts for _, rollouts in groups], step)
    clock.append(time.perf_counter())
    seconds = {f"seconds_{name}": b - a for name, a, b in zip(("rollout", "judge", "train"), clock, clock[1:])}
    rollouts = [r for _, group in groups for r in group]
    verdicts = [v.score for r in rollouts for v in r.verdicts]
    known = [[r for r in group if not math.isnan(r.reward)] for _, group in groups]  # nan: could not be scored
    tokens = sum(len(r.ids) for r in rollouts)
    return {
        "step": step + 1,
        # Of what was scored: a nan counts in none of the means, and judge_missing says how much that is.
        "reward": rar.mean(r.reward for r in rollouts),
        "reward_std": rar.mean(statistics.pstdev(r.reward for r in group) for group in known if group),
        "judge_missing": verdicts.count(None) / len(verdicts),
        "completion_tokens": tokens / len(rollouts),
        "truncated": rar.mean(float(r.finish == "length") for r in rollouts),
        # Within the groups; high values mean that length is being paid for.
        "length_reward_corr": rar.mean(rar.correlation([float(len(r.ids)) for r in g], [r.reward for r in g]) for g in known),
        **learned,
        **seconds,
        "tokens_per_second": tokens / seconds["seconds_rollout"],
        "rollouts": len(rollouts),
        "verdicts": len(verdicts),
        "tokens": tokens,
    }, groups


def learn(session: Session, groups: list[list], step: int) -> dict:
    """Moves the policy by the advantages of these rollouts. Returns grpo.update's metrics, the KL among them."""
    config, policy, reference = session.config, session.policy, session.reference
    # Warm-up over a tenth of the steps: Adam's first steps divide by moments estimated from one gradient. It follows from
    # step and --steps, so that there is no scheduler to save; a run resumed with many more steps has a longer warm-up.
    for options in session.optimizer.param_groups:
        options["lr"] = config.lr * min(1.0, (step + 1) / max(1, round(config.steps * 0.1)))
    if policy.engine:
        policy.engine.sleep()  # where --vllm_sleep asks for it; policy.sync below wakes it up with the new weights
    with tqdm(total=sum(map(len, groups)), desc="train", unit="row", leave=False, disable=None) as bar:
        learned = grpo.update(policy.model, session.optimizer, groups, config, reference, bar.update)
    if learned["kl"] is None and reference:  # beta is 0: the loss did not need it, but it shows how far the policy has gone
        learned["kl"] = grpo.measure_kl(reference, groups, config.temperature)
    policy.sync()
    return learned


def exchanged(groups: list, method) -> list:
    """Several processes: the groups that all of them rolled out and judged, in the batch's order, and what the method noted
    about them. Everything after this is computed by each process from the same values, advantages and buffers of rubrics
    included: they cannot drift apart, and nothing else has to be sent around but gradients."""
    everyone = gathered((groups, {name: getattr(method, name) for name in method.of_step}))
    world = len(everyone)
    for name in method.of_step:
        joined, *others = (noted[name] for _, noted in everyone)
        for other in others:
            joined = joined | other if type(joined) is dict else joined + other
        setattr(method, name, joined)
    return [everyone[place % world][0][place // world] for place in range(sum(len(part) for part, _ in everyone))]


def next_step(session: Session, step: int) -> tuple[dict, list]:
    """The update of this step, on the prompts that the method wants (arlrr: those that have the class whose turn it is)."""
    pool, visit = session.method.pool(session.examples, step)
    return one_step(session, batch(pool, session.config, visit), step)


def lab_of(session: Session) -> arlrr.Lab:
    """What a schedule of arlrr.py may try out between two steps: the run's own update, so that a trial is what the stage would be,
    and its own way of answering the prompts that were kept back for this."""
    trial = session if session.config.beta else replace(session, reference=None)  # a trial measures no KL
    update = lambda step: next_step(trial, step)[0]
    validate = lambda: evaluate(session.policy, session.method.judge, session.validation, session.config.max_new_tokens)[1]
    return arlrr.Lab(session.policy.model, session.optimizer, update, validate, session.policy.sync)


# ------------------------------------------------------------------------------------------- the loop


def train(config: Config, given: set[str]) -> int:
    """A whole run, new or resumed. Returns the exit status: 0, or 128 + the signal that stopped it, as shells have it."""
    folder = Path(config.resume or config.out or f"runs/{config.method}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not config.resume and any((folder / name).exists() for name in ("config.json", "metrics.jsonl")):
        raise UserError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
    config, state = resumed(config, given, folder) if config.resume else (config, None)
    started = time.time()
    torch.manual_seed(config.seed)
    session = begin(config, folder, state)
    run, step = Run(folder, config, session.examples + session.heldout), state["step"] if state else 0
    if config.resume:
        run.truncate(step if state else -1)  # killed before the first checkpoint: the run begins again
    announce(session, folder)
    stop = Stop()
    try:
        with stop:
            loop(run, session, step, stop)
    except KeyboardInterrupt:  # asked twice: the step under way is lost, the last checkpoint is not
        stop.asked = stop.asked or signal.SIGINT
    if stop.asked:
        print(f"\nstopped; go on with: python train.py --resume {folder}")
        return 128 + stop.asked
    if run.writes:
        summary(run, session.heldout, time.time() - started)
    return 0


def begin(config: Config, folder: Path, state: dict | None) -> Session:
    """Data, judge, method, policy and optimiser, new or as the checkpoint in `folder` left them. Raises UserError."""
    # In the order of what it costs to be wrong: data and flags first, the model after them.
    examples, heldout = read_data(config)
    method = make_method(config, make_judge(config))  # a method that the judge cannot serve should cost no half minute
    policy = Policy(str(folder / "checkpoint") if state else config.model, config.dtype)
    examples, heldout = fitting(examples, policy, config, "training"), fitting(heldout, policy, config, "held-out")
    validation = []
    if config.method == "arlrr":  # for every schedule, so that all of them train on the same prompts
        arlrr.check_classes(examples, config.classes)
        if len(examples) <= config.validation:
            raise UserError(f"--validation {config.validation}: only {len(examples)} training prompts; keep fewer back, at least one "
                            "must be left")  # fmt: skip
        examples, validation = examples[: -config.validation], examples[-config.validation :]
    # Few prompts that come back often show learning in ten minutes; a data set of one's own is used whole.
    examples = [e for e in examples[: config.prompts or (len(examples) if config.data else 20)] if method.eligible(e)]
    if not examples:
        raise UserError(f"--method {config.method} can learn from none of the training prompts (reference_likert needs references)")
    # Second moments that forget in about 20 steps (0.95, not 0.999): a run has tens to hundreds of steps. No weight decay: it
    # would pull the policy away from where it started, whatever the reward says.
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # The reference is always the model that the run began with, also when the policy comes from a checkpoint.
    reference = Policy(config.model, config.dtype).model.requires_grad_(False) if state else grpo.freeze(policy.model)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
    if config.sampler == "vllm":
        policy.start_engine(config, examples + heldout + validation)
    return Session(config, policy, reference, optimizer, method, examples, heldout, validation)


def announce(session: Session, folder: Path) -> None:
    """What is about to happen, and what it will ask of the judge: who pays for calls wants to know before the first."""
    config, examples = session.config, session.examples
    print(f"{len(examples)} training and {len(session.heldout)} held-out prompts, {config.steps} steps of "
          f"{config.prompts_per_step} x {config.group_size} rollouts, into {folder}/")  # fmt: skip
    if config.judge != "offline":
        a_rollout = rar.mean(float(math.ceil(len(e.rubric) / (config.judge_k or 10**9))) for e in examples)
        calls = config.prompts_per_step * config.group_size * a_rollout
        print(f"judge {config.judge_model}: up to {calls:.0f} calls a step for the rollouts, {calls * config.steps:.0f} in all, less "
              "what repeats; evaluations, a search's trials and the writing of criteria come on top")  # fmt: skip
    elif config.data:
        print("The offline judge is a stand-in: it compares words and counts form, it does not understand. "
              "Read its scores as a smoke test.")  # fmt: skip


def loop(run: "Run", session: Session, step: int, stop: "Stop") -> None:
    """Steps, evaluations, logs and checkpoints until config.steps.

    There is an evaluation before the first step: without it nobody could tell what was learnt from what was there.
    """
    config, method, lab = session.config, session.method, lab_of(session)
    look = partial(evaluate, session.policy, method.judge, session.heldout, config.max_new_tokens)
    if step == 0:
        metrics, groups = look()
        run.append("metrics.jsonl", [{"step": 0} | metrics | method.judge.take_stats()])
        run.samples(0, "heldout", groups)
        print(f"held-out score before training: {metrics['eval_score']:.3f}  ({interval(*metrics['eval_ci'])})")
        score = metrics["eval_score"]
    else:
        rows = list(run.rows("metrics.jsonl"))
        score = [math.nan, *(row["eval_score"] for row in rows if row.get("eval_score") is not None)][-1]
        if step >= config.steps and "eval_score" not in rows[-1]:
            raise UserError(f"--steps {config.steps}: the run is at step {step} already, and was not evaluated there; give more")
    with tqdm(total=config.steps, initial=step, desc="steps", unit="step", disable=None) as bar:
        ending = False
        while step < config.steps and not ending:
            with one_line_errors(run, session, step):
                chosen = method.before_step(session.examples, lab.at(step))
                metrics, groups = next_step(session, step)
            # The log comes before the checkpoint: resuming cuts the log back to the checkpoint's step, but cannot write lines
            # that are missing. So what fails below (the disk, the judge of the held-out answers) costs steps, not the run.
            ending = stop.agree()  # asked once a step: a signal from here on is for the next one, so that no step goes unsaved
            metrics |= chosen | method.after_step(groups)
            step += 1
            run.samples(step, "train", groups)
            if step % config.eval_every == 0 or step == config.steps:
                evaluated, answers = look()
                run.samples(step, "heldout", answers)
                metrics |= evaluated
                score = metrics["eval_score"]
            run.append("metrics.jsonl", [metrics | method.judge.take_stats()])  # of search, step and evaluation
            if step % config.save_every == 0 or step == config.steps or ending:
                run.save(session, step)
            if "eval_score" in metrics:
                report(run)
            seconds = "+".join(f"{metrics[f'seconds_{part}']:.0f}" for part in ("rollout", "judge", "train"))
            note = {"reward": f"{metrics['reward']:.3f}", "held-out": f"{score:.3f}", "seconds": seconds}
            bar.set_postfix(note)
            bar.update()
            if bar.disable:
                print(f"step {step}/{config.steps}  " + "  ".join(f"{k} {v}" for k, v in note.items()), flush=True)


@contextmanager
def one_line_errors(run: "Run", session: Session, step: int):
    """What can break a step, said in one line with what to do. The policy is kept as it is: as after the last good step, or with
    several epochs or minibatches after the last good one of them."""
    try:
        yield
    except (JudgeError, FloatingPointError) as error:
        if step:
            run.save(session, step)
        raise type(error)(f"step {step + 1}: {error}; when that is put right: python train.py --resume {run.folder}") from None
    except torch.OutOfMemoryError:  # perhaps in the middle of an update, so nothing is saved
        raise UserError(f"step {step + 1}: the GPU's memory is full; try --checkpointing 1, --vllm_sleep 1, fewer "
                        "--prompts_per_step or --max_new_tokens in a new run") from None  # fmt: skip


class Stop:
    """While it is open, Ctrl-C and SIGTERM are noted: the loop ends after the step. The second one ends the step as well.

    Clusters send SIGTERM some minutes before they take a machine back, which is time enough for a step and a checkpoint.
    """

    asked = 0  # the signal's number

    def __enter__(self):
        # In other threads Python takes no handlers.
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self.note) for number in signals}
        return self

    def note(self, number: int, frame) -> None:
        """The handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        print("\nstopping after this step; once more to stop now", file=sys.stderr, flush=True)

    def agree(self) -> bool:
        """Whether this step is the last one. Of several processes all stop after the same step, when one of them was asked."""
        asked = max(gathered(int(self.asked)))
        self.asked = max(self.asked, asked)
        return asked > 0

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- the run's folder


@contextmanager
def writing(path: Path, advice: str):
    """What cannot be written ends the run in one line; what was there before is still there. Raises UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own word for a full disk
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({why}); {advice}") from None


def put(path: Path, text: str) -> None:
    """A whole file, written to one side and renamed: a kill leaves the old one or the new one."""
    side = path.with_name(path.name + ".tmp")
    side.write_text(text, encoding="utf8")
    os.replace(side, path)


def jsonl(rows: list[dict]) -> str:
    """Lines of JSON; nan becomes null, which every JSON reader knows."""
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)


class Run:
    """Files of a run: config, metrics, samples, checkpoint.

    Logs are opened, appended to and closed for each step: `tail -f` shows whole lines, and a kill costs at most the last.
    """

    def __init__(self, folder: Path, config: Config, examples: list[rar.Example] = ()):
        """Makes the folder and its config.json. Raises UserError."""
        self.folder, self.config = folder, config
        self.prompts = {e.id: e.prompt for e in examples}  # for the report: samples.jsonl holds only their ids
        self.shown = {"train": {}, "heldout": {}}  # step -> lines of samples.jsonl, of the first and the last step
        self.advice = f"make room there, then go on with --resume {folder}"
        self.writes = grpo.ranks()[0] == 0  # of several processes the first one
        if self.writes:
            with writing(folder, "choose another --out"):
                folder.mkdir(parents=True, exist_ok=True)
                put(folder / "config.json", json.dumps(asdict(config), indent=1, ensure_ascii=False) + "\n")

    def append(self, name: str, rows: list[dict]) -> None:
        """Adds lines to a log. Raises UserError."""
        if self.writes:
            with writing(self.folder / name, self.advice), open(self.folder / name, "a", encoding="utf8") as file:
                file.write(jsonl(rows))

    def rows(self, name: str):
        """The lines of a log so far, one at a time."""
        return (row for _, row in rar.rows(self.folder / name)) if (self.folder / name).exists() else iter(())

    def samples(self, step: int, split: str, groups: list) -> None:
        """One line a rollout: what was said, what the judge found, what it was worth."""
        rows = []
        for example, rollout in ((example, r) for example, group in groups for r in group):
            found = zip(rollout.criteria, rollout.verdicts)
            verdicts = [{"title": c.title or c.text[:60], "weight": c.weight, **v._asdict()} for c, v in found]
            row = {"step": step, "split": split, "id": example.id, "text": rollout.text, "finish": rollout.finish}
            row |= {"tokens": len(rollout.ids), "verdicts": verdicts, "reward": rollout.reward, "advantage": rollout.advantage}
            rows.append(finite(row))
        self.append("samples.jsonl", rows)
        for row in rows:
            self.show(row)

    def show(self, row: dict) -> None:
        """Remembers a line for the report and the summary, which would have to read a long run's rollouts again each time.

        Of each split the first step and the last one so far: what is shown side by side, and memory that does not grow.
        """
        kept = self.shown[row["split"]]
        if len(kept) == 2 and row["step"] not in kept:
            kept.pop(max(kept))
        kept.setdefault(row["step"], []).append(row)

    def save(self, session: Session, step: int) -> None:
        """checkpoint/: written to one side, then renamed, so that a kill leaves the old one or the new one. Raises UserError."""
        if not self.writes:
            return
        side, final, old = (self.folder / name for name in ("checkpoint.tmp", "checkpoint", "checkpoint.old"))
        state = {"step": step, "versions": versions(), "optimizer": session.optimizer.state_dict(), "method": session.method.state_dict()}
        shutil.rmtree(side, ignore_errors=True)
        if final.exists():  # else the old one is all there is: a run killed between the two renames
            shutil.rmtree(old, ignore_errors=True)
        try:
            with writing(self.folder / "checkpoint", self.advice):
                session.policy.model.save_pretrained(side)
                session.policy.tokenizer.save_pretrained(side)
                torch.save(state, side / "trainer.pt")
                if final.exists():
                    os.replace(final, old)
                os.replace(side, final)
        finally:  # also what a full disk has left half done: its room is needed
            shutil.rmtree(side, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    def truncate(self, step: int) -> None:
        """Drops lines after `step` and a last line cut off by a kill: a resumed run writes them again, and because it draws the
        same random numbers they will be the same lines."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if self.writes and path.exists():
                kept = [line for line in path.read_text(encoding="utf8").split("\n") if step_of(line) <= step]
                put(path, "".join(line + "\n" for line in kept))
        gathered(None)  # the others wait: they read what the first one has just rewritten
        for row in self.rows("samples.jsonl"):
            self.show(row)


def step_of(line: str) -> float:
    """The step that a line of a log tells of; infinity for a line that was cut off.

    >>> step_of('{"step": 3}'), step_of('{"step": 3, "rew'), step_of("")
    (3, inf, inf)
    """
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def versions() -> dict[str, str]:
    """What a resumed run must share to be the same run, bit for bit. The number of threads belongs to it: it decides in which
    order partial sums are added."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__,
            "threads": str(torch.get_num_threads()), "device": device}  # fmt: skip


def finite(value):
    """The same value with nan and infinity replaced by None (JSON knows neither), and six decimals, at any depth.

    >>> finite({"reward": math.nan, "scores": [1 / 3, 2]})
    {'reward': None, 'scores': [0.333333, 2]}
    """
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------------- pictures

# What is worth a look in every run: is it learning, does it carry over, at what length, how far from where it started?
PANELS = {
    "reward": "training reward, mean of a step",
    "eval_score": "held-out score (points met / positive points)",
    "completion_tokens": "tokens of a completion",
    "kl": "KL to the starting model, a token",
}


def draw(runs: dict[str, list[list[dict]]], title: str, path: Path) -> None:
    """A panel a metric, a line a name. runs: name -> metrics.jsonl of its seeds. Dots: the mean over seeds at a step; line: its
    mean over five steps (not of the held-out score, which has few); band: see `band`."""
    from matplotlib.figure import Figure  # not pyplot: runs happen on machines without a screen

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for (key, name), axis in zip(PANELS.items(), figure.subplots(2, 2).flat):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        for label, seeds in runs.items():
            found: dict[int, list[dict]] = {}
            for row in (row for rows in seeds for row in rows if row.get(key) is not None):
                found.setdefault(row["step"], []).append(row)
            steps, window = sorted(found), 1 if key == "eval_score" else 5
            values = [statistics.fmean(row[key] for row in found[step]) for step in steps]
            smooth = [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
            [drawn] = axis.plot(steps, smooth, label=label)
            axis.plot(steps, values, ".", color=drawn.get_color(), alpha=0.5)
            low, high = zip(*(band(found[step], key) for step in steps)) if steps else ((), ())
            axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.13)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    del figure, axis, drawn
    gc.collect()  # a figure is a knot of references; uncollected, each holds four megabytes


def band(rows: list[dict], key: str) -> tuple[float, float]:
    """Lower and upper edge at one step, from a row a seed: mean and standard deviation over seeds. Of a single seed the reward's
    std within groups, and the 95 % interval of the held-out score."""
    middle, width = statistics.fmean(row[key] for row in rows), statistics.pstdev(row[key] for row in rows)
    if len(rows) == 1 and key == "reward":
        width = rows[0].get("reward_std") or 0.0
    if len(rows) == 1 and key == "eval_score" and None not in rows[0]["eval_ci"]:  # one held-out prompt has no interval
        return tuple(rows[0]["eval_ci"])
    return middle - width, middle + width


def report(run: Run) -> None:
    """report.png: the curves, from metrics.jsonl alone. report.html: data/report.html with the run's record in it: the curves,
    and the rollouts of the first and the last step and evaluation."""
    if not run.writes:
        return
    c, rows, usual = run.config, list(run.rows("metrics.jsonl")), asdict(Config())
    draw({c.method: [rows]}, f"{c.model}, {c.method}, seed {c.seed}, judge {c.judge}", run.folder / "report.png")
    names = {"train": "Rollouts of training step", "heldout": "Held-out answers at step"}
    record = {
        "title": f"{c.method}, seed {c.seed}: {run.folder.name}", "panels": PANELS, "metrics": rows, "prompts": run.prompts,
        "settings": ", ".join(f"{k} {v}" for k, v in asdict(c).items() if v != usual[k]),
        "rollouts": [(f"{names[split]} {step}", found) for split, kept in run.shown.items() for step, found in kept.items()],
    }  # fmt: skip
    page = (HERE / "data" / "report.html").read_text(encoding="utf8")
    # With "<" escaped no text of a model can end the block of JSON it stands in; and the page's policy lets only the script
    # run that carries this number, which no model can have foreseen.
    page = fill(page, record=json.dumps(record).replace("<", "\\u003c"), nonce=secrets.token_hex())
    put(run.folder / "report.html", page)


def plot(folders: list[str], out: str) -> int:
    """--plot: the curves of several runs in one picture; runs that differ in the seed alone are one line with a band."""
    configs = {}
    for folder in folders:
        if not (file := Path(folder, "config.json")).is_file():
            raise UserError(f"--plot {folder}: no run there; give folders of runs")
        configs[folder] = json.loads(file.read_text(encoding="utf8"))
    settings = [f.name for f in fields(Config) if f.name not in ("seed", "out", "resume", "plot")]
    differing = [k for k in settings if len({str(c.get(k)) for c in configs.values()}) > 1]
    runs: dict[str, list[list[dict]]] = {}
    for folder, c in configs.items():
        name = ", ".join(f"{k} {c[k]}" for k in differing if c.get(k, "") != "") or c.get("method", folder)
        runs.setdefault(name, []).append([row for _, row in rar.rows(Path(folder, "metrics.jsonl"))])
    draw({f"{name} ({len(seeds)})": seeds for name, seeds in runs.items()}, "number of seeds in brackets", Path(out))
    print(f"{len(folders)} runs: {out}")
    return 0


# ------------------------------------------------------------------------------------------- what a run says at its end


def interval(low: float, high: float, sign: str = "") -> str:
    """A 95 % interval in words; of a single prompt there is none: resampling one value gives that value."""
    return "one prompt: no interval" if math.isnan(low) else f"95 % interval {low:{sign}.3f} to {high:{sign}.3f}"


def summary(run: Run, heldout: list[rar.Example], seconds: float) -> None:
    """Before and after on the held-out prompts: score with interval, criteria that changed most, one answer, the files.

    The interval is of the gain, prompt by prompt (paired): prompts differ far more among themselves than one does before and
    after, so the intervals of the two scores overlap even where the gain is certain. The answer shown is the one that gained
    most: an illustration, no evidence.
    """
    before, after = ({row["id"]: row for row in rows} for _, rows in sorted(run.shown["heldout"].items()))
    old, new = ({i: math.nan if row["reward"] is None else row["reward"] for i, row in part.items()} for part in (before, after))
    gains = {i: new[i] - old[i] for i in old}
    print(f"\nheld-out score  {rar.mean(old.values()):.3f} -> {rar.mean(new.values()):.3f}   gain {rar.mean(gains.values()):+.3f}, "
          f"{interval(*rar.bootstrap(list(gains.values())), '+')} ({len(gains)} prompts, paired bootstrap)")  # fmt: skip
    rewards = [row["reward"] for row in run.rows("metrics.jsonl") if row.get("reward") is not None]
    if len(rewards) >= 10:
        first, final = statistics.fmean(rewards[:5]), statistics.fmean(rewards[-5:])
        print(f"training reward {first:.3f} -> {final:.3f}   (mean of the first and of the last five steps)")
    if changed := rar.changed_criteria(heldout, before, after)[:5]:
        print("\ncriteria that changed most (share of held-out answers that are right in this respect):")
    for title, a, b, n in changed:
        print(f"  {title:<22} {a:4.0%} -> {b:4.0%}   ({n} prompts)")
    example = max(heldout, key=lambda e: -math.inf if math.isnan(gains[e.id]) else gains[e.id])
    print(f"\none answer, before and after\n  question: {example.question}")
    for name, part, score in (("before", before, old), ("after", after, new)):
        print(f"  {name:<8}: {part[example.id]['text'].strip()}   [{score[example.id]:.2f}]")
    print(f"\n{seconds / 60:.1f} minutes. In {run.folder}/: report.html, report.png, metrics.jsonl, samples.jsonl, config.json, "
          "checkpoint/ (loads with transformers)")  # fmt: skip


def evaluate_only(config: Config) -> int:
    """Greedy held-out answers of one model, or of two: tables on stderr, one JSON line on stdout."""
    names = config.eval_only.split(",")
    if len(names) > 2:
        raise UserError(f"--eval_only {config.eval_only}: give one model, or two")
    judge = make_judge(config)
    metrics, answers = zip(*(evaluate_one(config, name, judge) for name in names))
    line = metrics[0]
    if len(names) == 2:
        line = {"before": metrics[0], "after": metrics[1], **rar.compare(*answers)}
        print(f"{names[1]} minus {names[0]}: {line['difference']:+.3f}, {interval(*line['difference_ci'], '+')} "
              f"({line['n']} prompts, paired bootstrap)", file=sys.stderr)  # fmt: skip
    print(json.dumps(finite(line)))
    return 0


def evaluate_one(config: Config, name: str, judge) -> tuple[dict, list[dict]]:
    """(metrics, a row an answer) of a model, or of the answers that an earlier evaluation saved. Saves and tells where.

    stdout is for the one line of JSON that a script may want to read, so what a person reads goes to stderr.
    """
    if name.endswith(".jsonl"):
        saved = [row for _, row in rar.rows(name)]
        if not all(isinstance(row, dict) and {"id", "item", "score"} <= row.keys() for row in saved):
            raise UserError(f"{name}: not the answers of an evaluation; give the file that --eval_only named")
        return {"answers": name}, saved
    _, heldout = read_data(config)
    folder = Path(name, "checkpoint") if Path(name, "checkpoint").is_dir() else Path(name)
    if Path(folder, "metrics.jsonl").exists():
        raise UserError(f"{name}: a run without a checkpoint yet; go on with --resume {name}")
    policy = Policy(str(folder), config.dtype)
    heldout = fitting(heldout, policy, config, "held-out")
    metrics, groups = evaluate(policy, judge, heldout, config.max_new_tokens)
    answers = rar.result_rows(groups)
    out = Path(config.out or (folder.parent if folder.is_dir() else "runs"))
    file = out / "-".join(["eval", *re.findall(r"[\w.]+", name)[-3:], f"{Path(config.eval_data or config.data or 'heldout').stem}.jsonl"])
    if grpo.ranks()[0] == 0:
        with writing(file, "give --out"):
            out.mkdir(parents=True, exist_ok=True)
            put(file, jsonl(answers))
        asked = config.eval_data or config.data or "data/heldout.jsonl"
        print(f"{name} on {asked}\n{rar.eval_table(metrics)}\nanswers: {file}", file=sys.stderr)
    how = {"model": name, "n": len(heldout), "judge": config.judge_model or config.judge, "max_new_tokens": config.max_new_tokens}
    return how | {"answers": str(file)} | metrics, answers


# ------------------------------------------------------------------------------------------- the process


def keep_memory() -> None:
    """Tells glibc to keep freed memory. By default every large tensor is given back and faulted in anew, which cost an
    eighth of a step's time on two cores. Elsewhere than on Linux nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings, so that freed blocks can be used again
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def several_processes() -> None:
    """Joins the others when torchrun has started more than one of us; all but the first are silent.

    nccl talks between GPUs, gloo between CPUs (which is how it is tested). Each process holds the whole policy; only
    gradients, groups and verdicts travel (grpo.add_over_ranks, exchanged).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if grpo.ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 with one line that says what is wrong, where, and what to do; 128 + the signal that stopped the run."""
    keep_memory()
    several_processes()
    try:
        config, given = parse_config(sys.argv[1:] if argv is None else argv)
        if config.plot:
            status = plot(config.plot.split(","), config.out or "runs.png")
        else:
            status = evaluate_only(config) if config.eval_only else train(config, given)
    except (UserError, rar.DataError, NoOfflineRule, JudgeError, FloatingPointError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        status = 2
    if torch.distributed.is_initialized():
        if status == 0:
            gathered(None)  # the first one may still be writing
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
