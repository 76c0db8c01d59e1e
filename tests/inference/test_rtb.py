"""Relative trajectory balance: what it refuses, remembers and shares; guides and behaviours."""

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance, Predictive, Trace_ELBO
from torch import distributed, nn

from smcdiff.inference import (
    SMC,
    BackAndForth,
    Inflated,
    LinearRamp,
    Mala,
    Noised,
    OnPolicy,
    PriorPaths,
    RelativeTrajectoryBalance,
    ReplayBuffer,
    ResidualLoss,
)
from smcdiff.inference.behaviours import inflate, noised
from smcdiff.inference.differences import log_quotient
from smcdiff.inference.replay_buffer import Terminals
from smcdiff.inference.residuals import group_reduce
from smcdiff.laws import CovariantNormal
from smcdiff.models import (
    Controlled,
    Diffusion,
    Finetuned,
    Flow,
    GaussianDenoiser,
    Head,
    Langevin,
    LearnedScale,
    LearnedStart,
    MaskedDiffusion,
    Team,
    VariancePreserving,
    lora,
)
from smcdiff.models.networks import UNet

from ..torchrun import torchrun

Y = torch.tensor([0.4, -1.0])
SHORT = VariancePreserving([0.4, 0.7])


class Net(nn.Module):
    """A network of two numbers, also with an observation beside them."""

    def __init__(self, size=2, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner, self.outer = nn.Linear(size + 1, 8), nn.Linear(8, size)

    def forward(self, x, time):
        return self.outer(torch.tanh(self.inner(torch.cat([x, 0.1 * time[:, None]], 1))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.sin(torch.arange(12.0)).reshape(4, 3))

    def forward(self, tokens):
        return self.table[tokens] + self.table[tokens.flip(-1)]


def network(variance="large", **options):
    return Diffusion(Net(), SHORT, (2,), 2, variance=variance, **options)


def program(prior):
    def model(y=Y):
        x = prior("x")
        pyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=y)

    return model


def only(process):
    return lambda y=Y: process("x")


def headed(prior, **options):
    return Controlled(prior, Head(Net(4, seed=1)), **options)


def sgd(rate=1e-2):
    return pyro.optim.Adam({"lr": rate})


def balance(model=None, guide=None, optim=None, **options):
    prior = network()
    model = model or program(prior)
    guide = guide or only(headed(prior))
    return RelativeTrajectoryBalance(
        model, guide, optim or sgd(), **{"num_particles": 8, **options}
    )


def weights_of(rtb):
    return {name: p.detach().clone() for name, p in rtb.pair.parameters().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


# ------------------------------------------------------------------------- guides of all kinds


def flow():
    return Flow(Net(), (2,), 2, noise=1.0, method="euler", data_at=0)


def masked():
    return MaskedDiffusion(Tokens(), 2, 3, num_steps=2)


def image():
    torch.manual_seed(0)
    return Diffusion(UNet(1, (8, 8), heads=0), SHORT, (1, 4, 4), 2, variance="large")


def langevin(prior):
    control = Langevin(Head(Net(4)), lambda x: -(x - 1).square().sum(-1), prior.num_steps)
    return Controlled(prior, control, LearnedStart(prior), LearnedScale(prior.num_steps))


GUIDES = {
    "copy": (network, Finetuned),
    "copy with learned variance": (
        lambda: Diffusion(Doubled(), SHORT, (2,), 2, variance="learned"),
        Finetuned,
    ),
    "head": (network, headed),
    "head, deterministic end": (lambda: network("small"), headed),
    "start, variance, Langevin": (network, langevin),
    "variances by element": (
        network,
        lambda prior: headed(prior, scale=LearnedScale(prior.num_steps, shape=(2,))),
    ),
    "flow": (flow, headed),
    "copy of a flow": (flow, Finetuned),
    "copy of a masked network": (masked, Finetuned),
    "head of an image": (
        image,
        lambda prior: Controlled(prior, Head(UNet(2, (8,), heads=0), 3)),
    ),
    "copy for images": (image, Finetuned),
}


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.spread = Net(), Net(seed=3)

    def forward(self, x, time):
        return torch.cat([self.mean(x, time), self.spread(x, time)], 1)


@pytest.mark.parametrize("kind", GUIDES)
def test_guides_start_at_the_prior_and_learn(kind):
    make, guided = GUIDES[kind]
    prior = make()
    network = prior.velocity if isinstance(prior, Flow) else prior.network
    before = [p.clone() for p in network.parameters()]
    process = guided(prior)

    def model():
        x = prior("x")
        total = x.double().flatten(-len(prior.event_shape)).sum(-1)
        pyro.factor("reward", -0.1 * (total - 2).square())

    pyro.set_rng_seed(0)
    rtb = balance(model, only(process), num_particles=16)
    rtb.step()
    start = weights_of(rtb)
    assert abs(rtb.history[0].spread) > 0
    walked = rtb.pair.walk(OnPolicy().plan(rtb.pair, 4, 0), 4, ())
    moved = walked.log_ratio.abs().max()
    for _ in range(3):
        rtb.step()
    assert any(not p.equal(start[name]) for name, p in weights_of(rtb).items())
    assert moved < 1.0
    for p, old in zip(network.parameters(), before, strict=True):
        assert p.equal(old)
        assert not p.requires_grad


@pytest.mark.parametrize("kind", GUIDES)
def test_before_learning_the_ratio_is_exactly_zero(kind):
    make, guided = GUIDES[kind]
    prior = make()
    process = guided(prior)

    def model():
        pyro.factor("reward", 0.1 * prior("x").double().flatten(-len(prior.event_shape)).sum(-1))

    rtb = balance(model, only(process))
    rtb.loss_and_grads()
    walked = rtb.pair.walk(OnPolicy().plan(rtb.pair, 6, 0), 6, ())
    assert walked.log_ratio.abs().max() == 0.0


def test_one_prior_at_two_sites_is_asked_at_two_states():
    prior = network()
    process = headed(prior)

    def model():
        pyro.factor("reward", (prior("a") - prior("b")).double().sum(-1))

    rtb = balance(model, lambda: (process("a"), process("b")))
    rtb.loss_and_grads()
    walked = rtb.pair.walk(OnPolicy().plan(rtb.pair, 6, 0), 6, ())
    assert walked.log_ratio.abs().max() == 0.0


def test_low_rank_adapters_start_at_the_prior_and_learn():
    pytest.importorskip("peft")
    prior = image()
    nn.init.normal_(prior.network.output.weight, std=0.1)
    process = Finetuned(prior, lora(2))
    trainable = [p.numel() for p in process.network.parameters() if p.requires_grad]
    assert 0 < sum(trainable) < 0.5 * sum(p.numel() for p in prior.network.parameters())

    def model():
        pyro.factor("reward", -prior("x").mean((-1, -2, -3)).square())

    rtb = balance(model, only(process), sgd(1e-3))
    rtb.loss_and_grads()
    walked = rtb.pair.walk(OnPolicy().plan(rtb.pair, 4, 0), 4, ())
    assert walked.log_ratio.abs().max() == 0.0
    before = weights_of(rtb)
    for _ in range(2):
        rtb.step()
    after = weights_of(rtb)
    assert all("lora" in name for name in after)
    assert any(not after[name].equal(before[name]) for name in after)


def test_adapters_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install smcdiff\[lora\]"):
        Finetuned(image(), lora())


def test_a_trained_guide_is_plain_pyro():
    prior = network()
    model, guide = program(prior), only(headed(prior))
    pyro.set_rng_seed(0)
    rtb = balance(model, guide, num_particles=32)
    rtb.run(num_updates=20)
    assert Predictive(guide, num_samples=5, parallel=True)()["x"].shape == (5, 2)
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace()
    assert replayed.log_prob_sum().isfinite()
    assert Trace_ELBO(num_particles=3).loss(model, guide) < 50
    Importance(model, guide, num_samples=3).run()
    posterior = SMC(model, guide, num_particles=50).run()
    assert posterior.log_evidence.isfinite().all()


def test_its_log_weights_are_pyros():
    prior = network()
    model, guide = program(prior), only(headed(prior))
    rtb = balance(model, guide)
    rtb.run(num_updates=3)
    pair = rtb.pair
    walked = pair.walk(OnPolicy().plan(pair, 3, 0), 3, ())
    seen, _ = pair.log_likelihood(walked)
    for i in range(3):
        data = {f"x_{t}": x["x"][i] for t, x in walked.x.items()}
        traces = [
            poutine.trace(poutine.condition(p, data)).get_trace().log_prob_sum()
            for p in (model, guide)
        ]
        weight = float((traces[0] - traces[1]).detach())
        assert float(seen[i] - walked.log_ratio[i]) == pytest.approx(weight, abs=1e-4)


# ---------------------------------------------------------------- latents, teams and conditions


def with_latents(prior):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        x = prior("x")
        mean = pyro.sample("m", dist.Normal(x[..., 0], 1.0))
        pyro.sample("y", dist.Normal(x.sum(-1) + z + mean, scale), obs=torch.tensor(0.7))

    return model


class Latents(nn.Module):
    def __init__(self):
        super().__init__()
        self.z, self.m = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))


