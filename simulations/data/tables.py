"""Readers of tables of numbers, in which one column is the label and cells may be missing."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TABLES = (".csv", ".data")
MAX_MISSING = 1 / 3  # a column with a larger share of missing cells is dropped
LABELS = ("label", "target", "y", "class")  # default names of the label column
SITES = ("site", "client", "hospital")  # names of columns that are probably not inputs
INDEX = ("", "unnamed: 0")  # names that pandas gives to a column of row numbers
MISSING = ("", "?", "nan", "na", "n/a", "null")  # in any case


@dataclass(frozen=True)
class Table:
    """One file: `inputs [n, d]` with NaN for missing cells, `labels [n]` or `[n, L]`, and the names of the columns,
    if it has any.

    `label` names the label's column, or says where it is. `sites [n]` are the values of the site column, if any.
    """

    path: Path
    inputs: Floats
    labels: Floats
    names: tuple[str, ...] | None
    label: str
    sites: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The rows of all tables: `inputs [n, d]` with NaN for missing cells, `labels [n]`, and the `sites [n]`.

    `names` are the columns, and `notes` say what was dropped, for the user.
    """

    inputs: Floats
    labels: Floats
    sites: tuple[str, ...] | None
    names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Rows:
        """Concatenate `tables`, whose columns are matched by name; without names, by position.

        Several tables are several sites, called by their files' names. Raises `ValueError` if their columns differ.
        """
        first = tables[0]
        inputs = [_in_order(table, first) for table in tables]
        sites = first.sites
        if len(tables) > 1:
            sites = tuple(table.path.stem.rpartition(".")[2] for table in tables for _ in table.labels)
        notes = [f"The label is {first.label}.", *dict.fromkeys(note for table in tables for note in table.notes)]
        labels = np.concatenate([table.labels for table in tables])
        return cls(np.concatenate(inputs), labels, sites, first.names, tuple(notes))

    def complete(self) -> Rows:
        """Drop columns with too many missing cells, then rows with any. Raises `ValueError` if no row is left."""
        columns = np.isnan(self.inputs).mean(axis=0) <= MAX_MISSING
        inputs = self.inputs[:, columns]
        missing = np.isnan(np.column_stack([inputs, self.labels])).any(axis=1)
        complete: NDArray[np.bool_] = np.asarray(~missing)
        if not complete.any():
            raise ValueError(f"none of the {len(inputs)} rows is complete; fill in the missing cells")
        notes = list(self.notes)
        if dropped := [self._name(column) for column in np.flatnonzero(~columns).tolist()]:
            notes.append(f"Dropped, as over a third of the cells are missing: {', '.join(dropped)}.")
        if not complete.all():
            notes.append(f"Dropped {(~complete).sum()} of {len(complete)} rows with missing cells.")
        sites = None
        if self.sites is not None:
            sites = tuple(site for site, keep in zip(self.sites, complete, strict=True) if keep)
            if gone := sorted(set(self.sites) - set(sites)):
                notes.append(f"No row is left of: {', '.join(gone)}.")
        return Rows(inputs[complete], self.labels[complete], sites, self.names, tuple(notes))

    def classes(self, positive_above: float | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the class numbers `[n]`, from 0 without gaps, and notes.

        With `positive_above` a class is whether the label is above it. Raises `ValueError` for a fraction.
        """
        labels = self.labels if positive_above is None else (self.labels > positive_above).astype(np.float64)
        if (labels != np.floor(labels)).any():
            raise ValueError(
                "the labels are not whole numbers; set task.kind = 'regression', or data.positive_above for classes"
            )
        if (labels < 0).any():
            raise ValueError(f"the label {labels.min():g} is negative; number the classes from 0")
        values, classes = np.unique(labels, return_inverse=True)
        if values.tolist() == list(range(len(values))):
            return classes.astype(np.int64), ()
        named = ", ".join(f"{value:g} -> {number}" for number, value in enumerate(values))
        return classes.astype(np.int64), (f"Labels became class numbers: {named}.",)

    def _name(self, column: int) -> str:
        return self.names[column] if self.names else f"column {column + 1} of the inputs"


def _in_order(table: Table, first: Table) -> Floats:
    """Return the inputs of `table` with its columns in the order of `first`'s."""
    if table.names is None or first.names is None:
        if (table.names is None) != (first.names is None) or table.inputs.shape[1] != first.inputs.shape[1]:
            raise ValueError(
                f"{table.path.name} and {first.path.name} differ in their columns; give all tables the same columns"
            )
        return table.inputs
    if different := set(table.names) ^ set(first.names):
        raise ValueError(
            f"only one of {table.path.name} and {first.path.name} has the column {min(different)!r}; give all tables "
            "the same columns"
        )
    return table.inputs[:, [table.names.index(name) for name in first.names]]


def read_table(path: Path, label: str | list[str] | None, site: str | None = None) -> Table:
    """Read a comma-separated file, with or without a header line; `site` names a column with each row's site.

    Several columns in `label` give several labels per row.

    Raises `ValueError` for an empty or ragged table, a cell that is not a number, and an unknown column.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        numbered = [(number, line) for number, line in enumerate(csv.reader(file, skipinitialspace=True), 1) if line]
    if not numbered:
        raise ValueError(f"the table {path} is empty; give rows of numbers")
    names = None if all(_is_number(cell) for cell in numbered[0][1]) else [cell.strip() for cell in numbered.pop(0)[1]]
    _check_shape(path, names, [line for _, line in numbered])
    labels = label if isinstance(label, list) else [label]
    targets = [column_of(path, names, each, "label") for each in labels]
    places = {each % len(numbered[0][1]) for each in targets}
    notes, sites = [], None
    if site is not None:
        place = column_of(path, names, site, "site")
        sites = tuple(line[place].strip() for _, line in numbered)
        places.add(place)
    elif names and (found := next((name for name in names if name.lower() in SITES), None)):
        raise ValueError(f"the table {path} has a column {found!r}; set data.site = {found!r}, or remove the column")
    if names and names[0].lower() in INDEX and 0 not in places:
        places.add(0)
        notes.append(f"Dropped the first column of {path.name}, the row numbers that pandas writes.")
    kept = [place for place in range(len(numbered[0][1])) if place not in places]
    cells = np.array([[_number(path, names, n, line, place) for place in (*kept, *targets)] for n, line in numbered])
    columns = " and ".join(repr(names[each]) for each in targets) if names else ""
    return Table(
        path,
        cells[:, : -len(targets)],
        cells[:, -1] if len(targets) == 1 else cells[:, -len(targets) :],
        tuple(names[place] for place in kept) if names else None,
        f"the column {columns}" if names else "the last column",
        sites,
        tuple(notes),
    )


def _check_shape(path: Path, names: list[str] | None, lines: list[list[str]]) -> None:
    """Raise `ValueError` unless there are lines, all have the same number of cells, and names are different."""
    widths = sorted({len(line) for line in [*([names] if names else []), *lines]})
    if not lines:
        raise ValueError(f"the table {path} has no rows below its column names; give at least one")
    if widths == [1]:
        raise ValueError(f"the rows of {path.name} have one cell; separate the cells by commas")
    if len(widths) > 1:
        raise ValueError(f"the rows of {path.name} have {widths} cells; give the same number in each row")
    if names and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the table {path} has two columns {twice!r}; rename one")


def _number(path: Path, names: list[str] | None, number: int, line: list[str], place: int) -> float:
    """Return a cell as a number, NaN if it is missing. Raises `ValueError` for text and infinite numbers."""
    cell = line[place].strip()
    if cell.lower() in MISSING:
        return np.nan
    try:
        value = float(cell)
    except ValueError:
        value = np.inf
    if not np.isfinite(value):
        column = repr(names[place]) if names else str(place + 1)
        raise ValueError(
            f"the table {path} has {cell!r} in line {number}, column {column}; encode it as a finite number, or leave "
            "it empty if it is missing"
        )
    return value


def column_of(path: Path, names: list[str] | None, name: str | None, kind: str) -> int:
    """Return the place of the `kind` of column called `name`. Without a name, the label is found by its usual names.

    Raises `ValueError` if there is no such column.
    """
    if name is None:
        return next((i for i, each in enumerate(names or []) if each.lower() in LABELS), -1)
    if names is None or name not in names:
        columns = f"it has {', '.join(names)}" if names else "it has no header line"
        raise ValueError(f"the table {path} has no {kind} column {name!r}; {columns}")
    return names.index(name)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() in MISSING
    return True
