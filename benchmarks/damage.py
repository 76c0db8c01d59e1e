"""Damaged images: the linear problems that several benchmarks pose, and ranks of their truths."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smcdiff.models import Diffusion
from smcdiff.restoration import Model, missing_box, reduce, super_resolution


@dataclass(frozen=True)
class Task:
    """A linear map of images, seen with noise.

    Attributes:
        name: in tables.
        noise: its standard deviation; grey values span [-1, 1].
        forward, back: the map A of (batches of) images, and its pseudo-inverse.
        model: the program that observes y = A x_0 + noise.
        unseen: the pixels that y does not tell, those that intervals are judged on.
    """

    name: str
    noise: float
    forward: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    model: Model
    unseen: Tensor

    def observe(self, truth: Tensor) -> Tensor:
        clean = self.forward(truth)
        return clean + self.noise * torch.randn_like(clean)


def box(prior: Diffusion, seen: Tensor, noise: float) -> Task:
    """All pixels but a box."""
    seen = seen.to(prior.device)

    def into_image(y: Tensor) -> Tensor:
        image = y.new_zeros(*y.shape[:-1], *seen.shape)
        image[..., seen] = y
        return image

    model = missing_box(prior, seen, noise)
    return Task("box", noise, lambda x: x[..., seen], into_image, model, ~seen)


def enlarge(prior: Diffusion, factor: int, noise: float) -> Task:
    """Means of squares of pixels."""

    def repeat(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2)

    model = super_resolution(prior, factor, noise)
    everything = torch.ones(prior.event_shape, dtype=torch.bool, device=prior.device)
    return Task("enlarge", noise, lambda x: reduce(x, factor), repeat, model, everything)


def rank(
    values: Float[Tensor, "draw n"], truth: Float[Tensor, " n"], weights: Float[Tensor, " draw"]
) -> Float[Tensor, " n"]:
    """The truth's place among weighted draws, from 0 to 1; a tie is broken at random."""
    below = (weights[:, None] * (values <= truth)).sum(0)
    return below - (weights[:, None] * (values == truth)).sum(0) * torch.rand_like(below)
