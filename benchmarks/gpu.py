"""Every measurement that needs an NVIDIA GPU, in one command of less than 8 minutes.

    python benchmarks/gpu.py --name h200 [--parts rollout step-grpo-0.6B ...]
    python benchmarks/gpu.py --smoke          every part in small, on a CPU

Nothing is downloaded: models have the shapes of Qwen3-0.6B and 1.7B and random weights,
whose samples hardly ever end by themselves. Nothing is needed beside torch,
transformers, numpy, matplotlib and tqdm, and peft for the flags of the smallest GPU;
where tyro is missing, a stand-in of 20 lines reads the scripts' flags. Each part is a
process of its own (a copy of this one, so that nothing is imported twice) with its own
time: one that fails or is late leaves its error and what it had measured, and the
others run. Those whose time does not matter run first, up to four of them side by side
if they fit into the GPU's memory. What finds no time is measured by a second command
with --parts, which leaves the other parts in the file as they are.
Writes benchmarks/results/gpu-<name>.json (runs/gpu-smoke.json) after each part; exit
code 1 if one failed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # imports begin no CUDA
BEGIN = time.perf_counter()  # the imports may take half a minute
try:
    import memory
    import torch
    import tqdm  # noqa: F401  the scripts need it
    import transformers
    from code_hash import code_hash
    from gpu_parts import PARTS, SHARED_GB, SMOKE, Sizes
except ImportError as e:
    sys.exit(f"error: {e}: pip install -r requirements.txt")

TYRO = """
import argparse, dataclasses, typing

def cli(kind, default=None, description=""):
    parser = argparse.ArgumentParser(description=description)
    hints, default = typing.get_type_hints(kind), default or kind()
    for field in dataclasses.fields(kind):
        hint, options = hints[field.name], typing.get_args(hints[field.name])
        flag = dict(default=getattr(default, field.name))
        if hint is bool:
            flag["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is typing.Literal:
            flag["choices"] = options
        else:
            flag["type"] = options[0] if options else hint
        parser.add_argument("--" + field.name.replace("_", "-"), **flag)
    return kind(**vars(parser.parse_args()))
"""
WORK = tempfile.mkdtemp(prefix="gpu-")
atexit.register(shutil.rmtree, WORK, ignore_errors=True)


def part_of(name: str, sizes: Sizes, file: Path) -> None:
    """One part, in its own process; what it reports is in the file at once."""
    os.setpgrp()  # with all that it starts it can be ended
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(AttributeError):  # Linux: it does not outlive main()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.chdir(WORK)
    found = {}

    def report(**values) -> None:
        found.update(values)
        file.with_suffix(".new").write_text(json.dumps(found))
        file.with_suffix(".new").replace(file)  # the part may be ended at any moment
        print(f"{name}: {json.dumps(values)[:300]}", flush=True)

    PARTS[name][0](sizes, report)


def card() -> tuple[str, float]:
    """The GPU's name and its memory in 2^30 bytes."""
    about = torch.cuda.get_device_properties(0)
    return about.name, about.total_memory / 2**30


def measure(
    parts, sizes: Sizes, seconds: float, slow: int, room: float, end: Callable
) -> None:
    """The parts, one after another or, where their time is not published, up to four
    side by side in `room` GB: end(part, its seconds, error or None) as each ends,
    whatever ends it."""
    waiting, running, begin = [*parts], {}, time.perf_counter()
    since = lambda start: time.perf_counter() - start

    def fits(part: str) -> bool:
        beside = {part, *running}
        shared = len(running) < 4 and beside <= SHARED_GB.keys()
        return not running or (shared and sum(map(SHARED_GB.get, beside)) <= room)

    try:
        while waiting or running:
            while waiting and fits(waiting[0]):
                part = waiting.pop(0)
                most = min(PARTS[part][1] * slow, seconds - since(begin))
                if most < 5:
                    end(part, 0.0, "no time was left")
                    continue
                job = memory.start(part_of, part, sizes, Path(WORK, f"{part}.json"))
                running[part] = time.perf_counter(), most, job
            done = connection.wait([pipe for *_, (_, pipe) in running.values()], 0.2)
            for part, (start, most, job) in [*running.items()]:
                error = f"not done after {most:.0f} s"
                if job[1] in done or since(start) > most:
                    del running[part]
                    try:
                        memory.finish(*job, 0)
                        error = None
                    except RuntimeError as e:
                        error = str(e) if job[1] in done else error
                    end(part, since(start), error)
    finally:
        for part, (start, _, job) in running.items():
            with contextlib.suppress(RuntimeError):
                memory.finish(*job, 0)
            end(part, since(start), "the command was ended")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="", help="of the machine, for the file")
    parser.add_argument("--smoke", action="store_true", help="in small, on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seconds", type=float, help="for all of it (default: 470)")
    parser.add_argument("--out", help="folder (default: benchmarks/results; runs)")
    flags = parser.parse_args()
    where = "runs" if flags.smoke else "benchmarks/results"
    out = Path(flags.out or memory.ROOT / where)
    out.mkdir(parents=True, exist_ok=True)
    sizes, slow = (SMOKE, 10) if flags.smoke else (Sizes(), 1)
    seconds = flags.seconds or 470 * slow
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was found is written
    # CUDA begins in the parts alone: a process that has begun it cannot be copied
    if not (flags.smoke or memory.in_process(torch.cuda.is_available)):
        sys.exit("error: there is no GPU here: --smoke runs every part on a CPU")
    try:
        import tyro  # noqa: F401
    except ImportError:
        Path(WORK, "tyro.py").write_text(TYRO)
        sys.path.insert(0, WORK)
        os.environ["PYTHONPATH"] = f"{WORK}:{os.environ.get('PYTHONPATH', '')}"
    gpu, room = "no GPU", math.inf
    if not flags.smoke:
        gpu, room = memory.in_process(card)
    result = {"hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}"}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"python": platform.python_version(), "smoke": flags.smoke}
    scripts = sorted(memory.ROOT.glob("algos/*.py"))
    result["code"] = {x.stem: code_hash([x.read_text()]) for x in scripts}
    result |= {"sizes": dataclasses.asdict(sizes), "parts": {}}
    name = flags.name or ("smoke" if flags.smoke else gpu.split()[-1].lower())
    file = out / f"gpu-{name}.json"
    if len(flags.parts) < len(PARTS) and file.exists():  # the others stay
        before = json.loads(file.read_text())
        known = ("hardware", "torch", "transformers", "code", "sizes")
        if any(before[key] != json.loads(json.dumps(result[key])) for key in known):
            what = "is of another machine, other code or other sizes"
            sys.exit(f"error: {file} {what}: give another --name, or run all parts")
        result["parts"] = before["parts"]

    def end(part: str, spent: float, error: str | None) -> None:
        row = {"ok": error is None, "seconds": spent, "error": error, "found": {}}
        if Path(WORK, f"{part}.json").exists():
            row["found"] = json.loads(Path(WORK, f"{part}.json").read_text())
        parts = result["parts"] | {part: row}
        result["parts"] = {name: parts[name] for name in PARTS if name in parts}
        print(f"{part}: {error or 'ok'}, {spent:.0f} s", flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n")

    seconds -= time.perf_counter() - BEGIN
    measure(flags.parts, sizes, seconds, slow, room, end)
    return int(not all(row["ok"] for row in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