def guide_with_latents(prior):
    process, laws = headed(prior), Latents()

    def guide():
        pyro.module("laws", laws)
        for name, value in (("z", laws.z), ("m", laws.m)):
            pyro.sample(name, dist.Normal(value[0], value[1].exp()))
        process("x")

    return guide


def test_latents_learn_too_and_the_evidence_lower_bound_rises():
    prior = network()
    pyro.set_rng_seed(0)
    rtb = balance(
        with_latents(prior), guide_with_latents(prior), sgd(0.03), num_particles=64, chunk_steps=1
    )
    history = rtb.run(num_updates=60)
    assert set(weights_of(rtb)) > {"laws$$$z", "laws$$$m"}
    assert sum(u.mean for u in history[-10:]) > sum(u.mean for u in history[:10]) + 5
    posterior = SMC(
        with_latents(prior), guide_with_latents(prior), num_particles=2000, ess_threshold=0.0
    ).run()
    assert float(rtb.log_evidence) <= float(posterior.log_evidence) + 0.3


def test_latents_that_depend_on_a_process_need_a_law_in_the_guide():
    prior = network()
    with pytest.raises(ValueError, match=r"latents \['m'\] depend on a process"):
        balance(with_latents(prior), only(headed(prior))).step()


def test_teams_learn_to_look_at_each_other():
    first, second = network(), network()
    team = Team({"a": first, "b": second})
    process = Controlled(team, Head(Net(8)))

    def model():
        gap = first("a") - second("b")
        pyro.factor("meet", -gap.square().sum(-1))

    pyro.set_rng_seed(0)
    rtb = balance(model, lambda: process("ab"), sgd(0.02), num_particles=64)
    history = rtb.run(num_updates=40)
    assert history[-1].mean > history[0].mean + 1


