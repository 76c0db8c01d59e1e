r"""Masked diffusion learned from endpoints, without walking: what it is worth beside balance.

    python benchmarks/endpoints.py [--part optimum training]

The regression of Rector-Brooks et al. 2024 (DDPP, arXiv 2410.08134): strings x_0 from a buffer are
masked to x_t, and a guide whose tokens are independent given x_t learns

    log q(x_0 | x_t) - log p(x_0 | x_t) - log R(x_0) + log Z(x_t) = 0,

with log Z(x_t) from M strings of p(x_0 | x_t), one evaluation of the network, or learned beside q.
Strings of a Markov chain are enumerated, so that everything here is exact: the denoiser, the law of
the chain and of the guide (dynamic programming over all masked strings), and the effective share of
samples E[w]^2 / E[w^2] with which `SMC(model, guide=guide)` corrects it.

* "optimum": the regression's own minimum in a table of all states, x_0 from the posterior;
* "training": networks at equal calls, each method at the better of two rates. "one-step balance"
  regresses single transitions of the masked strings, log h(x_t) + log q - log p - log h(x_{t-1}),
  with h learned: it vanishes at the posterior, without walking, too.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import product

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.functional import one_hot

from smcdiff import Process
from smcdiff.inference import Noised, OnPolicy, RelativeTrajectoryBalance, ReplayBuffer
from smcdiff.inference.learned_strings import StringNetwork
from smcdiff.models import Finetuned, MarkovDenoiser, MaskedDiffusion
from smcdiff.models.masked import Reveal
from smcdiff.particles import map_tree

ROWS, GUESSES = 128, 16  # strings per update, and M
DRAWN, SHARE = 64, 0.25  # strings drawn at once for the buffer, and their share of the calls
SIZE, BUDGETS, RATES = 3, (4_000, 16_000, 64_000), (3e-3, 1e-2)
Reward = Callable[[Tensor], Tensor]


class Task:
    """A prior over strings, its reward, and all strings with and without masks."""

    def __init__(self, prior: MaskedDiffusion, reward: Reward) -> None:
        self.prior, self.reward = prior, reward
        size, length = prior.vocabulary, prior.event_shape[0]
        self.strings = torch.tensor(list(product(range(size), repeat=length)))
        self.states = torch.tensor(list(product(range(size + 1), repeat=length)))
        moves = [(a, b) for a in range(size + 1) for b in range(size + 1) if a in (b, size)]
        steps = torch.tensor(list(product(moves, repeat=length)))
        self.before, self.after = self.index(steps[..., 0]), self.index(steps[..., 1])

    def index(self, states: Tensor) -> Tensor:
        powers = (self.prior.vocabulary + 1) ** torch.arange(states.shape[-1] - 1, -1, -1)
        return (states * powers).sum(-1)

    @torch.no_grad()
    def transitions(self, process: Process, t: int) -> Tensor:
        """The probability of every possible step."""
        evaluation = process.evaluate(self.states, t)
        rows = map_tree(lambda leaf: leaf[self.before], evaluation)
        law = process.kernel(self.states[self.before], t, rows).law
        return law.log_prob(self.states[self.after]).double().exp()

    def judge(self, guide: Process) -> tuple[float, float]:
        """Total variation of the guide's strings, and their effective share."""
        times = range(self.prior.num_steps, 0, -1)
        steps = [[self.transitions(each, t) for t in times] for each in (self.prior, guide)]
        laws = []
        for each in steps:
            law = torch.zeros(len(self.states)).double()
            law[-1] = 1.0
            for step in each:
                law = torch.zeros_like(law).index_add(0, self.after, law[self.before] * step)
            laws.append(law[self.index(self.strings)])
        tilt = self.reward(self.strings).double().exp()
        evidence = (laws[0] * tilt).sum()
        squares = torch.zeros(len(self.states)).double()
        squares[self.index(self.strings)] = tilt.square()
        for p, q in zip(reversed(steps[0]), reversed(steps[1]), strict=True):
            terms = torch.where(p > 0, p.square() / q, 0.0) * squares[self.after]
            squares = torch.zeros_like(squares).index_add(0, self.before, terms)
        distance = 0.5 * (laws[1] - laws[0] * tilt / evidence).abs().sum()
        return float(distance), float(evidence**2 / squares[-1])


