"""Decoders from latents to data, for latent diffusion.

The particles live in the latents and the program sees what they decode to::

    def program(y):
        image = decode(prior("z"))
        pyro.sample("y", dist.Normal(image[..., rows, columns], 0.1).to_event(2), obs=y)

A decoder is not linear. ``TwistedSMC`` therefore linearises Gaussian observations anew at every
state, with one backward pass per observed number: observe some pixels or features of the image
rather than all of them, and where the decoder is far from linear take ``proposal="gradient"``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smcdiff.process import flatten_batch

from ..calls import place


class Decoder:
    """A decoder that fits into programs: under any plates, in little memory.

    At most `chunk_size` latents are decoded at once. Under autograd, activations are not kept: they
    are computed again, chunk by chunk, on the way back (``torch.utils.checkpoint``).

    Args:
        network: ``(batch, *latent)`` to ``(batch, *event)``, row by row; a module is frozen and
            put in ``eval()``.
        latent_dim: the number of dimensions of one latent.
        chunk_size: rows per call of the network.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], latent_dim: int = 3, chunk_size: int = 8
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.network, self.latent_dim, self.chunk_size = network, latent_dim, chunk_size
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False)

    def __call__(self, z: Tensor) -> Tensor:
        """Latents of shape ``(*batch, *latent)`` to data of shape ``(*batch, *event)``."""
        batch = z.shape[: z.dim() - self.latent_dim]
        rows = flatten_batch(z, self.latent_dim)
        if isinstance(self.network, nn.Module):
            rows = rows.to(place(self.network)[2])
        data = torch.cat([self._decode(chunk) for chunk in rows.split(self.chunk_size)])
        return data.to(z.dtype).reshape(*batch, *data.shape[1:])

    def _decode(self, rows: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and rows.requires_grad):
            return self.network(rows)
        data: Tensor = checkpoint(self.network, rows, use_reentrant=False, preserve_rng_state=False)
        return data
