"""vOPD: on-policy distillation with a control-variate baseline, in one file.

Paper: "KL for a KL: On-Policy Distillation with Control Variate Baseline" (arXiv
2605.07865; official code: holi-lab/vOPD).

The student p samples completions, the teacher q says how likely each token is to it,
and the student moves towards the teacher: no rewards, no answers. Policy gradients
minimise the reverse KL at every state the student visits. For completions y ~ p of a
prompt, where c_t is the prompt and the tokens before y_t,

    r_t  = log q(y_t | c_t) - log p(y_t | c_t)      a reward for each token
    V_t  = E_{y ~ p}[r] = -KL(p(. | c_t) || q(. | c_t))
    loss = -1/Z sum_t a_t log p(y_t | c_t)          a_t detached, Z: completion tokens

The value of a state needs no network: it is -KL, which the two forward passes already
give. Whatever does not depend on the action may be subtracted, so a_t = r_t - V_t has
the same expected gradient as r_t, and less noise in most states (not in all: -KL is not
the best possible baseline).

    --estimator sampled    a = r                                        unbiased, noisy
                vopd       a = r + KL(p || q)                           unbiased
                vopd-topk  a = r + KL of the student's k likeliest      unbiased
                           tokens, both distributions renormalised there
                full       KL(p || q) itself is differentiated          no action noise
                topk       the KL of vopd-topk is differentiated        biased
                clip       a = max(r, log(lam) / (1 - lam))             biased

Unbiased: as an estimate of the gradient of the KL at each state, with the states and Z
held fixed (no token gets credit for what comes after it; that Z counts sampled tokens
adds a bias of the order of one over the number of completions), and only on on-policy
data: one update per batch. --mask-truncated chooses completions by their tokens: of the
first three, none is unbiased with it.

Differences. All weights are trained unless --lora-rank is given. The learning rate
rises over --warmup-steps (the official code has none), then falls as 1 / (1 + step /
--decay-steps), not as a cosine: a longer run continues a shorter one. The paper divides
both models' logits by one temperature: for that, set --teacher-temperature to the value
of --temperature. --clip-lambda .1 is our choice. Vocabulary rows beyond the tokenizer's
last token (padding) are cut off both models, so that they get no probability; the saved
student does not have them (the base of a saved adapter does).

    python algos/vopd.py
    python algos/vopd.py --model Qwen/Qwen3-0.6B-Base --teacher Qwen/Qwen3-4B \
        --data prompts.jsonl --max-new-tokens 512 --micro-batch-size 8 \
        --rollout-batch-size 128 --gradient-checkpointing

The first trains a teacher and a smaller student on Countdown and distils one into the
other, with nothing to download: the reverse KL falls by more than half, and half of the
distance in held-out pass@1 is closed (README.md has the measurements).
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
OWN = (
    "CURVE", "to_problem", "read_problems", "update", "evaluate", "check", "describe",
    "print_table",
)  # fmt: skip
CURVE = "eval/pass@.*|eval/reverse_kl"  # metrics that curve.png shows
AXIS = "step"  # ... and along what
RANK = int(os.environ.get("RANK", 0))  # of torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# cuDNN's attention has gradients of NaN at some lengths (pytorch issue 196678)
torch.backends.cuda.enable_cudnn_sdp(False)
STUDENT_WIDTH = 96  # of the tiny one, which is weaker than its teacher
ESTIMATORS = "vopd", "vopd-topk", "sampled", "full", "topk", "clip"


@dataclasses.dataclass
class Args:
    seed: int = 1  # for the problems, their order, the sampling and the built-in models
    steps: int = 360  # batches in the whole run, including those before a --resume
    run_dir: str = ""  # folder of the run (default: runs/vopd/<time>-s<seed>)
    resume: str = ""  # folder of a run to continue; its saved flags apply
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # for matrix products
    model: str = "tiny"  # student: tiny (built in), a local folder or a hub name
    tiny_steps: int = 500  # warm-start steps of tiny, on 64 worked answers each
    teacher: str = ""  # a folder or a hub name (default for a tiny student: built in)
    teacher_steps: int = 1500  # training steps of the built-in teacher, on 64 answers
    task: str = "countdown"  # countdown, countdown-4 (four numbers), ... or a task.py
    data: str = ""  # JSONL file of {"prompt": ...} (answer optional), instead of --task
    eval_data: str = ""  # JSONL file to evaluate on (default: a tenth of --data)
    estimator: Literal[ESTIMATORS] = "vopd"  # of the KL's gradient; topk, clip: biased
    top_k: int = 100  # tokens in the KL of vopd-topk and topk (at most V)
    clip_lambda: float = 0.1  # lam of clip, between 0 and 1
    prompts_per_step: int = 256  # prompts in a batch, over all ranks
    group_size: int = 1  # completions of each prompt
    max_new_tokens: int = 24  # tokens at which a completion is cut off
    temperature: float = 1.0  # for sampling, and for every log-prob of the student
    teacher_temperature: float = 1.0  # divides the teacher's logits
    learning_rate: float | None = None  # initial; default: 1e-3 for tiny, else 1e-5
    warmup_steps: int = 10  # steps over which the learning rate rises
    decay_steps: int = 100  # after n x this, the rate is 1 / (1 + n) of its start
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    micro_batch_size: int = 64  # completions in one forward and backward pass
    rollout_batch_size: int = 512  # completions sampled in one batch
    lora_rank: int = 0  # train adapters of this rank (needs peft); 0: all weights
    gradient_checkpointing: bool = False  # recompute activations to save memory
    mask_truncated: bool = False  # leave cut-off completions out of the loss
    eval_every: int = 100  # steps between evaluations
    eval_prompts: int = 128  # held-out problems in an evaluation
    eval_samples: int = 8  # completions per evaluation problem, the k of pass@k
    save_every: int = 50  # steps between checkpoints
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


OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
OPERATORS["/"] = lambda a, b: a // b if b and a % b == 0 else -1  # -1 is never a result


def countdown_problems(split: str, seed: int, size: int) -> Iterator[Problem]:
    """Endless problems such as "3 5 7 2=24:" with the answer "3*5=15;15+7=22;22+2=24":
    each number and each result is used once. The sorted numbers and the target decide
    whether a problem is held out, so the splits share none."""
    rng = random.Random(f"{split} {seed}")
    while True:
        given = rng.choices(range(1, 16), k=size)
        pool, steps = list(given), []
        while len(pool) > 1 and 0 <= pool[-1] <= 99:
            a, b = (pool.pop(rng.randrange(len(pool))) for _ in "ab")
            sign = rng.choice("+-*/")
            pool.append(OPERATORS[sign](a, b))
            steps.append(f"{a}{sign}{b}={pool[-1]}")
        held_out = random.Random(f"{sorted(given)} {pool}").random() < 1 / 8
        if 0 <= pool[-1] <= 99 and held_out == (split == "eval"):
            prompt = f"{' '.join(map(str, given))}={pool[0]}:"
            yield Problem(prompt, [given, pool[0]], ";".join(steps))


def countdown_reward(problem: Problem, completion: str) -> float:
    """1.0 if all steps are right, use each number once and reach the target, else 0."""
    given, target = problem.answer
    pool = list(given)
    for step in completion[: 20 * len(given)].split(";"):
        match = re.fullmatch(r"([0-9]{1,4})([-+*/])([0-9]{1,4})=([0-9]{1,4})", step)
        if not match:
            return 0.0
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        for operand in (a, b):
            if operand not in pool:
                return 0.0
            pool.remove(operand)
        if OPERATORS[match[2]](a, b) != result:
            return 0.0
        pool.append(result)
    return float(pool == [target] and len(completion) <= 20 * len(given))


TASKS = {"countdown": (countdown_problems, countdown_reward, 3)}  # 3: default size


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
    """A line of --data, or what a task.py yields, as a Problem. An answer that is
    missing is None."""
    item = item._asdict() if hasattr(item, "_asdict") else item
    if not (hasattr(item, "keys") and "prompt" in item):
        raise ValueError("it is no object with a prompt")
    prompt, solution = item["prompt"], item.get("solution")
    check_prompt(prompt)
    solution = "" if solution is None else str(solution)
    f"{prompt}{solution}".encode()  # ValueError: half a character
    return Problem(prompt, item.get("answer"), solution)


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
            if args.data and type(problem.answer) not in (str, int, float, type(None)):
                raise ValueError("its answer is neither text nor a number")
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


def answered(problems: list[Problem], args: Args) -> bool:
    """Whether there are rewards: those of a task, or of --data with all answers."""
    blank = [p.answer is None or not str(p.answer).strip() for p in problems]
    if args.data and any(blank) and not all(blank) and RANK == 0:
        tqdm.write("some problems have no answer: no rewards, no pass@1")
    return not (args.data and any(blank))


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


def load_teacher(problems: list[Problem], args: Args) -> tuple:
    """The teacher, on the CPU, without gradients (in bf16 if --dtype is), and its
    tokenizer. Without --teacher, a wider model than the tiny student, trained for
    longer and, if the task is built in, on more problems."""
    name = args.teacher
    if not name:
        if not args.data and not args.task.endswith(".py"):
            for k in 1000, 2000, 3000:
                more = dataclasses.replace(args, seed=args.seed + k)
                problems = problems + load_task(more)[0]  # never held-out ones
        name = tiny_model(problems, args.seed, steps=args.teacher_steps, width=128)
    teacher, tokenizer = load_model(name, dataclasses.replace(args, device="cpu"))
    teacher.requires_grad_(False)
    for weight in teacher.parameters():  # not the buffers: RoPE needs fp32
        weight.data = weight.data.to(getattr(torch, args.dtype))
    return teacher, tokenizer


def same_vocabulary(model, tokenizer, teacher, teacher_tokenizer) -> None:
    """Reject a teacher whose ids stand for other tokens. Rows beyond the last token,
    which pad a vocabulary, are cut off both models: they cannot be sampled and get no
    probability. The student takes over the teacher's EOS, as it would learn never to
    emit another one, and its chat template if it has none."""
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token, _ = min(ours.items() ^ theirs.items(), key=str)
        ids = f"{ours.get(token)} for the student, {theirs.get(token)} for the teacher"
        fail(f"the vocabularies must be equal, but the id of {token!r} is {ids}")
    size = max(ours.values()) + 1
    for who, part in (("student", model), ("teacher", teacher)):
        config, rows = part.config, len(part.get_output_embeddings().weight)
        if rows < size:
            fail(f"the {who} has {rows} logits, fewer than the {size} tokens")
        padded = config.vocab_size
        part.resize_token_embeddings(size)
        if part._hf_peft_config_loaded:  # an adapter goes with the base as it was
            config.vocab_size = padded
        elif (config.pad_token_id or 0) >= size:  # cannot be loaded again
            config.pad_token_id = None
    tokenizer.add_special_tokens({"eos_token": teacher_tokenizer.eos_token})
    tokenizer.chat_template = tokenizer.chat_template or teacher_tokenizer.chat_template
    stops = stop_ids(teacher, teacher_tokenizer)
    for config in (model.config, model.generation_config):
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.do_sample = True  # a top_p there cannot be saved without


def share_weights(teacher, model) -> None:
    """Let a teacher with the same base as the student (--lora-rank) use the student's
    frozen weights instead of copies of them. Each keeps what its adapter adds."""
    bare = lambda name: name.replace(".base_layer", "")  # a name without adapters
    weights = model.named_parameters()
    frozen = {bare(name): x for name, x in weights if not x.requires_grad}
    for name, weight in teacher.named_parameters():
        same = frozen.get(bare(name))  # an adapter may have changed a bias
        if same is not None and torch.equal(weight, same.to(weight.device)):
            weight.data = same.data


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


def load_both(problems: list[Problem], args: Args) -> tuple:
    """The student and its tokenizer, and the teacher, all on args.device. With LoRA and
    one base model for both, its weights are there once."""
    teacher, teacher_tokenizer = load_teacher(problems, args)
    name = args.model
    if name == "tiny" and not args.resume:
        name = tiny_model(problems, args.seed, args.tiny_steps, STUDENT_WIDTH)
    last = Path(args.run_dir, "checkpoint")
    model, tokenizer = load_model(str(last) if args.resume else name, args)
    add_lora(model, args)
    same_vocabulary(model, tokenizer, teacher, teacher_tokenizer)
    if args.lora_rank and teacher.name_or_path == model.name_or_path:
        share_weights(teacher, model)
    return model, tokenizer, teacher.to(args.device)


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


# --------------------------------- THE ALGORITHM --------------------------------------


def logprob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-softmax of logits (..., V) at the tokens (...): a gather and a logsumexp."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def reverse_kl(student_logits, teacher_logits, top_k: int = 0) -> torch.Tensor:
    """KL(p || q) (...) in nats of logits (..., V); with top_k that of the student's k
    likeliest tokens, both distributions renormalised there."""
    if top_k:
        k = min(top_k, student_logits.shape[-1])
        ids = student_logits.detach().topk(k).indices
        student_logits = student_logits.gather(-1, ids)
        teacher_logits = teacher_logits.gather(-1, ids)
    log_z = student_logits.logsumexp(-1) - teacher_logits.logsumexp(-1)
    gaps = (student_logits - teacher_logits).sub_(log_z[..., None])  # log p - log q
    return torch.linalg.vecdot(student_logits.softmax(-1), gaps)


@torch.no_grad()
def distill_advantages(
    student_logits, teacher_logits, tokens, estimator, top_k=100, clip_lambda=0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages a (B, C) and the reverse KL as the estimator sees it (B, C), in nats,
    both detached (the six estimators of the paper's code).

    student_logits, teacher_logits (B, C, V), divided by their temperatures; tokens
    (B, C), drawn from the student. ValueError: there is no such estimator.
    """
    batch = student_logits, teacher_logits
    r = logprob(teacher_logits, tokens) - logprob(student_logits, tokens)
    if estimator == "sampled":  # unbiased: E[r grad log p] = -grad KL(p || q); noisy
        return r, -r
    if estimator == "clip":  # biased: what the teacher rejects counts too little
        return r.clamp(min=math.log(clip_lambda) / (1 - clip_lambda)), -r
    if estimator == "vopd":  # a = r - V; unbiased: E[KL grad log p] = KL grad 1 = 0
        kl = reverse_kl(*batch)
        return r + kl, kl
    if estimator == "vopd-topk":  # unbiased too: y has no part in this KL either
        kl = reverse_kl(*batch, top_k)
        return r + kl, kl
    if estimator == "full":  # no action, no noise: distill_loss differentiates the KL
        return torch.zeros_like(r), reverse_kl(*batch)
    if estimator == "topk":  # biased: how much mass the k have does not count
        return torch.zeros_like(r), reverse_kl(*batch, top_k)
    raise ValueError(f"no estimator {estimator!r}")


