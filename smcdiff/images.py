"""Posteriors over images: the mean, the standard deviation, and draws side by side."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .averages import draw
from .plots import choose, new_figure, which

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .posterior import Posterior

CHANNELS = (1, 3)
UNKNOWN = (0.3, 0.45, 0.7)  # the blue of pixels that are nan: no grey value looks like it


def plot_samples(
    posterior: "Posterior",
    site: str | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    num_draws: int = 24,
    problem: int | None = None,
    fig: "Figure | None" = None,
) -> "Figure":
    """Posterior mean and standard deviation of an image, and equally weighted draws of all runs.

    Args:
        site: a site whose event is an image: (H, W), (1, H, W) or (3, H, W) (None: the first such).
        shape: the shape of its events, where images are laid flat.
        beside: more images by title, such as the truth and the observation, shown first; nan is
            blue.
        num_draws: draws shown.
    """
    at, _ = choose(posterior, problem)
    site = site or _image_site(posterior, shape)
    found = posterior.expectation(site)
    draws = _events(posterior, site, shape, at, num_draws)
    size = draws.shape[1:]
    mean, sd = found.mean[at].reshape(size), found.sd[at].reshape(size).mean(0)
    extra = {name: _as_image(x, size) for name, x in (beside or {}).items()}
    scale = _scale([draws, mean, *extra.values()])
    figure = fig or new_figure(9.5, 4.4)
    columns = math.ceil((len(extra) + 2) / 2)
    left, right = list(figure.subfigures(1, 2, False, width_ratios=(1.15 * columns, 3.2)).flat)
    _show_all(left, {**extra, "posterior mean": mean}, sd, scale, columns)
    rows = max(1, round(math.sqrt(len(draws) / 1.5)))
    for ax, image in zip(_grid(right, rows, math.ceil(len(draws) / rows)), draws, strict=False):
        _show(ax, image, scale)
    right.suptitle(f"{len(draws)} draws of {site}", fontsize="medium")
    row, column = divmod(int(sd.argmax()), sd.shape[1])
    figure.suptitle(
        f"{which(at)}{site} is known to ± {float(sd.mean()):.2g} on average, and least at row "
        f"{row}, column {column}: ± {float(sd.max()):.2g}"
    )
    return figure


def _image_site(posterior: "Posterior", shape: tuple[int, ...] | None) -> str:
    shapes = {}
    for site, x in posterior.samples.items():
        event = tuple(x.shape[x.dim() - posterior.event_dim(site) :])
        shapes[site] = event
        if _is_image(event) or (shape is not None and math.prod(event) == math.prod(shape)):
            return site
    raise ValueError(
        "no site has events shaped (H, W), (1, H, W) or (3, H, W): the sites and their event "
        f"shapes are {shapes}. Where images are laid flat, give shape=(H, W)"
    )


def _is_image(event: tuple[int, ...]) -> bool:
    return len(event) == 2 or (len(event) == 3 and event[0] in CHANNELS)


def _events(
    posterior: "Posterior",
    site: str,
    shape: tuple[int, ...] | None,
    at: tuple[int, ...],
    count: int,
) -> Tensor:
    """Equally weighted draws of all runs together, with shape ``(draw, channel, H, W)``."""
    x = posterior.samples[site][at]
    event = shape or tuple(x.shape[2:])
    if not _is_image(event):
        raise ValueError(
            f"site {site!r} has values of shape {tuple(x.shape[2:])}, which are no images: give "
            "shape=(H, W), (1, H, W) or (3, H, W)"
        )
    particles = posterior.particles
    log_weights = (particles.log_weights + particles.log_norm[..., None])[at].flatten()
    rows = draw(log_weights, count)
    images = x.flatten(0, 1)[rows].detach().cpu().double()
    return images.reshape(count, *((1,) if len(event) == 2 else ()), *event)


def _as_image(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if x.numel() != math.prod(size):
        raise ValueError(f"an image beside draws of shape {tuple(size)} has shape {tuple(x.shape)}")
    return x.detach().cpu().double().reshape(size)


def _scale(images: list[Tensor]) -> tuple[float, float]:
    """The range of values, common to all pictures."""
    values = torch.cat([image.flatten() for image in images])
    values = values[values.isfinite()]
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1


def _show_all(
    figure: Any, images: dict[str, Tensor], sd: Tensor, scale: tuple[float, float], columns: int
) -> None:
    axes = _grid(figure, 2, columns)
    for ax, (title, image) in zip(axes, images.items(), strict=False):
        _show(ax, image, scale)
        ax.set_title(title, fontsize="medium")
    last = axes[len(images)]
    drawn = last.imshow(sd.numpy(), cmap="magma", vmin=0)
    last.set_title("standard deviation", fontsize="medium")
    figure.colorbar(drawn, ax=last, orientation="horizontal", fraction=0.06, pad=0.04)


def _grid(figure: Any, rows: int, columns: int) -> "list[Axes]":
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return axes


def _show(ax: "Axes", image: Tensor, scale: tuple[float, float]) -> None:
    low, high = scale
    if len(image) == 1:
        import matplotlib

        colormap = matplotlib.colormaps["gray"].with_extremes(bad=UNKNOWN)
        ax.imshow(image[0].numpy(), cmap=colormap, vmin=low, vmax=high)
    else:
        pixels = ((image - low) / (high - low)).clamp(0, 1).permute(1, 2, 0)
        ax.imshow(pixels.where(~pixels.isnan(), pixels.new_tensor(UNKNOWN)).numpy())
