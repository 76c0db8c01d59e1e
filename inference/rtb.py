r"""Relative trajectory balance: a guide that learns the posterior, path by path.

For a prior p over trajectories and a program's :math:`\gamma(x_0, z)`, the guide q is the posterior
if and only if

.. math:: \delta = \log Z + \log q(x_{T:0}, z) - \log p(x_{T:0}) - \log \gamma(x_0, z)

vanishes on every trajectory (Venkatraman et al. 2024, arXiv 2405.20971). Half its square is
minimised over trajectories that anyone may have drawn; nothing is differentiated but the guide's
log-densities, at fixed states, and :math:`\gamma` may be a black box. On-policy the expected
gradient is that of KL(q || posterior).

The optimum is the posterior only where the guide can express it: its start must be learned unless
x_T says nothing about x_0, its variances wherever the posterior is narrower. Importance weights
tell: ``SMC(model, guide=guide)``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from pyro.optim import PyroOptim
from torch import Tensor, nn

from smcdiff.arguments import check_callable, check_kind
from smcdiff.particles import map_tree
from smcdiff.weights import effective_sample_size

from . import ranks
from .behaviours import BackAndForth, Behaviour, Noised, OnPolicy, Ramp
from .guide_learner import GuideLearner, numbered, refuse_sizes, shapes
from .learned_evidence import LogZ, log_z_of
from .pair import Pair
from .replay_buffer import ReplayBuffer, Terminals
from .residuals import ResidualLoss, Update, group_reduce
from .streams import stream_untouched
from .trajectories import Plan, Trajectories


@dataclass(frozen=True)
class _Batch:
    """This process's share of the trajectories, the steps that learn from them, and log gamma."""

    pair: Pair
    plan: Plan
    walked: Trajectories
    steps: list[int]
    log_gamma: Float64[Tensor, " particle"]


