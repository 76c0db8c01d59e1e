"""A learned power: its regression finds the power that drew the paths; bad input."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import DenoisedLikelihood, PowerTwist, TrustRegionTwistedSMC
from smcdiff.inference.engine import Engine, Settings
from smcdiff.inference.learned import record
from smcdiff.models import Diffusion, GaussianDenoiser, LogSNR
from smcdiff.program import Program

PRIOR = Diffusion(
    GaussianDenoiser(torch.zeros(6).double(), 1.0), LogSNR(3.0, -1.0), num_steps=8, variance="exact"
)


def model(y=1.5):
    x = PRIOR("x")
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.full((6,), y).double())


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_the_fit_finds_the_power_that_drew_the_paths(power, curvature):
    pyro.set_rng_seed(0)
    base = DenoisedLikelihood(curvature=curvature)
    learned = PowerTwist(base, begin=power, reach=0)
    engine = Engine(Program(model), learned, learned, Settings(2000, ess_threshold=0.0))
    paths = record(engine.evaluator, list(engine.iterate()), learned)
    learned.fit(paths, torch.full((2000,), 1 / 2000).double())
    assert float((learned.powers - power).abs().max()) < 0.1
    before, again = learned.powers, PowerTwist(begin=power)
    again.restore(learned.tensors())
    assert torch.equal(again.powers, before)


def test_few_paths_leave_a_perfect_twist_nearly_alone():
    """The conjugate twist is exact: all paths weigh alike, and one iteration is enough."""
    pyro.set_rng_seed(0)
    method = TrustRegionTwistedSMC(model, PowerTwist(), num_particles=64)
    method.learn()
    assert len(method.iterations) == 1
    assert float(method.iterations[0].ess) == pytest.approx(1.0)
    assert float((method.learned.powers - 1).abs().max()) < 0.1


def test_powers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"begin must be in \[0, largest = 2.0\], but got 3.0"):
        PowerTwist(begin=3.0, largest=2.0)
    with pytest.raises(ValueError, match="pseudo_count must be a number above 0, but got 0"):
        PowerTwist(pseudo_count=0.0)
    learned = PowerTwist()
    learned.restore({"powers": torch.ones(5)})
    with pytest.raises(ValueError, match="learned for 5 steps, but the program takes 8"):
        learned.prepare(Program(model))
