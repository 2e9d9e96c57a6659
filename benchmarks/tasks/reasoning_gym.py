"""reasoning-gym (arXiv 2505.24760): any of its generators of problems with a verifier.

    REASONING_GYM=countdown,chain_sum REASONING_GYM_SUFFIX=/no_think \\
        python algos/grpo.py --model Qwen/Qwen3-0.6B \\
        --task benchmarks/tasks/reasoning_gym.py --max-new-tokens 512 \\
        --micro-batch-size 8 --rollout-batch-size 128 --gradient-checkpointing

    REASONING_GYM          names of generators, separated by commas, which take turns
                           (default: countdown)
    REASONING_GYM_CONFIG   their settings, as in {"countdown": {"max_numbers": 4}}
    REASONING_GYM_SIZE     problems to make at the start (default: 2000), of which three
                           quarters are trained on, and up to as many others, of which
                           a quarter is for evaluation: seconds for most generators,
                           over a minute for countdown, two seconds each for knight_swap
    REASONING_GYM_SECONDS  limit for one verdict (default: 3)
    REASONING_GYM_SUFFIX   put behind each question: see gsm8k.py's

The reward is the generator's own score, 0 to 1, of what stands in the last <answer>
</answer> of the last 10,000 characters of a completion; 0 without one, and for a
<think> that is not ended. The scorers of seven generators pay for one answer to most
questions, or for an echo; a line says so. A question's own text decides whether it is
held out (a quarter is), so the splits share none under any seed; their generators have
seeds apart as well. Those of isomorphic_strings, polynomial_multiplication and
ransom_note follow PYTHONHASHSEED too: fix it to resume a run, and for torchrun. codeio
makes other problems in each process: a run with it cannot be resumed, nor use torchrun.

Some of these scores evaluate a completion's text as Python. So they run in a worker
process, which is ended at the limit and may not write files, start processes or open
connections: a fence against accidents, not against an attacker. Needs
benchmarks/requirements.txt.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator

# This file has the name of a module. Where its folder is searched (a script in it is
# run), it must not stand in for that: the folder goes, the real module takes its place.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != HERE]
if __name__ == os.path.basename(__file__)[:-3]:
    del sys.modules[__name__]
    __import__(__name__)

INSTRUCTION = "Reason step by step, then give the answer as <answer>...</answer>."
SECONDS = float(os.environ.get("REASONING_GYM_SECONDS", 3))
if not 0.1 <= SECONDS < 1e6:
    raise ValueError(f"REASONING_GYM_SECONDS is {SECONDS}: it must be 0.1 or more")
WARM_UP = "chain_sum", "3", {"answer": "3"}
PAYS_FOR = {"coin_flip": "0", "complex_arithmetic": "nan", "game_of_life_halting": "x"}
PAYS_FOR |= {"puzzle24": "6*4*1*1", "propositional_logic": "(P ∨ Q)"}
PAYS_FOR |= {"game_of_life": "[[0, 0, ...], ...], no live cell"}
PAYS_FOR |= {"simple_integration": "Integral(what it asks to integrate, X)"}


@functools.cache
def generator(name: str, seed: int = 0, size: int = 1):
    """The data set of a generator under its settings in the environment."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        known = " ".join(sorted(DATASETS))
        raise ValueError(f"reasoning-gym has no generator {name!r} but these: {known}")
    settings = json.loads(os.environ.get("REASONING_GYM_CONFIG", "{}")).get(name, {})
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)


def judge(name: str, given: str, entry: dict) -> float:
    """The generator's own score of an answer."""
    return generator(name).score_answer(given, entry)


