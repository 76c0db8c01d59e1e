"""Checkpoints of a training run: one safetensors file, numbers in its JSON header."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """All or nothing: a run killed while it writes leaves the last checkpoint as it was."""
    partial = Path(f"{os.fspath(path)}.partial")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, partial, {name: json.dumps(value) for name, value in header.items()})
    partial.replace(path)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was written."""
    with safe_open(path, framework="pt") as file:
        header = {name: json.loads(value) for name, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, under the rest of their names."""
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter."""
    return {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Makes it remember what `optimizer_tensors` gave (prefix removed)."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_config(
    path: str | os.PathLike[str], saved: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Refuses to continue a run with other settings."""
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        raise ValueError(
            f"{path} was written with another configuration: "
            + ", ".join(f"{name}={saved.get(name)!r}" for name in different)
            + "; pass a TrainingConfig with these values to continue it"
        )


def check_objective(
    path: str | os.PathLike[str], saved: Mapping[str, Tensor], current: Mapping[str, Tensor]
) -> None:
    """Refuses to continue a run that learned something else."""
    for name, table in current.items():
        other = saved.get(name)
        if other is None or other.shape != table.shape or not torch.allclose(other, table):
            raise ValueError(
                f"{path} was written with another objective: its table `{name}` differs; pass the "
                "Objective (parameterisation, schedule, weighting, time) that it was started with"
            )
