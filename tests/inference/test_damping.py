"""The damping of look-aheads: a power of the share of the data's variance that x_t explains."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import SMC, TwistedSMC
from smcdiff.inference.denoised import DenoisedLikelihood
from smcdiff.models import Diffusion, GaussianDenoiser, VariancePreserving, digit_prior
from smcdiff.restoration import DATASETS, missing_box

SCALE = 1.3
EXACT = Diffusion(
    GaussianDenoiser(torch.zeros(2), SCALE**2), VariancePreserving(), num_steps=12, scale=SCALE
)


def kinked(prior, dims):
    def model():
        pyro.factor("reward", -prior("x").abs().sum(tuple(range(-dims, 0))))

    return model


def observed(prior):
    def model():
        x = prior("x").flatten(-3) if len(prior.event_shape) == 3 else prior("x")
        pyro.sample("y", dist.Normal(x[..., :2], 0.5).to_event(1), obs=torch.tensor([0.3, -0.2]))

    return model


def log_twists(model, steps, covariance="scalar", **options):
    """log psi along the same bootstrap paths, from T down."""
    pyro.set_rng_seed(3)
    twist = DenoisedLikelihood(covariance, num_draws=0, gradient=False, **options)
    method = SMC(model, twist=twist, num_particles=5, ess_threshold=0.0)
    states = method.iterate()
    return torch.stack([next(states).log_weights[0] for _ in range(steps)])


def share(prior, t):
    """R^2 of the regression of x_0 on x_t, for data of the process's scale."""
    signal = 1 / (1 + (prior.grid.sigma[t] / (prior.grid.alpha[t] * prior.scale)) ** 2)
    return float(signal)


@pytest.mark.parametrize("damping", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["averaged", "Gaussian"])
def test_log_twist_is_scaled_by_what_the_state_explains(kind, damping):
    prior = digit_prior(12)
    model = kinked(prior, 3) if kind == "averaged" else observed(prior)
    plain = log_twists(model, 12, damping=0.0)
    power = torch.tensor([share(prior, t) for t in range(12, 0, -1)]).double() ** damping
    torch.testing.assert_close(
        log_twists(model, 12, damping=damping), power[:, None] * plain, rtol=1e-5, atol=1e-7
    )


def test_usual_damping():
    network, exact = digit_prior(12), EXACT
    for model, covariance, usual in (
        (kinked(network, 3), "scalar", 0.5),
        (kinked(exact, 1), "scalar", 0.5),
        (observed(network), "scalar", 0.5),
        (observed(network), "jacobian", 0.5),
        (observed(exact), "jacobian", 0.0),  # linear and Gaussian: exact as it is
    ):
        usually = log_twists(model, 12, covariance)
        assert torch.equal(usually, log_twists(model, 12, covariance, damping=usual))


@pytest.mark.parametrize("damping", [-0.5, float("nan")])
def test_negative_damping_is_refused(damping):
    with pytest.raises(ValueError, match="damping must be a number of at least 0"):
        TwistedSMC(kinked(EXACT, 1), damping=damping).parts()


def test_jacobians_of_networks_are_not_believed_blindly():
    """Half of their eigenvalues are negative in much noise: certainty, if they were cut at zero."""
    prior, seen = digit_prior(20, spacing="log_snr"), DATASETS["digits"].seen
    truth = prior("truth").detach()
    y = truth[seen] + 0.05 * torch.randn(int(seen.sum()))

    def log_evidence(covariance):
        model = missing_box(prior, seen, 0.05)
        settings = {"covariance": covariance, "proposal": "gradient", "num_particles": 32}
        return TwistedSMC(model, **settings).run(y).evidence.log_evidence

    # by this seed +13; between -46 and -190 if they were believed
    assert log_evidence("jacobian") > log_evidence("scalar") - 25
