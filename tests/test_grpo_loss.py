"""Advantages, the clipped loss, the KL and the optimiser step, against the formulas."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    Recorder,
    cpu_args,
    load_script,
    plain_logprobs,
    random_rollout,
    small_qwen3,
)

NORMALIZATIONS = "token", "sequence", "constant"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of two gradients."""
    return ((a - b).norm() / b.norm()).item()


def plain_advantages(rewards: list[float], group_size: int, scale: str) -> list[float]:
    """The formula, in Python's floats, group after group."""
    advantages = []
    for i in range(0, len(rewards), group_size):
        group = rewards[i : i + group_size]
        mean, spread = statistics.fmean(group), 1.0
        if scale == "std":
            spread = statistics.stdev(group) + 1e-4  # the sample's: G - 1
        dead = len(set(group)) == 1
        advantages += [0.0 if dead else (r - mean) / spread for r in group]
    return advantages


def plain_shares(lengths: list[int], normalization: str, longest: int) -> list[float]:
    """w_i / Z of each completion; length 0: masked as a whole, not counted."""
    counted = [length for length in lengths if length]
    z = {"token": sum(counted), "sequence": len(counted)}
    z["constant"] = len(counted) * longest
    by_length = normalization == "sequence"
    z = z[normalization]
    return [1 / z / (n if by_length else 1) if n else 0.0 for n in lengths]


def test_group_of_one_zero_std_or_nan_reward(grpo, monkeypatch, capsys):
    """The std of one reward is NaN, that of equal rewards 0, and one NaN reward spreads
    to its group and from there to every weight. Too small a group and a NaN are
    refused; equal rewards give exactly 0, and 1 / eps does not blow up rounding.
    https://github.com/Jiayi-Pan/TinyZero/issues/89"""
    for rewards, group_size in (
        ([1.0, 0.0], 1),
        ([1.0, math.nan, 0.0, 0.0], 2),
        ([math.inf, 0.0], 2),
        ([0.0, -math.inf], 2),
    ):
        with pytest.raises(ValueError):
            grpo.group_advantages(torch.tensor(rewards), group_size)
    with pytest.raises(ValueError, match=r"\b2\b"):  # it says which
        grpo.group_advantages(torch.tensor([0.0, 1.0, math.nan, 0.0]), 2)
    for scale in "std", "none":
        for value in 0.0, 1.0, 0.1, -0.7, 1e4 / 3:
            equal = grpo.group_advantages(torch.full((21,), value), 7, scale)
            assert equal.tolist() == [0.0] * 21

    problems = [grpo.Problem("a", 1), grpo.Problem("b", 2)]
    for bad in math.nan, math.inf, -1e39, None, "1", lambda: 1 / 0:  # float32's ends
        reward = lambda problem, _: 0.5 if problem.answer == 1 else bad
        if callable(bad):
            reward = lambda problem, _: 0.5 if problem.answer == 1 else bad()
        with pytest.raises(SystemExit) as stopped:
            grpo.score(reward, problems, ["first", "second text"])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert "sample 1" in said and "second text" in said
    got = grpo.score(lambda p, text: p.answer + len(text), problems, ["x", "yz"])
    assert got.tolist() == [2.0, 4.0] and got.dtype == torch.float32

    monkeypatch.setattr("sys.argv", ["grpo.py", "--group-size", "1"])
    with pytest.raises(SystemExit) as stopped:
        grpo.parse_args()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --group-size must be 2 or more")


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_of_the_wrong_group_or_std(grpo, scale):
    """Whether std divides by G or G - 1 changes the step by 41 % at G = 2, and rows of
    another group in the mean change its direction: compared with Python's
    statistics.stdev, group after group.
    https://github.com/huggingface/trl/issues/5773"""
    rng = random.Random(0)
    for case in range(100):
        group_size, groups = rng.randint(2, 9), rng.randint(1, 5)
        size = group_size * groups
        rewards = [rng.choice([0.0, 1.0, rng.gauss(0, 3)]) for _ in range(size)]
        if case % 3 == 0:
            rewards[:group_size] = [rewards[0]] * group_size
        exact = torch.tensor(rewards, dtype=torch.float64)
        got = grpo.group_advantages(exact, group_size, scale).tolist()
        wanted = plain_advantages(rewards, group_size, scale)
        assert got == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_loss_differs_from_the_formula(grpo, normalization, scale):
    """Small slips (a mean where a sum is meant, a clip on one side, a mask before or
    after the mean) keep the curve going up. Loss, gradient and counts of 40 random
    batches with ratios on both sides of both clips equal the formula, term by term in
    float64, and so does a batch cut into two.
    https://github.com/huggingface/trl/issues/3256"""
    rng, clips = random.Random(f"{normalization} {scale}"), (0.2, 0.28)
    both_clips = 0
    for _ in range(40):
        group_size, c = rng.randint(2, 5), rng.randint(1, 7)
        size, longest = group_size * rng.randint(1, 4), c + rng.randint(0, 5)
        rewards = [rng.choice([0.0, 1.0, rng.random()]) for _ in range(size)]
        lengths = [rng.randint(0, c) for _ in range(size)]
        new = torch.randn(size, c, dtype=torch.float64) - 2
        old = new + 0.3 * torch.randn(size, c, dtype=torch.float64)
        mask = (torch.arange(c) < torch.tensor(lengths)[:, None]).double()
        new.requires_grad_()
        advantages = plain_advantages(rewards, group_size, scale)
        loss, gradient, clipped = 0.0, torch.zeros(size, c, dtype=torch.float64), 0
        for i, share in enumerate(plain_shares(lengths, normalization, longest)):
            a = advantages[i]
            for t in range(lengths[i]):
                ratio = math.exp(new[i, t].item() - old[i, t].item())
                if (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8):
                    ratio, clipped = 1.28 if a > 0 else 0.8, clipped + 1
                else:
                    gradient[i, t] = -share * a * ratio
                loss -= share * a * ratio
        both_clips += clipped
        exact = torch.tensor(rewards, dtype=torch.float64)
        got_a = grpo.group_advantages(exact, group_size, scale)
        weights, z = grpo.loss_weights(mask, normalization, longest)
        half = size // 2
        for a in got_a, got_a[:, None].expand(size, c):  # (B,) or (B, C)
            for parts in [slice(None)], [slice(half), slice(half, None)]:
                new.grad, got, tokens, taken = None, 0.0, 0, 0
                for part in parts:
                    batch = new[part], old[part], a[part], weights[part]
                    own, stats = grpo.policy_loss(*batch, *clips, z)
                    own.backward()
                    got, tokens = got + own.item(), tokens + int(stats["tokens"])
                    taken += int(stats["clipped"])
                assert math.isclose(got, loss, rel_tol=1e-6, abs_tol=1e-7)
                assert torch.allclose(new.grad, gradient, rtol=1e-6, atol=1e-8)
                assert (tokens, taken) == (sum(lengths), clipped)
    assert both_clips > 100


