"""torchrun: any number of ranks is the run of one process, and an error ends them all.

The command lines here are a user's: `torchrun --nproc-per-node N algos/<script>.py`.
The plug-in task makes a process compute in float64, in which the order of a sum is
worth 1e-16. In float32 it is worth 1e-7, and Adam's first steps turn that into steps of
the whole learning rate where a gradient is near 0: a comparison to 1e-6 would need a
rate at which nothing moves. Here the rate is 1e-3 and the weights move by more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer, save_model, script_path, small_qwen3
from safetensors.torch import load_file, save_file

TASK = """
import os, signal, torch

torch.set_default_dtype(torch.float64)
torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
LETTERS = set("abcdefghijklmnopqrstuvwxyz")
calls = 0


def problems(split, seed):
    for i in range(14):
        yield {"prompt": f"{split} {'ab' * i}:", "answer": i}


def reward(problem, completion):
    global calls
    calls += problem.prompt.startswith("train")
    rank, _, end = os.environ.get("END", "").partition(" ")
    due = calls > 1 + 12 + 5  # in the second step, or in the last evaluation
    if end == "evaluation":
        due = calls > 1 + 3 * 12 - 1 and problem.prompt.startswith("eval")
    if due and rank == os.environ.get("RANK"):
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(end)
    return sum(character in LETTERS for character in completion) / 4
"""  # the first call is a trial; a rank of two has 12 completions in a step

COMMON = dict(task="task.py", model="model", device="cpu", run_dir="run", steps=3)
COMMON |= dict(prompts_per_step=6, group_size=4, micro_batch_size=8, max_new_tokens=8)
COMMON |= dict(learning_rate=1e-3, warmup_steps=0, eval_prompts=5, eval_samples=2)
OWN = {
    "grpo": dict(kl_coef=0.1, updates_per_batch=2),
    "vopd": dict(teacher="teacher"),
    "dmpo": dict(kl_coef=0.1),
    "prefixrl": dict(candidates=8, hard_k=8, trace_cap=320, sft_epochs=1),
}
TIMES = "seconds", "tokens_per_second", "peak_memory"


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a student, a teacher and the task, to be copied."""
    folder, tokenizer = tmp_path_factory.mktemp("torchrun"), char_tokenizer()
    for seed, name in enumerate(("model", "teacher")):
        model = small_qwen3(len(tokenizer), seed=seed).double()
        model.get_input_embeddings().weight.data[1] *= 4  # EOS: lengths differ
        save_model(folder / name, model, tokenizer)
    (folder / "task.py").write_text(TASK)
    return folder


def command_line(script: str, flags: dict) -> list[str]:
    """algos/<script>.py with its flags."""
    words = [str(script_path(script))]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


@pytest.fixture(scope="session")
def run(ranks):
    """run(script, world, home, **flags): the folder of a finished run."""

    def get(script: str, world: int, home: Path, **flags) -> Path:
        codes = ranks.run(world, *command_line(script, flags), cwd=home)
        assert codes == [0] * world, (home / "out").read_text()
        return home / "run"

    return get


def torchrun(script: str, world: int, home: Path, **flags) -> tuple[int, str]:
    """Exit code and all output of the command line in the folder home."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), *command_line(script, flags)]
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=home, **both) as process:
        try:
            out = process.communicate(timeout=90)[0]
        finally:
            process.terminate()  # its ranks with it
    return process.returncode, out


def records(run_dir: Path, log: str) -> list[dict]:
    """The lines of a log without seconds and bytes."""
    lines = [json.loads(line) for line in (run_dir / log).open()]
    return [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in lines]


def distance(a: Path, b: Path) -> float:
    """The largest difference between two models' weights."""
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def same_run(shared: Path, alone: Path) -> None:
    """Weights, logs and samples of two runs agree; each left one of everything."""
    files = [sorted(p.name for p in x.iterdir()) for x in (shared, alone)]
    assert files[0] == files[1] and "checkpoint" in files[0]
    assert (shared.parent / "out").read_text().count("run folder: run") == 1
    pair = [records(x, "metrics.jsonl") for x in (shared, alone)]
    assert [r["step"] for r in pair[0]] == [r["step"] for r in pair[1]] == [0, 1, 2, 3]
    for got, wanted in zip(*pair):
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    pair = [records(x, "samples.jsonl") for x in (shared, alone)]
    for got, wanted in zip(*pair):
        got, wanted = ({**x, "rewards": 0} for x in (got, wanted))
        assert got == wanted
    assert distance(shared / "checkpoint", alone / "checkpoint") < 1e-6


