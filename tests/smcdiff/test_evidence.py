"""The evidence: runs are averaged before the logarithm, and one run estimates its own error."""

import itertools
import math

import pytest
import torch

from smcdiff.evidence import Evidence, combine_runs, relative_variance, root_shares
from smcdiff.resampling import RESAMPLERS, resample
from smcdiff.weights import effective_sample_size, log_mean_exp, normalise

INF, NAN = math.inf, math.nan


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def score(values):
    """z-score of the mean against zero."""
    return float(values.mean() / values.std()) * math.sqrt(values.numel())


# ------------------------------------------------------------------------------ independent runs


def test_equal_runs_agree_exactly():
    evidence = combine_runs(tensor([-1234.567] * 5))
    assert evidence.log_evidence == -1234.567
    assert evidence.standard_error == 0
    assert evidence.spread == 0
    assert evidence.num_runs == 5
    assert evidence.reliable
    assert evidence.message == ""


def test_runs_are_averaged_before_the_logarithm():
    estimates = tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 9.0]])
    evidence = combine_runs(estimates.log() - 1000)
    torch.testing.assert_close(evidence.log_evidence, tensor([3.0, 6.0]).log() - 1000)
    deviation = estimates.std(-1)
    torch.testing.assert_close(evidence.standard_error, deviation / 2 / tensor([3.0, 6.0]))
    torch.testing.assert_close(evidence.spread, estimates.log().std(-1))
    assert evidence.single_run_standard_error.isnan().all()


def test_the_mean_of_logarithms_would_be_half_a_variance_too_low():
    log_estimates = 0.7 * torch.randn(20_000, dtype=torch.float64) - 0.7**2 / 2  # log Z = 0
    assert abs(score(log_estimates + 0.7**2 / 2)) < 4.3
    assert score(log_estimates) < -4.3
    evidence = combine_runs(log_estimates)
    assert abs(float(evidence.log_evidence / evidence.standard_error)) < 4.3


def test_one_run_has_no_spread_but_may_know_its_error():
    evidence = combine_runs(tensor([3.0]))
    assert evidence.log_evidence == 3
    assert evidence.standard_error.isnan()
    assert evidence.spread.isnan()
    assert not evidence.reliable
    assert "one run whose error is above 0.5 or unknown: use four or more runs" in evidence.message
    good, bad = (
        combine_runs(tensor([3.0]), tensor([0.2])),
        combine_runs(tensor([3.0]), tensor([0.3])),
    )
    assert good.reliable
    assert good.message == ""
    assert not bad.reliable


def test_single_run_errors_are_combined_by_root_mean_square():
    runs = torch.zeros(2, 3, dtype=torch.float64)
    variances = tensor([[0.01, 0.04, 0.04], [-0.02, -0.01, 0.0]])
    evidence = combine_runs(runs, variances)
    torch.testing.assert_close(evidence.single_run_standard_error, tensor([math.sqrt(0.03), 0.0]))


def test_runs_that_disagree_are_reported():
    runs = tensor([[0.0, 0.1, 0.2], [0.0, 3.0, 6.0], [0.0, 0.0, -INF], [-INF, -INF, -INF]])
    evidence = combine_runs(runs)
    assert evidence.reliable.tolist() == [True, False, False, False]
    assert evidence.spread[1:].tolist() == [3.0, INF, INF]
    assert evidence.log_evidence[3] == -INF
    torch.testing.assert_close(evidence.log_evidence[2], tensor(2 / 3).log())
    torch.testing.assert_close(evidence.standard_error[2], tensor(0.5))
    assert "by inf (standard deviation; tolerated: 1.0) in 3 of 4 problems" in evidence.message
    assert "by 3 (standard deviation; tolerated: 1.0): the largest" in combine_runs(runs[1]).message


def test_bad_estimates_are_refused():
    with pytest.raises(ValueError, match="needs at least one run, got none"):
        combine_runs(torch.zeros(3, 0, dtype=torch.float64))
    for bad in (NAN, INF):
        with pytest.raises(ValueError, match=r"NaN or \+inf; expected a number"):
            combine_runs(tensor([0.0, bad]))


def test_evidence_is_a_value():
    with pytest.raises(AttributeError):
        combine_runs(tensor([0.0])).num_runs = 2
    assert Evidence.__dataclass_params__.frozen


# ----------------------------------------------------------------------------- one run: identities


