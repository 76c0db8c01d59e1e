"""Stochastic gradient descent on weighted paths, for families without a closed form."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

LOOKS = 10  # at the paths that are held out

Loss = Callable[[Int64[Tensor, " row"]], Tensor]


@runtime_checkable
class Losses(Protocol):
    """The losses of paths at their times, all in one call."""

    def __len__(self) -> int:
        """The number of times."""

    def __call__(self, rows: Int64[Tensor, "time row"], times: Int64[Tensor, " time"]) -> Tensor:
        """Those of some paths at each of some times, with the shape of ``rows``."""


@dataclass(frozen=True)
class OneByOne:
    """One function per time, from the numbers of some paths to their losses."""

    losses: Sequence[Loss]

    def __len__(self) -> int:
        return len(self.losses)

    def __call__(self, rows: Int64[Tensor, "time row"], times: Int64[Tensor, " time"]) -> Tensor:
        pairs = zip(times.tolist(), rows, strict=True)
        return torch.stack([self.losses[k](own) for k, own in pairs])


@dataclass(frozen=True)
class Descent:
    """Adam with a learning rate that falls to zero (half a cosine).

    Where paths are held out, the parameters that are kept are those with the least loss on them, of
    all that were looked at on the way: the first ones too, so that a family never gets worse than
    it was unless these paths are misled as well.

    Attributes:
        steps: how many.
        batch: paths per step and time, drawn by their weights (None: all of them, weighted).
        times: times t per step, drawn at random (None: all of them).
        learning_rate: the first one.
        held_out: the share of the paths that only judge; they are looked at ten times.
    """

    steps: int = 300
    batch: int | None = 256
    times: int | None = 8
    learning_rate: float = 3e-3
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out is a share of the paths in [0, 1), but got {self.held_out}")

    @torch.enable_grad()
    def minimise(
        self,
        parameters: Iterable[Tensor],
        losses: Sequence[Loss] | Losses,
        weights: Float64[Tensor, " path"],
    ) -> None:
        """Minimises the weighted mean over the paths of the sum over the times of their losses."""
        parameters = list(parameters)
        together = OneByOne(losses) if isinstance(losses, Sequence) else losses
        shuffled = torch.arange(len(weights), device=weights.device)
        if self.held_out:
            shuffled = torch.randperm(len(weights)).to(weights.device)
        held, rows = shuffled.tensor_split([round(self.held_out * len(weights))])
        if not bool(weights[rows].any()):
            return  # all that there is to learn from is held out
        best = Best(parameters, together, held, weights[held])
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate)
        for step in range(self.steps):
            if step % math.ceil(self.steps / LOOKS) == 0:
                best.look()
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            loss = self._loss(together, rows, weights[rows] / weights[rows].sum())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        best.look()
        best.restore()

    def _loss(self, losses: Losses, rows: Tensor, shares: Tensor) -> Tensor:
        """The loss of some paths at some times."""
        times = torch.randperm(len(losses))[: self.times].to(rows.device)
        rows = rows.expand(len(times), -1)
        if self.batch is not None:
            size = len(times) * self.batch
            chosen = torch.multinomial(shares, size, replacement=True).reshape(len(times), -1)
            rows, shares = rows.gather(1, chosen), shares.new_tensor(1 / self.batch)
        return (shares * losses(rows, times)).sum() * (len(losses) / len(times))


@dataclass
class Best:
    """The parameters with the least loss on the paths that are held out; without any, the last.

    Attributes:
        weights: of these paths.
    """

    parameters: Sequence[Tensor]
    losses: Losses
    held: Int64[Tensor, " row"]
    weights: Float64[Tensor, " row"]
    least: float = math.inf
    kept: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def look(self) -> None:
        """Judges the present parameters."""
        if not len(self.held):
            return
        times = torch.arange(len(self.losses), device=self.held.device)
        rows = self.held.expand(len(times), -1)
        loss = float((self.weights * self.losses(rows, times)).sum())
        if loss < self.least:
            self.least, self.kept = loss, [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Takes back the best."""
        for parameter, kept in zip(self.parameters, self.kept, strict=False):
            parameter.copy_(kept)
