"""The paper's six designs with a judge over HTTP, and the evaluation that people compare."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from conftest import ROOT
from judge_server import JudgeServer
from reproduce_rar import simulate_noise
from test_train import lines, run

import grpo
import rar
import train
from judge import LLMJudge, NoOfflineRule, OfflineJudge
from rar import Criterion, Example

RUBRIC = [Criterion("Mentions rest.", 5, "Rest", "Essential", "accuracy"), Criterion("Mentions cheese.", -2, "Cheese", "Pitfall", "accuracy"),
          Criterion("Mentions water.", 2, "Water", "Optional", "completeness")]  # fmt: skip


def example(name, rubric=RUBRIC, **more):
    return Example(name, [{"role": "user", "content": f"What helps against {name}?"}], rubric, **more)


def answer(text):
    return grpo.Rollout([1], [2], [0.0], "stop", text)


# ------------------------------------------------------------------------------------------- the six designs


class Rater(JudgeServer):
    """Rates by the number of times "zebra" stands in the response; answers statements by whether it stands there at all."""

    def verdict(self, body):
        text = body["messages"][-1]["content"]
        said = text.count("zebra")
        return json.dumps({"reason": "counted", "rating": min(10, 1 + said)} if "rating" in text[-300:] else {"reason": "looked", "met": said > 0})


@pytest.mark.parametrize("method", rar.METHODS)
def test_every_design_over_http(method):
    e = example("colds", reference="Rest and water.")
    groups = [(e, [answer("bad"), answer("zebra zebra zebra"), answer("zebra")])]
    with Rater() as server:
        rar.RubricReward(LLMJudge(server.url, "m"), method).score(groups)
        prompts = [body["messages"][-1]["content"] for body in server.bodies]
    rewards = [r.reward for r in groups[0][1]]
    if method in ("likert", "reference_likert", "implicit"):
        assert rewards == pytest.approx([0, 3 / 9, 1 / 9]) and len(prompts) == 3
        assert all(("Rest and water." in p) == (method == "reference_likert") for p in prompts)
        assert all(("Essential: Mentions rest." in p and "Pitfall, a fault: Mentions cheese." in p) == (method == "implicit") for p in prompts)
    elif method == "predefined":
        assert rewards == [0, 1, 1] and len(prompts) == 3 * 4
    else:
        expected = {"explicit": [0.9 / 2.2, 1.3 / 2.2, 1.3 / 2.2], "points": [0, 5 / 7, 5 / 7]}[method]
        assert rewards == pytest.approx(expected) and len(prompts) == 3 * len(RUBRIC)
        assert not any("Rest and water." in p for p in prompts)


@pytest.mark.parametrize("method", sorted(set(rar.METHODS) - set(rar.AGGREGATIONS)))
def test_offline_an_opinion_is_refused_in_one_line(tiny, few, tmp_path, capsys, method):
    with pytest.raises(NoOfflineRule, match="needs a language model"):
        rar.RubricReward(OfflineJudge(), method)
    assert run(tiny, few, tmp_path / "run", "--method", method) == 2
    said = capsys.readouterr().err.strip()
    assert "--judge URL" in said and "\n" not in said and not (tmp_path / "run").exists()


def test_a_comparison_with_a_reference_skips_prompts_without_one():
    with Rater() as server:
        method = rar.RubricReward(LLMJudge(server.url, "m"), "reference_likert")
        assert method.eligible(example("a", reference="Rest.")) and not method.eligible(example("b"))


@pytest.mark.parametrize("said", ['{"rating": 11}', '{"rating": 0}', '{"rating": "8"}', '{"rating": NaN}', '{"rating": true}', "8", '{"rating": null}'])
def test_a_rating_that_is_none_is_missing(said):
    class Odd(JudgeServer):
        def verdict(self, body):
            return said

    groups = [(example("colds"), [answer("x")])]
    with Odd() as server:
        rar.RubricReward(LLMJudge(server.url, "m", max_missing=1.0), "likert").score(groups)
    assert groups[0][1][0].verdicts[0].score is None and math.isnan(groups[0][1][0].reward)


# ------------------------------------------------------------------------------------------- the score


def test_the_score_by_hand():
    groups = [
        (example("colds", tags=["theme:care"]), [answer("Rest, water.")]),  # 7 / 7
        (example("coughs", tags=["theme:care"]), [answer("Cheese.")]),  # -2 / 7
        (example("aches", RUBRIC[:2], tags=["theme:pain"]), [answer("Rest and cheese.")]),  # 3 / 5
    ]
    m = rar.evaluate(OfflineJudge(), groups)
    assert m["eval_score"] == pytest.approx((1 - 2 / 7 + 0.6) / 3) and m["eval_n"] == 3 and m["eval_clipped"] == m["eval_score"]
    assert m["eval_axis/accuracy"] == pytest.approx((1 - 2 / 5 + 0.6) / 3) and m["eval_axis/completeness"] == 0.5
    assert (m["eval_n/axis/accuracy"], m["eval_n/axis/completeness"]) == (3, 2)
    assert m["eval_theme/care"] == pytest.approx(5 / 14) and m["eval_theme/pain"] == 0.6 and m["eval_n/theme/care"] == 2
    short = statistics.fmean(0.0299 / 500 * (2000 - len(r.text)) for _, [r] in groups)
    assert m["eval_length_adjusted"] == pytest.approx(m["eval_score"] + short)
    low, high = m["eval_ci"]
    assert low <= m["eval_score"] <= high and m["eval_ci"] == rar.evaluate(OfflineJudge(), groups)["eval_ci"]
    assert "axis completeness" in rar.eval_table(m) and "n 2" in rar.eval_table(m)


def test_a_weak_policy_is_zero_officially_and_still_seen():
    m = rar.evaluate(OfflineJudge(), [(example("colds"), [answer("Cheese.")]), (example("coughs"), [answer("Cheese, water.")])])
    assert m["eval_score"] == pytest.approx(-1 / 7) and m["eval_clipped"] == 0.0


def test_the_official_aggregate_on_real_rows(shared):
    """simple-evals, said plainly: mean over examples that have a score, clipped to [0, 1]; an axis without positives drops out."""
    examples = rar.read_examples(shared("healthbench_200.jsonl"))
    rng, scores, axes, groups = random.Random(0), [], {}, []
    met = {}

    class Coin(OfflineJudge):
        def ask(self, questions, progress=False):
            return [rar.Verdict(float(met[q.statement]), "") for q in questions]

    for e in examples:
        for c in e.rubric:
            met.setdefault(c.text, rng.random() < 0.4)
        groups.append((e, [answer("x")]))
        scores.append(sum(c.weight for c in e.rubric if met[c.text]) / sum(c.weight for c in e.rubric if c.weight > 0))
        for axis in {c.axis for c in e.rubric}:
            mine = [c for c in e.rubric if c.axis == axis]
            possible = sum(c.weight for c in mine if c.weight > 0)
            if possible:
                axes.setdefault(axis, []).append(sum(c.weight for c in mine if met[c.text]) / possible)
    m = rar.evaluate(Coin(), groups)
    assert m["eval_score"] == pytest.approx(sum(scores) / 200, abs=1e-12) and m["eval_clipped"] == pytest.approx(max(0, min(1, sum(scores) / 200)), abs=1e-12)
    for axis, values in axes.items():
        assert m[f"eval_axis/{axis}"] == pytest.approx(sum(values) / len(values), abs=1e-12) and m[f"eval_n/axis/{axis}"] == len(values)


def test_missing_verdicts_leave_an_example_out():
    class Half(OfflineJudge):
        def ask(self, questions, progress=False):
            return [v._replace(score=None) if k == 0 else v for k, v in enumerate(super().ask(questions, progress))]

    m = rar.evaluate(Half(), [(example("a"), [answer("Rest.")]), (example("b"), [answer("Rest, water.")])])
    assert m["eval_n"] == 1 and m["eval_score"] == 1.0 and m["eval_n/axis/accuracy"] == 1 and m["eval_n/axis/completeness"] == 2
    m = rar.evaluate(Half(), [(example("a"), [answer("Rest.")])])
    assert m["eval_n"] == 0 and math.isnan(m["eval_score"]) and math.isnan(m["eval_clipped"])  # unknown is not 0


def test_multiple_choice_is_accuracy_over_questions():
    row = {"id": "m", "question": "Which metal?", "options": {"A": "Iron", "B": "Lead"}, "answer_idx": "B"}
    two = [*rar.choice_examples(row, "f:1"), *rar.choice_examples(row | {"id": "n", "question": "And now?"}, "f:2")]
    right = [answer(f"I think \\boxed{{{e.answer}}}") for e in two[: rar.RUNS]]
    wrong = [answer("\\boxed{Iron}"), answer("It is lead."), answer("\\boxed{lead}"), answer("\\boxed{Z}")]
    m = rar.evaluate(OfflineJudge(), [(e, [a]) for e, a in zip(two, right + wrong)])
    assert m["eval_score"] == pytest.approx((1 + 0.25) / 2) and m["eval_n"] == 2  # a question counts once, however often it was asked
    assert m["eval_unboxed"] == 2 / 8 and "eval_length_adjusted" not in m and rar.eval_table(m).startswith("accuracy")


# ------------------------------------------------------------------------------------------- comparing


def test_compare_pairs_prompts_and_its_interval_is_honest():
    rng, covered = random.Random(0), 0
    for trial in range(100):
        before = [{"id": str(k), "item": str(k), "score": rng.gauss(0, 1)} for k in range(40)]
        after = [{**row, "score": row["score"] + 0.1 + rng.gauss(0, 0.2)} for row in before]
        found = rar.compare(before, after)
        low, high = found["difference_ci"]
        covered += low <= 0.1 <= high
        assert found["n"] == 40 and high - low < 0.3  # pairing takes out the spread between prompts, which is five times as wide
    assert covered >= 85
    with pytest.raises(rar.DataError, match="no scored prompt"):
        rar.compare(before, [{"id": "x", "item": "x", "score": 1.0}])


def test_two_runs_are_compared_from_the_command_line(tiny, few, tmp_path, capsys):
    assert run(tiny, few, tmp_path / "run", "--lr", "0.05") == 0
    capsys.readouterr()
    flags = ["--eval_data", few, "--max_new_tokens", "6"]
    assert train.main(["--eval_only", f"{tiny},{tmp_path / 'run'}", "--out", str(tmp_path / "answers"), *flags]) == 0
    said = capsys.readouterr()
    line = json.loads(said.out)
    assert "minus" in said.err and "paired bootstrap" in said.err and line["n"] == 2
    assert line["difference"] == pytest.approx(line["after"]["eval_score"] - line["before"]["eval_score"], abs=1e-5)
    files = [line[part]["answers"] for part in ("before", "after")]
    assert all(set(row) >= {"id", "item", "score", "verdicts", "text"} for file in files for row in lines(Path(file)))
    assert train.main(["--eval_only", ",".join(files), *flags]) == 0  # saved answers do as well, without any model
    assert json.loads(capsys.readouterr().out)["difference"] == pytest.approx(line["difference"], abs=1e-5)
    assert train.main(["--eval_only", "a,b,c"]) == 2
    assert "one model, or two" in capsys.readouterr().err


def test_the_canary_stays_with_the_answers(tmp_path):
    [row] = rar.result_rows([(example("a", canary="mark"), [answer("x")])])
    assert row["canary"] == "mark" and "canary" not in rar.result_rows([(example("a"), [answer("x")])])[0]


# ------------------------------------------------------------------------------------------- the simulated study


def test_noise_hurts_and_a_rubric_helps(tmp_path, capsys):
    quiet, loud = simulate_noise(0.0, groups=60), simulate_noise(0.4, groups=60)
    assert quiet["explicit"] == 1.0 > quiet["implicit-like"] > quiet["Likert-like"] > 0.5
    assert all(0.5 < loud[name] < quiet[name] for name in quiet) and loud["explicit"] > loud["Likert-like"]
    assert simulate_noise(0.0, groups=60) == quiet
    picture = tmp_path / "noise.png"
    assert rar.main(["--judge_noise", "--plot", str(picture)]) == 0
    assert "simulated" in capsys.readouterr().out and picture.read_bytes()[:4] == b"\x89PNG"


def test_without_the_script_the_studies_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rar, "__file__", str(tmp_path / "rar.py"))
    assert rar.main(["--missing"]) == 2
    assert "reproduce_rar.py" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_the_two_examples_of_the_repository_are_no_copies():
    train_set, heldout = (rar.read_examples(ROOT / "data" / name) for name in ("train.jsonl", "heldout.jsonl"))
    assert not {rar.question_key(e) for e in train_set} & {rar.question_key(e) for e in heldout}


def test_runs_of_one_question_are_one_pair():
    row = lambda name, score: {"id": name, "item": name[0], "score": score}
    found = rar.compare([row("a1", 0), row("a2", 0), row("b1", 0)], [row("a1", 1), row("a2", 0), row("b1", 0)])
    assert found["difference"] == 0.25 and found["n"] == 2


def test_changed_criteria_turn_faults_round():
    said = lambda *scores: {"verdicts": [{"score": s} for s in scores]}
    before, after = ({name: said(*scores) for name in "ab"} for scores in ((0, 1, 1), (0, 0, 1)))
    assert rar.changed_criteria([example("a"), example("b")], before, after) == [("Cheese", 0, 1, 2), ("Rest", 0, 0, 2), ("Water", 1, 1, 2)]


def test_a_boxed_letter_is_not_put_to_the_judge():
    e, *_ = rar.choice_examples({"id": "m", "question": "Which metal?", "options": {"A": "Iron", "B": "Lead"}, "answer_idx": "B"}, "f:1")
    wrong = next(letter for letter in e.options if letter != e.answer)
    groups = [(e, [answer(f"\\boxed{{{e.answer}}}"), answer(f"zebra \\boxed{{{wrong}}}"), answer("A zebra.")])]
    with Rater() as server:
        rar.RubricReward(LLMJudge(server.url, "m")).score(groups)
        assert [r.reward for r in groups[0][1]] == [1.0, 0.0, 1.0] and len(server.bodies) == 1
