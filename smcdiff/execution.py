"""Runs of a program: the handler that replaces its random variables, and what it records."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float64
from pyro.distributions.util import scale_and_mask
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints

from .process import Process

Frames = tuple[Any, ...]


@dataclass(frozen=True)
class Statement:
    """One process statement: ``process(name, **context)``.

    Attributes:
        batch: the batch shape of its state, ``(particle, *plates)``.
        scale: that of ``poutine.scale``.
    """

    name: str
    process: Process
    context: dict[str, Any]
    frames: Frames
    batch: tuple[int, ...]
    scale: Any


@dataclass(frozen=True)
class Site:
    """One sample statement, as Pyro saw it."""

    name: str
    fn: Any
    value: Any
    observed: bool
    scale: Any
    mask: Any
    frames: Frames
    deterministic: bool

    @property
    def latent(self) -> bool:
        return not self.observed

    @property
    def kind(self) -> str:
        if self.deterministic:
            return "deterministic"
        if self.latent:
            return "latent"
        return "factor" if isinstance(_base(self.fn), dist.Unit) else "observed"

    @property
    def event_dim(self) -> int:
        return int(getattr(self.fn, "event_dim", 0))

    @property
    def discrete(self) -> bool:
        return not torch.as_tensor(self.value).is_floating_point()

    @property
    def gaussian(self) -> bool:
        """Whether a linearised covariance can be added to this site's own."""
        plain = self.mask is None and isinstance(self.scale, float) and self.scale == 1.0
        laws = (torch.distributions.Normal, torch.distributions.MultivariateNormal)
        return plain and not self.deterministic and isinstance(_base(self.fn), laws)


class Refused(ValueError):
    """What the interpreter itself refuses, with the site's name: needs no further explanation."""


