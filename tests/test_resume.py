"""A run that is stopped, killed or resumed is the run that was never touched.

    python tests/test_resume.py 20

kills a run 20 times at random moments; pytest does it 4 times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    PLUGIN,
    char_tokenizer,
    metrics_of,
    save_model,
    script_path,
    small_qwen3,
)
from ranks import Ranks
from safetensors.torch import load_file

MEASURED = ("seconds_", "tokens_per_second", "peak_memory_gb")
SMALL = dict(task="task.py", device="cpu", prompts_per_step=2, group_size=4)
SMALL |= dict(max_new_tokens=4, eval_prompts=2, eval_samples=2, eval_every=5)
SMALL |= dict(warmup_steps=7, learning_rate=1e-2)


def flags(**changes) -> list[str]:
    """A command line of a small run; 12 problems, so an epoch ends after 6 steps."""
    items = (SMALL | changes).items()
    return [x for k, v in items for x in (f"--{k.replace('_', '-')}", str(v))]


def same(a, b) -> bool:
    """Bit for bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def logged(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is measured in seconds and bytes."""
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in metrics_of(run_dir)
    ]


def state_of(run_dir: Path) -> dict:
    """state.pt of the last checkpoint."""
    return torch.load(run_dir / "checkpoint/state.pt", weights_only=True)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint."""
    return load_file(run_dir / "checkpoint/model.safetensors")


def check_same_run(run_dir: Path, whole: Path) -> None:
    """Logs, samples, optimiser and weights of two runs are equal bit for bit, and
    nothing half written is left."""
    assert logged(run_dir) == logged(whole)
    assert (run_dir / "samples.jsonl").read_text() == (
        whole / "samples.jsonl"
    ).read_text()
    assert same(state_of(run_dir), state_of(whole))
    assert same(weights_of(run_dir), weights_of(whole))
    assert {p.name for p in run_dir.iterdir()} == {p.name for p in whole.iterdir()}
    assert {p.name for p in (run_dir / "checkpoint").iterdir()} == {
        p.name for p in (whole / "checkpoint").iterdir()
    }


@pytest.fixture
def halves(cli, tmp_path):
    """A run of 10 steps in whole/, and the first 5 of the same run in half/."""
    assert cli(*flags(run_dir="whole", steps=10)).code == 0
    assert cli(*flags(run_dir="half", steps=5)).code == 0
    assert not same(weights_of(tmp_path / "half"), weights_of(tmp_path / "whole"))
    return tmp_path / "half", tmp_path / "whole"


def test_second_ctrl_c_does_not_end_the_run(grpo, monkeypatch, capfd):
    """The first signal asks for a stop, and says so; one that comes 3 s later ends the
    process at once. SLURM and torchrun may each pass on the same stop: two in a moment,
    of either kind, are one, or the step is lost for which the run was to be asked."""
    numbers, clock = (signal.SIGINT, signal.SIGTERM), [50.0]
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    monkeypatch.setattr(grpo.time, "monotonic", lambda: clock[0])
    try:
        stops = grpo.catch_stops()
        assert not stops
        for clock[0], number in (
            (50.0, numbers[1]),
            (50.1, numbers[1]),
            (52, numbers[0]),
        ):
            signal.raise_signal(number)
        assert len(stops) == 3
        assert capfd.readouterr().err.count("stopping after this step") == 1
        clock[0] = 53.1
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)
    finally:
        for handler in handlers:
            signal.signal(*handler)


