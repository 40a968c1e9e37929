"""Two processes that share a model (FSDP2, gloo) are one: rollouts, steps, trials, checkpoints, and half the memory each.

One start of torchrun runs all checks: importing the libraries twice is what costs the time.
"""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT  # puts the files on the path, also in a process of torchrun
from safetensors.torch import load_file, save_file
from test_grpo import settings

import arlrr
import grpo
import train

# A vocabulary that two processes cannot halve; tied and untied heads; a head of its own (soft cap); attention in windows.
CASES = {
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2Config", {"tie_word_embeddings": False}),
    "gemma2-capped": ("Gemma2Config", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
}
NUMBERS = ("loss", "grad_norm", "entropy", "clip_share", "logp_gap", "kl", "train_tokens")


def make_model(folder: Path, tokenizer_folder: Path, name: str) -> None:
    """A random model of three layers."""
    kind, options = CASES[name]
    config = getattr(transformers, kind)(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def some_groups() -> list[list[grpo.Rollout]]:
    """Seven groups of uneven lengths; one without advantage. Two processes have unlike numbers of rows."""
    rng = random.Random(0)
    groups = []
    for number in range(7):
        group = []
        for _ in range(3):
            ids = [rng.randrange(2, 120) for _ in range(rng.randint(1, 30 if number % 2 else 6))]
            rollout = grpo.Rollout([2 + number] * (5 + number), ids, [-5.0] * len(ids), "stop")
            rollout.advantage = 0.0 if number == 1 else rng.gauss(0, 1)
            group.append(rollout)
        groups.append(group)
    return groups


def copy_of(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in grpo.merged_weights(model)}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, grpo.DTensor) else tensor


def eight_steps(model, reference, optimizer, config) -> dict:
    """Two updates of two epochs of two minibatches; the numbers of the second."""
    groups = some_groups()
    for _ in range(2):
        log = grpo.update(model, optimizer, groups, config, reference)
    return {name: log[name] for name in NUMBERS}


def take_back_a_trial(model, optimizer, update) -> None:
    """A trial of arlrr.py: all weights are back bit for bit, and the same update does the same again."""
    lab = arlrr.Lab(model, optimizer, None, None, after_restore=lambda: None)
    before = copy_of(model)
    state = lab.save()
    update()
    ahead = copy_of(model)
    assert not all(torch.equal(before[name], ahead[name]) for name in before)
    lab.restore(state)
    back = copy_of(model)
    assert all(torch.equal(before[name], back[name]) for name in before)
    update()
    again = copy_of(model)
    assert all(torch.equal(ahead[name], again[name]) for name in before)


def run_case(folder: Path, out: Path) -> None:
    """Everything that is compared, by one process or by several; the first one writes it to OUT."""
    model, _ = grpo.load_policy(str(folder))
    attention = model.config._attn_implementation
    reference = grpo.load_policy(str(folder), attention=attention)[0].requires_grad_(False)
    config = settings(loss="dapo", max_new_tokens=30, epochs=2, minibatches=2, beta=0.1, pass_tokens=40, checkpointing=1)
    results = {}

    # Rollouts end in each process when they end: none waits for the other within sampling.
    rank, world = grpo.rank_and_world()
    prompts = [[5, 6, 7], [8, 9], [3, 4, 5, 6]]
    uniform = grpo.uniform_numbers(3, 2, 12, seed=0)[rank::world]
    sampled = grpo.sample(model, prompts[rank::world], 2, 12, 1.0, {1, 7, 8}, uniform)
    results["first prompt"] = [[rollout.ids, rollout.logp] for rollout in sampled[0]]
    groups = some_groups()
    grpo.set_weights(groups, config)
    results["passes"] = [len(passes) for passes in grpo.make_passes(groups, config)]
    results["idle"] = []
    for minibatch in grpo.minibatches(groups, config):
        shares = [grpo.micro_batches(minibatch, config.pass_tokens, number, 2) for number in range(2)]
        results["idle"].append(abs(len(shares[0]) - len(shares[1])))

    # Plain gradient descent first: AdamW divides by the gradient's size, and so shows the rounding of what is nearly zero.
    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    results["descent"] = eight_steps(model, reference, descent, config)
    weights = {f"descent {name}": tensor for name, tensor in copy_of(model).items()}
    results["measured"] = grpo.measure_kl(reference, some_groups(), 1.0, pass_tokens=40)

    model, _ = grpo.load_policy(str(folder), attention=attention)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    gradients = []

    def count_gradients(*_):
        """They are dropped after each step."""
        gradients.append(sum(local(parameter.grad).numel() for parameter in model.parameters()))

    adam.register_step_pre_hook(count_gradients)
    results["adam"] = eight_steps(model, reference, adam, config)
    weights |= {f"adam {name}": tensor for name, tensor in copy_of(model).items()}
    take_back_a_trial(model, adam, lambda: grpo.update(model, adam, some_groups(), config, reference))

    # What a process holds: weights, gradients, both moments, the reference.
    held = gradients[-1]
    for parameter in model.parameters():
        moments = adam.state[parameter]
        for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
            held += local(tensor).numel()
    held += sum(local(parameter).numel() for parameter in reference.parameters())
    results["held"] = held

    # The moments of all are a file; from it each takes its own again.
    state = grpo.gathered_moments(adam)
    if world > 1:
        torch.distributed.broadcast_object_list(shared := [state], src=0)
        state = shared[0]
    other = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    grpo.load_moments(other, state)
    for parameter in model.parameters():
        for name, value in adam.state[parameter].items():
            assert torch.equal(local(other.state[parameter][name]), local(value))
    for number, moments in state["state"].items():
        for name, value in moments.items():
            weights[f"moments {number} {name}"] = value

    weights |= {f"saved {name}": tensor for name, tensor in copy_of(model).items()}
    saved = grpo.gathered_weights(model)
    if rank == 0:
        model.save_pretrained(out / "model", state_dict=saved)
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, out / "weights.safetensors")
        (out / "results.json").write_text(json.dumps(results))


