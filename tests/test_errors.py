"""A user's mistake is one line on stderr and exit code 2; nothing is written."""

from __future__ import annotations

import errno
import functools
import gc
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    PLUGIN,
    char_tokenizer,
    cpu_args,
    load_script,
    metrics_of,
    run_script,
    save_model,
    script_path,
    small_qwen3,
)
from matplotlib.figure import Figure
from safetensors.torch import load_file

LINE = {"prompt": "1+1=", "answer": "2"}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and every empty folder."""
    paths = [
        path for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)
    ]
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in paths}


def check(result, *words: str) -> str:
    """One line, exit code 2, and the words in that line; returns the line."""
    assert result.code == 2, result
    assert len(result.errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.errors[0]
    return result.errors[0]


@pytest.fixture
def refused(cli, tmp_path):
    """refused(*flags, words=...) checks that the command line is refused in one line
    and that it writes nothing, not even the run's parent folder."""

    def run(*flags: str, words: tuple[str, ...] = ()) -> str:
        before = tree(tmp_path)
        if "--resume" not in flags and "--run-dir" not in flags:
            flags += ("--run-dir", "runs/grpo/new")
        line = check(cli(*flags), *words)
        assert tree(tmp_path) == before
        return line

    return run


def test_mistake_at_the_real_command_line_shows_a_traceback(tmp_path):
    """What a shell sees, once for all other tests here: exit code 2 and one line in
    all, on stderr."""
    process = run_script(
        script_path("grpo"), "--task", "sudoku", cwd=tmp_path, timeout=60
    )
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_task_falls_back_to_another(refused):
    """A task that does not exist must not become the default one."""
    assert "countdown" in refused("--task", "sudoku", words=("sudoku",))
    refused("--task", "countdown-1", words=("countdown-1",))
    refused("--task", "countdown-99", words=("countdown-99",))
    refused("--task", "no/such/task.py", words=("no/such/task.py",))


def test_group_of_one_trains_on_nothing(refused):
    """With one completion the advantage is 0 or NaN for ever
    (https://github.com/Jiayi-Pan/TinyZero/issues/89)."""
    refused("--group-size", "1", words=("--group-size",))


def test_zero_or_negative_size_crashes_later(refused, grpo):
    """A size below 1 must not get as far as the loop, an endless one neither; every
    number of the command line is tried."""
    numbers = {f.name: f.type for f in grpo.dataclasses.fields(grpo.Args)}
    numbers = {k: v for k, v in numbers.items() if "int" in v or "float" in v}
    assert len(numbers) > 15
    for name, kind in numbers.items():
        flag = f"--{name.replace('_', '-')}"
        wrong = ["-1"] if kind == "int" else ["-0.5", "nan", "inf", "-inf"]
        may_be_0 = {"seed", "warmup_steps", "kl_coef", "clip_low", "clip_high"}
        may_be_0 |= {"lora_rank"}
        for value in wrong + ([] if name in may_be_0 else ["0"]):
            refused(flag, value, words=(flag, value.removesuffix(".0")))


def test_clip_of_one_or_more_allows_any_ratio(refused):
    """1 - e_low of 0 or below is no lower clip at all."""
    refused("--clip-low", "1.0", words=("--clip-low",))


