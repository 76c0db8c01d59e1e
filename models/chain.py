"""Chains: one process's result is the next one's source (a small prior for x_T, cascades)."""

from collections.abc import Callable
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor

from smcdiff.arguments import check_callable, check_kind
from smcdiff.process import Kernel, Process, Signal, Tree


class Chain(Process):
    r"""Two processes in turn, as one process with the steps of both.

    With S the steps of ``second``, a state at t > S is one of ``first`` and a state at t <= S one
    of ``second``. With a ``link`` there is one step more, from first's x_0 to second's x_S.

    Args:
        first: makes the source.
        second: starts from it.
        link: the law of second's noise given first's result (None: they are equal).
    """

    def __init__(
        self,
        first: Process,
        second: Process,
        link: Callable[[Tensor], Distribution] | None = None,
    ) -> None:
        check_kind("first", first, Process, "Diffusion(network, ...)")
        check_kind("second", second, Process, "Diffusion(network, ...)")
        check_callable("link", link, "lambda x: Normal(x, 0.1).to_event(1)", optional=True)
        if link is None and first.event_shape != second.shape_at(second.num_steps):
            raise ValueError(
                f"first ends with shape {tuple(first.event_shape)} and second starts with "
                f"{tuple(second.shape_at(second.num_steps))}: give a link, the law of one given "
                "the other"
            )
        self.first, self.second, self.link = first, second, link
        self.border = second.num_steps + (link is not None)
        self.num_steps = first.num_steps + self.border
        self.event_shape = second.event_shape

    @property
    def deterministic(self) -> bool:
        return self.link is None and self.first.deterministic and self.second.deterministic

    def shape_at(self, t: int) -> Size:
        if t > self.second.num_steps:
            return self.first.shape_at(t - self.border)
        return self.second.shape_at(t)

    def initial(self, **context: Any) -> Distribution:
        return self.first.initial(**context)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        """In first's part, second is asked as well: what x_0 would first's result become?"""
        last = self.second.num_steps
        if t <= last:
            return {"second": self.second.evaluate(x, t, **context)}
        if t <= self.border:
            return {"second": self.second.evaluate(self._source(x), last, **context)}
        first = self.first.evaluate(x, t - self.border, **context)
        result = self.first.kernel(x, t - self.border, first, **context).denoised.mean
        second = self.second.evaluate(self._source(result), last, **context)
        return {"first": first, "second": second}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        last = self.second.num_steps
        if t <= last:
            return self.second.kernel(x, t, evaluation["second"], **context)
        if t <= self.border:
            assert self.link is not None
            ahead = self.second.kernel(self._source(x), last, evaluation["second"], **context)
            return Kernel(self.link(x), ahead.denoised)
        kernel = self.first.kernel(x, t - self.border, evaluation["first"], **context)
        source = self._source(kernel.denoised.mean)
        ahead = self.second.kernel(source, last, evaluation["second"], **context)
        return Kernel(kernel.law, ahead.denoised)

    def signal(self, t: int) -> Signal | None:
        return self.second.signal(t) if t <= self.second.num_steps else None

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        return self.second.bridge(x_0, x, t) if t <= self.second.num_steps else None

    def calls(self, t: int) -> int:
        if t <= self.second.num_steps:
            return self.second.calls(t)
        ahead = self.second.calls(self.second.num_steps)
        return ahead if t <= self.border else ahead + self.first.calls(t - self.border)

    def _source(self, result: Tensor) -> Tensor:
        """Second's most likely noise for a result of first."""
        return result if self.link is None else self.link(result).mean
