"""The bound of masked diffusion: tight for exact denoisers, and what a transformer learns."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smcdiff.models import EnumeratedDenoiser, MarkovDenoiser
from smcdiff.models.masked_objective import MaskedObjective
from smcdiff.models.objectives import validation_loss
from smcdiff.models.training import DenoisingTrainer, TrainingConfig
from smcdiff.models.transformer import Transformer

LENGTH, VOCABULARY = 4, 3
JOINT = torch.rand(*[VOCABULARY] * LENGTH, generator=torch.Generator().manual_seed(0)).double()
STRINGS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
OBJECTIVE = MaskedObjective(LENGTH, VOCABULARY)


def expected_loss(network: torch.nn.Module, x0: Tensor) -> Tensor:
    """Over all numbers of masked tokens and all sets of them."""
    total = torch.zeros(len(x0)).double()
    orders = list(itertools.permutations(range(LENGTH)))
    for order, level in itertools.product(orders, range(LENGTH)):
        noise = torch.tensor(order).float().expand(len(x0), -1)
        total += OBJECTIVE.loss(network, x0, torch.full((len(x0),), level), noise)
    return total / (len(orders) * LENGTH)


def test_the_bound_of_an_exact_denoiser_is_the_likelihood() -> None:
    denoiser = EnumeratedDenoiser(JOINT)
    exact = -denoiser.log_prob(STRINGS) / LENGTH
    torch.testing.assert_close(expected_loss(denoiser, STRINGS), exact, rtol=0, atol=1e-12)


def test_the_bound_of_any_other_network_is_worse() -> None:
    other = EnumeratedDenoiser(JOINT + 0.3 * JOINT.flip(0))
    law = JOINT.flatten() / JOINT.sum()
    entropy = -(law * law.log()).sum() / LENGTH
    assert float((law * expected_loss(other, STRINGS)).sum() - entropy) > 1e-4


def test_levels_mask_so_many_tokens() -> None:
    seen: list[Tensor] = []

    def network(tokens: Tensor) -> Tensor:
        seen.append((tokens == VOCABULARY).sum(-1))
        return torch.zeros(*tokens.shape, VOCABULARY)

    torch.manual_seed(0)
    level = OBJECTIVE.draw(400)
    assert level.bincount().tolist() == [100] * LENGTH
    x0 = STRINGS[:1].expand(400, -1)
    loss = OBJECTIVE.loss(network, x0, level, OBJECTIVE.noise(x0))
    assert torch.equal(seen[0], level + 1)
    torch.testing.assert_close(loss, torch.full((400,), math.log(VOCABULARY)))


def test_labels_reach_the_network() -> None:
    def network(tokens: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(label, VOCABULARY)[:, None].expand(-1, LENGTH, -1) * 50.0

    x0 = torch.tensor([[1] * LENGTH, [1] * LENGTH])
    settings = {"x0": x0, "level": torch.tensor([0, 3]), "noise": torch.rand(2, LENGTH)}
    loss = OBJECTIVE.loss(network, label=torch.tensor([1, 2]), **settings)
    torch.testing.assert_close(loss, torch.tensor([0.0, 50.0]))


# ------------------------------------------------------------------------------------- training


def chain() -> MarkovDenoiser:
    rows = (2.5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(4))).softmax(-1)
    return MarkovDenoiser(rows[0].double(), rows[1:].double(), LENGTH)


def trainer(steps: int) -> DenoisingTrainer:
    torch.manual_seed(0)
    config = TrainingConfig(
        steps=steps,
        batch_size=64,
        learning_rate=3e-3,
        warmup=20,
        ema_decay=0.95,
        validate_every=50,
    )
    strings = chain().sample(4000)
    return DenoisingTrainer(
        Transformer(VOCABULARY, LENGTH, 32, 1, 4),
        strings[:3000],
        config=config,
        objective=OBJECTIVE,
        validation=(strings[3000:], None),
    )


def test_a_transformer_learns_a_chain() -> None:
    """What remains above the entropy of the held-out strings is little."""
    training = trainer(250)
    training.run()
    heldout, _ = training.validation or (torch.empty(0), None)
    exact = -chain().log_prob(heldout).mean() / LENGTH
    found = validation_loss(training.ema, heldout, None, OBJECTIVE, num_draws=8)
    assert float(exact) - 0.01 < found < float(exact) + 0.04
    assert [row["step"] for row in training.history] == [50, 100, 150, 200, 250]


def test_training_continues_from_a_checkpoint(tmp_path: Path) -> None:
    whole, first, second = trainer(6), trainer(6), trainer(6)
    whole.run()
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    second.run()
    for a, b in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    other = trainer(6)
    other.objective = dataclasses.replace(OBJECTIVE, length=5)
    with pytest.raises(ValueError, match="its table `masked` differs"):
        other.load(tmp_path / "state.safetensors")
