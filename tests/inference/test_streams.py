"""Random streams: those of a device are kept and put back; resumed runs go where they lay."""

import pyro
import pytest
import torch

from smcdiff import Particles
from smcdiff.inference import SMC
from smcdiff.inference.streams import restore_streams, stream_states
from smcdiff.models import Diffusion, GaussianDenoiser

CUDA = torch.device("cuda", 0)


@pytest.fixture
def device_stream(monkeypatch):
    """A device's stream on a machine without one: a single number that is its state."""
    stream = {CUDA: torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: stream[device].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: stream.update({device: state})
    )
    return stream


def test_streams_of_the_cpu_and_of_a_device_are_put_back(device_stream):
    states, expected = stream_states(CUDA), torch.rand(3)
    device_stream[CUDA] = torch.tensor([9], dtype=torch.uint8)
    restore_streams(states, CUDA)
    assert device_stream[CUDA].item() == 7
    assert torch.rand(3).equal(expected)


def test_without_the_device_only_the_cpu_is(device_stream):
    assert set(stream_states(torch.device("cpu"))) == {"cpu"}
    states = stream_states(CUDA)
    device_stream[CUDA] = torch.tensor([9], dtype=torch.uint8)
    restore_streams(states, torch.device("cpu"))
    assert device_stream[CUDA].item() == 9


def test_a_checkpoint_is_read_to_the_device_of_the_program(tmp_path, monkeypatch):
    prior = Diffusion(GaussianDenoiser(torch.zeros(1), 1.0), num_steps=2)
    method = SMC(lambda: pyro.factor("reward", prior("x")[..., 0]), num_particles=3)
    assert method.engine().program.device == torch.device("cpu")
    next(method.iterate()).save(tmp_path / "run")
    load, devices = Particles.load, []
    monkeypatch.setattr(
        Particles, "load", lambda path, device: devices.append(device) or load(path, device)
    )
    method.run(checkpoint=tmp_path / "run", resume=True)
    assert devices == [torch.device("cpu")]
