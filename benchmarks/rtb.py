r"""Guides that learn: from 25 modes to nine (Venkatraman et al. 2024, arXiv 2405.20971).

    python benchmarks/rtb.py           # 250 updates of 250 trajectories, 50 steps: minutes each
    python benchmarks/rtb.py --full    # 3000 updates of 500 trajectories, 100 steps
    python benchmarks/rtb.py --memory  # memory against steps, one pass and two

The prior makes 25 equal modes {-10, -5, 0, 5, 10}^2 with variance 0.3 out of a Brownian motion with
variance 5 that starts at 0, in Euler steps; its drift is exact. The reward, log p_9 - log p_25,
turns it into nine modes with weights 4, 10, 4, 5, 10, 5, 4, 15, 4. Its evidence would be 1 but for
the Euler steps: so the posterior of the *chain* is what counts, found by 240,000 samples along the
exact drift.

Every guide has the same network (and the reward's gradient), and is then run with 60,000 particles.
Printed are how many of the nine modes it draws, the total variation of the mode weights and sliced
W1, as drawn and after correction by the weights; the evidence lower bound, the learned log Z, and
the error of log Z by the weights; the effective sample size as a share; and millions of network
calls in all updates.
"""

import argparse
import dataclasses
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from metrics import sliced_wasserstein
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from smcdiff import Posterior, Process
from smcdiff.inference import (
    SMC,
    Inflated,
    LinearRamp,
    Noised,
    OnPolicy,
    PriorPaths,
    RelativeTrajectoryBalance,
    ReplayBuffer,
    ResidualLoss,
)
from smcdiff.models import Controlled, Head, Langevin
from smcdiff.process import Kernel, Signal

VARIANCE, NOISE = 0.3, 5.0
CENTRES = torch.cartesian_prod(*[torch.arange(-10.0, 11.0, 5.0)] * 2)
KEPT = [(-10, -5), (-5, -10), (-5, 0), (10, -5), (0, 0), (0, 5), (5, -5), (5, 0), (5, 10)]
COUNTS = [4, 10, 4, 5, 10, 5, 4, 15, 4]
WEIGHTS = torch.zeros(25)
for _mode, _count in zip(KEPT, COUNTS, strict=True):
    WEIGHTS[(torch.tensor(_mode) == CENTRES).all(-1)] = _count / sum(COUNTS)
PRIOR_WEIGHTS = torch.full((25,), 1 / 25)


class Bridge(Process):
    r"""A Brownian motion from 0 that ends in the mixture, with the drift

    .. math:: u_s(x) = \frac{\sigma^2 E[m_k | x] + (v - \sigma^2) x}{v s + \sigma^2 (1 - s)} .
    """

    def __init__(self, weights: Tensor, num_steps: int) -> None:
        self.log_weights, self.num_steps = weights.log(), num_steps
        self.event_shape = torch.Size([2])

    def initial(self, **context: Any) -> Any:
        return dist.Delta(torch.zeros(2), event_dim=1)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tensor:
        s = 1 - t / self.num_steps
        spread = s * VARIANCE + NOISE * (1 - s)
        # squared distances to s m_k over 2 s spread, without what all components share
        logits = (
            self.log_weights + x @ CENTRES.T / spread - s * CENTRES.square().sum(-1) / (2 * spread)
        )
        return (NOISE * logits.softmax(-1) @ CENTRES + (VARIANCE - NOISE) * x) / spread

    def kernel(self, x: Tensor, t: int, evaluation: Any = None, **context: Any) -> Kernel:
        drift = self.evaluate(x, t) if evaluation is None else evaluation
        scale = torch.full_like(x, math.sqrt(NOISE / self.num_steps))
        mean = x + drift / self.num_steps
        law = dist.Normal(mean, scale, validate_args=False).to_event(1)
        return Kernel(law, dist.Delta(x + drift * t / self.num_steps, event_dim=1))

    def signal(self, t: int) -> Signal:
        s = 1 - t / self.num_steps
        return Signal(s, math.sqrt(NOISE * s * (1 - s)), 1.0, 0.0, 0.0)


def log_mixture(x: Tensor, weights: Tensor) -> Tensor:
    kept = weights > 0
    squares = (x[..., None, :] - CENTRES[kept]).square().sum(-1) / (2 * VARIANCE)
    return (weights[kept].log() - squares).logsumexp(-1)


def log_reward(x: Tensor) -> Tensor:
    return log_mixture(x, WEIGHTS) - log_mixture(x, PRIOR_WEIGHTS)


def program(prior: Process, floor: float = -math.inf) -> Callable[[], None]:
    """While a guide learns, a reward has a floor: e^-20 changes no figure, and -200 ruins steps."""

    def model() -> None:
        value = log_reward(prior("x"))
        pyro.factor("reward", torch.logaddexp(value, torch.tensor(floor)))

    return model


