r"""A transition of masked diffusion that reveals a fixed number of positions.

Of the m masked positions of x_t a random set S of :math:`k = \lceil m / t \rceil` is revealed, with
tokens that are independent given x_t:

.. math:: p(x_{t-1} \mid x_t) = \binom{m}{k}^{-1} \prod_{l \in S} p(x_0^l = x_{t-1}^l \mid x_t).
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from pyro.distributions import TorchDistribution
from torch import Size, Tensor


class EvenReveal(TorchDistribution):
    """The law of x_{t-1}.

    Args:
        x: x_t; masked positions hold the number of tokens.
        t: how many steps remain, this one among them.
        tokens: normalised log-probabilities of the tokens at every position.
    """

    arg_constraints: dict[str, Any] = {}
    support = torch.distributions.constraints.independent(
        torch.distributions.constraints.nonnegative_integer, 1
    )

    def __init__(
        self,
        x: Int64[Tensor, "*batch length"],
        t: int,
        tokens: Float[Tensor, "*batch length token"],
    ) -> None:
        self.x, self.t, self.tokens = x, t, tokens
        self.masked = x == tokens.shape[-1]
        self.left = self.masked.sum(-1)
        self.count = (self.left + t - 1) // t
        super().__init__(x.shape[:-1], x.shape[-1:], validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.x.shape)
        order = torch.rand(shape, device=self.x.device).masked_fill(~self.masked, 2.0)
        chosen = order.argsort(-1).argsort(-1) < self.count[..., None]
        law = torch.distributions.Categorical(logits=self.tokens, validate_args=False)
        return torch.where(chosen, law.sample(Size(sample_shape)), self.x)

    def log_prob(self, value: Tensor) -> Float[Tensor, "*batch"]:
        changed = value != self.x
        allowed = ~changed | (self.masked & (value >= 0) & (value < self.tokens.shape[-1]))
        fits = (changed.sum(-1) == self.count) & allowed.all(-1)
        tokens = value.clamp(0, self.tokens.shape[-1] - 1)
        logits = self.tokens.double().expand(*value.shape, -1)
        drawn = logits.gather(-1, tokens[..., None])[..., 0].masked_fill(~changed, 0.0).sum(-1)
        left, count = self.left.double(), self.count.double()
        sets = torch.lgamma(left + 1) - torch.lgamma(count + 1) - torch.lgamma(left - count + 1)
        return torch.where(fits, drawn - sets, -torch.inf)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EvenReveal":
        batch = Size(batch_shape)
        x, logits = self.x.expand(*batch, -1), self.tokens.expand(*batch, -1, -1)
        return EvenReveal(x, self.t, logits)
