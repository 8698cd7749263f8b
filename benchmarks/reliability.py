"""Inject faults and hostile replies, and count what they cost. Prints the last line of docs/reliability.md.

Faults of the first kind are crashes of the server, lost, late and repeated replies, absent nodes and a full disk, in
random orders, in one process with a clock of its own (`tests/server/rounds/test_machine.py`). Those of the second kind
kill the ServerApp of a real federation. Each hostile reply is judged in a round and in an evaluation.

    python benchmarks/reliability.py [--plans 1000] [--hostile 2000] [--kills 20]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corymb.tests.e2e.federation import Federation
from corymb.tests.e2e.processes import processes, until
from corymb.tests.e2e.test_supervisor import kill_at_random_moments
from corymb.tests.server.rounds import test_hostile_replies as hostile
from corymb.tests.server.rounds import test_machine as machine

ROUNDS = 6


def repeated(count: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Return a decorator that runs a function with `count` generated inputs."""
    limits = settings(max_examples=count, suppress_health_check=list(HealthCheck), deadline=None, database=None)

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        run: Callable[[], None] = limits(given(**strategies)(function))
        return run

    return decorate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--hostile", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    tally: Counter[str] = Counter()

    @repeated(options.plans, plan=st.lists(machine.actions, min_size=10, max_size=60))
    def inject(plan: list[tuple[str, int]]) -> None:
        machine.check(plan)
        tally["faults"] += sum(action in ("crash", "lose", "repeat", "wait", "full", "away") for action, _ in plan)

    @repeated(options.hostile, changed=st.lists(hostile.changes(), min_size=1, max_size=4), policy=hostile.policies)
    def judge(changed: list[hostile.Change], policy: Any) -> None:
        tally["harmless" if hostile.check(changed, policy) == "admitted" else "rejected"] += 1

    inject()
    judge()
    if options.kills:
        with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as started:
            federation = Federation(started)
            federation.run(f"rounds={ROUNDS}")
            tally["faults"] += kill_at_random_moments(federation, options.kills, 12.0)
            until(federation.ended, 900, "the end of the run")
            federation.assert_exact(ROUNDS)
    print(
        f"{tally['faults']} faults injected, 0 updates lost without a record, 0 counted twice, final model identical; "
        f"{tally['rejected'] + tally['harmless']} hostile inputs, {tally['rejected']} rejected, "
        f"{tally['harmless']} harmless after all, 0 crashes"
    )


if __name__ == "__main__":
    main()
