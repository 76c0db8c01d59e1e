"""Pyro's own tools on programs and guides, unchanged; and its log-probabilities as the referee."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.importance import vectorized_importance_weights
from pyro.ops.stats import effective_sample_size
from torch import nn

from smcdiff.inference import SMC
from smcdiff.models import (
    Controlled,
    Diffusion,
    EnumeratedDenoiser,
    GaussianDenoiser,
    MaskedDiffusion,
    Team,
    VariancePreserving,
)

from ..oracles import moments
from .checks import BOUND, z_score
from .closed_forms import Gaussian, observed

Y, SCALE = torch.tensor(1.5).double(), 0.5


def process(variance="large", steps=2, dim=1, **options):
    denoiser = GaussianDenoiser(torch.full((dim,), 0.5).double(), 1.44)
    schedule = VariancePreserving([0.5, 0.8, 0.6][:steps])
    return Diffusion(denoiser, schedule, num_steps=steps, variance=variance, **options)


def masked():
    return MaskedDiffusion(EnumeratedDenoiser(1.0 + torch.rand(3, 3).double()), 2, 3, num_steps=2)


def observe(prior):
    def program():
        x = prior("x")
        pyro.sample("y", dist.Normal(x[..., 0], SCALE), obs=Y)

    return program


def exact(prior):
    """Posterior of x_0 and log-evidence under the discretised chain."""
    return observed(
        Gaussian(*moments(prior)), torch.eye(1), torch.tensor([[SCALE**2]]).double(), Y[None]
    )


def drift(x, t, denoised):
    return 0.3 - 0.1 * x


# ------------------------------------------------------------------------------- traces


def test_a_trace_holds_the_path_and_the_result():
    trace = poutine.trace(observe(process())).get_trace()
    sites = [name for name, node in trace.nodes.items() if node["type"] == "sample"]
    assert sites == ["x_2", "x_1", "x_0", "x", "y"]
    assert trace.nodes["x"]["value"].equal(trace.nodes["x_0"]["value"])
    assert trace.nodes["x"]["infer"]["_deterministic"]


def test_its_log_probability_is_that_of_the_path():
    prior = process(dim=2)
    trace = poutine.trace(prior).get_trace("x")
    x = [trace.nodes[f"x_{t}"]["value"] for t in (2, 1, 0)]
    total = prior.initial().log_prob(x[0])
    total = total + prior.kernel(x[0], 2).law.log_prob(x[1])
    total = total + prior.kernel(x[1], 1).law.log_prob(x[2])
    torch.testing.assert_close(trace.log_prob_sum(), total)


def test_a_last_step_without_variance_is_a_deterministic_site():
    prior = process("small")
    trace = poutine.trace(observe(prior)).get_trace()
    assert trace.nodes["x_0"]["infer"]["_deterministic"]
    torch.testing.assert_close(
        trace.nodes["x_0"]["value"], prior.kernel(trace.nodes["x_1"]["value"], 1).law.mean
    )
    assert trace.log_prob_sum().isfinite()


def test_replay_condition_and_block():
    prior = process()
    trace = poutine.trace(prior).get_trace("x")
    assert poutine.replay(prior, trace)("x").equal(trace.nodes["x"]["value"])
    fixed = poutine.condition(prior, {"x_1": torch.zeros(1)})
    given = poutine.trace(fixed).get_trace("x")
    assert given.nodes["x_1"]["is_observed"]
    law = prior.kernel(torch.zeros(1), 1).law
    torch.testing.assert_close(given.nodes["x_0"]["fn"].mean, law.mean)
    hidden = poutine.trace(poutine.block(prior, hide=["x_2"])).get_trace("x")
    assert "x_2" not in hidden.nodes


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_chain(parallel):
    prior, size = process(), 60 if not parallel else 2000
    draws = Predictive(prior, num_samples=size, parallel=parallel)("x")
    assert set(draws) == {"x_2", "x_1", "x_0", "x"}
    assert draws["x"].shape == (size, 1)
    mean, spread = moments(prior)
    assert abs(z_score(draws["x"], float(mean))) < BOUND
    assert abs(z_score((draws["x"] - mean).square(), float(spread))) < BOUND


def test_predictive_of_the_rest_of_a_program():
    def program():
        with pyro.plate("n", 3):
            x = process()("x")
            pyro.sample("y", dist.Normal(x[..., 0], SCALE))

    draws = Predictive(program, num_samples=1000, parallel=True)()
    assert draws["y"].shape == (1000, 3)
    mean, spread = moments(process())
    assert abs(z_score(draws["y"].mean(1), float(mean))) < BOUND
    assert abs(z_score((draws["y"] - mean).square().mean(1), float(spread) + SCALE**2)) < BOUND


# ------------------------------------------------------------- the engine's weights are Pyro's


def seen_by_latents(prior):
    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            x = prior("x")
            pyro.sample("y", dist.Normal(x[..., 0] + z, SCALE), obs=torch.tensor([1.0, -0.5]))
        pyro.factor("reward", 0.1 * z)

    return program


def seen_in_a_plate(prior):
    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = prior("x")
        with pyro.plate("n", 3):  # as many as particles: nothing but their places tells them apart
            pyro.sample("y", dist.Normal(x[..., 0] + z, SCALE), obs=torch.tensor([1.0, -0.5, 0.0]))

    return program


def latents_for(prior):
    def guide():
        pyro.sample("z", dist.StudentT(4.0, 0.4, 1.5))
        with pyro.plate("n", 2):
            prior("x")

    return guide


def downstream(prior):
    def program():
        x = prior("x")
        z = pyro.sample("z", dist.Normal(x[..., 0], 1.0))
        pyro.sample("y", dist.Normal(z, SCALE), obs=Y)

    return program


def latent_beside(prior):
    def guide():
        pyro.sample("z", dist.Normal(1.0, 1.2))
        prior("x")

    return guide


def tokens(prior):
    def program():
        x = prior("x")
        pyro.factor("reward", 1.0 * (x[..., 0] == x[..., 1]))
        pyro.sample("y", dist.Normal(x.sum(-1).double(), 1.0), obs=Y)

    return program


def pair(first, second):
    def program():
        a, b = first("a"), second("b")
        pyro.sample("y", dist.Normal(a[..., 0] - b[..., 1], SCALE), obs=Y)
        with poutine.scale(scale=0.3), poutine.mask(mask=torch.tensor(True)):
            pyro.sample("w", dist.Normal(a[..., 0] + b[..., 0], SCALE), obs=Y)

    return program


def agents(controlled=True):
    team = Team({"a": process(), "b": process(dim=2)})
    return Controlled(team, lambda x, t, denoised: 0.1 * x.roll(1, -1)) if controlled else team


def only(prior, name):
    return lambda: prior(name)


def in_another_order(first, second):
    return lambda: (first("b"), second("a"))


def twice(prior):
    return lambda: (prior("a"), prior("b"))


def tilt(x, t, denoised):
    return torch.tensor([0.1, 0.0, 0.4, -0.2]).expand(*x.shape, 4)


CASES = {
    "bootstrap": (observe(process()), None),
    "guided": (observe(process()), only(Controlled(process(), drift), "x")),
    "wider": (observe(process()), only(Controlled(process(), drift, scale=lambda t: 1.3), "x")),
    "deterministic end": (
        observe(process("small")),
        only(Controlled(process("small"), drift), "x"),
    ),
    "exact kernel": (observe(process("exact")), only(Controlled(process(), drift), "x")),
    "latents and plates": (
        seen_by_latents(process()),
        latents_for(Controlled(process(), drift)),
    ),
    "plates that the guide lacks": (
        seen_in_a_plate(process()),
        latent_beside(Controlled(process(), drift)),
    ),
    "own latents": (seen_by_latents(process()), None),
    "downstream, proposed": (downstream(process()), latent_beside(Controlled(process(), drift))),
    "tokens": (tokens(MASKED := masked()), only(Controlled(MASKED, tilt), "x")),
    "two, guided in another order": (
        pair(process(), process(dim=2)),
        in_another_order(Controlled(process(dim=2), drift), process()),
    ),
    "one prior twice": (pair(TWICE := process(dim=2), TWICE), twice(Controlled(TWICE, drift))),
    "two, guided by a team": (pair(process(), process(dim=2)), only(agents(), "ab")),
    "a team, guided by a team": (
        lambda: pair(*(lambda _, x=x: x for x in TEAM("ab").values()))(),
        only(agents(), "ab"),
    ),
}
TEAM = agents(controlled=False)


@pytest.mark.parametrize("case", CASES)
def test_path_weights_are_model_over_guide(case):
    """Without resampling, log w = model_trace.log_prob_sum() - guide_trace.log_prob_sum()."""
    model, guide = CASES[case]
    states = list(SMC(model, guide, num_particles=3, ess_threshold=0.0).iterate())
    for i in range(3):
        data = path(states, i)
        weight = pyro_log_weight(model, guide, data)
        torch.testing.assert_close(states[-1].log_weights[0, i], weight, rtol=0, atol=1e-10)


def test_latents_downstream_are_proposed_at_the_first_estimate():
    """Without a guide for them, from the program's own law at the denoised estimate of x_T."""
    prior = process()

    def guide():
        first = pyro.sample("x_2", prior.initial())
        kernel = prior.kernel(first, 2)
        second = pyro.sample("x_1", kernel.law)
        pyro.sample("x_0", prior.kernel(second, 1).law)
        pyro.sample("z", dist.Normal(kernel.denoised.mean[..., 0], 1.0))

    model = downstream(prior)
    states = list(SMC(model, num_particles=3, ess_threshold=0.0).iterate())
    for i in range(3):
        weight = pyro_log_weight(model, guide, path(states, i))
        torch.testing.assert_close(states[-1].log_weights[0, i], weight, rtol=0, atol=1e-10)


