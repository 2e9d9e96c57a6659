"""Loss, advantages and gradient of grpo.py are those of TRL's GRPOTrainer.

TRL's own code computes every expected number: its trainer gets our tokens, through its
`rollout_func`, and our rewards, and scores them with its own copy of the model.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, char_tokenizer, small_qwen3

pytest.importorskip("trl", reason="pip install -r benchmarks/requirements.txt")
from datasets import Dataset
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

GROUPS, GROUP_SIZE, LENGTH, TEMPERATURE = 3, 4, 7, 0.7
LOSS_TYPES = {
    "dapo": "token",
    "bnpo": "token",
    "grpo": "sequence",
    "dr_grpo": "constant",
}


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_qwen3(len(tokenizer))


@pytest.fixture(scope="module")
def rollout(grpo, model, tokenizer):
    """Completions with and without an end, one of a single token; prompts of 2 to 5."""
    args = grpo.Args(
        device="cpu", dtype="float32", group_size=GROUP_SIZE, temperature=TEMPERATURE
    )
    prompts = [tokenizer(text)["input_ids"] for text in ("1=", "2 3=5", "4=7")]
    generator = torch.Generator().manual_seed(3)
    shape = GROUPS * GROUP_SIZE, LENGTH
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    made = grpo.generate(model, tokenizer, prompts, noise, args)
    tokens = made.tokens[:, -LENGTH:].clone()
    for row, place in ((0, 0), (1, 3), (5, 6), (9, 2)):  # ends of our choice
        tokens[row, place] = tokenizer.eos_token_id
    made.completion_mask, made.truncated = grpo.completion_mask(
        tokens, tokenizer.eos_token_id
    )
    tokens = tokens.masked_fill(made.completion_mask == 0, tokenizer.pad_token_id)
    seen = made.attention_mask[:, :-LENGTH]
    made.tokens = torch.cat([made.tokens[:, :-LENGTH], tokens], -1)
    made.attention_mask = torch.cat([seen, made.completion_mask.long()], -1)
    made.rewards = torch.tensor(
        [1.0, 0.0, 0.5, 0.0] + [2.0, -1.5, 0.25, 0.25] + [0.3, 0.3, 0.3, 0.3]
    )
    assert (
        0 < made.truncated.sum() < len(tokens)
        and made.completion_mask.sum(-1).min() == 1
    )
    return made


@pytest.fixture
def make_trainer(model, tokenizer, rollout, tmp_path):
    """make_trainer(loss_type=..., ...): TRL's trainer on our tokens and rewards."""

    def our_rollout(prompts, trainer):
        seen = rollout.attention_mask.bool()
        asked = zip(rollout.tokens[:, :-LENGTH], seen[:, :-LENGTH])
        answered = zip(rollout.tokens[:, -LENGTH:], seen[:, -LENGTH:])
        return {
            "prompt_ids": [row[mask].tolist() for row, mask in asked],
            "completion_ids": [row[mask].tolist() for row, mask in answered],
            "logprobs": None,
        }

    def make(**settings):
        config = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=GROUPS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=LENGTH,
            temperature=TEMPERATURE,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            **settings,
        )
        trainer = GRPOTrainer(
            model=copy.deepcopy(model),
            reward_funcs=lambda completions, **_: rollout.rewards.tolist(),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "1="}] * GROUPS),
            processing_class=tokenizer,
            rollout_func=our_rollout,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by TRL's training loop
        return trainer

    return make


