"""Stochastic gradient descent on weighted paths, for families without a closed form."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

Loss = Callable[[Int64[Tensor, " row"]], Tensor]


@dataclass(frozen=True)
class Descent:
    """Adam with a learning rate that falls to zero (half a cosine).

    Attributes:
        steps: how many.
        batch: paths per step, drawn by their weights (None: all of them, weighted).
        times: times t per step, drawn at random (None: all of them).
        learning_rate: the first one.
    """

    steps: int = 300
    batch: int | None = 256
    times: int | None = 8
    learning_rate: float = 3e-3

    @torch.enable_grad()
    def minimise(
        self,
        parameters: Iterable[Tensor],
        losses: Sequence[Loss],
        weights: Float64[Tensor, " path"],
    ) -> None:
        """Minimises the weighted mean over the paths of the sum over the times of their losses.

        Args:
            losses: one function per time, from the numbers of some paths to their losses.
        """
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate)
        everything = torch.arange(len(weights), device=weights.device)
        for step in range(self.steps):
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            rows, shares = everything, weights
            if self.batch is not None:
                rows = torch.multinomial(weights, self.batch, replacement=True)
                shares = torch.full_like(rows, 1 / self.batch, dtype=weights.dtype)
            chosen = torch.randperm(len(losses))[: self.times].tolist()
            scale = len(losses) / len(chosen)
            loss = sum((shares * losses[k](rows)).sum() for k in chosen) * scale
            optimiser.zero_grad()
            torch.as_tensor(loss).backward()
            optimiser.step()
