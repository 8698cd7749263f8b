"""Files of tensors that are written atomically."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save(tensors: Mapping[str, Tensor], path: Path, durable: bool) -> None:
    """Write `tensors` to `path` atomically. With `durable`, return only once the file is on the disk."""
    draft = path.with_name(f"{path.name}.draft")
    storages: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():  # safetensors does not accept tensors that share memory
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    save_file(separate, draft)
    if durable:
        _sync(draft)
    draft.replace(path)
    if durable:
        _sync(path.parent)


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
