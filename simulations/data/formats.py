"""Readers of the supported file formats: idx images, npz and npy arrays, tables, parquet."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.parquet import read_parquet
from corymb.simulations.data.tables import TABLES, Rows, read_table
from corymb.simulations.data.targets import CLASSES, as_targets, strata_of


@dataclass(frozen=True)
class Options:
    """The settings that readers use; see `DataSettings`, and `TaskSettings` for `kind`."""

    label: str | list[str] | None = None
    site: str | None = None
    kind: str = "classification"  # of the task
    integers: bool = False
    positive_above: float | None = None
    test_fraction: float = 0.2
    split_seed: int | None = None


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


def made(inputs: NDArray[Any], targets: NDArray[Any], options: Options, **more: Any) -> Examples:
    """Return examples of raw arrays: bytes are pixels and scaled, unless inputs stay integers."""
    made_targets = as_targets(targets, options.kind)
    strata = strata_of(made_targets, options.kind)
    return Examples(_inputs(inputs, options), made_targets, strata=strata, **more)


def _inputs(inputs: NDArray[Any], options: Options) -> torch.Tensor:
    if options.integers and inputs.dtype.kind in "iu":
        return torch.from_numpy(inputs.astype(np.int64))
    return scaled_pixels(inputs) if inputs.dtype == np.uint8 else torch.tensor(inputs, dtype=torch.float32)


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
        return Examples(scaled_pixels(read(part, "images")), torch.from_numpy(read(part, "labels").astype(np.int64)))

    return Source(examples("train"), examples("t10k"))


def _npz(path: Path, options: Options) -> Source:
    with np.load(path, allow_pickle=False) as arrays:

        def examples(suffix: str) -> Examples:
            return made(arrays[f"x{suffix}"], arrays[f"y{suffix}"], options)

        if "x_train" in arrays:
            offsets = arrays.get("offsets")
            return Source(replace(examples("_train"), offsets=offsets), examples("_test"))
        if "x" in arrays:
            return split(examples(""), options)
        names = ", ".join(arrays)
    raise ValueError(f"the file {path} has arrays {names}; name them x and y, or x_train, y_train, x_test, y_test")


def _npy(path: Path, options: Options) -> Source:
    """Read the arrays of a folder; x_train.npy is memory-mapped."""

    def array(name: str, mapped: bool = False) -> Any:
        return np.load(path / f"{name}.npy", mmap_mode="c" if mapped else None, allow_pickle=False)

    inputs = array("x_train", mapped=True)
    inputs = inputs if options.integers else channels_first(inputs)
    fitting = (np.dtype(np.int64),) if options.integers else (np.dtype(np.uint8), np.dtype(np.float32))
    if inputs.dtype not in fitting:
        raise ValueError(f"the array x_train is {inputs.dtype}; save it as {' or '.join(map(str, fitting))}")
    offsets = array("offsets").astype(np.int64) if (path / "offsets.npy").is_file() else None
    targets = as_targets(array("y_train"), options.kind)
    strata = strata_of(targets, options.kind)
    return Source(
        Examples(torch.from_numpy(inputs), targets, offsets=offsets, is_mapped=True, strata=strata),
        made(array("x_test"), array("y_test"), options),
    )


def channels_first(inputs: NDArray[Any]) -> NDArray[Any]:
    """Return images of bytes as `[n, channels, height, width]`: `inputs` may lack the channels or have them last.

    Inputs of another dtype, or without height and width, are returned as they are. The result is a view.
    """
    if inputs.dtype != np.uint8:
        return inputs
    if inputs.ndim == 3:
        return inputs[:, None]
    if inputs.ndim == 4 and inputs.shape[3] in (1, 3, 4) and inputs.shape[1] > 4:
        return inputs.transpose(0, 3, 1, 2)
    return inputs


def scaled_pixels(inputs: NDArray[Any]) -> torch.Tensor:
    """Return the bytes of images as float32 from 0 to 1, with the channels first; see `channels_first`."""
    return torch.from_numpy(np.ascontiguousarray(channels_first(inputs)).astype(np.float32) / 255)


def _parquet(path: Path, options: Options) -> Source:
    def examples(files: list[Path]) -> tuple[Examples, str]:
        if isinstance(options.label, list):
            raise ValueError("parquet files have one label column; name one in data.label")
        inputs, targets, label = read_parquet(files, options.label)
        return made(inputs, targets, options), f"The label is the column {label!r}."

    if path.is_file():
        table, note = examples([path])
        return replace(split(table, options), notes=(note,))
    parts = [sorted(path.glob(f"{part}*.parquet")) for part in ("train", "test")]
    if not any(parts):
        return _parquet_per_site(sorted(path.glob("*.parquet")), options)
    if not all(parts):
        raise ValueError(f"the folder {path} needs files train*.parquet and test*.parquet")
    (train, note), (test, _) = map(examples, parts)
    return Source(train, test, (note,))


def _parquet_per_site(files: list[Path], options: Options) -> Source:
    """Read one file per site; the file's name is the site's."""
    if isinstance(options.label, list):
        raise ValueError("parquet files have one label column; name one in data.label")
    inputs, targets, labels = zip(*(read_parquet([file], options.label, files[0]) for file in files), strict=True)
    sites = tuple(file.stem for file, own in zip(files, targets, strict=True) for _ in own)
    examples = made(np.concatenate(inputs), np.concatenate(targets), options, sites=sites)
    return replace(split(examples, options), notes=(f"Each file is a site. The label is the column {labels[0]!r}.",))


def _table(path: Path, options: Options) -> Source:
    """Read one table, or one table per site."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in TABLES)
    rows = Rows.of([read_table(file, options.label, options.site) for file in files]).complete()
    return source_of_rows(rows, options)


