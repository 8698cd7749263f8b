"""Data sets from Python: arrays, torch datasets, pandas frames and datasets of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.formats import Options, made, source_of_rows, split
from corymb.simulations.data.tables import Rows, Table, column_of

FRAME = Path("frame")
EXPECTED = "return a Source, (x_train, y_train, x_test, y_test), (x, y), a torch dataset or two, or a pandas frame"


def as_source(value: Any, options: Options) -> Source:
    """Convert `value` to a `Source`. Without test examples in it, a part of each label becomes the test set.

    Raises `ValueError` for anything else than what `data.options` lists.
    """
    if isinstance(value, Source):
        return value
    if hasattr(value, "columns") and hasattr(value, "to_numpy"):
        return source_of_rows(_rows_of_frame(value, options), options)
    if isinstance(value, dict) and {"train", "test"} <= value.keys():
        value = (value["train"], value["test"])
    if _is_dataset(value):
        return split(made(*_arrays_of(value, options), options), options)
    if isinstance(value, (tuple, list)):
        if len(value) == 2 and all(map(_is_dataset, value)):
            train, test = (made(*_arrays_of(part, options), options) for part in value)
            return Source(train, test)
        try:
            arrays = [_array(part) for part in value]
        except (TypeError, ValueError, RuntimeError):
            arrays = []
        if len(arrays) == 2:
            return split(made(arrays[0], arrays[1], options), options)
        if len(arrays) == 4:
            return Source(_kept(arrays[0], arrays[1], options), _kept(arrays[2], arrays[3], options))
    raise ValueError(f"the function returned a {type(value).__name__}; {EXPECTED}")


def _kept(inputs: NDArray[Any], targets: NDArray[Any], options: Options) -> Examples:
    """Return examples of a user's own arrays, which are not scaled."""
    if inputs.dtype == np.uint8 and not options.integers:
        inputs = inputs.astype(np.float32)
    return made(inputs, targets, options)


def _array(values: Any) -> NDArray[Any]:
    array: NDArray[Any] = torch.as_tensor(values).numpy()
    return array


def _is_dataset(value: Any) -> bool:
    return isinstance(value, Dataset) or hasattr(value, "column_names")


def _arrays_of(data: Any, options: Options) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the inputs and the targets of all examples of a dataset."""
    if hasattr(data, "column_names"):
        names = list(data.column_names)
        label = str(options.label) if options.label else names[column_of(FRAME, names, None, "label")]
        others = [name for name in names if name not in (label, options.site)]
        if len(others) == 1:
            return np.stack([np.asarray(value) for value in data[others[0]]]), np.asarray(data[label])
        columns = [np.asarray(data[name], dtype=np.float32) for name in others]
        return np.stack(columns, axis=1), np.asarray(data[label])
    inputs, targets = default_collate([data[index] for index in range(len(data))])
    return inputs.numpy(), torch.as_tensor(targets).numpy()


def _rows_of_frame(frame: Any, options: Options) -> Rows:
    """Return the rows of a pandas frame, whose columns are numbers, but for the site."""
    names = [str(name) for name in frame.columns]
    labels = options.label if isinstance(options.label, list) else [options.label]
    places = [column_of(FRAME, names, label, "label") % len(names) for label in labels]
    sites, used = None, set(places)
    if options.site is not None:
        site = column_of(FRAME, names, options.site, "site")
        sites = tuple(map(str, frame.iloc[:, site]))
        used.add(site)
    kept = [place for place in range(len(names)) if place not in used]
    values = np.stack([_numbers(frame, names, place) for place in (*kept, *places)], axis=1)
    targets = values[:, len(kept) :]
    table = Table(
        FRAME, values[:, : len(kept)], targets[:, 0] if len(places) == 1 else targets,
        tuple(names[place] for place in kept), f"the column {names[places[0]]!r}", sites,
    )  # fmt: skip
    return Rows.of([table]).complete()


def _numbers(frame: Any, names: list[str], place: int) -> NDArray[np.float64]:
    """Return the column of a frame at `place`. Raises `ValueError` if it does not hold numbers."""
    column = frame.iloc[:, place]
    try:
        numbers: NDArray[np.float64] = column.to_numpy(dtype=np.float64)
        return numbers
    except (TypeError, ValueError):
        example = next((value for value in column if isinstance(value, str)), column.iloc[0])
        raise ValueError(
            f"the column {names[place]!r} of the frame has values that are no numbers, such as {example!r}; leave it "
            "out, encode it, with pandas.get_dummies for example, or name it in data.site if it is each row's site"
        ) from None
