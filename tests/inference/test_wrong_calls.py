"""Plausible mistakes of new users, by what they are told: the argument, and what it should be."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from smcdiff import Posterior, Program, batched, resample
from smcdiff.inference import (
    SMC,
    BackAndForth,
    DenoisedLikelihood,
    InferenceCompilation,
    Inflated,
    IntermediateReward,
    JointTwist,
    LinearRamp,
    Mala,
    NestedProposal,
    OnPolicy,
    PowerTwist,
    QuadraticTwist,
    Rejuvenation,
    RelativeTrajectoryBalance,
    RelaxedLikelihood,
    ReplayBuffer,
    ResidualTwist,
    Settings,
    StringTwist,
    Tempered,
    TiltedTokens,
    TokenTwist,
    TrustRegionTwistedSMC,
    TwistedKernel,
    TwistedSMC,
)
from smcdiff.models import (
    Chain,
    ClassifierFree,
    Controlled,
    Cosine,
    Diffusion,
    DynamicThresholding,
    EnumeratedDenoiser,
    ExactVelocity,
    Flow,
    GaussianDenoiser,
    Head,
    LearnedScale,
    LearnedStart,
    MarkovDenoiser,
    MaskedDiffusion,
    MixtureDenoiser,
    Preconditioned,
    RectifiedFlow,
    Tabulated,
    Team,
    VariancePreserving,
    contains,
    lora,
)

pytestmark = pytest.mark.usefixtures("no_type_checks")


def network(x, time):
    return 0.5 * x


def prior(**settings):
    return Diffusion(network, **{"event_shape": (2,), "num_steps": 2, **settings})


def masked(**settings):
    sizes = {"length": 4, "vocabulary": 3, "num_steps": 2}
    return MaskedDiffusion(lambda x: torch.zeros(*x.shape, 3), **{**sizes, **settings})


PRIOR, HALF = prior(), torch.full((2, 2), 0.5)
IMAGES = prior(event_shape=(1, 4, 4))


def model(y=None):
    y = torch.zeros(2) if y is None else y
    pyro.sample("y", dist.Normal(PRIOR("x"), 0.5).to_event(1), obs=y)


def smc(*args, **settings):
    return SMC(model, *args, **{"num_particles": 4, **settings})


def twisted(**settings):
    return TwistedSMC(model, **settings)


def trust_region(*args, **settings):
    return TrustRegionTwistedSMC(model, *args, **settings)


def balance(optim=None, **settings):
    optim = pyro.optim.Adam({"lr": 1e-3}) if optim is None else optim
    return RelativeTrajectoryBalance(model, lambda: PRIOR("x"), optim, **settings)


def infill(given):
    return SMC(lambda: masked()("x", given=given), num_particles=2).run()


def compilation(**settings):
    optim = pyro.optim.Adam({"lr": 1e-3})
    return InferenceCompilation(model, lambda y: PRIOR("x"), optim, **settings)


def unfit(noise):
    """The noise of a particle is no noise of an element."""
    pyro.sample("y", dist.Normal(PRIOR("x"), noise()).to_event(1), obs=torch.zeros(2))


MISTAKES = {
    # --- programs
    r"as in noise\[..., None\]": [
        lambda: SMC(lambda: unfit(lambda: pyro.sample("noise", dist.HalfNormal(1.0)))).run()
    ],
    "found invalid values. Mask or clamp .* .a scale must be positive": [
        lambda: SMC(lambda: unfit(lambda: torch.tensor(-1.0))).run()
    ],
    r"several problems at once .* per_problem=\('y',\)": [lambda: smc().run(torch.zeros(5, 2))],
    r"positional argument.*; the network was called .* with x of shape \(1, 2\)": [
        lambda: SMC(lambda: Diffusion(lambda x: x, VariancePreserving(), (2,), 2)("x")).run()
    ],
    # --- inference
    r"twist must be a Twist, such as IntermediateReward\(\)": [
        lambda: smc(twist=IntermediateReward),
        lambda: smc(twist="difference"),
        lambda: smc(twist=lambda x: x),
    ],
    "the twist of Tempered must be a Twist": [lambda: Tempered(None, 0.5)],
    r"proposal must be a Proposal, such as TwistedKernel\(\)": [
        lambda: smc(proposal=TwistedKernel),
        lambda: smc(proposal="gradient"),
    ],
    "proposal must be 'auto', 'conjugate'.* but got a TwistedKernel": [
        lambda: twisted(proposal=TwistedKernel())
    ],
    "inner must be a Proposal": [lambda: NestedProposal(2, TwistedKernel)],
    "guide must be a function .* but got a Diffusion": [lambda: smc(PRIOR)],
    "guide must be a function .* but got the class Controlled": [lambda: smc(Controlled)],
    "model must be a function .* but got a Diffusion": [lambda: SMC(PRIOR), lambda: Program(PRIOR)],
    "model must be a function .* but got a NoneType": [lambda: SMC(None), lambda: Program(None)],
    "rejuvenation must be a Rejuvenation": [
        lambda: twisted(rejuvenation="mala"),
        lambda: twisted(rejuvenation=Rejuvenation),
    ],
    "num_particles must be a positive integer": [
        lambda: smc(num_particles=True),
        lambda: smc(num_particles="8"),
        lambda: smc(num_particles=-1),
        lambda: balance(num_particles=1.5),
    ],
    "chunk_size must be a positive integer": [
        lambda: smc(chunk_size=2.5),
        lambda: smc(chunk_size="3"),
    ],
    "ess_threshold, .* must be a number": [
        lambda: smc(ess_threshold="0.5"),
        lambda: smc(ess_threshold=None),
        lambda: smc(ess_threshold=math.nan),
    ],
    "smoothing, .* must be a number": [lambda: smc(smoothing="0"), lambda: smc(smoothing=1.0)],
    "exponent must be a number": [
        lambda: Settings(exponent=0.0),
        lambda: Tempered(IntermediateReward(), 2.0),
    ],
    "the exponent of Tempered at t = 2 must be a number in": [
        lambda: smc(twist=Tempered(IntermediateReward(), lambda t, total: 2.0)).run()
    ],
    "unknown resampling scheme": [
        lambda: smc(resampler=None),
        lambda: smc(resampler=["systematic"]),
        lambda: smc().run().resample(3, scheme="best"),
    ],
    "per_problem takes several names": [
        lambda: smc(per_problem="y"),
        lambda: smc(per_problem=True),
    ],
    "site 'y': the observation must be a tensor, but it is a ndarray": [
        lambda: smc().run(np.zeros(2, dtype=np.float32))
    ],
    "site 'y': the observation must be a tensor, but it is a list": [lambda: smc().run([0.0, 0.0])],
    "args must be a tuple": [lambda: Program(model, torch.zeros(2))],
    "checkpoint_every must be a positive integer": [
        lambda: smc().run(checkpoint="run", checkpoint_every=1.5)
    ],
    "checkpoint must be a str or a Path": [lambda: smc().run(checkpoint=3)],
    "resume=True needs the file": [lambda: smc().run(resume=True)],
    "there is no folder": [lambda: smc().run().save("/no/such/folder/run")],
    "is not a saved run of smcdiff": [lambda: Posterior.load(__file__)],
    "n, the number of draws per run, must be": [lambda: smc().run().resample(1.5)],
    "quantity must be a function": [lambda: smc().run().expectation(3)],
    "x must be a Mapping": [lambda: smc().log_psi(1, torch.zeros(1, 2))],
    "log_weights must be a Tensor": [lambda: resample([0.0, 0.0])],
    "event_dim must be 0 or a positive integer": [lambda: batched(network, -1)],
    "covariance must be 'auto', 'none'": [
        lambda: twisted(covariance="full"),
        lambda: twisted(covariance=torch.eye(2)),
    ],
    "num_draws must be 0 or a positive integer": [
        lambda: twisted(num_draws=-1),
        lambda: IntermediateReward(num_draws=1.5),
    ],
    "temper must be a number of at least 0": [
        lambda: twisted(temper=-1.0),
        lambda: twisted(temper="1"),
        lambda: TiltedTokens(math.nan),
    ],
    "clip must be a number above 0": [
        lambda: twisted(clip=0.0),
        lambda: TwistedKernel(clip=(-1, 1)),
    ],
    "damping must be a number of at least 0": [
        lambda: twisted(damping=-1),
        lambda: DenoisedLikelihood(damping="0"),
    ],
    "exponent must be a number of at least 0": [lambda: IntermediateReward(exponent="1")],
    "num_candidates must be a positive integer": [lambda: NestedProposal(1.5)],
    "reward must be a function": [lambda: RelaxedLikelihood("sum")],
    "learned must be a LearnedTwist": [
        lambda: trust_region(QuadraticTwist),
        lambda: trust_region(IntermediateReward()),
    ],
    "num_iterations must be 0 or a positive integer": [
        lambda: trust_region(num_iterations=-1),
        lambda: trust_region(num_iterations=1.5),
    ],
    "replay must be 0 or a positive": [lambda: trust_region(replay=-1)],
    "learning_particles must be a positive": [lambda: trust_region(learning_particles=0)],
    "good_ess must be a number in": [lambda: trust_region(good_ess=2.0)],
    "epsilon, .* must be a number above 0": [lambda: trust_region(epsilon="a")],
    "pseudo_count must be a number": [
        lambda: QuadraticTwist(pseudo_count=-1.0),
        lambda: PowerTwist(pseudo_count="1"),
        lambda: TokenTwist(pseudo_count=-1.0),
    ],
    "defensive must be a number in": [lambda: TokenTwist(defensive=2.0)],
    "base must be a Twist": [
        lambda: PowerTwist(DenoisedLikelihood),
        lambda: ResidualTwist("denoised"),
        lambda: StringTwist(DenoisedLikelihood),
    ],
    "features must be a Tensor or a Mapping": [lambda: QuadraticTwist(features=3)],
    "a part of a JointTwist must be a LearnedTwist": [lambda: JointTwist(IntermediateReward())],
    "step_size must be a number above 0": [
        lambda: Rejuvenation(step_size="a"),
        lambda: Mala(network, step_size=-1),
    ],
    "num_moves must be a positive integer": [lambda: Rejuvenation(num_moves=1.5)],
    "context takes several names": [lambda: ResidualTwist(context="y")],
    "data takes several names": [lambda: compilation(data="y")],
    "names takes several names": [lambda: Rejuvenation(names="z")],
    "optim must be a PyroOptim": [lambda: balance(torch.optim.Adam([torch.zeros(1)]))],
    "behaviours must be a Sequence": [lambda: balance(behaviours=OnPolicy())],
    "a behaviour must be a Behaviour": [lambda: balance(behaviours=[OnPolicy])],
    "loss must be a ResidualLoss": [lambda: balance(loss="huber")],
    "exponent must be a function": [lambda: balance(exponent=0.5)],
    "capacity must be a positive integer": [lambda: ReplayBuffer(0)],
    "terminals must be a ReplayBuffer or a Tensor or a Mapping": [lambda: BackAndForth([1, 2])],
    "share must be a number in": [lambda: BackAndForth(ReplayBuffer(3), 2.0)],
    "factor must be a function": [lambda: Inflated(1.5)],
    "updates must be a positive integer": [lambda: LinearRamp(1.0, 2.0, 0)],
    # --- models
    "event_shape must be a sequence of positive integers, such as": [
        lambda: prior(event_shape=4),
        lambda: prior(event_shape=(2.0,)),
        lambda: prior(event_shape=(0,)),
        lambda: prior(event_shape=(-2,)),
        lambda: prior(event_shape=()),
        lambda: prior(event_shape="2"),
        lambda: Flow(network, 4),
    ],
    "expected at least one step; got": [
        lambda: prior(num_steps=-1),
        lambda: prior(num_steps=True),
        lambda: prior(num_steps="3"),
        lambda: Flow(network, (2,), 0),
    ],
    "network must be a function": [
        lambda: Diffusion(None, event_shape=(2,)),
        lambda: Diffusion(nn.Linear, event_shape=(2,)),
        lambda: Diffusion(torch.zeros(2), event_shape=(2,)),
        lambda: MaskedDiffusion(None, 4, 3, num_steps=2),
    ],
    "velocity must be a function": [lambda: Flow(None, (2,))],
    "schedule must be a Schedule": [
        lambda: prior(schedule="cosine"),
        lambda: prior(schedule=Cosine),
        lambda: Flow(network, (2,), schedule="linear"),
    ],
    "eta, .* must be a number in": [lambda: prior(eta="1"), lambda: prior(eta=-1)],
    "variance must be 'small', 'large'": [lambda: prior(variance=0.1)],
    r"clip_denoised needs \(low, high\) with low < high": [
        lambda: prior(clip_denoised=True),
        lambda: prior(clip_denoised=1.0),
        lambda: prior(clip_denoised=(1, 2, 3)),
    ],
    "a positive, finite scale": [
        lambda: prior(scale=-1.0),
        lambda: prior(scale="1"),
        lambda: Flow(network, (2,), scale=0.0),
    ],
    "a positive, finite shift": [lambda: RectifiedFlow(shift="3")],
    "source must be a TorchDistributionMixin": [lambda: prior(source=torch.zeros(2))],
    "context_dims must be a Mapping": [lambda: prior(context_dims=["label"])],
    r"context_dims\['label'\] must be 0 or": [lambda: prior(context_dims={"label": "1"})],
    r"guidance must be a ClassifierFree, such as ClassifierFree\(2.0": [
        lambda: prior(guidance=2.0),
        lambda: prior(guidance={"label": 10}),
    ],
    "scale must be a number": [lambda: ClassifierFree("2", {"label": 10})],
    "what 'no context' is": [lambda: ClassifierFree(2.0, None), lambda: ClassifierFree(2.0, 10)],
    r"the interval of guidance is \(low, high\)": [
        lambda: ClassifierFree(2.0, {"label": 10}, (1.0,)),
        lambda: ClassifierFree(2.0, {"label": 10}, 3.0),
    ],
    "quantile must be a number": [lambda: DynamicThresholding(quantile="a")],
    "length must be a positive integer": [
        lambda: masked(length=0),
        lambda: masked(length=4.0),
        lambda: MarkovDenoiser(HALF[0], HALF, -3),
    ],
    "vocabulary must be a positive integer": [lambda: masked(vocabulary=-1)],
    "given must be a Tensor": [lambda: infill([3] * 4), lambda: infill(np.full(4, 3))],
    "first must be a Process": [lambda: Chain(network, PRIOR)],
    "second must be a Process": [lambda: Chain(PRIOR, Diffusion)],
    "base must be a Process": [lambda: Controlled(network, network), lambda: LearnedStart(network)],
    "control must be a function": [lambda: Controlled(PRIOR, None)],
    "scale must be a function": [lambda: Controlled(PRIOR, network, scale=2.0)],
    "reads takes several names": [lambda: Controlled(PRIOR, network, reads="label")],
    "agents must be a Mapping": [lambda: Team([PRIOR, PRIOR])],
    r"agents\['a'\] must be a Process": [lambda: Team({"a": network})],
    "a sequence of numbers or a tensor": [
        lambda: VariancePreserving("linear"),
        lambda: Tabulated("a", "b"),
    ],
    r"one of \('trailing'.*got 'cosine'": [lambda: VariancePreserving(spacing="cosine")],
    r"one of \('uniform'.*got 'cosine'": [lambda: RectifiedFlow(spacing="cosine")],
    "mean must be a Tensor": [
        lambda: GaussianDenoiser([0.0, 0.0], 1.0),
        lambda: GaussianDenoiser(np.zeros(2), 1.0),
    ],
    "floating-point numbers per component": [
        lambda: GaussianDenoiser(torch.tensor([0, 0]), 1.0),
    ],
    "covariances must be a Tensor or a float": [lambda: GaussianDenoiser(torch.zeros(2), "eye")],
    "weights must be a Tensor": [lambda: MixtureDenoiser(torch.zeros(3, 2), 1.0, [1, 1, 1])],
    "joint must be a Tensor": [lambda: EnumeratedDenoiser([[1.0, 1.0], [1.0, 1.0]])],
    "initial must be a Tensor": [lambda: MarkovDenoiser([0.5, 0.5], HALF, 3)],
    "pattern must be a Tensor": [lambda: contains([0, 1], 3, 1.0), lambda: contains("ab", 3, 1.0)],
    "denoiser must be a Denoiser": [lambda: ExactVelocity(network)],
    "data_at is the network's time of the data": [
        lambda: ExactVelocity(GaussianDenoiser(torch.zeros(2), 1.0), data_at=3)
    ],
    "rank must be a positive integer": [lambda: lora(0), lambda: ResidualTwist(rank=1.5)],
    "bound must be a number above 0": [lambda: LearnedScale(3, bound=-1.0)],
    "made with num_steps=1, but the process is at step t = 2": [
        lambda: Controlled(PRIOR, lambda x, t, denoised: 0 * x, scale=LearnedScale(1))("x")
    ],
    "event_dim must be a positive integer": [lambda: Head(nn.Linear(2, 2), event_dim=-1)],
    "made with event_dim=1, but events of Diffusion have shape .*: give it event_dim=3": [
        lambda: Controlled(IMAGES, Preconditioned(Head(nn.Linear(4, 4)), IMAGES))
    ],
    "variance='mixture' is for vectors, but event_shape is": [
        lambda: Diffusion(
            MixtureDenoiser(torch.zeros(2, 4), 1.0), event_shape=(2, 2), variance="mixture"
        )
    ],
}


@pytest.mark.parametrize("match", MISTAKES)
def test_mistakes_are_named(match):
    for mistake in MISTAKES[match]:
        with pytest.raises(ValueError, match=match):
            mistake()


# --------------------------------------------------------------------------------------- labels


class Labelled(nn.Module):
    """A network with an embedding of ten labels and of none."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 2)

    def forward(self, x, time, label):
        return 0.5 * x + self.embedding(label)


