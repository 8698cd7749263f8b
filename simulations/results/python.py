"""Experiments from Python: `run(experiment)` returns `Results` with tables, frames and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from corymb.simulations.data.conversion import as_source
from corymb.simulations.data.examples import Source
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import read
from corymb.simulations.experiments.resolved import Resolved, resolve
from corymb.simulations.results.client_results import client_results
from corymb.simulations.results.folder import FinishedRun, prepare, write
from corymb.simulations.results.plots import accuracy, boxes, labels, participation, weights
from corymb.simulations.results.report import write_report
from corymb.simulations.results.runner import run_all
from corymb.simulations.results.summary import summary_rows, table

GIVEN = "data given in Python"  # the data source in the settings of such a run


@dataclass(frozen=True, repr=False)
class Results:
    """The finished runs of an experiment, whose files are in `folder`."""

    resolved: Resolved
    runs: list[FinishedRun]
    folder: Path

    @property
    def experiment(self) -> Experiment:
        """The experiment."""
        return self.resolved.experiment

    @property
    def report(self) -> Path:
        """The report, a file that opens offline."""
        return self.folder / "report.html"

    def rows(self, of: str = "summary") -> list[dict[str, Any]]:
        """Return rows of "summary" (one per rule), "rounds", or "clients" (one per client and test or reply).

        Raises `ValueError` for another name.
        """
        if of == "summary":
            return summary_rows(self.runs)
        if of == "rounds":
            return [
                {"rule": run.rule, "seed": run.seed, "round": r.round, "seconds": r.seconds, "replies": len(r.admitted),
                 "bytes_down": r.bytes_down, "bytes_up": r.bytes_up,
                 **{f"train-{name}": value for name, value in r.train.items()}, **r.server, **r.notes}
                for run in self.runs for r in run.records
            ]  # fmt: skip
        if of == "clients":
            return [
                {"rule": run.rule, "seed": run.seed, "round": r.round, "phase": phase, "client": v.node,
                 "verdict": v.code, "examples": v.examples, "weight": v.weight, **v.metrics}
                for run in self.runs for r in run.records
                for phase, verdicts in (("train", r.verdicts), ("test", r.evaluations))
                for v in verdicts if v.code != "offline"
            ]  # fmt: skip
        raise ValueError(f"There are no rows of {of!r}; use 'summary', 'rounds' or 'clients'.")

    def frame(self, of: str = "summary") -> Any:
        """Return `rows(of)` as a pandas frame. Raises `ImportError` if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise ImportError("frames need pandas; run pip install 'corymb[frames]'") from None
        return pandas.DataFrame(self.rows(of))

    def table(self, kind: str = "markdown") -> str:
        """Return the summary as a table of the kind "markdown", "latex" or "csv"."""
        return table(self.rows(), kind)

    def plot(self, what: str = "score", over: str = "round") -> Figure:
        """Return a picture: "score", "clients", "participation", "weights" or "labels".

        The score is drawn over the "round", "virtual seconds" or "megabytes". Raises `ValueError` for another name, and
        for "clients" if no client was tested.
        """
        first = [run for run in self.runs if run.seed == self.runs[0].seed]
        scenario = self.resolved.first
        pictures: dict[str, Callable[[], Figure]] = {
            "score": lambda: accuracy(self.runs, over),
            "clients": lambda: boxes(client_results(self.runs)),
            "participation": lambda: participation(first[0], scenario),
            "weights": lambda: weights(first, scenario),
            "labels": lambda: labels(scenario),
        }
        if what not in pictures:
            raise ValueError(f"There is no picture {what!r}; use one of {', '.join(pictures)}.")
        if what == "clients" and not client_results(self.runs):
            raise ValueError("No client was tested; set evaluate.clients = true.")
        return pictures[what]()

    def __repr__(self) -> str:
        """Return the name, the number of runs and the folder."""
        return f"Results({self.experiment.name!r}, {len(self.runs)} runs, in {str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Return the table, which a notebook shows for results."""
        rows = [line.strip("|\n ").split(" | ") for line in self.table().splitlines() if not line.startswith("| ---")]
        cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table>{cells}</table>"


def run(
    experiment: Experiment | str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    data: Any = None,
    folder: str | Path | None = None,
    jobs: int = 1,
    resume: bool = False,
    progress: bool = True,
) -> Results:
    """Run an experiment, write its files into `folder` (default: runs/NAME), and return its results.

    `experiment` is an `Experiment`, a TOML file or the name of a shipped one; `changes {dotted key: value}` apply to
    the last two. `data` stands in place of `[data]`: whatever a function in `data.source` may return, such as arrays,
    torch datasets or a pandas frame. With `resume`, finished runs in the folder are kept and unfinished ones go on.
    With `jobs` above 1, so many runs go on in parallel. Raises `ValueError` for invalid settings and data.
    """
    if not isinstance(experiment, Experiment):
        experiment = read(Path(experiment), changes)
    elif changes:
        raise ValueError("changes apply to a file; make the experiment with these settings.")
    console = Console(quiet=not progress)
    source = None if data is None else _source(data, experiment)
    if source is not None:  # so that config.toml does not name data that were not used
        experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"source": GIVEN})})
    resolved = resolve(experiment, source)
    place = Path(folder) if folder is not None else Path("runs") / experiment.name
    if moved := prepare(experiment, place, resume):
        console.print(f"Earlier results are in {moved}.", markup=False, soft_wrap=True)
    (runs,) = run_all([(resolved, place)], console, jobs)
    write(experiment, runs, place)
    write_report(resolved, runs, place)
    return Results(resolved, runs, place)


def _source(data: Any, experiment: Experiment) -> Source:
    options = experiment.data.options_for(experiment.task.kind)
    try:
        source = as_source(data, options)
    except ValueError as error:
        problem = str(error).replace("the function returned", "they are")
        raise ValueError(f"The data cannot be used: {problem}.") from None
    means = experiment.data.mean, experiment.data.deviation
    return Source(source.train.normalised(*means), source.test.normalised(*means), source.notes)
