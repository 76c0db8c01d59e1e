"""How runs are judged: exactly, or by a z-score at a fixed seed."""

from typing import Any

import torch
from torch import Tensor

from smcdiff import Particles
from smcdiff.inference import ParticleMethod

BOUND = 4.3  # of |z|: exceeded by chance about twice in 100,000 tests


def finish(method: ParticleMethod, *args: Any, **kwargs: Any) -> Particles:
    """The particles at t = 0."""
    *_, last = method.iterate(*args, **kwargs)
    return last


def z_score(values: Tensor, truth: float) -> float:
    """How many standard errors the mean of independent values lies from the truth."""
    values = values.double().flatten()
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


def z_of_evidence(particles: Particles, log_truth: float) -> float:
    """The z-score of Z-hat, which is unbiased (its logarithm is not), from independent runs."""
    return z_score((particles.log_evidence - log_truth).exp(), 1.0)


def z_of_mean(particles: Particles, values: Tensor, truth: float, log_evidence: float) -> float:
    """The z-score of a posterior mean, from the unbiased estimates Z-hat (mean_r - truth) / Z.

    Args:
        values: of the function whose posterior mean is ``truth``, with shape ``(run, particle)``.
    """
    means = (particles.log_weights.softmax(-1) * (values - truth)).sum(-1)
    return z_score((particles.log_evidence - log_evidence).exp() * means, 0.0)


def assert_zero_variance(log_evidence: Tensor, truth: float) -> None:
    """Every run of a single particle knows log Z to rounding."""
    assert float(log_evidence.std()) < 1e-9
    torch.testing.assert_close(
        log_evidence, torch.full_like(log_evidence, truth), rtol=0, atol=1e-9
    )
