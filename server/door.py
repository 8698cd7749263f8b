"""The door: one message in, one verdict out. Nothing that a site sends can raise past it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from corymb.protocol.block import BlockArrays
from corymb.protocol.codec import DTYPES, CodecError, to_tensor
from corymb.protocol.flower import NODE_UNAVAILABLE
from corymb.protocol.records import EXAMPLES, STEPS
from corymb.strategies import Layout, Reply, Report
from corymb.strategies.fold import BLOCK
from corymb.strategies.reply import CLASS

Records = list[tuple[str, Any]]  # of a message, by name

MOST_EXAMPLES = 2**53  # beyond it a float cannot count
MOST_METRICS = 100
MOST_CLASSES = 1000  # whose numbers of examples a site may tell, besides
MOST_STEPS = 256  # batches whose updates a site may send
LARGEST_METRIC = 1e100
LARGEST_NUMBER = 1e20  # of a model: times MOST_EXAMPLES it is finite in float32, and nothing trained comes near


class Code(StrEnum):
    """Why a reply was turned away."""

    OFFLINE = "offline"  # the network answered: the node cannot be reached
    ERROR = "error"  # the site answered with an error
    RECORDS = "records"  # not one record of arrays and one of metrics
    EXAMPLES = "examples"  # the number of examples is no number of examples
    NAMES = "names"  # a tensor is missing or too many
    SHAPE = "shape"
    DTYPE = "dtype"
    BYTES = "bytes"  # the bytes are not what the header says
    NOT_FINITE = "not finite"  # or too large to be a trained number
    SILENT = "silent"  # no answer in time


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count, and why, in one sentence that names the node."""

    node: str
    code: Code
    reason: str


