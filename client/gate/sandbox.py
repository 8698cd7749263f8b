"""The sandbox of an app at a site, made by bubblewrap, the sandbox of Flatpak."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from corymb.client.gate.policy import Refusal

SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl", "/sys"]
HOME = "/work"  # the only folder in which an app can write; it lies in memory and ends with the process


def sandboxed(command: list[str], data: Iterable[Path]) -> list[str]:
    """Return `command` in a sandbox: an app there sees the system's programs, this Python, `data` and the GPUs.

    It sees no network, no other process and no other file, and can write into its home only, which is in memory.
    Raises `Refusal` if bubblewrap is not installed, or a part of `data` does not exist.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise Refusal("bubblewrap is not installed; install it, or set sandbox = false in the site's policy")
    if missing := [path for path in data if not path.exists()]:
        raise Refusal(f"the site's data {str(missing[0])!r} does not exist; correct data in the site's policy")
    arguments = [program, "--unshare-all", "--die-with-parent", "--new-session", "--proc", "/proc", "--dev", "/dev"]
    arguments += ["--tmpfs", "/tmp", "--tmpfs", HOME, "--chdir", HOME, "--clearenv"]
    for name, value in {"HOME": HOME, "FLWR_HOME": f"{HOME}/.flwr", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}.items():
        arguments += ["--setenv", name, value]
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        arguments += ["--setenv", name, "0" if "TELEMETRY" in name else "1"]
    if search_path := [entry for entry in sys.path if entry and Path(entry).exists()]:
        arguments += ["--setenv", "PYTHONPATH", ":".join(search_path)]
    for place in dict.fromkeys([*SYSTEM, *_python_folders(search_path), *map(str, data)]):
        arguments += ["--ro-bind-try", place, place]
    for device in [*Path("/dev").glob("nvidia*"), Path("/dev/kfd"), Path("/dev/dri")]:
        arguments += ["--dev-bind-try", str(device), str(device)]
    return [*arguments, "--", *command]


def _python_folders(search_path: list[str]) -> list[str]:
    """Return the folders from which this Python, Corymb and other installed packages are imported."""
    corymb = Path(__file__).resolve().parents[2]
    links = [str(Path(entry).resolve()) for entry in search_path]
    standard = sysconfig.get_path("stdlib")
    return [sys.prefix, sys.base_prefix, standard, *search_path, *links, str(corymb)]
