"""Tables for people, in which texts from files are shown as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ivdr_deploy._text import one_line

if TYPE_CHECKING:
    from rich.table import Table

    from ivdr_deploy.artifacts.manifest import OutputParity


def parity_table(rows: list[tuple[str, OutputParity]], title: str) -> Table:
    """Lay out how far each output of each variant is from the reference."""
    return table(
        title,
        ("variant", "output", "max difference", "tolerance", "min cosine", ""),
        (
            (
                name,
                entry.output,
                f"{entry.max_abs_diff:.1e}",
                f"{entry.tolerance:.1e}",
                f"{entry.min_cosine:.6f}",
                "ok" if entry.passed else "FAIL",
            )
            for name, entry in rows
        ),
    )


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Lay out rows; names in them come from files, and are shown as they are: to rich a text may be markup."""
    from rich.table import Table
    from rich.text import Text

    laid_out = Table(title=Text(title), title_justify="left")
    for place, heading in enumerate(headings):  # the name of a variant is never cut, and nothing ends in dots
        laid_out.add_column(Text(heading), no_wrap=place == 0, overflow="fold")
    for row in rows:
        laid_out.add_row(*(Text(one_line(cell)) for cell in row))
    return laid_out
