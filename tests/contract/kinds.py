"""Processes of every kind, each with the exact law of what it makes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from smcdiff import Process
from smcdiff.inference import (
    DenoisedLikelihood,
    GaussianKernels,
    QuadraticTwist,
    ResidualTwist,
    StringTwist,
    TokenTwist,
)
from smcdiff.inference.learned_strings import StringNetwork
from smcdiff.models import (
    Chain,
    ClassifierFree,
    Controlled,
    Diffusion,
    EnumeratedDenoiser,
    Flow,
    GaussianDenoiser,
    MaskedDiffusion,
    VarianceExploding,
    VariancePreserving,
)

from ..oracles import enumerated, grid, moments

Law = tuple[Tensor, Tensor]  # points and their log-weights, with shape (*label, points)
SHORT, SHORTER = VariancePreserving([0.4, 0.7]), VariancePreserving([0.6])


class Linear(nn.Module):
    """A network that happens to be affine in x, and in a label where there is one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        noise = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
        self.weight = nn.Parameter(0.7 * torch.eye(size) + 0.1 * noise)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        out = x.flatten(1) @ self.weight.to(x) + 0.1 * time[:, None]
        if label is not None:
            out = out - 0.2 * label[:, None].to(out)
        return out.reshape(x.shape)


class Tokens(nn.Module):
    """The exact denoiser of a small table, its logits tilted by a label where there is one."""

    def __init__(self) -> None:
        super().__init__()
        joint = torch.sin(1.0 + 2 * torch.arange(3)[:, None] + 3 * torch.arange(3)).exp()
        self.table = EnumeratedDenoiser(joint)

    def forward(self, tokens: Tensor, label: Tensor | None = None) -> Tensor:
        logits: Tensor = self.table(tokens)
        if label is None:
            return logits
        return logits + 0.4 * label[:, None, None] * torch.arange(3)


@cache
def exact(variance: str = "exact") -> Process:
    denoiser = GaussianDenoiser(torch.tensor([0.5, -0.2]), torch.tensor([1.0, 0.3])).double()
    return Diffusion(denoiser, SHORT, num_steps=2, variance=variance)  # type: ignore[arg-type]


@cache
def network() -> Process:
    return Diffusion(Linear(2), SHORT, (1, 2), num_steps=2, variance="large")


@cache
def exploding() -> Process:
    """Noise without bounds, and a network behind its preconditioning."""
    schedule = VarianceExploding(0.5, 1.5)
    settings: Any = {"parameterization": "edm", "variance": "large"}
    return Diffusion(Linear(2), schedule, (1, 2), num_steps=2, **settings)


def labelled(process: Process, label: float) -> Process:
    """With a label even where the program gives none, as classifier-free guidance wants."""
    process.evaluate = partial(process.evaluate, label=torch.tensor(label))  # type: ignore[method-assign]
    return process


@cache
def guided() -> Process:
    """Classifier-free guidance in the first of two steps."""
    guidance = ClassifierFree(2.0, {"label": 0.0}, interval=(1.0, 5.0))
    settings: Any = {"variance": "large", "guidance": guidance}
    return labelled(Diffusion(Linear(2), SHORT, (1, 2), num_steps=2, **settings), 0.5)


@cache
def flow() -> Process:
    return Flow(Linear(2), (1, 2), 2, noise=1.0, method="euler", data_at=0)


@cache
def chain() -> Process:
    first = Diffusion(Linear(1), SHORTER, (1,), 1, variance="large")
    second = Diffusion(Linear(2), SHORTER, (1, 2), 1, variance="large")
    return Chain(first, second, widen)


def widen(x: Tensor) -> Any:
    """The cascade's link: one number becomes the mean of two."""
    return dist.Normal(x[..., None].expand(*x.shape, 2), 0.5).to_event(2)


@cache
def masked() -> Process:
    return MaskedDiffusion(Tokens(), 2, 3, alphas=(1.0, 0.5, 0.0))


