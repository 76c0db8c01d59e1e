r"""A model and its guide, walked together and walked again.

At every step the networks of both are asked once (a guide that shares the model's evaluation asks
only for what it adds), and

.. math:: \log \frac{q(x_{t-1} \mid x_t)}{p(x_{t-1} \mid x_t)}

is taken at a state that anyone may have drawn: the guide, the model, or data that were noised.
States are constants; gradients flow through the densities alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from pyro import poutine
from torch import Tensor

from smcdiff.dissection import placeholder
from smcdiff.execution import Execution, Statement
from smcdiff.particles import Calls, flatten_tree
from smcdiff.process import Context, Process, Tree, is_deterministic
from smcdiff.program import Program

from . import ranks
from .differences import log_quotients, usable
from .guided import GuidedProposal
from .streams import stream_untouched
from .trajectories import Laws, Opening, Plan, States, Trajectories


class Pair:
    """A model and its guide, taken apart for the same arguments.

    Raises:
        ValueError: sites do not match; the model would train; a latent is nobody's to propose.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        per_problem: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        self.model = Program(model, args, kwargs, per_problem)
        self.proposal = GuidedProposal(guide)
        self.proposal.prepare(self.model)
        self.guide = self.proposal.program
        self.calls = Calls()
        missing = self.model.downstream - set(self.guide.latents)
        if missing:
            raise ValueError(
                f"latents {sorted(missing)} depend on a process and are drawn before it: the guide "
                "must sample them, from laws of its own"
            )

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    def refuse_trainable(self) -> None:
        """The model's networks are frozen: what they have learned is the prior."""
        batch = self.model.num_problems or 1
        problems = self._problems(batch)
        latents = self.draw_latents(batch, problems)
        with torch.enable_grad(), poutine.trace(param_only=True) as seen:
            opening = self.open(self.model, latents, problems, batch)
            x = {m: law.mean.detach() for m, law in opening.laws.items()}
            evaluations = self._evaluate(self.model, self.num_steps, x, opening.contexts)
        own = sorted(seen.trace.nodes)
        tensors = {name: flatten_tree(tree)[0].values() for name, tree in evaluations.items()}
        moving = [name for name, found in tensors.items() if any(v.requires_grad for v in found)]
        if own or moving:
            raise ValueError(
                f"the model would train ({', '.join(own + moving)}), and the prior must stay as it "
                "is: freeze its networks with requires_grad_(False) (train=False does so), give it "
                "no pyro.param, and let the guide have a copy, as in Finetuned(prior)"
            )

    def parameters(self) -> dict[str, Tensor]:
        """The guide's parameters by name, unconstrained: what a run of it meets."""
        batch = (self.model.num_problems or 1) * ranks.place()[1]
        plan = Plan(self.num_steps, lambda q, p: q)
        with torch.no_grad(), stream_untouched(), poutine.trace(param_only=True) as seen:
            self.walk(plan, batch, ())
        self.take_calls()
        return leaves(seen.trace)

    def take_calls(self) -> Calls:
        """The calls since the last time this was asked."""
        calls, self.calls = self.calls, Calls()
        return calls

    def blame(self, walked: "Trajectories") -> str:
        """Says where a trajectory's residual ceased to be a number."""
        for t, ratio in walked.ratios.items():
            if not bool(ratio.isfinite().all()):
                return (
                    f"the guide's transition at step t = {t} has log-probability "
                    f"{ratio[~ratio.isfinite()].tolist()[0]}: lower its learning rate, or clip"
                )
        if not bool(walked.at_start.isfinite().all()):
            return "the guide's start or latents have no finite log-probability"
        execution = self._at_data(walked)
        for name in execution.sites:
            values = execution.log_prob(name)
            if not bool(values.isfinite().all()):
                return (
                    f"site {name!r} has log-probability {float(values[~values.isfinite()][0])} at "
                    "x_0: a reward must be positive, so give floor=..., such as -50"
                )
        return "log Z is not finite"

    # ----------------------------------------------------------------------------- before the walk

    def draw_latents(self, batch: int, problems: Tensor | None) -> dict[str, Tensor]:
        """The guide's latents, and the model's own where the guide has none."""
        values: dict[str, Tensor] = {}
        with torch.no_grad():
            if self.guide.latents:
                values, _ = self.proposal.latents(batch, problems)
            if set(self.model.latents) - set(values):
                execution = self.model.execute(_at_rest, values, batch, problems)
                values = {n: execution.sites[n].value for n in self.model.latents}
        return values

    def open(
        self, program: Program, latents: Mapping[str, Tensor], problems: Tensor | None, batch: int
    ) -> Opening:
        """Runs model or guide on the latents; with a graph if gradients are enabled."""
        laws: Laws = {}
        contexts: dict[str, dict[str, Any]] = {}

        def state(statement: Statement) -> Tensor:
            name, process = statement.name, statement.process
            law = process.initial(**statement.context)
            expanded = law.expand(torch.Size(statement.batch))
            laws.update(process.split_law(name, expanded))
            contexts[name] = statement.context
            return placeholder(statement, expanded.mean)

        given = {n: latents[n] for n in program.latents}
        execution = program.execute(state, given, batch, problems)
        return Opening(laws, contexts, execution.log_joint(set(self.guide.latents)))

    @torch.no_grad()
    def log_likelihood(self, walked: Trajectories) -> tuple[Tensor, Tensor]:
        """The model's log-density at x_0: of what is observed, and of the guide's latents."""
        execution = self._at_data(walked)
        self.calls += Calls(program=walked.size)
        seen = execution.log_joint(set(execution.sites) - set(self.model.latents))
        return seen, execution.log_joint(set(self.guide.latents))

    @torch.no_grad()
    def _at_data(self, walked: Trajectories) -> Execution:
        x, latents = self.joined(walked.x[0]), walked.latents
        return self.model.execute(lambda s: x[s.name], latents, walked.size, walked.problems)

    def joined(self, x: States) -> dict[str, Tensor]:
        """The model's states by process."""
        return {n: p.join(n, {m: x[m] for m in p.members(n)}) for n, p in self._of(self.model)}

    # -------------------------------------------------------------------------------- the walk

    def walk(
        self,
        plan: Plan,
        total: int,
        tracked: Collection[int],
        keep: Collection[int] = (),
    ) -> Trajectories:
        """Walks a batch of ``total`` trajectories down to x_0.

        Args:
            tracked: the steps t -> t - 1 whose densities are to have a graph.
            keep: the steps at which the model's evaluations are kept.
        """
        problems = self._problems(total)
        latents = plan.latents
        if latents is None:
            latents = self.draw_latents(total, problems)
        latents, problems = ranks.own(latents, total), ranks.own(problems, total)
        size = total // ranks.place()[1]
        with torch.no_grad():
            model = self.open(self.model, latents, problems, size)
        with torch.set_grad_enabled(bool(tracked)):
            guide = self.open(self.guide, latents, problems, size)
        x, at_start, behind = self._start(plan, total, model, guide)
        walked = Trajectories({plan.begin: x}, latents, problems, at_start, {}, behind, {})
        for t in range(plan.begin, 0, -1):
            x, behind = self._step(plan, total, t, walked, (model, guide), t in tracked, t in keep)
            walked.x[t - 1] = x
            walked.log_behaviour.add_(behind)
        return walked

    def ratios_again(
        self,
        walked: Trajectories,
        steps: Collection[int],
        start: bool,
        compare: Callable[[int, Laws, Laws], Float64[Tensor, " particle"]] | None = None,
    ) -> Float64[Tensor, " particle"]:
        """log q - log p of some steps (and of the start) of recorded trajectories, with a graph;
        at the recorded x_{t-1}, or by ``compare``, of t and the laws of guide and model."""
        latents, problems = walked.latents, walked.problems
        with torch.no_grad():
            model = self.open(self.model, latents, problems, walked.size)
        guide = self.open(self.guide, latents, problems, walked.size)
        total = walked.at_start.new_zeros(walked.size)
        if start and self.num_steps in walked.x:
            total = total + log_quotients(guide.laws, model.laws, walked.x[self.num_steps])
            total = total + guide.log_latents
        for t in steps:
            evaluations = walked.evaluations.get(t) or self._unsteered(t, walked.x[t], model)
            p, q = self._laws(t, walked.x[t], (model, guide), evaluations)
            total = total + (compare(t, q, p) if compare else log_quotients(q, p, walked.x[t - 1]))
        return total

    def _start(
        self, plan: Plan, total: int, model: Opening, guide: Opening
    ) -> tuple[States, Tensor, Tensor]:
        """x_n, log q - log p of it and of the latents, and log q - log b."""
        if plan.begin < self.num_steps:
            x = ranks.own(dict(plan.given[plan.begin]), total)
            first = next(iter(x.values()))
            zero = torch.zeros(len(first), dtype=torch.float64, device=first.device)
            return x, zero, zero.clone()
        q = guide.laws
        laws = {m: plan.law(q[m] if usable(q[m]) else law, law) for m, law in model.laws.items()}
        x = {m: ranks.draw(law).detach() for m, law in laws.items()}
        x = self._follow(plan, total, plan.begin, x, model.laws)
        behind = log_quotients(guide.laws, laws, x).detach()
        return x, log_quotients(guide.laws, model.laws, x) + guide.log_latents, behind

    def _step(
        self,
        plan: Plan,
        total: int,
        t: int,
        walked: Trajectories,
        openings: tuple[Opening, Opening],
        tracked: bool,
        keep: bool,
    ) -> tuple[States, Tensor]:
        """x_{t-1} and log q - log b of it; log q - log p goes into the record."""
        x = walked.x[t]
        evaluations = self._unsteered(t, x, openings[0])
        if keep:
            walked.evaluations[t] = evaluations
        with torch.set_grad_enabled(tracked):
            p, q = self._laws(t, x, openings, evaluations)
        with torch.no_grad():
            laws = {m: plan.law(q[m] if usable(q[m]) else law, law) for m, law in p.items()}
            after = {m: ranks.draw(law).to(x[m].dtype) for m, law in laws.items()}
            after = self._follow(plan, total, t - 1, after, p)
            behind = log_quotients(q, laws, after)
        with torch.set_grad_enabled(tracked):
            walked.ratios[t] = log_quotients(q, p, after)
        return after, behind

    def _laws(
        self, t: int, x: States, openings: tuple[Opening, Opening], evaluations: Tree
    ) -> tuple[Laws, Laws]:
        """The transitions of model and guide out of x_t."""
        model, guide = openings
        with torch.no_grad():
            p = self._kernels(self.model, t, x, model.contexts, evaluations)
        origins = [(m.members(n), m, n) for n, m in self._of(self.model)]
        shared = {sites: (m, model.contexts[n], evaluations[n]) for sites, m, n in origins}
        own = self._evaluate(self.guide, t, x, guide.contexts, shared)
        return p, self._kernels(self.guide, t, x, guide.contexts, own)

    @torch.no_grad()
    def _unsteered(self, t: int, x: States, model: Opening) -> Tree:
        """The outputs of the model's networks at x_t."""
        return self._evaluate(self.model, t, x, model.contexts)

    def _evaluate(
        self,
        program: Program,
        t: int,
        x: States,
        contexts: dict[str, Any],
        shared: Mapping[tuple[str, ...], tuple[Process, Context, Tree]] | None = None,
    ) -> Tree:
        """The networks' outputs at x_t, built on the model's of the same sites if they can be."""
        evaluations = {}
        for name, process in self._of(program):
            state = process.join(name, {m: x[m] for m in process.members(name)})
            context = contexts[name]
            other, theirs, evaluation = (shared or {}).get(process.members(name), (None, {}, None))
            if other is not None and process.extends(other, theirs, context):
                evaluations[name] = process.extend(evaluation, state, t, **context)
            else:
                evaluations[name] = process.evaluate(state, t, **context)
                self.calls += Calls(network=len(state) * process.calls(t))
        return evaluations

    def _kernels(
        self, program: Program, t: int, x: States, contexts: dict[str, Any], evaluations: Tree
    ) -> Laws:
        laws: Laws = {}
        for name, process in self._of(program):
            state = process.join(name, {m: x[m] for m in process.members(name)})
            law = process.kernel(state, t, evaluations[name], **contexts[name]).law
            laws |= process.split_law(name, law)
        return laws

    @staticmethod
    def _follow(plan: Plan, total: int, t: int, drawn: States, laws: Laws) -> States:
        """The given states where there are any; a point cannot be anywhere else."""
        if t not in plan.given:
            return drawn
        given, follows = ranks.own(dict(plan.given[t]), total), ranks.own(plan.follows, total)
        states = {}
        for member, x in drawn.items():
            if is_deterministic(laws[member]):
                states[member] = x
            elif follows is None:
                states[member] = given[member].to(x.dtype)
            else:
                mask = follows.reshape(-1, *(1,) * (x.dim() - 1))
                states[member] = torch.where(mask, given[member].to(x.dtype), x)
        return states

    def _problems(self, total: int) -> Tensor | None:
        number = self.model.num_problems
        if number is None:
            return None
        return torch.arange(number).repeat_interleave(total // number)

    @staticmethod
    def _of(program: Program) -> list[tuple[str, Process]]:
        return list(program.processes.items())


def leaves(trace: poutine.Trace) -> dict[str, Tensor]:
    """The unconstrained parameters that a run has met, by name."""
    values = {name: node["value"] for name, node in trace.nodes.items()}
    return {name: value.unconstrained() for name, value in values.items() if value is not None}


def _at_rest(statement: Statement) -> Tensor:
    """A state that nothing looks at."""
    law = statement.process.initial(**statement.context)
    return placeholder(statement, law.mean.expand(*statement.batch, *law.event_shape))
