"""PrefixRL: RL on hard problems, conditioned on prefixes of off-policy traces.

Paper: Reuse your FLOPs (arXiv 2601.18795). Parent: grpo.py, whose update this is.

On a problem that the model never solves, all completions of every group are wrong, and
RL learns nothing. But FLOPs were spent once to find one right answer (a trace) to it.
Start the model from inside that trace, and it is sometimes right:

    x                a hard problem: none of --hard-k samples of the base model is right
    z                its trace: the first right one of at most --trace-cap samples by
                     --trace-model, or one given by --traces
    x_h = x z_<h     a prefixed problem: h tokens of z stand at the start of the answer,
                     --prefix-low |z| <= h <= --prefix-high |z|
    y_i              completions of x or of x_h, a group of each, all drawn from pi
    A_i              r_i - mean(r) of the group (--advantage-scale std: / std(r))
    J =              1/Z sum_i sum_t w_i A_i log pi(y_i,t | x or x_h, y_i,<t)

    --normalization token     w_i = 1,        Z = completion tokens
                    sequence  w_i = 1/|y_i|,  Z = completions
                    constant  w_i = 1,        Z = completions x max length

The prefix is context: none of its tokens is in y, w or Z (with --no-mask-prefix all
are, to see what that does). What is learned behind prefixes carries over to the
problems without one (back-generalisation); eval/pass@k counts only those.

Compute is counted as in the paper: 2 N FLOPs per token that N parameters read, 6 N per
token trained on. Prompts, prefixes and the search for hard problems and traces count,
evaluation does not. --max-flops ends runs at equal cost. Baselines and variants:

    --prefixes-per-problem 0                   plain RL on the hard problems
    --prefixes-per-problem 0 --sft-epochs 10   imitate the traces, then plain RL
    --prefixes-per-problem 0 --off-policy      plain RL; z takes the last place of each
                                               group, A weighted by pi(z) / mu(z)
    --plain-share 0                            prefixed problems only

Differences. mu(z) is the probability with which z was sampled; the weight does not
correct for having kept z because it is right, and is capped at e^20. A right answer
that was cut off is a trace too: imitation learns no stop from it. The paper states
no clip and no KL: grpo.py's (e_low, e_high, beta) are here, and with one update per
batch the clip never acts. The paper, as far as is known, uses a learning rate of 1e-6,
128 prompts per step, 512 samples of each hard problem and up to 2,500 tries for a
trace. The second command below is a small version of that, with at most 7 million
tokens to find the hard problems.

    python algos/prefixrl.py
    python algos/prefixrl.py --model Qwen/Qwen3-0.6B-Base --data train.jsonl \
        --candidates 200 --hard-k 32 --trace-cap 256 --max-new-tokens 1024 \
        --micro-batch-size 4 --rollout-batch-size 64 --gradient-checkpointing

The first, with nothing to download, learns chains of nine moves, all of one skill, from
a model that gets a move right one time in four and a whole chain never. Its traces come
from a better model (--trace-model careful); their FLOPs are counted, those of making
the two models are not. What is learned behind a prefix helps before it only if the
steps have a skill in common, as here; and here it is not ahead of imitation of the
same traces, then RL (README.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# names whose code may differ from their namesakes in other scripts
OWN = ("CURVE", "TASKS", "check", "evaluate")
CURVE = "eval/(hard_)?pass@.*"  # metrics that curve.png shows
AXIS = "step"  # ... and along what
SHARES = range(0, 100, 20)  # percent of a trace from which an evaluation starts
RANK = int(os.environ.get("RANK", 0))  # of torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# cuDNN's attention has gradients of NaN at some lengths (pytorch issue 196678)
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclasses.dataclass
class Args:
    seed: int = 1  # for the problems, their order, the sampling and the built-in model
    steps: int = 200  # batches in the whole run, including those before a --resume
    run_dir: str = ""  # folder of the run (default: runs/prefixrl/<time>-s<seed>)
    resume: str = ""  # folder of a run to continue; its saved flags apply
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # for matrix products
    model: str = "tiny"  # tiny (built in), a local folder or a hub name
    tiny_steps: int = 900  # warm-start steps of tiny, on 64 worked answers each
    task: str = "chain"  # chain-9 (moves), -8, ... or a task.py
    data: str = ""  # JSONL file of {"prompt": ..., "answer": ...}, instead of --task
    eval_data: str = ""  # JSONL file to evaluate on (default: a tenth of --data)
    candidates: int = 96  # problems that are searched for hard ones
    hard_k: int = 64  # samples that must all be wrong for a problem to be hard
    trace_cap: int = 500  # at most so many more samples of a hard problem for a trace
    trace_model: str = ""  # samples traces: base (for tiny: careful), folder, hub name
    traces: str = ""  # JSONL of {"prompt": ..., "ids" or "text": ...}, not sampled ones
    strict_traces: bool = False  # stop at a bad line of --traces instead of skipping it
    prefixes_per_problem: int = 3  # prefixes cut from each trace; 0: plain RL
    prefix_low: float = 0.4  # least share of the trace in a prefix
    prefix_high: float = 0.8  # greatest share of the trace in a prefix
    plain_share: float = 0.25  # share of a batch without a prefix
    mask_prefix: bool = True  # keep the tokens of a prefix out of the loss
    sft_epochs: int = 0  # epochs of imitation of the traces before RL
    off_policy: bool = False  # put each trace into its group, importance-weighted
    max_flops: float = 0.0  # end the run at this many FLOPs (0: after --steps)
    prompts_per_step: int = 32  # prompts in a batch, over all ranks
    group_size: int = 8  # completions of each prompt (G)
    max_new_tokens: int = 16  # tokens at which a completion is cut off
    temperature: float = 1.0  # for sampling, and for every log-prob
    learning_rate: float | None = None  # default: 3e-4 for tiny, 1e-6 for other models
    warmup_steps: int = 10  # steps over which the learning rate rises
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    micro_batch_size: int = 64  # completions in one forward and backward pass
    rollout_batch_size: int = 512  # completions sampled in one batch
    lora_rank: int = 0  # train adapters of this rank (needs peft); 0: all weights
    gradient_checkpointing: bool = False  # recompute activations to save memory
    updates_per_batch: int = 1  # optimiser steps on each batch
    clip_low: float = 0.2  # e_low: ratios are clipped at 1 - e_low
    clip_high: float = 0.28  # e_high: ratios are clipped at 1 + e_high
    advantage_scale: Literal["std", "none"] = "none"  # divide by the group's std?
    normalization: Literal["token", "sequence", "constant"] = "token"  # denominator Z
    kl_coef: float = 0.0  # beta: weight of the KL to the initial model (LoRA: its base)
    mask_truncated: bool = False  # leave cut-off completions out of the loss
    eval_every: int = 50  # steps between evaluations
    eval_prompts: int = 128  # problems of a kind in an evaluation
    eval_samples: int = 8  # completions per evaluation problem, the k of pass@k
    save_every: int = 100  # steps between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "onefile-rl"  # Weights & Biases project


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one line that says what the user has to fix."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def outlive_pipes() -> None:
    """Go on in silence when the reader of stdout or stderr is gone: in `2>&1 | tee log`
    tee dies of the same Ctrl-C that lets a run finish its step and save."""

    def guard(stream, call: Callable, *text):
        try:
            return call(*text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    for stream in sys.stdout, sys.stderr:
        for name in "write", "flush":
            call = functools.partial(guard, stream, getattr(stream, name))
            setattr(stream, name, call)


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn an exception in the block into one line: what went wrong, and why."""
    try:
        yield
    except Exception as e:
        where = ""
        for frame, file, line, *_ in inspect.trace(0):
            if frame.f_globals.get("__name__") == "<run_path>":  # a task.py
                where = f" ({file}, line {line})"
        fail(f"{what}: {type(e).__name__}: {e}{where}")


# ------------------------------------- Task -------------------------------------------


class Problem(NamedTuple):
    """A prompt (text or chat messages), what the reward needs, and a worked answer."""

    prompt: str | list[dict]
    answer: object
    solution: str = ""


MOVES = {"+": 1, "-": -1, "*": 3}
SLIPS = {"tiny": 0.76, "careful": 0.1}  # in the answers that a model starts from


def chain_problems(
    split: str, seed: int, size: int, slips: float = 0.0
) -> Iterator[Problem]:
    """Endless problems such as "8+*-:" with the answer "921": from a digit on, each of
    `size` moves adds 1 (+), subtracts 1 (-) or adds 3 (*), modulo 10. A share `slips`
    of the steps in worked answers goes to a random wrong digit. The prompt decides what
    is held out."""
    rng = random.Random(f"{split} {seed}")
    while True:
        start, moves = rng.randrange(10), "".join(rng.choices([*MOVES], k=size))
        prompt, digits = f"{start}{moves}:", [start]
        for move in moves:
            slip = rng.randint(1, 9) if rng.random() < slips else 0
            digits.append((digits[-1] + MOVES[move] + slip) % 10)
        if (random.Random(prompt).random() < 1 / 8) == (split == "eval"):
            yield Problem(prompt, [start, moves], "".join(map(str, digits[1:])))


def chain_reward(problem: Problem, completion: str) -> float:
    """1.0 if the completion is exactly the digits after each move, else 0.0: a right
    last digit alone earns nothing."""
    start, moves = problem.answer
    digit, right = start, ""
    for move in moves:
        digit = (digit + MOVES[move]) % 10
        right += str(digit)
    return float(completion == right)


TASKS = {"chain": (chain_problems, chain_reward, 9)}  # 9: default size


def answer_reward(problem: Problem, completion: str) -> float:
    """For --data: 1.0 if the answer is the text after the last "Answer:" (all the text
    if there is none) or the last number in it, else 0.0."""
    end = completion[-1000:]
    if len(completion) > 1000:
        end = re.sub(r"^\S+", "", end)  # 142 may have been cut to 42
    texts = str(problem.answer), end.rpartition("Answer:")[2]
    texts = [text.replace("\N{MINUS SIGN}", "-") for text in texts]
    answer, text = (x.strip("* \r\n\t").rstrip("*. \r\n\t") for x in texts)  # **B.**
    number = r"(?:(?<![\w)])-)?(?:[0-9]+(?:[.,/][0-9]+)*|(?<![0-9])[.][0-9]+)"
    numbers = re.findall(number, text)
    return float(answer != "" and answer in (text, *numbers[-1:]))


def check_prompt(prompt) -> None:
    """ValueError unless it is text, or chat messages that the model is to answer."""
    if isinstance(prompt, str):
        return
    for message in prompt if isinstance(prompt, list) and prompt else [None]:
        message = message if isinstance(message, dict) else {}
        said = isinstance(message.get("content"), str) or "tool_calls" in message
        if not (isinstance(message.get("role"), str) and said):
            raise ValueError("its prompt is neither text nor messages: role, content")
    if message["role"] == "assistant":
        raise ValueError("its messages end with an answer of the assistant")


def to_problem(item: Problem | dict) -> Problem:
    """A line of --data, or what a task.py yields, as a Problem."""
    item = item._asdict() if hasattr(item, "_asdict") else item
    if not (hasattr(item, "keys") and {"prompt", "answer"} <= item.keys()):
        raise ValueError("it is no object with a prompt and an answer")
    prompt, solution = item["prompt"], item.get("solution")
    check_prompt(prompt)
    solution = "" if solution is None else str(solution)
    f"{prompt}{solution}".encode()  # ValueError: half a character
    return Problem(prompt, item["answer"], solution)


