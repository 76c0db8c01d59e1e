"""The dual of a trust region: figures to all printed digits, and what must not change it."""

import math

import pytest
import torch

from smcdiff import DegenerateWeights
from smcdiff.inference.escort import (
    TrustRegion,
    divergence,
    escort_weights,
    predict_iterations,
)
from smcdiff.weights import effective_sample_size

RAMP, SPIKE = (0.0, 1.0, 2.0, 3.0), (0.0, 0.0, 0.0, 10.0)


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def ess_of(weights):
    return float(effective_sample_size(weights.log()))


@pytest.mark.parametrize(
    ("epsilon", "tau", "size", "weights"),
    [
        (0.05, 0.287777, 3.6348, (0.154259, 0.205698, 0.274290, 0.365754)),
        (0.2, 0.608572, 2.8412, (0.080499, 0.147941, 0.271886, 0.499674)),
        (0.438757, 1.0, 2.0861, (0.032059, 0.087144, 0.236883, 0.643914)),
        (5.0, 1.0, 2.0861, (0.032059, 0.087144, 0.236883, 0.643914)),
    ],
)
def test_figures_of_a_ramp(epsilon, tau, size, weights):
    found = TrustRegion(epsilon).exponent(exact(RAMP))
    assert float(found) == pytest.approx(tau, abs=2e-6)
    assert float(divergence(exact(RAMP), found)) == pytest.approx(min(epsilon, 0.438757), abs=5e-7)
    escort = escort_weights(exact(RAMP), found)
    assert escort.tolist() == pytest.approx(weights, abs=1e-6)
    assert ess_of(escort) == pytest.approx(size, abs=6e-5)


@pytest.mark.parametrize(
    ("epsilon", "tau", "size"),
    [(0.3, 0.157541, 2.3279), (1.0, 0.346714, 1.1925), (1.3, 0.539097, 1.0275), (1.4, 1.0, None)],
)
def test_figures_of_a_spike(epsilon, tau, size):
    found = TrustRegion(epsilon).exponent(exact(SPIKE))
    assert float(found) == pytest.approx(tau, abs=6e-7)
    if size is not None:
        assert ess_of(escort_weights(exact(SPIKE), found)) == pytest.approx(size, abs=6e-5)
    assert float(divergence(exact(SPIKE), 1.0)) == pytest.approx(1.38480, abs=5e-6)


def test_the_bound_is_met_exactly():
    log_weights = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).double() * 9
    for epsilon in (1e-4, 0.1, 0.5, 2.0):
        tau = TrustRegion(epsilon).exponent(log_weights)
        assert bool((tau < 1).all())
        torch.testing.assert_close(
            divergence(log_weights, tau), torch.full_like(tau, epsilon), rtol=0, atol=1e-11
        )


def test_a_constant_changes_nothing_and_a_factor_divides():
    region = TrustRegion(0.05)
    tau = float(region.exponent(exact(RAMP)))
    assert float(region.exponent(exact(RAMP) + 1e4)) == pytest.approx(tau, abs=1e-10)
    assert float(region.exponent(exact(RAMP) * 3)) == pytest.approx(tau / 3, abs=1e-12)
    assert float(region.exponent(exact(RAMP) * 0.25)) == 1.0


def test_the_divergence_rises_to_at_most_log_n():
    log_weights = torch.randn(200, generator=torch.Generator().manual_seed(1)).double() * 50
    values = torch.stack([divergence(log_weights, s) for s in torch.linspace(0, 1, 101).tolist()])
    assert float(values[0]) == 0
    assert bool((values.diff() >= -1e-12).all())
    assert float(values[-1]) <= math.log(200)


