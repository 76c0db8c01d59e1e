"""Mixtures of Gaussians: not conjugate, and exact all the same.

The reverse process of a mixture has mixtures for kernels, and so has that of the tilted mixture,
which is therefore the optimal guide.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff import Twist, TwistValue
from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import Diffusion, MixtureDenoiser, VariancePreserving

from .checks import BOUND, assert_zero_variance, finish, z_of_evidence, z_of_mean, z_score
from .closed_forms import BETAS, alphas, backward_on_grid, log_normal, mixture

LEVELS = alphas()
DATA = mixture([0.5, 0.3, 0.2], [-2.0, 0.5, 3.0], [0.25, 0.16, 0.49])
SLOPE = 0.8  # the reward is SLOPE * x
TILTED, LOG_Z = DATA.tilted(SLOPE)


def source(data, alpha=LEVELS[-1]):
    """The exact law of x_T."""
    spread = alpha**2 * data.variances + 1 - alpha**2
    parts = dist.Normal(alpha * data.means[:, None], spread.sqrt()[:, None]).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(data.weights), parts)


def chain(data=DATA, variance="mixture"):
    denoiser = MixtureDenoiser(data.means[:, None], data.variances, data.weights)
    schedule = VariancePreserving(torch.tensor(BETAS))
    return Diffusion(denoiser, schedule, num_steps=5, variance=variance, source=source(data))


def rewarded(prior):
    def model():
        x = prior("x")
        pyro.factor("reward", SLOPE * x[..., 0])

    return model


def guided_by(process):
    def guide():
        process("x")

    return guide


class Known(Twist):
    """A log-twist given as a function of (x, t)."""

    def __init__(self, log_psi):
        self.log_psi = log_psi

    def evaluate(self, view):
        return TwistValue(self.log_psi(view.x["x"][:, 0], view.t))


def optimal(x, t):
    """log E[exp(SLOPE x_0) | x_t = x]."""
    logs, means, variances = DATA.given(x, LEVELS[t])
    return (logs + SLOPE * means + 0.5 * SLOPE**2 * variances).logsumexp(-1)


def test_reference_figures():
    assert pytest.approx(1.1503543782, abs=1e-10) == LOG_Z
    assert DATA.tilted(0.5 * SLOPE)[1] == pytest.approx(0.2553506350, abs=1e-10)
    weights = [0.03461384, 0.14910162, 0.81628453]
    assert TILTED.weights.tolist() == pytest.approx(weights, abs=1e-8)
    assert TILTED.means.tolist() == pytest.approx([-1.8, 0.628, 3.392], abs=1e-12)
    zero = torch.zeros(())
    table = [1.11700480, 1.24883677, 1.30385346, 1.27593272, 1.71481406]
    found = [float(optimal(zero, t).exp()) for t in range(1, 6)]
    assert found == pytest.approx(table, abs=1e-8)


def test_kernel_is_that_of_bayes():
    """p(x' | x) = p(x') q(x | x') / p(x)."""
    prior = chain()
    x, y = torch.linspace(-3, 3, 7), torch.linspace(-2.5, 3.5, 7)
    for t in range(2, 6):
        ratio = LEVELS[t] / LEVELS[t - 1]
        bayes = source(DATA, LEVELS[t - 1]).log_prob(y[:, None])
        bayes = bayes + log_normal(x, ratio * y, 1 - ratio**2)
        bayes = bayes - source(DATA, LEVELS[t]).log_prob(x[:, None])
        torch.testing.assert_close(prior.kernel(x[:, None], t).law.log_prob(y[:, None]), bayes)


@pytest.mark.parametrize("twist", [Known(optimal), None], ids=["optimal twist", "no twist"])
def test_one_particle_knows_the_evidence(twist):
    """The tilted mixture's reverse process is the optimal guide; the twist has nothing to do."""
    guide = guided_by(chain(TILTED))
    method = SMC(rewarded(chain()), guide, twist=twist, num_particles=1, num_runs=20)
    states = list(method.iterate())
    assert_zero_variance(states[-1].log_evidence, LOG_Z)
    if twist is not None:
        for state in states:
            assert_zero_variance(state.log_evidence, LOG_Z)


def test_posterior_with_the_optimal_twist():
    method = SMC(rewarded(chain()), twist=Known(optimal), num_particles=8, num_runs=4000)
    last = finish(method)
    x = last.x["x"][..., 0]
    assert abs(z_of_evidence(last, LOG_Z)) < BOUND
    assert abs(z_of_mean(last, x, 2.8001680, LOG_Z)) < BOUND
    top = (x > 1.6).double()
    share = float((TILTED.weights * (1 - torch.special.ndtr(z_of(1.6)))).sum())
    assert abs(z_of_mean(last, top, share, LOG_Z)) < BOUND


def z_of(x):
    return (x - TILTED.means) / TILTED.variances.sqrt()


# ------------------------------------------------------ Gaussian kernels, which are not exact here


def on_grid(prior):
    """log psi_t of the chain with the kernels it actually has, and its log Z."""
    points = torch.linspace(-8, 8, 1001)

    def log_kernel(t):
        law = prior.kernel(points[:, None], t).law
        if prior.variance == "mixture":
            return lambda after, before: law.log_prob(after.T[..., None]).T
        mean, variance = law.mean[:, 0], law.variance[:, 0]
        return lambda after, before: log_normal(after, mean[:, None], variance[:, None])

    last = prior.kernel(points[:, None], 1).law
    if prior.variance == "small":  # the last step is a function
        first = SLOPE * last.mean[:, 0]
        steps = [log_kernel(t) for t in range(2, 6)]
        tables = [SLOPE * points, *backward_on_grid(points, first, steps)]
    else:
        tables = backward_on_grid(points, SLOPE * points, [log_kernel(t) for t in range(1, 6)])
    log_source = source(DATA).log_prob(points[:, None])
    log_z = (log_source + tables[-1] + (points[1] - points[0]).log()).logsumexp(0)

    def log_psi(x, t):
        where = ((x + 8) / 0.016).clamp(0, 999.999)
        low = where.long()
        share = where - low
        return (1 - share) * tables[t][low] + share * tables[t][low + 1]

    return log_psi, float(log_z)


def test_grid_agrees_with_the_closed_form():
    log_psi, log_z = on_grid(chain())
    assert log_z == pytest.approx(LOG_Z, abs=1e-6)
    x = torch.arange(-4.0, 5.0, 2)  # points of the grid
    for t in range(1, 6):
        torch.testing.assert_close(log_psi(x, t), optimal(x, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variance", ["small", "large", "exact"])
def test_discretised_chain_is_the_prior(variance):
    """The evidence is that of the kernels in use, not that of the mixture."""
    prior = chain(variance=variance)
    log_psi, log_z = on_grid(prior)
    assert abs(log_z - LOG_Z) > 0.005
    model = rewarded(prior)
    known = SMC(model, twist=Known(log_psi), num_particles=8, num_runs=2000)
    assert abs(z_of_evidence(finish(known), log_z)) < BOUND
    twisted = TwistedSMC(model, num_particles=8, num_runs=2000)
    assert abs(z_of_evidence(finish(twisted), log_z)) < BOUND


def test_twist_of_a_mixture_kernel():
    """With one component it is exact, though the kernel is not known to be Gaussian."""
    one = mixture([1.0], [0.5], [1.44])
    prior = chain(one)

    def model():
        pyro.sample("y", dist.Normal(prior("x")[..., 0], 0.5), obs=torch.tensor(2.0))

    *states, _ = TwistedSMC(model, num_particles=20).iterate()
    for state in states:
        _, means, variances = one.given(state.x["x"][..., 0], LEVELS[state.t])
        wanted = log_normal(2.0, means, 0.25 + variances)[..., 0]
        torch.testing.assert_close(state.cache["log_psi"], wanted, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------- nine modes in the plane

NINE = torch.tensor([[i, j] for j in (-4.0, 0.0, 4.0) for i in (-4.0, 0.0, 4.0)]).double()
MIDDLE = [0.31519098, 0.36952724, 0.31519098]
NINE_LOG_Z = -1.4396866
SCALES = torch.tensor([50.0, 0.5]).double()  # exp(-x^2 / 100 - y^2) as variances of a Gaussian


def plane(means, variances, weights=None, num_steps=20):
    """The exact reverse process of a mixture in the plane."""
    denoiser = MixtureDenoiser(means, variances, weights)
    schedule = VariancePreserving()
    alpha = float(schedule.grid(num_steps).alpha[-1])
    spread = alpha**2 * torch.as_tensor(variances).expand(9, 2) + 1 - alpha**2
    parts = dist.Normal(alpha * means, spread.sqrt()).to_event(1)
    weights = torch.ones(9) / 9 if weights is None else weights
    law = dist.MixtureSameFamily(dist.Categorical(weights), parts)
    return Diffusion(denoiser, schedule, num_steps=num_steps, variance="mixture", source=law)


def nine_modes(num_steps=20):
    prior = plane(NINE, torch.full((9, 2), 0.3), num_steps=num_steps)

    def model():
        x = prior("x")
        pyro.factor("reward", -x[..., 0].square() / 100 - x[..., 1].square())

    return model


def nine_tilted():
    """Weights, means and variances of the posterior, by completing squares."""
    spread = 0.3 + SCALES
    logs = (log_normal(0.0, NINE, spread) + 0.5 * (2 * torch.pi * SCALES).log()).sum(-1)
    gain = 0.3 / spread
    log_z = (logs - torch.tensor(9.0).log()).logsumexp(0)
    return logs.softmax(0), NINE * (1 - gain), 0.3 * (1 - gain), float(log_z)


def test_nine_modes_reference_figures():
    weights, means, variances, log_z = nine_tilted()
    assert log_z == pytest.approx(NINE_LOG_Z, abs=5e-8)
    assert weights[3:6].tolist() == pytest.approx(MIDDLE, abs=5e-8)
    second = (means**2 + variances) / torch.tensor([100.0, 1.0])
    reward = -(weights[:, None] * second).sum()
    assert float(reward) == pytest.approx(-0.2907202, abs=5e-8)


def test_nine_modes_one_particle_knows_the_evidence():
    weights, means, variances, log_z = nine_tilted()
    guide = guided_by(plane(means, variances.expand(9, 2), weights))
    last = finish(SMC(nine_modes(), guide, num_particles=1, num_runs=4000))
    assert_zero_variance(last.log_evidence, log_z)
    x = last.x["x"][:, 0]
    assert abs(z_score(-(x[:, 0] ** 2) / 100 - x[:, 1] ** 2, -0.2907202)) < BOUND
    for column, share in zip((-4.0, 0.0, 4.0), MIDDLE, strict=True):
        here = ((x[:, 0] - column).abs() < 2) & (x[:, 1].abs() < 2)
        assert abs(z_score(here.double(), share)) < BOUND


@pytest.mark.parametrize("proposal", ["gradient", "kernel"])
def test_nine_modes_twisted(proposal):
    method = TwistedSMC(nine_modes(), proposal=proposal, num_particles=64, num_runs=100)
    last = finish(method)
    x = last.x["x"]
    reward = -(x[..., 0] ** 2) / 100 - x[..., 1] ** 2
    assert abs(z_of_evidence(last, NINE_LOG_Z)) < BOUND
    assert abs(z_of_mean(last, reward, -0.2907202, NINE_LOG_Z)) < BOUND
