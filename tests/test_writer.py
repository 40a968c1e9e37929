"""Rubrics that a model writes, from a real server that answers as a model would, well and badly."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from judge_server import JudgeServer, http

import rar
import rler
from judge import LLMJudge
from tools import write_rubrics as tool

COLD = {
    "id": "cold",
    "question": "What helps against a cold?",
    "reference": "Rest and drink plenty of fluids until the cold has passed, "
    "and see a doctor after ten days.",
}
SKY = {"id": "sky", "question": "Why is the sky blue?"}
MINE = {"id": "mine", "question": "Why?", "rubric": [{"text": "States A.", "weight": 1}]}


def item(k, **changes):
    good = {
        "title": f"Point {k}",
        "description": f"States fact number {k} about the subject.",
        "category": "Important",
        "weight": 3,
        "axis": "accuracy",
    }
    return good | changes


def rubric(*changed, n=7):
    """n items, the first one Essential, the last ones replaced by those given."""
    items = [item(0, category="Essential", weight=5)]
    for k in range(1, n):
        items.append(item(k))
    return [*items[: n - len(changed)], *changed]


def answer(items):
    return json.dumps({"rubric": items})


class Writer(JudgeServer):
    """Gives the answers that `said` holds for a question, one after the other; then a good one."""

    def __init__(self, said=None, **settings):
        super().__init__(**settings)
        self.said = said or {}

    def verdict(self, body):
        prompt = body["messages"][0]["content"]
        for question, answers in self.said.items():
            if question in prompt and answers:
                return answers.pop(0)
        return answer(rubric())


def write(server, questions, out):
    judge = LLMJudge(server.url, "m")
    task = tool.writer_task("medicine")
    return tool.write_rubrics(judge, task, str(questions), str(out), show_progress=False)


def main(server, questions, out, *more):
    flags = ["--judge", server.url, "--judge_model", "m", "--out", str(out), *more]
    return tool.main([str(questions), *flags])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(path):
    """The ids in a file of rubrics; rows are written in the order in which answers arrive."""
    return sorted(example.id for example in rar.read_examples(path))


@pytest.fixture
def questions(tmp_path):
    return write_rows(tmp_path / "questions.jsonl", [COLD, SKY])


def test_rubrics_are_written_in_the_format_that_is_read(questions, tmp_path, capsys):
    out = tmp_path / "rubrics.jsonl"
    fault = "Recommends antibiotics against a cold."
    pitfall = item(9, description=fault, category="Pitfall", weight=-2)
    with Writer({"What helps": ["Here: " + answer(rubric(pitfall))]}) as server:
        assert main(server, questions, out) == 0
        prompts = {body["messages"][0]["content"] for body in server.bodies}
    report = json.loads(capsys.readouterr().out)
    assert report["written"] == 2
    assert report["dropped"] == []
    assert report["already_there"] == 0

    examples = {example.id: example for example in rar.read_examples(out)}
    assert examples["cold"].rubric[-1].weight == -2
    assert examples["cold"].rubric[-1].text == fault
    assert examples["cold"].reference == COLD["reference"]
    assert len(examples["sky"].rubric) == 7

    with_reference, without = sorted(prompts, key=lambda prompt: "sky" in prompt)
    assert "A reference answer" in with_reference
    assert COLD["reference"] in with_reference
    assert "Do not copy sentences of the reference answer." in with_reference
    assert "eference" not in without.partition("7 to 20")[0]
    assert "Do not copy" not in without


@pytest.mark.parametrize(
    "text, away",
    [
        ("Gives the reference range of serum potassium.", False),
        ("Names the frame of reference.", False),
        ("Agrees with the reference.", True),
        ("Says what the reference answer says.", True),
    ],
)
def test_items_that_point_away(text, away):
    assert bool(tool.POINTS_AWAY.search(text)) == away


@pytest.mark.parametrize(
    "broken, why",
    [
        (rubric()[:6], "7 to 20 items, not 6"),
        (rubric(n=21), "7 to 20 items, not 21"),
        (rubric({"title": "T", "description": "D."}), "must have exactly the keys"),
        (rubric(item(1, title=3)), "must have exactly the keys"),
        (rubric("text"), "must have exactly the keys"),
        (rubric(item(1, category="Vital")), "category 'Vital'"),
        (rubric(item(1, weight=-3)), "a Pitfall names a fault"),
        (rubric(item(1, weight=9)), "weight 9 does not go with Important"),
        (rubric(item(1, axis="style")), "axis 'style'"),
        (rubric(item(1, title="One two three four five six seven")), "two to four words"),
        (rubric(item(1, description="Agrees with the reference answer.")), "cannot be checked alone"),
        (
            rubric(item(1, description="Avoids antibiotics.", category="Pitfall", weight=-1)),
            "must name the mistake itself",
        ),
        (
            rubric(item(1, description="Does not say when.", category="Pitfall", weight=-1)),
            "must name the mistake itself",
        ),
        (
            rubric(item(1, description="Warns against smoking.", category="Pitfall", weight=-1)),
            "must name the mistake itself",
        ),
        (rubric(item(1, description=COLD["reference"])), "copies 12 words or more"),
        (rubric(item(1), item(1)), "stands there twice"),
        ([item(k) for k in range(7)], "no Essential item"),
        # What no float can hold, and what no file can hold.
        (rubric(item(1, weight=10**400)), "weight"),
        (rubric(item(1, description="States \ud800 that.")), "half of a surrogate pair"),
    ],
)
def test_a_broken_rubric_is_asked_for_once_more_then_dropped_and_reported(
    questions, tmp_path, broken, why
):
    out = tmp_path / "rubrics.jsonl"
    with Writer({"What helps": [answer(broken)] * 2}) as server:
        report = write(server, questions, out)
        corrections = []
        for body in server.bodies:
            if len(body["messages"]) == 3:
                corrections.append(body["messages"][2]["content"])
    assert list(report.dropped) == ["cold"]
    assert report.written == 1
    assert len(corrections) == 1
    assert why in corrections[0]
    assert why in report.dropped["cold"]
    assert sum(report.refused.values()) == 2
    assert ids(out) == ["sky"]

    # The next run asks only for what is not there.
    with Writer() as server:
        report = write(server, questions, out)
        assert report.written == 1
        assert report.already_there == 1
        assert len(server.bodies) == 1
    assert ids(out) == ["cold", "sky"]


def test_an_answer_in_another_shape_is_dropped_with_its_reason(questions, tmp_path, capsys):
    """A bare list of items, say: the user is told what the model was told, and what it had said."""
    said = [json.dumps(rubric(item(0, title="T\u001b[2J" + "x" * 200), n=1))] * 2
    with Writer({"What helps": said}) as server:
        assert main(server, questions, tmp_path / "o.jsonl") == 0
    error = capsys.readouterr().err
    assert 'no usable answer (unparsable): "rubric" must be a list of 7 to 20 items, not 0' in error
    assert '; read was {"title": "T\\u001b[2Jxxx' in error
    assert error.count("\n") == 1 and len(error) < 300
    assert "\x1b" not in error

    with Writer({"What helps": ["I cannot."] * 2}) as server:
        assert main(server, questions, tmp_path / "p.jsonl") == 0
    assert "no usable answer (unparsable): it holds no JSON object\n" in capsys.readouterr().err


def test_a_question_that_stands_twice_is_asked_once_and_written_twice(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [SKY, SKY | {"id": "air"}])
    with Writer() as server:
        report = write(server, path, tmp_path / "out.jsonl")
        assert report.written == 2
        assert not report.dropped
        assert len(server.bodies) == 1
    assert ids(tmp_path / "out.jsonl") == ["air", "sky"]


def test_more_than_a_batch_the_domain_and_the_canary(tmp_path):
    n = tool.BATCH + 8
    rows = [{"id": f"q{k}", "question": f"Why {k}?", "canary": "mark"} for k in range(n)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    out = tmp_path / "out.jsonl"
    with Writer() as server:
        assert main(server, path, out, "--domain", "science") == 0
        role = json.loads((ROOT / "data" / "rubric_domains.json").read_text())["science"]["role"]
        assert len(server.bodies) == n
        assert all(role in body["messages"][0]["content"] for body in server.bodies)
    assert ids(out) == sorted(row["id"] for row in rows)
    assert {example.canary for example in rar.read_examples(out)} == {"mark"}


def test_nobody_is_a_physician_unless_asked(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "How do I brew tea?"}])
    roles = {name: about["role"] for name, about in tool.domains().items()}
    for flags, name in (([], "general"), (["--domain", "medicine"], "medicine")):
        with Writer() as server:
            assert main(server, path, tmp_path / f"{name}.jsonl", *flags) == 0
            [body] = server.bodies
        assert body["messages"][0]["content"].startswith(f"You are {roles[name]}.")
    assert "physician" not in roles["general"]


def test_a_domain_of_ones_own_is_one_more_entry(tmp_path, fork):
    write_rows(tmp_path / "q.jsonl", [{"question": "How do I brew tea?"}])
    place = fork / "data" / "rubric_domains.json"
    entries = json.loads(place.read_text())
    cook = {"role": "a cook who trains cooks", "look": "taste"}

    def run(text):
        place.write_text(text)
        with Writer() as server:
            command = [sys.executable, fork / "tools" / "write_rubrics.py", tmp_path / "q.jsonl"]
            command += ["--out", tmp_path / "o.jsonl", "--domain", "cooking"]
            command += ["--judge", server.url, "--judge_model", "m"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done, server.bodies

    for text, words in (
        ('{"cooking": {"role": "a cook",}}', "data/rubric_domains.json: not JSON"),
        ("[1]", "not an object of names"),
        ('{"cooking": {"role": "a cook"}}', "'cooking' needs \"role\" and \"look\""),
        ('{"cooking": 3}', "'cooking' needs \"role\" and \"look\""),
    ):
        done, asked = run(text)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not asked
        assert words in done.stderr

    done, asked = run(json.dumps(entries | {"cooking": cook}))
    assert done.returncode == 0
    prompt = asked[0]["messages"][0]["content"]
    assert prompt.startswith("You are a cook who trains cooks.") and "Look at taste." in prompt


# ---------------------------------------------------------------------------- the file it writes to


def test_what_others_wrote_into_the_file_is_kept(questions, tmp_path):
    """A whole row without its newline stays; half a row of ours goes."""
    out = tmp_path / "rubrics.jsonl"
    for text, expected in (
        (json.dumps(MINE), ["cold", "mine", "sky"]),
        (json.dumps(MINE) + '\n{"id": "co', ["cold", "mine", "sky"]),
        ('{"id": "co', ["cold", "sky"]),
        ('{"i', ["cold", "sky"]),
    ):
        out.write_text(text)
        with Writer() as server:
            assert write(server, questions, out).written == 2
        assert ids(out) == expected


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("x.jsonl", '{"prompt_id": "x"}\n', "x.jsonl:1: not a row that was written here"),
        ("x.jsonl", "my notes, without a newline", "x.jsonl:1: not a row that was written here"),
        ("x.jsonl", '{"id": "a", "question": "Why?"}\n', "x.jsonl:1: not a row"),
        ("x.jsonl", '{"id": "a", "question": "Why?"}', "x.jsonl:1: not a row"),
        ("x.jsonl", json.dumps(MINE) + "\nand a last line", "x.jsonl:2: not a row"),
        ("x.jsonl", json.dumps(MINE) + '\n{"prompt": "cut', "x.jsonl:2: not a row"),
        ("x.jsonl", "[" * 100_000, "x.jsonl:1: not a row"),
        ("notes.md", "# Notes\nthe last line", "name a .jsonl file"),
        ("x.jsonl.gz", "", "name a .jsonl file"),
    ],
)
def test_a_file_of_somebody_elses_is_not_touched(questions, tmp_path, capsys, name, text, words):
    out = tmp_path / name
    out.write_text(text)
    with Writer() as server:
        assert main(server, questions, out) == 2
        # Nothing is paid for, either.
        assert not server.bodies
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert out.read_text() == text


def test_the_questions_own_file_is_not_written_to(questions, capsys):
    before = questions.read_bytes()
    with Writer() as server:
        assert main(server, questions, questions) == 2
    assert "not a row that was written here" in capsys.readouterr().err
    assert questions.read_bytes() == before


def test_a_line_cut_off_by_a_kill_is_written_again(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [COLD])
    out = tmp_path / "rubrics.jsonl"
    with Writer() as server:
        write(server, path, out)
        row = out.read_bytes()
        whole = json.dumps(MINE).encode() + b"\n" + row
        for n_left in range(0, len(row), 50):
            out.write_bytes(whole[: len(whole) - len(row) + n_left])
            write(server, path, out)
            assert out.read_bytes() == whole


def test_two_at_a_time_are_refused(questions, tmp_path, capsys):
    out = tmp_path / "rubrics.jsonl"
    first = tool.Output(out)
    with open(out, "ab", buffering=0) as file:
        first.start(file)
        with Writer() as server:
            assert main(server, questions, out) == 2
            assert not server.bodies
        assert "another process writes to it" in capsys.readouterr().err
        first.append(MINE)
    assert ids(out) == ["mine"]


def test_what_grew_since_it_was_checked_is_not_cut(tmp_path):
    out = tmp_path / "rubrics.jsonl"
    out.write_text('{"id": "co')
    output = tool.Output(out)
    out.write_text('{"id": "cold", "rubric": []}\n')
    with open(out, "ab", buffering=0) as file, pytest.raises(rar.DataError, match="another process"):
        output.start(file)
    assert out.read_text() == '{"id": "cold", "rubric": []}\n'


def start_tool(server, questions, out, **options):
    command = [sys.executable, ROOT / "tools" / "write_rubrics.py", questions, "--out", out]
    command += ["--judge", server.url, "--judge_model", "m"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, **options)


def hear_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_kill_in_the_middle_loses_at_most_the_calls_under_way(tmp_path, how, status):
    rows = [{"id": f"q{k}", "question": f"Why number {k}?"} for k in range(60)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    out = tmp_path / "out.jsonl"

    class Uneven(Writer):
        """Half of the questions are never answered: the batch cannot end before the kill."""

        def verdict(self, body):
            self.delay = 0.01
            if any(f"number {k}?" in body["messages"][0]["content"] for k in range(0, 60, 2)):
                self.delay = 60
            return super().verdict(body)

    with Uneven() as server:
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children inherit that.
        process = start_tool(server, path, out, preexec_fn=hear_interrupts)
        until = time.monotonic() + 60
        while time.monotonic() < until and not (out.exists() and out.read_bytes().count(b"\n") == 30):
            time.sleep(0.05)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status
        # The line of a stop; a kill says nothing.
        assert error.count(b"\n") == (how == signal.SIGINT)
    # Every question that was answered is in the file, though none of the batch was at its end.
    assert ids(out) == sorted(f"q{k}" for k in range(1, 60, 2))

    with Writer() as server:
        report = write(server, path, out)
        assert report.already_there == 30
        assert len(server.bodies) == 30
    assert ids(out) == sorted(row["id"] for row in rows)


def test_a_full_disk_leaves_whole_rows(tmp_path):
    rows = [{"id": f"q{k}", "question": f"Why number {k}?"} for k in range(20)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    out = tmp_path / "out.jsonl"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    with Writer() as server:
        process = start_tool(server, path, out, preexec_fn=limit)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert error.count(b"\n") == 1
        assert 0 < len(ids(out)) < 20
        # Once there is room, the same command goes on.
        report = write(server, path, out)
    assert report.written + report.already_there == 20


def test_a_judge_that_fails_in_between_loses_nothing_that_was_paid(tmp_path, capsys):
    rows = [{"id": f"q{k}", "question": f"Why number {k}?"} for k in range(12)]
    path = write_rows(tmp_path / "q.jsonl", rows)
    out = tmp_path / "out.jsonl"

    class Closing(Writer):
        """The account runs dry after six answers."""

        async def answer(self, head, body):
            if len(self.bodies) > 6:
                self.status = 402
            return await super().answer(head, body)

    with Closing() as server:
        judge = LLMJudge(server.url, "m", workers=1)
        with pytest.raises(tool.JudgeError):
            tool.write_rubrics(judge, tool.writer_task("medicine"), str(path), str(out), False)
    assert len(ids(out)) == 6


# ---------------------------------------------------------------------------- answers


def test_an_answer_that_is_cut_off_is_asked_for_again_with_fewer_items(questions, tmp_path):
    class Short(Writer):
        """A server whose answers end at its limit, unless few items are asked for."""

        async def answer(self, head, body):
            prompt = body["messages"][0]["content"]
            if "What helps" in prompt and "cut off" not in prompt:
                self.script = ["cut"]
            return await super().answer(head, body)

    with Short() as server:
        report = write(server, questions, tmp_path / "out.jsonl")
        prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert report.written == 2
    assert not report.dropped
    assert not report.refused
    # Cold: at the usual length, at four times, then shorter. Sky: once.
    assert sum("What helps" in prompt for prompt in prompts) == 3
    assert sum("exactly 7 items" in prompt for prompt in prompts) == 1
    assert len(prompts) == 4


def test_what_is_cut_off_at_last_is_dropped_and_named(questions, tmp_path):
    with Writer(always="cut") as server:
        report = write(server, questions, tmp_path / "out.jsonl")
    assert report.written == 0
    assert report.dropped == dict.fromkeys(["cold", "sky"], "no usable answer (truncated)")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": answer(rubric())}],
        [{"text": 3}],
        [[["x"]]],
        {"a": 1},
        7,
        True,
        None,
        '{"rubric": [' + "9" * 5000 + "]}",
        "[" * 50_000,
        '{"rubric": {"a": "b"}}',
        '{"rubric": [null, 1]}',
    ],
)
def test_answers_of_any_shape_spoil_at_most_their_own_row(questions, tmp_path, content):
    out = tmp_path / "out.jsonl"

    class Odd(Writer):
        async def answer(self, head, body):
            if "What helps" in body["messages"][0]["content"]:
                return http(200, {"choices": [{"message": {"content": content}}]})
            return await super().answer(head, body)

    with Odd() as server:
        report = write(server, questions, out)
    assert "sky" in ids(out)
    assert report.written + len(report.dropped) == 2
    assert set(report.dropped) <= {"cold"}


def random_value(rng, depth=0):
    """Any JSON value, with words that matter to the readers."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((0, 1, -1, 5, 99, 10**400, -(10**400), 1e308, 3.5))
    if kind < 7:
        words = ("Essential", "pitfall", "accuracy", "", " ", "\ud800", "\x00", "a" * 300, "x y")
        return rng.choice(words)
    size = rng.randrange(9)
    if kind == 7:
        return [random_value(rng, depth + 1) for _ in range(size)]
    keys = ("rubric", "text", "snippet", "tier", "positive", "negative", *tool.KEYS)
    return {rng.choice(keys): random_value(rng, depth + 1) for _ in range(size)}


