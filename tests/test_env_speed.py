"""benchmarks/env_speed.py: what is measured beside what."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import env_speed


def test_a_missing_peer_ends_the_benchmark(monkeypatch, capsys):
    """Without PufferLib and JAX one line says so of each; the others are measured, each
    with what it is."""

    def peer(num_envs: int) -> tuple:
        """Does
        nothing."""
        return lambda: None, 2**15

    monkeypatch.setattr(env_speed, "START", "fork")  # with what is patched here
    for name in ("ours", "ours_eager", "gymnasium_loop", "stable_baselines3"):
        monkeypatch.setattr(env_speed, name, peer)
    for name in ("pufferlib", "jax"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    found = env_speed.in_turns(8, rounds=2)
    names = "ours", "ours, 64", "ours, 64, not compiled", "gymnasium loop"
    assert list(found) == [*names, "Stable-Baselines3"]
    assert {row["what"] for row in found.values()} == {"Does nothing."}
    lines = capsys.readouterr().out.splitlines()
    left_out = [line for line in lines if "is left out" in line]
    assert [line.split()[0] for line in left_out] == ["JAX", "PufferLib"]


def test_range_holds_the_step_that_compiles(monkeypatch):
    """Of the lines that the script logs, the first evaluation and the step that
    compiles are left out; the others give the median and its range."""
    speeds = [None, 1.0, 40.0, 20.0, 90.0]

    def run(command, **_):
        folder = Path(command[command.index("--run-dir") + 1])
        assert command[command.index("--steps") + 1] == "4"
        folder.mkdir()
        names = *env_speed.COUNTS, "peak_memory_gb"
        lines = [json.dumps(dict.fromkeys(names, x)) + "\n" for x in speeds]
        (folder / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(env_speed.subprocess, "run", run)
    row = env_speed.sweep(16, 3, 8, "on")
    assert {row[x] for x in env_speed.COUNTS} == {40.0}
    assert row["range"] == {x: [20.0, 90.0] for x in env_speed.COUNTS}


PUFFER = """
import json, torch, env_speed
iteration, count = env_speed.pufferlib_ppo(64)
trainer = iteration()
updates = {int(x["step"]) for x in trainer.optimizer.state.values()}
sizes = [list(x.shape) for x in trainer.policy.parameters() if x.ndim == 2]
print(json.dumps([trainer.global_step, count, list(updates), sizes]))
"""


def test_pufferlib_does_other_work(tmp_path):
    """Its iteration takes as many steps and updates as the other peers', with networks
    of their sizes. In a process of its own: it changes torch's precision, among other
    things, and leaves a link in the folder."""
    if not importlib.util.find_spec("pufferlib"):
        pytest.skip("see benchmarks/env_speed.py")
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}){PUFFER}"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    steps, count, updates, sizes = json.loads(said.stdout.splitlines()[-1])
    assert steps == count == 64 * env_speed.LENGTH
    assert updates == [env_speed.EPOCHS * count // env_speed.MINIBATCH]
    assert sizes == [[64, 4], [64, 64], [2, 64], [64, 4], [64, 64], [1, 64]]
