r"""One look at the particles: network, program and twist, each state once, in chunks.

Forward pass, program and backward pass run chunk by chunk, so that a chunk's activations are the
most that is ever held. Random numbers are drawn for all particles at once, so answers do not depend
on the chunk size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smcdiff.execution import Execution, Statement
from smcdiff.laws import base_law
from smcdiff.particles import Calls, map_tree
from smcdiff.process import Kernel, Tree, check_finite
from smcdiff.program import Program, State
from smcdiff.twist import Twist, TwistValue, View

from .proposals import Proposal

FLOOR = (
    -1e6
)  # log psi_t of a state whose look-ahead violates a hard constraint: finite, as it must be


@dataclass(frozen=True)
class Batch:
    """Flat particles that are evaluated together.

    Attributes:
        noise: behind the draws of x_0, with shape ``(draw, particle, ...)``.
        given: network outputs to be used instead of asking again.
    """

    x: dict[str, Tensor]
    latents: dict[str, Tensor]
    memory: dict[str, Tensor]
    problems: Tensor | None
    noise: dict[str, Tensor]
    given: Tree | None

    @property
    def size(self) -> int:
        return next(iter(self.x.values())).shape[0]

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the particles."""

        def cut(tree: Tree) -> Tree:
            return map_tree(lambda v: v[start:stop], tree)

        noise = {n: v[:, start:stop] for n, v in self.noise.items()}
        x, latents, memory = cut(self.x), cut(self.latents), cut(self.memory)
        return Batch(x, latents, memory, cut(self.problems), noise, cut(self.given))

    def tracked(self) -> "Batch":
        """The same, with autograd following the continuous states."""
        x = {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in self.x.items()}
        return replace(self, x=x)

    def repeated(self, copies: int) -> dict[str, Tensor]:
        """The latents, once per estimate of x_0."""
        return {n: v.repeat(copies, *(1,) * (v.dim() - 1)) for n, v in self.latents.items()}

    def repeated_problems(self, copies: int) -> Tensor | None:
        return None if self.problems is None else self.problems.repeat(copies)