@pytest.mark.parametrize("kl", [False, True], ids=["plain", "kl, two updates"])
def test_resume_is_off_by_one_or_loses_state(cli, tmp_path, small_folder, kl):
    """The step, Adam's moments, the random numbers, the place in the data, the warm-up
    or the reference model start anew at resume: 5 steps + 5 steps are not 10
    (https://github.com/vwxyzjn/cleanrl/issues/399, McGill-NLP/nano-aha-moment)."""
    more = dict(kl_coef=0.1, updates_per_batch=2) if kl else {}
    half, whole = tmp_path / "half", tmp_path / "whole"
    assert cli(*flags(run_dir="whole", steps=10, **more)).code == 0
    assert cli(*flags(run_dir="half", steps=5, **more)).code == 0
    assert cli("--resume", "half", "--steps", "10").code == 0
    check_same_run(half, whole)
    assert [line["step"] for line in logged(half)] == [*range(11)]
    start = load_file(Path(small_folder, "model.safetensors"))
    assert not same(weights_of(half), start)
    if kl:
        assert all(line["kl"] > 0 for line in logged(half)[2:])


def test_log_longer_than_the_checkpoint_counts_steps_twice(cli, halves):
    """A run killed after logging and before saving has lines of steps that will be done
    again, the last of them perhaps in half: resume cuts them."""
    half, whole = halves
    for name in ("metrics", "samples"):
        lines = (whole / f"{name}.jsonl").read_text().splitlines(True)
        text = "".join(lines[:8]) + lines[8][: len(lines[8]) // 2]
        (half / f"{name}.jsonl").write_text(text)
    assert cli("--resume", "half", "--steps", "10").code == 0
    check_same_run(half, whole)


def test_save_is_in_halves_for_a_moment(cli, grpo, saves, tmp_path):
    """A kill hits any moment of a save, few of them in a hundred tries: before each of
    its operations on files a whole checkpoint is there, the last one or the new one."""
    counts = saves(grpo, tmp_path / "run")
    assert cli(*flags(run_dir="run", steps=2, save_every=1)).code == 0
    assert len(counts) == 3 and min(counts) > 10


KILLED = ["while writing", "before the renames", "between the renames", "after both"]


@pytest.mark.parametrize("moment", KILLED)
def test_kill_inside_a_save_ends_the_run(cli, halves, tmp_path, moment):
    """Whenever a save is killed, one whole checkpoint is there, and resume finds it,
    goes on and saves again; what the kill left lying about does not stop it."""
    half, whole = halves
    last, new, old = (half / f"checkpoint{x}" for x in ("", ".new", ".old"))
    if moment == "while writing":
        new.mkdir()
        (new / "model.safetensors").write_bytes(b"half a model")
    if moment in ("before the renames", "between the renames"):
        shutil.copytree(whole / "checkpoint", new)
    if moment == "between the renames":
        last.rename(old)
    if moment == "after both":  # and the old one is half removed
        shutil.copytree(last, old)
        (old / "state.pt").unlink()
    assert cli("--resume", "half", "--steps", "10").code == 0
    check_same_run(half, whole)


def test_second_run_overwrites_the_first(cli, tmp_path):
    """The folder of a run belongs to it: neither the same command again nor a run that
    was started a moment later, and finds the folder only after its model is loaded,
    may write there."""
    assert cli(*flags(run_dir="run", steps=1)).code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    result = cli(*flags(run_dir="run", steps=1))
    assert result.code == 2 and "run exists" in result.errors[0]
    (tmp_path / "run").rename(tmp_path / "first")
    late = "import os\n\nos.rename('first', 'run')\n" + PLUGIN
    (tmp_path / "task.py").write_text(late)
    result = cli(*flags(run_dir="run", steps=1))
    assert result.code == 2 and len(result.errors) == 1
    assert before == {p: p.read_bytes() for p in before}
    assert len(before) == len([p for p in (tmp_path / "run").rglob("*") if p.is_file()])


CHILD = """
from conftest import load_script
grpo = load_script("grpo")
grpo.draw_curve = lambda run_dir: None  # slow: kills shall hit saves
grpo.main()
"""


class Server:
    """Starts command lines as processes of their own that one can kill."""

    def __init__(self, folder: Path, model: str, ranks: Ranks):
        """In `folder`, with the model of the folder `model`."""
        self.folder, self.model, self.ranks, self.child = folder, model, ranks, 0
        (folder / "task.py").write_text(PLUGIN)
        (folder / "child.py").write_text(CHILD)

    def start(self, *flags: str) -> None:
        """Start a command line; child is its process id."""
        (self.folder / "out").unlink(missing_ok=True)
        [self.child] = self.ranks.start(1, "child.py", *flags, cwd=self.folder)

    def wait(self) -> int:
        """Its exit code; minus the number of the signal that killed it."""
        return self.ranks.wait([self.child])[0]

    def until(self, condition) -> None:
        """Wait until the condition holds, at most a minute."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, (self.folder / "out").read_text()
            time.sleep(0.01)

    def signal_when(self, path: Path, lines: int, number: int) -> int:
        """Its exit code after a signal sent once a file has so many lines."""
        self.until(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines)
        os.kill(self.child, number)
        return self.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, small_folder, ranks):
    """One server for the tests of this file."""
    return Server(tmp_path_factory.mktemp("server"), small_folder, ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_loses_the_run(server, number):
    """Ctrl-C, or the end of a batch job, finishes the step, saves it, says how to go on
    and exits with 130; nothing is lost when it does go on."""
    run_dir, whole = (server.folder / f"{x}-{number}" for x in ("run", "whole"))
    server.start(*flags(model=server.model, run_dir=run_dir.name, steps=10_000))
    assert server.signal_when(run_dir / "metrics.jsonl", 3, number) == 130
    text = (server.folder / "out").read_text()
    assert f"--resume {run_dir.name}" in text and "Traceback" not in text
    done = state_of(run_dir)["step"]
    assert [line["step"] for line in logged(run_dir)] == [*range(done + 1)]
    assert done >= 2
    steps = done + 3
    server.start("--resume", run_dir.name, "--steps", steps)
    assert server.wait() == 0
    server.start(*flags(model=server.model, run_dir=whole.name, steps=steps))
    assert server.wait() == 0
    check_same_run(run_dir, whole)


def test_interrupt_in_the_last_step_asks_for_a_resume(cli, tmp_path):
    """A Ctrl-C during the last step comes too late to stop anything: there would be
    nothing left to resume. The run is whole, and ends as such."""
    late = "    log = 'run/metrics.jsonl'\n    if os.path.exists(log) and 2 == ("
    late += "open(log).read().count('\\n')) and 'eval' in problem.prompt:\n"
    late += "        os.kill(os.getpid(), signal.SIGINT)\n    return"
    plugin = "import os, signal\n" + PLUGIN.replace("    return", late)
    (tmp_path / "task.py").write_text(plugin)
    result = cli("--steps", "2", "--eval-samples", "1", "--eval-prompts", "1")
    assert result.code == 0 and state_of(tmp_path / "run")["step"] == 2
    assert "stopped" not in result.stdout and "run folder: run" in result.stdout


def test_end_that_cannot_be_resumed_says_to_resume_it(cli, tmp_path):
    """A reward that fails in the last evaluation: --resume with as many steps would be
    refused, so the line asks for more."""
    late = "    log = 'run/metrics.jsonl'\n    if os.path.exists(log) and 2 == ("
    late += "open(log).read().count('\\n')) and 'eval' in problem.prompt:\n"
    late += "        1 / 0\n    return"
    (tmp_path / "task.py").write_text(
        "import os\n" + PLUGIN.replace("    return", late)
    )
    result = cli("--steps", "2")
    assert result.code == 2 and "--resume run with more --steps" in result.stdout


def test_resume_goes_on_with_other_answers(cli, tmp_path):
    """The file of --data is another one by now: the same prompts, other answers, and
    the second half of the curve is of another reward."""
    lines = [{"prompt": f"{i}", "answer": i} for i in range(40)]
    file = tmp_path / "d.jsonl"
    for answer in 0, 1:
        file.write_text(
            "".join(json.dumps(x | {"answer": answer}) + "\n" for x in lines)
        )
        if not answer:
            assert cli("--data", "d.jsonl").code == 0
    result = cli("--resume", "run", "--steps", "4")
    assert result.code == 2 and "problems differ" in result.errors[0]


PIPED = {
    "grpo": "--task task.py --prompts-per-step 2 --max-new-tokens 4 --eval-prompts 2",
    "ppo_envs": "--num-envs 4 --minibatch-size 32 --hidden-size 8 --eval-episodes 4",
}


@pytest.mark.parametrize("name", PIPED)
def test_tee_that_dies_of_the_same_ctrl_c_loses_the_run(name, small_folder, tmp_path):
    """In `python algos/grpo.py 2>&1 | tee log` a Ctrl-C ends tee at once: what the
    script then writes has no reader, and an exception there comes before the save."""
    (tmp_path / "task.py").write_text(PLUGIN)
    words = ["--device", "cpu", "--run-dir", "run", "--steps", "100000"]
    words += ["--save-every", "100000", "--eval-every", "100000", *PIPED[name].split()]
    words += ["--model", small_folder] if name == "grpo" else []
    process = subprocess.Popen(
        [sys.executable, str(script_path(name)), *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text = b""
    while b"it/s" not in text.rpartition(b"[")[2]:
        text += process.stdout.read1()
        assert process.poll() is None, text
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == 130
    done = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)["step"]
    assert done == metrics_of(tmp_path / "run")[-1]["step"] >= 1


def kill_often(server: Server, kills: int, seed: int, report=lambda *_: None) -> None:
    """Start a run that saves after every step, kill it and resume it `kills` times, let
    it end, and compare it with one that was never killed."""
    rng, done = random.Random(seed), 0
    run_dir, whole = (server.folder / f"{x}-{seed}" for x in ("killed", "whole"))
    last, old = run_dir / "checkpoint", run_dir / "checkpoint.old"
    common = dict(model=server.model, eval_every=100_000)
    server.start(*flags(run_dir=run_dir.name, steps=10_000, save_every=1, **common))
    server.until(last.exists)
    log, lines = run_dir / "metrics.jsonl", 0
    for i in range(kills):
        server.until(lambda: log.read_bytes().count(b"\n") > lines)
        time.sleep(rng.uniform(0.0, 0.6))
        os.kill(server.child, signal.SIGKILL)
        code = server.wait()
        assert code == -signal.SIGKILL, (server.folder / "out").read_text()
        names = sorted(path.name for path in run_dir.iterdir())
        found = last if last.exists() else old
        assert load_file(found / "model.safetensors")
        step = torch.load(found / "state.pt", weights_only=True)["step"]
        assert step >= done
        done, lines = step, log.read_bytes().count(b"\n")
        report(f"kill {i + 1}: step {step}, {names}")
        steps = 10_000 if i < kills - 1 else done + 2
        server.start("--resume", run_dir.name, "--steps", steps)
    code = server.wait()
    assert code == 0, (server.folder / "out").read_text()
    server.start(*flags(run_dir=whole.name, steps=done + 2, **common))
    assert server.wait() == 0
    check_same_run(run_dir, whole)


def test_kill_at_a_random_moment_ends_the_run(server):
    """kill -9, a crash of the machine, an expired job: at any moment the last
    checkpoint is whole, and the resumed run ends where the untouched one does."""
    kill_often(server, kills=4, seed=0)


def main() -> None:
    """Kill as often as the command line says, and say what was found each time."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = char_tokenizer()
        small = save_model(
            Path(folder, "small"), small_qwen3(len(tokenizer)), tokenizer
        )
        server = Server(Path(folder), small, Ranks())
        kill_often(server, int(sys.argv[1]), int(time.time()), report=print)
    print(f"{script_path('grpo')}: equal to the run that was never killed")


if __name__ == "__main__":
    main()
