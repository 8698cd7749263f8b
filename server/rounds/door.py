"""The door: the check that each reply must pass. No reply, whatever its content, can raise an exception here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from corymb.protocol.compression import COMPRESSION
from corymb.protocol.records import EXAMPLES, STEPS
from corymb.protocol.row_arrays import row_in
from corymb.server.rounds.array_checks import (
    LARGEST_NUMBER,
    decoded_buffers,
    decoded_model,
    decoded_steps,
    restored_model,
)
from corymb.server.rounds.rejections import Code, Refused, Rejection, rejection_of_error, rejection_of_exception, short
from corymb.strategies import Layout, Model, Reply, Report
from corymb.strategies.core.reply import CLASS_COUNT_PREFIX, LEAST, NO_BUFFERS
from corymb.strategies.core.rows import SingleRow

Records = list[tuple[str, Any]]  # the records of a message with their names

MAX_EXAMPLES = 2**53  # floats represent all whole numbers up to this one
MAX_METRICS = 100
MAX_CLASSES = 1000  # most metrics of examples per class; allowed in addition to MAX_METRICS
MAX_LEFT_OUT = 10  # names of metrics that were left out, in a record
LARGEST_METRIC = 1e100


@dataclass(frozen=True)
class Door:
    """The check of replies that hold a model of the given `layout`.

    `examples_key` is the metric with a client's number of examples. `wants_batch_updates(node)` decides whether the
    door reads the updates of single batches in this node's reply. `needs_metrics` are positive numbers that the rule
    needs in every reply.
    """

    layout: Layout
    examples_key: str = EXAMPLES
    wants_batch_updates: Callable[[str], bool] = lambda node: False
    needs_metrics: tuple[str, ...] = ()

    def admit(self, node: str, message: Message, sent: Model | None = None) -> Reply | Rejection:
        """Return the admitted reply to a training message, or its rejection. Cheap checks come first.

        `sent` is the model that the node received; without it, a compressed update is rejected.
        """
        try:
            if message.has_error():
                return rejection_of_error(node, message)
            records = list(message.content.items())
            report = self._report(node, records)
            if lacking := report.lacks(self.needs_metrics):
                limits = f"a number from {LEAST:.0e} to {1 / LEAST:.0e}"
                reason = f"it lacks the metric {lacking!r}, {limits}; set train.algorithm to the rule's"
                raise Refused(Code.METRICS, reason)
            if isinstance(compression := message.content.get(COMPRESSION), ConfigRecord) and sent is not None:
                vector, buffers = restored_model(message.content, compression, self.layout, sent)
                return Reply(report, SingleRow((vector,)), 0, buffers, self._steps(node, message))
            arrays = _only(records, ArrayRecord, ignored=STEPS)
            row = row_in(arrays, self.layout)
            if row is not None and row.bound <= LARGEST_NUMBER:  # the block of the row has computed this bound
                buffers = decoded_buffers(arrays, self.layout) if self.layout.buffers else NO_BUFFERS
                return Reply(report, row.rows, row.row, buffers, self._steps(node, message))
            state = decoded_model(arrays, self.layout)
            rows = SingleRow(self.layout.parts(state))
            return Reply(report, rows, 0, self.layout.buffers_of(state), self._steps(node, message))
        except Exception as error:
            return rejection_of_exception(node, error)

    def admit_metrics(self, node: str, message: Message) -> Report | Rejection:
        """Return the report in a reply to an evaluation message, or its rejection. The reply has metrics only."""
        try:
            if message.has_error():
                return rejection_of_error(node, message)
            return self._report(node, list(message.content.items()))
        except Exception as error:
            return rejection_of_exception(node, error)

    def _report(self, node: str, records: Records) -> Report:
        metrics: Mapping[str, Any] = _only(records, MetricRecord)
        examples = metrics.get(self.examples_key)
        must_be_whole = self.examples_key == EXAMPLES  # a weight of one's own may be a fraction
        if not (
            isinstance(examples, (int, float))
            and 0 <= examples <= MAX_EXAMPLES
            and (not must_be_whole or examples == int(examples))
        ):
            kind = "whole number" if must_be_whole else "number"
            raise Refused(
                Code.EXAMPLES, f"the metric {self.examples_key!r} is {short(examples)}, not a {kind} from 0 to 2^53"
            )
        # A metric that is not a finite number is left out; the update is kept.
        singles = _single(metrics)
        numbers = {
            name: float(value)
            for name, value in singles.items()
            if name != self.examples_key and isinstance(value, (int, float)) and abs(value) < LARGEST_METRIC
            if name.isprintable() and len(name) < 100
        }
        if len(numbers) > MAX_METRICS:
            classes = {name: value for name, value in numbers.items() if name.startswith(CLASS_COUNT_PREFIX)}
            others = {name: value for name, value in numbers.items() if name not in classes}
            numbers = dict(islice(others.items(), MAX_METRICS)) | dict(islice(classes.items(), MAX_CLASSES))
        if len(numbers) + 1 == len(singles):
            return Report(node, examples, numbers)
        left_out = [short(name) for name in singles if name not in numbers and name != self.examples_key]
        return Report(node, examples, numbers, tuple(left_out[:MAX_LEFT_OUT]))

    def _steps(self, node: str, message: Message) -> Tensor | None:
        """Return the updates of single batches `[S, P]` in a reply, if it has them and the rule uses them."""
        if not self.wants_batch_updates(node) or not isinstance(record := message.content.get(STEPS), ArrayRecord):
            return None
        return decoded_steps(record, self.layout)


def _single(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `metrics` with the entries of each list of up to `MAX_METRICS` numbers as metrics `name[i]`."""
    if not any(isinstance(value, list) for value in metrics.values()):
        return metrics
    singles: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, list) and 0 < len(value) <= MAX_METRICS:
            singles |= {f"{name}[{index}]": number for index, number in enumerate(value)}
        else:
            singles[name] = value
    return singles


def _only(records: Records, kind: type[Any], ignored: str = "") -> Any:
    """Return the only record of the type `kind`, apart from the one called `ignored`. Raises `Refused` otherwise."""
    matching = [record for name, record in records if isinstance(record, kind) and name != ignored]
    if len(matching) != 1:
        raise Refused(Code.RECORDS, f"it has {len(matching)} records of the type {kind.__name__}, not one")
    return matching[0]
