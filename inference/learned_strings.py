r"""A learned look-ahead at whole strings, for discrete processes that reveal tokens in any way.

One network sees the tokens of x_t and what the model says of the masked ones, and returns a scalar
h and a bias g for every token,

.. math:: \log \psi_t(x_t) = \log \psi^{\mathrm{base}}_t(x_t) + h_\theta(x_t), \qquad
          q_l(v) \propto p_l(v)\, e^{g_{l,\theta}(v)},

with p_l the model's law of a token once it is revealed; *which* are revealed stays the model's
choice. The biases are fitted by weighted likelihood. Among paths drawn from any law Q, h is the
logarithm of a ratio of two laws of x_t,

.. math:: e^{h(x_t)} \propto \frac{E_Q[\text{weight still to come} \mid x_t]}
                                  {\psi^{\mathrm{base}}_t(x_t)},

which a logistic regression learns that tells draws of one from draws of the other: no logarithm of
a reward is averaged, so the optimum is the exact twist.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu, softplus

from smcdiff.arguments import check_kind, check_number
from smcdiff.process import Kernel, Tree
from smcdiff.program import Program
from smcdiff.twist import Twist, TwistValue, View

from .descent import Descent, Loss
from .learned import Draw, LearnedTwist, Paths
from .learned_tokens import probabilities
from .masked_proposals import LARGEST, TiltedTokens
from .proposals import Move

PLACES = 4  # waves that say where a token stands
REACH = 5  # tokens that a convolution sees


class StringNetwork(nn.Module):
    """Convolutions along a string of any length; biases and scalar start at zero.

    Args:
        vocabulary: number of tokens, the mask not counted.
        width: hidden units per position.
        depth: number of convolutions.
    """

    def __init__(self, vocabulary: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary + 1, width)
        self.denoised = nn.Linear(vocabulary, width)
        self.places = nn.Linear(2 * PLACES + 1, width)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, REACH, padding=REACH // 2) for _ in range(depth)
        )
        self.pooled = nn.Linear(2 * width, width)
        self.bias, self.scalar = nn.Linear(width, vocabulary), nn.Linear(width, 1)
        for last in (self.bias, self.scalar):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        tokens: Int64[Tensor, "path length"],
        time: float,
        denoised: Float[Tensor, "path length token"],
    ) -> tuple[Float[Tensor, "path length token"], Float[Tensor, " path"]]:
        place = torch.linspace(0, 1, tokens.shape[1]).to(denoised)[:, None]
        angles = math.pi * place * 2.0 ** torch.arange(PLACES).to(place)
        where = torch.cat([angles.sin(), angles.cos(), torch.full_like(place, time)], -1)
        hidden = self.tokens(tokens) + self.denoised(denoised) + self.places(where)
        for layer in self.layers:
            hidden = hidden + layer(silu(hidden).mT).mT
        whole = self.pooled(torch.cat([hidden.mean(1), hidden.amax(1)], -1))
        return self.bias(silu(hidden)), self.scalar(silu(whole))[:, 0]


Build = Callable[[int], nn.Module]


class StringTwist(LearnedTwist):
    """A scalar of whole strings as twist, and biases of tokens as proposal.

    Unlike :class:`TokenTwist` it follows ``MaskedDiffusion`` with either way to reveal. With
    :class:`NestedProposal` around the kernel, or the kernel alone, it serves as a twist only.

    Args:
        base: an analytic twist to start from, such as ``DenoisedLikelihood()`` or
            ``RelaxedLikelihood()``, whose preferences the biases then add to (None: psi = 1).
        build: makes one network per process from the size of its vocabulary; called as
            ``network(tokens, t / T, denoised)`` with shapes ``(path, length)`` and ``(path, length,
            vocabulary)``, it returns biases with the latter shape and scalars with shape
            ``(path,)``, zero at first (None: :class:`StringNetwork`).
        pseudo_count: the anchor, in paths.
        defensive: the least share of the model's own draws in what the biases are fitted to (see
            :class:`TokenTwist`).
        descent: how the networks are trained.

    Attributes:
        networks: by process; they exist from the first evaluation on.
    """

    def __init__(
        self,
        base: Twist | None = None,
        build: Build | None = None,
        pseudo_count: float = 1.0,
        defensive: float = 0.1,
        descent: Descent = Descent(200, 128, 4, held_out=0.25),  # noqa: B008 (a frozen value)
    ) -> None:
        check_kind("base", base, Twist, "RelaxedLikelihood()", optional=True)
        check_number("pseudo_count", pseudo_count, 0, math.inf, "[)")
        check_number("defensive", defensive, 0, 1, "[)")
        self.base, self.build, self.descent = base, build or StringNetwork, descent
        self.pseudo_count, self.defensive = pseudo_count, defensive
        self.networks: dict[str, nn.Module] = {}
        self.sizes: dict[str, int] = {}
        self.steer = TiltedTokens()

    def prepare(self, program: Program) -> None:
        self.names = tuple(n for n in program.processes if program.sources[n].discrete)
        self.num_steps, self.size = program.num_steps, 1
        if self.base is not None:
            self.base.prepare(program)
            self.take_needs(self.base)

    @property
    def num_draws(self) -> int:
        return 0 if self.base is None else self.base.num_draws

    @property
    def paths_needed(self) -> float:
        sizes = [p.numel() for network in self.networks.values() for p in network.parameters()]
        return sum(sizes) / (self.num_steps * self.size)

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, network in self.networks.items():
            found[f"{name}/vocabulary"] = torch.tensor(self.sizes[name])
            found |= {f"{name}/{key}": v.clone() for key, v in network.state_dict().items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.networks, self.sizes = {}, {}
        for name in (n.removesuffix("/vocabulary") for n in tensors if n.endswith("/vocabulary")):
            cut = len(name) + 1
            own = {n[cut:]: v for n, v in tensors.items() if n.startswith(f"{name}/")}
            network = self._network(name, int(own.pop("vocabulary")))
            network.to(next(iter(own.values())).device)
            network.load_state_dict(own)

    # ------------------------------------------------------------------------- twist and proposal

    def evaluate(self, view: View) -> TwistValue:
        like = next(iter(view.x.values()))
        total = torch.zeros(view.batch, dtype=torch.float64, device=like.device)
        value = TwistValue(total) if self.base is None else self.base.evaluate(view)
        cache = dict(value.cache)
        with torch.no_grad():
            for name in self.names:
                denoised = probabilities(view.kernels[name])
                bias, scalar = self._output(name, view.t, view.x[name], denoised)
                given = cache.get(f"bias/{name}", torch.zeros_like(bias))
                cache |= {f"given/{name}": given, f"bias/{name}": given + bias}
                total = total + scalar
        return TwistValue(value.log_psi + total, {**cache, "scalar": total}, value.memory)

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        return self.steer.move(t, x, kernels, cache)

    def log_ratio(self, draw: Draw) -> Float64[Tensor, " path"]:
        like = next(iter(draw.after.values()))
        total = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        for name in (n for n in self.names if draw.kernels):
            step = self._step(name, draw, draw.after[name])
            bias, _ = self._output(name, draw.s + 1, step.before, step.denoised)
            apart = step.log_p - (step.log_p + step.given + bias).log_softmax(-1)
            tokens = step.tokens.clamp(max=step.denoised.shape[-1] - 1)[..., None]
            apart = apart.gather(-1, tokens)[..., 0]
            total = total + torch.where(step.shown, apart, 0.0).flatten(1).sum(-1)
        return total

    def _output(
        self, name: str, t: int, x: Tensor, denoised: Tensor
    ) -> tuple[Float64[Tensor, "path *plates length token"], Float64[Tensor, " path"]]:
        """g and h."""
        network = self._network(name, denoised.shape[-1]).to(x.device)
        self.size = denoised.shape[-2]
        rows = denoised.flatten(0, -3).to(next(network.parameters()))
        bias, scalar = network(x.flatten(0, -2), t / self.num_steps, rows)
        if bias.shape != rows.shape or scalar.shape != rows.shape[:1]:
            raise ValueError(
                f"the network of {type(self).__name__} returned shapes {tuple(bias.shape)} and "
                f"{tuple(scalar.shape)} at step t = {t}, but {tuple(rows.shape)} and "
                f"{tuple(rows.shape[:1])} are needed: a bias for every token at every position, "
                "and one scalar per string"
            )
        bias = bias.double().clamp(-LARGEST, LARGEST).reshape(denoised.shape)
        return bias, scalar.double().reshape(len(x), -1).sum(-1)

    def _network(self, name: str, vocabulary: int) -> nn.Module:
        if name not in self.networks:
            with torch.random.fork_rng([]):  # the run's own draws are the same the next time
                self.networks[name], self.sizes[name] = self.build(vocabulary), vocabulary
        if self.sizes[name] != vocabulary:
            raise ValueError(
                f"process {name!r} has {vocabulary} tokens, but what was learned has "
                f"{self.sizes[name]}: use it with the vocabulary it was learned with"
            )
        return self.networks[name]

    @staticmethod
    def _step(name: str, draw: Draw, tokens: Tensor) -> "Step":
        kernel, before = draw.kernels[name], draw.before[name]
        shown = draw.after[name] != before
        denoised = probabilities(kernel)
        given = draw.cache["twist"][f"given/{name}"]
        return Step(before, denoised, given, tokens, shown)

    # ------------------------------------------------------------------------------- the learning

    def fit(self, paths: Paths, weights: Float64[Tensor, " path"]) -> None:
        trust = (1 - self.defensive) * self._trust(weights)
        drawn, draws = paths.log_sampling, list(paths.draws())[1:]
        foreseen = [d.cache["log_psi"] - d.cache["twist"]["scalar"] for d in draws]
        given = [(drawn + log_psi).softmax(0) for log_psi in foreseen]
        wanted = [(drawn + to_go).softmax(0) for to_go in paths.to_go()]
        wanted = [no + self._trust(yes) * (yes - no) for yes, no in zip(wanted, given, strict=True)]
        seen = torch.stack([weights, *wanted, *given]).mean(0)
        losses = [
            self._loss(draw, paths.x[-1], trust, weights / seen, yes / seen, no / seen)
            for draw, yes, no in zip(draws, wanted, given, strict=True)
        ]
        parameters = [p for network in self.networks.values() for p in network.parameters()]
        if parameters:
            self.descent.minimise(parameters, losses, seen)

    def _trust(self, weights: Float64[Tensor, " path"]) -> float:
        """The share of the paths, against the anchor."""
        size = float(1 / weights.square().sum())
        return size / (size + self.pseudo_count)

    def _loss(
        self,
        draw: Draw,
        last: Mapping[str, Tensor],
        trust: float,
        likely: Tensor,
        wanted: Tensor,
        given: Tensor,
    ) -> Loss:
        """Of one draw: anchored likelihood of the biases, logistic regression of the scalar.

        Args:
            last: x_0, which tells of all tokens that are still masked, not of the next ones only.
            likely, wanted, given: what a row counts as an example of the escort law, of the weight
                still to come, and of the analytic twist.
        """
        steps = {name: self._step(name, draw, last[name]) for name in self.names}

        def loss(rows: Tensor) -> Tensor:
            misfit, scalar = torch.zeros_like(likely[rows]), torch.zeros_like(likely[rows])
            for name, step in steps.items():
                some = step.take(rows)
                bias, own = self._output(name, draw.s + 1, some.before, some.denoised)
                revealed = 1 / (draw.s + 1)  # of what is masked, on average
                misfit, scalar = misfit + revealed * some.misfit(bias, trust), scalar + own
            told_apart = wanted[rows] * softplus(-scalar) + given[rows] * softplus(scalar)
            return likely[rows] * misfit + told_apart

        return loss


@dataclass(frozen=True)
class Step:
    """One recorded step of one process.

    Attributes:
        before: x_t.
        denoised: what the model says of its tokens.
        given: the preferences of the analytic twist.
        tokens: what the tokens became.
        shown: which were revealed in this step.
    """

    before: Int64[Tensor, "path *plates length"]
    denoised: Float[Tensor, "path *plates length token"]
    given: Float[Tensor, "path *plates length token"]
    tokens: Int64[Tensor, "path *plates length"]
    shown: Bool[Tensor, "path *plates length"]

    @property
    def log_p(self) -> Float64[Tensor, "path *plates length token"]:
        return self.denoised.double().log()

    def take(self, rows: Tensor) -> "Step":
        """Some of the paths."""
        parts = (self.before, self.denoised, self.given, self.tokens, self.shown)
        return Step(*(part[rows] for part in parts))

    def misfit(self, bias: Tensor, trust: float) -> Float64[Tensor, " path"]:
        """The anchored negative log-likelihood of all tokens that are still masked."""
        size = self.denoised.shape[-1]
        masked = self.before == size
        p = self.denoised.double()
        ours = (self.log_p + self.given + bias).log_softmax(-1)
        drawn = one_hot(self.tokens.clamp(max=size - 1), size)
        target = (trust * drawn + (1 - trust) * p) * masked[..., None]
        return -torch.where(p > 0, target * ours, 0.0).sum(-1).flatten(1).sum(-1)