def test_typo_in_a_flag_is_ignored(refused):
    """A flag that is dropped silently trains with the default: the line names the flag,
    and says which was meant."""
    refused("--group-sizes", "4", words=("--group-sizes", "--group-size INT"))
    assert refused("--group-sizes", "4").lower().count("unrecognized") == 1
    refused("--steps", "many", words=("--steps", "many"))
    refused("--steps", "1.5", words=("--steps",))
    refused("--normalization", "batch", words=("--normalization", "constant"))
    refused("--temperature", words=("--temperature",))


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_unreadable_data_shows_a_traceback(refused, tmp_path, flag):
    """Missing, a folder, not UTF-8, empty: the line names the file, be it that of
    --data or that of --eval-data."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(
        '{"prompt": "é", "answer": 1}'.encode("latin1")
    )
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "good.jsonl").write_text(f"{json.dumps(LINE)}\n" * 30)
    first = ("--data", "good.jsonl") if flag == "--eval-data" else ()
    for name in ("missing.jsonl", "folder", "latin.jsonl", "empty.jsonl"):
        refused(*first, flag, name, words=(name,))


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_bad_line_of_data_is_skipped_or_blamed_on_another(refused, tmp_path, flag):
    """The line says which file, which line and why."""
    lines = [json.dumps(LINE | {"prompt": f"{i}+1="}) for i in range(30)]
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    first = ("--data", "good.jsonl") if flag == "--eval-data" else ()
    missing = "no object with a prompt and an answer"
    for wrong, reason in (
        ('{"prompt": "1+1="', "delimiter"),
        ('{"prompt": "1+1="}', missing),
        ('{"answer": "2"}', missing),
        ('["1+1=", "2"]', missing),
        ("12", missing),
        ("null", missing),
    ):
        (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:6], wrong, *lines[7:]]))
        refused(*first, flag, "bad.jsonl", words=("bad.jsonl", "line 7", reason))


def test_data_too_short_for_a_batch_loops_for_ever(refused, tmp_path):
    """Fewer problems than a batch needs: the line says how many there are."""
    lines = [json.dumps(LINE | {"prompt": f"{i}+1="}) for i in range(5)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    refused(
        "--data", "short.jsonl", "--prompts-per-step", "8", words=("short.jsonl", "4")
    )


def test_rank_has_nothing_to_evaluate(grpo, tmp_path, monkeypatch, capsys):
    """A tenth of ten lines is one problem: a second rank has none to evaluate, and
    fails long after the start. Eleven lines are enough, although they leave just one
    batch to train on."""
    monkeypatch.setattr(grpo, "WORLD_SIZE", 2)
    args = cpu_args(grpo, data=str(tmp_path / "data.jsonl"), prompts_per_step=9)
    lines = [json.dumps(LINE | {"prompt": f"{i}+1="}) + "\n" for i in range(11)]
    Path(args.data).write_text("".join(lines[:10]))
    with pytest.raises(SystemExit, match="2"):
        grpo.load_task(args)
    assert "and 1 to evaluate" in capsys.readouterr().err
    Path(args.data).write_text("".join(lines))
    assert [len(problems) for problems in grpo.load_task(args)[:2]] == [9, 2]


def test_flag_without_effect_is_accepted(refused, tmp_path):
    """--eval-data belongs to --data; alone it would be ignored without a word."""
    (tmp_path / "good.jsonl").write_text(f"{json.dumps(LINE)}\n" * 30)
    refused("--eval-data", "good.jsonl", words=("--eval-data",))


def test_prompt_without_room_in_the_context_is_cut(refused, tmp_path):
    """A prompt that is cut in silence asks another question; one that is not runs out
    of positions at the last tokens. The line names the prompt and both lengths."""
    lines = [json.dumps(LINE | {"prompt": f"{i}+1="}) for i in range(30)]
    lines[12] = json.dumps(LINE | {"prompt": "long " * 25})  # 125 tokens + 4 > 128
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    refused("--data", "long.jsonl", words=("125", "124", "long long"))
    refused("--max-new-tokens", "200", words=("train 0:",))
    lines[12] = json.dumps(LINE | {"prompt": ""})
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    refused("--data", "long.jsonl", words=("0 tokens",))


def test_chat_messages_without_a_template_are_joined_somehow(refused, tmp_path):
    """A tokenizer without a chat template cannot render messages, and a guess trains on
    prompts that the model has never seen."""
    chat = [{"role": "user", "content": "1+1?"}]
    lines = [json.dumps(LINE | {"prompt": chat})] * 10
    lines += [json.dumps(LINE | {"prompt": f"{i}"}) for i in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    refused("--data", "chat.jsonl", words=("template",))


PLUGINS = {
    "no reward": (PLUGIN.replace("def reward", "def score"), "reward"),
    "no problems": (PLUGIN.replace("def problems", "def tasks"), "problems"),
    "syntax error": (PLUGIN.replace("def reward(", "def reward("[:-1]), "SyntaxError"),
    "problems without yield": (
        PLUGIN.replace("yield {", "return {")
        .replace("for i in", "i = 0  #")
        .replace("        return {", "    {"),
        "task.py",
    ),
    "problem without names": (
        PLUGIN.replace(
            '{"prompt": f"{split} {i}:", "answer": i}', '(f"{split} {i}:", i)'
        ),
        "no object with a prompt and an answer",
    ),
    "problem without answer": (
        PLUGIN.replace('"answer"', '"target"'),
        "no object with a prompt and an answer",
    ),
    "reward of None": (PLUGIN.replace("return sum", "sum"), "reward"),
    "reward of text": (PLUGIN.replace("return sum", 'return "1" or sum'), "reward"),
    "reward of nan": (
        PLUGIN.replace("return sum", 'return float("nan") or sum'),
        "nan",
    ),
    "reward of inf": (
        PLUGIN.replace("return sum", 'return float("inf") or sum'),
        "inf",
    ),
    "reward of a complex number": (
        PLUGIN.replace("return sum", "return 1j or sum"),
        "",
    ),
    "problems that break": (
        PLUGIN.replace("        yield", "        1 / (i < 5)\n        yield"),
        "problems failed: ZeroDivisionError",
    ),
    "half a character": (PLUGIN.replace("{split} {i}", "\\ud800{i}"), "surrogates"),
    "reward of a list": (PLUGIN.replace("return sum", "return [1.0] or sum"), "reward"),
    "reward of an array": (
        "import numpy\n" + PLUGIN.replace("return sum", "return numpy.ones(1) or sum"),
        "is not a finite number",
    ),
    "reward beyond float32": (
        PLUGIN.replace("return sum", "return 1e39 or sum"),
        "is not a finite number",
    ),
    "reward of one argument": (PLUGIN.replace("problem, comp", "comp"), "argument"),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_broken_plug_in_fails_after_the_model_is_loaded(refused, grpo, tmp_path, name):
    """A plug-in is tried before anything slow starts: a reward that is no finite number
    must neither pass as one nor stop the run an hour later
    (https://github.com/huggingface/trl/issues/5773)."""
    source, reason = PLUGINS[name]
    (tmp_path / "task.py").write_text(source)
    refused(words=(reason,))


def test_reward_that_breaks_later_is_swallowed(cli, tmp_path):
    """An exception taken for reward 0 hides a broken reward for a whole run
    (https://github.com/verl-project/verl/issues/5839): the line has the sample's index,
    its prompt, its text, the reason and the place of it, and the last checkpoint is
    whole."""
    calls = "CALLS = []\n\n\n" + PLUGIN.replace(
        "    return sum",
        "    CALLS.append(completion)\n    CALLS[26:] and 1 / 0\n    return sum",
    )
    # 1 trial, 4 in the evaluation, 8 in each step: the 27th is number 5 of step 3
    (tmp_path / "task.py").write_text(calls)
    place = calls[: calls.index("1 / 0")].count("\n") + 1
    words = "ZeroDivisionError", "sample 5, prompt 'train ", f"(task.py, line {place})"
    line = check(cli("--steps", "9", "--save-every", "1"), *words)
    logged = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").open()]
    assert [record["step"] for record in logged] == [0, 1, 2]
    text = line.partition("completion ")[2]
    assert text[0] in "'\"" and text[1:5].strip(text[0])
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 2


@pytest.mark.parametrize("kind", [np.bool_, np.float32, torch.tensor])
def test_reward_that_is_a_number_is_refused(grpo, kind):
    """np.isclose(a, b) is a number as good as True, and so is a tensor of one."""
    found = grpo.score(
        lambda _, text: kind(text == "a"), [grpo.Problem("", 0)] * 2, "ab"
    )
    assert found.tolist() == [1.0, 0.0] and found.dtype == torch.float32


def test_mark_of_a_windows_editor_is_a_bad_line(grpo, tmp_path):
    """Excel and Notepad begin UTF-8 with a byte order mark."""
    lines = "".join(json.dumps(LINE | {"prompt": f"{i}é="}) + "\n" for i in range(40))
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    args = cpu_args(grpo, data=str(tmp_path / "bom.jsonl"), prompts_per_step=2)
    train, held_out, _ = grpo.load_task(args)
    assert {p.prompt for p in train + held_out} == {f"{i}é=" for i in range(40)}


@pytest.mark.parametrize(
    "flag, answer", [("--data", " "), ("--eval-data", None), ("--data", True)]
)
def test_empty_answer_pays_for_an_empty_completion(refused, tmp_path, flag, answer):
    """Prompts exported without answers: "" is what an empty completion says, and a
    model that stops at once gets a reward for each. null is no answer "None", nor is
    true an answer "True"."""
    lines = [LINE | {"prompt": f"{i}"} for i in range(40)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    lines[7]["answer"] = answer
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    flags = {"--data": "good.jsonl", "--eval-data": "good.jsonl", flag: "bad.jsonl"}
    words = [word for pair in flags.items() for word in pair]
    refused(*words, words=("bad.jsonl, line 8", "answer is empty"))


SCRIPTS = "grpo", "vopd", "dmpo", "prefixrl"
QUESTION = {"role": "user", "content": "q"}


@pytest.mark.parametrize("prompt, word", [
    (None, "neither text nor messages"),
    (5, "neither text nor messages"),
    ([], "neither text nor messages"),
    (QUESTION, "neither text nor messages"),
    (["q"], "neither text nor messages"),
    ([{"from": "human", "value": "q"}], "neither text nor messages"),
    ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "neither text"),
    ([QUESTION, {"role": "assistant", "content": "a"}], "end with an answer"),
])  # fmt: skip
def test_template_drops_the_question(refused, tmp_path, prompt, word):
    """Messages of another shape than the chat template reads are rendered without what
    they say, and an empty prompt is trained on; one that ends with the answer has it in
    the prompt."""
    lines = [LINE | {"prompt": f"{i}"} for i in range(40)] + [LINE | {"prompt": prompt}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    refused("--data", "d.jsonl", words=("d.jsonl, line 41", word))


def test_data_has_the_reward_of_a_task(refused, tmp_path):
    """--data with --task: one of the two would be read, and nobody told which."""
    (tmp_path / "d.jsonl").write_text(json.dumps(LINE))
    words = ("--data or --task",)
    refused("--data", "d.jsonl", "--task", "countdown-4", words=words)


def test_all_problems_are_held_out_and_nobody_says_so(refused, tmp_path):
    """A task.py that yields the same for both splits has nothing left to train on."""
    (tmp_path / "task.py").write_text(PLUGIN.replace("{split}", "same"))
    refused("--eval-prompts", "12", words=("task.py: 0", "of 12, without those held"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_weights_that_are_missing_are_random(refused, tmp_path, name):
    """A folder saved without its head or a layer loads with a report that scrolls by;
    the reference of the KL term, loaded again, then is another model."""
    script, tokenizer = load_script(name), char_tokenizer()
    model = small_qwen3(len(tokenizer), tie_word_embeddings=False)
    save_model(tmp_path / "whole", model, tokenizer)
    script.load_model(str(tmp_path / "whole"), cpu_args(script))
    save_model(tmp_path / "half", model.base_model, tokenizer)
    with pytest.raises(SystemExit) as stop:
        script.load_model(str(tmp_path / "half"), cpu_args(script))
    assert stop.value.code == 2


def test_task_cannot_use_what_lies_beside_it(grpo, tmp_path, monkeypatch):
    """A task.py imports a file of its own folder, and yields Problems of a module."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/beside_it.py").write_text(PLUGIN)
    text = "import collections, beside_it\nfrom beside_it import reward\n"
    text += "Own = collections.namedtuple('Own', 'prompt answer')\n"
    text += "def problems(*x):\n    return (Own(**y) for y in beside_it.problems(*x))\n"
    (tmp_path / "sub/task.py").write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    args = grpo.Args(task=str(tmp_path / "sub/task.py"), prompts_per_step=2)
    train, _, _ = grpo.load_task(args)
    assert train[3] == grpo.Problem("train 3:", 3, "")


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_more_ranks_than_gpus_are_a_traceback(name, monkeypatch, capsys):
    """torchrun with more processes than the machine has GPUs: each that has none says
    so in one line."""

    def absent(number):
        assert number == 1  # this node's, though its rank is 0 here
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors ...")

    script = load_script(name)
    args = script.Args(device="cuda")
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", absent)
    monkeypatch.setattr(script, "parse_args", lambda: args)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)  # is not reached
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "GPU of its own" in error and "invalid device ordinal" in error


@pytest.mark.parametrize("name", ["grpo", "dmpo", "prefixrl"])
def test_reference_is_copied_for_a_gradient(name, train, monkeypatch):
    """Autocast keeps a bf16 copy of each weight that may get a gradient: of a reference
    that nobody trains, too, half as much memory again."""
    script, seen = load_script(name), []
    real = script.update

    def update(model, reference, *rest):
        seen.append({x.requires_grad for x in reference.parameters()})
        assert all(x.requires_grad for x in model.parameters())
        return real(model, reference, *rest)

    monkeypatch.setattr(script, "update", update)
    load = script.parse_args
    kl = lambda: script.dataclasses.replace(load(), kl_coef=0.1)
    monkeypatch.setattr(script, "parse_args", kl)
    assert train(name, PLUGIN)[0] == 0 and seen[0] == {False}


@pytest.fixture
def train(small_folder, tmp_path, tmp_path_factory, monkeypatch, capsys):
    """train(name, plugin, *flags): exit code and stderr of a small run of that script,
    in this process, with a task.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    new = f"--task task.py --model {small_folder} --device cpu --steps 1 --run-dir run"
    new += " --prompts-per-step 2 --max-new-tokens 4 --eval-prompts 2"
    tokenizer = char_tokenizer()
    teacher = save_model(
        tmp_path_factory.mktemp("teacher") / "other",
        small_qwen3(len(tokenizer), seed=1),
        tokenizer,
    )
    more = {"vopd": f" --teacher {teacher}"}
    more |= {"prefixrl": " --candidates 8 --prefixes-per-problem 0"}

    def run(name: str, plugin: str, *flags: str) -> tuple[int, str]:
        script, words = load_script(name), flags or run.new(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        (tmp_path / "task.py").write_text(plugin)
        try:
            code = script.train(script.parse_args())
        except SystemExit as stop:
            code = stop.code
        gc.collect()  # the lock of a failed run: its frames refer to themselves
        return code, capsys.readouterr().err

    run.new = lambda name: (new + more.get(name, "")).split()
    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_rate_does_not_rise_or_noise_repeats(name, train, monkeypatch):
    """The learning rate rises over the warm-up (vopd.py's then falls), weights do not
    decay, and each step has noise of its own: a run that is compared with itself would
    not show it."""
    script, numbers, rates, decays = load_script(name), [], [], set()
    draw, step = script.uniforms, script.optimizer_step
    note = lambda *x: numbers.append(x[1]) or draw(*x)
    monkeypatch.setattr(script, "uniforms", functools.wraps(draw)(note))

    def note_rate(model, optimizer, *rest):
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        decays.add(group["weight_decay"])
        return step(model, optimizer, *rest)

    monkeypatch.setattr(script, "optimizer_step", note_rate)
    flags = "--steps", "3", "--warmup-steps", "2", "--learning-rate", "0.01"
    flags += ("--decay-steps", "50") if name == "vopd" else ()
    assert train(name, PLUGIN, *train.new(name), *flags)[0] == 0
    steps = [x for x in numbers if 0 < x < 10**9]  # 0: evaluations, 10^9: a search
    assert steps == [1, 2, 3]
    falls = [1 + s / 50 if name == "vopd" else 1 for s in steps]
    expected = [rate / fall for rate, fall in zip((0.005, 0.01, 0.01), falls)]
    assert rates == pytest.approx(expected) and decays == {0}


@pytest.mark.parametrize("name, tiny, other", [
    ("grpo", "1e-4", "1e-6"),
    ("vopd", "1e-3", "1e-5"),
    ("dmpo", "3e-4", "1e-6"),
    ("prefixrl", "3e-4", "1e-6"),
])  # fmt: skip
def test_real_model_has_the_rate_of_a_toy(name, tiny, other, monkeypatch, capsys):
    """A rate that is right for a million parameters destroys a billion: each kind of
    model has the default that --help states. Ranks share the prompts of a step evenly,
    or the means over the ranks weigh some more than others."""
    script = load_script(name)
    for model, wanted in (("tiny", tiny), ("a/folder", other)):
        args = script.Args(device="cpu", model=model)
        if name == "vopd":
            args.teacher = "b/folder"
        script.check(args)
        assert args.learning_rate == float(wanted)
    stated = rf"learning_rate: .*default: {tiny} for tiny, (else )?{other}\b"
    assert re.search(stated, script_path(name).read_text())
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(SystemExit) as stop:
        script.check(args)
    assert stop.value.code == 2 and "ranks must divide" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoint_is_not_due_or_a_stop_is_ignored(name, train, monkeypatch, tmp_path):
    """A run that saves at its end alone is lost by a crash, and one that does not look
    for a Ctrl-C is killed. --save-every 2: steps 2, 4 and the last; a stop in step 2:
    that step is saved, and the run ends with the code of an interrupt."""
    script, saved, stops, steps = load_script(name), [], [], []
    save, update, new = script.save_checkpoint, script.update, train.new(name)
    note = lambda *x: saved.append(x[1]) or save(*x)
    monkeypatch.setattr(script, "save_checkpoint", note)
    monkeypatch.setattr(script, "catch_stops", lambda: stops)
    assert train(name, PLUGIN, *new, "--steps", "5", "--save-every", "2")[0] == 0
    assert saved == [0, 2, 4, 5]

    def interrupted(*x):
        steps.append(1)
        stops.extend([1] if len(steps) == 2 else [])
        return update(*x)

    monkeypatch.setattr(script, "update", interrupted)
    shutil.rmtree(tmp_path / "run")
    assert train(name, PLUGIN, *new, "--steps", "5", "--save-every", "9")[0] == 130
    assert saved == [0, 2, 4, 5, 0, 2] and len(steps) == 2
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == metrics_of(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_reward_that_breaks_at_once_leaves_half_a_run(name, train):
    """A reward that fails on a model's text, not on the trial, fails in the search or
    the first evaluation. A folder made before that would refuse the same command once
    the reward is mended, and be no run to resume either."""
    broken = PLUGIN.replace("return", "1 / bool(not completion)\n    return")
    code, errors = train(name, broken)
    assert code == 2 and "ZeroDivisionError" in errors
    assert train(name, PLUGIN)[0] == 0


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_failed_reward_loses_the_steps_before_it(name, step, train, tmp_path):
    """A reward that fails in a step, hours after the last save, has not changed the
    weights: all that there was before it is saved, and with the reward mended the run
    goes on as if nothing had happened."""
    whole, steps = tmp_path / "whole", ("--steps", "4", "--save-every", "100")
    assert train(name, PLUGIN, *train.new(name), *steps)[0] == 0
    (tmp_path / "run").rename(whole)
    lines = f"    log = 'run/metrics.jsonl'\n    {step} == "
    lines += "(os.path.exists(log) and open(log).read().count('\\n')) and 1 / 0\n"
    broken = "import os\n" + PLUGIN.replace("    return", f"{lines}    return")
    code, errors = train(name, broken, *train.new(name), *steps)
    assert code == 2 and "ZeroDivisionError" in errors
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == step - 1
    assert train(name, PLUGIN, "--resume", "run")[0] == 0
    assert [x["step"] for x in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]
    file = "checkpoint/model.safetensors"
    saved, wanted = load_file(tmp_path / "run" / file), load_file(whole / file)
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", SCRIPTS)
def test_failed_evaluation_loses_the_steps_before_it(name, train, tmp_path):
    """A reward that fails on a held-out problem does so after an update: that step is
    saved and in the logs, without its evaluation, and the run goes on from there."""
    steps = "--steps", "4", "--save-every", "100", "--eval-every", "2"
    assert train(name, PLUGIN, *train.new(name), *steps)[0] == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    lines = "    log = 'run/metrics.jsonl'\n    'eval' in problem.prompt and 2 == ("
    lines += "os.path.exists(log) and open(log).read().count('\\n')) and 1 / 0\n"
    broken = "import os\n" + PLUGIN.replace("    return", f"{lines}    return")
    code, errors = train(name, broken, *train.new(name), *steps)
    assert code == 2 and "ZeroDivisionError" in errors
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 2
    assert train(name, PLUGIN, "--resume", "run")[0] == 0
    whole, run = (metrics_of(tmp_path / folder) for folder in ("whole", "run"))
    assert not any("eval/" in key for key in run[2])
    assert [x["step"] for x in run] == [0, 1, 2, 3, 4]
    for a, b in zip(whole, run):
        assert a.keys() == b.keys() or a["step"] == 2
        assert all(a[k] == b[k] for k in b if not re.search("second|memory", k))


@pytest.mark.parametrize("name", SCRIPTS)
def test_too_little_memory_for_a_rollout_loses_the_steps_before_it(
    name, train, tmp_path, monkeypatch
):
    """Completions grow until the memory of a GPU is too small for them. The weights are
    whole then: what was trained is saved, and goes on in smaller batches."""
    script = load_script(name)
    generate = script.generate

    def full(*args):
        log = tmp_path / "run/metrics.jsonl"
        if log.exists() and log.read_text().count("\n") == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args)

    monkeypatch.setattr(script, "generate", full)
    steps = "--steps", "4", "--save-every", "100", "--eval-every", "100"
    with pytest.raises(torch.OutOfMemoryError):
        train(name, PLUGIN, *train.new(name), *steps)
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 2
    monkeypatch.setattr(script, "generate", generate)
    smaller = "--rollout-batch-size", "4", "--micro-batch-size", "8"
    assert train(name, PLUGIN, "--resume", "run", *smaller)[0] == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_failed_update_loses_the_steps_before_it(name, train, tmp_path):
    """Most want of memory is in the backward pass of a batch of long completions.
    Before the first optimiser step the weights are those of the step before: it is
    saved, and the run goes on from there."""
    script, due = load_script(name), []
    scored = "last_hidden" if name == "vopd" else "token_logprobs"
    real, begin = getattr(script, scored), script.without_noise

    def update_begins(model):
        log = tmp_path / "run/metrics.jsonl"
        due[:] = [1] if log.exists() and log.read_text().count("\n") == 3 else []
        begin(model)

    def fails(*args):
        if due:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    steps = "--steps", "4", "--save-every", "100", "--eval-every", "100"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(script, "without_noise", update_begins)
        patch.setattr(script, scored, fails)
        train(name, PLUGIN, *train.new(name), *steps)
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 2
    gc.collect()  # the lock of the failed run
    smaller = "--rollout-batch-size", "4", "--micro-batch-size", "8"
    assert train(name, PLUGIN, "--resume", "run", *smaller)[0] == 0
    assert [x["step"] for x in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", SCRIPTS)
def test_diverged_weights_replace_the_last_checkpoint(name, train, tmp_path):
    """A gradient of NaN: no step is made with it, and the weights that have it are not
    saved over older ones, from which another run may begin."""
    script, made = load_script(name), []
    step = script.optimizer_step

    def diverges(model, *rest):
        made.append(1)
        for p in model.parameters() if len(made) == 3 else ():
            p.grad = None if p.grad is None else p.grad * math.nan
        return step(model, *rest)

    steps = "--steps", "4", "--save-every", "100", "--eval-every", "100"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "optimizer_step", diverges)
        code, errors = train(name, PLUGIN, *train.new(name), *steps)
    assert code == 2 and "error: the gradient norm is nan: no step was" in errors
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 0
    assert [x["step"] for x in metrics_of(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("name", ["grpo", "dmpo", "prefixrl"])
def test_half_updated_weights_are_saved_as_the_step_before(name, train, tmp_path):
    """An error in the second update on a batch: the weights are of no step any more,
    and saved as those of the step before they would be trained on twice."""
    script, steps = load_script(name), ["--steps", "4", "--updates-per-batch", "2"]
    step, loss, made = script.optimizer_step, script.policy_loss, []

    def fails(*args):
        if len(made) == 5:  # between the two of step 3
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(script, "optimizer_step", lambda *x: made.append(1) or step(*x))
        patch.setattr(script, "policy_loss", fails)
        train(name, PLUGIN, *train.new(name), *steps, "--save-every", "100")
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["step"] == 0  # the last save


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_too_little_memory_is_a_traceback(name, monkeypatch, capsys, tmp_path):
    """What most users of a GPU meet first ends in one line that names the flags, and
    whether there is a run to go on with."""
    script = load_script(name)

    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB")
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    wanted = {gpu: "CUDA out of memory. Tried to allocate", RuntimeError(words): words}

    def full(args):
        raise why

    monkeypatch.setattr(script, "train", full)
    monkeypatch.setattr(script, "parse_args", lambda: args)
    for folder, why in itertools.product(("nowhere", str(tmp_path)), wanted):
        args = script.Args(device="cpu", run_dir=folder)
        with pytest.raises(SystemExit) as stop:
            script.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        for flag in re.findall("--[a-z-]+", error):
            assert flag[2:].replace("-", "_") in vars(script.Args())
        size = "--minibatch-size" if name == "ppo_envs" else "--micro-batch-size"
        assert size in error and wanted[why] in error
        goes_on = folder != "nowhere" and name != "ppo_envs"
        assert ("--resume" in error) == goes_on == ("start again" not in error)
    why = RuntimeError("a bug, not memory")
    with pytest.raises(RuntimeError, match="a bug"):
        script.main()


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_ranks_give_up_while_one_is_at_work(name, monkeypatch):
    """The first rank makes the built-in model, or its reward takes an hour: the others
    wait for longer than the ten minutes after which NCCL ends a job."""
    script, seen = load_script(name), {}
    start = lambda backend, timeout: seen.update({backend: timeout})
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    gather = lambda flags, mine: flags.__setitem__(slice(None), [mine] * 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in "cpu", "cuda":
        script.join_ranks(script.Args(device=device))
    assert [*seen] == ["gloo", "nccl"]
    assert all(timeout.total_seconds() >= 3600 for timeout in seen.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_rank_without_a_problem_fails_later(name, monkeypatch, capsys):
    """More ranks than problems to evaluate are refused by the flag that is wrong."""
    script = load_script(name)
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    flags = dict(device="cpu") | (dict(teacher="folder") if name == "vopd" else {})
    script.check(script.Args(**flags, eval_prompts=2))
    with pytest.raises(SystemExit, match="2"):
        script.check(script.Args(**flags, eval_prompts=1))
    assert "--eval-prompts" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_ranks_cannot_exchange_on_their_device(name, monkeypatch, capsys):
    """Neither gloo nor NCCL knows Apple's GPUs: a traceback from the first exchange."""
    script = load_script(name)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)  # is not reached
    script.join_ranks(script.Args(device="mps"))  # one process is fine
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit, match="2"):
        script.join_ranks(script.Args(device="mps"))
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_stop_while_a_rank_waits_is_taken_for_its_death(name, monkeypatch):
    """The second Ctrl-C may come while a rank waits for another one. It ends the rank,
    and is no error of the others: to save then would be to exchange words that they do
    not expect."""
    script, saved = load_script(name), []
    monkeypatch.setattr(script, "save_checkpoint", lambda *_: saved.append(1))
    monkeypatch.setattr(script, "all_reduce", lambda _: sys.exit(130))
    lost = script.nothing_lost(cpu_args(script), 1, ())
    with pytest.raises(SystemExit, match="130"), lost:
        pass
    assert not saved


@pytest.mark.parametrize("name", SCRIPTS)
def test_full_disk_hides_what_ended_the_run(name, monkeypatch):
    """If the step cannot be saved either, the first error is still the one shown."""
    script = load_script(name)
    full = lambda *_: script.fail("cannot save: the disk is full")
    monkeypatch.setattr(script, "save_checkpoint", full)
    lost = script.nothing_lost(cpu_args(script), 1, ())
    with pytest.raises(InterruptedError), lost:
        raise InterruptedError


FOLDER_SCRIPTS = *SCRIPTS, "ppo_envs"


@pytest.mark.parametrize("name", FOLDER_SCRIPTS)
def test_two_processes_write_in_one_folder(name, tmp_path):
    """A run that is resumed while it is still running logs its steps twice, and two
    saves are mixed in one checkpoint: the second process is refused, until the first
    is gone."""
    script = load_script(name)
    args = script.Args(run_dir=str(tmp_path / "run"), device="cpu")
    rest = [] if name == "ppo_envs" else [{}]
    held = script.open_run(args, 0, *rest)
    args.resume, before = args.run_dir, tree(tmp_path)
    with pytest.raises(SystemExit) as end:
        script.open_run(args, 0, *rest)
    assert end.value.code == 2 and tree(tmp_path) == before
    held.close()
    assert script.open_run(args, 0, *rest)


@pytest.mark.parametrize("name", FOLDER_SCRIPTS)
def test_run_of_another_script_is_continued(name, tmp_path, monkeypatch, capsys):
    """grpo.py's flags are among dmpo.py's, which would go on with its run as DMPO, and
    grpo.py could not take it back: a run of other flags is refused, and named."""
    for other in FOLDER_SCRIPTS:
        flags = vars(load_script(other).Args())
        folder = tmp_path / other
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"args": flags}))
        torch.save({"step": 1}, folder / "checkpoint/state.pt")
        words = [f"{name}.py", "--resume", str(folder), "--steps", "1"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            load_script(name).parse_args()
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1
        assert ("is at step 1 already" if name == other else "another script") in error


@pytest.mark.parametrize("name", FOLDER_SCRIPTS)
def test_name_of_a_folder_is_read_as_mathematics(name, tmp_path):
    """matplotlib reads what stands between two dollars as a formula: a run in such a
    folder ended at its first save."""
    folder = tmp_path / "a$x_$"
    folder.mkdir()
    line = dict(step=0, transitions=0, reward_mean=1.0, episode_return=1.0)
    lines = (line | dict(step=i, transitions=i) for i in range(3))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    load_script(name).draw_curve(folder)
    assert (folder / "curve.png").exists()


def test_picture_that_cannot_be_drawn_is_a_traceback(tmp_path, capsys):
    """A full disk, or a folder in the place of the picture, is one line."""
    for name in FOLDER_SCRIPTS:
        folder = tmp_path / name
        (folder / "curve.png").mkdir(parents=True)
        line = '{"step": 1, "transitions": 1, "reward_mean": 1, "episode_return": 1}\n'
        (folder / "metrics.jsonl").write_text(line)
        with pytest.raises(SystemExit) as end:
            load_script(name).draw_curve(folder)
        assert end.value.code == 2 and "cannot draw" in capsys.readouterr().err


def test_cache_that_cannot_be_written_is_found_after_the_work(
    refused, grpo, tmp_path, monkeypatch
):
    """In a folder where nothing can be written the built-in model was trained for
    minutes and then was a traceback; a disk that is full at its end left half of it."""
    (tmp_path / "runs").write_text("a file")
    monkeypatch.setattr(grpo, "warm_start", lambda *_: 1 / 0)
    flags = ("--task", "countdown", "--model", "tiny", "--run-dir", "x")
    flags += ("--max-new-tokens", "24")
    refused(*flags, words=("cannot write runs/cache/tiny-",))
    (tmp_path / "runs").unlink()

    class Part:
        def save_pretrained(self, folder: Path) -> None:
            Path(folder, "half").write_text("")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(grpo, "warm_start", lambda *_: [Part()])
    (tmp_path / "runs/cache").mkdir(parents=True)
    refused(*flags, words=("cannot write", "No space left"))


def test_name_that_no_folder_can_have_is_a_traceback(refused):
    """Too long for the file system."""
    refused("--run-dir", 300 * "a", words=("--run-dir", "too long"))


@pytest.mark.parametrize("name", FOLDER_SCRIPTS)
def test_seed_beyond_torch_is_a_traceback(name, monkeypatch, capsys):
    """A seed made of a date and a time may have more than 64 bits."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--seed", str(10**20)])
    with pytest.raises(SystemExit) as end:
        load_script(name).parse_args()
    assert end.value.code == 2 and "--seed must be below" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["traces.jsonl", "metrics.jsonl"])
def test_lost_file_of_a_run_is_a_traceback(lost, train, tmp_path):
    """prefixrl.py reads its traces and its FLOPs from the folder that it resumes."""
    assert train("prefixrl", PLUGIN)[0] == 0
    (tmp_path / "run" / lost).unlink()
    code, errors = train("prefixrl", PLUGIN, "--resume", "run", "--steps", "2")
    assert code == 2 and "run cannot be resumed" in errors and lost in errors


@pytest.mark.parametrize("name", SCRIPTS)
def test_optimiser_of_another_version_is_a_traceback(name, train, tmp_path):
    """A state that was saved for other parameters is named in one line."""
    assert train(name, PLUGIN)[0] == 0
    file = tmp_path / "run/checkpoint/state.pt"
    state = torch.load(file, weights_only=True)
    state["optimizer"]["param_groups"][0]["params"].append(10**6)
    torch.save(state, file)
    code, errors = train(name, PLUGIN, "--resume", "run", "--steps", "2")
    assert code == 2 and "state.pt cannot be resumed" in errors


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_ctrl_c_before_the_first_step_is_a_traceback(
    name, tmp_path, monkeypatch, capsys
):
    """A Ctrl-C while the model is loaded or made leaves nothing to save: the run ends
    with a shell's 130, without a page of frames."""
    script = load_script(name)
    interrupt = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "train", interrupt)
    monkeypatch.setattr(script, "outlive_pipes", lambda: None)  # it changes pytest's
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu"])
    with pytest.raises((SystemExit, KeyboardInterrupt), match="130"):
        script.main()
    assert interrupt.called and capsys.readouterr().err == ""
    assert not [*tmp_path.iterdir()]


def test_prompt_has_a_token_that_the_model_has_not(grpo, capsys):
    """A tokenizer with more tokens than the embedding has rows: an index error in the
    middle of a rollout, on a GPU an error of some later kernel. The last row is one."""
    tokenizer = char_tokenizer()
    problems = [grpo.Problem("ab", None), grpo.Problem("a~", None)]
    last = tokenizer("~")["input_ids"][0]
    ids = grpo.encode_prompts(tokenizer, problems, 50, last + 1)
    assert ids[1][-1] == last > ids[0][-1]
    with pytest.raises(SystemExit, match="2"):
        grpo.encode_prompts(tokenizer, problems, 50, last)
    said = capsys.readouterr().err
    assert said.startswith("error: prompt 1 ('a~')") and f"token {last}" in said


class Payload:
    """An object of a pickle that runs code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("taken over",)


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_checkpoint_of_a_stranger_runs_code(name, tmp_path, monkeypatch, capsys):
    """state.pt is a pickle: one from elsewhere could run anything at --resume. Only
    tensors and numbers are read, in each of the two places."""
    script = load_script(name)
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoint").mkdir(parents=True)
    Path("run/args.json").write_text(json.dumps({"args": vars(script.Args())}))
    torch.save({"step": 1, "optimizer": Payload()}, "run/checkpoint/state.pt")
    monkeypatch.setattr(sys, "argv", [name, "--resume", "run", "--steps", "9"])
    with pytest.raises(SystemExit, match="2"):
        script.parse_args()
    if name != "ppo_envs":
        args = cpu_args(script, resume="run")
        with pytest.raises(SystemExit, match="2"):
            script.make_optimizer(small_qwen3(20), args)
    said = capsys.readouterr().err
    assert said.count("error: ") == said.count("UnpicklingError") >= 1
    assert not Path("taken over").exists()
    torch.load("run/checkpoint/state.pt", weights_only=False)
    assert Path("taken over").exists()


def test_stray_file_becomes_part_of_a_checkpoint(grpo, small_folder, tmp_path):
    """What a killed save left in checkpoint.new must not come into the next one: an
    adapter's config there makes another model of it."""
    model, tokenizer = grpo.load_model(small_folder, cpu_args(grpo))
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new/adapter_config.json").write_text("{}")
    optimizer = torch.optim.SGD(model.parameters())
    grpo.save_checkpoint(tmp_path, 1, model, tokenizer, optimizer)
    assert not (tmp_path / "checkpoint/adapter_config.json").exists()
    assert (tmp_path / "checkpoint/model.safetensors").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_solution_that_is_no_text_is_a_traceback(name, train):
    """Only the built-in model needs worked answers: a number there, or null, must not
    stop a run of another one."""
    script, values = load_script(name), "[i, None, 0, 'x'][i % 4]"
    plugin = PLUGIN.replace('"answer": i', f'"answer": i, "solution": {values}')
    assert plugin != PLUGIN and train(name, plugin)[0] == 0
    line = dict(prompt="a", answer=1)
    for value, wanted in ((0, "0"), (12, "12"), (None, ""), ("x", "x")):
        for item in script.Problem("a", 1, value), line | {"solution": value}:
            assert script.to_problem(item) == script.Problem("a", 1, wanted)
    assert script.to_problem(line) == script.Problem("a", 1, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_run_goes_on_with_another_reference_or_teacher(name, train, tmp_path):
    """The folder of --model or --teacher holds other weights by now, of a run that went
    on there: the second half of the curve is about another KL."""
    folder, tokenizer = tmp_path / "frozen", char_tokenizer()
    save_model(folder, small_qwen3(len(tokenizer), seed=2), tokenizer)
    flags = ["--teacher", str(folder)]
    if name != "vopd":
        flags = ["--model", str(folder), "--kl-coef", "0.1"]
    assert train(name, PLUGIN, *train.new(name), *flags)[0] == 0
    again = "--resume", "run", "--steps"
    assert train(name, PLUGIN, *again, "2")[0] == 0
    save_model(folder, small_qwen3(len(tokenizer), seed=3), tokenizer)
    code, errors = train(name, PLUGIN, *again, "3")
    assert code == 2 and "error: reference or teacher differs" in errors


@pytest.mark.parametrize("name", SCRIPTS)
def test_run_goes_on_with_other_problems(name, train):
    """The order of the data is by place: a file that has grown, or a plug-in that goes
    through a set, makes a resumed run another one, in silence. The line says so."""
    assert train(name, PLUGIN)[0] == 0
    for change in "range(1, 13)", "range(13)", "reversed(range(12))":
        other = PLUGIN.replace("range(12)", change)
        code, errors = train(name, other, "--resume", "run", "--steps", "2")
        assert code == 2 and "error: problems differ" in errors, change
    assert train(name, PLUGIN, "--resume", "run", "--steps", "2")[0] == 0


def test_missing_model_shows_a_traceback(refused, tmp_path):
    """A folder that is not there, and one without a model."""
    refused("--model", "./no/such/model", words=("./no/such/model", "no folder"))
    (tmp_path / "empty").mkdir()
    refused("--model", "./empty", words=("./empty",))


def test_hub_without_network_hangs(refused, monkeypatch):
    """Without a network a hub name must fail within a minute, and say why; nobody has
    to know of HF_HUB_OFFLINE. The waits between attempts are counted, not waited
    for."""
    waited = []

    def unknown_host(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    monkeypatch.setattr(time, "sleep", waited.append)
    start = time.perf_counter()
    refused("--model", "nobody/no-such-model", words=("nobody/no-such-model",))
    assert time.perf_counter() - start + sum(waited) < 60


def test_hub_name_is_taken_for_a_path(cli, small_folder, tmp_path):
    """A hub name loads the model of that name, here one downloaded before: in a process
    of its own, since the hub's library reads its environment when it is imported."""
    model = tmp_path / "hub/models--our--small"
    shutil.copytree(small_folder, model / f"snapshots/{'0' * 40}")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0" * 40)
    flags = "--task task.py --device cpu --steps 1 --prompts-per-step 2 --group-size 4"
    flags += " --max-new-tokens 4 --eval-prompts 2 --eval-samples 2 --kl-coef 0.1"
    cli(*flags.split(), "--run-dir", "local")  # the KL's reference is loaded by name
    flags += " --run-dir hub/run --model our/small"
    env = dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = run_script(script_path("grpo"), *flags.split(), cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    own, same = (metrics_of(tmp_path / name) for name in ("hub/run", "local"))
    assert own[0] == same[0] and own[1]["reward_mean"] == same[1]["reward_mean"]
    assert own[1]["kl"] < 1e-9


def test_peft_is_missing_and_the_run_begins(refused, monkeypatch):
    """Only --lora-rank needs peft. Without it the line says how to get it, and no run
    folder is left."""
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("--lora-rank", "2", words=("--lora-rank", "pip install peft"))


def test_code_of_a_model_is_run(grpo, small_folder, tmp_path, monkeypatch):
    """A model's folder may hold Python, which transformers runs if one types y. Nothing
    is asked here, and nothing of it is run."""
    shutil.copytree(small_folder, tmp_path / "model")
    trace, files = tmp_path / "trace", tmp_path / "model"
    own = dict(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (files / "config.json").write_text(json.dumps(own))
    code = f"from transformers import PretrainedConfig\nopen({str(trace)!r}, 'w')\n"
    code += "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    (files / "own.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SystemExit) as stop:
        grpo.load_model(str(files), cpu_args(grpo))
    assert stop.value.code == 2 and not trace.exists()


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo_envs"])
def test_variable_of_a_scheduler_is_a_traceback(name, tmp_path):
    """WORLD_SIZE without RANK is not torchrun's, but a scheduler's."""
    done = run_script(script_path(name), cwd=tmp_path, WORLD_SIZE="2")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: WORLD_SIZE is set, but not by torchrun")
    assert not [*tmp_path.iterdir()]


def test_model_that_cannot_stop_is_trained(refused, tmp_path):
    """Without an EOS token every completion runs to the limit."""
    tokenizer = char_tokenizer(pad_token="<pad>")
    save_model(tmp_path / "no-eos", small_qwen3(len(tokenizer)), tokenizer)
    refused("--model", "./no-eos", words=("EOS",))


def test_tokenizer_without_files_is_made_up(refused, tmp_path):
    """From a folder of weights alone transformers makes a tokenizer without words: the
    error would be one about the first prompt, which has no tokens."""
    small_qwen3(16).save_pretrained(tmp_path / "weights")
    refused("--model", "./weights", words=("tokenizer", "no words"))


def test_token_without_an_embedding_is_looked_up(refused, tmp_path):
    """Tokens added to a tokenizer but not to the model: on a GPU an assertion of the
    device that names neither."""
    tokenizer = char_tokenizer()
    save_model(tmp_path / "few", small_qwen3(len(tokenizer) - 50), tokenizer)
    refused("--model", "./few", words=("prompt 0", "embedding of token"))


def test_absent_device_shows_a_traceback(refused, monkeypatch):
    """--device cuda where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("--device", "cuda", words=("cuda", "--device cpu"))


def test_second_run_writes_into_the_folder_of_the_first(refused, tmp_path):
    """Mixed logs of two runs cannot be told apart: a folder that exists, or a file in
    its place, is left as it is."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "file").write_text("mine")
    refused("--run-dir", "run", words=("run exists",))
    refused("--run-dir", "file", words=("file exists",))
    refused("--run-dir", "file/run", words=("file/run",))


def test_resume_goes_on_with_other_flags(cli, refused, tmp_path):
    """A continued run under other flags is neither the old run nor a new one. What is
    not a run, contradicts it, or is finished already, is refused; the run is untouched,
    and goes on afterwards under the flags of its start."""
    assert cli("--steps", "2").code == 0
    (tmp_path / "other").mkdir()
    refused("--resume", "no/such/run", words=("no/such/run",))
    refused("--resume", "other", words=("other",))
    refused("--resume", "task.py", words=("task.py",))
    for name, value in {
        "seed": "2",
        "group-size": "8",
        "learning-rate": "0.1",
        "kl-coef": "0.5",
        "task": "countdown",
        "model": "tiny",
        "run-dir": "elsewhere",
        "normalization": "sequence",
    }.items():
        flags = ("--resume", "run", "--steps", "4", f"--{name}", value)
        refused(*flags, words=(f"--{name} ", "run"))
    refused("--resume", "run", words=("step 2",))
    refused("--resume", "run", "--steps", "2", words=("step 2",))
    refused("--resume", "run", "--steps", "1", words=("step 2",))
    (tmp_path / "torn").mkdir()
    for name in ("args.json", "checkpoint"):
        (tmp_path / "run" / name).rename(tmp_path / "torn" / name)
        refused("--resume", "run", "--steps", "3", words=("run",))
        (tmp_path / "torn" / name).rename(tmp_path / "run" / name)
    assert cli("--resume", "run", "--steps", "3", "--save-every", "1").code == 0
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", [20_000, 170_000], ids=["model", "optimiser"])
def test_full_disk_destroys_the_last_checkpoint(cli, tmp_path, limit):
    """A checkpoint that is written in place is torn when the disk fills: the old one
    stays whole, what is half written goes, and there is one line
    (https://github.com/vwxyzjn/cleanrl/issues/399 lost more than that)."""
    assert cli("--steps", "1").code == 0
    before = tree(tmp_path / "run" / "checkpoint")
    sizes = [len(x) for x in before.values()]
    assert any(x > limit for x in sizes)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # Python ignores SIGXFSZ
    try:
        result = cli("--resume", "run", "--steps", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    check(result, "cannot save step 2")
    assert tree(tmp_path / "run" / "checkpoint") == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {name for name in names if "checkpoint" in name} - {"checkpoint"}
    assert load_file(tmp_path / "run/checkpoint/model.safetensors")
    assert cli("--resume", "run", "--steps", "2").code == 0


def test_full_disk_while_drawing_shows_a_traceback(cli, tmp_path, monkeypatch):
    """The picture is the last thing written; a disk full by then is no bug either."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", full)
    check(cli("--steps", "1"), "No space left")
    assert load_file(tmp_path / "run/checkpoint/model.safetensors")


def test_full_disk_at_resume_destroys_the_run(cli, tmp_path, monkeypatch):
    """Whoever opens args.json to write it anew and then finds the disk full has lost
    the flags, and the run with them: it must go on once there is space."""
    assert cli("--steps", "1").code == 0
    real = Path.open

    def full(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        if "w" not in mode or not self.name.startswith("args"):
            return file
        file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        patched.setattr(
            Path, "write_text", lambda self, text, *_, **__: full(self, "w").write(text)
        )
        check(cli("--resume", "run", "--steps", "2"), "No space left")
    assert cli("--resume", "run", "--steps", "2").code == 0
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [0, 1, 2]


def test_model_that_cannot_be_decoded_is_a_traceback(refused, tmp_path):
    """A model with a recurrent state has more than keys and values to be cached: found
    when it is loaded, not at the first rollout with the run folder made."""
    tokenizer = char_tokenizer()
    config = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    config |= dict(state_size=4, eos_token_id=1, max_position_embeddings=128)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    save_model(tmp_path / "mamba", model, tokenizer)
    refused("--model", "./mamba", words=("./mamba", "keys and values"))


def test_head_of_more_than_one_layer_is_scored_by_its_last(refused, tmp_path):
    """ModernBERT has a dense layer and a norm between the last hidden state and the
    head. Log-probs of the head alone are another model's, and no flag of its config
    says so: two tokens do."""
    tokenizer = char_tokenizer()
    config = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16)
    config |= dict(num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    config |= dict(eos_token_id=1, bos_token_id=1, cls_token_id=1, sep_token_id=1)
    config = transformers.ModernBertDecoderConfig(**config)
    model = transformers.ModernBertDecoderForCausalLM(config)
    save_model(tmp_path / "modern", model, tokenizer)
    refused("--model", "./modern", words=("./modern", "head"))


@pytest.mark.parametrize("key", [
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
])  # fmt: skip
def test_rescaled_logits_are_scored_by_the_bare_head(grpo, key):
    """Gemma 2, Cohere, Granite and Falcon-H1 change their logits after the head, which
    the chunked log-probs would not: such a model is refused, by the name of what does
    it."""
    model = small_qwen3(12)
    grpo.check_scores(model)
    setattr(model.config, key, 1.0)  # changes nothing
    grpo.check_scores(model)
    setattr(model.config, key, 30.0)
    with pytest.raises(ValueError, match=key):
        grpo.check_scores(model)


def test_answer_of_a_plug_in_names_the_cache(grpo, monkeypatch, tmp_path):
    """The tiny model starts from prompts and worked answers. An answer may be any
    object; its address, or the order of a set, is another one in each process, which
    would warm its model up anew and leave another folder."""
    names = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "warm_start", lambda *_: ())
    monkeypatch.setattr(Path, "rename", lambda self, new: names.append(new.name))
    for solution, answer in (("1", object()), ("1", {1, 2}), ("2", 0)):
        grpo.tiny_model([grpo.Problem("1", answer, solution)], 1, steps=2)
    assert names[0] == names[1] != names[2]
    for other in ("9", 1, 2, 128), ("1", 9, 2, 128), ("1", 1, 9, 128), ("1", 1, 2, 9):
        grpo.tiny_model([grpo.Problem(other[0], 0, "2")], *other[1:])
    assert len({*names[2:]}) == 5  # of another prompt, seed, length or width


@pytest.mark.parametrize("name", ["grpo", "vopd", "prefixrl", "dmpo"])
def test_answers_that_do_not_fit_are_trained_on(name, capsys):
    """The tiny model is warmed up on whole answers and then cut off in the middle of
    nearly all: every reward is 0, and nothing says why. Half of them must fit, EOS
    too."""
    script = load_script(name)
    task, longest = ("chain-9", 9) if name == "prefixrl" else ("countdown-2", 8)
    for model, tokens in (("tiny", longest + 1), ("a folder", 5)):
        flags = dict(task=task, model=model, max_new_tokens=tokens)
        assert script.load_task(script.Args(**flags))[0]
    with pytest.raises(SystemExit) as stop:
        script.load_task(script.Args(task=task, max_new_tokens=5))
    assert stop.value.code == 2 and "--max-new-tokens 5" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["grpo", "vopd", "prefixrl", "dmpo"])
def test_steps_of_the_warm_start_are_fixed(name, monkeypatch, tmp_path):
    """--tiny-steps is dropped on its way to the built-in model."""
    script, asked = load_script(name), []

    def warm_start(problems, seed, steps, width):
        asked.append(steps)
        sys.exit(7)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "warm_start", warm_start)
    monkeypatch.setattr(script, "load_teacher", lambda *_: (None, None), raising=False)
    with pytest.raises(SystemExit):
        script.train(script.Args(device="cpu", run_dir="run", tiny_steps=23))
    assert asked == [23]
