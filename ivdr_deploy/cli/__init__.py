"""The command ``ivdr``. Nothing heavy is imported before a command runs: ``--help`` needs no torch.

Exit codes are listed in ``ivdr_deploy._console``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ivdr_deploy import __version__
from ivdr_deploy._console import exiting
from ivdr_deploy._files import at_home
from ivdr_deploy.cli import (
    archive,
    bench,
    doctor,
    export,
    import_,
    predict,
    score,
    scores,
    serve,
    show,
    verify,
)
from ivdr_deploy.environment import let_threads_sleep


class _Program(TyperGroup):
    """Ends as ``exiting`` says; Typer would take a closed pipe first and end with 1, which is for failed inputs."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with exiting("ivdr"):  # prints --help and --version
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with exiting("ivdr"):
            return super().invoke(ctx)


class _Command(TyperCommand):
    """Shows its arguments as ``BUNDLE``; Typer writes ``{BUNDLE}``, which looks like a choice."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


def _paths_at_home(command: Callable[..., None]) -> Callable[..., None]:
    """Let ``~`` stand for the home folder in every path that a command takes, ``--out=~/x`` included."""

    def expanded(value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(item) for item in value]
        return Path(at_home(value)) if isinstance(value, Path) else value

    @wraps(command)
    def run(**values: Any) -> None:
        command(**{name: expanded(value) for name, value in values.items()})

    return run


app = typer.Typer(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes around the help cost a third of its time
    pretty_exceptions_enable=False,  # a defect shows Python's own traceback, which can be pasted whole
    help="Action recognition from unlabelled video: train, export, verify, serve, score, measure.",
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
    """Action recognition from unlabelled video: train, export, verify, serve, score, measure."""


# Commands are registered in the order of the journey; `ivdr --help` lists them so.
_COMMANDS: tuple[tuple[Callable[..., None], str, tuple[str, ...]], ...] = (
    (
        export.export,
        "Turn a checkpoint into a bundle.",
        ("ivdr export runs/ft/checkpoint.safetensors -o runs/bundle", "ivdr export runs/bundle --trt"),
    ),
    (
        import_.import_,
        "Turn a published model into a bundle.",
        (
            "ivdr import i3d-k400 -o runs/i3d",
            "ivdr import i3d-k400 --weights i3d-kinetics-400.ckpt -o runs/i3d",
        ),
    ),
    (
        verify.verify,
        "Compare a bundle's variants with the trained model.",
        (
            "ivdr verify runs/bundle --videos test.csv",
            "ivdr verify runs/bundle --recheck --threshold min_agreement=0.97",
        ),
    ),
    (
        predict.predict,
        "Label videos.",
        (
            "ivdr predict runs/bundle video.mp4",
            "ivdr predict runs/bundle videos/ --json",
            "ivdr predict runs/bundle long.mp4 --timeline",
        ),
    ),
    (
        archive.archive,
        "Pack a bundle for TorchServe.",
        ("ivdr archive runs/bundle", "ivdr archive runs/bundle --config serve.toml --variant onnx-fp32"),
    ),
    (
        serve.serve,
        "Run a server here; ready when its network answers right.",
        ("ivdr serve model_store/bundle.mar", "ivdr serve runs/bundle --server http --workers 2"),
    ),
    (
        score.score,
        "Score a collection into a Parquet table.",
        (
            "ivdr score runs/bundle videos/ -o scores",
            "ivdr score runs/bundle list.csv -o scores --output feature",
        ),
    ),
    (
        scores.scores,
        "Show what is in a score table, or differs between two.",
        ("ivdr scores scores --html scores.html", "ivdr scores --diff old-scores new-scores"),
    ),
    (
        bench.bench,
        "Measure latency, from the file to the label, or what a server holds.",
        (
            "ivdr bench runs/bundle --videos test.csv",
            "ivdr bench --endpoint http://127.0.0.1:8080/predictions/bundle --videos test.csv --p99-ms 300",
        ),
    ),
    (
        show.show,
        "Show what an artifact says about itself.",
        ("ivdr show runs/bundle", "ivdr show scores --json"),
    ),
    (doctor.doctor, "Say what this machine has and lacks.", ("ivdr doctor",)),
)
"""What runs, what `ivdr --help` says of it, and examples for the end of its own help."""

for _run, _summary, _examples in _COMMANDS:
    _epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in _examples)  # \b: keep the lines
    app.command(_run.__name__.rstrip("_"), cls=_Command, short_help=_summary, epilog=_epilog)(
        _paths_at_home(_run)
    )


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors of ours become one line on stderr and an exit code."""
    let_threads_sleep()
    app(args=arguments, prog_name="ivdr")
