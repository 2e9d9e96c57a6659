"""TRL's GRPOTrainer in the place of algos/grpo.py: same command line, same run folder.

    pip install -r benchmarks/requirements.txt
    python benchmarks/trl_grpo.py --seed 1 --run-dir runs/trl

The task, the base model, the order of the prompts, the reward and the evaluation (same
held-out problems, same noise) are those of grpo.py, which is loaded for them; sampling,
advantages, loss, optimiser step and their loop are TRL's, its checkpoints too (in
<run>/trl; <run>/checkpoint/state.pt has the step of the last one, for --resume). The
learning rate rises as in grpo.py. Flags that TRL is not told of here are refused.
`python benchmarks/claims.py grpo --arms default,trl` compares the two learning curves.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

GRPO = Path(__file__).resolve().parent.parent / "algos" / "grpo.py"
TOLD = "seed steps run_dir prompts_per_step group_size max_new_tokens temperature "
TOLD += "learning_rate warmup_steps max_grad_norm micro_batch_size clip_low clip_high "
TOLD += "eval_every eval_prompts eval_samples save_every device dtype tiny_steps resume"


def load_grpo():
    """algos/grpo.py as a module."""
    spec = importlib.util.spec_from_file_location("grpo", GRPO)
    sys.modules["grpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["grpo"])
    return sys.modules["grpo"]


def config_of(args) -> GRPOConfig:
    """grpo.py's flags in TRL's words."""
    return GRPOConfig(
        output_dir=str(Path(args.run_dir, "trl")),
        seed=args.seed,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=(
            args.prompts_per_step * args.group_size // args.micro_batch_size
        ),
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens,
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        max_grad_norm=args.max_grad_norm,
        epsilon=args.clip_low,
        epsilon_high=args.clip_high,
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        num_iterations=1,
        disable_dropout=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=args.save_every,
        save_total_limit=2,  # state.pt may still name the last but one
        report_to=[],
        disable_tqdm=True,
    )


def main() -> None:
    """The run that grpo.py's command line asks for, by TRL."""
    grpo = load_grpo()
    args, default = grpo.parse_args(), grpo.Args()
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in TOLD.split() and value != getattr(default, field.name):
            grpo.fail(f"--{field.name.replace('_', '-')} is not passed on to TRL")
    if args.device != "cpu":
        grpo.fail("this comparison runs on the CPU: use --device cpu")
    problems, held_out, right = grpo.load_task(args)
    name = grpo.tiny_model(problems, args.seed, args.tiny_steps)
    model, tokenizer = grpo.load_model(name, args)
    longest = model.config.max_position_embeddings - args.max_new_tokens
    tests = grpo.encode_prompts(tokenizer, held_out, longest, 10**6)
    n = args.prompts_per_step
    if args.steps > len(problems) // n:
        grpo.fail(f"--steps {args.steps} is more than one pass over the problems")
    order = np.random.default_rng([args.seed, 1, 0]).permutation(len(problems))
    rows = [
        {"prompt": p.prompt, "given": p.answer[0], "target": p.answer[1]}
        for p in (problems[i] for i in order[: n * args.steps])
    ]
    step_rewards: list[float] = []

    def reward(prompts, completions, given, target, **_) -> list[float]:
        asked = [SimpleNamespace(answer=answer) for answer in zip(given, target)]
        step_rewards[:] = [right(*pair) for pair in zip(asked, completions)]
        return list(step_rewards)

    def log(step: int, metrics: dict) -> None:
        if step % args.eval_every == 0 or step == args.steps:
            state = torch.get_rng_state()
            own = model, tokenizer, tests, held_out, right, args
            metrics |= grpo.evaluate(*own)
            torch.set_rng_state(state)
        grpo.write_logs(args, {"step": step} | metrics, {})

    class Log(TrainerCallback):
        def on_step_end(self, _, state, *args, **kwargs):
            log(state.global_step, {"reward_mean": float(np.mean(step_rewards))})
            print(f"step {state.global_step} of {state.max_steps}", end="\r")

        def on_save(self, _, state, *args, **kwargs):
            saved.parent.mkdir(exist_ok=True)
            torch.save({"step": state.global_step}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)

    saved, done = Path(args.run_dir, "checkpoint", "state.pt"), 0
    if args.resume:
        done = torch.load(saved)["step"]
    grpo.open_run(args, done, {})
    about = Path(args.run_dir, "args.json")
    trl = {"trl": importlib.metadata.version("trl")}
    about.write_text(json.dumps(json.loads(about.read_text()) | trl, indent=1))
    if not done:
        log(0, {})
    kwargs = dict(lr=args.learning_rate, weight_decay=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), **kwargs)
    warm = lambda done: min(1.0, (done + 1) / max(args.warmup_steps, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm)
    GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=config_of(args),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Log()],
        optimizers=(optimizer, schedule),
    ).train(f"{args.run_dir}/trl/checkpoint-{done}" if done else None)


if __name__ == "__main__":
    main()
