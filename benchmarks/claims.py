"""Measure what the README claims of a script: its arms, over seeds, as a user runs it.

    python benchmarks/claims.py grpo --seeds 5

Every run is `python algos/<script>.py` in an empty folder of its own (nothing cached,
nothing imported from the script) under --work. A finished run is not run again and an
interrupted one is resumed. Written: benchmarks/results/<script>.json with all flags,
versions, hardware, commit and evaluations of every run, and from it <script>.md and
<script>.png.

An interval is the 95 % percentile bootstrap over seeds (10,000 resamples) of the mean;
IQM is the interquartile mean, the mean of the middle half.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ARMS: dict[str, dict[str, list[str]]] = {
    "grpo": {"default": []},
    "ppo_envs": {"default": []},
}
METRICS = {
    "grpo": ("eval/pass@1", "eval/pass@8"),
    "ppo_envs": ("eval/episode_return",),
}
YLABEL = {
    "grpo": "held-out problems solved (share)",
    "ppo_envs": "return of 100 evaluation episodes",
}


def read_lines(path: Path) -> list[dict]:
    """The complete lines of a JSONL file; none if there is no file."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run(script: str, arm: str, flags: list[str], seed: int, work: Path) -> dict:
    """One run, from its start, its checkpoint or its end, whichever it has reached."""
    home = work / script / f"{arm}-s{seed}"
    home.mkdir(parents=True, exist_ok=True)
    folder, seconds = home / "run", home / "seconds.json"
    if not seconds.exists():
        command = [sys.executable, ROOT / "algos" / f"{script}.py", "--seed", str(seed)]
        resumed = any(folder.glob("checkpoint*/state.pt"))
        if resumed:
            command = [*command[:2], "--resume", folder]
        else:
            for leftover in (folder, home / "runs"):
                shutil.rmtree(leftover, ignore_errors=True)
            command += ["--run-dir", folder, *flags]
        start = time.perf_counter()
        with (home / "log").open("a") as log:
            subprocess.run(command, cwd=home, stdout=log, stderr=log, check=True)
        took = time.perf_counter() - start
        seconds.write_text(json.dumps(None if resumed else took))
    record = json.loads((folder / "args.json").read_text())
    record["args"].pop("run_dir")
    evals = [
        {key: line[key] for key in line if key == "step" or key.startswith("eval/")}
        for line in read_lines(folder / "metrics.jsonl")
        if any(key.startswith("eval/") for key in line)
    ]
    wall = json.loads(seconds.read_text())
    return {"arm": arm, "seed": seed, **record, "wall_seconds": wall, "evals": evals}


def interval(values: np.ndarray, statistic=np.mean) -> tuple[float, float, float]:
    """The statistic and its 95 % bootstrap interval over the runs."""
    if len(values) < 2 or np.ptp(values) == 0:
        return (float(statistic(values)),) * 3
    draw = stats.bootstrap(
        (values,), statistic, n_resamples=10_000, method="percentile", rng=0
    )
    low, high = draw.confidence_interval
    return float(statistic(values)), float(low), float(high)


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of the values."""
    return stats.trim_mean(values, 0.25, axis=axis)


def table(runs: list[dict], names: tuple[str, ...]) -> str:
    """Markdown: base, trained and gain of each evaluation metric and arm."""
    walls = [run["wall_seconds"] for run in runs if run["wall_seconds"]]
    libraries = [name for name in ("torch", "transformers") if name in runs[0]]
    versions = [f"{name} {runs[0][name]}" for name in libraries]
    lines = [
        f"{runs[0]['hardware']}; {', '.join(versions)}; wall time of a run "
        f"{min(walls):.0f} to {max(walls):.0f} s, nothing cached.",
        "",
        "| arm | metric | seeds | base | trained, worst | gain | 95 % interval | IQM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run["evals"] for run in runs if run["arm"] == arm]
        for name in names:
            base, trained = (np.array([e[i][name] for e in own]) for i in (0, -1))
            worst = f"{trained.min():.3f}"
            gain, low, high = interval(trained - base)
            lines.append(
                f"| {arm} | {name[5:]} | {len(own)} | {base.mean():.3f} | "
                f"{trained.mean():.3f} ({worst}) | {gain:+.3f} | "
                f"[{low:+.3f}, {high:+.3f}] | "
                f"{interquartile_mean(trained - base):+.3f} |"
            )
    note = "Interval: 95 % percentile bootstrap over seeds of a run's mean gain; IQM: "
    note += "interquartile mean of the gain."
    return "\n".join([*lines, "", note, ""])


def picture(runs: list[dict], names: tuple[str, ...], ylabel: str, path: Path) -> None:
    """The metrics against the step: mean over seeds and its interval."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    own = [run["evals"] for run in runs if run["arm"] == runs[0]["arm"]]
    steps = [line["step"] for line in own[0]]
    for name, style in zip(names, ("o-", "s--", "^:")):
        curves = np.array([[line[name] for line in evals] for evals in own])
        middle, low, high = np.array([interval(column) for column in curves.T]).T
        axes.plot(steps, middle, style, color="black", markersize=4)
        axes.fill_between(steps, low, high, color="black", alpha=0.15, linewidth=0)
        end, label = (steps[-1], middle[-1]), name[5:] if len(names) > 1 else ""
        axes.annotate(label, end, (6, -3), textcoords="offset points")
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    axes.margins(x=0.16)
    axes.set_title(f"{len(own)} seeds: mean and 95 % interval", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", choices=sorted(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1..N of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims")
    args = parser.parse_args()
    jobs = [
        (args.script, arm, flags, seed, args.work.resolve())
        for seed in range(1, args.seeds + 1)
        for arm, flags in ARMS[args.script].items()
    ]
    runs, start = [], time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        for i, record in enumerate(pool.map(lambda job: run(*job), jobs), 1):
            runs.append(record)
            gone = time.perf_counter() - start
            left = gone / i * (len(jobs) - i) / 60
            print(f"{i} of {len(jobs)} runs, about {left:.0f} min left", flush=True)
    RESULTS.mkdir(exist_ok=True)
    base = RESULTS / args.script
    base.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    names, ylabel = METRICS[args.script], YLABEL[args.script]
    base.with_suffix(".md").write_text(table(runs, names))
    picture(runs, names, ylabel, base.with_suffix(".png"))
    print(table(runs, names))


if __name__ == "__main__":
    main()
