"""What went wrong in the public codes of others, each once, so that it does not go wrong here.

Adaptive tempering is the trust region's exponent (tests/inference/test_escort.py: impossible and
skewed weights); schedules are checked in tests/models.
"""

import copy
import math
from dataclasses import fields, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from smcdiff import DegenerateWeights, Program
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    IntermediateReward,
    TwistedKernel,
    TwistedSMC,
)
from smcdiff.models import (
    Controlled,
    Diffusion,
    FromAlphas,
    GaussianDenoiser,
    MixtureDenoiser,
    VariancePreserving,
)
from smcdiff.particles import flatten_tree
from smcdiff.weights import effective_sample_size

from ..contract.kinds import masked, network
from ..oracles import moments
from .checks import BOUND, finish, z_of_evidence, z_of_mean
from .closed_forms import Gaussian, observed

STEPS = 20


# ----------------------------------------- 1, 2: weights of steps that do not resample, and log Z


def steered():
    """x ~ N(0, 1), a denoised estimate that sharpens linearly, and the reward 1.5 x."""
    alphas = [1 - t / STEPS for t in range(1, STEPS + 1)]
    denoiser = GaussianDenoiser(torch.zeros(1), 1.0)
    prior = Diffusion(denoiser, FromAlphas(alphas), num_steps=STEPS, variance="exact")

    def program():
        pyro.factor("reward", 1.5 * prior("x")[..., 0])

    return program


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("kind", "exponent"), [("difference", 1.0), ("max", 1.0), ("sum", 0.1)])
def test_every_potential_and_threshold_aims_at_the_same_target(kind, exponent, threshold):
    """The exact tilted mean is 1.50. Others have returned -0.01 (lost weights of steps without
    resampling), 3.53 and 4.10 (a running maximum or sum in place of the terminal reward).

    A running sum at full power steers ten times too far for any number of particles to come back
    from: it is still the same target, which the next test does not pretend to see.
    """
    twist = IntermediateReward(kind, exponent=exponent)
    method = SMC(steered(), twist=twist, num_particles=1000, num_runs=20, ess_threshold=threshold)
    particles = finish(method)
    assert abs(z_of_evidence(particles, 1.125)) < BOUND
    assert abs(z_of_mean(particles, particles.x["x"][..., 0], 1.5, 1.125)) < BOUND
    weights = particles.log_weights.softmax(-1) * particles.log_evidence.softmax(-1)[:, None]
    assert abs(float((weights * particles.x["x"][..., 0]).sum()) - 1.5) < 0.1
    resampled = torch.stack([step.resampled for step in particles.history]).sum(0)
    assert bool((resampled > 0).all()) == (threshold > 0)


def test_a_run_that_was_steered_too_far_says_so():
    twist = IntermediateReward("sum", exponent=1.0)
    particles = finish(SMC(steered(), twist=twist, num_particles=1000, ess_threshold=1.0))
    assert particles.ess < 5


# --------------------------------------------------- 3, 4: the last, almost noiseless transition


class Epsilon(nn.Module):
    """An exact denoiser in a network's clothes."""

    def __init__(self, denoiser, grid):
        super().__init__()
        self.denoiser, self.grid = denoiser, grid

    def forward(self, x, time):
        t = int((self.grid.time[1:] - time[0]).abs().argmin()) + 1
        alpha, sigma = self.grid.alpha[t].item(), self.grid.sigma[t].item()
        return (x - alpha * self.denoiser.mean(x, alpha, sigma)) / sigma


def last_steps(num_steps, kept, variance):
    """The last transitions of a chain of ``num_steps``, from the exact law at their beginning."""
    means = torch.tensor([[1.5, -1.0], [-1.2, 0.4], [0.3, 1.1]])
    grid = VariancePreserving().grid(num_steps)
    alpha, sigma = grid.alpha[kept].item(), grid.sigma[kept].item()
    parts = dist.Normal(alpha * means, math.sqrt(alpha**2 * 0.05 + sigma**2)).to_event(1)
    source = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), parts)
    schedule = FromAlphas(grid.alpha[1 : kept + 1])
    denoiser = MixtureDenoiser(means, 0.05)
    if variance == "exact":
        return Diffusion(denoiser, schedule, num_steps=kept, variance=variance, source=source)
    net = Epsilon(denoiser, schedule.grid(kept))
    return Diffusion(net, schedule, (2,), kept, variance=variance, source=source)


