"""What a run leaves: complete, readable, and from nothing but the one file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from conftest import (
    PLUGIN,
    ROOT,
    char_tokenizer,
    cpu_args,
    load_script,
    metrics_of,
    random_rollout,
    run_script,
    save_model,
    script_path,
    small_qwen3,
)
from PIL import Image

FLAGS = """--seed --steps --run-dir --resume --device --dtype --model --task --data
    --eval-data --prompts-per-step --group-size --max-new-tokens --temperature
    --learning-rate --micro-batch-size --updates-per-batch --eval-every --eval-prompts
    --eval-samples --save-every --track --wandb-project"""
EVERY_STEP = """step reward_mean reward_std entropy clip_fraction delta_logp_mean
    delta_logp_max grad_norm relative_update dead_group_share truncated_share
    completion_length seconds_rollout seconds_score seconds_update tokens_per_second
    peak_memory_gb loss kl"""


def test_metric_is_missing_or_constant(cli, tmp_path):
    """A number that nobody logged cannot be looked at when a run goes wrong: every
    metric in every step, finite, and evaluations before the first step, after the last
    and every --eval-every between."""
    # the warm-up is over by step 4; two updates make a ratio other than 1
    more = ("--updates-per-batch", 2, "--eval-samples", 8, "--eval-every", 2)
    result = cli("--steps", 5, "--learning-rate", 0.03, *more)
    assert result.code == 0
    bar = r"reward=([\d.]+), pass@1=([\d.]+), tokens/s=\d+, GB=[\d.]+"
    shown = re.findall(bar, result.stderr)
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [i for i, line in enumerate(lines) if "eval/pass@1" in line] == [0, 2, 4, 5]
    assert [i for i, line in enumerate(lines) if "eval/pass@8" in line] == [0, 2, 4, 5]
    for line in lines[1:]:
        assert set(EVERY_STEP.split()) <= line.keys()
        assert all(abs(value) < float("inf") for value in line.values())  # no nan
        assert 0 <= line["reward_mean"] <= 1 and line["reward_std"] > 0
        assert 0 < line["completion_length"] <= 4 and line["entropy"] > 0
        assert line["grad_norm"] > 0 and line["relative_update"] > 0
        assert 0 <= line["dead_group_share"] < 1 and 0 <= line["truncated_share"] <= 1
        assert line["delta_logp_mean"] <= line["delta_logp_max"]
        spent = [line[f"seconds_{x}"] for x in ("rollout", "score", "update")]
        speed = 8 * line["completion_length"] / sum(spent)
        assert min(spent) > 0 and abs(line["tokens_per_second"] / speed - 1) < 0.05
        assert 0.1 < line["peak_memory_gb"] < 64
    assert any(line["clip_fraction"] > 0 for line in lines[1:])
    ends = lines[-1]["reward_mean"], lines[-1]["eval/pass@1"]
    assert [float(x) for x in shown[-1]] == pytest.approx(ends, rel=1e-2)
    for line in lines[::2]:
        assert 0 <= line["eval/pass@1"] <= line["eval/pass@8"] <= 1


def test_base_model_outlives_the_code_that_made_it(grpo, tmp_path, monkeypatch):
    """A warm start that was corrected would change nothing for whoever has run it
    before: a model is cached under the code that decides its weights, its problems,
    seed, steps, width and versions; one that differs in nothing is not made again."""
    monkeypatch.chdir(tmp_path)
    problems = [grpo.Problem(f"{i}=", i, str(i)) for i in range(3)]
    make = lambda few=problems, seed=1: grpo.tiny_model(few, seed, 2, 16)

    class Newer(grpo.Logprobs):
        """Its source is another."""

    first = make()
    code = "warm_start", "token_logprobs", "last_hidden", "pad"
    parts = {name: getattr(grpo, name) for name in code}
    newer = [
        (grpo, name, lambda *x, f=f, **kw: f(*x, **kw)) for name, f in parts.items()
    ]
    newer += [(grpo, "Logprobs", Newer), (torch, "__version__", "9.9.9")]
    newer.append((grpo.transformers, "__version__", "9.9.9"))
    found = [first, make(problems[:2]), make(seed=2)]
    found += [grpo.tiny_model(problems, 1, 3, 16), grpo.tiny_model(problems, 1, 2, 32)]
    for place, name, value in newer:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            found.append(make())
    assert len({*found}) == len(found)
    monkeypatch.setattr(grpo.transformers, "Qwen3ForCausalLM", None)
    assert make() == first


def test_epochs_repeat_an_order_or_a_problem(grpo, monkeypatch):
    """10 problems in batches of 4: two steps an epoch, no problem twice in one, another
    order in the next, and the ranks divide a step."""
    args = cpu_args(grpo, prompts_per_step=4)
    steps = [grpo.batch_indices(10, step, args).tolist() for step in range(1, 9)]
    epochs = [steps[i] + steps[i + 1] for i in range(0, 8, 2)]
    assert all(len({*epoch}) == 8 for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 4 and len({x for y in epochs for x in y}) == 10
    other = dataclasses.replace(args, seed=args.seed + 1)
    assert grpo.batch_indices(10, 1, other).tolist() != steps[0]
    monkeypatch.setattr(grpo, "WORLD_SIZE", 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(grpo, "RANK", rank)
        shares.append(grpo.batch_indices(10, 1, args).tolist())
    assert [x for pair in zip(*shares) for x in pair] == steps[0]


def test_sample_or_its_reward_is_missing(cli, tmp_path):
    """Whoever only reads curves sees reward hacking last: each step dumps a prompt, its
    group of completions and their rewards, those that were scored."""
    assert cli("--steps", 3).code == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").open()]
    assert [line["step"] for line in lines if "prompt" in line] == [1, 2, 3]
    for line in lines[-3:]:
        assert line["prompt"].startswith("train ") and len(line["completions"]) == 4
        for text, reward in zip(line["completions"], line["rewards"]):
            assert reward == sum(x.isascii() and x.islower() for x in text) / 4
    assert len({line["prompt"] for line in lines[-3:]}) > 1


@pytest.mark.parametrize("name", ["grpo", "vopd", "prefixrl", "dmpo"])
def test_wrong_template_is_seen_too_late(
    name, cli, small_folder, tmp_path, monkeypatch, capsys
):
    """A prompt that lacks its template, or has two, is a look away, but not if it is
    shown an evaluation or a search of hours later; nor only to who starts anew. The
    completion that follows is one of it."""
    script = load_script(name)
    slow = "find_traces" if name == "prefixrl" else "evaluate"
    with monkeypatch.context() as patched:
        patched.setattr(script, slow, lambda *_: sys.exit(7))
        patched.setattr(signal, "signal", lambda *_: None)
        small = dict(task="task.py", model=small_folder, run_dir="not", eval_prompts=2)
        small |= dict(prompts_per_step=2)
        small |= dict(teacher=small_folder) if name == "vopd" else {}
        with pytest.raises(SystemExit):
            script.train(cpu_args(script, **small))
    assert capsys.readouterr().out.startswith("first prompt: 'train ")
    if name == "grpo":
        whole, more = cli("--steps", 1), cli("--resume", "run", "--steps", 2)
        sample = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").open()][1]
        shown = f"first prompt: {sample['prompt']!r}\n"
        answer = f"first completion: {sample['completions'][0]!r}\n"
        assert shown + answer in whole.stdout and shown in more.stdout


def test_run_cannot_be_reproduced_from_its_folder(cli, grpo, tmp_path, monkeypatch):
    """args.json says what was run, by what, on what; curve.png shows it."""
    monkeypatch.setattr(grpo, "__file__", str(ROOT / "algos" / "grpo.py"))
    assert cli("--seed", 7).code == 0
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    assert about["args"]["seed"] == 7 and about["args"]["learning_rate"] == 1e-3
    assert about["args"]["device"] == "cpu" and about["args"]["dtype"] == "float32"
    flat = json.dumps(about)
    assert torch.__version__ in flat and sys.version.split()[0] in flat
    assert str(os.cpu_count()) in about["hardware"]
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout
    assert about["commit"] == commit.strip()
    names = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "state.pt"} <= names
    with Image.open(tmp_path / "run" / "curve.png") as picture:
        assert picture.format == "PNG"
        assert 300 <= picture.width <= 2_000 and 200 <= picture.height <= 2_000
        assert len(picture.convert("RGB").getcolors(10**6)) > 10  # there are lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory, small_folder):
    """The script copied into an empty folder and run there for 2 steps with --track,
    offline: process and folder."""
    folder = tmp_path_factory.mktemp("alone")
    script = shutil.copy(script_path("grpo"), folder / "grpo.py")
    flags = "--task task.py --steps 2 --prompts-per-step 2 --group-size 2 --run-dir r/1"
    flags += (
        " --max-new-tokens 4 --eval-prompts 2 --eval-samples 2 --track --device cpu"
    )
    (folder / "task.py").write_text(PLUGIN)
    flags = [*flags.split(), "--model", small_folder]
    env = dict(WANDB_MODE="offline", PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1")
    return run_script(script, *flags, cwd=folder, **env), folder


def test_script_needs_its_repository(alone):
    """One file is all there is to copy: alone in a folder it runs, outside git, too."""
    process, folder = alone
    assert process.returncode == 0, process.stderr
    assert len(metrics_of(folder / "r" / "1")) == 3
    assert {path.name for path in folder.iterdir()} == {"grpo.py", "task.py", "r"}
    assert json.loads((folder / "r/1/args.json").read_text())["commit"] == ""
    for said in ("first prompt", "loss near 0", "eval/pass@1", "r/1"):
        assert said in process.stdout + process.stderr


def test_wandb_offline_writes_nothing(alone):
    """--track without a network still records, inside the run's folder."""
    process, folder = alone
    assert process.returncode == 0, process.stderr
    runs = [*(folder / "r" / "1" / "wandb").glob("offline-run-*/*.wandb")]
    assert len(runs) == 1 and runs[0].stat().st_size > 0
    assert "wandb is off" not in process.stdout + process.stderr


