"""benchmarks/tasks/np_bench.py: verifiers, references and data sets, by brute force."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, char_tokenizer, run_script, save_model, small_qwen3

nx = pytest.importorskip("networkx")
pytest.importorskip("scipy")

PLUGIN = Path(os.environ.get("NP_BENCH", ROOT / "benchmarks/tasks/np_bench.py"))
spec = importlib.util.spec_from_file_location("np_bench", PLUGIN)
np_bench = sys.modules["np_bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(np_bench)
TASKS = "colouring tsp hamiltonian knapsack clique independent meetings cut cover"
TASKS = (*TASKS.split(), "subset_sum")
LESS = {"colouring", "tsp", "cut", "cover"}  # is better


# ---- the ten problems once more, as literally as they are stated: checker and answers


def some_graph(rng: random.Random, n: int, p: float) -> list[list[int]]:
    """Random edges [u, v], u < v."""
    return [[u, v] for v in range(n) for u in range(v) if rng.random() < p]


def small_instance(task: str, rng: random.Random) -> dict:
    """A random instance, small enough to try all answers; it may have no solution."""
    n, edges = rng.randint(3, 6), lambda n: some_graph(rng, n, rng.choice((0.3, 0.7)))
    if task == "colouring":
        n = min(n, 5)
        made = {"n": n, "edges": edges(n)}
    elif task == "tsp":
        d = [[0] * n for _ in range(n)]
        for u, v in itertools.combinations(range(n), 2):
            d[u][v] = d[v][u] = rng.randint(1, 9)
        made = {"distances": d}
    elif task == "hamiltonian":
        made = {"n": n, "edges": some_graph(rng, n, 0.8)}
    elif task == "knapsack":
        items = [[rng.randint(1, 9), rng.randint(1, 9)] for _ in range(n)]
        made = {"items": items, "capacity": rng.randint(min(items)[0], 20)}
    elif task in ("clique", "independent"):
        made = {"n": n, "edges": edges(n), "joined": task == "clique"}
    elif task == "meetings":
        people = range(rng.randint(3, 5))
        who = lambda: sorted(rng.sample(people, rng.randint(1, 3)))
        spans = [[[9, 10], [11, 13]], [[9, 13]], [[10, 12]], [[9, 11], [12, 13]]]
        made = {"meetings": [[rng.randint(1, 2), who()] for _ in range(3)]}
        made["free"] = [rng.choice(spans) for _ in people]
        made["rooms"] = [rng.randint(1, 3) for _ in range(rng.randint(1, 2))]
    elif task == "cut":
        made = {"n": n, "edges": [[*edge, rng.randint(1, 9)] for edge in edges(n)]}
    elif task == "cover":
        sets = [
            rng.sample(range(n), rng.randint(1, n)) for _ in range(rng.randint(2, 6))
        ]
        made = {"n": n, "sets": sets}
    else:
        numbers = [rng.randint(1, 9) for _ in range(n)]
        made = {"numbers": numbers, "target": rng.randint(min(numbers), sum(numbers))}
    return {"task": task} | made


def is_order(answer: list[int], n: int) -> bool:
    return sorted(answer) == list(range(n))


def legs(answer: list[int]) -> list[set[int]]:
    return [{answer[i - 1], answer[i]} for i in range(len(answer))]


def scheduled(instance: dict, answer: list[int]) -> int | None:
    """People in meetings, hour by hour and seat by seat, or None."""
    if len(answer) % 3:
        return None
    held, attended, places = Counter(), 0, Counter()
    for i in range(0, len(answer), 3):
        meeting, room, start = answer[i : i + 3]
        if meeting >= len(instance["meetings"]) or room >= len(instance["rooms"]):
            return None
        hours, who = instance["meetings"][meeting]
        held[meeting] += 1
        attended += len(who)
        if len(who) > instance["rooms"][room]:
            return None
        for person in who:
            spans = instance["free"][person]
            inside = [s for s in spans if s[0] <= start and start + hours <= s[1]]
            if not inside:
                return None
            for hour in range(start, start + hours):
                places["person", person, hour] += 1
        for hour in range(start, start + hours):
            places["room", room, hour] += 1
    return attended if max((held | places).values()) == 1 else None


def judged(instance: dict, answer: list[int]) -> int | None:
    """The value of an answer, None if it is not feasible."""
    task, n = instance["task"], instance.get("n", 0)
    pairs = [set(edge[:2]) for edge in instance.get("edges", [])]
    if task == "colouring":
        wrong = len(answer) != n or any(
            answer[u] == answer[v] for u, v in instance["edges"]
        )
        return None if wrong else len({*answer})
    if task == "tsp":
        d = instance["distances"]
        if not is_order(answer, len(d)):
            return None
        return sum(d[answer[i - 1]][answer[i]] for i in range(len(answer)))
    if task == "hamiltonian":
        fine = is_order(answer, n) and all(leg in pairs for leg in legs(answer))
        return 1 if fine else None
    if task == "meetings":
        return scheduled(instance, answer)
    lists = {"knapsack": "items", "cover": "sets", "subset_sum": "numbers"}
    size = len(instance[lists[task]]) if task in lists else n
    if any(answer.count(x) > 1 or x >= size for x in answer):
        return None
    if task == "knapsack":
        weight = sum(instance["items"][i][0] for i in answer)
        value = sum(instance["items"][i][1] for i in answer)
        return value if weight <= instance["capacity"] else None
    if task in ("clique", "independent"):
        among = sum(pair <= {*answer} for pair in pairs)
        wanted = len(answer) * (len(answer) - 1) // 2 if task == "clique" else 0
        return len(answer) if among == wanted else None
    if task == "cut":
        if len(answer) != n // 2:
            return None
        return sum(e[2] for e in instance["edges"] if len({*e[:2]} & {*answer}) == 1)
    if task == "cover":
        union = [x for i in answer for x in instance["sets"][i]]
        return len(answer) if all(x in union for x in range(n)) else None
    total = sum(x for i, x in enumerate(instance["numbers"]) if i in answer)
    return len(answer) if total == instance["target"] else None


def all_answers(instance: dict):
    """Every answer that could be feasible, up to the order within a set."""
    task, n = instance["task"], instance.get("n", 0)
    if task == "colouring":
        yield from map(list, itertools.product(range(n), repeat=n))
    elif task in ("tsp", "hamiltonian"):
        rest = range(1, len(instance.get("distances", [])) or n)
        yield from ([0, *order] for order in itertools.permutations(rest))
    elif task == "meetings":
        places = [(), *itertools.product(range(len(instance["rooms"])), range(9, 17))]
        for each in itertools.product(places, repeat=len(instance["meetings"])):
            chosen = [[i, *place] for i, place in enumerate(each) if place]
            yield [number for choice in chosen for number in choice]
    else:
        lists = {"knapsack": "items", "cover": "sets", "subset_sum": "numbers"}
        size = len(instance[lists[task]]) if task in lists else n
        for k in range(1, size + 1):
            yield from map(list, itertools.combinations(range(size), k))


def solutions(instance: dict) -> list[tuple[int, list[int]]]:
    """(value, answer) of every feasible answer."""
    judgements = ((judged(instance, a), a) for a in all_answers(instance) if a)
    return [(value, answer) for value, answer in judgements if value is not None]


def optimum(instance: dict) -> int | None:
    """The best value there is."""
    values = [value for value, _ in solutions(instance)]
    best = min if instance["task"] in LESS else max
    return best(values) if values else None


STYLES = (
    lambda a: f"Answer: {', '.join(map(str, a))}",
    lambda a: f"Answer: 7, 7\nno.\n**Answer:** {a}.",
    lambda a: f"Answer: 7, 7\nno.\n**Answer**: {a}.",
    lambda a: f"3 * 5 = 15\n\nAnswer:\n{' '.join(map(str, a))}\n",
    lambda a: "x" * 2000 + f"Answer: ({';'.join(map(str, a))})",
    lambda a: f"Answer: {{{', '.join(map(str, a))}}}",  # as one writes a set
)


@pytest.mark.parametrize("task", TASKS)
def test_verifier_disagrees_with_brute_force(task):
    """A verifier that accepts one wrong answer is found and exploited by the policy,
    one that refuses a right answer teaches to avoid it, and one that raises stops the
    run (https://github.com/verl-project/verl/issues/5635): feasible and value are
    exactly those of an independent checker."""
    rng, seen = random.Random(task), Counter()
    for _ in range(150):
        instance = small_instance(task, rng)
        before, right = json.dumps(instance), [a for _, a in solutions(instance)]
        alone = [a for a in right if task == "meetings" and len(a) == 3]
        for _ in range(30):
            if (
                alone and rng.random() < 0.5
            ):  # each is feasible, together they may clash
                chosen = rng.choices(alone, k=rng.randint(2, 3))
                answer = [number for choice in chosen for number in choice]
            elif right and rng.random() < 0.7:
                answer = list(rng.choice(right))
                if task not in ("colouring", "meetings"):
                    rng.shuffle(answer)
            else:
                answer = [rng.randrange(7) for _ in range(rng.randint(1, 7))]
            for _ in range(rng.choice((0, 0, 1, 2))):
                where, new = rng.randrange(len(answer) + 1), rng.choice((*range(9), 99))
                answer[where : where + rng.randrange(2)] = [new] * rng.randrange(2)
                answer = answer or [new]
            feasible, value, why_not = np_bench.verify(
                instance, rng.choice(STYLES)(answer)
            )
            expected = judged(instance, answer)
            assert feasible == (expected is not None), (instance, answer, why_not)
            assert type(value) is int and value == (expected or 0), (instance, answer)
            assert bool(why_not) != feasible and len(why_not) < 2000
            seen[feasible] += 1
        assert json.dumps(instance) == before
    assert min(seen[True], seen[False]) > 500, seen


@pytest.mark.parametrize("task", TASKS)
def test_reference_is_not_the_optimum(task):
    """A quality of 1 is to mean optimal: from the worst feasible answer on, the solver
    finds what trying all answers finds."""
    rng, done, gains = random.Random(task), 0, 0
    while done < 25 or (gains < 8 and task != "hamiltonian"):
        instance = small_instance(task, rng)
        found = sorted(solutions(instance))
        if found:
            worst = found[-1 if task in LESS else 0]
            answer = np_bench.TASKS[task].solve(instance, worst[1])
            assert json.loads(json.dumps(answer)) == answer
            assert judged(instance, answer) == optimum(instance), instance
            done, gains = done + 1, gains + (worst[0] != optimum(instance))


def made(task: str, size: str, rng: random.Random) -> tuple[dict, list[int]]:
    """An instance of a real size and the answer that its generator knows."""
    kind = np_bench.TASKS[task]
    ranges = kind.sizes[np_bench.SIZES.index(size)]
    instance, known, _ = kind.make(rng, *(rng.randint(*ends) for ends in ranges))
    return {"task": task} | instance, known


def held_karp(d: list[list[int]]) -> int:
    """Length of the shortest tour, by dynamic programming over sets of cities."""
    best = {(1 << i, i): d[0][i] for i in range(1, len(d))}
    for _ in range(len(d) - 2):
        longer = {}
        for (seen, last), length in best.items():
            for city in range(1, len(d)):
                if not seen >> city & 1:
                    key, new = (seen | 1 << city, city), length + d[last][city]
                    longer[key] = min(new, longer.get(key, new))
        best = longer
    return min(length + d[last][0] for (_, last), length in best.items())


def fewest_colours(instance: dict) -> int:
    """By backtracking, vertex after vertex."""
    near = {v: set() for v in range(instance["n"])}
    for u, v in instance["edges"]:
        near[u].add(v)
        near[v].add(u)
    order = sorted(near, key=lambda v: -len(near[v]))

    def fits(colours: dict, k: int) -> bool:
        if len(colours) == len(order):
            return True
        v = max(
            near.keys() - colours,
            key=lambda v: (len({colours.get(u) for u in near[v]} - {None}), -v),
        )
        free = set(range(min(k, len(set(colours.values())) + 1)))
        free -= {colours.get(u) for u in near[v]}
        return any(fits(colours | {v: c}, k) for c in free)

    return next(k for k in itertools.count(1) if fits({}, k))


def best_sums(pairs: list, exact: bool, limit: int) -> int:
    """Largest value for a weight of exactly, or at most, the limit."""
    best = {0: 0}
    for weight, value in pairs:
        for total, old in list(best.items()):
            new = total + weight
            if new <= limit and best.get(new, -1) < old + value:
                best[new] = old + value
    return best[limit] if exact else max(best.values())


def test_sums_of_this_file_take_an_item_twice():
    """The dynamic programme below goes through a copy: 2 is not 4."""
    assert best_sums([(2, 1), (3, 1)], False, 4) == 1


@pytest.mark.parametrize("size", np_bench.SIZES)
def test_reference_is_only_good_at_real_sizes(size):
    """An integer program that stops at a gap or a tolerance, or a clique bound taken
    for a proof, is right for small instances only. Independent exact algorithms, where
    there are any for the size."""
    rng = random.Random(size)
    reference = lambda x, known: judged(x, np_bench.TASKS[x["task"]].solve(x, known))
    for _ in range(4 if size == "easy" else 2):
        x, known = made("knapsack", size, rng)
        assert reference(x, known) == best_sums(x["items"], False, x["capacity"])
        x, known = made("subset_sum", size, rng)
        ones = [(number, 1) for number in x["numbers"]]
        assert reference(x, known) == best_sums(ones, True, x["target"])
        for task in ("clique", "independent"):
            x, known = made(task, size, rng)
            graph = nx.Graph(map(tuple, x["edges"]))
            graph.add_nodes_from(range(x["n"]))
            if task == "clique" or size != "hard":
                graph = graph if task == "clique" else nx.complement(graph)
                assert reference(x, known) == max(map(len, nx.find_cliques(graph)))
        x, known = made("colouring", size, rng)
        assert reference(x, known) == fewest_colours(x)
        if size == "easy":
            x, known = made("cover", size, rng)
            assert reference(x, known) == optimum(x)
            x, known = made("cut", size, rng)
            assert reference(x, known) == optimum(x)
            x, known = made("tsp", size, rng)
            x["distances"] = [row[:11] for row in x["distances"][:11]]
            assert reference(x, known) == held_karp(x["distances"])


@pytest.mark.parametrize("size", np_bench.SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_reference_is_worse_than_the_planted_solution(task, size):
    """Whoever finds the planted solution would then be paid more than 1, or the
    generator plants what is none."""
    rng = random.Random(f"{task} {size}")
    for _ in range(2 if size == "hard" else 5):
        instance, known = made(task, size, rng)
        planted = judged(instance, known)
        reference = judged(instance, np_bench.TASKS[task].solve(instance, known))
        assert reference <= planted if task in LESS else reference >= planted
        assert reference > 0  # else one answer alone is worth anything
        text = f"Answer: {known}"
        assert len(text) < np_bench.LONGEST
        assert np_bench.verify(instance, text) == (True, planted, "")


def generated(task: str, split: str = "train", seed: int = 1, size: str = "easy"):
    """The stream of one task."""
    return np_bench.generated(split, seed, [task], [size])


class Asked:
    """What a script hands to the reward."""

    def __init__(self, line: dict):
        self.answer = json.loads(json.dumps(line["answer"]))


@pytest.mark.parametrize("task", TASKS)
def test_quality_ratio_is_upside_down(task):
    """reference / value where more is better pays for the worst answer; and a value
    beyond the reference would make the mean quality unbounded."""
    best = np_bench.TASKS[task].maximise
    assert best == (task not in LESS)
    line = next(generated(task))
    problem, reference = Asked(line), line["reference"]
    assert np_bench.reward(problem, line["solution"]) == 1.1
    assert np_bench.reward(problem, "I do not know.") == 0.0
    assert np_bench.reward(problem, "Answer: I do not know.") == 0.0
    assert np_bench.reward(problem, line["solution"] + ", 9999") == 0.1
    for other in (reference * 2, reference * 5, reference / 2, reference / 5):
        problem.answer["reference"] = other
        ratio = reference / other if best else other / reference
        paid = np_bench.reward(problem, line["solution"])
        assert paid == pytest.approx(0.1 + min(1, ratio), abs=1e-12)


def least_form(instance: dict, answer: list[int]) -> tuple:
    """The smallest of all the ways to write this solution."""
    task, n = instance["task"], instance.get("n", 0)
    if task in ("tsp", "hamiltonian"):
        both = answer, answer[::-1]
        turned = (way[i:] + way[:i] for way in both for i in range(len(answer)))
        return min(map(tuple, turned))
    if task == "colouring":
        names = itertools.permutations(range(n))
        return min(tuple(name[c] for c in answer) for name in names)
    if task == "meetings":
        return tuple(sorted(zip(*[iter(answer)] * 3)))
    other = sorted({*range(n)} - {*answer})
    halves = task == "cut" and len(other) == len(answer)
    return tuple(min(sorted(answer), other) if halves else sorted(answer))


@pytest.mark.parametrize("task", TASKS)
def test_one_solution_counts_as_two(task):
    """Distinct answers are counted to see diversity: a tour from another city, colours
    with other names, a set in another order or the other half of a cut is no new one,
    and two solutions are never taken for one. By all solutions of small instances, each
    written in two ways; and feasible and quality are those of the reward."""
    rng = random.Random(task)
    for _ in range(12):
        instance = small_instance(task, rng)
        found = solutions(instance)
        rng.shuffle(found)
        seen = {}
        for value, answer in found[:200]:
            parts = [answer[i : i + 3] for i in range(0, len(answer), 3)]
            rng.shuffle(parts)
            other = rng.sample(answer, len(answer))
            if task in ("tsp", "hamiltonian"):
                other = answer[2:] + answer[:2]
            elif task == "colouring":
                names = rng.sample(range(9), 9)
                other = [names[c] for c in answer]
            elif task == "meetings":
                other = [number for part in parts for number in part]
            for way in answer, other:
                line = {
                    "prompt": "",
                    "answer": {"instance": instance, "reference": value},
                }
                text = f"Answer: {', '.join(map(str, way))}"
                feasible, quality, what = np_bench.reward.verify(Asked(line), text)
                assert feasible and quality == 1.0
                assert seen.setdefault(what, least_form(instance, answer)) == (
                    least_form(instance, answer)
                )
        assert len(set(seen.values())) == len(seen)
    wrong = np_bench.reward.verify(Asked(line), "Answer: 9998, 9998")
    assert wrong == (False, 0.0, None)


LENGTH = 1_000_000
HOSTILE = {
    "power": "9**9**9",
    "digits": "9" * LENGTH,
    "900 digits": "9" * 900,
    "five digits": "00001",
    "parentheses": "(" * LENGTH + ")" * LENGTH,
    "400 parentheses": "(" * 400 + ")" * 400,
    "spaces": " " * LENGTH,
    "spaces and a letter": " " * 900 + "x",
    "commas": "," * LENGTH,
    "commas and a letter": "1" + "," * 900 + "x",
    "digits and a letter": "1" * 900 + "x",
    "numbers without end": "1, " * (LENGTH // 3),
    "answers without end": "Answer: " * (LENGTH // 8),
    "garbage without end": "Answer Answ: 1," * (LENGTH // 15),
    "NUL": "0, 1\0",
    "emoji": "0, 1 🙂",
    "Arabic digits": "1, ٢",
    "full-width digits": "1, ２",
    "superscript": "1, 2²",
    "surrogate": "0, \ud800",
    "fraction": "1.5, 2",
    "sign": "-1, 2",
    "exponent": "1e9",
    "underscore": "1_0",
    "product": "2*3",
    "brackets alone": "[[]]",
    "nothing": "",
    "import": "__import__('os').getcwd()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answer_hangs_or_fools_the_parser(name):
    """Text of a degenerate model took a verifier minutes, or raised inside it
    (https://github.com/verl-project/verl/issues/6673, .../5635, .../5839): each scores
    0 within a millisecond, after "Answer:" and without it."""
    for task in TASKS:
        problem = Asked(next(generated(task)))
        for text in ("Answer: " + HOSTILE[name], HOSTILE[name]):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                paid = np_bench.reward(problem, text)
                times.append(time.perf_counter() - start)
            assert paid == 0.0 and min(times) < 1e-3, task


@pytest.mark.parametrize("task", TASKS)
def test_longest_list_takes_quadratic_time(task):
    """What parses goes through the verifier: a thousand characters of numbers, for the
    largest instances, are answered within a few milliseconds too."""
    rng = random.Random(task)
    instance, known = made(task, "hard", rng)
    lists = [known, *([n] * length for n in (0, 99) for length in (3, 330))]
    lists += [rng.sample(range(n), n) for n in (3, 20, 30, 60, 100)]
    for numbers in lists:
        text, times = f"Answer: {' '.join(map(str, numbers))}", []
        for _ in range(3):
            start = time.perf_counter()
            np_bench.verify(instance, text)
            times.append(time.perf_counter() - start)
        assert min(times) < 2e-3


def test_model_output_is_evaluated_as_code():
    """9**9**9 never ends, and whatever else the model writes would run."""
    nodes = list(ast.walk(ast.parse(PLUGIN.read_text("utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & {"eval", "exec", "__import__", "builtins", "literal_eval"}
    assert {"fullmatch", "milp"} <= names  # the walk does see the names


def command(folder: Path, *flags: str, **env: str):
    """np_bench.py's command line in a folder."""
    return run_script(PLUGIN, *flags, cwd=folder, **env)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_seed_does_not_decide_everything(tmp_path):
    """The order of a set of words differs from process to process; a data set that
    hangs on it cannot be made again. And another seed is another data set."""
    flags = ["--n", "60", "--tasks", "meetings", "--sizes", "medium,hard"]
    for name in "12":
        result = command(
            tmp_path, "--out", f"{name}.jsonl", *flags, PYTHONHASHSEED=name
        )
        assert result.returncode == 0, result.stderr
    for end in ("jsonl", "test.jsonl"):
        one, two = ((tmp_path / f"{name}.{end}").read_bytes() for name in "12")
        assert one == two
    streams = (np_bench.generated("train", x, TASKS, ["easy"]) for x in (1, 1, 2))
    a, b, c = (list(itertools.islice(stream, 100)) for stream in streams)
    assert a == b and {line["task"] for line in a} == set(TASKS)
    assert not {line["prompt"] for line in a} & {line["prompt"] for line in c}


def test_splits_share_an_instance(monkeypatch):
    """Where instances are few, two streams meet: only a rule on the instance itself
    keeps the held-out ones out of the training, under any seed. Graphs with 4 vertices
    are just 64."""
    tiny = np_bench.TASKS["independent"]._replace(sizes=([(4, 4)],) * 3)
    monkeypatch.setitem(np_bench.TASKS, "independent", tiny)
    seen = {}
    for split in ("train", "eval"):
        lines = [
            line
            for seed in (1, 2, 3)
            for line in itertools.islice(generated("independent", split, seed), 100)
        ]
        seen[split] = {json.dumps(line["answer"]["instance"]) for line in lines}
        seen[split, "prompt"] = {line["prompt"] for line in lines}
    assert not seen["train"] & seen["eval"] and len(seen["train"]) > len(seen["eval"])
    assert not seen["train", "prompt"] & seen["eval", "prompt"]


@pytest.mark.parametrize("task", TASKS)
def test_prompt_leaves_out_a_part_of_the_instance(task):
    """A number that decides whether an answer is feasible, but is not in the prompt,
    has to be guessed: every number of the instance is there, as often, not counting
    the numbers of the rows and the example of an answer."""
    for line in itertools.islice(generated(task), 5):
        text, found, example = line["prompt"].rpartition(" First reason ")
        text = re.sub(r"(?<=[:;] )[0-9]+: ", "", text)
        instance = {k: v for k, v in line["answer"]["instance"].items() if k != "n"}
        assert not Counter(numbers_in(json.dumps(instance))) - Counter(numbers_in(text))
        assert found and "Answer:" in example and len(text) < 2000
        assert line["answer"]["instance"].get("n", 1) - 1 in [0, *numbers_in(text)]


def numbers_in(text: str) -> list[int]:
    """The numbers in a text."""
    return [int(number) for number in re.findall("[0-9]+", text)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A folder with np.jsonl and np.test.jsonl."""
    folder = tmp_path_factory.mktemp("np")
    flags = "--out np.jsonl --n 64 --tasks knapsack,cut,meetings --sizes easy,medium"
    result = command(folder, *flags.split())
    assert result.returncode == 0, result.stderr
    return folder


def test_dataset_lacks_what_the_reward_needs(dataset):
    """A line read back is worth what it was: its solution earns all, and the held-out
    file is a tenth and disjoint."""
    train, test = (lines_of(dataset / f"np{x}.jsonl") for x in ("", ".test"))
    assert (len(train), len(test)) == (64, 7)
    for line in train + test:
        assert set(line) >= {"prompt", "answer", "task", "size", "reference"}
        assert np_bench.reward(Asked(line), f"so\n{line['solution']}") == 1.1
        value = judged(line["answer"]["instance"], numbers_in(line["solution"]))
        assert value == line["reference"] == line["answer"]["reference"]
    assert {line["task"] for line in train} == {"knapsack", "cut", "meetings"}
    assert {line["size"] for line in train} == {"easy", "medium"}
    assert not {line["prompt"] for line in train} & {line["prompt"] for line in test}


def test_existing_dataset_is_overwritten(tmp_path):
    """A data set that a run was made on is not there a second time: neither file is
    touched, and none appears, where one of them is there already."""
    for taken, other in (("a.jsonl", "a.test.jsonl"), ("b.test.jsonl", "b.jsonl")):
        (tmp_path / taken).write_text("mine")
        result = command(tmp_path, "--out", taken.replace(".test", ""), "--n", "1")
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert taken in result.stderr and (tmp_path / taken).read_text() == "mine"
        assert not (tmp_path / other).exists()


def test_mistake_of_the_user_shows_a_traceback(tmp_path, capsys, monkeypatch):
    """One line that names the mistake, exit code 2, nothing written."""
    out = ("--out", "x.jsonl")
    (tmp_path / "missing").mkdir()
    reason = "raise ImportError(\"No module named 'networkx'\")"
    (tmp_path / "missing" / "networkx.py").write_text(reason)
    for flags, env, word in (
        ((*out, "--tasks", "knapsack,tps"), {}, "'tps'"),
        ((*out, "--sizes", "huge"), {}, "'huge'"),
        ((*out, "--n", "0"), {}, "--n"),
        (("--out", "no/such/x.jsonl"), {}, "no/such"),
        (("--out", "."), {}, "name a file"),
        (("--n", "1", "--out", "/proc/x.jsonl"), {}, "cannot write"),
        (out, {"PYTHONPATH": str(tmp_path / "missing")}, "networkx"),
    ):
        result = command(tmp_path, *flags, **env)
        assert result.returncode == 2 and word in result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    (tmp_path / "bad.jsonl").write_text("{")
    for name, value in (
        ("NP_TASKS", "knapsack,tps"),
        ("NP_SIZES", "huge"),
        ("NP_DATA", str(tmp_path / "none.jsonl")),
        ("NP_DATA", str(tmp_path / "bad.jsonl")),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(SystemExit) as stop:  # at once, not at the first problem
                np_bench.problems("train", 1)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert error.startswith(f"error: {name}: ") and value.split(",")[-1] in error
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bad.jsonl", "missing"]


def test_script_cannot_load_the_plug_in(grpo, monkeypatch):
    """As grpo.py loads it, with the environment variables that choose: the problems are
    of that task and size, and chat messages, as a chat model must be asked."""
    monkeypatch.setenv("NP_TASKS", "hamiltonian")  # the quickest, as 20,000 are drawn
    monkeypatch.setenv("NP_SIZES", "easy")
    args = grpo.Args(task=str(PLUGIN), eval_prompts=8)
    train, held_out, reward = grpo.load_task(args)
    assert len(train) > 19_000 and len(held_out) == 8
    for problem in train[:20] + held_out:
        assert problem.answer["instance"]["task"] == "hamiltonian"
        assert 10 <= problem.answer["instance"]["n"] <= 15
        assert [message["role"] for message in problem.prompt] == ["user"]
        assert reward(problem, problem.solution) == 1.1
        assert reward(problem, "") == 0.0


def test_dataset_cannot_be_trained_on(cli, dataset, tmp_path, monkeypatch):
    """NP_DATA: the plug-in reads what it wrote, the test file being what is held out,
    and grpo.py makes a step on it; of a model without a chat template, with NP_CHAT."""
    monkeypatch.setenv("NP_CHAT", "0")
    monkeypatch.setenv("NP_DATA", str(dataset / "np.jsonl"))
    stored = [[x["prompt"] for x in np_bench.problems(s, 9)] for s in ("train", "eval")]
    files = dataset / "np.jsonl", dataset / "np.test.jsonl"
    assert stored == [[x["prompt"] for x in lines_of(file)] for file in files]
    tokenizer = char_tokenizer()
    model = small_qwen3(len(tokenizer), max_position_embeddings=2048)
    folder = save_model(tmp_path / "model", model, tokenizer)
    result = cli("--task", str(PLUGIN), "--model", folder, "--steps", "1")
    assert result.code == 0, result.stderr
    sample = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"] in stored[0] and math.isfinite(sum(sample["rewards"]))
