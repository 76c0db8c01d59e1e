r"""Learned twists on 25 modes and a linear observation, at equal network calls.

    python benchmarks/trust_region_mixtures.py [--problems 3] [--dims 8 80] [--dim-y 1 2 4]

The problems of ``mixtures.py`` on twenty equal steps of the log-SNR. "learned" is a residual on the
Jacobian look-ahead, trained in trust-region sweeps; "jacobian" and "bootstrap" get as many calls
for their particles as it took, learning included (a Jacobian counts as a second call). All are
resampled to 2000 draws; SW is sliced W1 to exact draws, the ratio that to the floor of two exact
sets.
"""

import argparse
import statistics
import warnings
from dataclasses import dataclass

import pyro
import torch
from metrics import sliced_wasserstein
from mixtures import Problem

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    ResidualTwist,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import Diffusion, LogSNR

DRAWS = 1000  # per run, of two


@dataclass(frozen=True)
class Row:
    """One method on one problem."""

    distance: float
    floor: float
    log_z_error: float
    share: float
    calls: int


def run(problem: Problem, seed: int, arguments: argparse.Namespace) -> dict[str, Row]:
    steps, learning = arguments.steps, arguments.learning
    prior = Diffusion(problem.denoiser, LogSNR(1.0, -12.0), num_steps=steps, variance="exact")
    model = problem.program(prior)
    exact, log_z = problem.denoiser.posterior(problem.operator, problem.noise**2, problem.y)
    pyro.set_rng_seed(seed)
    reference, other = exact.sample(2 * DRAWS), exact.sample(2 * DRAWS)
    floor = sliced_wasserstein(other, reference)

    def judged(posterior: Posterior, calls: int) -> Row:
        x = posterior.resample(DRAWS)["x"].flatten(0, 1)
        error = float(posterior.evidence.log_evidence - log_z)
        share = float(posterior.particles.ess.mean()) / posterior.particles.num_particles
        return Row(sliced_wasserstein(x, reference), floor, error, share, calls)

    method = TrustRegionTwistedSMC(
        model,
        ResidualTwist(DenoisedLikelihood("jacobian"), descent=Descent(steps=200)),
        num_iterations=arguments.iterations,
        learning_particles=learning,
        num_particles=arguments.particles,
        num_runs=2,
        smoothing=0.7,
    )
    learned = method.run(problem.y)
    calls = 2 * (method.learning_calls.network + learned.num_network_calls)
    number = calls // (2 * steps)
    size = {"num_runs": 2}
    bootstrap = SMC(model, num_particles=number, **size).run(problem.y)
    jacobian = TwistedSMC(model, covariance="jacobian", num_particles=number // 2, **size)
    rival = jacobian.run(problem.y)
    return {
        "learned": judged(learned, calls),
        "jacobian": judged(rival, 2 * rival.num_network_calls),
        "bootstrap": judged(bootstrap, bootstrap.num_network_calls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 80])
    parser.add_argument("--dim-y", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--problems", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--learning", type=int, default=500, help="paths per sweep")
    parser.add_argument("--particles", type=int, default=2500, help="of each of two final runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    print("| d,d_y | method | SW median | floor | ratio | log Z error | ESS / N | calls |")
    print("|" + "---|" * 8)
    median = statistics.median
    for dim in arguments.dims:
        for dim_y in arguments.dim_y:
            found = [
                run(Problem.draw(dim, dim_y, seed), seed, arguments)
                for seed in range(arguments.problems)
            ]
            for name in found[0]:
                rows = [each[name] for each in found]
                print(
                    f"| {dim},{dim_y} | {name} | {median(r.distance for r in rows):.3f} | "
                    f"{median(r.floor for r in rows):.3f} | "
                    f"{median(r.distance / r.floor for r in rows):.2f} | "
                    f"{median(abs(r.log_z_error) for r in rows):.3f} | "
                    f"{median(r.share for r in rows):.3f} | {max(r.calls for r in rows)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
