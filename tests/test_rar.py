"""Rubrics as Rewards: reading rows, polarity, Eq. 1, missing verdicts, silence."""

import gzip
import json
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from conftest import HEALTHBENCH
from judge_server import JudgeServer

import rar
from judge import JudgeError, LexicalJudge, LLMJudge, Panel, Verdict, offline_judge
from rar import Criterion, DataError, Example, Group, group_rewards

SUMS = {"explicit": rar.explicit_reward, "points": rar.points_reward}


@dataclass
class Rollout:
    text: str
    verdicts: list = field(default_factory=list)
    reward: float = math.nan


RUBRIC = [
    Criterion("States that rest helps a cold.", 5, "Rest", "Essential", "accuracy"),
    Criterion("Mentions drinking water.", 3, "Water", "Important", "completeness"),
    Criterion(
        "Has at most two sentences.",
        1,
        "Short",
        "Optional",
        "instruction_following",
        check="sentences <= 2",
    ),
    Criterion("Recommends antibiotics against a cold.", -4, "Antibiotics", "Pitfall", "accuracy"),
]


def cold(rubric=RUBRIC, name="a"):
    return Example(name, [{"role": "user", "content": "Cold?"}], rubric)


def method_of(judge, name="explicit"):
    return rar.RubricReward(judge, SimpleNamespace(method=name, advantage="std"))


class Given:
    """A judge whose answers are given."""

    def __init__(self, *scores):
        self.scores = scores

    def ask(self, questions, show_progress=False):
        assert len(questions) == len(self.scores)
        return [Verdict(score, "no answer" if score is None else "") for score in self.scores]


# ------------------------------------------------------------------------- rewards


def test_explicit_is_equation_one_with_the_papers_weights():
    for bits in range(16):
        scores = [float(bits >> k & 1) for k in range(4)]
        earned = 1.0 * scores[0] + 0.7 * scores[1] + 0.3 * scores[2] + 0.9 * (1 - scores[3])
        by_hand = earned / (1.0 + 0.7 + 0.3 + 0.9)
        assert rar.explicit_reward(RUBRIC, scores) == pytest.approx(by_hand, abs=1e-12)


def test_contains_rlvr():
    """Remark 1: one criterion of weight 1 is the verifiable reward itself."""
    one = [Criterion("The final answer is 42.", 1, category="Essential")]
    assert [rar.explicit_reward(one, [s]) for s in (0.0, 1.0)] == [0.0, 1.0]


def test_points_worked_vector():
    rubric = [Criterion("", p) for p in (7, 5, 10, -6)]
    assert rar.points_reward(rubric, [1, 0, 1, 1]) == 0.5
    assert rar.points_reward(rubric, [0, 0, 0, 1]) == -6 / 22  # unclipped


@pytest.mark.parametrize("aggregate", SUMS.values())
def test_committing_exactly_one_pitfall_scores_lower(aggregate):
    safe = [1.0, 1.0, 1.0, 0.0]
    unsafe = [1.0, 1.0, 1.0, 1.0]
    assert aggregate(RUBRIC, unsafe) < aggregate(RUBRIC, safe) == 1.0


def own_row():
    items = []
    for c in RUBRIC:
        items.append({"text": c.text, "weight": c.weight, "category": c.category, "check": c.check})
    return {"id": "a", "question": "Cold?", "rubric": items}


def healthbench_row():
    items = []
    for c in RUBRIC:
        items.append({"criterion": c.text, "points": c.weight, "check": c.check})
    prompt = [{"role": "user", "content": "Cold?"}]
    return {"prompt_id": "a", "prompt": prompt, "rubrics": items}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("row", [own_row(), healthbench_row()])
def test_pitfall_costs_reward_through_the_judge_and_every_reader(name, row):
    example = rar.parse_example(row, "x:1")
    safe = Rollout("Rest helps a cold. Try drinking water.")
    recommends = "antibiotics against a cold are what I recommend"
    unsafe = Rollout(f"Rest helps a cold, {recommends}. Try drinking water.")
    method_of(LexicalJudge(), name).score([Group(example, [safe, unsafe])])
    assert [v.score for v in safe.verdicts] == [1, 1, 1, 0]
    assert [v.score for v in unsafe.verdicts] == [1, 1, 1, 1]
    assert unsafe.reward < safe.reward


# ------------------------------------------------------------------------- missing, silence


