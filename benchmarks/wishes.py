r"""Wishes for rare digits: every way of steering a frozen prior, at equal network calls.

    python benchmarks/wishes.py --particles 4 16 64              # 8x8 digits: a few minutes
    python benchmarks/wishes.py --dataset mnist --particles 4 16 --seeds 3

A wish is a digit, in the eyes of the guide, with a slant and an amount of ink that are rare in it,
both measured by moments of the image. The judge, the other classifier, says what came out.

The families under "learned" spend N paths on two sweeps and 3 N particles on the final run, or
twice as many where they need no gradients. All rows of one N have as many calls, learning included,
from the counters (a backward pass counts as one more): 4 N particles with gradients, 8 N without.
"reused" is a power that has learned before, from another wish and 256 paths, so that all of its
calls are particles. TDS is `TwistedSMC` as published: without draws, damping or smoothing.

Reward, agreement of the judge, slant and ink are expectations under the posterior, those of best of
n its best particle. Distance: of two draws in the judge's features, as a share of that of two real
images of the digit; copies have none. ESS is the smallest over all steps, as a share of the
particles. Figures are means over seeds; "±" is their standard error, that of log Z the standard
deviation of one run.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from mnist import real_images
from torch import Tensor, nn

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    IntermediateReward,
    LearnedTwist,
    ParticleMethod,
    PowerTwist,
    QuadraticTwist,
    ResidualTwist,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import Diffusion
from smcdiff.restoration import DATASETS

SWEEPS = 2
DRAWS = 16  # per run, for distances and pictures
COLUMNS = "N | method | reward | judge agrees | slant | ink | distance | ESS / N | log Z | calls"


class Wish(NamedTuple):
    """A digit, its slant and its mean ink, and how far off these may be."""

    digit: int
    slant: float
    ink: float
    tolerance: tuple[float, float]


def moments(x: Tensor) -> Tensor:
    """Slant (how far strokes lean to the right, per height) and mean ink: ``(*batch, 2)``."""
    ink = 0.5 * (x[..., 0, :, :] + 1)
    side = torch.linspace(-0.5, 0.5, ink.shape[-1]).to(x)
    mass = ink.sum((-1, -2)).clamp(min=1e-2)
    columns, rows = ink.sum(-2) / mass[..., None], ink.sum(-1) / mass[..., None]
    across = side - (columns * side).sum(-1, keepdim=True)
    down = side - (rows * side).sum(-1, keepdim=True)
    shared = torch.einsum("...ij,...i,...j->...", ink, down, across) / mass
    height = (rows * down.square()).sum(-1).clamp(min=1e-2)
    return torch.stack([-shared / height, ink.mean((-1, -2))], -1)


def off(wish: Wish, x: Tensor) -> Tensor:
    """By how many tolerances slant and ink miss the wish."""
    wanted = x.new_tensor([wish.slant, wish.ink])
    return (moments(x) - wanted) / x.new_tensor(wish.tolerance)


def reward(wish: Wish, guide: nn.Module, x: Tensor) -> Tensor:
    likes: Tensor = guide(x).log_softmax(-1)[..., wish.digit]
    return likes - 0.5 * off(wish, x).square().sum(-1)


def program(wish: Wish, prior: Diffusion, guide: nn.Module) -> Callable[[], None]:
    def model() -> None:
        pyro.factor("wish", reward(wish, guide, prior("x")))

    return model


WISHES = {  # the wish, and the one that a reused twist has learned from
    "digits": (Wish(7, 0.3, 0.34, (0.05, 0.01)), Wish(3, 0.15, 0.34, (0.05, 0.01))),
    "mnist": (Wish(7, 0.5, 0.15, (0.1, 0.01)), Wish(3, 0.4, 0.19, (0.1, 0.01))),
}


@dataclass(frozen=True)
class Judged:
    """Figures with shape ``(run, figure)``: reward, agreement, slant, ink, distance, ESS, log Z."""

    figures: Tensor
    calls: float
    draws: Tensor


@dataclass(frozen=True)
class Setting:
    """A wish over a prior, and who judges.

    Attributes:
        model: the program.
        real: the mean distance of two real images of the digit, in the judge's logits.
    """

    wish: Wish
    prior: Diffusion
    guide: nn.Module
    judge: nn.Module
    real: float

    @property
    def model(self) -> Callable[[], None]:
        return program(self.wish, self.prior, self.guide)

    def judged(self, posterior: Posterior, calls: float, best: bool = False) -> Judged:
        """The figures of every run; those of its best particle alone."""
        x, weights = posterior.samples["x"], posterior.log_weights.softmax(-1)
        if best:
            weights = (posterior.log_density == posterior.log_density.amax(-1, True)).double()
        seen = torch.stack(
            [
                reward(self.wish, self.guide, x),
                (self.judge(x).argmax(-1) == self.wish.digit).float(),
                *moments(x).unbind(-1),
            ],
            -1,
        )
        draws = posterior.resample(DRAWS)["x"]
        nan = torch.full_like(posterior.log_evidence, torch.nan)
        ess = torch.stack([step.ess for step in posterior.history]).minimum(posterior.particles.ess)
        ess = ess.amin(0) / posterior.particles.num_particles
        rest = [nan] * 3 if best else [self.distance(draws), ess, posterior.log_evidence]
        expected = (weights[..., None] * seen).sum(-2) / weights.sum(-1, keepdim=True)
        figures = torch.cat([expected, torch.stack(rest, -1)], -1)
        chosen = x[weights.bool()][:, None] if best else draws
        return Judged(figures, calls, chosen)

    def distance(self, draws: Tensor) -> Tensor:
        """Mean distances within each run, relative to those of real images."""
        return spread(self.judge(draws)) / self.real


def spread(points: Tensor) -> Tensor:
    """The mean distance of two rows of ``(*batch, row, k)``."""
    number = points.shape[-2]
    return torch.cdist(points, points).sum((-1, -2)) / (number * (number - 1))


# ------------------------------------------------------------------------------- the contestants


def learner(setting: Setting, learned: LearnedTwist, number: int) -> TrustRegionTwistedSMC:
    return TrustRegionTwistedSMC(
        setting.model,
        learned,
        num_iterations=SWEEPS,
        learning_particles=max(2, number // SWEEPS),
        num_particles=3 * number,
        smoothing=0.7,
    )


def residual() -> ResidualTwist:
    """A residual for few paths: four directions, and some paths that only judge."""
    descent = Descent(steps=60, batch=64, times=4, held_out=0.25)
    return ResidualTwist(DenoisedLikelihood(), rank=4, descent=descent)


FAMILIES: dict[str, Callable[[], LearnedTwist]] = {
    "learned: power": PowerTwist,
    "learned: residual": residual,
    "learned: quadratic": QuadraticTwist,
}


def rivals(setting: Setting, taught: PowerTwist) -> dict[str, Callable[..., ParticleMethod]]:
    """What spends all its calls on particles, by name."""
    model = setting.model
    plain = {"covariance": "none", "damping": 0.0, "num_draws": 0, "smoothing": 0.0}
    differences, maximum = IntermediateReward("difference"), IntermediateReward("max")
    return {
        "best of n": partial(SMC, model, ess_threshold=0.0),
        "bootstrap": partial(SMC, model),
        "FK, difference": partial(SMC, model, twist=differences),
        "FK, maximum": partial(SMC, model, twist=maximum),
        "TDS": partial(TwistedSMC, model, **plain),
        "TwistedSMC": partial(TwistedSMC, model),
        "reused: power": partial(SMC, model, twist=taught, proposal=taught, smoothing=0.7),
    }


def cost(posterior: Posterior) -> float:
    """Calls of one run."""
    calls = posterior.num_network_calls + posterior.num_gradient_calls
    return calls / posterior.log_evidence.numel()


def results(
    setting: Setting, taught: PowerTwist, number: int, seeds: int, names: list[str]
) -> Iterator[tuple[str, Judged]]:
    """Every method's figures."""
    budget = 2 * 4 * number * setting.prior.num_steps
    for name, make in rivals(setting, taught).items():
        if any(part in name for part in names):
            one = cost(make(num_particles=1).run())
            particles = max(1, round(budget / one))
            pyro.set_rng_seed(0)
            found = make(num_particles=particles, num_runs=seeds, chunk_size=512).run()
            yield name, setting.judged(found, cost(found), name == "best of n")
    for name, family in FAMILIES.items():
        if any(part in name for part in names):
            yield name, together([learn(setting, family, number, s) for s in range(seeds)])


