"""What benchmarks/gpu.py measures: one function for each part.

part(sizes, report) works in a process of its own, in a folder that all parts share;
report(**values) puts what was measured into the file at once. A part fails with an
exception, also where what was measured is wrong: a gradient, nothing learnt, a GPU
slower than the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import env_speed
import estimator_cost
import memory
import torch
import transformers
from gpu_presets import PRESETS
from tokenizers import Tokenizer, decoders, models
from transformers import Qwen3ForCausalLM

SCRIPTS = "grpo", "dmpo", "prefixrl", "vopd"
WIDTHS = {"0.6B": 1024, "1.7B": 2048}  # Qwen3's hidden sizes; all else follows


@dataclasses.dataclass
class Sizes:
    """How large everything is; SMOKE is for --smoke."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    layers: int = 28
    vocab: int = 151_936
    shrink: int = 1  # hidden sizes are divided by it
    batches: tuple = (64, 256, 512)  # sequences side by side
    sequences: int = 256  # those of transformers' own generation
    new_tokens: int = 512
    prompts: int = 32  # of a step, 8 completions each
    step_tokens: int = 128  # of a completion in a step
    scored: int = 8192  # tokens in memory.py and estimator_cost.py
    environments: tuple = (20, 12, 16)  # log2 of their numbers
    cartpole: str = "--eval-every 1000000"  # flags: at the ends alone
    countdown: tuple = (50, 4, 450)  # steps: here, on the CPU, of the warm start


SMOKE = Sizes("cpu", "float32", 2, 256, 16, (4, 8), 8, 8, 2, 8, 128, (6,))
SMOKE.cartpole = "--steps 3 --num-envs 64 --eval-episodes 4 --compile off"
SMOKE.countdown = 2, 2, 2


def config(shape: str, sizes: Sizes) -> transformers.Qwen3Config:
    """Qwen3's of that shape."""
    width = WIDTHS[shape] // sizes.shrink
    kwargs = dict(hidden_size=width, intermediate_size=3 * width, head_dim=128)
    kwargs |= dict(num_hidden_layers=sizes.layers, vocab_size=sizes.vocab)
    kwargs |= dict(num_attention_heads=16, num_key_value_heads=8, bos_token_id=None)
    kwargs |= dict(tie_word_embeddings=True, max_position_embeddings=4096)
    return transformers.Qwen3Config(**kwargs, pad_token_id=0, eos_token_id=1)


