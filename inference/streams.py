"""Torch's random streams, that of the CPU and that of a device: kept, and put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Streams = dict[str, Tensor]


def stream_states(device: torch.device) -> Streams:
    """Where they are."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_streams(states: Streams, device: torch.device) -> None:
    """Puts them where they were; a run that moves to another device continues with others."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


@contextmanager
def stream_untouched() -> Iterator[None]:
    """What is drawn inside leaves no trace in torch's random stream."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
