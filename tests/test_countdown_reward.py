"""The rewards of grpo.py read hostile text: bounded, exact, and never by eval()."""

from __future__ import annotations

import ast
import itertools
import random
import time
from collections import Counter
from fractions import Fraction

import pytest
from conftest import script_path

LENGTH = 1_000_000
HOSTILE = {
    "power": "9**9**9",
    "digits": "9" * LENGTH,
    "sum of a million digits": "1" * LENGTH + "+1=2",
    "result of a million digits": "3+5=" + "8" * LENGTH,
    "parentheses": "(" * LENGTH + ")" * LENGTH,
    "NUL": "3*5=15;15+7=22;22+2=24\0",
    "NUL in front": "\x003*5=15;15+7=22;22+2=24",
    "emoji": "3*5=15;15+7=22;22+2=24🙂",
    "Arabic digits": "٣*٥=١٥;١٥+٧=٢٢;٢٢+٢=٢٤",
    "full-width digits": "３*５=１５;１５+７=２２;２２+２=２４",
    "superscript": "3*5=1⁵;1⁵+7=22;22+2=24",
    "newline at the end": "3*5=15;15+7=22;22+2=24\n",
    "newline after a step": "3*5=15\n;15+7=22;22+2=24",
    "semicolons": ";" * LENGTH,
    "steps again and again": "3*5=15;15+7=22;22+2=24;" * 50_000,
    "no change again and again": "7/7=1;" * 200_000,
    "import": "__import__('os').getcwd()",
    "sign": "3*5=+15;15+7=22;22+2=24",
    "underscore": "3*5=1_5;1_5+7=22;22+2=24",
    "surrogate": "3*5=15\ud800",
    "empty": "",
    "spaces": " " * LENGTH,
}


