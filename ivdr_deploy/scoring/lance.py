"""A score table as a Lance data set, which finds rows by their vectors."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ivdr_deploy._files import atomic_directory
from ivdr_deploy._optional import import_pyarrow, require
from ivdr_deploy.errors import FolderError
from ivdr_deploy.scoring.reader import read_scores

_VECTORS = ("feature", "inter")

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How Lance tells what the system said: in the text alone."""


def write_lance(table: str | Path, folder: Path) -> int:
    """Write a finished table as a Lance data set; ``feature`` (F,) and ``inter`` (D,) get a fixed length, float32.

    Args:
        table: As ``read_scores`` takes it; it is held in memory.
        folder: Of the data set; it appears whole.

    Returns:
        How many rows.

    Raises:
        MissingDependencyError: if Lance is not installed.
        FolderError: if there is something at ``folder``.
        DataError: as ``read_scores``.
        OSError: if it cannot be written.
    """
    lance = require("lance", extra="lance")
    if folder.exists():
        raise FolderError(f"there is something at {folder}", hint="choose another name, or remove it")
    rows = read_scores(table)
    for place, name in enumerate(rows.column_names):
        if name in _VECTORS:
            rows = rows.set_column(place, name, _fixed(rows[name]))
    with atomic_directory(folder) as temporary:
        try:
            lance.write_dataset(rows, str(temporary), mode="create")
        except OSError as error:
            said = _OS_ERROR.search(str(error))
            if error.errno is not None or said is None:
                raise
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(folder.parent)) from error
    return len(rows)


def _fixed(column: Any) -> Any:
    """Give a column of lists the length that its first list has; nulls stay, and so does a column of nothing else."""
    pa = import_pyarrow()

    known = column.drop_null()
    return column.cast(pa.list_(pa.float32(), len(known[0]))) if len(known) else column
