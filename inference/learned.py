r"""What learns: a twist and a proposal in one, fitted to recorded paths by weighted likelihood.

A family of path laws :math:`P_\theta` starts at the model's own, P, and moves to weighted paths by

.. math:: \theta \leftarrow \arg\max_\theta \sum_i w_i \log P_\theta(x_{T:0}^i),

which is the projection of their law in forward KL divergence. It uses values of the reward only.
With few paths a fit would exclude what they happen not to show, and no weight would tell: so every
fit is *anchored*, as if ``pseudo_count`` further paths had been drawn from the law it started from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.particles import Calls, Particles, load_tree, map_tree, save_tree
from smcdiff.process import Kernel, Tree
from smcdiff.twist import Twist

from .evaluation import Evaluator, concatenate
from .proposals import Proposal


@dataclass(frozen=True)
class Draw:
    """One draw of recorded paths, that of x_s, flat over the paths.

    Attributes:
        s: the time of what was drawn; T for the start.
        laws: the model's own laws of x_s by process.
        after: x_s.
        before: x_{s+1}; empty for the start.
        kernels, cache: the transitions out of ``before``, and the engine's cache there; empty for
            the start.
    """

    s: int
    laws: dict[str, Distribution]
    after: dict[str, Tensor]
    before: dict[str, Tensor]
    kernels: dict[str, Kernel]
    cache: Tree


@dataclass(frozen=True)
class Paths:
    """Whole paths, flat over ``(problem) path``.

    Attributes:
        evaluator: rebuilds transitions from the caches.
        x, caches: the states, and the engine's caches at them, at T, ..., 0.
        ratios: log p - log q of the draws of x_T, ..., x_0, under the law that drew them.
        at_start: what was paid at the start, for x_T and the ordinary latents.
        log_sampling: log-weights with which the paths stand for draws of that law (zero without
            resampling).
        calls: what the paths cost.
    """

    evaluator: Evaluator
    x: tuple[dict[str, Tensor], ...]
    caches: tuple[Tree, ...]
    ratios: tuple[Float64[Tensor, " path"], ...]
    at_start: Float64[Tensor, " path"]
    log_sampling: Float64[Tensor, " path"]
    calls: Calls = Calls()

    @property
    def log_reward(self) -> Float64[Tensor, " path"]:
        """The program's log gamma(x_0, z)."""
        log_psi: Tensor = self.caches[-1]["log_psi"]
        return log_psi

    @property
    def log_weights(self) -> Float64[Tensor, " path"]:
        """log gamma / q of whole paths."""
        total: Tensor = self.at_start + self.log_reward + torch.stack(self.ratios[1:]).sum(0)
        return total

    def to_go(self) -> tuple[Float64[Tensor, " path"], ...]:
        """The log-weight still to come after x_T, ..., x_1: what log psi should have foreseen."""
        left = torch.stack([*self.ratios[1:], self.log_reward])
        return left.flip(0).cumsum(0).flip(0)[:-1].unbind(0)

    def draws(self) -> Iterator[Draw]:
        """Those of x_T, ..., x_0."""
        program = self.evaluator.program
        yield Draw(program.num_steps, self._first_laws(), self.x[0], {}, {}, {})
        for k, (before, cache) in enumerate(zip(self.x[:-1], self.caches[:-1], strict=True)):
            t = program.num_steps - k
            kernels = self.evaluator.kernels(t, before, cache)
            laws = {n: kernel.law for n, kernel in kernels.items()}
            yield Draw(t - 1, laws, self.x[k + 1], before, kernels, cache)

    def _first_laws(self) -> dict[str, Distribution]:
        laws, program = {}, self.evaluator.program
        for name, process in program.processes.items():
            shared = program.sources[name].shared_context
            law = process.initial(**{**shared, **self.caches[0]["context"][name]})
            x = self.x[0][name]
            laws[name] = law.expand(x.shape[: x.dim() - len(law.event_shape)])
        return laws


