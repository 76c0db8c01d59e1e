"""Relative trajectory balance against closed forms: zero residuals, floors, exact gradients."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from smcdiff import Process
from smcdiff.inference import (
    SMC,
    BackAndForth,
    Inflated,
    LinearRamp,
    Noised,
    OnPolicy,
    PriorPaths,
    RelativeTrajectoryBalance,
    ResidualLoss,
)
from smcdiff.inference.pair import Pair
from smcdiff.inference.trajectories import Plan
from smcdiff.models import (
    Controlled,
    Diffusion,
    EnumeratedDenoiser,
    GaussianDenoiser,
    LearnedScale,
    LearnedStart,
    MaskedDiffusion,
    VariancePreserving,
)
from smcdiff.process import Kernel

from ..oracles import affine, covariance, moments
from .checks import BOUND

BETAS = [0.3, 0.5, 0.8]
STILL = {"lr": 0.0}
FADING = {"lr": 0.1, "lrd": 0.98}


class Light(Process):
    """A linear-Gaussian chain with the transitions of another, elementwise, and little else."""

    def __init__(self, prior):
        self.prior, self.num_steps, self.event_shape = prior, prior.num_steps, prior.event_shape
        parts = [affine(prior, t) for t in range(1, prior.num_steps + 1)]
        self.steps = [(slope.diag(), b, v.diag().sqrt()) for slope, b, v in parts]

    def initial(self, **context):
        return self.prior.initial()

    def evaluate(self, x, t, **context):
        return {}

    def kernel(self, x, t, evaluation=None, **context):
        slope, offset, scale = self.steps[t - 1]
        law = dist.Normal(slope * x + offset, scale.expand(x.shape)).to_event(1)
        return Kernel(law, dist.Delta(x, event_dim=1))

    def signal(self, t):
        return self.prior.signal(t)


def chain(dim=1):
    denoiser = GaussianDenoiser(torch.linspace(0.5, -0.3, dim), torch.linspace(1.4, 0.6, dim))
    schedule = VariancePreserving(BETAS)
    return Light(Diffusion(denoiser, schedule, num_steps=3, variance="large"))


def optim(settings=FADING):
    return pyro.optim.ClippedAdam(dict(settings, clip_norm=1e9))


class Exact(nn.Module):
    """log Z as it is; its parameter lets it be trained away from there."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(value).double())

    def forward(self, *args):
        return self.value


# ----------------------------------------------------------------- the posterior has no residual


class Doob(Process):
    r"""The posterior chain of a linear-Gaussian one that saw N(y; H x_0, R).

    It is tilted by :math:`h_t = \exp(-x^\top \Lambda x / 2 + \eta^\top x + \zeta)`.

    ``shift`` is what one can train, and zero at the posterior.
    """

    def __init__(self, prior, operator, noise, y):
        self.prior, self.num_steps, self.event_shape = prior, prior.num_steps, prior.event_shape
        precision = operator.T @ noise.inverse()
        self.h = [(precision @ operator, precision @ y)]
        zeta = -0.5 * (y @ noise.inverse() @ y + (2 * math.pi * noise).logdet())
        self.steps = []
        for t in range(1, self.num_steps + 1):
            slope, offset, spread = affine(prior, t)
            zeta = self._back(slope, offset, spread, zeta)
        start = prior.initial()
        eye = torch.zeros(len(start.mean), len(start.mean)).double()
        self.log_z = float(self._back(eye, start.mean, covariance(start, len(start.mean)), zeta))

    def _back(self, slope, offset, spread, zeta):
        curve, tilt = self.h[-1]
        eye = torch.eye(len(offset)).double()
        gain = (eye + spread @ curve).inverse()
        inner = curve @ gain
        self.steps.append((gain @ slope, gain @ (offset + spread @ tilt), gain @ spread))
        self.h.append((slope.T @ inner @ slope, slope.T @ gain.T @ (tilt - curve @ offset)))
        zeta = zeta - 0.5 * (eye + spread @ curve).logdet() - 0.5 * offset @ inner @ offset
        return zeta + tilt @ gain @ offset + 0.5 * tilt @ gain @ spread @ tilt

    def _law(self, x, k):
        slope, offset, spread = self.steps[k]
        mean = x @ slope.T + offset + pyro.param("shift", torch.zeros(()))
        spread = 0.5 * (spread + spread.T)
        if len(spread) == 1:
            return dist.Normal(mean, spread[0, 0].sqrt()).to_event(1)
        return dist.MultivariateNormal(mean, spread)

    def initial(self, **context):
        return self._law(torch.zeros(self.event_shape), self.num_steps)

    def evaluate(self, x, t, **context):
        return {}

    def kernel(self, x, t, evaluation=None, **context):
        return Kernel(self._law(x, t - 1), dist.Delta(x, event_dim=1))

    def signal(self, t):
        return self.prior.signal(t)