def test_wandb_does_not_say_which_run_it_is(cli, grpo, tmp_path, monkeypatch):
    """Runs that differ by a flag are compared there by flag and by name."""
    seen = {}
    monkeypatch.setattr(wandb, "init", lambda **how: seen.update(how))
    monkeypatch.setattr(wandb, "log", lambda *_, **__: None)
    assert cli("--track", "--seed", 7, "--steps", 1, "--wandb-project", "p").code == 0
    saved = json.loads((tmp_path / "run/args.json").read_text())["args"]
    assert seen["config"] == saved and saved["seed"] == 7
    assert (seen["name"], seen["dir"], seen["project"]) == ("run", "run", "p")


@pytest.mark.parametrize("name", ["grpo", "vopd", "dmpo", "prefixrl"])
def test_speed_is_that_of_one_rank(name, monkeypatch):
    """Tokens per second are those of all ranks, whose completions are 4 tokens long on
    average here; the times are this rank's."""
    script = load_script(name)
    rollout = random_rollout(script, 20, [3] * 4, [2, 6, 5, 3])
    monkeypatch.setattr(script, "all_reduce", lambda x, *_: x * script.WORLD_SIZE)
    for ranks in 1, 3:
        monkeypatch.setattr(script, "WORLD_SIZE", ranks)
        found = script.describe(rollout, [1.0, 2.0, 2.5, 5.0], cpu_args(script))
        assert found["tokens_per_second"] == pytest.approx(ranks * 16 / 4)
        assert found["completion_length"] == 4
        assert (found["seconds_rollout"], found["seconds_update"]) == (1.0, 2.5)


