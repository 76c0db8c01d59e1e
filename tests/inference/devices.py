"""Whatever is made on the way lies where the processes lie: every method, on another device.

``test_devices.py`` runs these.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    GaussianKernels,
    IntermediateReward,
    NestedProposal,
    QuadraticTwist,
    Rejuvenation,
    RelativeTrajectoryBalance,
    RelaxedLikelihood,
    ResidualTwist,
    StringTwist,
    Tempered,
    TiltedTokens,
    TokenTwist,
    TrustRegionTwistedSMC,
    TwistedSMC,
    learned_tokens,
)
from smcdiff.inference.descent import Descent
from smcdiff.models import (
    Controlled,
    Diffusion,
    Flow,
    GaussianDenoiser,
    Head,
    Langevin,
    LearnedScale,
    LearnedStart,
    MarkovDenoiser,
    MaskedDiffusion,
    MixtureDenoiser,
    Potential,
    Preconditioned,
    Team,
    contains,
)

from ..elsewhere import elsewhere

SIZES = {"num_particles": 4, "num_runs": 2, "ess_threshold": 1.0}
LENGTH, VOCABULARY = 3, 2


def far(value):
    return value.to(elsewhere())


class Net(nn.Linear):
    """A network over two numbers; with context a column wider."""

    def forward(self, x, time, denoised=None):
        return super().forward(x)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(LENGTH, VOCABULARY))

    def forward(self, tokens):
        return self.logits.expand(len(tokens), -1, -1)


def network(**settings):
    return Diffusion(far(Net(2, 2)), event_shape=(2,), num_steps=3, **settings)


def exact(**settings):
    return Diffusion(far(GaussianDenoiser(torch.zeros(2), torch.eye(2))), num_steps=3, **settings)


def mixture():
    denoiser = far(MixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.5))
    return Diffusion(denoiser, num_steps=3, variance="mixture")


def masked(network=None, **settings):
    network = far(Tokens()) if network is None else network
    return MaskedDiffusion(network, LENGTH, VOCABULARY, num_steps=3, **settings)


def seen(process):
    y, scale = far(torch.ones(2)), far(torch.tensor(0.5))

    def model():
        x = process("x")
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    return model


def with_latent(process):
    y, one = far(torch.ones(2)), far(torch.tensor(1.0))

    def model():
        z = pyro.sample("z", dist.Normal(0 * one, one))
        pyro.sample("y", dist.Normal(process("x") + z[..., None], one).to_event(1), obs=y)

    return model


def worth(process):
    """What every token is worth at its place."""
    table = far(torch.randn(LENGTH, VOCABULARY))

    def model():
        x = process("x")
        found = table.expand(*x.shape, -1).gather(-1, x[..., None])[..., 0]
        pyro.factor("worth", found.sum(-1))

    return model


def together(process):
    def model():
        parts = process("team")
        pyro.factor("meet", -(parts["a"] - parts["b"]).square().sum(-1))

    return model


def lies_elsewhere(posterior):
    tensors = [*posterior.samples.values(), posterior.log_weights, posterior.log_evidence]
    return all(tensor.device == elsewhere() for tensor in tensors)


RUNS = {
    "bootstrap": lambda: SMC(seen(network()), **SIZES),
    "scalar": lambda: TwistedSMC(seen(network()), covariance="scalar", **SIZES),
    "jacobian": lambda: TwistedSMC(seen(network()), covariance="jacobian", chunk_size=3, **SIZES),
    "diagonal": lambda: TwistedSMC(seen(network()), covariance="diagonal", clip=0.5, **SIZES),
    "exact": lambda: TwistedSMC(seen(exact(variance="exact")), **SIZES),
    "mixture": lambda: TwistedSMC(seen(mixture()), **SIZES),
    "flow": lambda: TwistedSMC(seen(Flow(far(Net(2, 2)), (2,), 3)), **SIZES),
    "rejuvenation": lambda: TwistedSMC(
        with_latent(network()), covariance="scalar", rejuvenation=Rejuvenation("mala"), **SIZES
    ),
    "team": lambda: TwistedSMC(together(Team({"a": exact(), "b": exact()})), **SIZES),
    "guide": lambda: SMC(seen(process := network(variance="large")), guide(process), **SIZES),
    "rewards": lambda: SMC(
        seen(network()), twist=Tempered(IntermediateReward("max", num_draws=2), 0.5), **SIZES
    ),
    "tokens": lambda: TwistedSMC(worth(masked()), **SIZES),
    "tilted tokens": lambda: SMC(
        worth(masked()), twist=RelaxedLikelihood(), proposal=TiltedTokens(), **SIZES
    ),
    "nested": lambda: SMC(
        worth(masked(reveal="even")), proposal=NestedProposal(2, TiltedTokens()), **SIZES
    ),
    "strings": lambda: TwistedSMC(worth(masked(strings())), **SIZES),
}


def guide(process):
    control = far(Net(2, 2))
    parts = {"scale": far(LearnedScale(3)), "initial": far(LearnedStart(process))}
    controlled = Controlled(process, lambda x, t, denoised: control(x, t), **parts)
    return lambda: controlled("x")


def strings():
    """A Markov chain that is moved, and only then rewarded."""
    half = torch.full((VOCABULARY, VOCABULARY), 1 / VOCABULARY)
    chain = MarkovDenoiser(half[0], half, LENGTH, contains(torch.tensor([1, 1]), VOCABULARY, 1.0))
    return far(chain).tilted(contains(torch.tensor([0, 1]), VOCABULARY, 2.0))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stays_where_its_processes_lie(name):
    assert lies_elsewhere(RUNS[name]().run())


@pytest.mark.parametrize("resampler", ["multinomial", "residual", "stratified", "ssp"])
def test_resampling(resampler):
    assert lies_elsewhere(SMC(seen(network()), resampler=resampler, **SIZES).run())


def test_problems_and_what_is_done_with_their_posterior(tmp_path):
    process, scale = network(), far(torch.tensor(1.0))

    def model(y):
        pyro.sample("y", dist.Normal(process("x"), scale).to_event(1), obs=y)

    method = TwistedSMC(model, per_problem=("y",), **SIZES)
    posterior = method.run(far(torch.zeros(2, 2)), checkpoint=tmp_path / "run", checkpoint_every=2)
    assert method.run(far(torch.zeros(2, 2)), checkpoint=tmp_path / "run", resume=True)
    for use in ("resample", "best", "predictive", "summary", "genealogy", "to_arviz"):
        getattr(posterior, use)()
    assert posterior.observed["y"].device == posterior.expectation("x").mean.device == elsewhere()
    posterior.save(tmp_path / "posterior")
    assert lies_elsewhere(Posterior.load(tmp_path / "posterior", device=elsewhere()))


SHORT = Descent(steps=2)
LEARNED = {
    "QuadraticTwist": (QuadraticTwist, lambda: seen(network())),
    "GaussianKernels": (GaussianKernels, lambda: seen(network())),
    "ResidualTwist": (lambda: ResidualTwist(descent=SHORT), lambda: seen(network())),
    "TokenTwist": (TokenTwist, lambda: worth(masked())),
    "StringTwist": (lambda: StringTwist(descent=SHORT), lambda: worth(masked(reveal="even"))),
}


@pytest.mark.filterwarnings("ignore:.* has more parameters than:UserWarning")
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_is_learned_and_loaded_there(name, tmp_path, monkeypatch):
    monkeypatch.setattr(learned_tokens, "SCALINGS", 2)
    build, model = LEARNED[name][0], LEARNED[name][1]()
    method = TrustRegionTwistedSMC(model, build(), num_iterations=1, **SIZES)
    assert lies_elsewhere(method.run())
    method.learned.save(tmp_path / "learned")
    loaded = build()
    loaded.load(tmp_path / "learned", elsewhere())
    assert lies_elsewhere(SMC(model, twist=loaded, proposal=loaded, **SIZES).run())


def test_a_guide_learns_there():
    process = network(variance="large")
    optim = pyro.optim.Adam({"lr": 1e-3})
    rtb = RelativeTrajectoryBalance(seen(process), guide(process), optim, num_particles=4)
    assert math.isfinite(rtb.step())
    assert lies_elsewhere(SMC(rtb.model, rtb.guide, **SIZES).run())


class Pair(nn.Linear):
    """A head of two numbers, or a potential of one, with a label."""

    def forward(self, x, time, label):
        return super().forward(x) + label[:, None]


CONTROLS = {
    "Head": lambda process: Head(Pair(4, 2), label="wish"),
    "Langevin": lambda process: Langevin(
        Head(Pair(4, 2), label="wish"),
        lambda x, wish: -wish * x.square().sum(-1),
        3,
        reads=("wish",),
    ),
    "Potential": lambda process: Potential(Pair(2, 1), process, label="wish"),
    "Preconditioned": lambda process: Preconditioned(Head(Pair(4, 2), label="wish"), process),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_steers_there(name):
    process, wish = network(variance="large"), far(torch.tensor(2))
    steered = Controlled(process, far(CONTROLS[name](process)), reads=("wish",))
    optim = pyro.optim.Adam({"lr": 1e-3})
    rtb = RelativeTrajectoryBalance(
        seen(process), lambda: steered("x", wish=wish), optim, num_particles=4
    )
    assert math.isfinite(rtb.step())
    assert lies_elsewhere(SMC(rtb.model, rtb.guide, **SIZES).run())


def test_a_mistake_would_be_noticed():
    with pytest.raises(RuntimeError, match="was given a tensor on cpu"):
        far(torch.zeros(2)) + torch.zeros(2)
    assert (far(torch.zeros(2)) + torch.tensor(1.0)).cpu().equal(torch.ones(2))
