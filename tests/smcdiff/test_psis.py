"""Pareto smoothing: the same figures as ArviZ, old and new, and a defined answer everywhere."""

import math
import warnings
from importlib.metadata import version

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smcdiff.psis import _quantile, khat, pareto_smooth
from smcdiff.weights import DegenerateWeights

INF = math.inf


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(count, scale=1.0, seed=0):
    return scale * torch.randn(count, generator=seeded(seed), dtype=torch.float64)


def exponential(count, scale, seed=0):
    """Logarithms of Pareto weights with shape k = scale."""
    uniform = torch.rand(count, generator=seeded(seed), dtype=torch.float64)
    return -scale * (-uniform).log1p()


def half_impossible(count):
    values = normal(count)
    values[::2] = -INF
    return values


CASES = {
    "normal": normal,
    "wide": lambda count: normal(count, 5.0),
    "narrow": lambda count: normal(count, 1e-3),
    "far": lambda count: normal(count) - 1e4,
    "light": lambda count: exponential(count, 0.2),
    "heavy": lambda count: exponential(count, 2.0),
    "huge": lambda count: exponential(count, 40.0),
    "half -inf": half_impossible,
}
BOTH_VERSIONS = {  # k of 400 weights: arviz.psislw 0.23.4 and arviz_stats' psislw 1.3.3 agree
    "normal": 0.4091968845837419,
    "wide": 1.9207974976697302,
    "narrow": 0.02652144815971064,
    "far": 0.4091968845841181,
    "light": 0.1902576938323002,
    "heavy": 2.2983000478017344,
    "huge": 36.559212122610305,
    "half -inf": 0.35074296630182633,
}
each_case = pytest.mark.parametrize("case", CASES)


# ------------------------------------------------------------------------------------------ ArviZ


IS_OLD = version("arviz").startswith("0.")
# 1.x rounds M down where the paper and 0.x round it up: the figures agree where M is whole
COUNTS = [50, 57, 100, 225, 400, 1000, 3000] if IS_OLD else [100, 400, 900, 2500]


def arviz_psis(values, reff=1.0):
    """Smoothed log-weights (normalised) and k by the ArviZ that is installed."""
    if IS_OLD:  # log-weights go in
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the announcement of 1.0
            import arviz

            smoothed, shape = arviz.psislw(values.numpy(), reff=reff)
    else:  # negated log-weights go in
        from arviz_stats.base import array_stats

        smoothed, shape = array_stats.psislw(-values.numpy(), r_eff=reff)
    return torch.from_numpy(smoothed), float(shape)


@each_case
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("reff", [1.0, 0.5625])
def test_figures_are_those_of_arviz(case, count, reff):
    values = CASES[case](count)
    smoothed, shape = arviz_psis(values, reff)
    ours, k = pareto_smooth(values, reff)
    torch.testing.assert_close(float(k), shape, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.log_softmax(0), smoothed, rtol=1e-9, atol=1e-9)


@each_case
def test_figures_that_both_versions_gave(case):
    k = float(khat(CASES[case](400)))
    torch.testing.assert_close(k, BOTH_VERSIONS[case], rtol=1e-9, atol=1e-9)


def test_copies_make_k_look_excellent():
    """Why k belongs before resampling; where ties leave too little to fit, it is nan."""
    assert khat(normal(1000)) > 0.2
    copies = normal(100).repeat_interleave(10)
    assert khat(copies) < 0
    if IS_OLD:  # 1.x takes part of the values at the cutoff into the tail
        torch.testing.assert_close(float(khat(copies)), arviz_psis(copies)[1], rtol=1e-9, atol=0)
    assert khat(normal(50).repeat_interleave(20)).isnan()


# ---------------------------------------------------------------------------- every case is defined


def test_few_particles_say_nothing():
    for count in (1, 2, 16, 20, 24):
        assert khat(normal(count)).isnan()
        assert khat(torch.zeros(count, dtype=torch.float64)).isnan()
    assert khat(normal(25)).isfinite()
    values = torch.full((1000,), -INF, dtype=torch.float64)
    values[:24] = normal(24)
    assert khat(values).isnan()


def test_constant_weights_have_no_tail():
    constant = torch.full((100,), -7.7, dtype=torch.float64)
    assert khat(constant) == -INF
    assert khat(constant + 1e-12 * normal(100)) == -INF  # to rounding
    constant[::2] = -INF
    assert khat(constant) == -INF


