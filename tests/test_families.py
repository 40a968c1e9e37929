"""Exact or refused: log-probs of many architectures, chat templates, end tokens, thoughts."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo

sys.path.insert(0, str(Path(__file__).resolve().parent / "evidence"))

import families

COMMON = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "mistral",
    "phi",
    "granite",
    "cohere2",
    "olmo2",
    "smollm3",
    "gpt2",
    "opt",
    "gpt_oss",
    "llama4_text",
]

# ---------------------------------------------------------------------- architectures


@pytest.mark.parametrize("model_type", COMMON)
def test_common_families_are_exact(model_type):
    """Accepted by the check; log-probs and gradients are those of plain sequences.

    Windows of 12 tokens, prompts of 4 to 33: left out are neither caps nor windows nor biases.
    """
    model = families.build(model_type)
    line = grpo.check_policy(model, families.Tokenizer())
    assert line.startswith(f"{model.config.model_type}: log-probs are those of the model's own")
    results = families.rollouts_by_trainer(model)
    differences = families.recompute(model_type, results)
    assert max(differences.values()) < 5e-5, differences


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "jamba"])
def test_what_cannot_be_exact_is_refused_in_one_line(model_type):
    """Positions by place in a row, and layers with a state, do not fit packed rows."""
    model = families.build(model_type)
    line = f"^{model_type} models cannot be trained here: ."
    with pytest.raises(ValueError, match=line) as error:
        grpo.check_policy(model, families.Tokenizer())
    assert "\n" not in str(error.value)


def test_a_model_is_checked_when_it_is_loaded(tiny, monkeypatch, capsys):
    """A sampler or a trainer that is off ends the run before it begins."""
    # The line is printed once per process: an earlier test may have seen it.
    grpo.noted.clear()
    for _ in range(2):
        grpo.load_policy(str(tiny))
    said = capsys.readouterr().err
    line = r"llama: log-probs are those of the model's own forward to \S+ \(folded attention\), checked in \d+\.\d s\n"
    assert re.fullmatch(line, said)

    real = grpo.folded_attention

    def without_scale(module, query, key, value, mask, scaling=None, **kwargs):
        return real(module, query, key, value, mask, scaling=1.1 * scaling, **kwargs)

    # Such an attention is not used: the model's own is.
    monkeypatch.setattr(grpo, "folded_attention", without_scale)
    grpo.AttentionInterface.register("folded", without_scale)
    try:
        grpo.load_policy(str(tiny))
        assert "eager attention" in capsys.readouterr().err
    finally:
        grpo.AttentionInterface.register("folded", real)

    # A head that is off has no other.
    monkeypatch.setattr(grpo, "head_logits", lambda model, hidden: 1.1 * model.lm_head(hidden))
    with pytest.raises(ValueError, match="cannot be trained here: log-probs of") as error:
        grpo.load_policy(str(tiny))
    # Both attentions were tried: why each was not used.
    for attention in ("(folded attention)", "(eager attention)"):
        assert attention in str(error.value)


def test_the_check_sees_a_mistake_in_the_rows_that_are_dropped(tiny, monkeypatch):
    """Rows that change places only when finished ones leave."""
    real = grpo.select_rows

    def turned_round(kv_cache, rows):
        is_dropping = len(rows) < len(kv_cache.layers[0].keys)
        real(kv_cache, rows.flip(0) if is_dropping else rows)

    monkeypatch.setattr(grpo, "select_rows", turned_round)
    with pytest.raises(ValueError, match="log-probs of sampling are off"):
        grpo.load_policy(str(tiny))


def test_the_entropy_of_a_head_that_masks_ids(monkeypatch):
    """Logits of -inf: their probability is 0, and they add nothing."""
    model = families.build("phi")

    def masked(model, hidden):
        logits = model.lm_head(hidden)
        return logits.index_fill(-1, torch.tensor([3, 4]), float("-inf"))

    hidden = torch.randn(5, 32)
    monkeypatch.setattr(grpo, "head_logits", masked)
    logp, entropy = grpo.own_head_logprobs(model, hidden, torch.tensor([0, 1, 2, 5, 6]), 0.7)
    want = torch.distributions.Categorical(logits=masked(model, hidden) / 0.7).entropy()
    assert torch.isfinite(logp).all()
    assert torch.allclose(entropy, want, atol=1e-5)


def test_the_gradient_of_a_head_with_bias_scale_and_cap_in_chunks(monkeypatch):
    """Against autograd through the model's own logits, with more tokens than one chunk."""
    monkeypatch.setattr(grpo, "CHUNK", 4)
    for model_type in ("phi", "granite", "gemma2"):
        model = families.build(model_type).double()
        assert not grpo.has_plain_head(model)
        hidden = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
        ids = torch.randint(0, families.VOCABULARY, (11,))
        logp, entropy = grpo.head_logprobs(model, hidden, ids, 0.7)

        plain = (grpo.head_logits(model, hidden) / 0.7).log_softmax(-1)
        want = plain.gather(1, ids[:, None])[:, 0]
        assert torch.allclose(logp, want, atol=1e-12)
        assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-12)
        parameters = [hidden, *model.get_output_embeddings().parameters()]
        got = torch.autograd.grad(logp.sum(), parameters)
        for a, b in zip(got, torch.autograd.grad(want.sum(), parameters)):
            assert torch.allclose(a, b, atol=1e-12)


