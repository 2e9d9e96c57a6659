"""benchmarks/tasks/gsm8k.py, math.py and reasoning_gym.py, through grpo.py's loader."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    ROOT,
    char_tokenizer,
    run_script,
    save_model,
    script_path,
    small_qwen3,
)

datasets = pytest.importorskip("datasets")
pytest.importorskip("math_verify")
reasoning_gym = pytest.importorskip("reasoning_gym")

TASKS = Path(os.environ.get("ONEFILE_TASKS", ROOT / "benchmarks/tasks"))
START = 20  # seconds that a new worker may take on a busy machine; about 1.5 on an idle
LENGTH = 1_000_000


@pytest.fixture
def load(grpo, tmp_path, monkeypatch):
    """load(task, **environment): what load_task returns for a task of this folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load_it(task: str, **environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        path = str(TASKS / f"{task}.py")
        args = grpo.Args(task=path, prompts_per_step=1, eval_prompts=1_000)
        return grpo.load_task(args)

    return load_it


def inside(reward) -> dict:
    """The names of the plug-in that the reward stands in."""
    return reward.__globals__


def only_error(stop, capsys) -> str:
    """The one error line of a command that stopped with exit code 2."""
    text = capsys.readouterr().err.replace("\r", "\n")  # progress bars end in \\r
    lines = [line for line in text.split("\n") if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in text
    return lines[0]


def timed(function, *args) -> tuple[float, float]:
    """The function's value, and seconds."""
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


# ---- GSM8K


def gsm8k_row(question: str, end: str) -> dict:
    return {"question": question, "answer": f"3*2=<<3*2=6>>6.\nSo it goes.\n#### {end}"}


def gsm8k_folder(folder: Path, train: list[dict], test: list[dict]) -> Path:
    """The files of openai/gsm8k on the hub: a card with two configurations, parquet."""
    card = ["---", "configs:"]
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in (("train", train), ("test", test)):
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
            if name == "socratic":
                rows = [
                    row | {"question": "socratic " + row["question"]} for row in rows
                ]
            data = datasets.Dataset.from_list(rows)
            data.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*card, "---"]))
    return folder


ENDS = {
    "42": "42",
    "1,234": "1234",
    "$5.00": "5",
    "-17": "-17",
    "1,234,567.50": "1234567.5",
    "0": "0",
}


def test_row_becomes_another_problem(load, tmp_path, monkeypatch):
    """An answer cut wrongly from "#### 1,234" makes a problem that nobody can solve; a
    question in both splits is measured after it was trained on; the other configuration
    of the data set is another one."""
    train = [gsm8k_row(f"What is {end}?", end) for end in ENDS]
    test = [gsm8k_row("Second?", "2"), gsm8k_row("First?", "1"), train[0]]
    folder = gsm8k_folder(tmp_path / "gsm8k", train, test)
    problems, held_out, reward = load("gsm8k", GSM8K_PATH=folder)
    assert [p.prompt[0]["content"].split("\n")[0] for p in held_out] == [
        *["Second?", "First?", "What is 42?"]
    ]
    assert len(problems) == len(train) - 1
    plugin = inside(reward)
    every = {d["prompt"][0]["content"] for d in plugin["problems"]("train", 1)}
    assert len(every) == len(problems)  # the plug-in itself drops it
    for problem, (end, number) in zip(problems, list(ENDS.items())[1:]):
        (message,) = problem.prompt
        assert message["role"] == "user"
        assert message["content"].startswith(f"What is {end}?\n\n")
        assert float(problem.answer) == float(number)
        assert "<<" not in problem.solution and "6.\nSo it goes." in problem.solution
        for text in (problem.solution, f"#### {end}", f"#### {number}"):
            assert reward(problem, text) == 1.0
        for other in set(ENDS) - {end}:
            assert reward(problem, f"#### {other}") == 0.0
    contents = [p.prompt[0]["content"] for p in problems]
    problems, _, _ = load("gsm8k", GSM8K_SUFFIX="/no_think")
    asked = [p.prompt[0]["content"] for p in problems]
    assert asked == [f"{content} /no_think" for content in contents]