class LearnedTwist(Twist, Proposal, ABC):
    """A twist and a proposal with parameters: give the same object as both.

    It starts at the model's own law with psi = 1 (or at an analytic twist), learns in place, and is
    frozen wherever it is merely used: ``SMC(model, twist=learned, proposal=learned)``.

    Attributes:
        names: the processes that it changes; known once a program is prepared.
    """

    names: tuple[str, ...]

    @property
    @abstractmethod
    def paths_needed(self) -> float:
        """About how many effective paths determine the parameters of a fit."""

    @abstractmethod
    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        """log p - log q of recorded draws under the present parameters.

        What no parameter changes may be left out.
        """

    @abstractmethod
    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        """Moves to the anchored maximum of the weighted likelihood.

        Args:
            weights: of the paths, adding to one.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All parameters by name."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`tensors` returned."""

    @torch.no_grad()
    def log_ratios(self, paths: Paths) -> Float64[Tensor, " path"]:
        """The same of whole paths."""
        return torch.stack([self.log_ratio(draw) for draw in paths.draws()]).sum(0)

    def save(self, path: str | Path) -> None:
        """Writes the parameters to a safetensors file."""
        save_tree(path, self.tensors(), self._kind)

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Reads what :meth:`save` wrote, into a family that was built alike.

        Args:
            device: where the parameters are going to be used, which is where the processes lie
                (a network that was given stays where it is).
        """
        self.restore(load_tree(path, self._kind, device))

    @property
    def _kind(self) -> str:
        return f"smcdiff-1 {type(self).__name__}"


@torch.no_grad()
def record(
    evaluator: Evaluator,
    states: Sequence[Particles],
    learned: LearnedTwist,
    exponent: float = 1.0,
) -> Paths:
    """The paths that a sweep has left: every final particle, followed back to the start.

    Args:
        states: all states of one run, from T to 0.
        learned: the proposal that drew them, with the same parameters.
        exponent: the power that the sweep's weights were raised to.
    """
    lead, rows = len(states[-1].axes), _lineages(states)

    def flat(tree: Tree, k: int) -> Tree:
        return map_tree(lambda leaf: leaf.flatten(0, lead - 1)[rows[k]], tree)

    x = tuple(flat(state.x, k) for k, state in enumerate(states))
    caches = tuple(flat(state.cache, k) for k, state in enumerate(states))
    at_start = flat(states[0].log_weights, 0) / exponent - caches[0]["log_psi"]
    calls = sum((step.calls for step in states[-1].history), Calls())
    paths = Paths(evaluator, x, caches, (), at_start, torch.zeros_like(at_start), calls)
    paths = replace(paths, ratios=tuple(learned.log_ratio(draw) for draw in paths.draws()))
    left = states[-1].log_weights.flatten() - exponent * paths.log_weights
    return replace(paths, log_sampling=left.nan_to_num(0.0))  # of paths without weight: no matter


def join(sweeps: Sequence[Paths]) -> Paths:
    """The paths of several sweeps as one."""
    if len(sweeps) == 1:
        return sweeps[0]

    def each(field: str) -> tuple[Any, ...]:
        return tuple(
            concatenate(list(at)) for at in zip(*(getattr(p, field) for p in sweeps), strict=True)
        )

    return Paths(
        sweeps[0].evaluator,
        each("x"),
        each("caches"),
        each("ratios"),
        torch.cat([p.at_start for p in sweeps]),
        torch.cat([p.log_sampling for p in sweeps]),
        sum((p.calls for p in sweeps), Calls()),
    )


def _lineages(states: Sequence[Particles]) -> list[Tensor]:
    """The flat index of every final particle's ancestor at each state, from T to 0."""
    axes = states[-1].axes
    here = torch.arange(axes[-1], device=states[-1].log_weights.device).expand(axes)
    runs = here[..., 0].numel()
    offsets = torch.arange(runs, device=here.device).reshape(*axes[:-1], 1) * axes[-1]
    rows = [(here + offsets).flatten()]
    for step in reversed(states[-1].history[1:]):
        here = step.ancestors.gather(-1, here)
        rows.append((here + offsets).flatten())
    return rows[::-1]
