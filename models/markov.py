r"""Exact denoisers of Markov chains over strings, by forward and backward messages.

.. math:: p(x) = \frac{1}{Z}\, \pi(x^1) \prod_{l=2}^{L} P_l(x^{l-1}, x^l)\; e^{r(x)},

where the reward r, if there is one, is that of an automaton (``automata.py``): with its state s_l
after l tokens, (x^l, s_l) is a Markov chain again. So at any length there are, in closed form, the
law of masked tokens given the revealed ones, log Z, exact draws, and the optimal twist
:math:`E[e^{r(x)} \mid \text{revealed tokens}]` of every chain whose data law this is.

Messages are probabilities in float64, scaled to one at every position. They are indexed
[token, state]; M(s, v, s') is 1 where the automaton moves from s to s' at token v.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional

from smcdiff.arguments import check_kind, check_whole

from .automata import Automaton
from .gaussians import described, refused

Tokens = Int64[Tensor, "*batch length"]
Messages = list[Float64[Tensor, "batch token state"]]


class MarkovDenoiser(nn.Module):
    """Strings of L tokens, each in 0 .. V - 1, and V for "masked".

    Where the revealed tokens are impossible together, masked ones are uniform.

    Args:
        initial: The law of the first token, with shape (V,).
        transitions: P, with shape (V, V), rows adding to one; or one per step, (L - 1, V, V).
        length: L, where there is one matrix for all steps.
        reward: r (None: 0).
    """

    initial: Tensor
    transitions: Tensor
    moves: Tensor
    rewards: Tensor

    def __init__(
        self,
        initial: Float[Tensor, " token"],
        transitions: Float[Tensor, "*step token token"],
        length: int | None = None,
        reward: Automaton | None = None,
    ) -> None:
        super().__init__()
        check_kind("initial", initial, Tensor, "torch.tensor([0.5, 0.5])")
        check_kind("transitions", transitions, Tensor, "torch.full((2, 2), 0.5)")
        check_whole("length", length, or_none="the transitions tell it")
        if (length is None) == (transitions.ndim == 2):
            raise ValueError(
                "give length where one matrix serves all steps, and only there: got transitions "
                f"with shape {tuple(transitions.shape)} and length={length}"
            )
        steps = transitions if length is None else transitions.expand(length - 1, -1, -1)
        _check_law("initial", initial, (len(initial),))
        _check_law("transitions", steps, (len(steps), len(initial), len(initial)))
        self.register_buffer("initial", initial.double())
        self.register_buffer("transitions", steps.double())
        self.reward = reward
        moves = torch.zeros(1, len(initial), dtype=torch.int64) if reward is None else reward.moves
        if moves.shape[1] != len(initial):
            raise refused(
                f"a reward of {len(initial)} tokens",
                f"one of {moves.shape[1]}",
                "Build it with vocabulary=, without the mask.",
            )
        rewards = torch.zeros(1) if reward is None else reward.rewards
        self.register_buffer("moves", functional.one_hot(moves, len(moves)).to(self.initial))
        self.register_buffer("rewards", rewards.to(self.initial))

    @classmethod
    def fit(
        cls, strings: Int64[Tensor, "string length"], vocabulary: int, by_position: bool = False
    ) -> "MarkovDenoiser":
        """The chain of largest likelihood; tokens that never occur are followed by any other.

        Args:
            strings: without masks.
            by_position: whether every step has its own matrix.
        """
        hot = functional.one_hot(strings, vocabulary).double()
        counts = torch.einsum("nlv,nlw->lvw", hot[:, :-1], hot[:, 1:])
        counts = counts if by_position else counts.sum(0)
        totals = counts.sum(-1, keepdim=True)
        table = torch.where(totals > 0, counts / totals.clamp(min=1), 1 / vocabulary)
        return cls(hot[:, 0].mean(0), table, None if by_position else strings.shape[1])

    def tilted(self, reward: Automaton) -> "MarkovDenoiser":
        """The same chain with a further reward."""
        total = reward if self.reward is None else self.reward + reward
        return MarkovDenoiser(self.initial, self.transitions, reward=total)

    @property
    def length(self) -> int:
        return len(self.transitions) + 1

    @property
    def vocabulary(self) -> int:
        return len(self.initial)

    @property
    def log_evidence(self) -> Float64[Tensor, ""]:
        """log Z = log E[e^r]; 0 without a reward."""
        return self.log_joint(self._masked(1))[0]

    def forward(self, tokens: Tokens) -> Float64[Tensor, "*batch length token"]:
        """The log-probabilities of every token at every position, given the revealed ones."""
        shown = self._shown(tokens)
        ahead, _ = self._backward(shown)
        joint = torch.stack([(f * b).sum(-1) for f, b in self._forward(shown, ahead)], -2)
        possible = joint.sum(-1, keepdim=True) > 0
        joint = torch.where(possible, joint, shown.double())
        return joint.log().log_softmax(-1).reshape(*tokens.shape, self.vocabulary)

    def log_joint(self, tokens: Tokens) -> Float64[Tensor, "*batch"]:
        r""":math:`\log \sum_x p(x) e^{r(x)}` over the strings x that agree with the tokens."""
        shown = self._shown(tokens)
        ahead, scale = self._backward(shown)
        total = (self._first(shown) * ahead[0]).sum((-1, -2)).log() + scale
        return total.reshape(tokens.shape[:-1])

    def log_prob(self, tokens: Tokens) -> Float64[Tensor, "*batch"]:
        """The log-probability of the revealed tokens."""
        return self.log_joint(tokens) - self.log_evidence

    def log_twist(self, tokens: Tokens) -> Float64[Tensor, "*batch"]:
        r""":math:`\log E[e^{r(x)} \mid \text{revealed}]`, x drawn from the chain without reward."""
        plain = MarkovDenoiser(self.initial, self.transitions)
        return self.log_joint(tokens) - plain.log_joint(tokens)

    def complete(self, tokens: Tokens) -> Tokens:
        """One exact draw of the masked tokens, given the revealed ones, which must be possible."""
        if bool(self.log_joint(tokens).isneginf().any()):
            raise ValueError("some revealed tokens are impossible together: nothing completes them")
        shown = self._shown(tokens)
        ahead, _ = self._backward(shown)
        rows = torch.arange(len(shown), device=tokens.device)
        here, state = self.initial.expand(len(shown), -1), torch.zeros_like(rows)
        drawn: list[Tensor] = []
        for position, message in enumerate(ahead):
            reached = self.moves[state]
            weights = here * shown[:, position] * (message * reached).sum(-1)
            drawn.append(torch.multinomial(weights, 1)[:, 0])
            state = reached[rows, drawn[-1]].argmax(-1)
            if position < self.length - 1:
                here = self.transitions[position][drawn[-1]]
        return torch.stack(drawn, -1).reshape(tokens.shape)

    def sample(self, n: int) -> Int64[Tensor, "n length"]:
        """Draws of whole strings."""
        return self.complete(self._masked(n))

    # ----------------------------------------------------------------------------- the messages

    def _first(self, shown: Bool[Tensor, "batch length token"]) -> Float64[Tensor, "b v s"]:
        return (self.initial * shown[:, 0])[..., None] * self.moves[0]

    def _forward(
        self, shown: Bool[Tensor, "batch length token"], ahead: Messages
    ) -> list[tuple[Float64[Tensor, "b v s"], Float64[Tensor, "b v s"]]]:
        """What the tokens up to each position say, next to what those after it do."""
        pairs = [(self._first(shown), ahead[0])]
        for position, step in enumerate(self.transitions, 1):
            arriving = torch.einsum("bvs,vw->bsw", pairs[-1][0], step)
            arriving = arriving * shown[:, position, None]
            message, _ = _scaled(torch.einsum("bsw,swt->bwt", arriving, self.moves))
            pairs.append((message, ahead[position]))
        return pairs

    def _backward(
        self, shown: Bool[Tensor, "batch length token"]
    ) -> tuple[Messages, Float64[Tensor, " batch"]]:
        """What the tokens after each position say, and the log of the scale taken out."""
        size, peak = (len(shown), self.vocabulary, len(self.rewards)), self.rewards.max()
        message = (self.rewards - peak).exp().expand(size)
        scale = peak.expand(len(shown))
        messages = [message]
        for position in range(self.length - 1, 0, -1):
            leaving = torch.einsum("bwt,swt->bsw", message, self.moves) * shown[:, position, None]
            message, taken = _scaled(
                torch.einsum("bsw,vw->bvs", leaving, self.transitions[position - 1])
            )
            scale = scale + taken
            messages.append(message)
        return messages[::-1], scale

    def _shown(self, tokens: Tokens) -> Bool[Tensor, "batch length token"]:
        """Which tokens are possible at each position, as far as it has been revealed."""
        shaped = tokens.ndim > 0 and tokens.shape[-1] == self.length
        if not (shaped and bool(((tokens >= 0) & (tokens <= self.vocabulary)).all())):
            raise refused(
                f"tokens with shape (*batch, {self.length}), each in 0..{self.vocabulary}",
                described(tokens),
                f"Write masked positions as {self.vocabulary}.",
            )
        flat = tokens.reshape(-1, self.length)[..., None]
        return (flat == self.vocabulary) | (flat == torch.arange(self.vocabulary).to(flat))

    def _masked(self, n: int) -> Int64[Tensor, "n length"]:
        return torch.full((n, self.length), self.vocabulary, device=self.initial.device)


def _scaled(message: Tensor) -> tuple[Tensor, Float64[Tensor, " batch"]]:
    """A message that adds to one, and the log of what it added to (a zero one stays)."""
    total = message.sum((-1, -2))
    divisor = torch.where(total > 0, total, 1.0)
    return message / divisor[:, None, None], total.log()


def _check_law(name: str, table: Tensor, shape: tuple[int, ...]) -> None:
    shaped = tuple(table.shape) == shape
    sums = table.double().sum(-1)
    if not (shaped and bool((table >= 0).all()) and bool(((sums - 1).abs() < 1e-5).all())):
        raise refused(
            f"{name} with shape {shape}, not negative, adding to one along the last axis",
            described(table),
            "Divide counts by their sums.",
        )
