"""Exact denoisers of Markov chains: every message against the enumeration of all strings."""

import itertools
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

from smcdiff.models import Automaton, MarkovDenoiser, contains, ends_with

VOCABULARY, LENGTH = 3, 4
STRINGS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
STATES = torch.tensor(list(itertools.product(range(VOCABULARY + 1), repeat=LENGTH)))
AGREE = ((STATES[:, None] == VOCABULARY) | (STATES[:, None] == STRINGS)).all(-1).double()
PATTERN = torch.tensor([0, 1, 0])


def table(*shape: int, zeros: bool = False) -> Tensor:
    values = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if zeros:
        values[..., 0, 1] = 0.0
    return values / values.sum(-1, keepdim=True)


def chain(by_position: bool = True, zeros: bool = False) -> MarkovDenoiser:
    shape = (LENGTH - 1, 3, 3) if by_position else (3, 3)
    return MarkovDenoiser(table(3), table(*shape, zeros=zeros), None if by_position else LENGTH)


def weights(of: MarkovDenoiser) -> Tensor:
    """p(x) e^r of all strings, one by one."""
    found = []
    for x in STRINGS.tolist():
        value = float(of.initial[x[0]])
        for step, (before, after) in enumerate(itertools.pairwise(x)):
            value *= float(of.transitions[step][before, after])
        found.append(value)
    out = torch.tensor(found, dtype=torch.float64)
    return out if of.reward is None else out * of.reward(STRINGS).exp()


REWARDS = {
    "none": None,
    "contains": contains(PATTERN[:2], 3, 1.5),
    "contains, or else impossible": contains(PATTERN, 3, 0.0, -torch.inf),
    "ends with": ends_with(PATTERN[1:], 3, -0.7, 0.4),
    "both": contains(PATTERN[:2], 3, 1.5) + ends_with(torch.tensor([2]), 3, 1.0, -0.5),
}


@pytest.fixture(params=REWARDS)
def tilted(request: pytest.FixtureRequest) -> MarkovDenoiser:
    reward = REWARDS[request.param]
    return chain() if reward is None else chain().tilted(reward)


# --------------------------------------------------------------------------------- the automata


@pytest.mark.parametrize("pattern", [[0], [0, 0], [0, 1, 0], [0, 0, 1], [2, 1, 2, 1]])
def test_automata_read_strings(pattern: list[int]) -> None:
    wanted = "".join(map(str, pattern))
    texts = ["".join(map(str, x)) for x in STRINGS.tolist()]
    inside = contains(torch.tensor(pattern), 3, 1.5, -0.5)(STRINGS)
    last = ends_with(torch.tensor(pattern), 3, 1.5, -0.5)(STRINGS)
    assert inside.tolist() == [1.5 if wanted in text else -0.5 for text in texts]
    assert last.tolist() == [1.5 if text.endswith(wanted) else -0.5 for text in texts]


def test_sum_of_automata() -> None:
    first, second = contains(PATTERN[:2], 3, 1.5), ends_with(PATTERN, 3, 0.3, -2.0)
    torch.testing.assert_close((first + second)(STRINGS), first(STRINGS) + second(STRINGS))


def test_automata_take_leading_axes() -> None:
    reward = contains(PATTERN, 3, 1.0)
    assert torch.equal(reward(STRINGS.reshape(9, 9, 4)), reward(STRINGS).reshape(9, 9))


