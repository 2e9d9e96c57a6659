"""Test what the papers claim: the arms of a script over seeds, as a user runs them.

    python benchmarks/claims.py grpo --seeds 5 --jobs 2
    python benchmarks/claims.py all --quick        (two seeds, never published)

Writes benchmarks/results/<script>.json, one run a line, and the pages that report.py
makes of it; benchmarks/readme.py takes them over into benchmarks/README.md.

Runs. Every run is a process of the script's own command line; nothing is imported. It
stands in <work>/<script>/s<seed>/, with that seed's runs/cache (base models, teachers,
traces), which the arms share. What is finished is not run again, what was interrupted
goes on by --resume from its last checkpoint. Each arm is run for all seeds before the
next, so that what they share is made once. An arm that is the first quarter of another
(FIRST_QUARTER) is not run: its records are cut from the other's. A record says whether
a run added to its cache (cache_warm: false), because that is in its wall time. --jobs J
runs J side by side, each with OMP_NUM_THREADS = cores / J. What is published has 5
or more seeds an arm, 10 if half of its runs take less than two minutes. --quick runs
the default and, but for ppo_envs.py, one other arm of a script with two seeds, a tenth
of the steps, 16 prompts a step, evaluations of 32 problems and a shorter warm start,
for Countdown with two numbers, to see that all this works; it writes to the work folder
alone.

Identity. A run is known by its flags, its seed, the versions of torch and transformers
and the hash of the program's syntax tree, which comments, docstrings and layout do not
change. One that stands in benchmarks/results/<script>.json under the same identity is
not run again either, on whichever day or machine it was made. Those of another
identity are dropped when results are written (<script>.old.json keeps the file as it
was), unless --keep-old is given: then they count as if they were of today, and the page
lists every hash it is made of. To see beside them whether newer code learns the same:

    python benchmarks/claims.py grpo --arms default --out again --work again/runs

Statistics. Per arm the interquartile mean over seeds (IQM) with its 95 % bootstrap
interval. Arms share seeds, thus base model and problems, so two arms are compared by
the IQM of their differences seed by seed. Probability of improvement: that a run of A
is better than a run of B, ties counting half.

Verdicts are computed, from the 95 % interval (low, high) of the paired difference A - B
(for lower and not-higher: B - A), in this order; nobody edits them:

    not measured     no seed has run both arms
    inconclusive     fewer than 5 seeds have
    higher, lower           replicated      low > 0
                            not replicated  high < 0, or -margin < low and high < margin
    not-lower, not-higher   replicated      low > -margin    (no fall by margin or more)
                            not replicated  high < -margin   (a fall by more than that)
    equal                   replicated      -margin < low and high < margin
                            not replicated  low > margin or high < -margin
    inconclusive     everything else
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import report
from code_hash import code_hash

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = "torch", "transformers", "trl"
INSTALLED = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
RUNNING: list[subprocess.Popen] = []

# ------------------------------- What is to be tested ---------------------------------

EQUAL = "--steps 100000 --max-flops 5e11 --eval-every 100"  # of prefixrl
PLAIN = f"{EQUAL} --prefixes-per-problem 0"
# Five times the default rate, chosen on seed 101 of a draft of the task: at 1e-4 the
# arms' lengths stayed alike for 80 steps, at 5e-4 those of sequence were 1 longer.
RAMBLING = "--task tasks/rambling.py --max-new-tokens 40 --steps 150"
RAMBLING += " --learning-rate 5e-4"


def breakout(num_envs: int, more: str = "", times: int = 1) -> str:
    """Flags of ppo_envs for 7 x 2^19 transitions, or so many times as many, with an
    evaluation every 2^19."""
    every = 2**19 // (32 * num_envs)
    counts = f"--num-envs {num_envs} --rollout-length 32 --steps {7 * times * every}"
    counts += f" --eval-every {every} --save-every {every} --base-envs 64"
    return f"--env breakout --compile on {counts} {more}".strip()


ENVS = 16, 64, 256, 1024, 4096, 16384
WRONG = {"size": "minibatch-size", "sqrt": "minibatch-size-sqrt-lr"}
FIRST_QUARTER = {f"recipe-{n}": f"long-{n}" for n in (64, 1024, 4096, 16384)}
FIRST_QUARTER |= {f"{name}-1024": f"long-{name}-1024" for name in WRONG}
ARMS: dict[str, dict[str, str]] = {  # name: flags; the first arm fills the caches
    "grpo": {
        "default": "",
        "updates-2": "--updates-per-batch 2",
        "updates-4": "--updates-per-batch 4",
        "sequence": "--normalization sequence",
        "constant": "--normalization constant",
        "no-std": "--advantage-scale none",
        "trl": "",
        "rambling-sequence": f"{RAMBLING} --normalization sequence",
        "rambling-default": RAMBLING,
        "rambling-constant": f"{RAMBLING} --normalization constant",
    },
    "vopd": {
        "default": "",
        "sampled": "--estimator sampled",
        "full": "--estimator full",
        "vopd-topk": "--estimator vopd-topk --top-k 5",  # of 99 tokens
        "topk": "--estimator topk --top-k 5",
        "clip": "--estimator clip",
        "default-64": "--prompts-per-step 64",  # in place of 256: a noisier gradient
        "full-64": "--estimator full --prompts-per-step 64",
    },
    "dmpo": {
        "default": "",
        "grpo": "--dm-coef 0",
        "dm-only": "--dm-only",
        "forward-kl": "--dm-divergence forward-kl",
        "weak-forward-kl": "--dm-divergence forward-kl --dm-coef 0.08",
        "strong": "--dm-coef 40",
    },
    "prefixrl": {  # EQUAL: at 5e11 FLOPs; the default ends a tenth below that
        "default": "",
        "rl": PLAIN,
        "rl-64": f"{PLAIN} --group-size 64 --prompts-per-step 4",
        "sft-rl": f"{PLAIN} --sft-epochs 10",
        "off-policy": f"{PLAIN} --off-policy",
        "prefixed-only": f"{EQUAL} --plain-share 0",
        "only-10-40": f"{EQUAL} --plain-share 0 --prefix-low 0.1 --prefix-high 0.4",
        "only-80-95": f"{EQUAL} --plain-share 0 --prefix-low 0.8 --prefix-high 0.95",
        "half-plain": f"{EQUAL} --plain-share 0.5",
        "unmasked": f"{EQUAL} --no-mask-prefix",
        "few": f"{EQUAL} --candidates 10",
        "sft-rl-few": f"{PLAIN} --sft-epochs 96 --candidates 10",  # as many traces
    },
    "ppo_envs": {  # at 64 environments the scalings are one: recipe-64
        "default": "",
        **{f"recipe-{n}": breakout(n) for n in ENVS},
        **{
            f"{name}-{n}": breakout(n, f"--scaling {scaling}")
            for name, scaling in WRONG.items()
            for n in ENVS
            if n != 64
        },
        **{f"long-{n}": breakout(n, times=4) for n in (64, 1024, 4096, 16384)},
        **{
            f"long-{name}-1024": breakout(1024, f"--scaling {scaling}", times=4)
            for name, scaling in WRONG.items()
        },
        **{f"ewma-{com}": breakout(64, f"--ewma-com {com}") for com in (16, 64, 256)},
        "cut": breakout(64, "--ewma-com 256 --ewma-from 1025"),  # after four sevenths
        "cut-16": breakout(16, "--ewma-com 256 --ewma-from 4097"),
    },
}
for part, whole in FIRST_QUARTER.items():  # their runs are those of the whole
    ARMS["ppo_envs"][part] = ARMS["ppo_envs"][whole]
OTHER_PROGRAM = {"trl": "benchmarks/trl_grpo.py"}  # arms that run it, with the same CLI
QUICK = {"grpo": "updates-2", "vopd": "sampled", "dmpo": "grpo", "prefixrl": "rl"}
EASY = {"grpo": "--task countdown-2 --tiny-steps 60", "dmpo": "--tiny-steps 60"}
EASY |= {"vopd": EASY["grpo"], "prefixrl": "--tiny-steps 250"}  # flags of --quick
METRICS = {  # of the arms' table, on held-out problems, or on hard training problems
    "grpo": "eval/pass@1 eval/pass@8 entropy samples/wrong_length",
    "vopd": "eval/pass@1 eval/pass@8 eval/reverse_kl",
    "dmpo": "eval/sr eval/qr eval/qr@2 eval/qr@4 eval/qr@8 eval/qr@16 eval/entropy "
    "eval/distinct_feasible eval/distinct_optimal grpo_coefficient dm_coefficient",
    "prefixrl": "eval/hard_pass@1 eval/hard_pass@8 eval/pass@1 eval/pass@8 flops",
    "ppo_envs": "eval/episode_return ddr kl proximal_age",
}
PAPERS = {
    "DeepSeekMath": "arXiv 2402.03300",
    "Dr. GRPO": "arXiv 2503.20783",
    "Ours": "no paper",
    "TRL": "huggingface/trl",
    "vOPD": "arXiv 2605.07865",
    "DMPO": "arXiv 2605.19461",
    "PrefixRL": "arXiv 2601.18795",
    "PPO": "arXiv 1707.06347",
    "1M environments": "arXiv 2603.06009",
}


class Claim(NamedTuple):
    """Arm A against arm B, or against "base": A's own first evaluation. `at` says when:
    end: at the last evaluation; every: at each one (the interval spans all of them);
    flops: at the smaller total FLOPs of the two runs, between evaluations on the line
    through them; flops/2: A at half of B's total FLOPs, B at its end; ranks: the rank
    correlation of the metric at the end with B (num_envs, or the median ddr) over the
    arms of the families A (family-16, ...; all of them have the arm recipe-64);
    ranks/1024: over those of at most 1,024 environments; policy: A and B are kinds of
    gradients, at each policy that they were measured at."""

    text: str  # paper: what it claims, in our words
    metric: str  # "x-y" is the difference of two metrics
    a: str
    b: str
    kind: str
    margin: float
    at: str


def claim(text: str, spec: str, at: str = "end") -> Claim:
    """A Claim from "metric A B kind margin"."""
    metric, a, b, kind, margin = spec.split()
    return Claim(text, metric, a, b, kind, float(margin), at)


CLAIMS = {
    "grpo": [
        claim("DeepSeekMath: held-out pass@1 rises",
              "eval/pass@1 default base higher 0.02"),
        claim("DeepSeekMath: held-out pass@8 falls by less than 0.02",
              "eval/pass@8 default base not-lower 0.02"),
        claim("Ours: two updates on a batch end higher than one",
              "eval/pass@1 updates-2 default higher 0.02"),
        claim("Ours: four updates on a batch end higher than one",
              "eval/pass@1 updates-4 default higher 0.02"),
        claim("Ours: two updates cost less than 0.02 of pass@8",
              "eval/pass@8 updates-2 default not-lower 0.02"),
        claim("Ours: four updates cost less than 0.02 of pass@8",
              "eval/pass@8 updates-4 default not-lower 0.02"),
        claim("Dr. GRPO: means per sequence make wrong answers longer",
              "samples/wrong_length sequence constant higher 0.5"),
        claim("Dr. GRPO: means per sequence make them longer than one mean per batch",
              "samples/wrong_length sequence default higher 0.5"),
        claim("Ours: one mean and a constant leave wrong answers equally long",
              "samples/wrong_length default constant equal 0.5"),
        claim("Dr. GRPO: with free length, means per sequence make wrong ones longer",
              "samples/wrong_length rambling-sequence rambling-constant higher 0.5"),
        claim("Dr. GRPO: with free length, also longer than one mean per batch does",
              "samples/wrong_length rambling-sequence rambling-default higher 0.5"),
        claim("Ours: with free length, one mean and a constant give equal lengths",
              "samples/wrong_length rambling-default rambling-constant equal 0.5"),
        claim("Dr. GRPO: a constant denominator costs less than 0.02",
              "eval/pass@1 constant sequence not-lower 0.02"),
        claim("Dr. GRPO: not dividing by the std costs less than 0.02",
              "eval/pass@1 no-std default not-lower 0.02"),
        claim("TRL: its trainer has the same learning curve",
              "eval/pass@1 default trl equal 0.05", "every"),
    ],
    "vopd": [
        claim("vOPD: distillation lowers the reverse KL",
              "eval/reverse_kl default base lower 0.02"),
        claim("vOPD: distillation raises the student's pass@1",
              "eval/pass@1 default base higher 0.02"),
        claim("vOPD: the baseline ends at a lower reverse KL than no baseline",
              "eval/reverse_kl default sampled lower 0.02"),
        claim("vOPD: the baseline ends at a higher pass@1 than no baseline",
              "eval/pass@1 default sampled higher 0.02"),
        claim("Ours: the baseline's pass@1 is less than 0.02 below that of no baseline",
              "eval/pass@1 default sampled not-lower 0.02"),
        claim("vOPD: its reverse KL is less than 0.02 above the full estimator's",
              "eval/reverse_kl default full not-higher 0.02"),
        claim("vOPD: its pass@1 is less than 0.02 below the full estimator's",
              "eval/pass@1 default full not-lower 0.02"),
        claim("Ours: with a quarter of the batch, full is ahead as well",
              "eval/reverse_kl full-64 default-64 lower 0.02"),
        claim("vOPD: a top-k baseline costs less than 0.02 of reverse KL",
              "eval/reverse_kl vopd-topk default not-higher 0.02"),
        claim("vOPD: a top-k baseline costs less than 0.02 of pass@1",
              "eval/pass@1 vopd-topk default not-lower 0.02"),
        claim("vOPD: the top-k objective is biased: its reverse KL ends higher",
              "eval/reverse_kl topk full higher 0.02"),
    ],
    "dmpo": [
        claim("DMPO: the quality ratio is above GRPO's",
              "eval/qr default grpo higher 0.02"),
        claim("DMPO: more answers are feasible than with GRPO",
              "eval/sr default grpo higher 0.02"),
        claim("DMPO: the best of 16 answers is better than GRPO's",
              "eval/qr@16 default grpo higher 0.02"),
        claim("DMPO: going from 1 to 16 samples gains more than with GRPO",
              "eval/qr@16-eval/qr@1 default grpo higher 0.02"),
        claim("DMPO: more distinct feasible answers among 16 than with GRPO",
              "eval/distinct_feasible default grpo higher 0.25"),
        claim("DMPO: more distinct optimal answers among 16 than with GRPO",
              "eval/distinct_optimal default grpo higher 0.1"),
        claim("DMPO: entropy stays above GRPO's",
              "eval/entropy default grpo higher 0.02"),
        claim("DMPO: forward KL costs less than 0.02 (argued, not run there)",
              "eval/qr forward-kl default not-lower 0.02"),
    ],
    "prefixrl": [
        claim("PrefixRL: solves more hard problems than RL at equal FLOPs",
              "eval/hard_pass@1 default rl higher 0.02", "flops"),
        claim("PrefixRL: solves more than RL with 64 samples at equal FLOPs",
              "eval/hard_pass@1 default rl-64 higher 0.02", "flops"),
        claim("PrefixRL: solves more than SFT, then RL, at equal FLOPs",
              "eval/hard_pass@1 default sft-rl higher 0.02", "flops"),
        claim("PrefixRL: solves more than off-policy RL at equal FLOPs",
              "eval/hard_pass@1 default off-policy higher 0.02", "flops"),
        claim("PrefixRL: with half the FLOPs, solves as many as SFT, then RL",
              "eval/hard_pass@1 default sft-rl not-lower 0.02", "flops/2"),
        claim("Ours: prefixes of 10 problems carry over to more than SFT, then RL",
              "eval/pass@1 few sft-rl-few higher 0.02", "flops"),
        claim("PrefixRL: solves more with the prefix kept out of the loss",
              "eval/hard_pass@1 default unmasked higher 0.02", "flops"),
        claim("PrefixRL: 40-80 % prefixes alone teach the plain problems",
              "eval/hard_pass@1 prefixed-only base higher 0.02"),
        claim("PrefixRL: 10-40 % prefixes alone teach the plain problems",
              "eval/hard_pass@1 only-10-40 base higher 0.02"),
        claim("PrefixRL: 80-95 % prefixes alone teach the plain problems",
              "eval/hard_pass@1 only-80-95 base higher 0.02"),
    ],
    "ppo_envs": [
        claim("PPO: learns CartPole",
              "eval/episode_return default base higher 10"),
        claim("1M environments: with the recipe, more of them end higher",
              "eval/episode_return recipe num_envs higher 0.2", "ranks"),
        claim("Ours: up to 1,024 environments, more end higher with the recipe",
              "eval/episode_return recipe num_envs higher 0.2", "ranks/1024"),
        claim("1M environments: more end no higher if the minibatch grows with them",
              "eval/episode_return size num_envs not-higher 0.2", "ranks"),
        claim("1M environments: nor if the rate grows by the square root as well",
              "eval/episode_return sqrt num_envs not-higher 0.2", "ranks"),
        claim("Ours: up to 1,024, more end no higher if the minibatch grows with them",
              "eval/episode_return size num_envs not-higher 0.2", "ranks/1024"),
        claim("Ours: up to 1,024, nor if the rate grows by the square root as well",
              "eval/episode_return sqrt num_envs not-higher 0.2", "ranks/1024"),
        claim("1M environments: 16,384 end higher than 16 with the recipe",
              "eval/episode_return recipe-16384 recipe-16 higher 1"),
        claim("1M environments: four times as long, 1,024 end higher than 64",
              "eval/episode_return long-1024 long-64 higher 1"),
        claim("1M environments: four times as long, 4,096 end higher than 1,024",
              "eval/episode_return long-4096 long-1024 higher 1"),
        claim("1M environments: four times as long, 16,384 end higher than 64",
              "eval/episode_return long-16384 long-64 higher 1"),
        claim("1M environments: run as long, 1,024 with larger minibatches do not",
              "eval/episode_return long-size-1024 long-64 not-higher 1"),
        claim("1M environments: nor do they if the rate grows by the square root",
              "eval/episode_return long-sqrt-1024 long-64 not-higher 1"),
        claim("1M environments: run as long, the recipe ends above larger minibatches",
              "eval/episode_return long-1024 long-size-1024 higher 1"),
        claim("1M environments: run as long, it is above the root rate as well",
              "eval/episode_return long-1024 long-sqrt-1024 higher 1"),
        claim("1M environments: at 1,024 the recipe is above a larger minibatch",
              "eval/episode_return recipe-1024 size-1024 higher 1"),
        claim("1M environments: at 1,024 it is above the root rate as well",
              "eval/episode_return recipe-1024 sqrt-1024 higher 1"),
        claim("1M environments: DDR orders the ends of all these runs",
              "eval/episode_return recipe+size+sqrt ddr higher 0.2", "ranks"),
        claim("1M environments: DDR orders the ends of the recipe's runs",
              "eval/episode_return recipe ddr higher 0.2", "ranks"),
        claim("Ours: up to 1,024, DDR orders the ends of all these runs",
              "eval/episode_return recipe+size+sqrt ddr higher 0.2", "ranks/1024"),
        claim("Ours: up to 1,024, DDR orders the ends of the recipe's runs",
              "eval/episode_return recipe ddr higher 0.2", "ranks/1024"),
        claim("1M environments: a smaller outer step (PPO-EWMA over 16) ends higher",
              "eval/episode_return ewma-16 recipe-64 higher 1"),
        claim("1M environments: a smaller outer step (PPO-EWMA over 64) ends higher",
              "eval/episode_return ewma-64 recipe-64 higher 1"),
        claim("1M environments: a smaller outer step (PPO-EWMA over 256) ends higher",
              "eval/episode_return ewma-256 recipe-64 higher 1"),
        claim("1M environments: a smaller outer step from mid-run on revives learning",
              "eval/episode_return cut recipe-64 higher 1"),
        claim("1M environments: it also does at 16 environments, where it is slow",
              "eval/episode_return cut-16 recipe-16 higher 1"),
    ],
}  # fmt: skip
GRADIENT_CLAIMS = {  # of the program that measures them, at each policy
    "gradient_variance": [
        Claim("vOPD: the baseline lowers the variance of the gradient",
              "ratio", "vopd", "sampled", "lower", 0.05, "policy"),
        Claim("vOPD: a top-k baseline lowers it as far",
              "ratio", "vopd-topk", "vopd", "equal", 0.05, "policy"),
        Claim("vOPD: the gradient of the top-k objective is biased",
              "bias_squared", "topk", "full", "higher", 0.0, "policy"),
    ],
    "prefix_gradients": [
        Claim("PrefixRL: behind a prefix the gradient has a higher SNR",
              "snr", "prefix 40-80 %", "plain", "higher", 0.05, "policy"),
    ],
}  # fmt: skip
WEAK = (
    "At the paper's lambda and alpha the square pulls on a completion an order of "
    "magnitude less than GRPO (rows dm_coefficient and grpo_coefficient of the arm "
    "default): the two arms are nearly one. Tried: a lambda at which both pull about "
    "alike (arm strong), the forward KL at the paper's lambda and at one as weak as "
    "the square's, and no GRPO at all. Where the pull is of GRPO's size or alone "
    "(strong, forward-kl, dm-only) the best of 16 and the distinct optimal answers "
    "stay well above GRPO's, and one answer alone is worse: quality is traded for "
    "diversity. Tasks, model and learning rate are not the paper's; its scaling over "
    "a batch is not stated."
)
SKILL = (
    "30 steps of imitation alone solve next to nothing (sft/hard_pass@1 of the runs: "
    "0 to .008), but they lift the chance of a single move so far that RL finds its "
    "first rewards, at 5 % of the FLOPs; in nine seeds of ten it then ends above "
    "prefixes. In the tenth, seed 3, a few came in the first 14 steps (by its log, "
    "which is not committed) and none after, and it ends at 0. The 96 traces show each "
    "of the 30 moves that there are about 29 times, which traces of hard mathematics "
    "do not. Tried: ten problems in the place of 96 (arms few and sft-rl-few). On the "
    "ten, SFT, then RL is further ahead: hard_pass@1 0.74 against 0.49; on held-out "
    "problems neither is clearly ahead."
)
FEW = (
    "Both arms spread widely over seeds. SFT, then RL imitates 960 traces here, as "
    "with 96 of them, but in 96 steps of ten, not in 30 of 32. (With 30 steps of 32, "
    "filled up with copies, as an earlier version of prefixrl.py had it, on another "
    "kind of processor: -0.010 [-0.036, +0.020].)"
)
SHORT = (
    "At 3.7 million transitions 4,096 and 16,384 environments have made 28 and 7 outer "
    "steps, and each run from 256 environments on ends above where it was three "
    "evaluations before (picture -recipe): too short for a plateau. Tested with runs "
    "four times as long (arms long-*, picture -long). As the recipe does not rise over "
    "all six numbers of environments, that the wrong scalings do not either is no "
    "contrast; so they are compared up to 1,024 as well, a cut that was made after the "
    "runs were seen."
)
LONGER = (
    "At 14.7 million transitions 4,096 and 16,384 environments have made 112 and 28 "
    "outer steps. All are still rising, 64 environments least (means of the seeds over "
    "the last four times 2^19 transitions: 0.4, after 2.8 over the four before; the "
    "others 2.2 to 8.7; picture -long): plateaus are not known. Longer runs were not "
    "made."
)
STALLED = (
    "The difference between the two arms is {}, depending on the seed: five seeds are "
    "too few to tell. Over the last four times 2^19 transitions 1,024 environments "
    "with either larger minibatch gain 0.4 and 0.5 (mean of the seeds), 64 "
    "environments 0.4, and 1,024 under the recipe 3.8; over the last eight 1.3, 0.6, "
    "3.2 and 5.8 (picture -wrong)."
)
ROOT_RATE = (
    "Up to 1,024 environments a minibatch that grows with them, at a rate that grows "
    "by the square root, rises with them, too; only without the higher rate does it "
    "not. Whether it ends below the recipe at 1,024 is inconclusive."
)
DDR = (
    "At equal transitions DDR is highest where the runs are short of outer steps "
    "(16,384 environments), and high where a policy has nearly stopped changing (16 "
    "environments in some seeds), so it does not order the ends of all these runs, and "
    "of the recipe's alone it is inconclusive. Tried: up to 1,024 environments alone, "
    "a cut that was made after the runs were seen: there it is inconclusive, for the "
    "recipe's runs and for all."
)
ANCHOR = (
    "At 64 environments an average over 16, 64 or 256 gradient steps from the start "
    "ends 4, 3 and 1 lower, with intervals that reach above 0. The run that is cut "
    "there, to an average over 256 after four sevenths of its length, was still "
    "improving a little (picture -cut). Tried: the same cut at 16 environments. Up to "
    "the cut those runs are the recipe's, bit for bit: since the first seventh of "
    "their length three of the five had gained 0.6 to 3.5, one nothing, and one had "
    "lost 4.2. From there to the end they change by -0.7 to +1.9, and the recipe's, "
    "which are not cut, by -0.8 to +4.6: the cut revived none. No other way to make "
    "the outer step smaller was tried."
)
UPDATES = (
    "Early on more updates are ahead (picture -updates), at the end four are not. In "
    "pass@8 one and two rise within 50 steps and four fall; they end at 0.49, 0.48 and "
    "0.41 (means of seeds 1 to 5; the base models 0.44). The more updates, the lower "
    "the entropy at the end (rows entropy): 8 tries are more alike. Tried: two and "
    "four; no other learning rate."
)
NOISE = (
    "The distance from full shrinks while they learn, from 0.14 nats at step 100 to "
    "0.08 at 200 and 0.07 at 300, where it is at the end, too; a longer run was not "
    "made. With 64 completions in a batch in the place of 256 (arms default-64 and "
    "full-64) it is 0.16 at the end, about what 256 have after as many completions in "
    "all. The biased topk, which has no sampled token either, ends near full (picture "
    "-biased). A vocabulary of more than 99 tokens was not tried."
)
FIVE = (
    "The difference between the two arms is {}, depending on the seed: five seeds are "
    "too few to tell."
)
LENGTH = (
    "A task without the effect: the numbers of a Countdown problem fix the length of "
    "an answer, and wrong ones keep about 14 characters in every arm (picture "
    "-length). Tried: the three normalisations on that task, and on one whose answers "
    "may be of any length (arms rambling-*), where it is open."
)
DRIFT = (
    "The dots after an answer drift in every arm, how far depends on the seed: from "
    "14.8 to 25.5 characters in the first 50 steps they come to 12.9 to 20.7 (picture "
    "-rambling), further apart over the seeds of an arm than over the arms. Tried: a "
    "task in which the model writes whether it is right before it chooses the length, "
    "at five times the default learning rate. That rate was chosen on one seed of a "
    "draft of the task, which is not among these and not published: at the default "
    "rate sequence and constant stayed within 0.4 characters of each other for 80 "
    "steps, at this one sequence was about 1 longer. Longer runs at the default rate "
    "were not made."
)
EXPLANATIONS = {  # text of a claim: what was tried when it fails
    "Dr. GRPO: means per sequence make wrong answers longer": LENGTH,
    "Dr. GRPO: means per sequence make them longer than one mean per batch": LENGTH,
    "Dr. GRPO: with free length, means per sequence make wrong ones longer": DRIFT,
    "Dr. GRPO: with free length, also longer than one mean per batch does": DRIFT,
    "Ours: with free length, one mean and a constant give equal lengths": DRIFT,
    "Ours: four updates on a batch end higher than one": UPDATES,
    "Ours: two updates cost less than 0.02 of pass@8": UPDATES,
    "Ours: four updates cost less than 0.02 of pass@8": UPDATES,
    "vOPD: its reverse KL is less than 0.02 above the full estimator's": NOISE,
    "vOPD: its pass@1 is less than 0.02 below the full estimator's": NOISE,
    "vOPD: a top-k baseline costs less than 0.02 of pass@1": FIVE.format(
        "-0.041 to +0.025"
    ),
    "DMPO: the quality ratio is above GRPO's": WEAK,
    "DMPO: more answers are feasible than with GRPO": WEAK,
    "DMPO: the best of 16 answers is better than GRPO's": WEAK,
    "DMPO: going from 1 to 16 samples gains more than with GRPO": WEAK,
    "DMPO: more distinct optimal answers among 16 than with GRPO": WEAK,
    "DMPO: entropy stays above GRPO's": WEAK,
    "DMPO: forward KL costs less than 0.02 (argued, not run there)": (
        "At one lambda the forward KL pulls far harder than the square (row "
        "dm_coefficient): it keeps more diversity and loses quality. At a lambda where "
        "it pulls 1.3 to 1.6 times as hard as the square (arm weak-forward-kl) it "
        "loses none. No claim was made of that arm."
    ),
    "DMPO: more distinct feasible answers among 16 than with GRPO": WEAK,
    "PrefixRL: solves more than SFT, then RL, at equal FLOPs": SKILL,
    "PrefixRL: with half the FLOPs, solves as many as SFT, then RL": SKILL,
    "Ours: prefixes of 10 problems carry over to more than SFT, then RL": FEW,
    "1M environments: with the recipe, more of them end higher": SHORT,
    "1M environments: 16,384 end higher than 16 with the recipe": SHORT,
    "1M environments: four times as long, 4,096 end higher than 1,024": LONGER,
    "1M environments: four times as long, 16,384 end higher than 64": LONGER,
    "1M environments: nor do they if the rate grows by the square root": STALLED.format(
        "-3.7 to +8.3"
    ),
    "1M environments: run as long, it is above the root rate as well": STALLED.format(
        "-5.9 to +29.7"
    ),
    "Ours: up to 1,024, nor if the rate grows by the square root as well": ROOT_RATE,
    "1M environments: at 1,024 it is above the root rate as well": ROOT_RATE,
    "1M environments: DDR orders the ends of all these runs": DDR,
    "1M environments: DDR orders the ends of the recipe's runs": DDR,
    "Ours: up to 1,024, DDR orders the ends of all these runs": DDR,
    "Ours: up to 1,024, DDR orders the ends of the recipe's runs": DDR,
    "1M environments: a smaller outer step (PPO-EWMA over 16) ends higher": ANCHOR,
    "1M environments: a smaller outer step (PPO-EWMA over 64) ends higher": ANCHOR,
    "1M environments: a smaller outer step (PPO-EWMA over 256) ends higher": ANCHOR,
    "1M environments: a smaller outer step from mid-run on revives learning": ANCHOR,
    "1M environments: it also does at 16 environments, where it is slow": ANCHOR,
}

# -------------------------------------- Runs ------------------------------------------


def programs(script: str, arm: str) -> list[Path]:
    """The program of an arm, and what else its results depend on."""
    words = ARMS[script].get(arm, "").split()
    other = [ROOT / OTHER_PROGRAM[arm]] if arm in OTHER_PROGRAM else []
    tasks = [ROOT / "benchmarks" / word for word in words if word.endswith(".py")]
    return [*other, ROOT / "algos" / f"{script}.py", *tasks]


def code_now(script: str, arm: str) -> str:
    """Hash of an arm's program as it stands on the disk."""
    return code_hash([path.read_text() for path in programs(script, arm)])


