"""algos/ppo_envs.py: each test is named after the mistake it catches."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import load_script, metrics_of

NEEDS = "pip install -r benchmarks/requirements.txt"


@pytest.fixture(scope="module")
def ppo():
    """algos/ppo_envs.py as a module."""
    return load_script("ppo_envs")


def args_of(ppo, **changes):
    """Args as parse_args completes them."""
    known = dict(device="cpu", compile="off", rollout_length=32)
    return ppo.Args(**known | changes)


@pytest.fixture
def run(ppo, monkeypatch, tmp_path):
    """run(*flags): the script with these flags, in this process, in a folder of its
    own."""
    handlers = [
        (n, ppo.signal.getsignal(n)) for n in (ppo.signal.SIGINT, ppo.signal.SIGTERM)
    ]
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        small = ["--device", "cpu", "--eval-episodes", "4", "--env", "acrobot"]
        small += ["--hidden-size", "8", "--num-envs", "4", "--minibatch-size", "32"]
        flags = list(map(str, flags))
        monkeypatch.setattr(
            "sys.argv", ["ppo_envs.py"] + ("--resume" not in flags) * small + flags
        )
        ppo.train(ppo.parse_args())

    yield call
    for number, handler in handlers:
        ppo.signal.signal(number, handler)


@pytest.mark.parametrize("name", ["cartpole", "acrobot", "pendulum", "breakout"])
def test_dtype_of_an_environment_breaks_training(ppo, run, name):
    """Observations come in the smallest exact dtype: bool cannot be subtracted from, a
    float64 or int8 reward may not go into the loss. Each built-in environment trains,
    and the normaliser holds the moments of what was seen."""
    seen, real = [], ppo.Agent.see
    spy = lambda agent, obs: seen.append(obs.double()) or real(agent, obs)
    with mock.patch.object(ppo.Agent, "see", spy):
        run("--env", name, "--steps", 2, "--run-dir", "run", "--compile", "off")
    agent = torch.load("run/checkpoint/state.pt", weights_only=True)["agent"]
    seen = torch.cat(seen)
    torch.testing.assert_close(agent["mean"].double(), seen.mean(0))
    torch.testing.assert_close(agent["var"].double(), seen.var(0, correction=0))
    assert agent["theta"].isfinite().all() and agent["past"][0] > 0


@pytest.mark.parametrize("name, limit", [("cartpole", 500), ("pendulum", 200)])
def test_other_devices_have_other_targets(ppo, name, limit):
    """A GPU asks for the value of every final observation, so as not to wait for the
    rows where there is one; where the episode went on, the value of the next state was
    added to that. What is collected on a device that is not called "cpu" is the same,
    and each next value is V(final observation) at an end, else V(next observation),
    also after the last step of the batch."""
    batches = []
    for device in "cpu", "cpu:0":
        args = args_of(ppo, env=name, num_envs=48, seed=3, device=device)
        torch.manual_seed(0)
        env = ppo.make_env(dataclasses.replace(args, compile="off"), 48)
        agent = ppo.Agent(env, args)
        live, batch = {"obs": env.reset(), "episode": torch.zeros(2, 48)}, {}
        env.state[-1].copy_(limit - 1 - torch.arange(48))  # some reach the time limit
        torch.manual_seed(1)
        ppo.collect(agent, env, live, batch, args)
        batches.append(batch)
    for one in batches:
        one["next_values"] = one["next_values"] * ~one["terminated"]  # no part of GAE
    for key, wanted in batches[0].items():
        torch.testing.assert_close(batches[1][key], wanted, atol=1e-5, rtol=0)
    assert 10 < batch["truncated"].sum() < 48
    ended = (batch["terminated"] | batch["truncated"])[:-1]
    values, next_values = batch["values"][1:], batch["next_values"][:-1]
    torch.testing.assert_close(next_values[~ended], values[~ended])
    on = ~(batch["terminated"] | batch["truncated"])[-1]
    assert on.any()
    values = agent.value(live["obs"])
    torch.testing.assert_close(batch["next_values"][-1][on], values[on])


# ------------------------------------ Advantages --------------------------------------


def brute_force(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Advantages (S,) of one environment from the definition: the lambda-weighted mean
    of all n-step returns up to the episode's or the rollout's end."""
    advantages = []
    for s in range(len(rewards)):
        returns, gained, k = [], 0.0, s
        while True:
            gained += gamma ** (k - s) * rewards[k]
            tail = 0.0 if terminated[k] else gamma ** (k - s + 1) * next_values[k]
            returns.append(gained + tail)
            if terminated[k] or truncated[k] or k == len(rewards) - 1:
                break
            k += 1
        weights = [(1 - lam) * lam**n for n in range(len(returns) - 1)]
        weights.append(lam ** (len(returns) - 1))
        advantages.append(sum(w * g for w, g in zip(weights, returns)) - values[s])
    return torch.tensor(advantages, dtype=torch.float64)


def random_rollout(steps, envs, seed, share=0.15):
    """Random inputs of gae; next_values is V(obs at s + 1) unless the episode ends at
    s."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(steps, envs, generator=generator, dtype=torch.float64)
    cut = lambda: torch.rand(steps, envs, generator=generator) < share
    rewards, values, next_values, terminated, truncated = (
        draw(),
        draw(),
        draw(),
        cut(),
        cut(),
    )
    goes_on = ~(terminated | truncated)[:-1]
    next_values[:-1][goes_on] = values[1:][goes_on]
    return rewards, values, next_values, terminated, truncated


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_lambda_chain_crosses_an_episode_boundary(ppo, gamma, lam):
    """GAE that leaks over an end, or drops the bootstrap at a truncation, differs from
    the lambda-return by definition. https://github.com/vwxyzjn/cleanrl/issues/198"""
    rollout = random_rollout(40, 16, seed=0)
    advantages, returns = ppo.gae(*rollout, gamma, lam)
    for i in range(16):
        expected = brute_force(*(x[:, i].tolist() for x in rollout), gamma, lam)
        torch.testing.assert_close(advantages[:, i], expected)
    torch.testing.assert_close(returns, advantages + rollout[1])


def test_truncation_treated_as_termination(ppo):
    """A time limit is not a failure: the value of the last state counts.
    https://github.com/vwxyzjn/cleanrl/issues/198"""
    rewards = torch.ones(5, 1)
    values, after = torch.full((5, 1), 2.0), torch.full((5, 1), 7.0)
    at = lambda *steps: torch.tensor([[s in steps] for s in range(5)])
    advantages, _ = ppo.gae(rewards, values, after, at(1), at(3), 0.5, 0.5)
    delta = 1 + 0.5 * 7 - 2  # 2.5 wherever V(next) counts
    end = 1 - 2  # -1 at the termination
    expected = [delta + 0.25 * end, end, delta + 0.25 * delta, delta, delta]
    assert advantages[:, 0].tolist() == pytest.approx(expected)


def test_last_rollout_slot_is_lost(ppo):
    """Every advantage moves with its own reward, the last one's too.
    https://github.com/PufferAI/PufferLib/issues/363"""
    rewards, *rest = random_rollout(12, 3, seed=1)
    before, _ = ppo.gae(rewards, *rest, 0.99, 0.95)
    for s in range(12):
        nudged = rewards.clone()
        nudged[s] += 1e-3
        after, _ = ppo.gae(nudged, *rest, 0.99, 0.95)
        torch.testing.assert_close(
            after[s] - before[s], torch.full((3,), 1e-3).double()
        )


class Jumps:
    """Episodes of three steps, ended by turns by truncation and termination; the value
    of an observation is the observation, a thousand at each start of an episode."""

    num_envs, time_limit = 2, 3

    def __init__(self):
        self.count = 0

    def step(self, actions):
        self.count += 1
        ended = torch.full((2,), self.count % 3 == 0)
        terminated = ended & torch.full((2,), self.count % 6 == 0)
        final_obs = torch.full((2, 1), float(self.count % 3 or 3))
        obs = torch.where(ended[:, None], 1000.0, final_obs)
        return obs, torch.ones(2), terminated, ended & ~terminated, final_obs


class Identity:
    """An agent whose value of an observation is the observation."""

    value = staticmethod(lambda obs: obs[:, 0])
    noise = staticmethod(lambda num_envs: torch.rand(num_envs, 1))
    act = staticmethod(lambda obs, noise: (obs[:, 0].byte(), obs[:, 0] * 0, obs[:, 0]))


def test_autoreset_shows_the_next_episode_to_the_last_action(ppo):
    """Advantages of an episode's last action use the final observation, never the first
    of the next episode. https://github.com/vwxyzjn/cleanrl/issues/499"""
    args = args_of(ppo, rollout_length=9, num_envs=2)
    live = {"obs": torch.full((2, 1), 1000.0), "episode": torch.zeros(2, 2)}
    batch = {}
    totals, _ = ppo.collect(Identity(), Jumps(), live, batch, args)
    assert batch["values"][:, 0].tolist() == [1000, 1, 2] * 3
    assert batch["next_values"][[0, 1, 2, 3, 4, 6, 7, 8], 0].tolist() == [
        1,
        2,
        3,
        1,
        2,
        1,
        2,
        3,
    ]
    assert batch["terminated"][:, 0].nonzero().flatten().tolist() == [5]
    assert batch["truncated"][:, 0].nonzero().flatten().tolist() == [2, 8]
    names = "rewards", "values", "next_values", "terminated", "truncated"
    advantages, _ = ppo.gae(*(batch[x] for x in names), 0.5, 0.5)
    assert advantages[[2, 5], 0].tolist() == [1 + 0.5 * 3 - 2, 1 - 2]
    assert totals.tolist() == [18, 18, 6]  # return and length over all 6 episodes


# --------------------------------------- Loss -----------------------------------------


