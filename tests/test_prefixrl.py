"""PrefixRL: prefixes are context, their ids are the trace's, and every token counts."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import (
    PLUGIN,
    Finished,
    Recorder,
    char_tokenizer,
    cpu_args,
    load_script,
    metrics_of,
    plain_logprobs,
    random_rollout,
    save_model,
    small_qwen3,
)
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

MEASURED = ("seconds_", "tokens_per_second", "peak_memory_gb")
SMALL = dict(task="task.py", device="cpu", run_dir="run", steps=4, prompts_per_step=4)
SMALL |= dict(group_size=4, max_new_tokens=4, warmup_steps=0, eval_prompts=2)
SMALL |= dict(eval_samples=2, learning_rate=1e-2, candidates=8, hard_k=8)
SMALL |= dict(trace_cap=320, eval_every=2)


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """algos/prefixrl.py as a module."""
    return load_script("prefixrl")


@pytest.fixture(scope="session")
def model():
    """A small random model and its tokenizer."""
    tokenizer = char_tokenizer()
    return small_qwen3(len(tokenizer)), tokenizer


@pytest.fixture
def cli(script, small_folder, tmp_path, monkeypatch, capsys):
    """The command line in this process, in an empty folder with a plug-in: a random
    model is fully right (4 letters) about once in 100 tries."""
    (tmp_path / "task.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)

    def run(*flags, **changes) -> Finished:
        flags = [str(flag) for flag in flags]
        if "--resume" not in flags:
            for name, value in (dict(model=small_folder) | SMALL | changes).items():
                flags += [f"--{name.replace('_', '-')}", str(value)]
        monkeypatch.setattr(sys, "argv", ["prefixrl.py", *flags])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        capsys.readouterr()
        try:
            script.train(script.parse_args())
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Finished(code, *capsys.readouterr())

    return run


def logged(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what is measured in seconds and bytes."""
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in metrics_of(run_dir)
    ]


def records(run_dir: Path) -> list[dict]:
    """The hard problems of a run and their traces."""
    return [json.loads(line) for line in (run_dir / "traces.jsonl").open()]


def exercise(script, trace=(), prompt=(5,), prefix=(), logprob=None, text="p"):
    """An Exercise with these ids."""
    lists = [*trace], logprob, [*prefix]
    return script.Exercise([*prompt], script.Problem(text, "a"), *lists)


def check_same_run(a: Path, b: Path) -> None:
    """Logs, samples, traces and weights of two runs are equal bit for bit."""
    assert logged(a) == logged(b)
    for name in ("samples.jsonl", "traces.jsonl", "checkpoint/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [
        torch.load(x / "checkpoint/state.pt", weights_only=True)["optimizer"]
        for x in (a, b)
    ]
    moments = [
        [value for p in state["state"].values() for value in p.values()]
        for state in states
    ]
    assert len(moments[0]) == len(moments[1])
    assert all(torch.equal(x, y) for x, y in zip(*moments))
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}


# -------------------------------------- Task ------------------------------------------


def walk(start: int, moves: str) -> list[int]:
    """Every place of a chain, one exact step after the other, written anew."""
    places = []
    for move in moves:
        start = start + {"+": 1, "-": 9, "*": 3}[move]
        start = start - 10 if start > 9 else start
        places.append(start)
    return places


