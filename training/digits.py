"""Trains what ships as `smcdiff/models/weights/digits*.safetensors`, measures it and draws it.

    python training/digits.py            # everything: 10 to 20 minutes on two cores
    python training/digits.py --measure  # only the figures and the picture, from the stored weights

Needs `smcdiff[digits]`. Writes `models/weights/*.safetensors`, `training/digits.json` and
`training/digits.png`. Nothing is trained on the 397 held-out images; settings were chosen by their
loss.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from smcdiff.models.digits import (
    NUM_CLASSES,
    PARAMETERIZATION,
    DigitClassifier,
    Digits,
    DigitsSplit,
    digit_classifier,
    digit_network,
    load_digits_split,
)
from smcdiff.models.networks import ResidualMLP
from smcdiff.models.objectives import Objective, validation_loss
from smcdiff.models.training import DenoisingTrainer, TrainingConfig

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "models" / "weights"
NETWORK: dict[str, Any] = {
    "features": 64,
    "width": 384,
    "depth": 3,
    "num_classes": NUM_CLASSES,
    "time_features": 32,
}
CONFIG = TrainingConfig(
    steps=16_000,
    learning_rate=2e-3,
    weight_decay=0.01,
    label_dropout=0.3,
    ema_decay=0.9995,
)
OBJECTIVE = Objective(PARAMETERIZATION)
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "guide": {"kind": "guide", "width": 128},
    "judge": {"kind": "judge", "width": 24},
}
NUM_SAMPLES = 1000
SAMPLING_STEPS = 200


def write(name: str, settings: dict[str, Any], module: nn.Module) -> None:
    """Stores a module's parameters in half precision, what builds it as JSON in the header."""
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    store(name, settings, tensors)