def problems(split: str, seed: int) -> Iterator[dict]:
    """Problems of the generators in turn, as many as REASONING_GYM_SIZE allows."""
    names = os.environ.get("REASONING_GYM", "countdown").replace(",", " ").split()
    names = [*dict.fromkeys(names)] or [""]
    known = json.loads(os.environ.get("REASONING_GYM_CONFIG", "{}"))
    if more := known.keys() - names:
        raise ValueError(f"REASONING_GYM_CONFIG has {sorted(more)}: not in {names}")
    size = int(os.environ.get("REASONING_GYM_SIZE", 2000))
    first = random.Random(seed).randrange(2**30) + 2**30 * (split == "eval")
    random.seed(first)  # list_functions draws from this, not from its own seed
    each = -(-size // len(names))
    entries = [generator(name, first, each) for name in names]
    worker()  # if reasoning-gym does not work there, that is said now
    for name in PAYS_FOR.keys() & names if split == "train" else ():
        said = f"{name}: nearly any question pays for {PAYS_FOR[name]!r}"
        print(said, file=sys.stderr)
    return generated(split, names, zip(*entries))


def generated(split: str, names: list[str], turns: Iterable[tuple]) -> Iterator[dict]:
    """The entries whose question belongs to the split."""
    for name, entry in itertools.chain.from_iterable(zip(names, t) for t in turns):
        prompt = f"{entry['question']}\n\n{INSTRUCTION}"
        if (random.Random(prompt).random() < 1 / 4) == (split == "eval"):
            answer = {"name": name, "entry": entry}
            solution = f"<answer>{entry['answer']}</answer>" if entry["answer"] else ""
            suffix = os.environ.get("REASONING_GYM_SUFFIX", "")
            content = f"{prompt} {suffix}".rstrip()
            prompt = [{"role": "user", "content": content}]
            yield {"prompt": prompt, "answer": answer, "solution": solution}


def reward(problem, completion: str) -> float:
    """The score of the completion's last <answer>...</answer>, 0 to 1."""
    text = completion.rpartition("</think>")[2]
    before, end, _ = text[-10_000:].rpartition("</answer>")
    _, start, given = before.rpartition("<answer>")
    if not (end and start) or "<think>" in text:
        return 0.0
    value = bounded(problem.answer["name"], given.strip(), problem.answer["entry"])
    if not -1e-6 < value < 1 + 1e-6:  # some add parts up, and round
        raise ValueError(f"{problem.answer['name']} scored {value}, not 0 to 1")
    return min(max(value, 0.0), 1.0)


# ------------------- A judge with bounds: the same in both files ----------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REFUSED = "chmod chown exec fork forkpty kill killpg link mkdir posix_spawn remove"
REFUSED += " rename rmdir symlink system truncate"
REFUSED = {f"os.{name}" for name in REFUSED.split()}


def refuse(event: str, args: tuple) -> None:
    """Audit hook of the worker: no writing, no processes, no connections."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
    module = event.partition(".")[0]
    if writes or event in REFUSED or module in ("subprocess", "socket", "ctypes"):
        raise PermissionError(f"{event} in the text of a completion")


def serve(descriptor: int) -> None:
    """The worker: judge one job after the other until the other end closes."""
    import logging
    import resource
    import signal
    from multiprocessing.connection import Connection

    logging.disable()
    connection = Connection(descriptor)
    try:
        connection.send(f"it judged {WARM_UP[1:]} wrongly" * (judge(*WARM_UP) != 1))
    except Exception as e:
        connection.send(f"{type(e).__name__}: {e}")
        return
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    sys.addaudithook(refuse)
    try:
        while job := connection.recv():
            signal.alarm(int(2 * SECONDS) + 1)  # in case nobody is left to end it
            try:
                verdict = float(judge(*job)), ""
            except Exception as e:
                verdict = 0.0, f"{type(e).__name__}: {e}"[:200]
            signal.alarm(0)
            connection.send(verdict)
    except EOFError:
        pass


@functools.cache
def worker() -> tuple:
    """A new process of this file, ready to judge, and the connection to it."""
    import subprocess
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), str(theirs.fileno())],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C lets a script finish its step: so must this
    )
    theirs.close()
    try:
        wrong = ours.recv() if ours.poll(120) else "no word from it in 120 s"
    except EOFError:
        wrong = f"exit code {process.wait()}"
    if wrong:
        process.kill()
        process.wait()
        raise RuntimeError(f"the worker of {__file__} does not start: {wrong}")
    return process, ours


def bounded(*job) -> float:
    """judge(*job) in the worker. If that takes more than SECONDS, raises, or ends two
    workers, then 0.0 and a line that says so; a new worker takes the next job."""
    for _ in range(2):  # one worker's end may have had nothing to do with its job
        (process, connection), in_order = worker(), False
        try:
            connection.send(job)
            why = f"no verdict in {SECONDS:g} s"
            if connection.poll(SECONDS):
                value, why = connection.recv()
                in_order = True
            if not why:
                return value
            break
        except (EOFError, ConnectionError):
            why = f"the worker ended with exit code {process.wait()}"
        finally:
            if not in_order:  # nor may a late verdict meet the next job
                process.kill()
                process.wait()
                connection.close()
                worker.cache_clear()
    print(f"scored 0 ({why}): {job[1][:200]!r}", file=sys.stderr)
    return 0.0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"error: this is a task: python algos/grpo.py --task {sys.argv[0]}")
    serve(int(sys.argv[1]))
