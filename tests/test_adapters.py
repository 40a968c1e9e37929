"""Rewards in other people's trainers: a real GRPOTrainer and verl's own managers, where installed."""

import asyncio
import doctest
import json
import math
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import arlrr
import grpo
import rar
import rler
from judge import LexicalJudge, Verdict
from rar import DataError
from tools import adapters
from tools.adapters import as_trl_reward, as_verl_batch_reward, as_verl_reward

ALL = rar.read_examples(ROOT / "data" / "train.jsonl")
EXAMPLES = ALL[:3]
HELDOUT = ALL[3:5]
TEXTS = [
    "Rest helps. See a doctor if it lasts.",
    "Drink plenty of fluids.",
    "",
    "Take antibiotics.",
    "Rest and rest and rest.",
    "Water.",
]


def method_of(name, judge=None, **changes):
    """A method object with the settings that train.py would give it."""
    values = {"advantage": "std", "class_by": "axis", "seed": 0, "schedule": "cyclic", "stage": 1}
    values |= {"rubrics_kept": 5}
    config = SimpleNamespace(method=name, **(values | changes))
    kinds = {"rler": rler.RLER, "arlrr": arlrr.ARLRR, "axis_mean": arlrr.AxisMean}
    kind = kinds.get(name, rar.RubricReward)
    return kind(judge or LexicalJudge(), config)


METHODS = ["explicit", "points", "axis_mean", "rler", "arlrr"]


def ours(method, groups, step):
    """The rewards as train.py would set them."""
    made = []
    for example, texts in groups:
        rollouts = [grpo.Rollout([1], [2], [0.0], "stop", text) for text in texts]
        made.append(rar.Group(example, rollouts))
    method.before_step(step, EXAMPLES)
    method.score(made)
    method.after_step(made)
    rewards = []
    for _, rollouts in made:
        rewards.extend(rollout.reward for rollout in rollouts)
    return rewards


class FirstMissing(LexicalJudge):
    """Gives no verdict on the first response."""

    def ask(self, questions, show_progress=False):
        verdicts = super().ask(questions)
        first = questions[0].response
        for k, question in enumerate(questions):
            if question.response == first:
                verdicts[k] = Verdict(None)
        return verdicts


# An example that no check decides, so that a judge without verdicts leaves it unscored.
ASKED = rar.Example(
    "asked",
    [{"role": "user", "content": "What helps against a cold?"}],
    [rar.Criterion("Mentions water.", 2, axis="tone"), rar.Criterion("Mentions rest.", 1)],
)


# ---------------------------------------------------------------------- what a completion says


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("Rest.", "Rest."),
        (None, None),
        ([{"role": "assistant", "content": "Rest."}], "Rest."),
        ([{"type": "text", "text": "Re"}, {"type": "text", "text": "st."}], "Rest."),
        ([{"role": "assistant", "content": [{"type": "text", "text": "Rest."}]}], "Rest."),
        # Thoughts are not the answer.
        ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Rest."}], "Rest."),
        # A tool's output is not the answer, whether the dialogue goes on after it or not.
        (
            [
                {"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]},
                {"role": "tool", "content": "Rest, says the leaflet."},
                {"role": "assistant", "content": "Rest."},
            ],
            "Rest.",
        ),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]},
                {"role": "tool", "content": "Rest, says the leaflet."},
            ],
            "",
        ),
        ([{"role": "tool", "content": "Rest."}], None),
        ("<think>Fluids?</think>\n\nRest.", "Rest."),
        ("<think>Rest, or fluids", ""),
        ([{"type": "reasoning", "text": "Hm."}, {"type": "output_text", "text": "Rest."}], "Rest."),
        ([], ""),
    ],
)
def test_the_assistants_last_message_is_judged(completion, text):
    assert adapters.answer_text(completion) == text