def load(function: Callable, shape: str, sizes: Sizes) -> tuple:
    """function(): the script's own load_model or load_teacher, here of a model that no
    hub has: random weights, made on the device, and a token for each of its ids."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary |= {f"{i} ": i for i in range(3, sizes.vocab)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>")
    fast = transformers.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend, **special)

    def make(name, config, dtype, **_):
        auto = transformers.AutoModelForCausalLM
        with torch.device(sizes.device):
            return auto.from_config(config, dtype=dtype), {"missing_keys": []}

    makers = {"AutoConfig": lambda *_, **__: config(shape, sizes)}
    makers |= {
        "AutoModelForCausalLM": make,
        "AutoTokenizer": lambda *_, **__: tokenizer,
    }
    with contextlib.ExitStack() as stack:
        for name, maker in makers.items():
            auto = getattr(transformers, name)
            stack.enter_context(mock.patch.object(auto, "from_pretrained", maker))
        return function()


def clock(sizes: Sizes) -> float:
    """Seconds, once the device has done its work."""
    if sizes.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def flags_of(script, sizes: Sizes, **changes):
    """Args for this device, checked and completed."""
    flags = dict(device=sizes.device, dtype=sizes.dtype, model="random", group_size=8)
    flags |= dict(micro_batch_size=16) | changes
    flags |= dict(teacher="random") if hasattr(script, "load_teacher") else {}
    args = script.Args(**flags)
    script.check(args)
    return args


def contexts(n: int, sizes: Sizes, length: int = 64) -> list[list[int]]:
    """n random prompts of half to all that length."""
    noise = torch.Generator().manual_seed(n)
    spans = torch.randint(length // 2, length + 1, (n,), generator=noise).tolist()
    return [
        torch.randint(3, sizes.vocab, (m,), generator=noise).tolist() for m in spans
    ]


def speed(generate: Callable, sizes: Sizes) -> dict[str, float]:
    """Tokens a second of a function that returns how many there are."""
    start = clock(sizes)
    tokens = generate()
    seconds = clock(sizes) - start
    return dict(tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds)


def run(script: str, *flags) -> None:
    """A command line of this repository, as a process."""
    command = [sys.executable, str(memory.ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr, flush=True)
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])


# --------------------------------------- Parts ----------------------------------------


def rollout(sizes: Sizes, report: Callable) -> None:
    """Tokens a second of grpo.py's generate, by batch, of as few new tokens as
    continuous batching has in `library`, and of completions that end at other times;
    log-probs as sampled against those that the update will see."""
    grpo = memory.load_script("grpo")
    many = dict(max_new_tokens=sizes.new_tokens, rollout_batch_size=10**6)
    args = flags_of(grpo, sizes, **many)
    model, tokenizer = load(lambda: grpo.load_model("", args), "0.6B", sizes)

    def generate(batch: int, args) -> int:
        nonlocal done
        noise = grpo.uniforms(args, 1, batch, 1)
        done = grpo.generate(model, tokenizer, contexts(batch, sizes), noise, args)
        return int(done.completion_mask.sum())

    done, short = None, dataclasses.replace(args, max_new_tokens=4)
    for batch in sizes.batches:
        generate(batch, short)
        row = speed(lambda: generate(batch, args), sizes)
        row["peak_gb"] = memory.memory(sizes.device, peak=True) / 2**30
        report(**{f"batch {batch}": row})
        if batch == sizes.batches[0]:
            score = lambda x, seen: grpo.token_logprobs(
                model, x, seen, done.completion_mask.shape[1], args.temperature
            )
            parts = zip(done.tokens.split(8), done.attention_mask.split(8))
            with torch.no_grad(), grpo.autocast(args):
                scored = torch.cat([score(*part)[0] for part in parts])
            gap = ((scored - done.logprobs) * done.completion_mask).abs()
            found = dict(mean=gap.sum().item() / row["tokens"], max=gap.max().item())
            report(delta_logp=found | {"dtype": args.dtype})
    few = dataclasses.replace(args, max_new_tokens=max(8, sizes.new_tokens // 4))
    row = speed(lambda: generate(sizes.sequences, few), sizes)
    row["new_tokens"] = few.max_new_tokens
    report(**{f"batch {sizes.sequences}, short": row})
    grpo.stop_ids = lambda *_: [*range(1, 1 + sizes.vocab // 128)]  # one token of 128
    row = speed(lambda: generate(sizes.sequences, args), sizes)
    report(**{f"batch {sizes.sequences}, other lengths": row})


def library(sizes: Sizes, report: Callable, continuous: bool) -> None:
    """The same of transformers' own `generate`, with cuDNN's attention on as is torch's
    default; or of its continuous batching, which has fewer tokens to do, without what
    each call sets up."""
    grpo = memory.load_script("grpo")
    args = flags_of(grpo, sizes)
    model, _ = load(lambda: grpo.load_model("", args), "0.6B", sizes)
    model, prompts = (
        model.to(getattr(torch, sizes.dtype)),
        contexts(sizes.sequences, sizes),
    )
    how = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=1, pad_token_id=0)
    ids = grpo.pad(prompts, 0, "left").to(sizes.device)
    inputs = dict(input_ids=ids, attention_mask=(ids != 0).long())
    # not all the memory that there is: it is laid out again at each call
    small = dict(num_blocks=64, max_batch_tokens=64)
    small = small if sizes.device == "cpu" else dict(max_memory_percent=0.4)
    batching = transformers.ContinuousBatchingConfig(**small)

    def generate(n: int) -> int:
        config = transformers.GenerationConfig(**how, max_new_tokens=n)
        if continuous:
            how_many = dict(continuous_batching_config=batching)
            kwargs = dict(generation_config=config, **how_many)
            done = model.generate_batch(inputs=prompts, **kwargs).values()
            errors = [one.error for one in done if one.error]
            assert len(done) == len(prompts) and not errors, errors[:1]
            return sum(len(one.generated_tokens) for one in done)
        new = model.generate(**inputs, generation_config=config)[:, ids.shape[1] :]
        return int(grpo.completion_mask(new, 1)[0].sum())

    n, name = sizes.new_tokens, f"batch {sizes.sequences}"
    if continuous:
        n, name = max(8, n // 4), f"{name}, without set-up"
        generate(4)
    torch.backends.cuda.enable_cudnn_sdp(not continuous)
    first, row = (speed(lambda m=m: generate(m), sizes) for m in (4, n))
    assert row["tokens"] > 0, "no tokens came back"
    if continuous:  # its memory is laid out anew at each call
        more = {key: row[key] - first[key] for key in ("tokens", "seconds")}
        row["tokens_per_second"] = more["tokens"] / more["seconds"]
    report(**{name: row | {"new_tokens": n, "seconds_for_4": first["seconds"]}})


def failed(message: str) -> None:
    """In the place of a script's `fail`, which ends the process."""
    raise RuntimeError(message)


