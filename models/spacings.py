r"""Spacings: which T noise levels a grid keeps.

A trained table of L levels is respaced by index (`kept_indices`; the names are those of diffusers),
and any schedule by how noisy it is (`noise_levels`), between the log-SNRs of its ends:

- "log_snr": equal steps of the log-SNR (geometric sigmas, where alpha = 1);
- "karras": equal steps of (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5), which spends
  more of them where little noise is left.
"""

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

IndexSpacing: TypeAlias = Literal["trailing", "leading", "linspace", "quadratic"]
NoiseSpacing: TypeAlias = Literal["karras", "log_snr"]
Steps: TypeAlias = Float64[Tensor, " steps"]
RHO = 7.0  # of Karras et al. (2022), table 1


def shares(num_steps: int) -> Steps:
    """From 0 to 1 in equal steps; only the 1, pure noise, if there is one step."""
    steps = torch.arange(num_steps, dtype=torch.float64)
    return steps / (num_steps - 1) if num_steps > 1 else steps + 1


def kept_indices(spacing: IndexSpacing, length: int, num_steps: int) -> Int64[Tensor, " steps"]:
    """T of the indices 0 .. length - 1, which rise from data to noise."""
    t = torch.arange(1, num_steps + 1, dtype=torch.float64)
    match spacing:
        case "trailing":
            return (length * t / num_steps).round().long() - 1
        case "leading":
            return (t.long() - 1) * (length // num_steps)
        case "linspace":
            return ((length - 1) * shares(num_steps)).round().long()
        case "quadratic":  # at first the squares are closer than the indices
            squares = (length - 1) * shares(num_steps) ** 2
            return torch.maximum((squares + 0.5).floor(), t - 1).long()


def noise_levels(
    spacing: NoiseSpacing, first: float, last: float, num_steps: int, rho: float = RHO
) -> Steps:
    """Log-SNRs that fall from `first` to `last`."""
    share = shares(num_steps)
    if spacing == "log_snr":
        return last + (first - last) * (1 - share)
    low, high = math.exp(-first / (2 * rho)), math.exp(-last / (2 * rho))
    return -2 * rho * torch.log(low + (high - low) * share)
