"""The evidence: statistics and verdicts against independent computations, runs that go
on where they stopped, and a README that says what the JSON files say."""

from __future__ import annotations

import fcntl
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from conftest import ROOT, load_script

pytest.importorskip("scipy", reason="needs benchmarks/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmarks"))
import claims
import earlier_sets
import readme
import report

# ------------------------------------ Statistics --------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 10, 13])
def test_iqm_keeps_the_extremes(n):
    """The mean of what is left when a quarter of the values, rounded down, is dropped
    at each end; the plain mean or the median would be other numbers."""
    values = np.random.default_rng(n).exponential(size=n)
    kept = sorted(values)[n // 4 : n - n // 4]
    assert report.iqm(values) == pytest.approx(sum(kept) / len(kept), abs=1e-12)


def test_interval_is_of_something_else():
    """All 5^5 resamples of 5 values can be enumerated, and all 6^6 of 6: the interval
    is between the 2.5 % and the 97.5 % quantile of their interquartile means, as the
    footnote says; with more than 5 seeds to the accuracy of random resamples."""
    values = np.array([0.1, 0.35, 0.2, 0.7, 0.44])
    every = [sorted(x)[1:4] for x in itertools.product(values, repeat=5)]
    low, high = np.quantile(np.mean(every, -1), [0.025, 0.975])
    wanted = pytest.approx(((0.2 + 0.35 + 0.44) / 3, low, high), abs=1e-12)
    assert report.interval(values) == wanted
    values = np.array([*values, 0.31])
    every = [sorted(x)[1:5] for x in itertools.product(values, repeat=6)]
    wanted = np.quantile(np.mean(every, -1), [0.025, 0.975])
    assert report.interval(values)[1:] == pytest.approx(wanted, abs=0.012)


def test_chance_decides_a_verdict():
    """Of all resamples of these five values 91 in 3,125 have an interquartile mean
    above 0, 2.9 %: the interval reaches above 0. Of 10,000 random ones it was 2.48 %,
    and a difference that is not there was published."""
    values, positive = [-0.257, -0.086, -0.314, 0.086, -0.429], 0
    for counts in itertools.product(range(6), repeat=5):
        if sum(counts) == 5:
            drawn = sorted(x for x, n in zip(values, counts) for _ in range(n))
            ways = math.factorial(5) // math.prod(map(math.factorial, counts))
            positive += ways * (sum(drawn[1:4]) > 0)
    assert positive == 91
    assert report.interval(values)[2] > 0


@pytest.mark.parametrize(("n", "least", "most"), [(5, 0.85, 0.95), (10, 0.91, 0.98)])
def test_interval_covers_less_than_the_footnote_says(n, least, most):
    """Of paired differences with a known centre, 91 % (5 seeds) and 93 % (10 seeds) of
    the intervals hold it: those numbers stand under every table."""
    rng, hits = np.random.default_rng(7), 0
    for _ in range(400):
        _, low, high = report.interval(rng.normal(0.3, 1.0, n))
        hits += low <= 0.3 <= high
    assert least <= hits / 400 <= most
    assert "91 % of cases with 5 seeds and in 93 % with 10" in " ".join(
        report.NOTE.split()
    )


def test_improvement_counts_ties_wrong():
    """Mann-Whitney's U over the number of pairs: wins and half of the ties, counted one
    by one; not the p-value, not the other side's U."""
    a, b = [1.0, 2.0, 2.0, 5.0, 0.3], [2.0, 1.0, 0.5, 2.0]
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert report.improvement(a, b) == pytest.approx(np.mean(pairs))
    assert report.improvement([3, 4], [1, 2]) == 1.0


R, N, U = "replicated", "not replicated", "inconclusive"


@pytest.mark.parametrize(
    ("low", "high", "kind", "expected"),
    [
        (0.2, 0.3, "higher", R),
        (0.001, 0.3, "higher", R),
        (0.001, 0.05, "higher", R),  # on the claimed side comes before the margin
        (0.0, 0.3, "higher", U),
        (-0.2, 0.3, "higher", U),
        (-0.2, 0.05, "higher", U),
        (-0.05, 0.05, "higher", N),
        (-0.3, -0.001, "higher", N),
        (-0.3, -0.2, "lower", R),
        (-0.05, 0.05, "lower", N),
        (0.2, 0.3, "lower", N),
        (-0.2, 0.3, "lower", U),
        (-0.05, 0.3, "not-lower", R),
        (-0.05, -0.01, "not-lower", R),  # it falls, but by less than the margin
        (-0.2, -0.01, "not-lower", U),  # a fall, whether by the margin is open
        (-0.3, -0.2, "not-lower", N),
        (-0.2, 0.3, "not-lower", U),
        (-0.1, 0.3, "not-lower", U),
        (-0.3, 0.05, "not-higher", R),
        (0.01, 0.2, "not-higher", U),
        (0.11, 0.2, "not-higher", N),
        (-0.3, 0.2, "not-higher", U),
        (-0.05, 0.05, "equal", R),
        (0.01, 0.09, "equal", R),
        (-0.05, 0.2, "equal", U),
        (-0.3, 0.3, "equal", U),
        (0.2, 0.3, "equal", N),
        (-0.3, -0.2, "equal", N),
        (float("nan"), float("nan"), "higher", U),
    ],
)
def test_verdict_breaks_its_rule(low, high, kind, expected):
    """Every case of the rule in claims.py, with a margin of 0.1."""
    assert report.verdict(low, high, kind, 0.1, seeds=5) == expected


def test_verdict_from_too_few_seeds():
    """Four seeds give no verdict, however clear the interval; none is not measured."""
    for kind in ("higher", "lower", "not-lower", "not-higher", "equal"):
        assert report.verdict(0.02, 0.03, kind, 0.1, seeds=4) == "inconclusive"
        assert report.verdict(0.02, 0.03, kind, 0.1, seeds=0) == "not measured"
    with pytest.raises(ValueError, match="between"):
        report.verdict(0.0, 1.0, "between", 0.1, seeds=5)


def record(arm: str, seed: int, **columns: list[float]) -> dict:
    """A run with these columns over its evaluations; e__x stands for eval/x."""
    names = [name.replace("e__", "eval/") for name in columns]
    lines = [dict(zip(names, values)) for values in zip(*columns.values())]
    lines = [{"step": 10 * i} | line for i, line in enumerate(lines)]
    about = dict(hardware="2 CPU cores, no GPU", torch="2", wall_seconds=9.0 + seed)
    about |= dict(flags=[], code="c0de", cache_warm=True)
    return about | {"arm": arm, "seed": seed, "evals": lines}


def asked(kind: str, a="a", b="b", margin=0.01, at="end", metric="eval/x"):
    """A claim."""
    return claims.Claim("DMPO: it holds", metric, a, b, kind, margin, at)


def test_arms_are_compared_without_their_seeds():
    """Seeds differ by 0.5, arms by 0.02 within each seed: paired the claim is clear,
    unpaired it would be lost. Seeds that only one arm has run do not count."""
    base, more = [0.5, 0.1, 0.3, 0.2, 0.4], [0.01, 0.02, 0.03, 0.05, 0.2]
    runs = [record("b", s, e__x=[0.0, x]) for s, x in enumerate(base)]
    both = [x + y for x, y in zip(base, more)]  # in another order of seeds than base
    runs += [record("a", s, e__x=[0.0, x]) for s, x in enumerate(both)]
    found = report.judge(runs, asked("higher"))
    # unpaired it would be 0.063, of sorted arms 0.060
    assert found["difference"] == pytest.approx(sum(more[1:4]) / 3)
    of = dict(zip(range(1, 7), [0.3, 0.1, 0.6, 0.2, 0.5, 0.4]))
    runs = [record("a", s, e__x=[0.0, of[s] + 0.02]) for s in of]
    runs += [record("b", s, e__x=[0.0, of[s] + 1e-4 * s]) for s in reversed(of)]
    found = report.judge([*runs, record("a", 9, e__x=[0, 0])], asked("higher"))
    assert found["verdict"] == "replicated"
    assert found["seeds"] == 6
    assert 0.019 < found["low"] < found["difference"] < found["high"] < 0.02
    assert 0.5 < found["better"] < 0.8  # unpaired, 0.02 is little
    below = report.judge(runs, asked("lower"))
    assert below["verdict"] == "not replicated"
    assert below["better"] == pytest.approx(1 - found["better"])


def test_sets_of_runs_are_averaged_across_seeds(monkeypatch, capsys):
    """Two sets of the same seeds are averaged seed by seed, each difference taken
    within its set; seeds that only the newer set has stand apart."""
    gains = {"old": [0.1, 0.2, 0.3, 0.4, 0.5], "": [0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1]}

    def runs_at(script, commit):
        first = 3 if commit else 1  # seeds 3 to 7 are in both
        pairs = list(enumerate(gains[commit], first))
        runs = [record("b", s, e__x=[0.0, s]) for s, _ in pairs]
        return runs + [record("a", s, e__x=[0.0, s + x]) for s, x in reversed(pairs)]

    monkeypatch.setattr(earlier_sets, "SETS", {"grpo": ("old", "")})
    monkeypatch.setattr(earlier_sets, "runs_at", runs_at)
    monkeypatch.setattr(claims, "CLAIMS", {"grpo": [asked("higher")]})
    monkeypatch.setattr(sys, "argv", ["earlier_sets.py"])
    earlier_sets.main()
    _, old, new, means, rest = capsys.readouterr().out.splitlines()
    assert "old" in old and "+0.300" in old and "of 5 seeds, replicated" in old
    assert "today" in new and "of 7 seeds" in new
    assert "+0.300 [+0.300, +0.300] of 5 seeds" in means
    assert "+0.800" in rest and "of 2 seeds, inconclusive" in rest


@pytest.mark.parametrize("script", claims.CLAIMS)
def test_claim_fails_and_nobody_says_what_was_tried(script):
    """A claim that is not replicated, or open, has its sentences on the result page."""
    runs = json.loads((claims.RESULTS / f"{script}.json").read_text())
    for claim in claims.CLAIMS[script]:
        known = claim.text in claims.EXPLANATIONS
        assert known or report.judge(runs, claim)["verdict"] == "replicated", claim


def test_run_that_was_continued_took_no_time():
    """A run that was interrupted has no wall time of its own. Where it logged a speed,
    600 transitions at 10 and 30 a second, half of them each, took 40 s."""
    speeds = dict(steps_per_second=[10.0, 30.0], transitions=[300, 600])
    runs = [record("a", seed, e__x=[0.0, 1.0], **speeds) for seed in (1, 2)]
    runs[0] |= dict(wall_seconds=None, cache_warm=None)
    assert report.logged_seconds(runs[0]) == pytest.approx(40)
    assert report.logged_seconds(record("a", 1, e__x=[0.0, 1.0])) is None
    said = "wall time of a run 11 to 11 s, 0.0 h summed, 1 resumed, not timed (by the "
    assert said + "speed they logged 40 to 40 s, 0.0 h summed)" in report.made_of(runs)


def test_base_is_another_run():
    """Against "base" a run is compared with its own first evaluation."""
    runs = [record("a", s, e__x=[s, 99.0, s + 0.2 + s / 1e3]) for s in range(1, 6)]
    found = report.judge(runs, asked("higher", b="base"))
    assert found["difference"] == pytest.approx(0.203)
    assert found["verdict"] == "replicated"


def test_curve_is_judged_by_its_end():
    """ "every": one evaluation outside the margin is enough against equality, and early
    leads and late lags do not cancel."""
    noise = [0.001 * s for s in range(5)]
    flat = [record("b", s, e__x=[0.5] * 4) for s in range(5)]
    near = [record("a", s, e__x=[0.5 + e] * 4) for s, e in enumerate(noise)]
    bent = [
        record("a", s, e__x=[0.5, 0.6 + e, 0.4 + e, 0.5]) for s, e in enumerate(noise)
    ]
    equal = asked("equal", margin=0.05, at="every")
    assert report.judge(near + flat, equal)["verdict"] == "replicated"
    found = report.judge(bent + flat, equal)
    assert found["verdict"] != "replicated"
    assert found["low"] < -0.09
    assert found["high"] > 0.09
    assert report.judge(bent + flat, asked("equal", margin=0.05))["verdict"] == R


def test_imitation_is_paid_for_before_it_has_taught():
    """The FLOPs of step 0 include imitation: along FLOPs the curve begins with what was
    measured after it, along steps (the base, above all) with what was before."""
    evals = [{"step": 0, "flops": 50, "eval/x": 0.0, "eval/y": 0.5, "sft/x": 0.25}]
    evals.append({"step": 9, "flops": 90, "eval/x": 0.75, "eval/y": 0.5})
    (x, y), (_, step) = (
        report.curve({"evals": evals}, "eval/x", at) for at in ("flops", "step")
    )
    assert (x.tolist(), y.tolist()) == ([50, 90], [0.25, 0.75])
    assert step.tolist() == [0.0, 0.75]
    assert report.curve({"evals": evals}, "eval/y", "flops")[1].tolist() == [0.5, 0.5]


def test_arms_are_compared_at_unequal_flops():
    """At equal FLOPs the longer run is read where the shorter ends, between its
    evaluations on the line; flops/2 reads A at half of B's total and B at its end. What
    A paid before its first evaluation buys it nothing."""
    a = record("a", 1, e__x=[0.0, 0.4, 0.8], flops=[100, 200, 300])
    b = record("b", 1, e__x=[0.0, 0.3], flops=[0, 250])
    at = lambda a, b, at: [
        float(v[0]) for v in report.pair(a, b, asked("higher", at=at))
    ]
    assert at(a, b, "flops") == pytest.approx([0.6, 0.3])
    assert at(b, a, "flops") == pytest.approx([0.3, 0.6])
    assert at(a, b, "flops/2") == pytest.approx([0.1, 0.3])
    assert at(a, b, "end") == pytest.approx([0.8, 0.3])
    late = record("a", 1, e__x=[0.1, 0.9], flops=[1000, 2000])
    assert at(late, b, "flops") == pytest.approx([0.1, 0.3])
    assert report.judge([record("a", 1, e__x=[0, 1])], asked("higher"))["seeds"] == 0


def test_missing_metric_counts_as_zero():
    """A metric that a run does not have is not measured; "x-y" is a difference."""
    runs = [record(arm, 1, e__x=[0.0, 0.5], e__y=[0.1, 0.2]) for arm in "ab"]
    assert report.judge(runs, asked("higher", metric="eval/z"))["seeds"] == 0
    runs[0]["evals"][-1]["eval/y"] = 0.1
    found = report.judge(runs, asked("higher", metric="eval/x-eval/y"))
    assert found["difference"] == pytest.approx(0.1)
    assert found["verdict"] == "inconclusive"  # one seed


# --------------------------------------- Runs -----------------------------------------

FAKE = '''
"""A script with a docstring."""
import argparse, json, os, signal, sys, time
from pathlib import Path


class Args:
    seed: int = 1
    steps: int = 20
    eval_every: int = 5
    eval_prompts: int = 256


parser = argparse.ArgumentParser()
for name in ("seed", "steps", "eval-every", "save-every", "eval-prompts", "bonus"):
    parser.add_argument(f"--{name}", type=int)
for name in ("run-dir", "resume", "task"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
with open("calls", "a") as calls:
    calls.write(json.dumps([args.run_dir, args.resume]) + chr(10))
signals = lambda *_: open("signals", "a").write("x")
signal.signal(signal.SIGINT, signals)
run = Path(args.run_dir or args.resume)
if args.resume:
    saved = json.loads((run / "args.json").read_text())["args"]
    done = int((run / "checkpoint/state.pt").read_text())
    kept = (run / "metrics.jsonl").read_text().splitlines(True)[: done + 1]
    (run / "metrics.jsonl").write_text("".join(kept))
else:
    saved = {"seed": args.seed, "steps": args.steps or 20, "run_dir": args.run_dir}
    saved |= {"bonus": args.bonus or 0, "threads": os.environ["OMP_NUM_THREADS"]}
    saved |= {"eval_prompts": args.eval_prompts, "resume": ""}
    done, cache = -1, Path("runs/cache/base")
    cache.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True)
    about = {"torch": TORCH, "hardware": "1 abacus", "commit": "none", "args": saved}
    (run / "args.json").write_text(json.dumps(about))
for step in range(done + 1, saved["steps"] + 1):
    line = {"step": step, "reward_mean": 0.5}
    if step % 5 == 0 or step == saved["steps"]:
        line["eval/x"] = step * 0.01 + saved["seed"] + saved["bonus"]
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps(line) + chr(10))
    (run / "checkpoint").mkdir(exist_ok=True)
    (run / "checkpoint/state.pt").write_text(str(step))
    if step == 7 and Path("die").exists():
        Path("die").unlink()
        os._exit(9)
    while step == 7 and Path("wait").exists():
        Path("pid").write_text(str(os.getpid()))
        Path("here").touch()
        time.sleep(0.05)
        if Path("signals").exists():
            time.sleep(0.5)
            sys.exit(130)
'''
SETUP = """
from __future__ import annotations
import sys
from pathlib import Path
sys.path.insert(0, {path!r})
import claims
{function}
fake_repository({root!r})
sys.exit(claims.main(sys.argv[1:]))
"""


def fake_repository(root: Path | str, put=setattr) -> None:
    """Let claims.py see one script with two arms, in place of the real ones."""
    metric, spec = "eval/x", "eval/x bonus default higher 0.02"
    put(claims, "ROOT", Path(root))
    put(claims, "RESULTS", Path(root, "results"))
    put(claims, "ARMS", {"fake": {"default": "", "bonus": "--bonus 1"}})
    put(claims, "QUICK", {"fake": "bonus"})
    put(claims, "METRICS", {"fake": metric})
    put(claims, "CLAIMS", {"fake": [claims.claim("DMPO: a bonus helps", spec)]})
    put(claims, "INSTALLED", {"torch": "1.0"})


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys):
    """A repository with one quick script in place of the real ones, and its harness:
    run() in this process, command() as a process of its own."""
    root, work = tmp_path / "repo", tmp_path / "work"
    (root / "algos").mkdir(parents=True)
    script, start = root / "algos" / "fake.py", tmp_path / "start.py"
    script.write_text(FAKE.replace("TORCH", '"1.0"'))
    parts = dict(path=str(ROOT / "benchmarks"), root=str(root))
    parts["function"] = inspect.getsource(fake_repository)
    start.write_text(SETUP.format(**parts))
    results = root / "results" / "fake.json"
    fake_repository(root, monkeypatch.setattr)
    handler = signal.getsignal(signal.SIGTERM)

    def flags(*own) -> list[str]:
        return ["fake", "--work", str(work), *own]

    def run(*own, code=0) -> str:
        capsys.readouterr()
        got, said = claims.main(flags(*own)), capsys.readouterr()
        assert got == code, said
        return said.out + said.err

    def command(*own) -> list[str]:
        return [sys.executable, str(start), *flags(*own)]

    def calls() -> int:
        files = work.rglob("calls")
        return sum(len(file.read_text().splitlines()) for file in files)

    def runs() -> list[dict]:
        return json.loads(results.read_text())

    parts = dict(root=root, work=work, script=script, results=results, runs=runs)
    yield SimpleNamespace(**parts, run=run, calls=calls, command=command)
    signal.signal(signal.SIGTERM, handler)


