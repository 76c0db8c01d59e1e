"""Pictures of a posterior; every title says what is to be seen.

Each function draws into what it is given (``ax``, or ``fig`` where it needs several axes) or into a
new figure, and returns the figure. New figures are not left open in pyplot: a notebook shows the
returned one once, and a script saves it with ``savefig``. Time runs from noise (t = T, left) to
data (t = 0). Where there are several problems, ``problem`` chooses one: by default the one in the
worst state.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .diagnostics import ESS, Diagnosis, diagnose
from .weights import effective_sample_size, normalise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .posterior import Posterior

HEAVY = 0.7  # k-hat above which averages are unreliable: a guide to the eye, no part of the verdict
LABELLED = 8  # runs that get a colour and a label each
GREY, ACCENT = "0.55", "#b2182b"
At = tuple[int, ...]


# ------------------------------------------------------------------------------------ the steps


def plot_steps(
    posterior: "Posterior", *, problem: int | None = None, fig: "Figure | None" = None
) -> "Figure":
    """Effective sample size (above) and k-hat (below) of the weights at every step, run by run.

    Dots mark weights that were resampled.
    """
    at, d = choose(posterior, problem)
    figure = fig or new_figure(7.0, 5.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _effective_sizes(above, posterior, at)
    _khats(below, posterior, at)
    size = f"of {d.num_particles} particles"
    figure.suptitle(
        f"{which(at)}The effective sample size stays above {d.smallest_ess:.0%} {size}"
        if d.smallest_ess > ESS
        else f"{which(at)}The effective sample size falls to {d.smallest_ess:.1%} {size}, at t = "
        f"{d.smallest_ess_at}"
    )
    return figure


def _effective_sizes(ax: "Axes", posterior: "Posterior", at: At) -> None:
    history, size = posterior.history, posterior.particles.num_particles
    times = [step.t for step in history]
    # The record of a step tells of the weights that entered it, one step earlier in time.
    entering = [step.ess[at] for step in history[1:]]
    shares = torch.stack([*entering, posterior.particles.ess[at]], -1).cpu() / size
    resampled = torch.stack([step.resampled[at] for step in history[1:]], -1).cpu()
    for run, color in enumerate(_colors(len(shares))):
        ax.plot(times, shares[run], color=color, lw=1.3, label=_run_label(run, len(shares)))
        marked = resampled[run].nonzero()[:, 0].tolist()
        _dots(ax, [times[k] for k in marked], shares[run, marked], color)
    if bool(resampled.any()):
        ax.plot([], [], "o", color="black", ms=5, label="resampled")
    _threshold(ax, ESS, f"{ESS:.0%}")
    if float(shares.min()) < 0.1:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, 1.04)
    ax.yaxis.set_major_formatter(_percent())
    ax.set_ylabel("effective sample size\n(share of particles)")
    _legend(ax)


def _khats(ax: "Axes", posterior: "Posterior", at: At) -> None:
    history = posterior.history
    times = [step.t for step in history]
    khats = torch.stack([step.khat[at] for step in history], -1).cpu()
    where = [times[0], *times[:-2], times[-1]] if len(times) > 1 else times
    for run, color in enumerate(_colors(len(khats))):
        known = khats[run].isfinite().nonzero()[:, 0].tolist()
        _dots(ax, [where[k] for k in known], khats[run, known], color)
    _threshold(ax, HEAVY, f"{HEAVY}", GREY)
    seen = khats[khats.isfinite()].tolist()
    ax.set_ylim(min([-0.05, *(k - 0.1 for k in seen)]), max([1.0, *(k + 0.1 for k in seen)]))
    if not seen:
        ax.text(0.5, 0.35, "not estimable: too few particles, or equal weights", ha="center",
                color=GREY, transform=ax.transAxes)  # fmt: skip
    ax.set_ylabel("k-hat before\nresampling")
    _time_axis(ax, times[0])


def plot_evidence(
    posterior: "Posterior", *, problem: int | None = None, ax: "Axes | None" = None
) -> "Figure":
    r"""The estimates of log Z after every step, run by run, and the answer with its error.

    Before t = 0 the lines show the normaliser of the twisted target :math:`\psi_t`: a look-ahead is
    good if they are flat.
    """
    at, _ = choose(posterior, problem)
    evidence = posterior.evidence
    ax = ax or new_figure(7.0, 3.8).subplots()
    times = [step.t for step in posterior.history]
    lines = torch.stack([step.log_evidence[at] for step in posterior.history], -1).cpu()
    for run, color in enumerate(_colors(len(lines))):
        ax.plot(times, lines[run], color=color, lw=1.3, label=_run_label(run, len(lines)))
    value, spread = float(evidence.log_evidence[at]), float(evidence.spread[at])
    several = evidence.num_runs > 1
    error = float((evidence.standard_error if several else evidence.single_run_standard_error)[at])
    known = error if error == error else None  # not of one particle
    style: dict[str, Any] = {"color": "black", "ms": 5, "zorder": 5, "clip_on": False}
    ax.errorbar(0, value, known, fmt="D", capsize=4, label="± standard error", **style)
    ax.set_ylabel("estimate of log Z")
    _time_axis(ax, times[0])
    _legend(ax)
    title = f"{which(at)}log Z = {value:.2f} ± {error:.2g}"
    if several:
        title += (
            f": runs {'agree' if spread < 0.5 else 'disagree'}, standard deviation {spread:.2g}"
        )
    ax.set_title(title)
    return _figure_of(ax)


# ---------------------------------------------------------------------------------- the weights


def plot_weights(
    posterior: "Posterior", *, problem: int | None = None, ax: "Axes | None" = None
) -> "Figure":
    """The Lorenz curve of the weights: how much the heaviest particles carry.

    The final weights of each run, and in red the most uneven ones of any run and step.
    """
    at, _ = choose(posterior, problem)
    ax = ax or new_figure(5.4, 4.4).subplots()
    final = normalise(posterior.log_weights[at]).cpu()
    for run, color in enumerate(_colors(len(final))):
        ax.plot(*_lorenz(final[run]), color=color, lw=1.5, label=_run_label(run, len(final)))
    every = torch.stack([step.log_weights[at] for step in posterior.history]).cpu()
    sizes = effective_sample_size(every)
    step, run = divmod(int(sizes.argmin()), sizes.shape[-1])
    if posterior.history[step].t > 0:
        label = f"t = {posterior.history[step].t}, run {run}: the worst"
        ax.plot(*_lorenz(normalise(every[step, run])), color=ACCENT, ls="--", lw=1.2, label=label)
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    ax.text(0.78, 0.74, "equal weights", color=GREY, rotation=40, ha="center", va="center")
    ax.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="share of particles, heaviest first")
    ax.set_ylabel("share of the weight")
    ax.xaxis.set_major_formatter(_percent())
    ax.yaxis.set_major_formatter(_percent())
    _legend(ax, "lower right")
    half = min(_particles_for_half(row) for row in final)
    size = final.shape[-1]
    ax.set_title(f"{which(at)}Half of the final weight lies on {half} of {size} particles")
    return _figure_of(ax)


def _lorenz(weights: Tensor) -> tuple[list[float], list[float]]:
    carried = weights.sort(descending=True).values.cumsum(0).tolist()
    count = len(carried)
    return [k / count for k in range(count + 1)], [0.0, *carried]


def _particles_for_half(weights: Tensor) -> int:
    carried = weights.sort(descending=True).values.cumsum(0)
    return 1 + int((carried < 0.5 - 1e-9).sum())


def plot_genealogy(
    posterior: "Posterior",
    *,
    run: int = 0,
    problem: int | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """The lineages of one run's final particles, a colour per root; grey lines mark resampling."""
    from matplotlib.collections import LineCollection

    at, _ = choose(posterior, problem)
    ax = ax or new_figure(7.0, 4.2).subplots()
    times = [step.t for step in posterior.history]
    paths = lineages(posterior, (*at, run))
    order = sorted(range(paths.shape[1]), key=lambda i: paths[:, i].tolist())
    paths = paths[:, order]
    heights = _heights(paths)
    roots = paths[0].unique(return_inverse=True)[1].tolist()
    colors = _colors(1 + max(roots), "turbo")
    segments: dict[tuple[float, ...], Any] = {}
    for k in range(len(times) - 1):
        before, after = heights[k].tolist(), heights[k + 1].tolist()
        for i, root in enumerate(roots):
            segments[times[k], before[i], times[k + 1], after[i]] = colors[root]
    lines = [((a, b), (c, d)) for a, b, c, d in segments]
    for time in (s.t + 1 for s in posterior.history[1:] if bool(s.resampled[at][run])):
        ax.axvline(time, color="0.9", lw=0.8, zorder=0)
    ax.add_collection(LineCollection(lines, colors=list(segments.values()), lw=0.9))
    ax.set(ylim=(-0.02 * len(order) - 0.5, 1.02 * len(order) - 0.5), yticks=[])
    ax.set_ylabel("particles of run " + str(run) + ",\nin order of descent")
    _time_axis(ax, times[0])
    last = posterior.history[-1]
    effective = float(last.effective_roots[at][run])
    ax.set_title(
        f"{which(at)}{len(order)} final particles descend from {int(last.num_roots[at][run])} "
        f"roots (effective number {effective:.1f})"
    )
    return _figure_of(ax)


