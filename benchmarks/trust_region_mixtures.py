r"""Learned twists on 25 modes and a linear observation, at equal network calls.

    python benchmarks/trust_region_mixtures.py [--problems 4] [--dims 8 80] [--dim-y 1 2 4]

The problems of ``mixtures.py`` on twenty equal steps of the log-SNR. "learned" is a residual on the
Jacobian look-ahead in a few directions, trained in trust-region sweeps and judged on paths that are
held out; "jacobian" and "bootstrap" get as many calls for their particles as it took, learning
included (a Jacobian counts as a second call). All are resampled to 2000 draws. SW is sliced W1 to
exact draws, averaged over four sets of them; the floor is that of exact draws, over the same sets,
the ratio that of the two. "roots" is the effective number of independent particles.
"""

import argparse
import statistics
import warnings
from dataclasses import dataclass

import pyro
import torch
from metrics import sliced_wasserstein
from mixtures import Problem
from torch import Tensor

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
SETS, SLICES = 4, 200  # of exact draws; of each distance


@dataclass(frozen=True)
class Row:
    """One method on one problem."""

    distance: float
    floor: float
    log_z_error: float
    roots: float
    calls: int


def run(problem: Problem, seed: int, arguments: argparse.Namespace) -> dict[str, Row]:
    steps, learning = arguments.steps, arguments.learning
    prior = Diffusion(problem.denoiser, LogSNR(1.0, -12.0), num_steps=steps, variance="exact")
    model = problem.program(prior)
    exact, log_z = problem.denoiser.posterior(problem.operator, problem.noise**2, problem.y)
    pyro.set_rng_seed(seed)
    sets = [exact.sample(2 * DRAWS) for _ in range(SETS)]

    def distance(x: Tensor) -> float:
        apart = [sliced_wasserstein(x, each, slices=SLICES) for each in sets if each is not x]
        return statistics.mean(apart)

    floor = statistics.mean(distance(each) for each in sets)

    def judged(posterior: Posterior, calls: int) -> Row:
        x = posterior.resample(DRAWS)["x"].flatten(0, 1)
        error = float(posterior.evidence.log_evidence - log_z)
        return Row(distance(x), floor, error, posterior.diagnose().independent_particles, calls)

    method = TrustRegionTwistedSMC(
        model,
        ResidualTwist(
            DenoisedLikelihood("jacobian"),
            rank=arguments.rank,
            descent=Descent(steps=100, held_out=0.25),
        ),
        epsilon=2.0,
        num_iterations=arguments.iterations,
        replay=arguments.iterations,
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
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=4, help="directions that are learned")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--learning", type=int, default=500, help="paths per sweep")
    parser.add_argument("--particles", type=int, default=2500, help="of each of two final runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    print("| d,d_y | method | SW median | floor | ratio | worst | log Z error | roots | calls |")
    print("|" + "---|" * 9)
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
                    f"{max(r.distance / r.floor for r in rows):.2f} | "
                    f"{median(abs(r.log_z_error) for r in rows):.3f} | "
                    f"{median(r.roots for r in rows):.0f} | {max(r.calls for r in rows)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
