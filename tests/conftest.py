"""What the tests share: the files on the path, a tiny random model, the optional real data, the marker `long`."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

# One thread, here and in the processes that tests start, before torch counts the cores: models of two layers are slower with
# two, and two such processes at a time wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"  # real benchmark rows, not part of the repository

# The long tests of attacks try a part of each kind; with FULL_COUNTS=1 in the environment all of it: the counts that
# tests/evidence/README.md states.
FULL = os.environ.get("FULL_COUNTS") == "1"


def some_of(attacks, one_in):
    """All of them with FULL_COUNTS=1, else one in so many."""
    return list(attacks)[:: 1 if FULL else one_in]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes (marker: long)")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; skipped without --long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: give --long"))


@pytest.fixture
def shared():
    """A function name -> path of a real data file; skips the test where the folder is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_file():
            pytest.skip(f"{name} is not beside this repository")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Two held-out prompts, so that evaluations take no time."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = (ROOT / "data" / "heldout.jsonl").read_text(encoding="utf8").split("\n")
    path.write_text("\n".join(lines[:2]) + "\n", encoding="utf8")
    return str(path)


@pytest.fixture(scope="session")
def server():
    """Starts processes that have imported everything already: tenths of a second instead of four."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "transformers.models.llama.modeling_llama", "matplotlib.figure", "pytest"])
    # It imports by the folder that it is started in: now, before a test goes elsewhere.
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


@pytest.fixture
def fork(tmp_path):
    """A copy of the repository's files, as somebody who wants to change them would make it."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for name in ("rar", "judge", "grpo", "rler", "arlrr", "train"):
        shutil.copy(ROOT / f"{name}.py", folder)
    for name in ("data", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random two-layer Llama with grouped-query attention, a tied head and a byte tokenizer."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(folder):
    """Writes the model of `tiny`; returns its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *letters])}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny):
    """The tiny model in float64, fresh for each test: differences beyond 1e-10 are then not rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    import grpo  # noqa: F401  (registers the attention that sampling uses)

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    model.set_attn_implementation("folded")
    return model


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    """Prompts with two classes of criteria about form, in which the answers of a random model differ: it learns from both."""
    path = tmp_path_factory.mktemp("forms") / "forms.jsonl"
    short = {"text": "Is at most one word long.", "weight": 3, "axis": "communication_quality"}
    brief = {"text": "Is at most three words long.", "weight": 2, "axis": "communication_quality"}
    several = {"text": "Is at least two words long.", "weight": 1, "axis": "instruction_following"}
    rubric = [short | {"check": "words <= 1"}, brief | {"check": "words <= 3"}, several | {"check": "words >= 2"}]
    rows = [{"id": f"p{n}", "question": f"What is {n} plus {n}?", "rubric": rubric} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


# A row as HealthBench has it, tags nested in two ways.
HEALTHBENCH = {
    "prompt_id": "hb-1",
    "prompt": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "My head hurts."},
    ],
    "rubrics": [
        {
            "criterion": "Asks how long.",
            "points": 5,
            "tags": ["level:example", "axis:context_awareness"],
        },
        {
            "criterion": "Recommends opioids.",
            "points": -9,
            "tags": [["level:cluster"], ["axis:accuracy", ["cluster:pain"]]],
        },
    ],
    "example_tags": ["theme:context_seeking", ["physician_agreed_category:not-enough-context"]],
    "ideal_completions_data": {"ideal_completion": "How long has it hurt?"},
    "canary": "a mark",
}
