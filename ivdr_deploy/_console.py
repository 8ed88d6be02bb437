"""What commands show and how they end: people read stderr, machines read stdout, scripts read the exit code.

Shared by ``ivdr`` and ``python -m train``. Exit codes:

    ====  ==============================================================
    0     done, and passed where the command judges
    1     the answer is no: judged FAIL, some of the inputs failed or could not be listed, two score tables differ
    2     wrong usage, option or config file
    3     a list of videos or labels is missing, malformed or empty
    4     the video cannot be used
    5     a checkpoint or bundle is damaged, or does not fit
    6     a package, GPU or execution provider that this command needs is not there
    7     export failed, or the exported model computes something else
    8     the server did not start, answer or stop as it should
    9     the system refused a file (no permission, no space), memory or a thread
    10    the output folder is in use by another process, or holds something else
    11    training cannot go on, for example because the loss is not finite
    12    the network failed on a video
    130   interrupted (Ctrl-C)
    141   whoever read the output stopped reading, as ``| head`` does
    143   ended by SIGTERM
    ====  ==============================================================
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from ivdr_deploy import errors
from ivdr_deploy._text import as_text, one_line

T = TypeVar("T")

LINE_SECONDS = 30.0
"""Without a terminal a long run says this often how far it is, with the next item that is done."""

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
    (errors.ResourceError, 9),
    (errors.FolderError, 10),
    (errors.TrainingError, 11),
    (errors.InferenceError, 12),
)

_INTERRUPTED = 130


class PlainConsole(Console):
    """A console that colours nothing by itself and leaves a closed pipe to ``exiting``: rich would exit with 1."""

    def __init__(self, *, stderr: bool = False, markup: bool = True) -> None:
        super().__init__(stderr=stderr, markup=markup, highlight=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, with bytes that are no text spelled as ``_text.as_text`` does."""
        super().print(*(as_text(item) if isinstance(item, str) else item for item in objects), **options)

    def on_broken_pipe(self) -> None:
        """Raise what rich caught, and print nothing more."""
        self.quiet = True
        raise  # rich calls this while it handles the error


console = PlainConsole(stderr=True)
"""For people. Stdout is kept for results, so that ``ivdr predict --json ... | jq`` works."""


def print_line(text: str) -> None:
    """Write one line of a result on stdout; above the progress bar when both are on a terminal.

    Line ends and other control characters in it are spelled: a file name may hold them.
    """
    print(one_line(text), flush=True)


def print_text(text: str, *, style: str | None = None) -> None:
    """Write one line for people on stderr; what stands in it comes from files, and is shown as ``print_line`` does."""
    console.print(one_line(text), style=style, markup=False)


def print_json(value: Any) -> None:
    """Write one JSON object as one line on stdout: valid UTF-8, whatever the locale and the names in it."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in {"utf-8", "utf8"}
    print_line(json.dumps(_valid(value), ensure_ascii=not utf8, allow_nan=False))


def _valid(value: Any) -> Any:
    """Return a value for JSON in which all text is valid Unicode."""
    if isinstance(value, dict):
        return {as_text(key) if isinstance(key, str) else key: _valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    return as_text(value) if isinstance(value, str) else value


def say_left_out(left_out: Iterable[object]) -> None:
    """Tell a person what the listing of a folder or list file passed over; see ``VideoList.left_out``."""
    for entry in left_out:
        print_text(f"left out: {entry}")


class Track(Protocol):
    """Wraps the items of a long run to show how far it is, and gives the same items: ``progress`` or ``untracked``."""

    def __call__(self, items: Iterable[T], total: int, description: str) -> Iterable[T]:
        """Return the items."""


def untracked(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """Return the items as they are: a library shows nothing unless asked."""
    return items


def progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield the items, with a progress bar when a person is watching, else with a line for the log now and then."""
    if not console.is_terminal:
        yield from _progress_lines(items, total, description)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # What is printed meanwhile goes above the bar, through the console: right for a terminal, wrong for a file or pipe.
    shared = sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=shared) as bar:
        yield from bar.track(items, total=total, description=description)


