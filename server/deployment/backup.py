"""Backups of a server: its kit, the SuperLink's database and all journals, in one archive."""

from __future__ import annotations

import sqlite3
import tarfile
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from corymb.server.deployment.federation import KIT

SKIPPED = ("log", "nginx", "programs", "health")  # in var: made anew at each start
ABOUT = "backup.txt"


def backup(folder: Path, archive: Path) -> None:
    """Write the kit in `folder` to `archive`, a .tar.gz with private keys. The server may be running.

    Databases are copied by SQLite itself. Raises `FileExistsError` if the archive exists.
    """
    archive.touch(mode=0o600, exist_ok=False)
    try:
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "w:gz") as tar:
            about = Path(scratch) / ABOUT
            about.write_text(f"flwr {version('flwr')}\ncorymb {version('corymb')}\n")
            tar.add(about, ABOUT)
            for path in sorted(folder.rglob("*")):
                name = path.relative_to(folder)
                if not path.is_file() or name.parts[:2] in [("var", part) for part in SKIPPED]:
                    continue
                if path.suffix in (".db", ".sqlite"):
                    tar.add(_copied(path, Path(scratch) / "copy"), str(name))
                elif not path.name.endswith(("-wal", "-shm", ".draft", ".socket")):
                    tar.add(path, str(name))
    except BaseException:
        archive.unlink()
        raise


def restore(archive: Path, folder: Path) -> str:
    """Unpack `archive` into `folder`. Returns the version of Flower that the backup was made with.

    Raises `ValueError` if the folder exists or the archive is not a backup.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; move it away first, or restore into another folder.")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        if ABOUT not in names or KIT not in names:
            raise ValueError(f"{archive} is not a backup that `corymb backup` has made.")
        folder.mkdir(parents=True, mode=0o700)
        tar.extractall(folder, filter="data")
    about = folder / ABOUT
    flower = about.read_text().split()[1]
    about.unlink()
    return flower


def _copied(path: Path, copy: Path) -> Path:
    """Copy a database, as of one moment, while others may write to it."""
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy
