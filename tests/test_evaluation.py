"""The paper's six designs with a judge over HTTP, and the evaluation that people compare."""

import json
import math
import random
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from judge_server import JudgeServer
from test_train import run

import grpo
import rar
from judge import JudgeError, LexicalJudge, LLMJudge, Verdict
from rar import Criterion, Example, Group
from tools import compare as comparing

sys.path.append(str(ROOT / "tests" / "evidence"))
from reproduce_rar import simulate_noise

RUBRIC = [
    Criterion("Mentions rest.", 5, "Rest", "Essential", "accuracy"),
    Criterion("Mentions cheese.", -2, "Cheese", "Pitfall", "accuracy"),
    Criterion("Mentions water.", 2, "Water", "Optional", "completeness"),
]
METALS = [Criterion("The final answer is (B) Lead", 1, "Final answer", check='boxed "B" "Lead"')]


def example(name, rubric=RUBRIC, **more):
    prompt = [{"role": "user", "content": f"What helps against {name}?"}]
    return Example(name, prompt, rubric, **more)


def answer(text):
    return grpo.Rollout([1], [2], [0.0], "stop", text)


def method_of(judge, name):
    return rar.RubricReward(judge, SimpleNamespace(method=name, advantage="std"))


# ------------------------------------------------------------------------- the six designs


class Rater(JudgeServer):
    """Rates by the number of times "zebra" stands in the response; says met where it does."""

    def verdict(self, body):
        text = body["messages"][-1]["content"]
        zebras = text.count("zebra")
        if "rating" in text[-300:]:
            return json.dumps({"reason": "counted", "rating": min(10, 1 + zebras)})
        return json.dumps({"reason": "looked", "met": zebras > 0})


@pytest.mark.parametrize("name", rar.DESIGNS)
def test_every_design_over_http(name):
    e = example("colds", reference="Rest and water.")
    group = Group(e, [answer("bad"), answer("zebra zebra zebra"), answer("zebra")])
    with Rater() as server:
        method_of(LLMJudge(server.url, "m"), name).score([group])
        prompts = [body["messages"][-1]["content"] for body in server.bodies]
    rewards = [r.reward for r in group.rollouts]
    if name in ("likert", "reference_likert", "implicit"):
        assert rewards == pytest.approx([0, 3 / 9, 1 / 9]) and len(prompts) == 3
        for prompt in prompts:
            assert ("Rest and water." in prompt) == (name == "reference_likert")
            essential = "Essential: Mentions rest." in prompt
            fault = "Pitfall, a fault: Mentions cheese." in prompt
            assert (essential and fault) == (name == "implicit")
    elif name == "predefined":
        assert rewards == [0, 1, 1] and len(prompts) == 3 * 4
    else:
        expected = {"explicit": [0.9 / 2.2, 1.3 / 2.2, 1.3 / 2.2], "points": [0, 5 / 7, 5 / 7]}
        assert rewards == pytest.approx(expected[name]) and len(prompts) == 3 * len(RUBRIC)
        assert not any("Rest and water." in prompt for prompt in prompts)


OPINIONS = ["implicit", "likert", "predefined", "reference_likert"]


@pytest.mark.parametrize("name", OPINIONS)
def test_offline_an_opinion_is_refused_in_one_line(tiny, few, tmp_path, capsys, name):
    assert [n for n, design in sorted(rar.DESIGNS.items()) if design.needs_model] == OPINIONS
    with pytest.raises(JudgeError, match="needs a language model"):
        method_of(LexicalJudge(), name)
    assert run(tiny, few, tmp_path / "run", "--method", name) == 2
    said = capsys.readouterr().err.strip()
    assert "--judge URL" in said and "\n" not in said and not (tmp_path / "run").exists()


def test_a_comparison_with_a_reference_skips_prompts_without_one():
    with Rater() as server:
        method = method_of(LLMJudge(server.url, "m"), "reference_likert")
        assert method.can_learn_from(example("a", reference="Rest."))
        assert not method.can_learn_from(example("b"))


