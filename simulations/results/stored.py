"""The experiment of a results folder: read it, and compare it with another."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from corymb.simulations.experiments.experiment import Experiment

CONFIG, SUMMARY = "config.toml", "summary.json"  # files of the folder


def is_finished(experiment: Experiment, folder: Path) -> bool:
    """Return whether `folder` has results of `experiment`; settings without effect on results are ignored."""
    return (folder / SUMMARY).exists() and stored_settings(folder) == settings_of(experiment)


def stored_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the experiment in `folder`; None if there is none, or one of another version."""
    experiment = stored_experiment(folder)
    return None if experiment is None else settings_of(experiment)


def stored_experiment(folder: Path) -> Experiment | None:
    """Return the experiment whose results are in `folder`; None if there is none that can be read."""
    try:
        return read_stored(folder)
    except (OSError, ValueError):
        return None


def read_stored(folder: Path) -> Experiment:
    """Return the experiment whose results are in `folder`. Raises `OSError` or `ValueError` if it cannot be read."""
    return Experiment(**tomllib.loads((folder / CONFIG).read_text()))


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that have an effect on results."""
    return experiment.model_dump(exclude={"claims", "setting", "engine", "ray"})
