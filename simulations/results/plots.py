"""The plots of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from corymb.simulations.experiments.scenario import Scenario
from corymb.simulations.results.client_results import ClientResults, client_results
from corymb.simulations.results.folder import FinishedRun
from corymb.simulations.results.score import VIRTUAL

mpl.use("Agg")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
}


MAX_BARS = 300  # clients in the plot of labels
MAX_NAMES = 12  # clients whose names fit beside a plot


def draw_all(runs: list[FinishedRun], scenario: Scenario, folder: Path, kind: str = "png") -> dict[str, str]:
    """Draw all plots into `folder`, as files of this `kind`, and return `{file name: caption}`.

    `scenario` is that of the first seed.
    """
    seed = runs[0].seed
    first_runs = [run for run in runs if run.seed == seed]
    results = client_results(runs)
    others: dict[str, tuple[str, Callable[[], Figure]]] = {}
    title = _capitalised(runs[0].score.title)
    if all(VIRTUAL in run.records[-1].notes for run in runs):
        others["time.png"] = (f"{title} over virtual seconds", lambda: accuracy(runs, "virtual seconds"))
    if len({run.records[0].bytes_up for run in runs if run.records[0].admitted}) > 1:
        others["bytes.png"] = (f"{title} over megabytes", lambda: accuracy(runs, "megabytes"))
    clients: dict[str, tuple[str, Callable[[], Figure]]] = {}
    if results:
        clients["clients.png"] = ("The clients' own tests under each rule, in the last round", lambda: boxes(results))
    plots: dict[str, tuple[str, Callable[[], Figure]]] = {
        "accuracy.png": (
            f"{_capitalised(runs[0].score.title)} per round: mean over seeds, band from minimum to maximum",
            lambda: accuracy(runs),
        ),
        "participation.png": (
            f"Clients that took part in each round: black (seed {seed})",
            lambda: participation(first_runs[0], scenario),
        ),
        "weights.png": (
            f"Weight of each client, divided by the largest of the round (seed {seed})",
            lambda: weights(first_runs, scenario),
        ),
        **others,
        **clients,
        "labels.png": (f"Examples per class of each client (seed {seed})", lambda: labels(scenario)),
    }
    with mpl.rc_context(STYLE):
        for name, (_, draw) in plots.items():
            draw().savefig((folder / name).with_suffix(f".{kind}"), dpi=120)
    return {str(Path(name).with_suffix(f".{kind}")): caption for name, (caption, _) in plots.items()}


AXES = ("round", "virtual seconds", "megabytes")


def accuracy(runs: list[FinishedRun], over: str = "round") -> Figure:
    """Plot the score of each rule: the mean over seeds, and a band from minimum to maximum.

    The horizontal axis is one of `AXES`: rounds, virtual seconds or megabytes to and from all clients, each a mean over
    seeds. Raises `ValueError` for another, and for virtual seconds without devices.
    """
    if over not in AXES or (over == "virtual seconds" and VIRTUAL not in runs[0].records[-1].notes):
        raise ValueError(f"There is no axis {over!r}; use one of {', '.join(AXES)}; virtual seconds need [devices].")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for rule in dict.fromkeys(run.rule for run in runs):
        curves = [run.curve for run in runs if run.rule == rule]
        rounds, values = curves[0][0], runs[0].score.shown(1) * np.array([curve for _, curve in curves])
        if over != "round":
            own = [run for run in runs if run.rule == rule]
            rounds = np.mean([_progress(run, over) for run in own], axis=0).tolist()
        (line,) = axes.plot(rounds, _smooth(values.mean(axis=0)), label=rule, linewidth=1.6)
        low, high = _smooth(values.min(axis=0)), _smooth(values.max(axis=0))
        axes.fill_between(rounds, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    points = len(runs[0].curve[0])
    smoothed = f", moving mean of {_window(points)} tests" if _window(points) > 1 else ""
    axes.set(xlabel=over, ylabel=f"{runs[0].score.title}{smoothed}", xlim=(1 if over == "round" else 0, None))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right" if runs[0].score.lower_is_better else "lower right")
    return figure


def _progress(run: FinishedRun, over: str) -> list[float]:
    """Return the virtual seconds or the megabytes at each test of a run."""
    megabytes = np.cumsum([(record.bytes_up + record.bytes_down) / 1e6 for record in run.records])
    tested = [number for number, record in enumerate(run.records) if record.server]
    if over == "megabytes":
        return [float(megabytes[number]) for number in tested]
    return [run.records[number].notes[VIRTUAL] for number in tested]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def participation(run: FinishedRun, scenario: Scenario) -> Figure:
    """Plot which clients took part in each round, with one cell per client and round."""
    rows = {name: row for row, name in enumerate(scenario.names)}
    took_part = np.zeros((len(rows), len(run.records)))
    for column, record in enumerate(run.records):
        for verdict in record.admitted:
            if verdict.node in rows:  # the client of the rule "central" is not among them
                took_part[rows[verdict.node], column] = 1
    figure = Figure(figsize=(8, _height(len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        took_part, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=1, extent=_extent(took_part)
    )
    axes.set(xlabel="round", ylabel="client")
    _name_clients(axes, scenario)
    return figure


def weights(runs: list[FinishedRun], scenario: Scenario) -> Figure:
    """Plot a heat map of client weights for each rule that has them; coordinate-wise rules have none."""
    maps = {run.rule: _weight_map(run, scenario) for run in runs}
    maps = {rule: matrix for rule, matrix in maps.items() if not np.isnan(matrix).all()}
    figure = Figure(figsize=(8, 2.1 * max(1, len(maps)) + 0.4), layout="constrained")
    if not maps:
        figure.text(0.5, 0.5, "No rule of this experiment assigns weights to clients.", ha="center", color="grey")
        return figure
    panels: NDArray[np.object_] = figure.subplots(len(maps), 1, sharex=True, squeeze=False)
    for axes, (rule, matrix) in zip(panels[:, 0], maps.items(), strict=True):
        axes.set(title=rule, ylabel="client")
        _name_clients(axes, scenario)
        image = axes.imshow(matrix, aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=_extent(matrix))
        figure.colorbar(image, ax=axes, shrink=0.8)
    panels[-1, 0].set_xlabel("round")
    return figure


def _weight_map(run: FinishedRun, scenario: Scenario) -> NDArray[np.float64]:
    """Return client weights `[N, rounds]` divided by the round's largest absolute weight; NaN without a weight."""
    rows = {name: row for row, name in enumerate(scenario.names)}
    matrix = np.full((len(rows), len(run.records)), np.nan)
    for column, record in enumerate(run.records):
        by_node = {v.node: v.weight for v in record.admitted if v.weight is not None and v.node in rows}
        largest = max(map(abs, by_node.values()), default=0)
        for node, weight in by_node.items():
            matrix[rows[node], column] = weight / largest if largest else 0
    return matrix


