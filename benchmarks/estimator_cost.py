"""Seconds and peak memory of loss + backward of each estimator of algos/vopd.py.

    python benchmarks/estimator_cost.py [--tokens 2048] [--hidden 1024] [--repeats 3]

What is measured is the script's own function `distill` on a student and a teacher of
one layer each, so the two output heads and the loss are nearly all of it: tokens in,
gradients of all weights out. The wider the hidden states, the less the estimators
differ (the heads' matrix products grow); 1,024 is that of a 0.6B model.

Time: in one process for each vocabulary, all estimators in turn, the order reversed
every other time; the ratio is that to `sampled` in the same turn, its median over the
turns.
Memory: a fresh process for each estimator; peak less what was there before the call.
Writes benchmarks/results/estimator_cost.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import time
from pathlib import Path

import memory
import torch
import transformers
from code_hash import code_hash

ROOT = memory.ROOT
SIZES = 4_096, 32_768, 151_936


def setting(vopd, v: int, tokens: int, hidden: int, device: str):
    """step(estimator): one call of distill on two models of vocabulary v, with weights
    that have their gradients already, as in all micro-batches but a step's first."""
    shape = dict(hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4)
    config = transformers.Qwen3Config(
        vocab_size=v, tie_word_embeddings=True, initializer_range=0.1, **shape
    )
    torch.manual_seed(0)
    with torch.device(device):
        models = [transformers.Qwen3ForCausalLM(config) for _ in "st"]
    models[1].requires_grad_(False)
    for p in models[0].parameters():
        p.grad = torch.zeros_like(p)
    rows, length = tokens // 128, 128
    ids = torch.randint(v, (rows, 4 + length), device=device)
    mask = torch.ones(rows, length, device=device)
    rollout = vopd.Rollout(ids, torch.ones_like(ids), mask, mask, mask[:, 0], mask, [])
    common = dict(micro_batch_size=rows, dtype="float32", device=device)
    if device == "cuda":
        common["dtype"], models[1] = "bfloat16", models[1].bfloat16()

    def step(estimator: str) -> float:
        args = vopd.Args(estimator=estimator, **common)
        start = time.perf_counter()
        vopd.distill(*models, rollout, mask, mask.sum(), args)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def times(vopd, v: int, flags) -> dict[str, list[float]]:
    """Seconds of each turn of each estimator."""
    step, found = setting(vopd, v, flags.tokens, flags.hidden, flags.device), {}
    step("sampled")
    for turn in range(flags.repeats):
        for name in vopd.ESTIMATORS[:: 1 if turn % 2 == 0 else -1]:
            found.setdefault(name, []).append(step(name))
    return found


def peak(vopd, v: int, estimator: str, flags) -> dict[str, int]:
    """Bytes before the call and at its peak."""
    step = setting(vopd, v, flags.tokens, flags.hidden, flags.device)
    gc.collect()
    if flags.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(estimator)
        return {"before": before, "peak": torch.cuda.max_memory_allocated()}
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    step(estimator)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "peak": most}


def measure(v: int, flags) -> dict[str, dict]:
    """Every estimator's time and memory at vocabulary v."""
    vopd = memory.load_script("vopd")
    alone = (lambda f, *x: f(*x)) if flags.device == "cuda" else memory.in_process
    seconds, rows = alone(times, vopd, v, flags), {}
    spaces = {x: alone(peak, vopd, v, x, flags) for x in vopd.ESTIMATORS}
    extra = {name: x["peak"] - x["before"] for name, x in spaces.items()}
    for name in sorted(vopd.ESTIMATORS, key="sampled".__ne__):
        ratios = [a / b for a, b in zip(seconds[name], seconds["sampled"])]
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "time_ratio": statistics.median(ratios),
            "time_ratio_range": [min(ratios), max(ratios)],
            "memory": extra[name],
            "memory_ratio": extra[name] / extra["sampled"],
            "all_seconds": seconds[name],
            "bytes": spaces[name],
        }
    return rows


def table(result: dict) -> str:
    """The results as a table in Markdown."""
    lines = [
        f"{result['hardware']}; {result['tokens']} tokens, hidden size "
        f"{result['hidden']}, torch {result['torch']}, threads {result['threads']}; "
        f"{result['wall_seconds']:.0f} s in all. Ratios are to `sampled`.",
        "",
        "| vocabulary | estimator | seconds | ratio | range | memory (GB) | ratio |",
        "|---:|---|---:|---:|---|---:|---:|",
    ]
    for v, rows in result["vocabularies"].items():
        for name, row in rows.items():
            low, high = row["time_ratio_range"]
            lines.append(
                f"| {int(v):,} | `{name}` | {row['seconds']:.3f} "
                f"| {row['time_ratio']:.2f} | {low:.2f} - {high:.2f} "
                f"| {row['memory'] / 2**30:.2f} | {row['memory_ratio']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    gpu = memory.in_process(torch.cuda.is_available)  # here CUDA must not begin
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    flags, start = parser.parse_args(), time.perf_counter()
    gpu = "no GPU"
    if flags.device == "cuda":
        gpu = memory.in_process(torch.cuda.get_device_name)
    code = code_hash([(ROOT / "algos/vopd.py").read_text()])
    result = {"hardware": f"{os.cpu_count()} CPU cores, {gpu}", "code": code}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    result |= {"tokens": flags.tokens, "hidden": flags.hidden, "vocabularies": {}}
    for v in flags.sizes:
        result["vocabularies"][v] = measure(v, flags)
        result["wall_seconds"] = time.perf_counter() - start
        print(text := table(result), flush=True)
    folder = Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "estimator_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "estimator_cost.md").write_text(text)


if __name__ == "__main__":
    main()
