"""Steps a second of algos/ppo_envs.py from 2^4 to 2^20 environments, beside its peers.

    python benchmarks/env_speed.py [--largest 20] [--rounds 5]

Three counts for each number of CartPole-v1 environments: the environments alone, with
the policy that acts in them, and everything (updates, logs). Peers, with the same
network (two hidden layers of 64), 4 epochs, rollout length 32 and minibatches of 512:
with 64 environments of gymnasium in one process a loop in the manner of CleanRL's
ppo.py, Stable-Baselines3 and PufferLib's trainer; with as many environments as ours a
PPO in JAX, wholly inside one jit, in the manner of PureJaxRL. The first and the last
are written here. What else is equal and what is not, each peer's function below says,
and the JSON file with it. Ours is compiled, as JAX's is, the peers in torch are not:
beside them stands ours that is not, too. To compile takes ten seconds, which are not in
these figures. A peer that is not installed is left out with a line.
PufferLib 3.0.0 asks for numpy below 2 and gymnasium below 0.30, so it is not among the
requirements; beside newer ones its trainer runs, if it is built without its pins and
its C environments (its setup.py then wants a name that it does not set):

    pip install setuptools psutil rich rich-argparse pyro-ppl gym==0.23.0
    mkdir fix && export NO_OCEAN=1 PYTHONPATH=$PWD/fix
    echo 'import builtins as b; b.c_extension_paths = []' > fix/sitecustomize.py
    pip install --no-deps --no-build-isolation pufferlib==3.0.0

Ours and peers take turns, after an iteration that is not counted; the figure is the
median of the rounds. Beside the clock on the wall stands the time of the processor:
cpu_steps_per_second are steps for each second of it, which other programs on the
machine disturb less. To compare one thread with one thread, start it with
OMP_NUM_THREADS=1 taskset --cpu-list 0.
Writes benchmarks/results/env_speed.json and .png.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import contextlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from code_hash import code_hash
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {
    "env_steps_per_second": "environments alone",
    "act_steps_per_second": "environments and policy",
    "steps_per_second": "everything",
}
LENGTH, EPOCHS, MINIBATCH = 32, 4, 512
START = "spawn"  # of the processes that take turns
PACKAGES = "torch", "numpy", "gymnasium", "stable-baselines3", "jax", "optax"
PACKAGES += "pufferlib", "gym"


def sweep(num_envs: int, steps: int, length: int, compile: str) -> dict:
    """The three counts of the script itself, started as a user starts it: the median of
    its steps, but for the first, and the least and the most."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num-envs", num_envs, "--steps", steps + 1, "--compile", compile]
        flags += ["--rollout-length", length, "--eval-episodes", 2]
        flags += ["--run-dir", Path(folder, "run"), "--eval-every", 10**6]
        script = ROOT / "algos" / "ppo_envs.py"
        command = [sys.executable, str(script), *map(str, flags)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][2:]
    of = {x: [line[x] for line in records] for x in (*COUNTS, "peak_memory_gb")}
    row = {name: statistics.median(values) for name, values in of.items()}
    return row | {"range": {x: [min(of[x]), max(of[x])] for x in COUNTS}}


# Each of these gives (iteration, transitions in it): iteration() acts and learns once.


def ours(num_envs: int, length=LENGTH, device="cpu", compile="on") -> tuple:
    """algos/ppo_envs.py; its iteration gives the metrics."""
    path = ROOT / "algos" / "ppo_envs.py"
    spec = importlib.util.spec_from_file_location("ppo_envs", path)
    script = sys.modules["ppo_envs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.Args(num_envs=num_envs, rollout_length=length, epochs=EPOCHS)
    args.minibatch_size, args.device, args.compile = MINIBATCH, device, compile
    env = script.make_env(args, num_envs)
    agent, batch = script.Agent(env, args).to(device), {}
    live = {"obs": env.reset(), "episode": torch.zeros(2, num_envs, device=device)}
    names = "rewards", "values", "next_values", "terminated", "truncated"

    def iteration() -> dict:
        start = time.perf_counter()
        totals, clock = script.collect(agent, env, live, batch, args)
        known = (batch[name] for name in names)
        found = script.gae(*known, args.gamma, args.gae_lambda)
        batch["advantages"], batch["returns"] = found
        stats = script.learn(agent, batch, args)
        agent.see(batch["obs"].flatten(0, 1))
        return script.describe(stats, totals, clock, start, batch)

    return iteration, num_envs * length


def ours_eager(num_envs: int) -> tuple:
    """algos/ppo_envs.py with --compile off: as eager as its peers in torch."""
    return ours(num_envs, compile="off")


def network(outputs: int, gain: float) -> torch.nn.Sequential:
    """Two hidden layers of 64, as in the script."""
    layers = [torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)]
    layers += [torch.nn.Tanh(), torch.nn.Linear(64, outputs)]
    for layer in layers[::2]:
        torch.nn.init.orthogonal_(layer.weight, 2**0.5)
    torch.nn.init.orthogonal_(layers[-1].weight, gain)
    return torch.nn.Sequential(*layers)


