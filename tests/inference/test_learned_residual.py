"""Residuals in few directions, and descent that is judged on paths that it does not see."""

import pyro
import pytest
import torch

from smcdiff.inference import DenoisedLikelihood, ResidualTwist, TrustRegionTwistedSMC
from smcdiff.inference.descent import Descent
from smcdiff.inference.learned_head import ResidualHead
from smcdiff.inference.learned_residual import Misfits
from smcdiff.inference.linear_gaussian import Covariance, LocalTwist
from smcdiff.inference.steered import Steered
from smcdiff.models import Diffusion, LogSNR, MixtureDenoiser

QUICK = Descent(steps=60, batch=64, times=3)
few = pytest.mark.filterwarnings("ignore:.* has more parameters than")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def two_modes(size=30):
    """Two far modes on the first axis, and a reward that wants the rarer one."""
    means = torch.zeros(2, size, dtype=torch.float64)
    means[:, 0] = torch.tensor([-4.0, 4.0])
    denoiser = MixtureDenoiser(means, 1.0, torch.tensor([0.8, 0.2], dtype=torch.float64))
    process = Diffusion(denoiser, LogSNR(2.0, -8.0), num_steps=8, variance="exact")

    def model():
        pyro.factor("reward", 2.0 * process("x")[..., 0].clamp(-4, 4))

    return model


def learned(descent=QUICK, rank=1, base=None, iterations=3):
    twist = ResidualTwist(base, rank=rank, width=16, descent=descent)
    made = TrustRegionTwistedSMC(
        two_modes(), twist, epsilon=1.0, num_iterations=iterations, num_particles=150, good_ess=1.0
    )
    made.learn()
    return made


# ------------------------------------------------------------------------------ few directions


@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_draw_is_scored_the_same_within_a_basis(curved, rank):
    torch.manual_seed(0)
    root = normal(7, 2, 2)
    local = LocalTwist(normal(7, 5))
    if curved:
        local = LocalTwist(normal(7, 5), normal(7, 2, 5), root @ root.mT + torch.eye(2))
    factor = normal(7, 5, rank) if rank else None
    covariance = Covariance(normal(7 if rank else 1, 5).exp(), factor)
    recorded, c = Steered(normal(7, 5), covariance, local), normal(7, 3)
    basis = torch.linalg.qr(normal(5, 3)).Q
    within, rows = recorded.within(basis), torch.tensor([4, 1])
    expected = recorded.log_ratio(c @ basis.mT)
    torch.testing.assert_close(within.log_ratio(c), expected)
    torch.testing.assert_close(within.take(rows).log_ratio(c[rows]), expected[rows])


@few
def test_the_directions_that_matter_are_found():
    """Where modes are far apart, the estimates lie on the line between them."""
    pyro.set_rng_seed(0)
    narrow, full = learned(), learned(rank=30)
    basis = narrow.learned.network.basis
    assert basis.shape == (30, 1)
    assert float(basis[0].abs()) > 0.98
    shares = [float(made.iterations[-1].ess) for made in (narrow, full)]
    assert shares[0] > 1.5 * shares[1]


@few
def test_a_rank_is_saved(tmp_path):
    pyro.set_rng_seed(0)
    made = learned(iterations=1).learned
    made.save(tmp_path / "learned")
    again = ResidualTwist(width=16)
    again.load(tmp_path / "learned")
    assert again.tensors().keys() == made.tensors().keys()
    inputs, time = normal(5, 90).to(again.network.centre), torch.full((5,), 0.5)
    with torch.no_grad():
        out = again.network(inputs, time)
        assert out.shape == (5, 31)
        assert out.equal(made.network(inputs, time))


@few
def test_a_rank_that_is_no_restriction():
    made = learned(rank=50, iterations=1)
    assert made.learned.network.basis is None


def test_no_rank_at_all():
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        ResidualTwist(rank=0)


# ------------------------------------------------------------------------------- u and h apart