@pytest.mark.parametrize("name", SUMS)
def test_missing_is_neutral_or_unscored_and_never_zero(name):
    """One missing verdict counts as the group's mean on that criterion; too many: no reward."""
    rubric = [RUBRIC[0], RUBRIC[1], Criterion("Is friendly.", 1, category="Optional"), RUBRIC[3]]
    judge = Given(1.0, 1.0, None, 0.0, 1.0, 0.0, 1.0, 0.0, None, None, None, 0.0)
    rollouts = [Rollout("one"), Rollout("two"), Rollout("three")]
    method_of(judge, name).score([Group(cold(rubric), rollouts)])
    aggregate = SUMS[name]
    # The only other verdict on it is 1.
    assert rollouts[0].reward == aggregate(rubric, [1.0, 1.0, 1.0, 0.0])
    assert rollouts[1].reward == aggregate(rubric, [1.0, 0.0, 1.0, 0.0])
    assert math.isnan(rollouts[2].reward)


def test_half_is_counted_by_weight_and_what_nobody_judged_is_dropped():
    rubric = [Criterion("", 5, category="Essential")]
    rubric += [Criterion("", 1, category="Optional"), Criterion("", 1, category="Optional")]
    heavy, light = group_rewards(rar.explicit_reward, rubric, [[1, None, None], [None, 1, 1]])
    assert heavy == 1.0 and math.isnan(light)
    # Exactly half is enough.
    even = [Criterion("", 2), Criterion("", 2)]
    rewards = group_rewards(rar.points_reward, even, [[1, None], [0, 1]])
    assert rewards == [1.0, 0.5]
    rewards = group_rewards(rar.explicit_reward, rubric, [[1, 1, None], [0, 1, None]])
    assert rewards == [1.0, pytest.approx(0.3 / 1.3)]


def test_a_missing_verdict_among_faults_only_costs_nobody_else_the_reward():
    """A rubric of faults alone: three of four rollouts were judged whole and are scored."""
    faults = [Criterion("", -4), Criterion("", -1)]
    matrix = [[0, 0], [1, 0], [0, 1], [None, 0]]
    *judged, unjudged = group_rewards(rar.explicit_reward, faults, matrix)
    assert judged == [1.0, pytest.approx(0.2), pytest.approx(0.8)]
    assert math.isnan(unjudged)  # a fifth of the weight


def test_without_any_positive_verdict_left_nobody_is_scored():
    rubric = [Criterion("", 1), Criterion("", -5)]
    assert all(map(math.isnan, group_rewards(rar.explicit_reward, rubric, [[None, 0], [None, 1]])))


@pytest.mark.parametrize("name", SUMS)
def test_silence_earns_nothing(name):
    silent = Rollout("  ")
    method_of(LexicalJudge(), name).score([Group(cold(), [silent])])
    assert silent.reward == 0.0


def test_silence_earns_the_least_of_its_group():
    rubric = [Criterion("Mentions rest.", 1), Criterion("Mentions cheese.", -3)]
    talks = Rollout("Cheese.")
    good = Rollout("Rest.")
    silent = Rollout("\n")
    method_of(LexicalJudge(), "points").score([Group(cold(rubric), [talks, good, silent])])
    assert (talks.reward, good.reward, silent.reward) == (-3.0, 1.0, -3.0)
    # Unscored answers say nothing about what silence deserves.
    assert rar.silence_rule([talks, silent], [math.nan])[1] == 0.0
    assert rar.silence_rule([silent, good], [0.5]) == [0.0, 0.5]
    assert rar.silence_rule([silent, silent], []) == [0.0, 0.0]


def test_silence_does_not_stand_in_for_a_missing_verdict():
    """The mean on the second criterion is that of the two answers, not of silence as well."""
    rubric = [Criterion("Mentions rest.", 3), Criterion("Mentions water.", 1)]
    judge = Given(1.0, None, 1.0, 1.0, 0.0, 0.0)
    rollouts = [Rollout("one"), Rollout("two"), Rollout(" ")]
    method_of(judge, "points").score([Group(cold(rubric), rollouts)])
    assert [rollout.reward for rollout in rollouts] == [1.0, 1.0, 0.0]


# ------------------------------------------------------------------------- the flat batch


