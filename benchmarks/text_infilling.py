r"""Names and lines of Shakespeare with the middle removed: what stood there?

    python benchmarks/text_infilling.py [--kinds names text] [--strings 6]

The masked model is given beginning and end and fills what is between ("prompting": `given=`, and
nothing else). The target is its law times the square root of an n-gram model's probability of the
middle and the end: two models that each know a part. Held-out strings; steps reveal independently.

* learned: a `StringTwist` by trust regions, its sweeps counted, and a bootstrap with as many calls;
* RTB: `Controlled` with the same network as biases, by relative trajectory balance with as many
  calls for learning as the sweeps had; as drawn, and corrected by `SMC(model, guide=guide)`.

"nats" is the log-likelihood of the true middle per character: exact under the chain and under a
guide (a sum over the orders in which characters were revealed), and under the target up to the
method's own estimate of log Z. "right" is the expected share of right characters. ESS / N is the
smallest over steps and runs; log Z the mean and deviation of runs. Rows are means over the strings.
"""

import argparse
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from smcdiff import Posterior, Process
from smcdiff.inference import (
    SMC,
    RelativeTrajectoryBalance,
    StringTwist,
    TrustRegionTwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.inference.learned_strings import StringNetwork
from smcdiff.models import Controlled, MaskedDiffusion, name_prior, text_prior
from smcdiff.models.text import END, ENGLISH, NAMES, SOURCES, load_english, load_names, windows

sys.path.append(str(Path(__file__).parents[1] / "training"))
from text_figures import NGram

POWER, RUNS, TRAJECTORIES = 0.5, 2, 32


@dataclass(frozen=True)
class Task:
    """A kind of strings, and which of their characters are removed."""

    prior: MaskedDiffusion
    gram: NGram
    strings: Tensor
    removed: slice
    particles: int

    @staticmethod
    def names(number: int) -> "Task":
        test, removed = load_names("test"), slice(2, 6)
        long = test[test[:, removed.stop] != NAMES.symbols.index(END)][:number]
        gram = NGram(load_names(), 4, len(NAMES))
        return Task(name_prior(4), gram, long, removed, 256)

    @staticmethod
    def text(number: int) -> "Task":
        lines = windows(load_english("test"), 997)[:number]
        train = torch.cat([load_english("train", source) for source in SOURCES])
        gram = NGram(train[None], 5, len(ENGLISH))
        return Task(text_prior(4), gram, lines, slice(29, 34), 256)

    def given(self, string: Tensor) -> Tensor:
        given = string.clone()
        given[self.removed] = self.prior.mask
        return given

    def reward(self, x: Tensor) -> Tensor:
        """A power of the n-gram model's probability of the middle and the end."""
        bits = self.gram.bits(x)[..., self.removed.start :].sum(-1)
        return -POWER * math.log(2) * torch.from_numpy(bits)


class Biases(nn.Module):
    """A control of tokens, zero at first."""

    def __init__(self, prior: MaskedDiffusion) -> None:
        super().__init__()
        self.network, self.num_steps = StringNetwork(prior.vocabulary), prior.num_steps

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Tensor) -> Tensor:
        rows = denoised.flatten(0, -3)
        bias, _ = self.network(x.flatten(0, -2), t / self.num_steps, rows)
        return nn.functional.pad(bias, (0, 1)).reshape(*x.shape, -1)


@torch.no_grad()
def log_likelihood(process: Process, string: Tensor, given: Tensor) -> float:
    """The chain's exact log-probability of a string, over all ways to reveal it."""
    free = (given != string).nonzero()[:, 0]
    shown = torch.tensor(list(product((False, True), repeat=len(free))))
    states = given.repeat(len(shown), 1)
    states[:, free] = torch.where(shown, string[free], given[free])
    value = torch.full((len(shown),), -math.inf).double()
    value[0] = 0.0
    for t in range(process.num_steps, 0, -1):
        law = process.kernel(states, t, given=given).law.base_dist
        steps = torch.distributions.Categorical(logits=law.logits[:, None], validate_args=False)
        value = (value[:, None] + steps.log_prob(states).sum(-1).double()).logsumexp(0)
    return float(value[-1])


