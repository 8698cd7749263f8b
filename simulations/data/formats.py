"""Readers of the supported file formats: idx images, npz and npy arrays, tables, parquet."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.tables import TABLES, Rows, read_parquet, read_table


@dataclass(frozen=True)
class Options:
    """The settings that readers use; see `DataSettings`."""

    label: str | None = None
    positive_above: float | None = None
    test_fraction: float = 0.2


@dataclass(frozen=True)
class Format:
    """A file format: its name in error messages, the names of the options it uses, and its reader."""

    name: str
    options: frozenset[str]
    read: Callable[[Path, Options], Source]


def format_at(path: Path) -> Format:
    """Return the format of the file or folder at `path`. Raises `ValueError` if it is not supported."""
    kinds = {_kind(file) for file in (path.iterdir() if path.is_dir() else [path])}
    if "idx" in kinds:
        return IDX
    if path.is_dir() and ".npy" in kinds:
        return NPY
    if path.suffix == ".npz":
        return NPZ
    if ".parquet" in kinds:
        return PARQUET
    if kinds & set(TABLES):
        return TABLE
    raise ValueError(
        f"the file format is not supported (found: {', '.join(sorted(kinds)) or 'nothing'}); "
        "use idx, npz, npy, csv, data or parquet files"
    )


def _kind(file: Path) -> str:
    """Return "idx" for an idx file, else the suffix of the file's name."""
    return "idx" if file.name.removesuffix(".gz").endswith("-ubyte") else file.suffix


def digits() -> Examples:
    """Return the 1,797 digits of scikit-learn as 8x8 pixels from 0 to 1, `[n, 1, 8, 8]`."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Examples(torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))


def _idx(path: Path, options: Options) -> Source:
    """Read MNIST's four idx files, gzipped or not."""
    folder = path if path.is_dir() else path.parent

    def read(part: str, kind: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        files = sorted(folder.glob(f"{part}-{kind}-idx?-ubyte*"))
        if not files:
            raise ValueError(f"the folder {folder} has no file {part}-{kind}-idx*-ubyte; it needs MNIST's four files")
        data = files[0].read_bytes()
        data = gzip.decompress(data) if files[0].suffix == ".gz" else data
        dimensions = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dimensions)

    def examples(part: str) -> Examples:
        pixels = torch.from_numpy(read(part, "images").astype(np.float32) / 255).unsqueeze(1)
        return Examples(pixels, torch.from_numpy(read(part, "labels").astype(np.int64)))

    return Source(examples("train"), examples("t10k"))


def _npz(path: Path, options: Options) -> Source:
    with np.load(path, allow_pickle=False) as arrays:

        def examples(suffix: str) -> Examples:
            inputs, targets = (arrays[f"{name}{suffix}"] for name in "xy")
            _require_classes(targets)
            return Examples(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.int64))

        if "x_train" in arrays:
            offsets = arrays.get("offsets")
            return Source(replace(examples("_train"), offsets=offsets), examples("_test"))
        if "x" in arrays:
            return split(examples(""), options.test_fraction)
        names = ", ".join(arrays)
    raise ValueError(f"the file {path} has arrays {names}; name them x and y, or x_train, y_train, x_test, y_test")


def _npy(path: Path, options: Options) -> Source:
    """Read the arrays of a folder; x_train.npy is memory-mapped."""

    def array(name: str, mapped: bool = False) -> Any:
        return np.load(path / f"{name}.npy", mmap_mode="c" if mapped else None, allow_pickle=False)

    inputs, test = torch.from_numpy(array("x_train", mapped=True)), torch.from_numpy(array("x_test"))
    if inputs.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"the array x_train is {inputs.dtype}; save it as uint8 or float32")
    targets = torch.from_numpy(array("y_train").astype(np.int64))
    offsets = array("offsets").astype(np.int64) if (path / "offsets.npy").is_file() else None
    test_inputs = test.float() / 255 if test.dtype == torch.uint8 else test.float()
    return Source(
        Examples(inputs, targets, offsets=offsets, is_mapped=True),
        Examples(test_inputs, torch.from_numpy(array("y_test").astype(np.int64))),
    )


def _parquet(path: Path, options: Options) -> Source:
    def examples(file: Path) -> Examples:
        inputs, targets = read_parquet(file, options.label)
        return Examples(torch.from_numpy(inputs), torch.from_numpy(targets))

    if path.is_file():
        return split(examples(path), options.test_fraction)
    return Source(examples(path / "train.parquet"), examples(path / "test.parquet"))


def _table(path: Path, options: Options) -> Source:
    """Read one table, or one table per site."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in TABLES)
    sites = [(file.stem.rpartition(".")[2], read_table(file, options.label)) for file in files]
    rows = Rows.concatenated([table for _, table in sites]).complete().standardised()
    names = tuple(sites[origin][0] for origin in rows.origins)
    labels = rows.labels if options.positive_above is None else rows.labels > options.positive_above
    _require_classes(labels)
    examples = Examples(torch.tensor(rows.inputs, dtype=torch.float32), torch.tensor(labels.astype(np.int64)), names)
    return split(examples if len(sites) > 1 else replace(examples, sites=None), options.test_fraction)


def _require_classes(labels: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> None:
    if (labels != np.floor(labels)).any():
        raise ValueError("the labels are not whole numbers; for a table, set data.positive_above to make them binary")


def split(examples: Examples, test_fraction: float) -> Source:
    """Split `examples`: about `test_fraction` of each site and label become the test examples.

    The split takes every k-th example and uses no random numbers, so all seeds have the same test set.
    """
    strata: dict[object, list[int]] = {}
    for row, target in enumerate(examples.targets.tolist()):
        strata.setdefault((examples.sites and examples.sites[row], target), []).append(row)
    is_test = torch.zeros(len(examples), dtype=torch.bool)
    for rows in strata.values():
        size = round(test_fraction * len(rows))
        is_test[[rows[i * len(rows) // size] for i in range(size)]] = True
    return Source(examples.rows((~is_test).nonzero()[:, 0]), examples.rows(is_test.nonzero()[:, 0]))


IDX = Format("idx files", frozenset(), _idx)
NPY = Format("npy files", frozenset(), _npy)
NPZ = Format("an npz file", frozenset({"test_fraction"}), _npz)
PARQUET = Format("parquet files", frozenset({"label", "test_fraction"}), _parquet)
TABLE = Format("tables", frozenset({"label", "positive_above", "test_fraction"}), _table)
