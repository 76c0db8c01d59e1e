"""Where this process stands among those that `torchrun` started."""

import torch
from torch import distributed


def place_among_processes() -> tuple[int, int]:
    """This process's rank, and how many there are: 0 and 1 without torch.distributed."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def mean_over_processes(*values: float) -> tuple[float, ...]:
    """The same numbers in all processes, so that they take the same decisions."""
    _, processes = place_among_processes()
    if processes == 1:
        return values
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return tuple((total / processes).tolist())
