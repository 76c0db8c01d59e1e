"""The digits, what was trained on them, and the figures that training/digits.py reports."""

import builtins
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from smcdiff.models import digits
from smcdiff.models.digits import (
    DigitsSplit,
    digit_classifier,
    digit_network,
    load_digits_split,
    load_heldout_examples,
)
from smcdiff.models.objectives import validation_loss

REPORT = Path(__file__).resolve().parents[2] / "training" / "digits.json"


@pytest.fixture(scope="module")
def split() -> DigitsSplit:
    pytest.importorskip("sklearn")
    return load_digits_split()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(REPORT.read_text())


def test_split_is_complete_stratified_and_disjoint(split: DigitsSplit) -> None:
    assert split.train.images.shape == (1400, 1, 8, 8)
    assert split.heldout.images.shape == (397, 1, 8, 8)
    both = torch.cat([split.train.images, split.heldout.images])
    assert len(both.unique(dim=0)) == len(both) == 1797
    assert (both.min(), both.max()) == (-1, 1)
    everything = torch.cat([split.train.labels, split.heldout.labels]).bincount()
    held = split.heldout.labels.bincount()
    assert (held - everything * 397 / 1797).abs().max() <= 1


def test_examples_are_held_out_images(split: DigitsSplit) -> None:
    examples = load_heldout_examples()
    assert examples.labels.tolist() == [*range(10), *range(10)]
    for image, label in zip(*examples, strict=True):
        same = (split.heldout.images == image).flatten(1).all(1)
        assert split.heldout.labels[same].tolist() == [label]


def test_missing_scikit_learn_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_sklearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r"smcdiff\[digits\]"):
        load_digits_split()
    assert load_heldout_examples().images.shape == (20, 1, 8, 8)


def test_network_is_frozen_and_float32() -> None:
    network = digit_network()
    assert not network.training
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}


@torch.no_grad()
def test_network_does_not_mix_samples() -> None:
    network = digit_network().double()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time, label = torch.linspace(0, 999, 5, dtype=torch.float64), torch.arange(5)
    alone = [network(x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(network(x, time, label), torch.cat(alone), rtol=1e-9, atol=1e-10)


def test_heldout_loss_is_the_reported_one(split: DigitsSplit, report: dict[str, Any]) -> None:
    loss = validation_loss(digit_network(), *split.heldout)
    assert loss == pytest.approx(report["heldout_loss"], abs=1e-3)


@pytest.mark.parametrize("which", ["guide", "judge"])
@torch.no_grad()
def test_classifier_accuracy_is_the_reported_one(
    which: str, split: DigitsSplit, report: dict[str, Any]
) -> None:
    classifier = digit_classifier(which)
    right = classifier(split.heldout.images).argmax(-1) == split.heldout.labels
    accuracy = right.double().mean().item()
    assert accuracy >= report[f"{which}_on_heldout"]["accuracy"] - 1e-4  # rounded to four digits
    assert accuracy > 0.96


@torch.no_grad()
def test_classifier_takes_leading_axes() -> None:
    judge, images = digit_classifier("judge"), load_heldout_examples().images
    logits = judge(images.reshape(4, 5, 1, 8, 8))
    torch.testing.assert_close(logits.reshape(20, 10), judge(images))
    assert judge(images[0]).shape == (10,)


def test_unknown_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="'guide' or 'judge'"):
        digit_classifier("jury")


def test_missing_and_damaged_weights_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(digits, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="missing from this installation"):
        digit_network()
    (tmp_path / "weights").mkdir()
    damaged = tmp_path / "weights" / "digits.safetensors"
    whole = (files("smcdiff.models") / "weights" / "digits.safetensors").read_bytes()
    for content in (b"", b"not weights at all", whole[: len(whole) // 2]):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            digit_network()


def test_weights_are_small() -> None:
    folder = files("smcdiff.models") / "weights"
    sizes = [len(file.read_bytes()) for file in folder.iterdir() if "digits" in file.name]
    assert sum(sizes) < 2_000_000
