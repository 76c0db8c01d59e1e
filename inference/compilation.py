r"""Inference compilation: a guide learns from what the program itself simulates.

Run forwards, a program draws a trajectory, its latents and the data that they would cause. Given
those data, the trajectory is an *exact* posterior draw; so a guide that reads the data, and gives
such draws a high density,

.. math:: \min_q \; -E_{p(x_{T:0}, z, y)} \log q(x_{T:0}, z \mid y)
          = E_{p(y)} \mathrm{KL}(p(x_{T:0}, z \mid y) \,\|\, q(x_{T:0}, z \mid y)) + \text{const},

learns the posterior of every y at once (Le, Baydin & Wood 2017, arXiv 1610.09900; neural posterior
estimation). This divergence punishes a guide that misses a mode, which the weights of
``SMC(model, guide=guide)`` could not repair; relative trajectory balance can go on from there.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from pyro.optim import PyroOptim
from torch import Tensor

from smcdiff.arguments import check_names
from smcdiff.dissection import draw
from smcdiff.execution import Statement
from smcdiff.particles import Calls, map_tree
from smcdiff.predictive import Unobserved, with_arguments
from smcdiff.program import Program

from . import ranks
from .bridges import Bridges
from .guide_learner import GuideLearner, refuse_sizes
from .pair import Pair
from .resuming import mark
from .streams import Streams, restore_streams, stream_states, stream_untouched
from .trajectories import States, Trajectories


@dataclass(frozen=True)
class Simulations:
    """Draws of a program run forwards, one row each.

    Attributes:
        x: the states by t and member site.
        latents: the ordinary latents by site.
        data: what was drawn at the observed sites.
    """

    x: dict[int, States]
    latents: dict[str, Tensor]
    data: dict[str, Tensor]

    def select(self, rows: Int64[Tensor, " row"]) -> "Simulations":
        """Some of them."""
        tree = {"latents": self.latents, "data": self.data}
        some = map_tree(lambda v: v[rows.to(v.device)], tree)
        states = {t: map_tree(lambda v: v[rows.to(v.device)], x) for t, x in self.x.items()}
        return Simulations(states, some["latents"], some["data"])


@torch.no_grad()
def simulate(program: Program, number: int, ends_only: bool = False) -> Simulations:
    """Runs the program forwards: its processes step by step, then the sites that are observed.

    Args:
        number: of draws.
        ends_only: keep x_0 alone of the states.

    Raises:
        ValueError: the program has a factor, which says how good a draw is but not how to draw.
    """
    factors = sorted(n for n, each in program.likelihoods.items() if each.kind == "factor")
    if factors:
        raise ValueError(
            f"factors {factors} cannot be simulated: observe data through pyro.sample(..., obs=y), "
            "or learn by RelativeTrajectoryBalance, which takes any reward"
        )
    forward = copy.copy(program)
    forward.model = Unobserved()(program.model)
    times = [0] if ends_only else range(program.num_steps + 1)
    states: dict[int, States] = {t: {} for t in times}

    def keep(t: int, x: States) -> None:
        if t in states:
            states[t] |= x

    def walk(statement: Statement) -> Tensor:
        process, context = statement.process, statement.context
        x = draw(process.initial(**context), statement.batch)
        keep(process.num_steps, process.split(statement.name, x))
        for t in range(process.num_steps, 0, -1):
            x = process.kernel(x, t, **context).law.sample()
            keep(t - 1, process.split(statement.name, x))
        return x

    sites = forward.execute(walk, {}, number).sites
    seen = [n for n, each in program.likelihoods.items() if each.kind == "observed"]
    latents = {n: sites[n].value for n in program.latents}
    return Simulations(states, latents, {n: sites[n].value for n in seen})


class InferenceCompilation(GuideLearner[float]):
    """Trains a guide that is conditional on data by maximum likelihood of simulated trajectories.

    The arguments of :meth:`step` and :meth:`run` that hold data are examples of one problem, whose
    values do not matter. Under ``torchrun`` every process simulates all trajectories, and learns
    from its share of each update.

    Args:
        model: a Pyro callable with at least one process, and with data at observed sites only.
        guide: a Pyro callable that takes the same arguments and has the same process sites, and the
            ordinary latents that it wants to propose.
        optim: a ``pyro.optim`` optimiser of the guide's parameters.
        data: the arguments that hold data, each named as the site that observes it; or a mapping
            from arguments to sites.
        num_paths: trajectories that are simulated at once. A checkpoint does not hold them: they
            are simulated again from the random stream that it keeps.
        refresh: updates after which others are simulated (None: never).
        num_particles: trajectories per update, drawn from those, of all processes of ``torchrun``.
        subsample: learn from so many random steps of them only, scaled up (None: all steps).
        max_gradient_norm: gradients are scaled down to it.
        bridged: of the trajectories keep x_0 only, noise it anew in every update, and integrate out
            the noise of every step given both ends (Denker et al. 2024, arXiv 2406.01781), which is
            most of the gradients' variance. What the prior's own steps do not get right looks like
            data then: a beginning for guides with few ways to repair them, such as a ``Potential``,
            and for priors of many steps, to be followed by trajectories. Needs normal transitions;
            scales learn to be as much narrower as means have moved.

    Attributes:
        calls: of the prior's network, the simulations included.
        history: the loss of every update, -E[log q - log p]: zero for a guide that is the prior,
            and minus the information that data have on the trajectory at the posterior.

    Raises:
        ValueError: at the first update, if the model has factors or would train, an argument is no
            data, or the guide's sites do not match the model's.
    """

    kind = "smcdiff-1 compilation"

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        *,
        data: Sequence[str] | Mapping[str, str] = ("y",),
        num_paths: int = 4096,
        refresh: int | None = None,
        num_particles: int = 128,
        subsample: int | None = None,
        max_gradient_norm: float | None = None,
        bridged: bool = False,
    ) -> None:
        super().__init__(model, guide, optim, num_particles, max_gradient_norm)
        check_names("data", data)
        self.data = dict(data) if isinstance(data, Mapping) else {name: name for name in data}
        self.num_paths, self.refresh, self.subsample = num_paths, refresh, subsample
        self.bridged = bridged
        self.simulations: Simulations | None = None
        refuse_sizes(
            num_paths=num_paths, num_particles=num_particles, subsample=subsample, refresh=refresh
        )

    # ------------------------------------------------------------------------------- one update

    def _accumulate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        if self.simulations is None or (self.refresh and self.done % self.refresh == 0):
            self._simulate(args, kwargs)
        rows = torch.randint(self.num_paths, (self.num_particles,))
        own = self._log_ratio(ranks.own(rows, self.num_particles))
        ratio = ranks.gather(own.detach())
        if not bool(ratio.isfinite().all()):
            raise ValueError(
                f"update {self.done}: the guide has no finite log-density at "
                f"{int((~ratio.isfinite()).sum())} of {len(ratio)} simulated trajectories: lower "
                "its learning rate, or give max_gradient_norm"
            )
        (-own.sum() / len(ratio)).backward()
        return float(-ratio.mean())

    def _loss(self, record: float) -> float:
        return record

    @torch.enable_grad()
    def _log_ratio(self, rows: Int64[Tensor, " row"]) -> Float64[Tensor, " row"]:
        """log q - log p of simulated trajectories, from some of their steps."""
        assert self.simulations is not None
        some, zero = self.simulations.select(rows), torch.zeros(len(rows), dtype=torch.float64)
        times = _times(self.simulated.model)
        if self.subsample is not None and self.subsample < len(times):
            times = (torch.randperm(len(times))[: self.subsample] + 1).tolist()
        x, compare = some.x, None
        if self.bridged:
            bridges = Bridges(self.simulated, x[0], {*times, self.simulated.num_steps})
            x, compare = bridges.x, bridges.compare
        walked = Trajectories(x, some.latents, rows, zero, {}, zero, {})
        start = self.simulated.ratios_again(walked, [], start=True)
        if self.simulated.guide.latents:
            start = start - self.simulated.log_likelihood(walked)[1]  # log p of them
        ratio = self.simulated.ratios_again(walked, times, start=False, compare=compare)
        self.calls += self.simulated.take_calls()
        return start + self.simulated.num_steps / len(times) * ratio

    # ------------------------------------------------------------------------------- simulations

    def _simulate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Streams | None = None
    ) -> None:
        """Draws trajectories and data, and puts the data in the place of the arguments."""
        program = Program(self.model, args, kwargs)
        if streams is not None:
            restore_streams(streams, program.device)
        ranks.same_streams(program.device)
        self._streams = stream_states(program.device)
        self.simulations = simulate(program, self.num_paths, ends_only=self.bridged)
        number = sum(p.calls(t) for p in program.processes.values() for t in _times(program))
        self.calls += Calls(network=self.num_paths * number, program=self.num_paths)
        self.simulated = self._pair_of(program, self.simulations.data)
        self._prepare(args, kwargs)
        self.data_mark = mark(self.simulated.model)

    def _pair_of(self, program: Program, data: dict[str, Tensor]) -> Pair:
        """Model and guide, each simulated trajectory a problem with data of its own."""
        missing = sorted(set(self.data.values()) - set(data))
        if missing:
            raise ValueError(
                f"data={self.data} names the sites {missing}, but the model observes "
                f"{sorted(data)}: map arguments to those"
            )
        sites = {name: data[site] for name, site in self.data.items()}
        absent = sorted(set(sites) - set(program._bound.arguments))
        if absent:
            raise ValueError(
                f"data={self.data} names the arguments {absent}, but the model takes "
                f"{sorted(program._bound.arguments)}: map those to sites, as in "
                f"data={{'the_argument': {self.data[absent[0]]!r}}}"
            )
        bound = with_arguments(program, sites)._bound
        plates = 1 + program.max_plate_nesting
        events = {name: value.dim() - plates for name, value in sites.items()}
        return Pair(self.model, self.guide, bound.args, bound.kwargs, events)

    # ------------------------------------------------------------------------------- checkpoints

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pair:
        """Once: that of the example tells the guide's parameters."""
        if self.pair is None:
            with stream_untouched():
                pair = Pair(self.model, self.guide, args, kwargs)
                self._begin(pair)
            self.pair = pair
        return self.pair

    def _plain(self, record: float) -> float:
        return record

    def _record(self, saved: float) -> float:
        return saved

    def _about(self, pair: Pair) -> dict[str, Any]:
        return super()._about(pair) | {
            "data": self.data,
            "num_paths": self.num_paths,
            "refresh": self.refresh,
            "subsample": self.subsample,
            "bridged": self.bridged,
        }

    def _extra(self) -> dict[str, Any]:
        return {"streams": self._streams}

    def _learned_from(
        self, tree: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Pair:
        """Simulates once more what the saved run learned from."""
        with stream_untouched():
            self._simulate(args, kwargs, tree["streams"])
        return self.simulated


def _times(program: Program) -> list[int]:
    return list(range(1, program.num_steps + 1))
