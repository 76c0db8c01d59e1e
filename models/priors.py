"""Priors that ship with the package: one line from nothing to a process."""

from typing import Any

import torch

from . import digits, mnist
from .diffusion import Diffusion
from .schedules import VariancePreserving


def digit_prior(
    num_steps: int = 100, device: torch.device | str | None = None, **kwargs: Any
) -> Diffusion:
    """Real 8x8 handwritten digits with values in [-1, 1] and shape ``(1, 8, 8)``.

    The network knows the classes 0 to 9: ``prior("x", label=tensor)``; without a label it is
    unconditional (:mod:`smcdiff.models.digits`).

    Args:
        num_steps: T.
        device: where the network lives.
        kwargs: for :class:`Diffusion`, such as ``eta`` or ``variance``.
    """
    settings = {"parameterization": digits.PARAMETERIZATION, "scale": 0.6, **kwargs}
    network = digits.digit_network(device)
    return Diffusion(network, VariancePreserving(), digits.EVENT_SHAPE, num_steps, **settings)


def mnist_prior(
    num_steps: int = 100, device: torch.device | str | None = None, **kwargs: Any
) -> Diffusion:
    """Handwritten digits (MNIST) with values in [-1, 1] and shape ``(1, 28, 28)``.

    The network knows the classes 0 to 9: ``prior("x", label=tensor)``; without a label it is
    unconditional (:mod:`smcdiff.models.mnist`).

    Args:
        num_steps: T.
        device: where the network lives.
        kwargs: for :class:`Diffusion`, such as ``eta`` or ``variance``.
    """
    settings = {"parameterization": mnist.PARAMETERIZATION, "scale": 0.6, **kwargs}
    network = mnist.mnist_network(device)
    return Diffusion(network, VariancePreserving(), mnist.EVENT_SHAPE, num_steps, **settings)
