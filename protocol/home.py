"""The folder in which Corymb keeps journals and answers."""

from __future__ import annotations

import os
from pathlib import Path

CLIENTS = "clients"  # the folder in `home()` with what clients keep between rounds


def home() -> Path:
    """Return `$CORYMB_HOME`, which is `~/.corymb` by default."""
    return Path(os.environ.get("CORYMB_HOME") or Path.home() / ".corymb")
