"""Speed and memory of algos/grpo.py beside TRL's GRPOTrainer, on the same work.

    pip install -r benchmarks/requirements.txt
    python benchmarks/vs_trl.py

Both get the same warm-started model, the same Countdown problems in the same order, the
same reward, 32 prompts x 8 completions of up to 24 tokens a step, one update a batch in
micro-batches of 64, fp32, AdamW at the same constant learning rate, the token-level
loss without KL, temperature 1, no dropout, no activation checkpointing, no logging, and
two threads. They run alternately, each run in its own process, and the first steps of
each are not counted. A step is counted from the start of sampling to the end of the
optimiser's step: loading, evaluating, logging and saving are left out for both.

Ours is the script as a user runs it, read from its metrics.jsonl. What it does
otherwise: it reads each prompt once for its group when it samples, stops decoding rows
that have ended, and leaves groups of equal rewards, whose gradient is 0, out of the
update. TRL's update computes all rows. The second case, "all live", takes that last
advantage away: its rewards are random numbers, so that no group is left out.

Memory is the peak resident size of the process: in total, and above its imports alone.
Ours includes the 20,000 problems that the script keeps, TRL's only those it trains on.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from code_hash import code_hash

ROOT = Path(__file__).resolve().parent.parent
GRPO = ROOT / "algos" / "grpo.py"
RESULT = ROOT / "benchmarks" / "results" / "vs_trl.json"
PACKAGES = "torch", "transformers", "trl", "accelerate", "numpy"
LIVE_TASK = """
import random, runpy
grpo = runpy.run_path({path!r})
problems = lambda *args: (p._asdict() for p in grpo["countdown_problems"](*args, 3))
reward = lambda problem, completion: random.random()
"""


def peak_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------- What runs in a process of its own --------------------------


def prepare(job: SimpleNamespace) -> dict:
    """The warm-started model's folder, its size, and the prompts in our order."""
    import numpy as np
    import torch

    grpo = load_grpo()
    args = grpo.Args(seed=job.seed, device="cpu", dtype="float32", eval_prompts=1)
    args.prompts_per_step = job.prompts
    problems = grpo.load_task(args)[0]
    folder = job.model or grpo.tiny_model(problems, job.seed, args.tiny_steps)
    folder = job.model or str(Path(folder).resolve())
    model, tokenizer = grpo.load_model(folder, args)
    order = np.random.default_rng([job.seed, 1, 0]).permutation(len(problems))
    batch = [problems[i] for i in order[: job.prompts * job.steps]]
    rows = [
        {"prompt": p.prompt, "given": p.answer[0], "target": p.answer[1]} for p in batch
    ]
    lengths = [len(tokenizer(p.prompt)["input_ids"]) for p in batch]
    return {
        "model": folder,
        "rows": rows,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_length": statistics.mean(lengths),
        "threads": torch.get_num_threads(),
    }


def load_grpo():
    """algos/grpo.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("grpo", GRPO)
    sys.modules["grpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["grpo"])
    return sys.modules["grpo"]


def import_ours(job: SimpleNamespace) -> dict:
    """Memory after grpo.py's imports, the model class among them."""
    load_grpo()
    from transformers import Qwen3ForCausalLM  # noqa: F401

    return {"peak_mb": peak_mb()}


def import_trl(job: SimpleNamespace) -> dict:
    """Memory after the imports of run_trl."""
    from datasets import Dataset  # noqa: F401
    from transformers import Qwen3ForCausalLM  # noqa: F401
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401

    return {"peak_mb": peak_mb()}


def matrix_rate(job: SimpleNamespace) -> dict:
    """Best GFLOP/s of torch.mm: the shape of an update and that of a decoding step."""
    import torch

    rates = {}
    for n, k, m in (2048, 128, 384), (256, 128, 384):
        a, b, best = torch.randn(n, k), torch.randn(k, m), 0.0
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                torch.mm(a, b)
            best = max(best, 50 * 2 * n * k * m / (time.perf_counter() - start) / 1e9)
        rates[f"{n}x{k} @ {k}x{m}"] = best
    return rates


def countdown_reward():
    """grpo.py's reward without the imports of grpo.py, which would count as memory."""
    names, parts = ("OPERATORS", "countdown_reward"), {"re": re, "Problem": object}
    for node in ast.parse(GRPO.read_text()).body:
        target = getattr(node, "targets", [node])[0]
        target = getattr(target, "value", target)  # OPERATORS["/"] = ...
        if (getattr(target, "id", None) or getattr(target, "name", None)) in names:
            module = ast.Module([node], type_ignores=[])
            exec(compile(module, str(GRPO), "exec"), parts)
    return parts["countdown_reward"]


