"""Data sources: the digits that scikit-learn ships, files and folders, or a user's own function."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from corymb.protocol.settings import Settings
from corymb.simulations.data.conversion import as_source
from corymb.simulations.data.examples import Source
from corymb.simulations.data.formats import SPLIT, Options, digits, format_at, split
from corymb.strategies.core.registry import Registry

DIGITS = "digits"
SOURCES: Registry[Any] = Registry("data source", {}, "corymb.data")


class UnknownData(ValueError):
    """The data source does not exist, or a setting does not apply to it."""


class DataSettings(Settings):
    """Where the examples come from."""

    source: str = DIGITS
    """"digits", the path of a file or folder, a function "module:name", or a name that a package registers in the
    entry-point group `corymb.data`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the function, which returns a `Source`, arrays `(x_train, y_train, x_test, y_test)` or `(x, y)`, one
    torch dataset or two, a pandas frame, or a dataset of Hugging Face."""
    label: str | list[str] | None = None
    """The column of a table that holds the label, or a list of columns, such as time and event for survival. Default:
    the column called label, target, y or class, else the last."""
    integers: bool = False
    """Integer inputs stay integers, as an embedding needs them; always so for tokens."""
    site: str | None = None
    """The column of a table that holds each row's site, for `partition.kind = "site"`. It is not an input."""
    positive_above: float | None = None
    """Makes a table's label binary: 1 above this number, else 0."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """The share of each site and class that becomes the test set, if the data have none."""
    split_seed: int | None = None
    """Draws the test set by this seed. Default: every k-th example of each site and class."""
    examples: int | None = Field(None, ge=1)
    """The number of training examples, drawn by the seed. Default: all."""
    mean: float | tuple[float, ...] = 0.0
    """Inputs become `(input - mean) / deviation`; a list has one number per channel."""
    deviation: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = 1.0
    """See `data.mean`."""

    def load(self, kind: str = "classification") -> Source:
        """Read the source. Runs with the same data settings share one copy in memory.

        A folder contains idx files (with MNIST's names, gzipped or not), train*.parquet and test*.parquet, the arrays
        x_train.npy, y_train.npy, x_test.npy and y_test.npy (x_train memory-mapped; uint8 pixels or float32), or one
        file per site (.parquet, .csv or .data; the file's name is the site's). A file is .npz (with `x_train`,
        `y_train`, `x_test`, `y_test`, or `x` and `y`), .csv, .data or .parquet. In tables, columns with over a third of
        their cells missing are dropped, then rows with missing cells; the remaining columns are standardised by the
        mean and deviation of the training examples.

        Pixels of bytes are scaled to 0 to 1, in every format. For partition.kind = "site", arrays may have `offsets
        [N + 1]` from 0 beside `y_train`: the contiguous ranges of examples of N sites.

        `kind` is that of the task. Raises `ValueError` for data that do not exist or cannot be read, and for settings
        that do not apply to them.
        """
        settings = self.model_copy(update={"examples": None}).model_dump_json(exclude_defaults=True)
        return _load_cached(settings, kind, _file_versions(Path(self.source).expanduser()))

    def _load(self, kind: str) -> Source:
        try:
            source = self._read(kind)
        except UnknownData:
            raise
        except Exception as error:  # readers and user functions may raise anything
            problem = str(error).removesuffix(".") or type(error).__name__
            raise ValueError(f"The data at {self.source!r} cannot be read: {problem}.") from error
        if not len(source.train) or not len(source.test):
            sizes = f"{len(source.train)} training examples and {len(source.test)} test examples"
            problem = f"The data at {self.source!r} give {sizes}; add data, or increase data.test_fraction."
            raise ValueError(" ".join([problem, *source.notes]))
        train, test = (part.normalised(self.mean, self.deviation) for part in (source.train, source.test))
        return Source(train, test, source.notes)

    def _read(self, kind: str) -> Source:
        path = Path(self.source).expanduser()
        if self.source == DIGITS:
            self._reject_settings("the digits", SPLIT)
            return split(digits(), self.options_for(kind))
        if path.exists():
            file_format = format_at(path)
            self._reject_settings(file_format.name, file_format.options)
            return file_format.read(path, self.options_for(kind))
        if ":" in self.source or self.source in SOURCES.names():
            self._reject_settings("a function", {"options", "label", "site"} | SPLIT)
            return as_source(SOURCES.find(self.source)(**self.options), self.options_for(kind))
        raise UnknownData(
            f"There is no data at {self.source!r}; give the path of a file or folder, {DIGITS!r}, or 'module:function'."
        )

    def options_for(self, kind: str) -> Options:
        """Return the settings that readers use, for a task of this `kind`."""
        integers = self.integers or kind == "tokens"
        return Options(self.label, self.site, kind, integers, self.positive_above, self.test_fraction, self.split_seed)

    def _reject_settings(self, kind: str, applicable: set[str] | frozenset[str]) -> None:
        """Raise `UnknownData` if a setting is given that is not `applicable` to this `kind` of source."""
        optional = {"options", "label", "site", "positive_above", "test_fraction", "split_seed"}
        given = self.model_dump(exclude_defaults=True).keys()
        for key in sorted((given & optional) - applicable):
            raise UnknownData(f"data.{key} does not apply to {kind} at {self.source!r}; remove it.")


@lru_cache(maxsize=2)
def _load_cached(settings: str, kind: str, versions: tuple[tuple[str, int, int], ...]) -> Source:
    """Load the data of `settings`, given as JSON; `versions` invalidate the cache when a file changes."""
    return DataSettings.model_validate_json(settings)._load(kind)


def _file_versions(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return the name, modification time (ns) and size (bytes) of every file at `path`."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
