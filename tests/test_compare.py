"""tools/compare.py: what a model scores, and whether another one scores more."""

import doctest
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from judge_server import JudgeServer
from test_train import good_rows, write_rows

import grpo
import rar
import train
from judge import LexicalJudge
from tools import adapters, agreement, compare, memory, report, write_rubrics

FLAGS = (
    "--steps 2 --prompts_per_step 2 --group_size 3 --max_new_tokens 6 --eval_every 2 "
    "--save_every 1 --prompts 5 --judge lexical"
)
SMALL = FLAGS.split()
RUBRIC = [
    rar.Criterion("Mentions rest.", 5, "Rest", "Essential", "accuracy"),
    rar.Criterion("Mentions water.", 2, "Water", "Optional", "completeness"),
]


def example(name, **more):
    return rar.Example(
        name, [{"role": "user", "content": f"What helps against {name}?"}], RUBRIC, **more
    )


def answer(text):
    return grpo.Rollout([1], [2], [0.0], "stop", text)


def lines(path):
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


def row(name, score):
    return {"id": name, "item": name[0], "score": score}


# ----------------------------------------------------------------------------- differences


def test_compare_pairs_prompts_and_its_interval_is_honest():
    rng, covered = random.Random(0), 0
    for _ in range(100):
        before = [{"id": str(k), "item": str(k), "score": rng.gauss(0, 1)} for k in range(40)]
        after = [{**row, "score": row["score"] + 0.1 + rng.gauss(0, 0.2)} for row in before]
        difference = compare.compare(before, after)
        low, high = difference["difference_ci"]
        covered += low <= 0.1 <= high
        assert (
            difference["n"] == 40 and high - low < 0.3
        )  # pairing takes out the spread between prompts, which is five times as wide
    assert covered >= 85
    with pytest.raises(rar.DataError, match="no scored prompt"):
        compare.compare(before, [{"id": "x", "item": "x", "score": 1.0}])


def test_runs_of_one_question_are_one_pair():
    difference = compare.compare(
        [row("a1", 0), row("a2", 0), row("b1", 0)], [row("a1", 1), row("a2", 0), row("b1", 0)]
    )
    assert difference["difference"] == 0.25 and difference["n"] == 2


def test_what_was_not_scored_is_left_out():
    difference = compare.compare(
        [row("a", 0.5), row("b", math.nan), row("c", 0)],
        [row("a", 1), row("b", 1), row("c", math.nan)],
    )
    assert difference["difference"] == 0.5 and difference["n"] == 1


def test_the_canary_stays_with_the_answers():
    [marked] = compare.result_rows([rar.Group(example("a", canary="mark"), [answer("x")])])
    [unmarked] = compare.result_rows([rar.Group(example("a"), [answer("x")])])
    assert marked["canary"] == "mark" and "canary" not in unmarked


def test_runs_of_a_question_share_an_item():
    tags = ["question:metal"]
    rows = compare.result_rows(
        [rar.Group(example(f"metal-{k}", tags=tags), [answer("x")]) for k in (1, 2)]
    )
    assert [(r["id"], r["item"]) for r in rows] == [("metal-1", "metal"), ("metal-2", "metal")]


def test_the_table_shows_each_figure_and_the_prompts_behind_it():
    groups = [
        rar.Group(example("colds", tags=["theme:care"]), [answer("Rest, water.")]),
        rar.Group(example("coughs"), [answer("Rest.")]),
    ]
    metrics = rar.evaluate(LexicalJudge(), groups)
    table = compare.metrics_table(metrics).split("\n")
    low, high = metrics["eval_ci"]
    head = f"score, unclipped 0.857 n 2 95 % interval {low:.3f} to {high:.3f}"
    assert table[0].split() == head.split()
    assert "axis completeness                    0.500  n 2" in table
    assert "theme care                           1.000  n 1" in table