def source_of_rows(rows: Rows, options: Options) -> Source:
    """Split the rows of tables, and standardise their columns."""
    labels, notes = rows.classes(options.positive_above) if options.kind in CLASSES else (rows.labels, ())
    targets = as_targets(labels, options.kind)
    inputs = torch.tensor(rows.inputs, dtype=torch.float64)
    examples = Examples(inputs, targets, rows.sites, strata=strata_of(targets, options.kind))
    return replace(standardised(split(examples, options)), notes=(*rows.notes, *notes))


def standardised(source: Source) -> Source:
    """Scale each column to mean 0 and standard deviation 1 over the training examples; constant columns become 0."""
    inputs = source.train.inputs
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    train, test = (
        replace(part, inputs=((part.inputs - mean) / deviation).float()) for part in (source.train, source.test)
    )
    return Source(train, test, source.notes)


def split(examples: Examples, options: Options) -> Source:
    """Split `examples`: about `test_fraction` of each site and label become the test examples.

    The split takes every k-th example. With `split_seed` the examples are shuffled before. All seeds of an experiment
    have the same test set.
    """
    order: list[int] = list(range(len(examples)))
    if options.split_seed is not None:
        order = np.random.default_rng(options.split_seed).permutation(len(examples)).tolist()
    targets = examples.labels.tolist() if options.kind != "tokens" else [0] * len(examples)
    strata: dict[object, list[int]] = {}
    for row in order:
        strata.setdefault((examples.sites and examples.sites[row], targets[row]), []).append(row)
    is_test = torch.zeros(len(examples), dtype=torch.bool)
    for rows in strata.values():
        size = round(options.test_fraction * len(rows))
        is_test[[rows[i * len(rows) // size] for i in range(size)]] = True
    return Source(examples.rows((~is_test).nonzero()[:, 0]), examples.rows(is_test.nonzero()[:, 0]))


SPLIT = frozenset({"test_fraction", "split_seed"})
IDX = Format("idx files", frozenset(), _idx)
NPY = Format("npy files", frozenset(), _npy)
NPZ = Format("an npz file", SPLIT, _npz)
PARQUET = Format("parquet files", SPLIT | {"label"}, _parquet)
TABLE = Format("tables", SPLIT | {"label", "site", "positive_above"}, _table)