def run_trl(job: SimpleNamespace) -> dict:
    """Steps of TRL's trainer: seconds of each and its parts, and the peak memory."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    right, steps, now = countdown_reward(), [], dict.fromkeys(("rollout", "score"), 0.0)

    def reward(prompts, completions, given, target, **_) -> list[float]:
        if job.live:
            rewards = [random.random() for _ in completions]
        else:
            asked = [SimpleNamespace(answer=answer) for answer in zip(given, target)]
            rewards = [right(*pair) for pair in zip(asked, completions)]
        now["reward_mean"] = statistics.mean(rewards)
        return rewards

    def timed(name: str, function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            now[name] += time.perf_counter() - start
            if name == "rollout":
                now["completion_length"] = statistics.mean(map(len, result[1]))
            return result

        return wrapper

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            now.update(rollout=0.0, score=0.0, start=time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            seconds = time.perf_counter() - now["start"]
            update = seconds - now["rollout"] - now["score"]
            steps.append({**now, "seconds": seconds, "update": update})

    config = GRPOConfig(
        output_dir=job.folder,
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.prompts * job.group // job.micro_batch,
        num_generations=job.group,
        max_completion_length=job.max_new_tokens,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_iterations=1,
        disable_dropout=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job.seed,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(job.rows),
        callbacks=[Clock()],
    )
    trainer._generate = timed("rollout", trainer._generate)
    trainer._calculate_rewards = timed("score", trainer._calculate_rewards)
    trainer.train()
    return {"steps": steps, "peak_mb": peak_mb(), "threads": torch.get_num_threads()}


# ------------------------------------ The parent --------------------------------------


def call(function, job: dict, folder: Path) -> dict:
    """function(job) in a process of its own."""
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, __file__, "--worker", function.__name__, str(folder)]
    run_process(command)
    return json.loads((folder / "result.json").read_text())


def run_process(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def run_ours(job: dict, run_dir: Path) -> dict:
    """Steps of algos/grpo.py, in the form of run_trl's."""
    flags = {
        "run-dir": run_dir,
        "model": job["model"],
        "seed": job["seed"],
        "steps": job["steps"],
        "prompts-per-step": job["prompts"],
        "group-size": job["group"],
        "max-new-tokens": job["max_new_tokens"],
        "micro-batch-size": job["micro_batch"],
        "learning-rate": job["learning_rate"],
        "task": job["live"] or "countdown",
        "warmup-steps": 0,
        "device": "cpu",
        "dtype": "float32",
        "eval-every": 10**9,
        "save-every": 10**9,
        "eval-prompts": 1,
        "eval-samples": 1,
    }
    command = [sys.executable, str(GRPO)]
    run_process(command + [f"--{name}={value}" for name, value in flags.items()])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    lines = [line for line in lines if "seconds_update" in line]
    kept = "reward_mean", "completion_length", "dead_group_share"
    steps = []
    for line in lines:
        step = {
            name: line[f"seconds_{name}"] for name in ("rollout", "score", "update")
        }
        step["seconds"] = sum(step.values())
        steps.append(step | {name: line[name] for name in kept})
    return {"steps": steps, "peak_mb": lines[-1]["peak_memory_gb"] * 1024}


def summary(run: dict, job: dict, imports_mb: float) -> dict:
    """Means over the steps of a run that count, its speed and its memory."""
    counted = run["steps"][job["warm_up"] :]
    names = "seconds", "rollout", "score", "update", "reward_mean", "completion_length"
    names += ("dead_group_share",) if "dead_group_share" in counted[0] else ()
    means = {name: statistics.mean(step[name] for step in counted) for name in names}
    means["completions_per_second"] = job["prompts"] * job["group"] / means["seconds"]
    means["tokens_per_second"] = (
        means["completions_per_second"] * means["completion_length"]
    )
    above = run["peak_mb"] - imports_mb
    return means | {"peak_mb": run["peak_mb"], "peak_mb_above_imports": above}


def average(runs: list[dict]) -> dict:
    return {name: statistics.mean(run[name] for run in runs) for name in runs[0]}


def compare(name: str, job: dict, rounds: int, imports: dict, folder: Path) -> dict:
    """Alternating runs of one case; speeds, ratios of the rounds, memory."""
    runs = {"ours": [], "trl": []}
    for i in range(rounds):
        ours = run_ours(job, folder / f"{name.replace(' ', '-')}-{i}")
        runs["ours"].append(summary(ours, job, imports["ours"]))
        trl = call(run_trl, job, folder)
        runs["trl"].append(summary(trl, job, imports["trl"]))
        pair = [runs[side][-1]["completions_per_second"] for side in ("ours", "trl")]
        print(f"{name}, round {i + 1}: ours {pair[0]:.0f}, TRL {pair[1]:.0f} "
              f"completions/s, ratio {pair[0] / pair[1]:.2f}", flush=True)  # fmt: skip
    pairs = zip(*([run["completions_per_second"] for run in r] for r in runs.values()))
    ratios = [ours / trl for ours, trl in pairs]
    result = {"runs": runs, "ratios": ratios, "ratio": statistics.median(ratios)}
    return result | {side: average(runs[side]) for side in runs}