def one_step(
    sizes: Sizes, report: Callable, name: str, shape: str, prompt=64, **changes
) -> None:
    """Seconds of each phase and peak memory of a step, after one of four prompts.
    Prompts are of half to all of `prompt` tokens, for prefixrl.py of 64 more: a prefix.
    changes: flags."""
    script = memory.load_script(name)
    script.fail = failed
    flags = dict(prompts_per_step=sizes.prompts, max_new_tokens=sizes.step_tokens)
    args, other = flags_of(script, sizes, **flags | changes), None
    torch.manual_seed(0)
    model, tokenizer = load(lambda: script.load_model("", args), shape, sizes)
    if name == "vopd":
        other, _ = load(lambda: script.load_teacher([], args), shape, sizes)
        other.to(sizes.device)
    script.add_lora(model, args)
    how = dict(lr=1e-6, weight_decay=0.0, fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **how)
    few = dict(prompts_per_step=4, max_new_tokens=sizes.step_tokens)
    for now in dataclasses.replace(args, **few), args:
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        n, G = now.prompts_per_step, now.group_size
        prompts = contexts(n, sizes, prompt + 64 * (name == "prefixrl"))
        noise = script.uniforms(now, 1, n, G)
        script.generate(model, tokenizer, prompts, noise[:, :4], now)  # not in its time
        times = [clock(sizes)]
        batch = script.generate(model, tokenizer, prompts, noise, now)
        times.append(clock(sizes))
        posed = [script.Problem("", None)] * len(noise)
        reward = lambda _, text: len(text) % 7 / 7
        batch.rewards = script.score(reward, posed, batch.texts).to(sizes.device)
        times.append(clock(sizes))
        if now is args:
            peak = memory.memory(sizes.device, peak=True) / 2**30
            report(seconds_rollout=times[1] - times[0], peak_gb_of_rollout=peak)
        if name == "vopd":
            stats = script.update(model, other, optimizer, batch, now)
        else:
            A = script.group_advantages(batch.rewards, G, now.advantage_scale)
            stats = script.update(model, None, optimizer, batch, A, now)
        times.append(clock(sizes))
    names = "seconds_rollout", "seconds_score", "seconds_update"
    found = dict(zip(names, (b - a for a, b in itertools.pairwise(times))))
    found["peak_gb"] = memory.memory(sizes.device, peak=True) / 2**30
    if sizes.device == "cuda":  # what a card must have: with what torch holds back
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
    found["parameters"] = sum(p.numel() for p in model.parameters())
    report(**found, tokens=int(batch.completion_mask.sum()), stats=stats)
    assert stats["grad_norm"] > 0 and stats["relative_update"] > 0, "nothing moved"


