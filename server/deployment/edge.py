"""nginx before the SuperLink: sites reach Flower's fleet API and a health check, and nothing else."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from corymb.server.deployment.federation import ServerKit

HEALTH = "health"  # in var: for each site a file that says whether the SuperLink sees it online
templates = Environment(loader=PackageLoader("corymb.server.deployment"), undefined=StrictUndefined, trim_blocks=True)


def nginx_program() -> str | None:
    """Return the path of nginx, which Debian puts where only root looks; None if it is not installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def write_edge(folder: Path, kit: ServerKit) -> Path:
    """Write nginx's configuration into the kit. Returns its path."""
    var = folder / "var"
    for name in ("nginx", HEALTH):
        (var / name).mkdir(parents=True, exist_ok=True)
    path = folder / "nginx.conf"
    user = pwd.getpwuid(os.getuid()).pw_name if os.getuid() == 0 else ""
    path.write_text(templates.get_template("nginx.conf.j2").render(kit=kit, folder=folder, var=var, user=user))
    return path
