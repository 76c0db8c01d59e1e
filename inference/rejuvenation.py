r"""Moves of ordinary latents that leave the current target invariant.

Particles that share ancestors share latents. A Metropolis-Hastings move of a latent z at fixed x_t,
with target :math:`p(z)\,\psi_t(x_t, z)`, makes them differ again and changes no weight. It is valid
only if no process context depends on z: otherwise z has shaped the path that led to x_t, and the
target would be the law of that whole path.

All runs move at the same, fixed steps. Moving only the runs that were just resampled would let the
particles decide whether they move, and bias the evidence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import biject_to

from smcdiff.arguments import check_names, check_number, check_option, check_whole
from smcdiff.process import Tree
from smcdiff.program import Program

from .evaluation import Evaluator, choose


@dataclass
class Rejuvenation:
    """Metropolis-Hastings moves on continuous latents, in unconstrained coordinates.

    Args:
        kind: ``"random_walk"``, or ``"mala"`` (a Langevin step of the log target's gradient).
        names: the latents to move (None: every continuous one that feeds no process).
        step_size: the standard deviation of a move.
        num_moves: moves at a time.
        every: the steps from one time to the next.
    """

    kind: Literal["random_walk", "mala"] = "random_walk"
    names: Sequence[str] | None = None
    step_size: float = 0.3
    num_moves: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        check_option("kind", self.kind, ("random_walk", "mala"))
        if self.names is not None:
            check_names("names", self.names)
        check_number("step_size", self.step_size, 0, math.inf, "()")
        check_whole("num_moves", self.num_moves)
        check_whole("every", self.every)

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
    ) -> tuple[dict[str, Tensor], Tree, Tensor]:
        """Moves the latents of all particles.

        Returns:
            the latents, the cache (with log-twists of the new latents) and who accepted how often.
        """
        _check_target(cache)
        around = Surroundings(evaluator, t, x, latents, cache, problems)
        accepted = torch.zeros_like(cache["log_psi"])
        free = {n: f.inv(latents[n]) for n, f in self._transforms.items()}
        for _ in range(self.num_moves):
            before = cache["log_psi"] + self._log_jacobian(free)
            proposal, log_ratio = self._propose(free, around)
            values = {n: self._transforms[n](u) for n, u in proposal.items()}
            looked = around.look(values)
            log_accept = looked["log_psi"] + self._log_jacobian(proposal) - before + log_ratio
            accept = torch.rand_like(log_accept).log() < log_accept
            accepted += accept.double() / self.num_moves
            free = choose(accept, proposal, free)
            latents = {**latents, **choose(accept, values, latents)}
            cache = _take(accept, looked, cache)
        return latents, cache, accepted

    def _propose(
        self, free: dict[str, Tensor], around: "Surroundings"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """New coordinates u' and log q(u | u') - log q(u' | u)."""
        step, white = self.step_size, {n: torch.randn_like(u) for n, u in free.items()}
        if self.kind == "random_walk":
            return {n: u + step * white[n] for n, u in free.items()}, _total(white) * 0.0
        drift = self._drift(free, around)
        moved = {n: u + drift[n] + step * white[n] for n, u in free.items()}
        back = self._drift(moved, around)
        returned = {n: (free[n] - moved[n] - back[n]) / step for n in free}
        squares = {n: white[n].square() - returned[n].square() for n in free}
        return moved, 0.5 * _total(squares)

    def _drift(self, free: dict[str, Tensor], around: "Surroundings") -> dict[str, Tensor]:
        """Half a squared step along the gradient of the log target."""
        with torch.enable_grad():
            tracked = {n: u.detach().requires_grad_() for n, u in free.items()}
            values = {n: self._transforms[n](u) for n, u in tracked.items()}
            target = around.log_psi(values) + self._log_jacobian(tracked)
            gradients = torch.autograd.grad(target.sum(), list(tracked.values()))
        half = 0.5 * self.step_size**2
        return {n: half * g for n, g in zip(tracked, gradients, strict=True)}

    def _log_jacobian(self, free: dict[str, Tensor]) -> Tensor:
        """log |dz / du| of the map to unconstrained coordinates."""
        return _total(
            {
                n: self._transforms[n].log_abs_det_jacobian(u, self._transforms[n](u))
                for n, u in free.items()
            }
        )


@dataclass
class Surroundings:
    """Everything that stays while latents move."""

    evaluator: Evaluator
    t: int
    x: dict[str, Tensor]
    latents: dict[str, Tensor]
    cache: Tree
    problems: Tensor | None

    def look(self, values: dict[str, Tensor]) -> Tree:
        """The particles with other values of some latents."""
        latents, memory = {**self.latents, **values}, self.cache["memory"]
        return self.evaluator.look(self.t, self.x, latents, memory, self.problems, self.cache)

    def log_psi(self, values: dict[str, Tensor]) -> Tensor:
        """Their log-twist, differentiable in the values."""
        latents, memory = {**self.latents, **values}, self.cache["memory"]
        return self.evaluator.log_psi(self.t, self.x, latents, memory, self.problems, self.cache)


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


def _total(parts: dict[str, Tensor]) -> Tensor:
    """The sum over all elements of all latents, per particle, in float64."""
    rows = [v.double().reshape(len(v), -1).sum(-1) for v in parts.values()]
    return torch.stack(rows).sum(0)


def _take(accept: Tensor, looked: Tree, cache: Tree) -> Tree:
    """The new look where a move was accepted; what it did not compute stays (it is still valid)."""
    taken = dict(cache)
    for name in ("log_psi", "memory", "proposal"):
        taken[name] = choose(accept, looked[name], cache[name])
    taken["twist"] = {**cache["twist"], **choose(accept, looked["twist"], cache["twist"])}
    return taken