@pytest.mark.parametrize("proposal", ["conjugate", "gradient"])
@pytest.mark.parametrize("variance", ["small", "large", "exact"])
@pytest.mark.parametrize(("num_steps", "kept"), [(32, 32), (64, 16), (1000, 16)])
def test_the_last_transition_does_not_collapse_the_weights(num_steps, kept, variance, proposal):
    prior = last_steps(num_steps, kept, variance)

    def program():
        pyro.sample("y", dist.Normal(prior("x")[..., 0], 0.1), obs=torch.tensor(0.5))

    particles = finish(TwistedSMC(program, proposal=proposal, num_particles=256))
    before, after = (effective_sample_size(s.log_weights) for s in particles.history[-2:])
    assert after > 0.6 * before
    assert after > 0.2 * 256


def test_a_kernel_without_variance_is_a_point():
    kernel = last_steps(8, 8, "small").kernel(torch.zeros(3, 2), 1)
    assert isinstance(kernel.law, dist.Delta)
    torch.testing.assert_close(kernel.law.mean, kernel.denoised.mean)


def test_a_density_ratio_with_a_point_is_refused():
    """Model: no variance in the last step. Guide: some."""
    model, guide = (last_steps(4, 4, variance) for variance in ("small", "large"))
    with pytest.raises(ValueError, match="no variance at this step and the other has"):
        finish(SMC(lambda: model("x"), lambda: guide("x"), num_particles=4))


# ------------------------------------------------------------- 5, 6: log-densities of transitions


@pytest.mark.parametrize("variance", ["large", "exact"])
def test_log_densities_are_sums_with_their_normaliser(variance):
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    denoiser = GaussianDenoiser(torch.tensor([0.5, -1.0]), covariance)
    prior = Diffusion(denoiser, VariancePreserving([0.2, 0.4]), num_steps=2, variance=variance)
    x, after = torch.randn(5, 2), torch.randn(5, 2)
    law, grid = prior.kernel(x, 2).law, prior.grid
    bridge = grid.posterior(2)
    level = grid.alpha[2].item(), grid.sigma[2].item()
    full = grid.transition(2).variance * torch.eye(2)
    if variance == "exact":
        full = bridge.variance * torch.eye(2) + bridge.c_0**2 * denoiser.covariance(x, *level)
    mean = bridge.c_0 * denoiser.mean(x, *level) + bridge.c_t * x
    reference = torch.distributions.MultivariateNormal(mean, full)
    assert law.log_prob(after).shape == (5,)
    torch.testing.assert_close(law.log_prob(after), reference.log_prob(after))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_keep_densities_in_float32_and_better(dtype):
    """The state that was drawn is the state that is scored, and weights never leave float64."""
    torch.set_default_dtype(torch.float32)
    net = copy.deepcopy(network().network).to(dtype)
    prior = Diffusion(net, VariancePreserving([0.4, 0.7]), (1, 2), 2, variance="large")
    guide = Controlled(prior, lambda x, t, denoised: 0.3 * torch.ones_like(x))

    def program():
        pyro.sample("y", dist.Normal(prior("x").sum((-1, -2)), 1.0), obs=torch.tensor(0.5))

    method = SMC(program, lambda: guide("x"), num_particles=6, ess_threshold=0.0)
    states = list(method.iterate())
    assert all(s.x["x"].dtype == torch.float32 for s in states)
    assert all(s.log_weights.dtype == torch.float64 for s in states)
    weights = Program(program).log_joint({"x": states[-1].x["x"][0]}, {})
    for before, after in zip(states, states[1:], strict=False):
        x, new = before.x["x"][0], after.x["x"][0].double()
        for process, sign in ((prior, 1), (guide, -1)):
            law = process.kernel(x, before.t).law.base_dist
            precise = torch.distributions.Normal(law.loc.double(), law.scale.double())
            weights = weights + sign * precise.log_prob(new).sum((-1, -2))
    torch.testing.assert_close(states[-1].log_weights[0], weights, rtol=0, atol=1e-12)


def test_likelihoods_of_many_pixels_are_summed_in_float64():
    """In float32 the log-weights of such images were off by .04, each by something else."""
    torch.set_default_dtype(torch.float32)
    prior = Diffusion(lambda x, time: x, VariancePreserving(), (3, 250, 260), 2)
    y = torch.randn(3, 250, 260)

    def program():
        pyro.sample("y", dist.Normal(prior("x"), 2.0**-6).to_event(3), obs=y)

    x = y + 2.0**-6 * torch.randn(4, 3, 250, 260)
    precise = torch.distributions.Normal(x.double(), torch.tensor(2.0**-6).double())
    expected = precise.log_prob(y.double()).sum((-1, -2, -3))
    found = Program(program).log_joint({"x": x}, {})
    torch.testing.assert_close(found - found.mean(), expected - expected.mean(), rtol=0, atol=1e-3)


# --------------------------------------------------------------- 7: samples that see each other


