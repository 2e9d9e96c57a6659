"""Write what the READMEs say of results, and the result pages, from the JSON files.

    python benchmarks/readme.py           (rewrite)
    python benchmarks/readme.py --check   (exit code 1 if a rewrite would change a text)

Rewritten is what stands in README.md and benchmarks/README.md between
<!-- KIND:SCRIPT --> and <!-- end -->:

    cell      what the default arm reached, for the table of algorithms
    findings  what the claims say, for that table
    results   the default arm's metrics and the verdicts of the claims
    picture   benchmarks/results/<script>.png
    numbers   the table of another benchmark, from its JSON file: vs_trl,
              estimator_cost, gradient_variance, prefix_gradients, combination_lock,
              env_speed; memory, memory_4096: of memory-cpu.json, memory-cpu-4096.json;
              gpu: of the first gpu-<name>.json; again: of the folder again/;
              hours: what all runs took; verdicts: how many claims got which;
              speed: the ratios of vs_trl and env_speed
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter

import claims
import env_speed as speed
import gradients
import memory as peaks
import report
from gpu_presets import PRESETS

CELLS = {  # of the metric: its gain or its end; seeds, worst seed, wall time
    "grpo": ("eval/pass@1", "Countdown, held-out pass@1 {gain}, {seeds} seeds"),
    "vopd": (
        "eval/pass@1",
        "Countdown, the student's held-out pass@1 {gain}: {gap:.0%} of its distance to "
        "the teacher (mean of {seeds} seeds), and {kl:.0%} of the reverse KL gone",
    ),
    "dmpo": ("eval/qr", "independent sets, quality ratio {gain}, {seeds} seeds"),
    "prefixrl": (
        "eval/hard_pass@1",
        "chains never solved before, pass@1 {gain} on those trained on, {other} on "
        "those held out, {seeds} seeds",
    ),
    "ppo_envs": (
        "eval/episode_return",
        "CartPole-v1, the worst of {seeds} seeds ends at a mean return of {low:.0f} of "
        "500 over 100 episodes",
    ),
}
FINDINGS = {  # (claim, the verdict that makes it true, sentence)
    "grpo": [
        ("TRL: its trainer has the same learning curve", "replicated",
         "Its mean pass@1 stays within 0.05 of that of TRL's trainer."),
        ("Ours: two updates on a batch end higher than one", "replicated",
         "Two updates on a batch end above one in pass@1 (but below it in pass@8, over "
         "two sets of runs);"),
        ("Ours: four updates cost less than 0.02 of pass@8", "not replicated",
         "four end below one in pass@8."),
    ],
    "vopd": [
        ("vOPD: the baseline ends at a lower reverse KL than no baseline", "replicated",
         "The baseline ends closer to the teacher than no baseline,"),
        ("vOPD: a top-k baseline costs less than 0.02 of reverse KL", "replicated",
         "and a top-k one as close;"),
        ("vOPD: its reverse KL is less than 0.02 above the full estimator's",
         "not replicated", "the full-vocabulary KL stays ahead of it."),
    ],
    "prefixrl": [
        ("PrefixRL: solves more hard problems than RL at equal FLOPs", "replicated",
         "Ahead of plain RL and"),
        ("PrefixRL: solves more than off-policy RL at equal FLOPs", "replicated",
         "off-policy RL,"),
        ("PrefixRL: solves more than SFT, then RL, at equal FLOPs", "inconclusive",
         "but not of imitation of the same traces followed by RL (over three sets of "
         "runs, behind it)."),
    ],
    "dmpo": [
        ("DMPO: the quality ratio is above GRPO's", "inconclusive",
         "At the paper's lambda it is nearly GRPO: no clearly better answers,"),
        ("DMPO: more distinct feasible answers among 16 than with GRPO",
         "inconclusive", "and more distinct ones only over three sets of runs (by 0.1 "
         "of 2.0)."),
    ],
    "ppo_envs": [
        ("Ours: up to 1,024 environments, more end higher with the recipe",
         "replicated", "With the recipe, more environments end higher on Breakout up "
         "to 1,024 (a cut made after the runs were seen),"),
        ("1M environments: with the recipe, more of them end higher", "not replicated",
         "but not beyond that within 3.7 million transitions."),
    ],
}  # fmt: skip
NOT_YET = "not measured yet"
PACKAGES = "torch", "transformers"
PAGES = "README.md", "benchmarks/README.md"
VERDICTS = "replicated", "not replicated", "inconclusive", "not measured"
ABOUT_GPU = (
    "random weights in Qwen3's shapes, {new_tokens} new tokens unless stated; a step: "
    "{prompts} x 8 completions of {step_tokens} tokens in micro-batches of 16; loss "
    "and backward pass: {scored:,} tokens, V = {vocab:,}, against the same from whole "
    "logits. Other lengths: a token ends a completion with probability 1/128. The "
    "scripts keep weights in fp32 and multiply in bf16; transformers' own had them in "
    "bf16. GB: 2^30 bytes. Sampled log-probs (bf16) differ from scored ones by "
    "{mean:.4f} on average and {max:.4f} at most. torch {torch}, transformers "
    "{transformers}."
)
ENV_COLUMNS = ["environments", "rollout, steps", "environments alone, steps/s"]
ENV_COLUMNS += ["and policy", "everything"]
OF_SCRIPT = {  # whose code a benchmark measures
    "vs_trl": "grpo",
    "estimator_cost": "vopd",
    "gradient_variance": "vopd",
    "prefix_gradients": "prefixrl",
    "env_speed": "ppo_envs",
}
KINDS = "cell|findings|results|picture|numbers"
MARKED = re.compile(rf"(<!-- ({KINDS}):(\w+) -->)(.*?)(<!-- end -->)", re.S)


def read(script: str) -> list[dict] | dict:
    """The committed runs, or what a benchmark found; [] if nothing was measured."""
    path = claims.RESULTS / f"{script}.json"
    return json.loads(path.read_text()) if path.exists() else []


def cell(script: str, runs: list[dict]) -> str:
    """A line about the default arm."""
    metric, text = CELLS[script]
    own = [report.curve(run, metric)[1] for run in runs if run["arm"] == "default"]
    if not own or not all(map(len, own)):
        return NOT_YET
    gain = report.spread([values[-1] - values[0] for values in own], "+")
    found = {"gain": gain, "seeds": len(own), "low": min(v[-1] for v in own)}
    if script == "prefixrl":
        held_out = [report.curve(x, "eval/pass@1")[1] for x in runs
                    if x["arm"] == "default"]  # fmt: skip
        found["other"] = report.spread([x[-1] - x[0] for x in held_out], "+")
    if script == "vopd":
        ends = [(x["evals"][0], x["evals"][-1]) for x in runs if x["arm"] == "default"]
        way = lambda a, b, name, to: (b[name] - a[name]) / (to - a[name])
        teacher, kl = "eval/teacher_pass@1", "eval/reverse_kl"
        found["gap"] = sum(way(a, b, metric, a[teacher]) for a, b in ends) / len(ends)
        found["kl"] = sum(way(a, b, kl, 0) for a, b in ends) / len(ends)
    return text.format(**found)


def findings(script: str, runs: list[dict]) -> str:
    """What the claims say; it ends where a sentence is for another verdict."""
    by = {claim.text: claim for claim in claims.CLAIMS[script]}
    for text, expected, _ in FINDINGS[script] if runs else []:
        if (found := report.judge(runs, by[text])["verdict"]) != expected:
            sys.exit(f"error: {text!r} is {found}: rewrite what FINDINGS says of it")
    return " ".join(x for *_, x in FINDINGS[script]) if runs else NOT_YET


def picture(script: str, runs: list[dict]) -> str:
    """The picture, if there is one."""
    path = claims.RESULTS / f"{script}.png"
    link = path.relative_to(claims.ROOT).as_posix()
    x, arms, metrics = report.PICTURES[script][""]
    what = ", ".join(report.AXES.get(metric, metric) for metric in metrics.split())
    own = {run["arm"] for run in runs} | {run["arm"].partition("-")[0] for run in runs}
    arms = [arm for arm in arms.split() if arm in own]
    text = f"{script}, {', '.join(arms)}: {what}, by {report.AXES[x]}"
    shown = f"![{text}]({link})" if path.exists() else NOT_YET
    return f"\n{shown}\n"  # Markdown takes a line that begins with a comment as HTML


def results(script: str, runs: list[dict]) -> str:
    """The default arm's metrics, then each claim that was measured."""
    if not runs:
        return f"\n{NOT_YET}\n"
    where = (claims.RESULTS / script).relative_to(claims.ROOT).as_posix()
    counts, commands = Counter(run["arm"] for run in runs), []
    for seeds in sorted({*counts.values()}):
        names = [arm for arm in counts if counts[arm] >= seeds]
        which = f" --arms {','.join(names)}" if len(names) < len(counts) else ""
        call = f"python benchmarks/claims.py {script} --jobs 2 --seeds {seeds}{which}"
        commands.append(call)
    intro = f"`{' && '.join(commands)}`: {report.made_of(runs)}. "
    intro += "[All arms and claims, definitions]"
    intro += f"({where}.md), [every run]({where}.json)."
    whole = [run for run in runs if "first_quarter_of" not in run]
    old = sum(run["code"] != claims.code_now(script, run["arm"]) for run in whole)
    intro += f" {old} of {len(whole)} runs are of older code." * bool(old)
    own = [run for run in runs if run["arm"] == "default"]
    arms = report.arm_table(own, claims.METRICS[script].split())
    rows, missing = [], []
    for claim in claims.CLAIMS[script]:
        found = report.judge(runs, claim)
        if not found["seeds"]:
            missing.append(claim.text)
        else:
            gap = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)
            compared = f"{claim.metric.replace('eval/', '')}: "
            compared += report.compared_arms(claim)
            text = f"{claim.text} ({compared})"
            rows.append([text, str(found["seeds"]), gap, found["verdict"]])
    table = report.table(["claim", "seeds", "difference [95 %]", "verdict"], rows)
    meanings = report.meanings(claims.METRICS[script].split())
    parts = [intro, arms, f"{meanings}.", table]
    if missing:
        parts.append(f"Claims {NOT_YET}: {'; '.join(missing)}.")
    return "\n\n".join(["", *parts, ""]).removeprefix("\n")


