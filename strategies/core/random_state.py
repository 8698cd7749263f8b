"""The global random generators of Python, numpy and torch: seeded for a while, or protected from other code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def protected_generators() -> Iterator[None]:
    """Restore the global generators of `random`, numpy and torch's CPU afterwards."""
    python, numpy, tensors = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(tensors)


@contextmanager
def seeded_generators(*parts: object) -> Iterator[None]:
    """Seed the global generators with a seed that depends on `parts` only; restore them afterwards."""
    seed = random.Random("/".join(map(str, parts))).getrandbits(32)
    with protected_generators():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
