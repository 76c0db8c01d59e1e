r"""Masked (absorbing-state) discrete diffusion.

A token is still masked at t with probability :math:`1 - \alpha_t`. One reverse step reveals each
masked position independently with probability

.. math:: u_t = \frac{\alpha_{t-1} - \alpha_t}{1 - \alpha_t},

with a token from the network's probabilities given what is revealed; revealed tokens stay. At t = 1
everything is revealed. The *chain* is the prior: revealing positions in parallel is not exact.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor, nn

from smcdiff.arguments import check_kind, check_option, check_whole
from smcdiff.process import Kernel, Process, Tree, context_rows, flatten_batch
from smcdiff.reveals import EvenReveal

from .calls import check_network

Reveal = Literal["independent", "even"]


class MaskedDiffusion(Process):
    r"""A masked diffusion model over ``length`` tokens of a vocabulary.

    In a program, ``prior("x", given=tokens)`` clamps tokens (infilling): they are there from the
    start, whatever is not given has the id of the mask, and the law is that of the chain which
    starts there. ``given`` has shape ``(*batch, length)``.

    Args:
        network: ``network(tokens, **context)`` maps tokens of shape ``(batch, length)``, with the
            id ``vocabulary`` for masked ones, to logits of shape ``(batch, length, vocabulary)``.
        length: the number of positions.
        vocabulary: the number of tokens, the mask not counted.
        alphas: the reveal schedule: alpha_0 = 1 >= ... >= alpha_T = 0, or a function that falls
            from 1 at 0 to 0 at 1 (None: equal steps).
        num_steps: T, if ``alphas`` does not say it.
        context_dims: event dimensions of context tensors by name (0 if not named: labels).
        reveal: ``"independent"``: every position by itself, with probability u_t. ``"even"``: of
            m masked positions exactly :math:`\lceil m / t \rceil`, drawn at random, without
            ``alphas``. With as many steps as positions that is one at a time, and then an exact
            network makes the chain exact.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        length: int,
        vocabulary: int,
        alphas: Sequence[float] | Callable[[float], float] | None = None,
        num_steps: int | None = None,
        context_dims: Mapping[str, int] | None = None,
        reveal: Reveal = "independent",
    ) -> None:
        check_option("reveal", reveal, get_args(Reveal))
        check_network("network", network, context_dims)
        check_whole("length", length)
        check_whole("vocabulary", vocabulary)
        if reveal == "even" and alphas is not None:
            raise ValueError("reveal='even' needs no alphas: give num_steps alone")
        self.alphas = _schedule(alphas, num_steps)
        self.network, self.vocabulary, self.reveal = network, vocabulary, reveal
        self.num_steps = len(self.alphas) - 1
        self.event_shape, self.context_dims = Size([length]), dict(context_dims or {})
        self.device = torch.device("cpu")
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False)
            tensors = [*network.parameters(), *network.buffers()]
            self.device = tensors[0].device if tensors else self.device

    @property
    def mask(self) -> int:
        """The id of the mask."""
        return self.vocabulary

    def reveal_probability(self, t: int) -> float:
        """u_t (1 where nothing can be masked any more)."""
        masked = 1 - self.alphas[t]
        return (self.alphas[t - 1] - self.alphas[t]) / masked if masked > 0 else 1.0

    def initial(self, given: Tensor | None = None, **context: Any) -> Distribution:
        if given is None:
            given = torch.full(tuple(self.event_shape), self.mask, device=self.device)
        else:
            self._check_given(given)
            given = given.long()
        return dist.Delta(given, event_dim=1)

    def evaluate(self, x: Tensor, t: int, given: Tensor | None = None, **context: Any) -> Tree:
        batch = x.shape[:-1]
        rows = context_rows(context, batch, self.context_dims, x.device)
        logits = self.network(flatten_batch(x, 1), **rows)
        wanted = (batch.numel(), *self.event_shape, self.vocabulary)
        if tuple(logits.shape) != wanted:
            raise ValueError(
                f"the network returned logits of shape {tuple(logits.shape)}, but {wanted} is "
                "needed: (batch, length, vocabulary), without a column for the mask"
            )
        logits = logits.reshape(*x.shape, self.vocabulary)
        self._check_possible(x, t, logits)
        return {"logits": logits}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        masked = (x == self.mask)[..., None]
        tokens = evaluation["logits"].log_softmax(-1)
        known = _one_hot_logits(x.clamp(max=self.vocabulary - 1), self.vocabulary, tokens)
        denoised = torch.where(masked, tokens, known)
        if self.reveal == "even":
            return Kernel(EvenReveal(x, t, denoised), _categorical(denoised))
        u = torch.tensor(self.reveal_probability(t), dtype=tokens.dtype, device=x.device)
        stay = torch.log1p(-u).expand(*x.shape, 1)
        change = torch.cat([tokens + u.log(), stay], -1)
        logits = torch.where(masked, change, _one_hot_logits(x, self.vocabulary + 1, tokens))
        return Kernel(_categorical(logits), _categorical(denoised))

    def _check_given(self, given: Tensor) -> None:
        check_kind("given", given, Tensor, "torch.tensor(...) of the tokens' numbers")
        whole = not given.is_floating_point() and given.dtype != torch.bool
        shaped = given.shape[-1:] == self.event_shape
        if not (whole and shaped and bool(((given >= 0) & (given <= self.mask)).all())):
            found = f"{given.dtype} with shape {tuple(given.shape)}"
            if whole and given.numel():
                found += f" and values from {int(given.min())} to {int(given.max())}"
            raise ValueError(
                f"given must hold whole numbers with shape (*batch, {self.event_shape[0]}), tokens "
                f"from 0 to {self.mask - 1} or {self.mask} where the token is not known, but it is "
                f"{found}"
            )

    def _check_possible(self, x: Tensor, t: int, logits: Tensor) -> None:
        """A masked position needs a token that is possible."""
        bad = (logits.amax(-1) == -torch.inf) & (x == self.mask)
        if bool(bad.any()):
            raise ValueError(
                f"the network's logits leave no token possible (all of them are -inf) at position "
                f"{int(bad.nonzero()[0, -1])} of a state at step t = {t}, and at "
                f"{int(bad.sum())} masked positions in all: leave at least one token finite"
            )


