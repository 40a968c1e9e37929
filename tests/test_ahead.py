"""--judge_ahead 1: the judge reads a batch while the model trains on another; nothing but the age of the rollouts changes."""

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import test_survival
import torch
from judge_server import JudgeServer
from safetensors.torch import load_file
from test_ranks import FLAGS, close, together
from test_survival import same_run, saved_state
from test_train import lines

import rar
import train

SHORT = ["--steps", "6", "--prompts_per_step", "2", "--group_size", "6", "--max_new_tokens", "24", "--eval_every", "3", "--save_every", "4", "--lr", "0.01", "--judge", "lexical"]
METHODS = {
    "explicit": [],
    "rler": ["--method", "rler", "--epochs", "2", "--minibatches", "2", "--beta", "0.1"],
    "cyclic": ["--method", "arlrr", "--schedule", "cyclic", "--stage", "2", "--validation", "3"],
    "search": ["--method", "arlrr", "--schedule", "search", "--stage", "3", "--validation", "3"],
}


@pytest.fixture
def flags(tiny, few, forms):
    """A short run that judges ahead."""
    return ["--model", str(tiny), "--data", forms, "--eval_data", few, *SHORT, "--judge", "lexical", "--judge_ahead", "1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes nine tenths of a tiny run's time; test_report.py looks at what is drawn."""
    monkeypatch.setattr(train, "write_report", lambda folder: None)


@pytest.fixture
def judged(tmp_path, forms):
    """The prompts of `forms` with one criterion more, which the judge has to read."""
    rows = []
    for line in Path(forms).read_text(encoding="utf8").splitlines():
        row = json.loads(line)
        row["rubric"].append({"text": f"States the sum of {row['id']}.", "weight": 2, "axis": "accuracy"})
        rows.append(json.dumps(row) + "\n")
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(rows), encoding="utf8")
    return str(path)


def thread_is_gone():
    """Whether no thread of a run is left."""
    return all(thread.name != train.JUDGING for thread in threading.enumerate())


# ---------------------------------------------------------------------- the same steps


def by_hand(made):
    """The run without threads: (texts, rewards) of each step. Its policy is the trained one."""
    config = made.config
    method = made.method
    lab = train.make_lab(made)
    seen = []
    following = None
    for step in range(config.steps):
        method.before_step(step, made.examples, lab.at(step))
        groups = following
        if groups is None:
            groups = train.roll_out(made, step)
        following = None
        is_stage_end = config.method == "arlrr" and (step + 1) % config.stage == 0
        if step + 1 < config.steps and not is_stage_end:
            following = train.roll_out(made, step + 1)  # before the update
        method.score(groups)
        method.set_advantages(groups)
        method.after_step(groups)
        train.learn(made, step, groups)
        for group in groups:
            seen.append([(rollout.text, round(rollout.reward, 6)) for rollout in group.rollouts])
    return seen


LONG_ONES = [pytest.param(name, marks=pytest.mark.long) for name in ("explicit", "cyclic")]


@pytest.mark.parametrize("name", ["rler", "search", *LONG_ONES])
def test_it_is_the_same_arithmetic_with_rollouts_of_one_update_ago(flags, judged, tmp_path, name):
    flags = [*flags, *METHODS[name]]
    if name == "explicit":  # a judge that computes: in the thread it rounds as in the main one
        flags += ["--judge", "offline", "--data", judged]
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    assert thread_is_gone()

    config, _ = train.parse_config(flags)
    made = train.begin(config, tmp_path, None)
    start = {key: tensor.clone() for key, tensor in made.policy.model.state_dict().items()}
    seen = by_hand(made)
    weights = load_file(out / "checkpoint" / "model.safetensors")
    trained = made.policy.model.state_dict()
    assert all(torch.equal(weights[key], trained[key]) for key in weights)
    assert any(not torch.equal(weights[key], start[key]) for key in weights)

    logged = {}
    for row in lines(out / "samples.jsonl"):
        if row["split"] == "train":
            logged.setdefault(row["step"], []).append((row["text"], row["reward"]))
    for step in range(config.steps):
        assert logged[step + 1] == seen[2 * step] + seen[2 * step + 1]


