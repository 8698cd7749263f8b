"""What did not count in a run: clients none of whose replies was admitted, and why, and rounds without a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from corymb.server.rounds.codes import ADMITTED, KEPT_MODEL
from corymb.simulations.experiments.resolved import Resolved
from corymb.simulations.results.folder import FinishedRun

MAX_NAMED = 5  # clients that a sentence names


def never_counted(runs: Iterable[FinishedRun], resolved: Resolved) -> list[str]:
    """Return a sentence for each run in which some of the clients that may train never counted, or rounds did not."""
    sentences = []
    rules = {rule.title: rule for rule in resolved.experiment.rules}
    for run in runs:
        for note, why in KEPT_MODEL.items():
            if kept := sum(note in record.notes for record in run.records):
                sentences.append(
                    f"{run.rule}, seed {run.seed}: {kept} of {len(run.records)} rounds kept the model, because {why}."
                )
        names = resolved.scenario(rules[run.rule], run.seed).training_names
        counted = {verdict.node for record in run.records for verdict in record.admitted}
        missing = [name for name in names if name not in counted]
        if not missing:
            continue
        has_buffer = resolved.experiment.devices_for(rules[run.rule]).buffer
        none = "no reply had arrived when the run ended" if has_buffer else "never asked"
        whys = Counter(
            verdict.code
            for record in run.records
            for verdict in record.verdicts
            if verdict.node not in counted and verdict.code != ADMITTED
        )
        reasons = ", ".join(f"{code} {times} times" for code, times in whys.most_common()) or none
        example = next(
            (
                f" For example: {verdict.reason}"
                for record in run.records
                for verdict in record.verdicts
                if verdict.node not in counted and verdict.code not in (ADMITTED, "offline")
            ),
            "",
        )
        shown = ", ".join(missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
        sentences.append(
            f"{run.rule}, seed {run.seed}: {len(missing)} of {len(names)} clients never counted ({shown}): {reasons}."
            + example
        )
    return sentences