def test_ties_in_the_tail_say_nothing():
    values = normal(1000)
    values[values > 1] = 1.0  # the whole tail
    assert khat(values).isnan()
    values[:3] = torch.tensor([1.5, 2.0, 2.5])
    assert khat(values).isnan()
    values[3:6] = torch.tensor([3.0, 3.5, 4.0])
    assert khat(values).isfinite()
    values[values == 1.0] += 1e-14 * normal(int((values == 1.0).sum()))  # ties to rounding
    values[:6] = 0.0
    assert khat(values).isnan()


def test_a_fit_that_overflows_says_nothing():
    values = torch.linspace(-707.999, -707.99, 100, dtype=torch.float64)
    values[0] = 0.0
    smoothed, k = pareto_smooth(values)
    assert k.isnan()
    assert smoothed.equal(values)


def test_unestimable_runs_are_returned_as_they_were():
    for values in (normal(20), torch.zeros(100, dtype=torch.float64), normal(1000).clamp(max=0)):
        assert pareto_smooth(values)[0].equal(values)


# ---------------------------------------------------------------------------------------- smoothing


@each_case
def test_only_the_tail_is_smoothed_and_the_order_stays(case):
    values = CASES[case](1000)
    before = values.clone()
    smoothed, _ = pareto_smooth(values)
    assert values.equal(before)
    order = values.argsort(stable=True)
    assert smoothed[order[:-95]].equal(values[order[:-95]])  # M = 95
    assert (smoothed[order].diff()[500:] >= 0).all()
    assert smoothed.max() <= values.max()
    assert not smoothed.equal(values)
    assert (smoothed == -INF).equal(values == -INF)


@given(st.floats(0.05, 20), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_the_scale_of_the_weights_does_not_matter(scale, shift, seed):
    values = normal(120, scale, seed)
    smoothed, k = pareto_smooth(values)
    shifted, again = pareto_smooth(values + shift)
    torch.testing.assert_close(again, k, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted - shift, smoothed, rtol=1e-6, atol=1e-6)


def test_runs_are_smoothed_one_by_one():
    rows = torch.stack([case(300) for case in CASES.values()]).view(2, 2, 2, 300)
    smoothed, k = pareto_smooth(rows)
    assert k.shape == (2, 2, 2)
    for run, row in enumerate(rows.view(8, 300)):
        alone, shape = pareto_smooth(row)
        assert smoothed.view(8, 300)[run].equal(alone)
        assert k.view(8)[run] == shape
    assert khat(rows).equal(k)
    assert khat(torch.empty(0, 300, dtype=torch.float64)).shape == (0,)
    strided = rows.view(8, 300).T.contiguous().T
    assert khat(strided).equal(k.view(8))


def test_everything_new_lives_where_the_weights_do():
    rows = torch.stack([case(300) for case in CASES.values()])
    with torch.device("meta"):  # whatever does not follow the input ends there, and fails
        again = khat(rows)
    assert again.equal(khat(rows))


def test_k_is_near_the_shape_of_the_tail():
    """Pareto weights, 200 runs; the prior draws it to 1/2 with the weight of 10 in M + 10."""
    for shape in (0.2, 0.5, 1.0, 2.0):
        k = torch.stack([khat(exponential(2500, shape, seed)) for seed in range(200)])
        expected = (150 * shape + 5) / 160
        assert abs(float(k.mean()) - expected) < 0.03  # the estimator's own bias
        assert 0.5 < float(k.std()) * math.sqrt(150) / (1 + shape) < 1.2  # its asymptotic error


def test_the_law_is_exponential_where_its_shape_is_zero():
    probability, scale = (
        torch.linspace(0.1, 0.9, 5, dtype=torch.float64),
        torch.tensor(2.0).double(),
    )
    zero, small = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    expected = torch.distributions.Exponential(1 / scale).icdf(probability)
    torch.testing.assert_close(_quantile(probability, zero, scale), expected)
    torch.testing.assert_close(_quantile(probability, small, scale), expected)


# -------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"reff is a relative efficiency .* got 0"):
        khat(normal(100), reff=0.0)
    with pytest.raises(ValueError, match=r"Pareto smoothing: 1 log-weights are NaN"):
        khat(torch.cat([normal(100), torch.tensor([math.nan])]))
    with pytest.raises(DegenerateWeights, match=r"Pareto smoothing: all 100 particles"):
        khat(torch.full((100,), -INF, dtype=torch.float64))
