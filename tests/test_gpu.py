"""benchmarks/gpu.py and memory.py without a GPU: all of it but CUDA itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, script_path, small_qwen3

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import memory

STEPS = "grpo", "dmpo", "prefixrl", "vopd"
QUICK = "rollout", "generate", "exact", "memory", "cartpole", "base-model", "countdown"
QUICK += "env_speed", "decode", "estimator_cost", "compilation"


@pytest.fixture
def run(ranks, tmp_path):
    """run(*flags): the command line's exit code, what it left and what it said."""

    def call(*flags, **env) -> tuple[int, dict, str]:
        words = "--smoke", "--out", tmp_path, *flags
        pids = ranks.start(1, ROOT / "benchmarks/gpu.py", *words, cwd=tmp_path, **env)
        [code] = ranks.wait(pids, seconds=500)
        result = json.loads((tmp_path / "gpu-smoke.json").read_text())
        return code, result, (tmp_path / "out").read_text()

    return call


def numbers(found: dict, path: str = ""):
    """All numbers of a tree with their paths."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            yield f"{path}/{key}", value


def test_a_part_that_only_a_gpu_can_break(run):
    """A benchmark that is run for the first time on a borrowed machine fails there on a
    misspelt name. Each part runs in small on the CPU; each speed, time and size is one
    that was measured: finite, not 0, and not the same twice."""
    names = [*QUICK, *(f"step-{name}-0.6B" for name in STEPS), "step-vopd-1.7B"]
    names.append("flags-16gb")  # test_lora.py has those with an adapter
    assert set(names) < set(gpu.PARTS)
    code, result, _ = run("--parts", *names)
    errors = {name: row["error"] for name, row in result["parts"].items()}
    assert errors == dict.fromkeys(names)
    assert code == 0 and result["smoke"]
    parts = {name: row["found"] for name, row in result["parts"].items()}
    speeds = []
    for name, row in result["parts"].items():
        assert row["seconds"] > 0 and list(numbers(row["found"])), name
        for path, value in numbers(row["found"]):
            assert math.isfinite(value), (name, path)
            if "second" in path or "bytes" in path or "peak" in path:
                assert value > 0, (name, path)
            speeds += [value] if "second" in path else []
    assert len(set(speeds)) == len(speeds) > 40
    for batch in 4, 8:
        assert parts["rollout"][f"batch {batch}"]["tokens"] <= 8 * batch
    assert parts["rollout"]["delta_logp"]["max"] < 1e-5
    assert parts["rollout"]["batch 8, other lengths"]["tokens"] <= 8 * 8
    assert {*parts["exact"]} == {*STEPS, "ppo_envs", "next_values"}
    assert {*memory.CASES} < {*parts["memory"]}
    for name in STEPS:
        row = parts[f"step-{name}-0.6B"]
        assert 0 < row["tokens"] <= 2 * 8 * 8 and row["stats"]["relative_update"] > 0
    assert "--gradient-checkpointing" in parts["flags-16gb"]["flags"]
    large, small = (parts[f"step-vopd-{x}"]["parameters"] for x in ("1.7B", "0.6B"))
    assert large > 2 * small


def test_one_part_takes_the_others_with_it(run, tmp_path):
    """Eight minutes on a GPU are lost if the first error, a CUDA fault or a part that
    hangs ends the command. Each leaves its line, what it had started ends with it, the
    others run, and the exit code says that not all went well."""
    algos = Path(shutil.copytree(script_path("grpo").parent, tmp_path / "algos"))
    for name, line in (
        ("grpo", 'raise ValueError("the judge is down")'),
        ("dmpo", "os.kill(os.getpid(), 9)"),
        ("vopd", 'subprocess.run(["sleep", "977"])'),
    ):
        file = algos / f"{name}.py"
        text = file.read_text().replace("\ndef update(", "\ndef the_real_update(")
        text += f"\n\ndef update(*_):\n    {line}\n"
        file.write_text(text)
    parts = [f"step-{name}-0.6B" for name in STEPS]
    env = dict(ONEFILE_ALGOS=str(algos))
    code, result, _ = run("--parts", *parts, "--seconds", "25", **env)
    errors = [row["error"] for row in result["parts"].values()]
    assert errors[0] == "ValueError: the judge is down"
    assert "exit code -9" in errors[1] and errors[2] is None
    assert "not done after" in errors[3] and code == 1
    assert result["parts"][parts[2]]["found"]["seconds_update"] > 0
    processes = Path("/proc").glob("[0-9]*/cmdline")
    assert not any("sleep\x00977" in file.read_text() for file in processes)


def test_time_of_a_part_is_taken_beside_another(monkeypatch):
    """Checks may share the GPU if they fit into its memory, what is timed may not. If
    the command is ended, what runs leaves its line and no process."""
    spans, rows = {}, {}

    def part(name: str, seconds: float):
        def sleep(_, report: Callable) -> None:
            report(start=time.perf_counter(), pid=os.getpid())
            time.sleep(seconds)
            report(end=time.perf_counter())

        return {name: (sleep, 10)}

    def end(name: str, spent: float, error: str | None) -> None:
        found = json.loads(Path(gpu.WORK, f"{name}.json").read_text())
        spans[name], rows[name] = found, (spent, error)

    parts = part("a", 0.6) | part("b", 0.6) | part("timed", 0.3) | part("c", 0.1)
    monkeypatch.setattr(gpu, "PARTS", parts | part("large", 0.1) | part("long", 9))
    monkeypatch.setattr(gpu, "SHARED_GB", dict.fromkeys("abc", 8) | {"large": 9})
    gpu.measure([*"ab", "timed", "c", "large"], gpu.SMOKE, 60, 1, 16, end)
    assert {error for _, error in rows.values()} == {None} and len(rows) == 5
    assert spans["a"]["start"] < spans["b"]["start"] < spans["a"]["end"]
    last = max(spans[name]["end"] for name in "ab")
    assert last < spans["timed"]["start"] < spans["timed"]["end"] < spans["c"]["start"]
    assert spans["c"]["end"] < spans["large"]["start"]
    gpu.measure(["timed", "c"], gpu.SMOKE, 60, 1, math.inf, end)
    assert spans["timed"]["end"] < spans["c"]["start"]
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(143))
    signal.setitimer(signal.ITIMER_REAL, 1)
    with pytest.raises(SystemExit):
        gpu.measure(["long", "c"], gpu.SMOKE, 60, 1, math.inf, end)
    assert rows["long"][1] == "the command was ended" and rows["long"][0] < 5
    with pytest.raises(ProcessLookupError):
        os.kill(spans["long"]["pid"], 0)


def test_part_that_is_run_again_erases_the_others(run, tmp_path):
    """A second command for what found no time would write a file of that part alone if
    the code had been edited since: it ends in one line instead."""
    file = tmp_path / "gpu-smoke.json"
    assert run("--parts", "base-model")[0] == 0
    before = json.loads(file.read_text())
    assert {*before["parts"]} == {"base-model"}
    file.write_text(json.dumps(before | {"code": {}}))
    code, result, said = run("--parts", "decode")
    assert code and "is of another machine, other code" in said
    assert result == before | {"code": {}}
    file.write_text(json.dumps(before))
    code, result, _ = run("--parts", "decode")
    assert code == 0 and {*result["parts"]} == {"base-model", "decode"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_numbers_of_a_cpu_called_a_gpus(ranks, tmp_path):
    """Without a GPU and without --smoke there is one line and no file."""
    words = ROOT / "benchmarks/gpu.py", "--out", tmp_path / "results"
    assert ranks.run(1, *words, cwd=tmp_path) == [1]
    assert not [*(tmp_path / "results").iterdir()]
    assert (tmp_path / "out").read_text().startswith("error: there is no GPU")


FLAGS = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from conftest import load_script
print(sys.modules["tyro"].__file__)
for name, *words in json.loads(sys.argv[2]):
    sys.argv = [name, *words]
    print(json.dumps(dataclasses.asdict(load_script(name).read_flags())))
"""