@pytest.fixture
def home(models, tmp_path) -> Path:
    """A folder of its own with models and task."""
    return Path(shutil.copytree(models, tmp_path / "home"))


@pytest.fixture(scope="session")
def alone(models, run, tmp_path_factory):
    """alone(script): the run of one process, done once."""
    done = {}

    def get(script: str) -> Path:
        if script not in done:
            home = tmp_path_factory.mktemp("alone") / script
            shutil.copytree(models, home)
            done[script] = run(script, 1, home, **COMMON | OWN[script])
        return done[script]

    return get


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("script", [*OWN])
def test_ranks_train_another_model(script, world, run, home, alone):
    """A rank that takes its own denominator, its neighbour's prompts or noise, or keeps
    its gradients trains something else, and no log says so; one that writes too leaves
    each step twice. N ranks end with the weights of one process with the same batch.
    https://github.com/verl-project/verl/issues/906"""
    shared = run(script, world, home, **COMMON | OWN[script])
    same_run(shared, alone(script))
    assert distance(shared / "checkpoint", home / "model") > 1e-3
    logged = records(shared, "metrics.jsonl")
    assert all(r["grad_norm"] > 0.01 for r in logged[1:])


def test_torchrun_is_not_what_the_scripts_expect(home, alone):
    """Ranks started by hand may hide that torchrun says something else, or says it
    elsewhere. Its own command line ends with the weights of one process."""
    code, out = torchrun("grpo", 2, home, **COMMON | OWN["grpo"])
    assert code == 0, out
    (home / "out").write_text(out)
    same_run(home / "run", alone("grpo"))


@pytest.mark.parametrize("script", [*OWN])
def test_resume_with_another_number_of_ranks(script, run, home, alone):
    """The ranks that go on are not those that stopped: a saved share of the data or of
    the noise would belong to a rank that is gone. Three ranks, then one process, then
    two ranks are one run of one process."""
    run(script, 3, home, **COMMON | OWN[script] | dict(steps=1))
    run(script, 1, home, resume="run", steps=2)
    shared = run(script, 2, home, resume="run", steps=3)
    assert [r["step"] for r in records(shared, "metrics.jsonl")] == [0, 1, 2, 3]
    assert distance(shared / "checkpoint", alone(script) / "checkpoint") < 1e-6


@pytest.mark.parametrize("script", [*OWN])
def test_each_rank_has_its_own_problems(script, run, home):
    """A plug-in that goes through a set of texts yields another order in each process:
    every rank trains on what it takes for its share, and nobody on the rest."""
    mixed = 'for i in range(14)[:: 1 - 2 * int(os.environ["RANK"])]:'
    (home / "task.py").write_text(TASK.replace("for i in range(14):", mixed))
    with pytest.raises(AssertionError, match="error: problems differ"):
        run(script, 2, home, **COMMON | OWN[script])
    assert not (home / "run").exists()


WHERE = """
import os, time
from conftest import load_script
time.strftime = lambda *_: "second " + os.environ["RANK"]
script = load_script({name!r})
script.train = lambda args: print(args.run_dir) or 0
script.main()
"""


@pytest.mark.parametrize("name", [*OWN, "ppo_envs"])
def test_ranks_that_start_in_two_seconds_have_two_folders(name, run, tmp_path):
    """Without --run-dir the time names the folder. Ranks that each read their own clock
    look for logs where no other has written them: all take the first one's name."""
    (tmp_path / "where.py").write_text(WHERE.format(name=name))
    run(tmp_path / "where", 2, tmp_path, device="cpu")
    said = (tmp_path / "out").read_text()  # in which two lines may be mixed
    assert said.count(f"runs/{name}/second 0-s1") == 2 and "second 1" not in said


