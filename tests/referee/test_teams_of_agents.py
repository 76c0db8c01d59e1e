"""Two agents, one goal: several processes in one program, one by one and as a Team."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff import Twist, TwistValue
from smcdiff.inference import SMC, TwistedSMC
from smcdiff.laws import CovariantNormal
from smcdiff.models import (
    Diffusion,
    GaussianDenoiser,
    MixtureDenoiser,
    Team,
    VariancePreserving,
)

from .checks import BOUND, assert_zero_variance, finish, z_of_evidence, z_of_mean, z_score
from .closed_forms import mixture, noised, normal, observed

STEPS = 6
ALPHAS = VariancePreserving().grid(STEPS).alpha.tolist()


# --------------------------------------------------------------------- linear-quadratic Gaussian


def gaussian_agent(data):
    """The exact reverse process of Gaussian data."""
    start = noised(data, ALPHAS[-1])
    values, vectors = torch.linalg.eigh(start.covariance)
    floor = 0.5 * values[:1].expand(len(values))
    source = CovariantNormal(start.mean, floor, vectors * (values - floor).sqrt())
    denoiser = GaussianDenoiser(data.mean, data.covariance)
    return Diffusion(
        denoiser, VariancePreserving(), num_steps=STEPS, variance="exact", source=source
    )


FIRST, SECOND = normal(1.0, 0.25), normal(-0.5, 0.64)
JOINT = normal([1.0, -0.5], [[0.25, 0.0], [0.0, 0.64]])


def one_by_one(agents):
    return lambda: {name: agent(name) for name, agent in agents.items()}


def as_a_team(agents):
    team = Team(agents)
    return lambda: team("team")


each_way = pytest.mark.parametrize("declare", [one_by_one, as_a_team])


def states(particles):
    """(run, particle, agents): the two states side by side, however they are held."""
    return torch.cat(list(particles.x.values()), -1)


def goal(declare, agents, weights, stiffness, y):
    declared = declare(agents)

    def model():
        x = declared()
        a, b = x["a"], x["b"]
        mean = (a @ weights[0] + b @ weights[1])[..., 0]
        pyro.sample("goal", dist.Normal(mean, stiffness**-0.5), obs=torch.tensor(y))

    return model


@each_way
@pytest.mark.parametrize("covariance", ["auto", "scalar", "jacobian"])
def test_linear_quadratic_team_has_zero_variance(declare, covariance):
    agents = {"a": gaussian_agent(FIRST), "b": gaussian_agent(SECOND)}
    one = torch.ones(1, 1)
    model = goal(declare, agents, (one, one), 4.0, 3.0)
    method = TwistedSMC(
        model, covariance=covariance, proposal="conjugate", num_particles=1, num_runs=2000
    )
    constant = 0.5 * math.log(2 * math.pi / 4.0)
    for state in method.iterate():
        assert_zero_variance(state.log_evidence + constant, VALUE)
    assert pytest.approx(-3.499889, abs=5e-7) == VALUE
    x = states(state)[:, 0]
    assert abs(z_score(x[:, 0], 1.548246)) < BOUND
    assert abs(z_score(x[:, 1], 0.903509)) < BOUND
    assert abs(z_score((x[:, 0] - 1.548246) ** 2, 0.195175)) < BOUND
    assert abs(z_score((x[:, 0] - 1.548246) * (x[:, 1] - 0.903509), -0.140351)) < BOUND


def evidence(joint, operator, stiffness, y):
    """log E[exp(-stiffness / 2 (C x - y)^2)]."""
    noise = torch.full((1, 1), 1 / stiffness, dtype=torch.float64)
    given, log_evidence = observed(joint, operator, noise, torch.tensor([y], dtype=torch.float64))
    return given, log_evidence + 0.5 * math.log(2 * math.pi / stiffness)


_, VALUE = evidence(JOINT, torch.ones(1, 2, dtype=torch.float64), 4.0, 3.0)


@each_way
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.5, 0.5), (0.0, 2.0)])
def test_any_linear_goal(declare, weights):
    agents = {"a": gaussian_agent(FIRST), "b": gaussian_agent(SECOND)}
    matrices = [torch.full((1, 1), w) for w in weights]
    model = goal(declare, agents, matrices, 10.0, 1.0)
    _, truth = evidence(JOINT, torch.tensor([weights]), 10.0, 1.0)
    last = finish(TwistedSMC(model, num_particles=1, num_runs=10))
    assert_zero_variance(last.log_evidence + 0.5 * math.log(2 * math.pi / 10), truth)


@each_way
def test_hidden_pixels_follow_the_shown_ones(declare):
    """Two pixels per agent, one shown by each, and a seam between the shown ones."""
    pixels = normal([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]])
    agents = {"a": gaussian_agent(pixels), "b": gaussian_agent(pixels)}
    shown = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [-1.0]])
    model = goal(declare, agents, shown, 10.0, 1.0)
    last = finish(TwistedSMC(model, num_particles=1, num_runs=2000))
    joint = normal([0.0] * 4, torch.block_diag(pixels.covariance, pixels.covariance).tolist())
    operator = torch.cat(shown).T
    posterior, truth = evidence(joint, operator, 10.0, 1.0)
    assert truth == pytest.approx(-1.760356, abs=5e-7)
    assert_zero_variance(last.log_evidence + 0.5 * math.log(2 * math.pi / 10), truth)
    x = states(last)[:, 0]
    for i, mean in enumerate((0.4762, 0.3810, -0.3810, -0.4762)):
        assert float(posterior.mean[i]) == pytest.approx(mean, abs=5e-5)
        assert abs(z_score(x[:, i], float(posterior.mean[i]))) < BOUND
        square = (x[:, i] - posterior.mean[i]) ** 2
        assert abs(z_score(square, float(posterior.covariance[i, i]))) < BOUND


# ---------------------------------------------------------------------------- two mixtures

LEFT = mixture([0.5, 0.5], [-2.0, 2.0], [0.09, 0.16])
RIGHT = mixture([0.3, 0.7], [-1.0, 1.5], [0.25, 0.04])
STIFF = 2.0
LOG_Z = -1.137976


def noisy(parts, alpha):
    return alpha**2 * parts.variances + 1 - alpha**2


def mixture_agent(data):
    """The exact reverse process of a mixture on the line."""
    alpha = ALPHAS[-1]
    parts = dist.Normal(alpha * data.means[:, None], noisy(data, alpha).sqrt()[:, None])
    source = dist.MixtureSameFamily(dist.Categorical(data.weights), parts.to_event(1))
    return Diffusion(
        MixtureDenoiser(data.means[:, None], data.variances, data.weights),
        VariancePreserving(),
        num_steps=STEPS,
        variance="mixture",
        source=source,
    )


def optimal(view):
    """log E[exp(-(a_0 + b_0)^2) | a_t, b_t], summed over pairs of components."""
    alpha = ALPHAS[view.t]
    logs_a, means_a, variances_a = LEFT.given(view.x["a"][:, 0], alpha)
    logs_b, means_b, variances_b = RIGHT.given(view.x["b"][:, 0], alpha)
    spread = variances_a[:, None] + variances_b[None, :]
    goal = means_a[:, :, None] + means_b[:, None, :]
    square = -0.5 * goal**2 / (1 / STIFF + spread) - 0.5 * torch.log1p(STIFF * spread)
    return (logs_a[:, :, None] + logs_b[:, None, :] + square).logsumexp((1, 2))


class Optimal(Twist):
    def evaluate(self, view):
        return TwistValue(optimal(view))


def pairs():
    """Weights, means and covariances of the four components of the posterior, and log Z."""
    weights, means, covariances = [], [], []
    for i in range(2):
        for j in range(2):
            joint = normal(
                [float(LEFT.means[i]), float(RIGHT.means[j])],
                [[float(LEFT.variances[i]), 0.0], [0.0, float(RIGHT.variances[j])]],
            )
            given, log_z = evidence(joint, torch.ones(1, 2, dtype=torch.float64), STIFF, 0.0)
            weights.append(LEFT.weights[i].log() + RIGHT.weights[j].log() + log_z)
            means.append(given.mean)
            covariances.append(given.covariance)
    logs = torch.stack(weights)
    return logs.softmax(0), torch.stack(means), torch.stack(covariances), float(logs.logsumexp(0))


class Pair(Diffusion):
    """One process in the plane that stands for the sites of two."""

    def members(self, name):
        return ("a", "b")

    def split(self, name, x):
        return {"a": x[..., :1], "b": x[..., 1:]}

    def join(self, name, xs):
        return torch.cat([xs["a"], xs["b"]], -1)


def mixtures_model():
    a, b = mixture_agent(LEFT)("a"), mixture_agent(RIGHT)("b")
    pyro.factor("goal", -0.5 * STIFF * (a + b)[..., 0].square())


def posterior_process():
    """The reverse process of the joint posterior: the optimal guide."""
    weights, means, covariances, _ = pairs()
    alpha = ALPHAS[-1]
    spread = alpha**2 * covariances + (1 - alpha**2) * torch.eye(2)
    parts = dist.MultivariateNormal(alpha * means, spread)
    source = dist.MixtureSameFamily(dist.Categorical(weights), parts)
    return Pair(
        MixtureDenoiser(means, covariances, weights),
        VariancePreserving(),
        num_steps=STEPS,
        variance="mixture",
        source=source,
    )


def test_two_mixtures_reference_figures():
    weights, means, _, log_z = pairs()
    assert log_z == pytest.approx(LOG_Z, abs=5e-7)
    assert weights.tolist() == pytest.approx([0.0017, 0.7979, 0.2003, 0.0001], abs=5e-5)
    mean = weights @ means
    assert mean.tolist() == pytest.approx([-1.1761, 0.9668], abs=5e-5)


@pytest.mark.parametrize("twist", [Optimal(), None], ids=["optimal twist", "no twist"])
def test_two_mixtures_guided_by_one_process(twist):
    """One particle knows the evidence, though the guide is one process and the model two."""
    process = posterior_process()
    method = SMC(
        mixtures_model, lambda: process("both"), twist=twist, num_particles=1, num_runs=2000
    )
    states = list(method.iterate())
    for state in states if twist is not None else states[-1:]:
        assert_zero_variance(state.log_evidence, pairs()[-1])
    a, b = states[-1].x["a"][:, 0, 0], states[-1].x["b"][:, 0, 0]
    assert abs(z_score(a, -1.1761)) < BOUND
    assert abs(z_score((a + 1.1761) * (b - 0.9668), -1.6985)) < BOUND


def test_two_mixtures_with_the_optimal_twist():
    weights, _, _, log_z = pairs()
    method = SMC(mixtures_model, twist=Optimal(), num_particles=8, num_runs=2000)
    last = finish(method)
    a, b = last.x["a"][..., 0], last.x["b"][..., 0]
    assert abs(z_of_evidence(last, log_z)) < BOUND
    assert abs(z_of_mean(last, a, -1.1761, log_z)) < BOUND
    assert abs(z_of_mean(last, b, 0.9668, log_z)) < BOUND
    share = float(weights[:2].sum())
    assert abs(z_of_mean(last, (a < 0).double(), share, log_z)) < BOUND


def test_two_mixtures_twisted():
    method = TwistedSMC(mixtures_model, num_particles=32, num_runs=500)
    last = finish(method)
    assert abs(z_of_evidence(last, pairs()[-1])) < BOUND
