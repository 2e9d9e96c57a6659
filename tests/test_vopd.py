"""Distillation: the estimators against exact enumeration, and the run around them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    PLUGIN,
    Finished,
    Recorder,
    char_tokenizer,
    cpu_args,
    load_script,
    metrics_of,
    plain_logprobs,
    random_rollout,
    save_model,
    small_gpt2,
    small_qwen3,
)
from safetensors.torch import load_file

UNBIASED = "sampled", "vopd", "vopd-topk", "full"
SIZES = 2, 5, 16, 60, 250  # of the vocabulary; 45 pairs each
PAIRS, FLOOR = 45, 0.3  # lam of clip
LOW = math.log(FLOOR) / (1 - FLOOR)


@pytest.fixture(scope="module")
def vopd():
    """algos/vopd.py as a module."""
    return load_script("vopd")


def random_pairs(v: int):
    """Logits (PAIRS, V) float64 of students and of teachers that differ from theirs by
    a little, by as much as they vary themselves, and by more."""
    generator = torch.Generator().manual_seed(v)
    draw = lambda: torch.randn(PAIRS, v, dtype=torch.float64, generator=generator)
    student, spread = 2 * draw(), torch.tensor([0.3, 1.0, 3.0]).repeat(PAIRS // 3)
    return student, student + spread[:, None] * draw()


def action_gradients(vopd, student, teacher, estimator, top_k) -> torch.Tensor:
    """Gradient (PAIRS, V, V) of the loss of each action with respect to the logits that
    it was drawn from: [i, y] is what the estimator says if y was drawn from pair i."""
    n, v = student.shape
    leaf = student[:, None].expand(n, v, v).clone().requires_grad_()
    teacher = teacher[:, None].expand(n, v, v)
    tokens, mask = torch.arange(v).expand(n, v), torch.ones(n, v, dtype=torch.float64)
    batch = leaf, teacher, tokens, mask, estimator, top_k
    loss, stats = vopd.distill_loss(*batch, denominator=2.0, clip_lambda=FLOOR)
    loss.backward()
    assert stats["tokens"] == n * v
    return 2 * leaf.grad


def exact_gradient(student, teacher) -> torch.Tensor:
    """Of KL(p || q) by the student's logits, (PAIRS, V), by its formula."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, gap = log_p.exp(), log_p - log_q
    return p * (gap - (p * gap).sum(-1, keepdim=True))