def ratio_range(ratios: list[float]) -> str:
    """The median and the range, if there are any."""
    if not ratios:
        return ""
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def vs_trl(found: dict) -> tuple[str, list[str], list[list[str]]]:
    """Speed and memory beside TRL's trainer: introduction, columns, rows."""
    names = {
        "countdown": "Countdown: groups of equal rewards cost nothing",
        "all live": "random: every group is live",
    }
    columns = ["rewards", "ours, completions/s", "TRL", "ratio (over rounds)"]
    columns += ["peak memory, MB", "TRL"]
    rows = []
    for case, sides in found["cases"].items():
        speeds, peaks = (
            [f"{sides[side][key]:.0f}" for side in ("ours", "trl")]
            for key in ("completions_per_second", "peak_mb")
        )
        rows.append([names[case], *speeds, ratio_range(sides["ratios"]), *peaks])
    shapes = found["settings"]
    intro = f"{shapes['prompts']} x {shapes['group']} completions of up to "
    intro += f"{shapes['max_new_tokens']} tokens, {shapes['threads']} threads, TRL "
    intro += f"{found['versions']['trl']}, the same model and problems, runs in turn. "
    rate = max(found["limits"]["matrix_gflops_per_second"].values())
    parts = [
        found["limits"][part]["gflops_per_second"] for part in ("rollout", "update")
    ]
    intro += "What limits it: {:.0f} GFLOP/s in the rollout and {:.0f} in the update, "
    intro += "where matrix products of such shapes reach {:.0f}."
    return intro.format(*parts, rate), columns, rows


