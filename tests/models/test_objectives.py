"""Objectives: exact networks lose nothing, weightings are what they say, networks learn."""

import math

import pytest
import torch
from torch import Tensor

from smcdiff.models import EDM, Cosine, Flow, RectifiedFlow, VarianceExploding
from smcdiff.models.networks import ResidualMLP
from smcdiff.models.objectives import (
    Objective,
    edm,
    flow_matching,
    log_normal,
    validation_loss,
)
from smcdiff.models.training import DenoisingTrainer, TrainingConfig

OBJECTIVES = {
    "epsilon": Objective("epsilon"),
    "x0": Objective("x0"),
    "v": Objective("v"),
    "score": Objective("score", weighting="snr"),
    "velocity": flow_matching(),
    "edm": edm(),
    "cosine, min-SNR": Objective("v", Cosine(), weighting="min_snr"),
    "exploding": Objective("epsilon", VarianceExploding(), time="log_snr"),
    "edm weights for x0": Objective("x0", EDM(), weighting="edm"),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, 3, dtype=torch.float64, generator=stream))


def target(objective: Objective, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """What the network should return, written down from the definitions."""
    alpha, sigma = objective.levels(level, x0)
    s = objective.sigma_data
    match objective.parameterization:
        case "epsilon":
            return noise
        case "x0":
            return x0
        case "v":
            return alpha * noise - sigma * x0
        case "score":
            return -noise / sigma
        case "velocity":
            return noise - x0
        case "edm":  # Karras et al. 2022, equation 8, for alpha = 1
            c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2).sqrt()
            return (x0 - c_skip * (x0 + sigma * noise)) / c_out


@each_objective
def test_loss_of_the_right_answer_is_zero_and_of_another_its_distance(objective: Objective) -> None:
    (x0, noise), level = batch(), torch.tensor([0, 1, 10, 100, 500, 900, 990, 999])
    right = target(objective, x0, noise, level)
    loss = objective.loss(lambda x, time, label: right, x0, level, noise)
    scale = right.square().mean(1) * objective.table.weight[level]
    torch.testing.assert_close(loss / scale, torch.zeros(8).double(), rtol=0, atol=1e-12)
    loss = objective.loss(lambda x, time, label: right + 2, x0, level, noise)
    torch.testing.assert_close(loss, 4 * objective.table.weight[level], rtol=1e-6, atol=0)


@each_objective
def test_weight_is_that_of_the_error_of_the_data(objective: Objective) -> None:
    """An error of F by 1 is one of x_0 by c_out; network times are finite."""
    table = objective.table
    snr = (table.alpha / table.sigma) ** 2
    expected = {
        "network": None,
        "snr": snr,
        "min_snr": snr.clamp(max=5.0),
        "edm": (table.sigma**2 + 0.25) / (0.5 * table.sigma) ** 2,
    }[objective.weighting]
    if expected is None:
        assert torch.equal(table.weight, torch.ones_like(snr))
    else:  # F = a x_0 + b eps and x_i = alpha x_0 + sigma eps give c_out
        c_out = 1 / (table.on_data - table.on_noise * table.alpha / table.sigma)
        torch.testing.assert_close(table.weight, expected * c_out**2, rtol=1e-6, atol=0)
    assert table.time.isfinite().all()


def test_minimal_weight_of_epsilon_is_the_published_one() -> None:
    """Hang et al. 2023: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v."""
    for name, shift in (("epsilon", 0), ("v", 1)):
        table = Objective(name, weighting="min_snr", gamma=3.0).table
        snr = (table.alpha / table.sigma) ** 2
        torch.testing.assert_close(table.weight, snr.clamp(max=3.0) / (snr + shift))


def test_usual_levels() -> None:
    table = Objective().table
    assert table.time.tolist() == list(range(1000))
    assert table.alpha[0].item() ** 2 == pytest.approx(1 - 1e-4)
    assert table.alpha[-1].item() == pytest.approx(0.00635, abs=1e-4)
    assert flow_matching().table.alpha[-1] == 0


def test_log_normal_levels_have_its_moments() -> None:
    log_sigma = log_normal(-1.2, 1.2, 1000).sigma.log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=1e-12)
    assert log_sigma.std().item() == pytest.approx(1.2, rel=2e-3)
    assert edm().table.time[500].item() == pytest.approx(log_sigma[500].item() / 4)


def test_draws_cover_the_levels_evenly() -> None:
    assert torch.equal(Objective().draw(100) // 10, torch.arange(100))


def test_unknown_weighting_is_refused() -> None:
    objective = Objective()
    object.__setattr__(objective, "weighting", "sqrt")  # past the check of types
    with pytest.raises(ValueError, match="'min_snr' or 'edm', got 'sqrt'"):
        objective.table  # noqa: B018


def test_validation_does_not_depend_on_chunks() -> None:
    torch.manual_seed(0)
    network, data = ResidualMLP(3, 8, 1), torch.randn(10, 3)
    torch.nn.init.normal_(network.output.weight)
    whole = validation_loss(network, data, num_draws=3)
    assert validation_loss(network, data, num_draws=3, chunk_size=3) == pytest.approx(whole)
    assert validation_loss(network, data, num_draws=3, seed=1) != pytest.approx(whole)


@pytest.mark.parametrize("name", ["epsilon", "v", "edm", "velocity"])
def test_training_lowers_the_loss(name: str) -> None:
    """Data is one point: every target can be found exactly from x_t."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name]
    scale = {"edm": 100.0, "velocity": 1000.0}.get(name, 1.0)
    network = ResidualMLP(2, 32, 1, time_features=8, time_scale=scale)
    config = TrainingConfig(steps=200, batch_size=64, learning_rate=5e-3, warmup=10, ema_decay=0.95)
    data = torch.tensor([[0.5, -1.0]])
    trainer = DenoisingTrainer(network, data, config=config, objective=objective)
    before = validation_loss(trainer.ema, data.expand(500, 2), objective=objective, num_draws=1)
    trainer.run()
    after = validation_loss(trainer.ema, data.expand(500, 2), objective=objective, num_draws=1)
    assert after < 0.3 * before


def test_flow_matching_trains_what_flow_samples() -> None:
    """Gaussian data: the network is the exact velocity but for one factor, which is learned."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_variance = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
            s, variance = time[:, None], self.log_variance.exp()
            return x * (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2)

    torch.manual_seed(0)
    data = 0.3 * torch.randn(20_000, 1)
    config = TrainingConfig(steps=300, batch_size=256, learning_rate=3e-2, warmup=0)
    trainer = DenoisingTrainer(Scaled(), data, config=config, objective=flow_matching())
    trainer.run()
    assert trainer.network.log_variance.item() == pytest.approx(2 * math.log(0.3), abs=0.1)
    flow = Flow(trainer.network, (1,), 50, data_at=0, noise=0.0, schedule=RectifiedFlow())
    x = torch.randn(4000, 1)
    for t in range(50, 0, -1):
        x = flow.kernel(x, t).law.mean
    assert x.std().item() == pytest.approx(0.3, rel=0.05)
