"""Shared by all tests: the scripts as modules, small models, and the command line."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import transformers
from ranks import Ranks
from tokenizers import Tokenizer, decoders, models

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def script_path(name: str) -> Path:
    """algos/<name>.py, or a broken copy of it in the folder $ONEFILE_ALGOS: that is how
    one sees that a test goes red when its mistake is put back."""
    return Path(os.environ.get("ONEFILE_ALGOS", ROOT / "algos"), f"{name}.py")


def load_script(name: str) -> ModuleType:
    """algos/<name>.py as a module, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script_path(name))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def char_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """One token a character; pad, eos and unk have ids 0, 1 and 2 unless given."""
    special = special or {"pad_token": "<pad>", "eos_token": "<eos>"}
    characters = [
        *dict.fromkeys(special.values()),
        "<unk>",
        "\n",
        *map(chr, range(32, 127)),
    ]
    vocabulary = {character: i for i, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", **special
    )


def small_qwen3(
    vocab_size: int, seed: int = 0, **changes
) -> transformers.Qwen3ForCausalLM:
    """A random Qwen3 (RoPE, grouped queries) of some ten thousand parameters."""
    torch.manual_seed(seed)
    config = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64)
    config |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config |= dict(head_dim=8, max_position_embeddings=128, initializer_range=0.3)
    config |= dict(tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    config |= dict(bos_token_id=None)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**config | changes)
    ).eval()


def small_gpt2(
    vocab_size: int, seed: int = 0, **changes
) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 (learned positions) of the same size."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128
    )
    config |= dict(initializer_range=0.3, eos_token_id=1, bos_token_id=1)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config | changes)
    ).eval()


def save_model(folder: Path, model, tokenizer) -> str:
    """A model folder as a user has it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps every gradient it is given, (parameters,)."""

    def __init__(self, model, lr: float = 0.0):
        super().__init__(model.parameters(), lr)
        self.seen = []

    def step(self):
        parameters = self.param_groups[0]["params"]
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        super().step()


def cpu_args(script: ModuleType, **changes):
    """The script's Args for an exact test: fp32 on the CPU, gradients never clipped;
    groups of two."""
    exact = dict(device="cpu", dtype="float32", max_grad_norm=1e30, warmup_steps=0)
    return script.Args(**exact | dict(group_size=2) | changes)


def random_rollout(
    script: ModuleType,
    vocab_size: int,
    prompt_lengths: list[int],
    lengths: list[int],
    truncated: list[bool] | None = None,
    seed: int = 0,
):
    """A Rollout of random tokens with EOS = 1 at the end of each completion that is not
    truncated. Its padding is random too: nobody may look at it."""
    generator = torch.Generator().manual_seed(seed)
    size, p, c = len(lengths), max(prompt_lengths), max(lengths)
    truncated = torch.tensor(truncated or [False] * size)
    tokens = torch.randint(2, vocab_size, (size, p + c), generator=generator)
    seen = torch.zeros(size, p + c, dtype=torch.int64)
    for i, (before, after) in enumerate(zip(prompt_lengths, lengths)):
        seen[i, p - before : p + after] = 1
        if not truncated[i]:
            tokens[i, p + after - 1] = 1
    mask = seen[:, p:].float()
    return script.Rollout(
        tokens=tokens,
        attention_mask=seen,
        completion_mask=mask,
        logprobs=torch.zeros(size, c),
        rewards=torch.zeros(size),
        truncated=truncated,
        texts=[""] * size,
    )


def plain_logprobs(model, rollout, temperature: float = 1.0) -> list[torch.Tensor]:
    """Log-probs of each completion's tokens, (length,) each, in the model's dtype, with
    gradient: one row at a time, nothing padded, straight from the model's logits."""
    rows = []
    for i, row in enumerate(rollout.tokens):
        ids = row[rollout.attention_mask[i].bool()]
        length = int(rollout.completion_mask[i].sum())
        log_softmax = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        start = len(ids) - length
        rows.append(
            torch.stack([log_softmax[t - 1, ids[t]] for t in range(start, len(ids))])
        )
    return rows