def test_three_thousand_odd_answers_are_rubrics_or_reasons():
    rng = random.Random(0)
    example = rar.parse_example(COLD, "here", needs_rubric=False)
    snippets = [tool.Snippet("a", "T", "Rest helps.")]
    accepted = 0
    for _ in range(3000):
        # A good rubric with some values of its items replaced, or anything at all.
        odd = {"rubric": rubric()}
        for _ in range(rng.randrange(4)):
            changed = rng.choice(odd["rubric"])
            changed[rng.choice(tool.KEYS)] = random_value(rng)
        if rng.random() < 0.5:
            odd = {rng.choice(("rubric", "positive")): random_value(rng), "negative": []}
        for read in (
            lambda answer: tool.checked_rubric(example, answer),
            lambda answer: tool.read_grounded(snippets, answer),
            rler.read_proposal,
        ):
            try:
                items = read(odd)
            except ValueError as error:
                assert str(error)
            else:
                accepted += 1
                # What is accepted can be written and read.
                if isinstance(items, list) and items and isinstance(items[0], dict):
                    row = json.dumps({"id": "x", "question": "?", "rubric": items}, ensure_ascii=False)
                    rar.parse_example(json.loads(row.encode()), "here")
    assert accepted > 300


# ---------------------------------------------------------------------------- questions


