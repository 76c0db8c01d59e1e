"""log Z as something that is learned: a number per problem, or a function of the arguments."""

from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from smcdiff.weights import log_mean_exp


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
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log_weights: Float64[Tensor, " particle"],
    groups: Int64[Tensor, " particle"],
) -> Float64[Tensor, " problem"]:
    """log Z of each problem, with a graph.

    Args:
        module: a :class:`LogZ`, which begins at the importance-sampling estimate of its first
            batch; or what maps the arguments of the model to log Z.
        log_weights, groups: of the batch, and the problem of each.
    """
    number = int(groups.max()) + 1
    if isinstance(module, LogZ) and not module.begun:
        rows = [log_weights[groups == k] for k in range(number)]
        module.begin(torch.stack([log_mean_exp(row) for row in rows]))
    value: Tensor = module(*args, **kwargs).double().to(log_weights.device)
    if value.numel() != number:
        raise ValueError(
            f"evidence returned shape {tuple(value.shape)}, but there are {number} problems: "
            "return log Z of each"
        )
    return value.reshape(-1)
