"""Which tokens count, with which weight, and whether batching changes it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    Recorder,
    char_tokenizer,
    cpu_args,
    plain_logprobs,
    random_rollout,
    save_model,
    small_qwen3,
)

NORMALIZATIONS = "token", "sequence", "constant"
PROMPTS = [3, 3, 5, 5, 2, 2, 4, 4]
LENGTHS = [4, 1, 6, 2, 5, 3, 6, 1]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.7, -0.7, -1.2, 1.2])


def gradient(grpo, rollout, advantages, double=True, reference=None, **flags):
    """What `update` hands to the optimiser, (parameters,), and its statistics."""
    model = small_qwen3(16)
    model = model.double() if double else model
    optimizer, args = Recorder(model), cpu_args(grpo, **flags)
    stats = grpo.update(model, reference, optimizer, rollout, advantages, args)
    return optimizer.seen[0], stats


def plain_gradient(rollout, advantages, weights) -> torch.Tensor:
    """-sum_i A_i w_i sum_t grad log pi in float64, row by row; weights: w_i / Z."""
    model = small_qwen3(16).double()
    rows = zip(plain_logprobs(model, rollout), advantages, weights)
    (-sum(a * w * logprobs.sum() for logprobs, a, w in rows)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of two gradients."""
    return ((a - b).norm() / b.norm()).item()


def formula(normalization: str, lengths: list[int], longest: int) -> list[float]:
    """w_i / Z of each completion."""
    return {
        "token": [1 / sum(lengths)] * len(lengths),
        "sequence": [1 / length / len(lengths) for length in lengths],
        "constant": [1 / longest / len(lengths)] * len(lengths),
    }[normalization]


def test_stop_token_masked_out(grpo):
    """Without the stop token in the mask nothing teaches the model to stop: completions
    grow until they are cut off. The mask ends with the first EOS, included.
    https://github.com/karpathy/nanochat/issues/810"""
    rows = [[5, 6, 1, 1], [1, 5, 1, 0], [5, 6, 7, 8], [5, 0, 5, 1]]
    mask, truncated = grpo.completion_mask(torch.tensor(rows), 1)
    wanted = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert mask.tolist() == wanted and mask.dtype == torch.float32
    assert truncated.tolist() == [False, False, True, False]

    rows = torch.randint(0, 4, (500, 7), generator=torch.Generator().manual_seed(0))
    mask, truncated = grpo.completion_mask(rows, 1)
    for row, got, cut in zip(rows.tolist(), mask.tolist(), truncated.tolist()):
        length = row.index(1) + 1 if 1 in row else 7
        assert got == [1.0] * length + [0.0] * (7 - length)
        assert cut == (1 not in row)


