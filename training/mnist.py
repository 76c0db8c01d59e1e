"""Trains what ships as `smcdiff/models/weights/mnist*.safetensors`, measures it and draws it.

    python training/mnist.py --minutes 60   # the network, in an hour of whatever machine this is
    python training/mnist.py --resume       # the same, continued from its last checkpoint
    python training/mnist.py --further      # a second training, from the weights that ship
    python training/mnist.py --classifiers  # only the two classifiers: some minutes
    python training/mnist.py --measure      # only the figures and the picture, from stored weights

On several processes: `torchrun --nproc-per-node 2 training/mnist.py`; on a GPU: `--device cuda`.

Needs the images (see `smcdiff.models.mnist.load_mnist`). Writes `models/weights/*.safetensors`,
`training/mnist.json`, `training/mnist.png` and the curve; checkpoints go to `--checkpoints`.
Nothing is trained on the 10,000 test images. The weights that ship took two trainings (curve:
`training/mnist_curve.json`): 67 minutes on two busy cores, 12,323 updates, with `label_dropout` 0.3
in the first 33 minutes; and `--further --minutes 75 --threads 1`, another 10,829.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mnist_figures import measure
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional

from smcdiff.models.mnist import (
    NUM_CLASSES,
    PARAMETERIZATION,
    Mnist,
    MnistClassifier,
    load_mnist,
    mnist_network,
)
from smcdiff.models.networks import UNet
from smcdiff.models.objectives import Objective
from smcdiff.models.training import DenoisingTrainer, TrainingConfig

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "models" / "weights"
NETWORK: dict[str, Any] = {
    "channels": 1,
    "widths": [32, 96],
    "num_classes": NUM_CLASSES,
    "time_features": 64,
    "patch": 2,
    "heads": 4,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "guide": {"kind": "guide", "width": 16},
    "judge": {"kind": "judge", "width": 24},
}
OBJECTIVE = Objective(PARAMETERIZATION)
CURVE = HERE / "mnist_curve.json"
CLASSIFIER_STEPS = {"guide": 3000, "judge": 4000}


def config(minutes: float, further: bool = False) -> TrainingConfig:
    """The settings of the network's training; its length follows the clock."""
    return TrainingConfig(
        steps=1_000_000,
        batch_size=64,
        learning_rate=1.5e-3,
        weight_decay=0.01,
        label_dropout=0.5,
        ema_decay=0.9995 if further else 0.998,
        seed=int(further),
        minutes=minutes,
        validate_every=400,
    )


def train_network(data: Mnist, heldout: Mnist, options: argparse.Namespace) -> None:
    """Trains and stores the diffusion network, with a checkpoint every three minutes."""
    torch.manual_seed(0)
    network = mnist_network().requires_grad_(True) if options.further else UNet(**NETWORK)
    network = network.to(data.images.device, memory_format=torch.channels_last)
    some = heldout.images[:1000], heldout.labels[:1000]
    settings = config(options.minutes, options.further)
    trainer = DenoisingTrainer(network, *data, settings, objective=OBJECTIVE, validation=some)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoints / "network.safetensors"
    if options.resume:
        trainer.load(checkpoint)

    def report(step: int, loss: float) -> None:
        if step % trainer.config.validate_every == 0 and trainer.rank == 0:
            print(json.dumps(trainer.history[-1]), flush=True)

    trainer.run(report, checkpoint=checkpoint, checkpoint_minutes=3.0)
    if trainer.rank > 0:
        return
    curve = json.loads(CURVE.read_text()) if options.further else []
    before = {key: curve[-1][key] for key in ("step", "minutes")} if curve else {}
    for row in trainer.history:
        curve.append({key: value + before.get(key, 0) for key, value in row.items()})
    CURVE.write_text(json.dumps(curve, indent=2) + "\n")
    write("mnist", NETWORK, trainer.ema.cpu())


def write(name: str, settings: dict[str, Any], module: nn.Module) -> None:
    """Stores a module in half precision, what builds it as JSON in the header."""
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    file = WEIGHTS / f"{name}.safetensors"
    save_file(tensors, file, {"settings": json.dumps(settings)})
    file.chmod(0o644)  # safetensors alone makes it private


def warp(images: Tensor) -> Tensor:
    """Small random rotations, shears, scalings and shifts."""
    count = len(images)
    angle, shear, wide, high, right, down = torch.randn(6, count) * 0.08
    rows = [(1 + wide) * angle.cos(), shear - angle.sin(), right]
    rows += [angle.sin(), (1 + high) * angle.cos(), down]
    grid = functional.affine_grid(
        torch.stack(rows, dim=1).reshape(-1, 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def add_noise(images: Tensor) -> Tensor:
    """Noise of a random scale up to 1: guidance asks about estimates, not clean digits only."""
    return images + torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def train_classifier(
    name: str, data: Mnist, heldout: Mnist, augment: Callable[[Tensor], Tensor], seed: int
) -> None:
    """Trains and stores one classifier."""
    torch.manual_seed(seed)
    classifier, steps = MnistClassifier(**CLASSIFIERS[name]), CLASSIFIER_STEPS[name]
    classifier = classifier.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        chosen = torch.randint(len(data.labels), (128,))
        logits = classifier(augment(data.images[chosen]))
        loss = functional.cross_entropy(logits, data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(name, step + 1, accuracy(classifier, heldout), flush=True)
    write(f"mnist_{name}", CLASSIFIERS[name], classifier)


@torch.no_grad()
def accuracy(classifier: MnistClassifier, data: Mnist) -> float:
    """The share that is recognised."""
    before = classifier.training
    logits = torch.cat([classifier.eval()(images) for images in data.images.split(1000)])
    classifier.train(before)
    return (logits.argmax(-1) == data.labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="the folder with MNIST's files")
    parser.add_argument("--minutes", type=float, default=60.0, help="for the network's training")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    parser.add_argument("--further", action="store_true", help="start with the weights that ship")
    parser.add_argument("--checkpoints", type=Path, default=HERE.parent / "results" / "mnist")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="for the network's training")
    parser.add_argument("--classifiers", action="store_true", help="train the classifiers only")
    parser.add_argument("--measure", action="store_true", help="do not train")
    parser.add_argument("--samples", type=int, default=2000, help="to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        figures = measure(OBJECTIVE, options.data, options.samples, HERE / "mnist.png")
        figures["bytes"] = {file.name: file.stat().st_size for file in WEIGHTS.glob("mnist*")}
        (HERE / "mnist.json").write_text(json.dumps(figures, indent=2) + "\n")
        return print(json.dumps(figures, indent=2))
    train, heldout = (load_mnist(part, options.data) for part in ("train", "validation"))
    if options.classifiers:
        train_classifier("judge", train, heldout, warp, seed=12)
        train_classifier("guide", train, heldout, lambda x: add_noise(warp(x)), seed=11)
    else:
        if "RANK" in os.environ:  # set by torchrun
            distributed.init_process_group()
            if options.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        train, heldout = (
            Mnist(*(each.to(options.device) for each in part)) for part in (train, heldout)
        )
        train_network(train, heldout, options)


if __name__ == "__main__":
    main()
