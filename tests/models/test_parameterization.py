"""One exact denoiser in every disguise; what networks are fed; guidance, variances, thresholds."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import (
    EDM,
    ClassifierFree,
    Cosine,
    Diffusion,
    DynamicThresholding,
    Interpolant,
    LogSNR,
    MixtureDenoiser,
    RectifiedFlow,
    Schedule,
    SubVariancePreserving,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
    digit_prior,
)
from smcdiff.models.parameterization import Parameterization, Time

STEPS, SIGMA_DATA = 6, 0.7
SCHEDULES: dict[str, Schedule] = {
    "linear": VariancePreserving(),
    "cosine": Cosine(spacing="karras"),
    "log-SNR": LogSNR(9.0, -9.0),
    "sub-VP": SubVariancePreserving(),
    "variance exploding": VarianceExploding(0.05, 20.0),
    "EDM": EDM(),
    "rectified": RectifiedFlow(spacing="log_snr", span=(0.01, 0.99)),
    "own": Interpolant(lambda s: 1 / (1 + s), lambda s: s.sqrt()),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_parameterization = pytest.mark.parametrize("name", get_args(Parameterization))
FLOWING = ("sub-VP", "variance exploding", "EDM", "rectified", "own")


def denoiser() -> MixtureDenoiser:
    means = torch.tensor([[1.0, -0.5, 0.3], [-1.0, 0.2, 0.8]], dtype=torch.float64)
    variances = torch.tensor([[0.3, 0.5, 0.2], [0.4, 0.1, 0.6]], dtype=torch.float64)
    return MixtureDenoiser(means, variances)


class Disguised(nn.Module):
    """An exact denoiser that answers as a network of some parameterisation, in some dtype."""

    def __init__(self, name: str, schedule: Schedule, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.grid, self.denoiser = name, schedule.grid(STEPS), denoiser()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        assert x.dtype == time.dtype == self.weight.dtype
        times = -self.grid.log_snr / 8 if self.name == "edm" else self.grid.time
        t = 1 + int((times[1:] - time[0].double()).abs().argmin())
        levels = self.grid.alpha[t].item(), self.grid.sigma[t].item()
        return self.answer(x.double(), t, *levels).to(x.dtype)

    def answer(self, x: Tensor, t: int, alpha: float, sigma: float) -> Tensor:
        if self.name == "edm":  # Karras et al. (2022), table 1, for x / alpha at sigma / alpha
            noise, s = sigma / alpha, SIGMA_DATA
            root = math.sqrt(noise**2 + s**2)
            scaled = x * root
            x0 = self.denoiser.mean(alpha * scaled, alpha, sigma)
            return (x0 - s**2 / root**2 * scaled) * root / (noise * s)
        x0 = self.denoiser.mean(x, alpha, sigma)
        epsilon = (x - alpha * x0) / sigma
        if self.name == "velocity":
            assert self.grid.rates is not None
            return self.grid.rates.alpha[t] * x0 + self.grid.rates.sigma[t] * epsilon
        return {
            "x0": x0,
            "epsilon": epsilon,
            "v": alpha * epsilon - sigma * x0,
            "score": -epsilon / sigma,
        }[self.name]


def disguised(name: str, schedule: Schedule, dtype: torch.dtype, **options: Any) -> Diffusion:
    network = Disguised(name, schedule, dtype)
    return Diffusion(
        network,
        schedule,
        (3,),
        STEPS,
        parameterization=name,  # type: ignore[arg-type]
        sigma_data=SIGMA_DATA,
        **options,
    )


CASES = [
    (name, kind)
    for kind in SCHEDULES
    for name in get_args(Parameterization)
    if name != "velocity" or kind in FLOWING
]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"]
)
def test_all_disguises_give_one_kernel(
    name: str, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    schedule = SCHEDULES[kind]
    network = disguised(name, schedule, dtype, variance="large")
    exact = Diffusion(denoiser(), schedule, num_steps=STEPS, variance="large")
    for t in range(1, STEPS + 1):
        alpha, sigma = network.grid.alpha[t], network.grid.sigma[t]
        x = alpha * denoiser().sample(50) + sigma * torch.randn(50, 3, dtype=torch.float64)
        x = x.to(dtype)
        ours, theirs = network.kernel(x, t).law, exact.kernel(x.double(), t).law
        weight = network.grid.posterior(t).c_0 * network.preconditioning[t].c_skip
        unit = (1 + float(weight)) * (1 + float(x.abs().max()))  # what rounding is relative to
        torch.testing.assert_close(
            ours.mean.double(), theirs.mean, rtol=tolerance, atol=tolerance * unit
        )
        torch.testing.assert_close(ours.variance.double(), theirs.variance, rtol=1e-6, atol=0)


def test_velocity_of_a_rectified_flow_is_noise_minus_data() -> None:
    prior = Diffusion(lambda x, time: 2 * x, None, (3,), 4, parameterization="velocity")
    assert isinstance(prior.preconditioning, list)
    x = torch.randn(5, 3)
    for t in range(1, 5):  # x - s v, and noise = x + (1 - s) v
        denoised = prior.kernel(x, t).denoised.mean
        torch.testing.assert_close(denoised, x - t / 4 * 2 * x)
    assert prior.grid.alpha[-1] == 0


def test_velocity_on_a_circle_is_v() -> None:
    """alpha = cos s, sigma = sin s: dx/ds = alpha epsilon - sigma x_0."""
    circle = Interpolant(torch.cos, torch.sin, span=(0.01, 1.5))
    one, other = (
        Diffusion(lambda x, time: x.sin(), circle, (3,), 4, parameterization=name)
        for name in ("v", "velocity")
    )
    x = torch.randn(5, 3)
    for t in range(1, 5):
        torch.testing.assert_close(one.kernel(x, t).law.mean, other.kernel(x, t).law.mean)


def test_edm_is_preconditioned_as_by_karras() -> None:
    """For alpha = 1: D = c_skip x + c_out F(c_in x; ln(sigma) / 4), table 1."""
    seen = []

    def raw(x: Tensor, time: Tensor) -> Tensor:
        seen.append((x, time))
        return x.tanh()

    prior = Diffusion(raw, None, (3,), 5, parameterization="edm", sigma_data=0.5)
    assert prior.scale == 0.5
    assert prior.initial().stddev.tolist() == [80.0] * 3
    for t in range(1, 6):
        x, sigma = torch.randn(4, 3), EDM().grid(5).sigma[t].item()
        denoised = prior.kernel(x, t).denoised.mean
        (fed, time) = seen.pop()
        total = sigma**2 + 0.25
        torch.testing.assert_close(fed, x / math.sqrt(total))
        torch.testing.assert_close(time, torch.full((4,), math.log(sigma) / 4))
        expected = 0.25 / total * x + sigma * 0.5 / math.sqrt(total) * fed.tanh()
        torch.testing.assert_close(denoised, expected)


# ----------------------------------------------------------------------------- the network's time


class Recorder(nn.Module):
    """Remembers what it is fed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.x, self.time = x, time
        return self.weight * x


