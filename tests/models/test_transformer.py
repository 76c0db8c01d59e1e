"""The transformer: what it takes, what it gives, and what it must not mix."""

import pytest
import torch

from smcdiff.models.transformer import Transformer


def network() -> Transformer:
    torch.manual_seed(0)
    out = Transformer(vocabulary=5, length=6, width=16, depth=2, heads=2).double()
    torch.nn.init.normal_(out.output.weight)
    return out


@torch.no_grad()
def test_it_takes_masks_and_gives_logits_of_tokens() -> None:
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 5, 5, 5, 5, 5]])
    logits = network()(tokens)
    assert logits.shape == (2, 6, 5)
    assert logits.dtype == torch.float64
    fresh = Transformer(5, 6, 16, 2, 2)  # before training all states are alike
    torch.testing.assert_close(fresh(tokens), fresh.output.bias.expand(2, 6, 5))


@torch.no_grad()
def test_it_does_not_mix_samples() -> None:
    tokens = torch.randint(6, (4, 6), generator=torch.Generator().manual_seed(1))
    alone = torch.cat([network()(row[None]) for row in tokens])
    torch.testing.assert_close(network()(tokens), alone, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_every_position_sees_every_other_one_and_knows_where_it_is() -> None:
    tokens = torch.full((1, 6), 5)
    before = network()(tokens)[0]
    for position in range(6):
        changed = tokens.clone()
        changed[0, position] = 2
        moved = (network()(changed)[0] - before).abs().amax(-1)
        assert bool((moved > 1e-8).all())
    assert len({round(float(value), 9) for value in before[:, 0]}) == 6


def test_it_is_differentiable_and_small() -> None:
    net = network()
    net(torch.zeros(2, 6, dtype=torch.int64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.blocks.parameters())
    assert sum(p.numel() for p in net.parameters()) < 10_000


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="heads=3 must divide the width"):
        Transformer(5, 6, 16, 1, 3)
    with pytest.raises(ValueError, match="expected 6 tokens, got 7"):
        network()(torch.zeros(1, 7, dtype=torch.int64))