@pytest.mark.parametrize("v", SIZES)
def test_estimator_has_another_expected_gradient(vopd, v):
    """A baseline that depends on the action, a reward that is not detached, a sign, or
    a top-k where the whole vocabulary is meant: the loss falls all the same, towards
    something else. Summed over all actions with their probabilities, sampled, vopd and
    vopd-topk give the gradient of the KL, and full gives it whatever was drawn; topk
    and clip, which the paper compares with, do not.
    https://github.com/meta-pytorch/torchforge/pull/527"""
    student, teacher = random_pairs(v)
    p, wanted = student.softmax(-1)[..., None], exact_gradient(student, teacher)
    for estimator, k in itertools.product(vopd.ESTIMATORS, (max(v // 3, 1), 1000)):
        each = action_gradients(vopd, student, teacher, estimator, k)
        error = ((p * each).sum(1) - wanted).abs().amax(-1)
        if estimator in UNBIASED or (estimator == "topk" and k >= v):
            assert error.max() < 1e-10
        elif estimator == "topk":
            assert error.median() > 1e-4 and error.max() > 1e-2
        else:  # where the clip takes part
            bites = (teacher.log_softmax(-1) - p[..., 0].log()).amin(-1) < LOW
            assert bites.any() and error[bites].min() > 1e-8
            assert not (error[~bites] > 1e-10).any()
        if estimator == "full":
            assert torch.allclose(each, wanted[:, None].expand_as(each), atol=1e-12)
        if estimator == "vopd-topk" and k >= v:
            same = action_gradients(vopd, student, teacher, "vopd", 1)
            assert torch.allclose(each, same, atol=1e-12)


def test_small_kl_drowns_in_an_offset_of_the_logits(vopd):
    """Two heads that differ by a constant are the same distribution: a KL that takes
    the constant out after the sum over the vocabulary, in fp32, is off by it times the
    rounding of sum(p). Against float64, at a KL of 2e-4."""
    torch.manual_seed(0)
    p = torch.randn(16, 150_000)
    q = p + 0.02 * torch.randn_like(p)
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (a.exp() * (a - b)).sum(-1)
    assert 1e-4 < exact.mean() < 4e-4
    for offset in 0, 20, 50:
        kl = vopd.reverse_kl(p, q + offset)
        assert (kl - exact).abs().max() < 2e-5, offset


def test_baseline_adds_noise(vopd):
    """A control variate with the wrong sign or of another state is unbiased too, and
    makes things worse. The variance over actions, computed exactly, is smaller than
    that without a baseline, on average over all pairs, and for vocabularies that are no
    toys on average over each. In some states it is larger, at two tokens in many: that
    is no bug (-KL is not the best baseline), so it is not asserted state by state."""
    variances = {"sampled": [], "vopd": [], "vopd-topk": []}
    for v in SIZES:
        student, teacher = random_pairs(v)
        p = student.softmax(-1)
        for estimator, found in variances.items():
            each = action_gradients(vopd, student, teacher, estimator, 100)
            mean = (p[..., None] * each).sum(1)
            found.append((p * (each**2).sum(-1)).sum(-1) - (mean**2).sum(-1))
        sampled, ours = variances["sampled"][-1], variances["vopd"][-1]
        ratio, worse = sampled / ours, (sampled < ours).double().mean()
        print(f"V {v}: median variance ratio {ratio.median():.2f}, ", end="")
        print(f"worse in {worse:.0%} of {PAIRS} states")
        for estimator in ("vopd", "vopd-topk") if v >= 16 else ():
            assert variances[estimator][-1].mean() <= sampled.mean()
    sampled, *ours = (torch.stack(found) for found in variances.values())
    ratio = (sampled / ours[0]).median()
    print(f"all {sampled.numel()} pairs: median variance ratio {ratio:.2f}")
    for found in ours:
        assert found.mean() <= sampled.mean()


def test_advantages_differ_from_the_formula(vopd):
    """a and the KL of each estimator, one token at a time in Python's floats."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 4, 9, dtype=torch.float64, generator=generator) * 2
    tokens = torch.randint(9, (3, 4), generator=generator)
    low, k = math.log(0.2) / 0.8, 4
    for b, c in itertools.product(range(3), range(4)):
        ps, qs = s[b, c].softmax(-1).tolist(), t[b, c].softmax(-1).tolist()
        y = tokens[b, c].item()
        r = math.log(qs[y]) - math.log(ps[y])
        kl = sum(p * math.log(p / q) for p, q in zip(ps, qs))
        best = sorted(range(9), key=lambda i: -ps[i])[:k]
        p_k, q_k = (sum(x[i] for i in best) for x in (ps, qs))
        kl_k = sum(ps[i] / p_k * math.log(ps[i] / p_k * q_k / qs[i]) for i in best)
        for estimator, a, seen in (
            ("sampled", r, -r),
            ("clip", max(r, low), -r),
            ("vopd", r + kl, kl),
            ("vopd-topk", r + kl_k, kl_k),
            ("full", 0.0, kl),
            ("topk", 0.0, kl_k),
        ):
            got = vopd.distill_advantages(s, t, tokens, estimator, k, 0.2)
            assert math.isclose(got[0][b, c], a, rel_tol=1e-9, abs_tol=1e-9)
            assert math.isclose(got[1][b, c], seen, rel_tol=1e-9, abs_tol=1e-9)
    with pytest.raises(ValueError, match="best"):
        vopd.distill_advantages(s, t, tokens, "best")


def test_gradient_flows_through_the_advantage(vopd):
    """A student's log-prob that is not detached inside a adds log p grad log p to the
    gradient: entropy instead of distillation. Neither a nor the KL beside it has a
    gradient, and the teacher's logits never get any.
    https://github.com/meta-pytorch/torchforge/pull/527"""
    s, t = torch.randn(2, 2, 3, 200)
    s, t = s.requires_grad_(), t.requires_grad_()
    tokens, mask = torch.randint(200, (2, 3)), torch.ones(2, 3)
    for estimator in vopd.ESTIMATORS:
        a, kl = vopd.distill_advantages(s, t, tokens, estimator, 7)
        assert not a.requires_grad and not kl.requires_grad
        loss, stats = vopd.distill_loss(s, t, tokens, mask, estimator, 7, 6)
        loss.backward()
        assert s.grad.abs().sum() > 0 and t.grad is None
        assert not any(x.requires_grad for x in stats.values())


def test_loss_of_another_sum_or_denominator(vopd):
    """The loss is -sum(mask a log p) / Z (for full and topk the KL), with log p of the
    whole vocabulary; two halves of a batch add up; masked tokens change nothing, and a
    batch that is masked as a whole has loss 0 and gradient 0. https://github.com/huggingface/trl/issues/5885"""
    generator = torch.Generator().manual_seed(1)
    s, t = torch.randn(2, 4, 5, 70, generator=generator).double()
    tokens = torch.randint(70, (4, 5), generator=generator)
    mask = (torch.arange(5) < torch.tensor([5, 2, 0, 3])[:, None]).double()
    s.requires_grad_()
    log_p = s.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    best = s.detach().topk(8).indices
    exact_kl = {
        name: torch.nn.functional.kl_div(
            b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        for name, a, b in (
            ("full", s, t), ("topk", s.gather(-1, best), t.gather(-1, best))
        )
    }  # fmt: skip
    for estimator in vopd.ESTIMATORS:
        a, _ = vopd.distill_advantages(s, t, tokens, estimator, 8)
        losses = exact_kl.get(estimator, -a * log_p)
        exact = (losses * mask).sum() / 17
        (wanted,) = torch.autograd.grad(exact, s, retain_graph=True)
        for parts in [slice(0, 4)], [slice(0, 1), slice(1, 4)]:
            s.grad, total = None, 0.0
            for x in parts:
                batch = s[x], t[x], tokens[x], mask[x], estimator, 8
                loss, _ = vopd.distill_loss(*batch, denominator=torch.tensor(17.0))
                loss.backward()
                total += loss.item()
            assert math.isclose(total, exact.item(), rel_tol=1e-9)
            assert torch.allclose(s.grad, wanted, atol=1e-12)
            assert not s.grad[mask == 0].any()
        s.grad = None
        batch = s, t, tokens, 0 * mask, estimator, 8
        loss, stats = vopd.distill_loss(*batch, denominator=torch.tensor(0.0))
        loss.backward()
        assert loss == 0 and stats["tokens"] == 0 and not s.grad.any()


def pipeline(script, kind: str):
    """Student, teacher, all two-token completions of three prompts of different lengths
    as a Rollout, and the probability of each under the student at temperature 0.7.
    EOS is 1: a completion is one EOS, or another token and any second one. GPT-2 has
    biases in its heads here, which temperatures divide as well."""
    v, t = 5, 0.7
    make, changes = small_qwen3, {}
    if kind == "gpt2":  # load_model takes dropout out of what it loads
        make, changes = small_gpt2, dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    student, teacher = (make(v, seed=seed, **changes).double() for seed in (0, 1))
    if kind == "gpt2":
        for model in student, teacher:
            model.lm_head.bias = torch.nn.Parameter(torch.randn(v).double())
    ends = [(1,), *((a, b) for a in range(v) if a != 1 for b in range(v))]
    prompts = [(2,), (3, 4, 2), (0, 3)]
    rows = [(prompt, end) for prompt in prompts for end in ends]
    tokens = torch.full((len(rows), 5), 3)  # padding that nobody may look at
    seen, mask = torch.zeros(len(rows), 5).long(), torch.zeros(len(rows), 2).double()
    chance = torch.ones(len(rows), dtype=torch.float64)
    for i, (prompt, end) in enumerate(rows):
        used = slice(3 - len(prompt), 3 + len(end))
        tokens[i, used], seen[i, used] = torch.tensor(prompt + end), 1
        mask[i, : len(end)] = 1
        for j in range(len(end)):
            with torch.no_grad():
                logits = student(torch.tensor([prompt + end[:j]])).logits[0, -1]
            chance[i] *= (logits / t).softmax(-1)[end[j]]
    truncated = torch.tensor([end[-1] != 1 for _, end in rows])
    zeros = torch.zeros(len(rows), 2)
    rollout = script.Rollout(tokens, seen, mask, zeros, zeros[:, 0], truncated, [])
    assert math.isclose(chance.sum(), len(prompts), rel_tol=1e-12)
    return student, teacher, rollout, chance, prompts


def kl_of_states(student, teacher, prompts, t, teacher_t) -> torch.Tensor:
    """Expected sum over a completion's tokens of KL(p || q), states held fixed: the
    loss in the paper's words, without masks, padding, shifts or chunks."""
    total = 0.0
    for prompt in prompts:
        logits = student(torch.tensor([prompt])).logits[0, -1]
        first = (logits / t).softmax(-1).detach().tolist()
        after = [(prompt + (y,), first[y]) for y in range(len(first)) if y != 1]
        for state, chance in [(prompt, 1.0), *after]:
            ids = torch.tensor([state])
            log_p = (student(ids).logits[0, -1] / t).log_softmax(-1)
            log_q = (teacher(ids).logits[0, -1] / teacher_t).log_softmax(-1)
            total = total + chance * (log_p.exp() * (log_p - log_q.detach())).sum()
    return total


def gradient_of(model) -> torch.Tensor:
    """All gradients of a model as one vector, (parameters,)."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_pipeline_has_another_expected_gradient(vopd, monkeypatch, kind):
    """An estimator that is right on logits is still wrong behind a mask without the EOS
    (https://github.com/karpathy/nanochat/issues/810), logits shifted by one
    (https://github.com/lucidrains/PaLM-rlhf-pytorch/issues/31), a temperature left out
    (https://github.com/huggingface/trl/issues/3029), positions that count the padding,
    or another denominator. All completions of two tokens, weighted by their
    probabilities, go through the code that trains: in float64 the sum is the gradient
    of the KL. Qwen3 computes its norms in float32, whatever it is given."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    limit = 1e-10 if kind == "gpt2" else 1e-5
    student, teacher, rollout, chance, prompts = pipeline(vopd, kind)
    kl = kl_of_states(student, teacher, prompts, 0.7, 1.3)
    kl.backward()
    wanted, z = gradient_of(student), 7.0
    args = cpu_args(vopd, temperature=0.7, teacher_temperature=1.3, micro_batch_size=5)
    args.clip_lambda = 0.9
    weights = rollout.completion_mask * chance[:, None]
    for estimator in vopd.ESTIMATORS:
        found = []
        for most in 1, 2**26:  # one token at a time, and all at once
            student.zero_grad()
            mine = dataclasses.replace(args, estimator=estimator, top_k=2)
            sums, _ = vopd.distill(student, teacher, rollout, weights, z, mine, most)
            found.append(gradient_of(student) * z)
            if estimator == "full":
                assert math.isclose(sums[0] * z, kl.item(), rel_tol=1e-5)
            if estimator in ("full", "vopd", "sampled"):
                assert math.isclose(sums[1], kl.item(), rel_tol=1e-5)
        error = (found[0] - wanted).norm() / wanted.norm()
        assert (found[0] - found[1]).norm() / wanted.norm() < limit
        assert error < limit if estimator in UNBIASED else error > 1e-3
    assert all(p.grad is None for p in teacher.parameters())


def test_second_update_on_a_batch_is_unbiased_too(vopd, monkeypatch):
    """The negative control: the paper's claim needs data of the policy itself. After
    one update on a batch its tokens are another policy's; the expected gradient of a
    second update on them, over all batches there can be, is not that of the KL at the
    weights where it is taken. With new data it is, and so it is if the first update
    moved nothing. This is why there is no flag for several updates."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    student, teacher, rollout, chance, _ = pipeline(vopd, "gpt2")
    args = cpu_args(vopd, temperature=0.7, teacher_temperature=1.3)
    rows = range(21)  # of the first prompt
    for rate, biased in (0.01, True), (0.0, False):
        second = fresh = exact = 0.0
        for i in rows:
            model, one = copy.deepcopy(student), copy.copy(rollout)
            for name in ("tokens", "attention_mask", "completion_mask", "truncated"):
                setattr(one, name, getattr(rollout, name)[i : i + 1])
            optimizer = Recorder(model, rate)
            vopd.update(model, teacher, optimizer, one, args)
            length, before = one.completion_mask.sum(), copy.deepcopy(model)
            vopd.update(model, teacher, optimizer, one, args)
            second = second + chance[i] * length * optimizer.seen[1]
            kl_of_states(before, teacher, [(2,)], 0.7, 1.3).backward()
            exact = exact + chance[i] * gradient_of(before)
            if i in (0, 7):  # all new data there can be, at two of the weights
                wanted = gradient_of(before)
                new = []
                for prompt_row in rows:
                    ids = rollout.tokens[prompt_row, 2:]
                    length = int(rollout.completion_mask[prompt_row].sum())
                    logits = before(ids[None]).logits[0] / 0.7
                    picked = logits.log_softmax(-1)[range(length), ids[1 : length + 1]]
                    new.append(picked.sum().exp().item())
                weights = torch.tensor(new).double()[:, None]
                part = copy.copy(rollout)
                for name in ("tokens", "attention_mask", "completion_mask"):
                    setattr(part, name, getattr(rollout, name)[:21])
                before.zero_grad()
                weights = weights * part.completion_mask
                vopd.distill(before, teacher, part, weights, 1.0, args)
                fresh = (gradient_of(before) - wanted).norm() / wanted.norm()
                assert fresh < 1e-6
        error = (second - exact).norm() / exact.norm()
        assert error > 0.05 if biased else error < 1e-6


def test_chunk_micro_batch_or_padding_changes_the_gradient(vopd):
    """Each chunk of logits and each micro-batch is back-propagated on its own. If one
    of them had its own mean, or lost the tokens of another, the step would depend on
    the memory of the machine (https://github.com/verl-project/verl/issues/906). The
    token whose gradient is the EOS's is in it too."""
    rollout = random_rollout(vopd, 40, [3, 6, 1, 4, 2, 5], [4, 1, 6, 2, 5, 3])
    student, teacher = small_qwen3(40), small_qwen3(40, seed=1, hidden_size=24)
    student, teacher = student.double(), teacher.double()
    for estimator in vopd.ESTIMATORS:
        found = []
        for most, size in itertools.product((1, 100, 2**26), (1, 2, 8)):
            args = cpu_args(vopd, estimator=estimator, top_k=7, micro_batch_size=size)
            batch = student, teacher, rollout, rollout.completion_mask, 21, args, most
            student.zero_grad()
            loss = vopd.distill(*batch)[0][0].item()
            found.append((loss, gradient_of(student)))
        (loss, gradient), *others = found
        for other_loss, other in others:
            assert math.isclose(loss, other_loss, rel_tol=1e-6, abs_tol=1e-7)
            assert (other - gradient).norm() / gradient.norm() < 1e-6


def test_sampled_log_probs_are_not_compared_with_scored_ones(vopd):
    """What was sampled and what is scored drift apart without a word, in bf16 or by
    another engine: the mean and the largest |delta log p| of the tokens that count are
    logged. Here they are known: every log-prob is right but two."""
    rollout = random_rollout(vopd, 30, [2, 4], [3, 5], [False, True])
    student, teacher = small_qwen3(30), small_qwen3(30, seed=1)
    with torch.no_grad():
        for i, row in enumerate(plain_logprobs(student, rollout)):
            rollout.logprobs[i, : len(row)] = row
    rollout.logprobs[0, 1] += 0.25
    rollout.logprobs[1, 4] -= 0.5
    for truncated_too, mean, most in (False, 0.75 / 8, 0.5), (True, 0.25 / 3, 0.25):
        args = cpu_args(vopd, mask_truncated=truncated_too)
        stats = vopd.update(student, teacher, Recorder(student), rollout, args)
        assert math.isclose(stats["delta_logp_mean"], mean, abs_tol=1e-5)
        assert math.isclose(stats["delta_logp_max"], most, abs_tol=1e-5)


def test_logits_exist_whole_or_are_kept(vopd, monkeypatch):
    """Logits of 2,048 tokens and 151,936 ids are 1.2 GB, those of the teacher as much
    again. However many tokens there are, what one chunk keeps for its backward pass is
    the most there is, and with a baseline no more than without: the logits."""
    rollout = random_rollout(vopd, 500, [2] * 8, [30] * 8)
    models, tokens = [small_qwen3(500, seed=seed) for seed in (0, 1)], 8 * 30
    kept, largest, linear = {}, {}, torch.nn.functional.linear
    for estimator in vopd.ESTIMATORS:
        sizes, rows = {}, []

        def pack(x):
            if x.shape[-1] == 500:
                sizes[x.untyped_storage().data_ptr()] = x.numel()
            return x

        args = cpu_args(vopd, estimator=estimator, top_k=20)
        s, t = torch.randn(2, 1, tokens, 500)
        s.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            batch = torch.randint(500, (1, tokens)), torch.ones(1, tokens)
            vopd.distill_loss(s, t, *batch, estimator, 20, tokens)
        kept[estimator] = sum(sizes.values()) / (tokens * 500)

        def counted(x, weight, *rest):
            rows.extend([len(x)] if len(weight) == 500 else [])
            return linear(x, weight, *rest)

        for dtype, size in ("float32", 4), ("bfloat16", 2):
            args.dtype, most = dtype, size * 500 * 31  # bytes
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "linear", counted)
                vopd.distill(*models, rollout, rollout.completion_mask, 1, args, most)
            largest[estimator, dtype] = max(rows)
            rows.clear()
    assert kept["sampled"] == kept["vopd"] == kept["vopd-topk"] == kept["clip"] == 1
    assert kept["full"] > 1 == kept["topk"]
    assert set(largest.values()) == {32}


def test_logits_are_summed_in_bf16(vopd, monkeypatch):
    """A logsumexp in bf16 is wrong in its second digit, and so are r and the KL: what
    the matrix product gives in bf16 is widened before anything is summed. The sums are
    those of float64 from the same bf16 logits."""
    models = [small_qwen3(500, seed=seed) for seed in (0, 1)]
    rollout = random_rollout(vopd, 500, [2] * 4, [9, 7, 9, 3])
    args, made = cpu_args(vopd, dtype="bfloat16", estimator="vopd"), []
    linear, given = torch.nn.functional.linear, []
    real = vopd.distill_loss

    def keep(x, weight, *rest):
        y = linear(x, weight, *rest)
        made.extend([y.detach()] if len(weight) == 500 else [])
        return y

    def note(student, teacher, tokens, mask, *rest):
        given.append((tokens, mask))
        return real(student, teacher, tokens, mask, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", keep)
    monkeypatch.setattr(vopd, "distill_loss", note)
    found, _ = vopd.distill(*models, rollout, rollout.completion_mask, 1, args)
    assert len(made) == 2 and {x.dtype for x in made} == {torch.bfloat16}
    log_p, log_q = (x.double().log_softmax(-1) for x in made)
    ((y, mask),) = given
    at = lambda logs: logs.gather(-1, y[:, None])[:, 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = -((at(log_q) - at(log_p) + kl) * at(log_p) * mask).sum()
    gaps = (at(log_p) * mask).abs().sum()  # nothing was sampled: log-probs of 0
    wanted = torch.stack([loss, (kl * mask).sum(), mask.sum(), gaps])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_truncated_completions_count(vopd):
    """With --mask-truncated a completion without an EOS is in neither the numerator nor
    the denominator: the gradient is that of the others alone; with nothing left it is
    0. https://github.com/huggingface/trl/issues/6369"""
    lengths, cut = [3, 5, 2, 5], [False, True, False, True]
    rollout = random_rollout(vopd, 30, [2, 3, 4, 1], lengths, cut)
    teacher = small_qwen3(30, seed=1)
    kept = copy.copy(rollout)
    for name in ("tokens", "attention_mask", "completion_mask", "truncated"):
        setattr(kept, name, getattr(rollout, name)[[0, 2]])
    found = []
    for batch, flag in (rollout, True), (kept, False), (rollout, False):
        model = small_qwen3(30)
        optimizer = Recorder(model)
        args = cpu_args(vopd, mask_truncated=flag)
        stats = vopd.update(model, teacher, optimizer, batch, args)
        found.append((optimizer.seen[0], stats["loss"], stats["reverse_kl"]))
    (a, *numbers), (b, *others), (c, *_) = found
    assert (a - b).norm() < 1e-6 * b.norm() < (c - b).norm()
    assert numbers == pytest.approx(others, rel=1e-5)
    rollout.truncated[:] = True
    stats = vopd.update(
        model, teacher, optimizer, rollout, cpu_args(vopd, mask_truncated=True)
    )
    assert stats["loss"] == stats["reverse_kl"] == stats["grad_norm"] == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and a teacher with one tokenizer, and different padding rows."""
    tokenizer, home = char_tokenizer(), tmp_path_factory.mktemp("pair")
    v, wide = len(tokenizer), dict(hidden_size=48)
    student = save_model(home / "student", small_qwen3(v + 3), tokenizer)
    teacher = small_qwen3(v + 30, seed=1, tie_word_embeddings=False, **wide)
    return student, save_model(home / "teacher", teacher, tokenizer), v


@pytest.fixture
def cli(vopd, folders, tmp_path, monkeypatch, capsys):
    """vopd.py's command line in this process, in an empty folder with a task.py."""
    (tmp_path / "task.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    small = dict(task="task.py", model=folders[0], teacher=folders[1], device="cpu")
    small |= dict(steps=2, run_dir="run", prompts_per_step=4, max_new_tokens=4)
    small |= dict(eval_prompts=2, eval_samples=2, warmup_steps=0, learning_rate=1e-3)

    def run(*flags: str, **changes) -> Finished:
        given = (small | changes) if "--resume" not in flags else changes
        for name, value in given.items():
            if value is not None:
                flags += f"--{name.replace('_', '-')}", value
        monkeypatch.setattr(sys, "argv", ["vopd.py", *map(str, flags)])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            code = vopd.train(vopd.parse_args())
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Finished(code, *capsys.readouterr())

    return run


def logged(run_dir: Path) -> list[dict]:
    """metrics.jsonl without seconds and bytes."""
    measured = ("seconds_", "tokens_per_second", "peak_memory_gb")
    lines = metrics_of(run_dir)
    return [{k: x[k] for k in x if not k.startswith(measured)} for x in lines]


def test_padding_of_the_vocabulary_is_sampled_or_scored(vopd, cli, folders, tmp_path):
    """Models of one family have different numbers of logits (151,936 and 152,064 for
    Qwen) for one tokenizer. Rows beyond the last token are nobody's: if they take part,
    the softmax is another, ids without a token are sampled, and two models that fit do
    not go together. Cutting the rows is a softmax with -inf there."""
    student, teacher, v = folders
    args = cpu_args(vopd, model=student, teacher=teacher)
    ids = torch.randint(2, v, (2, 6))
    loaded = [vopd.load_model(name, args) for name in (student, teacher)]
    with torch.no_grad():
        whole = [model(ids).logits for model, _ in loaded]
    vopd.same_vocabulary(*loaded[0], *loaded[1])
    for (model, _), logits in zip(loaded, whole):
        with torch.no_grad():
            got = model(ids).logits.log_softmax(-1)
        logits[..., v:] = -torch.inf
        assert got.shape[-1] == v
        assert torch.allclose(got, logits.log_softmax(-1)[..., :v], atol=1e-5)
    assert cli().code == 0
    saved = load_file(tmp_path / "run/checkpoint/model.safetensors")
    assert saved["model.embed_tokens.weight"].shape[0] == v
    assert cli("--resume", "run", "--steps", 3).code == 0
    odd = save_model(
        tmp_path / "odd", small_qwen3(v + 3, pad_token_id=v + 1), loaded[0][1]
    )
    assert cli(model=odd, run_dir="run-odd").code == 0  # its padding's row is cut, too
    assert cli("--resume", "run-odd", "--steps", 3).code == 0


def test_top_k_of_all_tokens_is_taken_for_another_estimator(cli):
    """--top-k 100 on the built-in vocabulary of 99 is vopd or full under another name:
    a comparison shows no difference. A line says so."""
    for estimator in "topk", "vopd-topk":
        for k, said in (200, True), (5, False):
            result = cli(estimator=estimator, top_k=k, run_dir=f"{estimator}-{k}")
            assert ("is no choice among" in result.stdout) == said, result


def test_student_never_ends_as_its_teacher_does(vopd, cli, folders, tmp_path):
    """A base model ends with another token of the same vocabulary than the teacher: to
    the teacher the student's EOS is all but impossible, so the student is taught never
    to stop, and the teacher's own answers are cut at a token that it never emits.
    https://github.com/modelscope/ms-swift/issues/9526"""
    ids = char_tokenizer().get_vocab()
    teacher = tmp_path / "ends"
    shutil.copytree(folders[1], teacher)
    path = teacher / "tokenizer_config.json"
    more = {"chat_template": "{{ messages[0].content }}"}
    text = path.read_text().replace('"<eos>"', '"~"')
    path.write_text(json.dumps(json.loads(text) | more))
    (teacher / "generation_config.json").write_text(f'{{"eos_token_id": {ids["~"]}}}')
    assert cli(teacher=teacher, max_new_tokens=24).code == 0
    _, saved = vopd.load_model("run/checkpoint", cpu_args(vopd))
    assert saved.eos_token == "~" and saved.get_vocab() == ids
    assert saved.chat_template == more["chat_template"]  # the student has none
    for name in "config.json", "generation_config.json":
        config = json.loads((tmp_path / "run/checkpoint" / name).read_text())
        assert config["eos_token_id"] == ids["~"]
    texts = [json.loads(x) for x in open("run/samples.jsonl")][1:]
    answers = [y for line in texts for y in line["completions"]]
    assert answers and not any("~" in y for y in answers)  # not text, as any EOS


def test_teacher_with_other_ids_is_believed(vopd, cli, folders, tmp_path):
    """With another tokenizer q(y) is the probability of another token; everything runs
    and the student learns noise. One line before the first step, and nothing written.
    https://github.com/huggingface/trl/issues/3028"""
    before = sorted(tmp_path.rglob("*"))
    moved = char_tokenizer(eos_token="<eos>", pad_token="<pad>")
    fewer = char_tokenizer(pad_token="<none>", eos_token="<eos>")
    short = char_tokenizer()
    for i, (tokenizer, rows, word) in enumerate(
        [(moved, 101, "<eos>"), (fewer, 101, "<none>"), (short, 60, "60 logits")]
    ):
        other = save_model(
            tmp_path.parent / f"{tmp_path.name}-{i}", small_qwen3(rows), tokenizer
        )
        result = cli(teacher=other, run_dir="runs/vopd/new")
        assert result.code == 2 and len(result.errors) == 1
        assert word in result.errors[0] and "teacher" in result.errors[0]
        assert sorted(tmp_path.rglob("*")) == before


def test_teacher_scores_beyond_its_context(vopd, cli, folders, tmp_path):
    """A student with a longer context writes what its teacher cannot read, and the
    other way round."""
    tokenizer = char_tokenizer()
    small = small_qwen3(len(tokenizer), max_position_embeddings=12)
    short = save_model(tmp_path / "small", small, tokenizer)
    for which in dict(teacher=short), dict(model=short):
        result = cli(**which, max_new_tokens=8)
        assert result.code == 2 and "there is room for 4" in result.errors[0], result
        assert not (tmp_path / "run").exists()


def test_resumed_student_is_made_anew(vopd, cli, folders, tmp_path, monkeypatch):
    """--resume warms up the built-in student once more, only to throw it away."""
    assert cli().code == 0
    monkeypatch.setattr(vopd, "tiny_model", lambda *_: 1 / 0)
    args = cpu_args(vopd, model="tiny", teacher=folders[1], run_dir="run", resume="run")
    model, _, _ = vopd.load_both([], args)
    saved = load_file(tmp_path / "run/checkpoint/model.safetensors")
    assert all(torch.equal(model.get_parameter(name), x) for name, x in saved.items())


def test_wrong_flag_is_a_traceback_or_runs(cli, folders, tmp_path):
    """One line, exit code 2, nothing written."""
    before = sorted(tmp_path.rglob("*"))
    for word, changes in (
        ("--teacher", dict(teacher=None)),
        ("no/such/teacher", dict(teacher="./no/such/teacher")),
        ("--clip-lambda", dict(clip_lambda=1.0)),
        ("--clip-lambda", dict(clip_lambda=0)),
        ("--top-k", dict(top_k=0)),
        ("--teacher-temperature", dict(teacher_temperature=0)),
        ("--group-size", dict(group_size=0)),
        ("estimator", dict(estimator="best")),
    ):
        result = cli(run_dir="runs/vopd/new", **changes)
        assert result.code == 2 and len(result.errors) == 1, result
        assert word in result.errors[0]
        assert sorted(tmp_path.rglob("*")) == before


def test_prompts_without_answers_are_refused_or_rewarded(vopd, cli, tmp_path):
    """Distillation needs prompts only: without answers there is no reward, and none is
    made up (None is no answer "None"); with answers it is reported, and it changes
    nothing of the training. A blank answer is none; a line says so if only some are.
    One that is a list is never right. A task may leave its answers blank."""
    for name, line in (("bare", {}), ("posed", {"answer": "7"})):
        lines = [json.dumps({"prompt": f"{i}+1="} | line) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        result = cli(data=f"{name}.jsonl", task=None, run_dir=name)
        assert result.code == 0, result
    bare, posed = (logged(tmp_path / name) for name in ("bare", "posed"))
    assert not any("reward" in key or "pass" in key for line in bare for key in line)
    assert "pass" not in result.stderr
    lines = [{"prompt": f"{i}+1=", "answer": "7 "[i == 21 :]} for i in range(40)]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = cli(data="some.jsonl", task=None, run_dir="some")
    assert logged(tmp_path / "some") == logged(tmp_path / "bare")
    assert "some problems have no answer" in "".join(result.stdout + result.stderr)
    assert all("reward_mean" in line for line in posed[1:])
    assert "eval/pass@1" in posed[0] and "eval/teacher_pass@1" in posed[0]
    for a, b in zip(bare, posed):
        assert a == {key: b[key] for key in a}
    weights = [tmp_path / x / "checkpoint/model.safetensors" for x in ("bare", "posed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    (tmp_path / "list.jsonl").write_text('{"prompt": "1+1=", "answer": ["2"]}\n' * 40)
    result = cli(data="list.jsonl", task=None, run_dir="list")
    assert result.code == 2 and "neither text nor a number" in result.errors[0]
    assert vopd.to_problem({"prompt": "a", "answer": ""}).answer == ""


def test_table_or_evaluation_shows_another_number(vopd, cli, folders, tmp_path):
    """What is printed is what metrics.jsonl has; the teacher's KL to itself is 0, at
    its own temperature, and the student's is the mean over fresh tokens of the exact
    KL, whichever estimator it is trained with."""
    result = cli(eval_samples=8, steps=3)
    lines = metrics_of(tmp_path / "run")
    table = result.stdout[result.stdout.index("student before") :]
    rows = [x.split()[0] for x in table.split("\n")[:5]]
    shown = ["reverse_kl", "pass@1", "pass@8", "reward"]
    assert rows == ["student", *(f"eval/{x}" for x in shown)]
    for name in "eval/reverse_kl", "eval/pass@1", "eval/pass@8":
        (row,) = [x for x in result.stdout.split("\n") if x.startswith(name)]
        teacher = lines[0][name.replace("/", "/teacher_")]
        wanted = [lines[0][name], lines[-1][name], teacher]
        assert [float(x) for x in row.split()[1:]] == [round(x, 3) for x in wanted]
    assert lines[0]["eval/teacher_reverse_kl"] == 0
    assert cli(run_dir="sharp", steps=1, teacher_temperature=0.5).code == 0
    assert metrics_of(tmp_path / "sharp")[0]["eval/teacher_reverse_kl"] == 0
    args = cpu_args(vopd, max_new_tokens=4, eval_samples=8, temperature=0.8)
    args.estimator, args.top_k = "topk", 2
    (student, tokenizer), (teacher, other) = (
        vopd.load_model(x, args) for x in folders[:2]
    )
    vopd.same_vocabulary(student, tokenizer, teacher, other)
    prompts, problems = [[5, 6], [7, 8, 9]], [None, None]
    batch = teacher, tokenizer, prompts, problems, None, args
    got = vopd.evaluate(student, *batch)
    rollout = vopd.generate(
        student, tokenizer, prompts, vopd.uniforms(args, 0, 2, 8), args
    )
    total = count = 0.0
    for i, row in enumerate(rollout.tokens):
        ids = row[rollout.attention_mask[i].bool()][None]
        length = int(rollout.completion_mask[i].sum())
        with torch.no_grad():
            log_p = (student(ids).logits[0] / 0.8).log_softmax(-1)[-1 - length : -1]
            log_q = teacher(ids).logits[0].log_softmax(-1)[-1 - length : -1]
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += length
    assert got == {"eval/reverse_kl": pytest.approx(total / count, rel=1e-4)}


@pytest.mark.parametrize("estimator", ["vopd", "topk"])
def test_resume_is_another_run(cli, tmp_path, estimator):
    """5 steps + 5 steps are 10, bit for bit: logs, samples, optimiser and weights; the
    teacher is the same and the evaluation of step 0 is not made again.
    https://github.com/vwxyzjn/cleanrl/issues/399"""
    flags = dict(estimator=estimator, group_size=2, eval_every=4, top_k=5)
    assert cli(run_dir="whole", steps=10, **flags).code == 0
    assert cli(run_dir="half", steps=5, **flags).code == 0
    assert cli("--resume", "half", "--steps", 10).code == 0
    half, whole = tmp_path / "half", tmp_path / "whole"
    lines = logged(whole)
    between = [x for x in logged(half) if x["step"] != 5 or "eval/reverse_kl" not in x]
    assert [x for x in lines if x["step"] != 5] == [
        x for x in between if x["step"] != 5
    ]
    for name in "samples.jsonl", "checkpoint/model.safetensors":
        assert (half / name).read_bytes() == (whole / name).read_bytes()
    a, b = (torch.load(x / "checkpoint/state.pt") for x in (half, whole))
    (group,) = b["optimizer"]["param_groups"]
    args = json.loads((whole / "args.json").read_text())["args"]
    decay = 1 + 10 / args["decay_steps"]
    assert group["lr"] == pytest.approx(args["learning_rate"] / decay, rel=1e-12)
    moments = [x["optimizer"]["state"] for x in (a, b)]
    for i, state in moments[0].items():
        assert all(torch.equal(state[x], moments[1][i][x]) for x in state)


def test_reverse_kl_does_not_fall(cli, tmp_path):
    """A sign, a teacher in the student's place: everything is finite and nothing is
    learnt. The exact KL on held-out prompts falls by a quarter in 60 steps."""
    flags = dict(steps=60, prompts_per_step=8, group_size=8, learning_rate=3e-3)
    flags |= dict(task="countdown-2", eval_prompts=16, eval_every=100, max_new_tokens=3)
    assert cli(**flags).code == 0
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["eval/reverse_kl"] < 0.75 * lines[0]["eval/reverse_kl"]


def test_offline_default_does_not_start(vopd, cli, tmp_path, monkeypatch):
    """Without --model and --teacher both are made here: two models, the teacher larger
    and trained for longer, the student the usual base model; the second run finds them.
    (Here after two steps of training each.)"""
    made, make = [], vopd.tiny_model

    def short(problems, seed, steps, width):
        made.append((steps, width))
        return make(problems, seed, steps=2, width=width)

    monkeypatch.setattr(vopd, "tiny_model", short)
    flags = dict(model=None, teacher=None, task="countdown-2", max_new_tokens=8)
    for name in "one", "two":
        assert cli(run_dir=name, **flags).code == 0
    (teacher, student), again = made[:2], made[2:]
    assert again == made[:2] and student == (vopd.Args.tiny_steps, vopd.STUDENT_WIDTH)
    assert teacher[0] > student[0] and teacher[1] > student[1]
    assert len(list((tmp_path / "runs/cache").iterdir())) == 2
    assert logged(tmp_path / "one") == logged(tmp_path / "two")


RANKS = """
import os, torch
import torch.distributed as dist
from conftest import Recorder, cpu_args, load_script, random_rollout, small_qwen3
vopd = load_script("vopd")
if vopd.WORLD_SIZE > 1:
    dist.init_process_group("gloo")
lengths, cut = [4, 1, 6, 2, 5, 3, 6, 6], [False] * 6 + [True] * 2
rollout = random_rollout(vopd, 20, [3, 6, 1, 4, 2, 5, 2, 3], lengths, cut)
mine = torch.arange(8).view(-1, 4)[vopd.RANK :: vopd.WORLD_SIZE].flatten()
for name in ("tokens", "attention_mask", "completion_mask", "truncated"):
    setattr(rollout, name, getattr(rollout, name)[mine])
model = small_qwen3(20).double()
optimizer = Recorder(model)
args = cpu_args(vopd, mask_truncated=True, micro_batch_size=3)
stats = vopd.update(model, small_qwen3(20, seed=1).double(), optimizer, rollout, args)
file = f"{vopd.RANK}-of-{vopd.WORLD_SIZE}.pt"
names = "loss", "reverse_kl", "delta_logp_mean", "delta_logp_max"
torch.save((optimizer.seen[0], *(stats[name] for name in names)), file)
if vopd.WORLD_SIZE > 1:
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # done: gloo's threads may abort an exit by themselves
"""


def test_ranks_divide_by_their_own_tokens(ranks, tmp_path):
    """Each rank's mean, averaged, weighs a token by the length of what its rank drew:
    two ranks with different numbers of tokens have the gradient, loss, KL and gaps of
    one process. https://github.com/verl-project/verl/issues/5625"""
    (tmp_path / "worker.py").write_text(RANKS)
    for world in 1, 2:
        codes = ranks.run(world, "worker.py", cwd=tmp_path)
        assert codes == [0] * world, (tmp_path / "out").read_text()
    names = "0-of-1", "0-of-2", "1-of-2"
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in names)
    for gradient, *numbers in two:
        assert (gradient - one[0]).norm() < 1e-6 * one[0].norm()
        assert numbers == pytest.approx(one[1:], rel=1e-5)


def test_run_cannot_be_saved(vopd, cli, folders, tmp_path):
    """transformers refuses to save a generation_config that was changed and has a top_p
    without do_sample, as old chat models do: 50 steps later, nothing is kept. A chat
    teacher with two stop ids ends its student with both."""
    for name, more in (
        ("student", {"top_p": 0.9}),
        ("teacher", {"eos_token_id": [1, 50]}),
    ):
        shutil.copytree(folders[name == "teacher"], tmp_path / name)
        path = tmp_path / name / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    folder = dict(model=tmp_path / "student", teacher=tmp_path / "teacher")
    result = cli(**folder, max_new_tokens=24)
    assert result.code == 0, result
    saved, tokenizer = vopd.load_model("run/checkpoint", cpu_args(vopd))
    assert vopd.stop_ids(saved, tokenizer) == [1, 50]


def test_teacher_is_trained_on_held_out_problems(vopd, folders, tmp_path, monkeypatch):
    """The built-in teacher sees more problems than the student, drawn with other seeds.
    A plug-in that splits by seed would put the run's held-out ones among them, others
    would be read three times more: of these it has the student's own. Its steps are
    --teacher-steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(
        "def problems(split, seed):\n"
        "    for i in range(70):\n"
        "        if ((i + seed) % 7 == 0) == (split == 'eval'):\n"
        "            yield dict(prompt=f'{i}:', answer=1, solution='1')\n\n\n"
        "def reward(problem, completion):\n    return 0.0\n"
    )
    seen = []
    there = lambda *x, **how: seen.append(x[0]) or steps.append(how) or folders[1]
    steps = []
    monkeypatch.setattr(vopd, "tiny_model", there)
    for task in "task.py", "countdown":
        args = cpu_args(vopd, task=task, eval_prompts=10, prompts_per_step=2, seed=3)
        args.teacher_steps = 7
        problems, held_out, _ = vopd.load_task(args)
        vopd.load_teacher(problems, args)
        asked = {problem.prompt for problem in held_out}
        assert len(asked) == 10 and not asked & {problem.prompt for problem in seen[-1]}
        assert {problem.prompt for problem in problems} <= {x.prompt for x in seen[-1]}
    assert len(seen[0]) == 60 and len(seen[1]) == 4 * 20_000
    assert len({x.prompt for x in seen[1]}) > 2 * len({x.prompt for x in problems})
    assert [how["steps"] for how in steps] == [7, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_of_a_gpu_is_in_bf16_whatever_dtype_says(vopd, folders, dtype):
    """--dtype float32 is there for exact log-probs, and the teacher's are half of the
    loss."""
    args = cpu_args(vopd, device="cuda", dtype=dtype, teacher=folders[1])
    teacher, _ = vopd.load_teacher([], args)
    assert {x.dtype for x in teacher.parameters()} == {getattr(torch, dtype)}
    assert not any(x.requires_grad for x in teacher.parameters())


def test_metrics_are_sums_where_they_say_means(vopd, monkeypatch):
    """vopd.py has a describe of its own; what it shows is worked out by hand here."""
    rollout = random_rollout(vopd, 16, [4, 4, 2, 3], [2, 5, 3, 4])
    rollout.rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    rollout.truncated = torch.tensor([True, False, False, False])
    shown = vopd.describe(rollout, [0.0, 1.0, 3.0, 7.0], cpu_args(vopd))
    assert shown["completion_length"] == 3.5 and shown["reward_mean"] == 0.5
    assert shown["truncated_share"] == 0.25
    seconds = [shown[f"seconds_{name}"] for name in ("rollout", "score", "update")]
    assert seconds == [1.0, 2.0, 4.0] and shown["tokens_per_second"] == 2.0
    monkeypatch.setattr(vopd, "WORLD_SIZE", 3)
    monkeypatch.setattr(vopd, "all_reduce", lambda x: 3 * x)  # of three equal ranks
    three = vopd.describe(rollout, [0.0, 1.0, 3.0, 7.0], cpu_args(vopd))
    assert three["tokens_per_second"] == 6.0 and three["reward_mean"] == 0.5


def test_teacher_in_bf16_is_lost_in_a_long_text(vopd, folders):
    """Rounded to bf16, RoPE's frequencies turn a token at 100 by up to a third of a
    radian too far: a teacher that nobody else has, though each weight is right.
    https://github.com/NVIDIA-NeMo/Automodel/pull/2549"""
    args = cpu_args(vopd, dtype="bfloat16", teacher=folders[1])
    teacher, _ = vopd.load_teacher([], args)
    exact = transformers.AutoModelForCausalLM.from_pretrained(folders[1])
    buffers, wanted = (dict(x.named_buffers()) for x in (teacher, exact))
    assert wanted and {*buffers} == {*wanted}
    for name, buffer in wanted.items():
        assert buffers[name].dtype == buffer.dtype and buffers[name].equal(buffer)
    positions = torch.arange(90, 110)[None]
    angles, wanted = (
        torch.atan2(*model.base_model.rotary_emb(torch.ones(1), positions)[::-1])
        for model in (teacher, exact)
    )
    torch.testing.assert_close(angles, wanted)
