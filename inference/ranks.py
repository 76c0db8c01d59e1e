"""This process among those that ``torchrun`` started: shares of a batch, sums of gradients.

Random numbers are drawn for the whole batch in every process, which keeps its own share: so that
the run of several processes is that of one, and the streams stay together.
"""

from collections.abc import Iterable

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, distributed

from smcdiff.particles import map_tree
from smcdiff.process import Tree, is_deterministic

from .streams import restore_streams, stream_states


def place() -> tuple[int, int]:
    """This process's rank, and how many there are: 0 and 1 without torch.distributed."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def own_rows(total: int) -> slice:
    """This process's share of a batch."""
    rank, number = place()
    if total % number:
        raise ValueError(
            f"{total} trajectories cannot be shared by {number} processes: take a multiple of "
            f"{number} for num_particles"
        )
    size = total // number
    return slice(rank * size, (rank + 1) * size)


def own(tree: Tree, total: int) -> Tree:
    """This process's rows of a tree of tensors with the whole batch in front."""
    rows = own_rows(total)
    return map_tree(lambda leaf: leaf[rows], tree)


def draw(law: Distribution) -> Tensor:
    """A draw of this process's rows, as if the whole batch had been drawn at once."""
    if is_deterministic(law):
        point: Tensor = law.mean
        return point
    rank, number = place()
    x: Tensor = (
        law.sample() if number == 1 else law.expand((number, *law.batch_shape)).sample()[rank]
    )
    return x


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of the batch."""
    _, number = place()
    if number == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(number)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every gradient by its sum over the processes, which have the same ones."""
    _, number = place()
    if number == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the values of the first, in place."""
    _, number = place()
    for tensor in tensors if number > 1 else ():
        distributed.broadcast(tensor.data, 0)


def same_streams(device: torch.device) -> None:
    """Gives all processes the first one's random streams."""
    if place()[1] > 1:
        states = [stream_states(device)]
        distributed.broadcast_object_list(states)  # the streams' states are on the CPU always
        restore_streams(states[0], device)
