"""What every twist promises. A new one gets a row in ``TWISTS`` and inherits all of this."""

import inspect
import math
from collections.abc import Callable
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
    IntermediateReward,
    JointTwist,
    NoTwist,
    PowerTwist,
    Proposal,
    RelaxedLikelihood,
    ResidualTwist,
    StringTwist,
    Tempered,
    TwistedKernel,
)
from smcdiff.particles import flatten_tree

from ..oracles import moments
from .kinds import Bend, kernels, masked, network, quadratic, relaxed, residual, strings, tokens
from .structures import STRUCTURES, Pieces
from .test_any_program import SIZES, check

TWISTS: dict[str, Callable[[], Twist]] = {
    "NoTwist": NoTwist,
    "JointTwist": lambda: JointTwist(quadratic(), tokens()),
    "IntermediateReward": lambda: IntermediateReward("difference", exponent=0.7),
    "IntermediateReward, max": lambda: IntermediateReward("max", exponent=0.5),
    "IntermediateReward, sum": lambda: IntermediateReward("sum", exponent=0.3),
    "IntermediateReward, draws": lambda: IntermediateReward(num_draws=3),
    "Tempered": lambda: Tempered(IntermediateReward("difference"), 0.5),
    "Tempered, Gaussian": lambda: Tempered(DenoisedLikelihood("scalar"), lambda t, total: 1 / t),
    "DenoisedLikelihood": lambda: DenoisedLikelihood(),
    "DenoisedLikelihood, none": lambda: Tempered(DenoisedLikelihood("none"), 0.5),
    "DenoisedLikelihood, scalar": lambda: DenoisedLikelihood("scalar", num_draws=2),
    "DenoisedLikelihood, diagonal": lambda: DenoisedLikelihood("diagonal"),
    "DenoisedLikelihood, without gradient": lambda: DenoisedLikelihood("scalar", gradient=False),
    "GaussianKernels": kernels,
    "PowerTwist": lambda: PowerTwist(begin=0.7),
    "QuadraticTwist": quadratic,
    "RelaxedLikelihood": lambda: RelaxedLikelihood(relaxed),
    "ResidualTwist": residual,
    "ResidualTwist, alone": lambda: ResidualTwist(None, Bend()),
    "StringTwist": strings,
    "TokenTwist": tokens,
}
PROPOSALS: dict[str, Callable[[], Proposal]] = {
    "kernel": FromKernel,
    "conjugate": TwistedKernel,
    "gradient": lambda: TwistedKernel(curvature=False, twisted_start=False),
}

FLAGS = tuple(name for name, value in vars(Twist).items() if isinstance(value, bool))
WRAPPERS: dict[str, Callable[[Twist], Twist]] = {
    "PowerTwist": PowerTwist,
    "ResidualTwist": ResidualTwist,
    "StringTwist": StringTwist,
    "Tempered": lambda twist: Tempered(twist, 0.5),
}

each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


@pytest.fixture(params=TWISTS)
def twist(request: pytest.FixtureRequest) -> Twist:
    return TWISTS[request.param]()


def test_every_exported_twist_has_a_row() -> None:
    exported = {
        name
        for name in smcdiff.inference.__all__
        if inspect.isclass(found := getattr(smcdiff.inference, name))
        and issubclass(found, Twist)
        and not inspect.isabstract(found)
    }
    assert exported == {name.split(",")[0] for name in TWISTS}


class Demanding(Twist):
    """Needs, offers or measures one thing, as is known once it has seen the program."""

    def __init__(self, flag: str) -> None:
        self.flag = flag

    def prepare(self, program: Program) -> None:
        setattr(self, self.flag, True)

    def evaluate(self, view: View) -> TwistValue:
        return TwistValue(torch.zeros(view.batch).double())


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_twist_made_of_another_has_its_needs(wrap: str, flag: str) -> None:
    twist = WRAPPERS[wrap](Demanding(flag))
    twist.prepare(Program(program()))
    assert [name for name in FLAGS if getattr(twist, name)] == [flag]


