r"""The one loop: properly weighted particles for any program, twist and proposal.

.. math::
    \ell_T &= \log p(x_T) - \log q(x_T) - \log q(z) + \log \psi_T(x_T, z) \\
    \ell_{t-1} &= \ell_t + \log p(x_{t-1} \mid x_t) - \log q(x_{t-1} \mid x_t)
                 + \log \psi_{t-1} - \log \psi_t, \qquad \psi_0 = \gamma(x_0, z),

z the program's ordinary latents. Particles are resampled whenever their effective sample size asks
for it, and then everything that belongs to a particle moves with it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.arguments import check_kind, check_number, check_whole
from smcdiff.dissection import draw, placeholder
from smcdiff.execution import Statement
from smcdiff.particles import Calls, Particles, Step, map_tree
from smcdiff.process import Kernel, Tree, is_deterministic
from smcdiff.program import Program
from smcdiff.psis import khat as pareto_khat
from smcdiff.resampling import check_scheme, resample
from smcdiff.twist import Twist
from smcdiff.weights import check_log_weights, effective_sample_size, normalise

from .evaluation import Evaluator
from .proposals import Proposal, Start
from .rejuvenation import Rejuvenation
from .resuming import mark
from .streams import restore_streams, stream_states


@dataclass(frozen=True)
class Settings:
    """What the loop itself can be told.

    Attributes:
        num_particles, num_runs: N particles in each of several independent runs.
        ess_threshold: resample when the effective sample size falls below this share of N (0:
            never; 1: at every step).
        resampler: a name of ``smcdiff.resampling.RESAMPLERS``.
        chunk_size: how many particles to evaluate at once (None: all). Bounds memory, changes
            nothing.
        rejuvenation: moves the ordinary latents on the way.
        smoothing: the share, below 1, of every change of a log-weight that is held back until the
            next step (at t = 0 all is paid). A look-ahead that errs at one state errs otherwise at
            the next: its passing errors then do not decide who is resampled. The target stays.
        exponent: a power of all weights, with which particles aim between proposal and target.
    """

    num_particles: int = 256
    num_runs: int = 1
    ess_threshold: float = 0.5
    resampler: str = "systematic"
    chunk_size: int | None = None
    rejuvenation: Rejuvenation | None = None
    smoothing: float = 0.0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        check_whole("num_particles", self.num_particles)
        check_whole("num_runs", self.num_runs)
        check_number("ess_threshold, a share of the particles,", self.ess_threshold, 0, 1)
        check_whole("chunk_size", self.chunk_size, or_none="all particles at once")
        check_kind("rejuvenation", self.rejuvenation, Rejuvenation, "Rejuvenation()", optional=True)
        check_number("smoothing, the share that is held back,", self.smoothing, 0, 1, "[)")
        check_number("exponent", self.exponent, 0, 1, "(]")
        if self.smoothing and self.rejuvenation is not None:
            raise ValueError(
                f"smoothing ({self.smoothing}) and rejuvenation exclude each other: a move must "
                "know the law of the particles, and weights that are held back hide it"
            )
        check_scheme(self.resampler)


class Engine:
    """One program, twist and proposal under way."""

    def __init__(
        self, program: Program, twist: Twist, proposal: Proposal, settings: Settings
    ) -> None:
        self.program, self.twist, self.proposal, self.settings = program, twist, proposal, settings
        refuse_flows(program, settings)
        twist.prepare(program)
        proposal.prepare(program)
        if settings.rejuvenation is not None:
            settings.rejuvenation.prepare(program)
        keeps_draws = settings.rejuvenation is not None
        self.evaluator = Evaluator(program, twist, proposal, settings.chunk_size, keeps_draws)
        proposal.attach(self.evaluator)
        problems = () if program.num_problems is None else (program.num_problems,)
        self.axes = (*problems, settings.num_runs, settings.num_particles)
        per_problem = settings.num_runs * settings.num_particles
        self.problems = None
        if problems:
            numbers = torch.arange(problems[0], device=program.device)
            self.problems = numbers.repeat_interleave(per_problem)

    def iterate(self, state: Particles | None = None) -> Iterator[Particles]:
        """Yields the particles at T, T - 1, ..., 0 (or on from ``state``).

        The random stream continues from where the state left it, whatever was drawn between steps.
        """
        if state is None:
            state = self.start()
            yield state
        while state.t > 0:
            if state.rng is not None:
                restore_streams(state.rng, state.log_weights.device)
            state = self.step(state)
            yield state

    # ------------------------------------------------------------------------------------ t = T

    def start(self) -> Particles:
        """Draws latents and x_T, and looks at them."""
        batch, num_steps = math.prod(self.axes), self.program.num_steps
        laws: dict[str, Distribution] = {}
        draws: dict[str, Tensor] = {}
        values, log_q = self.proposal.latents(batch, self.problems)

        def state(statement: Statement) -> Tensor:
            law = statement.process.initial(**statement.context)
            laws[statement.name] = law if is_deterministic(law) else law.expand(statement.batch)
            draws[statement.name] = draw(law, statement.batch)
            return self._first_estimate(statement, draws[statement.name], values)

        with torch.no_grad():
            execution = self.program.execute(state, values, batch, self.problems)
        latents = {n: execution.sites[n].value for n in self.program.latents}
        for name in latents:
            if name not in values:
                log_q = log_q + execution.log_prob(name)

        def look(x: dict[str, Tensor]) -> tuple[dict[str, Kernel], Tree]:
            cache = self.evaluator.look(num_steps, x, latents, {}, self.problems)
            return self.evaluator.kernels(num_steps, x, cache), cache

        with torch.no_grad():
            move = self.proposal.start(
                Start(laws, draws, latents, self.problems, self.twist.offers_start, look)
            )
        cache = self.evaluator.look(num_steps, move.x, latents, {}, self.problems)
        weights = cache["log_psi"] - log_q
        if move.log_ratio is not None:
            weights = weights + move.log_ratio
        return self._first_state(move.x, latents, cache, weights)

    def _first_estimate(self, statement: Statement, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        """What the program is shown as x_0 while its latents are drawn."""
        needed = self.program.downstream - set(given)
        if not needed:
            return placeholder(statement, x)
        process, num_steps, size = statement.process, self.program.num_steps, len(x)
        denoised = process.kernel(x, num_steps, **statement.context).denoised
        self.evaluator.calls += Calls(network=size * process.calls(num_steps))
        return denoised.mean if x.is_floating_point() else denoised.sample()

    def _first_state(
        self, x: dict[str, Tensor], latents: dict[str, Tensor], cache: Tree, weights: Tensor
    ) -> Particles:
        num_particles, runs = self.axes[-1], self.axes[:-1]
        log_weights = self.settings.exponent * weights.reshape(self.axes)
        check_log_weights(log_weights, f"at step t = {self.program.num_steps}")
        own = torch.arange(num_particles, device=weights.device).expand(self.axes).contiguous()
        state = Particles(
            t=self.program.num_steps,
            x=self._unflatten(x),
            latents=self._unflatten(latents),
            log_weights=log_weights,
            log_norm=torch.zeros(runs, dtype=torch.float64, device=weights.device),
            roots=own,
            cache=self._unflatten(cache),
            mark=mark(self.program),
        )
        before = effective_sample_size(log_weights)
        never = torch.zeros(runs, dtype=torch.bool, device=weights.device)
        nan = torch.full(runs, math.nan, dtype=torch.float64, device=weights.device)
        return self._record(state, before, nan, never, own, nan)

    # -------------------------------------------------------------------------------- t -> t - 1

    def step(self, state: Particles) -> Particles:
        """Resample if asked for, move, look, weigh."""
        t, x, cache = state.t, self._flatten(state.x), self._flatten(state.cache)
        kernels = self.evaluator.kernels(t, x, cache)
        prepaid = self.proposal.prepay(t, x, kernels, cache)
        if prepaid is not None:
            cache = {**cache, "prepaid": self.settings.exponent * prepaid}
            paid = state.log_weights + cache["prepaid"].reshape(self.axes)
            state = replace(state, log_weights=paid, cache=self._unflatten(cache))
        ess = effective_sample_size(state.log_weights)
        where = self._runs_to_resample(ess, kernels)
        khat, acceptance = torch.full_like(ess, math.nan), torch.full_like(ess, math.nan)
        ancestors = torch.arange(self.axes[-1], device=ess.device).expand(self.axes).contiguous()
        if bool(where.any()):
            khat = torch.where(where, pareto_khat(state.log_weights), khat)
            drawn = resample(state.log_weights, self.settings.resampler)
            ancestors = torch.where(where[..., None], drawn, ancestors)
            state = state.select(ancestors, where)
        moves = self.settings.rejuvenation
        if moves is not None and t % moves.every == 0:
            state, acceptance = self._rejuvenate(state, moves)
        if bool(where.any()) or moves is not None:
            x, cache = self._flatten(state.x), self._flatten(state.cache)
            kernels = self.evaluator.kernels(t, x, cache)
        state = self._advance(state, x, kernels, cache)
        return self._record(state, ess, khat, where, ancestors, acceptance)

    def _runs_to_resample(self, ess: Tensor, kernels: dict[str, Kernel]) -> Tensor:
        """Runs whose weights are too uneven; none where copies could never part again."""
        if all(is_deterministic(k.law) for k in kernels.values()):
            return torch.zeros_like(ess, dtype=torch.bool)
        bound = self.settings.ess_threshold * self.axes[-1]
        return ess < bound * (1 - 1e-9)

    def _advance(
        self, state: Particles, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree
    ) -> Particles:
        t, latents = state.t, self._flatten(state.latents)
        with torch.no_grad():
            move = self.proposal.move(t, x, kernels, cache)
        after = move.seen
        if after is None:
            after = self.evaluator.look(t - 1, move.x, latents, cache["memory"], self.problems)
        increment = after["log_psi"] - cache["log_psi"]
        if move.log_ratio is not None:
            increment = increment + move.log_ratio
        increment = self.settings.exponent * increment - cache.get("prepaid", 0.0)
        due, after = self._hold_back(t, increment, cache, after)
        log_weights = state.log_weights + due.reshape(self.axes)
        check_log_weights(log_weights, f"at step t = {t - 1}")
        return replace(
            state,
            t=t - 1,
            x=self._unflatten(move.x),
            cache=self._unflatten(after),
            log_weights=log_weights,
        )

    def _hold_back(
        self, t: int, increment: Tensor, cache: Tree, after: Tree
    ) -> tuple[Float64[Tensor, " particle"], Tree]:
        """What is due now of a log-weight's change, and a cache that knows what is still owed."""
        if not self.settings.smoothing:
            return increment, after
        total = increment + cache.get("owed", 0.0)
        share = self.settings.smoothing if t > 1 else 0.0
        owed = torch.where(total.isneginf(), 0.0, share * total)  # what is lost is lost now
        return total - owed, {**after, "owed": owed}

    def _rejuvenate(
        self, state: Particles, moves: Rejuvenation
    ) -> tuple[Particles, Float64[Tensor, "*runs"]]:
        """Moves the latents of all runs."""
        x, latents, cache = (self._flatten(v) for v in (state.x, state.latents, state.cache))
        latents, cache, accepted = moves.move(
            self.evaluator, state.t, x, latents, cache, self.problems
        )
        state = replace(state, latents=self._unflatten(latents), cache=self._unflatten(cache))
        return state, accepted.reshape(self.axes).mean(-1)

    # ---------------------------------------------------------------------------------- records

    def _record(
        self,
        state: Particles,
        ess: Tensor,
        khat: Tensor,
        where: Tensor,
        ancestors: Tensor,
        acceptance: Tensor,
    ) -> Particles:
        weights = normalise(state.log_weights)
        by_root = torch.zeros_like(weights).scatter_add(-1, state.roots, weights)
        step = Step(
            t=state.t,
            ess=ess,
            khat=torch.fmax(khat, pareto_khat(state.log_weights)) if state.t == 0 else khat,
            max_weight=weights.max(-1).values,
            resampled=where,
            ancestors=ancestors,
            num_roots=_count_roots(state.roots),
            effective_roots=1.0 / by_root.square().sum(-1),
            log_evidence=state.log_evidence,
            log_weights=state.log_weights,
            calls=self.evaluator.take_calls(),
            acceptance=acceptance,
        )
        rng = stream_states(state.log_weights.device)
        return replace(state, history=(*state.history, step), rng=rng)

    def _flatten(self, tree: Tree) -> Tree:
        return map_tree(lambda leaf: leaf.flatten(0, len(self.axes) - 1), tree)

    def _unflatten(self, tree: Tree) -> Tree:
        return map_tree(lambda leaf: leaf.reshape(*self.axes, *leaf.shape[1:]), tree)


def refuse_flows(program: Program, settings: Settings) -> None:
    """Where no transition has any variance, resampling makes copies that can never part again."""
    processes = program.processes
    if settings.ess_threshold and all(process.deterministic for process in processes.values()):
        raise ValueError(
            f"no transition of {sorted(processes)} has any variance (eta = 0, or the ODE of a "
            "Flow), so copies of a particle would stay copies: take eta > 0, or the SDE with the "
            "same marginals, Flow(..., noise='memoryless'). To weigh nothing but the source x_T "
            "(importance sampling), say ess_threshold=0"
        )


def _count_roots(roots: Tensor) -> Tensor:
    alive = torch.zeros_like(roots, dtype=torch.bool).scatter(-1, roots, True)
    return alive.sum(-1)
