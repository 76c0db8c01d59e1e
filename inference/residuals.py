r"""What a residual costs, and how much of its gradient each trajectory gets.

With the residual :math:`\delta = \log Z + \log q - \log p - \log \gamma` of a trajectory, the
gradient of any loss is :math:`\ell'(\delta) \nabla (\log q + \log Z)`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

Rows = Float64[Tensor, " particle"]


@dataclass(frozen=True)
class ResidualLoss:
    r"""Half the squared residual, and what may be done to tame it.

    Attributes:
        dead_zone: c in :math:`\tfrac12 \max(\delta^2 - c, 0)`: residuals below :math:`\sqrt c` are
            left alone, where a prior is imperfect and none can vanish.
        huber: h, beyond which the loss grows linearly (None: nowhere): for replayed paths, whose
            residuals have heavy tails.
        importance: a power of the self-normalised importance weights q / b, b the law that drew the
            trajectories. With 1 and ``evidence="vargrad"`` the update is the policy gradient of
            E[log gamma] - KL(q || p) with a mean baseline, off-policy as on-policy; 0 leaves them
            out, as the residual's own optimum allows.
    """

    dead_zone: float = 0.0
    huber: float | None = None
    importance: float = 0.0

    def __post_init__(self) -> None:
        if self.dead_zone < 0 or (self.huber is not None and self.huber <= 0):
            raise ValueError(
                f"dead_zone must be 0 or more and huber positive, got {self.dead_zone} and "
                f"{self.huber}"
            )

    def value(self, residual: Rows) -> Rows:
        """The loss of each trajectory."""
        if self.huber is None:
            square = 0.5 * residual.square()
        else:
            square = torch.nn.functional.huber_loss(
                residual, torch.zeros_like(residual), reduction="none", delta=self.huber
            )
        alive = residual.square() > self.dead_zone
        return torch.where(alive, square - 0.5 * self.dead_zone, 0.0)

    def slope(self, residual: Rows) -> Rows:
        """Its derivative in the residual."""
        slope = residual if self.huber is None else residual.clamp(-self.huber, self.huber)
        return torch.where(residual.square() > self.dead_zone, slope, 0.0)

    def shares(self, log_behaviour: Rows, groups: Int64[Tensor, " particle"]) -> Rows:
        """How often each trajectory counts; one on average within a group."""
        logs = self.importance * log_behaviour
        top = group_reduce(logs, groups, "amax")
        weights = (logs - top[groups]).exp()
        return weights / group_reduce(weights, groups, "mean")[groups]


def group_reduce(
    values: Rows, groups: Int64[Tensor, " particle"], reduction: str
) -> Float64[Tensor, " group"]:
    """The mean or the maximum of each group."""
    number = int(groups.max()) + 1
    start = values.new_zeros(number)
    return start.scatter_reduce(0, groups, values, reduction, include_self=False)


@dataclass(frozen=True)
class Update:
    """What a person wants to know of one update.

    Attributes:
        loss: the mean over its trajectories.
        mean, spread: of their log-weights log gamma + log p - log q. On-policy the mean is the
            evidence lower bound, and the spread is zero at the posterior.
        ess: the effective sample size of these weights, as a share (on-policy).
        skipped: whether a non-finite residual left the guide as it was.
    """

    loss: float
    mean: float
    spread: float
    ess: float
    skipped: bool = False
