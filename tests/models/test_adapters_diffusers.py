"""Models of diffusers: transitions equal to the schedulers' own steps, with the same noise."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smcdiff.models import ClassifierFree, Flow
from smcdiff.models.adapters import Scheduled, from_diffusers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip(
    "diffusers", reason="needs diffusers: pip install 'smcdiff[diffusers]'"
)
DDPM, DDIM = diffusers.DDPMScheduler, diffusers.DDIMScheduler
EULER, SOLVER = diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler

SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
}


def unet(**options: Any) -> Any:
    """A U-Net with random weights, loaded from where it was saved."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DModel(**SMALL, **blocks, **{"out_channels": 1, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``one``, ``two`` (learned variances) and ``labels`` (class-conditional)."""
    path = tmp_path_factory.mktemp("models")
    for name, options in {
        "one": {},
        "two": {"out_channels": 2},
        "labels": {"num_class_embeds": 3},
    }.items():
        unet(**options).save_pretrained(path / name)
    return path


@pytest.fixture
def double() -> Any:
    """Networks and states in float64, where rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_float64(scheduler: Any) -> None:
    """Lets diffusers' own code run on the same tables in float64."""
    for name in ("alphas_cumprod", "one", "final_alpha_cumprod", "sigmas"):
        if isinstance(table := getattr(scheduler, name, None), Tensor):
            setattr(scheduler, name, table.double())


def disagreement(
    process: Any, network: Any, scheduler: Any, num_steps: int, dtype: torch.dtype, **options: Any
) -> float:
    """The largest difference to `scheduler.step` along one path; relative, if states exceed 1."""
    scheduler.set_timesteps(num_steps)
    if dtype == torch.float64:
        in_float64(scheduler)
    shape = (2, *process.event_shape)
    x = torch.randn(shape, dtype=dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    assert process.num_steps == len(scheduler.timesteps)
    worst = 0.0
    for i, time in enumerate(scheduler.timesteps):
        law = process.kernel(x, process.num_steps - i).law
        scales = getattr(scheduler, "scale_model_input", lambda x, time: x)
        with torch.no_grad():
            output = network(scales(x, time).to(dtype), time).sample
        noise = {"generator": torch.Generator().manual_seed(i)}
        theirs = scheduler.step(output, time, x, **noise, **options).prev_sample
        like = torch.float32 if isinstance(scheduler, FLOW) else dtype  # flows are cast to it
        z = torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=like)
        ours = law.mean + law.variance.sqrt() * z
        size = max(theirs.abs().max().item(), 1.0)
        worst = max(worst, (ours - theirs).abs().max().item() / size)
        x = theirs.to(dtype)
    return worst


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"DDPM {spacing} {kind} {prediction}": (
            lambda spacing=spacing, kind=kind, prediction=prediction: DDPM(
                variance_type=kind, timestep_spacing=spacing, prediction_type=prediction
            ),
            {},
        )
        for spacing in SPACINGS
        for kind, prediction in zip(
            ("fixed_small", "fixed_large", "fixed_small_log"), PREDICTIONS, strict=True
        )
    },
    **{
        f"DDIM {spacing} {eta} {prediction}": (
            lambda spacing=spacing, prediction=prediction: DDIM(
                timestep_spacing=spacing, prediction_type=prediction
            ),
            {"eta": eta},
        )
        for spacing in SPACINGS
        for eta, prediction in zip((0.0, 0.4, 1.0), PREDICTIONS, strict=True)
    },
    "DDPM unclipped": (lambda: DDPM(clip_sample=False, beta_schedule="scaled_linear"), {}),
    "DDPM clipped at 3": (lambda: DDPM(clip_sample_range=3.0), {}),
    "DDPM offset": (lambda: DDPM(steps_offset=1, variance_type="fixed_large"), {}),
    "DDPM cosine": (lambda: DDPM(beta_schedule="squaredcos_cap_v2"), {}),
    "DDPM own betas": (lambda: DDPM(1000, trained_betas=[1e-3] * 500 + [0.02] * 500), {}),
    "DDPM thresholding": (lambda: DDPM(thresholding=True, sample_max_value=1.5), {}),
    "DDPM thresholding, at 1": (lambda: DDPM(thresholding=True), {}),
    "DDIM offset": (lambda: DDIM(steps_offset=1, clip_sample=False), {"eta": 1.0}),
    "DDIM alpha_0 below 1": (
        lambda: DDIM(set_alpha_to_one=False, steps_offset=1, clip_sample=False),
        {"eta": 0.7},
    ),
    "DDIM ends where it is": (lambda: DDIM(set_alpha_to_one=False), {"eta": 1.0}),
    "DDIM thresholding": (lambda: DDIM(thresholding=True, sample_max_value=1.5), {"eta": 0.5}),
    "DDIM zero SNR": (
        lambda: DDIM(
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
        ),
        {"eta": 0.6},
    ),
    "DDPM zero SNR": (
        lambda: DDPM(
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        {},
    ),
    "EDM Euler": (EULER, {}),
    "EDM Euler, v, exponential": (
        lambda: EULER(prediction_type="v_prediction", sigma_schedule="exponential"),
        {},
    ),
    "EDM Euler, last sigma": (lambda: EULER(final_sigmas_type="sigma_min", sigma_data=1.0), {}),
    "EDM solver": (lambda: SOLVER(solver_order=1), {}),
    "EDM solver, SDE": (lambda: SOLVER(solver_order=1, algorithm_type="sde-dpmsolver++"), {}),
    "EDM solver, thresholding": (
        lambda: SOLVER(solver_order=1, thresholding=True, sample_max_value=1.5),
        {},
    ),
    "flow": (FLOW, {}),
    "flow, shifted": (lambda: FLOW(shift=3.0), {}),
    "flow, Karras": (lambda: FLOW(use_karras_sigmas=True), {}),
    "flow, fresh noise": (lambda: FLOW(stochastic_sampling=True), {}),
}


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("case", CASES)
def test_transitions_are_those_of_the_scheduler(
    case: str, num_steps: int, folder: Path, double: None
) -> None:
    make, options = CASES[case]
    network = diffusers.UNet2DModel.from_pretrained(folder / "one", low_cpu_mem_usage=False)
    process = from_diffusers(network.double(), make(), num_steps, **options)
    found = disagreement(process, network, make(), num_steps, torch.float64, **options)
    rounds = case.startswith(("flow", "EDM Euler"))  # these steps cast to float32
    assert found < (1e-6 if rounds else 1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 7, 30])
