"""What goes wrong is said where it goes wrong: the site, the step, the run, and what to do."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from smcdiff import DegenerateWeights, Program, Twist, TwistValue
from smcdiff.execution import Execution
from smcdiff.inference import (
    SMC,
    FromKernel,
    IntermediateReward,
    Rejuvenation,
    Settings,
    Tempered,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.models import (
    Chain,
    Controlled,
    Diffusion,
    EnumeratedDenoiser,
    GaussianDenoiser,
    MaskedDiffusion,
    Team,
)

pytestmark = pytest.mark.usefixtures("no_type_checks")


DENOISER = GaussianDenoiser(torch.zeros(2), 1.0)


def prior(**settings):
    return Diffusion(DENOISER, **{"num_steps": 4, **settings})


def network(function, **settings):
    """A process over two numbers, around a network that may misbehave."""
    return Diffusion(function, event_shape=(2,), num_steps=4, **settings)


def seen(process, y=None):
    """A program that observes all of x."""
    value = torch.zeros(2) if y is None else y

    def model():
        x = process("x")
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=value)

    return model


def rewarded(reward, process=None):
    """A program with a reward of x."""
    chosen = prior() if process is None else process

    def model():
        x = chosen("x")
        pyro.factor("reward", reward(x))

    return model


def run(model, method=SMC, **settings):
    """The particles at t = 0."""
    *_, last = method(model, **{"num_particles": 8, **settings}).iterate()
    return last


def refused(match, model, method=SMC, **settings):
    with pytest.raises(ValueError, match=match):
        run(model, method, **settings)


# ------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x, time: x[:, :1], r"process 'x': the network returned shape \(1, 1\).*need"),
        (lambda x, time: x.long(), "process 'x': the network returned dtype torch.int64"),
        (lambda x, time: x + 0j, "process 'x': the network returned dtype torch.complex64"),
        (lambda x, time: (x, time), "process 'x': the network returned a tuple"),
        (lambda x, time: x.numpy(), "process 'x': the network returned a ndarray"),
        (lambda x, time: x @ torch.ones(3, 2), "process 'x': mat1 and mat2 shapes cannot"),
        (lambda x, time: x @ torch.ones(2, 2).double(), "process 'x': .*dtype"),
    ],
    ids=["shape", "integers", "complex", "tuple", "array", "wants another shape", "dtype"],
)
def test_network(function, match):
    refused(match, seen(network(function)))


def test_masked_network():
    process = MaskedDiffusion(lambda x: torch.zeros(*x.shape, 4), 2, 3, num_steps=2)
    match = r"process 'x': the network returned logits of shape \(\d+, 2, 4\), but"
    refused(match, rewarded(lambda x: x.sum(-1).float(), process))


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [4, 3, 2, 1])
def test_network_that_is_not_finite_at_one_step(step, value, method):
    """The step is named: here the network sees the times 249, 499, 749 and 999."""

    def broken(x, time):
        return torch.where((time == 250 * step - 1)[:, None], value, 0.5 * x)

    match = f"process 'x': its network returned NaN or infinity at step t = {step}"
    refused(match, seen(network(broken)), method)


def test_context_of_the_wrong_kind():
    process = network(lambda x, time, label: x + torch.nn.functional.one_hot(label, 2))
    refused("process 'x': one_hot", lambda: process("x", label=1.0))
    refused("context 'label' is a NumPy array", lambda: process("x", label=np.ones(1)))
    refused("process 'x': .*unexpected keyword argument 'kind'", lambda: process("x", kind=1))


def test_context_of_the_wrong_shape():
    def model():
        network(lambda x, time, label: x)("x", label=torch.zeros(5))
        pyro.factor("reward", torch.zeros(()))

    refused(r"process 'x': context 'label' has shape \(5,\)", model)


# --------------------------------------------------------------------------------- impossible data


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
def test_every_particle_impossible(method):
    model = rewarded(lambda x: torch.full(x.shape[:-1], -torch.inf))
    settings = {} if method is SMC else {"proposal": "kernel"}
    with pytest.raises(DegenerateWeights, match=r"step t = 0: all 8 particles.*in runs 0, 1"):
        run(model, method, num_runs=2, **settings)


@pytest.mark.parametrize("step", [4, 2])
def test_twist_that_is_not_a_number(step):
    class Broken(Twist):
        def evaluate(self, view):
            value = torch.nan if view.t == step else 0.0
            return TwistValue(torch.full((view.batch,), value).double())

    refused(f"log-twist is NaN at step t = {step}", seen(prior()), twist=Broken())


def test_runs_of_several_are_named():
    model = rewarded(lambda x: torch.where(x[..., 0] > 1.5, 0.0, -torch.inf))
    with pytest.raises(DegenerateWeights, match=r"all 4 particles have weight zero in runs? "):
        run(model, num_particles=4, num_runs=50)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_some_particles_impossible(threshold):
    """They die, and the answer is right: half of the Gaussian is forbidden."""
    source = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    process = Diffusion(
        GaussianDenoiser(torch.zeros(2), 1.0), num_steps=4, variance="exact", source=source
    )
    model = rewarded(lambda x: torch.where(x[..., 0] > 0, 0.0, -torch.inf), process)
    last = run(
        model,
        twist=IntermediateReward(),
        num_particles=64,
        num_runs=200,
        ess_threshold=threshold,
    )
    ratio = (last.log_evidence - math.log(0.5)).exp()
    assert abs(float((ratio.mean() - 1) / (ratio.std() / 200**0.5))) < 4.3
    alive = last.log_weights > -torch.inf
    assert bool((last.x["x"][..., 0][alive] > 0).all())
    assert bool((last.x["x"][..., 0][~alive] <= 0).all())


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
def test_likelihood_that_is_not_a_number(method):
    """The site is named, and the step. Here a small run finds nothing wrong."""
    model = rewarded(lambda x: x[..., 0] * (torch.nan if len(x) > 10 else 1.0))
    step = {SMC: 0, TwistedSMC: 4}[method]
    match = f"site 'reward' has log-probability NaN at step t = {step}"
    refused(match, model, method, num_particles=20)


def test_likelihood_that_is_never_a_number():
    refused("failed at or after site 'x'", rewarded(lambda x: torch.nan * x[..., 0]))


def test_likelihood_that_is_infinite():
    model = rewarded(lambda x: torch.full(x.shape[:-1], torch.inf))
    refused("site 'reward' has log-probability infinite at step t = 0", model)


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_particles": 0}, "num_particles must be a positive integer, but got 0"),
        ({"num_particles": 1.5}, "num_particles must be a positive integer, but got 1.5"),
        ({"num_runs": 0}, "num_runs must be a positive integer, but got 0"),
        ({"ess_threshold": 2.0}, r"ess_threshold, a share of the particles, must be a .*\[0, 1\]"),
        ({"resampler": "best"}, "unknown resampling scheme 'best'; expected one of multinomial"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer .or None: all.*, but got 0"),
    ],
)
def test_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        Settings(**settings)
    with pytest.raises(ValueError, match=match):
        TwistedSMC(seen(prior()), **settings)


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
def test_one_particle_is_enough(method):
    last = run(seen(prior()), method, num_particles=1, ess_threshold=1.0)
    assert last.log_evidence.shape == (1,)
    assert bool(last.log_evidence.isfinite())


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: TwistedSMC(seen(prior()), proposal="best").run(),
            "proposal must be .*'conjugate'",
        ),
        (lambda: TwistedSMC(seen(prior()), covariance="full").run(), "covariance must be 'auto'"),
        (lambda: IntermediateReward("mean"), "kind must be 'difference', 'max' or 'sum'"),
        (lambda: prior(parameterization="eps"), "parameterization must be 'epsilon', 'x0'"),
        (lambda: prior(variance="tiny"), "variance must be 'small', 'large'"),
        (lambda: network(nn.Identity(), variance="exact"), "variance='exact' needs Cov"),
        (lambda: prior(variance="mixture"), "exact kernel of a MixtureDenoiser only"),
        (lambda: prior(eta=2.0), r"eta, from DDIM to DDPM, must be a .* but got 2.0"),
        (lambda: prior(num_steps=0), "expected at least one step; got 0"),
        (lambda: Diffusion(nn.Identity()), "event_shape is needed"),
        (
            lambda: prior(source=dist.Normal(torch.zeros(2), 1.0)),
            r"the source has event shape \(\)",
        ),
        (lambda: MaskedDiffusion(nn.Identity(), 2, 3), "give either alphas or num_steps"),
        (lambda: Team({}), "a Team needs at least one process"),
        (lambda: Team({"a": prior(), "b": prior(num_steps=5)}), "need equal num_steps"),
        (lambda: Chain(prior(), network(nn.Identity()), None) and Chain(prior(), wide()), "a link"),
        (lambda: SMC(seen(prior()), guide, proposal=FromKernel()), "give a guide or a proposal"),
        (lambda: EnumeratedDenoiser(torch.zeros(2, 3)), "expected joint probabilities"),
    ],
)
def test_names_and_numbers(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def wide():
    return Diffusion(GaussianDenoiser(torch.zeros(3), 1.0), num_steps=4)


def test_place_of_a_checkpoint(tmp_path):
    method = SMC(seen(prior()), num_particles=2)
    with pytest.raises(ValueError, match="checkpoint_every must be a positive integer, but got 0"):
        method.run(checkpoint=tmp_path / "run", checkpoint_every=0)
    with pytest.raises(ValueError, match="there is no folder .*nowhere for the checkpoint"):
        method.run(checkpoint=tmp_path / "nowhere" / "run")


def test_schedule_that_is_none():
    with pytest.raises(ValueError, match=r"VariancePreserving\(betas\), but got a Tensor"):
        prior(schedule=torch.linspace(1e-4, 0.02, 1000))
    with pytest.raises(ValueError, match="expected at least one step; got 4.0"):
        prior(num_steps=4.0)


def test_a_power_may_be_a_whole_number():
    weights = []
    for twist in (IntermediateReward(), Tempered(IntermediateReward(), 1)):
        pyro.set_rng_seed(0)
        weights.append(run(seen(prior()), twist=twist, ess_threshold=0.0).log_weights)
    assert weights[0].equal(weights[1])


# ---------------------------------------------------------------------------------- observations


@pytest.mark.parametrize("shape", [(3,), (1,), (5, 2), ()])
def test_observation_of_the_wrong_shape(shape):
    match = r"site 'y': the law has event shape \(2,\), but the observation has shape "
    refused(match, seen(prior(), torch.zeros(shape)))


@pytest.mark.parametrize("size", [3, 8])
def test_one_observation_per_particle(size):
    """Also with one value per particle: data belong to problems, not to particles."""

    def model():
        x = prior()("x")
        pyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=torch.zeros(size))

    refused(r"site 'y': the law has event shape \(\), but the observation has shape", model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_observation_that_is_not_finite(value):
    y = torch.tensor([0.0, value])
    refused("site 'y': 1 of 2 observed values are NaN or infinite", seen(prior(), y))


def test_missing_event_dimension():
    def model():
        x = prior()("x")
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.zeros(2))

    refused(r"at site y dim -1.*declare events with .to_event", model)


def test_more_plates_than_declared():
    def model():
        with pyro.plate("rows", 3):
            x = prior()("x")
            pyro.sample("y", dist.Normal(x[..., :1], 1.0), obs=torch.zeros(3, 1))

    refused(r"at site y dim -2.*plates with pyro.plate", model)


# -------------------------------------------------------------------------------------- devices

# Only "meta" stands for another device here: it has shapes and no numbers.


def test_observation_on_another_device():
    match = r"site 'y': the observation lies on device 'meta', but the processes on \['cpu'\]"
    refused(match, seen(prior(), torch.zeros(2, device="meta")))


def test_a_sum_over_no_site_lies_where_the_states_lie():
    execution = Execution({}, {"x": torch.zeros(3, 2, device="meta")}, {}, 3, 0)
    assert execution.log_joint(()).device.type == "meta"


def test_network_on_another_device():
    layer = nn.Linear(2, 2)
    process = network(Forward(layer))
    layer.to("meta")
    refused("process 'x': .*meta", seen(process))


class Forward(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, time):
        return self.layer(x)


# ------------------------------------------------------------------------------------- programs


def test_no_process():
    refused("the program has no process", lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize("name", ["", None, 3])
def test_process_without_a_name(name):
    refused("a process needs a site name", lambda: prior()(name))


def test_context_without_a_name_is_refused():
    with pytest.raises(TypeError, match=r"by name, as in prior\('x', label=7\), but 7 came"):
        prior()("x", 7)


def test_process_name_used_twice():
    refused("two processes are called 'x'", lambda: (prior()("x"), prior()("x")))


@pytest.mark.parametrize("name", ["x", "z"])
def test_site_name_used_twice(name):
    def model():
        prior()("x")
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample(name, dist.Normal(0.0, 1.0))

    refused(f"two sites are called '{name}'", model)


def test_unequal_steps():
    match = r"need equal num_steps, but got \{'a': 4, 'b': 5\}"
    refused(match, lambda: (prior()("a"), prior(num_steps=5)("b")))


def test_context_that_depends_on_another_process():
    def model():
        a = prior()("a")
        network(lambda x, time, shift: x + shift[:, None])("b", shift=a[..., 0])

    refused(r"context of process 'b' depends on process 'a'.*Chain\(first, second\)", model)


@pytest.mark.parametrize("site", ["x", "x_0", "x_2"])
def test_condition_on_a_process(site):
    model = poutine.condition(seen(prior()), data={site: torch.zeros(2)})
    refused(f"site '{site}' of process 'x' is conditioned", model)


@pytest.mark.parametrize("name", ["x", "z"])
def test_scaled_draws(name):
    def model():
        with poutine.scale(scale=2.0 if name == "x" else 1.0):
            x = prior()("x")
        with poutine.scale(scale=0.5 if name == "z" else 1.0):
            z = pyro.sample("z", dist.Normal(x[..., 0], 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    refused(f"site '{name}' is scaled by poutine.scale, but it is drawn", model)


def test_subsampled_data():
    def model():
        x = prior()("x")
        with pyro.plate("data", 10, subsample_size=3) as index:
            pyro.sample("y", dist.Normal(x[..., :1], 1.0), obs=torch.zeros(10)[index])

    refused("site 'y' lies in plate 'data', which subsamples 3 of 10", model)


@pytest.mark.parametrize(
    "reward",
    [
        lambda x: x.mean().expand(x.shape[:-1]),
        lambda x: -(x - x.mean(0)).square().sum(-1),
        lambda x: x[..., 0].cumsum(-1) if x.dim() > 1 else x[..., 0],
    ],
    ids=["mean of all", "centred", "cumulative"],
)
def test_program_that_mixes_particles(reward):
    refused("site 'reward' mixes particles", rewarded(reward))


@pytest.mark.parametrize(
    "context",
    [lambda z: z.mean(), lambda z: z - z.mean(), lambda z: z.sum().item(), lambda z: {"z": z}],
    ids=["mean of all", "centred", "number", "dict"],
)
def test_context_that_mixes_particles(context):
    process = network(lambda x, time, label: x)

    def model():
        process("x", label=context(pyro.sample("z", dist.Normal(0.0, 1.0))))

    refused("process 'x': its context 'label' mixes particles", model)


def sine(x):
    return torch.as_tensor(np.sin(x.numpy()).sum(-1))


def test_numpy_reward_needs_no_gradient_where_nobody_asks():
    assert bool(run(rewarded(sine)).log_evidence.isfinite())
    assert bool(run(rewarded(sine), TwistedSMC, proposal="kernel").log_evidence.isfinite())


@pytest.mark.parametrize("reward", [sine, lambda x: sine(x.detach())], ids=["tracked", "detached"])
def test_numpy_reward_under_a_gradient_twist(reward):
    refused("proposal='kernel'", rewarded(reward), TwistedSMC)


def test_names_in_one_string():
    refused(r"per_problem takes several names, as in \('y',\)", seen(prior()), per_problem="y")


def test_unknown_per_problem_argument():
    refused("per_problem names 'y', which must be an argument", seen(prior()), per_problem=("y",))


def test_missing_argument():
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        Program(lambda y: seen(prior(), y)())


# --------------------------------------------------------------------------------------- guides


def guide():
    prior()("x")


def other_latent():
    prior()("x")
    pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("proposed", "match"),
    [
        (lambda: prior()("z"), r"process sites \['z'\] do not match the model's \['x'\]"),
        (other_latent, r"the guide samples \['z'\], which the model does not have"),
        (lambda: prior(num_steps=5)("x"), "the guide has 5 steps and the model 4"),
        (lambda: wide()("x"), r"event shapes \{'x': \(3,\)\}, the model's \{'x': \(2,\)\}"),
        (lambda: None, "the program has no process"),
        (lambda: prior(eta=0.0)("x"), "one of kernel and proposal has no variance"),
    ],
    ids=["name", "latent", "steps", "shape", "nothing", "no variance"],
)
def test_guide_that_does_not_match(proposed, match):
    refused(match, seen(prior()), guide=proposed)


def test_points_and_densities_beside_a_team():
    """A guide's team is compared as a whole, and what stands beside it by itself."""
    noisy = prior(variance="large")

    def model():
        noisy("a"), noisy("b"), prior(eta=0.0)("c")

    def joint():
        Team({"a": noisy, "b": noisy})("ab"), noisy("c")

    refused("one of kernel and proposal has no variance", model, guide=joint)


