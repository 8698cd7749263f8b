"""A cache on disk of images that took long to decode."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "1"  # change it when the decoding changes


def folder() -> Path:
    """Return the folder of the cache, `corymb` in the user's cache folder; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corymb"


def decoded_once(files: Sequence[Path], decode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return `decode()`, from the cache if none of `files` has changed since it was stored there.

    A cached array is mapped into memory, so that only the examples that are used are read. Where the cache cannot be
    written, every call decodes.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = folder() / f"{hashlib.sha256(repr((FORMAT, stats)).encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError):
        mapped: NDArray[Any] = np.load(path, mmap_mode="c")  # copies a page that someone writes to
        return mapped
    values = decode()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.save(file, values)
        os.replace(file.name, path)  # whole or not at all, whoever else writes it
    return values
