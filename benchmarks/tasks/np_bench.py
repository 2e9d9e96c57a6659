"""Ten NP-hard problems in plain English with graded rewards, for real models.

The tasks are those of NP-Engine (github.com/OliverLeeXZ/NP-Engine); that DMPO (arXiv
2605.19461) uses exactly these is inferred. As there, a minimum cut has equal halves.
The easy sizes are published; medium and hard, the generators and all words are ours.

    NP_TASKS=knapsack,tsp NP_SIZES=easy,medium python algos/grpo.py --model ... \\
        --task benchmarks/tasks/np_bench.py --max-new-tokens 1024 \\
        --micro-batch-size 4 --rollout-batch-size 64 --gradient-checkpointing

    NP_TASKS  names in TASKS below, separated by commas (default: all ten)
    NP_SIZES  easy, medium, hard (default: easy)
    NP_CHAT   0: prompts are plain text, for a base model; else chat messages
    NP_DATA   a data set written before, read instead of generating anything

A completion reasons and ends with `Answer:` and a list of numbers. Its reward is 0.1 if
there is such a list, plus, if that is a feasible solution, its quality: value /
reference where more is better, reference / value where less is. So "right", a reward of
1 or more, which is what pass@1 and prefixrl.py's hard problems count, is a quality of
at least 0.9.

A script takes 20,000 problems when it starts, and each is solved first: one or two
minutes at easy sizes, ten at hard ones. To pay once, write a data set and use it:

    python benchmarks/tasks/np_bench.py --out np.jsonl --n 1000
    NP_DATA=np.jsonl python algos/grpo.py --task benchmarks/tasks/np_bench.py ...

The first writes np.jsonl and the held-out np.test.jsonl, one {prompt, answer, solution,
task, size, reference} a line; answer holds all that the reward needs. Not for --data,
whose reward compares texts: a solution other than the reference would get nothing.

References are optimal for every task and size: by networkx, by scipy's integer programs
(HiGHS), by enumeration. Needs benchmarks/requirements.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn


def fail(message: str) -> NoReturn:
    """Stop with one line about what the user can put right, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


try:
    import networkx as nx
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
except ImportError as e:
    fail(f"np_bench.py: {e}: pip install -r benchmarks/requirements.txt")

SIZES = "easy", "medium", "hard"
LONGEST = 1000  # characters at the end of a completion that are read


class Task(NamedTuple):
    """One kind of problem. An instance is a dict of JSON values, an answer a list of at
    least one number >= 0."""

    maximise: bool
    sizes: tuple  # easy, medium, hard: a range for each number that make takes
    make: Callable  # (rng, numbers) -> instance, a feasible answer, the question
    value: Callable  # (instance, answer) -> integer; Infeasible if it is none
    solve: Callable  # (instance, a feasible answer) -> an optimal answer


class Infeasible(Exception):
    """Why an answer is no solution."""


# ----------------------------- What the tasks share -----------------------------------


def require(condition: bool, why_not: str) -> None:
    """Infeasible unless the condition holds."""
    if not condition:
        raise Infeasible(why_not)


def require_subset(answer: list[int], n: int) -> None:
    """Different numbers below n."""
    require(max(answer) < n, f"{max(answer)} is out of range")
    require(len(set(answer)) == len(answer), "a number is repeated")


def require_order(answer: list[int], n: int) -> None:
    """All numbers below n, each once."""
    require_subset(answer, n)
    require(len(answer) == n, f"{n - len(answer)} numbers are missing")


def listed(rows: list) -> str:
    """Numbered rows: "0: first; 1: second"."""
    return "; ".join(f"{i}: {row}" for i, row in enumerate(rows))


def spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def around(tour: list[int]) -> list[tuple[int, int]]:
    """Neighbours on a closed tour, the smaller first."""
    return [(min(pair), max(pair)) for pair in zip(tour, [*tour[1:], tour[0]])]


