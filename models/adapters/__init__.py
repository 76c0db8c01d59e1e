"""Models of other libraries as processes, in one line each.

A library is imported when its model is used, never before. Any other torch module is
``Diffusion(network, ...)`` or ``Flow(velocity, ...)`` as it is.
"""

from .azula import from_azula
from .callables import from_denoiser
from .checkpoints import read_checkpoint
from .diffusers import decoder_from_diffusers, from_diffusers
from .latent import Decoder
from .scheduled import Scheduled

__all__ = [
    "Decoder",
    "Scheduled",
    "decoder_from_diffusers",
    "from_azula",
    "from_denoiser",
    "from_diffusers",
    "read_checkpoint",
]
