"""GRPO by closed form, by invariance, by gradient direction, and against a slow reading."""

import itertools
import math
import random
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from grpo import (
    Rollout,
    advantages,
    completion_logprobs,
    policy_loss,
    token_weights,
    uniform_numbers,
    update,
)

ENDS = {1}
MANY = {
    1,
    *range(100, 108),
}  # a random model then ends about one token in thirty, so lengths differ


def settings(**changes):
    """What `update` reads: the paper's settings, on-policy and without KL, but for `changes`."""
    defaults = {
        "loss": "grpo",
        "temperature": 1.0,
        "max_new_tokens": 64,
        "epochs": 1,
        "minibatches": 1,
        "clip_low": 0.2,
        "clip_high": 0.0,
        "beta": 0.0,
        "tis_cap": 0.0,
        "mask_truncated": 0,
        "pass_tokens": 3072,
        "checkpointing": 0,
    }
    assert changes.keys() <= defaults.keys()
    return SimpleNamespace(**(defaults | changes))


@pytest.fixture
def no_norm_limit(monkeypatch):
    """Gradients as they are: what is compared is not scaled down."""
    monkeypatch.setattr(grpo, "MAX_GRAD_NORM", 1e9)


def sample(model, prompts, group_size, max_new_tokens, temperature, ends, seed=0, on_token=None):
    """grpo.sample with the random numbers of a seed."""
    uniform = uniform_numbers(len(prompts), group_size, max_new_tokens, seed)
    return grpo.sample(
        model, prompts, group_size, max_new_tokens, temperature, ends, uniform, on_token
    )


def set_advantages(groups, rows):
    """One row of advantages per group."""
    for group, row in zip(groups, rows):
        for rollout, advantage in zip(group, row):
            rollout.advantage = advantage


def flat(groups):
    """All rollouts of the groups, in order."""
    return [rollout for group in groups for rollout in group]


def random_groups(prompts=3, size=4, longest=12, seed=0):
    """Groups with random tokens, lengths and rewards, their advantages set."""
    rng = random.Random(seed)
    groups = []
    for p in range(prompts):
        prompt = [rng.randrange(2, 250) for _ in range(3 + 4 * p)]
        group = []
        for _ in range(size):
            ids = [rng.randrange(2, 250) for _ in range(rng.randint(1, longest))]
            group.append(Rollout(prompt, ids, [-1.0] * len(ids), "stop"))

        rewards = torch.rand(1, size, generator=torch.Generator().manual_seed(seed + p))
        set_advantages([group], advantages(rewards).tolist())
        groups.append(group)
    return groups


def group_of(prompt, *completions):
    """A group with these tokens."""
    return [Rollout(prompt, ids, [], "stop") for ids in completions]


def plain_logprobs(model, prompt, ids, temperature):
    """The obvious way: the whole sequence, one row, no cache, no padding."""
    logits = (
        model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() / temperature
    )
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


# ---------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_shared_prompts_give_the_log_probs_of_full_sequences(tiny_model, temperature):
    groups = random_groups()
    logp, entropy = completion_logprobs(tiny_model, groups, temperature)
    rollouts = flat(groups)
    lengths = [len(r.ids) for r in rollouts]
    assert logp.shape == entropy.shape == (sum(lengths),)

    for rollout, got, got_entropy in zip(rollouts, logp.split(lengths), entropy.split(lengths)):
        want = plain_logprobs(tiny_model, rollout.prompt_ids, rollout.ids, temperature)
        assert torch.allclose(got.double(), want, atol=1e-10)
        sequence = torch.tensor([rollout.prompt_ids + rollout.ids])
        logits = tiny_model(sequence).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature
        exact = torch.distributions.Categorical(logits=logits).entropy()
        assert torch.allclose(got_entropy.double(), exact, atol=1e-10)


