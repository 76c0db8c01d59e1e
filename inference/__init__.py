"""How one infers: every algorithm is a guide or a twist on the one particle engine."""

from .behaviours import (
    BackAndForth,
    Behaviour,
    Inflated,
    LinearRamp,
    Noised,
    OnPolicy,
    PriorPaths,
)
from .compilation import InferenceCompilation
from .denoised import DenoisedLikelihood
from .engine import Settings
from .guided import GuidedProposal
from .learned import LearnedTwist
from .learned_gaussian import GaussianKernels, QuadraticTwist
from .learned_joint import JointTwist
from .learned_power import PowerTwist
from .learned_residual import ResidualTwist
from .learned_strings import StringTwist
from .learned_tokens import TokenTwist
from .masked_proposals import NestedProposal, RelaxedLikelihood, TiltedTokens
from .proposals import FromKernel, Proposal, TwistedKernel
from .rejuvenation import Rejuvenation
from .replay_buffer import Mala, ReplayBuffer
from .residuals import ResidualLoss
from .rtb import RelativeTrajectoryBalance
from .smc import SMC, NoTwist, ParticleMethod, TwistedSMC
from .steering import IntermediateReward, Tempered
from .trust_region import TrustRegionTwistedSMC

__all__ = [
    "SMC",
    "BackAndForth",
    "Behaviour",
    "DenoisedLikelihood",
    "FromKernel",
    "GaussianKernels",
    "GuidedProposal",
    "InferenceCompilation",
    "Inflated",
    "IntermediateReward",
    "JointTwist",
    "LearnedTwist",
    "LinearRamp",
    "Mala",
    "NestedProposal",
    "NoTwist",
    "Noised",
    "OnPolicy",
    "ParticleMethod",
    "PowerTwist",
    "PriorPaths",
    "Proposal",
    "QuadraticTwist",
    "Rejuvenation",
    "RelativeTrajectoryBalance",
    "RelaxedLikelihood",
    "ReplayBuffer",
    "ResidualLoss",
    "ResidualTwist",
    "Settings",
    "StringTwist",
    "Tempered",
    "TiltedTokens",
    "TokenTwist",
    "TrustRegionTwistedSMC",
    "TwistedKernel",
    "TwistedSMC",
]

if __name__ == "inference":
    raise ImportError("this folder is the package smcdiff.inference")
