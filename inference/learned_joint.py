"""Several families as one: each for the processes that it can change."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.arguments import check_kind
from smcdiff.dissection import CHECKED, stand_in
from smcdiff.execution import Statement
from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.twist import TwistValue, View

from .learned import Draw, LearnedTwist, Paths
from .learned_gaussian import QuadraticTwist
from .learned_power import PowerTwist
from .learned_tokens import TokenTwist
from .proposals import Move, Start, sample_as

MANY = 64  # elements: from here on a path says less of each than a table needs to know
T = TypeVar("T")


class JointTwist(LearnedTwist):
    """Families whose processes differ, side by side.

    Args:
        parts: the families. None are needed: :func:`usual_families` chooses by the first program
            that it meets.
    """

    def __init__(self, *parts: LearnedTwist) -> None:
        for part in parts:
            check_kind("a part of a JointTwist", part, LearnedTwist, "QuadraticTwist()")
        self.parts = parts
        self._waiting: Mapping[str, Tensor] = {}  # parameters of parts that are not chosen yet

    def prepare(self, program: Program) -> None:
        if not self.parts:
            self.parts = usual_families(program)
            self.restore(self._waiting)
        for part in self.parts:
            part.prepare(program)
        owners = [name for part in self.parts for name in part.names]
        twice = sorted({name for name in owners if owners.count(name) > 1})
        if twice:
            raise ValueError(
                f"two parts of a JointTwist change process {twice[0]!r}: leave one out"
            )
        self.names = tuple(owners)
        self.take_needs(*self.parts)

    @property
    def num_draws(self) -> int:
        return max((part.num_draws for part in self.parts), default=0)

    @property
    def paths_needed(self) -> float:
        return sum(part.paths_needed for part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        if not self.parts:
            return dict(self._waiting)
        return _joined([part.tensors() for part in self.parts])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._waiting = tensors
        for k, part in enumerate(self.parts):
            part.restore(_own(tensors, k))

    # ------------------------------------------------------------------------- twist and proposal

    def evaluate(self, view: View) -> TwistValue:
        values = [
            part.evaluate(replace(view, memory=_own(view.memory, k)))
            for k, part in enumerate(self.parts)
        ]
        log_psi = torch.stack([value.log_psi for value in values]).sum(0)
        caches, memories = [v.cache for v in values], [v.memory for v in values]
        return TwistValue(log_psi, _joined(caches), _joined(memories))

    def start(self, start: Start) -> Move:
        def own(k: int, part: LearnedTwist) -> Start:
            def look(x: dict[str, Tensor]) -> tuple[dict[str, Kernel], Tree]:
                kernels, cache = start.look(x)
                return kernels, _seen_by(k, cache)

            return replace(start, twisted=part.offers_start, look=look)

        moves = [part.start(own(k, part)) for k, part in enumerate(self.parts)]
        return self._merged(moves, start.draws)

    def prepay(
        self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree
    ) -> Float64[Tensor, " particle"] | None:
        paid = [part.prepay(t, x, kernels, _seen_by(k, cache)) for k, part in enumerate(self.parts)]
        known = [each for each in paid if each is not None]
        return torch.stack(known).sum(0) if known else None

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        moves = [part.move(t, x, kernels, _seen_by(k, cache)) for k, part in enumerate(self.parts)]
        rest = {n: sample_as(k.law, x[n]) for n, k in kernels.items() if n not in self.names}
        return self._merged(moves, {n: rest.get(n, x[n]) for n in kernels})

    def _merged(self, moves: list[Move], like: dict[str, Tensor]) -> Move:
        """Each process as its own part has moved it."""
        x = dict(like)
        for part, move in zip(self.parts, moves, strict=True):
            x |= {name: move.x[name] for name in part.names}
        ratios = [move.log_ratio for move in moves if move.log_ratio is not None]
        return Move(x, torch.stack(ratios).sum(0) if ratios else None)

    # ------------------------------------------------------------------------------- the learning

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        ratios = [
            part.log_ratio(replace(draw, cache=_seen_by(k, draw.cache)))
            for k, part in enumerate(self.parts)
        ]
        return torch.stack(ratios).sum(0)

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        for k, part in enumerate(self.parts):
            caches = tuple(_seen_by(k, cache) for cache in paths.caches)
            part.fit(replace(paths, caches=caches), weights)


def usual_families(program: Program) -> tuple[LearnedTwist, ...]:
    """What learns best in a program, as far as can be said beforehand.

    A :class:`TokenTwist` for discrete processes. For continuous ones a :class:`PowerTwist` where a
    network denoises many elements and the program has gradients (images: ``benchmarks/wishes.py``),
    and a :class:`QuadraticTwist` elsewhere.
    """
    processes = [p for n, p in program.processes.items() if not program.sources[n].discrete]
    size = sum(math.prod(p.event_shape) for p in processes if not p.closed_form)
    learned = size >= MANY and has_gradients(program)
    return (PowerTwist() if learned else QuadraticTwist(), TokenTwist())


def has_gradients(program: Program) -> bool:
    """Whether autograd can follow every likelihood to the continuous processes above it."""
    continuous = {n for n in program.processes if not program.sources[n].discrete}

    def state(statement: Statement) -> Tensor:
        x = stand_in(statement).detach()
        return x.requires_grad_(statement.name in continuous)

    try:
        with torch.enable_grad():
            execution = program.execute(state, {}, CHECKED)
    except ValueError:  # such as from NumPy, which refuses tensors that need gradients
        return False
    return all(
        execution.log_prob(name).requires_grad
        for name, site in program.likelihoods.items()
        if site.kind != "deterministic" and site.parents & continuous
    )


# ------------------------------------------------------------------------ trees of several parts


def _joined(parts: list[dict[str, T]]) -> dict[str, T]:
    """The entries of all parts, named apart."""
    return {f"{k}/{name}": value for k, part in enumerate(parts) for name, value in part.items()}


def _own(tree: Mapping[str, T], k: int) -> dict[str, T]:
    """The entries of one part."""
    own = f"{k}/"
    return {name[len(own) :]: value for name, value in tree.items() if name.startswith(own)}


def _seen_by(k: int, cache: Tree) -> Tree:
    """The engine's cache as if a part were alone."""
    return {**cache, "twist": _own(cache["twist"], k)} if "twist" in cache else cache
