"""Sequential Monte Carlo over the reverse process: the engine with the user's choices."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.arguments import check_kind, check_names, check_option
from smcdiff.particles import Particles, check_checkpoint
from smcdiff.posterior import Posterior
from smcdiff.program import Program, check_model
from smcdiff.twist import Twist, TwistValue, View

from .denoised import DenoisedLikelihood
from .engine import Engine, Settings
from .guided import GuidedProposal
from .linearised import CovarianceName
from .proposals import FromKernel, Proposal, TwistedKernel
from .rejuvenation import Rejuvenation
from .resuming import check_resumable

SMOOTHING = 0.7  # benchmarks/mixtures.py: the worst effective sample size rises from .01 to .3


class ParticleMethod(ABC):
    """What all particle algorithms share: ``run``, ``iterate`` and ``resume``.

    Args:
        model: a Pyro callable with at least one process.
        settings: particles, runs, resampling, chunks.
        per_problem: names of arguments with one row per problem (see :class:`smcdiff.Program`).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        settings: Settings,
        per_problem: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        check_model("model", model)
        check_names("per_problem", per_problem)
        self.model, self.settings, self.per_problem = model, settings, per_problem

    @abstractmethod
    def parts(self) -> tuple[Twist, Proposal]:
        """The twist and the proposal that make the algorithm."""

    def engine(self, *args: Any, **kwargs: Any) -> Engine:
        """Takes the program apart and gets everything ready."""
        program = Program(self.model, args, kwargs, self.per_problem)
        return Engine(program, *self.parts(), self.settings)

    def iterate(self, *args: Any, **kwargs: Any) -> Iterator[Particles]:
        """Yields the particles at t = T, ..., 0."""
        yield from self.engine(*args, **kwargs).iterate()

    def log_psi(
        self,
        t: int,
        x: Mapping[str, Tensor],
        *args: Any,
        latents: Mapping[str, Tensor] = MappingProxyType({}),
        **kwargs: Any,
    ) -> Float64[Tensor, " particle"]:
        r"""The look-ahead :math:`\log \psi_t(x_t)` of ``model(*args, **kwargs)``, to be looked at.

        At t = 0 it is the program's own log-density. What a twist remembers of earlier steps, as
        that of Feynman-Kac steering does, counts as unseen.

        Args:
            t: the step, from 0 to T.
            x: states by process, with shape ``(particle, *plates, *event)``.
            latents: the program's ordinary latents, with as many rows.

        Raises:
            ValueError: t, a name or a number of rows does not fit the program, or the program holds
                several problems.
        """
        engine = self.engine(*args, **kwargs)
        _check_states(engine.program, t, x, latents)
        return engine.evaluator.look(t, dict(x), dict(latents), {}, None)["log_psi"]

    def run(
        self,
        *args: Any,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
        **kwargs: Any,
    ) -> Posterior:
        """Infers the posterior of ``model(*args, **kwargs)``.

        Args:
            progress: show a progress bar.
            checkpoint: a file that keeps the state of the run.
            checkpoint_every: steps between two writes of it.
            resume: continue from the checkpoint, bit for bit, if the file exists.
        """
        check_checkpoint(checkpoint, checkpoint_every, resume)
        engine = self.engine(*args, **kwargs)
        start = None
        if resume and checkpoint is not None and Path(checkpoint).exists():
            start = Particles.load(checkpoint, engine.program.device)
            check_resumable(start, engine.program, engine.axes)
        state = start
        with tqdm(total=engine.program.num_steps, disable=not progress, unit="step") as bar:
            for state in engine.iterate(start):
                bar.update(engine.program.num_steps - state.t - bar.n)
                bar.set_postfix_str(f"ESS {state.ess.min():.0f}/{state.num_particles}")
                if checkpoint is not None and (state.t % checkpoint_every == 0):
                    state.save(checkpoint)
        assert state is not None
        return Posterior(state, engine.program, type(self).__name__, self.settings.resampler)


