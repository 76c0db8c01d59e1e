"""Controls that start at zero: what they are given, and the units they speak in."""

import pyro
import pytest
import torch
from torch import nn

from smcdiff.inference import SMC
from smcdiff.models import (
    Controlled,
    Diffusion,
    GaussianDenoiser,
    Head,
    Langevin,
    MaskedDiffusion,
    Potential,
    Preconditioned,
    VariancePreserving,
)
from smcdiff.models.networks import ResidualMLP, UNet

STEPS = 8


def chain(**options):
    denoiser = GaussianDenoiser(torch.zeros(2, dtype=torch.float64), torch.eye(2).double())
    return Diffusion(denoiser, VariancePreserving(), (2,), STEPS, **options)


class Constant(nn.Module):
    """A control whose every element is one."""

    def forward(self, x, t, denoised, **context):
        return torch.ones_like(x)


def test_one_moves_the_estimate_by_one_standard_deviation():
    """Where little of x_0 is decided in a step: posterior means are linear in the estimate."""
    prior = chain(variance="small")
    control = Preconditioned(Constant(), prior)
    x = torch.randn(5, 2, dtype=torch.float64)
    for t in range(2, STEPS + 1):
        kernel, before, now = prior.kernel(x, t), prior.signal(t - 1), prior.signal(t)
        law = kernel.law
        # the mean of q(x_{t-1} | x_t, x_0) moves by this per unit of x_0
        per_unit = before.alpha * (1 - now.precision / before.precision)
        shift = control(x, t, kernel.denoised.mean) * law.stddev
        rate = (before.precision - now.precision) * now.spread
        expected = per_unit * now.spread**0.5 / (1 + rate) ** 0.5
        torch.testing.assert_close(shift, torch.full_like(shift, expected))


def test_units_are_bounded_where_a_step_decides_everything():
    control = Preconditioned(Constant(), chain(variance="large"))
    assert control.units.isfinite().all()
    assert control.units[1] == 1
    assert (control.units <= 1).all()


def test_units_need_a_signal():
    masked = MaskedDiffusion(lambda x: torch.zeros(*x.shape, 3), 2, 3, num_steps=2)
    with pytest.raises(ValueError, match="MaskedDiffusion does not say how x_t depends on x_0"):
        Preconditioned(Constant(), masked)


def test_units_are_kept_in_state_and_dtype():
    prior = chain(variance="large")
    control = Preconditioned(Head(ResidualMLP(4, 8, 1)), prior)
    u = control(torch.randn(3, 2), 2, torch.randn(3, 2))
    assert u.dtype == torch.float32
    assert u.eq(0).all()
    assert "units" in control.state_dict()


def test_a_label_reaches_the_network_by_row():
    seen = []

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs, time, label):
            seen.append(label)
            return self.layer(inputs) + label[:, None]

    head = Head(Labelled(), label="wish")
    x, wish = torch.randn(3, 5, 2), torch.arange(5)
    out = head(x, 1, x, wish=wish)
    assert seen[0].tolist() == list(range(5)) * 3
    assert torch.equal(out, wish[:, None].float().expand(3, 5, 2))
    head(x, 1, x, wish=torch.tensor(7))
    assert seen[1].tolist() == [7] * 15


def test_a_guide_for_labels_is_the_prior_before_it_learns():
    """Head, gradient and units together: zero variance against the prior's own paths."""
    torch.manual_seed(0)
    prior = Diffusion(UNet(1, (8, 8), heads=0), VariancePreserving(), (1, 4, 4), 3)

    def log_reward(x, wish):
        return -(x.mean((-1, -2, -3)) - wish).square()

    head = Head(UNet(2, (8,), num_classes=4, heads=0), 3, label="wish")
    control = Preconditioned(Langevin(head, log_reward, 3, reads=("wish",)), prior)
    process = Controlled(prior, control, reads=("wish",))

    def model(wish):
        prior("x")

    def guide(wish):
        process("x", wish=wish)

    pyro.set_rng_seed(0)
    posterior = SMC(model, guide=guide, num_particles=6).run(torch.tensor(2))
    assert posterior.log_weights.std() == 0
    assert posterior.log_evidence.item() == 0


