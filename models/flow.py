r"""Flow-matching models as processes.

A network knows the velocity :math:`v_s(x) = E[\dot x_s \mid x_s = x]` of a path
:math:`x_s = \alpha_s x_0 + \sigma_s \varepsilon` (``velocities.py``). That gives an ODE, and for
every noise g an SDE with the same marginals (``solvers.py``). Here s runs from 0 (data) to 1
(noise); the literature's other direction is converted where the network is called, nowhere else.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor, nn

from smcdiff.arguments import check_kind, check_option, check_shape
from smcdiff.laws import normal
from smcdiff.process import Kernel, Process, Signal, Tree, context_rows, flatten_batch

from .calls import ask, check_network, place
from .classifier_free import ClassifierFree
from .continuous import ContinuousSchedule, RectifiedFlow
from .grids import Schedule, check_positive
from .solvers import (
    OWN,
    TORCHDIFFEQ,
    Noise,
    average_velocity,
    integrate,
    require_torchdiffeq,
    spread,
    stages,
    transition,
)
from .velocities import levels


class Flow(Process):
    r"""A pre-trained flow-matching (rectified-flow, stochastic-interpolant) model.

    ``Flow(network, (1, 28, 28), 50)`` is a memoryless SDE, to be steered by particles;
    ``Flow(network, (1, 28, 28), 20, noise=0.0, method="heun")`` is the ODE.

    Args:
        velocity: ``velocity(x, time, **context)`` with x of shape ``(batch, *event_shape)`` and
            time of shape ``(batch,)`` in [0, 1]; returns :math:`d x / d\,\mathrm{time}`.
        event_shape: the shape of one sample.
        num_steps: T.
        schedule: the path that the network was trained on, and the times that are kept of it (None:
            the straight one, uniform; ``RectifiedFlow(shift=3.0)`` as in Stable Diffusion 3;
            ``Interpolant(alpha, sigma)`` for any other).
        data_at: the network's time of the data. 1: its time is 1 - s and velocities point to the
            data. 0: its time is s and they point to noise.
        noise: g. ``"memoryless"``: x_0 is independent of the source, as fine-tuning needs
            (Domingo-Enrich et al. 2025) and DDPM does. A number, or a function of s. 0.0: the ODE,
            where only the source is random: for NUTS. SMC needs noise, to let copies of a particle
            part; look-ahead twists know most of memoryless flows.
        method: ``"exponential"``: exact up to the change of the network's estimates within a step;
            its last step has no variance; for a noise that vanishes at the data (with one that does
            not, the error falls slower than 1/T). ``"euler"``: Euler-Maruyama. For the ODE also
            ``"midpoint"`` and ``"heun"`` (two calls per step), and the solvers of torchdiffeq
            (extra ``ode``): ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``,
            ``"adaptive_heun"``, ``"rk4"``. Adaptive ones choose their substeps for the whole batch,
            so that particles agree with themselves alone to the tolerance only.
        tolerance: relative and absolute, of adaptive solvers.
        adjoint: differentiate torchdiffeq's solution by the adjoint equation (gradients reach x
            and the parameters, but no context).
        scale: the standard deviation of the data, for scalar look-aheads.
        source: the law of x_T (None: N(0, I)). Any other one is for the ODE only, since the score
            is not known from the velocity then. A process as the source makes a
            ``Chain(process, Flow(..., noise=0.0))``.
        guidance: classifier-free guidance of the velocity (None: the network as it is).
        context_dims: event dimensions of context tensors by name (0 if not named: labels).
        train: leave the network trainable and in its mode; otherwise it is frozen and in
            ``eval()``.

    Raises:
        ValueError: an unknown method or one that cannot do with noise, a source of another shape;
            at the first call, a velocity of another shape.
        ImportError: torchdiffeq is needed and not installed.
    """

    def __init__(
        self,
        velocity: Callable[..., Tensor],
        event_shape: Sequence[int],
        num_steps: int = 100,
        *,
        schedule: ContinuousSchedule | None = None,
        data_at: int = 1,
        noise: Noise = "memoryless",
        method: str = "exponential",
        tolerance: float = 1e-5,
        adjoint: bool = False,
        scale: float = 1.0,
        source: Distribution | None = None,
        guidance: ClassifierFree | None = None,
        context_dims: Mapping[str, int] | None = None,
        train: bool = False,
    ) -> None:
        check_network("velocity", velocity, context_dims)
        self.velocity, self.event_shape = velocity, check_shape("event_shape", event_shape)
        self.num_steps, self.data_at = num_steps, data_at
        self.schedule = schedule or RectifiedFlow()
        self.noise, self.method, self.source = noise, method, source
        self.tolerance, self.adjoint = tolerance, adjoint
        self.scale = check_positive("scale", scale)
        self.guidance, self.context_dims = guidance, dict(context_dims or {})
        self._check()
        self.dtype, self.device, self.network_dtype = place(velocity)
        if isinstance(velocity, nn.Module) and not train:
            velocity.eval().requires_grad_(False)
        self.grid = self.schedule.grid(num_steps)
        self._levels = levels(self.grid)
        self._steps = [
            transition(self.schedule, now, then, noise, method)
            for then, now in itertools.pairwise(self._levels)
        ]
        self._signals = self._tabulate()
        self._counted: dict[int, int] = {}
        if guidance is not None:
            guidance.check_reach(self.grid)

    @property
    def deterministic(self) -> bool:
        return self.noise == 0

    def initial(self, **context: Any) -> Distribution:
        if self.source is not None:
            return self.source
        zero = torch.zeros(self.event_shape, dtype=self.dtype, device=self.device)
        return normal(zero, self.grid.terminal_scale**2, len(self.event_shape))

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        """The velocity dx/ds at x_t and, for solvers with stages, its average over the step; in at
        least float32, with shape ``(*batch, *event)``."""
        s, after = self._ends(t)
        count = 0

        def field(state: Tensor, at: float | Tensor) -> Tensor:
            nonlocal count
            count += self._calls_at(at)
            return self._ask(state, at, context)

        velocity = field(x, s)
        if self.method in ("exponential", "euler"):
            return {"velocity": velocity}
        if self.method in OWN:
            average = average_velocity(field, x, velocity, s, after, self.method)
        else:
            parameters = self._trainable() if self.adjoint else None
            average = integrate(field, x, s, after, self.method, self.tolerance, parameters)
            self._counted[t] = count
        return {"velocity": velocity, "average": average}

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        velocity, step = evaluation["velocity"], self._steps[t - 1]
        mean = step.on_x * x + step.on_velocity * evaluation.get("average", velocity)
        denoised = self._levels[t].denoised(x, velocity)
        signal, event_dim = self.signal(t), len(self.event_shape)
        unsure = 0.0 if signal is None else signal.variance
        return Kernel(normal(mean, step.variance, event_dim), normal(denoised, unsure, event_dim))

    def signal(self, t: int) -> Signal | None:
        return self._signals[t] if self.source is None else None

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        averaged = self.method not in ("exponential", "euler")
        if averaged or self.source is not None or self._guidance(self._ends(t)[0]) is not None:
            return None  # a guided estimate of x_0 is no mean of it
        step, level = self._steps[t - 1], self._levels[t]
        return step.on_x * x + step.on_velocity * level.velocity(x, x_0, "x0")

    def calls(self, t: int) -> int:
        """For solvers of torchdiffeq: those of the last evaluation (at first of its start only)."""
        if t in self._counted:
            return self._counted[t]
        return sum(self._calls_at(s) for s in stages(*self._ends(t), self.method))

    def _ask(self, x: Tensor, s: float | Tensor, context: dict[str, Any]) -> Tensor:
        """dx/ds: the network's velocity, in this package's direction of time."""
        event_dim = len(self.event_shape)
        batch = x.shape[: x.dim() - event_dim]
        at = torch.as_tensor(1.0 - s if self.data_at == 1 else s, dtype=torch.float64)
        flat = flatten_batch(x, event_dim).to(self.network_dtype)
        rows = context_rows(context, batch, self.context_dims, x.device)
        guidance = self._guidance(s)
        if guidance is None:
            out = ask(self.velocity, flat, at, rows)
        else:
            twice, rows = guidance.both(flat, rows)
            out = guidance.combine(ask(self.velocity, twice, at, rows))
        out = self._check_output(out, batch)
        return -out if self.data_at == 1 else out

    def _guidance(self, s: float | Tensor) -> ClassifierFree | None:
        """What guides at the time s, if anything does."""
        if self.guidance is None:
            return None
        at = torch.tensor([float(s)], dtype=torch.float64)
        alpha, sigma = self.schedule.level(at)
        return self.guidance if self.guidance.acts((sigma / alpha).item()) else None

    def _calls_at(self, s: float | Tensor) -> int:
        return 1 if self._guidance(s) is None else 2

    def _ends(self, t: int) -> tuple[float, float]:
        """The times at which the step out of x_t begins and ends."""
        return self.grid.time[t].item(), self.grid.time[t - 1].item()

    def _tabulate(self) -> list[Signal]:
        """The chain's own variance of x_0 given x_t: v_t = v_{t-1} + slope_{t-1}^2 V_t."""
        signals = [Signal(1.0, 0.0, 1.0, 0.0, 0.0)]
        for level, step in zip(self._levels[1:], self._steps, strict=True):
            slope, unsure = spread(level, self.scale)
            variance = signals[-1].variance + signals[-1].slope ** 2 * step.variance
            signals.append(Signal(level.alpha, level.sigma, slope, variance, unsure))
        return signals

    def _trainable(self) -> list[Tensor]:
        if not isinstance(self.velocity, nn.Module):
            return []
        return [p for p in self.velocity.parameters() if p.requires_grad]

    # -------------------------------------------------------------------------------- bad input

    def _check(self) -> None:
        check_option("method", self.method, (*OWN, *TORCHDIFFEQ))
        check_kind("schedule", self.schedule, Schedule, "RectifiedFlow()")
        free = "ClassifierFree(2.0, {'label': 10})"
        check_kind("guidance", self.guidance, ClassifierFree, free, optional=True)
        if isinstance(self.noise, str) and self.noise != "memoryless":
            raise ValueError(
                f"noise is 'memoryless', a number or a function of s, got {self.noise!r}"
            )
        if self.noise != 0 and self.method not in ("exponential", "euler"):
            raise ValueError(
                f"method={self.method!r} solves ODEs, but noise={self.noise!r} makes an SDE: "
                "take method='exponential' or 'euler', or noise=0.0"
            )
        if self.method in TORCHDIFFEQ:
            require_torchdiffeq()
        if self.data_at not in (0, 1):
            raise ValueError(f"data_at is the network's time of the data, 0 or 1: {self.data_at}")
        self._check_source()

    def _check_source(self) -> None:
        if self.source is None:
            return
        if isinstance(self.source, Process):
            raise ValueError(
                f"the source is a process: compose them, Chain(source, Flow(..., noise=0.0)), got "
                f"source={type(self.source).__name__}"
            )
        check_kind("source", self.source, Distribution, "Normal(zero, 1).to_event(1)")
        if self.source.event_shape != self.event_shape:
            raise ValueError(
                f"the source has event shape {tuple(self.source.event_shape)}, but event_shape="
                f"{tuple(self.event_shape)} is needed: declare event dimensions with .to_event"
            )
        if self.noise != 0:
            raise ValueError(
                "the score of a flow follows from its velocity only if its source is N(0, I): with "
                f"another source take noise=0.0 (the ODE), got noise={self.noise!r}"
            )

    def _check_output(self, out: Tensor, batch: Size) -> Tensor:
        wanted = (batch.numel(), *self.event_shape)
        if out.shape != wanted:
            raise ValueError(
                f"the velocity returned shape {tuple(out.shape)} for a batch of {batch.numel()}, "
                f"but event_shape={tuple(self.event_shape)} needs {wanted}"
            )
        return out.reshape(*batch, *self.event_shape)
