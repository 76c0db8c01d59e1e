"""What every proposal promises. A new one gets a row in ``PROPOSALS`` and inherits all of this.

Behind a twist that is blind, the weight at t >= 1 is what the proposal owes the prior: its mean is
one, and with it every prior mean is met.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import smcdiff.inference
from smcdiff import Particles, Program, Twist, TwistValue, View
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    FromKernel,
    GuidedProposal,
    JointTwist,
    NestedProposal,
    PowerTwist,
    Proposal,
    TiltedTokens,
    TwistedKernel,
)
from smcdiff.models import Controlled, Diffusion, Team
from smcdiff.process import is_deterministic

from ..oracles import affine
from .kinds import (
    SHORT,
    Linear,
    drift,
    exact,
    kernels,
    masked,
    network,
    quadratic,
    residual,
    strings,
    tilt,
    tokens,
)


def guide() -> None:
    """Proposes for the program below: a latent, a network's process and a masked one."""
    pyro.sample("z", dist.Normal(0.3, 1.3))
    Controlled(network(), drift, scale=lambda t: 1.1)("x")
    Controlled(masked(), tilt)("w")


def guide_with_a_team() -> None:
    pair = Team({"x": network(), "v": exact("large")})
    Controlled(pair, lambda x, t, denoised: 0.1 - 0.05 * x.roll(1, -1))("xv")
    masked()("w")


PROPOSALS: dict[str, Callable[[], Proposal]] = {
    "FromKernel": FromKernel,
    "TwistedKernel": TwistedKernel,
    "TwistedKernel, gradient": lambda: TwistedKernel(curvature=False, twisted_start=False),
    "TwistedKernel, tempered": lambda: TwistedKernel(temper=0.5),
    "TwistedKernel, clipped": lambda: TwistedKernel(clip=0.3),
    "GuidedProposal": lambda: GuidedProposal(guide),
    "GaussianKernels": kernels,
    "JointTwist": lambda: JointTwist(quadratic(), tokens()),
    "NestedProposal": lambda: NestedProposal(3),
    "NestedProposal, shifted": lambda: NestedProposal(2, TwistedKernel()),
    "PowerTwist": lambda: PowerTwist(begin=0.7),
    "QuadraticTwist": quadratic,
    "ResidualTwist": residual,
    "StringTwist": strings,
    "TiltedTokens": lambda: TiltedTokens(0.7),
    "TokenTwist": tokens,
}


@dataclass
class Blind(Twist):
    """Tells the proposal where to go, and itself sees nothing."""

    inner: Twist

    def prepare(self, program: Program) -> None:
        self.inner.prepare(program)
        for name in (n for n, default in vars(Twist).items() if isinstance(default, bool)):
            setattr(self, name, getattr(self.inner, name))

    @property
    def num_draws(self) -> int:
        return self.inner.num_draws

    def evaluate(self, view: View) -> TwistValue:
        value = self.inner.evaluate(view)
        return TwistValue(torch.zeros_like(value.log_psi), value.cache)


@pytest.fixture(params=PROPOSALS)
def proposal(request: pytest.FixtureRequest) -> Proposal:
    return PROPOSALS[request.param]()


def test_every_exported_proposal_has_a_row() -> None:
    exported = {
        name
        for name in smcdiff.inference.__all__
        if inspect.isclass(found := getattr(smcdiff.inference, name))
        and issubclass(found, Proposal)
        and not inspect.isabstract(found)
    }
    assert exported == {name.split(",")[0] for name in PROPOSALS}


def program(variance: str = "large") -> Callable[[], None]:
    prior = Diffusion(Linear(2), SHORT, (1, 2), num_steps=2, variance=variance)  # type: ignore[arg-type]
    tokens = masked()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = prior("x")
        tokens("w")
        y = dist.Normal(x[..., 0, :] + z[..., None], 2.0).to_event(1)
        pyro.sample("y", y, obs=torch.ones(2))
        pyro.factor("reward", 0.3 * x[..., 0, 1].tanh())

    return model


def run(proposal: Proposal, model: Any = None, size: int = 2000) -> list[Particles]:
    own = proposal if isinstance(proposal, Twist) else None  # what learns is both
    twist = Blind(own or DenoisedLikelihood("jacobian", num_draws=2))
    method = SMC(
        model or program(), twist=twist, proposal=proposal, num_particles=size, ess_threshold=0.0
    )
    return list(method.iterate())


def assert_mean(values: Tensor, expected: Tensor | float) -> None:
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() < 4.3 * error + 1e-12).all()


def test_weights_pay_for_the_proposal(proposal: Proposal) -> None:
    """The mean weight is one, and weighted means are those of the prior, at every step."""
    mean = torch.zeros(2, dtype=torch.float64)
    for state in run(proposal)[:-1]:
        weights = state.log_weights[0].exp()
        assert_mean(weights, 1.0)
        x = state.x["x"][0].double().flatten(1)
        assert_mean(weights[:, None] * (x - mean), 0.0)
        slope, offset, _ = affine(network(), state.t)
        mean = slope @ mean + offset


def test_weighted_latents_and_tokens_are_those_of_the_prior(proposal: Proposal) -> None:
    *_, state, _ = run(proposal)
    weights = state.log_weights[0].exp()
    assert_mean(weights * state.latents["z"][0], 0.0)
    assert_mean(weights * (state.x["w"][0] == 3).double().mean(-1), 0.5)  # half are masked at t = 1


def test_draws_have_the_states_own_dtype_and_shape(proposal: Proposal) -> None:
    for state in run(proposal, size=5):
        assert state.x["x"].dtype == torch.float32
        assert state.x["x"].shape == (1, 5, 1, 2)
        assert state.x["w"].dtype == torch.int64
        assert state.log_weights.dtype == torch.float64


def test_a_last_step_without_variance_is_followed(proposal: Proposal) -> None:
    """x_0 is the kernel's point, and the move costs nothing."""
    if isinstance(proposal, GuidedProposal):
        proposal = GuidedProposal(lambda: (program("small")(), None)[1])
    prior = Diffusion(Linear(2), SHORT, (1, 2), num_steps=2)
    *_, before, after = run(proposal, program("small"), size=5)
    law = prior.kernel(before.x["x"][0], 1).law
    assert is_deterministic(law)
    torch.testing.assert_close(after.x["x"][0], law.mean)


def test_teams_propose_for_single_processes() -> None:
    def model() -> None:
        network()("x")
        exact("large")("v")
        masked()("w")

    method = SMC(model, guide_with_a_team, num_particles=2000, ess_threshold=0.0)
    for state in method.iterate():
        assert_mean(state.log_weights[0].exp(), 1.0)
