r"""What a network of a masked diffusion is trained to predict: the evidence lower bound.

In continuous time the bound of masked diffusion (Sahoo et al. 2024, arXiv 2406.07524, equation 10)
weighs the log-probabilities of masked tokens by the rate at which they are revealed. A network that
is not told the time sees nothing of it but *how many* tokens are masked, and the integral over time
leaves a sum over their number (Ou et al. 2024, arXiv 2406.03736):

.. math:: -\log p(x_0) \le L\, E_{k \sim U\{1..L\}} E_{M: |M| = k}
          \Big[ -\frac{1}{k} \sum_{l \in M} \log p_\theta(x_0^l \mid x_0^{\setminus M}) \Big].

It is the bound of *any* reveal schedule in the limit of many steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .objectives import Trainable


class MaskedTable(NamedTuple):
    """The number of masked tokens per level."""

    masked: Int64[Tensor, " levels"]


@dataclass(frozen=True)
class MaskedObjective(Trainable):
    """The bound on the negative log-likelihood per position, in nats.

    Attributes:
        length: L, the number of positions, and of levels of noise.
        vocabulary: the number of tokens, the mask not counted; the mask's id.
    """

    length: int
    vocabulary: int

    @property
    def table(self) -> MaskedTable:
        """Everything that depends on the level alone."""
        return MaskedTable(torch.arange(1, self.length + 1))

    def draw(self, count: int) -> Int64[Tensor, " count"]:
        """Levels that cover all of them evenly, in rising order."""
        shares = torch.arange(count, dtype=torch.float64) + torch.rand(count, dtype=torch.float64)
        return (shares / count * self.length).long().clamp(max=self.length - 1)

    def noise(self, x0: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
        """One uniform number per position: the smallest are masked."""
        return torch.rand(x0.shape)

    def loss(
        self,
        network: Callable[..., Tensor],
        x0: Int64[Tensor, "batch length"],
        level: Int64[Tensor, " batch"],
        noise: Float[Tensor, "batch length"],
        label: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """The mean of -log p over the masked positions, of ``network(tokens)`` or with a label."""
        count = self.table.masked.to(level.device)[level].to(x0.device)[:, None]
        masked = noise.argsort(-1).argsort(-1) < count
        tokens = x0.masked_fill(masked, self.vocabulary)
        logits = network(tokens) if label is None else network(tokens, label)
        log_prob = logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
        return -(log_prob * masked).sum(-1) / count[:, 0]
