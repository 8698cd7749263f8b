"""Threads that stay, because a process must not be forked while a thread ends."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


@lru_cache(maxsize=8)
def pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of this many threads, the same one in every call of a process; do not shut it down.

    A thread that ends may hold a lock of MKL for a moment, even after Python has joined it. A process that is forked in
    this moment would wait for that lock for ever; see docs/decisions/clients-in-processes.md.
    """
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a forked process has none of these threads