def path(states, particle):
    """One particle's values by site, as Pyro names them."""
    data = {n: z[0, particle] for n, z in states[-1].latents.items()}
    for state in states:
        for name, x in state.x.items():
            members = TEAM.split(name, x) if name == "ab" else {name: x}
            data |= {f"{member}_{state.t}": v[0, particle] for member, v in members.items()}
    return data


def pyro_log_weight(model, guide, data):
    if guide is None:  # the model's own processes and latents, without what it observes
        guide = poutine.block(model, expose_fn=lambda msg: proposed(msg))
    conditioned = {name: value for name, value in data.items() if not is_point(model, name)}
    traces = [poutine.trace(poutine.condition(p, conditioned)).get_trace() for p in (model, guide)]
    for name in data:  # deterministic ones must have come out the same
        torch.testing.assert_close(traces[0].nodes[name]["value"], data[name])
    return traces[0].log_prob_sum() - traces[1].log_prob_sum()


def proposed(msg):
    """A latent, before or after conditioning."""
    return not (msg["is_observed"] and msg["name"] in ("y", "w", "reward"))


def is_point(model, name):
    node = poutine.trace(model).get_trace().nodes[name]
    return bool(node["infer"].get("_deterministic"))


# --------------------------------------------------------------------------- Pyro's inference