PATCHED = """
import os, sys
from conftest import load_script
rank, script = os.environ["RANK"], load_script({name!r})
{lines}
script.main()
"""


def patched(home: Path, name: str, lines: str) -> Path:
    """A program, named without .py, that runs some lines before the script's main."""
    (home / "patched.py").write_text(PATCHED.format(name=name, lines=lines))
    return home / "patched"


SMALL_PPO = dict(device="cpu", run_dir="run", num_envs=8, rollout_length=8)
SMALL_PPO |= dict(minibatch_size=32, eval_episodes=4, compile="off")
ALL = {name: COMMON | OWN[name] for name in OWN} | {"ppo_envs": SMALL_PPO}


@pytest.mark.parametrize("name", [*ALL])
def test_nodes_have_other_flags(name, run, home):
    """A command line is edited on one node and not on the other: each trains with its
    own rate on the other's gradients, the log is the first one's. Both say which flag
    it is."""
    lines = 'sys.argv += ["--learning-rate", f"0.0{int(rank) + 1}"]'
    flags = {k: v for k, v in ALL[name].items() if k != "learning_rate"}
    wanted = "error: --learning-rate differs between ranks: [0.01, 0.02]"
    with pytest.raises(AssertionError) as e:
        run(patched(home, name, lines), 2, home, **flags)
    assert str(e.value).count(wanted) == 2
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    "name, what",
    [*((x, "model") for x in OWN), *((x, "run") for x in ALL), ("vopd", "teacher")]
    + [(x, "reference") for x in OWN if x != "vopd"],
)
def test_nodes_have_folders_of_their_own(name, what, run, home):
    """On disks that nodes do not share, a model is another version of it, or a run's
    checkpoint an older one: the ranks add up gradients and never compare weights, and
    wait for ever if one has more steps to make. They say so before the first step."""
    flags, lines = ALL[name], 'os.chdir("node" + rank)'
    for i in range(2):
        shutil.copytree(home, home / f"node{i}", ignore=lambda *_: ["node0"])
        if what in ("run", "reference"):
            more = dict(kl_coef=0.1) if what == "reference" else {}
            run(name, 2, home / f"node{i}", **flags | more | dict(steps=1))
    if what in ("run", "reference"):
        flags = dict(resume="run", steps=3)
    if what == "run":
        file = home / "node1/run/checkpoint/state.pt"
        torch.save(torch.load(file, weights_only=True) | {"step": 2}, file)
    else:
        folder = "teacher" if what == "teacher" else "model"
        file = home / "node1" / folder / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"][0] += 1e-6
        save_file(weights, file, {"format": "pt"})
    frozen = what in ("teacher", "reference")
    said = "reference or teacher" if frozen else "weights or steps"
    with pytest.raises(AssertionError, match=f"error: {said} differ"):
        run(patched(home, name, lines), 2, home, **flags)
    logs = [*home.glob("node*/run/metrics.jsonl")]
    assert all(len(x.read_text().splitlines()) == 2 for x in logs)


@pytest.mark.parametrize("name", [*OWN])
def test_one_rank_fails_in_its_update(name, run, home):
    """One rank has the long completions, and too little memory for them: the others
    would add its word of that up with their gradients. They hear of it before they
    exchange those, and the step before is saved."""
    lines = """
from pathlib import Path
loss = "distill_loss" if script.__file__.endswith("vopd.py") else "policy_loss"
real = getattr(script, loss)

def fails(*args):
    log = Path("run/metrics.jsonl")
    if rank == "1" and log.exists() and log.read_text().count("\\n") == 2:
        raise script.torch.OutOfMemoryError("CUDA out of memory")
    return real(*args)

setattr(script, loss, fails)
"""
    with pytest.raises(AssertionError, match="error: too little memory: --resume") as e:
        run(patched(home, name, lines), 2, home, **ALL[name])
    assert "Connection closed" not in str(e.value)
    assert (home / "out").read_text().count("step 1 is saved") == 1
    logged = records(home / "run", "metrics.jsonl")
    assert [r["step"] for r in logged] == [0, 1]
    shared = run(name, 2, home, resume="run", steps=3)
    assert [r["step"] for r in records(shared, "metrics.jsonl")] == [0, 1, 2, 3]


