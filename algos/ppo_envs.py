"""PPO from one environment to a million on one device, in one file.

Papers: PPO (arXiv 1707.06347), GAE (1506.02438), PPO-EWMA (Hilton et al., 2110.00641),
Preventing Learning Stagnation in PPO by Scaling to 1 Million Parallel Environments
(2603.06009), whose recipe is the default here.

Act with a frozen behaviour policy pi_b in N environments for S steps, then take Adam
steps on minibatches of that data: together one step of an outer optimiser. If it is too
large for its noise, learning stagnates. So, when N grows, change nothing inside: the
same minibatch size, the same learning rate, only more minibatches.

    delta_s = r_s + gamma V(s_{s+1}) (1 - terminated_s) - V(s_s)
    A_s     = delta_s + gamma lambda (1 - ended_s) A_{s+1}   ended: by either end
    J       = E[min(pi/pi_b A, clip(pi/pi_prox, 1 - e, 1 + e) pi_prox/pi_b A)]
              - c_v E[(V - V_b - A)^2] / 2 + c_e E[entropy(pi)]
    pi_prox = pi_b: PPO, --ewma-com 0; or PPO-EWMA: the policy of averaged weights,
              those k gradient steps old weigh beta^k; --ewma-com is their mean age,
              the centre of mass beta / (1 - beta): larger is a smaller outer step
    DDR     = N S / KL(pi_b || pi_updated): transitions per unit of divergence

The paper's: the outer step, the recipe, its wrong arms (--scaling), DDR, PPO-EWMA as
the knob of that step. Ours: the direction of DDR's KL, its mean over up to 2^18 states
of the batch; networks and constants; the gradient noise scale tr(Sigma) / |G|^2 of the
actor, in transitions, from minibatches g, g' in a row: B |g - g'|^2 / (2 g.g').

Differences. Advantages are normalised over the batch, not the minibatch; the value loss
is not clipped; the learning rate is constant, so that a longer run continues a shorter
one. Batches above 2^21 transitions are shuffled in blocks of neighbouring environments.
Breakout has MinAtar's sticky actions, only the actions with an effect and at most 1,000
steps. The state of gym:<id> is not saved: --resume begins new episodes there.

    python algos/ppo_envs.py
    python algos/ppo_envs.py --num-envs 1048576 --rollout-length 8 --steps 3

The first solves CartPole-v1: mean return 500 over 100 evaluation episodes with each of
seeds 1 to 10, after 655,360 transitions and 18 to 21 seconds on 2 CPU cores.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributions as td
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # of torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
OWN = "open_run", "save_checkpoint", "draw_curve", "parse_args", "evaluate", "describe"
PIECE = {"cpu": 2**13, "mps": 2**16, "cuda": 2**20}  # rows at once: fit the cache
td.Distribution.set_default_validate_args(False)


@dataclasses.dataclass
class Args:
    seed: int = 1  # of the networks, the sampling and the environments
    steps: int = 80  # batches in the whole run, those before a --resume included
    run_dir: str = ""  # folder of the run (default: runs/ppo_envs/<time>-s<seed>)
    resume: str = ""  # folder of a run to continue, under its own flags
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to act and to learn
    compile: Literal["auto", "on", "off"] = (
        "auto"  # torch.compile, CUDA graphs on a GPU
    )
    env: str = (
        "cartpole"  # cartpole, acrobot, pendulum, breakout, gym:<id>, gymnax:<id>
    )
    num_envs: int = 256  # environments side by side (N)
    rollout_length: int | None = None  # S; default: 32, more with few environments
    minibatch_size: int = 512  # transitions in a gradient step, whatever --num-envs is
    learning_rate: float = 1e-3  # of Adam, whatever --num-envs is
    scaling: Literal["minibatches", "minibatch-size", "minibatch-size-sqrt-lr"] = (
        "minibatches"  # what grows with --num-envs; the last two are the wrong arms
    )
    base_envs: int = 256  # --num-envs at which the wrong arms equal the recipe
    epochs: int = 4  # passes over each batch
    ewma_com: float = 0.0  # centre of mass of pi_prox in gradient steps; 0: plain PPO
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda
    clip: float = 0.2  # e
    value_coef: float = 0.5  # c_v
    entropy_coef: float = 0.0  # c_e
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    hidden_size: int = 64  # units in a layer of the actor and of the critic
    hidden_layers: int = 2  # layers of each
    eval_every: int = 10  # steps between evaluations
    eval_episodes: int = 100  # episodes in an evaluation, most likely actions
    save_every: int = 20  # steps between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "onefile-rl"  # project there


def fail(message: str) -> NoReturn:
    """Stop with one line about what the user can put right, exit code 2."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn an exception inside into one line: `what` went wrong, and why."""
    try:
        yield
    except Exception as e:
        fail(f"{what}: {type(e).__name__}: {e}")


# --------------------------------- Environments ---------------------------------------