def open_task(args: Args) -> tuple:
    """Where the training and the held-out problems come from: two names, two iterables
    (lines of --data, else problems, possibly endless), and reward(problem, text)."""
    files, splits = [args.task] * 2, ("train", "eval")
    name, _, size = args.task.partition("-")
    if args.data:
        files, sources = [args.data, args.eval_data or args.data], []
        for file in files:
            with blame(f"cannot read {file}"):
                sources.append(list(Path(file).open(encoding="utf-8-sig")))
        return files, sources, answer_reward
    if name in TASKS and re.fullmatch("[2-9]?", size):
        problems, reward, default = TASKS[name]
        size = int(size or default)
        return files, [problems(split, args.seed, size) for split in splits], reward
    if args.task.endswith(".py"):
        needs = "it needs the functions problems and reward"
        with blame(f"cannot load {args.task} ({needs})"):
            sys.path.append(str(Path(args.task).parent))  # for what it imports
            plugin = runpy.run_path(args.task)
            reward, problems = plugin["reward"], plugin["problems"]
            return files, [iter(problems(x, args.seed)) for x in splits], reward
    known = ", ".join(f"{name}, {name}-4" for name in TASKS)
    fail(f"unknown task {args.task!r}: give {known} (sizes 2 to 9) or a task.py")


def read_problems(file: str, source, most: int, args: Args) -> list[Problem]:
    """All lines of --data, or the first `most` problems of a task, as Problems."""
    problems = []
    with blame(f"{file}: its problems failed"):
        items = [*itertools.islice(source, None if args.data else most)]
    for i, item in enumerate(items, 1):
        with blame(f"{file}, line {i}"):
            if args.data and not item.strip():
                continue
            problem = to_problem(json.loads(item) if args.data else item)
            known = type(problem.answer) in (str, int, float)
            if args.data and not (known and str(problem.answer).strip()):
                raise ValueError("its answer is empty, or neither text nor a number")
            problems.append(problem)
    return problems


def load_task(args: Args) -> tuple[list[Problem], list[Problem], Callable]:
    """Training problems, held-out problems (no overlap), reward(problem, text)."""
    files, sources, reward = open_task(args)
    train = read_problems(files[0], sources[0], 20_000, args)
    held_out = read_problems(files[1], sources[1], args.eval_prompts, args)
    read = len(train)
    if args.data and not args.eval_data:
        held_out = held_out[::10]
    name = lambda problem: json.dumps(problem.prompt, sort_keys=True, default=str)
    seen = {name(problem) for problem in held_out}
    train = [problem for problem in train if name(problem) not in seen]
    held_out = held_out[: args.eval_prompts]
    if len(train) < args.prompts_per_step or len(held_out) < WORLD_SIZE:
        counts = f"{len(train)} problems to train on (of {read}, without those held "
        counts += f"out) and {len(held_out)} to evaluate, a step takes"
        fail(f"{' or '.join(dict.fromkeys(files))}: {counts} {args.prompts_per_step}")
    ends = [len(p.solution) for p in train if p.solution and isinstance(p.prompt, str)]
    cut = [n for n in ends if n >= args.max_new_tokens]  # a token each, and EOS
    if args.model == "tiny" and len(cut) > len(ends) / 2:
        least = f"most worked answers are longer, the longest {max(cut) + 1} tokens"
        fail(f"--max-new-tokens {args.max_new_tokens} is too few: {least}")
    score(reward, train[:1], [train[0].solution])  # a broken reward ends here
    return train, held_out, reward


def score(reward: Callable, problems: list[Problem], texts: list[str]) -> torch.Tensor:
    """Rewards (B,) float32. A failed or non-finite one stops the run and is named."""
    rewards = []
    for i, (problem, text) in enumerate(zip(problems, texts)):
        asked = f"prompt {str(problem.prompt)[:60]!r}, completion {text!r}"
        with blame(f"the reward failed on sample {i}, {asked}"):
            value = reward(problem, text)
            wrong = isinstance(value, str) or np.ndim(value)
            rewards.append(math.nan if wrong else float(value))
            if not abs(rewards[-1]) < 2.0**127:  # float32's most
                raise ValueError(f"{value} is not a finite number")
    return torch.tensor(rewards, dtype=torch.float32)


def hash_prompts(problems: list[Problem], args: Args) -> int:
    """Hash of all prompts, and of the answers of --data, which must be equal on all
    ranks and after a --resume."""
    text = str([p[:2] if args.data else p.prompt for p in problems]).encode()
    known = int(hashlib.sha256(text).hexdigest()[:15], 16)
    if not unchanged("prompts_hash", known, args):
        fail("problems differ between ranks or from the run's start: use the same ones")
    return known


# ------------------------------------- Model ------------------------------------------


def warm_start(problems: list[Problem], seed: int, steps: int, width: int) -> tuple:
    """A Qwen3 with one token per character (width 128: 0.8 M parameters), trained on
    batches of 64 worked answers, and its tokenizer."""
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    characters = [*special.values(), "\n", *map(chr, range(32, 127))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special |= dict(tokenizer_object=backend)
    tokenizer = transformers.PreTrainedTokenizerFast(**special)
    shape = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4)
    shape |= dict(vocab_size=len(characters), max_position_embeddings=512)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config = transformers.Qwen3Config(tie_word_embeddings=True, **shape, **ids)
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), "warm start, once", leave=False):
        batch = [problems[i] for i in torch.randint(len(problems), (64,))]
        prompts = tokenizer([p.prompt for p in batch])["input_ids"]
        answers = tokenizer([p.solution + "<eos>" for p in batch])["input_ids"]
        tokens = torch.cat([pad(prompts, 0, "left"), pad(answers, 0, "right")], -1)
        mask, longest = (tokens != 0).long(), max(map(len, answers))
        logprobs, _ = token_logprobs(model, tokens, mask, longest, temperature=1.0)
        (-logprobs.sum() / mask[:, -longest:].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, tokenizer


def tiny_model(problems: list[Problem], seed: int, steps: int, width=128) -> str:
    """Folder of the warm-started model, cached by a hash of all that defines it."""
    solved = [p for p in problems if isinstance(p.prompt, str) and p.solution]
    if not solved:
        fail("the tiny model needs worked answers to start from: give a --model")
    parts = warm_start, token_logprobs, Logprobs, last_hidden, pad
    defined = [[inspect.getsource(part) for part in parts], seed, steps, width]
    defined += [(p.prompt, p.solution) for p in solved]
    defined += [torch.__version__, transformers.__version__]
    defined = json.dumps(defined).encode()
    name = f"tiny-{hashlib.sha256(defined).hexdigest()[:16]}"
    path, new = Path("runs/cache", name), Path("runs/cache", f"{name}.{os.getpid()}")
    if not path.exists() and RANK == 0:
        try:
            with blame(f"cannot write {new}"):
                new.mkdir(parents=True, exist_ok=True)  # before the work, not after it
            made = warm_start(solved, seed, steps, width)
            with blame(f"cannot write {new}"):
                for part in made:
                    part.save_pretrained(new)
            with contextlib.suppress(OSError):  # another process was first
                new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    if WORLD_SIZE > 1:
        dist.barrier()
    return str(path)


def built_in(name: str, problems: list[Problem], args: Args) -> str:
    """Folder of a built-in model that was warm-started on other problems than the
    candidates (unless a task.py or --data repeats them); for the chain task it starts
    from answers with its share of slips. Other names are returned unchanged."""
    if name not in SLIPS:
        return name
    start = problems[args.candidates :]
    if not args.data and not args.task.endswith(".py"):
        used = {problem.prompt for problem in problems[: args.candidates]}
        size = int(args.task.partition("-")[2] or TASKS["chain"][2])
        others = chain_problems("train", args.seed + 1, size, SLIPS[name])
        start = [p for p in itertools.islice(others, 20_000) if p.prompt not in used]
    if not start:
        fail(f"--candidates {args.candidates}: no problem is left to make {name} from")
    return tiny_model(start, args.seed, args.tiny_steps, 64)


def check_scores(model) -> None:
    """ValueError unless the model's logits are a linear head of its last hidden states,
    those of a padded row read through the cache like those of the bare row: else what
    is scored is not what was sampled."""
    config = model.config
    changes = "final_logit_softcapping", "logit_scale", "logits_scaling"
    for key in (*changes, "lm_head_multiplier"):
        if getattr(config, key, None) not in (None, 1.0):
            raise ValueError(f"its logits are changed after the head by {key}")
    known = hasattr(config, "max_position_embeddings") and not model._is_stateful
    if not known or model.base_model is model:
        raise ValueError("it is not a text model with a cache of keys and values")
    ids, cache = torch.arange(5, device=model.device)[None], transformers.DynamicCache()
    seen, places = (ids > 0).long(), (ids - 1).clamp(min=0)  # the first is padding
    kwargs = dict(past_key_values=cache, use_cache=True)
    with torch.no_grad():
        hidden = model.base_model(ids[:, 1:]).last_hidden_state
        linear = model.get_output_embeddings()(hidden)
        inputs = dict(attention_mask=seen[:, :4], position_ids=places[:, :4])
        first = model(ids[:, :4], **inputs, **kwargs).logits[:, 1:]
        inputs = dict(attention_mask=seen, position_ids=places[:, 4:])
        with one_by_one(model):
            last = model(ids[:, 4:], **inputs, **kwargs).logits
    gap = (torch.cat([first, last], 1) - linear).abs().max()
    if not gap < 1e-3 * linear.abs().max():
        what = "not a linear head of its hidden states, or change with padding"
        raise ValueError(f"its logits are {what} or with the cache")


def load_model(name: str, args: Args) -> tuple:
    """Model (fp32 weights, no dropout) and tokenizer from a hub name or a local folder,
    which may hold a LoRA adapter instead of weights."""
    local = os.path.isdir(name)
    with blame(f"cannot load the model {name!r}{'' if local else ' (no folder here)'}"):
        name = base = os.path.abspath(name) if local else name  # adapters refer to it
        adapter = Path(name, "adapter_config.json")
        if adapter.exists():
            base = json.loads(adapter.read_text())["base_model_name_or_path"]
        safe = dict(trust_remote_code=False)  # None would ask, and run it
        config = transformers.AutoConfig.from_pretrained(base, **safe)
        for key in [key for key in vars(config) if "drop" in key]:
            setattr(config, key, 0.0)
        kwargs = dict(config=config, dtype=torch.float32, output_loading_info=True)
        auto = transformers.AutoModelForCausalLM
        model, info = auto.from_pretrained(base, **kwargs, **safe)
        if info["missing_keys"]:  # they would be random
            raise ValueError(f"its files lack {sorted(info['missing_keys'])[:3]}")
        if adapter.exists():
            model.load_adapter(name)
            ends = model.get_input_embeddings(), model.get_output_embeddings()
            more = any("lora_" in x for end in ends for x, _ in end.named_parameters())
            if more or model.peft_config["default"].modules_to_save:
                raise ValueError("its adapter has more than LoRA layers: merge it")
            if Path(name, "generation_config.json").exists():  # its own end tokens
                how = transformers.GenerationConfig.from_pretrained(name)
                model.generation_config = how
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):  # an adapter's
                module.p = 0.0
        own = any(Path(name).glob("tokenizer*"))  # an adapter may have none
        files = name if own else base
        tokenizer = transformers.AutoTokenizer.from_pretrained(files, **safe)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # made without files
            raise ValueError("its tokenizer has no words: are its files there?")
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no EOS token, so no completion can end")
        check_scores(model)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= len(model.get_input_embeddings().weight):
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cpu" if args.lora_rank else args.device), tokenizer