def test_shared_prompts_give_the_gradient_of_full_sequences(tiny_model):
    """The prompt's keys and values carry gradient too: every parameter agrees."""
    groups = random_groups()
    completion_logprobs(tiny_model, groups, 0.8)[0].sum().backward()
    shared = {n: p.grad.clone() for n, p in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    sum(plain_logprobs(tiny_model, r.prompt_ids, r.ids, 0.8).sum() for r in flat(groups)).backward()
    for name, p in tiny_model.named_parameters():
        assert torch.allclose(shared[name], p.grad, rtol=1e-4, atol=1e-5), name
        assert p.grad.abs().max() > 0


def test_a_prompt_of_one_token(tiny_model):
    logp, _ = completion_logprobs(tiny_model, [group_of([5], [7, 8], [9])], 1.0)
    assert torch.allclose(
        logp[:2].double(), plain_logprobs(tiny_model, [5], [7, 8], 1.0), atol=1e-10
    )


def test_the_fused_log_prob_and_its_gradient(monkeypatch):
    """Against autograd through plain log_softmax, with more tokens than one chunk."""
    monkeypatch.setattr(grpo, "CHUNK", 4)
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 30, (11,))
    pull = torch.randn(11, dtype=torch.float64)
    logp, entropy = grpo.TokenLogprobs.apply(hidden, weight, ids, 0.7)
    got = torch.autograd.grad((logp * pull).sum(), (hidden, weight))
    plain = (hidden @ weight.T / 0.7).log_softmax(-1)
    want = torch.autograd.grad((plain.gather(1, ids[:, None])[:, 0] * pull).sum(), (hidden, weight))
    assert torch.allclose(logp, plain.gather(1, ids[:, None])[:, 0], atol=1e-12)
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-12)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, atol=1e-12)


def test_completions_that_end_in_the_pad_token_count_it(tiny_model):
    """pad = eos in many models: what counts comes from lengths, so the end token stays."""
    logp, _ = completion_logprobs(tiny_model, [group_of([5, 6], [7, 1], [7, 8, 9, 1])], 1.0)
    assert len(logp) == 6
    assert torch.allclose(
        logp[:2].double(), plain_logprobs(tiny_model, [5, 6], [7, 1], 1.0), atol=1e-10
    )
    inner, _ = completion_logprobs(
        tiny_model, [group_of([5, 1, 6], [7, 1, 8])], 1.0
    )  # end tokens in the middle stay visible
    assert torch.allclose(
        inner.double(), plain_logprobs(tiny_model, [5, 1, 6], [7, 1, 8], 1.0), atol=1e-10
    )


# ---------------------------------------------------------------------- sampling

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20]]


def test_greedy_sampling_equals_transformers_generate(tiny_model):
    groups = grpo.sample(tiny_model, PROMPTS, 1, 15, 0.0, ENDS)
    usual = deepcopy(tiny_model)
    usual.set_attn_implementation("sdpa")
    for prompt, [rollout] in zip(PROMPTS, groups):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        want = usual.generate(
            torch.tensor([prompt]), attention_mask=mask, max_new_tokens=15, do_sample=False
        )
        assert rollout.ids == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampler_and_trainer_agree_on_every_log_prob(tiny_model, temperature):
    """One number that catches a wrong temperature, mask, position or a lost end token."""
    groups = sample(tiny_model, PROMPTS, 5, 40, temperature, MANY, seed=3)
    assert {r.finish for r in flat(groups)} == {"stop", "length"}
    for rollout in flat(groups):
        want = plain_logprobs(tiny_model, rollout.prompt_ids, rollout.ids, temperature)
        assert torch.allclose(torch.tensor(rollout.logp, dtype=torch.float64), want, atol=1e-10)
        ended = rollout.ids[-1] in MANY
        assert (rollout.finish == "stop") == ended and not set(rollout.ids[:-1]) & MANY
        assert ended or len(rollout.ids) == 40


def test_rows_that_end_with_their_first_token_are_dropped_before_the_next(tiny_model):
    """Finished rows leave the cache right after it was spread over the group."""
    ends = set(range(130))  # about half of a random model's first tokens
    groups = sample(tiny_model, PROMPTS, 12, 20, 1.0, ends, seed=0)
    lengths = [len(r.ids) for r in flat(groups)]
    assert lengths.count(1) >= 8 and max(lengths) > 3
    for rollout in flat(groups):
        want = plain_logprobs(tiny_model, rollout.prompt_ids, rollout.ids, 1.0)
        assert torch.allclose(torch.tensor(rollout.logp, dtype=torch.float64), want, atol=1e-10)


def test_same_seed_same_rollouts_and_rows_do_not_depend_on_their_neighbours(tiny_model):
    def ids(prompts, seed, **more):
        groups = sample(tiny_model, prompts, 4, 12, 1.0, MANY, seed, **more)
        return [rollout.ids for rollout in flat(groups)]

    first = ids(PROMPTS, 1)
    assert first == ids(PROMPTS, 1)
    assert first != ids(PROMPTS, 2)
    assert first[:4] == ids(PROMPTS[:1], 1)
    assert first == ids(PROMPTS, 1, on_token=[].append)


