"""Claims of four scripts in the published sets of runs of the same seeds.

    python benchmarks/earlier_sets.py

Rounding alone makes other base models, so a set that was run again with newer code is
another sample. Prints each claim that all sets have runs for: its difference with its
95 % interval and verdict in each set, oldest first, over their means, seed by seed, and
over the seeds that only the last set has (new). Earlier sets are read from this
repository's history; README.md beside it quotes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import claims
import numpy as np
import report

SETS = {  # commits, oldest first; "": what is published
    "grpo": ("86d3edd", ""),
    "vopd": ("1361d59", "f228bc0", ""),
    "prefixrl": ("55d5bfd", "dbbd8a5", ""),
    "dmpo": ("2c735fe", "4a7b769", ""),
}


def runs_at(script: str, commit: str) -> list[dict]:
    """The records of a script as they were committed there."""
    path = claims.RESULTS / f"{script}.json"
    if not commit:
        return json.loads(path.read_text())
    name = f"{commit}:{path.relative_to(claims.ROOT).as_posix()}"
    show = ["git", "-C", str(claims.ROOT), "show", name]
    done = subprocess.run(show, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: git show {name} failed (a whole clone is needed)")
    return json.loads(done.stdout)


def differences(runs: list[dict], claim: claims.Claim) -> dict[int, float]:
    """A - B at the end, by seed."""
    of = {(run["arm"], run["seed"]): run for run in runs}
    other = claim.a if claim.b == "base" else claim.b
    seeds = {s for arm, s in of if arm == claim.a and (other, s) in of}
    pairs = {s: report.pair(of[claim.a, s], of[other, s], claim) for s in seeds}
    return {s: float(np.ravel(a)[-1] - np.ravel(b)[-1]) for s, (a, b) in pairs.items()}


def said(values: list[float], claim: claims.Claim) -> str:
    """The IQM, its interval and the verdict."""
    middle, low, high = report.interval(values)
    word = report.verdict(low, high, claim.kind, claim.margin, len(values))
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}] of {len(values)} seeds, {word}"


def main() -> None:
    """Each claim in each set; the command line has no flags but --help."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for script, commits in SETS.items():
        sets = [runs_at(script, commit) for commit in commits]
        for claim in claims.CLAIMS[script]:
            found = [differences(runs, claim) for runs in sets]
            if not all(found):
                continue
            print(f"{claim.text} ({claim.metric}: {claim.a} - {claim.b})")
            for commit, values in zip(commits, found):
                rows = [values[seed] for seed in sorted(values)]
                print(f"  {commit or 'today':8} {said(rows, claim)}")
            common = sorted(set.intersection(*map(set, found)))
            means = [float(np.mean([x[seed] for x in found])) for seed in common]
            print(f"  {'means':8} {said(means, claim)}")
            if rest := [found[-1][x] for x in sorted(found[-1].keys() - common)]:
                print(f"  {'new':8} {said(rest, claim)}")


if __name__ == "__main__":
    main()