def best_time(function, *args) -> tuple[float, float]:
    """The function's value, and the least of five times, in seconds."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        value = function(*args)
        times.append(time.perf_counter() - start)
    return value, min(times)


def is_right(given: list[int], target: int, text: str) -> bool:
    """Whether the text solves the problem: written anew, with exact fractions."""
    pool = Counter(map(Fraction, given))
    for step in text.split(";"):
        left, equals, right = step.partition("=")
        signs = [i for i, character in enumerate(left) if character in "+-*/"]
        if not equals or len(signs) != 1:
            return False
        parts = left[: signs[0]], left[signs[0] + 1 :], right
        if not all(part and set(part) <= set("0123456789") for part in parts):
            return False
        a, b, result = map(Fraction, parts)
        sign = left[signs[0]]
        if sign == "/" and b == 0:
            return False
        exact = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        if exact != result or (Counter([a]) + Counter([b])) - pool:
            return False
        pool = pool - Counter([a]) - Counter([b]) + Counter([result])
    return pool == Counter([Fraction(target)])


def chains(pool: list[int], done: tuple[str, ...] = ()):
    """Every chain of steps from these numbers, with the number it ends at."""
    if len(pool) == 1:
        yield pool[0], ";".join(done)
    for i, j in itertools.permutations(range(len(pool)), 2):
        rest = [x for k, x in enumerate(pool) if k not in (i, j)]
        a, b = pool[i], pool[j]
        results = {"+": a + b, "-": a - b, "*": a * b}
        if b and a % b == 0:
            results["/"] = a // b
        for sign, result in results.items():
            if result >= 0:
                yield from chains([*rest, result], (*done, f"{a}{sign}{b}={result}"))


def test_model_output_is_evaluated_as_code():
    """A reward that calls eval() or exec() runs whatever the model writes, and 9**9**9
    never ends (policy-gradient/GRPO-Zero and McGill-NLP/nano-aha-moment score so)."""
    nodes = list(ast.walk(ast.parse(script_path("grpo").read_text("utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)} - {"eval"}
    assert not names & {"eval", "exec", "__import__", "builtins", "literal_eval"}
    assert {"model", "re", "fullmatch"} <= names  # the walk does see the names


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_hangs_or_fools_the_parser(grpo, name):
    """Text of a degenerate model took a verifier minutes, or raised inside it
    (https://github.com/verl-project/verl/issues/6673, .../5635, .../5839): each string
    scores 0 within a millisecond, whatever its length."""
    problem = grpo.Problem("3 5 7 2=24:", [[3, 5, 7, 2], 24])
    assert grpo.countdown_reward(problem, "3*5=15;15+7=22;22+2=24") == 1.0
    value, seconds = best_time(grpo.countdown_reward, problem, HOSTILE[name])
    assert value == 0.0 and seconds < 1e-3
    problem = grpo.Problem("How many?", "123456")
    value, seconds = best_time(grpo.answer_reward, problem, HOSTILE[name])
    assert value == 0.0 and seconds < 1e-3


def test_parser_raises_or_pays_for_mutated_answers(grpo):
    """A parser that accepts one wrong form is found and exploited by the policy, one
    that raises stops the run (https://github.com/verl-project/verl/issues/5635): on
    100,000 mutated answers and random strings it never raises and agrees with an
    independent checker, in under 10 s."""
    rng = random.Random(0)
    problems = list(itertools.islice(grpo.countdown_problems("train", 0, 3), 500))
    alphabet, right, seconds = "0123456789+-*/=;" * 3 + " ()x.\n٣é", 0, 0.0
    for i in range(100_000):
        problem = problems[i % len(problems)]
        characters = list(problem.solution)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
            where, new = rng.randrange(len(characters) + 1), rng.choice(alphabet)
            kind = rng.randrange(4)
            if kind == 0:
                characters[where:where] = new
            elif kind == 1:
                characters[where : where + 1] = new
            elif kind == 2 and len(characters) > 1:
                del characters[where : where + 1]
            else:
                other = rng.randrange(len(characters))
                characters[where:where], characters[other] = characters[other], new
        text = "".join(characters)
        if i % 10 == 0:
            text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        start = time.perf_counter()
        value = grpo.countdown_reward(problem, text)
        seconds += time.perf_counter() - start
        assert value == is_right(*problem.answer, text), (problem, text)
        right += int(value)
    assert 10_000 < right < 50_000 and seconds < 10


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_worked_solution_scores_zero(grpo, size):
    """The warm start imitates the worked answers: each has to be right, with the
    numbers of its prompt, or the policy starts from mistakes."""
    for problem in itertools.islice(grpo.countdown_problems("train", 1, size), 500):
        given, target = problem.answer
        assert problem.prompt == f"{' '.join(map(str, given))}={target}:"
        assert len(given) == size
        assert grpo.countdown_reward(problem, problem.solution) == 1.0, problem
        assert is_right(given, target, problem.solution)


@pytest.mark.parametrize("given", [[3, 5, 2], [4, 4, 1], [6, 3, 3], [12, 20, 8]])
def test_right_answer_other_than_the_worked_one_scores_zero(grpo, given):
    """Many chains reach a target, and comparing with one worked answer punishes the
    others: of all chains over these numbers exactly those that end at it score 1."""
    every = list(chains(given))
    solvable = {end for end, _ in every}
    for target in range(100):
        problem = grpo.Problem("", [given, target])
        for end, text in every:
            assert grpo.countdown_reward(problem, text) == (end == target), (
                text,
                target,
            )
    assert len(solvable & set(range(100))) > 10


def test_generated_problem_has_no_answer(grpo):
    """A target that cannot be reached gives a group that is dead for ever: brute force
    over all chains reaches the target of each generated problem."""
    for problem in itertools.islice(grpo.countdown_problems("eval", 3, 3), 200):
        given, target = problem.answer
        assert target in {end for end, _ in chains(given)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_held_out_problem_is_trained_on(grpo, size):
    """A held-out set that shares problems with the training set, be it in another order
    of the numbers or under another seed, measures memory instead of skill."""
    seen, first = {}, {}
    for split, seed, n in [("train", 1, 5_000), ("eval", 1, 1_000), ("eval", 2, 1_000)]:
        endless = grpo.countdown_problems(split, seed, size)
        problems = list(itertools.islice(endless, n))
        first[split, seed] = problems[:20]
        keys = {(*sorted(p.answer[0]), p.answer[1]) for p in problems}
        seen[split, seed] = keys
        assert len(keys) > 20
    assert not seen["train", 1] & seen["eval", 1]
    assert not seen["train", 1] & seen["eval", 2]
    assert first["eval", 1] != first["eval", 2]


WRONG = {
    "a number twice": "3*3=9;9+7=16;16+2=18",
    "a result twice": "3*5=15;15+15=30;30-2=28",
    "a number that is not there": "4*5=20;20+2=22;22+2=24",
    "numbers left over": "3*5=15;15+7=22",
    "target at once": "12*2=24",
    "wrong arithmetic": "3*5=16;16+7=23;23+2=25",
    "wrong arithmetic in the last step": "3*5=15;15+7=22;22+2=23",
    "division with remainder": "7/2=3;3*5=15;15+3=18",
    "division with remainder, exact later": "7/3=2;2*5=10;10+2=12",
    "division by zero": "3/0=0",
    "a negative result": "3-5=-2;7-2=5;5+2=7",
    "steps after the target": "3*5=15;15+7=22;22+2=24;24*1=24",
    "an empty step": "3*5=15;;15+7=22;22+2=24",
    "a semicolon at the end": "3*5=15;15+7=22;22+2=24;",
    "words": "3*5=15;15+7=22;22+2=24 done",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_chain_is_rewarded(grpo, name):
    """Each of these is a shortcut that a policy finds if the reward checks less than
    every step, every number and the end."""
    text = WRONG[name]
    final = text.rstrip(";").rpartition("=")[2]
    for target in {24, int(final) if final.isdigit() else 24}:
        problem = grpo.Problem("", [[3, 5, 7, 2], target])
        assert grpo.countdown_reward(problem, text) == 0.0


ANSWERS = [
    ("72", "The sum is 70 + 2. Answer: 72", 1.0),
    ("72", "Answer: 72.", 1.0),
    ("72", "Answer: 71 Answer: 72", 1.0),
    ("72", "Answer: 72 Answer: 71", 0.0),
    ("72", "Answer: about 72 apples", 1.0),
    ("72", "Answer: 72 or 73", 0.0),
    ("72", "72", 1.0),
    ("72", "it is 72", 1.0),
    ("72", "172", 0.0),
    ("72", "72.5", 0.0),
    ("72", "-72", 0.0),
    ("-72", "Answer: -72", 1.0),
    (72, "Answer: 72", 1.0),
    (" 72 ", "Answer: 72", 1.0),
    ("Paris", "Answer: Paris", 1.0),
    ("Paris", "Answer: Paris.", 1.0),
    ("Paris", "Answer: not Paris", 0.0),
    ("Paris", "Paris. Answer: London", 0.0),
    ("1,234", "Answer: 1,234", 1.0),
    ("72", "", 0.0),
    ("72", "Answer: " + "72 " + "x" * 2_000, 0.0),
    ("72", "x" * 1_000_000 + " Answer: 72", 1.0),
    ("12", "so 50-12", 1.0),  # a difference, not a minus sign
    ("-12", "so 50-12", 0.0),
    ("-12", "(7)-12", 0.0),
    ("-12", "= -12", 1.0),
    ("-12", "x=-12", 1.0),
    ("B", "**Answer: B**", 1.0),
    ("B", "**Answer:** B.", 1.0),
    ("B", "Answer: **B**.\n", 1.0),
    ("3*4", "Answer: 3*4", 1.0),
    ("5 p.m.", "Answer: 5 p.m.", 1.0),
    ("Yes.", "Answer: yes. Answer: Yes.", 1.0),
    ("-5", "so x = \N{MINUS SIGN}5", 1.0),
    ("5", "so x = \N{MINUS SIGN}5", 0.0),
    ("5", "it is .5", 0.0),
    (".5", "it is .5", 1.0),
    ("2", "Answer: about 1/2", 0.0),
    ("1/2", "Answer: about 1/2", 1.0),
    ("72", "144/2=72", 1.0),
    (".", "", 0.0),
]


@pytest.mark.parametrize(("answer", "text", "value"), ANSWERS)
def test_answer_found_where_it_is_not_given(grpo, answer, text, value):
    """A reward that looks for the answer anywhere in the text pays for listing numbers:
    the text after the last "Answer:", or the last number in it, decides."""
    assert grpo.answer_reward(grpo.Problem("?", answer), text) == value


def test_tail_of_a_number_is_paid(grpo):
    """The last 1,000 characters may begin inside a number: 142 is not 42."""
    for text, value in (
        ("142" + " " * 998, 0.0),
        ("142" + "." + " " * 997, 0.0),
        ("so 42" + " " * 990, 1.0),
        ("1 and so on, 42" + " " * 990, 1.0),
        ("-42" + " " * 998, 0.0),
    ):
        assert grpo.answer_reward(grpo.Problem("?", "42"), text) == value, text[:20]
