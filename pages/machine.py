"""What the server's machine says of itself: disk, memory, the clock and the processes of `corymb serve`."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

SERVER_PROCESSES = {  # a part of the command line of each process of a server
    "superlink": "flower_programs superlink",
    "superexec": "flower-superexec",
    "monitor": "corymb.server.deployment.monitor",
    "edge": "nginx",
}
UNSYNCHRONISED = 0x40  # STA_UNSYNC of Linux
MICROSECONDS = 1e6


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def clock_error() -> float | None:
    """Return by how many seconds the clock may be off, as the kernel estimates; None if nothing sets the clock."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, with modes = 0: read only
    try:
        ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    longs = (ctypes.c_long * 8).from_buffer(buffer)  # modes, offset, freq, maxerror, esterror, status, ...
    return None if longs[5] & UNSYNCHRONISED else longs[4] / MICROSECONDS


def available_bytes() -> int:
    """Return the memory that new processes may use without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def family(parent: int) -> dict[int, tuple[str, int]]:
    """Return the command line and the resident bytes of all processes under `parent`, by process id."""
    parents: dict[int, int] = {}
    found: dict[int, tuple[str, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            number = int(folder.name)
            parents[number] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            found[number] = command, resident
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    below = {parent}
    while more := {child for child, of in parents.items() if of in below} - below:
        below |= more
    return {number: found[number] for number in below - {parent} if number in found}


def server_processes(parent: int) -> dict[str, tuple[bool, int]]:
    """Return for each process of a server whether it runs under `parent`, and its resident bytes with its children."""
    running = family(parent)
    state: dict[str, tuple[bool, int]] = {}
    for name, part in SERVER_PROCESSES.items():
        own = [number for number, (command, _) in running.items() if part in command]
        sizes = {number: running[number][1] for number in own}
        for number in own:  # its children may be among them
            sizes |= {child: size for child, (_, size) in family(number).items()}
        state[name] = bool(own), sum(sizes.values())
    return state
