r"""Denoising score matching on the linear-beta schedule, for :mod:`smcdiff.models.networks`.

Notation: x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, t = 0 .. 999 the training
index. The loss is

.. math:: E \, \| f(x_t, t) - \mathrm{target} \|^2 / d, \qquad
    \mathrm{target} = \epsilon \ \text{or} \ v = \alpha_t \epsilon - \sigma_t x_0,

with t uniform. All randomness of step k is a function of ``(seed, k)``: training neither reads nor
moves torch's global stream, and a run continued from a checkpoint repeats the uninterrupted one bit
for bit.
"""

import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Parameterization = Literal["epsilon", "v"]
NUM_LEVELS = 1000


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run, next to the network and the data.

    Attributes:
        steps: Number of updates; the learning rate falls to zero over them along a half cosine.
        batch_size: Samples per update.
        learning_rate: Largest learning rate (AdamW).
        warmup: Updates over which the learning rate rises linearly.
        weight_decay: AdamW's.
        ema_decay: Decay of the exponential moving average of the parameters.
        max_gradient_norm: Gradients are scaled down to this norm.
        label_dropout: Probability that a label is replaced by "no label".
        parameterization: What the network predicts.
        seed: Of all random numbers.
        minutes: If given, a budget of wall-clock time: the learning rate follows whichever of the
            two is spent faster, steps or time, and the run ends with it. Such a run cannot be
            repeated bit for bit.
    """

    steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    max_gradient_norm: float = 1.0
    label_dropout: float = 0.1
    parameterization: Parameterization = "v"
    seed: int = 0
    minutes: float | None = None


def noise_levels(
    time: Int64[Tensor, " batch"], like: Float[Tensor, "batch *event"]
) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of the linear-beta schedule, shaped to multiply `like`."""
    betas = torch.linspace(1e-4, 0.02, NUM_LEVELS, dtype=torch.float64)
    squared = torch.cumprod(1 - betas, 0)[time.cpu()].reshape(-1, *[1] * (like.ndim - 1))
    return squared.sqrt().to(like), (1 - squared).sqrt().to(like)


def denoising_loss(
    network: nn.Module,
    x0: Float[Tensor, "batch *event"],
    time: Int64[Tensor, " batch"],
    noise: Float[Tensor, "batch *event"],
    label: Int64[Tensor, " batch"] | None = None,
    parameterization: Parameterization = "v",
) -> Float[Tensor, " batch"]:
    """The squared error per element of each sample."""
    alpha, sigma = noise_levels(time, x0)
    target = noise if parameterization == "epsilon" else alpha * noise - sigma * x0
    predicted = network(alpha * x0 + sigma * noise, time.to(x0), label)
    return (predicted - target).square().flatten(1).mean(1)


@contextmanager
def private_stream(seed: int, step: int = 0) -> Iterator[None]:
    """Seeds torch's global stream inside the block and restores it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + step) % 2**32)
        yield


def stratified_times(count: int) -> Int64[Tensor, " count"]:
    """Times that cover all noise levels evenly, in random order of the strata's samples."""
    spread = (
        torch.arange(count, dtype=torch.float64) + torch.rand(count, dtype=torch.float64)
    ) / count
    return (spread * NUM_LEVELS).long().clamp(max=NUM_LEVELS - 1)


@torch.no_grad()
def validation_loss(
    network: nn.Module,
    data: Float[Tensor, "sample *event"],
    labels: Int64[Tensor, " sample"] | None = None,
    parameterization: Parameterization = "v",
    draws: int = 50,
    seed: int = 0,
) -> float:
    """The mean loss over `draws` noise levels per sample, the same ones for every network."""
    total = 0.0
    with private_stream(seed):
        for _ in range(draws):
            order = torch.randperm(len(data))
            time = stratified_times(len(data))[order].to(data.device)
            noise = torch.randn(data.shape, dtype=data.dtype).to(data.device)
            loss = denoising_loss(network, data, time, noise, labels, parameterization)
            total += loss.double().mean().item()
    return total / draws


