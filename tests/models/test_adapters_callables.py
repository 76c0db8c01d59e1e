"""Denoisers of azula, of k-diffusion and of EDM: transitions equal to those of their samplers."""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from smcdiff import Program
from smcdiff.inference import SMC
from smcdiff.laws import log_density
from smcdiff.models import EDM, Controlled, GaussianDenoiser
from smcdiff.models.adapters import from_azula, from_denoiser


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def noisy(law: Any, seed: int) -> Tensor:
    """A draw with the noise that another sampler takes from the same seed."""
    torch.manual_seed(seed)
    return law.mean + law.variance.sqrt() * torch.randn(law.mean.shape)


# ------------------------------------------------------------------------------------ D(x, sigma)


class Denoiser(nn.Module):
    """A small network, with EDM's preconditioning."""

    sigma_data = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        sigma = sigma[:, None, None, None]
        total = sigma**2 + self.sigma_data**2
        inner = self.layer(x.flatten(1) / total.flatten(1).sqrt()).reshape(x.shape)
        out = self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * inner
        return out if label is None else out + label[:, None, None, None]


def euler_ancestral(denoised: Tensor, x: Tensor, now: float, then: float, eta: float) -> Tensor:
    """One step of k-diffusion's ``sample_euler_ancestral``."""
    up = min(then, eta * math.sqrt(then**2 * (now**2 - then**2) / now**2))
    down = math.sqrt(then**2 - up**2)
    x = x + (x - denoised) / now * (down - now)
    return x + torch.randn_like(x) * up


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_steps_are_those_of_k_diffusion(eta: float) -> None:
    denoiser, ramp = Denoiser(), torch.linspace(0, 1, 8)
    sigmas = (10.0 ** (1 / 7) + ramp * (0.02 ** (1 / 7) - 10.0 ** (1 / 7))) ** 7
    process = from_denoiser(denoiser, (1, 2, 3), sigmas=[*sigmas.tolist(), 0.0], eta=eta)
    assert process.num_steps == 8
    assert process.deterministic == (eta == 0)
    assert process.initial().stddev.unique().item() == pytest.approx(10.0)
    x = 10 * torch.randn(4, 1, 2, 3)
    for t in range(8, 0, -1):
        now, then = sigmas[8 - t].item(), sigmas[9 - t].item() if t > 1 else 0.0
        ours = noisy(process.kernel(x, t).law, seed=t)
        torch.manual_seed(t)
        with torch.no_grad():
            denoised = denoiser(x, torch.full((4,), now))
        theirs = euler_ancestral(denoised, x, now, then, eta)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        x = theirs


def test_what_a_denoiser_says_of_itself_is_used() -> None:
    """EDM's networks have a shape and a range of noise levels, k-diffusion's have levels."""
    network = Denoiser()
    network.img_channels, network.img_resolution = 3, 4
    network.sigma_min, network.sigma_max = 0.01, math.inf
    process = from_denoiser(network, num_steps=5)
    assert process.event_shape == (3, 4, 4)
    torch.testing.assert_close(process.grid.sigma, EDM(0.01, 80.0).grid(5).sigma)
    assert process.scale == 0.5
    network.round_sigma = lambda sigma: torch.as_tensor(sigma).round(decimals=2)
    rounded = from_denoiser(network, num_steps=5).grid.sigma
    torch.testing.assert_close(rounded, process.grid.sigma.round(decimals=2))
    network.get_sigmas = lambda n: torch.cat([torch.linspace(9.0, 1.0, n), torch.zeros(1)])
    assert from_denoiser(network, num_steps=3).grid.sigma.tolist() == [0, 1, 5, 9]


def test_context_reaches_the_denoiser() -> None:
    process = from_denoiser(Denoiser(), (1, 2, 3), sigmas=[1.0, 2.0])
    x, label = torch.randn(4, 1, 2, 3), torch.arange(4.0)
    shift = process.kernel(x, 1, label=label).law.mean - process.kernel(x, 1).law.mean
    torch.testing.assert_close(shift, label[:, None, None, None].expand_as(x))


def test_bad_denoisers_are_refused() -> None:
    with pytest.raises(ValueError, match="event_shape is needed"):
        from_denoiser(Denoiser())
    with pytest.raises(ValueError, match="log-SNR that falls"):
        from_denoiser(Denoiser(), (1, 2, 3), sigmas=[1.0, 1.0])


# ------------------------------------------------------------------------------------------ azula