def test_thoughts_that_the_prompt_has_opened_and_the_limit_cut_off_are_no_answer(tiny):
    """As in train.py: right words in thoughts are not paid for, by any of the three adapters."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template += "<think>\n"
    is_open = grpo.opens_thoughts(tokenizer, grpo.encode(tokenizer, ASKED.prompt))
    cut, whole = "Hm, rest and water", "Hm.</think>Rest and water."
    make = (method_of("explicit"), [ASKED], [], is_open)
    chats = [[{"role": "assistant", "content": text}] for text in (cut, whole)]
    info = {"id": "asked"}
    trl = adapters.as_trl_reward(*make)(chats, id=["asked"] * 2)
    batch = adapters.as_verl_batch_reward(*make)([""] * 2, [cut, whole], [""] * 2, [info] * 2)
    one = adapters.as_verl_reward(*make)
    single = [asyncio.run(one("", text, "", info))["score"] for text in (cut, whole)]
    assert trl == batch == single == [0.0, 1.0]
    assert adapters.answer_text(cut) == cut


@pytest.mark.parametrize(
    "completion", [3, {"role": "assistant"}, [{"role": "assistant", "content": 3}], [3]]
)
def test_a_completion_of_another_shape_is_one_line(completion):
    with pytest.raises(DataError, match="give a text"):
        adapters.answer_text(completion)


# ---------------------------------------------------------------------- the same rewards as ours


@pytest.mark.parametrize("name", METHODS)
def test_rewards_equal_ours_in_any_order_of_rows(name):
    ids = [EXAMPLES[k].id for k in (0, 1, 0, 1, 0, 1)]
    theirs = method_of(name)
    mine = method_of(name)
    reward = as_trl_reward(theirs, EXAMPLES)
    for step in range(2):  # the second step shows that rler and arlrr move on
        columns = {"prompts": ["x"] * 6, "completion_ids": [[1]] * 6}
        rewards = reward(completions=TEXTS, id=ids, **columns)
        expected = ours(mine, [(EXAMPLES[0], TEXTS[0::2]), (EXAMPLES[1], TEXTS[1::2])], step)
        assert rewards[0::2] + rewards[1::2] == expected
        assert theirs.state_dict() == mine.state_dict()

    chat = [[{"role": "assistant", "content": text}] for text in TEXTS]
    as_chat = as_trl_reward(method_of(name), EXAMPLES)(completions=chat, id=ids)
    assert as_chat == as_trl_reward(method_of(name), EXAMPLES)(completions=TEXTS, id=ids)


def test_the_trainers_own_step_says_whose_turn_it_is():
    """A resumed trainer begins at its step and not at 0: the turn would never end."""
    method = method_of("arlrr", stage=2)
    method.load_state_dict({"history": [{"step": 8, "class": "accuracy"}]})
    reward = as_trl_reward(method, EXAMPLES)
    for step in (9, 10):
        state = SimpleNamespace(global_step=step)
        reward(completions=["Rest."], id=[EXAMPLES[0].id], trainer_state=state)
    assert [stage["step"] for stage in method.history] == [8, 10]


def test_what_is_not_scored_is_none_in_trl_and_the_mean_of_its_group_in_verl():
    ids = ["asked"] * 3
    texts = ["Drink water.", "Rest.", "Water and rest."]
    reward = as_trl_reward(method_of("points", FirstMissing()), [ASKED])
    rewards = reward(completions=texts, id=ids)
    assert rewards == [None, pytest.approx(1 / 3), 1.0]

    infos = [{"id": name, "split": "train"} for name in ids]
    compute = as_verl_batch_reward(method_of("points", FirstMissing()), [ASKED])
    verl = compute(["x"] * 3, texts, [""] * 3, infos)
    assert verl == [pytest.approx(2 / 3), pytest.approx(1 / 3), 1.0]
    alone = as_verl_batch_reward(method_of("points", FirstMissing()), [ASKED])
    assert alone(["x"], texts[:1], [""], infos[:1]) == [0.0]


def test_a_completion_that_is_not_there_is_not_scored():
    reward = as_trl_reward(method_of("points"), [ASKED])
    assert reward(completions=[None, "Water."], id=["asked"] * 2) == [None, pytest.approx(2 / 3)]
    assert reward(completions=[None], id=["asked"]) == [None]


def test_a_prompt_whose_class_is_not_in_turn_is_not_scored():
    plain = rar.Example("p", EXAMPLES[0].prompt, [rar.Criterion("Mentions water.", 1, axis="tone")])
    reward = as_trl_reward(method_of("arlrr"), [*EXAMPLES, plain])
    rewards = reward(completions=["Water.", "Rest."], id=["p", EXAMPLES[0].id])
    assert rewards[0] is None and rewards[1] is not None


# ---------------------------------------------------------------------- held-out rows


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_leaves_no_trace(name):
    """Held-out rows are scored by HealthBench's points, and no rubric evolves on them."""
    method = method_of(name)
    reward = as_trl_reward(method, EXAMPLES, HELDOUT)
    reward(completions=TEXTS, id=[EXAMPLES[0].id] * 6)
    before = json.dumps(method.state_dict())
    texts = ["Rest helps. See a doctor if it lasts.", "Yes."]
    rewards = reward(completions=texts, id=[example.id for example in HELDOUT])
    assert json.dumps(method.state_dict()) == before

    groups = []
    for example, text in zip(HELDOUT, texts):
        groups.append(rar.Group(example, [grpo.Rollout([1], [2], [0.0], "stop", text)]))
    rar.evaluate(LexicalJudge(), groups, show_progress=False)
    assert rewards == [group.rollouts[0].reward for group in groups]

    # The step goes on where it was: the evaluation was none.
    after = reward(completions=TEXTS, id=[EXAMPLES[1].id] * 6)
    other = method_of(name)
    ours(other, [(EXAMPLES[0], TEXTS)], 0)
    assert after == ours(other, [(EXAMPLES[1], TEXTS)], 1)
    assert method.state_dict() == other.state_dict()


