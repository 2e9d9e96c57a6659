"""Steps a second of algos/ppo_envs.py from 2^4 to 2^20 environments, beside its peers.

    python benchmarks/env_speed.py [--largest 20] [--repeats 3]

Three counts for each number of CartPole-v1 environments: the environments alone, with
the policy that acts in them, and everything (updates, logs). Peers, with 64
environments of gymnasium in one process, the usual way: a loop in the manner of
CleanRL's ppo.py (written here), and Stable-Baselines3 if it is installed. Network,
epochs and minibatch size are the same for all. Each count is the median of the steps
after the first.
Writes benchmarks/results/env_speed.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {
    "env_steps_per_second": "environments",
    "act_steps_per_second": "and policy",
    "steps_per_second": "everything",
}


def ours(num_envs: int, repeats: int, length: int, compile: str) -> dict:
    """The three counts of the script itself, started as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num-envs", num_envs, "--steps", repeats + 1, "--compile", compile]
        flags += ["--rollout-length", length, "--eval-episodes", 2]
        flags += ["--run-dir", Path(folder, "run"), "--eval-every", 10**6]
        command = [
            sys.executable,
            str(ROOT / "algos" / "ppo_envs.py"),
            *map(str, flags),
        ]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][2:]
    names = *COUNTS, "peak_memory_gb"
    return {name: statistics.median(r[name] for r in records) for name in names}


def network(outputs: int, gain: float) -> torch.nn.Sequential:
    """Two hidden layers of 64, as in the script."""
    layers = [torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)]
    layers += [torch.nn.Tanh(), torch.nn.Linear(64, outputs)]
    for layer in layers[::2]:
        torch.nn.init.orthogonal_(layer.weight, 2**0.5)
    torch.nn.init.orthogonal_(layers[-1].weight, gain)
    return torch.nn.Sequential(*layers)


def gymnasium_loop(repeats: int, num_envs: int = 64, length: int = 128) -> dict:
    """PPO in one process over gymnasium's vector API, Categorical and numpy in
    between."""
    import gymnasium

    envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")
    actor, critic = network(2, 0.01), network(1, 1.0)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, 1e-3, eps=1e-5)
    obs, total, records = torch.as_tensor(envs.reset(seed=1)[0]), num_envs * length, []
    for _ in range(repeats + 1):
        start, env_time, batch = time.perf_counter(), 0.0, []
        for _ in range(length):
            with torch.no_grad():
                policy = torch.distributions.Categorical(logits=actor(obs))
                action = policy.sample()
                value = critic(obs)[:, 0]
            mark = time.perf_counter()
            after, reward, terminated, truncated, _ = envs.step(action.numpy())
            env_time += time.perf_counter() - mark
            done = torch.as_tensor(terminated | truncated)
            reward = torch.as_tensor(reward, dtype=torch.float32)
            batch.append((obs, action, policy.log_prob(action), value, reward, done))
            obs = torch.as_tensor(after)
        rollout = time.perf_counter() - start
        x, a, old, v, r, d = (torch.stack(column) for column in zip(*batch))
        with torch.no_grad():
            later, following, advantages = 0.0, critic(obs)[:, 0], torch.zeros_like(v)
            for s in reversed(range(length)):
                goes_on = 1.0 - d[s].float()
                delta = r[s] + 0.99 * following * goes_on - v[s]
                advantages[s] = later = delta + 0.99 * 0.95 * goes_on * later
                following = v[s]
        x, a, old, adv, ret = (
            y.flatten(0, 1) for y in (x, a, old, advantages, advantages + v)
        )
        for _ in range(4):
            for rows in torch.randperm(total).split(512):
                policy = torch.distributions.Categorical(logits=actor(x[rows]))
                ratio = (policy.log_prob(a[rows]) - old[rows]).exp()
                scaled = (adv[rows] - adv[rows].mean()) / (adv[rows].std() + 1e-8)
                surrogate = torch.min(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled)
                errors = (critic(x[rows])[:, 0] - ret[rows]) ** 2
                loss = -surrogate.mean() + 0.25 * errors.mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 0.5)
                optimizer.step()
        whole = time.perf_counter() - start
        records.append((total / env_time, total / rollout, total / whole))
    return dict(zip(COUNTS, map(statistics.median, zip(*records[1:]))))


def stable_baselines3(repeats: int, num_envs: int = 64, length: int = 128) -> dict:
    """Steps a second of everything, as Stable-Baselines3's PPO comes."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    kwargs = dict(n_steps=length, batch_size=512, n_epochs=4, device="cpu", seed=1)
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", num_envs), **kwargs)
    model.learn(num_envs * length)
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.learn(num_envs * length, reset_num_timesteps=False)
        speeds.append(num_envs * length / (time.perf_counter() - start))
    return {"steps_per_second": statistics.median(speeds)}


def draw(result: dict, path: Path) -> None:
    """Steps a second over the number of environments; peers are single points."""
    axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    envs = [int(n) for n in result["ours"]]
    for name, label in COUNTS.items():
        axes.loglog(
            envs, [row[name] for row in result["ours"].values()], "o-", label=label
        )
    for name, row in result["peers"].items():
        axes.loglog([64], [row["steps_per_second"]], "x", label=f"{name}, everything")
    axes.set(xlabel="environments", ylabel="steps/s", title="CartPole-v1, PPO")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smallest", type=int, default=4, help="log2 of environments")
    parser.add_argument("--largest", type=int, default=20, help="log2 of environments")
    parser.add_argument("--every", type=int, default=2, help="step of the log2")
    parser.add_argument(
        "--repeats", type=int, default=3, help="steps that are measured"
    )
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    flags = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    result = {"hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}"}
    result |= {"torch": torch.__version__, "python": platform.python_version()}
    result |= {"flags": vars(flags) | {"out": ""}, "ours": {}, "peers": {}}
    for name, peer in (("gymnasium loop", gymnasium_loop), ("SB3", stable_baselines3)):
        try:
            result["peers"][name] = peer(flags.repeats)
            print(name, result["peers"][name], flush=True)
        except ImportError as e:
            print(f"{name} is left out: {e}", flush=True)
    for power in range(flags.smallest, flags.largest + 1, flags.every):
        length = max(8, min(128, 2**17 // 2**power))
        row = ours(2**power, flags.repeats, length, flags.compile)
        result["ours"][2**power] = row | {"rollout_length": length}
        print(2**power, {k: round(v, 2) for k, v in row.items()}, flush=True)
    Path(flags.out, "env_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, Path(flags.out, "env_speed.png"))


if __name__ == "__main__":
    main()