def _check_states(
    program: Program, t: int, x: Mapping[str, Tensor], latents: Mapping[str, Tensor]
) -> None:
    """Refuses states that are not those of the program."""
    check_kind("x", x, Mapping, "{'x': states}")
    if not 0 <= t <= program.num_steps:
        raise ValueError(f"t must be between 0 and num_steps = {program.num_steps}, got {t}")
    if program.num_problems is not None:
        raise ValueError("log_psi looks at one problem: build the method without per_problem")
    if x.keys() != program.processes.keys() or latents.keys() != program.latents.keys():
        raise ValueError(
            f"log_psi needs the processes {sorted(program.processes)} in x and the latents "
            f"{sorted(program.latents)}, got {sorted(x)} and {sorted(latents)}"
        )
    sizes = {name: len(value) for name, value in {**x, **latents}.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all values need one row per particle, got {sizes}")


class NoTwist(Twist):
    """psi_t = 1 for t >= 1: the likelihood is met at the end, and only there."""

    def evaluate(self, view: View) -> TwistValue:
        like = next(iter(view.x.values()))
        return TwistValue(like.new_zeros(view.batch).double())


class SMC(ParticleMethod):
    """Particles of any program, with any twist and any guide.

    With neither it is the bootstrap filter; with ``ess_threshold=0`` it is importance sampling, and
    :meth:`~smcdiff.Posterior.best` of that is best-of-n.

    Args:
        model: a Pyro callable with at least one process.
        guide: a Pyro callable with the same process names, whose processes propose the transitions,
            and with the ordinary latents that it wants to propose.
        twist: a look-ahead (None: 1).
        proposal: where transitions come from (None: the guide's processes, or the model's own).
        num_particles, num_runs, ess_threshold, resampler, chunk_size, rejuvenation, smoothing: see
            :class:`Settings`.
        per_problem: arguments with one row per problem.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        *,
        twist: Twist | None = None,
        proposal: Proposal | None = None,
        num_particles: int = 256,
        num_runs: int = 1,
        ess_threshold: float = 0.5,
        resampler: str = "systematic",
        chunk_size: int | None = None,
        rejuvenation: Rejuvenation | None = None,
        smoothing: float = 0.0,
        per_problem: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        settings = Settings(
            num_particles, num_runs, ess_threshold, resampler, chunk_size, rejuvenation, smoothing
        )
        super().__init__(model, settings, per_problem)
        if guide is not None and proposal is not None:
            raise ValueError("give a guide or a proposal, not both: a guide is a proposal")
        if guide is not None:
            check_model("guide", guide)
        check_kind("twist", twist, Twist, "IntermediateReward()", optional=True)
        check_kind("proposal", proposal, Proposal, "TwistedKernel()", optional=True)
        self.guide, self.twist, self.proposal = guide, twist, proposal

    def parts(self) -> tuple[Twist, Proposal]:
        proposal = self.proposal or FromKernel()
        if self.guide is not None:
            proposal = GuidedProposal(self.guide)
        return self.twist or NoTwist(), proposal


class TwistedSMC(ParticleMethod):
    """SMC that looks ahead with the denoised likelihood and steers by it.

    Args:
        model: a Pyro callable with at least one process.
        covariance: what the twist knows of x_0 given x_t (:class:`DenoisedLikelihood`).
        num_draws: draws of x_0 for sites that are not Gaussian.
        proposal: ``"conjugate"``: shifted, narrowed, with a twisted start; ``"gradient"``: shifted
            only; ``"kernel"``: the process's own (for rewards without gradients); ``"auto"``:
            conjugate where the twist knows the Jacobian and the observations are linear, else
            gradient.
        temper, clip: of the shift (:class:`TwistedKernel`); they never change the target.
        damping: of the look-ahead at high noise (:class:`DenoisedLikelihood`).
        smoothing: of the log-weights (:class:`Settings`), because this look-ahead is a guess
            wherever the data are not Gaussian (None: 0.7, or 0 with rejuvenation).
        num_particles, num_runs, ess_threshold, resampler, chunk_size, rejuvenation: see
            :class:`Settings`.
        per_problem: arguments with one row per problem.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        covariance: CovarianceName = "auto",
        num_draws: int = 8,
        proposal: str = "auto",
        temper: float = 1.0,
        clip: float | None = None,
        damping: float | None = None,
        num_particles: int = 256,
        num_runs: int = 1,
        ess_threshold: float = 0.5,
        resampler: str = "systematic",
        chunk_size: int | None = None,
        rejuvenation: Rejuvenation | None = None,
        smoothing: float | None = None,
        per_problem: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        if smoothing is None:
            smoothing = 0.0 if rejuvenation is not None else SMOOTHING
        settings = Settings(
            num_particles, num_runs, ess_threshold, resampler, chunk_size, rejuvenation, smoothing
        )
        super().__init__(model, settings, per_problem)
        check_option("proposal", proposal, ("auto", "conjugate", "gradient", "kernel"))
        self.covariance, self.num_draws, self.proposal = covariance, num_draws, proposal
        self.temper, self.clip, self.damping = temper, clip, damping
        self.parts()  # they refuse what they cannot do with, here and not after hours

    def parts(self) -> tuple[Twist, Proposal]:
        curvature = {"auto": None, "conjugate": True}.get(self.proposal, False)
        steered = self.proposal != "kernel"
        twist = DenoisedLikelihood(
            self.covariance, self.num_draws, steered, curvature, self.damping
        )
        if not steered:
            return twist, FromKernel()
        return twist, TwistedKernel(temper=self.temper, clip=self.clip)
