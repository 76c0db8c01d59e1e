r"""Gaussian families that are fitted in closed form, element by element.

With kernel :math:`N(m, \sigma^2)` and coordinates c of a state (its elements, or orthonormal
features of them), a draw of x_s is :math:`c = c(m) + \sigma e`, with :math:`e \sim N(0, 1)` under
the model and :math:`e \sim N(\mu, \rho^2)` under the family:

* :class:`QuadraticTwist`: :math:`\log \psi_s = -\tfrac12 a_s c^2 + b_s c`, whose twisted kernel and
  normaliser are exact (Guarniero et al. 2017, arXiv 1511.06286),

  .. math:: \mu = \sigma \frac{b - a\, c(m)}{1 + a\sigma^2}, \qquad
            \rho^2 = \frac{1}{1 + a\sigma^2};

* :class:`GaussianKernels`: :math:`\mu = \kappa_s c(x_{s+1}) + \beta_s` with any :math:`\rho_s`, an
  affine change of every transition.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.arguments import check_kind, check_number, check_whole
from smcdiff.process import Kernel, Tree, is_deterministic
from smcdiff.program import Program
from smcdiff.twist import TwistValue, View

from .learned import Draw, LearnedTwist, Paths
from .linear_gaussian import law_covariance
from .proposals import Move, Start, sample_as
from .whitening import Rows, Whitened, check_features, coordinates, log_normaliser

NARROWEST = 0.05  # of the kernel's variance: a few paths look narrower than what they come from
WIDEST = 0.9  # of its precision may be taken away: what neighbours share stays a law here


class ElementwiseTwist(LearnedTwist, ABC):
    r"""What the two families share.

    Args:
        features: orthonormal rows with shape ``(k, d)``: only these k coordinates of an event's d
            elements are changed (None: every element). One matrix for all processes, or one by
            name. The elements must then have equal variances.
        pseudo_count: the anchor, in paths.
        floor: the least :math:`\rho^2`.
        reach: how many neighbouring times on either side share what they have learned, each
            counting by its information (None: an eighth of the steps). A parameter costs about
            half a nat per effective path: without sharing, long chains learn noise.
    """

    def __init__(
        self,
        features: Tensor | Mapping[str, Tensor] | None = None,
        pseudo_count: float = 1.0,
        floor: float = NARROWEST,
        reach: int | None = None,
    ) -> None:
        check_kind("features", features, Tensor | Mapping, "torch.eye(2, 9)", optional=True)
        check_number("pseudo_count", pseudo_count, 0, math.inf, "[)")
        check_number("floor", floor, 0, 1, "(]")
        check_whole("reach", reach, 0, or_none="an eighth of the steps")
        self.features, self.pseudo_count, self.floor = features, pseudo_count, floor
        self.reach = reach
        self.tables: dict[str, Tensor] = {}  # by process and time; none: the model's own law

    parameters: int  # by coordinate and time

    def prepare(self, program: Program) -> None:
        self.names = tuple(n for n in program.processes if not program.sources[n].discrete)
        self.num_steps = program.num_steps
        for name in self.names:
            check_features(name, self._features(name), program.processes[name].event_shape.numel())

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.tables)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.tables = dict(tensors)

    # ------------------------------------------------------------------------- twist and proposal

    def evaluate(self, view: View) -> TwistValue:
        return TwistValue(self._log_psi(view.t, view.x, view.batch))

    def start(self, start: Start) -> Move:
        return self._draw(self.num_steps, start.laws, start.draws, {})

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        laws = {n: k.law for n, k in kernels.items()}
        changed = self._changed(t - 1, laws)
        draws = {n: sample_as(law, x[n]) for n, law in laws.items() if n not in changed}
        return self._draw(t - 1, laws, {**x, **draws}, x)

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        return self._score(draw.s, draw.laws, draw.after, draw.before)

    @property
    def paths_needed(self) -> float:
        numbers = sum(table[-self.parameters :].numel() for table in self.tables.values())
        return numbers / (2 * self._reach + 1)

    @property
    def _reach(self) -> int:
        return self.num_steps // 8 if self.reach is None else self.reach

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        size = float(1 / weights.square().sum())
        trust = size / (size + self.pseudo_count)
        found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in self.names}
        for draw in paths.draws():
            for name in self.names:
                if self._learns(draw, draw.laws[name]):
                    law = self._whitened(name, draw.s, draw.laws[name], len(weights))
                    found[name][draw.s] = self._fit_draw(name, draw, law, weights, trust)
        for name, tables in found.items():
            for s, (_, known) in tables.items():
                table = shared(tables, s, self._reach)
                table[0] = table[0].maximum(-WIDEST / known[0].sqrt())
                self.tables[f"{name}/{s}"] = table

    @staticmethod
    def _learns(draw: Draw, law: Distribution) -> bool:
        """Not where nothing is random, nor at a start that is not Gaussian."""
        starts_alone = not draw.kernels and law_covariance({"": law}) is None
        return not is_deterministic(law) and not starts_alone

    @abstractmethod
    def _fit_draw(
        self, name: str, draw: Draw, law: Whitened, weights: Tensor, trust: float
    ) -> tuple[Tensor, Tensor]:
        """The table of one process at one time, and the information in each of its numbers.

        The table begins with a, of which the information is the kernel's squared variance.

        Args:
            trust: the share of the paths in it, against the anchor.
        """

    @abstractmethod
    def _change(self, name: str, s: int, law: Whitened, before: Tensor | None) -> tuple[Rows, Rows]:
        r""":math:`\mu` and :math:`\rho`."""

    # -------------------------------------------------------------------------------- the algebra

    def _has(self, name: str, s: int) -> bool:
        return name in self.names and f"{name}/{s}" in self.tables

    def _changed(self, s: int, laws: Mapping[str, Distribution]) -> list[str]:
        """The processes whose draw of x_s is not the model's own."""
        return [n for n in self.names if self._has(n, s) and not is_deterministic(laws[n])]

    def _features(self, name: str) -> Tensor | None:
        given = self.features.get(name) if isinstance(self.features, Mapping) else self.features
        return None if given is None else given.double()

    def _table(self, name: str, s: int, size: int) -> Tensor:
        table = self.tables[f"{name}/{s}"]
        if table.shape[-1] not in (1, size):
            raise ValueError(
                f"process {name!r} at t = {s} has {size} coordinates, but what was learned has "
                f"{table.shape[-1]}: use it with the process and the plates it was learned with"
            )
        return table

    def _log_psi(self, t: int, x: Mapping[str, Tensor], batch: int) -> Float64[Tensor, " path"]:
        total = torch.zeros(batch, dtype=torch.float64, device=next(iter(x.values())).device)
        for name in self.names:
            if self._has(name, t):
                c = coordinates(x[name], self._features(name))
                a, b = self._table(name, t, c.shape[1])[:2]
                total = total + (b * c - 0.5 * a * c.square()).sum(-1)
        return total

    def _draw(
        self,
        s: int,
        laws: Mapping[str, Distribution],
        like: dict[str, Tensor],
        before: Mapping[str, Tensor],
    ) -> Move:
        """Replaces what is changed, and keeps the rest of ``like``."""
        x, changed = dict(like), self._changed(s, laws)
        for name in changed:
            law = self._whitened(name, s, laws[name], len(like[name]))
            drawn = law.moved(*self._change(name, s, law, before.get(name)))
            x[name] = drawn.reshape(laws[name].mean.shape).to(like[name].dtype)
        return Move(x, self._score(s, laws, x, before) if changed else None)

    def _score(
        self,
        s: int,
        laws: Mapping[str, Distribution],
        x: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
    ) -> Float64[Tensor, " path"]:
        like = next(iter(x.values()))
        total = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        for name in self._changed(s, laws):
            law = self._whitened(name, s, laws[name], len(like))
            shift, width = self._change(name, s, law, before.get(name))
            e = coordinates(law.noise(x[name]), law.features)
            difference = ((e - shift) / width).square() - e.square()
            total = total + (0.5 * difference + width.log()).sum(-1)
        return total

    def _whitened(self, name: str, s: int, law: Distribution, batch: int) -> Whitened:
        covariance = law_covariance({name: law})
        if covariance is None or (covariance.factor is not None and covariance.factor.any()):
            raise ValueError(
                f"process {name!r} at step t = {s + 1}: {type(self).__name__} changes transitions "
                "with independent Gaussian elements, and these are not: build the process with "
                "variance='large' or 'small', or take a ResidualTwist"
            )
        scale, features = covariance.diagonal.sqrt(), self._features(name)
        if features is not None and not bool((scale == scale[:, :1]).all()):
            raise ValueError(
                f"process {name!r} at step t = {s + 1}: features need transitions with one "
                "variance for all elements, and these differ: leave features out"
            )
        return Whitened(law.mean.double().flatten(1).expand(batch, -1), scale, features)


