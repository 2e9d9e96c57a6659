"""PPO from one environment to a million, on one device or several, in one file.

Papers: PPO (arXiv 1707.06347), GAE (1506.02438), PPO-EWMA (Hilton et al., 2110.00641),
Preventing Learning Stagnation in PPO by Scaling to 1 Million Parallel Environments
(2603.06009), whose recipe is the default here.

Act with a frozen behaviour policy pi_b in N environments for S steps, then take Adam
steps on minibatches of that data: together this is one step of an outer optimiser. If
the outer step is too large for its noise, learning stagnates. So when N grows, keep the
minibatch size and the learning rate, and only take more minibatches.

    delta_s = r_s + gamma V(o_{s+1}) (1 - terminated_s) - V(o_s)
    A_s     = delta_s + gamma lambda (1 - ended_s) A_{s+1}
              ended: terminated or truncated; o: observations
    J       = E[min(pi/pi_b A, clip(pi/pi_prox, 1 - e, 1 + e) pi_prox/pi_b A)]
              - c_v E[(V - V_b - A)^2] / 2 + c_e E[entropy(pi)]
    pi_prox   PPO (--ewma-com 0): pi_b. PPO-EWMA: the policy of averaged weights, where
              those k gradient steps old weigh beta^k. --ewma-com is their mean age, the
              centre of mass beta / (1 - beta): the larger, the smaller the outer step.
              --ewma-from starts the average in the middle of a run
    DDR     = N S / KL(pi_b || pi_updated): transitions per unit of divergence

Not from the paper: the direction of DDR's KL and its mean over up to 2^12 states of the
batch; networks and constants; the gradient noise scale tr(Sigma) / |G|^2 of the actor,
in transitions, from consecutive minibatches' g and g' of the first epoch, later ones
have seen the data: B |g - g'|^2 / (2 g.g'), left out if the sum of the g.g' is not
above 0.

Differences. The surrogate's advantages are normalised over the batch, not the
minibatch; the value loss is not clipped; the learning rate is constant, so that a
longer run continues a shorter one. Observations are normalised by the statistics of all
earlier batches, and clipped at +-10. They are not normalised in the first batch: when
the statistics come in after it, the critic loses much of what it had learned from it.
Each later batch moves them, and with them policy and critic, which kl and DDR do not
count. Batches of 2^21 transitions or more are shuffled in blocks of neighbours. All
environments begin together: those whose episodes have one length (pendulum) stay in
step. Breakout has MinAtar's sticky actions, only the actions with an effect and at most
1,000 steps. The state of gym:<id> is not saved: --resume begins new episodes there.
Evaluation episodes of gym:<id> and gymnax:<id> are cut after 10,000 steps. Under
torchrun each rank has a share of the environments and of each minibatch; random draws
depend on seed and step alone: the number of ranks changes the speed, not the result
(apart from rounding, which training amplifies), unless the blocks do not divide a
rank's share.

    python algos/ppo_envs.py
    python algos/ppo_envs.py --num-envs 1048576 --rollout-length 8 --steps 3
    torchrun --nproc-per-node 4 algos/ppo_envs.py --num-envs 65536

The first solves CartPole-v1: mean return 500 over 100 evaluation episodes with each of
seeds 1 to 10, after 655,360 transitions; README.md has the time that takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
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
import torch.distributed as dist
import torch.distributions as td
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

OWN = (
    "CURVE",
    "AXIS",
    "blame",
    "describe",
    "evaluate",
    "open_run",
    "save_checkpoint",
    "check",
)
CURVE = "(eval/)?episode_return"  # metrics that curve.png shows
AXIS = "transitions"  # ... and along what
RANK = int(os.environ.get("RANK", 0))  # of torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
PIECE = {"cpu": 2**13, "mps": 2**16, "cuda": 2**20}  # rows at once: fit the cache
td.Distribution.set_default_validate_args(False)


@dataclasses.dataclass
class Args:
    seed: int = 1  # for the networks, the sampling and the environments
    steps: int = 80  # batches in the whole run, including those before a --resume
    run_dir: str = ""  # folder of the run (default: runs/ppo_envs/<time>-s<seed>)
    resume: str = ""  # folder of a run to continue; its saved flags apply
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; on one GPU: graphs
    env: str = "cartpole"  # or acrobot, pendulum, breakout, gym:<id>, gymnax:<id>
    num_envs: int = 256  # environments side by side (N), over all ranks
    rollout_length: int | None = None  # S; default: 32, more for whole minibatches
    minibatch_size: int = 512  # transitions in a gradient step, whatever --num-envs is
    learning_rate: float = 1e-3  # of Adam, whatever --num-envs is
    scaling: Literal["minibatches", "minibatch-size", "minibatch-size-sqrt-lr"] = (
        "minibatches"  # what grows with --num-envs; the last two are the wrong arms
    )
    base_envs: int = 256  # --num-envs at which the wrong arms equal the recipe
    epochs: int = 4  # passes over each batch
    ewma_com: float = 0.0  # centre of mass of pi_prox in gradient steps; 0: plain PPO
    ewma_from: int = 1  # first step with --ewma-com; plain PPO before it
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda
    clip: float = 0.2  # e
    value_coef: float = 0.5  # c_v
    entropy_coef: float = 0.0  # c_e
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    hidden_size: int = 64  # units in a layer of the actor and of the critic
    hidden_layers: int = 2  # layers of each
    eval_every: int = 10  # steps between evaluations
    eval_episodes: int = 100  # episodes in an evaluation (most likely actions)
    save_every: int = 20  # steps between checkpoints
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "onefile-rl"  # Weights & Biases project


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one line that says what the user has to fix."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def outlive_pipes() -> None:
    """Go on in silence when the reader of stdout or stderr is gone: in `2>&1 | tee log`
    tee dies of the same Ctrl-C that lets a run finish its step and save."""

    def guard(stream, call: Callable, *text):
        try:
            return call(*text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    for stream in sys.stdout, sys.stderr:
        for name in "write", "flush":
            call = functools.partial(guard, stream, getattr(stream, name))
            setattr(stream, name, call)


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn an exception in the block into one line: what went wrong, and why."""
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
    """The ball at the left or the right edge, moving down and inwards; all bricks."""
    left, zero = noise[0] < 0.5, torch.zeros_like(noise[0])
    x, direction = torch.where(left, 0, 9), torch.where(left, 2, 3)
    rows = x, zero + 3, direction, zero + 4, zero, x, zero + 3, zero, *[zero + 1] * 30
    return torch.stack([row.to(torch.int8) for row in rows])


