r"""Guides that start exactly at the prior: what relative trajectory balance and its kin train.

:class:`Finetuned` is the process with a copy of its network, whole or with low-rank adapters. The
others are parts of a :class:`~smcdiff.models.Controlled` process, a start and variances of its own;
its controls are in :mod:`~smcdiff.models.controls`.
"""

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor, nn

from smcdiff.arguments import check_kind, check_number, check_whole
from smcdiff.process import Kernel, Process, Signal, Tree

from .controls import row


class Finetuned(Process):
    """A process with a trainable copy of its network; the original stays as it is.

    Args:
        base: a ``Diffusion``, ``Flow`` or ``MaskedDiffusion`` with an ``nn.Module``.
        adapt: makes the copy trainable (None: all of it), as ``lora()`` does.

    Raises:
        ValueError: the process has no network of its own, or the copy has nothing to train.
    """

    def __init__(
        self, base: Process, adapt: Callable[[nn.Module], nn.Module] | None = None
    ) -> None:
        name = next((n for n in ("network", "velocity") if n in vars(base)), None)
        network = None if name is None else getattr(base, name)
        if name is None or not isinstance(network, nn.Module):
            raise ValueError(
                f"{type(base).__name__} has no network (an nn.Module) to be copied: fine-tune the "
                "process that has, or steer this one with Controlled"
            )
        twin = copy.deepcopy(network)
        twin = twin.requires_grad_(True) if adapt is None else adapt(twin)
        if not any(p.requires_grad for p in twin.parameters()):
            raise ValueError(f"the copy of {type(network).__name__} has nothing to train")
        self.inner, self._name = copy.copy(base), name
        setattr(self.inner, name, twin)
        self.num_steps, self.event_shape = base.num_steps, base.event_shape

    @property
    def network(self) -> nn.Module:
        """The copy, which is trained in place."""
        network: nn.Module = getattr(self.inner, self._name)
        return network

    @property
    def deterministic(self) -> bool:
        return self.inner.deterministic

    def shape_at(self, t: int) -> Size:
        return self.inner.shape_at(t)

    def initial(self, **context: Any) -> Distribution:
        return self.inner.initial(**context)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        return self.inner.evaluate(x, t, **context)

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        return self.inner.kernel(x, t, evaluation, **context)

    def signal(self, t: int) -> Signal | None:
        return self.inner.signal(t)

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        return self.inner.bridge(x_0, x, t)

    def calls(self, t: int) -> int:
        return self.inner.calls(t)

    def register(self, name: str) -> None:
        pyro.module(f"{name}.network", self.network)


def lora(
    rank: int = 8, targets: Sequence[type[nn.Module]] = (nn.Linear, nn.Conv2d)
) -> Callable[[nn.Module], nn.Module]:
    """Low-rank adapters (Hu et al. 2021) for :class:`Finetuned`, by peft (extra ``lora``).

    Args:
        rank: of every change of a weight; the change is scaled by one.
        targets: the kinds of layers that get one.

    Raises:
        ImportError: peft is needed and not installed.
    """

    check_whole("rank", rank)

    def adapt(network: nn.Module) -> nn.Module:
        try:
            peft = importlib.import_module("peft")
        except ImportError as error:
            raise ImportError("adapters need peft: pip install smcdiff[lora]") from error
        names = [n for n, m in network.named_modules() if isinstance(m, tuple(targets))]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        adapted: nn.Module = peft.inject_adapter_in_model(config, network)
        return adapted.eval()

    return adapt


class LearnedStart(nn.Module):
    """A law of x_T for ``Controlled(initial=...)``: the base's, shifted and scaled by element.

    Args:
        base: a process with a Gaussian start.
    """

    mean: Tensor
    stddev: Tensor

    def __init__(self, base: Process) -> None:
        super().__init__()
        check_kind("base", base, Process, "Diffusion(network, ...)")
        mean, scale = base.initial().mean.detach(), base.initial().stddev.detach()
        self.register_buffer("mean", mean)
        self.register_buffer("stddev", scale)
        self.shift, self.log_scale = (nn.Parameter(torch.zeros_like(mean)) for _ in range(2))

    def forward(self, **context: Any) -> Distribution:
        mean = self.mean + self.stddev * self.shift
        law = dist.Normal(mean, self.stddev * self.log_scale.exp(), validate_args=False)
        return law.to_event(mean.dim())


class LearnedScale(nn.Module):
    r"""Standard deviations for ``Controlled(scale=...)``, one factor per step (and element),

    .. math:: \rho_t = \exp(b \tanh(a_t / b)), \qquad a_t = 0 \text{ at first}.

    A factor that is off by a small delta costs d delta^2 nats in d dimensions, at every step: for
    images an optimiser that moves it by a hundredth does more harm than any variance is worth.

    Args:
        num_steps: T.
        bound: b.
        shape: that of an event, for one factor per element; or one that broadcasts with it.
    """

    def __init__(self, num_steps: int, bound: float = 2.0, shape: Sequence[int] = ()) -> None:
        super().__init__()
        check_whole("num_steps", num_steps)
        check_number("bound", bound, 0, math.inf, "()")
        self.bound = bound
        self.log_scale = nn.Parameter(torch.zeros(num_steps + 1, *shape))

    def forward(self, t: int) -> Tensor:
        return torch.exp(self.bound * torch.tanh(row(self.log_scale, t) / self.bound))