class DenoisingTrainer:
    """Trains a network; `ema` holds the averaged network, which is the one to use.

    Args:
        network: Called as ``network(x, time, label)``; trained in place.
        data: Training samples, on the network's device.
        labels: Their classes, if the network takes labels.
        config: See :class:`TrainingConfig`.
        augment: Changes a batch at random (with torch's global stream) before noise is added.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Float[Tensor, "sample *event"],
        labels: Int64[Tensor, " sample"] | None = None,
        config: TrainingConfig | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.network = network
        self.ema = copy.deepcopy(network).eval().requires_grad_(False)
        self.data, self.labels = data, labels
        self.config = config or TrainingConfig()
        self.augment = augment
        self.optimizer = torch.optim.AdamW(
            network.parameters(), weight_decay=self.config.weight_decay
        )
        self.done, self.spent = 0, 0.0

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Random samples, augmented, and their labels, some of them dropped."""
        chosen = torch.randint(len(self.data), (self.config.batch_size,)).to(self.data.device)
        x0 = self.data[chosen] if self.augment is None else self.augment(self.data[chosen])
        if self.labels is None:
            return x0, None
        dropped = torch.rand(len(chosen)) < self.config.label_dropout
        no_label = int(self.network.num_classes)  # type: ignore[arg-type]
        return x0, self.labels[chosen].masked_fill(dropped.to(x0.device), no_label)

    @property
    def share(self) -> float:
        """How much of the budget is gone, up to 1."""
        steps = self.done / self.config.steps
        time = self.spent / self.config.minutes if self.config.minutes else 0.0
        return min(1.0, max(steps, time))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero at the end of the budget."""
        rise = min(1.0, (self.done + 1) / max(1, self.config.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * self.share))
        return self.config.learning_rate * rise * fall

    def step(self) -> float:
        """One update; returns the loss of its batch."""
        start = time.perf_counter()
        self.network.train()
        with private_stream(self.config.seed, self.done):
            x0, label = self.batch()
            levels = stratified_times(len(x0)).to(x0.device)
            noise = torch.randn(x0.shape, dtype=x0.dtype).to(x0.device)
            loss = denoising_loss(
                self.network, x0, levels, noise, label, self.config.parameterization
            ).mean()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(
            self.network.parameters(), self.config.max_gradient_norm, error_if_nonfinite=True
        )
        self.optimizer.step()
        self.done += 1
        self.update_average()
        self.spent += (time.perf_counter() - start) / 60
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the averaged parameters (faster at the beginning); copies the buffers."""
        decay = min(self.config.ema_decay, (1 + self.done) / (10 + self.done))
        for average, value in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            average.lerp_(value, 1 - decay)
        for kept, buffer in zip(self.ema.buffers(), self.network.buffers(), strict=True):
            kept.copy_(buffer)

    def run(self, progress: Callable[[int, float], None] | None = None) -> None:
        """Runs the steps that remain; `progress` is called with each step and its loss."""
        while self.share < 1:
            loss = self.step()
            if progress is not None:
                progress(self.done, loss)
        self.network.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint (safetensors, its header holds the rest), all or nothing."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        header = {"config": json.dumps(dataclasses.asdict(self.config)), "done": str(self.done)}
        header["spent"] = repr(self.spent)
        partial = Path(f"{os.fspath(path)}.partial")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, header)
        partial.replace(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint that was written with the same configuration."""
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved, current = json.loads(header["config"]), dataclasses.asdict(self.config)
        different = [name for name in current if saved.get(name) != current[name]]
        if different:
            raise ValueError(
                f"{path} was written with another configuration: "
                + ", ".join(f"{name}={saved.get(name)!r}" for name in different)
                + "; pass a TrainingConfig with these values to continue it"
            )
        self.network.load_state_dict(with_prefix(tensors, "network."))
        self.ema.load_state_dict(with_prefix(tensors, "ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in with_prefix(tensors, "optimizer.").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.done, self.spent = int(header["done"]), float(header.get("spent", 0.0))


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, under the rest of their names."""
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