def in_a_plate(size):
    def program():
        with pyro.plate("n", size):
            prior()("x")

    return program


def test_guide_in_other_plates_than_the_model():
    refused("the guide nests 1 plates and the model 0", guide, guide=in_a_plate(3))
    mismatch = r"the guide's 'x' has shape \({}, 2\), plates included, and the model's \(3, 2\)"
    refused(mismatch.format(1), in_a_plate(3), guide=guide)
    refused(mismatch.format(2), in_a_plate(3), guide=in_a_plate(2))


def test_latent_of_a_guide_that_depends_on_its_process():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        prior()("x")

    def late():
        pyro.sample("z", dist.Normal(prior()("x")[..., 0], 1.0))

    refused(r"latents \['z'\] of the guide depend on a process", model, guide=late)


def test_control_of_the_wrong_shape():
    process = Controlled(prior(variance="large"), lambda x, t, denoised: x[..., :1])
    refused(r"control returned shape", seen(process))


# -------------------------------------------------------------------------------- rejuvenation


def count():
    kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
    x = prior()("x")
    pyro.factor("reward", x[..., 0] * kind)


def feeding():
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    x = network(lambda x, time, shift: x + shift[:, None])("x", shift=shift)
    pyro.factor("reward", -x[..., 0].square())


def scale():
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    x = prior()("x")
    pyro.sample("y", dist.Normal(x[..., 0], spread), obs=torch.tensor(3.0))