def _schedule(
    alphas: Sequence[float] | Callable[[float], float] | None, num_steps: int | None
) -> list[float]:
    """alpha_0, ..., alpha_T."""
    if (num_steps is None) == (alphas is None or callable(alphas)):
        raise ValueError(
            "give either alphas or num_steps (both only where alphas is a function on [0, 1]), but "
            f"got alphas={alphas!r} and num_steps={num_steps!r}"
        )
    if num_steps is not None:
        check_whole("num_steps", num_steps)
        times = [t / num_steps for t in range(num_steps + 1)]
        alphas = [alphas(time) if callable(alphas) else 1 - time for time in times]
    table = [float(alpha) for alpha in alphas]  # type: ignore[union-attr]  # a sequence by now
    falls = all(a >= b for a, b in zip(table, table[1:], strict=False))
    if len(table) < 2 or not falls or table[0] != 1.0 or table[-1] != 0.0:
        raise ValueError(f"alphas must fall from 1 to 0, one per step, but got {table}")
    return table


def _categorical(logits: Tensor) -> Distribution:
    return dist.Categorical(logits=logits, validate_args=False).to_event(1)


def _one_hot_logits(tokens: Tensor, size: int, like: Tensor) -> Tensor:
    """log 1 at the token, log 0 elsewhere."""
    hot = torch.nn.functional.one_hot(tokens, size).bool()
    return torch.zeros_like(hot, dtype=like.dtype).masked_fill(~hot, -torch.inf)