def test_clip_has_the_wrong_sign_or_anchor(ppo):
    """Loss and gradient against the objective written out in float64, transition by
    transition. https://github.com/walkinglabs/hands-on-modern-rl/issues/75"""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(500, generator=generator, dtype=torch.float64)
    new, old, prox, advantages = 0.3 * draw(), 0.3 * draw(), 0.3 * draw(), draw()
    new.requires_grad_()
    losses, clipped = ppo.ppo_loss(new, old, prox, advantages, 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    for i, (n, o, p, a) in enumerate(
        zip(*(x.tolist() for x in (new, old, prox, advantages)))
    ):
        rho, ratio = math.exp(n - o), math.exp(n - p)
        bounded = min(max(ratio, 0.8), 1.2) * math.exp(p - o)
        assert losses[i].item() == pytest.approx(-min(rho * a, bounded * a), abs=1e-12)
        cut = ratio > 1.2 if a > 0 else ratio < 0.8
        assert clipped[i].item() == cut
        assert gradient[i].item() == pytest.approx(0 if cut else -rho * a, abs=1e-12)


def test_ewma_with_com_0_is_not_ppo(ppo):
    """pi_prox = pi_b gives PPO's loss and gradient, bit for bit (arXiv 2110.00641)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4096, generator=generator)
    new, old, advantages = 0.3 * draw(), 0.3 * draw(), draw()
    results = []
    for plain in (True, False):
        x = new.clone().requires_grad_()
        ratio = (x - old).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = loss if plain else ppo.ppo_loss(x, old, old, advantages, 0.2)[0]
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    agent, batch, args = learner(ppo)  # --ewma-com is 0: no other weights take part
    names = "obs", "actions", "logprobs", "values", "next_values"
    data = agent.theta, *(batch[name].flatten(0, 1) for name in names)
    before = ppo.total_loss(agent, args, *data)[1]
    agent.proximal.normal_(generator=generator)
    assert torch.equal(ppo.total_loss(agent, args, *data)[1], before)


def test_ewma_weights_are_not_the_recursion(ppo):
    """The k steps old weights count beta^k / sum of beta^j, from the first step on
    (Hilton et al., arXiv 2110.00641); the age is the mean of k."""
    com, history = 3.0, [torch.randn(7, dtype=torch.float64) for _ in range(20)]
    number = lambda value: torch.tensor(value, dtype=torch.float64)
    average, total, age = history[0].clone(), number(1.0), number(0.0)
    for t in range(1, 20):
        total, age = ppo.ewma_update(average, history[t], total, age, com)
        shares = torch.tensor([0.75 ** (t - k) for k in range(t + 1)]).double()
        shares /= shares.sum()
        expected = sum(w * x for w, x in zip(shares, history))
        torch.testing.assert_close(average, expected)
        mean = sum(w * (t - k) for k, w in enumerate(shares.tolist()))
        assert age.item() == pytest.approx(mean, rel=1e-6)
    for _ in range(200):
        total, age = ppo.ewma_update(average, history[0], total, age, com)
    assert age.item() == pytest.approx(com)  # beta / (1 - beta)


def learner(ppo, **changes):
    """An agent and a small batch that it acted: agent, batch, args."""
    small = dict(env="acrobot", num_envs=16, minibatch_size=64, hidden_size=8)
    args = args_of(ppo, **small | dict(learning_rate=1e-2) | changes)
    torch.manual_seed(0)
    env, batch = ppo.make_env(args, args.num_envs), {}
    agent = ppo.Agent(env, args)
    live = {"obs": env.reset(), "episode": torch.zeros(2, args.num_envs)}
    ppo.collect(agent, env, live, batch, args)
    add_advantages(ppo, batch, args)
    torch.manual_seed(1)
    return agent, batch, args


def add_advantages(ppo, batch, args):
    """As train does before it learns."""
    names = "rewards", "values", "next_values", "terminated", "truncated"
    found = ppo.gae(*(batch[x] for x in names), args.gamma, args.gae_lambda)
    batch["advantages"], batch["returns"] = found


@pytest.mark.parametrize("small", [24, 5])  # of 64, and of 16 environments
def test_large_minibatch_in_pieces_has_another_gradient(ppo, monkeypatch, small):
    """What is acted, and the weights after a batch, do not depend on the size of the
    pieces they are walked in. https://github.com/verl-project/verl/issues/906"""
    results = []
    for size in (2**13, small):
        monkeypatch.setitem(ppo.PIECE, "cpu", size)
        agent, batch, args = learner(ppo)
        acted = {name: x.clone() for name, x in batch.items()}
        stats = ppo.learn(agent, batch, args)
        results.append([acted, agent.theta, stats["grad_norm"]])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    assert stats["ddr"] == 512 / stats["kl"]


@pytest.fixture
def float64():
    """Everything in float64, so that only a mistake makes a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("max_norm", [0.2, 1e3])  # always, and never clipped
def test_step_is_not_that_of_clipped_adam(ppo, float64, max_norm):
    """Weights after four epochs are those of torch's own autograd, clip_grad_norm_ and
    Adam on networks of torch.nn, minibatch after minibatch, of observations that are
    normalised by hand; and so are the statistics on the way there. The noise scale is
    of the first epoch: in later ones the weights know the data."""
    weights = dict(value_coef=0.7, entropy_coef=1.0)
    agent, batch, args = learner(ppo, max_grad_norm=max_norm, **weights)
    agent.mean.copy_(torch.linspace(-0.5, 0.5, 6))
    agent.var.copy_(torch.tensor([0.1, 1e-6, 0.3, 0.2, 2.0, 4.0]))
    agent.theta[agent.parts[0] - 27 : agent.parts[0]] *= 100  # no uniform policy
    layer, tanh = torch.nn.Linear, torch.nn.Tanh
    nets = [
        torch.nn.Sequential(layer(6, 8), tanh(), layer(8, 8), tanh(), layer(8, n))
        for n in (3, 1)
    ]
    weights, place = [p for net in nets for p in net.parameters()], 0
    for p in weights:  # theta has the matrices as inputs x outputs
        x = agent.theta[place : place + p.numel()].clone()
        p.data = x.view(p.shape[::-1]).T if p.ndim == 2 else x
        place += p.numel()
    optimizer = torch.optim.Adam(weights, args.learning_rate, eps=1e-5)
    advantages, returns = batch["advantages"].clone(), batch["returns"]
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    rows = lambda x: x.flatten(0, 1)
    obs, actions, old = (rows(batch[x]) for x in ("obs", "actions", "logprobs"))
    obs = ((obs.double() - agent.mean) / (agent.var + 1e-8).sqrt()).clamp(-10, 10)
    assert (obs.abs() == 10).any() and (obs.abs() < 10).any(0)[[0, 2, 3, 4, 5]].all()
    agent.last.fill_(1.0)  # what an earlier batch has left
    torch.manual_seed(1)
    stats, norms = ppo.learn(agent, batch, args), []
    found, noise = [], torch.zeros(2)
    torch.manual_seed(1)
    for epoch in range(args.epochs):
        last = None
        for i in torch.randperm(512).split(64):
            logprobs = nets[0](obs[i]).log_softmax(-1)
            ratio = (logprobs.gather(1, actions[i, None].long())[:, 0] - old[i]).exp()
            a = rows(advantages)[i]
            gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
            errors = (nets[1](obs[i])[:, 0] - rows(returns)[i]) ** 2
            optimizer.zero_grad()
            entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
            (0.35 * errors.mean() - gain - entropy).backward()
            gradient = torch.cat([p.grad.flatten() for p in nets[0].parameters()])
            if last is not None and epoch == 0:  # 64 |g - g'|^2 / 2 and g.g'
                spread = ((gradient - last) ** 2).sum() / 2
                noise += torch.stack([64 * spread, gradient @ last])
            last = gradient
            out = torch.where(a > 0, ratio > 1.2, ratio < 0.8).double().mean()
            found.append(torch.stack([-gain, errors.mean() / 2, entropy, out]).detach())
            norms.append(torch.nn.utils.clip_grad_norm_(weights, max_norm))
            optimizer.step()
    expected = torch.cat([(p.T if p.ndim == 2 else p).flatten() for p in weights])
    torch.testing.assert_close(agent.theta, expected.detach(), atol=1e-6, rtol=0)
    assert stats["grad_norm"].item() == pytest.approx(sum(norms).item() / 32, rel=1e-6)
    names = "policy_loss", "value_loss", "entropy", "clip_fraction"
    wanted = dict(zip(names, torch.stack(found).mean(0).tolist()))
    wanted["gradient_noise_scale"] = (noise[0] / noise[1]).item()
    left = (returns - batch["values"]).var() / returns.var()
    wanted["explained_variance"] = 1 - left.item()
    got = {name: stats[name].item() for name in wanted}
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert got["clip_fraction"] > 0.01 and noise[1] > 0


@pytest.mark.parametrize("changes", [{}, dict(env="pendulum", ewma_com=2.0)])
def test_compiled_graph_computes_something_else(ppo, changes, float64):
    """--compile on acts, steps and learns as --compile off does, to rounding."""
    results = []
    for mode in "off", "on":
        agent, batch, args = learner(ppo, compile=mode, epochs=1, **changes)
        stats = ppo.learn(agent, batch, args)
        results.append([agent.state_dict(), batch, stats])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_cuda_graphs_are_off_or_in_pieces_and_nobody_says_so(
    ppo, run, monkeypatch, tmp_path
):
    """What wraps the graphs of a GPU, around a compiler that only records: the trial at
    the start finds nothing wrong, each function is one graph, and the run is that
    without it."""
    compile, compiled, last = torch.compile, ppo.compiled, []
    one_graph = lambda f, **_: compile(f, backend="eager", fullgraph=True)
    as_on_a_gpu = lambda f, args: compiled(f, dataclasses.replace(args, device="cuda"))
    for mode in "off", "on":
        monkeypatch.setattr(ppo.torch, "compile", one_graph)
        monkeypatch.setattr(ppo, "compiled", as_on_a_gpu)
        run("--compile", mode, "--steps", 2, "--run-dir", mode)
        args = json.loads((tmp_path / mode / "args.json").read_text())["args"]
        assert args["compile"] == mode
        last.append(metrics_of(tmp_path / mode)[-1])
    off, on = ({k: x[k] for k in ("policy_loss", "kl", "grad_norm")} for x in last)
    assert on == pytest.approx(off, rel=1e-6)


def test_kl_is_measured_in_the_other_direction(ppo):
    """KL(behaviour || updated) over the batch, by enumeration of the actions; plain
    PPO's anchor is on average (updates - 1) / 2 gradient steps old."""
    agent, batch, args = learner(ppo)
    logits = lambda: agent.outputs(batch["obs"].flatten(0, 1)).double().log_softmax(-1)
    before = logits()
    stats = ppo.learn(agent, batch, args)
    expected = (before.exp() * (before - logits())).sum(-1).mean()
    assert stats["kl"].item() == pytest.approx(expected.item(), rel=1e-3)
    again = ppo.learn(agent, batch, args)  # a new batch, a new anchor
    for x in stats, again:
        assert x["proximal_age"].item() == (4 * 512 / 64 - 1) / 2


def test_cut_of_the_outer_step_acts_too_early_or_on_an_old_anchor(ppo, run):
    """--ewma-from 3: two steps of plain PPO, bit for bit, then an average that starts
    from the policy of that moment: its mean age in step 3 is that of a recursion from
    age 0 on, and a resume in between changes nothing."""
    small = "--env", "cartpole", "--minibatch-size", "64", "--save-every", 1
    run(*small, "--steps", 4, "--run-dir", "plain")
    run(*small, "--ewma-com", 2, "--steps", 4, "--run-dir", "always")
    cut = *small, "--ewma-com", 2, "--ewma-from", 3
    run(*cut, "--steps", 4, "--run-dir", "cut")
    run(*cut, "--steps", 2, "--run-dir", "resumed")
    run("--resume", "resumed", "--steps", 4)
    names = "policy_loss", "value_loss", "kl", "grad_norm", "proximal_age"
    curves = {
        name: [[line.get(x) for x in names] for line in metrics_of(Path(name))[1:]]
        for name in ("plain", "always", "cut", "resumed")
    }
    assert curves["cut"][:2] == curves["plain"][:2] != curves["always"][:2]
    assert curves["cut"][2][2] != curves["plain"][2][2]
    assert curves["cut"] == curves["resumed"]
    total, age, ages = 1.0, 0.0, []
    updates = json.loads(Path("cut/args.json").read_text())["args"]
    updates = updates["rollout_length"] * updates["num_envs"] // 64 * 4
    for _ in range(updates):  # the age that each update of step 3 begins with
        ages.append(age)
        total = total * 2 / 3 + 1
        age = (age + 1) * (1 - 1 / total)
    assert curves["cut"][2][4] == pytest.approx(sum(ages) / updates, rel=1e-4)


def test_ewma_anchor_never_moves(ppo):
    """With --ewma-com the proximal weights follow the learner's and change the
    result."""
    plain, ewma = learner(ppo), learner(ppo, ewma_com=2.0)
    start = ewma[0].proximal.clone()
    for agent, batch, args in (plain, ewma):
        torch.manual_seed(1)
        stats = ppo.learn(agent, batch, args)
    weights = [x[0].theta[: len(start)] for x in (plain, ewma)]
    assert not torch.equal(*weights)
    assert plain[0].proximal.equal(weights[0])  # where --ewma-from starts from
    assert 0 < (ewma[0].proximal - weights[1]).norm() < (start - weights[1]).norm()
    assert 1 < stats["proximal_age"] < 2


def test_actions_are_not_drawn_from_the_policy(ppo):
    """Frequencies over many draws equal the probabilities, and the log-probs are the
    actions' own, for both kinds of actions."""
    agent, batch, _ = learner(ppo)
    agent.theta.mul_(3)
    obs = batch["obs"][:1, 0].expand(100_000, -1)
    actions, logprobs, _ = agent.act(obs, agent.noise(100_000))
    expected = agent.outputs(obs[:1])[0].log_softmax(-1)
    torch.testing.assert_close(logprobs, expected[actions.long()])
    shares = actions.long().bincount(minlength=3) / 100_000
    assert (shares - expected.exp()).abs().max() < 0.01 and actions.dtype == torch.uint8
    agent, batch, _ = learner(ppo, env="pendulum")
    agent.theta[agent.parts[0] - 1] = -1.0  # log of the deviation, but for a little
    obs = batch["obs"][:1, 0].expand(100_000, -1)
    actions, logprobs, _ = agent.act(obs, agent.noise(100_000))
    mean, log_std = agent.outputs(obs[:1])[0]
    z = (actions[:, 0] - mean) / log_std.exp()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    expected = -(z**2) / 2 - log_std - math.log(2 * math.pi) / 2
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_one_number_of_an_action_is_taken_for_the_whole(ppo):
    """An action of three numbers has three means and three log deviations, the sum of
    three log-probs and of three entropies."""
    _, batch, args = learner(ppo, env="pendulum")
    env, obs = ppo.make_env(args, args.num_envs), batch["obs"][0]
    env.outputs = 6
    agent = ppo.Agent(env, args)
    agent.theta.normal_(0, 0.5)
    outputs, noise = agent.outputs(obs), agent.noise(len(obs))
    actions, logprobs, _ = agent.act(obs, noise)
    means, log_std = outputs[:, :3], outputs[:, 3:]
    torch.testing.assert_close(actions, means + log_std.exp() * noise)
    expected = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
    torch.testing.assert_close(logprobs, expected.sum(-1), atol=1e-5, rtol=1e-5)
    expected = (log_std + math.log(2 * math.pi * math.e) / 2).sum(-1)
    torch.testing.assert_close(agent.policy(outputs).entropy(), expected)


# -------------------------------------- Recipe ----------------------------------------


def test_minibatch_grows_with_num_envs(ppo):
    """More environments: more minibatches of the same size at the same learning rate;
    the wrong arms of arXiv 2603.06009 only on request."""
    for num_envs in (1, 64, 4096, 2**20):
        args = args_of(ppo, num_envs=num_envs)
        assert (
            ppo.recipe(args) == (512, 1e-3) == (args.minibatch_size, args.learning_rate)
        )
    wrong = args_of(ppo, num_envs=1024, scaling="minibatch-size")
    assert ppo.recipe(wrong) == (2048, 1e-3)
    wrong.scaling = "minibatch-size-sqrt-lr"
    assert ppo.recipe(wrong) == (2048, pytest.approx(2e-3))


@pytest.mark.parametrize("block", [1, 16])
def test_shuffle_loses_transitions(ppo, block, monkeypatch):
    """Each epoch shows each transition once, whole, in minibatches of the given
    size."""
    agent, batch, args = learner(ppo, epochs=2)
    batch["logprobs"] = torch.arange(512.0).view(32, 16)  # a name for each transition
    batch["obs"][..., 0] = batch["logprobs"]
    seen, gcd, loss = [], math.gcd, ppo.total_loss
    monkeypatch.setattr(ppo.math, "gcd", lambda *x: block if len(x) == 3 else gcd(*x))

    def spy(agent, args, theta, obs, actions, logprobs, *rest):
        assert torch.equal(obs[:, 0], logprobs)
        seen.append(logprobs)
        return loss(agent, args, theta, obs * 0, actions, logprobs * 0, *rest)

    monkeypatch.setattr(ppo, "total_loss", spy)
    ppo.learn(agent, batch, args)
    assert [len(x) for x in seen] == [64] * 16
    for epoch in (torch.cat(seen[:8]), torch.cat(seen[8:])):
        assert epoch.sort()[0].tolist() == list(range(512))
        assert epoch.tolist() != list(range(512))


def test_blocks_of_two_ranks_overlap(ppo, monkeypatch):
    """In a batch so large that it is shuffled in blocks of neighbours, a block lies in
    one rank's environments: the ranks take every transition once between them."""
    agent, whole, args = learner(ppo, num_envs=12, minibatch_size=48, epochs=1)
    gcd, taken = math.gcd, []
    large = lambda *x: gcd(*x[:2], 16) if len(x) == 3 else gcd(*x)
    monkeypatch.setattr(ppo.math, "gcd", large)
    whole["logprobs"] = torch.arange(384.0).view(32, 12)  # as names
    agent.graphs = [lambda _, args, obs, actions, names, *__: taken.append(names)] * 2
    monkeypatch.setattr(ppo, "all_reduce", lambda x, *_: x)
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    for rank in 0, 1:
        monkeypatch.setattr(ppo, "RANK", rank)
        own = {name: x[:, ppo.share(12)].clone() for name, x in whole.items()}
        torch.manual_seed(1)
        ppo.learn(agent, own, args)
    assert torch.cat(taken).sort()[0].tolist() == [*range(384)]


def test_storage_is_wider_than_the_data(ppo):
    """A transition takes the smallest exact dtype of each field: a million environments
    depend on it."""
    _, batch, _ = learner(ppo)
    sizes = {name: x.element_size() for name, x in batch.items()}
    narrow = dict(actions=1, rewards=1, terminated=1, truncated=1)
    wide = "obs", "logprobs", "values", "next_values", "advantages", "returns"
    assert sizes == narrow | dict.fromkeys(wide, 4)
    env = ppo.make_env(args_of(ppo, env="breakout"), 3)
    assert env.reset().dtype == torch.bool and env.state[0].dtype == torch.int8


# ------------------------------------ Normaliser --------------------------------------


def test_second_episode_is_evaluated(ppo):
    """An evaluation is the mean over the first episode of each environment, whether it
    ended or was cut, under the likeliest actions."""

    def step(actions):
        env.s += 1
        assert actions.tolist() == [1, 1, 1]
        ends = env.s % torch.tensor([1, 2, 3]) == 0
        first = torch.tensor([True, False, False])
        return obs, torch.full((3,), float(env.s)), ends & first, ends & ~first, obs

    obs, env = torch.zeros(3, 1), SimpleNamespace(s=0, time_limit=60, step=step)
    env.reset = lambda: obs
    near = torch.tensor([0, 0.1])  # a draw would often be another
    policy = lambda x: torch.distributions.Categorical(logits=x + near)
    agent = SimpleNamespace(outputs=lambda x: x.expand(-1, 2), policy=policy)
    found = ppo.evaluate(agent, env, args_of(ppo))
    assert found["eval/episode_return"] == pytest.approx((1 + 3 + 6) / 3)
    assert found["eval/episode_length"] == 2


def test_evaluation_has_its_own_luck(ppo):
    """Evaluations that draw other starts each time differ though nothing was learnt."""
    agent, _, args = learner(ppo, env="pendulum")
    env = ppo.make_env(args, 4)
    assert not torch.equal(env.reset(), env.reset())
    assert ppo.evaluate(agent, env, args) == ppo.evaluate(agent, env, args)


def test_length_is_logged_as_return(ppo):
    """Totals are returns, lengths and counts of the episodes that ended; times are
    those of the environments and of all else."""
    totals, batch = torch.tensor([6.0, 30.0, 3.0]), {"rewards": torch.zeros(4, 2)}
    clock = [(0.0, 1.0, 3.0), (3.0, 3.0, 3.0)]
    found = ppo.describe({"kl": torch.tensor(1.0)}, totals, clock, 0.0, batch)
    names = "episode_return", "episode_length", "episodes", "env_steps_per_second"
    assert [found[x] for x in names] == [2, 10, 3, 4]


def test_normaliser_is_not_saved_or_not_frozen(ppo, tmp_path):
    """Actions after save and load are identical; evaluation leaves the normaliser
    alone. https://github.com/vwxyzjn/cleanrl/issues/556"""
    agent, batch, args = learner(ppo)
    obs = 3 + 5 * batch["obs"].flatten(0, 1)
    agent.see(obs[:100])
    agent.see(obs[100:])
    torch.testing.assert_close(agent.mean, obs.mean(0))
    torch.testing.assert_close(agent.var, obs.var(0, correction=0))
    env = ppo.make_env(args, 4)
    live = {"obs": env.reset(), "episode": torch.zeros(2, 4)}
    ppo.save_checkpoint(tmp_path, 1, agent, env, live)
    other = ppo.Agent(env, args)
    saved = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    other.load_state_dict(saved["agent"])
    noise = agent.noise(len(obs))
    results = [x.act(obs, noise) for x in (agent, other)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    scores = [ppo.evaluate(agent, env, args) for _ in range(2)]
    assert scores[0] == scores[1]
    assert all(torch.equal(before[k], v) for k, v in agent.state_dict().items())


# ----------------------------------- Environments -------------------------------------


def random_states(kind):
    draw = lambda *scale: (
        torch.randn(len(scale), 10_000).double() * torch.tensor(scale)[:, None]
    )
    torch.manual_seed(0)
    if kind == "cartpole":
        return draw(1.2, 1.0, 0.12, 1.0), torch.randint(
            0, 2, (10_000,), dtype=torch.uint8
        )
    if kind == "acrobot":
        state = draw(2.0, 2.0, 4.0, 8.0)
        state[:2] = state[:2].clamp(-3.14, 3.14)
        return state, torch.randint(0, 3, (10_000,), dtype=torch.uint8)
    return draw(4.0, 4.0), 1.5 * torch.randn(10_000, 1)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("cartpole", "CartPole-v1"),
        ("acrobot", "Acrobot-v1"),
        ("pendulum", "Pendulum-v1"),
    ],
)
def test_dynamics_differ_from_gymnasium(ppo, kind, name):
    """10,000 random transitions: state, observation, reward and end as in gymnasium."""
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)
    state, actions = random_states(kind)
    rules, env = ppo.BUILT_IN[kind], gymnasium.make(name).unwrapped
    after, rewards, terminated = rules.step(state, actions, None)
    obs, expected = rules.observe(after), []
    env.reset(seed=0)
    for before, action in zip(state.T.numpy(), actions.numpy()):
        env.state = before.copy()
        env.steps_beyond_terminated = None
        o, r, end, _, _ = env.step(action if action.ndim else int(action))
        expected.append((np.array(env.state, dtype=np.float64), o, r, end))
    states, observations, gains, ends = (np.stack(x) for x in zip(*expected))
    np.testing.assert_allclose(after.T.numpy(), states, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(obs.numpy(), observations, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rewards.numpy(), gains, rtol=1e-6, atol=1e-6)
    assert (terminated.numpy() == ends).all() and obs.dtype == torch.float32
    assert kind == "pendulum" or 0.02 < ends.mean() < 0.9
    assert rules.time_limit == gymnasium.spec(name).max_episode_steps
    starts = rules.reset(torch.rand(rules.noise_size, 10_000).double())
    own = np.stack([(env.reset(seed=i), env.state)[1] for i in range(500)], 1)
    np.testing.assert_allclose(starts.min(1)[0], own.min(1), atol=0.03 * np.ptp(own))
    np.testing.assert_allclose(starts.max(1)[0], own.max(1), atol=0.03 * np.ptp(own))


def test_time_limit_or_reset_is_off_by_one(ppo):
    """Whole episodes beside gymnasium, step by step, through terminations, truncations
    at 500 and resets. https://github.com/vwxyzjn/cleanrl/issues/499"""
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)
    env, twin = ppo.make_env(args_of(ppo), 2), gymnasium.make("CartPole-v1")
    torch.manual_seed(0)
    obs = env.reset()
    twin.reset()
    twin.unwrapped.state = env.state[0][:, 0].numpy()
    ends = []
    for t in range(1300):
        # a hand-made controller keeps the pole up for the first 1,000 steps
        upright = (
            obs[:, 2] + 0.5 * obs[:, 3] + 0.02 * obs[:, 0] + 0.1 * obs[:, 1] > 0
        ).byte()
        actions = upright if t < 1000 else torch.randint(0, 2, (2,), dtype=torch.uint8)
        obs, rewards, terminated, truncated, final_obs = env.step(actions)
        o, r, end, cut, _ = twin.step(int(actions[0]))
        assert (r, end, cut) == (rewards[0], terminated[0], truncated[0])
        np.testing.assert_allclose(final_obs[0], o, rtol=1e-5, atol=1e-6)
        same = obs[0] == final_obs[0]
        assert same.all() != (end or cut)
        if end or cut:
            ends.append(cut)
            twin.reset()
            twin.unwrapped.state = env.state[0][:, 0].numpy()
            assert obs[0].abs().max() <= 0.05
    assert True in ends and False in ends