def test_finished_run_is_run_again(lab):
    """A run in the results file is not run again, not even when its work folder is
    gone; nor one whose work folder is whole, when the results file is gone. The first
    arm, which fills the caches, comes first for all seeds."""
    said = lab.run("--seeds", "2")
    assert lab.calls() == 4
    order = re.findall(r"runs, (\w+ s\d), about \d+ min left", said)
    assert order == ["default s1", "default s2", "bonus s1", "bonus s2"]
    first = lab.runs()
    assert [(r["arm"], r["seed"]) for r in first] == [
        ("default", 1), ("default", 2), ("bonus", 1), ("bonus", 2)
    ]  # fmt: skip
    lab.results.unlink()
    lab.run("--seeds", "2")
    assert lab.calls() == 4
    assert lab.runs() == first
    shutil.rmtree(lab.work)
    lab.run("--seeds", "2")
    assert lab.calls() == 0
    assert lab.runs() == first
    lab.run("--seeds", "3")
    assert lab.calls() == 2
    assert [r for r in lab.runs() if r["seed"] < 3] == first
    for name in ("flags", "seed", "code", "commit", "hardware", "wall_seconds"):
        assert first[2][name] is not None
    assert first[2]["flags"] == ["--bonus", "1"]
    assert [e["step"] for e in first[2]["evals"]] == [0, 5, 10, 15, 20]
    assert first[2]["evals"][-1]["eval/x"] == pytest.approx(2.2)


