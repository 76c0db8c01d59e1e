"""MNIST: the files are found and checked, the parts share no image, what ships loads and works."""

import gzip
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from smcdiff.models import datasets, digits, mnist, mnist_prior
from smcdiff.models.mnist import (
    MnistClassifier,
    find_original,
    load_mnist,
    mnist_classifier,
    mnist_network,
    read_original,
)
from smcdiff.models.objectives import validation_loss

REPORT = Path(__file__).resolve().parents[2] / "training" / "mnist.json"
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
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "models" / "datasets.py"))
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


# --------------------------------------------------------------------------------- what ships


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(REPORT.read_text())


def test_network_is_small_frozen_and_float32() -> None:
    network = mnist_network()
    assert not network.training
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}
    assert sum(p.numel() for p in network.parameters()) < 1_500_000


@pytest.mark.smoke
def test_weights_ship_and_are_small() -> None:
    sizes = [
        len((files("smcdiff.models") / "weights" / f"{name}.safetensors").read_bytes())
        for name in ("mnist", "mnist_guide", "mnist_judge")
    ]
    assert sum(sizes) < 4_000_000


@torch.no_grad()
def test_network_does_not_mix_samples() -> None:
    network = mnist_network().double()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time, label = torch.linspace(0, 999, 3, dtype=torch.float64), torch.arange(3)
    alone = [network(x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x, time, label), torch.cat(alone), rtol=1e-9, atol=1e-10)


def test_loss_on_test_images_is_the_reported_one(
    test_images: mnist.Mnist, report: dict[str, Any]
) -> None:
    some = [each[:1000] for each in test_images]
    loss = validation_loss(mnist_network(), *some, num_draws=1)
    assert loss == pytest.approx(report["first_1000_test_loss"], abs=1e-3)
    without = validation_loss(mnist_network(), some[0], num_draws=1)
    assert loss < without == pytest.approx(report["first_1000_test_loss_without_label"], abs=1e-3)


@pytest.mark.parametrize(("which", "least"), [("guide", 0.97), ("judge", 0.992)])
@torch.no_grad()
def test_classifier_accuracy_is_the_reported_one(
    which: str, least: float, test_images: mnist.Mnist, report: dict[str, Any]
) -> None:
    classifier = mnist_classifier(which)
    logits = torch.cat([classifier(part) for part in test_images.images.split(1000)])
    accuracy = (logits.argmax(-1) == test_images.labels).double().mean().item()
    assert accuracy == pytest.approx(report[f"{which}_on_test"]["accuracy"], abs=2e-4)
    assert accuracy > least


@torch.no_grad()
def test_prior_draws_digits_of_the_wanted_class() -> None:
    pyro.set_rng_seed(0)
    prior, labels = mnist_prior(num_steps=25), torch.arange(40) % 10
    with pyro.plate("images", 40):
        images, free = prior("x", label=labels), mnist_prior(num_steps=2)("free")
    assert images.shape == free.shape == (40, 1, 28, 28)
    found = mnist_classifier("judge")(images).argmax(-1)
    assert (found == labels).sum() >= 34


def test_unknown_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="'guide' or 'judge'"):
        mnist_classifier("jury")


def test_missing_weights_name_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"training/mnist\.py"):
        mnist_network()
