"""Tables: numbers in columns, a label in one of them, gaps where nothing is known."""

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
MOST_MISSING = 1 / 3  # of a column, before it is dropped
LABELS = ("label", "target", "y", "class")


@dataclass(frozen=True)
class Rows:
    """`inputs [n, d]` with NaN for gaps, `labels [n]`, and the number of the table each row is from."""

    inputs: Floats
    labels: Floats
    origins: tuple[int, ...]

    @classmethod
    def together(cls, tables: list[tuple[Floats, Floats]]) -> Rows:
        """All tables one below the other; they must have the same columns."""
        widths = {inputs.shape[1] for inputs, _ in tables}
        if len(widths) != 1:
            raise ValueError(f"The sites' tables have {sorted(widths)} columns; give them the same.")
        origins = tuple(i for i, (_, labels) in enumerate(tables) for _ in labels)
        return cls(np.concatenate([t[0] for t in tables]), np.concatenate([t[1] for t in tables]), origins)

    def complete(self) -> Rows:
        """Without columns that are mostly gaps, then without rows that have any."""
        columns = np.isnan(self.inputs).mean(axis=0) <= MOST_MISSING
        inputs = self.inputs[:, columns]
        whole = ~(np.isnan(inputs).any(axis=1) | np.isnan(self.labels))
        if not whole.any():
            raise ValueError(f"None of the {len(inputs)} rows is complete; fill the gaps first.")
        origins = tuple(origin for origin, keep in zip(self.origins, whole, strict=True) if keep)
        return Rows(inputs[whole], self.labels[whole], origins)

    def standardised(self) -> Rows:
        """Each column with mean 0 and deviation 1 (constant ones become 0)."""
        deviation = self.inputs.std(axis=0)
        inputs = (self.inputs - self.inputs.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
        return Rows(inputs, self.labels, self.origins)


def read_table(path: Path, label: str | None) -> tuple[Floats, Floats]:
    """The inputs and labels of a comma-separated file, with or without a line of column names."""
    with path.open(newline="") as file:
        lines = [line for line in csv.reader(file, skipinitialspace=True) if line]
    if not lines:
        raise ValueError(f"The table {path} is empty; give rows of numbers.")
    names = None if all(_is_number(cell) for cell in lines[0]) else lines.pop(0)
    target = _label_column(path, names, label)
    if not lines or len({len(line) for line in lines}) > 1:
        raise ValueError(
            f"the rows of {path.name} have {sorted({len(line) for line in lines})} cells; give all the same"
        )
    try:
        cells = np.array([[float(c) if c not in ("", "?") else np.nan for c in line] for line in lines])
    except ValueError as error:
        raise ValueError(f"The table {path} has a cell that is no number ({error}); encode it first.") from None
    return np.delete(cells, target, axis=1), cells[:, target]


def read_parquet(path: Path, label: str | None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The inputs and labels of a parquet file: number columns, or one column of encoded images."""
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet files need pyarrow and pillow: pip install 'corymb[parquet]'.") from None
    if not path.exists():
        raise ValueError(f"There is no file {path}; a folder of parquet files holds train.parquet and test.parquet.")
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
        has = f"it has {', '.join(names)}" if names else "it has no line of column names"
        raise ValueError(f"The table {path} has no column {label!r}; {has}.")
    return names.index(label)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell in ("", "?")
    return True