def test_the_first_step_is_on_policy_and_the_second_is_not(flags, tmp_path):
    assert train.main([*flags, "--out", str(tmp_path / "ahead")]) == 0
    assert train.main([*flags, "--judge_ahead", "0", "--tis_cap", "2", "--out", str(tmp_path / "after")]) == 0
    ahead, after = (lines(tmp_path / name / "metrics.jsonl") for name in ("ahead", "after"))
    assert [row["step"] for row in ahead] == [row["step"] for row in after] == list(range(7))
    assert ahead[:2] == after[:2]
    texts = []
    for name in ("ahead", "after"):
        texts.append([row["text"] for row in lines(tmp_path / name / "samples.jsonl") if row["step"] == 2])
    assert texts[0] != texts[1]

    # How far the sampling policy is from the trained one stands in the log; the weights correct it.
    assert ahead[1]["logp_gap"] < 1e-4 and after[2]["logp_gap"] < 1e-4 and ahead[2]["logp_gap"] > 1e-3
    assert ahead[1]["tis_mean"] == pytest.approx(1, abs=1e-5) and after[2]["tis_mean"] == pytest.approx(1, abs=1e-5)
    assert abs(ahead[2]["tis_mean"] - 1) > 1e-3
    assert train.Config(judge_ahead=1).tis_cap == 2
    assert train.Config(judge_ahead=1, tis_cap=0.0).tis_cap == train.Config().tis_cap == 0


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("name", "where", "call", "signals"),
    [
        ("explicit", "learn", 3, 1),
        ("rler", "learn", 2, 2),
        ("search", "roll_out", 7, 1),
        pytest.param("rler", "learn", 2, 1, marks=pytest.mark.long),
        pytest.param("rler", "finish_step", 4, 1, marks=pytest.mark.long),
        pytest.param("rler", "finish_step", 5, 2, marks=pytest.mark.long),
        pytest.param("search", "roll_out", 7, 2, marks=pytest.mark.long),
        pytest.param("cyclic", "learn", 4, 1, marks=pytest.mark.long),
        pytest.param("cyclic", "roll_out", 3, 2, marks=pytest.mark.long),
    ],
)
def test_stopped_anywhere_it_goes_on_bit_for_bit(flags, tmp_path, monkeypatch, name, where, call, signals):
    """Ctrl-C ends the run after the step, a second one at once; the pending rollouts are of a policy that is gone."""
    flags = [*flags, *METHODS[name]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*flags, "--out", str(whole)]) == 0
    calls = []
    original = getattr(train, where)

    def signalled(*arguments, **more):
        calls.append(1)
        if len(calls) == call:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # the handler runs between two instructions of this thread
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, where, signalled)
        assert train.main([*flags, "--out", str(cut)]) == 130
    assert thread_is_gone()
    if signals == 1:
        step = lines(cut / "metrics.jsonl")[-1]["step"]
        state = saved_state(cut)
        assert state["step"] == step < 6
        is_stage_end = name in ("cyclic", "search") and step % int(flags[flags.index("--stage") + 1]) == 0
        assert (state["pending"] is None) == is_stage_end
    assert train.main(["--resume", str(cut)]) == 0
    same_run(whole, cut)


