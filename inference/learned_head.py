"""The network of a residual: from what is known of a state to its u and h."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

TIMES = 4  # features of t
FAR = 5.0  # standardised inputs end here: a network that extrapolates sends paths to infinity


class Layers(nn.Module):
    """Two hidden layers, and a last one that sees the inputs as well and starts at zero."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width + inputs, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Float[Tensor, "path input"]) -> Float[Tensor, "path output"]:
        out: Tensor = self.last(torch.cat([self.hidden(features), features], -1))
        return out


class ResidualHead(nn.Module):
    """Two hidden layers between standardised inputs and outputs that start at zero, u and h apart.

    They share no layers: the misfits of h are large, and would leave u half learned.

    Args:
        size: d, of the states.
        context: how many numbers are shown beside states, estimates and directions.
        width: of the hidden layers.
        rank: how many combinations of the elements it sees and moves (None: every element). Which,
            the first paths tell: the leading ones of the estimates and of the directions.

    Attributes:
        basis: these combinations, orthonormal, with shape ``(d, rank)``; None for every element.
    """

    centre: Tensor
    scale: Tensor
    basis: Tensor | None

    def __init__(self, size: int, context: int, width: int, rank: int | None = None) -> None:
        super().__init__()
        self.size, kept = size, size if rank is None else rank
        self.register_buffer("basis", None if rank is None else torch.zeros(size, kept))
        self.register_buffer("centre", torch.zeros(3 * kept + context))
        self.register_buffer("scale", torch.ones(3 * kept + context))
        self.direction = Layers(len(self.centre) + TIMES, kept, width)
        self.value = Layers(len(self.centre) + TIMES, 1, width)

    def forward(
        self, inputs: Float[Tensor, "path input"], time: Float[Tensor, " path"]
    ) -> Float[Tensor, "path output"]:
        angle = math.pi * time[:, None]
        times = torch.cat([time[:, None], time[:, None] ** 2, angle.cos(), angle.sin()], -1)
        near = ((self._seen(inputs) - self.centre) / self.scale).clamp(-FAR, FAR)
        features = torch.cat([near, times], -1)
        u: Tensor = self.direction(features)
        if self.basis is not None:
            u = u @ self.basis.mT
        return torch.cat([u, self.value(features)], -1)

    @property
    def begun(self) -> bool:
        """Whether it has learned anything."""
        return bool(self.value.last.weight.any())

    def standardise(self, inputs: Float[Tensor, "path input"]) -> None:
        """Fixes the basis, what is subtracted from its inputs, and what they are divided by."""
        if self.basis is not None:
            estimates, directions = inputs.split(self.size, -1)[1:3]
            estimates = estimates - estimates.mean(0)
            both = [part / part.norm().clamp(min=1e-9) for part in (estimates, directions)]
            self.basis.copy_(torch.svd_lowrank(torch.cat(both), self.basis.shape[1])[2])
        seen = self._seen(inputs)
        self.centre.copy_(seen.mean(0))
        self.scale.copy_(seen.std(0).clamp(min=1e-3))

    def _seen(self, inputs: Float[Tensor, "path input"]) -> Float[Tensor, "path seen"]:
        if self.basis is None:
            return inputs
        parts = inputs[:, : 3 * self.size].split(self.size, -1)
        return torch.cat([*(p @ self.basis for p in parts), inputs[:, 3 * self.size :]], -1)