@pytest.mark.parametrize(
    "said",
    [
        '{"rating": 11}',
        '{"rating": 0}',
        '{"rating": "8"}',
        '{"rating": NaN}',
        '{"rating": true}',
        "8",
        '{"rating": null}',
    ],
)
def test_a_rating_that_is_none_is_missing(said):
    class Odd(JudgeServer):
        def verdict(self, body):
            return said

    rollout = answer("x")
    with Odd() as server:
        judge = LLMJudge(server.url, "m", max_missing=1.0)
        method_of(judge, "likert").score([Group(example("colds"), [rollout])])
    assert rollout.verdicts[0].score is None and math.isnan(rollout.reward)


# ------------------------------------------------------------------------- the score


def test_the_score_by_hand():
    groups = [
        Group(example("colds", tags=["theme:care"]), [answer("Rest, water.")]),  # 7 / 7
        Group(example("coughs", tags=["theme:care"]), [answer("Cheese.")]),  # -2 / 7
        Group(example("aches", RUBRIC[:2], tags=["theme:pain"]), [answer("Rest and cheese.")]),
    ]  # the last one: 3 / 5
    m = rar.evaluate(LexicalJudge(), groups)
    assert m["eval_score"] == pytest.approx((1 - 2 / 7 + 0.6) / 3)
    assert m["eval_n"] == 3 and m["eval_clipped"] == m["eval_score"]
    assert m["eval_axis/accuracy"] == pytest.approx((1 - 2 / 5 + 0.6) / 3)
    assert m["eval_axis/completeness"] == 0.5
    assert (m["eval_n/axis/accuracy"], m["eval_n/axis/completeness"]) == (3, 2)
    assert m["eval_theme/care"] == pytest.approx(5 / 14) and m["eval_theme/pain"] == 0.6
    assert m["eval_n/theme/care"] == 2
    short = statistics.fmean(0.0299 / 500 * (2000 - len(r.text)) for _, [r] in groups)
    assert m["eval_length_adjusted"] == pytest.approx(m["eval_score"] + short)
    low, high = m["eval_ci"]
    assert low <= m["eval_score"] <= high
    assert m["eval_ci"] == rar.evaluate(LexicalJudge(), groups)["eval_ci"]
    table = comparing.metrics_table(m)
    assert "axis completeness" in table and "n 2" in table


def test_a_weak_policy_is_zero_officially_and_still_seen():
    one = Group(example("colds"), [answer("Cheese.")])
    two = Group(example("coughs"), [answer("Cheese, water.")])
    m = rar.evaluate(LexicalJudge(), [one, two])
    assert m["eval_score"] == pytest.approx(-1 / 7) and m["eval_clipped"] == 0.0


def test_the_official_aggregate_on_real_rows(shared):
    """simple-evals, said plainly: mean over examples with a score, clipped to [0, 1].

    An axis without positives drops out.
    """
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    rng = random.Random(0)
    met = {}
    scores = []
    axes = {}
    groups = []

    class Coin:
        def ask(self, questions, show_progress=False):
            return [Verdict(float(met[question.statement]), "") for question in questions]

    for e in examples:
        for c in e.rubric:
            met.setdefault(c.text, rng.random() < 0.4)
        groups.append(Group(e, [answer("x")]))
        got = sum(c.weight for c in e.rubric if met[c.text])
        scores.append(got / sum(c.weight for c in e.rubric if c.weight > 0))
        for axis in {c.axis for c in e.rubric}:
            mine = [c for c in e.rubric if c.axis == axis]
            possible = sum(c.weight for c in mine if c.weight > 0)
            if possible:
                got = sum(c.weight for c in mine if met[c.text])
                axes.setdefault(axis, []).append(got / possible)
    m = rar.evaluate(Coin(), groups)
    official = sum(scores) / 200
    assert m["eval_score"] == pytest.approx(official, abs=1e-12)
    assert m["eval_clipped"] == pytest.approx(max(0, min(1, official)), abs=1e-12)
    for axis, values in axes.items():
        assert m[f"eval_axis/{axis}"] == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert m[f"eval_n/axis/{axis}"] == len(values)


