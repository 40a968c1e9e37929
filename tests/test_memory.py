"""The memory line: what it counts, that it is close to what a run holds, and that it refuses what cannot fit."""

import re
import sys

import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig

import grpo
import train
from tools import memory

sys.path.insert(0, str(ROOT / "tests" / "evidence"))
import gpu_check


def config_of(**changes):
    """A model's config: 4 layers, hidden 64, an untied head."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    return LlamaConfig(**(shape | changes))


def estimate(model_config, world=1, bfloat16=False, prompt_tokens=20, **changes):
    settings = gpu_check.settings(**({"max_new_tokens": 30, "prompts_per_step": 4, "group_size": 8} | changes))
    return grpo.estimate_memory(model_config, settings, prompt_tokens, 0, world, bfloat16)


def test_weights_are_counted_without_loading_them():
    """7.6 billion parameters in a second: 16 bytes each, with the reference 20."""
    parts = estimate(gpu_check.shape_config("qwen2-7b"), bfloat16=True)
    n = 7_615_616_512  # the published model's
    assert parts["weights"] == parts["gradients"] == parts["reference"] == 4 * n
    assert parts["moments"] == 8 * n
    assert estimate(config_of(), beta=-1.0)["reference"] == 0


def test_a_tied_head_is_counted_once():
    tied = estimate(config_of(tie_word_embeddings=True))
    untied = estimate(config_of())
    assert untied["weights"] - tied["weights"] == 4 * 500 * 64


def test_activations_are_what_autograd_keeps(tiny_model):
    """Against real tensors of a real forward, counted by their storages."""
    model = tiny_model.float()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    settings = gpu_check.settings(max_new_tokens=10, prompts_per_step=2, group_size=3)
    parts = grpo.estimate_memory(model.config, settings, 6)
    ids = torch.zeros(2, 36, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), grpo.packed_rows(ids, ids):
        hidden = grpo.layers_of(model)(ids, attention_mask=torch.ones_like(ids), position_ids=ids, use_cache=False)[0]
    total = sum(size for pointer, size in kept.items() if pointer not in parameters)
    assert hidden.requires_grad
    assert parts["activations"] == pytest.approx(total, rel=0.02)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    whole = estimate(config_of(num_hidden_layers=8))
    checkpointed = estimate(config_of(num_hidden_layers=8), checkpointing=1)
    deeper = estimate(config_of(num_hidden_layers=16), checkpointing=1)
    assert checkpointed["activations"] < 0.25 * whole["activations"]
    # Eight more layers keep eight more inputs: 3,072 tokens or all of the step, 64 float32 each.
    tokens = 4 * (20 + 8 * 30)
    assert deeper["activations"] - checkpointed["activations"] == 8 * tokens * 64 * 4


def test_keys_and_values_follow_rows_and_heads():
    """Two numbers per layer, kv head and width of a head, for each token of each row."""
    few = estimate(config_of())["sampler"]
    many = estimate(config_of(), prompts_per_step=8)["sampler"]
    rows = 4 * 8
    per_token = 4 * 2 * 2 * 16 * 4
    assert many - few == rows * (50 * per_token + 5 * 4 * 500)


def test_several_processes_share_weights_and_gather_a_layer():
    one = estimate(config_of())
    eight = estimate(config_of(), world=8)
    for name in ("weights", "gradients", "moments", "reference"):
        assert eight[name] == one[name] / 8
    assert eight["gathered"] > 0 == one["gathered"]


def test_bfloat16_layers_keep_copies_of_their_weights_unless_checkpointed():
    """Autograd keeps the copy that a product was made with; sharded layers are gathered as such."""
    n = sum(p.numel() for p in grpo.AutoModelForCausalLM.from_config(config_of()).model.layers.parameters())
    wide = {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 1, "prompt_tokens": 2}
    one = estimate(config_of(), bfloat16=True, **wide)["activations"]
    shared = estimate(config_of(), bfloat16=True, world=2, **wide)["activations"]
    assert one - shared == pytest.approx(2 * n, rel=0.02)


def test_lora_trains_adapters_only():
    """A [rank, in] and B [out, rank] of seven products; the base in bfloat16 where it computes in it, the head never."""
    layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    exact = estimate(config_of(), lora_rank=4)
    assert exact["gradients"] == 4 * 4 * layer * 4 and exact["moments"] == 2 * exact["gradients"]
    assert exact["reference"] == exact["gathered"] == 0
    plain = estimate(config_of())
    assert exact["weights"] == plain["weights"] + exact["gradients"]
    low = estimate(config_of(), lora_rank=4, bfloat16=True)
    products = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert low["weights"] == exact["weights"] - 2 * products
    assert low["loading"] == plain["weights"]
    # Every process has all of it.
    assert estimate(config_of(), lora_rank=4, world=8)["weights"] == exact["weights"]


def test_an_engine_that_sleeps_is_not_there_while_training():
    awake = estimate(config_of(), sampler="vllm")
    asleep = estimate(config_of(), sampler="vllm_sleep")
    assert awake["engine"] == asleep["engine"] > 4 * 2**30
    assert awake["training"] - asleep["training"] == awake["engine"]
    assert awake["sampling"] == asleep["sampling"]


def test_a_long_completion_makes_a_longer_row_than_a_pass():
    parts = estimate(config_of(), pass_tokens=100, max_new_tokens=300)
    assert parts["activations"] > 2 * estimate(config_of(), pass_tokens=100, max_new_tokens=80)["activations"]


def test_a_pass_of_more_tokens_gets_more_rows_and_not_longer_ones():
    """The mask grows with the square of a row."""
    group = [grpo.Rollout([3] * 100, [4] * 400, [], "stop") for _ in range(30)]
    for pass_tokens, rows in ((2048, 1), (3072, 1), (9500, 3)):
        batches = grpo.micro_batches([group], pass_tokens)
        assert max(len(batch) for batch in batches) == rows
        longest = max(grpo.row_length(piece) for batch in batches for piece in batch)
        assert longest <= min(pass_tokens, 3072)
        assert sum(len(piece) for batch in batches for piece in batch) == 30
    # The estimate has the same rows: three times the tokens, not nine times the masks.
    shape = {"group_size": 30, "max_new_tokens": 400, "prompt_tokens": 100}
    one = estimate(config_of(), pass_tokens=3072, **shape)["activations"]
    assert estimate(config_of(), pass_tokens=9500, **shape)["activations"] == pytest.approx(3 * one, rel=0.1)


def test_float32_products_are_exact_in_the_check_and_as_before_after_it(tiny, monkeypatch):
    """A GPU with bfloat16 layers rounds the head's products; the check must not see that."""
    seen = []
    original = grpo.own_logprobs

    def note(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return original(*arguments)

    monkeypatch.setattr(grpo, "own_logprobs", note)
    before = torch.get_float32_matmul_precision()
    try:
        grpo.use_tf32("cpu")
        assert torch.get_float32_matmul_precision() == before
        grpo.use_tf32("cuda:0")
        assert torch.get_float32_matmul_precision() == "high"
        grpo.load_policy(tiny)
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradients_are_dropped_after_the_step(tiny_model):
    groups = gpu_check.made_up_groups(tiny_model, 2, 4, 5, 6)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.1)
    log = grpo.update(tiny_model, optimizer, groups, gpu_check.settings(beta=0.0))
    assert log["grad_norm"] > 0
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_no_copies_of_weights_are_kept_between_layers(tiny):
    """With checkpointing a cache would hold every layer's bfloat16 copy."""
    model, _ = grpo.load_policy(tiny, bfloat16=True)
    with grpo.precision(model):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()