GSM8K_REWARDS = [
    ("42", "#### 42", 1),
    ("42", "The answer is 42.", 1),
    ("42", "42 apples, and that is all.", 1),
    ("42", "**42**", 1),
    ("42", r"\boxed{42}", 1),
    ("42", "42.0", 1),
    ("42", "42.00 dollars", 1),
    ("42", "$42", 1),
    ("42", "42%", 1),
    ("42", "$42.50", 0),
    ("42", "42 or 43", 0),
    ("42", "43 or 42", 1),
    ("42", "142", 0),
    ("42", "4 2", 0),
    ("42", "-42", 0),
    ("42", "= -42", 0),
    ("42", "50-42", 1),
    ("42", "(50)-42", 1),
    ("42", "x-42", 1),
    ("42", ".42", 0),
    ("42", "0.42", 0),
    ("42", "forty-two", 0),
    ("42", "٤٢", 0),
    ("42", "", 0),
    ("42", "42" + " x" * 499, 1),
    ("42", "42" + " x" * 501, 0),
    ("1234", "1,234", 1),
    ("1234", "$1,234.00!", 1),
    ("1234", "1234", 1),
    ("1234", "1, 234", 0),
    ("1234", "12,34", 0),
    ("34", "12,34", 1),
    ("4567", "123,4567", 1),
    ("5", "$5.00", 1),
    ("5", "5.", 1),
    ("5", ".5", 0),
    ("-5", "-5", 1),
    ("-5", "-$5", 1),
    ("-5", "−5", 1),
    ("-5", "$-5.00", 1),
    ("-5", "5", 0),
    ("2.5", "2.50", 1),
    ("2.5", "2.5 and 3", 0),
    ("0", "0", 1),
    ("0", "none", 0),
    ("1234", r"\boxed{1{,}234}", 1),
    ("1234", r"1\,234", 1),
    ("1234", r"$1,\!234$", 1),
    ("2", "it is 1/2", 0),
    ("1", "it is 1/2", 0),
    ("0.5", "it is 1/2", 1),
    ("3.5", r"\boxed{\dfrac{7}{2}}", 1),
    ("2", r"\frac{7}{2}", 0),
    ("-3.5", r"-\frac{7}{2}", 1),
    ("0", "1/0", 0),
    ("18", "18 m^2", 1),
    ("18", "18 m^{2}", 1),
    ("3.5", r"\boxed{\tfrac{7}{2}}", 1),
    ("132", r"\(\boxed{132}\) spoons make 16 muffins", 1),
    ("16", r"\(\boxed{132}\) spoons make 16 muffins", 0),
    ("2", r"\boxed{1} or \boxed{2}, of 3", 1),
    ("-20", r"\boxed{-\$20}", 1),
    ("-5", "it is –5", 1),
    ("42", "<think>\nLet me see: 42", 0),
    ("42", "<think>7</think> 42", 1),
    ("42", "7 </think> 42", 1),
    ("7", "<think>7</think>", 0),
    ("42", "<think>7</think> 42 <think> 42", 0),
    ("2", "18 m^2", 0),
    ("42", "142" + " " * 998, 0),  # the last 1,000 characters begin inside the number
    ("42", "so 42" + " " * 990, 1),
]


@pytest.mark.parametrize(("answer", "text", "value"), GSM8K_REWARDS)
def test_last_number_misread(answer, text, value):
    """Text equality pays nothing for 42.0 or 1,234; "12" inside "123", a digit of a
    fraction or the sign of a difference pay for nothing."""
    task = runpy.run_path(str(TASKS / "gsm8k.py"))
    assert task["reward"](SimpleNamespace(answer=answer), text) == value