def test_one_prompt_has_no_interval():
    metrics = rar.evaluate(LexicalJudge(), [rar.Group(example("colds"), [answer("Rest, water.")])])
    assert "one prompt: no interval" in compare.metrics_table(metrics)
    assert "n 0   nothing was scored" in compare.metrics_table(metrics | {"eval_n": 0})


# ----------------------------------------------------------------------------- the command line


def test_two_models_are_compared_from_the_command_line(tiny, few, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        train.main(
            [
                "--model",
                str(tiny),
                "--eval_data",
                few,
                *SMALL,
                "--lr",
                "0.05",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    capsys.readouterr()
    flags = ["--eval_data", few, "--max_new_tokens", "6"]
    assert compare.main([str(tiny), str(out), "--out", str(tmp_path / "answers"), *flags]) == 0
    said = capsys.readouterr()
    line = json.loads(said.out)
    assert "minus" in said.err and "paired bootstrap" in said.err and line["n"] == 2
    assert line["difference"] == pytest.approx(
        line["after"]["eval_score"] - line["before"]["eval_score"], abs=1e-5
    )
    files = [line[part]["answers"] for part in ("before", "after")]
    assert all(
        set(row) >= {"id", "item", "score", "verdicts", "text"}
        for file in files
        for row in lines(file)
    )
    assert all(Path(file).parent == tmp_path / "answers" for file in files)
    assert compare.main([*files, *flags]) == 0  # saved answers do as well, without any model
    assert json.loads(capsys.readouterr().out)["difference"] == pytest.approx(
        line["difference"], abs=1e-5
    )

    # A run's own last evaluation again, from its folder or its checkpoint; the answers go there.
    logged = lines(out / "metrics.jsonl")[-1]["eval_score"]
    for name in (out, out / "checkpoint"):
        assert compare.main([str(name), *flags]) == 0
        line = json.loads(capsys.readouterr().out)
        assert (
            line["eval_score"] == pytest.approx(logged, abs=1e-6)
            and line["n"] == 2
            and line["judge"] == "offline"
        )
        assert Path(line["answers"]).parent == out


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>"
    "</think>{% else %}<think>{% endif %}"
)


def test_a_run_is_evaluated_as_it_evaluated_itself(tiny, few, tmp_path, capsys):
    """Its template's arguments and its limit, unless a flag says otherwise; its start as well."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "chat_template.jinja").write_text(TURNS, encoding="utf8")
    out = tmp_path / "run"
    kwargs = '{"enable_thinking": false}'
    flags = ["--model", str(model), "--eval_data", few, *SMALL, "--max_new_tokens", "9"]
    assert train.main([*flags, "--template_kwargs", kwargs, "--lr", "0.05", "--out", str(out)]) == 0
    rows = lines(out / "metrics.jsonl")
    capsys.readouterr()

    # From its folder or its checkpoint, and before it as well.
    common = ["--eval_data", few, "--judge", "lexical", "--out", str(tmp_path / "answers")]
    for name in (out, out / "checkpoint"):
        assert compare.main([str(model), str(name), *common]) == 0
        said = capsys.readouterr()
        line = json.loads(said.out)
        for part, logged in (("before", rows[0]), ("after", rows[-1])):
            assert line[part]["eval_score"] == pytest.approx(logged["eval_score"], abs=1e-6)
            assert line[part]["max_new_tokens"] == 9 and line[part]["template_kwargs"] == kwargs
            assert all(row["text"] for row in lines(line[part]["answers"]))
        assert said.err.count(f"(at most 9 tokens, template_kwargs {kwargs})") == 2

    # Flags win: the thoughts of these answers are never closed. And a model alone takes them.
    assert compare.main([str(out), *common, "--template_kwargs", "{}"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["max_new_tokens"] == 9 and not any(row["text"] for row in lines(line["answers"]))
    flags = ["--template_kwargs", kwargs, "--max_new_tokens", "3"]
    assert compare.main([str(model), *common, *flags]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["max_new_tokens"] == 3 and all(row["text"] for row in lines(line["answers"]))

    config = json.loads((out / "config.json").read_text())
    for key, value in (("template_kwargs", "[1]"), ("max_new_tokens", "many"), ("dtype", 8)):
        (out / "config.json").write_text(json.dumps(config | {key: value}))
        assert compare.main([str(out), *common]) == 2
        error = capsys.readouterr().err
        assert key in error and error.count("\n") == 1
    assert compare.main([str(model), *common, "--template_kwargs", "yes"]) == 2
    assert "not a JSON object" in capsys.readouterr().err


def test_a_run_is_evaluated_on_its_own_held_out_prompts(tiny, few, tmp_path, capsys):
    """The tenth of its rows that it was not trained on, which is in no file of its own."""
    rows = write_rows(tmp_path / "rows.jsonl", good_rows(30))
    runs = []
    for name, more in (("own", ["--data", rows]), ("other", ["--eval_data", few])):
        runs.append(str(tmp_path / name))
        assert train.main(["--model", str(tiny), *SMALL, *more, "--lr", "0.05", "--out", runs[-1]]) == 0
    logged = lines(tmp_path / "own" / "metrics.jsonl")
    capsys.readouterr()

    common = ["--judge", "lexical", "--out", str(tmp_path / "answers")]
    assert compare.main([str(tiny), runs[0], *common]) == 0
    said = capsys.readouterr()
    line = json.loads(said.out)
    assert said.err.count(f"on the held-out tenth of {rows} (") == 2
    for part, row in (("before", logged[0]), ("after", logged[-1])):
        assert line[part]["n"] == 3
        assert line[part]["eval_score"] == pytest.approx(row["eval_score"], abs=1e-6)

    assert compare.main([*runs, *common]) == 2
    error = capsys.readouterr().err
    assert "other held-out prompts; give --eval_data for both" in error and error.count("\n") == 1
    assert compare.main([*runs, *common, "--eval_data", few]) == 0
    assert json.loads(capsys.readouterr().out)["before"]["n"] == 2


def test_a_model_judges_both(tiny, few, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with JudgeServer() as server:
        flags = [
            "--eval_data",
            few,
            "--max_new_tokens",
            "4",
            "--judge",
            server.url,
            "--judge_model",
            "m",
            "--out",
            str(tmp_path / "answers"),
        ]
        assert compare.main([str(tiny), str(tiny), *flags]) == 0
        assert server.bodies
    line = json.loads(capsys.readouterr().out)
    assert line["difference"] == 0 and line["before"]["judge"] == "m"


def test_no_evaluation_writes_over_another(tiny, few, tmp_path, capsys):
    """Another judge, another limit, data or models of the same name: each has its own file."""
    models = [tmp_path / top / "r" / "a" / "b" for top in ("p", "q")]
    data = [tmp_path / top / "heldout.jsonl" for top in ("evalA", "evalB")]
    for model, path in zip(models, data):
        shutil.copytree(tiny, model)
        path.parent.mkdir()
        shutil.copy(few, path)
    out = tmp_path / "answers"
    first, second = map(str, models)
    flags = ["--eval_data", str(data[0]), "--out", str(out)]
    kept, files = {}, []
    with JudgeServer() as server:
        for more in (
            [first, *flags, "--judge", "lexical"],
            [first, *flags, "--judge", "lexical"],
            [first, *flags, "--judge", server.url, "--judge_model", "m"],
            [first, *flags, "--judge", "lexical", "--eval_data", str(data[1])],
            [first, second, *flags, "--judge", "lexical"],
        ):
            assert compare.main([*more, "--max_new_tokens", str(3 + len(files))]) == 0
            line = json.loads(capsys.readouterr().out)
            line = line.get("after", line)
            files.append(line["answers"])
            for row in lines(files[-1]):
                assert row["judge"] == line["judge"] == ("m" if "m" in more else "lexical")
                assert row["max_new_tokens"] == line["max_new_tokens"]
            kept = {path.name: path.read_bytes() for path in out.iterdir()} | kept
    assert len(set(files)) == 5 and len(kept) == 6
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept

    # What the two were made with is said where it differs.
    assert compare.main([files[0], files[2]]) == 0
    said = capsys.readouterr()
    assert "not alike: judge 'lexical' and 'm'" in said.err and "max_new_tokens 3 and 5" in said.err
    assert json.loads(said.out)["after"]["judge"] == "m"


def test_a_judge_is_named_as_it_judges():
    name = lambda **settings: compare.judge_name(train.Config(**settings))
    assert name(judge="lexical,offline") == "lexical,offline"
    assert name(judge="http://me:pw@h/v1,offline", judge_model="m") == "m,offline"


def test_a_run_that_was_killed_before_its_first_checkpoint_cannot_be_evaluated(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run" / "metrics.jsonl", [{"step": 0}])
    assert compare.main([str(tmp_path / "run")]) == 2
    assert "a run without a checkpoint yet; go on with --resume" in capsys.readouterr().err


GOOD = '{"id": "a", "item": "a", "score": 0.5}\n'


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no answers"),
        ("{\n", "answers.jsonl:1"),
        ("[1]\n", "answers.jsonl:1: not an answer of an evaluation"),
        (GOOD + GOOD, "answers.jsonl:2: a second answer to 'a'"),
        (GOOD + '{"id": "a"}\n', "answers.jsonl:2: not an answer of an evaluation"),
        (
            '{"id": "a", "item": "a", "score": "high"}\n',
            "answers.jsonl:1: score must be a number",
        ),
        ('{"id": "a", "item": ["a"], "score": 1}\n', "answers.jsonl:1: item must be a text"),
        ('{"id": "a", "item": "a", "score": null}\n', "share no scored prompt"),
        ('{"id": "a", "item": "a", "score": NaN}\n', "share no scored prompt"),
        ("[" * 100_000 + "\n", "answers.jsonl:1"),
    ],
)
def test_broken_answers_cost_one_line_and_status_2(tmp_path, capsys, content, words):
    path = tmp_path / "answers.jsonl"
    path.write_text(content, encoding="utf8")
    (tmp_path / "good.jsonl").write_text(GOOD, encoding="utf8")
    assert compare.main([str(path), str(tmp_path / "good.jsonl")]) == 2
    said, error = capsys.readouterr()
    assert (
        words in error and error.startswith("compare.py: ") and error.count("\n") == 1 and not said
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "the following arguments are required: model"),
        (["a", "b", "c"], "one model, or two"),
        (["a", "--eval_dat", "x"], "unrecognized arguments"),
        (["no/such/folder/here"], "no/such/folder/here: cannot be loaded as a model"),
        (["TINY", "--eval_data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["TINY", "--max_new_tokens", "0"], "--max_new_tokens 0: give at least 1"),
        (["TINY", "--max_new_tokens", "many"], "invalid int value"),
        (["TINY", "--dtype", "float8"], "--dtype"),
        (["TINY", "--judge", "http://127.0.0.1:9/v1"], "judge_model"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (
            ["TINY", "--eval_data", "FEW", "--max_new_tokens", "2", "--out", "FEW/folder"],
            "cannot be written",
        ),
    ],
)
def test_bad_flags_cost_one_line_and_status_2(tiny, few, capsys, flags, words):
    flags = [flag.replace("TINY", str(tiny)).replace("FEW", few) for flag in flags]
    assert compare.main(flags) == 2
    said, error = capsys.readouterr()
    assert (
        words in error and error.startswith("compare.py: ") and error.count("\n") == 1 and not said
    )


def start(*flags, **more):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "compare.py", *map(str, flags)],
        text=True,
        timeout=120,
        check=False,
        **more,
    )


def test_a_terminal_obeys_no_name(tmp_path, capsys):
    name = str(tmp_path / "a\x1b]0;owned\x07.jsonl")
    save(Path(name), [row("a", 0.5)])
    assert compare.main([name, name]) == 0
    said, error = capsys.readouterr()
    assert "\x1b" not in error and "\\x1b]0;owned\\x07" in error
    assert json.loads(said)["before"]["answers"] == name


@pytest.mark.long
def test_a_reader_may_leave_early(tmp_path):
    name = save(tmp_path / "a.jsonl", [row("a", 0.5)])
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` once it has its line
    done = start(name, name, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr.count("\n") == 1


@pytest.mark.long
def test_a_full_disk_leaves_no_half_written_answers(tiny, few, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    flags = [tiny, "--eval_data", few, "--max_new_tokens", "2", "--out", tmp_path / "answers"]
    done = start(*flags, capture_output=True, preexec_fn=limit)
    assert (
        done.returncode == 2
        and done.stderr.splitlines()[-1].endswith("make room or give --out")
        and done.stdout == ""
    )
    assert not list((tmp_path / "answers").iterdir())


def test_docstring_examples_and_help(capsys):
    failed, tried = doctest.testmod(compare)
    assert failed == 0 and tried > 0
    with pytest.raises(SystemExit) as left:
        compare.main(["--help"])
    assert left.value.code == 0
    assert "python tools/compare.py smollm2 RUN" in capsys.readouterr().out


# ----------------------------------------------------------------------------- secrets


LOGINS = [
    "http://me:s3cretpw@localhost:9/v1",
    "http://me:s3cretpw@localhost:9/v1\r",
    "http://me:odd//s3cretpw\x1b@localhost:9",
    "http://me:s3cretpw@one/v1,http://me:s3cretpw@two/v1",
    "http://localhost:9/v1?key=s3cretpw",
    "http://localhost:9/v1?key=a@s3cretpw",
    "http://me:s3?s3cretpw@localhost",
    "me:s3cretpw@localhost:9",
]
PLACES = [
    (compare, ["smollm2", "--judge", "URL"]),
    (compare, ["smollm2", "--judge", "URL", "--judge_model", "m\r"]),
    (compare, ["URL"]),
    (compare, ["URL", "a", "b"]),
    (compare, ["smollm2", "--max_new_tokens=URL"]),
    (compare, ["smollm2", "--eval_data", "URL"]),
    (compare, ["smollm2", "--dtype", "URL"]),
    (report, ["URL"]),
    (report, ["nowhere", "--URL"]),
    (report, ["nowhere", "--rubrics=URL"]),
    (agreement, ["labels.jsonl", "URL", "--judge", "URL"]),
    (agreement, ["URL"]),
    (agreement, ["--cache", "URL"]),
    (agreement, ["labels.jsonl", "--judge_k", "URL"]),
    (memory, ["--cards", "URL"]),
    (memory, ["--judge", "URL", "--stepps", "URL"]),
    (memory, ["--judge", "URL", "--model", "URL"]),
    (write_rubrics, ["URL", "--out", "o.jsonl", "--judge", "URL"]),
    (write_rubrics, ["URL", "URL", "--out", "o.jsonl", "--judge", "URL", "--judge_model", "m"]),
    (write_rubrics, ["q.jsonl", "--out", "URL", "--judge", "URL", "--judge_model", "m"]),
    (adapters, ["URL", "--trainer", "trl", "--out", "o.jsonl"]),
    (adapters, ["q.jsonl", "--trainer", "URL", "--out", "URL"]),
]


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize(("tool", "words"), PLACES)
def test_no_tool_prints_a_password_whatever_it_was_taken_for(
    tool, words, login, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "q.jsonl").write_text('{"question": "Why?"}\n')
    words = [word.replace("URL", login) for word in words]
    try:
        status = tool.main(words)
    except SystemExit as ended:
        status = ended.code
    said, error = capsys.readouterr()
    assert status == 2 and error.count("\n") == 1 and "s3cretpw" not in error + said
