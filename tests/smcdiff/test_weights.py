"""The arithmetic of log-weights: exact where it can be, and deaf to the scale of the weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smcdiff.weights import (
    DegenerateWeights,
    check_log_weights,
    effective_sample_size,
    log_mean_exp,
    normalise,
)

INF = math.inf
finite = st.floats(-700, 700)
log_weight = finite | st.just(-INF)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@given(finite | st.just(-INF), st.integers(1, 3000))
def test_log_mean_exp_of_a_constant_is_that_constant(value, count):
    assert log_mean_exp(torch.full((count,), value, dtype=torch.float64)) == value


@given(st.lists(log_weight, min_size=1, max_size=20))
def test_log_mean_exp_is_what_it_says(values):
    expected = tensor(values).logsumexp(0) - math.log(len(values))
    torch.testing.assert_close(log_mean_exp(tensor(values)), expected, rtol=1e-13, atol=1e-13)


def test_log_mean_exp_averages_any_axis():
    values = torch.randn(3, 4, 5, dtype=torch.float64)
    for dim in range(-3, 3):
        expected = values.exp().mean(dim).log()
        torch.testing.assert_close(log_mean_exp(values, dim), expected, rtol=1e-13, atol=1e-13)


def test_log_mean_exp_hides_nothing():
    assert log_mean_exp(tensor([0.0, math.nan])).isnan()
    assert log_mean_exp(tensor([0.0, INF])) == INF


@given(st.lists(log_weight, min_size=1, max_size=20).filter(lambda v: max(v) > -INF))
def test_probabilities_add_to_one_and_follow_the_weights(values):
    weights = normalise(tensor(values))
    assert abs(float(weights.sum()) - 1) < 1e-14
    assert weights[tensor(values) == -INF].eq(0).all()
    torch.testing.assert_close(weights, tensor(values).softmax(0), rtol=1e-13, atol=0)


def test_equal_weights_are_exactly_equal_probabilities():
    assert normalise(torch.full((4, 7), -1e5, dtype=torch.float64)).eq(1 / 7).all()


def test_a_run_without_weight_has_no_probabilities():
    weights = normalise(tensor([[0.0, 0.0], [-INF, -INF]]))
    assert weights.tolist() == [[0.5, 0.5], [0.0, 0.0]]


@given(st.lists(log_weight, min_size=1, max_size=20).filter(lambda v: max(v) > -INF), finite)
def test_effective_sample_size_is_a_count(values, shift):
    size = effective_sample_size(tensor(values))
    assert 1 <= size <= len(values)
    expected = 1 / tensor(values).softmax(0).square().sum()
    torch.testing.assert_close(size, expected.clamp(1, len(values)), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        effective_sample_size(tensor(values) + shift), size, rtol=1e-9, atol=0
    )


def test_effective_sample_size_at_its_ends():
    rows = tensor([[3.0] * 5, [-INF, -INF, 900.0, -INF, -INF], [-INF] * 5, [0.0, 0.0] + [-INF] * 3])
    assert effective_sample_size(rows).tolist() == [5.0, 1.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [log_mean_exp, normalise, effective_sample_size])
def test_dtype_is_kept_and_the_input_is_not_touched(function, dtype):
    values = torch.tensor([[0.0, -INF, 2.0], [1.0, 1.0, 1.0]], dtype=dtype)
    before = values.clone()
    assert function(values).dtype == dtype
    assert values.equal(before)


def test_some_weights_may_be_zero():
    check_log_weights(tensor([[0.0, -INF], [-INF, -1e300]]), "step 3")
    check_log_weights(tensor([0.0, -INF]), "step 3")


@pytest.mark.parametrize("value", [math.nan, INF])
def test_nan_and_infinite_weights_are_refused(value):
    rows = torch.zeros(4, 8, dtype=torch.float64)
    rows[2, 5] = rows[2, 6] = value
    rows[0] = -INF  # the worse news comes first
    with pytest.raises(
        ValueError, match=r"step 3: 2 log-weights .* in run 2 \(8 particles"
    ) as error:
        check_log_weights(rows, "step 3")
    assert not isinstance(error.value, DegenerateWeights)


def test_runs_without_weight_are_named():
    rows = torch.zeros(2, 3, 8, dtype=torch.float64)
    rows[0, 1] = rows[1, 2] = -INF
    before = rows.clone()
    expected = r"at t = 3: all 8 particles have weight zero in runs \(0, 1\), \(1, 2\)\. Use more"
    with pytest.raises(DegenerateWeights, match=expected):
        check_log_weights(rows, "at t = 3")
    assert rows.equal(before)


def test_runs_are_named_briefly():
    with pytest.raises(DegenerateWeights, match=r"in the run\."):
        check_log_weights(tensor([-INF, -INF]), "here")
    with pytest.raises(DegenerateWeights, match=r"in runs 0, 1, 2, 3, 4, 5, 6, 7 and 92 more\."):
        check_log_weights(torch.full((100, 2), -INF), "here")


def test_a_run_needs_a_particle():
    with pytest.raises(ValueError, match=r"here: expected at least one particle per run, got none"):
        check_log_weights(torch.zeros(3, 0), "here")
