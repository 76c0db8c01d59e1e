r"""Guides that start exactly at the prior: what relative trajectory balance and its kin train.

:class:`Finetuned` is the process with a copy of its network, whole or with low-rank adapters. The
others are parts of a :class:`~smcdiff.models.Controlled` process: a head beside the frozen network,
the same with the gradient of a reward, their units, a start and a variance of its own.
"""

import copy
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor, nn

from smcdiff.arguments import check_kind, check_names, check_number, check_whole
from smcdiff.process import Kernel, Process, Signal, Tree, context_rows, flatten_batch


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


class Head(nn.Module):
    r"""A control :math:`u_t(x_t, \hat x_0)` that is zero before it learns: its last layer is.

    Args:
        network: ``network(inputs, time)`` with inputs of shape ``(batch, channels, *rest)``: x_t,
            its estimate of x_0 and what else is read, side by side in the first event dimension;
            and time t of shape ``(batch,)``. Returns the same shape, of which the channels of x_t
            count. Its last linear or convolutional layer is set to zero.
        event_dim: the number of dimensions of one event.
        reads: names of context tensors, with ``event_dim`` dimensions each, that are inputs too.
        label: the name of a context tensor of whole numbers, which the network gets as a third
            argument, of shape ``(batch,)`` (None: it has two).
    """

    def __init__(
        self,
        network: nn.Module,
        event_dim: int = 1,
        reads: Sequence[str] = (),
        label: str | None = None,
    ) -> None:
        super().__init__()
        check_whole("event_dim", event_dim)
        check_names("reads", reads)
        self.network, self.event_dim, self.reads = network, event_dim, tuple(reads)
        self.label = label
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        layers = [m for m in network.modules() if isinstance(m, kinds)]
        if not layers:
            raise ValueError(
                f"{type(network).__name__} has no linear or convolutional layer to start from zero"
            )
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        batch, event = x.shape[: x.dim() - self.event_dim], x.shape[x.dim() - self.event_dim :]
        dims = dict.fromkeys(self.reads, self.event_dim)
        names = self.reads if self.label is None else (*self.reads, self.label)
        rows = context_rows({n: context[n] for n in names}, tuple(batch), dims, x.device)
        parts = [flatten_batch(x, self.event_dim), flatten_batch(denoised, self.event_dim)]
        inputs = torch.cat([*parts, *(rows[n].to(x) for n in self.reads)], 1)
        time = torch.full((len(inputs),), float(t), dtype=x.dtype, device=x.device)
        label = () if self.label is None else (rows[self.label],)
        out: Tensor = self.network(inputs, time, *label)[:, : event[0]]
        return out.reshape(x.shape)


class Langevin(nn.Module):
    r"""A control that knows where the reward rises (Venkatraman et al. 2024, eq. 11),

    .. math:: u_t = \text{head}_t + a_t \nabla \log r(\hat x_0), \qquad a_t = 0 \text{ at first},

    with the gradient taken at the estimate of x_0, where r is defined, and detached.

    Args:
        head: another control, such as a :class:`Head`.
        log_reward: maps x_0 of shape ``(*batch, *event)`` to log r of shape ``(*batch,)``.
        num_steps: T.
        clip: bounds every element of the gradient.
        reads: names of the context that log_reward takes as well, after x_0.
        gain: :math:`a_t` as a control of its own, zero at first, whose values broadcast with x
            (None: a number per step).
    """

    def __init__(
        self,
        head: nn.Module,
        log_reward: Callable[..., Tensor],
        num_steps: int,
        clip: float = 100.0,
        reads: Sequence[str] = (),
        gain: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_steps", num_steps)
        self.head, self.log_reward, self.clip, self.reads = head, log_reward, clip, tuple(reads)
        per_step = nn.Parameter(torch.zeros(num_steps + 1))
        self.gain: nn.Module | nn.Parameter = per_step if gain is None else gain

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        with torch.enable_grad():
            point = denoised.detach().requires_grad_()
            log_r = self.log_reward(point, *(context[n] for n in self.reads))
            (gradient,) = torch.autograd.grad(log_r.sum(), point)
        clipped = gradient.nan_to_num(0.0).clamp(-self.clip, self.clip)
        u: Tensor = self.head(x, t, denoised, **context)
        if isinstance(self.gain, nn.Module):
            return u + self.gain(x, t, denoised, **context) * clipped
        return u + _row(self.gain, t) * clipped


class Preconditioned(nn.Module):
    r"""A control in the units that the transitions set,

    .. math:: u_t = \sqrt{\frac{k_t^2 v_t}{1 + k_t^2 v_t}}\, \text{control}_t, \qquad
              k_t^2 = \mathrm{SNR}_{t-1} - \mathrm{SNR}_t,

    with :math:`v_t = \mathrm{Var}(x_0 | x_t)` by the process's ``signal``: where a control is one,
    the estimate of x_0 moves by one of its standard deviations. Without these units a network must
    learn that a step in pure noise decides next to nothing.

    Args:
        control: another control, such as a :class:`Head`.
        base: the process that is controlled.

    Raises:
        ValueError: the process does not say how x_t depends on x_0.
    """

    units: Tensor

    def __init__(self, control: nn.Module, base: Process) -> None:
        super().__init__()
        self.control = control
        units = [torch.ones(())]  # nothing reads the one of t = 0
        signals = [base.signal(t) for t in range(base.num_steps + 1)]
        for before, now in itertools.pairwise(signals):
            if before is None or now is None:
                raise ValueError(
                    f"{type(base).__name__} does not say how x_t depends on x_0 (its signal is "
                    "None), which sets the units: use the control without them"
                )
            rate = (before.precision - now.precision) * now.spread
            rate = torch.as_tensor(rate, dtype=torch.float64)
            units.append((1 - 1 / (1 + rate)).sqrt())
        self.register_buffer("units", torch.stack(torch.broadcast_tensors(*units)))

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        u: Tensor = self.control(x, t, denoised, **context)
        return self.units[t].to(u) * u


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
        return torch.exp(self.bound * torch.tanh(_row(self.log_scale, t) / self.bound))


def _row(table: Tensor, t: int) -> Tensor:
    """What a table with a row for t = 0, ..., T says of t."""
    if t >= len(table):
        raise ValueError(
            f"this part of a guide was made with num_steps={len(table) - 1}, but the process is at "
            f"step t = {t}: give it the process's num_steps"
        )
    return table[t]
