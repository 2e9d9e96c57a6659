"""Whole runs on a device that is not the CPU, on a machine that has none: its tensors
say that they are elsewhere, and an operation that mixes the two fails as on a GPU. As
there, copies may, and scalars and indices may be on the CPU. All is computed on the
CPU: nothing is said about a GPU's arithmetic, autocast, compilation or NCCL."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from conftest import cpu_args, load_script
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "lazy"  # a type that torch knows and has no tensors of on its own
MAY_MIX = "aten::_to_copy", "aten::copy_"
JOINS = "aten::stack", "aten::cat"  # scalars, too, have to be there
BY_INDEX = "aten::index", "aten::index_put", "aten::index_put_"
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
RECORDED = []  # the step that a CUDA graph would record, while it is done


class Elsewhere(torch.Tensor):
    """A tensor of that device, by its values, `here`."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        shape = dict(strides=here.stride(), storage_offset=here.storage_offset())
        kwargs = dict(dtype=here.dtype, device=f"{DEVICE}:0")
        self = cls._make_wrapper_subclass(cls, here.shape, **shape, **kwargs)
        self.here = here
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def is_elsewhere(x: object) -> bool:
    return isinstance(x, Elsewhere)


def here(tree):
    """Tensors, lists of them and so on with the values that they stand for."""
    return tree_map(lambda x: x.here if is_elsewhere(x) else x, tree)


def there(tree):
    """The same with all tensors on that device."""
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, tree)


def call(function, args: tuple, kwargs: dict):
    """An operation's result, on the device that a GPU's would be on."""
    name, inputs, waits = (
        function._schema.name,
        (args, kwargs),
        WAITS & {*function.tags},
    )
    away = goes = any(map(is_elsewhere, tree_leaves(inputs)))
    if name in BY_INDEX and is_elsewhere(args[0]):
        indices = [x for x in args[1] if x is not None]
        waits = any(x.dtype == torch.bool or not is_elsewhere(x) for x in indices)
        inputs = args[0], args[2:]
    inputs = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    changed = inputs[:1] if name.endswith("_") else []
    alone = lambda x: x.dim() or name in JOINS or any(x is y for y in changed)
    left = [tuple(x.shape) for x in inputs if not is_elsewhere(x) and alone(x)]
    if away and left and name not in MAY_MIX:
        raise RuntimeError(f"{name}: tensors {left} were left on the CPU")
    if kwargs.get("device") is not None:
        goes = torch.device(kwargs["device"]).type == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    copied = inputs and (away != goes or (away and left))
    if RECORDED and (copied or waits):
        raise RuntimeError(f"{name} cannot be in a CUDA graph")
    result = function(*here(args), **here(kwargs))
    if name == "aten::copy_":
        return args[0]
    if not goes:
        return result
    return return_and_correct_aliasing(function, args, kwargs, there(result))


def record(step):
    """In the place of the scripts' own: step itself, but nothing in it may be what a
    CUDA graph cannot record. (What a graph replays that has changed since:
    test_graph_replays_what_has_moved.)"""

    def replay() -> None:
        RECORDED.append(step)
        try:
            step()
        finally:
            RECORDED.clear()

    return replay


