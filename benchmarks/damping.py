r"""Look-aheads through a network, damped at high noise and not: who keeps more particles alive?

    python benchmarks/damping.py                      # about four minutes
    python benchmarks/damping.py --dataset mnist --steps 25 --particles 64 --damping 0 1

Posteriors over the digits of a shipped prior: the wish for one class, and likelihoods that no
network linearises (heavy tails, bits, the number of bright pixels, a linear reward), then Gaussian
observations, where the look-ahead is one of the residuals. By problem and power of R_t^2 (see
`smcdiff/inference/denoised.py`): log Z, its standard error over the runs, the smallest effective
sample size and the effective number of roots over all runs, the verdict, and the network calls of
one particle (a backward pass counts as one more). "bootstrap" has no look-ahead, and as many
particles as make its number of calls equal.
"""

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import SMC, ParticleMethod, TwistedSMC
from smcdiff.models import Diffusion
from smcdiff.restoration import DATASETS, Dataset, blur_problem, box_problem, wish_problem

Model = Callable[[Any], None]


def heavy_tails(prior: Diffusion, seen: Tensor) -> Model:
    """Pixels outside a box, with noise of Student's t."""

    def model(y: Tensor) -> None:
        x = prior("x")
        pyro.sample("y", dist.StudentT(3.0, x[..., seen], 0.3).to_event(1), obs=y)

    return model


def bits(prior: Diffusion) -> Model:
    """Every pixel, as one bit."""

    def model(y: Tensor) -> None:
        x = prior("x")
        pyro.sample("y", dist.Bernoulli(logits=3 * x).to_event(3), obs=y)

    return model


def linear(prior: Diffusion) -> Model:
    """A linear reward: here an undamped average is exact for Gaussian data."""

    def model(_: None) -> None:
        pyro.factor("reward", 20 * prior("x").mean((-1, -2, -3)))

    return model


def brightness(prior: Diffusion) -> Model:
    """The mean shall be close to one that is rare."""

    def model(_: None) -> None:
        pyro.factor("reward", -200 * (prior("x").mean((-1, -2, -3)) - 0.1).square())

    return model


def problems(dataset: Dataset, prior: Diffusion) -> dict[str, tuple[Model, Any]]:
    """Programs and data."""
    digits = dataset.examples()
    nine, five = digits[9], digits[5]
    noisy = (nine + 0.3 * torch.randn_like(nine))[dataset.seen]
    ready = {
        "box, Gaussian": box_problem(dataset, prior, nine),
        "blur, Gaussian": blur_problem(dataset, prior, five),
        "wish for a 7": wish_problem(dataset, prior, 7, {}),
        "wish for a 3": wish_problem(dataset, prior, 3, {}),
    }
    return {
        **{name: (each.model, each.data) for name, each in ready.items() if "wish" in name},
        "heavy tails": (heavy_tails(prior, dataset.seen), noisy),
        "bits": (bits(prior), torch.bernoulli(torch.sigmoid(3 * nine))),
        "brightness": (brightness(prior), None),
        "linear reward": (linear(prior), None),
        **{name: (each.model, each.data) for name, each in ready.items() if "wish" not in name},
    }


def row(problem: str, name: str, posterior: Posterior) -> str:
    diagnosis, particles = posterior.diagnose(), posterior.particles
    number = particles.num_particles * posterior.log_evidence.numel()
    calls = (posterior.num_network_calls + posterior.num_gradient_calls) / number
    evidence = posterior.evidence
    return (
        f"| {problem} | {name} | {float(evidence.log_evidence):.2f} | "
        f"{float(posterior.log_evidence.std()) / posterior.log_evidence.numel() ** 0.5:.2f} | "
        f"{diagnosis.smallest_ess:.3f} | {diagnosis.effective_roots:.1f} of {number} | "
        f"{diagnosis.verdict} | {calls:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--particles", type=int, default=128)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--damping", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--problems", nargs="+", help="only those whose names start so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    dataset = DATASETS[arguments.dataset]
    prior = dataset.prior(arguments.steps)
    print("| problem | damping | log Z | ± | smallest ESS / N | roots | verdict | calls |")
    print("|" + "---|" * 8)
    for problem, (model, data) in problems(dataset, prior).items():
        if arguments.problems and not problem.startswith(tuple(arguments.problems)):
            continue
        size = {"num_runs": arguments.runs, "ess_threshold": 0.25}
        methods: dict[str, ParticleMethod] = {
            "bootstrap": SMC(model, num_particles=2 * arguments.particles, **size)
        }
        for damping in arguments.damping:
            methods[f"{damping:g}"] = TwistedSMC(
                model,
                covariance="scalar",
                proposal="gradient",
                damping=damping,
                num_particles=arguments.particles,
                **size,
            )
        for name, method in methods.items():
            pyro.set_rng_seed(0)
            print(row(problem, name, method.run(data)), flush=True)


if __name__ == "__main__":
    main()