def test_breakout_differs_from_minatar(ppo):
    """10,000 random transitions of 20 games: observation, reward and end as in the
    minatar package, resets, sticky actions and cleared walls included."""
    minatar = pytest.importorskip("minatar", reason=NEEDS)
    twins = [minatar.Environment("breakout", sticky_action_prob=0.0) for _ in range(20)]
    rules = ppo.BUILT_IN["breakout"]
    torch.manual_seed(0)
    state, total, walls = rules.reset(torch.rand(2, 20)), 0, 0
    for i, twin in enumerate(twins):
        twin.env.ball_x, twin.env.ball_dir = state[0, i].item(), state[2, i].item()
        twin.env.last_x = twin.env.ball_x
        twin.env.brick_map[1:4] = 0
        twin.env.brick_map[1 + i % 3, i % 10] = 1  # nearly cleared
        state[8:, i] = (
            torch.from_numpy(twin.env.brick_map[1:4]).flatten().to(torch.int8)
        )
    for _ in range(500):
        noise, actions = (
            torch.rand(2, 20),
            torch.randint(0, 3, (20,), dtype=torch.uint8),
        )
        follow = torch.rand(20) < 0.8  # the paddle goes where the ball will be
        goal = (state[0] + torch.where((state[2] == 1) | (state[2] == 2), 1, -1)).clamp(
            0, 9
        )
        chase = torch.where(
            goal < state[3], 1, torch.where(goal > state[3], 2, 0)
        ).byte()
        actions = torch.where(follow, chase, actions)
        taken = torch.where(noise[1] < 0.1, state[7], actions.to(torch.int8))
        state, rewards, terminated = rules.step(state, actions, noise)
        seen = rules.observe(state).view(20, 10, 10, 4).numpy()
        for i, twin in enumerate(twins):
            bricks = twin.env.brick_map.sum()
            r, end = twin.act([0, 1, 3][taken[i]])
            walls += twin.env.brick_map.sum() > bricks
            assert (r, end) == (rewards[i], terminated[i]) and (
                twin.state() == seen[i]
            ).all()
            total += r
            if end:
                twin.reset()
                fresh = rules.reset(torch.rand(2, 1))[:, 0]
                twin.env.ball_x, twin.env.ball_dir = fresh[0].item(), fresh[2].item()
                twin.env.last_x = twin.env.ball_x
                state[:, i] = fresh
    assert total > 100 and walls > 3
    assert (rules.observe(state).view(20, 10, 10, 4).sum((1, 2))[:, :2] == 1).all()