def markov(length: int, steps: int, reveal: Reveal, sharpness: float = 2.0) -> MaskedDiffusion:
    """Neighbours that depend on each other (sharpness 0: none does)."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(SIZE, generator=generator).double().softmax(-1)
    table = sharpness * torch.randn(SIZE, SIZE, generator=generator).double()
    denoiser = MarkovDenoiser(first, (first.log() + table).softmax(-1), length)
    return MaskedDiffusion(denoiser, length, SIZE, num_steps=steps, reveal=reveal)


def pairs(x: Tensor) -> Tensor:
    """2 for every "0 2", and 2 if the ends are equal: neither is a sum over positions."""
    found = ((x[..., :-1] == 0) & (x[..., 1:] == 2)).double().sum(-1)
    return 2 * found + 2 * (x[..., 0] == x[..., -1])


def counts(x: Tensor) -> Tensor:
    """A sum over positions."""
    return (x == 1).double().sum(-1)


# ------------------------------------------------------------------------------------ the optimum


class Table(nn.Module):
    """Logits of every state, and log Z of each beside its importance-sampling limit."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        logits = task.prior.network(task.states)
        self.logits = nn.Parameter(logits.clamp(min=-30).clone())
        self.shift = nn.Parameter(torch.zeros(len(logits)).double())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[self.task.index(tokens)]


