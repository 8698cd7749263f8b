"""The models of a round in mapped files, once they take more memory than a limit.

The system keeps as much of such a file in memory as there is room for. The numbers are the same, bit by bit.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from corymb.strategies import Reply
from corymb.strategies.core.rows import SingleRow

log = logging.getLogger("flwr.corymb")


class Spill:
    """Holds up to `limit` bytes of replies in memory, and the rest in files without a name, which end with the process.

    The files lie in `folder`, by default in the folder for temporary files.
    """

    def __init__(self, limit: float, folder: str | None = None) -> None:
        self._limit, self._folder = limit, folder

    def watch(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        """Yield `replies`; those beyond the limit have their parameters in a file."""
        held = 0
        for reply in replies:
            size = sum(part.nbytes for part in reply.parts) if isinstance(reply.rows, SingleRow) else 0
            if held + size > self._limit:
                reply = replace(reply, rows=SingleRow(tuple(map(self._moved, reply.parts))), row=0)
            else:
                held += size
            yield reply
            del reply  # frees its memory before the next reply arrives

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised matrix, in a file if it is larger than the limit."""
        size = rows * columns * dtype.itemsize
        if size <= self._limit:
            return torch.empty(rows, columns, dtype=dtype)
        log.info("\t│ %.1f GB of models are in a file in %s", size / 1e9, self._folder or tempfile.gettempdir())
        return self._mapped(rows * columns, dtype).view(rows, columns)

    def _moved(self, part: Tensor) -> Tensor:
        return self._mapped(part.numel(), part.dtype).copy_(part.flatten()) if part.numel() else part

    def _mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix="corymb-models-") as file:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)  # or a full disk would kill the process
                # The mapping keeps the file after its name is gone.
                return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
        except OSError as error:
            log.warning("\t│ The models stay in memory, as the folder for temporary files has no room (%s).", error)
            return torch.empty(count, dtype=dtype)
