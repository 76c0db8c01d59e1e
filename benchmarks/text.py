r"""Names whose posterior is exact, steered to hold some letters, at equal network calls.

    python benchmarks/text.py [--rewards contains ends] [--seeds 3] [--particles 500]

The prior is a Markov chain of letters with its own table at each of 16 positions, fitted to the
training names; forward and backward messages are the network, and revealing one letter per step
makes the reverse process exact. A name with the wanted letters has the reward 0, any other -8: log
Z, every marginal and exact draws follow by dynamic programming.

* learned: `StringTwist` by trust regions (at first psi = 1), then a run on fresh particles; its
  sweeps count among its calls, and all other rows get as many;
* learned scalar: what that run has learned, as a twist of the model's own transitions;
* FK: intermediate rewards from four draws of x_0, resampled at every step; "draws of x_0" is the
  same with adaptive resampling and smoothed weights, as in `TwistedSMC`; "nested" keeps one of
  eight candidates by it;
* learned table: `TokenTwist`, and beside it a bootstrap, on 32 steps that reveal letters
  independently: log Z and marginals of that chain are not exactly those of the data.

TV is the total variation of the weighted particles of all runs from the exact posterior: of the
letter at a position (the mean over the positions), and of the first two letters together (729
pairs); floors are those of as many exact draws. Errors of log Z are those of single runs. ESS / N
is the smallest over all steps and runs. Numbers are medians (and ranges) over the seeds.
"""

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    IntermediateReward,
    NestedProposal,
    ParticleMethod,
    StringTwist,
    TokenTwist,
    TrustRegionTwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import MarkovDenoiser, MaskedDiffusion, contains
from smcdiff.models.automata import Automaton
from smcdiff.models.text import NAME_LENGTH, NAMES, load_names
from smcdiff.particles import Calls

PATTERNS = {"contains": "ann", "ends": "ah."}
OUTSIDE = -8.0
SIZE = len(NAMES)
CANDIDATES, DRAWS, STEPS = 8, 4, 32


@dataclass(frozen=True)
class Problem:
    """A wanted pattern, and everything about it that is exact."""

    name: str
    reward: Automaton
    data: MarkovDenoiser

    @staticmethod
    def make(name: str) -> "Problem":
        pattern = NAMES.encode(PATTERNS[name])
        data = MarkovDenoiser.fit(load_names(), SIZE, by_position=True)
        return Problem(name, contains(pattern, SIZE, 0.0, OUTSIDE), data)

    @property
    def posterior(self) -> MarkovDenoiser:
        return self.data.tilted(self.reward)

    def program(self, **settings: Any) -> Callable[[], None]:
        prior = MaskedDiffusion(self.data, NAME_LENGTH, SIZE, **settings)

        def model() -> None:
            pyro.factor("reward", self.reward(prior("x")))

        return model

    def laws(self) -> tuple[Tensor, Tensor]:
        """Of each letter, with shape (16, 27), and of the first two, with shape (729,)."""
        free = torch.full((NAME_LENGTH,), SIZE)
        pairs = free.repeat(SIZE**2, 1)
        pairs[:, :2] = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
        return self.posterior(free).exp(), self.posterior.log_prob(pairs).exp()

    def distances(self, x: Tensor, weights: Tensor) -> tuple[float, float]:
        """Total variation of weighted names from both laws."""
        letters, pairs = self.laws()
        drawn = torch.zeros_like(letters)
        drawn.scatter_add_(1, x.T, weights.expand(NAME_LENGTH, -1))
        together = torch.zeros_like(pairs)
        together.scatter_add_(0, x[:, 0] * SIZE + x[:, 1], weights)
        apart = 0.5 * (drawn - letters).abs().sum(-1).mean()
        return float(apart), float(0.5 * (together - pairs).abs().sum())


@dataclass(frozen=True)
class Result:
    """One method's final run, and what it took."""

    posterior: Posterior
    network: int
    reward: int
    seconds: float


def finish(method: ParticleMethod, learning: Calls | None = None) -> Result:
    """Runs a method; what was learned before, or is learned now, counts among its calls."""
    start = time.process_time()
    posterior = method.run()
    if isinstance(method, TrustRegionTwistedSMC):
        learning = method.learning_calls
    calls = sum((step.calls for step in posterior.history), learning or Calls())
    return Result(posterior, calls.network, calls.program, time.process_time() - start)


