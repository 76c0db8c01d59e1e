r"""Trust-region iterated twisted SMC: a look-ahead is learned in steps that the samples can carry.

Each iteration draws whole paths from the law :math:`P_k` learned so far, without resampling, and
moves it towards the target :math:`\gamma` as far as a trust region allows (``escort.py``),

.. math:: q_k \propto P_k (\gamma / P_k)^{\tau_k}, \qquad
          P_{k+1} = \arg\min_\theta \mathrm{KL}(q_k \,\|\, P_\theta)

(arXiv 2605.25123). With exact projections :math:`P_k \propto P \gamma^{\beta_k}`, where
:math:`1 - \beta_{k+1} = (1 - \tau_k)(1 - \beta_k)`: the trust region is a schedule of temperatures
that the samples choose. Then the law is frozen, and an ordinary run on fresh particles gives the
answer: learning changes the variance only.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm

from smcdiff.arguments import check_kind, check_number, check_whole
from smcdiff.particles import Calls, Particles, check_checkpoint, load_tree, save_tree
from smcdiff.posterior import Posterior
from smcdiff.program import Program
from smcdiff.twist import Twist
from smcdiff.weights import effective_sample_size, normalise

from .engine import Engine, Settings, refuse_flows
from .escort import TrustRegion, divergence, escort_weights, predict_iterations
from .learned import LearnedTwist, record
from .learned_joint import JointTwist
from .proposals import Proposal
from .replay import PerPath, Pool
from .smc import SMOOTHING, ParticleMethod
from .streams import restore_streams, stream_states

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "smcdiff-1 learning"
PATIENCE = 2  # iterations without a larger step, or at tau = 1 without more effective samples
PerProblem = Float64[Tensor, " problem"]


@dataclass(frozen=True)
class Iteration:
    """What a person wants to know of one iteration; one number per problem (or one in all).

    Attributes:
        tau: the exponent of the step.
        beta: the nominal inverse temperature *after* it: exact if projections were.
        divergence: KL(q || P_k) of the step, in nats.
        ess: effective sample size of the sweep's weights, as a share of its paths.
        ess_tempered: of the weights of the fit (with those of earlier sweeps that are replayed).
        largest_weight: the largest share of one path in the sweep.
        log_evidence: the sweep's estimate of log Z.
        mean_reward: the mean log gamma(x_0, z) over the paths (of those where it is finite).
        predicted: how many iterations of this size the sweep foresees from here on.
        calls: what the sweep cost.
    """

    tau: PerProblem
    beta: PerProblem
    divergence: PerProblem
    ess: PerProblem
    ess_tempered: PerProblem
    largest_weight: PerProblem
    log_evidence: PerProblem
    mean_reward: PerProblem
    predicted: PerProblem
    calls: Calls


class TrustRegionTwistedSMC(ParticleMethod):
    """Learns a twist and a proposal in trust-region steps, then runs SMC with both.

    Args:
        model: a Pyro callable with at least one process.
        learned: what learns, in place: it starts as it is given, and can be saved and used in
            ``SMC(model, twist=learned, proposal=learned)`` afterwards (None: a new
            :class:`JointTwist`, for any program).
        epsilon, ess_target: the trust region (:class:`~smcdiff.inference.escort.TrustRegion`).
        num_iterations: the most that are made. Learning ends sooner once a whole step is taken
            (tau = 1) at an effective sample size above ``good_ess``, and where the family can do no
            more: two iterations without a larger tau or, at tau = 1, without more effective paths.
        learning_particles: paths per sweep (None: ``num_particles``).
        replay: how many earlier sweeps each fit uses as well.
        tempered: for chains so long that whole paths carry no weight: learning sweeps resample as
            the final run does, with weights to the power of the last tau. Weights of one would move
            the paths to the target, whatever the trust region says.
        good_ess: see ``num_iterations``; a share.
        num_particles, num_runs, ess_threshold, resampler, chunk_size, smoothing: of the final run
            (:class:`Settings`); what has been learned is a guess as well, so weights are smoothed.
        per_problem: arguments with one row per problem; all problems share what is learned.

    Attributes:
        iterations: a record of each iteration of the last run.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        learned: LearnedTwist | None = None,
        *,
        epsilon: float = 0.5,
        ess_target: float | None = None,
        num_iterations: int = 10,
        learning_particles: int | None = None,
        replay: int = 0,
        tempered: bool = False,
        good_ess: float = 0.5,
        num_particles: int = 256,
        num_runs: int = 1,
        ess_threshold: float = 0.5,
        resampler: str = "systematic",
        chunk_size: int | None = None,
        smoothing: float = SMOOTHING,
        per_problem: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        settings = Settings(
            num_particles, num_runs, ess_threshold, resampler, chunk_size, smoothing=smoothing
        )
        super().__init__(model, settings, per_problem)
        check_kind("learned", learned, LearnedTwist, "QuadraticTwist()", optional=True)
        check_whole("num_iterations", num_iterations, 0)
        check_whole("learning_particles", learning_particles, or_none="num_particles")
        check_whole("replay", replay, 0)
        check_number("good_ess", good_ess, 0, 1)
        self.learned, self.region = learned or JointTwist(), TrustRegion(epsilon, ess_target)
        self.num_iterations, self.replay, self.good_ess = num_iterations, replay, good_ess
        self.tempered = tempered
        self.sweep = Settings(learning_particles or num_particles, 1, 0.0, resampler, chunk_size)
        self.iterations: list[Iteration] = []
        if num_iterations and self.region.never_binds(self.sweep.num_particles):
            warnings.warn(
                f"epsilon = {epsilon} never binds: {self.sweep.num_particles} paths diverge by at "
                f"most log N = {math.log(self.sweep.num_particles):.2f} nats, even if one carries "
                "all weight. Take a smaller one, or more paths",
                UserWarning,
                stacklevel=2,
            )

    def parts(self) -> tuple[Twist, Proposal]:
        return self.learned, self.learned

    def iterate(self, *args: Any, **kwargs: Any) -> Iterator[Particles]:
        """Learns, then yields the final run's particles at t = T, ..., 0."""
        self.learn(*args, **kwargs)
        yield from super().iterate(*args, **kwargs)

    def run(
        self,
        *args: Any,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 10,
        resume: bool = False,
        **kwargs: Any,
    ) -> Posterior:
        """Learns, then infers the posterior of ``model(*args, **kwargs)`` on fresh particles.

        Args:
            progress: show progress bars.
            checkpoint: a file that keeps the state of the final run; ``<checkpoint>.learning``
                keeps that of the learning, after every iteration.
            checkpoint_every: steps between two writes of the former.
            resume: continue from these files, bit for bit, if they exist.
        """
        learning = None if checkpoint is None else Path(f"{checkpoint}.learning")
        self.learn(*args, progress=progress, checkpoint=learning, resume=resume, **kwargs)
        options: Any = {"checkpoint_every": checkpoint_every, "resume": resume}
        return super().run(*args, progress=progress, checkpoint=checkpoint, **options, **kwargs)

    def learn(
        self,
        *args: Any,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        **kwargs: Any,
    ) -> list[Iteration]:
        """Learns only; returns a record of each iteration."""
        check_checkpoint(checkpoint)
        program = Program(self.model, args, kwargs, self.per_problem)
        refuse_flows(program, self.settings)  # at once, not after all learning
        engine = Engine(program, *self.parts(), self.sweep)
        pool = Pool(engine.evaluator, 1 + self.replay, program.num_problems or 1)
        self.iterations, self._warned = [], False
        if resume and checkpoint is not None and Path(checkpoint).exists():
            self._resume(checkpoint, pool)
        with tqdm(total=self.num_iterations, disable=not progress, unit="iteration") as bar:
            bar.update(len(self.iterations))
            while not self._finished():
                self.iterations.append(self._iterate(engine, pool))
                if checkpoint is not None:
                    self._save(checkpoint, pool)
                bar.set_postfix_str(_in_words(self.iterations[-1]))
                bar.update()
        return self.iterations

    # ------------------------------------------------------------------------------ one iteration

    def _iterate(self, engine: Engine, pool: Pool) -> Iteration:
        """Sweep, dual, projection."""
        number = len(self.iterations) + 1
        engine.settings = self._sweep_settings()
        states, exponent = list(engine.iterate()), engine.settings.exponent
        paths = record(engine.evaluator, states, self.learned, exponent)
        pool.add(paths, self.learned)
        logs, base = pool.log_weights()
        tau = self.region.exponent(logs, base, f"iteration {number}")
        weights = escort_weights(logs, tau, base)
        made = self._describe(pool, logs, base, tau)
        self.learned.fit(*pool.all_paths(weights))
        self._warn_of_few(float(made.ess_tempered.sum()) * weights.shape[-1])
        return made

    def _sweep_settings(self) -> Settings:
        """Without resampling; or with it, and with tempered weights, once a tau is known."""
        if not self.tempered or not self.iterations:
            return self.sweep
        tau = float(self.iterations[-1].tau.min())
        return replace(self.sweep, ess_threshold=self.settings.ess_threshold, exponent=tau)

    def _describe(self, pool: Pool, logs: PerPath, base: PerPath, tau: PerProblem) -> Iteration:
        paths = pool.sweeps[-1][0]
        own = paths.log_weights.reshape(len(tau), -1)
        sampling = paths.log_sampling.reshape(own.shape)
        rewards = paths.log_reward.reshape(own.shape)
        size, region = own.shape[-1], self.region
        share = region.ess_target
        step = region.epsilon if share is None else -0.5 * math.log(share)  # Gaussian log-weights
        beta = self.iterations[-1].beta if self.iterations else torch.zeros_like(tau)
        return Iteration(
            tau=tau,
            beta=beta + tau * (1 - beta),
            divergence=divergence(logs, tau, base),
            ess=effective_sample_size(sampling + own) / size,
            ess_tempered=effective_sample_size(base + tau[:, None] * logs) / logs.shape[-1],
            largest_weight=normalise(sampling + own).max(-1).values,
            log_evidence=(sampling + own).logsumexp(-1) - sampling.logsumexp(-1),
            mean_reward=torch.where(rewards.isneginf(), torch.nan, rewards).nanmean(-1),
            predicted=predict_iterations(logs, step, base),
            calls=paths.calls,
        )

    def _warn_of_few(self, effective: float) -> None:
        """Once, if the fit has more parameters than the weighted paths have numbers."""
        if self.learned.paths_needed > effective and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.learned).__name__} has more parameters than the weighted paths of "
                f"iteration {len(self.iterations) + 1} can determine: the effective number of "
                f"paths is {effective:.1f}, and {self.learned.paths_needed:.0f} are needed. Take "
                "more learning_particles, a smaller epsilon, replay, or a smaller family",
                UserWarning,
                stacklevel=4,
            )

    def _finished(self) -> bool:
        """At the target with good weights, or not getting any further."""
        if len(self.iterations) >= self.num_iterations:
            return True
        reached = [float((i.tau + (i.tau == 1) * i.ess).min()) for i in self.iterations]
        before, lately = reached[:-PATIENCE], reached[-PATIENCE:]
        stuck = bool(before) and max(lately) <= max(before)
        return stuck or (bool(lately) and lately[-1] >= 1 + self.good_ess)

    @property
    def learning_calls(self) -> Calls:
        """What learning has cost, beside the final run."""
        return sum((each.calls for each in self.iterations), Calls())

    def plot_escort(self, **options: Any) -> "Figure":
        """The escort path: beta, effective sample sizes and log Z over the iterations."""
        from .escort_plots import plot_escort

        return plot_escort(self.iterations, **options)

    # ------------------------------------------------------------------------------- checkpoints

    def _save(self, path: str | Path, pool: Pool) -> None:
        tree = {
            "learned": self.learned.tensors(),
            "iterations": [dict(vars(i), calls=vars(i.calls)) for i in self.iterations],
            "pool": pool.as_tree() if self.replay else [],
            "rng": stream_states(pool.evaluator.program.device),
        }
        save_tree(path, tree, FORMAT)

    def _resume(self, path: str | Path, pool: Pool) -> None:
        device = pool.evaluator.program.device
        tree = load_tree(path, FORMAT, device)
        self.learned.restore(tree["learned"])
        self.iterations = [
            Iteration(**{**i, "calls": Calls(**i["calls"])}) for i in tree["iterations"]
        ]
        pool.from_tree(tree["pool"], self.learned)
        restore_streams(tree["rng"], device)


def _in_words(made: Iteration) -> str:
    return (
        f"beta {float(made.beta.min()):.3f}, tau {float(made.tau.min()):.3f}, "
        f"ESS {float(made.ess.min()):.1%}, about {float(made.predicted.max()):.0f} to go"
    )
