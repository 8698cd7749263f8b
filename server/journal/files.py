"""Files of tensors that are written atomically, and a lock."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save(tensors: Mapping[str, Tensor], path: Path, durable: bool) -> None:
    """Write `tensors` to `path` atomically. With `durable`, return only once the file is on the disk.

    Raises `OSError` if the file cannot be written.
    """
    draft = path.with_name(f"{path.name}.draft")
    storages: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():  # safetensors does not accept tensors that share memory
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    try:
        save_file(separate, draft)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{draft} cannot be written: {error}") from error
    if durable:
        _sync(draft)
    draft.replace(path)
    if durable:
        _sync(path.parent)


class FileLock:
    """A lock that one process at a time holds; it ends with the process. Without effect where there is no `fcntl`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, error: str) -> None:
        """Take the lock. Raises `ValueError(error)` if another process holds it."""
        try:
            import fcntl
        except ImportError:
            return
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit such a lock
        except OSError:
            self.release()
            raise ValueError(error) from None

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