def test_breakout_starts_on_one_side_only(ppo):
    """MinAtar starts the ball left or right with equal chance, and repeats actions."""
    env = ppo.make_env(args_of(ppo, env="breakout"), 4096)
    torch.manual_seed(0)
    env.reset()
    state = env.state[0]
    assert 0.45 < (state[0] == 0).float().mean() < 0.55
    assert ((state[0] == 0) == (state[2] == 2)).all()
    env.step(torch.full((4096,), 2, dtype=torch.uint8))
    assert 0.07 < (env.state[0][3] == 4).float().mean() < 0.13


def test_gymnasium_autoreset_is_off_by_one(ppo):
    """gym:<id>: each step is a real one, final_obs the episode's last observation and
    obs the next one's first. https://github.com/vwxyzjn/cleanrl/issues/499"""
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)
    env = ppo.make_env(args_of(ppo, env="gym:CartPole-v1"), 3)
    torch.manual_seed(0)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(0)
    obs, ends = env.reset(), 0
    twin = gymnasium.make("CartPole-v1")
    torch.testing.assert_close(obs[0], torch.from_numpy(twin.reset(seed=seed)[0]))
    for _ in range(200):
        actions = torch.randint(0, 2, (3,), dtype=torch.uint8)
        obs, rewards, terminated, truncated, final_obs = env.step(actions)
        o, r, end, cut, _ = twin.step(int(actions[0]))
        assert np.array_equal(final_obs[0], o) and rewards[0] == r == 1
        assert (terminated[0], truncated[0]) == (end, cut)
        o = twin.reset()[0] if end or cut else o
        assert np.array_equal(obs[0], o)
        ends += end
    assert ends > 3 and (env.obs_size, env.outputs, env.discrete) == (4, 2, True)
    env = ppo.make_env(args_of(ppo, env="gym:Pendulum-v1"), 3)
    env.reset()
    advance, taken = env.advance, []
    env.advance = lambda *x: (taken.append(x[-1]), advance(*x))[1]
    obs, rewards, *_ = env.step(torch.tensor([[50.0], [-50.0], [0.5]]))
    assert obs.shape == (3, 3) and rewards.shape == (3,) and env.outputs == 2
    assert taken[0].tolist() == [[2.0], [-2.0], [0.5]]  # not each clips by itself