def estimator_cost(found: dict) -> tuple[str, list[str], list[list[str]]]:
    """Time and memory of the estimators against `sampled`, by vocabulary."""
    sizes = found["vocabularies"]
    rows = [
        [f"`{name}`"]
        + ["{time_ratio:.2f} ({time_ratio_range[0]:.2f} to {time_ratio_range[1]:.2f}), "
           "{memory_ratio:.2f}".format(**rows[name]) for rows in sizes.values()]
        for name in next(iter(sizes.values()))
    ]  # fmt: skip
    most = max(sizes, key=int)
    times = sizes[most]["sampled"]["all_seconds"]
    intro = f"loss and backward pass of {found['tokens']:,} tokens, hidden size "
    intro += f"{found['hidden']:,}, OMP_NUM_THREADS {found['threads']}: time (its "
    intro += "range over turns), memory at the peak, each as a ratio to `sampled` in "
    intro += f"the same run ({min(times):.1f} to {max(times):.1f} s at V = "
    intro += f"{int(most):,})."
    return intro, ["estimator", *(f"V = {int(v):,}" for v in sizes)], rows


def gradient_claims(name: str, found: dict) -> tuple[list[str], list[list[str]]]:
    """The claims about a program's gradients, at each policy."""
    rows = []
    for claim in claims.GRADIENT_CLAIMS[name]:
        for policy in next(iter(found["seeds"].values())):
            judged = report.judge_gradients(found, policy, claim)
            compared = f"{claim.metric} at {policy}: {claim.a} - {claim.b}"
            text = f"{claim.text} ({compared})"
            ends = [judged.get(x) for x in ("difference", "low", "high")]
            ends = [report.number(x, "+") for x in ends if x is not None]
            gap = "{} [{}, {}]".format(*ends) if ends else ""
            rows.append([text, str(judged["seeds"]), gap, judged["verdict"]])
    return ["claim", "seeds", "difference [95 %]", "verdict"], rows