def trl_batch(trainer) -> dict:
    """What TRL makes of our tokens and rewards: masks, advantages, token count."""
    rows = [{"prompt": "1="}] * (GROUPS * GROUP_SIZE)
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize(("theirs", "ours"), [("group", "std"), ("none", "none")])
def test_advantages_equal_trl(grpo, make_trainer, rollout, theirs, ours):
    batch = trl_batch(make_trainer(scale_rewards=theirs))
    advantages = grpo.group_advantages(rollout.rewards, GROUP_SIZE, ours)
    # TRL leaves rounding / 1e-4 where a group's rewards are equal; here that is 0
    torch.testing.assert_close(
        advantages[:8], batch["advantages"][:8], rtol=1e-5, atol=0
    )
    assert batch["advantages"][8:].abs().max() < 1e-3
    assert advantages[8:].tolist() == [0.0] * 4


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("clips", [(0.2, 0.28), (0.1, 0.5)])
def test_loss_and_gradient_equal_trl_when_the_clip_bites(
    grpo, model, make_trainer, rollout, loss_type, clips
):
    low, high = clips
    trainer = make_trainer(
        loss_type=loss_type, epsilon=low, epsilon_high=high, scale_rewards="none"
    )
    batch = trl_batch(trainer)
    generator = torch.Generator().manual_seed(5)
    batch["advantages"] = torch.randn(GROUPS * GROUP_SIZE, generator=generator)
    own = copy.deepcopy(model)
    own.zero_grad()
    logprobs, _ = grpo.token_logprobs(
        own, rollout.tokens, rollout.attention_mask, LENGTH, TEMPERATURE
    )
    drift = torch.randn(logprobs.shape, generator=generator) * 0.4  # ratios 0.3 to 3
    mask, old = rollout.completion_mask, (logprobs.detach() + drift)
    batch["old_per_token_logps"] = old
    expected = trainer._compute_loss(trainer.model, batch)
    expected.backward()

    weights, z = grpo.loss_weights(mask, LOSS_TYPES[loss_type], LENGTH)
    loss, stats = grpo.policy_loss(
        logprobs, old, batch["advantages"], weights, low, high, z
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for p, q in zip(own.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)

    reported = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert reported["clip_ratio/low_mean"] > 0 and reported["clip_ratio/high_mean"] > 0
    share = stats["clipped"] / stats["tokens"]
    assert share.item() == pytest.approx(reported["clip_ratio/region_mean"], rel=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "scale", "mask_truncated"),
    [
        ("dapo", "group", False),
        ("dapo", "none", True),
        ("grpo", "group", False),
        ("dr_grpo", "none", False),
    ],
)
def test_gradient_of_a_whole_update_equals_trl(
    grpo, model, make_trainer, rollout, loss_type, scale, mask_truncated
):
    trainer = make_trainer(
        loss_type=loss_type,
        scale_rewards=scale,
        mask_truncated_completions=mask_truncated,
    )
    trainer._compute_loss(trainer.model, trl_batch(trainer)).backward()
    args = grpo.Args(
        device="cpu",
        dtype="float32",
        group_size=GROUP_SIZE,
        max_new_tokens=LENGTH,
        temperature=TEMPERATURE,
        normalization=LOSS_TYPES[loss_type],
        advantage_scale={"group": "std", "none": "none"}[scale],
        mask_truncated=mask_truncated,
        micro_batch_size=3,  # ours in four parts, TRL's in one
        max_grad_norm=1e9,
    )
    own, gradients = copy.deepcopy(model), []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            gradients.extend(p.grad.clone() for p in own.parameters())

    advantages = grpo.group_advantages(
        rollout.rewards, GROUP_SIZE, args.advantage_scale
    )
    optimizer = Recorder(own.parameters(), 1.0)
    grpo.update(own, None, optimizer, rollout, advantages, args)
    largest = max(g.abs().max() for g in gradients)
    assert largest > 0.01
    for gradient, p in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=2e-6 * largest)


def test_interrupted_trainer_starts_anew(tmp_path, monkeypatch):
    """TRL's trainer in the place of grpo.py, stopped after two of four steps and taken
    up with --resume, logs what an uninterrupted one does and ends at its weights."""
    monkeypatch.chdir(tmp_path)
    flags = "--tiny-steps 5 --prompts-per-step 4 --group-size 4 --micro-batch-size 8 "
    flags += "--eval-every 2 --save-every 2 --eval-prompts 8 --eval-samples 4"
    command = [sys.executable, str(ROOT / "benchmarks" / "trl_grpo.py")]
    first = ["--run-dir", "cut", *flags.split()]
    calls = [*first, "--steps", "2"], ["--resume", "cut", "--steps", "4"]
    for more in (*calls, ["--run-dir", "whole", *flags.split(), "--steps", "4"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    cut, whole = (Path(name, "metrics.jsonl").read_text() for name in ("cut", "whole"))
    assert [json.loads(line)["step"] for line in cut.splitlines()] == [0, 1, 2, 3, 4]
    assert cut == whole
    weights = [
        load_file(f"{name}/trl/checkpoint-4/model.safetensors")
        for name in ("cut", "whole")
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