def test_conditional_guides_amortise():
    """One guide for all y: log Z by a module, contexts that only the control reads."""
    prior = network()
    process = Controlled(prior, Head(Net(6), reads=("y",)), LearnedStart(prior), reads=("y",))

    class LogZ(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, y):
            return self.layer(y)[..., 0]

    pyro.set_rng_seed(0)
    rtb = balance(
        program(prior),
        lambda y: process("x", y=y),
        sgd(0.02),
        evidence=LogZ(),
        num_particles=16,
        per_problem=("y",),
    )
    losses = [rtb.step(torch.randn(4, 2)) for _ in range(40)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert Predictive(lambda: process("x", y=Y), num_samples=3, parallel=True)()["x"].shape == (
        3,
        2,
    )


def test_learned_numbers_are_one_per_problem():
    rtb = balance(per_problem=("y",), num_particles=32)
    y = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    rtb.step(y)
    assert rtb.log_evidence.shape == (2,)
    assert rtb.log_evidence[0] > rtb.log_evidence[1] + 20


def test_vargrad_centres_within_problems():
    groups = torch.tensor([0, 0, 1, 1])
    values = torch.tensor([1.0, 3.0, 10.0, 30.0]).double()
    assert group_reduce(values, groups, "mean").tolist() == [2.0, 20.0]
    assert group_reduce(values, groups, "amax").tolist() == [3.0, 30.0]


# -------------------------------------------------------------------- trajectories and buffers


def test_behaviours_take_turns_and_fill_the_buffer():
    buffer = ReplayBuffer(100)
    rtb = balance(behaviours=[OnPolicy(), PriorPaths(), Noised(buffer), BackAndForth(buffer)])
    rtb.run(num_updates=8)
    assert len(buffer) == 32
    assert [u.skipped for u in rtb.history] == [False] * 8


def test_an_empty_buffer_says_who_fills_it():
    with pytest.raises(ValueError, match="put behaviours that draw"):
        balance(behaviours=[Noised(ReplayBuffer(10))]).step()


def test_buffer_prefers_high_ranks_and_forgets_the_oldest():
    buffer = ReplayBuffer(100, flatness=0.01)
    values = torch.arange(150.0).double()
    buffer.push(Terminals({"x": values[:, None]}, {}, values))
    assert len(buffer) == 100
    torch.manual_seed(0)
    drawn = buffer.draw(4000).log_gamma
    assert float(drawn.min()) >= 50
    weights = 1 / (1 + torch.arange(100.0))
    share = float((drawn == 149).double().mean())
    expected = float(weights[0] / weights.sum())
    assert abs(share - expected) < 4.3 * (expected / 4000) ** 0.5
    buffer.push(Terminals({"x": values[:1, None]}, {}, torch.tensor([-torch.inf]).double()))
    assert len(buffer) == 100


def test_mala_samples_its_density():
    """Moves leave N(1, 0.25) as it is: mean and variance by z-score."""
    torch.manual_seed(0)
    moves = Mala(lambda x: -2 * (x["x"] - 1).square().sum(-1), num_moves=30, step_size=0.5)
    found = moves.move({"x": 1 + 0.5 * torch.randn(4000, 2).double()})["x"]
    for values, truth in ((found, 1.0), ((found - 1).square(), 0.25)):
        z = (values.mean() - truth) / (values.std() / values.numel() ** 0.5)
        assert abs(float(z)) < 4.3
    far = moves.move({"x": torch.full((2000, 1), 3.0)})["x"]
    assert abs(float(far.mean()) - 1) < 0.05


def test_data_are_noised_as_the_schedule_says():
    torch.manual_seed(0)
    prior, x = network(), torch.full((20_000, 2), 1.5).double()
    for t in (1, 2):
        x = noised(prior, x, t)
    signal = prior.signal(2)
    assert abs(float(x.mean()) - 1.5 * signal.alpha) < 4.3 * signal.sigma / 200
    assert float(x.var()) == pytest.approx(signal.sigma**2, rel=0.04)
    tokens = noised(masked(), torch.zeros(20_000, 2, dtype=torch.long), 1)
    assert float((tokens == 3).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_masked_chain_is_replayed():
    prior = masked()

    def model():
        pyro.factor("reward", 1.0 * (prior("x")[..., 0] == 1))

    rtb = balance(model, only(Finetuned(prior)), behaviours=[Noised(torch.ones(5, 2).long())])
    rtb.step()
    assert rtb.history[0].mean == pytest.approx(1.0)


def test_inflation_multiplies_deviations_and_divides_logits():
    wide = inflate(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), 2.0)
    assert wide.stddev.tolist() == [2.0, 2.0]
    flat = inflate(dist.Categorical(logits=torch.tensor([2.0, -torch.inf])), 2.0)
    assert flat.probs.tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match="use OnPolicy"):
        inflate(dist.Gamma(1.0, 1.0), 2.0)
    assert LinearRamp(2.0, 1.0, 10)(5) == 1.5
    assert LinearRamp(2.0, 1.0, 10)(99) == 1.0