def quick_flags(script: str, flags: list[str]) -> list[str]:
    """Flags for a tenth of the steps of the script's Args, and all else small, too."""
    tree = ast.parse(programs(script, "")[0].read_text())
    fields = {getattr(node, "name", ""): node for node in tree.body}["Args"].body
    own = {x.target.id: x.value for x in fields if isinstance(x, ast.AnnAssign)}
    steps = max(1, own["steps"].value // 10)
    small = {"steps": steps, "eval_every": steps, "save_every": steps}
    small |= {"eval_prompts": 32, "eval_episodes": 10, "teacher_steps": 100}
    small |= {"prompts_per_step": 16, "candidates": 24, "trace_cap": 200}
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in small.items() if k in own]
    words = itertools.chain(*pairs)
    return [*flags, *words, *EASY.get(script, "").split()]


def read_lines(path: Path) -> list[dict]:
    """The complete lines of a JSONL file; none if there is no file."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def evaluations(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl with an evaluation; [] if the last step, or the one
    that spent --max-flops, has none yet. Added: the mean length of the wrong answers
    logged in samples.jsonl since the evaluation before (one group a step; metrics.jsonl
    has only the mean length of all answers)."""
    about, lines = folder / "args.json", read_lines(folder / "metrics.jsonl")
    evals = [x for x in lines if any(name.startswith("eval/") for name in x)]
    if not evals or not about.exists():
        return []
    args = json.loads(about.read_text())["args"]
    spent = 0 < args.get("max_flops", 0) <= evals[-1].get("flops", 0)
    if evals[-1]["step"] < args["steps"] and not spent:
        return []
    samples = [x for x in read_lines(folder / "samples.jsonl") if "completions" in x]
    for last, line in itertools.pairwise(evals):
        since = [x for x in samples if last["step"] < x["step"] <= line["step"]]
        pairs = [y for x in since for y in zip(x["completions"], x["rewards"])]
        if wrong := [len(text) for text, reward in pairs if reward < 1]:
            line["samples/wrong_length"] = sum(wrong) / len(wrong)
    return evals


