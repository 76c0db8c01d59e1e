"""A picture of learning: the escort path, iteration by iteration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smcdiff.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .trust_region import Iteration


def plot_escort(
    iterations: "Sequence[Iteration]", *, problem: int = 0, fig: "Figure | None" = None
) -> "Figure":
    """How far each iteration went (beta), what its paths were worth, and the evidence they saw.

    Raises:
        ValueError: nothing has been learned yet.
    """
    if not iterations:
        raise ValueError("there is no iteration to plot: call run(...) or learn(...) first")
    figure = fig or new_figure(7.0, 6.0)
    path, sizes, evidence = figure.subplots(3, 1, sharex=True)

    def line(field: str) -> Tensor:
        return torch.stack([getattr(each, field)[problem] for each in iterations]).cpu()

    numbers = list(range(1, len(iterations) + 1))
    path.plot([0, *numbers], [0.0, *line("beta")], "o-", color="C0", lw=1.3, ms=5)
    path.set(ylim=(-0.03, 1.05), ylabel="nominal beta\nafter the step")
    _sizes(sizes, numbers, line("ess"), line("ess_tempered"))
    evidence.plot(numbers, line("log_evidence"), "o-", color="C0", lw=1.3, ms=5)
    evidence.set(ylabel="log Z\nof the sweep", xlabel="iteration", xticks=[0, *numbers])
    last = iterations[-1]
    beta, arrived = float(last.beta[problem]), "is at the target"
    if float(last.tau[problem]) < 1:
        arrived = f"stands at beta = {beta:.2f}"
    figure.suptitle(
        f"After {len(iterations)} iterations learning {arrived}, with an effective sample size of "
        f"{float(last.ess[problem]):.0%}"
    )
    return figure


def _sizes(ax: "Axes", numbers: list[int], plain: Tensor, tempered: Tensor) -> None:
    from matplotlib.ticker import PercentFormatter

    style: dict[str, Any] = {"lw": 1.3, "ms": 5}
    ax.plot(numbers, tempered, "o--", color="0.55", label="of the tempered weights", **style)
    ax.plot(numbers, plain, "o-", color="C0", label="of the sweep's own weights", **style)
    least = min(float(plain.min()), float(tempered.min()))
    ax.set(ylim=(0, 1.05), ylabel="effective\nsample size (share)")
    if 0 < least < 0.1:
        ax.set(yscale="log", ylim=(0.8 * least, 1.2))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(frameon=False, fontsize="small")
