r"""Rewards of strings that a finite automaton computes: "contains", "ends with", and sums of them.

An automaton reads a string from left to right; the state that it ends in decides the reward. The
reward of any Markov chain's strings then has an exact posterior (``markov.py``).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smcdiff.arguments import check_kind


@dataclass(frozen=True, eq=False)
class Automaton:
    """A reward of strings: in a program, ``pyro.factor("reward", automaton(x))``.

    Attributes:
        moves: the next state for a state and a token, with shape (S, V); 0 is the first state.
        rewards: the reward of ending in a state, with shape (S,); -inf says impossible.
    """

    moves: Int64[Tensor, "state token"]
    rewards: Float[Tensor, " state"]

    def __call__(self, tokens: Int64[Tensor, "*batch length"]) -> Float[Tensor, "*batch"]:
        """The rewards of strings without masks."""
        state, moves = torch.zeros_like(tokens[..., 0]), self.moves.to(tokens.device)
        for token in tokens.unbind(-1):
            state = moves[state, token]
        return self.rewards.to(tokens.device)[state]

    def __add__(self, other: "Automaton") -> "Automaton":
        """The sum of two rewards, computed by the product of the automata."""
        size = len(other.rewards)
        moves = size * self.moves[:, None] + other.moves[None]
        rewards = self.rewards[:, None] + other.rewards
        return Automaton(moves.flatten(0, 1), rewards.flatten())


def contains(
    pattern: Int64[Tensor, " m"], vocabulary: int, inside: float, outside: float = 0.0
) -> Automaton:
    """The reward `inside` for strings in which the pattern occurs, `outside` for others.

    A name ends with a pattern if it contains the pattern and a full stop.
    """
    moves = _matching(pattern, vocabulary)
    moves[-1] = len(pattern)
    return Automaton(moves, _last(inside, outside, len(pattern)))


def ends_with(
    pattern: Int64[Tensor, " m"], vocabulary: int, inside: float, outside: float = 0.0
) -> Automaton:
    """The reward `inside` for strings whose last tokens are the pattern, `outside` for others."""
    return Automaton(_matching(pattern, vocabulary), _last(inside, outside, len(pattern)))


def _matching(pattern: Int64[Tensor, " m"], vocabulary: int) -> Int64[Tensor, "state token"]:
    """State k: the last k tokens are the first k of the pattern, and no more are."""
    check_kind("pattern", pattern, Tensor, "torch.tensor([0, 1])")
    wanted = pattern.tolist()
    if not wanted or min(wanted) < 0 or max(wanted) >= vocabulary:
        raise ValueError(
            f"a pattern needs at least one token, each from 0 to {vocabulary - 1}, got {wanted}"
        )
    length = len(wanted)

    def longest(read: list[int]) -> int:
        sizes = range(min(length, len(read)), 0, -1)
        return next((k for k in sizes if wanted[:k] == read[-k:]), 0)

    rows = [[longest([*wanted[:k], v]) for v in range(vocabulary)] for k in range(length + 1)]
    return torch.tensor(rows)


def _last(inside: float, outside: float, length: int) -> Float[Tensor, " state"]:
    rewards = torch.full((length + 1,), outside, dtype=torch.float64)
    rewards[-1] = inside
    return rewards
