r"""The result of inference: weighted particles of x_0 and of the latents, and what they are worth.

.. math:: E[f \mid y] \approx \sum_{r,i} W_{r,i}\, f(x_{r,i}), \qquad
          W_{r,i} \propto \hat Z_r \, \frac{e^{\ell_{r,i}}}{\sum_j e^{\ell_{r,j}}},

r the independent runs, i their particles: a run counts by its evidence. Leading axes are ``run
particle``, with ``problem`` in front where data are declared per problem; problems are never pooled.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from pyro.poutine import uncondition
from torch import Tensor

from .evidence import Evidence, combine_runs, relative_variance
from .particles import Calls, Particles, Step, map_tree
from .program import Program
from .resampling import RESAMPLERS
from .weights import normalise

if TYPE_CHECKING:  # heavy, and imported when they are needed
    from matplotlib.figure import Figure
    from networkx import DiGraph

    from .diagnostics import Diagnosis
    from .summary import Summary

Samples = dict[str, Tensor]
Quantity = str | Callable[[Samples], Tensor]


@dataclass(frozen=True)
class Expectation:
    """A posterior mean.

    Attributes:
        mean, sd: of the posterior, with shape ``(*problems, *quantity)``.
        standard_error: the Monte Carlo error of the mean: from the runs or, of one run, from the shares
            of its roots (no less than the truth); nan for one particle. It sees what the weights see.
    """

    mean: Float64[Tensor, "..."]
    sd: Float64[Tensor, "..."]
    standard_error: Float64[Tensor, "..."]


class Posterior:
    """What an algorithm returns.

    Args:
        particles: the particles at t = 0.
        program: the program they belong to (None: everything but :meth:`predictive` and
            :meth:`plot_graph` works).
        method: the name of the algorithm.
        resampler: the scheme it resampled with. Only multinomial resampling has a single-run variance
            that counts the resamplings; that of the others is the same, and conservative.

    Raises:
        ValueError: the run is not finished.
    """

    def __init__(
        self,
        particles: Particles,
        program: Program | None,
        method: str,
        resampler: str = "systematic",
    ) -> None:
        if particles.t != 0:
            raise ValueError(
                f"a posterior needs particles at t = 0, but these stand at t = {particles.t}: run them "
                "to the end"
            )
        self.particles, self.program = particles, program
        self.method, self.resampler = method, resampler
        self._members = {} if program is None else _split(particles, program)
        self._event_dims = {} if program is None else _event_dims(program)
        self._observed: Samples | None = None

    def __repr__(self) -> str:
        sizes = " x ".join(str(size) for size in self.particles.axes)
        return f"<Posterior of {self.method}: {sizes} particles of {', '.join(self.samples)}>"

    # ------------------------------------------------------------------------------ what came out

    @property
    def samples(self) -> Samples:
        """x_0 of every process (of a Team: of every member) and the latents, with shape ``(*axes, *plates, *event)``."""
        states = {}
        for name, x in self.particles.x.items():
            states |= self._members.get(name, {name: x})
        return {**states, **self.particles.latents}

    def event_dim(self, site: str) -> int:
        """How many of the last dimensions of a sample are one event (all but the axes, if unknown)."""
        return self._event_dims.get(site, self.samples[site].dim() - len(self.particles.axes))

    @property
    def observed(self) -> Samples:
        """The values of the observed sites, with shape ``(*problems, *plates, *event)``."""
        if self._observed is None:
            self._observed = {} if self.program is None else _observations(self)
        return self._observed

    @property
    def log_weights(self) -> Float64[Tensor, "*runs particle"]:
        """Unnormalised, since the last resampling of each run."""
        return self.particles.log_weights

    @property
    def weights(self) -> Float64[Tensor, "*runs particle"]:
        """W: they add to one over the runs and particles of a problem."""
        within = normalise(self.log_weights)
        return within * normalise(self.particles.log_evidence)[..., None]

    @property
    def log_evidence(self) -> Float64[Tensor, "*runs"]:
        """The estimate of log Z of every run.

        Raises:
            ValueError: the method has no valid weights.
        """
        if not self.particles.weighted:
            raise ValueError(
                f"{self.method} cannot be corrected: its samples carry no weights and so no evidence. "
                "Where its transitions have a density, use it as the guide of SMC to weigh them"
            )
        return self.particles.log_evidence

    @property
    def evidence(self) -> Evidence:
        """The runs combined, with standard errors from the runs and from the genealogy of one."""
        log_evidence = self.log_evidence
        resamplings = torch.stack([step.resampled for step in self.history]).sum(0)
        roots = self.particles.roots
        return combine_runs(
            log_evidence, relative_variance(self.log_weights, roots, resamplings, self.resampler)
        )

    @property
    def history(self) -> tuple[Step, ...]:
        """One record per step, from T to 0."""
        return self.particles.history

    @property
    def num_network_calls(self) -> int:
        """Network evaluations, one per particle and state."""
        return self._calls().network

    @property
    def num_gradient_calls(self) -> int:
        """Backward passes through the network, one per particle and state."""
        return self._calls().gradient

    def _calls(self) -> Calls:
        return sum((step.calls for step in self.history), Calls())

    # ------------------------------------------------------------------------------- using it

    def expectation(self, quantity: Quantity) -> Expectation:
        """The weighted mean and standard deviation of a site, or of a function of the samples.

        Args:
            quantity: a site, or a function from ``samples`` to a tensor with shape ``(*axes, ...)``.
        """
        values = self.samples[quantity] if isinstance(quantity, str) else quantity(self.samples)
        lead = len(self.particles.axes)
        if tuple(values.shape[:lead]) != self.particles.axes:
            raise ValueError(
                f"a quantity needs the shape (*{self.particles.axes}, ...), one value per particle, but "
                f"got {tuple(values.shape)}: reduce over the dimensions behind the first {lead}"
            )
        values = values.double().flatten(lead)
        weights = self.weights[..., None]
        mean = (weights * values).sum((-3, -2), keepdim=True)
        offsets = values - mean
        variance = (weights * offsets.square()).sum((-3, -2))
        error = self._standard_error(weights * offsets)
        shape = (*values.shape[: lead - 2], *self._tail(quantity))
        parts = mean[..., 0, 0, :], variance.sqrt(), error
        return Expectation(*(part.reshape(shape) for part in parts))

    def _tail(self, quantity: Quantity) -> tuple[int, ...]:
        values = self.samples[quantity] if isinstance(quantity, str) else quantity(self.samples)
        return tuple(values.shape[len(self.particles.axes) :])

    def _standard_error(self, shares: Tensor) -> Tensor:
        """From what each run (or root, of one run) adds to the weighted mean of the offsets."""
        groups = shares.sum(-2)
        if shares.shape[-3] == 1:
            roots = self.particles.roots[..., None].expand(shares.shape)
            groups = torch.zeros_like(shares).scatter_add(-2, roots, shares)[..., 0, :, :]
        count = groups.shape[-2]
        if count == 1:
            return torch.full_like(groups[..., 0, :], torch.nan)
        return (groups.square().sum(-2) * count / (count - 1)).sqrt()

    def resample(self, n: int | None = None, scheme: str = "systematic") -> Samples:
        """Equally weighted draws of every run, by its own weights, in random order.

        Args:
            n: draws per run (None: as many as particles).
            scheme: a name of ``smcdiff.resampling.RESAMPLERS``.

        Returns:
            Draws by site, with shape ``(problem) run n ...``. They repeat particles: their number is no
            effective sample size.
        """
        rows = draw_indices(self.log_weights, n or self.particles.num_particles, scheme)
        num_runs, size = rows[..., 0].numel(), self.particles.num_particles
        start = torch.arange(num_runs, device=rows.device)[:, None] * size
        flat = (rows.reshape(num_runs, -1) + start).reshape(-1)
        lead = len(self.particles.axes)
        return {
            name: x.flatten(0, lead - 1)[flat].reshape(*rows.shape, *x.shape[lead:])
            for name, x in self.samples.items()
        }

    def predictive(self, **overrides: Any) -> Samples:
        """What would be observed: the program run on the particles, its observed sites sampled.

        Factors are ignored. Draws belong to the particles and so carry their weights.

        Args:
            overrides: arguments of the program to replace, by name.

        Returns:
            Draws of the observed sites and values of the deterministic ones, with shape
            ``(*axes, *plates, *event)``.
        """
        program = _generative(self._need_program("predictive()"), overrides)
        particles, axes = self.particles, self.particles.axes
        lead, batch = len(axes), self.log_weights.numel()
        x0 = {n: x.flatten(0, lead - 1) for n, x in particles.x.items()}
        latents = {n: z.flatten(0, lead - 1) for n, z in particles.latents.items()}
        problems = _problem_rows(program, batch)
        with torch.no_grad():
            sites = program.execute(lambda s: x0[s.name], latents, batch, problems).sites
        wanted = {n: s.kind for n, s in program.likelihoods.items()}
        draws = {}
        for name, kind in wanted.items():
            if kind in ("observed", "deterministic") and name in sites:
                value = torch.as_tensor(sites[name].value)
                if kind == "deterministic" and not program.likelihoods[name].parents:
                    value = value.expand(batch, *value.shape)
                draws[name] = value.reshape(*axes, *value.shape[1:])
        return draws

    def _need_program(self, what: str) -> Program:
        if self.program is None:
            raise ValueError(
                f"{what} needs the program, which a file does not hold: Posterior.load(path, "
                "program=Program(model, args))"
            )
        return self.program

    # ----------------------------------------------------------------------------- looking at it

    def summary(self) -> "Summary":
        """A table to read: evidence, weights, verdict, and every site's mean and deviation."""
        from .summary import summarise

        return summarise(self)

    def diagnose(self) -> "Diagnosis":
        """Whether to trust it, why, and what to try."""
        from .diagnostics import diagnose

        return diagnose(self)

    def to_arviz(self) -> Any:
        """An ``InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (1.x); see ``smcdiff/export.py``."""
        from .export import to_arviz

        return to_arviz(self)

    def genealogy(self) -> "DiGraph":
        """Who descends from whom, among the ancestors of the final particles."""
        from .graph import genealogy

        return genealogy(self)