class Mixing(nn.Module):
    """A layer, and something that may couple the batch."""

    def __init__(self, rest):
        super().__init__()
        self.layer, self.rest = nn.Linear(2, 2), rest

    def forward(self, x, time):
        return self.rest(self.layer(x))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("covariance", ["scalar", "diagonal", "jacobian"])
def test_guidance_of_a_particle_does_not_depend_on_the_others(covariance, clip):
    prior = Diffusion(network().network.double(), VariancePreserving([0.4, 0.7]), (1, 2), 2)

    def program():
        x = prior("x")[..., 0, :]
        pyro.sample("y", dist.Normal(x.square().sum(-1), 0.5), obs=torch.tensor(0.5))
        pyro.factor("reward", x[..., 0].tanh())

    twist = DenoisedLikelihood(covariance, num_draws=0)
    method = SMC(program, twist=twist, proposal=TwistedKernel(clip=clip), num_particles=5)
    evaluator = method.engine().evaluator
    x = 2 * torch.randn(5, 1, 2)
    together = evaluator.look(2, {"x": x}, {}, {}, None)
    for i in range(5):
        alone = evaluator.look(2, {"x": x[i : i + 1]}, {}, {}, None)
        for key, value in flatten_tree(alone)[0].items():
            torch.testing.assert_close(value, flatten_tree(together)[0][key][i : i + 1])


def test_batch_normalisation_is_used_in_eval_mode():
    net = Mixing(nn.BatchNorm1d(2)).train()
    finish(SMC(lambda: Diffusion(net, event_shape=(2,), num_steps=2)("x"), num_particles=3))
    assert not net.training


@pytest.mark.parametrize("rest", [nn.BatchNorm1d(2), nn.Dropout(0.5), lambda x: x / x.norm()])
def test_a_network_that_mixes_particles_is_refused(rest):
    prior = Diffusion(Mixing(rest).train(), event_shape=(2,), num_steps=2, train=True)
    pyro.set_rng_seed(1)
    with pytest.raises(ValueError, match="process 'x': its network mixes|process 'x': .*training"):
        Program(lambda: prior("x"))


def test_a_program_that_mixes_particles_is_refused():
    def program():
        x = network()("x")
        pyro.factor("reward", -(x - x.mean()).square().sum((-1, -2)))

    with pytest.raises(ValueError, match="site 'reward' mixes particles"):
        Program(program)


# --------------------------------------------- 10, 11: everything that belongs to a particle moves


def everything(tokens=True):
    """A program with every kind of per-particle tensor."""
    prior, other = network(), masked()

    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            x = prior("x", label=z).sum((-1, -2))
        w = other("w")[..., 0] if tokens else 0.0
        y = pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True) + w, 1.0))
        pyro.sample("seen", dist.Normal(y, 1.0), obs=torch.tensor(0.3))

    return program


SIZES = {"num_particles": 5, "num_runs": 3}
METHODS = {
    "steered": lambda *args: SMC(everything(*args), twist=IntermediateReward("sum"), **SIZES),
    "twisted": lambda *args: TwistedSMC(everything(*args), covariance="scalar", **SIZES),
}


@pytest.mark.parametrize("name", METHODS)
def test_select_moves_every_tensor_of_a_particle(name):
    """Whatever has the axes of the particles is gathered: a new field cannot be forgotten."""
    state = next(METHODS[name]().iterate())
    ancestors = torch.stack([torch.randperm(5) for _ in range(3)])
    where = torch.tensor([True, True, False])
    moved = state.select(ancestors, where)
    ancestors[2] = torch.arange(5)
    rest = {f.name for f in fields(state)} - {"history", "rng", "t", "weighted", "mark"}
    rest -= {"log_weights", "log_norm"}  # these change their meaning
    assert rest == {"x", "latents", "roots", "cache"}
    for field in rest:
        before, after = (flatten_tree(getattr(s, field))[0] for s in (state, moved))
        for key, value in before.items():
            rows = [value[run][ancestors[run]] for run in range(3)]
            assert after[key].equal(torch.stack(rows)), f"{field}{key} stayed behind"


@pytest.mark.parametrize("name", METHODS)
def test_a_permuted_run_is_a_permuted_run(name, monkeypatch):
    """Permute the particles, and what they will draw: everything that follows is permuted."""
    order = torch.tensor([3, 0, 4, 1, 2])
    engine = METHODS[name](False).engine()
    engine.settings = replace(engine.settings, ess_threshold=0.0)
    all_runs = torch.ones(3, dtype=torch.bool)
    state = engine.start()
    while state.t > 0:
        moved = state.select(order.expand(3, 5), all_runs)
        moved = replace(moved, log_weights=state.log_weights[:, order], log_norm=state.log_norm)
        after = []
        for start, rows in ((state, torch.arange(5)), (moved, order)):
            with monkeypatch.context() as patch:
                draw_in_order(rows, patch)
                after.append(engine.step(start))
        state, permuted = after
        torch.testing.assert_close(permuted.log_weights, state.log_weights[:, order])
        torch.testing.assert_close(permuted.x["x"], state.x["x"][:, order])


