"""Gradients of algos/prefixrl.py with and without prefixes, at the same policies.

    python benchmarks/prefix_gradients.py [--seeds 1 2 3 4 5] [--batches 32]

Policies: of each seed the tiny base model (step 0), and what a default run of the
script has made of it after some steps. At each of them, for every kind of batch below,
--batches batches of 32 groups of 8 are drawn, independent of one another, and each goes
through the script's own `update` (Z is that of the batch, as there), of which the
gradient is kept and no step is taken. With g_k the gradient on batch k, all weights as
one vector, K batches:

    live      share of groups with a reward that is not all equal: the others have none
    norm      mean |g_k|
    signal    |E g|, from the mean over i /= j of g_i.g_j (0 if that is below 0)
    std       sqrt(trace Cov(g)) = sqrt(E|g|^2 - |E g|^2)
    snr       signal^2 / std^2 of one batch; none where no group is live
    cosine    of E g with the E g of plain batches at the same policy

Kinds: plain (hard problems as they are), prefixes of 10-40, 40-80 and 80-95 % of the
trace, 40-80 % with the prefix in the loss (--no-mask-prefix), and plain ones with the
trace in each group, importance-weighted (--off-policy). Writes
benchmarks/results/prefix_gradients.json and .png.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import torch
from gradients import args_of, inner_products, measure_seeds, moments, run_until

BANDS = {"prefix 10-40 %": (0.1, 0.4), "prefix 40-80 %": (0.4, 0.8)}
BANDS |= {"prefix 80-95 %": (0.8, 0.95)}
KINDS = ["plain", *BANDS, "40-80 %, not masked", "plain, off-policy trace"]


class Keep(torch.optim.SGD):
    """An optimiser that keeps the gradient and takes no step."""

    def step(self) -> None:
        parameters = self.param_groups[0]["params"]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters])


def gradients(prefixrl, model, tokenizer, hard, reward, kind, args, batches):
    """Gradients (K, parameters) float32 of batches of a kind, and their live shares."""
    low, high = BANDS.get(kind, (0.4, 0.8))
    args = dataclasses.replace(args, prefix_low=low, prefix_high=high)
    args.mask_prefix, args.off_policy = kind != KINDS[-2], kind == KINDS[-1]
    args.plain_share, args.max_grad_norm = float(kind.startswith("plain")), 1e30
    prefixed = prefixrl.cut_prefixes(hard, prefixrl.stop_ids(model, tokenizer), args)
    keep, n = Keep(model.parameters(), 0.0), args.group_size
    pool, rows, live = hard if kind.startswith("plain") else prefixed, [], []
    for k in range(10**4, 10**4 + batches):  # noise that no run has seen
        step = 1 + k * len(pool)  # the first of an epoch: no batch depends on another
        batch = prefixrl.draw_batch(prefixed, hard, step, args)
        noise = prefixrl.uniforms(args, step, len(batch), n)
        posed = [exercise.problem for exercise in batch for _ in range(n)]
        parts = model, tokenizer, batch, noise, args
        rollout, weights, _ = prefixrl.sample_batch(*parts)
        rollout.rewards = prefixrl.score(reward, posed, rollout.texts)
        A = prefixrl.group_advantages(rollout.rewards, n, args.advantage_scale)
        prefixrl.update(model, None, keep, rollout, A * weights, args)
        rows.append(keep.gradient)
        groups = rollout.rewards.view(-1, n)
        live.append((groups.amax(-1) > groups.amin(-1)).float().mean().item())
    return torch.stack(rows), np.array(live)


def summary(g: torch.Tensor, live: np.ndarray, plain: torch.Tensor) -> dict:
    """The measures above of one kind of batch at one policy."""
    gram = inner_products(g)
    square, mean = moments(gram)
    signal, noise = max(mean, 0.0), max(square - mean, 0.0)
    row = {"live": float(live.mean()), "norm": float(np.sqrt(np.diag(gram)).mean())}
    row |= {"signal": float(np.sqrt(signal)), "std": float(np.sqrt(noise))}
    row["snr"] = float(signal / noise) if noise else None
    ends = g.mean(0).double(), plain.mean(0).double()
    norms = ends[0].norm() * ends[1].norm()
    row["cosine"] = float(ends[0] @ ends[1] / norms) if norms > 0 else None
    return row


def measure(prefixrl, seed: int, flags) -> dict:
    """{policy: {kind: measures}} of one seed."""
    folder = run_until(prefixrl, max(flags.after), seed, flags.run_flags)
    args = args_of(prefixrl, folder)
    problems, _, reward = prefixrl.load_task(args)
    lines = (folder / "traces.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    traces = [(record["ids"] or [], record["logprob"]) for record in found]
    places = {str(problem.prompt): problem for problem in problems}
    posed, policies = [places[str(record["prompt"])] for record in found], {}
    for after in flags.after:
        name = prefixrl.built_in("tiny", problems, args)
        if after:
            name = run_until(prefixrl, after, seed, flags.run_flags) / "checkpoint"
        model, tokenizer = prefixrl.load_model(str(name), args)
        prompts = prefixrl.encode_prompts(tokenizer, posed, 10**6, 10**6)
        parts = zip(prompts, posed, traces)
        hard = [prefixrl.Exercise(ids, x, *trace) for ids, x, trace in parts]
        rows, plain = policies.setdefault(f"step {after}", {}), None
        for kind in KINDS:
            parts = model, tokenizer, hard, reward, kind, args, flags.batches
            g, live = gradients(prefixrl, *parts)
            plain = g if plain is None else plain
            row = rows[kind] = summary(g, live, plain)
            text = ", ".join(f"{x} {row[x] or 0:.3f}" for x in ("live", "norm", "snr"))
            print(f"seed {seed}, step {after}, {kind}: {text}", flush=True)
    return policies


if __name__ == "__main__":
    measure_seeds(measure, "prefixrl", __doc__, after=[0, 50, 200], batches=32)