def gradient_table(found: dict, names: dict[str, str]) -> tuple[list, list]:
    """Kinds of gradients against measures (by their headings) at each policy."""
    policies = next(iter(found["seeds"].values()))
    pairs = [(policy, name) for policy in policies for name in names]
    columns = [f"{policy}: {names[name]}" for policy, name in pairs]
    rows = []
    for kind in next(iter(policies.values())):
        values = [report.over_seeds(found, policy, kind, x) for policy, x in pairs]
        most = len(found["seeds"])
        cells = [report.spread(x) if x else "none" for x in values]
        few = [f", {len(x)} seeds" * (0 < len(x) < most) for x in values]
        rows.append([kind, *map("".join, zip(cells, few))])
    return ["", *columns], rows


def made_with(found: dict) -> str:
    """Versions and wall time of a result of gradients.py."""
    names = [x for x in PACKAGES if x in found]
    parts = [", ".join(f"{x} {found[x]}" for x in names)]
    if walls := [x for x in found.get("seconds", {}).values() if x]:
        span = f"{min(walls):.0f} to {max(walls):.0f} s"
        parts.append(f"wall time of a seed, its runs included, {span}")
        if warm := sum(found.get("cache_warm", {}).values()):
            which = "all" if warm == len(walls) else f"{warm} of them"
            parts[-1] += f" ({which} with base models from the cache of claims.py)"
        parts.append(f"{sum(walls) / 3600:.1f} h summed (threads: {found['threads']})")
    return ", ".join(parts)


def gradient_variance(found: dict) -> tuple:
    """Variance and bias of the estimators' gradients at the same students."""
    names = {"ratio": "variance / that of sampled", "bias_squared": "bias^2"}
    flags, seeds = found["flags"], len(found["seeds"])
    intro = f"{flags['batches']} batches of {flags['batch_size']} completions at each "
    intro += f"student, the same for all estimators, {seeds} seeds; IQM over seeds "
    intro += (
        f"[95 %]. k = {flags['top_k']} of 99 tokens. bias^2: squared bias over the "
    )
    intro += "squared length of full's gradient, an unbiased estimate, which may be "
    intro += f"below 0. {made_with(found)}."
    return (
        intro,
        *gradient_table(found, names),
        *gradient_claims("gradient_variance", found),
    )


def prefix_gradients(found: dict) -> tuple:
    """Gradients with and without prefixes at the same policies."""
    names = {"live": "live groups", "snr": "SNR"}
    flags, seeds = found["flags"], len(found["seeds"])
    intro = (
        f"{flags['batches']} batches of 32 groups of 8 of each kind at each policy, "
    )
    intro += f"{seeds} seeds; IQM over seeds [95 %]. SNR: |E g|^2 over the variance of "
    intro += "one batch's gradient, none where no group is live; live groups: those "
    intro += "whose rewards differ. The estimate of |E g|^2 is raised to 0 where it "
    intro += "is negative. The gradients' norm and std are in the file. "
    intro += f"{made_with(found)}."
    return (
        intro,
        *gradient_table(found, names),
        *gradient_claims("prefix_gradients", found),
    )


