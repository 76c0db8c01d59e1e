r"""What the engine costs: time over that of the bare network calls, and memory.

    python benchmarks/overhead.py            # (c) time and (d) memory
    python benchmarks/overhead.py --time     # (c) only
    python benchmarks/overhead.py --memory   # (d) only

(c) Wall time of a run over the wall time of the same network calls (and backward passes) made in a
bare loop, in the same process, alternating; the median of the ratios. (d) Peak resident memory of a
run above that before it, by number of steps and by number of particles at a fixed chunk size.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import Diffusion
from smcdiff.models.networks import ResidualMLP, UNet

Method = SMC | TwistedSMC


class Convolutional(nn.Module):
    """A plain U-Net-sized stack of about 1 M parameters on 28 x 28 images (random weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet(1, (64, 128), heads=0)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.net(x, time)
        return out


def image_prior(num_steps: int) -> Diffusion:
    bounds = (-1.0, 1.0)  # random weights would diverge
    return Diffusion(
        Convolutional(), event_shape=(1, 28, 28), num_steps=num_steps, clip_denoised=bounds
    )


def vector_prior(num_steps: int, features: int = 80) -> Diffusion:
    network = ResidualMLP(features, width=512, depth=3)
    return Diffusion(network, event_shape=(features,), num_steps=num_steps)


def problem(prior: Diffusion) -> Callable[[Tensor], None]:
    """Half of the elements observed with noise .5."""
    event_dim = len(prior.event_shape)

    def model(y: Tensor) -> None:
        x = prior("x").flatten(-event_dim)
        pyro.sample("y", dist.Normal(x[..., ::2], 0.5).to_event(1), obs=y)

    return model


def bare(prior: Diffusion, particles: int, gradient: bool) -> None:
    """The network calls of a run (and one backward pass each), and nothing else."""
    for t in range(prior.num_steps, 0, -1):
        x = torch.randn(particles, *prior.event_shape)
        with torch.set_grad_enabled(gradient):
            x.requires_grad_(gradient)
            out = prior.evaluate(x, t)["output"]
            if gradient:
                torch.autograd.grad(out.sum(), x)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_table(repeats: int, num_steps: int) -> None:
    print(f"{'prior':32s} {'particles':>9s} {'method':>16s} {'ratio':>6s}   (range)")
    cases = [
        ("convolutional, 1x28x28", image_prior(num_steps), 64),
        ("residual MLP 512x3, d=80", vector_prior(num_steps), 1000),
    ]
    for name, prior, particles in cases:
        size = sum(p.numel() for p in prior.network.parameters())  # type: ignore[attr-defined]
        y = torch.zeros(prior.event_shape.numel() // 2)
        for label, gradient in (("bootstrap", False), ("twisted", True)):
            ratios = []
            engine = (
                TwistedSMC(problem(prior), num_particles=particles, proposal="gradient")
                if gradient
                else SMC(problem(prior), num_particles=particles)
            )
            for _ in range(repeats + 1):
                whole = seconds(lambda m=engine, o=y: m.run(o))  # type: ignore[misc]
                calls = seconds(lambda p=prior, n=particles, g=gradient: bare(p, n, g))  # type: ignore[misc]
                ratios.append(whole / calls)
            ratios = ratios[1:]
            print(
                f"{f'{name} ({size / 1e6:.2f} M)':32s} {particles:9d} {label:>16s} "
                f"{statistics.median(ratios):6.2f}   ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def peak_of_one_run(num_steps: int, particles: int, chunk_size: int) -> None:
    """Prints the peak memory of one run in MB, above that of the imports (in its own process)."""
    prior = image_prior(num_steps)
    y = torch.zeros(prior.event_shape.numel() // 2)
    method = TwistedSMC(
        problem(prior), num_particles=particles, chunk_size=chunk_size, proposal="gradient"
    )
    before = peak_memory()
    method.run(y)
    print(peak_memory() - before)


def peak_memory() -> float:
    """The largest resident memory so far in MB (of this program: getrusage knows its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory_table() -> None:
    print(f"\n{'steps':>6s} {'particles':>9s} {'chunk':>6s} {'peak MB':>8s} {'state MB':>9s}")
    for steps, particles in ((5, 64), (10, 64), (40, 64), (5, 128), (5, 512)):
        arguments = ["--one", str(steps), str(particles), "32"]
        out = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        )
        state = particles * 28 * 28 * 4 * 2 / 2**20
        print(
            f"{steps:6d} {particles:9d} {32:6d} {float(out.stdout):8.0f} {state:9.1f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--time", action="store_true", help="only the time table")
    parser.add_argument("--memory", action="store_true", help="only the memory table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        peak_of_one_run(*arguments.one)
        return
    if not arguments.memory:
        time_table(arguments.repeats, arguments.steps)
    if not arguments.time:
        memory_table()


if __name__ == "__main__":
    main()