def lineages(posterior: "Posterior", at: At) -> Tensor:
    """Ancestors of one run's particles: indices with shape ``(step, particle)``, from T to 0."""
    here = torch.arange(posterior.particles.num_particles)
    rows = [here]
    for step in reversed(posterior.history[1:]):
        here = step.ancestors[at].cpu()[here]
        rows.append(here)
    return torch.stack(rows[::-1])


def _heights(paths: Tensor) -> Tensor:
    """A particle is drawn in the middle of its descendants."""
    ranks = torch.arange(paths.shape[1], dtype=torch.float64)
    rows = []
    for row in paths:
        inverse = row.unique(return_inverse=True)[1]
        count = inverse.bincount()
        rows.append((inverse.bincount(ranks) / count)[inverse])
    return torch.stack(rows)


# ------------------------------------------------------------------------------------ the parts


def choose(posterior: "Posterior", problem: int | None) -> tuple[At, Diagnosis]:
    """The index and the diagnosis of the problem to show: the worst, if not told."""
    worst = diagnose(posterior)
    if not worst.problems:
        return (), worst
    chosen = worst if problem is None else worst.problems[problem]
    assert chosen.problem is not None
    return (chosen.problem,), chosen


def which(at: At) -> str:
    """How a title begins where there are several problems."""
    return f"Problem {at[0]}: " if at else ""


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, closed in pyplot so that nothing shows it twice."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def _figure_of(ax: "Axes") -> "Figure":
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _colors(count: int, colormap: str = "viridis") -> list[Any]:
    import matplotlib

    if count <= LABELLED and colormap == "viridis":
        return list(matplotlib.colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    return list(matplotlib.colormaps[colormap](torch.linspace(0.05, 0.95, count).numpy()))


def _run_label(run: int, count: int) -> str | None:
    return f"run {run}" if 1 < count <= LABELLED else None


def _legend(ax: "Axes", place: Literal["best", "lower right"] = "best") -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc=place, frameon=False, fontsize="small")


def _dots(ax: "Axes", times: list[int], values: Tensor, color: Any) -> None:
    if times:  # an empty line that is not clipped would fill the figure, on logarithmic axes
        ax.plot(times, values, "o", color=color, ms=5, mec="white", mew=0.6, clip_on=False)


def _threshold(ax: "Axes", value: float, text: str, color: str = ACCENT) -> None:
    ax.axhline(value, color=color, ls=":", lw=1)
    ax.text(1, value, f" {text}", color=color, va="center", transform=ax.get_yaxis_transform())


def _time_axis(ax: "Axes", num_steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    margin = 0.02 * max(num_steps, 1)
    ax.set_xlim(num_steps + margin, -margin)
    ax.set_xlabel("t, the steps that remain")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)