def test_interrupted_run_starts_anew(lab):
    """A run that died at step 7 is reported, not recorded, and goes on by --resume; its
    evaluations are those of an undisturbed run, its wall time is not known."""
    lab.run("--seeds", "1", "--arms", "default")
    whole = lab.runs()[0]
    shutil.rmtree(lab.work)
    lab.results.unlink()
    home = lab.work / "fake" / "s1"
    home.mkdir(parents=True)
    (home / "die").touch()
    said = lab.run("--seeds", "1", code=1)  # default dies, bonus is run all the same
    assert "default s1 failed: exit code 9" in said
    assert [r["arm"] for r in lab.runs()] == ["bonus"]
    lab.run("--seeds", "1")
    lines = [json.loads(x) for x in (home / "calls").read_text().splitlines()]
    assert [resume is not None for _, resume in lines] == [False, False, True]
    again = next(r for r in lab.runs() if r["arm"] == "default")
    assert again["evals"] == whole["evals"]
    assert again["wall_seconds"] is None
    assert whole["wall_seconds"] > 0


def test_changed_code_keeps_its_old_numbers(lab):
    """A run of other code is dropped and run again, and kept beside the new ones; a
    docstring or a comment changes nothing; with --keep-old it counts. Other versions of
    torch count as other code."""
    lab.run("--seeds", "1")
    old = lab.runs()
    text = lab.script.read_text()
    lab.script.write_text("# so\n" + text.replace("with a docstring", "with another"))
    lab.run("--seeds", "1")
    assert lab.calls() == 2
    assert lab.runs() == old
    lab.script.write_text(text.replace("step * 0.01", "step * 0.02"))
    lab.run("--seeds", "1", "--keep-old")
    assert lab.calls() == 2
    assert lab.runs() == old
    beside = lab.root / "again"
    lab.run("--seeds", "1", "--arms", "default", "--out", str(beside))
    assert lab.calls() == 3 and lab.runs() == old
    (again,) = json.loads((beside / "fake.json").read_text())
    assert again["evals"][-1]["eval/x"] == pytest.approx(1.4)
    lab.run("--seeds", "1", "--arms", "default")
    assert lab.calls() == 3  # it stands in the work folder
    (new,) = lab.runs()  # the other arm's old run is gone too
    assert json.loads(lab.results.with_suffix(".old.json").read_text()) == old
    assert new["code"] != old[0]["code"]
    assert new["evals"][-1]["eval/x"] == pytest.approx(1.4)
    lab.results.write_text(json.dumps([new | {"torch": "0.9"}]))
    said = lab.run("--seeds", "1", "--arms", "default")
    assert "1 runs of other code, flags or versions do not count" in said
    assert lab.runs() == [new]  # from the work folder