def test_wide_observations_are_stored(ppo):
    """gym: observations in float64, as MuJoCo's, double the memory, and a Mac's GPU
    has no such numbers: they come in float32. Others stay as they are."""
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)

    class Wide(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2)

        def __init__(self, kind):
            self.observation_space = gymnasium.spaces.Box(0, 9, (3,), kind)
            self.seen = np.full(3, 1, kind)

        def reset(self, seed=None, options=None):
            return self.seen, {}

        def step(self, action):
            return self.seen, 1.0, True, False, {}

    for kind, wanted in ((np.float64, torch.float32), (np.uint8, torch.uint8)):
        with mock.patch.dict(gymnasium.registry):
            gymnasium.register("Wide-v0", lambda kind=kind: Wide(kind))
            env = ppo.make_env(args_of(ppo, env="gym:Wide-v0"), 2)
            obs, rewards, _, _, final_obs = (
                env.reset(),
                *env.step(torch.zeros(2, dtype=torch.uint8))[1:],
            )
        assert obs.dtype == final_obs.dtype == wanted and rewards.dtype == torch.float32


def test_space_that_cannot_be_used_is_a_traceback(ppo, capsys):
    """Observations of one number have no axis to flatten: they are (N, 1). Whole-number
    Box actions would be given as floats: one line says that they are not for us."""
    gymnasium = pytest.importorskip("gymnasium", reason=NEEDS)
    box = gymnasium.spaces.Box

    class One(gymnasium.Env):
        observation_space = box(-1, 1, ())

        def __init__(self, kind):
            self.action_space = box(-3, 3, (2,), kind)

        def reset(self, seed=None, options=None):
            return np.float32(0.5), {}

        def step(self, action):
            return np.float32(0.25), 1.0, False, False, {}

    for kind in np.float32, np.int32:
        with mock.patch.dict(gymnasium.registry):
            gymnasium.register("One-v0", lambda kind=kind: One(kind))
            args = args_of(ppo, env="gym:One-v0")
            if kind == np.int32:
                with pytest.raises(SystemExit) as stop:
                    ppo.make_env(args, 2)
                assert stop.value.code == 2
                assert "Box actions of whole numbers" in capsys.readouterr().err
                continue
            env = ppo.make_env(args, 2)
            obs, *_, final_obs = env.reset(), *env.step(torch.zeros(2, 2))
            assert obs.shape == final_obs.shape == (2, 1) and env.obs_size == 1


def test_older_gymnax_is_a_traceback_in_the_first_step(ppo, monkeypatch, capsys):
    """gymnax before 1.0 has no final_observation: the line says which one is needed."""
    gymnax = pytest.importorskip("gymnax", reason=NEEDS)
    make = gymnax.make

    def older(name):
        env, params = make(name)
        step = env.step

        def five(*inputs):
            *rest, info = step(*inputs)
            return *rest, {k: x for k, x in info.items() if k != "final_observation"}

        env.step = five
        return env, params

    monkeypatch.setattr(gymnax, "make", older)
    with pytest.raises(SystemExit) as stop:
        ppo.make_env(args_of(ppo, env="gymnax:CartPole-v1"), 4)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "gymnax>=1" in error and "final_observation" in error
    )


def test_gymnax_final_observation_is_lost(ppo):
    """gymnax:<id>: terminated and truncated apart, no copy on the way, state restored;
    the dynamics are those of our own CartPole."""
    pytest.importorskip("gymnax", reason=NEEDS)
    env = ppo.make_env(args_of(ppo, env="gymnax:CartPole-v1"), 4)
    torch.manual_seed(0)
    before, ends = env.reset(), 0
    for t in range(60):
        actions = torch.randint(0, 2, (4,), dtype=torch.uint8)
        after, _, fallen = ppo.cartpole(before.T.double(), actions, None)
        obs, _, terminated, truncated, final_obs = env.step(actions)
        torch.testing.assert_close(final_obs, after.T.float(), atol=1e-5, rtol=1e-4)
        assert torch.equal(terminated, fallen) and not truncated.any()
        assert torch.equal((obs == final_obs).all(-1), ~terminated)
        ends, before = ends + terminated.sum(), obs
        if t == 40:
            saved = [x.clone() for x in env.state]
    assert ends > 2 and (env.obs_size, env.outputs, env.discrete) == (4, 2, True)
    results = []
    for _ in range(2):
        env.state = [x.clone() for x in saved]
        torch.manual_seed(1)
        results.append(env.step(torch.ones(4, dtype=torch.uint8))[0])
    assert torch.equal(*results)
    env = ppo.make_env(args_of(ppo, env="gymnax:Pendulum-v1"), 4)
    env.reset()
    assert env.step(torch.full((4, 1), 50.0))[0].shape == (4, 3) and env.outputs == 2


# -------------------------------------- Ranks -----------------------------------------

JOB = """
import sys, torch
from conftest import load_script
script = load_script("ppo_envs")
torch.set_default_dtype(torch.float64)
collect, calls = script.collect, []
def spy(*inputs):
    calls.append(1)
    if "dies" in sys.argv and script.RANK == 1 and len(calls) == 2:
        raise RuntimeError("rank 1 has lost its nerve")
    return collect(*inputs)
script.collect = spy
script.main()
"""
SMALL = ["--env", "acrobot", "--num-envs", "12", "--minibatch-size", "96"]
SMALL += ["--hidden-size", "8", "--ewma-com", "2", "--device", "cpu"]
SMALL += ["--eval-episodes", "4"]


@pytest.fixture
def job(ranks, tmp_path):
    """job(world, *flags): exit codes of that many ranks on the CPU, and what they said.
    In float64: sums in another order then make no difference that Adam would enlarge.
    """
    (tmp_path / "job.py").write_text(JOB)

    def run(world, *flags) -> tuple[list[int], str]:
        codes = ranks.run(world, "job.py", *flags, cwd=tmp_path)
        return codes, (tmp_path / "out").read_text()

    return run


