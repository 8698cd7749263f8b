"""The ServerApp is killed again and again: one run, each site trains once in each round, and nothing is lost."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from corymb.tests.e2e.federation import Federation, kill
from corymb.tests.e2e.processes import processes, until

SEED = 1


def kill_at_random_moments(federation: Federation, kills: int, longest: float) -> int:
    """Kill the ServerApp's process `kills` times while the run lasts, each after up to `longest` seconds."""
    moments = random.Random(SEED)
    for done in range(kills):
        child = until(lambda: federation.child() or federation.ended(), 120, "the start of the ServerApp")
        if child is True:
            return done
        time.sleep(moments.uniform(0.0, longest))
        try:
            kill(child)
        except ProcessLookupError:
            return done
        until(lambda child=child: federation.child() != child, 60, "the end of the killed process")
    return kills


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_twenty_kills_of_the_server_lose_nothing_and_nothing_counts_twice(tmp_path: Path) -> None:
    with processes(tmp_path) as started:
        rounds = 12  # a fast machine would end fewer before the last kill
        federation = Federation(started)
        federation.run(f"rounds={rounds}")
        kills = kill_at_random_moments(federation, 20, 12.0)
        until(federation.ended, 900, "the end of the run")
        assert started.status("here") == "finished:completed"
        assert kills >= 15
        federation.assert_exact(rounds)
