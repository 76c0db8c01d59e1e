r"""The result of inference: weighted particles of x_0 and of the latents, and what they are worth.

.. math:: E[f \mid y] \approx \sum_{r,i} W_{r,i}\, f(x_{r,i}), \qquad
          W_{r,i} = \frac{\hat Z_r}{\sum_s \hat Z_s} \,
                    \frac{e^{\ell_{r,i}}}{\sum_j e^{\ell_{r,j}}},

r the independent runs, i their particles: a run counts by its evidence. Leading axes are ``run
particle``, with ``problem`` in front where data are declared per problem; problems are not pooled.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .arguments import check_callable
from .averages import Expectation, draw, expectation
from .evidence import Evidence, combine_runs, relative_variance
from .particles import Calls, Particles, Step
from .predictive import Samples, event_dims, members, observations, predict
from .program import Program
from .weights import normalise

if TYPE_CHECKING:  # what these files import is heavy
    from matplotlib.figure import Figure
    from networkx import DiGraph

    from .diagnostics import Diagnosis
    from .summary import Summary


class Posterior:
    """What an algorithm returns.

    Args:
        particles: the particles at t = 0.
        program: the program they belong to. Without it everything works but :meth:`predictive` and
            :meth:`plot_graph`.
        method: the name of the algorithm.
        resampler: the scheme it resampled with, for the single-run error of log Z (which takes
            resamplings into account for "multinomial", and is conservative for all others).

    Raises:
        ValueError: the particles are not at t = 0.
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
                f"a posterior needs particles at t = 0, but these are at t = {particles.t}: let "
                "the run finish"
            )
        self.particles, self.program = particles, program
        self.method, self.resampler = method, resampler
        self._members: dict[str, Samples] = {} if program is None else members(program, particles)
        self._event_dims = {} if program is None else event_dims(program)
        self._observed: Samples | None = None if program is not None else {}

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.particles.axes))
        return f"<Posterior by {self.method}: {sizes} particles of {', '.join(self.samples)}>"

    # ------------------------------------------------------------------------------ what came out

    @property
    def samples(self) -> Samples:
        """x_0 of each process (of a Team: of each member) and the latents, by site.

        Each has the shape ``(*axes, *plates, *event)``.
        """
        states: Samples = {}
        for name, x in self.particles.x.items():
            states |= self._members.get(name, {name: x})
        return {**states, **self.particles.latents}

    def event_dim(self, site: str) -> int:
        """How many of a sample's last dimensions make one event (unknown: all after the axes)."""
        return self._event_dims.get(site, self.samples[site].dim() - len(self.particles.axes))

    @property
    def observed(self) -> Samples:
        """The values of the observed sites, with shape ``(*problems, *plates, *event)``."""
        if self._observed is None:
            self._observed = observations(self._needed("observed"), self.particles)
        return self._observed

    @property
    def log_weights(self) -> Float64[Tensor, "*runs particle"]:
        """Unnormalised, and counted from the last resampling of each run."""
        return self.particles.log_weights

    @property
    def weights(self) -> Float64[Tensor, "*runs particle"]:
        """W, adding to one over the runs and particles of a problem."""
        runs = normalise(self.particles.log_evidence)
        return normalise(self.log_weights) * runs[..., None]

    @property
    def log_evidence(self) -> Float64[Tensor, "*runs"]:
        """The estimate of log Z of each run.

        Raises:
            ValueError: the method gives no valid weights.
        """
        if not self.particles.weighted:
            raise ValueError(
                f"{self.method} gives no valid weights, and so no evidence: its samples cannot be "
                "corrected. Use it as a guide, as in SMC(model, guide), where its transitions have "
                "a density"
            )
        return self.particles.log_evidence

    @property
    def evidence(self) -> Evidence:
        """The runs of a problem together, with errors from the runs and from one's genealogy."""
        log_evidence, roots = self.log_evidence, self.particles.roots
        times = torch.stack([step.resampled for step in self.history]).sum(0)
        variances = relative_variance(self.log_weights, roots, times, self.resampler)
        return combine_runs(log_evidence, variances)

    @property
    def history(self) -> tuple[Step, ...]:
        """One record per step, from T to 0."""
        return self.particles.history

    @property
    def num_network_calls(self) -> int:
        """Network evaluations: 64 particles at one step count 64."""
        return self._calls.network

    @property
    def num_gradient_calls(self) -> int:
        """Backward passes through the network, counted alike."""
        return self._calls.gradient

    @property
    def _calls(self) -> Calls:
        return sum((step.calls for step in self.history), Calls())

    # ---------------------------------------------------------------------------------- using it

    def expectation(self, quantity: str | Callable[[Samples], Tensor]) -> Expectation:
        """The posterior mean of a site or of a function of the samples, its deviation and error.

        Args:
            quantity: a site, or a function from ``samples`` to a tensor with shape
                ``(*axes, ...)``.
        """
        if not isinstance(quantity, str):
            check_callable("quantity", quantity, "lambda samples: samples['x'].mean(-1)")
        values = self._site(quantity) if isinstance(quantity, str) else quantity(self.samples)
        return expectation(values, self.weights, self.particles.roots)

    def resample(self, n: int | None = None, scheme: str = "systematic") -> Samples:
        """Equally weighted draws from each run, in random order.

        Each run is drawn from by its own weights; how the runs weigh against each other is in
        ``log_evidence``. Draws repeat particles, so their number is no effective sample size.

        Args:
            n: draws per run (None: as many as particles).
            scheme: a name of ``smcdiff.resampling.RESAMPLERS``.

        Returns:
            Draws by site, with shape ``(*problems, run, n, *plates, *event)``.
        """
        size = self.particles.num_particles
        return self._take(draw(self.log_weights, size if n is None else n, scheme))

    @property
    def log_density(self) -> Float64[Tensor, "*runs particle"]:
        """The program's log gamma(x_0, z) at every particle: all but the prior of x_0."""
        log_density: Tensor = self.particles.cache["log_psi"]
        return log_density

    def best(self) -> Samples:
        """The particle of each run with the highest :attr:`log_density`: best-of-n.

        An optimum among the particles, not a draw from the posterior: it knows no uncertainty, and
        with more particles it moves away from the prior.

        Returns:
            Values by site, with shape ``(*problems, run, *plates, *event)``.
        """
        rows = self._take(self.log_density.argmax(-1, keepdim=True))
        return {name: x.squeeze(len(self.particles.axes) - 1) for name, x in rows.items()}

    def _take(self, indices: Int64[Tensor, "*runs draw"]) -> Samples:
        """The particles with these numbers in their runs."""
        size, lead = self.particles.num_particles, len(self.particles.axes)
        start = torch.arange(self.particles.log_norm.numel(), device=indices.device) * size
        rows = indices + start.reshape(*indices.shape[:-1], 1)
        return {name: x.flatten(0, lead - 1)[rows] for name, x in self.samples.items()}

    def predictive(self, **overrides: Any) -> Samples:
        """What would be observed: the program run on the particles, its observed sites sampled.

        Args:
            overrides: arguments of the program to replace, by name.

        Returns:
            Draws of observed sites and values of deterministic ones, with shape ``(*axes, *plates,
            *event)``. They belong to the particles, and so carry their weights.
        """
        return predict(self._needed("predictive()"), self.particles, overrides)

    def summary(self) -> "Summary":
        """A table to read: evidence, weights, verdict, and the mean and deviation of each site.

        Of whole numbers, such as classes and tokens, it has the most probable values.
        """
        from .summary import summarise

        return summarise(self)

    def diagnose(self) -> "Diagnosis":
        """Whether the answer can be trusted, why, and what to try."""
        from .diagnostics import diagnose

        return diagnose(self)

    def to_arviz(self) -> Any:
        """An ``InferenceData`` or, from ArviZ 1.0 on, a ``DataTree``: see :mod:`smcdiff.export`."""
        from .export import to_arviz

        return to_arviz(self)

    def genealogy(self) -> "DiGraph":
        """Who descends from whom, among the ancestors of the final particles."""
        from .graph import genealogy

        return genealogy(self)

    def _site(self, name: str) -> Tensor:
        """The samples of one site."""
        if name not in self.samples:
            raise ValueError(f"there is no site {name!r}: the sites are {sorted(self.samples)}")
        return self.samples[name]

    def _needed(self, what: str) -> Program:
        if self.program is None:
            raise ValueError(
                f"{what} needs the program, which files do not hold: Posterior.load(path, "
                "program=Program(model, args))"
            )
        return self.program

    # --------------------------------------------------------------------------------- pictures

    def plot_steps(self, **options: Any) -> "Figure":
        """Effective sample size and k-hat over the steps."""
        from .plots import plot_steps

        return plot_steps(self, **options)

    def plot_evidence(self, **options: Any) -> "Figure":
        """log Z over the steps, run by run."""
        from .plots import plot_evidence

        return plot_evidence(self, **options)

    def plot_weights(self, **options: Any) -> "Figure":
        """The Lorenz curve of the final weights."""
        from .plots import plot_weights

        return plot_weights(self, **options)

    def plot_genealogy(self, **options: Any) -> "Figure":
        """The ancestors of the final particles."""
        from .plots import plot_genealogy

        return plot_genealogy(self, **options)

    def plot_samples(self, site: str | None = None, **options: Any) -> "Figure":
        """Images: posterior mean, standard deviation and draws."""
        from .images import plot_samples

        return plot_samples(self, site, **options)

    def plot_graph(self, **options: Any) -> "Figure":
        """The program: its processes, latents and observed sites."""
        from .graph import plot_graph

        return plot_graph(self._needed("plot_graph()"), **options)

    # ------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Writes all but the program to one safetensors file (no pickled code), atomically."""
        record = {
            "method": self.method,
            "resampler": self.resampler,
            "members": self._members,
            "event_dims": self._event_dims,
            "observed": self.observed,
        }
        kept = {"particles": self.particles.cache, "posterior": record}
        replace(self.particles, cache=kept).save(path)

    @classmethod
    def load(
        cls, path: str | Path, program: Program | None = None, device: torch.device | str = "cpu"
    ) -> "Posterior":
        """Reads what :meth:`save` wrote.

        Args:
            program: the program, for :meth:`predictive` and :meth:`plot_graph`.
        """
        particles = Particles.load(path, device)
        if "posterior" not in particles.cache:
            raise ValueError(
                f"{path} is a checkpoint, not a posterior: read it with Particles.load"
            )
        record = particles.cache["posterior"]
        particles = replace(particles, cache=particles.cache["particles"])
        posterior = cls(particles, program, record["method"], record["resampler"])
        posterior._members, posterior._event_dims = record["members"], record["event_dims"]
        posterior._observed = record["observed"]
        return posterior