def test_a_part_of_the_batch_is_sampled_as_it_would_be_in_the_whole(tiny_model):
    """Two processes take every second prompt each, with its own random numbers."""
    uniform = uniform_numbers(3, 4, 12, seed=1)
    together = grpo.sample(tiny_model, PROMPTS, 4, 12, 1.0, MANY, uniform)
    for rank in (0, 1):
        mine = PROMPTS[rank::2]
        alone = grpo.sample(tiny_model, mine, 4, 12, 1.0, MANY, uniform[rank::2])
        assert [r.ids for r in flat(alone)] == [r.ids for r in flat(together[rank::2])]
    assert grpo.sample(tiny_model, [], 4, 12, 1.0, MANY, uniform[:0]) == []


def test_the_draw_follows_the_distribution():
    """Chi-square over 200,000 draws from a skewed distribution with an impossible token."""
    logits = torch.tensor([2.0, 0.0, -1.0, -math.inf, 1.0, 0.5])
    count = 200_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    ids, logp = grpo.draw(logits.expand(count, -1), uniform, 0.8)
    p = (logits / 0.8).softmax(-1)
    seen = torch.bincount(ids, minlength=6).float()
    assert seen[3] == 0
    possible = p > 0
    chi = ((seen - count * p)[possible] ** 2 / (count * p)[possible]).sum().item()
    assert chi < 18.5  # 0.999 quantile at 4 degrees of freedom
    assert torch.allclose(logp, p.log()[ids], atol=1e-6)
    edge, _ = grpo.draw(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert edge.tolist() == [0, 5]


def test_logits_that_are_not_numbers_draw_some_id():
    """An index beyond the vocabulary would end a process on a GPU."""
    ids, logp = grpo.draw(torch.full((1, 6), math.nan), torch.tensor([0.5]), 1.0)
    assert 0 <= ids.item() < 6 and math.isnan(logp.item())


def test_progress_counts_running_rows(tiny_model):
    seen = []
    groups = sample(tiny_model, PROMPTS, 4, 30, 1.0, MANY, on_token=seen.append)
    assert sorted(seen, reverse=True) == seen
    assert len(seen) == max(len(r.ids) for r in flat(groups))


# ---------------------------------------------------------------------- advantages


def test_advantages_by_hand_and_nan():
    nan = math.nan
    rewards = [[1.0, 2.0, 3.0, nan], [nan, nan, nan, 1.0], [nan] * 4, [0.1, 0.1, 0.1, 0.1]]
    got = advantages(torch.tensor(rewards))
    z = math.sqrt(1.5)
    want = torch.tensor([[-z, 0, z, 0], [0.0] * 4, [0.0] * 4, [0.0] * 4])
    assert torch.allclose(got, want, atol=1e-6)
    # a missing reward changes no other advantage
    assert torch.equal(got[0, :3], advantages(torch.tensor([[1.0, 2.0, 3.0]]))[0])
    assert not got.isnan().any()


def test_advantages_do_not_depend_on_order_scale_or_shift():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(advantages(rewards)[:, order], advantages(rewards[:, order]), atol=1e-12)
    assert torch.allclose(advantages(rewards), advantages(3 * rewards - 7), atol=1e-9)
    assert torch.allclose(
        advantages(rewards, "mean"), rewards - rewards.mean(1, keepdim=True), atol=1e-12
    )
    before = rewards.clone()
    advantages(rewards)
    assert torch.equal(before, rewards)


def test_equal_rewards_that_round_are_a_dead_group():
    """0.1 + 0.2 style rounding must not turn into advantages of size 1."""
    rewards = torch.tensor([[0.3, 0.1 + 0.2, 0.3, 0.3, 0.3, 0.1 + 0.2]], dtype=torch.float64)
    assert (advantages(rewards) == 0).all()


# ---------------------------------------------------------------------- loss


def slow_advantages(rewards, kind):
    """Plain Python, one group."""
    known = [r for r in rewards if not math.isnan(r)]
    mean = sum(known) / len(known)
    std = math.sqrt(sum((r - mean) ** 2 for r in known) / len(known))
    got = []
    for r in rewards:
        if math.isnan(r):
            got.append(0.0)
        elif kind == "std":
            got.append((r - mean) / std)
        elif kind == "mean":
            got.append(r - mean)
        else:
            got.append(r)
    return got


def slow_step(model, rollouts, s, old, reference):
    """The equations read aloud, token by token. Returns the loss of one optimiser step."""
    total = 0.0
    counted = [r for r in rollouts if not (s.mask_truncated and r.finish == "length")]
    for r in counted:
        now = plain_logprobs(model, r.prompt_ids, r.ids, s.temperature)
        ref = plain_logprobs(reference, r.prompt_ids, r.ids, s.temperature).detach()
        for t in range(len(r.ids)):
            ratio = torch.exp(now[t] - old[id(r)][t])
            inside = 1 - s.clip_low <= ratio.item() <= 1 + s.clip_high
            if inside or (ratio.item() > 1) != (
                r.advantage > 0
            ):  # moving back into the range is never clipped
                term = -ratio * r.advantage
            else:
                bound = 1 + s.clip_high if r.advantage > 0 else 1 - s.clip_low
                term = 0.0 * ratio - r.advantage * bound
            if s.tis_cap:
                term = term * min(math.exp(old[id(r)][t] - r.logp[t]), s.tis_cap)
            d = ref[t] - now[t]
            term = term + s.beta * (torch.exp(d) - d - 1)
            if s.loss == "grpo":
                total = total + term / (len(rollouts) * len(r.ids))
            elif s.loss == "dr_grpo":
                total = total + term / (len(rollouts) * s.max_new_tokens)
            else:
                total = total + term / sum(len(x.ids) for x in counted)
    return total


def slow_update(model, groups, s, reference, lr):
    """epochs x minibatches of plain gradient descent, `old` fixed before the first."""
    old = {}
    for r in flat(groups):
        old[id(r)] = plain_logprobs(model, r.prompt_ids, r.ids, s.temperature).detach()
    for _ in range(s.epochs):
        for part in range(s.minibatches):
            rollouts = flat(groups[part :: s.minibatches])
            loss = slow_step(model, rollouts, s, old, reference)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads):
                    p -= lr * g


