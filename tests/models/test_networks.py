"""Networks: shapes, labels, time resolution, independence of samples, messages."""

import pytest
import torch
from torch import Tensor, nn

from smcdiff.models.networks import ResidualMLP, UNet, embed_time


def networks(num_classes: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    built = {
        "mlp": ResidualMLP(64, 32, 2, num_classes, time_features=16),
        "unet": UNet(1, (8, 16), num_classes, time_features=16, patch=2),
    }
    for network in built.values():
        for parameter in network.parameters():  # the last layer starts at zero: move it
            torch.nn.init.normal_(parameter, std=0.1)
        network.eval()
    return built


def inputs(count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 8, 8, generator=stream)
    return x, torch.linspace(0, 999, count), torch.arange(count) % 11


@pytest.mark.parametrize("kind", ["mlp", "unet"])
@torch.no_grad()
def test_result_has_the_shape_of_x(kind: str) -> None:
    x, time, label = inputs()
    assert networks(10)[kind](x, time, label).shape == x.shape
    assert networks(0)[kind](x, time).shape == x.shape


@torch.no_grad()
def test_mlp_takes_any_event_shape() -> None:
    network = ResidualMLP(6, 8, 1)
    for shape in [(6,), (2, 3), (1, 3, 2)]:
        assert network(torch.zeros(4, *shape), torch.zeros(4)).shape == (4, *shape)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
@torch.no_grad()
def test_samples_do_not_depend_on_their_batch(kind: str) -> None:
    network = networks(10)[kind].double()
    x, time, label = (part.double() if part.is_floating_point() else part for part in inputs())
    together = network(x, time, label)
    alone = [network(x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
@torch.no_grad()
def test_no_label_is_the_last_label(kind: str) -> None:
    network = networks(10)[kind]
    x, time, _ = inputs()
    none = network(x, time)
    assert torch.equal(none, network(x, time, torch.full((len(x),), 10)))
    assert not torch.allclose(none, network(x, time, torch.full((len(x),), 3)))


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_labels_without_classes_are_refused(kind: str) -> None:
    x, time, label = inputs()
    with pytest.raises(ValueError, match="pass label=None"):
        networks(0)[kind](x, time, label)


def test_wrong_event_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected events of 64 elements"):
        networks(0)["mlp"](torch.zeros(2, 63), torch.zeros(2))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="time_features must be even"):
        ResidualMLP(4, 8, 1, time_features=3)
    with pytest.raises(ValueError, match="num_classes"):
        ResidualMLP(4, 8, 1, num_classes=-1)


def test_embedding_tells_all_times_apart() -> None:
    embedded = embed_time(torch.arange(1000, dtype=torch.float64), 32)
    between = torch.cdist(embedded, embedded) + 10 * torch.eye(1000, dtype=torch.float64)
    assert between.min() > 0.5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_gradients_and_functional_transforms_work() -> None:
    network = networks(10)["mlp"]
    x, time, _ = inputs(3)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, time).sum(), x)
    assert gradient.abs().sum() > 0
    _, tangent = torch.func.jvp(lambda z: network(z, time), (x.detach(),), (torch.ones_like(x),))
    assert tangent.shape == x.shape


def test_unet_with_attention_and_more_scales() -> None:
    network = UNet(2, (4, 8, 16), patch=1)
    x = torch.randn(3, 2, 12, 8)
    assert network(x, torch.zeros(3)).shape == x.shape
    assert any("attention" in name for name, _ in network.named_parameters())
    without = UNet(2, (4, 8, 16), patch=1, heads=0)
    assert not any("attention" in name for name, _ in without.named_parameters())


def test_unet_refuses_sides_and_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="sides 4 divides, got 28 by 30"):
        UNet(1, (4, 8), patch=2)(torch.zeros(1, 1, 28, 30), torch.zeros(1))
    with pytest.raises(ValueError, match="heads=3 must divide"):
        UNet(1, (4, 8), heads=3)