def test_rows_of_both_kinds_in_one_call():
    infos = [{"id": EXAMPLES[0].id}, {"id": HELDOUT[0].id}]
    compute = as_verl_batch_reward(method_of("rler"), EXAMPLES, HELDOUT)
    rewards = compute(["x"] * 2, ["Rest.", "Rest."], [""] * 2, infos)
    only = as_verl_batch_reward(method_of("points"), EXAMPLES, HELDOUT)
    assert rewards[1] == only(["x"], ["Rest."], [""], infos[1:])[0]


def test_an_id_of_both_lists_is_one_line():
    with pytest.raises(DataError, match="among the training and the held-out"):
        as_trl_reward(method_of("points"), EXAMPLES, EXAMPLES[:1])


# ---------------------------------------------------------------------- one clear error


def test_ids_that_are_missing_or_unknown_and_lists_that_are_unequal():
    reward = as_trl_reward(method_of("points"), EXAMPLES)
    known = EXAMPLES[0].id
    for columns, words in (
        ({"completions": ["x"], "id": ["nobody"]}, "'nobody'"),
        ({"completions": ["x"], "id": [None]}, "None"),
        ({"completions": ["x"], "id": [["a"]]}, "no rubric for a row"),
        ({"completions": ["x"]}, 'no column "id"'),
        ({"completions": ["x", "y"], "id": [known]}, "1 ids for 2 completions"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            reward(**columns)
        assert "\n" not in str(caught.value)

    compute = as_verl_batch_reward(method_of("points"), EXAMPLES)
    for infos, words in (
        ([{}], '"id" in its extra_info'),
        ([None], '"id" in its extra_info'),
        ([{"id": "nobody"}], "'nobody'"),
        ([{"id": known}, {"id": known}], "2 ids for 1 completions"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            compute(["x"], ["Rest."], [""], infos)
        assert "\n" not in str(caught.value)


def test_methods_that_a_trainer_cannot_run_refuse_at_once():
    for name in ("rler", "arlrr"):
        with pytest.raises(DataError, match="needs whole steps"):
            as_verl_reward(method_of(name), EXAMPLES)
    config = SimpleNamespace(method="gdpo", advantage="std", class_by="axis")
    gdpo = arlrr.GDPO(LexicalJudge(), config)
    for adapter in (as_trl_reward, as_verl_reward, as_verl_batch_reward):
        with pytest.raises(DataError, match="gdpo is a rule for advantages"):
            adapter(gdpo, EXAMPLES)
    with pytest.raises(DataError, match="--schedule search needs train.py"):
        as_trl_reward(method_of("arlrr", schedule="search"), EXAMPLES)(
            completions=["x"], id=[EXAMPLES[0].id]
        )


def test_rler_wants_a_prompts_rollouts_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    columns = {"completions": ["x"], "id": [EXAMPLES[0].id]}
    with pytest.raises(DataError, match="in one process"):
        as_trl_reward(method_of("rler"), EXAMPLES)(**columns)
    assert as_trl_reward(method_of("points"), EXAMPLES)(**columns)


# ---------------------------------------------------------------------- many rollouts


class CountingJudge:
    """Every verdict is 1; says how often and how much it was asked."""

    def __init__(self):
        self.sizes = []

    def ask(self, questions, show_progress=False):
        self.sizes.append(len(questions))
        return [Verdict(1.0)] * len(questions)


MANY = 16384


def many_examples():
    examples = []
    for number in range(MANY // 8):
        criterion = rar.Criterion("Is helpful.", 1, axis="accuracy")
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        examples.append(rar.Example(f"p{number}", prompt, [criterion]))
    return examples


def seconds(function):
    started = time.process_time()
    function()
    return time.process_time() - started


@pytest.mark.parametrize("adapter", ["trl", "verl batch", pytest.param("verl", marks=pytest.mark.long)])
def test_our_own_time_for_16384_rollouts_is_under_a_second(adapter):
    """What the adapter adds to the method's own scoring of the same groups."""
    examples = many_examples()
    ids = [examples[number % len(examples)].id for number in range(MANY)]
    texts = [f"Answer {number}." for number in range(MANY)]
    infos = [{"id": name} for name in ids]
    method = method_of("points", CountingJudge())

    async def nothing(**_):
        return 1.0

    def by_ourselves():
        groups = {}
        for number, (name, text) in enumerate(zip(ids, texts)):
            key = number if adapter == "verl" else name
            if key not in groups:
                groups[key] = rar.Group(examples[number % len(examples)], [])
            groups[key].rollouts.append(SimpleNamespace(text=text, reward=math.nan))
        method.score(list(groups.values()))
        # Python's own time for as many calls at once.
        if adapter == "verl":
            asyncio.run(gathered(nothing, texts, infos))

    def by_adapter():
        if adapter == "trl":
            as_trl_reward(method, examples)(completions=texts, id=ids)
        elif adapter == "verl batch":
            as_verl_batch_reward(method, examples)(["x"] * MANY, texts, [""] * MANY, infos)
        else:
            asyncio.run(gathered(as_verl_reward(method, examples), texts, infos))

    scoring = min(seconds(by_ourselves) for _ in range(3))
    assert min(seconds(by_adapter) for _ in range(3)) - scoring < 1


# ---------------------------------------------------------------------- verl


async def gathered(compute, texts, infos, **more):
    """As verl's reward loop calls a reward function: all at once, by keyword."""
    calls = []
    for text, info in zip(texts, infos):
        call = compute(
            data_source="rubrics", solution_str=text, ground_truth="", extra_info=info, **more
        )
        calls.append(asyncio.create_task(call))
    return await asyncio.gather(*calls)


def test_verl_one_rollout_at_a_time_in_few_flat_batches():
    judge = CountingJudge()
    examples = many_examples()[:40]
    compute = as_verl_reward(method_of("points", judge), examples)
    infos = [{"id": example.id} for example in examples]
    results = asyncio.run(gathered(compute, ["Rest."] * 40, infos, reward_router_address=None))
    assert results == [{"score": 1.0, "scored": 1.0}] * 40
    # The first call takes all that wait by then: 40 questions do not wait for each other.
    assert sum(judge.sizes) == 40 and len(judge.sizes) <= 2


@pytest.mark.parametrize("name", ["explicit", "points", "axis_mean"])
def test_verl_per_sample_rewards_are_those_of_groups_of_one(name):
    compute = as_verl_reward(method_of(name), EXAMPLES, HELDOUT)
    ids = [EXAMPLES[k % 3].id for k in range(6)] + [HELDOUT[0].id]
    texts = [*TEXTS, "Rest."]
    results = asyncio.run(gathered(compute, texts, [{"id": i} for i in ids]))
    expected = []
    for k, text in enumerate(TEXTS):
        expected += ours(method_of(name), [(EXAMPLES[k % 3], [text])], 0)
    points = as_trl_reward(method_of("points"), EXAMPLES, HELDOUT)
    expected += points(completions=["Rest."], id=[HELDOUT[0].id])
    assert [result["score"] for result in results] == expected


def test_verl_per_sample_what_is_not_scored_gets_the_mean_of_its_prompt():
    compute = as_verl_reward(method_of("points", FirstMissing()), [ASKED])

    async def calls():
        infos = [{"id": "asked"}]
        first = await gathered(compute, ["Drink water."], infos)
        return first

    # Nothing is known of the prompt yet: 0, and said to be no score.
    assert asyncio.run(calls()) == [{"score": 0.0, "scored": 0.0}]
    compute = as_verl_reward(method_of("points", FirstMissing()), [ASKED])
    texts = ["Drink water.", "Rest.", "Water and rest."]
    results = asyncio.run(gathered(compute, texts, [{"id": "asked"}] * 3))
    assert [result["scored"] for result in results] == [0.0, 1.0, 1.0]
    assert [result["score"] for result in results[1:]] == [pytest.approx(1 / 3), 1.0]
    assert results[0]["score"] == pytest.approx(2 / 3)


def test_verl_per_sample_errors_are_those_of_their_row():
    compute = as_verl_reward(method_of("points"), EXAMPLES)
    for info, words in (({}, '"id"'), ({"id": "nobody"}, "'nobody'")):
        with pytest.raises(DataError, match=words):
            asyncio.run(gathered(compute, ["x"], [info]))


def test_verl_per_sample_a_judge_that_fails_ends_every_call():
    class Broken(CountingJudge):
        def ask(self, questions, show_progress=False):
            super().ask(questions)
            raise RuntimeError("the judge is gone")

    judge = Broken()
    compute = as_verl_reward(method_of("points", judge), EXAMPLES)

    async def calls():
        tasks = []
        for _ in range(5):
            info = {"id": EXAMPLES[0].id}
            tasks.append(compute("rubrics", "Rest.", "", info))
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(calls())
    assert isinstance(errors[0], RuntimeError)
    assert all(isinstance(error, DataError) for error in errors[1:])
    assert len(judge.sizes) == 1


def test_verl_per_sample_a_call_that_is_taken_back_leaves_nobody_waiting():
    judge = CountingJudge()
    compute = as_verl_reward(method_of("points", judge), EXAMPLES)
    info = {"id": EXAMPLES[0].id}

    async def calls():
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.create_task(compute("rubrics", "Rest.", "", info)))
        await asyncio.sleep(0)
        tasks[0].cancel()
        first = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        return first, await compute("rubrics", "Rest.", "", info)

    errors, afterwards = asyncio.run(calls())
    assert isinstance(errors[0], asyncio.CancelledError)
    assert all(isinstance(error, DataError) for error in errors[1:])
    assert afterwards["scored"] == 1.0


def verl_batch(tokenizer, ids, texts, extra):
    """A DataProto as verl's rollout workers hand it to a reward manager."""
    import numpy as np
    import torch
    from verl import DataProto

    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(len(row) for row in encoded)
    responses = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), 1 + width, dtype=torch.long)
    mask[:, 0] = 1
    for k, row in enumerate(encoded):
        responses[k, : len(row)] = torch.tensor(row)
        mask[k, 1 : 1 + len(row)] = 1
    tensors = {
        "prompts": torch.ones(len(texts), 1, dtype=torch.long),
        "responses": responses,
        "attention_mask": mask,
    }
    rows = {
        "data_source": np.array(["rubrics"] * len(texts), dtype=object),
        "reward_model": np.array([{"ground_truth": ""} for _ in texts], dtype=object),
        "extra_info": np.array([{"id": i, **extra} for i in ids], dtype=object),
    }
    return DataProto.from_dict(tensors=tensors, non_tensors=rows)


REWARD_FILE = """
import sys
sys.path.insert(0, {root!r})
from types import SimpleNamespace
import rar
from judge import LexicalJudge
from tools.adapters import as_verl_reward

examples = rar.read_examples({data!r})
method = rar.RubricReward(LexicalJudge(), SimpleNamespace(method="points", advantage="std"))
compute_score = as_verl_reward(method, examples[:3], examples[3:5])
"""


def test_verls_own_reward_loop_scores_as_we_do(tiny, tmp_path):
    """The worker of verl's reward loop, its own loading of the file included; Ray is not started."""
    pytest.importorskip("verl", exc_type=ImportError)
    omegaconf = pytest.importorskip("omegaconf")
    loop = pytest.importorskip("verl.experimental.reward_loop.reward_loop", exc_type=ImportError)
    from transformers import AutoTokenizer

    source = REWARD_FILE.format(root=str(ROOT), data=str(ROOT / "data" / "train.jsonl"))
    path = tmp_path / "my_reward.py"
    path.write_text(source)
    config = omegaconf.OmegaConf.create({
        "actor_rollout_ref": {"model": {"path": str(tiny), "tokenizer_path": None}},
        "reward": {
            "custom_reward_function": {"path": str(path), "name": "compute_score"},
            "reward_manager": {"source": "register", "name": "naive"},
            "reward_model": {"enable": False},
        },
    })

    async def scores():
        worker = loop.RewardLoopWorker(config, None)
        ids = [EXAMPLES[0].id, EXAMPLES[1].id, HELDOUT[0].id]
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        data = verl_batch(tokenizer, ids, TEXTS[:2] + ["Rest."], {"split": "train"})
        return await worker.compute_score_batch(data)

    outputs = asyncio.run(scores())
    points = as_trl_reward(method_of("points"), EXAMPLES, HELDOUT)
    expected = []
    for name, text in zip((EXAMPLES[0], EXAMPLES[1], HELDOUT[0]), [*TEXTS[:2], "Rest."]):
        expected += points(completions=[text], id=[name.id])
    assert [output["reward_score"] for output in outputs] == expected
    assert outputs[0]["reward_extra_info"]["scored"] == 1.0


@pytest.mark.parametrize("name", METHODS)
def test_verls_own_batch_manager_scores_as_we_do(name, tiny):
    pytest.importorskip("verl", exc_type=ImportError)
    module = pytest.importorskip("verl.workers.reward_manager.batch", exc_type=ImportError)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    compute = as_verl_batch_reward(method_of(name), EXAMPLES)
    manager = module.BatchRewardManager(tokenizer, 0, compute)
    texts = [text or "No." for text in TEXTS]
    ids = [EXAMPLES[k].id for k in (0, 1, 0, 1, 0, 1)]
    mine = method_of(name)
    for step in range(2):
        data = verl_batch(tokenizer, ids, texts, {"split": "train"})
        rewards = manager(data).sum(dim=1).tolist()
        expected = ours(mine, [(EXAMPLES[0], texts[0::2]), (EXAMPLES[1], texts[1::2])], step)
        assert rewards[0::2] + rewards[1::2] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------- TRL


@pytest.mark.parametrize("name", METHODS)
def test_a_real_trl_trainer_takes_two_steps_and_evaluates(name, tiny, tmp_path):
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import GRPOConfig, GRPOTrainer

    calls = []
    method = method_of(name)
    reward = as_trl_reward(method, EXAMPLES, HELDOUT)

    def recorded(**given):
        rewards = reward(**given)
        texts = [chat[-1]["content"] for chat in given["completions"]]
        state = json.dumps(method.state_dict())
        calls.append((given["id"], texts, given["trainer_state"].global_step, rewards, state))
        return rewards

    settings = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=4,
        max_completion_length=24,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=str(tiny),
        reward_funcs=[recorded],
        args=settings,
        train_dataset=datasets.Dataset.from_list(adapters.trl_rows(EXAMPLES)),
        eval_dataset=datasets.Dataset.from_list(adapters.trl_rows(HELDOUT)),
    )
    trainer.train()

    heldout = {example.id: example for example in HELDOUT}
    examples = {example.id: example for example in EXAMPLES}
    mine = method_of(name)
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    updates = []
    evaluated = 0
    state = json.dumps(mine.state_dict())
    for ids, texts, step, rewards, state_then in calls:
        if ids[0] in heldout:
            evaluated += len(ids)
            assert state_then == state  # nothing evolves on held-out prompts
            groups = []
            for k, text in zip(ids, texts):
                rollout = grpo.Rollout([1], [2], [0.0], "stop", text)
                groups.append(rar.Group(heldout[k], [rollout]))
            rar.evaluate(LexicalJudge(), groups, show_progress=False)
            assert rewards == [group.rollouts[0].reward for group in groups]
            continue
        assert len(set(ids)) == 1
        assert rewards == ours(mine, [(examples[ids[0]], texts)], step)
        state = json.dumps(mine.state_dict())
        assert state_then == state
        updates.append(sum(rewards) / 4)
    assert evaluated == 2 * 4 * len(HELDOUT)
    assert logged == pytest.approx(updates, abs=1e-5)
    assert not any(math.isnan(row["loss"]) for row in trainer.state.log_history if "loss" in row)


# ---------------------------------------------------------------------- the data sets


def test_the_docstring_examples():
    failures, examples = doctest.testmod(adapters)
    assert failures == 0 and examples > 3


def test_the_rows_name_their_examples(tmp_path, capsys):
    source = str(ROOT / "data" / "train.jsonl")
    for trainer, name in (("trl", "trl.jsonl"), ("verl", "verl.jsonl")):
        out = tmp_path / name
        assert adapters.main([source, "--trainer", trainer, "--out", str(out)]) == 0
        rows = [json.loads(line) for line in out.read_text(encoding="utf8").split("\n") if line]
        assert len(rows) == len(ALL)
        for row, example in zip(rows, ALL):
            assert row["prompt"] == example.prompt
            given = row["id"] if trainer == "trl" else row["extra_info"]["id"]
            assert given == example.id

    # Never over a file that is there, and one line for what is not.
    assert adapters.main([source, "--trainer", "trl", "--out", str(out)]) == 2
    missing = str(tmp_path / "none.jsonl")
    assert adapters.main([missing, "--trainer", "trl", "--out", str(tmp_path / "a")]) == 2
    printed = capsys.readouterr().err.strip().split("\n")
    assert len(printed) == 2 and "is there already" in printed[0] and "none.jsonl" in printed[1]