OPTIONS = [
    {},
    {"beta": 0.1, "epochs": 2},
    {"tis_cap": 1.5, "epochs": 2},
    {"minibatches": 2, "epochs": 2, "beta": 0.05},
    {"mask_truncated": True, "epochs": 2, "tis_cap": 2.0},
    {"checkpointing": True, "epochs": 2, "pass_tokens": 30},
]


@pytest.fixture
def exact_norms(monkeypatch):
    """RMSNorm in float64: transformers takes float32, an error of 1e-8 that would hide ours."""

    def forward(self, hidden):
        return (
            self.weight
            * hidden
            * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", forward)


LOSSES = ["grpo", "dr_grpo", "dapo"]
KINDS = ["std", "mean", "none"]
CLIPS = [(0.2, 0.2), (0.01, 0.03)]


def three_models(tiny, dtype):
    """The model that is trained, the one that the slow reading trains, and the reference."""
    return [AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype).eval() for _ in range(3)]


def random_rollouts(model, kind, number):
    """Groups whose advantages come from random rewards, one of them missing; some are truncated."""
    groups = random_groups(prompts=3, size=3, longest=9, seed=number)
    rng = random.Random(number)
    for group in groups:
        rewards = [rng.random(), rng.random(), math.nan if group is groups[1] else rng.random()]
        row = advantages(torch.tensor([rewards], dtype=torch.float64), kind)[0].tolist()
        assert row == pytest.approx(slow_advantages(rewards, kind), abs=1e-12)
        set_advantages([group], [row])
        for r in group:
            near = plain_logprobs(model, r.prompt_ids, r.ids, 0.9).detach()
            r.logp = [value + rng.gauss(0, 0.5) for value in near.tolist()]
            r.finish = rng.choice(("stop", "length"))
    return groups


@pytest.mark.parametrize("loss, kind, clip", list(itertools.product(LOSSES, KINDS, CLIPS)))
def test_update_equals_the_slow_reading_in_float64(
    tiny, exact_norms, no_norm_limit, loss, kind, clip
):
    """Every loss x advantage x clip, each with two of the other options, on random tokens, lengths
    and rewards: the weights after whole updates agree to 1e-10. The second epoch has ratios off 1,
    and the tight clip has work."""
    number = LOSSES.index(loss) * 6 + KINDS.index(kind) * 2 + CLIPS.index(clip)
    options = {"loss": loss, "temperature": 0.9, "max_new_tokens": 9, "pass_tokens": 40}
    options |= {"clip_low": clip[0], "clip_high": clip[1]}
    options |= OPTIONS[number % len(OPTIONS)]
    options |= OPTIONS[(number + 1 + number // 6) % len(OPTIONS)]
    s = settings(**options)

    fast, slow, reference = three_models(tiny, torch.float64)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.1)
    groups = random_rollouts(fast, kind, number)

    start = weights(fast)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.3)
    log = update(fast, optimizer, groups, s, reference)
    slow_update(slow, groups, s, reference, 0.3)
    assert (weights(fast) - start).abs().max() > 1e-4
    assert (weights(fast) - weights(slow)).abs().max() < 1e-10
    assert (log["clip_share"] > 0) >= (clip[0] < 0.1 and s.epochs > 1 and kind != "none")