def combination_lock(found: dict) -> tuple:
    """Training on prefixed locks alone, with shared parameters and without."""
    of = {}  # (policy, band): chances before and after training, one pair a seed
    for run in found["runs"]:
        band = "{:.0f}-{:.0f} %".format(*(100 * x for x in run["band"]))
        ends = run["lines"][0], run["lines"][-1]
        of.setdefault((run["policy"], band), []).append(ends)
    rows, judged = [], []
    for key, pairs in of.items():
        rows.append(list(key))
        for name in ("plain", "before"):
            begun, ends = pairs[0][0][name], [end[name] for _, end in pairs]
            rows[-1] += [f"{begun:.3f}", report.spread(ends)]  # all seeds begin alike
    for policy, kind in (("tabular", "equal"), ("shared", "higher")):
        for band in dict.fromkeys(band for _, band in of):
            gains = [b["before"] - a["before"] for a, b in of[policy, band]]
            middle, low, high = report.interval(gains)
            word = report.verdict(low, high, kind, 0.02, len(gains))
            text = "without shared parameters these wheels stay as they were (equal)"
            if policy == "shared":
                text = "with shared parameters they get better (higher)"
            cells = band, str(len(gains)), f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
            judged.append([f"PrefixRL: {text}", *cells, word])
    intro = f"{len(pairs)} seeds, {found['seconds']:.0f} s in all, numpy "
    intro += f"{found['numpy']}: the chance of opening a lock without a prefix, and "
    intro += "of setting right the wheels that every prefix already sets; IQM [95 %]."
    columns = ["policy", "prefixes", "opened, before", "after", "first wheels, before"]
    names = ["claim, of the first wheels", "prefixes", "seeds", "gain [95 %]"]
    return intro, [*columns, "after"], rows, [*names, "verdict"], judged


def env_speed(found: dict) -> tuple[str, list, list, list, list]:
    """Steps a second of ppo_envs.py by number of environments, and beside its peers."""
    count = lambda value: f"{value:,.0f}"
    own = [
        [f"{int(envs):,}", count(row["rollout_length"])]
        + [count(row[f"{part}steps_per_second"]) for part in ("env_", "act_", "")]
        for envs, row in found["ours"].items()
    ]
    rows, turns = [], found["in turns"]
    for name, peer in turns.items():
        if name.startswith("ours"):
            continue
        n = peer["num_envs"]
        cells, compiled = [name, count(n)], turns[f"ours, {n}" if n == 64 else "ours"]
        cells += [count(x["steps_per_second"]) for x in (compiled, peer)]
        eager = turns.get(f"ours, {n}, not compiled", {"seconds": []})
        for mine, clock in (compiled, 0), (compiled, 1), (eager, 0):
            pairs = list(zip(mine["seconds"], peer["seconds"]))
            cells.append(ratio_range([its[clock] / ours[clock] for ours, its in pairs]))
        rows.append(cells)
    intro = f"CartPole-v1, --compile {found['flags']['compile']} (without the flag it "
    intro += "is on above 16,384 gradient steps), two hidden layers of 64, "
    intro += f"{found['epochs']} epochs, "
    intro += f"minibatches of {found['minibatch']}; threads: {found['threads']}, "
    intro += f"cores used: {found['cores used']}, load {found['load before']:.1f} "
    intro += f"before and {found['load after']:.1f} after. The peers' rollouts are of "
    intro += f"{found['rollout_length']} steps, and ours beside them; each takes turns "
    intro += "with ours. Ours and JAX are compiled, the peers in torch are not; the "
    intro += "ten seconds of compilation are not included. JAX is a jitted PPO in "
    intro += "the manner of PureJaxRL and the gymnasium loop one in the manner of "
    intro += "CleanRL, both written for this comparison; PufferLib's trainer steps "
    intro += "gymnasium's CartPole here, not its own environments in C."
    peers = ["everything, beside", "environments", "ours, steps/s", "peer"]
    peers += ["ours / peer (over rounds)", "the same in CPU time"]
    peers.append("ours, not compiled / peer")
    return intro, ENV_COLUMNS, own, peers, rows


