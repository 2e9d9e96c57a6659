"""Variance and bias of the gradient estimators of algos/vopd.py at the same students.

    python benchmarks/gradient_variance.py [--batches 96] [--batch-size 16]

Students: the tiny base model, and what a run of the script has made of it after
--after steps (cached in --work, by the code's hash). At each of them --batches batches
of completions are drawn, and every estimator sees the same ones. With g_k the gradient
on batch k, all weights as one vector, K batches:

    total variance  E|g|^2 - |E g|^2: mean |g_k|^2 - mean over i /= j of g_i.g_j
    bias            |E d|, d_k = g_k - (that of `full` on batch k), from the mean over
                    i /= j of d_i.d_j: unbiased for |E d|^2, so it may be below 0
    noise floor     sqrt(trace Cov(d) / K): |mean d_k| of an estimator without bias

Z is the same for all batches (their mean number of tokens): the ratio of two sums that
depend on each other would add a bias of its own, to every estimator. Part of the
variance is that of the states, which no baseline touches: `full` has that part alone.
Intervals: 95 % percentile bootstrap over batches. Writes
benchmarks/results/gradient_variance.json and .png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import claims
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "algos" / "vopd.py"


def load_vopd():
    """algos/vopd.py as a module."""
    spec = importlib.util.spec_from_file_location("vopd", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["vopd"] = module
    spec.loader.exec_module(module)
    return module


def gradients(vopd, model, teacher, rollouts, z, args) -> torch.Tensor:
    """One gradient for each rollout, (K, parameters) float32."""
    rows = []
    for rollout in rollouts:
        model.zero_grad()
        vopd.distill(model, teacher, rollout, rollout.completion_mask, z, args)
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


def norms(gram: np.ndarray, index: np.ndarray) -> tuple[float, float]:
    """E|x|^2 and an unbiased |E x|^2 of the rows of a sample, from all their inner
    products (K, K); `index` is the sample, in which a row may stand more than once."""
    w = np.bincount(index, minlength=len(gram)).astype(float)
    own = w**2 @ np.diag(gram)
    between = (w @ gram @ w - own) / (w.sum() ** 2 - (w**2).sum())
    return w @ np.diag(gram) / w.sum(), between


def interval(statistic, count: int, resamples: int) -> list[float]:
    """95 % percentile bootstrap interval of a statistic of batch numbers."""
    result = stats.bootstrap(
        (np.arange(count),),
        statistic,
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return [float(x) for x in result.confidence_interval]


def measure(vopd, model, teacher, rollouts, args, flags) -> dict:
    """Variance, ratio to `sampled` and bias of every estimator at one student."""
    z = float(np.mean([r.completion_mask.sum() for r in rollouts]))
    count, everything, found = len(rollouts), np.arange(len(rollouts)), {}
    args.estimator, grams = "full", {}
    full = gradients(vopd, model, teacher, rollouts, z, args)
    grams["full"] = (full @ full.T).double().numpy(), None
    for name in ("sampled", "vopd", "vopd-topk", "topk", "clip"):
        args.estimator, start = name, time.perf_counter()
        g = gradients(vopd, model, teacher, rollouts, z, args)
        d = g - full
        grams[name] = tuple((x @ x.T).double().numpy() for x in (g, d))
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    length = grams["full"][0].mean()  # |mean g|^2 of full

    def variance(name, index):
        mean_square, square_mean = norms(grams[name][0], index.astype(int))
        return mean_square - square_mean

    for name, (_, gaps) in grams.items():
        ratio = lambda index: variance(name, index) / variance("sampled", index)
        row = found[name] = {"variance": variance(name, everything)}
        row["variance_interval"] = interval(
            lambda index: variance(name, index), count, flags.resamples
        )
        row["ratio_to_sampled"] = ratio(everything)
        row["ratio_interval"] = interval(ratio, count, flags.resamples)
        if gaps is not None:  # everything relative to the length of full's gradient
            square, bias = norms(gaps, everything)
            share = lambda index: norms(gaps, index.astype(int))[1] / length
            row["bias_squared"] = bias / length
            row["bias_squared_interval"] = interval(share, count, flags.resamples)
            row["noise_floor"] = float(np.sqrt((square - bias) / count / length))
            row["mean_gap"] = float(np.sqrt(gaps.mean() / length))
    return {"tokens_per_batch": z, "squared_length": length, "estimators": found}


def student_after(steps: int, work: Path, flags) -> None:
    """The run of the script up to a step, in the folder `work`/run."""
    command = [sys.executable, str(SCRIPT), "--steps", str(steps)]
    if (work / "run").exists():
        lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
        if json.loads(lines[-1])["step"] >= steps:
            return
        command += ["--resume", "run"]
    else:
        command += ["--run-dir", "run", "--seed", str(flags.seed), "--device", "cpu"]
        command += [
            "--eval-every",
            "100000",
            "--eval-samples",
            "2",
            *flags.run_flags.split(),
        ]
    subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL)


def draw(result: dict, path: Path) -> None:
    """The variances against that of `sampled`, with their intervals."""
    axes = Figure(figsize=(6.4, 4), layout="constrained").add_subplot()
    count = len(result["students"])
    for i, (where, row) in enumerate(result["students"].items()):
        rows = row["estimators"]
        heights = [x["ratio_to_sampled"] for x in rows.values()]
        limits = np.array([x["ratio_interval"] for x in rows.values()]).T
        look = dict(color=str(0.3 + 0.4 * i), width=0.8 / count, capsize=3)
        places, errors = (
            np.arange(len(rows)) + 0.8 * i / count,
            np.abs(limits - heights),
        )
        axes.bar(places, heights, yerr=errors, label=f"student of {where}", **look)
    axes.set_xticks(np.arange(len(rows)) + 0.4 * (count - 1) / count, list(rows))
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="estimator", ylabel="total variance of the gradient / sampled's")
    axes.set_title(f"{result['flags']['batches']} batches, 95 % interval", fontsize=10)
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--after", type=int, default=60, help="steps of the run")
    parser.add_argument("--batches", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16, help="completions")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--run-flags", default="", help="more flags of the run")
    parser.add_argument("--work", default=str(ROOT / "runs" / "gradient_variance"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    flags = parser.parse_args()
    code = claims.code_hash([SCRIPT.read_text()])
    work, vopd = Path(flags.work, code).resolve(), load_vopd()
    out = Path(flags.out).resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    student_after(flags.after, work, flags)
    os.chdir(work)  # where the run has cached its models
    saved = json.loads((work / "run" / "args.json").read_text())
    args = vopd.Args(**saved["args"])
    args.top_k = flags.top_k
    problems, _, _ = vopd.load_task(args)
    teacher, teacher_tokenizer = vopd.load_teacher(problems, args)
    base = args.model
    if base == "tiny":
        base = vopd.tiny_model(problems, args.seed, **vopd.STUDENT)
    result = {"hardware": f"{os.cpu_count()} CPU cores, no GPU"}
    result |= {
        "torch": torch.__version__,
        "code": code,
        "flags": vars(flags) | {"work": "", "out": ""},
    }
    result |= {"run": saved["args"], "students": {}}
    for where, name in (("step 0", base), (f"step {flags.after}", "run/checkpoint")):
        model, tokenizer = vopd.load_model(name, args)
        vopd.same_vocabulary(model, tokenizer, teacher, teacher_tokenizer)
        rng, rollouts = np.random.default_rng([flags.seed, 2]), []
        for k in range(flags.batches):
            posed = [
                problems[i] for i in rng.integers(len(problems), size=flags.batch_size)
            ]
            prompts = vopd.encode_prompts(tokenizer, posed, 10**6)
            noise = vopd.uniforms(args, 10**6 + k, flags.batch_size, 1)
            rollouts.append(vopd.generate(model, tokenizer, prompts, noise, args))
        model.train()
        result["students"][where] = measure(vopd, model, teacher, rollouts, args, flags)
        for name, row in result["students"][where]["estimators"].items():
            low, high = row["ratio_interval"]
            text = f"variance / sampled {row['ratio_to_sampled']:.3f} "
            text += f"[{low:.3f}, {high:.3f}]"
            if "mean_gap" in row:
                low, high = row["bias_squared_interval"]
                text += f"  gap to full {row['mean_gap']:.3f} of which noise "
                text += f"{row['noise_floor']:.3f}, bias^2 {row['bias_squared']:.4f} "
                text += f"[{low:.4f}, {high:.4f}]"
            print(f"{where}, {name}: {text}", flush=True)
    text = json.dumps(result, indent=1) + "\n"
    (out / "gradient_variance.json").write_text(text)
    draw(result, out / "gradient_variance.png")


if __name__ == "__main__":
    main()
