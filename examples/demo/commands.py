"""Command lines: shown as a shell takes them, and run exactly so."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import signal
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ivdr_deploy._console import console
from ivdr_deploy.cli import main as ivdr_main
from ivdr_deploy.serving.client import EndpointClient
from train.__main__ import main as train_main

TRAIN, IVDR = "python -m train", "ivdr"
_MAIN = {TRAIN: train_main, IVDR: ivdr_main}


class StepError(Exception):
    """A command ran and its result is not what it must be."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A word that a shell expands, such as ``data/*/*.mp4``."""

    folder: Path
    glob: str

    def __str__(self) -> str:
        return f"{shlex.quote(str(self.folder))}/{self.glob}"


def run(program: str, *words: str | Path | Pattern) -> str:
    """Show a command of ``TRAIN`` or ``IVDR``, run it in this process, and return its stdout.

    Raises:
        StepError: if it exits with another code than 0; its error has been shown.
    """
    _show(program, words)
    given: list[str] = []
    for word in words:
        found = sorted(word.folder.glob(word.glob)) if isinstance(word, Pattern) else [word]
        given += map(str, found)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = _MAIN[program](given)
        except SystemExit as error:
            code = error.code
    if code:
        raise StepError(f"{program} {words[0]} ended with exit code {code}")
    return printed.getvalue()


@contextlib.contextmanager
def serving(archive: Path, *, run_dir: Path) -> Iterator[EndpointClient]:
    """Run ``ivdr serve`` beside this process until the block ends, then stop it as Ctrl-C does.

    Raises:
        StepError: if it ends before it is ready, or not with exit code 0.
    """
    words = ["serve", str(archive), "--run-dir", str(run_dir), "--json"]
    _show(IVDR, words)
    program = str(Path(sysconfig.get_path("scripts")) / "ivdr")
    with subprocess.Popen([program, *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready:
                raise StepError(f"ivdr serve ended with exit code {process.wait()} before it was ready")
            said = json.loads(ready)
            yield EndpointClient(
                model=said["name"],
                inference_url=said["url"].partition("/predictions/")[0],
                management_url=said["management_url"],
                metrics_url=said["metrics_url"],
            )
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            code = process.wait()
    if code:
        raise StepError(f"ivdr serve ended with exit code {code}")


def _show(program: str, words: Sequence[str | Path | Pattern]) -> None:
    shown = [str(word) if isinstance(word, Pattern) else shlex.quote(str(word)) for word in words]
    console.print(f"$ {program} {' '.join(shown)}", style="bold cyan", markup=False)
