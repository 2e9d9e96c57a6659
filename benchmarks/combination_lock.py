"""The control of PrefixRL's claim: no shared parameters, no back-generalisation.

    python benchmarks/combination_lock.py [--out FOLDER]

A lock has 10 wheels. Each shows one of 4 signs and opens at one of 4 letters; which
letter belongs to which sign is the same for all wheels. Reward 1 if all wheels are
right, else 0. The policy starts with a probability of 0.6 for the right letter. It is
trained by REINFORCE with the group's mean, as algos/prefixrl.py does, on prefixed
problems only: the first wheels are set already, how many is drawn from a band.

    tabular   a logit for each (wheel, sign, letter): nothing is shared
    shared    a logit for each (sign, letter): one skill for all wheels

Measured, in exact numbers (no sampling): the chance to open the lock without a prefix,
and the chance to get those first wheels right that stand in every prefix of the band.
The latter cannot move for the tabular policy: no gradient ever reaches these wheels.
Writes combination_lock.json, to benchmarks/results unless --out says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

WHEELS, SIGNS, LETTERS = 10, 4, 4
BANDS = (0.10, 0.40), (0.40, 0.80), (0.80, 0.95)
LOCKS, GROUP, UPDATES, RATE = 32, 8, 300, 2.0  # a batch: LOCKS groups of GROUP
RESULTS = Path(__file__).parent / "results"


def start(kind: str, p: float = 0.6) -> np.ndarray:
    """Logits (wheels or 1, signs, letters); letter i is right for sign i, chance p."""
    logits = np.zeros((WHEELS if kind == "tabular" else 1, SIGNS, LETTERS))
    logits[:, range(SIGNS), range(SIGNS)] = np.log(p * (LETTERS - 1) / (1 - p))
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    x = np.exp(logits - logits.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def chances(logits: np.ndarray) -> np.ndarray:
    """Chance (wheels,) to get each wheel right, over signs equally frequent."""
    right = softmax(logits)[:, range(SIGNS), range(SIGNS)].mean(-1)
    return np.broadcast_to(right, WHEELS)


def gradient(logits: np.ndarray, low: float, high: float, rng) -> np.ndarray:
    """Of the mean over a batch of A log pi(letters behind the prefix), A = r - mean."""
    wheels, shape = np.arange(WHEELS), (LOCKS, GROUP, WHEELS)
    signs = np.broadcast_to(rng.integers(SIGNS, size=(LOCKS, 1, WHEELS)), shape)
    most = min(round(high * WHEELS), WHEELS - 1)  # one wheel is left to be set
    first = rng.integers(round(low * WHEELS), most + 1, LOCKS)
    free = np.broadcast_to(wheels >= first[:, None, None], shape)
    table = np.broadcast_to(wheels if len(logits) > 1 else 0 * wheels, shape)
    pi = softmax(logits)[table, signs]  # (locks, group, wheels, letters)
    points = rng.random((*shape, 1))
    letters = (pi.cumsum(-1) < points).sum(-1).clip(max=LETTERS - 1)
    reward = ((letters == signs) | ~free).all(-1).astype(float)
    A = (reward - reward.mean(-1, keepdims=True))[..., None, None]
    scores = A * (np.eye(LETTERS)[letters] - pi) * free[..., None]
    total = np.zeros_like(logits)
    np.add.at(total, (table, signs), scores)
    return total / (LOCKS * GROUP)


def train(kind: str, band: tuple[float, float], seed: int) -> list[dict]:
    """Every 20th update: `plain`, the chance to open the lock, and `before`, that to
    get the wheels right that every prefix of the band holds."""
    rng, logits, lines = np.random.default_rng(seed), start(kind), []
    for update in range(UPDATES + 1):
        if update % 20 == 0:
            right = chances(logits)
            before = right[: round(band[0] * WHEELS)].prod()
            line = {"update": update, "plain": right.prod(), "before": before}
            lines.append({name: float(x) for name, x in line.items()})
        logits = logits + RATE * gradient(logits, *band, rng)
    return lines


def main(seeds: int = 10) -> None:
    """All bands, both policies, in a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    out = parser.parse_args().out
    begun, runs = time.perf_counter(), []
    for band in BANDS:
        for kind in ("tabular", "shared"):
            for seed in range(seeds):
                run = {"policy": kind, "band": band, "seed": seed}
                runs.append(run | {"lines": train(kind, band, seed)})
    about = {"hardware": f"{os.cpu_count()} CPU cores, no GPU"}
    about |= {"numpy": np.__version__, "wheels": WHEELS, "updates": UPDATES}
    about |= {"rate": RATE, "seconds": time.perf_counter() - begun, "runs": runs}
    out.mkdir(parents=True, exist_ok=True)
    (out / "combination_lock.json").write_text(json.dumps(about) + "\n")
    print(f"{about['seconds']:.0f} s, {out}/combination_lock.json")


if __name__ == "__main__":
    main()