def labels(scenario: Scenario) -> Figure:
    """Plot a stacked bar of examples per class for each of the first clients."""
    sizes = scenario.population.sizes[:MAX_BARS]
    counts = scenario.labels[:MAX_BARS] * sizes[:, None]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(sizes))
    colours = mpl.colormaps["tab20" if counts.shape[1] > 10 else "tab10"]
    for label in range(counts.shape[1]):
        axes.bar(
            range(len(sizes)),
            counts[:, label],
            bottom=bottom,
            color=colours(label % colours.N),
            width=0.9,
            label=label,
        )
        bottom += counts[:, label]
    if len(sizes) <= MAX_NAMES:
        axes.set_xticks(range(len(sizes)), scenario.names)
    axes.set(xlabel="client", ylabel="examples", xlim=(-0.7, len(sizes) - 0.3))
    if counts.shape[1] <= 20:
        figure.legend(
            title="class" if scenario.population.store.strata is None else "stratum",
            loc="outside right upper",
            ncols=1 + (counts.shape[1] > 10),
        )
    return figure


def boxes(results: list[ClientResults]) -> Figure:
    """Plot a box of the clients' scores for each rule, with a point for each client."""
    figure = Figure(figsize=(8, 0.5 * len(results) + 1.4), layout="constrained")
    axes = figure.subplots()
    score = results[0].score
    places = range(len(results), 0, -1)
    values = [[score.shown(value) for value in each.values] for each in results]
    axes.boxplot(values, positions=places, orientation="horizontal", widths=0.6, showfliers=False)
    for place, each in zip(places, values, strict=True):
        axes.plot(each, [place] * len(each), "o", markersize=4, alpha=0.5)
    axes.set_yticks(places, [each.rule for each in results])
    axes.set(xlabel=f"{score.name}{' in %' if score.is_percent else ''} at a client")
    axes.grid(alpha=0.25, axis="x")
    return figure


def _name_clients(axes: Axes, scenario: Scenario) -> None:
    """Put the clients' names on the vertical axis, if there is room for them."""
    if len(scenario.names) <= MAX_NAMES:
        axes.set_yticks(range(len(scenario.names)), scenario.names)


def _extent(matrix: NDArray[np.float64]) -> tuple[float, float, float, float]:
    clients, rounds = matrix.shape
    return (0.5, rounds + 0.5, clients - 0.5, -0.5)


def _height(clients: int) -> float:
    return float(np.clip(0.06 * clients, 2, 6))


def _window(points: int) -> int:
    return max(1, points // 50)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moving mean over a fiftieth of the points, so that long curves stay readable."""
    window = _window(len(values))
    padded = np.concatenate([np.full(window // 2, values[0]), values, np.full(window - 1 - window // 2, values[-1])])
    return np.convolve(padded, np.ones(window) / window, mode="valid")
