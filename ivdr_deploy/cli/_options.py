"""Options that several commands share, spelled and explained once."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ivdr_deploy.spec import DecoderName, Device, Isolation, ViewPlan

if TYPE_CHECKING:
    from ivdr_deploy.decoding import DecodeOptions

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
DecoderOption = Annotated[DecoderName, typer.Option(help="opencv may read a file that pyav cannot.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--decode-workers", min=1, help="Videos decoded at the same time; by default one for two cores."
    ),
]
IsolationOption = Annotated[
    Isolation, typer.Option(help="process: a video that crashes or hangs the decoder costs nothing else.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def decode_options(workers: int | None, isolation: Isolation) -> DecodeOptions:
    """Return how videos are decoded; the number of workers leaves half of the cores to the network."""
    from ivdr_deploy.decoding import DecodeOptions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DecodeOptions(workers=workers or max(1, cores // 2), isolation=isolation)


def view_plan(own: ViewPlan, num_clips: int | None) -> ViewPlan:
    """Return the model's plan, with another number of clips where one was asked for."""
    return own if num_clips is None else replace(own, num_clips=num_clips)