def test_the_line_comes_before_the_model_and_is_right_for_a_run(tiny, few, tmp_path, capsys, monkeypatch):
    """The run's own settings: rows, pass, prompts of the data."""
    monkeypatch.setattr(grpo, "load_policy", lambda *arguments: 1 / 0)
    flags = ["--model", str(tiny), "--eval_data", few, "--out", str(tmp_path / "run")]
    assert train.main(flags) == 2
    printed = capsys.readouterr().out
    [line] = re.findall(r"^memory, GB: .*$", printed, re.MULTILINE)
    for words in ("while training", "while sampling", "of the machine"):
        assert words in line


@pytest.mark.parametrize(("flags", "knobs"), [("", ["--lora_rank 32", "--checkpointing 1", "--beta -1", "torchrun"]), ("--sampler vllm --checkpointing 1", ["vllm_sleep", "--vllm_memory"])])
def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny, few, tmp_path, capsys, flags, knobs):
    """The config of half a trillion parameters, and no weights."""
    folder = tmp_path / "giant"
    config_of(hidden_size=65536, intermediate_size=262144, num_attention_heads=512).save_pretrained(folder)
    assert train.main(["--model", str(folder), "--eval_data", few, "--out", str(tmp_path / "run"), *flags.split()]) == 2
    [last] = capsys.readouterr().err.strip().split("\n")[-1:]
    assert "GB per process" in last and str(folder) in last
    for knob in knobs:
        assert knob in last
    assert "--checkpointing" not in last or "--checkpointing" not in flags
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_estimated_is_loaded_all_the_same(tiny, few, tmp_path, capsys, monkeypatch):
    def fails(*arguments):
        raise NotImplementedError("an operation without shapes")

    monkeypatch.setattr(grpo, "estimate_memory", fails)
    flags = ["--model", str(tiny), "--eval_data", few, "--steps", "1", "--prompts_per_step", "1", "--group_size", "2", "--max_new_tokens", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert "memory: not estimated (an operation without shapes)" in capsys.readouterr().out


def test_the_tool_plans_for_a_machine_that_is_not_there(tiny, capsys):
    flags = ["--model", str(tiny), "--sampler", "vllm"]
    assert memory.main(["--cards", "8", "--card_gb", "80", *flags]) == 0
    assert re.search(r"^8 x 80 GB; GB of each: .* engine 4.3; in all .* while training", capsys.readouterr().out)
    # Four fifths of the need are refused, a little too much is only said.
    assert memory.main(["--card_gb", "4", *flags]) == 0
    assert "a little too much" in capsys.readouterr().err
    assert memory.main(["--card_gb", "1", *flags]) == 2
    assert "vllm_sleep" in capsys.readouterr().err
    for wrong in (["--cards", "-3"], ["--cards", "0"], ["--card_gb", "nan"], ["--card_gb", "inf"], ["--card_gb", "-1"], ["--card_gb", "0"]):
        assert memory.main([*wrong, *flags]) == 2
        said, error = capsys.readouterr()
        assert f"memory.py: {wrong[0]} {wrong[1]}: give a" in error and error.count("\n") == 1 and not said
    for wrong in (["--model", "/nowhere"], ["--stepps", "3"], ["--cards", "two"], ["--data", "/nowhere.jsonl"]):
        assert memory.main(wrong) == 2
        [line] = capsys.readouterr().err.strip().split("\n")
        assert wrong[1] in line or wrong[0] in line
