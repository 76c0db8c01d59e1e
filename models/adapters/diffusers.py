"""Models of diffusers as processes: ``prior = from_diffusers("folder", num_steps=50)``.

A folder is what ``save_pretrained`` wrote, of a model or of a whole pipeline (of which the text
encoders are not needed). Nothing is downloaded.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smcdiff.laws import normal
from smcdiff.process import Process

from ..calls import place
from ..classifier_free import ClassifierFree
from ..continuous import RectifiedFlow
from ..diffusion import Diffusion
from ..flow import Flow
from ..solvers import Noise
from .folders import part
from .latent import Decoder
from .scheduled import Scheduled
from .schedulers import Recipe, flow_times, recipe

FLOW = "FlowMatchEulerDiscreteScheduler"
CONTEXT_DIMS = {  # event dimensions of what the models of diffusers are usually given
    "encoder_hidden_states": 2,
    "encoder_attention_mask": 1,
    "text_embeds": 1,
    "time_ids": 1,
    "image_embeds": 1,
    "timestep_cond": 1,
    "pooled_projections": 1,
}
ADDED = ("text_embeds", "time_ids", "image_embeds")  # these go into added_cond_kwargs


def from_diffusers(
    model: Any,
    scheduler: Any = None,
    num_steps: int | None = 100,
    *,
    event_shape: Sequence[int] | None = None,
    eta: float | None = None,
    noise: Noise | None = None,
    guidance: ClassifierFree | None = None,
    scale: float | None = None,
    context_dims: Mapping[str, int] | None = None,
    train: bool = False,
) -> Process:
    """A model of diffusers under one of its schedulers, transition by transition the same.

    In a program, context has the names of the model's own arguments: ``prior("x", class_labels=c)``
    or ``prior("z", encoder_hidden_states=embedding)``, and for SDXL ``text_embeds``, ``time_ids``.

    Args:
        model: a ``UNet2DModel``, ``UNet2DConditionModel`` or anything that is called like them; a
            pipeline; or a folder of one or the other.
        scheduler: ``DDPMScheduler``, ``DDIMScheduler``, ``EDMEulerScheduler``, a first-order
            ``EDMDPMSolverMultistepScheduler`` or ``FlowMatchEulerDiscreteScheduler``; or a folder
            of one (None: the pipeline's). It is copied, not changed.
        num_steps: T; None keeps the time steps that ``scheduler.set_timesteps`` has set.
        event_shape: the shape of one sample (None: from the model's configuration).
        eta: the share of fresh noise with DDIM and EDM schedulers: 1 for ancestral sampling, 0 for
            the ODE (None: the scheduler's own, 0 for DDIM). SMC needs noise.
        noise: that of a flow, as in ``Flow``: ``"memoryless"`` for SMC (None: the scheduler's own
            step, which is the ODE unless it has ``stochastic_sampling``).
        guidance: classifier-free guidance.
        scale: the standard deviation of the data (or latents), for scalar look-aheads.
        context_dims: event dimensions of context tensors beyond the usual ones of diffusers.
        train: leave the network trainable and in its mode.

    Returns:
        A ``Flow`` for flow matching, otherwise a diffusion with the scheduler's transitions.

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError, ValueError: nothing to load, or nothing that can be loaded safely; a
            scheduler whose steps are no Gaussian laws given one state.
    """
    network = part(model, ("unet", "transformer"), "ModelMixin")
    scheduler = _set(part(model if scheduler is None else scheduler, ("scheduler",)), num_steps)
    shape = _event_shape(network, event_shape)
    dims = {**CONTEXT_DIMS, **(context_dims or {})}
    is_flow = type(scheduler).__name__ == FLOW
    _check_options(is_flow, eta, noise)
    if is_flow and not (noise is None and scheduler.config.stochastic_sampling):
        times = flow_times(scheduler)
        wrapped = DiffusersNetwork(network, factor=float(scheduler.config.num_train_timesteps))
        noise = 0.0 if noise is None else noise
        return Flow(
            wrapped,
            shape,
            len(times),
            schedule=RectifiedFlow(spacing=times),
            data_at=0,
            noise=noise,
            method="euler" if noise == 0 else "exponential",
            guidance=guidance,
            scale=1.0 if scale is None else scale,
            context_dims=dims,
            train=train,
        )
    options = {"guidance": guidance, "scale": scale, "context_dims": dims, "train": train}
    return _scheduled(network, recipe(scheduler, eta), shape, **options)


def decoder_from_diffusers(model: Any, chunk_size: int = 8) -> Decoder:
    """The decoder of a latent diffusion model: from the particles' latents to images.

    Args:
        model: an ``AutoencoderKL`` or anything with its ``decode``; a pipeline; or a folder.
        chunk_size: latents per call.

    Raises:
        ImportError, FileNotFoundError, ValueError: as in ``from_diffusers``.
    """
    return Decoder(LatentDecoder(part(model, ("vae",), "ModelMixin")), chunk_size=chunk_size)


class DiffusersNetwork(nn.Module):
    """``network(x, time, **context)`` from a model of diffusers.

    Args:
        model: called as ``model(x, timestep=time, ..., return_dict=False)``.
        factor: of the time.
        sign: of the output.
    """

    def __init__(self, model: nn.Module, factor: float = 1.0, sign: float = 1.0) -> None:
        super().__init__()
        self.model, self.factor, self.sign = model, factor, sign

    def forward(self, x: Tensor, time: Tensor, **context: Any) -> Tensor:
        given = {name: _like(x, value) for name, value in context.items()}
        if added := {name: given.pop(name) for name in ADDED if name in given}:
            given["added_cond_kwargs"] = added
        time = time if self.factor == 1 else self.factor * time
        out: Tensor = self.model(x, timestep=time, **given, return_dict=False)[0]
        return out if self.sign == 1 else self.sign * out


class LatentDecoder(nn.Module):
    """``(batch, *latent)`` to ``(batch, *image)``: undoes the scaling of latents, then decodes."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        config: Any = autoencoder.config
        self.factor = getattr(config, "scaling_factor", None) or 1.0
        self.shift = getattr(config, "shift_factor", None) or 0.0
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        self.moments = None if mean is None or std is None else torch.tensor([mean, std])

    def forward(self, z: Tensor) -> Tensor:
        z = z / self.factor + self.shift
        if self.moments is not None:
            mean, std = self.moments.to(z)[:, :, None, None]
            z = mean + std * z
        autoencoder: Any = self.autoencoder
        out: Tensor = autoencoder.decode(z, return_dict=False)[0]
        return out


def _scheduled(
    network: nn.Module,
    numbers: Recipe,
    shape: Sequence[int],
    **options: Any,
) -> Scheduled:
    zero = torch.zeros(tuple(shape), dtype=place(network)[0], device=place(network)[1])
    base = Diffusion(
        DiffusersNetwork(network, sign=numbers.sign),
        numbers.schedule,
        shape,
        len(numbers.steps),
        parameterization=numbers.parameterization,
        sigma_data=numbers.sigma_data,
        time=lambda grid: numbers.time,
        variance="learned" if numbers.learned else "small",
        clip_denoised=numbers.clipping,
        source=normal(zero, numbers.start, len(shape)),
        **options,
    )
    return Scheduled(base, numbers.steps)


def _check_options(is_flow: bool, eta: float | None, noise: Noise | None) -> None:
    if is_flow and eta is not None:
        raise ValueError(f"a flow has no eta, got {eta}: give noise='memoryless', or a number")
    if not is_flow and noise is not None:
        raise ValueError(f"noise is that of a flow, got {noise!r}: give eta between 0 and 1")


def _like(x: Tensor, value: Any) -> Any:
    """Context in the network's own precision."""
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(x.dtype) if is_real else value


def _set(scheduler: Any, num_steps: int | None) -> Any:
    """A copy, with T time steps."""
    scheduler = copy.deepcopy(scheduler)
    if num_steps is not None:
        scheduler.set_timesteps(num_steps)
    return scheduler


def _event_shape(model: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    size = getattr(model.config, "sample_size", None)
    channels = getattr(model.config, "in_channels", None)
    if size is None or channels is None:
        raise ValueError(
            "the model's configuration does not say how large its samples are: give event_shape, "
            "such as (3, 32, 32)"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)
