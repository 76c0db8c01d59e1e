"""The main job, end to end: posteriors over digits, declared in Pyro, and a verdict on each.

The programs are in :mod:`smcdiff.restoration`. `Demo` infers, prints, and writes pictures and ArviZ
files.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from torch import Tensor

from smcdiff.inference import TwistedSMC

from .restoration import (
    DATASETS,
    Problem,
    blur_problem,
    box_problem,
    enlarge_problem,
    wish_problem,
)


@dataclass(frozen=True)
class Demo:
    """Runs the problems of a dataset.

    Args:
        dataset: a name of `DATASETS`.
        num_particles, num_runs, num_steps: the size of each inference.
        seed: of all random numbers.
        out: the folder of pictures and ArviZ files.
    """

    dataset: str
    num_particles: int
    num_runs: int
    num_steps: int
    seed: int
    out: Path

    def run(self, image: Path | None = None, label: int | None = None) -> None:
        """Infers, prints and writes.

        Args:
            image: a picture of a digit, instead of held-out ones.
            label: the digit to wish for (None: what the classifier sees in the picture, or 7).
        """
        problems = self.problems(image, label)
        self.out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        print(
            f"A diffusion prior of {DATASETS[self.dataset].title}, {self.num_steps} steps. For "
            f"each of {len(problems)} posteriors: {self.num_runs} independent runs of "
            f"{self.num_particles} particles."
        )
        verdicts = []
        for number, problem in enumerate(problems, 1):
            print(f"\n{number}. {problem.title}\n   {problem.story}", flush=True)
            verdicts.append((problem.title, self.solve(problem)))
        print("\nCan the answers be trusted?")
        for title, verdict in verdicts:
            print(f"   {title:<38}{verdict}")
        print(
            f"\nDone in {time.perf_counter() - start:.0f} s. Look at {self.out}/*.png; "
            f'arviz.from_netcdf("{self.out}/{problems[0].name}.nc") reads the draws.'
        )

    def problems(self, image: Path | None, label: int | None) -> list[Problem]:
        """What is to be inferred, with its simulated data."""
        pyro.set_rng_seed(self.seed)
        dataset = DATASETS[self.dataset]
        prior = dataset.prior(self.num_steps)
        if image is None:
            digits = dataset.examples()
            label = 7 if label is None else label
            nine, five, three = digits[9], digits[5], digits[3]
            beside = {f"a real {label}": digits[label], "another one": digits[10 + label]}
        else:
            nine = five = three = read_digit(image, dataset.side)
            if label is None:
                label = int(dataset.classifier("guide")(nine).argmax())
            beside = {"your picture": nine}
        problems = [box_problem(dataset, prior, nine), blur_problem(dataset, prior, five)]
        if dataset.reduction:
            problems.append(enlarge_problem(dataset, prior, three))
        return [*problems, wish_problem(dataset, prior, label, beside)]

    def solve(self, problem: Problem) -> str:
        """Infers one posterior, tells of it, and returns the verdict."""
        method = TwistedSMC(
            problem.model,
            proposal="gradient",
            ess_threshold=0.25,  # resampling seldom keeps more ancestors
            num_particles=self.num_particles,
            num_runs=self.num_runs,
            **{"covariance": "scalar", **problem.options},
        )
        pyro.set_rng_seed(self.seed)
        posterior = method.run(problem.data, progress=True)
        print(indent(f"{posterior.summary()}\n\n{problem.check(posterior)}"))
        path = self.out / problem.name
        pictures = {"": posterior.plot_samples("x", beside=problem.beside)}
        pictures["_steps"] = posterior.plot_steps()
        for suffix, figure in pictures.items():
            figure.savefig(f"{path}{suffix}.png", dpi=110)
        posterior.to_arviz().to_netcdf(f"{path}.nc")
        return posterior.diagnose().verdict


def indent(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.splitlines())


# --------------------------------------------------------------------------------- own pictures


class ImageError(ValueError):
    """A picture that cannot be used."""


def read_digit(path: Path, side: int) -> Tensor:
    """A picture as the priors know them: grey, square, bright strokes (1) on a dark ground (-1)."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImageError("--image needs Pillow: pip install pillow") from error
    if not path.is_file():
        raise ImageError(f"--image: there is no file {path}; give a PNG or JPEG picture")
    try:
        with Image.open(path) as file:
            grey = ImageOps.exif_transpose(file).convert("L")
            grey = grey.resize((side, side), Image.Resampling.BOX)
    except (OSError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"--image: {path} cannot be read as a picture ({error}); give a PNG or JPEG"
        ) from error
    x = torch.tensor(list(grey.tobytes()), dtype=torch.float32).reshape(1, side, side)
    low, high = x.min(), x.max()
    if low == high:
        raise ImageError(f"--image: {path} has one grey value only; give a picture of a digit")
    x = 2 * (x - low) / (high - low) - 1
    border = torch.cat([x[0, [0, -1]].flatten(), x[0, 1:-1, [0, -1]].flatten()])
    return -x if border.median() > 0 else x  # ink on paper becomes bright on dark
