"""Decoders in programs: chunked, computed again for gradients, and right under any plates."""

import os
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models.adapters import Decoder, decoder_from_diffusers, from_diffusers

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Counting(nn.Module):
    """A decoder that counts its calls and the rows of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rows = nn.Conv2d(2, 3, 3, padding=1), list[int]()

    def forward(self, z: Tensor) -> Tensor:
        self.rows.append(len(z))
        out: Tensor = nn.functional.interpolate(self.layer(z).tanh(), scale_factor=2.0)
        return out


@pytest.fixture
def network() -> Counting:
    torch.manual_seed(0)
    return Counting()


def test_chunks_change_nothing_but_memory(network: Counting) -> None:
    z = torch.randn(5, 2, 2, 4, 4)
    whole = Decoder(network, chunk_size=10)(z)
    network.rows.clear()
    parts = Decoder(network, chunk_size=4)(z)
    assert network.rows == [4, 4, 2]
    assert parts.shape == (5, 2, 3, 8, 8)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts[3, 1], network(z[3, 1][None])[0])


def test_gradients_are_those_of_the_network(network: Counting) -> None:
    """And activations are not kept: every chunk is called a second time on the way back."""
    z = torch.randn(6, 2, 4, 4, requires_grad=True)
    expected = torch.autograd.grad(network(z).square().sum(), z)[0]
    decode = Decoder(network, chunk_size=4)
    network.rows.clear()
    total = decode(z).square().sum()
    assert network.rows == [4, 2]
    torch.testing.assert_close(torch.autograd.grad(total, z)[0], expected)
    assert sorted(network.rows) == [2, 2, 4, 4]
    with torch.no_grad():
        network.rows.clear()
        decode(z)
        assert network.rows == [4, 2]


def test_decoder_is_frozen_and_keeps_the_dtype_of_states(network: Counting) -> None:
    decode = Decoder(network.half())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert decode(torch.randn(1, 2, 4, 4)).dtype == torch.float32
    assert Decoder(lambda z: z.square(), latent_dim=1)(torch.ones(3).double()).shape == (3,)


def test_empty_chunks_are_refused(network: Counting) -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Decoder(network, chunk_size=0)


# -------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip(
        "diffusers", reason="needs diffusers: pip install 'smcdiff[diffusers]'"
    )


def autoencoder(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        sample_size=8,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def unet(diffusers: Any, channels: int) -> Any:
    """Predicts v, and little of it: almost the denoiser of N(0, I), for which v = 0."""
    torch.manual_seed(1)
    shape = {"sample_size": 4, "in_channels": channels, "out_channels": channels}
    layers = {"layers_per_block": 1, "block_out_channels": (4,), "norm_num_groups": 2}
    if channels == 1:
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        network = diffusers.UNet2DModel(**shape, **layers, **blocks, attention_head_dim=2)
    else:
        network = diffusers.UNet2DConditionModel(
            **shape,
            **layers,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=6,
            attention_head_dim=2,
        )
    with torch.no_grad():
        for parameter in network.conv_out.parameters():
            parameter *= 0.1
    return network


@pytest.mark.parametrize(
    ("options", "undo"),
    [
        ({"scaling_factor": 0.2}, lambda z: z / 0.2),
        ({"scaling_factor": 0.5, "shift_factor": 0.3}, lambda z: z / 0.5 + 0.3),
        (
            {"scaling_factor": 0.5, "latents_mean": (1.0, 2.0), "latents_std": (3.0, 4.0)},
            lambda z: torch.stack([z[:, 0] * 6.0 + 1.0, z[:, 1] * 8.0 + 2.0], 1),
        ),
    ],
)
def test_latents_are_scaled_as_in_pipelines(
    options: dict[str, Any], undo: Any, diffusers: Any, tmp_path: Path
) -> None:
    network = autoencoder(diffusers, **options)
    network.save_pretrained(tmp_path / "vae")
    z = torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        expected = network.decode(undo(z)).sample
    for source in (network, tmp_path, tmp_path / "vae"):
        torch.testing.assert_close(decoder_from_diffusers(source, chunk_size=2)(z), expected)


# ------------------------------------------------------------------------------------ end to end


def agree(twisted: Any, plain: Any, y: Tensor) -> None:
    """Both estimate one evidence: the z-score of their means over runs."""
    pyro.set_rng_seed(0)
    one, two = twisted.run(y).log_evidence.exp(), plain.run(y).log_evidence.exp()
    error = (one.var() / len(one) + two.var() / len(two)).sqrt()
    assert abs((one.mean() - two.mean()) / error) < 4.3
    assert one.std() < two.std()


def test_pixel_model_is_a_prior(diffusers: Any, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    diffusers.DDPMPipeline(unet(diffusers, 1), scheduler).save_pretrained(tmp_path)
    prior = from_diffusers(tmp_path, num_steps=4)

    def program(y: Tensor) -> None:
        x = prior("x")
        pyro.sample("y", dist.Normal(x[..., :2, 0], 0.3).to_event(2), obs=y)

    y = torch.tensor([[0.5, -0.5]])
    agree(
        TwistedSMC(program, num_particles=64, num_runs=8),
        SMC(program, num_particles=64, num_runs=8),
        y,
    )


def test_latent_model_is_a_prior_of_images(diffusers: Any, tmp_path: Path) -> None:
    """Particles live in latents, the program sees images, under a text-like context."""
    unet(diffusers, 2).save_pretrained(tmp_path / "unet")
    autoencoder(diffusers, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        beta_schedule="scaled_linear",
    )
    scheduler.save_pretrained(tmp_path / "scheduler")
    prior = from_diffusers(tmp_path, num_steps=3, eta=1.0)
    decode = decoder_from_diffusers(tmp_path, chunk_size=64)
    prompt = torch.randn(5, 6)

    def program(y: Tensor) -> None:
        z = prior("z", encoder_hidden_states=prompt)
        image = decode(z)
        assert image.shape[-3:] == (1, 8, 8)
        pyro.sample("y", dist.Normal(image[..., :3, 4], 0.05).to_event(2), obs=y)

    y = torch.full((1, 3), 0.1)
    twisted = TwistedSMC(program, proposal="gradient", num_particles=32, num_runs=8)
    agree(twisted, SMC(program, num_particles=32, num_runs=8), y)