def breakout_obs(state: torch.Tensor) -> torch.Tensor:
    """(N, 400) bool: 10 rows, 10 columns, the channels paddle, ball, trail, brick."""
    x, y, _, paddle, _, last_x, last_y, _ = state[:8, :, None]
    places = torch.arange(100, device=state.device)
    bricks = torch.nn.functional.pad(state[8:], (0, 0, 10, 60)).T == 1
    ball, trail = places == 10 * y + x, places == 10 * last_y + last_x
    return torch.stack([places == 90 + paddle, ball, trail, bricks], -1).flatten(1)


def pendulum_reset(noise: torch.Tensor) -> torch.Tensor:
    """An angle within +-pi and a speed within +-1, uniform."""
    angle, speed = 2 * noise - 1
    return torch.stack([math.pi * angle, speed])


def near_zero(width: float) -> Callable:
    """The reset of a state whose numbers are uniform within +-width."""
    return lambda noise: width * (2 * noise - 1)


def angles_obs(state: torch.Tensor) -> torch.Tensor:
    """cos and sin of each angle, then the speeds."""
    angles, speeds = state.chunk(2)
    turns = torch.stack([angles.cos(), angles.sin()], 1).flatten(0, 1)
    return torch.cat([turns, speeds]).T.float().contiguous()


def state_obs(state: torch.Tensor) -> torch.Tensor:
    """The state itself."""
    return state.T.float().contiguous()


class Rules(NamedTuple):
    """A built-in environment: functions of states (D, N) and noise (K, N) in [0, 1)."""

    step: Callable  # state, actions, noise -> state, rewards (N,), terminated (N,)
    reset: Callable  # noise -> state
    observe: Callable  # state -> obs (N, O), float32 or bool
    noise_size: int  # K
    obs_size: int  # O
    outputs: int  # of the actor: logits, or means and log deviations of the actions
    discrete: bool  # actions (N,), else (N, A)
    time_limit: int  # steps after which an episode is truncated


BUILT_IN = {
    "cartpole": Rules(cartpole, near_zero(0.05), state_obs, 4, 4, 2, True, 500),
    "acrobot": Rules(acrobot, near_zero(0.1), angles_obs, 4, 6, 3, True, 500),
    "pendulum": Rules(pendulum, pendulum_reset, angles_obs, 2, 3, 2, False, 200),
    "breakout": Rules(breakout, breakout_reset, breakout_obs, 2, 400, 3, True, 1000),
}


class TensorEnv:
    """Those of num_envs built-in environments that are `mine`, N of them. Noise is
    drawn for all num_envs, so that it is the same for any number of ranks."""

    def __init__(self, args: Args, num_envs: int, mine: slice):
        self.rules = rules = BUILT_IN[args.env]
        self.obs_size, self.outputs = rules.obs_size, rules.outputs
        self.discrete, self.time_limit = rules.discrete, rules.time_limit
        self.total, self.mine, self.device = num_envs, mine, args.device
        self.advance = compiled(self.advance, args)

    def noise(self) -> torch.Tensor:
        exact = torch.float32 if self.device == "mps" else torch.float64  # mps has none
        noise = torch.rand(self.rules.noise_size, self.total, device=self.device)
        return noise[:, self.mine].to(exact)

    def reset(self) -> torch.Tensor:
        """The first obs (N, O) of new episodes."""
        state = self.rules.reset(self.noise())
        self.state = [state, torch.zeros_like(state[0], dtype=torch.int16)]  # and time
        return self.rules.observe(state)

    def step(self, actions: torch.Tensor) -> tuple:
        """obs (N, O), rewards, terminated, truncated (N,), final_obs (N, O): where an
        episode ended, its last observation (obs is then the first of the next episode),
        elsewhere equal to obs."""
        state, time, *result = self.advance(*self.state, actions, self.noise())
        self.state = [state, time]
        return tuple(result)

    def advance(self, state, time, actions, noise) -> tuple:
        """The next state and time, and what step returns."""
        state, rewards, terminated = self.rules.step(state, actions, noise)
        time, final_obs = time + 1, self.rules.observe(state)
        truncated = time >= self.time_limit
        ended = terminated | truncated
        state, time = torch.where(ended, self.rules.reset(noise), state), time * ~ended
        obs = self.rules.observe(state)
        return state, time, obs, rewards, terminated, truncated, final_obs


def open_gym(name: str, num_envs: int, mine: slice) -> tuple:
    """gymnasium's vector API with same-step autoreset: where an episode ends, obs is
    the first of the next one and info holds its last."""
    import gymnasium

    places = range(num_envs)[mine]
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    env = gymnasium.make_vec(name, len(places), "sync", vector_kwargs=same_step)
    narrow = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x

    def reset(seed):
        obs, _ = env.reset(seed=seed + places[0])  # that of the first environment
        return [], torch.from_numpy(narrow(obs))

    def step(seed, state, actions):
        obs, rewards, terminated, truncated, info = env.step(actions.cpu().numpy())
        final_obs = obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            final_obs[i] = info["final_obs"][i]
        arrays = map(narrow, (obs, rewards, terminated, truncated, final_obs))
        return [], *map(torch.from_numpy, arrays)

    return env.single_observation_space, env.single_action_space, reset, step


def open_gymnax(name: str, num_envs: int, mine: slice) -> tuple:
    """gymnax from 1.0 on. Arrays go from JAX to PyTorch and back by DLPack, not through
    the host; the state is kept as a list of tensors."""
    import gymnax
    import jax

    env, params = gymnax.make(name)
    keys = lambda seed: jax.random.split(jax.random.PRNGKey(seed), num_envs)[mine]
    tensors = lambda tree: [torch.from_dlpack(x) for x in jax.tree.leaves(tree)]
    all_reset = jax.jit(jax.vmap(lambda key: env.reset(key, params)))
    all_step = jax.jit(jax.vmap(lambda *inputs: env.step(*inputs, params)))
    structure = jax.tree.structure(jax.eval_shape(all_reset, keys(0))[1])
    key = keys(0)[0]  # a KeyError now: gymnax before 1.0 keeps no last observation
    first = key, env.reset(key, params)[1], env.action_space(params).sample(key)
    jax.eval_shape(env.step, *first, params)[-1]["final_observation"]
    home = torch.from_dlpack(jax.numpy.zeros(1)).device  # JAX may be without a GPU

    def reset(seed):
        obs, state = all_reset(keys(seed))
        return tensors(state), torch.from_dlpack(obs)

    def step(seed, state, actions):
        inputs = [x.to(home) for x in [*state, actions]]
        *leaves, actions = map(jax.dlpack.from_dlpack, inputs)
        state = jax.tree.unflatten(structure, leaves)
        obs, state, *rest, info = all_step(keys(seed), state, actions)
        return tensors(state), *tensors([obs, *rest, info["final_observation"]])

    return env.observation_space(params), env.action_space(params), reset, step