class GaussianKernels(ElementwiseTwist):
    r"""Any affine change of every Gaussian transition, :math:`N(A_s x_{s+1} + B_s, V_s)`.

    Fitted by weighted regression. Its twist is read off the kernels: :math:`\log q / p` as a
    quadratic function of x_s, its slope averaged over the paths. Where the process changes shape,
    the mean is shifted only.
    """

    parameters = 3

    def _change(self, name: str, s: int, law: Whitened, before: Tensor | None) -> tuple[Rows, Rows]:
        c = self._before(law, before)
        _, _, slope, offset, width = self._table(name, s, c.shape[1])
        return slope * c + offset, width.expand(c.shape)

    def _before(self, law: Whitened, before: Tensor | None) -> Rows:
        """The coordinates of x_{s+1}; zeros where there is no such state."""
        if before is None or before[0].numel() != law.mean.shape[1]:
            return torch.zeros_like(coordinates(law.mean, law.features))
        return coordinates(before, law.features)

    def _fit_draw(
        self, name: str, draw: Draw, law: Whitened, weights: Tensor, trust: float
    ) -> tuple[Tensor, Tensor]:
        e = coordinates(law.noise(draw.after[name]), law.features)
        c = self._before(law, draw.before.get(name))
        mean, centre = trust * (weights @ e), weights @ c
        spread = weights @ (c - centre).square()
        slope = trust * (weights @ (e * (c - centre))) / spread.clamp(min=1e-12)
        slope = torch.where(spread > 1e-12, slope, 0.0)
        square = trust * (weights @ e.square()) + 1 - trust
        variance = (square - mean.square() - slope.square() * spread).clamp(min=self.floor)
        offset = mean - slope * centre
        curvature = 1 / variance - 1
        m = coordinates(law.mean, law.features)
        pull = (slope * c + offset) / variance / law.width + curvature * m / law.width.square()
        a = weights @ (curvature / law.width.square()).expand(m.shape)
        table = torch.stack([a, weights @ pull, slope, offset, variance.sqrt()])
        v = law.width.square().mean(0).expand(e.shape[1])
        inner = torch.full_like(v, float(bool(draw.kernels)))  # the start is no transition
        return table, torch.stack([v.square(), v, inner, inner, inner])


