r"""Processes: pre-trained samplers as random variables of Pyro programs.

A process is a Markov chain from noise to data,

.. math:: p(x_{T:0}) = p_T(x_T) \prod_{t=T}^{1} p(x_{t-1} \mid x_t),

where :math:`x_0` is data, :math:`x_T` is noise and t counts the steps that remain.

``x = prior("x")`` is one Pyro statement. Unhandled, it emits the sample sites ``x_T, ..., x_0`` and
the deterministic site ``x``; an inference algorithm intercepts it as a whole (an effect of type
``"process"``) and puts its particles' estimate of :math:`x_0` in its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from pyro.poutine.runtime import effectful
from torch import Size, Tensor

from .arguments import check_callable, check_whole

Tree = Any  # a tensor, or a dict of trees: whatever a network returned, one row per particle
Context = Mapping[str, Any]  # what a program passes to a process, by keyword
Level = float | Tensor  # one number, or one per element of the event


@dataclass(frozen=True)
class Signal:
    r"""What a Gaussian process knows at step t, for data of scale s.

    Attributes:
        alpha, sigma: :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`.
        slope: :math:`d\hat x_0 / d x_t`, the denoiser's slope; 1 at t = 0.
        variance: the variance of x_0 given x_t *under the discretised chain*; 0 at t = 0.
        spread: the same for Gaussian data and exact transitions: :math:`\sigma_t^2 / \alpha_t`
            times the slope, and :math:`s^2` where :math:`\alpha_t = 0`.
    """

    alpha: Level
    sigma: Level
    slope: Level
    variance: Level
    spread: Level

    @property
    def precision(self) -> Level:
        r""":math:`\alpha_t^2 / \sigma_t^2`, the signal-to-noise ratio."""
        if isinstance(self.sigma, Tensor) or self.sigma > 0:
            return self.alpha**2 / self.sigma**2
        return float("inf")


@dataclass(frozen=True)
class Kernel:
    r"""One reverse transition and what its evaluation says about the data.

    Attributes:
        law: :math:`p(x_{t-1} \mid x_t)`, batched over particles; a ``Delta`` where it has no
            variance.
        denoised: a law of x_0 given x_t (a point, a Gaussian, categorical probabilities).
        covariance: computes the exact covariance diag(a) + F F' of x_0 given x_t, as a of shape
            ``(*batch, d)`` and F of shape ``(*batch, d, r)``, where it is known in closed form.
    """

    law: Distribution
    denoised: Distribution
    covariance: Callable[[], tuple[Tensor, Tensor]] | None = None


class Process(ABC):
    r"""A pre-trained reverse process.

    Subclasses define :meth:`initial`, :meth:`evaluate` and :meth:`kernel`. States have shape
    ``(*batch, *event_shape)``; tensors in ``context`` have the batch shape on the left.

    Attributes:
        num_steps: T, the number of transitions.
        event_shape: the shape of x_0.
    """

    num_steps: int
    event_shape: Size

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of shape {tuple(self.event_shape)}, {self.num_steps} steps>"

    @property
    def closed_form(self) -> bool:
        """Whether :attr:`Kernel.covariance` is known."""
        return False

    def shape_at(self, t: int) -> Size:
        """The event shape of x_t; that of x_0 unless a process changes shape on its way."""
        return self.event_shape

    @abstractmethod
    def initial(self, **context: Any) -> Distribution:
        r"""The law :math:`p_T(x_T)`, with an empty batch shape or that of the context."""

    @abstractmethod
    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        """The one network call at x_t: a tensor, or a dict of tensors, with the batch in front."""

    @abstractmethod
    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        """The transition out of ``x``, a function of ``evaluation`` (made here if None)."""

    @property
    def deterministic(self) -> bool:
        """Whether no transition has any variance: a flow of its source."""
        return False

    def signal(self, t: int) -> Signal | None:
        """Noise levels and scalar denoiser statistics at t; None where x_t is not a noised x_0."""
        return None

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        """The mean of x_{t-1} given both ends of the path: that of the transition out of ``x``, if
        its estimate of x_0 were right. None where transitions have no such estimate in them."""
        return None

    def calls(self, t: int) -> int:
        """How many network calls :meth:`evaluate` makes at t."""
        return 1

    def extends(self, other: "Process", theirs: Context, context: Context) -> bool:
        """Whether :meth:`extend` builds upon the evaluation of ``other`` under *their* context."""
        return False

    def extend(self, evaluation: Tree, x: Tensor, t: int, **context: Any) -> Tree:
        """This process's evaluation, given that of the one it :meth:`extends` at the same state."""
        raise TypeError(f"{type(self).__name__} extends no other process")

    # A process may stand for several named sites (a Team); an ordinary one stands for itself.
    def members(self, name: str) -> tuple[str, ...]:
        """The names of the sites that this process stands for when called ``name``."""
        return (name,)

    def split(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """One state per member."""
        return {name: x}

    def join(self, name: str, xs: dict[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        return xs[name]

    def split_law(self, name: str, law: Distribution) -> dict[str, Distribution]:
        """One law per member; the members are independent given the past."""
        return {name: law}

    def member_dim(self, name: str, member: str) -> int:
        """How many dimensions an event of one member has."""
        return len(self.event_shape)

    def register(self, name: str) -> None:
        """Makes trainable parameters known to Pyro (nothing to do for a frozen process)."""

    def __call__(self, name: str, *unnamed: Any, **context: Any) -> Any:
        """Declares the random variable ``name``; returns x_0 (for a Team, one x_0 per member)."""
        if unnamed:
            raise TypeError(
                f"context is given by name, as in prior({name!r}, label=7), but {unnamed[0]!r} "
                "came without one"
            )
        if not isinstance(name, str) or not name:
            raise ValueError(f"a process needs a site name, as in prior('x'), but got {name!r}")
        self.register(name)
        x = statement(self, name, context, name=name)
        members = self.split(name, x)
        return members if self.members(name) != (name,) else x


@effectful(type="process")
def statement(process: Process, site: str, context: dict[str, Any]) -> Tensor:
    """The default meaning of a process: sample its whole path, one Pyro site per step."""
    x = _emit(process, site, process.num_steps, process.initial(**context))
    for t in range(process.num_steps, 0, -1):
        x = _emit(process, site, t - 1, process.kernel(x, t, **context).law)
    for name, member in process.split(site, x).items():
        _deterministic(name, member, process.member_dim(site, name))
    return x


def _emit(process: Process, site: str, t: int, law: Distribution) -> Tensor:
    """Samples x_t at the sites ``<member>_<t>``; zero-variance laws are deterministic sites."""
    if process.members(site) == (site,):
        return _sample(f"{site}_{t}", law)
    laws = process.split_law(site, law)
    return process.join(site, {m: _sample(f"{m}_{t}", each) for m, each in laws.items()})


def _sample(name: str, law: Distribution) -> Tensor:
    if isinstance(law, Delta):
        return _deterministic(name, law.v, law.event_dim)
    x: Tensor = pyro.sample(name, law)
    return x


def _deterministic(name: str, value: Tensor, event_dim: int) -> Tensor:
    """``pyro.deterministic``, marked as auxiliary: in a guide it proposes nothing."""
    x: Tensor = pyro.sample(
        name,
        Delta(value, event_dim=event_dim).mask(False),
        obs=value,
        infer={"_deterministic": True, "is_auxiliary": True},
    )
    return x


def is_deterministic(law: Distribution) -> bool:
    """Whether a transition has no variance (and therefore no density)."""
    return isinstance(law, Delta)


def check_finite(name: str, t: int, evaluation: Tree) -> None:
    """Refuses NaN and +inf in what a network returned (-inf is the log 0 of discrete logits)."""
    if isinstance(evaluation, dict):
        for key, part in evaluation.items():
            check_finite(f"{name}[{key}]" if len(evaluation) > 1 else name, t, part)
    elif isinstance(evaluation, Tensor) and evaluation.is_floating_point():
        bad = evaluation.isnan() | evaluation.isposinf()
        if bool(bad.any()):
            raise ValueError(
                f"process {name!r}: its network returned NaN or infinity at step t = {t} "
                f"({int(bad.sum())} of {bad.numel()} numbers). Check the network's dtype and input "
                "scale, or clip its estimate (clip_denoised)"
            )


def flatten_batch(x: Tensor, event_dim: int) -> Tensor:
    """(*batch, *event) -> (batch, *event)."""
    return x.reshape(-1, *x.shape[x.dim() - event_dim :])


def is_label(value: object) -> bool:
    """Whether a context is a whole number, as in ``prior("x", label=7)``."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def context_rows(
    context: Mapping[str, Any],
    batch: tuple[int, ...],
    event_dims: Mapping[str, int],
    device: torch.device,
) -> dict[str, Any]:
    """Context as a network wants it: tensors with one row per row of the flattened batch.

    Args:
        context: tensors with shape ``(*batch, *event)``, up to broadcasting, or a whole number in
            place of a label that all rows share; anything else stays.
        batch: the batch shape of the state.
        event_dims: how many event dimensions a tensor has, by name (0 if not named).
        device: where the state lies.

    Raises:
        ValueError: a tensor does not fit the batch.
    """
    rows = {}
    for name, value in context.items():
        if is_label(value):
            value = torch.tensor(int(value), device=device)
        if type(value).__module__ == "numpy":
            raise ValueError(f"context {name!r} is a NumPy array: give torch.as_tensor(...) of it")
        if isinstance(value, Tensor):
            own = value.shape[value.dim() - event_dims.get(name, 0) :]
            try:
                value = value.expand(Size((*batch, *own))).reshape(-1, *own)
            except RuntimeError as error:
                raise ValueError(
                    f"context {name!r} has shape {tuple(value.shape)}, which does not fit a "
                    f"batch of shape {tuple(batch)} with {len(own)} event dimensions: give one "
                    "value for all, or one per draw (under a plate, or from a latent); if a value "
                    f"has dimensions of its own, build the process with context_dims={{{name!r}: "
                    "their number}"
                ) from error
        rows[name] = value
    return rows


def batched(function: Callable[..., Tensor], event_dim: int) -> Callable[..., Tensor]:
    """Lets a network that wants exactly one batch axis be used in a program, under any plates.

    Args:
        function: maps ``(batch, *event)`` to ``(batch, *out)``.
        event_dim: the number of dimensions of one input.

    Returns:
        A function from ``(*batch, *event)`` to ``(*batch, *out)``.
    """

    check_callable("function", function, "an nn.Module")
    check_whole("event_dim", event_dim, 0)

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = x.shape[: x.dim() - event_dim]
        out = function(flatten_batch(x, event_dim), *args, **kwargs)
        return out.reshape(*batch, *out.shape[1:])

    return call
