r"""An analytic twist to a learned power per step, :math:`\log \psi_t = a_t r_t`.

r_t is the analytic log-twist, d its direction: with a kernel of mean m and covariance V the
proposal has the mean :math:`m + a_t V d`, and its power is the weighted regression

.. math:: a_t = \frac{\sum_i w_i\, d_i^\top (x_{t-1}^i - m_i)}{\sum_i w_i\, d_i^\top V_i d_i},

the maximum of the weighted likelihood of those transitions. Every element of a state speaks for it,
so few paths do. (A factor of psi_t that is the same for all particles would cancel.)
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.arguments import check_kind, check_number, check_whole
from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.twist import Twist, TwistValue, View

from .denoised import DenoisedLikelihood
from .learned import Draw, LearnedTwist, Paths
from .proposals import Move, Start, TwistedKernel
from .steered import steered

TINY = 1e-12  # a Gaussian to the power 0 has no finite covariance


class PowerTwist(LearnedTwist):
    """An analytic twist, and the proposal that it steers, raised to a power that is learned.

    The smallest family: it fits with tens of particles, in any program, and only ever weakens or
    strengthens what the analytic twist says. Where that steers nothing (rewards without gradients,
    tokens) the power stays; x_T is drawn as the analytic twist would.

    Args:
        base: the analytic twist (None: ``DenoisedLikelihood()``).
        begin: the power before any learning; 0 is the model's own law with psi = 1.
        largest: the largest power.
        pseudo_count: the anchor, in paths at the first power that move by one deviation of the
            kernel; positive.
        reach: how many neighbouring times on either side share what they know (None: an eighth of
            the steps).
    """

    def __init__(
        self,
        base: Twist | None = None,
        *,
        begin: float = 1.0,
        largest: float = 4.0,
        pseudo_count: float = 1.0,
        reach: int | None = None,
    ) -> None:
        if not 0 <= begin <= largest:
            raise ValueError(f"begin must be in [0, largest = {largest}], but got {begin}")
        check_kind("base", base, Twist, "DenoisedLikelihood()", optional=True)
        check_number("pseudo_count", pseudo_count, 0, math.inf, "()")
        check_whole("reach", reach, 0, or_none="an eighth of the steps")
        self.base, self.begin, self.largest = base or DenoisedLikelihood(), begin, largest
        self.pseudo_count, self.reach = pseudo_count, reach
        self.powers: Tensor | None = None  # a_1, ..., a_T
        self.steer = TwistedKernel()

    def prepare(self, program: Program) -> None:
        self.base.prepare(program)
        self.steer.prepare(program)
        self.names = self.steer.names
        self.take_needs(self.base)
        if self.powers is not None and len(self.powers) != program.num_steps:
            raise ValueError(
                f"the powers were learned for {len(self.powers)} steps, but the program takes "
                f"{program.num_steps}: use it with the processes that it was learned with"
            )

    @property
    def num_draws(self) -> int:
        return self.base.num_draws

    @property
    def paths_needed(self) -> float:
        return 1.0

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.powers is None else {"powers": self.powers.clone()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.powers = tensors["powers"].clone() if tensors else None

    # ------------------------------------------------------------------------- twist and proposal

    def evaluate(self, view: View) -> TwistValue:
        value = self.base.evaluate(view)
        return TwistValue(self._power(view.t) * value.log_psi, value.cache, value.memory)

    def start(self, start: Start) -> Move:
        return self.steer.start(start)

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        return self.steer.move(t, x, kernels, {**cache, "twist": self._raised(cache["twist"], t)})

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        like = next(iter(draw.after.values()))
        found = None
        if draw.kernels and "direction" in draw.cache["twist"]:
            found = steered(self.names, draw, self._raised(draw.cache["twist"], draw.s + 1))
        if found is None:
            return torch.zeros(len(like), dtype=torch.float64, device=like.device)
        return found.log_ratio()

    def _power(self, t: int) -> float:
        return self.begin if self.powers is None else float(self.powers[t - 1])

    def _raised(self, twist: Tree, t: int) -> Tree:
        """What the analytic twist tells the proposal, to the power a_t."""
        power = self._power(t)
        if "direction" not in twist:
            return twist
        raised = {**twist, "direction": power * twist["direction"]}
        if "noise" in twist:
            raised["noise"] = twist["noise"] / max(power, TINY)
        return {n: part for n, part in raised.items() if n != "total" or power == 1}

    # ------------------------------------------------------------------------------- the learning

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        size = float(1 / weights.square().sum())
        sums = [self._sums(draw, weights) for draw in list(paths.draws())[:0:-1]]
        reach = len(sums) // 8 if self.reach is None else self.reach
        near = [sums[max(0, k - reach) : k + reach + 1] for k in range(len(sums))]
        along, squares = size * torch.stack([sum(each, sums[0] * 0) for each in near]).mT
        powers = (along + self.pseudo_count * self.begin) / (squares + self.pseudo_count)
        self.powers = powers.clamp(0, self.largest)

    def _sums(self, draw: Draw, weights: Tensor) -> Float64[Tensor, "2"]:
        """The weighted means of d'e and of d'Vd, where something is steered."""
        found = None
        if "direction" in draw.cache["twist"]:
            found = steered(self.names, draw, draw.cache["twist"])
        if found is None:
            return torch.zeros(2, dtype=torch.float64, device=weights.device)
        direction = found.local.direction
        shift = found.covariance.times(direction[:, None])[:, 0]
        each = torch.stack([(direction * found.noise).sum(-1), (direction * shift).sum(-1)])
        return each @ weights
