"""Averaging that corrects for unknown participation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum

import torch
from torch import Tensor

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.reply import Report
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class Attendance:
    """Per known node: `closed` intervals, rounds in the `open` one, `mean` interval, last `examples` (0: unknown)."""

    nodes: tuple[str, ...] = ()
    closed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    open: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    examples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @cached_property
    def rows(self) -> dict[str, int]:
        """Where each node stands."""
        return {node: row for row, node in enumerate(self.nodes)}

    def joined_by(self, newcomers: Collection[str]) -> Attendance:
        """With `newcomers` at the end, who have missed nothing yet and count once."""
        more = len(newcomers)
        return Attendance(
            (*self.nodes, *newcomers),
            torch.cat([self.closed, self.closed.new_zeros(more)]),
            torch.cat([self.open, self.open.new_zeros(more)]),
            torch.cat([self.mean, self.mean.new_ones(more)]),
            torch.cat([self.examples, self.examples.new_zeros(more)]),
        )


@dataclass(frozen=True)
class FedAU(BlindRule[Attendance]):
    """Wang & Ji 2024, FedAU (Algorithm 2): a site counts as many times as rounds pass between its visits.

    `cutoff` (K in the paper) closes an interval that has grown so long; None or 0 never does, 1 averages
    over all sites. `population` (N) is the number of sites that the step is divided by, by default those that
    the server knows. `server_rate` is the paper's global learning rate. `by_examples` aims at the
    objective weighed by examples instead of by site; a site not heard yet is taken as an average one.
    """

    unanimous = False  # it steps by the population and the server's rate

    cutoff: int | None = 50
    population: int | None = None
    server_rate: float = 1.0
    by_examples: bool = False

    def __post_init__(self) -> None:
        if self.cutoff is not None:
            at_least(0, cutoff=self.cutoff)
        if self.population is not None:
            at_least(1, population=self.population)
        positive(server_rate=self.server_rate)

    def initial(self) -> Attendance:
        """Nobody is known."""
        return Attendance()

    def weight(self, report: Report, memory: Attendance) -> float:
        """The mean interval between its visits before this round; one at its first."""
        row = memory.rows.get(report.node)
        interval = 1.0 if row is None else float(memory.mean[row])
        return interval * report.examples if self.by_examples else interval

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: Attendance) -> float:
        """The server's rate over the population, absent sites included."""
        population = float(self.population or len(known))
        if self.by_examples:
            sizes = dict(zip(memory.nodes, memory.examples.tolist(), strict=True))
            sizes |= {report.node: report.examples for report in reports}
            heard = [size for size in sizes.values() if size]
            population *= fsum(heard) / max(1, len(heard))
        return self.server_rate / population if population else 0.0

    def after(self, reports: Collection[Report], known: Collection[str], memory: Attendance) -> Attendance:
        """Every known site is one round older; who came, or waited for `cutoff` rounds, closes its interval."""
        if newcomers := set(known) - memory.rows.keys():
            memory = memory.joined_by(sorted(newcomers))
        rows = [memory.rows[report.node] for report in reports]
        came = torch.zeros(len(memory.nodes), dtype=torch.bool)
        came[rows] = True
        examples = memory.examples.clone()
        examples[rows] = torch.tensor([report.examples for report in reports], dtype=examples.dtype)
        waited = memory.open + 1
        closes = came if not self.cutoff else came | (waited == self.cutoff)
        mean = (memory.closed * memory.mean + waited) / (memory.closed + 1)
        return Attendance(
            memory.nodes,
            memory.closed + closes,
            torch.where(closes, 0, waited),
            torch.where(closes, mean, memory.mean),
            examples,
        )