def drift(x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
    """What a guide may have learned: a step towards larger sums."""
    return 0.2 - 0.05 * x


def drift_and_widen(x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
    """The same, where the link leads to another shape."""
    if t == 2:
        return torch.full((*x.shape, 2), 0.2)
    return drift(x, t, denoised)


def tilt(x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
    """The same for tokens, of which the last is the mask."""
    return torch.tensor([0.0, 0.1, 0.3, 0.1]).expand(*x.shape, 4)


@dataclass(frozen=True)
class Kind:
    """One kind of process.

    Attributes:
        make: builds one.
        guide: builds one that proposes for it.
        event_dim: how many dimensions x_0 has.
        unit: makes the sum of x_0 vary by about one.
    """

    make: Callable[[], Process]
    guide: Callable[[], Process]
    event_dim: int
    unit: float = 1.0
    discrete: bool = False

    def total(self, x: Tensor) -> Tensor:
        """The sum of x_0 over its event, in units: what the programs observe."""
        return self.unit * x.double().flatten(x.dim() - self.event_dim).sum(-1)

    def law(self, label: Tensor | None = None) -> Law:
        """The exact law of the sum of x_0, for labels with shape (*label,)."""
        context = {} if label is None else {"label": label}
        if self.discrete:
            states, weights = enumerated(self.make(), **context)
            return states.sum(-1).double().expand_as(weights), weights.log()
        mean, spread = moments(self.make(), **context)
        return grid(self.unit * mean.sum(-1), self.unit**2 * spread.sum((-2, -1)))


KINDS = {
    "exact": Kind(exact, lambda: Controlled(exact("large"), drift), 1),
    "network": Kind(network, lambda: Controlled(network(), drift), 2, 0.7),
    "exploding": Kind(exploding, lambda: Controlled(exploding(), drift), 2, 0.5),
    "guidance": Kind(guided, lambda: Controlled(guided(), drift), 2, 0.7),
    "flow": Kind(flow, lambda: Controlled(flow(), drift), 2),
    "chain": Kind(chain, lambda: Controlled(chain(), drift_and_widen), 2, 0.4),
    "masked": Kind(masked, lambda: Controlled(masked(), tilt), 1, discrete=True),
}


@cache
def plain_law(kind: str) -> Law:
    """The law without a label, which most structures need."""
    return KINDS[kind].law()


def quadratic() -> QuadraticTwist:
    """A quadratic twist of ``x``, as if it had been learned."""
    twist = QuadraticTwist()
    table = torch.tensor([[0.5], [0.3]]).double()  # alike for all elements
    twist.restore({f"x/{s}": table / (1 + s) for s in range(3)})
    return twist


def kernels() -> GaussianKernels:
    """Affine changes of the transitions of ``x``, as if they had been learned."""
    twist = GaussianKernels()
    rows = [[0.3], [-0.4], [0.1], [0.2], [0.9]]
    twist.restore({f"x/{s}": torch.tensor(rows).double() for s in range(3)})
    return twist


def tokens() -> TokenTwist:
    """Log-biases of two positions ``w`` of three tokens and the mask."""
    twist = TokenTwist()
    table = torch.tensor([[0.1, -0.3, 0.2, 0.4], [0.0, 0.3, 0.1, -0.2]]).double()
    twist.restore({f"w/{s}": table for s in range(2)})
    return twist


def strings() -> StringTwist:
    """Biases and scalars of whole strings, as if they had been learned."""

    def build(vocabulary: int) -> StringNetwork:
        network = StringNetwork(vocabulary, 4, 1)
        for parameter in network.parameters():
            wave = torch.arange(parameter.numel(), dtype=parameter.dtype).sin()
            parameter.data = 0.3 * wave.reshape(parameter.shape)
        return network

    return StringTwist(build=build)


def relaxed(probabilities: dict[str, Tensor]) -> Tensor:
    """A reward of the tokens of all processes, as a function of their probabilities."""
    firsts = [p[..., 0].flatten(1).sum(-1).square() for p in probabilities.values()]
    return 0.3 * torch.stack(firsts).sum(0)


class Bend(nn.Module):
    """A residual of some size, for states of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs: Tensor, time: Tensor) -> Tensor:
        x = inputs[:, : inputs.shape[1] // 3]
        h = (self.slope * x).tanh().sum(-1, keepdim=True)
        return torch.cat([self.slope * (x - 1).tanh(), h], -1)


def residual() -> ResidualTwist:
    """A network on top of the denoised likelihood, as if it had been trained."""
    return ResidualTwist(DenoisedLikelihood(), Bend())
