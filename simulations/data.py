"""Data sets for simulations: the digits that scikit-learn ships, or files by path."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.tables import TABLES, Rows, read_parquet, read_table

DIGITS = "digits"


class UnknownData(ValueError):
    """There is nothing at a path, or nothing that we read."""


@dataclass(frozen=True)
class Examples:
    """`inputs [n, ...]`, `targets [n]` int64, and whose they are, if the data say: the site of each, or the `offsets`
    of sites that lie one after another.

    Inputs are float32; or bytes, of which `scaled` says what a model takes: `(input / 255 - mean) / deviation`.
    """

    inputs: Tensor
    targets: Tensor
    sites: tuple[str, ...] | None = None
    offsets: NDArray[np.int64] | None = None
    scaled: tuple[float, float] = (0.0, 1.0)
    is_mapped: bool = False  # the inputs lie in a file and are read when they are looked at

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"there are {len(self.inputs)} inputs for {len(self.targets)} labels")
        if self.offsets is not None and not _are_offsets(self.offsets, len(self)):
            raise ValueError(f"its offsets do not rise from 0 to the {len(self)} examples; give one more than sites")
        if len(self.targets) and self.targets.min() < 0:
            raise ValueError(f"the label {int(self.targets.min())} is negative; count classes from 0")

    def __len__(self) -> int:
        return len(self.targets)

    def inputs_at(self, places: slice | Tensor) -> Tensor:
        """The inputs at `places`, as a model takes them."""
        if isinstance(places, slice):
            inputs = self.inputs[places]
        else:  # several times as fast as indexing with a tensor
            inputs = self.inputs.index_select(0, places.flatten()).unflatten(0, places.shape)
        if inputs.dtype != torch.uint8:
            return inputs
        mean, deviation = self.scaled
        return inputs.float().div_(255).sub_(mean).div_(deviation)

    def to(self, device: torch.device) -> Examples:
        """With all examples on `device`, unless they are mapped, and so may be more than it holds."""
        if self.is_mapped or self.inputs.device == device:
            return self
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def normalised(self, mean: float, deviation: float) -> Examples:
        """With inputs that are given to a model as `(input - mean) / deviation`."""
        if self.inputs.dtype == torch.uint8:
            return replace(self, scaled=(mean, deviation))
        return replace(self, inputs=(self.inputs - mean) / deviation)

    def rows(self, rows: Tensor) -> Examples:
        """The examples at `rows [m]`."""
        sites = None if self.sites is None else tuple(self.sites[row] for row in rows.tolist())
        return replace(
            self, inputs=self.inputs[rows], targets=self.targets[rows], sites=sites, offsets=None, is_mapped=False
        )


@dataclass(frozen=True)
class Source:
    """Examples to train on and to test on."""

    train: Examples
    test: Examples

    @property
    def classes(self) -> int:
        """How many classes there are, counting from label 0."""
        return int(max(self.train.targets.max(), self.test.targets.max())) + 1


def load(
    source: str,
    *,
    label: str | None = None,
    positive_above: float | None = None,
    test_fraction: float = 0.2,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Source:
    """Read `source` ("digits", or the path of a file or folder); inputs become `(input - mean) / deviation`.

    A folder holds idx files (MNIST's names, gzipped or not), `train` and `test` files of one kind, the arrays
    x_train.npy, y_train.npy, x_test.npy, y_test.npy (mapped into memory, bytes as pixels or float32), or one
    table per site (.csv or .data; the file's name is the site's). A file is .npz (`x_train`, `y_train`,
    `x_test`, `y_test`, or `x` and `y`), .csv, .data or .parquet. In a table the column `label` (default:
    one so called, else the last) is the target, "?" and empty cells are missing; columns missing in over a
    third of the rows are dropped, then rows with gaps, and the rest is standardised. `positive_above` makes
    the label binary. Where no test set comes along, `test_fraction` of each site is set aside.

    Pixels are read as 0 to 1. Where clients lie one after another, `offsets` beside `y_train` (N + 1 numbers from 0)
    say where each begins, for partition.kind = "site".

    Raises `ValueError` for a path that is not there or holds nothing known.
    """
    try:
        read = _read(source, label, positive_above, test_fraction)
    except UnknownData:
        raise
    except Exception as error:  # files are written by others
        raise ValueError(f"The data at {source!r} cannot be read: {str(error) or type(error).__name__}.") from error
    if not len(read.train) or not len(read.test):
        raise ValueError(
            f"The data at {source!r} gives {len(read.train)} examples to train and {len(read.test)} to test on; "
            "give more, or a larger test_fraction."
        )
    return Source(*(part.normalised(mean, deviation) for part in (read.train, read.test)))


def _read(source: str, label: str | None, positive_above: float | None, test_fraction: float) -> Source:
    if source == DIGITS:
        return _split(_digits(), test_fraction)
    path = Path(source).expanduser()
    if not path.exists():
        raise UnknownData(f"There is no data at {source!r}; give the path of a file or folder, or {DIGITS!r}.")
    kinds = sorted({_kind(file) for file in (path.iterdir() if path.is_dir() else [path])})
    if "idx" in kinds:
        return _idx(path if path.is_dir() else path.parent)
    if path.is_dir() and ".npy" in kinds:
        return _npy(path)
    if path.suffix == ".npz":
        return _npz(path, test_fraction)
    if ".parquet" in kinds:
        return _parquet(path, label, test_fraction)
    if set(kinds) & set(TABLES):
        return _tables(path, label, positive_above, test_fraction)
    raise UnknownData(
        f"The data at {source!r} is of no known kind (found: {', '.join(kinds) or 'nothing'}); "
        "give idx, npz, csv, data or parquet files."
    )


def _kind(file: Path) -> str:
    return "idx" if file.name.removesuffix(".gz").endswith("-ubyte") else file.suffix


def _digits() -> Examples:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Examples(torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))


def _idx(folder: Path) -> Source:
    def read(part: str, kind: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        found = sorted(folder.glob(f"{part}-{kind}-idx?-ubyte*"))
        if not found:
            raise ValueError(f"The folder {folder} has no file {part}-{kind}-idx*-ubyte; MNIST's four are needed.")
        data = found[0].read_bytes()
        data = gzip.decompress(data) if found[0].suffix == ".gz" else data
        dimensions = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dimensions)

    def examples(part: str) -> Examples:
        pixels = torch.from_numpy(read(part, "images").astype(np.float32) / 255).unsqueeze(1)
        return Examples(pixels, torch.from_numpy(read(part, "labels").astype(np.int64)))

    return Source(examples("train"), examples("t10k"))


def _npz(path: Path, test_fraction: float) -> Source:
    with np.load(path, allow_pickle=False) as arrays:

        def examples(suffix: str) -> Examples:
            inputs, targets = (arrays[f"{name}{suffix}"] for name in "xy")
            _require_classes(targets)
            return Examples(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.int64))

        if "x_train" in arrays:
            offsets = arrays.get("offsets")
            return Source(replace(examples("_train"), offsets=offsets), examples("_test"))
        if "x" in arrays:
            return _split(examples(""), test_fraction)
        names = ", ".join(arrays)
    raise ValueError(f"The file {path} holds {names}; name its arrays x and y, or x_train, y_train, x_test, y_test.")


def _npy(folder: Path) -> Source:
    def array(name: str, mapped: bool = False) -> Any:
        return np.load(folder / f"{name}.npy", mmap_mode="c" if mapped else None, allow_pickle=False)

    inputs, test = torch.from_numpy(array("x_train", mapped=True)), torch.from_numpy(array("x_test"))
    if inputs.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"its x_train is {inputs.dtype}; save it as uint8 or float32")
    targets = torch.from_numpy(array("y_train").astype(np.int64))
    offsets = array("offsets").astype(np.int64) if (folder / "offsets.npy").is_file() else None
    tested = test.float() / 255 if test.dtype == torch.uint8 else test.float()
    return Source(
        Examples(inputs, targets, offsets=offsets, is_mapped=True),
        Examples(tested, torch.from_numpy(array("y_test").astype(np.int64))),
    )


def _parquet(path: Path, label: str | None, test_fraction: float) -> Source:
    def examples(file: Path) -> Examples:
        inputs, targets = read_parquet(file, label)
        return Examples(torch.from_numpy(inputs), torch.from_numpy(targets))

    if path.is_file():
        return _split(examples(path), test_fraction)
    return Source(examples(path / "train.parquet"), examples(path / "test.parquet"))


def _tables(path: Path, label: str | None, positive_above: float | None, test_fraction: float) -> Source:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in TABLES)
    sites = [(file.stem.rpartition(".")[2], read_table(file, label)) for file in files]
    rows = Rows.together([table for _, table in sites]).complete().standardised()
    names = tuple(sites[origin][0] for origin in rows.origins)
    labels = rows.labels if positive_above is None else rows.labels > positive_above
    _require_classes(labels)
    examples = Examples(torch.tensor(rows.inputs, dtype=torch.float32), torch.tensor(labels.astype(np.int64)), names)
    return _split(examples if len(sites) > 1 else replace(examples, sites=None), test_fraction)


def _are_offsets(offsets: NDArray[np.int64], examples: int) -> bool:
    rising = len(offsets) > 1 and bool((np.diff(offsets) > 0).all())
    return rising and offsets[0] == 0 and offsets[-1] == examples


def _require_classes(labels: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> None:
    if (labels != np.floor(labels)).any():
        raise ValueError("its labels are no whole numbers; set data.positive_above to make them binary")


def _split(examples: Examples, test_fraction: float) -> Source:
    """Set every k-th example of each site and label aside: nothing random, so every seed tests on the same."""
    strata: dict[object, list[int]] = {}
    for row, target in enumerate(examples.targets.tolist()):
        strata.setdefault((examples.sites and examples.sites[row], target), []).append(row)
    tests = torch.zeros(len(examples), dtype=torch.bool)
    for rows in strata.values():
        size = round(test_fraction * len(rows))
        tests[[rows[i * len(rows) // size] for i in range(size)]] = True
    return Source(examples.rows((~tests).nonzero()[:, 0]), examples.rows(tests.nonzero()[:, 0]))
