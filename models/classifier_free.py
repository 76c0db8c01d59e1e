r"""Classifier-free guidance (Ho & Salimans 2022) as a process's own kernel.

.. math:: F_{guided}(x_t) = F(x_t, \varnothing) + w\, (F(x_t, \mathrm{context})
                            - F(x_t, \varnothing)).

All parameterisations are affine in the network's output, so this is the same for each of them. The
guided kernel is the prior: model and weights use the same one, and nothing remains to be corrected.

Guidance harms at high noise, where it drops modes, and is not needed at low noise (Kynkäänniemi et
al. 2024, arXiv 2404.07724): an interval of noise levels limits it to those in between, and outside
there is one network call with the context instead of two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from smcdiff.arguments import check_number

from .grids import Grid

Rows = dict[str, Any]


@dataclass(frozen=True)
class ClassifierFree:
    """Two rows of one batched network call for every state: with the context, and without.

    Attributes:
        scale: w. 1 is the conditional network, 0 the unconditional one.
        null: what stands for "no context", by name: a number or a tensor with the shape of one
            row's context, such as ``{"label": 10}`` or the embedding of an empty prompt. Context
            that is not named here is given to both.
        interval: (low, high): it guides where low <= sigma_t / alpha_t <= high, the noise levels of
            EDM and of the paper, whatever the schedule; elsewhere the network with its context is
            the prior. ``schedule.grid(T)`` has them as ``noise``, beside the network's ``time``.
    """

    scale: float
    null: Mapping[str, Any]
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        check_number("scale", self.scale, -math.inf, math.inf, "()")
        if not self.null or not isinstance(self.null, Mapping):
            raise ValueError(
                "classifier-free guidance needs to know what 'no context' is: "
                f"null={{'label': 10}}, but got {self.null!r}"
            )
        ends = self.interval if isinstance(self.interval, tuple | list) else ()
        numbers = len(ends) == 2 and all(isinstance(end, Real) for end in ends)
        if not (numbers and 0 <= ends[0] < ends[1]):
            raise ValueError(
                "the interval of guidance is (low, high) with 0 <= low < high, in noise levels "
                f"sigma / alpha, got {self.interval}: try (0.3, 5.0)"
            )

    def acts(self, noise: float) -> bool:
        """Whether it guides where sigma_t / alpha_t is ``noise``."""
        low, high = self.interval
        return low <= noise <= high

    def check_reach(self, grid: Grid) -> None:
        """Refuses an interval that no step of a process is in."""
        noises = grid.noise[1:].tolist()
        if not any(map(self.acts, noises)):
            raise ValueError(
                f"no step lies in the interval of guidance {self.interval}: it is in noise levels "
                f"sigma / alpha, which are {noises[0]:.3g} to {noises[-1]:.3g} here"
            )

    def both(self, x: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """The states twice, first with their context and then without.

        Args:
            x: with shape ``(batch, *event)``.
            rows: context by name, tensors with the batch in front.
        """
        missing = [n for n in self.null if not isinstance(rows.get(n), Tensor)]
        if missing:
            raise ValueError(
                f"guidance needs the context {missing} as tensors, as in prior('x', label=tensor), "
                f"but got {sorted(rows)}"
            )
        without = {n: self._null(n, rows[n]) if n in self.null else v for n, v in rows.items()}
        twice = {
            n: torch.cat([v, without[n]]) if isinstance(v, Tensor) else v for n, v in rows.items()
        }
        return torch.cat([x, x]), twice

    def _null(self, name: str, given: Tensor) -> Tensor:
        null = torch.as_tensor(self.null[name]).to(given)
        try:
            return null.expand_as(given)
        except RuntimeError as error:
            raise ValueError(
                f"null[{name!r}] has shape {tuple(null.shape)}, but one row of the context has "
                f"{tuple(given.shape[1:])}"
            ) from error

    def combine(self, output: Tensor) -> Tensor:
        """The guided output, with shape ``(batch, *out)``, from ``(2 * batch, *out)``."""
        given, null = output.chunk(2)
        return null + self.scale * (given - null)
