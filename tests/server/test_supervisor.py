"""When a ServerApp that has ended is started again; `tests/e2e/test_supervisor.py` kills real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corymb.server.supervisor import FAILED, MOST_CRASHES, RAISED, End, pause_before_restart, write_program

KILLED = End(-9, "[ROUND 1] waiting", 3.0)
BUG = End(RAISED, "ValueError: no such file", 3.0)


@pytest.mark.parametrize(
    ("ends", "pause"),
    [
        ([End(0, "", 100.0)], None),
        ([End(FAILED, "QuorumMissed: ...", 100.0)], None),
        ([KILLED], 0.1),
        ([KILLED] * 5, 0.1),
        ([KILLED] * 20, 5.0),
        ([KILLED] * MOST_CRASHES, None),
        ([KILLED] * (MOST_CRASHES - 1) + [End(-9, "", 100.0)], 0.1),  # it ran for a while before
        ([BUG], 0.1),
        ([BUG, BUG], None),
        ([BUG, KILLED, BUG], 0.1),
        ([BUG, End(RAISED, "KeyError: 3", 3.0)], 0.1),
    ],
)
def test_when_it_is_started_again(ends: list[End], pause: float | None) -> None:
    assert pause_before_restart(ends) == pause


def test_the_program_is_found_by_its_name(tmp_path: Path) -> None:
    path = write_program(tmp_path / "programs")
    assert path.name == "flwr-serverapp"
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\nexec ")
