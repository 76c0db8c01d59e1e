r"""Discrete processes: a differentiable look-ahead, proposals that follow it, and nested ones.

With p_l the probabilities of the token at position l, given x_t and independent of the others', a
reward r of one-hot tokens that also takes probabilities has the first-order model

.. math:: \log \psi_t(x_t) = r(p) + \sum_l \Big( \log \sum_v p_l(v)\, e^{g_l(v)}
                             - \sum_v p_l(v)\, g_l(v) \Big), \qquad g = \nabla_p\, r(p),

which is exact if r is a sum over positions. The tokens that it prefers are
:math:`q_l(v) \propto p_l(v)\, e^{g_l(v)}`, and tokens of a masked process are revealed when they
would have been: such a proposal changes what is revealed, not when.
"""

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from jaxtyping import Float, Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.arguments import check_callable, check_kind, check_number, check_whole
from smcdiff.dissection import placeholder
from smcdiff.execution import Statement
from smcdiff.laws import base_law, double, log_density
from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.reveals import EvenReveal
from smcdiff.twist import Twist, TwistValue, View

from .evaluation import Evaluator, choose
from .proposals import FromKernel, Move, Proposal, Start, sample_as

Probabilities = dict[str, Float[Tensor, "particle *plates length token"]]
Reward = Callable[[Probabilities], Float[Tensor, " particle"]]
CHECKED = 16  # random strings on which a reward must be the sum of what its positions are worth
LARGEST = 30.0  # of a preference: an estimate of x_0 is no reason to exclude a token


class RelaxedLikelihood(Twist):
    """The first-order model of a reward, at the probabilities of the tokens.

    Args:
        reward: maps the probabilities of all discrete processes, by name, to one number per
            particle, in torch; at one-hot probabilities it should be the program's own
            log-density. It is a look-ahead only: the target stays the program's. None: tabulate
            the program, which must be a sum over positions then.
    """

    def __init__(self, reward: Reward | None = None) -> None:
        check_callable("reward", reward, "lambda p: p['x'][..., 0].sum(-1)", optional=True)
        self.reward = reward

    def prepare(self, program: Program) -> None:
        self.names = tuple(n for n, s in program.sources.items() if s.process and s.discrete)
        self._reward = self.reward
        if self.names and self.reward is None:
            self._reward = _tabulated(program, self.names)

    def evaluate(self, view: View) -> TwistValue:
        log_probs = {n: _logits(view.kernels[n].denoised).detach() for n in self.names}
        if not log_probs or self._reward is None:
            device = view.program.device
            return TwistValue(torch.zeros(view.batch, dtype=torch.float64, device=device))
        with torch.enable_grad():
            probs = {n: value.exp().requires_grad_() for n, value in log_probs.items()}
            value = self._reward(probs)
            self._check(value, view.batch)
            found = torch.autograd.grad(value.sum(), list(probs.values()), allow_unused=True)
        log_psi, cache = value.detach().double(), {}
        for (name, log_prob), gradient in zip(log_probs.items(), found, strict=True):
            bias = torch.zeros_like(log_prob) if gradient is None else gradient
            bias = bias.clamp(-LARGEST, LARGEST)
            cache[f"bias/{name}"] = bias
            log_prob, bias = log_prob.double(), bias.double()
            gain = (log_prob + bias).logsumexp(-1) - (log_prob.exp() * bias).sum(-1)
            log_psi = log_psi + gain.flatten(1).sum(-1)
        return TwistValue(log_psi, cache)

    @staticmethod
    def _check(value: Tensor, batch: int) -> None:
        if value.shape != (batch,) or not value.requires_grad:
            raise ValueError(
                f"the reward of RelaxedLikelihood must return one number per particle, shape "
                f"({batch},), and be differentiable in the probabilities, but it returned shape "
                f"{tuple(value.shape)}, {'with' if value.requires_grad else 'without'} a gradient"
            )


class TiltedTokens(Proposal):
    """The kernel with tokens as :class:`RelaxedLikelihood` prefers them.

    Args:
        temper: scales the preferences (1: all of them; 0: the kernel).
    """

    def __init__(self, temper: float = 1.0) -> None:
        check_number("temper", temper, 0, math.inf, "[)")
        self.temper = temper

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        drawn, ratios = {}, []
        for name, kernel in kernels.items():
            bias = cache["twist"].get(f"bias/{name}")
            law = kernel.law if bias is None else _tilted(kernel.law, self.temper * bias.double())
            drawn[name] = sample_as(law, x[name])
            if bias is not None:
                ratios.append(log_density(kernel.law, drawn[name]) - log_density(law, drawn[name]))
        return Move(drawn, torch.stack(ratios).sum(0) if ratios else None)


