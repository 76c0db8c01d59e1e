"""Observations that share no element of x_0 cost no matrices, and are seen as by matrices."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import TwistedSMC
from smcdiff.inference.observations import Separate
from smcdiff.models import digit_prior
from smcdiff.restoration import blur, reduce

PRIOR = digit_prior(6)
SEEN = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.6
Y, MASKED = torch.linspace(-0.5, 0.5, 4), torch.linspace(-0.5, 0.5, int(SEEN.sum()))


def masked(x):
    pyro.sample("y", dist.Normal(x[..., SEEN], 0.2).to_event(1), obs=MASKED)


def means(x):
    noise = pyro.sample("noise", dist.HalfNormal(0.5))  # variances of each particle's own
    scale = noise[..., None, None, None] + 0.1
    pyro.sample("y", dist.Normal(reduce(x, 4), scale).to_event(3), obs=Y.reshape(1, 2, 2))


def weighted(x):
    rows = torch.arange(64.0).reshape(4, 16) / 60
    pyro.sample(
        "y", dist.Normal((x.reshape(*x.shape[:-3], 4, 16) * rows).sum(-1), 0.3).to_event(1), obs=Y
    )


def blurred(x):
    pyro.sample("y", dist.Normal(blur(x, 1.0), 0.3).to_event(3), obs=torch.zeros(1, 8, 8))


def correlated(x):
    covariance = 0.1 * (torch.eye(4) + 0.5)
    seen = reduce(x, 4).flatten(-3)
    pyro.sample("y", dist.MultivariateNormal(seen, covariance), obs=Y)


def run(observe, prior=PRIOR, **options):
    def model():
        observe(prior("x"))

    pyro.set_rng_seed(3)
    method = TwistedSMC(model, num_particles=5, ess_threshold=0.0, proposal="gradient", **options)
    return torch.stack([state.log_weights[0] for state in method.iterate()])


@pytest.fixture
def counted(monkeypatch):
    """How often variances took the place of covariances."""
    times, plain = [], Separate.weighed
    monkeypatch.setattr(Separate, "weighed", lambda *a: times.append(1) or plain(*a))
    return times


@pytest.mark.parametrize("covariance", ["none", "scalar", "diagonal"])
@pytest.mark.parametrize("observe", [masked, means, weighted])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_variances_do_what_covariances_do(variance, observe, covariance, counted, monkeypatch):
    prior = digit_prior(6, variance=variance)
    by_variances = run(observe, prior, covariance=covariance)
    assert counted
    counted.clear()
    monkeypatch.setattr(Separate, "fits", lambda matrix: False)
    by_covariances = run(observe, prior, covariance=covariance)
    assert not counted
    torch.testing.assert_close(by_variances, by_covariances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("observe", [blurred, correlated])
def test_what_hangs_together_needs_covariances(observe, counted):
    assert run(observe, covariance="scalar").isfinite().all()
    assert not counted