def test_mask_guessed_from_the_padding_value(grpo):
    """Where pad == eos, a mask of "all that is not padding" drops the stop token, and a
    prompt that holds this token loses it from its context.
    https://github.com/huggingface/trl/issues/4970"""
    model = small_qwen3(12)
    texts = lambda ids, **_: [str(row) for row in ids.tolist()]
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=1, batch_decode=texts)
    prompts, samples, length = [[5, 1, 6], [7], [1, 8, 9, 1, 3]], 30, 10
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(90, length, dtype=torch.float64, generator=generator)
    args = cpu_args(grpo, max_new_tokens=length)
    rollout = grpo.generate(model, tokenizer, prompts, noise, args)
    stopped = 0
    for i, row in enumerate(rollout.tokens.tolist()):
        prompt, completion = prompts[i // samples], row[5:]
        size = completion.index(1) + 1 if 1 in completion else len(completion)
        stopped += 1 in completion
        assert row[5 - len(prompt) : 5] == prompt
        assert rollout.completion_mask[i].sum() == size
        assert rollout.completion_mask[i, :size].all()
        assert set(completion[size:]) <= {1}
        seen = [0] * (5 - len(prompt)) + [1] * (len(prompt) + size)
        assert rollout.attention_mask[i].tolist() == seen + [0] * (len(row) - len(seen))
        assert rollout.truncated[i] == (1 not in completion)
        assert not rollout.logprobs[i, size:].any()
    assert 20 < stopped < 3 * samples  # both kinds are there


def test_no_gradient_at_the_stop_token(grpo):
    """The mask may be right and the loss still miss the last position. A completion
    that is nothing but the stop token has the gradient of its log-prob, and a change of
    what stands behind the stop token changes nothing.
    https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/4660"""
    rollout = random_rollout(grpo, 16, [3, 2], [1, 1])
    got, _ = gradient(grpo, rollout, torch.tensor([1.0, -0.5]))
    wanted = plain_gradient(rollout, [1.0, -0.5], [1 / 2, 1 / 2])
    assert wanted.norm() > 0.1 and difference(got, wanted) < 1e-6

    rollout = random_rollout(grpo, 16, [3, 2], [4, 2])
    model = small_qwen3(16)
    tokens, seen = rollout.tokens, rollout.attention_mask
    logprobs, _ = grpo.token_logprobs(model, tokens, seen, 4, 1.0)
    logprobs.retain_grad()
    one = torch.ones(2)
    mask = rollout.completion_mask
    grpo.policy_loss(logprobs, logprobs.detach(), one, mask, 0.2, 0.28, 6)[0].backward()
    assert torch.allclose(logprobs.grad, -mask / 6)  # the stop tokens like the others
    before, _ = gradient(grpo, rollout, one)
    tokens[1, -2:] = torch.tensor([9, 1])  # behind the stop token of the second row
    assert torch.equal(before, gradient(grpo, rollout, one)[0])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_truncated_completions_still_counted(grpo, normalization):
    """Asked to leave truncated completions out, a loss that drops them from the sum but
    counts them in Z shrinks with the share of them; one without the switch trains on
    them. Dropping them equals a batch without these rows.
    https://github.com/huggingface/trl/issues/6369"""
    cut = [False, False, True, False, False, False, True, False]
    kept = [i for i in range(8) if not cut[i]]
    mask = random_rollout(grpo, 16, PROMPTS, LENGTHS).completion_mask
    weights, z = grpo.loss_weights(
        mask * ~torch.tensor(cut)[:, None], normalization, max_length=9
    )
    shares = formula(normalization, [LENGTHS[i] for i in kept], 9)
    wanted = torch.zeros(8)
    wanted[kept] = torch.tensor(shares)
    assert torch.allclose(weights / z, wanted[:, None] * mask)

    rollout = random_rollout(grpo, 16, PROMPTS, LENGTHS, cut)
    flags = dict(normalization=normalization, max_new_tokens=9)
    got, stats = gradient(grpo, rollout, ADVANTAGES, mask_truncated=True, **flags)
    wanted = plain_gradient(rollout, ADVANTAGES, wanted)
    assert difference(got, wanted) < 1e-6
    assert math.isclose(stats["grad_norm"], wanted.norm(), rel_tol=1e-5)
    got, _ = gradient(grpo, rollout, ADVANTAGES, mask_truncated=False, **flags)
    shares = formula(normalization, LENGTHS, 9)
    assert difference(got, plain_gradient(rollout, ADVANTAGES, shares)) < 1e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_everything_masked_is_0_divided_by_0(grpo, normalization):
    """A batch in which every completion is masked, or every group dead, has the loss 0
    and leaves the weights alone; 0 / 0 would turn them into NaN for good.
    https://github.com/huggingface/trl/issues/5885"""
    weights, z = grpo.loss_weights(torch.zeros(3, 4), normalization, 9)
    logprobs = torch.randn(3, 4, requires_grad=True)
    old, advantages = logprobs.detach() - 0.1, torch.ones(3)
    loss, stats = grpo.policy_loss(logprobs, old, advantages, weights, 0.2, 0.28, z)
    loss = loss + grpo.kl_loss(logprobs, old, old, weights, z)
    loss.backward()
    assert loss == 0 and stats["tokens"] == stats["clipped"] == 0
    assert torch.equal(logprobs.grad, torch.zeros(3, 4))

    rollout = random_rollout(grpo, 16, PROMPTS, LENGTHS, [True] * 8)
    reference = small_qwen3(16, seed=1)
    for advantages, flags in (
        (ADVANTAGES, dict(mask_truncated=True)),
        (ADVANTAGES, dict(mask_truncated=True, kl_coef=0.1)),
        (torch.zeros(8), {}),
        (torch.zeros(8), dict(updates_per_batch=3)),
    ):
        flags |= dict(normalization=normalization)
        model = small_qwen3(16)
        before = [p.clone() for p in model.parameters()]
        optimizer, args = Recorder(model, lr=1.0), cpu_args(grpo, **flags)
        stats = grpo.update(model, reference, optimizer, rollout, advantages, args)
        assert stats["loss"] == stats["grad_norm"] == stats["relative_update"] == 0
        assert all(math.isfinite(value) for value in stats.values())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_length_bias(grpo, normalization):
    """Each normalisation gives a completion its own weight; calling one by the name of
    another favours long wrong answers. Through `update`, Z of "constant" is the longest
    length allowed and not the longest one seen. https://arxiv.org/abs/2503.20783"""
    rollout, longest = random_rollout(grpo, 16, PROMPTS, LENGTHS), 11
    shares = torch.tensor(formula(normalization, LENGTHS, longest))
    logprobs = torch.zeros(8, 6, requires_grad=True)
    mask = rollout.completion_mask
    weights, z = grpo.loss_weights(mask, normalization, longest)
    zeros = torch.zeros(8, 6)
    loss, _ = grpo.policy_loss(logprobs, zeros, ADVANTAGES, weights, 0.2, 0.28, z)
    loss.backward()
    wanted = -(ADVANTAGES * shares)[:, None] * mask
    assert torch.allclose(logprobs.grad, wanted, atol=1e-7)
    flags = dict(normalization=normalization, max_new_tokens=longest)
    got, _ = gradient(grpo, rollout, ADVANTAGES, **flags)
    assert difference(got, plain_gradient(rollout, ADVANTAGES, shares)) < 1e-6


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_depends_on_the_micro_batch(grpo, normalization, kl_coef):
    """Micro-batches normalised one by one and then averaged give short completions in
    the company of other short ones a larger weight. The gradient of a step is the same
    for micro-batches of 1, 2, 3 and 8, and so is each of its statistics.
    https://github.com/huggingface/trl/issues/6006"""
    rollout = random_rollout(grpo, 16, PROMPTS, LENGTHS, [False] * 7 + [True])
    advantages = ADVANTAGES.clone()
    advantages[2:4] = 0  # a dead group
    reference = small_qwen3(16, seed=1).double() if kl_coef else None
    flags = dict(normalization=normalization, kl_coef=kl_coef)
    both = rollout, advantages
    wanted, stats = gradient(grpo, *both, True, reference, micro_batch_size=8, **flags)
    for size in 1, 2, 3:
        flags["micro_batch_size"] = size
        got, again = gradient(grpo, *both, True, reference, **flags)
        assert difference(got, wanted) < 1e-6
        assert again == pytest.approx(stats, rel=1e-4, abs=1e-6)
    assert wanted.norm() > 0.01


WORKER = """
import json, os, sys, torch
import torch.distributed as dist
from conftest import Recorder, cpu_args, load_script, small_qwen3
grpo, job = load_script("grpo"), json.loads(sys.argv[1])
if grpo.WORLD_SIZE > 1:
    dist.init_process_group("gloo")
whole = torch.load("batch.pt")
found = []
for advantages, flags in job["cases"]:
    mine = torch.arange(8).view(-1, 2)[grpo.RANK :: grpo.WORLD_SIZE].flatten()
    parts = {k: v[mine] for k, v in whole.items()}
    rollout = grpo.Rollout(**parts, texts=[""] * len(mine))
    model, reference = small_qwen3(16).double(), small_qwen3(16, seed=1).double()
    optimizer, args = Recorder(model), cpu_args(grpo, **flags)
    reference = reference if args.kl_coef else None
    advantages = torch.tensor(advantages)[mine]
    stats = grpo.update(model, reference, optimizer, rollout, advantages, args)
    found.append((optimizer.seen[0], stats))
torch.save(found, f"gradient-{grpo.RANK}-of-{grpo.WORLD_SIZE}.pt")
grpo.train(cpu_args(grpo, **job["train"], run_dir=f"run-{grpo.WORLD_SIZE}"))
if grpo.WORLD_SIZE > 1:  # a rank that leaves first would abort the other
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # done: gloo's threads may abort an exit by themselves
"""

TASK = """
def problems(split, seed):
    for i in range(12):
        yield {"prompt": "ab" * (i + 1) + split, "answer": i}

def reward(problem, completion):
    return len(completion) * 0.1 + (problem.answer if completion[:1] > "M" else 0)
"""


def test_gradient_depends_on_the_number_of_ranks(grpo, ranks, tmp_path):
    """Ranks that average their own means weight a token by its rank's token count. Two
    gloo ranks have the gradient of one process on the same batch, also if one rank has
    nothing to train on, and the whole loop draws the same completions.
    https://github.com/verl-project/verl/issues/906"""
    rollout = random_rollout(grpo, 16, PROMPTS, LENGTHS, [False] * 7 + [True])
    batch = {k: v for k, v in vars(rollout).items() if k != "texts"}
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "task.py").write_text(TASK)
    tokenizer = char_tokenizer()
    save_model(tmp_path / "model", small_qwen3(len(tokenizer)), tokenizer)
    dead_rank = [1.0, -1.0, 0.0, 0.0, 0.7, -0.7, 0.0, 0.0]
    cases = [(ADVANTAGES.tolist(), {"normalization": name}) for name in NORMALIZATIONS]
    cases += [(dead_rank, {}), (ADVANTAGES.tolist(), {"kl_coef": 0.3})]
    cases += [(ADVANTAGES.tolist(), {"mask_truncated": True, "micro_batch_size": 3})]
    train = dict(model="model", task="task.py", steps=2)
    train |= dict(prompts_per_step=4, group_size=4, max_new_tokens=6, eval_prompts=3)
    train |= dict(eval_samples=2, learning_rate=1e-3)
    job = json.dumps({"cases": cases, "train": train})
    (tmp_path / "worker.py").write_text(WORKER)
    for world in 1, 2:
        codes = ranks.run(world, "worker.py", job, cwd=tmp_path)
        assert codes == [0] * world, (tmp_path / "out").read_text()

    one = torch.load(tmp_path / "gradient-0-of-1.pt")
    for rank in 0, 1:
        two = torch.load(tmp_path / f"gradient-{rank}-of-2.pt")
        for (got, stats), (wanted, all_stats) in zip(two, one):
            assert difference(got, wanted) < 1e-6
            assert stats == pytest.approx(all_stats, rel=1e-4, abs=1e-6)
    logs = [tmp_path / f"run-{world}/metrics.jsonl" for world in (1, 2)]
    logs = [[json.loads(line) for line in log.open()] for log in logs]
    assert len(logs[0]) == len(logs[1]) == 3
    for alone, shared in zip(*logs):
        for name in list(alone):
            if name.startswith(("seconds", "tokens_per_second", "peak")):
                del alone[name], shared[name]
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-5)
    assert alone["grad_norm"] > 0


