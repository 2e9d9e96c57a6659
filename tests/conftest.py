"""Shared by all tests: the scripts as modules, small models, and the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # tests may import from this file
torch.set_num_threads(1)


def load_script(name: str) -> ModuleType:
    """algos/<name>.py as a module, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "algos" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def char_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """One token a character; pad, eos and unk have ids 0, 1 and 2 unless given."""
    special = special or {"pad_token": "<pad>", "eos_token": "<eos>"}
    characters = [*dict.fromkeys(special.values()), "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", **special
    )


def small_qwen3(vocab_size: int, seed: int = 0, **changes) -> transformers.Qwen3ForCausalLM:
    """A random Qwen3 (RoPE, grouped queries) of some ten thousand parameters."""
    torch.manual_seed(seed)
    config = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64)
    config |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config |= dict(head_dim=8, max_position_embeddings=128, initializer_range=0.3)
    config |= dict(tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    config |= dict(bos_token_id=None)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config | changes)).eval()


def small_gpt2(vocab_size: int, seed: int = 0, **changes) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 (learned positions) of the same size."""
    torch.manual_seed(seed)
    config = dict(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    config |= dict(initializer_range=0.3, eos_token_id=1, bos_token_id=1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | changes)).eval()


def save_model(folder: Path, model, tokenizer) -> str:
    """A model folder as a user has it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def metrics_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
