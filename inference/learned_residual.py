r"""A network on top of an analytic twist.

The analytic twist proposes :math:`q(e) = N(e; V d, (V^{-1} + H)^{-1})` around the kernel's mean
(``linear_gaussian.py``) and says :math:`\log \psi`. The network sees the state, the denoised
estimate, the analytic direction and what else it is shown, and adds to both,

.. math:: d \mathrel{+}= V^{-1/2} u_\theta, \qquad \log \psi \mathrel{+}= h_\theta,

u being fitted by weighted likelihood, h by regression on the log-weight still to come. Its last
layer starts at zero: before any learning this *is* the analytic twist (or, without one, the model's
own transition).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from smcdiff.arguments import check_kind, check_names, check_number, check_whole
from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.twist import Twist, TwistValue, View

from .descent import Descent
from .learned import Draw, LearnedTwist, Paths
from .learned_head import ResidualHead
from .linear_gaussian import Covariance, stack
from .proposals import Move, Start, TwistedKernel
from .steered import Steered, SteeredWithin, join, steerable, steered

MANY, FEW = 16, 4  # dimensions that need a basis, and what it has (benchmarks/wishes.py, mixtures)
HOPELESS = -20.0  # of log psi below the average: what is further down need not be told apart


class ResidualTwist(LearnedTwist):
    """A learned residual on an analytic twist and its proposal.

    Args:
        base: the analytic twist, such as ``DenoisedLikelihood()`` (None: start at the model).
        network: ``network(inputs, time)`` with inputs of shape ``(path, k)`` (the states, their
            denoised estimates, the direction in units of the kernel's deviation and the context,
            side by side) and t / T of shape ``(path,)``; returns u and h with shape ``(path, d +
            1)``, zero at first. It is trained in place. None: a :class:`ResidualHead`.
        width: of the latter's layers.
        rank: in how many directions it sees and moves the states (None: in all of up to 16, and in
            four of more: hundreds of paths say nothing about thousands of weights).
        context: names of sites that the network sees as well: observed values, so that one network
            serves many observations, or latents.
        pseudo_count: the anchor, in paths of the base.
        descent: how the network is trained (None: by 64 paths at each of 32 times per step, and
            where the rank is less than d only as far as a quarter of the paths, held out, agree).
    """

    def __init__(
        self,
        base: Twist | None = None,
        network: nn.Module | None = None,
        *,
        width: int = 64,
        rank: int | None = None,
        context: Sequence[str] = (),
        pseudo_count: float = 1.0,
        descent: Descent | None = None,
    ) -> None:
        check_kind("base", base, Twist, "DenoisedLikelihood()", optional=True)
        check_whole("rank", rank, or_none="by the dimension")
        check_names("context", context)
        check_number("pseudo_count", pseudo_count, 0, math.inf, "[)")
        self.base, self.network, self.width, self.rank = base, network, width, rank
        self.context, self.pseudo_count, self.descent = tuple(context), pseudo_count, descent
        self.steer = TwistedKernel()

    def prepare(self, program: Program) -> None:
        self.steer.prepare(program)
        self.names, self.num_steps, self.size = self.steer.names, program.num_steps, 1
        for name in self.names:
            process = program.processes[name]
            if any(process.shape_at(t) != process.event_shape for t in range(self.num_steps + 1)):
                raise ValueError(
                    f"process {name!r} changes shape on its way, and one network sees all steps: "
                    "take GaussianKernels or a QuadraticTwist"
                )
        if self.base is not None:
            self.base.prepare(program)
            self.take_needs(self.base)

    @property
    def num_draws(self) -> int:
        return 0 if self.base is None else self.base.num_draws

    @property
    def paths_needed(self) -> float:
        if self.network is None:
            return 0.0
        count = sum(p.numel() for p in self.network.parameters())
        return count / (self.num_steps * (self.size + 1))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.network is None else {n: v.clone() for n, v in self._state().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if self.network is None and tensors:
            kept = len(tensors["direction.last.bias"])
            size, rank = tensors["basis"].shape if "basis" in tensors else (kept, None)
            self.network = ResidualHead(size, len(tensors["centre"]) - 3 * kept, self.width, rank)
            self.network.to(tensors["centre"].device)
        if self.network is not None and tensors:
            self.network.load_state_dict(tensors)

    def _state(self) -> Mapping[str, Tensor]:
        assert self.network is not None
        return self.network.state_dict()

    # ------------------------------------------------------------------------- twist and proposal

    def evaluate(self, view: View) -> TwistValue:
        like = next(iter(view.x.values()))
        zero = torch.zeros(view.batch, dtype=torch.float64, device=like.device)
        value = TwistValue(zero) if self.base is None else self.base.evaluate(view)
        if not self.names:
            return value
        with torch.no_grad():
            shown = self._context(view)
            states = {n: x.detach() for n, x in view.x.items()}
            inputs = self._inputs(states, view.kernels, value.cache, shown)
            if self.network is None:
                self.network = self._head(shown.shape[1]).to(inputs.device)
            u, h = self._output(inputs, view.t)
        cache = {**value.cache, "residual": u, "value": h, "context": shown}
        return TwistValue(value.log_psi + h, cache, value.memory)

    def _head(self, context: int) -> ResidualHead:
        rank = self.rank or (self.size if self.size <= MANY else FEW)
        with torch.random.fork_rng([]):  # the run's own draws are the same the next time
            return ResidualHead(self.size, context, self.width, rank if rank < self.size else None)

    def start(self, start: Start) -> Move:
        return self.steer.start(start)

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        covariance = self._covariance(kernels, x)
        if covariance is None or "residual" not in cache["twist"]:
            return self.steer.move(t, x, kernels, cache)
        twist = cache["twist"]
        direction = twist.get("direction", 0.0) + twist["residual"] / covariance.diagonal.sqrt()
        steered = {**cache, "twist": {**twist, "direction": direction}}
        return self.steer.move(t, x, kernels, steered)

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        like = next(iter(draw.after.values()))
        steered = self._steered(draw) if draw.kernels else None
        if steered is None:
            return torch.zeros(len(like), dtype=torch.float64, device=like.device)
        inputs = self._inputs(draw.before, draw.kernels, *self._seen(draw))
        return steered.log_ratio(self._output(inputs, draw.s + 1)[0])

    # -------------------------------------------------------------------------------- the algebra

    def _covariance(
        self, kernels: Mapping[str, Kernel], x: Mapping[str, Tensor]
    ) -> Covariance | None:
        return steerable(self.names, kernels, x)

    def _steered(self, draw: Draw) -> Steered | None:
        return steered(self.names, draw, draw.cache["twist"])

    @staticmethod
    def _seen(draw: Draw) -> tuple[Tree, Tensor]:
        """The analytic twist's cache and the context."""
        return draw.cache["twist"], draw.cache["twist"]["context"]

    def _inputs(
        self,
        x: Mapping[str, Tensor],
        kernels: Mapping[str, Kernel],
        twist: Tree,
        context: Tensor,
    ) -> Float64[Tensor, "path input"]:
        states = stack({n: x[n] for n in self.names})
        self.size = states.shape[1]
        estimates = stack({n: kernels[n].denoised.mean for n in self.names})
        covariance = self._covariance(kernels, x)
        direction = torch.zeros_like(states)
        if "direction" in twist and covariance is not None:
            direction = (twist["direction"] * covariance.diagonal.sqrt()).asinh()
        return torch.cat([states, estimates, direction, context], -1)

    def _output(self, inputs: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """u and h, in float64."""
        assert self.network is not None
        parameter = next(self.network.parameters())
        time = torch.zeros_like(inputs[:, 0]) + t / self.num_steps
        out = self.network(inputs.to(parameter), time.to(parameter)).double()
        if tuple(out.shape) != (len(inputs), self.size + 1):
            raise ValueError(
                f"the network of {type(self).__name__} returned shape {tuple(out.shape)} at step "
                f"t = {t}, but {(len(inputs), self.size + 1)} is needed: the residual of the "
                f"direction in {self.size} elements, and that of log psi"
            )
        return out[:, :-1], out[:, -1]

    def _context(self, view: View) -> Float64[Tensor, "path context"]:
        """The values of the sites that the network sees, side by side."""
        like = next(iter(view.x.values()))
        shown = [torch.zeros(view.batch, 0, dtype=torch.float64, device=like.device)]
        for name in self.context:
            if name not in view.execution.sites:
                raise ValueError(
                    f"context names {name!r}, but the program's sites are "
                    f"{sorted(view.execution.sites)}"
                )
            site = view.execution.sites[name]
            value = torch.as_tensor(site.value).detach().double().expand(site.fn.shape())
            shown.append(value[: view.batch].reshape(view.batch, -1))
        return torch.cat(shown, -1)

    # ------------------------------------------------------------------------------- the learning

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        draws = list(paths.draws())[1:]
        inputs = [self._inputs(d.before, d.kernels, *self._seen(d)) for d in draws]
        if isinstance(self.network, ResidualHead) and not self.network.begun:
            self.network.standardise(torch.cat(inputs).to(self.network.centre))
        if self.network is None:
            return
        seen = 0.5 * (weights + 1 / len(weights))  # h must know what not to follow, too
        size = float(1 / weights.square().sum())
        common = self._output, weights / seen, size / (size + self.pseudo_count)
        basis, parts = self._basis(weights), []
        for draw, shown, to_go in zip(draws, inputs, paths.to_go(), strict=True):
            times, target = torch.full_like(to_go, draw.s + 1), _target(draw, to_go, weights)
            recorded = _within(self._steered(draw), basis, len(target))
            parts.append(Misfits(*common, shown, times, target, recorded, basis))
        held_out = 0.25 if self._partly else 0.0
        descent = self.descent or Descent(batch=64, times=32, held_out=held_out)
        losses = [part.alone for part in parts] if basis is None else Misfits.join(parts)
        descent.minimise(self.network.parameters(), losses, seen)

    @property
    def _partly(self) -> bool:
        """Whether only some directions are learned."""
        return getattr(self.network, "basis", None) is not None

    def _basis(self, like: Tensor) -> Float64[Tensor, "d k"] | None:
        """Directions so few that a draw is kept as a quadratic function of them."""
        if isinstance(self.network, ResidualHead) and self.network.basis is not None:
            return self.network.basis.double()
        return torch.eye(self.size).to(like) if self.size <= MANY else None


def _target(draw: Draw, to_go: Tensor, weights: Tensor) -> Float64[Tensor, " path"]:
    """What h should have added to log psi, up to a constant."""
    missed = to_go - draw.cache["log_psi"] + draw.cache["twist"]["value"]
    return (missed - weights @ torch.where(weights > 0, missed, 0.0)).clamp(min=HOPELESS)


def _within(
    recorded: Steered | None, basis: Tensor | None, number: int
) -> Steered | SteeredWithin | None:
    """A draw by what is scored: directions in the basis, if there is one."""
    if basis is None:
        return recorded
    if recorded is not None:
        return recorded.within(basis)
    k = basis.shape[1]  # nothing is steered
    return SteeredWithin(*(basis.new_zeros(n) for n in ((number,), (number, k), (1, k, k))))


@dataclass(frozen=True)
class Misfits:
    """The anchored negative log-likelihood of recorded draws, and the misfit of log psi.

    Attributes:
        output: u and h by inputs and times.
        share: what a path counts in the likelihood, given how often it is seen.
        trust: the share of the paths, against the anchor.
        inputs, times, target, recorded: of all paths at one time, then at the next.
        basis: that of the recorded draws.
    """

    output: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    share: Float64[Tensor, " path"]
    trust: float
    inputs: Float64[Tensor, "pair input"]
    times: Float64[Tensor, " pair"]
    target: Float64[Tensor, " pair"]
    recorded: Steered | SteeredWithin | None
    basis: Float64[Tensor, "d k"] | None

    @staticmethod
    def join(parts: "Sequence[Misfits]") -> "Misfits":
        """Of several times, within one basis."""
        inputs, times, target = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("inputs", "times", "target")
        )
        recorded = join([p.recorded for p in parts if isinstance(p.recorded, SteeredWithin)])
        return replace(parts[0], inputs=inputs, times=times, target=target, recorded=recorded)

    def __len__(self) -> int:
        return len(self.target) // len(self.share)

    def __call__(self, rows: Tensor, times: Tensor) -> Float64[Tensor, "time row"]:
        pairs = (times[:, None] * len(self.share) + rows).flatten()
        u, h = self.output(self.inputs[pairs], self.times[pairs])
        misfit = smooth_l1_loss(h, self.target[pairs], reduction="none")
        if self.recorded is not None:
            u = u if self.basis is None else u @ self.basis
            likelihood = -self.recorded.take(pairs).log_ratio(u)
            anchored = (1 - self.trust) * 0.5 * u.square().sum(-1) - self.trust * likelihood
            misfit = misfit + self.share[rows.flatten()] * anchored
        return misfit.reshape(rows.shape)

    def alone(self, rows: Tensor) -> Float64[Tensor, " row"]:
        """The same where there is one time."""
        return self(rows[None], torch.zeros_like(rows[:1]))[0]