def test_a_judge_that_fails_on_the_way_costs_no_step(flags, judged, tmp_path, monkeypatch, capsys):
    """The error comes from the thread; the step before it is logged and saved, with the rollouts that were being judged."""
    original = rar.RubricReward.score
    calls = []
    with JudgeServer() as server:
        flags = [*flags, "--data", judged, "--judge", server.url, "--judge_model", "m", "--save_every", "100"]
        whole, cut = tmp_path / "a" / "whole", tmp_path / "b" / "cut"  # each with a cache of its own
        assert train.main([*flags, "--out", str(whole)]) == 0

        def unloaded(*arguments, **more):
            calls.append(threading.current_thread().name)
            if len(calls) == 3:
                server.status = 404
            original(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(rar.RubricReward, "score", unloaded)
            assert train.main([*flags, "--out", str(cut)]) == 2
        assert set(calls) == {"judging ahead"} and thread_is_gone()
        printed = capsys.readouterr().err.strip().split("\n")[-1]
        assert "step 3: " in printed and "404" in printed and f"--resume {cut}" in printed
        assert lines(cut / "metrics.jsonl")[-1]["step"] == saved_state(cut)["step"] == 2
        assert len(saved_state(cut)["pending"]["groups"]) == 2

        server.status = None
        assert train.main(["--resume", str(cut)]) == 0
    assert lines(whole / "samples.jsonl") == lines(cut / "samples.jsonl")
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1]
    for one, two in zip(lines(whole / "metrics.jsonl"), lines(cut / "metrics.jsonl"), strict=True):
        for key in one:
            assert key.startswith("judge_") or one[key] == two[key]


@pytest.mark.long
def test_a_judge_that_fails_in_an_evaluation_keeps_the_pending_batch(flags, tmp_path, monkeypatch):
    original = train.evaluate_heldout
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    calls = []

    def goes_away(made):
        calls.append(1)
        if len(calls) in (2, 3):
            raise train.JudgeError("the judge is gone")
        return original(made)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_heldout", goes_away)
        assert train.main([*flags, "--out", str(cut)]) == 2
        assert saved_state(cut)["step"] == 3 and saved_state(cut)["pending"]
        assert train.main(["--resume", str(cut)]) == 2
    assert thread_is_gone()
    assert train.main(["--resume", str(cut)]) == 0
    assert train.main([*flags, "--out", str(whole)]) == 0
    same_run(whole, cut)


@pytest.mark.long
def test_a_gradient_that_is_not_finite_leaves_the_last_checkpoint(flags, tmp_path, monkeypatch, capsys):
    """The method is ahead of the policy by then: what is on disk is a whole state."""
    original = train.learn

    def breaks(made, step, *more):
        if step == 5:
            raise FloatingPointError("the gradient is not finite")
        return original(made, step, *more)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*flags, *METHODS["rler"]]
    with monkeypatch.context() as patch:
        patch.setattr(train, "learn", breaks)
        assert train.main([*flags, "--out", str(cut)]) == 2
    assert "step 6: the gradient is not finite" in capsys.readouterr().err
    assert saved_state(cut)["step"] == 4 and thread_is_gone()
    assert train.main(["--resume", str(cut)]) == 0
    assert train.main([*flags, "--out", str(whole)]) == 0
    same_run(whole, cut)


