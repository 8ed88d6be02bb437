"""Lists with columns: csv and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ivdr_deploy._optional import import_pyarrow
from ivdr_deploy._text import quoted, quoted_few, reason_of
from ivdr_deploy.datasets.entries import Entry, Root, listed, open_list, open_text
from ivdr_deploy.datasets.official import ClassFolders, is_kinetics, kinetics_entry
from ivdr_deploy.datasets.text import is_blank_separated, read_text
from ivdr_deploy.errors import DataError


def read_csv(source: Path, root: Path) -> Iterator[Entry]:
    """Yield the entries of a csv with a header; columns besides ``path``, ``label`` and ``group`` are not looked at.

    Two other forms that are published as ``.csv`` are read too: ``path label`` without a header, and the annotations
    of Kinetics.

    Raises:
        DataError: if it cannot be read, or a line does not fit the header.
    """
    with open_text(source, newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if source.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            if len(header) == 1 and is_blank_separated(header[0]):
                yield from read_text(source, root)
                return
            kinetics = is_kinetics(header)
            if ("path" not in header and not kinetics) or len(set(header)) != len(header):
                raise DataError(
                    f"{source}: the first line is {quoted(','.join(header))}; expected a header with the column path, "
                    "and label if there are labels",
                    hint="put path,label on the first line",
                )
            folders, base, place, width = ClassFolders(root), Root(root), f"{source}: line", len(header)
            path, label, group = (
                header.index(column) if column in header else width for column in ("path", "label", "group")
            )
            for row in rows:
                if not row:
                    continue
                number, entry = rows.line_num, None
                if len(row) == width and kinetics:
                    entry = kinetics_entry(folders, dict(zip(header, row, strict=True)), place, number)
                elif len(row) == width:
                    row.append("")  # what a column that is not there holds
                    if written := row[path].strip(" \t"):
                        entry = listed(base, written, row[label], place, number, group=row[group])
                    row.pop()
                if entry is None:
                    raise _bad_row(f"{place} {number}", row, header)
                yield entry
        except csv.Error as error:
            raise DataError(
                f"{source}: line {rows.line_num} is not valid csv ({reason_of(error)})"
            ) from error


def read_parquet(source: Path, root: Path) -> Iterator[Entry]:
    """Yield the entries of a Parquet file with the column ``path`` and, if there are any, ``label`` and ``group``.

    Raises:
        DataError: if it is damaged, or the columns are not there or not of text.
    """
    pa = import_pyarrow()

    try:
        # An open file, because a name such as scores:1 would be taken for a URI.
        with open_list(source) as stream, pa.parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            wanted = [name for name in ("path", "label", "group") if name in names]
            if twice := [name for name in wanted if names.count(name) > 1]:
                raise DataError(
                    f"{source} has the column {quoted_few(twice)} more than once; expected each once"
                )
            if "path" not in names:
                raise DataError(
                    f"{source} has the columns {quoted(', '.join(names))}; expected path, and label if there are labels"
                )
            row, base, place = 0, Root(root), f"{source}: row"
            for batch in file.iter_batches(columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    path = values.pop("path")
                    if not isinstance(path, str) or any(
                        isinstance(value, float | bytes | list | dict) for value in values.values()
                    ):
                        raise DataError(
                            f"{place} {row} is {quoted({'path': path, **values})}; "
                            "expected text in path, label and group"
                        )
                    texts = {name: "" if value is None else str(value) for name, value in values.items()}
                    if not (written := path.strip(" \t")):
                        raise DataError(f"{place} {row} has no path")
                    yield listed(base, written, texts.get("label"), place, row, group=texts.get("group"))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read as Parquet ({reason_of(error, most=100)})") from error


def _bad_row(where: str, row: list[str], header: list[str]) -> DataError:
    return DataError(
        f"{where} is {quoted(','.join(row))}; expected {len(header)} values for {quoted(','.join(header))}",
        hint="quote a value that contains a comma",
    )
