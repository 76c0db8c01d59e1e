"""Taking programs apart: who depends on whom, found by running them on three particles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from .execution import Execution, Site, Statement
from .particles import flatten_tree
from .process import Process, Tree, check_finite, is_deterministic

CHECKED = 3  # particles in the runs that take a program apart
Rerun = Callable[[Mapping[str, Tensor]], Execution]


@dataclass(frozen=True)
class Source:
    """A random variable of the program: a process or an ordinary latent.

    Attributes:
        process: the process, or None for an ordinary latent.
        event_dim: dimensions of one event.
        discrete: whether its values are discrete.
        parents: the sources that its law (or context) depends on, given all other sources.
        support: the constraint that an ordinary latent's values satisfy.
        particle_context: the context entries that vary by particle (processes only).
        shared_context: the context entries that all particles share, and their values.
    """

    name: str
    process: Process | None
    event_dim: int
    discrete: bool
    parents: frozenset[str] = frozenset()
    support: Any = None
    particle_context: frozenset[str] = frozenset()
    shared_context: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Likelihood:
    """A sample or deterministic statement, and the sources that its log-probability depends on."""

    name: str
    kind: str
    gaussian: bool
    parents: frozenset[str] = frozenset()


def check_observations(prototype: Execution) -> None:
    """Observed values must fit their laws in shape, lie where the states lie, and be numbers."""
    devices = {x.device for x in prototype.states.values()}
    for site in prototype.sites.values():
        if site.kind != "observed":
            continue
        if not isinstance(site.value, Tensor):
            raise ValueError(
                f"site {site.name!r}: the observation must be a tensor, but it is a "
                f"{type(site.value).__name__}: convert it with torch.as_tensor(...).float()"
            )
        _check_shape(site, site.value)
        if site.value.dim() and site.value.device not in devices:
            raise ValueError(
                f"site {site.name!r}: the observation lies on device {str(site.value.device)!r}, "
                f"but the processes on {sorted(map(str, devices))}: move it with .to(device)"
            )
        bad = int((~site.value.isfinite()).sum())
        if bad:
            raise ValueError(
                f"site {site.name!r}: {bad} of {site.value.numel()} observed values are NaN or "
                "infinite: leave them out, as in x[..., seen]"
            )


def check_scales(prototype: Execution) -> None:
    """What is drawn counts as it is: no draw has a density to a power."""
    scales = {name: statement.scale for name, statement in prototype.statements.items()}
    scales |= {name: site.scale for name, site in prototype.sites.items() if site.latent}
    for name, scale in scales.items():
        if bool((torch.as_tensor(scale) != 1).any()):
            raise ValueError(
                f"site {name!r} is scaled by poutine.scale, but it is drawn, and its draws know of "
                "no scale: scale what is observed, and give a law a power by a factor, such as "
                "pyro.factor('power', (scale - 1) * law.log_prob(z))"
            )


def _check_shape(site: Site, value: Tensor) -> None:
    batch, event = tuple(site.fn.batch_shape), tuple(site.fn.event_shape)
    cut = value.dim() - len(event)
    try:
        fits = cut >= 0 and tuple(value.shape[cut:]) == event
        fits = fits and tuple(torch.broadcast_shapes(value.shape[:cut], batch)) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"site {site.name!r}: the law has event shape {event}, but the observation has shape "
            f"{tuple(value.shape)}: give one event of shape {event} (per plate), and several "
            "problems at once through the names of their arguments, as in SMC(..., "
            f"per_problem=({site.name!r},))"
        )


def check_particles_apart(rerun: Rerun, together: Execution) -> None:
    """Three particles run jointly and alone must agree, statement by statement."""
    values = together.values()
    for i in range(CHECKED):
        alone = rerun({n: v[i : i + 1] for n, v in values.items()})
        for name, statement in together.statements.items():
            _check_context_apart(statement, alone.context(name), i)
        for name in together.sites:
            if name not in alone.sites:
                raise ValueError(f"site {name!r} appears for some particles only")
            joint, single = together.log_prob(name)[i], alone.log_prob(name)[0]
            if not torch.isclose(joint, single, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"site {name!r} mixes particles: its log-probability is {joint:.6g} when "
                    f"{CHECKED} particles run together and {single:.6g} alone. Index and reduce "
                    "from the right, over event dimensions only (as in x[..., 0] or x.mean(-1)), "
                    "and declare data of several problems with per_problem"
                )


def _check_context_apart(statement: Statement, alone: Mapping[str, Any], i: int) -> None:
    """What a process is given for particle i must be the same when that one is alone."""
    for key, joint in statement.context.items():
        rows = isinstance(joint, Tensor) and joint.shape != alone[key].shape
        if not _alike(joint[i : i + 1] if rows else joint, alone[key]):
            raise ValueError(
                f"process {statement.name!r}: its context {key!r} mixes particles, or is random: "
                f"it is another one when {CHECKED} particles run together than alone. Give a "
                "tensor with one row per particle: no mean over them, no .item(), no dict of them"
            )


def _alike(one: Any, other: Any) -> bool:
    """Whether two contexts are the same, up to rounding."""
    (leaves, form), (others, other_form) = flatten_tree(one), flatten_tree(other)
    return form == other_form and all(
        leaf.shape == others[key].shape
        and torch.allclose(leaf.double(), others[key].double(), 1e-3, 1e-6, equal_nan=True)
        for key, leaf in leaves.items()
    )


def check_networks_apart(together: Execution) -> None:
    """What a network says of one particle must not change when the others are at other states."""
    for name, statement in together.statements.items():
        process, context, t = statement.process, statement.context, statement.process.num_steps
        x = draw(process.initial(**context), statement.batch)
        moved = torch.cat([x[:1], _other_value(x[1:], 1.0)])
        before, after = (_first_row(process.evaluate(v, t, **context)) for v in (x, moved))
        for key, row in before.items():
            scale = float(torch.nan_to_num(row, neginf=0.0).abs().max())
            if not torch.isclose(row, after[key], rtol=1e-3, atol=1e-3 * scale).all():
                raise ValueError(
                    f"process {name!r}: its network mixes particles, or is random: the output for "
                    "one of them changed when the others did. Batch normalisation and dropout do "
                    "so in training mode (train=True); reduce over event dimensions only"
                )


def _first_row(tree: Tree) -> dict[str, Tensor]:
    leaves, _ = flatten_tree(tree)
    return {key: leaf[0].float() for key, leaf in leaves.items()}


def find_dependencies(
    rerun: Rerun, base: Execution
) -> tuple[dict[str, Source], dict[str, Likelihood]]:
    """Who depends on whom: shift one source's particles by one and see what changes."""
    values = base.values()
    parents: dict[str, set[str]] = {n: set() for n in [*base.statements, *base.sites]}
    for source, value in values.items():
        moved = value.roll(1, 0)
        if torch.equal(moved, value):
            moved = _other_value(value)
        for name in rerun({**values, source: moved}).changed(base, source):
            parents[name].add(source)
    single = rerun({n: v[:1] for n, v in values.items()})
    sources: dict[str, Source] = {}
    for name, statement in base.statements.items():
        moving = base.particle_context(name, single)
        sources[name] = Source(
            name,
            statement.process,
            event_dim=len(statement.process.event_shape),
            discrete=not values[name].is_floating_point(),
            parents=frozenset(parents[name]),
            particle_context=moving,
            shared_context={k: v for k, v in statement.context.items() if k not in moving},
        )
    likelihoods: dict[str, Likelihood] = {}
    for name, site in base.sites.items():
        found = frozenset(parents[name]) - {name}
        if site.latent and not site.deterministic:
            support = site.fn.support
            sources[name] = Source(name, None, site.event_dim, site.discrete, found, support)
        likelihoods[name] = Likelihood(name, site.kind, site.gaussian, found)
    return sources, likelihoods


