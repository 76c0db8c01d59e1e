"""Families side by side: one part alone is that part, and who is chosen for which program."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff import Program
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    IntermediateReward,
    JointTwist,
    PowerTwist,
    QuadraticTwist,
    ResidualTwist,
    TokenTwist,
    TrustRegionTwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import (
    Diffusion,
    EnumeratedDenoiser,
    GaussianDenoiser,
    LogSNR,
    MaskedDiffusion,
    digit_prior,
)

from ..referee.checks import BOUND, z_of_evidence

PRIOR = Diffusion(
    GaussianDenoiser(torch.zeros(3).double(), 1.0), LogSNR(3.0, -1.0), num_steps=6, variance="exact"
)
TABLE = torch.sin(1.0 + 2 * torch.arange(3)[:, None] + 3 * torch.arange(3)).exp()
QUICK = Descent(steps=20, batch=32, times=2)
few = pytest.mark.filterwarnings("ignore:.* has more parameters than")
PARTS = {
    "power": lambda: PowerTwist(begin=0.7),
    "undamped": lambda: PowerTwist(DenoisedLikelihood("scalar", damping=0.0)),
    "residual": lambda: ResidualTwist(DenoisedLikelihood(), width=8, descent=QUICK),
    "memory": lambda: PowerTwist(IntermediateReward("max")),
    "quadratic": QuadraticTwist,
}


def gaussian():
    x = PRIOR("x")
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.full((3,), 1.2).double())


def mixed():
    x = PRIOR("x")
    w = MaskedDiffusion(EnumeratedDenoiser(TABLE), 2, 3, num_steps=6)("w")
    pyro.factor("near", -(x - 0.5 * (w == 2).sum(-1, keepdim=True)).abs().sum(-1))


def rewarded(prior, reward):
    def model():
        pyro.factor("reward", reward(prior("x")))

    return model


@few
@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_as_if_it_were_alone(part):
    """Start, look-ahead, moves, weights and fits: the same numbers."""
    found = []
    for learned in (PARTS[part](), JointTwist(PARTS[part]())):
        pyro.set_rng_seed(0)
        method = TrustRegionTwistedSMC(gaussian, learned, num_particles=32, num_iterations=1)
        found.append(method.run())
        names = [name.removeprefix("0/") for name in learned.tensors()]
        found.append(dict(zip(names, learned.tensors().values(), strict=True)))
    alone, its, joint, whole = found
    assert alone.log_weights.equal(joint.log_weights)
    assert its.keys() == whole.keys()
    assert all(its[name].equal(whole[name]) for name in its)


def test_a_power_beside_a_table_of_tokens():
    pyro.set_rng_seed(0)
    learned = JointTwist(PowerTwist(), TokenTwist())
    options = {"num_iterations": 2, "learning_particles": 256, "num_particles": 64}
    posterior = TrustRegionTwistedSMC(mixed, learned, num_runs=64, **options).run()
    reference = SMC(mixed, num_particles=100_000, ess_threshold=0.0).run()
    assert abs(z_of_evidence(posterior.particles, float(reference.log_evidence))) < BOUND


@pytest.mark.parametrize(
    ("prior", "reward", "chosen"),
    [
        (digit_prior(4), lambda x: x.sum((-1, -2, -3)), PowerTwist),
        (digit_prior(4), lambda x: x.detach().sum((-1, -2, -3)), QuadraticTwist),
        (digit_prior(4), lambda x: torch.as_tensor(x.numpy().sum((-1, -2, -3))), QuadraticTwist),
        (PRIOR, lambda x: x.sum(-1), QuadraticTwist),
    ],
    ids=["image", "no gradient", "NumPy", "few elements"],
)
def test_images_with_gradients_get_a_power(prior, reward, chosen):
    learned = TrustRegionTwistedSMC(rewarded(prior, reward)).learned
    learned.prepare(Program(rewarded(prior, reward)))
    assert [type(part) for part in learned.parts] == [chosen, TokenTwist]


@few
def test_parameters_wait_for_the_parts_to_be_chosen(tmp_path):
    made = TrustRegionTwistedSMC(gaussian, num_particles=64, num_iterations=1)
    made.learn()
    made.learned.save(tmp_path / "learned")
    loaded = JointTwist()
    loaded.load(tmp_path / "learned")
    waiting = loaded.tensors()
    loaded.prepare(Program(gaussian))
    for tensors in (waiting, loaded.tensors()):
        assert tensors.keys() == made.learned.tensors().keys()
        assert all(tensors[name].equal(part) for name, part in made.learned.tensors().items())