def test_learned_variances_are_those_of_the_scheduler(
    num_steps: int, spacing: str, folder: Path, double: None
) -> None:
    scheduler = DDPM(variance_type="learned_range", timestep_spacing=spacing)
    network = diffusers.UNet2DModel.from_pretrained(folder / "two", low_cpu_mem_usage=False)
    process = from_diffusers(network.double(), scheduler, num_steps)
    assert disagreement(process, network, scheduler, num_steps, torch.float64) < 1e-9


@pytest.mark.parametrize(
    "case", ["DDPM leading fixed_small epsilon", "DDIM leading 0.4 sample", "EDM solver, SDE"]
)
def test_transitions_in_float32_as_they_are(case: str, folder: Path) -> None:
    make, options = CASES[case]
    make().save_pretrained(folder / case)
    process = from_diffusers(folder / "one", folder / case, 10, **options)
    network = diffusers.UNet2DModel.from_pretrained(folder / "one", low_cpu_mem_usage=False)
    assert disagreement(process, network, make(), 10, torch.float32, **options) < 1e-6


# --------------------------------------------------------------------------------------- context


class Conditional:
    """A U-Net under a context, called as diffusers calls its own."""

    def __init__(self, network: Any, **context: Any) -> None:
        self.network, self.context = network, context

    def __call__(self, x: Tensor, time: Tensor) -> Any:
        return self.network(x, time, **self.context)


def conditional(**options: Any) -> Any:
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        **{**SMALL, "in_channels": 2},
        out_channels=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        **options,
    )


def test_labels_are_context(folder: Path, double: None) -> None:
    network = unet(num_class_embeds=3).double()
    labels = torch.tensor([2, 0])
    process = from_diffusers(network, DDPM(), 4)
    given = Given(process, class_labels=labels)
    theirs = Conditional(network, class_labels=labels)
    assert disagreement(given, theirs, DDPM(), 4, torch.float64) < 1e-9


