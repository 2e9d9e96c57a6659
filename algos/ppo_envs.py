"""PPO from one environment to a million on one device, in one file.

Papers: PPO (Schulman et al., arXiv 1707.06347), GAE (1506.02438), PPO-EWMA (Hilton et al.,
2110.00641), Preventing Learning Stagnation in PPO by Scaling to 1 Million Parallel
Environments (2603.06009), whose recipe is the default here.

Act with a frozen behaviour policy pi_b in N environments for S steps, then take minibatch
Adam steps on that batch: together one step of an outer optimiser. An outer step that is
too large for its noise makes learning stagnate, so with more environments keep the inner
loop as it is: minibatches of the same size, the same learning rate, more of them.

    delta_s = r_s + gamma V(s_{s+1}) (1 - terminated_s) - V(s_s)
    A_s     = delta_s + gamma lambda (1 - ended_s) A_{s+1}      ended: terminated or cut off
    rho     = pi_theta(a|s) / pi_b(a|s)
    J       = E[min(rho A, clip(pi_theta/pi_prox, 1 - e, 1 + e) (pi_prox/pi_b) A)]
              - c_v E[(V - A - V_b)^2] / 2 + c_e E[entropy]
    pi_prox = pi_b (PPO, --ewma-com 0), or the policy whose weights are the average of the
              learner's after each gradient step, k steps old weighing beta^k (PPO-EWMA);
              --ewma-com = beta / (1 - beta), the mean age: larger is a smaller outer step
    DDR     = N S / KL(pi_b || pi_updated), transitions collected per unit of divergence

From 2603.06009: the outer-step view, the recipe and its wrong arms (--scaling), DDR,
PPO-EWMA as the knob of the outer step. Ours: the direction of DDR's KL and its mean over
at most 2^18 transitions of the batch; the gradient noise scale tr(Sigma)/|G|^2, in
transitions, from consecutive minibatches g, g' of an epoch: B |g - g'|^2 / (2 g.g'), of
the actor alone; networks and constants, tuned on CartPole.

Differences. Advantages are normalised over the batch, not the minibatch; the value loss
is not clipped; the learning rate is constant, so that a longer run continues a shorter
one. Batches above 2^21 transitions are shuffled in blocks of neighbouring environments.
Breakout has MinAtar's sticky actions, its three actions with an effect, and a limit of
1,000 steps. gym:<id> cannot be saved: its episodes begin anew after --resume.

    python algos/ppo_envs.py
    python algos/ppo_envs.py --env breakout --num-envs 1048576 --rollout-length 16

The first solves CartPole-v1 (RESULT)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
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
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

# names whose text may differ from that in the other scripts
OWN = ("open_run", "save_checkpoint", "draw_curve", "parse_args", "evaluate")


@dataclasses.dataclass
class Args:
    seed: int = 1  # of the networks, the sampling and the environments
    steps: int = 150  # batches in the whole run, those before a --resume included
    run_dir: str = ""  # folder of the run (default: runs/ppo_envs/<time>-s<seed>)
    resume: str = ""  # folder of a run to continue, under its own flags
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to act and to learn
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile, CUDA graphs on a GPU
    env: str = "cartpole"  # cartpole, acrobot, pendulum, breakout, gym:<id>, gymnax:<id>
    num_envs: int = 64  # environments side by side (N)
    rollout_length: int | None = None  # S; default: 32, more with few environments
    minibatch_size: int = 256  # transitions in a gradient step, whatever --num-envs is
    learning_rate: float = 1e-3  # of Adam, whatever --num-envs is
    epochs: int = 4  # passes over each batch
    scaling: Literal["minibatches", "minibatch-size", "minibatch-size-sqrt-lr"] = (
        "minibatches"  # what grows with --num-envs; the other two are the paper's wrong arms
    )
    base_envs: int = 64  # --num-envs at which the wrong arms equal the recipe
    ewma_com: float = 0.0  # centre of mass of pi_prox in gradient steps; 0: plain PPO
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda
    clip: float = 0.2  # e
    value_coef: float = 0.5  # c_v
    entropy_coef: float = 0.0  # c_e
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    hidden_size: int = 64  # units in a layer of the actor and of the critic
    hidden_layers: int = 2  # layers of each
    normalize_obs: bool = True  # by running mean and deviation
    eval_every: int = 50  # steps between evaluations
    eval_episodes: int = 100  # episodes in an evaluation, most likely actions
    save_every: int = 50  # steps between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "onefile-rl"  # project there


def fail(message: str) -> NoReturn:
    """Stop with one line about what the user can put right, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn an exception inside into one line: `what` went wrong, and why."""
    try:
        yield
    except Exception as e:
        fail(f"{what}: {type(e).__name__}: {e}")


# --------------------------------- Environments ---------------------------------------


def cartpole_reset(noise: torch.Tensor) -> torch.Tensor:
    return noise * 0.1 - 0.05  # x, its speed, angle, its speed


def cartpole_step(state, actions, noise) -> tuple:
    x, x_dot, theta, theta_dot = state
    cos, sin, force = theta.cos(), theta.sin(), 20.0 * actions - 10.0
    temp = (force + 0.05 * theta_dot**2 * sin) / 1.1
    acceleration = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acceleration = temp - 0.05 * acceleration * cos / 1.1
    x, theta = x + 0.02 * x_dot, theta + 0.02 * theta_dot
    x_dot, theta_dot = x_dot + 0.02 * x_acceleration, theta_dot + 0.02 * acceleration
    fallen = (x.abs() > 2.4) | (theta.abs() > 12 * 2 * math.pi / 360)
    reward = torch.ones_like(fallen, dtype=torch.int8)
    return torch.stack([x, x_dot, theta, theta_dot]), reward, fallen


def acrobot_reset(noise: torch.Tensor) -> torch.Tensor:
    return noise * 0.2 - 0.1  # two angles, their speeds


def acrobot_step(state, actions, noise) -> tuple:
    torque = actions - 1.0

    def derivative(state):
        a, b, a_dot, b_dot = state
        d1, d2 = 3.5 + b.cos(), 1.25 + 0.5 * b.cos()
        phi2 = 4.9 * (a + b).sin()
        phi1 = phi2 + 14.7 * a.sin() - (0.5 * b_dot**2 + b_dot * a_dot) * b.sin()
        push = torque + d2 / d1 * phi1 - 0.5 * a_dot**2 * b.sin() - phi2
        b_acceleration = push / (1.25 - d2**2 / d1)
        a_acceleration = -(d2 * b_acceleration + phi1) / d1
        return torch.stack([a_dot, b_dot, a_acceleration, b_acceleration])

    k1 = derivative(state)  # Runge-Kutta, one step of 0.2 s
    k2 = derivative(state + 0.1 * k1)
    k3 = derivative(state + 0.1 * k2)
    k4 = derivative(state + 0.2 * k3)
    a, b, a_dot, b_dot = state + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    a, b = (x - 2 * math.pi * ((x - math.pi) / (2 * math.pi)).ceil() for x in (a, b))
    a_dot = a_dot.clamp(-4 * math.pi, 4 * math.pi)
    b_dot = b_dot.clamp(-9 * math.pi, 9 * math.pi)
    up = -a.cos() - (a + b).cos() > 1
    return torch.stack([a, b, a_dot, b_dot]), up.to(torch.int8) - 1, up


def acrobot_observe(state: torch.Tensor) -> torch.Tensor:
    a, b, a_dot, b_dot = state
    parts = a.cos(), a.sin(), b.cos(), b.sin(), a_dot, b_dot
    return torch.stack(parts, -1).float()


def pendulum_reset(noise: torch.Tensor) -> torch.Tensor:
    return torch.stack([(2 * noise[0] - 1) * math.pi, 2 * noise[1] - 1])


def pendulum_step(state, actions, noise) -> tuple:
    theta, theta_dot = state
    torque = actions[:, 0].clamp(-2, 2)
    angle = (theta + math.pi) % (2 * math.pi) - math.pi
    cost = angle**2 + 0.1 * theta_dot**2 + 0.001 * torque**2
    theta_dot = theta_dot + (15 * theta.sin() + 3 * torque) * 0.05
    theta_dot = theta_dot.clamp(-8, 8)
    state = torch.stack([theta + theta_dot * 0.05, theta_dot])
    return state, -cost.float(), torch.zeros_like(theta, dtype=torch.bool)


def pendulum_observe(state: torch.Tensor) -> torch.Tensor:
    return torch.stack([state[0].cos(), state[0].sin(), state[1]], -1).float()


def breakout_reset(noise: torch.Tensor) -> torch.Tensor:
    """Ball x and y, direction (0 left up, 1 right up, 2 right down, 3 left down), paddle,
    struck a brick, last x and y, last action, 3 rows of 10 bricks."""
    right, one = noise[0] < 0.5, torch.ones_like(noise[0])
    x, direction = 9 * ~right, 3 - right.int()
    rows = [x, 3 * one, direction, 4 * one, 0 * one, x, 3 * one, 0 * one, *[one] * 30]
    return torch.stack([row.to(torch.int8) for row in rows])


def breakout_step(state, actions, noise) -> tuple:
    x, y, direction, paddle, struck, _, _, last_action = state[:8]
    actions = torch.where(noise[1] < 0.1, last_action, actions.to(torch.int8))  # sticky
    paddle = (paddle + (actions == 2).to(torch.int8) - (actions == 1).to(torch.int8))
    paddle = paddle.clamp(0, 9)
    new_x = x + torch.where((direction == 1) | (direction == 2), 1, -1).to(torch.int8)
    new_y = y + torch.where(direction >= 2, 1, -1).to(torch.int8)
    side, top = (new_x < 0) | (new_x > 9), new_y < 0
    new_x, new_y = new_x.clamp(0, 9), new_y.clamp(min=0)
    direction = direction ^ side.to(torch.int8) ^ (3 * top.to(torch.int8))
    places = torch.arange(30, device=state.device)[:, None]
    bricks = state[8:] == 1  # (30, N)
    here = bricks & (places == new_y * 10 + new_x - 10)
    touch, floor = here.any(0), new_y == 9
    hit = touch & (struck == 0)
    bricks = bricks & ~(here & hit) | (floor & ~bricks.any(0))  # new rows for cleared ones
    straight = floor & (x == paddle)
    corner = floor & ~straight & (new_x == paddle)
    direction = direction ^ (3 * (hit | straight).to(torch.int8))
    direction = direction ^ (2 * corner.to(torch.int8))
    new_y = torch.where(hit | straight | corner, y, new_y)
    rows = new_x, new_y, direction, paddle, touch, x, y, actions
    rows = torch.stack([row.to(torch.int8) for row in rows])
    state = torch.cat([rows, bricks.to(torch.int8)])
    return state, hit.to(torch.int8), floor & ~straight & ~corner


def breakout_observe(state: torch.Tensor) -> torch.Tensor:
    """(N, 400) bool: 10 rows, 10 columns, the channels paddle, ball, trail, brick."""
    x, y, _, paddle, _, last_x, last_y, _ = state[:8, :, None]
    places = torch.arange(100, device=state.device)
    bricks = torch.nn.functional.pad(state[8:], (0, 0, 10, 60)).T == 1
    ball, trail = places == y * 10 + x, places == last_y * 10 + last_x
    return torch.stack([places == 90 + paddle, ball, trail, bricks], -1).flatten(1)


class Rules(NamedTuple):
    """A built-in environment: pure functions of a state (D, N) and of noise (K, N) that is
    uniform in [0, 1). step gives the state, rewards (N,) and terminated (N,)."""

    reset: Callable
    step: Callable
    observe: Callable  # (N, O), in the smallest exact dtype
    sizes: tuple[int, int, int, int]  # K, O, actions or 0, size of continuous ones or 0
    time_limit: int  # steps after which an episode is truncated


BUILT_IN = {
    "cartpole": Rules(
        cartpole_reset, cartpole_step, lambda state: state.T.float(), (4, 4, 2, 0), 500
    ),
    "acrobot": Rules(acrobot_reset, acrobot_step, acrobot_observe, (4, 6, 3, 0), 500),
    "pendulum": Rules(pendulum_reset, pendulum_step, pendulum_observe, (2, 3, 0, 1), 200),
    "breakout": Rules(breakout_reset, breakout_step, breakout_observe, (2, 400, 3, 0), 1000),
}


class TensorEnv:
    """N copies of a built-in environment. Dynamics in float64, as in gymnasium."""

    def __init__(self, name: str, args: Args, num_envs: int):
        self.rules, self.num_envs, self.device = BUILT_IN[name], num_envs, args.device
        self.exact = torch.float32 if args.device == "mps" else torch.float64
        self.noise_size, self.obs_size, self.num_actions, self.action_size = self.rules.sizes
        self.time_limit = self.rules.time_limit
        self.advance = compiled(self.advance, args)

    def noise(self) -> torch.Tensor:
        shape = self.noise_size, self.num_envs
        noise = torch.rand(shape, generator=self.generator, device=self.device)
        return noise.to(self.exact)

    def reset(self, seed: int) -> torch.Tensor:
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.state = self.rules.reset(self.noise())
        self.time = torch.zeros(self.num_envs, dtype=torch.int16, device=self.device)
        return self.rules.observe(self.state)

    def advance(self, state, time, actions, noise) -> tuple:
        """A step as a pure function; ended environments start again at once."""
        state, reward, terminated = self.rules.step(state, actions, noise)
        truncated, final_obs = time + 1 >= self.time_limit, self.rules.observe(state)
        ended = terminated | truncated
        state = torch.where(ended, self.rules.reset(noise), state)
        time = torch.where(ended, 0, time + 1)
        obs = self.rules.observe(state)
        return state, time, obs, reward, terminated, truncated, final_obs

    def step(self, actions: torch.Tensor) -> tuple:
        """obs (N, O), reward, terminated, truncated (N,), final_obs (N, O): the last of the
        episode where one ended, there obs is the first of the next."""
        result = self.advance(self.state, self.time, actions, self.noise())
        self.state, self.time = result[:2]
        return result[2:]

    def save(self) -> dict:
        """All that decides the future."""
        rng = self.generator.get_state()
        return {"state": self.state, "time": self.time, "rng": rng}

    def load(self, saved: dict) -> None:
        self.state, self.time = saved["state"], saved["time"]
        self.generator.set_state(saved["rng"].cpu())


def space_sizes(name: str, obs_space, action_space) -> tuple[int, int, int]:
    """Size of observations, number of actions or 0, size of continuous ones or 0."""
    kind = type(obs_space).__name__, type(action_space).__name__
    if kind[0] != "Box" or kind[1] not in ("Box", "Discrete"):
        fail(f"{name} has the spaces {kind[0]} and {kind[1]}: only Box observations and "
             "Discrete or Box actions are supported")  # fmt: skip
    size = math.prod(obs_space.shape)
    if kind[1] == "Discrete":
        return size, int(action_space.n), 0
    return size, 0, math.prod(action_space.shape)


class GymEnv:
    """gym:<id>, gymnasium's vector API with same-step autoreset (an ended environment is
    reset by the same call, its last observation is in the info), through the host."""

    def __init__(self, name: str, args: Args, num_envs: int):
        with blame(f"--env {name} needs a known id and `pip install gymnasium`"):
            import gymnasium

            mode = gymnasium.vector.AutoresetMode.SAME_STEP
            kwargs = dict(vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
            self.env = gymnasium.make_vec(name[4:], num_envs, **kwargs)
        self.space, self.device = self.env.single_action_space, args.device
        sizes = space_sizes(name, self.env.single_observation_space, self.space)
        self.obs_size, self.num_actions, self.action_size = sizes
        self.num_envs, self.time_limit = num_envs, 10_000
        self.env_ids = np.arange(num_envs)

    def reset(self, seed: int) -> torch.Tensor:
        return self.tensor(self.env.reset(seed=seed)[0]).flatten(1)

    def tensor(self, x: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(x).to(self.device)
        return x.float() if x.dtype == torch.float64 else x

    def step(self, actions: torch.Tensor) -> tuple:
        actions = actions.cpu().numpy()
        if self.num_actions:
            actions = actions.astype(np.int64) + self.space.start
        else:
            actions = actions.reshape(-1, *self.space.shape)
            actions = actions.clip(self.space.low, self.space.high)
        obs, reward, terminated, truncated, info = self.env.step(actions)
        final_obs = obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            final_obs[i] = info["final_obs"][i]
        obs, reward, terminated, truncated, final_obs = (
            self.tensor(x) for x in (obs, reward, terminated, truncated, final_obs)
        )
        return obs.flatten(1), reward, terminated, truncated, final_obs.flatten(1)

    def save(self) -> dict:
        return {}

    def load(self, saved: dict) -> None:
        tqdm.write("gymnasium's environments begin new episodes after --resume")


class GymnaxEnv:
    """gymnax:<id>, or any environment with gymnax's interface; arrays go between JAX and
    PyTorch by DLPack, without a copy through the host."""

    def __init__(self, name: str, args: Args, num_envs: int):
        with blame(f"--env {name} needs a known id and `pip install gymnax`"):
            import gymnax
            import jax

            self.jax, (self.env, self.params) = jax, gymnax.make(name[7:])
            self.space = self.env.action_space(self.params)
            obs_space = self.env.observation_space(self.params)
        self.obs_size, self.num_actions, self.action_size = space_sizes(
            name, obs_space, self.space
        )
        self.num_envs, self.time_limit = num_envs, 10_000
        self.all_reset = jax.jit(jax.vmap(lambda key: self.env.reset(key, self.params)))
        self.all_step = jax.jit(
            jax.vmap(lambda k, s, a: self.env.step(k, s, a, self.params))
        )
        self.split = jax.jit(lambda key: jax.random.split(key, num_envs + 1))

    def keys(self):
        keys = self.split(self.key)
        self.key = keys[0]
        return keys[1:]

    def reset(self, seed: int) -> torch.Tensor:
        self.key = self.jax.random.PRNGKey(seed)
        obs, self.state = self.all_reset(self.keys())
        return torch.from_dlpack(obs).flatten(1)

    def step(self, actions: torch.Tensor) -> tuple:
        if self.num_actions:
            actions = actions.int()
        else:
            actions = actions.view(-1, *self.space.shape)
            low, high = (torch.tensor(np.asarray(x)) for x in (self.space.low, self.space.high))
            actions = actions.clamp(low, high)
        actions = self.jax.dlpack.from_dlpack(actions.contiguous())
        obs, self.state, *rest, info = self.all_step(self.keys(), self.state, actions)
        arrays = obs, *rest, info["final_observation"]
        obs, reward, terminated, truncated, final_obs = map(torch.from_dlpack, arrays)
        return obs.flatten(1), reward, terminated, truncated, final_obs.flatten(1)

    def save(self) -> dict:
        leaves = self.jax.tree.leaves((self.state, self.key))
        return {str(i): torch.from_dlpack(leaf) for i, leaf in enumerate(leaves)}

    def load(self, saved: dict) -> None:
        structure = self.jax.tree.structure((self.state, self.key))
        leaves = [self.jax.dlpack.from_dlpack(leaf) for leaf in saved.values()]
        self.state, self.key = self.jax.tree.unflatten(structure, leaves)


def make_env(args: Args, num_envs: int) -> TensorEnv | GymEnv | GymnaxEnv:
    """num_envs environments of the kind --env names."""
    kinds = {"gym": GymEnv, "gymnax": GymnaxEnv, **dict.fromkeys(BUILT_IN, TensorEnv)}
    kind = args.env.split(":")[0]
    if kind not in kinds or (":" in args.env) == (kind in BUILT_IN):
        fail(f"unknown environment {args.env!r}: use {', '.join(BUILT_IN)}, gym:<id> or "
             "gymnax:<id>")  # fmt: skip
    return kinds[kind](args.env, args, num_envs)


# ------------------------------------ Policy ------------------------------------------


def compiled(function: Callable, args: Args) -> Callable:
    """function through torch.compile, on a GPU as CUDA graphs; itself with --compile off."""
    if args.compile != "on":
        return function
    mode = "reduce-overhead" if args.device == "cuda" else "default"
    graph = torch.compile(function, dynamic=False, mode=mode)

    def call(*inputs):  # the next call of a CUDA graph overwrites the outputs of this one
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in graph(*inputs))

    return call if args.device == "cuda" else graph


def in_pieces(function: Callable, *tensors: torch.Tensor) -> tuple:
    """The outputs of function over all rows, computed on as many as fit the cache."""
    size = 2**13 if tensors[0].device.type == "cpu" else 2**20
    parts = [function(*part) for part in zip(*(x.split(size) for x in tensors))]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))


class Agent(torch.nn.Module):
    """Actor, critic (separate MLPs) and the running moments of what they see."""

    def __init__(self, obs_size: int, outputs: int, args: Args):
        super().__init__()
        self.actor, self.critic = torch.nn.Sequential(), torch.nn.Sequential()
        for mlp, last, last_gain in ((self.actor, outputs, 0.01), (self.critic, 1, 1.0)):
            sizes = [obs_size] + [args.hidden_size] * args.hidden_layers + [last]
            gains = [math.sqrt(2)] * args.hidden_layers + [last_gain]
            for n, m, gain in zip(sizes, sizes[1:], gains):
                mlp.append(torch.nn.Linear(n, m)).append(torch.nn.Tanh())
                torch.nn.init.orthogonal_(mlp[-2].weight, gain)
                torch.nn.init.zeros_(mlp[-2].bias)
            mlp.pop(-1)
        self.register_buffer("mean", torch.zeros(obs_size))
        self.register_buffer("var", torch.ones(obs_size))
        self.register_buffer("count", torch.zeros(()))

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


def sample(head: torch.Tensor, noise: torch.Tensor, discrete: bool) -> torch.Tensor:
    """Actions from the actor's outputs: one of A, (B,), by the inverse CDF of the softmax
    and uniform noise (B, 1); or Gaussian (B, A) from means, log deviations and normal
    noise (B, A)."""
    if discrete:
        return (noise > head.softmax(-1).cumsum(-1)[:, :-1]).sum(-1).to(torch.uint8)
    mean, log_std = head.chunk(2, -1)
    return mean + log_std.exp() * noise


def log_probs(head: torch.Tensor, actions: torch.Tensor) -> tuple:
    """Log-probs (B,) of actions, (B,) if discrete, else (B, A), and entropies (B,)."""
    if actions.dim() == 1:
        log_softmax = head.log_softmax(-1)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return log_softmax.gather(-1, actions.long()[:, None])[:, 0], entropy
    (mean, log_std), constant = head.chunk(2, -1), math.log(2 * math.pi)
    z = (actions - mean) / log_std.exp()
    logprobs = -(z**2 / 2 + log_std + constant / 2).sum(-1)
    return logprobs, (log_std + (1 + constant) / 2).sum(-1)


def kl_divergence(head: torch.Tensor, other: torch.Tensor, discrete: bool) -> torch.Tensor:
    """KL(p || q) (B,) of the distributions that two outputs of an actor stand for."""
    if discrete:
        p, q = head.log_softmax(-1), other.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)
    (mean, log_std), (m, s) = head.chunk(2, -1), other.chunk(2, -1)
    squares = ((2 * log_std).exp() + (mean - m) ** 2) / (2 * (2 * s).exp())
    return (s - log_std + squares - 0.5).sum(-1)


# ------------------------------------ Rollout -----------------------------------------


def now(device: str) -> float | torch.cuda.Event:
    """A point in time, on a GPU in its own queue: the host does not wait."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3


