"""The trainer: learns, resumes bit for bit, leaves the global random stream alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from smcdiff.models.networks import ResidualMLP
from smcdiff.models.training import (
    DenoisingTrainer,
    Parameterization,
    TrainingConfig,
    denoising_loss,
    noise_levels,
    stratified_times,
    validation_loss,
)

CONFIG = TrainingConfig(steps=12, batch_size=16, warmup=3, label_dropout=0.3, seed=5)


def tiny_trainer(config: TrainingConfig = CONFIG) -> DenoisingTrainer:
    torch.manual_seed(0)
    network = ResidualMLP(4, 16, 1, num_classes=2, time_features=8)
    data = torch.randn(50, 4)
    return DenoisingTrainer(
        network, data, (data[:, 0] > 0).long(), config, augment=lambda x: x + torch.randn_like(x)
    )


def parameters(trainer: DenoisingTrainer) -> list[Tensor]:
    return [p.detach() for net in (trainer.network, trainer.ema) for p in net.parameters()]


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = tiny_trainer()
    losses = [whole.step() for _ in range(CONFIG.steps)]
    first = tiny_trainer()
    again = [first.step() for _ in range(7)]
    first.save(tmp_path / "checkpoint.safetensors")
    torch.manual_seed(99)
    second = tiny_trainer()
    second.step()  # whatever it did before is forgotten
    second.load(tmp_path / "checkpoint.safetensors")
    torch.randn(3)
    second.run(lambda step, loss: again.append(loss))
    assert again == losses
    for left, right in zip(parameters(whole), parameters(second), strict=True):
        assert torch.equal(left, right)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    trainer.step()
    trainer.save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="steps=12, seed=5"):
        tiny_trainer(TrainingConfig(batch_size=16, warmup=3, label_dropout=0.3)).load(
            tmp_path / "checkpoint.safetensors"
        )


def test_global_stream_is_left_alone() -> None:
    trainer = tiny_trainer()
    before = torch.get_rng_state()
    trainer.step()
    validation_loss(trainer.ema, trainer.data, trainer.labels, draws=2)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_decides() -> None:
    other = TrainingConfig(**{**vars(CONFIG), "seed": 6})
    assert tiny_trainer().step() == tiny_trainer().step() != tiny_trainer(other).step()


@pytest.mark.parametrize("parameterization", ["epsilon", "v"])
def test_training_lowers_the_loss(parameterization: Parameterization) -> None:
    """Data is one point: both targets can be found exactly from x_t."""
    torch.manual_seed(0)
    network = ResidualMLP(2, 32, 1, time_features=8)
    config = TrainingConfig(
        steps=200, batch_size=64, learning_rate=5e-3, warmup=10, ema_decay=0.95,
        parameterization=parameterization,
    )  # fmt: skip
    data = torch.tensor([[0.5, -1.0]])
    trainer = DenoisingTrainer(network, data, config=config)
    before = validation_loss(trainer.ema, data, parameterization=parameterization, draws=500)
    trainer.run()
    after = validation_loss(trainer.ema, data, parameterization=parameterization, draws=500)
    assert after < 0.3 * before


def test_loss_of_the_exact_answer_is_zero() -> None:
    x0, noise, time = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 10, 500, 998, 999])
    alpha, sigma = noise_levels(time, x0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(6, 1))

    class Exact(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
            eps = (x - alpha * x0) / sigma
            return alpha * eps - sigma * x0

    loss = denoising_loss(Exact(), x0, time, noise)
    torch.testing.assert_close(loss, torch.zeros(6), rtol=0, atol=1e-6)


def test_levels_are_those_of_the_linear_beta_schedule() -> None:
    alpha, _ = noise_levels(torch.tensor([0, 999]), torch.zeros(2, 1, dtype=torch.float64))
    assert alpha[0].item() ** 2 == pytest.approx(1 - 1e-4)
    assert alpha[1].item() == pytest.approx(0.00635, abs=1e-4)


def test_times_cover_the_grid_evenly() -> None:
    times = stratified_times(100)
    assert torch.equal(times // 10, torch.arange(100))


def test_nan_loss_stops_the_run() -> None:
    trainer = tiny_trainer()
    trainer.data[:] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        trainer.step()
