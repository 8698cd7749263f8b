"""What an app keeps between rounds: its home in the sandbox is in memory, so the gate has a copy at the site.

The gate never looks into the copy, as the app could have written anything there. It gives it back in the next process
of the same app and run only, and it never leaves the site.
"""

from __future__ import annotations

import io
import os
import tarfile
import time
from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Message

from corymb.protocol.records import memory_run

KEPT = "kept"  # the folder at the site, with a file for each app and run
OLD_SECONDS = 90 * 24 * 3600.0  # after which a copy that does not change is deleted
Stamps = dict[str, tuple[int, int]]  # of the files in a folder: when they changed, and their sizes


def stamps(folder: Path) -> Stamps:
    """Return the files in `folder`, at any depth."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def packed(folder: Path) -> bytes:
    """Return `folder` as an archive; it may be missing."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=".")
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Write the files in an archive of `packed` to `folder`, as far as it is whole: a power cut may have torn it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        print(f"What the app has kept is damaged ({error}), and begins anew.", flush=True)


class Kept:
    """The copy of what the app with the SHA-256 `app` keeps in the run of a task, in the site's `folder`."""

    def __init__(self, folder: Path, app: str, message: Message, context: Context) -> None:
        self._path = folder / KEPT / f"{app}-{memory_run(message.content, context.run_id)}.tar"

    def read(self) -> bytes | None:
        """Return the copy, None if there is none."""
        with suppress(FileNotFoundError):
            return self._path.read_bytes()
        return None

    def write(self, data: bytes) -> None:
        """Replace the copy, and delete copies that have not changed for long. Raises `OSError` as on a full disk."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        part = self._path.with_suffix(f".part-{os.getpid()}")
        try:
            part.write_bytes(data)
            os.replace(part, self._path)
        finally:
            part.unlink(missing_ok=True)
        for other in self._path.parent.iterdir():
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > OLD_SECONDS:
                    other.unlink()
