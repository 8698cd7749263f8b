"""A hook for mkdocs that shows mkdocstrings the package alone, without the environments beside it."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent
package = TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> None:
    """Copy what the wheel holds into a folder `corymb`, and have mkdocstrings read that."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    folder = Path(package.name) / "corymb"
    folder.mkdir(exist_ok=True)
    for name in build["targets"]["wheel"]["only-include"]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / name, folder / name)
    config["plugins"]["mkdocstrings"].config["handlers"]["python"]["paths"] = [package.name]