class Exact(nn.Module):
    """The denoiser of N(0.3, 0.7^2), with azula's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = GaussianDenoiser(torch.full((2,), 0.3), 0.49)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.exp(math.log(1e-3) * t**2)
        return alpha, torch.sqrt(1 - alpha**2 + 1e-6)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        assert t.shape == ()
        alpha, sigma = self.schedule(t)
        return SimpleNamespace(mean=self.denoiser.mean(x, alpha.item(), sigma.item()))


def moments(num_steps: int) -> tuple[Tensor, Tensor]:
    """The chain's own mean and standard deviation of x_0: every transition is affine."""
    process = from_azula(Exact(), (2,), num_steps, scale=0.7)
    mean, variance = process.initial().mean, process.initial().variance
    for t in range(num_steps, 0, -1):
        law, other = process.kernel(mean, t).law, process.kernel(mean + 1, t).law
        mean, variance = law.mean, (other.mean - law.mean) ** 2 * variance + law.variance
    return mean, variance.sqrt()


def test_azula_interface_is_a_prior_of_its_data() -> None:
    """Without azula: the data's mean (but for the little that x_T knows of it), and their
    deviation, up to an error that halves with the step."""
    (_, wide), (mean, narrow) = moments(60), moments(120)
    torch.testing.assert_close(mean, torch.full((2,), 0.3), rtol=0, atol=1e-3 * 0.3)
    ratio = (wide - 0.7) / (narrow - 0.7)
    torch.testing.assert_close(ratio, torch.full((2,), 2.0), rtol=0.1, atol=0)
    with pytest.raises(ValueError, match="eta lies between 0 and 1, got 2"):
        from_azula(Exact(), (2,), eta=2.0)


class Backbone(nn.Linear):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x) + time.to(x.dtype)


@pytest.mark.parametrize("schedule", ["VP", "VE", "Cosine", "Rectified", "Decay"])
@pytest.mark.parametrize(("sampler", "eta"), [("DDPM", 1.0), ("DDIM", 0.5), ("Euler", 0.0)])
def test_steps_are_those_of_azula(schedule: str, sampler: str, eta: float) -> None:
    reason = "needs azula: pip install 'smcdiff[azula]'"
    denoise = pytest.importorskip("azula.denoise", reason=reason)
    noise = pytest.importorskip("azula.noise", reason=reason)
    sample = pytest.importorskip("azula.sample", reason=reason)

    denoiser = denoise.KarrasDenoiser(Backbone(3, 3), getattr(noise, f"{schedule}Schedule")())
    process = from_azula(denoiser, (3,), 6, eta=eta)
    options = {"eta": eta**2} if sampler == "DDIM" else {}
    theirs = getattr(sample, f"{sampler}Sampler")(denoiser, steps=6, silent=True, **options)
    torch.manual_seed(0)
    x = theirs.init((4, 3))
    torch.testing.assert_close(noisy(process.initial().expand((4,)), seed=0), x)
    for i, (now, then) in enumerate(theirs.timesteps.unfold(0, 2, 1).unbind()):
        torch.manual_seed(i)
        with torch.no_grad():
            after = theirs.step(x, now, then)
        ours = noisy(process.kernel(x, 6 - i).law, seed=i)
        torch.testing.assert_close(ours, after, rtol=1e-6, atol=1e-6)
        x = after


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_networks_in_half_precision_keep_densities_in_float32(
    dtype: torch.dtype, digits: float
) -> None:
    """The network rounds; the state that was drawn is scored as it is stored, in float64."""
    reason = "needs azula: pip install 'smcdiff[azula]'"
    denoise = pytest.importorskip("azula.denoise", reason=reason)
    noise = pytest.importorskip("azula.noise", reason=reason)
    torch.set_default_dtype(torch.float32)
    whole = Backbone(3, 3)
    half = copy.deepcopy(whole).to(dtype)
    prior, precise = (
        from_azula(denoise.KarrasDenoiser(net, noise.VPSchedule()), (3,), 4)
        for net in (half, whole)
    )
    guide = Controlled(prior, lambda x, t, denoised: 0.3 * torch.ones_like(x))

    def program() -> None:
        pyro.sample("y", dist.Normal(prior("x").sum(-1), 1.0), obs=torch.tensor(0.5))

    states = list(SMC(program, lambda: guide("x"), num_particles=6, ess_threshold=0.0).iterate())
    weights = Program(program).log_joint({"x": states[-1].x["x"][0]}, {})
    for before, after in itertools.pairwise(states):
        x, new = before.x["x"][0], after.x["x"][0]
        assert x.dtype == new.dtype == torch.float32
        laws = [process.kernel(x, before.t).law for process in (prior, guide, precise)]
        assert all(law.mean.dtype == torch.float32 for law in laws)
        torch.testing.assert_close(laws[0].mean, laws[2].mean, rtol=digits, atol=4 * digits)
        weights = weights + log_density(laws[0], new) - log_density(laws[1], new)
    torch.testing.assert_close(states[-1].log_weights[0], weights, rtol=0, atol=1e-12)
