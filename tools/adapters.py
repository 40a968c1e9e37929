"""Rubric rewards in other people's trainers: TRL's GRPOTrainer and verl.

    import sys
    sys.path.insert(0, "REPOSITORY")          # the folder that holds rar.py
    from types import SimpleNamespace
    from judge import LLMJudge
    from rar import RubricReward, read_examples
    from tools.adapters import as_trl_reward, as_verl_reward, trl_rows

    judge = LLMJudge(url, model, max_missing=1.0)
    method = RubricReward(judge, SimpleNamespace(method="explicit", advantage="std"))
    examples = read_examples("data/train.jsonl")
    heldout = read_examples("data/heldout.jsonl")

    # TRL: a reward function; the data sets have the columns "prompt" and "id".
    GRPOTrainer(
        model,
        reward_funcs=[as_trl_reward(method, examples, heldout)],
        train_dataset=Dataset.from_list(trl_rows(examples)),
        eval_dataset=Dataset.from_list(trl_rows(heldout)),
    )

    # verl: a file my_reward.py that defines this, and
    # reward.custom_reward_function.path=my_reward.py on verl's command line.
    compute_score = as_verl_reward(method, examples, heldout)

What a trainer hands over decides which methods it can run:

    as_trl_reward           batches                  all but gdpo; rler in one process
    as_verl_batch_reward    batches (older verl)     all but gdpo; rler in one process
    as_verl_reward          one rollout at a time    the designs of rar.py, and axis_mean
                            (verl's reward loop)

1. An alternating method takes turns by cyclic or random there: nothing can be tried out. The
   trainer's checkpoint does not hold what a method remembers: save method.state_dict() with it.
2. Rows of held-out examples are told by their ids and scored as in train.py: by their own rubric
   and HealthBench's points. No class has its turn there, no rubric evolves on them.
3. What could not be scored (a failed verdict; a prompt whose class has no turn) is None for TRL,
   which leaves it out of its group; added to the rewards of other functions it counts as 0. verl
   has no word for it: such a rollout gets the mean reward of its prompt, so that it moves neither
   up nor down. max_missing=1.0 above lets it: in small batches a share of failures says little.
4. Of a dialogue with tools TRL hands over the messages, and the assistant's last one is judged.
   verl hands over one text with all that the tools returned: use it for single turns.
5. Thoughts are no answer, as in train.py; but no trainer says whether the chat template has opened
   them in the prompt. Where it ends in <think>, give is_open=True, or thoughts that the length
   limit cut off are judged as an answer. grpo.opens_thoughts(tokenizer, ids) knows it, with
   ids = grpo.encode(tokenizer, examples[0].prompt, template_kwargs). Leave it out where the trainer
   takes the thoughts away by itself, and mind that both decode without special tokens: of a
   vocabulary whose <think> is one of them, no text shows where the thoughts end.

    python tools/adapters.py data/train.jsonl --trainer trl --out rows_trl.jsonl
    python tools/adapters.py data/train.jsonl --trainer verl --out rows_verl.jsonl
"""

import argparse
import asyncio
import json
import math
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo import split_thoughts
from rar import (
    DataError,
    Example,
    Group,
    RubricReward,
    criterion_questions,
    judge_groups,
    points_reward,
    read_examples,
)
from rler import RLER
from tools.report import Parser, run_tool

# ---------------------------------------------------------------------- what a completion says


def answer_text(completion: object, is_open: bool = False) -> str | None:
    """The text that a judge is shown; None where there is nothing to judge.

    completion: a text, a list of parts, or a chat, whose last message by the assistant counts:
    what a tool returned is not the policy's answer. Thoughts are no answer either. is_open: the
    prompt has opened them, so that a text without </think> was cut off in them. Raises DataError
    for anything else.

    >>> answer_text("<think>Rest, or fluids?</think>Rest.")
    'Rest.'
    >>> call = {"role": "assistant", "content": "Let me look it up."}
    >>> answer_text([call, {"role": "tool", "content": "Rest."}])
    'Let me look it up.'
    """
    if completion is None:
        return None
    content = completion
    if is_chat(completion):
        message = last_assistant_message(completion)
        # A dialogue in which the assistant has not spoken yet is not judged as silence.
        if message is None:
            return None
        content = message.get("content")

    # As in train.py: whoever is paid for right words in the thoughts need not answer.
    _, answer = split_thoughts(content_text(content), is_open)
    return answer


def is_chat(completion: object) -> bool:
    """Whether it is a list of messages. A list of parts has no roles."""
    if not isinstance(completion, list):
        return False
    return any(isinstance(entry, dict) and "role" in entry for entry in completion)


