r"""A recorded draw of an analytic twist's proposal, scored again if that had pointed elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.process import Kernel, Tree

from .learned import Draw
from .linear_gaussian import Covariance, LocalTwist, TwistedStep, law_covariance, stack


@dataclass(frozen=True)
class Steered:
    """One recorded draw under the analytic proposal, to be scored under any residual.

    Attributes:
        noise: the draw as an offset from the kernel's mean.
        covariance: V.
        local: the analytic look-ahead.
    """

    noise: Float64[Tensor, "path d"]
    covariance: Covariance
    local: LocalTwist

    def take(self, rows: Tensor) -> "Steered":
        """Some of the paths."""

        def cut(part: Tensor | None) -> Tensor | None:
            return part if part is None or len(part) == 1 else part[rows]

        diagonal, local = cut(self.covariance.diagonal), self.local
        assert diagonal is not None
        return Steered(
            self.noise[rows],
            Covariance(diagonal, cut(self.covariance.factor)),
            LocalTwist(local.direction[rows], *map(cut, (local.slope, local.noise, local.total))),
        )

    def within(self, basis: Float64[Tensor, "d k"]) -> "SteeredWithin":
        """The same for directions in the span of a basis: cheap in many dimensions."""
        step = TwistedStep(self.covariance, self.local)
        rows = basis.mT / self.covariance.diagonal[:, None].sqrt()
        return SteeredWithin(*step.expansion(self.noise, rows))

    def log_ratio(self, u: Float64[Tensor, "path d"] | float = 0.0) -> Float64[Tensor, " path"]:
        """log p - log q."""
        direction = self.local.direction + u / self.covariance.diagonal.sqrt()
        local = replace(self.local, direction=direction)
        return TwistedStep(self.covariance, local).log_ratio(self.noise)


@dataclass(frozen=True)
class SteeredWithin:
    """log p - log q of a recorded draw by the coordinates of u in a basis: a quadratic function."""

    value: Float64[Tensor, " path"]
    gradient: Float64[Tensor, "path k"]
    hessian: Float64[Tensor, "some k k"]

    def take(self, rows: Tensor) -> "SteeredWithin":
        """Some of the paths."""
        hessian = self.hessian if len(self.hessian) == 1 else self.hessian[rows]
        return SteeredWithin(self.value[rows], self.gradient[rows], hessian)

    def log_ratio(self, u: Float64[Tensor, "path k"]) -> Float64[Tensor, " path"]:
        """log p - log q."""
        curved = (u[:, None] @ self.hessian @ u[..., None])[:, 0, 0]
        return self.value + (self.gradient * u).sum(-1) + 0.5 * curved


def join(parts: Sequence[SteeredWithin]) -> SteeredWithin:
    """The draws of several times, one time's paths after the other's."""
    values, gradients = [p.value for p in parts], [p.gradient for p in parts]
    hessians = [p.hessian.expand(len(p.value), -1, -1) for p in parts]
    return SteeredWithin(torch.cat(values), torch.cat(gradients), torch.cat(hessians))


def steerable(
    names: Sequence[str], kernels: Mapping[str, Kernel], x: Mapping[str, Tensor]
) -> Covariance | None:
    """V of some processes, where there is something to steer; None elsewhere."""
    laws = {n: kernels[n].law for n in names}
    alike = all(law.mean.shape == x[n].shape for n, law in laws.items())
    return law_covariance(laws) if alike else None


def steered(names: Sequence[str], draw: Draw, twist: Tree) -> Steered | None:
    """What an analytic twist makes of a draw; None where nothing is steered."""
    covariance = steerable(names, draw.kernels, draw.before)
    if covariance is None:
        return None
    means = stack({n: draw.laws[n].mean for n in names})
    noise = stack({n: draw.after[n] for n in names}) - means
    direction = twist.get("direction", torch.zeros_like(noise))
    local = LocalTwist(direction)
    if "slope" in twist:
        local = LocalTwist(direction, twist["slope"], twist["noise"], twist.get("total"))
    return Steered(noise, covariance, local)
