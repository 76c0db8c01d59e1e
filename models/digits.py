"""Real 8x8 handwritten digits, a small diffusion network trained on them, and two classifiers.

The images are scikit-learn's `load_digits` (1797 images, grey values 0 .. 16), scaled to [-1, 1],
with shape `1 8 8`. A fixed split, stratified by class, sets 397 of them aside; nothing that ships
here was trained on those. Twenty of them come with the package, so that examples work without
scikit-learn. Everything was made by ``training/digits.py``, which measures it as well
(``training/digits.json``).
"""

import json
from importlib.resources import as_file, files
from typing import Any, Final, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .networks import ResidualMLP

M = TypeVar("M", bound=nn.Module)

NUM_CLASSES: Final = 10
NUM_HELDOUT: Final = 397
EVENT_SHAPE: Final = (1, 8, 8)
PARAMETERIZATION: Final = "v"
"""What the network of `digit_network` predicts: v = alpha_t eps - sigma_t x_0."""


class Digits(NamedTuple):
    """Images in [-1, 1] and the digits they show."""

    images: Float[Tensor, "sample 1 8 8"]
    labels: Int64[Tensor, " sample"]


class DigitsSplit(NamedTuple):
    """Training images, and held-out ones that nothing was trained on."""

    train: Digits
    heldout: Digits


def load_digits_split() -> DigitsSplit:
    """All 1797 images: 1400 for training, 397 held out (needs scikit-learn).

    The images are shuffled (seed 0), sorted by class, and every 1797/397-th is held
    out: the same ones always.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the full set of digits is read from scikit-learn, which is not installed: "
            "pip install 'smcdiff[digits]', or use load_heldout_examples(), which needs nothing"
        ) from error
    data, target = load_digits(return_X_y=True)
    images = torch.as_tensor(data, dtype=torch.float32).reshape(-1, *EVENT_SHAPE) / 8 - 1
    labels = torch.as_tensor(target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[(torch.arange(NUM_HELDOUT) * len(labels) + len(labels) // 2) // NUM_HELDOUT] = True
    train, heldout = order[~held], order[held]
    return DigitsSplit(
        Digits(images[train], labels[train]), Digits(images[heldout], labels[heldout])
    )


def load_heldout_examples() -> Digits:
    """Twenty held-out images in the order 0 .. 9, 0 .. 9; scikit-learn is not needed."""
    _, tensors = read_weights("digits_heldout")
    return Digits(tensors["images"].float(), tensors["labels"])


class DigitClassifier(nn.Module):
    """Logits of the ten digits, for images with any leading axes.

    Args:
        kind: "guide" is a smooth perceptron, "judge" a convolutional network.
        width: Number of hidden units or channels.
    """

    def __init__(self, kind: Literal["guide", "judge"], width: int) -> None:
        super().__init__()
        self.layers = guide_layers(width) if kind == "guide" else judge_layers(width)

    def forward(self, x: Float[Tensor, "*batch 1 8 8"]) -> Float[Tensor, "*batch 10"]:
        logits = self.layers(x.reshape(-1, *EVENT_SHAPE))
        return logits.reshape(*x.shape[:-3], NUM_CLASSES)


def guide_layers(width: int) -> nn.Sequential:
    """A perceptron with two hidden layers; smooth, because its gradients are used."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.SiLU(),
        nn.Dropout(0.2),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Dropout(0.2),
        nn.Linear(width, NUM_CLASSES),
    )


def judge_layers(width: int) -> nn.Sequential:
    """Three convolutions, the last two at half size."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * width, NUM_CLASSES),
    )


def digit_network(device: torch.device | str | None = None) -> ResidualMLP:
    """The trained network, class-conditional and unconditional in one; frozen, in evaluation mode.

    It predicts v (:data:`PARAMETERIZATION`) on the linear-beta schedule with 1000 levels, for
    events of shape `1 8 8`.
    """
    settings, tensors = read_weights("digits")
    network = ResidualMLP(**settings)
    return finish(network, tensors, device)


def digit_classifier(
    which: str = "guide", device: torch.device | str | None = None
) -> DigitClassifier:
    """One of two classifiers that were trained apart, frozen and in evaluation mode.

    Guide the sampler with "guide", measure what came out with "judge": a sampler can please the
    classifier that it follows.
    """
    if which not in ("guide", "judge"):
        raise ValueError(f"which must be 'guide' or 'judge', got {which!r}")
    settings, tensors = read_weights(f"digits_{which}")
    return finish(DigitClassifier(**settings), tensors, device)


def finish(module: M, tensors: dict[str, Tensor], device: torch.device | str | None) -> M:
    """Fills a module with stored (half-precision) weights and freezes it."""
    module.load_state_dict(tensors)
    return module.to(device).eval().requires_grad_(False)


def read_weights(
    name: str, script: str = "training/digits.py"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings (JSON in the header) and the tensors of a file that ships with the package."""
    resource = files(__package__) / "weights" / f"{name}.safetensors"
    again = f"reinstall smcdiff, or write the file again with `python {script}`"
    if not resource.is_file():
        raise FileNotFoundError(f"{resource} is missing from this installation: {again}")
    try:
        with as_file(resource) as path, safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])
            return settings, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{resource} is damaged ({error}): {again}") from error
