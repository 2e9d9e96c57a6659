"""benchmarks/env_speed.py and its table: what is measured beside what."""

from __future__ import annotations

import importlib.util
import signal
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import env_speed
import readme


def test_a_missing_peer_ends_the_benchmark(monkeypatch, capsys):
    """Without PufferLib and JAX one line says so of each; the others are measured, each
    with what it is."""

    def peer(num_envs: int) -> tuple:
        """Does
        nothing."""
        return lambda: None, 2**15

    monkeypatch.setattr(env_speed, "START", "fork")  # with what is patched here
    for name in ("ours", "gymnasium_loop", "stable_baselines3"):
        monkeypatch.setattr(env_speed, name, peer)
    for name in ("pufferlib", "jax"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    found = env_speed.in_turns(8, rounds=2)
    assert list(found) == ["ours", "ours, 64", "gymnasium loop", "Stable-Baselines3"]
    assert {row["what"] for row in found.values()} == {"Does nothing."}
    lines = capsys.readouterr().out.splitlines()
    left_out = [line for line in lines if "is left out" in line]
    assert [line.split()[0] for line in left_out] == ["JAX", "PufferLib"]


def test_pufferlib_does_other_work(tmp_path, monkeypatch):
    """Its iteration takes as many steps and updates as the other peers', with networks
    of their sizes."""
    if not importlib.util.find_spec("pufferlib"):
        pytest.skip("see benchmarks/env_speed.py")
    monkeypatch.chdir(tmp_path)  # its import leaves a link there
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handler = signal.getsignal(signal.SIGINT)
    iteration, count = env_speed.pufferlib_ppo(64)
    signal.signal(signal.SIGINT, handler)
    trainer = iteration()
    assert trainer.global_step == count == 64 * env_speed.LENGTH
    updates = {int(x["step"]) for x in trainer.optimizer.state.values()}
    assert updates == {env_speed.EPOCHS * count // env_speed.MINIBATCH}
    sizes = [x.shape for x in trainer.policy.parameters() if x.ndim == 2]
    assert sizes == [(64, 4), (64, 64), (2, 64), (64, 4), (64, 64), (1, 64)]


def test_table_turns_a_ratio_round_or_takes_the_wrong_ours():
    """Ours is twice as fast as a peer with as many environments, by the clock, and four
    times by processor time: 2 and 4, from the rounds, not from other rows."""
    row = lambda n, wall, cpu, speed: {
        "num_envs": n,
        "steps_per_second": speed,
        "seconds": [[wall, cpu], [2 * wall, cpu], [wall, cpu]],
    }
    found = dict(epochs=1, minibatch=2, threads=1, rollout_length=3, ours={})
    found |= {"cores used": 1, "load before": 0.0, "load after": 0.0}
    names = "env_steps_per_second", "act_steps_per_second", "steps_per_second"
    found["ours"]["4096"] = dict(zip(names, (3e6, 2e4, 1e3)), rollout_length=8)
    found["in turns"] = {"ours": row(9, 50.0, 50.0, 7.0)}
    found["in turns"] |= {"ours, 64": row(64, 1.0, 1.0, 1000.0)}
    found["in turns"] |= {"Peer": row(64, 2.0, 4.0, 500.0)}
    found["in turns"]["Peer"]["seconds"][2][0] = 5.0
    text = readme.numbers("env_speed", found)
    assert "| 4,096 | 8 | 3,000,000 | 20,000 | 1,000 |\n" in text
    ratios = "2.00 (2.00 to 5.00) | 4.00 (4.00 to 4.00) |\n"
    assert f"| Peer | 64 | 1,000 | 500 | {ratios}" in text
    assert text.count("\n\n| ") == 2 and "ours, 64" not in text