class Interpreter(Messenger):
    """Gives every process and latent a value and records all other statements.

    It is the outermost handler, so that it sees the plates around a statement.
    """

    def __init__(
        self,
        state: Callable[[Statement], Tensor],
        latents: Mapping[str, Tensor],
        batch: int | None,
    ) -> None:
        super().__init__()
        self.state, self.latents, self.batch = state, latents, batch
        self.statements: dict[str, Statement] = {}
        self.states: dict[str, Tensor] = {}
        self.sites: dict[str, Site] = {}
        self.last = "the start"

    def call(self, model: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Runs the model; errors name the last site that was reached."""
        try:
            model(*args, **kwargs)
        except (Refused, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            what = str(error).partition(":\ntensor(")[0]  # without a page of numbers
            shape = (
                "without a particle axis" if self.batch is None else f"on {self.batch} particles"
            )
            raise ValueError(
                f"the program failed at or after site {self.last!r} when run {shape}: {what}. "
                f"{_advice(error)}"
            ) from error

    def execution(self, max_plate_nesting: int) -> "Execution":
        return Execution(
            self.statements, self.states, self.sites, self.batch or 1, max_plate_nesting
        )

    def _pyro_process(self, msg: Any) -> None:
        process, name, context = msg["args"]
        if name in self.statements:
            raise Refused(f"two processes are called {name!r}: give each its own name")
        _refuse_conditions(process, name)
        _refuse_subsampling(name, msg["cond_indep_stack"])
        frames, scale = msg["cond_indep_stack"], msg["scale"]
        statement = Statement(name, process, context, frames, _batch_shape(frames), scale)
        self.last = name
        self.statements[name] = statement
        msg["value"] = self.states[name] = self._ask(statement)
        msg["done"] = True

    def _ask(self, statement: Statement) -> Tensor:
        """The state of a process; what goes wrong in its network carries its name."""
        try:
            return self.state(statement)
        except (Refused, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            named = f"process {statement.name!r}"
            what = "; ".join([str(error), *getattr(error, "__notes__", ())])
            raise Refused(what if what.startswith(named) else f"{named}: {what}") from error

    def _pyro_sample(self, msg: Any) -> None:
        self.last = msg["name"]
        if not msg["is_observed"] and msg["name"] in self.latents:
            msg["value"], msg["done"] = self.latents[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        name, frames = msg["name"], msg["cond_indep_stack"]
        if name in self.sites or name in self.statements:
            if not msg["infer"].get("_deterministic"):
                raise Refused(f"two sites are called {name!r}: give each its own name")
        _refuse_subsampling(name, frames)
        observed, scale, mask = msg["is_observed"], msg["scale"], msg["mask"]
        deterministic = bool(msg["infer"].get("_deterministic"))
        self.sites[name] = Site(
            name, msg["fn"], msg["value"], observed, scale, mask, frames, deterministic
        )


@dataclass(frozen=True)
class Execution:
    """One run of a program on ``batch`` particles."""

    statements: dict[str, Statement]
    states: dict[str, Tensor]
    sites: dict[str, Site]
    batch: int
    max_plate_nesting: int

    def frames(self) -> list[Frames]:
        statements = [s.frames for s in self.statements.values()]
        return statements + [s.frames for s in self.sites.values()]

    def values(self) -> dict[str, Tensor]:
        """The values of all processes and ordinary latents."""
        return {**self.states, **{n: s.value for n, s in self.sites.items() if s.latent}}

    def log_prob(self, name: str, impossible: float = -torch.inf) -> Float64[Tensor, " particle"]:
        """The log-probability of one site, summed over its plates and event.

        Args:
            impossible: what to count for an element whose log-probability is -inf.
        """
        site = self.sites[name]
        log_prob = torch.as_tensor(scale_and_mask(_log_prob(site), site.scale, site.mask))
        shape = _batch_shape(site.frames)
        if log_prob.shape != shape:
            try:
                log_prob = log_prob.expand(shape)
            except RuntimeError as error:
                raise ValueError(
                    f"site {name!r}: its log-probability has shape {tuple(log_prob.shape)}, but "
                    f"its plates and the particles need {tuple(shape)}: declare the missing "
                    "dimensions with pyro.plate or .to_event"
                ) from error
        log_prob = log_prob.double().reshape(self.batch, -1)
        return log_prob.masked_fill(log_prob.isneginf(), impossible).sum(-1)

    def log_joint(
        self, names: Any = None, impossible: float = -torch.inf
    ) -> Float64[Tensor, " particle"]:
        """The sum of :meth:`log_prob` over the given sites (all, if None)."""
        device = next((x.device for x in self.states.values()), None)
        total = torch.zeros(self.batch, dtype=torch.float64, device=device)
        for name, site in self.sites.items():
            if not site.deterministic and (names is None or name in names):
                total = total + self.log_prob(name, impossible)
        return total

    def changed(self, other: "Execution", source: str) -> set[str]:
        """The statements whose law, context or value differs from another run's."""
        names = {n for n, s in self.statements.items() if _differs(s.context, other.context(n))}
        for name, site in self.sites.items():
            if name == source:
                continue
            before = other.sites[name]
            if site.deterministic:
                different = _differs(site.value, before.value)
            else:
                different = _differs(self.log_prob(name), other.log_prob(name))
            if different:
                names.add(name)
        return names

    def context(self, name: str) -> dict[str, Any]:
        return self.statements[name].context

    def particle_context(self, name: str, single: "Execution") -> frozenset[str]:
        """Context entries with a particle axis, found by comparing with a run of one particle."""
        alone = single.context(name)
        return frozenset(
            key
            for key, value in self.context(name).items()
            if isinstance(value, Tensor) and value.shape != alone[key].shape
        )


def _advice(error: Exception) -> str:
    if "numpy()" in str(error):
        return (
            "A reward that is computed with NumPy has no gradient: write it in torch, or use a "
            "twist without gradients, as in TwistedSMC(..., proposal='kernel')"
        )
    if "to satisfy the constraint" in str(error):
        return (
            "Mask or clamp whatever is undefined there (a scale must be positive: give it such a "
            "prior); -inf in a factor is the way to say impossible"
        )
    return (
        "Under inference values have the shape (particle, *plates, *event): index from the right, "
        "as in x[..., mask], give a latent the dimensions of the event that it meets, as in "
        "noise[..., None], and declare events with .to_event and plates with pyro.plate; a factor "
        "is one number per particle"
    )


def _log_prob(site: Site) -> Any:
    """The law's own, and -inf outside its support, where an unchecked law says anything."""
    log_prob = _summed(site.fn, site.value)
    if site.kind not in ("observed", "latent"):
        return log_prob
    try:
        support = site.fn.support
        if _is_real(support):
            return log_prob
        inside = support.check(torch.as_tensor(site.value))
    except NotImplementedError:  # some laws do not know their support
        return log_prob
    return torch.where(inside, log_prob, -torch.inf)


def _summed(fn: Any, value: Any) -> Any:
    """A law's log-density, summed over its event in float64."""
    if not isinstance(fn, torch.distributions.Independent) or not fn.reinterpreted_batch_ndims:
        return fn.log_prob(value)
    event = tuple(range(-fn.reinterpreted_batch_ndims, 0))
    return _summed(fn.base_dist, value).sum(event, dtype=torch.float64)


def _is_real(support: Any) -> bool:
    while isinstance(support, type(constraints.real_vector)):
        support = support.base_constraint
    return support is constraints.real


def _base(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _batch_shape(frames: Frames) -> torch.Size:
    sizes = {-f.dim: f.size for f in frames if f.dim is not None}
    return torch.Size([sizes.get(d, 1) for d in range(max(sizes, default=0), 0, -1)])


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return any(_differs(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return a.shape != b.shape or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    return bool(a is not b and a != b)


def _refuse_conditions(process: Process, name: str) -> None:
    for frame in _PYRO_STACK:
        if isinstance(frame, ConditionMessenger):
            sites = {s for m in process.members(name) for s in (m, *_steps(m, process.num_steps))}
            found = sorted(s for s in sites if s in frame.data)
            if found:
                raise Refused(
                    f"site {found[0]!r} of process {name!r} is conditioned, which inference cannot "
                    "honour: observe x_0 through a likelihood, as in pyro.sample('y', Normal(x, "
                    "scale), obs=y)"
                )


def _steps(name: str, num_steps: int) -> list[str]:
    return [f"{name}_{t}" for t in range(num_steps + 1)]


def _refuse_subsampling(name: str, frames: Frames) -> None:
    for frame in frames:
        if frame.full_size is not None and frame.full_size != frame.size:
            raise Refused(
                f"site {name!r} lies in plate {frame.name!r}, which subsamples {frame.size} of "
                f"{frame.full_size}: particle weights need all data, so drop subsample_size"
            )
