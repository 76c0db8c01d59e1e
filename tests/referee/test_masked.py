"""A masked chain of 64 states, enumerated: tables for twists, kernels and weights."""

import itertools
import math

import pyro
import pytest
import torch

from smcdiff import Twist, TwistValue
from smcdiff.inference import SMC, IntermediateReward, TwistedSMC
from smcdiff.inference.proposals import Move, Proposal
from smcdiff.models import EnumeratedDenoiser, MaskedDiffusion

from .checks import BOUND, assert_zero_variance, finish, z_of_evidence, z_of_mean, z_score

MASK, ALPHAS = 3, (1.0, 2 / 3, 1 / 3, 0.0)
REVEAL = {3: 1 / 3, 2: 1 / 2, 1: 1.0}
STATES = list(itertools.product(range(4), repeat=3))
TOKENS = torch.tensor(STATES)
JOINT = {x: math.exp(math.sin(1 + x[0] + 2 * x[1] + 3 * x[2])) for x in STATES if MASK not in x}
LOG_Z = 1.9320106504


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def reward_of(x):
    return 2.0 * (x[0] == x[1]) + 1.5 * (x[2] == 2)


# ------------------------------------------------------------- the enumeration, without smcdiff


def reveals(x, known):
    return all(a in (b, MASK) for a, b in zip(known, x, strict=True))


def denoised(known, position, token):
    """The probability of a token, given the revealed ones."""
    agreeing = {x: p for x, p in JOINT.items() if reveals(x, known)}
    hits = sum(p for x, p in agreeing.items() if x[position] == token)
    return hits / sum(agreeing.values())


def transition(before, after, u):
    probability = 1.0
    for position, (a, b) in enumerate(zip(before, after, strict=True)):
        if a != MASK:
            probability *= float(a == b)
        else:
            probability *= 1 - u if b == MASK else u * denoised(before, position, b)
    return probability


def kernel(t):
    return exact([[transition(a, b, REVEAL[t]) for b in STATES] for a in STATES])


KERNELS = {t: kernel(t) for t in (1, 2, 3)}
FINAL = exact([math.exp(reward_of(x)) if MASK not in x else 0.0 for x in STATES])
OPTIMAL = {0: FINAL}
for _t in (1, 2, 3):
    OPTIMAL[_t] = KERNELS[_t] @ OPTIMAL[_t - 1]
START = STATES.index((MASK,) * 3)
LAW = KERNELS[3][START] @ KERNELS[2] @ KERNELS[1]
REWARDS = exact([reward_of(x) for x in STATES])


def index(tokens):
    """The row of each state in the tables."""
    return tokens @ torch.tensor([16, 4, 1])


# ----------------------------------------------------------------------------- what is under test


def chain():
    table = torch.zeros(3, 3, 3).double()
    for x, weight in JOINT.items():
        table[x] = weight
    return MaskedDiffusion(EnumeratedDenoiser(table), 3, 3, alphas=ALPHAS)


def model():
    x = chain()("x")
    same, last = x[..., 0] == x[..., 1], x[..., 2] == 2
    pyro.factor("reward", 2.0 * same + 1.5 * last)


class Table(Twist):
    """log psi_t looked up in a table per step."""

    def __init__(self, tables):
        self.tables = tables

    def evaluate(self, view):
        return TwistValue(self.tables[view.t][index(view.x["x"])].log())


class FullyAdapted(Proposal):
    """The kernel twisted by a table psi_{t-1}, its normaliser nu_t paid before the draw."""

    def __init__(self, tables):
        self.tables = tables

    def prepay(self, t, x, kernels, cache):
        return self._normaliser(t, x["x"]).log() - cache["log_psi"]

    def move(self, t, x, kernels, cache):
        rows = KERNELS[t][index(x["x"])] * self.tables[t - 1]
        drawn = torch.multinomial(rows, 1)[:, 0]
        log_ratio = self._normaliser(t, x["x"]).log() - self.tables[t - 1][drawn].log()
        return Move({"x": TOKENS[drawn]}, log_ratio)

    def _normaliser(self, t, x):
        return (KERNELS[t] @ self.tables[t - 1])[index(x)]


def tempered(power):
    """Any positive psi_t will do at t >= 1; psi_0 is the reward's."""
    return {t: table**power if t > 0 else table for t, table in OPTIMAL.items()}