def cartpole(state, actions, noise) -> tuple:
    """gymnasium's CartPole-v1. state: position, its speed, angle, its speed."""
    x, x_dot, a, a_dot = state
    pull = (20.0 * actions - 10 + 0.05 * a_dot**2 * a.sin()) / 1.1
    a_acc = 9.8 * a.sin() - a.cos() * pull
    a_acc = a_acc / (0.5 * (4 / 3 - 0.1 * a.cos() ** 2 / 1.1))
    x_acc = pull - 0.05 * a_acc * a.cos() / 1.1
    rates = torch.stack([x_dot, x_acc, a_dot, a_acc])
    x, x_dot, a, a_dot = state = state + 0.02 * rates
    fallen = (x.abs() > 2.4) | (a.abs() > 12 * 2 * math.pi / 360)
    return state, torch.ones_like(fallen, dtype=torch.int8), fallen


def acrobot(state, actions, noise) -> tuple:
    """gymnasium's Acrobot-v1. state: two angles, their speeds."""

    def rates(state):
        a, b, a_dot, b_dot = state
        d1, d2 = 3.5 + b.cos(), 1.25 + 0.5 * b.cos()
        phi2 = 4.9 * (a + b).sin()
        phi1 = phi2 + 14.7 * a.sin() - (0.5 * b_dot**2 + b_dot * a_dot) * b.sin()
        b_acc = actions - 1.0 + d2 / d1 * phi1 - 0.5 * a_dot**2 * b.sin() - phi2
        b_acc = b_acc / (1.25 - d2**2 / d1)
        return torch.stack([a_dot, b_dot, -(d2 * b_acc + phi1) / d1, b_acc])

    k1 = rates(state)  # Runge-Kutta over 0.2 s
    k2 = rates(state + 0.1 * k1)
    k3 = rates(state + 0.1 * k2)
    state = state + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + rates(state + 0.2 * k3))
    angles = state[:2] - 2 * math.pi * ((state[:2] / math.pi - 1) / 2).ceil()
    limits = math.pi * torch.tensor([[4.0], [9.0]], device=state.device).to(state)
    state = torch.cat([angles, state[2:].clamp(-limits, limits)])
    up = -angles[0].cos() - angles.sum(0).cos() > 1
    return state, up.to(torch.int8) - 1, up


def pendulum(state, actions, noise) -> tuple:
    """gymnasium's Pendulum-v1. state: angle, its speed."""
    (a, a_dot), torque = state, actions[:, 0].clamp(-2, 2)
    angle = (a + math.pi) % (2 * math.pi) - math.pi
    cost = angle**2 + 0.1 * a_dot**2 + 0.001 * torque**2
    a_dot = (a_dot + (15 * a.sin() + 3 * torque) * 0.05).clamp(-8, 8)
    state = torch.stack([a + 0.05 * a_dot, a_dot])
    return state, -cost.float(), torch.zeros_like(a, dtype=torch.bool)


def breakout(state, actions, noise) -> tuple:
    """MinAtar's Breakout. state: ball x and y, direction (clockwise, 0 is left and up),
    paddle, in a brick, ball x and y before, action, 3 rows of 10 bricks."""
    x, y, direction, paddle, inside, _, _, last_action = state[:8]
    actions = torch.where(noise[1] < 0.1, last_action, actions)  # sticky
    paddle = (paddle + 1 * (actions == 2) - 1 * (actions == 1)).clamp(0, 9)
    new_x = x + 2 * ((direction == 1) | (direction == 2)) - 1
    new_y = y + 2 * (direction >= 2) - 1
    side, top = (new_x < 0) | (new_x > 9), new_y < 0
    new_x, new_y, bricks = new_x.clamp(0, 9), new_y.clamp(min=0), state[8:] == 1
    place = torch.arange(30, device=state.device)[:, None] == 10 * new_y + new_x - 10
    touch, floor = (bricks & place).any(0), new_y == 9
    hit = touch & (inside == 0)
    bricks = (bricks & ~(place & hit)) | (floor & ~bricks.any(0))  # all gone: new ones
    straight = floor & (x == paddle)
    corner = floor & ~straight & (new_x == paddle)
    direction = direction ^ (1 * side) ^ (3 * (top | hit | straight)) ^ (2 * corner)
    new_y = torch.where(hit | straight | corner, y, new_y)
    rows = new_x, new_y, direction, paddle, touch, x, y, actions, *bricks
    state = torch.stack([row.to(torch.int8) for row in rows])
    return state, hit.to(torch.int8), floor & ~straight & ~corner


def breakout_reset(noise: torch.Tensor) -> torch.Tensor:
    left, one = 1 * (noise[0] < 0.5), torch.ones_like(noise[0])
    rows = 9 - 9 * left, 3 * one, 3 - left, 4 * one, 0 * one, 9 - 9 * left, 3 * one
    return torch.stack([row.to(torch.int8) for row in (*rows, 0 * one, *[one] * 30)])


def breakout_observe(state: torch.Tensor) -> torch.Tensor:
    """(N, 400) bool: 10 rows, 10 columns, the channels paddle, ball, trail, brick."""
    x, y, _, paddle, _, last_x, last_y, _ = state[:8, :, None]
    places = torch.arange(100, device=state.device)
    bricks = torch.nn.functional.pad(state[8:], (0, 0, 10, 60)).T == 1
    ball, trail = places == 10 * y + x, places == 10 * last_y + last_x
    return torch.stack([places == 90 + paddle, ball, trail, bricks], -1).flatten(1)


