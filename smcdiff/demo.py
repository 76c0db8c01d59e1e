"""The main job, end to end: three posteriors over digits, declared in Pyro, and three verdicts.

Each problem is a Pyro program over the same prior (:func:`missing_box`, :func:`unknown_noise`,
:func:`class_wish`) and some data. `Demo` infers, prints, and writes pictures and ArviZ files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from smcdiff.inference import Rejuvenation, TwistedSMC
from smcdiff.models import Diffusion, digit_prior
from smcdiff.models.digits import digit_classifier, load_heldout_examples

from .posterior import Posterior

Model = Callable[[Tensor], None]

NOISE: Final = 0.3  # standard deviation of the observations' noise; grey values span [-1, 1]
SEEN: Final = torch.ones(1, 8, 8, dtype=torch.bool)
SEEN[:, 2:6, 2:6] = False  # the missing box


# ------------------------------------------------------------------------------- the posteriors


def missing_box(prior: Diffusion) -> Model:
    """All pixels but a box are seen, with noise."""

    def model(y: Tensor) -> None:
        x = prior("x")
        pyro.sample("y", dist.Normal(x[..., SEEN], NOISE).to_event(1), obs=y)

    return model


def unknown_noise(prior: Diffusion) -> Model:
    """A blurred image; how much noise lies on it is a latent like any other."""

    def model(y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(0.5))
        x = prior("x")
        pyro.sample("y", dist.Normal(blur(x), noise[..., None, None, None]).to_event(3), obs=y)

    return model


def class_wish(prior: Diffusion) -> Model:
    """Any image that a classifier takes for the wanted digit."""
    classifier = digit_classifier("guide")

    def model(label: Tensor) -> None:
        x = prior("x")
        pyro.sample("label", dist.Categorical(logits=classifier(x)), obs=label)

    return model


def blur(x: Tensor) -> Tensor:
    """A Gaussian blur with a width of one pixel."""
    at = torch.arange(8.0)
    kernel = torch.exp(-0.5 * (at[:, None] - at).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    return kernel @ x @ kernel.T


# --------------------------------------------------------------------------------- the problems


@dataclass(frozen=True)
class Problem:
    """A posterior and how to tell of it.

    Attributes:
        name: of its files.
        title, story: what a person reads before it runs.
        model, data: the program and what it is given.
        options: of `TwistedSMC`, beyond the size.
        beside: images to show beside the answer.
        check: sentences that compare the answer with the truth.
    """

    name: str
    title: str
    story: str
    model: Model
    data: Tensor
    beside: dict[str, Tensor]
    check: Callable[[Posterior], str]
    options: dict[str, Any] = field(default_factory=dict)


def box_problem(prior: Diffusion, truth: Tensor) -> Problem:
    """Inpainting."""
    y = (truth + NOISE * torch.randn_like(truth))[SEEN]
    shown = torch.full_like(truth, torch.nan)
    shown[SEEN] = y.clamp(-1, 1)

    def check(posterior: Posterior) -> str:
        found = posterior.expectation("x")
        error = (found.mean - truth)[~SEEN].square().mean().sqrt()
        sd = found.sd[~SEEN].square().mean().sqrt()
        return f"Inside the box the posterior mean is off by {error:.2f} (rms); it says {sd:.2f}."

    return Problem(
        "box",
        "A missing box",
        f"The 16 pixels in the middle are gone; noise of scale {NOISE} lies on the other 48.",
        missing_box(prior),
        y,
        {"truth": truth, "observation": shown},
        check,
    )


def blur_problem(prior: Diffusion, truth: Tensor) -> Problem:
    """Deblurring, without knowing the noise."""
    y = blur(truth) + NOISE * torch.randn_like(truth)

    def check(posterior: Posterior) -> str:
        noise = posterior.expectation("noise")
        found = f"{float(noise.mean):.3f} ± {float(noise.sd):.3f}"
        return f"The noise is found to be {found} (truth: {NOISE})."

    return Problem(
        "blur",
        "A blur, with noise of unknown scale",
        "The image is blurred and noisy, and nobody says how noisy: the scale is inferred as well.",
        unknown_noise(prior),
        y,
        {"truth": truth, "observation": y.clamp(-1, 1)},
        check,
        # Resampled particles share few values of the noise: moves make them differ again.
        {"rejuvenation": Rejuvenation(num_moves=2)},
    )


def wish_problem(prior: Diffusion, label: int, beside: dict[str, Tensor]) -> Problem:
    """Conditional generation; a classifier that did not guide judges it."""
    judge = digit_classifier("judge")

    def check(posterior: Posterior) -> str:
        hit = posterior.expectation(lambda s: (judge(s["x"]).argmax(-1) == label).float())
        evidence = float(posterior.evidence.log_evidence.exp())
        return (
            f"A classifier that did not guide sees a {label} in {float(hit.mean):.0%} of the "
            f"draws. Without the wish, the prior shows one in {evidence:.0%} (that is Z)."
        )

    return Problem(
        "wish",
        f"The wish for a {label}",
        f"No image is observed at all: a classifier, asked what it sees, shall say {label}.",
        class_wish(prior),
        torch.tensor(label),
        beside,
        check,
    )


# --------------------------------------------------------------------------------- the main job


@dataclass(frozen=True)
class Demo:
    """Runs the three problems.

    Args:
        num_particles, num_runs, num_steps: the size of each inference.
        seed: of all random numbers.
        out: the folder of pictures and ArviZ files.
    """

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
            f"A diffusion prior of 8x8 handwritten digits, {self.num_steps} steps. For each of "
            f"{len(problems)} posteriors: {self.num_runs} independent runs of "
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
        prior = digit_prior(self.num_steps)
        if image is None:
            digits = load_heldout_examples().images
            label = 7 if label is None else label
            nine, five = digits[9], digits[5]
            beside = {f"a real {label}": digits[label], "another one": digits[10 + label]}
        else:
            nine = five = read_digit(image)
            if label is None:
                label = int(digit_classifier("guide")(nine).argmax())
            beside = {"your picture": nine}
        return [
            box_problem(prior, nine),
            blur_problem(prior, five),
            wish_problem(prior, label, beside),
        ]

    def solve(self, problem: Problem) -> str:
        """Infers one posterior, tells of it, and returns the verdict."""
        method = TwistedSMC(
            problem.model,
            covariance="scalar",
            proposal="gradient",
            ess_threshold=0.25,  # resampling seldom keeps more ancestors
            num_particles=self.num_particles,
            num_runs=self.num_runs,
            **problem.options,
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


def read_digit(path: Path) -> Tensor:
    """A picture as the prior knows them: grey, 8x8, bright strokes (1) on a dark ground (-1)."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImageError("--image needs Pillow: pip install pillow") from error
    if not path.is_file():
        raise ImageError(f"--image: there is no file {path}; give a PNG or JPEG picture")
    try:
        with Image.open(path) as file:
            grey = ImageOps.exif_transpose(file).convert("L").resize((8, 8), Image.Resampling.BOX)
    except (OSError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"--image: {path} cannot be read as a picture ({error}); give a PNG or JPEG"
        ) from error
    x = torch.tensor(list(grey.tobytes()), dtype=torch.float32).reshape(1, 8, 8)
    low, high = x.min(), x.max()
    if low == high:
        raise ImageError(f"--image: {path} has one grey value only; give a picture of a digit")
    x = 2 * (x - low) / (high - low) - 1
    border = torch.cat([x[0, [0, -1]].flatten(), x[0, 1:-1, [0, -1]].flatten()])
    return -x if border.median() > 0 else x  # ink on paper becomes bright on dark