def last_assistant_message(chat: list) -> dict | None:
    """None where the assistant says nothing."""
    # From the end: in a dialogue with tools the last message may be a tool's.
    for message in reversed(chat):
        if isinstance(message, dict) and message.get("role") == "assistant":
            return message
    return None


def content_text(content: object) -> str:
    """The text of a content: a text, a list of parts, or nothing. Raises DataError."""
    # A message that only calls a tool has no content. It says nothing: it is judged as silence.
    if content is None:
        return ""
    if isinstance(content, str):
        return content

    # Servers that know images and thoughts give even plain text in parts.
    if isinstance(content, list):
        return "".join(part_text(part) for part in content)
    kind = type(content).__name__
    raise DataError(f"a completion is a {kind}; give a text, a list of parts, or a chat")


def part_text(part: object) -> str:
    """The text of one part; "" for other kinds (thoughts, images). Raises DataError."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        kind = type(part).__name__
        raise DataError(f"a part of a completion is a {kind}; give a text or an object")

    # A thinking part may have a "text" as well: its type says what it is.
    is_answer = part.get("type", "text") in ("text", "output_text")
    if is_answer and isinstance(part.get("text"), str):
        return part["text"]
    return ""


# ---------------------------------------------------------------------- one step of a method


class Scorer:
    """A method and its examples, for a trainer that samples and updates by itself."""

    def __init__(
        self,
        method: RubricReward,
        examples: list[Example],
        heldout: list[Example],
        by_prompt: bool = True,
    ):
        """by_prompt: the rollouts of a prompt are a group; else each is a group of its own.

        Raises DataError for a method that is more than a reward, or an id in both lists.
        """
        if type(method).advantages is not RubricReward.advantages:
            raise DataError(
                "gdpo is a rule for advantages, which other trainers compute by themselves: "
                "use axis_mean, or the trainer's own GDPO"
            )
        self.method = method
        self.examples = {example.id: example for example in examples}
        self.heldout = {example.id: example for example in heldout}
        self.by_prompt = by_prompt

        # Calls so far, for a trainer that does not say how many updates it has done.
        self.steps_done = 0

        # The id alone says what a row is for, so no id may say both.
        for name in self.heldout:
            if name in self.examples:
                raise DataError(f"id {name!r} is among the training and the held-out examples")

    def example(self, name: object) -> Example:
        """The example that a row's id names. Raises DataError."""
        if isinstance(name, str):
            if name in self.examples:
                return self.examples[name]
            if name in self.heldout:
                return self.heldout[name]
        raise DataError(
            f"no rubric for a row with the id {name!r}; give the examples that the data set "
            "was made from (tools/adapters.py makes it)"
        )

    def rewards(
        self,
        ids: list,
        texts: list[str | None],
        step: int | None = None,
    ) -> list[float]:
        """One step: rewards in the order of the texts; nan for what was not scored.

        step: updates done so far; None counts the calls.
        """
        if len(ids) != len(texts):
            raise DataError(f"{len(ids)} ids for {len(texts)} completions; give one for each")

        # Every id is looked up before anything is judged: an error should cost no verdicts.
        rollouts = []
        training = {}
        heldout = {}
        for number, (name, text) in enumerate(zip(ids, texts)):
            example = self.example(name)
            rollout = SimpleNamespace(text=text, reward=math.nan)
            rollouts.append(rollout)

            # A completion that is not there is no silence: nothing is known about it.
            if text is None:
                continue

            # A prompt may stand in the batch twice: its rollouts are compared with each other.
            groups = heldout if name in self.heldout else training
            key = name if self.by_prompt else number
            if key not in groups:
                groups[key] = Group(example, [])
            groups[key].rollouts.append(rollout)

        # A batch of held-out rows only is an evaluation: for the method nothing happens.
        if training:
            self.score(list(training.values()), step)
        if heldout:
            self.evaluate(list(heldout.values()))
        return [rollout.reward for rollout in rollouts]

    def score(self, groups: list[Group], step: int | None) -> None:
        """Calls the hooks of the method in the order of rar.RubricReward."""
        method = self.method

        # Each process would evolve rubrics of its own, by the part of a group that it has.
        if isinstance(method, RLER) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DataError(
                "rler needs all rollouts of a prompt in one process, and this trainer has "
                "several; use one process, another method, or train.py"
            )
        if step is None:
            step = self.steps_done
        method.before_step(step, list(self.examples.values()))

        # What the method does not want now stays without a reward: a prompt without a
        # reference, or without the class that has its turn.
        usable = {}
        for example, _ in groups:
            if method.can_learn_from(example):
                usable[example.id] = example
        wanted = {example.id for example in method.pool(list(usable.values()))}
        scored = [group for group in groups if group.example.id in wanted]

        method.score(scored)
        method.after_step(scored)
        self.steps_done += 1

    def evaluate(self, groups: list[Group]) -> None:
        """HealthBench's score by the example's own rubric; no state of the method changes."""
        # Not the method's questions: an evolving rubric would change what is measured.
        rubrics = [example.rubric for example, _ in groups]
        judge_groups(self.method.judge, groups, rubrics, criterion_questions)
        for example, rollouts in groups:
            for rollout in rollouts:
                # nan with a missing verdict, as in rar.evaluate: what it would be is not known.
                scores = [verdict.score for verdict in rollout.verdicts]
                rollout.reward = points_reward(example.rubric, scores)