def run(job: dict, work: Path, threads: int) -> dict:
    """The record of a run, taken up at its start, its last checkpoint or its end."""
    home = work / job["script"] / f"s{job['seed']}"
    home.mkdir(parents=True, exist_ok=True)
    known = json.dumps([job["flags"], job["code"], INSTALLED], sort_keys=True)
    name = f"{job['arm']}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    folder, measured = home / name, home / f"{name}.json"
    with (home / f"{name}.lock").open("w") as lock:
        try:  # the process holds it too, if it outlives us
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChildProcessError(f"another process is at {folder}") from None
        if not evaluations(folder):
            states = [folder / f"checkpoint{x}" / "state.pt" for x in ("", ".old")]
            flags = ["--resume", name]
            if not (resumed := any(state.exists() for state in states)):
                shutil.rmtree(folder, ignore_errors=True)
                flags = ["--run-dir", name, "--seed", str(job["seed"]), *job["flags"]]
            cached = sorted(home.glob("runs/cache/*"))
            command = [sys.executable, programs(job["script"], job["arm"])[0], *flags]
            link = home / f"{name}.tasks"  # for --task tasks/...
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / "benchmarks" / "tasks")
            link.replace(home / "tasks")
            if job["code"] != code_now(job["script"], job["arm"]):
                raise ChildProcessError("the program was edited meanwhile: start again")
            start = time.perf_counter()
            with (home / f"{name}.log").open("a") as log:
                out = dict(cwd=home, stdout=log, stderr=log, start_new_session=True)
                out["env"] = os.environ | {"OMP_NUM_THREADS": str(threads)}
                process = subprocess.Popen(command, pass_fds=[lock.fileno()], **out)
                RUNNING.append(process)
                code = process.wait()
                RUNNING.remove(process)
            if code or not evaluations(folder):
                raise ChildProcessError(f"exit code {code}; see {log.name}")
            took = {"wall_seconds": time.perf_counter() - start, "threads": threads}
            took["cache_warm"] = cached == sorted(home.glob("runs/cache/*"))
            measured.write_text(json.dumps({} if resumed else took))
    about = json.loads((folder / "args.json").read_text())
    for name in ("run_dir", "resume"):
        about["args"].pop(name, None)
    record = {name: job[name] for name in ("arm", "flags", "seed", "code")}
    record |= {"wall_seconds": None, "threads": None, "cache_warm": None}
    record |= json.loads(measured.read_text()) if measured.exists() else {}
    return record | about | {"evals": evaluations(folder)}