class OtherEnv:
    """As TensorEnv, with environments of another library: gym:<id> or gymnax:<id>."""

    def __init__(self, args: Args, num_envs: int, mine: slice):
        library, _, name = args.env.partition(":")
        known = {"gym": ("gymnasium", open_gym), "gymnax": ("'gymnax>=1'", open_gymnax)}
        package, opener = known[library]
        with blame(f"--env {args.env} needs `pip install {package}` and a known id"):
            opened = opener(name, num_envs, mine)
        obs_space, space, self.restart, self.advance = opened
        kinds = type(obs_space).__name__, type(space).__name__
        whole = kinds[1] == "Box" and np.issubdtype(space.dtype, np.integer)
        if kinds not in (("Box", "Discrete"), ("Box", "Box")) or whole:
            what = f"--env {args.env} has {kinds[0]} observations, {kinds[1]} actions"
            what += " of whole numbers" * whole
            fail(f"{what}: only Box observations, Discrete or Box actions can be used")
        self.space, self.discrete = space, kinds[1] == "Discrete"
        self.obs_size, self.time_limit = math.prod(obs_space.shape), 10_000
        self.device = args.device
        self.outputs = int(space.n) if self.discrete else 2 * math.prod(space.shape)

    def reset(self) -> torch.Tensor:
        seed = int(torch.randint(2**31, ()))  # on the host, as all seeds
        self.state, obs = self.restart(seed)
        return obs.to(self.device).reshape(len(obs), -1)

    def step(self, actions: torch.Tensor) -> tuple:
        if self.discrete:
            actions = actions.int() + int(getattr(self.space, "start", 0))
        else:
            limits = map(np.asarray, (self.space.low, self.space.high))
            low, high = (torch.tensor(x, device=self.device) for x in limits)
            actions = actions.view(-1, *self.space.shape).clamp(low, high)
        seed = int(torch.randint(2**31, ()))
        self.state, *result = self.advance(seed, self.state, actions)
        obs, *rest, final_obs = (x.to(self.device) for x in result)
        flat = (x.reshape(len(x), -1) for x in (obs, final_obs))
        return next(flat), *rest, next(flat)


def make_env(args: Args, num_envs: int, mine=slice(None)) -> TensorEnv | OtherEnv:
    """The `mine` part of num_envs environments of kind --env; call reset() first."""
    if args.env in BUILT_IN:
        return TensorEnv(args, num_envs, mine)
    if args.env.startswith(("gym:", "gymnax:")):
        return OtherEnv(args, num_envs, mine)
    fail(f"--env {args.env} is none of {', '.join(BUILT_IN)}, gym:, gymnax:<id>")