def program(constant: float = 0.0) -> Callable[[], None]:
    """A latent, a Gaussian observation, a reward, and processes of both kinds."""
    prior, tokens = network(), masked()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        total = prior("x").sum((-1, -2))
        token = tokens("w")[..., 0]
        pyro.sample("y", dist.Normal(total + z, 1.0), obs=torch.tensor(0.4))
        pyro.factor("reward", 0.5 * total.tanh() + 0.3 * token)
        pyro.factor("constant", torch.tensor(constant))

    return model


def run(twist: Twist, model: Any, proposal: str = "conjugate", **settings: Any) -> list[Particles]:
    torch.manual_seed(3)
    settings = {"num_particles": 6, "num_runs": 2, "ess_threshold": 1.0, **settings}
    return list(SMC(model, twist=twist, proposal=PROPOSALS[proposal](), **settings).iterate())


@each_proposal
def test_log_psi_is_finite_and_belongs_to_particles(twist: Twist, proposal: str) -> None:
    for state in run(twist, program(), proposal):
        leaves, _ = flatten_tree(state.cache)
        assert all(leaf.shape[:2] == (2, 6) for leaf in leaves.values())
        assert not any(leaf.requires_grad for leaf in leaves.values())
        assert state.cache["log_psi"].dtype == torch.float64
        assert state.cache["log_psi"].isfinite().all()


@pytest.mark.parametrize("size", [1, 5])
def test_chunks_change_nothing(twist: Twist, size: int) -> None:
    whole, chunked = run(twist, program())[-1], run(twist, program(), chunk_size=size)[-1]
    assert whole.roots.equal(chunked.roots)
    torch.testing.assert_close(whole.log_weights, chunked.log_weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.x["x"], chunked.x["x"], rtol=1e-4, atol=1e-4)


def test_a_constant_factor_moves_the_evidence_and_nothing_else(twist: Twist) -> None:
    before, after = run(twist, program())[-1], run(twist, program(constant=3.0))[-1]
    assert before.roots.equal(after.roots)
    torch.testing.assert_close(
        after.log_evidence - before.log_evidence, torch.full((2,), 3.0).double(), rtol=0, atol=1e-5
    )


@each_proposal
@pytest.mark.parametrize("structure", ["latents_in_a_plate", "reward_and_gaussian"])
def test_it_never_changes_the_target(twist: Twist, structure: str, proposal: str) -> None:
    example = STRUCTURES[structure]
    model = example.program(Pieces("network"))
    method = SMC(model, twist=twist, proposal=PROPOSALS[proposal](), **SIZES)
    check(method.run(), example, "network")


@each_proposal
def test_hard_constraints_keep_it_finite(twist: Twist, proposal: str) -> None:
    """-inf at an estimate of x_0 is no verdict on the path."""
    prior = network()

    def model() -> None:
        x = prior("x")[..., 0, 0]
        pyro.factor("positive", torch.where(x > 0, 0.3 * x, -math.inf))

    states = run(twist, model, proposal, num_particles=16, num_runs=64)
    assert all(s.cache["log_psi"].isfinite().all() for s in states[:-1])
    evidence = states[-1].log_evidence.exp()
    error = evidence.std() / math.sqrt(len(evidence))
    assert abs(evidence.mean() - tilted_half_line(0.3)) < 4.3 * error
    assert error < 0.05


def tilted_half_line(slope: float) -> Tensor:
    """The integral of exp(slope x) N(x) over x > 0."""
    mean, spread = moments(network())
    tilted = torch.distributions.Normal(mean[0] + slope * spread[0, 0], spread[0, 0].sqrt())
    weight = (slope * mean[0] + 0.5 * slope**2 * spread[0, 0]).exp()
    return weight * (1 - tilted.cdf(torch.tensor(0.0)))