def learn(setting: Setting, family: Callable[[], LearnedTwist], number: int, seed: int) -> Judged:
    """One seed of what learns; without gradients, with twice as many paths."""
    pyro.set_rng_seed(seed)
    alone = family()
    one = SMC(setting.model, twist=alone, proposal=alone, num_particles=1).run()
    number *= 1 if one.num_gradient_calls else 2
    method = learner(setting, family(), number)
    posterior = method.run()
    calls = method.learning_calls
    return setting.judged(posterior, calls.network + calls.gradient + cost(posterior))


def together(parts: list[Judged]) -> Judged:
    calls = sum(part.calls for part in parts) / len(parts)
    figures = torch.cat([part.figures for part in parts])
    return Judged(figures, calls, torch.cat([part.draws for part in parts]))


def teach(setting: Setting, number: int) -> PowerTwist:
    """A power that has learned from another wish."""
    pyro.set_rng_seed(0)
    learned = PowerTwist()
    learner(setting, learned, number).learn()
    return learned


# ------------------------------------------------------------------------------------ the tables


def row(number: int, name: str, found: Judged) -> str:
    mean, deviation = found.figures.mean(0), found.figures.std(0)
    error = deviation / math.sqrt(len(found.figures))
    cells = [
        f"{mean[0]:.2f} ± {error[0]:.2f}",
        f"{mean[1]:.2f} ± {error[1]:.2f}",
        f"{mean[2]:.2f}",
        f"{mean[3]:.3f}",
        f"{mean[4]:.2f} ± {error[4]:.2f}",
        f"{mean[5]:.3f}".replace("nan", "-"),
        f"{mean[6]:.2f} ± {deviation[6]:.2f}",
        f"{found.calls:.0f}",
    ]
    return " | ".join([f"| {number}", name, *cells]).replace("nan ± nan", "-") + " |"


