"""Logs as lines of JSON."""

from __future__ import annotations

import io
import json
import logging

from corymb.server.deployment.logs import formatter
from corymb.server.rounds.events import Event, EventLog


def test_an_event_is_a_line_with_its_run_round_and_site() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("77"))
    logger = logging.getLogger("flwr.corymb")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        EventLog(None, visible=True).add(Event(3, "train", "north", "replied", 1.5, 2_000_000), ["south"])
        logger.error("plain %d", 5)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["run"], first["round"], first["site"], first["level"]) == ("77", 3, "north", "info")
    assert first["event"] == "[ROUND 3] north replied after 1.5 s (train, 2.0 MB); waiting for south"
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"], "site" in second) == ("plain 5", "error", False)