class Net(nn.Module):
    """Two hidden layers; x, its estimate of x_0 and the time as waves of several lengths."""

    def __init__(self, num_steps: int, width: int = 128) -> None:
        super().__init__()
        self.num_steps, self.frequencies = num_steps, torch.tensor([0.3, 0.6, 1.2, 2.4])
        self.layers = nn.Sequential(
            nn.Linear(4 + 2 * 4 * 4 + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 4),
        )

    def forward(self, inputs: Tensor, time: Tensor) -> Tensor:
        waves = (inputs[:, :, None] * self.frequencies).flatten(1)
        angles = math.pi * time[:, None] / self.num_steps * torch.arange(8.0)
        features = [inputs / 5, waves.sin(), waves.cos(), angles.cos()]
        return self.layers(torch.cat(features, 1))


# ------------------------------------------------------------------------------------- methods


@dataclasses.dataclass(frozen=True)
class Size:
    updates: int
    batch: int
    steps: int
    samples: int = 60_000


def fading(size: Size, rate: float = 5e-3) -> pyro.optim.PyroOptim:
    """Adam, down to a fiftieth of its rate."""
    last = 0.02 ** (1 / size.updates)
    return pyro.optim.ClippedAdam({"lr": rate, "lrd": last, "clip_norm": 1e9})


def options(name: str, size: Size) -> dict[str, Any]:
    """What makes the methods that balance trajectories."""
    wider = Inflated(LinearRamp(1.5, 1.0, int(0.8 * size.updates)))
    huber = ResidualLoss(huber=3.0)
    every = {"num_particles": size.batch, "max_gradient_norm": 10.0, "evidence_rate": 0.05}
    return (
        every
        | {
            "on-policy": {},
            "VarGrad = policy gradient": {"evidence": "vargrad"},
            "inflated": {"behaviours": [wider], "loss": huber},
            "prior and own paths": {"behaviours": [PriorPaths(), OnPolicy()], "loss": huber},
            "inflated and replay": {
                "behaviours": [wider, Noised(ReplayBuffer(50_000))],
                "loss": huber,
            },
            "policy gradient, inflated": {
                "evidence": "vargrad",
                "behaviours": [wider],
                "loss": ResidualLoss(importance=0.1),
            },
        }[name]
    )


BALANCED = (
    "on-policy",
    "VarGrad = policy gradient",
    "inflated",
    "prior and own paths",
    "inflated and replay",
    "policy gradient, inflated",
)
METHODS = ("exact drift", "prior", "classifier guidance", *BALANCED, "reverse KL")