def test_plain_heads_take_the_fast_way(tiny_model):
    assert grpo.has_plain_head(tiny_model)
    assert grpo.has_plain_head(families.build("qwen2"))


def test_dropout_does_not_act_with_checkpointing():
    """OPT's layers ask their own training flag: the library's checkpointing would start it."""
    results = []
    for on in (False, True):
        model = families.build("opt")
        for layer in model.model.decoder.layers:
            layer.dropout = 0.5
        group = [grpo.Rollout([5, 6, 7], [8, 9, 10], [], "stop")]
        with grpo.recomputed_layers(model, on):
            logp, _ = grpo.completion_logprobs(model, [group], 1.0)
            logp.sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.model.decoder.parameters()]))
    assert torch.equal(*results)


def test_a_window_counts_tokens_and_not_padding():
    """Prompts of 3 and 30 tokens in one batch, a window of 12: padding lies between the short one
    and its completion."""
    model = families.build("mistral")
    grpo.check_policy(model, families.Tokenizer())
    prompts = [[20, 21, 22], list(range(30, 60))]
    groups = grpo.sample(model, prompts, 1, 8, 0.0, set())
    alone = [grpo.sample(model, [prompt], 1, 8, 0.0, set())[0] for prompt in prompts]
    for [together], [single] in zip(groups, alone):
        assert together.ids == single.ids
        assert together.logp == pytest.approx(single.logp, abs=1e-5)


# ---------------------------------------------------------------------- templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
ALTERNATION = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IGNORES_SYSTEM = CHATML.replace("<|im_start|>{{", "{% if m['role'] != 'system' %}<|im_start|>{{", 1)
IGNORES_SYSTEM = IGNORES_SYSTEM.replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer(tiny):
    """The tiny model's, to be given other templates."""
    grpo.noted.clear()
    return AutoTokenizer.from_pretrained(tiny)


def text_of(tokenizer, messages, **more):
    """The prompt as the model reads it."""
    return tokenizer.decode(grpo.encode(tokenizer, messages, **more))


def test_ids_are_those_of_the_template(tokenizer):
    for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
        options = {"add_generation_prompt": True, "return_dict": False}
        want = tokenizer.apply_chat_template(messages, **options)
        assert grpo.encode(tokenizer, messages) == list(want)


