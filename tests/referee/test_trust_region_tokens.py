"""Learned twists on a masked chain that can be enumerated: all of its paths, and exact weights."""

import itertools

import pytest
import torch
from torch import nn

from smcdiff import Program
from smcdiff.inference import SMC, TokenTwist, TrustRegionTwistedSMC
from smcdiff.inference.descent import Descent
from smcdiff.inference.evaluation import Evaluator
from smcdiff.inference.learned import Paths

from .checks import BOUND, finish, z_of_evidence, z_of_mean, z_score
from .test_masked import (
    FINAL,
    KERNELS,
    LOG_Z,
    MASK,
    OPTIMAL,
    REWARDS,
    START,
    TOKENS,
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
    look = [evaluator.look(t, {"x": x}, {}, {}, None) for t, x in zip((3, 2, 1, 0), states)]
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
    twist = TokenTwist(pseudo_count=0.0)
    paths, weights = recorded(twist)
    twist.fit(paths, weights)
    assert family_law(twist, paths) == pytest.approx((0.40921424, 0.52911105, 1.765164), abs=1e-6)


def test_the_best_factorised_kernels():
    """What no fit of independent positions can exceed, approached from above."""
    twist = TokenTwist(Lookup(), 0.0, Descent(800, None, None, 0.1))
    paths, weights = recorded(twist)
    twist.fit(paths, weights)
    divergence, share, reward = family_law(twist, paths)
    assert 0.14796153 < divergence < 0.14796154 + 1e-5
    assert share == pytest.approx(0.75959279, abs=2e-3)
    assert reward == pytest.approx(2.320442, abs=1e-3)
