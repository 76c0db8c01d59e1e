"""The contract of every resampling scheme, and what sets each apart.

A new entry in ``RESAMPLERS`` inherits all tests that are marked ``each_scheme``.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smcdiff.resampling import RESAMPLERS, arrange, resample
from smcdiff.weights import DegenerateWeights, normalise

INF = math.inf
each_scheme = pytest.mark.parametrize("scheme", RESAMPLERS)
log_weights = st.lists(
    st.floats(-50, 50) | st.just(-INF) | st.sampled_from([0.0, math.log(2)]),
    min_size=1,
    max_size=33,
).filter(lambda values: max(values) > -INF)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def offspring(ancestors):
    return torch.zeros_like(ancestors).scatter_add(-1, ancestors, torch.ones_like(ancestors))


def uneven(count):
    """Log-weights with zeros at both ends and inside, whole multiples of 1/N, and a long tail."""
    values = torch.linspace(-4, 1.5, count, dtype=torch.float64)
    values[[0, count // 2, -2, -1]] = -INF
    return values


# ---------------------------------------------------------------------------------- the contract


@each_scheme
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 8), (2, 3, 5), (0, 4)])
def test_ancestors_are_indices_of_the_same_shape(scheme, shape):
    ancestors = resample(torch.randn(shape, dtype=torch.float64), scheme)
    assert ancestors.shape == shape
    assert ancestors.dtype == torch.int64
    assert ((ancestors >= 0) & (ancestors < shape[-1])).all()


@each_scheme
@given(values=log_weights)
def test_survivors_keep_their_places_and_have_weight(scheme, values):
    ancestors = resample(tensor(values), scheme)
    survives = offspring(ancestors) > 0
    assert ancestors[survives].equal(torch.arange(len(values))[survives])
    assert not (tensor(values)[ancestors] == -INF).any()


@each_scheme
@given(values=log_weights)
def test_a_scheme_returns_n_offspring(scheme, values):
    counts = RESAMPLERS[scheme](normalise(tensor(values)))
    assert counts.sum() == len(values)
    assert (counts >= 0).all()
    assert arrange(counts).sort().values.equal(torch.arange(len(values)).repeat_interleave(counts))


@each_scheme
def test_offspring_are_unbiased(scheme):
    count, runs = 23, 40_000
    expected = count * normalise(uneven(count))
    counts = offspring(resample(uneven(count).expand(runs, count), scheme)).double()
    error = counts.std(0) / math.sqrt(runs)
    certain = error == 0
    assert counts.mean(0)[certain].equal(expected[certain].round())
    assert ((counts.mean(0) - expected) / error)[~certain].abs().max() < 4.3
    assert (~certain).sum() >= 15


@each_scheme
def test_whole_expectations_and_their_rounding(scheme):
    """Where all N W_i are whole, only independent draws leave anything to chance."""
    whole = torch.tensor([3, 0, 2, 1, 1, 0, 0, 4, 1, 0, 0, 0])
    rows = whole.double().log().add(123.4).expand(50, 12)
    counts = offspring(resample(rows, scheme))
    assert counts.eq(whole).all() == (scheme != "multinomial")


@each_scheme
def test_equal_weights_stay_where_they_are(scheme):
    assert 49 * tensor(1 / 49) < 1  # the rounding that makes a careless residual scheme noisy
    for count in (1, 2, 10, 49, 1000):
        ancestors = resample(torch.full((20, count), -3.3, dtype=torch.float64), scheme)
        stay = ancestors.equal(torch.arange(count).expand(20, count))
        assert stay == (scheme != "multinomial" or count == 1)


@each_scheme
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 41), (torch.float64, 10)])
@pytest.mark.parametrize("extreme", ["largest", "zero"])
def test_rounding_of_cumulative_weights_selects_nothing_impossible(
    scheme, dtype, count, extreme, monkeypatch
):
    """Cumulative weights end below the largest uniform number: naive searches run over."""
    weights = torch.zeros(count + 4, dtype=dtype)
    weights[2:-2] = 1 / count
    below_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    cdf = weights.cumsum(0)
    assert cdf[-1] <= below_one < 1
    assert torch.searchsorted(cdf, below_one, right=True) == len(weights)  # index N
    assert torch.searchsorted(cdf, torch.zeros((), dtype=dtype)) == 0  # weight zero

    def constant(like):
        one = torch.ones((), dtype=like.dtype)
        largest = torch.nextafter(one, torch.zeros_like(one))
        return torch.full_like(like, float(largest) if extreme == "largest" else 0.0)

    monkeypatch.setattr(torch, "rand_like", constant)
    ancestors = resample(weights.log(), scheme)
    assert ((ancestors >= 2) & (ancestors < count + 2)).all()


@each_scheme
def test_runs_do_not_see_each_other(scheme):
    rows = torch.randn(3, 50, dtype=torch.float64)
    torch.manual_seed(1)
    before = resample(rows, scheme)
    rows[1] = uneven(50)
    torch.manual_seed(1)
    after = resample(rows, scheme)
    assert after[0].equal(before[0])
    assert after[2].equal(before[2])
    assert not after[1].equal(before[1])


@each_scheme
def test_the_global_stream_decides(scheme):
    rows = torch.randn(3, 50, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = resample(rows, scheme), resample(rows, scheme)
    torch.manual_seed(1)
    assert resample(rows, scheme).equal(first)
    assert not second.equal(first)


@each_scheme
def test_the_input_is_read_only_and_may_lie_anywhere_in_memory(scheme):
    rows = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    before = rows.detach().clone()
    torch.manual_seed(1)
    strided = resample(rows.T, scheme)
    torch.manual_seed(1)
    assert strided.equal(resample(before.T.contiguous(), scheme))
    assert rows.equal(before)


@each_scheme
def test_everything_new_lives_where_the_weights_do(scheme):
    rows = torch.randn(3, 50, dtype=torch.float64)
    with torch.device("meta"):  # whatever does not follow the input ends there, and fails
        ancestors = resample(rows, scheme)
    assert ancestors.device == rows.device
    assert ancestors.max() < 50


@each_scheme
def test_the_scale_of_the_weights_does_not_matter(scheme):
    rows = torch.randint(-8, 8, (3, 50)).double()
    torch.manual_seed(1)
    first = resample(rows, scheme)
    torch.manual_seed(1)
    assert resample(rows + 2.0**16, scheme).equal(first)


@each_scheme
def test_other_schemes_are_no_noisier_than_independent_draws(scheme):
    """Variance of the number of offspring of one half, against the binomial's closed form."""
    count, runs = 20, 20_000
    values = torch.linspace(-2, 0, count, dtype=torch.float64)[torch.randperm(count)]
    share = float(normalise(values)[: count // 2].sum())
    counts = offspring(resample(values.expand(runs, count), scheme))
    deviation = counts[:, : count // 2].sum(-1).double() - count * share
    squares = deviation.square()
    binomial = count * share * (1 - share)
    score = (squares.mean() - binomial) / squares.std() * math.sqrt(runs)
    assert score.abs() < 4.3 if scheme == "multinomial" else score < -4.3


# ------------------------------------------------------------------------- what sets schemes apart


@given(values=log_weights)
@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
def test_offspring_are_the_expectation_rounded_up_or_down(scheme, values):
    weights = normalise(tensor(values))
    assert (RESAMPLERS[scheme](weights) - len(values) * weights).abs().max() < 1 + 1e-9


@given(values=log_weights)
def test_residual_offspring_are_at_least_the_expectation_rounded_down(values):
    weights = normalise(tensor(values))
    assert (RESAMPLERS["residual"](weights) >= (len(values) * weights - 1e-9).floor()).all()


@given(values=log_weights)
def test_stratified_offspring_are_within_two_of_the_expectation(values):
    weights = normalise(tensor(values))
    assert (RESAMPLERS["stratified"](weights) - len(values) * weights).abs().max() < 2


def test_ssp_is_negatively_associated():
    """No pair of particles is copied together more often than if they were independent."""
    runs, expected = 40_000, tensor([0.2, 1.9, 0.5, 0.4, 1.7, 1.3])
    deviation = RESAMPLERS["ssp"]((expected / 6).expand(runs, 6)) - expected
    products = deviation[:, :, None] * deviation[:, None, :]
    score = products.mean(0) / products.std(0) * math.sqrt(runs)
    assert score[~torch.eye(6, dtype=torch.bool)].max() < 4.3


def test_systematic_is_not_negatively_associated():
    """What makes SSP worth its rounds: one shared draw copies every other particle together."""
    rows = tensor([0.5, 0.5, 0.5, 0.5, 4.0, 0.0]).expand(1000, 6) / 6
    counts = RESAMPLERS["systematic"](rows)
    assert counts[:, 0].equal(counts[:, 2])
    assert counts[:, 0].unique().tolist() == [0, 1]
    ssp = RESAMPLERS["ssp"](rows)
    assert not ssp[:, 0].equal(ssp[:, 2])


def test_arrange_fills_the_gaps_with_spare_copies():
    counts = torch.tensor([[0, 3, 1, 0], [1, 1, 1, 1], [0, 0, 0, 4], [2, 0, 0, 2]])
    expected = [[1, 1, 2, 1], [0, 1, 2, 3], [3, 3, 3, 3], [0, 0, 3, 3]]
    assert arrange(counts).tolist() == expected


# -------------------------------------------------------------------------------------- bad input


def test_unknown_schemes_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown resampling scheme 'best'; expected one of multin"
    ):
        resample(torch.zeros(3), "best")


def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match=r"resampling: 1 log-weights are NaN or \+inf, in run 1"):
        resample(tensor([[0.0, 0.0], [0.0, math.nan]]))
    with pytest.raises(DegenerateWeights, match=r"resampling: all 2 particles .* in run 1"):
        resample(tensor([[0.0, 0.0], [-INF, -INF]]))