@pytest.mark.parametrize(
    ("model", "names", "match"),
    [
        (count, ["kind"], "latent 'kind' is discrete: only continuous ones can be moved"),
        (count, None, "rejuvenation has nothing to move"),
        (feeding, ["shift"], "latent 'shift' feeds the context of a process"),
        (feeding, None, "rejuvenation has nothing to move"),
        (scale, ["size"], "rejuvenation names 'size', which is no latent of the program"),
    ],
)
def test_latent_that_cannot_be_rejuvenated(model, names, match):
    refused(match, model, rejuvenation=Rejuvenation(names=names))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "hmc"}, "kind must be 'random_walk' or 'mala', but got 'hmc'"),
        ({"step_size": 0.0}, "step_size must be a number above 0, but got 0.0"),
        ({"num_moves": 0}, "num_moves must be a positive integer, but got 0"),
    ],
)
def test_rejuvenation_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        Rejuvenation(**settings)


@pytest.mark.parametrize("kind", ["max", "sum"])
def test_rejuvenation_cannot_change_what_a_twist_remembers(kind):
    refused(
        "rejuvenation cannot change what the twist remembers",
        scale,
        twist=IntermediateReward(kind, 0.3),
        rejuvenation=Rejuvenation(),
        ess_threshold=1.0,
    )


