"""What benchmarks/prefix_gradients.py and gradient_variance.py say of gradients."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("scipy", reason="pip install -r benchmarks/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmarks"))


def load(name: str) -> ModuleType:
    """benchmarks/<name>.py as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "function"),
    [("prefix_gradients", "moments"), ("gradient_variance", "norms")],
)
def test_squared_mean_contains_the_noise(name, function):
    """|mean g|^2 of K gradients is too large by their variance / K: a signal is seen
    where there is none. Products of different batches alone have no such bias; a batch
    that a resample has twice is not its own partner."""
    rng = np.random.default_rng(0)
    g, index = rng.normal(size=(6, 4)), np.array([0, 3, 3, 5, 1, 3])
    pairs = [(i, j) for i in index for j in index if i != j]
    wanted = np.mean([g[i] @ g[j] for i, j in pairs])
    square, mean = getattr(load(name), function)(g @ g.T, index)
    assert mean == pytest.approx(wanted, abs=1e-12)
    assert square == pytest.approx(np.mean([g[i] @ g[i] for i in index]), abs=1e-12)


def test_snr_is_not_that_of_a_batch():
    """Gradients with the mean m and the covariance s^2 in d directions have the SNR
    |m|^2 / (d s^2), whatever their number; without a mean it is about 0, and where all
    are 0 there is neither."""
    module, flags = load("prefix_gradients"), SimpleNamespace(resamples=200)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(400, 50)))
    live = np.linspace(0.2, 0.4, 400)
    plain = 0.5 + 2.0 * noise
    row = module.summary(plain, live, plain, flags)
    assert row["snr"] == pytest.approx(50 * 0.25 / (50 * 4), rel=0.15)
    assert row["std"] == pytest.approx(np.sqrt(200), rel=0.05)
    assert row["live"] == pytest.approx(0.3) and row["cosine"] == pytest.approx(1)
    low, high = row["snr_interval"]
    assert low < 0.0625 < high
    row = module.summary(2.0 * noise, live, plain, flags)
    assert row["snr"] < 0.005 and row["norm"] > 10
    row = module.summary(0 * noise, 0 * live, plain, flags)
    assert row["snr"] == row["signal"] == row["live"] == 0 and row["cosine"] is None
