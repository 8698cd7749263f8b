"""The trained models of past runs: which there are, and one of them as a file that says where it comes from."""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from sqlite3 import DatabaseError

from safetensors.torch import load_file, save_file

from corymb.server.journal.files import sha256
from corymb.server.journal.journal import BEST, FINISHED, Journal
from corymb.server.journal.tables import DATABASE

log = logging.getLogger("flwr.corymb")
APP = "app"  # in the notes of a journal: the id of the Flower app


@dataclass(frozen=True)
class StoredRun:
    """A journal's folder, the rule of its run, the number of finished rounds, and the best round with its score.

    The score is the accuracy, or minus the loss if no accuracy was measured; both are None if neither was.
    """

    folder: Path
    rule: str
    rounds: int
    best_round: int | None
    best_score: float | None


def stored_runs(folder: Path) -> list[StoredRun]:
    """Return the runs whose journals lie in `folder`, oldest first."""
    found = sorted(folder.glob(f"*/{DATABASE}"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    return [stored_run(path.parent) for path in found]


def unfinished_run(folder: Path, app: str) -> Path | None:
    """Return the newest journal in `folder` of a run of the Flower app `app` that is not complete; None if none is.

    Journals that cannot be read, such as those of another version of Corymb, are passed over.
    """
    for path in sorted(folder.glob(f"*/{DATABASE}"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            with closing(Journal(path.parent)) as journal:
                about = journal.about()
        except (ValueError, DatabaseError) as error:
            log.warning("The journal in %s is passed over: %s", path.parent, error)
            continue
        if about.get(APP) == app and FINISHED not in about:
            return path.parent
    return None


def stored_run(folder: Path) -> StoredRun:
    """Return the run whose journal lies in `folder`."""
    with closing(Journal(folder)) as journal:
        about, rounds = journal.about(), list(journal.rounds())
    best = about.get("best-round"), about.get("best-score")
    return StoredRun(
        folder,
        about.get("rule", "?"),
        len(rounds),
        None if best[0] is None else int(best[0]),
        None if best[1] is None else float(best[1]),
    )


def export_model(folder: Path, out: Path, best: bool = False) -> dict[str, str]:
    """Write the last model in the journal in `folder`, or the best one, to the safetensors file `out`.

    Returns the file's metadata: the rule, the round, the SHA-256 of the journal's own file, in how many rounds up to
    then each site was admitted, and the versions of Corymb, Flower and torch. Raises `ValueError` if there is no such
    model.
    """
    if not (folder / DATABASE).is_file():
        raise ValueError(f"There is no journal in {folder}; `corymb model list` shows the runs.")
    with closing(Journal(folder)) as journal:
        about, rounds = journal.about(), list(journal.rounds())
        if not rounds:
            raise ValueError(f"The journal in {folder} has no finished round, so there is no model.")
        number = int(about.get("best-round", 0)) if best else rounds[-1].round
        if not any(record.admitted for record in rounds):
            raise ValueError(f"No reply has counted in the run in {folder}, so there is no trained model.")
        if not number:
            raise ValueError(f"No accuracy or loss was measured in the run in {folder}; export its last model.")
        source = folder / (BEST if best else f"model-{number:06d}.safetensors")
        model = load_file(source) if best else journal.model()
    sites = Counter(verdict.node for record in rounds if record.round <= number for verdict in record.admitted)
    metadata = {
        "round": str(number),
        "rounds-of-the-run": str(rounds[-1].round),
        "sha256": sha256(source),
        "admitted-rounds-by-site": json.dumps(dict(sorted(sites.items()))),
        **{name: _version(name) for name in ("corymb", "flwr", "torch")},
        **about,
    }
    save_file(model, out, metadata)
    return metadata


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
