"""Rewards that NumPy computes, against sums over a grid of the chain that is run."""

import numpy as np
import pyro
import pytest
import torch

from smcdiff.inference import (
    ResidualTwist,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import Diffusion, LogSNR, MixtureDenoiser

from .checks import BOUND, finish, z_of_evidence
from .test_trust_region_mixtures import on_a_grid


def absolute(x):
    """The size of x was observed."""
    return -0.5 * ((np.abs(x) - 6.5) / 0.3) ** 2


def classifier(x):
    """log sigmoid: x is far out."""
    return -np.logaddexp(0.0, 5 * (7.0 - np.abs(x)))


def staircase(x):
    """A step down at every unit of distance."""
    return -3.0 * np.floor(np.abs(x - 6.5))


REWARDS = {"absolute": absolute, "classifier": classifier, "staircase": staircase}


def problem(kind):
    """Three modes in twelve steps, a reward without gradients, and log Z of the chain itself."""

    def reward(x):
        return torch.as_tensor(REWARDS[kind](x.detach().numpy()))

    means = torch.tensor([[-4.0], [0.0], [4.0]], dtype=torch.float64)
    schedule = LogSNR(4.0, -8.0)
    process = Diffusion(MixtureDenoiser(means, 0.5), schedule, num_steps=12, variance="exact")

    def model():
        pyro.factor("reward", reward(process("x")[..., 0]))

    return model, on_a_grid(process, reward, -14, 14)[0]


def share(particles):
    """The mean effective sample size of what a run leaves behind."""
    return float(particles.ess.mean()) / particles.num_particles


@pytest.mark.parametrize("kind", REWARDS)
def test_a_learned_twist_finds_what_is_rare(kind):
    model, truth = problem(kind)
    assert truth < -4
    pyro.set_rng_seed(0)
    method = TrustRegionTwistedSMC(
        model,
        ResidualTwist(width=32, descent=Descent(100, 128, 4, 1e-2)),
        num_iterations=8,
        learning_particles=500,
        num_particles=50,
        num_runs=60,
    )
    learned = method.run().particles
    assert abs(z_of_evidence(learned, truth)) < BOUND
    rival = finish(TwistedSMC(model, proposal="kernel", num_particles=50, num_runs=60))
    assert share(learned) > 1.2 * share(rival)
    assert float(learned.log_evidence.std()) < 0.5 * float(rival.log_evidence.std())
