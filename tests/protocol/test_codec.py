from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from typing import Any

import flwr.app
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corymb.protocol.codec import Array, CodecError, to_arrays, to_state, to_tensor

STATE = {
    "float32": torch.randn(3, 4),
    "float16": torch.randn(2).half(),
    "bfloat16": torch.randn(5, 2).bfloat16(),
    "float64": torch.randn(1).double(),
    "scalar": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(4, 3).t(),
}


def received(record: ArrayRecord) -> ArrayRecord:
    """Return the record as its receiver gets it: Flower's own arrays, with bytes."""
    return ArrayRecord({k: flwr.app.Array(a.dtype, a.shape, a.stype, a.data) for k, a in record.items()})


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def test_a_state_is_unchanged_after_encoding_and_decoding() -> None:
    assert equal(to_state(received(to_arrays(STATE))), STATE)


def test_nothing_is_copied_within_a_process() -> None:
    back = to_state(to_arrays(STATE))
    assert all(back[name].data_ptr() == tensor.data_ptr() for name, tensor in STATE.items())
    array = flwr.app.Array(np.arange(4.0))
    assert to_tensor("x", array).data_ptr() == to_tensor("x", array).data_ptr()


def test_flowers_own_conversion_gives_the_same() -> None:
    state = {name: tensor for name, tensor in STATE.items() if name != "bfloat16"}
    record = to_arrays(state)
    flower_record = ArrayRecord(state)
    assert equal(dict(record.to_torch_state_dict()), dict(flower_record.to_torch_state_dict()))
    assert equal(to_state(flower_record), state)
    numbers = record["float32"].numpy()
    numbers[:] = 0  # an app may modify the array
    assert torch.equal(to_state(record)["float32"], STATE["float32"])


def test_flowers_object_ids_are_the_same() -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3)}
    assert to_arrays(state).object_id == ArrayRecord(state).object_id


def test_arrays_can_be_pickled_and_copied() -> None:
    copied = pickle.loads(pickle.dumps(to_arrays(STATE)["bfloat16"]))
    assert type(copied) is flwr.app.Array
    assert torch.equal(to_tensor("x", copied), STATE["bfloat16"])
    assert torch.equal(to_tensor("x", copy.deepcopy(Array(torch.ones(2)))), torch.ones(2))


def npy(header: str, body: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + (len(text) if length is None else length).to_bytes(2, "little") + text + body


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        ("float32", (2,), b"", "not an .npy file"),
        ("float32", (2,), b"\x93NUMPY\x03\x00", "not an .npy file"),
        ("float32", (2,), npy(GOOD, b"1234567"), "carries 7 bytes"),
        ("float32", (2,), npy(GOOD, b"123456789"), "carries 9 bytes"),
        ("float32", (2,), npy(GOOD, length=60_000), "header of 60000 bytes"),
        ("float32", (2,), npy("not python"), "cannot be read"),
        ("float32", (2,), npy("(" * 900), "cannot be read"),
        (
            "float32",
            (2,),
            npy("{'descr': '>f4', 'fortran_order': False, 'shape': (2,)}", b"12345678"),
            "cannot be read",
        ),
        ("float32", (2,), npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}"), "bytes are object"),
        ("float32", (3,), npy(GOOD, b"12345678"), "declares float32"),
        ("float64", (2,), npy(GOOD, b"12345678"), "declares float64"),
        ("object", (2,), npy(GOOD, b"12345678"), "dtype 'object'"),
        ("float32", (2**40,), npy(GOOD.replace("(2,)", f"({2**40},)"), b"1234"), "carries 4 bytes"),
        ("float32", (-2, -1), npy(GOOD.replace("(2,)", "(-2, -1)"), b"12345678"), "carries 8 bytes"),
    ],
)
def test_false_headers_are_found_before_anything_is_allocated(
    dtype: str, shape: tuple[int, ...], data: bytes, message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        to_tensor("w", flwr.app.Array(dtype, shape, "numpy.ndarray", data))


def test_other_formats_are_refused() -> None:
    with pytest.raises(CodecError, match=r"format 'torch\.pt'"):
        to_tensor("w", flwr.app.Array("float32", (1,), "torch.pt", b""))


@given(st.binary(max_size=300), st.integers(0, 128))
def test_no_bytes_raise_another_exception(noise: bytes, keep: int) -> None:
    good: Any = flwr.app.Array(np.zeros(3, dtype=np.float32)).data
    for data in (noise, good[:keep] + noise, good[:-1] + noise):
        with suppress(CodecError):
            to_tensor("w", flwr.app.Array("float32", (3,), "numpy.ndarray", data))


def test_arrays_are_an_array_record_in_a_message() -> None:
    content = RecordDict({"arrays": to_arrays(STATE), "metrics": MetricRecord({"n": 1}), "config": ConfigRecord()})
    assert list(content.array_records) == ["arrays"]