def distill_loss(
    student_logits, teacher_logits, tokens, mask, estimator, top_k=100, denominator=1,
    clip_lambda=0.1,
) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """-1/Z sum of a log p, a scalar; for full and topk 1/Z sum of their KL itself.

    Shapes as above; mask (B, C): 1 where a token counts; denominator: Z. Losses and
    stats (sums: tokens, reverse_kl) of chunks add up to those of the batch; the stat
    logprobs (B, C) is log p, detached.
    """
    batch = student_logits, teacher_logits.detach()
    log_p = logprob(student_logits, tokens)
    if estimator == "full":
        losses = kl = reverse_kl(*batch)
    elif estimator == "topk":
        losses = kl = reverse_kl(*batch, top_k)
    else:
        A, kl = distill_advantages(*batch, tokens, estimator, top_k, clip_lambda)
        losses = -A * log_p
    loss = (losses * mask).sum() / max(denominator, 1)
    stats = {"tokens": mask.sum(), "reverse_kl": (kl.detach() * mask).sum()}
    return loss, stats | {"logprobs": log_p.detach()}


def scaled_logits(head, hidden, temperature: float) -> torch.Tensor:
    """Logits (n, V) divided by the temperature: hidden (n, D) and the bias are divided
    instead, which are smaller."""
    bias = None if head.bias is None else head.bias / temperature
    return F.linear(hidden / temperature, head.weight, bias)


