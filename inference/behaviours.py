r"""Where trajectories come from.

Any law with full support has the same optimum, a residual of zero everywhere: what is drawn decides
what is learned first. On-policy trajectories alone forget modes that the guide does not visit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.arguments import check_callable, check_kind, check_number, check_whole
from smcdiff.process import Process, is_deterministic

from .pair import Pair
from .replay_buffer import ReplayBuffer
from .trajectories import Plan, States

Ramp = Callable[[int], float]


@dataclass(frozen=True)
class LinearRamp:
    """From ``first`` at update 0 to ``last`` at update ``updates``, and there it stays."""

    first: float
    last: float
    updates: int

    def __post_init__(self) -> None:
        check_whole("updates", self.updates)

    def __call__(self, update: int) -> float:
        share = min(1.0, update / self.updates)
        return (1 - share) * self.first + share * self.last


class Behaviour(ABC):
    """A source of trajectories."""

    @abstractmethod
    def plan(self, pair: Pair, total: int, update: int) -> Plan:
        """What is to be walked in update number ``update``: ``total`` trajectories."""


@dataclass(frozen=True)
class OnPolicy(Behaviour):
    """The guide draws."""

    def plan(self, pair: Pair, total: int, update: int) -> Plan:
        return Plan(pair.num_steps, lambda q, p: q)


@dataclass(frozen=True)
class Inflated(Behaviour):
    """The guide draws with larger noise: standard deviations times a factor, logits over it.

    Attributes:
        factor: of an update, such as ``LinearRamp(2.5, 1.0, 4500)``.
    """

    factor: Ramp

    def __post_init__(self) -> None:
        check_callable("factor", self.factor, "LinearRamp(2.5, 1.0, 4500)")

    def plan(self, pair: Pair, total: int, update: int) -> Plan:
        factor = self.factor(update)
        return Plan(pair.num_steps, lambda q, p: inflate(q, factor))


@dataclass(frozen=True)
class PriorPaths(Behaviour):
    """The model draws."""

    def plan(self, pair: Pair, total: int, update: int) -> Plan:
        return Plan(pair.num_steps, lambda q, p: p)


@dataclass(frozen=True)
class Noised(Behaviour):
    """Data, or what was found before, are noised by the forward process, with fresh noise.

    Attributes:
        terminals: a :class:`ReplayBuffer`; or values of x_0 with shape ``(n, *plates, *event)``, by
            process if there are several.
    """

    terminals: ReplayBuffer | Tensor | Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_kind(
            "terminals", self.terminals, ReplayBuffer | Tensor | Mapping, "ReplayBuffer(1000)"
        )

    def plan(self, pair: Pair, total: int, update: int) -> Plan:
        x0, latents = draw_terminals(self.terminals, pair, total)
        given = noise_backwards(pair, x0, pair.num_steps)
        return Plan(pair.num_steps, lambda q, p: q, given, latents=latents)


@dataclass(frozen=True)
class BackAndForth(Behaviour):
    r"""Pairs that part at x_n: one was noised up to it from x_0, the guide draws the other.

    What they share cancels, and so does log Z: the residual of a pair is that of its steps after
    x_n, :math:`\delta - \delta'`.

    Attributes:
        terminals: as in :class:`Noised`.
        share: n as a share of T.
    """

    terminals: ReplayBuffer | Tensor | Mapping[str, Tensor]
    share: float = 0.5

    def __post_init__(self) -> None:
        check_kind(
            "terminals", self.terminals, ReplayBuffer | Tensor | Mapping, "ReplayBuffer(1000)"
        )
        check_number("share", self.share, 0, 1)

    def plan(self, pair: Pair, total: int, update: int) -> Plan:
        if total % 2:
            raise ValueError(f"trajectories go back and forth in pairs, but num_particles={total}")
        half, begin = total // 2, max(1, round(self.share * pair.num_steps))
        x0, latents = draw_terminals(self.terminals, pair, half)
        given = {t: twice(x) for t, x in noise_backwards(pair, x0, begin).items()}
        rows = torch.arange(total, device=next(iter(x0.values())).device)
        latents = twice(pair.draw_latents(half, None) if latents is None else latents)
        return Plan(begin, lambda q, p: q, given, rows < half, latents, rows % half)


def inflate(law: Distribution, factor: float) -> Distribution:
    """Standard deviations times the factor, or logits divided by it."""
    match law:
        case torch.distributions.Independent():
            inner = inflate(law.base_dist, factor)
            return dist.Independent(inner, law.reinterpreted_batch_ndims)
        case torch.distributions.Normal():
            return dist.Normal(law.loc, law.scale * factor, validate_args=False)
        case torch.distributions.Categorical():
            return dist.Categorical(logits=law.logits / factor, validate_args=False)
    if is_deterministic(law):
        return law
    raise TypeError(f"a transition of type {type(law).__name__} cannot be inflated: use OnPolicy")


def draw_terminals(
    terminals: ReplayBuffer | Tensor | Mapping[str, Tensor], pair: Pair, number: int
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """x_0 by process, and the latents that belong to it where they are known."""
    if pair.model.num_problems is not None:
        raise ValueError(
            "x_0 of one problem says nothing of another: with per_problem draw trajectories by "
            "OnPolicy, Inflated or PriorPaths"
        )
    if isinstance(terminals, ReplayBuffer):
        found = terminals.draw(number)
        return found.x, found.latents
    values = terminals if isinstance(terminals, Mapping) else _only(terminals, pair)
    if set(values) != set(pair.model.processes):
        raise ValueError(
            f"the data are for {sorted(values)}, but the model's processes are "
            f"{sorted(pair.model.processes)}: give x_0 of each"
        )
    rows = torch.randint(len(next(iter(values.values()))), (number,))
    return {n: v[rows.to(v.device)] for n, v in values.items()}, None


def noise_backwards(pair: Pair, x0: dict[str, Tensor], begin: int) -> dict[int, States]:
    """x_0, ..., x_begin by t and member site."""
    states, given = dict(x0), {}
    for t in range(begin + 1):
        if t > 0:
            states = {n: noised(p, states[n], t) for n, p in pair.model.processes.items()}
        given[t] = by_member(pair.model.processes, states)
    return given


def by_member(processes: Mapping[str, Process], states: Mapping[str, Tensor]) -> States:
    """Each process's state split into those of its members."""
    return {m: x for n, p in processes.items() for m, x in p.split(n, states[n]).items()}