@pytest.fixture(scope="session")
def grpo() -> ModuleType:
    """algos/grpo.py as a module."""
    return load_script("grpo")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> str:
    """Folder of a small random Qwen3 with a character tokenizer."""
    tokenizer = char_tokenizer()
    folder = tmp_path_factory.mktemp("models") / "small"
    return save_model(folder, small_qwen3(len(tokenizer)), tokenizer)


def run_script(script: Path | str, *flags: str, cwd: Path, timeout: float = 120, **env):
    """The finished process of a command line; its stdout and stderr are text."""
    command = [sys.executable, str(script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Starts processes that have all imports behind them."""
    server = Ranks()
    yield server
    server.close()


def metrics_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


PLUGIN = """
LETTERS = set("abcdefghijklmnopqrstuvwxyz")


def problems(split, seed):
    for i in range(12):
        yield {"prompt": f"{split} {i}:", "answer": i}


def reward(problem, completion):
    return sum(character in LETTERS for character in completion) / 4
"""  # a random model gets a little reward, so that every step changes its weights


class Finished(NamedTuple):
    """What a command line left: exit code, both streams, and its errors."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that begin with error, progress bars apart."""
        lines = self.stderr.replace("\r", "\n").split("\n")
        return [line for line in lines if line.startswith("error: ")]


@pytest.fixture
def cli(grpo, small_folder, tmp_path, monkeypatch, capsys):
    """grpo.py's command line in this process, in an empty folder with a plug-in
    task.py: cli(*flags) runs it whole, with a small model and few steps unless told
    otherwise. An exception that a user would see as a traceback comes through."""
    (tmp_path / "task.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    small = dict(
        task="task.py", model=small_folder, device="cpu", steps=2, run_dir="run"
    )
    small |= dict(prompts_per_step=2, group_size=4, max_new_tokens=4, warmup_steps=0)
    small |= dict(eval_prompts=2, eval_samples=2, learning_rate=1e-3)

    def run(*flags: str) -> Finished:
        flags = [str(flag) for flag in flags]
        if "--resume" not in flags:
            given = {flag.partition("=")[0] for flag in flags}
            given |= {"--task"} if "--data" in given else set()
            for name, value in small.items():
                if f"--{name.replace('_', '-')}" not in given:
                    flags += [f"--{name.replace('_', '-')}", str(value)]
        monkeypatch.setattr(sys, "argv", ["grpo.py", *flags])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        capsys.readouterr()
        try:
            grpo.train(grpo.parse_args())
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Finished(code, *capsys.readouterr())

    return run


@functools.cache
def watchers() -> list[Callable]:
    """Functions that are called before each operation on files, while they are in this
    list. The hook stays for good, so it is set only where it is needed."""
    active = []

    def look(event: str, _) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            calls, active[:] = [*active], []  # what they do themselves does not count
            for call in calls:
                call()
            active.extend(calls)

    sys.addaudithook(look)
    return active


@pytest.fixture
def saves(monkeypatch):
    """saves(script, run_dir) watches a script's saves from here on: before each
    operation on files one checkpoint is whole, the one before the save or the one after
    it, and all of it is on the disk before it has its name. Returns a list of the
    numbers of operations, to which each save adds one."""

    def watch(script: ModuleType, run_dir: Path) -> list[int]:
        save, counts, synced = script.save_checkpoint, [], set()
        sync = lambda file: synced.add(os.readlink(f"/proc/self/fd/{file}"))
        monkeypatch.setattr(os, "fsync", sync)

        def found() -> frozenset | None:
            for name in "checkpoint", "checkpoint.old":
                if (run_dir / name).exists():
                    files = (run_dir / name).iterdir()
                    return frozenset((x.name, x.read_bytes()) for x in files)
            return None

        def watched(*inputs) -> None:
            seen, before = [], found()
            synced.clear()
            watchers().append(lambda: seen.append(found()))
            try:
                save(*inputs)
            finally:
                watchers().clear()
            assert found() not in (None, before) and {*seen} <= {before, found()}
            new = run_dir / "checkpoint.new"
            assert synced >= {str(new), *(str(new / name) for name, _ in found())}
            counts.append(len(seen))

        monkeypatch.setattr(script, "save_checkpoint", watched)
        return counts

    return watch


def pytest_collection_finish() -> None:
    """Hide what is there by now from the garbage collector: it would look at hundreds
    of thousands of objects of torch and transformers each time."""
    gc.collect()
    gc.freeze()
