"""The real vLLM engine beside the trainer: log-probs that agree, weights that arrive.

Skipped where vLLM is not installed.
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT  # puts the files on the path, also in a process of torchrun
from test_grpo import flat, set_advantages, settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import grpo
import train
from grpo import sample, update

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
ENDS = {1}
# One is longer than a block of vLLM's cache (16 tokens, 128 on a CPU): a stale prefix cache shows.
PROMPTS = [[2 + (7 * i) % 250 for i in range(300)], [5, 6, 7], [9 + i for i in range(40)]]


@pytest.fixture(scope="module")
def tiny(tiny, tmp_path_factory):
    """The tiny model with heads as wide as vLLM's attention for CPUs wants them."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(tiny)
    config.head_dim = 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tiny):
    state = torch.get_rng_state()
    sampler = grpo.VLLMSampler(tiny, 400, bfloat16=False, memory_gib=1.0)
    # Starting it must not change what the run draws.
    assert torch.equal(state, torch.get_rng_state())
    return sampler


def gap(engine, model, temperature=0.8) -> float:
    """Largest difference of a token's log-prob, vLLM against the trainer."""
    groups = engine.sample(PROMPTS, [0, 4, 8], 4, 12, temperature, ENDS)
    assert [len(g) for g in groups] == [4, 4, 4]
    with torch.no_grad():
        logp, _ = grpo.completion_logprobs(model, groups, temperature)
    sampled = []
    for rollout in flat(groups):
        sampled.extend(rollout.logp)
    return (logp - logp.new_tensor(sampled)).abs().max().item()


def test_vllm_weights_arrive_in_the_live_engine(engine, tiny):
    """Small before, large after the policy moved alone, small after sync; with a tied head."""
    model, _ = grpo.load_policy(tiny)
    engine.sync(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert gap(engine, model) < 1e-3 and gap(engine, model, temperature=0.5) < 1e-3
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            p.add_(0.1 * noise)
    assert gap(engine, model) > 0.1
    engine.sync(model)
    assert gap(engine, model) < 1e-3


def move(model, lora_rank: int) -> None:
    """Changes the policy as training would: all weights, or the adapters. The same in every process."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if lora_rank:
            for layer in grpo.lora_layers(model).values():
                layer.lora_b.add_(0.3 * torch.randn(layer.lora_b.shape, generator=generator))
        else:
            for parameter in model.parameters():
                parameter.mul_(1.3)


def test_vllm_gets_adapters_merged(engine, tiny):
    model, _ = grpo.load_policy(tiny, lora_rank=4)
    engine.sync(model)
    assert gap(engine, model) < 1e-3
    move(model, lora_rank=4)
    assert gap(engine, model) > 0.1
    engine.sync(model)
    assert gap(engine, model) < 1e-3


def test_vllm_beside_each_of_two_processes(tiny, tmp_path):
    """An engine per process; a sharded policy is handed over gathered, adapters merged, tensor by tensor."""
    from test_ranks import together

    status, printed = together(2, tiny, tmp_path, script=__file__, timeout=1200)
    assert status == 0, printed
    for rank in range(2):
        for first, stale, synced in json.loads((tmp_path / f"gaps-{rank}.json").read_text()):
            assert first < 1e-3 and synced < 1e-3 and stale > 0.1, (first, stale, synced)


def test_vllm_trains_in_two_processes(tiny, tmp_path):
    from test_ranks import together

    flags = "--sampler vllm --vllm_memory 1 --steps 2 --prompts 3 --lr 0.003 --max_new_tokens 32 --prompts_per_step 3 --group_size 8"
    status, printed = together(2, *flags.split(), "--model", tiny, "--out", tmp_path / "run", timeout=1200)
    assert status == 0, printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["logp_gap"] for row in rows[1:] if row["grad_norm"]]
    assert gaps and max(gaps) < 1e-3


def test_vllm_rollouts_have_the_form_of_the_torch_sampler(engine, tiny):
    """Ids with the end token, log-probs, a finish reason; greedy ids are ours; seeds repeat."""
    model, _ = grpo.load_policy(tiny)
    engine.sync(model)
    ours = sample(model, PROMPTS, 1, 20, 0.0, ENDS)
    theirs = engine.sample(PROMPTS, [0, 1, 2], 1, 20, 0.0, ENDS)
    assert [r.ids for [r] in ours] == [r.ids for [r] in theirs]

    ends = set(range(100, 108))
    counts = []

    def ids(seeds):
        groups = engine.sample(PROMPTS, seeds, 6, 20, 1.0, ends, on_token=counts.append)
        return groups, [r.ids for r in flat(groups)]

    groups, first = ids([5, 11, 17])
    for prompt, group in zip(PROMPTS, groups):
        for r in group:
            assert r.prompt_ids == prompt and len(r.logp) == len(r.ids) <= 20
            assert all(p <= 0 for p in r.logp)
            assert (r.finish == "stop") == (r.ids[-1] in ends | {1})
            assert not set(r.ids[:-1]) & ends
    assert {r.finish for r in flat(groups)} == {"stop", "length"}
    assert sum(counts) == sum(len(r.ids) for r in flat(groups))

    assert ids([5, 11, 17])[1] == first
    assert ids([6, 12, 18])[1] != first
    assert len({tuple(r.ids) for r in groups[1]}) > 1


def test_vllm_importance_weights_pull_a_stale_sampler_back(engine, tiny):
    """With rollouts of another policy the weights leave 1, and stay at or below the cap."""
    model, _ = grpo.load_policy(tiny)
    engine.sync(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.3)
    groups = engine.sample(PROMPTS, [1, 5, 9], 4, 12, 1.0, ENDS)
    set_advantages(groups, [(1.0, -1.0, 0.5, -0.5)] * 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    log = update(model, optimizer, groups, settings(tis_cap=2.0))
    assert log["logp_gap"] > 0.01 and 0 < log["tis_mean"] <= 2.0


def test_vllm_trains_through_the_command(tiny, tmp_path):
    """Three steps of train.py: finite rewards, and a gap that is small as every step syncs."""
    out = tmp_path / "run"
    flags = "--sampler vllm --vllm_memory 1 --steps 3 --prompts 3 --lr 0.003 --max_new_tokens 32 --judge lexical"
    flags += " --prompts_per_step 3 --group_size 8"
    assert train.main([*flags.split(), "--model", str(tiny), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(row["reward"]) for row in rows[1:])
    trained = [
        row for row in rows[1:] if row["grad_norm"] > 0
    ]  # a step whose groups are all alike trains nothing
    assert len(trained) >= 2
    for row in trained:
        assert row["logp_gap"] < 1e-3 and row["tis_mean"] == pytest.approx(1, abs=1e-3)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


if __name__ == "__main__":  # a process of torchrun
    import torch.distributed as dist

    assert ROOT
    dist.init_process_group("gloo")
    folder, out = sys.argv[1], Path(sys.argv[2])
    sampler = grpo.VLLMSampler(folder, 400, bfloat16=False, memory_gib=1.0)
    rows = []
    for lora_rank in (0, 4):
        policy, _ = grpo.load_policy(folder, lora_rank=lora_rank)
        gaps = []
        sampler.sync(policy)
        gaps.append(gap(sampler, policy))
        move(policy, lora_rank)
        gaps.append(gap(sampler, policy))
        sampler.sync(policy)
        gaps.append(gap(sampler, policy))
        rows.append(gaps)
    (out / f"gaps-{dist.get_rank()}.json").write_text(json.dumps(rows))
    train.leave(0)
