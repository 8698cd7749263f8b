"""Backups of a server: its kit, the SuperLink's database and all journals, in one archive."""

from __future__ import annotations

import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

from corymb.server.deployment.federation import KIT
from corymb.server.journal.tables import DATABASE

SKIPPED = ("log", "nginx", "programs", "health")  # in var: made anew at each start
ABOUT = "backup.txt"
TRIES = 10


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
                if path.name == DATABASE:
                    _add_journal(tar, path.parent, str(name.parent), Path(scratch))
                elif path.suffix == ".db":
                    tar.add(_copied(path, Path(scratch) / "copy"), str(name))
                elif not path.name.endswith(("-wal", "-shm", ".draft", ".socket")):
                    with suppress(FileNotFoundError):  # a journal has deleted an old model meanwhile
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


def _add_journal(tar: tarfile.TarFile, folder: Path, name: str, scratch: Path) -> None:
    """Add the database of a journal, and the model and the state of its newest round, while a run may go on."""
    for _ in range(TRIES):
        copy, files = _copied(folder / DATABASE, scratch / "copy"), []
        with closing(sqlite3.connect(copy)) as database:
            newest = "SELECT model FROM rounds WHERE model IS NOT NULL ORDER BY round DESC LIMIT 1"
            models = [row[0] for row in database.execute(newest)]
        try:
            for file in (*models, *(model.replace("model-", "state-") for model in models)):
                if file in models or (folder / file).exists():
                    files.append(shutil.copyfile(folder / file, scratch / file))
        except FileNotFoundError:  # two rounds have passed meanwhile
            continue
        tar.add(copy, f"{name}/{DATABASE}")
        for each in files:
            tar.add(each, f"{name}/{each.name}")
            each.unlink()
        return
    raise OSError(f"The journal in {folder} changes faster than it can be copied; pause the run, and try again.")


def _copied(path: Path, copy: Path) -> Path:
    """Copy a database, as of one moment, while others may write to it."""
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy
