"""Reading weights without running what else a file may hold."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_checkpoint(path: str | Path, *keys: str) -> dict[str, Tensor]:
    """The tensors of a file, for ``module.load_state_dict``, on the CPU.

    Args:
        path: a file in the format of safetensors, or one that ``torch.save`` wrote. The latter is
            read with ``weights_only=True``: nothing in it is executed.
        keys: where the tensors are in a file that holds more, such as ``"ema"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds Python objects, or no tensors by name at that place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    found = _read(path)
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            raise ValueError(f"{path} has no {key!r}, but {_described(found)}")
        found = found[key]
    tensors = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    if not isinstance(found, Mapping) or not tensors or not found:
        raise ValueError(
            f"{path}: tensors by name are needed, got {_described(found)}. If they are deeper in "
            "the file, say where: read_checkpoint(path, 'ema')"
        )
    return {str(name): tensor for name, tensor in found.items()}


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # ordinary pickles, before they are refused
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not in the format of safetensors: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run code from the file. Where "
            "you trust it, write it again with torch.save(module.state_dict(), path), or with "
            "safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of torch: {error}") from error


def _described(found: object) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    names = [repr(name) for name in found]
    return f"entries {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
