"""How one infers: every algorithm is a guide or a twist on the one particle engine."""

from .denoised import DenoisedLikelihood
from .engine import Settings
from .guided import GuidedProposal
from .learned import LearnedTwist
from .learned_gaussian import GaussianKernels, QuadraticTwist
from .learned_joint import JointTwist
from .learned_residual import ResidualTwist
from .learned_tokens import TokenTwist
from .masked_proposals import NestedProposal, RelaxedLikelihood, TiltedTokens
from .proposals import FromKernel, Proposal, TwistedKernel
from .rejuvenation import Rejuvenation
from .smc import SMC, NoTwist, ParticleMethod, TwistedSMC
from .steering import IntermediateReward, Tempered
from .trust_region import TrustRegionTwistedSMC

__all__ = [
    "SMC",
    "DenoisedLikelihood",
    "FromKernel",
    "GaussianKernels",
    "GuidedProposal",
    "IntermediateReward",
    "JointTwist",
    "LearnedTwist",
    "NestedProposal",
    "NoTwist",
    "ParticleMethod",
    "Proposal",
    "QuadraticTwist",
    "Rejuvenation",
    "RelaxedLikelihood",
    "ResidualTwist",
    "Settings",
    "Tempered",
    "TiltedTokens",
    "TokenTwist",
    "TrustRegionTwistedSMC",
    "TwistedKernel",
    "TwistedSMC",
]

if __name__ == "inference":
    raise ImportError("this folder is the package smcdiff.inference")