class Given:
    """A process with its context."""

    def __init__(self, process: Any, **context: Any) -> None:
        self.process, self.context = process, context
        self.num_steps, self.event_shape = process.num_steps, process.event_shape

    def kernel(self, x: Tensor, t: int) -> Any:
        return self.process.kernel(x, t, **self.context)


def test_embeddings_are_context(double: None) -> None:
    network = conditional(num_class_embeds=3).double()
    context = {
        "encoder_hidden_states": torch.randn(2, 5, 6),
        "class_labels": torch.tensor([1, 2]),
    }
    given = Given(from_diffusers(network, DDIM(), 3, eta=1.0), **context)
    theirs = Conditional(network, **context)
    assert disagreement(given, theirs, DDIM(), 3, torch.float64, eta=1.0) < 1e-9


def test_one_embedding_serves_all_particles() -> None:
    process = from_diffusers(conditional(), DDPM(), 3)
    one, x = torch.randn(5, 6), torch.randn(4, 2, 2, 8, 8)
    shared = process.kernel(x, 2, encoder_hidden_states=one).law
    each = process.kernel(x, 2, encoder_hidden_states=one.expand(4, 2, 5, 6)).law
    torch.testing.assert_close(shared.mean, each.mean)
    assert shared.batch_shape == (4, 2)


def test_added_conditions_are_collected(double: None) -> None:
    """Those of SDXL, which its U-Net wants in a dictionary."""
    options = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 3 + 2 * 2,
    }
    network = conditional(**options).double()
    states = torch.randn(2, 5, 6)
    added = {"text_embeds": torch.randn(2, 3), "time_ids": torch.randn(2, 2)}
    process = from_diffusers(network, DDPM(), 3)
    given = Given(process, encoder_hidden_states=states, **added)
    theirs = Conditional(network, encoder_hidden_states=states, added_cond_kwargs=added)
    assert disagreement(given, theirs, DDPM(), 3, torch.float64) < 1e-9


def test_guidance_is_that_of_the_network_output(double: None) -> None:
    network = conditional().double()
    states, empty = torch.randn(2, 5, 6), torch.zeros(5, 6)
    guidance = ClassifierFree(3.0, {"encoder_hidden_states": empty})
    process = from_diffusers(network, DDIM(clip_sample=False), 3, eta=1.0, guidance=guidance)

    class Guided:
        def __call__(self, x: Tensor, time: Tensor) -> Any:
            out = network(x, time, states)
            null = network(x, time, empty.expand(2, 5, 6)).sample
            out.sample = null + 3.0 * (out.sample - null)
            return out

    given = Given(process, encoder_hidden_states=states)
    found = disagreement(given, Guided(), DDIM(clip_sample=False), 3, torch.float64, eta=1.0)
    assert found < 1e-9
    assert process.calls(2) == 2


def test_guidance_of_a_flow_is_that_of_its_velocity(double: None) -> None:
    network, empty = conditional().double(), torch.zeros(5, 6)
    x, states = torch.randn(2, 2, 8, 8), torch.randn(2, 5, 6)
    guidance = ClassifierFree(3.0, {"encoder_hidden_states": empty})
    guided = from_diffusers(network, FLOW(), 3, guidance=guidance)
    plain = from_diffusers(network, FLOW(), 3)
    found = guided.evaluate(x, 2, encoder_hidden_states=states)["velocity"]
    own = plain.evaluate(x, 2, encoder_hidden_states=states)["velocity"]
    null = plain.evaluate(x, 2, encoder_hidden_states=empty.expand(2, 5, 6))["velocity"]
    torch.testing.assert_close(found, null + 3.0 * (own - null))
    assert guided.calls(2) == 2


def test_half_precision_network_has_float32_densities() -> None:
    network = unet().to(torch.bfloat16)
    process = from_diffusers(network, DDPM(), 3)
    law = process.kernel(torch.randn(2, 1, 8, 8), 3).law
    assert law.mean.dtype == torch.float32
    assert law.log_prob(law.sample()).isfinite().all()


# -------------------------------------------------------------------------------------- schedulers