def test_direction_and_value_share_no_weights():
    """The misfits of h are large, and Adam would spend its steps on them."""
    torch.manual_seed(0)
    head = ResidualHead(size=3, context=0, width=8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    out = head(torch.randn(5, 9), torch.full((5,), 0.5))
    assert out.shape == (5, 4)
    for part, other in ((head.direction, out[:, -1]), (head.value, out[:, :-1])):
        parameters = list(part.parameters())
        slopes = torch.autograd.grad(other.sum(), parameters, retain_graph=True)
        assert not any(bool(slope.any()) for slope in slopes)


@pytest.mark.parametrize("curved", [True, False])
def test_all_times_at_once_are_each_time_alone(curved):
    torch.manual_seed(0)
    basis, share, weights = torch.eye(3).double(), normal(6).exp(), normal(3, 4)

    def output(inputs, times):
        out = inputs @ weights * times[:, None]
        return out[:, :-1], out[:, -1]

    def part(t):
        local = LocalTwist(normal(6, 3))
        if curved:
            local = LocalTwist(normal(6, 3), normal(6, 2, 3), torch.eye(2).double()[None])
        recorded = Steered(normal(6, 3), Covariance(normal(1, 3).exp()), local).within(basis)
        times = torch.full((6,), float(t), dtype=torch.float64)
        return Misfits(output, share, 0.9, normal(6, 3), times, normal(6), recorded, basis)

    parts = [part(t) for t in (3, 2, 1)]
    joined, rows = Misfits.join(parts), torch.tensor([[0, 5], [2, 2]])
    assert len(joined) == 3
    expected = torch.stack([parts[2].alone(rows[0]), parts[0].alone(rows[1])])
    torch.testing.assert_close(joined(rows, torch.tensor([2, 0])), expected)


# ----------------------------------------------------------------------------------- held out


def each_row_alone(descent, weights, seed=0):
    """One parameter per row: what is learned of some rows says nothing of the others."""
    torch.manual_seed(seed)
    table, wanted = torch.zeros(20, dtype=torch.float64, requires_grad=True), normal(20)
    descent.minimise([table], [lambda rows: (table[rows] - wanted[rows]) ** 2], weights)
    return table.detach()


def test_what_others_do_not_confirm_is_not_kept():
    even = torch.full((20,), 0.05, dtype=torch.float64)
    assert bool(each_row_alone(Descent(30, 8, None, 0.1), even).any())
    assert not bool(each_row_alone(Descent(30, 8, None, 0.1, held_out=0.3), even).any())


def test_what_others_confirm_is_kept():
    torch.manual_seed(0)
    mean, rows = torch.zeros(1, dtype=torch.float64, requires_grad=True), normal(200) + 3.0
    even = torch.full((200,), 1 / 200, dtype=torch.float64)
    descent = Descent(200, 64, None, 0.1, held_out=0.25)
    descent.minimise([mean], [lambda k: (mean - rows[k]) ** 2], even)
    assert float(mean.detach()) == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_one_path_with_all_the_weight(seed):
    """Held out, it leaves nothing to learn from; else nothing to judge by."""
    one = torch.zeros(20, dtype=torch.float64)
    one[3] = 1.0
    found = each_row_alone(Descent(30, 8, None, 0.1, held_out=0.5), one, seed)
    assert not bool(found.any())


@few
def test_paths_held_out_protect_a_good_look_ahead():
    """Of a hundred and fifty paths in thirty dimensions, a full network learns noise."""
    found = {}
    for share in (0.0, 0.25):
        pyro.set_rng_seed(0)
        descent = Descent(steps=150, batch=64, times=3, learning_rate=1e-2, held_out=share)
        made = learned(descent, None, DenoisedLikelihood(), iterations=2)
        found[share] = float(made.iterations[-1].ess)
    assert found[0.25] > 1.2 * found[0.0]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_held_out_is_a_share(share):
    with pytest.raises(ValueError, match="held_out is a share of the paths"):
        Descent(held_out=share)
