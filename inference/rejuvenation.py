r"""Moves of ordinary latents that leave the current target invariant.

After resampling, particles share ancestors and so share latents. A Metropolis-Hastings move of a
latent z at fixed x_t, with target :math:`p(z)\,\psi_t(x_t, z)`, makes them differ again and
changes no
weight. It is valid only if no process context depends on z: otherwise z has shaped the path that
led
to x_t, and the target would be the law of that whole path.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import biject_to

from smcdiff.process import Tree
from smcdiff.program import Program

from .evaluation import Evaluator


@dataclass
class Rejuvenation:
    """Metropolis-Hastings moves on continuous latents, in unconstrained coordinates.

    Args:
        kind: ``"random_walk"``, or ``"mala"`` (a Langevin step of the log target's gradient).
        names: the latents to move (None: every continuous one that feeds no process).
        step_size: the standard deviation of a move.
        num_moves: moves after each resampling.
    """

    kind: Literal["random_walk", "mala"] = "random_walk"
    names: Sequence[str] | None = None
    step_size: float = 0.3
    num_moves: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("random_walk", "mala"):
            raise ValueError(f"kind must be 'random_walk' or 'mala', but got {self.kind!r}")
        if not self.step_size > 0 or self.num_moves < 1:
            raise ValueError("step_size and num_moves must be positive")

    def prepare(self, program: Program) -> None:
        feeding = set().union(*(program.sources[n].parents for n in program.processes))
        feeding |= _ancestors(program, feeding)
        able = {n: s for n, s in program.latents.items() if not s.discrete and n not in feeding}
        chosen = tuple(able) if self.names is None else tuple(self.names)
        for name in chosen:
            if name not in program.latents:
                raise ValueError(f"rejuvenation names {name!r}, which is no latent of the program")
            if name in feeding:
                raise ValueError(
                    f"latent {name!r} feeds the context of a process and cannot be rejuvenated: "
                    "its old value has shaped the path. Leave it out of names"
                )
            if name not in able:
                raise ValueError(f"latent {name!r} is discrete: only continuous ones can be moved")
        if not chosen:
            raise ValueError(
                "rejuvenation has nothing to move: every latent is discrete or feeds a process"
            )
        self._transforms = {n: biject_to(program.latents[n].support) for n in chosen}

    def move(
        self,
        evaluator: Evaluator,
        t: int,
        x: dict[str, Tensor],
        latents: dict[str, Tensor],
        cache: Tree,
        problems: Tensor | None,
        where: Tensor,
    ) -> tuple[dict[str, Tensor], Tree, Tensor]:
        """Moves the latents of the particles in ``where``.

        Returns:
            the latents, the cache (with log-twists of the new latents) and who accepted how often.
        """
        _check_target(cache)
        accepted = torch.zeros(len(where), dtype=torch.float64, device=where.device)

        def target(free: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tree]:
            values = {n: self._transforms[n](u) for n, u in free.items()}
            looked = evaluator.look(t, x, {**latents, **values}, cache["memory"], problems, cache)
            return looked["log_psi"] + self._log_jacobian(free, values), values, looked

        free = {n: f.inv(latents[n]) for n, f in self._transforms.items()}
        for _ in range(self.num_moves):
            before, _, _ = target(free)
            proposal, log_ratio = self._propose(free, target)
            after, values, looked = target(proposal)
            log_accept = after - before + log_ratio
            accept = where & (torch.rand_like(log_accept).log() < log_accept)
            accepted += accept.double() / self.num_moves
            free = {n: _where(accept, proposal[n], free[n]) for n in free}
            latents = {**latents, **{n: _where(accept, values[n], latents[n]) for n in values}}
            cache = _take(accept, looked, cache)
        return latents, cache, accepted

    def _propose(self, free: dict[str, Tensor], target: object) -> tuple[dict[str, Tensor], Tensor]:
        """New coordinates and log q(old | new) - log q(new | old)."""
        noise = {n: torch.randn_like(u) for n, u in free.items()}
        moved = {n: u + self.step_size * noise[n] for n, u in free.items()}
        first = next(iter(free.values()))
        return moved, torch.zeros(len(first), dtype=torch.float64, device=first.device)

    def _log_jacobian(self, free: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        for name, transform in self._transforms.items():
            log_det = transform.log_abs_det_jacobian(free[name], values[name])
            total = total + log_det.double().reshape(len(log_det), -1).sum(-1)
        assert isinstance(total, Tensor)
        return total


def _ancestors(program: Program, names: set[str]) -> set[str]:
    """The sources that some sources depend on, through any number of steps."""
    found = set(names)
    while True:
        more = set().union(*(program.sources[n].parents for n in found), found)
        if more == found:
            return found
        found = more


def _check_target(cache: Tree) -> None:
    """A move's target is p(z) psi_t(x_t, z): the weights must be made of nothing else."""
    if cache["memory"]:
        raise ValueError(
            "rejuvenation cannot change what the twist remembers of earlier steps, where the "
            "latents had other values: use a twist without memory, such as "
            "IntermediateReward('difference')"
        )
    if "prepaid" in cache:
        raise ValueError(
            "rejuvenation does not know what the proposal has paid before its draw (prepay): leave "
            "rejuvenation or that proposal out"
        )


def _where(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accept.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def _take(accept: Tensor, looked: Tree, cache: Tree) -> Tree:
    """The new look where a move was accepted; what it did not compute stays (it is still valid)."""
    taken = dict(cache)
    taken["log_psi"] = _where(accept, looked["log_psi"], cache["log_psi"])
    taken["memory"] = {
        n: _where(accept, v, cache["memory"][n]) for n, v in looked["memory"].items()
    }
    twist = {n: _where(accept, v, cache["twist"][n]) for n, v in looked["twist"].items()}
    taken["twist"] = {**cache["twist"], **twist}
    return taken


__all__ = ["Rejuvenation", "math"]
