"""Priors that ship with the package: one line from nothing to a process."""

from typing import Any

import torch
from torch import nn

from . import digits, mnist, text
from .diffusion import Diffusion
from .masked import MaskedDiffusion
from .schedules import Spacing, VariancePreserving
from .transformer import Transformer


def digit_prior(
    num_steps: int = 100,
    device: torch.device | str | None = None,
    spacing: Spacing = "trailing",
    **kwargs: Any,
) -> Diffusion:
    """Real 8x8 handwritten digits with values in [-1, 1] and shape ``(1, 8, 8)``.

    The network knows the classes 0 to 9: ``prior("x", label=tensor)``; without a label it is
    unconditional (:mod:`smcdiff.models.digits`).

    Args:
        num_steps: T.
        device: where the network lives.
        spacing: which of the noise levels are kept (:class:`VariancePreserving`): ``"karras"`` and
            ``"quadratic"`` spend more steps where little noise is left, which sharp observations
            need.
        kwargs: for :class:`Diffusion`, such as ``eta`` or ``variance``.
    """
    return _diffusion(digits.digit_network(device), digits.EVENT_SHAPE, num_steps, spacing, kwargs)


def mnist_prior(
    num_steps: int = 100,
    device: torch.device | str | None = None,
    spacing: Spacing = "trailing",
    **kwargs: Any,
) -> Diffusion:
    """Handwritten digits (MNIST) with values in [-1, 1] and shape ``(1, 28, 28)``.

    The network knows the classes 0 to 9: ``prior("x", label=tensor)``; without a label it is
    unconditional (:mod:`smcdiff.models.mnist`).

    Args:
        num_steps: T.
        device: where the network lives.
        spacing: which of the noise levels are kept (:class:`VariancePreserving`): ``"karras"`` and
            ``"quadratic"`` spend more steps where little noise is left, which sharp observations
            need.
        kwargs: for :class:`Diffusion`, such as ``eta`` or ``variance``.
    """
    return _diffusion(mnist.mnist_network(device), mnist.EVENT_SHAPE, num_steps, spacing, kwargs)


def name_prior(
    num_steps: int = text.NAME_LENGTH, device: torch.device | str | None = None, **kwargs: Any
) -> MaskedDiffusion:
    """First names as 16 characters, the letters of a name and then full stops.

    ``smcdiff.models.text`` has the alphabet: ``decode_names(x)``, ``NAMES.encode("anna")``.

    Args:
        num_steps: T; with ``reveal="even"`` and this number, one character at a time is revealed.
        device: where the network lives.
        kwargs: for :class:`MaskedDiffusion`, such as ``reveal``.
    """
    return _masked(text.name_network(device), text.NAMES, text.NAME_LENGTH, num_steps, kwargs)


def text_prior(
    num_steps: int = text.TEXT_LENGTH, device: torch.device | str | None = None, **kwargs: Any
) -> MaskedDiffusion:
    """64 characters of English, half of it Shakespeare's and half of it Wikipedia's.

    ``smcdiff.models.text`` has the alphabet: ``ENGLISH.decode(x)``, ``ENGLISH.encode("To be")``.

    Args:
        num_steps: T; with ``reveal="even"`` and this number, one character at a time is revealed.
        device: where the network lives.
        kwargs: for :class:`MaskedDiffusion`, such as ``reveal``.
    """
    return _masked(text.text_network(device), text.ENGLISH, text.TEXT_LENGTH, num_steps, kwargs)


def _diffusion(
    network: nn.Module, event_shape: tuple[int, ...], num_steps: int, spacing: Spacing, kwargs: Any
) -> Diffusion:
    settings = {"parameterization": digits.PARAMETERIZATION, "scale": 0.6, **kwargs}
    schedule = VariancePreserving(spacing=spacing)
    return Diffusion(network, schedule, event_shape, num_steps, **settings)


def _masked(
    network: Transformer, alphabet: text.Alphabet, length: int, num_steps: int, kwargs: Any
) -> MaskedDiffusion:
    return MaskedDiffusion(network, length, len(alphabet), num_steps=num_steps, **kwargs)
