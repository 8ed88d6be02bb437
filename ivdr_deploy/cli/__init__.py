"""The command ``ivdr``. Nothing heavy is imported before a command runs: ``--help`` needs no torch.

Exit codes are listed in ``ivdr_deploy._console``.
"""

from __future__ import annotations

from typing import Any

import typer

from ivdr_deploy import __version__
from ivdr_deploy._console import exiting
from ivdr_deploy.cli import archive, bench, doctor, export, predict, score, serve

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a defect shows Python's own traceback, which can be pasted whole
    help="From unlabelled video to an action-recognition endpoint that can be trusted.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ivdr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """From unlabelled video to an action-recognition endpoint that can be trusted."""


# Commands are registered in the order of the journey; `ivdr --help` lists them so.
app.command()(export.export)
app.command()(export.verify)
app.command()(predict.predict)
app.command()(archive.archive)
app.command()(serve.serve)
app.command()(score.score)
app.command()(bench.bench)
app.command()(export.show)
app.command()(doctor.doctor)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors of ours become one line on stderr and an exit code."""
    with exiting("ivdr"):
        app(args=arguments, prog_name="ivdr")
