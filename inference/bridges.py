r"""Steps of a path whose ends are known: the noise between them is integrated out.

The noise that leads from x_t to x_{t-1} is nearly all of what :math:`\log q - \log p` at a drawn
x_{t-1} tells a network of many pixels, and it says nothing of the data. Given x_0 as well, its mean
is known, :meth:`~smcdiff.Process.bridge`, and with it the mean of that difference: what is left is
a least-squares problem, to predict x_0 better than the prior does (Denker et al. 2024, DEFT,
arXiv 2406.01781; the bound of Ho et al. 2020, equation 5, for priors without data).
"""

from collections.abc import Collection

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.process import Process

from . import ranks
from .behaviours import by_member, noised
from .differences import expected_log_quotient
from .pair import Pair
from .trajectories import Laws, States


class Bridges:
    """Draws of x_0, and of x_t given x_0 at some steps.

    Args:
        pair: its model's processes go from x_t to x_0.
        x_0: by member site.
        times: the steps.

    Raises:
        ValueError: a process does not say how x_t came from x_0.
    """

    def __init__(self, pair: Pair, x_0: States, times: Collection[int]) -> None:
        self.processes, self.x_0 = pair.model.processes, pair.joined(x_0)
        self.noisy = {
            t: {n: _noised(p, self.x_0[n], t) for n, p in self.processes.items()} for t in times
        }

    @property
    def x(self) -> dict[int, States]:
        """The states by t and member site."""
        states = {0: self.x_0, **self.noisy}
        return {t: by_member(self.processes, each) for t, each in states.items()}

    def compare(self, t: int, q: Laws, p: Laws) -> Float64[Tensor, " particle"]:
        """The mean of log q - log p, of guide and model, given x_t and x_0.

        Raises:
            ValueError: a process does not know the mean of x_{t-1} given both.
            TypeError: its transitions are not normal.
        """
        means = {}
        for name, process in self.processes.items():
            mean = process.bridge(self.x_0[name], self.noisy[t][name], t)
            if mean is None:
                raise ValueError(
                    f"{type(process).__name__} {name!r} does not know the mean of x_{t - 1} given "
                    f"x_0 and x_{t} (bridge): leave bridged out"
                )
            means[name] = mean
        members = by_member(self.processes, means).items()
        return torch.stack([expected_log_quotient(q[m], p[m], mean) for m, mean in members]).sum(0)


def _noised(process: Process, x_0: Tensor, t: int) -> Tensor:
    """This process's rows of ``torchrun``, as if the whole batch had been noised at once."""
    rank, number = ranks.place()
    return noised(process, x_0.expand(number, *x_0.shape), t, since=0)[rank]