@pytest.mark.parametrize("pattern", [[], [3], [-1, 0]])
def test_impossible_patterns_are_refused(pattern: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token, each from 0 to 2"):
        contains(torch.tensor(pattern, dtype=torch.int64), 3, 1.0)


# ------------------------------------------------------------------------- against enumeration


def test_denoiser_is_the_enumerated_one(tilted: MarkovDenoiser) -> None:
    joint = AGREE * weights(tilted)
    hot = torch.nn.functional.one_hot(STRINGS, VOCABULARY).double()
    possible = joint.sum(-1) > 0
    exact = torch.einsum("sx,xlv->slv", joint, hot)[possible]
    exact = exact / exact.sum(-1, keepdim=True)
    found = tilted(STATES).exp()
    torch.testing.assert_close(found[possible], exact, rtol=0, atol=1e-12)
    known = torch.nn.functional.one_hot(STATES, VOCABULARY + 1)[..., :-1].double()
    uniform = known + (STATES == VOCABULARY)[..., None].double() / VOCABULARY
    torch.testing.assert_close(found[~possible], uniform[~possible], rtol=0, atol=1e-12)


def test_joint_and_twist_are_the_enumerated_ones(tilted: MarkovDenoiser) -> None:
    joint, plain = AGREE @ weights(tilted), AGREE @ weights(chain())
    torch.testing.assert_close(tilted.log_joint(STATES).exp(), joint, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(tilted.log_evidence.exp(), joint[-1], rtol=1e-12, atol=0)
    twist = tilted.log_twist(STATES).exp()
    torch.testing.assert_close(twist, joint / plain, rtol=1e-12, atol=1e-15)
    probability = tilted.log_prob(STATES).exp()
    torch.testing.assert_close(probability, joint / joint[-1], rtol=1e-12, atol=1e-15)


def test_homogeneous_chain_and_zeros() -> None:
    homogeneous = chain(by_position=False, zeros=True)
    joint = AGREE @ weights(homogeneous)
    assert bool((joint == 0).any())
    torch.testing.assert_close(homogeneous.log_joint(STATES).exp(), joint, rtol=1e-12, atol=1e-15)
    again = MarkovDenoiser(homogeneous.initial, homogeneous.transitions)
    assert torch.equal(again(STATES), homogeneous(STATES))


def test_leading_axes(tilted: MarkovDenoiser) -> None:
    shaped = STATES.reshape(4, 64, 4)
    torch.testing.assert_close(tilted(shaped).reshape(256, 4, 3), tilted(STATES), rtol=0, atol=0)
    torch.testing.assert_close(tilted.log_joint(shaped).flatten(), tilted.log_joint(STATES))
    assert tilted.complete(STATES[-1].expand(4, 1, 4)).shape == (4, 1, 4)


@pytest.mark.parametrize("start", [[3, 3, 3, 3], [3, 1, 3, 3], [0, 3, 0, 3]])
def test_draws_follow_the_exact_law(start: list[int], tilted: MarkovDenoiser) -> None:
    torch.manual_seed(0)
    state, count = torch.tensor(start), 4000
    drawn = tilted.complete(state.expand(count, -1))
    row = (state == STATES).all(-1)
    law = (AGREE[row] * weights(tilted))[0]
    law = law / law.sum()
    observed = (drawn @ torch.tensor([27, 9, 3, 1])).bincount(minlength=81).double() / count
    assert bool((observed[law == 0] == 0).all())
    error = (observed - law) / (law * (1 - law) / count).clamp(min=1e-12).sqrt()
    assert float(error.abs().max()) < 4.3


def test_fit_counts_transitions() -> None:
    strings = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 2]])
    fitted = MarkovDenoiser.fit(strings, VOCABULARY)
    assert fitted.initial.tolist() == [1.0, 0.0, 0.0]
    wanted = torch.tensor([[1 / 3, 2 / 3, 0], [0, 1 / 3, 2 / 3], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(fitted.transitions[0], wanted.double())
    apart = MarkovDenoiser.fit(strings, VOCABULARY, by_position=True)
    assert apart.transitions[0, 0].tolist() == [0.5, 0.5, 0.0]
    assert apart.transitions[2, 1].tolist() == [0.0, 0.0, 1.0]


def test_long_strings_do_not_underflow() -> None:
    long = MarkovDenoiser(table(27), table(27, 27), 400).tilted(contains(PATTERN, 27, 50.0))
    tokens = torch.full((2, 400), 27)
    tokens[1, ::2] = torch.arange(200) % 27
    assert bool(long(tokens).logsumexp(-1).abs().max() < 1e-12)
    assert bool(long.log_joint(tokens).isfinite().all())


# ------------------------------------------------------------------------------------ bad input


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """Users have no checker of types between them and the messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: MarkovDenoiser(table(3), table(3, 3)), "give length where one matrix"),
        (lambda: MarkovDenoiser(table(3), table(2, 3, 3), 3), "give length where one matrix"),
        (lambda: MarkovDenoiser(table(4), table(3, 3), 3), "expected transitions with shape"),
        (lambda: MarkovDenoiser(2 * table(3), table(3, 3), 3), "expected initial .* adding to one"),
        (lambda: chain().tilted(contains(PATTERN, 4, 1.0)), "expected a reward of 3 tokens"),
        (lambda: chain()(STATES + 1), r"each in 0..3; got shape \(256, 4\) and values from 1 to 4"),
        (lambda: chain()(STATES[:, :3]), r"expected tokens with shape \(\*batch, 4\)"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_bad_input(build: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()  # type: ignore[operator]


def test_impossible_strings_are_not_completed() -> None:
    hard = chain().tilted(contains(PATTERN, 3, 0.0, -torch.inf))
    with pytest.raises(ValueError, match="impossible together"):
        hard.complete(torch.tensor([2, 2, 2, 3]))


def test_automaton_is_a_value() -> None:
    moves = torch.tensor([[0, 1], [1, 1]])
    seen = Automaton(moves, torch.tensor([0.0, 1.0]))
    assert seen(torch.tensor([[0, 0], [0, 1]])).tolist() == [0.0, 1.0]
