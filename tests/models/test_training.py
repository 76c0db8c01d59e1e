"""The trainer: learns, resumes bit for bit, stops in time, leaves the global stream alone."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from smcdiff.models.networks import ResidualMLP
from smcdiff.models.objectives import Objective, flow_matching, validation_loss
from smcdiff.models.training import DenoisingTrainer, TrainingConfig

from ..torchrun import torchrun

CONFIG = TrainingConfig(steps=12, batch_size=16, warmup=3, label_dropout=0.3, seed=5)


def tiny_trainer(config: TrainingConfig = CONFIG, **options: Any) -> DenoisingTrainer:
    torch.manual_seed(0)
    network = ResidualMLP(4, 16, 1, num_classes=2, time_features=8)
    data = torch.randn(50, 4)
    labels = (data[:, 0] > 0).long()
    options = {
        "augment": lambda x: x + torch.randn_like(x),
        "validation": (data[:20], labels[:20]),
        **options,
    }
    return DenoisingTrainer(network, data, labels, config, **options)


def changed(**settings: Any) -> TrainingConfig:
    return dataclasses.replace(CONFIG, **settings)


def parameters(trainer: DenoisingTrainer) -> list[Tensor]:
    networks = (trainer.network, trainer.ema, trainer.best)
    return [p.detach() for net in networks for p in net.parameters()]


def rows(trainer: DenoisingTrainer) -> list[tuple[float, ...]]:
    """The history without the clock."""
    return [(row["step"], row["train"], row["validation"]) for row in trainer.history]


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = changed(validate_every=3, patience=50)
    whole, losses = tiny_trainer(config), []
    whole.run(lambda step, loss: losses.append(loss))
    first, again = tiny_trainer(config), []
    for _ in range(7):
        again.append(first.step())
        if first.done % 3 == 0:
            first.validate()
    first.save(tmp_path / "checkpoint.safetensors")
    torch.manual_seed(99)
    second = tiny_trainer(config)
    second.step()  # whatever it did before is forgotten
    second.load(tmp_path / "checkpoint.safetensors")
    torch.randn(3)
    second.run(lambda step, loss: again.append(loss))
    assert again == losses
    assert rows(second) == rows(whole)
    assert len(rows(whole)) == 4
    for left, right in zip(parameters(whole), parameters(second), strict=True):
        assert torch.equal(left, right)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_run_writes_checkpoints_and_shows_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, trainer = tmp_path / "checkpoint.safetensors", tiny_trainer(changed(steps=3))
    seen = []
    trainer.run(
        lambda step, loss: seen.append(file.exists()), checkpoint=file, checkpoint_minutes=0.0
    )
    assert seen == [False, True, True]
    assert capsys.readouterr() == ("", "")
    again = tiny_trainer(changed(steps=3))
    again.load(file)
    assert (again.done, again.share) == (3, 1.0)
    tiny_trainer(changed(steps=3)).run(bar=True)
    assert "3/3" in capsys.readouterr().err


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    trainer.step()
    trainer.save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="steps=12, seed=5"):
        tiny_trainer(changed(steps=13, seed=6)).load(tmp_path / "checkpoint.safetensors")
    for other in (Objective("epsilon"), Objective(weighting="snr"), flow_matching()):
        with pytest.raises(ValueError, match="another objective: its table"):
            tiny_trainer(objective=other).load(tmp_path / "checkpoint.safetensors")


def test_global_stream_is_left_alone() -> None:
    trainer = tiny_trainer()
    before = torch.get_rng_state()
    trainer.step()
    trainer.validate()
    assert torch.equal(before, torch.get_rng_state())


def test_seed_decides() -> None:
    assert tiny_trainer().step() == tiny_trainer().step() != tiny_trainer(changed(seed=6)).step()


def test_early_stopping_returns_to_the_best() -> None:
    """A learning rate that ruins the network: its first validation stays the best."""
    config = changed(steps=40, learning_rate=1.0, warmup=0, validate_every=2, patience=3)
    trainer = tiny_trainer(config)
    trainer.run()
    losses = [row["validation"] for row in trainer.history]
    best = losses.index(min(losses))
    assert trainer.done < 40
    assert len(losses) == best + 4
    assert validation_loss(trainer.ema, *trainer.validation, num_draws=1) == losses[best]


def test_clock_ends_a_run_and_lowers_the_learning_rate() -> None:
    trainer = tiny_trainer(changed(minutes=1.0, warmup=0))
    trainer.spent = 0.5
    assert trainer.learning_rate() == pytest.approx(CONFIG.learning_rate / 2)
    trainer.spent = 1.0
    trainer.run()
    assert trainer.done == 0


def test_mixed_precision_is_nearly_the_same() -> None:
    exact, mixed = tiny_trainer(), tiny_trainer(changed(mixed_precision=True))
    losses = [(exact.step(), mixed.step()) for _ in range(5)]
    assert all(left != right for left, right in losses[1:])  # the last layer starts at zero
    assert all(left == pytest.approx(right, rel=1e-2) for left, right in losses)
    assert {p.dtype for p in parameters(mixed)} == {torch.float32}


def test_nan_loss_stops_the_run() -> None:
    trainer = tiny_trainer()
    trainer.data[:] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        trainer.step()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="need validation="):
        tiny_trainer(changed(validate_every=2), validation=None)
    with pytest.raises(ValueError, match="patience=2 needs validate_every"):
        tiny_trainer(changed(patience=2))


def train_in_one_of_two(folder: Path) -> None:
    distributed.init_process_group("gloo")
    trainer = tiny_trainer(changed(validate_every=6, max_gradient_norm=0.1))
    trainer.run(checkpoint=folder / "checkpoint.safetensors")
    distributed.destroy_process_group()


def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    torchrun("tests.models.test_training", tmp_path)
    config = changed(validate_every=6, max_gradient_norm=0.1)
    two, one = tiny_trainer(config), tiny_trainer(config)
    two.load(tmp_path / "checkpoint.safetensors")
    one.run()
    assert two.done == one.done
    torch.testing.assert_close(torch.tensor(rows(two)), torch.tensor(rows(one)))
    for left, right in zip(parameters(two), parameters(one), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    train_in_one_of_two(Path(sys.argv[1]))
