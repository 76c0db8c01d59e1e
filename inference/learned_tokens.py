r"""Learned biases of tokens, for discrete processes whose positions are independent given the past.

With kernel :math:`\prod_l f_l(v)` over the positions of a state, a table g is the twist

.. math:: \log \psi_s(x) = \sum_l g_s[l, x_l], \qquad
          q(x_s \mid x_{s+1}) = \prod_l \frac{f_l(v)\, e^{g_s[l, v]}}
                                             {\sum_{v'} f_l(v')\, e^{g_s[l, v']}},

whose kernel and normaliser are exact. A network adds a bias that depends on the whole state: that
is a proposal beside the twist. The mask is a token like others: its bias says *when* to reveal.
Impossible tokens stay impossible.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from smcdiff.arguments import check_number
from smcdiff.laws import base_law
from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.twist import TwistValue, View

from .descent import Descent, Loss
from .learned import Draw, LearnedTwist, Paths
from .proposals import Move, sample_as

SCALINGS, CLOSE = 500, 1e-10
LARGEST = 30.0  # of a bias: what paths never show has no finite one without an anchor

Logits = Float64[Tensor, "path position token"]


class TokenTwist(LearnedTwist):
    r"""A table of log-biases by time, position and token, and perhaps a network on top.

    The table is fitted by iterative scaling,
    :math:`g \mathrel{+}= \log(\text{weighted count} / \text{expected count})`, which rises to the
    maximum of the likelihood.

    Args:
        network: ``network(tokens, t, denoised)`` with tokens of shape ``(path, length)`` at t and
            their probabilities; returns biases with shape ``(path, length, vocabulary + 1)``, the
            last for the mask. It should start at zero, and is trained in place. None: the table
            alone.
        pseudo_count: the anchor, in paths.
        defensive: the least share of the model's own draws in what is fitted. A network may learn
            of every state what one or two paths have shown there; without this share it would
            exclude the rest, and the sweeps' own weights would not tell.
        descent: how the network is trained.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        pseudo_count: float = 1.0,
        defensive: float = 0.1,
        descent: Descent = Descent(),  # noqa: B008 (a frozen value)
    ) -> None:
        check_number("pseudo_count", pseudo_count, 0, math.inf, "[)")
        check_number("defensive", defensive, 0, 1, "[)")
        self.network, self.descent = network, descent
        self.pseudo_count, self.defensive = pseudo_count, defensive
        self.tables: dict[str, Tensor] = {}  # by process and time; none: the model's own law

    def prepare(self, program: Program) -> None:
        self.names = tuple(n for n in program.processes if program.sources[n].discrete)
        self.num_steps = program.num_steps

    @property
    def paths_needed(self) -> float:
        return float(sum(table.numel() for table in self.tables.values()))

    def tensors(self) -> dict[str, Tensor]:
        weights = {} if self.network is None else self.network.state_dict()
        return {**self.tables, **{f"network/{n}": v.clone() for n, v in weights.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        cut = len("network/")
        weights = {n[cut:]: v for n, v in tensors.items() if n.startswith("network/")}
        self.tables = {n: v for n, v in tensors.items() if not n.startswith("network/")}
        if self.network is not None:
            self.network.load_state_dict(weights)

    # ------------------------------------------------------------------------- twist and proposal

    def evaluate(self, view: View) -> TwistValue:
        return TwistValue(self._log_psi(view.t, view.x, view.batch))

    def prepay(
        self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree
    ) -> Float64[Tensor, " particle"] | None:
        if self.network is not None or not self.tables:
            return None
        total = -self._log_psi(t, x, len(next(iter(x.values()))))
        for name in (n for n in self.names if self._has(n, t - 1)):
            logits = self._logits(name, t - 1, kernels[name].law)
            total = total + (logits + self._table(name, t - 1, logits)).logsumexp(-1).sum(-1)
        return total

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        drawn = {n: sample_as(k.law, x[n]) for n, k in kernels.items() if n not in self.names}
        laws = {n: kernels[n].law for n in self.names}
        for name, law in laws.items():
            tilted = self._tilted(name, t - 1, law, x[name], kernels[name])
            tokens = torch.distributions.Categorical(logits=tilted, validate_args=False).sample()
            drawn[name] = tokens.reshape(x[name].shape).to(x[name].dtype)
        drawn = {n: drawn[n] for n in kernels}
        return Move(drawn, self.log_ratio(Draw(t - 1, laws, drawn, x, kernels, cache)))

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        like = next(iter(draw.after.values()))
        total = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        for name in (n for n in self.names if draw.kernels):
            law, kernel = draw.laws[name], draw.kernels[name]
            drawn = draw.after[name].flatten(1)[..., None]
            ours = self._tilted(name, draw.s, law, draw.before[name], kernel).gather(-1, drawn)
            theirs = self._logits(name, draw.s, law).gather(-1, drawn)
            total = total + (theirs - ours).sum((-1, -2))
        return total

    # -------------------------------------------------------------------------------- the algebra

    def _has(self, name: str, s: int) -> bool:
        return f"{name}/{s}" in self.tables

    def _table(self, name: str, s: int, logits: Logits) -> Tensor:
        """g_s, with shape ``(position, token)``."""
        table = self.tables.get(f"{name}/{s}")
        if table is None:
            return torch.zeros_like(logits[0])
        if table.shape != logits.shape[1:]:
            raise ValueError(
                f"process {name!r} at step t = {s + 1} has {tuple(logits.shape[1:])} positions and "
                f"tokens (the mask among them), but what was learned has {tuple(table.shape)}: use "
                "it with the vocabulary and the length it was learned with"
            )
        return table

    def _logits(self, name: str, s: int, law: Distribution) -> Logits:
        law = base_law(law)
        if not isinstance(law, torch.distributions.Categorical):
            raise ValueError(
                f"process {name!r} at step t = {s + 1}: its transition is a {type(law).__name__}, "
                "but biases need positions that change independently, each with a categorical law: "
                "use a StringTwist, or MaskedDiffusion(reveal='independent')"
            )
        logits: Tensor = law.logits.double().log_softmax(-1)
        if bool(logits.isnan().any()):
            raise ValueError(
                f"process {name!r} at step t = {s + 1}: the network's logits leave no token "
                "possible at some position (all of them are -inf, or NaN)"
            )
        return logits.flatten(1, -2)

    def _tilted(
        self, name: str, s: int, law: Distribution, before: Tensor, kernel: Kernel
    ) -> Logits:
        """log q."""
        logits = self._logits(name, s, law)
        bias = self._table(name, s, logits)
        if self.network is not None:
            bias = bias + self._on_top(s + 1, before, probabilities(kernel), logits)
        return (logits + bias).log_softmax(-1)

    def _on_top(self, t: int, before: Tensor, denoised: Tensor, logits: Logits) -> Logits:
        """The network's biases."""
        assert self.network is not None
        tokens = before.flatten(0, -2)
        bias = self.network(tokens, t, denoised.flatten(0, -3))
        wanted = (*tokens.shape, logits.shape[-1])
        if tuple(bias.shape) != wanted:
            raise ValueError(
                f"the network of {type(self).__name__} returned biases of shape "
                f"{tuple(bias.shape)} at step t = {t}, but {wanted} is needed: (path, length, "
                "vocabulary + 1), the last for the mask"
            )
        return bias.double().reshape(logits.shape)

    def _log_psi(self, t: int, x: Mapping[str, Tensor], batch: int) -> Float64[Tensor, " path"]:
        total = torch.zeros(batch, dtype=torch.float64, device=next(iter(x.values())).device)
        for name in (n for n in self.names if self._has(n, t)):
            table, tokens = self.tables[f"{name}/{t}"], x[name].flatten(1)
            total = total + table.expand(batch, -1, -1).gather(-1, tokens[..., None]).sum((-1, -2))
        return total

    # ------------------------------------------------------------------------------- the learning

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        size = float(1 / weights.square().sum())
        trust = (1 - self.defensive) * size / (size + self.pseudo_count)
        losses = []
        for draw in paths.draws():
            for name in (n for n in self.names if draw.kernels):
                logits = self._logits(name, draw.s, draw.laws[name])
                counts = Counts(logits, draw.after[name].flatten(1), trust)
                table = counts.scaled(self._table(name, draw.s, logits), weights)
                self.tables[f"{name}/{draw.s}"] = table
                losses.append(self._loss(name, draw, counts, table))
        if self.network is not None:
            self.descent.minimise(self.network.parameters(), losses, weights)

    def _loss(self, name: str, draw: Draw, counts: "Counts", table: Tensor) -> Loss:
        """The anchored negative log-likelihood of one draw, for some of its paths."""
        before, denoised = draw.before[name], probabilities(draw.kernels[name])

        def loss(rows: Tensor) -> Tensor:
            logits = counts.logits[rows]
            bias = table + self._on_top(draw.s + 1, before[rows], denoised[rows], logits)
            likelihood = (logits + bias).log_softmax(-1)
            possible = torch.where(logits.isfinite(), likelihood, 0.0)
            return -(counts.target[rows] * possible).sum((-1, -2))

        return loss


@dataclass(frozen=True)
class Counts:
    """What some paths say of one draw, and what the model says where it had a choice.

    Attributes:
        logits: log f.
        tokens: what was drawn, with shape ``(path, position)``.
        trust: the share of the paths, against draws from the model at the same places.
    """

    logits: Logits
    tokens: Int64[Tensor, "path position"]
    trust: float

    @cached_property
    def free(self) -> Tensor:
        """Where there was a choice."""
        return self.logits.isfinite().sum(-1, keepdim=True) > 1

    @cached_property
    def target(self) -> Logits:
        """The anchored counts."""
        drawn = torch.nn.functional.one_hot(self.tokens, self.logits.shape[-1])
        return (self.trust * drawn + (1 - self.trust) * self.logits.exp()) * self.free

    def scaled(self, table: Tensor, weights: Float64[Tensor, " path"]) -> Tensor:
        """The table at the maximum of the anchored likelihood, found from another one."""
        shares = weights[:, None, None] * self.free
        observed = (weights[:, None, None] * self.target).sum(0)
        for _ in range(SCALINGS):
            expected = (shares * (self.logits + table).softmax(-1)).sum(0)
            if float((observed - expected).abs().max()) < CLOSE:
                break
            change = torch.where(expected > 0, observed / expected, 1.0).log()
            table = (table + change).clamp(-LARGEST, LARGEST)
        return table


def probabilities(kernel: Kernel) -> Float[Tensor, "*batch position token"]:
    """Those of the tokens of x_0."""
    law = base_law(kernel.denoised)
    probs: Tensor = law.probs
    return probs