@dataclass
class Evaluator:
    """Evaluates flat particles ``(particle, ...)`` and counts what that costs.

    Attributes:
        keeps_draws: whether the noise behind the draws of x_0 is cached, for :meth:`look`
            ``again``.
        calls: evaluations since :meth:`take_calls`, one per particle.
    """

    program: Program
    twist: Twist
    proposal: Proposal
    chunk_size: int | None = None
    keeps_draws: bool = False
    calls: Calls = field(default_factory=Calls)

    def look(
        self,
        t: int,
        x: dict[str, Tensor],
        latents: dict[str, Tensor],
        memory: dict[str, Tensor],
        problems: Tensor | None,
        again: Tree | None = None,
    ) -> dict[str, Tree]:
        """Everything that belongs to the particles because they are at ``x``: the engine's cache.

        Args:
            again: the cache of an earlier look at the same ``x``, whose network outputs and draws
                are used again (for other latents).

        Returns:
            ``log_psi`` and, at t >= 1, ``evaluation`` and ``context`` by process, the twist's own
            tensors (``twist``, ``memory``) and the proposal's (``proposal``).
        """
        if again is not None:
            whole = self._again(x, latents, memory, problems, again)
        else:
            noise = self._noise(t, x) if t > 0 else {}
            whole = Batch(x, latents, memory, problems, noise, None)
        size = self.chunk_size or whole.size
        chunks = [whole.rows(start, start + size) for start in range(0, whole.size, size)]
        cache = concatenate([self._look_at(t, chunk) for chunk in chunks])
        if self.keeps_draws and t > 0:
            cache["noise"] = {n: v.transpose(0, 1) for n, v in whole.noise.items()}
        return cache

    def log_psi(
        self,
        t: int,
        x: dict[str, Tensor],
        latents: dict[str, Tensor],
        memory: dict[str, Tensor],
        problems: Tensor | None,
        again: Tree,
    ) -> Tensor:
        """log psi of an earlier look at other latents, differentiable in the latents."""
        if self.twist.measures_network:
            raise ValueError(
                "this twist differentiates the network itself, and has no gradient in the latents: "
                "use covariance='scalar', or Rejuvenation('random_walk')"
            )
        with torch.enable_grad():
            view = self._view(t, self._again(x, latents, memory, problems, again))
            return self._with_upstream(view, self.twist.evaluate(view).log_psi)

    def _again(
        self,
        x: dict[str, Tensor],
        latents: dict[str, Tensor],
        memory: dict[str, Tensor],
        problems: Tensor | None,
        again: Tree,
    ) -> Batch:
        """The particles of an earlier look, with its draws and its network outputs."""
        noise = {n: v.transpose(0, 1) for n, v in again.get("noise", {}).items()}
        given = None if self.twist.measures_network else again["evaluation"]
        return Batch(x, latents, memory, problems, noise, given)

    def kernels(self, t: int, x: Mapping[str, Tensor], cache: Tree) -> dict[str, Kernel]:
        """The transitions out of ``x``, rebuilt from the cache without a network call."""
        kernels = {}
        with torch.no_grad():
            for name, process in self.program.processes.items():
                shared = self.program.sources[name].shared_context
                context = {**shared, **cache["context"][name]}
                kernels[name] = process.kernel(x[name], t, cache["evaluation"][name], **context)
        return kernels

    def take_calls(self) -> Calls:
        """The calls since the last time this was asked."""
        calls, self.calls = self.calls, Calls()
        return calls

    # --------------------------------------------------------------------------------- one chunk

    def _look_at(self, t: int, batch: Batch) -> dict[str, Tree]:
        if t == 0:
            return {"log_psi": self._likelihood(batch)}
        track = self.twist.needs_gradient and batch.given is None
        with torch.set_grad_enabled(track or self.twist.needs_program_gradient):
            if track:
                batch = batch.tracked()
            view = self._view(t, batch)
            if track:
                self._check_differentiable(view)
            value = self.twist.evaluate(view)
        with torch.no_grad():
            extra = self.proposal.observe(view)
        return map_tree(torch.Tensor.detach, self._cache(view, value, extra))

    def _likelihood(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            execution = self._execute(lambda s: batch.x[s.name], batch, 1)
            log_psi = execution.log_joint()
        if bool((log_psi.isnan() | log_psi.isposinf()).any()):
            raise ValueError(_blame(execution, 0))
        return log_psi

    def _view(self, t: int, batch: Batch) -> View:
        copies = 1 + self.twist.num_draws
        kernels: dict[str, Kernel] = {}
        evaluations: dict[str, Tree] = {}
        contexts: dict[str, dict[str, Any]] = {}

        def estimate(statement: Statement) -> Tensor:
            name = statement.name
            contexts[name] = self._context(statement, batch.size)
            with torch.set_grad_enabled(batch.x[name].requires_grad):
                evaluations[name] = self._evaluate(t, statement, batch, contexts[name])
                kernels[name] = statement.process.kernel(
                    batch.x[name], t, evaluations[name], **contexts[name]
                )
                estimates = _estimates(kernels[name], batch.noise.get(name), copies)
            if self.twist.needs_program_gradient and not estimates.requires_grad:
                estimates.requires_grad_(estimates.is_floating_point())
            return estimates

        execution = self._execute(estimate, batch, copies)
        return View(
            program=self.program,
            t=t,
            batch=batch.size,
            x=batch.x,
            latents=batch.latents,
            kernels=kernels,
            evaluations=evaluations,
            contexts=contexts,
            execution=execution,
            num_estimates=copies,
            memory=batch.memory,
            problems=batch.problems,
            spend=lambda n: self._spend(Calls(network=n)),
            backward=lambda n: self._spend(Calls(gradient=n)),
        )

    def _execute(self, state: State, batch: Batch, copies: int) -> Execution:
        """The program on some estimates of x_0 per particle."""
        self._spend(Calls(program=copies * batch.size))
        latents, problems = batch.repeated(copies), batch.repeated_problems(copies)
        return self.program.execute(state, latents, copies * batch.size, problems)

    def _evaluate(
        self, t: int, statement: Statement, batch: Batch, context: dict[str, Any]
    ) -> Tree:
        """The network's output: this is the only place where a particle's state meets it."""
        name, process = statement.name, statement.process
        if batch.given is not None:
            return batch.given[name]
        evaluation = process.evaluate(batch.x[name], t, **context)
        self._spend(Calls(network=batch.size * process.calls(t)))
        check_finite(name, t, evaluation)
        return evaluation

    def _spend(self, calls: Calls) -> None:
        self.calls += calls

    def _context(self, statement: Statement, batch: int) -> dict[str, Any]:
        """The context of the particles themselves (not of the repeated estimates)."""
        source = self.program.sources[statement.name]
        own = {k: statement.context[k][:batch] for k in source.particle_context}
        return {**source.shared_context, **own}

    def _cache(self, view: View, value: TwistValue, extra: Tree) -> dict[str, Tree]:
        log_psi = self._with_upstream(view, value.log_psi).detach()
        if bool(log_psi.isnan().any()):
            raise ValueError(_blame(view.execution, view.t))
        moving = {n: self.program.sources[n].particle_context for n in view.contexts}
        return {
            "log_psi": torch.where(log_psi.isneginf(), FLOOR, log_psi),
            "evaluation": view.evaluations,
            "context": {n: {k: c[k] for k in moving[n]} for n, c in view.contexts.items()},
            "twist": value.cache,
            "memory": value.memory,
            "proposal": extra,
        }

    def _with_upstream(self, view: View, log_psi: Tensor) -> Tensor:
        """Adds the log p of latents upstream of all processes: the twist need not know of them."""
        upstream = set(self.program.latents) - self.program.downstream
        if not upstream:
            return log_psi.double()
        return log_psi.double() + view.execution.log_joint(upstream)[: view.batch]

    def _noise(self, t: int, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Noise for the draws of x_0: standard normal, or uniform where x_0 is discrete."""
        noise = {}
        for name, process in self.program.processes.items():
            plates = x[name].shape[: x[name].dim() - len(process.shape_at(t))]
            shape, device = (*plates, *process.event_shape), x[name].device
            if not x[name].is_floating_point():
                noise[name] = torch.rand(1 + self.twist.num_draws, *shape, device=device)
            elif self.twist.num_draws:
                noise[name] = torch.randn(
                    self.twist.num_draws, *shape, device=device, dtype=x[name].dtype
                )
        return noise

    def _check_differentiable(self, view: View) -> None:
        """A reward computed outside torch has no gradient: say so instead of ignoring it."""
        continuous = {n for n, v in view.x.items() if v.is_floating_point()}
        for name, site in self.program.likelihoods.items():
            if site.kind != "deterministic" and site.parents & continuous:
                if not view.execution.log_prob(name).requires_grad:
                    raise ValueError(
                        f"site {name!r} depends on {sorted(site.parents & continuous)} but has no "
                        "gradient (is it computed with NumPy, or detached?): write it in torch, "
                        "or use a twist without gradients, as in TwistedSMC(..., "
                        "proposal='kernel')"
                    )


def _estimates(kernel: Kernel, noise: Tensor | None, copies: int) -> Tensor:
    """Estimates of x_0 laid out draw by draw: the mean first, then draws (discrete: draws only)."""
    law = kernel.denoised
    if noise is not None and noise.shape[0] == copies:
        law = base_law(law)
        cumulative = law.probs.cumsum(-1)
        tokens = (cumulative < noise[..., None] * cumulative[..., -1:]).sum(-1)
        return tokens.clamp(max=cumulative.shape[-1] - 1).flatten(0, 1)
    mean: Tensor = law.mean
    if noise is None:
        return mean
    return torch.cat([mean[None], mean + law.stddev * noise]).flatten(0, 1)


def _blame(execution: Execution, t: int) -> str:
    for name, site in execution.sites.items():
        log_prob = execution.log_prob(name)
        for word, wrong in (("NaN", log_prob.isnan()), ("infinite", log_prob.isposinf())):
            if not site.deterministic and bool(wrong.any()):
                return (
                    f"site {name!r} has log-probability {word} at step t = {t}: mask or clamp "
                    "whatever is undefined there; -inf is the way to say impossible"
                )
    return f"the log-twist is NaN at step t = {t}"


def concatenate(parts: list[Tree]) -> Tree:
    """Chunks of a tree, joined along the particle axis."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], dict):
        return {k: concatenate([p[k] for p in parts]) for k in parts[0]}
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def choose(where: Tensor, left: Tree, right: Tree) -> Tree:
    """The particles of one tree or of another, which may have more parts."""
    if isinstance(left, dict):
        return {name: choose(where, left[name], right[name]) for name in left}
    if not isinstance(left, Tensor):
        return left
    return torch.where(where.reshape(-1, *(1,) * (left.dim() - 1)), left, right)