def test_a_row_that_cannot_be_used_is_dropped_and_named(tmp_path, capsys):
    bad = [
        {"id": "half", "question": "Why \ud800?"},
        {"id": "list", "prompt": [{"role": "user", "content": ["a", "list"]}]},
        {"id": "none"},
        {"id": "tags", "question": "Why?", "example_tags": [3]},
        "text",
        {"id": "cold", "question": "The same id?"},
        {"id": "chat", "messages": [{"role": "user", "content": "Why?"}]},
        {"id": "esc\u001b[2J", "question": "\ud801"},
    ]
    path = write_rows(tmp_path / "q.jsonl", [COLD, SKY, *bad])
    out = tmp_path / "out.jsonl"
    with Writer() as server:
        assert main(server, path, out) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["written"] == 2
    assert report["dropped"] == [f"{path}:{number}" for number in range(3, 11)]
    for number in range(3, 11):
        assert f"dropped {path}:{number}: " in captured.err
    for words in ("surrogate", "'content' as text", "no prompt", "stands there twice", "prepare.py"):
        assert words in captured.err
    assert captured.err.count("\n") == len(bad)
    assert "\x1b" not in captured.err + captured.out
    assert ids(out) == ["cold", "sky"]


def test_a_reference_under_its_other_name_is_shown_to_the_writer(tmp_path):
    """data/prepare.py sends questions without rubrics here: it must not be sent back."""
    row = {"id": "cold", "question": COLD["question"], "reference_answer": COLD["reference"]}
    path = write_rows(tmp_path / "q.jsonl", [row])
    with Writer() as server:
        assert write(server, path, tmp_path / "out.jsonl").written == 1
        [body] = server.bodies
    assert COLD["reference"] in body["messages"][0]["content"]
    assert rar.read_examples(tmp_path / "out.jsonl")[0].reference == COLD["reference"]