def test_without_resampling_it_is_the_variance_of_importance_weights():
    log_weights = torch.randn(50, 40, dtype=torch.float64)
    weights = log_weights.exp()
    expected = weights.var(-1) / 40 / weights.mean(-1).square()
    for scheme in RESAMPLERS:
        estimate = relative_variance(log_weights, torch.arange(40).expand(50, 40), 0, scheme)
        torch.testing.assert_close(estimate, expected, rtol=1e-10, atol=1e-12)


def test_one_root_left_is_all_that_can_be_said():
    roots = torch.full((2, 9), 4)
    estimate = relative_variance(torch.randn(2, 9).double(), roots, 3)
    torch.testing.assert_close(estimate, tensor([1.0, 1.0]), rtol=1e-14, atol=0)


def test_shares_of_the_roots():
    log_weights = tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 0.0]]).log()
    shares = root_shares(log_weights, torch.tensor([[3, 0, 0, 0], [1, 2, 3, 3]]))
    torch.testing.assert_close(shares, tensor([[0.9, 0.0, 0.0, 0.1], [0.0, 0.5, 0.5, 0.0]]))


def test_where_nothing_is_known_it_is_nan():
    log_weights = tensor([[0.0, 0.0], [-INF, -INF]])
    estimate = relative_variance(log_weights, torch.arange(2).expand(2, 2), 1)
    assert estimate.isnan().tolist() == [False, True]
    assert relative_variance(tensor([0.0]), torch.tensor([0]), 0).isnan()


def test_the_number_of_resamplings_may_differ_between_runs():
    log_weights, roots = torch.randn(3, 9).double(), torch.randint(9, (3, 9))
    together = relative_variance(log_weights, roots, torch.tensor([0, 2, 5]), "multinomial")
    for run, count in enumerate([0, 2, 5]):
        alone = relative_variance(log_weights[run], roots[run], count, "multinomial")
        torch.testing.assert_close(together[run], alone)


def test_unknown_schemes_are_refused():
    with pytest.raises(ValueError, match="unknown resampling scheme 'multi'"):
        relative_variance(tensor([0.0, 0.0]), torch.arange(2), 1, "multi")


def test_everything_new_lives_where_the_weights_do():
    log_weights, roots = torch.randn(3, 9).double(), torch.randint(9, (3, 9))
    with torch.device("meta"):  # whatever does not follow the input ends there, and fails
        variances = relative_variance(log_weights, roots, 2, "multinomial")
        evidence = combine_runs(log_mean_exp(log_weights), variances)
    assert evidence.single_run_standard_error.device == log_weights.device
    assert evidence.message == combine_runs(log_mean_exp(log_weights), variances).message


@pytest.mark.parametrize("resampled", [(False,), (True,), (True, True), (False, True)])
def test_expectation_over_every_possible_run(resampled):
    """Two particles on two states: E[Z-hat^2 V] = Var Z-hat, summed over all outcomes."""
    start, move = tensor([0.3, 0.7]), tensor([[0.9, 0.1], [0.4, 0.6]])
    potential = tensor([[1.0, 3.0], [2.0, 0.5], [0.7, 4.0]]).log()
    pairs = list(itertools.product(range(2), repeat=2))
    draws = [pairs] + [kind for on in resampled for kind in (pairs if on else [(0, 1)], pairs)]
    outcomes = torch.tensor(list(itertools.product(*draws)))  # outcome draw particle
    state = outcomes[:, 0]
    chance = start[state].prod(-1)
    log_weights, roots = potential[0][state], torch.arange(2).expand_as(state)
    for step, on in enumerate(resampled):
        ancestors, state_after = outcomes[:, 2 * step + 1], outcomes[:, 2 * step + 2]
        if on:
            chance = chance * normalise(log_weights).gather(-1, ancestors).prod(-1)
            log_weights = log_mean_exp(log_weights)[:, None].expand_as(state)
        chance = chance * move[state.gather(-1, ancestors), state_after].prod(-1)
        state, roots = state_after, roots.gather(-1, ancestors)
        log_weights = log_weights + potential[step + 1][state]
    estimate = log_mean_exp(log_weights).exp()
    mean = (chance * estimate).sum()
    measure = start * potential[0].exp()
    for step in range(len(resampled)):
        measure = (measure @ move) * potential[step + 1].exp()
    torch.testing.assert_close(chance.sum(), tensor(1.0))
    torch.testing.assert_close(mean, measure.sum())
    variance = (chance * (estimate - mean).square()).sum()
    guess = relative_variance(log_weights, roots, sum(resampled), "multinomial")
    torch.testing.assert_close((chance * estimate.square() * guess).sum(), variance)