class Device(TorchDispatchMode):
    """Within it tensors can be made there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = kwargs.get("device")
        if made is not None and torch.device(made).type == DEVICE:
            return call(function, args, kwargs)
        return function(*args, **kwargs)


@pytest.fixture
def other_device(monkeypatch):
    """What torch and transformers cannot do with such tensors: lists of their values,
    files, weights that are tied, fused AdamW, autocast. other_device(script) prepares a
    script, which decodes there as for a CUDA graph, but without one."""
    model, tolist = transformers.PreTrainedModel, torch.Tensor.tolist
    move, save_model = model.to, model.save_pretrained
    save, load, tensor = torch.save, torch.load, torch.tensor
    autocast = torch.is_autocast_enabled
    adam = importlib.import_module("torch.optim.adam")

    def to(self, *args, **kwargs):
        moved = move(self, *args, **kwargs)
        moved.tie_weights()
        return moved

    def save_pretrained(self, folder):
        weights = {name: x.clone() for name, x in here(self.state_dict()).items()}
        save_model(self, folder, state_dict=weights)

    def values(self):
        assert not RECORDED, "tolist cannot be in a CUDA graph"
        return tolist(here(self))

    def load_state(file, device, **kwargs):
        state = load(file, "cpu", **kwargs)
        return there(state) if device == DEVICE else state

    patch = monkeypatch.setattr
    patch(torch, "load", load_state)
    patch(torch.Tensor, "tolist", values)
    patch(model, "to", to)
    patch(model, "save_pretrained", save_pretrained)
    patch(torch, "save", lambda x, *args, **kwargs: save(here(x), *args, **kwargs))
    patch(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    patch(torch, "is_autocast_enabled", lambda *x: DEVICE not in x and autocast(*x))

    class Torch(ModuleType):
        """torch, whose tensor() also takes a list of such tensors."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def tensor(self, x, **kwargs):
            elements = isinstance(x, list) and any(map(is_elsewhere, x))
            return tensor([float(y) for y in x] if elements else x, **kwargs)

    def prepare(script):
        patch(script, "torch", Torch("torch"))
        if hasattr(script, "decode"):
            patch(script, "autocast", lambda args: contextlib.nullcontext())
            patch(script, "recordable", lambda model: model.device.type == DEVICE)
            patch(script, "record", record)
        else:
            monkeypatch.setitem(script.PIECE, DEVICE, script.PIECE["cpu"])

    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor: made here, then moved
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield prepare
    torch._C._set_only_lift_cpu_tensors(lifted)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stand_in_takes_what_a_gpu_refuses(other_device):
    """If the stand-in let tensors of the CPU in, all that follows would pass."""
    refused = {
        "add": lambda x: x + torch.ones(2),
        "stack": lambda x: torch.stack([x.sum(), torch.zeros(())]),
        "in place": lambda x: torch.zeros(()).add_(x.sum()),
        "index": lambda x: torch.ones(2)[x.long()],
    }
    with Device():
        x = torch.ones(2, device=DEVICE)
        for name, operation in refused.items():
            with pytest.raises(RuntimeError, match="left on the CPU"):
                operation(x)
                pytest.fail(name)
        assert (x * torch.tensor(2.0) + x[torch.tensor([1, 0])]).tolist() == [3.0, 3.0]
        unrecordable = {
            "value": lambda: x.sum().item(),
            "values": lambda: x.tolist(),
            "mask": lambda: x[x > 0],
            "places": lambda: x.nonzero(),
            "question": lambda: torch.equal(x, x),
            "index": lambda: x[torch.tensor([1, 0])],
            "to": lambda: torch.ones(2).to(x),
            "from": lambda: x.cpu(),
        }
        for name, operation in unrecordable.items():
            with pytest.raises((RuntimeError, AssertionError), match="in a CUDA graph"):
                record(operation)()
                pytest.fail(name)
        record(lambda: x.add_(1).index_fill_(0, x.long() - 2, 5.0))()
        assert x.tolist() == [5.0, 2.0]


TASK = """
import random, zlib

def problems(split, seed):
    rng = random.Random(f"{split} {seed}")
    for _ in range(50):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        yield {"prompt": f"{a}+{b}=", "answer": a + b, "solution": str(a + b)}

def reward(problem, completion):
    return zlib.crc32(completion.encode()) % 5 / 4
"""
SMALL = dict(steps=2, prompts_per_step=4, micro_batch_size=4, max_new_tokens=6)
SMALL |= dict(task="task.py", tiny_steps=10, eval_prompts=4, eval_samples=2)
SMALL |= dict(eval_every=1)
PREFIXES = SMALL | dict(hard_k=1, candidates=16, trace_model="base")
ENVS = dict(steps=2, num_envs=16, minibatch_size=128, eval_episodes=3, eval_every=1)
CASES = {  # name of the script, more words: flags
    "grpo": SMALL | dict(kl_coef=0.1, updates_per_batch=2, mask_truncated=True),
    "grpo lora": SMALL | dict(kl_coef=0.1, lora_rank=2),
    "dmpo": SMALL | dict(kl_coef=0.1),
    "prefixrl": PREFIXES | dict(sft_epochs=1, kl_coef=0.1),
    "prefixrl off-policy": PREFIXES | dict(off_policy=True, prefixes_per_problem=0),
    "vopd": SMALL | dict(teacher_steps=20),
    "vopd full": SMALL | dict(teacher_steps=20, estimator="full"),
    "ppo_envs cartpole": ENVS | dict(ewma_com=2.0),
    "ppo_envs pendulum": ENVS | dict(env="pendulum"),
}


