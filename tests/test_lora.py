"""--lora-rank trains and saves adapters alone; with them off the model is the base."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    PLUGIN,
    ROOT,
    Finished,
    char_tokenizer,
    cpu_args,
    load_script,
    metrics_of,
    random_rollout,
    save_model,
    small_qwen3,
)
from safetensors.torch import load_file

peft = pytest.importorskip("peft", reason="pip install -r benchmarks/requirements.txt")

SMALL = dict(task="task.py", model="model", device="cpu", run_dir="run", steps=2)
SMALL |= dict(prompts_per_step=2, group_size=4, max_new_tokens=4, warmup_steps=0)
SMALL |= dict(eval_prompts=2, eval_samples=2, eval_every=2, learning_rate=1e-2)
SMALL |= dict(lora_rank=2)
OWN = {
    "grpo": dict(kl_coef=0.1, updates_per_batch=2),
    "vopd": dict(teacher="teacher"),
    "dmpo": dict(kl_coef=0.1),
    "prefixrl": dict(kl_coef=0.1, candidates=8, hard_k=8, trace_cap=64, sft_epochs=1),
}
MEASURED = "seconds", "tokens_per_second", "peak_memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student, a teacher, and the student with 28 rows of padding in its head."""
    folder, tokenizer = tmp_path_factory.mktemp("lora"), char_tokenizer()
    for seed, name in enumerate(("model", "teacher")):
        save_model(folder / name, small_qwen3(len(tokenizer), seed), tokenizer)
    save_model(folder / "padded", small_qwen3(len(tokenizer) + 28), tokenizer)
    (folder / "task.py").write_text(PLUGIN)
    return folder


@pytest.fixture
def cli(folder, tmp_path, monkeypatch, capsys):
    """cli(script, flag=value, ...) is the command line of a script, run in this process
    and in a folder with models and task; cli.model is what it saved last."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(name: str, **flags) -> Finished:
        script = load_script(name)
        values = flags if "resume" in flags else SMALL | OWN[name] | flags
        words = [(f"--{k.replace('_', '-')}", str(v)) for k, v in values.items()]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *sum(words, ())])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        save, code = script.save_checkpoint, 0

        def keep(run_dir, step, model, *rest):
            run.model = model
            save(run_dir, step, model, *rest)

        monkeypatch.setattr(script, "save_checkpoint", keep)
        capsys.readouterr()
        try:
            script.train(script.parse_args())
        except SystemExit as stop:
            code = stop.code
        finally:
            monkeypatch.setattr(script, "save_checkpoint", save)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Finished(code, *capsys.readouterr())

    return run


def adapters(model) -> dict[str, torch.Tensor]:
    """Copies of the adapters' weights, by name."""
    weights = model.named_parameters()
    return {k: w.detach().clone() for k, w in weights if "lora_" in k}


def equal(a: dict, b: dict) -> bool:
    """The same names, types and weights, bit for bit."""
    same = lambda x, y: x.dtype == y.dtype and torch.equal(x, y)
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)


def scored(script, model, args) -> torch.Tensor:
    """Log-probs (6, 9) of random completions."""
    rollout = random_rollout(script, 90, [3, 5, 2, 4, 6, 3], [9, 4, 7, 1, 8, 5])
    inputs = rollout.tokens, rollout.attention_mask
    with torch.no_grad(), script.autocast(args):
        return script.token_logprobs(model, *inputs, 9, 1.0)[0]