def add_lora(model, args: Args) -> None:
    """With --lora-rank: freeze the weights (in bf16 if --dtype is), add a trainable
    product of two matrices of that rank, scaled by 2, to every linear layer but the
    head (LoRA, arXiv 2106.09685), then move the model to the device. A model loaded
    from an adapter keeps that one."""
    saved = model.peft_config["default"].r if model._hf_peft_config_loaded else 0
    if saved not in (0, args.lora_rank):
        fail(f"{args.model} is an adapter of another rank: --lora-rank {saved}")
    if not args.lora_rank:
        return
    torch.manual_seed(args.seed)
    if not saved:
        with blame("--lora-rank needs a model of linear layers and: pip install peft"):
            import peft

            shape = dict(r=args.lora_rank, lora_alpha=2 * args.lora_rank)
            model.add_adapter(peft.LoraConfig(target_modules="all-linear", **shape))
    for name, weight in model.named_parameters():
        weight.requires_grad = "lora_" in name
        if not weight.requires_grad and args.dtype == "bfloat16":
            weight.data = weight.data.bfloat16()
    model.to(args.device)


@contextlib.contextmanager
def without_lora(model, args: Args) -> Iterator[None]:
    """Run the block with the model's adapters off, if it has any."""
    if args.lora_rank:
        model.disable_adapters()
    yield
    if args.lora_rank:
        model.enable_adapters()


def load_reference(name: str, model, args: Args):
    """The frozen initial model, if there is a KL term: with LoRA the model itself, used
    with its adapters off."""
    if args.kl_coef and not args.lora_rank:
        return load_model(name, args)[0].requires_grad_(False)
    return model if args.kl_coef else None


def make_optimizer(model, args: Args) -> tuple[torch.optim.Optimizer, int]:
    """AdamW, and the steps made so far: 0, or those of the run that is resumed."""
    how = dict(lr=0.0, weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    if not args.resume:
        return optimizer, 0
    file = Path(args.resume, "checkpoint", "state.pt")
    with blame(f"{file} cannot be resumed"):
        state = torch.load(file, args.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    return optimizer, state["step"]


def context_length(model) -> int:
    """The most tokens in a row, prompt and completion. With longrope it is the original
    length: one longer row would change the frequencies of all rows in its batch."""
    ropes = getattr(model.config, "rope_parameters", None) or {}
    ropes = [x for x in (ropes, *ropes.values()) if isinstance(x, dict)]
    ropes = [x for x in ropes if x.get("rope_type") == "longrope"]
    most = [x["original_max_position_embeddings"] for x in ropes]
    return min([model.config.max_position_embeddings, *most])


def without_noise(model) -> None:
    """Training mode only for modules that need it for gradient checkpointing. Elsewhere
    it would turn on dropout or a router's noise, and the policy that is scored would
    not be the one that was sampled."""
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def autocast(args: Args) -> torch.autocast:
    """Matrix products in bf16 if --dtype says so; trained weights stay in fp32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def all_reduce(x: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """Reduce x over torchrun's ranks, in place; a single process returns x as it is."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, operation))
    return x


def agree(x: int, args: Args) -> bool:
    """Is x, below 2^63, the same on all of torchrun's ranks?"""
    ends = all_reduce(torch.tensor([x, -x], device=args.device), "MAX")
    return not ends.sum()  # max(x) = min(x)


def unchanged(name: str, value: int, args: Args) -> bool:
    """Is a hash the same on all ranks and, after a --resume, as in args.json?"""
    about = Path(args.resume, "args.json").read_text() if args.resume else "{}"
    return agree(value, args) and json.loads(about).get(name, value) == value


def check_weights(model, frozen, step: int, args: Args) -> int:
    """End the run if its ranks do not start with the same weights after the same step
    (nodes may have folders of their own), or if the frozen reference or teacher, None
    if there is none, is not that of the run's start. Returns a hash of the latter."""

    def total(network) -> int:
        first = [x.flatten()[:4096].float() for x in network.state_dict().values()]
        return int(torch.cat(first).view(torch.int32).sum())

    known = 0 if frozen in (None, model) else total(frozen)  # LoRA: the model itself
    if not agree(step + total(model), args):
        fail("weights or steps differ between ranks: let all read the same folders")
    if not unchanged("frozen_hash", known, args):
        fail(
            "reference or teacher differs between ranks or from the run's start: put "
            "the old one back"
        )
    return known


# ------------------------------------ Rollout -----------------------------------------


@dataclasses.dataclass
class Rollout:
    """B completions, group after group: the G of a prompt in a row. T = P + C."""

    tokens: torch.Tensor  # (B, T) int64, prompts left-padded, completions right-padded
    attention_mask: torch.Tensor  # (B, T) int64
    completion_mask: torch.Tensor  # (B, C) float32, first EOS inclusive
    logprobs: torch.Tensor  # (B, C) float32, as sampled, at the sampling temperature
    rewards: torch.Tensor  # (B,) float32
    truncated: torch.Tensor  # (B,) bool: no EOS
    texts: list[str]  # B completions without special tokens


def pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Rows of ids as one tensor (rows, longest), padded on the left or the right."""
    return pad_sequence([torch.tensor(r) for r in rows], True, value, padding_side=side)


def encode_prompts(
    tokenizer, problems: list[Problem], longest: int, rows: int
) -> list[list[int]]:
    """Token ids of the prompts: text as it is, messages through the chat template. At
    most `longest` ids, all below `rows`."""
    encoded = []
    for i, (prompt, *_) in enumerate(problems):
        with blame(f"prompt {i} ({str(prompt)[:60]!r}) cannot be used"):
            if isinstance(prompt, str):
                bare = not prompt.startswith(tokenizer.bos_token or "\0")  # one BOS
                ids = tokenizer(prompt, add_special_tokens=bare)["input_ids"]
                ended = prompt.endswith(tokenizer.eos_token)  # some tokenizers add it
                if ids[-1:] == [tokenizer.eos_token_id] and not ended:
                    ids = ids[:-1]
            else:
                ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
                ids = ids["input_ids"]
            if not 0 < len(ids) <= longest:
                raise ValueError(f"{len(ids)} tokens, there is room for {longest}")
            if max(ids) >= rows:
                raise ValueError(f"the model has no embedding of token {max(ids)}")
        encoded.append(ids)
    return encoded


def uniforms(args: Args, step: int, prompts: int, samples: int) -> torch.Tensor:
    """This rank's share of noise (prompts x samples, max_new_tokens), float64 in
    [0, 1): it depends on seed and step alone, not on earlier steps or on how many ranks
    there are."""
    shape = prompts, samples, args.max_new_tokens
    noise = np.random.default_rng([args.seed, step]).random(shape)[RANK::WORLD_SIZE]
    return torch.from_numpy(noise).flatten(0, 1)


def stop_ids(model, tokenizer) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS and those in generation_config,
    where chat models list their end-of-turn token."""
    more = model.generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *more} - {None})


def completion_mask(completions: torch.Tensor, eos_token_id) -> tuple:
    """Mask (B, C) float32: 1 up to and including the first EOS; truncated (B,) bool: no
    EOS. eos_token_id: an int, or several as a tensor. The mask depends on positions,
    not on the padding's value: pad == eos is fine."""
    is_eos = torch.isin(completions, eos_token_id)
    return (is_eos.cumsum(-1) - is_eos.long() == 0).float(), ~is_eos.any(-1)