def random_graph(rng: random.Random, n: int, p: Callable) -> dict:
    """n vertices; u < v are joined with probability p(u, v)."""
    pairs = itertools.combinations(range(n), 2)
    return {"n": n, "edges": [[u, v] for u, v in pairs if rng.random() < p(u, v)]}


def graph_of(instance: dict) -> nx.Graph:
    """The instance's graph, vertices without an edge included."""
    graph = nx.empty_graph(instance["n"])
    graph.add_edges_from(instance["edges"])
    return graph


def graph_text(instance: dict) -> str:
    edges = ", ".join(f"{u}-{v}" for u, v in instance["edges"])
    return f"A graph has the vertices 0 to {instance['n'] - 1} and the edges {edges}."


def integer_program(cost, rows, low, high, least=0) -> list[int] | None:
    """Where x is 1 in the x of zeros and ones with the smallest cost @ x such that low
    <= rows @ x <= high and x >= least; None if there is no such x."""
    limits = LinearConstraint(np.array(rows, float), low, high)
    options = dict(bounds=Bounds(least, 1), options={"mip_rel_gap": 0})
    result = milp(cost, integrality=1, constraints=limits, **options)
    if result.status not in (0, 2):  # 2: infeasible
        raise RuntimeError(f"integer program: {result.message}")
    return None if result.status else np.flatnonzero(result.x > 0.5).tolist()


# ------------------------------------- Tasks ------------------------------------------


def colouring_make(rng: random.Random, n: int, k: int) -> tuple:
    """Hidden colour classes of equal size, edges only between them."""
    colours = [v % k for v in rng.sample(range(n), n)]
    graph = random_graph(rng, n, lambda u, v: 0.5 * (colours[u] != colours[v]))
    question = (
        f"{graph_text(graph)} Give every vertex a colour, so that the two ends of each "
        "edge have different colours, with as few colours as possible. Colours are "
        "numbers from 0 on. List the colour of vertex 0, of vertex 1, and so on"
    )
    return graph, colours, question


def colouring_value(instance: dict, answer: list[int]) -> int:
    require(len(answer) == instance["n"], f"{len(answer)} colours")
    for u, v in instance["edges"]:
        require(answer[u] != answer[v], f"{u} and {v} have the same colour")
    return len(set(answer))


def colouring_solve(instance: dict, answer: list[int]) -> list[int]:
    """One colour fewer again and again, until there are as many as vertices in the
    largest clique, or the program over x[vertex, colour] has no answer."""
    n, clique = instance["n"], nx.max_weight_clique(graph_of(instance), None)[0]
    ends = np.zeros((len(instance["edges"]), n))
    for row, edge in zip(ends, instance["edges"]):
        row[edge] = 1
    while (k := len(set(answer)) - 1) >= len(clique):
        rows = np.r_[np.kron(np.eye(n), np.ones(k)), np.kron(ends, np.eye(k))]
        low = np.r_[np.ones(n), np.zeros(len(ends) * k)]
        given = np.zeros((n, k))  # of the answers that differ in names alone, seek one
        given[clique, range(len(clique))] = 1
        fewer = integer_program(np.zeros(n * k), rows, low, 1, given.ravel())
        if fewer is None:
            break
        answer = [x % k for x in fewer]
    return answer


def tsp_make(rng: random.Random, n: int) -> tuple:
    """Cities on a 100 x 100 map, distances rounded."""
    cities = [(rng.randint(0, 100), rng.randint(0, 100)) for _ in range(n)]
    distances = [[round(math.dist(a, b)) for b in cities] for a in cities]
    question = (
        f"Each of {n} cities, with its distances to city 0, to city 1, and so on: "
        f"{listed(map(spaced, distances))}. Find the shortest round trip that visits "
        "every city once and returns to its start. List the cities in the order of the "
        "visits, each once"
    )
    return {"distances": distances}, list(range(n)), question


def tsp_value(instance: dict, answer: list[int]) -> int:
    require_order(answer, len(instance["distances"]))
    return sum(instance["distances"][a][b] for a, b in around(answer))


