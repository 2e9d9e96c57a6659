"""Variance and bias of the gradient estimators of algos/vopd.py at the same students.

    python benchmarks/gradient_variance.py [--seeds 1 2 3 4 5] [--batches 96]

Students: of each seed the tiny base model, and what a run of the script has made of it
after some steps. At each of them --batches batches of completions are drawn, and every
estimator sees the same ones. With g_k the gradient on batch k, all weights as one
vector, K batches:

    variance      E|g|^2 - |E g|^2: mean |g_k|^2 - mean over i /= j of g_i.g_j
    ratio         of the variance to that of `sampled`
    bias_squared  |E d|^2 / |E full|^2, d_k = g_k - (that of `full` on batch k), from
                  the mean over i /= j of d_i.d_j: unbiased, so it may be below 0

Z is the same for all batches (their mean number of tokens): the ratio of two sums that
depend on each other would add a bias of its own, to every estimator. Part of the
variance is that of the states, which no baseline touches: `full` has that part alone.
Writes benchmarks/results/gradient_variance.json and .png.
"""

from __future__ import annotations

import numpy as np
import torch
from gradients import args_of, inner_products, measure_seeds, moments, run_until


def gradients(vopd, model, teacher, rollouts, z, args) -> torch.Tensor:
    """One gradient for each rollout, (K, parameters) float32."""
    rows = []
    for rollout in rollouts:
        model.zero_grad()
        vopd.distill(model, teacher, rollout, rollout.completion_mask, z, args)
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


def compare(of: dict[str, torch.Tensor]) -> dict:
    """The measures above from each estimator's gradients (K, parameters) on the same
    batches, `sampled` and `full` among them."""
    length, rows = moments(inner_products(of["full"]))[1], {}
    for name, g in of.items():
        square, mean = moments(inner_products(g))
        bias = moments(inner_products(g - of["full"]))[1] / length
        rows[name] = {"variance": square - mean, "bias_squared": bias}
    for row in rows.values():
        row["ratio"] = row["variance"] / rows["sampled"]["variance"]
    return rows


def measure(vopd, seed: int, flags) -> dict:
    """{student: {estimator: measures}} of one seed."""
    last = run_until(vopd, max(flags.after), seed, flags.run_flags)
    args, students = args_of(vopd, last), {}
    args.top_k = flags.top_k
    problems, _, _ = vopd.load_task(args)
    teacher, teacher_tokenizer = vopd.load_teacher(problems, args)
    for after in flags.after:
        name = args.model
        if after:
            name = run_until(vopd, after, seed, flags.run_flags) / "checkpoint"
        elif name == "tiny":
            name = vopd.tiny_model(problems, seed, args.tiny_steps, vopd.STUDENT_WIDTH)
        model, tokenizer = vopd.load_model(str(name), args)
        vopd.same_vocabulary(model, tokenizer, teacher, teacher_tokenizer)
        rng, size, rollouts = np.random.default_rng([seed, 2]), flags.batch_size, []
        for k in range(flags.batches):
            posed = [problems[i] for i in rng.integers(len(problems), size=size)]
            prompts = vopd.encode_prompts(tokenizer, posed, 10**6, 10**6)
            noise = vopd.uniforms(args, 10**6 + k, size, 1)  # that no run has seen
            rollouts.append(vopd.generate(model, tokenizer, prompts, noise, args))
        model.train()
        z, of = float(np.mean([r.completion_mask.sum() for r in rollouts])), {}
        for estimator in ("full", "sampled", "vopd", "vopd-topk", "topk", "clip"):
            args.estimator = estimator
            of[estimator] = gradients(vopd, model, teacher, rollouts, z, args)
        rows = students[f"step {after}"] = compare(of)
        for name, row in rows.items():
            text = f"variance / sampled {row['ratio']:.3f}, "
            text += f"bias^2 / |full|^2 {row['bias_squared']:.4f}"
            print(f"seed {seed}, step {after}, {name}: {text}", flush=True)
    return students


if __name__ == "__main__":
    defaults = dict(after=[0, 60], batches=96, batch_size=16, top_k=5)
    measure_seeds(measure, "vopd", __doc__, **defaults)