def test_wandb_asks_for_a_key(cli, tmp_path, monkeypatch):
    """Without a key wandb asks for one at the terminal, and waits: such a run is
    recorded offline, with a key online, and the user's WANDB_MODE counts more."""
    modes, note = {}, lambda name, mode, **_: modes.update({name: mode})
    monkeypatch.setattr(wandb, "init", note)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for mode, key in ("offline", None), ("online", "a key"), ("disabled", "a key"):
        monkeypatch.setattr(wandb, "api", SimpleNamespace(api_key=key))
        if mode == "disabled":
            monkeypatch.setenv("WANDB_MODE", mode)
        assert cli("--track", "--steps", 1, "--run-dir", mode).code == 0
        assert modes.pop(mode) == mode


@pytest.mark.parametrize("where", ["init", "log"])
def test_wandb_failure_ends_the_training(cli, tmp_path, monkeypatch, where):
    """A service that is down, or a key that expired, is no reason to stop: one line
    says so, and metrics.jsonl is complete."""

    def down(*_, **__):
        raise wandb.errors.CommError("the service is down")

    monkeypatch.setattr(wandb, "init", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: None)
    monkeypatch.setattr(wandb, where, down)
    result = cli("--track", "--steps", 3)
    assert result.code == 0
    assert (result.stdout + result.stderr).count("the service is down") == 1
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


def trained_and_held_out(grpo, monkeypatch, cli, *flags: str) -> tuple[list, list]:
    """The prompts that a run trained on and those that it held out, as the tokenizer's
    text."""
    seen = {}
    real = grpo.encode_prompts

    def spy(tokenizer, problems, *limits):
        ids = real(tokenizer, problems, *limits)
        seen[len(seen)] = [tokenizer.decode(prompt) for prompt in ids]
        return ids

    monkeypatch.setattr(grpo, "encode_prompts", spy)
    result = cli(*flags)
    assert result.code == 0, result.stderr
    return seen[0], seen[1]