def test_its_derivative_is_tau_times_the_variance():
    ramp = exact(RAMP)
    weights, step = escort_weights(ramp, 0.4), 1e-5
    variance = (weights * (ramp - (weights * ramp).sum()).square()).sum()
    slope = (divergence(ramp, 0.4 + step) - divergence(ramp, 0.4 - step)) / (2 * step)
    assert float(slope) == pytest.approx(float(0.4 * variance), abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_skewed_log_weights_find_the_exponent_that_a_fine_grid_finds(epsilon):
    """A few samples a thousand nats below the rest, some of them impossible, mislead no search."""
    torch.manual_seed(0)
    logs = -(2 * torch.randn(3, 400, dtype=torch.float64)).exp()
    logs[:, ::50] = -math.inf
    grid = [k / 5000 for k in range(5001)]
    inside = torch.stack([divergence(logs, tau) <= epsilon for tau in grid])
    found = TrustRegion(epsilon).exponent(logs)
    assert (found - (inside.sum(0) - 1) / 5000).abs().max() <= 1 / 5000


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_an_effective_sample_size_can_be_asked_for(share):
    log_weights = torch.randn(100, generator=torch.Generator().manual_seed(2)).double() * 20
    tau = TrustRegion(ess_target=share).exponent(log_weights)
    assert ess_of(escort_weights(log_weights, tau)) == pytest.approx(100 * share, rel=1e-9)
    assert float(TrustRegion(ess_target=share).exponent(torch.zeros(9).double())) == 1.0


def test_impossible_samples_do_not_count():
    with_zeros = exact((*RAMP, -torch.inf, -torch.inf))
    tau = TrustRegion(0.05).exponent(with_zeros)
    assert float(tau) == pytest.approx(0.287777, abs=6e-7)
    assert escort_weights(with_zeros, tau)[4:].tolist() == [0, 0]
    assert float(divergence(with_zeros, tau)) == pytest.approx(0.05)


def test_samples_of_another_law_count_by_their_base_weights():
    """Three copies of a sample are one sample of three times the weight."""
    copies = exact((0.0, 1.0, 1.0, 1.0, 2.5))
    once, base = exact((0.0, 1.0, 2.5)), exact((1.0, 3.0, 1.0)).log()
    tau = TrustRegion(0.1).exponent(copies)
    torch.testing.assert_close(TrustRegion(0.1).exponent(once, base - 7), tau)
    assert float(divergence(once, tau, base)) == pytest.approx(0.1)
    weights = escort_weights(copies, tau)
    expected = torch.stack([weights[0], weights[1:4].sum(), weights[4]])
    torch.testing.assert_close(escort_weights(once, tau, base), expected)
    torch.testing.assert_close(predict_iterations(once, 0.1, base), predict_iterations(copies, 0.1))


def test_problems_are_solved_side_by_side():
    both = torch.stack([exact(RAMP), exact(SPIKE)])
    tau = TrustRegion(0.3).exponent(both)
    torch.testing.assert_close(tau[0], TrustRegion(0.3).exponent(both[0]))
    torch.testing.assert_close(tau[1], TrustRegion(0.3).exponent(both[1]))


def on_a_grid(density, reward, low, high):
    """log-weights and base log-weights of a grid: sums over it are integrals."""
    points = torch.linspace(low, high, 20_001, dtype=torch.float64)
    return reward(points), density(points)


def gaussian():
    prior = torch.distributions.Normal(exact(0.5), exact(1.2))
    return on_a_grid(prior.log_prob, lambda x: -((x - 2) ** 2) / 0.5, -12, 13)


def mixture():
    parts = torch.distributions.Normal(exact((-2.0, 0.5, 3.0)), exact((0.5, 0.4, 0.7)))
    weights = exact((0.5, 0.3, 0.2)).log()
    return on_a_grid(
        lambda x: (weights + parts.log_prob(x[:, None])).logsumexp(-1), lambda x: 0.8 * x, -9, 12
    )


SCHEDULES = [
    (gaussian, 0.1, (0.075104, 0.202505, 0.431188, 0.862863, 1)),
    (gaussian, 0.5, (0.301023, 1)),
    (gaussian, 1.0, (0.832996, 1)),
    (mixture, 0.1, (0.262514, 0.530511, 0.842721, 1)),
    (mixture, 0.3, (0.455183, 1)),
]


@pytest.mark.parametrize(("problem", "epsilon", "schedule"), SCHEDULES)
def test_schedules_of_exact_projections(problem, epsilon, schedule):
    """beta grows by tau of what remains, and ends at 1 in about the predicted number of steps."""
    reward, log_density = problem()
    betas = [0.0]
    while betas[-1] < 1:
        rest = (1 - betas[-1]) * reward
        tau = float(TrustRegion(epsilon).exponent(rest, log_density + betas[-1] * reward))
        betas.append(1.0 if tau == 1 else betas[-1] + tau * (1 - betas[-1]))
    assert betas[1:] == pytest.approx(schedule, abs=1e-6)
    predicted = float(predict_iterations(reward, epsilon, log_density))
    assert abs(len(schedule) - predicted) < 1


def test_the_length_of_the_escort_path():
    reward, log_density = gaussian()
    length = predict_iterations(reward, 0.5, log_density)
    assert float(length) == pytest.approx(2.0662085, abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_no_log_weights_are_refused(bad):
    with pytest.raises(ValueError, match=r"iteration 3: 1 log-weights are NaN or \+inf"):
        TrustRegion().exponent(exact((0.0, bad, 1.0)), where="iteration 3")


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(DegenerateWeights, match="all 2 particles have weight zero"):
        TrustRegion().exponent(exact((-math.inf, -math.inf)))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon, a divergence in nats, must be a number above 0"):
        TrustRegion(epsilon)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_the_share_must_be_one(share):
    with pytest.raises(ValueError, match="ess_target, a share of the samples, must be"):
        TrustRegion(ess_target=share)


def test_an_epsilon_that_never_binds_is_known():
    assert TrustRegion(math.log(4)).never_binds(4)
    assert not TrustRegion(1.38).never_binds(4)
    assert not TrustRegion(math.inf, ess_target=0.5).never_binds(4)