class RelativeTrajectoryBalance(GuideLearner[Update]):
    """Trains a guide's processes, latents and log Z; the model stays as it is.

    Args:
        model: a Pyro callable with at least one process.
        guide: a Pyro callable with the same process sites, such as ``Controlled`` or ``Finetuned``
            processes, and with the ordinary latents that it wants to propose.
        optim: a ``pyro.optim`` optimiser of the guide's parameters.
        evidence: log Z: ``"learned"``, one number per problem; ``"vargrad"``: what suits the
            trajectories of one problem best (no parameter); or a module that maps the model's
            arguments to log Z, with shape ``()`` or ``(problem,)``, for conditional guides.
        evidence_rate: the learning rate of log Z (Adam).
        behaviours: who draws the trajectories, in turn (None: the guide).
        num_particles: trajectories per problem and update, of all processes of ``torchrun``.
        loss: of a residual.
        exponent: the power of the likelihood by update, such as ``LinearRamp(0.1, 1.0, 500)``.
        floor: the least log-likelihood that is believed (None: none, and -inf is refused).
        chunk_steps: hold the graph of so many steps only, in a second pass over the recorded
            trajectories: memory does not grow with T (None: one pass).
        subsample: take the gradient of so many random steps only, scaled up; the residual is that
            of all (None: all steps).
        max_gradient_norm: gradients are scaled down to it.
        on_nonfinite: ``"raise"`` or ``"skip"`` an update with a residual that is no number.
        per_problem: names of arguments with one row per problem (see :class:`smcdiff.Program`).

    Raises:
        ValueError: at the first update, if the model would train, or the guide's sites do not match
            the model's.
    """

    kind = "smcdiff-1 balance"

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        *,
        evidence: str | nn.Module = "learned",
        evidence_rate: float = 0.1,
        behaviours: Sequence[Behaviour] | None = None,
        num_particles: int = 64,
        loss: ResidualLoss | None = None,
        exponent: Ramp | None = None,
        floor: float | None = None,
        chunk_steps: int | None = None,
        subsample: int | None = None,
        max_gradient_norm: float | None = None,
        on_nonfinite: str = "raise",
        per_problem: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        super().__init__(model, guide, optim, num_particles, max_gradient_norm)
        self.evidence, self.evidence_rate = evidence, evidence_rate
        check_kind("behaviours", behaviours, Sequence, "[OnPolicy()]", optional=True)
        for behaviour in behaviours or ():
            check_kind("a behaviour", behaviour, Behaviour, "OnPolicy()")
        check_kind("loss", loss, ResidualLoss, "ResidualLoss()", optional=True)
        check_callable("exponent", exponent, "LinearRamp(0.1, 1.0, 1000)", optional=True)
        self.behaviours = tuple(behaviours or (OnPolicy(),))
        self.loss, self.exponent = loss or ResidualLoss(), exponent
        self.floor, self.chunk_steps, self.subsample = floor, chunk_steps, subsample
        self.on_nonfinite, self.per_problem = on_nonfinite, per_problem
        self.log_z: nn.Module | None = evidence if isinstance(evidence, nn.Module) else None
        self._arguments: tuple[Any, ...] = ()
        self._check()

    @property
    def log_evidence(self) -> Tensor:
        """The learned log Z, per problem."""
        if not isinstance(self.log_z, LogZ):
            raise ValueError("no number log Z is being learned: SMC(model, guide) estimates it")
        return self.log_z.value.detach()

    # ------------------------------------------------------------------------------- one update

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        """The loss of a batch; adds its gradient to those of guide and log Z."""
        return self._accumulate(args, kwargs).loss

    def _accumulate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Update:
        pair = self._prepare(args, kwargs)
        batch = self._draw(pair)
        ratio, behind, log_gamma = (
            ranks.gather(v)
            for v in (batch.walked.log_ratio, batch.walked.log_behaviour, batch.log_gamma)
        )
        log_weights = log_gamma - ratio
        bad = ~log_weights.isfinite()
        if bool(bad.any()):
            return self._refuse(batch, bad)
        groups = self._groups(batch, len(ratio))
        centre = group_reduce(log_weights, groups, "mean")
        known = None if batch.plan.groups is not None else self.log_z
        evidence = centre if known is None else log_z_of(known, args, kwargs, log_weights, groups)
        residual = evidence.detach()[groups] - log_weights
        shares = self.loss.shares(behind, groups)
        weights = shares * self.loss.slope(residual) / len(residual)
        self._backward(batch, weights, evidence[groups])
        self._remember(batch, log_gamma)
        value = float((shares * self.loss.value(residual)).mean())
        ess = effective_sample_size(log_weights) / len(log_weights)
        return Update(value, float(log_weights.mean()), float(log_weights.std()), float(ess))

    def _draw(self, pair: Pair) -> _Batch:
        total = self.num_particles * (pair.model.num_problems or 1)
        plan = self.behaviours[self.done % len(self.behaviours)].plan(pair, total, self.done)
        steps = self._steps(plan.begin)
        tracked, kept = (steps, []) if self.chunk_steps is None else ([], steps)
        with torch.enable_grad():
            walked = pair.walk(plan, total, tracked, kept)
        seen, own = pair.log_likelihood(walked)
        seen = seen if self.floor is None else seen.clamp(min=self.floor)
        power = 1.0 if self.exponent is None else self.exponent(self.done)
        self.calls += pair.take_calls()
        return _Batch(pair, plan, walked, steps, own + power * seen)

    def _backward(self, batch: _Batch, weights: Tensor, evidence: Tensor) -> None:
        """Adds the gradient of sum_i w_i (log Z + log q_i), all at once or chunk by chunk."""
        walked, scale = batch.walked, batch.plan.begin / len(batch.steps)
        own = ranks.own(weights, len(weights))
        with torch.enable_grad():
            _descend((own * ranks.own(evidence, len(weights))).sum())
            if self.chunk_steps is None:
                ratio = torch.stack([walked.ratios[t] for t in batch.steps]).sum(0)
                _descend((own * (walked.at_start + scale * ratio)).sum())
                return
            _descend((own * batch.pair.ratios_again(walked, [], start=True)).sum())
            for k in range(0, len(batch.steps), self.chunk_steps):
                steps = batch.steps[k : k + self.chunk_steps]
                ratio = batch.pair.ratios_again(walked, steps, start=False)
                _descend(scale * (own * ratio).sum())
        self.calls += batch.pair.take_calls()

    def _steps(self, begin: int) -> list[int]:
        """The steps that get a gradient."""
        if self.subsample is None or self.subsample >= begin:
            return list(range(begin, 0, -1))
        return sorted((torch.randperm(begin)[: self.subsample] + 1).tolist(), reverse=True)

    @staticmethod
    def _groups(batch: _Batch, total: int) -> Tensor:
        """Which trajectories share a normalising constant."""
        device, number = batch.log_gamma.device, batch.pair.model.num_problems or 1
        if batch.plan.groups is not None:
            return batch.plan.groups.to(device)
        return torch.arange(number, device=device).repeat_interleave(total // number)

    def _remember(self, batch: _Batch, log_gamma: Tensor) -> None:
        """Puts what was drawn into the buffers that behaviours replay."""
        if batch.plan.given or not self.buffers:
            return
        x0 = {m: ranks.gather(x) for m, x in batch.walked.x[0].items()}
        latents = {n: ranks.gather(z) for n, z in batch.walked.latents.items()}
        for buffer in self.buffers:
            buffer.push(Terminals(batch.pair.joined(x0), latents, log_gamma))

    def _refuse(self, batch: _Batch, bad: Tensor) -> Update:
        """Names where a residual is no number; then skips or stops."""
        if self.on_nonfinite == "raise":
            raise ValueError(
                f"update {self.done}: {int(bad.sum())} of {len(bad)} residuals are not finite; "
                f"{batch.pair.blame(batch.walked)}. on_nonfinite='skip' passes over such updates"
            )
        nan = float("nan")
        return Update(nan, nan, nan, nan, skipped=True)

    # ------------------------------------------------------------------- parameters, checkpoints

    def _move(self, parameters: list[Tensor]) -> None:
        super()._move(parameters)
        if self.log_z is not None:
            self.evidence_optim.step()

    def _own_parameters(self) -> list[Tensor]:
        return [] if self.log_z is None else list(self.log_z.parameters())

    @property
    def buffers(self) -> list[ReplayBuffer]:
        """What the behaviours replay."""
        sources = [getattr(b, "terminals", None) for b in self.behaviours]
        return list({id(s): s for s in sources if isinstance(s, ReplayBuffer)}.values())

    def _loss(self, record: Update) -> float:
        return record.loss

    def _plain(self, record: Update) -> dict[str, Any]:
        return vars(record)

    def _record(self, saved: dict[str, Any]) -> Update:
        return Update(**saved)

    def _about(self, pair: Pair) -> dict[str, Any]:
        log_z = {} if self.log_z is None else dict(self.log_z.named_parameters())
        return super()._about(pair) | {
            "log_z": shapes(log_z),
            "behaviours": [type(behaviour).__name__ for behaviour in self.behaviours],
            "loss": repr(self.loss),
            "subsample": self.subsample,
        }

    def _extra(self) -> dict[str, Any]:
        saved: dict[str, Any] = {"buffers": [buffer.as_tree() for buffer in self.buffers]}
        if self.log_z is not None:
            optim = self.evidence_optim.state_dict()
            saved |= {"log_z": self.log_z.state_dict(), "evidence_optim": optim}
        return saved

    def _restore_extra(self, tree: dict[str, Any]) -> None:
        if self.log_z is not None:
            self.log_z.load_state_dict(tree["log_z"])
            self.evidence_optim.load_state_dict(numbered(tree["evidence_optim"]))
        assert self.pair is not None
        device = self.pair.model.device
        for buffer, content in zip(self.buffers, tree["buffers"], strict=True):
            buffer.from_tree(map_tree(lambda v: v.to(device), content))

    # ------------------------------------------------------------------------------ taking it apart

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pair:
        """Taken apart once as long as the arguments stay the same."""
        given = (*args, *kwargs.values())
        if self.pair is not None and len(given) == len(self._arguments):
            if all(a is b for a, b in zip(given, self._arguments, strict=True)):
                return self.pair
        with stream_untouched():
            pair = Pair(self.model, self.guide, args, kwargs, self.per_problem)
            if self.pair is None:
                self._begin(pair)
        ranks.same_streams(pair.model.device)
        self.pair, self._arguments = pair, given
        self._notice(pair)
        return pair

    def _begin(self, pair: Pair) -> None:
        """Once: makes log Z, too."""
        if self.evidence == "learned":
            self.log_z = LogZ(pair.model.num_problems or 1).to(pair.model.device)
        if self.log_z is not None:
            self.evidence_optim = torch.optim.Adam(self.log_z.parameters(), self.evidence_rate)
        super()._begin(pair)

    def _check(self) -> None:
        if isinstance(self.evidence, str) and self.evidence not in ("learned", "vargrad"):
            raise ValueError(f"evidence is 'learned', 'vargrad' or a module, got {self.evidence!r}")
        if self.evidence == "vargrad" and self.num_particles < 2:
            raise ValueError("'vargrad' compares trajectories: it needs num_particles of 2 or more")
        given = [type(b).__name__ for b in self.behaviours if isinstance(b, Noised | BackAndForth)]
        if self.loss.importance and given:
            raise ValueError(
                f"importance={self.loss.importance} weighs trajectories by the law that drew them, "
                f"and nobody knows that of x_0 in {given}: leave importance at 0 there"
            )
        if self.on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite is 'raise' or 'skip', got {self.on_nonfinite!r}")
        refuse_sizes(
            num_particles=self.num_particles, chunk_steps=self.chunk_steps, subsample=self.subsample
        )


def _descend(total: Tensor) -> None:
    """Adds the gradient, where there is one: points and given starts have none."""
    if total.requires_grad:
        total.backward()
