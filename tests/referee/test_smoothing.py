"""Holding back log-weights moves resampling decisions and nothing else."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import Rejuvenation, TwistedSMC
from smcdiff.models import Diffusion, MixtureDenoiser, VariancePreserving
from smcdiff.weights import log_mean_exp

Y, NOISE, STEPS = 1.0, 0.3, 12
BOUND = 4.3


def denoiser():
    return MixtureDenoiser(torch.tensor([[-2.0], [0.5], [2.0]]), 0.1, torch.tensor([3.0, 1.0, 2.0]))


def method(smoothing, **options):
    prior = Diffusion(denoiser(), VariancePreserving(), num_steps=STEPS, variance="mixture")

    def model():
        x = prior("x")
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=torch.tensor([Y]))

    return TwistedSMC(model, proposal="kernel", smoothing=smoothing, **options)


def final(smoothing, **options):
    pyro.set_rng_seed(1)
    return list(method(smoothing, **options).iterate())


def test_all_is_paid_in_the_end():
    options = {"num_particles": 50, "num_runs": 2, "ess_threshold": 0.0}
    plain, smooth = final(0.0, **options), final(0.7, **options)
    assert torch.equal(plain[-1].x["x"], smooth[-1].x["x"])
    torch.testing.assert_close(
        smooth[-1].log_weights, plain[-1].log_weights, rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(smooth[5].log_weights, plain[5].log_weights)


def test_a_change_is_paid_in_falling_parts():
    options = {"num_particles": 50, "ess_threshold": 0.0}
    plain, smooth = final(0.0, **options), final(0.25, **options)
    due = torch.zeros_like(plain[0].log_weights)
    for i in range(1, STEPS):
        due = due + plain[i].log_weights - plain[i - 1].log_weights
        paid = smooth[i].log_weights - smooth[i - 1].log_weights
        torch.testing.assert_close(paid, 0.75 * due, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(smooth[i].cache["owed"], 0.25 * due, rtol=1e-9, atol=1e-10)
        due = due - paid


def test_owed_weights_follow_their_particles():
    """After resampling at every step log Z is still unbiased."""
    last = final(0.6, num_particles=8, num_runs=3000, ess_threshold=1.0)[-1]
    exact, log_z = denoiser().posterior(torch.eye(1), NOISE**2, torch.tensor([Y]))
    ratio = (last.log_evidence - log_z).exp()
    assert abs(float((ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio))))) < BOUND
    assert abs(float(log_mean_exp(last.log_evidence) - log_z)) < 0.1


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_shares_outside_their_range_are_refused(smoothing):
    with pytest.raises(ValueError, match="smoothing, the share that is held back"):
        method(smoothing).run()


def test_moves_and_smoothing_exclude_each_other():
    with pytest.raises(ValueError, match="smoothing .* and rejuvenation exclude each other"):
        method(0.5, rejuvenation=Rejuvenation())