def test_clip_on_the_wrong_side(grpo):
    """For a negative advantage the clip that matters is the lower one; a clip of both
    sides, or a max for a min, silences the tokens that need the correction most. And
    the ratio belongs to a token, not to its sequence: each has its own fate.
    https://github.com/walkinglabs/hands-on-modern-rl/issues/75"""
    table = [  # ratio, gradient if A = 1, if A = -1; clips at 0.8 and at 1.28
        (0.50, -0.50, 0.00),
        (0.79, -0.79, 0.00),
        (0.81, -0.81, 0.81),
        (1.00, -1.00, 1.00),
        (1.21, -1.21, 1.21),  # DAPO's upper clip is not 1.2
        (1.27, -1.27, 1.27),
        (1.29, 0.00, 1.29),
        (3.00, 0.00, 3.00),
    ]
    ratios = torch.tensor([row[0] for row in table], dtype=torch.float64)
    for sign, column in (1.0, 1), (-1.0, 2):
        wanted = torch.tensor([[row[column] for row in table]], dtype=torch.float64)
        logprobs = ratios.log()[None].requires_grad_()
        old, ones = torch.zeros_like(logprobs), torch.ones_like(logprobs)
        advantages = torch.tensor([sign], dtype=torch.float64)
        loss, stats = grpo.policy_loss(logprobs, old, advantages, ones, 0.2, 0.28, 1)
        loss.backward()
        assert torch.allclose(logprobs.grad, wanted, atol=1e-12)
        assert stats["clipped"] == (wanted == 0).sum() == 2
        surrogate = ratios.clamp(max=1.28) if sign > 0 else -ratios.clamp(min=0.8)
        assert math.isclose(loss.item(), -surrogate.sum(), rel_tol=1e-12)