def test_data_need_their_process():
    with pytest.raises(ValueError, match="give x_0 of each"):
        balance(behaviours=[Noised({"w": torch.zeros(3, 2)})]).step()
    rtb = balance(behaviours=[Noised(torch.zeros(3, 2))], per_problem=("y",))
    with pytest.raises(ValueError, match="one problem says nothing of another"):
        rtb.step(torch.zeros(2, 2))


def test_ramps_temper_the_likelihood_only():
    rtb = balance(exponent=lambda update: 0.0)
    rtb.step()
    assert rtb.history[0].mean == 0.0  # the guide is at the prior, and nothing else is seen


# ----------------------------------------------------------------------------- losses and ratios


def test_losses():
    residual = torch.tensor([0.1, -1.0, 4.0]).double()
    plain = ResidualLoss()
    assert plain.value(residual).tolist() == pytest.approx([0.005, 0.5, 8.0])
    assert plain.slope(residual).equal(residual)
    tame = ResidualLoss(dead_zone=0.25, huber=2.0)
    assert tame.value(residual).tolist() == pytest.approx([0.0, 0.375, 5.875])
    assert tame.slope(residual).tolist() == [0.0, -1.0, 2.0]
    groups = torch.tensor([0, 0, 1])
    shares = ResidualLoss(importance=1.0).shares(torch.tensor([0.0, 1.0, 7.0]).double(), groups)
    assert shares.tolist() == pytest.approx([0.5378828427, 1.4621171573, 1.0])
    with pytest.raises(ValueError, match="dead_zone must be 0 or more"):
        ResidualLoss(dead_zone=-1.0)


