"""A run that is made to last: the test of resuming starts this file, kills it, and goes on.

Run as a program, it stops at a step of its choice and waits there to be killed.
"""

import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from smcdiff.inference import Rejuvenation, TwistedSMC
from smcdiff.models import Diffusion, GaussianDenoiser

Y = torch.tensor([1.0, -0.5])


class Network:
    """A network that pauses once it is asked about a certain time."""

    def __init__(self, pause_at: float | None) -> None:
        self.pause_at = pause_at
        self.denoiser = GaussianDenoiser(torch.tensor([0.3, -0.3]), 0.8)

    def __call__(self, x, time_, label):
        if self.pause_at is not None and len(x) > 3 and float(time_[0]) <= self.pause_at:
            print("waiting", flush=True)
            time.sleep(60)
        return x - self.denoiser.mean(x, 0.5, 0.5) + 0.1 * label[:, None]


def method(pause_at: float | None = None) -> TwistedSMC:
    """Latents, a context that all particles share, one of their own, and moves between steps."""
    prior = Diffusion(Network(pause_at), event_shape=(2,), num_steps=10)

    def program(y, label):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        x = prior("x", label=label)
        v = prior("v", label=z)
        pyro.sample("y", dist.Normal(x + v, 0.1 + scale[..., None]).to_event(1), obs=y)

    moves = Rejuvenation("random_walk", names=["scale"])
    return TwistedSMC(program, covariance="scalar", num_particles=6, num_runs=2, rejuvenation=moves)


def run(checkpoint: Path | None, pause_at: float | None = None, resume: bool = False):
    """The particles at t = 0."""
    pyro.set_rng_seed(11)
    label = torch.tensor(1.0)
    options = {"checkpoint": checkpoint, "checkpoint_every": 1, "resume": resume}
    return method(pause_at).run(Y, label, **options).particles


if __name__ == "__main__":
    run(Path(sys.argv[1]), pause_at=float(sys.argv[2]))
