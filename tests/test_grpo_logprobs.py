"""Log-probs are those of the distribution sampled from, and of the sampled ids."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    Recorder,
    char_tokenizer,
    cpu_args,
    load_script,
    plain_logprobs,
    random_rollout,
    save_model,
    small_gpt2,
    small_qwen3,
)
from tokenizers import Tokenizer, decoders, models, processors
from torch.fx.experimental.proxy_tensor import make_fx


def small_mistral(vocab_size: int) -> transformers.MistralForCausalLM:
    """Attention that reaches 4 tokens back, written out instead of sdpa."""
    torch.manual_seed(0)
    config = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64)
    config |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config |= dict(sliding_window=4, initializer_range=0.3, bos_token_id=None)
    config |= dict(eos_token_id=1, attn_implementation="eager")
    return transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()


def small_gemma3(vocab_size: int) -> transformers.Gemma3ForCausalLM:
    """Layers whose attention reaches 4 tokens back, and one that sees all."""
    torch.manual_seed(0)
    config = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64)
    config |= dict(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    config |= dict(head_dim=8, sliding_window=4, initializer_range=0.3, eos_token_id=1)
    config |= dict(bos_token_id=None)
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**config)
    ).eval()


SMALL = {"gpt2": small_gpt2, "qwen3": small_qwen3}
WINDOWS = {"mistral": small_mistral, "gemma3": small_gemma3}
IDS_ONLY = SimpleNamespace(
    eos_token_id=1,
    pad_token_id=0,
    batch_decode=lambda ids, **_: [str(row) for row in ids.tolist()],
)


def random_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def padded(rows: list[torch.Tensor], width: int) -> torch.Tensor:
    """Rows of different lengths as (rows, width), 0 behind them."""
    return torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])


def chi_squared_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of counts against probabilities; cells that expect < 5 are merged."""
    expected = probabilities.double().flatten() * counts.sum()
    counts, rare = counts.double().flatten(), expected < 5
    rest = torch.stack([counts[rare].sum(), expected[rare].sum()])[:, None]
    cells = torch.cat([torch.stack([counts, expected])[:, ~rare], rest], 1)
    cells = cells if rare.any() else cells[:, :-1]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    half = torch.tensor((cells.shape[1] - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item()


def test_rollouts_under_the_checkpoints_generation_config(grpo, tmp_path):
    """A checkpoint's generation_config (top_k, repetition_penalty, its own temperature)
    leaks into sampling, while the loss scores the plain softmax: the ratio is wrong and
    the policy collapses. First and second tokens of 20,000 completions have the
    frequencies of the softmax, and their log-probs are those the loss computes.
    https://github.com/huggingface/trl/issues/5783"""
    tokenizer, temperature, size = char_tokenizer(), 0.9, 20_000
    original = small_qwen3(len(tokenizer), initializer_range=0.2)
    folder = save_model(tmp_path / "model", original, tokenizer)
    hostile = dict(top_k=1, repetition_penalty=1.3, do_sample=True, temperature=0.1)
    hostile |= dict(top_p=0.2, min_p=0.3, no_repeat_ngram_size=1, max_new_tokens=1)
    Path(folder, "generation_config.json").write_text(json.dumps(hostile))
    args = cpu_args(grpo, temperature=temperature, rollout_batch_size=size)
    model, tokenizer = grpo.load_model(folder, args)
    assert model.generation_config.top_k == 1  # it is there to be obeyed
    prompt = tokenizer("3 4=")["input_ids"]
    rollout = grpo.generate(model, tokenizer, [prompt], random_noise(size, 2), args)

    with torch.no_grad():
        vocabulary = len(tokenizer)
        two = [[*prompt, token] for token in range(vocabulary)]
        logits = original(torch.tensor(two)).logits.double()[:, -2:] / temperature
        first, second = logits.softmax(-1).unbind(1)
        joint = first[0][:, None] * second  # (first token, second token)
        stop = tokenizer.eos_token_id
        joint[stop] = 0.0
        joint[stop, tokenizer.pad_token_id] = first[0, stop]
        a, b = rollout.tokens[:, -2], rollout.tokens[:, -1]
        counts = torch.bincount(a * vocabulary + b, minlength=vocabulary**2)
        firsts = counts.view(vocabulary, -1).sum(-1)
        assert chi_squared_p(firsts, first[0]) > 1e-3
        assert chi_squared_p(counts, joint.flatten()) > 1e-3
        batch = rollout.tokens[:500], rollout.attention_mask[:500], 2, temperature
        scored, _ = grpo.token_logprobs(model, *batch)
        assert torch.allclose(scored, rollout.logprobs[:500], atol=1e-5)


def draw(grpo, logits: torch.Tensor, noise: list[float]) -> tuple:
    """The tokens that decode draws from logits (V,), one for each number, and their
    log-probs."""
    model, ids = small_qwen3(40), torch.tensor([[5, 6, 7]])
    model.lm_head.register_forward_hook(lambda *_: logits.expand(1, 1, -1))
    noise = torch.tensor(noise, dtype=torch.float64)[:, None]
    inputs = ids, torch.ones_like(ids), noise, 1.0, torch.tensor([1])
    return tuple(x[:, 0] for x in grpo.decode(model, *inputs))


def test_token_without_probability_is_drawn(grpo):
    """The inverse CDF is off at an end: a number of 0 takes the first token, or one of
    nearly 1 the last, or none, though neither can follow. (1.0 is what nearly 1 becomes
    where there is no float64.)"""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(50, generator=generator)
        logits[[0, 1, -2, -1]] = -1e4
        tokens, logprobs = draw(grpo, logits, [0.0, 2**-60, 0.5, 1 - 2**-53])
        assert ((tokens > 1) & (tokens < 48)).all(), tokens
        assert (logprobs > -20).all()
        assert draw(grpo, logits, [1.0])[0] < 50


def test_sum_of_a_large_vocabulary_is_rounded(grpo):
    """The CDF of 200,000 equal tokens, added up in float32, is off by hundreds of
    tokens: some are never drawn."""
    noise = torch.rand(64, generator=torch.Generator().manual_seed(0)).tolist()
    tokens, _ = draw(grpo, torch.zeros(200_000), noise)
    for token, number in zip(tokens.tolist(), noise):
        assert abs(token - number * 200_000) < 2


def test_temperature_missing_from_the_logprobs(grpo, monkeypatch):
    """Sampled at temperature 0.7 and scored at 1, the ratio is far from 1 before
    anything was learned. Sampled and scored log-probs agree, both with logits / 0.7; at
    the first update rho is exactly 1, in bf16 too, where scoring rounds differently.
    https://github.com/huggingface/trl/issues/3029"""
    model, prompts = small_qwen3(16), [[5, 6, 7], [8], [9, 3]]
    flags = dict(temperature=0.7, max_new_tokens=8, micro_batch_size=5, kl_coef=0.1)
    args = cpu_args(grpo, **flags)
    rollout = grpo.generate(model, IDS_ONLY, prompts, random_noise(12, 8), args)
    batch = rollout.tokens, rollout.attention_mask, 8
    scored, _ = grpo.token_logprobs(model, *batch, 0.7)
    assert torch.allclose(
        (scored - rollout.logprobs).exp(), torch.ones(12, 8), rtol=1e-5
    )
    exact = plain_logprobs(small_qwen3(16).double(), rollout, 0.7)
    assert torch.allclose(rollout.logprobs.double(), padded(exact, 8), atol=1e-5)

    ratios, policy_loss = [], grpo.policy_loss

    def spy(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).exp().detach())
        return policy_loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(grpo, "policy_loss", spy)
    advantages = torch.tensor([1.0, -1.0] * 6)
    for dtype in "float32", "bfloat16":
        args, optimizer = cpu_args(grpo, dtype=dtype, **flags), Recorder(model)
        stats = grpo.update(model, model, optimizer, rollout, advantages, args)
        assert len(ratios) == 3 and all((ratio == 1).all() for ratio in ratios)
        assert stats["clip_fraction"] == 0 and stats["kl"] == 0
        assert stats["delta_logp_max"] < (1e-5 if dtype == "float32" else 1.0)
        ratios.clear()


@pytest.mark.parametrize("name", SMALL)
def test_scores_depend_on_the_padding(grpo, name):
    """Left padding without position ids shifts learned positions; padding that is
    attended to changes everything. In a batch with padding on both sides, of any value
    and any amount, each row has the log-probs it has alone and unpadded.
    https://github.com/huggingface/trl/issues/6800"""
    model, lengths = SMALL[name](16), [4, 1, 6, 2]
    rollout = random_rollout(grpo, 16, [3, 9, 1, 5], lengths)
    alone = [x.detach() for x in plain_logprobs(model, rollout)]
    tokens, seen = rollout.tokens, rollout.attention_mask
    for left, right in (0, 0), (7, 0), (0, 5), (3, 4):
        extra = torch.randint(0, 16, (4, left)), torch.randint(0, 16, (4, right))
        wide = torch.cat([extra[0], tokens, extra[1]], 1)
        mask = torch.nn.functional.pad(seen, (left, right))
        with torch.no_grad():
            together = grpo.token_logprobs(model, wide, mask, 6 + right, 1.0)[0]
            for i in range(4):
                own = grpo.token_logprobs(model, wide[[i]], mask[[i]], 6 + right, 1.0)[
                    0
                ]
                assert torch.allclose(own[0], together[i], atol=1e-5)
        assert together.shape == (4, 6 + right)
        assert torch.allclose(together, padded(alone, 6 + right), atol=1e-5)


@pytest.mark.parametrize("name", SMALL | WINDOWS)
def test_completions_depend_on_the_neighbours(grpo, name):
    """What a model says to a prompt must not depend on the padding that longer
    neighbours bring, nor on who is decoded side by side, nor on who has finished. The
    same noise gives the completions of a naive loop: one row, no padding, no cache.
    https://github.com/huggingface/trl/issues/2708"""
    model, length = (SMALL | WINDOWS)[name](12), 12
    prompts = [[5], [6, 7, 8, 9, 10, 2, 3], [3, 4], [8, 8, 8, 8]]
    noise = random_noise(24, length, seed=3)
    wanted = []
    for i in range(24):
        ids = list(prompts[i // 6])
        for u in noise[i]:
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            ids.append(int((p.cumsum(-1) <= u).sum()))
            if ids[-1] == 1:
                break
        wanted.append(ids[len(prompts[i // 6]) :])
    assert sum(1 in row for row in wanted) > 3 and max(map(len, wanted)) == length

    def check(rows, own_noise, own_prompts, **flags):
        args = cpu_args(grpo, max_new_tokens=length, **flags)
        model.train()  # as an update leaves it
        rollout = grpo.generate(model, IDS_ONLY, own_prompts, own_noise, args)
        size = rollout.completion_mask.shape[1]
        exact = padded([x.detach() for x in plain_logprobs(model, rollout)], size)
        assert torch.allclose(rollout.logprobs, exact, atol=1e-5)
        for row, mask, tokens in zip(rows, rollout.completion_mask, rollout.tokens):
            assert tokens[-size:][mask.bool()].tolist() == row
        return rollout

    for rollout_batch_size in 1, 6, 13, 512:
        check(wanted, noise, prompts, rollout_batch_size=rollout_batch_size)
    for i, prompt in enumerate(prompts):
        check(wanted[6 * i :][:6], noise[6 * i :][:6], [prompt])


def tensors_of(function) -> list[torch.Tensor]:
    """All that a function reads or writes of what stands around it."""
    found = []
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, transformers.Cache):
            found += [x for layer in value.layers for x in (layer.keys, layer.values)]
        elif hasattr(value, "__closure__"):
            found += tensors_of(value)
    return found


@pytest.mark.parametrize(
    "name, length, even",
    [
        ("gpt2", 100, False),
        ("qwen3", 400, False),
        ("qwen3", 400, True),
        ("mistral", 100, False),
        ("mistral", 100, True),
        ("gemma3", 100, False),
    ],
)
def test_graph_replays_what_has_moved(grpo, monkeypatch, name, length, even):
    """A CUDA graph goes on with the tensors, shapes and branches of the step that was
    recorded: what Python puts in their place later is not seen. Here the operations of
    one step are recorded on the CPU and replayed, as completions end, rows are dropped
    and columns are added: the tokens and log-probs are those without it. Where no
    prompt is padded (even), transformers would leave out the mask that hides the
    columns which are still empty."""
    model = (SMALL | WINDOWS)[name](40)
    prompts = [[5, 6, 7, 8, 9], [7], [9, 9], [8, 3, 2]]
    prompts = grpo.pad([x[-1:] * 5 if even else x for x in prompts], 0, "left")
    stops = torch.tensor([1, 11, 12] if length == 100 else [1])
    noise = random_noise(64, length, seed=1)
    batch = model, prompts, (prompts != 0).long(), noise, 0.7, stops
    wanted, logprobs = grpo.decode(*batch)
    mask, _ = grpo.completion_mask(wanted, stops)
    assert len(mask.sum(-1).unique()) > 10  # they end at other times
    replays = []

    def record(step):
        """step's operations; it is not carried out yet."""
        tensors = tensors_of(step)
        before = [x.clone() for x in tensors]
        graph = make_fx(step)()
        for x, old in zip(tensors, before):
            x.copy_(old)
        replays.append(0)

        def replay():
            replays[-1] += 1
            graph()

        return replay

    monkeypatch.setattr(grpo, "recordable", lambda _: True)
    monkeypatch.setattr(grpo, "record", record)
    found, again = grpo.decode(*batch)
    assert len(replays) > 1 and sum(replays) > 0.8 * mask.sum(-1).max()
    assert torch.equal(found * mask, wanted * mask)
    assert torch.allclose(again * mask, logprobs * mask, atol=2e-5)


def test_model_that_looks_at_values_is_recorded(grpo, monkeypatch):
    """A forward pass that asks the GPU for a value, to choose experts or to stretch its
    positions, cannot be recorded: the run would end at its first rollout."""
    dense, small = small_qwen3(12), dict(vocab_size=12, hidden_size=32)
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    stretched = small_qwen3(12, rope_parameters=rope)
    small |= dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    small |= dict(num_experts=4, moe_intermediate_size=8, intermediate_size=8)
    experts = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**small))
    assert not grpo.recordable(dense)  # on a CPU
    for model in dense, stretched, experts:
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert grpo.recordable(dense)
    assert not grpo.recordable(stretched) and not grpo.recordable(experts)
    with monkeypatch.context() as patch:  # attention of its own, as Falcon's
        patch.setattr(type(dense), "_can_set_attn_implementation", lambda _: False)
        assert not grpo.recordable(dense)
    monkeypatch.setattr(type(dense), "_can_compile_fullgraph", False)
    assert not grpo.recordable(dense)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_is_wider_than_what_is_multiplied(grpo, monkeypatch, dtype):
    """Keys and values kept in fp32 where attention rounds them to bf16 take twice the
    memory, and each step twice the time; a key copied for each head that shares it
    takes as many times both. sdpa is there again when all is drawn."""
    model, tokenizer, seen = small_qwen3(12), char_tokenizer(), []
    real = grpo.attend

    def attend(module, query, key, *rest, **kwargs):
        seen.append((key.dtype, key.shape[1]))
        return real(module, query, key, *rest, **kwargs)

    monkeypatch.setattr(grpo, "attend", attend)
    args = cpu_args(grpo, dtype=dtype, max_new_tokens=4)
    grpo.generate(model, tokenizer, [[5, 6, 7], [8]], random_noise(4, 4), args)
    assert set(seen) == {(getattr(torch, dtype), 2)} and len(seen) == 3 * 2
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("script", ["grpo", "dmpo", "prefixrl", "vopd"])
def test_gradient_that_is_not_finite_is_applied(script, capsys, monkeypatch):
    """One NaN in a gradient makes all weights NaN, and the run goes on with them, its
    next checkpoint too. It ends instead, before the step. Where such gradients came
    from: cuDNN's attention on some GPUs, which every script turns off.
    https://github.com/pytorch/pytorch/issues/196678"""
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.delitem(sys.modules, script, raising=False)  # as if for the first time
    module = load_script(script)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    model = small_qwen3(12)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.clone() for p in model.parameters()]
    for value in math.nan, math.inf:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        p.grad[0] = value
        with pytest.raises(SystemExit) as end:
            module.optimizer_step(model, optimizer, 1.0)
        error = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(error) == 1 and str(value) in error[0]
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("name", SMALL)
def test_dropout_on(grpo, tmp_path, name):
    """GPT-2 comes with dropout 0.1: in train mode the ratio is noise. A loaded model
    has none, whatever its config says: two forwards in train mode are the same, and
    equal to those of the saved model in eval mode.
    https://github.com/huggingface/trl/issues/3000"""
    dropout = {"qwen3": dict(attention_dropout=0.5)}
    dropout["gpt2"] = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    tokenizer, ids = char_tokenizer(), torch.tensor([[5, 6, 7, 8, 9]])
    saved = SMALL[name](len(tokenizer), **dropout[name])
    with torch.no_grad():
        wanted, saved = saved(ids).logits, saved.train()
        assert not torch.allclose(saved(ids).logits, saved(ids).logits)
        folder = save_model(tmp_path / "model", saved, tokenizer)
        model = grpo.load_model(folder, cpu_args(grpo))[0].train()
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert torch.allclose(model(ids).logits, wanted, atol=1e-6)


def small(name: str, vocab_size: int, **changes):
    """A random model of a few thousand parameters from a config of transformers."""
    torch.manual_seed(0)
    config = dict(vocab_size=vocab_size, hidden_size=32, num_attention_heads=4)
    config |= dict(num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48)
    config |= dict(initializer_range=0.3, max_position_embeddings=128)
    config |= dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config = transformers.AutoConfig.for_model(name, **config | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


BART = dict(encoder_layers=1, decoder_layers=2, d_model=32, init_std=0.3)
BART |= dict(decoder_attention_heads=4, decoder_ffn_dim=48)
LFM2 = dict(layer_types=["conv", "full_attention"])
OTHERWISE = {  # models, by what makes them score otherwise than they are sampled from
    "counts columns as positions": ("bart", BART),
    "sees what comes later": ("gemma3_text", dict(use_bidirectional_attention=True)),
    "has layers without keys and values": ("lfm2", LFM2),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_model_that_scores_otherwise_than_it_samples(grpo, tmp_path, capsys, what):
    """Padding on the left that moves a row's positions, attention to later tokens or a
    cache of another kind: log-probs were nats off, or the first step was a traceback.
    Such models are refused when they are loaded, in one line."""
    tokenizer, (name, changes) = char_tokenizer(), OTHERWISE[what]
    model = small(name, len(tokenizer), **changes)
    folder = save_model(tmp_path / "model", model, tokenizer)
    with pytest.raises(SystemExit) as stopped:
        grpo.load_model(folder, cpu_args(grpo))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("error: cannot load the model") == 1


NOISY = {  # what is drawn at random in train mode, beside dropout
    "phimoe": {},
    "mixtral": dict(router_jitter_noise=0.3, num_local_experts=4),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_router_is_noisy_in_an_update(grpo, tmp_path, name, checkpointing):
    """In train mode some mixtures of experts choose experts at random: an update scores
    a policy that was not sampled from, by up to 2 nats. Its log-probs are the sampled
    ones, with gradient checkpointing too, which train mode is there for."""
    tokenizer = char_tokenizer()
    model = small(name, len(tokenizer), **NOISY[name])
    folder = save_model(tmp_path / "model", model, tokenizer)
    more = dict(gradient_checkpointing=checkpointing, max_new_tokens=8)
    args = cpu_args(grpo, **more)
    model, tokenizer = grpo.load_model(folder, args)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    rollout = grpo.generate(model, tokenizer, prompts, random_noise(8, 8), args)
    stats = grpo.update(model, None, Recorder(model), rollout, torch.ones(8), args)
    assert 0 < stats["delta_logp_max"] < 1e-4


def test_longrope_changes_keys_that_are_cached(grpo):
    """longrope has other frequencies for all positions once the longest row passes the
    original length: keys in the cache keep the old ones, and a row's log-probs change
    with its neighbours. That length is the limit; other kinds of RoPE keep theirs."""
    ropes = dict(rope_type="longrope", original_max_position_embeddings=16, factor=8.0)
    ropes |= dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 2.5, 3.0, 3.5])
    ropes |= dict(rope_theta=1e4)
    model = small(
        "phi3", 20, rope_parameters=ropes, original_max_position_embeddings=16
    )
    tokens = torch.randint(2, 20, (2, 20))
    seen = torch.ones_like(tokens)
    seen[1, :8] = 0
    both, _ = grpo.token_logprobs(model, tokens, seen, 6, 1.0)
    alone, _ = grpo.token_logprobs(model, tokens[1:], seen[1:], 6, 1.0)
    assert (both[1] - alone[0]).abs().max() > 0.1  # the reason: 20 tokens are too many
    tokens, seen = tokens[:, 4:], seen[:, 4:]
    both, _ = grpo.token_logprobs(model, tokens, seen, 6, 1.0)
    alone, _ = grpo.token_logprobs(model, tokens[1:], seen[1:], 6, 1.0)
    assert (both[1] - alone[0]).abs().max() < 1e-4
    assert grpo.context_length(model) == 16
    model.config.rope_parameters = {"full_attention": ropes, "sliding_attention": {}}
    assert grpo.context_length(model) == 16
    yarn = dict(rope_type="yarn", original_max_position_embeddings=16, factor=8.0)
    model = small("llama", 20, rope_parameters=yarn | dict(rope_theta=1e4))
    assert grpo.context_length(model) == grpo.context_length(small_gpt2(20)) == 128


def test_checkpointing_that_a_model_has_not_is_a_traceback(grpo, tmp_path, capsys):
    """Not every model supports --gradient-checkpointing."""
    tokenizer = char_tokenizer()
    shape = dict(n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=128)
    folder = tmp_path / "model"
    save_model(folder, small("ctrl", len(tokenizer), **shape), tokenizer)
    with pytest.raises(SystemExit) as stopped:
        grpo.load_model(str(folder), cpu_args(grpo, gradient_checkpointing=True))
    assert stopped.value.code == 2 and capsys.readouterr().err.count("error: ") == 1


def test_padding_has_no_row_in_the_embedding(grpo, tmp_path):
    """A "[PAD]" that was added to the tokenizer and not to the model has an id that the
    embedding does not know: masked or not, looking it up is an error."""
    tokenizer = char_tokenizer(eos_token="<eos>")
    model = small_qwen3(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(model.get_input_embeddings().weight)
    folder = save_model(tmp_path / "model", model, tokenizer)
    args = cpu_args(grpo, max_new_tokens=4)
    model, tokenizer = grpo.load_model(folder, args)
    prompts, noise = [[5, 6, 7], [8]], random_noise(4, 4)
    assert grpo.generate(model, tokenizer, prompts, noise, args).tokens.max() < 98


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_turns_the_cache_off(grpo, tmp_path, name):
    """In train mode gradient checkpointing silently drops the key-value cache, and a
    decode loop that feeds one token at a time then sees one token of context. With it
    on completions and gradients stay the same, and activations are really recomputed.
    https://github.com/huggingface/trl/issues/1540"""
    tokenizer = char_tokenizer()
    folder = save_model(tmp_path / "model", SMALL[name](len(tokenizer)), tokenizer)
    prompts = [[5, 6, 7, 8][i % 3 :] + [9 + i] for i in range(8)]  # none is shared
    noise, found = random_noise(8, 6), []
    for on in False, True:
        args = cpu_args(grpo, gradient_checkpointing=on, max_new_tokens=6)
        model, _ = grpo.load_model(folder, args)
        calls, optimizer = [], Recorder(model)
        for module in model.modules():
            if type(module).__name__ in ("Qwen3MLP", "GPT2MLP"):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        model.train()
        rollout = grpo.generate(model, tokenizer, prompts, noise, args)
        calls.clear()
        advantages = torch.tensor([1.0, -1.0] * 4)
        grpo.update(model, None, optimizer, rollout, advantages, args)
        found.append((rollout.tokens, optimizer.seen[0], len(calls)))
    (tokens, gradient, once), (tokens_on, gradient_on, twice) = found
    assert torch.equal(tokens, tokens_on)
    assert (gradient - gradient_on).norm() < 1e-6 * gradient.norm()
    assert twice == 2 * once == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", SMALL)
def test_shared_prompt_is_the_wrong_one(grpo, name):
    """Neighbours with one prompt have it read once, and every completion goes on from
    its own prompt's keys and values. Here are prompts that differ in the last token
    alone, in their length alone (what one has is padding in the other), one that comes
    back after another, and completions of one token: log-probs and gradients are those
    of one row at a time."""
    lengths = [4] * 6 + [2] * 2 + [4] * 3 + [1]
    rollout = random_rollout(grpo, 16, lengths, [3, 1, 5, 2, 4, 1, 6, 2, 1, 1, 3, 2])
    first = rollout.tokens[0, :4].clone()
    rollout.tokens[:, :4] = first  # padded rows too: what is masked must not count
    rollout.tokens[3:6, 3] = (first[3] + 1) % 14 + 2
    model = SMALL[name](16).double()
    for start, end in (0, 12), (0, 3), (2, 9), (8, 10), (1, 2):
        part = copy.copy(rollout)
        for field in ("tokens", "attention_mask", "completion_mask"):
            setattr(part, field, getattr(rollout, field)[start:end])
        width = int(part.completion_mask.sum(-1).max())
        for field in ("tokens", "attention_mask"):
            setattr(part, field, getattr(part, field)[:, : 4 + width])
        part.completion_mask = part.completion_mask[:, :width]
        factor = torch.linspace(0.5, 2, width)
        model.zero_grad()
        batch = part.tokens, part.attention_mask, width, 0.7
        logprobs, _ = grpo.token_logprobs(model, *batch)
        (logprobs * factor).sum().backward()
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        for i, row in enumerate(plain_logprobs(model, part, 0.7)):
            assert torch.allclose(logprobs[i, : len(row)], row.float(), atol=1e-5)
            (row * factor[: len(row)]).sum().backward()
        wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", SMALL)
def test_logits_shifted_by_one(grpo, name):
    """The logits at position t are about token t + 1. Log-probs and entropies equal
    those of a loop that shows the model one token more at a time, in float64.
    https://github.com/lucidrains/PaLM-rlhf-pytorch/issues/31"""
    model = SMALL[name](16).double()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(16).double())
    rollout = random_rollout(grpo, 16, [4, 1, 6], [5, 7, 1])
    tokens, seen = rollout.tokens, rollout.attention_mask
    got, entropy = grpo.token_logprobs(model, tokens, seen, 7, 1.3)
    assert got.shape == entropy.shape == (3, 7) and not entropy.requires_grad
    got, entropy = got.tolist(), entropy.tolist()
    for i in range(3):
        for t in range(7):
            logprob = uncertainty = 0.0
            if rollout.completion_mask[i, t]:
                context = tokens[i, : 6 + t][seen[i, : 6 + t].bool()]
                with torch.no_grad():
                    p = (model(context[None]).logits[0, -1] / 1.3).softmax(-1)
                logprob = math.log(p[tokens[i, 6 + t]])
                uncertainty = -sum(x * math.log(x) for x in p.tolist())
            assert math.isclose(got[i][t], logprob, abs_tol=1e-5)
            assert math.isclose(entropy[i][t], uncertainty, abs_tol=1e-5)


def test_training_on_tokens_that_were_not_sampled(grpo, monkeypatch):
    """Text is no faithful copy of the ids: "ab" may have been sampled as "a", "b" and
    is encoded as one token. Training on encode(decode(ids)) reinforces what was never
    sampled. The rollout holds the ids that the noise picks, and these are scored.
    https://github.com/huggingface/trl/issues/5224"""
    letters, pairs = "abcd", [(x, y) for x in "abcd" for y in "abcd"]
    words = ["<pad>", "<eos>", "<unk>", *letters, *("".join(pair) for pair in pairs)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges=pairs, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **special
    )
    model = small_qwen3(len(words))
    problems = [grpo.Problem("abc", None), grpo.Problem("da", None)]
    prompts = grpo.encode_prompts(tokenizer, problems, 50, 10**6)
    noise, args = random_noise(16, 6), cpu_args(grpo, max_new_tokens=6)
    rollout = grpo.generate(model, tokenizer, prompts, noise, args)
    changed = 0
    for i, row in enumerate(rollout.tokens):
        ids = row[rollout.attention_mask[i].bool()].tolist()
        prompt = prompts[i // 8]
        assert ids[: len(prompt)] == prompt
        completion = ids[len(prompt) :]
        for t, token in enumerate(completion):  # the token that the noise picks
            with torch.no_grad():
                context = torch.tensor([prompt + completion[:t]])
                cdf = model(context).logits[0, -1].double().softmax(-1).cumsum(-1)
            assert token == int((cdf <= noise[i, t]).sum())
        text = tokenizer.decode(completion, skip_special_tokens=True)
        assert rollout.texts[i] == text
        changed += tokenizer(text)["input_ids"] != [x for x in completion if x > 1]
    assert changed > 5

    scored, token_logprobs = [], grpo.token_logprobs

    def spy(model, tokens, *rest):
        scored.extend(tokens.tolist())
        return token_logprobs(model, tokens, *rest)

    monkeypatch.setattr(grpo, "token_logprobs", spy)
    advantages = torch.tensor([1.0, -1.0] * 8)
    grpo.update(model, None, Recorder(model), rollout, advantages, args)
    assert sorted(scored) == sorted(rollout.tokens.tolist())


def chat_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A character tokenizer that puts <bos> before each text, with a chat template that
    brings its own <bos>, as in Llama and Gemma."""
    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    tokenizer = char_tokenizer(**special)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def test_two_bos_or_a_template_applied_twice(grpo, capsys):
    """Rendering a chat to text and encoding the text puts a second BOS in front; a
    template on a plain prompt, or none on a chat, trains on a prompt nobody will ask.
    https://huggingface.co/docs/transformers/chat_templating, as in
    https://github.com/open-thought/tiny-grpo"""
    tokenizer = chat_tokenizer()
    bos = tokenizer.bos_token_id
    characters = lambda text: tokenizer.convert_tokens_to_ids(list(text))
    chat = [{"role": "system", "content": "Be"}, {"role": "user", "content": "2+2?"}]
    problems = [grpo.Problem(chat, 4), grpo.Problem("2+2=", 4)]
    of_chat, of_text = grpo.encode_prompts(tokenizer, problems, 100, 10**6)
    rendered = "[system]Be\n[user]2+2?\n[assistant]"
    assert list(of_chat) == [bos, *characters(rendered)]
    again = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert list(of_chat) == list(again["input_ids"])
    assert list(of_text) == [bos, *characters("2+2=")]
    ready = grpo.Problem(f"{tokenizer.bos_token}2+2=", 4)  # text that has its BOS
    assert grpo.encode_prompts(tokenizer, [ready], 100, 10**6) == [of_text]

    ends = [
        (f"<{x}>", tokenizer.convert_tokens_to_ids(f"<{x}>")) for x in ("bos", "eos")
    ]
    whole = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = whole  # as saved after fine-tuning
    assert grpo.encode_prompts(tokenizer, [problems[1]], 100, 10**6) == [of_text]
    asked = grpo.Problem("2+2=<eos>", 4)
    (ids,) = grpo.encode_prompts(tokenizer, [asked], 100, 10**6)
    assert ids == [*of_text, *2 * [tokenizer.eos_token_id]]  # the tokenizer's own

    tokenizer.chat_template = None
    with pytest.raises(SystemExit) as stopped:
        grpo.encode_prompts(tokenizer, problems[:1], 100, 10**6)
    assert stopped.value.code == 2
    assert "error: prompt 0" in capsys.readouterr().err


def test_bf16_weights_swallow_small_updates(grpo, tmp_path):
    """A bf16 number near 0.3 has neighbours 0.002 away: an update of 1e-6 rounds to
    nothing, and the loss is the only thing that moves. Weights are fp32 even if the
    checkpoint is bf16 and products are computed in bf16.
    https://github.com/areal-project/AReaL/issues/1634"""
    tokenizer = char_tokenizer()
    saved = small_qwen3(len(tokenizer)).bfloat16()
    folder = save_model(tmp_path / "model", saved, tokenizer)
    args = cpu_args(grpo, dtype="bfloat16", max_new_tokens=4)
    model, tokenizer = grpo.load_model(folder, args)
    before = [p.detach().clone() for p in model.parameters()]
    types = set()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *call: types.add(call[2].dtype))
    prompts, noise = [[5, 6, 7]], random_noise(8, 4)
    rollout = grpo.generate(model, tokenizer, prompts, noise, args)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0)
    advantages = torch.tensor([1.0, -1.0] * 4)
    grpo.update(model, None, optimizer, rollout, advantages, args)
    assert types == {torch.bfloat16}  # autocast was on
    matrices = 0
    for p, old in zip(model.parameters(), before):
        assert p.dtype == torch.float32
        if p.dim() == 2:
            change = (p.detach() - old).abs()
            assert (change > 0).float().mean() > 0.9
            assert 0.5e-6 < change.mean() < 1.2e-6  # Adam's first step is the rate
            matrices += 1
    assert matrices > 10


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_the_head_is_of_another_formula(grpo, bias, frozen):
    """The backward pass of the log-probs is written out, chunk by chunk. It is that of
    autograd through the plain formula in float64: for hidden states, weight and bias,
    at a temperature, the last chunk a shorter one; with a frozen head there is none of
    the weight; in bf16 it is the same but for rounding; entropies have no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = (10, 6), (30, 6), (30,)
    given = [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]
    targets, factor = torch.randint(30, (10,), generator=generator), torch.randn(10)
    leaves = [x.clone().requires_grad_() for x in given]
    logits = (leaves[0] @ leaves[1].T + leaves[2] * bias) / 0.7
    log_p = logits.log_softmax(-1)
    wanted = log_p[range(10), targets]
    (wanted * factor).sum().backward()
    for dtype in torch.float32, torch.bfloat16:
        x, w, b = (x.float().requires_grad_() for x in given)
        w, b = w.requires_grad_(not frozen), b.requires_grad_(not frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            batch = x / 0.7, w, b / 0.7 if bias else None, targets, 4
            found, entropies = grpo.Logprobs.apply(*batch)
        (found * factor).sum().backward()
        near = 1e-5 if dtype == torch.float32 else 0.03
        same = lambda a, b: (a - b).norm() < near * b.norm()
        assert same(found, wanted) and not entropies.requires_grad
        assert same(entropies, -(log_p.exp() * log_p).sum(-1))
        assert same(x.grad, leaves[0].grad) and x.grad.dtype == torch.float32
        assert (w.grad is None) if frozen else same(w.grad, leaves[1].grad)
        if bias and not frozen:
            assert same(b.grad, leaves[2].grad)


def test_gradient_of_a_likely_token_is_rounded_away(grpo):
    """The gradient of a token is 1 - p. bf16 has no number between 0.996 and 1, so with
    a p in bf16 nearly certain tokens would have none."""
    bias = torch.tensor([8.0, 0, 0, 0], requires_grad=True)
    hidden, weight = torch.ones(1, 2, requires_grad=True), torch.zeros(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        batch = hidden, weight, bias, torch.tensor([0]), 4
        logprobs, _ = grpo.Logprobs.apply(*batch)
    logprobs.sum().backward()
    exact = 3 / (math.exp(8) + 3)
    assert bias.grad[0].item() == pytest.approx(exact, rel=0.01)


def test_chunks_of_the_logits_change_the_gradient(grpo, monkeypatch):
    """Long batches of large vocabularies do not fit in memory, so logits are made chunk
    by chunk; a chunk lost, or in the wrong place, shows nowhere. Log-probs, entropies
    and gradients equal those of all the logits at once; no chunk exceeds the limit."""
    rollout = random_rollout(grpo, 16, [4, 1, 6], [5, 7, 3])
    batch = rollout.tokens, rollout.attention_mask, 7, 0.8
    found, sizes, chunks = [], [], []
    apply, linear = grpo.Logprobs.apply, torch.nn.functional.linear

    def chunked(*inputs):
        chunks.append(inputs[-1])
        return apply(*inputs[:-1], 4)

    def counted(x, weight, *rest):
        sizes.extend([len(x)] if len(weight) == 16 and x.ndim == 2 else [])
        return linear(x, weight, *rest)

    for small in False, True:
        model = small_qwen3(16).double()
        if small:
            monkeypatch.setattr(grpo.Logprobs, "apply", chunked)
            monkeypatch.setattr(torch.nn.functional, "linear", counted)
        logprobs, entropy = grpo.token_logprobs(model, *batch)
        (logprobs * torch.arange(21).view(3, 7)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((logprobs, entropy, gradient))
    assert max(sizes) <= 4 and sum(sizes) == 2 * 15  # made again for the gradient
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        grpo.token_logprobs(model.float(), *batch)
    monkeypatch.undo()
    assert chunks == [2**26 // 16 + 1, 2**27 // 16 + 1]  # 4 bytes a logit, 2 in bf16
    for whole, chunked in zip(*found):
        assert torch.allclose(whole, chunked, rtol=1e-6, atol=1e-6)

    model = small_qwen3(16).double()
    rows = plain_logprobs(model, rollout, 0.8)
    assert torch.allclose(padded(rows, 7).float(), found[0][0], atol=1e-5)
    (padded(rows, 7) * torch.arange(21).view(3, 7)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - found[1][2]).norm() < 1e-6 * gradient.norm()
