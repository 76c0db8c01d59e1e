"""Ordinary latents, upstream and downstream, against quadrature and closed forms.

With the optimal twist, the log-weight of a particle is the log-evidence *given its own latents*: an
identity that holds particle by particle, and that one forgotten term or gather breaks.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import SMC, Rejuvenation, TwistedSMC
from smcdiff.models import Diffusion, GaussianDenoiser, VariancePreserving

from .checks import BOUND, finish, z_of_evidence, z_of_mean
from .closed_forms import (
    BETAS,
    alphas,
    ddpm_kernel,
    log_normal,
    noised,
    normal,
    observed,
    propagate,
    quadrature,
)

DATA = normal(0.5, 1.2**2)
Y = torch.tensor([2.0], dtype=torch.float64)


def chain():
    """The exact reverse process of DATA."""
    start = noised(DATA, alphas()[-1])
    return Diffusion(
        GaussianDenoiser(DATA.mean, DATA.covariance),
        VariancePreserving(torch.tensor(BETAS)),
        num_steps=5,
        variance="exact",
        source=dist.Normal(start.mean, start.covariance[0].sqrt()).to_event(1),
    )


PRIOR = dist.LogNormal(torch.tensor(-1.0).double(), torch.tensor(0.7).double())


def noisy():
    """The noise of the observation is unknown."""
    scale = pyro.sample("scale", PRIOR)
    x = chain()("x")
    pyro.sample("y", dist.Normal(x, scale[..., None]).to_event(1), obs=Y)


def log_likelihood(scale):
    """log p(y | scale)."""
    return log_normal(2.0, 0.5, 1.44 + scale**2)


def in_logarithms(power=0.0):
    """log E[scale^power p(y | scale)]."""

    def log_f(u):
        return log_normal(u, -1.0, 0.49) + log_likelihood(u.exp()) + power * u

    return quadrature(log_f, -8.0, 6.0)


LOG_Z = in_logarithms()
MEAN_SCALE = float(torch.tensor(in_logarithms(1.0) - LOG_Z).exp())


def proposed_scale():
    """A guide for the latent, which leaves the process as it is."""
    pyro.sample("scale", dist.LogNormal(torch.tensor(-0.7), torch.tensor(0.9)))
    chain()("x")


# ----------------------------------------------------------------------- one identity per particle


def test_weight_is_the_evidence_given_the_latent():
    method = TwistedSMC(noisy, num_particles=50, num_runs=2, ess_threshold=0.0)
    for state in method.iterate():
        wanted = log_likelihood(state.latents["scale"])
        torch.testing.assert_close(state.log_weights, wanted, rtol=0, atol=1e-9)


def test_proposed_latent_pays_for_its_proposal():
    """With a guide for the latent the weight is p(scale) p(y | scale) / q(scale) from the start."""
    method = SMC(noisy, proposed_scale, num_particles=50, num_runs=2)
    state = next(method.iterate())
    scale = state.latents["scale"]
    guide = dist.LogNormal(torch.tensor(-0.7), torch.tensor(0.9))
    wanted = PRIOR.log_prob(scale) - guide.log_prob(scale)
    torch.testing.assert_close(state.log_weights, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("resampler", ["systematic", "multinomial"])
def test_resampling_moves_everything_that_belongs_to_a_particle(resampler):
    """After one resampling every weight is the same, and stays the same down to x_0.

    The step's parents stand at T with unequal weights. Had one of x, the latents, the network's
    outputs or the log-twist stayed behind, the next increment would differ from zero.
    """
    method = TwistedSMC(noisy, num_particles=32, num_runs=6, ess_threshold=1.0, resampler=resampler)
    first, *rest = method.iterate()
    evidence = log_likelihood(first.latents["scale"]).exp().mean(-1).log()
    assert all(bool(run) for run in rest[0].history[-1].resampled)
    for state in rest:
        zeros = torch.zeros_like(state.log_weights)
        torch.testing.assert_close(state.log_weights, zeros, rtol=0, atol=1e-9)
        torch.testing.assert_close(state.log_evidence, evidence, rtol=0, atol=1e-9)
        assert bool((state.latents["scale"] == survivors(first, state)).all())


def survivors(first, state):
    """The latents at T of the particles that the history says are the ancestors."""
    places = torch.arange(state.num_particles).expand(state.axes)
    for step in reversed(state.history):
        places = step.ancestors.gather(-1, places)
    assert bool((places == state.roots).all())
    return first.latents["scale"].gather(-1, places)


def test_genealogy_is_that_of_the_resampling_steps():
    method = TwistedSMC(noisy, temper=0.5, num_particles=16, num_runs=5, ess_threshold=1.0)
    first, *rest = method.iterate()
    for state in rest:
        assert bool(state.history[-1].resampled.all())
        assert bool((state.latents["scale"] == survivors(first, state)).all())
        distinct = torch.tensor([len(set(row.tolist())) for row in state.roots])
        assert bool((state.history[-1].num_roots == distinct).all())


# --------------------------------------------------------------------------- quadrature, by z-score


@pytest.mark.parametrize(
    "method",
    [
        SMC(noisy, num_particles=8, num_runs=4000),
        SMC(noisy, proposed_scale, num_particles=8, num_runs=4000),
        TwistedSMC(noisy, num_particles=8, num_runs=4000),
        TwistedSMC(noisy, covariance="none", proposal="kernel", num_particles=8, num_runs=4000),
    ],
    ids=["bootstrap", "latent guided", "twisted", "overconfident twist"],
)
def test_unknown_noise_scale(method):
    last = finish(method)
    assert abs(z_of_evidence(last, LOG_Z)) < BOUND
    assert abs(z_of_mean(last, last.latents["scale"], MEAN_SCALE, LOG_Z)) < BOUND


@pytest.mark.parametrize("kind", ["random_walk", "mala"])
def test_rejuvenation_leaves_the_target_invariant(kind):
    """Moves at every step: a wrong acceptance would push the scale away."""
    moves = Rejuvenation(kind, step_size=0.5, num_moves=2)
    method = TwistedSMC(
        noisy, num_particles=8, num_runs=4000, ess_threshold=0.999, rejuvenation=moves
    )
    first, *rest = method.iterate()
    evidence = log_likelihood(first.latents["scale"]).exp().mean(-1).log()
    for state in rest:  # moves change no weight: this identity is exact
        torch.testing.assert_close(state.log_evidence, evidence, rtol=0, atol=1e-9)
    last = rest[-1]
    assert bool((last.latents["scale"] != survivors(first, last)).any())
    scale = last.latents["scale"]
    assert abs(z_of_mean(last, scale, MEAN_SCALE, LOG_Z)) < BOUND
    half = quadrature_below(0.4)
    assert abs(z_of_mean(last, (scale < 0.4).double(), half, LOG_Z)) < BOUND


def quadrature_below(scale):
    """The posterior probability of a smaller scale."""
    top = float(torch.tensor(scale).double().log())

    def log_f(u):
        return log_normal(u, -1.0, 0.49) + log_likelihood(u.exp())

    return float(torch.tensor(quadrature(log_f, -8.0, top) - LOG_Z).exp())


# ------------------------------------------------------------------------------ other structures


def discrete():
    """Which of two instruments made the observation?"""
    which = pyro.sample("which", dist.Categorical(torch.tensor([0.7, 0.3])))
    scale = torch.tensor([0.3, 2.0])[which]
    x = chain()("x")
    pyro.sample("y", dist.Normal(x[..., 0], scale), obs=Y[0])


def test_discrete_latent():
    """Exact by enumeration: particle by particle, and in the mean."""
    scales = torch.tensor([0.3, 2.0])
    logs = torch.tensor([0.7, 0.3]).log() + log_likelihood(scales)
    log_z = float(logs.logsumexp(0))
    method = TwistedSMC(discrete, num_particles=8, num_runs=2000, ess_threshold=0.0)
    last = finish(method)
    wanted = log_likelihood(scales[last.latents["which"]])
    torch.testing.assert_close(last.log_weights, wanted, rtol=0, atol=1e-9)
    assert abs(z_of_evidence(last, log_z)) < BOUND
    share = float(logs.softmax(0)[1])
    assert abs(z_of_mean(last, last.latents["which"].double(), share, log_z)) < BOUND


def downstream():
    """y is seen through z, and z through x."""
    x = chain()("x")
    z = pyro.sample("z", dist.Normal(x[..., 0], 1.5))
    pyro.sample("y", dist.Normal(z, 0.8), obs=torch.tensor(3.0))


SEEN = normal([0.5, 0.5], [[1.44, 1.44], [1.44, 1.44 + 1.5**2]])  # the law of (x, z)


@pytest.mark.parametrize(
    "method",
    [
        SMC(downstream, num_particles=8, num_runs=4000),
        TwistedSMC(downstream, num_particles=8, num_runs=4000),
        TwistedSMC(downstream, num_particles=8, num_runs=4000, rejuvenation=Rejuvenation()),
    ],
    ids=["bootstrap", "twisted", "rejuvenated"],
)
def test_latent_downstream_of_the_process(method):
    """(x, z) is Gaussian: its posterior and evidence are closed forms."""
    operator = torch.tensor([[0.0, 1.0]])
    posterior, log_z = observed(SEEN, operator, torch.tensor([[0.64]]), torch.tensor([3.0]))
    last = finish(method)
    x, z = last.x["x"][..., 0], last.latents["z"]
    assert abs(z_of_evidence(last, log_z)) < BOUND
    assert abs(z_of_mean(last, x, float(posterior.mean[0]), log_z)) < BOUND
    assert abs(z_of_mean(last, z, float(posterior.mean[1]), log_z)) < BOUND
    product = (x - posterior.mean[0]) * (z - posterior.mean[1])
    assert abs(z_of_mean(last, product, float(posterior.covariance[0, 1]), log_z)) < BOUND


def test_downstream_weight_is_the_evidence_given_the_latent():
    """log w = log p(y, z) - log q(z): the twist sees z as one more observation of x."""
    size = {"num_particles": 20, "num_runs": 2}
    method = TwistedSMC(downstream, damping=0.0, ess_threshold=0.0, **size)
    states = list(method.iterate())
    z = states[0].latents["z"]
    log_joint = log_normal(z, 0.5, 1.44 + 1.5**2) + log_normal(3.0, z, 0.64)
    log_q = log_joint - states[0].log_weights
    for state in states[1:]:
        torch.testing.assert_close(state.log_weights, log_joint - log_q, rtol=0, atol=1e-9)
    assert bool((log_q <= log_normal(0.0, 0.0, 1.5**2)).all())  # q has the law's own scale


def labelled():
    """Which class an observation is of: the network's context is a latent."""
    label = pyro.sample("label", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    x = LABELLED("x", label=label)
    pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=Y[0])