def limits(ours: dict, job: dict, model: dict, rates: dict) -> dict:
    """The machine's rate, a step's model FLOPs, and the share of the rate we reach.

    2 N a token sampled (the prompt once a group), 6 N a token of a live row, N being
    the parameters. Attention, norms and padding are not counted: a lower bound.
    """
    n, rows = model["parameters"], job["prompts"] * job["group"]
    sampled = rows * ours["completion_length"] + job["prompts"] * model["prompt_length"]
    learnt = rows * (1 - ours["dead_group_share"])
    learnt *= ours["completion_length"] + model["prompt_length"]
    flops = {"rollout": 2 * n * sampled, "update": 6 * n * learnt}
    rate = max(rates.values())
    result = {"matrix_gflops_per_second": rates, "parameters": n}
    for part, count in flops.items():
        speed = count / ours[part] / 1e9
        result[part] = {
            "seconds": ours[part],
            "gflop": count / 1e9,
            "gflops_per_second": speed,
            "share_of_matrix_rate": speed / rate,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of a run that count"
    )
    parser.add_argument("--model", default="", help="folder (default: the tiny model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--all-live-rounds", type=int, default=2, help="0: not that case"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    job = dict(
        prompts=32, group=8, max_new_tokens=24, micro_batch=64, seed=1, warm_up=2
    )
    job |= dict(learning_rate=1e-4, steps=args.steps + 2, model=args.model, live="")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job["folder"] = str(folder / "trl")
        model = call(prepare, job, folder)
        job |= {"model": model["model"], "rows": model["rows"]}
        imports = {"ours": call(import_ours, job, folder)["peak_mb"]}
        imports["trl"] = call(import_trl, job, folder)["peak_mb"]
        rates = call(matrix_rate, job, folder)
        cases = {"countdown": compare("countdown", job, args.rounds, imports, folder)}
        if args.all_live_rounds:
            task = folder / "live.py"
            task.write_text(LIVE_TASK.format(path=str(GRPO)))
            live = job | {"live": str(task)}
            cases["all live"] = compare(
                "all live", live, args.all_live_rounds, imports, folder
            )
    settings = {
        k: v for k, v in job.items() if k not in ("rows", "model", "folder", "live")
    }
    settings |= {"rounds": args.rounds, "threads": args.threads}
    settings |= {"dtype": "float32", "loss": "token (dapo)"}
    result = {
        "hardware": f"{os.cpu_count()} CPU cores, no GPU",
        "code": code_hash([GRPO.read_text()]),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": settings,
        "imports_mb": imports,
        "cases": cases,
        "limits": limits(cases["countdown"]["ours"], job, model, rates),
        "wall_seconds": time.perf_counter() - started,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    report(result)
    print(f"{result['wall_seconds']:.0f} s; written: {args.output}")


def report(result: dict) -> None:
    """The table and what limits us."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    print(
        f"\n{result['hardware']}, {result['settings']['threads']} threads; {versions}"
    )
    columns = {"compl./s": "completions_per_second", "step s": "seconds"}
    columns |= {name: name for name in ("rollout", "score", "update")}
    columns |= {"peak MB": "peak_mb", "above imports": "peak_mb_above_imports"}
    columns |= {"reward": "reward_mean", "length": "completion_length"}
    for name, case in result["cases"].items():
        low, high = min(case["ratios"]), max(case["ratios"])
        over = f"({low:.2f} to {high:.2f} over {len(case['ratios'])} rounds)"
        print(f"\n{name}: {case['ratio']:.2f} times TRL's completions/s {over}")
        print(" " * 5 + "".join(f"{column:>14}" for column in columns))
        for side in ("ours", "trl"):
            values = [case[side][key] for key in columns.values()]
            print(f"{side:5}" + "".join(f"{value:14.4g}" for value in values))
    limit = result["limits"]
    print("\nwhat limits us (countdown): matrix products on this machine, GFLOP/s:")
    for shape, rate in limit["matrix_gflops_per_second"].items():
        print(f"  {shape}: {rate:.0f}")
    for part in ("rollout", "update"):
        p = limit[part]
        print(f"  {part}: {p['gflop']:.1f} GFLOP in {p['seconds']:.3f} s = "
              f"{p['gflops_per_second']:.0f} GFLOP/s, "
              f"{p['share_of_matrix_rate']:.0%} of the best of these")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        here = Path(sys.argv[3])
        given_job = SimpleNamespace(**json.loads((here / "job.json").read_text()))
        outcome = globals()[sys.argv[2]](given_job)
        (here / "result.json").write_text(json.dumps(outcome))
    else:
        main()
