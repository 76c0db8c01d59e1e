r"""What was found before, remembered: terminal states, drawn by the rank of their reward.

Of N states, the one with rank k = 0, 1, ... is drawn with probability proportional to
:math:`1 / (c N + k)` (Tripp et al. 2020; Sendera et al. 2024, arXiv 2402.05098).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.arguments import check_callable, check_kind, check_number, check_whole
from smcdiff.particles import map_tree

LogDensity = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Terminals:
    """States x_0 by process, the latents that belong to them, and log gamma of both."""

    x: dict[str, Tensor]
    latents: dict[str, Tensor]
    log_gamma: Float64[Tensor, " particle"]

    def select(self, rows: Tensor) -> "Terminals":
        """Some of them."""

        def pick(tree: Any) -> Any:
            return map_tree(lambda v: v[rows.to(v.device)], tree)

        return Terminals(pick(self.x), pick(self.latents), pick(self.log_gamma))

    def __len__(self) -> int:
        return len(self.log_gamma)


@dataclass(frozen=True)
class Mala:
    r"""Metropolis-adjusted Langevin moves of x_0 (Roberts & Tweedie 1996).

    Attributes:
        log_density: of x_0 by process, with shape ``(n,)`` and a gradient. The posterior's own is
            rarely known: reward plus a proxy of the prior will do, since any x_0 may be replayed.
        num_moves: how many.
        step_size: the standard deviation of a move's noise.
    """

    log_density: LogDensity
    num_moves: int = 20
    step_size: float = 0.1

    def __post_init__(self) -> None:
        check_callable("log_density", self.log_density, "lambda x: -x['x'].square().sum(-1)")
        check_whole("num_moves", self.num_moves)
        check_number("step_size", self.step_size, 0, math.inf, "()")

    def move(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The states after all moves."""
        log_density, gradient = self._look(x)
        for _ in range(self.num_moves):
            drift = {n: 0.5 * self.step_size**2 * g for n, g in gradient.items()}
            there = {n: v + drift[n] + self.step_size * torch.randn_like(v) for n, v in x.items()}
            log_there, back = self._look(there)
            ratio = log_there - log_density
            for n, v in x.items():
                forth = there[n] - v - drift[n]
                home = v - there[n] - 0.5 * self.step_size**2 * back[n]
                ratio = ratio + _square(forth, home, self.step_size)
            accepted = torch.rand_like(ratio).log() < ratio
            x = {n: _choose(accepted, there[n], v) for n, v in x.items()}
            gradient = {n: _choose(accepted, back[n], g) for n, g in gradient.items()}
            log_density = torch.where(accepted, log_there, log_density)
        return x

    @torch.enable_grad()
    def _look(self, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {n: v.detach().requires_grad_() for n, v in x.items()}
        value = self.log_density(inputs)
        gradients = torch.autograd.grad(value.sum(), list(inputs.values()))
        return value.detach().double(), dict(zip(inputs, gradients, strict=True))


class ReplayBuffer:
    """The last terminal states.

    Args:
        capacity: how many are kept (the oldest go first).
        flatness: c; the larger, the less rank matters.
        refine: moves what is drawn before it is used.
    """

    def __init__(self, capacity: int, flatness: float = 0.01, refine: Mala | None = None) -> None:
        check_whole("capacity", capacity)
        check_number("flatness", flatness, 0, math.inf, "(]")
        check_kind("refine", refine, Mala, "Mala(log_density)", optional=True)
        self.capacity, self.flatness, self.refine = capacity, flatness, refine
        self.content: Terminals | None = None

    def __repr__(self) -> str:
        return f"ReplayBuffer({self.capacity}, {self.flatness}, {self.refine})"

    def __len__(self) -> int:
        return 0 if self.content is None else len(self.content)

    def push(self, found: Terminals) -> None:
        """Adds states that have a finite log gamma."""
        found = found.select(found.log_gamma.isfinite().nonzero()[:, 0])
        kept = found if self.content is None else _join(self.content, found)
        self.content = kept.select(torch.arange(len(kept))[-self.capacity :])

    def draw(self, number: int) -> Terminals:
        """States drawn by rank, with replacement."""
        if self.content is None or len(self.content) == 0:
            raise ValueError(
                "the replay buffer is empty: put behaviours that draw (OnPolicy, PriorPaths) "
                "before those that replay, or push states of your own"
            )
        rank = self.content.log_gamma.argsort(descending=True).argsort()
        weights = 1 / (self.flatness * len(rank) + rank)
        rows = torch.multinomial(weights, number, replacement=True)
        drawn = self.content.select(rows)
        if self.refine is None:
            return drawn
        return Terminals(self.refine.move(drawn.x), drawn.latents, drawn.log_gamma)

    def as_tree(self) -> dict[str, Any]:
        """All that a file must hold."""
        return {} if self.content is None else dict(vars(self.content))

    def from_tree(self, tree: dict[str, Any]) -> None:
        """Takes over what :meth:`as_tree` returned."""
        self.content = Terminals(**tree) if tree else None


def _join(one: Terminals, other: Terminals) -> Terminals:
    def both(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.cat([a[n], b[n]]) for n in a}

    log_gamma = torch.cat([one.log_gamma, other.log_gamma])
    return Terminals(both(one.x, other.x), both(one.latents, other.latents), log_gamma)


def _square(forth: Tensor, home: Tensor, size: float) -> Tensor:
    """log N(home; 0, size^2) - log N(forth; 0, size^2), by particle."""
    return (forth.square() - home.square()).flatten(1).sum(-1).double() / (2 * size**2)


def _choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *(1,) * (yes.dim() - 1)), yes, no)
