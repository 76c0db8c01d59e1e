"""How one infers: every algorithm is a guide or a twist on the one particle engine."""

from .denoised import DenoisedLikelihood
from .engine import Settings
from .guided import GuidedProposal
from .proposals import FromKernel, Proposal, TwistedKernel
from .rejuvenation import Rejuvenation
from .smc import SMC, NoTwist, ParticleMethod, TwistedSMC
from .steering import IntermediateReward, Tempered

__all__ = [
    "SMC",
    "DenoisedLikelihood",
    "FromKernel",
    "GuidedProposal",
    "IntermediateReward",
    "NoTwist",
    "ParticleMethod",
    "Proposal",
    "Rejuvenation",
    "Settings",
    "Tempered",
    "TwistedKernel",
    "TwistedSMC",
]

if __name__ == "inference":
    raise ImportError("this folder is the package smcdiff.inference")