# ---------------------------------------------------------------------- TRL


def as_trl_reward(
    method: RubricReward,
    examples: list[Example],
    heldout: list[Example] = (),
    is_open: bool = False,
):
    """The method as a reward function of TRL's GRPOTrainer.

    is_open: the chat template ends in <think>. The data sets need the column "id", see `trl_rows`.
    Raises DataError where it is missing.
    """
    scorer = Scorer(method, examples, heldout)

    def rubric_reward(
        completions: list,
        id: list | None = None,
        trainer_state=None,
        **columns,
    ) -> list[float | None]:
        """TRL's convention: columns come as lists with one entry per completion."""
        if id is None:
            raise DataError('the data set has no column "id"; make it with tools/adapters.py')

        # A resumed trainer begins where it was, and with several updates per batch the calls
        # are fewer than the updates. TRL's own count is right in both cases.
        step = None
        if trainer_state is not None:
            step = trainer_state.global_step

        # None is TRL's word for "not scored": it stays out of the group's mean.
        texts = [answer_text(completion, is_open) for completion in completions]
        rewards = []
        for reward in scorer.rewards(id, texts, step):
            rewards.append(None if math.isnan(reward) else reward)
        return rewards

    return rubric_reward


def trl_rows(examples: list[Example]) -> list[dict]:
    """Rows of a data set for TRL: Dataset.from_list(trl_rows(examples))."""
    return [{"prompt": example.prompt, "id": example.id} for example in examples]


# ---------------------------------------------------------------------- verl


class PromptMeans:
    """Mean reward per prompt: what verl is given for a rollout that could not be scored."""

    def __init__(self):
        # Sums, not lists: a run has as many rewards as rollouts.
        self.total = defaultdict(float)
        self.count = Counter()

    def fill(self, ids: list[str], rewards: list[float]) -> list[float]:
        """The rewards with every nan replaced by the prompt's mean; 0 where it has none.

        >>> PromptMeans().fill(["a", "a", "a", "b"], [0.5, math.nan, 0.7, math.nan])
        [0.5, 0.6, 0.7, 0.0]
        """
        # First all that are known: the mean should not depend on the order in the batch.
        for name, reward in zip(ids, rewards):
            if not math.isnan(reward):
                self.total[name] += reward
                self.count[name] += 1

        # A prompt of which nothing is known gets 0 throughout: no rollout of it is ahead.
        filled = []
        for name, reward in zip(ids, rewards):
            if not math.isnan(reward):
                filled.append(reward)
            elif self.count[name]:
                filled.append(self.total[name] / self.count[name])
            else:
                filled.append(0.0)
        return filled


def row_id(extra_info: object) -> str:
    """The example's id in a row of verl. Raises DataError."""
    if not isinstance(extra_info, dict) or extra_info.get("id") is None:
        raise DataError(
            'a row has no "id" in its extra_info; make the data set with tools/adapters.py'
        )
    return extra_info["id"]


class Call:
    """A call of verl's reward loop: a rollout that waits for its result."""

    def __init__(self, name: str, text: str | None):
        self.name = name
        self.text = text
        self.is_over = asyncio.Event()
        self.result = None