def angles_observe(state: torch.Tensor) -> torch.Tensor:
    """cos and sin of each angle, then the speeds."""
    angles, speeds = state.chunk(2)
    turns = torch.stack([angles.cos(), angles.sin()], 1).flatten(0, 1)
    return torch.cat([turns, speeds]).T.float().contiguous()


class Rules(NamedTuple):
    """A built-in environment: functions of states (D, N) and noise (K, N) in [0, 1)."""

    step: Callable  # state, actions, noise -> state, rewards (N,), terminated (N,)
    reset: Callable  # noise -> state
    observe: Callable  # state -> obs (N, O) in the smallest exact dtype
    sizes: tuple[int, int, int]  # K, O, outputs of the actor
    discrete: bool  # actions (N,), else (N, A) with means and log deviations as outputs
    time_limit: int  # steps after which an episode is truncated


PI, starts = math.pi, lambda width: lambda noise: width * (2 * noise - 1)
turned = lambda noise: torch.stack([starts(PI)(noise[0]), starts(1)(noise[1])])
flat, see = lambda state: state.T.float().contiguous(), breakout_observe
BUILT_IN = {
    "cartpole": Rules(cartpole, starts(0.05), flat, (4, 4, 2), True, 500),
    "acrobot": Rules(acrobot, starts(0.1), angles_observe, (4, 6, 3), True, 500),
    "pendulum": Rules(pendulum, turned, angles_observe, (2, 3, 2), False, 200),
    "breakout": Rules(breakout, breakout_reset, see, (2, 400, 3), True, 1000),
}


class TensorEnv:
    """N copies of a built-in environment, which start again in the step they end in."""

    def __init__(self, name: str, num_envs: int, args: Args):
        with blame(f"--env {name} is none of {', '.join(BUILT_IN)}, gym:, gymnax:<id>"):
            self.rules = BUILT_IN[name]
        self.noise_size, self.obs_size, self.outputs = self.rules.sizes
        self.discrete, self.time_limit = self.rules.discrete, self.rules.time_limit
        self.num_envs, self.device = num_envs, args.device
        self.advance = compiled(self.advance, args)

    def noise(self) -> torch.Tensor:
        exact = torch.float32 if self.device == "mps" else torch.float64
        return torch.rand(self.noise_size, self.num_envs, device=self.device).to(exact)

    def reset(self) -> torch.Tensor:
        """The first obs (N, O) of new episodes."""
        time = torch.zeros(self.num_envs, dtype=torch.int16, device=self.device)
        self.state = [self.rules.reset(self.noise()), time]
        return self.rules.observe(self.state[0])

    def step(self, actions: torch.Tensor) -> tuple:
        """obs (N, O), rewards, terminated, truncated (N,), final_obs (N, O): the last
        of an episode where one ended (obs: the next one's first), else equal to obs."""
        *self.state, obs, rewards, terminated, truncated, final_obs = self.advance(
            *self.state, actions, self.noise()
        )
        return obs, rewards, terminated, truncated, final_obs

    def advance(self, state, time, actions, noise) -> tuple:
        state, rewards, terminated = self.rules.step(state, actions, noise)
        time, final_obs = time + 1, self.rules.observe(state)
        truncated = time >= self.time_limit
        ended = terminated | truncated
        state = torch.where(ended, self.rules.reset(noise), state)
        result = self.rules.observe(state), rewards, terminated, truncated, final_obs
        return state, time * ~ended, *result


def open_gym(name: str, num_envs: int) -> tuple:
    """gymnasium's vector API with same-step autoreset: where an episode ends, obs is
    the first of the next one and info holds its last."""
    import gymnasium

    kwargs = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    kwargs = dict(vectorization_mode="sync", vector_kwargs=kwargs)
    env = gymnasium.make_vec(name, num_envs, **kwargs)

    def step(seed, state, actions):
        obs, rewards, *ends, info = env.step(actions.cpu().numpy())
        final_obs = obs.copy()
        for i in np.flatnonzero(ends[0] | ends[1]):
            final_obs[i] = info["final_obs"][i]
        arrays = obs, rewards.astype(np.float32), *ends, final_obs
        return [], *map(torch.from_numpy, arrays)

    reset = lambda seed: (torch.from_numpy(env.reset(seed=seed)[0]), [])
    return env.single_observation_space, env.single_action_space, reset, step


