"""Posteriors to look at: small programs with exact answers, and particles written by hand."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import Diffusion, GaussianDenoiser, Team, VariancePreserving
from smcdiff.particles import Calls, Particles, Step
from smcdiff.posterior import Posterior

MEAN = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64)
VARIANCE = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
NOISE = 0.5
Y = torch.tensor([1.0, 0.0], dtype=torch.float64)


def gaussian_prior(num_steps: int = 8) -> Diffusion:
    """A chain whose x_0 is N(MEAN, VARIANCE) exactly, but for alpha_T > 0."""
    denoiser = GaussianDenoiser(MEAN, VARIANCE)
    return Diffusion(denoiser, VariancePreserving(), num_steps=num_steps, variance="exact")


def linear(y: Tensor) -> None:
    """Two of three coordinates, seen through noise; a deterministic site and no factor."""
    x = PRIOR("x")
    pyro.deterministic("total", x.sum(-1))
    pyro.deterministic("constant", torch.tensor(2.0))
    pyro.sample("y", dist.Normal(x[..., :2], NOISE).to_event(1), obs=y)


def noisy(y: Tensor) -> None:
    """The same with the noise unknown, and a reward."""
    noise = pyro.sample("noise", dist.LogNormal(torch.tensor(-1.0).double(), 0.5))
    x = PRIOR("x")
    pyro.sample("y", dist.Normal(x[..., :2], noise[..., None]).to_event(1), obs=y)
    pyro.factor("reward", -0.1 * x[..., 2] ** 2)


def pair(y: Tensor) -> None:
    """Two processes as a team."""
    agents = Team({"left": PRIOR, "right": PRIOR})("both")
    seen = agents["left"] + agents["right"]
    pyro.sample("y", dist.Normal(seen, NOISE).to_event(1), obs=y)


PRIOR = gaussian_prior()


def exact_posterior() -> tuple[Tensor, Tensor, float]:
    """Mean and variance of x given Y in ``linear``, and log p(Y)."""
    total = VARIANCE[:2] + NOISE**2
    mean, variance = MEAN.clone(), VARIANCE.clone()
    mean[:2] += VARIANCE[:2] / total * (Y - MEAN[:2])
    variance[:2] = VARIANCE[:2] * NOISE**2 / total
    log_prob = dist.Normal(MEAN[:2], total.sqrt()).log_prob(Y).sum()
    return mean, variance, float(log_prob)


def infer(num_particles: int = 64, num_runs: int = 4, model=linear, y: Tensor = Y) -> Posterior:
    return TwistedSMC(model, num_particles=num_particles, num_runs=num_runs).run(y)


def bootstrap(num_particles: int = 64, num_runs: int = 4, model=linear, y: Tensor = Y, **options):
    method = SMC(model, num_particles=num_particles, num_runs=num_runs, **options)
    return method.run(y)


def for_problems(num_problems: int = 3) -> Posterior:
    """``linear`` for several y at once."""
    y = torch.randn(num_problems, 2, dtype=torch.float64)
    method = SMC(linear, num_particles=32, num_runs=2, per_problem=("y",))
    return method.run(y)


# ------------------------------------------------------------------------------ written by hand

INF = math.inf
BY_HAND = {
    "x": [[[1.0], [2.0], [4.0]], [[0.0], [-1.0], [3.0]]],
    "weights": [[1.0, 2.0, 1.0], [2.0, 0.0, 4.0]],
    "norm": [math.log(0.5), math.log(1.5)],
    "roots": [[0, 0, 2], [0, 1, 1]],
}


def step(t: int, log_weights: Tensor, **others: Tensor) -> Step:
    """A record with made-up entries where a test does not say."""
    runs = log_weights.shape[:-1]
    own = torch.arange(log_weights.shape[-1]).expand(log_weights.shape)
    ones = torch.ones(runs, dtype=torch.float64)
    record = {
        "ess": 2 * ones,
        "khat": math.nan * ones,
        "max_weight": log_weights.softmax(-1).amax(-1),
        "resampled": torch.zeros(runs, dtype=torch.bool),
        "ancestors": own,
        "num_roots": torch.full(runs, 2),
        "effective_roots": 1.5 * ones,
        "log_evidence": 0 * ones,
        "log_weights": log_weights,
        "calls": Calls(network=6, gradient=2, program=6),
        "acceptance": math.nan * ones,
    }
    return Step(t, **(record | others))


def by_hand(weighted: bool = True, t: int = 0) -> Posterior:
    """Two runs of three particles, resampled once, with round numbers."""
    log_weights = torch.tensor(BY_HAND["weights"], dtype=torch.float64).log()
    even = torch.zeros_like(log_weights)
    ancestors = torch.tensor([[0, 0, 2], [0, 1, 1]])
    both = torch.tensor([True, True])
    history = (
        step(2, torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, -1.0]], dtype=torch.float64)),
        step(1, even, resampled=both, ancestors=ancestors),
        step(0, log_weights),
    )
    particles = Particles(
        t=t,
        x={"x": torch.tensor(BY_HAND["x"], dtype=torch.float64)},
        latents={"k": torch.tensor([[0, 1, 2], [2, 1, 0]])},
        log_weights=log_weights,
        log_norm=torch.tensor(BY_HAND["norm"], dtype=torch.float64),
        roots=torch.tensor(BY_HAND["roots"]),
        cache={"log_psi": even},
        history=history,
        rng={"cpu": torch.get_rng_state()},
        weighted=weighted,
    )
    return Posterior(particles, None, "ByHand")
