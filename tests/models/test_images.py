"""Folders of images and arrays as training data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smcdiff.models.images import load_array, load_images


def paint(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def test_classes_are_subfolders_in_order(tmp_path: Path) -> None:
    for name, grey in (("b/1.png", 255), ("a/2.png", 0), ("a/deep/1.PNG", 51), ("c/0.bmp", 102)):
        paint(tmp_path / name, np.full((4, 4), grey))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images, labels, names = load_images(tmp_path, 2, channels=1)
    assert names == ("a", "b", "c")
    assert labels.tolist() == [0, 0, 1, 2]
    greys = images[:, 0, 0, 0]
    torch.testing.assert_close(greys, torch.tensor([-1.0, -0.6, 1.0, -0.2]))


def test_image_is_cut_and_resized(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3))
    pixels[:, 2:4, 0] = 255  # red, on the left of the square in the middle
    pixels[:, 4:6, 1] = 255
    pixels[:, [0, 1, 6, 7]] = 77  # outside it
    paint(tmp_path / "x.png", pixels)
    images, labels, names = load_images(tmp_path, 2)
    assert (labels.tolist(), names) == ([0], ("",))
    red, green, blue = images[0]
    assert red.tolist() == [[1, -1], [1, -1]]
    assert green.tolist() == [[-1, 1], [-1, 1]]
    assert blue.tolist() == [[-1, -1], [-1, -1]]


def test_bad_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images in .*one subfolder per class"):
        load_images(tmp_path, 2)
    paint(tmp_path / "a" / "x.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="1 .grey. or 3"):
        load_images(tmp_path, 2, channels=2)
    (tmp_path / "a" / "y.png").write_text("no image")
    with pytest.raises(ValueError, match=r"y\.png is not an image"):
        load_images(tmp_path, 2)
    (tmp_path / "a" / "y.png").rename(tmp_path / "y.png")
    with pytest.raises(ValueError, match="classes a: move them"):
        load_images(tmp_path, 2)


def test_arrays_are_scaled(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.array([[0], [255], [51]], dtype=np.uint8))
    torch.testing.assert_close(load_array(file), torch.tensor([[-1.0], [1.0], [-0.6]]))
    np.save(file, np.array([[0.0, 4.0]]))
    assert load_array(file).tolist() == [[0, 4]]
    assert load_array(file, 0.0, 4.0).tolist() == [[-1, 1]]
    with pytest.raises(ValueError, match="give both"):
        load_array(file, low=0.0)
    for wrong, message in ((np.zeros(3), "samples, "), (np.full((1, 2), np.nan), "not finite")):
        np.save(file, wrong)
        with pytest.raises(ValueError, match=message):
            load_array(file)