def gpu(found: dict) -> tuple:
    """Speed and memory on a GPU, part by part; what went wrong in place of a number."""
    parts, sizes = found["parts"], found["sizes"]
    part = lambda name: parts.get(name, {"found": {}, "error": NOT_YET})
    sampled = []
    for name, who in (
        ("rollout", "`generate` of the scripts"),
        ("generate", "transformers' `generate`"),
        ("continuous-batching", "transformers' continuous batching"),
    ):
        speeds = {k: x for k, x in part(name)["found"].items() if isinstance(x, dict)}
        speeds.pop("delta_logp", None)
        for key, row in speeds.items():
            peak = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
            new = row.get("new_tokens", sizes["new_tokens"])
            key = key[6:] + f", {new} new tokens" * (new != sizes["new_tokens"])
            sampled.append([who, key, f"{row['tokens_per_second']:,.0f}", peak])
        if part(name)["error"]:
            sampled.append([who, "", part(name)["error"], ""])
    steps = []
    for name in parts:
        if name[:5] == "step-":
            _, script, model = name.split("-", 2)
            row = parts[name]["found"]
            cells = [row.get(f"seconds_{x}", math.nan) for x in ("rollout", "update")]
            cells = [f"Qwen3-{model}", f"`{script}.py`", *(f"{x:.1f}" for x in cells)]
            cells.append(f"{row.get('peak_gb', math.nan):.1f}")
            steps.append([*cells, parts[name]["error"] or "yes"])
    cards = []
    for name, (model, flags) in PRESETS.items():
        row = part(f"flags-{name}")
        peaks = [row["found"].get(f"{x}_gb", math.nan) for x in ("peak", "reserved")]
        peak = " / ".join(f"{peak:.1f}" for peak in peaks)
        cells = [name.replace("gb", " GB"), f"Qwen3-{model}", f"`{flags}`"]
        cards.append([*cells, row["error"] or peak])
    losses = [
        [f"`{name}`", *(f"{row[f'{x}_ratio']:.2f}" for x in ("memory", "time"))]
        for name, row in part("memory")["found"].items()
        if name != "about"
    ]
    scaled = [
        [f"{int(n):,}", f"{row['rollout_length']}"]
        + [f"{row[f'{x}steps_per_second']:,.0f}" for x in ("env_", "act_", "")]
        for n, row in part("env_speed")["found"].items()
    ]
    if part("env_speed")["error"]:
        scaled.append([part("env_speed")["error"], "", "", "", ""])
    costs = [
        [f"`{name}`", *(f"{row[f'{x}_ratio']:.2f}" for x in ("memory", "time"))]
        for name, row in part("estimator_cost")["found"].items()
        if isinstance(row, dict)
    ]
    if part("estimator_cost")["error"]:
        costs.append([part("estimator_cost")["error"], "", ""])
    checks = {
        "exact": "losses and gradients in fp32 are the CPU's",
        "decode": "completions in fp32 are the CPU's",
        "cartpole": "`ppo_envs.py` solves CartPole-v1",
        "countdown": "`grpo.py` learns Countdown, each step faster than on the CPU",
    }
    checks = [[text, part(x)["error"] or "yes"] for x, text in checks.items()]
    gap = part("rollout")["found"].get("delta_logp", {})
    gap = {name: gap.get(name, math.nan) for name in ("mean", "max")}
    intro = ABOUT_GPU.format(**sizes, **gap, **{x: found[x] for x in PACKAGES})
    return (
        intro,
        ["Qwen3-0.6B, sampled by", "sequences", "tokens/s", "peak, GB"],
        sampled,
        ["model", "a step of", "rollout, s", "update, s", "peak, GB", "passed"],
        steps,
        ["a GPU of", "model", "flags, with `--max-new-tokens 512`", "used / held, GB"],
        cards,
        ["loss and backward pass", "memory / whole logits", "time / whole logits"],
        losses,
        ["estimator of `vopd.py`", "memory / `sampled`", "time / `sampled`"],
        costs,
        ENV_COLUMNS,
        scaled,
        ["check", "passed"],
        checks,
    )


def memory(found: dict) -> tuple[str, list[str], list[list[str]]]:
    """Loss and backward pass of each script beside whole logits, on a CPU."""
    cases = found["cases"].items()
    rows = [[f"`{case}`", *peaks.cells(row)] for case, row in cases]
    intro = f"loss and backward pass of {found['tokens']:,} tokens at V = "
    times = f"median of {found['repeats']}" if found["repeats"] > 1 else "one run"
    intro += f"{found['vocab']:,}, hidden size {found['hidden']:,}, in fp32: what they "
    intro += f"add to the peak, in GB (2^30 bytes), and seconds ({times}), by the "
    intro += f"script and from whole logits; torch {found['torch']}, "
    intro += f"{found['threads']} threads."
    columns = ["loss of", "GB", "whole logits", "ratio", "seconds", "whole logits"]
    return intro, [*columns, "ratio"], rows