def test_reference_figures():
    assert float(OPTIMAL[3][START]) == pytest.approx(6.9033765735, abs=1e-9)
    assert math.log(OPTIMAL[3][START]) == pytest.approx(LOG_Z, abs=1e-9)
    data = exact([JOINT.get(x, 0.0) for x in STATES])
    distance = 0.5 * (LAW - data / data.sum()).abs().sum()
    assert float(distance) == pytest.approx(0.1092495129, abs=1e-9)
    for x, first, second in (
        ((0, MASK, MASK), 7.73000968, 8.09270299),
        ((MASK, MASK, 2), 14.12793070, 14.52282961),
        ((1, 1, MASK), 12.40219186, 12.40219186),
        ((0, 1, MASK), 2.53823927, 2.53823927),
    ):
        found = [float(OPTIMAL[t][STATES.index(x)]) for t in (1, 2)]
        assert found == pytest.approx([first, second], abs=1e-7)
    tilted = LAW * FINAL / (LAW @ FINAL)
    assert float(LAW @ REWARDS) == pytest.approx(1.1760343, abs=1e-7)
    assert float(tilted @ REWARDS) == pytest.approx(2.6349944, abs=1e-7)
    share = (LAW @ FINAL) ** 2 / (LAW @ FINAL**2)
    assert float(share) == pytest.approx(0.3309640, abs=1e-7)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_kernel_is_the_enumerated_one(t):
    logits = chain().kernel(TOKENS, t).law.base_dist.logits.double()
    rows = [logits[:, position, TOKENS[:, position]] for position in range(3)]
    torch.testing.assert_close(torch.stack(rows).sum(0).exp(), KERNELS[t], rtol=0, atol=1e-12)


def test_one_particle_knows_the_evidence():
    method = SMC(
        model,
        twist=Table(OPTIMAL),
        proposal=FullyAdapted(OPTIMAL),
        num_particles=1,
        num_runs=4000,
    )
    for state in method.iterate():
        assert_zero_variance(state.log_evidence, math.log(OPTIMAL[3][START]))
    reward = REWARDS[index(state.x["x"][:, 0])]
    assert abs(z_score(reward, 2.6349944)) < BOUND


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_fully_adapted_weights_are_functions_of_the_parent(power):
    """With the normaliser paid before the draw, the draw itself costs nothing."""
    tables = tempered(power)
    method = SMC(
        model,
        twist=Table(tables),
        proposal=FullyAdapted(tables),
        num_particles=64,
        ess_threshold=0.0,
    )
    states = list(method.iterate())
    for before, after in zip(states, states[1:], strict=False):
        parents = index(before.x["x"])
        paid = (KERNELS[before.t] @ tables[before.t - 1] / tables[before.t])[parents].log()
        increment = after.log_weights - before.log_weights
        torch.testing.assert_close(increment, paid, rtol=0, atol=1e-9)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_resampling_happens_on_what_is_prepaid(threshold):
    """log Z-hat is the mean of what is paid, at every step that resamples."""
    tables = tempered(0.0)
    method = SMC(
        model,
        twist=Table(tables),
        proposal=FullyAdapted(tables),
        num_particles=8,
        num_runs=4000,
        ess_threshold=threshold,
    )
    states = list(method.iterate())
    assert bool(states[-1].history[-1].resampled.any())
    assert abs(z_of_evidence(states[-1], LOG_Z)) < BOUND
    for before, after in zip(states, states[1:], strict=False):
        where = after.history[-1].resampled
        gap = after.log_weights[where] - after.log_weights[where].mean(-1, keepdim=True)
        torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-9)
        paid = (KERNELS[before.t] @ tables[before.t - 1])[index(before.x["x"])].log()
        weights = before.log_weights + paid - before.cache["log_psi"]
        mean = before.log_norm + weights.logsumexp(-1) - math.log(8)
        torch.testing.assert_close(after.log_evidence[where], mean[where], rtol=0, atol=1e-9)


def test_bootstrap_efficiency():
    """Weights have mean Z and second moment Z^2 / .3309640."""
    last = finish(SMC(model, num_particles=1, num_runs=8000))
    weights = last.log_weights[:, 0].exp()
    assert abs(z_score(weights, 6.9033765735)) < BOUND
    assert abs(z_score(weights**2, 6.9033765735**2 / 0.3309640)) < BOUND


@pytest.mark.parametrize(
    "method",
    [
        SMC(model, num_particles=8, num_runs=4000),
        SMC(model, twist=Table(OPTIMAL), num_particles=8, num_runs=4000),
        SMC(
            model,
            twist=IntermediateReward("difference", num_draws=4),
            num_particles=8,
            num_runs=4000,
            ess_threshold=1.0,
        ),
        TwistedSMC(model, num_particles=8, num_runs=4000),
    ],
    ids=["bootstrap", "optimal twist", "intermediate reward", "twisted"],
)
def test_evidence_and_mean_reward(method):
    last = finish(method)
    reward = REWARDS[index(last.x["x"])]
    assert abs(z_of_evidence(last, LOG_Z)) < BOUND
    assert abs(z_of_mean(last, reward, 2.6349944, LOG_Z)) < BOUND
