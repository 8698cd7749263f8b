"""The part of the shim for Flower's private API that concerns the programs `flower-superlink` and `flower-supernode`.

`python -m corymb.protocol.flower_programs superlink` and `... supernode` do what Flower's commands do, with more
patience for faults. The test of `protocol/flower.py` covers this module too.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

import httpx

from corymb.protocol.temporary import is_temporary

POLLING = ("flwr.supernode.start_client_internal", "flwr.superlink.grid.http_grid")
LONGEST_SLEEP = 1.0  # seconds
STATE = "flwr.supercore.corestate.sql_corestate"
PATIENCE = 10  # heartbeats of a ServerApp, one every 30 s, that may be missing; Flower's own number is 2


class _Impatient:
    """The module `time`, whose `sleep` ends after `LONGEST_SLEEP` at the latest."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, LONGEST_SLEEP))


def look_often() -> None:
    """Let Flower look each second for messages and replies, instead of every three.

    And first after 0.1 s, instead of 1 s, whether a part of a message has arrived.
    """
    for name in POLLING:
        import_module(name).__dict__["time"] = _Impatient()
    defaults = import_module("flwr.supercore.inflatable.inflatable_utils").pull_objects.__kwdefaults__
    defaults["initial_backoff"] = 0.1


def retry_heartbeats() -> None:
    """Let Flower repeat a heartbeat that the SuperLink or a proxy answers with a temporary error.

    Such an answer, as of a SuperLink with a full disk, would end the thread that sends them. The node would stay
    offline, and Flower would end the run after a minute.
    """
    module = import_module("flwr.supercore.heartbeat")
    sender = module.HeartbeatSender
    beat = sender._heartbeat

    def beat_or_retry(self: Any) -> None:
        try:
            beat(self)
        except httpx.HTTPStatusError as error:
            if is_temporary(error):
                raise module.HeartbeatFailure from error
            raise

    sender._heartbeat = beat_or_retry


def wait_for_serverapps() -> None:
    """Let the SuperLink end a run when it has noted no heartbeat of the ServerApp for five minutes, instead of one.

    It notes none while it is away, or while the disk of its database is full.
    """
    import_module(STATE).__dict__["HEARTBEAT_PATIENCE"] = PATIENCE


def main() -> None:
    """Run the program that the first argument names, with the others."""
    program = sys.argv.pop(1)
    if program == "superlink":
        wait_for_serverapps()
        import_module("flwr.superlink.cli").flower_superlink()
    else:
        look_often()
        retry_heartbeats()
        import_module("flwr.supernode.cli").flower_supernode()


if __name__ == "__main__":
    main()