def gymnasium_loop(num_envs: int) -> tuple[Callable, int]:
    """PPO in one process over gymnasium's vector API, numpy and torch by turns. As in
    gymnasium by default, a reset takes a step of its own, with reward 0, which counts
    and is trained on (3 % of the steps at first). A time limit is a terminal state, and
    observations are not normalised."""
    import gymnasium

    envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")
    actor, critic = network(2, 0.01), network(1, 1.0)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, 1e-3, eps=1e-5)
    live = {"obs": torch.as_tensor(envs.reset(seed=1)[0])}

    def iteration():
        batch = []
        for _ in range(LENGTH):
            obs = live["obs"]
            with torch.no_grad():
                policy = torch.distributions.Categorical(logits=actor(obs))
                action = policy.sample()
                value = critic(obs)[:, 0]
            after, reward, terminated, truncated, _ = envs.step(action.numpy())
            done = torch.as_tensor(terminated | truncated)
            reward = torch.as_tensor(reward, dtype=torch.float32)
            batch.append((obs, action, policy.log_prob(action), value, reward, done))
            live["obs"] = torch.as_tensor(after)
        x, a, old, v, r, d = (torch.stack(column) for column in zip(*batch))
        with torch.no_grad():
            later, following = 0.0, critic(live["obs"])[:, 0]
            advantages = torch.zeros_like(v)
            for s in reversed(range(LENGTH)):
                goes_on = 1.0 - d[s].float()
                delta = r[s] + 0.99 * following * goes_on - v[s]
                advantages[s] = later = delta + 0.99 * 0.95 * goes_on * later
                following = v[s]
        data = x, a, old, advantages, advantages + v
        x, a, old, adv, ret = (y.flatten(0, 1) for y in data)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(MINIBATCH):
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

    return iteration, num_envs * LENGTH


def stable_baselines3(num_envs: int) -> tuple[Callable, int]:
    """Stable-Baselines3's PPO as it comes: with a learning rate of 3e-4, and without
    normalised observations."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    kwargs = dict(n_steps=LENGTH, batch_size=MINIBATCH, n_epochs=EPOCHS, seed=1)
    envs = make_vec_env("CartPole-v1", num_envs)
    model, count = PPO("MlpPolicy", envs, device="cpu", **kwargs), num_envs * LENGTH
    return lambda: model.learn(count, reset_num_timesteps=False), count


class PufferPolicy(torch.nn.Module):
    """The networks of the other peers, as PufferLib's trainer calls them."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = network(2, 0.01), network(1, 1.0)

    def forward(self, obs: torch.Tensor, state=None) -> tuple:
        return self.actor(obs), self.critic(obs)

    forward_eval = forward