def as_verl_reward(
    method: RubricReward,
    examples: list[Example],
    heldout: list[Example] = (),
    is_open: bool = False,
):
    """The method as verl's reward function of today: one rollout per call, many at a time.

    is_open: the chat template ends in <think>. The rows need the example's id in extra_info, see
    `verl_rows`. Raises DataError for a method that needs whole steps, which no such call can see.
    """
    # One that does something before a step has steps, and state that follows them.
    if type(method).before_step is not RubricReward.before_step:
        raise DataError(
            f"{type(method).__name__} needs whole steps, and verl's reward loop hands over one "
            "rollout at a time; use a design of rar.py (explicit, points, ...), or train.py"
        )

    # The loop deals a prompt's rollouts out to several workers, so each is a group of its own.
    scorer = Scorer(method, examples, heldout, by_prompt=False)
    means = PromptMeans()
    lock = asyncio.Lock()
    waiting: list[Call] = []

    async def judge_waiting() -> None:
        """Takes all calls that wait by then to the judge, in one flat batch."""
        batch = []
        try:
            # Calls that are made at the same moment get the chance to join, and then those that
            # come while the batch before is judged.
            await asyncio.sleep(0)
            async with lock:
                batch = list(waiting)
                waiting.clear()
                # In a thread of its own: meanwhile the loop collects the next ones.
                await asyncio.to_thread(score_calls, scorer, means, batch)
        finally:
            # Also when the judge fails, or this call is taken back while it waits for the lock:
            # the others would wait for ever.
            if not batch:
                batch = list(waiting)
                waiting.clear()
            for call in batch:
                call.is_over.set()

    async def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: str,
        extra_info: dict,
        **_,
    ) -> dict:
        """verl's convention. "scored" is 0 where "score" is only the prompt's mean."""
        # A wrong id is the error of this row, not of all that are judged with it.
        call = Call(row_id(extra_info), answer_text(solution_str, is_open))
        scorer.example(call.name)

        # One by one, each would wait for the verdicts on the one before. So the first call of a
        # batch takes the others along.
        is_first = len(waiting) == 0
        waiting.append(call)
        if is_first:
            await judge_waiting()
        else:
            await call.is_over.wait()

        # The first call has raised what went wrong, and verl ends with that.
        if call.result is None:
            raise DataError("not scored: the batch that this rollout was judged in has failed")
        return call.result

    return compute_score


def score_calls(scorer: Scorer, means: PromptMeans, batch: list[Call]) -> None:
    """Sets the result of every call of the batch."""
    ids = []
    texts = []
    for call in batch:
        ids.append(call.name)
        texts.append(call.text)

    rewards = scorer.rewards(ids, texts)
    scores = means.fill(ids, rewards)
    for call, reward, score in zip(batch, rewards, scores):
        call.result = {"score": score, "scored": float(not math.isnan(reward))}


def as_verl_batch_reward(
    method: RubricReward,
    examples: list[Example],
    heldout: list[Example] = (),
    is_open: bool = False,
):
    """The method as the function of verl's older batch manager (reward_manager "batch").

    is_open: the chat template ends in <think>.
    """
    scorer = Scorer(method, examples, heldout)

    def compute_score(
        data_sources: list,
        solution_strs: list,
        ground_truths: list,
        extra_infos: list,
        **_,
    ) -> list[float]:
        """verl's convention: lists with one entry per rollout; returns the rewards."""
        # The manager hands over all rollouts of a step, so the groups are whole.
        ids = [row_id(extra_info) for extra_info in extra_infos]
        texts = [answer_text(text, is_open) for text in solution_strs]

        # The mean of this batch only: the policy was another one in the batches before.
        return PromptMeans().fill(ids, scorer.rewards(ids, texts))

    return compute_score


def verl_rows(examples: list[Example], split: str = "train") -> list[dict]:
    """Rows of a data set for verl, as its data preprocessing scripts write them."""
    # verl wants a ground truth in every row; the reward here is found by the id alone.
    rows = []
    for index, example in enumerate(examples):
        rows.append(
            {
                "data_source": "rubrics",
                "prompt": example.prompt,
                "reward_model": {"style": "rule", "ground_truth": example.reference},
                "extra_info": {"id": example.id, "split": split, "index": index},
            }
        )
    return rows


# ---------------------------------------------------------------------- the command line


def write_rows(argv: list[str] | None) -> None:
    """Writes a data set for a trainer. Raises DataError, OSError."""
    parser = Parser(
        prog="adapters.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="prompts with rubrics, as for train.py --data")
    parser.add_argument("--trainer", choices=["trl", "verl"], required=True)
    parser.add_argument("--split", default="train", help="verl: the name of the split [train]")
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    args = parser.parse_args(argv)

    # Read first: a file with an error in it should leave nothing behind.
    examples = read_examples(args.data)
    if args.trainer == "trl":
        rows = trl_rows(examples)
    else:
        rows = verl_rows(examples, args.split)
    try:
        # "x" never writes over a file that is there: it may be somebody's data.
        with open(args.out, "x", encoding="utf8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise DataError(f"{args.out}: is there already; name another file") from None
    print(f"{args.out}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    return run_tool("adapters.py", write_rows, argv)


if __name__ == "__main__":
    sys.exit(main())