def test_float32_agrees_with_the_slow_reading_to_rounding(tiny, no_norm_limit):
    """The same in float32, the precision of training: 1e-6."""
    fast, slow, reference = three_models(tiny, torch.float32)
    groups = random_groups(prompts=3, size=3, longest=9, seed=3)
    s = settings(loss="dapo", temperature=0.9, beta=0.1, clip_high=0.2)
    update(fast, torch.optim.SGD(fast.parameters(), lr=0.3), groups, s, reference)
    slow_update(slow, groups, s, reference, 0.3)
    assert torch.allclose(weights(fast), weights(slow), rtol=0, atol=1e-6)


def test_checkpointing_changes_nothing_but_memory(tiny):
    results = []
    for on in (False, True):
        model, optimizer = fresh(tiny)
        groups = random_groups()
        update(model, optimizer, groups, settings(max_new_tokens=12, checkpointing=on))
        # Or the next sampling would lose its cache.
        assert not any(m.training for m in model.modules())
        results.append(weights(model))
        sample(model, PROMPTS, 2, 4, 1.0, ENDS)
    assert torch.equal(*results)


def test_recomputing_runs_each_layer_twice(tiny_model):
    """Otherwise the switch would do nothing and the test above would pass all the same."""
    calls = []

    def count(*arguments):
        calls.append(1)

    tiny_model.model.layers[0].mlp.register_forward_pre_hook(count)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    for on in (False, True):
        calls.clear()
        update(tiny_model, optimizer, random_groups(), settings(checkpointing=on))
        assert len(calls) == (2 if on else 1)


