"""Masked diffusion: transitions against the enumeration of all states, for every way to reveal."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from smcdiff.models import EnumeratedDenoiser, MaskedDiffusion
from smcdiff.reveals import EvenReveal

LENGTH, VOCABULARY = 3, 2
STATES = torch.tensor(list(itertools.product(range(VOCABULARY + 1), repeat=LENGTH)))
SIZE, START = len(STATES), len(STATES) - 1
JOINT = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(3)).double()
DATA = torch.zeros(3, 3, 3).double()
DATA[:2, :2, :2] = JOINT / JOINT.sum()


def masked(**settings: Any) -> MaskedDiffusion:
    return MaskedDiffusion(EnumeratedDenoiser(JOINT), LENGTH, VOCABULARY, **settings)


def cosine(time: float) -> float:
    return math.cos(math.pi * time / 2) ** 2 if time < 1 else 0.0


WAYS: dict[str, Callable[[], MaskedDiffusion]] = {
    "one step": lambda: masked(num_steps=1),
    "as many steps as positions": lambda: masked(num_steps=3),
    "more steps than positions": lambda: masked(num_steps=7),
    "a table": lambda: masked(alphas=(1.0, 0.9, 0.1, 0.0)),
    "with flat parts": lambda: masked(alphas=(1.0, 1.0, 0.4, 0.4, 0.0, 0.0)),
    "a function": lambda: masked(alphas=cosine, num_steps=4),
    "even, one step": lambda: masked(num_steps=1, reveal="even"),
    "even, two steps": lambda: masked(num_steps=2, reveal="even"),
    "even, as many steps as positions": lambda: masked(num_steps=3, reveal="even"),
    "even, more steps than positions": lambda: masked(num_steps=5, reveal="even"),
}


@pytest.fixture(params=WAYS)
def process(request: pytest.FixtureRequest) -> MaskedDiffusion:
    return WAYS[request.param]()


def transitions(process: MaskedDiffusion, t: int) -> Tensor:
    """p(x_{t-1} | x_t) for all pairs of states, from the law's own log-probabilities."""
    law = process.kernel(STATES.repeat_interleave(SIZE, 0), t).law
    return law.log_prob(STATES.repeat(SIZE, 1)).double().exp().reshape(SIZE, SIZE)


def chain_law(process: MaskedDiffusion, start: int = START) -> Tensor:
    row = torch.eye(SIZE).double()[start]
    for t in range(process.num_steps, 0, -1):
        row = row @ transitions(process, t)
    return row


# -------------------------------------------------------------------------------- one transition


def test_transitions_are_laws_that_keep_what_is_revealed(process: MaskedDiffusion) -> None:
    for t in range(process.num_steps, 0, -1):
        table = transitions(process, t)
        torch.testing.assert_close(table.sum(-1), torch.ones(SIZE).double(), rtol=0, atol=1e-12)
        kept = ((STATES[:, None] == VOCABULARY) | (STATES[:, None] == STATES)).all(-1)
        assert not bool(table[~kept].any())
    complete = (STATES != VOCABULARY).all(-1)
    assert not bool(table[:, ~complete].any())


def test_transitions_are_the_formula(process: MaskedDiffusion) -> None:
    denoised = process.network(STATES).exp()
    for t in range(process.num_steps, 0, -1):
        table = transitions(process, t)
        for x, y in itertools.product(range(SIZE), repeat=2):
            exact = formula(process, t, STATES[x].tolist(), STATES[y].tolist(), denoised[x])
            assert float(table[x, y]) == pytest.approx(exact, abs=1e-12)


def formula(
    process: MaskedDiffusion, t: int, before: list[int], after: list[int], denoised: Tensor
) -> float:
    left = before.count(VOCABULARY)
    revealed = [i for i in range(LENGTH) if before[i] == VOCABULARY != after[i]]
    if any(b not in (a, VOCABULARY) for b, a in zip(before, after, strict=True)):
        return 0.0
    tokens = math.prod(float(denoised[i, after[i]]) for i in revealed)
    if process.reveal == "even":
        count = math.ceil(left / t)
        return tokens / math.comb(left, count) if len(revealed) == count else 0.0
    u = process.reveal_probability(t)
    return tokens * u ** len(revealed) * (1 - u) ** (left - len(revealed))


def test_draws_follow_the_law(process: MaskedDiffusion) -> None:
    torch.manual_seed(0)
    count, t = 4000, process.num_steps
    drawn = process.kernel(STATES[START].expand(count, -1), t).law.sample()
    observed = (drawn @ torch.tensor([9, 3, 1])).bincount(minlength=SIZE).double() / count
    law = transitions(process, t)[START]
    assert not bool(observed[law == 0].any())
    error = (observed - law) / (law * (1 - law) / count).clamp(min=1e-12).sqrt()
    assert float(error.abs().max()) < 4.3


def test_denoised_knows_the_revealed_tokens(process: MaskedDiffusion) -> None:
    probabilities = process.kernel(STATES, process.num_steps).denoised.base_dist.probs
    torch.testing.assert_close(probabilities, process.network(STATES).exp())


def test_a_draw_of_a_fixed_number_has_no_other_support() -> None:
    x, logits = torch.tensor([2, 1, 2]), torch.full((3, 2), 0.5).double().log()
    law = EvenReveal(x, 2, logits)
    assert law.log_prob(torch.tensor([0, 1, 2])).exp() == pytest.approx(0.25)
    for impossible in ([2, 1, 2], [0, 1, 0], [0, 0, 2], [2, 1, 3], [-1, 1, 2]):
        assert law.log_prob(torch.tensor(impossible)) == -torch.inf
    many = law.expand((5,))
    assert many.sample().shape == (5, 3)
    assert law.sample((4,)).shape == (4, 3)


