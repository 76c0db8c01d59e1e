"""Learned look-aheads at whole strings: against an enumerated chain, and a Markov chain."""

import pyro
import pytest
import torch
from torch import nn

from smcdiff import Program
from smcdiff.inference import (
    SMC,
    FromKernel,
    NestedProposal,
    RelaxedLikelihood,
    StringTwist,
    TrustRegionTwistedSMC,
)
from smcdiff.inference.descent import Descent
from smcdiff.inference.evaluation import Evaluator
from smcdiff.inference.learned import Paths
from smcdiff.inference.learned_strings import StringNetwork
from smcdiff.models import MarkovDenoiser, MaskedDiffusion, contains

from .checks import BOUND, finish, z_of_evidence, z_of_mean
from .test_masked import FINAL, LOG_Z, MASK, OPTIMAL, REWARDS, index, model
from .test_trust_region_tokens import all_paths, log_prior


class Lookup(nn.Module):
    """Biases and a scalar for every time and state of the enumerated chain."""

    def __init__(self, vocabulary):
        super().__init__()
        self.biases = nn.Embedding(4 * 64, 3 * vocabulary, dtype=torch.float64)
        self.scalars = nn.Embedding(4 * 64, 1, dtype=torch.float64)
        for table in (self.biases, self.scalars):
            nn.init.zeros_(table.weight)

    def forward(self, tokens, time, denoised):
        row = 64 * round(3 * time) + index(tokens)
        return self.biases(row).reshape(denoised.shape), self.scalars(row)[:, 0]


def recorded(twist):
    """All paths of the chain, with the weights of the target."""
    program = Program(model)
    twist.prepare(program)
    evaluator = Evaluator(program, twist, twist)
    states, times = all_paths(), (3, 2, 1, 0)
    looks = [evaluator.look(t, {"x": x}, {}, {}, None) for t, x in zip(times, states, strict=True)]
    zero, log_p = torch.zeros(len(states[0])).double(), log_prior(states)
    x = tuple({"x": state} for state in states)
    paths = Paths(evaluator, x, tuple(looks), (zero,) * 4, zero, log_p)
    return paths, (log_p + FINAL[index(states[-1])].log()).softmax(0)


@pytest.fixture(scope="module", params=["alone", "on another"])
def fitted(request):
    base = None if request.param == "alone" else RelaxedLikelihood(double_rewards)
    twist = StringTwist(base, Lookup, 0.0, 0.0, Descent(300, None, None, 0.3))
    paths, weights = recorded(twist)
    twist.fit(paths, weights)
    return twist, paths, weights


def double_rewards(probabilities):
    """A look-ahead that is wrong."""
    return 2.0 * probabilities["x"][:, 0, 1]


def test_it_starts_at_the_prior():
    twist = StringTwist()
    paths, _ = recorded(twist)
    assert float(twist.log_ratios(paths).abs().max()) < 1e-6  # float32 probabilities
    assert not any(bool(cache["log_psi"].any()) for cache in paths.caches[:-1])


def test_the_scalar_learns_the_exact_twist(fitted):
    """Up to a constant at every time, whatever it started from."""
    twist, paths, _ = fitted
    again, _ = recorded(twist)
    for t, states, cache in zip((3, 2, 1), paths.x, again.caches, strict=False):
        apart = cache["log_psi"] - OPTIMAL[t][index(states["x"])].log()
        assert float(apart.max() - apart.min()) < 1e-3


def test_the_biases_learn_the_posterior_of_every_token(fitted):
    """pi(x_0^l = v | x_t), by enumeration of the paths."""
    twist, paths, weights = fitted
    for draw in list(paths.draws())[1:]:
        step = twist._step("x", draw, paths.x[-1]["x"])
        bias, _ = twist._output("x", draw.s + 1, step.before, step.denoised)
        learned = (step.log_p + step.given + bias).softmax(-1)
        row = index(step.before)
        for state in row.unique():
            same = row == state
            for position in (step.before[same][0] == MASK).nonzero()[:, 0]:
                hits = nn.functional.one_hot(step.tokens[same, position], 3)
                law = weights[same] @ hits.double() / weights[same].sum()
                torch.testing.assert_close(learned[same][0, position], law, rtol=0, atol=1e-3)


# ----------------------------------------------------------------------- on chains of letters

LENGTH, VOCABULARY = 6, 5
PATTERN = torch.tensor([3, 1])