def linear(prior, operator, noise, y):
    def model():
        x = prior("x")
        law = dist.MultivariateNormal(x @ operator.T, noise)
        pyro.sample("y", law, obs=y)

    return model


ONE = tuple(torch.tensor(v, dtype=torch.float64) for v in ([[1.3]], [[0.4]], [1.1]))
TWO = tuple(torch.tensor(v, dtype=torch.float64) for v in ([[1.0, -0.5]], [[0.2]], [0.7]))
DATA = torch.linspace(-3, 3, 11).double()[:, None]
SOURCES = {
    "on-policy": OnPolicy(),
    "prior": PriorPaths(),
    "noised": Noised(DATA),
    "back and forth": BackAndForth(DATA, 0.67),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("evidence", ["vargrad", "exact"])
@pytest.mark.parametrize("observation", [ONE, TWO], ids=["one", "two"])
def test_residual_vanishes_at_the_posterior(observation, evidence, source):
    prior = chain(observation[0].shape[1])
    posterior = Doob(prior, *observation)
    behaviour = SOURCES[source]
    if isinstance(behaviour, Noised | BackAndForth):
        data = behaviour.terminals.expand(-1, observation[0].shape[1])
        behaviour = type(behaviour)(data, *([0.67] if isinstance(behaviour, BackAndForth) else []))
    rtb = RelativeTrajectoryBalance(
        linear(prior, *observation),
        lambda: posterior("x"),
        optim(STILL),
        evidence="vargrad" if evidence == "vargrad" else Exact(posterior.log_z),
        behaviours=[behaviour],
        num_particles=40,
    )
    assert rtb.step() < 1e-20
    if source != "back and forth":
        assert rtb.history[-1].spread < 1e-10
        assert abs(rtb.history[-1].mean - posterior.log_z) < 1e-10


def test_evidence_of_the_chain_is_the_closed_form():
    posterior = Doob(chain(), *ONE)
    mean, spread = moments(chain())
    law = dist.Normal(1.3 * mean[0], (1.3**2 * spread[0, 0] + 0.4).sqrt())
    assert abs(posterior.log_z - float(law.log_prob(ONE[2][0]))) < 1e-12


class Table(dist.TorchDistribution):
    """Any law over a few token vectors, such as the exact tilted transition of a masked chain."""

    arg_constraints = {}

    def __init__(self, states, logits):
        self.states, self.law = states, dist.Categorical(logits=logits)
        super().__init__(logits.shape[:-1], states.shape[1:], validate_args=False)

    @property
    def mean(self):
        return self.states[self.law.sample()]

    def expand(self, batch):
        return Table(self.states, self.law.logits.expand(*batch, -1))

    def sample(self, shape=()):
        return self.states[self.law.sample(shape)]

    def log_prob(self, x):
        index = (x[..., None, :] == self.states).all(-1).int().argmax(-1)
        return self.law.log_prob(index)


class Tilted(Process):
    """A masked chain tilted by h, by enumeration: tokens revealed together may depend."""

    def __init__(self, prior, log_reward):
        self.prior, self.num_steps, self.event_shape = prior, prior.num_steps, prior.event_shape
        pairs = itertools.product(range(prior.mask + 1), repeat=2)
        self.states = torch.tensor(list(pairs))
        whole = (self.states < prior.mask).all(-1)
        self.log_h = [torch.where(whole, log_reward(self.states), -torch.inf)]
        self.log_steps = []
        for t in range(1, prior.num_steps + 1):
            law = prior.kernel(self.states, t).law
            steps = torch.stack([law.log_prob(s.expand_as(self.states)) for s in self.states], -1)
            self.log_steps.append(steps)
            self.log_h.append((steps + self.log_h[-1]).logsumexp(-1))
        self.log_z = float(self.log_h[-1][-1])

    def initial(self, **context):
        return self.prior.initial()

    def evaluate(self, x, t, **context):
        return {}

    def kernel(self, x, t, evaluation=None, **context):
        rows = (x[..., None, :] == self.states).all(-1).int().argmax(-1)
        bias = pyro.param("bias", torch.zeros(len(self.states)))
        logits = (self.log_steps[t - 1] + self.log_h[t - 1])[rows] + bias
        return Kernel(Table(self.states, logits), dist.Delta(x, event_dim=1))


@pytest.mark.parametrize("source", ["on-policy", "prior", "noised", "back and forth"])
def test_residual_vanishes_at_the_posterior_of_a_masked_chain(source):
    torch.manual_seed(1)
    prior = MaskedDiffusion(EnumeratedDenoiser(torch.rand(3, 3)), 2, 3, num_steps=3)

    def log_reward(x):
        return 1.5 * (x[..., 0] == x[..., 1]) - 0.4 * x[..., 0].double()

    def model():
        pyro.factor("reward", log_reward(prior("x")))

    posterior = Tilted(prior, log_reward)
    tokens = torch.randint(3, (20, 2))
    sources = {**SOURCES, "noised": Noised(tokens), "back and forth": BackAndForth(tokens)}
    rtb = RelativeTrajectoryBalance(
        model,
        lambda: posterior("x"),
        optim(STILL),
        evidence=Exact(posterior.log_z),
        behaviours=[sources[source]],
        num_particles=60,
    )
    assert rtb.step() < 1e-20


def test_guides_start_at_the_prior():
    """There the residual is log Z - log gamma."""
    model, guide = linear(chain(), *ONE), trainable(chain())
    rtb = RelativeTrajectoryBalance(model, guide, optim(STILL), evidence=Exact(0.0))
    torch.manual_seed(3)
    loss = rtb.step()
    pair = rtb.pair
    torch.manual_seed(3)
    walked = pair.walk(Plan(3, lambda q, p: p), 64, ())
    seen, _ = pair.log_likelihood(walked)
    assert walked.log_ratio.abs().max() == 0.0
    assert loss == pytest.approx(float(0.5 * seen.square().mean()), rel=1e-14)


# ------------------------------------------------------------------------------------- floors


class Affine(nn.Module):
    """u_t = a_t x + b_t, which is all that a linear-Gaussian posterior needs."""

    def __init__(self, steps=3):
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.zeros(steps + 1)) for _ in range(2))

    def forward(self, x, t, denoised, **context):
        return self.slope[t] * x + self.offset[t]