def guided(prior: Bridge, strength: float) -> Controlled:
    """Classifier guidance: the drift sigma^2 grad log r(x_0-hat(x)), nothing learned."""

    def control(x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            estimate = point + prior.evaluate(point, t) * t / prior.num_steps
            (gradient,) = torch.autograd.grad(log_reward(estimate).sum(), point)
        return strength * math.sqrt(NOISE / prior.num_steps) * gradient.clamp(-10, 10)

    return Controlled(prior, control)


@dataclasses.dataclass
class Trained:
    guide: Callable[[], Any]
    calls: int = 0
    log_z: float = math.nan


def train(name: str, prior: Bridge, size: Size) -> Trained:
    steps = prior.num_steps
    if name == "exact drift":
        return Trained(lambda: Bridge(WEIGHTS, steps)("x"))
    if name == "prior":
        return Trained(lambda: prior("x"))
    if name == "classifier guidance":
        return Trained(lambda: guided(prior, 1.0)("x"))
    head = Langevin(Head(Net(steps)), log_reward, steps, clip=10.0)
    process = Controlled(prior, head)

    def guide() -> None:
        process("x")

    model = program(prior, -20.0)
    if name == "reverse KL":
        loss = Trace_ELBO(size.batch, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(model, guide, fading(size), loss)
        for _ in range(size.updates):
            svi.step()
        return Trained(guide, 2 * size.updates * size.batch * steps)  # model and guide ask apart
    rtb = RelativeTrajectoryBalance(model, guide, fading(size), **options(name, size))
    rtb.run(num_updates=size.updates)
    learned = rtb.log_z is not None
    return Trained(guide, rtb.calls.network, float(rtb.log_evidence) if learned else math.nan)


# ------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass(frozen=True)
class Reference:
    """This chain's own posterior, by many samples along the exact drift."""

    samples: Tensor
    weights: Tensor
    log_z: float


def by_mode(x: Tensor, weights: Tensor) -> Tensor:
    """The weight of each mode, every sample counted at its nearest centre."""
    total = torch.zeros(25, dtype=weights.dtype)
    return total.index_add_(0, torch.cdist(x, CENTRES).argmin(-1), weights)


def weigh(prior: Bridge, guide: Callable[[], Any], number: int) -> tuple[Posterior, Tensor, Tensor]:
    """A run without resampling, its x_0 and its normalised weights."""
    pyro.set_rng_seed(1)
    run = SMC(program(prior), guide, num_particles=number, ess_threshold=0.0).run()
    return run, run.particles.x["x"][0], run.particles.log_weights[0].softmax(-1)


def refer(prior: Bridge, size: Size) -> Reference:
    run, x, weights = weigh(prior, lambda: Bridge(WEIGHTS, prior.num_steps)("x"), 4 * size.samples)
    found, log_z = by_mode(x, weights), float(run.log_evidence)
    apart = float(0.5 * (found - WEIGHTS).abs().sum())
    error = (1 / float(run.particles.ess) - 1 / len(x)) ** 0.5
    print(f"This chain: log Z {log_z:.4f} (error {error:.4f}), mode weights {apart:.3f} from")
    print("those of the nine modes; figures below are against this chain's posterior.\n")
    return Reference(run.resample(size.samples)["x"].reshape(-1, 2), found, log_z)


def row(name: str, prior: Bridge, size: Size, reference: Reference) -> str:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    start = time.perf_counter()
    trained = train(name, prior, size)
    seconds = time.perf_counter() - start
    run, drawn, weights = weigh(prior, trained.guide, size.samples)
    plain = by_mode(drawn, torch.full_like(weights, 1 / len(weights)))
    corrected = run.resample(size.samples)["x"].reshape(-1, 2)
    apart = [
        float(0.5 * (w - reference.weights).abs().sum()) for w in (plain, by_mode(drawn, weights))
    ]
    distances = [sliced_wasserstein(x, reference.samples) for x in (drawn, corrected)]
    kept = int(((plain > 0.2 * WEIGHTS) & (WEIGHTS > 0)).sum())
    return (
        f"| {name} | {kept} | {apart[0]:.3f} | {apart[1]:.3f} | "
        f"{distances[0]:.3f} | {distances[1]:.3f} | "
        f"{float(run.particles.log_weights.mean()):.3f} | {trained.log_z:.3f} | "
        f"{float(run.log_evidence) - reference.log_z:+.3f} | "
        f"{float(run.particles.ess) / size.samples:.3f} | {trained.calls / 1e6:.1f} | "
        f"{seconds:.0f} |"
    )


HEAD = (
    "| guide | modes | TV | TV corrected | SW1 | SW1 corrected | ELBO | learned log Z | error "
    "| ESS | calls, M | s |"
)


def table(size: Size, methods: list[str]) -> None:
    prior = Bridge(PRIOR_WEIGHTS, size.steps)
    reference = refer(prior, size)
    print(f"{HEAD}\n|" + "---|" * HEAD.count(" |"))
    for name in methods:
        print(row(name, prior, size, reference), flush=True)


# --------------------------------------------------------------------------------------- memory


def peak(steps: int, chunk: int | None) -> float:
    """Megabytes that one update of 2000 trajectories adds to the process's peak."""
    prior = Bridge(PRIOR_WEIGHTS, steps)
    process = Controlled(prior, Head(Net(steps, width=256)))
    optim = PyroOptim(torch.optim.Adam, {"lr": 1e-3})
    settings: dict[str, Any] = {"num_particles": 2000, "chunk_steps": chunk}
    rtb = RelativeTrajectoryBalance(program(prior), lambda: process("x"), optim, **settings)
    rtb._prepare((), {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rtb.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory() -> None:
    """Each figure in a process of its own, since a peak does not fall; and freed memory goes back
    to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    print("| steps | one pass, MB | two passes, MB |\n|---|---|---|")
    for steps in (10, 20, 40, 80):
        found = []
        for chunk in ("0", "1"):
            command = [sys.executable, __file__, "--peak", str(steps), chunk]
            run = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            found.append(float(run.stdout))
        print(f"| {steps} | {found[0]:.0f} | {found[1]:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="3000 updates of 500 trajectories")
    parser.add_argument("--updates", type=int, help="another number of them")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--memory", action="store_true", help="memory against steps")
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak(arguments.peak[0], arguments.peak[1] or None))
    elif arguments.memory:
        memory()
    else:
        size = Size(3000, 500, 100) if arguments.full else Size(250, 250, 50)
        if arguments.updates is not None:
            size = dataclasses.replace(size, updates=arguments.updates)
        table(size, arguments.methods)


if __name__ == "__main__":
    main()