class Columns(transformers.cache_utils.DynamicLayer):
    """Keys and values (rows, heads, columns, head size) of a layer, written in place:
    new ones go to column `end` (1,), and the first `width` columns are read."""

    is_compileable = True  # the mask is built without reading its values

    def __init__(self, prompts, end: torch.Tensor, dtype: torch.dtype | None):
        super().__init__()
        self.keys, self.values = (x.to(dtype) for x in (prompts.keys, prompts.values))
        self.width, self.end, self.is_initialized = 0, end, True

    def grow(self, columns: int) -> None:
        both = self.keys, self.values
        self.keys, self.values = (F.pad(x, (0, 0, 0, columns)) for x in both)

    def update(self, key, value, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        for part, new in (self.keys, key), (self.values, value):
            part.index_copy_(2, self.end, new.to(part.dtype))
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_seq_length(self) -> torch.Tensor:
        return self.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0


def attend(module, query, key, value, attention_mask, scaling, **_) -> tuple:
    """SDPA for one query token (B, H, 1, D) that reads each key (B, H / g, L, D) once:
    transformers before 5.23 copies it for each of the g heads that share it."""
    groups = query.view(*key.shape[:2], -1, query.shape[-1])
    kwargs = dict(attn_mask=attention_mask, scale=scaling)
    output = F.scaled_dot_product_attention(groups, key, value, **kwargs)
    return output.reshape(len(query), 1, -1, value.shape[-1]), None


@contextlib.contextmanager
def one_by_one(model) -> Iterator[None]:
    """Run the block with `attend` as the model's attention, if that was sdpa."""
    own, masks = model.config._attn_implementation, transformers.AttentionMaskInterface
    if own == "sdpa" and model._can_set_attn_implementation():
        transformers.AttentionInterface.register("attend", attend)
        masks.register("attend", masks()["sdpa"])
        model.set_attn_implementation("attend")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def recordable(model) -> bool:
    """Can the forward pass be one CUDA graph? Not on a CPU, nor if it branches on
    values of tensors: most mixtures of experts, some RoPE scalings."""
    ropes = str([getattr(module, "rope_type", "") for module in model.modules()])
    blind = "dynamic" not in ropes and "longrope" not in ropes
    blind &= getattr(model.config, "_experts_implementation", "") != "grouped_mm"
    blind &= model._can_set_attn_implementation()  # old code copies from the host
    return model.device.type == "cuda" and blind and model._can_compile_fullgraph


def record(step: Callable) -> Callable:
    """Capture step as one CUDA graph, without running it; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


@torch.no_grad()
def decode(model, prompts, attention_mask, noise, temperature, eos_token_id) -> tuple:
    """Completions (B, C) int64 from the plain softmax at a temperature, and their
    log-probs (B, C) float32.

    prompts and attention_mask (N, P), left-padded, are read once and shared by their
    B / N completions, which stand in a row. noise (B, C) in [0, 1) is the only
    randomness: the inverse CDF turns it into tokens, so a completion does not depend on
    the others in its batch. No warper of the checkpoint's generation_config (top_k,
    penalties) is applied. eos_token_id (E,): as in completion_mask; what follows the
    first EOS is meaningless. Finished rows are dropped.

    A step reads and writes tensors in place, so that a GPU can replay it as one CUDA
    graph instead of launching its many small kernels from Python. New shapes (rows
    dropped, columns added) need a new graph, recorded after one step without a graph.
    """
    (B, C), (N, P), device = noise.shape, prompts.shape, prompts.device
    exact = torch.float32 if device.type == "mps" else torch.float64
    completions = torch.zeros((B, C), dtype=torch.int64, device=device)
    logprobs = torch.zeros((B, C), device=device)
    rows = torch.arange(B, device=device)  # still being decoded
    running = torch.ones_like(rows, dtype=torch.bool)
    end = torch.full((1,), P, device=device)  # where the cache ends
    token = torch.zeros_like(rows[:, None])  # (B, 1), the last ones drawn
    cache = transformers.DynamicCache()
    kwargs = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)

    # draw and step read and write the variables of decode
    def draw(logits) -> None:
        t = end - P
        log_softmax = (logits.float() / temperature).log_softmax(-1)
        cdf = log_softmax.to(exact).exp().cumsum(-1)
        point = noise[rows, t, None].to(exact) * cdf[:, -1:]
        drawn = torch.searchsorted(cdf, point, right=True).clamp(max=cdf.shape[-1] - 1)
        token.copy_(drawn)
        completions[rows, t] = token[:, 0]
        logprobs[rows, t] = log_softmax.gather(-1, token)[:, 0]
        running.logical_and_((token != eos_token_id).all(-1))

    def step() -> None:
        positions.add_(1)
        seen = dict(attention_mask=mask[:, : cache.layers[0].width])
        logits = model(token, position_ids=positions, **seen, **kwargs).logits
        end.add_(1)
        draw(logits[:, -1])

    inputs = dict(attention_mask=attention_mask, position_ids=positions)
    logits = model(prompts, **inputs, **kwargs).logits[:, -1]
    mask = F.pad(attention_mask, (0, C), value=1)
    logits, mask, positions = (
        x.repeat_interleave(B // N, 0) for x in (logits, mask, positions[:, -1:])
    )
    draw(logits)
    bf16 = torch.is_autocast_enabled(device.type)  # attention would round to it
    dtype = torch.get_autocast_dtype(device.type) if bf16 else None
    cache.layers = [Columns(layer, end, dtype) for layer in cache.layers]
    cache.batch_repeat_interleave(B // N)
    graphs, capacity, replay = recordable(model), P, None  # replay: of a recorded step
    with one_by_one(model):
        for t in range(1, C):
            share = running.float().mean().item()
            if share == 0:
                break
            # enough rows are done to pay for it: a graph takes as long as some 30 steps
            if share < (0.5 if graphs else 0.8) and (not graphs or C - t > 32):
                replay = None
                cache.batch_select_indices(running.nonzero()[:, 0])
                rows, token, positions, mask, running = (
                    x[running] for x in (rows, token, positions, mask, running)
                )
            if P + t > capacity:
                replay, more = None, min(256, C - t)
                for layer in cache.layers:
                    layer.grow(more)
                capacity += more
            for layer in cache.layers:
                layer.width = capacity if graphs else P + t
            (replay or step)()
            if graphs and not replay and t + 1 < C:
                replay = record(step)
    return completions, logprobs


def generate(model, tokenizer, prompts: list[list[int]], noise, args: Args) -> Rollout:
    """Completions of the prompts, len(noise) / len(prompts) of each; no rewards yet."""
    model.eval()
    eos = torch.tensor(stop_ids(model, tokenizer), device=args.device)
    group_size, most = len(noise) // len(prompts), args.rollout_batch_size
    ids = pad(prompts, tokenizer.pad_token_id, "left").to(args.device)
    seen = pad([[1] * len(prompt) for prompt in prompts], 0, "left").to(args.device)
    noise = noise.float() if args.device == "mps" else noise  # MPS has no float64
    noise, n = noise.to(args.device), max(1, most // group_size)  # n prompts at once
    parts = []
    with autocast(args):
        for x, mask, rows in zip(
            ids.split(n), seen.split(n), noise.split(n * group_size)
        ):
            for u in rows.split(most):  # a part of a group, if a group is above `most`
                parts.append(decode(model, x, mask, u, args.temperature, eos))
    completions, logprobs = (torch.cat(part) for part in zip(*parts))
    mask, truncated = completion_mask(completions, eos)
    width = int(mask.sum(-1).max())
    completions, logprobs, mask = (x[:, :width] for x in (completions, logprobs, mask))
    completions = completions.masked_fill(mask == 0, tokenizer.pad_token_id)
    ids, seen = (x.repeat_interleave(group_size, 0) for x in (ids, seen))
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    tokens = torch.cat([ids, completions], -1)
    attention_mask = torch.cat([seen, mask.long()], -1)
    rewards = torch.zeros(len(mask), device=args.device)
    logprobs = logprobs * mask
    return Rollout(tokens, attention_mask, mask, logprobs, rewards, truncated, texts)


# -------------------------------- Log-probabilities -----------------------------------


def last_hidden(model, tokens, attention_mask, completion_length: int) -> tuple:
    """Inputs of the head that score the last C columns of tokens (B, T): hidden states
    (n, D), with gradient, and a bool (B, C) that marks the n tokens they predict, those
    where attention_mask (B, T) is 1. All-padding columns are cut off. A prompt shared
    by consecutive rows is read once, except with gradient checkpointing."""
    scored = attention_mask[:, -completion_length:].bool()
    used = attention_mask.any(0).nonzero()[:, 0]  # columns that are not all padding
    start, end = int(used[0]), int(used[-1]) + 1
    width = completion_length - (tokens.shape[1] - end)  # columns of completions
    n = end - start - width  # columns of prompts
    # the last column is no input: nothing behind it is scored
    tokens, mask = tokens[:, start : end - 1], attention_mask[:, start : end - 1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = tokens, mask, positions
    cache, prompt_hidden = None, []
    prompts = torch.cat([tokens[:, :n], mask[:, :n]], -1)
    first = (prompts != prompts.roll(1, 0)).any(-1)  # the first row with this prompt
    first[0] = True
    modules = model.modules()
    recompute = any(getattr(m, "gradient_checkpointing", False) for m in modules)
    if not recompute and width > 1 and not first.all():
        cache = transformers.DynamicCache()
        prompt_of_row = first.cumsum(0) - 1  # (B,)
        x, seen, places = (part[first, :n] for part in inputs)
        kwargs = dict(attention_mask=seen, position_ids=places, past_key_values=cache)
        output = model.base_model(x, use_cache=True, **kwargs)
        prompt_hidden = [output.last_hidden_state[prompt_of_row, -1:]]
        cache.batch_select_indices(prompt_of_row)
        inputs = tokens[:, n:], mask, positions[:, n:]
    x, seen, places = inputs
    kwargs = dict(attention_mask=seen, position_ids=places, past_key_values=cache)
    output = model.base_model(x, use_cache=cache is not None, **kwargs)
    hidden = torch.cat([*prompt_hidden, output.last_hidden_state], 1)[:, -width:]
    return hidden[scored[:, :width]], scored


class Logprobs(torch.autograd.Function):
    """Log-probs (n,), with gradient, of targets (n,), and entropies (n,), from hidden
    states (n, D) and an output head: weight (V, D), bias (V,) or None. Logits
    exist for `chunk` tokens at a time; the backward pass recomputes them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        found = []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            logits = F.linear(h, weight, bias)
            dtype, log_p = logits.dtype, logits.log_softmax(-1, dtype=torch.float32)
            del logits
            entropies = log_p.exp().mul_(log_p).sum(-1).neg_()
            found.append((log_p.gather(-1, y[:, None])[:, 0], entropies))
            del log_p  # or it is there while the next chunk is made
        logprobs, entropies = (torch.cat(x) for x in zip(*found))
        ctx.constants = chunk, dtype  # bf16 under autocast
        ctx.save_for_backward(hidden, weight, bias, targets, logprobs)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, logprobs = ctx.saved_tensors
        (chunk, dtype), needed = ctx.constants, ctx.needs_input_grad
        low, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if needed[1] else None
        grad_bias = torch.zeros_like(bias) if needed[2] else None
        parts = hidden, targets, logprobs, grad, grad_hidden
        for h, y, logprob, g, out in zip(*(x.split(chunk) for x in parts)):
            h, y, g = h.to(dtype), y[:, None], g[:, None]
            p = F.linear(h, low, b).softmax(-1)
            rounded = dtype != logprobs.dtype  # then 1 - p_y would be lost
            p_y = logprob.exp()[:, None] if rounded else p.gather(-1, y)
            d = p.mul_(-g).scatter_(-1, y, (g - g * p_y).to(dtype))  # of the logits
            out += d @ low
            if grad_weight is not None:
                if dtype == grad_weight.dtype:  # no second array of this size
                    grad_weight.addmm_(d.T, h)
                else:
                    grad_weight += d.T @ h
            if grad_bias is not None:
                grad_bias += d.sum(0)
            del p, d  # or they are there while the next chunk is made
        return grad_hidden, grad_weight, grad_bias, None, None