def fed(dtype: torch.dtype = torch.float32, t: int = 3, **options: Any) -> Tensor:
    network = Recorder(dtype)
    settings = {"schedule": VariancePreserving(), "event_shape": (2,), "num_steps": 10, **options}
    prior = Diffusion(network, **settings)
    prior.evaluate(torch.randn(4, 5, 2), t)
    assert network.time.shape == (20,)
    assert (network.time == network.time[0]).all()
    return network.time[0]


TIMES: dict[Any, Callable[[Any], Tensor]] = {
    None: lambda grid: grid.time[3],
    "sigma": lambda grid: grid.sigma[3] / grid.alpha[3],
    "log_snr": lambda grid: (grid.alpha[3] ** 2 / grid.sigma[3] ** 2).log(),
    "c_noise": lambda grid: (grid.sigma[3] / grid.alpha[3]).log() / 4,
}


@pytest.mark.parametrize("time", TIMES)
@every_schedule
def test_network_time(time: Time | None, schedule: Schedule) -> None:
    expected = TIMES[time](schedule.grid(10))
    torch.testing.assert_close(fed(schedule=schedule, time=time), expected.float())
    precise = fed(torch.float64, schedule=schedule, time=time)
    torch.testing.assert_close(precise, expected, rtol=1e-14, atol=1e-14)


def test_integer_and_own_times() -> None:
    index = fed(time="index")
    assert (index.dtype, index.item()) == (torch.int64, 299)
    assert fed(time="index", schedule=VariancePreserving(spacing="karras")).dtype == torch.int64
    scaled = fed(
        schedule=RectifiedFlow(),
        parameterization="v",
        time=lambda grid: (1000 * grid.time).round().long(),
    )
    assert (scaled.dtype, scaled.item()) == (torch.int64, 300)
    own = fed(schedule=VarianceExploding(), time=lambda grid: 1000 * grid.time, t=10)
    assert own.item() == 50_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """States and densities in float32, times exact, the network in its own dtype."""
    network = Recorder(dtype)
    prior = Diffusion(network, VariancePreserving(), (2,), 1000, variance="large")
    x = prior.initial().sample((7,))
    law = prior.kernel(x, 1000).law
    assert x.dtype == law.mean.dtype == law.stddev.dtype == torch.float32
    assert network.x.dtype == dtype
    assert network.time[0].double() == 999
    coefficients = prior.preconditioning[1000]
    expected = coefficients.c_skip * x + coefficients.c_out * x.to(dtype).float()
    torch.testing.assert_close(prior.kernel(x, 1000).denoised.mean, expected)


