"""When a ServerApp that has ended is started again; `tests/e2e/test_supervisor.py` kills real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corymb.server.supervisor import AWAY, FAILED, MOST_CRASHES, RAISED, End, pause_before_restart
from corymb.server.supervisor_program import write_program

KILLED = End(-9, "[ROUND 1] waiting")
AWAY_TOO = End(AWAY, "For more information check: https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/500")
BUG = End(RAISED, "ValueError: no such file")


@pytest.mark.parametrize(
    ("ends", "pause"),
    [
        ([End(0, "")], None),
        ([End(FAILED, "QuorumMissed: ...")], None),
        ([KILLED], 0.1),
        ([AWAY_TOO], 0.1),
        ([AWAY_TOO] * 7, 0.4),
        ([AWAY_TOO] * MOST_CRASHES, None),
        ([KILLED] * 5, 0.1),
        ([KILLED] * 20, 5.0),
        ([KILLED] * MOST_CRASHES, None),
        ([*[KILLED] * (MOST_CRASHES - 1), End(-9, "", has_progress=True)], 0.1),
        ([BUG, End(RAISED, BUG.last_line, has_progress=True)], 0.1),
        ([BUG], 0.1),
        ([BUG, BUG], None),
        ([BUG, KILLED, BUG], 0.1),
        ([*[KILLED] * 20, End(-9, "", has_progress=True), KILLED], 0.1),
        ([BUG, End(RAISED, "KeyError: 3")], 0.1),
    ],
)
def test_when_it_is_started_again(ends: list[End], pause: float | None) -> None:
    assert pause_before_restart(ends) == pause


def test_the_program_is_found_by_its_name(tmp_path: Path) -> None:
    path = write_program(tmp_path / "programs")
    assert path.name == "flwr-serverapp"
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\nexec ")
