"""Which architectures does the trainer train exactly, and which does it refuse?

Builds every causal architecture of the installed transformers tiny and with random weights, and
asks `grpo.check_policy`. Then a process that shares no code with the check, and does not import the
trainer at all, computes the log-probs and gradients of the accepted ones again, by transformers
alone, one plain sequence at a time.

    python tests/evidence/families.py                   # the table, about 11 minutes
    python tests/evidence/families.py llama gemma2      # only these

The table has one row per architecture:

    exact        accepted; the largest difference of a log-prob, and of the gradient (relative)
    refused      the trainer ends with one line, before the first step
    not built    the tiny configuration does not make a model here

It ends with status 1 when an accepted one is off.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

VOCABULARY = 300
MOST_PARAMETERS = 40_000_000
OFF = 1e-3  # nats; of a gradient: of its length

# What makes an architecture tiny, by the names that its configuration may use.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "hidden_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "sliding_window": 12,
    "attention_chunk_size": 12,
    "window_size": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "is_decoder": True,
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 2.0,
    "time_step_rank": 4,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "patch_size": 4,
    "image_size": 16,
}

# What some want besides.
SPECIAL = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "mamba2": {"head_dim": 16},
}


class Tokenizer:
    """Ids of a text, as many as it has letters."""

    def encode(self, text: str) -> list[int]:
        """Ids below the vocabulary of the tiny models, none of them special."""
        ids = []
        for place, letter in enumerate(text):
            ids.append(10 + (7 * place + ord(letter)) % (VOCABULARY - 20))
        return ids


def tiny_config(config_class, left_out: str = ""):
    """A tiny configuration without the value left_out; one inside another is tiny as well."""
    default = config_class()
    values = {}
    for name, value in TINY.items():
        if name != left_out and is_wanted(config_class, default, name):
            values[name] = value
    # With a compressed cache every head has its own keys.
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = TINY["num_attention_heads"]
    values |= SPECIAL.get(config_class.model_type, {})
    for name, sub_class in config_class.sub_configs.items():
        if getattr(default, name, None) is not None and hasattr(sub_class, "sub_configs"):
            values[name] = tiny_config(type(getattr(default, name)), left_out)

    layer_types = getattr(default, "layer_types", None)
    if not layer_types:
        return config_class(**values)
    # Both kinds of layers, where there are two.
    kinds = sorted(set(layer_types))
    try:
        return config_class(layer_types=[kinds[n % len(kinds)] for n in range(4)], **values)
    except AttributeError:
        # Derived from something else.
        return config_class(**values)


def is_wanted(config_class, default, name: str) -> bool:
    """Whether the configuration has such a value, and it is one that can be given."""
    if isinstance(getattr(config_class, name, None), property):
        return False
    try:
        current = getattr(default, name)
    except Exception:  # noqa: BLE001  (some may differ between layers, and raise their own)
        return False
    # A list has one entry per layer, and None switches something off. A cap is wanted.
    if current is None:
        return name == "final_logit_softcapping"
    return not isinstance(current, (list, tuple))


def small_config(model_type: str):
    """A configuration that makes a small model; raises what the first try raised."""
    first = None
    # Some want values that agree with one that is not in the table: then one of ours is left out.
    for left_out in ("", *TINY):
        try:
            config = tiny_config(CONFIG_MAPPING[model_type], left_out)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters")
            return config
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever a configuration raises)
            first = first or error
    raise first


def build(model_type: str):
    """A tiny model of the architecture with random weights, biases and norms among them."""
    config = small_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # A fresh bias is 0 and a fresh norm 1: neither would show when it is left out.
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def rollouts_by_trainer(model):
    """Rollouts, log-probs of both paths, and a gradient, by the trainer.

    """
    import grpo

    prompts = [[10 + (5 * place) % 280 for place in range(length)] for length in (33, 4, 17)]
    uniform = grpo.uniform_numbers(3, 3, 14, seed=1)
    groups = grpo.sample(model, prompts, 3, 14, 1.0, {3, 50, 51, 52}, uniform)
    with torch.no_grad():
        trained, _ = grpo.completion_logprobs(model, groups, 1.0)
    use_float64(model)
    grpo.completion_logprobs(model, groups, 1.0)[0].sum().backward()

    rows = []
    for group in groups:
        for rollout in group:
            rows.append({"prompt": rollout.prompt_ids, "ids": rollout.ids, "logp": rollout.logp})
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return {"rows": rows, "trained": trained, "gradients": gradients}


def use_float64(model) -> None:
    """Turns the model to float64, where it runs in it: a long gradient is badly rounded else."""
    try:
        with torch.no_grad():
            model.double()(torch.tensor([[10, 11, 12]]), use_cache=False)
    except RuntimeError:
        model.float()


def recompute(model_type: str, results: dict) -> dict:
    """Differences of the trainer's results from transformers', one plain sequence at a time."""
    model = build(model_type)
    model.set_attn_implementation("eager")
    sampled = []
    for row in results["rows"]:
        sampled.extend(row["logp"])
    with torch.no_grad():
        own = plain_logprobs(model, results["rows"])
    use_float64(model)
    plain_logprobs(model, results["rows"]).sum().backward()

    squares = 0.0
    length = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        other = results["gradients"].get(name, torch.zeros_like(parameter))
        squares += (parameter.grad - other).square().sum().item()
        length += parameter.grad.square().sum().item()
    return {
        "sampling": (own - torch.tensor(sampled)).abs().max().item(),
        "training": (own - results["trained"]).abs().max().item(),
        "gradient": (squares / length) ** 0.5,
    }


def plain_logprobs(model, rows: list[dict]) -> torch.Tensor:
    """Log-probs of all completions' tokens, by the model's forward over one sequence at a time."""
    logp = []
    for row in rows:
        sequence = torch.tensor([row["prompt"] + row["ids"]])
        logits = model(sequence, use_cache=False).logits[0]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        for place, token in enumerate(row["ids"], start=len(row["prompt"])):
            logp.append(log_p[place - 1, token])
    return torch.stack(logp)


def out_of_time(number, frame):
    """An architecture that takes a minute when tiny is not looked at."""
    raise TimeoutError("takes more than a minute")


def examine(model_type: str) -> dict:
    """The row of one architecture."""
    import grpo

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(60)
    try:
        model = build(model_type)
    except Exception as error:  # noqa: BLE001  (whatever a configuration raises)
        return {"type": model_type, "result": "not built", "why": one_line(error)}
    finally:
        signal.alarm(0)

    signal.alarm(60)
    try:
        line = grpo.check_policy(model, Tokenizer())
    except (ValueError, TimeoutError) as error:
        return {"type": model_type, "result": "refused", "why": one_line(error)}
    finally:
        signal.alarm(0)

    try:
        results = rollouts_by_trainer(model)
    except Exception as error:  # noqa: BLE001  (accepted, and yet it fails)
        return {"type": model_type, "result": "OFF", "why": one_line(error)}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.pt")
        torch.save(results, path)
        command = [sys.executable, __file__, "--recompute", str(path), model_type]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().split("\n")[-1]
        return {"type": model_type, "result": "OFF", "why": f"not recomputed: {why}"}
    differences = json.loads(done.stdout)
    is_exact = max(differences.values()) <= OFF
    attention = "eager" if "eager attention" in line else "folded"
    result = "exact" if is_exact else "OFF"
    return {"type": model_type, "result": result, "why": f"{attention} attention", **differences}


def one_line(error: Exception) -> str:
    """What the error says, in one line that fits a table."""
    words = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return " ".join(words.split()).replace("|", "/")[:110]


def table_row(row: dict) -> str:
    """A line of the markdown table."""
    cells = [row["type"], row["result"]]
    for name in ("sampling", "training", "gradient"):
        cells.append(f"{row[name]:.0e}" if name in row else "")
    return "| " + " | ".join([*cells, row["why"]]) + " |"


def main(argv: list[str] | None = None) -> int:
    """Status 1 when an accepted architecture is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="architectures; all by default")
    parser.add_argument("--recompute", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    if args.recompute:
        results = torch.load(args.recompute, weights_only=True)
        print(json.dumps(recompute(args.types[0], results)))
        return 0

    counts = {}
    print("| architecture | result | sampling | training | gradient | |")
    print("|---|---|---|---|---|---|")
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        row = examine(model_type)
        counts[row["result"]] = counts.get(row["result"], 0) + 1
        print(table_row(row), flush=True)
    print(f"\n{json.dumps(counts)}")
    return 1 if "OFF" in counts else 0


if __name__ == "__main__":
    sys.exit(main())
