"""Generated hostile replies, each a good one that was changed with knowledge of its structure.

Whatever a reply holds, the door returns a verdict on it and raises nothing, and a reply that is admitted is harmless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import set_message_id, set_reply_to, set_task_identity
from corymb.server import Method, Policy, Requests, Round, conclude
from corymb.server.rounds.array_checks import LARGEST_NUMBER
from corymb.server.rounds.conclude import conclude_evaluation
from corymb.server.rounds.door import MAX_CLASSES, MAX_METRICS
from corymb.strategies import FedAvg, Layout

STATE = {"w": torch.ones(4, 3), "b": torch.zeros(3), "n": torch.tensor(4)}
LAYOUT = Layout.of(STATE)
NODES = {11: "north", 12: "south", 13: "east"}
Change = Callable[[Message], None]

NAMES = ["arrays", "metrics", "steps", "w", "num-examples", "\x00", "a\n" * 50]
text = st.one_of(st.text(max_size=8), st.sampled_from(NAMES))
numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 0.5, 2**53, 2**53 + 1, 10**400, True]),
)
values = st.one_of(numbers, st.lists(numbers, max_size=3), st.text(max_size=5), st.binary(max_size=5), st.none())
shapes = st.one_of(
    st.lists(st.integers(-2, 5), max_size=4).map(tuple),
    st.sampled_from([(4, 3), (12,), (2**40,), (2**62, 4), (0, 3), (4.0, 3), ("4", 3), ((4,), 3)]),
)
DTYPES = ["float32", "float64", "int64", "object", "<f4", "O", "V2", "complex64"]
dtypes = st.one_of(st.text(max_size=6), st.sampled_from(DTYPES))
KINDS = ["record", "drop", "metric", "many", "array", "bytes", "values", "config", "steps", "id", "error"]
descriptions = st.sampled_from(["<f4", ">f4", "<f8", "|O", "<i8", "<c8", "|S4", "<U4", "|V2", "f4,f4", "", "<f4" * 40])


def edit(record: Any, key: str, value: Any) -> None:
    """Set an entry of a record without Flower's checks, as bytes from the network may."""
    record.__dict__["_data"][key] = value


def edit_all(message: Message, kind: type, entries: dict[str, Any]) -> None:
    """Set entries of each record of a kind."""
    for record in message.content.values():
        if isinstance(record, kind):
            for key, value in entries.items():
                edit(record, key, value)


@st.composite
def headers(draw: Any) -> bytes:
    """The bytes of an .npy file whose header may lie in each of its parts."""
    shape, description = draw(shapes), draw(descriptions)
    order = draw(st.sampled_from(["False", "True", "None", "1"]))
    written = f"{{'descr': {description!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}"
    written = draw(
        st.sampled_from([written, written[:-5], "(" * 200, f"[{written}]", written.replace("shape", "shap")])
    )
    header = written.encode()
    length = draw(st.sampled_from([len(header), 0, 2**16 - 1, len(header) + 7]))
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff"]))
    width = 4 if version == b"\x02\x00" else 2
    magic = draw(st.sampled_from([b"\x93NUMPY", b"\x93NUMPY", b"NUMPY\x93", b"\x80\x04."]))
    return bytes(magic + version + length.to_bytes(width, "little") + header + draw(st.binary(max_size=60)))


