"""Schedules against closed forms and against the formulas of the libraries that train networks."""

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from smcdiff.models import (
    EDM,
    ContinuousSchedule,
    Cosine,
    FromAlphas,
    Grid,
    Interpolant,
    LogSNR,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    Schedule,
    SubVariancePreserving,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
)
from smcdiff.models.spacings import IndexSpacing, NoiseSpacing, kept_indices

BETAS = (0.05, 0.10, 0.20, 0.35, 0.50)

SCHEDULES: dict[str, tuple[Schedule, int]] = {
    "linear": (VariancePreserving(), 1000),
    "linear, respaced": (VariancePreserving(), 37),
    "linear, linspace": (VariancePreserving(spacing="linspace"), 37),
    "linear, leading": (VariancePreserving(spacing="leading"), 37),
    "linear, quadratic": (VariancePreserving(spacing="quadratic"), 37),
    "linear, Karras": (VariancePreserving(spacing="karras"), 37),
    "linear, log-SNR": (VariancePreserving(spacing="log_snr"), 37),
    "linear, own indices": (VariancePreserving(spacing=[0, 3, 500, 998]), 4),
    "one step": (VariancePreserving(), 1),
    "given betas": (VariancePreserving(BETAS), 5),
    "cosine": (Cosine(), 50),
    "log-SNR": (LogSNR(9.0, -20.0), 100),
    "log-SNR, one step": (LogSNR(9.0, -20.0), 1),
    "Ornstein-Uhlenbeck": (OrnsteinUhlenbeck(), 500),
    "given alphas": (FromAlphas([0.9, 0.5, 0.1, 0.0]), 4),
}


def cosine(s: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * s)


def sine(s: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * s)


CONTINUOUS: dict[str, tuple[ContinuousSchedule, int]] = {
    "Ornstein-Uhlenbeck, quadratic": (OrnsteinUhlenbeck(spacing="quadratic"), 20),
    "Ornstein-Uhlenbeck, Karras": (OrnsteinUhlenbeck(spacing="karras"), 20),
    "Ornstein-Uhlenbeck, own times": (OrnsteinUhlenbeck(spacing=[0.1, 0.3, 1.0]), 3),
    "sub-VP": (SubVariancePreserving(), 20),
    "sub-VP, log-SNR": (SubVariancePreserving(spacing="log_snr"), 20),
    "variance exploding": (VarianceExploding(), 20),
    "variance exploding, one step": (VarianceExploding(), 1),
    "EDM": (EDM(), 18),
    "EDM, one step": (EDM(), 1),
    "rectified flow": (RectifiedFlow(), 7),
    "rectified flow, shifted": (RectifiedFlow(shift=3.0, spacing="linspace"), 28),
    "rectified flow, log-SNR": (RectifiedFlow(spacing="log_snr", span=(0.001, 0.999)), 28),
    "trigonometric": (Interpolant(cosine, sine, span=(1e-3, 0.999)), 11),
}

GRIDS = {name: schedule.grid(steps) for name, (schedule, steps) in SCHEDULES.items()}
TABULATED = Tabulated([1.0, 0.9, 0.9, 0.0], [0.1, 0.1, 0.5, 2.0])
ALL_GRIDS = {
    **GRIDS,
    **{name: schedule.grid(steps) for name, (schedule, steps) in CONTINUOUS.items()},
    "given levels": TABULATED.grid(4),
}

every_grid = pytest.mark.parametrize("grid", ALL_GRIDS.values(), ids=ALL_GRIDS.keys())


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved(name: str) -> None:
    grid, (_, num_steps) = GRIDS[name], SCHEDULES[name]
    assert grid.num_steps == num_steps
    torch.testing.assert_close(
        grid.alpha**2 + grid.sigma**2, torch.ones_like(grid.alpha), rtol=0, atol=1e-15
    )


@every_grid
def test_data_are_clean_and_noise_grows(grid: Grid) -> None:
    assert grid.alpha[0] == 1
    assert grid.sigma[0] == 0
    assert {table.dtype for table in (grid.alpha, grid.sigma, grid.time)} == {torch.float64}
    assert grid.log_snr[0] == torch.inf
    assert (grid.log_snr.diff() < 0).all()
    assert grid.time.isfinite().all()


