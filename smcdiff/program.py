r"""Programs: ordinary Pyro callables, taken apart for inference.

Under inference a program runs with one flat *particle* axis on the left of all its plates. Every
process statement receives the particles' estimate of x_0, every ordinary latent its particles'
values, and what remains is the program's log-density as a function of both,

.. math:: \log \gamma(x_0, z) = \sum_{\text{observed}} \log p(y \mid x_0, z)
          + \sum_{\text{factors}} f(x_0, z) + \sum_{\text{latents}} \log p(z \mid x_0, z'),

one number per particle. :class:`Program` finds the processes, the latents and who depends on whom
by running the callable a few times on three particles, and refuses callables that mix particles.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from jaxtyping import Float64
from torch import Tensor

from .arguments import check_kind, check_names
from .dissection import (
    CHECKED,
    Source,
    check_networks_apart,
    check_observations,
    check_particles_apart,
    check_scales,
    find_dependencies,
    stand_in,
)
from .execution import Execution, Interpreter, Statement
from .process import Process

State = Callable[[Statement], Tensor]


@dataclass
class Program:
    """A Pyro callable and its arguments, taken apart.

    Args:
        model: any Pyro callable: a function or a ``PyroModule``.
        args, kwargs: its arguments.
        per_problem: names of arguments whose leading axis enumerates problems. A mapping gives the
            number of event dimensions of one entry where that cannot be seen from an observed site.
        least_nesting: room for so many plates at least, as another program with the same particles
            has them.

    Raises:
        ValueError: naming the site, if the callable mixes particles, subsamples its data,
            conditions a process, scales what is drawn, names two sites alike, or has processes of
            unequal ``num_steps``.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    per_problem: Sequence[str] | Mapping[str, int] = ()
    least_nesting: int = 0

    def __post_init__(self) -> None:
        check_model("model", self.model)
        check_kind("args", self.args, tuple, "(y,)")
        check_names("per_problem", self.per_problem)
        signature = inspect.signature(_callable(self.model))
        try:
            self._bound = signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise TypeError(f"{error}: what run() is given goes to the model{signature}") from None
        self._bound.apply_defaults()
        self.num_problems = self._count_problems()
        self._plates_to_insert: dict[str, int] = {}
        self.max_plate_nesting, self._apart = 0, False
        prototype = self._prototype()
        check_observations(prototype)
        check_scales(prototype)
        self.processes = {s.name: s.process for s in prototype.statements.values()}
        self.num_steps = self._common_steps()
        with torch.no_grad():
            together = self.execute(stand_in, {}, CHECKED)
            self.device = next(iter(together.states.values())).device
            check_particles_apart(self.rerun, together)
            check_networks_apart(together)
            self.sources, self.likelihoods = find_dependencies(self.rerun, together)
        self._refuse_nested_processes()
        self._apart = True

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
        from .graph import dependency_graph

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
            latents: values by site, with shape ``(batch, *plates, *event)``; latents that are
                missing are sampled.
            batch: the number of particles.
            problems: the problem of each particle, with shape ``(batch,)``.
        """
        interpreter = Interpreter(state, latents, batch)
        plate = pyro.plate("smcdiff_particles", batch, dim=-1 - self.max_plate_nesting)
        args, kwargs = self._arguments(batch, problems)
        # Once it is apart, Pyro's checks give way to ours: NaN is blamed on its site and step.
        with pyro.validation_enabled(not self._apart), interpreter, plate:
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

    def rerun(self, values: Mapping[str, Tensor]) -> Execution:
        """A run with all sources given."""
        batch = next(iter(values.values())).shape[0]
        return self.execute(lambda s: values[s.name], values, batch)

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
                    f"per_problem names {name!r}, which must be an argument holding a tensor with "
                    f"one row per problem, but it is {type(value).__name__}"
                )
            counts[name] = value.shape[0]
        if len(set(counts.values())) > 1:
            raise ValueError(f"the arguments declared per problem disagree in their rows: {counts}")
        return next(iter(counts.values())) if counts else None

    # ------------------------------------------------------------------------------ taking it apart

    def _prototype(self) -> Execution:
        """One run without a particle axis, to learn the plates; with one if it needs a batch."""
        try:
            interpreter = Interpreter(stand_in, {}, None)
            args, kwargs = self._arguments(None, None)
            with torch.no_grad(), interpreter, pyro.validation_enabled(True):
                interpreter.call(self.model, args, kwargs)
            execution = interpreter.execution(0)
        except ValueError as error:
            try:
                with torch.no_grad():
                    execution = self.execute(stand_in, {}, CHECKED)
            except ValueError:
                raise error from None
        dims = [-f.dim for frames in execution.frames() for f in frames if f.name[:8] != "smcdiff_"]
        self.max_plate_nesting = max([self.least_nesting, *dims])
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
                "processes of one program advance in lockstep and need equal num_steps, but got "
                f"{steps}: build them on grids of the same length"
            )
        return next(iter(steps.values()))

    def _refuse_nested_processes(self) -> None:
        for name in self.processes:
            nested = self.sources[name].parents & set(self.processes)
            if nested:
                raise ValueError(
                    f"the context of process {name!r} depends on process {sorted(nested)[0]!r}: "
                    "compose them into one Chain(first, second), which advances both in turn"
                )


def check_model(name: str, model: object) -> None:
    """Refuses what is no program: a process, a class, or what a program returned."""
    if isinstance(model, Process | type) or not callable(model):
        kind = model if isinstance(model, type) else type(model)
        got = f"the class {kind.__name__}" if model is kind else f"a {kind.__name__}"
        raise ValueError(
            f"{name} must be a function (or a PyroModule) that declares processes, as in "
            f"lambda: prior('x'), but got {got}"
        )


def _callable(model: Callable[..., Any]) -> Callable[..., Any]:
    return model.forward if isinstance(model, torch.nn.Module) else model