def picture(path: Path, found: dict[str, Tensor], seed: int = 0) -> None:
    """Draws of one run, a row per method."""
    rows = {
        name: draws[:8, 0] if draws.shape[1] == 1 else draws[seed][:: DRAWS // 8]
        for name, draws in found.items()
    }
    strips(path, rows, width=6.4)


def strips(path: Path, rows: dict[str, Tensor], width: float) -> None:
    """Images side by side, a named row for each set of them."""
    from matplotlib.figure import Figure

    figure = Figure((width, 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for ax, (name, images) in zip(axes, rows.items(), strict=True):
        ax.imshow(torch.cat(list(images[:, 0]), -1), cmap="gray", vmin=-1, vmax=1)
        ax.set_axis_off()
        ax.set_title(name, loc="left", fontsize="x-small", pad=2)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--teacher", type=int, default=256, help="paths of the reused power")
    parser.add_argument("--methods", nargs="+", default=[""], help="only names that contain these")
    parser.add_argument("--picture", type=Path, help="a PNG of draws at the largest N")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = DATASETS[arguments.dataset]
    prior, guide = dataset.prior(arguments.steps), dataset.classifier("guide")
    wish, other = WISHES[arguments.dataset]
    judge = dataset.classifier("judge")
    images, labels = real_images(arguments.dataset, 1000, "cpu")
    real = float(spread(judge(images[labels == wish.digit])))
    setting = Setting(wish, prior, guide, judge, real)
    taught = teach(Setting(other, prior, guide, judge, real), arguments.teacher)
    print(f"| {COLUMNS} |\n" + "|---" * 10 + "|")
    for number in arguments.particles:
        shown = {}
        each = results(setting, taught, number, arguments.seeds, arguments.methods)
        for name, found in each:
            print(row(number, name, found), flush=True)
            shown[name] = found.draws
    if arguments.picture:
        picture(arguments.picture, shown)


if __name__ == "__main__":
    main()
