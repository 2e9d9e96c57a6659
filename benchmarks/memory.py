"""Peak memory and seconds of loss + backward: each script against whole logits.

    python benchmarks/memory.py --tokens 4096 [--name h200]

What is measured is the script's own `update` (algos/vopd.py: `distill`, for each
estimator) on one micro-batch of completions of 512 tokens, V = 151,936. The model is a
Qwen3 of two layers with a hidden size of 1,024 and random weights, whose gradients are
there already, as in every step but the first: the head and the loss are nearly all of
it. Naive: the same loss by the script's own loss functions on the logits of all tokens
at once; without the entropy, which the scripts log too.

Memory is the peak less what was there before the call: of CUDA's allocator on a GPU; of
the resident set on a CPU (Linux), where each measurement has a process of its own. The
two ways must agree on loss and gradient, or the script ends. Where whole logits do not
fit a CPU's memory there is no time to compare with, and what was in use when a tensor
could not be had, that tensor included, is less than they need: the ratio is a bound.
Writes benchmarks/results/memory-<name>.json, case by case.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers
from code_hash import code_hash

ROOT = Path(__file__).resolve().parent.parent
ESTIMATORS = "vopd", "vopd-topk", "sampled", "full", "topk", "clip"
CASES = "grpo", "dmpo", "prefixrl", *(f"vopd {name}" for name in ESTIMATORS)
LENGTH, PROMPT, GROUP = 512, 16, 4  # tokens, tokens, completions


def load_script(name: str) -> ModuleType:
    """algos/<name>.py, or a copy of it in the folder $ONEFILE_ALGOS, as a module."""
    path = Path(os.environ.get("ONEFILE_ALGOS", ROOT / "algos"), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(function: Callable, *args) -> tuple:
    """Begin function(*args) in a process that starts as a copy of this one: nothing is
    imported again. Returns the process and the pipe that its result will come through,
    for `finish`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def job() -> None:
        try:
            there.send((None, function(*args)))
        except BaseException as e:
            traceback.print_exc()
            there.send((f"{type(e).__name__}: {e}".splitlines()[0], None))

    process = context.Process(target=job)
    process.start()
    there.close()
    return process, here


def finish(process, here, seconds: float | None) -> object:
    """What the function returned, within that time; the process and what it started are
    gone then. What failed there is a RuntimeError here, in one line."""
    try:
        if not here.poll(seconds):
            raise RuntimeError("it was not done in time")
        error, result = here.recv()
    except EOFError:
        process.join()
        error = f"the process died, exit code {process.exitcode}"
    finally:
        with contextlib.suppress(OSError):  # it and its own, if it leads a group
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if error:
        raise RuntimeError(error)
    return result


def in_process(function: Callable, *args) -> object:
    """function(*args), done in a process of its own."""
    return finish(*start(function, *args), None)


