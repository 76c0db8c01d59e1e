r"""Controlled processes: a base process and a learned or given change of its transitions.

.. math:: x_{t-1} \sim N(m_t(x_t) + V_t^{1/2} u_t(x_t),\; \rho_t^2 V_t) \quad\text{or}\quad
          x_{t-1} \sim \mathrm{Categorical}(\text{logits}_t(x_t) + u_t(x_t)) .

With unchanged variance the divergence from the base is :math:`\tfrac12 |u_t|^2` per step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor, nn

from smcdiff.arguments import check_callable, check_kind, check_names
from smcdiff.laws import base_law
from smcdiff.process import (
    Context,
    Kernel,
    Process,
    Signal,
    Tree,
    is_deterministic,
    is_label,
)

from .controls import Reader


class Controlled(Process):
    """A process plus a control, built on one evaluation of its base.

    Args:
        base: the process that is changed (itself frozen).
        control: ``control(x, t, denoised, **context)`` with the batch shape of x; returns u with
            the shape of x (for discrete processes, with the shape of the logits). ``denoised`` is
            the mean of the base's law of x_0 (probabilities, if discrete).
        initial: another law of x_T (None: the base's).
        scale: :math:`\\rho_t`, a function of t (None: 1).
        reads: names of the context that control and initial read and the base does not know: what
            a guide is conditional on.

    Where control, initial and scale are modules they are trainable: their parameters are registered
    with Pyro as ``<name>.control``, ``<name>.initial`` and ``<name>.scale``.
    """

    def __init__(
        self,
        base: Process,
        control: Callable[..., Tensor],
        initial: Callable[..., Distribution] | None = None,
        scale: Callable[[int], Tensor | float] | None = None,
        reads: Sequence[str] = (),
    ) -> None:
        check_kind("base", base, Process, "Diffusion(network, ...)")
        check_callable("control", control, "lambda x, t, denoised: ...")
        check_callable("initial", initial, "lambda: Normal(zero, 1).to_event(1)", optional=True)
        check_callable("scale", scale, "lambda t: 1.0", optional=True)
        check_names("reads", reads)
        self.base, self.control, self._initial, self.scale = base, control, initial, scale
        self._check_events(control)
        self.reads = frozenset(reads)
        self.num_steps, self.event_shape = base.num_steps, base.event_shape

    def extends(self, other: Process, theirs: Context, context: Context) -> bool:
        own = self._known(context)
        return (
            other is self.base
            and own.keys() == theirs.keys()
            and all(_same(value, theirs[key]) for key, value in own.items())
        )

    @property
    def closed_form(self) -> bool:
        return self.base.closed_form

    @property
    def deterministic(self) -> bool:
        return self.base.deterministic

    def shape_at(self, t: int) -> Size:
        return self.base.shape_at(t)

    def initial(self, **context: Any) -> Distribution:
        if self._initial is None:
            return self.base.initial(**self._known(context))
        return self._initial(**context)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        return self.extend(self.base.evaluate(x, t, **self._known(context)), x, t, **context)

    def extend(self, evaluation: Tree, x: Tensor, t: int, **context: Any) -> Tree:
        kernel = self.base.kernel(x, t, evaluation, **self._known(context))
        if is_deterministic(kernel.law):  # nothing to steer where the base has no variance
            return {"base": evaluation}
        u = self.control(x, t, _mean(kernel.denoised), **context)
        wanted = _parameter(kernel.law).shape
        if u.shape != wanted:
            raise ValueError(
                f"the control returned shape {tuple(u.shape)} at step t = {t}, but the transition "
                f"needs {tuple(wanted)}"
            )
        return {"base": evaluation, "control": u}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        kernel = self.base.kernel(x, t, evaluation["base"], **self._known(context))
        if "control" not in evaluation:
            return kernel
        scale = 1.0 if self.scale is None else self.scale(t)
        law = _changed(kernel.law, evaluation["control"], scale)
        return Kernel(law, kernel.denoised, kernel.covariance)

    def signal(self, t: int) -> Signal | None:
        return self.base.signal(t)

    def calls(self, t: int) -> int:
        return self.base.calls(t)

    def members(self, name: str) -> tuple[str, ...]:
        return self.base.members(name)

    def split(self, name: str, x: Tensor) -> dict[str, Tensor]:
        return self.base.split(name, x)

    def join(self, name: str, xs: dict[str, Tensor]) -> Tensor:
        return self.base.join(name, xs)

    def split_law(self, name: str, law: Distribution) -> dict[str, Distribution]:
        return self.base.split_law(name, law)

    def member_dim(self, name: str, member: str) -> int:
        return self.base.member_dim(name, member)

    def register(self, name: str) -> None:
        parts = {"control": self.control, "initial": self._initial, "scale": self.scale}
        for part, function in parts.items():
            if isinstance(function, nn.Module):
                pyro.module(f"{name}.{part}", function)

    def _check_events(self, control: Callable[..., Tensor]) -> None:
        shape = tuple(self.base.event_shape)
        for part in control.modules() if isinstance(control, nn.Module) else ():
            if isinstance(part, Reader) and part.event_dim != len(shape):
                raise ValueError(
                    f"the {type(part).__name__} was made with event_dim={part.event_dim}, but "
                    f"events of {type(self.base).__name__} have shape {shape}: "
                    f"give it event_dim={len(shape)}"
                )

    def _known(self, context: Context) -> dict[str, Any]:
        """What the base knows of the context."""
        return {key: value for key, value in context.items() if key not in self.reads}


def _same(a: Any, b: Any) -> bool:
    device = next((v.device for v in (a, b) if isinstance(v, Tensor)), None)
    a, b = (torch.tensor(int(v), device=device) if is_label(v) else v for v in (a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.device == b.device and bool((a == b).all()))
    return a is b or (type(a) is type(b) and bool(a == b))


def _mean(law: Distribution) -> Tensor:
    law = base_law(law)
    mean: Tensor = law.probs if isinstance(law, torch.distributions.Categorical) else law.mean
    return mean


def _parameter(law: Distribution) -> Tensor:
    law = base_law(law)
    value: Tensor = law.logits if isinstance(law, torch.distributions.Categorical) else law.mean
    return value


def _changed(law: Distribution, u: Tensor, scale: Tensor | float) -> Distribution:
    """The law with its mean moved by u standard deviations, or its logits by u."""
    match law:
        case torch.distributions.Independent():
            changed = _changed(law.base_dist, u, scale)
            return dist.Independent(changed, law.reinterpreted_batch_ndims)
        case torch.distributions.Normal():
            return dist.Normal(law.loc + law.scale * u, law.scale * scale, validate_args=False)
        case torch.distributions.Categorical():
            return dist.Categorical(logits=law.logits + u, validate_args=False)
    raise TypeError(f"a transition of type {type(law).__name__} cannot be controlled")
