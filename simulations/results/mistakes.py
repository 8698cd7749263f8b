"""Which exceptions are mistakes of use, told in one line, and which keep their traceback."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from types import TracebackType

from corymb.server import RunFailed

PACKAGE = Path(__file__).resolve().parents[2]
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
INSTALLED = ("site-packages", "dist-packages")


def is_mistake_of_use(error: BaseException) -> bool:
    """Return whether Corymb itself raised `error` about its input or its run: a `ValueError`, `OSError` or `RunFailed`.

    Such an error is one clear sentence. An exception from a user's code or from another library is not: its traceback
    shows where to look.
    """
    if not isinstance(error, (ValueError, OSError, RunFailed)):
        return False
    remote = re.findall(r'File "(.+?)", line', str(error.__cause__ or "")) if _is_remote(error.__cause__) else []
    files = remote or _files(error.__traceback__)
    own = [file for file in map(Path, files) if not _is_in(file, STANDARD_LIBRARY)]
    return bool(own) and _is_in(own[-1].resolve(), PACKAGE)


def cause_in_user_code(error: BaseException) -> BaseException | None:
    """Return the exception that caused `error`, if it was raised outside of Corymb."""
    cause = error.__cause__
    if cause is None or _is_remote(cause) or not cause.__traceback__:
        return None
    return None if _is_in(Path(_files(cause.__traceback__)[-1]).resolve(), PACKAGE) else cause


def _is_remote(cause: BaseException | None) -> bool:
    """Return whether `cause` holds the traceback of a worker process as text."""
    return type(cause).__name__ == "_RemoteTraceback"


def _files(traceback: TracebackType | None) -> list[str]:
    files = []
    while traceback is not None:
        files.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return files


def _is_in(file: Path, folder: Path) -> bool:
    """Return whether `file` belongs to `folder`, and not to a package that is installed inside it."""
    if not file.is_relative_to(folder):
        return str(file).startswith("<frozen")
    return not set(INSTALLED) & set(file.relative_to(folder).parts)