def contestants(task: Task, string: Tensor) -> Iterator[tuple[str, list[float]]]:
    """The numbers of each method for one string."""
    given, size = task.given(string), task.particles
    length = task.removed.stop - task.removed.start

    def model() -> None:
        pyro.factor("grams", task.reward(task.prior("x", given=given)))

    def row(posterior: Posterior, calls: int, nats: float) -> list[float]:
        share = [s.ess.min() for s in posterior.history] + [posterior.particles.ess.min()]
        right = posterior.samples["x"] == string
        right = right[..., task.removed].double().mean(-1)
        log_z = posterior.log_evidence
        found = float((posterior.weights * right).sum())
        spread = [float(log_z.mean()), float(log_z.std())]
        smallest = float(min(share)) / posterior.particles.num_particles
        return [nats / length, found, *spread, smallest, calls]

    prior = log_likelihood(task.prior, string, given)
    target = prior + float(task.reward(string[None])[0])

    def corrected(posterior: Posterior, calls: int) -> list[float]:
        log_z = float(posterior.log_evidence.logsumexp(0)) - math.log(RUNS)
        return row(posterior, calls, target - log_z)

    learned = StringTwist(descent=Descent(60, 64, None, 5e-3, held_out=0.25))
    common = {"num_particles": size, "num_runs": RUNS}
    method = TrustRegionTwistedSMC(model, learned, num_iterations=3, **common)
    posterior = method.run()
    learning = method.learning_calls.network
    calls = learning + posterior.num_network_calls
    many = {"num_particles": -(-calls // (RUNS * task.prior.num_steps)), "num_runs": RUNS}
    plain = SMC(lambda: task.prior("x", given=given), **many).run()
    yield "prompting", row(plain, calls, prior)
    bootstrap = SMC(model, **many).run()
    yield "bootstrap", corrected(bootstrap, bootstrap.num_network_calls)
    yield "learned", corrected(posterior, calls)
    guide, spent = balanced(task, model, given, learning)
    drawn = SMC(lambda: guide("x", given=given), **common).run()
    yield "RTB, as drawn", row(drawn, spent, log_likelihood(guide, string, given))
    weighted = SMC(model, lambda: guide("x", given=given), **common).run()
    yield "RTB, corrected", corrected(weighted, spent + weighted.num_network_calls)


def balanced(
    task: Task, model: Callable[[], None], given: Tensor, calls: int
) -> tuple[Controlled, int]:
    """A guide that learned with about so many calls, and how many it took."""
    pyro.clear_param_store()
    guide = Controlled(task.prior, Biases(task.prior))
    optim = PyroOptim(torch.optim.Adam, {"lr": 5e-3})
    rtb = RelativeTrajectoryBalance(
        model, lambda: guide("x", given=given), optim, num_particles=TRAJECTORIES
    )
    while rtb.calls.network < calls:
        rtb.step()
    return guide, rtb.calls.network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["names", "text"], choices=["names", "text"])
    parser.add_argument("--strings", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of few effective paths for a fit
    columns = ("strings", "method", "nats", "right", "log Z", "± runs", "ESS / N", "calls")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for kind in arguments.kinds:
        task, rows = getattr(Task, kind)(arguments.strings), defaultdict(list)
        for seed, string in enumerate(task.strings):
            pyro.set_rng_seed(seed)
            for method, numbers in contestants(task, string):
                rows[method].append(numbers)
        for method, row in rows.items():
            means = torch.tensor(row, dtype=torch.float64).mean(0).tolist()
            cells = [f"{value:.3f}" for value in means[:-1]] + [f"{means[-1]:.0f}"]
            if method in ("prompting", "RTB, as drawn"):  # without weights
                cells[2:5] = ["-"] * 3
            print("| " + " | ".join([kind, method, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
