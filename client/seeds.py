"""Seeds of a client's random numbers."""

from __future__ import annotations

import random


def derive_seed(*parts: object) -> int:
    """Return a seed that depends on `parts` only, such as the run's seed, a client and a round."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)
