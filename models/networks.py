"""Small networks for diffusion priors.

Every network here is called as ``network(x, time, label=None)``:

* ``x``, with shape `batch *event`: the noisy state x_t;
* ``time``, with shape `batch`: the training index of the noise level, 0 (data) to 999 (noise),
  whole or not. Give ``time_scale`` for times on another scale, such as 1000 for those in [0, 1];
* ``label``, with shape `batch`: a class in 0 .. num_classes - 1, or ``num_classes`` for "no label".
  ``None`` is "no label" for all. Networks without classes take ``None`` only.

The result has the shape of ``x``. What it means (noise, velocity, ...) is decided by the training.
Nothing mixes the samples of a batch, and nothing is random in the forward pass.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

MAX_PERIOD = 10_000.0


def embed_time(time: Float[Tensor, " batch"], features: int) -> Float[Tensor, "batch features"]:
    r"""Cosines and sines of `time`, at frequencies from 1 down to 1e-4 per training index."""
    half = features // 2
    exponent = torch.arange(half, dtype=time.dtype, device=time.device) / half
    angle = time[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Conditioning(nn.Module):
    """Turns a time and a label into one vector per sample.

    Args:
        out_features: Length of the vector.
        num_classes: Number of classes; 0 for none.
        time_features: Number of cosines and sines, an even number.
        time_scale: Times are multiplied by this number.
    """

    def __init__(
        self,
        out_features: int,
        num_classes: int = 0,
        time_features: int = 64,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if time_features < 2 or time_features % 2:
            raise ValueError(f"time_features must be even and at least 2, got {time_features}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no labels) or more, got {num_classes}")
        self.num_classes = num_classes
        self.time_features, self.time_scale = time_features, time_scale
        self.time = nn.Linear(time_features, out_features)
        self.label = nn.Embedding(num_classes + 1, out_features) if num_classes else None
        self.mix = nn.Linear(out_features, out_features)

    def forward(
        self, time: Float[Tensor, " batch"], label: Int64[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch width"]:
        scaled = self.time_scale * time.to(self.mix.weight.dtype)
        vector = self.time(embed_time(scaled, self.time_features))
        if self.label is not None:
            if label is None:
                label = torch.full_like(time, self.num_classes, dtype=torch.int64)
            vector = vector + self.label(label)
        elif label is not None:
            raise ValueError(
                "this network was built without labels (num_classes=0): pass label=None"
            )
        return functional.silu(self.mix(functional.silu(vector)))


class ResidualMLP(nn.Module):
    r"""A multi-layer perceptron with residual blocks modulated by time and label.

    Each block computes, with a scale and a shift that depend on time and label,

    .. math:: h \leftarrow h + W \, \mathrm{silu}((1 + s) \, \mathrm{norm}(h) + b)

    Args:
        features: Number of elements of one event, whatever its shape.
        width: Number of hidden units.
        depth: Number of residual blocks, one matrix of `width` by `width` each.
        num_classes: Number of classes; 0 for none.
        time_features: Number of cosines and sines that embed the time.
        time_scale: Times are multiplied by this number.
    """

    def __init__(
        self,
        features: int,
        width: int,
        depth: int,
        num_classes: int = 0,
        time_features: int = 64,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.features = features
        self.num_classes = num_classes
        self.condition = Conditioning(time_features, num_classes, time_features, time_scale)
        self.input = nn.Linear(features, width)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth)
        )
        self.modulations = nn.ModuleList(nn.Linear(time_features, 2 * width) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, features)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        x: Float[Tensor, "batch *event"],
        time: Float[Tensor, " batch"],
        label: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        if math.prod(x.shape[1:]) != self.features:
            raise ValueError(
                f"expected events of {self.features} elements, got {tuple(x.shape[1:])}"
            )
        vector = self.condition(time, label)
        h = self.input(x.flatten(1))
        for norm, modulation, block in zip(self.norms, self.modulations, self.blocks, strict=True):
            scale, shift = modulation(vector).chunk(2, dim=-1)
            normal = norm(h)
            h = h + block(functional.silu(torch.addcmul(normal + shift, normal, scale)))
        return self.output(functional.silu(h)).reshape(x.shape)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection, modulated by time and label."""

    def __init__(self, channels_in: int, channels_out: int, vector_features: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(vector_features, 2 * channels_out)
        self.norm2 = nn.GroupNorm(math.gcd(8, channels_out), channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(
        self, h: Float[Tensor, "batch in height width"], vector: Float[Tensor, "batch features"]
    ) -> Float[Tensor, "batch out height width"]:
        scale, shift = self.modulation(vector)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv1(functional.silu(self.norm1(h)))
        inner = self.conv2(functional.silu(self.norm2(inner) * (1 + scale) + shift))
        return self.skip(h) + inner


class Attention(nn.Module):
    """Every place of a small image looks at every other one, with a residual connection."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels)
        self.input = nn.Conv2d(channels, 3 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)

    def forward(
        self, h: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        flat = self.input(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1))
        query, key, value = flat.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return h + self.output(mixed.transpose(-1, -2).reshape(h.shape))


class UNet(nn.Module):
    """A convolutional network on several scales, with attention on the coarsest.

    Each scale halves the sides of the one before. Its first scale sees patches of the image as
    channels: what costs most in a U-Net is the full size, where little is decided.

    Args:
        channels: Number of image channels.
        widths: Number of hidden channels per scale, fine to coarse.
        num_classes: Number of classes; 0 for none.
        time_features: Number of cosines and sines that embed the time.
        patch: Side of a patch; `patch * 2 ** (len(widths) - 1)` divides the sides of the image.
        heads: Number of attention heads; 0 for no attention.
        time_scale: Times are multiplied by this number.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        num_classes: int = 0,
        time_features: int = 64,
        patch: int = 1,
        heads: int = 4,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if heads and widths[-1] % heads:
            raise ValueError(f"heads={heads} must divide the last width, got widths={widths}")
        self.num_classes, self.patch = num_classes, patch
        self.divisor = patch * 2 ** (len(widths) - 1)
        self.condition = Conditioning(time_features, num_classes, time_features, time_scale)
        first, last, pairs = widths[0], widths[-1], list(itertools.pairwise(widths))
        self.input = nn.Conv2d(channels * patch**2, first, 3, padding=1)
        self.downs = nn.ModuleList(ConvBlock(fine, fine, time_features) for fine, _ in pairs)
        self.shrinks = nn.ModuleList(nn.Conv2d(fine, coarse, 2, 2) for fine, coarse in pairs)
        self.middle1 = ConvBlock(last, last, time_features)
        self.attention = Attention(last, heads) if heads else nn.Identity()
        self.middle2 = ConvBlock(last, last, time_features)
        self.grows = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, 2) for fine, coarse in reversed(pairs)
        )
        self.ups = nn.ModuleList(
            ConvBlock(2 * fine, fine, time_features) for fine, _ in reversed(pairs)
        )
        self.output = nn.Conv2d(first, channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        time: Float[Tensor, " batch"],
        label: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        if x.shape[-2] % self.divisor or x.shape[-1] % self.divisor:
            raise ValueError(
                f"this network takes images whose sides {self.divisor} divides, got "
                f"{x.shape[-2]} by {x.shape[-1]}: pad them"
            )
        vector = self.condition(time, label)
        h = self.input(functional.pixel_unshuffle(x, self.patch))
        seen = []
        for down, shrink in zip(self.downs, self.shrinks, strict=True):
            seen.append(down(h, vector))
            h = shrink(seen[-1])
        h = self.middle2(self.attention(self.middle1(h, vector)), vector)
        for grow, up in zip(self.grows, self.ups, strict=True):
            h = up(torch.cat([seen.pop(), grow(h)], dim=1), vector)
        return functional.pixel_shuffle(self.output(functional.silu(h)), self.patch)