def test_kl_with_the_gradient_of_another_divergence(grpo):
    """k3 estimates the reverse KL without bias, yet as a loss it has the gradient of
    the forward KL, and k1 as a loss has none at all. In exact expectation over a
    categorical kl_loss has the gradient of KL(pi || pi_ref), also off-policy, where
    samples come from pi_old. https://github.com/huggingface/trl/issues/4967,
    https://arxiv.org/abs/2512.21852"""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        theta, other, ref = torch.randn(3, 6, generator=generator).double() * 1.5
        theta.requires_grad_()
        ref = ref.log_softmax(-1)

        def expected(loss, samples):
            """Gradient of the expectation of loss(log p) over fixed samples."""
            value = (samples.exp().detach() * loss(theta.log_softmax(-1))).sum()
            return torch.autograd.grad(value, theta)[0]

        on_policy = theta.detach().log_softmax(-1)
        log_p = theta.log_softmax(-1)
        reverse = (log_p.exp() * (log_p - ref)).sum()
        reverse = torch.autograd.grad(reverse, theta)[0]
        log_p = theta.log_softmax(-1)
        forward = (ref.exp() * (ref - log_p)).sum()
        forward = torch.autograd.grad(forward, theta)[0]
        assert (reverse - forward).norm() > 0.01

        for old in on_policy, other.log_softmax(-1):
            columns = [x[:, None] for x in (theta.log_softmax(-1), old, ref, old.exp())]
            got = grpo.kl_loss(*columns, 1)  # the mask holds each token's probability
            got = torch.autograd.grad(got, theta)[0]
            assert torch.allclose(got, reverse, atol=1e-10)

        k1 = lambda log_p: log_p - ref
        k3 = lambda log_p: (ref - log_p).exp() - 1 + (log_p - ref)
        assert torch.allclose(expected(k3, on_policy), forward, atol=1e-10)
        assert expected(k1, on_policy).norm() < 1e-10


def test_pass_at_k_counted_naively(grpo):
    """1 - (1 - c/n)^k, or "any of the first k", is biased or noisy: the estimate equals
    the share of all subsets of k samples that hold a correct one.
    https://arxiv.org/abs/2107.03374, https://github.com/karpathy/nanochat"""
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            correct = [i < c for i in range(n)]
            hits = [any(subset) for subset in itertools.combinations(correct, k)]
            share = sum(hits) / len(hits)
            assert math.isclose(grpo.pass_at_k(n, c, k), share, abs_tol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "vopd", "prefixrl"])
def test_evaluation_shows_pass_at_another_k(name, monkeypatch):
    """1, 2, 0 and 1 of two completions are right: pass@1, pass@2 and the mean reward,
    of which a wrong completion has 0.75."""
    script = load_script(name)
    made = SimpleNamespace(texts=[*"abaabbba"], completion_mask=None)
    monkeypatch.setattr(script, "generate", lambda *_: made)
    problem, none = script.Problem("", 0), (None, None)
    batch = *none, [[]] * 4, [problem] * 4
    if name == "vopd":
        batch = None, *batch
        sums = torch.tensor([0.0, 6.0, 4.0, 0.0])
        monkeypatch.setattr(script, "distill", lambda *_: (sums, None))
    if name == "prefixrl":
        batch = *none, [script.Exercise([], problem)] * 4
        monkeypatch.setattr(script, "complete", lambda *_: made)
    reward = lambda _, text: 1.0 if text == "a" else 0.75
    found = script.evaluate(*batch, reward, cpu_args(script, eval_samples=2))
    assert found.pop("eval/reverse_kl", 1.5) == 1.5
    assert found == {"eval/pass@1": 0.5, "eval/pass@2": 0.75, "eval/reward": 0.875}