def test_many_dropped_rows_are_named_up_to_ten(tmp_path, capsys):
    path = write_rows(tmp_path / "q.jsonl", [COLD] + [{"id": f"q{k}"} for k in range(15)])
    with Writer() as server:
        assert main(server, path, tmp_path / "out.jsonl") == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 11
    assert error.endswith("dropped: 5 more\n")


# ---------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    "flags, words",
    [
        (["q.jsonl", "--out", "o.jsonl"], "give --judge URL and --judge_model NAME"),
        (["q.jsonl", "--out", "o.jsonl", "--judge", "http://127.0.0.1:9/v1"], "--judge_model NAME"),
        (["--out", "o.jsonl"], "QUESTIONS"),
        (["q.jsonl"], "--out"),
        (["", "--out", "o.jsonl"], "an empty value"),
        (["q.jsonl", "--out", ""], "--out: an empty value"),
        (["q.jsonl", "--out", "o.jsonl", "--judge", ""], "--judge: an empty value"),
        (["q.jsonl", "--out", "o.jsonl", "--judge_model", " "], "--judge_model: an empty value"),
        (["q.jsonl", "--out", "o.jsonl", "--search", ""], "--search: an empty value"),
        (["q.jsonl", "--out", "o.jsonl", "--domain", ""], "'' is none of general, medicine, science"),
        (
            ["q.jsonl", "--out", "o.jsonl", "--domain", "cooking"],
            "'cooking' is none of general, medicine, science; add one of your own to data/rubric_domains.json",
        ),
        (["q.jsonl", "--out", "o.jsonl", "--domian", "science"], "unrecognized"),
    ],
)
def test_flags_that_cannot_work_are_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "q.jsonl", [COLD])
    assert tool.main(flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "no such file"),
        ("", "no question that can be used"),
        ("not json\n", "q.jsonl:1"),
        ('{"id": "x"}\n', "no question that can be used: no prompt"),
    ],
)
def test_questions_that_are_none_are_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "q.jsonl"
    if text is not None:
        path.write_text(text)
    with Writer() as server:
        assert main(server, path, tmp_path / "o.jsonl") == 2
        assert not server.bodies
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_no_rubric_at_all_is_a_failure(questions, tmp_path, capsys):
    with Writer({"What helps": ["no"] * 2, "sky": ["no"] * 2}) as server:
        assert main(server, questions, tmp_path / "o.jsonl") == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["dropped"] == ["cold", "sky"]
    assert "has a rubric now" in captured.err