# --------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
def test_a_flow_is_not_resampled(method):
    """eta = 0: what remains is importance sampling from p(x_T), if one says so."""
    model = seen(prior(eta=0.0))
    refused(r"no transition of \['x'\] has any variance.*the SDE with the same", model, method)
    last = run(model, method, ess_threshold=0.0, num_particles=64)
    assert not any(bool(step.resampled.any()) for step in last.history)


def test_a_flow_is_refused_before_anything_is_learned():
    method = TrustRegionTwistedSMC(seen(prior(eta=0.0)), num_particles=8)
    with pytest.raises(ValueError, match="copies of a particle would stay copies"):
        method.learn()
    assert not method.iterations


@pytest.mark.parametrize(
    "process",
    [
        lambda: prior(eta=0.5),
        lambda: prior(eta=0.0, variance="exact"),
        lambda: Team({"a": prior(eta=0.0, num_steps=4, variance="large"), "b": prior()}),
    ],
    ids=["some variance", "the denoiser's variance", "a team"],
)
def test_no_flow(process):
    assert not process().deterministic


def test_flows_within_flows():
    flow = prior(eta=0.0)
    assert Chain(flow, flow).deterministic
    assert not Chain(prior(), flow).deterministic
    assert Team({"a": flow, "b": flow}).deterministic
    assert Controlled(flow, lambda x, t, denoised: x).deterministic
