r"""Rewards without gradients whose evidence is exact: they see two numbers A x of a mixture.

    python benchmarks/black_box.py [--problems 2] [--steps 60] [--kinds absolute ...]

The prior has 25 modes in eight dimensions; A x_0 is a mixture of unit Gaussians in one or two
dimensions, so log Z and the efficiency of a bootstrap are sums over a grid. NumPy computes the
reward, behind which autograd sees nothing:

* absolute: the size of a x was observed, where both signs may answer;
* classifier: the log-probability of "far out", a logistic function of |A x|;
* staircase: constant on squares around a point, and a step down between them.

Each problem is so rare that log Z is about -11, and ESS / N of a bootstrap without end (its
efficiency, exact) is below .0005. "learned" starts at psi = 1 and learns from whole paths; the
bootstrap and the analytic look-ahead (draws of x_0, no gradients) get as many network calls as it,
its learning included. "jacobian" is given what no other row is: the same reward in torch, with
gradients; a backward pass counts as a second call. The error of log Z is that of single runs, mean
and deviation, and of the mean of Z over the runs; ESS / N is what a run leaves behind.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    ResidualTwist,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import Diffusion, LogSNR, MixtureDenoiser

KINDS = ("absolute", "classifier", "staircase")
LOG_Z = -11.0
NOISE = 0.5  # of the observed size
REACH, SPACING = 9.0, 0.03  # of the grids around every mode


def absolute(u: np.ndarray, level: float) -> np.ndarray:
    """The log-density of an observed size."""
    miss = (np.abs(u[..., 0]) - level) / NOISE
    return -0.5 * miss**2 - math.log(NOISE * math.sqrt(2 * math.pi))


def classifier(u: np.ndarray, level: float) -> np.ndarray:
    """log sigmoid(4 (|u| - level))."""
    return -np.logaddexp(0.0, 4 * (level - np.linalg.norm(u, axis=-1)))


def staircase(u: np.ndarray, level: float) -> np.ndarray:
    """Four nats for every unit of distance from the point (level, 0), in whole steps."""
    apart = np.maximum(np.abs(u[..., 0] - level), np.abs(u[..., 1]))
    return -4.0 * np.floor(apart).clip(max=25)


REWARDS = {"absolute": absolute, "classifier": classifier, "staircase": staircase}


@dataclass(frozen=True)
class Problem:
    """A reward of A x under a mixture, its log Z, and ESS / N of a bootstrap without end."""

    kind: str
    denoiser: MixtureDenoiser
    operator: Tensor
    level: float
    log_z: float
    efficiency: float

    @staticmethod
    def draw(kind: str, seed: int, dim: int = 8) -> "Problem":
        """The nearest level at which the reward is rare enough."""
        stream = torch.Generator().manual_seed(seed)
        line = torch.arange(-2.0, 3.0).double() * 8
        means = torch.cartesian_prod(line, line).repeat(1, dim // 2)
        weights = torch.randn(25, generator=stream).double().square() + 0.1
        denoiser = MixtureDenoiser(means, 1.0, weights / weights.sum())
        size = 1 if kind == "absolute" else 2
        raw = torch.randn(dim, size, generator=stream).double()
        operator = torch.linalg.qr(raw).Q.mT.contiguous()
        for level in np.arange(0.0, 120.0, 0.25):
            log_z, efficiency = quadrature(REWARDS[kind], level, denoiser, operator, 0.3)
            if log_z < LOG_Z and efficiency < 5e-4:
                exact = quadrature(REWARDS[kind], level, denoiser, operator, SPACING)
                return Problem(kind, denoiser, operator, float(level), *exact)
        raise ValueError(f"no level of {kind!r} is rare with seed {seed}")

    def reward(self, x: Tensor) -> Tensor:
        """From values alone, as a simulator in another language would compute it."""
        u = (x.detach() @ self.operator.mT).numpy()
        return torch.as_tensor(REWARDS[self.kind](u, self.level))

    def program(self, prior: Diffusion) -> Callable[[], None]:
        def model() -> None:
            pyro.factor("reward", self.reward(prior("x")))

        return model

    def with_gradients(self, prior: Diffusion) -> Callable[[], None]:
        """The same in torch."""

        def model() -> None:
            u = prior("x") @ self.operator.mT
            if self.kind == "absolute":
                size = dist.Normal(u[..., 0].abs(), NOISE)
                pyro.sample("size", size, obs=u.new_tensor(self.level))
            elif self.kind == "classifier":
                far = 4 * (u.norm(dim=-1) - self.level)
                pyro.factor("reward", torch.nn.functional.logsigmoid(far))
            else:
                apart = torch.stack([u[..., 0] - self.level, u[..., 1]], -1).abs().amax(-1)
                steps = apart.floor().clamp(max=25) + 0.0 * apart
                pyro.factor("reward", -4.0 * steps)

        return model


def quadrature(
    reward: Callable[[np.ndarray, float], np.ndarray],
    level: float,
    denoiser: MixtureDenoiser,
    operator: Tensor,
    spacing: float,
) -> tuple[float, float]:
    """log Z, and Z^2 over the mean square of exp(reward): sums over a grid around every mode."""
    line = np.arange(-REACH, REACH, spacing) + 0.5 * spacing
    axes = np.meshgrid(*[line] * len(operator), indexing="ij")
    offsets = np.stack(axes, -1).reshape(-1, len(operator))
    log_mass = -0.5 * (offsets**2).sum(-1)
    mass = np.exp(log_mass - np.logaddexp.reduce(log_mass))
    first = second = 0.0
    for centre, weight in zip(
        (denoiser.means @ operator.mT).numpy(), denoiser.weights.numpy(), strict=True
    ):
        value = np.exp(reward(centre + offsets, level))
        first += weight * (mass @ value)
        second += weight * (mass @ value**2)
    return math.log(first) if first else -math.inf, first**2 / second if second else 0.0


def contestants(
    problem: Problem, seed: int, arguments: argparse.Namespace
) -> Iterator[tuple[str, Posterior, int]]:
    """Each method's name and final run, and all the calls that it took."""
    steps, runs = arguments.steps, arguments.runs
    prior = Diffusion(problem.denoiser, LogSNR(4.0, -12.0), num_steps=steps, variance="exact")
    model, size = problem.program(prior), {"num_runs": runs}
    pyro.set_rng_seed(seed)
    method = TrustRegionTwistedSMC(
        model,
        ResidualTwist(descent=Descent(200, 64, None, 1e-2, held_out=0.25)),
        epsilon=1.0,
        num_iterations=arguments.iterations,
        learning_particles=arguments.learning,
        num_particles=arguments.particles,
        good_ess=0.3,
        **size,
    )
    posterior = method.run()
    calls = method.learning_calls.network + posterior.num_network_calls
    yield "learned", posterior, calls
    number = -(-calls // (runs * steps))
    bootstrap = SMC(model, num_particles=number, **size).run()
    yield "bootstrap", bootstrap, bootstrap.num_network_calls
    analytic = TwistedSMC(model, proposal="kernel", num_particles=number, **size).run()
    yield "analytic", analytic, analytic.num_network_calls
    seen = problem.with_gradients(prior)
    number = -(-number // 2)
    jacobian = TwistedSMC(seen, covariance="jacobian", num_particles=number, **size).run()
    yield "jacobian", jacobian, 2 * jacobian.num_network_calls  # closed forms count as well


def row(problem: Problem, seed: int, name: str, posterior: Posterior, calls: int) -> str:
    errors = posterior.log_evidence - problem.log_z
    particles = posterior.particles
    share = float(particles.ess.mean()) / particles.num_particles
    pooled = float(errors.logsumexp(-1)) - math.log(len(errors))
    return (
        f"| {problem.kind} {seed} | {problem.log_z:.2f} | {problem.efficiency:.0e} | {name} | "
        f"{float(errors.mean()):+.3f} ± {float(errors.std()):.3f} | {pooled:+.3f} | {share:.4f} | "
        f"{calls} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--learning", type=int, default=2000, help="paths per sweep")
    parser.add_argument("--particles", type=int, default=1000, help="of each final run")
    parser.add_argument("--runs", type=int, default=4, help="of the final run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")  # of bootstraps whose weights degenerate, as they must here
    print("| problem | log Z | efficiency | method | log Z error | pooled | ESS / N | calls |")
    print("|" + "---|" * 8)
    for seed in range(arguments.problems):
        for kind in arguments.kinds:
            problem = Problem.draw(kind, seed)
            for made in contestants(problem, seed, arguments):
                print(row(problem, seed, *made), flush=True)


if __name__ == "__main__":
    main()
