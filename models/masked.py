r"""Masked (absorbing-state) discrete diffusion.

A token is still masked at t with probability :math:`1 - \alpha_t`. One reverse step reveals each
masked position independently with probability

.. math:: u_t = \frac{\alpha_{t-1} - \alpha_t}{1 - \alpha_t},

with a token from the network's probabilities given what is revealed; revealed tokens stay. At t = 1
everything is revealed. The *chain* is the prior: revealing positions in parallel is not exact.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor, nn

from smcdiff.process import Kernel, Process, Tree, context_rows, flatten_batch


class MaskedDiffusion(Process):
    """A masked diffusion model over ``length`` tokens of a vocabulary.

    Args:
        network: ``network(tokens, **context)`` maps tokens of shape ``(batch, length)``, with the
            id ``vocabulary`` for masked ones, to logits of shape ``(batch, length, vocabulary)``.
        length: the number of positions.
        vocabulary: the number of tokens, the mask not counted.
        alphas: alpha_0 = 1 > ... > alpha_T = 0 (None: equal steps).
        num_steps: T, if ``alphas`` is not given.
        context_dims: event dimensions of context tensors by name (0 if not named: labels).
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        length: int,
        vocabulary: int,
        alphas: Sequence[float] | None = None,
        num_steps: int | None = None,
        context_dims: Mapping[str, int] | None = None,
    ) -> None:
        if (alphas is None) == (num_steps is None):
            raise ValueError("give either alphas or num_steps")
        steps = num_steps if alphas is None else len(alphas) - 1
        assert steps is not None
        given = alphas if alphas is not None else [1 - t / steps for t in range(steps + 1)]
        self.alphas = [float(a) for a in given]
        falls = all(a > b for a, b in zip(self.alphas, self.alphas[1:], strict=False))
        if not falls or self.alphas[0] != 1.0 or self.alphas[-1] != 0.0:
            raise ValueError(f"alphas must fall from 1 to 0, one per step, but got {self.alphas}")
        self.network, self.vocabulary, self.num_steps = network, vocabulary, steps
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
        """u_t."""
        return (self.alphas[t - 1] - self.alphas[t]) / (1 - self.alphas[t])

    def initial(self, **context: Any) -> Distribution:
        tokens = torch.full(tuple(self.event_shape), self.mask, device=self.device)
        return dist.Delta(tokens, event_dim=1)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        batch = x.shape[:-1]
        rows = context_rows(context, batch, self.context_dims)
        logits = self.network(flatten_batch(x, 1), **rows)
        wanted = (batch.numel(), *self.event_shape, self.vocabulary)
        if tuple(logits.shape) != wanted:
            raise ValueError(
                f"the network returned logits of shape {tuple(logits.shape)}, but {wanted} is "
                "needed: (batch, length, vocabulary), without a column for the mask"
            )
        return {"logits": logits.reshape(*x.shape, self.vocabulary)}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        masked = (x == self.mask)[..., None]
        tokens = evaluation["logits"].log_softmax(-1)
        known = _one_hot_logits(x.clamp(max=self.vocabulary - 1), self.vocabulary, tokens)
        denoised = torch.where(masked, tokens, known)
        u = torch.tensor(self.reveal_probability(t), dtype=tokens.dtype, device=x.device)
        stay = torch.log1p(-u).expand(*x.shape, 1)
        change = torch.cat([tokens + u.log(), stay], -1)
        logits = torch.where(masked, change, _one_hot_logits(x, self.vocabulary + 1, tokens))
        return Kernel(_categorical(logits), _categorical(denoised))


def _categorical(logits: Tensor) -> Distribution:
    return dist.Categorical(logits=logits, validate_args=False).to_event(1)


def _one_hot_logits(tokens: Tensor, size: int, like: Tensor) -> Tensor:
    """log 1 at the token, log 0 elsewhere."""
    hot = torch.nn.functional.one_hot(tokens, size).bool()
    return torch.zeros_like(hot, dtype=like.dtype).masked_fill(~hot, -torch.inf)
