r"""English steered to Shakespeare's style by a classifier of characters, at equal network calls.

    python benchmarks/text_style.py [--seeds 3] [--particles 48] [--examples]

The prior knows Shakespeare and Wikipedia alike; 64 characters are revealed in 16 steps. The reward
is log sigmoid(log-odds - 10) for a classifier's log-odds of Shakespeare; ten is the median over his
own windows. It is a black box: logistic regression on hashed n-grams, trained here on every other
window of the training parts. Who judges is another one: other n-grams, another seed, and the
windows that the first has not seen.

"learned" is a `StringTwist` by trust regions, its sweeps counted; all other rows get as many calls.
"best of n" returns one string of every ten and no weights. Bits per character are those of an
n-gram model of the training parts; "different" is the share of different ones among all sequences
of four characters in as many equally weighted strings of every method. ESS / N is the smallest over
steps and runs. Numbers are medians (and ranges) over the seeds.
"""

import argparse
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from smcdiff import Posterior
from smcdiff.inference import SMC, IntermediateReward, StringTwist, TrustRegionTwistedSMC
from smcdiff.inference.descent import Descent
from smcdiff.models import text_prior
from smcdiff.models.text import ENGLISH, SOURCES, load_english, windows

sys.path.append(str(Path(__file__).parents[1] / "training"))
from text_figures import NGram

GROUP, SHOWN = 10, 32  # strings of which the best is kept; strings of every row
BUCKETS = 1 << 15
ORDER = 5