def open_gymnax(name: str, num_envs: int) -> tuple:
    """gymnax, or anything with its interface. Arrays go from JAX to PyTorch and back by
    DLPack, not through the host; the state is kept as a list of tensors."""
    import gymnax
    import jax

    env, params = gymnax.make(name)
    keys = lambda seed: jax.random.split(jax.random.PRNGKey(seed), num_envs)
    tensors = lambda tree: [torch.from_dlpack(x) for x in jax.tree.leaves(tree)]
    all_reset = jax.jit(jax.vmap(lambda key: env.reset(key, params)))
    all_step = jax.jit(jax.vmap(lambda *inputs: env.step(*inputs, params)))
    structure = jax.tree.structure(jax.eval_shape(all_reset, keys(0))[1])

    def step(seed, state, actions):
        *leaves, actions = map(jax.dlpack.from_dlpack, [*state, actions])
        state = jax.tree.unflatten(structure, leaves)
        obs, state, *rest, info = all_step(keys(seed), state, actions)
        return tensors(state), *tensors([obs, *rest, info["final_observation"]])

    def reset(seed):
        obs, state = all_reset(keys(seed))
        return torch.from_dlpack(obs), tensors(state)

    spaces = env.observation_space(params), env.action_space(params)
    return *spaces, reset, step


class OtherEnv:
    """N environments of another library, gym:<id> or gymnax:<id>."""

    def __init__(self, name: str, num_envs: int, args: Args):
        library, _, name = name.partition(":")
        package, opener = {
            "gym": ("gymnasium", open_gym),
            "gymnax": ("gymnax", open_gymnax),
        }[library]
        with blame(f"--env {args.env} needs `pip install {package}` and a known id"):
            opened = opener(name, num_envs)
            obs_space, self.space, self.open, self.advance = opened
        kinds = type(obs_space).__name__, type(self.space).__name__
        if kinds not in (("Box", "Discrete"), ("Box", "Box")):
            what = f"--env {args.env} has {kinds[0]} observations, {kinds[1]} actions"
            fail(f"{what}: only Box observations, Discrete or Box actions can be used")
        self.num_envs, self.device, self.time_limit = num_envs, args.device, 10_000
        self.discrete, self.obs_size = (
            kinds[1] == "Discrete",
            math.prod(obs_space.shape),
        )
        self.outputs = (
            self.space.n if self.discrete else 2 * math.prod(self.space.shape)
        )

    def reset(self) -> torch.Tensor:
        obs, self.state = self.open(int(torch.randint(2**31, ())))
        return obs.to(self.device).flatten(1)

    def step(self, actions: torch.Tensor) -> tuple:
        """As TensorEnv.step."""
        if self.discrete:
            actions = actions.int() + int(getattr(self.space, "start", 0))
        else:
            low, high = (np.asarray(x) for x in (self.space.low, self.space.high))
            low, high = (torch.tensor(x, device=actions.device) for x in (low, high))
            actions = actions.view(-1, *self.space.shape).clamp(low, high)
        seed = int(torch.randint(2**31, ()))  # on the host, as all seeds
        self.state, *result = self.advance(seed, self.state, actions)
        obs, *rest, final_obs = (x.to(self.device) for x in result)
        return obs.flatten(1), *rest, final_obs.flatten(1)


def make_env(args: Args, num_envs: int) -> TensorEnv | OtherEnv:
    """num_envs environments of the kind that --env names; reset comes first."""
    kind = OtherEnv if args.env.startswith(("gym:", "gymnax:")) else TensorEnv
    return kind(args.env, num_envs, args)


# ------------------------------------ Policy ------------------------------------------


def compiled(function: Callable, args: Args) -> Callable:
    """function through torch.compile, as CUDA graphs on a GPU; itself if it is off."""
    if args.compile == "off":
        return function
    mode = "reduce-overhead" if args.device == "cuda" else "default"
    graph = torch.compile(function, dynamic=False, mode=mode)

    def call(*inputs):
        """Copies of the outputs, which the next call of a CUDA graph overwrites."""
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in graph(*inputs))

    return call


def in_pieces(function: Callable, *tensors: torch.Tensor) -> tuple:
    """The outputs of function for all rows, computed on pieces that fit the cache."""
    size = PIECE[tensors[0].device.type]
    parts = [function(*part) for part in zip(*(x.split(size) for x in tensors))]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))


