"""Handwritten digits of 28x28 pixels (MNIST): the images, a diffusion network, two classifiers.

The images do not come with the package: :func:`load_mnist` reads the four original files and checks
that they are the right ones. Values are scaled to [-1, 1], with shape `1 28 28`. The network and
the classifiers were trained by ``training/mnist.py``, which measures them as well
(``training/mnist.json``); none of them has seen the 10,000 test images.
"""

import gzip
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .datasets import data_roots
from .digits import finish, read_weights
from .networks import UNet

NUM_CLASSES: Final = 10
NUM_VALIDATION: Final = 5000
EVENT_SHAPE: Final = (1, 28, 28)
PARAMETERIZATION: Final = "v"
"""What the network of `mnist_network` predicts: v = alpha_t eps - sigma_t x_0."""

CHECKSUMS: Final = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""SHA-256 of the files as they are after decompression: compressors differ."""


class Mnist(NamedTuple):
    """Images in [-1, 1] and the digits they show."""

    images: Float[Tensor, "sample 1 28 28"]
    labels: Int64[Tensor, " sample"]


def load_mnist(part: str = "train", path: str | os.PathLike[str] | None = None) -> Mnist:
    """One of three parts that share no image.

    Args:
        part: "train" (55,000), "validation" (the other 5,000 of the original training images, the
            same ones always), or "test" (10,000).
        path: a folder with the original files, compressed or not. Without it, they are looked for
            in the folder that the environment variable SMCDIFF_DATA names, then in
            ``../shared/data`` next to the checkout, each time in its subfolder ``mnist`` too.

    Raises:
        FileNotFoundError: no folder has the files; says what to download.
        ValueError: a file is not the original one.
    """
    if part not in ("train", "validation", "test"):
        raise ValueError(f"part must be 'train', 'validation' or 'test', got {part!r}")
    stem = "t10k" if part == "test" else "train"
    pixels = read_original(f"{stem}-images-idx3-ubyte", path)[16:]
    labels = torch.from_numpy(read_original(f"{stem}-labels-idx1-ubyte", path)[8:].astype(np.int64))
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, *EVENT_SHAPE) / 127.5 - 1
    if part != "test":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        kept = order[:NUM_VALIDATION] if part == "validation" else order[NUM_VALIDATION:]
        images, labels = images[kept], labels[kept]
    return Mnist(images, labels)


def read_original(name: str, path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """The bytes of one of the four files, header included, after a check of their SHA-256."""
    file = find_original(name, path)
    content = file.read_bytes()
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): download it again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != CHECKSUMS[name]:
        raise ValueError(
            f"{file} is not the original {name}: expected SHA-256 {CHECKSUMS[name]} (after "
            f"decompression), got {found}; download it again"
        )
    return np.frombuffer(content, dtype=np.uint8)


def find_original(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Where a file lies, compressed or not."""
    folders = list(data_folders(path))
    for folder in folders:
        for file in (folder / f"{name}.gz", folder / name):
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"MNIST's {name}.gz was found in none of {', '.join(map(str, folders))}: download the four "
        f"files {', '.join(f'{each}.gz' for each in CHECKSUMS)} (for example from "
        "https://ossci-datasets.s3.amazonaws.com/mnist/), put them into one folder, and pass that "
        "folder as path or set the environment variable SMCDIFF_DATA to it"
    )


def data_folders(path: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Where to look, best first."""
    for root in data_roots(path):
        yield from (root, root / "mnist", root / "MNIST" / "raw")


class MnistClassifier(nn.Module):
    """Logits of the ten digits, for images with any leading axes.

    Args:
        kind: "guide" is smooth, because its gradients are used; "judge" is the more accurate one.
        width: Number of channels of the first layer; `features` returns four times as many numbers.
    """

    def __init__(self, kind: Literal["guide", "judge"], width: int) -> None:
        super().__init__()
        self.features = guide_layers(width) if kind == "guide" else judge_layers(width)
        self.logits = nn.Linear(4 * width, NUM_CLASSES)

    def forward(self, x: Float[Tensor, "*batch 1 28 28"]) -> Float[Tensor, "*batch 10"]:
        logits = self.logits(self.features(x.reshape(-1, *EVENT_SHAPE)))
        return logits.reshape(*x.shape[:-3], NUM_CLASSES)


def guide_layers(width: int) -> nn.Sequential:
    """Three convolutions, each of which halves the sides, and a perceptron."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2, stride=2),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.SiLU(),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, stride=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 4 * 4 * width, 4 * width),
        nn.SiLU(),
        nn.Dropout(0.2),
    )


def judge_layers(width: int) -> nn.Sequential:
    """Four normalised convolutions and the mean over what is left of the image, 7 by 7."""

    def layer(channels_in: int, channels_out: int, size: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(
            channels_in, channels_out, size, padding=size // 2, stride=stride, bias=False
        )
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *layer(1, width, 5, 2),
        *layer(width, 2 * width, 3, 1),
        *layer(2 * width, 2 * width, 3, 2),
        *layer(2 * width, 4 * width, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mnist_network(device: torch.device | str | None = None) -> UNet:
    """The trained network, class-conditional and unconditional in one; frozen, in evaluation mode.

    It predicts v (:data:`PARAMETERIZATION`) on the linear-beta schedule with 1000 levels, for
    events of shape `1 28 28`.
    """
    settings, tensors = read_weights("mnist", "training/mnist.py")
    network = finish(UNet(**settings), tensors, device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
    return network


def mnist_classifier(
    which: str = "guide", device: torch.device | str | None = None
) -> MnistClassifier:
    """One of two classifiers that were trained apart, frozen and in evaluation mode.

    Guide the sampler with "guide", measure what came out with "judge": a sampler can please the
    classifier that it follows.
    """
    if which not in ("guide", "judge"):
        raise ValueError(f"which must be 'guide' or 'judge', got {which!r}")
    settings, tensors = read_weights(f"mnist_{which}", "training/mnist.py")
    return finish(MnistClassifier(**settings), tensors, device)
