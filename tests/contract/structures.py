"""Programs of every structure, each with its exact evidence and posterior mean.

A structure is a Pyro program built from :class:`Pieces`, and a function of a kind that gives the
joint log-density of everything it samples, on grids. The evidence is the sum over them; the
posterior mean that comes with it is that of the sum of all x_0 and all latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from smcdiff import Process
from smcdiff.models import Team

from ..oracles import grid
from .kinds import KINDS, plain_law

Joint = tuple[Tensor, Tensor]  # what is averaged and its joint log-density, with equal shapes
Y = torch.tensor(1.3, dtype=torch.float64)
PAIR = torch.tensor([1.3, -0.2], dtype=torch.float64)


@dataclass(frozen=True)
class Pieces:
    """What a structure is built from: the model's processes, or a guide's."""

    kind: str
    guide: bool = False

    def prior(self) -> Process:
        return KINDS[self.kind].guide() if self.guide else KINDS[self.kind].make()

    def total(self, x: Tensor) -> Tensor:
        return KINDS[self.kind].total(x)

    def latent(self, name: str) -> Tensor:
        """A standard normal latent; a guide proposes it off centre."""
        law = dist.Normal(0.3, 1.2) if self.guide else dist.Normal(0.0, 1.0)
        value: Tensor = pyro.sample(name, law)
        return value

    def choice(self, name: str) -> Tensor:
        """A latent in {0, 1}, one with probability 0.3; a guide proposes it evenly."""
        value: Tensor = pyro.sample(name, dist.Bernoulli(0.5 if self.guide else 0.3))
        return value


def see(mean: Tensor, name: str = "y", y: Tensor = Y, scale: float = 1.0) -> None:
    pyro.sample(name, dist.Normal(mean, scale), obs=y)


def seen(mean: Tensor, y: Tensor | float = Y, scale: float = 1.0) -> Tensor:
    """The log-density of what ``see`` observes."""
    return dist.Normal(mean, scale).log_prob(torch.as_tensor(y, dtype=torch.float64))


# -------------------------------------------------------------------------------- exact answers


def all_pairs(*laws: Joint) -> tuple[Tensor, ...]:
    """All combinations of points of independent laws, one axis each, and their log-weights."""
    points, total = [], torch.zeros(())
    for i, (value, log_weight) in enumerate(laws):
        shape = [1] * len(laws)
        shape[i] = -1
        points.append(value.reshape(shape))
        total = total + log_weight.reshape(shape)
    return (*points, total)


def standard() -> Joint:
    return grid(torch.tensor(0.0), torch.tensor(1.0), 81)


def coin() -> Joint:
    return torch.tensor([0.0, 1.0]), torch.tensor([0.7, 0.3]).double().log()


def answer(value: Tensor, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Evidence and posterior mean."""
    log_evidence = log_joint.flatten().logsumexp(0)
    return log_evidence, ((log_joint - log_evidence).exp() * value).sum()