def letters():
    stream = torch.Generator().manual_seed(1)
    rows = torch.randn(VOCABULARY + 1, VOCABULARY, generator=stream, dtype=torch.float64)
    table = (1.5 * rows).softmax(-1)
    return MarkovDenoiser(table[0], table[1:], LENGTH)


def program(**settings):
    prior = MaskedDiffusion(letters(), LENGTH, VOCABULARY, **settings)
    reward = contains(PATTERN, VOCABULARY, 3.0)

    def run():
        pyro.factor("reward", reward(prior("x")))

    return run


SHORT = Descent(60, 128, None, 2e-2)
EVEN = {"num_steps": LENGTH, "reveal": "even"}
POSTERIOR = letters().tilted(contains(PATTERN, VOCABULARY, 3.0))


def bent(vocabulary):
    """A network that has learned something wrong."""
    torch.manual_seed(0)
    network = StringNetwork(vocabulary, 8, 1)
    for last in (network.bias, network.scalar):
        nn.init.normal_(last.weight, std=0.2)
    return network


@pytest.mark.parametrize(
    "proposal",
    [None, FromKernel(), NestedProposal(3), "nested itself"],
    ids=["itself", "kernel", "nested", "nested itself"],
)
def test_any_network_gives_the_right_answer(proposal):
    twist = StringTwist(build=bent)
    proposal = NestedProposal(3, twist) if proposal == "nested itself" else proposal or twist
    last = finish(
        SMC(program(**EVEN), twist=twist, proposal=proposal, num_particles=8, num_runs=500)
    )
    truth = float(POSTERIOR.log_evidence)
    assert abs(z_of_evidence(last, truth)) < BOUND
    law = POSTERIOR(torch.full((LENGTH,), VOCABULARY)).exp()
    first = (last.x["x"][..., 0] == PATTERN[0]).double()
    assert abs(z_of_mean(last, first, float(law[0, PATTERN[0]]), truth)) < BOUND


def test_also_where_positions_are_revealed_independently():
    twist = StringTwist(build=lambda vocabulary: bent(vocabulary))
    last = finish(SMC(model, twist=twist, proposal=twist, num_particles=8, num_runs=1000))
    assert abs(z_of_evidence(last, LOG_Z)) < BOUND
    assert abs(z_of_mean(last, REWARDS[index(last.x["x"])], 2.6349944, LOG_Z)) < BOUND


def test_learning_pays():
    pyro.set_rng_seed(0)
    twist = StringTwist(build=lambda size: StringNetwork(size, 16, 1), descent=SHORT)
    options = {"num_iterations": 2, "learning_particles": 500, "ess_threshold": 0.0}
    method = TrustRegionTwistedSMC(program(**EVEN), twist, num_particles=1000, **options)
    learned = float(method.run().particles.ess)
    bootstrap = SMC(program(**EVEN), num_particles=1000, ess_threshold=0.0)
    assert learned > 2 * float(bootstrap.run().particles.ess)


def test_save_and_load(tmp_path):
    twist = StringTwist()
    twist.restore(StringTwist(build=bent).tensors())  # nothing has been learned yet
    assert not twist.networks
    learned = StringTwist(build=lambda vocabulary: bent(vocabulary).double())
    recorded(learned)
    learned.save(tmp_path / "learned")
    again = StringTwist(build=lambda vocabulary: StringNetwork(vocabulary, 8, 1).double())
    again.load(tmp_path / "learned")
    (a, _), (b, _) = recorded(learned), recorded(again)
    torch.testing.assert_close(a.caches[1]["log_psi"], b.caches[1]["log_psi"], rtol=0, atol=0)


def test_another_vocabulary_is_refused():
    twist = StringTwist(build=lambda vocabulary: bent(vocabulary))
    recorded(twist)
    with pytest.raises(ValueError, match="'x' has 5 tokens, but what was learned has 3"):
        SMC(program(**EVEN), twist=twist, proposal=twist, num_particles=4).run()


def test_a_network_of_another_shape_is_refused():
    class Narrow(Lookup):
        def forward(self, tokens, time, denoised):
            bias, scalar = super().forward(tokens, time, denoised)
            return bias[..., :2], scalar

    with pytest.raises(ValueError, match=r"StringTwist returned shapes \(729, 3, 2\) and \(729,\)"):
        recorded(StringTwist(build=Narrow))
