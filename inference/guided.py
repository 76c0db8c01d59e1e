r"""Guides as proposals: another program with the same process sites.

A guide's processes are stepwise: their laws propose :math:`x_T` and every transition, and its
ordinary latents propose the model's. Whatever a guide has learned, the weights correct it; it must
only dominate the model.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.dissection import draw, placeholder
from smcdiff.execution import Statement
from smcdiff.laws import log_density
from smcdiff.process import Kernel, Tree, is_deterministic
from smcdiff.program import Program
from smcdiff.twist import View

from .proposals import Move, Proposal, Start, log_ratio, mismatched, sample_as
from .streams import stream_untouched


class GuidedProposal(Proposal):
    """Proposes from the processes and latents of a guide.

    Args:
        guide: a Pyro callable that takes the model's arguments.
    """

    def __init__(self, guide: Callable[..., Any]) -> None:
        self.guide = guide

    def prepare(self, program: Program) -> None:
        """Takes the guide apart and matches its sites with the model's."""
        self.model = program
        room = program.max_plate_nesting
        self.program = Program(self.guide, program.args, program.kwargs, program.per_problem, room)
        wanted, offered = _members(program), _members(self.program)
        if set(wanted) != set(offered):
            raise ValueError(
                f"the guide's process sites {sorted(offered)} do not match the model's "
                f"{sorted(wanted)}: a guide declares a process for each, with the same name. A "
                "guide that samples x_T, ..., x_0 by itself is importance sampling over whole "
                "paths: pyro.infer.Importance(model, guide)"
            )
        if wanted != offered:
            raise ValueError(
                f"the guide's processes have event shapes {offered}, the model's {wanted}: a guide "
                "proposes the model's own states"
            )
        if self.program.num_steps != program.num_steps:
            raise ValueError(
                f"the guide has {self.program.num_steps} steps and the model {program.num_steps}: "
                "both must be built on the same grid"
            )
        extra = set(self.program.latents) - set(program.latents)
        if extra:
            raise ValueError(f"the guide samples {sorted(extra)}, which the model does not have")
        if self.program.downstream:
            raise ValueError(
                f"latents {sorted(self.program.downstream)} of the guide depend on a process: they "
                "are drawn before x_T, so their law may depend on data and other latents only"
            )
        self._check_plates()

    def _check_plates(self) -> None:
        """Whatever the guide proposes lies in the plates in which the model has it."""
        if self.program.max_plate_nesting > self.model.max_plate_nesting:
            raise ValueError(
                f"the guide nests {self.program.max_plate_nesting} plates and the model "
                f"{self.model.max_plate_nesting}: declare what the guide samples in no other "
                "plates than the model's"
            )
        wanted, offered = _shapes(self.model), _shapes(self.program)
        for name, shape in offered.items():
            if shape != wanted[name]:
                raise ValueError(
                    f"the guide's {name!r} has shape {shape}, plates included, and the model's "
                    f"{wanted[name]}: declare it in the same plates"
                )

    def latents(self, batch: int, problems: Tensor | None) -> tuple[dict[str, Tensor], Any]:
        with torch.no_grad():
            execution = self.program.execute(at_start, {}, batch, problems)
            values = {n: execution.sites[n].value for n in self.program.latents}
            return values, execution.log_joint(set(values))

    def start(self, start: Start) -> Move:
        """x_T from the guide's processes."""
        laws: dict[str, Distribution] = {}
        draws: dict[str, Tensor] = {}
        members = self._split(self.model, start.draws)

        def state(statement: Statement) -> Tensor:
            name, process = statement.name, statement.process
            law = process.initial(**statement.context)
            laws[name] = law if is_deterministic(law) else law.expand(statement.batch)
            like = members[process.members(name)[0]]
            draws[name] = draw(law, statement.batch).to(like.dtype)
            return placeholder(statement, draws[name])

        batch = len(next(iter(start.draws.values())))
        latents = {n: start.latents[n] for n in self.program.latents}
        with torch.no_grad():
            self.program.execute(state, latents, batch, start.problems)
        return self._score(start.laws, laws, draws)

    def observe(self, view: View) -> Tree:
        """Evaluates the guide's processes, on top of the model's network outputs if they can."""
        evaluations: dict[str, Tree] = {}
        contexts: dict[str, Any] = {}
        members = self._split(self.model, {n: x.detach() for n, x in view.x.items()})

        def state(statement: Statement) -> Tensor:
            name, process = statement.name, statement.process
            x = process.join(name, {m: members[m] for m in process.members(name)})
            shared = self._shared(statement, view)
            if shared is None:
                evaluations[name] = process.evaluate(x, view.t, **statement.context)
                view.spend(view.batch * process.calls(view.t))
            else:
                evaluations[name] = process.extend(shared, x, view.t, **statement.context)
            moving = self.program.sources[name].particle_context
            contexts[name] = {k: statement.context[k] for k in moving}
            return placeholder(statement, x)

        latents = {n: view.latents[n] for n in self.program.latents}
        self.program.execute(state, latents, view.batch, view.problems)
        return {"evaluation": evaluations, "context": contexts}

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        own, members = cache["proposal"], self._split(self.model, x)
        laws = {}
        for name, process in self.program.processes.items():
            joined = process.join(name, {m: members[m] for m in process.members(name)})
            context = {**self.program.sources[name].shared_context, **own["context"][name]}
            laws[name] = process.kernel(joined, t, own["evaluation"][name], **context).law
        draws = {}
        for name, law in laws.items():
            like = members[self.program.processes[name].members(name)[0]]
            draws[name] = sample_as(law, like)
        return self._score({n: k.law for n, k in kernels.items()}, laws, draws)

    def _score(
        self,
        model_laws: dict[str, Distribution],
        guide_laws: dict[str, Distribution],
        draws: dict[str, Tensor],
    ) -> Move:
        """The draws as the model's states, and log p - log q."""
        members = self._split(self.program, draws)
        x = {
            name: process.join(name, {m: members[m] for m in process.members(name)})
            for name, process in self.model.processes.items()
        }
        for name, law in model_laws.items():
            if is_deterministic(law):  # a point is the model's own, wherever the guide would put it
                x[name] = law.mean.to(x[name].dtype).expand_as(x[name])
        alike = [n for n in model_laws if n in guide_laws]
        ratios = [log_ratio(model_laws[n], guide_laws[n], x[n]) for n in alike]
        ours = {n: law for n, law in model_laws.items() if n not in alike}  # a Team's, perhaps
        theirs = {n: law for n, law in guide_laws.items() if n not in alike}
        points = [is_deterministic(law) for law in (*ours.values(), *theirs.values())]
        if all(points):
            ratios += [log_ratio(law, law, x[n]) for n, law in ours.items()]
        elif any(points):
            raise mismatched()
        else:
            ratios += [log_density(law, x[n]) for n, law in ours.items()]
            ratios += [-log_density(law, draws[n]) for n, law in theirs.items()]
        return Move(x, torch.stack(ratios).sum(0))

    def _shared(self, statement: Statement, view: View) -> Tree | None:
        """The model's evaluation, at the same sites, that this guide process builds on."""
        process, sites = statement.process, statement.process.members(statement.name)
        for name, other in self.model.processes.items():
            if other.members(name) == sites:  # a prior may be declared twice, at two states
                if process.extends(other, view.contexts[name], statement.context):
                    return view.evaluations[name]
        return None

    @staticmethod
    def _split(program: Program, x: dict[str, Tensor]) -> dict[str, Tensor]:
        members: dict[str, Tensor] = {}
        for name, process in program.processes.items():
            members |= process.split(name, x[name])
        return members


def _members(program: Program) -> dict[str, tuple[int, ...]]:
    """The event shapes by site."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, process in program.processes.items():
        parts = process.split(name, torch.zeros(process.event_shape))
        shapes |= {member: tuple(part.shape) for member, part in parts.items()}
    return shapes


@torch.no_grad()
def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """The shapes of x_0 and of the latents by site, plates included."""
    with stream_untouched():
        values = program.execute(at_start, {}, 1).values()
    for name, process in program.processes.items():
        values |= process.split(name, values.pop(name))
    return {name: tuple(value.shape[1:]) for name, value in values.items()}


def at_start(statement: Statement) -> Tensor:
    """A draw of x_T, or something shaped like x_0 where that has another shape or kind."""
    x = draw(statement.process.initial(**statement.context), statement.batch)
    return placeholder(statement, x)