def pufferlib_ppo(num_envs: int) -> tuple[Callable, int]:
    """PufferLib's PuffeRL over gymnasium's CartPole-v1 in its Serial vectorisation, one
    process. Equal: the networks, Adam, numbers of environments, steps, epochs and
    minibatches. Not equal: a reset takes one of the steps; a minibatch is 16 rows of 32
    steps, drawn anew each time, and the advantages of the whole batch are computed
    before each; the value loss is clipped. Its dashboard and the thread that reads the
    machine's load are off. Not its C environments."""
    import gymnasium
    import pufferlib.emulation
    import pufferlib.vector
    from pufferlib import pufferl

    def make(buf=None, seed=0):
        env = gymnasium.make("CartPole-v1")
        return pufferlib.emulation.GymnasiumPufferEnv(env, buf=buf, seed=seed)

    defaults = configparser.ConfigParser()
    defaults.read(Path(pufferlib.__file__).parent / "config" / "default.ini")
    config = dict(defaults["train"])
    for name, value in config.items():
        with contextlib.suppress(ValueError, SyntaxError):  # a word
            config[name] = ast.literal_eval(value)
    config |= dict(env="CartPole-v1", device="cpu", use_rnn=False, optimizer="adam")
    config |= dict(bptt_horizon=LENGTH, update_epochs=EPOCHS, prio_alpha=0.0)
    config |= dict(minibatch_size=MINIBATCH, learning_rate=1e-3, anneal_lr=False)
    config |= dict(gamma=0.99, gae_lambda=0.95, vf_coef=0.5, max_grad_norm=0.5)
    config |= dict(ent_coef=0.0, adam_beta1=0.9, adam_eps=1e-5)
    config |= dict(checkpoint_interval=10**9, total_timesteps=10**12)
    serial = pufferlib.vector.Serial
    envs = pufferlib.vector.make(make, backend=serial, num_envs=num_envs)
    trainer = pufferl.PuffeRL(config, envs, PufferPolicy())
    trainer.utilization.stop()
    trainer.print_dashboard = lambda *_, **__: None

    def iteration():
        trainer.evaluate()
        trainer.train()
        return trainer

    return iteration, num_envs * LENGTH


def jax_ppo(num_envs: int) -> tuple[Callable, int]:
    """PPO whose environments, rollout and updates are one jitted function. A time limit
    is a terminal state, and observations are not normalised."""
    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3, eps=1e-5))

    def fresh(key):
        return jax.random.uniform(key, (num_envs, 4), minval=-0.05, maxval=0.05)

    def env_step(key, state, time, action):
        _, x_dot, a, a_dot = state.T
        pull = 20.0 * action - 10 + 0.05 * a_dot**2 * jnp.sin(a)
        pull = pull / 1.1
        a_acc = 9.8 * jnp.sin(a) - jnp.cos(a) * pull
        a_acc = a_acc / (0.5 * (4 / 3 - 0.1 * jnp.cos(a) ** 2 / 1.1))
        x_acc = pull - 0.05 * a_acc * jnp.cos(a) / 1.1
        state = state + 0.02 * jnp.stack([x_dot, x_acc, a_dot, a_acc], -1)
        fallen = (jnp.abs(state[:, 0]) > 2.4) | (jnp.abs(state[:, 2]) > 0.20943951)
        done = fallen | (time + 1 >= 500)
        state = jnp.where(done[:, None], fresh(key), state)
        return state, (time + 1) * ~done, jnp.ones(num_envs), done

    def mlp(layers, x):
        for weight, bias in layers[:-1]:
            x = jnp.tanh(x @ weight + bias)
        return x @ layers[-1][0] + layers[-1][1]

    def layers(key, outputs, gain):
        orthogonal, keys = jax.nn.initializers.orthogonal, jax.random.split(key, 3)
        sizes = (4, 64, 2**0.5), (64, 64, 2**0.5), (64, outputs, gain)
        return [
            (orthogonal(gain)(key, (n, m)), jnp.zeros(m))
            for key, (n, m, gain) in zip(keys, sizes)
        ]

    def act(carry, _):
        key, nets, state, time = carry
        key, draw, reset = jax.random.split(key, 3)
        logits = jax.nn.log_softmax(mlp(nets[0], state))
        action = jax.random.categorical(draw, logits)
        logprob = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        value = mlp(nets[1], state)[:, 0]
        after, time, reward, done = env_step(reset, state, time, action)
        row = state, action, logprob, value, reward, done
        return (key, nets, after, time), row

    def gae(carry, row):
        later, following = carry
        value, reward, done = row
        delta = reward + 0.99 * following * ~done - value
        later = delta + 0.99 * 0.95 * ~done * later
        return (later, value), later

    def loss(nets, obs, action, old, advantage, target):
        logits = jax.nn.log_softmax(mlp(nets[0], obs))
        logprob = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        ratio = jnp.exp(logprob - old)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = jnp.clip(ratio, 0.8, 1.2) * advantage
        errors = (mlp(nets[1], obs)[:, 0] - target) ** 2
        return -jnp.minimum(ratio * advantage, clipped).mean() + 0.25 * errors.mean()

    def minibatch(carry, part):
        nets, adam_state = carry
        gradient = jax.grad(loss)(nets, *part)
        change, adam_state = adam.update(gradient, adam_state)
        return (optax.apply_updates(nets, change), adam_state), None

    def iterate(key, nets, adam_state, state, time):
        start = key, nets, state, time
        (key, _, state, time), rows = jax.lax.scan(act, start, None, LENGTH)
        obs, action, old, value, reward, done = rows
        last = jnp.zeros(num_envs), mlp(nets[1], state)[:, 0]
        _, advantage = jax.lax.scan(gae, last, (value, reward, done), reverse=True)
        data = obs, action, old, advantage, advantage + value
        data = [x.reshape(num_envs * LENGTH, *x.shape[2:]) for x in data]

        def epoch(carry, key):
            order = jax.random.permutation(key, num_envs * LENGTH)
            parts = [x[order].reshape(-1, MINIBATCH, *x.shape[1:]) for x in data]
            return jax.lax.scan(minibatch, carry, parts)

        key, *keys = jax.random.split(key, EPOCHS + 1)
        carry = nets, adam_state
        (nets, adam_state), _ = jax.lax.scan(epoch, carry, jnp.stack(keys))
        return key, nets, adam_state, state, time

    keys = jax.random.split(jax.random.PRNGKey(1), 4)
    nets, step = [layers(keys[0], 2, 0.01), layers(keys[1], 1, 1.0)], jax.jit(iterate)
    time = jnp.zeros(num_envs, jnp.int32)
    live = [keys[2], nets, adam.init(nets), fresh(keys[3]), time]

    def iteration():
        live[:] = jax.block_until_ready(step(*live))

    return iteration, num_envs * LENGTH


