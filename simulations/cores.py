"""The cores and processes that a simulation may use."""

from __future__ import annotations

import multiprocessing
import os

import torch


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Return whether this process can be forked; False with a GPU, because CUDA does not work in a forked process."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
