"""What gradient_variance.py and prefix_gradients.py share: policies, moments, results.

Both ask the same question of a script's gradients at fixed policies, seed by seed. A
result is {"seeds": {seed: {policy: {kind of gradient: {measure: value}}}}} with the
flags, hardware and versions it was made with, and the seconds that each seed took, its
runs included (none, if some were there from an interrupted call). Base models, teachers
and traces are those in the caches of claims.py: cache_warm says of each seed that all
of them were there, none was made in its seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import claims
import numpy as np
import report
import torch
import transformers
from code_hash import code_hash
from matplotlib.figure import Figure

PACKAGES = "torch", "transformers"


def load_script(name: str) -> ModuleType:
    """algos/<name>.py as a module."""
    path = claims.ROOT / "algos" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_until(script: ModuleType, steps: int, seed: int, more: str) -> Path:
    """The folder run-<steps> of a run of the script that ends there, with more flags.
    One that an interrupted call left is used if it came to its end with these flags."""
    folder, words = Path(f"run-{steps}"), ["--seed", str(seed), "--steps", str(steps)]
    words += ["--eval-every", "100000", "--device", "cpu", *more.split()]
    done = folder / "done.json"  # written here, at the end
    if not done.exists() or json.loads(done.read_text()) != words:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, script.__file__, "--run-dir", str(folder), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(words))
    return folder


def args_of(script: ModuleType, folder: Path):
    """The Args of a run."""
    return script.Args(**json.loads((folder / "args.json").read_text())["args"])


def moments(gram: np.ndarray) -> tuple[float, float]:
    """E|g|^2 and an unbiased |E g|^2 of K gradients, from all their inner products
    (K, K)."""
    count, own = len(gram), np.trace(gram)
    return own / count, (gram.sum() - own) / (count * (count - 1))


def inner_products(g: torch.Tensor) -> np.ndarray:
    """All inner products (K, K) of K gradients (K, parameters)."""
    return (g @ g.T).double().numpy()


def share_cache(folder: Path, home: Path) -> Path:
    """home/runs/cache, which is folder/runs/cache, too, from now on."""
    link, cache = (x / "runs" / "cache" for x in (folder, home))
    for path in (cache, link.parent):
        path.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(cache)
    return cache


def measure_seeds(measure: Callable, name: str, doc: str, **defaults) -> None:
    """Writes results/<program>.json: measure(script, seed, flags) of each seed, which
    works in a folder of that seed. One that was measured with the same code (of the
    script and of the program), flags and versions is not measured again."""
    program = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    for flag, default in defaults.items():
        several = {"nargs": "+"} if isinstance(default, list) else {}
        kind = type(default[0] if several else default)
        flag = f"--{flag.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, **several)
    parser.add_argument("--run-flags", default="", help="more flags of the runs")
    parser.add_argument("--work", default=str(claims.ROOT / "runs" / program))
    caches = str(claims.ROOT / "runs" / "claims")
    parser.add_argument("--claims-work", default=caches, help="--work of claims.py")
    parser.add_argument("--out", default=str(claims.RESULTS))
    flags, script = parser.parse_args(), load_script(name)
    out, code = Path(flags.out).resolve(), claims.code_now(name, "default")
    out.mkdir(parents=True, exist_ok=True)
    how = {flag: getattr(flags, flag) for flag in [*defaults, "run_flags"]}
    result = {"hardware": f"{os.cpu_count()} CPU cores, no GPU"}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"threads": torch.get_num_threads(), "code": code, "flags": how}
    result |= {"seconds": {}, "cache_warm": {}, "seeds": {}}
    own = [Path(x).read_text() for x in (measure.__code__.co_filename, __file__)]
    made = how | {"code": code_hash(own), "versions": [result[x] for x in PACKAGES]}
    work, caches = Path(flags.work, code).resolve(), Path(flags.claims_work).resolve()
    for seed in flags.seeds:
        folder, home = work / f"s{seed}", caches / name / f"s{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        path = Path("measured.json")
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("made") != made:
            whole, start = not any(folder.iterdir()), time.perf_counter()
            cached = sorted((cache := share_cache(folder, home)).iterdir())
            known = {"made": made, "policies": measure(script, seed, flags)}
            known["seconds"] = time.perf_counter() - start if whole else None
            known["cache_warm"] = cached == sorted(cache.iterdir())
            path.write_text(json.dumps(known))
        result["seeds"][str(seed)] = known["policies"]
        for field in ("seconds", "cache_warm"):
            result[field][str(seed)] = known[field]
    (out / f"{program}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out / f"{program}.png")


def draw(result: dict, path: Path) -> None:
    """The main measure of each kind of gradient at each policy, with its interval."""
    name, said = {
        "prefix_gradients": ("snr", "SNR of the gradient of one batch (ratio)"),
        "gradient_variance": ("ratio", "variance of the gradient / that of sampled"),
    }[path.stem]
    axes = Figure(figsize=(7, 4), layout="constrained").add_subplot()
    policies = next(iter(result["seeds"].values()))
    kinds = list(next(iter(policies.values())))
    for i, policy in enumerate(policies):
        values = [report.over_seeds(result, policy, x, name) for x in kinds]
        ends = [report.interval(x or [np.nan]) for x in values]
        heights, lows, highs = np.array(ends).T
        places = np.arange(len(kinds)) + 0.8 * i / len(policies)
        look = dict(color=str(0.2 + 0.3 * i), width=0.8 / len(policies), capsize=3)
        errors = heights - lows, highs - heights
        axes.bar(places, heights, yerr=errors, label=f"policy of {policy}", **look)
    middle = np.arange(len(kinds)) + 0.4 * (len(policies) - 1) / len(policies)
    axes.set_xticks(middle, [kind.replace(", ", ",\n") for kind in kinds], fontsize=8)
    axes.set(xlabel="kind of gradient", ylabel=said)
    title = f"IQM of {len(result['seeds'])} seeds, 95 % interval"
    axes.set_title(title, fontsize=10)
    axes.figure.legend(loc="outside upper center", ncols=3)
    axes.figure.savefig(path, dpi=120)
