r"""Records of trajectories: what is planned, and what was walked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64, Int64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.process import Tree

Laws = dict[str, Distribution]
States = dict[str, Tensor]  # by member site: x_t as Pyro names it, without the _t


@dataclass(frozen=True)
class Opening:
    """What a program says before its processes move: the laws of x_T, contexts, its latents.

    Attributes:
        laws: of x_T by member site.
        contexts: by process.
        log_latents: the log-density of the latents that are its own to propose.
    """

    laws: Laws
    contexts: dict[str, dict[str, Any]]
    log_latents: Float64[Tensor, " particle"]


@dataclass(frozen=True)
class Plan:
    """One batch of trajectories, of all processes together.

    Attributes:
        begin: n: they are walked from x_n to x_0, and share nothing but x_n where n < T.
        law: the law that draws a state, given those of guide and model.
        given: states that are there already, by t and member site.
        follows: which trajectories take the given states (the others draw theirs).
        latents: the ordinary latents, if they are given.
        groups: trajectories with one number have one normalising constant (None: by problem).
    """

    begin: int
    law: Callable[[Distribution, Distribution], Distribution]
    given: Mapping[int, States] = field(default_factory=dict)
    follows: Tensor | None = None
    latents: dict[str, Tensor] | None = None
    groups: Int64[Tensor, " particle"] | None = None


@dataclass(frozen=True)
class Trajectories:
    """This process's share of a batch, flat over the particles.

    Attributes:
        x: the states by t, from where they began to 0.
        latents, problems: of each particle.
        at_start: log q - log p of x_T and of the latents that the guide proposes.
        ratios: log q - log p of x_{t-1} given x_t, by t; with a graph where asked for.
        log_behaviour: log q - log b of the whole path, b the law that drew it.
        evaluations: the model's, by t, where they are needed again.
    """

    x: dict[int, States]
    latents: dict[str, Tensor]
    problems: Tensor | None
    at_start: Float64[Tensor, " particle"]
    ratios: dict[int, Float64[Tensor, " particle"]]
    log_behaviour: Float64[Tensor, " particle"]
    evaluations: dict[int, Tree]

    @property
    def size(self) -> int:
        return len(self.at_start)

    @property
    def log_ratio(self) -> Float64[Tensor, " particle"]:
        """log q - log p of the whole trajectory, without a graph."""
        return torch.stack([self.at_start, *self.ratios.values()]).detach().sum(0)