@torch.no_grad()
def collect(act: Callable, agent: Agent, env, obs, running, batch: dict, args: Args) -> tuple:
    """S steps of every environment into batch, a dict of (S, N, ...) tensors, each in the
    dtype it comes in. running (2, N): return and length of the episodes under way. Gives
    the next obs, sums over the finished episodes (return, length, 1) and points in time."""
    totals, clock = torch.zeros(3, device=args.device), []
    for s in range(args.rollout_length):
        clock.append(now(args.device))
        size = (env.num_envs, 1 if env.num_actions else env.action_size)
        draw = torch.rand if env.num_actions else torch.randn
        noise = draw(size, generator=args.generator, device=args.device)
        actions, logprobs, values = in_pieces(act, obs, noise)
        clock.append(now(args.device))
        next_obs, reward, terminated, truncated, final_obs = env.step(actions)
        clock.append(now(args.device))
        # V(final_obs) where an episode was cut off; a GPU takes all rows, not to wait
        rows = truncated.nonzero()[:, 0] if args.device == "cpu" else slice(None)
        next_values = torch.zeros_like(values)
        next_values[rows] = agent.critic(agent.normalize(final_obs[rows]))[:, 0]
        step = dict(obs=obs, actions=actions, logprobs=logprobs, values=values)
        step |= dict(rewards=reward, terminated=terminated, truncated=truncated)
        for name, x in {**step, "next_values": next_values}.items():
            if name not in batch:
                shape = args.rollout_length, *x.shape
                batch[name] = torch.empty(shape, dtype=x.dtype, device=x.device)
            batch[name][s] = x
        running += torch.stack([reward.float(), torch.ones_like(values)])
        ended = terminated | truncated
        totals += torch.cat([(running * ended).sum(1), ended.sum()[None]])
        running *= ~ended
        obs = next_obs
    clock.append(now(args.device))
    following = *batch["values"][1:], agent.critic(agent.normalize(obs))[:, 0]
    for s, value in enumerate(following):
        ended = batch["terminated"][s] | batch["truncated"][s]
        batch["next_values"][s] = torch.where(ended, batch["next_values"][s], value)
    return obs, totals, clock