def test_an_interrupted_update_leaves_the_layers_as_they_were(tiny):
    """A replaced forward would recompute in sampling, where it loses the cache."""
    model, optimizer = fresh(tiny)

    def interrupt(n_rollouts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(model, optimizer, random_groups(), settings(checkpointing=1), on_pass=interrupt)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_loss_reads_0_only_where_completions_count_the_same(tiny):
    """In the first step every token's loss is minus its advantage: what is left is the weights."""
    for loss, is_zero in (("grpo", True), ("dr_grpo", False), ("dapo", False)):
        model, optimizer = fresh(tiny)
        log = update(model, optimizer, random_groups(), settings(loss=loss, max_new_tokens=12))
        assert (abs(log["loss"]) < 1e-6) == is_zero
        assert log["grad_norm"] > 0.01


def test_minibatches_keep_the_ratio_to_the_policy_that_sampled(tiny):
    """The second minibatch must not take the policy after the first as its `old`.

    Its ratio would always be 1, its clip idle.
    """
    model, optimizer = fresh(tiny, lr=0.5)
    groups = random_groups(prompts=2)
    for r in groups[1]:
        r.prompt_ids = groups[0][0].prompt_ids
    tight = {"max_new_tokens": 12, "clip_low": 1e-4, "clip_high": 1e-4}
    assert update(*fresh(tiny, lr=0.5), groups, settings(**tight))["clip_share"] == 0
    assert update(model, optimizer, groups, settings(**tight, minibatches=2))["clip_share"] > 0.05


def test_truncated_completions_can_stay_out(tiny):
    """They keep their place in the baseline and in N; what they said moves nothing."""
    results = []
    for words in ([3, 4, 5], [200, 201, 202, 203]):
        model, optimizer = fresh(tiny)
        groups = random_groups(prompts=1)
        truncated = groups[0][0]
        truncated.ids = words
        truncated.logp = [-1.0] * len(words)
        truncated.finish = "length"
        for loss in LOSSES:
            s = settings(loss=loss, max_new_tokens=12, mask_truncated=True)
            update(model, optimizer, groups, s)
        results.append(weights(model))
    assert torch.equal(*results)


def test_bfloat16_layers_keep_float32_weights_and_nearly_the_gradient(tiny):
    """A step of 1e-6 would vanish in bfloat16 weights. Sampler and trainer stay close."""
    results = []
    for low in (False, True):
        model, optimizer = fresh(tiny, lr=1e-6)
        model.bfloat16_layers = low
        groups = random_groups()
        before = weights(model)

        def note_gradient(*_, model=model):
            results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

        handle = optimizer.register_step_pre_hook(note_gradient)
        update(model, optimizer, groups, settings(max_new_tokens=12))
        handle.remove()
        assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
        assert not torch.equal(weights(model), before)
        rollouts = sample(model, PROMPTS, 3, 12, 1.0, ENDS, seed=0)
        set_advantages(rollouts, [(1.0, -1.0, 0.5)] * 3)
        log = update(model, optimizer, rollouts, settings(max_new_tokens=12))
        assert log["logp_gap"] < (0.05 if low else 1e-5)
    assert torch.nn.functional.cosine_similarity(*results, dim=0) > 0.99
    assert not torch.equal(*results)


def test_three_normalisers_turn_the_sign():
    """Lengths 10, 10, 10, 500 with advantages 1, 1, 1, -1; each counted over the batch."""
    lengths = torch.tensor([10.0, 10, 10, 500])
    signs = torch.tensor([1.0, 1, 1, -1])
    for loss, mean in (("grpo", 0.5), ("dapo", -470 / 530)):
        shares = lengths * torch.tensor(token_weights([10, 10, 10, 500], loss, 500))
        assert (signs * shares).sum().item() == pytest.approx(mean)
        assert shares.sum().item() == pytest.approx(1.0)


def test_clip_sides():
    """Positive advantages stop above 1 + high, negative ones below 1 - low, and only there."""
    cases = ((1.5, 1, False), (0.5, 1, True), (1.5, -1, True), (0.5, -1, False), (1.0, 1, True))
    for ratio, advantage, alive in cases:
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        policy_loss(logp, torch.zeros(1, 1), torch.tensor([[float(advantage)]])).sum().backward()
        assert (logp.grad.abs().item() > 0) == alive, (ratio, advantage)


def test_dapo_clips_higher_where_nothing_else_is_group_of():
    """A ratio of 1.25 is beyond 1 + 0.2 and within 1 + 0.28."""
    [rollout] = group_of([5], [7])
    rollout.advantage = 1.0
    rollout.weight = 1.0
    rollout.logp = [0.0]
    one_pass = grpo.Pass([[rollout]], old=torch.zeros(1))
    cases = (
        (settings(loss="dapo"), 0),
        (settings(loss="grpo"), 1),
        (settings(loss="dapo", clip_high=0.1), 1),
        (settings(clip_high=0.3), 0),
    )
    for s, clipped in cases:
        logp = torch.tensor([math.log(1.25)])
        _, sums = grpo.pass_loss(one_pass, logp, torch.zeros(1), s)
        assert sums[grpo.SUMS.index("clipped")] == clipped


def test_k3_is_never_negative_and_zero_at_equality():
    logp = torch.randn(1000, dtype=torch.float64)
    ref = torch.randn(1000, dtype=torch.float64)
    assert (grpo.kl_k3(logp, ref) >= 0).all() and (grpo.kl_k3(logp, logp) == 0).all()


# ---------------------------------------------------------------------- one step


def fresh(tiny, lr=0.01):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_the_step_does_not_depend_on_micro_batches_or_order(tiny, no_norm_limit, loss):
    results = []
    for tokens, flip in ((10_000, False), (30, False), (1, False), (40, True)):
        model, optimizer = fresh(tiny)
        groups = random_groups(prompts=4)
        if flip:
            groups = [g[::-1] for g in groups[::-1]]
        update(model, optimizer, groups, settings(loss=loss, max_new_tokens=12, pass_tokens=tokens))
        results.append(weights(model))
    for other in results[1:]:
        assert torch.allclose(results[0], other, atol=1e-6)
    assert not torch.equal(results[0], weights(fresh(tiny)[0]))


def test_micro_batches_hold_every_rollout_once_and_respect_the_limit():
    groups = random_groups(prompts=6, size=5)
    for limit in (1, 20, 60, 10_000):
        batches = grpo.micro_batches(groups, limit)
        pieces = [piece for batch in batches for piece in batch]
        assert sorted(map(id, flat(pieces))) == sorted(map(id, flat(groups)))
        for piece in pieces:
            assert all(r.prompt_ids == piece[0].prompt_ids for r in piece)
        for batch in batches:
            longest = max(grpo.row_length(piece) for piece in batch)
            alone = len(batch) == 1 and (
                len(batch[0]) == 1 or longest <= 2 * len(batch[0][0].prompt_ids)
            )
            assert len(batch) * longest <= limit or alone, (limit, longest)
    assert len(grpo.micro_batches(groups, 10_000)) == 1


def test_a_step_raises_the_rewarded_and_lowers_the_rest(tiny):
    model, optimizer = fresh(tiny, lr=0.05)
    groups = random_groups()

    def gain():
        """Mean log-prob of each rollout, weighed by its advantage."""
        total = 0.0
        for r in flat(groups):
            mean = plain_logprobs(model, r.prompt_ids, r.ids, 1.0).mean().item()
            total += r.advantage * mean
        return total

    before = gain()
    log = update(model, optimizer, groups, settings(max_new_tokens=12))
    assert gain() > before
    assert (
        abs(log["loss"]) < 1e-6 and log["grad_norm"] > 0.01
    )  # the loss reads 0, the gradient is not 0


def test_dead_groups_spend_no_pass(tiny):
    model, optimizer = fresh(tiny)
    groups = random_groups()
    for r in groups[0]:
        r.advantage = 0.0
    rows = []
    log = update(model, optimizer, groups, settings(max_new_tokens=12), on_pass=rows.append)
    assert log["zero_std_groups"] == 1
    assert sum(rows) == sum(r.advantage != 0 for r in flat(groups))

    before = weights(model)
    for r in flat(groups):
        r.advantage = 0.0
    log = update(model, optimizer, groups, settings(max_new_tokens=12))
    assert torch.equal(before, weights(model))
    assert log["zero_std_groups"] == 3 and log["grad_norm"] == 0
    assert math.isnan(log["entropy"]) and log["train_tokens"] == 0


def test_unscored_rollouts_do_not_move_the_policy(tiny):
    """A nan reward gives advantage 0: the step does not depend on what that completion says."""
    results = []
    for words in ([3, 4, 5], [200, 201, 202]):
        model, optimizer = fresh(tiny)
        groups = random_groups(prompts=1)
        groups[0][0].ids = words
        groups[0][0].logp = [-1.0] * 3
        set_advantages(groups, advantages(torch.tensor([[math.nan, 0.2, 0.9, 0.4]])).tolist())
        update(model, optimizer, groups, settings(max_new_tokens=12))
        results.append(weights(model))
    assert torch.equal(*results)


def test_kl_term_pulls_back_to_the_reference(tiny):
    reference = fresh(tiny)[0]
    model, _ = fresh(tiny)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            p.add_(0.05 * noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    groups = random_groups()
    values = []
    for _ in range(6):
        for r in flat(groups):
            r.logp = plain_logprobs(model, r.prompt_ids, r.ids, 1.0).tolist()
            r.advantage = 1e-9  # nothing but the KL term
        s = settings(beta=1.0, max_new_tokens=12)
        values.append(update(model, optimizer, groups, s, reference)["kl"])
    assert values[0] > 0 and values[-1] < 0.8 * values[0]


def test_measured_kl_is_zero_at_the_start_and_positive_after_a_move(tiny):
    model, _ = fresh(tiny)
    reference = grpo.freeze(model)
    groups = sample(model, PROMPTS, 2, 10, 0.7, ENDS, seed=0)
    assert abs(grpo.measure_kl(reference, groups, 0.7)) < 1e-6
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    groups = sample(model, PROMPTS, 2, 10, 0.7, ENDS, seed=0)
    assert grpo.measure_kl(reference, groups, 0.7) > 1e-3
    assert not any(p.requires_grad for p in reference.parameters())


def test_measured_kl_does_not_depend_on_its_passes_and_needs_a_group(tiny_model):
    reference = grpo.freeze(tiny_model)
    reference.lm_head.weight.mul_(1.3)
    groups = sample(tiny_model, PROMPTS, 2, 10, 0.7, MANY)
    together = grpo.measure_kl(reference, groups, 0.7)
    assert grpo.measure_kl(reference, groups, 0.7, pass_tokens=1) == pytest.approx(together)
    assert math.isnan(grpo.measure_kl(reference, [], 0.7))


def test_inner_epochs_move_the_ratio_and_gap_is_that_of_the_sampler(tiny):
    model, optimizer = fresh(tiny, lr=0.5)
    groups = sample(model, PROMPTS, 4, 12, 0.8, ENDS, seed=0)
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    set_advantages(groups, advantages(rewards).tolist())
    log = update(model, optimizer, groups, settings(temperature=0.8, max_new_tokens=12, epochs=3))
    assert log["logp_gap"] < 1e-5
    assert abs(log["loss"]) > 1e-6
    # The policy has moved, the rollouts have not.
    log = update(model, optimizer, groups, settings(temperature=0.8, max_new_tokens=12))
    assert log["logp_gap"] > 1e-3


def test_a_gradient_that_is_not_finite_changes_nothing(tiny):
    model, optimizer = fresh(tiny)
    before = weights(model)
    groups = random_groups()
    groups[0][0].advantage = math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        update(model, optimizer, groups, settings(max_new_tokens=12))
    assert torch.equal(before, weights(model))


def test_the_same_seed_gives_the_same_run_bit_for_bit(tiny):
    results = []
    for _ in range(2):
        model, optimizer = fresh(tiny)
        for step in range(3):
            groups = sample(model, PROMPTS, 4, 10, 0.9, ENDS, seed=step)
            rewards = torch.tensor([sum(r.ids) % 7 / 7 for r in flat(groups)]).reshape(3, 4)
            set_advantages(groups, advantages(rewards).tolist())
            update(model, optimizer, groups, settings(temperature=0.9, max_new_tokens=10))
        results.append(weights(model))
    assert torch.equal(*results)


def test_learning_to_prefer_some_tokens(tiny):
    """The method in small: pay for tokens below 64 and watch their share rise from a quarter."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    shares = []
    for step in range(25):
        groups = sample(model, PROMPTS, 8, 10, 1.0, ENDS, seed=step)
        wanted = [sum(t < 64 for t in r.ids) / len(r.ids) for r in flat(groups)]
        set_advantages(groups, advantages(torch.tensor(wanted).reshape(3, 8)).tolist())
        update(model, optimizer, groups, settings(max_new_tokens=10))
        shares.append(sum(wanted) / 24)
    assert sum(shares[:3]) / 3 < 0.5 and sum(shares[-3:]) / 3 > 0.8


# ---------------------------------------------------------------------- the policy


def test_prompts_end_where_the_assistant_begins(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = grpo.encode(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    assert tokenizer.decode(grpo.encode(tokenizer, [{"role": "user", "content": "Hi"}])).endswith(
        "assistant:"
    )


@pytest.mark.parametrize("marks", [[], ["<think>", "</think>"]])
def test_a_question_about_thoughts_opens_none(tiny, marks):
    """Only the template can: its end is where the completion goes on, whatever the user wrote before."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([*marks, "assistant"])  # words are tokens, as in a real vocabulary
    plain = tokenizer.chat_template
    texts = []
    for template in (plain, plain + "<think>\n", plain + "<think>\n\n</think>\n\n"):
        tokenizer.chat_template = template
        ids = grpo.encode(tokenizer, [{"role": "user", "content": "What is <think>"}])
        rollout = grpo.Rollout(ids, tokenizer.encode("A mark."), [], "length")
        grpo.set_text(tokenizer, rollout)
        texts.append((rollout.thoughts, rollout.text))
    assert texts == [("", "A mark."), ("A mark.", ""), ("", "A mark.")]


def test_all_end_tokens_are_known(tiny):
    model, tokenizer = grpo.load_policy(str(tiny))
    assert grpo.end_tokens(model, tokenizer) == {1}
    model.generation_config.eos_token_id = [0, 5]
    assert grpo.end_tokens(model, tokenizer) == {0, 1, 5}


def test_measured_kl_is_k3_over_the_policys_samples(tiny_model):
    reference = grpo.freeze(tiny_model)
    reference.lm_head.weight.mul_(1.3)
    groups = sample(tiny_model, PROMPTS, 2, 10, 0.7, ENDS)
    differences = []
    for r, _ in groups:
        logp = torch.tensor(r.logp, dtype=torch.float64)
        differences.append(plain_logprobs(reference, r.prompt_ids, r.ids, 0.7) - logp)
    d = torch.cat(differences)
    assert grpo.measure_kl(reference, groups, 0.7) == pytest.approx(
        (d.exp() - d - 1).mean().item(), abs=1e-9
    )


def test_the_gradient_is_scaled_down_to_its_limit(tiny, monkeypatch):
    monkeypatch.setattr(grpo, "MAX_GRAD_NORM", 1e-2)
    model, optimizer = fresh(tiny, lr=1.0)
    before = weights(model)
    log = update(model, optimizer, random_groups(), settings(max_new_tokens=12))
    assert log["grad_norm"] > 0.05
    assert (weights(model) - before).norm().item() == pytest.approx(1e-2, rel=1e-2)


def test_what_an_update_logs_are_means(tiny):
    model, optimizer = fresh(tiny, lr=0.0)
    groups = random_groups()
    for r in flat(groups):
        r.advantage = 1.0
    one = update(model, optimizer, groups, settings(epochs=1))
    three = update(model, optimizer, groups, settings(epochs=3))
    _, entropy = completion_logprobs(model, groups, 1.0)
    assert one["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert one["loss"] == pytest.approx(-1, rel=1e-5)
    for key in ("loss", "grad_norm", "entropy", "logp_gap"):
        assert three[key] == pytest.approx(one[key], rel=1e-5)


def test_weights_become_float32(tiny, tmp_path):
    grpo.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path)
    grpo.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    model, _ = grpo.load_policy(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in model.parameters())