class _Refused(Exception):
    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Door:
    """Admits replies of one layout. `examples_key` is the metric that counts a site's examples;
    `wants_steps(node)` says whose updates of single batches are read."""

    layout: Layout
    examples_key: str = EXAMPLES
    wants_steps: Callable[[str], bool] = lambda node: False

    def admit(self, node: str, message: Message | Exception) -> Reply | Rejection:
        """The reply to a training message, checked cheapest first; nothing large is allocated."""
        try:
            if isinstance(message, Exception) or message.has_error():
                return _failure(node, message)
            records = list(message.content.items())
            report = self._report(node, records)
            arrays = _only(records, ArrayRecord, besides=STEPS)
            if isinstance(arrays, BlockArrays) and arrays.fits(self.layout) and arrays.bound <= LARGEST_NUMBER:
                return Reply(report, arrays.place, steps=self._steps(node, message))
            self._check_claims(arrays)
            # Integer buffers are kept from the server's model, so theirs are not even decoded.
            state = {
                entry.name: _decoded(entry.name, arrays) for entry in (*self.layout.parameters, *self.layout.buffers)
            }
            for name, tensor in state.items():
                if not is_bounded(tensor, LARGEST_NUMBER):
                    raise _Refused(
                        Code.NOT_FINITE, f"tensor {name!r} holds NaN, infinity or numbers beyond {LARGEST_NUMBER:g}"
                    )
            return Reply(report, self.layout.parts(state), self.layout.buffers_of(state), self._steps(node, message))
        except Exception as error:
            return _rejection(node, error)

    def hear(self, node: str, message: Message | Exception) -> Report | Rejection:
        """The reply to an evaluation message, which carries metrics only."""
        try:
            if isinstance(message, Exception) or message.has_error():
                return _failure(node, message)
            return self._report(node, list(message.content.items()))
        except Exception as error:
            return _rejection(node, error)

    def _report(self, node: str, records: Records) -> Report:
        metrics: Mapping[str, Any] = _only(records, MetricRecord)
        examples = metrics.get(self.examples_key)
        if not (isinstance(examples, (int, float)) and 0 <= examples <= MOST_EXAMPLES and examples == int(examples)):
            raise _Refused(
                Code.EXAMPLES,
                f"the metric {self.examples_key!r} is {_short(examples)}, not a whole number from 0 to 2^53",
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

    def _check_claims(self, arrays: ArrayRecord) -> None:
        expected = {entry.name: entry for entry in self.layout.entries}
        if missing := expected.keys() - arrays.keys():
            raise _Refused(Code.NAMES, f"tensor {min(missing)!r} is missing")
        if extra := arrays.keys() - expected.keys():
            raise _Refused(Code.NAMES, f"tensor {_short(min(extra))} is not in the model")
        for name, entry in expected.items():
            array = arrays[name]
            if tuple(array.shape) != entry.shape:
                raise _Refused(
                    Code.SHAPE,
                    f"tensor {name!r} has the shape {_short(list(array.shape))}, not {list(entry.shape)}",
                )
            if DTYPES.get(array.dtype) != entry.dtype:
                raise _Refused(Code.DTYPE, f"tensor {name!r} has the dtype {_short(array.dtype)}, not {entry.dtype}")

    def _steps(self, node: str, message: Message) -> Tensor | None:
        """The updates of single batches `[S, P]` that a site sent along, if the rule wants them of it."""
        if not self.wants_steps(node) or not isinstance(record := message.content.get(STEPS), ArrayRecord):
            return None
        names = [entry.name for entry in self.layout.parameters]
        if list(record) != names:
            raise _Refused(Code.NAMES, f"its record {STEPS!r} does not have the model's parameters in their order")
        count = record[names[0]].shape[0] if names and record[names[0]].shape else 0
        if not 0 < count <= MOST_STEPS:
            raise _Refused(Code.SHAPE, f"its record {STEPS!r} has {_short(count)} batches, not 1 to {MOST_STEPS}")
        pieces = []
        for entry in self.layout.parameters:
            array, shape = record[entry.name], (count, *entry.shape)
            if tuple(array.shape) != shape or DTYPES.get(array.dtype) != entry.dtype:
                raise _Refused(Code.SHAPE, f"tensor {entry.name!r} in {STEPS!r} is no {entry.dtype} {list(shape)}")
            piece = _decoded(entry.name, record)
            if not is_bounded(piece, LARGEST_NUMBER):
                raise _Refused(Code.NOT_FINITE, f"tensor {entry.name!r} in {STEPS!r} holds NaN or too large numbers")
            pieces.append(piece.reshape(count, -1).to(self.layout.dtype))
        return torch.cat(pieces, dim=1)


def _only(records: Records, kind: type[Any], besides: str = "") -> Any:
    found = [record for name, record in records if isinstance(record, kind) and name != besides]
    if len(found) != 1:
        raise _Refused(Code.RECORDS, f"it carries {len(found)} records of the type {kind.__name__}, not one")
    return found[0]


def _decoded(name: str, arrays: ArrayRecord) -> Tensor:
    try:
        return to_tensor(name, arrays[name])
    except CodecError as error:
        raise _Refused(Code.BYTES, _short(error)) from None


def is_bounded(tensor: Tensor, bound: float) -> bool:
    """Whether no number lies beyond `bound`, or is none; looked at in blocks, without memory of its own."""
    for piece in tensor.reshape(-1).split(BLOCK):
        if piece.numel():
            least, most = piece.aminmax()  # both are NaN where one number is
            if not (least >= -bound and most <= bound):
                return False
    return True


def _failure(node: str, message: Message | Exception) -> Rejection:
    """What came instead of a reply."""
    if isinstance(message, Exception):
        what = f"{type(message).__name__}: {_short(message)}"
        return Rejection(node, Code.BYTES, f"{node}: its reply cannot be received: {what}.")
    if message.error.code == NODE_UNAVAILABLE:
        return _offline(node, str(message.error.reason)[:1000])
    return Rejection(node, Code.ERROR, f"{node}: error {message.error.code}: {_short(message.error.reason)}.")


@lru_cache(maxsize=1 << 14)  # who is offline is so round after round
def _offline(node: str, reason: str) -> Rejection:
    return Rejection(node, Code.OFFLINE, f"{node}: error {NODE_UNAVAILABLE}: {_short(reason)}.")


def _rejection(node: str, error: Exception) -> Rejection:
    if isinstance(error, _Refused):
        return Rejection(node, error.code, f"{node}: {error}.")
    # Whatever else its content makes us stumble over is the sender's fault, and costs its reply only.
    return Rejection(
        node, Code.RECORDS, f"{node}: its content cannot be read: {type(error).__name__}: {_short(error)}."
    )


def _short(value: object) -> str:
    """What a site sent, fit for a log: printable, one line, bounded."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 and text.isprintable() else ascii(text[:200])
