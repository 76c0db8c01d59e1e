"""Learned twists on a masked chain that can be enumerated: all of its paths, and exact weights."""

import itertools

import pyro
import pytest
import torch
from torch import nn

from smcdiff import Program
from smcdiff.inference import SMC, TokenTwist, TrustRegionTwistedSMC
from smcdiff.inference.descent import Descent
from smcdiff.inference.evaluation import Evaluator
from smcdiff.inference.learned import Paths

from .checks import BOUND, finish, z_of_evidence, z_of_mean
from .test_masked import (
    FINAL,
    KERNELS,
    LOG_Z,
    MASK,
    REWARDS,
    TOKENS,
    chain,
    index,
    model,
)


class Lookup(nn.Module):
    """A bias for every state, position and token: all factorised kernels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3 * 64, 3 * 4, dtype=torch.float64)
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens, t, denoised):
        return self.table(64 * (t - 1) + index(tokens)).reshape(-1, 3, 4)


def all_paths():
    """x_3, ..., x_0 for every time at which a position is revealed, and every token."""
    times = torch.tensor(list(itertools.product((2, 1, 0), repeat=3)))
    words = torch.tensor(list(itertools.product(range(3), repeat=3)))
    times, words = times.repeat_interleave(27, 0), words.repeat(27, 1)
    return [torch.where(times >= t, words, MASK) for t in (3, 2, 1, 0)]


def log_prior(states):
    pairs = zip((3, 2, 1), itertools.pairwise(states), strict=True)
    return sum(KERNELS[t][index(a), index(b)].log() for t, (a, b) in pairs)


def recorded(twist):
    """The paths as a sweep would have left them, with the weights of the target."""
    program = Program(model)
    twist.prepare(program)
    evaluator = Evaluator(program, twist, twist)
    states = all_paths()
    look = [
        evaluator.look(t, {"x": x}, {}, {}, None) for t, x in zip((3, 2, 1, 0), states, strict=True)
    ]
    x = tuple({"x": state} for state in states)
    zero = torch.zeros(729).double()
    paths = Paths(evaluator, x, tuple(look), (zero,) * 4, zero, zero)
    weights = (log_prior(states) + FINAL[index(states[-1])].log()).softmax(0)
    return paths, weights


def family_law(twist, paths):
    """KL(pi || Q), ESS / N and E_Q r, summed over all paths."""
    states = [step["x"] for step in paths.x]
    log_pi = (log_prior(states) + FINAL[index(states[-1])].log()).log_softmax(0)
    log_q = log_prior(states) - twist.log_ratios(paths)
    assert float(log_q.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    divergence = (log_pi.exp() * (log_pi - log_q)).sum()
    share = 1 / (2 * log_pi - log_q).logsumexp(0).exp()
    return float(divergence), float(share), float(log_q.exp() @ REWARDS[index(states[-1])])


def test_it_starts_at_the_prior():
    twist = TokenTwist(Lookup())
    paths, _ = recorded(twist)
    assert family_law(twist, paths) == pytest.approx((0.7029836997, 0.3309640, 1.1760343), abs=1e-7)


def test_the_best_table_of_biases():
    twist = TokenTwist(pseudo_count=0.0, defensive=0.0)
    paths, weights = recorded(twist)
    twist.fit(paths, weights)
    assert family_law(twist, paths) == pytest.approx((0.40921424, 0.52911105, 1.765164), abs=1e-6)


def test_the_best_factorised_kernels():
    """What no fit of independent positions can exceed, approached from above."""
    twist = TokenTwist(Lookup(), 0.0, 0.0, Descent(600, None, None, 0.1))
    paths, weights = recorded(twist)
    twist.fit(paths, weights)
    divergence, share, reward = family_law(twist, paths)
    assert 0.14796153 < divergence < 0.14796154 + 1e-5
    assert share == pytest.approx(0.75959279, abs=2e-3)
    assert reward == pytest.approx(2.320442, abs=1e-3)


# ------------------------------------------------------------------------------------- learning


def learned(twist, particles, iterations, **options):
    """Exact shares ESS / N after every iteration, and what the sweeps themselves saw."""
    pyro.set_rng_seed(0)
    paths, _ = recorded(twist)
    method = TrustRegionTwistedSMC(
        model, twist, epsilon=0.2, num_particles=particles, num_iterations=1, **options
    )
    exact, seen = [], []
    for _ in range(iterations):
        seen.append(float(method.learn()[0].ess[0]))
        exact.append(family_law(twist, paths)[1])
    return exact, seen


def test_a_table_approaches_the_best_table():
    """From above in KL: no fit exceeds the optimum of its family."""
    twist = TokenTwist()
    exact, _ = learned(twist, 4000, 5)
    paths, _ = recorded(twist)
    divergence, share, reward = family_law(twist, paths)
    assert 0.40921424 < divergence < 0.43
    assert share == pytest.approx(0.529, abs=0.03)
    assert reward == pytest.approx(1.765164, abs=0.1)
    assert exact[0] > 0.34  # already better than the prior's .331


def test_only_an_anchor_keeps_what_was_not_seen():
    """Unanchored, weights look good in the sweeps while their true variance explodes."""
    flexible = Descent(60, None, None, 0.3)
    anchored, _ = learned(TokenTwist(Lookup(), descent=flexible), 2000, 4)
    free, seen = learned(TokenTwist(Lookup(), 0.0, 0.0, flexible), 2000, 4)
    assert min(anchored) > 0.3309640  # never worse than the prior
    assert max(anchored) > 0.5  # and better than any table
    assert free[-1] < 1e-3
    assert seen[-1] > 0.45


@pytest.mark.parametrize("network", [None, Lookup])
def test_the_answer_is_right_whatever_was_learned(network):
    twist = TokenTwist(network and network(), descent=Descent(30, None, None, 0.1))
    learned(twist, 500, 2)
    method = SMC(model, twist=twist, proposal=twist, num_particles=8, num_runs=2000)
    last = finish(method)
    assert abs(z_of_evidence(last, LOG_Z)) < BOUND
    reward = REWARDS[index(last.x["x"])]
    assert abs(z_of_mean(last, reward, 2.6349944, LOG_Z)) < BOUND


def test_the_twist_is_that_of_its_kernels():
    """psi K = nu: what is prepaid is the normaliser, by enumeration."""
    twist = TokenTwist(pseudo_count=0.0, defensive=0.0)
    paths, weights = recorded(twist)
    twist.fit(paths, weights)
    for t in (2, 3):
        psi = {s: twist._log_psi(s, {"x": TOKENS}, 64).exp() for s in (t, t - 1)}
        kernel = chain().kernel(TOKENS, t)
        paid = twist.prepay(t, {"x": TOKENS}, {"x": kernel}, {})
        torch.testing.assert_close(paid.exp(), KERNELS[t] @ psi[t - 1] / psi[t])