MEANS = torch.tensor([-1.0, 1.0, 3.0], dtype=torch.float64)


def conditional(x, time, label):
    """E[x_0 | x_t, label] for data N(MEANS[label], 1)."""
    alpha = torch.tensor(alphas()).to(x)[time.long() + 1, None]
    mean = MEANS[label][:, None]
    return mean + alpha * (x - alpha * mean)


LABELLED = Diffusion(
    conditional,
    VariancePreserving(torch.tensor(BETAS)),
    (1,),
    num_steps=5,
    parameterization="x0",
    variance="large",
)


@pytest.mark.parametrize(
    "method",
    [
        SMC(labelled, num_particles=8, num_runs=4000),
        TwistedSMC(labelled, num_particles=8, num_runs=4000),
    ],
    ids=["bootstrap", "twisted"],
)
def test_label_that_feeds_the_network(method):
    levels = alphas()
    logs = []
    for mean in MEANS.tolist():
        data = normal(mean, 1.0)
        steps = [ddpm_kernel(data, levels[t - 1], levels[t], large=True) for t in range(5, 0, -1)]
        terminal = propagate(normal(0.0, 1.0), steps)
        logs.append(observed(terminal, torch.ones(1, 1), torch.tensor([[0.25]]), Y)[1])
    joint = torch.tensor([0.2, 0.5, 0.3]).log() + torch.tensor(logs)
    log_z = float(joint.logsumexp(0))
    last = finish(method)
    assert abs(z_of_evidence(last, log_z)) < BOUND
    for label, share in enumerate(joint.softmax(0).tolist()):
        here = (last.latents["label"] == label).double()
        assert abs(z_of_mean(last, here, share, log_z)) < BOUND
