"""The program that Flower starts in place of its own `flwr-serverapp`; see `corymb.server.supervisor`."""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "flwr-serverapp"


def write_program(folder: Path) -> Path:
    """Write the program into `folder`, which the operator puts first on the PATH of the SuperLink or SuperExec."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m corymb.server.supervisor "$@"\n')
    path.chmod(0o755)
    return path
