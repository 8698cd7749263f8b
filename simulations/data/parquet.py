"""Reader of parquet files, with number columns or encoded images."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corymb.simulations.data.decoded import decoded_once
from corymb.simulations.data.tables import column_of

IMAGES = ("image", "img")  # names of the column of encoded images
LABELS = ("fine_label",)  # of CIFAR-100, which also has a coarse one


def read_parquet(
    files: Sequence[Path], label: str | None, like: Path | None = None
) -> tuple[NDArray[Any], NDArray[Any], str]:
    """Return the inputs, the labels `[n]` and the label column's name of parquet `files`, read as one table.

    Inputs are the number columns, `[n, d]` float32, or, if there is a column of encoded images called `image` or
    `img`, uint8 pixels `[n, channels, height, width]`, which are decoded once and then kept in a cache on disk. The
    columns have the order of the file `like`, by default the first one. Raises `ValueError` if a package or the `label`
    column is missing, for a column that is neither, and if the columns are not those of `like`.
    """
    try:
        from PIL import Image
        from pyarrow import concat_tables, parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow and pillow; run pip install 'corymb[parquet]'") from None

    def read(names: list[str]) -> dict[str, list[Any]]:
        tables = [parquet.read_table(file, columns=names).select(names) for file in files]
        columns: dict[str, list[Any]] = concat_tables(tables).to_pydict()
        return columns

    def decode() -> NDArray[Any]:
        return np.stack([np.asarray(Image.open(BytesIO(cell["bytes"]))) for cell in read([str(image)])[str(image)]])

    names = list(parquet.read_schema(like or files[0]).names)
    for file in files:
        if different := set(names) ^ set(parquet.read_schema(file).names):
            raise ValueError(f"the column {min(different)!r} is not in both {file} and {like or files[0]}")
    image = next((name for name in IMAGES if name in names), None)
    columns = read([name for name in names if name != image])
    target = list(columns)[column_of(files[0], list(columns), label, "label")]
    labels = np.array(columns.pop(target))
    if image is None:
        try:
            return np.array(list(columns.values()), dtype=np.float32).T, labels, target
        except (TypeError, ValueError):
            raise ValueError(
                f"the file {files[0]} has columns {', '.join(columns)}, which are not all numbers; call a column of "
                f"encoded images {IMAGES[0]!r}, and remove other columns"
            ) from None
    return decoded_once(files, decode), labels, target
