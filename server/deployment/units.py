"""What starts a server or a site when its machine starts: a unit for systemd, and a file for Docker Compose."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from corymb.server.deployment.edge import templates
from corymb.server.deployment.federation import ServerKit, SiteKit


def write_units(folder: Path, kit: ServerKit | SiteKit) -> Path:
    """Write the unit and the Compose file for the kit in `folder`, with the paths of this machine. Returns the unit."""
    name = kit.federation if isinstance(kit, ServerKit) else f"{kit.federation}-{kit.name}"
    command = "serve" if isinstance(kit, ServerKit) else "join"
    corymb = Path(sys.executable).parent / "corymb"
    values = {"kit": kit, "folder": folder.resolve(), "corymb": corymb, "name": name, "command": command}
    unit = folder / f"corymb-{name}.service"
    unit.write_text(templates.get_template("corymb.service.j2").render(values))
    compose = templates.get_template("compose.yaml.j2").render(**values, flwr=version("flwr"))
    (folder / "compose.yaml").write_text(compose)
    return unit