@pytest.mark.parametrize("template", [NO_SYSTEM + CHATML, IGNORES_SYSTEM])
def test_a_refused_system_message_goes_into_the_users_turn_and_is_said_once(
    tokenizer, template, capsys
):
    tokenizer.chat_template = template
    for _ in range(2):
        assert text_of(tokenizer, [SYSTEM, USER]) == PROMPT.replace("Hi", "Be brief.\n\nHi")
    warning = capsys.readouterr().err
    assert warning.count("takes no system message") == warning.count("\n") == 1


def test_a_template_over_parts_gets_parts(tokenizer):
    tokenizer.chat_template = PARTS
    assert text_of(tokenizer, [USER]) == PROMPT
    tokenizer.chat_template = NO_SYSTEM + PARTS
    assert text_of(tokenizer, [SYSTEM, USER]) == PROMPT.replace("Hi", "Be brief.\n\nHi")


def test_what_a_template_does_not_take_is_an_error_of_one_line(tokenizer):
    tokenizer.chat_template = ALTERNATION + CHATML
    with pytest.raises(ValueError, match="chat template of .* roles must alternate") as error:
        grpo.encode(tokenizer, [USER, USER])
    assert "\n" not in str(error.value)

    tokenizer.chat_template = {"tools": CHATML, "plain": CHATML}
    with pytest.raises(ValueError, match="multiple chat templates") as error:
        grpo.encode(tokenizer, [USER])
    assert "\n" not in str(error.value)
    assert text_of(tokenizer, [USER], template_kwargs={"chat_template": "plain"}) == PROMPT


@pytest.mark.parametrize("messages", [[], [SYSTEM], [USER, ANSWER]])
def test_a_prompt_ends_with_the_users_message(tokenizer, messages):
    for template in (CHATML, None):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="the last message must be the user's or a tool's"):
            grpo.encode(tokenizer, messages)


def test_a_tools_message_may_be_the_last(tokenizer):
    tool = {"role": "tool", "content": "12"}
    assert "tool\n12<|im_end|>" in text_of(tokenizer, [USER, ANSWER, tool])


def test_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = CHATML + "{% if not enable_thinking %}<think></think>{% endif %}"
    kwargs = {"enable_thinking": False}
    assert text_of(tokenizer, [USER], template_kwargs=kwargs) == PROMPT + "<think></think>"