def test_flow_becomes_an_sde_on_request(double: None) -> None:
    """With the same marginals: the memoryless one has no noise in its last step only."""
    process = from_diffusers(unet().double(), FLOW(), 4, noise="memoryless")
    assert isinstance(process, Flow)
    x = torch.randn(2, 1, 8, 8)
    deviations = [process.kernel(x, t).law.variance.max().item() for t in (1, 2, 3, 4)]
    assert deviations[0] == 0
    assert min(deviations[1:]) > 0
    assert from_diffusers(unet().double(), FLOW(), 4).deterministic


def test_time_steps_that_are_set_are_kept(double: None) -> None:
    """Such as those of dynamic shifting, and of a stretched schedule."""
    scheduler = FLOW(use_dynamic_shifting=True, shift_terminal=0.1)
    scheduler.set_timesteps(5, mu=0.8)
    process = from_diffusers(unet().double(), scheduler, None)
    times = scheduler.sigmas.double()[:-1].flip(0)
    torch.testing.assert_close(process.grid.time[1:], times)
    custom = DDPM()
    custom.set_timesteps(timesteps=[900, 300, 20])
    kept = from_diffusers(unet().double(), custom, None)
    assert isinstance(kept, Scheduled)
    assert kept.base.times.tolist() == [0, 20, 300, 900]


def test_scheduler_is_left_alone() -> None:
    scheduler = DDPM()
    before = scheduler.timesteps.clone()
    from_diffusers(unet(), scheduler, 5)
    assert torch.equal(scheduler.timesteps, before)


def test_start_is_that_of_the_scheduler() -> None:
    assert from_diffusers(unet(), DDPM(), 3).initial().stddev.unique().item() == 1
    start = from_diffusers(unet(), EULER(sigma_max=30.0), 3).initial()
    assert start.stddev.unique().item() == pytest.approx(EULER(sigma_max=30.0).init_noise_sigma)


def test_chain_knows_its_own_variance(double: None) -> None:
    """v_t = v_(t-1) + slope_(t-1)^2 V_t, with the scheduler's V; none without noise."""
    process = from_diffusers(unet().double(), DDIM(clip_sample=False), 4, eta=0.5, scale=0.7)
    assert isinstance(process, Scheduled)
    variance = 0.0
    for t in range(1, 5):
        variance += process.signal(t - 1).slope ** 2 * process.steps[t - 1].variance
        assert process.signal(t).variance == pytest.approx(variance)
    assert from_diffusers(unet(), DDIM(), 4).deterministic
    assert from_diffusers(unet(), DDIM(), 4).signal(3).variance == 0


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "another scheduler": (
        diffusers.PNDMScheduler,
        {},
        "PNDMScheduler is not supported.*DDIMScheduler.from_config",
    ),
    "a second-order solver": (SOLVER, {}, "solver_order=2 depends on earlier.*solver_order=1"),
    "a root of a logarithm": (
        lambda: DDPM(variance_type="fixed_large_log"),
        {},
        "'fixed_large_log' is not supported",
    ),
    "eta where there is none": (DDPM, {"eta": 0.5}, "no eta, got 0.5"),
    "eta above 1": (DDIM, {"eta": 1.5}, "between 0 and 1, got 1.5"),
    "eta of a flow": (FLOW, {"eta": 0.5}, "a flow has no eta"),
    "noise of a diffusion": (DDIM, {"noise": 1.0}, "noise is that of a flow"),
    "data at 1": (lambda: FLOW(invert_sigmas=True), {}, "invert_sigmas"),
    "an estimate that EDM lacks": (
        lambda: SOLVER(solver_order=1, prediction_type="sample"),
        {},
        "prediction_type='sample' is not supported",
    ),
    "noise says nothing about data": (
        lambda: DDPM(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        {},
        "alpha_T = 0",
    ),
    "beyond training": (
        lambda: DDPM(10, steps_offset=1),
        {"num_steps": 10},
        "do not lie within the 10 of training",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_gaussian_steps_is_refused(case: str) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        from_diffusers(unet(), make(), **{"num_steps": 4, **options})


def test_unfit_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="does not say how it is sampled"):
        from_diffusers(unet())
    with pytest.raises(ValueError, match="a model, a pipeline"):
        from_diffusers(object(), DDPM())
    bare = unet()
    bare.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="give event_shape"):
        from_diffusers(bare, DDPM())
    scheduler = DDIM()
    with pytest.raises(ValueError, match="set_timesteps"):
        from_diffusers(unet(), scheduler, None)
