r"""Controls that are zero before they learn: what a :class:`~smcdiff.models.Controlled` guide adds.

A control is called as ``control(x, t, denoised, **context)`` and says by how many of its standard
deviations a transition moves.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smcdiff.arguments import check_kind, check_names, check_whole
from smcdiff.process import Process, Signal, context_rows, flatten_batch


class Reader(nn.Module, ABC):
    """A network that reads states, time and context, and whose last layer starts from zero."""

    def __init__(
        self, network: nn.Module, event_dim: int, reads: Sequence[str], label: str | None
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

    @abstractmethod
    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        """By how many standard deviations the transition moves."""

    def _ask(self, states: Sequence[Tensor], t: int, context: dict[str, Any]) -> Tensor:
        """The network's answer with one batch axis: states and reads side by side, time, label."""
        x = states[0]
        dims = dict.fromkeys(self.reads, self.event_dim)
        names = self.reads if self.label is None else (*self.reads, self.label)
        batch = tuple(x.shape[: x.dim() - self.event_dim])
        rows = context_rows({n: context[n] for n in names}, batch, dims, x.device)
        parts = [flatten_batch(state, self.event_dim) for state in states]
        inputs = torch.cat([*parts, *(rows[n].to(x) for n in self.reads)], 1)
        time = torch.full((len(inputs),), float(t), dtype=x.dtype, device=x.device)
        label = () if self.label is None else (rows[self.label],)
        answer: Tensor = self.network(inputs, time, *label)
        return answer


class Head(Reader):
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
        super().__init__(network, event_dim, reads, label)

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        out = self._ask((x, denoised), t, context)[:, : x.shape[x.dim() - self.event_dim]]
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
        return u + row(self.gain, t) * clipped


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
        self.register_buffer("units", _units(base))

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        u: Tensor = self.control(x, t, denoised, **context)
        return self.units[t].to(u) * u


class Potential(Reader):
    r"""A control that climbs a learned potential V of the noisy state,

    .. math:: u_t = a_t \sqrt{\frac{k_t^2 v_t}{1 + k_t^2 v_t}} \, \frac{\sigma_t^2}{\alpha_t
              \sqrt{v_t}} \nabla_{x_t} V(x_t, t), \qquad a_t = 1 \text{ at first},

    in the notation of :class:`Preconditioned`. By Tweedie's formula the last fraction with its
    gradient is how much higher the mean of x_0 is under :math:`e^V p(x_t)`, in standard deviations.
    With :math:`V = \log E[r(x_0) | x_t]`, Doob's h-transform, transitions that are right about the
    variance have the posterior's means; this is classifier guidance (Dhariwal & Nichol 2021) with a
    classifier that learns. A number is learned from far fewer trajectories than a :class:`Head`,
    which gives one per element; and :meth:`value` can learn from anything else first, such as the
    rewards of draws at every noise level.

    Args:
        network: ``network(inputs, time)`` with inputs of shape ``(batch, channels, *rest)``: x_t
            and what else is read, side by side in the first event dimension; and time t of shape
            ``(batch,)``. Returns V, one number per row. Its last linear or convolutional layer is
            set to zero.
        base: the process that is controlled.
        reads: names of context tensors, with as many dimensions as an event, that are inputs too.
        label: the name of a context tensor of whole numbers, which the network gets as a third
            argument, of shape ``(batch,)`` (None: it has two).

    Raises:
        ValueError: the process does not say how x_t depends on x_0.
    """

    factors: Tensor

    def __init__(
        self,
        network: nn.Module,
        base: Process,
        reads: Sequence[str] = (),
        label: str | None = None,
    ) -> None:
        check_kind("base", base, Process, "Diffusion(network, ...)")
        super().__init__(network, len(base.event_shape), reads, label)
        units = _units(base)
        self.register_buffer("factors", units * _per_gradient(base))
        self.gain = nn.Parameter(torch.ones(base.num_steps + 1))

    def value(self, x: Tensor, t: int, **context: Any) -> Tensor:
        """V(x_t, t), with the batch shape of x."""
        batch = x.shape[: x.dim() - self.event_dim]
        values = self._ask((x,), t, context)
        if values.numel() != batch.numel():
            raise ValueError(
                f"the network of a potential returns one number per row, but for {batch.numel()} "
                f"rows it returned shape {tuple(values.shape)}"
            )
        return values.reshape(batch)

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            value = self.value(point, t, **context).sum()
            (gradient,) = torch.autograd.grad(value, point, create_graph=learning)
        u: Tensor = row(self.gain, t) * row(self.factors, t).to(x) * gradient
        return u


def _units(base: Process) -> Tensor:
    """By how many of its standard deviations a transition moves if the mean of x_0 moves by one."""
    units = [torch.ones(())]  # nothing reads the one of t = 0
    for before, now in itertools.pairwise(_signals(base)):
        rate = (before.precision - now.precision) * now.spread
        units.append((1 - 1 / (1 + torch.as_tensor(rate, dtype=torch.float64))).sqrt())
    return torch.stack(torch.broadcast_tensors(*units))


def _per_gradient(base: Process) -> Tensor:
    """Standard deviations by which the mean of x_0 moves per unit of a gradient in x_t."""
    found = [torch.zeros(())]  # nothing reads the one of t = 0
    for signal in _signals(base)[1:]:
        slope, spread = (
            torch.as_tensor(v, dtype=torch.float64) for v in (signal.slope, signal.spread)
        )
        # where x_t is noise alone the slope is zero, and so are gradients
        found.append(torch.where(slope > 0, spread.sqrt() / slope, 0.0))
    return torch.stack(torch.broadcast_tensors(*found))


def _signals(base: Process) -> list[Signal]:
    found = [base.signal(t) for t in range(base.num_steps + 1)]
    known = [signal for signal in found if signal is not None]
    if len(known) < len(found):
        raise ValueError(
            f"{type(base).__name__} does not say how x_t depends on x_0 (its signal is None), "
            "which sets the units: use a control without them"
        )
    return known


def row(table: Tensor, t: int) -> Tensor:
    """What a table with a row for t = 0, ..., T says of t."""
    if t >= len(table):
        raise ValueError(
            f"this part of a guide was made with num_steps={len(table) - 1}, but the process is at "
            f"step t = {t}: give it the process's num_steps"
        )
    return table[t]