def equal_runs(a: list[dict], b: list[dict]) -> int:
    """Seeds whose runs have equal metrics at every evaluation, those that both have,
    other than times and memory."""
    of, equal = {run["seed"]: run["evals"] for run in b}, 0
    for run in a:
        other = of.get(run["seed"], [])
        pairs = [
            (x[name], y[name])
            for x, y in zip(run["evals"], other)
            for name in x.keys() & y.keys()
            if not re.search("second|memory", name)
        ]
        equal += len(run["evals"]) == len(other) and all(x == y for x, y in pairs)
    return equal


def again() -> str:
    """Arms that were run once more, with newer code, beside the published ones."""
    rows, made, older = [], [], 0
    for script in claims.ARMS:
        everything, metric = read(f"again/{script}"), CELLS[script][0]
        for arm in dict.fromkeys(run["arm"] for run in everything):
            newer = [run for run in everything if run["arm"] == arm]
            published = [run for run in read(script) if run["arm"] == arm]
            cells = []
            for runs in published, newer:
                values = [report.curve(run, metric)[1] for run in runs]
                cells.append(report.spread([x[-1] - x[0] for x in values], "+"))
            name = f"`{script}.py`", arm, metric.removeprefix("eval/"), str(len(newer))
            same = f"{equal_runs(newer, published)} of {len(newer)}"
            rows.append([*name, *cells, same])
            made += newer
            older += sum(run["code"] != claims.code_now(script, arm) for run in newer)
    columns = ["script", "arm", "gain of", "seeds", "published", "with newer code"]
    columns.append("equal in every metric")
    intro = f"{report.made_of(made)}."
    intro += f" {older} of {len(made)} runs are of older code." * bool(older)
    shown = f"{intro}\n\n{report.table(columns, rows)}"
    return f"\n{shown if rows else NOT_YET}\n\n"


def hours() -> str:
    """What the runs took, summed; one that was resumed took what the others of its arm
    did, or by the speed it logged."""
    rows = []
    for script in claims.ARMS:
        runs, walls = [x for x in read(script) if "first_quarter_of" not in x], []
        for run in runs:
            arm = [x["wall_seconds"] for x in runs if x["arm"] == run["arm"]]
            others = [x for x in arm if x] or [report.logged_seconds(run) or math.nan]
            walls.append(run["wall_seconds"] or statistics.median(others))
        rows += [[f"claims.py {script}", f"{len(runs)} runs", sum(walls)]] * bool(runs)
    for name in filter(read, claims.GRADIENT_CLAIMS):
        walls = [x or math.nan for x in read(name).get("seconds", {}).values()]
        rows.append([f"{name}.py", f"{len(walls)} seeds", sum(walls)])
    total = sum(row[-1] for row in rows)
    rows = [[f"`{name}`", what, f"{x / 3600:.1f}"] for name, what, x in rows]
    rows.append(["all", "two at a time", f"{total / 3600:.1f}, {total / 7200:.1f} by "
                 "the clock"])  # fmt: skip
    return f"\n{report.table(['', '', 'hours'], rows)}\n\n"


def verdicts() -> str:
    """How many claims got which verdict, by command; and its picture."""
    by = {}
    for script in filter(read, claims.ARMS):
        judged = [report.judge(read(script), x) for x in claims.CLAIMS[script]]
        by[f"claims.py {script}"] = [found["verdict"] for found in judged]
    for name in filter(read, claims.GRADIENT_CLAIMS):
        _, rows = gradient_claims(name, read(name))
        by[f"{name}.py"] = [row[-1] for row in rows]
    if found := read("combination_lock"):
        by["combination_lock.py"] = [row[-1] for row in combination_lock(found)[-1]]
    rows = []
    for program, found in by.items():
        name = program.removeprefix("claims.py ").removesuffix(".py")
        path = claims.RESULTS / f"{name}.png"
        link = f"[{name}]({path.relative_to(claims.ROOT).as_posix()})" * path.exists()
        counts = [str(found.count(verdict)) for verdict in VERDICTS]
        rows.append([f"`python benchmarks/{program}`", *counts, link])
    return f"\n{report.table(['claims tested by', *VERDICTS, 'picture'], rows)}\n\n"


