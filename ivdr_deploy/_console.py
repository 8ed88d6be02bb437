"""What commands show and how they end: people read stderr, machines read stdout, scripts read the exit code.

Shared by ``ivdr`` and ``python -m train``. Exit codes:

    ====  ==============================================================
    0     done, and passed where the command judges
    1     judged FAIL, or some of the inputs failed
    2     wrong usage, option or config file
    3     a list of videos or labels is missing, malformed or empty
    4     the video cannot be used
    5     a checkpoint or bundle is damaged, or does not fit
    6     a package, GPU or execution provider that this command needs is not there
    7     export failed, or the exported model computes something else
    8     the server did not start, answer or stop as it should
    9     the system refused a file: no permission, no space
    10    the output folder is in use by another process, or holds something else
    11    training cannot go on, for example because the loss is not finite
    12    the network failed on a video
    130   interrupted
    ====  ==============================================================
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console

from ivdr_deploy import errors

T = TypeVar("T")

EXIT_CODES: tuple[tuple[type[errors.IvdrError], int], ...] = (
    (errors.ConfigError, 2),
    (errors.DataError, 3),
    (errors.VideoError, 4),
    (errors.CheckpointError, 5),
    (errors.ArtifactError, 5),
    (errors.ClipShapeError, 5),
    (errors.MissingDependencyError, 6),
    (errors.DeviceError, 6),
    (errors.ExportError, 7),
    (errors.ServerError, 8),
    (errors.FolderError, 10),
    (errors.TrainingError, 11),
    (errors.InferenceError, 12),
)

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""For people. Stdout is kept for results, so that ``ivdr predict --json ... | jq`` works."""


def print_json(value: Any) -> None:
    """Write one JSON object as one line on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


class Track(Protocol):
    """Wraps the items of a long run to show how far it is, and gives the same items: ``progress`` or ``untracked``."""

    def __call__(self, items: Iterable[T], total: int, description: str) -> Iterable[T]:
        """Return the items."""


def untracked(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """Return the items as they are: a library shows nothing unless asked."""
    return items


def progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield the items, with a progress bar when a person is watching."""
    if not console.is_terminal:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def done(what: str, *, next_command: str | None = None) -> None:
    """Print the final line of a command: what was written, and what to run next."""
    console.print(what, markup=False)
    if next_command:
        console.print(f"next: {next_command}", style="dim", markup=False)


def exit_code(error: errors.IvdrError) -> int:
    """Return the exit code for an error, from the table above."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


@contextmanager
def exiting(program: str) -> Iterator[None]:
    """Turn an error of ours, or of the file system, into one line on stderr and an exit code; others pass."""
    try:
        yield
    except errors.IvdrError as error:
        sys.stderr.write(f"{program}: {error}\n")
        sys.exit(exit_code(error))
    except OSError as error:
        if error.errno is None:  # not from the system: a defect
            raise
        sys.stderr.write(f"{program}: {error.filename or 'a file'}: {error.strerror}\n")
        sys.exit(9)
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        sys.exit(130)