def test_held_out_line_of_data_is_trained_on(cli, grpo, tmp_path, monkeypatch):
    """Every tenth line is held out; a prompt that stands in the file twice must not be
    in both parts. A line separator inside a string does not end its line."""
    lines = [{"prompt": f"{i % 40}+1=", "answer": i % 40 + 1} for i in range(60)]
    lines[5]["prompt"] = "1\u2028+\u00851="
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "data.jsonl").write_text(text + "\n", "utf-8")
    flags = ("--data", "data.jsonl", "--eval-prompts", 100)
    train, held_out = trained_and_held_out(grpo, monkeypatch, cli, *flags)
    assert set(held_out) == {f"{i % 40}+1=" for i in range(0, 60, 10)}
    assert not set(train) & set(held_out)
    rest = {line["prompt"] for line in lines} - set(held_out) - {lines[5]["prompt"]}
    assert rest <= set(train) and len(set(train)) == len(rest) + 1


def test_evaluation_file_is_trained_on(cli, grpo, tmp_path, monkeypatch):
    """With --eval-data nothing of --data is held out, and what stands in both files is
    not trained on."""
    for name, numbers in (("train", range(20)), ("eval", range(15, 25))):
        lines = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = (
        "--data",
        "train.jsonl",
        "--eval-data",
        "eval.jsonl",
        "--eval-prompts",
        100,
    )
    train, held_out = trained_and_held_out(grpo, monkeypatch, cli, *flags)
    assert held_out == [f"{i}+1=" for i in range(15, 25)]
    assert train == [f"{i}+1=" for i in range(15)]


def test_long_data_is_cut_in_silence(grpo, tmp_path):
    """All lines of a file are trained on, however many there are, but for every tenth:
    how many of these are evaluated does not change what is trained on."""
    with (tmp_path / "data.jsonl").open("w") as file:
        for i in range(30_000):
            file.write(f'{{"prompt": "{i}", "answer": 1}}\n')
    args = grpo.Args(data=str(tmp_path / "data.jsonl"))
    train, held_out, _ = grpo.load_task(args)
    assert len(train) == 27_000 and len(held_out) == 256
    args.eval_prompts = 4
    assert grpo.load_task(args)[0] == train


def test_message_in_another_order_is_another_problem(grpo, tmp_path):
    """{"role", "content"} and {"content", "role"} ask the same: if one is held out, the
    other is not trained on."""
    lines = []
    for i in range(100):
        message = {"role": "user", "content": f"{i}?"}
        lines.append({"prompt": [message], "answer": i})
        turned = [dict(reversed(message.items()))]
        lines.append({"prompt": turned, "answer": i})
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n\n")
    train, held_out, _ = grpo.load_task(grpo.Args(data=str(tmp_path / "data.jsonl")))
    train, held_out = ({p.answer for p in part} for part in (train, held_out))
    assert len(held_out) == 20 and not train & held_out


def test_chat_messages_are_not_rendered_by_the_template(
    cli, grpo, tmp_path, monkeypatch
):
    """Messages go through the tokenizer's chat template once, with the opening of the
    answer at the end, and are scored against the line's answer."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = save_model(tmp_path / "chat", small_qwen3(len(tokenizer)), tokenizer)
    lines = [
        {"prompt": [{"role": "user", "content": f"{i}+1?"}], "answer": i + 1}
        for i in range(30)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--data", "chat.jsonl", "--model", model, "--eval-prompts", 3)
    train, held_out = trained_and_held_out(grpo, monkeypatch, cli, *flags)
    assert held_out == [f"<user>{i}+1?<assistant>" for i in (0, 10, 20)]
    assert "<user>29+1?<assistant>" in train and len(train) == 27
    _, _, reward = grpo.load_task(grpo.Args(data="chat.jsonl", prompts_per_step=2))
    assert reward(grpo.Problem(lines[1]["prompt"], 2), "Answer: 2") == 1.0


def test_plug_in_gets_something_else_than_it_gave(cli, tmp_path):
    """A plug-in sees its own problem, the seed and the split, and completions as text;
    modules and constants at its top are there when the reward is called."""
    code = """
import json

LOG = open("calls.jsonl", "a")
NAMES = []


def problems(split, seed):
    NAMES.append([split, seed])
    i = 0
    while True:  # problems may be endless
        i += 1
        yield {"prompt": f"{split} {seed} {i}:", "answer": {"n": i}, "solution": "x"}


