r"""Trust-region iterated twisted SMC on problems whose answers are known.

    python benchmarks/trust_region.py             # all tables
    python benchmarks/trust_region.py gaussian    # one of gaussian, modes, tokens

gaussian: ten (or more) copies of a five-step Gaussian chain with a quadratic reward, iteration by
iteration, with a trust region and without (epsilon = inf, and there neither anchor nor floor). Then
log Z by the final run and by a bootstrap with the same number of network calls.
modes: nine modes, a hundred steps, and a reward that keeps three; log Z from sums over a grid.
tokens: a masked chain of 64 states, its exact efficiency after learning, by enumeration of paths.
"""

import argparse
import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    GaussianKernels,
    LearnedTwist,
    QuadraticTwist,
    TokenTwist,
    TrustRegionTwistedSMC,
)
from smcdiff.models import (
    Diffusion,
    EnumeratedDenoiser,
    FromAlphas,
    GaussianDenoiser,
    MaskedDiffusion,
    MixtureDenoiser,
)

BETAS = (0.05, 0.10, 0.20, 0.35, 0.50)
LOG_Z = -1.6211919184  # per copy
MODES = -1.4396866  # of the mixture itself; the chain's own is within .01
TOKENS = 1.9320106504


def gaussian_model(size: int):  # type: ignore[no-untyped-def]
    """Exact kernels of N(.5, 1.44) data, and the reward -(x - 2)^2 / .5."""
    levels = (1 - torch.tensor(BETAS)).cumprod(0).sqrt()
    denoiser = GaussianDenoiser(torch.full((size,), 0.5), torch.full((size,), 1.44))
    spread = (1 + 0.44 * levels[-1] ** 2).sqrt()
    start = dist.Normal((0.5 * levels[-1]).expand(size), spread.expand(size)).to_event(1)
    prior = Diffusion(denoiser, FromAlphas(levels), num_steps=5, variance="exact", source=start)

    def model() -> None:
        pyro.factor("reward", -2 * ((prior("x") - 2) ** 2).sum(-1))

    return model


def modes_model():  # type: ignore[no-untyped-def]
    """The toy of Kim et al. (2025): nine modes in the plane, and -x^2 / 100 - y^2."""
    line = torch.tensor([-4.0, 0.0, 4.0])
    denoiser = MixtureDenoiser(torch.cartesian_prod(line, line), 0.3)
    prior = Diffusion(denoiser, num_steps=100, variance="large")

    def model() -> None:
        x = prior("x")
        pyro.factor("reward", -(x[..., 0] ** 2) / 100 - x[..., 1] ** 2)

    return model


def tokens_model():  # type: ignore[no-untyped-def]
    """Three positions, three tokens, three steps, and a reward that couples two positions."""
    a, b, c = (torch.arange(3).reshape(shape) for shape in ((3, 1, 1), (1, 3, 1), (1, 1, 3)))
    joint = torch.sin(1.0 + a + 2 * b + 3 * c).exp()
    prior = MaskedDiffusion(EnumeratedDenoiser(joint), 3, 3, alphas=(1.0, 2 / 3, 1 / 3, 0.0))

    def model() -> None:
        x = prior("x")
        same, last = x[..., 0] == x[..., 1], x[..., 2] == 2
        pyro.factor("reward", 2.0 * same + 1.5 * last)

    return model


def learn(  # type: ignore[no-untyped-def]
    name: str, model, learned: LearnedTwist, truth: float, epsilon: float, particles: int, most: int
) -> None:
    """Prints one row per iteration, and two for the final run and its bootstrap."""
    pyro.set_rng_seed(0)
    method = TrustRegionTwistedSMC(
        model,
        learned,
        epsilon=epsilon,
        num_iterations=most,
        num_particles=particles,
        num_runs=4,
        good_ess=0.75,
    )
    posterior = method.run()
    for number, each in enumerate(method.iterations):
        tau, beta, ess = float(each.tau[0]), float(each.beta[0]), float(each.ess[0])
        figures = f"{tau:.3f} | {beta:.3f} | {ess:.3f} | {float(each.largest_weight[0]):.3f}"
        error = float(each.log_evidence[0]) - truth
        print(f"| {name} | {number} | {figures} | {error:+.3f} | {each.calls.network} |")
    calls = method.learning_calls.network + posterior.num_network_calls
    print(final(name, "final", posterior, truth, calls), flush=True)
    steps = posterior.program.num_steps  # type: ignore[union-attr]
    rival = SMC(model, num_particles=max(1, calls // (4 * steps)), num_runs=4).run()
    print(final(name, "bootstrap", rival, truth, rival.num_network_calls), flush=True)


def final(name: str, what: str, posterior: Posterior, truth: float, calls: int) -> str:
    sizes = [*(float(s.ess.min()) for s in posterior.history), float(posterior.particles.ess.min())]
    smallest = min(sizes) / posterior.particles.num_particles
    errors: Tensor = posterior.log_evidence - truth
    deviation = f"{float(errors.mean()):+.3f} ± {float(errors.std()):.3f}"
    return f"| {name} | {what} | | | {smallest:.3f} | | {deviation} | {calls} |"


def gaussian() -> None:
    free = {"pseudo_count": 0.0, "floor": 1e-6}
    for size in (10, 20):
        model, truth = gaussian_model(size), size * LOG_Z
        most = 9 if size == 10 else 14
        kernels, twist = GaussianKernels(), QuadraticTwist()
        learn(f"d = {size}, kernels, .5", model, kernels, truth, 0.5, 1000, most)
        learn(f"d = {size}, quadratic, .5", model, twist, truth, 0.5, 1000, most)
        collapsing = GaussianKernels(**free)  # type: ignore[arg-type]
        learn(f"d = {size}, kernels, inf", model, collapsing, truth, math.inf, 1000, 9)


def modes() -> None:
    learn("shared times", modes_model(), QuadraticTwist(), MODES, 0.5, 300, 8)
    learn("each time alone", modes_model(), QuadraticTwist(reach=0), MODES, 0.5, 300, 8)


def tokens() -> None:
    learn("table", tokens_model(), TokenTwist(), TOKENS, 0.2, 2000, 6)


TABLES = {"gaussian": gaussian, "modes": modes, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # what collapses on purpose
    for name in arguments.tables:
        print(f"\n## {name}\n")
        print("| what | iteration | tau | beta | ESS / N | largest weight | log Z error | calls |")
        print("|" + "---|" * 8)
        TABLES[name]()


if __name__ == "__main__":
    main()