def test_slopes_are_derivatives():
    loss = ResidualLoss(dead_zone=0.1, huber=1.5)
    residual = torch.linspace(-3, 3, 50).double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.value(residual).sum(), residual)
    torch.testing.assert_close(loss.slope(residual.detach()), gradient)


def test_differences_are_safe_in_float32():
    """200,000 dimensions: two float32 sums lose 0.01 and more, the difference form does not."""
    torch.manual_seed(0)
    mean, shift = torch.randn(3, 200_000), 1e-4 * torch.randn(3, 200_000)
    p = dist.Normal(mean, torch.full_like(mean, 0.1)).to_event(1)
    q = dist.Normal(mean + shift, torch.full_like(mean, 0.1)).to_event(1)
    x = p.sample()
    exact = [
        dist.Normal(law.mean.double(), law.stddev.double()).log_prob(x.double()).sum(-1)
        for law in (q, p)
    ]
    torch.testing.assert_close(log_quotient(q, p, x), exact[0] - exact[1], rtol=0, atol=2e-4)


LAWS = {
    "unequal variances": (
        dist.Normal(torch.tensor([[0.3, 1.0]]), torch.tensor([[0.5, 2.0]])).to_event(1),
        dist.Normal(torch.zeros(1, 2), torch.ones(1, 2)).to_event(1),
    ),
    "low rank": (
        dist.Normal(torch.ones(1, 2), torch.ones(1, 2)).to_event(1),
        CovariantNormal(torch.zeros(1, 2), torch.ones(2), torch.ones(1, 2, 1)),
    ),
}


@pytest.mark.parametrize("case", LAWS)
def test_differences_are_those_of_the_log_densities(case):
    q, p = LAWS[case]
    x = torch.tensor([[0.7, -1.2]])
    expected = (q.log_prob(x) - p.log_prob(x)).double()
    torch.testing.assert_close(log_quotient(q, p, x), expected, rtol=1e-5, atol=1e-6)


def test_points_compare_with_points_only():
    point, law = dist.Delta(torch.zeros(1, 2), event_dim=1), LAWS["low rank"][0]
    assert log_quotient(point, point, torch.zeros(1, 2)).tolist() == [0.0]
    with pytest.raises(ValueError, match="one of model and guide has no variance"):
        log_quotient(point, law, torch.zeros(1, 2))


# --------------------------------------------------------------------------------- bad input


def test_a_prior_that_would_train_is_refused():
    prior = network(train=True)
    with pytest.raises(ValueError, match=r"the model would train \(x\)"):
        balance(program(prior), only(headed(prior))).step()

    def model():
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("y", dist.Normal(frozen("x"), scale).to_event(1), obs=Y)

    frozen = network()
    with pytest.raises(ValueError, match=r"the model would train \(scale\)"):
        balance(model, only(headed(frozen))).step()


def test_sites_that_do_not_match_are_named():
    prior = network()
    with pytest.raises(ValueError, match=r"\['w'\] do not match the model's \['x'\]"):
        balance(program(prior), lambda: headed(prior)("w")).step()


def test_a_guide_without_parameters_is_refused():
    prior = network()
    with pytest.raises(ValueError, match="no trainable parameters"):
        balance(program(prior), lambda *args: prior("x")).step()


def test_a_reward_of_zero_is_named_and_can_have_a_floor():
    prior = network()

    def model():
        x = prior("x")
        pyro.factor("inside", torch.where(x[..., 0] > 0, 0.0, -torch.inf))

    guide = only(headed(prior))
    with pytest.raises(ValueError, match="update 0: .* site 'inside' has log-probability -inf"):
        balance(model, guide).step()
    assert balance(model, guide, floor=-20.0).step() > 1


