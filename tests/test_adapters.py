"""The methods as reward functions of other trainers: a real GRPOTrainer (where TRL is installed), verl's calling convention."""

import json
import math

import pytest
from conftest import ROOT

import arlrr
import grpo
import rar
import rler
from judge import OfflineJudge

EXAMPLES = rar.read_examples(ROOT / "data" / "train.jsonl")[:3]
TEXTS = ["Rest helps. See a doctor if it lasts.", "Drink plenty of fluids.", "", "Take antibiotics.", "Rest and rest and rest.", "Water."]
METHODS = {
    "explicit": lambda: rar.RubricReward(OfflineJudge()),
    "points": lambda: rar.RubricReward(OfflineJudge(), "points"),
    "rler": lambda: rler.RLER(OfflineJudge()),
    "arlrr": lambda: arlrr.ARLRR(OfflineJudge(), arlrr.Settings("cyclic")),
}


def ours(method, groups):
    """The rewards as train.py would set them."""
    rollouts = [(e, [grpo.Rollout([1], [2], [0.0], "stop", t) for t in texts]) for e, texts in groups]
    method.before_step(EXAMPLES, None)
    method.score(rollouts)
    method.after_step(rollouts)
    return [r.reward for _, part in rollouts for r in part]


@pytest.mark.parametrize("name", METHODS)
def test_rewards_equal_ours_in_any_order_of_rows(name):
    ids = [EXAMPLES[k].id for k in (0, 1, 0, 1, 0, 1)]
    theirs, mine = METHODS[name](), METHODS[name]()
    for step in range(2):  # the second step shows that rler and arlrr move on
        rewards = rar.as_trl_reward(theirs, EXAMPLES)(completions=TEXTS, id=ids, prompts=["x"] * 6, completion_ids=[[1]] * 6)
        expected = ours(mine, [(EXAMPLES[0], TEXTS[0::2]), (EXAMPLES[1], TEXTS[1::2])])
        assert rewards[0::2] + rewards[1::2] == expected
        assert theirs.state_dict() == mine.state_dict()
    chat = [[{"role": "assistant", "content": t}] for t in TEXTS]
    assert rar.as_trl_reward(METHODS[name](), EXAMPLES)(completions=chat, id=ids) == rar.as_trl_reward(METHODS[name](), EXAMPLES)(completions=TEXTS, id=ids)


def test_what_is_not_scored_is_none_in_trl_and_the_group_mean_in_verl():
    class Deaf(OfflineJudge):
        def ask(self, questions, progress=False):
            verdicts = super().ask(questions)  # of the first response nothing is known
            return [v._replace(score=None) if k < len(EXAMPLES[0].rubric) else v for k, v in enumerate(verdicts)]

    ids = [EXAMPLES[0].id] * 3
    rewards = rar.as_trl_reward(rar.RubricReward(Deaf()), EXAMPLES)(completions=TEXTS[:2] + TEXTS[3:4], id=ids)
    assert rewards[0] is None and all(isinstance(r, float) for r in rewards[1:])
    infos = [{"id": i, "split": "train"} for i in ids]
    verl = rar.as_verl_reward(rar.RubricReward(Deaf()), EXAMPLES)(["x"] * 3, TEXTS[:2] + TEXTS[3:4], [""] * 3, infos)
    assert verl[1:] == rewards[1:] and verl[0] == pytest.approx(sum(rewards[1:]) / 2)
    alone = rar.as_verl_reward(rar.RubricReward(Deaf()), EXAMPLES)(["x"], TEXTS[:1], [""], infos[:1])
    assert alone == [0.0]


def test_a_prompt_whose_class_is_not_in_turn_is_not_scored():
    plain = rar.Example("p", EXAMPLES[0].prompt, [rar.Criterion("Mentions water.", 1, axis="tone")])
    rewards = rar.as_trl_reward(arlrr.ARLRR(OfflineJudge(), arlrr.Settings("cyclic")), [*EXAMPLES, plain])(completions=["Water.", "Rest."], id=["p", EXAMPLES[0].id])
    assert rewards[0] is None and rewards[1] is not None


def test_an_unknown_prompt_is_one_line():
    with pytest.raises(rar.DataError, match="'nobody'"):
        rar.as_trl_reward(rar.RubricReward(OfflineJudge()), EXAMPLES)(completions=["x"], id=["nobody"])


@pytest.mark.parametrize("name", METHODS)
def test_a_real_trl_trainer_takes_two_steps(name, tiny, tmp_path):
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import GRPOConfig, GRPOTrainer

    seen = []
    reward = rar.as_trl_reward(METHODS[name](), EXAMPLES)

    def recorded(**given):
        rewards = reward(**given)
        seen.append((given["id"], [c[-1]["content"] for c in given["completions"]], rewards))
        return rewards

    rows = datasets.Dataset.from_list([{"prompt": e.prompt, "id": e.id} for e in EXAMPLES])
    settings = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=24, max_steps=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", bf16=False, seed=0,
    )  # fmt: skip
    trainer = GRPOTrainer(model=str(tiny), reward_funcs=[recorded], args=settings, train_dataset=rows)
    trainer.train()
    assert len(seen) == 2
    known, mine = {e.id: e for e in EXAMPLES}, METHODS[name]()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    for (ids, texts, rewards), shown in zip(seen, logged, strict=True):
        assert len(set(ids)) == 1 and rewards == ours(mine, [(known[ids[0]], texts)])
        assert shown == pytest.approx(sum(rewards) / 4, abs=1e-5)
    assert not any(math.isnan(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert json.dumps(seen)
