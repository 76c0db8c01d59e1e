"""What `python training/mnist.py --measure` reports about the stored weights, and the picture."""

import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pyro
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional

from smcdiff.models.mnist import (
    NUM_CLASSES,
    Mnist,
    MnistClassifier,
    load_mnist,
    mnist_classifier,
    mnist_network,
)
from smcdiff.models.objectives import Objective, validation_loss
from smcdiff.models.priors import mnist_prior

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from metrics import frechet

NUM_STEPS = 100
SHEETS = (20, 50, 100, 1000)
PER_SHEET = 40


@torch.no_grad()
def sample(count: int, num_steps: int, labels: Tensor | None = None, chunk: int = 125) -> Tensor:
    """Draws from the prior as it ships."""
    prior, drawn = mnist_prior(num_steps), []
    for part in torch.arange(count).split(chunk):
        context = {} if labels is None else {"label": labels[part]}
        with pyro.plate("images", len(part)):
            drawn.append(prior("x", **context))
    return torch.cat(drawn)


@torch.no_grad()
def in_chunks(module: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([module(part) for part in images.split(1000)])


def judged(classifier: MnistClassifier, images: Tensor, labels: Tensor | None = None) -> Any:
    """What a classifier says: how sure it is, of which classes, and how often it is right."""
    probabilities = in_chunks(classifier, images).softmax(-1)
    confidence, found = probabilities.max(-1)
    shares = found.bincount(minlength=NUM_CLASSES) / len(found)
    figures = {
        "mean_confidence": round(confidence.mean().item(), 4),
        "share_below_0.8_confidence": round((confidence < 0.8).double().mean().item(), 4),
        "class_shares": [round(share, 3) for share in shares.tolist()],
    }
    if labels is not None:
        figures["accuracy"] = round((found == labels).double().mean().item(), 4)
    return figures


def nearest(images: Tensor, train: Tensor, chunk: int = 500) -> Tensor:
    """The distance of each image to the nearest training image, per pixel (root mean square)."""
    squares, flat = train.flatten(1).square().sum(1), train.flatten(1)
    rows = []
    for part in images.flatten(1).split(chunk):
        squared = part.square().sum(1, keepdim=True) + squares - 2 * part @ flat.T
        rows.append(squared.min(1).values.clamp(min=0))
    return (torch.cat(rows) / flat.shape[1]).sqrt()


def neighbours(train: Mnist, test: Mnist, images: Tensor) -> dict[str, float]:
    """Copies would lie closer to a training image than fresh real images do."""
    ours = nearest(images.clamp(-1, 1), train.images)
    fresh = nearest(test.images[: len(images)], train.images)
    quantile = fresh.double().quantile(0.01)
    return {
        "median": round(ours.median().item(), 4),
        "median_of_test_images": round(fresh.median().item(), 4),
        "smallest": round(ours.min().item(), 4),
        "smallest_of_test_images": round(fresh.min().item(), 4),
        "share_below_1_percent_quantile_of_test_images": round(
            (ours < quantile).double().mean().item(), 4
        ),
    }


def milliseconds(network: nn.Module, count: int = 250) -> float:
    """CPU time of one call, per 1000 images, in one thread; the best of five."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, level, taken = torch.randn(count, 1, 28, 28), torch.full((count,), 500.0), []
    for _ in range(5):
        start = time.process_time()
        with torch.no_grad():
            network(x, level)
        taken.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return round(1000 * min(taken) * 1000 / count, 1)


def losses(objective: Objective, train: Mnist, test: Mnist) -> dict[str, float]:
    """On 5000 test images, on as many training images, and on those that the tests repeat."""
    network = mnist_network()
    parts = {
        "test": Mnist(*(each[:5000] for each in test)),
        "train": Mnist(*(each[:5000] for each in train)),
        "first_1000_test": Mnist(*(each[:1000] for each in test)),
    }
    found = {}
    for name, (images, labels) in parts.items():
        found[f"{name}_loss"] = validation_loss(network, images, labels, objective, num_draws=1)
        found[f"{name}_loss_without_label"] = validation_loss(
            network, images, None, objective, num_draws=1
        )
    return {name: round(value, 5) for name, value in found.items()}


def measure(objective: Objective, data: Path | None, count: int, picture: Path) -> dict[str, Any]:
    """All figures; draws the picture."""
    train, test = load_mnist("train", data), load_mnist("test", data)
    judge, guide, network = mnist_classifier("judge"), mnist_classifier("guide"), mnist_network()
    pyro.set_rng_seed(1)
    labels = torch.arange(count // 2) % NUM_CLASSES
    free, conditional = sample(count, NUM_STEPS), sample(len(labels), NUM_STEPS, labels)
    sheets = {f"{steps} steps": sample(PER_SHEET, steps) for steps in SHEETS}
    draw({"test images": test.images, **sheets, "by label, 100 steps": conditional}, picture)
    sets = {
        "training_images": train.images[:count],
        "unconditional": free,
        "conditional": conditional,
    }
    of_test = in_chunks(judge.features, test.images)
    return {
        "parameters": sum(value.numel() for value in network.parameters()),
        "forward_ms_per_1000_one_thread": milliseconds(network),
        "samples_unconditional": count,
        "samples_conditional": len(labels),
        "steps": NUM_STEPS,
        **losses(objective, train, test),
        "guide_on_test": judged(guide, *test),
        "judge_on_test": judged(judge, *test),
        "judge_on_unconditional": judged(judge, free),
        "judge_on_conditional": judged(judge, conditional, labels),
        "frechet_distance_to_test_images": {
            name: round(frechet(in_chunks(judge.features, images), of_test), 3)
            for name, images in sets.items()
        },
        "nearest_neighbour_unconditional": neighbours(train, test, free),
        "nearest_neighbour_conditional": neighbours(train, test, conditional),
    }


def draw(sets: dict[str, Tensor], picture: Path) -> None:
    """Sheets of 4 by 10 images."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 4.6))
    for axis, (title, images) in zip(axes.flat, sets.items(), strict=True):
        tiles = functional.pad(images[:PER_SHEET, 0].clamp(-1, 1), (1, 1, 1, 1), value=0.0)
        sheet = tiles.reshape(4, 10, 30, 30).permute(0, 2, 1, 3).reshape(120, 300)
        axis.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    plt.close(figure)
