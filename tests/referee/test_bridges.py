"""Steps whose noise is integrated out, where the chain is exactly the reverse of the noising."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from smcdiff.inference.bridges import Bridges
from smcdiff.inference.differences import expected_log_quotient
from smcdiff.inference.pair import Pair, leaves
from smcdiff.models import (
    Controlled,
    Diffusion,
    GaussianDenoiser,
    MaskedDiffusion,
    Team,
    VariancePreserving,
)

from .checks import BOUND
from .test_compilation import STEPS, Y, compilation, conditional, learned, program, set_exact

SCHEDULE = VariancePreserving([0.3, 0.5, 0.8])


def reverse():
    """Standard normal at every t: the reverse transitions have the variances of the noising."""
    denoiser = GaussianDenoiser(torch.tensor([0.0]), torch.tensor([1.0]))
    return Diffusion(denoiser, SCHEDULE, num_steps=STEPS, variance="large")


def gradients(process, bridged, batches=30):
    """Of the loss at the exact posterior's parameters, one row for each batch of 1000."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = conditional(process)
    set_exact(guide, process)
    learner = compilation(program(process), guide, bridged=bridged, num_paths=1000 * batches)
    learner.step()
    parameters = list(leaves(poutine.trace(guide, param_only=True).get_trace(Y)).values())
    found = []
    for rows in torch.arange(1000 * batches).split(1000):
        gradient = torch.autograd.grad(learner._log_ratio(rows).mean(), parameters)
        found.append(torch.cat([g.flatten() for g in gradient]))
    rows = torch.stack(found)
    return rows[:, (rows != 0).any(0)]


def test_the_posterior_is_where_the_gradient_vanishes():
    """Of means, scales and the start; and the noise of the steps is gone from it."""
    bridged, walked = (gradients(reverse(), each) for each in (True, False))
    assert bridged.shape[1] == STEPS * 3 + STEPS + 3  # affine means, scales, and the start
    for rows in (bridged, walked):
        z = rows.mean(0) / (rows.std(0) / len(rows) ** 0.5)
        assert z.abs().max() < BOUND
    variances = bridged.var(0) / walked.var(0)
    assert variances[3:6].max() < 0.3  # of the means at t = 2; at t = 1 the noise is that of x_0
    assert variances[6:9].max() < 0.1  # and at t = 3


@pytest.mark.parametrize("subsample", [None, 2])
def test_it_learns_the_posterior_of_every_y(subsample):
    learner = learned(reverse(), subsample=subsample, bridged=True)
    assert set(learner.simulations.x) == {0}


def test_bridges_of_a_chain_are_its_paths():
    """x_t and the mean of x_{t-1}, against moments of the forward process."""
    pyro.set_rng_seed(1)
    process, number = reverse(), 200_000
    x_0 = torch.randn(number, 1)
    pair = Pair(program(process), conditional(process), (Y,), {})
    bridges = Bridges(pair, {"x": x_0}, [2])
    x_2 = bridges.x[2]["x"]
    mean = process.bridge(x_0, x_2, 2)
    grid, size = process.grid, number**0.5
    level = grid.alpha[2].item(), grid.sigma[2].item()
    assert abs((x_2 - level[0] * x_0).mean()) < BOUND * level[1] / size
    assert (x_2 - level[0] * x_0).var().item() == pytest.approx(level[1] ** 2, rel=BOUND * 2 / size)
    noise = mean - grid.alpha[1].item() * x_0  # with that of the bridge it has the level of t = 1
    assert abs(noise.mean()) < BOUND * noise.std() / size
    spread = float(noise.var()) + grid.posterior(2).variance.item()
    assert spread == pytest.approx(grid.sigma[1].item() ** 2, rel=BOUND * 2 / size)


def test_a_team_has_the_bridges_of_its_agents():
    team = Team({"a": reverse(), "b": reverse()})

    def model(y=Y):
        both = team("team")
        pyro.sample("y", dist.Normal(both["a"] + both["b"], 0.5).to_event(1), obs=y)

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x, t, denoised, y):
            return self.weight * y + 0 * x

    controlled = Controlled(team, Slope(), reads=("y",))
    learner = compilation(model, lambda y=Y: controlled("team", y=y), lr=0.1, bridged=True)
    learner.run(Y, num_updates=30)
    assert sum(learner.history[-10:]) < -0.1


def test_what_has_no_bridge_is_refused():
    tokens = MaskedDiffusion(lambda x: torch.zeros(*x.shape, 3), 2, 3, num_steps=2)

    def words(y=Y):
        x = tokens("x")
        pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True).float(), 1.0).to_event(1), obs=y)

    class Tilt(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x, t, denoised):
            return self.weight.expand(*x.shape, 4)

    tilted = Controlled(tokens, Tilt())
    learner = compilation(words, lambda y=Y: tilted("x"), bridged=True)
    with pytest.raises(ValueError, match="MaskedDiffusion 'x' does not know the mean of x_"):
        learner.step(Y)
    q, p = (dist.Categorical(logits=torch.zeros(5, 3)) for _ in range(2))
    with pytest.raises(TypeError, match="normal transitions only.* leave bridged out"):
        expected_log_quotient(q, p, torch.zeros(5))