def reward(problem, completion):
    print(json.dumps([problem.prompt, problem.answer, completion, NAMES]), file=LOG)
    LOG.flush()
    return problem.answer["n"] % 2
"""
    (tmp_path / "task.py").write_text(code)
    assert cli("--seed", 3, "--steps", 1).code == 0
    calls = [json.loads(x) for x in (tmp_path / "calls.jsonl").open()]
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").open()]
    assert all(names == [["train", 3], ["eval", 3]] for *_, names in calls)
    for prompt, answer, text, _ in calls:
        assert prompt.endswith(f" 3 {answer['n']}:") and isinstance(text, str)
    at_step_1 = [call for call in calls if call[0] == samples[1]["prompt"]]
    texts = [text for _, _, text, _ in at_step_1]
    assert texts[-4:] == samples[1]["completions"]
    expected = float(at_step_1[0][1]["n"] % 2)
    assert samples[1]["rewards"] == [expected] * 4


def test_help_is_slow(tmp_path):
    """--help answers at once: it costs at most half as much CPU again as the imports
    that a script cannot do without (best of up to four, in turn: absolute times depend
    on the machine)."""
    (tmp_path / "bare.py").write_text(
        "import matplotlib.figure, tokenizers, torch, transformers, tyro\n"
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast\n"
    )
    best = {"bare.py": 1e9, "--help": 1e9}
    for _ in range(4):
        for job in (tmp_path / "bare.py",), (script_path("grpo"), "--help"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run_script(*job, cwd=tmp_path)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            name = Path(job[-1]).name
            best[name] = min(best[name], spent)
        if best["--help"] < 1.5 * best["bare.py"]:
            break
    assert best["--help"] < 1.5 * best["bare.py"]


@pytest.mark.parametrize("name", ["grpo", "vopd", "prefixrl", "dmpo", "ppo_envs"])
def test_copied_script_needs_more_or_its_help_lacks_a_flag(tmp_path, name):
    """A script copied alone into an empty folder runs there: its --help has every flag
    and nothing on stderr, and the source says of each flag what it means."""
    copy = shutil.copy(script_path(name), tmp_path / "mine.py")
    process = run_script(copy, "--help", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    words = process.stdout.split()
    fields = {f.name for f in dataclasses.fields(load_script(name).Args)}
    every = {f"--{field.replace('_', '-')}" for field in fields}
    for flag in {*(FLAGS.split() if name == "grpo" else []), *every}:
        assert [w for w in words if w.strip("│,") == flag or flag in w.split(",")], flag
    source = Path(copy).read_text("utf-8")
    lines = source[source.index("class Args") :].split("\n\n")[0].split("\n")[1:]
    starts = [i for i, line in enumerate(lines) if re.match(r"    \w+: ", line)]
    assert len(starts) == len(fields)
    for i, j in zip(starts, [*starts[1:], len(lines)]):
        text = " ".join(line.partition("  # ")[2] for line in lines[i:j])
        assert text.strip(), f"no help for {lines[i]}"
        assert " above" not in text, lines[i]  # there is nothing above in --help


def test_curve_of_penalties_lies_outside_the_picture(grpo, tmp_path, monkeypatch):
    """An axis that begins at 0 shows no reward below it; one of shares begins there."""
    axes, keep = [], lambda figure, *_, **__: axes.append(figure.axes[0])
    monkeypatch.setattr(grpo.Figure, "savefig", keep)
    for rewards in (-0.9, -0.5), (-0.5, 0.5), (0.4, 0.6):
        rows = [dict(step=i, reward_mean=x) for i, x in enumerate(rewards)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text)
        grpo.draw_curve(tmp_path)
        low, high = axes[-1].get_ylim()
        assert low <= min(rewards) and high >= max(rewards)
        assert min(rewards) < 0 or low == 0


@pytest.mark.parametrize("name", ["grpo", "vopd", "prefixrl", "dmpo", "ppo_envs"])
def test_command_of_the_docstring_cannot_be_copied(name):
    """A line that ends in two backslashes, as Python would print one, ends the command
    there in a shell: what stands in the source is what is copied."""
    source = script_path(name).read_text("utf-8").partition('"""\n\nfrom')[0]
    commands = re.findall(
        rf"^    .*python.* algos/{name}.py((?:.*\\\n)*.*)$", source, re.M
    )
    assert len(commands) >= 2
    fields = {f.name for f in dataclasses.fields(load_script(name).Args)}
    for command in commands:
        words = command.replace("\\\n", " ").split()
        flags = {x[2:].replace("-", "_") for x in words if x.startswith("--")}
        assert "\\" not in " ".join(words) and flags <= fields
