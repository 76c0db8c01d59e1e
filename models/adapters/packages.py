"""Packages that are imported only when they are used."""

import importlib
from typing import Any


def require(package: str, how: str) -> Any:
    """A package, or what to do without it.

    Raises:
        ImportError: it is not installed; the message says `how` to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed here, and cannot be imported: {how}") from error
