"""Several families as one: each for the processes that it can change."""

from collections.abc import Mapping

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.twist import TwistValue, View

from .learned import Draw, LearnedTwist, Paths
from .learned_gaussian import QuadraticTwist
from .learned_tokens import TokenTwist
from .proposals import Move, Start, sample_as


class JointTwist(LearnedTwist):
    """Families whose processes differ, side by side.

    Args:
        parts: the families (none: a :class:`QuadraticTwist` for continuous processes and a
            :class:`TokenTwist` for discrete ones, which together learn in any program).
    """

    def __init__(self, *parts: LearnedTwist) -> None:
        self.parts = parts or (QuadraticTwist(), TokenTwist())

    def prepare(self, program: Program) -> None:
        for part in self.parts:
            part.prepare(program)
        owners = [name for part in self.parts for name in part.names]
        twice = sorted({name for name in owners if owners.count(name) > 1})
        if twice:
            raise ValueError(
                f"two parts of a JointTwist change process {twice[0]!r}: leave one out"
            )
        self.names = tuple(owners)

    @property
    def paths_needed(self) -> float:
        return sum(part.paths_needed for part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{k}/{n}": v for k, part in enumerate(self.parts) for n, v in part.tensors().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for k, part in enumerate(self.parts):
            own = f"{k}/"
            part.restore({n[len(own) :]: v for n, v in tensors.items() if n.startswith(own)})

    def evaluate(self, view: View) -> TwistValue:
        values = [part.evaluate(view) for part in self.parts]
        log_psi = torch.stack([value.log_psi for value in values]).sum(0)
        return TwistValue(log_psi)

    def start(self, start: Start) -> Move:
        moves = [part.start(start) for part in self.parts]
        return self._merged(moves, start.draws)

    def prepay(
        self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree
    ) -> Float64[Tensor, " particle"] | None:
        paid = [part.prepay(t, x, kernels, cache) for part in self.parts]
        known = [each for each in paid if each is not None]
        return torch.stack(known).sum(0) if known else None

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        moves = [part.move(t, x, kernels, cache) for part in self.parts]
        rest = {n: sample_as(k.law, x[n]) for n, k in kernels.items() if n not in self.names}
        return self._merged(moves, {n: rest.get(n, x[n]) for n in kernels})

    def _merged(self, moves: list[Move], like: dict[str, Tensor]) -> Move:
        """Each process as its own part has moved it."""
        x = dict(like)
        for part, move in zip(self.parts, moves, strict=True):
            x |= {name: move.x[name] for name in part.names}
        ratios = [move.log_ratio for move in moves if move.log_ratio is not None]
        return Move(x, torch.stack(ratios).sum(0) if ratios else None)

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        return torch.stack([part.log_ratio(draw) for part in self.parts]).sum(0)

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        for part in self.parts:
            part.fit(paths, weights)