def ratios_of_speed() -> str:
    """The ratios of vs_trl.py and of env_speed.py, those of each rewards or peer."""
    rows = []
    if found := read("vs_trl"):
        for what, *_, ratio, _, _ in vs_trl(found)[-1]:
            rows.append(["`grpo.py`", f"TRL's GRPOTrainer ({what})", "", ratio])
    if found := read("env_speed"):
        for peer, envs, *_, ratio, _, eager in env_speed(found)[-1]:
            name = f"{peer} ({envs} environments)"
            rows.append(["`ppo_envs.py`", name, ratio, eager])
    columns = ["ours", "theirs", "ours compiled", "not compiled"]
    return f"\n{report.table(columns, rows)}\n\n"


def numbers(name: str, found: dict) -> str:
    """The table of another benchmark, with its command."""
    tables = {"again": again, "hours": hours, "verdicts": verdicts}
    tables["speed"] = ratios_of_speed
    if name in tables:
        return tables[name]()
    file = name
    if name == "gpu":
        file = next((x.stem for x in sorted(claims.RESULTS.glob("gpu-*.json"))), name)
        found = read(file)
    if name.startswith("memory"):
        file, name = name.replace("memory", "memory-cpu").replace("_", "-"), "memory"
        found = read(file)
    if not found or ("gradient" in name and "seeds" not in found):
        return f"\n{NOT_YET}\n"
    intro, *tables = {
        "vs_trl": vs_trl,
        "estimator_cost": estimator_cost,
        "gradient_variance": gradient_variance,
        "prefix_gradients": prefix_gradients,
        "combination_lock": combination_lock,
        "env_speed": env_speed,
        "memory": memory,
        "gpu": gpu,
    }[name](found)
    where = (claims.RESULTS / file).relative_to(claims.ROOT).as_posix()
    intro = f"[`python benchmarks/{name}.py`](benchmarks/{name}.py), {intro} "
    intro += f"{found['hardware']}; [all numbers]({where}.json)."
    if "wall_seconds" in found:
        intro += f" Measured in {found['wall_seconds'] / 60:.0f} minutes."
    own = OF_SCRIPT.get(name)
    code = {own: found.get("code")} if own else found.get("code", {})
    old = [f"{x}.py" for x in code if code[x] != claims.code_now(x, "default")]
    intro += f" Measured with older code of {', '.join(old)}." if old else ""
    nothing = f"not done|no time was left|{NOT_YET}"  # in place of a table's first row
    pairs = [
        (names, [row for row in rows if not re.match(nothing, row[0])])
        for names, rows in zip(tables[::2], tables[1::2])
    ]
    shown = [report.table(names, rows) for names, rows in pairs if rows]
    return "\n".join(["", intro, "", *(f"{table}\n" for table in shown), ""])


def rewrite(text: str, folder: str) -> str:
    """A README of that folder with every marked part as the JSON files have it."""
    kinds = {"cell": cell, "findings": findings, "picture": picture}
    kinds |= {"results": results, "numbers": numbers}

    def fill(match: re.Match) -> str:
        begin, kind, script, _, end = match.groups()
        filled = kinds[kind](script, read(script))
        return f"{begin}{filled.replace(f']({folder}/', '](')}{end}"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, wrong = parser.parse_args(argv).check, []
    measured = [script for script in claims.ARMS if read(script)]
    for script in measured:
        path = claims.RESULTS / f"{script}.md"
        page = claims.page(script, read(script))
        if not check:
            claims.write_pages(path.with_suffix(".json"))
        elif not path.exists() or path.read_text() != page:
            wrong.append(f"{path.name} is not what {script}.json says")
    for name in claims.GRADIENT_CLAIMS:
        found = read(name)
        if found and not check:
            gradients.draw(found, claims.RESULTS / f"{name}.png")
    if not check and (found := read("env_speed")):
        speed.draw(found, claims.RESULTS / "env_speed.png")
    pages = [path for page in PAGES if (path := claims.ROOT / page).exists()]
    texts = {path: path.read_text() for path in pages}
    wrong += [
        f"no README has <!-- results:{script} -->"
        for script in measured
        if not any(f"<!-- results:{script} -->" in text for text in texts.values())
    ]
    for path, old in texts.items():
        new = rewrite(old, path.parent.relative_to(claims.ROOT).as_posix())
        if not check:
            path.write_text(new)
        elif new != old:
            name = path.relative_to(claims.ROOT)
            wrong.append(f"{name} is not what the JSON files say")
    for line in wrong:
        print(f"error: {line}: run python benchmarks/readme.py", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
