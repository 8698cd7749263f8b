"""The pictures of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from corymb.simulations.experiments.scenario import Scenario
from corymb.simulations.results.folder import FinishedRun

mpl.use("Agg")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
}


SHOWN = 300  # clients of whom a picture shows each by itself


def draw_all(runs: list[FinishedRun], scenario: Scenario, folder: Path) -> dict[str, str]:
    """Draw every picture into `folder`: `{file name: caption}`. `scenario` is that of the first seed."""
    seed = runs[0].seed
    firsts = [run for run in runs if run.seed == seed]
    pictures: dict[str, tuple[str, Callable[[], Figure]]] = {
        "accuracy.png": (
            "Test accuracy per round: mean over seeds, band from least to most",
            lambda: accuracy(runs),
        ),
        "participation.png": (
            f"Who took part in each round (seed {seed})",
            lambda: participation(firsts[0], scenario),
        ),
        "weights.png": (
            f"How much each client counted (seed {seed}, share of the round's largest)",
            lambda: weights(firsts, scenario),
        ),
        "labels.png": (f"What each client has: examples per class (seed {seed})", lambda: labels(scenario)),
    }
    with mpl.rc_context(STYLE):
        for name, (_, draw) in pictures.items():
            draw().savefig(folder / name, dpi=120)
    return {name: caption for name, (caption, _) in pictures.items()}


def accuracy(runs: list[FinishedRun]) -> Figure:
    """A curve per rule with the band of its seeds."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for rule in dict.fromkeys(run.rule for run in runs):
        curves = [run.curve for run in runs if run.rule == rule]
        rounds, values = curves[0][0], np.array([curve for _, curve in curves])
        (line,) = axes.plot(rounds, _smooth(values.mean(axis=0)), label=rule, linewidth=1.6)
        low, high = _smooth(values.min(axis=0)), _smooth(values.max(axis=0))
        axes.fill_between(rounds, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    points = len(runs[0].curve[0])
    smoothed = f", mean of {_window(points)} neighbours" if _window(points) > 1 else ""
    axes.set(xlabel="round", ylabel=f"test accuracy{smoothed}", xlim=(1, None))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    return figure


def participation(run: FinishedRun, scenario: Scenario) -> Figure:
    """A dot per client and round."""
    rows = {name: row for row, name in enumerate(scenario.names)}
    took_part = np.zeros((len(rows), len(run.records)))
    for column, record in enumerate(run.records):
        for verdict in record.admitted:
            took_part[rows[verdict.node], column] = 1
    figure = Figure(figsize=(8, _height(len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.imshow(took_part, aspect="auto", interpolation="nearest", cmap="Greys", extent=_extent(took_part))
    axes.set(xlabel="round", ylabel="client")
    return figure


def weights(runs: list[FinishedRun], scenario: Scenario) -> Figure:
    """A heat map per rule that gives weights; one that works on each coordinate by itself has none to show."""
    maps = {run.rule: _weight_map(run, scenario) for run in runs}
    maps = {rule: shown for rule, shown in maps.items() if not np.isnan(shown).all()}
    figure = Figure(figsize=(8, 2.1 * max(1, len(maps)) + 0.4), layout="constrained")
    if not maps:
        figure.text(0.5, 0.5, "No rule of this experiment gives weights.", ha="center", color="grey")
        return figure
    every: NDArray[np.object_] = figure.subplots(len(maps), 1, sharex=True, squeeze=False)
    for axes, (rule, shown) in zip(every[:, 0], maps.items(), strict=True):
        axes.set(title=rule, ylabel="client")
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=_extent(shown))
        figure.colorbar(image, ax=axes, shrink=0.8)
    every[-1, 0].set_xlabel("round")
    return figure


def _weight_map(run: FinishedRun, scenario: Scenario) -> NDArray[np.float64]:
    """Each client's weight in each round `[N, rounds]` as a share of the round's largest; NaN where there is none."""
    rows = {name: row for row, name in enumerate(scenario.names)}
    shown = np.full((len(rows), len(run.records)), np.nan)
    for column, record in enumerate(run.records):
        known = {v.node: v.weight for v in record.admitted if v.weight is not None}
        largest = max(map(abs, known.values()), default=0)
        for node, weight in known.items():
            shown[rows[node], column] = weight / largest if largest else 0
    return shown


def labels(scenario: Scenario) -> Figure:
    """A stacked bar for each of the first clients."""
    sizes = scenario.population.sizes[:SHOWN]
    counts = scenario.labels[:SHOWN] * sizes[:, None]
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
    if len(sizes) <= 10:
        axes.set_xticks(range(len(sizes)), scenario.names)
    axes.set(xlabel="client", ylabel="examples", xlim=(-0.7, len(sizes) - 0.3))
    if counts.shape[1] <= 20:
        figure.legend(title="class", loc="outside right upper", ncols=1 + (counts.shape[1] > 10))
    return figure


def _extent(matrix: NDArray[np.float64]) -> tuple[float, float, float, float]:
    clients, rounds = matrix.shape
    return (0.5, rounds + 0.5, clients - 0.5, -0.5)


def _height(clients: int) -> float:
    return float(np.clip(0.06 * clients, 2, 6))


def _window(points: int) -> int:
    return max(1, points // 50)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A moving mean over a fiftieth of the points, so that 2,000 rounds make a curve and not a cloud."""
    window = _window(len(values))
    padded = np.concatenate([np.full(window // 2, values[0]), values, np.full(window - 1 - window // 2, values[-1])])
    return np.convolve(padded, np.ones(window) / window, mode="valid")
