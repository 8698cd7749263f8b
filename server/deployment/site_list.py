"""The list of sites in a federation's file."""

from __future__ import annotations

import re
from pathlib import Path

from corymb.server.deployment.federation import FederationSettings, read

START = re.compile(r"^sites\s*=\s*\[", re.MULTILINE)


def with_site(file: Path, name: str) -> None:
    """Add a site to `file`, whose comments are kept. Raises `ValueError` if the name is in use or invalid."""
    if name in read(file, FederationSettings).sites:
        raise ValueError(f"The site {name!r} is there already; choose another name.")
    before = file.read_text()
    file.write_text(START.sub(lambda found: f'{found[0]}"{name}", ', before, count=1))  # in front of any comment
    try:
        if name not in read(file, FederationSettings).sites:
            raise ValueError(f"{name!r} could not be added to {file}; add it to sites yourself.")
    except ValueError:
        file.write_text(before)
        raise