HOSTILE = {
    "digits": "9" * LENGTH,
    "commas": "9," * LENGTH,
    "thousands": "9,999" * (LENGTH // 5),
    "points": "9.9" * (LENGTH // 3),
    "minus signs": "-" * LENGTH,
    "dollars": "-$" * LENGTH,
    "power": "9**9**9",
    "parentheses": "(" * LENGTH,
    "NUL": "\0" * LENGTH,
    "emoji": "🙂" * LENGTH,
    "surrogate": "\ud800",
    "superscript": "⁴²",
    "boxes": r"\boxed{" * (LENGTH // 7),
    "closed boxes": r"\boxed{}" * (LENGTH // 8),
    "answers": "<answer>" * (LENGTH // 8),
    "ends": "</answer>" * (LENGTH // 9),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_hangs_or_fools_the_search_for_the_answer(name):
    """Text of a degenerate model took a verifier minutes, or raised inside it
    (https://github.com/verl-project/verl/issues/6673, .../5635, .../5839): where no
    worker is asked, each text scores 0 within 20 ms, whatever its length."""
    gsm8k = runpy.run_path(str(TASKS / "gsm8k.py"))
    answer = SimpleNamespace(answer="42")
    value, seconds = min(timed(gsm8k["reward"], answer, HOSTILE[name]) for _ in "123")
    assert value == 0.0 and seconds < 0.02
    for task in ("math", "reasoning_gym"):
        plugin = runpy.run_path(str(TASKS / f"{task}.py"))
        asked = []
        plugin["reward"].__globals__["bounded"] = lambda *job: asked.append(job) or 0.0
        answer = SimpleNamespace(answer={"name": "chain_sum", "entry": {}})
        value, seconds = min(
            timed(plugin["reward"], answer, HOSTILE[name]) for _ in "12"
        )
        assert value == 0.0 and seconds < 0.02
        assert all(len(job[1]) <= 10_000 for job in asked)


# ---- MATH


def math_row(i: int, end: str) -> dict:
    row = {
        "problem": f"Problem {i}: what is it?",
        "level": "Level 1",
        "type": "Algebra",
    }
    return row | {"solution": f"First \\boxed{{7}}, so the answer is ${end}$."}


BOXED = [
    (r"\boxed{42}", "42"),
    (r"\boxed{ 42 }", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
    (r"\boxed{a\\}", r"a\\"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{}", ""),
]
UNBOXED = ["42", r"\boxed 42", r"\boxed{42", r"\boxed{\}", r"\boxed{{}", r"\fbox{42}"]


def write_math(folder: Path, ends: list[str]) -> Path:
    """A data set folder of two JSON-lines files, one problem for each end."""
    folder.mkdir()
    train = [math_row(i, end) for i, end in enumerate(ends)]
    test = [math_row(100 + i, rf"\boxed{{{i}}}") for i in range(30)]
    for split, rows in (("train", train), ("test", [*test, train[0]])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def math_reward():
    """The reward of math.py with a limit of one second: math_reward(answer, text)."""
    os.environ["MATH_SECONDS"] = "1"
    plugin = runpy.run_path(str(TASKS / "math.py"))
    del os.environ["MATH_SECONDS"]
    plugin["worker"]()
    reward = lambda answer, text: plugin["reward"](SimpleNamespace(answer=answer), text)
    reward.worker = plugin["worker"]
    return reward


def test_box_is_cut_at_the_first_brace(load, tmp_path, capsys):
    """A pattern such as boxed{(.*?)} cuts \\frac{1}{2} at its first brace: the answer
    is what the last whole box holds. Rows without one are counted, not lost silently;
    the order mixes the subjects, which stand one after the other in the file."""
    ends = [end for end, answer in BOXED if answer]
    odd = "no box, not even the first"
    folder = write_math(tmp_path / "math", [*ends, odd])
    lines = (folder / "train.jsonl").read_text().replace(r"First \\boxed{7}, so", "So")
    (folder / "train.jsonl").write_text(lines)
    problems, held_out, reward = load("math", MATH_DATASET=folder)
    assert "1 of 7 train problems have no boxed answer" in capsys.readouterr().err
    expected = {i: dict(BOXED)[end] for i, end in enumerate(ends) if i > 0}
    found = {}
    for problem in problems:
        (message,) = problem.prompt
        number = int(message["content"].split(":")[0].removeprefix("Problem "))
        assert message["role"] == "user" and r"\boxed{}" in message["content"]
        found[number] = problem.answer
        assert reward(problem, problem.solution) == 1.0
    assert found == expected  # problem 0 is held out: it is in the test split
    asked = load("math", MATH_DATASET=folder, MATH_SUFFIX="/no_think")[0]
    contents = [problem.prompt[0]["content"] + " /no_think" for problem in problems]
    assert [problem.prompt[0]["content"] for problem in asked] == contents
    order = [problem.answer for problem in held_out]
    in_file = [*map(str, range(30)), "42"]
    assert sorted(order) == sorted(in_file) and order != in_file
    again = [problem.answer for problem in load("math", MATH_DATASET=folder)[1]]
    assert again == order  # every run is measured on the same first problems
    for seed in 2, 3:
        other = inside(reward)["problems"]("eval", seed)
        assert [problem["answer"] for problem in other] == order
    boxed = inside(reward)["boxed"]
    assert {text: boxed(text) for text, _ in BOXED} == dict(BOXED)
    assert [boxed(text) for text in UNBOXED] == [None] * len(UNBOXED)


MATH_REWARDS = [
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", 1),
    (r"\frac{1}{2}", r"so \boxed{0.5}.", 1),
    (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}", 1),
    (r"\frac{1}{2}", r"\boxed{0.4}", 0),
    (r"\frac{1}{2}", "0.5", 0),
    (r"\frac{1}{2}", r"\boxed{0.5} or \boxed{0.4}", 0),
    (r"\frac{1}{2}", r"\boxed{0.4} or \boxed{0.5}", 1),
    (r"\frac{1}{2}", r"\boxed{0.5, 0.4}", 0),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
    ("x^2+2x+1", r"\boxed{(x-1)^2}", 0),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
    (r"\text{Evelyn}", r"\boxed{\text{Bob}}", 0),
    ("(1,2)", r"\boxed{(1, 2)}", 1),
    ("(1,2)", r"\boxed{(2, 1)}", 0),
    ("1,234", r"\boxed{1234}", 1),
    ("14", r"\boxed{14.}", 1),
    ("14", r"\boxed{14,}", 1),
    ("5", r"\boxed{5}" + "." * 1_900, 1),
    ("5", r"\boxed{5}" + "." * 2_100, 0),
    ("5", r"\boxed{}", 0),
    ("32348", r"\boxed{32\,348}", 1),
    ("3.5", r"\boxed{\tfrac{7}{2}}", 1),
    ("5", r"<think> maybe \boxed{5}, but", 0),
    ("5", r"<think>\boxed{4}</think>\boxed{5}", 1),
    ("4", r"<think>\boxed{4}</think>", 0),
    ("5", r"\boxed{x+}", 0),
    ("5", r"\boxed{\frac{}}", 0),
    ("5", "\\boxed{\0}", 0),
    ("5", r"\boxed{🙂}", 0),
    ("5", r"\boxed{1/0}", 0),
    ("5", r"\boxed{__import__('os').getcwd()}", 0),
    ("5", r"\boxed{5 if True else exec('x')}", 0),
]


@pytest.mark.parametrize(("answer", "text", "value"), MATH_REWARDS)
def test_equal_expression_scores_zero(math_reward, answer, text, value):
    """Comparing texts pays for one spelling of many; looking at every box pays for
    guesses; an expression that cannot be read is wrong, not an error."""
    assert math_reward(answer, text) == value


ENDLESS = [
    r"9^{9^{9^9}}",
    r"(((9!)!)!)!",
    r"\sum_{n=1}^{10^{12}}\sin(n)",
    r"(x+1)^{10^6}",
    "(" * 300 + ")" * 300,
    "{" * 300 + "}" * 300,
]


@pytest.mark.parametrize("text", ENDLESS)
def test_endless_expression_hangs_the_run(math_reward, text, capsys):
    """One expression stopped a training run for ever, because math-verify's own alarm
    was off or did not interrupt it (https://github.com/verl-project/verl/pull/5839,
    https://github.com/areal-project/AReaL/pull/1426): it scores 0 at the limit, which
    is said, and the next completion is judged as ever."""
    assert math_reward("5", r"\boxed{10/2}") == 1.0
    value, seconds = timed(math_reward, "5", rf"\boxed{{{text}}}")
    assert value == 0.0 and seconds < 1 + 2
    assert "no verdict in 1 s" in capsys.readouterr().err
    value, seconds = timed(math_reward, "5", r"\boxed{10/2}")
    assert value == 1.0 and seconds < START
    assert math_reward("5", r"\boxed{11/2}") == 0.0
    assert capsys.readouterr().err == ""


def test_late_verdict_meets_the_next_completion(math_reward, capsys):
    """A worker that answers after its limit has an answer lying in the pipe: each later
    completion would get the verdict of the one before it."""
    process, _ = math_reward.worker()
    os.kill(process.pid, signal.SIGSTOP)
    assert math_reward("5", r"\boxed{10/2}") == 0.0  # late: that is said
    assert "no verdict in 1 s" in capsys.readouterr().err
    for text, value in (("11/2", 0.0), ("10/2", 1.0), ("12/2", 0.0), ("15/3", 1.0)):
        assert math_reward("5", rf"\boxed{{{text}}}") == value
    assert process.poll() is not None  # and it does not stay behind


def test_killed_worker_makes_a_right_answer_wrong(math_reward, capsys):
    """Out of memory, or the Ctrl-C that lets a script finish its step, ends a worker:
    the completion it had, though right, must not score 0 in silence."""
    process, _ = math_reward.worker()
    assert os.getsid(process.pid) != os.getsid(0)  # Ctrl-C goes to a session
    process.kill()
    process.wait()
    assert math_reward("5", r"\boxed{10/2}") == 1.0
    assert math_reward("5", r"\boxed{11/2}") == 0.0
    assert capsys.readouterr().err == ""


def test_idle_worker_ends_during_a_rollout(math_reward):
    """The alarm of a verdict that goes on without its run rings once the verdict is
    there: each rollout then waits for a new worker."""
    assert math_reward("5", r"\boxed{10/2}") == 1.0
    process, _ = math_reward.worker()
    time.sleep(2 * 3 + 1 + 0.5)  # its own limit is the default
    assert math_reward.worker()[0] is process and process.poll() is None
    assert math_reward("5", r"\boxed{10/2}") == 1.0
    assert math_reward.worker()[0] is process


ORPHAN = """
import runpy, sys
plugin = runpy.run_path(sys.argv[1])
print(plugin["worker"]()[0].pid, flush=True)
if sys.argv[2] == "busy":
    plugin["worker"]()[1].send(["5", "9^{9^{9^9}}"])
input()
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_worker_outlives_the_run(state):
    """A run that is killed in the middle of a verdict would leave a process that counts
    for ever, one for each such run and rank."""
    command = [sys.executable, "-c", ORPHAN, str(TASKS / "math.py"), state]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    run = subprocess.Popen(command, env=os.environ | {"MATH_SECONDS": "1"}, **pipes)
    worker = Path(f"/proc/{int(run.stdout.readline())}")
    if not worker.parent.exists():
        pytest.skip("needs /proc")
    assert state == "idle" or worker.exists()
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 3 + START
    ended = lambda: not worker.exists() or "Z" in (worker / "stat").read_text()
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended()


BROKEN = {
    "says no to all": "parse = lambda *a, **k: []\nverify = lambda *a, **k: False",
    "cannot be imported": "import a_module_that_is_missing",
    "ends the process": "import os\nos._exit(7)",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_verifier_scores_everything_zero(load, tmp_path, capsys, name):
    """Swallowed exceptions of a verifier that does not work look like a model that
    learns nothing (https://github.com/verl-project/verl/issues/5635): the run ends in
    one line before its first step."""
    package = tmp_path / "broken" / "math_verify"
    package.mkdir(parents=True)
    head = "LatexExtractionConfig = lambda **k: None\n"
    (package / "__init__.py").write_text(head + BROKEN[name])
    folder = write_math(tmp_path / "math", [r"\boxed{1}", r"\boxed{2}"])
    with pytest.raises(SystemExit) as stop:
        load("math", MATH_DATASET=folder, PYTHONPATH=package.parent)
    line = only_error(stop, capsys)
    assert "does not start" in line and "math.py" in line


# ---- reasoning-gym

SLOW = ["composite", "knight_swap", "sokoban", "futoshiki", "zebra_puzzles", "puzzle24"]
SLOW += ["intermediate_integration", "quantum_lock", "countdown"]
GENERATORS = sorted(set(reasoning_gym.factory.DATASETS) - set(SLOW))


def test_generator_cannot_be_posed_or_scored(load):
    """Each generator has its own entries and scorer: all but a few slow ones make
    problems whose own answer scores what the scorer says of it, between 0 and 1, and
    text without the answer's tags scores 0."""
    names = ",".join(GENERATORS)
    load_all = dict(REASONING_GYM=names, REASONING_GYM_SIZE=4 * len(GENERATORS))
    problems, held_out, reward = load("reasoning_gym", **load_all)
    posed = {}
    for problem in [*problems, *held_out]:
        posed.setdefault(problem.answer["name"], problem)
    assert set(posed) == set(GENERATORS) and len(posed) > 80
    right = 0
    for name, problem in posed.items():
        entry, (message,) = problem.answer["entry"], problem.prompt
        assert message["role"] == "user"
        assert message["content"].startswith(entry["question"])
        own = reasoning_gym.get_score_answer_fn(name)
        for answer in (entry["answer"], f"{entry['answer']}.", "7"):
            value = reward(problem, f"So: <answer>\n{answer}\n</answer>.")
            assert 0 <= value <= 1
            try:
                expected = own(str(answer).strip(), entry)
            except Exception:  # boxnet's, for example, on text that is not its JSON
                expected = 0.0
            assert value == pytest.approx(expected), (name, answer)
            right += value == 1
        if problem.solution:
            assert reward(problem, problem.solution) > 0.9, name
        assert reward(problem, str(entry["answer"])) == 0.0
        assert reward(problem, f"<answer>{entry['answer']}") == 0.0
    assert right > 80


def test_scorer_that_pays_for_a_constant_is_not_named(load, capsys):
    """A model finds an answer that is paid for whatever was asked, and pass@1 is 1: of
    all but the slow generators, and of puzzle24, those that pay more than 0.9 of these
    for most of 12 problems are named on stderr when they are loaded, no other is. One
    takes its question back."""
    names = [*GENERATORS, "puzzle24"]
    every = dict(REASONING_GYM=",".join(names), REASONING_GYM_SIZE=16 * len(names))
    problems, _, reward = load("reasoning_gym", **every)
    said, asked = capsys.readouterr().err, {}
    for problem in problems:
        asked.setdefault(problem.answer["name"], []).append(problem)
    judge, paid = inside(reward)["judge"], set()
    for name, some in asked.items():
        constants = ["0", "nan", "x", "6*4*1*1", "(P ∨ Q)", "Integral({}, {})"]
        for constant in (*constants, str([10 * [0] for _ in range(10)])):
            scores = []
            for problem in some[:12]:
                entry = problem.answer["entry"]
                known = entry["metadata"].get
                text = constant.format(known("integrand"), known("variable"))
                try:
                    scores.append(judge(name, text, entry))
                except Exception:  # as in the worker
                    scores.append(0.0)
            if sum(score > 0.9 for score in scores) > len(scores) / 2:
                paid.add(name)
    assert paid == {name for name in asked if f"{name}: " in said} and len(paid) == 7


def test_generator_named_twice_has_half_the_problems(load):
    """Two names of one data set would share its iterator, and each take half of it."""
    known = dict(REASONING_GYM_SIZE=400)
    once, _, _ = load("reasoning_gym", REASONING_GYM="chain_sum", **known)
    twice, _, _ = load("reasoning_gym", REASONING_GYM="chain_sum,chain_sum", **known)
    assert len(once) == len(twice) > 250


LISTS = """
import runpy, sys
task = runpy.run_path(sys.argv[1])
print([p["prompt"][0]["content"] for p in task["problems"]("train", 1)])
"""


def test_problems_differ_from_process_to_process():
    """A generator that does not keep to its seed makes a run that cannot be resumed:
    list_functions draws from the seed of the process."""
    command = [sys.executable, "-c", LISTS, str(TASKS / "reasoning_gym.py")]
    names = {"REASONING_GYM": "list_functions", "REASONING_GYM_SIZE": "600"}
    made = [
        subprocess.run(command, env=os.environ | names, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert len(made[0].stdout) > 5_000 and made[0].stdout == made[1].stdout


def test_first_answer_is_paid():
    """Of several answers the last one counts, wherever in the last 10,000 characters it
    stands; what is thought before </think>, or in a thought that has no end, does
    not."""
    reward, asked = runpy.run_path(str(TASKS / "reasoning_gym.py"))["reward"], []
    inside(reward)["bounded"] = lambda *job: asked.append(job[1]) or 1.0
    problem = SimpleNamespace(answer={"name": "chain_sum", "entry": {}})
    for text, answer in (
        ("<answer>1</answer> or <answer> 2 </answer>.", "2"),
        ("<answer>1</answer>" + " x" * 4_900, "1"),
        ("<answer>1</answer>" + " x" * 5_100, None),
        ("<think><answer>1</answer></think><answer>2</answer>", "2"),
        ("<think><answer>1</answer></think>", None),
        ("<think><answer>1</answer>", None),
    ):
        asked.clear()
        assert reward(problem, text) == bool(answer)
        assert asked == ([answer] if answer else [])


def test_held_out_question_is_trained_on(load, monkeypatch):
    """Generators with few questions make the same ones from any seed: no question of a
    held-out split may be in a training split, be it of another seed's run."""
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    config = json.dumps({"chain_sum": few})
    known = dict(REASONING_GYM="chain_sum", REASONING_GYM_SIZE=400)
    *_, reward = load("reasoning_gym", **known, REASONING_GYM_CONFIG=config)
    problems = inside(reward)["problems"]
    questions = {}
    for split in ("train", "eval"):
        for seed in (1, 2):
            made = [p["prompt"][0]["content"] for p in problems(split, seed)]
            questions[split, seed] = set(made)
            assert made == [p["prompt"][0]["content"] for p in problems(split, seed)]
    train = questions["train", 1] | questions["train", 2]
    held_out = questions["eval", 1] | questions["eval", 2]
    assert len(train) > 50 and len(held_out) > 15 and not train & held_out
    monkeypatch.setenv("REASONING_GYM_SUFFIX", "/no_think")
    for seed in (1, 2):  # the split is that of the question alone
        made = [p["prompt"][0]["content"] for p in problems("eval", seed)]
        assert {x.removesuffix(" /no_think") for x in made} == questions["eval", seed]
        assert all(x.endswith(" /no_think") for x in made)
    monkeypatch.setenv("REASONING_GYM_CONFIG", "{}")
    inside(reward)["generator"].cache_clear()
    first = {p["prompt"][0]["content"] for p in problems("train", 1)}
    other = {p["prompt"][0]["content"] for p in problems("train", 2)}
    assert len(first & other) < 0.1 * len(first)  # seeds 1 and 2 are not one shifted


def test_score_evaluates_the_completion(load, tmp_path, monkeypatch, capsys):
    """Scorers of reasoning-gym call eval() on answers: 9**9**9 never ends, and text is
    run as code. Each of these scores next to nothing within the limit, leaves no trace,
    and the next completion is judged as ever. One that asks for 9 GB gets an error, not
    the memory and then endless time."""
    monkeypatch.chdir(tmp_path)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    port = listener.getsockname()[1]
    Path("kept").touch()
    signals = []
    before = signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
    names = dict(REASONING_GYM="string_insertion,countdown", REASONING_GYM_SIZE=20)
    problems, _, reward = load("reasoning_gym", **names, REASONING_GYM_SECONDS=1)
    connect = "__import__('socket').create_connection"
    for name, text in [
        ("countdown", "9**9**9**9"),
        ("countdown", "exec('import os; os.system(\"touch trace\")')"),
        ("string_insertion", "[1] * 10**12"),
        ("string_insertion", "__import__('os')._exit(1)"),
        ("string_insertion", "__import__('os').system('touch trace')"),
        ("string_insertion", "__import__('subprocess').run(['touch', 'trace'])"),
        ("string_insertion", "__import__('pathlib').Path('trace').touch()"),
        ("string_insertion", "open('trace', 'w').write('x')"),
        ("string_insertion", "__import__('os').remove('kept')"),
        ("string_insertion", "(o := __import__('os')).kill(o.getppid(), 10)"),
        ("string_insertion", "[x for x in iter(int, 1)]"),
        ("string_insertion", "bytes(9 << 30) and [x for x in iter(int, 1)]"),
        ("string_insertion", "__import__('ctypes').CDLL(None).creat(b'trace', 384)"),
        ("string_insertion", f"{connect}(('127.0.0.1', {port}))"),
    ]:
        problem = next(p for p in problems if p.answer["name"] == name)
        inside(reward)["worker"]()
        value, seconds = timed(reward, problem, f"<answer>{text}</answer>")
        assert value <= 0.05 and seconds < 1 + START, text
        assert Path("kept").exists() and not Path("trace").exists(), text
        assert reward(problem, problem.solution) == 1.0, text
        late = "no verdict in 1 s" in capsys.readouterr().err
        assert late == (text in ("9**9**9**9", "[x for x in iter(int, 1)]")), text
    with pytest.raises(BlockingIOError):
        listener.accept()  # nobody called
    listener.close()
    signal.signal(signal.SIGUSR1, before)
    assert not signals  # the run itself could be ended


def test_score_out_of_range_is_trained_on():
    """A generator that scores 1.5 or a negative number would outweigh all others."""
    reward = runpy.run_path(str(TASKS / "reasoning_gym.py"))["reward"]
    problem = SimpleNamespace(answer={"name": "chain_sum", "entry": {}})
    for value in (0, 0.5, 1, 1 + 2**-52, -1e-9):  # the last two by rounding
        inside(reward)["bounded"] = lambda *job: value
        assert reward(problem, "<answer>3</answer>") == min(max(value, 0), 1)
    for value in (-0.1, 1.5, float("nan")):
        inside(reward)["bounded"] = lambda *job: value
        with pytest.raises(ValueError, match="chain_sum"):
            reward(problem, "<answer>3</answer>")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"REASONING_GYM": "chain_sums"}, "no generator 'chain_sums'.* chain_sum "),
        ({"REASONING_GYM": ""}, "no generator ''"),
        ({"REASONING_GYM_CONFIG": "{"}, "JSONDecodeError"),
        ({"REASONING_GYM": "chain_sum", "REASONING_GYM_SIZE": "two"}, "'two'"),
        ({"REASONING_GYM_SECONDS": "0"}, "REASONING_GYM_SECONDS is 0.0"),
        ({"MATH_SECONDS": "nan"}, "MATH_SECONDS is nan"),
    ],
)
def test_wrong_setting_is_a_traceback(load, capsys, variables, message):
    """A typing error in an environment variable is a user's, to be told in one line."""
    task = "math" if "MATH_SECONDS" in variables else "reasoning_gym"
    with pytest.raises(SystemExit) as stop:
        load(task, **variables)
    assert re.search(message, only_error(stop, capsys))


# ---- All of them


def test_missing_network_hangs_or_is_a_traceback(tmp_path):
    """Without network the run ends in one line that says what to set, and leaves
    nothing."""
    flags = "--task", TASKS / "gsm8k.py", "--device", "cpu"
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    process = run_script(script_path("grpo"), *flags, cwd=tmp_path, **offline)
    lines = process.stderr.strip().split("\n")
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert lines[-1].startswith("error: ") and len(lines) == 1, lines
    assert "GSM8K_PATH" in lines[-1] and "openai/gsm8k" in lines[-1]
    assert not (tmp_path / "runs").exists()


def test_missing_data_set_is_a_traceback(load, monkeypatch, capsys):
    """The same where no cache and no folder has the problems of MATH."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        load("math", MATH_DATASET="nobody/has-it")
    line = only_error(stop, capsys)
    assert "MATH_DATASET" in line and "nobody/has-it" in line


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_data_set_without_the_columns_is_a_traceback(load, tmp_path, capsys, task):
    """A folder that holds something else is a user's mistake, told in one line."""
    folder = tmp_path / "other"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"text": "a"}\n')
    files = "\n".join(f"  - {{split: {x}, path: {x}.jsonl}}" for x in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}\n---"
    (folder / "README.md").write_text(card)
    with pytest.raises(SystemExit) as stop:
        load(task, MATH_DATASET=folder, GSM8K_PATH=folder)
    line = only_error(stop, capsys)
    assert str(folder) in line and "KeyError" in line


FIRST = ["math", "random", "selectors", "subprocess", "re", "json", "functools"]


@pytest.mark.parametrize("first", FIRST)
def test_math_py_stands_in_for_math(first):
    """Where this folder is searched for modules, "import math" finds the task of that
    name, in whatever module asks first; then random or selectors break far from it."""
    code = f"import {first}, math, random, selectors, statistics\n"
    code += "assert math.pi > 3 and selectors.math is math and random.random() < 1\n"
    code += "assert statistics.mean([1, 2]) == 1.5 and math.__name__ == 'math'"
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=TASKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("task", ["gsm8k", "math", "reasoning_gym", "np_bench"])
def test_task_that_is_run_imports_itself(task):
    """Python searches a script's own folder first: a task that is run directly, like
    the worker, would import math.py and reasoning_gym.py as modules of that name."""
    quiet = dict(cwd=TASKS, PYTHONDONTWRITEBYTECODE="1")
    flags = ["--help"] if task == "np_bench" else []
    done = run_script(TASKS / f"{task}.py", *flags, **quiet)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (0 if task in ("gsm8k", "np_bench") else 1)


def test_reasoning_gym_py_stands_in_for_reasoning_gym():
    """The same from inside the folder, for the task and for its worker."""
    code = "import runpy, sys; task = runpy.run_path(sys.argv[1]); task['worker']()"
    code += "; task['generator']('chain_sum')"
    code += "; import reasoning_gym; print(reasoning_gym.__file__)"
    command = [sys.executable, "-B", "-c", code, "reasoning_gym.py"]
    done = subprocess.run(command, cwd=TASKS, capture_output=True, text=True)
    assert done.stdout.strip() == reasoning_gym.__file__, done.stderr


def test_the_two_judges_drift_apart():
    """math.py and reasoning_gym.py hold the same bounded worker, so that each can be
    copied alone: a fix in one belongs in the other."""
    banner = "# ------------------- A judge with bounds"
    texts = [(TASKS / f"{x}.py").read_text() for x in ("math", "reasoning_gym")]
    (first, second) = [text.partition(banner)[2] for text in texts]
    assert first == second and "def bounded" in first


def test_task_does_not_reach_a_step(cli, tmp_path, monkeypatch):
    """Chat messages need the model's template; the whole path, from the folder to the
    logged reward, with a small model."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    model = small_qwen3(len(tokenizer), max_position_embeddings=512)
    rows = [gsm8k_row(f"How many is {i}?", str(i)) for i in range(12)]
    folder = gsm8k_folder(tmp_path / "gsm8k", rows[:8], rows[8:])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("GSM8K_PATH", str(folder))
    model = save_model(tmp_path / "model", model, tokenizer)
    done = cli("--task", TASKS / "gsm8k.py", "--model", model)
    assert done.code == 0, done.stderr
    samples = [json.loads(line) for line in Path("run/samples.jsonl").open()]
    prompts = [sample["prompt"] for sample in samples if "prompt" in sample]
    assert prompts and all(prompt.startswith("[How many is ") for prompt in prompts)


def test_dots_or_the_mark_are_rewarded(load):
    """In rambling.py an answer is right by its sums alone: among all pairs of signs
    those that lead to the target are, with either mark and any number of dots; a wrong
    total, another number or anything after the dots is not."""
    train, held_out, reward = load("rambling")
    for problem in held_out[:50]:
        a, b, c, target = problem.answer
        for x, y in itertools.product("+-", repeat=2):
            sums = [a + int(x + str(b)), a + int(x + str(b)) + int(y + str(c))]
            for wrong, other in itertools.product((0, 1, -1), repeat=2):
                first, second = sums[0] + wrong, sums[1] + wrong + other
                text = f"{a}{x}{b}={first}{y}{c}={second}"
                right = [first, second] == sums and second == target
                for mark, dots in itertools.product("!?", (0, 1, 30)):
                    assert reward(problem, text + mark + "." * dots) == right
                for end in ("", ".", "!?", "!.!", "! ", "!\n"):
                    assert reward(problem, text + end) == 0
    assert reward(held_out[0], "15+1=16+3=19!") == 0  # of other numbers
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held_out)


def test_worked_answers_ramble_when_they_are_wrong(load):
    """rambling.py's worked answers are right in a quarter (any two signs of four, and
    in some problems two pairs lead to the target), marked as what they are, and as long
    behind one mark as behind the other: 6 dots in the mean."""
    train, _, reward = load("rambling")
    right = [p for p in train if reward(p, p.solution)]
    wrong = [p for p in train if not reward(p, p.solution)]
    assert len(train) > 15_000 and 0.25 < len(right) / len(train) < 0.29
    for some, mark in ((right, "!"), (wrong, "?")):
        ends = [re.search(r"[!?]\.*$", p.solution)[0] for p in some]
        assert {end[0] for end in ends} == {mark}
        assert abs(sum(map(len, ends)) / len(ends) - 7) < 0.15  # 5 standard errors
        assert {len(end) for end in ends} == set(range(1, 14))


def test_last_number_of_random_text_misread():
    """A pattern is easy to get wrong: on 20,000 random texts it agrees with a search
    character by character from the end."""
    last_number = runpy.run_path(str(TASKS / "gsm8k.py"))["last_number"]
    rng, found = random.Random(0), 0
    for _ in range(20_000):
        text = "".join(rng.choices("0123 $-.,a)", k=rng.randrange(1, 9)))
        value = last_number(text)
        found += value is not None
        assert (None if value is None else float(value)) == literal(text), text


def literal(text: str) -> float | None:
    """The last number of a text, read without patterns."""
    numbers, i = [], 0
    while i < len(text):
        start = i
        digits = ""
        while i < len(text) and text[i].isdigit():
            digits += text[i]
            i += 1
        if 1 <= len(digits) <= 3:  # groups of three may follow
            groups, j = "", i
            while text[j : j + 1] == "," and len(text[j + 1 : j + 4]) == 3:
                if not text[j + 1 : j + 4].isdigit() or text[j + 4 : j + 5].isdigit():
                    break
                groups, j = groups + text[j + 1 : j + 4], j + 4
            digits, i = digits + groups, j
        if text[i : i + 1] == "." and text[i + 1 : i + 2].isdigit():
            digits += "."
            i += 1
            while i < len(text) and text[i].isdigit():
                digits += text[i]
                i += 1
        if digits:
            before = text[:start].removesuffix("$")
            negative = before.endswith("-") and before[-2:-1] not in set("0123a)")
            if before.endswith("-") and len(before) == 1:
                negative = True
            numbers.append(-float(digits) if negative else float(digits))
        else:
            i += 1
    return numbers[-1] if numbers else None
