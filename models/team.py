"""Teams: several processes advanced in lockstep as one, so that a control can see them all."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor

from smcdiff.arguments import check_kind
from smcdiff.laws import CovariantNormal, base_law
from smcdiff.process import Kernel, Level, Process, Signal, Tree, is_deterministic


class Team(Process):
    """Several processes of one program as one statement: ``team("ab")`` returns one x_0 per member.

    The members are independent given the past. Their flattened states lie side by side in one
    vector, so ``Controlled(team, control)`` lets agents observe each other. Unhandled, a team emits
    the sites that its members would emit, and can serve as a guide for a model that declares them
    one by one.

    Args:
        agents: the processes by site name, with equal ``num_steps``.
    """

    def __init__(self, agents: Mapping[str, Process]) -> None:
        check_kind("agents", agents, Mapping, "{'a': first, 'b': second}")
        if not agents:
            raise ValueError("a Team needs at least one process")
        for name, agent in agents.items():
            check_kind(f"agents[{name!r}]", agent, Process, "Diffusion(network, ...)")
        steps = {name: agent.num_steps for name, agent in agents.items()}
        if len(set(steps.values())) > 1:
            raise ValueError(
                f"the processes of a Team advance in lockstep and need equal num_steps, got {steps}"
            )
        for name, agent in agents.items():
            if agent.shape_at(agent.num_steps) != agent.event_shape:
                raise ValueError(
                    f"process {name!r} changes shape on its way, from "
                    f"{tuple(agent.shape_at(agent.num_steps))} to {tuple(agent.event_shape)}, and "
                    "cannot join a Team: declare it by itself in the program"
                )
        self.agents = dict(agents)
        self.num_steps = next(iter(steps.values()))
        self.sizes = [agent.event_shape.numel() for agent in self.agents.values()]
        self.event_shape = Size([sum(self.sizes)])

    @property
    def closed_form(self) -> bool:
        return all(agent.closed_form for agent in self.agents.values())

    @property
    def deterministic(self) -> bool:
        return all(agent.deterministic for agent in self.agents.values())

    def initial(self, **context: Any) -> Distribution:
        return self._join_laws([a.initial(**context) for a in self.agents.values()], "x_T")

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        states = self.split("", x)
        return {n: a.evaluate(states[n], t, **context) for n, a in self.agents.items()}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        states = self.split("", x)
        kernels = [a.kernel(states[n], t, evaluation[n], **context) for n, a in self.agents.items()]
        law = self._join_laws([k.law for k in kernels], f"step t = {t}")
        denoised = self._join_laws([k.denoised for k in kernels], f"step t = {t}")
        covariances = [k.covariance for k in kernels]
        if not self.closed_form:
            return Kernel(law, denoised)
        parts = [c for c in covariances if c is not None]
        return Kernel(law, denoised, lambda: _block_diagonal([c() for c in parts]))

    def signal(self, t: int) -> Signal | None:
        """Every element has the levels of its agent; None where one agent has none."""
        signals = [agent.signal(t) for agent in self.agents.values()]
        known = [signal for signal in signals if signal is not None]
        if len(known) < len(signals):
            return None
        fields = ("alpha", "sigma", "slope", "variance", "spread")
        return Signal(*(self._side_by_side([getattr(s, f) for s in known]) for f in fields))

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        starts, states = self.split("", x_0), self.split("", x)
        means = {n: a.bridge(starts[n], states[n], t) for n, a in self.agents.items()}
        known = {n: mean for n, mean in means.items() if mean is not None}
        return self.join("", known) if len(known) == len(means) else None

    def calls(self, t: int) -> int:
        return sum(agent.calls(t) for agent in self.agents.values())

    def members(self, name: str) -> tuple[str, ...]:
        return tuple(self.agents)

    def member_dim(self, name: str, member: str) -> int:
        return len(self.agents[member].event_shape)

    def split(self, name: str, x: Tensor) -> dict[str, Tensor]:
        parts = x.split(self.sizes, -1)
        return {
            n: p.reshape(*x.shape[:-1], *a.event_shape)
            for (n, a), p in zip(self.agents.items(), parts, strict=True)
        }

    def join(self, name: str, xs: dict[str, Tensor]) -> Tensor:
        return torch.cat([_flat(xs[n], len(a.event_shape)) for n, a in self.agents.items()], -1)

    def split_law(self, name: str, law: Distribution) -> dict[str, Distribution]:
        if isinstance(law, dist.Delta):
            values = self.split(name, law.v)
            return {n: dist.Delta(v, event_dim=self.member_dim(name, n)) for n, v in values.items()}
        law = base_law(law)
        if isinstance(law, torch.distributions.Categorical):
            logits = law.logits.split(self.sizes, -2)
            laws = [dist.Categorical(logits=p, validate_args=False).to_event(1) for p in logits]
            return dict(zip(self.agents, laws, strict=True))
        if isinstance(law, CovariantNormal):
            return self._split_covariant(name, law)
        if not isinstance(law, torch.distributions.Normal):
            raise TypeError(f"a Team cannot emit its members' sites from a {type(law).__name__}")
        means, scales = self.split(name, law.loc), self.split(name, law.scale)
        return {
            n: dist.Normal(means[n], scales[n], validate_args=False).to_event(
                self.member_dim(name, n)
            )
            for n in self.agents
        }

    def _side_by_side(self, levels: list[Level]) -> Tensor:
        parts = zip(levels, self.agents.values(), strict=True)
        tables = [torch.as_tensor(v, dtype=torch.float64).expand(a.event_shape) for v, a in parts]
        return torch.cat([table.flatten() for table in tables])

    def _split_covariant(self, name: str, law: CovariantNormal) -> dict[str, Distribution]:
        """The members' rows of diag(a) + F F', which is block-diagonal."""
        means = self.split(name, law.loc)
        diagonals, factors = law.diagonal.split(self.sizes, -1), law.factor.split(self.sizes, -2)
        parts = zip(means.items(), diagonals, factors, strict=True)
        return {n: CovariantNormal(m, a, f, self.member_dim(name, n)) for (n, m), a, f in parts}

    def _join_laws(self, laws: list[Distribution], where: str) -> Distribution:
        dims = [len(agent.event_shape) for agent in self.agents.values()]
        if all(is_deterministic(law) for law in laws):
            points = [_flat(law.mean, dim) for law, dim in zip(laws, dims, strict=True)]
            return dist.Delta(torch.cat(points, -1), event_dim=1)
        if any(is_deterministic(law) for law in laws):
            raise ValueError(
                f"at {where} some processes of the Team have no variance and others have: give "
                "them the same kind of last step (variance=, eta=)"
            )
        bases = [base_law(law) for law in laws]
        if all(isinstance(b, torch.distributions.Categorical) for b in bases):
            logits = torch.cat([b.logits for b in bases], -2)
            return dist.Categorical(logits=logits, validate_args=False).to_event(1)
        if not all(isinstance(b, torch.distributions.Normal | CovariantNormal) for b in bases):
            kinds = sorted({type(b).__name__ for b in bases})
            raise ValueError(
                "a Team joins normal transitions, or those of tokens revealed independently "
                f"(reveal='independent'), but at {where} they are {kinds}: declare the processes "
                "one by one in the program instead"
            )
        means = [_flat(law.mean, dim) for law, dim in zip(laws, dims, strict=True)]
        if any(isinstance(b, CovariantNormal) for b in bases):
            blocks = [_low_rank(law, dim) for law, dim in zip(laws, dims, strict=True)]
            return CovariantNormal(torch.cat(means, -1), *_block_diagonal(blocks))
        scales = [_flat(law.stddev, dim) for law, dim in zip(laws, dims, strict=True)]
        return dist.Normal(torch.cat(means, -1), torch.cat(scales, -1)).to_event(1)


def _flat(x: Tensor, event_dim: int) -> Tensor:
    return x.reshape(*x.shape[: x.dim() - event_dim], -1)


def _low_rank(law: Distribution, event_dim: int) -> tuple[Tensor, Tensor]:
    if isinstance(law, CovariantNormal):
        return law.diagonal, law.factor
    variance = _flat(law.variance, event_dim)
    return variance, variance.new_zeros(*variance.shape, 1)


def _block_diagonal(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Independent covariances diag(a) + F F' side by side."""
    diagonal = torch.cat([a for a, _ in parts], -1)
    rank = sum(f.shape[-1] for _, f in parts)
    factor = diagonal.new_zeros(*diagonal.shape, rank)
    row = column = 0
    for _, f in parts:
        factor[..., row : row + f.shape[-2], column : column + f.shape[-1]] = f
        row, column = row + f.shape[-2], column + f.shape[-1]
    return diagonal, factor
