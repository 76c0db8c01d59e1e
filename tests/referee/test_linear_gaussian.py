"""Gaussian data and observations: with the optimal twist and kernels one particle knows log Z."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import SMC, DenoisedLikelihood, Tempered, TwistedKernel, TwistedSMC
from smcdiff.laws import CovariantNormal
from smcdiff.models import Diffusion, GaussianDenoiser, VariancePreserving

from .checks import BOUND, assert_zero_variance, finish, z_of_evidence, z_score
from .closed_forms import (
    BETAS,
    alphas,
    ddpm_kernel,
    exact_kernel,
    noised,
    normal,
    observed,
    propagate,
)
from .five_steps import KERNELS, TWISTED, TWISTS

DATA = normal(0.5, 1.2**2)
LOG_Z = -1.6211919184
CONSTANT = math.log(0.5 * math.sqrt(2 * math.pi))  # the reward exp(-2 (x - 2)^2) is not normalised
ONE = torch.ones(1, 1, dtype=torch.float64)
AT_TWO = torch.tensor([2.0], dtype=torch.float64)
_, EVIDENCE = observed(DATA, ONE, 0.25 * ONE, AT_TWO)


def chain(variance="exact", source=True):
    start = noised(DATA, alphas()[-1])
    law = dist.Normal(start.mean, start.covariance[0].sqrt()).to_event(1) if source else None
    denoiser = GaussianDenoiser(DATA.mean, DATA.covariance)
    schedule = VariancePreserving(torch.tensor(BETAS))
    return Diffusion(denoiser, schedule, num_steps=5, variance=variance, source=law)


def program(prior, scale=0.5):
    def model():
        x = prior("x")
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=AT_TWO)

    return model


def test_log_psi_is_the_printed_one():
    method = TwistedSMC(program(chain()), covariance="jacobian")
    x = torch.tensor([[0.0], [1.0]])
    for t, (*_, at_zero, at_one) in TWISTS.items():
        found = (method.log_psi(t, {"x": x}) + CONSTANT).exp()
        assert found.tolist() == pytest.approx([at_zero, at_one], abs=1e-8)


@pytest.mark.parametrize(
    ("t", "states", "latents", "match"),
    [
        (6, {"x": (2, 1)}, {}, "t must be between 0 and num_steps = 5, got 6"),
        (1, {"z": (2, 1)}, {}, r"needs the processes \['x'\] in x"),
        (1, {"x": (2, 1)}, {"scale": (2,)}, r"the latents \[\], got \['x'\] and \['scale'\]"),
    ],
)
def test_log_psi_refuses_what_is_no_state(t, states, latents, match):
    method = TwistedSMC(program(chain()))
    x, latents = ({n: torch.zeros(s) for n, s in each.items()} for each in (states, latents))
    with pytest.raises(ValueError, match=match):
        method.log_psi(t, x, latents=latents)


def proposed(prior, method):
    """A, B and V of every move and of the start (6), read off the densities of a run's draws.

    log q is a quadratic in x_{t-1} and x_t, so that six coefficients tell all.
    """
    states = list(method.iterate())
    first = states[0]
    x = first.x["x"][0, :, 0]
    log_q = prior.initial().log_prob(first.x["x"][0])
    log_q = log_q - (first.log_weights - first.cache["log_psi"])[0]
    found = {6: fitted(log_q, torch.zeros_like(x), x)}
    for before, after in zip(states, states[1:], strict=False):
        increment = after.log_weights - before.log_weights
        log_ratio = increment - after.cache["log_psi"] + before.cache["log_psi"]
        log_p = prior.kernel(before.x["x"][0], before.t).law.log_prob(after.x["x"][0])
        x, y = before.x["x"][0, :, 0], after.x["x"][0, :, 0]
        found[before.t] = fitted(log_p - log_ratio[0], x, y)
    return found


def fitted(log_q, x, y):
    terms = torch.stack([x**0, y, y**2, x, x**2, x * y], -1)
    weights = torch.linalg.lstsq(terms, log_q[:, None], driver="gelsd").solution[:, 0]
    variance = float(-0.5 / weights[2])
    return float(weights[5]) * variance, float(weights[1]) * variance, variance


def path_precision(kernels):
    """The precision matrix of the path x_0, ..., x_T."""
    precision = torch.zeros(6, 6)
    for t, (slope, _, variance) in kernels.items():
        row = torch.zeros(7)
        row[t - 1], row[t] = 1.0, -slope
        precision += torch.outer(row, row)[:6, :6] / variance
    return precision


def test_kernels_are_the_exact_ones():
    prior = chain()
    for t, (slope, offset, variance) in KERNELS.items():
        law = prior.kernel(torch.tensor([[0.0], [1.0]]), t).law
        low, high = law.mean[:, 0].tolist()
        assert (high - low, low) == pytest.approx((slope, offset), abs=1e-8)
        assert law.variance[:, 0].tolist() == pytest.approx([variance] * 2, abs=1e-8)


@pytest.mark.parametrize("covariance", ["auto", "scalar", "diagonal", "jacobian"])
def test_one_particle_knows_the_evidence(covariance):
    method = TwistedSMC(
        program(chain()), covariance=covariance, proposal="conjugate", num_particles=1, num_runs=20
    )
    for state in method.iterate():  # the weights are right at every step, not at the end alone
        assert_zero_variance(state.log_evidence, EVIDENCE)
    assert pytest.approx(LOG_Z, abs=1e-10) == EVIDENCE + CONSTANT


def test_log_twist_is_the_table():
    method = TwistedSMC(program(chain()), num_particles=50, num_runs=1, ess_threshold=0.0)
    for state in method.iterate():
        x = state.x["x"][0, :, 0]
        log_psi = state.cache["log_psi"][0] + CONSTANT
        terms = torch.stack([-0.5 * x**2, x, x**0], -1)
        found = torch.linalg.lstsq(terms, log_psi[:, None]).solution[:, 0]
        a, b, c = found.tolist()
        at = (math.exp(c), math.exp(-0.5 * a + b + c))
        assert (a, b, c, *at) == pytest.approx(TWISTS[state.t], abs=1e-8)


@pytest.mark.parametrize("covariance", ["scalar", "jacobian"])
@pytest.mark.parametrize("beta", TWISTED)
def test_moves_are_the_optimal_kernels(beta, covariance):
    prior = chain()
    scale = 0.5 / math.sqrt(beta)
    method = TwistedSMC(
        program(prior, scale),
        covariance=covariance,
        proposal="conjugate",
        num_particles=100,
        ess_threshold=0.0,
    )
    found = proposed(prior, method)
    tolerance = 1e-8 if beta == 1 else 1e-6  # the table's beta has six digits
    for t, wanted in TWISTED[beta].items():
        assert found[t] == pytest.approx(wanted, abs=tolerance), t


def test_posterior_of_independent_particles():
    last = finish(TwistedSMC(program(chain()), num_particles=1, num_runs=5000))
    x = last.x["x"][..., 0]
    assert abs(z_score(x, 1.7781065)) < BOUND
    assert abs(z_score((x - 1.7781065) ** 2, 0.2130178)) < BOUND


def test_overconfident_twist_has_weights_of_infinite_variance():
    """E[W^2] is finite if and only if twice the target's precision exceeds the proposal's."""
    prior = chain()
    target = path_precision({6: (0.0, 0.0, noised_variance()), **KERNELS})
    target[0, 0] += 1 / 0.25
    options = {"num_particles": 200, "ess_threshold": 0.0}
    methods = {
        0.702: SMC(program(prior), **options),
        0.590: TwistedSMC(program(prior), smoothing=0.0, **options),
        -0.572: TwistedSMC(
            program(prior), covariance="none", proposal="conjugate", smoothing=0.0, **options
        ),
    }
    for smallest, method in methods.items():
        gap = 2 * target - path_precision(proposed(prior, method))
        assert float(torch.linalg.eigvalsh(gap).min()) == pytest.approx(smallest, abs=5e-4)


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_overconfident_twist_is_cured_by_tempering(power):
    prior = chain()
    target = path_precision({6: (0.0, 0.0, noised_variance()), **KERNELS})
    target[0, 0] += 1 / 0.25
    twist = Tempered(DenoisedLikelihood("none"), power)
    method = SMC(
        program(prior),
        twist=twist,
        proposal=TwistedKernel(),
        num_particles=200,
        ess_threshold=0.0,
    )
    gap = 2 * target - path_precision(proposed(prior, method))
    assert float(torch.linalg.eigvalsh(gap).min()) > 0.3
    many = SMC(
        program(prior), twist=twist, proposal=TwistedKernel(), num_particles=8, num_runs=2000
    )
    assert abs(z_of_evidence(finish(many), EVIDENCE)) < BOUND


def noised_variance():
    return float(noised(DATA, alphas()[-1]).covariance)


@pytest.mark.parametrize("variance", ["small", "large", "exact"])
def test_zero_variance_whatever_the_kernels_variance(variance):
    """The chain is the prior, with its own x_T ~ N(0, 1) and its own discretisation error."""
    levels = alphas()
    kernels = {
        "small": lambda a, b: ddpm_kernel(DATA, a, b),
        "large": lambda a, b: ddpm_kernel(DATA, a, b, large=True),
        "exact": lambda a, b: exact_kernel(DATA, a, b),
    }[variance]
    steps = [kernels(levels[t - 1], levels[t]) for t in range(5, 0, -1)]
    _, truth = observed(propagate(normal(0.0, 1.0), steps), ONE, 0.25 * ONE, AT_TWO)
    model = program(chain(variance, source=False))
    for covariance in ("scalar", "jacobian"):
        last = finish(
            TwistedSMC(
                model, covariance=covariance, proposal="conjugate", num_particles=1, num_runs=10
            )
        )
        assert_zero_variance(last.log_evidence, truth)


# ------------------------------------------------------------------- several dimensions and sites

WIDE = normal([0.3, -0.4, 1.0], [[1.0, 0.5, 0.2], [0.5, 0.8, -0.3], [0.2, -0.3, 1.5]])
OPERATOR = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.7, 1.0]], dtype=torch.float64)
NOISE = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
Y = torch.tensor([[1.0, -0.5], [0.0, 2.0], [-3.0, 0.4]], dtype=torch.float64)


def wide_chain(twisted=True):
    """Three correlated dimensions; x_T from its exact law, or from N(0, I)."""
    start = noised(WIDE, alphas()[-1])
    values, vectors = torch.linalg.eigh(start.covariance)
    floor = 0.5 * values[:1].expand(3)
    source = CovariantNormal(start.mean, floor, vectors * (values - floor).sqrt())
    denoiser = GaussianDenoiser(WIDE.mean, WIDE.covariance)
    schedule = VariancePreserving(torch.tensor(BETAS))
    law = source if twisted else None
    return Diffusion(denoiser, schedule, num_steps=5, variance="exact", source=law)


def together(x, y):
    pyro.sample("y", dist.MultivariateNormal(x @ OPERATOR.T, NOISE), obs=y)


def one_event(x, y):
    law = dist.MultivariateNormal((x @ OPERATOR.T)[..., None, :], NOISE)
    pyro.sample("y", law.to_event(1), obs=y[..., None, :])


def apart(x, y):
    scale = NOISE.diagonal().sqrt()
    mean = x @ OPERATOR.T
    pyro.sample("y1", dist.Normal(mean[..., :1], scale[:1]).to_event(1), obs=y[..., :1])
    pyro.sample("y2", dist.Normal(mean[..., 1], scale[1]), obs=y[..., 1])


@pytest.mark.parametrize("exact_start", [True, False])
@pytest.mark.parametrize("site", [together, one_event, apart])
def test_correlated_dimensions_and_several_observations(site, exact_start):
    prior = wide_chain(exact_start)
    levels = alphas()
    steps = [exact_kernel(WIDE, levels[t - 1], levels[t]) for t in range(5, 0, -1)]
    terminal = WIDE if exact_start else propagate(normal([0.0] * 3, torch.eye(3).tolist()), steps)
    noise = NOISE.diagonal().diag() if site is apart else NOISE
    posterior, truth = observed(terminal, OPERATOR, noise, Y[0])

    def model(y):
        site(prior("x"), y)

    method = TwistedSMC(model, covariance="jacobian", num_particles=1, num_runs=2000)
    last = finish(method, Y[0])
    assert_zero_variance(last.log_evidence, truth)
    x = last.x["x"][:, 0]
    for i in range(3):
        assert abs(z_score(x[:, i], float(posterior.mean[i]))) < BOUND
    first = (x[:, 0] - posterior.mean[0]) * (x[:, 2] - posterior.mean[2])
    assert abs(z_score(first, float(posterior.covariance[0, 2]))) < BOUND


@pytest.mark.parametrize("site", [together, apart])
def test_problems_side_by_side(site):
    prior = wide_chain()
    noise = NOISE if site is together else NOISE.diagonal().diag()

    def model(y):
        site(prior("x"), y)

    method = TwistedSMC(model, num_particles=2, num_runs=3, per_problem=("y",))
    last = finish(method, Y)
    assert last.log_evidence.shape == (3, 3)
    for each, y in zip(last.log_evidence, Y, strict=True):
        assert_zero_variance(each, observed(WIDE, OPERATOR, noise, y)[1])


def test_scalar_covariance_is_exact_for_isotropic_data():
    """Where the data have one scale, the cheap twist is the optimal one, whatever the operator."""
    data = normal([0.3, -0.4, 1.0], (0.7 * torch.eye(3)).tolist())
    prior = Diffusion(
        GaussianDenoiser(data.mean, 0.7),
        VariancePreserving(torch.tensor(BETAS)),
        num_steps=5,
        variance="exact",
    )
    levels = alphas()
    steps = [exact_kernel(data, levels[t - 1], levels[t]) for t in range(5, 0, -1)]
    terminal = propagate(normal([0.0] * 3, torch.eye(3).tolist()), steps)
    _, truth = observed(terminal, OPERATOR, NOISE, Y[0])

    def model():
        together(prior("x"), Y[0])

    last = finish(
        TwistedSMC(model, covariance="scalar", proposal="conjugate", num_particles=1, num_runs=10)
    )
    assert_zero_variance(last.log_evidence, truth)
