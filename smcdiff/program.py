r"""Programs: ordinary Pyro callables, taken apart for inference.

Under inference a program runs with one flat *particle* axis on the left of all its plates. Every
process statement receives the particles' estimate of x_0, every ordinary latent its particles' values,
and what remains is the program's log-density as a function of both,

.. math:: \log \gamma(x_0, z) = \sum_{\text{observed}} \log p(y \mid x_0, z)
          + \sum_{\text{factors}} f(x_0, z) + \sum_{\text{latents}} \log p(z \mid x_0, z'),

one number per particle. :class:`Program` finds the processes, the latents and who depends on whom by
running the callable a few times on three particles, and refuses callables that mix particles.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from jaxtyping import Float64
from pyro.distributions import Distribution
from torch import Tensor

from smcdiff.execution import Execution, Interpreter, Site, Statement
from smcdiff.process import Process, is_deterministic

CHECKED = 3  # particles in the runs that take a program apart
State = Callable[[Statement], Tensor]


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
    """

    name: str
    process: Process | None
    event_dim: int
    discrete: bool
    parents: frozenset[str] = frozenset()
    support: Any = None
    particle_context: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Likelihood:
    """An observed site, a factor or a deterministic site, and the sources it depends on."""

    name: str
    kind: str
    gaussian: bool
    parents: frozenset[str] = frozenset()


