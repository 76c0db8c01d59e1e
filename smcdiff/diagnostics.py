r"""Whether particles can be trusted: figures that see collapse and lost modes, and a verdict.

The final effective sample size and the final k-hat see neither: after resampling, weights look even
whatever was lost before. These do:

* the effective number of roots over all runs, :math:`1 / \sum_{r,j} S_{r,j}^2`, with
  :math:`S_{r,j}` the share of the final weight that descends from particle j of the first
  generation of run r, and a run counting by its evidence: how many independent particles the answer
  really rests on;
* the spread of log Z over the runs (runs that met different modes differ);
* the smallest effective sample size over *all* steps (collapse on the way).

The thresholds were chosen on exact problems and checked on others (``benchmarks/diagnosis.py``). A
mode that no particle of any run has met leaves no trace in any weight.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from .evidence import root_shares
from .particles import Particles

if TYPE_CHECKING:
    from .posterior import Posterior

Verdict = Literal["reliable", "doubtful", "failed"]
SEVERITY: dict[Verdict, int] = {"reliable": 0, "doubtful": 1, "failed": 2}

FEW_ROOTS, HOPELESS_ROOTS = 25.0, 4.0  # effective, over all runs
SPREAD, HOPELESS_SPREAD = 0.5, 1.5  # standard deviation of log Z over the runs
ABSURD_SPREAD = 30.0  # more than modes explain: is the prior set up wrongly, or the noise scale?
ERROR, HOPELESS_ERROR = 0.5, 0.7  # standard error of log Z, from the genealogy of one run
ESS = 0.02  # smallest effective sample size, as a share of the particles
EVEN = 1e-3  # weights are equal when their logarithms differ by less
ENOUGH = 4  # equal weights say that nothing was lost if so many runs agree


class Finding(NamedTuple):
    """A figure on the wrong side of a threshold."""

    verdict: Verdict
    reason: str
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """The figures of one problem, each the worst over its runs, and what they add up to.

    Attributes:
        num_particles, num_runs: N and R.
        smallest_ess, final_ess: effective sample sizes as shares of N: over all steps, and at the
            end.
        smallest_ess_at: the step t with the smallest one.
        worst_khat: over the weights just before resamplings and at the end (nan: never estimable).
        largest_weight: the largest share of one particle in its run, over all steps.
        num_roots, effective_roots: particles at T with living descendants in a run, and their
            effective number.
        independent_particles: the effective number of roots over all runs together.
        spread: standard deviation of log Z over the runs (nan for one run).
        standard_error: of the log Z of a single run (nan for one particle).
        even: whether all weights of all runs are equal, and were without resampling.
        weighted: whether the method gives valid weights at all.
        num_steps: T.
        problem: which problem this is, where there are several.
        problems: the diagnoses of all problems; this one is then the worst of them.
    """

    num_particles: int
    num_runs: int
    smallest_ess: float
    smallest_ess_at: int
    final_ess: float
    worst_khat: float
    largest_weight: float
    num_roots: int
    effective_roots: float
    independent_particles: float
    spread: float
    standard_error: float
    even: bool
    weighted: bool
    num_steps: int
    problem: int | None = None
    problems: "tuple[Diagnosis, ...]" = ()

    @property
    def verdict(self) -> Verdict:
        """``"reliable"``, ``"doubtful"`` or ``"failed"``: the worst finding."""
        verdicts = [finding.verdict for finding in self.findings]
        return max(verdicts, key=SEVERITY.__getitem__, default="reliable")

    @property
    def reasons(self) -> list[str]:
        """One sentence per finding, with the figure and its threshold."""
        return [finding.reason for finding in self.findings]

    @property
    def advice(self) -> list[str]:
        """What to try, each thing once."""
        return list(dict.fromkeys(finding.advice for finding in self.findings))

    @property
    def findings(self) -> list[Finding]:
        """What speaks against the answer; empty if nothing does."""
        if not self.weighted:
            return [
                Finding("doubtful", NO_WEIGHTS, "use it as a guide: SMC(model, guide) weighs it")
            ]
        if self.even and self.num_runs >= ENOUGH:
            return []
        if self.num_particles * self.num_runs == 1:
            return [
                Finding("doubtful", "there is one particle in one run", "use four or more runs")
            ]
        checks = _check_roots(self), _check_evidence(self), _check_collapse(self)
        return [finding for check in checks for finding in check]

    def __str__(self) -> str:
        where = "" if self.problem is None else f" (problem {self.problem}, the worst)"
        lines = [f"{self.verdict}{where}"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines += [f"  try: {advice}" for advice in self.advice]
        return "\n".join(lines)


NO_WEIGHTS = "the method gives no valid weights: nothing tells how far off its samples are"


def _check_roots(d: Diagnosis) -> Iterator[Finding]:
    if d.independent_particles >= FEW_ROOTS:
        return
    total = d.num_particles * d.num_runs
    advice = "use more particles or runs"
    if total >= 2 * FEW_ROOTS:
        advice += ", resample less (ess_threshold=0.25), or look further ahead: with TwistedSMC "
        advice += "or, if that was it, a twist that learns (TrustRegionTwistedSMC)"
    yield Finding(
        "failed" if d.independent_particles < HOPELESS_ROOTS else "doubtful",
        f"the answer rests on {d.independent_particles:.1f} independent particles (effective "
        f"roots, of {total}; at least {FEW_ROOTS:.0f} are wanted)",
        advice,
    )


def _check_evidence(d: Diagnosis) -> Iterator[Finding]:
    if d.num_runs > 1 and d.spread >= SPREAD:
        advice = "use more particles per run"
        if d.spread >= ABSURD_SPREAD:
            advice = "look at some draws: are they like the prior's data (if not: its betas, its "
            advice += f"parameterization)? Is a noise scale far too small? Only then {advice}"
        yield Finding(
            "failed" if d.spread >= HOPELESS_SPREAD else "doubtful",
            f"log Z differs between runs: its standard deviation is {d.spread:.2g} (below {SPREAD} "
            "is wanted), so they may have found different modes",
            advice,
        )
    if d.num_runs == 1 and not d.standard_error < ERROR:
        yield Finding(
            "failed" if d.standard_error >= HOPELESS_ERROR else "doubtful",
            f"log Z of the one run has the standard error {d.standard_error:.2g} (below {ERROR} is "
            "wanted)",
            "use four or more runs, and more particles",
        )


def _check_collapse(d: Diagnosis) -> Iterator[Finding]:
    if d.smallest_ess > ESS:
        return
    if d.smallest_ess_at == d.num_steps:
        advice = "draw x_T from the twisted law: TwistedSMC with proposal='conjugate'"
    elif d.smallest_ess_at <= 0.1 * d.num_steps:
        advice = "take smaller steps near the data (a prior with spacing='karras'), and question a "
        advice += "noise scale that is very small"
    else:
        advice = "look ahead with TwistedSMC, with covariance='jacobian' if observations are few, "
        advice += "or use more particles"
    yield Finding(
        "doubtful",
        f"the effective sample size fell to {d.smallest_ess:.1%} of {d.num_particles} particles at "
        f"t = {d.smallest_ess_at} (more than {ESS:.0%} is wanted)",
        advice,
    )


# --------------------------------------------------------------------------------- the figures


def diagnose(posterior: "Posterior") -> Diagnosis:
    """Measures a posterior; of several problems, returns the worst, with all of them in it."""
    problems = posterior.particles.axes[:-2]
    if not problems:
        return _diagnose(posterior, ())
    each = tuple(_diagnose(posterior, (p,)) for p in range(problems[0]))
    worst = max(
        each, key=lambda d: (SEVERITY[d.verdict], -d.independent_particles if d.weighted else 0.0)
    )
    return replace(worst, problems=each)


def _diagnose(posterior: "Posterior", at: tuple[int, ...]) -> Diagnosis:
    """The figures of one problem; ``at`` is its index."""
    particles, history = posterior.particles, posterior.history
    unknown = replace(NOTHING, problem=at[0] if at else None)
    unknown = replace(unknown, num_particles=particles.num_particles, num_runs=particles.axes[-2])
    if not particles.weighted or not history:
        return unknown
    entering = [step.ess[at].min() for step in history]
    ess = torch.stack([*entering, particles.ess[at].min()]) / particles.num_particles
    weakest = int(ess.argmin())
    evidence, last = posterior.evidence, history[-1]
    return replace(
        unknown,
        smallest_ess=float(ess[weakest]),
        smallest_ess_at=history[max(weakest - 1, 0)].t,  # the weights that entered a step are older
        final_ess=float(ess[-1]),
        worst_khat=_largest(torch.stack([step.khat[at] for step in history])),
        largest_weight=max(float(step.max_weight[at].max()) for step in history),
        num_roots=int(last.num_roots[at].min()),
        effective_roots=float(last.effective_roots[at].min()),
        independent_particles=_independent(particles, at),
        spread=float(evidence.spread[at]),
        standard_error=float(evidence.single_run_standard_error[at]),
        even=_even(particles, at),
        weighted=True,
        num_steps=history[0].t,
    )


NOTHING = Diagnosis(
    num_particles=0,
    num_runs=0,
    smallest_ess=math.nan,
    smallest_ess_at=0,
    final_ess=math.nan,
    worst_khat=math.nan,
    largest_weight=math.nan,
    num_roots=0,
    effective_roots=math.nan,
    independent_particles=math.nan,
    spread=math.nan,
    standard_error=math.nan,
    even=False,
    weighted=False,
    num_steps=0,
)


def _independent(particles: Particles, at: tuple[int, ...]) -> float:
    """The effective number of roots over all runs."""
    shares = root_shares(particles.log_weights[at], particles.roots[at])
    runs = particles.log_evidence[at].softmax(-1)
    return float(1 / (shares * runs[:, None]).square().sum())


def _even(particles: Particles, at: tuple[int, ...]) -> bool:
    """Whether the weights of all runs are equal, and no resampling made them so."""
    resampled = any(bool(step.resampled[at].any()) for step in particles.history)
    log_weights = particles.log_weights[at] + particles.log_norm[at][:, None]
    return not resampled and float(log_weights.max() - log_weights.min()) < EVEN


def _largest(khats: Tensor) -> float:
    """The largest number; nan if there is none."""
    known = khats[~khats.isnan()]
    return float(known.max()) if known.numel() else math.nan
