"""Models of other libraries as processes, in one line each.

A library is imported when its model is used, never before.
"""

from .checkpoints import read_checkpoint
from .diffusers import decoder_from_diffusers, from_diffusers
from .latent import Decoder
from .scheduled import Scheduled

__all__ = [
    "Decoder",
    "Scheduled",
    "decoder_from_diffusers",
    "from_diffusers",
    "read_checkpoint",
]
