"""From the runs of claims.py to what they say: statistics, verdicts, tables, pictures.

Everything here is a function of the records in benchmarks/results/<script>.json.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

MIN_SEEDS = 5  # of a verdict
PICTURES = {  # suffix: (x, arms, metrics); x = k draws metric@k of the last evaluation
    "grpo": {
        "": ("step", "default", "eval/pass@1 eval/pass@8"),
        "-updates": ("step", "default updates-2 updates-4", "eval/pass@1"),
        "-normalization": ("step", "default sequence constant no-std", "eval/pass@1"),
        "-length": ("step", "default sequence constant", "samples/wrong_length"),
        "-rambling": (
            "step",
            "rambling-sequence rambling-default rambling-constant",
            "samples/wrong_length",
        ),
        "-trl": ("step", "default trl", "eval/pass@1"),
    },
    "vopd": {
        "": ("step", "default sampled full", "eval/reverse_kl"),
        "-pass": ("step", "default sampled full", "eval/pass@1"),
        "-biased": ("step", "default vopd-topk topk clip full", "eval/reverse_kl"),
    },
    "dmpo": {
        "": ("k", "default grpo strong dm-only forward-kl", "eval/qr"),
        "-distinct": (
            "step",
            "default grpo strong dm-only forward-kl",
            "eval/distinct_feasible",
        ),
        "-entropy": ("step", "default grpo strong dm-only forward-kl", "eval/entropy"),
    },
    "prefixrl": {
        "": ("flops", "default rl rl-64 sft-rl off-policy", "eval/hard_pass@1"),
        "-back": ("flops", "prefixed-only only-10-40 only-80-95", "eval/hard_pass@1"),
        "-mix": (
            "flops",
            "default half-plain prefixed-only unmasked",
            "eval/hard_pass@1",
        ),
        "-few": ("flops", "few sft-rl-few", "eval/pass@1"),
    },
    "ppo_envs": {
        "": ("num_envs", "recipe size sqrt", "eval/episode_return"),
        "-ddr": ("ddr", "recipe size sqrt", "eval/episode_return"),
        "-recipe": (
            "transitions",
            "recipe-16 recipe-64 recipe-256 recipe-1024 recipe-4096 recipe-16384",
            "eval/episode_return",
        ),
        "-long": (
            "transitions",
            "long-64 long-1024 long-4096 long-16384",
            "eval/episode_return",
        ),
        "-wrong": (
            "transitions",
            "long-64 long-1024 long-size-1024 long-sqrt-1024",
            "eval/episode_return",
        ),
        "-ewma": (
            "transitions",
            "recipe-64 ewma-16 ewma-64 ewma-256",
            "eval/episode_return",
        ),
        "-cut": (
            "transitions",
            "recipe-64 cut recipe-16 cut-16",
            "eval/episode_return",
        ),
    },
}
AXES = {  # what an axis shows, with its unit
    "step": "training step (batches)",
    "k": "completions of a problem, k",
    "flops": "total FLOPs, sampling of traces included",
    "eval/pass@1": "held-out problems solved (share)",
    "eval/pass@8": "solved in 8 tries",
    "eval/hard_pass@1": "hard problems solved without a prefix (share)",
    "eval/reverse_kl": "reverse KL to the teacher (nats per token)",
    "eval/qr": "best quality ratio among k completions",
    "eval/distinct_feasible": "distinct feasible answers among 16",
    "eval/entropy": "entropy of a token (nats)",
    "eval/episode_return": "mean return of the evaluation episodes",
    "num_envs": "environments (N)",
    "ddr": "transitions per nat of KL(behaviour || updated)",
    "transitions": "transitions",
    "samples/wrong_length": "length of wrong answers (characters)",
}
MEANING = {  # of the metrics in the tables; eval/: of held-out problems
    "pass@1": "share of the problems that one try solves",
    "pass@8": "share of the problems that at least one of 8 tries solves",
    "samples/wrong_length": "mean length of the logged wrong answers, in characters",
    "reverse_kl": "nats per token, from the student to the teacher",
    "sr": "share of the answers that are feasible",
    "qr": "mean quality of an answer relative to the optimum, 0 if infeasible",
    "qr@k": "the same of the best of k answers",
    "entropy": "nats per token",
    "distinct_feasible": "different feasible answers among 16 to a problem",
    "distinct_optimal": "different optimal answers among 16 to a problem",
    "grpo_coefficient": "mean |d loss / d log-prob of a completion| of GRPO's term",
    "dm_coefficient": "the same of lambda times the distribution matching term",
    "flops": "of the whole run, the sampling of traces included",
    "hard_pass@k": "pass@k of the hard problems trained on, without a prefix",
    "episode_return": "mean over the evaluation episodes (most likely actions)",
    "ddr": "transitions of a batch per nat of KL(behaviour || updated)",
    "kl": "that KL in nats, of the last batch",
    "proximal_age": "mean age of the proximal policy in gradient steps",
}
NOTE = """Interval: 95 % percentile bootstrap of the interquartile mean (IQM) over
seeds: all resamples with up to 5 seeds, 10,000 random ones with more. The strata of a
stratified bootstrap are tasks: with one task there is one stratum, and it is the plain
bootstrap. On normal data it covers the true
value in 91 % of cases with 5 seeds and in 93 % with 10 (4,000 simulated samples).
Nothing corrects for the number of claims. A - B: IQM of the differences seed by seed;
at every evaluation: the largest of them, and an interval that spans all of theirs.
P: the probability that a run of A is on the claimed side of a run of B (for "equal":
above it; Mann-Whitney U / n^2). For a rank correlation A - B is the IQM of Spearman's
rho over seeds, P the share of seeds where it is above 0. The verdicts are computed by
the rules at the top of benchmarks/claims.py; "not measured": no seed has run both
arms."""

# ------------------------------------ Statistics --------------------------------------


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: a quarter of the values is left out at each end."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values) -> tuple[float, float, float]:
    """IQM of one value per seed, and its 95 % percentile bootstrap interval."""
    return bootstrap(tuple(map(float, values)))


@functools.cache  # a page and two READMEs ask for the same ones
def bootstrap(values: tuple[float, ...]) -> tuple[float, float, float]:
    """What interval() gives."""
    if len(values) < 2 or np.ptp(values) == 0:
        return (float(iqm(values)),) * 3
    if len(values) <= MIN_SEEDS:  # so few that no verdict need be left to chance
        every = iqm(np.array([*itertools.product(values, repeat=len(values))]))
        low, high = np.quantile(every, [0.025, 0.975])
        return float(iqm(values)), float(low), float(high)
    draws = dict(n_resamples=10_000, method="percentile", rng=0)
    low, high = stats.bootstrap((values,), iqm, **draws).confidence_interval
    return float(iqm(values)), float(low), float(high)


def improvement(a, b) -> float:
    """Probability that a value of a is above one of b: Mann-Whitney U / (n m)."""
    return float(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))


def verdict(low: float, high: float, kind: str, margin: float, seeds: int) -> str:
    """The rule in the docstring of claims.py, over the interval of A - B."""
    if seeds < MIN_SEEDS:
        return "inconclusive" if seeds else "not measured"
    if kind in ("lower", "not-higher"):
        low, high = -high, -low
    inside = -margin < low and high < margin
    if kind in ("higher", "lower"):
        yes, no = low > 0, high < 0 or inside
    elif kind in ("not-lower", "not-higher"):
        yes, no = low > -margin, high < -margin
    elif kind == "equal":
        yes, no = inside, low > margin or high < -margin
    else:
        raise ValueError(f"there is no kind {kind!r}")
    return "replicated" if yes else "not replicated" if no else "inconclusive"


def curve(run: dict, metric: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """x and the metric at the evaluations that have both. The FLOPs of prefixrl.py's
    step 0 include imitation, if there was any: so does the metric beside them."""
    first, *less = metric.split("-")
    lines = [line for line in run["evals"] if {first, *less, x} <= line.keys()]
    paid = first.replace("eval/", "sft/") if x == "flops" else first
    values = [x.get(paid, x[first]) - sum(x[name] for name in less) for x in lines]
    return np.array([line[x] for line in lines]), np.array(values)


def pair(a: dict, b: dict, claim) -> tuple[np.ndarray, np.ndarray] | None:
    """The two values (or as many as evaluations) that the claim compares in two runs of
    one seed; None if these runs do not have them."""
    x, _, part = claim.at.partition("/")
    x, share = (x, 1 / float(part or 1)) if x not in ("end", "every") else ("step", 1)
    (xa, a), (xb, b) = curve(a, claim.metric, x), curve(b, claim.metric, x)
    if not len(a) or not len(b):
        return None
    if claim.b == "base":
        return a[-1:], a[:1]
    if claim.at == "every":
        return (a, b) if xa.tolist() == xb.tolist() else None
    if claim.at != "end":
        end = xb[-1] if part else min(xa[-1], xb[-1])
        return np.interp([share * end], xa, a), np.interp([end], xb, b)
    return a[-1:], b[-1:]


def family(runs: list[dict], names: str) -> list[dict]:
    """The runs of the arms <name>-<number of environments>, of each name in "a+b", and
    of the arm that the families share."""
    arms = {run["arm"] for run in runs}
    own = {x for x in arms if re.fullmatch(rf"({names.replace('+', '|')})-\d+", x)}
    return [run for run in runs if run["arm"] in own | {"recipe-64"}]


def end(run: dict, name: str) -> float:
    """A metric at the last evaluation; of ddr, one batch's, the median over them; or
    a flag."""
    if name in run["args"]:
        return run["args"][name]
    values = curve(run, name)[1]
    return float(np.median(values) if name == "ddr" else values[-1])


def ranks(runs: list[dict], claim) -> list[float]:
    """Spearman's rank correlation over the arms of a family, one for each seed that has
    run all of them."""
    most = float(claim.at.partition("/")[2] or "inf")
    runs = [x for x in family(runs, claim.a) if x["args"]["num_envs"] <= most]
    arms, found = {run["arm"] for run in runs}, []
    for seed in sorted({run["seed"] for run in runs}):
        own = [run for run in runs if run["seed"] == seed]
        if len(own) == len(arms) > 2:
            sides = [[end(run, x) for run in own] for x in (claim.b, claim.metric)]
            found.append(float(stats.spearmanr(*sides).statistic))
    return found


def judge(runs: list[dict], claim) -> dict:
    """What the runs say of a claim."""
    if claim.at.startswith("ranks"):
        values = ranks(runs, claim)
        middle, low, high = interval(values) if values else (0.0, 0.0, 0.0)
        said = verdict(low, high, claim.kind, claim.margin, len(values))
        found = {"seeds": len(values), "difference": middle, "low": low, "high": high}
        better = np.mean(np.array(values) > 0) if values else 0.0
        return found | {"better": float(better), "verdict": said}
    by = {(run["arm"], run["seed"]): run for run in runs}
    other = claim.a if claim.b == "base" else claim.b
    shared = sorted(s for arm, s in by if arm == claim.a and (other, s) in by)
    pairs = [pair(by[claim.a, s], by[other, s], claim) for s in shared]
    pairs = [values for values in pairs if values is not None]
    if not pairs:
        return {"seeds": 0, "verdict": verdict(0, 0, claim.kind, claim.margin, 0)}
    a, b = (np.array(side).T for side in zip(*pairs))  # (evaluations, seeds)
    middles, lows, highs = zip(*map(interval, a - b))
    low, high, n = min(lows), max(highs), len(pairs)
    better = improvement(a[-1], b[-1])
    found = {"seeds": n, "difference": max(middles, key=abs), "low": low, "high": high}
    found["better"] = 1 - better if claim.kind in ("lower", "not-higher") else better
    return found | {"verdict": verdict(low, high, claim.kind, claim.margin, n)}


def over_seeds(found: dict, policy: str, kind: str, name: str) -> list[float]:
    """A measure of a result of gradients.py, one value a seed (those that have it)."""
    values = [rows[policy][kind][name] for rows in found["seeds"].values()]
    return [value for value in values if value is not None]


def judge_gradients(found: dict, policy: str, claim) -> dict:
    """What a result of gradients.py says of a claim about its kinds of gradients: their
    difference at a policy, seed by seed."""
    rows = [rows[policy] for rows in found["seeds"].values()]
    pairs = [[row[x][claim.metric] for x in (claim.a, claim.b)] for row in rows]
    gaps = [a - b for a, b in pairs if None not in (a, b)]
    if not gaps:
        return {"seeds": 0, "verdict": verdict(0, 0, claim.kind, claim.margin, 0)}
    middle, low, high = interval(gaps)
    said = {"seeds": len(gaps), "difference": middle, "low": low, "high": high}
    word = verdict(low, high, claim.kind, claim.margin, len(gaps))
    return said | {"verdict": word}


# -------------------------------------- Tables ----------------------------------------


def logged_seconds(run: dict) -> float | None:
    """Time that a run without a measured one took by the speed it logged at its
    evaluations, these apart; None if it logged none."""
    speeds = [x["steps_per_second"] for x in run["evals"] if "steps_per_second" in x]
    if not speeds:
        return None
    return run["evals"][-1]["transitions"] * np.mean(1 / np.array(speeds))


def made_of(runs: list[dict]) -> str:
    """Hardware, versions and wall time of the runs, in a line."""
    runs = [run for run in runs if "first_quarter_of" not in run]
    unique = lambda name: ", ".join(dict.fromkeys(x[name] for x in runs if name in x))
    versions = [f"{x} {unique(x)}" for x in ("torch", "transformers", "trl")]
    parts = [unique("hardware"), *(x for x in versions if not x.endswith(" "))]
    walls = [run["wall_seconds"] for run in runs if run["wall_seconds"]]
    if walls:
        span = f"{min(walls):.0f} to {max(walls):.0f} s"
        parts.append(f"wall time of a run {span}, {sum(walls) / 3600:.1f} h summed")
        threads = sorted({run["threads"] for run in runs if run.get("threads")})
        if threads:
            parts[-1] += f" (OMP_NUM_THREADS: {', '.join(map(str, threads))})"
        made, again = (
            [run["cache_warm"] for run in runs].count(x) for x in (False, None)
        )
        parts[-1] += f", {made} of {len(runs)} made a base model first" * bool(made)
        parts[-1] += f", {again} resumed, not timed" * bool(again)
        resumed = [run for run in runs if run["cache_warm"] is None]
        if logged := [x for x in map(logged_seconds, resumed) if x]:
            parts[-1] += f" (by the speed they logged {min(logged):.0f} to "
            parts[-1] += f"{max(logged):.0f} s, {sum(logged) / 3600:.1f} h summed)"
    return "; ".join(parts)


def number(value: float, sign: str = "") -> str:
    """Three decimals, or two digits of what is too small or too large for them."""
    normal = value == 0 or 0.01 <= abs(value) < 10_000
    return format(value, f"{sign}.3f" if normal else f"{sign}.1e")


def spread(values, sign: str = "") -> str:
    """IQM [interval] of one value per seed, as text."""
    return "{} [{}, {}]".format(*(number(x, sign) for x in interval(values)))


def table(names: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def arm_table(runs: list[dict], metrics: list[str]) -> str:
    """Each metric of each arm: at the first and the last evaluation, and the gain."""
    names = ["arm", "metric", "seeds", "base", "trained [95 %]", "seeds' range"]
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        for metric in metrics:
            own = [curve(run, metric)[1] for run in runs if run["arm"] == arm]
            if all(map(len, own)):
                base, end = (np.array([values[i] for values in own]) for i in (0, -1))
                row = [arm, metric.removeprefix("eval/"), str(len(own))]
                at_0 = metric.startswith("eval/")  # the others begin with training
                row += [number(iqm(base)) if at_0 else "", spread(end)]
                row.append(f"{number(min(end))} to {number(max(end))}")
                rows.append([*row, spread(end - base, "+") if at_0 else ""])
    return table([*names, "gain [95 %]"], rows)


def meanings(metrics: list[str]) -> str:
    """What the metrics are, each once; k in name@k stands for a number."""
    names = [name.removeprefix("eval/") for name in metrics]
    names = [x if x in MEANING else re.sub(r"@\d+", "@k", x) for x in names]
    known = [name for name in dict.fromkeys(names) if name in MEANING]
    return "; ".join(f"{name}: {MEANING[name]}" for name in known)


def compared_arms(claim) -> str:
    """The two arms, or what is correlated."""
    if claim.at.startswith("ranks"):
        return f"rank correlation with {claim.b} over {claim.a}-*"
    return f"{claim.a} - {claim.b}"


def claim_table(runs: list[dict], claims: list, papers: dict) -> str:
    """Each claim with the data it is judged by and its verdict."""
    rows = []
    for claim in claims:
        found, data = judge(runs, claim), ["0", "", ""]
        if found["seeds"]:
            gap = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)
            data = [str(found["seeds"]), gap, f"{found['better']:.2f}"]
        source, _, text = claim.text.partition(": ")
        compared = f"{claim.metric}: {compared_arms(claim)}, {claim.kind}"
        compared += f", margin {claim.margin:g}, at {claim.at}"
        row = [f"{source} ({papers[source]})", text, compared]
        rows.append([*row, *data, f"**{found['verdict']}**"])
    names = ["paper", "claim", "compared", "seeds", "A - B [95 %]", "P"]
    return table([*names, "verdict"], rows)


def page(script: str, runs: list[dict], metrics, claims, papers, explanations) -> str:
    """<script>.md: what ran on what, the arms, the claims, the definitions."""
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        walls = [run["wall_seconds"] for run in own if run["wall_seconds"]]
        logged = [x for x in map(logged_seconds, own) if x]
        wall = f"by the logged speed {np.median(logged):.0f}" if logged else "resumed"
        wall = f"{np.median(walls):.0f}" if walls else wall
        if whole := own[0].get("first_quarter_of"):
            wall = f"first quarters of {whole}"
        made = [run["cache_warm"] for run in own].count(False)
        codes = ", ".join(dict.fromkeys(run["code"] for run in own))
        flags = f"`{' '.join(own[0]['flags'])}`" if own[0]["flags"] else "none"
        rows.append([arm, flags, str(len(own)), wall, str(made), codes])
    names = ["arm", "flags", "seeds", "median wall time, s", "runs that filled a cache"]
    parts = [f"# {script}", made_of(runs), table([*names, "code"], rows)]
    parts += [arm_table(runs, metrics), meanings(metrics)]
    parts.append(claim_table(runs, claims, papers))
    explained = {}  # text: the claims that it is about
    for claim in claims:
        word, text = judge(runs, claim)["verdict"], explanations.get(claim.text)
        if text and word in ("not replicated", "inconclusive"):
            explained.setdefault(text, []).append(f"{claim.text}: **{word}**.")
    parts += ["\n".join([*about, text]) for text, about in explained.items()]
    parts += [f"![{script}{x}]({script}{x}.png)" for x in drawn(script, runs)]
    return "\n\n".join([*parts, NOTE]) + "\n"


# ------------------------------------- Pictures ---------------------------------------


def curves_of(runs: list[dict], metric: str, x: str) -> list[tuple]:
    """(x, y) of each run; for x = k the metric@k of its last evaluation."""
    if x in ("num_envs", "ddr"):  # along the arms of a family
        order = sorted(runs, key=lambda run: run["args"]["num_envs"])
        seeds = {
            seed: [r for r in order if r["seed"] == seed]
            for seed in {r["seed"] for r in order}
        }
        pairs = [[(end(r, x), end(r, metric)) for r in own] for own in seeds.values()]
        return [tuple(np.array(p).T) for p in pairs if len(p) == max(map(len, pairs))]
    if x != "k":
        return [curve(run, metric, x) for run in runs]
    pairs = []
    for run in runs:
        last, names = run["evals"][-1], [n for n in run["evals"][-1] if "@" in n]
        ks = sorted(int(n.split("@")[1]) for n in names if n.startswith(f"{metric}@"))
        pairs.append((np.array(ks), np.array([last[f"{metric}@{k}"] for k in ks])))
    return pairs


def on_one_grid(pairs: list[tuple]) -> tuple:
    """x (n,) and the y of curves (n, curves): at the means of their x, or, if they have
    different numbers of points, interpolated at 12 places that all of them span."""
    xs, ys = zip(*pairs)
    if len({len(x) for x in xs}) == 1:
        return np.mean(xs, 0), np.stack(ys, 1)
    at = np.linspace(max(x[0] for x in xs), min(x[-1] for x in xs), 12)
    return at, np.stack([np.interp(at, x, y) for x, y in pairs], 1)


def drawn(script: str, runs: list[dict]) -> dict[str, list[tuple]]:
    """The lines (label, curves of the runs) of each picture there is something for."""
    pictures = {}
    for suffix, (x, arms, metrics) in PICTURES.get(script, {}).items():
        lines, metrics = [], metrics.split()
        for arm in arms.split():
            own = [run for run in runs if run["arm"] == arm]
            own = family(runs, arm) if x in ("num_envs", "ddr") else own
            for metric in metrics:
                pairs = [c for c in curves_of(own, metric, x) if len(c[0])]
                label = metric[5:] if len(metrics) > 1 else arm
                lines += [(label, pairs)] if pairs else []
        if lines and (suffix == "" or len(lines) > 1):
            pictures[suffix] = lines
    return pictures


def draw(script: str, runs: list[dict], path: Path) -> None:
    """The pictures of PICTURES beside `path`: IQM and interval over seeds."""
    pictures = drawn(script, runs)
    for suffix, (x, _, metrics) in PICTURES.get(script, {}).items():
        file = path.with_name(f"{script}{suffix}.png")
        file.unlink(missing_ok=True)
        if suffix in pictures:
            lines, seeds = [], {len(pairs) for _, pairs in pictures[suffix]}
            for label, pairs in pictures[suffix]:
                at, points = on_one_grid(pairs)
                lines.append((label, at, *zip(*map(interval, points))))
            count = " or ".join(map(str, sorted(seeds)))
            title = f"{count} seed{'s' * (count != '1')}: IQM, 95 % interval"
            scale = "log" if x in ("num_envs", "ddr") else "linear"
            sizes = family(runs, lines[0][0]) if x == "ddr" else []
            sizes = sorted({run["args"]["num_envs"] for run in sizes})
            names = AXES[x], AXES[metrics.split()[0]], title
            picture(lines, *names, file, scale, [f"N = {n:,}" for n in sizes])


def picture(
    lines: list,
    xlabel: str,
    ylabel: str,
    title: str,
    path: Path,
    scale: str = "linear",
    points: list[str] | tuple = (),
) -> None:
    """Lines (name, x, middle, low, high), each named at its end; the names are moved
    apart where they would meet. The points of the first line may have names, too."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = ["o-", "s--", "^:", "D-.", "v-", "x--"]
    for i, (_, x, middle, low, high) in enumerate(lines):
        grey = str(0.6 * i / max(1, len(lines) - 1))
        axes.plot(x, middle, styles[i % 6], color=grey, markersize=4)
        axes.fill_between(x, low, high, color=grey, alpha=0.2, linewidth=0)
    for name, *place in zip(points, *lines[0][1:3]):
        look = dict(textcoords="offset points", fontsize=8, ha="center")
        axes.annotate(name, place, (0, 7), **look)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=scale)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.02)
    top, lowest = axes.get_ylim()[1], -1.0
    for name, x, middle, *_ in sorted(lines, key=lambda line: line[2][-1]):
        lowest = max(middle[-1] / top, lowest + 0.05)  # a line of text is 5 % high
        look = dict(textcoords="axes fraction", va="center")
        look["arrowprops"] = dict(arrowstyle="-", color="0.6", linewidth=0.6)
        look["arrowprops"] |= dict(relpos=(0, 0.5), shrinkA=0, shrinkB=3)
        axes.annotate(name, (x[-1], middle[-1]), (1.03, lowest), **look)
    figure.savefig(path, dpi=120)
