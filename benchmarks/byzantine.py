"""Measure what hostile clients cost under each rule: the accuracy over the share of hostile clients.

Fashion-MNIST (4,000 training examples), an MLP, 20 clients, 20 rounds; 0 to 40 % of the clients attack, in five ways;
labels are skewed by Dirichlet 0.1, or mildly by 1. Rules are told the number of hostile clients where they have such a
parameter. Writes the figure and prints the table of docs/results.md.

    python benchmarks/byzantine.py DATA [--figure docs/byzantine.png] [--seeds 1]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import track

from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.runner import run_all

CLIENTS, ROUNDS = 20, 20
SHARES = [0.0, 0.1, 0.2, 0.3, 0.4]
ALPHAS = [0.1, 1.0]
ATTACKS: dict[str, dict[str, Any]] = {
    "sign flip": {"kind": "sign_flip", "scale": 3.0},
    "Gaussian": {"kind": "gaussian", "scale": 0.5},
    "ALIE": {"kind": "alie"},
    "IPM": {"kind": "ipm", "scale": 2.0},
    "label flip": {"kind": "label_flip"},
}


def rules(hostile: int) -> list[dict[str, Any]]:
    """Return the rules, told that `hostile` clients attack."""
    return [
        {"name": "fedavg", "label": "mean"},
        {"name": "median"},
        {"name": "trimmed_mean", "parameters": {"trim": hostile / CLIENTS}},
        {"name": "krum", "parameters": {"hostile": hostile}},
        {"name": "geometric_median"},
        {"name": "norm_clipping"},
        {"name": "fltrust"},
        {"name": "run_off_distillation", "parameters": {"min_per_class": 5, "epochs": 5}},
    ]


def experiment(data: Path, attack: str, alpha: float, share: float, seeds: int) -> Experiment:
    hostile = round(share * CLIENTS)
    return Experiment(
        name=f"{attack}-{alpha}-{share}".replace(" ", "-"),
        rounds=ROUNDS,
        seeds=seeds,
        rules=rules(hostile),
        data={"source": str(data), "examples": 4000},
        partition={"kind": "dirichlet", "clients": CLIENTS, "alpha": alpha},
        model={"kind": "mlp", "options": {"hidden": 64}},
        train={"epochs": 1, "batch_size": 32, "learning_rate": 0.05, "optimizer_options": {"momentum": 0.9}},
        proxy={"examples": 300},
        attack={**ATTACKS[attack], "clients": hostile},
        evaluate={"every": ROUNDS},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of Fashion-MNIST")
    parser.add_argument("--figure", type=Path, default=Path("byzantine.png"))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[tuple[str, float, float], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        first = next(iter(ATTACKS))  # without hostile clients, all attacks are the same experiment
        settings = [(a, alpha, share) for a in ATTACKS for alpha in ALPHAS for share in SHARES if share or a == first]
        for number, setting in enumerate(track(settings)):
            plan = resolve(experiment(options.data, *setting, options.seeds)), Path(folder) / str(number)
            (runs,) = run_all([plan], Console(quiet=True))
            by_rule: dict[str, list[float]] = {}
            for run in runs:
                by_rule.setdefault(run.rule, []).append(100 * run.records[-1].server["accuracy"])
            found[setting] = {title: mean(values) for title, values in by_rule.items()}
    found |= {(a, alpha, 0.0): found[first, alpha, 0.0] for a in ATTACKS for alpha in ALPHAS}
    draw(found, options.figure)
    print("\n".join(table(found)))


def table(found: dict[tuple[str, float, float], dict[str, float]]) -> list[str]:
    """Return the lines of a Markdown table: for each attack and alpha, the accuracy at 0, 20 and 40 % by rule."""
    titles = list(next(iter(found.values())))
    lines = ["| attack | alpha | " + " | ".join(titles) + " |", "|---" * (len(titles) + 2) + "|"]
    for attack in ATTACKS:
        for alpha in ALPHAS:
            cells = [
                " / ".join(f"{found[attack, alpha, share][title]:.0f}" for share in (0.0, 0.2, 0.4)) for title in titles
            ]
            lines.append(f"| {attack} | {alpha:g} | " + " | ".join(cells) + " |")
    return lines


def draw(found: dict[tuple[str, float, float], dict[str, float]], path: Path) -> None:
    """Draw one panel for each attack and alpha."""
    figure, axes = plt.subplots(len(ALPHAS), len(ATTACKS), figsize=(13, 5.5), sharex=True, sharey=True)
    colours = plt.get_cmap("tab10")
    for row, alpha in enumerate(ALPHAS):
        for column, attack in enumerate(ATTACKS):
            panel = axes[row][column]
            for index, title in enumerate(next(iter(found.values()))):
                values = [found[attack, alpha, share][title] for share in SHARES]
                style = ("-", "--", ":")[index % 3]
                panel.plot([100 * s for s in SHARES], values, style, color=colours(index), label=title, marker=".")
            panel.set_title(f"{attack}, alpha {alpha:g}", fontsize=10)
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("hostile clients (%)")
    for row_of_panels in axes:
        row_of_panels[0].set_ylabel("accuracy (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=8, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
