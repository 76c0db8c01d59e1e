"""Inference compilation against closed forms: simulated paths are posterior draws of their data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from smcdiff.inference import SMC, InferenceCompilation
from smcdiff.inference.compilation import simulate
from smcdiff.inference.pair import leaves
from smcdiff.models import (
    Controlled,
    Diffusion,
    Flow,
    GaussianDenoiser,
    Head,
    LearnedScale,
    VariancePreserving,
)
from smcdiff.program import Program

from ..oracles import affine, moments
from .checks import BOUND

GAIN, NOISE, STEPS = 1.3, 0.6, 3
Y = torch.tensor([0.3], dtype=torch.float64)


def prior():
    denoiser = GaussianDenoiser(torch.tensor([0.4]), torch.tensor([0.9]))
    return Diffusion(denoiser, VariancePreserving([0.3, 0.5, 0.8]), num_steps=STEPS)


def large():
    """Every transition has a variance."""
    denoiser = GaussianDenoiser(torch.tensor([0.4]), torch.tensor([0.9]))
    schedule = VariancePreserving([0.3, 0.5, 0.8])
    return Diffusion(denoiser, schedule, num_steps=STEPS, variance="large")


def program(process):
    def model(y=Y):
        x = process("x")
        pyro.sample("y", dist.Normal(GAIN * x, NOISE).to_event(1), obs=y)

    return model


class Affine(nn.Module):
    """u_t = a_t x + b_t + c_t y, and the same for the start: all that this posterior needs."""

    def __init__(self):
        super().__init__()
        sizes = (STEPS + 1, 3)
        self.weights = nn.Parameter(torch.zeros(sizes, dtype=torch.float64))

    def forward(self, x, t, denoised, y):
        a, b, c = self.weights[t]
        return a * x + b + c * y


class Start(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, y):
        b, c, d = self.weights
        return dist.Normal(b + c * y, d.exp()).to_event(1)


def conditional(process):
    scale = LearnedScale(STEPS).double()
    guide = Controlled(process, Affine(), Start(), scale, reads=("y",))
    return lambda y=Y: guide("x", y=y)


def set_exact(guide, process):
    """Writes the posterior of every y into the guide: everything is affine in x and y."""
    controlled = pyro_process(guide)
    curve, tilt, offset = GAIN**2 / NOISE**2, GAIN / NOISE**2, 0.0  # h = exp(-cx^2/2 + (ty + o)x)
    with torch.no_grad():
        for t in range(1, STEPS + 1):
            slope, shift, spread = (float(v) for v in affine(process, t))
            gain, deviation = 1 / (1 + spread * curve), math.sqrt(spread)
            controlled.control.weights[t, 0] = (gain - 1) * slope / deviation
            constant = gain * (shift + spread * offset) - shift
            controlled.control.weights[t, 1] = constant / deviation
            controlled.control.weights[t, 2] = gain * spread * tilt / deviation
            controlled.scale.log_scale[t] = 2 * math.atanh(0.5 * math.log(gain) / 2)
            offset = slope * gain * (offset - curve * shift)
            curve, tilt = slope**2 * curve * gain, slope * gain * tilt
        gain = 1 / (1 + curve)
        start = torch.tensor([gain * offset, gain * tilt, 0.5 * math.log(gain)])
        controlled._initial.weights.copy_(start)


def pyro_process(guide):
    return Program(guide, (Y,)).processes["x"]


def compilation(model, guide, lr=0.0, **options):
    settings = {"num_paths": 200, "num_particles": 64, **options}
    return InferenceCompilation(model, guide, pyro.optim.Adam({"lr": lr}), **settings)


def evidence(process, y):
    mean, spread = moments(process)
    law = dist.Normal(GAIN * mean[0], (GAIN**2 * spread[0, 0] + NOISE**2).sqrt())
    return law.log_prob(y[..., 0])


def test_the_posterior_knows_every_simulated_path():
    """log q - log p = log p(y | x_0) - log Z(y), path by path: y is exactly what the path caused"""
    process = large()
    guide = conditional(process)
    set_exact(guide, process)
    learner = compilation(program(process), guide)
    learner.step()
    drawn = learner.simulations
    found = learner._log_ratio(torch.arange(200))
    x, y = drawn.x[0]["x"].double(), drawn.data["y"].double()
    likelihood = dist.Normal(GAIN * x, NOISE).log_prob(y)[..., 0]
    assert (found - likelihood + evidence(process, y)).abs().max() < 1e-5  # the states are float32


def test_data_are_simulated_as_the_program_says():
    process = prior()
    drawn = simulate(Program(program(process), (Y,)), 20_000)
    mean, spread = moments(process)
    variance = float(GAIN**2 * spread + NOISE**2)
    y, x = drawn.data["y"][:, 0].double(), drawn.x[0]["x"][:, 0].double()
    assert abs(y.mean() - GAIN * mean[0]) < BOUND * (variance / len(y)) ** 0.5
    assert abs(y.var() / variance - 1) < BOUND * (2 / len(y)) ** 0.5
    products = (y - GAIN * mean[0]) * (x - mean[0])
    assert abs(products.mean() - GAIN * spread[0, 0]) < BOUND * products.std() / len(y) ** 0.5
    assert set(drawn.x) == set(range(STEPS + 1))


def test_gradient_is_that_of_the_loss():
    process = large()
    guide = conditional(process)
    learner = compilation(program(process), guide)
    learner.step()
    rows = torch.arange(20)
    parameters = list(leaves(poutine.trace(guide, param_only=True).get_trace(Y)).values())
    with torch.no_grad():
        for k, parameter in enumerate(parameters):
            parameter += 0.2 * torch.cos(torch.arange(parameter.numel()) + k).view_as(parameter)
    gradients = torch.autograd.grad(learner._log_ratio(rows).mean(), parameters)
    size = 1e-5
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for k in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[k] += sign * size
                    ends.append(float(learner._log_ratio(rows).mean()))
                    parameter.view(-1)[k] -= sign * size
            numeric = (ends[0] - ends[1]) / (2 * size)
            assert float(gradient.view(-1)[k]) == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def learned(process, **options):
    """Weights of single particles know whether every kernel is right."""
    pyro.set_rng_seed(0)
    model, guide = program(process), conditional(process)
    fading = pyro.optim.ClippedAdam({"lr": 0.15, "lrd": 0.96, "clip_norm": 1e9})
    settings = {"num_paths": 8000, "num_particles": 4000, **options}
    learner = InferenceCompilation(model, guide, fading, **settings)
    learner.run(Y, num_updates=100)
    for y in (Y, Y - 2.0):
        corrected = SMC(model, guide, num_particles=1000, ess_threshold=0.0).run(y)
        assert corrected.particles.ess > 985
        assert float(corrected.log_evidence) == pytest.approx(float(evidence(process, y)), abs=0.02)
    return learner


@pytest.mark.parametrize("subsample", [None, 2])
def test_it_learns_the_posterior_of_every_y(subsample):
    process = large()
    learner = learned(process, subsample=subsample)
    information = 0.5 * math.log(1 + GAIN**2 * float(moments(process)[1]) / NOISE**2)
    last = torch.tensor(learner.history[-20:])
    error = float(last.std()) / 20**0.5  # which steps were drawn; 0.01 is that of the paths
    assert abs(float(last.mean()) + information) < BOUND * (error + 0.01)


def test_latents_are_learned_with_their_data():
    """z ~ N(0, 1), y = x + z + noise: E[z | y] and sd[z | y] are known."""
    process, noise = large(), 0.5

    def model(y=Y):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(process("x") + z[..., None], noise).to_event(1), obs=y)

    weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    class Laws(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = weights

    laws = Laws()

    def guide(y=Y):
        pyro.module("laws", laws)
        a, b, c = laws.weights
        pyro.sample("z", dist.Normal(a + b * y[..., 0], c.exp()))
        process("x")

    pyro.set_rng_seed(0)
    fading = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98, "clip_norm": 1e9})
    options = {"num_paths": 10_000, "num_particles": 1000}
    InferenceCompilation(model, guide, fading, **options).run(Y, num_updates=100)
    mean, spread = (float(v) for v in moments(process))
    total = 1 + spread + noise**2
    a, b, c = weights.tolist()
    assert b == pytest.approx(1 / total, abs=0.03)
    assert a == pytest.approx(-mean / total, abs=0.03)
    assert math.exp(2 * c) == pytest.approx(1 - 1 / total, abs=0.03)


def test_steps_are_subsampled_without_bias():
    process = large()
    learner = compilation(program(process), conditional(process), subsample=1)
    learner.step()
    with torch.no_grad():
        for parameter in pyro_process(learner.guide).control.parameters():
            parameter += 0.3
    rows = torch.arange(10)
    torch.manual_seed(0)
    single = torch.stack([learner._log_ratio(rows) for _ in range(20)]).detach()
    learner.subsample = None
    each = {round(float(row[0]), 9): row for row in single}
    assert len(each) == STEPS
    mean = torch.stack(list(each.values())).mean(0)
    torch.testing.assert_close(mean, learner._log_ratio(rows).detach())


def test_refreshed_paths_are_counted():
    process = prior()
    learner = compilation(program(process), conditional(process), num_paths=50, refresh=2)
    learner.step()
    first = learner.simulations
    learner.step()
    assert learner.simulations is first
    learner.step()
    assert learner.simulations is not first
    assert learner.calls.network == STEPS * (2 * 50 + 3 * 64)


def test_a_guide_so_trained_is_plain_pyro():
    process = large()
    model, guide = program(process), conditional(process)
    compilation(model, guide, lr=0.01).run(Y, num_updates=2)
    assert math.isfinite(Trace_ELBO().loss(model, guide, Y))


# --------------------------------------------------------------------------------- bad input


def test_factors_cannot_be_simulated():
    process = prior()

    def model(y=Y):
        x = process("x")
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        pyro.factor("smooth", -x.square().sum(-1))

    with pytest.raises(ValueError, match=r"factors \['smooth'\] cannot be simulated"):
        compilation(model, conditional(process)).step()


def test_data_must_be_observed():
    process = prior()
    with pytest.raises(ValueError, match=r"sites \['z'\], but the model observes \['y'\]"):
        compilation(program(process), conditional(process), data=("z",)).step()
    with pytest.raises(ValueError, match=r"arguments \['w'\], but the model takes \['y'\]"):
        compilation(program(process), conditional(process), data={"w": "y"}).step()


@pytest.mark.parametrize("name", ["num_paths", "num_particles", "subsample", "refresh"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        compilation(program(prior()), lambda: None, **{name: -1})


def test_a_prior_that_would_train_is_refused():
    network = nn.Linear(1, 1)
    flow = Flow(lambda x, time: network(x), (1,), STEPS, noise=1.0, method="euler", data_at=0)
    guide = Controlled(flow, Head(Small()))
    with pytest.raises(ValueError, match="the model would train"):
        compilation(program(flow), lambda y=Y: guide("x"), data=("y",)).step(Y.float())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, time):
        return self.layer(x)
