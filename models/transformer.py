r"""A small bidirectional transformer over tokens, for :class:`~smcdiff.models.MaskedDiffusion`.

It is called as ``network(tokens)`` with tokens of shape `batch length`, the id ``vocabulary`` for
masked ones, and returns logits of shape `batch length vocabulary`. It knows no time: how many
tokens are masked says it already. Nothing mixes the samples of a batch, and nothing is random in
the forward pass.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

Hidden = Float[Tensor, "batch length width"]


class Transformer(nn.Module):
    r"""Blocks of attention and perceptron with residual connections,

    .. math:: h \leftarrow h + \mathrm{attention}(\mathrm{norm}(h)), \qquad
              h \leftarrow h + \mathrm{perceptron}(\mathrm{norm}(h)).

    Args:
        vocabulary: Number of tokens, the mask not counted.
        length: Number of positions.
        width: Number of hidden units per position.
        depth: Number of blocks.
        heads: Number of attention heads; divides `width`.
    """

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} must divide the width, got width={width}")
        self.length = length
        self.tokens = nn.Embedding(vocabulary + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(length, width, heads) for _ in range(depth))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        nn.init.normal_(self.tokens.weight, std=0.5)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, tokens: Int64[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        if tokens.shape[-1] != self.length:
            raise ValueError(f"expected {self.length} tokens, got {tokens.shape[-1]}")
        h = self.tokens(tokens) + self.positions
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.output(self.norm(h))
        return logits


class Block(nn.Module):
    """Attention that knows the distance between positions, and a perceptron.

    To the score of two positions a learned bias per head and distance is added. It starts as a
    preference for the neighbourhood, from strong (first head) to weak, since letters depend on
    their neighbours most.
    """

    distance: Tensor

    def __init__(self, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.input, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        steps = torch.arange(length)
        self.register_buffer("distance", steps[:, None] - steps + length - 1, persistent=False)
        slopes = 2.0 ** -torch.arange(heads)
        offsets = torch.arange(1 - length, length).abs()
        self.bias = nn.Parameter(-slopes[:, None] * offsets)

    def forward(self, h: Hidden) -> Hidden:
        h = h + self.attention(self.norm1(h))
        inner: Tensor = self.shrink(functional.gelu(self.expand(self.norm2(h))))
        return h + inner

    def attention(self, h: Hidden) -> Hidden:
        query, key, value = self.input(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[:, self.distance]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out: Tensor = self.mix(mixed.transpose(1, 2).flatten(2))
        return out