# ------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("num_steps", [3, 4, 9])
def test_one_at_a_time_the_chain_is_the_data_law(num_steps: int) -> None:
    law = chain_law(masked(num_steps=num_steps, reveal="even"))
    torch.testing.assert_close(law, DATA.flatten(), rtol=0, atol=1e-12)


def test_many_steps_come_close_to_the_data_law() -> None:
    errors = [float((chain_law(masked(num_steps=n)) - DATA.flatten()).abs().sum()) for n in (1, 64)]
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("given", [[0, 2, 2], [2, 1, 2], [1, 2, 0], [0, 1, 1]])
def test_infilling_is_exact(given: list[int]) -> None:
    clamped = torch.tensor(given)
    prior = masked(num_steps=3, reveal="even")
    assert prior.initial(given=clamped).mean.tolist() == given
    start = int(clamped @ torch.tensor([9, 3, 1]))
    agree = ((clamped == VOCABULARY) | (clamped == STATES)).all(-1)
    exact = DATA.flatten() * agree
    law = chain_law(prior, start)
    torch.testing.assert_close(law, exact / exact.sum(), rtol=0, atol=1e-12)


def test_given_tokens_stay_on_the_whole_path(process: MaskedDiffusion) -> None:
    given = torch.tensor([[2, 1, 2], [0, 2, 2], [2, 2, 2], [1, 1, 0]])
    with pyro.plate("strings", 4):
        trace = poutine.trace(process).get_trace("x", given=given)
    known = given != VOCABULARY
    for t in range(process.num_steps + 1):
        state = trace.nodes[f"x_{t}"]["value"]
        assert torch.equal(state[known], given[known])
        assert bool((state <= VOCABULARY).all())
    assert bool((trace.nodes["x"]["value"] < VOCABULARY).all())


def test_a_trace_scores_its_path(process: MaskedDiffusion) -> None:
    trace = poutine.trace(process).get_trace("x")
    path = [trace.nodes[f"x_{t}"]["value"] for t in range(process.num_steps, -1, -1)]
    rows = [int(x @ torch.tensor([9, 3, 1])) for x in path]
    total = 0.0
    for t, (before, after) in zip(
        range(process.num_steps, 0, -1), itertools.pairwise(rows), strict=True
    ):
        total += math.log(transitions(process, t)[before, after])
    assert float(trace.log_prob_sum()) == pytest.approx(total, abs=1e-12)


def test_context_reaches_the_network() -> None:
    table = torch.randn(3, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def network(tokens: Tensor, label: Tensor) -> Tensor:
        return table[label]

    prior = MaskedDiffusion(network, LENGTH, VOCABULARY, num_steps=2)
    states, labels = torch.full((3, LENGTH), VOCABULARY), torch.arange(3)
    law = prior.kernel(states, 2, label=labels, given=states).denoised.base_dist
    torch.testing.assert_close(law.logits, table.log_softmax(-1))


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "give either alphas or num_steps"),
        ({"alphas": (1.0, 0.0), "num_steps": 1}, "give either alphas or num_steps"),
        ({"alphas": cosine}, "give either alphas or num_steps"),
        ({"alphas": (1.0, 0.2, 0.3, 0.0)}, "alphas must fall from 1 to 0"),
        ({"alphas": (0.9, 0.0)}, "alphas must fall from 1 to 0"),
        ({"alphas": (1.0, 0.1)}, "alphas must fall from 1 to 0"),
        ({"alphas": (1.0, math.nan, 0.0)}, "alphas must fall from 1 to 0"),
        ({"num_steps": 0}, "num_steps must be a positive integer"),
        ({"num_steps": 2.0}, "num_steps must be a positive integer"),
        ({"num_steps": 2, "reveal": "all"}, "reveal must be 'independent' or 'even'"),
        ({"alphas": (1.0, 0.0), "reveal": "even"}, "reveal='even' needs no alphas"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        masked(**settings)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (torch.tensor([0, 3, 2]), "tokens from 0 to 1 or 2 where .* values from 0 to 3"),
        (torch.tensor([0, -1, 2]), "values from -1 to 2"),
        (torch.tensor([0, 1]), r"with shape \(\*batch, 3\).* shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "whole numbers .* but it is torch.float32"),
    ],
)
def test_bad_given_tokens(given: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        masked(num_steps=2)("x", given=given)


def test_a_network_with_another_vocabulary_is_refused() -> None:
    prior = MaskedDiffusion(EnumeratedDenoiser(JOINT), LENGTH, 3, num_steps=2)
    with pytest.raises(ValueError, match="without a column for the mask"):
        MaskedDiffusion(nn.Embedding(3, 3), LENGTH, VOCABULARY, num_steps=2)("x")
    with pytest.raises(ValueError, match=r"each in 0\.\.2"):
        prior("x")


def test_a_network_that_leaves_no_token_is_refused() -> None:
    def network(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        logits[:, 1] = -torch.inf
        return logits

    prior = MaskedDiffusion(network, LENGTH, VOCABULARY, num_steps=2)
    match = "no token possible .* at position 1 of a state at step t = 2, .* 1 masked positions"
    with pytest.raises(ValueError, match=match):
        prior("x")
    assert prior("y", given=torch.tensor([2, 0, 2]))[1] == 0