class Affine(nn.Module):
    """u_t = a_t x + b_t, which is all that a linear-Gaussian posterior needs."""

    def __init__(self, steps):
        super().__init__()
        self.slope, self.offset, self.log_scale = (
            nn.Parameter(torch.zeros(steps + 1)) for _ in range(3)
        )

    def forward(self, x, t, denoised):
        return self.slope[t] * x + self.offset[t]


def trainable(prior):
    control = Affine(prior.num_steps)

    def initial():
        mean = pyro.param("mean", torch.zeros(1))
        scale = pyro.param("scale", torch.ones(1), constraint=dist.constraints.positive)
        return dist.Normal(mean, scale).to_event(1)

    process = Controlled(prior, control, initial, lambda t: control.log_scale[t].exp())
    return only(process, "x")


def elbo(model, guide, size=1000):
    loss = Trace_ELBO(num_particles=size, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        return -loss.loss(model, guide)


def test_svi_trains_a_guide_until_the_elbo_is_the_evidence():
    prior = process()
    model, guide = observe(prior), trainable(prior)
    _, log_evidence = exact(prior)
    assert elbo(model, guide) < log_evidence - 0.5
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97}), loss)
    for _ in range(100):
        svi.step()
    assert set(pyro.get_param_store()) > {"mean", "scale", "x.control$$$slope"}
    assert log_evidence - 0.01 < elbo(model, guide) < log_evidence + 0.005
    weights = SMC(model, guide, num_particles=500, ess_threshold=0.0).run()
    assert weights.particles.ess > 450
    assert abs(float(weights.log_evidence) - log_evidence) < 0.03


