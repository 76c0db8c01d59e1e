"""What one can sample from: processes, their schedules, exact denoisers and networks."""

from .automata import Automaton, contains, ends_with
from .chain import Chain
from .classifier_free import ClassifierFree
from .continuous import (
    EDM,
    ContinuousSchedule,
    Interpolant,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    SubVariancePreserving,
    VarianceExploding,
)
from .controlled import Controlled
from .controls import Head, Langevin, Potential, Preconditioned
from .denoisers import Denoiser, EnumeratedDenoiser, GaussianDenoiser, MixtureDenoiser
from .diffusion import Diffusion
from .flow import Flow
from .grids import Grid, Schedule
from .guides import Finetuned, LearnedScale, LearnedStart, lora
from .markov import MarkovDenoiser
from .masked import MaskedDiffusion
from .priors import digit_prior, mnist_prior, name_prior, text_prior
from .schedules import Cosine, FromAlphas, LogSNR, Tabulated, VariancePreserving
from .team import Team
from .thresholding import DynamicThresholding
from .velocities import ExactVelocity

__all__ = [
    "Automaton",
    "Chain",
    "ClassifierFree",
    "ContinuousSchedule",
    "Controlled",
    "Cosine",
    "Denoiser",
    "Diffusion",
    "DynamicThresholding",
    "EDM",
    "EnumeratedDenoiser",
    "ExactVelocity",
    "Finetuned",
    "Flow",
    "FromAlphas",
    "GaussianDenoiser",
    "Grid",
    "Head",
    "Interpolant",
    "Langevin",
    "LearnedScale",
    "LearnedStart",
    "LogSNR",
    "MarkovDenoiser",
    "MaskedDiffusion",
    "MixtureDenoiser",
    "OrnsteinUhlenbeck",
    "Potential",
    "Preconditioned",
    "RectifiedFlow",
    "Schedule",
    "SubVariancePreserving",
    "Tabulated",
    "Team",
    "VarianceExploding",
    "VariancePreserving",
    "contains",
    "digit_prior",
    "ends_with",
    "lora",
    "mnist_prior",
    "name_prior",
    "text_prior",
]

if __name__ == "models":
    raise ImportError("this folder is the package smcdiff.models")
