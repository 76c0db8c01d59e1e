r"""Gaussian diffusion models as processes.

A trained network knows :math:`\hat x_0(x_t) = E[x_0 \mid x_t]` in one of its disguises
(`parameterization`); with the tables of a schedule that gives the reverse transitions (Ho et al.
2020; Song et al. 2021, DDIM, for :math:`\eta < 1`)

.. math::
    x_{t-1} = c_0 \hat x_0 + c_t x_t + \sqrt{V}\, z, \qquad
    c_t = \sqrt{\sigma_{t-1}^2 - \eta^2 \tilde\beta_t} / \sigma_t, \qquad
    c_0 = \alpha_{t-1} - c_t \alpha_t .
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from smcdiff.arguments import check_kind, check_number, check_option
from smcdiff.laws import CovariantNormal, normal
from smcdiff.process import Kernel, Process, Signal, Tree, context_rows, flatten_batch

from .calls import ask, check_network, place, scale_of, shape_of
from .classifier_free import ClassifierFree
from .denoisers import Denoiser, MixtureDenoiser
from .grids import Grid, Schedule, check_positive
from .low_rank import low_rank_covariance
from .parameterization import (
    Parameterization,
    Time,
    check_name,
    network_times,
    preconditionings,
    usual_schedule,
)
from .thresholding import Clipping, check_clipping, clip

Variance = Literal["small", "large", "learned", "exact", "mixture"]


class Diffusion(Process):
    r"""A pre-trained Gaussian diffusion model.

    Args:
        network: ``network(x, time, **context)`` with x of shape ``(batch, *event_shape)`` and time
            of shape ``(batch,)``; or an exact :class:`~smcdiff.models.Denoiser`. Context comes as
            tensors with the batch in front; a whole number is a label that all share.
        schedule: the noise schedule that the network was trained with (None: linear betas; for
            ``"edm"`` ``EDM()``, for ``"velocity"`` ``RectifiedFlow()``).
        event_shape: the shape of one sample.
        num_steps: T.
        parameterization: what the network returns: ``"epsilon"``, ``"x0"``, ``"v"``, ``"score"``,
            ``"velocity"``, or ``"edm"`` (raw, without its preconditioning).
        sigma_data: the standard deviation in the preconditioning of ``"edm"``.
        time: what the network is fed: ``"index"`` (integers), ``"sigma"``, ``"log_snr"``,
            ``"c_noise"``, a function of the grid, or the schedule's own (None).
        guidance: classifier-free guidance, in one network call with twice the rows where it acts.
        eta: 1 for DDPM, 0 for DDIM (a deterministic flow of its source).
        variance: V. ``"small"``: :math:`\eta^2\tilde\beta_t`, zero in the last step. ``"large"``:
            :math:`\eta^2\beta_t`. ``"learned"``: interpolated in logarithms by the second half of
            the network's channels (Nichol & Dhariwal 2021, for :math:`\eta = 1`). ``"exact"``:
            :math:`\eta^2\tilde\beta_t + c_0^2 \mathrm{Cov}[x_0|x_t]`, for exact denoisers, and
            ``"mixture"``: the exact kernel of a ``MixtureDenoiser``.
        clip_denoised: bounds for :math:`\hat x_0`, such as (-1, 1), or ``DynamicThresholding()``.
        scale: the standard deviation s of the data, for scalar look-aheads (None: that of an exact
            denoiser, or sigma_data, or 1).
        source: the law of x_T (None: N(0, I) where variance preserving, else N(0, sigma_T^2 I)).
        context_dims: event dimensions of context tensors by name (0 if not named: labels).
        train: leave the network trainable and in its mode, not frozen and in ``eval()``.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: Schedule | None = None,
        event_shape: Sequence[int] | None = None,
        num_steps: int = 100,
        *,
        parameterization: Parameterization = "epsilon",
        sigma_data: float = 0.5,
        time: Time | Callable[[Grid], Tensor] | None = None,
        guidance: ClassifierFree | None = None,
        eta: float = 1.0,
        variance: Variance = "small",
        clip_denoised: Clipping = None,
        scale: float | None = None,
        source: Distribution | None = None,
        context_dims: Mapping[str, int] | None = None,
        train: bool = False,
    ) -> None:
        self.network, self.num_steps, self.eta, self.variance = network, num_steps, eta, variance
        self.parameterization, self.clip_denoised = parameterization, clip_denoised
        check_network("network", network, context_dims)
        self.source, self.context_dims = source, dict(context_dims or {})
        self.guidance, self.event_shape = guidance, shape_of(network, event_shape)
        self._check(variance, eta, source)
        check_kind("schedule", schedule, Schedule, "VariancePreserving(betas)", optional=True)
        self.grid: Grid = (schedule or usual_schedule(parameterization)).grid(num_steps)
        known = "x0" if self.closed_form else parameterization
        self.preconditioning = preconditionings(known, self.grid, sigma_data)
        self.times = network_times(time, self.grid, known)
        usual = sigma_data if known == "edm" else scale_of(network)
        self.scale = usual if scale is None else check_positive("scale", scale)
        self.dtype, self.device, self.network_dtype = place(network)
        if isinstance(network, nn.Module) and not train:
            network.eval().requires_grad_(False)
        self._signals = self._tabulate()
        if guidance is not None:
            guidance.check_reach(self.grid)

    @property
    def closed_form(self) -> bool:
        return isinstance(self.network, Denoiser)

    @property
    def deterministic(self) -> bool:
        return self.eta == 0 and self.variance in ("small", "large", "learned")

    def initial(self, **context: Any) -> Distribution:
        if self.source is not None:
            return self.source
        zero = torch.zeros(self.event_shape, dtype=self.dtype, device=self.device)
        return normal(zero, self.grid.terminal_scale**2, len(self.event_shape))

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        """The network's output, in at least float32, with shape ``(*batch, *event)``."""
        event_dim = len(self.event_shape)
        batch = x.shape[: x.dim() - event_dim]
        if isinstance(self.network, Denoiser):
            self._refuse_context(context)
            flat = x.reshape(*batch, -1)
            mean = self.network.mean(flat, self.grid.alpha[t].item(), self.grid.sigma[t].item())
            return {"output": mean.reshape(x.shape)}
        flat = flatten_batch(self.preconditioning[t].fed(x), event_dim).to(self.network_dtype)
        rows = context_rows(context, batch, self.context_dims, x.device)
        guidance = self._guidance(t)
        if guidance is None:
            out = self._ask(flat, rows, t)
        else:
            out = self._guided(guidance, self._ask(*guidance.both(flat, rows), t))
        return {"output": out.reshape(*batch, *out.shape[1:])}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        mean = self._denoise(x, t, evaluation["output"])
        covariance = cache(lambda: self._covariance(x, t)) if self.closed_form else None
        law = self._law(x, t, mean, evaluation["output"], covariance)
        denoised = normal(mean, self.signal(t).variance, len(self.event_shape))
        return Kernel(law, denoised, covariance)

    def signal(self, t: int) -> Signal:
        return self._signals[t]

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        if self._guidance(t) is not None:
            return None  # a guided estimate of x_0 is no mean of it
        c_0, c_t, _ = self._coefficients(t)
        return c_0 * x_0 + c_t * x

    def calls(self, t: int) -> int:
        return 1 if self._guidance(t) is None else 2

    # ------------------------------------------------------------------------------- the network

    def _ask(self, x: Tensor, rows: dict[str, Any], t: int) -> Tensor:
        out = ask(self.network, x, self.times[t], rows)
        channels = 2 if self.variance == "learned" else 1
        wanted = (len(x), channels * self.event_shape[0], *self.event_shape[1:])
        if tuple(out.shape) != wanted:
            raise ValueError(
                f"the network returned shape {tuple(out.shape)} for a batch of {len(x)}, "
                f"but event_shape={tuple(self.event_shape)} and variance={self.variance!r} need "
                f"{wanted}"
            )
        return out

    def _guidance(self, t: int) -> ClassifierFree | None:
        """What guides at t, if anything does."""
        guides = self.guidance is not None and self.guidance.acts(self.grid.noise[t].item())
        return self.guidance if guides else None

    def _guided(self, guidance: ClassifierFree, output: Tensor) -> Tensor:
        """Half the rows; a learned variance is that of the network with its context."""
        guided = guidance.combine(output)
        if self.variance != "learned":
            return guided
        dim = -len(self.event_shape)
        given = output.chunk(2)[0]
        return torch.cat([guided.chunk(2, dim)[0], given.chunk(2, dim)[1]], dim)

    # ---------------------------------------------------------------------------- the transition

    def _denoise(self, x: Tensor, t: int, output: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        if self.variance == "learned":
            output = output.chunk(2, -event_dim)[0]
        mean = self.preconditioning[t].denoised(x, output)
        return clip(mean, self.clip_denoised, event_dim)

    def _law(
        self,
        x: Tensor,
        t: int,
        denoised: Tensor,
        output: Tensor,
        covariance: Callable[[], tuple[Tensor, Tensor]] | None,
    ) -> Distribution:
        c_0, c_t, small = self._coefficients(t)
        event_dim = len(self.event_shape)
        mean = c_0 * denoised + c_t * x
        if self.deterministic:
            return normal(mean, 0.0, event_dim)
        match self.variance:
            case "small":
                return normal(mean, small, event_dim)
            case "large":
                return normal(mean, self._large(t), event_dim)
            case "learned":
                return normal(mean, self._learned(t, output), event_dim)
            case "exact":
                assert covariance is not None
                diagonal, factor = covariance()
                return CovariantNormal(mean, small + c_0**2 * diagonal, c_0 * factor, event_dim)
            case "mixture":
                return self._mixture(x, t)

    def _coefficients(self, t: int) -> tuple[float, float, float]:
        """c_0, c_t and eta^2 beta-tilde."""
        grid = self.grid
        small = self.eta**2 * grid.posterior(t).variance.item()
        before = grid.sigma[t - 1].item() ** 2
        c_t = math.sqrt(max(before - small, 0.0)) / grid.sigma[t].item()
        return grid.alpha[t - 1].item() - c_t * grid.alpha[t].item(), c_t, small

    def _large(self, t: int) -> float:
        return self.eta**2 * self.grid.transition(t).variance.item()

    def _learned(self, t: int, output: Tensor) -> Tensor:
        """exp(f log beta + (1 - f) log beta-tilde), f = (v + 1) / 2; beta-tilde_2 in place of 0."""
        large = self.grid.transition(t).variance.item()
        small = self.grid.posterior(max(t, 2)).variance.item() if self.num_steps > 1 else large
        share = (output.chunk(2, -len(self.event_shape))[1] + 1) / 2
        return self.eta**2 * torch.exp(share * math.log(large) + (1 - share) * math.log(small))

    def _covariance(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        flat = x.reshape(*x.shape[: x.dim() - len(self.event_shape)], -1)
        assert isinstance(self.network, Denoiser)
        level = self.grid.alpha[t].item(), self.grid.sigma[t].item()
        return low_rank_covariance(self.network, flat, *level)

    def _mixture(self, x: Tensor, t: int) -> Distribution:
        assert isinstance(self.network, MixtureDenoiser)
        c_0, c_t, small = self._coefficients(t)
        parts = self.network.components(x, self.grid.alpha[t].item(), self.grid.sigma[t].item())
        means = c_0 * parts.means + c_t * x[..., None, :]
        covariances = c_0**2 * parts.covariances
        if covariances.dim() == 3:
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            laws: Distribution = dist.MultivariateNormal(means, covariances + small * eye)
        else:
            spread = covariances if covariances.dim() == 2 else covariances[:, None]
            scale = (spread + small).sqrt().expand(means.shape)
            laws = dist.Normal(means, scale).to_event(1)
        logits = dist.Categorical(logits=parts.log_weights, validate_args=False)
        return dist.MixtureSameFamily(logits, laws, validate_args=False)

    def _tabulate(self) -> list[Signal]:
        """The chain's own variance of x_0 given x_t: v_t = v_{t-1} + slope_{t-1}^2 V_t."""
        signals, s2 = [Signal(1.0, 0.0, 1.0, 0.0, 0.0)], self.scale**2
        for t in range(1, self.num_steps + 1):
            alpha, sigma = self.grid.alpha[t].item(), self.grid.sigma[t].item()
            gain = s2 / (alpha**2 * s2 + sigma**2)
            c_0, _, kernel = self._coefficients(t)
            if self.variance == "large":
                kernel = self._large(t)
            if self.variance in ("exact", "mixture"):
                kernel += c_0**2 * gain * sigma**2
            variance = signals[-1].variance + signals[-1].slope ** 2 * kernel
            signals.append(Signal(alpha, sigma, alpha * gain, variance, gain * sigma**2))
        return signals

    # -------------------------------------------------------------------------------- bad input

    def _check(self, variance: str, eta: float, source: Distribution | None) -> None:
        check_name(self.parameterization)
        check_clipping(self.clip_denoised)
        free = "ClassifierFree(2.0, {'label': 10})"
        check_kind("guidance", self.guidance, ClassifierFree, free, optional=True)
        if self.closed_form and self.guidance is not None:
            raise ValueError("an exact denoiser is not conditional: leave the guidance out")
        check_option("variance", variance, get_args(Variance))
        check_number("eta, from DDIM to DDPM,", eta, 0, 1)
        check_kind("source", source, Distribution, "Normal(zero, 1).to_event(1)", optional=True)
        if variance == "exact" and not self.closed_form:
            raise ValueError(
                "variance='exact' needs Cov[x_0 | x_t], which an exact denoiser knows and a "
                "network does not: use 'small', 'large' or 'learned'"
            )
        if source is not None and source.event_shape != self.event_shape:
            raise ValueError(
                f"the source has event shape {tuple(source.event_shape)}, but event_shape="
                f"{tuple(self.event_shape)} is needed: declare event dimensions with .to_event"
            )
        if variance == "mixture" and not isinstance(self.network, MixtureDenoiser):
            raise ValueError("variance='mixture' is the exact kernel of a MixtureDenoiser only")
        if variance == "mixture" and len(self.event_shape) != 1:
            raise ValueError(
                "variance='mixture' is for vectors, but event_shape is "
                f"{tuple(self.event_shape)}: flatten the events, or use another variance"
            )

    def _refuse_context(self, context: dict[str, Any]) -> None:
        if context:
            raise ValueError(
                f"an exact denoiser is not conditional, but got the context {sorted(context)}: it "
                "would be ignored. Leave it out, or use a network that takes it"
            )