def test_edited_task_keeps_the_numbers_of_the_old_one(lab, monkeypatch):
    """The task of an arm is code that its results depend on, and a run finds the one
    of this checkout, whatever an earlier one left in the work folder."""
    task = lab.root / "benchmarks" / "tasks" / "easy.py"
    task.parent.mkdir(parents=True)
    task.write_text("level = 1")
    arms = {"default": "", "bonus": "--task tasks/easy.py"}
    monkeypatch.setitem(claims.ARMS, "fake", arms)
    old = lab.work / "fake" / "s1" / "tasks"
    old.parent.mkdir(parents=True)
    old.symlink_to(lab.work)
    lab.run("--seeds", "1")
    assert (old / "easy.py").read_text() == "level = 1"
    codes = {run["arm"]: run["code"] for run in lab.runs()}
    task.write_text("level = 2")
    lab.run("--seeds", "1")
    changed = {run["arm"] for run in lab.runs() if run["code"] != codes[run["arm"]]}
    assert changed == {"bonus"} and lab.calls() == 3


def test_first_quarter_of_a_run_is_run_again_or_counts_as_a_run(lab, monkeypatch):
    """An arm whose runs are the beginnings of another's has that one's evaluations, up
    to the quarter, and no process, time or entry in the number of runs of its own; it
    is cut anew from each new run."""
    whole = {"short": "--bonus 1", "bonus": "--bonus 1"}
    monkeypatch.setitem(claims.ARMS, "fake", {"default": "", **whole})
    monkeypatch.setattr(claims, "FIRST_QUARTER", {"short": "bonus"})
    lab.run("--seeds", "2", "--arms", "default,short")
    assert lab.calls() == 4
    runs = lab.runs()
    assert [r["arm"] for r in runs] == [x for x in claims.ARMS["fake"] for _ in "12"]
    short, bonus = runs[2], runs[4]
    assert short["evals"] == bonus["evals"][:2] and len(bonus["evals"]) == 5
    assert short["flags"] == ["--bonus", "1"] and short["wall_seconds"] is None
    walls = [r["wall_seconds"] for r in runs if r["arm"] != "short"]
    table = readme.numbers("hours", [])
    assert f"| `claims.py fake` | 4 runs | {sum(walls) / 3600:.1f} |" in table
    page = lab.results.with_suffix(".md").read_text()
    row = re.search(r"\| short \| .*", page)[0]
    assert row.startswith("| short | `--bonus 1` | 2 | first quarters of bonus | 0 |")
    assert f"{min(walls):.0f} to {max(walls):.0f} s" in page and "resumed" not in page
    assert "2 of 4 made a base model first" in page
    lab.script.write_text(lab.script.read_text().replace("* 0.01", "* 0.02"))
    lab.run("--seeds", "1")
    assert [r["evals"][1]["eval/x"] for r in lab.runs()[1:]] == [pytest.approx(2.1)] * 2


def test_arm_keeps_its_name_but_not_its_flags(lab, monkeypatch):
    """When an arm's flags change, its runs do not count, --keep-old or not."""
    lab.run("--seeds", "1")
    arms = {"fake": {"default": "", "bonus": "--bonus 2"}}
    monkeypatch.setattr(claims, "ARMS", arms)
    for flags in (["--keep-old"], []):
        lab.run("--seeds", "1", *flags)
        assert [r["flags"][-1:] for r in lab.runs()] == [[], ["2"]]
    assert lab.calls() == 3


def test_quick_run_is_published(lab):
    """--quick: two seeds and a tenth of the steps, in the work folder; no results file
    is written or read, and its runs are no evidence later."""
    lab.run("--quick")
    assert not lab.results.parent.exists()
    quick = json.loads((lab.work / "quick/results/fake.json").read_text())
    assert len(quick) == 4
    assert {r["args"]["steps"] for r in quick} == {2}
    assert {r["args"]["eval_prompts"] for r in quick} == {32}
    lab.run("--seeds", "1", "--arms", "default")
    assert lab.runs()[0]["args"]["steps"] == 20
    before = lab.results.read_bytes()
    lab.run("--quick")
    assert lab.results.read_bytes() == before
    assert len(list(lab.work.rglob("calls"))) == 3
    assert lab.calls() == 5


