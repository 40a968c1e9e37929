"""LoRA: fresh adapters change nothing, switched off they are the reference, merged they are the policy, and a run resumes with them."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import settings
from test_sharding import take_back_a_trial
from test_train import lines
from transformers import AutoModelForCausalLM, GPT2Config

import arlrr
import grpo
import train

FLAGS = "--steps 4 --prompts_per_step 2 --group_size 4 --max_new_tokens 16 --eval_every 4 --save_every 2 --prompts 6 --lora_rank 4 --lr 0.02"
ROWS = (([8, 9, 1], 1.0), ([4, 1], -1.0), ([30, 31, 32, 33], 0.5))


def groups():
    return [[grpo.Rollout([5, 6, 7], ids, [-5.0] * len(ids), "stop", advantage=a) for ids, a in ROWS]]


def logp(model):
    with torch.no_grad():
        return grpo.completion_logprobs(model, groups(), 0.8)[0]


def trained(tiny, bfloat16=False, rank=4):
    """A policy with adapters after three steps, and its log-probs before."""
    model, _ = grpo.load_policy(str(tiny), "cpu", bfloat16, lora_rank=rank)
    before = logp(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    grpo.update(model, optimizer, groups(), settings(beta=0.1, epochs=3, checkpointing=1), reference=model)
    return model, before


def run(tiny, few, forms, out, *flags):
    return train.main(["--model", str(tiny), "--data", forms, "--eval_data", few, *FLAGS.split(), "--out", str(out), *flags])


@pytest.mark.parametrize("bfloat16", [False, True])
def test_fresh_adapters_change_nothing(tiny, bfloat16):
    """Bit for bit, also where their layers are stored in bfloat16: sampling, log-probs, greedy answers."""
    plain, _ = grpo.load_policy(str(tiny), "cpu", bfloat16)
    model, _ = grpo.load_policy(str(tiny), "cpu", bfloat16, lora_rank=4)
    assert len(grpo.lora_layers(model)) == 14  # seven linear layers in each of two
    assert torch.equal(logp(plain), logp(model))
    uniform = grpo.uniform_numbers(2, 3, 10, seed=0)
    both = [grpo.sample(m, [[5, 6, 7], [9]], 3, 10, 0.7, {1}, uniform) for m in (plain, model)]
    assert both[0] == both[1]
    stored = {p.dtype for name, p in model.named_parameters() if name.endswith("proj.weight")}
    assert stored == {torch.bfloat16 if bfloat16 else torch.float32}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_switched_off_they_are_the_start_and_merged_they_are_the_policy(tiny, bfloat16):
    model, before = trained(tiny, bfloat16)
    assert (logp(model) - before).abs().max() > 0.1
    with grpo.adapters_off(model):
        assert torch.equal(logp(model), before)
    merged = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    merged.load_state_dict({name: tensor.float() for name, tensor in grpo.merged_weights(model)})
    merged.set_attn_implementation(model.config._attn_implementation)
    merged.bfloat16_layers = bfloat16
    assert (logp(merged) - logp(model)).abs().max() < (0.1 if bfloat16 else 1e-5)


def test_only_the_adapters_are_trained(tiny):
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    model, _ = trained(tiny)
    for name, tensor in model.state_dict().items():
        if name in start:
            assert torch.equal(tensor, start[name]), name
        else:
            assert name.endswith((".lora_a", ".lora_b")) and tensor.abs().max() > 0, name


def test_a_trial_copies_and_takes_back_the_adapters_alone(tiny):
    model, _ = grpo.load_policy(str(tiny), lora_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def update():
        grpo.update(model, optimizer, groups(), settings(beta=0.1), reference=model)

    update()
    take_back_a_trial(model, optimizer, update)
    state = arlrr.Lab(model, optimizer, None, None, None).save()
    assert all(name.endswith((".lora_a", ".lora_b")) for name in state["model"])


def test_the_gradient_is_that_of_the_merged_weights(tiny):
    """Of d loss / dW = D: d loss / dA = scale B'D, d loss / dB = scale D A'. The embedding and the head are left out."""
    model, _ = trained(tiny)
    full = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    full.load_state_dict(dict(grpo.merged_weights(model)))
    full.set_attn_implementation(model.config._attn_implementation)
    for policy in (model, full):
        policy.zero_grad()
        grpo.completion_logprobs(policy, groups(), 0.8)[0].sum().backward()
    for name, layer in grpo.lora_layers(model).items():
        gradient = full.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_a.grad, layer.scale * layer.lora_b.T @ gradient, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.lora_b.grad, layer.scale * gradient @ layer.lora_a.T, atol=1e-4, rtol=1e-4)
    assert model.get_input_embeddings().weight.grad is None


@pytest.mark.long
def test_a_run_resumes_bit_for_bit_and_every_tool_reads_its_checkpoint(tiny, few, forms, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tiny, few, forms, whole, "--beta", "0.1") == 0
    assert run(tiny, few, forms, cut, "--beta", "0.1", "--steps", "2") == 0
    assert train.main(["--resume", str(cut), "--steps", "4"]) == 0
    names = sorted(path.name for path in (whole / "checkpoint").iterdir())
    assert "model.safetensors" not in names and "adapter_model.safetensors" in names
    one, two = (load_file(folder / "checkpoint" / "adapter_model.safetensors") for folder in (whole, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    rows = lines(whole / "metrics.jsonl")
    assert rows[-1]["kl"] > 0 and rows[1]["kl"] == pytest.approx(0, abs=1e-9)

    # The policy of the checkpoint, by whoever loads it by its folder; and as a model of its own.
    model, _ = grpo.load_policy(str(whole / "checkpoint"))
    assert not grpo.lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert grpo.main(["merge", str(whole / "checkpoint"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    adapted = train.Policy(str(tiny), lora_rank=4).model
    grpo.load_adapters(adapted, whole / "checkpoint")
    assert (logp(adapted) - logp(model)).abs().max() < 1e-5

    # Adapters of adapters have no base that others could load.
    capsys.readouterr()
    assert run(whole / "checkpoint", few, forms, tmp_path / "twice") == 2
    assert "holds adapters already; first: python grpo.py merge" in capsys.readouterr().err
    assert grpo.main(["merge", str(tiny), str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert "no adapter_config.json there" in error and error.count("\n") == 1


def test_broken_adapters_cost_one_line(tiny, few, forms, tmp_path, capsys):
    assert run(tiny, few, forms, tmp_path / "run", "--steps", "2") == 0
    path = tmp_path / "run" / "checkpoint" / "adapter_model.safetensors"
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"hello"):
        path.write_bytes(broken)
        capsys.readouterr()
        assert train.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 2
        error = capsys.readouterr().err
        assert "its adapters cannot be read" in error and error.count("\n") == 1
    path.write_bytes(content)
    assert train.main(["--resume", str(tmp_path / "run"), "--lora_rank", "8"]) == 2
    assert "would mix two experiments: --lora_rank 8" in capsys.readouterr().err


def test_a_model_without_linear_layers_is_refused(tiny, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    train.Policy(str(tiny)).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no linear layers to adapt"):
        grpo.load_policy(str(tmp_path), lora_rank=4)


def test_the_default_rate_is_ten_times_that_of_all_weights():
    assert train.Config(lora_rank=8).lr == 10 * train.Config().lr
    assert train.Config(lora_rank=8, lr=5e-5).lr == 5e-5


def test_without_a_kl_there_is_no_reference(tiny, few, forms, tmp_path, monkeypatch):
    """--beta -1: no second model, for all weights and for adapters; the log says that the KL is missing."""
    copies = []
    monkeypatch.setattr(grpo, "freeze", copies.append)
    for name, rank in (("all", "0"), ("adapters", "4")):
        assert run(tiny, few, forms, tmp_path / name, "--beta", "-1", "--lora_rank", rank, "--steps", "2") == 0
        assert [row["kl"] for row in lines(tmp_path / name / "metrics.jsonl")[1:]] == [None, None]
    assert copies == []


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_loads_the_adapters(tiny, few, forms, tmp_path):
    from peft import PeftModel

    assert run(tiny, few, forms, tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "checkpoint" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint").eval()
    ours = train.Policy(str(tiny), lora_rank=4).model
    grpo.load_adapters(ours, tmp_path / "run" / "checkpoint")
    ids = torch.tensor([[5, 6, 7, 8, 9, 30, 31]])
    with torch.no_grad():
        difference = theirs(ids).logits - ours(ids).logits
        with grpo.adapters_off(ours):
            start = ours(ids).logits
    assert difference.abs().max() < 1e-5
    assert (theirs(ids).logits - start).abs().max() > 0.01


@pytest.mark.long
def test_two_processes_are_one(tiny, few, forms, tmp_path):
    from test_ranks import close, together

    flags = ["--model", tiny, "--data", forms, "--eval_data", few, *FLAGS.split(), "--beta", "0.1", "--epochs", "2", "--minibatches", "2"]
    assert train.main([str(flag) for flag in [*flags, "--out", tmp_path / "one"]]) == 0
    status, printed = together(2, *flags, "--out", tmp_path / "two")
    assert status == 0, printed
    close(lines(tmp_path / "one" / "metrics.jsonl"), lines(tmp_path / "two" / "metrics.jsonl"))
    one, two = (load_file(tmp_path / name / "checkpoint" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:  # after AdamW, which divides by the gradient's size
        assert float((one[name] - two[name]).abs().max()) < 2e-4, name


def test_a_merge_never_writes_over_a_model(tiny, tmp_path, capsys):
    """Another model, the checkpoint itself, and a file, for which transformers writes nothing and says so to nobody."""
    model, tokenizer = grpo.load_policy(str(tiny), lora_rank=4)
    checkpoint = tmp_path / "checkpoint"
    grpo.save_adapters(model, checkpoint)
    tokenizer.save_pretrained(checkpoint)
    precious = tmp_path / "precious"
    shutil.copytree(tiny, precious)
    (tmp_path / "notes").write_text("mine")
    kept = [precious / "model.safetensors", checkpoint / "adapter_model.safetensors", tmp_path / "notes"]
    before = [path.read_bytes() for path in kept]
    capsys.readouterr()
    for out in (precious, checkpoint, tmp_path / "notes"):
        assert grpo.main(["merge", str(checkpoint), str(out)]) == 2
        error = capsys.readouterr().err
        assert f"{out}: is there already" in error and error.count("\n") == 1
    assert [path.read_bytes() for path in kept] == before

    (tmp_path / "empty").mkdir()
    for out in ("empty", "new"):
        assert grpo.main(["merge", str(checkpoint), str(tmp_path / out)]) == 0
        assert (tmp_path / out / "model.safetensors").is_file()
