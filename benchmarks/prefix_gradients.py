"""Gradients of algos/prefixrl.py with and without prefixes, at the same policies.

    python benchmarks/prefix_gradients.py [--batches 64] [--after 0 50 200]

Policies: the tiny base model (step 0), and what a default run of the script has made of
it after some steps (cached in --work, by the code's hash). At each of them, for every
kind of batch below, --batches batches of 32 groups of 8 are drawn, and each goes
through the script's own `update` (Z is that of the batch, as there), of which the
gradient is kept and no step is taken. With g_k the gradient on batch k, all weights as
one vector, K batches:

    live      share of groups with a reward that is not all equal: the others have none
    norm      mean |g_k|
    signal    |E g|, from the mean over i /= j of g_i.g_j (0 if that is below 0)
    std       sqrt(trace Cov(g)) = sqrt(E|g|^2 - |E g|^2)
    SNR       signal^2 / std^2 of one batch
    cosine    of E g with the E g of plain batches at the same policy

Kinds: plain (hard problems as they are), prefixes of 10-40, 40-80 and 80-95 % of the
trace, 40-80 % with the prefix in the loss (--no-mask-prefix), and plain ones with the
trace in each group, importance-weighted (--off-policy). Intervals: 95 % percentile
bootstrap over batches. Writes benchmarks/results/prefix_gradients.json, .md and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import claims
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "algos" / "prefixrl.py"
BANDS = {"prefix 10-40 %": (0.1, 0.4), "prefix 40-80 %": (0.4, 0.8)}
BANDS |= {"prefix 80-95 %": (0.8, 0.95)}
KINDS = ["plain", *BANDS, "40-80 %, not masked", "plain, off-policy trace"]


def load_prefixrl():
    """algos/prefixrl.py as a module."""
    spec = importlib.util.spec_from_file_location("prefixrl", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prefixrl"] = module
    spec.loader.exec_module(module)
    return module


class Keep(torch.optim.SGD):
    """An optimiser that keeps the gradient and takes no step."""

    def step(self) -> None:
        parameters = self.param_groups[0]["params"]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters])


def run_until(steps: int, work: Path, flags) -> None:
    """A default run of the script up to a step, its checkpoints kept by step."""
    command = [sys.executable, str(SCRIPT), "--steps", str(steps), "--eval-every"]
    command += ["100000", "--device", "cpu", "--seed", str(flags.seed)]
    if not (work / f"run-{steps}").exists():
        command += ["--run-dir", f"run-{steps}", *flags.run_flags.split()]
        subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL)


def gradients(prefixrl, model, tokenizer, hard, traces, reward, kind, args, flags):
    """Gradients (K, parameters) float32 of batches of a kind, and their live shares."""
    low, high = BANDS.get(kind, (0.4, 0.8))
    args = dataclasses.replace(args, prefix_low=low, prefix_high=high)
    args.mask_prefix, args.off_policy = kind != KINDS[-2], kind == KINDS[-1]
    args.plain_share, args.max_grad_norm = float(kind.startswith("plain")), 1e30
    prefixed = prefixrl.cut_prefixes(traces, tokenizer.eos_token_id, args)
    plain, keep = [(i, []) for i in range(len(hard[0]))], Keep(model.parameters(), 0.0)
    rows, live = [], []
    for step in range(10**6, 10**6 + flags.batches):  # noise that no run has seen
        batch = prefixrl.draw_batch(prefixed, plain, step, args)
        around = batch, hard, traces, reward, step, args
        metrics, _ = prefixrl.practice(model, None, tokenizer, keep, *around)
        rows.append(keep.gradient)
        live.append(1 - metrics["dead_group_share"])
    return torch.stack(rows), np.array(live)


def moments(gram: np.ndarray, index: np.ndarray) -> tuple[float, float]:
    """E|g|^2 and an unbiased |E g|^2 of the rows of a sample, from all their inner
    products (K, K); `index` is the sample, in which a row may stand more than once."""
    w = np.bincount(index, minlength=len(gram)).astype(float)
    own = w**2 @ np.diag(gram)
    between = (w @ gram @ w - own) / (w.sum() ** 2 - (w**2).sum())
    return w @ np.diag(gram) / w.sum(), between


def interval(statistic, count: int, resamples: int) -> list[float]:
    """95 % percentile bootstrap interval of a statistic of batch numbers."""
    result = stats.bootstrap(
        (np.arange(count),),
        lambda index: statistic(index.astype(int)),
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return [float(x) for x in result.confidence_interval]


def summary(g: torch.Tensor, live: np.ndarray, plain: torch.Tensor, flags) -> dict:
    """The measures above, with intervals for live, norm, std and SNR."""
    gram, count = (g @ g.T).double().numpy(), len(g)
    lengths, everything = np.sqrt(np.diag(gram)), np.arange(count)

    def std(index) -> float:
        square, mean = moments(gram, index)
        return float(np.sqrt(max(square - mean, 0.0)))

    def snr(index) -> float:
        square, mean = moments(gram, index)
        return float(max(mean, 0.0) / (square - mean)) if square > mean else 0.0

    row = {"signal": float(np.sqrt(max(moments(gram, everything)[1], 0.0)))}
    measures = {"live": lambda i: live[i].mean(), "norm": lambda i: lengths[i].mean()}
    for name, statistic in (measures | {"std": std, "snr": snr}).items():
        row[name] = float(statistic(everything))
        row[f"{name}_interval"] = interval(statistic, count, flags.resamples)
    ends = g.mean(0).double(), plain.mean(0).double()
    norms = ends[0].norm() * ends[1].norm()
    row["cosine"] = float(ends[0] @ ends[1] / norms) if norms > 0 else None
    return row


def table(result: dict) -> str:
    """The results as a table in Markdown."""
    flags = result["flags"]
    lines = [
        f"{result['hardware']}, torch {result['torch']}; {flags['batches']} batches of "
        f"32 groups of 8 of each kind at each policy, seed {flags['seed']}; 95 % "
        "bootstrap intervals over batches.",
        "",
        "| policy | batches | live groups | gradient norm | std | SNR | cosine |",
        "|---|---|---|---|---|---|---:|",
    ]
    for where, rows in result["policies"].items():
        for kind, row in rows.items():
            cells = [where, kind]
            for name in ("live", "norm", "std", "snr"):
                low, high = row[f"{name}_interval"]
                cells.append(f"{row[name]:.3f} [{low:.3f}, {high:.3f}]")
            cosine = row["cosine"]
            cells.append("-" if cosine is None else f"{cosine:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """SNR of each kind at each policy, with its interval."""
    axes = Figure(figsize=(7, 4), layout="constrained").add_subplot()
    policies = result["policies"]
    for i, (where, rows) in enumerate(policies.items()):
        heights = np.array([rows[kind]["snr"] for kind in KINDS])
        limits = np.array([rows[kind]["snr_interval"] for kind in KINDS]).T
        places = np.arange(len(KINDS)) + 0.8 * i / len(policies)
        look = dict(color=str(0.2 + 0.3 * i), width=0.8 / len(policies), capsize=3)
        errors = np.abs(limits - heights)
        axes.bar(places, heights, yerr=errors, label=f"policy of {where}", **look)
    middle = np.arange(len(KINDS)) + 0.4 * (len(policies) - 1) / len(policies)
    axes.set_xticks(middle, [kind.replace(", ", ",\n") for kind in KINDS], fontsize=8)
    axes.set(xlabel="batches", ylabel="SNR of the gradient of one batch")
    axes.set_title(f"{result['flags']['batches']} batches, 95 % interval", fontsize=10)
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--after", type=int, nargs="+", default=[0, 50, 200])
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--run-flags", default="", help="more flags of the run")
    parser.add_argument("--work", default=str(ROOT / "runs" / "prefix_gradients"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    flags = parser.parse_args()
    code = claims.code_hash([SCRIPT.read_text()])
    work, prefixrl = Path(flags.work, code).resolve(), load_prefixrl()
    out = Path(flags.out).resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    result = {"hardware": f"{os.cpu_count()} CPU cores, no GPU"}
    result |= {"torch": torch.__version__, "code": code}
    result["flags"] = vars(flags) | {"work": ""}
    result["flags"]["out"], result["policies"] = "", {}
    last = max(flags.after)
    run_until(last, work, flags)
    os.chdir(work)  # where the run has cached its models
    args = json.loads(Path(f"run-{last}", "args.json").read_text())["args"]
    args = prefixrl.Args(**args)
    problems, _, reward = prefixrl.load_task(args)
    base = prefixrl.built_in("tiny", problems, args)
    places = {str(problem.prompt): problem for problem in problems}
    lines = Path(f"run-{last}", "traces.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    traces = {
        i: prefixrl.Trace(r["ids"], r["logprob"])
        for i, r in enumerate(found)
        if r["ids"]
    }
    for after in flags.after:
        run_until(after, work, flags) if after else None
        name = f"run-{after}/checkpoint" if after else base
        model, tokenizer = prefixrl.load_model(name, args)
        posed = [places[str(record["prompt"])] for record in found]
        hard = prefixrl.encode_prompts(tokenizer, posed, 10**6), posed
        rows, plain = result["policies"].setdefault(f"step {after}", {}), None
        for kind in KINDS:
            parts = model, tokenizer, hard, traces, reward, kind, args, flags
            g, live = gradients(prefixrl, *parts)
            plain = g if plain is None else plain
            row = rows[kind] = summary(g, live, plain, flags)
            text = ", ".join(f"{x} {row[x]:.3f}" for x in ("live", "norm", "std"))
            print(f"step {after}, {kind}: {text}, SNR {row['snr']:.3f}", flush=True)
    (out / "prefix_gradients.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "prefix_gradients.md").write_text(table(result))
    draw(result, out / "prefix_gradients.png")


if __name__ == "__main__":
    main()