def test_rank_leaves_before_the_step_is_saved(run, home):
    """torchrun kills all ranks when the first one has ended, also the one that is still
    writing gigabytes: those that have nothing to write wait for it."""
    lines = """
import atexit, time
os.environ["END"] = "1 the judge is down"
save = script.save_checkpoint
seen = lambda: script.torch.load("run/checkpoint/state.pt", weights_only=True)["step"]
if rank == "0":
    script.save_checkpoint = lambda *x: time.sleep(2) or save(*x)
else:
    atexit.register(lambda: print("at the end of rank 1: step", seen()))
"""
    with pytest.raises(AssertionError, match="at the end of rank 1: step 1"):
        run(patched(home, "grpo", lines), 2, home, **COMMON)


def test_rank_does_not_wait_for_the_built_in_model(run, home):
    """The first rank makes it, for minutes, once. One that goes on finds no folder."""
    small = COMMON | dict(task="countdown", model="tiny", tiny_steps=20, steps=1)
    shared = run("grpo", 2, home, **small | dict(max_new_tokens=24))
    assert [r["step"] for r in records(shared, "metrics.jsonl")] == [0, 1]


def test_one_rank_has_broken_rewards(run, home):
    """NaN in the rewards of one rank's environments is NaN in the gradient of all: all
    of them say where it came from, not only the one that has seen it."""
    lines = """
real, steps = script.learn, []

def learn(agent, batch, args):
    steps.append(1)
    for name in ("rewards", "advantages") if len(steps) == 2 and rank == "1" else ():
        batch[name] = batch[name] * float("nan")
    return real(agent, batch, args)

script.learn = learn
"""
    with pytest.raises(AssertionError) as e:
        run(patched(home, "ppo_envs", lines), 2, home, **SMALL_PPO)
    blamed = (
        "gradient of step 2 is not finite, it is not saved: nor are all observations"
    )
    assert str(e.value).count(blamed) == 2


def test_search_is_stored_on_one_node_only(run, home):
    """What a search found is read where it is stored, on a node's own disk or on none:
    ranks that read while others search wait for each other's words for ever."""
    flags = ALL["prefixrl"] | dict(steps=1)
    before = run("prefixrl", 2, home, **flags).rename(home / "before")
    assert [*home.glob("runs/cache/search-*")]
    for i in range(2):
        shutil.copytree(home, home / f"node{i}", ignore=lambda *_: ["node0"])
    shutil.rmtree(home / "node1/runs")
    lines = 'os.chdir("node" + rank)'
    run(patched(home, "prefixrl", lines), 2, home, **flags)
    again = home / "node0/run"
    assert records(again, "traces.jsonl") == records(before, "traces.jsonl")
    assert distance(again / "checkpoint", before / "checkpoint") == 0


def test_fewer_traces_than_ranks(run, home):
    """Where prefixes of traces are evaluated, a rank may have none to try: that is left
    out, instead of an error of an empty batch."""
    (home / "given.jsonl").write_text('{"prompt": "train :", "text": "abcd"}\n')
    flags = ALL["prefixrl"] | dict(traces="given.jsonl", hard_k=1, steps=1)
    for world in 1, 2:
        run_dir = run("prefixrl", world, home, **flags)
        traced = [r for r in records(run_dir, "traces.jsonl") if r["text"]]
        assert len(traced) == 1, "the problem is not hard"
        last = records(run_dir, "metrics.jsonl")[-1]
        assert any(key.startswith("eval/from_") for key in last) == (world == 1)
        run_dir.rename(home / f"run{world}")


