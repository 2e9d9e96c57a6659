"""Processes of their own for a test, as copies of one that has imported everything.

An interpreter spends seconds on importing torch and transformers and on its first model
and picture; a fork of a warm one spends none. `Ranks` starts the warm one: this file,
run as a program, which reads a line of JSON for each request and answers with another.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time


class Ranks:
    """Starts command lines, each as any number of ranks on the CPU."""

    def __init__(self):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(command, env=env, bufsize=1, **pipes)

    def ask(self, **request) -> list[int]:
        """Send a request and wait for the answer."""
        self.server.stdin.write(json.dumps(request) + "\n")
        return json.loads(self.server.stdout.readline())

    def start(self, world: int, program, *words, cwd, **env) -> list[int]:
        """Process ids of `world` ranks of `python program words`, in the folder cwd.
        What they print is added to the file out there. They can import from tests/."""
        command = [str(word) for word in (program, *words)]
        env = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | env
        return self.ask(world=world, command=command, cwd=str(cwd), env=env)

    def wait(self, pids: list[int], seconds: float = 200) -> list[int]:
        """Their exit codes; minus the number of the signal that killed one: SIGKILL
        for those that are still there after so many seconds."""
        return self.ask(pids=pids, seconds=seconds)

    def run(self, world: int, program, *words, cwd, **env) -> list[int]:
        """The exit codes of ranks that were started as above."""
        return self.wait(self.start(world, program, *words, cwd=cwd, **env))

    def close(self) -> None:
        """End the warm process, and what it has started."""
        self.server.stdin.close()
        self.server.wait()


def warm_up() -> None:
    """Import what the scripts import, and what that imports when it is first used."""
    import transformers
    import tyro  # noqa: F401
    from conftest import char_tokenizer, save_model, small_qwen3
    from matplotlib.figure import Figure

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, small_qwen3(50), char_tokenizer())
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)
        axes = Figure(layout="constrained").add_subplot()
        axes.plot([0, 1], "o-", label="a line")
        axes.legend()
        axes.figure.savefig(f"{folder}/picture.png")
    gc.collect()
    gc.freeze()  # or each copy would visit, and so copy, all of it


def become(rank: int, port: int, world: int, command: list[str], cwd: str, env: dict):
    """Turn this process into a rank of the command line, and end with it."""
    os.environ.clear()
    os.environ.update(env)
    if world > 1:  # what torchrun sets
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in 1, 2:
        os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


def exit_code(pid: int, end: float) -> int:
    """The exit code of a child; it is killed if it is there at that time."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def serve() -> None:
    """Start ranks or wait for them, as each line of stdin says."""
    warm_up()
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "pids" in request:
            end = time.monotonic() + request["seconds"]
            answer = [exit_code(pid, end) for pid in request["pids"]]
            running -= {*request["pids"]}
        else:
            answer = []
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            for rank in range(request["world"]):
                if pid := os.fork():
                    answer.append(pid)
                else:
                    become(rank, port, **request)
            running |= {*answer}
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