def condition_by_hand(grid: Grid, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_{t-1} given x_t and x_0, from the joint Gaussian of (x_{t-1}, x_t) given x_0."""
    ratio = grid.alpha[t] / grid.alpha[t - 1]
    before, after = grid.sigma[t - 1] ** 2, grid.sigma[t] ** 2
    gain = ratio * before / after
    return grid.alpha[t - 1] - gain * grid.alpha[t], gain, before - gain * ratio * before


@every_grid
def test_posterior_is_gaussian_conditioning(grid: Grid) -> None:
    for t in range(1, grid.num_steps + 1):
        for ours, by_hand in zip(grid.posterior(t), condition_by_hand(grid, t), strict=True):
            torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)


@every_grid
def test_posterior_keeps_the_marginals(grid: Grid) -> None:
    for t in range(1, grid.num_steps + 1):
        c_0, c_t, variance = grid.posterior(t)
        mean, spread = c_0 + c_t * grid.alpha[t], c_t**2 * grid.sigma[t] ** 2 + variance
        torch.testing.assert_close(mean, grid.alpha[t - 1], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(spread, grid.sigma[t - 1] ** 2, rtol=1e-11, atol=1e-13)


@every_grid
def test_transitions_make_the_levels(grid: Grid) -> None:
    for t in range(1, grid.num_steps + 1):
        ratio, variance = grid.transition(t)
        expected = grid.sigma[t] ** 2 - ratio**2 * grid.sigma[t - 1] ** 2
        torch.testing.assert_close(ratio * grid.alpha[t - 1], grid.alpha[t])
        torch.testing.assert_close(variance, expected, rtol=1e-9, atol=1e-14)
        assert variance > 0


@every_grid
def test_last_step_is_exact(grid: Grid) -> None:
    assert tuple(map(float, grid.posterior(1))) == (1.0, 0.0, 0.0)


def test_linear_schedule_is_that_of_ddpm() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    grid = VariancePreserving().grid(1000)
    np.testing.assert_allclose(grid.alpha[1:] ** 2, bars, rtol=1e-12)
    np.testing.assert_array_equal(grid.time[1:], np.arange(1000))
    for t in (2, 500, 1000):
        tilde = (1 - bars[t - 2]) / (1 - bars[t - 1]) * betas[t - 1]
        np.testing.assert_allclose(grid.posterior(t).variance, tilde, rtol=1e-9)
        np.testing.assert_allclose(grid.transition(t).variance, betas[t - 1], rtol=1e-9)


STEPS = [(1000, n) for n in (1, 2, 3, 10, 32, 64, 100, 250, 333, 750, 999, 1000)] + [(5, 3), (7, 4)]


@pytest.mark.parametrize(("length", "num_steps"), STEPS)
def test_trailing_is_that_of_diffusers(length: int, num_steps: int) -> None:
    grid = VariancePreserving(torch.linspace(1e-4, 0.02, length)).grid(num_steps)
    theirs = np.round(np.arange(length, 0, -length / num_steps))[:num_steps] - 1
    np.testing.assert_array_equal(grid.time[1:].flip(0), theirs)
    assert grid.time[-1] == length - 1


@pytest.mark.parametrize(("length", "num_steps"), [pair for pair in STEPS if pair[1] > 1])
def test_linspace_is_that_of_improved_diffusion(length: int, num_steps: int) -> None:
    grid = VariancePreserving(torch.linspace(1e-4, 0.02, length), "linspace").grid(num_steps)
    stride = (length - 1) / (num_steps - 1)
    theirs = [round(stride * step) for step in range(num_steps)]
    np.testing.assert_array_equal(grid.time[1:], theirs)


@pytest.mark.parametrize("spacing", get_args(IndexSpacing))
def test_respacing_keeps_levels_of_training(spacing: IndexSpacing) -> None:
    schedule = VariancePreserving(spacing=spacing)
    whole, few = schedule.grid(1000), schedule.grid(30)
    kept = few.time[1:].long() + 1
    torch.testing.assert_close(few.alpha[1:], whole.alpha[kept], rtol=0, atol=0)
    torch.testing.assert_close(few.sigma[1:], whole.sigma[kept], rtol=0, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "quadratic", "karras", "log_snr"])
def test_one_step_starts_from_noise(spacing: Any) -> None:
    assert VariancePreserving(spacing=spacing).grid(1).time[1] == 999


@pytest.mark.parametrize(("length", "num_steps"), STEPS)
def test_leading_is_that_of_diffusers(length: int, num_steps: int) -> None:
    grid = VariancePreserving(torch.linspace(1e-4, 0.02, length), "leading").grid(num_steps)
    theirs = (np.arange(0, num_steps) * (length // num_steps)).round()
    np.testing.assert_array_equal(grid.time[1:], theirs)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100, 500, 999, 1000])
def test_quadratic_spacing(num_steps: int) -> None:
    kept = kept_indices("quadratic", 1000, num_steps)
    assert kept[-1] == 999
    assert (kept.diff() > 0).all()
    squares = 999 * (torch.arange(num_steps) / max(num_steps - 1, 1)) ** 2
    far = squares > 2 * torch.arange(num_steps)
    assert ((kept - squares).abs() <= 0.5)[far].all()


def test_own_indices_are_kept() -> None:
    grid, whole = GRIDS["linear, own indices"], GRIDS["linear"]
    assert grid.time.tolist() == [0, 0, 3, 500, 998]
    torch.testing.assert_close(grid.alpha[1:], whole.alpha[[1, 4, 501, 999]], rtol=0, atol=0)


def spaced(grid: Grid, spacing: NoiseSpacing) -> Tensor:
    """What should fall by equal steps."""
    if spacing == "log_snr":
        return grid.log_snr[1:]
    return (grid.sigma / grid.alpha)[1:] ** (1 / 7)


@pytest.mark.parametrize("spacing", get_args(NoiseSpacing))
@pytest.mark.parametrize(
    "make",
    [VariancePreserving, Cosine, OrnsteinUhlenbeck, SubVariancePreserving, VarianceExploding],
)
def test_noise_falls_by_equal_amounts(make: Callable[..., Schedule], spacing: NoiseSpacing) -> None:
    grid = make(spacing=spacing).grid(25)
    steps = spaced(grid, spacing).diff()
    torch.testing.assert_close(steps, steps[:1].expand(24), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spacing", get_args(NoiseSpacing))
def test_fractional_indices_lie_between_levels_of_training(spacing: NoiseSpacing) -> None:
    whole, grid = GRIDS["linear"], VariancePreserving(spacing=spacing).grid(30)
    assert grid.time[[1, -1]].tolist() == pytest.approx([0, 999], abs=1e-9)
    torch.testing.assert_close(grid.alpha[[1, -1]], whole.alpha[[1, -1]], rtol=1e-12, atol=0)
    below = grid.time[2:-1].floor().long() + 1
    assert (grid.log_snr[2:-1] <= whole.log_snr[below]).all()
    assert (grid.log_snr[2:-1] >= whole.log_snr[below + 1]).all()


def test_cosine_is_that_of_nichol_and_dhariwal() -> None:
    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = np.array([min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999) for i in range(1000)])
    grid = Cosine().grid(1000)
    np.testing.assert_allclose(grid.alpha[1:] ** 2, np.cumprod(1 - betas), rtol=1e-9)
    assert grid.transition(1000).variance.item() == pytest.approx(0.999, abs=1e-12)


def test_log_snr_falls_by_equal_amounts() -> None:
    grid = LogSNR(9.0, -20.0).grid(100)
    expected = torch.linspace(9, -20, 100, dtype=torch.float64)
    torch.testing.assert_close(grid.log_snr[1:], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grid.time[1:], expected)


def test_ornstein_uhlenbeck_decays_exponentially() -> None:
    grid = OrnsteinUhlenbeck(6.0).grid(500)
    torch.testing.assert_close(grid.alpha**2, torch.exp(-6 * grid.time))
    assert grid.time[-1] == 1


def test_given_alphas_are_kept() -> None:
    alphas = torch.tensor([0.9999999, 0.5, 0.01], dtype=torch.float64)
    grid = FromAlphas(alphas, time=[3.0, 400.0, 999.0]).grid(3)
    torch.testing.assert_close(grid.alpha[1:], alphas, rtol=0, atol=0)
    assert grid.time[1:].tolist() == [3.0, 400.0, 999.0]
    assert FromAlphas(alphas).grid(3).time[1:].tolist() == [1.0, 2.0, 3.0]


def test_reverse_kernels_of_a_gaussian() -> None:
    """Test A of methods/tri_tsmc.md: the exact reverse kernels N(A x + B, V)."""
    table = {
        1: (0.98980140, 0.01763047, 0.05077574),
        2: (0.97749812, 0.03541198, 0.10303735),
        3: (0.94615569, 0.07107537, 0.21156684),
        4: (0.87725529, 0.12105186, 0.38083545),
        5: (0.77010803, 0.15184370, 0.54454861),
    }
    grid = VariancePreserving(BETAS).grid(5)
    mean, variance = 0.5, 1.44
    for t, expected in table.items():
        c_0, c_t, tilde = grid.posterior(t)
        total = grid.alpha[t] ** 2 * variance + grid.sigma[t] ** 2
        slope = grid.alpha[t] * variance / total
        left = variance * grid.sigma[t] ** 2 / total
        offset = c_0 * mean * (1 - slope * grid.alpha[t])
        ours = (c_0 * slope + c_t, offset, tilde + c_0**2 * left)
        assert tuple(map(float, ours)) == pytest.approx(expected, abs=1e-8)


# ------------------------------------------------------------------------------- continuous time

every_continuous = pytest.mark.parametrize("name", CONTINUOUS)


def test_geometric_sigmas() -> None:
    grid = VarianceExploding(0.01, 50.0).grid(1000)
    np.testing.assert_allclose(grid.sigma[1:], np.geomspace(0.01, 50, 1000), rtol=1e-12)
    assert (grid.alpha == 1).all()
    torch.testing.assert_close(grid.time, grid.sigma, rtol=0, atol=0)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_edm_is_that_of_karras(rho: float) -> None:
    ramp = np.linspace(0, 1, 18)
    theirs = (80 ** (1 / rho) + ramp * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    grid = EDM(rho=rho).grid(18)
    np.testing.assert_allclose(grid.sigma[1:].flip(0), theirs, rtol=1e-11)
    torch.testing.assert_close(grid.time, grid.sigma, rtol=0, atol=0)
    for t in range(1, 19):  # sigma_{t-1}^2 (1 - sigma_{t-1}^2 / sigma_t^2)
        before, now = grid.sigma[t - 1] ** 2, grid.sigma[t] ** 2
        torch.testing.assert_close(grid.posterior(t).variance, before * (1 - before / now))


def test_bisection_finds_karras() -> None:
    found = VarianceExploding(0.002, 80.0, spacing="karras").grid(40)
    torch.testing.assert_close(found.sigma, EDM().grid(40).sigma, rtol=1e-13, atol=0)


def test_interpolation_is_straight() -> None:
    grid = RectifiedFlow().grid(10)
    torch.testing.assert_close(grid.sigma, torch.arange(11).double() / 10, rtol=0, atol=0)
    torch.testing.assert_close(grid.alpha + grid.sigma, torch.ones_like(grid.alpha))
    assert grid.alpha[-1] == 0
    for t in range(2, 11):  # with r = s_{t-1} (1 - s_t) / (s_t (1 - s_{t-1})): s_{t-1}^2 (1 - r^2)
        ratio = (t - 1) * (10 - t) / (t * (11 - t))
        expected = ((t - 1) / 10) ** 2 * (1 - ratio**2)
        assert grid.posterior(t).variance.item() == pytest.approx(expected, rel=1e-12)


def test_shift_is_that_of_stable_diffusion_3() -> None:
    plain, shifted = RectifiedFlow().grid(10), RectifiedFlow(shift=3.0).grid(10)
    torch.testing.assert_close(shifted.log_snr[1:-1], plain.log_snr[1:-1] - 2 * math.log(3))


def test_sub_vp_is_that_of_song() -> None:
    grid = SubVariancePreserving(0.1, 20.0).grid(30)
    s = grid.time
    log_mean = -0.25 * s**2 * (20 - 0.1) - 0.5 * s * 0.1
    torch.testing.assert_close(grid.alpha, log_mean.exp())
    torch.testing.assert_close(grid.sigma, 1 - (2 * log_mean).exp())


# The derivative of the log-SNR at s (and alpha there), by hand.
FALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Ornstein-Uhlenbeck, Karras": lambda s, alpha: -6 / (1 - alpha**2),
    "sub-VP": lambda s, alpha: -(0.1 + 19.9 * s) * (1 + alpha**2) / (1 - alpha**2),
    "variance exploding": lambda s, alpha: -2 / s,
    "EDM": lambda s, alpha: -2 / s,
    "rectified flow, shifted": lambda s, alpha: -2 / (s * (1 - s)),
    "trigonometric": lambda s, alpha: -2 * math.pi / torch.sin(math.pi * s),
}


@pytest.mark.parametrize("name", FALL)
def test_derivative_of_the_log_snr(name: str) -> None:
    schedule, num_steps = CONTINUOUS[name]
    grid = schedule.grid(num_steps)
    assert grid.rates is not None
    ours = 2 * (grid.rates.alpha / grid.alpha - grid.rates.sigma / grid.sigma)
    kept = (grid.alpha > 0) & (grid.sigma > 0)
    expected = FALL[name](grid.time, grid.alpha)
    torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-9, atol=0)


@every_continuous
def test_rates_are_derivatives(name: str) -> None:
    schedule, num_steps = CONTINUOUS[name]
    grid = schedule.grid(num_steps)
    s, rates = grid.time[1:], grid.rates
    assert rates is not None
    step = 1e-6 * s
    for i, rate in enumerate(rates):
        slope = (schedule.level(s + step)[i] - schedule.level(s - step)[i]) / (2 * step)
        torch.testing.assert_close(slope, rate[1:], rtol=1e-6, atol=1e-6)


@every_continuous
def test_levels_are_those_of_the_times(name: str) -> None:
    schedule, num_steps = CONTINUOUS[name]
    grid = schedule.grid(num_steps)
    alpha, sigma = schedule.level(grid.time[1:])
    torch.testing.assert_close(grid.alpha[1:], alpha, rtol=0, atol=0)
    torch.testing.assert_close(grid.sigma[1:], sigma, rtol=0, atol=0)
    assert grid.time[-1].item() == pytest.approx(schedule.span[1], rel=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rates_do_not_need_the_gradient_mode(mode: Any) -> None:
    with mode():
        rates = RectifiedFlow().grid(4).rates
    assert rates is not None
    assert rates.alpha.tolist() == [0, -1, -1, -1, -1]
    assert rates.sigma.tolist() == [0, 1, 1, 1, 1]


def test_given_levels_are_kept() -> None:
    grid = TABULATED.grid(4)
    assert grid.alpha.tolist() == [1.0, 1.0, 0.9, 0.9, 0.0]
    assert grid.sigma.tolist() == [0.0, 0.1, 0.1, 0.5, 2.0]
    assert grid.time[1:].tolist() == [1, 2, 3, 4]
    assert grid.rates is None
    grid = Tabulated([0.5, 0.0], [0.5, 1.0], [500, 1000], ([-1, -1], [1, 1])).grid(2)
    assert grid.rates is not None
    assert grid.rates.alpha.tolist() == [0, -1, -1]
    assert grid.time[1:].tolist() == [500, 1000]


@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        (VariancePreserving().grid(10), 1.0),
        (GRIDS["linear, leading"], 1.0),
        (RectifiedFlow().grid(5), 1.0),
        (RectifiedFlow(spacing="log_snr", span=(1e-3, 0.9)).grid(5), 0.9),
        (VarianceExploding().grid(5), 50.0),
        (EDM().grid(5), 80.0),
        (TABULATED.grid(4), 2.0),
    ],
)
def test_scale_of_pure_noise(grid: Grid, scale: float) -> None:
    assert grid.terminal_scale == pytest.approx(scale, rel=1e-12)
    if scale == 1.0:
        assert grid.terminal_scale == 1.0


# ------------------------------------------------------------------------------------- bad input


def test_schedules_say_what_they_are() -> None:
    assert repr(LogSNR(9.0, -20.0)) == "LogSNR(start=9.0, end=-20.0)"
    linear = "VariancePreserving(betas=shape (1000,) from 0.0001 to 0.02, spacing='trailing')"
    assert repr(VariancePreserving()) == linear


def table(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "too many steps": (lambda: VariancePreserving().grid(1001), "at most 1000 steps.*= 1001"),
    "no steps": (lambda: VariancePreserving().grid(0), "at least one step; got 0"),
    "no steps of log-SNR": (lambda: LogSNR(9.0, -20.0).grid(-1), "at least one step; got -1"),
    "beta of 1": (lambda: VariancePreserving([0.1, 1.0]), "above 0 and below 1.*from 0.1 to 1"),
    "beta of 0": (lambda: VariancePreserving([0.0]), "above 0 and below 1"),
    "NaN beta": (lambda: VariancePreserving([math.nan]), "above 0 and below 1"),
    "no betas": (lambda: VariancePreserving([]), r"above 0 and below 1.*shape \(0,\)"),
    "alpha-bars as betas": (
        lambda: VariancePreserving(torch.linspace(0.9999, 0.0001, 10)),
        "small at first.*fall from 0.9999 to 0.0001.*From alpha-bar",
    ),
    "betas in a matrix": (lambda: VariancePreserving(torch.full((2, 2), 0.1)), r"shape \(2, 2\)"),
    "offset": (lambda: Cosine(offset=0.0), "positive, finite offset; got 0.0"),
    "log-SNR rises": (lambda: LogSNR(-20.0, 9.0), "start > end.*try LogSNR"),
    "rate": (lambda: OrnsteinUhlenbeck(-1.0), "positive, finite rate; got -1.0"),
    "alphas rise": (lambda: FromAlphas([0.1, 0.5]), "falling at every step.*from data to noise"),
    "alpha_0 given": (lambda: FromAlphas([1.0, 0.5]), "leave out alpha_0 = 1"),
    "negative alpha": (lambda: FromAlphas([0.5, -0.1]), "not negative"),
    "other length": (lambda: FromAlphas([0.5]).grid(2), "num_steps = 1, the number of alphas"),
    "times": (lambda: FromAlphas([0.5], time=[0.0, 1.0]), "one time per alpha"),
    "noisy data": (lambda: Grid(table(0.9, 0.5), table(0.1, 0.5), table(0, 1)), "x_0 is data"),
    "no noise": (lambda: Grid(table(1), table(0), table(0)), "shape .num_steps . 1"),
    "sigma repeats": (
        lambda: Grid(table(1, 1, 1), table(0, 0.5, 0.5), table(0, 1, 2)),
        "falls at every step.*at t = 2",
    ),
    "negative level": (
        lambda: Grid(table(1, -0.5), table(0, 0.5), table(0, 1)),
        "no negative level",
    ),
    "single precision": (
        lambda: Grid(torch.tensor([1.0, 0.5]), table(0, 0.5), table(0, 1)),
        "double|float64|Float64",
    ),
    "indices fall": (lambda: VariancePreserving(spacing=[5, 3]), r"rise within 0..999.*\(2,\)"),
    "index L": (lambda: VariancePreserving(spacing=[5, 1000]), "counted from 1 are one too many"),
    "number of indices": (lambda: VariancePreserving(spacing=[5]).grid(2), "num_steps = 1"),
    "span": (lambda: RectifiedFlow(span=(0.0, 1.0)), "0 < first < last"),
    "sigma_min above sigma_max": (lambda: EDM(80.0, 0.002), "0 < first < last"),
    "rho": (lambda: EDM(rho=0.0), "positive, finite rho"),
    "shift": (lambda: RectifiedFlow(shift=-1.0), "positive, finite shift"),
    "pure noise": (lambda: RectifiedFlow(spacing="karras").grid(3), "finite log-SNR at the end"),
    "number of times": (lambda: RectifiedFlow(spacing=[0.5, 1.0]).grid(3), "one time per step"),
    "number of sigmas": (lambda: Tabulated([0.5], [0.5, 0.6]), "one sigma per alpha"),
    "levels rise": (lambda: Tabulated([0.5, 0.5], [0.6, 0.5]), "falls at every step.*at t = 2"),
    "number of rates": (lambda: Tabulated([0.5], [0.5], None, ([1], [1, 2])), "one rate per alpha"),
    "step 0": (lambda: GRIDS["cosine"].posterior(0), r"a step t in 1..50.*t = 0"),
    "step T + 1": (lambda: GRIDS["cosine"].transition(51), r"a step t in 1..50.*t = 51"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(Exception, match=message) as refusal:
        make()
    if case != "single precision":  # the shape types refuse it first, where tests execute them
        assert isinstance(refusal.value, ValueError)


def test_spacing_is_checked() -> None:
    with pytest.raises(Exception, match="trailing"):
        VariancePreserving(spacing="middle")  # type: ignore[arg-type]
    with pytest.raises(Exception, match="karras"):
        OrnsteinUhlenbeck(spacing="trailing")  # type: ignore[arg-type]


def test_betas_are_copied() -> None:
    betas = torch.full((3,), 0.1, dtype=torch.float64)
    schedule = VariancePreserving(betas)
    betas.fill_(0.9)
    assert schedule.grid(3).transition(1).variance.item() == pytest.approx(0.1)