def test_langevin_follows_the_gradient_of_its_own_label():
    control = Langevin(
        Head(ResidualMLP(4, 8, 1)),
        lambda x, wish: x.sum(-1) * wish,
        3,
        clip=1.5,
        reads=("wish",),
    )
    nn.init.constant_(control.gain, 2.0)
    x = torch.randn(3, 2)
    u = control(x, 1, x, wish=torch.tensor([-1.0, 0.5, 9.0]))
    assert torch.allclose(u, torch.tensor([[-2.0], [1.0], [3.0]]).expand(3, 2))


def test_a_gain_may_be_a_control_of_its_own():
    class PerLabel(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x, t, denoised, wish):
            return self.table[t, wish][..., None]

    gain = PerLabel()
    head = Head(ResidualMLP(4, 8, 1))
    control = Langevin(head, lambda x, wish: x.sum(-1), 3, reads=("wish",), gain=gain)
    x, wish = torch.randn(2, 2), torch.tensor([0, 2])
    assert control(x, 1, x, wish=wish).eq(0).all()
    gain.table.data[1] = torch.tensor([3.0, 4.0, 5.0])
    assert torch.equal(control(x, 1, x, wish=wish), torch.tensor([[3.0, 3.0], [5.0, 5.0]]))


class LogEvidence(nn.Module):
    """log p(y | x_t) for y = x_0 + noise in two dimensions and x_0 from N(0, 1)."""

    def __init__(self, prior, y, variance):
        super().__init__()
        self.prior, self.y, self.variance = prior, y, variance
        self.nothing = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, x, time):
        signal = self.prior.signal(int(time[0]))
        off = self.y - signal.alpha * x  # the mean of x_0 is alpha x, its variance sigma^2
        log = -off.square().sum(-1) / (2 * (signal.sigma**2 + self.variance))
        return log + self.nothing(x)[..., 0]


def test_the_exact_potential_has_the_means_of_the_posterior():
    prior = chain(variance="large")  # which is right for data of unit variance
    y, variance = torch.tensor([1.5, -0.5], dtype=torch.float64), 0.3
    ratio = 1 / (1 + variance)
    denoiser = GaussianDenoiser(ratio * y, ratio * variance * torch.eye(2).double())
    posterior = Diffusion(denoiser, VariancePreserving(), (2,), STEPS, variance="exact")
    guide = Controlled(prior, Potential(LogEvidence(prior, y, variance), prior))
    x = torch.randn(5, 2, dtype=torch.float64)
    for t in range(1, STEPS + 1):
        found, wanted = guide.kernel(x, t).law.mean, posterior.kernel(x, t).law.mean
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


class Wishes(nn.Module):
    """A potential of four labels."""

    def __init__(self):
        super().__init__()
        self.body = ResidualMLP(2, 8, 1).double()
        self.last = nn.Linear(2, 4, dtype=torch.float64)

    def forward(self, x, time, label):
        hidden = self.body(x, time) + x.square()
        return self.last(hidden).gather(-1, label[:, None])


def test_a_potential_starts_at_the_prior_and_reads_labels():
    prior = chain(variance="large")
    control = Potential(Wishes(), prior, label="wish")
    x, wish = torch.randn(3, 4, 2, dtype=torch.float64), torch.arange(4)
    assert control(x, 3, x, wish=wish).eq(0).all()
    nn.init.normal_(control.network.last.weight)
    u = control(x, 3, x, wish=wish)
    for each in range(4):
        torch.testing.assert_close(u[:, each], control(x[:, each], 3, x[:, each], wish=wish[each]))
    shifted = control.value(x + 1e-6, 3, wish=wish) - control.value(x, 3, wish=wish)
    expected = 1e-6 * (u / control.factors[3]).sum(-1)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-11)


def test_a_potential_learns_and_is_differentiable_in_the_state():
    control = Potential(Wishes(), chain(variance="large"), label="wish")
    nn.init.normal_(control.network.last.weight)
    x, wish = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.arange(4)
    assert torch.autograd.gradcheck(lambda v: control(v, 2, v, wish=wish), x)
    control(x.detach(), 2, x, wish=wish).square().sum().backward()
    gradients = [p.grad for p in control.network.last.parameters()]
    assert gradients[0].abs().sum() > 0
    with torch.no_grad():
        assert not control(x, 2, x, wish=wish).requires_grad


def test_a_potential_is_one_number_per_row():
    prior = chain(variance="large")
    control = Potential(Two(), prior)
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one number per row, but for 3 rows .* \(3, 2\)"):
        control(x, 1, x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x, time):
        return self.layer(x)