def test_a_pending_batch_of_another_run_is_one_line(flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--save_every", "1", "--eval_every", "100"]
    out = tmp_path / "run"
    original = train.learn

    def stops(made, step, *more):
        if step == 2:
            raise KeyboardInterrupt
        return original(made, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learn", stops)
        assert train.main([*flags, "--out", str(out)]) == 130
    good = saved_state(out)["pending"]
    other = [[row | {"prompt_ids": [5]} for row in rows] for rows in good["groups"]]
    for edited in ("x", good | {"groups": good["groups"][:1]}, good | {"groups": other}, good | {"log": 3}):
        torch.save(saved_state(out) | {"pending": edited}, out / "checkpoint" / "trainer.pt")
        capsys.readouterr()
        assert train.main(["--resume", str(out)]) == 2
        printed = [line for line in capsys.readouterr().err.split("\n") if line.startswith("train.py: ")]
        assert len(printed) == 1 and "trainer.pt: does not belong to this run" in printed[0]


# ---------------------------------------------------------------------- the judge


def test_the_judge_reads_while_the_model_trains(flags, judged, tmp_path, monkeypatch):
    """Without a clock: the update does not begin before the judge was asked about the next batch."""
    original = train.learn
    asked = []
    with JudgeServer(delay=0.02) as server:

        def waits(made, step, *more):
            if step < 5:
                answered = asked[-1]
                until = time.monotonic() + 10
                while len(server.bodies) == answered and time.monotonic() < until:
                    time.sleep(0.005)
                assert len(server.bodies) > answered
            return original(made, step, *more)

        def counted(method, groups):
            asked.append(len(server.bodies))
            return set_advantages(method, groups)

        set_advantages = rar.RubricReward.set_advantages
        monkeypatch.setattr(rar.RubricReward, "set_advantages", counted)
        monkeypatch.setattr(train, "learn", waits)
        flags = [*flags, "--data", judged, "--judge", server.url, "--judge_model", "m", "--eval_every", "100"]
        assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0


def test_every_row_has_the_calls_of_its_own_batch_and_evaluation(flags, judged, tmp_path):
    with JudgeServer() as server:
        flags = [*flags, "--data", judged, "--judge", server.url, "--judge_model", "m"]
        assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
        asked = Counter()
        for row in lines(tmp_path / "run" / "samples.jsonl"):
            for verdict in row["verdicts"]:
                # Checks are counted, not asked; an empty answer is asked about like any other.
                if verdict["reason"] == "by its hash":
                    asked[row["step"]] += 1
        rows = lines(tmp_path / "run" / "metrics.jsonl")
        for row in rows:
            calls = row["judge_calls"] + row["judge_cache_hits"]
            # Equal answers to one prompt share a call.
            assert 0 < calls <= asked[row["step"]]
        assert sum(row["judge_calls"] for row in rows) == len(server.bodies)
        assert any(row["judge_calls"] for row in rows[4:])


def test_a_run_that_stops_does_not_wait_for_a_slow_judge(flags, judged, tmp_path, monkeypatch):
    """The pending batch would take the judge a minute; the run ends within seconds, saved."""
    original = train.learn
    with JudgeServer() as server:

        def stops(made, step, *more):
            if step == 1:
                server.delay = 60
                os.kill(os.getpid(), signal.SIGINT)
            return original(made, step, *more)

        monkeypatch.setattr(train, "learn", stops)
        flags = [*flags, "--data", judged, "--judge", server.url, "--judge_model", "m", "--steps", "9"]
        started = time.monotonic()
        assert train.main([*flags, "--out", str(tmp_path / "run")]) == 130
        assert time.monotonic() - started < 30 and thread_is_gone()
    state = saved_state(tmp_path / "run")
    assert state["step"] == lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]


# ---------------------------------------------------------------------- processes


@pytest.mark.long
@pytest.mark.parametrize("name", ["rler", "search"])
def test_two_processes_are_one(tiny, few, forms, tmp_path, name):
    flags = ["--model", str(tiny), "--data", forms, "--eval_data", few, *FLAGS, *METHODS[name], "--judge", "lexical", "--judge_ahead", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*flags, "--out", str(one)]) == 0
    status, printed = together(2, *flags, "--out", two)
    assert status == 0, printed
    close(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"))
    close(lines(one / "samples.jsonl"), lines(two / "samples.jsonl"))


@pytest.mark.long
def test_an_error_of_the_thread_ends_all_processes(tiny, few, judged, tmp_path):
    """The first one's thread has it; the others wait for its verdicts, not for hours."""
    with JudgeServer() as server:
        flags = ["--model", tiny, "--data", judged, "--eval_data", few, *FLAGS, "--judge_ahead", "1", "--save_every", "100"]
        flags += ["--judge", server.url, "--judge_model", "m"]

        def unload():
            while len(server.bodies) < 30:
                time.sleep(0.01)
            server.status = 404

        threading.Thread(target=unload, daemon=True).start()
        status, printed = together(2, *flags, "--steps", "50", "--out", tmp_path / "run")
        assert status != 0 and "step " in printed and "404" in printed
        server.status = None
        step = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
        status, printed = together(2, "--resume", tmp_path / "run", "--steps", step + 1)
    assert status == 0 and lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step + 1


@pytest.mark.long
def test_killed_at_random_moments_it_is_the_same_run(server, tiny, few, forms, tmp_path, monkeypatch):
    monkeypatch.setitem(test_survival.METHODS, "ahead", ["--method", "rler", "--judge_ahead", "1"])
    test_survival.test_killed_at_random_moments_it_is_the_same_run(server, tiny, few, forms, tmp_path, "ahead")