@pytest.mark.parametrize("kind", ["network", "masked"])
def test_a_residual_that_is_no_number_names_its_step(kind):
    prior = network() if kind == "network" else masked()

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.broken = nn.Parameter(torch.zeros(())), False

        def forward(self, x, t, denoised):
            shape = x.shape if kind == "network" else (*x.shape, 4)
            return (self.shift + (torch.nan if self.broken and t == 1 else 0.0)).expand(shape)

    bias = Bias()

    def model():
        pyro.factor("reward", -prior("x").double().sum(-1).square())

    options = {"num_particles": 4}
    rtb = balance(model, only(Controlled(prior, bias)), **options)
    skipping = balance(model, only(Controlled(prior, bias)), on_nonfinite="skip", **options)
    rtb.step()
    skipping.step()
    bias.broken, before = True, float(bias.shift.detach())
    with pytest.raises(ValueError, match="update 1: 4 of 4 .* transition at step t = 1 .* nan"):
        rtb.step()
    assert skipping.step() != skipping.step()  # nan
    assert skipping.history[-1].skipped
    assert float(bias.shift.detach()) == before


def test_settings_are_checked():
    for wrong, message in [
        ({"evidence": "guess"}, "evidence is 'learned'"),
        ({"evidence": "vargrad", "num_particles": 1}, "compares trajectories"),
        ({"on_nonfinite": "hope"}, "on_nonfinite is"),
        ({"chunk_steps": 0}, "chunk_steps must be a positive integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            balance(**wrong)
    buffered, weighed = [Noised(torch.zeros(3, 2))], ResidualLoss(importance=1.0)
    with pytest.raises(ValueError, match="nobody knows that of x_0 in ..Noised"):
        balance(behaviours=buffered, loss=weighed)
    with pytest.raises(ValueError, match="in pairs"):
        balance(behaviours=[BackAndForth(torch.zeros(3, 2))], num_particles=3).step()
    with pytest.raises(ValueError, match="no number log Z"):
        _ = balance(evidence="vargrad").log_evidence
    with pytest.raises(ValueError, match="has no network"):
        Finetuned(headed(network()))
    with pytest.raises(ValueError, match="nothing to train"):
        Finetuned(network(), lambda net: net.requires_grad_(False))
    denoiser = GaussianDenoiser(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="nothing to train"):
        Finetuned(Diffusion(denoiser, SHORT, num_steps=2))
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        Head(nn.Identity())


# ----------------------------------------------------------------------- checkpoints, processes


def everything(y=Y):
    """A training that has all that a checkpoint must hold."""
    buffer = ReplayBuffer(50)
    behaviours = [OnPolicy(), Inflated(LinearRamp(1.5, 1.0, 5)), Noised(buffer)]
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    prior = network()
    return balance(
        program(prior),
        only(headed(prior, scale=LearnedScale(2))),
        pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9}),
        behaviours=behaviours,
        subsample=1,
        exponent=LinearRamp(0.1, 1.0, 6),
        max_gradient_norm=1.0,
    )


def test_a_killed_run_is_continued_bit_for_bit(tmp_path):
    file = tmp_path / "guide.safetensors"
    whole = everything()
    whole.run(Y, num_updates=9)
    expected = weights_of(whole)
    everything().run(Y, num_updates=5, checkpoint=file)
    again = everything()
    again.step(Y)  # whatever it did before is forgotten
    torch.randn(7)
    again.run(Y, num_updates=9, checkpoint=file, resume=True, checkpoint_every=2)
    assert again.history == whole.history
    assert again.calls == whole.calls
    assert again.log_evidence.equal(whole.log_evidence)
    assert_same(weights_of(again), expected)
    assert [each.name for each in tmp_path.iterdir()] == ["guide.safetensors"]


def test_a_foreign_checkpoint_is_refused(tmp_path):
    file = tmp_path / "guide.safetensors"
    with pytest.raises(ValueError, match="nothing to save"):
        everything().save(file)
    everything().run(Y, num_updates=2, checkpoint=file)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="belongs to another training: parameters="):
        balance().run(Y, num_updates=3, checkpoint=file, resume=True)
    state = SMC(program(network()), num_particles=4).run(Y).particles
    state.save(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="not a saved run"):
        everything().load(tmp_path / "run.safetensors", Y)


