r"""The Gaussian observations of a program, seen as a linear map of its processes.

.. math:: r = y - \mu(\hat x_0), \qquad A = d\mu / d x_0, \qquad D = \mathrm{Cov}[y \mid x_0] .

All observed sites (and all latents downstream of a process) with a Gaussian law are stacked into
one vector of length d_y, all processes into one of length d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.dissection import CHECKED, stand_in
from smcdiff.execution import Execution
from smcdiff.laws import base_law
from smcdiff.program import Program

from .linear_gaussian import block_diagonal, once, stack


@dataclass(frozen=True)
class Observations:
    """Residuals and noise at a batch of estimates.

    Attributes:
        mean: the stacked means, tracked by autograd where the estimates are.
        residual: y - mean.
        noises: D by site: covariances with shape ``(particle or 1, y, y)``, or the variances of
            independent elements with shape ``(particle or 1, y)``.
    """

    mean: Float64[Tensor, "particle y"]
    residual: Float64[Tensor, "particle y"]
    noises: list[Tensor]

    @cached_property
    def noise(self) -> Float64[Tensor, "#particle y y"]:
        """D of all sites together."""
        return block_diagonal([torch.diag_embed(n) if n.dim() == 2 else n for n in self.noises])

    @cached_property
    def variances(self) -> Float64[Tensor, "#particle y"] | None:
        """The diagonal of D, if there is nothing else."""
        if any(noise.dim() == 3 for noise in self.noises):
            return None
        rows = max(map(len, self.noises))
        return torch.cat([noise.expand(rows, -1) for noise in self.noises], -1)


class Separate:
    r"""An operator whose rows have no element of x_0 in common, such as a mask or means of blocks:

    .. math:: A\, \mathrm{diag}(w) A^\top \text{ is diagonal for every } w .

    Hundreds of sharp observations then cost no matrices.
    """

    def __init__(self, matrix: Float64[Tensor, "1 y d"]) -> None:
        self.matrix = matrix[0]
        self.owner, self.squares = self.matrix.abs().argmax(0), self.matrix.square().sum(0)

    @staticmethod
    def fits(matrix: Float64[Tensor, "1 y d"]) -> bool:
        return bool(((matrix != 0).sum(1) <= 1).all())

    def weighed(self, weights: Float64[Tensor, "rows d"]) -> Float64[Tensor, "rows y"]:
        """The diagonal of A diag(w) A', for every row w."""
        none = weights.new_zeros(len(weights), len(self.matrix))
        return none.index_add(1, self.owner, weights * self.squares)


def observe(execution: Execution, sites: tuple[str, ...], batch: int) -> Observations:
    """The Gaussian sites of a run, at the first estimate of each particle."""
    means, residuals, noises = [], [], []
    for name in sites:
        site = execution.sites[name]
        mean = _rows(site.fn.mean, execution.batch)[:batch]
        value = torch.as_tensor(site.value).expand(site.fn.mean.shape)
        means.append(mean)
        residuals.append(_rows(value, execution.batch)[:batch] - mean)
        noises.append(_noise(site.fn, execution.batch, batch))
    return Observations(torch.cat(means, -1), torch.cat(residuals, -1), noises)


def operator(
    execution: Execution, mean: Tensor, batch: int, names: tuple[str, ...]
) -> Float64[Tensor, "particle y d"]:
    """A at each particle's first estimate: one backward pass of the program per observation."""
    states = [execution.states[n] for n in names]
    rows = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    cotangents = rows[:, None, :].expand(-1, batch, -1)
    grads = _pulled_back(mean, states, cotangents)
    full = [
        (s.new_zeros(len(rows), *s.shape) if g is None else g)[:, :batch].double().flatten(2)
        for g, s in zip(grads, states, strict=True)
    ]
    return torch.cat(full, -1).transpose(0, 1)


def _pulled_back(mean: Tensor, states: list[Tensor], cotangents: Tensor) -> Sequence[Tensor | None]:
    """The gradients of all rows at once; one by one where a backward pass cannot be batched."""
    pull = partial(torch.autograd.grad, mean, states, retain_graph=True, allow_unused=True)
    try:
        return pull(cotangents, is_grads_batched=True)
    except RuntimeError:  # such as that of a group norm after attention, or memory is short
        rows = [pull(row) for row in cotangents]
        return [None if one[0] is None else torch.stack(one) for one in zip(*rows, strict=True)]


def constant_operator(
    program: Program, sites: tuple[str, ...], names: tuple[str, ...]
) -> tuple[Float64[Tensor, "1 y d"] | None, int]:
    """A, if it is the same at three points of the program (an affine observation), and its rows."""
    problems = None
    if program.num_problems is not None:
        problems = torch.arange(CHECKED) % program.num_problems
    with torch.enable_grad():
        execution = program.execute(lambda s: _tracked(stand_in(s)), {}, CHECKED, problems)
        mean = observe(execution, sites, CHECKED).mean
        matrix = operator(execution, mean, CHECKED, names)
    scale = float(matrix.abs().max())
    same = bool(((matrix - matrix[:1]).abs() <= 1e-6 * max(scale, 1e-30)).all())
    return (matrix[:1].detach() if same else None), matrix.shape[1]


class Levels:
    """What the signals of processes say of each element of their states, computed once."""

    def __init__(self, program: Program, names: tuple[str, ...]) -> None:
        self.signals = {name: program.processes[name].signal for name in names}
        self._known: dict[tuple[int, str], Float64[Tensor, " d"]] = {}

    def __call__(self, x: dict[str, Tensor], t: int, field: str) -> Float64[Tensor, " d"]:
        """One field at t, for states that are shaped as x is."""
        if (t, field) not in self._known:
            parts = {}
            for name, signal in self.signals.items():
                level = torch.as_tensor(getattr(signal(t), field), dtype=torch.float64)
                parts[name] = level.to(x[name].device).expand(x[name][:1].shape)
            self._known[t, field] = stack(parts)[0]
        return self._known[t, field]


def _tracked(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _rows(value: Tensor, batch: int) -> Tensor:
    return value.double().reshape(batch, -1)


def _noise(fn: Distribution, rows: int, batch: int) -> Tensor:
    """Cov[y | x_0] with shape ``(particle or 1, y, y)``, or its diagonal if that is all."""
    covariance = getattr(base_law(fn), "covariance_matrix", None)
    if isinstance(covariance, Tensor) and covariance.shape[-1] == fn.event_shape[-1]:
        full = covariance.double()
        blocks = once(full.reshape(rows, -1, *full.shape[-2:])[:batch])
        return block_diagonal(list(blocks.unbind(1)))
    return once(_rows(fn.variance.expand(fn.mean.shape), rows)[:batch])