def read(folder: Path) -> tuple[dict, dict]:
    return json.loads((folder / "results.json").read_text()), load_file(folder / "weights.safetensors")


def largest_gap(one: dict, two: dict, prefix: str) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one if name.startswith(prefix))


def check(tmp_path, tiny, *names: str) -> None:
    """One process here, two under torchrun; everything that they wrote is compared."""
    from test_ranks import together

    for name in names:
        make_model(tmp_path / name, tiny, name)
        (tmp_path / name / "one").mkdir()
        (tmp_path / name / "two").mkdir()
        run_case(tmp_path / name, tmp_path / name / "one")
    status, printed = together(2, tmp_path, *names, script=__file__)
    assert status == 0, printed

    for name in names:
        one, one_weights = read(tmp_path / name / "one")
        two, two_weights = read(tmp_path / name / "two")
        assert one_weights.keys() == two_weights.keys()
        assert largest_gap(one_weights, two_weights, "descent ") < 1e-6, name
        assert largest_gap(one_weights, two_weights, "adam ") < 2e-4, name
        for part in ("descent", "adam"):
            assert one[part] == pytest.approx(two[part], abs=5e-5, rel=5e-5), name
        assert one["measured"] == pytest.approx(two["measured"], abs=5e-5)
        for mine, theirs in zip(one["first prompt"], two["first prompt"]):
            assert mine[0] == theirs[0] and mine[1] == pytest.approx(theirs[1], abs=1e-5)

        # In some steps one process has a row, and so a pass, that the other has not.
        assert any(few > 0 for few in one["idle"]), name
        # Fewer passes than one process has, and less memory: slices of odd sizes are not exact halves.
        assert len(one["passes"]) == len(two["passes"]) == 2
        assert all(0 < few < many for few, many in zip(two["passes"], one["passes"]))
        assert 0.49 < two["held"] / one["held"] < 0.52, name

        # What was saved by two is what one would have saved: the same names, and it loads as it is.
        saved = load_file(tmp_path / name / "two" / "model" / "model.safetensors")
        assert saved.keys() == load_file(tmp_path / name / "one" / "model" / "model.safetensors").keys()
        config = json.loads((tmp_path / name / "two" / "model" / "config.json").read_text())
        assert not config["architectures"][0].startswith("FSDP")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "two" / "model", dtype=torch.float32)
        loaded = {f"saved {key}": tensor for key, tensor in model.state_dict().items()}
        assert largest_gap(loaded, two_weights, "saved ") == 0, name


@pytest.mark.long
def test_two_halves_are_one(tmp_path, tiny):
    check(tmp_path, tiny, "llama-tied", "qwen2-untied")


@pytest.mark.long
def test_two_halves_of_a_model_unlike_llama_are_one(tmp_path, tiny):
    check(tmp_path, tiny, "gemma2-capped")


if __name__ == "__main__":  # a process of torchrun
    import torch.distributed as dist

    assert ROOT
    dist.init_process_group("gloo")
    for case in sys.argv[2:]:
        run_case(Path(sys.argv[1]) / case, Path(sys.argv[1]) / case / "two")
        dist.barrier()
    train.leave(0)
