"""Exact denoisers against closed forms, quadrature, autograd and each other."""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from smcdiff.models.denoisers import (
    Components,
    Denoiser,
    EnumeratedDenoiser,
    GaussianDenoiser,
    MixtureDenoiser,
)
from smcdiff.models.schedules import Grid, VariancePreserving

K, D = 4, 3
LEVELS = [(1.0, 0.3), (0.8, 0.6), (0.05, 0.99), (1.0, 12.0)]
FORMS = [(), (1,), (K,), (1, D), (K, D), (1, D, D), (K, D, D)]

every_form = pytest.mark.parametrize("form", FORMS, ids=str)
every_level = pytest.mark.parametrize(("alpha", "sigma"), LEVELS, ids=str)


def covariances(form: tuple[int, ...]) -> Tensor:
    if len(form) < 3:
        return 0.2 + torch.rand(form, dtype=torch.float64)
    root = torch.randn(form, dtype=torch.float64)
    return root @ root.mT / 2 + 0.1 * torch.eye(D, dtype=torch.float64)


def mixture(form: tuple[int, ...]) -> MixtureDenoiser:
    generator = torch.Generator().manual_seed(len(form))
    means = 1.5 * torch.randn(K, D, dtype=torch.float64, generator=generator)
    return MixtureDenoiser(means, covariances(form), torch.tensor([0.1, 0.2, 0.3, 0.4]).double())


def states(*batch: int) -> Tensor:
    return 2 * torch.randn(*batch, D, dtype=torch.float64)


def dense(tables: Tensor, count: int = K) -> Tensor:
    """Covariances of any form as matrices, one per component."""
    if tables.ndim == 1:
        tables = tables[:, None].expand(-1, D)
    return (tables if tables.ndim == 3 else tables.diag_embed()).expand(count, D, D)


def law(denoiser: MixtureDenoiser, alpha: float = 1.0, sigma: float = 0.0) -> MixtureSameFamily:
    """The law of x_t, from torch.distributions."""
    noise = sigma**2 * torch.eye(D, dtype=torch.float64)
    covariance = alpha**2 * dense(denoiser.covariances) + noise
    parts = MultivariateNormal(alpha * denoiser.means, covariance)
    return MixtureSameFamily(Categorical(denoiser.weights), parts)


def pointwise(parts: Components, points: Tensor) -> Tensor:
    """log p(x_0 | x_t) at points with shape (n, d), with shape (n, batch)."""
    gaussians = MultivariateNormal(parts.means, dense(parts.covariances))
    log_densities: Tensor = gaussians.log_prob(points[:, None, None])
    return (parts.log_weights + log_densities).logsumexp(-1)


# ------------------------------------------------------------------------------------- Gaussians


@every_form
@every_level
def test_log_density_is_that_of_the_noised_mixture(
    form: tuple[int, ...], alpha: float, sigma: float
) -> None:
    denoiser, x = mixture(form), states(5, 2)
    expected = law(denoiser, alpha, sigma).log_prob(x)
    torch.testing.assert_close(denoiser.log_density(x, alpha, sigma), expected)
    torch.testing.assert_close(denoiser.log_prob(x), law(denoiser).log_prob(x))


@every_form
@every_level
def test_mean_is_tweedie(form: tuple[int, ...], alpha: float, sigma: float) -> None:
    denoiser, x = mixture(form), states(5)
    score = torch.func.grad(lambda x: denoiser.log_density(x, alpha, sigma).sum())(x)
    expected = (x + sigma**2 * score) / alpha
    torch.testing.assert_close(denoiser.mean(x, alpha, sigma), expected, rtol=1e-9, atol=1e-9)


@every_form
@every_level
def test_covariance_is_the_jacobian(form: tuple[int, ...], alpha: float, sigma: float) -> None:
    denoiser, x = mixture(form), states(5)
    slope = torch.func.vmap(torch.func.jacrev(lambda x: denoiser.mean(x, alpha, sigma)))(x)
    expected = sigma**2 / alpha * slope
    torch.testing.assert_close(denoiser.covariance(x, alpha, sigma), expected)