@st.composite
def changes(draw: Any) -> Change:
    """A change of one reply."""
    kind = draw(st.sampled_from(KINDS))
    name, value = draw(text), draw(values)
    if kind == "record":
        record = draw(
            st.sampled_from([ArrayRecord(), MetricRecord(), ConfigRecord(), MetricRecord({"num-examples": 9})])
        )
        return lambda m: edit(m.content, name, record)
    if kind == "drop":
        place = draw(st.integers(0, 1))
        return lambda m: [m.content.pop(key) for key in list(m.content)[place : place + 1]].clear()
    if kind == "metric":
        key = draw(st.sampled_from(["num-examples", "loss", name]))
        return lambda m: edit_all(m, MetricRecord, {key: value})
    if kind == "many":
        count = draw(st.sampled_from([101, 1500]))
        many = {f"{draw(st.sampled_from(['m', 'examples-of-class-']))}{i}": 1.0 for i in range(count)}
        return lambda m: edit_all(m, MetricRecord, many)
    if kind == "array":
        key = draw(st.sampled_from(["w", "b", "n", name]))
        array = Array("float32", (3,), "numpy.ndarray", b"")
        stype = draw(st.sampled_from(["numpy.ndarray", "", "pickle"]))
        array.__dict__.update(dtype=draw(dtypes), shape=draw(shapes), stype=stype, data=draw(headers()))
        return lambda m: edit_all(m, ArrayRecord, {key: array})
    if kind == "bytes":
        key = draw(st.sampled_from(["w", "b"]))
        data = draw(headers())
        honest = STATE[key]
        array = Array("float32", tuple(honest.shape), "numpy.ndarray", data)
        return lambda m: edit_all(m, ArrayRecord, {key: array})
    if kind == "values":
        number = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -1e21, 1e20, 1e19]))
        w = torch.ones(4, 3).index_fill(0, torch.tensor([draw(st.integers(0, 3))]), number)
        return lambda m: edit_all(m, ArrayRecord, {"w": to_arrays({"w": w})["w"]})
    if kind == "config":
        return lambda m: edit(m.content, "answered", ConfigRecord({"nonce": str(value)}))
    if kind == "steps":
        steps = to_arrays({"w": torch.ones(draw(st.integers(0, 300)), 4, 3), "b": torch.ones(2, 3)})
        return lambda m: edit(m.content, "steps", steps)
    if kind == "id":
        return lambda m: set_reply_to(m, "request-12")  # that of another node
    code, reason = draw(st.integers(-5, 2000)), draw(st.text(max_size=20)) * 20

    def fail(message: Message) -> None:
        message.__dict__.update(_content=None, _error=Error(code, reason))

    return fail


def message_from(node: int, change: list[Change]) -> Message:
    set_task_identity(run_id=1, node_id=1)
    request = Message(RecordDict(), node, "train")
    set_message_id(request, f"request-{node}")
    metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
    reply = Message(RecordDict({"arrays": to_arrays(STATE), "metrics": metrics}), reply_to=request)
    for each in change:
        if reply.has_content():
            each(reply)
    return reply


def check(changed: list[Change], policy: Policy | None) -> str:
    """Conclude a round and an evaluation with one hostile reply, and return the verdict on it."""
    requests = Requests({f"request-{node}": name for node, name in NODES.items()}, tuple(NODES.values()), NODES)
    method = Method(FedAvg(), policy=policy)
    state = method.initial(LAYOUT.flatten(STATE))
    replies = [message_from(11, changed), message_from(12, []), message_from(13, [])]
    after, record = conclude(state, Round(1, method, requests), replies)
    honest, _ = conclude(state, Round(1, method, requests), replies[1:])
    codes = {verdict.node: verdict.code for verdict in record.verdicts}
    assert codes["east"] == "admitted"
    assert after.model.parameters.isfinite().all()
    assert after.model.parameters.abs().max() <= LARGEST_NUMBER
    for verdict in record.verdicts:
        assert "\n" not in verdict.reason
        assert len(verdict.metrics) <= MAX_METRICS + MAX_CLASSES
        assert all(np.isfinite(number) for number in verdict.metrics.values())
    assert codes["south"] == "admitted"  # whatever the reply says of itself
    if codes["north"] != "admitted":
        assert torch.equal(after.model.parameters, honest.model.parameters)
    replies = [message_from(11, changed), message_from(13, [])]
    _, evaluations, means = conclude_evaluation(state, Round(1, method, requests), replies)
    assert all(np.isfinite(mean) for mean in means.values())
    assert {verdict.node: verdict.code for verdict in evaluations}["east"] == "admitted"
    return codes["north"]


policies = st.sampled_from([None, Policy(max_norm=1.0, max_share=0.5, max_examples=100, max_strikes=1)])


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(changed=st.lists(changes(), min_size=1, max_size=4), policy=policies)
def test_no_reply_raises_and_none_does_harm(changed: list[Change], policy: Policy | None) -> None:
    check(changed, policy)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_ten_thousand_hostile_replies() -> None:
    tally: Counter[str] = Counter()

    @settings(max_examples=1000, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    @given(changed=st.lists(changes(), min_size=1, max_size=4), policy=policies)
    def run(changed: list[Change], policy: Policy | None) -> None:
        tally[check(changed, policy)] += 1

    while tally.total() < 10_000:
        run()
    print(f"{tally.total()} hostile replies, 0 exceptions: {dict(tally.most_common())}")