def test_one_flat_batch_and_a_model_is_asked_identical_questions_once():
    sizes = []

    class Counting(LLMJudge):
        def ask(self, questions, show_progress=False):
            sizes.append(len(questions))
            return super().ask(questions, show_progress)

    a = Example("a", [{"role": "user", "content": "Cold a?"}], RUBRIC)
    b = Example("b", [{"role": "user", "content": "Cold b?"}], RUBRIC)
    first = Group(a, [Rollout("same"), Rollout("same"), Rollout("other")])
    groups = [first, Group(b, [Rollout("same")])]
    with JudgeServer() as server:
        method_of(Counting(server.url, "model")).score(groups)
        # The check is decided without the judge; a/same, a/other, b/same are three responses.
        judged = len(RUBRIC) - 1
        assert sizes == [4 * judged] and len(server.bodies) == 3 * judged
    assert first.rollouts[0].verdicts == first.rollouts[1].verdicts
    assert [v.score for v in first.rollouts[0].verdicts][2] == 1.0


@pytest.mark.parametrize("offline", [LexicalJudge, offline_judge])
def test_a_panel_is_asked_for_an_opinion_only_if_all_of_it_has_one(offline):
    model = LLMJudge("http://127.0.0.1:9/v1", "m")
    other = LLMJudge("http://127.0.0.1:9/v1", "other")
    for judges in ([model, offline()], [offline(), model]):
        with pytest.raises(JudgeError, match="--method likert needs a language model's opinion"):
            method_of(Panel(judges), "likert")
        method_of(Panel(judges), "points")
    method_of(Panel([model, other]), "likert")


def test_a_check_is_decided_whichever_judge_is_used():
    """A server that holds every statement to be false is not asked about the sentences."""

    class No(JudgeServer):
        def verdict(self, body):
            assert "two sentences" not in json.dumps(body)
            return json.dumps({"reason": "no", "met": False})

    short = Rollout("One. Two.")
    long = Rollout("One. Two. Three.")
    with No() as server:
        method_of(LLMJudge(server.url, "model")).score([Group(cold(), [short, long])])
    assert [v.score for v in short.verdicts] == [0, 0, 1, 0]
    assert [v.score for v in long.verdicts] == [0, 0, 0, 0]


def test_a_check_knows_the_question():
    criterion = Criterion("Copies little of the question.", 1, check="copied <= 0.5")
    question = "Which metal conducts electric current best in household cables?"
    example = Example("a", [{"role": "user", "content": question}], [criterion])
    copied = Rollout(question)
    own = Rollout("Silver leads the list, though copper costs far less.")
    method_of(LexicalJudge()).score([Group(example, [copied, own])])
    assert [copied.reward, own.reward] == [0.0, 1.0]


def test_judged_by_other_criteria_than_the_examples_own():
    groups = [
        Group(cold(), [Rollout("Rest helps a cold."), Rollout("No.")]),
        Group(cold(), [Rollout("Drinking water.")]),
    ]
    rubrics = [RUBRIC[:1], RUBRIC[1:3]]
    rar.judge_groups(LexicalJudge(), groups, rubrics, rar.criterion_questions)
    rollouts = [*groups[0].rollouts, *groups[1].rollouts]
    assert [[v.score for v in r.verdicts] for r in rollouts] == [[1.0], [0.0], [1.0, 1.0]]
    assert [r.criteria for r in rollouts] == [RUBRIC[:1], RUBRIC[:1], RUBRIC[1:3]]
    with pytest.raises(ValueError):
        rar.judge_groups(LexicalJudge(), groups, [RUBRIC], rar.criterion_questions)


def test_the_order_of_rollouts_does_not_matter():
    texts = ["Rest helps a cold.", "Drink water.", "No."]
    forward = [Rollout(text) for text in texts]
    backward = [Rollout(text) for text in texts[::-1]]
    method_of(LexicalJudge()).score([Group(cold(), forward)])
    method_of(LexicalJudge()).score([Group(cold(), backward)])
    assert [r.reward for r in forward] == [r.reward for r in backward][::-1]


def test_advantages_compare_within_the_group_only():
    groups = [
        Group(cold(), [Rollout("a", reward=1.0), Rollout("b", reward=0.0)]),
        Group(cold(), [Rollout("a", reward=0.5), Rollout("b", reward=math.nan)]),
    ]
    method_of(LexicalJudge()).set_advantages(groups)
    assert [r.advantage for r in groups[0].rollouts] == [1.0, -1.0]
    assert [r.advantage for r in groups[1].rollouts] == [0.0, 0.0]


def test_a_good_avoids_is_not_broken_by_staying_on_the_subject():
    criterion = Criterion("Avoids claiming that a sore throat needs antibiotics.", 2)
    rollout = Rollout("Warm tea soothes a sore throat.")
    method_of(LexicalJudge()).score([Group(cold([criterion]), [rollout])])
    assert rollout.verdicts[0].score == 1.0