def trainable(prior, start=True, scale=True):
    initial = LearnedStart(prior) if start else None
    guide = Controlled(prior, Affine(), initial, LearnedScale(3) if scale else None)
    return lambda *args: guide("x")


def evaluate(model, guide, number=20_000):
    """The mean and the variance of on-policy log-weights."""
    rtb = RelativeTrajectoryBalance(model, guide, optim(STILL), num_particles=number)
    rtb.step()
    return rtb.history[-1].mean, rtb.history[-1].spread ** 2


def assert_moments(found, mean, variance, number=20_000):
    assert abs(found[0] - mean) < BOUND * (variance / number) ** 0.5
    assert found[1] == pytest.approx(variance, rel=0.1)  # the spread of a sample variance is .01


def test_a_fixed_start_leaves_the_variance_of_log_h():
    """Exponential-linear reward: h_T = exp(a_T x), and log Z falls short by half of it."""
    prior, tilt = chain(), torch.tensor(1.0)

    def model():
        pyro.factor("reward", tilt * prior("x")[..., 0])

    slope = 1.0
    for t in (1, 2, 3):
        slope = slope * float(affine(prior, t)[0])
    mean, spread = moments(prior)
    log_z = float(mean + 0.5 * spread)
    guide = trainable(prior, start=False, scale=False)
    options = {"num_particles": 128, "evidence_rate": 0.02}
    rtb = RelativeTrajectoryBalance(model, guide, optim(), **options)
    rtb.run(num_updates=150)
    floor = slope**2
    assert_moments(evaluate(model, guide), log_z - 0.5 * floor, floor)
    assert float(rtb.log_evidence) == pytest.approx(log_z - 0.5 * floor, abs=0.04)
    assert rtb.history[-1].loss == pytest.approx(0.5 * floor, rel=0.5)  # 128 trajectories


