"""Strings at real length: masked diffusion of a Markov chain, steered to rewards, all exact."""

import pyro
import pytest
import torch

from smcdiff import Twist, TwistValue
from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import MarkovDenoiser, MaskedDiffusion, contains, ends_with

from .checks import BOUND, assert_zero_variance, finish, z_of_evidence, z_of_mean, z_score

LENGTH, VOCABULARY = 12, 27
PATTERN = torch.tensor([3, 1, 14])
REWARDS = {
    "contains": contains(PATTERN, VOCABULARY, 4.0),
    "ends with": ends_with(PATTERN[:2], VOCABULARY, 3.0, -1.0),
    "both": contains(PATTERN[1:], VOCABULARY, 2.0) + ends_with(PATTERN[:1], VOCABULARY, 1.5),
}


def chain():
    """Letters that prefer some neighbours, as in names."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator).double().mul(1.5)
    rows = table.softmax(-1)
    return MarkovDenoiser(rows[0], rows[1:], LENGTH)


def prior(denoiser, **settings):
    settings = settings or {"num_steps": LENGTH, "reveal": "even"}
    return MaskedDiffusion(denoiser, LENGTH, VOCABULARY, **settings)


def program(reward, given=None, **settings):
    process = prior(chain(), **settings)
    context = {} if given is None else {"given": given}

    def model():
        x = process("x", **context)
        pyro.factor("reward", reward(x))

    return model


def optimal_guide(reward, given=None):
    process = prior(chain().tilted(reward))
    return lambda: process("x", **({} if given is None else {"given": given}))


class Exact(Twist):
    """E[e^r | revealed], by dynamic programming."""

    def __init__(self, reward):
        self.tilted = chain().tilted(reward)

    def evaluate(self, view):
        return TwistValue(self.tilted.log_twist(view.x["x"]))


@pytest.fixture(params=REWARDS)
def reward(request):
    return REWARDS[request.param]


GIVEN = torch.full((LENGTH,), VOCABULARY)
GIVEN[[0, 1, 7]] = torch.tensor([5, 3, 20])


@pytest.mark.parametrize("given", [None, GIVEN], ids=["free", "infilling"])
def test_one_particle_knows_the_evidence(reward, given):
    method = SMC(
        program(reward, given),
        optimal_guide(reward, given),
        twist=Exact(reward),
        num_particles=1,
        num_runs=20,
    )
    start = torch.full((LENGTH,), VOCABULARY) if given is None else given
    truth = float(chain().tilted(reward).log_twist(start))
    for state in method.iterate():
        assert_zero_variance(state.log_evidence, truth)
    drawn = state.x["x"][:, 0]
    assert bool(((start == VOCABULARY) | (drawn == start)).all())


def test_the_guide_alone_draws_from_the_posterior(reward):
    """The weights of whole paths, unlike those on the way, need no twist to be equal."""
    method = SMC(program(reward), optimal_guide(reward), num_particles=16, ess_threshold=0.0)
    last = finish(method)
    truth = float(chain().tilted(reward).log_evidence)
    torch.testing.assert_close(
        last.log_weights, torch.full_like(last.log_weights, truth), rtol=0, atol=1e-9
    )


def test_draws_have_the_marginals_of_the_posterior(reward):
    posterior = chain().tilted(reward)
    last = finish(SMC(program(reward), optimal_guide(reward), num_particles=600, ess_threshold=0.0))
    drawn = torch.nn.functional.one_hot(last.x["x"][0], VOCABULARY).double()
    law = posterior(torch.full((LENGTH,), VOCABULARY)).exp()
    error = (drawn.mean(0) - law) / (law * (1 - law) / len(drawn)).sqrt()
    assert float(error[law > 0.01].abs().max()) < BOUND  # rarer tokens are no normal deviates


@pytest.mark.parametrize(
    ("method", "particles"), [(SMC, 16), (TwistedSMC, 8)], ids=["bootstrap", "twisted"]
)
def test_evidence_is_unbiased(method, particles):
    reward = REWARDS["both"]
    posterior = chain().tilted(reward)
    last = finish(method(program(reward), num_particles=particles, num_runs=300))
    truth = float(posterior.log_evidence)
    assert abs(z_of_evidence(last, truth)) < BOUND
    ending = last.x["x"][..., -1] == PATTERN[0]
    law = float(posterior(torch.full((LENGTH,), VOCABULARY))[-1, PATTERN[0]].exp())
    assert abs(z_of_mean(last, ending.double(), law, truth)) < BOUND


def test_one_parallel_step_is_a_product_of_marginals():
    """T = 1 draws all tokens independently: that, too, is a Markov chain, and known exactly."""
    reward = REWARDS["contains"]
    marginals = chain()(torch.full((LENGTH,), VOCABULARY)).exp()
    steps = marginals[1:, None].expand(-1, VOCABULARY, -1)
    product = MarkovDenoiser(marginals[0], steps).tilted(reward)
    last = finish(SMC(program(reward, num_steps=1), num_particles=1, num_runs=8000))
    weights = last.log_weights[:, 0].exp()
    assert abs(z_score(weights, float(product.log_evidence.exp()))) < BOUND
    data = float(chain().tilted(reward).log_evidence)
    assert abs(float(product.log_evidence) - data) > 1e-3  # the chain, not the data, is the prior
