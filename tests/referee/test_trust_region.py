"""Learned twists where everything is known: Gaussian data, five steps and a quadratic reward."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff import Program
from smcdiff.inference import SMC, GaussianKernels, QuadraticTwist, TrustRegionTwistedSMC
from smcdiff.models import Diffusion, FromAlphas, GaussianDenoiser

from .checks import BOUND, assert_zero_variance, z_of_evidence, z_score
from .closed_forms import Affine, alphas, exact_kernel, noised, normal
from .five_steps import TWISTED, TWISTS

DATA, LEVELS, LOG_Z = normal(0.5, [[1.44]]), alphas(), -1.6211919184
TARGET, WIDTH = 2.0, 0.5


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prior(size=1):
    """Exact transitions, from the exact law of x_T."""
    denoiser = GaussianDenoiser(torch.full((size,), 0.5), torch.full((size,), 1.44))
    start = noised(DATA, LEVELS[5])
    source = dist.Normal(start.mean.expand(size), start.covariance[0].sqrt().expand(size))
    return Diffusion(
        denoiser, FromAlphas(LEVELS[1:]), num_steps=5, variance="exact", source=source.to_event(1)
    )


def program(size=1):
    x_0 = prior(size)

    def model():
        x = x_0("x")
        pyro.factor("reward", -((x - TARGET) ** 2).sum(-1) / (2 * WIDTH**2))

    return model


def kernels():
    """The model's transitions out of x_t, t = 1, ..., 5, and of the start as that out of x_6."""
    own = {t: exact_kernel(DATA, LEVELS[t - 1], LEVELS[t]) for t in range(1, 6)}
    start = noised(DATA, LEVELS[5])
    return own | {6: Affine(torch.zeros(1, 1), start.mean, start.covariance)}


def coefficients(beta=1.0, slack=True):
    """a and b of log E[exp(beta r(x_0)) | x_t]; of the plug-in without slack."""
    found = {0: (beta / WIDTH**2, beta * TARGET / WIDTH**2)}
    for t in range(1, 6):
        level = LEVELS[t]
        gain = level * 1.44 / (level**2 * 1.44 + 1 - level**2)
        offset = 0.5 - gain * level * 0.5
        variance = (
            WIDTH**2 / beta + (1.44 * (1 - level**2) / (level**2 * 1.44 + 1 - level**2)) * slack
        )
        found[t] = (gain**2 / variance, gain * (TARGET - offset) / variance)
    return found


def twisted(table, size=1):
    """The quadratic twist with these coefficients."""
    twist = QuadraticTwist()
    twist.restore(
        {f"x/{t}": torch.tensor(ab)[:, None].expand(2, size).clone() for t, ab in table.items()}
    )
    return twist


# ---------------------------------------------------------------------------------- closed forms


def test_coefficients_are_the_printed_ones():
    for t, (a, b) in coefficients().items():
        assert (a, b) == pytest.approx(TWISTS[t][:2], abs=1e-8)


@pytest.mark.parametrize(("beta", "printed"), TWISTED.items())
def test_twisted_transitions_are_the_printed_ones(beta, printed):
    table = coefficients(beta)
    for t, own in kernels().items():
        a, b = table[t - 1]
        variance = 1 / (1 / own.covariance + a)
        slope = variance * own.slope / own.covariance
        offset = variance * (own.offset / own.covariance + b)
        found = float(slope), float(offset), float(variance)
        assert found == pytest.approx(printed[t], abs=2e-6 if beta < 1 else 1e-8)


def test_bellman():
    """The optimal twist is its own normaliser, up to a constant; learned ones are met below."""
    twist, process = twisted(coefficients()), prior()
    twist.prepare(Program(program()))
    x = torch.linspace(-4, 6, 50)[:, None]
    for t in range(1, 6):
        paid = twist.prepay(t, {"x": x}, {"x": process.kernel(x, t)}, {})
        assert float(paid.max() - paid.min()) < 1e-13
        assert float(paid[0]) == pytest.approx(TWISTS[t][2] - TWISTS[t - 1][2], abs=2e-8)


