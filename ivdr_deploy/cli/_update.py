"""``ivdr serve --update`` and ``--rollback``: orders to a server that runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ivdr_deploy._console import console, done, print_json, print_text, progress
from ivdr_deploy.cli._options import any_unread, read_list
from ivdr_deploy.errors import ConfigError

_SHOWN = 20
"""Videos of a kind that are printed; --json has all."""


def update_server(
    folder: Path, bundle: Path, *, videos: Path | None, min_agreement: float | None, as_json: bool
) -> None:
    """Have the server of a run folder compare a bundle with the one it serves, and change over to it."""
    if videos is None:
        raise ConfigError(
            "--update needs videos to compare the two bundles on", hint="name some with --videos"
        )
    from ivdr_deploy.serving.http.shadow import MIN_AGREEMENT

    if min_agreement is not None and not 0 <= min_agreement <= 1:  # NaN is neither
        raise ConfigError(f"--min-agreement must be from 0 to 1, found {min_agreement:g}")
    found = read_list(videos)
    if any_unread(found.left_out):  # exit code 1 says that the old one goes on, so nothing is begun
        done(
            "FAIL: nothing was compared, since some folders could not be read; the bundle that is served goes on"
        )
        raise typer.Exit(1)
    found.require_files()
    paths = [str(item.path.resolve()) for item in found.items]
    order = {
        "do": "update",
        "bundle": str(bundle.resolve()),
        "videos": paths,
        "min_agreement": MIN_AGREEMENT if min_agreement is None else min_agreement,
    }
    answer = _ask(folder, order, total=len(paths))
    shadow = answer["shadow"]
    if as_json:
        print_json(answer)
    for title, rows in (("another label", shadow["flips"]), ("no answer any more", shadow["lost"])):
        for row in rows[:_SHOWN]:
            print_text(f"  {title}: {row['video']}: {row['old']} -> {row['new']}")
        if len(rows) > _SHOWN:
            console.print(f"  {title}: {len(rows) - _SHOWN} more; --json has all")
    agreement = shadow["agreement"]
    if not shadow["answered_by_both"]:
        said = "no video was answered by both"
    else:
        said = "the model has no labels to compare" if agreement is None else f"agreement {agreement:.1%}"
    console.print(
        f"{shadow['videos']} videos, {shadow['answered_by_both']} answered by both: {said} (at least "
        f"{shadow['min_agreement']:.1%}); {len(shadow['lost'])} are answered no more"
    )
    if not answer["switched"]:
        done(f"FAIL: {answer['serving']} goes on")
        raise typer.Exit(1)
    done(
        f"PASS: {answer['serving']} answers now, the one before is kept",
        next_command=["ivdr", "serve", "--rollback", "--run-dir", folder],
    )


def roll_back(folder: Path, *, as_json: bool) -> None:
    """Have the server of a run folder change back to the bundle before the last update."""
    answer = _ask(folder, {"do": "rollback"}, total=0)
    if as_json:
        print_json(answer)
    done(f"{answer['serving']} answers again")


def _ask(folder: Path, order: dict[str, Any], *, total: int) -> dict[str, Any]:
    """Give an order, show how far it is, and return the answer."""
    from ivdr_deploy.serving.http.run_folder import ask_server

    messages = ask_server(folder, order)
    last: list[dict[str, Any]] = []

    def steps() -> Iterator[None]:
        for message in messages:
            if "done" in message:
                yield
            elif message.pop("last", False):
                last.append(message)
            else:
                print_text(message["say"])

    for _ in progress(steps(), total, "comparing"):
        pass
    return last[0]