# --------------------------------- THE ALGORITHM --------------------------------------


def recipe(args: Args) -> tuple[int, float]:
    """Minibatch size and learning rate for --num-envs: the same for any (2603.06009); for
    its wrong arms the minibatch grows in proportion, the rate not or by the square root."""
    growth = 1.0 if args.scaling == "minibatches" else args.num_envs / args.base_envs
    root = math.sqrt(growth) if args.scaling == "minibatch-size-sqrt-lr" else 1.0
    return round(args.minibatch_size * growth), args.learning_rate * root


def gae(rewards, values, next_values, terminated, truncated, gamma, lam) -> tuple:
    """Advantages and returns, both (S, N) like the inputs (1506.02438, eq. 16).

    next_values[s] is V of the final observation where the episode ended at s, else
    V(obs at s + 1). Termination takes the bootstrap, either end cuts the lambda chain."""
    advantages, later = torch.empty_like(values), torch.zeros_like(values[0])
    for s in reversed(range(len(rewards))):
        delta = rewards[s] + gamma * next_values[s] * ~terminated[s] - values[s]
        later = delta + gamma * lam * ~(terminated[s] | truncated[s]) * later
        advantages[s] = later
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, prox_logprobs, advantages, clip) -> tuple:
    """The clipped surrogate, negative, and whether the clip takes the gradient, all (B,)
    (2110.00641, eq. 4; PPO's own where prox_logprobs is old_logprobs)."""
    surrogate = (logprobs - old_logprobs).exp() * advantages  # rho A
    ratio = (logprobs - prox_logprobs).exp()  # pi / pi_prox
    bounded = ratio.clamp(1 - clip, 1 + clip)
    clipped = bounded * (prox_logprobs - old_logprobs).exp() * advantages
    return -torch.minimum(surrogate, clipped), (bounded - ratio) * advantages < 0


