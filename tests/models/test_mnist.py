"""MNIST: the files are found and checked, the parts share no image, what ships loads and works."""

import gzip
import os
from pathlib import Path

import pytest
import torch

from smcdiff.models import mnist
from smcdiff.models.mnist import MnistClassifier, find_original, load_mnist, read_original

NAMES = list(mnist.CHECKSUMS)


@pytest.fixture(scope="module")
def test_images() -> mnist.Mnist:
    try:
        return load_mnist("test")
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_test_part_is_the_original(test_images: mnist.Mnist) -> None:
    assert test_images.images.shape == (10_000, 1, 28, 28)
    assert (test_images.images.min(), test_images.images.max()) == (-1, 1)
    assert test_images.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert test_images.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_train_and_validation_share_nothing(test_images: mnist.Mnist) -> None:
    train, validation = load_mnist("train"), load_mnist("validation")
    assert (len(train.labels), len(validation.labels)) == (55_000, 5_000)
    both = torch.cat([train.images, validation.images])
    assert len({image.tobytes() for image in both.numpy()}) == 60_000  # all are different
    assert torch.equal(load_mnist("validation").images, validation.images)


def test_missing_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"download the four files train-images.*set the"):
        load_mnist("train", tmp_path)
    monkeypatch.setenv("SMCDIFF_DATA", str(tmp_path))
    monkeypatch.setattr(mnist, "__file__", str(tmp_path / "models" / "mnist.py"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_mnist("test")


def test_files_are_found_compressed_or_not_and_in_subfolders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMCDIFF_DATA", str(tmp_path))
    for folder in ("MNIST/raw", "mnist", ""):
        for ending in ("", ".gz"):
            file = tmp_path / folder / f"{NAMES[0]}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            assert find_original(NAMES[0]) == file


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / f"{NAMES[3]}.gz"
    file.write_bytes(gzip.compress(b"seven"))
    with pytest.raises(ValueError, match="is not the original t10k-labels"):
        read_original(NAMES[3], tmp_path)
    file.write_bytes(gzip.compress(b"seven")[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        read_original(NAMES[3], tmp_path)


def test_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        load_mnist("dev")


@pytest.mark.parametrize("kind", ["guide", "judge"])
@torch.no_grad()
def test_classifiers_take_leading_axes(kind: str) -> None:
    classifier = MnistClassifier(kind, 4).eval()
    images = torch.randn(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = classifier(images)
    assert logits.shape == (2, 3, 10)
    torch.testing.assert_close(logits[1, 2], classifier(images[1, 2]))
    assert classifier.features(images[0]).shape == (3, 16)