def contestants(
    problem: Problem, seed: int, arguments: argparse.Namespace
) -> Iterator[tuple[str, Result]]:
    """Each method's name and result."""
    runs, size = arguments.runs, arguments.particles
    model = problem.program(num_steps=NAME_LENGTH, reveal="even")
    settings = {
        "epsilon": 0.5,
        "num_iterations": arguments.iterations,
        "learning_particles": size,
        "num_particles": size,
        "num_runs": runs,
    }
    pyro.set_rng_seed(seed)
    learned = StringTwist(descent=Descent(arguments.descent, 64, 4, 5e-3, held_out=0.25))
    method = TrustRegionTwistedSMC(model, learned, **settings)
    result = finish(method)
    yield "learned", result
    scalar = SMC(model, twist=learned, num_particles=size, num_runs=runs)
    number = -(-result.network // (runs * NAME_LENGTH))
    looks = 1 + CANDIDATES * (NAME_LENGTH - 1)
    draws = partial(IntermediateReward, num_draws=DRAWS)
    yield "learned scalar", finish(scalar, method.learning_calls)
    common = {"num_runs": runs, "num_particles": number}
    yield "bootstrap", finish(SMC(model, **common))
    every = {"ess_threshold": 1.0, **common}
    yield "FK difference", finish(SMC(model, twist=draws("difference"), **every))
    yield "FK max", finish(SMC(model, twist=draws("max"), **every))
    smooth = {"smoothing": 0.7, **common}
    yield "draws of x_0", finish(SMC(model, twist=draws("difference"), **smooth))
    few = {"num_runs": runs, "num_particles": max(number * NAME_LENGTH // looks, 1)}
    nested = NestedProposal(CANDIDATES)
    yield "nested", finish(SMC(model, twist=draws("difference"), proposal=nested, **few))
    yield from independent(problem, result.network, settings)


def independent(
    problem: Problem, calls: int, settings: dict[str, Any]
) -> Iterator[tuple[str, Result]]:
    """The same on the chain that reveals positions independently, where tables are exact twists."""
    model, runs = problem.program(num_steps=STEPS), settings["num_runs"]
    sweeps = settings["num_iterations"] + runs
    size = max(calls // (STEPS * sweeps), 1)
    own = {**settings, "learning_particles": size, "num_particles": size}
    yield "learned table", finish(TrustRegionTwistedSMC(model, TokenTwist(), **own))
    number = -(-calls // (runs * STEPS))
    yield "bootstrap, independent", finish(SMC(model, num_runs=runs, num_particles=number))


def figures(problem: Problem, result: Result) -> dict[str, list[float]]:
    """What each column is the median of."""
    posterior = result.posterior
    x, weights = posterior.samples["x"].flatten(0, 1), posterior.weights.flatten()
    own = problem.distances(x, weights)
    exact = problem.posterior.sample(len(x))
    floor = problem.distances(exact, torch.full_like(weights, 1 / len(x)))
    shares = [step.ess.min() for step in posterior.history] + [posterior.particles.ess.min()]
    return {
        "TV letters": [own[0]],
        "floor ": [floor[0]],
        "TV first two": [own[1]],
        "floor": [floor[1]],
        "log Z error": (posterior.log_evidence - problem.posterior.log_evidence).tolist(),
        "smallest ESS / N": [float(min(shares)) / posterior.particles.num_particles],
        "hits": [float(weights @ (problem.reward(x) == 0).double())],
        "network calls": [result.network],
        "reward calls": [result.reward],
        "CPU s": [result.seconds],
    }


def median(column: str, values: list[float]) -> str:
    """The median, and the range of what differs between seeds."""
    whole = column in ("network calls", "reward calls", "CPU s")
    ordered, digits = sorted(values), 0 if whole else 3
    middle = f"{statistics.median(ordered):.{digits}f}"
    if whole or "floor" in column:
        return middle
    return f"{middle} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rewards", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--particles", type=int, default=500, help="per sweep and per run")
    parser.add_argument("--descent", type=int, default=150, help="steps of a fit")
    parser.add_argument("--runs", type=int, default=4, help="of the final run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of bootstraps whose weights degenerate, as they must here
    for number, name in enumerate(arguments.rewards):
        problem, rows = Problem.make(name), defaultdict(lambda: defaultdict(list))
        for seed in range(arguments.seeds):
            for method, result in contestants(problem, seed, arguments):
                for column, values in figures(problem, result).items():
                    rows[method][column] += values
        if number == 0:
            columns = ["reward", "method", *next(iter(rows.values()))]
            print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for method, row in rows.items():
            cells = [name, method, *(median(*cell) for cell in row.items())]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