def stand_in(statement: Statement) -> Tensor:
    """A plausible x_0: one network call at x_T and a draw from what it says about the data."""
    process, context, last = statement.process, statement.context, statement.process.num_steps
    x = draw(process.initial(**context), statement.batch)
    shape = tuple(process.shape_at(last))
    if tuple(x.shape[len(statement.batch) :]) != shape:
        raise ValueError(
            f"process {statement.name!r} starts with shape {tuple(x.shape)}, which does not end in "
            f"its event shape {shape}"
        )
    evaluation = process.evaluate(x, last, **context)
    check_finite(statement.name, last, evaluation)
    return process.kernel(x, last, evaluation, **context).denoised.sample()


def draw(law: Distribution, batch: tuple[int, ...]) -> Tensor:
    """One draw per particle and plate, of a law whose batch shape may be smaller."""
    if is_deterministic(law):
        point: Tensor = law.mean
        return point.expand(*batch, *law.event_shape)
    return law.expand(batch).sample()


def placeholder(statement: Statement, x: Tensor) -> Tensor:
    """Something with the shape and kind of x_0, for runs in which nothing looks at its value."""
    shape = (*statement.batch, *statement.process.event_shape)
    return x if x.is_floating_point() and x.shape == shape else x.new_zeros(shape)


def _other_value(value: Tensor, by: float = 1e-2) -> Tensor:
    """Another value of a source whose particles coincide (a small discrete support, say)."""
    return value + by if value.is_floating_point() else 1 - value.clamp(0, 1)