class NestedProposal(Proposal):
    r"""Several candidates per particle, one of which is kept.

    Each candidate :math:`x^j` of another proposal q is looked at, weighs
    :math:`v_j = \psi_{t-1}(x^j)\, p(x^j) / q(x^j)` and is kept with a probability in proportion;
    the particle's weight gains their mean over psi_t, which stays unbiased (nested SMC, Naesseth et
    al. 2015, arXiv 1502.02536). M candidates cost M looks, and none of them is looked at again.

    Args:
        num_candidates: M.
        inner: where candidates come from (None: the kernel).
    """

    def __init__(self, num_candidates: int = 8, inner: Proposal | None = None) -> None:
        check_whole("num_candidates", num_candidates)
        check_kind("inner", inner, Proposal, "TiltedTokens()", optional=True)
        self.num_candidates, self.inner = num_candidates, inner or FromKernel()

    def prepare(self, program: Program) -> None:
        self.inner.prepare(program)

    def attach(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.inner.attach(evaluator)

    def latents(self, batch: int, problems: Tensor | None) -> tuple[dict[str, Tensor], float]:
        return self.inner.latents(batch, problems)

    def start(self, start: Start) -> Move:
        return self.inner.start(start)

    def observe(self, view: View) -> Tree:
        problems = {} if view.problems is None else {"problems": view.problems}
        return {"inner": self.inner.observe(view), "latents": dict(view.latents), **problems}

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        own = cache["proposal"]
        inner = {**cache, "proposal": own["inner"]}
        kept, total = self._candidate(t, x, kernels, inner, own)
        for _ in range(self.num_candidates - 1):
            other, value = self._candidate(t, x, kernels, inner, own)
            total = torch.logaddexp(total, value)
            kept = choose(torch.rand_like(total).log() < value - total, other, kept)
        mean = total - math.log(self.num_candidates)
        log_ratio = torch.where(mean.isneginf(), 0.0, mean - kept["seen"]["log_psi"])
        return Move(kept["x"], log_ratio, kept["seen"])

    def _candidate(
        self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], inner: Tree, own: Tree
    ) -> tuple[Tree, Float64[Tensor, " particle"]]:
        """A candidate with the look at it, and log v."""
        move = self.inner.move(t, x, kernels, inner)
        seen = self.evaluator.look(
            t - 1, move.x, own["latents"], inner["memory"], own.get("problems")
        )
        value = seen["log_psi"] if move.log_ratio is None else seen["log_psi"] + move.log_ratio
        return {"x": move.x, "seen": seen}, value


def _logits(law: Distribution) -> Tensor:
    logits: Tensor = base_law(law).logits
    return logits


def _tilted(law: Distribution, bias: Float64[Tensor, "*batch length token"]) -> Distribution:
    """The law with other tokens, revealed when they would have been."""
    match law:
        case torch.distributions.Independent():
            return dist.Independent(_tilted(law.base_dist, bias), law.reinterpreted_batch_ndims)
        case EvenReveal():
            return EvenReveal(law.x, law.t, _prefer(law.tokens.double(), bias))
        case torch.distributions.Categorical():
            size = bias.shape[-1]
            logits = double(law).logits
            tokens = _prefer(logits[..., :size], bias)
            return dist.Categorical(
                logits=torch.cat([tokens, logits[..., size:]], -1), validate_args=False
            )
    raise TypeError(f"a transition of type {type(law).__name__} has no tokens to tilt")


def _prefer(logits: Tensor, bias: Tensor) -> Tensor:
    """The logits plus the bias, with the probability that they have together (it may be zero)."""
    tilted = logits + bias
    before, after = (table.logsumexp(-1, keepdim=True) for table in (logits, tilted))
    return torch.where(before.isneginf(), logits, tilted - after + before)


# ------------------------------------------------------------- rewards that are sums over positions


def _tabulated(program: Program, names: tuple[str, ...]) -> Reward:
    """The program as a linear function of one-hot tokens."""
    others = [n for n in program.sources if n not in names]
    if others or program.num_problems is not None:
        raise ValueError(
            "RelaxedLikelihood() tabulates programs of one problem that have discrete processes "
            f"only, but this one has {others or 'several problems'}: give it a reward"
        )
    shapes, sizes = _event_shapes(program, names)
    device = program.device
    origin = {n: torch.zeros(1, *shapes[n], dtype=torch.int64, device=device) for n in names}
    constant = program.log_joint(origin, {})
    tables = {
        n: torch.zeros(*shapes[n], sizes[n], dtype=torch.float64, device=device) for n in names
    }
    for name in names:
        places = torch.ones(shapes[name]).nonzero()
        for token in range(sizes[name]):
            rows = {n: x.repeat(len(places), *[1] * (x.dim() - 1)) for n, x in origin.items()}
            rows[name][torch.arange(len(places)), *places.T] = token
            tables[name][*places.T, token] = program.log_joint(rows, {}) - constant
    _check_sum(program, tables, constant)

    def reward(probabilities: Probabilities) -> Tensor:
        parts = [(p * tables[n].to(p)).flatten(1).sum(-1) for n, p in probabilities.items()]
        return constant.to(parts[0]) + torch.stack(parts).sum(0)

    return reward


def _event_shapes(
    program: Program, names: tuple[str, ...]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Plates and event of every process, and how many tokens it has."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}

    def state(statement: Statement) -> Tensor:
        process, name = statement.process, statement.name
        x = process.initial(**statement.context).mean
        x = x.expand(*statement.batch, *process.event_shape)
        if name in names:
            shapes[name] = tuple(x.shape[1:])
            kernel = process.kernel(x, process.num_steps, **statement.context)
            sizes[name] = _logits(kernel.denoised).shape[-1]
        return placeholder(statement, x)

    program.execute(state, {}, 1)
    return shapes, sizes


def _check_sum(program: Program, tables: dict[str, Tensor], constant: Tensor) -> None:
    """Refuses rewards that are no sums over positions."""
    stream = torch.Generator().manual_seed(0)
    strings, expected = {}, constant.expand(CHECKED)
    for name, table in tables.items():
        shape = (CHECKED, *table.shape[:-1])
        tokens = torch.randint(table.shape[-1], shape, generator=stream).to(table.device)
        worth = table.expand(CHECKED, *table.shape).gather(-1, tokens[..., None])
        strings[name], expected = tokens, expected + worth.flatten(1).sum(-1)
    error = (program.log_joint(strings, {}) - expected).abs().max()
    if not error < 1e-4 * (1 + expected.abs().max()):
        raise ValueError(
            "the program's reward is no finite sum over positions (on random strings it differs "
            f"from one by up to {float(error):.3g}): give RelaxedLikelihood a differentiable reward"
        )