def test_fixed_variances_leave_their_mismatch():
    """Gaussian likelihood: sum D - 1 - log D over two, and the spread is sum (D - 1)^2 / 2."""
    prior = chain()
    model, guide = linear(prior, *ONE), trainable(prior, scale=False)
    posterior = Doob(prior, *ONE)
    ratios = [float(affine(prior, t)[2] / posterior.steps[t - 1][2]) for t in (1, 2, 3)]
    gap = 0.5 * sum(d - 1 - math.log(d) for d in ratios)
    spread = 0.5 * sum((d - 1) ** 2 for d in ratios)
    assert gap > 0.05
    rtb = RelativeTrajectoryBalance(model, guide, optim(), num_particles=128)
    rtb.run(num_updates=200)
    assert_moments(evaluate(model, guide), posterior.log_z - gap, spread)


@pytest.mark.parametrize(
    "behaviour", [OnPolicy(), Inflated(LinearRamp(1.3, 1.0, 200))], ids=["on-policy", "inflated"]
)
def test_learned_start_and_variances_reach_the_posterior(behaviour):
    prior = chain()
    model, guide = linear(prior, *ONE), trainable(prior)
    posterior = Doob(prior, *ONE)
    rtb = RelativeTrajectoryBalance(
        model, guide, optim(), behaviours=[behaviour], num_particles=64, evidence_rate=0.05
    )
    rtb.run(num_updates=220)
    assert rtb.history[-1].spread < 0.03
    assert float(rtb.log_evidence) == pytest.approx(posterior.log_z, abs=0.01)
    corrected = SMC(model, guide, num_particles=200, ess_threshold=0.0).run()
    assert corrected.particles.ess > 199
    assert float(corrected.log_evidence) == pytest.approx(posterior.log_z, abs=0.01)


# ----------------------------------------------------------------------------------- gradients


class Biases(nn.Module):
    def __init__(self):
        super().__init__()
        noise = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(5))
        self.table = nn.Parameter(0.3 * noise.double())

    def forward(self, x, t, denoised):
        return self.table[t].expand(*x.shape, 3)


@pytest.fixture
def tokens():
    """A masked chain of two tokens of two kinds and two steps, its guide, and all its paths."""
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]])
    prior = MaskedDiffusion(EnumeratedDenoiser(joint), 2, 2, num_steps=2)
    guide = Controlled(prior, Biases())

    def model():
        x = prior("x")
        pyro.factor("reward", 1.0 * (x[..., 0] == x[..., 1]) - 0.5 * x[..., 1])

    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))
    paths = [(a, b) for a in pairs for b in pairs if b.max() < 2 and ((a == 2) | (a == b)).all()]
    one, zero = (torch.stack(x) for x in zip(*paths, strict=True))
    given = {2: {"x": torch.full_like(one, 2)}, 1: {"x": one}, 0: {"x": zero}}
    return model, lambda: guide("x"), guide, prior, given


def divergence(pair, prior, given):
    """KL(q | posterior) over all paths; the paths' q, and their log-weights with a graph."""
    x = [given[t]["x"] for t in (2, 1, 0)]
    log_p = prior.kernel(x[0], 2).law.log_prob(x[1]) + prior.kernel(x[1], 1).law.log_prob(x[2])
    walked = pair.walk(Plan(2, lambda q, p: q, given), len(log_p), [1, 2])
    ratio = walked.ratios[1] + walked.ratios[2]
    log_gamma = pair.log_likelihood(walked)[0]
    log_z = (log_p + log_gamma).logsumexp(0)
    q = (log_p + ratio).exp()
    assert abs(float(q.detach().sum()) - 1) < 1e-12
    return (q * (ratio - log_gamma + log_z)).sum(), q, ratio, log_gamma


def test_on_policy_gradient_is_that_of_the_divergence(tokens):
    """E_q[delta grad log q] for any log Z, by enumeration, against finite differences."""
    model, guide, process, prior, given = tokens
    pair = Pair(model, guide, (), {})
    _, q, ratio, log_gamma = divergence(pair, prior, given)
    for log_z in (0.0, 3.0):
        table = process.control.table
        weights = (q * (log_z + ratio - log_gamma)).detach()
        (gradient,) = torch.autograd.grad((weights * ratio).sum(), table, retain_graph=True)
        for index in [(2, 0, 1), (1, 1, 0), (2, 1, 2)]:
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    table[index] += sign * 1e-5
                    ends.append(float(divergence(pair, prior, given)[0].detach()))
                    table[index] -= sign * 1e-5
            assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