@pytest.mark.parametrize(("particles", "threshold"), [(1, 0.5), (3, 1.0), (5, 0.0)])
def test_the_optimal_twist_has_no_variance(particles, threshold):
    twist = twisted(coefficients())
    method = SMC(
        program(),
        twist=twist,
        proposal=twist,
        num_particles=particles,
        num_runs=20,
        ess_threshold=threshold,
    )
    for state in list(method.iterate())[1:]:
        log_weights = state.log_norm[:, None] + state.log_weights
        assert float(log_weights.max() - log_weights.min()) < 1e-9
    assert_zero_variance(state.log_evidence, LOG_Z)
    x = state.x["x"][:, :, 0]
    assert abs(z_score(x, 1.7781065)) < BOUND


# ------------------------------------------------------------------------------------- one step


def learned_kernels(twist):
    """Slope, offset and variance of a family's transitions out of x_t, as in the tables above."""
    found = {}
    for t, own in kernels().items():
        sigma = float(own.covariance) ** 0.5
        if isinstance(twist, GaussianKernels):
            _, _, slope, offset, width = twist.tables[f"x/{t - 1}"][:, 0]
            found[t] = (
                float(own.slope + sigma * slope),
                float(own.offset + sigma * offset),
                float((sigma * width) ** 2),
            )
        else:
            a, b = twist.tables[f"x/{t - 1}"][:, 0]
            kept = 1 / (1 + a * sigma**2)
            found[t] = (
                float(kept * own.slope),
                float(kept * (own.offset + sigma**2 * b)),
                float(kept * sigma**2),
            )
    return found


@pytest.mark.parametrize("family", [GaussianKernels, QuadraticTwist])
def test_one_step_is_the_printed_row(family):
    """Weighted regression on paths of the prior, within the error seen over repetitions."""
    partly = TWISTED[0.301023]  # where the first step with epsilon = .5 ends
    pyro.set_rng_seed(1)
    taus, rows = [], []
    for _ in range(16):
        twist = family(pseudo_count=0.0)
        method = TrustRegionTwistedSMC(
            program(), twist, epsilon=0.5, num_iterations=1, num_particles=5000
        )
        taus.append(float(method.learn()[0].tau[0]))
        rows.append([value for t in partly for value in learned_kernels(twist)[t]])
    assert abs(z_score(torch.tensor(taus), 0.301023)) < BOUND
    found = torch.tensor(rows)
    expected = torch.tensor([value for t in partly for value in partly[t]])
    moving = found.std(0) > 0  # the start has no slope
    z = (found.mean(0) - expected)[moving] / (found.std(0)[moving] / 16**0.5)
    assert float(z.abs().max()) < BOUND
    assert float((found.mean(0) - expected).abs().max()) < 0.01


# ------------------------------------------------------------------------------------ learning


def headline(family, epsilon, **options):
    """Ten copies: log Z = -16.212, and a thousand paths per sweep."""
    pyro.set_rng_seed(0)
    return TrustRegionTwistedSMC(
        program(10), family, epsilon=epsilon, num_particles=1000, num_runs=8, **options
    )


@pytest.mark.parametrize("family", [GaussianKernels, QuadraticTwist])
def test_the_trust_region_finds_the_target(family):
    method = headline(family(), 0.5)
    posterior = method.run()
    betas = torch.stack([each.beta[0] for each in method.iterations])
    schedule = torch.tensor([0.0478, 0.1155, 0.2142, 0.3619])
    torch.testing.assert_close(betas[:4], schedule, rtol=0, atol=0.02)
    assert 7 <= len(betas) <= 9
    assert float(betas[-1]) == 1
    first, last = method.iterations[0], method.iterations[-1]
    assert float(first.ess[0]) < 0.002
    assert float(last.ess[0]) > 0.5
    assert abs(float(last.log_evidence[0]) - 10 * LOG_Z) < 0.2
    assert abs(z_of_evidence(posterior.particles, 10 * LOG_Z)) < BOUND
    assert float(posterior.evidence.standard_error) < 0.05
    assert float((posterior.particles.ess / 1000).min()) > 0.5
    assert posterior.diagnose().verdict == "reliable"