def noised(process: Process, x: Tensor, t: int, since: int | None = None) -> Tensor:
    r"""A draw of x_t given x_s, with s = t - 1 if ``since`` is None:
    :math:`\alpha_{t|s} x_s + \sigma_{t|s} \varepsilon`, or every token masked with probability
    :math:`1 - \alpha_t / \alpha_s`."""
    s = t - 1 if since is None else since
    if not x.is_floating_point():
        alphas, mask = getattr(process, "alphas", None), getattr(process, "mask", None)
        if alphas is None or mask is None or getattr(process, "reveal", "") == "even":
            raise _cannot_noise(process)
        kept = alphas[s] * torch.rand(x.shape, device=x.device) < alphas[t]
        return torch.where(kept, x, mask)
    before, after = process.signal(s), process.signal(t)
    if before is None or after is None:
        raise _cannot_noise(process)
    levels = (after.alpha, before.alpha, after.sigma, before.sigma)
    alpha, alpha_before, sigma, sigma_before = (
        torch.as_tensor(level, dtype=torch.float64, device=x.device) for level in levels
    )
    ratio = alpha / alpha_before
    variance = (sigma.square() - (ratio * sigma_before).square()).clamp(min=0)
    return ratio.to(x) * x + variance.sqrt().to(x) * torch.randn_like(x)


def twice(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every row once more, after all of them."""
    return {name: torch.cat([x, x]) for name, x in tree.items()}


def _only(values: Tensor, pair: Pair) -> dict[str, Tensor]:
    names = list(pair.model.processes)
    if len(names) != 1:
        raise ValueError(f"the model has processes {names}: give x_0 as a dict by process")
    return {names[0]: values}


def _cannot_noise(process: Process) -> ValueError:
    return ValueError(
        f"{type(process).__name__} does not say how x_t came from x_0 (signal), so that its data "
        "cannot be noised: draw trajectories by OnPolicy, Inflated or PriorPaths"
    )
