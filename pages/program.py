"""The process of `corymb serve` that answers for metrics and the operator's page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from corymb.pages.app import make_app, serve
from corymb.pages.numbers import Federation


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    serve(make_app(Federation(options.folder, parent=os.getppid())), options.port)


if __name__ == "__main__":
    main()