def test_a_judge_that_is_not_there_is_one_line(questions, tmp_path):
    judge = LLMJudge("http://127.0.0.1:9/v1", "m", patience=0.5)
    task = tool.writer_task("medicine")
    with pytest.raises(tool.JudgeError, match="^[^\n]*$"):
        tool.write_rubrics(judge, task, str(questions), str(tmp_path / "o.jsonl"), False)


@pytest.mark.parametrize("key", ["sk-very-secret", "sk-very-secret\n", " sk-very-secret\r\n"])
def test_a_secret_is_never_printed(questions, tmp_path, capsys, monkeypatch, key):
    """Not the key, whatever the server repeats, and no password of the judge's URL."""
    monkeypatch.setenv("JUDGE_API_KEY", key)
    out = tmp_path / "o.jsonl"
    with Writer(key="another") as server:
        assert main(server, questions, out) == 2
    with Writer(key="sk-very-secret") as server:
        assert main(server, questions, out) == 0
    url = "http://user:pass-word@127.0.0.1:9/v1"
    monkeypatch.setattr(tool, "LLMJudge", lambda *a, **k: LLMJudge(*a, **k, patience=0.2))
    more = write_rows(tmp_path / "more.jsonl", [{"question": "Why?"}])
    assert tool.main([str(more), "--out", str(out), "--judge", url, "--judge_model", "m"]) == 2
    captured = capsys.readouterr()
    for secret in ("very-secret", "pass-word"):
        assert secret not in captured.err + captured.out
        assert secret not in out.read_text()


def test_help_has_a_worked_example():
    command = [sys.executable, ROOT / "tools" / "write_rubrics.py", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.sep).stdout
    assert "python tools/write_rubrics.py QUESTIONS.jsonl --out FILE.jsonl" in text
    assert "--search data/corpus.jsonl" in text
    assert "general, medicine, science" in text and "data/rubric_domains.json" in text
