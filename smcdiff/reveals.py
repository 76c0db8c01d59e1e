r"""A transition of masked diffusion that reveals a fixed number of positions.

Of the m masked positions of x_t a random set S of :math:`k = \lceil m / t \rceil` is revealed, with
tokens that are independent given x_t:

.. math:: p(x_{t-1} \mid x_t) = \binom{m}{k}^{-1} \prod_{l \in S} p(x_0^l = x_{t-1}^l \mid x_t).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from pyro.distributions import TorchDistribution
from torch import Size, Tensor


class EvenReveal(TorchDistribution):
    """The law of x_{t-1}.

    Args:
        x: x_t; masked positions hold the number of tokens.
        t: how many steps remain, this one among them.
        tokens: log-probabilities of the tokens at every position, up to a constant.
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
        law = torch.distributions.Categorical(logits=self._rows(chosen), validate_args=False)
        x = self.x.expand(shape).clone()
        x[chosen] = law.sample()
        return x

    def log_prob(self, value: Tensor) -> Float64[Tensor, "*batch"]:
        changed = value != self.x
        allowed = ~changed | (self.masked & (value >= 0) & (value < self.tokens.shape[-1]))
        fits = (changed.sum(-1) == self.count) & allowed.all(-1)
        drawn = value[changed].clamp(0, self.tokens.shape[-1] - 1)
        tokens = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
        tokens[changed] = self._rows(changed).gather(-1, drawn[:, None])[:, 0]
        left, count = self.left.double(), self.count.double()
        sets = torch.lgamma(left + 1) - torch.lgamma(count + 1) - torch.lgamma(left - count + 1)
        return torch.where(fits, tokens.sum(-1) - sets, -torch.inf)

    def _rows(self, where: Bool[Tensor, "*batch length"]) -> Float64[Tensor, "chosen token"]:
        """The law of the token at each chosen position."""
        rows = self.tokens.expand(*where.shape, -1)[where]
        return rows.double().log_softmax(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EvenReveal":
        batch = Size(batch_shape)
        x, tokens = self.x.expand(*batch, -1), self.tokens.expand(*batch, -1, -1)
        return EvenReveal(x, self.t, tokens)