def distill(model, teacher, rollout, mask, z, args, most=3 * 2**27) -> tuple:
    """Sums (4,) over the tokens in mask (B, C): loss, reverse KL, tokens, and gaps
    |delta log p| between scored and sampled log-probs; and the largest gap. Gradients
    of the loss, if they are on, are added to those of the weights.

    No (B, C, V) tensor exists for either model: a chunk with about `most` bytes of
    logits is finished, backward pass included, before the next one is made.
    """
    z = float(z)  # a tensor would be waited for at every chunk
    totals, worst = torch.zeros(4, device=mask.device), mask.new_zeros(())
    p_head, q_head = (x.get_output_embeddings() for x in (model, teacher))
    size = 2 if args.dtype == "bfloat16" else 4  # bytes of a logit
    n, width = most // size // len(p_head.weight) + 1, mask.shape[1]
    live = mask.any(-1).nonzero()[:, 0]
    live = live[mask[live].sum(-1).argsort(stable=True)]  # similar lengths together
    for rows in live.split(args.micro_batch_size) if len(live) else ():
        tokens = rollout.tokens[rows]
        batch = tokens, rollout.attention_mask[rows], width
        with autocast(args):
            hidden, scored = last_hidden(model, *batch)
            with torch.no_grad():
                q_hidden, _ = last_hidden(teacher, *batch)
        p_hidden = hidden.detach().requires_grad_(hidden.requires_grad)
        parts = tokens[:, -width:], mask[rows], rollout.logprobs[rows]
        parts = p_hidden, q_hidden, *(x[scored] for x in parts)
        for p_h, q_h, y, m, sampled in zip(*(x.split(n) for x in parts)):
            with autocast(args):
                p_logits = scaled_logits(p_head, p_h, args.temperature)
                q_logits = scaled_logits(q_head, q_h, args.teacher_temperature)
            batch = p_logits.float(), q_logits.float(), y, m, args.estimator
            loss, stats = distill_loss(*batch, args.top_k, z, args.clip_lambda)
            if loss.requires_grad:
                loss.backward()
            gaps = (stats["logprobs"] - sampled).abs() * m
            sums = loss.detach(), stats["reverse_kl"], stats["tokens"], gaps.sum()
            totals, worst = totals + torch.stack(sums), worst.maximum(gaps.max())
        if hidden.requires_grad:
            hidden.backward(p_hidden.grad)
    return totals, worst