def minimise(task: Task, learned: bool) -> tuple[Table, float]:
    """The regression's minimum where x_0 comes from the posterior; and its loss there."""
    table, size = Table(task), task.prior.vocabulary
    open_ = task.states == size
    fits = ((task.states[:, None] == task.strings) | open_[:, None]).all(-1)
    assert isinstance(task.prior.network, MarkovDenoiser)
    prior = (task.prior.network.log_prob(task.strings) + task.reward(task.strings)).softmax(-1)
    weights = torch.where(fits, prior, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    hot = one_hot(task.strings, size).double()

    def joint(logits: Tensor) -> Tensor:
        tokens = torch.where(open_[..., None], logits.log_softmax(-1), 0.0)
        return torch.einsum("slv,nlv->sn", tokens, hot)

    wanted = joint(task.prior.network(task.states).clamp(min=-30)) + task.reward(task.strings)
    log_z = wanted.masked_fill(~fits, -math.inf).logsumexp(-1)
    parameters = list(table.parameters()) if learned else [table.logits]
    optim = torch.optim.LBFGS(
        parameters, max_iter=1000, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optim.zero_grad()
        residual = joint(table.logits) - wanted + (log_z + table.shift)[:, None]
        loss = (weights * residual.square()).sum() / len(weights)
        loss.backward()
        return loss

    optim.step(closure)
    return table, float(closure().detach())


def optimum() -> None:
    header(("tokens", "reward", "log Z(x_t)", "loss", "T", "TV of the prior", "TV", "ESS / N"))
    for sharpness, reward, learned in product((0.0, 2.0), (counts, pairs), (False, True)):
        network, loss = minimise(Task(markov(4, 4, "even", sharpness), reward), learned)
        for steps in (4, 2):
            task = Task(markov(4, steps, "even", sharpness), reward)
            plain, _ = task.judge(task.prior)
            found = task.judge(Finetuned(task.prior, lambda _, network=network: network))
            names = ("Markov" if sharpness else "independent", reward.__name__)
            cells = [f"{value:.3f}" for value in (plain, *found)]
            row(*names, "learned" if learned else "sampled", f"{loss:.0e}", steps, *cells)


# -------------------------------------------------------------------------------------- training


class Tilted(nn.Module):
    """The frozen network, and biases beside it that are zero at first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.base, self.tilt = network, StringNetwork(SIZE)
        self.constant = nn.Parameter(torch.zeros(()))

    def both(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.base(tokens).detach()
        bias, scalar = self.tilt(tokens, 0.0, logits.softmax(-1).float())
        return logits + bias, scalar.double() + self.constant

    def forward(self, tokens: Tensor) -> Tensor:
        return self.both(tokens)[0]


def endpoints(
    task: Task, guide: Finetuned, optim: torch.optim.Optimizer, learned: bool
) -> Iterator[int]:
    """Regression of whole strings; yields the calls of each update."""
    for x0, xt, _, spent in masked(task, guide):
        logits, log_z = guide.network.both(xt)
        hidden = xt == task.prior.mask
        if not learned:
            law = torch.distributions.Categorical(logits=task.prior.network(xt))
            rewards = task.reward(torch.where(hidden, law.sample((GUESSES,)), xt)).double()
            log_z = rewards.logsumexp(0) - math.log(GUESSES)
        descend(optim, log_ratio(task, logits, xt, hidden, x0) - task.reward(x0) + log_z)
        yield spent + 2 * len(x0)


def one_step(task: Task, guide: Finetuned, optim: torch.optim.Optimizer) -> Iterator[int]:
    """Balance of single transitions; yields the calls of each update."""
    for x0, xt, t, spent in masked(task, guide):
        after = torch.where(xt == task.prior.mask, unmask(task.prior, x0, xt, t), xt)
        logits, here = guide.network.both(xt)
        whole, reward = (after != task.prior.mask).all(-1), task.reward(x0).double()
        there = torch.where(whole, reward, guide.network.both(after)[1])
        here = torch.where((xt != task.prior.mask).all(-1), reward, here)
        ratio = log_ratio(task, logits, xt, after != xt, x0)
        descend(optim, here + ratio - there)
        yield spent + 3 * len(x0)


def log_ratio(task: Task, logits: Tensor, xt: Tensor, where: Tensor, x0: Tensor) -> Tensor:
    """log q - log p of the tokens at some of the positions, given x_t."""
    change = logits.log_softmax(-1) - task.prior.network(xt).log_softmax(-1)
    return torch.where(where, change.gather(-1, x0[..., None])[..., 0], 0.0).sum(-1)


def masked(task: Task, guide: Finetuned) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Batches of x_0, x_t and t; and the calls that drew new strings."""
    prior, found, update = task.prior, task.strings[:0], 0
    every = max(1, round((1 / SHARE - 1) * DRAWN * prior.num_steps / (2 * ROWS)))
    while True:
        spent = 0
        if update % every == 0:
            with torch.no_grad():
                x = prior.initial().expand((DRAWN,)).sample()
                for t in range(prior.num_steps, 0, -1):
                    x = guide.kernel(x, t).law.sample()
            found, spent = torch.cat([found, x])[-20 * DRAWN :], DRAWN * prior.num_steps
        x0 = found[torch.randint(len(found), (ROWS,))]
        t = torch.randint(prior.num_steps, (ROWS,)) + 1
        yield x0, mask(prior, x0, t), t, spent
        update += 1


def left(prior: MaskedDiffusion) -> Tensor:
    """How many positions are masked at t, where they are revealed evenly."""
    number = [prior.event_shape[0]]
    for t in range(prior.num_steps, 0, -1):
        number.append(number[-1] - -(-number[-1] // t))
    return torch.tensor(number[::-1])


def mask(prior: MaskedDiffusion, x0: Tensor, t: Tensor) -> Tensor:
    """x_t given x_0."""
    noise = torch.rand(x0.shape)
    if prior.reveal == "even":
        hidden = noise.argsort(-1).argsort(-1) < left(prior)[t][:, None]
    else:
        hidden = noise > torch.tensor(prior.alphas)[t][:, None]
    return torch.where(hidden, prior.mask, x0)


def unmask(prior: MaskedDiffusion, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """x_{t-1} given x_0 and x_t."""
    noise = torch.rand(x0.shape).masked_fill(xt != prior.mask, 2.0)
    if prior.reveal == "even":
        number = (left(prior)[t] - left(prior)[t - 1])[:, None]
        shown = noise.argsort(-1).argsort(-1) < number
    else:
        chances = [prior.reveal_probability(int(s)) for s in range(1, prior.num_steps + 1)]
        shown = noise < torch.tensor(chances)[t - 1][:, None]
    return torch.where(shown, x0, xt)


def descend(optim: torch.optim.Optimizer, residual: Tensor) -> None:
    optim.zero_grad()
    (0.5 * residual.square().mean()).backward()
    optim.step()


def walked(task: Task, guide: Finetuned, rate: float, evidence: str, replay: bool) -> Iterator[int]:
    """Relative trajectory balance; yields the calls of each update."""

    def model() -> None:
        pyro.factor("reward", task.reward(task.prior("x")))

    buffer = ReplayBuffer(20 * DRAWN)
    behaviours = [OnPolicy(), Noised(buffer)] if replay else [OnPolicy()]
    rtb = RelativeTrajectoryBalance(
        model,
        lambda: guide("x"),
        PyroOptim(torch.optim.Adam, {"lr": rate}),
        evidence=evidence,
        behaviours=behaviours,
        num_particles=32,
    )
    while True:
        before = rtb.calls.network
        rtb.step()
        yield rtb.calls.network - before


def contestants(
    task: Task, guide: Finetuned, rate: float
) -> dict[str, Callable[[], Iterator[int]]]:
    """What learns."""
    optim = torch.optim.Adam([p for p in guide.network.parameters() if p.requires_grad], rate)
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "RTB": lambda: walked(task, guide, rate, "learned", False),
        "VarGrad": lambda: walked(task, guide, rate, "vargrad", False),
        "endpoints, Z sampled": lambda: endpoints(task, guide, optim, False),
        "endpoints, Z learned": lambda: endpoints(task, guide, optim, True),
        "one-step balance": lambda: one_step(task, guide, optim),
    }
    if task.prior.reveal != "even":
        ways["RTB, replay"] = lambda: walked(task, guide, rate, "learned", True)
    return ways


def train(task: Task, name: str, rate: float) -> list[float]:
    """What has been learned after each budget."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide, spent, found = Finetuned(task.prior, Tilted), 0, list[float]()
    updates = contestants(task, guide, rate)[name]()
    for budget in BUDGETS:
        while spent < budget:
            spent += next(updates)
        found += task.judge(guide)
    return found


def training() -> None:
    calls = [f"{what}, {budget} calls" for budget in BUDGETS for what in ("TV", "ESS / N")]
    header(("T", "reveal", "method", *calls))
    chains: tuple[tuple[int, Reveal], ...] = ((5, "even"), (2, "even"), (20, "independent"))
    for steps, reveal in chains:
        task = Task(markov(5, steps, reveal), pairs)
        found = {"prior": len(BUDGETS) * task.judge(task.prior)}
        for name in contestants(task, Finetuned(task.prior, Tilted), RATES[0]):
            found[name] = min((train(task, name, r) for r in RATES), key=lambda each: each[-2])
        for name, numbers in found.items():
            row(steps, reveal, name, *(f"{value:.3f}" for value in numbers))


def header(columns: tuple[str, ...]) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ["optimum", "training"]
    parser.add_argument("--part", nargs="+", default=parts, choices=parts)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "optimum" in arguments.part:
        optimum()
    if "training" in arguments.part:
        training()


if __name__ == "__main__":
    main()