class QuadraticTwist(ElementwiseTwist):
    r"""A conjugate twist :math:`\log \psi_s(x) = -\tfrac12 a_s c^2 + b_s c`.

    Its kernels and normalisers are exact, and the normalisers are paid before the draw. Fitted in
    closed form: the twisted kernel matches the weighted mean and variance of every coordinate. A
    kernel whose variance differs from path to path is fitted by its mean variance.
    """

    parameters = 2

    def prepay(
        self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree
    ) -> Float64[Tensor, " particle"] | None:
        if not self.tables:
            return None
        batch = len(next(iter(x.values())))
        total = -self._log_psi(t, x, batch)
        laws = {n: k.law for n, k in kernels.items()}
        for name in self._changed(t - 1, laws):
            law = self._whitened(name, t - 1, laws[name], batch)
            m, v = coordinates(law.mean, law.features), law.width.square()
            a, b = self._table(name, t - 1, m.shape[1])
            total = total + log_normaliser(a, b, m, v).sum(-1)
        return total

    def _change(self, name: str, s: int, law: Whitened, before: Tensor | None) -> tuple[Rows, Rows]:
        m = coordinates(law.mean, law.features)
        a, b = self._table(name, s, m.shape[1])
        kept = 1 / (1 + a * law.width.square())
        shift = law.width * (b - a * m) * kept
        return shift, kept.sqrt().expand(shift.shape)

    def _fit_draw(
        self, name: str, draw: Draw, law: Whitened, weights: Tensor, trust: float
    ) -> tuple[Tensor, Tensor]:
        c = coordinates(draw.after[name], law.features)
        m, v = coordinates(law.mean, law.features), law.width.square().mean(0)
        centre = weights @ m
        mean = trust * (weights @ c) + (1 - trust) * centre
        between = weights @ (m - centre).square()
        prior = between + v + (centre - mean).square()
        within = trust * (weights @ (c - mean).square()) + (1 - trust) * prior
        # the twisted variance w solves w + w^2 between / v^2 = within
        root = (1 + 4 * between * within / v.square()).sqrt()
        variance = (2 * within / (1 + root)).maximum(self.floor * v)
        table = torch.stack([1 / variance - 1 / v, mean / variance - centre / v])
        v = v.expand(c.shape[1])
        return table, torch.stack([v.square(), v])


def shared(tables: Mapping[int, tuple[Tensor, Tensor]], s: int, reach: int) -> Tensor:
    """The average of the tables at times near s, each number by its information.

    A twist that a transition of variance v has shown is known to within 1 / v in its curvature and
    1 / sqrt(v) in its slope: small steps show little of it.
    """
    own, _ = tables[s]
    near = [tables[r] for r in range(s - reach, s + reach + 1) if r in tables]
    near = [(table, known) for table, known in near if table.shape == own.shape]
    total = torch.stack([known for _, known in near]).sum(0)
    average = torch.stack([table * known for table, known in near]).sum(0) / total
    return torch.where(total > 0, average, own)
