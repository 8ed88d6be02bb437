"""The command ``ivdr``. Nothing heavy is imported before a command runs: ``--help`` needs no torch.

Exit codes are listed in ``ivdr_deploy._console``.
"""

from __future__ import annotations

from typing import Any

import typer

from ivdr_deploy import __version__
from ivdr_deploy._console import exiting
from ivdr_deploy.cli import archive, bench, doctor, export, predict, score, serve, show, verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes around the help cost a third of its time
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
app.command(short_help="Turn a checkpoint into a bundle.")(export.export)
app.command(short_help="Compare a bundle's variants with the trained model.")(verify.verify)
app.command(short_help="Label videos.")(predict.predict)
app.command(short_help="Pack a bundle for TorchServe.")(archive.archive)
app.command(short_help="Run TorchServe here, ready when it is right.")(serve.serve)
app.command(short_help="Score a collection into a Parquet table.")(score.score)
app.command(short_help="Measure latency, from the file to the label.")(bench.bench)
app.command(short_help="Show what an artifact says about itself.")(show.show)
app.command(short_help="Say what this machine has and lacks.")(doctor.doctor)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors of ours become one line on stderr and an exit code."""
    with exiting("ivdr"):
        app(args=arguments, prog_name="ivdr")