def update(
    model, teacher, optimizer, rollout, args, guard=contextlib.nullcontext
) -> dict[str, float]:
    """One optimiser step on one batch; returns its statistics. There is no second step:
    the data would be off-policy, and then no baseline is free of bias. reverse_kl is
    what the estimator takes for it (of topk and vopd-topk over k tokens); the exact one
    is in evaluations. guard: nothing_lost, for the step before, until the weights
    change."""
    without_noise(model)
    mask = rollout.completion_mask
    if args.mask_truncated:
        mask = mask * ~rollout.truncated[:, None]
    z = all_reduce(mask.sum())
    with guard():
        sums, worst = distill(model, teacher, rollout, mask, z, args)
    norm, change = optimizer_step(model, optimizer, args.max_grad_norm)
    loss, kl, tokens, gap = all_reduce(sums).tolist()
    tokens, worst = max(tokens, 1.0), all_reduce(worst, "MAX").item()
    stats = {"loss": loss, "reverse_kl": kl / tokens, "grad_norm": norm}
    stats |= {"relative_update": change, "delta_logp_mean": gap / tokens}
    return stats | {"delta_logp_max": worst}


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
    model, teacher, tokenizer, prompts, problems, reward, args,
    guard=contextlib.nullcontext,
) -> dict[str, float]:  # fmt: skip
    """Reverse KL per token, over the whole vocabulary, of n = eval_samples completions
    of each held-out problem; if there is a reward, its mean, pass@1 and pass@n (right:
    a reward of 1 or more). The ranks split the problems; always the same noise. guard:
    nothing_lost, for this step."""
    n, mine = args.eval_samples, slice(RANK, None, WORLD_SIZE)
    noise = uniforms(args, 0, len(problems), n)
    repeated = [problem for problem in problems[mine] for _ in range(n)]
    exact = dataclasses.replace(args, estimator="full")
    with guard(), torch.no_grad():
        rollout = generate(model, tokenizer, prompts[mine], noise, args)
        sums, _ = distill(model, teacher, rollout, rollout.completion_mask, 1, exact)
        if reward:
            rewards = score(reward, repeated, rollout.texts)
    _, kl, tokens, _ = all_reduce(sums).tolist()
    metrics = {"eval/reverse_kl": kl / tokens}
    if not reward:
        return metrics
    right = (rewards.view(-1, n) >= 1).sum(-1).tolist()
    sums = [sum(pass_at_k(n, c, k) for c in right) for k in (1, n)]
    sums = all_reduce(torch.tensor([*sums, rewards.sum() / n], device=args.device))
    names = "eval/pass@1", f"eval/pass@{n}", "eval/reward"
    return metrics | dict(zip(names, (sums / len(problems)).tolist()))


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
    may_be_0 = "seed", "warmup_steps", "lora_rank"
    for name, value in vars(args).items():
        number, zero = type(value) in (int, float), value == 0 and name in may_be_0
        if number and not (zero or 0 < value < math.inf):  # nan is neither
            least = "at least" if name in may_be_0 else "above"
            fail(f"--{name.replace('_', '-')} is {value}: it must be {least} 0")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if args.model == "tiny" else 1e-5
    for wrong, message in (
        (args.clip_lambda >= 1, "--clip-lambda must be below 1"),
        (args.model != "tiny" and not args.teacher, "--model needs a --teacher"),
        (args.eval_data and not args.data, "--eval-data needs --data"),
        (args.data and args.task != Args.task, "--data or --task: a task.py has both"),
        (args.seed >= 2**63, "--seed must be below 2^63"),
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
    """Metrics of a rollout (means over the ranks), of time and of memory."""
    lengths = rollout.completion_mask.sum(-1)
    means = rollout.rewards.mean(), rollout.truncated.float().mean(), lengths.mean()
    means = all_reduce(torch.stack(means)) / WORLD_SIZE
    names = "reward_mean", "truncated_share", "completion_length"
    metrics = dict(zip(names, means.tolist()))
    names = "seconds_rollout", "seconds_score", "seconds_update"
    metrics |= dict(zip(names, np.diff(clock).tolist()))
    tokens = metrics["completion_length"] * len(lengths) * WORLD_SIZE
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak
    metrics["tokens_per_second"] = tokens / (clock[-1] - clock[0])
    return metrics | {"peak_memory_gb": peak / 2**30}


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


def batch_indices(count: int, step: int, args: Args) -> np.ndarray:
    """Which of `count` problems the step is about, this rank's share. Each is used at
    most once per epoch, in an order that depends on seed and epoch alone."""
    n = args.prompts_per_step
    epoch, place = divmod(step - 1, count // n)
    order = np.random.default_rng([args.seed, 1, epoch]).permutation(count)
    return order[place * n : (place + 1) * n][RANK::WORLD_SIZE]


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


def print_table(run_dir: Path) -> None:
    """Evaluations of the student, at the start and at the end, and of the teacher."""
    logs = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    print(f"{'':16} student before  student after   teacher")
    for name in [name for name in logs[0] if "/teacher_" in name]:
        own = name.replace("teacher_", "")
        before, after, teacher = logs[0][own], logs[-1][own], logs[0][name]
        print(f"{own:16} {before:14.3f} {after:14.3f} {teacher:9.3f}")
    print(f"run folder: {run_dir}")


def train(args: Args) -> int:
    """Sample, update with the teacher's scores, log; evaluate and save now and then."""
    transformers.utils.logging.disable_progress_bar()
    problems, held_out, reward = load_task(args)
    known = {"prompts_hash": hash_prompts(problems + held_out, args)}
    if not answered(problems + held_out, args):
        reward = None
    model, tokenizer, teacher = load_both(problems, args)
    longest = min(map(context_length, (model, teacher))) - args.max_new_tokens
    rows = len(model.get_input_embeddings().weight)
    prompts = encode_prompts(tokenizer, problems, longest, rows)
    tests = encode_prompts(tokenizer, held_out, longest, rows)
    first = batch_indices(len(problems), 1, args)[0]
    if RANK == 0:
        tqdm.write(f"first prompt: {tokenizer.decode(prompts[first])!r}")
    if RANK == 0 and "topk" in args.estimator and args.top_k >= rows:
        tqdm.write(f"--top-k {args.top_k} is no choice among {rows} tokens")
    optimizer, step = make_optimizer(model, args)
    known["frozen_hash"] = check_weights(model, teacher, step, args)
    parts = model, tokenizer, optimizer
    run_dir, stops, kl = Path(args.run_dir), catch_stops(), math.nan
    task = teacher, tokenizer, tests, held_out, reward, args
    if not args.resume:
        metrics = evaluate(model, *task)
        kl = metrics["eval/reverse_kl"]
        own = dataclasses.replace(args, temperature=args.teacher_temperature)
        best = {"eval/reverse_kl": 0.0}  # to itself
        if reward:
            best = evaluate(teacher, *task[:-1], own)
        metrics |= {x.replace("eval/", "eval/teacher_"): best[x] for x in best}
    if RANK == 0:  # after the evaluation, so that a failed one leaves no folder
        _lock = open_run(args, step, known)  # until this function returns
    if RANK == 0 and not args.resume:
        write_logs(args, {"step": 0} | metrics, {})
        save_checkpoint(run_dir, 0, *parts)
    n, group_size = args.prompts_per_step, args.group_size
    steps = range(step + 1, args.steps + 1)
    bar = tqdm(steps, initial=step, total=args.steps, disable=RANK > 0)
    for step in bar:
        clock = [time.perf_counter()]
        batch = batch_indices(len(problems), step, args)
        batch_prompts = [prompts[i] for i in batch]
        noise = uniforms(args, step, n, group_size)
        repeated = [problems[i] for i in batch for _ in range(group_size)]
        guard = functools.partial(nothing_lost, args, step - 1, parts)
        with guard():
            rollout = generate(model, tokenizer, batch_prompts, noise, args)
            clock.append(time.perf_counter())
            if reward:  # for the logs only
                rollout.rewards = score(reward, repeated, rollout.texts).to(args.device)
        clock.append(time.perf_counter())
        warm = min(1.0, step / max(args.warmup_steps, 1))
        rate = args.learning_rate * warm / (1 + step / args.decay_steps)
        optimizer.param_groups[0]["lr"] = rate
        stats = update(model, teacher, optimizer, rollout, args, guard)
        clock.append(time.perf_counter())
        metrics = {"step": step} | describe(rollout, clock, args) | stats
        sample = {"prompt": tokenizer.decode(prompts[batch[0]])}  # the first group
        sample |= {"completions": rollout.texts[:group_size]}
        sample |= {"rewards": rollout.rewards[:group_size].tolist()}
        if not reward:
            del metrics["reward_mean"], sample["rewards"]
        if step % args.eval_every == 0 or step == args.steps:
            guard = functools.partial(nothing_lost, args, step, parts, metrics, sample)
            metrics |= evaluate(model, *task, guard)
            kl = metrics["eval/reverse_kl"]
        stop = all_reduce(torch.tensor(float(len(stops)), device=args.device)) > 0
        write_logs(args, metrics, sample)
        shown = {"reverse_kl": metrics["reverse_kl"], "held out": kl}
        shown |= {"tokens/s": round(metrics["tokens_per_second"])}
        bar.set_postfix(shown, GB=metrics["peak_memory_gb"])
        if step == 1 and RANK == 0:
            tqdm.write(f"first completion: {rollout.texts[0]!r}")
            tqdm.write("the loss may rise or be below 0: watch the held-out KL")
        if (stop or step % args.save_every == 0 or step == args.steps) and RANK == 0:
            save_checkpoint(run_dir, step, *parts)
            draw_curve(run_dir)
        if stop and step < args.steps:
            if RANK == 0:
                print(f"stopped after step {step}; to continue: --resume {run_dir}")
            return 130
    if RANK == 0:
        print_table(run_dir)
    return 0


def main() -> None:
    """The run that the command line asks for."""
    outlive_pipes()
    args = parse_args()
    join_ranks(args)
    try:
        code = train(args)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
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
