"""What is known of a network that comes from outside, and one call of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from smcdiff.arguments import check_callable, check_kind, check_shape, check_whole

from .denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser
from .gaussians import described


def place(network: object) -> tuple[torch.dtype, torch.device, torch.dtype]:
    """The dtype of states (at least float32), the device, and the network's own dtype."""
    tensors = []
    if isinstance(network, nn.Module):
        tensors = [p for p in (*network.parameters(), *network.buffers()) if p.is_floating_point()]
    own = tensors[0].dtype if tensors else torch.get_default_dtype()
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.promote_types(own, torch.float32), device, own


def ask(network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Mapping[str, Any]) -> Tensor:
    """The network's output for a batch, in at least float32.

    Args:
        network: ``network(x, time, **rows)``.
        x: states in the network's dtype, with shape ``(batch, *event)``.
        time: one time for all, fed with shape ``(batch,)``: as integers if it is one, else in the
            network's dtype; in float32 to networks in bfloat16, whose 8 bits cannot tell 999 from
            1000.
        rows: context, with the batch in front.

    Raises:
        ValueError: the output is no tensor of floating-point numbers.
    """
    exact = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    dtype = exact if time.is_floating_point() else time.dtype
    times = time.to(dtype).to(x.device).repeat(len(x))  # with its gradient, if it has one
    try:
        out = network(x, times, **rows)
    except (TypeError, RuntimeError) as error:
        given = {"x": x, "time": times, **rows}
        told = ", ".join(f"{name} {_kind(value)}" for name, value in given.items())
        error.add_note(f"the network was called as network(x, time, **context) with {told}")
        raise
    except IndexError as error:
        held = {n: described(v) for n, v in rows.items() if isinstance(v, Tensor)}
        raise ValueError(f"the network failed with {error}; its context was {held}") from error
    if not isinstance(out, Tensor) or not out.is_floating_point():
        got = f"dtype {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"the network returned {got}, but a tensor of floating-point numbers is needed: "
            "wrap it, as in lambda x, time: network(x, time).sample"
        )
    return out.to(torch.promote_types(out.dtype, torch.float32))


def _kind(value: object) -> str:
    """What an error message says about an argument of a network."""
    if not isinstance(value, Tensor):
        return f"= {value!r}"
    return f"of shape {tuple(value.shape)} ({value.dtype}, {value.device})"


def check_network(name: str, network: object, context_dims: object) -> None:
    """Refuses what cannot be asked, and dimensions of its context that are no numbers by name."""
    check_callable(name, network, "an nn.Module or lambda x, time: ...")
    check_kind("context_dims", context_dims, Mapping, "{'prompt': 2}", optional=True)
    for key, dims in dict(context_dims or {}).items():  # type: ignore[call-overload]
        check_whole(f"context_dims[{key!r}]", dims, 0)


def shape_of(network: object, event_shape: Sequence[int] | None) -> Size:
    """The shape of one sample: known for exact denoisers, else to be given."""
    if event_shape is not None:
        return check_shape("event_shape", event_shape)
    if isinstance(network, GaussianDenoiser):
        network = network.mixture
    if isinstance(network, MixtureDenoiser):
        return network.means.shape[-1:]
    raise ValueError("event_shape is needed: the shape of one sample, such as (1, 28, 28)")


def scale_of(network: object) -> float:
    """The root mean square deviation of the data: known for exact denoisers, else 1."""
    if not isinstance(network, Denoiser):
        return 1.0
    x = torch.zeros(shape_of(network, None), dtype=torch.float64, device=place(network)[1])
    far = network.covariance(x, 0.0, 1.0)  # nothing is known of x_0 there
    return math.sqrt(far.diagonal(dim1=-2, dim2=-1).mean().item())