def test_loss_near_0_and_really_not_training(grpo):
    """At the first update the loss is 0 up to rounding, whether or not anything is
    trained. One step moves the weights, raises log p of what was rewarded, lowers that
    of what was not, and the log tells a real 0: gradient norm, update, dead groups.
    https://github.com/huggingface/trl/issues/3452"""
    model = small_qwen3(16)
    lengths = [3, 5, 2, 4, 6, 1]
    rollout = random_rollout(grpo, 16, [4, 4, 2, 2, 3, 3], lengths, seed=5)
    rollout.rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 1.0])
    advantages = grpo.group_advantages(rollout.rewards, 2)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    rows = plain_logprobs(model, rollout)
    (-sum(a * row.mean() / 6 for a, row in zip(advantages, rows))).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    args = cpu_args(grpo, normalization="sequence", group_size=2, max_grad_norm=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    stats = grpo.update(model, None, optimizer, rollout, advantages, args)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    change = (after - before).norm() / before.norm()
    assert abs(stats["loss"]) < 1e-6 and change > 1e-3
    assert math.isclose(stats["grad_norm"], wanted.norm(), rel_tol=1e-4)  # unclipped
    assert math.isclose(stats["relative_update"], change, rel_tol=1e-4)
    old = torch.stack([row.detach().sum() for row in rows])
    new = torch.stack([x.detach().sum() for x in plain_logprobs(model, rollout)])
    assert (new - old)[[0, 5]].min() > 0 > (new - old)[[1, 4]].max()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    rollout.truncated = torch.tensor([True, False, False, False, False, False])
    shown = grpo.describe(rollout, [0.0, 1.0, 3.0, 6.0], args)
    assert math.isclose(shown["dead_group_share"], 1 / 3, rel_tol=1e-5)
    assert math.isclose(shown["truncated_share"], 1 / 6, rel_tol=1e-5)
    assert math.isclose(shown["reward_mean"], 0.5, rel_tol=1e-5)
    assert math.isclose(shown["reward_std"], math.sqrt(2) / 3, rel_tol=1e-5)
    assert math.isclose(shown["completion_length"], 3.5, rel_tol=1e-5)
    seconds = [shown[f"seconds_{name}"] for name in ("rollout", "score", "update")]
    assert seconds == [1.0, 2.0, 3.0] and shown["tokens_per_second"] == 3.5


def test_speed_is_that_of_one_rank(grpo, monkeypatch):
    """tokens_per_second counts the tokens of all ranks; the other metrics of a rollout
    are their means, not their sums."""
    rollout = random_rollout(grpo, 16, [2, 2], [3, 5])
    alone = grpo.describe(rollout, [0.0, 1.0, 2.0, 4.0], cpu_args(grpo))
    monkeypatch.setattr(grpo, "WORLD_SIZE", 3)
    monkeypatch.setattr(grpo, "all_reduce", lambda x: 3 * x)  # of three equal ranks
    three = grpo.describe(rollout, [0.0, 1.0, 2.0, 4.0], cpu_args(grpo))
    assert alone["tokens_per_second"] == 2 and three["tokens_per_second"] == 6
    for name in "completion_length", "truncated_share", "reward_mean":
        assert three[name] == pytest.approx(alone[name])


def test_gradient_clipped_before_it_is_whole(grpo):
    """Clipping the gradient of each micro-batch instead of the sum bends its direction:
    what the optimiser sees is the whole gradient, shortened to the norm asked for, and
    the norm reported is the one before. https://github.com/verl-project/verl/issues/906"""
    rollout = random_rollout(grpo, 16, [3] * 6, [2, 5, 3, 4, 6, 1])
    advantages, found = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]), []
    for limit, size in (1e30, 6), (0.01, 2):
        args = cpu_args(grpo, max_grad_norm=limit, micro_batch_size=size)
        model = small_qwen3(16).double()
        optimizer = Recorder(model)
        stats = grpo.update(model, None, optimizer, rollout, advantages, args)
        found.append((optimizer.seen[0], stats["grad_norm"]))
    (whole, norm), (short, same_norm) = found
    assert math.isclose(norm, whole.norm(), rel_tol=1e-6)
    assert math.isclose(same_norm, norm, rel_tol=1e-5)
    assert distance(short, whole * 0.01 / norm) < 1e-4


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_update_differs_from_the_formula(grpo, normalization, kl_coef):
    """Dead groups are skipped to save time; if Z forgets them the step grows as the
    policy learns. Later updates on a batch must divide by the policy that sampled it,
    not by that of the last update, and measure the KL to the initial model. Gradients
    and statistics of four updates equal those of J in float64 with no row skipped.
    https://github.com/Goekdeniz-Guelmez/mlx-lm-lora/issues/55"""
    temperature, rate, steps = 0.8, 0.003, 4
    lengths = [4, 1, 6, 2, 5, 3, 6, 1]
    rollout = random_rollout(
        grpo, 16, [3, 3, 5, 5, 2, 2, 4, 4], lengths, [False] * 6 + [True, False]
    )
    sampler, reference = small_qwen3(16).double(), small_qwen3(16, seed=1).double()
    with torch.no_grad():
        old = plain_logprobs(sampler, rollout, temperature)
        ref = plain_logprobs(reference, rollout, temperature)
    for row, values in zip(rollout.logprobs, old):
        row[: len(values)] = values
    rollout.logprobs[0, 1] += 0.25  # logged, but not what the ratios are made with
    rollout.logprobs[2, 5] -= 0.5  # of a dead group
    advantages = torch.tensor([2.0, -2.0, 0.0, 0.0, 1.5, -1.5, -1.0, 1.0])

    flags = dict(temperature=temperature, normalization=normalization, kl_coef=kl_coef)
    flags |= dict(updates_per_batch=steps, micro_batch_size=3, max_new_tokens=9)
    model = small_qwen3(16).double()
    optimizer, given = Recorder(model, rate), reference if kl_coef else None
    args = cpu_args(grpo, **flags)
    stats = grpo.update(model, given, optimizer, rollout, advantages, args)
    assert len(optimizer.seen) == steps

    shares = plain_shares(lengths, normalization, 9)
    mine, clips = small_qwen3(16).double(), []
    for got in optimizer.seen:
        mine.zero_grad()
        loss = kl = 0.0
        rows, clipped = plain_logprobs(mine, rollout, temperature), 0
        for new, o, r, a, share in zip(rows, old, ref, advantages.tolist(), shares):
            for t in range(len(new)):
                ratio = (new[t] - o[t]).exp()
                out = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
                limit = 1.28 if a > 0 else 0.8
                loss = loss - share * a * (limit if out else ratio)
                clipped += bool(out)
                gap = (new[t] - r[t]).detach()  # reverse KL: E[rho gap grad log pi]
                gap = gap * (new[t] - new[t].detach() + gap / 2)
                kl = kl + share * ratio.detach() * gap
        (loss + kl_coef * kl).backward()
        wanted = torch.cat([p.grad.flatten() for p in mine.parameters()])
        assert distance(got, wanted) < 1e-5
        clips.append(clipped)
        with torch.no_grad():
            for p in mine.parameters():
                p -= rate * p.grad
    assert clips[0] == 0 < clips[-1]
    counted = [n for n, a in zip(lengths, advantages) if a or kl_coef]
    assert math.isclose(stats["loss"], loss.item(), rel_tol=1e-4, abs_tol=1e-6)
    assert math.isclose(stats["kl"], kl.item() * (kl_coef > 0), rel_tol=1e-4)
    assert math.isclose(stats["clip_fraction"], clips[-1] / sum(counted), rel_tol=1e-5)
    assert math.isclose(stats["grad_norm"], wanted.norm(), rel_tol=1e-4)
    gaps = [0.25, 0.5] if kl_coef else [0.25]  # of sampled and scored log-probs
    mean = sum(gaps) / sum(counted)
    assert math.isclose(stats["delta_logp_mean"], mean, abs_tol=1e-5)
    assert math.isclose(stats["delta_logp_max"], max(gaps), abs_tol=1e-5)


def test_entropy_of_another_distribution(grpo):
    """Entropy is the first sign of a collapse; computed without the temperature, over
    padding or over the batch's mean it is a different number. Per token it equals the
    exact one, and the statistic is its mean over the tokens that are trained on.
    https://github.com/huggingface/trl/issues/4159"""
    rollout = random_rollout(grpo, 16, [3, 6, 2, 2], [4, 2, 5, 1])
    model, exact = small_qwen3(16).double(), torch.zeros(4, 5)
    for i, row in enumerate(rollout.tokens):
        ids, length = row[rollout.attention_mask[i].bool()], [4, 2, 5, 1][i]
        with torch.no_grad():
            p = (model(ids[None]).logits[0, -1 - length : -1] / 0.6).softmax(-1)
        exact[i, :length] = -(p * p.log()).sum(-1)
    batch = rollout.tokens, rollout.attention_mask, 5, 0.6
    assert torch.allclose(grpo.token_logprobs(model, *batch)[1], exact, atol=1e-5)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    args = cpu_args(grpo, temperature=0.6, micro_batch_size=3)
    stats = grpo.update(model, None, Recorder(model), rollout, advantages, args)
    assert math.isclose(stats["entropy"], exact.sum() / 12, rel_tol=1e-5)