def test_stand_in_for_tyro_reads_other_flags(tmp_path, monkeypatch):
    """Where tyro is not installed a few lines read the flags: as tyro does."""
    (tmp_path / "tyro.py").write_text(gpu.TYRO)
    jobs = [
        ["grpo", "--seed", "7", "--advantage-scale", "none", "--clip-low", "0.5"],
        ["dmpo", "--dm-only", "--learning-rate", "0.25", "--run-dir", "a b"],
        ["prefixrl", "--max-flops", "1e9", "--no-track"],
        ["vopd", "--estimator", "full"],
        ["ppo_envs", "--num-envs", "64", "--rollout-length", "8"],
    ]
    code = FLAGS.replace("print(sys", "import tyro\nprint(sys")
    command = [sys.executable, "-c", code, Path(__file__).parent, json.dumps(jobs)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    file, *lines = done.stdout.splitlines()
    assert file == str(tmp_path / "tyro.py") and len(lines) == len(jobs), done.stderr
    for line, (name, *words) in zip(lines, jobs):
        monkeypatch.setattr(sys, "argv", [name, *words])
        wanted = dataclasses.asdict(load_script(name).read_flags())
        assert json.loads(line) == wanted


@pytest.mark.parametrize("name", STEPS)
def test_model_on_a_gpu_is_tried_with_ids_of_the_cpu(name):
    """gpu.py makes its models on the device: the trial of a loaded model has its ids
    there. (A meta tensor is on no CPU either; it has no values to compare.)"""
    with torch.device("meta"):
        model = small_qwen3(40)
    devices = []
    note = lambda _, inputs: devices.append(inputs[0].device.type)
    model.get_input_embeddings().register_forward_pre_hook(note)
    with pytest.raises(RuntimeError, match="meta"):
        load_script(name).check_scores(model)
    assert set(devices) == {"meta"}


# ------------------------------------- memory.py --------------------------------------


def small(**changes) -> argparse.Namespace:
    """Flags of a measurement that takes no time."""
    flags = dict(device="cpu", tokens=64, vocab=300, hidden=128, repeats=1)
    return argparse.Namespace(**flags | dict(cases=memory.CASES) | changes)


def test_peak_of_what_was_freed_before_or_is_free_again():
    """The resident set when a call returns has forgotten its peak; the peak of the
    process remembers the making of the model. A call that holds 300 MB for a moment
    needs 300 MB, though more was in use before it."""
    sizes = iter((2**28, 75 * 2**20))  # the trial's 1 GB is gone when it counts

    def way(*_):
        return torch.ones(next(sizes)).sum() * 0 + 1

    found = memory.in_process(memory.measure, "grpo", way, small())
    assert found["bytes"] == pytest.approx(300 * 2**20, rel=0.05)


def test_what_does_not_fit_is_measured_as_what_did(monkeypatch):
    """Whole logits for which memory runs out: the kernel's kill would end the
    measurement, and the peak until then, as if it were all, flatters nobody but them.
    What was held and what could not be had, 1.25 GB here, is a bound, not a time."""
    real, rows = memory.ours, {}

    def naive(*batch):
        held = torch.ones(2**26)
        return real(*batch) + held.sum() + torch.ones(2**28).sum()

    monkeypatch.setattr(memory, "free_memory", lambda: 2**29)
    monkeypatch.setattr(memory, "naive", naive)
    memory.compare(small(cases=["grpo"]), rows.__setitem__)
    row = rows["grpo"]
    assert row["naive"]["needs_more_than"] == pytest.approx(1.25 * 2**30, rel=0.02)
    assert not {"time_ratio", "memory_ratio"} & {*row}
    least = row["ours"]["bytes"] / row["naive"]["needs_more_than"]
    assert row["memory_ratio_below"] == least
    row["ours"] |= {"bytes": 2**28, "seconds": 3.0}
    row |= {"memory_ratio_below": 0.2, "naive": {"needs_more_than": 5 * 2**28}}
    shown = ["0.25", "more than 1.25", "below 0.20", "3.0", "no room", ""]
    assert memory.cells(row) == shown
    monkeypatch.setattr(memory, "ours", naive)
    with pytest.raises(RuntimeError, match="grpo: the script itself does not fit"):
        memory.compare(small(cases=["grpo"]), rows.__setitem__)


def test_ratio_to_another_loss(monkeypatch):
    """Two ways that compute different things are no comparison: a script whose loss is
    not that of whole logits ends the measurement."""
    rows, real, cases = {}, memory.ours, ["dmpo", "vopd full"]
    large = dict(tokens=2048, vocab=8192)  # 67 MB: never served from what was freed
    memory.compare(small(cases=cases, **large), rows.__setitem__)
    assert {*rows} == {"dmpo", "vopd full"}
    for row in rows.values():
        assert row["memory_ratio"] == row["ours"]["bytes"] / row["naive"]["bytes"]
    monkeypatch.setattr(memory, "ours", lambda *x: 1.01 * real(*x))
    with pytest.raises(RuntimeError, match="dmpo: loss"):
        memory.compare(small(cases=["dmpo"]), rows.__setitem__)
