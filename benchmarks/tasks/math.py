"""MATH (arXiv 2103.03874): competition problems, judged by math-verify.

    MATH_SUFFIX=/no_think python algos/grpo.py --model Qwen/Qwen3-0.6B \\
        --task benchmarks/tasks/math.py --max-new-tokens 1024 \\
        --micro-batch-size 4 --rollout-batch-size 64 --gradient-checkpointing

    MATH_DATASET  the data set: a hub name or a local folder in the hub's format, with
                  the splits train and test and the columns problem and solution
                  (default: DigitalLearningGmbH/MATH-lighteval, 7,500 and 5,000
                  problems: a copy of hendrycks/competition_math, which the hub took
                  down in January 2025)
    MATH_CONFIG   a configuration of it, such as algebra (default: its own default)
    MATH_SECONDS  limit for one verdict (default: 3)
    MATH_SUFFIX   put behind each question; Qwen3's chat models think first, often for
                  longer than there is room, unless it is /no_think

The reward is 1 if the last \\boxed{...} in the last 2,000 characters of a completion is
the text of the answer, or equal to it for math-verify (which compares numbers to six
decimals, reads the right side of an equation alone, and neither units, the bases of
numbers such as 12_7 nor the brackets of a pair). What is thought before
</think> does not count, and a thought that is not ended earns nothing. Evaluation takes
the test split in a fixed order that mixes its subjects; its questions are not trained
on. Rows without a boxed answer are left out, and counted on stderr.

A completion may hold an expression that takes forever or all memory: math-verify runs
in a worker process, which is ended at the limit. Needs benchmarks/requirements.txt.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator

# This file has the name of a module. Where its folder is searched (a script in it is
# run), it must not stand in for that: the folder goes, the real module takes its place.
# So what itself imports math is imported in the functions that need it.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != HERE]
if __name__ == os.path.basename(__file__)[:-3]:
    del sys.modules[__name__]
    __import__(__name__)

INSTRUCTION = r"Reason step by step and put the final answer in \boxed{}."
SECONDS = float(os.environ.get("MATH_SECONDS", 3))
if not 0.1 <= SECONDS < 1e6:
    raise ValueError(f"MATH_SECONDS is {SECONDS}: it must be 0.1 or more")
WARM_UP = r"\frac{1}{2}", "0.5"


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds; None if there is none or it has no end."""
    start, depth = text.rfind(r"\boxed{"), 0
    if start < 0:
        return None
    for brace in re.finditer(r"\\.|[{}]", text[start + 6 :]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[start + 7 : start + 6 + brace.start()].strip()
    return None


def judge(answer: str, given: str) -> bool:
    """Whether math-verify takes the given expression for the answer."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]  # no Python expressions
    answer, given = (re.sub(r"(?<!\\)\\[,!]", "", x) for x in (answer, given))  # spaces
    once = dict(raise_on_error=True, parsing_timeout=None, extraction_config=latex)
    a, b = (parse(rf"\boxed{{{text}}}", **once) for text in (answer, given))
    return verify(a, b, raise_on_error=True, timeout_seconds=None)


def problems(split: str, seed: int) -> Iterator[dict]:
    """The train or (split "eval") the test split; the seed changes nothing."""
    import random

    import datasets

    path = os.environ.get("MATH_DATASET", "DigitalLearningGmbH/MATH-lighteval")
    try:
        rows = datasets.load_dataset(path, os.environ.get("MATH_CONFIG"))
        pairs = lambda part: [(row["problem"], row["solution"]) for row in rows[part]]
        train, test = pairs("train"), pairs("test")
    except Exception as e:
        advice = "without network MATH_DATASET has to name a local folder"
        raise RuntimeError(f"cannot load the data set {path} ({advice}): {e!r}") from e
    worker()  # if math-verify does not work, that is said now
    held_out = {problem for problem, _ in test}
    train = [pair for pair in train if pair[0] not in held_out]
    rows, found = test if split == "eval" else train, []
    for problem, solution in random.Random(0).sample(rows, len(rows)):
        if answer := boxed(solution):
            suffix = os.environ.get("MATH_SUFFIX", "")
            content = f"{problem}\n\n{INSTRUCTION} {suffix}".strip()
            prompt = [{"role": "user", "content": content}]
            found.append({"prompt": prompt, "answer": answer, "solution": solution})
    if left_out := len(rows) - len(found):
        about = f"{left_out} of {len(rows)} {split} problems"
        print(f"{path}: {about} have no boxed answer: left out", file=sys.stderr)
    return iter(found)


def reward(problem, completion: str) -> float:
    """1.0 if the completion's last box holds the answer, else 0.0."""
    text = completion.rpartition("</think>")[2]
    given = None if "<think>" in text else boxed(text[-2000:])
    if given is None or given == problem.answer:
        return float(given is not None)
    return bounded(problem.answer, given.rstrip(".,"))


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