def random_rollout(script, vocab: int, rows: int, length: int, device: str, seed=0):
    """A Rollout of random tokens, groups of GROUP behind one prompt, with rewards."""
    noise = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocab, (rows // GROUP, PROMPT), generator=noise)
    completions = torch.randint(vocab, (rows, length), generator=noise)
    tokens = torch.cat([prompts.repeat_interleave(GROUP, 0), completions], -1)
    tokens, mask = tokens.to(device), torch.ones(rows, length, device=device)
    rewards = torch.rand(rows, generator=noise).to(device)
    seen, cut = torch.ones_like(tokens), torch.zeros_like(rewards).bool()
    return script.Rollout(tokens, seen, mask, -10 * mask, rewards, cut, [""] * rows)


def still() -> SimpleNamespace:
    """An optimiser that leaves the weights, and the gradients, as they are."""
    return SimpleNamespace(step=lambda: None, zero_grad=lambda: None)


def ours(script, model, teacher, rollout, args) -> float:
    """The loss, its gradients added to the weights' as the script itself does it."""
    mask, G = rollout.completion_mask, args.group_size
    if teacher is not None:
        return script.distill(model, teacher, rollout, mask, mask.sum(), args)[0][0]
    advantages = script.group_advantages(rollout.rewards, G, args.advantage_scale)
    stats = script.update(model, None, still(), rollout, advantages, args)
    return stats["loss"] + getattr(args, "dm_coef", 0) * stats.get("dm_loss", 0)


def naive(script, model, teacher, rollout, args) -> float:
    """The same from the logits of all tokens at once."""
    mask, width = rollout.completion_mask, rollout.completion_mask.shape[1]
    places = (rollout.attention_mask.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(attention_mask=rollout.attention_mask, position_ids=places)
    inputs |= dict(input_ids=rollout.tokens, logits_to_keep=width + 1)
    targets = rollout.tokens[:, -width:]
    with script.autocast(args):
        logits = model(**inputs).logits[:, :-1].float() / args.temperature
        if teacher is not None:
            with torch.no_grad():
                theirs = teacher(**inputs).logits[:, :-1].float()
            batch = logits, theirs / args.teacher_temperature, targets, mask
            del theirs
            how = args.estimator, args.top_k, mask.sum(), args.clip_lambda
            loss, _ = script.distill_loss(*batch, *how)
            loss.backward()
            return loss.detach()
        log_softmax = logits.log_softmax(-1)
        del logits
        logprobs = log_softmax.gather(-1, targets[..., None])[..., 0]
        del log_softmax
    G, rewards = args.group_size, rollout.rewards
    advantages = script.group_advantages(rewards, G, args.advantage_scale)
    pair, clips = (logprobs, logprobs.detach()), (args.clip_low, args.clip_high)
    loss, _ = script.policy_loss(*pair, advantages, mask, *clips, mask.sum())
    if hasattr(args, "dm_coef"):
        group = logprobs, mask, rewards, G, args.dm_temperature, args.dm_divergence
        loss = loss + args.dm_coef * script.distribution_matching_loss(*group)[0]
    loss.backward()
    return loss.detach()


def memory(device: str, peak: bool) -> int:
    """Bytes in use, or at the peak since the last reset."""
    if device == "cuda":
        used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return used()
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name))


def free_memory() -> int:
    """Bytes that this machine (Linux) can still give, less 1 GB."""
    about = Path("/proc/meminfo").read_text()
    return 1024 * int(re.search(r"MemAvailable: +(\d+)", about)[1]) - 2**30


@contextlib.contextmanager
def within_memory(found: dict) -> Iterator[None]:
    """On a CPU: what does not fit is an error of torch, not the kernel's kill, and
    found["needs_more_than"]: bytes beside those that were in use `before`."""
    about = Path("/proc/self/status").read_text()
    most = 1024 * int(re.search(r"VmData:\s+(\d+)", about)[1]) + free_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        yield
    except RuntimeError as e:
        lacking = re.search(r"can't allocate memory: .* (\d+) bytes", str(e))
        if not lacking:
            raise
        least = memory("cpu", peak=False) + int(lacking[1]), memory("cpu", peak=True)
        found["needs_more_than"] = max(least) - found["before"]


