"""Models, schedulers and autoencoders of diffusers: in folders, in pipelines, or as they are.

A folder is what ``save_pretrained`` wrote. Only what is asked for is read from it, and safely.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoints import read_checkpoint
from .packages import require

HOW = "pip install 'smcdiff[diffusers]'"


def part(source: Any, names: Sequence[str], kind: str = "SchedulerMixin") -> Any:
    """The model, scheduler or autoencoder of a pipeline or folder, or the object itself."""
    if isinstance(source, str | Path):
        return _load(_folder(source), names, kind)
    for name in names:
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    if kind == "SchedulerMixin" and not hasattr(source, "set_timesteps"):
        raise ValueError(
            f"a {type(source).__name__} does not say how it is sampled: give scheduler, such as "
            "DDPMScheduler() or a folder"
        )
    if kind == "ModelMixin" and not isinstance(source, nn.Module):
        raise ValueError(
            f"a model, a pipeline with {' or '.join(names)}, or a folder is needed, got a "
            f"{type(source).__name__}"
        )
    return source


def _folder(source: str | Path) -> Path:
    """A folder on this machine, or the local copy of a repository of the Hugging Face Hub."""
    if Path(source).is_dir():
        return Path(source)
    hub = require("huggingface_hub", HOW)
    try:
        return Path(hub.snapshot_download(str(source), local_files_only=True))
    except (OSError, ValueError) as error:  # not there, and no name of a repository
        raise FileNotFoundError(
            f"{source} is no folder, and no repository of the Hugging Face Hub that was downloaded "
            "before. Nothing is downloaded here: call "
            f"huggingface_hub.snapshot_download({str(source)!r}) first"
        ) from error


def _load(folder: Path, names: Sequence[str], kind: str) -> Any:
    """What a folder, or its subfolder of one of these names, holds."""
    library: Any = require("diffusers", HOW)
    place = next((folder / name for name in names if (folder / name).is_dir()), folder)
    file = place / ("scheduler_config.json" if kind == "SchedulerMixin" else "config.json")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.name} and no folder {' or '.join(names)}")
    name = json.loads(file.read_text()).get("_class_name", "")
    found: Any = getattr(library, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, getattr(library, kind)):
        raise ValueError(f"{file}: {name!r} is no {kind} of diffusers {library.__version__}")
    if kind == "ModelMixin":
        return _weights(found, place)
    return found.from_pretrained(place, local_files_only=True)  # type: ignore[attr-defined]


def _weights(found: Any, folder: Path) -> nn.Module:
    """A model with its weights: safetensors, or one file of torch with tensors only."""
    if any(folder.glob("*.safetensors")):
        model: nn.Module = found.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
        return model
    files = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} needs weights in safetensors (or one .bin file), and has "
            f"{[file.name for file in files]}: model.save_pretrained(folder)"
        )
    model = found.from_config(found.load_config(folder))
    model.load_state_dict(read_checkpoint(files[0]))
    return model