HOSTILE = {
    "empty": "",
    "a million digits": "9" * 1_000_000,
    "power": "9**9**9",
    "NUL": "921\0",
    "newline": "921\n",
    "Arabic digits": "٩٢١",
    "full-width digits": "９２１",
    "superscript": "92¹",
    "emoji": "921🙂",
    "surrogate": "921\ud800",
    "spaces": "9 2 1",
    "sign": "+921",
    "underscore": "9_21",
    "the prompt again": "8+*-:921",
    "one step too many": "9210",
    "one step too few": "92",
    "last digit alone": "1",
    "lucky last digit": "001",
    "wrong order": "291",
    "all answers": "921" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_a_right_chain(script, name):
    """A reward that reads numbers out of the text pays for other scripts, signs and
    lucky ends (https://github.com/verl-project/verl/issues/5635): each of these scores
    0 within a millisecond, the answer itself 1."""
    problem = script.Problem("8+*-:", [8, "+*-"])
    assert script.chain_reward(problem, "921") == 1.0
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert script.chain_reward(problem, HOSTILE[name]) == 0.0
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_chain_with_one_wrong_step_is_right(script):
    """A lucky last digit is no right chain: of all changes of one digit, of all swaps,
    cuts and additions none scores, and the worked answers all do; agreement with a
    walk written anew on 20,000 random and mutated texts."""
    rng = random.Random(0)
    for size in (2, 5, 9):
        for problem in itertools.islice(script.chain_problems("train", 1, size), 100):
            start, moves = problem.answer
            right = "".join(map(str, walk(start, moves)))
            assert problem.prompt == f"{start}{moves}:" and len(moves) == size
            assert problem.solution == right
            assert script.chain_reward(problem, right) == 1.0
            for i, digit in itertools.product(range(size), "0123456789"):
                text = right[:i] + digit + right[i + 1 :]
                assert script.chain_reward(problem, text) == float(text == right)
                assert script.chain_reward(problem, right[:i] + digit + right[i:]) == 0
                assert script.chain_reward(problem, right[:i] + right[i + 1 :]) == 0
            for _ in range(60):
                text = "".join(rng.choices("0123456789+-*:. ", k=rng.randrange(12)))
                assert script.chain_reward(problem, text) == float(text == right)


def test_chains_are_held_out_in_one_split_only(script):
    """A held-out problem that is trained on measures memory, under another seed too."""
    first = {}
    for split, seed in (("train", 1), ("eval", 1), ("eval", 2)):
        endless = script.chain_problems(split, seed, 4)
        first[split, seed] = {p.prompt for p in itertools.islice(endless, 2_000)}
    assert not first["train", 1] & (first["eval", 1] | first["eval", 2])
    assert len(first["train", 1]) > 500 < len(first["train", 1] | first["eval", 1])


def test_base_model_starts_from_candidates_or_right_answers(
    script, monkeypatch, capsys
):
    """Problems that the model has seen solved are not hard, and a base model that has
    seen no slip is right at once: what the two built-in models start from has the
    stated share of wrong steps, each counted from the digit before it, and no
    candidate. If nothing else is left, the error blames the answers."""
    args = cpu_args(script, task="chain-3", candidates=400)
    problems = [*itertools.islice(script.chain_problems("train", 1, 3), 1_000)]
    made = []
    monkeypatch.setattr(script, "tiny_model", lambda start, *_: made.append(start))
    for name, share in script.SLIPS.items():
        script.built_in(name, problems, args)
        found = made.pop()
        assert {len(p.solution) for p in found} == {3}
        assert not {p.prompt for p in found} & {p.prompt for p in problems[:400]}
        wrong = []
        for p in found[:4_000]:
            digits = [p.answer[0], *map(int, p.solution)]
            for move, (a, b) in zip(p.answer[1], itertools.pairwise(digits)):
                wrong.append(walk(a, move) != [b])
        assert abs(sum(wrong) / len(wrong) - share) < 0.02
    args.task = "chain-of-thought.py"  # a plug-in, whatever its name
    script.built_in("tiny", problems, args)
    assert made == [problems[400:]]
    with pytest.raises(SystemExit) as stop:
        script.built_in("tiny", problems[:400], args)
    assert stop.value.code == 2 and "--candidates 400" in capsys.readouterr().err


# ------------------------------------ Prefixes ----------------------------------------


def test_prefix_outside_its_bounds(script):
    """An off-by-one in the cut gives the decisive step away, or nothing: for every
    length and range, low n <= h <= high n where a whole number lies between, all these
    h occur and equally often (chi-squared below its 1e-6 quantile), and something is
    left to be answered."""
    for n, (low, high) in itertools.product(
        range(1, 41), [(0.4, 0.8), (0.1, 0.4), (0.8, 0.95), (0.0, 1.0), (0.56, 0.56)]
    ):
        trace, rng = list(range(100, 100 + n)), random.Random(n)
        hundredths = round(low * 100), round(high * 100)
        allowed = [
            h for h in range(n) if hundredths[0] * n <= 100 * h <= hundredths[1] * n
        ]
        cuts = [script.cut_prefix(trace, low, high, rng) for _ in range(300)]
        assert all(cut == trace[: len(cut)] for cut in cuts)
        lengths = [len(cut) for cut in cuts]
        assert max(lengths) < n
        if n == 1:
            assert set(lengths) == {0}
        elif allowed and high < 1:
            assert set(lengths) <= set(allowed)
            if len(allowed) < 20:
                mean = len(lengths) / len(allowed)
                chi = sum((lengths.count(h) - mean) ** 2 / mean for h in allowed)
                assert chi < 80, (n, low, high)
        elif not allowed:
            assert set(lengths) == {min(math.ceil(hundredths[0] * n / 100), n - 1)}
    for low, high in ((0.8, 0.4), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="does not hold"):
            script.cut_prefix([1, 2, 3], low, high, random.Random(0))


def test_prefixes_change_from_run_to_run_or_with_each_other(script):
    """Cuts are drawn once, by the seed: the same again, others under another seed; the
    prefixes of one problem do not depend on which other problems have a trace."""
    traces = [[*range(10 * i, 10 * i + 30), 1] for i in range(1, 9)]
    hard = [exercise(script, trace) for trace in traces]
    args = cpu_args(script)
    first = script.cut_prefixes(hard, [1], args)
    assert [x.trace for x in first] == [x for x in traces for _ in range(3)]
    assert first == script.cut_prefixes(hard, [1], args)
    assert first != script.cut_prefixes(hard, [1], cpu_args(script, seed=2))
    cuts = [len(x.prefix) for x in first]
    cuts = [cuts[i : i + 3] for i in range(0, 24, 3)]
    assert any(len({*three}) > 1 for three in cuts) and cuts[0] not in cuts[1:3]
    alone = [x if i == 5 else exercise(script) for i, x in enumerate(hard)]
    fewer = script.cut_prefixes(alone, [1], args)
    assert fewer == [x for x in first if x.trace == traces[5]]
    assert not script.cut_prefixes(hard, [1], cpu_args(script, prefixes_per_problem=0))


def test_evaluation_counts_the_stop_token_as_part_of_the_trace(script, monkeypatch):
    """With its EOS a trace of 9 ids has 10, and 20, 40 ... 80 % of it are other cuts
    than those of training: eval/from_80% starts at 7 ids, with and without a token at
    its end that stops a completion, be it the tokenizer's or the model's."""
    seen, ids = [], [*range(10, 19)]

    def evaluate(model, tokenizer, exercises, *rest):
        seen.append([x.prefix for x in exercises])
        return {"eval/pass@1": 0.0}

    monkeypatch.setattr(script, "evaluate", evaluate)
    hard = [exercise(script, [*ids, *end]) for end in ([1], [], [40])]
    tokenizer = SimpleNamespace(eos_token_id=1)
    around = [exercise(script)], hard, None, cpu_args(script)
    config = SimpleNamespace(eos_token_id=[1, 40])
    model = SimpleNamespace(generation_config=config)
    script.evaluate_all(model, tokenizer, *around)
    assert seen[:2] == [[[]], [[]] * 3]
    assert seen[2:] == [[ids[:h]] * 3 for h in (0, 1, 3, 5, 7)]
    seen.clear()
    around[-1].eval_prompts = 2  # of each kind
    script.evaluate_all(model, tokenizer, *around)
    assert [len(prefixes) for prefixes in seen] == [1] + [2] * 6


def test_trace_ends_inside_its_prefix(script):
    """A prefix that holds the whole answer, or its stop token, leaves nothing to learn:
    with a range up to 1.0 at least one token is missing, EOS is never in a prefix, and
    a trace of one token gives no prefixed problem."""
    hard = [exercise(script, trace) for trace in ([5, 1], [5, 6, 1], [7], [1])]
    args = cpu_args(script, prefix_low=0.9, prefix_high=1.0)
    wanted = [exercise(script, [5, 6, 1], prefix=[5])] * 3
    assert script.cut_prefixes(hard, [1], args) == wanted
    hard = [exercise(script, trace) for trace in ([5, 40], [5, 6, 40])]  # another stop
    wanted = [exercise(script, [5, 6, 40], prefix=[5])] * 3
    assert script.cut_prefixes(hard, [1, 40], args) == wanted


def test_end_of_a_chat_models_turn_is_in_a_prefix(cli, script, tmp_path, monkeypatch):
    """A trace may end with any token that ends a completion, those of the model's
    generation_config as well, and no prefix may have it."""
    tokenizer, seen = char_tokenizer(), []
    model = small_qwen3(len(tokenizer), eos_token_id=[1, 40])
    save_model(tmp_path / "chat", model, tokenizer)
    empty = lambda hard, stops, args: seen.append(stops) or []
    monkeypatch.setattr(script, "cut_prefixes", empty)
    result = cli(model="chat")
    assert result.code == 2 and "prefixes are empty" in result.errors[0]
    assert seen == [[1, 40]]


def test_prefix_is_in_the_loss(script, model):
    """Prefix tokens inside the loss mask turn RL into imitation of the trace
    (https://github.com/modelscope/ms-swift/issues/10106). They are context: the
    gradient through the logits at the places that predict them is 0, and yet other
    prefixes change the completion's log-probs. What follows the prefix has a
    gradient."""
    network, tokenizer = model
    args = cpu_args(script, max_new_tokens=6)
    prompts = tokenizer(["1 2=3:", "12 4 7=10:"])["input_ids"]
    prefixes = tokenizer(["1+2", "12-4=8;"])["input_ids"]
    contexts = [p + z for p, z in zip(prompts, prefixes)]
    noise = script.uniforms(args, 1, 2, 1)  # no prompt is shared
    rollout = script.generate(network, tokenizer, contexts, noise, args)
    assert rollout.completion_mask.shape[1] <= 6
    for row in range(2):  # the prompt columns end with the prefix, ids unchanged
        start = rollout.tokens.shape[1] - rollout.completion_mask.shape[1]
        z = prefixes[row]
        assert rollout.tokens[row, start - len(z) : start].tolist() == z
    places = []

    def keep(module, inputs, output):
        output.retain_grad()
        places.append(output)

    head = network.get_output_embeddings()
    hook = network.base_model.register_forward_hook(
        lambda module, inputs, output: keep(module, inputs, output.last_hidden_state)
    )
    width = rollout.completion_mask.shape[1]
    logprobs, _ = script.token_logprobs(
        network, rollout.tokens, rollout.attention_mask, width, 1.0
    )
    hook.remove()
    advantages = torch.tensor([1.0, -1.0])
    loss, _ = script.policy_loss(
        logprobs, logprobs.detach(), advantages, rollout.completion_mask, 0.2, 0.2, 8
    )
    loss.backward()
    network.zero_grad()
    grads = places[0].grad.abs().sum(-1)  # (B, T - 1): of what the head reads
    assert head.weight.requires_grad and grads.shape == rollout.tokens[:, :-1].shape
    assert (grads[:, : start - 1] == 0).all()  # nothing predicts a prefix token
    lengths = rollout.completion_mask.sum(-1).long()
    for row, n in enumerate(lengths):
        assert (grads[row, start - 1 : start - 1 + n] > 0).all()
    changed = rollout.tokens.clone()
    changed[:, start - 2] = tokenizer.convert_tokens_to_ids("9")
    other, _ = script.token_logprobs(
        network, changed, rollout.attention_mask, width, 1.0
    )
    gap = ((other - logprobs) * rollout.completion_mask).abs().amax(-1)
    assert (gap > 1e-3).all()


def test_unmasked_prefix_is_left_out_or_a_plain_row_gets_one(script, model):
    """--no-mask-prefix: the gradient is that of whole answers, prefix and completion,
    over the number of tokens of both; a plain group's is what it was."""
    network, tokenizer = model
    args = cpu_args(script, max_new_tokens=6, mask_prefix=False)
    prompts = tokenizer(["1 2=3:", "12 4 7=10:"])["input_ids"]
    prefix = tokenizer("12-4=8;")["input_ids"]
    batch = [exercise(script, prompt=prompts[1], prefix=prefix)]
    batch.append(exercise(script, prompt=prompts[0]))
    noise = script.uniforms(args, 1, 2, 2)
    rollout = script.complete(network, tokenizer, batch, noise, args)
    whole, one, read = script.sample_batch(network, tokenizer, batch, noise, args)
    assert whole.texts == rollout.texts and one == 1
    assert whole.truncated.equal(rollout.truncated)
    given = sum(len(x.prompt + x.prefix) for x in batch)
    assert read == given + rollout.completion_mask.sum()
    lengths = rollout.completion_mask.sum(-1) + torch.tensor([7.0, 7.0, 0.0, 0.0])
    assert whole.completion_mask.sum(-1).tolist() == lengths.tolist()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    recorder = Recorder(network)
    script.update(network, None, recorder, whole, advantages, args)
    loss = 0.0
    for row, mask in enumerate(rollout.completion_mask):
        ids = rollout.tokens[row, -len(mask) :][mask.bool()].tolist()
        given, prefix = batch[row // 2].prompt, batch[row // 2].prefix
        answer = torch.tensor(given + prefix + ids)
        log_softmax = network(answer[None]).logits[0].log_softmax(-1)
        for t in range(len(given), len(answer)):
            loss = loss - advantages[row] * log_softmax[t - 1, answer[t]]
    parameters = [*network.parameters()]
    grads = torch.autograd.grad(loss / lengths.sum(), parameters)
    wanted = torch.cat([g.flatten() for g in grads])
    assert (recorder.seen[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    # a group shares its prefix and its advantages sum to 0: only Z is another
    masked, share = Recorder(network), rollout.completion_mask.sum() / lengths.sum()
    script.update(network, None, masked, rollout, advantages, args)
    gap = recorder.seen[0] - share * masked.seen[0]
    assert gap.abs().max() < 1e-5 * wanted.abs().max()


def test_context_at_generation_differs_from_that_at_training(script, model):
    """Sampled behind the prefix and scored without it (or the other way round), the
    ratio is noise (https://github.com/zhangxy-2019/critique-GRPO/issues/6): sample-time
    log-probs equal those of a plain forward pass over prompt + prefix + completion, at
    temperature 0.7, prefixed and plain problems side by side."""
    network, tokenizer = model
    args = cpu_args(script, max_new_tokens=6, temperature=0.7)
    prompts = tokenizer(["1 2=3:", "12 4 7=10:", "5 5=10:"])["input_ids"]
    prefixes = [*tokenizer(["1+2", "12-4=8;"])["input_ids"], []]
    contexts = [p + z for p, z in zip(prompts, prefixes)]
    batch = [exercise(script, prompt=p, prefix=z) for p, z in zip(prompts, prefixes)]
    noise = script.uniforms(args, 1, 3, 2)
    rollout = script.complete(network, tokenizer, batch, noise, args)
    double = small_qwen3(len(tokenizer)).double()
    for row, exact in enumerate(plain_logprobs(double, rollout, 0.7)):
        n = int(rollout.completion_mask[row].sum())
        torch.testing.assert_close(
            rollout.logprobs[row, :n].double(), exact, atol=1e-4, rtol=0
        )
        seen = int(rollout.attention_mask[row].sum())
        assert seen - n == len(contexts[row // 2])


def test_reward_sees_the_completion_without_its_prefix(script, monkeypatch):
    """Half an answer is never right, and text decoded in two halves is no answer where
    a character spans two tokens: what is scored is one decoding of prefix +
    completion."""

    class Bytes:
        """A tokenizer of bytes; 0 is padding."""

        def batch_decode(self, rows, skip_special_tokens):
            return [bytes(x for x in ids if x).decode(errors="replace") for ids in rows]

    whole = "né"
    ids = list(whole.encode())
    rollout = random_rollout(script, 10, [2, 2], [1, 1])
    rollout.tokens = torch.tensor([[7, 7, ids[-1]], [7, 7, 65]])
    rollout.texts = ["?", "A"]
    monkeypatch.setattr(script, "generate", lambda *_: rollout)
    batch = [exercise(script, prefix=ids[:-1]), exercise(script)]
    found = script.complete(None, Bytes(), batch, None, cpu_args(script))
    assert found.texts == [whole, "A"]


def test_prefixed_groups_are_logged_as_plain(script):
    """Mean reward and share of live groups, of each kind by itself."""
    batch = [exercise(script, prefix=z) for z in ([5], [], [5], [])]
    rewards = torch.tensor([1, 0, 0, 0.5, 1, 1, 0.5, 0])
    expected = dict(reward_prefixed=0.75, live_share_prefixed=0.5, groups_prefixed=2)
    expected |= dict(reward_plain=0.25, live_share_plain=1, groups_plain=2)
    assert script.by_kind(rewards, batch, cpu_args(script)) == expected


def test_update_without_prefixes_is_not_grpos(script, grpo):
    """A parent that differs in a detail makes every comparison with it worthless: on
    one rollout and with the same flags, gradient and statistics are grpo.py's bit for
    bit, for std, clips, KL and two updates as well."""
    for changes in (
        dict(advantage_scale="none"),
        dict(advantage_scale="std", updates_per_batch=2, kl_coef=0.1, clip_low=0.1),
        dict(advantage_scale="none", normalization="sequence", mask_truncated=True),
    ):
        seen = []
        for module in (grpo, script):
            network, reference = small_qwen3(30), small_qwen3(30, seed=1)
            optimizer = Recorder(network, lr=0.1)
            rollout = random_rollout(
                module, 30, [3, 5, 4, 2], [4, 2, 6, 5], [False, True, False, False]
            )
            rewards = torch.tensor([1.0, 0.0, 0.25, 1.0])
            args = cpu_args(module, max_new_tokens=6, **changes)
            A = module.group_advantages(rewards, 2, args.advantage_scale)
            other = reference if args.kl_coef else None
            stats = module.update(network, other, optimizer, rollout, A, args)
            seen.append((stats, torch.stack(optimizer.seen)))
        assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])
        assert seen[0][1].norm() > 0


# ----------------------------------- The batch ----------------------------------------


def test_mix_of_prefixed_and_plain_drifts(script):
    """Every batch has round(share x n) plain problems; over an epoch of its pool each
    entry comes exactly once; without prefixes all are plain, and with a share of 0 none
    is."""
    prefixed = [(i, [5, j]) for i in range(4) for j in range(3)]
    plain = [(i, []) for i in range(7)]
    for share, few in ((0.25, 2), (0.0, 0), (1.0, 8), (0.3, 2), (0.5, 4)):
        args = cpu_args(script, prompts_per_step=8, plain_share=share)
        steps = [script.draw_batch(prefixed, plain, s, args) for s in range(1, 85)]
        for batch in steps:
            assert sum(not z for _, z in batch) == few and len(batch) == 8
        for pool, count in ((prefixed, 8 - few), (plain, few)):
            members = [e for b in steps for e in b if bool(e[1]) == bool(pool[0][1])]
            for start in range(0, len(members) - len(pool) + 1, len(pool)):
                if count:
                    assert sorted(members[start : start + len(pool)]) == sorted(pool)
        if few:
            epochs = [e for b in steps for e in b if not e[1]]
            assert epochs[:7] != epochs[7:14] or epochs[:7] != epochs[14:21]
    args = cpu_args(script, prompts_per_step=8)
    batch = script.draw_batch([], plain, 3, args)
    assert len(batch) == 8 and not any(z for _, z in batch)
    other = script.draw_batch(
        [], plain, 3, cpu_args(script, seed=2, prompts_per_step=8)
    )
    assert batch != other


# ------------------------------------- FLOPs ------------------------------------------


def test_flops_differ_from_a_hand_count(script, model):
    """2 N D for sampling and 6 N D for the update, prompts included. Two groups of two:
    contexts of 3 and 5 tokens, each read once; completions of 4, 2, 6 and 5 tokens; the
    second group is dead, so that the update reads 3 + 4 + 2 tokens, twice: the prompt
    once per group."""
    network, _ = model
    n = sum(p.numel() for p in network.parameters())
    rollout = random_rollout(script, 30, [3, 3, 5, 5], [4, 2, 6, 5])
    read = script.read_tokens(rollout, 2)
    assert read == 3 + 5 + 4 + 2 + 6 + 5
    A = torch.tensor([0.5, -0.5, 0.0, 0.0])
    args = cpu_args(script, updates_per_batch=2)
    trained = script.trained_tokens(rollout, A, args)
    assert trained == 2 * (3 + 4 + 2)
    assert script.flops(network, read, trained) == 2 * n * 25 + 6 * n * 18
    assert script.trained_tokens(rollout, A, cpu_args(script, kl_coef=0.1)) == 25
    args = cpu_args(script, gradient_checkpointing=True)
    assert script.trained_tokens(rollout, A, args) == 3 + 4 + 3 + 2
    rollout.truncated[0] = True
    args = cpu_args(script, mask_truncated=True)
    assert script.trained_tokens(rollout, A, args) == 3 + 2
    assert isinstance(script.flops(network, read, trained), int)
    frozen = network.get_input_embeddings().weight.requires_grad_(False)
    wanted = 2 * n * 25 + 6 * n * 18 - 2 * frozen.numel() * 18
    assert script.flops(network, read, trained) == wanted
    frozen.requires_grad_(True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_an_update_are_not_what_it_reads(script, checkpointing):
    """A prompt that a group shares goes through the network once; charged once per row
    it makes long prompts look up to G times as dear as they are. The count is compared
    with the tokens that enter the network in `update`, the last of each row apart: its
    successor is not predicted."""
    network, seen = small_qwen3(30), []

    def count(module, inputs, kwargs):
        x = inputs[0]
        if torch.is_grad_enabled():
            seen.append(int(kwargs["attention_mask"][:, -x.shape[1] :].sum()))

    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    network.base_model.register_forward_pre_hook(count, with_kwargs=True)
    rollout = random_rollout(script, 30, [7] * 4 + [5] * 4, [4, 2, 6, 5, 3, 6, 1, 2])
    start = rollout.tokens.shape[1] - rollout.completion_mask.shape[1]
    for g in 0, 4:  # a group shares its prompt
        rollout.tokens[g : g + 4, :start] = rollout.tokens[g, :start].clone()
    changes = dict(group_size=4, gradient_checkpointing=checkpointing)
    args = cpu_args(script, max_new_tokens=6, updates_per_batch=2, **changes)
    A = torch.tensor([0.5, -0.5, 0.5, -0.5] * 2)
    script.update(network, None, Recorder(network), rollout, A, args)
    longest = 2 * 2  # rows of 6 tokens, whose last column is cut off, in two updates
    assert sum(seen) == script.trained_tokens(rollout, A, args) - longest
    rows = 4 * 7 + 4 * 5 if checkpointing else 7 + 5
    assert script.trained_tokens(rollout, A, args) == 2 * (rows + 29)


def test_flops_of_a_run_leave_a_phase_out(
    cli, script, tmp_path, small_folder, monkeypatch
):
    """Search, traces, imitation and every step are counted, evaluation is not: all
    logged sums are rebuilt here from what the run recorded. Groups of equal rewards
    cost a step no backward pass."""
    update, costs, groups = script.update, [], []
    generate, attempts, searched = script.generate, script.attempts, []

    @functools.wraps(generate)  # its source is a part of the cache's name
    def note(model, tokenizer, prompts, *rest):
        rollout = generate(model, tokenizer, prompts, *rest)
        tokens = sum(map(len, prompts)) + int(rollout.completion_mask.sum())
        searched.append(tokens)
        return rollout

    @functools.wraps(attempts)
    def search(*args):
        with monkeypatch.context() as patch:
            patch.setattr(script, "generate", note)
            return attempts(*args)

    monkeypatch.setattr(script, "attempts", search)

    def count(model, reference, optimizer, rollout, advantages, args, *guard):
        cost, n = 0, args.group_size
        lengths = rollout.completion_mask.sum(-1).int().tolist()
        prompt = rollout.attention_mask.sum(-1).int().tolist()[::n]
        for i in range(0, len(lengths), n):
            own, live = lengths[i : i + n], (advantages[i : i + n] != 0).tolist()
            shared = prompt[i // n] - own[0]
            cost += 2 * (shared + sum(own)) + 6 * (shared * any(live))
            cost += 6 * sum(x for x, y in zip(own, live) if y)
            groups.append(any(live))
        costs.append(cost)
        return update(model, reference, optimizer, rollout, advantages, args)

    monkeypatch.setattr(script, "update", count)
    assert cli(steps=3, sft_epochs=2, eval_every=100, group_size=2).code == 0
    lines, found = metrics_of(tmp_path / "run"), records(tmp_path / "run")
    weights = load_file(f"{small_folder}/model.safetensors")
    n = sum(w.numel() for w in weights.values())
    first = lines[0]
    traces = [r for r in found if r["ids"]]
    assert traces and first["without_trace"] == len(found) - len(traces)
    tokenizer = char_tokenizer()
    prompt = {r["problem"]: len(tokenizer(r["prompt"])["input_ids"]) for r in found}
    assert first["flops_hard_search"] == 2 * n * searched[0]  # all 8 at once
    assert first["flops_traces"] == 2 * n * sum(searched[1:]) > 0
    pool = [prompt[r["problem"]] + len(r["ids"]) for r in traces]
    drawn = math.ceil(2 * len(pool) / 4) * 4
    whole, rest = divmod(drawn, len(pool))
    least = whole * sum(pool) + sum(sorted(pool)[:rest])
    most = whole * sum(pool) + sum(sorted(pool)[len(pool) - rest :])
    assert 6 * n * least <= first["flops_sft"] <= 6 * n * most
    phases = ("flops_hard_search", "flops_traces", "flops_sft")
    assert first["flops"] == sum(first[name] for name in phases)
    spent = [b["flops"] - a["flops"] for a, b in itertools.pairwise(lines)]
    costs = costs[-3:]  # the others are of imitation
    assert spent == [n * cost for cost in costs] and {*groups[-12:]} == {True, False}


def test_flops_leave_the_reference_out(cli, script, monkeypatch):
    """With a KL term the initial model reads once what each of the updates reads."""
    read, cost, sampled, spent = script.read_tokens, script.flops, [], []
    note = lambda *x: sampled.append(read(*x)) or sampled[-1]
    monkeypatch.setattr(script, "read_tokens", note)
    monkeypatch.setattr(script, "flops", lambda m, *x: spent.append(x) or cost(m, *x))
    assert cli(steps=1, kl_coef=0.1, updates_per_batch=2).code == 0
    total, trained = spent[-1]
    assert total == sampled[-1] + trained // 2 > sampled[-1]


def test_runs_end_at_unequal_cost(cli, tmp_path):
    """--max-flops ends a run at the first step that reaches it, with an evaluation and
    a checkpoint, and says so where nothing is left for RL. If that evaluation failed,
    it is made behind one more step."""
    assert cli(run_dir="long", steps=6, eval_every=100).code == 0
    lines = metrics_of(tmp_path / "long")
    budget = (lines[3]["flops"] + lines[4]["flops"]) / 2
    assert cli(run_dir="cut", steps=6, eval_every=100, max_flops=budget).code == 0
    cut = metrics_of(tmp_path / "cut")
    assert [line["step"] for line in cut] == [0, 1, 2, 3, 4]
    assert "eval/hard_pass@1" in cut[-1] and cut[-1]["flops"] == lines[4]["flops"]
    state = torch.load(tmp_path / "cut/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 4
    result = cli("--resume", "cut", "--steps", "9")
    assert result.code == 2 and "--max-flops" in result.errors[0]
    failed = {key: x for key, x in cut[-1].items() if not key.startswith("eval/")}
    lines = "".join(f"{json.dumps(line)}\n" for line in [*cut[:-1], failed])
    (tmp_path / "cut/metrics.jsonl").write_text(lines)
    assert cli("--resume", "cut", "--steps", "9").code == 0
    last = metrics_of(tmp_path / "cut")[-1]
    assert last["step"] == 5 and "eval/hard_pass@1" in last


def test_rank_without_a_hard_problem_divides_by_0(script, cli, monkeypatch, capsys):
    """A run with few hard problems, resumed on more ranks, fails at its next
    evaluation."""
    assert cli(steps=1).code == 0
    found = [json.loads(line) for line in Path("run/traces.jsonl").open()]
    monkeypatch.setattr(script, "WORLD_SIZE", len(found) + 1)
    args = script.Args(**json.loads(Path("run/args.json").read_text())["args"])
    args.resume = args.run_dir
    with pytest.raises(SystemExit) as stop:
        script.prepare((None, None, None), [], [], [], None, 1, args)
    assert stop.value.code == 2
    assert f"{len(found)} hard problems: too few" in capsys.readouterr().err


# ------------------------------------- Traces -----------------------------------------


def check_logprobs(traces: list[dict], model) -> None:
    """Their log-probs are this model's, in float64 from a plain forward pass."""
    double, tokenizer = model.double(), char_tokenizer()
    assert traces
    for r in traces:
        prompt = tokenizer(r["prompt"])["input_ids"]
        logits = double(torch.tensor([prompt + r["ids"]])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(r["ids"]) - 1)
        exact = sum(logits[t, x].item() for t, x in zip(places, r["ids"]))
        assert abs(exact - r["logprob"]) < 1e-3


def test_hard_problem_is_not_hard_or_trace_is_wrong(cli, script, tmp_path):
    """Hard means: no sample of --hard-k right. Traces: the ids that were sampled,
    right, within the cap; their log-prob is the base model's, in float64 from a plain
    forward pass. Problems without a trace stay in and are counted."""
    assert cli(steps=1, trace_cap=60, hard_k=24, eval_every=1).code == 0
    found, first = records(tmp_path / "run"), metrics_of(tmp_path / "run")[0]
    none = [r for r in found if r["ids"] is None]
    traces = [r for r in found if r["ids"]]
    assert none and traces and first["without_trace"] == len(none)
    assert first["hard_problems"] == len(found)
    assert first["prefixed_problems"] <= 3 * len(traces)
    (folder,) = (tmp_path / "runs/cache").iterdir()
    chunks = sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[0]))
    tried = [json.loads(path.read_text()) for path in chunks]
    hits = [row[0] for row in tried[0]]  # of the 8 candidates, in --hard-k samples
    assert chunks[0].name == "0-24.json" and 0 < hits.count(0) < 8
    assert [r["problem"] for r in found] == [i for i, n in enumerate(hits) if n == 0]
    spent = [int(path.stem.split("-")[1]) for path in chunks[1:]]
    assert spent == [8, 8, 16, 28]  # 60 in all, and only for those without a trace
    left = hits.count(0)
    for rows in tried[1:]:
        assert len(rows) == left
        left -= sum(row[1] is not None for row in rows)
    assert left == len(none)
    tokenizer = char_tokenizer()
    for r in traces:
        assert sum(x in "abcdefghijklmnopqrstuvwxyz" for x in r["text"]) >= 4
        assert tokenizer.decode(r["ids"], skip_special_tokens=True) == r["text"]
    check_logprobs(traces, small_qwen3(len(tokenizer)))


def test_trace_model_is_not_the_sampler_or_is_free(cli, script, tmp_path):
    """Traces of another policy have that policy's log-probs and cost its parameters,
    while the base model still decides what is hard; a run without it does not take its
    traces from the cache. Ids of another vocabulary mean something else, and positions
    that the other model does not have are made up."""
    tokenizer = char_tokenizer()
    changes = dict(hidden_size=16, intermediate_size=32)
    other = small_qwen3(len(tokenizer), seed=5, **changes)
    folder = save_model(tmp_path / "other", other, tokenizer)
    assert cli(steps=1, trace_model=folder, run_dir="run").code == 0
    assert cli(steps=1, run_dir="own").code == 0
    first, found = metrics_of(tmp_path / "run")[0], records(tmp_path / "run")
    own = records(tmp_path / "own")
    assert [r["problem"] for r in found] == [r["problem"] for r in own]
    check_logprobs([r for r in found if r["ids"]], other)
    check_logprobs([r for r in own if r["ids"]], small_qwen3(len(tokenizer)))
    n = sum(p.numel() for p in other.parameters())
    assert first["flops_traces"] % (2 * n) == 0 and first["flops_traces"]
    alien = char_tokenizer(eos_token="<eos>", pad_token="<pad>")  # 0 and 1 swapped
    folder = save_model(tmp_path / "alien", other.float(), alien)
    result = cli(trace_model=folder, run_dir="alien-run")
    assert result.code == 2 and "vocabulary" in result.errors[0]
    assert not (tmp_path / "alien-run").exists()
    short = small_qwen3(len(tokenizer), max_position_embeddings=9)
    brief = save_model(tmp_path / "short", short, tokenizer)
    result = cli(trace_model=brief, run_dir="alien-run")
    assert result.code == 2 and "a context of 9 tokens" in result.errors[0]
    result = cli(trace_model=folder, traces="given.jsonl", run_dir="alien-run")
    assert result.code == 2 and "not both" in result.errors[0]


BAD = {
    "broken": ("{", "Expecting"),
    "no object": ("3", ""),
    "no prompt": ('{"ids": [5]}', "prompt"),
    "no trace": ('{"prompt": "train 0:"}', "text"),
    "wrong answer": ('{"prompt": "train 0:", "text": "ab12"}', "wrong"),
    "not in the data": ('{"prompt": "1+1=", "text": "abcd"}', "not among"),
    "ids out of range": ('{"prompt": "train 0:", "ids": [5, 99999]}', "no ids"),
    "second trace": ('{"prompt": "train 1:", "text": "abcd"}', "a trace already"),
    "ids are text": ('{"prompt": "train 0:", "ids": "abcd"}', "no ids"),
    # of a padded batch: prefixes would hold the whole answer, at 80 % of the length
    "padding": ('{"prompt": "train 0:", "ids": [69, 70, 71, 72, 1, 0, 0]}', "padding"),
    "cut off": ('{"prompt": "train 0:", "ids": [69, 70, 71, 72, 0, 0]}', "padding"),
    "two stops": ('{"prompt": "train 0:", "ids": [69, 70, 71, 72, 1, 1]}', "a stop"),
    # 8 + 116 tokens + EOS, and 4 of a completion, in a context of 128
    "too long": (json.dumps({"prompt": "train 0:", "text": "a" * 116}), "fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_trace_is_used_or_stops_the_run(cli, tmp_path, name):
    """A trace that does not solve its problem teaches a mistake; one of another problem
    is none. Each is reported by its line and skipped, or refused before anything is
    written with --strict-traces; the good ones are used, ids exactly as given. A line
    of traces.jsonl without a trace is no bad one."""
    line, word = BAD[name]
    ids = char_tokenizer()(["abcdx"])["input_ids"][0] + [1]
    good = {"prompt": "train 1:", "ids": ids, "text": "not looked at"}
    none = {"prompt": "train 2:", "ids": None, "text": None}
    lines = [json.dumps(good), json.dumps(none), line]
    (tmp_path / "given.jsonl").write_text("\n".join(lines) + "\n")
    result = cli("--strict-traces", traces="given.jsonl")
    assert result.code == 2 and len(result.errors) == 1, result
    assert "given.jsonl, line 3" in result.errors[0] and word in result.errors[0]
    assert not (tmp_path / "run").exists()
    result = cli(traces="given.jsonl", steps=1)
    assert result.code == 0, result
    assert re.findall("jsonl, line .", result.stderr) == ["jsonl, line 3"]
    used = [r for r in records(tmp_path / "run") if r["ids"]]
    assert [(r["ids"], r["text"]) for r in used] == [(ids, "abcdx")]  # without EOS
    assert metrics_of(tmp_path / "run")[0]["flops_traces"] == 0


@pytest.mark.parametrize("value", ['float("nan")', "1 / 0"])
def test_reward_that_fails_on_a_trace_makes_it_a_wrong_one(cli, tmp_path, value):
    """A reward's bug is no bad line of --traces: swallowed, all traces are skipped one
    by one, and nan is not below 1. It ends the run before anything is written."""
    broken = f'if completion == "abcd":\n        return {value}\n    return sum'
    (tmp_path / "task.py").write_text(PLUGIN.replace("return sum", broken))
    (tmp_path / "given.jsonl").write_text('{"prompt": "train 1:", "text": "abcd"}\n')
    result = cli(traces="given.jsonl")
    assert result.code == 2 and "prompt 'train 1:'" in result.errors[0], result
    assert "skipped" not in result.stderr and not (tmp_path / "run").exists()


def test_trace_is_cut_at_a_separator_inside_it(script, tmp_path):
    """JSON may hold U+2028 or U+0085 as they are: they end no line. A tokenizer's BOS
    begins texts, no trace."""
    line = {"prompt": "p\u2028", "text": "a\u0085b"}
    (tmp_path / "given.jsonl").write_text(json.dumps(line, ensure_ascii=False), "utf-8")
    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    tokenizer = char_tokenizer(**special)
    whole = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.backend_tokenizer.post_processor = whole
    model = small_qwen3(len(tokenizer))
    given = tokenizer, [exercise(script, text="p\u2028")]
    file = str(tmp_path / "given.jsonl")
    args = cpu_args(script, strict_traces=True, traces=file)
    traces = script.read_traces(model, *given, lambda *_: 1.0, args)
    bos, *ids = tokenizer("a\u0085b")["input_ids"]
    assert bos == 2 and traces == {0: ([*ids, 1], None)}


LOGPROBS = "NaN", "-Infinity", "0.5", "null", '"-3"', "-3", "-1" + 400 * "0"


@pytest.mark.parametrize("logprob", LOGPROBS, ids=lambda x: x[:9])
def test_importance_weight_is_no_number(cli, tmp_path, logprob):
    """JSON as Python reads it has NaN: one such log-prob and all weights are NaN. A
    whole number is fine."""
    ids = char_tokenizer()(["abcdx"])["input_ids"][0]
    line = json.dumps({"prompt": "train 1:", "ids": ids})[:-1]
    (tmp_path / "given.jsonl").write_text(f'{line}, "logprob": {logprob}}}\n')
    flags = "--off-policy", "--strict-traces", "--prefixes-per-problem", 0
    result = cli(*flags, traces="given.jsonl", steps=1)
    if logprob == "-3":
        assert result.code == 0, result
        return
    assert result.code == 2 and "line 1" in result.errors[0], result
    word = "too large" if len(logprob) > 400 else "logprob"
    assert word in result.errors[0] and not (tmp_path / "run").exists()


def test_trace_is_overlooked(script, tmp_path, capsys):
    """Other programs write a BOM, blank lines, null for ids that are not known, and the
    keys of a message in another order. An id that has no row in the model, as of a pad
    token that was added to the tokenizer alone, would end in an IndexError."""
    tokenizer = char_tokenizer()
    chat = [{"role": "user", "content": "q"}]
    candidates = [exercise(script, text=text) for text in ("p", chat, "r")]
    turned = [{"content": "q", "role": "user"}]
    lines = [{"prompt": "p", "ids": None, "text": "ab"}]
    lines.append({"prompt": turned, "text": "c"})
    lines.append({"prompt": "r", "ids": [tokenizer("~")["input_ids"][0]]})
    text = "\n\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "given.jsonl").write_text(text, "utf-8-sig")
    args = cpu_args(script, traces=str(tmp_path / "given.jsonl"))
    cut = small_qwen3(len(tokenizer) - 1)  # no row for "~"
    for model, places in (small_qwen3(len(tokenizer)), "012"), (cut, "01"):
        given = tokenizer, candidates, lambda *_: 1.0, args
        traces = script.read_traces(model, *given)
        assert [*traces] == [int(i) for i in places]
        assert capsys.readouterr().err.count("skipped") == 3 - len(places)
        assert traces[0][0] == [*tokenizer("ab")["input_ids"], 1]


def test_plain_rl_needs_room_for_traces(cli, tmp_path):
    """Behind 80 % of a trace there must be room for a completion; without traces the
    prompt (8 tokens) and a completion (62) need fit, in a context of 128."""
    (tmp_path / "task.py").write_text(PLUGIN.replace("/ 4", "/ 400"))  # all are hard
    wide = dict(max_new_tokens=62, steps=1)
    assert cli(prefixes_per_problem=0, **wide).code == 0
    result = cli(run_dir="behind", **wide)
    assert result.code == 2 and "there is room for 4" in result.errors[0], result


def test_trace_ids_are_made_anew_from_text(script, tmp_path):
    """encode(decode(ids)) may be other ids (https://github.com/huggingface/trl/issues/
    5224): given ids reach trace, prefix and context untouched, though the tokenizer
    would write the same text with fewer."""

    class Pairs:
        """Knows "ab" as one token (9), and as two (3, 4)."""

        eos_token_id, pad_token_id = 1, 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [9] * (len(text) // 2)}

        def decode(self, ids, skip_special_tokens):
            return "".join({3: "a", 4: "b", 9: "ab"}.get(x, "") for x in ids)

        def __len__(self):
            return 10

    file = tmp_path / "given.jsonl"
    lines = [{"prompt": "p", "ids": [3, 4, 9, 3, 4]}, {"prompt": "q", "text": "abab"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    candidates = [exercise(script, text=text) for text in "pq"]
    reward = lambda problem, text: float(text in ("ababab", "abab"))
    args, given = cpu_args(script, traces=str(file)), (candidates, reward)
    traces = script.read_traces(small_qwen3(10), Pairs(), *given, args)
    assert traces == {0: ([3, 4, 9, 3, 4], None), 1: ([9, 9, 1], None)}
    cuts = script.cut_prefixes([exercise(script, traces[0][0])], [1], args)
    assert {tuple(x.prefix) for x in cuts} <= {(3, 4), (3, 4, 9), (3, 4, 9, 3)}


def test_prefix_outside_the_assistants_turn(cli, tmp_path):
    """With a chat template the prefix continues the assistant's turn: a template that
    closes the turn behind it, or opens a second one, asks for something else."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = save_model(tmp_path / "chat", small_qwen3(len(tokenizer)), tokenizer)
    plugin = PLUGIN.replace(
        'f"{split} {i}:"', '[{"role": "user", "content": f"{split} {i}"}]'
    )
    (tmp_path / "chat.py").write_text(plugin)
    changes = dict(task="chat.py", model=folder, plain_share=0, trace_cap=1500)
    assert cli(**changes, steps=2, candidates=5).code == 0
    samples = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").open()]
    texts = [r["text"] for r in records(tmp_path / "run") if r["ids"]]
    opened = "[end][assistant]"
    for sample in samples[1:]:
        prompt, prefix = sample["prompt"], sample["prefix"]
        assert prompt.count("[assistant]") == 1 and prompt.endswith(opened)
        assert prefix and any(text.startswith(prefix) for text in texts)
        assert all(text.startswith(prefix) for text in sample["completions"])


# ------------------------------------ Baselines ---------------------------------------


def test_imitation_is_not_maximum_likelihood(script, monkeypatch):
    """SFT's gradient is that of the mean log-prob of the traces' tokens, EOS included
    and prompts not: the first step's against float64 autograd. The KL term and the
    updates per batch are RL's; the learning rate is the run's, without decay."""
    network, double = small_qwen3(30), small_qwen3(30).double()
    prompts = [[0, 6, 7], [8, 9]]  # 0 is a token like any other: "!" in GPT-2
    traces = {0: [10, 0, 1], 1: [12, 13, 14, 15, 1]}
    hard = [exercise(script, ids, prompts[i]) for i, ids in traces.items()]
    hard.append(exercise(script, prompt=[4]))  # no trace
    args = cpu_args(script, prompts_per_step=2, sft_epochs=1, learning_rate=3e-4)
    args = dataclasses.replace(args, kl_coef=0.1, updates_per_batch=2)
    optimizer, adamw = Recorder(network), mock.Mock()
    adamw.return_value = optimizer
    monkeypatch.setattr(script.torch.optim, "AdamW", adamw)
    cost = script.imitate(network, hard, args)
    how = adamw.call_args.kwargs
    assert (how["lr"], how["weight_decay"]) == (3e-4, 0.0)
    total = 0.0
    for i, ids in traces.items():
        row = torch.tensor([prompts[i] + ids])
        logits = double(row).logits[0].log_softmax(-1)
        start = len(prompts[i])
        total += sum(logits[t - 1, row[0, t]] for t in range(start, row.shape[1]))
    (-total / 8).backward()
    exact = torch.cat([p.grad.flatten() for p in double.parameters()])
    assert len(optimizer.seen) == 1
    assert (optimizer.seen[0] - exact).norm() < 1e-4 * exact.norm()
    assert cost == 6 * sum(p.numel() for p in network.parameters()) * (6 + 7)


def test_imitation_repeats_one_batch(script, monkeypatch):
    """Two epochs of five traces in batches of two are five steps, in which each trace
    comes twice."""
    seen, network = [], small_qwen3(30)

    def note(model, reference, optimizer, rollout, *rest):
        rows = zip(rollout.tokens, rollout.completion_mask.bool())
        seen.append([row[-len(mask) :][mask].tolist() for row, mask in rows])

    monkeypatch.setattr(script, "update", note)
    traces = [[10 + i, 11, 1] for i in range(5)]
    hard = [exercise(script, trace) for trace in traces]
    args = dict(prompts_per_step=2, sft_epochs=2, learning_rate=1e-3)
    script.imitate(network, hard, cpu_args(script, **args))
    assert [len(batch) for batch in seen] == [2] * 5
    assert sorted(itertools.chain(*seen)) == sorted(2 * traces)


def test_few_traces_are_imitated_more_often_than_many(script, monkeypatch):
    """Two epochs of three traces, where a batch has room for eight, are each of them
    twice: not one batch filled up with copies."""
    seen, network = [], small_qwen3(30)
    note = lambda *given: seen.append(len(given[3].tokens))
    monkeypatch.setattr(script, "update", note)
    hard = [exercise(script, [10 + i, 11, 1]) for i in range(3)]
    args = dict(prompts_per_step=8, sft_epochs=2, learning_rate=1e-3)
    script.imitate(network, hard, cpu_args(script, **args))
    assert seen == [3, 3]


def test_importance_weight_of_a_trace(script, model, monkeypatch):
    """--off-policy: the gradient of a group with a trace z in it is
    sum_i w_i A_i grad log pi(y_i), w = pi(z) / mu(z) for z as a whole and 1 for what
    was sampled; z takes the place of the last completion. Against float64, with a trace
    longer and one shorter than what was sampled, and one group without."""
    network, tokenizer = model
    args = cpu_args(script, group_size=3, max_new_tokens=4, prompts_per_step=3)
    args.temperature = 0.7  # z was sampled at it, too
    double = small_qwen3(len(tokenizer)).double()
    prompts = tokenizer(["1 2=3:", "12 4 7=10:", "5 5=10:"])["input_ids"]
    rollout = script.generate(
        network, tokenizer, prompts, script.uniforms(args, 1, 3, 3), args
    )
    sampled = [
        row[seen.bool()].tolist()
        for row, seen in zip(rollout.tokens, rollout.attention_mask)
    ]
    traces = {0: tokenizer("abcdefgh")["input_ids"] + [1]}
    traces[2] = tokenizer("a")["input_ids"] + [1]
    batch = [
        exercise(script, traces.get(i, []), prompt, logprob=mu)
        for i, (prompt, mu) in enumerate(zip(prompts, (-30.0, None, -9.0)))
    ]
    rollout.truncated[:] = True
    new, weights, more = script.put_traces(network, tokenizer, rollout, batch, args)
    assert new.truncated.tolist() == [i not in (2, 8) for i in range(9)]  # z is whole
    rows = [
        row[seen.bool()].tolist() for row, seen in zip(new.tokens, new.attention_mask)
    ]
    expected = [*sampled[:2], prompts[0] + traces[0], *sampled[3:8]]
    expected.append(prompts[2] + traces[2])
    assert rows == expected and new.texts[2] == "abcdefgh" and new.texts[8] == "a"
    exact = plain_logprobs(double, new, 0.7)
    for row, (ratio, found) in enumerate(zip(exact, new.logprobs)):
        n = len(ratio)
        torch.testing.assert_close(found[:n].double(), ratio, atol=1e-4, rtol=0)
        assert not found[n:].any() and new.completion_mask[row].sum() == n
    w = torch.ones(9, dtype=torch.float64)
    w[2] = (exact[2].sum().detach() + 30.0).exp()
    w[8] = (exact[8].sum().detach() + 9.0).exp()
    torch.testing.assert_close(weights.double(), w, rtol=1e-3, atol=0)
    replaced = [len(sampled[2]) - len(prompts[0]), len(sampled[8]) - len(prompts[2])]
    assert more == len(rows[2]) + len(rows[8]) - sum(replaced)
    monkeypatch.setattr(script, "complete", lambda *_: rollout)
    mixed = dataclasses.replace(args, off_policy=True)
    _, found, read = script.sample_batch(network, tokenizer, batch, None, mixed)
    assert found.equal(weights)
    drawn = sum(map(len, prompts)) + int(rollout.completion_mask.sum())
    assert read == drawn + more
    bare = [x._replace(trace=[]) for x in batch]
    found = script.put_traces(network, tokenizer, rollout, bare, args)
    assert found[0] is rollout and found[1].eq(1).all() and found[2] == 0
    rare = [x._replace(logprob=-1000.0) for x in batch]
    found = script.put_traces(network, tokenizer, rollout, rare, args)[1]
    assert [round(x.log().item(), 3) for x in found[[2, 8]]] == [20.0, 20.0]
    rewards = torch.tensor([0, 0, 1.0, 0, 0, 0, 0.5, 0, 1.0])
    A = script.group_advantages(rewards, 3, "none")
    optimizer = Recorder(network)
    script.update(network, None, optimizer, new, A * weights, args)
    z = new.completion_mask.sum()
    loss = -sum(w[i] * A[i].double() * exact[i].sum() for i in range(9)) / z.double()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in double.parameters()])
    assert (optimizer.seen[0] - gradient).norm() < 1e-3 * gradient.norm() != 0


@pytest.mark.parametrize("arm", ["plain", "sft", "off-policy", "prefixed only"])
def test_baseline_uses_what_it_must_not(cli, script, tmp_path, monkeypatch, arm):
    """Each baseline is the same run but for one thing: plain RL sees no trace and pays
    for none; SFT + RL changes the weights before step 1 and has no prefix in RL;
    off-policy puts a trace in each group that has one; prefixed only has no plain
    group."""
    seen, batches = [], []
    real, drawn = script.update, script.draw_batch
    evaluate_all, evaluated = script.evaluate_all, []

    def spy(model, reference, optimizer, rollout, advantages, *rest):
        seen.append((advantages, rollout))
        return real(model, reference, optimizer, rollout, advantages, *rest)

    def spy_batch(*args):
        batches.append(drawn(*args))
        return batches[-1]

    monkeypatch.setattr(script, "update", spy)

    def spy_evaluation(*args):
        evaluated.append(evaluate_all(*args))
        return evaluated[-1] | {"eval/call": len(evaluated)}

    monkeypatch.setattr(script, "evaluate_all", spy_evaluation)
    monkeypatch.setattr(script, "draw_batch", spy_batch)
    flags = {
        "plain": dict(prefixes_per_problem=0),
        "sft": dict(prefixes_per_problem=0, sft_epochs=1),
        "off-policy": dict(prefixes_per_problem=0),
        "prefixed only": dict(plain_share=0, advantage_scale="std"),
    }[arm]
    given = ["--off-policy"] if arm == "off-policy" else []
    assert cli(*given, **flags, steps=3).code == 0
    first, found = metrics_of(tmp_path / "run")[0], records(tmp_path / "run")
    for line in metrics_of(tmp_path / "run")[1:]:
        kinds = [line.get(f"groups_{kind}") for kind in ("prefixed", "plain")]
        assert kinds == ([4, None] if arm == "prefixed only" else [None, 4])
    ids = {r["prompt"]: r["ids"] for r in found if r["ids"]}
    mu = {r["prompt"]: r["logprob"] for r in found}
    prefixed = [bool(x.prefix) for batch in batches for x in batch]
    assert len(batches) == 3 and len(prefixed) == 12
    assert any(prefixed) == (arm == "prefixed only") and all(prefixed) == any(prefixed)
    assert bool(ids) == (arm != "plain") == (first["flops_traces"] > 0)
    assert ("eval/from_40%" in first) == (arm != "plain")
    imitation, ratios = math.ceil(len(ids) / 4) if arm == "sft" else 0, []
    assert len(seen) == 3 + imitation
    assert ("sft/hard_pass@1" in first) == (arm == "sft")
    assert first["eval/call"] == 1 and first.get("sft/call", 2) == 2
    if arm == "prefixed only":  # the context ends with the prefix, the mask is behind
        for (_, rollout), batch in zip(seen, batches):
            width = rollout.completion_mask.shape[1]
            assert width <= 4
            for row, before in enumerate(rollout.tokens[:, :-width].tolist()):
                z = batch[row // 4].prefix
                assert before[-len(z) :] == z
    if arm == "off-policy":
        for (_, rollout), batch in zip(seen, batches):
            for g, x in enumerate(batch):
                row = rollout.tokens[4 * g + 3, -rollout.completion_mask.shape[1] :]
                z = row[rollout.completion_mask[4 * g + 3].bool()].tolist()
                prompt = x.problem.prompt
                assert prompt in mu and (prompt not in ids or z == ids[prompt])
    for (advantages, rollout), batch in zip(seen[imitation:], batches):
        weights = torch.ones(16)
        for g, x in enumerate(batch):
            if arm == "off-policy" and (prompt := x.problem.prompt) in ids:
                now = rollout.logprobs[4 * g + 3].sum()
                weights[4 * g + 3] = (now - mu[prompt]).exp()
        scale = flags.get("advantage_scale", "none")
        A = script.group_advantages(rollout.rewards, 4, scale)
        torch.testing.assert_close(advantages, A * weights, rtol=1e-4, atol=1e-6)
        ratios.append((weights - 1).abs().max())
    if arm == "off-policy":
        assert ratios[0] < 1e-3 < ratios[-1]  # the policy moves away from the base


def test_completion_is_scored_for_another_problem(cli, script, monkeypatch):
    """Rewards that belong to other rows still look like rewards: in search, step and
    evaluation each text is scored for the problem behind whose prompt and prefix it was
    sampled."""
    complete, score, made, places = script.complete, script.score, [], []

    @functools.wraps(complete)
    def note(model, tokenizer, batch, *rest):
        made.append((batch, complete(model, tokenizer, batch, *rest)))
        return made[-1][1]

    @functools.wraps(score)
    def check(reward, problems, texts):
        if not made:  # a first try of the reward
            return score(reward, problems, texts)
        batch, rollout = made[-1]
        n = len(texts) // len(batch)
        assert list(texts) == rollout.texts and len(texts) == n * len(batch)
        assert [*problems] == [batch[i // n].problem for i in range(len(texts))]
        places.append((len(batch), n))
        return score(reward, problems, texts)

    monkeypatch.setattr(script, "complete", note)
    monkeypatch.setattr(script, "score", check)
    assert cli(steps=1, eval_samples=3).code == 0
    assert {(8, 8), (4, 4), (2, 3)} <= {*places} and len(places) == len(made)


def test_evaluation_is_of_other_problems_or_behind_a_prefix(
    cli, script, tmp_path, monkeypatch
):
    """The headline is on hard problems without a prefix. Each evaluation is of held-out
    problems, of the hard ones, and of the traced ones behind 0, 20 ... 80 % of their
    trace, in this order, and what is sampled from is just that; the picture shows the
    first and the last."""
    evaluate, generate, seen, contexts = script.evaluate, script.generate, [], []
    saved = {}

    @functools.wraps(generate)
    def note(model, tokenizer, prompts, *rest):
        contexts.append(prompts)
        return generate(model, tokenizer, prompts, *rest)

    def spy(model, tokenizer, exercises, *rest):
        found = evaluate(model, tokenizer, exercises, *rest)
        assert contexts[-1] == [x.prompt + x.prefix for x in exercises]
        seen.append([(x.problem.prompt, x.prefix) for x in exercises])
        return found | {"eval/pass@1": len(seen) / 100}

    def save(figure, path, **_):
        lines = [line for axes in figure.axes for line in axes.lines]
        saved[Path(path).name] = [[*line.get_ydata()] for line in lines]

    monkeypatch.setattr(script, "generate", note)
    monkeypatch.setattr(script, "evaluate", spy)
    monkeypatch.setattr(script.Figure, "savefig", save)
    assert cli(steps=2, eval_prompts=3).code == 0
    found = records(tmp_path / "run")
    traced, start = [r for r in found if r["ids"]][:3], len("eval ")
    assert len(seen) == 14 and traced
    for test, hard, *shares in seen[:7], seen[7:]:
        assert [prompt[:start] for prompt, _ in test] == ["eval "] * 3
        assert hard == [(r["prompt"], []) for r in found[:3]]
        assert not any(prefix for _, prefix in test)
        for percent, one in zip((0, 20, 40, 60, 80), shares, strict=True):
            for (prompt, prefix), r in zip(one, traced, strict=True):
                ids = r["ids"][: len(r["ids"]) - (r["ids"][-1] == 1)]
                assert prompt == r["prompt"]
                assert prefix == ids[: len(ids) * percent // 100]
    both = [[i / 100 for i in range(n, n + 5)] for n in (3, 10)]
    assert saved["prefix_success.png"] == both
    names = "eval/pass@1", "eval/hard_pass@1"
    ends = [[x[name] for name in names] for x in metrics_of(tmp_path / "run")[::2]]
    assert ends == [[0.01, 0.02], [0.08, 0.09]]


def test_default_traces_are_the_base_models_own(script, monkeypatch):
    """The built-in model never solves a chain: its traces are a better one's."""
    named = []

    def built_in(name, *_):
        named.append(name)
        raise InterruptedError

    monkeypatch.setattr(script, "built_in", built_in)
    with pytest.raises(InterruptedError):
        script.load_sampler(None, None, [], cpu_args(script, model="tiny"))
    assert named == ["careful"]
    args = cpu_args(script, model="x")
    assert script.load_sampler("itself", None, [], args) == "itself"


# ------------------------------------- Resume -----------------------------------------


def test_resume_loses_the_prefixes_or_the_flops(cli, tmp_path):
    """4 steps and 4 more are 8: traces, cuts, places in both pools, Adam, the sum of
    FLOPs and the reference of the KL are those of the run that was not stopped, after
    imitation and off-policy too; the cache may be gone by then, and the log be longer
    than what was saved."""
    for i, (given, changes) in enumerate(
        (
            ([], dict(kl_coef=0.1)),
            (["--off-policy"], dict(prefixes_per_problem=0, sft_epochs=1)),
        )
    ):
        whole, half = f"whole{i}", f"half{i}"
        assert cli(*given, run_dir=whole, steps=8, eval_every=4, **changes).code == 0
        assert cli(*given, run_dir=half, steps=4, eval_every=4, **changes).code == 0
        shutil.rmtree(tmp_path / "runs")
        last = metrics_of(tmp_path / half)[-1]
        ahead = json.dumps(last | {"step": 5, "flops": 2 * last["flops"]})
        with (tmp_path / half / "metrics.jsonl").open("a") as log:
            log.write(f'{ahead}\n{{"step": 6, "fl')
        assert cli("--resume", half, "--steps", "8").code == 0
        check_same_run(tmp_path / half, tmp_path / whole)


@pytest.mark.parametrize("where", ["attempts", "imitate", "evaluate_all"])
def test_kill_before_the_first_step_loses_the_run(
    cli, script, tmp_path, monkeypatch, where
):
    """Search and imitation may take longer than RL: a run that dies in the middle of
    either leaves no folder that stands in the way, and the same command does not try
    again what was tried, and ends as the untouched run does."""
    changes = dict(sft_epochs=2, steps=3)
    assert cli(run_dir="whole", **changes).code == 0
    shutil.rmtree(tmp_path / "runs")
    real, calls, made = getattr(script, where), [], []

    @functools.wraps(real)  # its source is a part of the cache's name
    def dies(*args):
        calls.append(1)
        if len(calls) == (4 if where == "attempts" else 1):
            if where == "imitate":
                real(*args)  # the weights in memory are changed by now
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(script, where, dies)
    with pytest.raises(KeyboardInterrupt):
        cli(run_dir="half", **changes)
    assert not (tmp_path / "half").exists()
    monkeypatch.setattr(script, where, real)
    drawn = script.uniforms
    again = functools.wraps(drawn)(lambda *args: made.append(args[1]) or drawn(*args))
    monkeypatch.setattr(script, "uniforms", again)
    assert cli(run_dir="half", **changes).code == 0
    check_same_run(tmp_path / "half", tmp_path / "whole")
    folders = [*(tmp_path / "runs/cache").iterdir()]
    chunks = len([*folders[0].iterdir()])
    assert len(folders) == 1 and chunks > 4
    made = [step - 10**9 for step in made if step >= 10**9]
    assert made == ([*range(3, chunks)] if where == "attempts" else [])


def test_cache_of_another_search_is_used(script, tmp_path, model, monkeypatch):
    """Cached traces of another model, seed, reward or length, or of other code, would
    be wrong in silence: each changes the folder's name; what does not matter does
    not. Of a task.py all code counts, not the reward's alone."""
    network, _ = model
    problem, base = script.Problem("1+1=", "2"), cpu_args(script)
    tokenizer, other = (
        char_tokenizer(),
        char_tokenizer(eos_token="~", pad_token="<pad>"),
    )
    key = lambda **kw: script.search_folder(
        (network, kw.pop("net", network)),
        kw.pop("t", tokenizer),
        [script.Exercise(kw.pop("ids", [5]), kw.pop("p", problem))],
        kw.pop("r", len),
        base_with(kw),
    )
    base_with = lambda kw: script.dataclasses.replace(base, **kw)
    reward_a = lambda problem, text: 1.0
    reward_b = lambda problem, text: 0.0
    same = key(r=reward_a)
    assert same == key(r=reward_a, steps=9, learning_rate=1.0, trace_cap=7, run_dir="x")
    others = [key(r=reward_b), key(r=reward_a, net=small_qwen3(98, seed=1))]
    others.append(key(r=reward_a, p=script.Problem("1+1=", "3")))
    others += [key(r=reward_a, ids=[6]), key(r=reward_a, t=other)]
    for change in (dict(seed=2), dict(hard_k=3), dict(temperature=0.5)):
        others.append(key(r=reward_a, **change))
    for change in (dict(max_new_tokens=5), dict(rollout_batch_size=8)):
        others.append(key(r=reward_a, **change))
    for change in (dict(dtype="bfloat16"), dict(device="cuda")):
        others.append(key(r=reward_a, **change))
    for helper in ("1.0", "2.0"):
        (tmp_path / "task.py").write_text(f"most = {helper}\n")
        others.append(key(r=reward_a, task=str(tmp_path / "task.py")))
    code = "decode Columns attend one_by_one recordable record autocast pad generate"
    code += " completion_mask stop_ids uniforms attempts complete answer_ids score"
    parts = {name: getattr(script, name) for name in code.split()}
    newer = [(script, x, lambda *args, f=f: f(*args)) for x, f in parts.items()]
    newer += [(torch, "__version__", "0"), (script.transformers, "__version__", "0")]
    newer.append((torch, "get_num_threads", lambda: 99))
    for place, name, value in newer:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            others.append(key(r=reward_a))
    assert len({same, *others}) == len(others) + 1


def test_cache_is_named_by_an_address(cli, tmp_path):
    """An answer that is no JSON has a name of its own in each process, and a search of
    hours is done anew: one line, before anything is written."""
    (tmp_path / "task.py").write_text(PLUGIN.replace(": i}", ": {i}}"))
    result = cli()
    assert result.code == 2 and "must be JSON" in result.errors[0], result
    assert {path.name for path in tmp_path.iterdir()} == {"task.py"}


WORKER = """
import json, os, sys
import torch.distributed as dist
from conftest import cpu_args, load_script
script = load_script("prefixrl")
if script.WORLD_SIZE > 1:
    dist.init_process_group("gloo")
script.train(cpu_args(script, **json.loads(sys.argv[1])))
if script.WORLD_SIZE > 1:  # a rank that leaves first would abort the other
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # done: gloo's threads may abort an exit by themselves
"""


def test_ranks_search_or_count_alone(ranks, tmp_path, small_folder):
    """Ranks that each search for themselves, or count only their own tokens, disagree
    about what is hard and what it cost: two gloo ranks find the traces, draw the
    batches and pay the FLOPs of one process, off-policy traces and imitation too."""
    (tmp_path / "task.py").write_text(PLUGIN)
    flags = SMALL | dict(task=str(tmp_path / "task.py"), model=small_folder)
    flags |= dict(steps=2, eval_every=1, learning_rate=1e-3, sft_epochs=1)
    flags |= dict(candidates=7)
    off_policy = dict(off_policy=True, prefixes_per_problem=0)
    (tmp_path / "worker.py").write_text(WORKER)
    for name, changes in (("prefixed", {}), ("off-policy", off_policy)):
        runs = []
        for world in 1, 2:
            home = tmp_path / f"{name}-{world}"
            home.mkdir()
            job = json.dumps(flags | changes)
            codes = ranks.run(world, tmp_path / "worker.py", job, cwd=home)
            assert codes == [0] * world, (home / "out").read_text()
            runs.append(home / "run")
        one, two = ([(r["problem"], r["ids"]) for r in records(run)] for run in runs)
        assert one == two and any(ids for _, ids in one)
        for alone, shared in zip(*map(logged, runs)):
            assert alone["flops"] == shared["flops"]
            assert shared == pytest.approx(alone, rel=1e-3, abs=1e-5)
        assert alone["step"] == 2 and alone["grad_norm"] > 0


# ------------------------------------- Flags ------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (dict(prefix_low=0.9), "--prefix-low"),
        (dict(prefix_high=1.5), "--prefix-high"),
        (dict(prefix_low=-0.1), "--prefix-low"),
        (dict(plain_share=1.5), "--plain-share"),
        (dict(plain_share=-1), "--plain-share"),
        (dict(hard_k=0), "--hard-k"),
        (dict(trace_cap=0), "--trace-cap"),
        (dict(candidates=0), "--candidates"),
        (dict(prefixes_per_problem=-1), "--prefixes-per-problem"),
        (dict(sft_epochs=-1), "--sft-epochs"),
        (dict(max_flops="nan"), "--max-flops"),
        (dict(traces="missing.jsonl"), "missing.jsonl"),
        (dict(traces="missing.jsonl", model="nowhere"), "missing.jsonl"),  # first
        (dict(max_new_tokens=62), "room for 4"),  # prefix and completion: 128 - 124
    ],
    ids=lambda x: str(x),
)
def test_flag_that_cannot_be_is_accepted(cli, tmp_path, flags, word):
    """One line, exit code 2, nothing written."""
    result = cli(**flags)
    assert result.code == 2 and len(result.errors) == 1 and word in result.errors[0]
    assert {p.name for p in tmp_path.iterdir()} <= {"task.py"}


def test_flags_that_contradict_each_other(cli, tmp_path):
    """--strict-traces without --traces has no effect, --off-policy beside prefixes is
    two methods at once, traces without log-probs have no weight."""
    for flags in (
        ["--strict-traces"],
        ["--off-policy"],
        ["--off-policy", "--plain-share", "0"],
    ):
        result = cli(*flags)
        assert result.code == 2 and flags[0] in result.errors[0]
    (tmp_path / "given.jsonl").write_text('{"prompt": "train 0:", "text": "abcd"}\n')
    changes = dict(prefixes_per_problem=0, traces="given.jsonl")
    result = cli("--off-policy", "--strict-traces", **changes)
    assert result.code == 2 and "logprob" in result.errors[0]


def test_search_that_finds_nothing_trains_on_nothing(cli, tmp_path):
    """Without hard problems, or without a single trace where one is needed, the run
    ends in one line that says what to change; so does one whose search has cost all
    that may be spent. None leaves a folder in the way of the changed command."""
    (tmp_path / "easy.py").write_text(PLUGIN.replace("/ 4", "* 0 + 1"))
    for prefixes in 3, 0:
        result = cli(task="easy.py", prefixes_per_problem=prefixes)
        assert result.code == 2 and "raise --candidates" in result.errors[0]
    (tmp_path / "never.py").write_text(PLUGIN.replace("/ 4", "/ 400"))
    result = cli(task="never.py", trace_cap=8)
    assert result.code == 2 and "--trace-cap" in result.errors[0]
    result = cli(max_flops=1)
    assert result.code == 2 and "--max-flops" in result.errors[0]
    assert not (tmp_path / "run").exists()


# ------------------------------ Combination lock --------------------------------------


@pytest.mark.parametrize("band", [(0.1, 0.4), (0.4, 0.8), (0.8, 0.95)])
def test_back_generalisation_without_shared_parameters(band):
    """Accuracy on plain problems that rises where it cannot means that the evaluation
    sees the prefix, or that the prefix is trained on. With a logit for each wheel the
    wheels in front of every cut stay bit for bit what they were, and the lock stays
    shut as often as they decide; the same update opens it where all wheels share their
    logits."""
    path = Path(__file__).resolve().parent.parent / "benchmarks/combination_lock.py"
    spec = importlib.util.spec_from_file_location("combination_lock", path)
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    lock.UPDATES = 140
    ends = {kind: lock.train(kind, band, 0) for kind in ("tabular", "shared")}
    tabular, shared = (ends[kind] for kind in ("tabular", "shared"))
    least = 0.6 ** round(band[0] * lock.WHEELS)
    assert {line["before"] for line in tabular} == {tabular[0]["before"]}
    assert tabular[0]["before"] == pytest.approx(least)
    assert tabular[-1]["plain"] <= least + 1e-9
    assert tabular[0]["plain"] == shared[0]["plain"] == pytest.approx(0.6**lock.WHEELS)
    assert shared[-1]["plain"] > max(0.5, 2 * tabular[-1]["plain"] * (band[0] > 0.1))
    assert shared[-1]["before"] > shared[0]["before"]


@pytest.mark.parametrize(
    ("arms", "shown"),
    [
        ([], "not known here"),
        (["default"], "not known here"),
        (["default", "rl", "rl"], "0.150 (mean of 2 seeds)"),
        (None, "not known here"),  # a file of the same name in another project
    ],
)
def test_table_ends_in_a_traceback(tmp_path, monkeypatch, capsys, script, arms, shown):
    """A run ended with a division by zero after its last step when the committed
    results had no run of plain RL yet."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "algos" / "prefixrl.py"))
    values = [{"eval/hard_pass@1": 0.0}, {"eval/hard_pass@1": 0.15, "flops": 7e9}]
    runs = arms and [{"arm": arm, "evals": values} for arm in arms]
    file = tmp_path / "benchmarks" / "results" / "prefixrl.json"
    file.write_text(json.dumps(runs))
    lines = "".join(json.dumps(line) + "\n" for line in values)
    (tmp_path / "metrics.jsonl").write_text(lines)
    script.report(tmp_path, script.Args())
    text = capsys.readouterr().out
    assert "base 0.000  trained 0.150" in text and text.count(shown) == 1


def test_trace_model_ends_with_another_token(cli, tmp_path):
    """Sampled until the student's EOS, the answers of a model that ends its turns with
    another token run on behind their end: cut, imitated and paid for."""
    tokenizer = char_tokenizer()
    other = small_qwen3(len(tokenizer), seed=5)
    other.generation_config.eos_token_id = [1, 40]
    folder = save_model(tmp_path / "other", other, tokenizer)
    result = cli(trace_model=folder)
    assert result.code == 2 and "[1, 40]" in result.errors[0], result
    assert not (tmp_path / "run").exists()


def test_prefixes_end_in_plain_rl_unseen(cli, tmp_path):
    """If all prefixes are empty, no trace is used and every batch is plain, whatever
    --plain-share says; and traces that nothing uses need no model."""
    result = cli(prefix_low=0, prefix_high=0.01, steps=1)
    assert result.code == 2 and "prefixes are empty" in result.errors[0], result
    assert not (tmp_path / "run").exists()
    result = cli(prefixes_per_problem=0, trace_model="nowhere", run_dir="new")
    assert result.code == 2 and "--trace-model has no effect" in result.errors[0]