# ----------------------------------------------------------------------- one run: a particle filter

SEEN = [0.5, -0.3, 0.8, 1.2, 0.1, -0.5]
SLOPE, NOISE, ERROR = 0.9, 0.5, 0.7


def exact_log_evidence(seen):
    """Kalman's filter for x_1 ~ N(0, 1), x' = 0.9 x + 0.5 noise, y = x + 0.7 noise."""
    mean, variance, total = 0.0, 1.0, 0.0
    for y in seen:
        scale = variance + ERROR**2
        total -= 0.5 * (math.log(2 * math.pi * scale) + (y - mean) ** 2 / scale)
        mean, variance = mean + variance / scale * (y - mean), variance * ERROR**2 / scale
        mean, variance = SLOPE * mean, SLOPE**2 * variance + NOISE**2
    return total


def bootstrap_filter(runs, count, scheme, threshold):
    """Z-hat over Z, and V, of many runs."""
    x = torch.randn(runs, count, dtype=torch.float64)
    log_weights, roots = torch.zeros_like(x), torch.arange(count).expand(runs, count)
    resamplings = torch.zeros(runs, dtype=torch.int64)
    for step, y in enumerate(SEEN):
        if step > 0:
            where = effective_sample_size(log_weights) < threshold * count
            ancestors = resample(log_weights, scheme).where(where[:, None], torch.arange(count))
            x, roots = x.gather(-1, ancestors), roots.gather(-1, ancestors)
            pooled = log_mean_exp(log_weights)[:, None]
            log_weights = pooled.where(where[:, None], log_weights)
            resamplings += where
            x = SLOPE * x + NOISE * torch.randn_like(x)
        log_weights = log_weights - 0.5 * math.log(2 * math.pi * ERROR**2)
        log_weights = log_weights - 0.5 * (y - x).square() / ERROR**2
    ratio = (log_mean_exp(log_weights) - exact_log_evidence(SEEN)).exp()
    return ratio, log_weights, roots, resamplings


@pytest.mark.parametrize("count", [4, 32])
def test_the_estimate_is_unbiased_for_multinomial_resampling(count):
    ratio, log_weights, roots, resamplings = bootstrap_filter(20_000, count, "multinomial", 2.0)
    assert (resamplings == 5).all()
    assert abs(score(ratio - 1)) < 4.3
    estimate = relative_variance(log_weights, roots, resamplings, "multinomial")
    assert abs(score(ratio.square() * estimate - (ratio - 1).square())) < 4.3
    for wrong in (4, 6):
        estimate = relative_variance(log_weights, roots, wrong, "multinomial")
        assert abs(score(ratio.square() * estimate - (ratio - 1).square())) > 4.3


def test_the_estimate_is_nearly_unbiased_for_adaptive_resampling():
    ratio, log_weights, roots, resamplings = bootstrap_filter(20_000, 64, "multinomial", 0.5)
    assert len(resamplings.unique()) > 1
    assert abs(score(ratio - 1)) < 4.3
    estimate = relative_variance(log_weights, roots, resamplings, "multinomial")
    assert abs(score(ratio.square() * estimate - (ratio - 1).square())) < 4.3


@pytest.mark.parametrize("scheme", [name for name in RESAMPLERS if name != "multinomial"])
@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_the_estimate_is_conservative_for_the_other_schemes(scheme, threshold):
    ratio, log_weights, roots, resamplings = bootstrap_filter(8000, 64, scheme, threshold)
    assert abs(score(ratio - 1)) < 4.3
    truth = (ratio - 1).square()
    estimate = ratio.square() * relative_variance(log_weights, roots, resamplings, scheme)
    assert score(estimate - truth) > -4.3
    per_resampling = 1 if scheme in ("residual", "stratified") else 0.25
    allowed = per_resampling / 64 * resamplings.double()
    assert score(estimate - truth - allowed) < 4.3
    as_if = relative_variance(log_weights, roots, resamplings, "multinomial")
    assert score(ratio.square() * as_if - truth) < -4.3  # the power does not belong here
