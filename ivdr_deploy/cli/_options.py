"""Options that several commands share, spelled and explained once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivdr_deploy._console import say_left_out
from ivdr_deploy.environment import decode_workers
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.spec import DecoderName, Device, Isolation, ViewPlan

if TYPE_CHECKING:
    from ivdr_deploy.datasets.entries import LeftOut
    from ivdr_deploy.datasets.lists import VideoList
    from ivdr_deploy.datasets.official import Part
    from ivdr_deploy.decoding import DecodeOptions
    from ivdr_deploy.video.reader import VideoLimits

VariantOption = Annotated[
    str | None, typer.Option(help="Which of a bundle's variants; by default the best verified one that fits.")
]
DeviceOption = Annotated[
    Device | None,
    typer.Option(help="Where it runs, never elsewhere; by default a GPU where the variant fits one."),
]
NumClipsOption = Annotated[
    int | None, typer.Option(min=1, help="Clips per video instead of the number in the model's view plan.")
]
VIDEOS_HELP = "a folder, class folders, a csv with path and perhaps label, or a text list."
"""Ends the sentence that explains an argument or option ``videos``."""

_DECODER_HELP = "opencv may read a file that pyav cannot."
DecoderOption = Annotated[DecoderName, typer.Option(help=_DECODER_HELP)]
GivenDecoderOption = Annotated[DecoderName | None, typer.Option(help=_DECODER_HELP, show_default="pyav")]
"""Of commands that do not always decode: None tells that it was not given."""

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--decode-workers", min=1, help="Videos decoded at the same time; by default one for two cores."
    ),
]
IsolationOption = Annotated[
    Isolation, typer.Option(help="process: a video that crashes or hangs the decoder costs nothing else.")
]
AllowContainerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-container",
        metavar="NAME",
        help="Also open this container: flv, asf (.wmv), ogg (.ogv), h264, hevc, mpegvideo, m4v; may be repeated.",
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Where the relative paths of a list file start, instead of the folder of the list."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def refuse_given(why: str, *, hint: str = "leave it out", **options: object) -> None:
    """Refuse an option that would be passed over in silence.

    Args:
        why: What it is for instead; follows its name in the message.
        hint: What to do.
        options: What was given, by parameter; None, False and an empty list are what is there when nothing was.

    Raises:
        ConfigError: if one is given.
    """
    if given := [
        name for name, value in options.items() if not (value is None or value is False or value == [])
    ]:
        raise ConfigError(f"--{given[0].replace('_', '-')} {why}", hint=hint)


def decode_options(workers: int | None, isolation: Isolation, *, engines: int = 1) -> DecodeOptions:
    """Return how videos are decoded; the number of workers leaves half of the cores to the network.

    Args:
        workers: As given; for each engine.
        isolation: As given.
        engines: Engines that each have workers of their own.
    """
    from ivdr_deploy.decoding import DecodeOptions

    return DecodeOptions(workers=workers or max(1, decode_workers() // engines), isolation=isolation)


def view_plan(own: ViewPlan, num_clips: int | None) -> ViewPlan:
    """Return the model's plan, with another number of clips where one was asked for."""
    return own if num_clips is None else replace(own, num_clips=num_clips)


def video_limits(containers: Sequence[str] | None) -> VideoLimits:
    """Return the default limits, with more containers allowed."""
    from ivdr_deploy.video.reader import VideoLimits

    return VideoLimits.allowing(containers or ())


def read_list(path: Path, *, root: Path | None = None, part: Part | None = None) -> VideoList:
    """Read a list of videos, and say what it passes over."""
    from ivdr_deploy.datasets.lists import read_video_list

    videos = read_video_list(path, root=root, part=part)
    say_left_out(videos.left_out)
    return videos


def any_unread(left_out: Iterable[LeftOut]) -> bool:
    """Say whether a folder of a listing could not be read, see ``datasets.entries.any_unread``."""
    from ivdr_deploy.datasets import entries

    return entries.any_unread(left_out)