def preset(sizes: Sizes, report: Callable, name: str) -> None:
    """A step of grpo.py with the flags for a GPU of that memory: one full rollout of
    prompts of up to 160 tokens."""
    shape, text = PRESETS[name]
    words, changes = text.split(), {"max_new_tokens": sizes.new_tokens}
    for word, value in zip(words, [*words[1:], "--"]):
        if word[:2] == "--":
            key = word[2:].replace("-", "_")
            changes[key] = True if value[:2] == "--" else int(value)
    report(model=shape, flags=text)
    # a card has a little less than it is named for, and half a GB is CUDA's own
    most = (0.97 * int(name.removesuffix("gb")) - 0.5) * 2**30
    if sizes.device == "cuda":
        share = most / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    n = changes["rollout_batch_size"] // 8

    def untimed(**values) -> None:
        report(**{key: x for key, x in values.items() if key[:8] != "seconds_"})

    one_step(sizes, untimed, "grpo", shape, 160, prompts_per_step=n, **changes)


def estimators(sizes: Sizes, report: Callable) -> None:
    """benchmarks/estimator_cost.py at the largest vocabulary."""
    about = dict(tokens=sizes.scored, hidden=1024 // sizes.shrink, repeats=3)
    flags = argparse.Namespace(**about, device=sizes.device)
    report(**about, **estimator_cost.measure(sizes.vocab, flags))


def peaks(sizes: Sizes, report: Callable) -> None:
    """benchmarks/memory.py: each script's loss + backward against whole logits."""
    about = dict(tokens=sizes.scored, vocab=sizes.vocab, device=sizes.device, repeats=5)
    about |= dict(hidden=max(128, 1024 // sizes.shrink))
    report(about=about)
    flags = argparse.Namespace(cases=memory.CASES, **about)
    memory.compare(flags, lambda case, row: report(**{case: row}))


def environments(sizes: Sizes, report: Callable) -> None:
    """benchmarks/env_speed.py: steps a second of ppo_envs.py, whose compiled code is in
    torch's cache if `compilation` was there before."""
    for power in sizes.environments:
        length = max(1, min(128, 2**17 // 2**power))  # of a rollout
        how = "on" if sizes.device == "cuda" else "off"
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        iteration, _ = env_speed.ours(2**power, length, sizes.device, how)
        rows = [iteration() for _ in range(5)][2:]  # the first compiles, then records
        keys = *env_speed.COUNTS, "peak_memory_gb"
        row = {key: statistics.median(x[key] for x in rows) for key in keys}
        del iteration  # its tensors
        report(**{str(2**power): row | {"rollout_length": length}})
        torch.compiler.reset()  # or its graphs keep their memory
        gc.collect()
        torch.cuda.empty_cache()


def compilation(sizes: Sizes, report: Callable) -> None:
    """What `environments` compiles, of which nothing is timed."""
    environments(sizes, lambda **_: None)
    report(done=True)


def gradient_of(name: str, device: str, sizes: Sizes) -> tuple[float, torch.Tensor]:
    """A loss of the script and its gradient, in float32, of the same small model."""
    script = memory.load_script(name)
    torch.manual_seed(0)
    if name == "ppo_envs":
        args = script.Args(device="cpu", compile="off")
        env = script.make_env(args, 256)
        data = env.reset(), torch.randint(2, (256,)), torch.randn(256) / 9 - 0.7
        data = *data, torch.randn(256), torch.randn(256)  # advantages and returns
        agent = script.Agent(env, args).to(device)
        theta = agent.theta.clone().requires_grad_()
        data = theta, *(x.to(device) for x in data)
        loss, _ = script.total_loss(agent, args, *data)
        loss.backward()
        loss, parameters = loss.item(), [theta]
    else:
        small = dataclasses.replace(sizes, layers=2, vocab=1000, shrink=16)
        flags = dict(device=device, dtype="float32", group_size=memory.GROUP)
        args = flags_of(script, sizes, **flags, max_grad_norm=1e9)
        pair = [Qwen3ForCausalLM(config("0.6B", small)).to(device) for _ in "st"]
        model, teacher = pair[0], pair[1].requires_grad_(False)
        batch = memory.random_rollout(script, 1000, 16, 12, device)
        batch.attention_mask[:8, :5] = 0  # the first two prompts are shorter
        for mask in batch.attention_mask, batch.completion_mask:
            mask[::2, -3:] = 0  # and every second completion
        teacher = teacher if name == "vopd" else None
        loss = memory.ours(script, model, teacher, batch, args)
        parameters = [*model.parameters()]
    return float(loss), torch.cat([p.grad.flatten().cpu() for p in parameters]).double()


def target_gap(device: str) -> float:
    """How far ppo_envs.py's next values are from V(next observation) where no episode
    ended: in what it collects, targets have other code on a GPU than on a CPU."""
    ppo = memory.load_script("ppo_envs")
    args = ppo.Args(device=device, compile="off", rollout_length=32)
    env = ppo.make_env(args, args.num_envs)
    live = {"obs": env.reset(), "episode": torch.zeros(2, args.num_envs, device=device)}
    batch = {}
    ppo.collect(ppo.Agent(env, args).to(device), env, live, batch, args)
    goes_on = ~(batch["terminated"] | batch["truncated"])[:-1]
    gaps = (batch["next_values"][:-1] - batch["values"][1:]).abs()[goes_on]
    return gaps.max().item()


def completions_of(device: str, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """64 completions of up to 300 tokens by a small model in float32, and log-probs."""
    grpo = memory.load_script("grpo")
    small = dataclasses.replace(sizes, layers=2, vocab=1000, shrink=16)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config("0.6B", small)).to(device).eval()
    noise = torch.rand(64, 300, dtype=torch.float64, generator=torch.manual_seed(1))
    prompts = grpo.pad(contexts(16, small), 0, "left").to(device)
    stops = torch.arange(10, device=device)
    batch = prompts, (prompts != 0).long(), noise.to(device)
    found, logprobs = grpo.decode(model, *batch, 0.9, stops)
    mask, _ = grpo.completion_mask(found, stops)
    return (found * mask).cpu(), (logprobs * mask).cpu()


def exact(sizes: Sizes, report: Callable) -> None:
    """Losses and gradients of all scripts in float32, this device's and the CPU's, and
    the targets of ppo_envs.py."""
    torch.set_num_threads(1)  # of the CPU: many threads are slow at what is this small
    for name in (*SCRIPTS, "ppo_envs"):
        wanted, g_cpu = gradient_of(name, "cpu", sizes)
        loss, g = gradient_of(name, sizes.device, sizes)
        gap = ((g - g_cpu).norm() / g_cpu.norm()).item()
        report(**{name: dict(loss=loss, loss_on_cpu=wanted, gradient_gap=gap)})
        near = abs(loss - wanted) < 1e-4 * max(1, abs(wanted)) and gap < 1e-4
        assert near, f"{name}: loss {loss}, on the CPU {wanted}; gradients {gap} apart"
    gap = target_gap(sizes.device)
    report(next_values={"gap": gap})
    assert gap < 1e-4, f"ppo_envs: next values {gap} apart from those of the states"


def drawn(sizes: Sizes, report: Callable) -> None:
    """Completions in float32, as rows are dropped and columns added: the CPU's."""
    torch.set_num_threads(1)
    pairs = zip(completions_of(sizes.device, sizes), completions_of("cpu", sizes))
    same, gaps = ((a - b).abs().amax(-1) for a, b in pairs)
    gap, other = gaps[same == 0].max().item(), (same > 0).float().mean().item()
    report(decode={"share_of_other_completions": other, "logprob_gap": gap})
    # a token may differ where the noise is nearly at the border of two
    assert gap < 1e-4 and other < 0.05, f"decode: {other:.0%} differ, log-probs {gap}"


def cartpole(sizes: Sizes, report: Callable) -> None:
    """ppo_envs.py as a user starts it: does it solve CartPole here?"""
    where = "--device", sizes.device, "--run-dir", "cartpole"
    run("algos/ppo_envs.py", *where, *sizes.cartpole.split())
    lines = [json.loads(line) for line in Path("cartpole/metrics.jsonl").open()]
    ends = [line["eval/episode_return"] for line in (lines[0], lines[-1])]
    about = json.loads(Path("cartpole/args.json").read_text())["args"]
    report(before=ends[0], after=ends[1])
    report(compile=about["compile"])
    assert ends[1] > 475 or sizes is SMOKE, f"not solved: a return of {ends[1]}"


def base_model(sizes: Sizes, report: Callable) -> None:
    """The warm start of `countdown`, on the CPU, which that then finds in its cache."""
    grpo, *_, steps = memory.load_script("grpo"), *sizes.countdown
    torch.set_num_threads(min(4, torch.get_num_threads()))
    args = flags_of(grpo, sizes, model="tiny")
    grpo.tiny_model(grpo.load_task(args)[0], args.seed, steps)
    report(done=True)


def countdown(sizes: Sizes, report: Callable) -> None:
    """grpo.py's default task, here and on this machine's CPU: seconds of a step (their
    median), and what is learnt here."""
    grpo, found = memory.load_script("grpo"), []
    torch.set_num_threads(min(4, torch.get_num_threads()))  # it is small: more are slow
    report(threads=torch.get_num_threads())
    *steps, start = sizes.countdown
    small = dict(prompts_per_step=4) if sizes is SMOKE else {}
    for name, device, many in zip(("here", "on the CPU"), (sizes.device, "cpu"), steps):
        folder = Path(name)
        flags = dict(model="tiny", steps=many, eval_every=10**6, micro_batch_size=512)
        flags |= dict(device=device, run_dir=str(folder), tiny_steps=start)
        flags |= dict(warmup_steps=10)
        if device == "cpu":
            flags |= dict(dtype="float32", eval_prompts=8)
        grpo.train(flags_of(grpo, sizes, **flags, **small))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        spent = [sum(v for k, v in x.items() if k[:8] == "seconds_") for x in lines[1:]]
        row = {"steps": many, "seconds_per_step": sorted(spent)[len(spent) // 2]}
        if device == sizes.device:
            row["before"], row["after"] = (
                line["eval/pass@1"] for line in (lines[0], lines[-1])
            )
        found.append(row)
        report(**{name: row})
    here, cpu = found
    # ten runs on a CPU had gained 0.052 to 0.081 by then
    learnt = here["after"] > here["before"] + 0.03 or sizes is SMOKE
    assert learnt, "it did not learn here"
    faster = here["seconds_per_step"] < cpu["seconds_per_step"] or sizes is SMOKE
    assert faster, "a step takes longer than on the CPU"


def steps(shape: str) -> dict:
    """The parts that make a step of each script with a model of that shape."""
    part = lambda name: lambda *x: one_step(*x, name, shape)
    return {f"step-{name}-{shape}": (part(name), 45) for name in SCRIPTS}


# and seconds at most; what is least sure to be done in time comes last
PARTS = {"exact": (exact, 90), "decode": (drawn, 90), "cartpole": (cartpole, 180)}
PARTS |= {"base-model": (base_model, 120), "compilation": (compilation, 150)}
CARDS = [*PRESETS][::-1]  # the largest takes longest
PARTS |= {f"flags-{x}": (functools.partial(preset, name=x), 110) for x in CARDS}
# those whose time does not matter (they pass or do not, or are about memory): GB
SHARED_GB = dict.fromkeys(PARTS, 8) | {f"flags-{x}": int(x[:-2]) for x in PRESETS}
PARTS |= {"memory": (peaks, 60), "rollout": (rollout, 90)}
PARTS |= {"estimator_cost": (estimators, 60)}
PARTS["continuous-batching"] = lambda *x: library(*x, continuous=True), 60
PARTS |= steps("0.6B") | steps("1.7B")
PARTS |= {"env_speed": (environments, 120), "countdown": (countdown, 150)}
PARTS["generate"] = lambda *x: library(*x, continuous=False), 90