@pytest.mark.parametrize("guidance", [None, ClassifierFree(2.0, {"label": 10})])
@pytest.mark.parametrize("label", [7, np.int64(7)])
def test_a_whole_number_is_a_label(label, guidance):
    process = Diffusion(Labelled(), event_shape=(2,), num_steps=3, guidance=guidance)

    def run(value):
        def program():
            x = process("x", label=value)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(2))

        pyro.set_rng_seed(0)
        return TwistedSMC(program, num_particles=8).run()

    one, other = run(label), run(torch.tensor(7))
    assert one.samples["x"].equal(other.samples["x"])
    assert one.log_weights.equal(other.log_weights)


def test_a_control_knows_a_label_however_it_is_written():
    """The base is asked once, not twice."""
    base = Diffusion(Labelled(), event_shape=(2,), num_steps=2, variance="large")
    controlled = Controlled(base, lambda x, t, denoised, label: torch.zeros_like(x))
    number, tensor = {"label": 7}, {"label": torch.tensor(7)}
    assert controlled.extends(base, number, tensor)
    assert controlled.extends(base, tensor, number)
    assert controlled.extends(base, number, {"label": np.int64(7)})
    assert not controlled.extends(base, number, {"label": 8})
    assert not controlled.extends(base, tensor, {"label": True})


def test_a_label_out_of_range():
    process = Diffusion(Labelled(), event_shape=(2,), num_steps=2)
    with pytest.raises(ValueError, match="process 'x'.*context was {'label'.*from 11 to 11"):
        SMC(lambda: process("x", label=11), num_particles=2).run()