@torch.no_grad()
def ewma_update(average, parameters, weight: float, age: float, com: float) -> tuple:
    """The average of all parameters so far, k steps old weighing beta^k, in place; the sum
    of the weights and the mean age in steps, new (2110.00641, section 3)."""
    beta = com / (1 + com)
    total = beta * weight + 1
    for old, new in zip(average, parameters):
        old.lerp_(new, 1 / total)
    return total, beta * weight / total * (age + 1)


def minibatch_loss(agent, proximal, args, obs, actions, old_logprobs, advantages, returns):
    """Sum of the loss -J over rows, and sums of what the metrics say, (5,)."""
    x = agent.normalize(obs)
    logprobs, entropy = log_probs(agent.actor(x), actions)
    prox_logprobs = old_logprobs
    if proximal is not None:
        with torch.no_grad():
            prox_logprobs, _ = log_probs(proximal(x), actions)
    surrogate, taken = ppo_loss(logprobs, old_logprobs, prox_logprobs, advantages, args.clip)
    errors = (agent.critic(x)[:, 0] - returns) ** 2 / 2
    loss = surrogate + args.value_coef * errors - args.entropy_coef * entropy
    terms = surrogate, errors, entropy, taken.float()
    return loss.sum(), torch.stack([term.detach().sum() for term in terms])


def learn(loss_of: Callable, agent, optimizer, prox: dict, batch: dict, args: Args) -> dict:
    """--epochs passes of Adam over the batch; means over its gradient steps, on the device.
    prox holds pi_prox as "actor" (None: the behaviour policy), "weight" and "age"."""
    advantages, returns = gae(
        *(batch[name] for name in ("rewards", "values", "next_values")),
        *(batch[name] for name in ("terminated", "truncated", "gamma", "lam")),
    )
