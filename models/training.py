r"""Training of diffusion and flow-matching networks (what they learn: :mod:`.objectives`).

All randomness of step k is a function of ``(seed, k)``: training neither reads nor moves torch's
global stream, and a run continued from a checkpoint repeats the uninterrupted one bit for bit.

Under ``torchrun``, after ``torch.distributed.init_process_group()``, every process takes its share
of each batch: the run is the one of a single process, up to rounding.
"""

import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .checkpoints import (
    check_config,
    check_objective,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    with_prefix,
    write_checkpoint,
)
from .distributed import mean_over_processes, place_among_processes
from .objectives import Objective, Trainable, private_stream, validation_loss

Samples = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run, next to the network, the data and the objective.

    Attributes:
        steps: Number of updates; the learning rate falls to zero over them along a half cosine.
        batch_size: Samples per update, of all processes together.
        learning_rate: Largest learning rate (AdamW).
        warmup: Updates over which the learning rate rises linearly.
        weight_decay: AdamW's.
        ema_decay: Decay of the exponential moving average of the parameters.
        max_gradient_norm: Gradients are scaled down to this norm.
        label_dropout: Probability that a label is replaced by "no label".
        seed: Of all random numbers.
        minutes: If given, a budget of wall-clock time: the learning rate follows whichever of the
            two is spent faster, steps or time, and the run ends with it. Such a run cannot be
            repeated bit for bit.
        mixed_precision: Compute the network in bfloat16 where that is safe (autocast).
        validate_every: Updates between two validations; 0 for none.
        patience: Stop after so many validations without a new best one, and return to that one;
            0 for never.
    """

    steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    max_gradient_norm: float = 1.0
    label_dropout: float = 0.1
    seed: int = 0
    minutes: float | None = None
    mixed_precision: bool = False
    validate_every: int = 0
    patience: int = 0


class DenoisingTrainer:
    """Trains a network; `ema` holds the averaged network, which is the one to use.

    Args:
        network: Called as ``network(x, time, label)``; trained in place.
        data: Training samples, on the network's device.
        labels: Their classes, if the network takes labels.
        config: See :class:`TrainingConfig`.
        augment: Changes a batch at random (with torch's global stream) before noise is added.
        objective: What the network learns (None: v, on the linear-beta schedule; tokens need a
            :class:`~smcdiff.models.masked_objective.MaskedObjective`).
        validation: Samples and their classes, to validate on.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Shaped[Tensor, "sample *event"],
        labels: Int64[Tensor, " sample"] | None = None,
        config: TrainingConfig | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        objective: Trainable | None = None,
        validation: Samples | None = None,
    ) -> None:
        self.network, self.data, self.labels = network, data, labels
        self.ema = copy.deepcopy(network).eval().requires_grad_(False)
        self.best = copy.deepcopy(self.ema)
        self.config, self.augment = config or TrainingConfig(), augment
        self.objective: Trainable = objective or Objective()
        self.validation = validation
        self.rank, self.processes = place_among_processes()
        self.parallel = DistributedDataParallel(network) if self.processes > 1 else network
        self.optimizer = torch.optim.AdamW(
            network.parameters(), weight_decay=self.config.weight_decay
        )
        self.done, self.spent = 0, 0.0
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._check()

    # ------------------------------------------------------------------------------- one update

    def batch(self) -> Samples:
        """Random samples, augmented, and their labels, some of them dropped."""
        chosen = torch.randint(len(self.data), (self.config.batch_size,)).to(self.data.device)
        x0 = self.data[chosen] if self.augment is None else self.augment(self.data[chosen])
        if self.labels is None:
            return x0, None
        dropped = torch.rand(len(chosen)) < self.config.label_dropout
        no_label = int(self.network.num_classes)  # type: ignore[arg-type]
        return x0, self.labels[chosen].masked_fill(dropped.to(x0.device), no_label)

    def loss(self) -> Tensor:
        """The loss of this process's share of the next batch."""
        with private_stream(self.config.seed, self.done):
            x0, label = self.batch()
            level, noise = self.objective.draw(len(x0)), self.objective.noise(x0)
            share = slice(self.rank, None, self.processes)
            noise, label = noise[share].to(x0.device), None if label is None else label[share]
            return self.objective.loss(self._predict, x0[share], level[share], noise, label).mean()

    def _predict(self, *inputs: Any) -> Tensor:
        device = self.data.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.mixed_precision):
            out: Tensor = self.parallel(*inputs)
        return out.to(self.data.dtype) if self.data.is_floating_point() else out.float()

    def step(self) -> float:
        """One update; returns the loss of its batch."""
        start = time.perf_counter()
        self.network.train()
        loss = self.loss()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(
            self.network.parameters(), self.config.max_gradient_norm, error_if_nonfinite=True
        )
        self.optimizer.step()
        self.done += 1
        self.update_average()
        minutes = (time.perf_counter() - start) / 60
        value, minutes = mean_over_processes(loss.item(), minutes)
        self.spent += minutes
        self._losses.append(value)
        return value

    @property
    def share(self) -> float:
        """How much of the budget is gone, up to 1."""
        steps = self.done / self.config.steps
        minutes = self.spent / self.config.minutes if self.config.minutes else 0.0
        return min(1.0, max(steps, minutes))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero at the end of the budget."""
        rise = min(1.0, (self.done + 1) / max(1, self.config.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * self.share))
        return self.config.learning_rate * rise * fall

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the averaged parameters (faster at the beginning); copies the buffers."""
        decay = min(self.config.ema_decay, (1 + self.done) / (10 + self.done))
        for average, value in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            average.lerp_(value, 1 - decay)
        for kept, buffer in zip(self.ema.buffers(), self.network.buffers(), strict=True):
            kept.copy_(buffer)

    # --------------------------------------------------------------------------------- a whole run

    def run(
        self,
        progress: Callable[[int, float], None] | None = None,
        *,
        bar: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_minutes: float = 5.0,
    ) -> None:
        """Runs what remains of the budget.

        Args:
            progress: Called with each step and its loss, after the validation where one is due.
            bar: Show a progress bar.
            checkpoint: A file to save to, every `checkpoint_minutes` and at the end.
            checkpoint_minutes: Of wall-clock time.
        """
        saved = time.monotonic()
        with tqdm(initial=self.done, total=self.config.steps, disable=not bar) as shown:
            while self.share < 1 and not self.stalled:
                loss = self.step()
                if self.config.validate_every and self.done % self.config.validate_every == 0:
                    self.validate()
                shown.update()
                shown.set_postfix(self.history[-1] if self.history else {}, refresh=False)
                if progress is not None:
                    progress(self.done, loss)
                if checkpoint and time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save(checkpoint)
                    saved = time.monotonic()
        if checkpoint:
            self.save(checkpoint)
        if self.config.patience and self.history:
            self.ema.load_state_dict(self.best.state_dict())
        self.network.eval()

    def validate(self) -> None:
        """Adds a row to `history`, and keeps the averaged network if it is the best so far."""
        assert self.validation is not None  # _check
        loss = validation_loss(self.ema, *self.validation, self.objective, num_draws=1)
        if loss < min((row["validation"] for row in self.history), default=math.inf):
            self.best.load_state_dict(self.ema.state_dict())
        train = sum(self._losses) / max(1, len(self._losses))
        self._losses.clear()
        self.history.append(
            {"step": self.done, "minutes": self.spent, "train": train, "validation": loss}
        )

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` validations brought nothing new."""
        losses = [row["validation"] for row in self.history]
        if not self.config.patience or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    # -------------------------------------------------------------------------------- checkpoints

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint (safetensors, its header holds the rest), all or nothing."""
        if self.rank > 0:
            return
        parts = {"network": self.network, "ema": self.ema, "best": self.best}
        tensors = {
            f"{name}.{key}": value
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        }
        tensors |= optimizer_tensors(self.optimizer)
        tensors |= {f"objective.{k}": v for k, v in self.objective.table._asdict().items()}
        header = {
            "config": dataclasses.asdict(self.config),
            "done": self.done,
            "spent": self.spent,
            "history": self.history,
            "losses": self._losses,
        }
        write_checkpoint(path, tensors, header)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint written with the same configuration and objective."""
        tensors, header = read_checkpoint(path)
        check_config(path, header["config"], dataclasses.asdict(self.config))
        check_objective(path, with_prefix(tensors, "objective."), self.objective.table._asdict())
        for name, part in {"network": self.network, "ema": self.ema, "best": self.best}.items():
            part.load_state_dict(with_prefix(tensors, f"{name}."))
        restore_optimizer(self.optimizer, with_prefix(tensors, "optimizer."))
        self.done, self.spent = header["done"], header["spent"]
        self.history, self._losses = header["history"], header["losses"]

    def _check(self) -> None:
        config = self.config
        if config.batch_size % self.processes:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of the {self.processes} "
                "processes, so that all do the same work"
            )
        if (config.validate_every or config.patience) and self.validation is None:
            raise ValueError("validate_every and patience need validation=(samples, labels)")
        if config.patience and not config.validate_every:
            raise ValueError(f"patience={config.patience} needs validate_every, which is 0")