def test_ranks_do_not_agree_on_a_trace(run, home):
    """A judge behind a time limit may call a trace right on one rank and fail on the
    next: with other prefixes on each they train on problems that nobody drew. The first
    rank judges alone, and what it found counts."""
    moody = TASK.replace(
        "    global calls",
        '    if completion == "abcd":\n'
        '        return 1 / (os.environ.get("RANK") != "1")\n    global calls',
    )
    (home / "task.py").write_text(moody)
    prompts = [f"train {'ab' * i}:" for i in range(14)]
    lines = [json.dumps({"prompt": prompt, "text": "abcd"}) for prompt in prompts]
    (home / "given.jsonl").write_text("\n".join(lines))
    flags = ALL["prefixrl"] | dict(traces="given.jsonl")
    alone = run("prefixrl", 1, home, **flags)
    alone = alone.rename(home / "alone")
    found = records(alone, "traces.jsonl")
    assert found and all(r["text"] == "abcd" for r in found)
    shared = run("prefixrl", 2, home, **flags)
    assert records(shared, "traces.jsonl") == found
    assert distance(shared / "checkpoint", alone / "checkpoint") < 1e-6


@pytest.mark.parametrize("how", ["the judge is down", "kill", "evaluation"])
def test_a_rank_dies_and_the_others_wait(how, home, monkeypatch):
    """One rank gone, by an error in its reward or by the kernel for want of memory, and
    the others would wait for its gradients until somebody looks. The job ends with its
    error, and what was logged before is whole. The last whole step is saved: that
    before a failed rollout, or the one before an evaluation. A failed reward tells the
    other ranks, and its error is the only one."""
    monkeypatch.setenv("END", f"1 {how}")
    begin = time.monotonic()
    code, out = torchrun("grpo", 2, home, **COMMON)
    assert time.monotonic() - begin < 80  # torchrun gives those left 30 s
    assert code not in (0, None)
    assert ("SIGKILL" if how == "kill" else f"RuntimeError: {how}") in out
    logged = records(home / "run", "metrics.jsonl")
    step = 3 if how == "evaluation" else 1
    assert [r["step"] for r in logged] == [*range(step + 1)]
    state = torch.load(home / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == step
    assert how == "kill" or "Connection closed" not in out


@pytest.mark.parametrize(
    "script, whom",
    [
        ("grpo", "torchrun"),
        ("grpo", "a rank"),
        ("grpo", "all, as SLURM does"),
        ("ppo_envs", "a rank"),
    ],
)
def test_ctrl_c_stops_ranks_at_different_steps(script, whom, home):
    """torchrun passes a Ctrl-C on, which reaches its ranks at different moments (here
    also one of them alone). One that stopped a step before the others would leave them
    waiting for its gradients, and the job would end in an error with nothing saved. All
    stop after the same step, which is saved, and one of them says so. A scheduler sends
    SIGTERM to all processes, and torchrun sends its own to the ranks: two each."""
    flags = dict(device="cpu", run_dir="run", steps=100_000)
    flags = COMMON | flags if script == "grpo" else flags | dict(num_envs=64)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *command_line(script, flags)]
    log, end = home / "run" / "metrics.jsonl", time.monotonic() + 200
    with (home / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=home, stdout=out, stderr=out)
        try:
            while not log.exists() or log.read_text().count("\n") < 4:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            ranks = f"/proc/{process.pid}/task/{process.pid}/children"
            pids = [process.pid, *map(int, Path(ranks).read_text().split())]
            if whom.startswith("all"):
                for pid in pids:
                    os.kill(pid, signal.SIGTERM)
            else:
                os.kill(pids[-1 if whom == "a rank" else 0], signal.SIGINT)
            process.wait(timeout=60)
        finally:
            process.terminate()
    said = re.findall(r"stopped after step (\d+)", (home / "out").read_text())
    state = torch.load(home / "run/checkpoint/state.pt", weights_only=True)
    assert said == [str(state["step"])]
    steps = [r["step"] for r in records(home / "run", "metrics.jsonl")]
    assert steps == [*range(state["step"] + 1)]