def gradient_of(model, guide, parameter, seed=0, steps=None, **options):
    torch.manual_seed(seed)
    rtb = RelativeTrajectoryBalance(model, guide, optim(STILL), **options)
    if steps is not None:
        rtb._steps = lambda begin: steps
    parameter.grad = None
    loss = rtb.loss_and_grads()
    return parameter.grad.clone(), loss


def test_batches_estimate_the_gradient_of_the_divergence(tokens):
    model, guide, process, prior, given = tokens
    table = process.control.table
    value = divergence(Pair(model, guide, (), {}), prior, given)[0]
    (truth,) = torch.autograd.grad(value, table)
    for settings, factor in [
        ({"evidence": Exact(0.3)}, 1.0),
        ({"evidence": "vargrad"}, 1 - 1 / 32),
    ]:
        rtb = RelativeTrajectoryBalance(model, guide, optim(STILL), num_particles=32, **settings)
        found = []
        for _ in range(60):
            table.grad = None
            rtb.loss_and_grads()
            found.append(table.grad.clone())
        found = torch.stack(found)
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - factor * truth).abs() <= BOUND * error + 1e-12).all()


def test_importance_weights_make_prior_paths_on_policy(tokens):
    """The policy gradient from the prior's own paths (self-normalised: many of them)."""
    model, guide, process, prior, given = tokens
    table = process.control.table
    value = divergence(Pair(model, guide, (), {}), prior, given)[0]
    (truth,) = torch.autograd.grad(value, table)
    found, _ = gradient_of(
        model,
        guide,
        table,
        evidence="vargrad",
        behaviours=[PriorPaths()],
        loss=ResidualLoss(importance=1.0),
        num_particles=40_000,
    )
    assert (found - truth).abs().max() < 0.03 * truth.abs().max()


def test_vargrad_is_the_best_log_z_of_the_batch(tokens):
    model, guide, process, *_ = tokens
    one = gradient_of(model, guide, process.control.table, evidence="vargrad")
    torch.manual_seed(0)
    probe = RelativeTrajectoryBalance(model, guide, optim(STILL))
    probe.step()
    best = Exact(probe.history[0].mean)
    two = gradient_of(model, guide, process.control.table, evidence=best)
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-13)
    assert one[1] == pytest.approx(two[1], abs=1e-13)
    assert abs(float(best.value.grad)) < 1e-13


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_two_passes_give_the_gradient_of_one(chunk):
    model, prior = linear(chain(), *ONE), chain()
    for evidence in ("vargrad", Exact(0.4)):
        guide = Controlled(prior, Affine(), LearnedStart(prior), LearnedScale(3))
        for parameter in (guide.control.slope, guide.scale.log_scale, guide._initial.shift):
            call = [lambda guide=guide: guide("x"), parameter]
            pyro.clear_param_store()
            direct, loss = gradient_of(model, *call, evidence=evidence)
            again, same = gradient_of(model, *call, evidence=evidence, chunk_steps=chunk)
            assert direct.abs().max() > 0.01
            torch.testing.assert_close(again, direct, rtol=0, atol=1e-10)
            assert loss == same


def test_subsampled_steps_are_unbiased():
    """The mean over all choices of one step is the gradient, with the residual of all steps."""
    model, prior = linear(chain(), *ONE), chain()
    guide = Controlled(prior, Affine())
    call = [lambda: guide("x"), guide.control.slope]
    for chunk in (None, 1):
        whole, loss = gradient_of(model, *call, chunk_steps=chunk)
        parts = [gradient_of(model, *call, chunk_steps=chunk, steps=[t]) for t in (1, 2, 3)]
        assert {part[1] for part in parts} == {loss}
        mean = torch.stack([part[0] for part in parts]).mean(0)
        torch.testing.assert_close(mean, whole, rtol=0, atol=1e-12)


def test_subsample_draws_that_many_steps():
    guide = Controlled(chain(), Affine())
    rtb = RelativeTrajectoryBalance(linear(chain(), *ONE), lambda: guide("x"), optim(), subsample=2)
    rtb.loss_and_grads()
    assert int((guide.control.slope.grad != 0).sum()) == 2