def test_missing_verdicts_leave_an_example_out():
    class Half(LexicalJudge):
        def ask(self, questions, show_progress=False):
            first, *others = super().ask(questions, show_progress)
            return [first._replace(score=None), *others]

    one = Group(example("a"), [answer("Rest.")])
    two = Group(example("b"), [answer("Rest, water.")])
    m = rar.evaluate(Half(), [one, two])
    assert m["eval_n"] == 1 and m["eval_score"] == 1.0
    assert m["eval_n/axis/accuracy"] == 1 and m["eval_n/axis/completeness"] == 2
    m = rar.evaluate(Half(), [one])
    assert m["eval_n"] == 0
    assert math.isnan(m["eval_score"]) and math.isnan(m["eval_clipped"])  # unknown is not 0


def test_multiple_choice_is_accuracy_over_questions():
    right = [r"I think \boxed{B}", r"\boxed{lead}", r"\boxed{A} or \boxed{(B)}", r"\boxed{Lead}"]
    wrong = [r"\boxed{Iron}", "It is lead.", r"\boxed{lead}", r"\boxed{Z}"]
    groups = []
    for name, texts in (("m", right), ("n", wrong)):
        for k, text in enumerate(texts, 1):
            e = example(f"{name}#{k}", METALS, tags=[f"question:{name}"])
            groups.append(Group(e, [answer(text)]))
    m = rar.evaluate(LexicalJudge(), groups)
    # A question counts once, however often it was asked.
    assert m["eval_score"] == pytest.approx((1 + 0.25) / 2) and m["eval_n"] == 2
    assert m["eval_unboxed"] == 1 / 8 and "eval_length_adjusted" not in m
    assert comparing.metrics_table(m).startswith("accuracy")

    # Beside answers in free text, whose length counts as ever.
    free = Group(example("a"), [answer("Rest.")])
    alone = rar.evaluate(LexicalJudge(), [free])["eval_length_adjusted"]
    m = rar.evaluate(LexicalJudge(), [*groups, free])
    assert m["eval_unboxed"] == 1 / 8 and m["eval_length_adjusted"] == alone


def test_a_boxed_letter_is_not_put_to_the_judge():
    rollouts = [answer(r"\boxed{B}"), answer(r"zebra \boxed{A}"), answer("A zebra.")]
    with Rater() as server:
        method = method_of(LLMJudge(server.url, "m"), "explicit")
        method.score([Group(example("m", METALS), rollouts)])
        assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0] and server.bodies == []


# ------------------------------------------------------------------------- the simulated study


def test_noise_hurts_and_a_rubric_helps():
    quiet = simulate_noise(0.0, groups=60)
    loud = simulate_noise(0.4, groups=60)
    assert quiet["explicit"] == 1.0 > quiet["implicit-like"] > quiet["Likert-like"] > 0.5
    assert all(0.5 < loud[name] < quiet[name] for name in quiet)
    assert loud["explicit"] > loud["Likert-like"]
    assert simulate_noise(0.0, groups=60) == quiet


@pytest.mark.long
def test_the_study_has_its_own_command_line(tmp_path):
    script = ROOT / "tests" / "evidence" / "reproduce_rar.py"
    picture = tmp_path / "noise.png"
    command = [sys.executable, str(script), "--judge_noise", "--plot", str(picture)]
    options = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout and picture.read_bytes()[:4] == b"\x89PNG"
    done = subprocess.run(command[:2], check=False, **options)
    assert done.returncode == 2 and "name a study" in done.stderr


def test_the_two_examples_of_the_repository_are_no_copies():
    keys = []
    for name in ("train", "heldout"):
        examples = rar.read_examples(ROOT / "data" / f"{name}.jsonl")
        keys.append({rar.question_key(e) for e in examples})
    assert not keys[0] & keys[1]
