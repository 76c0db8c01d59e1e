"""Images and arrays of one's own as training data."""

import os
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

ENDINGS: Final = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MODES: Final = {1: "L", 3: "RGB"}


class Images(NamedTuple):
    """Images in [-1, 1], the class of each one, and the names of the classes."""

    images: Float[Tensor, "sample channels height width"]
    labels: Int64[Tensor, " sample"]
    names: tuple[str, ...]


def load_images(folder: str | os.PathLike[str], size: int, channels: int = 3) -> Images:
    """All images in a folder; those in its subfolders belong to classes of these names.

    Each is cut to the largest square in its middle and resized to `size` by `size`. They are
    ordered by class, then by name. Without subfolders, all are of class 0.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: images lie both in the folder and in subfolders, or one cannot be read.
    """
    root = Path(folder)
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (colours), got {channels}")
    found = sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDINGS)
    classes = [file.relative_to(root).parts[0] if file.parent != root else "" for file in found]
    names = tuple(sorted(set(classes)))
    if not found:
        raise FileNotFoundError(
            f"no images in {root}: expected files that end in {', '.join(sorted(ENDINGS))}, in the "
            "folder itself or in one subfolder per class"
        )
    if "" in names and len(names) > 1:
        raise ValueError(
            f"{root} has images of its own beside those of the classes {', '.join(names[1:])}: "
            "move them into a subfolder"
        )
    labels = torch.tensor([names.index(each) for each in classes])
    order = labels.argsort(stable=True)
    images = torch.stack([read_image(found[index], size, channels) for index in order.tolist()])
    return Images(images, labels[order], names)


def read_image(file: Path, size: int, channels: int) -> Float[Tensor, "channels size size"]:
    """One image, square and in [-1, 1]."""
    try:
        with Image.open(file) as opened:
            image = opened.convert(MODES[channels])
    except OSError as error:
        raise ValueError(f"{file} is not an image that can be read: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX, box), dtype=np.float32)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1) / 127.5 - 1


def load_array(
    file: str | os.PathLike[str], low: float | None = None, high: float | None = None
) -> Float[Tensor, "sample *event"]:
    """Samples from a NumPy file (.npy), in float32, scaled so that [low, high] becomes [-1, 1].

    Args:
        file: One sample per row of the first axis.
        low, high: The range of the values (None: 0 and 255 for bytes; others stay as they are).

    Raises:
        ValueError: the array has no samples, values that are no numbers, or half a range.
    """
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim < 2 or len(array) == 0:
        raise ValueError(
            f"{file} must hold one array with shape (samples, ...), saved with numpy.save, "
            f"got {getattr(array, 'shape', type(array).__name__)}"
        )
    if (low is None) != (high is None):
        raise ValueError(f"give both low and high, or neither: got low={low}, high={high}")
    if low is None and array.dtype == np.uint8:
        low, high = 0.0, 255.0
    values = torch.from_numpy(array.astype(np.float32))
    if low is not None and high is not None:
        values = 2 * (values - low) / (high - low) - 1
    if not bool(values.isfinite().all()):
        raise ValueError(f"{file} holds values that are not finite, or low = high = {low}")
    return values