@pytest.mark.parametrize("case", CASES)
def test_tensor_is_left_on_the_cpu_or_waited_for(
    case, tmp_path, monkeypatch, other_device
):
    """One tensor that is made on the CPU ends a run on a GPU at its first use, one look
    at a value in a step of decode its CUDA graph, which a test without a GPU does not
    see. A whole run elsewhere, resumed after its first step, has the metrics of one on
    the CPU."""
    if "lora" in case:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    name, flags = case.split()[0], CASES[case]
    script, found = load_script(name), []
    for device, within in ("cpu", contextlib.nullcontext()), (DEVICE, Device()):
        about = flags | dict(run_dir=device, device="cpu")
        lm = name != "ppo_envs"
        args = cpu_args(script, **about) if lm else script.Args(**about)
        script.check(args)
        args.device = device
        if device == DEVICE:
            other_device(script)
            args.steps = 1
        with within:
            assert script.train(args) == 0
            if device == DEVICE:
                args.steps, args.resume = 2, args.run_dir
                assert script.train(args) == 0
        found.append([json.loads(x) for x in Path(device, "metrics.jsonl").open()])
    for wanted, line in zip(*found, strict=True):
        assert wanted.keys() == line.keys()
        for key in wanted:
            rounding = "delta_logp" in key  # nothing else: 1e-7
            if "second" not in key and "memory" not in key and not rounding:
                assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", ["acrobot", "breakout"])
def test_environment_leaves_a_tensor_on_the_cpu(name, other_device):
    """The same of the environments that no run above has: observations and rewards of a
    few steps elsewhere are those on the CPU."""
    ppo, found = load_script("ppo_envs"), []
    other_device(ppo)
    for device, within in ("cpu", contextlib.nullcontext()), (DEVICE, Device()):
        torch.manual_seed(1)
        env = ppo.make_env(ppo.Args(env=name, device=device, compile="off"), 64)
        with within:
            steps = [[env.reset()]]
            for i in range(20):
                actions = torch.full((64,), i % 3, dtype=torch.uint8, device=device)
                steps.append(env.step(actions))
            assert all(
                is_elsewhere(x) == (device == DEVICE) for x in tree_leaves(steps)
            )
        found.append([x.float() for part in here(steps) for x in part])
    assert all(torch.allclose(x, y) for x, y in zip(*found, strict=True))
    assert found[0][-1].std() > 0


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=60)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)
WINDOW = SIZES | dict(sliding_window=8)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
SHORT = SIZES | dict(max_position_embeddings=16)
MODELS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "dynamic": lambda: transformers.LlamaConfig(**SHORT, rope_parameters=DYNAMIC),
    "Mistral": lambda: transformers.MistralConfig(**WINDOW),
    "Gemma3": lambda: transformers.Gemma3TextConfig(**WINDOW, head_dim=8),
    "Phi3": lambda: transformers.Phi3Config(**SIZES, pad_token_id=0),
    "GPT2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_pass_that_looks_at_values_is_recorded(name, other_device, monkeypatch):
    """A CUDA graph of a model that branches on values of tensors fails while it is
    recorded. Models for which recordable says yes decode without a look at a value, and
    as they do on the CPU; the one for which it says no takes one."""
    grpo = load_script("grpo")
    recordable = grpo.recordable
    other_device(grpo)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    tokens, eos = torch.randint(3, 60, (3, 6)), torch.tensor([1, 2, 4])
    seen = torch.ones_like(tokens)
    seen[0, :3] = 0
    batch = tokens, seen, torch.rand(6, 40, dtype=torch.float64)
    wanted, logprobs = grpo.decode(model, *batch, 1.0, eos)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        expected = recordable(model)
    assert expected == (name != "dynamic")
    with Device():
        model, *batch, ends = (x.to(f"{DEVICE}:0") for x in (model, *batch, eos))
        if not expected:
            with pytest.raises(RuntimeError, match="cannot be in a CUDA graph"):
                grpo.decode(model, *batch, 1.0, ends)
            return
        found, again = here(grpo.decode(model, *batch, 1.0, ends))
    mask, truncated = grpo.completion_mask(wanted, eos)
    assert torch.equal(found * mask, wanted * mask) and not truncated.all()
    torch.testing.assert_close(again * mask, logprobs * mask)
