"""Distribution matching: the loss, its tasks and its evaluation, against brute force."""

from __future__ import annotations

import math
import random
from types import ModuleType

import pytest
import torch
from conftest import (
    load_script,
)

DIVERGENCES = "mse", "forward-kl", "js"


@pytest.fixture(scope="module")
def dmpo() -> ModuleType:
    """algos/dmpo.py as a module."""
    return load_script("dmpo")


# ------------------------------------- The loss ---------------------------------------


def random_batch(rng: random.Random, size: int, shortest: int = 1):
    """Log-probs (size, C) float64, lengths, rewards with ties, all random."""
    c = rng.randint(max(shortest, 1), 7)
    lengths = [rng.randint(shortest, c) for _ in range(size)]
    seed = torch.Generator().manual_seed(rng.randrange(2**31))
    logprobs = -3 * torch.rand(size, c, dtype=torch.float64, generator=seed)
    mask = (torch.arange(c) < torch.tensor(lengths)[:, None]).double()
    rewards = [rng.choice([0.0, 0.1, 1.1, rng.random()]) for _ in range(size)]
    return logprobs, mask, lengths, torch.tensor(rewards, dtype=torch.float64)


def plain_softmax(logits: list[float]) -> list[float]:
    """The formula, in Python's floats."""
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def plain_loss(logprobs, lengths, rewards, group_size, alpha, divergence) -> float:
    """The formulas of the docstring, group by group; length 0: left out."""
    groups = []
    for start in range(0, len(lengths), group_size):
        rows = [i for i in range(start, start + group_size) if lengths[i]]
        if not rows:
            continue
        p = plain_softmax([rewards[i].item() / alpha for i in rows])
        phi = [sum(logprobs[i, : lengths[i]].tolist()) / lengths[i] for i in rows]
        pairs = list(zip(p, plain_softmax(phi)))
        kl = lambda pairs: sum(a * math.log(a / b) for a, b in pairs if a > 0)
        middle = [(a + b) / 2 for a, b in pairs]
        groups.append(
            {
                "mse": sum((a - b) ** 2 for a, b in pairs) / len(rows),
                "forward-kl": kl(pairs),
                "js": kl(zip(p, middle)) / 2
                + kl([(b, m) for (_, b), m in zip(pairs, middle)]) / 2,
            }[divergence]
        )
    return sum(groups) / max(len(groups), 1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_differs_from_the_formula(dmpo, divergence):
    """Small slips (advantages instead of rewards, a sum for the mean over a group, KL
    the wrong way round) train all the same. Loss and gradient of 60 random batches
    equal the formula in float64, its gradient by central differences; a batch cut into
    micro-batches of whole groups adds up to it."""
    rng = random.Random(divergence)
    for case in range(60):
        group_size, n = rng.randint(2, 6), rng.randint(1, 3)
        batch = random_batch(rng, group_size * n, shortest=case % 2)  # 0: left out
        logprobs, mask, lengths, rewards = batch
        alpha = rng.choice([1 / 15, 0.3, 1.0])
        loss = lambda x: plain_loss(x, lengths, rewards, group_size, alpha, divergence)
        logprobs.requires_grad_()
        rest = group_size, alpha, divergence
        got, _ = dmpo.distribution_matching_loss(logprobs, mask, rewards, *rest)
        got.backward()
        wanted = loss(logprobs.detach())
        assert got.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        for _ in range(5):
            i = rng.randrange(len(lengths))
            t, step = rng.randrange(logprobs.shape[1]), torch.zeros_like(logprobs)
            step[i, t] = 1e-5
            ends = [loss(logprobs.detach() + sign * step) for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-5
            assert logprobs.grad[i, t].item() == pytest.approx(slope, abs=1e-8)
        whole, there = logprobs.grad.clone(), mask.view(n, -1).any(-1).sum()
        logprobs.grad = None
        for rows in torch.arange(len(lengths)).split(group_size):
            part = logprobs[rows], mask[rows], rewards[rows]
            dmpo.distribution_matching_loss(*part, *rest, groups=there)[0].backward()
        assert torch.allclose(logprobs.grad, whole, atol=1e-12)


def test_target_has_a_gradient_or_is_mixed_up_with_the_policy(dmpo):
    """p is a constant: rewards that come with a gradient get none. Shares: with two
    completions, p = sigmoid of the reward gap over alpha; q_max is that of the policy.
    https://github.com/meta-pytorch/torchforge/issues/527 did not detach its signal."""
    rewards = torch.tensor([1.1, 0.9], dtype=torch.float64, requires_grad=True)
    logprobs = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.float64)
    loss, stats = dmpo.distribution_matching_loss(logprobs, mask, rewards, 2, 1 / 15)
    loss.backward()
    assert rewards.grad is None
    p, q = 1 / (1 + math.exp(-0.2 * 15)), 1 / (1 + math.exp(-1.0))
    assert loss.item() == pytest.approx((p - q) ** 2)
    assert stats["p_max"].item() == pytest.approx(p)
    assert stats["q_max"].item() == pytest.approx(q)
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[1, 0]  # q_1 < p_1: raise it


def test_gradient_coefficient_exceeds_its_bound(dmpo):
    """|dL/dphi_i| <= 16 / (27 G) for the square, in one group. With d = q - p,
    dL/dphi_i = (2/G) q_i (d_i - sum_j q_j d_j), linear in p, so the largest value is at
    a corner p = e_k. k = i: q_i ((1 - q_i)^2 + sum_{j != i} q_j^2) <= 2 q_i (1 - q_i)^2
    <= 8/27, reached at q_i = 1/3 with one other completion; k != i gives
    2 q_i^2 (1 - q_i) <= 8/27 in the same way. So lambda = 2 moves phi_i at most by
    32 / (27 G), whatever the rewards: an L_DM that is summed over a group, not
    averaged, or differentiated through sums of log-probs, is beyond it."""
    rng, largest = random.Random(0), 0.0
    for case in range(3000):
        group_size = rng.choice([2, 2, 3, 8])
        phi = torch.tensor([[rng.gauss(0, 2)] for _ in range(group_size)])
        phi = phi.double().requires_grad_()
        rewards = torch.tensor([rng.choice([0.0, 5.0]) for _ in range(group_size)])
        rest = torch.ones_like(phi), rewards, group_size, 1 / 15
        dmpo.distribution_matching_loss(phi, *rest)[0].backward()
        size = phi.grad.abs().max().item() * group_size
        assert size <= 16 / 27 + 1e-9
        largest = max(largest, size)
    assert largest > 0.95 * 16 / 27  # tight: a loss of half the size is seen too


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_common_shift_of_phi_changes_the_loss(dmpo, divergence):
    """q depends on differences of phi alone: adding a number to all log-probs of a
    group changes nothing, and so the gradients over a group add up to 0. (A weakness of
    the loss too: it cannot see a group that is unlikely as a whole.)"""
    rng = random.Random(1)
    for _ in range(50):
        logprobs, mask, _, rewards = random_batch(rng, 12)
        rest = mask, rewards, 4, 1 / 15, divergence
        logprobs.requires_grad_()
        loss, _ = dmpo.distribution_matching_loss(logprobs, *rest)
        loss.backward()
        shift = torch.tensor([rng.gauss(0, 3) for _ in range(3)]).repeat_interleave(4)
        moved, _ = dmpo.distribution_matching_loss(logprobs + shift[:, None], *rest)
        assert moved.item() == pytest.approx(loss.item(), rel=1e-7, abs=1e-9)
        by_group = logprobs.grad.sum(-1).view(3, 4).sum(-1)
        assert by_group.abs().max() < 1e-12 < logprobs.grad.abs().max()


def test_equal_rewards_have_no_target(dmpo):
    """Where GRPO has nothing to say, all rewards equal, p is uniform: the loss is 0 at
    equal phi, and otherwise raises the unlikely completions, whatever the rewards'
    size."""
    for reward in 0.0, 0.1, 1.1, -3.0:
        logprobs = torch.tensor([[-1.0], [-1.0], [-3.0], [-5.0]], requires_grad=True)
        ones, rewards = torch.ones(4, 1), torch.full((4,), reward)
        rest = ones, rewards, 4, 1 / 15
        loss, stats = dmpo.distribution_matching_loss(logprobs, *rest)
        loss.backward()
        assert stats["p_max"].item() == pytest.approx(1 / 4)
        assert loss > 0 and (logprobs.grad[2:] < 0).all()  # descent raises these
        assert (logprobs.grad[:2] > 0).all()
        flat, _ = dmpo.distribution_matching_loss(logprobs * 0, *rest)
        assert flat.item() == 0


def test_loss_bounds_no_share_from_below(dmpo):
    """The paper's inequality: in a group with the loss delta, every completion keeps
    q_i >= p_i - sqrt(G delta). With a loss smaller than the docstring's (another
    denominator, say) it fails."""
    rng, close = random.Random(2), 0
    for _ in range(2000):
        group_size = rng.randint(2, 8)
        logprobs, mask, lengths, rewards = random_batch(rng, group_size)
        rest = mask, rewards, group_size, rng.choice([1 / 15, 0.5])
        delta = dmpo.distribution_matching_loss(logprobs, *rest)[0].item()
        p = plain_softmax((rewards / rest[-1]).tolist())
        phi = [logprobs[i, :n].mean().item() for i, n in enumerate(lengths)]
        slack = [
            b - a + math.sqrt(group_size * delta) for a, b in zip(p, plain_softmax(phi))
        ]
        assert min(slack) >= -1e-12
        close += min(slack) < 0.3 * math.sqrt(group_size * delta)
    assert close > 200  # it is no empty statement


def test_long_completions_are_unlikely_ones(dmpo):
    """phi is the mean log-prob, not the sum: completions with the same log-prob at each
    token and different lengths have the same share q = 1/G; what is behind the mask
    counts for nothing."""
    lengths = [1, 2, 5, 9]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).double()
    logprobs = torch.where(mask > 0, -1.3, -50.0).double().requires_grad_()
    rewards = torch.zeros(4)
    loss, stats = dmpo.distribution_matching_loss(logprobs, mask, rewards, 4, 1 / 15)
    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert stats["q_max"].item() == pytest.approx(1 / 4)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    loss, _ = dmpo.distribution_matching_loss(logprobs, mask, rewards, 4, 1 / 15)
    loss.backward()
    coefficient = logprobs.grad.sum(-1)  # by completion, whatever its length
    assert coefficient[0].item() == pytest.approx(coefficient[2].item())
    assert torch.allclose(logprobs.grad[2, :5], coefficient[2] / 5)
    assert not logprobs.grad[mask == 0].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_groups_mix(dmpo, divergence):
    """Completions of one prompt never compete with another's: a change of rewards or
    log-probs in one group leaves the gradient in the others as it is, and the order of
    the groups does not matter."""
    rng = random.Random(3)
    logprobs, mask, _, rewards = random_batch(rng, 12)
    rest = 4, 1 / 15, divergence

    def gradient(logprobs, mask, rewards):
        x = logprobs.clone().requires_grad_()
        dmpo.distribution_matching_loss(x, mask, rewards, *rest)[0].backward()
        return x.grad

    before = gradient(logprobs, mask, rewards)
    other_rewards, other = rewards.clone(), logprobs.clone()
    other_rewards[4:8] = torch.tensor([0.3, 0.2, 0.9, 0.7])
    other[4:8] *= 1.7
    after = gradient(other, mask, other_rewards)
    assert torch.equal(
        before[[0, 1, 2, 3, 8, 9, 10, 11]], after[[0, 1, 2, 3, 8, 9, 10, 11]]
    )
    assert not torch.allclose(before[4:8], after[4:8])
    turned = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])
    got = gradient(logprobs[turned], mask[turned], rewards[turned])
    assert torch.allclose(got, before[turned], atol=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_completion_keeps_a_share(dmpo, divergence):
    """A truncated completion that is masked has no phi. In p its share could never be
    matched; in q, at phi = 0, the largest there is, it would take most. It leaves both,
    and G: the loss is that of the group without it. A group of masked ones alone gives
    no 0 / 0 and is not counted.
    https://github.com/huggingface/trl/issues/6369 and /5885"""
    rng = random.Random(4)
    logprobs, mask, _, rewards = random_batch(rng, 8)
    rest = 1 / 15, divergence
    mask[[2, 5, 6]] = 0
    rewards[2], rewards[5] = 1.1, 1.1  # the best of the group is cut off
    logprobs.requires_grad_()
    got, _ = dmpo.distribution_matching_loss(logprobs, mask, rewards, 4, *rest)
    (gradient,) = torch.autograd.grad(got, logprobs)
    groups = [0, 1, 3], [4, 7]
    parts = [
        dmpo.distribution_matching_loss(logprobs[g], mask[g], rewards[g], len(g), *rest)
        for g in groups
    ]
    wanted = (parts[0][0] + parts[1][0]) / 2
    assert got.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert torch.allclose(
        gradient, torch.autograd.grad(wanted, logprobs)[0], atol=1e-12
    )
    assert not gradient[[2, 5, 6]].any()

    mask[4:] = 0
    got, _ = dmpo.distribution_matching_loss(logprobs, mask, rewards, 4, *rest)
    first = dmpo.distribution_matching_loss(
        logprobs[:4], mask[:4], rewards[:4], 4, *rest
    )
    assert got.item() == pytest.approx(first[0].item(), rel=1e-12)
    mask[:] = 0
    got, stats = dmpo.distribution_matching_loss(logprobs, mask, rewards, 4, *rest)
    assert got.item() == 0 and stats["p_max"] == stats["q_max"] == 0
    assert torch.equal(torch.autograd.grad(got, logprobs)[0], logprobs.detach() * 0)
    mask[0] = 1  # alone in its group: it has no choice
    got, _ = dmpo.distribution_matching_loss(logprobs, mask, rewards, 4, *rest)
    assert got.item() == pytest.approx(0, abs=1e-12)


def test_extreme_rewards_overflow(dmpo):
    """Rewards of 1e4 at alpha 1/15 are logits of 150,000 in fp32, and log-probs of -1e4
    are possible: shares underflow to 0, neither loss nor gradient to NaN."""
    for divergence in DIVERGENCES:
        for scale in 1e4, -1e4:
            logprobs = torch.tensor([[-1e4], [-0.1], [-1e4], [0.0]], requires_grad=True)
            rewards = scale * torch.tensor([1.0, 0.0, 0.5, 1.0])
            mask = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
            rest = mask, rewards, 4, 1 / 15, divergence
            loss, _ = dmpo.distribution_matching_loss(logprobs, *rest)
            loss.backward()
            assert loss.isfinite() and logprobs.grad.isfinite().all()


def test_group_of_one_or_nan_reward_is_trained_on(dmpo):
    """Alone, p = q = 1 for ever; one NaN spreads to every weight.
    https://github.com/Jiayi-Pan/TinyZero/issues/89"""
    ones = torch.ones(4, 2)
    for rewards, group_size in (([1.0] * 4, 1), ([1.0, math.nan, 0.0, 0.0], 2)):
        with pytest.raises(ValueError):
            dmpo.distribution_matching_loss(
                -ones, ones, torch.tensor(rewards), group_size, 1 / 15
            )
