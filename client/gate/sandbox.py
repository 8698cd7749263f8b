"""The sandbox of an app at a site, made by bubblewrap, the sandbox of Flatpak."""

from __future__ import annotations

import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from corymb.client.gate.policy import Refusal

SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/certs", "/sys"]
HOME = "/work"  # the only folder in which an app can write; it lies in memory and ends with the process
ROOMS = ("strategies", "protocol", "client", "server", "simulations", "__init__.py", "testing.py")
# Of the site's environment: which cores and GPUs an app may use.
PASSED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
HERE = Path(__file__).resolve().parents[2]  # the package corymb
PACKAGES = f"{HOME}/packages"


def sandboxed(command: list[str], data: Iterable[Path], hidden: Path) -> list[str]:
    """Return `command` in a sandbox: an app there sees the system's programs, this Python, `data` and the GPUs.

    It sees no network, no other process and no other file, nothing in the folder `hidden`, and can write into its home
    only, which is in memory. Raises `Refusal` if bubblewrap is not installed, or a part of `data` does not exist.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise Refusal("bubblewrap is not installed; install it, or set sandbox = false in the site's policy")
    if missing := [path for path in data if not path.exists()]:
        raise Refusal(f"the site's data {str(missing[0])!r} does not exist; correct data in the site's policy")
    arguments = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", HOME]
    environment = {
        "HOME": HOME, "FLWR_HOME": f"{HOME}/.flwr", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1",
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": PACKAGES,
    }  # fmt: skip
    environment |= {name: os.environ[name] for name in PASSED if name in os.environ}
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    for place in dict.fromkeys([*SYSTEM, *_python_folders(), *map(str, data)]):
        arguments += ["--ro-bind-try", place, place]
    for room in ROOMS:
        arguments += ["--ro-bind-try", str(HERE / room), f"{PACKAGES}/corymb/{room}"]
    for device in [*Path("/dev").glob("nvidia*"), Path("/dev/kfd"), Path("/dev/dri")]:
        arguments += ["--dev-bind-try", str(device), str(device)]
    if hidden.exists():
        arguments += ["--tmpfs", str(hidden.resolve())]  # if any of these contains it
    return [*arguments, "--chdir", HOME, "--", *command]


def _python_folders() -> list[str]:
    """Return the folders from which this Python and installed packages are imported, without the current folder."""
    return [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *site.getsitepackages()]