def test_reading_and_scoring_do_not_load_torch(fork):
    """Counting words on a laptop must not wait for a deep-learning library."""
    import subprocess
    import sys

    code = "import rar, sys; rar.demo(); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=fork, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Eq. 1" in done.stdout


# ------------------------------------------------------------------------- reading rows


GOOD = {
    "id": "a",
    "question": "What helps?",
    "reference": "Rest.",
    "rubric": [
        {
            "title": "Rest",
            "text": "States that rest helps.",
            "category": "Essential",
            "weight": 5,
            "axis": "accuracy",
        }
    ],
}


def with_criterion(**change):
    return {**GOOD, "rubric": [{**GOOD["rubric"][0], **change}]}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
    return path


def test_our_own_format(tmp_path):
    rich = with_criterion(tags=["level:x"], check="words <= 40", title=7)
    rich |= {"reference": 42, "topic": "life", "canary": "a mark"}
    [e] = rar.read_examples(write(tmp_path / "a.jsonl", rich))
    assert (e.id, e.question, e.reference, e.canary) == ("a", "What helps?", "42", "a mark")
    assert e.tags == ["theme:life"]
    [c] = e.rubric
    assert (c.title, c.category, c.weight, c.axis) == ("7", "Essential", 5.0, "accuracy")
    assert (c.tags, c.check) == (["level:x"], "words <= 40")


def test_healthbench(tmp_path):
    [e] = rar.read_examples(write(tmp_path / "a.jsonl", HEALTHBENCH))
    assert (e.id, e.question, len(e.prompt)) == ("hb-1", "My head hurts.", 3)
    assert (e.reference, e.canary) == ("How long has it hurt?", "a mark")
    assert [(c.weight, c.axis) for c in e.rubric] == [(5, "context_awareness"), (-9, "accuracy")]
    assert e.rubric[1].tags == ["level:cluster", "axis:accuracy", "cluster:pain"]
    assert e.tags == ["theme:context_seeking", "physician_agreed_category:not-enough-context"]
    plain = HEALTHBENCH | {"ideal_completions_data": None}
    [e] = rar.read_examples(write(tmp_path / "b.jsonl", plain))
    assert e.reference == ""


def test_healthbench_rows_agree_with_a_plain_computation(shared):
    path = shared("healthbench_200.jsonl")
    examples = rar.read_examples(path)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(examples) == len(rows) == 200
    rng = random.Random(0)
    for example, row in zip(examples, rows):
        assert [m["content"] for m in example.prompt] == [m["content"] for m in row["prompt"]]
        met = [float(rng.random() < 0.5) for _ in row["rubrics"]]
        points = [r["points"] for r in row["rubrics"]]
        got = sum(p * m for p, m in zip(points, met))
        possible = sum(p for p in points if p > 0)
        assert rar.points_reward(example.rubric, met) == pytest.approx(got / possible, abs=1e-12)

        for axis, score in rar.axis_scores(example.rubric, met).items():
            mine = [
                (r["points"], m)
                for r, m in zip(row["rubrics"], met)
                if f"axis:{axis}" in r["tags"]
            ]
            earned = sum(p * m for p, m in mine) / sum(p for p, m in mine if p > 0)
            assert score == pytest.approx(earned, abs=1e-12)
        tagged = sum("axis:accuracy" in r["tags"] for r in row["rubrics"])
        assert sum(c.axis == "accuracy" for c in example.rubric) == tagged
        assert all(c.axis in rar.AXES for c in example.rubric)