def token_logprobs(
    model, tokens, attention_mask, completion_length: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (B, C), with gradient, and entropies (B, C) of the last C columns of
    tokens (B, T), in nats; 0 where attention_mask (B, T) is 0. Logits exist in chunks
    of about 2^28 bytes (twice that where they become fp32), two at once."""
    head = model.get_output_embeddings()
    hidden, scored = last_hidden(model, tokens, attention_mask, completion_length)
    bias = None if head.bias is None else head.bias / temperature
    size = 2 if torch.is_autocast_enabled(tokens.device.type) else 4  # bytes of a logit
    n = 2**28 // size // head.weight.shape[0] + 1
    targets = tokens[:, -completion_length:][scored]
    batch = hidden / temperature, head.weight, bias, targets, n  # logits / temperature
    zeros = torch.zeros(scored.shape, device=tokens.device)
    return tuple(zeros.masked_scatter(scored, x) for x in Logprobs.apply(*batch))


# ------------------------------------- Traces -----------------------------------------


class Exercise(NamedTuple):
    """A problem, a right answer to it, and the start of that which is given. All ids
    are as they were sampled or read, never tokenised anew; [] where there are none."""

    prompt: list[int]  # x
    problem: Problem
    trace: list[int] = []  # z
    logprob: float | None = None  # log mu(z), if it is known
    prefix: list[int] = []  # z_<h


def exercises(model, tokenizer, problems: list[Problem], room: int) -> list[Exercise]:
    """Problems of which nothing else is known. room: tokens that follow a prompt."""
    longest = context_length(model) - room
    rows = len(model.get_input_embeddings().weight)
    prompts = encode_prompts(tokenizer, problems, longest, rows)
    return [Exercise(*x) for x in zip(prompts, problems)]


def without_stop(trace: list[int], stops: list[int]) -> list[int]:
    """The ids without a final stop token, which is never part of a prefix."""
    return trace[:-1] if trace and trace[-1] in stops else trace


def answer_ids(rollout: Rollout, batch: list[Exercise]) -> list[list[int]]:
    """The answers (B), prefix and completion, as lists of ids without padding."""
    n, width = len(rollout.tokens) // len(batch), rollout.completion_mask.shape[1]
    lengths, answers = rollout.completion_mask.sum(-1).int().tolist(), []
    for i, row in enumerate(rollout.tokens[:, -width:].tolist()):
        answers.append(batch[i // n].prefix + row[: lengths[i]])
    return answers


def complete(model, tokenizer, batch: list[Exercise], noise, args: Args) -> Rollout:
    """Completions behind prompt and prefix of each exercise. Their texts are those of
    whole answers, prefix and completion decoded as one."""
    contexts = [x.prompt + x.prefix for x in batch]
    rollout = generate(model, tokenizer, contexts, noise, args)
    ids = answer_ids(rollout, batch)
    rollout.texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return rollout


def needs_traces(args: Args) -> bool:
    """Whether this run uses traces; plain RL does not."""
    return bool(args.prefixes_per_problem or args.sft_epochs or args.off_policy)


def load_sampler(model, tokenizer, problems: list[Problem], args: Args):
    """The model that samples the traces, None if none are to be sampled. It must have
    the vocabulary of the one that is trained, and end its answers by the same ids."""
    if args.traces or not needs_traces(args):
        return None
    name = args.trace_model or ("careful" if args.model == "tiny" else "base")
    if name == "base":
        return model
    name = built_in(name, problems, args)
    sampler, other = load_model(name, dataclasses.replace(args, lora_rank=0))
    if other.get_vocab() != tokenizer.get_vocab():
        fail(f"--trace-model {name} has another vocabulary: give --traces instead")
    stops, own = stop_ids(sampler, other), stop_ids(model, tokenizer)
    if stops != own:
        fail(f"--trace-model {name} stops at {stops}, not {own}: give --traces instead")
    return sampler


def search_folder(models: tuple, tokenizer, candidates, reward, args: Args) -> Path:
    """Folder for what phase 1 finds, named by a hash of all that decides it (of a
    plug-in: its own file, not its imports)."""
    digest, plugin = hashlib.sha256(), args.task.endswith(".py")
    for model in models:
        for name, weights in model.state_dict().items():
            raw = weights.flatten().cpu().view(torch.uint8)  # NumPy has no bf16
            digest.update(name.encode() + raw.numpy().tobytes())
    parts = decode, Columns, attend, one_by_one, recordable, record, autocast, pad
    parts += completion_mask, stop_ids, generate, uniforms, attempts, complete
    parts += answer_ids, score
    defined = [inspect.getsource(part) for part in parts]
    defined.append(Path(args.task).read_text() if plugin else inspect.getsource(reward))
    defined += [stop_ids(model, tokenizer) for model in models]
    names = "seed hard_k temperature max_new_tokens rollout_batch_size dtype device"
    defined += [getattr(args, name) for name in names.split()]
    defined += [torch.__version__, transformers.__version__, torch.get_num_threads()]
    with blame("the answers name the cache of what is tried, so they must be JSON"):
        digest.update(json.dumps([defined, candidates]).encode())
    return Path("runs/cache", f"search-{digest.hexdigest()[:16]}")


def attempts(
    model, tokenizer, exercises, reward, samples, number, folder, args
) -> list[list]:
    """Draw `samples` completions of each exercise, with noise by `number`. For each
    exercise: how many were right, the first right one (its ids and log-prob) or None,
    and the tokens read. Read from `folder` if any run has stored it there."""
    path = folder / f"{number}-{samples}.json"
    stored = torch.tensor(float(path.exists()), device=args.device)
    if all_reduce(stored, "MIN") > 0:
        return json.loads(path.read_text())
    mine, found = exercises[RANK::WORLD_SIZE], []
    noise = uniforms(args, 10**9 + number, len(exercises), samples)  # no step's noise
    if mine:
        rollout = complete(model, tokenizer, mine, noise, args)
        repeated = [x.problem for x in mine for _ in range(samples)]
        right = score(reward, repeated, rollout.texts) >= 1
        rows, logprobs = answer_ids(rollout, mine), rollout.logprobs.sum(-1).tolist()
        for i, exercise in enumerate(mine):
            own = range(i * samples, (i + 1) * samples)
            hits = [row for row in own if right[row]]
            first = [rows[hits[0]], logprobs[hits[0]]] if hits else None
            read = len(exercise.prompt) + sum(len(rows[row]) for row in own)
            found.append([len(hits), first, read])
    if WORLD_SIZE > 1:
        parts, places = [None] * WORLD_SIZE, range(len(exercises))
        dist.all_gather_object(parts, found)
        found = [parts[i % WORLD_SIZE][i // WORLD_SIZE] for i in places]
    if RANK == 0:
        with blame(f"cannot write {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(found))
            new.replace(path)
    return found


def find_traces(
    model, tokenizer, problems, candidates: list[Exercise], reward, args
) -> tuple[list[dict], dict]:
    """Phase 1: a record of each hard problem, as in traces.jsonl, and what was spent.
    problems: all to train on, of which the candidates are the first. What was tried is
    kept chunk by chunk, so that a killed search continues where it was."""
    known = [{}]  # place among the candidates: (ids, log-prob)
    if args.traces and RANK == 0:  # alone: no two ranks may judge differently
        known = [read_traces(model, tokenizer, candidates, reward, args)]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(known)
    traces = known[0]
    sampler = load_sampler(model, tokenizer, problems, args)
    need = max(len(x.prompt) for x in candidates) + args.max_new_tokens
    if sampler and (longest := context_length(sampler)) < need:
        fail(f"--trace-model has a context of {longest} tokens: a trace needs {need}")
    models, numbers = (model, sampler or model), itertools.count()
    folder = search_folder(models, tokenizer, candidates, reward, args)

    def try_all(network, exercises: list[Exercise], samples: int) -> tuple[list, int]:
        """What was found by `attempts`, chunk by chunk, and the FLOPs."""
        size = max(8, args.rollout_batch_size // samples)  # 8: work for some ranks
        tried, starts = [], range(0, len(exercises), size)
        for start in tqdm(starts, "search", leave=False, disable=RANK > 0):
            chunk = exercises[start : start + size]
            how = reward, samples, next(numbers), folder, args
            tried += attempts(network, tokenizer, chunk, *how)
        return tried, flops(network, sum(read for *_, read in tried))

    tried, cost = try_all(model, candidates, args.hard_k)
    spent = {"flops_hard_search": cost, "flops_traces": 0}
    hard = [i for i, (hits, *_) in enumerate(tried) if hits == 0]
    if len(hard) < WORLD_SIZE:
        fail(f"{len(hard)} of {len(tried)} candidates are hard: raise --candidates")
    done, most = 0, args.trace_cap if sampler else 0
    while done < most and (left := [i for i in hard if i not in traces]):
        samples = min(max(8, done), most - done)  # 8, 8, 16, 32 ...
        tried, cost = try_all(sampler, [candidates[i] for i in left], samples)
        traces |= {i: first for i, (_, first, _) in zip(left, tried) if first}
        spent["flops_traces"] += cost
        done += samples
    records = []
    for i in hard:
        ids, logprob = traces.get(i, (None, None))
        text = tokenizer.decode(ids, skip_special_tokens=True) if ids else None
        # step 0: open_run keeps what is not later than the step it resumes at
        record = {"step": 0, "problem": i, "prompt": candidates[i].problem.prompt}
        records.append(record | {"text": text, "ids": ids, "logprob": logprob})
    none = sum(record["ids"] is None for record in records)
    if none == len(hard) and needs_traces(args):
        fail(
            f"no trace of {none} hard problems: start again with a higher --trace-cap "
            "(what was tried is cached) or with other --traces"
        )
    return records, spent | {"hard_problems": len(hard), "without_trace": none}


def read_traces(model, tokenizer, candidates, reward, args: Args) -> dict:
    """The traces of --traces, {place among the candidates: (ids, log-prob)}, each
    verified: "ids" are used as they are, a "text" is tokenised once. A bad line is
    reported, and skipped or, with --strict-traces, the end; a reward that fails is
    always the end."""
    longest = context_length(model) - args.max_new_tokens
    rows = len(model.get_input_embeddings().weight)
    known, stops = range(min(len(tokenizer), rows)), stop_ids(model, tokenizer)
    key = functools.partial(json.dumps, sort_keys=True)
    places = {key(x.problem.prompt): i for i, x in enumerate(candidates)}
    traces = {}
    with blame(f"cannot read {args.traces}"):
        lines = list(Path(args.traces).open(encoding="utf-8-sig"))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            ids = item.get("ids")
            if ids is None and item.get("text", "") is None:
                continue  # a run's own list says that there is none
            i = places.get(key(item["prompt"]))
            if i is None:
                raise ValueError("its problem is not among the candidates")
            if i in traces:
                raise ValueError("its problem has a trace already")
            if ids is None:
                ids = tokenizer(item["text"], add_special_tokens=False)["input_ids"]
                ids.append(tokenizer.eos_token_id)
            if not ids or not all(type(x) is int and x in known for x in ids):
                raise ValueError("its ids are no ids of this tokenizer")
            own = without_stop(ids, stops)
            if {*stops} & {*own} or own[-1:] == [tokenizer.pad_token_id]:
                raise ValueError("it has padding or a stop token before its end")
            if len(candidates[i].prompt) + len(ids) > longest:
                raise ValueError("it does not fit into the context")
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if score(reward, [candidates[i].problem], [text]) < 1:
                raise ValueError("its answer is wrong")
            logprob = item.get("logprob")
            usable = type(logprob) in (int, float) and -math.inf < float(logprob) <= 0
            if args.off_policy and not usable:  # nan is not either
                raise ValueError("--off-policy needs its logprob, a number up to 0")
            traces[i] = ids, logprob
        except Exception as e:
            message = f"{args.traces}, line {number}: {type(e).__name__}: {e}"
            if args.strict_traces:
                fail(message)
            tqdm.write(f"skipped: {message}", file=sys.stderr)
    return traces


def write_traces(run_dir: Path, found: list[dict]) -> None:
    """traces.jsonl: the records of find_traces, one a line."""
    lines = "".join(f"{json.dumps(record)}\n" for record in found)
    with blame(f"cannot write to {run_dir}"):
        (run_dir / "traces.jsonl").write_text(lines)
    traced = sum(bool(record["ids"]) for record in found)
    print(f"{len(found)} hard problems, {traced} of them with a trace")


# --------------------------------- THE ALGORITHM --------------------------------------


def cut_prefix(trace: list[int], low: float, high: float, rng) -> list[int]:
    """The first h ids of a trace of n ids (section 3), h uniform over the whole numbers
    in [low n, high n], or the next one above low n if there is none. At least one id is
    left to answer: h = n becomes n - 1. rng: random.Random. ValueError: not
    0 <= low <= high <= 1."""
    if not 0 <= low <= high <= 1:
        raise ValueError(f"0 <= {low} <= {high} <= 1 does not hold")
    n = len(trace)
    low, high = round(low * n, 9), round(high * n, 9)  # 0.56 * 25 is above 14
    least, most = math.ceil(low), math.floor(high)
    h = rng.randint(least, max(least, most))
    return trace[: min(h, max(n - 1, 0))]


def cut_prefixes(hard: list[Exercise], stops: list[int], args: Args) -> list[Exercise]:
    """Phase 2: the prefixed problems, --prefixes-per-problem of each trace, a function
    of the seed. One of no tokens is none: of a problem without a trace, or where h is
    0."""
    prefixed = []
    for i, exercise in enumerate(hard):
        rng = random.Random(f"{args.seed} prefix {i}")
        ids = without_stop(exercise.trace, stops)
        for _ in range(args.prefixes_per_problem):
            prefix = cut_prefix(ids, args.prefix_low, args.prefix_high, rng)
            if prefix:
                prefixed.append(exercise._replace(prefix=prefix))
    return prefixed


def draw(pool: list, step: int, count: int, *key: int) -> list:
    """The step's `count` members of a pool that is gone through again and again, in a
    new order each time: a function of step and key (seed and pool)."""
    drawn = []
    for place in range((step - 1) * count, step * count):
        epoch, i = divmod(place, len(pool))
        order = np.random.default_rng([*key, epoch]).permutation(len(pool))
        drawn.append(pool[order[i]])
    return drawn


def draw_batch(prefixed: list, plain: list, step: int, args: Args) -> list[Exercise]:
    """This rank's share of a step's batch: --plain-share of it plain, the rest
    prefixed; all plain if there is no prefix."""
    n = args.prompts_per_step
    few = round(args.plain_share * n) if prefixed else n
    batch = draw(prefixed, step, n - few, args.seed, 1)
    batch += draw(plain, step, few, args.seed, 2)
    return batch[RANK::WORLD_SIZE]


def flops(model, read: int, trained: int = 0) -> int:
    """FLOPs: 2 N per token read, 6 N per token trained on (section 4); for frozen
    weights 4 N instead of 6 N."""
    n = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 2 * n * read + (4 * n + 2 * own) * trained


def read_tokens(rollout: Rollout, group_size: int) -> int:
    """Tokens read to sample a rollout: a group's prompt once, all completions."""
    prompts = rollout.attention_mask.sum(-1) - rollout.completion_mask.sum(-1)
    return int(prompts[::group_size].sum() + rollout.completion_mask.sum())


def trained_tokens(rollout: Rollout, advantages, args: Args) -> int:
    """Tokens that `update` reads, over all its steps, of the rows it learns from: their
    completions, and the prompt once per group (per row with gradient checkpointing).
    Where --micro-batch-size splits a group it is read more often: not counted."""
    lengths = rollout.completion_mask.sum(-1)
    live = (lengths > 0) & ((advantages != 0) | (args.kl_coef > 0))
    live &= ~(rollout.truncated & args.mask_truncated)
    groups = live.view(-1, args.group_size)
    first = (groups & (groups.cumsum(-1) == 1)).flatten()
    read = live if args.gradient_checkpointing else first  # rows whose prompt is read
    prompts = (rollout.attention_mask.sum(-1) - lengths)[read].sum()
    return int(prompts + lengths[live].sum()) * args.updates_per_batch


def step_flops(model, reference, rollout, advantages, read: int, args: Args) -> int:
    """FLOPs of all ranks in a step that read so many tokens before its update."""
    trained = trained_tokens(rollout, advantages, args)
    read += trained // args.updates_per_batch if reference else 0
    cost = all_reduce(torch.tensor([read, trained], device=args.device)).tolist()
    return flops(model, *cost)


def rollout_of(batch: list[Exercise], rows: list[list[int]], args: Args) -> Rollout:
    """The given completions (B), as many for each prompt, as if they had been sampled:
    none is cut off. Texts are empty, log-probs and rewards 0."""
    n, width = len(rows) // len(batch), max(map(len, rows))
    prompts = [x.prompt for x in batch for _ in range(n)]
    tokens = torch.cat([pad(prompts, -1, "left"), pad(rows, -1, "right")], -1)
    tokens = tokens.to(args.device)
    seen, none = (tokens >= 0).long(), torch.zeros(len(rows), device=args.device)
    mask, texts = seen[:, -width:].float(), [""] * len(rows)
    tokens = tokens.clamp(min=0)
    return Rollout(tokens, seen, mask, 0 * mask, none, none.bool(), texts)


def imitate(model, hard: list[Exercise], args: Args) -> int:
    """--sft-epochs over the traces, in place, up to a whole number of batches: `update`
    with the advantage 1 is maximum likelihood. Returns the FLOPs."""
    how = dict(lr=args.learning_rate, weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    pool, tokens = [x for x in hard if x.trace], 0
    n = min(args.prompts_per_step, max(len(pool), WORLD_SIZE))  # some for each rank
    args = dataclasses.replace(args, updates_per_batch=1, group_size=1)
    for step in range(1, math.ceil(args.sft_epochs * len(pool) / n) + 1):
        batch = draw(pool, step, n, args.seed, 3)[RANK::WORLD_SIZE]
        rollout = rollout_of(batch, [x.trace for x in batch], args)
        rollout.rewards += 1
        update(model, None, optimizer, rollout, rollout.rewards, args)
        tokens += trained_tokens(rollout, rollout.rewards, args)
    tokens = all_reduce(torch.tensor(tokens, device=args.device)).item()
    return flops(model, 0, tokens)


def unmask_prefixes(rollout: Rollout, batch: list[Exercise], args: Args) -> Rollout:
    """--no-mask-prefix: prefixes count as sampled, with the advantage of what follows.
    delta_logp is then meaningless: the rollout has no log-probs."""
    new = rollout_of(batch, answer_ids(rollout, batch), args)
    return dataclasses.replace(new, texts=rollout.texts, truncated=rollout.truncated)


def put_traces(model, tokenizer, rollout, batch: list[Exercise], args: Args) -> tuple:
    """--off-policy: in each group whose problem has a trace z, it takes the place of
    the last completion. Returns the new rollout, weights (B,) for its advantages (pi(z)
    / mu(z) of whole traces, at most e^20; 1 elsewhere), and the net number of tokens
    read: z is scored once, and the completion it replaces counts as never drawn."""
    rows, n, read = answer_ids(rollout, batch), args.group_size, 0
    weights = torch.ones(len(rows), device=args.device)
    given = {g * n + n - 1: x for g, x in enumerate(batch) if x.trace}
    if not given:
        return rollout, weights, 0
    for row, x in given.items():
        read += len(x.prompt) + len(x.trace) - len(rows[row])
        rows[row] = x.trace
    places = torch.tensor([*given], device=args.device)
    new = rollout_of(batch, rows, args)
    new.texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    new.truncated = rollout.truncated.index_fill(0, places, False)
    old_width, width = rollout.completion_mask.shape[1], new.completion_mask.shape[1]
    new.logprobs = F.pad(rollout.logprobs, (0, width - old_width)) * new.completion_mask
    for part in places.split(args.micro_batch_size):
        with torch.no_grad(), autocast(args):
            scored = new.tokens[part], new.attention_mask[part], width
            new.logprobs[part] = token_logprobs(model, *scored, args.temperature)[0]
    mu = torch.tensor([x.logprob for x in given.values()], device=args.device)
    weights[places] = (new.logprobs[places].sum(-1) - mu).clamp(max=20).exp()
    return new, weights, read


def sample_batch(model, tokenizer, batch: list[Exercise], noise, args) -> tuple:
    """The rollout of a step, weights for its advantages, and the tokens that were read
    to make it, with --off-policy and --no-mask-prefix carried out: completions are then
    logged with what was given in them."""
    rollout, weights = complete(model, tokenizer, batch, noise, args), 1.0
    read = read_tokens(rollout, args.group_size)
    if args.off_policy:
        rollout, weights, more = put_traces(model, tokenizer, rollout, batch, args)
        read += more
    if not args.mask_prefix:
        rollout = unmask_prefixes(rollout, batch, args)
    return rollout, weights, read


def by_kind(rewards, batch: list[Exercise], args: Args) -> dict[str, float]:
    """Mean reward and share of groups with a gradient, of prefixed and plain groups;
    with --off-policy the traces count as completions."""
    groups = rewards.view(-1, args.group_size)
    behind = torch.tensor([bool(x.prefix) for x in batch], device=args.device)
    live, metrics = (groups.amax(-1) > groups.amin(-1)).float(), {}
    for name, chosen in (("prefixed", behind), ("plain", ~behind)):
        sums = groups.mean(-1)[chosen].sum(), live[chosen].sum(), chosen.sum().float()
        reward, share, count = all_reduce(torch.stack(sums)).tolist()
        if count:
            metrics |= {f"reward_{name}": reward / count}
            metrics |= {f"live_share_{name}": share / count, f"groups_{name}": count}
    return metrics


def group_advantages(rewards, group_size: int, scale: str = "std") -> torch.Tensor:
    """Advantages (B,) of rewards (B,), group after group: r - mean(r), divided by
    std(r) + 1e-4 if scale is "std" (DeepSeekMath, section 4.1.2), not if it is "none"
    (Dr. GRPO). 0 where a group's rewards are equal. ValueError: group_size < 2 or a
    reward that is not finite."""
    if group_size < 2 or not rewards.isfinite().all():
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"group_size {group_size} < 2 or rewards {bad} not finite")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if scale == "std":
        advantages = advantages / (groups.std(-1, keepdim=True) + 1e-4)
    equal = groups.amax(-1, keepdim=True) == groups.amin(-1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()


def loss_weights(mask: torch.Tensor, normalization: str, max_length: int) -> tuple:
    """Weights w (B, C) of the module docstring, and this rank's share of Z, a scalar
    tensor, from mask (B, C); max_length in tokens. Rows masked whole do not count."""
    lengths = mask.sum(-1, keepdim=True)
    rows = (lengths > 0).sum().float()
    if normalization == "sequence":
        return mask / lengths.clamp(min=1), rows
    return mask, lengths.sum() if normalization == "token" else rows * max_length


def policy_loss(
    logprobs, old_logprobs, advantages, mask, clip_low, clip_high, denominator
) -> tuple[torch.Tensor, dict]:
    """-J without the KL: PPO's clipped surrogate with DAPO's two clip limits, a scalar.

    logprobs, old_logprobs (B, C); advantages (B,) or (B, C); mask (B, C): a token's
    weight w, or 0; denominator: Z. Stats: tokens, and clipped, the number of them whose
    gradient the clip makes 0. These and the loss add up over micro-batches.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = (logprobs - old_logprobs).exp()  # rho_t
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -(torch.minimum(surrogate, clipped) * mask).sum() / max(denominator, 1)
    no_gradient = (clipped < surrogate) & (mask > 0)
    return loss, {"tokens": (mask > 0).sum(), "clipped": no_gradient.sum()}


def kl_loss(logprobs, old_logprobs, ref_logprobs, mask, denominator) -> torch.Tensor:
    """KL(pi || pi_ref): sum of w rho k2 over Z, rho detached; all (B, C). The expected
    gradient, E_old[rho (log pi - log pi_ref) grad log pi], is the reverse KL's."""
    rho = (logprobs - old_logprobs).exp().detach()
    k2 = (logprobs - ref_logprobs) ** 2 / 2
    return (rho * k2 * mask).sum() / max(denominator, 1)


def update(
    model, reference, optimizer, rollout, advantages, args, guard=contextlib.nullcontext
) -> dict[str, float]:
    """args.updates_per_batch optimiser steps on one batch; statistics of the last one.
    Rows with zero advantage are skipped (unless the KL needs them) but counted in Z.
    The entropy is over the rows that are not skipped, 0 if there are none. guard:
    nothing_lost, for the step before, until the weights change."""
    without_noise(model)
    mask, width = rollout.completion_mask, rollout.completion_mask.shape[1]
    if args.mask_truncated:
        mask = mask * ~rollout.truncated[:, None]
    weights, z = loss_weights(mask, args.normalization, args.max_new_tokens)
    z, clips = all_reduce(z), (args.clip_low, args.clip_high)
    longest = mask.sum(-1).view(-1, args.group_size).amax(-1)  # (B / G,)
    order = torch.arange(len(mask), device=mask.device).view(-1, args.group_size)
    order = order[longest.argsort(stable=True)].flatten()  # similar lengths together
    used = mask.any(-1) & ((advantages != 0) | (args.kl_coef > 0))  # (B,)
    live = order[used[order]]  # the rows to train on, in that order
    old = rollout.logprobs.clone()  # log pi_old: of live rows, scored when i is 0
    ref = torch.zeros_like(old)  # log pi_ref: likewise, if there is a KL term
    for i in range(args.updates_per_batch):
        totals = torch.zeros(5, device=mask.device)
        with guard():
            for rows in live.split(args.micro_batch_size) if len(live) else ():
                batch = rollout.tokens[rows], rollout.attention_mask[rows]
                batch = *batch, width, args.temperature
                with autocast(args):
                    logprobs, entropy = token_logprobs(model, *batch)
                    if i == 0:
                        old[rows] = logprobs.detach()  # so that rho is exactly 1
                    if i == 0 and reference:
                        with torch.no_grad(), without_lora(reference, args):
                            ref[rows], _ = token_logprobs(reference, *batch)
                w, A, kl = weights[rows], advantages[rows], torch.zeros_like(z)
                loss, stats = policy_loss(logprobs, old[rows], A, w, *clips, z)
                if reference:
                    kl = kl_loss(logprobs, old[rows], ref[rows], w, z)
                (loss + args.kl_coef * kl).backward()
                entropy = (entropy * (w > 0)).sum()
                sums = loss, kl, stats["tokens"], stats["clipped"], entropy
                totals += torch.stack([x.detach() for x in sums])
        norm, change = optimizer_step(model, optimizer, args.max_grad_norm)
        guard = contextlib.nullcontext
    loss, kl, tokens, clipped, entropy = all_reduce(totals).tolist()
    tokens = max(tokens, 1.0)
    gap = ((old - rollout.logprobs) * mask).abs()  # scored against sampled log-probs
    gap_mean, gap_max = all_reduce(gap.sum()) / tokens, all_reduce(gap.max(), "MAX")
    stats = {"loss": loss, "kl": kl, "grad_norm": norm, "relative_update": change}
    stats |= {"delta_logp_mean": gap_mean.item(), "delta_logp_max": gap_max.item()}
    return stats | {"entropy": entropy / tokens, "clip_fraction": clipped / tokens}


def optimizer_step(model, optimizer, max_grad_norm: float) -> tuple[float, float]:
    """One optimiser step on the sum of the ranks' gradients. Returns its norm before
    clipping, and |change| / |weights| over the first 4,096 entries of each tensor."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):
        fail(
            f"the gradient norm is {norm}: no step was made. Start a new run (--model: "
            "this run's checkpoint/) with a lower --learning-rate or --dtype float32"
        )
    before = torch.cat([p.detach().flatten()[:4096] for p in parameters])
    optimizer.step()
    optimizer.zero_grad()
    after = torch.cat([p.detach().flatten()[:4096] for p in parameters])
    return norm, ((after - before).norm() / before.norm()).item()


# ----------------------------------- Evaluation ---------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k from n samples of which c are right (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    model, tokenizer, exercises, reward, args, guard=contextlib.nullcontext
) -> dict[str, float]:
    """pass@1, pass@n and mean reward of n = eval_samples completions of each exercise,
    with the same noise every time; right: a reward of 1 or more. The ranks split the
    exercises. guard: nothing_lost, for this step."""
    n, mine = args.eval_samples, exercises[RANK::WORLD_SIZE]
    noise = uniforms(args, 0, len(exercises), n)
    repeated = [x.problem for x in mine for _ in range(n)]
    with guard():
        rollout = complete(model, tokenizer, mine, noise, args)
        rewards = score(reward, repeated, rollout.texts)
    right = (rewards.view(-1, n) >= 1).sum(-1).tolist()
    sums = [sum(pass_at_k(n, c, k) for c in right) for k in (1, n)]
    sums = all_reduce(torch.tensor([*sums, rewards.sum() / n], device=args.device))
    names = "eval/pass@1", f"eval/pass@{n}", "eval/reward"
    return dict(zip(names, (sums / len(exercises)).tolist()))


def evaluate_all(
    model, tokenizer, tests, hard, reward, args, guard=contextlib.nullcontext
) -> dict[str, float]:
    """Plain accuracy on held-out problems ("eval/...") and on the hard ones to train on
    ("eval/hard_..."); with traces also the share solved from 0, 20, ... 80 % of each
    trace ("eval/from_20%"). guard: as in `evaluate`."""
    most, how = args.eval_prompts, (reward, args, guard)
    metrics = evaluate(model, tokenizer, tests[:most], *how)
    found = evaluate(model, tokenizer, hard[:most], *how)
    metrics |= {key.replace("/", "/hard_"): x for key, x in found.items()}
    traced, stops = [x for x in hard if x.trace][:most], stop_ids(model, tokenizer)
    for percent in SHARES if len(traced) >= WORLD_SIZE else ():
        exercises = []
        for x in traced:
            ids = without_stop(x.trace, stops)
            cut = ids[: len(ids) * percent // 100]
            exercises.append(x._replace(prefix=cut))
        found = evaluate(model, tokenizer, exercises, *how)
        metrics[f"eval/from_{percent}%"] = found["eval/pass@1"]
    return metrics


def draw_prefix_success(run_dir: Path) -> None:
    """prefix_success.png: solved from each share of the trace, before and after."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    records = [record for record in records if "eval/from_0%" in record]
    if not records:
        return  # there are no traces
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    ends = [records[0], records[-1]][: len(records)]
    for record, style in zip(ends, ["o--", "o-"]):
        solved = [record[f"eval/from_{share}%"] for share in SHARES]
        axes.plot(SHARES, solved, style, label=f"step {record['step']}")
    axes.set(xlabel="% of the trace given", ylabel="solved (share)", ylim=(0, 1))
    axes.legend()
    with blame(f"cannot draw {run_dir}/prefix_success.png"):
        axes.figure.savefig(run_dir / "prefix_success.png", dpi=120)


# ----------------------------------- Run folder ---------------------------------------


def lock(run_dir: Path):
    """A file that no other process can lock while it is open here."""
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work in {run_dir}: wait for its end, or stop it")
    except OSError:  # a file system without locks
        pass
    return file


def open_run(args: Args, step: int, known: dict[str, int]):
    """Make the folder of a new run, or cut the logs of a resumed one after `step`.
    known: what args.json keeps for `unchanged`. Returns its lock."""
    run_dir, here = Path(args.run_dir), Path(__file__).parent
    with blame(f"cannot open the run folder {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        locked = lock(run_dir)
        for log in run_dir.glob("*.jsonl"):
            lines = [x for x in log.read_text().splitlines(True) if x.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            log.with_suffix(".new").write_text("".join(kept))
            log.with_suffix(".new").replace(log)
        git = ["git", "rev-parse", "HEAD"] if shutil.which("git") else ["true"]
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
        about = {"python": sys.version, "torch": torch.__version__}
        about |= {"transformers": transformers.__version__, "commit": commit.strip()}
        about |= {"hardware": f"{os.cpu_count()} CPU cores, {gpu}", "args": vars(args)}
        (run_dir / "args.new").write_text(json.dumps(about | known, indent=1))
        (run_dir / "args.new").replace(run_dir / "args.json")
    return locked


def write_logs(args: Args, metrics: dict, sample: dict) -> None:
    """Append to metrics.jsonl and samples.jsonl. If wandb fails, training goes on."""
    if RANK > 0:
        return
    with blame(f"cannot write to {args.run_dir}"):
        for name, record in (("metrics", metrics), ("samples", sample)):
            with Path(args.run_dir, f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": metrics["step"]} | record) + "\n")
    try:
        if args.track:
            import wandb

            if wandb.run is None:
                mode = "online" if wandb.api.api_key else "offline"
                mode = os.environ.get("WANDB_MODE", mode)
                how = dict(project=args.wandb_project, config=vars(args), mode=mode)
                name = Path(args.run_dir).name
                wandb.init(dir=args.run_dir, name=name, **how)
            wandb.log(metrics, step=metrics["step"])
    except Exception as e:
        args.track = False
        tqdm.write(f"wandb is off from here on: {e}")


def save_checkpoint(run_dir: Path, step: int, model, tokenizer, optimizer) -> None:
    """Write checkpoint/ under a new name, then rename: one is complete at all times."""
    new, last, old = (run_dir / f"checkpoint{x}" for x in (".new", "", ".old"))
    try:
        with blame(f"cannot save step {step} in {run_dir} (the last save is whole)"):
            shutil.rmtree(new, ignore_errors=True)
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            state = {"step": step, "optimizer": optimizer.state_dict()}
            torch.save(state, new / "state.pt")
            for path in [*new.iterdir(), new]:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            if last.exists():
                shutil.rmtree(old, ignore_errors=True)
                last.rename(old)
            new.rename(last)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def nothing_lost(args: Args, step: int, parts: tuple, *logs: dict) -> Iterator[None]:
    """Around what may end the run at any time (sampling, rewards, backward passes):
    `step`, the last whole one, is saved, whichever rank fails. parts: model, tokenizer,
    optimizer; logs: the step's metrics and sample, if they are not written yet."""
    error, failed = None, torch.zeros((), device=args.device)
    try:
        yield
    except BaseException as e:
        error = e
        failed += 1
    try:
        all_reduce(failed)
    except Exception as e:  # a rank was killed
        error = error or e
    if error or failed > 0:
        try:
            if logs:
                write_logs(args, *logs)
            if RANK == 0:
                save_checkpoint(Path(args.run_dir), step, *parts)
                more = " with more --steps" * (step == args.steps)
                print(f"step {step} is saved; continue: --resume {args.run_dir}{more}")
            if WORLD_SIZE > 1:
                dist.barrier()  # the end of one rank is the end of all
        finally:  # if this fails as well, the first error is not lost
            raise error or SystemExit(2)


def draw_curve(run_dir: Path) -> None:
    """curve.png: the metrics whose names match CURVE, from metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    names = dict.fromkeys(name for record in records for name in record)
    names = [name for name in names if re.fullmatch(CURVE, name)]
    for name, style in zip(names, ["o-", "s--", "-", ":"]):
        points = [(r[AXIS], r[name]) for r in records if name in r]
        axes.plot(*zip(*points), style, markersize=4, label=name)
    low = 0 if axes.dataLim.ymin >= 0 else None
    title = run_dir.name.replace("$", r"\$")  # no mathematics
    axes.set(xlabel=AXIS, ylim=(low, None), title=title)
    axes.legend()
    with blame(f"cannot draw {run_dir}/curve.png"):
        axes.figure.savefig(run_dir / "curve.png", dpi=120)


# -------------------------------------- Main ------------------------------------------


def read_flags(default: Args | None = None) -> Args:
    """Parse the command line; a wrong flag gives one line instead of tyro's box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, default=default, description=__doc__.split("\n")[0])
    except SystemExit:
        if box.getvalue():  # not --help
            text = box.getvalue().partition("\n")[2]  # without the title
            fail(re.sub(r"[^ -~]|-{3,}", " ", text))  # nor the frame
        raise


def check(args: Args) -> None:
    """Reject invalid flags, and fill in --dtype and --learning-rate."""
    may_be_0 = "seed", "warmup_steps", "lora_rank", "kl_coef", "clip_low", "clip_high"
    may_be_0 += "prefixes_per_problem", "prefix_low", "plain_share", "sft_epochs"
    may_be_0 += ("max_flops",)
    for name, value in vars(args).items():
        number, zero = type(value) in (int, float), value == 0 and name in may_be_0
        if number and not (zero or 0 < value < math.inf):  # nan is neither
            least = "at least" if name in may_be_0 else "above"
            fail(f"--{name.replace('_', '-')} is {value}: it must be {least} 0")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.learning_rate is None:
        args.learning_rate = 3e-4 if args.model == "tiny" else 1e-6
    no_file = args.traces and not (args.resume or Path(args.traces).is_file())
    idle = args.trace_model and not needs_traces(args)
    both = args.off_policy and args.prefixes_per_problem > 0
    for wrong, message in (
        (args.group_size < 2, "--group-size must be 2 or more: A compares completions"),
        (args.eval_data and not args.data, "--eval-data needs --data"),
        (args.data and args.task != Args.task, "--data or --task: a task.py has both"),
        (args.clip_low >= 1, "--clip-low must be below 1"),
        (args.seed >= 2**63, "--seed must be below 2^63"),
        (args.prefix_low > args.prefix_high, "--prefix-low is above --prefix-high"),
        (args.prefix_high > 1, "--prefix-high is a share of the trace: at most 1"),
        (args.plain_share > 1, "--plain-share is a share of the batch: at most 1"),
        (args.traces and args.trace_model, "--traces or --trace-model, not both"),
        (args.strict_traces and not args.traces, "--strict-traces needs --traces"),
        (no_file, f"--traces: there is no file {args.traces!r}"),
        (both, "--off-policy is plain RL: it needs --prefixes-per-problem 0"),
        (idle, "--trace-model has no effect: plain RL needs no traces"),
        (args.prompts_per_step % WORLD_SIZE, "ranks must divide --prompts-per-step"),
        (args.eval_prompts < WORLD_SIZE, "there are more ranks than --eval-prompts"),
    ):
        if wrong:
            fail(message)


def parse_args() -> Args:
    """The flags, checked and completed; a resumed run keeps its saved ones."""
    args = read_flags()
    if args.resume:
        last, old = (Path(args.resume, f"checkpoint{x}") for x in ("", ".old"))
        with blame(f"{args.resume} holds no run to resume"):
            if old.exists() and not last.exists():  # killed between the two renames
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    old.rename(last)
            saved = json.loads(Path(args.resume, "args.json").read_text())["args"]
            if saved.keys() != vars(args).keys():
                raise ValueError("it is of another script or version, with other flags")
            saved = Args(**saved | {"resume": args.resume, "run_dir": args.resume})
            file = last / "state.pt"  # mapped: only its step is read
            done = torch.load(file, "cpu", weights_only=True, mmap=True)["step"]
        args, free = read_flags(saved), {"steps", "save_every", "track"}
        free |= {"micro_batch_size", "rollout_batch_size"}  # memory may have run out
        for name, value in vars(saved).items():
            if getattr(args, name) != value and name not in free:
                flag = f"--{name.replace('_', '-')}"
                fail(f"{flag} contradicts the run in {args.resume}: it has {value!r}")
        if args.steps <= done:
            fail(f"{args.resume} is at step {done} already: give a larger --steps")
    now = time.strftime("%Y%m%d-%H%M%S")
    args.run_dir = args.run_dir or f"runs/{Path(__file__).stem}/{now}-s{args.seed}"
    found = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]
    if args.device == "auto":
        args.device = found[0]
    if args.device not in found:
        how = "--resume it where there is" if args.resume else "use --device cpu"
        fail(f"there is no {args.device} here: {how}")
    with blame("the --run-dir cannot be used"):
        exists = Path(args.run_dir).exists()
    if exists and not args.resume:
        fail(f"{args.run_dir} exists: give another --run-dir, or --resume it")
    check(args)
    return args


def describe(rollout: Rollout, clock: list[float], args: Args) -> dict[str, float]:
    """Metrics of a rollout (means over the ranks), of time (seconds; tokens sampled per
    second of the whole step) and of peak memory (2^30 bytes, of this rank)."""
    groups = rollout.rewards.view(-1, args.group_size)
    dead = (groups.amax(-1) == groups.amin(-1)).float()
    lengths = rollout.completion_mask.sum(-1)
    means = groups.mean(), groups.std(-1).mean(), dead.mean()  # std: inside a group
    means = torch.stack([*means, rollout.truncated.float().mean(), lengths.mean()])
    names = "reward_mean reward_std dead_group_share truncated_share completion_length"
    metrics = dict(zip(names.split(), (all_reduce(means) / WORLD_SIZE).tolist()))
    names = "seconds_rollout", "seconds_score", "seconds_update"
    metrics |= dict(zip(names, np.diff(clock).tolist()))
    tokens = metrics["completion_length"] * len(lengths) * WORLD_SIZE
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak
    metrics["tokens_per_second"] = tokens / (clock[-1] - clock[0])
    return metrics | {"peak_memory_gb": peak / 2**30}


def prepare(parts, problems, candidates, tests, reward, step: int, args) -> tuple:
    """All before phase 3: the records of traces.jsonl, the hard and the prefixed
    exercises, and the metrics of `step`, the last one that was made. A resumed run
    reads what it found before. Imitation comes between two evaluations."""
    model, tokenizer, _ = parts
    run_dir = Path(args.run_dir)
    if args.resume:
        with blame(f"{run_dir} cannot be resumed"):
            found = [json.loads(line) for line in (run_dir / "traces.jsonl").open()]
            logs = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]  # whole
            metrics = [r for r in map(json.loads, logs) if r["step"] <= step][-1]
        if len(found) < WORLD_SIZE:
            fail(f"{run_dir} has {len(found)} hard problems: too few for so many ranks")
    else:  # phase 1
        task = problems, candidates, reward, args
        found, metrics = find_traces(model, tokenizer, *task)
    hard = []
    for record in found:
        trace = dict(trace=record["ids"] or [], logprob=record["logprob"])
        hard.append(candidates[record["problem"]]._replace(**trace))
    prefixed = cut_prefixes(hard, stop_ids(model, tokenizer), args)  # phase 2
    if args.prefixes_per_problem and not prefixed:
        fail("all prefixes are empty: give a higher --prefix-low and --prefix-high")
    if not args.resume:
        metrics |= evaluate_all(model, tokenizer, tests, hard, reward, args)
        metrics["flops_sft"] = 0
        if args.sft_epochs:
            metrics["flops_sft"] = imitate(model, hard, args)
            after = evaluate_all(model, tokenizer, tests, hard, reward, args)
            metrics |= {key.replace("eval/", "sft/"): x for key, x in after.items()}
        total = sum(x for key, x in metrics.items() if key.startswith("flops_"))
        metrics |= {"step": 0, "flops": total, "prefixed_problems": len(prefixed)}
    ended = 0 < args.max_flops <= (spent := metrics["flops"])
    if ended and "eval/hard_pass@1" in metrics:  # else its last evaluation failed
        fail(f"--max-flops {args.max_flops:.3g}: {spent:.3g} spent by step {step}")
    return found, hard, prefixed, metrics


def report(run_dir: Path, args: Args) -> None:
    """The table at the end: base, plain RL of the committed benchmark, this run."""
    logs = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    for name in [name for name in logs[-1] if name.startswith("eval/")]:
        base = logs[0].get(name, math.nan)  # a resumed run may have fewer ranks
        print(f"{name:17} base {base:.3f}  trained {logs[-1][name]:.3f}")
    if (args.model, args.task, args.data) == ("tiny", Args.task, ""):
        folder = Path(__file__).resolve().parent.parent / "benchmarks/results"
        plain = "not known here"
        with contextlib.suppress(
            OSError, ArithmeticError, LookupError, TypeError, ValueError
        ):
            runs = json.loads((folder / "prefixrl.json").read_text())
            ends = [run["evals"][-1] for run in runs if run["arm"] == "rl"]
            mean = sum(end["eval/hard_pass@1"] for end in ends) / len(ends)
            plain = f"{mean:.3f} (mean of {len(ends)} seeds)"
        print(f"eval/hard_pass@1  of plain RL in the committed benchmark: {plain}")
    print(f"{logs[-1]['flops']:.3g} FLOPs, run folder: {run_dir}")


def catch_stops() -> list[float]:
    """Let Ctrl-C and SIGTERM fill this list, so that the run can finish its step and
    save. One that comes 3 s after the first or later ends it at once; sooner ones may
    be the same stop, passed on by a scheduler and by torchrun."""
    stops = []

    def stop(*_):
        stops.append(time.monotonic())
        if stops[-1] - stops[0] > 3:
            sys.exit(130)
        if len(stops) == 1 and RANK == 0:
            with contextlib.suppress(OSError):  # print is not safe in here
                os.write(2, b"\nstopping after this step; after 3 s, again: at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stops


def join_ranks(args: Args) -> None:
    """Under torchrun: meet the other ranks, which must have the same flags."""
    if WORLD_SIZE == 1:
        return
    if args.device == "mps":
        fail("torchrun works with --device cuda and --device cpu")
    if args.device == "cuda":
        with blame("each rank needs a GPU of its own (or --device cpu)"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if args.device == "cuda" else "gloo"
    patience = datetime.timedelta(hours=2)  # the first rank may have to train a model
    with blame("WORLD_SIZE is set, but not by torchrun: use that, or unset it"):
        dist.init_process_group(backend, timeout=patience)
    flags = [None] * WORLD_SIZE
    dist.all_gather_object(flags, vars(args))
    args.run_dir = flags[0]["run_dir"]  # the ranks' clocks differ
    for name in [name for name in flags[0] if name != "run_dir"]:
        found = [*dict.fromkeys(x[name] for x in flags)]
        if len(found) > 1:
            fail(f"--{name.replace('_', '-')} differs between ranks: {found}")


def train(args: Args) -> int:
    """Find hard problems, cut prefixes of their traces; then as in grpo.py, on both."""
    transformers.utils.logging.disable_progress_bar()
    problems, held_out, reward = load_task(args)
    known = {"prompts_hash": hash_prompts(problems + held_out, args)}
    name = args.model
    if not args.resume or args.kl_coef or args.lora_rank:
        name = built_in(name, problems, args)
    last = Path(args.run_dir, "checkpoint")
    model, tokenizer = load_model(str(last) if args.resume else name, args)
    add_lora(model, args)
    reference = load_reference(name, model, args)
    room = args.max_new_tokens  # of a completion; behind a trace as much again
    most = 2 * room if needs_traces(args) else room
    candidates = exercises(model, tokenizer, problems[: args.candidates], most)
    tests = exercises(model, tokenizer, held_out, room)
    if RANK == 0:
        tqdm.write(f"first prompt: {tokenizer.decode(candidates[0].prompt)!r}")
    optimizer, step = make_optimizer(model, args)
    known["frozen_hash"] = check_weights(model, reference, step, args)
    parts = model, tokenizer, optimizer
    task = problems, candidates, tests, reward, step, args
    found, hard, prefixed, metrics = prepare(parts, *task)  # phases 1 and 2
    total, pass_1 = metrics["flops"], metrics.get("eval/hard_pass@1", math.nan)
    run_dir, stops = Path(args.run_dir), catch_stops()
    if RANK == 0:  # an earlier end leaves no folder; the same command continues it
        _lock = open_run(args, step, known)  # until this function returns
    if RANK == 0 and not args.resume:
        write_traces(run_dir, found)
        write_logs(args, metrics, {})
        save_checkpoint(run_dir, 0, *parts)
    n, group_size = args.prompts_per_step, args.group_size
    steps = range(step + 1, args.steps + 1)
    bar = tqdm(steps, initial=step, total=args.steps, disable=RANK > 0)
    for step in bar:  # phase 3
        clock = [time.perf_counter()]
        batch = draw_batch(prefixed, hard, step, args)
        noise = uniforms(args, step, n, group_size)
        repeated = [x.problem for x in batch for _ in range(group_size)]
        guard = functools.partial(nothing_lost, args, step - 1, parts)
        with guard():
            rollout, weights, read = sample_batch(model, tokenizer, batch, noise, args)
            clock.append(time.perf_counter())
            rollout.rewards = score(reward, repeated, rollout.texts).to(args.device)
        advantages = group_advantages(rollout.rewards, group_size, args.advantage_scale)
        advantages = advantages * weights
        clock.append(time.perf_counter())
        warm = min(1.0, step / max(args.warmup_steps, 1))
        optimizer.param_groups[0]["lr"] = args.learning_rate * warm
        stats = update(model, reference, optimizer, rollout, advantages, args, guard)
        clock.append(time.perf_counter())
        total += step_flops(model, reference, rollout, advantages, read, args)
        metrics = {"step": step} | describe(rollout, clock, args) | stats
        metrics |= by_kind(rollout.rewards, batch, args) | {"flops": total}
        sample = {"prompt": tokenizer.decode(batch[0].prompt)}
        sample |= {"prefix": tokenizer.decode(batch[0].prefix)}
        sample |= {"completions": rollout.texts[:group_size]}  # they begin with prefix
        sample |= {"rewards": rollout.rewards[:group_size].tolist()}
        end = step == args.steps or 0 < args.max_flops <= total
        if step % args.eval_every == 0 or end:
            guard = functools.partial(nothing_lost, args, step, parts, metrics, sample)
            metrics |= evaluate_all(model, tokenizer, tests, hard, reward, args, guard)
            pass_1 = metrics["eval/hard_pass@1"]
        stop = all_reduce(torch.tensor(float(len(stops)), device=args.device)) > 0
        write_logs(args, metrics, sample)
        shown = {"reward": metrics["reward_mean"], "hard pass@1": pass_1}
        shown |= {"tokens/s": round(metrics["tokens_per_second"])}
        bar.set_postfix(shown, GB=metrics["peak_memory_gb"])
        if step == 1 and RANK == 0:
            tqdm.write(f"first prompt of a batch: {sample['prompt']!r}")
            tqdm.write(f"its prefix: {sample['prefix']!r}")
            tqdm.write(f"first completion, prefix included: {rollout.texts[0]!r}")
            tqdm.write("a loss near 0 is normal: watch the reward and pass@1")
        if (stop or step % args.save_every == 0 or end) and RANK == 0:
            save_checkpoint(run_dir, step, *parts)
            draw_curve(run_dir)
            draw_prefix_success(run_dir)
        if end:
            break
        if stop:
            if RANK == 0:
                print(f"stopped after step {step}; to continue: --resume {run_dir}")
            return 130
    if RANK == 0:
        report(run_dir, args)
    return 0


def main() -> None:
    """The run that the command line asks for."""
    outlive_pipes()
    args = parse_args()
    join_ranks(args)
    try:
        code = train(args)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        tqdm.write("stopped before the first step; what was tried is cached")
        sys.exit(130)
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e)):
            raise  # a CPU's allocator has no exception of its own
        how = "--resume it" if Path(args.run_dir).exists() else "start again"
        flags = "--micro-batch-size or --rollout-batch-size"
        fail(f"too little memory: {how} with a lower {flags}: {e}")
    if WORLD_SIZE > 1:
        dist.barrier()  # a rank that leaves before the others makes them fail
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
