"""log Z as something that is learned: a number per problem, or a function of the arguments."""

from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn


class LogZ(nn.Module):
    """One number per problem."""

    value: Tensor
    begun: Tensor

    def __init__(self, number: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(number, dtype=torch.float64))
        self.register_buffer("begun", torch.tensor(False))

    def begin(self, value: Tensor) -> None:
        """Starts from there."""
        self.value.data.copy_(value)
        self.begun.fill_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Float64[Tensor, " problem"]:
        return self.value


@torch.enable_grad()
def log_z_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], centre: Tensor
) -> Float64[Tensor, " problem"]:
    """log Z of each problem, with a graph.

    Args:
        module: a :class:`LogZ`, or what maps the arguments of the model to log Z.
        centre: the mean log-weights by problem, where a number begins.
    """
    if isinstance(module, LogZ) and not module.begun:
        module.begin(centre)
    value: Tensor = module(*args, **kwargs).double().to(centre.device)
    if value.numel() != len(centre):
        raise ValueError(
            f"evidence returned shape {tuple(value.shape)}, but there are {len(centre)} problems: "
            "return log Z of each"
        )
    return value.reshape(-1)