@pytest.mark.parametrize(
    "row, words",
    [
        ("{oops", "not a line of JSON"),
        ("[1, 2]", "not an object"),
        ({**GOOD, "question": ""}, "no prompt"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "'role' and 'content'"),
        ({**GOOD, "rubric": []}, "no rubric"),
        ({**GOOD, "rubric": ["text"]}, "criterion 1: a str"),
        (with_criterion(text=" "), "criterion 1: no text"),
        (with_criterion(weight="five"), "weight 'five'"),
        (with_criterion(weight=math.nan), "weight nan"),
        (with_criterion(weight=math.inf), "weight inf"),
        (with_criterion(weight=0), "weight 0"),
        (with_criterion(weight=2e9), "at most 1e9 in size"),
        ({**GOOD, "prompt": [{"role": "system", "content": "Be kind."}]}, "must end with"),
        ({**GOOD, "prompt": [{"role": "user", "content": " "}]}, "must end with"),
        ({**GOOD, "prompt": HEALTHBENCH["prompt"][:2]}, "must end with a message of the user"),
        (
            {**GOOD, "rubric": [*GOOD["rubric"], {"text": "Is short.", "weight": 5}]},
            "1 of 2 criteria have a category",
        ),
        (with_criterion(weight=True), "weight True"),
        (with_criterion(category="Vital"), "category 'Vital'"),
        (with_criterion(weight=-3), "a Pitfall names a fault"),
        (with_criterion(weight=-3, category=""), "no criterion with a positive weight"),
        (with_criterion(axis=3), "criterion 1: a value of the wrong kind"),
        (with_criterion(tags=[3]), "criterion 1: a value of the wrong kind"),
        ({**GOOD, "example_tags": 3}, "a value of the wrong kind"),
        ({**GOOD, "reference": ["Rest."]}, "a value of the wrong kind"),
        (with_criterion(check="words =< 40"), "words"),
        (with_criterion(check="rhymes"), "ends_complete"),
        (with_criterion(check=3), "a value of the wrong kind"),
    ],
)
def test_bad_rows_name_file_line_and_remedy(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", {**GOOD, "id": "first"}, "", row)
    with pytest.raises(DataError, match="rows.jsonl:3: ") as error:
        rar.read_examples(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_empty_missing_and_duplicate(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        rar.read_examples(empty)
    with pytest.raises(DataError, match="no such file"):
        rar.read_examples(tmp_path / "none.jsonl")
    twice = write(tmp_path / "twice.jsonl", GOOD, GOOD)
    message = "twice.jsonl:2: id 'a' is already in .*twice.jsonl:1;"
    with pytest.raises(DataError, match=message):
        rar.read_examples(twice)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a line of JSON"):
        rar.read_examples(binary)


def test_any_language_and_odd_separators_survive(tmp_path):
    text = "Was hilft?\u2028Что помогает? \x85 何が\u2029 عربي"
    path = tmp_path / "rows.jsonl"
    line = json.dumps({**GOOD, "question": text}, ensure_ascii=False)
    path.write_text(line + "\r\n", encoding="utf8", newline="")
    [example] = rar.read_examples(path)
    assert example.question == text


def test_files_of_every_kind(tmp_path):
    write(tmp_path / "one.jsonl", GOOD)
    two = [GOOD | {"id": "b"}, GOOD | {"id": "c"}]
    (tmp_path / "two.json").write_text(json.dumps(two))
    with gzip.open(tmp_path / "three.jsonl.gz", "wt") as file:
        file.write(json.dumps(HEALTHBENCH) + "\n")
    (tmp_path / "notes.txt").write_text("not a row")
    assert len(rar.read_examples(tmp_path)) == 4  # the folder
    for name, n in (("one.jsonl", 1), ("two.json", 2), ("three.jsonl.gz", 1)):
        assert len(rar.read_examples(tmp_path / name)) == n
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(DataError, match="object.json: not a list"):
        rar.read_examples(tmp_path / "object.json")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(DataError, match="broken.json: not JSON; a .json file must hold one list"):
        rar.read_examples(tmp_path / "broken.json")


def test_a_prompt_may_end_with_what_a_tool_said(tmp_path):
    said = [*HEALTHBENCH["prompt"][:2], {"role": "tool", "content": "39 degrees"}]
    [example] = rar.read_examples(write(tmp_path / "a.jsonl", {**GOOD, "prompt": said}))
    assert example.question == "39 degrees"


RELEASED = [{"title": "T", "description": "Essential Criteria: Names vitamin C.", "weight": 5}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What treats scurvy?", "reference_answer": "", "rubric": RELEASED},
        {
            "prompt": [{"role": "user", "content": "Plan a trip."}],
            "Rubrics": [{"criterion": "Names a city.", "points": 4}],
        },
        {"prompt": "Plan a meal.", "reward_model": {"rubrics": []}},
        {"question": "Which metal?", "options": {"A": "Iron", "B": "Lead"}, "answer_idx": "B"},
        {"Question": "Which?", "Correct Answer": "Lead", "Incorrect Answer 1": "Iron"},
    ],
)
def test_a_row_of_another_format_names_the_command_that_converts_it(tmp_path, row):
    path = write(tmp_path / "their rows.jsonl", row)
    with pytest.raises(DataError) as error:
        rar.read_examples(path)
    assert f"python data/prepare.py '{path}' --out rows.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_a_table_names_the_command_that_converts_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"python data/prepare.py {path} --out"):
        rar.read_examples(path)


@pytest.mark.parametrize("name", ["two.parquet", "two.csv", "two.tsv"])
def test_a_table_in_a_folder_is_not_passed_over(tmp_path, name):
    write(tmp_path / "one.jsonl", GOOD)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=name):
        rar.read_examples(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "Never tells the reader when to see a doctor.",
        "The response never clearly mentions emergency care.",
        "Never once asks about allergies.",
        "The medication should be doubled.",
        "The infection must be left alone.",
        "The immune response should be suppressed.",
    ],
)
def test_a_fault_that_sounds_like_a_duty_is_never_paid_for(tmp_path, text):
    assert not rar.names_avoidance(text)
    fault = {"text": text, "weight": 4, "category": "Pitfall"}
    row = {**GOOD, "rubric": [*GOOD["rubric"], fault]}
    with pytest.raises(DataError, match="criterion 2: a Pitfall names a fault .*'Avoids'"):
        rar.read_examples(write(tmp_path / "a.jsonl", row))


