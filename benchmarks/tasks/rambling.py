"""Choose two signs, then write as many dots as you like: does an objective ramble?

    python algos/grpo.py --task benchmarks/tasks/rambling.py --max-new-tokens 40

A problem is "15 1 3=19:": which signs before the second and third number lead to the
target? The answer "15+1=16+3=19!" shows the sum, then "!" if that is the target and "?"
if it is not. Dots may follow, as in "15+1=16-3=13?....": they count for nothing, and
neither does the mark. The worked answers choose their signs at random, add and mark
rightly, and end with 0 to 12 dots, whatever the mark. A model that starts from them is
right in a quarter of its answers, and knows if it is before it decides how long its
answer becomes: what an objective does to the length of wrong answers (Dr. GRPO, arXiv
2503.20783, section 3.1) is seen by itself.
"""

import random
import re

SIGNS = {"+": 1, "-": -1}


def problems(split, seed):
    """Endless problems; numbers and target decide to which split one belongs."""
    rng = random.Random(f"{split} {seed}")
    while True:
        a, b, c = rng.randint(10, 19), rng.randint(1, 5), rng.randint(1, 5)
        target = a + rng.choice([-b, b]) + rng.choice([-c, c])
        x, y = rng.choices("+-", k=2)
        first = a + SIGNS[x] * b
        total = first + SIGNS[y] * c
        end = ("!" if total == target else "?") + "." * rng.randint(0, 12)
        held_out = random.Random(f"{a} {b} {c} {target}").random() < 1 / 8
        if held_out == (split == "eval"):
            yield {
                "prompt": f"{a} {b} {c}={target}:",
                "answer": [a, b, c, target],
                "solution": f"{a}{x}{b}={first}{y}{c}={total}{end}",
            }


def reward(problem, completion):
    """1.0 for two signs and the right totals, the last of them the target; else 0.0."""
    a, b, c, target = problem.answer
    steps = rf"{a}([+-]){b}=([0-9]{{1,4}})([+-]){c}=([0-9]{{1,4}})"
    found = re.fullmatch(rf"{steps}[!?]\.*", completion)
    if not found:
        return 0.0
    first = a + SIGNS[found[1]] * b
    total = first + SIGNS[found[3]] * c
    return float([first, total, target] == [int(found[2]), int(found[4]), total])