@dataclass
class Program:
    """A Pyro callable and its arguments, taken apart.

    Args:
        model: any Pyro callable: a function or a ``PyroModule``.
        args, kwargs: its arguments.
        per_problem: names of arguments whose leading axis enumerates problems. A mapping gives the
            number of event dimensions of one entry where that cannot be seen from an observed site.

    Raises:
        ValueError: naming the site, if the callable mixes particles, subsamples its data, conditions a
            process, names two sites alike, or has processes of unequal ``num_steps``.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    per_problem: Sequence[str] | Mapping[str, int] = ()

    def __post_init__(self) -> None:
        self._bound = inspect.signature(_callable(self.model)).bind(*self.args, **self.kwargs)
        self._bound.apply_defaults()
        self.num_problems = self._count_problems()
        self._plates_to_insert: dict[str, int] = {}
        self.max_plate_nesting = 0
        prototype = self._prototype()
        self._check_observations(prototype)
        self.processes = {s.name: s.process for s in prototype.statements.values()}
        self.num_steps = self._common_steps()
        together = self._run_stand_ins(CHECKED)
        self._check_particles_apart(together)
        self.sources, self.likelihoods = self._find_dependencies(together)
        self._refuse_nested_processes()

    # ----------------------------------------------------------------- what the program consists of

    @property
    def latents(self) -> dict[str, Source]:
        """The ordinary latents, in the order of the program."""
        return {n: s for n, s in self.sources.items() if s.process is None}

    @property
    def downstream(self) -> frozenset[str]:
        """Latents whose law depends on a process."""
        return frozenset(n for n, s in self.latents.items() if s.parents & set(self.processes))

    @property
    def gaussian_sites(self) -> tuple[str, ...]:
        """Gaussian sites (observed, or downstream latents) whose mean follows a process."""
        return tuple(
            n for n, s in self.likelihoods.items() if s.gaussian and s.parents & set(self.processes)
        )

    @property
    def graph(self) -> Any:
        """A ``networkx.DiGraph`` of processes, latents, deterministic and observed sites."""
        from smcdiff.graph import dependency_graph

        return dependency_graph(self)

    # ------------------------------------------------------------------------------- running it

    def execute(
        self,
        state: State,
        latents: Mapping[str, Tensor],
        batch: int,
        problems: Tensor | None = None,
    ) -> Execution:
        """Runs the program once on ``batch`` particles.

        Args:
            state: called with each process :class:`Statement`; returns its x_0 with shape
                ``(batch, *plates, *event)``.
            latents: values by site, with shape ``(batch, *plates, *event)``; latents that are missing
                are sampled.
            batch: the number of particles.
            problems: the problem of each particle, with shape ``(batch,)``.
        """
        interpreter = Interpreter(state, latents, batch)
        plate = pyro.plate("smcdiff_particles", batch, dim=-1 - self.max_plate_nesting)
        args, kwargs = self._arguments(batch, problems)
        with interpreter, plate:
            interpreter.call(self.model, args, kwargs)
        return interpreter.execution(self.max_plate_nesting)

    def log_joint(
        self,
        x0: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
        problems: Tensor | None = None,
    ) -> Float64[Tensor, " particle"]:
        """The program's log-density at given x_0 and latents, per particle."""
        batch = next(iter(x0.values())).shape[0]
        return self.execute(lambda s: x0[s.name], latents, batch, problems).log_joint()

    def _arguments(
        self, batch: int | None, problems: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.num_problems is None:
            return self._bound.args, self._bound.kwargs
        bound = inspect.BoundArguments(self._bound.signature, self._bound.arguments.copy())
        for name in self.per_problem:
            value = self._bound.arguments[name]
            if batch is None:
                bound.arguments[name] = value[0]
                continue
            rows = value[torch.zeros(batch, dtype=torch.long) if problems is None else problems]
            ones = (1,) * self._plates_to_insert.get(name, 0)
            bound.arguments[name] = rows.reshape(batch, *ones, *value.shape[1:])
        return bound.args, bound.kwargs

    def _count_problems(self) -> int | None:
        counts = {}
        for name in self.per_problem:
            value = self._bound.arguments.get(name)
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise ValueError(
                    f"per_problem names {name!r}, which must be an argument holding a tensor with one "
                    f"row per problem, but it is {type(value).__name__}"
                )
            counts[name] = value.shape[0]
        if len(set(counts.values())) > 1:
            raise ValueError(f"the arguments declared per problem disagree in their rows: {counts}")
        return next(iter(counts.values())) if counts else None

    # ------------------------------------------------------------------------------ taking it apart

    def _prototype(self) -> Execution:
        """One run without a particle axis, to learn the plates; with one if it needs a batch."""
        try:
            interpreter = Interpreter(_stand_in, {}, None)
            args, kwargs = self._arguments(None, None)
            with interpreter, pyro.validation_enabled(True):
                interpreter.call(self.model, args, kwargs)
            execution = interpreter.execution(0)
        except ValueError as error:
            try:
                execution = self.execute(_stand_in, {}, CHECKED)
            except ValueError:
                raise error from None
        dims = [-f.dim for frames in execution.frames() for f in frames if f.name[:8] != "smcdiff_"]
        self.max_plate_nesting = max(dims, default=0)
        self._find_problem_axes(execution)
        if not execution.statements:
            raise ValueError(
                "the program has no process: declare one, as in x = prior('x'), or use Pyro's own "
                "inference"
            )
        return execution

    def _find_problem_axes(self, prototype: Execution) -> None:
        for name in self.per_problem:
            value = self._bound.arguments[name]
            event_dim = value.dim() - 1
            if isinstance(self.per_problem, Mapping):
                event_dim = self.per_problem[name]
            else:
                for site in prototype.sites.values():
                    same = isinstance(site.value, Tensor) and site.observed
                    if same and site.value.data_ptr() == value.data_ptr():
                        event_dim = site.event_dim
            self._plates_to_insert[name] = self.max_plate_nesting - (value.dim() - 1 - event_dim)

    def _common_steps(self) -> int:
        steps = {name: process.num_steps for name, process in self.processes.items()}
        if len(set(steps.values())) > 1:
            raise ValueError(
                f"processes of one program advance in lockstep and need equal num_steps, but got "
                f"{steps}: build them on grids of the same length"
            )
        return next(iter(steps.values()))

    def _run_stand_ins(self, batch: int) -> Execution:
        with torch.no_grad():
            return self.execute(_stand_in, {}, batch)

    def _rerun(self, base: Execution, values: Mapping[str, Tensor], batch: int) -> Execution:
        with torch.no_grad():
            return self.execute(lambda s: values[s.name], values, batch)

    @staticmethod
    def _check_observations(prototype: Execution) -> None:
        for site in prototype.sites.values():
            shape = tuple(getattr(site.fn, "event_shape", ()))
            if site.observed and site.event_dim and isinstance(site.value, Tensor):
                if tuple(site.value.shape[-site.event_dim :]) != shape:
                    raise ValueError(
                        f"site {site.name!r}: the law has event shape {shape}, but the observation has "
                        f"shape {tuple(site.value.shape)}: give one event of shape {shape} (per plate)"
                    )

    def _check_particles_apart(self, together: Execution) -> None:
        """Three particles run jointly and alone must agree, site by site."""
        values = together.values()
        for i in range(CHECKED):
            alone = self._rerun(together, {n: v[i : i + 1] for n, v in values.items()}, 1)
            for name in together.sites:
                if name not in alone.sites:
                    raise ValueError(f"site {name!r} appears for some particles only")
                joint, single = together.log_prob(name)[i], alone.log_prob(name)[0]
                if not torch.isclose(joint, single, rtol=1e-3, atol=1e-3, equal_nan=True):
                    raise ValueError(
                        f"site {name!r} mixes particles: its log-probability is {joint:.6g} when "
                        f"{CHECKED} particles run together and {single:.6g} alone. Reduce over event "
                        "dimensions only (as in x.mean(-1)), and declare data of several problems with "
                        "per_problem"
                    )

    def _find_dependencies(
        self, base: Execution
    ) -> tuple[dict[str, Source], dict[str, Likelihood]]:
        """Who depends on whom: shift one source's particles by one and see what changes."""
        values = base.values()
        parents: dict[str, set[str]] = {n: set() for n in [*base.statements, *base.sites]}
        for source in values:
            moved = {**values, source: values[source].roll(1, 0)}
            if torch.equal(moved[source], values[source]):
                moved[source] = _other_value(values[source])
            shifted = self._rerun(base, moved, CHECKED)
            for name in shifted.changed(base, source):
                parents[name].add(source)
        sources: dict[str, Source] = {}
        for name, statement in base.statements.items():
            context = base.particle_context(name, self._rerun(base, _first(values), 1))
            dim = len(statement.process.event_shape)
            discrete = not values[name].is_floating_point()
            sources[name] = Source(
                name, statement.process, dim, discrete, frozenset(parents[name]), None, context
            )
        likelihoods: dict[str, Likelihood] = {}
        for name, site in base.sites.items():
            found = frozenset(parents[name]) - {name}
            if site.latent:
                sources[name] = Source(
                    name, None, site.event_dim, site.discrete, found, site.fn.support
                )
            likelihoods[name] = Likelihood(name, site.kind, site.gaussian, found)
        return sources, likelihoods

    def _refuse_nested_processes(self) -> None:
        for name in self.processes:
            nested = self.sources[name].parents & set(self.processes)
            if nested:
                raise ValueError(
                    f"the context of process {name!r} depends on process {sorted(nested)[0]!r}: compose "
                    "them into one Chain(first, second), which advances both in turn"
                )


def _callable(model: Callable[..., Any]) -> Callable[..., Any]:
    return model.forward if isinstance(model, torch.nn.Module) else model


def _first(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v[:1] for n, v in values.items()}


def _other_value(value: Tensor) -> Tensor:
    """Another value of a source whose particles coincide (a small discrete support, say)."""
    return value + 1e-2 if value.is_floating_point() else 1 - value.clamp(0, 1)


def _stand_in(statement: Statement) -> Tensor:
    """A plausible x_0: one network call at x_T and a draw from what it says about the data."""
    process, context = statement.process, statement.context
    x = draw(process.initial(**context), statement.batch)
    if tuple(x.shape[len(statement.batch) :]) != tuple(process.shape_at(process.num_steps)):
        raise ValueError(
            f"process {statement.name!r} starts with shape {tuple(x.shape)}, which does not end in its "
            f"event shape {tuple(process.shape_at(process.num_steps))}"
        )
    return process.kernel(x, process.num_steps, **context).denoised.sample()


def draw(law: Distribution, batch: tuple[int, ...]) -> Tensor:
    """One draw per particle and plate, of a law whose batch shape may be smaller."""
    if is_deterministic(law):
        shape = (*batch, *law.event_shape)
        return law.v.expand(shape)  # type: ignore[attr-defined, no-any-return]
    return law.expand(batch).sample()  # type: ignore[attr-defined, no-any-return]


__all__ = ["Execution", "Likelihood", "Program", "Site", "Source", "Statement", "draw", "replace"]
