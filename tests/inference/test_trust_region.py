"""Learning as a procedure: what is recorded, replayed, resumed, shared, refused and shown."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from smcdiff import DegenerateWeights, Program
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    GaussianKernels,
    JointTwist,
    QuadraticTwist,
    ResidualTwist,
    TokenTwist,
    TrustRegionTwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.inference.engine import Engine, Settings
from smcdiff.inference.learned import record
from smcdiff.inference.replay import Pool
from smcdiff.models import (
    Diffusion,
    EnumeratedDenoiser,
    GaussianDenoiser,
    MaskedDiffusion,
    VariancePreserving,
)

from ..oracles import moments
from ..referee.checks import BOUND, z_of_evidence, z_score

SCHEDULE = VariancePreserving([0.2, 0.4, 0.6, 0.8])
TABLE = torch.sin(1.0 + 2 * torch.arange(3)[:, None] + 3 * torch.arange(3)).exp()
QUICK = Descent(steps=30, batch=64, times=2)


def prior(size=2, **settings):
    denoiser = GaussianDenoiser(torch.zeros(size), 1.0)
    return Diffusion(denoiser, SCHEDULE, num_steps=4, **{"variance": "large", **settings})


def tokens(network=None):
    return MaskedDiffusion(network or EnumeratedDenoiser(TABLE), 2, 3, num_steps=4)


def gaussian(size=2, shift=1.5):
    """A reward that pulls every element to ``shift``; log Z follows from the law of the chain."""
    process = prior(size)

    def model():
        x = process("x")
        pyro.factor("reward", -0.5 * ((x - shift) ** 2).sum(-1) / 0.3)

    return model


def mixed(y=0.7):
    """Two processes of different kinds, and a latent."""
    process, words = prior(), tokens()

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x, w = process("x"), words("w")
        pyro.sample("y", dist.Normal(x.sum(-1) + z, 0.5), obs=torch.tensor(y))
        pyro.factor("reward", 1.5 * (w == 2).sum(-1))

    return model


def rewarded(reward, process=None):
    chosen = process or prior()

    def model():
        pyro.factor("reward", reward(chosen("x")))

    return model


FAMILIES = {
    "kernels": GaussianKernels,
    "quadratic": QuadraticTwist,
    "joint": JointTwist,
    "residual": lambda: ResidualTwist(DenoisedLikelihood(), width=8, descent=QUICK),
    "alone": lambda: ResidualTwist(width=8, descent=QUICK),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
few = pytest.mark.filterwarnings("ignore:.* has more parameters than")


def method(model, family="quadratic", **options):
    options = {"num_particles": 128, "num_iterations": 2, **options}
    return TrustRegionTwistedSMC(model, FAMILIES[family](), **options)


def sweep(model, learned, size=64, **settings):
    engine = Engine(Program(model), learned, learned, Settings(size, 1, 0.0, **settings))
    states = list(engine.iterate())
    return engine, states, record(engine.evaluator, states, learned)


# ---------------------------------------------------------------------------- what is recorded


@each_family
@pytest.mark.parametrize("model", [gaussian, mixed])
def test_recorded_weights_are_the_engines(family, model):
    """Rebuilt from draws, transitions and rewards, before and after learning."""
    pyro.set_rng_seed(0)
    made = method(model(), family, num_iterations=1)
    for _ in range(2):
        _, states, paths = sweep(model(), made.learned)
        torch.testing.assert_close(paths.log_weights, states[-1].log_weights[0])
        assert not bool(paths.log_sampling.abs().max() > 1e-9)
        ratios = torch.stack(paths.ratios).sum(0)
        torch.testing.assert_close(made.learned.log_ratios(paths), ratios)
        first = states[0].log_weights[0] - states[0].cache["log_psi"][0]
        to_go = [states[-1].log_weights[0] - first] + [
            states[-1].log_weights[0] - s.log_weights[0] + s.cache["log_psi"][0]
            for s in states[1:-1]
        ]
        for found, expected in zip(paths.to_go(), to_go, strict=True):
            torch.testing.assert_close(found, expected)
        made.learn()


@each_family
def test_families_start_at_the_model(family):
    """Or at the analytic twist: nothing is learned yet, so nothing is weighed."""
    learned = FAMILIES[family]()
    _, states, paths = sweep(mixed(), learned)
    if family != "residual":
        assert not bool(
            paths.log_weights.sub(paths.log_reward).add(log_latents(states)).abs().max() > 1e-9
        )
        for state in states[1:-1]:
            torch.testing.assert_close(state.log_weights[0], torch.zeros(64).double())


def log_latents(states):
    return dist.Normal(0.0, 1.0).log_prob(states[0].latents["z"][0]).double()


def test_paths_of_a_resampled_run_are_its_lineages():
    learned = QuadraticTwist()
    engine = Engine(Program(gaussian()), learned, learned, Settings(32, 1, 1.0))
    states = list(engine.iterate())
    paths = record(engine.evaluator, states, learned)
    for k in range(5):
        ours, seen = paths.x[k]["x"], states[k].x["x"][0]
        assert bool((ours[:, None] == seen).all(-1).any(1).all())
    transition = engine.evaluator.kernels(4, paths.x[0], paths.caches[0])["x"].law.mean
    draw = list(paths.draws())[1]
    torch.testing.assert_close(draw.laws["x"].mean, transition)


@pytest.mark.parametrize("exponent", [0.4, 1.0])
def test_tempered_sweeps_stand_for_the_law_that_drew_them(exponent):
    """Resampled with powers of the weights, and weighted back: means under P_k."""
    pyro.set_rng_seed(0)
    made = method(gaussian(), num_iterations=1)
    made.learn()
    engine, _, plain = sweep(gaussian(), made.learned, 20_000)
    engine = Engine(
        engine.program, made.learned, made.learned, Settings(50, 200, 1.0, exponent=exponent)
    )
    states = list(engine.iterate())
    assert bool(torch.stack([step.resampled for step in states[-1].history]).any())
    paths = record(engine.evaluator, states, made.learned, exponent)
    norms = states[-1].log_norm.repeat_interleave(50)  # a run counts by what it resampled away
    weights = (paths.log_sampling + norms).exp().reshape(200, 50).mean(-1)
    assert abs(z_score(weights, 1.0)) < BOUND
    low = plain.x[-1]["x"][:, 0].mean()
    values = (paths.log_sampling + norms).exp() * (paths.x[-1]["x"][:, 0] - low)
    error = plain.x[-1]["x"][:, 0].std() / 20_000**0.5
    means = values.reshape(200, 50).mean(-1)
    assert float(means.mean().abs()) < BOUND * float((means.var() / 200 + error**2).sqrt())


def test_tempered_learning_reaches_the_target():
    pyro.set_rng_seed(0)
    made = method(gaussian(4), num_particles=300, num_runs=20, num_iterations=8, tempered=True)
    posterior = made.run()
    assert float(made.iterations[-1].tau[0]) == 1
    plain = method(gaussian(4), num_particles=300, num_runs=20, num_iterations=8).run()
    gap = posterior.evidence.log_evidence - plain.evidence.log_evidence
    error = posterior.evidence.standard_error.hypot(plain.evidence.standard_error)
    assert abs(float(gap)) < BOUND * float(error)


# ---------------------------------------------------------------------------------- replay


def test_a_sweep_of_the_same_law_is_more_of_the_same():
    learned = GaussianKernels()
    engine, _, first = sweep(gaussian(), learned)
    pool = Pool(engine.evaluator, 3, 1)
    for paths in (first, sweep(gaussian(), learned)[2], sweep(gaussian(), learned, 32)[2]):
        pool.add(paths, learned)
    logs, base = pool.log_weights()
    assert logs.shape == (1, 160)
    torch.testing.assert_close(base, torch.zeros_like(base), rtol=0, atol=1e-9)
    torch.testing.assert_close(logs[0, :64], first.log_weights)
    joined, weights = pool.all_paths(base.softmax(-1))
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(joined.log_weights, logs[0])


@pytest.mark.parametrize("family", ["kernels", "quadratic", "residual"])
def test_replayed_paths_stand_for_the_last_law(family):
    """The base weights have mean one, and with them log gamma / P_k has mean Z."""
    pyro.set_rng_seed(0)
    ones, evidence = [], []
    for _ in range(16):
        made = method(gaussian(shift=0.8), family, num_iterations=1, epsilon=0.2)
        engine, _, paths = sweep(gaussian(shift=0.8), made.learned, 256)
        pool = Pool(engine.evaluator, 2, 1)
        pool.add(paths, made.learned)
        made.learn()
        pool.add(sweep(gaussian(shift=0.8), made.learned, 128)[2], made.learned)
        logs, base = pool.log_weights()
        assert float(base.std()) > 0.01
        ones.append(base.exp().mean())
        evidence.append((base + logs).exp().mean())
    assert abs(z_score(torch.stack(ones), 1.0)) < BOUND
    truth = SMC(gaussian(shift=0.8), num_particles=100_000, ess_threshold=0.0).run()
    gap = torch.stack(evidence) / truth.log_evidence.exp()
    assert abs(z_score(gap, 1.0)) < BOUND


def test_the_pool_forgets():
    learned = QuadraticTwist()
    engine, _, paths = sweep(gaussian(), learned)
    pool = Pool(engine.evaluator, 2, 1)
    for _ in range(5):
        pool.add(paths, learned)
    assert len(pool.sweeps) == 2


@few
def test_replay_helps_small_sweeps():
    """Forty paths per sweep determine little; those of four sweeps more."""
    found = {}
    for replay in (0, 3):
        pyro.set_rng_seed(3)
        made = method(gaussian(6), num_particles=40, num_iterations=8, replay=replay, good_ess=1.0)
        found[replay] = torch.stack([each.ess[0] for each in made.learn()[-4:]]).mean()
    assert float(found[3]) > float(found[0])


# ------------------------------------------------------------------------- it does its work


@each_family
def test_it_learns_and_the_answer_is_right(family):
    pyro.set_rng_seed(1)
    made = method(mixed(), family, num_particles=64, num_runs=64, learning_particles=512)
    posterior = made.run()
    reference = SMC(mixed(), num_particles=200_000, ess_threshold=0.0).run()
    assert abs(z_of_evidence(posterior.particles, float(reference.log_evidence))) < BOUND


def test_what_was_learned_is_saved_and_used(tmp_path):
    made = method(mixed(), "joint", num_iterations=3, num_particles=512)
    made.learn()
    made.learned.save(tmp_path / "learned")
    loaded = JointTwist()
    loaded.load(tmp_path / "learned")
    pyro.set_rng_seed(0)
    one = SMC(mixed(), twist=made.learned, proposal=made.learned).run()
    pyro.set_rng_seed(0)
    two = SMC(mixed(), twist=loaded, proposal=loaded).run()
    assert one.log_weights.equal(two.log_weights)
    bootstrap = SMC(mixed()).run()
    assert float(one.particles.ess) > float(bootstrap.particles.ess)


@pytest.mark.parametrize("family", ["kernels", "residual"])
def test_a_family_reads_only_its_own_files(family, tmp_path):
    QuadraticTwist().save(tmp_path / "file")
    with pytest.raises(ValueError, match="not a saved run of this version of smcdiff"):
        FAMILIES[family]().load(tmp_path / "file")


def test_rewards_need_no_gradient():
    def reward(x):
        return torch.as_tensor(np.where(x.numpy()[..., 0] > 1.0, 2.0, -1.0))

    pyro.set_rng_seed(0)
    made = method(rewarded(reward), num_particles=2000, num_iterations=4)
    posterior = made.run()
    inside = SMC(rewarded(reward), num_particles=200_000, ess_threshold=0.0).run()
    assert float(made.iterations[-1].ess[0]) > 1.5 * float(made.iterations[0].ess[0])
    assert float(posterior.log_evidence) == pytest.approx(float(inside.log_evidence), abs=0.1)


@few
def test_features_narrow_what_is_learned():
    """The reward sees one direction of thirty: two numbers per step are enough for forty paths."""
    direction = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).double()
    direction = direction / direction.norm()

    def reward(x):
        return -0.5 * ((x.double() @ direction[0]) - 2.5) ** 2 / 0.1

    found = {}
    for name, features in (("one", direction), ("all", None)):
        pyro.set_rng_seed(0)
        made = TrustRegionTwistedSMC(
            rewarded(reward, prior(30)),
            QuadraticTwist(features),
            num_particles=60,
            num_iterations=8,
        )
        made.learn()
        found[name] = float(made.iterations[-1].ess[0])
    assert found["one"] > 0.5 > found["all"]


def test_amortised_over_observations():
    """One network sees y, learns on some, and serves others without learning."""
    process = prior(1)

    def model(y):
        x = process("x")
        pyro.sample("y", dist.Normal(x[..., 0], 0.3), obs=y)

    pyro.set_rng_seed(0)
    learned = ResidualTwist(width=32, context=["y"], descent=Descent(150, 256, None, 2e-2))
    made = TrustRegionTwistedSMC(
        model,
        learned,
        per_problem=("y",),
        num_particles=64,
        num_iterations=3,
        good_ess=1.0,
    )
    made.learn(torch.linspace(-2.5, 2.5, 11))
    assert made.iterations[0].tau.shape == (11,)
    new = torch.tensor([-1.9, 0.3, 2.2])
    options = {"num_particles": 100, "num_runs": 8, "per_problem": ("y",), "ess_threshold": 0.0}
    amortised = SMC(model, twist=learned, proposal=learned, **options).run(new)
    bootstrap = SMC(model, **options).run(new)
    gained = (amortised.particles.ess / bootstrap.particles.ess).mean(-1)
    assert float(gained[1]) > 1.1  # near the prior's mean there is little to gain
    assert float(gained[0]) > 4 < float(gained[2])
    mean, spread = moments(process)
    exact = dist.Normal(mean, (spread[0] + 0.09).sqrt()).log_prob(new)
    for each, truth in zip(amortised.log_evidence, exact, strict=True):
        assert abs(z_score((each - truth).exp(), 1.0)) < BOUND


# --------------------------------------------------------------------------- stopping, resuming


def test_it_stops_where_the_weights_are_good():
    made = method(gaussian(), num_iterations=30, num_particles=512, good_ess=0.5)
    last = made.learn()[-1]
    assert len(made.iterations) < 10
    assert float(last.tau[0]) == 1
    assert float(last.ess[0]) > 0.5
    assert float(last.predicted[0]) < float(made.iterations[0].predicted[0])


def test_it_stops_where_nothing_is_gained():
    made = method(gaussian(), num_iterations=60, num_particles=512, good_ess=1.0)
    made.learn()
    assert len(made.iterations) < 40


def test_an_effective_sample_size_instead_of_epsilon():
    made = method(gaussian(8), num_particles=500, ess_target=0.4, num_iterations=3)
    first = made.learn()[0]
    assert float(first.ess_tempered[0]) == pytest.approx(0.4)


def test_calls_are_counted():
    made = method(gaussian(), num_iterations=2, learning_particles=50, good_ess=1.0)
    posterior = made.run()
    assert made.learning_calls.network == 2 * 50 * 4
    assert posterior.num_network_calls == 128 * 4
    assert made.learning_calls.gradient == 0


@pytest.mark.parametrize(("family", "replay"), [("joint", 0), ("joint", 2), ("residual", 1)])
def test_learning_resumes_bit_for_bit(family, replay, tmp_path):
    options = {"num_iterations": 4, "replay": replay, "good_ess": 1.0}
    pyro.set_rng_seed(0)
    whole = method(mixed(), family, **options)
    posterior = whole.run(checkpoint=tmp_path / "whole")
    pyro.set_rng_seed(0)
    method(mixed(), family, **{**options, "num_iterations": 2}).learn(
        checkpoint=tmp_path / "half.learning"
    )
    pyro.set_rng_seed(99)  # another process, another stream
    resumed = method(mixed(), family, **options)
    again = resumed.run(checkpoint=tmp_path / "half", resume=True)
    assert len(resumed.iterations) == len(whole.iterations) > 2
    for name, value in whole.learned.tensors().items():
        assert value.equal(resumed.learned.tensors()[name])
    assert again.log_weights.equal(posterior.log_weights)
    third = method(mixed(), family, **options).run(checkpoint=tmp_path / "whole", resume=True)
    assert third.log_weights.equal(posterior.log_weights)


def test_progress_is_shown_when_asked_for(capfd):
    method(gaussian()).run(progress=True)
    shown = capfd.readouterr().err
    assert "iteration" in shown
    assert "beta" in shown
    assert "about" in shown


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("epsilon", [0.0, -0.1])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon, a divergence in nats, must be a number above 0"):
        method(gaussian(), epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [math.log(16), 5.0])
def test_an_epsilon_that_never_binds_is_said(epsilon):
    with pytest.warns(UserWarning, match=r"never binds: 16 paths diverge by at most log N = 2.77"):
        method(gaussian(), epsilon=epsilon, learning_particles=16)


def test_too_few_paths_are_said_once():
    made = method(gaussian(12), num_particles=3, epsilon=1.0, num_iterations=4, good_ess=1.0)
    with pytest.warns(UserWarning, match="QuadraticTwist has more parameters than") as caught:
        made.learn()
    assert len(caught) == 1


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_rewards_that_are_no_numbers(value, word):
    def reward(x):
        return torch.where(x[..., 0] > 0, value, 0.0)

    with pytest.raises(ValueError, match=f"site 'reward' .*{word} at step t = 0"):
        method(rewarded(reward)).run()


def test_rewards_that_exclude_everything():
    with pytest.raises(DegenerateWeights, match="at step t = 0: all 128 particles have weight"):
        method(rewarded(lambda x: torch.full(x.shape[:-1], -math.inf))).run()


@few
@each_family
def test_rewards_that_exclude_much(family):
    """Paths without weight teach nothing, and do no harm."""
    reward = rewarded(lambda x: torch.where(x[..., 0] > 1, 0.1 * x[..., 0], -math.inf))
    made = method(reward, family)
    posterior = made.run()
    assert all(bool(v.isfinite().all()) for v in made.learned.tensors().values())
    assert bool(posterior.log_evidence.isfinite().all())


def masked_out(words):
    """Logits that leave no token possible."""
    return torch.full((*words.shape, 3), -math.inf)


def test_a_network_that_leaves_no_token(no_type_checks):
    model = rewarded(lambda x: x.sum(-1).float(), tokens(masked_out))
    with pytest.raises(ValueError, match="process 'x'.*leave.? no token possible"):
        TrustRegionTwistedSMC(model, TokenTwist(), num_particles=64).run()


def test_another_vocabulary(no_type_checks):
    learned = TokenTwist()
    reward = lambda x: x.sum(-1).float()  # noqa: E731
    TrustRegionTwistedSMC(rewarded(reward, tokens()), learned, num_iterations=1).learn()
    table = torch.ones(2, 5)
    other = MaskedDiffusion(EnumeratedDenoiser(table[:, :2] + table[:, 2:4]), 2, 2, num_steps=4)
    with pytest.raises(ValueError, match=r"process 'x' at step t = 4 has \(2, 3\) positions and"):
        SMC(rewarded(reward, other), twist=learned, proposal=learned).run()


def test_positions_that_change_together():
    table = torch.ones(2, 2, 2)
    even = MaskedDiffusion(EnumeratedDenoiser(table), 3, 2, num_steps=3, reveal="even")
    model = rewarded(lambda x: x.sum(-1).float(), even)
    with pytest.raises(ValueError, match="process 'x' at step t = .*use .*reveal='independent'"):
        TrustRegionTwistedSMC(model, TokenTwist(), num_iterations=1, num_particles=64).run()


def test_another_size(no_type_checks):
    made = method(gaussian(2))
    made.learn()
    with pytest.raises(ValueError, match="process 'x' at t = 4 has 3 coordinates, but"):
        SMC(gaussian(3), twist=made.learned, proposal=made.learned).run()


def test_features_that_are_no_coordinates():
    with pytest.raises(ValueError, match="features of process 'x' must be orthonormal rows with 2"):
        TrustRegionTwistedSMC(gaussian(), QuadraticTwist(torch.ones(1, 2))).run()


def test_features_need_equal_variances():
    denoiser = GaussianDenoiser(torch.zeros(2), torch.tensor([1.0, 3.0]))
    process = Diffusion(denoiser, SCHEDULE, num_steps=4, variance="exact")
    twist = QuadraticTwist(torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="process 'x' at step t = 4: features need transitions"):
        TrustRegionTwistedSMC(rewarded(lambda x: x[..., 0], process), twist).run()


def test_correlated_transitions():
    denoiser = GaussianDenoiser(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    process = Diffusion(denoiser, SCHEDULE, num_steps=4, variance="exact")
    with pytest.raises(ValueError, match=r"process 'x' at step t = 4: QuadraticTwist changes"):
        TrustRegionTwistedSMC(rewarded(lambda x: x[..., 0], process), QuadraticTwist()).run()


class Narrow(nn.Linear):
    def forward(self, inputs, time):
        return super().forward(inputs)


def test_networks_of_the_wrong_shape(no_type_checks):
    twist = ResidualTwist(network=Narrow(6, 2))
    with pytest.raises(ValueError, match=r"ResidualTwist returned shape \(128, 2\) at step t = 4"):
        TrustRegionTwistedSMC(gaussian(), twist, num_particles=128).run()

    class Wide(nn.Linear):
        def forward(self, words, t, denoised):
            return super().forward(denoised)

    model = rewarded(lambda x: x.sum(-1).float(), tokens())
    twist = TokenTwist(Wide(3, 3))
    with pytest.raises(ValueError, match=r"TokenTwist returned biases of shape \(\d+, 2, 3\)"):
        TrustRegionTwistedSMC(model, twist, num_particles=128).run()


def test_a_context_that_does_not_exist():
    with pytest.raises(ValueError, match=r"context names 'label', but the program's sites are"):
        TrustRegionTwistedSMC(gaussian(), ResidualTwist(context=["label"])).run()


def test_two_parts_for_one_process():
    learned = JointTwist(QuadraticTwist(), GaussianKernels())
    with pytest.raises(ValueError, match="two parts of a JointTwist change process 'x'"):
        TrustRegionTwistedSMC(gaussian(), learned).run()


# --------------------------------------------------------------------------------------- pictures


def test_the_escort_path_is_drawn():
    made = method(gaussian(), num_iterations=3)
    with pytest.raises(ValueError, match="no iteration to plot"):
        made.plot_escort()
    made.learn()
    figure = made.plot_escort()
    figure.canvas.draw()
    assert "iterations learning" in figure.get_suptitle()
    assert all(ax.get_ylabel() for ax in figure.axes)
