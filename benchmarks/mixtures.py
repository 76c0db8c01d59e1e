r"""Twenty-five modes, linear observations (Cardoso et al. 2024, arXiv 2308.07983), solved exactly.

    python benchmarks/mixtures.py                # d = 8, 80 and d_y = 1, 2, 4, 20 problems each
    python benchmarks/mixtures.py --problems 4   # a quick look
    python benchmarks/mixtures.py --dims 800 --dim-y 1 2 --log-snr 9 -20 --problems 4
    python benchmarks/mixtures.py --steps 20 --log-snr 1 -12

The prior has the means (-8 i, -8 j) repeated, i, j = -2..2, unit covariances and random weights;
the score is exact, so what is left is the sampler's error. Printed by cell and method: sliced W1
to exact posterior samples (median, mean, and how many runs are no nearer than the prior), the floor
(two exact sets), the error of log Z against the exact log p(y), the smallest effective sample size
as a share of N, and calls per particle: network, and backward passes or closed-form Jacobians.
"""

import argparse
import statistics
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from metrics import sliced_wasserstein
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import SMC, ParticleMethod, TwistedSMC
from smcdiff.models import Diffusion, FromAlphas, LogSNR, MixtureDenoiser, Schedule

METHODS = ("bootstrap", "none", "scalar", "diagonal", "jacobian", "DPS")
DIVERGED = 8.0  # sliced W1 beyond this: no better than a draw from the prior


