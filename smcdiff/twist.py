r"""Twists: a look-ahead :math:`\psi_t(x_t)` at the likelihood that a particle will meet at t = 0.

Any positive function gives the right answer; the best one is
:math:`\psi_t(x_t) = E[\gamma(x_0) \mid x_t]`. At t = 0 the engine uses the program itself, so a
twist is only asked at t >= 1. A log-twist is computed once per state and gathered with its
particle, never re-evaluated.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from .execution import Execution
from .process import Kernel, Process, Tree
from .program import Program

VIOLATED = -2.0  # measured: from -4 on, the paths that recover carry too much weight


@dataclass
class View:
    """What can be seen of a batch of particles at one step: the argument of every twist.

    The program has been run on ``num_estimates`` estimates of x_0 per particle, laid out estimate
    by estimate along the particle axis.

    Attributes:
        x: the states x_t, tracked by autograd if the twist asked for gradients.
        kernels: the transitions out of ``x``.
        evaluations, contexts: what the kernels were made of.
        memory: what the twist remembered of each particle at t + 1 (empty at T).
        spend, backward: called with the number of further network evaluations, and with the
            number of particles of every backward pass through the networks.
    """

    program: Program
    t: int
    batch: int
    x: dict[str, Tensor]
    latents: Mapping[str, Tensor]
    kernels: dict[str, Kernel]
    evaluations: dict[str, Tree]
    contexts: dict[str, dict[str, object]]
    execution: Execution
    num_estimates: int
    memory: dict[str, Tensor]
    problems: Tensor | None
    spend: Callable[[int], None] = field(default=lambda _: None)
    backward: Callable[[int], None] = field(default=lambda _: None)
    _measured: list[dict[str, Tensor]] | None = field(default=None, init=False)

    @property
    def tracked(self) -> bool:
        """Whether autograd follows the states."""
        return any(x.requires_grad for x in self.x.values())

    @property
    def processes(self) -> dict[str, Process]:
        return self.program.processes

    def log_prob(self, *names: str) -> Float64[Tensor, "estimate particle"]:
        """The summed log-probability of some sites at every estimate.

        An estimate of x_0 is no x_0: where it violates a hard constraint (-inf), a twist that
        believed it would lose every path that meets the constraint in the end. ``VIOLATED`` counts.
        """
        return self.execution.log_joint(names, VIOLATED).reshape(self.num_estimates, self.batch)

    def log_likelihood(self) -> Float64[Tensor, "estimate particle"]:
        """The log-probability of everything that can depend on x_0, at every estimate.

        That is the program's log-density without the latents upstream of all processes, whose
        constant share the engine adds by itself.
        """
        upstream = set(self.program.latents) - self.program.downstream
        return self.log_prob(*(set(self.execution.sites) - upstream))

    def gradient(self, total: Tensor) -> dict[str, Tensor]:
        """d total / d x_t for every continuous process (one backward pass)."""
        names = [n for n, x in self.x.items() if x.requires_grad]
        self.backward(self.batch)
        grads = torch.autograd.grad(
            total, [self.x[n] for n in names], retain_graph=True, allow_unused=True
        )
        return {
            n: torch.zeros_like(self.x[n]) if g is None else g.detach()
            for n, g in zip(names, grads, strict=True)
        }

    def measure(self, outputs: list[Tensor]) -> list[dict[str, Tensor]]:
        """d output / d x_t, one backward pass each: made once, however often it is asked for."""
        if self._measured is None:
            self._measured = [self.gradient(output.sum()) for output in outputs]
        return self._measured


@dataclass(frozen=True)
class TwistValue:
    """A log-twist and what belongs to the particle because of it.

    Attributes:
        log_psi: finite at t >= 1.
        cache: tensors with the particle axis in front, for the proposal; gathered at resampling.
        memory: tensors that :attr:`View.memory` shows at the next step.
    """

    log_psi: Float64[Tensor, " particle"]
    cache: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)


class Twist(ABC):
    """A look-ahead.

    Attributes:
        needs_gradient: whether ``View.x`` must be tracked by autograd, through the networks.
        needs_program_gradient: whether ``View.execution.states`` must be, through the program
            alone.
        offers_start: whether its cache at T has what a twisted start needs.
        measures_network: whether log psi itself is made of derivatives of the network.
    """

    needs_gradient: bool = False
    needs_program_gradient: bool = False
    offers_start: bool = False
    measures_network: bool = False

    def prepare(self, program: Program) -> None:
        """Called once per run, before any particle exists; may refuse the program."""

    def take_needs(self, *parts: "Twist") -> None:
        """Needs, offers and measures what any of the twists does that this one is made of."""
        for flag in (name for name, default in vars(Twist).items() if isinstance(default, bool)):
            setattr(self, flag, any(getattr(part, flag) for part in parts))

    @property
    def num_draws(self) -> int:
        """How many draws of x_0 around the denoised estimate the program is run on, besides it."""
        return 0

    @abstractmethod
    def evaluate(self, view: View) -> TwistValue:
        """log psi_t at the particles of ``view``."""