def valid(record: dict, jobs: list[dict], keep_old: bool) -> bool:
    """Is the record what running its arm now would give?"""
    compared = ("arm", "flags") if keep_old else ("arm", "flags", "code")
    same = any(all(record[x] == job[x] for x in compared) for job in jobs)
    known = [name for name in PACKAGES if name in record and name in INSTALLED]
    return same and (keep_old or all(record[x] == INSTALLED[x] for x in known))


def measure(script: str, args: argparse.Namespace) -> int:
    """Run what is missing, write results after each run; how many runs failed."""
    out, jobs = args.out, []
    arms = {k: v for k, v in ARMS[script].items() if programs(script, k)[0].exists()}
    for arm, text in arms.items():
        job = {"script": script, "arm": arm, "flags": text.split()}
        jobs.append(job | {"code": code_now(script, arm)})
    wanted = list(arms)
    if args.quick:
        out, wanted = args.work / "results", ["default", QUICK.get(script)]
        for job in jobs:
            job["flags"] = quick_flags(script, job["flags"])
    wanted = args.arms.split(",") if args.arms else wanted
    wanted = {FIRST_QUARTER.get(arm, arm) for arm in wanted}
    path = out / f"{script}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    runs = [record for record in found if valid(record, jobs, args.keep_old)]
    if len(runs) < len(found):
        n, kept = len(found) - len(runs), path.with_suffix(".old.json")
        shutil.copy(path, kept)
        why = f"of other code, flags or versions do not count, they stay in {kept.name}"
        print(f"{script}: {n} runs {why}")
    done = {(x["arm"], x["seed"]) for x in runs}
    todo = [
        job | {"seed": seed}
        for job in jobs
        for seed in range(1, args.seeds + 1)
        if job["arm"] in wanted and (job["arm"], seed) not in done
    ]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    failed, start = 0, time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(run, job, args.work, threads): job for job in todo}
        try:
            for i, future in enumerate(as_completed(waiting), 1):
                job = waiting[future]
                if error := future.exception():
                    failed += 1
                    print(f"{script} {job['arm']} s{job['seed']} failed: {error}")
                else:
                    runs.append(future.result())
                    write(runs, path)
                left = (time.perf_counter() - start) / i * (len(todo) - i) / 60
                state = f"{job['arm']} s{job['seed']}, about {left:.0f} min left"
                print(f"{script}: {i} of {len(todo)} runs, {state}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:  # they finish their step and save
                process.send_signal(signal.SIGINT)
            raise
    if runs:
        write(runs, path)
        write_pages(path)
        print(path.with_suffix(".md").read_text())
    return failed


def first_quarter(whole: dict, arm: str) -> dict:
    """The record of an arm whose runs are the first quarters of another's."""
    evals = whole["evals"][: (len(whole["evals"]) - 1) // 4 + 1]
    about = {"arm": arm, "first_quarter_of": whole["arm"], "wall_seconds": None}
    return whole | about | {"evals": evals}


def write(runs: list[dict], path: Path) -> None:
    """One run a line, in the order of the arms; those in FIRST_QUARTER are cut anew."""
    order, cut = list(ARMS[path.stem]), FIRST_QUARTER.items()
    runs = [run for run in runs if run["arm"] not in FIRST_QUARTER]
    runs += [
        first_quarter(x, arm) for arm, whole in cut for x in runs if x["arm"] == whole
    ]
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    text = ",\n".join(json.dumps(run) for run in runs)
    path.with_suffix(".new").write_text(f"[\n{text}\n]\n")
    path.with_suffix(".new").replace(path)


def write_pages(path: Path) -> None:
    """<script>.md and the pictures beside <script>.json."""
    script, runs = path.stem, json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(script, runs))
    report.draw(script, runs, path)


def page(script: str, runs: list[dict]) -> str:
    """The text of <script>.md."""
    tables = METRICS[script].split(), CLAIMS[script], PAPERS, EXPLANATIONS
    return report.page(script, runs, *tables)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", choices=[*ARMS, "all"])
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1..N of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--arms", default="", help="only these: default,sampled")
    parser.add_argument("--quick", action="store_true", help="2 seeds, a tenth of it")
    parser.add_argument("--keep-old", action="store_true", help="old code counts too")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    args = parser.parse_args(argv)
    scripts = list(ARMS) if args.script == "all" else [args.script]
    for name in [x for x in args.arms.split(",") if x]:
        if not any(name in ARMS[script] for script in scripts):
            parser.error(f"{args.script} has no arm {name!r}")
    args.work = args.work.resolve()
    if args.quick:
        args.seeds, args.work = 2, args.work / "quick"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = 0
    try:
        for script in scripts:
            if programs(script, "default")[0].exists():
                failed += measure(script, args)
            else:
                print(f"{script}: there is no algos/{script}.py yet")
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