def test_without_it_cross_entropy_collapses():
    """On one path, for good: neither the anchor nor a floor is there to help."""
    with pytest.warns(UserWarning, match="epsilon = inf never binds: 1000 paths diverge by at"):
        method = headline(GaussianKernels(pseudo_count=0.0, floor=1e-6), math.inf)
    with pytest.warns(UserWarning, match="GaussianKernels has more parameters than"):
        method.learn()
    assert float(method.iterations[0].ess[0]) < 0.002
    for each in method.iterations[1:]:
        assert float(each.log_evidence[0]) < 10 * LOG_Z - 50
        assert float(each.ess[0]) < 0.01


def test_learned_twists_obey_bellman():
    """Where the target lives, what is prepaid becomes a constant."""
    pyro.set_rng_seed(0)
    twist, process = QuadraticTwist(), prior()
    method = TrustRegionTwistedSMC(program(), twist, num_particles=20_000, num_iterations=4)
    method.learn()
    x = torch.linspace(0.0, 2.5, 50)[:, None]
    for t in range(1, 6):
        paid = twist.prepay(t, {"x": x}, {"x": process.kernel(x, t)}, {})
        optimal = TWISTS[t][1] * x - 0.5 * TWISTS[t][0] * x**2
        assert float(paid.std()) < 0.05 * float(optimal.std())


# --------------------------------------------------------------------------- an overconfident one


def plug_in(power=1.0):
    """exp(-(E[x_0 | x_t] - y)^2 / 2 sigma^2) to a power at t >= 1: ignores what x_t leaves open."""
    blind = {t: (power * a, power * b) for t, (a, b) in coefficients(1.0, False).items()}
    return blind | {0: coefficients()[0]}


def precision(table):
    """The precision matrix of x_5, ..., x_0 under the twisted transitions."""
    matrix = torch.zeros(6, 6)
    for row, t in enumerate((6, 5, 4, 3, 2, 1)):
        own = kernels()[t]
        variance = 1 / (1 / own.covariance + table[t - 1][0])
        slope = float(variance * own.slope / own.covariance)
        line = torch.zeros(6)
        line[row] = 1.0
        if row:
            line[row - 1] = -slope
        matrix += line.outer(line) / float(variance)
    return matrix


@pytest.mark.parametrize(
    ("table", "smallest"),
    [
        (dict.fromkeys(range(6), (0.0, 0.0)), 0.702),
        (coefficients(), 0.590),
        (plug_in(), -0.572),
        (plug_in(0.25), 0.578),
        (plug_in(0.5), 0.276),
        (plug_in(0.75), -0.116),
    ],
    ids=["bootstrap", "optimal", "plug-in", "to .25", "to .5", "to .75"],
)
def test_which_weights_have_a_second_moment(table, smallest):
    """Those for which 2 Lambda_target - Lambda_proposal is positive definite."""
    assert smallest_of(table) == pytest.approx(smallest, abs=6e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("table", [plug_in(), coefficients(0.9)], ids=["plug-in", "nearly optimal"])
def test_the_diagnosis_flags_weights_without_a_second_moment(table, seed):
    pyro.set_rng_seed(seed)
    twist = twisted(table)
    method = SMC(
        program(),
        twist=twist,
        proposal=twist,
        num_particles=4000,
        num_runs=4,
        ess_threshold=0.0,
    )
    diagnosis = method.run().diagnose()
    if smallest_of(table) < 0:
        assert diagnosis.verdict != "reliable"
        assert diagnosis.worst_khat > 0.7
    else:
        assert diagnosis.verdict == "reliable"
        assert diagnosis.worst_khat < 0.5


def smallest_of(table):
    return float(torch.linalg.eigvalsh(2 * precision(coefficients()) - precision(table))[0])
