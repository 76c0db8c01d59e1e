"""What one can sample from: processes, their schedules, exact denoisers and networks."""

from .chain import Chain
from .controlled import Controlled
from .denoisers import Denoiser, EnumeratedDenoiser, GaussianDenoiser, MixtureDenoiser
from .diffusion import Diffusion
from .masked import MaskedDiffusion
from .priors import digit_prior
from .schedules import (
    Cosine,
    FromAlphas,
    Grid,
    LogSNR,
    OrnsteinUhlenbeck,
    Schedule,
    VariancePreserving,
)
from .team import Team

__all__ = [
    "Chain",
    "Controlled",
    "Cosine",
    "Denoiser",
    "Diffusion",
    "EnumeratedDenoiser",
    "FromAlphas",
    "GaussianDenoiser",
    "Grid",
    "LogSNR",
    "MaskedDiffusion",
    "MixtureDenoiser",
    "OrnsteinUhlenbeck",
    "Schedule",
    "Team",
    "VariancePreserving",
    "digit_prior",
]

if __name__ == "models":
    raise ImportError("this folder is the package smcdiff.models")
