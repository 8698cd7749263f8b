"""The door: one message in, one verdict out. Nothing that a site sends can raise past it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from corymb.protocol.records import EXAMPLES, STEPS
from corymb.protocol.row_arrays import row_in
from corymb.server.rounds.array_checks import LARGEST_NUMBER, decoded_model, decoded_steps
from corymb.server.rounds.rejections import Code, Refused, Rejection, of_error, of_exception, short
from corymb.strategies import Layout, Reply, Report
from corymb.strategies.core.reply import CLASS
from corymb.strategies.core.rows import SingleRow

Records = list[tuple[str, Any]]  # of a message, by name

MOST_EXAMPLES = 2**53  # beyond it a float cannot count
MOST_METRICS = 100
MOST_CLASSES = 1000  # whose numbers of examples a site may tell, besides
LARGEST_METRIC = 1e100


@dataclass(frozen=True)
class Door:
    """Admits replies of one layout. `examples_key` is the metric that counts a site's examples;
    `wants_steps(node)` says whose updates of single batches are read."""

    layout: Layout
    examples_key: str = EXAMPLES
    wants_steps: Callable[[str], bool] = lambda node: False

    def admit(self, node: str, message: Message) -> Reply | Rejection:
        """The reply to a training message, checked cheapest first."""
        try:
            if message.has_error():
                return of_error(node, message)
            records = list(message.content.items())
            report = self._report(node, records)
            arrays = _only(records, ArrayRecord, besides=STEPS)
            row = row_in(arrays, self.layout)
            if row is not None and row.bound <= LARGEST_NUMBER:  # its block has looked at every number
                return Reply(report, row.rows, row.row, steps=self._steps(node, message))
            state = decoded_model(arrays, self.layout)
            rows = SingleRow(self.layout.parts(state))
            return Reply(report, rows, 0, self.layout.buffers_of(state), self._steps(node, message))
        except Exception as error:
            return of_exception(node, error)

    def admit_metrics(self, node: str, message: Message) -> Report | Rejection:
        """The reply to an evaluation message, which carries metrics only."""
        try:
            if message.has_error():
                return of_error(node, message)
            return self._report(node, list(message.content.items()))
        except Exception as error:
            return of_exception(node, error)

    def _report(self, node: str, records: Records) -> Report:
        metrics: Mapping[str, Any] = _only(records, MetricRecord)
        examples = metrics.get(self.examples_key)
        if not (isinstance(examples, (int, float)) and 0 <= examples <= MOST_EXAMPLES and examples == int(examples)):
            raise Refused(
                Code.EXAMPLES,
                f"the metric {self.examples_key!r} is {short(examples)}, not a whole number from 0 to 2^53",
            )
        # A metric that is no finite number is dropped, the update is not.
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and abs(value) < LARGEST_METRIC and name != self.examples_key
            if name.isprintable() and len(name) < 100
        }
        if len(numbers) > MOST_METRICS:
            classes = {name: value for name, value in numbers.items() if name.startswith(CLASS)}
            others = {name: value for name, value in numbers.items() if name not in classes}
            numbers = dict(islice(others.items(), MOST_METRICS)) | dict(islice(classes.items(), MOST_CLASSES))
        return Report(node, int(examples), numbers)

    def _steps(self, node: str, message: Message) -> Tensor | None:
        """The updates of single batches `[S, P]` that a site sent along, if the rule wants them of it."""
        if not self.wants_steps(node) or not isinstance(record := message.content.get(STEPS), ArrayRecord):
            return None
        return decoded_steps(record, self.layout)


def _only(records: Records, kind: type[Any], besides: str = "") -> Any:
    found = [record for name, record in records if isinstance(record, kind) and name != besides]
    if len(found) != 1:
        raise Refused(Code.RECORDS, f"it carries {len(found)} records of the type {kind.__name__}, not one")
    return found[0]