def share(total: int) -> slice:
    """This rank's contiguous slice of `total` items."""
    return slice(RANK * total // WORLD_SIZE, (RANK + 1) * total // WORLD_SIZE)


def all_reduce(x: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """Reduce x over torchrun's ranks, in place; a single process returns x as it is."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, operation))
    return x


def agree(x: int, args: Args) -> bool:
    """Is x, below 2^63, the same on all of torchrun's ranks?"""
    ends = all_reduce(torch.tensor([x, -x], device=args.device), "MAX")
    return not ends.sum()  # max(x) = min(x)


def check_start(agent, step: int, args: Args) -> None:
    """End the run if its ranks do not start with the same weights after the same step:
    nodes may have folders of their own."""
    first = [x.flatten()[:4096].float() for x in agent.state_dict().values()]
    first = torch.cat(first)
    if not agree(step + int(first.view(torch.int32).sum()), args):
        fail("weights or steps differ between ranks: let all read the same folders")


# ------------------------------------ Policy ------------------------------------------


def compiled(function: Callable, args: Args) -> Callable:
    """function through torch.compile, as CUDA graphs on one GPU; or as it is if off."""
    if args.compile == "off":
        return function
    shapes = None if WORLD_SIZE > 1 else False  # a rank's share of a minibatch varies
    if args.device != "cuda":
        options = {"cpp_wrapper": args.device == "cpu"}  # no Python between its kernels
        return torch.compile(function, dynamic=shapes, options=options)
    mode = "default" if WORLD_SIZE > 1 else "reduce-overhead"  # a graph for each size
    graph = torch.compile(function, dynamic=shapes, mode=mode)

    def call(*inputs):
        """Copies of the outputs, which the next call of a CUDA graph overwrites."""
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(output.clone() for output in graph(*inputs) or ())

    return call


def choose_compile(args: Args) -> None:
    """Turn --compile auto into on or off, as a resumed run has to keep it, and on into
    off where it does not work."""
    if args.compile == "auto":  # on a CPU it costs 10 s and at least doubles the speed
        batch, (size, _) = args.num_envs * args.rollout_length, recipe(args)
        updates = args.steps * args.epochs * batch / size
        args.compile = "on" if args.device == "cuda" or updates > 2**14 else "off"
    try:
        compiled(lambda x: (-x,), args)(torch.zeros(2, device=args.device))
    except Exception as e:
        print(f"torch.compile is off: {str(e).splitlines()[0]}")
        args.compile = "off"


def in_pieces(function: Callable, *tensors: torch.Tensor) -> torch.Tensor | tuple:
    """What function returns for all rows, found piece by piece: each fits the cache."""
    size = PIECE[tensors[0].device.type]
    parts = [function(*part) for part in zip(*(x.split(size) for x in tensors))]
    if len(parts) == 1:
        return parts[0]
    several = isinstance(parts[0], tuple)
    return tuple(map(torch.cat, zip(*parts))) if several else torch.cat(parts)


def mlp(x: torch.Tensor, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Outputs (B, sizes[-1]) of a network for x (B, sizes[0]). weights (P,) holds each
    layer's matrix and bias, one layer after another; between layers is tanh."""
    counts = [count for n, m in itertools.pairwise(sizes) for count in (n * m, m)]
    parts = weights.split(counts)
    while parts:
        matrix, bias, *parts = parts
        x = torch.addmm(bias, x, matrix.view(-1, len(bias)))
        if parts:
            x = 2 * torch.sigmoid(2 * x) - 1  # tanh, twice as fast when compiled
    return x


def mlp_weights(sizes: list[int], last_gain: float) -> torch.Tensor:
    """Orthogonal matrices and zero biases for mlp (P,)."""
    gains, parts = [math.sqrt(2)] * (len(sizes) - 2) + [last_gain], []
    for n, m, gain in zip(sizes, sizes[1:], gains):
        matrix = torch.nn.init.orthogonal_(torch.empty(n, m), gain)
        parts += [matrix.flatten(), torch.zeros(m)]
    return torch.cat(parts)


class Agent(torch.nn.Module):
    """All that is learned and saved: the weights theta of actor and critic in one
    vector, what Adam and PPO-EWMA keep of its past, and the observation normaliser."""

    def __init__(self, env: TensorEnv | OtherEnv, args: Args):
        super().__init__()
        hidden = [args.hidden_size] * args.hidden_layers
        self.actor_sizes = [env.obs_size, *hidden, env.outputs]
        self.critic_sizes, self.discrete = [env.obs_size, *hidden, 1], env.discrete
        actor = mlp_weights(self.actor_sizes, 0.01)
        critic = mlp_weights(self.critic_sizes, 1.0)
        self.parts, theta = [len(actor), len(critic)], torch.cat([actor, critic])
        saved = {"theta": theta, "proximal": actor}
        saved |= {"adam_mean": 0 * theta, "adam_var": 0 * theta}
        saved |= {"mean": torch.zeros(env.obs_size), "var": torch.ones(env.obs_size)}
        saved["seen"] = torch.zeros(())  # transitions in mean and var
        # Adam's steps; PPO-EWMA's sum of weights beta^k and their mean age
        saved["past"] = torch.tensor([0.0, 1.0, 0.0])
        # of a minibatch so far; the actor's of the one before; sums over all of them
        fresh = {"gradient": 0 * theta, "last": 0 * actor, "sums": torch.zeros(8)}
        for name, x in (saved | fresh).items():
            self.register_buffer(name, x, persistent=name in saved)
        self.act = compiled(self.act, args)
        self.graphs = [compiled(x, args) for x in (add_gradient, descend)]

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        return ((obs.float() - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)

    def see(self, obs: torch.Tensor) -> None:
        """Take obs (B, O) into the running mean and variance (Chan et al. 1979)."""
        (mean, var), count = moments(obs), len(obs) * WORLD_SIZE
        delta, total = mean - self.mean, self.seen + count
        old, new = self.seen / total, count / total
        self.var.mul_(old).add_(new * var + old * new * delta**2)
        self.mean.add_(new * delta)
        self.seen.copy_(total)

    def outputs(self, obs: torch.Tensor) -> torch.Tensor:
        """The actor's outputs for obs (B, O): what policy takes."""
        actor, _ = self.theta.split(self.parts)
        return mlp(self.normalize(obs), actor, self.actor_sizes)

    def policy(self, outputs: torch.Tensor) -> td.Distribution:
        if self.discrete:
            return td.Categorical(logits=outputs)
        mean, log_std = outputs.chunk(2, -1)
        return td.Independent(td.Normal(mean, log_std.exp()), 1)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        _, critic = self.theta.split(self.parts)
        return mlp(self.normalize(obs), critic, self.critic_sizes)[:, 0]

    def noise(self, num_envs: int) -> torch.Tensor:
        """What act draws the actions of N environments from."""
        if self.discrete:
            return torch.rand(num_envs, 1, device=self.theta.device)
        size = self.actor_sizes[-1] // 2
        return torch.randn(num_envs, size, device=self.theta.device)

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple:
        """Actions drawn for obs (B, O), their log-probs and the values, (B,)."""
        policy = self.policy(self.outputs(obs))
        if self.discrete:
            actions = (policy.probs.cumsum(-1)[:, :-1] <= noise).sum(-1)
            actions = actions.byte() if policy.param_shape[-1] <= 256 else actions
        else:
            actions = policy.mean + policy.stddev * noise
        return actions, policy.log_prob(actions), self.value(obs)


# ------------------------------------ Rollout -----------------------------------------


@torch.no_grad()
def collect(agent, env, live: dict, batch: dict, args: Args) -> tuple:
    """Act for S steps in all environments. What happens goes into batch, tensors
    (S, N, ...) in the dtype they come in; live holds the present "obs" (N, O) and the
    return and length so far of each "episode" (2, N). Returns sums over the finished
    episodes (return, length, count) and the times around act and step."""
    mine = share(args.num_envs)
    totals, clock = torch.zeros(3, device=args.device), []
    for s in range(args.rollout_length):
        obs, before_act = live["obs"], now(args.device)
        noise = agent.noise(args.num_envs)[mine]
        actions, logprobs, values = in_pieces(agent.act, obs, noise)
        before_step = now(args.device)
        next_obs, rewards, terminated, truncated, final_obs = env.step(actions)
        clock.append((before_act, before_step, now(args.device)))
        next_values = torch.zeros_like(values)  # V(final_obs) where truncated
        if args.device != "cpu":  # everywhere: to ask where would wait for the device
            next_values = agent.value(final_obs)
        elif truncated.any():
            next_values[truncated] = agent.value(final_obs[truncated])
        step = dict(obs=obs, actions=actions, logprobs=logprobs, values=values)
        step |= dict(rewards=rewards, terminated=terminated, truncated=truncated)
        for name, x in {**step, "next_values": next_values}.items():
            if name not in batch:
                batch[name] = x.new_empty(args.rollout_length, *x.shape)
            batch[name][s] = x
        ended = terminated | truncated
        gained = torch.stack([rewards.float(), torch.ones_like(values)])
        episode = live["episode"] + gained
        totals += torch.cat([(episode * ended).sum(1), ended.sum()[None]])
        live |= {"obs": next_obs, "episode": episode * ~ended}
    last_values = in_pieces(agent.value, live["obs"])
    following = torch.cat([batch["values"][1:], last_values[None]])
    ended = batch["terminated"] | batch["truncated"]
    batch["next_values"] = torch.where(ended, batch["next_values"], following)
    clock.append([now(args.device)] * 3)
    return all_reduce(totals), clock


def now(device: str) -> float | torch.cuda.Event:
    """The time; on a GPU an event in its queue, so that the host does not wait."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def describe(stats: dict, totals, clock: list, start: float, batch: dict) -> dict:
    """The metrics of a step, without what is not finite; its episodes are those that
    ended in it, at first short ones only. Until here one rank does not wait for its
    device (gym: and gymnax: apart)."""
    names = "episode_return", "episode_length", "episodes"
    stats |= dict(zip(names, [*totals[:2] / totals[2], totals[2]]))
    values = torch.stack([*stats.values()]).tolist()
    end, count = time.perf_counter(), batch["rewards"].numel() * WORLD_SIZE
    span = lambda a, b: b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3
    act_time = sum(span(before, between) for before, between, _ in clock)
    env_time = sum(span(between, after) for _, between, after in clock)
    rollout = span(clock[0][0], clock[-1][-1])
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak
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
    """Minibatch size and learning rate: the same for any --num-envs (2603.06009). In
    the wrong arms the minibatch grows with --num-envs, and in one of them the rate with
    its square root."""
    growth = 1.0 if args.scaling == "minibatches" else args.num_envs / args.base_envs
    root = math.sqrt(growth) if args.scaling == "minibatch-size-sqrt-lr" else 1.0
    return round(args.minibatch_size * growth), args.learning_rate * root


def gae(rewards, values, next_values, terminated, truncated, gamma, lam) -> tuple:
    """Advantages and returns, (S, N) as all inputs (1506.02438, eq. 16). next_values[s]
    is V(final observation) where the episode ended at s, else V(obs at s + 1).
    Termination drops the bootstrap; both kinds of end cut the lambda chain."""
    advantages, later = torch.empty_like(values), torch.zeros_like(values[0])
    for s in reversed(range(len(rewards))):
        delta = rewards[s] + gamma * next_values[s] * ~terminated[s] - values[s]
        later = delta + gamma * lam * later * ~(terminated[s] | truncated[s])
        advantages[s] = later
    return advantages, advantages + values


def ppo_loss(logprobs, old_logprobs, prox_logprobs, advantages, clip) -> tuple:
    """Minus the clipped surrogate, and whether the clip zeroes its gradient, both (B,)
    as the inputs (2110.00641; 1707.06347, eq. 7, if prox_logprobs is old_logprobs)."""
    surrogate = (logprobs - old_logprobs).exp() * advantages  # pi / pi_b A
    ratio = (logprobs - prox_logprobs).exp()  # pi / pi_prox
    bounded = ratio.clamp(1 - clip, 1 + clip)
    clipped = bounded * (prox_logprobs - old_logprobs).exp() * advantages
    return -torch.minimum(surrogate, clipped), (bounded - ratio) * advantages < 0


def ewma_update(average, weights, total, age, com: float) -> tuple:
    """Add weights to their average, in place; those k steps old count beta^k. Returns
    the new sum of these counts and their mean age in steps (2110.00641)."""
    beta = com / (1 + com)
    new = 1 / (beta * total + 1)  # the share of weights
    average.lerp_(weights, new)
    return 1 / new, (age + 1) * (1 - new)


def total_loss(agent: Agent, args: Args, theta, *part: torch.Tensor) -> tuple:
    """-J summed over part of a minibatch, and the sums of four metrics, (4,)."""
    obs, actions, old_logprobs, advantages, returns = part
    x, (actor, critic) = agent.normalize(obs), theta.split(agent.parts)
    policy = agent.policy(mlp(x, actor, agent.actor_sizes))
    logprobs, prox_logprobs = policy.log_prob(actions), old_logprobs
    if args.ewma_com:
        proximal = agent.policy(mlp(x, agent.proximal, agent.actor_sizes))
        prox_logprobs = proximal.log_prob(actions)
    terms = logprobs, old_logprobs, prox_logprobs, advantages
    losses, clipped = ppo_loss(*terms, args.clip)
    errors = (mlp(x, critic, agent.critic_sizes)[:, 0] - returns) ** 2 / 2
    entropy = policy.entropy()
    loss = losses + args.value_coef * errors - args.entropy_coef * entropy
    metrics = losses, errors, entropy, clipped.to(loss)
    return loss.sum(), torch.stack([x.detach().sum() for x in metrics])


def add_gradient(agent: Agent, args: Args, *part: torch.Tensor) -> None:
    """Add the gradient of total_loss, and the metrics, to those of other parts."""
    loss = lambda theta: total_loss(agent, args, theta, *part)
    if torch.compiler.is_compiling():
        gradient, metrics = torch.func.grad(loss, has_aux=True)(agent.theta)
    else:  # autograd takes two thirds of the time when nothing is compiled
        theta = agent.theta.detach().requires_grad_()
        with torch.enable_grad():
            total, metrics = loss(theta)
        (gradient,) = torch.autograd.grad(total, theta)
    agent.gradient += gradient
    agent.sums[:4] += metrics


def descend(agent: Agent, args: Args, *part: torch.Tensor) -> None:
    """Add a minibatch's last part, then take a step of Adam (1412.6980, algorithm 1).
    Written out, so that gradient, clipping and step are one compiled graph."""
    add_gradient(agent, args, *part)
    all_reduce(agent.gradient)
    (size, learning_rate), last = recipe(args), agent.last
    updates, total, age = agent.past.unbind()
    gradient = agent.gradient / size
    norm, actor = gradient.norm(), gradient[: len(last)]
    # of new and disjoint data: on average g.g' is |G|^2, |g - g'|^2 / 2 a g's noise
    noise = ((actor - last) ** 2).sum() * (last != 0).any() / 2
    agent.sums[4:] += torch.stack([size * noise, actor @ last, norm, age])
    last.copy_(actor)
    gradient = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    agent.adam_mean.lerp_(gradient, 0.1)
    agent.adam_var.lerp_(gradient**2, 0.001)
    updates = updates + 1
    mean = agent.adam_mean / -torch.expm1(updates * math.log(0.9))  # 1 - 0.9^updates
    var = agent.adam_var / -torch.expm1(updates * math.log(0.999))
    agent.theta -= learning_rate * mean / (var.sqrt() + 1e-5)
    agent.gradient.zero_()
    if args.ewma_com:
        actor = agent.theta[: len(last)]
        total, age = ewma_update(agent.proximal, actor, total, age, args.ewma_com)
    else:
        age = age + 1
    agent.past.copy_(torch.stack([updates, total, age]))


def moments(x: torch.Tensor) -> tuple:
    """Mean and variance over the rows of x (B, ...) of all ranks."""
    parts, count = x.split(2**16), len(x) * WORLD_SIZE
    mean = all_reduce(sum(y.sum(0) for y in parts)) / count
    squares = sum(((y.float() - mean) ** 2).sum(0) for y in parts)  # y may be bool
    return mean, all_reduce(squares) / count


@torch.no_grad()
def learn(agent: Agent, batch: dict, args: Args) -> dict:
    """Make --epochs passes over the batch; returns statistics, left on the device."""
    add, step = agent.graphs
    (size, _), total = recipe(args), args.num_envs * args.rollout_length
    advantages, returns = batch["advantages"], batch["returns"]
    (mean, var), (_, spread) = (moments(x.flatten()) for x in (advantages, returns))
    advantages.sub_(mean).div_(var.sqrt() + 1e-8)
    # neighbours are different environments: shuffling blocks of them is as good
    coarse = 2 ** max(0, total.bit_length() - 21)
    block = math.gcd(size, args.num_envs // WORLD_SIZE, coarse)
    data = batch["obs"], batch["actions"], batch["logprobs"], advantages, returns
    data = [x.flatten(0, 1).unflatten(0, (-1, block)) for x in data]
    take = lambda rows: [x.index_select(0, rows).flatten(0, 1) for x in data]
    width, most = args.num_envs // block, max(1, PIECE[args.device] // block)
    # states for the KL, the same for any number of ranks
    places = torch.arange(0, total, math.ceil(total / 2**12), device=args.device)
    states = batch["obs"].flatten(0, 1)[own_rows(places, args.num_envs)]
    before = agent.policy(agent.outputs(states))
    agent.sums.zero_()
    for epoch in range(args.epochs):
        agent.last.zero_()
        order = torch.randperm(total // block, device=args.device)
        for rows in order.split(size // block):
            *pieces, last = own_rows(rows, width).split(most)
            for piece in pieces:
                add(agent, args, *take(piece))
            step(agent, args, *take(last))
        if epoch == 0:
            noise, signal = agent.sums[4:6].clone()
    if not args.ewma_com:  # plain PPO: pi_prox is the next pi_b
        agent.proximal.copy_(agent.theta[: agent.parts[0]])
        agent.past[2] = 0
    after = agent.policy(agent.outputs(states))
    kl = all_reduce(td.kl_divergence(before, after).sum()) / len(places)
    metrics, (_, _, norms, ages) = agent.sums.clone().split(4)
    metrics = all_reduce(metrics) / args.epochs / total
    updates = args.epochs * total / size
    names = "policy_loss", "value_loss", "entropy", "clip_fraction"
    return dict(zip(names, metrics)) | {
        "kl": kl,
        "ddr": total / kl,
        "gradient_noise_scale": noise / signal.clamp(min=0),
        "grad_norm": norms / updates,
        "proximal_age": ages / updates,
        "explained_variance": 1 - var / spread,
    }


def own_rows(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Those of rows, places in (S, width) of all ranks, that are this rank's, as places
    in its own share."""
    if WORLD_SIZE == 1:
        return rows
    mine = share(width)
    size, column = mine.stop - mine.start, rows % width - mine.start
    return (rows // width * size + column)[(column >= 0) & (column < size)]


# ----------------------------------- Evaluation ---------------------------------------


@torch.no_grad()
def evaluate(agent: Agent, env: TensorEnv | OtherEnv, args: Args) -> dict[str, float]:
    """Mean return and length of the first episode of each environment in env: the most
    likely actions, a frozen normaliser, the same starts every time."""
    torch.manual_seed(args.seed)
    obs, totals = env.reset(), torch.zeros(2, device=args.device)
    running = torch.ones(len(obs), dtype=torch.bool, device=args.device)
    for s in range(env.time_limit):
        actions = agent.policy(in_pieces(agent.outputs, obs)).mode
        obs, rewards, terminated, truncated, _ = env.step(actions)
        totals += torch.stack([(rewards * running).sum(), running.sum()])
        running &= ~(terminated | truncated)
        if s % 50 == 49 and not running.any():
            break
    names = "eval/episode_return", "eval/episode_length"
    return dict(zip(names, (totals / len(obs)).tolist()))


# ----------------------------------- Run folder ---------------------------------------


def lock(run_dir: Path):
    """A file that no other process can lock while it is open here."""
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work in {run_dir}: wait for its end, or stop it")
    except OSError:  # a file system without locks
        pass
    return file


def open_run(args: Args, step: int):
    """Make the folder of a new run, or cut the logs of a resumed one after `step`.
    Returns its lock."""
    run_dir, here = Path(args.run_dir), Path(__file__).parent
    with blame(f"cannot open the run folder {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        locked = lock(run_dir)
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
        (run_dir / "args.new").write_text(json.dumps(about, indent=1))
        (run_dir / "args.new").replace(run_dir / "args.json")
    return locked


def write_logs(args: Args, metrics: dict, sample: dict) -> None:
    """Append to metrics.jsonl and samples.jsonl. If wandb fails, training goes on."""
    if RANK > 0:
        return
    with blame(f"cannot write to {args.run_dir}"):
        for name, record in (("metrics", metrics), ("samples", sample)):
            with Path(args.run_dir, f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": metrics["step"]} | record) + "\n")
    try:
        if args.track:
            import wandb

            if wandb.run is None:
                mode = "online" if wandb.api.api_key else "offline"
                mode = os.environ.get("WANDB_MODE", mode)
                how = dict(project=args.wandb_project, config=vars(args), mode=mode)
                name = Path(args.run_dir).name
                wandb.init(dir=args.run_dir, name=name, **how)
            wandb.log(metrics, step=metrics["step"])
    except Exception as e:
        args.track = False
        tqdm.write(f"wandb is off from here on: {e}")


def save_checkpoint(run_dir: Path, step: int, agent: Agent, env, live: dict) -> None:
    """Write checkpoint/ under a new name, then rename: one is complete at all times.
    All ranks call it, the first one writes."""
    mine = {k: x.cpu() for k, x in live.items()}, [x.cpu() for x in env.state]
    ranks = [mine] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(ranks, mine)
    if RANK > 0:
        return
    new, last, old = (run_dir / f"checkpoint{x}" for x in (".new", "", ".old"))
    try:
        with blame(f"cannot save step {step} in {run_dir} (the last save is whole)"):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            state = {"step": step, "agent": agent.state_dict(), "ranks": ranks}
            torch.save(state, new / "state.pt")
            for path in [*new.iterdir(), new]:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            if last.exists():
                shutil.rmtree(old, ignore_errors=True)
                last.rename(old)
            new.rename(last)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def draw_curve(run_dir: Path) -> None:
    """curve.png: the metrics whose names match CURVE, from metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    names = dict.fromkeys(name for record in records for name in record)
    names = [name for name in names if re.fullmatch(CURVE, name)]
    for name, style in zip(names, ["o-", "s--", "-", ":"]):
        points = [(r[AXIS], r[name]) for r in records if name in r]
        axes.plot(*zip(*points), style, markersize=4, label=name)
    low = 0 if axes.dataLim.ymin >= 0 else None
    title = run_dir.name.replace("$", r"\$")  # no mathematics
    axes.set(xlabel=AXIS, ylim=(low, None), title=title)
    axes.legend()
    with blame(f"cannot draw {run_dir}/curve.png"):
        axes.figure.savefig(run_dir / "curve.png", dpi=120)


# -------------------------------------- Main ------------------------------------------


def read_flags(default: Args | None = None) -> Args:
    """Parse the command line; a wrong flag gives one line instead of tyro's box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, default=default, description=__doc__.split("\n")[0])
    except SystemExit:
        if box.getvalue():  # not --help
            text = box.getvalue().partition("\n")[2]  # without the title
            fail(re.sub(r"[^ -~]|-{3,}", " ", text))  # nor the frame
        raise


def check(args: Args) -> None:
    """Reject invalid flags, and fill in --rollout-length."""
    may_be_0 = "seed", "ewma_com", "gamma", "gae_lambda", "value_coef", "entropy_coef"
    for name, value in vars(args).items():
        number, zero = type(value) in (int, float), value == 0 and name in may_be_0
        if number and not (zero or 0 < value < math.inf):  # nan is neither
            least = "at least" if name in may_be_0 else "above"
            fail(f"--{name.replace('_', '-')} is {value}: it must be {least} 0")
    if args.rollout_length is None:  # 32, or more for 8 minibatches; whole ones
        unit = args.minibatch_size // math.gcd(args.minibatch_size, args.num_envs)
        steps = max(32, 8 * args.minibatch_size / args.num_envs)
        args.rollout_length = math.ceil(steps / unit) * unit
        if args.rollout_length > 2 * steps and RANK == 0:
            why = f"--num-envs {args.num_envs} makes no whole minibatches before that"
            tqdm.write(f"--rollout-length is {args.rollout_length}: {why}")
    batch, (size, _) = args.num_envs * args.rollout_length, recipe(args)
    has = f"the batch of --num-envs x --rollout-length = {batch} transitions"
    for wrong, message in (
        (args.num_envs % WORLD_SIZE, f"{WORLD_SIZE} ranks do not divide --num-envs"),
        (max(args.gamma, args.gae_lambda) > 1, "--gamma, --gae-lambda: at most 1"),
        (args.clip >= 1, "--clip must be below 1"),
        (args.seed >= 2**23, "--seed must be below 2^23: larger ones repeat noise"),
        (args.ewma_from > 1 and not args.ewma_com, "--ewma-from needs --ewma-com"),
        (not 0 < size <= batch, f"minibatches of {size} are 0 or larger than {has}"),
        (size and batch % size, f"minibatches of {size} do not divide {has}"),
    ):
        if wrong:
            fail(message)


def parse_args() -> Args:
    """The flags, checked and completed; a resumed run keeps its saved ones."""
    args = read_flags()
    if args.resume:
        last, old = (Path(args.resume, f"checkpoint{x}") for x in ("", ".old"))
        with blame(f"{args.resume} holds no run to resume"):
            if old.exists() and not last.exists():  # killed between the two renames
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    old.rename(last)
            saved = json.loads(Path(args.resume, "args.json").read_text())["args"]
            if saved.keys() != vars(args).keys():
                raise ValueError("it is of another script or version, with other flags")
            saved = Args(**saved | {"resume": args.resume, "run_dir": args.resume})
            file = last / "state.pt"  # mapped: only its step is read
            done = torch.load(file, "cpu", weights_only=True, mmap=True)["step"]
        args, free = read_flags(saved), {"steps", "save_every", "track"}
        free |= {"micro_batch_size", "rollout_batch_size"}  # memory may have run out
        for name, value in vars(saved).items():
            if getattr(args, name) != value and name not in free:
                flag = f"--{name.replace('_', '-')}"
                fail(f"{flag} contradicts the run in {args.resume}: it has {value!r}")
        if args.steps <= done:
            fail(f"{args.resume} is at step {done} already: give a larger --steps")
    now = time.strftime("%Y%m%d-%H%M%S")
    args.run_dir = args.run_dir or f"runs/{Path(__file__).stem}/{now}-s{args.seed}"
    found = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]
    if args.device == "auto":
        args.device = found[0]
    if args.device not in found:
        how = "--resume it where there is" if args.resume else "use --device cpu"
        fail(f"there is no {args.device} here: {how}")
    with blame("the --run-dir cannot be used"):
        exists = Path(args.run_dir).exists()
    if exists and not args.resume:
        fail(f"{args.run_dir} exists: give another --run-dir, or --resume it")
    check(args)
    return args


def catch_stops() -> list[float]:
    """Let Ctrl-C and SIGTERM fill this list, so that the run can finish its step and
    save. One that comes 3 s after the first or later ends it at once; sooner ones may
    be the same stop, passed on by a scheduler and by torchrun."""
    stops = []

    def stop(*_):
        stops.append(time.monotonic())
        if stops[-1] - stops[0] > 3:
            sys.exit(130)
        if len(stops) == 1 and RANK == 0:
            with contextlib.suppress(OSError):  # print is not safe in here
                os.write(2, b"\nstopping after this step; after 3 s, again: at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stops


def join_ranks(args: Args) -> None:
    """Under torchrun: meet the other ranks, which must have the same flags."""
    if WORLD_SIZE == 1:
        return
    if args.device == "mps":
        fail("torchrun works with --device cuda and --device cpu")
    if args.device == "cuda":
        with blame("each rank needs a GPU of its own (or --device cpu)"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if args.device == "cuda" else "gloo"
    patience = datetime.timedelta(hours=2)  # the first rank may have to train a model
    with blame("WORLD_SIZE is set, but not by torchrun: use that, or unset it"):
        dist.init_process_group(backend, timeout=patience)
    flags = [None] * WORLD_SIZE
    dist.all_gather_object(flags, vars(args))
    args.run_dir = flags[0]["run_dir"]  # the ranks' clocks differ
    for name in [name for name in flags[0] if name != "run_dir"]:
        found = [*dict.fromkeys(x[name] for x in flags)]
        if len(found) > 1:
            fail(f"--{name.replace('_', '-')} differs between ranks: {found}")


def print_table(run_dir: Path) -> None:
    """The evaluations at the start and at the end, and where the run is."""
    logs = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    names = [name for name in logs[0] if name.startswith("eval/")]
    width = max(map(len, names))
    for name in names:
        base, trained = logs[0][name], logs[-1][name]
        print(f"{name:{width}}  base {base:.3f}  trained {trained:.3f}")
    print(f"run folder: {run_dir}")


def train(args: Args) -> int:
    """Act, find advantages, learn, log; evaluate and save every now and then."""
    choose_compile(args)
    torch.manual_seed(args.seed)
    test_env = make_env(dataclasses.replace(args, compile="off"), args.eval_episodes)
    env = make_env(args, args.num_envs, share(args.num_envs))
    agent = Agent(env, args).to(args.device)
    obs, batch = env.reset(), {}
    live = {"obs": obs, "episode": torch.zeros(2, len(obs), device=args.device)}
    run_dir, step, score, stops = Path(args.run_dir), 0, math.nan, catch_stops()
    if args.resume:
        path = run_dir / "checkpoint" / "state.pt"
        state = torch.load(path, args.device, weights_only=True)
        step, ranks = state["step"], state["ranks"]
        if len(ranks) != WORLD_SIZE:
            fail(f"{run_dir} is a run of {len(ranks)} ranks, not {WORLD_SIZE}")
        agent.load_state_dict(state["agent"])
        saved_live, saved_env = ranks[RANK]
        if saved_env:
            live, env.state = saved_live, saved_env
        else:  # gym:<id>: new episodes, other ones than at the start
            torch.manual_seed(args.seed * 10**9 + step)
            live["obs"] = env.reset()
    check_start(agent, step, args)
    if not args.resume:
        metrics = {"step": 0, "transitions": 0} | evaluate(agent, test_env, args)
        score = metrics["eval/episode_return"]
    if RANK == 0:  # after the evaluation, so that a failed one leaves no folder
        _lock = open_run(args, step)  # until this function returns
    if not args.resume:
        write_logs(args, metrics, {})
        save_checkpoint(run_dir, 0, agent, env, live)
    steps = range(step + 1, args.steps + 1)
    bar = tqdm(steps, initial=step, total=args.steps, disable=RANK > 0)
    for step in bar:
        torch.manual_seed(args.seed * 10**9 + step)  # so no RNG state is saved
        start = time.perf_counter()
        totals, clock = collect(agent, env, live, batch, args)
        names = "rewards", "values", "next_values", "terminated", "truncated"
        known = (batch[name] for name in names)
        batch["advantages"], batch["returns"] = gae(*known, args.gamma, args.gae_lambda)
        ewma_com = args.ewma_com if step >= args.ewma_from else 0.0
        stats = learn(agent, batch, dataclasses.replace(args, ewma_com=ewma_com))
        agent.see(batch["obs"].flatten(0, 1))
        transitions = step * args.num_envs * args.rollout_length
        metrics = {"step": step, "transitions": transitions}
        metrics |= describe(stats, totals, clock, start, batch)
        if "grad_norm" not in metrics:
            how = "start a new run with a lower --learning-rate"
            data = batch["obs"], batch["rewards"]
            bad = [float(not x.isfinite().all()) for x in data]
            if all_reduce(torch.tensor(bad, device=args.device)).any():  # of any rank
                how = "nor are all observations and rewards of the environments"
            fail(f"the gradient of step {step} is not finite, it is not saved: {how}")
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= evaluate(agent, test_env, args)
            score = metrics["eval/episode_return"]
        stop = all_reduce(torch.tensor(float(len(stops)), device=args.device)) > 0
        first = {name: batch[name][:, 0].tolist() for name in ("actions", "rewards")}
        write_logs(args, metrics, first)
        shown = {"return": metrics.get("episode_return", math.nan), "test": score}
        bar.set_postfix(shown | {"steps/s": metrics["steps_per_second"]})
        if step == steps[0] and RANK == 0:
            stored = [*batch.values(), *env.state, *live.values()]
            size = sum(x.nbytes for x in stored) // len(obs)
            tqdm.write(f"memory: {size:,} bytes of tensors per environment")
        if stop or step % args.save_every == 0 or step == args.steps:
            save_checkpoint(run_dir, step, agent, env, live)
            if RANK == 0:
                draw_curve(run_dir)
        if stop and step < args.steps:
            if RANK == 0:
                print(f"stopped after step {step}; to continue: --resume {run_dir}")
            return 130
    if RANK == 0:
        print_table(run_dir)
    return 0


def main() -> None:
    """The run that the command line asks for."""
    outlive_pipes()
    args = parse_args()
    join_ranks(args)
    try:
        code = train(args)
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        sys.exit(130)
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e)):
            raise  # a CPU's allocator has no exception of its own
        flags = "--num-envs, --rollout-length, --minibatch-size or --eval-episodes"
        fail(f"too little memory: start again with a lower {flags}: {e}")
    if WORLD_SIZE > 1:
        dist.barrier()  # a rank that leaves before the others makes them fail
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