def test_elbo_is_the_mean_log_weight():
    """Over the same draws: Pyro's estimate is minus the average of our log-weights."""
    model, guide = CASES["guided"]
    torch.manual_seed(0)
    estimate = -Trace_ELBO(num_particles=1).loss(model, guide)
    torch.manual_seed(0)
    data = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, data)).get_trace()
    assert math.isclose(estimate, float(model_trace.log_prob_sum() - data.log_prob_sum()))


def test_importance_sampling_with_a_guide():
    prior = process()
    model, guide = observe(prior), only(Controlled(prior, drift), "x")
    _, log_evidence = exact(prior)
    importance = Importance(model, guide, num_samples=60).run()
    weights = (torch.stack(importance.log_weights) - log_evidence).exp()
    assert abs(z_score(weights, 1.0)) < BOUND
    log_weights, *_ = vectorized_importance_weights(
        model, guide, num_samples=2000, max_plate_nesting=0, normalized=False
    )
    assert abs(z_score((log_weights - log_evidence).exp(), 1.0)) < BOUND


def test_nuts_on_a_deterministic_flow():
    """With eta = 0 only the source is random: its posterior, and that of x_0, are Gaussian."""
    prior = process(eta=0.0, variance="small")
    posterior, _ = exact(prior)
    mcmc = MCMC(NUTS(observe(prior)), num_samples=200, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == {"x_2"}
    x = draws["x_2"][0]
    for t in (2, 1):
        x = prior.kernel(x, t).law.mean
    for values, truth in [
        (x, float(posterior.mean)),
        ((x - posterior.mean).square(), float(posterior.covariance)),
    ]:
        size = float(effective_sample_size(values[None])[0])
        error = float(values.std()) / size**0.5
        assert abs(float(values.mean()) - truth) < BOUND * error
        assert error < 0.15


class Towards(torch.nn.Module):
    """Estimates x_0 as a label, whatever x_t is."""

    def forward(self, x, time, label):
        return 0 * x + label[..., None]


@pytest.mark.parametrize("label", [0.0, 2.0])
def test_a_guide_under_its_own_context_proposes_as_it_draws(label):
    """It builds on the model's evaluation only where that was made of the same label."""
    prior = Diffusion(Towards(), VariancePreserving(), (1,), 4, parameterization="x0")
    steered = Controlled(prior, lambda x, t, denoised, label: 0.1 * x)
    own = {"label": torch.tensor(label)}

    def model():
        pyro.factor("r", -prior("x", label=torch.tensor(0.0))[..., 0])

    method = SMC(model, guide=lambda: steered("x", **own), num_particles=6, ess_threshold=0.0)
    states = list(method.iterate())
    x = [state.x["x"][0] for state in states]
    total = -x[-1][..., 0]
    for t, before, after in zip((4, 3, 2), x, x[1:], strict=False):
        total = total + prior.kernel(before, t, label=torch.tensor(0.0)).law.log_prob(after)
        total = total - steered.kernel(before, t, **own).law.log_prob(after)
    assert float((states[-1].log_weights[0] - total).abs().max()) < 1e-5
    point = prior.kernel(x[-2], 1, label=torch.tensor(0.0)).law.mean  # the model's, not the guide's
    assert x[-1].equal(point)
