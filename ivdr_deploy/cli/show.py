"""``ivdr show``: what any artifact says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ivdr_deploy._console import PlainConsole, done, print_json, print_line
from ivdr_deploy._text import cut, one_line
from ivdr_deploy.cli._options import JsonOption

_MOST = 4000
"""Characters of a row: whatever else a foreign file says may be long as well."""


def show(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT",
            help="A checkpoint, bundle, .onnx, .engine, .mar, score table or one of its .parquet files.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what an artifact says about itself; --json prints all of it."""
    from rich.table import Table

    from ivdr_deploy.cli._describe import describe

    description = describe(artifact)
    if as_json:
        print_json({"kind": description.kind, **description.values})
        return
    rows = [(name, cut(text, _MOST)) for name, text in description.rows]
    out = PlainConsole(markup=False)
    if out.is_terminal:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(one_line(name), one_line(text))
        out.print(table, soft_wrap=False)
    else:  # a pipe gets every value on one line, with no blanks behind it
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print_line(f"{name:{width}} {text}".rstrip())
    done(f"{artifact}: {description.kind}; --json shows everything", next_command=description.next_command)
