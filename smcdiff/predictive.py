"""Particles and their program: what it would observe, what it did, and how to read its samples."""

import copy
import inspect
import math
from typing import Any

import torch
from jaxtyping import Int64
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .execution import Execution
from .particles import Particles, map_tree
from .program import Program

Samples = dict[str, Tensor]


class Unobserved(Messenger):
    """Samples what is observed; factors and deterministic sites keep their values.

    (Pyro's ``uncondition`` redraws deterministic sites too, once per particle of a plate.)
    """

    def _pyro_sample(self, msg: Any) -> None:
        fixed = msg["infer"].get("_deterministic") or isinstance(msg["fn"], Unit)
        if msg["is_observed"] and not fixed:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def predict(program: Program, particles: Particles, overrides: dict[str, Any]) -> Samples:
    """Draws of the observed sites and values of the deterministic ones, given the particles.

    Factors are ignored: a program that runs forwards has nothing to score.

    Args:
        overrides: arguments of the program to replace, by name.

    Returns:
        Tensors by site, with shape ``(*axes, *plates, *event)``.

    Raises:
        ValueError: the program has no argument of such a name.
    """
    forward = with_arguments(program, overrides)
    forward.model = Unobserved()(program.model)
    batch = particles.log_weights.numel()
    execution = _execute(forward, particles, torch.arange(batch))
    draws = {}
    for name, each in program.likelihoods.items():
        if each.kind in ("observed", "deterministic") and name in execution.sites:
            value = torch.as_tensor(execution.sites[name].value)
            if each.kind == "deterministic" and not each.parents:
                value = value.expand(batch, *value.shape)
            draws[name] = value.reshape(*particles.axes, *value.shape[1:])
    return draws


def observations(program: Program, particles: Particles) -> Samples:
    """The values of the observed sites, with shape ``(*problems, *plates, *event)``."""
    problems, (runs, size) = particles.axes[:-2], particles.axes[-2:]
    first = torch.arange(math.prod(problems)) * (runs * size)
    alone = _observed(_execute(program, particles, first[:1]))
    if not problems:
        return alone
    # One particle more, so that what belongs to a problem cannot have the shape that it has alone.
    rows = torch.cat([first, first[:1]])
    together = _observed(_execute(program, particles, rows))
    return {
        name: value[:-1]
        if value.shape != alone[name].shape
        else value.expand(*problems, *value.shape)
        for name, value in together.items()
    }


def _execute(program: Program, particles: Particles, rows: Int64[Tensor, " row"]) -> Execution:
    """The program on some of the particles, counted through all axes."""
    lead, per_problem = len(particles.axes), particles.axes[-2] * particles.axes[-1]
    rows = rows.to(particles.log_weights.device)

    def pick(leaf: Tensor) -> Tensor:
        return leaf.flatten(0, lead - 1)[rows]

    x0, latents = map_tree(pick, particles.x), map_tree(pick, particles.latents)
    problems = None if program.num_problems is None else rows // per_problem
    with torch.no_grad():
        return program.execute(lambda s: x0[s.name], latents, len(rows), problems)


def _observed(execution: Execution) -> Samples:
    sites = execution.sites.items()
    return {name: torch.as_tensor(s.value) for name, s in sites if s.kind == "observed"}


def with_arguments(program: Program, overrides: dict[str, Any]) -> Program:
    """A copy that shares everything but some arguments with the program."""
    known = program._bound.arguments
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(
            f"the program has no argument {unknown[0]!r} to replace; it has "
            f"{', '.join(known) or 'none'}"
        )
    forward = copy.copy(program)
    forward._bound = inspect.BoundArguments(program._bound.signature, known | overrides)
    return forward


def members(program: Program, particles: Particles) -> dict[str, Samples]:
    """The members' x_0 of every process that stands for several (a Team)."""
    return {
        name: process.split(name, particles.x[name])
        for name, process in program.processes.items()
        if process.members(name) != (name,)
    }


def event_dims(program: Program) -> dict[str, int]:
    """How many dimensions one event has, by process member and latent."""
    dims = {name: latent.event_dim for name, latent in program.latents.items()}
    for name, process in program.processes.items():
        dims |= {each: process.member_dim(name, each) for each in process.members(name)}
    return dims