# ------------------------------------------------------------------------------ learned variances


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_learned_variance_is_that_of_nichol_and_dhariwal(num_steps: int) -> None:
    """Equation 15, with the clipping of improved-diffusion: beta-tilde_1 becomes beta-tilde_2."""
    out = torch.randn(4, 4, 3, 3)
    prior = Diffusion(
        lambda x, time: out, VariancePreserving(), (2, 3, 3), num_steps, variance="learned"
    )
    kept = torch.linspace(1e-4, 0.02, 1000).double().sub(1).neg().cumprod(0)
    kept = kept[(1000 / num_steps * torch.arange(1, num_steps + 1)).round().long() - 1]
    before = torch.cat([torch.ones(1), kept[:-1]])
    betas = 1 - kept / before
    tilde = (1 - before) / (1 - kept) * betas
    tilde[0] = tilde[1] if num_steps > 1 else betas[0]
    x = torch.randn(4, 2, 3, 3)
    for t in {1, (num_steps + 1) // 2, num_steps}:
        kernel = prior.kernel(x, t)
        share = (out[:, 2:] + 1) / 2
        log_variance = share * betas[t - 1].log() + (1 - share) * tilde[t - 1].log()
        torch.testing.assert_close(kernel.law.variance, log_variance.exp().float())
        noise = out[:, :2]
        x0 = (x - (1 - kept[t - 1]).sqrt() * noise) / kept[t - 1].sqrt()
        torch.testing.assert_close(kernel.denoised.mean, x0.float(), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------- classifier-free guidance


class Conditional(nn.Module):
    """A network with a label, a text embedding and a style, which counts its rows and calls."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3 * channels)
        self.rows, self.asked = 0, 0

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        style: Any = None,
    ) -> Tensor:
        self.rows, self.asked = self.rows + len(x), self.asked + 1
        out = self.layer(x) + 0.01 * time[:, None]
        if label is not None:
            out = out * (1 + label[:, None])
        if text is not None:
            out = out + text.sum((-2, -1))[:, None]
        return out + (0.0 if style is None else style)


def guided(scale: float, null: Any, channels: int = 1, **options: Any) -> Diffusion:
    return Diffusion(
        Conditional(channels),
        VariancePreserving([0.3, 0.5]),
        (3,),
        2,
        guidance=ClassifierFree(scale, null),
        context_dims={"text": 2},
        **options,
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_is_the_formula_of_two_calls(scale: float) -> None:
    prior = guided(scale, {"label": 9.0, "text": torch.full((4, 2), 0.1)})
    network: Any = prior.network
    x, label, text = torch.randn(5, 7, 3), torch.rand(5, 1), torch.randn(5, 7, 4, 2)
    output = prior.evaluate(x, 2, label=label, text=text, style=0.3)["output"]
    assert (network.asked, network.rows, prior.calls(2)) == (1, 70, 2)
    flat, time = x.reshape(35, 3), torch.full((35,), prior.grid.time[2].item())
    labels = label.expand(5, 7).reshape(35)
    given = network(flat, time, labels, text.reshape(35, 4, 2), 0.3)
    null = network(flat, time, torch.full((35,), 9.0), torch.full((35, 4, 2), 0.1), 0.3)
    expected = (1 + (scale - 1)) * given - (scale - 1) * null
    torch.testing.assert_close(output.reshape(35, 3), expected)


@pytest.mark.parametrize("channels", [1, 2])
def test_guidance_acts_in_its_interval(channels: int) -> None:
    """Inside it is guidance, outside one call with the context: kernels and calls."""
    network, null = Conditional(channels), {"label": 0.0}
    variance = "large" if channels == 1 else "learned"

    def prior(*guidance: Any) -> Diffusion:
        schedule, settings = VariancePreserving([0.3, 0.5]), {"variance": variance}
        if guidance:
            settings["guidance"] = ClassifierFree(*guidance)
        return Diffusion(network, schedule, (3,), 2, **settings)  # type: ignore[arg-type]

    _, low, high = prior().grid.noise.tolist()
    x, label = torch.randn(5, 3), torch.rand(5)
    for interval, inside in {(0.0, low): 1, (low + 1e-6, high): 2}.items():
        limited = prior(3.0, null, interval)
        for t in (1, 2):
            before, calls = network.rows, 2 if t == inside else 1
            found = limited.kernel(x, t, label=label).law
            assert network.rows - before == 5 * calls
            assert limited.calls(t) == calls
            wanted = (prior(3.0, null) if t == inside else prior()).kernel(x, t, label=label).law
            torch.testing.assert_close(found.mean, wanted.mean)
            torch.testing.assert_close(found.variance, wanted.variance)


def test_context_that_is_not_guided_is_given_to_both() -> None:
    prior = guided(2.0, {"label": 0.0})
    x, label, text = torch.randn(5, 3), torch.rand(5), torch.randn(5, 4, 2)
    output = prior.evaluate(x, 1, label=label, text=text)["output"]
    network: Any = prior.network
    time = torch.zeros(5)
    given, null = network(x, time, label, text), network(x, time, 0 * label, text)
    torch.testing.assert_close(output, null + 2 * (given - null))


def test_integer_labels_stay_integers() -> None:
    table = torch.arange(11.0)
    prior = Diffusion(
        lambda x, time, label: x + table[label][:, None],
        VariancePreserving([0.3]),
        (3,),
        1,
        guidance=ClassifierFree(2.0, {"label": 10}),
    )
    x = torch.zeros(2, 3)
    output = prior.evaluate(x, 1, label=torch.tensor([3, 4]))["output"]
    assert output[:, 0].tolist() == [10 + 2 * (3 - 10), 10 + 2 * (4 - 10)]


def test_learned_variances_are_not_guided() -> None:
    prior = guided(3.0, {"label": 0.0}, channels=2, variance="learned")
    x, label = torch.randn(5, 3), torch.rand(5)
    output = prior.evaluate(x, 1, label=label)["output"]
    network: Any = prior.network
    given = network(x, torch.zeros(5), label)
    torch.testing.assert_close(output[:, 3:], given[:, 3:])
    null = network(x, torch.zeros(5), 0 * label)
    torch.testing.assert_close(output[:, :3], (null + 3 * (given - null))[:, :3])


def test_the_digit_network_is_guided() -> None:
    """A trained network whose label 10 says "no label"."""
    plain = digit_prior(10)
    prior = digit_prior(10, guidance=ClassifierFree(3.0, {"label": 10}))
    x, label = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    null = plain.evaluate(x, 5)["output"]
    given = plain.evaluate(x, 5, label=label)["output"]
    output = prior.evaluate(x, 5, label=label)["output"]
    torch.testing.assert_close(output, null + 3 * (given - null))


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
def test_guided_kernels_are_the_prior_in_inference(method: Any) -> None:
    """The same kernel in model and weights, and twice the calls."""
    prior = guided(3.0, {"label": 0.0}, variance="large")

    def program() -> None:
        x = prior("x", label=torch.tensor(0.7))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(3))

    posterior = method(program, num_particles=6, num_runs=2, ess_threshold=0.0).run()
    network: Any = prior.network
    assert bool(posterior.log_evidence.isfinite().all())
    plain = Diffusion(network, VariancePreserving([0.3, 0.5]), (3,), 2, variance="large")
    x, label = torch.randn(8, 3), torch.full((8,), 0.7)
    null, given = (plain.kernel(x, 1, label=c * label).law.mean for c in (0.0, 1.0))
    law = prior.kernel(x, 1, label=label).law
    torch.testing.assert_close(law.mean, null + 3 * (given - null))
    rows = posterior.num_network_calls
    assert rows % 2 == 0
    if method is SMC:
        assert rows == 2 * 12 * 2


# ---------------------------------------------------------------------------------- thresholding


def test_dynamic_thresholding_by_hand() -> None:
    """Quantile 0.75 of five values is the fourth; what lies below the bound is left alone."""
    x0 = torch.tensor([[0.1, -0.2, 4.0, -2.0, 1.0], [0.1, -0.2, 0.3, 5.0, 0.5]])
    ours = DynamicThresholding(0.75)(x0, 1)
    expected = torch.tensor([[0.05, -0.1, 1.0, -1.0, 0.5], [0.1, -0.2, 0.3, 1.0, 0.5]])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_dynamic_thresholding_is_that_of_imagen(quantile: float, bound: float) -> None:
    x0 = 2 * torch.randn(4, 3, 2, 5, 5)
    flat = x0.reshape(4, 3, -1)
    s = torch.quantile(flat.abs(), quantile, -1, keepdim=True).clamp(min=bound)
    expected = (flat.clamp(-s, s) / s * bound).reshape(x0.shape)
    torch.testing.assert_close(DynamicThresholding(quantile, bound)(x0, 3), expected)


def test_estimates_of_one_number_are_thresholded() -> None:
    assert DynamicThresholding()(torch.tensor([[3.0], [0.5]]), 1).tolist() == [[1.0], [0.5]]


@pytest.mark.parametrize("clipping", [(-1.0, 1.0), DynamicThresholding(0.9)])
def test_estimates_are_kept_where_data_can_be(clipping: Any) -> None:
    settings: Any = {"event_shape": (2, 4), "num_steps": 5, "parameterization": "x0"}
    prior = Diffusion(lambda x, time: 3 * x, **settings, clip_denoised=clipping)
    x = torch.randn(6, 2, 4, requires_grad=True)
    denoised = prior.kernel(x, 3).denoised.mean
    free = 3 * x.detach()
    clip = free.clamp(-1, 1) if isinstance(clipping, tuple) else clipping(free, 2)
    torch.testing.assert_close(denoised.detach(), clip)
    assert denoised.abs().max() <= 1 + 1e-6
    denoised.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# -------------------------------------------------------------------------------------- bad input


def network(**options: Any) -> Diffusion:
    settings: Any = {"event_shape": (2,), "num_steps": 2, **options}
    return Diffusion(nn.Identity(), **settings)


LABEL = ClassifierFree(2.0, {"label": 0.0})
SHAPES = ClassifierFree(2.0, {"label": torch.zeros(3)})
ENDS = Tabulated([0.5, 0.0], [0.5, 1.0])
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "name": (lambda: network(parameterization="eps"), "'epsilon', 'x0', 'v', 'score', 'velocity'"),
    "epsilon in pure noise": (lambda: network(schedule=ENDS), "alpha_T > 0 for .*'epsilon'"),
    "score in pure noise": (
        lambda: network(schedule=ENDS, parameterization="score"),
        "alpha_T > 0 for .*'score'",
    ),
    "EDM in pure noise": (
        lambda: network(schedule=ENDS, parameterization="edm"),
        "finite times for the network.*infinite: take another",
    ),
    "velocity without rates": (
        lambda: network(schedule=VariancePreserving(), parameterization="velocity"),
        "a schedule with rates",
    ),
    "sigma_data": (lambda: network(parameterization="edm", sigma_data=0.0), "positive, finite"),
    "time": (lambda: network(time="seconds"), "'sigma'.*'log_snr'.*'c_noise'"),
    "no indices": (
        lambda: network(schedule=RectifiedFlow(), parameterization="x0", time="index", num_steps=9),
        "indices of training steps, for 9 steps; got times up to 1. Scale them",
    ),
    "shape of times": (lambda: network(time=lambda grid: grid.time[1:]), r"with shape \(3,\)"),
    "bounds": (lambda: network(clip_denoised=(1.0, -1.0)), "low < high, .* got"),
    "quantile": (lambda: DynamicThresholding(1.5), "quantile in"),
    "bound": (lambda: DynamicThresholding(bound=0.0), "bound must be a number above 0"),
    "no null": (lambda: ClassifierFree(2.0, {}), "what 'no context' is"),
    "interval": (lambda: ClassifierFree(2.0, {"label": 0}, (3.0, 1.0)), "0 <= low < high, .* got"),
    "no step in the interval": (
        lambda: network(guidance=ClassifierFree(2.0, {"label": 0}, (300.0, 900.0))),
        r"no step lies in the interval.*\(300.0, 900.0\).*which are [\d.]+ to",
    ),
    "exact": (
        lambda: Diffusion(denoiser(), num_steps=2, guidance=LABEL),
        "exact denoiser is not conditional",
    ),
    "no context": (
        lambda: network(guidance=LABEL).evaluate(torch.randn(4, 2), 1),
        r"guidance needs the context \['label'\].*got \[\]",
    ),
    "no tensor": (
        lambda: network(guidance=LABEL).evaluate(torch.randn(4, 2), 1, label="three"),
        r"guidance needs the context \['label'\] as tensors",
    ),
    "shape of null": (
        lambda: network(guidance=SHAPES).evaluate(torch.randn(4, 2), 1, label=torch.ones(4)),
        r"null\['label'\] has shape \(3,\), but one row of the context has \(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(Exception, match=message):
        make()
