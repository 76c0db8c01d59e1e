"""Damaged digits and wishes for digits: the Pyro programs of the demo, and their simulated data.

Each problem is a program over the same prior (:func:`missing_box`, :func:`unknown_noise`,
:func:`super_resolution`, :func:`class_wish`) and what it is given. `DATASETS` says which priors,
classifiers and images there are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from smcdiff.inference import Rejuvenation
from smcdiff.models import Diffusion, digit_prior
from smcdiff.models.digits import digit_classifier, load_heldout_examples
from smcdiff.models.mnist import load_mnist, mnist_classifier
from smcdiff.models.priors import mnist_prior

from .posterior import Posterior
from .process import batched

Model = Callable[[Tensor], None]


@dataclass(frozen=True)
class Dataset:
    """Images of digits, their prior and their classifiers.

    Attributes:
        title: what a person calls them.
        side: pixels.
        noise: the standard deviation of the observations' noise; grey values span [-1, 1].
        blur: the width of the blur, in pixels.
        reduction: by which factor super-resolution enlarges (0: that problem is left out).
        size: particles, runs and steps that serve it well.
        prior: makes it, for a number of steps.
        classifier: ``"guide"`` or ``"judge"``.
        examples: real images that nothing was trained on, of the digits 0 .. 9, 0 .. 9.
    """

    title: str
    side: int
    noise: float
    blur: float
    reduction: int
    size: tuple[int, int, int]
    prior: Callable[[int], Diffusion]
    classifier: Callable[[str], nn.Module]
    examples: Callable[[], Tensor]

    @property
    def seen(self) -> Tensor:
        """All pixels but a box in the middle."""
        seen = torch.ones(1, self.side, self.side, dtype=torch.bool)
        low, high = self.side // 4, self.side - self.side // 4
        seen[:, low:high, low:high] = False
        return seen


def mnist_examples() -> Tensor:
    """Two test images of each digit."""
    images, labels = load_mnist("test")
    chosen = torch.stack([torch.nonzero(labels == digit)[:2, 0] for digit in range(10)], 1)
    return images[chosen.flatten()]


DATASETS: Final = {
    "digits": Dataset(
        title="8x8 handwritten digits",
        side=8,
        noise=0.3,
        blur=1.0,
        reduction=0,
        size=(512, 4, 50),
        prior=digit_prior,
        classifier=digit_classifier,
        examples=lambda: load_heldout_examples().images,
    ),
    "mnist": Dataset(
        title="28x28 handwritten digits (MNIST)",
        side=28,
        noise=0.3,
        blur=1.5,
        reduction=4,
        size=(128, 4, 25),
        prior=mnist_prior,
        classifier=mnist_classifier,
        examples=mnist_examples,
    ),
}


# ------------------------------------------------------------------------------- the posteriors


def missing_box(prior: Diffusion, seen: Tensor, noise: float) -> Model:
    """Some pixels are seen, with noise."""

    def model(y: Tensor) -> None:
        x = prior("x")
        pyro.sample("y", dist.Normal(x[..., seen], noise).to_event(1), obs=y)

    return model


def unknown_noise(prior: Diffusion, width: float) -> Model:
    """A blurred image; how much noise lies on it is a latent like any other."""

    def model(y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(0.5))
        x = prior("x")
        law = dist.Normal(blur(x, width), noise[..., None, None, None])
        pyro.sample("y", law.to_event(3), obs=y)

    return model


def super_resolution(prior: Diffusion, factor: int, noise: float) -> Model:
    """Every pixel is the mean of many."""

    def model(y: Tensor) -> None:
        x = prior("x")
        pyro.sample("y", dist.Normal(reduce(x, factor), noise).to_event(3), obs=y)

    return model


def class_wish(prior: Diffusion, classifier: nn.Module) -> Model:
    """Any image that a classifier takes for the wanted digit."""

    def model(label: Tensor) -> None:
        x = prior("x")
        pyro.sample("label", dist.Categorical(logits=classifier(x)), obs=label)

    return model


def blur(x: Tensor, width: float) -> Tensor:
    """A Gaussian blur, the same at the borders."""
    at = torch.arange(float(x.shape[-1]))
    kernel = torch.exp(-0.5 * ((at[:, None] - at) / width).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x)
    return kernel @ x @ kernel.T


def reduce(x: Tensor, factor: int) -> Tensor:
    """The means of squares of pixels."""
    return batched(lambda images: avg_pool2d(images, factor), 3)(x)


# --------------------------------------------------------------------------------- the problems


@dataclass(frozen=True)
class Problem:
    """A posterior and how to tell of it.

    Attributes:
        name: of its files.
        title, story: what a person reads before it runs.
        model, data: the program and what it is given.
        options: of `TwistedSMC`, where the usual ones of the demo do not serve.
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


