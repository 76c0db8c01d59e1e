"""Z-hat is unbiased, whatever the twist, the proposal, the threshold and the resampler.

Every configuration runs 8 particles 4000 times; E[Z-hat] = Z is a z-test over the runs, and so is
every posterior mean, through E[Z-hat (mean-hat - truth)] = 0.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff import RESAMPLERS
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    IntermediateReward,
    Rejuvenation,
    Tempered,
    TwistedKernel,
    TwistedSMC,
)
from smcdiff.models import Diffusion, GaussianDenoiser, VariancePreserving

from .checks import BOUND, finish, z_of_evidence, z_of_mean
from .closed_forms import BETAS, alphas, log_normal, noised, normal, observed, quadrature

SIZE = {"num_particles": 8, "num_runs": 4000}


@functools.cache
def chain(mean, variance):
    """The exact reverse process of N(mean, variance)."""
    start = noised(normal(mean, variance), alphas()[-1])
    return Diffusion(
        GaussianDenoiser(torch.tensor([mean]), variance),
        VariancePreserving(torch.tensor(BETAS)),
        num_steps=5,
        variance="exact",
        source=dist.Normal(start.mean, start.covariance[0].sqrt()).to_event(1),
    )


def check(method, log_z, **means):
    """Unbiased evidence, and unbiased means of the sites."""
    last = finish(method)
    assert abs(z_of_evidence(last, log_z)) < BOUND
    for site, truth in means.items():
        values = last.x[site][..., 0] if site in last.x else last.latents[site]
        assert abs(z_of_mean(last, values, truth, log_z)) < BOUND
    return last


def resampled(last):
    return any(bool(step.resampled.any()) for step in last.history)


# ------------------------------------------------------------- a precise, surprising observation

POSTERIOR, HARD = observed(
    normal(0.5, 1.44),
    torch.ones(1, 1, dtype=torch.float64),
    torch.full((1, 1), 0.01, dtype=torch.float64),
    torch.tensor([2.5], dtype=torch.float64),
)


def hard():
    x = chain(0.5, 1.44)("x")
    pyro.sample("y", dist.Normal(x[..., 0], 0.1), obs=torch.tensor(2.5))


def guide():
    chain(1.5, 1.6)("x")


def rewards(kind="difference", exponent=0.01, **settings):
    return SMC(hard, twist=IntermediateReward(kind, exponent), **SIZE, **settings)


def twisted(**settings):
    return TwistedSMC(hard, **SIZE, **settings)


def tempered(power, covariance, **settings):
    twist = Tempered(DenoisedLikelihood(covariance), power)
    return SMC(hard, twist=twist, proposal=TwistedKernel(), **SIZE, **settings)


METHODS = {
    "bootstrap": lambda: SMC(hard, **SIZE),
    "guide": lambda: SMC(hard, guide, **SIZE),
    "guide and rewards": lambda: SMC(
        hard, guide, twist=IntermediateReward(exponent=0.01), ess_threshold=1.0, **SIZE
    ),
    "rewards": rewards,
    "largest reward": lambda: rewards("max", ess_threshold=1.0),
    "summed rewards": lambda: rewards("sum", ess_threshold=1.0),
    "shift": lambda: twisted(proposal="gradient", covariance="scalar", ess_threshold=1.0),
    "tempered shift": lambda: twisted(temper=0.5, ess_threshold=1.0),
    "clipped shift": lambda: twisted(clip=0.2, ess_threshold=1.0),
    "tempered and clipped": lambda: twisted(temper=1.3, clip=0.5, ess_threshold=1.0),
    "own kernel": lambda: twisted(proposal="kernel", ess_threshold=1.0),
    "tempered twist": lambda: tempered(0.5, "jacobian", ess_threshold=1.0),
    "twist that grows": lambda: tempered(lambda t, T: 1 - t / (T + 1), "scalar"),
}


@pytest.mark.parametrize("name", METHODS)
def test_method(name):
    check(METHODS[name](), HARD, x=float(POSTERIOR.mean[0]))


def test_bootstrap_efficiency_is_low_here():
    """Effective share of the particles: E[W]^2 / E[W^2], in closed form."""
    square = log_normal(2.5, 0.5, 1.44 + 0.005) - math.log(2 * math.sqrt(math.pi) * 0.1)
    assert math.exp(2 * HARD - float(square)) < 0.1


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_threshold(threshold):
    last = check(rewards(exponent=0.02, ess_threshold=threshold), HARD)
    assert resampled(last) == (threshold > 0)


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_resampler(resampler):
    last = check(rewards(exponent=0.02, ess_threshold=1.0, resampler=resampler), HARD)
    assert resampled(last)


# ------------------------------------------------------------------------------- two processes


def two():
    """Two agents, the second of them twice, and their sum."""
    a = chain(1.0, 0.25)("a")
    with pyro.plate("copies", 2):
        b = chain(-0.5, 0.64)("b")
    total = a[..., 0] + b[..., 0].sum(-1, keepdim=True)
    pyro.sample("goal", dist.Normal(total, 0.5), obs=torch.tensor(3.0))


TWO = float(log_normal(3.0, 1.0 - 1.0, 0.25 + 2 * 0.64 + 0.25))


@pytest.mark.parametrize(
    "method",
    [
        lambda: SMC(two, **SIZE),
        lambda: SMC(two, twist=IntermediateReward(exponent=0.2), ess_threshold=1.0, **SIZE),
        lambda: TwistedSMC(two, temper=0.5, ess_threshold=1.0, **SIZE),
        lambda: TwistedSMC(two, proposal="gradient", ess_threshold=1.0, **SIZE),
    ],
    ids=["bootstrap", "rewards", "tempered", "shift"],
)
def test_two_processes(method):
    check(method(), TWO)


# ------------------------------------------------------------------------------------- latents


def latents():
    """A noise scale, and a shift of the observation, both unknown."""
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.7))
    shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
    x = chain(0.5, 1.44)("x")
    pyro.sample("y", dist.Normal(x[..., 0] + shift, scale), obs=torch.tensor(2.5))


def integral(power):
    """log E[scale^power p(y | scale)], the shift integrated out."""

    def log_f(u):
        spread = 1.44 + 0.09 + (2 * u).exp()
        return log_normal(u, -1.0, 0.49) + log_normal(2.5, 0.5, spread) + power * u

    return quadrature(log_f, -8.0, 6.0)


LATENTS = integral(0.0)
SCALE = math.exp(integral(1.0) - LATENTS)


def propose_latents():
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.9))
    pyro.sample("shift", dist.Normal(0.2 * scale, 0.5))
    chain(0.5, 1.44)("x")


@pytest.mark.parametrize(
    "method",
    [
        lambda: SMC(latents, **SIZE),
        lambda: SMC(latents, propose_latents, **SIZE),
        lambda: TwistedSMC(latents, temper=0.5, ess_threshold=1.0, **SIZE),
        lambda: TwistedSMC(latents, covariance="none", proposal="kernel", **SIZE),
    ],
    ids=["bootstrap", "guided", "tempered", "own kernel"],
)
def test_latents(method):
    check(method(), LATENTS, scale=SCALE)


@pytest.mark.parametrize(
    ("kind", "names"), [("random_walk", None), ("mala", None), ("mala", ("scale",))]
)
def test_rejuvenated_latents(kind, names):
    moves = Rejuvenation(kind, names, step_size=0.5, num_moves=2)
    method = TwistedSMC(latents, temper=0.5, ess_threshold=1.0, rejuvenation=moves, **SIZE)
    last = check(method, LATENTS, scale=SCALE)
    rates = torch.stack([step.acceptance for step in last.history[1:]])
    assert 0.2 < float(rates.nanmean()) < 0.999


# ------------------------------------------------------------------------- rewards of any kind


def kinked():
    x = chain(0.5, 1.44)("x")
    pyro.factor("reward", -3.0 * (x[..., 0] - 2.0).abs())


KINKED = quadrature(lambda x: log_normal(x, 0.5, 1.44) - 3.0 * (x - 2.0).abs(), -10.0, 14.0, 24001)


@pytest.mark.parametrize("proposal", ["conjugate", "gradient", "kernel"])
@pytest.mark.parametrize("num_draws", [0, 4])
def test_reward_without_a_closed_form(proposal, num_draws):
    method = TwistedSMC(kinked, proposal=proposal, num_draws=num_draws, ess_threshold=1.0, **SIZE)
    check(method, KINKED)


def fenced():
    """A hard constraint: weight zero below 1, and the observation beyond."""
    x = chain(0.5, 1.44)("x")
    pyro.factor("fence", torch.where(x[..., 0] > 1.0, 0.0, -torch.inf))
    pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=torch.tensor(1.5))


def fenced_evidence():
    return quadrature(
        lambda x: log_normal(x, 0.5, 1.44) + log_normal(1.5, x, 1.0), 1.0, 13.0, 24001
    )


@pytest.mark.parametrize("num_draws", [0, 4])
def test_hard_constraint(num_draws):
    """Estimates outside the fence do not condemn a path. Of 64 particles some end inside."""
    method = TwistedSMC(
        fenced, num_draws=num_draws, proposal="kernel", num_particles=64, num_runs=250
    )
    check(method, fenced_evidence())
