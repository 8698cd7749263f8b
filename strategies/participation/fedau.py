"""FedAU: averaging that corrects for unknown participation probabilities."""

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
    """The intervals between each node's participations, and its examples. All tensors have one entry per known node.

    `closed_intervals` is the number of closed intervals, `current_interval` the number of rounds in the current
    interval, `mean_interval` the mean length of an interval in rounds, and `examples` the last reported number of
    examples (0: unknown).
    """

    nodes: tuple[str, ...] = ()
    closed_intervals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    current_interval: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    mean_interval: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    examples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each node in the tensors."""
        return {node: row for row, node in enumerate(self.nodes)}

    def with_nodes(self, new_nodes: Collection[str]) -> Attendance:
        """Return a copy with `new_nodes` at the end; each has no closed interval yet and a mean interval of 1."""
        count = len(new_nodes)
        return Attendance(
            (*self.nodes, *new_nodes),
            torch.cat([self.closed_intervals, self.closed_intervals.new_zeros(count)]),
            torch.cat([self.current_interval, self.current_interval.new_zeros(count)]),
            torch.cat([self.mean_interval, self.mean_interval.new_ones(count)]),
            torch.cat([self.examples, self.examples.new_zeros(count)]),
        )


@dataclass(frozen=True)
class FedAU(BlindRule[Attendance]):
    """Wang & Ji 2024, FedAU (Algorithm 2): weighs a client by the mean number of rounds between its participations.

    `cutoff` (K in the paper) closes an interval that reaches this number of rounds. With None or 0 only participation
    closes an interval; with 1 the rule is the plain average over all clients. `population` (N) is the number of
    clients that the step is divided by (default: the clients that the server knows). `server_rate` is the paper's
    global learning rate. `by_examples` optimises the objective weighted by examples instead of by client; a client
    that has not replied yet counts with the average number of examples.
    """

    preserves_consensus = False  # the step is multiplied by `server_rate` and divided by the population

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
        """Return an empty record: no node is known."""
        return Attendance()

    def weight(self, report: Report, memory: Attendance) -> float:
        """Return the client's mean interval before this round (1 in its first).

        With `by_examples` the interval is multiplied by the number of examples.
        """
        row = memory.rows.get(report.node)
        interval = 1.0 if row is None else float(memory.mean_interval[row])
        return interval * report.examples if self.by_examples else interval

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: Attendance) -> float:
        """Return `server_rate` divided by the population, absent clients included."""
        population = float(self.population or len(known))
        if self.by_examples:
            sizes = dict(zip(memory.nodes, memory.examples.tolist(), strict=True))
            sizes |= {report.node: report.examples for report in reports}
            reported = [size for node, size in sizes.items() if size and node in known]
            population *= fsum(reported) / max(1, len(reported))
        return self.server_rate / population if population else 0.0

    def after(self, reports: Collection[Report], known: Collection[str], memory: Attendance) -> Attendance:
        """Add one round to the interval of every known client.

        An interval closes if its client took part in this round, or if it has reached `cutoff` rounds.
        """
        if new_nodes := set(known) - memory.rows.keys():
            memory = memory.with_nodes(sorted(new_nodes))
        rows = [memory.rows[report.node] for report in reports]
        participated = torch.zeros(len(memory.nodes), dtype=torch.bool)
        participated[rows] = True
        examples = memory.examples.clone()
        examples[rows] = torch.tensor([report.examples for report in reports], dtype=examples.dtype)
        length = memory.current_interval + 1
        closes = participated if not self.cutoff else participated | (length >= self.cutoff)
        mean = (memory.closed_intervals * memory.mean_interval + length) / (memory.closed_intervals + 1)
        return Attendance(
            memory.nodes,
            memory.closed_intervals + closes,
            torch.where(closes, 0, length),
            torch.where(closes, mean, memory.mean_interval),
            examples,
        )
