"""What benchmarks/prefix_gradients.py and gradient_variance.py say of gradients."""

from __future__ import annotations

import importlib.util
import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

pytest.importorskip("scipy", reason="pip install -r benchmarks/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmarks"))


def load(name: str) -> ModuleType:
    """benchmarks/<name>.py as a module."""
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_squared_mean_contains_the_noise():
    """|mean g|^2 of K gradients is too large by their variance / K: a signal is seen
    where there is none. Products of different batches alone have no such bias."""
    g = np.random.default_rng(0).normal(size=(6, 4))
    mean = np.mean([g[i] @ g[j] for i in range(6) for j in range(6) if i != j])
    square = np.mean([x @ x for x in g])
    expected = pytest.approx((square, mean), abs=1e-12)
    assert load("gradients").moments(g @ g.T) == expected


def test_noise_is_taken_for_bias():
    """With few batches an unbiased estimator's mean is off that of `full` by its noise:
    its squared bias is about 0, a shift that is there is found, and the variances
    compare as those of the distributions do."""
    rng = np.random.default_rng(2)
    full = 0.3 + 0.1 * torch.from_numpy(rng.normal(size=(300, 40)))
    noise = torch.from_numpy(rng.normal(size=(300, 40)))
    of = {"full": full, "sampled": full + noise, "vopd": full + 0.5 * noise}
    rows = load("gradient_variance").compare(of | {"clip": full + 0.2})
    assert abs(rows["sampled"]["bias_squared"]) < 0.01 < (noise.mean(0) ** 2).sum()
    assert rows["clip"]["bias_squared"] == pytest.approx((0.2 / 0.3) ** 2, rel=0.05)
    assert rows["full"]["bias_squared"] == 0 and rows["sampled"]["ratio"] == 1
    assert rows["vopd"]["ratio"] == pytest.approx(0.26 / 1.01, rel=0.1)
    assert rows["clip"]["ratio"] == pytest.approx(rows["full"]["ratio"])


@pytest.mark.parametrize("kind", ["plain", "prefix 40-80 %"])
def test_batches_of_one_epoch_are_taken_for_independent(kind, monkeypatch):
    """Batches of one epoch share no problem, so their gradients are further apart than
    independent ones, and |E g| from pairs of them is too small. Of 12 problems two
    independent batches of 4 have none in common in 14 % of cases, not in two thirds."""
    program, script, drawn = load("prefix_gradients"), load_script("prefixrl"), []

    def sample_batch(model, tokenizer, batch, *_):
        drawn.append({x.problem.answer for x in batch})
        return SimpleNamespace(texts=["a"] * len(batch) * 8), 1.0, 0

    def update(model, reference, keep, *_):
        keep.gradient = torch.zeros(1)

    monkeypatch.setattr(script, "sample_batch", sample_batch)
    monkeypatch.setattr(script, "update", update)
    pool = [script.Exercise([5], script.Problem("p", i)) for i in range(12)]
    monkeypatch.setattr(script, "cut_prefixes", lambda *_: pool)
    tokenizer, model = SimpleNamespace(eos_token_id=1), torch.nn.Linear(1, 1)
    model.generation_config = SimpleNamespace(eos_token_id=1)
    reward = lambda problem, text: 0.0
    around = tokenizer, pool, reward, kind, script.Args(prompts_per_step=4)
    program.gradients(script, model, *around, 100)
    assert all(len(batch) == 4 for batch in drawn)
    apart = [not a & b for a, b in itertools.pairwise(drawn)]
    assert 0.05 < np.mean(apart) < 0.3
    assert np.unique([sorted(x) for x in drawn]).size == 12


def test_snr_is_not_that_of_a_batch():
    """Gradients with the mean m and the covariance s^2 in d directions have the SNR
    |m|^2 / (d s^2), whatever their number; without a mean it is about 0, and where all
    are 0 there is neither."""
    module = load("prefix_gradients")
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(400, 50)))
    live = np.linspace(0.2, 0.4, 400)
    plain = 0.5 + 2.0 * noise
    row = module.summary(plain, live, plain)
    assert row["snr"] == pytest.approx(50 * 0.25 / (50 * 4), rel=0.15)
    assert row["std"] == pytest.approx(np.sqrt(200), rel=0.05)
    assert row["live"] == pytest.approx(0.3) and row["cosine"] == pytest.approx(1)
    row = module.summary(2.0 * noise, live, plain)
    assert row["snr"] < 0.005 and row["norm"] > 10
    row = module.summary(0 * noise, 0 * live, plain)
    assert row["signal"] == row["live"] == 0 and row["snr"] is row["cosine"] is None