def check_trained(script, cli, args) -> None:
    """After a run that began at model/: the base is that model in the type of --dtype,
    bit for bit; the checkpoint has the adapters in fp32 and no other weights; loaded,
    it is the trained model, and not the base."""
    base, dtype = load_file("model/model.safetensors"), getattr(torch, args.dtype)
    weights = dict(cli.model.named_parameters())
    frozen = {k: w.data for k, w in weights.items() if "lora_" not in k}
    frozen = {k.replace(".base_layer", ""): w for k, w in frozen.items()}
    assert equal(frozen, {k: w.to(dtype) for k, w in base.items()})
    names = {path.name for path in Path("run/checkpoint").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "state.pt"} <= names
    assert "model.safetensors" not in names
    saved = load_file("run/checkpoint/adapter_model.safetensors")
    trained = {k.replace(".default", ""): w for k, w in adapters(cli.model).items()}
    assert equal(saved, {f"base_model.model.{k}": w for k, w in trained.items()})
    assert all(w.dtype == torch.float32 for w in saved.values())
    assert all(w.any() for w in saved.values())  # B began at 0
    loaded, _ = script.load_model("run/checkpoint", args)
    script.add_lora(loaded, args)
    wanted = scored(script, cli.model.eval(), args)
    assert torch.equal(scored(script, loaded, args), wanted)
    start, _ = script.load_model("model", args)
    assert (scored(script, start, args) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", OWN)
def test_base_weights_move_or_checkpoint_is_another_model(name, cli):
    """An optimiser that also holds the base, or a step before it is frozen, trains what
    is not saved: whoever loads the adapter has another model than the one evaluated."""
    result = cli(name)
    assert result.code == 0, result
    script = load_script(name)
    check_trained(script, cli, cpu_args(script, lora_rank=2))


@pytest.mark.parametrize("name", OWN)
def test_adapters_are_rounded_to_bf16(name, cli):
    """In bf16 a step of 1e-5 on a weight of 1e-2 is lost: with --dtype bfloat16 the
    frozen weights are kept in it, the adapters, and what is saved of them, in fp32."""
    result = cli(name, dtype="bfloat16")
    assert result.code == 0, result
    script = load_script(name)
    check_trained(script, cli, cpu_args(script, lora_rank=2, dtype="bfloat16"))


@pytest.mark.parametrize("name", OWN)
def test_resume_starts_other_adapters(name, cli, tmp_path):
    """2 steps + 2 steps are 4, bit for bit: adapters that begin again at 0, Adam's
    moments given to other tensors, or a KL that now starts from the trained model."""
    for run_dir, steps in (("whole", 4), ("half", 2)):
        result = cli(name, run_dir=run_dir, steps=steps)
        assert result.code == 0, result
    result = cli(name, resume="half", steps=4)
    assert result.code == 0, result
    half, whole = tmp_path / "half", tmp_path / "whole"
    files = [x / "checkpoint/adapter_model.safetensors" for x in (half, whole)]
    assert equal(*map(load_file, files))
    states = [torch.load(x / "checkpoint/state.pt") for x in (half, whole)]
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == 28
    assert all(equal(moments[0][i], moments[1][i]) for i in moments[0])
    logs = [
        [{k: v for k, v in x.items() if not k.startswith(MEASURED)} for x in lines]
        for lines in map(metrics_of, (half, whole))
    ]
    assert logs[0] == logs[1] and [x["step"] for x in logs[0]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["grpo", "dmpo", "prefixrl"])
def test_reference_is_the_adapted_model(name, folder):
    """With the adapters left on, the KL's reference is the model itself and the KL is 0
    for ever; left off afterwards, the base is trained on, or nothing. One update is
    that with a base loaded apart, to the bit."""
    script, path = load_script(name), str(folder / "model")
    args = cpu_args(script, kl_coef=0.5, lora_rank=2, normalization="token")
    rollout = random_rollout(script, 90, [3, 5, 2, 4], [9, 4, 7, 5])
    rollout.rewards, advantages = torch.tensor([[1.0, 0], [0, 1]]).flatten(), None
    advantages = script.group_advantages(rollout.rewards, 2)
    models, (base, _) = [], script.load_model(path, args)
    for _ in range(2):
        models.append(script.load_model(path, args)[0])
        script.add_lora(models[-1], args)
        torch.manual_seed(5)
        for weight in models[-1].parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1)
    own, apart = models
    batch = rollout.tokens, rollout.attention_mask, 9, args.temperature
    with torch.no_grad():
        rollout.logprobs, wanted = (
            script.token_logprobs(model, *batch)[0] * rollout.completion_mask
            for model in (own, base)
        )
    kl = ((rollout.logprobs - wanted) ** 2 / 2).sum() / rollout.completion_mask.sum()
    assert kl > 0.1
    before, stats = adapters(own), []
    for model, reference, rank in ((own, own, 2), (apart, base, 0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        args = script.dataclasses.replace(args, lora_rank=rank)
        around = optimizer, rollout, advantages, args
        stats.append(script.update(model, reference, *around))
    assert stats[0]["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert stats[0] == stats[1]
    after = adapters(own)
    assert equal(after, adapters(apart))
    assert not any(torch.equal(after[k], before[k]) for k in after)
    assert all(w.requires_grad == ("lora_" in k) for k, w in own.named_parameters())
    assert torch.equal(scored(script, own, args), scored(script, apart, args))
    assert (scored(script, own, args) - scored(script, base, args)).abs().max() > 0.1


@pytest.mark.parametrize("name", OWN)
def test_ranks_start_from_different_adapters(name, folder):
    """The ranks add up gradients and never compare weights: adapters drawn from
    whatever state the random numbers are in train a different model on each rank. They
    are a function of the seed."""
    script, drawn = load_script(name), []
    for state, seed in ((1, 1), (2, 1), (1, 2)):
        args = cpu_args(script, lora_rank=2, seed=seed)
        model, _ = script.load_model(str(folder / "model"), args)
        torch.manual_seed(state)
        torch.rand(state)
        script.add_lora(model, args)
        drawn.append(adapters(model))
    assert equal(drawn[0], drawn[1])
    first = [k for k in drawn[0] if "lora_A" in k]
    assert len(first) == 14  # 7 linear layers in each of 2 blocks
    assert not any(torch.equal(drawn[0][k], drawn[2][k]) for k in first)


@pytest.mark.parametrize("name", OWN)
def test_adapter_forgets_its_end_tokens(name, cli):
    """A student takes over its teacher's end tokens; saved as an adapter and loaded
    again it would go on beyond them, where only the base's count."""
    script, folder = load_script(name), Path("run/checkpoint")
    assert cli(name, steps=1).code == 0
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 50]}')
    loaded = script.load_model(str(folder), cpu_args(script))
    assert script.stop_ids(*loaded) == [1, 50]


@pytest.mark.parametrize("name", OWN)
def test_adapter_without_a_tokenizer_cannot_be_loaded(name, cli):
    """Many adapters are published without tokenizer files: theirs are the base's."""
    assert cli(name, steps=1).code == 0
    script, args = load_script(name), cpu_args(load_script(name), lora_rank=2)
    model, own = script.load_model("run/checkpoint", args)
    for path in Path("run/checkpoint").glob("tokenizer*"):
        path.unlink()
    again, words = script.load_model("run/checkpoint", args)
    assert words.get_vocab() == own.get_vocab()
    assert torch.equal(scored(script, again, args), scored(script, model, args))


def test_padded_vocabulary_is_saved_and_cannot_be_loaded(cli):
    """Most models have more rows than tokens, and vopd.py cuts them off. A checkpoint
    that has the shorter embedding in it fits no base, and the run cannot go on."""
    for flags in (dict(run_dir="whole", steps=4), dict(run_dir="half", steps=2)):
        assert cli("vopd", model="padded", **flags).code == 0
    result = cli("vopd", resume="half", steps=4)
    assert result.code == 0, result
    saved = [
        load_file(f"{x}/checkpoint/adapter_model.safetensors")
        for x in ("half", "whole")
    ]
    assert equal(*saved) and all("lora_" in k for k in saved[0])
    weights = cli.model.named_parameters()
    assert all(w.requires_grad == ("lora_" in k) for k, w in weights)


@pytest.mark.parametrize("name", OWN)
def test_adapter_goes_on_with_another_rank(name, cli):
    """An adapter given as --model has a rank: under another --lora-rank the run would
    not be the one that its args.json tells of, without it nothing could be trained. It
    goes on with its own."""
    assert cli(name, steps=1).code == 0
    config = json.loads(Path("run/checkpoint/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    for rank in 0, 4:
        result = cli(name, model="run/checkpoint", run_dir="more", lora_rank=rank)
        assert result.code == 2 and len(result.errors) == 1
        assert "--lora-rank 2" in result.errors[0]
        assert not Path("more").exists()
    before = adapters(cli.model)
    flags = dict(model="run/checkpoint", run_dir="more", learning_rate=1e-9)
    assert cli(name, **flags).code == 0
    after = adapters(cli.model)
    assert all((after[k] - before[k]).abs().max() < 1e-6 for k in before)


def save_adapter(folder: str, base: str, seed: int, dropout: float = 0.0) -> None:
    """An adapter of rank 2 and of random weights for the model in the folder `base`."""
    script = load_script("grpo")
    model, tokenizer = script.load_model(base, cpu_args(script))
    shape = dict(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=dropout)
    model.add_adapter(peft.LoraConfig(**shape))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", OWN)
def test_dropout_of_an_adapter_is_on(name, folder, tmp_path):
    """Adapters made elsewhere mostly have dropout: left on, what is scored is not what
    was sampled from, and rho is not 1 at the first update."""
    script = load_script(name)
    save_adapter(str(tmp_path / "adapter"), str(folder / "model"), 3, dropout=0.5)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.5
    args = cpu_args(script, lora_rank=2)
    model, _ = script.load_model(str(tmp_path / "adapter"), args)
    script.add_lora(model, args)
    wanted = scored(script, model.eval(), args)
    assert torch.equal(scored(script, model.train(), args), wanted)


def test_adapter_loads_in_one_folder_alone(cli, tmp_path, monkeypatch):
    """A base given by a relative path is not found from another working directory: the
    saved adapter has its whole path."""
    assert cli("grpo").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    script = load_script("grpo")
    args = cpu_args(script, lora_rank=2)
    loaded, _ = script.load_model("../run/checkpoint", args)
    wanted = scored(script, cli.model.eval(), args)
    assert torch.equal(scored(script, loaded, args), wanted)


@pytest.mark.parametrize("teacher", ["adapter", "base"])
def test_shared_teacher_is_the_student(teacher, cli, tmp_path, monkeypatch):
    """A teacher on the student's own weights is that teacher loaded apart, to the bit:
    with the student's adapter on in its passes the KL would be 0, with the teacher's
    left on the student would be the teacher, or the teacher be trained. None of its
    frozen weights is a copy, the cut-off embedding and head included."""
    shutil.copytree("padded", "copy")  # the same weights, not the same folder
    save_adapter("student", "padded", seed=1)
    pair = ["padded", "copy"]
    if teacher == "adapter":
        pair = ["teacher-model", "teacher-copy"]
        for name, base in zip(pair, ("padded", "copy")):
            save_adapter(name, base, seed=2, dropout=0.5)
    script, seen = load_script("vopd"), []
    whole = script.update

    def update(model, teacher, *rest):
        weights = [
            {x.data_ptr() for k, x in part.named_parameters() if "lora_" not in k}
            for part in (model, teacher)
        ]
        seen.append(weights[0] == weights[1] or len(weights[0] & weights[1]))
        return whole(model, teacher, *rest)

    monkeypatch.setattr(script, "update", update)
    for name in pair:
        flags = dict(model="student", teacher=name, run_dir=f"of-{name}")
        result = cli("vopd", **flags)
        assert result.code == 0, result
    assert seen == [True, True, 0, 0]
    folders = [tmp_path / f"of-{name}" for name in pair]
    files = [x / "checkpoint/adapter_model.safetensors" for x in folders]
    assert equal(*map(load_file, files))
    logs = [
        [{k: v for k, v in x.items() if not k.startswith(MEASURED)} for x in lines]
        for lines in map(metrics_of, folders)
    ]
    assert logs[0] == logs[1]
    assert logs[0][0]["eval/reverse_kl"] > 0.1 and logs[0][-1]["grad_norm"] > 0
    assert logs[0][0]["eval/teacher_reverse_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["of-teacher", "model"])
def test_sharing_of_weights_changes_a_model(cli, name):
    """The student and the teacher say what they said before, and the student's adapter
    alone is trained, also after a failed pass of the teacher."""
    save_adapter("student", "model", seed=1)
    save_adapter("of-teacher", "model", seed=2)
    script = load_script("vopd")
    args = cpu_args(script, lora_rank=2, teacher=name)
    model, _ = script.load_model("student", args)
    script.add_lora(model, args)
    before, ids = adapters(model), torch.tensor([[5, 6, 7]])
    teacher, _ = script.load_teacher([], args)
    wanted = model(ids).logits, teacher(ids).logits
    assert not torch.equal(*wanted)
    script.share_weights(teacher, model)
    assert torch.equal(teacher(ids).logits, wanted[1])
    teacher.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher(ids)
    assert torch.equal(model(ids).logits, wanted[0])
    assert equal(adapters(model), before)
    assert all(x.requires_grad == ("lora_" in k) for k, x in model.named_parameters())


@pytest.mark.parametrize("kind", ["biases", "ia3"])
def test_sharing_overwrites_what_an_adapter_trained(kind, tmp_path):
    """An adapter of a teacher may have trained biases of the base, or not be of LoRA:
    what differs from the student's weights is not shared, all else is."""
    script, tokenizer = load_script("vopd"), char_tokenizer()
    base = small_qwen3(len(tokenizer), attention_bias=True)
    base = save_model(tmp_path / "base", base, tokenizer)
    args = cpu_args(script, lora_rank=2, teacher=str(tmp_path / "teacher"))
    model, _ = script.load_model(base, args)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    if kind == "biases":
        config = peft.LoraConfig(r=2, target_modules="all-linear", bias="all")
    model.add_adapter(config)
    trained = [x for x in model.parameters() if x.requires_grad]
    for weight in trained:
        weight.data += 0.1 * torch.randn_like(weight)
    save_model(tmp_path / "teacher", model, tokenizer)
    teacher, _ = script.load_teacher([], args)
    student, _ = script.load_model(base, args)
    script.add_lora(student, args)
    ids = torch.tensor([[5, 6, 7]])
    wanted = teacher(ids).logits, student(ids).logits
    assert not torch.equal(*wanted)
    script.share_weights(teacher, student)
    assert torch.equal(teacher(ids).logits, wanted[0])
    assert torch.equal(student(ids).logits, wanted[1])
    theirs, ours = ([x.data_ptr() for x in m.parameters()] for m in (teacher, student))
    assert len({*theirs} - {*ours}) == len(trained)


def test_shared_teacher_is_said_to_be_untrained(cli, monkeypatch):
    """transformers reports an adapter of the student as missing from the teacher's
    files, newly initialised and in need of training, if both are on one model: each is
    loaded on its own, and nobody is told so."""
    save_adapter("student", "model", seed=1)
    save_adapter("of-teacher", "model", seed=2)
    said, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        assert cli("vopd", model="student", teacher="of-teacher").code == 0
        before = len(said)
        cli.model.load_adapter("of-teacher", "teacher")  # the report is there to see
    finally:
        logger.removeHandler(handler)
    texts = [record.getMessage().lower() for record in said]
    assert "missing" in "".join(texts[before:]), texts
    assert "missing" not in "".join(texts[:before]), texts


@pytest.mark.parametrize("more", ["head", "embedding"])
def test_adapter_of_embeddings_or_head_is_half_switched(more, folder, tmp_path, cli):
    """Copies of whole modules stay off once the adapters were off for the reference,
    and a head's adapter is not switched for the teacher: refused, in one line."""
    how = dict(target_modules=["lm_head"]) if more == "head" else {}
    how = how or dict(target_modules="all-linear", modules_to_save=["embed_tokens"])
    tokenizer = char_tokenizer()
    model = small_qwen3(len(tokenizer), tie_word_embeddings=False)
    save_model(tmp_path / "base", model, tokenizer)
    peft.get_peft_model(model, peft.LoraConfig(r=2, **how)).save_pretrained("bad")
    config = json.loads(Path("bad/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    Path("bad/adapter_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained("bad")
    result = cli("grpo", model="bad")
    assert result.code == 2 and len(result.errors) == 1, result
    assert "more than LoRA" in result.errors[0] and not Path("run").exists()


def test_flags_for_a_small_gpu_train_all_weights(ranks, tmp_path):
    """What README recommends for 8 GB is measured with its adapters, which stand beside
    the weights, and has a gradient."""
    words = ROOT / "benchmarks/gpu.py", "--smoke", "--out", tmp_path
    words = *words, "--parts", "flags-8gb", "step-grpo-0.6B"
    code = ranks.run(1, *words, cwd=tmp_path)
    parts = json.loads((tmp_path / "gpu-smoke.json").read_text())["parts"]
    assert code == [0], [row["error"] for row in parts.values()]
    small, whole = (row["found"] for row in parts.values())
    assert "--lora-rank 32" in small["flags"] and small["stats"]["grad_norm"] > 0
    assert small["parameters"] > whole["parameters"]
