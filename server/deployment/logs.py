"""Logs as lines of JSON, with the time, the level, the run, the round and the site, where an operator wants them."""

from __future__ import annotations

import logging
import os

import structlog

JSON_LOGS = "CORYMB_JSON_LOGS"  # in the environment of the server's processes, if its kit says json_logs = true


def formatter(run: str = "") -> logging.Formatter:
    """Return a formatter that writes each record as a line of JSON; `run` is the id of the Flower run, if any."""

    def add_run(_: object, __: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**entry, "run": run} if run else entry

    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(["round", "site"]),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_run,
    ]
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        foreign_pre_chain=shared,
    )


def set_up(run: str = "") -> None:
    """Let the handlers of this process and those of Flower write JSON, if the environment asks for it."""
    if os.environ.get(JSON_LOGS):
        for handler in (*logging.getLogger().handlers, *logging.getLogger("flwr").handlers):
            handler.setFormatter(formatter(run))
