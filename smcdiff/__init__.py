"""Posteriors over diffusion and flow priors: declared in Pyro, inferred and checked by weights."""

from .averages import Expectation
from .diagnostics import Diagnosis
from .evidence import Evidence
from .particles import Calls, Particles, Step
from .posterior import Posterior
from .process import Kernel, Process, Signal, batched
from .program import Program
from .resampling import RESAMPLERS, resample
from .twist import Twist, TwistValue, View
from .weights import DegenerateWeights

__version__ = "0.1.0"

__all__ = [
    "RESAMPLERS",
    "Calls",
    "DegenerateWeights",
    "Diagnosis",
    "Evidence",
    "Expectation",
    "Kernel",
    "Particles",
    "Posterior",
    "Process",
    "Program",
    "Signal",
    "Step",
    "Twist",
    "TwistValue",
    "View",
    "batched",
    "resample",
]
