"""The exceptions that an app raised at its clients."""

from __future__ import annotations

import logging
import traceback
from collections import Counter

log = logging.getLogger("flwr.corymb")


class RemoteError(Exception):
    """An exception that a client raised in another process: its text, which is `TYPE: MESSAGE`, and its traceback."""

    @classmethod
    def of(cls, error: Exception) -> RemoteError:
        """Describe `error`, which itself may not survive the way between processes."""
        remote = cls(_text(error))
        remote.add_note("".join(traceback.format_exception(error)))
        return remote


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, RemoteError) else f"{type(error).__name__}: {error}"


class Failures(Counter[str]):
    """How often the app raised each exception, by its text."""

    def add(self, error: Exception, client: str) -> str:
        """Count `error`, raised at `client`, and return its text. Each different text is logged once."""
        text = _text(error)
        if text not in self:
            log.warning("The client app raised an exception at client %s.", client, exc_info=error)
        self[text] += 1
        return text

    def error(self) -> ValueError:
        """Return the error that every client failed."""
        text, times = self.most_common(1)[0]
        return ValueError(f"Every client failed; the most frequent error ({times} times): {' '.join(text.split())}")
