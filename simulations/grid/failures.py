"""The exceptions that an app raised at its clients."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger("flwr.corymb")


class Failures(Counter[str]):
    """How often the app raised each exception, by its text."""

    def add(self, error: Exception, client: str) -> str:
        """Count `error`, raised at `client`, and return its text. Each different text is logged once."""
        text = f"{type(error).__name__}: {error}"
        if text not in self:
            log.warning("The client app raised an exception at client %s.", client, exc_info=error)
        self[text] += 1
        return text

    def error(self) -> ValueError:
        """Return the error that every client failed."""
        text, times = self.most_common(1)[0]
        return ValueError(f"Every client failed; the most frequent error ({times} times): {' '.join(text.split())}")