def tsp_solve(instance: dict, _: list[int]) -> list[int]:
    """Two roads at each city; then, while the tour is in parts, two out of each."""
    roads = list(itertools.combinations(range(n := len(instance["distances"])), 2))
    cost = [instance["distances"][a][b] for a, b in roads]
    parts, rows = [{city} for city in range(n)], []
    while len(parts) > 1:
        rows += [[(a in part) != (b in part) for a, b in roads] for part in parts]
        high = [2] * n + [n] * (len(rows) - n)
        tour = nx.Graph(roads[i] for i in integer_program(cost, rows, 2, high))
        parts = list(nx.connected_components(tour))
    return list(nx.dfs_preorder_nodes(tour, 0))


def hamiltonian_make(rng: random.Random, n: int) -> tuple:
    """A hidden cycle, and every other edge with probability 0.2."""
    cycle = rng.sample(range(n), n)
    hidden = set(around(cycle))
    graph = random_graph(rng, n, lambda u, v: 1.0 if (u, v) in hidden else 0.2)
    question = (
        f"{graph_text(graph)} Find a cycle along edges that visits every vertex once "
        "and returns to its start. List the vertices in the order of the visits, each "
        "once"
    )
    return graph, cycle, question


def hamiltonian_value(instance: dict, answer: list[int]) -> int:
    """Any such cycle is as good as any other: its value is 1."""
    require_order(answer, instance["n"])
    missing = set(around(answer)) - set(map(tuple, instance["edges"]))
    require(not missing, f"no edges {missing}")
    return 1


def hamiltonian_solve(_: dict, answer: list[int]) -> list[int]:
    return answer


def knapsack_make(rng: random.Random, n: int) -> tuple:
    """Half of the total weight fits."""
    items = [[rng.randint(1, 50), rng.randint(1, 100)] for _ in range(n)]
    capacity = sum(weight for weight, _ in items) // 2
    question = (
        f"Items, each with its weight and its value: {listed(map(spaced, items))}. "
        f"Choose items whose total weight is at most {capacity} and whose total value "
        "is as large as possible. List the numbers of the chosen items"
    )
    return {"items": items, "capacity": capacity}, [items.index(min(items))], question


def knapsack_value(instance: dict, answer: list[int]) -> int:
    require_subset(answer, len(instance["items"]))
    weight, value = map(sum, zip(*(instance["items"][i] for i in answer)))
    require(weight <= instance["capacity"], f"the weight is {weight}")
    return value


def knapsack_solve(instance: dict, _: list[int]) -> list[int]:
    weights, values = np.transpose(instance["items"])
    return integer_program(-values, [weights], 0, instance["capacity"])