def test_ranks_learn_something_else(job, tmp_path, run, capsys):
    """Two ranks (with a resume in between) and three have the weights, the normaliser,
    the environments and the log of one process after three steps of 12 environments,
    two also if their graphs are compiled. Another number of ranks cannot go on with
    their checkpoint."""
    for world in 1, 2, 3:
        folder, steps = ["--run-dir", f"run-{world}"], 2 if world == 2 else 3
        codes, out = job(world, *SMALL, *folder, "--steps", steps)
        assert codes == [0] * world, out
    codes, out = job(2, "--resume", "run-2", "--steps", 3)
    assert codes == [0, 0], out
    compiled = "--compile", "on", "--run-dir", "compiled"
    codes, out = job(2, *SMALL, *compiled, "--steps", 3)
    assert codes == [0, 0], out
    paths = [tmp_path / f"run-{n}" for n in (1, 2, 3)]
    agents = [
        torch.load(x / "checkpoint/state.pt")["agent"]
        for x in (paths[0], tmp_path / "compiled")
    ]
    torch.testing.assert_close(*agents, atol=1e-6, rtol=1e-6)
    states = [torch.load(path / "checkpoint/state.pt") for path in paths]
    logs = [metrics_of(path) for path in paths]
    for ranks in 2, 3:
        state, one = states[ranks - 1], states[0]
        for name, x in state["agent"].items():
            torch.testing.assert_close(x, one["agent"][name], atol=1e-6, rtol=1e-6)
        for kind, dim in (("obs", 0), ("episode", 1)):
            parts = [live[kind] for live, _ in state["ranks"]]
            assert len(parts) == ranks
            whole = one["ranks"][0][0][kind]
            torch.testing.assert_close(torch.cat(parts, dim), whole)
        for here, alone in zip(logs[ranks - 1], logs[0], strict=True):
            keep = [k for k in alone if not re.search("second|memory", k)]
            here, alone = ({k: x[k] for k in keep} for x in (here, alone))
            noise = [x.pop("gradient_noise_scale", 1.0) for x in (here, alone)]
            assert noise[0] == pytest.approx(noise[1], rel=1e-2)  # of small sums
            assert here == pytest.approx(alone, rel=1e-5, abs=1e-8)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run("--resume", "run-2", "--steps", "5")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error == "error: run-2 is a run of 2 ranks, not 1\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_dead_rank_leaves_the_others_waiting(job):
    """A rank that dies ends the job with its error, within seconds."""
    codes, out = job(2, *SMALL, "--run-dir", "dies", "--steps", "3")
    assert not {*codes} & {0, -signal.SIGKILL}
    assert "rank 1 has lost its nerve" in out


# ---------------------------------- Whole program -------------------------------------


@pytest.mark.parametrize("flags", [[], ["--env", "pendulum", "--ewma-com", "2"]])
def test_resume_is_off_by_one(ppo, run, tmp_path, flags):
    """Two steps, resume, two more: bit for bit the run of four, in weights, optimiser,
    environments and logs. https://github.com/vwxyzjn/cleanrl/issues/399"""
    run(*flags, "--steps", 4, "--run-dir", "whole", "--eval-every", 1)
    run(*flags, "--steps", 2, "--run-dir", "parts", "--eval-every", 1)
    (tmp_path / "parts/checkpoint").rename(
        tmp_path / "parts/checkpoint.old"
    )  # as killed
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "transitions": 0}\n{"step": 4, "transi')
    run("--resume", "parts", "--steps", 4)
    paths = [tmp_path / x / "checkpoint" / "state.pt" for x in ("whole", "parts")]
    states = [torch.load(path, weights_only=True) for path in paths]
    flat = [torch.utils._pytree.tree_flatten(state)[0] for state in states]
    assert len(flat[0]) == len(flat[1]) == 13
    for a, b in zip(*flat):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    logs = [metrics_of(tmp_path / x) for x in ("whole", "parts")]
    timed = "second", "memory"
    keep = lambda r: {k: v for k, v in r.items() if not any(x in k for x in timed)}
    assert list(map(keep, logs[0])) == list(map(keep, logs[1]))
    assert [r["step"] for r in logs[0]] == [0, 1, 2, 3, 4]
    names = {"ddr", "kl", "proximal_age", "explained_variance", "clip_fraction"}
    names |= {f"{x}steps_per_second" for x in ("env_", "act_", "")}
    assert (
        names <= set(logs[0][4])
        and (tmp_path / "whole/curve.png").stat().st_size > 1000
    )
    assert "args" in json.loads((tmp_path / "whole/args.json").read_text())


def test_save_is_in_halves_for_a_moment(ppo, run, saves, tmp_path):
    """A kill hits any moment of a save: before each of its operations on files a whole
    checkpoint is there, the last one or the new one."""
    counts = saves(ppo, tmp_path / "run")
    run("--steps", 2, "--save-every", 1, "--run-dir", "run")
    assert len(counts) == 3 and min(counts) > 5


def test_learns_from_other_data_than_was_acted(ppo, run, monkeypatch):
    """What train gives to learn: advantages that are those of the batch's own fields,
    by their definition, and log-probs and values that are those of the agent as it is
    then, its normaliser included: the first ratios are 1."""
    real, steps = ppo.learn, []

    def learn(agent, batch, args):
        names = "rewards", "values", "next_values", "terminated", "truncated"
        for i in range(args.num_envs):
            fields = (batch[name][:, i].double() for name in names[:3])
            ends = (batch[name][:, i] for name in names[3:])
            wanted = brute_force(*fields, *ends, args.gamma, args.gae_lambda)
            found = batch["advantages"][:, i].double()
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        returns = batch["advantages"] + batch["values"]
        torch.testing.assert_close(batch["returns"], returns)
        obs = batch["obs"].flatten(0, 1)
        logits = agent.outputs(obs).log_softmax(-1)
        taken = logits.gather(1, batch["actions"].flatten()[:, None].long())[:, 0]
        torch.testing.assert_close(batch["logprobs"].flatten(), taken)
        torch.testing.assert_close(batch["values"].flatten(), agent.value(obs))
        ended = batch["terminated"] | batch["truncated"]
        steps.append(int(ended.sum()))
        return real(agent, batch, args)

    monkeypatch.setattr(ppo, "learn", learn)
    run("--env", "cartpole", "--steps", 3, "--run-dir", "run", "--compile", "off")
    assert len(steps) == 3 and all(steps)


def test_step_draws_what_the_last_one_drew(ppo, run, monkeypatch):
    """Each step and each seed has noise of its own, and gae gets gamma and lambda in
    this order: a run that is compared with itself would not show it."""
    noise, gae, drawn, given = ppo.Agent.noise, ppo.gae, [], set()
    spy = lambda *x: drawn.append(noise(*x)) or drawn[-1]
    monkeypatch.setattr(ppo.Agent, "noise", spy)
    monkeypatch.setattr(ppo, "gae", lambda *x: given.add(x[-2:]) or gae(*x))
    for seed in 1, 2:
        flags = "--seed", seed, "--gamma", 0.9, "--gae-lambda", 0.8
        run(*flags, "--steps", 2, "--run-dir", seed)
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == len(drawn) > 3
    assert given == {(0.9, 0.8)}


def test_run_that_ends_before_its_first_save_is_lost(ppo, run, tmp_path, monkeypatch):
    """What ends in its first step can be resumed, to the same bits; what ends before it
    leaves no folder: one that can be neither resumed nor started anew is a trap."""

    def fails(*_):
        raise MemoryError

    flags = "--steps", 2, "--save-every", 9, "--run-dir"
    run(*flags, "whole")
    for name, left in (("evaluate", False), ("learn", True)):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(ppo, name, fails)
            run(*flags, "half")
        assert Path("half").exists() == left
    run("--resume", "half", "--steps", 2)
    a, b = (
        torch.load(Path(x, "checkpoint", "state.pt"), weights_only=True)["agent"]
        for x in ("whole", "half")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("guilty", ["rewards", "loss"])
def test_nan_is_saved_over_the_last_good(
    ppo, run, tmp_path, monkeypatch, capsys, guilty
):
    """A gradient of NaN makes every weight NaN, and the run goes on to a good end: a
    line tells, and what was saved and logged before is as it was. A reward of NaN is
    not blamed on the learning rate."""
    real, names = ppo.learn, ["advantages"] + ["rewards"] * (guilty == "rewards")
    steps = []

    def learn(agent, batch, args):
        steps.append(0)
        for name in names if len(steps) == 3 else ():
            batch[name] = batch[name] * math.nan
        return real(agent, batch, args)

    monkeypatch.setattr(ppo, "learn", learn)
    with pytest.raises(SystemExit) as stop:
        run("--steps", 4, "--save-every", 1, "--run-dir", "run")
    errors = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert stop.value.code == 2 and len(errors) == 1 and "step 3" in errors[0]
    said = "and rewards of the env" in errors[0], "--learning-rate" in errors[0]
    assert said == (guilty == "rewards", guilty == "loss")
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    agent = state["agent"].values()
    assert state["step"] == 2 and all(x.isfinite().all() for x in agent)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]


def test_ranks_measure_the_kl_on_other_states(ppo, monkeypatch):
    """KL and DDR are of the same states, up to 2^12 of the batch, however many ranks
    there are: each takes those of its environments, here no whole number of strides."""

    def catch(states):
        seen.extend(states.tolist())
        raise InterruptedError

    args = args_of(ppo, num_envs=60, rollout_length=256)
    env = ppo.make_env(args, 60)
    agent, whole, found = ppo.Agent(env, args), {}, []
    live = {"obs": env.reset(), "episode": torch.zeros(2, 60)}
    ppo.collect(agent, env, live, whole, args)
    add_advantages(ppo, whole, args)
    monkeypatch.setattr(ppo, "all_reduce", lambda x, *_: x)
    monkeypatch.setattr(agent, "outputs", catch)
    for ranks in 1, 2, 3, 4:
        monkeypatch.setattr(ppo, "WORLD_SIZE", ranks)
        seen = []
        for rank in range(ranks):
            monkeypatch.setattr(ppo, "RANK", rank)
            batch = {key: x[:, ppo.share(60)] for key, x in whole.items()}
            with pytest.raises(InterruptedError):
                ppo.learn(agent, batch, args)
        found.append(sorted(seen))
    assert len(found[0]) == 3840 and found[1:] == found[:1] * 3


def test_ranks_have_another_kl(job, tmp_path):
    """With more states than are looked at, KL and DDR of two ranks are those of one
    process."""
    flags = "--num-envs", 30, "--rollout-length", 192, "--minibatch-size", 640
    for world in 1, 2:
        folder = "--run-dir", f"run-{world}"
        codes, out = job(world, *SMALL, *flags, "--steps", 1, *folder)
        assert codes == [0] * world, out
    one, two = (metrics_of(tmp_path / f"run-{n}")[-1] for n in (1, 2))
    for name in "kl", "ddr":
        assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_curve_has_a_point_before_the_first_episode_ends(ppo, tmp_path, monkeypatch):
    """matplotlib takes a plot of nothing but a style for a category: an axis of words,
    and a point that nobody measured."""
    lines = {"transitions": 0, "eval/episode_return": 9.0}, {"transitions": 64}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    drawn, keep = [], lambda figure, *_, **__: drawn.extend(figure.axes[0].get_lines())
    monkeypatch.setattr(ppo.Figure, "savefig", keep)
    ppo.draw_curve(tmp_path)
    assert [line.get_xydata().tolist() for line in drawn] == [[[0.0, 9.0]]]


def test_speed_is_that_of_one_rank(ppo, monkeypatch, capsys):
    """The logged speeds count the transitions of all ranks, and each rank has as many
    environments as any other."""
    clock, zeros = [[0.0, 1.0, 2.0], [2.0, 3.0, 5.0], [5.0] * 3], torch.zeros(3)
    batch, found = {"rewards": torch.zeros(2, 8)}, []
    monkeypatch.setattr(ppo.time, "perf_counter", lambda: 10.0)
    for ranks in 1, 4:
        monkeypatch.setattr(ppo, "WORLD_SIZE", ranks)
        found.append(ppo.describe({}, zeros, clock, 2.0, batch))
    one, four = ({k: x for k, x in shown.items() if "steps" in k} for shown in found)
    wanted = {"env_steps_per_second": 16 / 3, "act_steps_per_second": 16 / 5}
    assert one == wanted | {"steps_per_second": 2.0}
    assert four == {key: 4 * value for key, value in one.items()}
    spent = found[0]["seconds_rollout"], found[0]["seconds_update"]
    assert spent == (5.0, 3.0)
    with pytest.raises(SystemExit):
        ppo.check(args_of(ppo, num_envs=258, minibatch_size=516))
    assert "--num-envs" in capsys.readouterr().err


def test_one_environment_is_not_enough(ppo, run, tmp_path, capsys):
    """--num-envs 1 works, without further flags: the rollout becomes longer."""
    run("--num-envs", 1, "--env", "cartpole", "--steps", 2, "--run-dir", "one")
    last = metrics_of(tmp_path / "one")[-1]
    assert last["transitions"] == 2 * 8 * 32
    assert last["episodes"] > 1 and last["eval/episode_return"] > 1
    assert "per environment" in "".join(capsys.readouterr())


@pytest.mark.parametrize("flags, message", [
    (["--env", "cartpool"], "cartpool"),
    (["--env", "gym:NoSuch-v0"], "gym:NoSuch-v0"),
    (["--env", "gym:Blackjack-v1"], "Tuple observations"),
    (["--num-envs", "0"], "--num-envs is 0"),
    (["--num-envs", "-4"], "--num-envs is -4"),
    (["--num-envs", "two"], "num-envs"),
    (["--minibatch-size", "4096", "--rollout-length", "8"], "larger than the batch"),
    (["--minibatch-size", "24", "--rollout-length", "10"], "do not divide the batch"),
    (["--scaling", "minibatch-size", "--base-envs", "1000"], "minibatch"),
    (["--learning-rate", "nan"], "--learning-rate is nan"),
    (["--gamma", "1.5"], "--gamma"),
    (["--clip", "1"], "--clip"),
    (["--resume", "nowhere"], "nowhere holds no run"),
    (["--run-dir", "."], "exists: give another"),
    (["--no-such-flag"], "no-such-flag"),
    (["--seed", str(2**23)], "--seed"),
])  # fmt: skip
def test_bad_input_ends_in_a_traceback(run, tmp_path, capsys, flags, message):
    """A user's mistake: one line, exit code 2, nothing written."""
    if flags[-1].startswith("gym:"):
        pytest.importorskip("gymnasium", reason=NEEDS)
    with pytest.raises(SystemExit) as stop:
        run("--run-dir", "new", *flags)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    )
    assert message in error and not list(tmp_path.iterdir())