def test_a_title_tells_of_a_denial_only(tmp_path):
    """The title of a pitfall decides what its text leaves open, and nothing else."""
    title = "Avoids Unrelated Drugs"
    denial = {"text": "Does not mention ibuprofen.", "weight": 2, "category": "Pitfall"}
    row = {**GOOD, "rubric": [*GOOD["rubric"], denial | {"title": title}]}
    [example] = rar.read_examples(write(tmp_path / "a.jsonl", row))
    assert example.rubric[-1].weight == 2

    # A fault that is named stays one, and a denial without a title may be an omission.
    fault = {"text": "Mentions ibuprofen.", "weight": 2, "category": "Pitfall", "title": title}
    for item in (fault, denial, denial | {"title": "Omits Ibuprofen"}):
        row = {**GOOD, "rubric": [*GOOD["rubric"], item]}
        with pytest.raises(DataError, match="criterion 2: a Pitfall names a fault"):
            rar.read_examples(write(tmp_path / "a.jsonl", row))


def test_a_name_of_the_hub_names_the_command_that_converts_it():
    with pytest.raises(DataError, match="python data/prepare.py someone/rows:test --out"):
        rar.read_examples("someone/rows:test")


def test_a_question_in_two_files_is_reported(tmp_path, capsys):
    other = {**GOOD, "id": "other", "question": "  what HELPS? "}
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "test.jsonl", other)
    assert len(rar.read_examples(tmp_path)) == 2
    assert "1 questions are in more than one file" in capsys.readouterr().err
    rar.read_examples(write(tmp_path / "same.jsonl", GOOD, other))
    assert "in more than one" not in capsys.readouterr().err  # within one file it is no leak


def test_labels_of_physicians_are_no_prompts(tmp_path):
    row = {"prompt": HEALTHBENCH["prompt"], "completion": "x", "rubric": "Asks how long."}
    with pytest.raises(DataError, match="meta-evaluation"):
        rar.read_examples(write(tmp_path / "a.jsonl", row | {"binary_labels": [True, False]}))


def test_prompts_of_one_question_share_its_id():
    one = cold(name="m#1")
    one.tags = ["theme:metals", "question:m"]
    assert one.question_id == "m" and cold(name="n").question_id == "n"


def test_options_in_another_order_are_the_same_question():
    one = cold(name="m#1")
    other = cold(name="m#2")
    one.prompt = [{"role": "user", "content": "Which metal?\n\n(A) Iron\n(B) Lead"}]
    other.prompt = [{"role": "user", "content": "which metal?\n\n(A) Lead\n(B) Iron"}]
    assert rar.question_key(one) != rar.question_key(other)  # of two questions it is no order
    one.tags = other.tags = ["question:m"]
    assert rar.question_key(one) == rar.question_key(other)


def test_bootstrap_covers_and_is_repeatable():
    rng = random.Random(1)
    hits = 0
    for _ in range(200):
        values = [rng.gauss(0.3, 1) for _ in range(40)]
        low, high = rar.bootstrap(values, resamples=400)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert rar.bootstrap([0.1, 0.5, 0.9]) == rar.bootstrap([0.1, 0.5, 0.9])
    assert all(math.isnan(x) for x in rar.bootstrap([1.0]))
