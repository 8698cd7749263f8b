"""What to learn from: the digits that scikit-learn ships, files by their path, or a function of the user's own."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from corymb.protocol.settings import Settings
from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.formats import Options, digits, format_at, split
from corymb.strategies.core.registry import Registry

DIGITS = "digits"
SOURCES: Registry[Any] = Registry("data source", {}, "corymb.data")


class UnknownData(ValueError):
    """There is nothing at a path, nothing that is read, or a setting that is of no use there."""


class DataSettings(Settings):
    """Where examples come from; `load` reads them. Inputs become `(input - mean) / deviation`.

    `source` is "digits", the path of a file or folder, or a function: "module:name", or the name that an installed
    package gives in the entry-point group `corymb.data`. A function is called with `options` and returns a `Source`, or
    `(x_train, y_train, x_test, y_test)`. `examples` are drawn to train on, by the seed; default: all.

    In a table the column `label` (default: one so called, else the last) is the target, and `positive_above` makes it
    binary. Where no test set comes along, `test_fraction` of each site is set aside.
    """

    source: str = DIGITS
    options: dict[str, Any] = Field(default_factory=dict)
    label: str | None = None
    positive_above: float | None = None
    test_fraction: float = Field(0.2, gt=0, lt=1)
    examples: int | None = Field(None, ge=1)
    mean: float = 0.0
    deviation: float = Field(1.0, gt=0)

    def load(self) -> Source:
        """Read the source.

        A folder holds idx files (MNIST's names, gzipped or not), `train` and `test` files of one kind, the arrays
        x_train.npy, y_train.npy, x_test.npy, y_test.npy (mapped into memory, bytes as pixels or float32), or one
        table per site (.csv or .data; the file's name is the site's). A file is .npz (`x_train`, `y_train`,
        `x_test`, `y_test`, or `x` and `y`), .csv, .data or .parquet. In tables "?" and empty cells are missing; columns
        missing in over a third of the rows are dropped, then rows with gaps, and the rest is standardised.

        Pixels are read as 0 to 1. Where clients lie one after another, `offsets` beside `y_train` (N + 1 numbers from
        0) say where each begins, for partition.kind = "site".

        Raises `ValueError` for a path that is not there or holds nothing known, and for a setting of no use there.
        """
        what = self.model_copy(update={"examples": None}).model_dump_json(exclude_defaults=True)
        return _loaded(what, _stamps(Path(self.source).expanduser()))

    def _load(self) -> Source:
        try:
            read = self._read()
        except UnknownData:
            raise
        except Exception as error:  # files are written by others
            problem = str(error).removesuffix(".") or type(error).__name__
            raise ValueError(f"The data at {self.source!r} cannot be read: {problem}.") from error
        if not len(read.train) or not len(read.test):
            sizes = f"{len(read.train)} examples to train and {len(read.test)} to test on"
            raise ValueError(f"The data at {self.source!r} gives {sizes}; give more, or a larger test_fraction.")
        return Source(*(part.normalised(self.mean, self.deviation) for part in (read.train, read.test)))

    def _read(self) -> Source:
        path = Path(self.source).expanduser()
        if self.source == DIGITS:
            self._use("the digits", {"test_fraction"})
            return split(digits(), self.test_fraction)
        if path.exists():
            found = format_at(path)
            self._use(found.name, found.options)
            return found.read(path, Options(self.label, self.positive_above, self.test_fraction))
        if ":" in self.source or self.source in SOURCES.names():
            self._use("a function", {"options"})
            return _as_source(SOURCES.find(self.source)(**self.options))
        raise UnknownData(
            f"There is no data at {self.source!r}; give the path of a file or folder, {DIGITS!r}, or 'module:function'."
        )

    def _use(self, what: str, keys: set[str] | frozenset[str]) -> None:
        """Raise `UnknownData` for a setting that is of no use to `what`, which takes those in `keys`."""
        of_some = {"options", "label", "positive_above", "test_fraction"}
        given = self.model_dump(exclude_defaults=True).keys()
        for key in sorted((given & of_some) - keys):
            raise UnknownData(f"data.{key} is of no use to {what} at {self.source!r}; leave it out.")


@lru_cache(maxsize=2)
def _loaded(settings: str, stamps: tuple[tuple[str, int, int], ...]) -> Source:
    """Experiments with the same data share them, for as long as the files are the same."""
    return DataSettings.model_validate_json(settings)._load()


def _stamps(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time of change and size of every file at `path`."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)


def _as_source(found: Any) -> Source:
    """What a function of the user's own returned."""
    if isinstance(found, Source):
        return found
    try:
        train_inputs, train_targets, test_inputs, test_targets = map(torch.as_tensor, found)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"it returned a {type(found).__name__}; return a Source, or x_train, y_train, x_test, y_test"
        ) from None
    return Source(
        Examples(train_inputs.float(), train_targets.long()), Examples(test_inputs.float(), test_targets.long())
    )