def vertices_make(rng: random.Random, n: int, joined: bool) -> tuple:
    """A hidden set of a third of the vertices."""
    hidden = set(rng.sample(range(n), n // 3))
    p = lambda u, v: float(joined) if {u, v} <= hidden else 0.35
    graph = random_graph(rng, n, p) | {"joined": joined}
    question = (
        f"{graph_text(graph)} Find as many vertices as possible of which "
        f"{'every two are joined' if joined else 'no two are joined'} by an edge. "
        "List these vertices"
    )
    return graph, sorted(hidden), question


def clique_value(instance: dict, answer: list[int]) -> int:
    require_subset(answer, instance["n"])
    edges, joined = set(map(tuple, instance["edges"])), instance["joined"]
    for pair in itertools.combinations(sorted(answer), 2):
        require((pair in edges) == joined, f"{pair} are {'not ' * joined}joined")
    return len(answer)


def clique_solve(instance: dict, _: list[int]) -> list[int]:
    graph = graph_of(instance)
    graph = graph if instance["joined"] else nx.complement(graph)
    return sorted(nx.max_weight_clique(graph, None)[0])


clique_make = functools.partial(vertices_make, joined=True)
independent_make = functools.partial(vertices_make, joined=False)
independent_value, independent_solve = clique_value, clique_solve


def meetings_make(rng: random.Random, meetings: int, people: int, rooms: int) -> tuple:
    """Everybody has an hour off; at least one meeting can take place."""
    size, options = lambda: rng.randint(2, people - 2), []
    while not options:
        instance = {"rooms": [size() for _ in range(rooms)], "meetings": [], "free": []}
        for _ in range(meetings):
            who = sorted(rng.sample(range(people), size()))
            instance["meetings"].append([rng.randint(1, 3), who])
        for _ in range(people):
            start, off, end = map(rng.randint, (9, 11, 16), (10, 14, 17))
            instance["free"].append([[start, off], [off + 1, end]])
        options = meeting_options(instance)
    meetings = [
        f"{hours} h, people {spaced(who)}" for hours, who in instance["meetings"]
    ]
    free = [" and ".join(f"{a}-{b}" for a, b in spans) for spans in instance["free"]]
    question = (
        f"Meetings, each with its length and its people: {listed(meetings)}. Hours at "
        f"which each person is free: {listed(free)}. Seats in each room: "
        f"{listed(instance['rooms'])}. A meeting starts on the hour, in a room with a "
        "seat for each of its people, and all of them are free until it ends; no room "
        "and no person has two meetings at once. Meetings may be left out. Schedule "
        "meetings with as many people as possible, summed over the meetings. List "
        "three numbers for each meeting that takes place: meeting, room, hour of its "
        "start"
    )
    return instance, list(options[0]), question


def meeting_options(instance: dict) -> list[tuple[int, int, int]]:
    """Every (meeting, room, hour) that is feasible alone."""
    numbers, options = (range(len(instance[key])) for key in ("meetings", "rooms")), []
    for choice in itertools.product(*numbers, range(9, 17)):
        with contextlib.suppress(Infeasible):
            meetings_value(instance, choice)
            options.append(choice)
    return options


def occupied(instance: dict, choice: tuple[int, int, int]) -> list[tuple]:
    """Each (room or person, hour) that a meeting takes."""
    meeting, room, start = choice
    hours, who = instance["meetings"][meeting]
    return list(itertools.product([f"room {room}", *who], range(start, start + hours)))


def meetings_value(instance: dict, answer: list[int]) -> int:
    require(len(answer) % 3 == 0, "not three numbers for each meeting")
    require_subset(answer[::3], len(instance["meetings"]))
    busy, people = set(), 0
    for meeting, room, start in zip(*[iter(answer)] * 3):
        hours, who = instance["meetings"][meeting]
        require(room < len(instance["rooms"]), f"{room} is no room")
        require(len(who) <= instance["rooms"][room], f"room {room} is too small")
        for person in who:
            spans = instance["free"][person]
            free = any(a <= start and start + hours <= b for a, b in spans)
            require(free, f"{person} is not free for meeting {meeting}")
        taken = occupied(instance, (meeting, room, start))
        require(busy.isdisjoint(taken), f"meeting {meeting} clashes with another")
        busy.update(taken)
        people += len(who)
    return people


def meetings_solve(instance: dict, _: list[int]) -> list[int]:
    """Choose options: each meeting once, each room and person once an hour."""
    options, rows = meeting_options(instance), {}
    for i, choice in enumerate(options):
        for key in (choice[0], *occupied(instance, choice)):
            rows.setdefault(key, np.zeros(len(options)))[i] = 1
    people = [-len(instance["meetings"][meeting][1]) for meeting, _, _ in options]
    best = integer_program(people, list(rows.values()), 0, 1)
    return [number for i in best for number in options[i]]


def cut_make(rng: random.Random, n: int) -> tuple:
    """Two hidden halves with heavy edges inside and light ones between; a path through
    all vertices, so that no cut is free."""
    half = set(rng.sample(range(n), n // 2))
    inside = lambda u, v: (u in half) == (v in half)
    p = lambda u, v: 1.0 if v == u + 1 else 0.8 if inside(u, v) else 0.4
    graph = random_graph(rng, n, p)
    for edge in graph["edges"]:
        edge.append(rng.randint(4, 9) if inside(*edge) else rng.randint(1, 5))
    edges = ", ".join(f"{u}-{v}: {weight}" for u, v, weight in graph["edges"])
    question = (
        f"A graph has the vertices 0 to {n - 1} and these edges, each with its weight: "
        f"{edges}. Choose {n // 2} of the {n} vertices, so that the edges between a "
        "chosen vertex and one that is not have the smallest possible total weight. "
        "List the chosen vertices"
    )
    return graph, sorted(half), question


def cut_value(instance: dict, answer: list[int]) -> int:
    require_subset(answer, instance["n"])
    require(len(answer) == instance["n"] // 2, f"{len(answer)} vertices are chosen")
    side = set(answer)
    return sum(w for u, v, w in instance["edges"] if (u in side) != (v in side))


def cut_solve(instance: dict, _: list[int]) -> list[int]:
    """The best of all halves."""
    n, weights = instance["n"], np.zeros((instance["n"],) * 2)
    halves = np.array(list(itertools.combinations(range(n), n // 2)))
    for u, v, weight in instance["edges"]:
        weights[u, v] = weights[v, u] = weight
    chosen = np.zeros((len(halves), n))
    np.put_along_axis(chosen, halves, 1, axis=1)
    return halves[(chosen @ weights * (1 - chosen)).sum(1).argmin()].tolist()


def cover_make(rng: random.Random, n: int, k: int) -> tuple:
    """A hidden cover: two to half of the sets share the elements out, then get more."""
    elements, parts = rng.sample(range(n), n), rng.randint(2, k // 2)
    hidden = sorted(rng.sample(range(k), parts))
    sets = [set(rng.sample(range(n), rng.randint(2, n // 3))) for _ in range(k)]
    for i, part in enumerate(hidden):
        sets[part].update(elements[i::parts])
    sets = [sorted(numbers) for numbers in sets]
    question = (
        f"Sets, each with its elements: {listed(map(spaced, sets))}. Choose as few "
        f"sets as possible, so that each of the elements 0 to {n - 1} is in a chosen "
        "set. List the numbers of the chosen sets"
    )
    return {"n": n, "sets": sets}, hidden, question


def cover_value(instance: dict, answer: list[int]) -> int:
    require_subset(answer, len(instance["sets"]))
    covered = set().union(*(instance["sets"][i] for i in answer))
    require(len(covered) == instance["n"], f"{len(covered)} elements are covered")
    return len(answer)


def cover_solve(instance: dict, _: list[int]) -> list[int]:
    rows = [
        [x in numbers for numbers in instance["sets"]] for x in range(instance["n"])
    ]
    return integer_program(np.ones(len(instance["sets"])), rows, 1, np.inf)


def subset_sum_make(rng: random.Random, n: int) -> tuple:
    """The target is the sum of a hidden half of the numbers."""
    numbers = [rng.randint(1, 50) for _ in range(n)]
    hidden = sorted(rng.sample(range(n), n // 2))
    target = sum(numbers[i] for i in hidden)
    question = (
        f"Numbers, each behind its position: {listed(numbers)}. Choose as many of them "
        f"as possible so that their sum is exactly {target}. List their positions"
    )
    return {"numbers": numbers, "target": target}, hidden, question


def subset_sum_value(instance: dict, answer: list[int]) -> int:
    require_subset(answer, len(instance["numbers"]))
    total = sum(instance["numbers"][i] for i in answer)
    require(total == instance["target"], f"the sum is {total}")
    return len(answer)


def subset_sum_solve(instance: dict, _: list[int]) -> list[int]:
    numbers, target = instance["numbers"], instance["target"]
    return integer_program(-np.ones(len(numbers)), [numbers], target, target)


def task(name: str, maximise: bool, *sizes: list) -> Task:
    """The task whose functions begin with this name."""
    parts = (globals()[f"{name}_{part}"] for part in ("make", "value", "solve"))
    return Task(maximise, sizes, *parts)


ROWS = (  # name, whether more is better, ranges at easy, medium and hard size
    ("colouring", False, [(10, 20), (3, 4)], [(25, 35), (4, 5)], [(40, 60), (5, 6)]),
    ("tsp", False, [(8, 15)], [(16, 20)], [(24, 30)]),
    ("hamiltonian", True, [(10, 15)], [(20, 25)], [(30, 40)]),
    ("knapsack", True, [(20, 40)], [(50, 70)], [(80, 100)]),
    ("clique", True, [(15, 25)], [(30, 40)], [(50, 60)]),
    ("independent", True, [(8, 15)], [(20, 30)], [(35, 45)]),
    ("meetings", True, [(3, 5), (5, 8), (2, 3)], [(6, 8), (8, 12), (3, 4)])
    + ([(9, 12), (12, 16), (4, 5)],),
    ("cut", False, [(7, 12)], [(13, 15)], [(16, 18)]),
    ("cover", False, [(10, 20), (5, 10)], [(25, 40), (12, 20)], [(50, 80), (25, 40)]),
    ("subset_sum", True, [(8, 15)], [(20, 30)], [(40, 50)]),
)
TASKS = {row[0]: task(*row) for row in ROWS}


# --------------------------- Problems, reward, data sets ------------------------------


def parse(text: str) -> list[int] | None:
    """The numbers after the last "Answer:" (or "**Answer**:"), or None if there are
    none, if one has more than four digits, or if there is anything else but commas,
    semicolons, spaces and brackets."""
    *found, rest = re.split(r"Answer\*{0,2}:", text[-LONGEST:])
    rest = rest.strip(" \t\n*`$.")
    if not found or not re.fullmatch(r"[0-9 \t\n,;()\[\]{}]+", rest):
        return None
    numbers = re.findall(r"[0-9]+", rest)
    if not numbers or max(map(len, numbers)) > 4:
        return None
    return list(map(int, numbers))


def verify(instance: dict, text: str) -> tuple[bool, int, str]:
    """Whether the text ends with a feasible solution, its value, or why it does not.
    Time is linear in LONGEST and the instance, whatever the text."""
    answer = parse(text)
    if answer is None:
        return False, 0, "no list of numbers after Answer:"
    try:
        return True, TASKS[instance["task"]].value(instance, answer), ""
    except Infeasible as e:
        return False, 0, str(e)


def meaning(instance: dict, answer: list[int]) -> object:
    """What a feasible answer stands for: equal for two ways to write one solution."""
    if instance["task"] in ("tsp", "hamiltonian"):  # any start, either direction
        return frozenset(map(frozenset, zip(answer, answer[1:] + answer[:1])))
    if instance["task"] == "colouring":  # any names of the colours
        first = list(dict.fromkeys(answer))
        return tuple(map(first.index, answer))
    if instance["task"] == "meetings":
        return frozenset(zip(*[iter(answer)] * 3))
    if instance["task"] == "cut" and 2 * len(answer) == instance["n"]:  # either half
        return frozenset(
            [*answer] if 0 in answer else {*range(instance["n"])} - {*answer}
        )
    return frozenset(answer)


def judge(problem: NamedTuple, completion: str) -> tuple[bool, float, object]:
    """Feasible or not, the quality (0 if not), and what the answer means: what dmpo.py
    evaluates by."""
    instance, reference = problem.answer["instance"], problem.answer["reference"]
    feasible, value, _ = verify(instance, completion)
    if not feasible:
        return False, 0.0, None
    less, more = value, reference
    if not TASKS[instance["task"]].maximise:
        less, more = reference, value
    quality = 1.0 if less >= more else less / more
    return True, quality, meaning(instance, parse(completion))


def reward(problem: NamedTuple, completion: str) -> float:
    """0.1 for a list of numbers after Answer:, and the quality if it is feasible."""
    return 0.1 * (parse(completion) is not None) + judge(problem, completion)[1]


reward.verify = judge


def generated(split: str, seed: int, tasks: list, sizes: list) -> Iterator[dict]:
    """Endless problems, a pure function of the arguments. The instance alone decides
    whether it is held out, so the splits share none, whatever the seeds."""
    rng = random.Random(f"{split} {seed}")
    while True:
        name, size = rng.choice(tasks), rng.choice(sizes)
        kind = TASKS[name]
        numbers = [rng.randint(*ends) for ends in kind.sizes[SIZES.index(size)]]
        instance, known, question = kind.make(rng, *numbers)
        instance = {"task": name} | instance
        held_out = random.Random(json.dumps(instance)).random() < 1 / 8
        if held_out == (split == "eval"):
            answer = kind.solve(instance, known)
            reference = kind.value(instance, answer)
            yield {
                "prompt": f"{question}. First reason step by step. Then end with "
                "Answer: and the list, as in\nAnswer: 4, 0, 17",
                "answer": {"instance": instance, "reference": reference},
                "solution": f"Answer: {', '.join(map(str, answer))}",
                "task": name,
                "size": size,
                "reference": reference,
            }


def names_in(text: str, known, what: str) -> list[str]:
    """The names in "a,b", all of them known; all that are known if there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            fail(f"{what}: there is no {name!r}, only {', '.join(known)}")
    return names or list(known)


def held_out_file(path: str) -> Path:
    """np.test.jsonl beside np.jsonl."""
    return Path(path).with_name(f"{Path(path).stem}.test{Path(path).suffix}")


def problems(split: str, seed: int) -> Iterator[dict]:
    """What a script asks of a task, as the environment variables above say."""
    if data := os.environ.get("NP_DATA"):
        path = held_out_file(data) if split == "eval" else Path(data)
        try:
            lines = path.read_text("utf-8").splitlines()
            source = [json.loads(line) for line in lines]
        except (OSError, ValueError) as e:
            fail(f"NP_DATA: cannot read {path}: {e}")
    else:
        tasks = names_in(os.environ.get("NP_TASKS", ""), TASKS, "NP_TASKS")
        sizes = os.environ.get("NP_SIZES", "easy")
        source = generated(split, seed, tasks, names_in(sizes, SIZES, "NP_SIZES"))
    if os.environ.get("NP_CHAT") == "0":
        return iter(source)
    chat = lambda item: [{"role": "user", "content": item["prompt"]}]
    return (item | {"prompt": chat(item)} for item in source)


def main() -> None:
    """Write a data set and its held-out part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="file to write, such as np.jsonl")
    parser.add_argument(
        "--n", type=int, default=1000, help="problems; a tenth more are held out"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", default="", help=f"of {','.join(TASKS)}")
    parser.add_argument("--sizes", default="easy", help=f"of {','.join(SIZES)}")
    args = parser.parse_args()
    tasks = names_in(args.tasks, TASKS, "--tasks")
    sizes = names_in(args.sizes, SIZES, "--sizes")
    if args.n < 1:
        fail("--n has to be at least 1")
    if not Path(args.out).name:
        fail("--out has to name a file, such as np.jsonl")
    files = {"train": Path(args.out), "eval": held_out_file(args.out)}
    for path in files.values():
        if path.exists() or not path.parent.is_dir():
            fail(f"{path} exists, or its folder does not: choose another --out")
    texts = {}
    for split in files:
        n = args.n if split == "train" else math.ceil(args.n / 10)
        source = itertools.islice(generated(split, args.seed, tasks, sizes), n)
        texts[split] = "".join(f"{json.dumps(problem)}\n" for problem in source)
    for split, path in files.items():  # both or, if it was stopped before, none
        try:
            path.write_text(texts[split], "utf-8")
        except OSError as e:
            fail(f"cannot write {path}: {e}")
        print(f"{path}: {texts[split].count(chr(10))} problems")


if __name__ == "__main__":
    main()
