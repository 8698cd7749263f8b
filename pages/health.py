"""Whether the server lives, and whether it makes progress. Flower's own health check answers with a dead SuperExec."""

from __future__ import annotations

from collections.abc import Sequence

from corymb.pages.numbers import Number

MONITOR_SECONDS = 30.0


def value_of(numbers: Sequence[Number], metric: str, default: float = 0.0) -> float:
    """Return the value of a metric without labels."""
    return next((number.value for number in numbers if number.metric == metric and not number.labels), default)


def health_problems(numbers: Sequence[Number]) -> list[str]:
    """Return what is wrong with the server's processes; an empty list if they all run and the SuperLink answers."""
    down = [label for n in numbers if n.metric == "corymb_process_up" and not n.value for _, label in n.labels]
    problems = [f"{name} does not run" for name in down]
    if value_of(numbers, "corymb_monitor_age_seconds") > MONITOR_SECONDS:
        problems.append("the monitor does not reach the SuperLink")
    return problems


def progress_problems(numbers: Sequence[Number]) -> list[str]:
    """Return why the server cannot make progress; an empty list if it can."""
    problems = health_problems(numbers)
    if value_of(numbers, "corymb_stalled"):
        problems.append("a run is under way, but nothing happens")
    if missing := value_of(numbers, "corymb_sites_missing"):
        problems.append(f"{missing:.0f} more sites are needed for the quorum")
    return problems