def draw_in_order(order, patch):
    """The normal numbers of three runs of five particles, always the same, in some order."""
    rows = torch.cat([5 * run + order for run in range(3)])

    def like(x):
        torch.manual_seed(0)
        white = torch.empty_like(x).normal_()
        return white.index_select(white.shape.index(15), rows)

    patch.setattr(torch, "randn", lambda *shape, **options: like(torch.empty(shape, **options)))
    patch.setattr(torch, "randn_like", like)
    patch.setattr(torch, "normal", lambda mean, std: mean + std * like(mean))


# ------------------------------------------------------------------------- 12 to 17: the rest


def test_a_flow_is_never_resampled_into_copies():
    flow = Diffusion(GaussianDenoiser(torch.zeros(1), 1.0), num_steps=3, eta=0.0)

    def program():
        pyro.factor("reward", flow("x")[..., 0])

    with pytest.raises(ValueError, match="no transition of .'x'. has any variance"):
        finish(SMC(program, num_particles=50))
    particles = finish(SMC(program, num_particles=50, num_runs=20, ess_threshold=0.0))
    assert not any(bool(step.resampled.any()) for step in particles.history)
    mean, spread = moments(flow)
    assert abs(z_of_evidence(particles, float(mean + spread / 2))) < BOUND


def test_all_particles_impossible_names_step_and_run():
    def program(limit):
        x = network()("x").sum((-1, -2))
        pyro.factor("limit", torch.where(x > limit, 0.0, -math.inf))

    method = SMC(program, num_particles=4, num_runs=2, per_problem=("limit",))
    message = r"at step t = 0: all 4 particles have weight zero in runs \(1, 0\), \(1, 1\)"
    with pytest.raises(DegenerateWeights, match=message):
        finish(method, torch.tensor([-1e3, 1e3]))


def test_a_nan_reward_names_site_and_step():
    def program():
        x = network()("x").sum((-1, -2))
        pyro.factor("root", torch.where(torch.arange(x.numel()) > 3, x - 1e3, x**2).sqrt())

    with pytest.raises(ValueError, match="site 'root'.*NaN at step t = 0"):
        finish(SMC(program, num_particles=5))


@pytest.mark.parametrize("covariance", ["none", "scalar", "diagonal", "jacobian"])
def test_a_twist_knows_the_noise_level(covariance):
    """The same state, seen at two steps, promises different things."""
    prior = Diffusion(network().network.double(), VariancePreserving([0.4, 0.7]), (1, 2), 2)

    def program():
        pyro.sample("y", dist.Normal(prior("x").sum((-1, -2)), 0.5), obs=torch.tensor(0.5))

    evaluator = TwistedSMC(program, covariance=covariance, num_particles=3).engine().evaluator
    x = {"x": torch.randn(3, 1, 2)}
    one, two = (evaluator.look(t, x, {}, {}, None)["log_psi"] for t in (1, 2))
    assert ((one - two).abs() > 1e-3).all()


@pytest.mark.parametrize("size", [2, 8, 24])
def test_few_particles_have_no_k_hat(size):
    particles = finish(SMC(steered(), num_particles=size))
    assert all(bool(step.khat.isnan().all()) for step in particles.history)


def test_tests_use_one_thread():
    assert torch.get_num_threads() == 1


def test_the_target_is_the_discretised_chain():
    """Two coarse steps are not the data: evidence is that of the chain, not of the data."""
    data = Gaussian(torch.tensor([1.0]), torch.tensor([[0.2]]))
    denoiser = GaussianDenoiser(data.mean, 0.2)
    prior = Diffusion(denoiser, VariancePreserving([0.5, 0.7]), num_steps=2, variance="large")
    y, noise = torch.tensor([0.0]), torch.tensor([[0.1]])

    def program():
        pyro.sample("y", dist.Normal(prior("x"), math.sqrt(0.1)).to_event(1), obs=y)

    _, truth = observed(Gaussian(*moments(prior)), torch.eye(1), noise, y)
    _, of_the_data = observed(data, torch.eye(1), noise, y)
    particles = finish(TwistedSMC(program, num_particles=64, num_runs=50))
    assert abs(z_of_evidence(particles, truth)) < BOUND
    assert abs(z_of_evidence(particles, of_the_data)) > 20