def test_time_of_an_interrupted_seed_is_short(tmp_path, monkeypatch):
    """The seconds of a seed are those of all its work. Where some was there already,
    from a call that was interrupted, they are not known; what was measured is not
    measured again."""
    module, calls = load("gradients"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    monkeypatch.setattr(module, "load_script", lambda name: name)

    def measure(script, seed, flags):
        calls.append(seed)
        return {"step 0": {"plain": {"snr": float(seed)}}}

    code = module.claims.code_now("prefixrl", "default")
    (tmp_path / "work" / code / "s2" / "run-50").mkdir(parents=True)
    flags = ["--seeds", "1", "2", "--work", str(tmp_path / "work"), "--out", "out"]
    flags += ["--claims-work", str(tmp_path / "claims")]
    for _ in range(2):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prefix_gradients.py", *flags])
        module.measure_seeds(measure, "prefixrl", "Doc.", batches=2)
        found = json.loads((tmp_path / "out/prefix_gradients.json").read_text())
        assert found["seeds"]["2"] == {"step 0": {"plain": {"snr": 2.0}}}
        assert found["seconds"]["1"] >= 0 and found["seconds"]["2"] is None
    assert calls == [1, 2]


RUN = """
import json, os, sys
folder, *flags = sys.argv[2:]
os.makedirs(folder + "/checkpoint")
open("calls", "a").write(" ".join(flags) + "\\n")
if os.path.exists("interrupt"):
    os.remove("interrupt")
    sys.exit(130)
"""


def test_interrupted_run_counts_as_finished(tmp_path, monkeypatch):
    """A checkpoint is there long before the end of a run, and stays there under other
    flags: a policy of step 50 would be published as that of step 60."""
    module, calls = load("gradients"), lambda: Path("calls").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(RUN)
    script = ModuleType("script")
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "interrupt").touch()
    with pytest.raises(subprocess.CalledProcessError):
        module.run_until(script, 60, 1, "")
    assert (tmp_path / "run-60/checkpoint").exists()
    for more, count in (("", 2), ("", 2), ("--group-size 4", 3), ("", 4)):
        assert module.run_until(script, 60, 1, more) == Path("run-60")
        assert len(calls()) == count
    assert calls()[2] == calls()[3] + " --group-size 4"


def test_numbers_of_another_program_are_kept(tmp_path, monkeypatch):
    """An edit of what measures, or another version of torch, must not bring back the
    old numbers under today's date."""
    module, calls = load("gradients"), []
    monkeypatch.setattr(module, "draw", lambda *_: None)
    monkeypatch.setattr(module, "load_script", lambda name: name)
    argv = ["prefix_gradients.py", "--seeds", "1", "--work", str(tmp_path / "work")]
    argv += ["--claims-work", str(tmp_path / "claims"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    for count, value, torch_now in ((1, 1, "a"), (1, 1, "a"), (2, 2, "a"), (3, 2, "b")):
        file = tmp_path / "program.py"
        file.write_text(
            f"def measure(*_):\n    calls.append({value})\n    return {{}}\n"
        )
        program = runpy.run_path(str(file), {"calls": calls})
        monkeypatch.setattr(module.torch, "__version__", torch_now)
        module.measure_seeds(program["measure"], "prefixrl", "Doc.", batches=2)
        assert len(calls) == count


def test_models_are_made_a_second_time(tmp_path, monkeypatch):
    """What claims.py has cached for a seed is found, what is missing is left there for
    it, and a seed that had to make something does not count as one that had not."""
    module = load("gradients")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    monkeypatch.setattr(module, "load_script", lambda name: name)
    for there in ("s1/runs/cache/tiny-1", "s2/runs/cache/traces"):
        (tmp_path / "claims/prefixrl" / there).mkdir(parents=True)

    def measure(script, seed, flags):
        module.Path(f"runs/cache/tiny-{seed}").mkdir(parents=True, exist_ok=True)
        return {}

    flags = ["--seeds", "1", "2", "--claims-work", "claims", "--out", "out"]
    for work, warm in (("a", False), ("b", True)):
        monkeypatch.chdir(tmp_path)
        argv = ["prefix_gradients.py", *flags, "--work", work]
        monkeypatch.setattr(sys, "argv", argv)
        module.measure_seeds(measure, "prefixrl", "Doc.", batches=2)
        found = json.loads((tmp_path / "out/prefix_gradients.json").read_text())
        assert found["cache_warm"] == {"1": True, "2": warm}
    assert (tmp_path / "claims/prefixrl/s2/runs/cache/tiny-2").exists()


@pytest.mark.parametrize(
    ("gap", "seeds", "said"),
    [
        ([0.3, 0.2, 0.4, 0.3, 0.2], 5, "replicated"),
        ([-0.3, -0.2, -0.4, -0.3, -0.2], 5, "not replicated"),
        ([0.01, -0.01, 0.02, 0.0, -0.02], 5, "not replicated"),
        ([0.3, -0.2, 0.4, -0.3, 0.2], 5, "inconclusive"),
        ([0.3, 0.2, 0.4], 3, "inconclusive"),
    ],
)
def test_seeds_are_compared_unpaired(gap, seeds, said):
    """Seeds whose plain values lie far apart: the difference is taken seed by seed, and
    fewer than five of them decide nothing."""
    rows = [{"plain": {"snr": x}, "prefix 40-80 %": {"snr": x + y}}
            for x, y in zip(np.linspace(0, 5, seeds), gap)]  # fmt: skip
    found = {"seeds": {str(i): {"step 50": row} for i, row in enumerate(rows)}}
    claim = load("claims").GRADIENT_CLAIMS["prefix_gradients"][0]
    judge = load("report").judge_gradients
    judged = judge(found, "step 50", claim)
    assert judged["verdict"] == said and judged["seeds"] == seeds
    # a seed without a gradient of one kind has no part, and shifts nobody's partner
    extra = {"plain": {"snr": None}, "prefix 40-80 %": {"snr": 9.0}}
    with_it = {"seeds": {"extra": {"step 50": extra}} | found["seeds"]}
    assert judge(with_it, "step 50", claim) == judged
    none = {"seeds": {"extra": {"step 50": extra}}}
    assert judge(none, "step 50", claim)["verdict"] == "not measured"
