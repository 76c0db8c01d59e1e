r"""Sweeps of earlier iterations, used again.

Paths drawn from :math:`P_1, \dots, P_k` in turn stand for the last of these laws by the weights

.. math:: b = P_k \Big/ \sum_j \frac{n_j}{n} P_j

(the deterministic mixture of Veach & Guibas 1995), whichever of the laws a path came from; what it
is worth is :math:`\gamma / P_k`, as for all others.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.particles import Calls
from smcdiff.weights import log_mean_exp

from .evaluation import Evaluator
from .learned import LearnedTwist, Paths, join

PerPath = Float64[Tensor, "problem path"]


@dataclass
class Pool:
    """The last sweeps, each with the law that drew it.

    Attributes:
        evaluator: of the sweeps.
        size: how many sweeps to keep.
        num_problems: of each sweep (1 where problems are no axis).
    """

    evaluator: Evaluator
    size: int
    num_problems: int
    sweeps: list[tuple[Paths, LearnedTwist]] = field(default_factory=list)

    def add(self, paths: Paths, learned: LearnedTwist) -> None:
        """Keeps a sweep, and forgets the oldest if there are too many."""
        law = copy.deepcopy(learned) if self.size > 1 else learned
        self.sweeps = [*self.sweeps, (paths, law)][-self.size :]

    def log_weights(self) -> tuple[PerPath, PerPath]:
        """log gamma / P_k and the base log-weight log b, of all paths."""
        if len(self.sweeps) == 1:
            paths = self.sweeps[0][0]
            return self._rows(paths.log_weights), self._rows(paths.log_sampling)
        sizes = [self._rows(paths.at_start).shape[-1] for paths, _ in self.sweeps]
        shares = torch.tensor(sizes).double().log() - math.log(sum(sizes))
        logs, bases = [], []
        for k, (paths, _) in enumerate(self.sweeps):
            ratios = torch.stack([law.log_ratios(paths) for _, law in self.sweeps])
            mixture = (shares.to(ratios.device)[:, None] - ratios).logsumexp(0)
            logs.append(self._rows(paths.log_weights + ratios[-1] - ratios[k]))
            sampling = self._rows(paths.log_sampling)
            sampling = sampling - log_mean_exp(sampling)[:, None]
            bases.append(self._rows(-ratios[-1] - mixture) + sampling)
        return torch.cat(logs, -1), torch.cat(bases, -1)

    def all_paths(self, weights: PerPath) -> tuple[Paths, Float64[Tensor, " row"]]:
        """All paths as one, with their weights in the same order, adding to one."""
        parts = weights.split([len(p.at_start) // self.num_problems for p, _ in self.sweeps], -1)
        flat = torch.cat([part.flatten() for part in parts]) / self.num_problems
        return join([paths for paths, _ in self.sweeps]), flat

    def _rows(self, flat: Tensor) -> PerPath:
        return flat.reshape(self.num_problems, -1)

    # ------------------------------------------------------------------------------- checkpoints

    def as_tree(self) -> list[dict[str, Any]]:
        """All that a file must hold."""
        kept = [({k: v for k, v in vars(p).items() if k != "evaluator"}, f) for p, f in self.sweeps]
        return [dict(p, calls=vars(p["calls"]), law=f.tensors()) for p, f in kept]

    def from_tree(self, tree: list[dict[str, Any]], learned: LearnedTwist) -> None:
        """Takes over what :meth:`as_tree` returned."""
        self.sweeps = []
        for each in tree:
            law = copy.deepcopy(learned)
            law.restore(each.pop("law"))
            calls = Calls(**each.pop("calls"))
            fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in each.items()}
            self.sweeps.append((Paths(self.evaluator, **fields, calls=calls), law))