class Agent(torch.nn.Module):
    """Actor, proximal actor and critic (MLPs) and a normaliser: all that is learned."""

    def __init__(self, env: TensorEnv | OtherEnv, args: Args):
        super().__init__()
        self.discrete, self.args = env.discrete, args

        def mlp(outputs: int, last_gain: float) -> torch.nn.Sequential:
            sizes = [env.obs_size] + [args.hidden_size] * args.hidden_layers + [outputs]
            layers = []
            for n, m in itertools.pairwise(sizes):
                layers += [torch.nn.Linear(n, m), torch.nn.Tanh()]
                torch.nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))
                torch.nn.init.zeros_(layers[-2].bias)
            torch.nn.init.orthogonal_(layers[-2].weight, last_gain)
            return torch.nn.Sequential(*layers[:-1])

        self.actor, self.critic = mlp(env.outputs, 0.01), mlp(1, 1.0)
        self.proximal = copy.deepcopy(self.actor).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(env.obs_size))
        self.register_buffer("var", torch.ones(env.obs_size))
        for name, value in (("count", 0.0), ("weight", 1.0), ("age", 0.0)):
            self.register_buffer(name, torch.tensor(value))

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        return ((obs - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)

    def see(self, obs: torch.Tensor) -> None:
        """Take obs (B, O) into the running mean and variance (Chan et al. 1979)."""
        for part in obs.split(2**16):
            var, mean = torch.var_mean(part.float(), 0, correction=0)
            delta, total = mean - self.mean, self.count + len(part)
            old, new = self.count / total, len(part) / total
            self.var.mul_(old).add_(new * var + old * new * delta**2)
            self.mean.add_(new * delta)
            self.count.copy_(total)

    def policy(self, outputs: torch.Tensor) -> td.Distribution:
        if self.discrete:
            return td.Categorical(logits=outputs)
        mean, log_std = outputs.chunk(2, -1)
        return td.Independent(td.Normal(mean, log_std.exp()), 1)

    def value(self, obs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.critic(self.normalize(obs))[:, 0],)

    def outputs(self, obs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.actor(self.normalize(obs)),)

    def act(self, obs: torch.Tensor) -> tuple:
        """Actions drawn for obs (B, O), their log-probs and the values, (B,)."""
        x = self.normalize(obs)
        policy = self.policy(self.actor(x))
        actions = policy.sample()
        if self.discrete and policy.param_shape[-1] <= 256:
            actions = actions.byte()
        return actions, policy.log_prob(actions), self.critic(x)[:, 0]

    def loss(self, obs, actions, old_logprobs, advantages, returns) -> tuple:
        """-J of a piece of a minibatch, and what the metrics say of it (4,): sums."""
        x, prox_logprobs = self.normalize(obs), old_logprobs
        policy = self.policy(self.actor(x))
        if self.args.ewma_com:
            with torch.no_grad():
                prox_logprobs = self.policy(self.proximal(x)).log_prob(actions)
        logprobs = policy.log_prob(actions), old_logprobs, prox_logprobs
        losses, clipped = ppo_loss(*logprobs, advantages, self.args.clip)
        errors, entropy = (self.critic(x)[:, 0] - returns) ** 2 / 2, policy.entropy()
        loss = losses + self.args.value_coef * errors - self.args.entropy_coef * entropy
        terms = losses, errors, entropy, clipped.float()
        return loss.sum(), torch.stack([term.detach().sum() for term in terms])


# ------------------------------------ Rollout -----------------------------------------


@torch.no_grad()
def collect(agent, act: Callable, env, live: dict, batch: dict, args: Args) -> tuple:
    """S steps of all environments into batch, tensors (S, N, ...) in the dtype they
    come in. live: "obs", "episode" (2, N), return and length so far. Gives sums over
    the finished episodes (return, length, 1), points in time around act and step."""
    totals, clock = torch.zeros(3, device=args.device), []
    for s in range(args.rollout_length):
        clock.append(now(args.device))
        actions, logprobs, values = in_pieces(act, live["obs"])
        clock.append(now(args.device))
        obs, rewards, terminated, truncated, final_obs = env.step(actions)
        clock.append(now(args.device))
        # V(final_obs) where an episode was cut off; a GPU takes all rows, not to wait
        rows = truncated.nonzero()[:, 0] if args.device == "cpu" else slice(None)
        next_values = torch.zeros_like(values)
        (next_values[rows],) = agent.value(final_obs[rows])
        step = dict(obs=live["obs"], actions=actions, logprobs=logprobs, values=values)
        step |= dict(rewards=rewards, terminated=terminated, truncated=truncated)
        for name, x in {**step, "next_values": next_values}.items():
            if name not in batch:
                batch[name] = x.new_empty(args.rollout_length, *x.shape)
            batch[name][s] = x
        ended = terminated | truncated
        gained = torch.stack([rewards.float(), torch.ones_like(values)])
        episode = live["episode"] + gained
        totals += torch.cat([(episode * ended).sum(1), ended.sum()[None]])
        live |= {"obs": obs, "episode": episode * ~ended}
    following = [*batch["values"][1:], *in_pieces(agent.value, obs)]
    for s, ended in enumerate(batch["terminated"] | batch["truncated"]):
        batch["next_values"][s] += following[s] * ~ended
    return totals, [*clock, now(args.device)]


def now(device: str) -> float | torch.cuda.Event:
    """A point in time, on a GPU in its own queue: the host does not wait for it."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def describe(stats: dict, totals, clock: list, start: float, batch: dict) -> dict:
    """What the metrics say of a step; the only wait for the device is in here."""
    names = "episode_return", "episode_length", "episodes"
    stats |= dict(zip(names, [*totals[:2] / totals[2], totals[2]]))
    values = torch.stack([*stats.values()]).tolist()
    end, count = time.perf_counter(), batch["rewards"].numel()
    span = lambda a, b: b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3
    act_time = sum(map(span, clock[0:-1:3], clock[1::3]))
    env_time = sum(map(span, clock[1::3], clock[2::3]))
    rollout = span(clock[0], clock[-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    return {name: x for name, x in zip(stats, values) if math.isfinite(x)} | {
        "env_steps_per_second": count / env_time,
        "act_steps_per_second": count / (env_time + act_time),  # env and inference
        "steps_per_second": count / (end - start),
        "seconds_rollout": rollout,
        "seconds_update": end - start - rollout,
        "peak_memory_gb": peak / 2**30,
    }


# --------------------------------- THE ALGORITHM --------------------------------------


def recipe(args: Args) -> tuple[int, float]:
    """Minibatch size and learning rate, the same for any --num-envs (2603.06009); in
    the wrong arms the minibatch grows with it, in one the rate by the square root."""
    growth = 1.0 if args.scaling == "minibatches" else args.num_envs / args.base_envs
    root = math.sqrt(growth) if args.scaling == "minibatch-size-sqrt-lr" else 1.0
    return round(args.minibatch_size * growth), args.learning_rate * root


def gae(rewards, values, next_values, terminated, truncated, gamma, lam) -> tuple:
    """Advantages and returns, (S, N) as all inputs (1506.02438, eq. 16). next_values[s]
    is V(final observation) where the episode ended at s, else V(obs at s + 1).
    Termination takes the bootstrap; it and truncation cut the lambda chain."""
    advantages, later = torch.empty_like(values), torch.zeros_like(values[0])
    for s in reversed(range(len(rewards))):
        delta = rewards[s] + gamma * next_values[s] * ~terminated[s] - values[s]
        later = delta + gamma * lam * later * ~(terminated[s] | truncated[s])
        advantages[s] = later
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, prox_logprobs, advantages, clip) -> tuple:
    """Minus the clipped surrogate, and whether the clip takes its gradient, both (B,)
    as the inputs (2110.00641; 1707.06347, eq. 7, if prox_logprobs is old_logprobs)."""
    surrogate = (logprobs - old_logprobs).exp() * advantages  # pi / pi_b A
    ratio = (logprobs - prox_logprobs).exp()  # pi / pi_prox
    bounded = ratio.clamp(1 - clip, 1 + clip)
    clipped = bounded * (prox_logprobs - old_logprobs).exp() * advantages
    return -torch.minimum(surrogate, clipped), (bounded - ratio) * advantages < 0


def ewma_update(average, parameters, weight, age, com: float) -> tuple:
    """Take parameters into their average, in place: those k steps old weigh beta^k.
    Gives the new sum of the weights and the mean age in steps (2110.00641)."""
    beta = com / (1 + com)
    total = beta * weight + 1
    for old, new in zip(average, parameters):
        old.lerp_(new.detach(), 1 / total)
    return total, beta * weight / total * (age + 1)


def learn(agent, loss_of: Callable, optimizer, batch: dict, args: Args) -> dict:
    """--epochs passes of Adam over the batch; their statistics, left on the device."""
    names = "rewards", "values", "next_values", "terminated", "truncated"
    advantages, returns = gae(*(batch[x] for x in names), args.gamma, args.gae_lambda)
    explained = 1 - advantages.var() / returns.var()
    advantages.sub_(advantages.mean()).div_(advantages.std() + 1e-8)
    data = [batch["obs"], batch["actions"], batch["logprobs"], advantages, returns]
    data, (size, _) = [x.flatten(0, 1) for x in data], recipe(args)
    total, actor, weights = len(data[0]), agent.actor.parameters, agent.parameters
    few = data[0][:: -(-total // 2**18)]
    with torch.no_grad():
        before = agent.policy(*in_pieces(agent.outputs, few))
    # neighbours are different environments: shuffling blocks of them is as good
    block = math.gcd(size, args.num_envs, 2 ** max(0, total.bit_length() - 21))
    blocks = [x.view(-1, block, *x.shape[1:]) for x in data]
    sums, noise, norm, age = torch.zeros(8, device=args.device).split([4, 2, 1, 1])
    last = None
    agent.age *= args.ewma_com > 0  # plain PPO: pi_prox begins as pi
    for _ in range(args.epochs):
        order = torch.randperm(total // block, device=args.device)
        for i, rows in enumerate(order.split(size // block)):
            for part in rows.split(max(1, PIECE[args.device] // block)):
                loss, terms = loss_of(*(x[part].flatten(0, 1) for x in blocks))
                (loss / size).backward()
                sums += terms
            g = torch.cat([p.grad.flatten() for p in actor()])
            last = last if i else g  # of the minibatch before, disjoint transitions
            noise += torch.stack(
                [size * ((g - last) ** 2).sum() / 2, g @ last * (i > 0)]
            )
            last = g
            norm += torch.nn.utils.clip_grad_norm_(weights(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            age += agent.age
            agent.age += 1
            if args.ewma_com:
                pair = agent.proximal.parameters(), actor()
                state = agent.weight, agent.age - 1, args.ewma_com
                agent.weight, agent.age = ewma_update(*pair, *state)
    with torch.no_grad():
        after = agent.policy(*in_pieces(agent.outputs, few))
    kl, updates = td.kl_divergence(before, after).mean(), args.epochs * total // size
    names = "policy_loss", "value_loss", "entropy", "clip_fraction"
    return dict(zip(names, sums / (args.epochs * total))) | {
        "kl": kl,
        "ddr": total / kl,
        "gradient_noise_scale": noise[0] / noise[1].clamp(min=0),
        "proximal_age": age[0] / updates,
        "grad_norm": norm[0] / updates,
        "explained_variance": explained,
    }


# ----------------------------------- Evaluation ---------------------------------------


@torch.no_grad()
def evaluate(agent: Agent, env: TensorEnv | OtherEnv, args: Args) -> dict[str, float]:
    """Mean return and length of the first episode of each environment in env: the most
    likely actions, a frozen normaliser, the same starts every time."""
    torch.manual_seed(args.seed)
    obs, totals = env.reset(), torch.zeros(2, device=args.device)
    running = torch.ones(env.num_envs, dtype=torch.bool, device=args.device)
    for s in range(env.time_limit):
        actions = agent.policy(*in_pieces(agent.outputs, obs)).mode
        obs, rewards, terminated, truncated, _ = env.step(actions)
        totals += torch.stack([(rewards * running).sum(), running.sum()])
        running &= ~(terminated | truncated)
        if s % 50 == 49 and not running.any():
            break
    names = "eval/episode_return", "eval/episode_length"
    return dict(zip(names, (totals / env.num_envs).tolist()))


# ----------------------------------- Run folder ---------------------------------------


def open_run(args: Args, step: int) -> None:
    """Make the folder of a new run, or cut the logs of a resumed one after `step`."""
    run_dir, here = Path(args.run_dir), Path(__file__).parent
    with blame(f"cannot open the run folder {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        for log in run_dir.glob("*.jsonl"):
            lines = [x for x in log.read_text().splitlines(True) if x.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            log.with_suffix(".new").write_text("".join(kept))
            log.with_suffix(".new").replace(log)
        git = ["git", "rev-parse", "HEAD"] if shutil.which("git") else ["true"]
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
        about = {"python": sys.version, "torch": torch.__version__}
        about |= {"numpy": np.__version__, "commit": commit.strip()}
        about |= {"hardware": f"{os.cpu_count()} CPU cores, {gpu}", "args": vars(args)}
        (run_dir / "args.json").write_text(json.dumps(about, indent=1))


def write_logs(args: Args, metrics: dict, sample: dict) -> None:
    """A line of metrics.jsonl and of samples.jsonl; wandb may fail, training not."""
    if RANK > 0:
        return
    with blame(f"cannot write in {args.run_dir}"):
        for name, record in (("metrics", metrics), ("samples", sample)):
            with Path(args.run_dir, f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": metrics["step"]} | record) + "\n")
    try:
        if args.track:
            import wandb

            if wandb.run is None:
                mode = "online" if wandb.api.api_key else "offline"
                mode = os.environ.get("WANDB_MODE", mode)
                wandb.init(project=args.wandb_project, dir=args.run_dir, mode=mode)
            wandb.log(metrics, step=metrics["step"])
    except Exception as e:
        args.track = False
        tqdm.write(f"wandb is off from here on: {e}")


def save_checkpoint(run_dir: Path, state: dict) -> None:
    """checkpoint/ of the run, written beside, then renamed: one is always whole."""
    new, last, old = (run_dir / f"checkpoint{x}" for x in (".new", "", ".old"))
    try:
        with blame(
            f"cannot save step {state['step']} in {run_dir} (the last save is whole)"
        ):
            new.mkdir(exist_ok=True)
            torch.save(state, new / "state.pt")
            for path in [*new.iterdir(), new]:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            if last.exists():
                last.rename(old)
            new.rename(last)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def draw_curve(run_dir: Path) -> None:
    """curve.png: return of finished and of evaluation episodes, from metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    for name, style in (("episode_return", "-"), ("eval/episode_return", "o-")):
        points = [(r["transitions"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points), style, markersize=4, label=name)
    axes.set(xlabel="transitions", ylabel="return", title=run_dir.name)
    axes.legend()
    axes.figure.savefig(run_dir / "curve.png", dpi=120)


# -------------------------------------- Main ------------------------------------------


def read_flags(default: Args | None = None) -> Args:
    """The command line; a wrong flag is one line instead of tyro's box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, default=default, description=__doc__.split("\n")[0])
    except SystemExit:
        if box.getvalue():  # not --help
            fail(re.sub(r"[^ -~]", " ", box.getvalue()))
        raise


def parse_args() -> Args:
    """The flags, checked and completed; those of the run itself if one is resumed."""
    args = read_flags()
    if args.resume:
        last, old = (Path(args.resume, f"checkpoint{x}") for x in ("", ".old"))
        with blame(f"{args.resume} holds no run to resume"):
            if old.exists() and not last.exists():  # killed between the two renames
                old.rename(last)
            saved = json.loads(Path(args.resume, "args.json").read_text())["args"]
            saved = Args(**saved | {"resume": args.resume, "run_dir": args.resume})
            done = torch.load(last / "state.pt", weights_only=True)["step"]
        args, free = read_flags(saved), ("steps", "save_every", "track")
        for name, value in vars(saved).items():
            if getattr(args, name) != value and name not in free:
                flag = f"--{name.replace('_', '-')}"
                fail(f"{flag} contradicts the run in {args.resume}: it has {value!r}")
        if args.steps <= done:
            fail(f"{args.resume} is at step {done} already: give more --steps")
    may_be_0 = "seed", "ewma_com", "gamma", "gae_lambda", "value_coef", "entropy_coef"
    for name, value in vars(args).items():
        number, zero = type(value) in (int, float), value == 0 and name in may_be_0
        if number and not (zero or 0 < value < math.inf):  # nan is neither
            fail(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    now = time.strftime("%Y%m%d-%H%M%S")
    args.run_dir = args.run_dir or f"runs/ppo_envs/{now}-s{args.seed}"
    found = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]
    if args.device == "auto":
        args.device = found[0]
    if args.rollout_length is None:  # 32, or more for 8 minibatches; whole ones
        unit = args.minibatch_size // math.gcd(args.minibatch_size, args.num_envs)
        steps = max(32, 8 * args.minibatch_size / args.num_envs)
        args.rollout_length = math.ceil(steps / unit) * unit
    exists = Path(args.run_dir).exists() and not args.resume
    batch, (size, _) = args.num_envs * args.rollout_length, recipe(args)
    has = f"the batch of --num-envs x --rollout-length = {batch} transitions"
    for wrong, message in (
        (WORLD_SIZE > 1, "this script is one process: start it without torchrun"),
        (max(args.gamma, args.gae_lambda) > 1, "--gamma, --gae-lambda: at most 1"),
        (args.clip >= 1, "--clip must be below 1"),
        (args.device not in found, f"there is no {args.device} here: use --device cpu"),
        (not 0 < size <= batch, f"minibatches of {size} are 0 or larger than {has}"),
        (size and batch % size, f"minibatches of {size} do not divide {has}"),
        (exists, f"{args.run_dir} exists: give another --run-dir, or --resume it"),
    ):
        if wrong:
            fail(message)
    if args.compile == "auto":  # 12 s, then twice the speed on a CPU
        pays = args.device == "cuda" or batch >= 2**18
        args.compile = "on" if pays else "off"
    try:
        compiled(torch.neg, args)(torch.zeros(2, device=args.device))
    except Exception as e:
        print(f"torch.compile is off: {str(e).splitlines()[0]}")
        args.compile = "off"
    return args


def train(args: Args) -> None:
    """Act, learn, log; evaluate and save every now and then."""
    torch.manual_seed(args.seed)
    test_env = make_env(dataclasses.replace(args, compile="off"), args.eval_episodes)
    env = make_env(args, args.num_envs)
    agent, step = Agent(env, args).to(args.device), 0
    parameters = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, recipe(args)[1], eps=1e-5, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    live = {"obs": env.reset(), "episode": torch.zeros(2, args.num_envs)}
    live["episode"] = live["episode"].to(args.device)
    if args.resume:
        path = Path(args.run_dir, "checkpoint", "state.pt")
        state = torch.load(path, map_location=args.device, weights_only=True)
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        if state["env"]:
            live, env.state = state["live"], state["env"]
    act, loss_of = compiled(agent.act, args), compiled(agent.loss, args)
    run_dir, stopping, batch = Path(args.run_dir), [], {}
    open_run(args, step)
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step first, then save
        stop = lambda *_: sys.exit(130) if stopping else stopping.append(1)
        signal.signal(number, stop)
    metrics = {"step": step, "transitions": 0}
    if step == 0:
        metrics |= evaluate(agent, test_env, args)
        write_logs(args, metrics, {})
    score = metrics.get("eval/episode_return", math.nan)
    bar = tqdm(range(step + 1, args.steps + 1), initial=step, total=args.steps)
    for step in bar:
        torch.manual_seed(args.seed * 10**9 + step)  # no state of it to save
        start = time.perf_counter()
        totals, clock = collect(agent, act, env, live, batch, args)
        stats = learn(agent, loss_of, optimizer, batch, args)
        agent.see(batch["obs"].flatten(0, 1))
        metrics = {"step": step, "transitions": step * batch["rewards"].numel()}
        metrics |= describe(stats, totals, clock, start, batch)
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= evaluate(agent, test_env, args)
            score = metrics["eval/episode_return"]
        first = {name: batch[name][:, 0].tolist() for name in ("actions", "rewards")}
        write_logs(args, metrics, first)
        if bar.n == bar.initial:
            stored = [*batch.values(), *env.state, *live.values()]
            size = sum(x.nbytes for x in stored) // args.num_envs
            size += 8 * args.rollout_length  # advantages and returns
            tqdm.write(f"memory: {size:,} bytes of tensors per environment")
        now_at = {"return": metrics.get("episode_return", math.nan), "test": score}
        bar.set_postfix(now_at | {"steps/s": metrics["steps_per_second"]})
        if stopping or step % args.save_every == 0 or step == args.steps:
            state = {"step": step, "live": live, "env": env.state}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(run_dir, state)
            draw_curve(run_dir)
        if stopping:
            print(f"stopped and saved; go on with --resume {run_dir}")
            sys.exit(130)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    for name in [name for name in records[0] if name.startswith("eval/")]:
        print(f"{name:20} first {records[0][name]:.1f}  last {records[-1][name]:.1f}")
    print(f"run folder: {run_dir}")


if __name__ == "__main__":
    train(parse_args())