def measure(case: str, way: Callable, flags: argparse.Namespace) -> dict:
    """Bytes, seconds (median of the repeats), the loss and the gradient's norm; or the
    bytes alone, as `needs_more_than`, if that much memory is not there."""
    name, _, estimator = case.partition(" ")
    script, device = load_script(name), flags.device
    script.optimizer_step = lambda *_: (0.0, 0.0)  # whole logits have none either
    kwargs = dict(vocab_size=flags.vocab, hidden_size=flags.hidden, head_dim=128)
    kwargs |= dict(intermediate_size=3 * flags.hidden, num_hidden_layers=2)
    kwargs |= dict(num_attention_heads=flags.hidden // 64, tie_word_embeddings=True)
    config = transformers.Qwen3Config(num_key_value_heads=flags.hidden // 128, **kwargs)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config)
        teacher = transformers.Qwen3ForCausalLM(config) if estimator else None
    if teacher:
        teacher.requires_grad_(False)
        teacher = teacher.bfloat16() if device == "cuda" else teacher
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    dtype = "bfloat16" if device == "cuda" else "float32"
    rows = max(GROUP, flags.tokens // LENGTH)
    args = dict(device=device, dtype=dtype, group_size=GROUP, micro_batch_size=rows)
    args |= dict(estimator=estimator) if estimator else dict(max_grad_norm=1e9)
    args, models = script.Args(**args), (model, teacher)
    length = flags.tokens // rows
    way(script, *models, random_rollout(script, flags.vocab, GROUP, 2, device), args)
    rollout, times = random_rollout(script, flags.vocab, rows, length, device), []
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    found = {"before": memory(device, peak=False)}
    with within_memory(found) if device == "cpu" else contextlib.nullcontext():
        for _ in range(flags.repeats):
            for p in model.parameters():
                p.grad.zero_()
            start = time.perf_counter()
            loss = float(way(script, *models, rollout, args))  # waits for the GPU
            times.append(time.perf_counter() - start)
    if "needs_more_than" in found:
        return found
    found |= {"bytes": memory(device, peak=True) - found["before"]}
    found |= {"seconds": statistics.median(times), "all_seconds": times, "loss": loss}
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
    return found | {"gradient_norm": norm.item()}


def compare(flags: argparse.Namespace, report: Callable) -> None:
    """report(case, result) of each case."""
    alone = (lambda f, *x: f(*x)) if flags.device == "cuda" else in_process
    for case in flags.cases:
        pair = [alone(measure, case, way, flags) for way in (ours, naive)]
        row = {"ours": pair[0], "naive": pair[1]}
        if "needs_more_than" in pair[0]:
            raise RuntimeError(f"{case}: the script itself does not fit: less --tokens")
        if "needs_more_than" in pair[1]:
            row["memory_ratio_below"] = pair[0]["bytes"] / pair[1]["needs_more_than"]
            report(case, row)
            continue
        for name in "loss", "gradient_norm":
            a, b = (x[name] for x in pair)
            tolerance = 0.02 if flags.device == "cuda" else 1e-3  # bf16 products
            if abs(a - b) > tolerance * max(abs(b), 1e-2):
                raise RuntimeError(f"{case}: {name} is {a}, with whole logits {b}")
        row["memory_ratio"] = pair[0]["bytes"] / pair[1]["bytes"]
        row["time_ratio"] = pair[0]["seconds"] / pair[1]["seconds"]
        report(case, row)


def cells(row: dict) -> list[str]:
    """What tables show of a case: GB by the script, from whole logits, their ratio; and
    the same of seconds."""
    mine, whole = row["ours"], row["naive"]
    gb, seconds = f"{mine['bytes'] / 2**30:.2f}", f"{mine['seconds']:.1f}"
    if "needs_more_than" in whole:
        gb = gb, f"more than {whole['needs_more_than'] / 2**30:.2f}"
        return [*gb, f"below {row['memory_ratio_below']:.2f}", seconds, "no room", ""]
    gb = gb, f"{whole['bytes'] / 2**30:.2f}", f"{row['memory_ratio']:.2f}"
    return [*gb, seconds, f"{whole['seconds']:.1f}", f"{row['time_ratio']:.2f}"]


def main() -> None:
    gpu = in_process(torch.cuda.is_available)  # here CUDA must not begin: it forks
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="gpu" if gpu else "cpu")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--tokens", type=int, default=8192 if gpu else 2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--repeats", type=int, default=3 if gpu else 1)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    flags = parser.parse_args()
    Path(flags.out).mkdir(parents=True, exist_ok=True)  # before the work, not after it
    gpu = in_process(torch.cuda.get_device_name) if flags.device == "cuda" else "no GPU"
    result = {"hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}"}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"threads": torch.get_num_threads(), "tokens": flags.tokens}
    result |= {"vocab": flags.vocab, "hidden": flags.hidden, "repeats": flags.repeats}
    names = {case.partition(" ")[0] for case in flags.cases}
    scripts = [ROOT / "algos" / f"{name}.py" for name in sorted(names)]
    result["code"] = {x.stem: code_hash([x.read_text()]) for x in scripts}
    result["cases"] = {}

    def report(case: str, row: dict) -> None:
        result["cases"][case] = row
        print(f"{case:16} {'   '.join(cells(row))}", flush=True)
        file = Path(flags.out, f"memory-{flags.name}.json")
        file.write_text(json.dumps(result, indent=1) + "\n")

    compare(flags, report)


if __name__ == "__main__":
    main()