def test_resumed_gym_run_sees_the_same_starts_again(ppo, run, monkeypatch):
    """Environments of gymnasium are not saved. Where a resumed run begins new episodes,
    they are not those it began with: resumed often, it would see only these."""
    pytest.importorskip("gymnasium", reason=NEEDS)
    starts, collect = [], ppo.collect

    def watch(agent, env, live, *rest):
        starts.append(live["obs"].clone())
        return collect(agent, env, live, *rest)

    monkeypatch.setattr(ppo, "collect", watch)
    run("--env", "gym:CartPole-v1", "--steps", 1, "--run-dir", "run")
    run("--resume", "run", "--steps", 2)
    run("--resume", "run", "--steps", 3)
    assert len(starts) == 3 and not starts[0].equal(starts[1])
    assert not starts[0].equal(starts[2]) and not starts[1].equal(starts[2])


def test_no_compiler_is_a_traceback(ppo, run, tmp_path, monkeypatch, capsys):
    """Without a C++ compiler --compile on says so and goes on without."""

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(ppo.torch, "compile", broken)
    run("--compile", "on", "--steps", 1, "--run-dir", "run")
    assert "torch.compile is off: no compiler here\n" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "run/args.json").read_text())["args"]["compile"] == "off"
    )


def test_missing_library_is_a_traceback(ppo, run, tmp_path, monkeypatch, capsys):
    """Without gymnasium: the package to install, in one line."""
    monkeypatch.setitem(ppo.sys.modules, "gymnasium", None)
    with pytest.raises(SystemExit):
        run("--env", "gym:CartPole-v1")
    assert "pip install gymnasium" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_rollout_grows_in_silence(ppo, capsys):
    """257 environments make whole minibatches of 512 only every 512 steps: batches 16
    times as large as asked for, of which a line tells. 256 keep to 32 steps."""
    for num_envs, length in ((256, 32), (96, 48), (257, 512)):
        args = ppo.Args(num_envs=num_envs)
        ppo.check(args)
        said = capsys.readouterr().out
        assert args.rollout_length == length
        assert said.count("--rollout-length is") == (length == 512)
    assert "--rollout-length is 512: --num-envs 257" in said