def together(*answers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of independent parts."""
    return sum(a for a, _ in answers), sum(b for _, b in answers)  # type: ignore[return-value]


# ----------------------------------------------------------------------------------- structures


@dataclass(frozen=True)
class Structure:
    """A program and its exact answer.

    Attributes:
        program: from pieces to a Pyro callable.
        exact: from the name of a kind to log-evidence and posterior mean, one per problem.
        guide: the guide, where it is not the program with other pieces.
    """

    program: Callable[[Pieces], Callable[..., Any]]
    exact: Callable[[str], tuple[Tensor, Tensor]]
    guide: Callable[[Pieces], Callable[..., Any]] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    per_problem: Sequence[str] = ()


STRUCTURES: dict[str, Structure] = {}


def structure(exact: Callable[[str], Any], **options: Any) -> Callable[..., Any]:
    """Registers a program under the name of its function."""

    def register(program: Callable[[Pieces], Callable[..., Any]]) -> Callable[..., Any]:
        STRUCTURES[program.__name__] = Structure(program, exact, **options)
        return program

    return register


def likelihood(log_prob: Callable[[Tensor], Tensor]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """The exact answer where a likelihood of the sum is all there is."""

    def exact(kind: str) -> tuple[Tensor, Tensor]:
        total, log_weights = plain_law(kind)
        return answer(total, log_weights + log_prob(total))

    return exact


@structure(likelihood(seen))
def one_process(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        see(p.total(prior("x")))

    return program


def _two(kind: str) -> tuple[Tensor, Tensor]:
    a, b, log_weights = all_pairs(plain_law(kind), plain_law(kind))
    return answer(a + b, log_weights + seen(a - b))


def _team_guide(p: Pieces) -> Callable[..., Any]:
    return team(p)


@structure(_two, guide=_team_guide)
def two_processes(p: Pieces) -> Callable[..., Any]:
    first, second = p.prior(), p.prior()

    def program() -> None:
        see(p.total(first("a")) - p.total(second("b")))

    return program


@structure(_two, guide=two_processes)
def team(p: Pieces) -> Callable[..., Any]:
    agents = Team({"a": p.prior(), "b": p.prior()})

    def program() -> None:
        x = agents("ab")
        see(p.total(x["a"]) - p.total(x["b"]))

    return program


def _upstream(latent: Callable[[], Joint]) -> Callable[[str], tuple[Tensor, Tensor]]:
    def exact(kind: str) -> tuple[Tensor, Tensor]:
        x, z, log_weights = all_pairs(plain_law(kind), latent())
        return answer(x + z, log_weights + seen(x + z))

    return exact


@structure(_upstream(standard))
def latent_upstream(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        z = p.latent("z")
        see(p.total(prior("x")) + z)

    return program


def _labelled(latent: Callable[[], Joint], y: Tensor = Y) -> Callable[[str], tuple[Tensor, Tensor]]:
    def exact(kind: str) -> tuple[Tensor, Tensor]:
        labels, log_prior = latent()
        x, log_weights = KINDS[kind].law(labels)
        return answer(x + labels[:, None], log_prior[:, None] + log_weights + seen(x, y))

    return exact


@structure(_labelled(standard))
def context_of_a_latent(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        see(p.total(prior("x", label=p.latent("z"))))

    return program


def _downstream(kind: str) -> tuple[Tensor, Tensor]:
    x, log_weights = plain_law(kind)
    z = torch.linspace(-12, 12, 241, dtype=torch.float64)[:, None]
    return answer(x + z, log_weights + seen(z, x) + seen(z) + (z[1] - z[0]).log())


def _downstream_guide(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def guide() -> None:
        pyro.sample("z", dist.Normal(1.0, 1.5))
        prior("x")

    return guide


@structure(_downstream, guide=_downstream_guide)
def latent_downstream(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        z = pyro.sample("z", dist.Normal(p.total(prior("x")), 1.0))
        see(z)

    return program


def _discrete_downstream(kind: str) -> tuple[Tensor, Tensor]:
    x, z, log_weights = all_pairs(plain_law(kind), (torch.tensor([0.0, 1.0]), torch.zeros(2)))
    log_prob = dist.Bernoulli(logits=x).log_prob(z.expand(len(x), 2).double())
    return answer(x + z, log_weights + log_prob + seen(z))


def _discrete_downstream_guide(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def guide() -> None:
        p.choice("z")
        prior("x")

    return guide


@structure(_discrete_downstream, guide=_discrete_downstream_guide)
def discrete_latent_downstream(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        see(pyro.sample("z", dist.Bernoulli(logits=p.total(prior("x")))))

    return program


# --------------------------------------------------------------------------------------- plates


def _each(*log_probs: Callable[[Tensor], Tensor]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Independent copies of the process, each with a likelihood."""
    return lambda kind: together(*(likelihood(each)(kind) for each in log_probs))


@structure(_each(*[lambda x: seen(x, scale=2.0)] * 4))
def plates_around_the_process(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1):
            see(p.total(prior("x")), y=Y.expand(2, 2), scale=2.0)

    return program


def _local(kind: str) -> tuple[Tensor, Tensor]:
    parts = []
    for y in PAIR:
        x, z, log_weights = all_pairs(plain_law(kind), standard())
        parts.append(answer(x + z, log_weights + seen(x + z, y)))
    return together(*parts)


@structure(_local)
def latents_in_a_plate(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        with pyro.plate("n", 2):
            z = p.latent("z")
            see(p.total(prior("x")) + z, y=PAIR)

    return program


@structure(lambda kind: together(*(_labelled(coin, y)(kind) for y in PAIR)))
def contexts_in_a_plate(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        with pyro.plate("n", 2):
            z = p.choice("z")
            see(p.total(prior("x", label=z)), y=PAIR)

    return program


def _shared_label(kind: str) -> tuple[Tensor, Tensor]:
    labels, log_prior = coin()
    x, log_weights = KINDS[kind].law(labels)
    parts = [log_weights + seen(x, y) for y in PAIR]
    value = labels[:, None, None] + x[:, :, None] + x[:, None, :]
    log_joint = log_prior[:, None, None] + parts[0][:, :, None] + parts[1][:, None, :]
    return answer(value, log_joint)


@structure(_shared_label)
def context_shared_by_a_plate(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        z = p.choice("z")
        with pyro.plate("n", 2):
            see(p.total(prior("x", label=z)), y=PAIR)

    return program


@structure(likelihood(lambda x: 0.5 * (seen(x) + seen(x, -0.2)) + seen(x, -0.2)))
def plate_scale_and_mask(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        total = p.total(prior("x"))
        with pyro.plate("n", 2):
            with poutine.scale(scale=0.5):
                see(total, y=PAIR)
            with poutine.mask(mask=torch.tensor([False, True])):
                see(total, "more", PAIR)

    return program


# ---------------------------------------------------------------------------------- likelihoods


@structure(likelihood(lambda x: x.tanh()))
def reward(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        pyro.factor("reward", p.total(prior("x")).tanh())

    return program


@structure(likelihood(lambda x: x.tanh() + seen(x, scale=2.0)))
def reward_and_gaussian(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        total = pyro.deterministic("total", p.total(prior("x")))
        pyro.factor("reward", total.tanh())
        see(total, scale=2.0)

    return program


@structure(likelihood(lambda x: seen(0.5 * x**2)))
def nonlinear(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        see(0.5 * p.total(prior("x")) ** 2)

    return program


@structure(likelihood(lambda x: dist.Poisson((0.2 * x).exp()).log_prob(torch.tensor(2.0))))
def counts(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        pyro.sample("y", dist.Poisson((0.2 * p.total(prior("x"))).exp()), obs=torch.tensor(2.0))

    return program


SPREAD = torch.tensor([[1.0, 0.4], [0.4, 0.8]], dtype=torch.float64)


def _correlated(x: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(torch.stack([x, -0.5 * x], -1), SPREAD)


@structure(likelihood(lambda x: _correlated(x).log_prob(PAIR)))
def vector(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        pyro.sample("y", _correlated(p.total(prior("x"))), obs=PAIR)

    return program


def _unknown_noise(kind: str) -> tuple[Tensor, Tensor]:
    z, log_weights = standard()
    x, z, log_weights = all_pairs(plain_law(kind), ((0.5 * z).exp(), log_weights))
    return answer(x + z, log_weights + seen(x, scale=z))  # type: ignore[arg-type]


@structure(_unknown_noise)
def unknown_noise(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program() -> None:
        law = dist.LogNormal(0.1, 0.6) if p.guide else dist.LogNormal(0.0, 0.5)
        scale = pyro.sample("scale", law)
        pyro.sample("y", dist.Normal(p.total(prior("x")), scale), obs=Y)

    return program


# ------------------------------------------------------------------------------------ callables


class Declared(PyroModule):  # type: ignore[misc]
    """A program that is a module and holds its process."""

    def __init__(self, p: Pieces) -> None:
        super().__init__()
        self.prior, self.p = p.prior(), p

    def forward(self, y: Tensor, *, scale: float = 1.0) -> None:
        see(self.p.total(self.prior("x")), y=y, scale=scale)


@structure(likelihood(lambda x: seen(x, scale=2.0)), args=(Y,), kwargs={"scale": 2.0})
def module_with_keywords(p: Pieces) -> Callable[..., Any]:
    return Declared(p)


def _problems(kind: str) -> tuple[Tensor, Tensor]:
    answers = [likelihood(lambda x, y=y: seen(x, y))(kind) for y in PAIR]
    return torch.stack([z for z, _ in answers]), torch.stack([mean for _, mean in answers])


@structure(_problems, args=(PAIR,), per_problem=("y",))
def problems(p: Pieces) -> Callable[..., Any]:
    prior = p.prior()

    def program(y: Tensor) -> None:
        see(p.total(prior("x")), y=y)

    return program