def box_problem(dataset: Dataset, prior: Diffusion, truth: Tensor) -> Problem:
    """Inpainting."""
    seen, noise = dataset.seen, dataset.noise
    y = (truth + noise * torch.randn_like(truth))[seen]
    shown = torch.full_like(truth, torch.nan)
    shown[seen] = y.clamp(-1, 1)
    gone = int((~seen).sum())
    return Problem(
        "box",
        "A missing box",
        f"The {gone} pixels in the middle are gone; noise of scale {noise} lies on the other "
        f"{seen.numel() - gone}.",
        missing_box(prior, seen, noise),
        y,
        {"truth": truth, "observation": shown},
        lambda posterior: f"Inside the box {_miss(posterior, truth, ~seen)}",
    )


def blur_problem(dataset: Dataset, prior: Diffusion, truth: Tensor) -> Problem:
    """Deblurring, without knowing the noise."""
    y = blur(truth, dataset.blur) + dataset.noise * torch.randn_like(truth)

    def check(posterior: Posterior) -> str:
        noise = posterior.expectation("noise")
        found = f"{float(noise.mean):.3f} ± {float(noise.sd):.3f}"
        return f"The noise is found to be {found} (truth: {dataset.noise})."

    return Problem(
        "blur",
        "A blur, with noise of unknown scale",
        "The image is blurred and noisy, and nobody says how noisy: the scale is inferred as well.",
        unknown_noise(prior, dataset.blur),
        y,
        {"truth": truth, "observation": y.clamp(-1, 1)},
        check,
        # Resampled particles share few values of the noise: moves make them differ again.
        {"rejuvenation": Rejuvenation(num_moves=2)},
    )


def enlarge_problem(dataset: Dataset, prior: Diffusion, truth: Tensor) -> Problem:
    """Super-resolution."""
    factor, small = dataset.reduction, reduce(truth, dataset.reduction)
    y = small + dataset.noise * torch.randn_like(small)
    shown = interpolate(y[None].clamp(-1, 1), scale_factor=float(factor))[0]
    return Problem(
        "enlarge",
        f"Super-resolution by {factor}",
        f"Only {y.shape[-1]} x {y.shape[-1]} pixels are seen, each the mean of {factor**2}, with "
        f"noise of scale {dataset.noise}.",
        super_resolution(prior, factor, dataset.noise),
        y,
        {"truth": truth, "observation": shown},
        lambda posterior: _miss(posterior, truth, torch.ones_like(dataset.seen)).capitalize(),
        # On MNIST log Z is -33 +- 1 so, and -50 +- 3 with "scalar"; more observations cost more.
        {"covariance": "diagonal"},
    )


def wish_problem(
    dataset: Dataset, prior: Diffusion, label: int, beside: dict[str, Tensor]
) -> Problem:
    """Conditional generation; a classifier that did not guide judges it."""
    judge = dataset.classifier("judge")

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
        class_wish(prior, dataset.classifier("guide")),
        torch.tensor(label),
        beside,
        check,
    )


def _miss(posterior: Posterior, truth: Tensor, where: Tensor) -> str:
    found = posterior.expectation("x")
    error = (found.mean - truth)[where].square().mean().sqrt()
    sd = found.sd[where].square().mean().sqrt()
    return f"the posterior mean is off by {error:.2f} (rms); it says {sd:.2f}."
