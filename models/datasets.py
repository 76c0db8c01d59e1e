"""Where real data lie: a given path, the folder of ``SMCDIFF_DATA``, or one beside the project."""

import os
from collections.abc import Iterator
from pathlib import Path


def data_roots(path: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Where to look, best first; only at `path` if it is given."""
    if path is not None:
        yield Path(path)
        return
    named = os.environ.get("SMCDIFF_DATA")
    if named:
        yield Path(named)
    yield Path(os.path.normpath(Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