class Meter:
    """Shows how far a run is whose end may not be known yet, as ``progress`` does. A context manager, and called."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            left = TimeRemainingColumn(elapsed_when_finished=True)
            self._bar = Progress(
                *columns, TextColumn("{task.fields[rate]}"), left, console=console, transient=True
            )

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=None, rate="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that so many items are done, of so many if that is known."""
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.3g}/s")
        elif now - self._said >= LINE_SECONDS and done != total:
            self._said = now
            left = "" if total is None else f", {timedelta(seconds=round((total - done) / rate))} left"
            known = "" if total is None else f" of {total}"
            console.print(f"{self._description}: {done}{known}, {rate:.3g}/s{left}", markup=False)


@contextmanager
def stopping_softly(message: str) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C or SIGTERM be a wish to stop, of which the block is told; the second interrupts it.

    When the block ends and there was such a wish, the program ends as it would have ended at once: see ``exiting``.

    Args:
        message: Printed at the wish.

    Yields:
        Says whether there was one.
    """
    wishes: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def wish(number: int, frame: object) -> None:
        wishes.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        _say(message)

    for number in before:
        signal.signal(number, wish)
    try:
        yield lambda: bool(wishes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if wishes:
        signal.raise_signal(wishes[0])


def _progress_lines(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    started = said = time.monotonic()
    for number, item in enumerate(items, start=1):
        now = time.monotonic()
        if now - said >= LINE_SECONDS and number < total:
            said = now
            rate = number / (now - started)
            left = timedelta(seconds=round((total - number) / rate))
            console.print(f"{description}: {number} of {total}, {rate:.3g}/s, {left} left", markup=False)
        yield item


def done(what: str, *, next_command: Sequence[str | Path] = ()) -> None:
    """Print the final line of a command: what was written, and the words of what to run next, as a shell takes them."""
    print_text(what)
    if next_command:
        print_text(f"next: {shlex.join(map(str, next_command))}", style="dim")


def exit_code(error: errors.IvdrError) -> int:
    """Return the exit code for an error, from the table above."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


@contextmanager
def exiting(program: str) -> Iterator[None]:
    """Turn an error of ours, or of the file system, into one line on stderr and an exit code; others pass.

    A character that the terminal's encoding lacks is spelled from here on, in whatever is printed. Everything printed
    is on its way when this ends, so that a closed pipe or a full disk is noticed here. SIGTERM unwinds like Ctrl-C, so
    that what a command has open is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    ended_by: list[int] = []
    try:
        try:
            with _interrupted_by_sigterm(ended_by):
                yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except errors.IvdrError as error:
        _say(one_line(f"{program}: {error}"))
        sys.exit(exit_code(error))
    except BrokenPipeError:
        _drop_output()
        sys.exit(141)  # 128 + SIGPIPE: what a shell reports for any other program
    except OSError as error:
        if error.errno is None:  # not from the system: a defect
            raise
        _say(one_line(f"{program}: {error.filename or 'a file'}: {error.strerror}"))
        sys.exit(9)
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != _INTERRUPTED:  # what typer makes of an interrupt
            raise
        _say(f"{program}: {'ended by SIGTERM' if ended_by else 'interrupted'}")
        sys.exit(128 + ended_by[0] if ended_by else _INTERRUPTED)


@contextmanager
def _interrupted_by_sigterm(ended_by: list[int]) -> Iterator[None]:
    """Let SIGTERM interrupt the block, and note that it did."""
    if threading.current_thread() is not threading.main_thread():  # only the main one hears signals
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        ended_by.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    """Write a line on stderr, unless it is closed: the exit code must not depend on that."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Send what is still in a buffer nowhere: Python's own flush at the end would fail as well, and say so."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
