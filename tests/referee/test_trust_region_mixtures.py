"""Learned twists on mixtures of Gaussians, against sums over grids of the chain that is run."""

import pyro
import pytest
import torch

from smcdiff.inference import GaussianKernels, QuadraticTwist, TrustRegionTwistedSMC
from smcdiff.models import Diffusion, MixtureDenoiser

from .checks import BOUND, z_of_evidence, z_of_mean
from .closed_forms import backward_on_grid, log_normal
from .test_mixtures import LOG_Z, SLOPE, chain, rewarded

each_family = pytest.mark.parametrize("family", [GaussianKernels, QuadraticTwist])


def on_a_grid(process, reward, low, high, points=1201):
    """log Z and the posterior mean of the reward, for a process on the line."""
    x = torch.linspace(low, high, points, dtype=torch.float64)

    def transition(t):
        def log_kernel(after, before):
            law = process.kernel(before.reshape(-1, 1), t).law
            mean, variance = law.mean.reshape(before.shape), law.variance.reshape(before.shape)
            return log_normal(after, mean, variance)

        return log_kernel

    def total(terminal):
        steps = [transition(t) for t in range(1, process.num_steps + 1)]
        start = process.initial().log_prob(x[:, None]).double() + (x[1] - x[0]).log()
        return (start + backward_on_grid(x, terminal, steps)[-1]).logsumexp(0)

    log_z, shift = total(reward(x)), 100.0
    mean = (total(reward(x) + (reward(x) + shift).log()) - log_z).exp() - shift
    return float(log_z), float(mean)


@each_family
def test_a_linear_reward_on_three_modes(family):
    """Five steps whose kernels are Gaussian: near the ideal log Z, and exactly the chain's own."""
    pyro.set_rng_seed(0)
    process = chain(variance="large")
    truth, mean = on_a_grid(process, lambda x: SLOPE * x, -14, 16)
    assert abs(truth - LOG_Z) < 0.3
    twist = family()
    method = TrustRegionTwistedSMC(
        rewarded(process),
        twist,
        epsilon=0.3,
        learning_particles=1000,
        num_particles=16,
        num_runs=1000,
    )
    particles = method.run().particles
    assert abs(z_of_evidence(particles, truth)) < BOUND
    assert abs(z_of_mean(particles, SLOPE * particles.x["x"][..., 0], mean, truth)) < BOUND
    assert float(method.iterations[0].beta[0]) == pytest.approx(0.455, abs=0.05)
    shares = [float(each.ess[0]) for each in method.iterations]
    assert shares[-1] > 1.4 * shares[0]  # one Gaussian per step cannot do much more


def test_a_hundred_steps_towards_a_row_of_modes():
    """Nine modes, of which the reward keeps the middle row (Kim et al. 2025, the toy of DAS)."""
    centres = torch.tensor([-4.0, 0.0, 4.0])
    means = torch.cartesian_prod(centres, centres)
    process = Diffusion(MixtureDenoiser(means, 0.3).double(), num_steps=100, variance="large")
    line = Diffusion(
        MixtureDenoiser(centres[:, None], 0.3).double(), num_steps=100, variance="large"
    )

    def model():
        x = process("x")
        pyro.factor("reward", -(x[..., 0] ** 2) / 100 - x[..., 1] ** 2)

    along, one = on_a_grid(line, lambda x: -(x**2) / 100, -8, 8, 401)
    across, other = on_a_grid(line, lambda x: -(x**2), -8, 8, 401)
    truth, mean = along + across, one + other
    assert truth == pytest.approx(-1.4396866, abs=0.03)
    assert mean == pytest.approx(-0.2907202, abs=0.03)
    pyro.set_rng_seed(0)
    method = TrustRegionTwistedSMC(
        model, QuadraticTwist(), learning_particles=300, num_particles=50, num_runs=10
    )
    particles = method.run().particles
    reward = -(particles.x["x"][..., 0] ** 2) / 100 - particles.x["x"][..., 1] ** 2
    assert abs(z_of_evidence(particles, truth)) < BOUND
    assert abs(z_of_mean(particles, reward, mean, truth)) < BOUND
    assert float(method.iterations[-1].ess[0]) > 0.5