def store(name: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a file that everybody may read (safetensors alone makes it private)."""
    file = WEIGHTS / f"{name}.safetensors"
    save_file(tensors, file, {"settings": json.dumps(settings)})
    file.chmod(0o644)


def write_examples(heldout: Digits) -> None:
    """Stores two held-out images of each digit, in the order 0 .. 9, 0 .. 9."""
    first = [torch.nonzero(heldout.labels == digit)[:2, 0] for digit in range(NUM_CLASSES)]
    chosen = torch.stack(first, dim=1).flatten()
    tensors = {"images": heldout.images[chosen].half(), "labels": heldout.labels[chosen]}
    store("digits_heldout", {}, tensors)


def train_network(split: DigitsSplit) -> float:
    """Trains and stores the diffusion network; returns the minutes it took."""
    torch.manual_seed(CONFIG.seed)
    trainer = DenoisingTrainer(
        ResidualMLP(**NETWORK), *split.train, CONFIG, slightly_warp, OBJECTIVE
    )
    start = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if step % 1000 == 0:
            heldout = validation_loss(trainer.ema, *split.heldout, num_draws=10)
            train = validation_loss(trainer.ema, *split.train, num_draws=3)
            minutes = (time.perf_counter() - start) / 60
            print(
                f"step {step}: held-out {heldout:.4f}, train {train:.4f}, {minutes:.1f} min",
                flush=True,
            )

    trainer.run(report)
    write("digits", NETWORK, trainer.ema)
    return (time.perf_counter() - start) / 60


def warp(images: Tensor, amount: float = 1.0) -> Tensor:
    """Small random rotations, shears, scalings and shifts."""
    count = len(images)
    angle, shear, wide, high, right, down = (
        amount
        * torch.randn(6, count)
        * torch.tensor([[0.1], [0.1], [0.06], [0.04], [0.06], [0.05]])
    )
    rows = [(1 + wide) * angle.cos(), shear - angle.sin(), right]
    rows += [angle.sin(), (1 + high) * angle.cos(), down]
    grid = functional.affine_grid(
        torch.stack(rows, dim=1).reshape(-1, 2, 3), list(images.shape), align_corners=False
    )
    moved = functional.grid_sample(images + 1, grid, mode="bicubic", align_corners=False)
    return moved.clamp(0, 2) - 1


def slightly_warp(images: Tensor) -> Tensor:
    """Half as much, and for 70 % of the images only: warped images are a little blurred."""
    warped = torch.rand(len(images), 1, 1, 1) < 0.7
    return torch.where(warped, warp(images, 0.5), images)


def add_noise(images: Tensor) -> Tensor:
    """Noise of a random scale up to 1: guidance asks about estimates, not clean digits only."""
    return images + torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def train_classifier(
    name: str, data: Digits, augment: Callable[[Tensor], Tensor], seed: int
) -> None:
    """Trains and stores one classifier."""
    torch.manual_seed(seed)
    classifier = DigitClassifier(**CLASSIFIERS[name])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    steps = 3000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (128,))
        logits = classifier(augment(data.images[chosen]))
        loss = functional.cross_entropy(logits, data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    write(f"digits_{name}", CLASSIFIERS[name], classifier)


@torch.no_grad()
def sample(network: nn.Module, count: int, label: Tensor | None = None) -> Tensor:
    """Plain ancestral sampling on an even grid, with the smaller of the two usual variances."""
    times = torch.linspace(OBJECTIVE.num_levels - 1, 0, SAMPLING_STEPS).round().long()
    x = torch.randn(count, 1, 8, 8)
    for now, after in zip(times, [*times[1:], None], strict=True):
        alpha, sigma = OBJECTIVE.levels(now.expand(1), x)
        velocity = network(x, now.float().expand(count), label)
        x0: Tensor = (alpha * x - sigma * velocity).clamp(-1, 1)
        if after is None:
            return x0
        alpha2, sigma2 = OBJECTIVE.levels(after.expand(1), x)
        eps = (x - alpha * x0) / sigma
        noise = sigma2 / sigma * (1 - (alpha / alpha2) ** 2).sqrt()
        x = alpha2 * x0 + (sigma2**2 - noise**2).sqrt() * eps + noise * torch.randn_like(x)
    raise AssertionError("unreachable")


@torch.no_grad()
def judged(judge: nn.Module, images: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    """What the judge says of some images: confidence, classes and, with labels, accuracy."""
    confidence, digit = judge(images).softmax(-1).max(-1)
    shares = torch.bincount(digit, minlength=NUM_CLASSES) / len(digit)
    said: dict[str, Any] = {
        "mean_confidence": round(confidence.mean().item(), 4),
        "share_below_0.8_confidence": round((confidence < 0.8).float().mean().item(), 4),
        "class_shares": [round(share, 3) for share in shares.tolist()],
    }
    if labels is not None:
        said["accuracy"] = round((digit == labels).float().mean().item(), 4)
    return said


def nearest(images: Tensor, references: Tensor) -> Tensor:
    """The root-mean-square distance per pixel to the nearest reference."""
    return torch.cdist(images.flatten(1), references.flatten(1)).min(1).values / 8


def distances(split: DigitsSplit, generated: Tensor) -> dict[str, float]:
    """Nearest-neighbour distances, against as many training images as there are held-out ones.

    Copies would be nearer to training than to held-out images, and nearer than held-out images are
    to training ones.
    """
    train, heldout = split.train.images, split.heldout.images
    fewer = train[torch.randperm(len(train))[: len(heldout)]]
    return {
        "generated_to_train": round(nearest(generated, fewer).mean().item(), 4),
        "generated_to_heldout": round(nearest(generated, heldout).mean().item(), 4),
        "heldout_to_train": round(nearest(heldout, fewer).mean().item(), 4),
        "smallest_generated_to_all_train": round(nearest(generated, train).min().item(), 4),
        "smallest_heldout_to_all_train": round(nearest(heldout, train).min().item(), 4),
    }


def milliseconds(network: nn.Module, threads: int = 1, repeats: int = 50) -> float:
    """The processor time of the fastest of some forward passes for 1000 images."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, level, taken = torch.randn(1000, 1, 8, 8), torch.full((1000,), 500.0), []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.process_time()
            network(x, level)
            taken.append(time.process_time() - start)
    torch.set_num_threads(before)
    return round(1000 * min(taken), 1)


def measure(split: DigitsSplit) -> dict[str, Any]:
    """All figures, of the weights as stored; draws the picture."""
    network, judge, guide = digit_network(), digit_classifier("judge"), digit_classifier("guide")
    torch.manual_seed(1)
    free = sample(network, NUM_SAMPLES)
    labels = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    conditional = sample(network, NUM_SAMPLES, labels)
    draw(split.heldout.images, free, conditional)
    files = sorted(WEIGHTS.glob("*.safetensors"))
    return {
        "parameters": sum(value.numel() for value in network.parameters()),
        "bytes": {file.name: file.stat().st_size for file in files},
        "forward_ms_per_1000_one_thread": milliseconds(network),
        "heldout_loss": round(validation_loss(network, *split.heldout), 5),
        "train_loss": round(validation_loss(network, *split.train, num_draws=15), 5),
        "heldout_loss_without_label": round(validation_loss(network, split.heldout.images), 5),
        "train_loss_without_label": round(
            validation_loss(network, split.train.images, num_draws=15), 5
        ),
        "guide_on_heldout": judged(guide, *split.heldout),
        "judge_on_heldout": judged(judge, *split.heldout),
        "judge_on_unconditional": judged(judge, free),
        "judge_on_conditional": judged(judge, conditional, labels),
        "nearest_neighbour_unconditional": distances(split, free),
        "nearest_neighbour_conditional": distances(split, conditional),
    }


def draw(real: Tensor, free: Tensor, conditional: Tensor) -> None:
    """Sheets of 100 real, unconditional and class-conditional images, side by side."""
    picked = real[torch.randperm(len(real))[:100]]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.4))
    titles = ("real, held out", "generated", "generated, columns by label")
    for axis, images, title in zip(axes, (picked, free, conditional), titles, strict=True):
        padded = functional.pad(images[:100, 0], (1, 1, 1, 1), value=0.0)
        sheet = padded.reshape(10, 10, 10, 10).permute(0, 2, 1, 3).reshape(100, 100)
        axis.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(HERE / "digits.png", dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="do not train")
    parser.add_argument("--classifiers", action="store_true", help="train the classifiers only")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain little from a second one
    split, figures_file = load_digits_split(), HERE / "digits.json"
    if not options.measure:
        WEIGHTS.mkdir(exist_ok=True)
        write_examples(split.heldout)
        train_classifier("guide", split.train, lambda x: add_noise(warp(x)), seed=11)
        train_classifier("judge", split.train, warp, seed=12)
        if not options.classifiers:
            print(f"network trained in {train_network(split):.1f} minutes")
    figures = measure(split)
    figures_file.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