def test_turn_that_ends_with_another_token_runs_on(grpo):
    """The tokenizer's EOS of some chat models is not what ends their turn: that stands
    in generation_config. Taken for an ordinary token, each answer runs into invented
    turns, and these are rewarded and trained on. Both ids end a completion, inclusive.
    https://github.com/huggingface/transformers/issues/38182"""
    tokenizer = char_tokenizer()
    model = small_qwen3(len(tokenizer))
    args = cpu_args(grpo, max_new_tokens=32)
    noise = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)).double()
    prompt = [tokenizer("3 4=")["input_ids"]]
    turn = 40
    plain = grpo.generate(model, tokenizer, prompt, noise, args)
    model.generation_config.eos_token_id = [1, turn]
    assert grpo.stop_ids(model, tokenizer) == [1, turn]
    rollout = grpo.generate(model, tokenizer, prompt, noise, args)
    ends = {1: 0, turn: 0, None: 0}
    for i in range(64):
        old = plain.tokens[i, 4:][plain.completion_mask[i] > 0].tolist()
        new = rollout.tokens[i, 4:][rollout.completion_mask[i] > 0].tolist()
        wanted = old[: old.index(turn) + 1] if turn in old else old
        assert new == wanted
        ends[new[-1] if new[-1] in ends else None] += 1
        assert bool(rollout.truncated[i]) == (new[-1] not in (1, turn))
        assert (rollout.tokens[i, 4 + len(new) :] == tokenizer.pad_token_id).all()
    assert ends[1] and ends[turn]


def test_group_is_larger_than_the_rollout_batch(grpo, monkeypatch):
    """--rollout-batch-size bounds the keys and values in memory, also where one prompt
    has more completions than that; which are side by side changes none of them."""
    tokenizer, seen = char_tokenizer(), []
    model, whole = small_qwen3(len(tokenizer)), grpo.decode
    prompts = [tokenizer(x)["input_ids"] for x in ("3 4=", "5=", "6 7 8=")]
    noise = torch.rand(21, 8, generator=torch.Generator().manual_seed(1)).double()
    spy = lambda *batch: (seen.append((len(batch[1]), len(batch[3]))), whole(*batch))[1]
    monkeypatch.setattr(grpo, "decode", spy)
    rollouts = []
    for size in (512, 3, 14):
        args = cpu_args(grpo, max_new_tokens=8, rollout_batch_size=size)
        rollouts.append(grpo.generate(model, tokenizer, prompts, noise, args))
    assert seen == [(3, 21), *[(1, 3), (1, 3), (1, 1)] * 3, (2, 14), (1, 7)]
    for other in rollouts[1:]:
        assert torch.equal(other.tokens, rollouts[0].tokens)
        assert torch.allclose(other.logprobs, rollouts[0].logprobs, atol=1e-5)
