"""Readers of tables of numbers, in which one column is the label and cells may be missing."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TABLES = (".csv", ".data")
MAX_MISSING = 1 / 3  # a column with a larger share of missing cells is dropped
LABELS = ("label", "target", "y", "class")  # default names of the label column


@dataclass(frozen=True)
class Rows:
    """`inputs [n, d]` with NaN for missing cells, `labels [n]`, and `origins [n]`, the number of each row's table."""

    inputs: Floats
    labels: Floats
    origins: tuple[int, ...]

    @classmethod
    def concatenated(cls, tables: list[tuple[Floats, Floats]]) -> Rows:
        """Concatenate `tables` of inputs and labels. Raises `ValueError` if their numbers of columns differ."""
        widths = {inputs.shape[1] for inputs, _ in tables}
        if len(widths) != 1:
            raise ValueError(f"the sites' tables have {sorted(widths)} columns; give all tables the same columns")
        origins = tuple(i for i, (_, labels) in enumerate(tables) for _ in labels)
        return cls(np.concatenate([t[0] for t in tables]), np.concatenate([t[1] for t in tables]), origins)

    def complete(self) -> Rows:
        """Drop columns with too many missing cells, then rows with any. Raises `ValueError` if no row is left."""
        columns = np.isnan(self.inputs).mean(axis=0) <= MAX_MISSING
        inputs = self.inputs[:, columns]
        complete = ~(np.isnan(inputs).any(axis=1) | np.isnan(self.labels))
        if not complete.any():
            raise ValueError(f"none of the {len(inputs)} rows is complete; fill in the missing cells")
        origins = tuple(origin for origin, keep in zip(self.origins, complete, strict=True) if keep)
        return Rows(inputs[complete], self.labels[complete], origins)

    def standardised(self) -> Rows:
        """Scale each column to mean 0 and standard deviation 1; constant columns become 0."""
        deviation = self.inputs.std(axis=0)
        inputs = (self.inputs - self.inputs.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
        return Rows(inputs, self.labels, self.origins)


def read_table(path: Path, label: str | None) -> tuple[Floats, Floats]:
    """Return the inputs `[n, d]` and labels `[n]` of a comma-separated file, with or without a header line.

    Raises `ValueError` for an empty or ragged table, a cell that is not a number, and an unknown `label` column.
    """
    with path.open(newline="") as file:
        lines = [line for line in csv.reader(file, skipinitialspace=True) if line]
    if not lines:
        raise ValueError(f"the table {path} is empty; give rows of numbers")
    names = None if all(_is_number(cell) for cell in lines[0]) else lines.pop(0)
    target = _label_column(path, names, label)
    if not lines or len({len(line) for line in lines}) > 1:
        raise ValueError(
            f"the rows of {path.name} have {sorted({len(line) for line in lines})} cells; give at least one row, and "
            "the same number of cells in each"
        )
    try:
        cells = np.array([[float(c) if c not in ("", "?") else np.nan for c in line] for line in lines])
    except ValueError as error:
        raise ValueError(f"the table {path} has a cell that is not a number ({error}); encode it as a number") from None
    return np.delete(cells, target, axis=1), cells[:, target]


def read_parquet(path: Path, label: str | None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the inputs and labels of a parquet file.

    Inputs are the number columns, `[n, d]`, or, if there is a column `image` of encoded images, pixels from 0 to 1,
    `[n, channels, height, width]`. Raises `ValueError` if a package, the file or the `label` column is missing.
    """
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow and pillow; run pip install 'corymb[parquet]'") from None
    if not path.exists():
        raise ValueError(f"the file {path} does not exist; a parquet folder needs train.parquet and test.parquet")
    columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    target = list(columns)[_label_column(path, list(columns), label)]
    labels = np.array(columns.pop(target), dtype=np.int64)
    if "image" in columns:
        pictures = [np.asarray(Image.open(BytesIO(cell["bytes"]))) for cell in columns["image"]]
        pixels = np.stack(pictures).astype(np.float32) / 255
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(pixels), labels
    return np.array(list(columns.values()), dtype=np.float32).T, labels


def _label_column(path: Path, names: list[str] | None, label: str | None) -> int:
    if label is None:
        return next((i for i, name in enumerate(names or []) if name.lower() in LABELS), -1)
    if names is None or label not in names:
        columns = f"it has {', '.join(names)}" if names else "it has no header line"
        raise ValueError(f"the table {path} has no column {label!r}; {columns}")
    return names.index(label)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell in ("", "?")
    return True