@every_form
@every_level
def test_components_obey_bayes(form: tuple[int, ...], alpha: float, sigma: float) -> None:
    """p(x_0 | x_t) p(x_t) = p(x_0) p(x_t | x_0) at every x_0."""
    denoiser, x, points = mixture(form), states(5), states(7)
    noise = MultivariateNormal(alpha * points[:, None], sigma**2 * torch.eye(D).double())
    joint = denoiser.log_prob(points)[:, None] + noise.log_prob(x)
    ours = pointwise(denoiser.components(x, alpha, sigma), points)
    expected = joint - denoiser.log_density(x, alpha, sigma)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_form
def test_components_make_the_moments(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(5)
    parts, weights = denoiser.components(x, 0.8, 0.6), denoiser.components(x, 0.8, 0.6).log_weights
    weights = weights.exp()[..., None]
    mean = (weights * parts.means).sum(-2)
    second = torch.einsum("bko,bkd,bke->bde", weights, parts.means, parts.means)
    within = (weights[..., None] * dense(parts.covariances)).sum(-3)
    torch.testing.assert_close(denoiser.mean(x, 0.8, 0.6), mean)
    expected = within + second - mean[..., None] * mean[..., None, :]
    torch.testing.assert_close(denoiser.covariance(x, 0.8, 0.6), expected)
    assert parts.covariances.shape == (K, *form[1:])


@every_form
def test_batches_of_any_shape(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(2, 3)
    for ask in (denoiser.mean, denoiser.covariance, denoiser.log_density):
        one_by_one = torch.stack([torch.stack([ask(x, 0.8, 0.6) for x in row]) for row in x])
        torch.testing.assert_close(ask(x, 0.8, 0.6), one_by_one)
        assert ask(x[:0], 0.8, 0.6).shape == (0, *one_by_one.shape[1:])


@every_form
def test_data_are_not_denoised(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(5)
    torch.testing.assert_close(denoiser.mean(x, 1.0, 0.0), x, rtol=0, atol=1e-13)
    nothing = torch.zeros(5, D, D, dtype=torch.float64)
    torch.testing.assert_close(denoiser.covariance(x, 1.0, 0.0), nothing, rtol=0, atol=1e-13)


@every_form
def test_noise_tells_nothing(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(5)
    mean = denoiser.weights @ denoiser.means
    torch.testing.assert_close(denoiser.mean(x, 0.0, 1.0), mean.expand(5, D))
    parts = denoiser.components(x, 0.0, 1.0)
    torch.testing.assert_close(parts.covariances, denoiser.covariances.expand_as(parts.covariances))
    standard = MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())
    torch.testing.assert_close(denoiser.log_density(x, 0.0, 1.0), standard.log_prob(x))


@every_form
def test_forms_agree_with_matrices(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(5)
    other = MixtureDenoiser(denoiser.means, dense(denoiser.covariances), denoiser.weights)
    for name in ("mean", "covariance", "log_density"):
        ours, theirs = (getattr(each, name)(x, 0.8, 0.6) for each in (denoiser, other))
        torch.testing.assert_close(ours, theirs)


@every_form
def test_levels_may_be_tensors(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(5)
    alpha, sigma = torch.tensor(0.8).double(), torch.tensor(0.6).double()
    for ask in (denoiser.mean, denoiser.covariance, denoiser.log_density):
        torch.testing.assert_close(ask(x, alpha, sigma), ask(x, 0.8, 0.6))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode
@every_form
def test_forward_mode_and_batched_levels(form: tuple[int, ...]) -> None:
    denoiser, x, tangent = mixture(form), states(5), states(5)
    change = torch.func.jvp(lambda x: denoiser.mean(x, 0.8, 0.6), (x,), (tangent,))[1]
    covariance = denoiser.covariance(x, 0.8, 0.6)
    expected = 0.8 / 0.36 * (covariance @ tangent[..., None])[..., 0]
    torch.testing.assert_close(change, expected)
    alphas = torch.tensor([0.1, 0.8]).double()
    sigmas = torch.sqrt(1 - alphas**2)
    both = torch.func.vmap(denoiser.mean, in_dims=(None, 0, 0))(x, alphas, sigmas)
    one_by_one = [denoiser.mean(x, a, s) for a, s in zip(alphas, sigmas, strict=True)]
    torch.testing.assert_close(both, torch.stack(one_by_one))


@every_form
def test_gradients_pass_gradcheck(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(2).requires_grad_()
    for ask in (denoiser.mean, denoiser.covariance, denoiser.log_density):
        assert torch.autograd.gradcheck(lambda x, ask=ask: ask(x, 0.8, 0.6), (x,))


def test_moments_against_quadrature() -> None:
    """One dimension, weights and variances all different."""
    means, variances = torch.tensor([[-2.0], [0.5], [3.0]]).double(), torch.rand(3).double() + 0.1
    denoiser = MixtureDenoiser(means, variances, torch.tensor([0.5, 0.3, 0.2]).double())
    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    heights = torch.exp(-0.5 * (grid[:, None] - means[:, 0]) ** 2 / variances)
    prior = heights @ (denoiser.weights / (2 * math.pi * variances).sqrt())
    for x in (-1.0, 0.0, 2.5):
        likelihood = (-0.5 * ((x - 0.7 * grid) / 0.5) ** 2).exp() / (0.5 * math.sqrt(2 * math.pi))
        joint = prior * likelihood
        evidence = torch.trapezoid(joint, grid)
        mean = torch.trapezoid(joint * grid, grid) / evidence
        variance = torch.trapezoid(joint * (grid - mean) ** 2, grid) / evidence
        state = torch.tensor([x]).double()
        torch.testing.assert_close(denoiser.log_density(state, 0.7, 0.5), evidence.log())
        torch.testing.assert_close(denoiser.mean(state, 0.7, 0.5)[0], mean)
        torch.testing.assert_close(denoiser.covariance(state, 0.7, 0.5)[0, 0], variance)


# ------------------------------------------------------------------------------------ Posteriors


def observe(d_y: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    operator = torch.randn(d_y, D, dtype=torch.float64)
    root = torch.randn(d_y, d_y, dtype=torch.float64)
    return operator, root @ root.mT + 0.1 * torch.eye(d_y), torch.randn(d_y, dtype=torch.float64)


@every_form
def test_posterior_obeys_bayes(form: tuple[int, ...]) -> None:
    denoiser, points, (operator, noise, y) = mixture(form), states(9), observe()
    posterior, log_evidence = denoiser.posterior(operator, noise, y)
    likelihood = MultivariateNormal(points @ operator.mT, noise).log_prob(y)
    expected = denoiser.log_prob(points) + likelihood - log_evidence
    torch.testing.assert_close(posterior.log_prob(points), expected, rtol=1e-9, atol=1e-9)


@every_form
def test_scalar_noise_is_a_multiple_of_the_identity(form: tuple[int, ...]) -> None:
    denoiser, points, (operator, _, y) = mixture(form), states(9), observe()
    one, evidence_one = denoiser.posterior(operator, 0.3, y)
    two, evidence_two = denoiser.posterior(operator, 0.3 * torch.eye(2).double(), y)
    torch.testing.assert_close(one.log_prob(points), two.log_prob(points))
    torch.testing.assert_close(evidence_one, evidence_two)


def mcgdiff_means(d: int) -> Tensor:
    pairs = torch.tensor(list(itertools.product(range(-2, 3), repeat=2)), dtype=torch.float64)
    return -8 * pairs.repeat(1, d // 2)


@pytest.mark.parametrize("d_y", [1, 2, 4])
def test_posterior_of_the_mcgdiff_mixture(d_y: int) -> None:
    """benchmarks.md 1.1: C = (I + A'A / s^2)^-1, m' = C (m + A'y / s^2)."""
    means, weights, d, noise = mcgdiff_means(8), torch.randn(25).double() ** 2, 8, 0.04
    operator, y = torch.randn(d_y, d).double(), torch.randn(d_y).double()
    posterior, log_evidence = MixtureDenoiser(means, 1.0, weights).posterior(operator, noise, y)
    covariance = (torch.eye(d) + operator.mT @ operator / noise).inverse()
    seen = MultivariateNormal(means @ operator.mT, noise * torch.eye(d_y) + operator @ operator.mT)
    log_joint = (weights / weights.sum()).log() + seen.log_prob(y)
    torch.testing.assert_close(posterior.covariances, covariance[None])
    torch.testing.assert_close(posterior.means, (means + y @ operator / noise) @ covariance)
    torch.testing.assert_close(log_evidence, log_joint.logsumexp(0))
    torch.testing.assert_close(posterior.log_weights, log_joint.log_softmax(0))


def test_precise_observations_keep_the_posterior_sound() -> None:
    operator, y = torch.randn(2, D).double(), torch.randn(2).double()
    posterior, _ = mixture((K, D, D)).posterior(operator, 1e-10, y)
    torch.testing.assert_close(posterior.means @ operator.mT, y.expand(K, 2), rtol=1e-6, atol=1e-6)
    assert (torch.linalg.eigvalsh(posterior.covariances) > 0).all()


def test_posterior_of_a_gaussian() -> None:
    mean, (operator, noise, y) = states(), observe()
    covariance = covariances((1, D, D))[0]
    posterior, log_evidence = GaussianDenoiser(mean, covariance).posterior(operator, noise, y)
    total = operator @ covariance @ operator.mT + noise
    gain = covariance @ operator.mT @ total.inverse()
    expected = MultivariateNormal(operator @ mean, total).log_prob(y)
    torch.testing.assert_close(log_evidence, expected)
    torch.testing.assert_close(posterior.mixture.means[0], mean + gain @ (y - operator @ mean))
    left = covariance - gain @ operator @ covariance
    torch.testing.assert_close(posterior.covariance(states(2), 0.0, 1.0), left.expand(2, D, D))


@every_form
def test_samples_have_the_moments(form: tuple[int, ...]) -> None:
    n, denoiser = 200_000, mixture(form)
    x = denoiser.sample(n)
    weights, means = denoiser.weights, denoiser.means
    mean = weights @ means
    within = (weights[:, None, None] * dense(denoiser.covariances)).sum(0)
    covariance = within + (weights[:, None] * (means - mean)).mT @ (means - mean)
    assert_within_errors(x, mean)
    products = ((x - mean)[:, :, None] * (x - mean)[:, None, :]).flatten(1)
    assert_within_errors(products, covariance.flatten())


def assert_within_errors(draws: Tensor, expected: Tensor) -> None:
    z = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4.3


def test_posterior_by_importance_sampling() -> None:
    denoiser, (operator, noise, y) = mixture((K, D)), observe()
    posterior, log_evidence = denoiser.posterior(operator, noise, y)
    x = denoiser.sample(200_000)
    ratio = (MultivariateNormal(x @ operator.mT, noise).log_prob(y) - log_evidence).exp()
    assert_within_errors(ratio[:, None], torch.ones(1, dtype=torch.float64))
    mean = posterior.weights @ posterior.means
    assert_within_errors(ratio[:, None] * (x - mean), torch.zeros(D, dtype=torch.float64))


# ---------------------------------------------------------------------- Numbers from tri_tsmc.md

BETAS = (0.05, 0.10, 0.20, 0.35, 0.50)


def noise_levels() -> list[tuple[float, float]]:
    grid: Grid = VariancePreserving(BETAS).grid(5)
    return list(zip(grid.alpha.tolist(), grid.sigma.tolist(), strict=True))


def test_a_gaussian_twists() -> None:
    """Test A: psi_t(x) for the reward -(x_0 - 2)^2 / (2 * 0.25)."""
    at_zero = (0.00033546, 0.00132650, 0.00703475, 0.03406598, 0.09525701, 0.15274251)
    at_one = (0.13533528, 0.17724843, 0.23883306, 0.29794836, 0.31436024, 0.29282201)
    denoiser = GaussianDenoiser(torch.tensor([0.5]).double(), 1.44)
    x = torch.tensor([[0.0], [1.0]]).double()
    for level, *expected in zip(noise_levels(), at_zero, at_one, strict=True):
        mean, variance = denoiser.mean(x, *level)[:, 0], denoiser.covariance(x, *level)[:, 0, 0]
        total = 0.25 + variance
        twist = (0.25 / total).sqrt() * (-((mean - 2) ** 2) / (2 * total)).exp()
        assert twist.tolist() == pytest.approx(expected, abs=6e-9)


def test_a_gaussian_evidence() -> None:
    """Test A: log Z = -1.6211919184, posterior N(1.7781065, 0.2130178)."""
    one = torch.ones(1, 1).double()
    prior = GaussianDenoiser(torch.tensor([0.5]).double(), 1.44)
    posterior, log_evidence = prior.posterior(one, 0.25, torch.tensor([2.0]).double())
    log_z = log_evidence + 0.5 * math.log(2 * math.pi * 0.25)
    assert log_z.item() == pytest.approx(-1.6211919184, abs=1e-10)
    assert posterior.mixture.means.item() == pytest.approx(1.7781065, abs=1e-7)
    assert posterior.mixture.covariances.item() == pytest.approx(0.2130178, abs=1e-7)


def test_b1_linear_reward() -> None:
    """Test B1: log Z, weights and means of the tilted mixture, exact and plug-in twists at 0."""
    deviations = torch.tensor([0.5, 0.4, 0.7], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    denoiser = MixtureDenoiser(
        torch.tensor([[-2.0], [0.5], [3.0]]).double(), deviations**2, weights
    )
    slope = 0.8
    prior = denoiser.components(torch.zeros(1).double(), 0.0, 1.0)
    tilt = slope * prior.means[:, 0] + slope**2 * prior.covariances / 2
    log_joint = prior.log_weights + tilt
    assert log_joint.logsumexp(0).item() == pytest.approx(1.1503543782, abs=1e-10)
    expected = [0.03461384, 0.14910162, 0.81628453]
    assert log_joint.softmax(0).tolist() == pytest.approx(expected, abs=1e-8)
    tilted = prior.means[:, 0] + slope * prior.covariances
    assert tilted.tolist() == pytest.approx([-1.8, 0.628, 3.392], abs=1e-12)

    exact = [1.11700480, 1.24883677, 1.30385346, 1.27593272, 1.71481406]
    plug_in = [1.10269811, 1.21016626, 1.17922761, 0.88765268, 0.74225106]
    for level, psi, guess in zip(noise_levels()[1:], exact, plug_in, strict=True):
        parts = denoiser.components(torch.zeros(1).double(), *level)
        log_twist = slope * parts.means[:, 0] + slope**2 * parts.covariances / 2
        twist = (parts.log_weights + log_twist).logsumexp(0).exp()
        assert twist.item() == pytest.approx(psi, abs=6e-9)
        mean = denoiser.mean(torch.zeros(1).double(), *level)
        assert (slope * mean).exp().item() == pytest.approx(guess, abs=6e-9)


def test_b2_quadratic_reward() -> None:
    """Test B2: -x^2/100 - y^2 is a Gaussian likelihood with variances 50 and 1/2."""
    means = torch.tensor(list(itertools.product([-4.0, 0.0, 4.0], repeat=2))).double()
    noise = torch.diag(torch.tensor([50.0, 0.5])).double()
    prior = MixtureDenoiser(means, 0.3)
    posterior, log_evidence = prior.posterior(torch.eye(2).double(), noise, torch.zeros(2).double())
    log_z = log_evidence + 0.5 * torch.logdet(2 * math.pi * noise)
    assert log_z.item() == pytest.approx(-1.4396866, abs=5e-8)
    middle = posterior.weights[means[:, 1] == 0]
    assert middle.tolist() == pytest.approx([0.31519098, 0.36952724, 0.31519098], abs=5e-9)
    others = posterior.weights[means[:, 1] != 0]
    assert others.min() > 1.35e-5
    assert others.max() < 1.75e-5

    def reward(law: MixtureDenoiser) -> float:
        parts = law.components(torch.zeros(2).double(), 0.0, 1.0)
        second = dense_2d(parts.covariances) + parts.means**2
        moments = parts.log_weights.exp() @ second
        return float(-moments[0] / 100 - moments[1])

    assert reward(posterior) == pytest.approx(-0.2907202, abs=5e-8)
    assert reward(prior) == pytest.approx(-11.0763, abs=5e-5)


def dense_2d(tables: Tensor) -> Tensor:
    """The variances per coordinate."""
    return tables[:, None].expand(-1, 2) if tables.ndim == 1 else tables.diagonal(dim1=1, dim2=2)


# ------------------------------------------------------------------------------ Masked sequences


def joint_of_test_c() -> Tensor:
    x_1, x_2, x_3 = torch.meshgrid(*[torch.arange(3.0).double()] * 3, indexing="ij")
    return torch.exp(torch.sin(1 + x_1 + 2 * x_2 + 3 * x_3))


ALL_STATES = torch.tensor(list(itertools.product(range(4), repeat=3)))


def test_enumerated_denoiser_counts() -> None:
    joint = joint_of_test_c()
    denoiser = EnumeratedDenoiser(joint)
    for state, logits in zip(ALL_STATES, denoiser(ALL_STATES), strict=True):
        counts = torch.zeros(3, 3).double()
        for x in itertools.product(range(3), repeat=3):
            if all(seen in (3, token) for seen, token in zip(state.tolist(), x, strict=True)):
                counts[torch.arange(3), list(x)] += joint[x]
        torch.testing.assert_close(logits.exp(), counts / counts.sum(-1, keepdim=True))


def test_enumerated_denoiser_knows_marginals() -> None:
    joint = joint_of_test_c()
    probabilities = EnumeratedDenoiser(joint).log_prob(torch.tensor([[3, 3, 3], [3, 1, 3]])).exp()
    expected = torch.stack([torch.tensor(1.0).double(), joint[:, 1].sum() / joint.sum()])
    torch.testing.assert_close(probabilities, expected)


def test_enumerated_denoiser_keeps_what_is_revealed() -> None:
    logits = EnumeratedDenoiser(joint_of_test_c())(torch.tensor([3, 1, 3]))
    assert logits[1].tolist() == [-torch.inf, 0.0, -torch.inf]


def test_impossible_states_stay_finite() -> None:
    joint = torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    logits = EnumeratedDenoiser(joint)(torch.tensor([[2, 1], [2, 0], [2, 2]]))
    half = math.log(0.5)
    assert logits[0].tolist() == [pytest.approx([half, half]), [-torch.inf, 0.0]]
    assert logits[2].tolist() == [pytest.approx([half, half]), [0.0, -torch.inf]]


def reverse_kernel(reveal: float) -> Tensor:
    """K[z, z'] over all 64 states: every masked position is revealed with probability `reveal`."""
    denoise = EnumeratedDenoiser(joint_of_test_c())(ALL_STATES).exp()
    shown = torch.cat(
        [reveal * denoise, torch.full((64, 3, 1), 1 - reveal, dtype=torch.float64)], -1
    )
    kept = torch.nn.functional.one_hot(ALL_STATES, 4).double()
    step = torch.where((ALL_STATES == 3)[..., None], shown, kept)
    chosen = (
        step[:, None]
        .expand(64, 64, 3, 4)
        .gather(-1, ALL_STATES[None, :, :, None].expand(64, -1, -1, 1))
    )
    return chosen[..., 0].prod(-1)


def test_c_masked_chain() -> None:
    """Test C: the chain's law of x_0 and its twists, by dynamic programming over 64 states."""
    kernels = [reverse_kernel(reveal) for reveal in (1.0, 1 / 2, 1 / 3)]
    complete = (ALL_STATES < 3).all(-1)
    joint = joint_of_test_c().flatten() / joint_of_test_c().sum()
    law = (kernels[2][-1] @ kernels[1] @ kernels[0])[complete]
    total_variation = 0.5 * (law - joint).abs().sum()
    assert total_variation.item() == pytest.approx(0.1092495129, abs=1e-10)

    x_1, x_2, x_3 = ALL_STATES.unbind(-1)
    reward = 2.0 * (x_1 == x_2) + 1.5 * (x_3 == 2)
    twist = torch.where(complete, reward.double().exp(), 0.0)
    twists = [twist := kernel @ twist for kernel in kernels]
    assert twists[2][-1].item() == pytest.approx(6.9033765735, abs=1e-9)
    table = {
        (0, 3, 3): (7.73000968, 8.09270299),
        (3, 3, 2): (14.12793070, 14.52282961),
        (1, 1, 3): (12.40219186, 12.40219186),
        (0, 1, 3): (2.53823927, 2.53823927),
    }
    for state, expected in table.items():
        index = int((torch.tensor(state) == ALL_STATES).all(-1).nonzero())
        ours = [twists[0][index].item(), twists[1][index].item()]
        assert ours == pytest.approx(expected, abs=1e-8)


# ------------------------------------------------------------------------- Numbers and machinery


@pytest.mark.parametrize("form", [(), (25,), (25, 80), (1, 80, 80), (25, 80, 80)], ids=str)
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.01), (0.7, 0.7), (0.01, 1.0)])
def test_single_precision_is_accurate_far_out(
    form: tuple[int, ...], alpha: float, sigma: float
) -> None:
    """|x| about 100; compared with double precision on the same, rounded, numbers."""
    single = MixtureDenoiser(mcgdiff_means(80).float(), unit_covariances(form), torch.rand(25))
    double = copy.deepcopy(single).double()
    x = alpha * single.sample(50) + sigma * torch.randn(50, 80)
    mean, covariance = single.mean(x, alpha, sigma), single.covariance(x, alpha, sigma)
    assert {mean.dtype, covariance.dtype} == {torch.float32}
    x = x.double()
    torch.testing.assert_close(mean.double(), double.mean(x, alpha, sigma), rtol=1e-6, atol=2e-5)
    expected = double.covariance(x, alpha, sigma)
    torch.testing.assert_close(
        covariance.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    log_density = single.log_density(x.float(), alpha, sigma)
    torch.testing.assert_close(
        log_density, double.log_density(x, alpha, sigma), rtol=1e-9, atol=1e-9
    )


def unit_covariances(form: tuple[int, ...]) -> Tensor:
    return torch.eye(80).expand(form) if len(form) == 3 else torch.ones(form)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("form", [(), (5,), (5, 500)], ids=str)
def test_aligned_means_form_no_matrices(form: tuple[int, ...]) -> None:
    denoiser = MixtureDenoiser(torch.randn(5, 500), torch.ones(form))
    with LargestTensor() as largest:
        denoiser.mean(torch.randn(7, 500), 0.8, 0.6)
        denoiser.log_density(torch.randn(7, 500), 0.8, 0.6)
    assert largest.numel == 7 * 500


@every_form
def test_dtype_follows(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form).float(), states(5).float()
    assert {buffer.dtype for buffer in denoiser.buffers()} == {torch.float32}
    parts = denoiser.components(x, 0.8, 0.6)
    assert {parts.means.dtype, parts.covariances.dtype, denoiser.sample(2).dtype} == {torch.float32}
    assert parts.log_weights.dtype == denoiser.log_density(x, 0.8, 0.6).dtype == torch.float64
    assert denoiser.mean(x.double(), 0.8, 0.6).dtype == torch.float64
    posterior, log_evidence = denoiser.posterior(torch.eye(D), 0.1, x[0])
    assert (posterior.means.dtype, log_evidence.dtype) == (torch.float32, torch.float64)


@every_form
def test_device_follows(form: tuple[int, ...]) -> None:
    """Meta tensors refuse to meet tensors on the processor."""
    denoiser, x = mixture(form).to("meta"), states(5).to("meta")
    parts = denoiser.components(x, 0.8, 0.6)
    results = [ask(x, 0.8, 0.6) for ask in (denoiser.mean, denoiser.covariance)]
    results += [denoiser.log_prob(x), denoiser.covariances, parts.means, parts.covariances]
    assert {result.device.type for result in results} == {"meta"}


@every_form
def test_denoisers_travel(form: tuple[int, ...]) -> None:
    denoiser, x = mixture(form), states(5)
    file = io.BytesIO()
    torch.save(denoiser.state_dict(), file)
    file.seek(0)
    blank = MixtureDenoiser(torch.zeros(K, D).double(), unit_like(denoiser.covariances))
    blank.load_state_dict(torch.load(file, weights_only=True))
    for other in (pickle.loads(pickle.dumps(denoiser)), blank):
        for name in ("mean", "covariance", "log_density"):
            ours, theirs = (getattr(each, name)(x, 0.8, 0.6) for each in (denoiser, other))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def unit_like(tables: Tensor) -> Tensor:
    return torch.eye(D).double().expand_as(tables) if tables.ndim == 3 else torch.ones_like(tables)


def test_enumerated_denoiser_travels() -> None:
    denoiser = EnumeratedDenoiser(joint_of_test_c())
    other = EnumeratedDenoiser(torch.ones(3, 3, 3).double())
    other.load_state_dict(denoiser.state_dict())
    assert torch.equal(other(ALL_STATES), denoiser(ALL_STATES))
    assert denoiser.float()(ALL_STATES).dtype == torch.float32


def test_buffers_are_not_parameters() -> None:
    denoiser = mixture((K, D, D))
    assert not list(denoiser.parameters())
    means = torch.zeros(2, D)
    copied = MixtureDenoiser(means, 1.0)
    means.fill_(7.0)
    assert (copied.means == 0).all()


@pytest.mark.parametrize("form", [(), (D,), (D, D)], ids=str)
def test_gaussian_is_a_mixture_of_one(form: tuple[int, ...]) -> None:
    mean, x = states(), states(5)
    covariance = covariances((1, *form))[0]
    gaussian = GaussianDenoiser(mean, covariance)
    full = dense(covariance[None], 1)[0]
    noised = 0.64 * full + 0.36 * torch.eye(D)
    gain = 0.8 * full @ noised.inverse()
    torch.testing.assert_close(gaussian.mean(x, 0.8, 0.6), mean + (x - 0.8 * mean) @ gain.mT)
    left = full - 0.8 * gain @ full
    torch.testing.assert_close(gaussian.covariance(x, 0.8, 0.6), left.expand(5, D, D))
    expected = MultivariateNormal(0.8 * mean, noised).log_prob(x)
    torch.testing.assert_close(gaussian.log_density(x, 0.8, 0.6), expected)
    torch.testing.assert_close(gaussian(x, 0.8, 0.6), gaussian.mean(x, 0.8, 0.6))
    assert gaussian.sample(4).shape == (4, D)


def test_denoiser_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Denoiser()  # type: ignore[abstract]


def test_weights_may_be_zero() -> None:
    means, x = torch.tensor([[-5.0], [5.0]]).double(), torch.tensor([[-4.0]]).double()
    denoiser = MixtureDenoiser(means, 1.0, torch.tensor([0.0, 2.0]).double())
    alone = GaussianDenoiser(means[1], 1.0)
    torch.testing.assert_close(denoiser.mean(x, 0.8, 0.6), alone.mean(x, 0.8, 0.6))
    torch.testing.assert_close(denoiser.covariance(x, 0.8, 0.6), alone.covariance(x, 0.8, 0.6))
    torch.testing.assert_close(denoiser.log_prob(x), alone.log_prob(x))
    assert (denoiser.sample(50) > 0).all()


# -------------------------------------------------------------------------------------- Bad input

MEANS = torch.zeros(K, D)
SKEW = torch.tensor([[1.0, 0.5], [0.0, 1.0]])

BAD: dict[str, tuple[Callable[[], object], str]] = {
    "shape": (lambda: MixtureDenoiser(MEANS, torch.ones(7)), r"\(4, 3, 3\); got shape \(7,\)"),
    "variance 0": (lambda: MixtureDenoiser(MEANS, 0.0), "positive definite.*multiple of I"),
    "indefinite": (lambda: MixtureDenoiser(MEANS, -torch.eye(D)[None]), "positive definite.*-1"),
    "NaN": (lambda: MixtureDenoiser(MEANS, math.nan), "positive definite"),
    "skew": (lambda: GaussianDenoiser(torch.zeros(2), SKEW), "symmetric.*up to 0.5"),
    "NaN means": (lambda: MixtureDenoiser(MEANS * math.nan, 1.0), "finite means"),
    "no components": (lambda: MixtureDenoiser(MEANS[:0], 1.0), r"finite means.*shape \(0, 3\)"),
    "negative": (lambda: MixtureDenoiser(MEANS, 1.0, -torch.ones(K)), "not negative.*logarithm"),
    "no weight": (lambda: MixtureDenoiser(MEANS, 1.0, torch.zeros(K)), "not all zero"),
    "state": (lambda: mixture(()).mean(torch.zeros(5, 2), 1.0, 0.1), r"\(\*batch, 3\); got shape"),
    "no noise": (
        lambda: mixture(()).posterior(torch.eye(D), 0.0, torch.zeros(D)),
        "positive definite noise.*variance above 0",
    ),
    "noise shape": (
        lambda: mixture(()).posterior(torch.eye(D), torch.tensor(-1.0), torch.zeros(D)),
        "positive definite noise",
    ),
    "mask id": (
        lambda: EnumeratedDenoiser(torch.ones(2, 2))(torch.tensor([0, 3])),
        r"each in 0..2.*masked positions as 2",
    ),
    "length": (lambda: EnumeratedDenoiser(torch.ones(2, 2))(torch.tensor([0])), r"\(\*batch, 2\)"),
    "not a cube": (lambda: EnumeratedDenoiser(torch.ones(2, 3)), "one axis per position"),
    "negative joint": (lambda: EnumeratedDenoiser(-torch.ones(2, 2)), "not negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