def test_arms_do_not_share_the_cache(lab):
    """The arms of a seed use one runs/cache; the first arm fills it, and its record
    says so, since the time for it is in its wall time."""
    lab.run("--seeds", "2", "--jobs", "2", "--arms", "default")
    lab.run("--seeds", "2", "--jobs", "2")
    assert len(list(lab.work.rglob("runs/cache"))) == 2
    warm = {(r["arm"], r["seed"]): r["cache_warm"] for r in lab.runs()}
    assert warm == {
        ("default", 1): False,
        ("default", 2): False,
        ("bonus", 1): True,
        ("bonus", 2): True,
    }
    threads = str(max(1, os.cpu_count() // 2))
    assert {r["args"]["threads"] for r in lab.runs()} == {threads}
    assert {str(r["threads"]) for r in lab.runs()} == {threads}


def test_record_holds_a_path_of_this_machine(lab):
    """No folder of this machine gets into the results."""
    lab.run("--seeds", "1")
    assert str(lab.work.parent) not in lab.results.read_text()


def until(happened) -> None:
    """Wait for it, at most 30 s."""
    for _ in range(600):
        if happened():
            return
        time.sleep(0.05)
    raise TimeoutError


def free(home: Path) -> bool:
    """Has the run let go of its lock?"""
    with next(home.glob("default-*.lock")).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_harness_leaves_its_runs_behind(lab, number):
    """Ctrl-C (which a terminal sends to all processes of the group) or kill stops the
    runs too, with one signal: a second would keep them from saving. The same command
    goes on with them."""
    home = lab.work / "fake" / "s1"
    home.mkdir(parents=True)
    (home / "wait").touch()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = lab.command("--seeds", "1")
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # nohup and & ignore Ctrl-C
    pipes |= dict(start_new_session=True, preexec_fn=heard)
    harness = subprocess.Popen(command, **pipes)
    until((home / "here").exists)
    own = os.getpgid(int((home / "pid").read_text()))
    assert own != os.getpgid(harness.pid)  # a terminal's Ctrl-C comes once, from us
    (os.killpg if number == signal.SIGINT else os.kill)(harness.pid, number)
    assert "the same command goes on" in harness.communicate(timeout=30)[1]
    assert harness.returncode == 130
    assert not lab.results.exists()
    assert (home / "signals").read_text() == "x"
    (home / "wait").unlink()
    lab.run("--seeds", "1")
    assert lab.calls() == 3
    assert len(lab.runs()) == 2


def test_run_that_outlived_its_harness_is_run_twice(lab):
    """After kill -9 of the harness its run goes on alone. A second harness leaves it
    alone, and takes the finished run over later."""
    home = lab.work / "fake" / "s1"
    home.mkdir(parents=True)
    (home / "wait").touch()
    flags = ["--seeds", "1", "--arms", "default"]
    harness = subprocess.Popen(lab.command(*flags))
    until((home / "here").exists)
    harness.kill()
    harness.wait()
    assert "another process is at" in lab.run(*flags, code=1)
    (home / "wait").unlink()
    folder = next(x for x in home.glob("default-*") if x.is_dir())
    until(lambda: claims.evaluations(folder) and free(home))
    lab.run(*flags)
    assert lab.calls() == 1
    assert lab.runs()[0]["wall_seconds"] is None


def test_code_that_was_edited_meanwhile_gets_the_old_hash(lab):
    """The hash is of what is run, not of what stood there when the harness began."""
    home = lab.work / "fake" / "s1"
    home.mkdir(parents=True)
    (home / "wait").touch()
    harness = subprocess.Popen(
        lab.command("--seeds", "1"), stdout=subprocess.PIPE, text=True
    )
    until((home / "here").exists)
    lab.script.write_text(lab.script.read_text().replace("0.01", "0.02"))
    (home / "wait").unlink()
    said = harness.communicate(timeout=30)[0]
    assert "bonus s1 failed: the program was edited meanwhile" in said
    assert [r["arm"] for r in lab.runs()] == ["default"]


SOURCE = '''
"""Doc."""
class A:
    """Doc."""
    x: int = 1  # comment
    def f(self, y=2):
        """Doc."""
        return f"{y:>3}" + "text"
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Doc.", "Another.", True),
        ("  # comment", "", True),
        ("x: int = 1", "x: int = (1)", True),
        ("x: int = 1", "x: int = 0", False),
        ("x: int = 1", "x: int = True", False),
        ("y=2", "y=3", False),
        ('"text"', '"test"', False),
        (":>3", ":>4", False),
        ("(self", "(me", False),
        ("return", "yield", False),
    ],
)
def test_hash_sees_comments_or_misses_code(old, new, same):
    """Comments, docstrings and layout do not change the hash, everything else does."""
    assert old in SOURCE
    changed = claims.code_hash([SOURCE.replace(old, new)])
    assert (changed == claims.code_hash([SOURCE])) == same


def test_wrong_answers_of_other_steps_are_counted(tmp_path):
    """The length of wrong answers is over the samples since the last evaluation, right
    ones left out; the first evaluation has none."""
    (tmp_path / "args.json").write_text(json.dumps({"args": {"steps": 4}}))
    evals = [{"step": s, "eval/x": 0.0} for s in (0, 2, 4)]
    lines = [evals[0], {"step": 1}, evals[1], {"step": 3}, evals[2]]
    samples = [{"step": 0}]
    for step, lengths in ((1, [1, 3]), (2, [5, 7]), (3, [20, 40]), (4, [60, 80])):
        texts = ["x" * n for n in lengths]
        samples.append({"step": step, "completions": texts, "rewards": [0.0, 1.0]})
    for name, records in (("metrics", lines), ("samples", samples)):
        text = "".join(json.dumps(x) + "\n" for x in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = [line.get("samples/wrong_length") for line in claims.evaluations(tmp_path)]
    assert found == [None, 3.0, 40.0]
    (tmp_path / "args.json").write_text(json.dumps({"args": {"steps": 5}}))
    assert claims.evaluations(tmp_path) == []


@pytest.mark.parametrize(("limit", "ended"), [(0.0, False), (7.0, True), (8.0, False)])
def test_run_that_spent_its_flops_is_not_over(tmp_path, limit, ended):
    """A run with --max-flops ends before --steps; it is not begun again for ever."""
    args = {"args": {"steps": 1000, "max_flops": limit}}
    (tmp_path / "args.json").write_text(json.dumps(args))
    lines = [{"step": s, "flops": 3.5 * s, "eval/x": 0.0} for s in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert (claims.evaluations(tmp_path) == lines) == ended


@pytest.mark.parametrize("script", sorted(claims.ARMS))
def test_claim_is_about_an_arm_that_is_not_there(script):
    """Claims and pictures name arms, papers and axes that exist, each claim differs,
    and the flags of every arm are flags of the script."""
    arms = claims.ARMS[script]
    assert next(iter(arms)) == "default"
    for claim in claims.CLAIMS[script]:
        if claim.at.startswith("ranks"):
            assert all(f"{name}-1024" in arms for name in claim.a.split("+"))
            assert claim.b in ("num_envs", "ddr") and "recipe-64" in arms
        else:
            assert claim.a in arms and claim.b in {*arms, "base"} - {claim.a}
        assert claim.text.partition(": ")[0] in claims.PAPERS
        assert claim.margin > 0
        report.verdict(0.0, 1.0, claim.kind, claim.margin, seeds=5)
        assert re.fullmatch(r"end|every|ranks(/\d+)?|flops(/2)?", claim.at)
    metrics = [x.removeprefix("eval/") for x in claims.METRICS[script].split()]
    assert all({x, re.sub(r"@\d+", "@k", x)} & report.MEANING.keys() for x in metrics)
    texts = [claim.text for claim in claims.CLAIMS[script]]
    assert len(set(texts)) == len(texts)
    for x, drawn, metrics in report.PICTURES[script].values():
        families = {name.rpartition("-")[0] for name in arms}
        drawable = families if x in ("num_envs", "ddr") else arms.keys()
        assert {*drawn.split()} <= drawable
        assert {x, metrics.split()[0]} <= report.AXES.keys()
    if (ROOT / "algos" / f"{script}.py").exists():
        for flags in arms.values():
            tyro.cli(load_script(script).Args, args=flags.split())


def test_rank_correlation_is_over_other_runs_than_it_says():
    """Spearman's rho by its definition, 1 - 6 sum(d^2) / (n (n^2 - 1)), over the arms
    of a family and the one that all families share; a seed that lacks an arm does not
    count; of ddr, one batch's, the median over the evaluations is ranked."""
    envs, runs = [16, 64, 256, 1024], []
    ends = {1: [1.0, 3.0, 2.0, 4.0], 2: [4.0, 3.0, 2.0, 1.0], 3: [1.0, 2.0, 3.0, 4.0]}
    ddrs = {1: [5.0, 6.0, 7.0, 8.0], 2: [8.0, 7.0, 5.0, 6.0], 3: [1.0, 2.0, 3.0, 4.0]}
    for seed, place in itertools.product(ends, range(4)):
        name = "recipe" if envs[place] == 64 else "size"
        d = ddrs[seed][place]
        columns = dict(
            e__x=[9.0, 9.0, ends[seed][place]], ddr=[d, d, 99 * (-1) ** place]
        )
        about = {"args": {"num_envs": envs[place]}}
        runs.append(record(f"{name}-{envs[place]}", seed, **columns) | about)
    runs.append(record("recipe-16", 9, e__x=[50.0]) | {"args": {"num_envs": 16}})
    runs = [r for r in runs if (r["arm"], r["seed"]) != ("size-16", 3)]
    rho = lambda d: 1 - 6 * sum(x * x for x in d) / (4 * 15)
    claim = asked("higher", a="size", b="num_envs", at="ranks")
    expected = [rho([0, 1, -1, 0]), rho([3, 1, -1, -3])]
    assert report.ranks(runs, claim) == pytest.approx(expected)
    found = report.judge(runs, claim)
    assert found["seeds"] == 2 and found["difference"] == pytest.approx(
        np.mean(expected)
    )
    assert found["better"] == 0.5 and found["verdict"] == "inconclusive"
    claim = asked("higher", a="size", b="num_envs", at="ranks/256")
    assert report.ranks(runs, claim) == pytest.approx([0.5, -1.0])  # of three
    claim = asked("higher", a="size", b="ddr", at="ranks")
    expected = [rho([0, 1, -1, 0]), rho([0, 0, -1, 1])]
    assert report.ranks(runs, claim) == pytest.approx(expected)
    assert (
        report.ranks(runs, asked("higher", a="size+recipe", b="ddr", at="ranks")) == []
    )


# -------------------------------------- README ----------------------------------------


def test_readme_and_results_disagree():
    """README.md and every results page say what the JSON files say."""
    assert readme.main(["--check"]) == 0


def test_verdicts_are_miscounted():
    """README.md counts the verdicts that stand in the rows of benchmarks/README.md."""
    top, page = ((ROOT / x).read_text() for x in readme.PAGES)
    part = r"<!-- (?:results|numbers):(\w+) -->(.*?)<!-- end -->"
    rows = rf"\| ({'|'.join(readme.VERDICTS)}) \|$"
    of = {
        name: re.findall(rows, text, re.M)
        for name, text in re.findall(part, page, re.S)
    }
    counted = (
        r"^\| `python benchmarks/(?:claims.py )?(\w+)(?:.py)?` \| (\d[\d| ]+\d) \|"
    )
    counts = {
        name: cells.split(" | ") for name, cells in re.findall(counted, top, re.M)
    }
    assert counts == {
        name: [str(found.count(verdict)) for verdict in readme.VERDICTS]
        for name, found in of.items()
        if found
    }


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """A README with a row and a part about grpo and vopd; grpo is measured."""
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    claims.RESULTS.mkdir()
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "grpo.py").write_text("steps = 1\n")
    names = {"e__pass@1": [0.1, 0.3], "e__pass@8": [0.4, 0.5]}
    runs = [
        record("default", s, **{k: [x + s / 100 for x in v] for k, v in names.items()})
        for s in range(1, 6)
    ]
    claims.write(runs, claims.RESULTS / "grpo.json")
    text = "# R\n\n| a | <!-- cell:grpo -->old<!-- end --> |\n"
    text += "| b | <!-- cell:vopd -->old<!-- end --> |\n\n<!-- results:grpo -->\n\n"
    text += "<!-- end -->\n\n<!-- picture:grpo -->x<!-- end -->\n\n"
    text += "<!-- numbers:vs_trl --><!-- end -->\n\nby hand\n"
    sides = {
        key: {"completions_per_second": 7, "peak_mb": 9} for key in ("ours", "trl")
    }
    found = {"cases": {"countdown": sides | {"ratios": [1.5, 2.5], "ratio": 2.0}}}
    found |= {"hardware": "none", "versions": {"trl": "1"}}
    found["settings"] = dict(prompts=2, group=4, max_new_tokens=8, threads=1)
    speeds = {key: {"gflops_per_second": 3} for key in ("rollout", "update")}
    found["limits"] = speeds | {"matrix_gflops_per_second": {"": 4}}
    (claims.RESULTS / "vs_trl.json").write_text(json.dumps(found))
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_readme_is_not_rewritten(papers):
    """The rewrite fills the marked parts alone, says what is not measured, is stable,
    and the check then passes."""
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0
    text = (papers / "README.md").read_text()
    assert "| b | <!-- cell:vopd -->not measured yet<!-- end --> |" in text
    assert "pass@1 +0.200 [+0.200, +0.200], 5 seeds<!-- end --> |" in text
    assert "| default | pass@1 | 5 | 0.130 | 0.330 [" in text
    assert "| 5 | +0.200 [+0.200, +0.200] | replicated |" in text
    picture = "![grpo, default: held-out problems solved (share), solved in 8 tries, "
    assert f"\n{picture}by training step (batches)](results/grpo.png)\n" in text
    assert text.startswith("# R\n") and text.endswith("\n\nby hand\n")
    assert "cost nothing | 7 | 7 | 2.00 (1.50 to 2.50) | 9 | 9 |" in text
    assert readme.main(["--check"]) == 0
    assert readme.main([]) == 0
    assert (papers / "README.md").read_text() == text


@pytest.mark.parametrize(
    "what", ["number", "verdict", "json", "page", "marker", "numbers"]
)
def test_edit_by_hand_is_not_seen(papers, what, capsys):
    """A number or verdict edited in the README, a page or results file edited without
    the rest, a results file that the README does not show: the check fails."""
    readme.main([])
    path, old, new = {
        "number": ("README.md", "0.330 [", "0.340 ["),
        "verdict": ("README.md", "replicated", "inconclusive"),
        "json": ("results/grpo.json", '"eval/pass@1": 0.35', '"eval/pass@1": 0.45'),
        "page": ("results/grpo.md", "**not measured**", "**replicated**"),
        "marker": ("README.md", "<!-- results:grpo -->", ""),
        "numbers": ("results/vs_trl.json", '"ratios": [1.5,', '"ratios": [1.6,'),
    }[what]
    text = (papers / path).read_text()
    assert old in text
    (papers / path).write_text(text.replace(old, new))
    assert readme.main(["--check"]) == 1
    assert "error: " in capsys.readouterr().err


def test_results_of_older_code_pass_for_todays(papers):
    """A script is edited and its numbers stay: README says so, of runs and of the other
    benchmarks, until they are measured anew; a comment makes nothing old."""
    runs, other = (papers / "results" / x for x in ("grpo.json", "vs_trl.json"))
    said = "1 of 5 runs are of older code.", "Measured with older code of grpo.py."
    now, found = claims.code_now("grpo", "default"), json.loads(other.read_text())
    records = [x | {"code": now} for x in json.loads(runs.read_text())]
    for code, expected in ((now, False), ("another", True)):
        claims.write([*records[:4], records[4] | {"code": code}], runs)
        other.write_text(json.dumps(found | {"code": code}))
        readme.main([])
        text = (papers / "README.md").read_text()
        assert [x in text for x in said] == [expected, expected]
    (papers / "algos" / "grpo.py").write_text("steps = 1  # batches\n")
    assert claims.code_now("grpo", "default") == now


def test_finding_is_written_for_another_verdict(papers, monkeypatch, capsys):
    """A sentence of the table of algorithms stands there only while its claim has the
    verdict that it was written for."""
    first, second, *_ = claims.CLAIMS["grpo"]
    row = [(first.text, "replicated", "It learns,"), (second.text, R, "all of it.")]
    monkeypatch.setitem(readme.FINDINGS, "grpo", row)
    (papers / "README.md").write_text("| <!-- findings:grpo --><!-- end --> |\n"
                                      "<!-- results:grpo --><!-- end -->")  # fmt: skip
    assert readme.main([]) == 0
    text = (papers / "README.md").read_text()
    assert text.startswith(
        "| <!-- findings:grpo -->It learns, all of it.<!-- end --> |"
    )
    monkeypatch.setitem(readme.FINDINGS, "grpo", [(first.text, N, "It does not.")])
    with pytest.raises(SystemExit, match=r"^error: .*is replicated: rewrite"):
        readme.main(["--check"])
    assert (papers / "README.md").read_text() == text


def test_cell_is_of_another_metric_or_arm():
    """The table of algorithms: shares of the way are means over the seeds of the
    default arm, the gain of held-out problems is not that of those trained on, and the
    worst seed is the worst at its end."""
    names = ("pass@1", "teacher_pass@1", "reverse_kl")
    ends = {
        1: [(0.1, 0.5, 0.4), (0.2, 0.9, 0.1)],
        2: [(0.2, 0.6, 0.5), (0.4, 0.9, 0.3)],
    }
    curves = {
        s: dict(zip((f"e__{x}" for x in names), zip(*v))) for s, v in ends.items()
    }
    runs = [record("default", seed, **curve) for seed, curve in curves.items()]
    runs += [record("full", 1, e__reverse_kl=[0.4, 0.0])]
    text = readme.cell("vopd", runs)  # (1/4 + 1/2) / 2 and (3/4 + 2/5) / 2
    assert "pass@1 +0.150 [" in text and "38% of its distance" in text
    assert "(mean of 2 seeds), and 58% of" in text
    two = {"e__hard_pass@1": [0.0, 0.5], "e__pass@1": [0.1, 0.3]}
    text = readme.cell("prefixrl", [record("default", s, **two) for s in range(5)])
    assert "+0.500 [+0.500, +0.500] on those trained on, +0.200 [+0.200" in text
    scores = [[9.0, 300.0], [20.0, 250.0, 400.0], [30.0, 260.0]]
    runs = [record("default", i, e__episode_return=x) for i, x in enumerate(scores)]
    assert "the worst of 3 seeds ends at a mean return of 260 of" in readme.cell(
        "ppo_envs", runs
    )


def test_run_without_a_time_counts_as_none(papers):
    """What all takes: a run that was resumed counts as the others of its arm do, or by
    the speed that it logged."""
    runs = [record("default", seed, e__x=[1.0]) for seed in (1, 2, 3)]
    runs += [record("long", 1, e__x=[1.0])]
    for run, wall in zip(runs, (3600.0, 7200.0, None, None)):
        run["wall_seconds"] = wall
    runs[3]["evals"] = [{"step": 1, "transitions": 3600, "steps_per_second": 0.5}]
    (claims.RESULTS / "grpo.json").write_text(json.dumps(runs))
    table = readme.numbers("hours", [])
    assert "| `claims.py grpo` | 4 runs | 6.5 |" in table
    assert "| all | two at a time | 6.5, 3.2 by the clock |" in table


def test_published_arm_has_too_few_seeds():
    """What is published has 5 seeds an arm, 10 if half of its runs took less than two
    minutes; and the commands beside a table make exactly the runs that it is of."""
    for script in claims.ARMS:
        found = ROOT / "benchmarks" / "results" / f"{script}.json"
        runs = json.loads(found.read_text())
        assert {run["arm"] for run in runs} == set(claims.ARMS[script])
        told = commanded(readme.results(script, runs))
        assert set(told) == {(run["arm"], run["seed"]) for run in runs}
        for arm in {run["arm"] for run in runs if "first_quarter_of" not in run}:
            walls = [run["wall_seconds"] for run in runs if run["arm"] == arm]
            fast = statistics.median(x or math.inf for x in walls) < 120
            assert len(walls) >= (10 if fast else 5), f"{script} {arm}"


def commanded(text: str):
    """(arm, seed) of each run that the commands at the head of a text make."""
    for command in re.search("`(.*?)`", text)[1].split(" && "):
        words = command.split()
        flags = dict(zip(words[3::2], words[4::2]))
        arms = flags.get("--arms", ",".join(claims.ARMS[words[2]])).split(",")
        for seed in range(1, int(flags["--seeds"]) + 1):
            yield from ((arm, seed) for arm in arms)


def test_explanation_is_printed_beside_a_replicated_claim(papers, monkeypatch):
    """What was tried when a claim fails is printed only where the verdict is not
    replicated or inconclusive."""
    first, _, third, *_ = claims.CLAIMS["grpo"]
    monkeypatch.setattr(
        claims,
        "EXPLANATIONS",
        {first.text: "first because", third.text: "third because"},
    )
    runs = readme.read("grpo")
    assert "because" not in claims.page("grpo", runs)  # third is not measured
    other = [run | {"arm": "updates-2"} for run in runs[:4]]
    assert "third because" in claims.page("grpo", runs + other)
    fourth = claims.CLAIMS["grpo"][3]
    both = {third.text: "a reason", fourth.text: "a reason"}
    monkeypatch.setattr(claims, "EXPLANATIONS", both)
    other += [run | {"arm": "updates-4"} for run in runs[:4]]
    page = claims.page("grpo", runs + other)
    said = f"{third.text}: **{U}**.\n{fourth.text}: **{U}**.\na reason"
    assert said in page and page.count("a reason") == 1
    assert "first because" not in claims.page("grpo", runs + other)


def test_picture_is_too_large_or_of_nothing(papers):
    """A picture of one line is drawn only where it is the script's own; none reaches
    200 kB, and those of arms that are gone go too."""
    runs = readme.read("grpo")
    other = [run | {"arm": "updates-2"} for run in runs]
    claims.write(runs + other, claims.RESULTS / "grpo.json")
    claims.write_pages(claims.RESULTS / "grpo.json")
    names = {path.name for path in claims.RESULTS.glob("*.png")}
    assert names == {"grpo.png", "grpo-updates.png"}
    claims.write(runs, claims.RESULTS / "grpo.json")
    claims.write_pages(claims.RESULTS / "grpo.json")
    assert [path.name for path in claims.RESULTS.glob("*.png")] == ["grpo.png"]
    for path in [*(ROOT / "benchmarks/results").glob("*.png"), *papers.rglob("*.png")]:
        assert path.stat().st_size < 200_000


def test_curves_of_unlike_runs_are_dropped_or_averaged_by_place():
    """Runs that end by FLOPs have other numbers of evaluations, each at its own cost:
    of straight lines through the same points the picture shows that line, within what
    all of them span; of runs with as many evaluations nothing is interpolated."""
    costs = [1.0, 2.0, 4.0, 9.0], [2.0, 5.0, 8.0], [0.5, 1.0, 2.0, 4.0, 10.0]
    pairs = [(np.array(x), 3 * np.array(x) + i) for i, x in enumerate(costs)]
    at, points = report.on_one_grid(pairs)
    assert at[0] == 2 and at[-1] == 8 and points.shape == (len(at), 3)
    assert np.allclose(points, 3 * at[:, None] + np.arange(3))
    steps = [(np.array([0, 50, 100]), np.array([0.0, y, 1.0])) for y in (0.2, 0.6)]
    at, points = report.on_one_grid(steps)
    assert at.tolist() == [0, 50, 100] and points[1].tolist() == [0.2, 0.6]


def test_table_turns_a_ratio_round_or_takes_the_wrong_ours():
    """Ours is twice as fast as a peer with as many environments, by the clock, and four
    times by processor time: 2 and 4, from the rounds, not from other rows."""
    row = lambda n, wall, cpu, speed: {
        "num_envs": n,
        "steps_per_second": speed,
        "seconds": [[wall, cpu], [2 * wall, cpu], [wall, cpu]],
    }
    found = dict(
        flags={"compile": "on"},
        epochs=1,
        minibatch=2,
        threads=1,
        rollout_length=3,
        ours={},
    )
    found |= {
        "hardware": "1 core",
        "cores used": 1,
        "load before": 0.0,
        "load after": 0.0,
    }
    names = "env_steps_per_second", "act_steps_per_second", "steps_per_second"
    found["ours"]["4096"] = dict(zip(names, (3e6, 2e4, 1e3)), rollout_length=8)
    found["in turns"] = {"ours": row(9, 50.0, 50.0, 7.0)}
    found["in turns"] |= {"ours, 64": row(64, 1.0, 1.0, 1000.0)}
    found["in turns"] |= {"ours, 64, not compiled": row(64, 1.6, 3.0, 625.0)}
    found["in turns"] |= {"Peer": row(64, 2.0, 4.0, 500.0)}
    found["in turns"]["Peer"]["seconds"][2][0] = 5.0
    text = readme.numbers("env_speed", found)
    assert "| 4,096 | 8 | 3,000,000 | 20,000 | 1,000 |\n" in text
    ratios = "2.00 (2.00 to 5.00) | 4.00 (4.00 to 4.00) | 1.25 (1.25 to 3.12) |\n"
    assert f"| Peer | 64 | 1,000 | 500 | {ratios}" in text
    assert text.count("\n\n| ") == 2 and "ours, 64" not in text


def test_peak_of_whole_logits_reads_as_ours():
    """A row has its own memory, then its own time, ours before whole logits, and the
    ratios that were written beside them."""
    way = lambda gb, seconds: {"bytes": gb * 2**30, "seconds": seconds}
    row = {"ours": way(1, 3.0), "naive": way(8, 2.0)}
    row |= {"memory_ratio": 0.125, "time_ratio": 1.5}
    found = dict(tokens=4096, vocab=151_936, hidden=8, repeats=1, torch="2", threads=2)
    _, columns, rows = readme.memory(found | {"cases": {"grpo": row}})
    assert rows == [["`grpo`", "1.00", "8.00", "0.12", "3.0", "2.0", "1.50"]]
    assert len(columns) == len(rows[0])


def test_control_of_another_band_or_policy_reads_as_its_own():
    """Each row of the lock's tables has its policy's and band's own numbers; wheels
    that move without shared parameters are not replicated, however little others do."""
    runs = [
        {"policy": policy, "band": [low, 2 * low], "seed": seed,
         "lines": [{"plain": 0.0, "before": 0.25}, {"plain": low, "before": after}]}
        for policy, low, after in [("tabular", 0.1, 0.25), ("tabular", 0.2, 0.5),
                                   ("shared", 0.1, 0.75), ("shared", 0.2, 0.25)]
        for seed in range(5)
    ]  # fmt: skip
    found = {"runs": runs, "seconds": 1, "numpy": "2"}
    _, _, rows, _, judged = readme.combination_lock(found)
    assert [row[:4] for row in rows[:2]] == [
        ["tabular", "10-20 %", "0.000", "0.100 [0.100, 0.100]"],
        ["tabular", "20-40 %", "0.000", "0.200 [0.200, 0.200]"],
    ]
    assert [row[1:] for row in judged] == [
        ["10-20 %", "5", "+0.000 [+0.000, +0.000]", "replicated"],
        ["20-40 %", "5", "+0.250 [+0.250, +0.250]", "not replicated"],
        ["10-20 %", "5", "+0.500 [+0.500, +0.500]", "replicated"],
        ["20-40 %", "5", "+0.000 [+0.000, +0.000]", "not replicated"],
    ]


def test_failed_part_of_a_gpu_reads_as_measured():
    """What was late or wrong on a GPU, and what was never tried, stands as such in the
    place of a number; so does code that was edited since."""
    row = {"ok": True, "error": None, "found": {}}
    wrong = row | {"ok": False, "error": "AssertionError: nothing moved"}
    step = {"seconds_rollout": 1.0, "seconds_update": 2.0, "peak_gb": 9.0}
    speed = {"batch 64": {"tokens_per_second": 1234.5, "peak_gb": 20.0}}
    parts = {"rollout": row | {"found": speed}, "exact": wrong}
    parts |= {"step-grpo-0.6B": row | {"found": step}}
    parts |= {"step-vopd-1.7B": wrong | {"found": step}}
    parts["flags-8gb"] = row | {"found": {"peak_gb": 6.25, "reserved_gb": 7.0}}
    less = {"batch 64": {"tokens_per_second": 99.0, "new_tokens": 2}}
    parts["continuous-batching"] = row | {"found": less}
    rates = {"rollout_length": 32, "steps_per_second": 7.0}
    rates |= {"env_steps_per_second": 9e6, "act_steps_per_second": 8.0}
    parts["env_speed"] = wrong | {"found": {"4096": rates}}
    cost = {"found": {"tokens": 16, "full": {"memory_ratio": 1.5, "time_ratio": 2.0}}}
    parts["estimator_cost"] = row | cost
    sizes = dict(new_tokens=8, prompts=2, step_tokens=4, scored=16, vocab=100)
    found = {"parts": parts, "sizes": sizes, "torch": "2", "transformers": "5"}
    tables = [readme.gpu(found)[i::2] for i in (1, 2)]
    for columns, rows in zip(*tables, strict=True):
        assert {len(x) for x in rows} <= {len(columns)}
    text = "\n".join(map(report.table, *tables))
    assert "| 64 | 1,234 | 20.0 |" in text
    assert "| Qwen3-0.6B | `grpo.py` | 1.0 | 2.0 | 9.0 | yes |" in text
    assert "| `vopd.py` | 1.0 | 2.0 | 9.0 | AssertionError: nothing moved |" in text
    assert "micro-batch-size 4 --rollout-batch-size 32` | 6.2 / 7.0 |" in text
    assert "batching | 64, 2 new tokens | 99 |" in text
    assert "| 4,096 | 32 | 9,000,000 | 8 | 7 |\n| AssertionError: no" in text
    assert "| `full` | 1.50 | 2.00 |" in text
    assert "rollout-batch-size 64` | not measured yet |" in text
    assert "are the CPU's | AssertionError: nothing moved |" in text
    assert "solves CartPole-v1 | not measured yet |" in text


def test_nearly_equal_runs_are_called_equal():
    """Equal runs of two versions of a script have every digit of every metric at every
    evaluation in common; not times and memory, and a metric may be new."""
    ends = [{"step": 0, "loss": 0.1}, {"step": 5, "loss": 0.3, "eval/x": 1 / 3}]
    ends[1] |= {"seconds_update": 1.0, "peak_memory_gb": 2.0}
    runs = [{"seed": seed, "evals": ends} for seed in range(6)]
    others = [dict(run, evals=[dict(x) for x in ends]) for run in runs]
    for run in others:
        run["evals"][1] |= {"seconds_update": 2.0, "peak_memory_gb": 1.0, "new": 7.0}
    assert readme.equal_runs(runs, others) == readme.equal_runs(others, runs) == 6
    others[0]["evals"][0]["loss"] = math.nextafter(0.1, 1)
    others[1]["evals"][1]["eval/x"] = math.nextafter(1 / 3, 0)
    others[2]["evals"].pop()
    others[3]["seed"] = 9
    assert readme.equal_runs(runs, others) == readme.equal_runs(others, runs) == 2