def serve(make: Callable, num_envs: int, pipe) -> None:
    """A program in a process and a folder of its own, since some change both for all
    that comes after them. Sends the transitions in an iteration, or why there is none;
    then, for each number of iterations asked for, seconds (wall, processor) of one."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                iteration, count = make(num_envs)
                iteration()  # compiles
        except ImportError as e:
            return pipe.send(str(e))
        pipe.send(count)
        while repeats := pipe.recv():
            wall, processor = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                for _ in range(repeats):
                    iteration()
            spent = time.perf_counter() - wall, time.process_time() - processor
            pipe.send([x / repeats for x in spent])
        os.chdir("/")


def in_turns(num_envs: int, rounds: int) -> dict:
    """Steps a second of everything, ours and the peers by turns: medians of rounds."""
    context, programs, seconds = multiprocessing.get_context(START), {}, {}
    cases = {"ours": (ours, num_envs), "JAX": (jax_ppo, num_envs)}
    cases |= {"ours, 64": (ours, 64), "ours, 64, not compiled": (ours_eager, 64)}
    cases |= {"gymnasium loop": (gymnasium_loop, 64)}
    cases |= {"Stable-Baselines3": (stable_baselines3, 64)}
    cases |= {"PufferLib": (pufferlib_ppo, 64)}
    for name, (make, envs) in cases.items():
        pipe, other = context.Pipe()
        context.Process(target=serve, args=(make, envs, other), daemon=True).start()
        other.close()  # so that the end of the process ends the wait for it
        count = pipe.recv()
        if isinstance(count, str):
            print(f"{name} is left out: {count}", flush=True)
        else:
            programs[name] = pipe, count, envs
    for _ in range(rounds):
        for name, (pipe, count, _) in programs.items():
            pipe.send(max(1, 2**16 // count))
            seconds.setdefault(name, []).append(pipe.recv())
    result = {}
    for name, (pipe, count, envs) in programs.items():
        pipe.send(0)
        wall, processor = (count / statistics.median(x) for x in zip(*seconds[name]))
        speeds = {"steps_per_second": wall, "cpu_steps_per_second": processor}
        what = " ".join(inspect.getdoc(cases[name][0]).split())
        result[name] = {"num_envs": envs, "what": what} | speeds
        result[name]["seconds"] = seconds[name]
        print(name, {k: round(v) for k, v in speeds.items()}, flush=True)
    return result


def draw(result: dict, path: Path) -> None:
    """Steps a second over the number of environments, with the range over rounds; peers
    are single points."""
    axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    envs, rows = [int(n) for n in result["ours"]], [*result["ours"].values()]
    for (name, label), style in zip(COUNTS.items(), ("k^:", "ks--", "ko-")):
        axes.loglog(envs, [row[name] for row in rows], style, markersize=4)
        ends = zip(*(row["range"][name] for row in rows))
        axes.fill_between(envs, *ends, color="0.6", alpha=0.4, linewidth=0)
        look = dict(textcoords="offset points", ha="right")
        axes.annotate(label, (envs[-1], rows[-1][name]), (0, 8), **look)
    peers = {k: x for k, x in result["in turns"].items() if not k.startswith("ours")}
    for row, marker in zip(peers.values(), "Dx+*v"):
        middle, walls = row["steps_per_second"], [wall for wall, _ in row["seconds"]]
        speeds = [middle * statistics.median(walls) / wall for wall in walls]
        ends = [[middle - min(speeds)], [max(speeds) - middle]]
        look = dict(markersize=8, fillstyle="none", elinewidth=1, capsize=3)
        axes.errorbar(row["num_envs"], middle, ends, fmt="k" + marker, **look)
    for n in {
        row["num_envs"] for row in peers.values()
    }:  # named together: they overlap
        beside = {k: x for k, x in peers.items() if x["num_envs"] == n}
        lowest = min(row["steps_per_second"] for row in beside.values())
        look = dict(textcoords="offset points", va="top", fontsize=8)
        names = "everything, by\n" + ",\n".join(beside)
        axes.annotate(names, (n, lowest), (8, -6), **look)
    axes.set(xlabel="environments", ylabel="steps of an environment, per second")
    axes.set_title("CartPole-v1, PPO: median and range of the rounds", fontsize=10)
    axes.set_ylim(bottom=3000, top=3 * rows[-1]["env_steps_per_second"])
    axes.figure.savefig(path, dpi=120)


def version(package: str) -> str:
    """That of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smallest", type=int, default=4, help="log2 of environments")
    parser.add_argument("--largest", type=int, default=20, help="log2 of environments")
    parser.add_argument("--every", type=int, default=4, help="step of the log2")
    parser.add_argument("--rounds", type=int, default=5, help="those measured")
    parser.add_argument(
        "--beside", type=int, default=1024, help="environments with JAX"
    )
    parser.add_argument("--compile", default="on", choices=["auto", "on", "off"])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"))
    flags, start = parser.parse_args(), time.perf_counter()
    if flags.rounds < 1 or not 0 <= flags.smallest <= flags.largest:
        parser.error("--rounds must be above 0, --smallest at most --largest")
    Path(flags.out).mkdir(parents=True, exist_ok=True)  # before the work, not after it
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    usable = len(os.sched_getaffinity(0))
    result = {"hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpu}"}
    result |= {"threads": torch.get_num_threads(), "cores used": usable}
    result |= {"load before": os.getloadavg()[0], "python": platform.python_version()}
    result |= {package: version(package) for package in PACKAGES}
    source = (ROOT / "algos" / "ppo_envs.py").read_text()
    result |= {"code": code_hash([source])}
    result |= {"rollout_length": LENGTH, "epochs": EPOCHS, "minibatch": MINIBATCH}
    result |= {"flags": vars(flags) | {"out": ""}, "ours": {}}
    result["in turns"] = in_turns(flags.beside, flags.rounds)
    for power in range(flags.smallest, flags.largest + 1, flags.every):
        # batches of a size, so that the whole takes minutes
        length = max(1, min(512, 2**15 // 2**power))
        row = sweep(2**power, flags.rounds, length, flags.compile)
        result["ours"][2**power] = row | {"rollout_length": length}
        print(2**power, {k: round(row[k], 2) for k in COUNTS}, flush=True)
    result |= {"load after": os.getloadavg()[0]}
    result |= {"wall_seconds": time.perf_counter() - start}
    Path(flags.out, "env_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, Path(flags.out, "env_speed.png"))


if __name__ == "__main__":
    main()
