"""Run an unmodified Flower app folder on a LocalGrid."""

from __future__ import annotations

import secrets
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from corymb.protocol.run_config import flatten
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies.core.registry import import_reference


class FlowerApp(NamedTuple):
    """A loaded Flower app; `config` is its run config, flat, with dotted keys."""

    server_app: ServerApp
    client_app: ClientApp
    config: dict[str, Any]


def load_app(folder: Path) -> FlowerApp:
    """Load the app in `folder`. Adds the folder to `sys.path` for the rest of the process, as Flower does.

    Raises `ValueError` if the folder has no app, or if a component is missing or cannot be imported.
    """
    project = folder / "pyproject.toml"
    if not project.is_file():
        raise ValueError(f"The folder {str(folder)!r} has no pyproject.toml; give the folder of a Flower app.")
    try:
        tool: Any = tomllib.loads(project.read_text()).get("tool", {})
        app = tool.get("flwr", {}).get("app")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"The file {project} is not valid TOML: {error}.") from None
    if not isinstance(app, dict):
        raise ValueError(f"The file {project} has no table [tool.flwr.app]; give the folder of a Flower app.")
    components = app.get("components", {})
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    return FlowerApp(
        _component(folder, components, "serverapp", ServerApp),
        _component(folder, components, "clientapp", ClientApp),
        flatten(app.get("config", {})),
    )


def run_app(app: FlowerApp, nodes: int, changes: Mapping[str, Any], workers: int = 1) -> None:
    """Run `app` on `nodes` clients in `workers` processes, with `changes` to its config.

    Raises `ValueError` for a change to a key that the config does not have, which `flwr run` also rejects, and if
    every client fails.
    """
    if unknown := changes.keys() - app.config.keys():
        known = ", ".join(sorted(app.config)) or "no keys"
        raise ValueError(f"The app has no config key {min(unknown)!r}; [tool.flwr.app.config] has {known}.")
    config, run_id = {**app.config, **changes}, secrets.randbits(63)
    grid = LocalGrid(app.client_app, nodes, run_config=config, workers=workers, run_id=run_id)
    app.server_app(grid=grid, context=grid.server_context())
    grid.finish()
    grid.close()
    grid.require_replies()


def _component(folder: Path, components: Mapping[str, str], key: str, kind: type[Any]) -> Any:
    reference = components.get(key)
    if not reference:
        raise ValueError(f"The app in {str(folder)!r} has no {kind.__name__}: set {key} in [tool.flwr.app.components].")
    component = import_reference(reference, kind.__name__)
    if not isinstance(component, kind):
        raise ValueError(f"{reference!r} is a {type(component).__name__}, not a {kind.__name__}.")
    return component