def test_what_the_template_puts_after_a_turn_ends_it(tiny, tokenizer, capsys):
    """A model whose end token is not the one that its template writes."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    turn_end = tokenizer.add_tokens(["<end>"]) and tokenizer.convert_tokens_to_ids("<end>")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end>")
    assert grpo.end_tokens(model, tokenizer) == {1, turn_end}

    tokenizer.chat_template = CHATML.replace("<|im_end|>", "\nnext: ")
    assert grpo.end_tokens(model, tokenizer) == {1}
    assert "ends a turn by 'next:'" in capsys.readouterr().err


# ---------------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    "text, is_open, thoughts, answer",
    [
        ("Four.", False, "", "Four."),
        ("<think>Hm.</think>Four.", False, "Hm.", "Four."),
        ("\n<think>\nHm.\n</think>\n\nFour.", False, "Hm.", "Four."),
        ("<think>A</think>B<think>C</think>D", False, "A</think>B<think>C", "D"),
        ("Hm.</think>Four.", True, "Hm.", "Four."),
        ("Hm. So", True, "Hm. So", ""),
        ("<think>Hm. So", False, "Hm. So", ""),
        ("<think></think>", False, "", ""),
        ("A <think> in words.", False, "", "A <think> in words."),
        ("[THINK]Hm.[/THINK]Four.", False, "Hm.", "Four."),
        ("<seed:think>Hm.</seed:think>Four.", False, "Hm.", "Four."),
        ("<thinking>\nHm.\n</thinking>\nFour.", False, "Hm.", "Four."),
        ("<thinking>Hm. So", False, "Hm. So", ""),
        ("Hm.[/THINK]Four.", True, "Hm.", "Four."),
        ("Put it between <thinking> and </thinking> tags.", False, "", "Put it between <thinking> and </thinking> tags."),
        ("Close it with [/THINK] and go on.", False, "", "Close it with [/THINK] and go on."),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(text, is_open, thoughts, answer):
    assert grpo.split_thoughts(text, is_open) == (thoughts, answer)


@pytest.mark.parametrize("special", [False, True])
def test_a_rollouts_text_is_its_answer(tokenizer, special):
    """Also where the marks are special tokens, which a plain decoding leaves out."""
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    prompt = tokenizer.encode("user: Hi\n")
    ids = tokenizer.encode("<think>Hm.</think>\nFour.<|im_end|>")
    rollout = grpo.Rollout(prompt, ids, [], "stop")
    grpo.set_text(tokenizer, rollout)
    assert (rollout.thoughts, rollout.text) == ("Hm.", "Four.")

    # The template has opened the thoughts, and the length limit cut them off.
    rollout = grpo.Rollout([*prompt, *tokenizer.encode("<think>\n")], ids[1:3], [], "length")
    grpo.set_text(tokenizer, rollout)
    assert (rollout.thoughts, rollout.text) == ("Hm", "")

    # A template without thinking opens and closes them itself.
    closed = [*prompt, *tokenizer.encode("<think></think>")]
    rollout = grpo.Rollout(closed, tokenizer.encode(" Four.\n<|im_end|>"), [], "stop")
    grpo.set_text(tokenizer, rollout)
    assert (rollout.thoughts, rollout.text) == ("", " Four.\n")


GPT_OSS = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>"]
OTHER_MARKS = {
    "gpt-oss": (GPT_OSS, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>", "Four."),
    "gpt-oss cut off": (GPT_OSS, "<|channel|>analysis<|message|>Hm. It may be Four", ""),
    "gpt-oss at once": (GPT_OSS, "<|channel|>final<|message|>Four.<|return|>", "Four."),
    "Magistral": (["[THINK]", "[/THINK]"], "[THINK]Hm.[/THINK]Four.<|im_end|>", "Four."),
    "Gemma 4": (["<|channel>", "<channel|>"], "<|channel>thought\nHm.\n<channel|>Four.<|im_end|>", "Four."),
    "Gemma 4 cut off": (["<|channel>", "<channel|>"], "<|channel>thought\nHm. It may be Four", ""),
    "Seed-OSS": (["<seed:think>", "</seed:think>"], "<seed:think>Hm.</seed:think>Four.<|im_end|>", "Four."),
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", OTHER_MARKS)
def test_thoughts_in_other_marks_are_no_answer(tokenizer, name, special):
    """Whoever is paid for right words in the thoughts need not answer."""
    marks, completion, answer = OTHER_MARKS[name]
    tokenizer.add_tokens(marks, special_tokens=special)
    rollout = grpo.Rollout(tokenizer.encode("user: Hi\n"), tokenizer.encode(completion), [], "stop")
    grpo.set_text(tokenizer, rollout)
    if not special:
        answer += "<|return|>" * completion.endswith("<|return|>")
    assert rollout.text == answer
    assert ("Hm." in rollout.thoughts) == ("Hm." in completion)


# ---------------------------------------------------------------------- precision


def test_bfloat16_is_for_devices_that_have_it(monkeypatch, capsys):
    grpo.noted.clear()
    assert not grpo.has_bfloat16("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for _ in range(2):
        assert not grpo.has_bfloat16("cuda:0")
    assert capsys.readouterr().err == "Tesla T4 has no bfloat16: the layers run in float32\n"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert grpo.has_bfloat16("cuda:0")


def test_the_context_of_a_nested_config_and_of_positions_that_change_with_length():
    assert grpo.context_length(families.build("gemma3")) == 512
    assert grpo.context_length(families.build("bloom")) == 10**9

    model = families.build("phi3")
    assert grpo.context_length(model) == 512
    model.model.rotary_emb.rope_type = "longrope"
    model.config.rope_parameters["original_max_position_embeddings"] = 128
    assert grpo.context_length(model) == 128