class Classifier(nn.Module):
    """The log-odds of Shakespeare: a weight for every n-gram, in as many buckets.

    Args:
        orders: the n.
        seed: of the hash.
    """

    def __init__(self, orders: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.orders, stream = orders, torch.Generator().manual_seed(seed)
        self.multipliers = torch.randint(1, 1 << 30, (max(orders),), generator=stream) * 2 + 1
        self.weights = nn.EmbeddingBag(BUCKETS, 1, mode="mean")
        nn.init.zeros_(self.weights.weight)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for order in self.orders:
            grams = (x + 1).unfold(-1, order, 1) * self.multipliers[:order]
            parts.append(((grams.sum(-1) >> 7) + order) % BUCKETS)
        odds: Tensor = self.weights(torch.cat(parts, -1))[:, 0]
        return odds * len(self.orders) * x.shape[-1]

    def trained(self, x: Tensor, labels: Tensor, steps: int = 300) -> "Classifier":
        optimiser = torch.optim.Adam(self.parameters(), lr=0.03)
        for _ in range(steps):
            rows = torch.randint(len(x), (256,))
            loss = nn.functional.binary_cross_entropy_with_logits(self(x[rows]), labels[rows])
            penalty = 1e-4 * self.weights.weight.square().sum()
            optimiser.zero_grad()
            (loss + penalty).backward()
            optimiser.step()
        return self.requires_grad_(False)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        return float(((self(x) > 0) == labels.bool()).double().mean())


def labelled(part: str, offset: int = 0, stride: int = 128) -> tuple[Tensor, Tensor]:
    """Windows of both sources, equally many, and whether they are Shakespeare's."""
    found = [windows(load_english(part, source)[offset:], stride) for source in SOURCES]
    size = min(map(len, found))
    labels = torch.tensor([1.0, 0.0]).repeat_interleave(size)
    return torch.cat([each[torch.randperm(len(each))[:size]] for each in found]), labels


def contestants(
    guide: Classifier, seed: int, arguments: argparse.Namespace
) -> Iterator[tuple[str, Posterior, int, Tensor]]:
    """Name, run and calls of each method, and strings of equal weight."""
    prior, size, runs = text_prior(arguments.steps, reveal="even"), arguments.particles, 2

    def model() -> None:
        odds = guide(prior("x"))
        pyro.factor("style", nn.functional.logsigmoid(odds - arguments.margin))

    pyro.set_rng_seed(seed)
    learned = StringTwist(descent=Descent(80, 32, 4, 5e-3, held_out=0.25))
    method = TrustRegionTwistedSMC(
        model,
        learned,
        num_iterations=arguments.iterations,
        learning_particles=size,
        num_particles=size,
        num_runs=runs,
    )
    posterior = method.run()
    calls = method.learning_calls.network + posterior.num_network_calls
    yield "learned", posterior, calls, equal(posterior)
    common = {"num_particles": -(-calls // (runs * arguments.steps)), "num_runs": runs}
    plain = SMC(model, ess_threshold=0.0, **common).run()
    strings = plain.samples["x"].flatten(0, 1)
    yield "prior", plain, plain.num_network_calls, strings[:SHOWN]
    groups = strings[: len(strings) // GROUP * GROUP].unflatten(0, (-1, GROUP))
    best = guide(groups.flatten(0, 1)).unflatten(0, (-1, GROUP)).argmax(-1)
    kept = groups[torch.arange(len(groups)), best]
    yield f"best of {GROUP}", plain, plain.num_network_calls, kept[:SHOWN]
    for name, settings in {
        "bootstrap": {},
        "FK difference": {"twist": IntermediateReward(num_draws=4), "ess_threshold": 1.0},
        "FK max": {"twist": IntermediateReward("max", num_draws=4), "ess_threshold": 1.0},
    }.items():
        steered = SMC(model, **settings, **common).run()
        yield name, steered, steered.num_network_calls, equal(steered)


def equal(posterior: Posterior) -> Tensor:
    """Strings of equal weight, of both runs by their evidence."""
    weights = posterior.weights.flatten()
    points = (torch.arange(SHOWN) + torch.rand(())) / SHOWN
    rows = torch.searchsorted(weights.cumsum(0), points.double()).clamp(max=len(weights) - 1)
    return posterior.samples["x"].flatten(0, 1)[rows]


def figures(
    name: str, posterior: Posterior, calls: int, strings: Tensor, judges: tuple[Classifier, NGram]
) -> dict[str, list[float]]:
    """What each column is the median of."""
    judge, gram = judges
    odds = judge(strings)
    grams = strings.unfold(-1, 4, 1).flatten(0, 1)
    weighted = not name.startswith("best") and name != "prior"
    shares = [step.ess.min() for step in posterior.history] + [posterior.particles.ess.min()]
    return {
        "judged Shakespeare": [float((odds > 0).double().mean())],
        "judge's log-odds": [float(odds.mean())],
        "bits per character": [float(gram.bits(strings).mean())],
        "different": [len(grams.unique(dim=0)) / len(grams)],
        "log Z": posterior.log_evidence.tolist() if weighted else [],
        "smallest ESS / N": [float(min(shares)) / posterior.particles.num_particles] * weighted,
        "calls": [calls],
    }


def median(column: str, values: list[float]) -> str:
    if not values:
        return "-"
    if column == "calls":
        return f"{statistics.median(values):.0f}"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--margin", type=float, default=10.0, help="of the log-odds")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--particles", type=int, default=48, help="per sweep and per run")
    parser.add_argument("--examples", action="store_true", help="three strings of every method")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of bootstraps whose weights degenerate
    torch.manual_seed(0)
    guide = Classifier((1, 2, 3), seed=0).trained(*labelled("train"))
    judge = Classifier((2, 4), seed=1).trained(*labelled("train", offset=64))
    heldout = labelled("test", stride=64)
    print(
        f"accuracy on {len(heldout[0])} windows of the test parts: guide "
        f"{guide.accuracy(*heldout):.3f}, judge {judge.accuracy(*heldout):.3f}\n"
    )
    text = torch.cat([load_english("train", source) for source in SOURCES])
    gram, rows = NGram(text[None], ORDER, len(ENGLISH)), defaultdict(lambda: defaultdict(list))
    for seed in range(arguments.seeds):
        for name, posterior, calls, strings in contestants(guide, seed, arguments):
            if arguments.examples and seed == 0:
                print(name, *map(repr, ENGLISH.decode(strings[:3])), sep="\n    ")
            found = figures(name, posterior, calls, strings, (judge, gram))
            for column, values in found.items():
                rows[name][column] += values
    columns = ["method", *next(iter(rows.values()))]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name, row in rows.items():
        print("| " + " | ".join([name, *(median(*cell) for cell in row.items())]) + " |")


if __name__ == "__main__":
    main()