def test_other_data_are_refused_when_a_run_is_resumed(tmp_path):
    file = tmp_path / "guide.safetensors"
    everything().run(Y, num_updates=2, checkpoint=file)
    again = everything()
    again.step(Y)
    again.step(Y + 1)
    before = weights_of(again)
    with pytest.raises(ValueError, match="other data, or to another program"):
        again.run(Y + 0.1, num_updates=3, checkpoint=file, resume=True)
    assert_same(weights_of(again), before)  # nothing was read
    assert again.done == 2
    again.run(Y.clone(), num_updates=3, checkpoint=file, resume=True)
    other = everything()
    other.load(file, Y + 0.1)  # which says that other data come now
    other.run(Y + 0.1, num_updates=4, checkpoint=file)
    everything().run(Y, num_updates=5, checkpoint=file, resume=True)


def test_a_training_of_changing_data_is_resumed_with_any(tmp_path):
    file, data = tmp_path / "guide.safetensors", [Y + k for k in range(6)]

    def train(rtb, data):
        for y in data:
            rtb.step(y)
        return rtb

    whole = train(everything(), data)
    train(everything(), data[:3]).save(file)
    again = everything()
    again.load(file, data[3])
    assert train(again, data[3:]).history == whole.history
    everything().run(data[5], num_updates=4, checkpoint=file, resume=True)


def test_other_problems_are_refused(tmp_path):
    file = tmp_path / "guide.safetensors"

    def conditional(y, num_updates):
        pyro.clear_param_store()
        prior, settings = network(), {"evidence": "vargrad", "per_problem": ("y",)}
        rtb = balance(program(prior), only(headed(prior)), **settings)
        return rtb.run(y, num_updates=num_updates, checkpoint=file, resume=True)

    conditional(torch.stack([Y, -Y]), 1)
    for y in (torch.stack([Y, Y]), torch.stack([Y, -Y, Y])):
        with pytest.raises(ValueError, match="other data, or to another program"):
            conditional(y, 2)
    assert len(conditional(torch.stack([Y, -Y]), 2)) == 2


def test_progress_is_shown_if_asked_for(capsys):
    balance().run(num_updates=2)
    assert capsys.readouterr() == ("", "")
    balance().run(num_updates=2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_what_is_drawn_between_updates_is_the_users():
    """The model is taken apart without a trace in the random stream."""
    one = everything()
    first = [one.step(Y) for _ in range(3)]
    other = everything()
    assert [other.step(Y.clone()) for _ in range(3)] == first


def test_a_checkpoint_without_a_folder_is_refused_before_any_update(tmp_path):
    rtb = balance()
    with pytest.raises(ValueError, match="there is no folder .*nowhere for the checkpoint"):
        rtb.run(num_updates=1, checkpoint=tmp_path / "nowhere" / "guide.safetensors")
    assert rtb.done == 0


def joint(folder=None, seed=3):
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    prior, buffer = network(), ReplayBuffer(50)
    rtb = balance(
        with_latents(prior),
        guide_with_latents(prior),
        behaviours=[OnPolicy(), Noised(buffer), BackAndForth(buffer), PriorPaths()],
        max_gradient_norm=5.0,
        num_particles=8,
    )
    rtb.run(num_updates=8, checkpoint=folder and folder / "guide.safetensors")
    return rtb


def train_in_one_of_two(folder):
    """Whatever the second process was seeded with, its stream is that of the first."""
    distributed.init_process_group("gloo")
    joint(folder, seed=3 + distributed.get_rank())
    distributed.destroy_process_group()


def test_two_processes_make_the_run_of_one(tmp_path):
    torchrun("tests.inference.test_rtb", tmp_path)
    one = joint()
    losses, parameters = [u.loss for u in one.history], weights_of(one)
    two = joint()
    two.load(tmp_path / "guide.safetensors")
    torch.set_default_dtype(torch.float32)
    assert [u.loss for u in two.history] == pytest.approx(losses, abs=1e-10)
    for name, value in weights_of(two).items():
        torch.testing.assert_close(value, parameters[name], rtol=0, atol=1e-10)


if __name__ == "__main__":
    train_in_one_of_two(Path(sys.argv[1]))
