"""Any program, by any algorithm, over any kind of process: the exact answer, or a message.

Two numbers are unbiased whatever the twist, the guide and the resampling: the estimate of the
evidence, and that estimate times the posterior mean. Both are compared with sums over grids.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    IntermediateReward,
    ParticleMethod,
    TrustRegionTwistedSMC,
    TwistedSMC,
)

from .kinds import KINDS
from .structures import STRUCTURES, Pieces, Structure

RUNS, PARTICLES = 128, 8
SIZES: dict[str, Any] = {"num_particles": PARTICLES, "num_runs": RUNS}

# The messages of cells that are refused: (algorithm, structure, kind), None for all of them.
REFUSED: list[tuple[str | None, str | None, str | None, str]] = [
    (None, "context", "exact", "an exact denoiser is not conditional"),
    (None, "team", "chain", "changes shape on its way"),
    ("guided", "two_processes", "chain", "changes shape on its way"),
]


def twisted(proposal: str, covariance: str) -> Callable[..., ParticleMethod]:
    def make(model: Any, guide: Any, **options: Any) -> ParticleMethod:
        return TwistedSMC(
            model, proposal=proposal, covariance=covariance, num_draws=4, **SIZES, **options
        )

    return make


def intermediate(model: Any, guide: Any, **options: Any) -> ParticleMethod:
    return SMC(model, twist=IntermediateReward("max", exponent=0.5), **SIZES, **options)


def trust_region(model: Any, guide: Any, **options: Any) -> ParticleMethod:
    return TrustRegionTwistedSMC(
        model, num_iterations=1, learning_particles=256, **SIZES, **options
    )


ALGORITHMS: dict[str, Callable[..., ParticleMethod]] = {
    "bootstrap": lambda model, guide, **options: SMC(model, **SIZES, **options),
    "guided": lambda model, guide, **options: SMC(model, guide, **SIZES, **options),
    "intermediate": intermediate,
    "trust region": trust_region,
} | {
    f"{proposal}-{covariance}": twisted(proposal, covariance)
    for proposal in ("conjugate", "gradient", "kernel")
    for covariance in ("scalar", "jacobian")
}


LEARNING = ("network", "chain", "masked")  # one kind of each sort: learning takes longer


def cells() -> Iterator[tuple[str, str, str]]:
    for kind, structure, algorithm in itertools.product(KINDS, STRUCTURES, ALGORITHMS):
        has_no_jacobian = KINDS[kind].discrete and algorithm.endswith("-jacobian")
        learns_alike = algorithm == "trust region" and kind not in LEARNING
        if not has_no_jacobian and not learns_alike:
            yield kind, structure, algorithm


@pytest.mark.parametrize(("kind", "structure", "algorithm"), list(cells()))
def test_any_program(kind: str, structure: str, algorithm: str) -> None:
    example = STRUCTURES[structure]
    build_guide = example.guide or example.program

    def run() -> Posterior:
        model = example.program(Pieces(kind))
        guide = build_guide(Pieces(kind, guide=True)) if algorithm == "guided" else None
        method = ALGORITHMS[algorithm](model, guide, per_problem=example.per_problem)
        return method.run(*example.args, **example.kwargs)

    message = refusal(kind, structure, algorithm)
    if message is not None:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            run()
        return
    check(run(), example, kind)


def refusal(kind: str, structure: str, algorithm: str) -> str | None:
    for algorithms, structures, kinds, message in REFUSED:
        named = (algorithms, algorithm), (structures, structure), (kinds, kind)
        if all(part is None or whole.startswith(part) for part, whole in named):
            return message
    return None


def check(posterior: Posterior, example: Structure, kind: str) -> None:
    log_evidence, mean = (torch.as_tensor(part) for part in example.exact(kind))
    ratio = (posterior.log_evidence - log_evidence[..., None]).exp()
    assert_mean(ratio, torch.ones_like(log_evidence))
    average = (posterior.log_weights.softmax(-1) * quantity(posterior, kind)).sum(-1)
    assert_mean(ratio * (average - mean[..., None]), torch.zeros_like(mean))


def quantity(posterior: Posterior, kind: str) -> Tensor:
    """The sum of all x_0 and all latents, per particle."""
    axes = posterior.log_weights.shape
    total = torch.zeros(axes, dtype=torch.float64)
    for name, value in posterior.samples.items():
        unit = 1.0 if name in posterior.particles.latents else KINDS[kind].unit
        total = total + unit * value.double().reshape(*axes, -1).sum(-1)
    return total


def assert_mean(values: Tensor, expected: Tensor) -> None:
    """Over independent runs; up to rounding in float32 where they do not vary."""
    error = values.std(-1) / math.sqrt(values.shape[-1])
    assert ((values.mean(-1) - expected).abs() < 4.3 * error + 1e-5).all()
    assert (error < 0.3).all(), "too noisy a problem to test anything"
