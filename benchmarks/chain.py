r"""A linear-Gaussian chain and a look-ahead, given as tables: the same filter for every library.

The chain is a diffusion of Gaussian data with exact transitions, seen once, at its end,

.. math:: x_T \sim N(0, I), \quad x_{t-1} = k_t \odot x_t + c_t + \sqrt{v_t} \odot z, \quad
          y = a^\top x_0 + N(0, r), \qquad t = T, \dots, 1,

and a bootstrap filter moves particles along it under the weights :math:`\psi_T` and
:math:`\psi_{t-1} / \psi_t`, with :math:`\psi_t(x) = N(y;\, h_t^\top x + e_t,\, s_t)`, the law of y
given :math:`x_t`. Then Z = p(y) exactly, at any number of particles in expectation.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SMCFilter
from torch import Tensor

from smcdiff import Kernel, Process
from smcdiff.inference import SMC
from smcdiff.models import Diffusion, GaussianDenoiser, VariancePreserving
from smcdiff.twist import Twist, TwistValue, View

NOISE = 0.1  # r


@dataclass(frozen=True)
class Chain:
    """The tables, with shapes (T + 1, d) and (T + 1,); those of moves are not used at t = 0."""

    k: Tensor
    c: Tensor
    v: Tensor
    h: Tensor
    e: Tensor
    s: Tensor
    y: Tensor
    log_z: float

    @property
    def num_steps(self) -> int:
        return len(self.k) - 1

    @staticmethod
    def make(num_steps: int, dim: int, seed: int = 0) -> "Chain":
        """Of data with random means and variances, of which the mean element is observed."""
        stream = torch.Generator().manual_seed(seed)
        mean = torch.randn(dim, generator=stream, dtype=torch.float64)
        variance = 0.2 + torch.rand(dim, generator=stream, dtype=torch.float64)
        data = GaussianDenoiser(mean, variance)
        a = torch.full((dim,), 1 / dim, dtype=torch.float64)
        prior = Diffusion(data, VariancePreserving(), num_steps=num_steps, variance="exact")
        zero, probes = torch.zeros(1, dim).double(), torch.eye(dim).double()
        rows = [(zero[0], zero[0], zero[0], a, torch.zeros(()).double(), torch.tensor(NOISE))]
        for t in range(1, num_steps + 1):
            at_zero, at_probes = prior.kernel(zero, t), prior.kernel(probes, t)
            c, e = at_zero.law.mean[0], at_zero.denoised.mean[0]
            k = (at_probes.law.mean - c).diagonal()
            h = (at_probes.denoised.mean - e).diagonal()
            unsure = data.covariance(zero, prior.signal(t).alpha, prior.signal(t).sigma)
            s = NOISE + a @ unsure.reshape(dim, dim) @ a
            rows.append((k, c, at_zero.law.variance[0], a * h, a @ e, s))
        k, c, v, h, e, s = (torch.stack([row[i].double() for row in rows]) for i in range(6))
        law = dist.Normal(e[-1], (s[-1] + h[-1] @ h[-1]).sqrt())
        y = law.mean + 1.5 * law.stddev
        return Chain(k, c, v, h, e, s, y, float(law.log_prob(y)))

    def log_psi(self, x: Tensor, t: int) -> Tensor:
        return dist.Normal(x @ self.h[t] + self.e[t], self.s[t].sqrt()).log_prob(self.y)

    def save(self, path: Path) -> None:
        np.savez(path, **{n: v.numpy() for n, v in vars(self).items() if isinstance(v, Tensor)})


# ------------------------------------------------------------------------------------- smcdiff


class Moves(Process):
    """The chain as a process."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.num_steps, self.event_shape = chain, chain.num_steps, chain.k.shape[1:]

    def initial(self, **context: Any) -> Any:
        return dist.Normal(torch.zeros_like(self.chain.k[0]), 1.0).to_event(1)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tensor:
        return self.chain.k[t] * x + self.chain.c[t]

    def kernel(self, x: Tensor, t: int, evaluation: Any = None, **context: Any) -> Kernel:
        mean = self.evaluate(x, t) if evaluation is None else evaluation
        law = dist.Normal(mean, self.chain.v[t].sqrt()).to_event(1)
        return Kernel(law, dist.Delta(mean, event_dim=1))


class LookAhead(Twist):
    """psi_t."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def evaluate(self, view: View) -> TwistValue:
        return TwistValue(self.chain.log_psi(view.x["x"], view.t))


def with_smcdiff(chain: Chain, particles: int, seed: int) -> tuple[float, float]:
    """log Z and CPU seconds."""
    prior, a = Moves(chain), chain.h[0]

    def program(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(prior("x") @ a, math.sqrt(NOISE)), obs=y)

    pyro.set_rng_seed(seed)
    start = time.process_time()
    posterior = SMC(program, twist=LookAhead(chain), num_particles=particles).run(chain.y)
    seconds = time.process_time() - start
    return float(posterior.log_evidence), seconds


# ---------------------------------------------------------------------------------------- Pyro


class Filtered:
    """Model and guide of Pyro's ``SMCFilter``; log Z, which it does not keep, is collected here."""

    def __init__(self, chain: Chain, is_model: bool) -> None:
        self.chain, self.is_model, self.log_z = chain, is_model, 0.0

    def init(self, state: Any) -> None:
        law = dist.Normal(torch.zeros_like(self.chain.k[0]), 1.0).to_event(1)
        state["x"] = pyro.sample(f"x_{self.chain.num_steps}", law)
        self.see(state, self.chain.log_psi(state["x"], self.chain.num_steps))

    def step(self, state: Any, t: int) -> None:
        chain, x = self.chain, state["x"]
        law = dist.Normal(chain.k[t] * x + chain.c[t], chain.v[t].sqrt()).to_event(1)
        state["x"] = pyro.sample(f"x_{t - 1}", law)
        self.see(state, chain.log_psi(state["x"], t - 1) - chain.log_psi(x, t))

    def see(self, state: Any, log_weight: Tensor) -> None:
        if self.is_model:
            before = state._log_weights
            self.log_z += float((before + log_weight).logsumexp(0) - before.logsumexp(0))
            pyro.factor("weight", log_weight)


class Proposed(Filtered):
    """The guide may not write into the state."""

    def init(self, state: Any) -> None:
        law = dist.Normal(torch.zeros_like(self.chain.k[0]), 1.0).to_event(1)
        pyro.sample(f"x_{self.chain.num_steps}", law)

    def step(self, state: Any, t: int) -> None:
        chain = self.chain
        law = dist.Normal(chain.k[t] * state["x"] + chain.c[t], chain.v[t].sqrt()).to_event(1)
        pyro.sample(f"x_{t - 1}", law)


def with_pyro(chain: Chain, particles: int, seed: int) -> tuple[float, float]:
    """log Z and CPU seconds."""
    pyro.set_rng_seed(seed)
    model = Filtered(chain, True)
    start = time.process_time()
    filtered = SMCFilter(model, Proposed(chain, False), particles, max_plate_nesting=0)
    filtered.init()
    for t in range(chain.num_steps, 0, -1):
        filtered.step(t)
    return model.log_z, time.process_time() - start