@dataclass(frozen=True)
class Problem:
    """y = A x + noise, with the posterior and log p(y) in closed form."""

    denoiser: MixtureDenoiser
    operator: Tensor
    scales: Tensor
    noise: float
    y: Tensor

    @staticmethod
    def draw(dim: int, dim_y: int, seed: int) -> "Problem":
        """The recipe of the paper's code, with the weights drawn inside the seeded problem."""
        stream = torch.Generator().manual_seed(seed)
        grid = [(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
        means = torch.tensor(grid).repeat(1, dim // 2)
        weights = torch.randn(25, generator=stream).square()
        denoiser = MixtureDenoiser(means, 1.0, weights / weights.sum())
        u, _, v = torch.linalg.svd(torch.randn(dim_y, dim, generator=stream), full_matrices=False)
        scales = torch.rand(dim_y, generator=stream).sort(descending=True).values
        operator = u @ torch.diag(scales) @ v
        noise = float(torch.rand((), generator=stream) * scales.max())
        mode = torch.multinomial(denoiser.weights, 1, generator=stream)[0]
        x = means[mode] + torch.randn(dim, generator=stream)
        y = operator @ x + noise * torch.randn(dim_y, generator=stream)
        return Problem(denoiser, operator, scales, noise, y)

    def schedule(self, log_snr: list[float] | None, steps: int) -> Schedule:
        return LogSNR(*log_snr) if log_snr else self.adapted(steps)

    def adapted(self, steps: int) -> FromAlphas:
        """The published grid: alpha falls evenly; levels where noise and data balance stay."""
        bars = torch.cumprod(1 - torch.linspace(0.02, 1e-4, 999), 0)
        bars = torch.cat([torch.ones(1), bars])
        kept = {int((self.noise**2 * bars - (1 - bars) * s**2).abs().argmin()) for s in self.scales}
        roots, tail = bars.sqrt(), max(1, steps // 10)
        last = int((roots < 0.01).nonzero()[0])
        count, index = steps, set(range(steps + 1))
        while len(index) > steps - tail:
            count -= 1
            targets = torch.linspace(1, float(roots[last]), count + 1)[1:]
            index = ({int((roots - a).abs().argmin()) for a in targets} | kept) - {0}
        rest = torch.linspace(min(max(index), 980), 999, steps - len(index) + 2)[1:]
        index |= set(rest.round().long().tolist())
        return FromAlphas(roots[sorted(index)[:steps]])

    def program(self, prior: Diffusion):  # type: ignore[no-untyped-def]
        def model(y: Tensor) -> None:
            x = prior("x")
            law = dist.Normal(x @ self.operator.mT, self.noise).to_event(1)
            pyro.sample("y", law, obs=y)

        return model


@dataclass(frozen=True)
class Row:
    """One method on one problem."""

    distance: float
    floor: float
    log_z_error: float
    smallest_ess: float
    calls: float
    gradients: float


def method_of(  # type: ignore[no-untyped-def]
    name: str, model, particles: int, smoothing: float | None
) -> ParticleMethod:
    size = {"num_particles": particles, "num_runs": 2}
    if name == "bootstrap":
        return SMC(model, **size)  # type: ignore[arg-type]
    size["proposal"] = "gradient" if name in ("none", "scalar") else "conjugate"
    return TwistedSMC(model, covariance=name, smoothing=smoothing, **size)  # type: ignore[arg-type]


def guided(problem: Problem, prior: Diffusion, number: int, strength: float = 0.1) -> Tensor:
    """Diffusion posterior sampling (Chung et al. 2023): steps along a gradient, no weights."""
    x = prior.initial().expand([number]).sample()
    for t in range(prior.num_steps, 0, -1):
        tracked = x.clone().requires_grad_()
        kernel = prior.kernel(tracked, t)
        miss = (problem.y - kernel.denoised.mean @ problem.operator.mT).norm(dim=-1)
        gradient = torch.autograd.grad(miss.square().sum(), tracked)[0]
        x = kernel.law.sample().detach() - strength / miss.detach()[:, None] * gradient
    return x


def run(
    problem: Problem,
    prior: Diffusion,
    name: str,
    particles: int,
    seed: int,
    smoothing: float | None = None,
) -> Row:
    exact, log_z = problem.denoiser.posterior(problem.operator, problem.noise**2, problem.y)
    pyro.set_rng_seed(seed)
    reference, other = exact.sample(2 * particles), exact.sample(2 * particles)
    floor = sliced_wasserstein(other, reference)
    if name == "DPS":
        x = guided(problem, prior, 2 * particles)
        distance = sliced_wasserstein(x, reference) if bool(x.isfinite().all()) else float("inf")
        return Row(distance, floor, float("nan"), float("nan"), prior.num_steps, prior.num_steps)
    method = method_of(name, problem.program(prior), particles, smoothing)
    posterior: Posterior = method.run(problem.y)
    x = posterior.resample(particles)["x"].flatten(0, 1)
    sizes = [float(step.ess.min()) for step in posterior.history]
    smallest = min(*sizes, float(posterior.particles.ess.min())) / particles
    number = 2 * particles
    return Row(
        sliced_wasserstein(x, reference),
        floor,
        float(posterior.evidence.log_evidence - log_z),
        smallest,
        posterior.num_network_calls / number,
        prior.num_steps if name == "jacobian" else posterior.num_gradient_calls / number,
    )


def cell(dim: int, dim_y: int, arguments: argparse.Namespace) -> None:
    problems = [Problem.draw(dim, dim_y, seed) for seed in range(arguments.problems)]
    for name in arguments.methods:
        rows = []
        for seed, problem in enumerate(problems):
            schedule = problem.schedule(arguments.log_snr, arguments.steps)
            prior = Diffusion(
                problem.denoiser, schedule, num_steps=arguments.steps, variance=arguments.variance
            )
            size = arguments.particles
            rows.append(run(problem, prior, name, size, seed, arguments.smoothing))
        print(describe(f"{dim},{dim_y}", name, rows), flush=True)


def describe(where: str, name: str, rows: list[Row]) -> str:
    median, mean = statistics.median, statistics.mean
    distances = [r.distance for r in rows]
    near = [d for d in distances if d < DIVERGED]
    return (
        f"| {where} | {name} | {median(distances):.3f} | "
        f"{mean(near) if near else float('nan'):.3f} | "
        f"{len(distances) - len(near)} | {median(r.floor for r in rows):.3f} | "
        f"{median(r.distance / r.floor for r in rows):.2f} | "
        f"{median(abs(r.log_z_error) for r in rows):.3f} | "
        f"{median(r.smallest_ess for r in rows):.3f} | {min(r.smallest_ess for r in rows):.3f} | "
        f"{rows[0].calls:.0f} | {rows[0].gradients:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 80])
    parser.add_argument("--dim-y", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--particles", type=int, default=1000, help="per run; two runs")
    parser.add_argument("--variance", default="exact", help="the kernel's: small, large, exact")
    parser.add_argument(
        "--log-snr", type=float, nargs=2, help="equal steps between these, not the published grid"
    )
    parser.add_argument("--smoothing", type=float, help="of TwistedSMC (its default if not given)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print("| d,d_y | method | SW median | mean | diverged | floor | ratio | log Z error | ", end="")
    print("smallest ESS, median | worst | calls | Jacobians |\n|" + "---|" * 12)
    for dim in arguments.dims:
        for dim_y in arguments.dim_y:
            cell(dim, dim_y, arguments)


if __name__ == "__main__":
    main()
