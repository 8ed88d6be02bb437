"""The page of a training run, from the files in its folder and what the run hands over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.records import to_dict
from ivdr_deploy.video.reader import VideoLimits
from train.cache import CachedVideos
from train.config import FinetuneConfig, RunConfig
from train.distributed import rank
from train.health import ALARMS_NAME
from train.log import METRICS_NAME
from train.page import PAGE_NAME, Page, class_counts, list_facts, read_curves, worst_answers, write_page
from train.report import EvaluationReport

VALIDATION_NAME = "validation.csv"
"""Measurements on ``data.validation``: step, video accuracy with its interval, clip accuracy."""


def cached_facts(cached: CachedVideos) -> list[tuple[str, str]]:
    """Return what decoding the training list has shown."""
    skipped = [(f"skipped: {item.uri}", str(error)) for item, error in cached.skipped]
    straight = [("decoded in every step, for want of room in the cache", str(cached.straight))] * bool(
        cached.straight
    )
    return [("training videos decoded", str(len(cached))), *straight, *skipped]


def write_run_page(
    config: RunConfig,
    videos: VideoList,
    *,
    state: str,
    test: VideoList | None = None,
    report: EvaluationReport | None = None,
    facts: Sequence[tuple[str, str]] = (),
    alarms: Sequence[str] = (),
) -> Path:
    """Write the page of a run into its folder, over the one that is there; one process of several does.

    Args:
        config: The settings.
        videos: The training list.
        state: How far the run is, for people.
        test: The list that the report is on.
        report: The latest measurement, if there is one.
        facts: More about the data.
        alarms: What should not be overlooked.

    Raises:
        OSError: if it cannot be written; an older page stays.
    """
    out = Path(config.out)
    if rank() > 0:
        return out / PAGE_NAME
    kind = "fine-tuning" if isinstance(config, FinetuneConfig) else "pre-training"
    lists = {"training": videos} | ({"test": test} if test is not None else {})
    warned = [*_alarms(out), *alarms]
    if report is not None and report.failed:
        warned.append(f"{len(report.failed)} test videos could not be used and count as wrong; see below.")
    worst = []
    if report is not None:
        worst = worst_answers(
            report,
            config.clip,
            limits=VideoLimits.allowing(config.data.allow_containers),
            decode=DecodeOptions(workers=config.data.decode_workers),
        )
    page = Page(
        title=f"{kind} of {config.model.backbone} in {out}",
        subtitle=state,
        alarms=warned,
        curves=read_curves(out / METRICS_NAME),
        marks={
            f"validation {name}": points
            for name, points in read_curves(out / VALIDATION_NAME).items()
            if name in ("video_accuracy", "clip_accuracy")
        },
        report=report,
        worst=worst,
        facts=[
            *(fact for name, one in lists.items() for fact in list_facts(name, one)),
            *facts,
        ],
        classes={name: class_counts(one) for name, one in lists.items() if one.labels} or None,
        settings=to_dict(config),
    )
    return write_page(out / PAGE_NAME, page)


@contextmanager
def page_of_failure(config: RunConfig, videos: VideoList, facts: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Write the page of a run that cannot go on, and let its error go on.

    Args:
        config: The settings.
        videos: The training list.
        facts: More about the data.
    """
    try:
        yield
    except IvdrError as error:
        write_run_page(config, videos, state=f"could not go on: {error.message}", facts=facts)
        raise


def _alarms(out: Path) -> list[str]:
    """Return the alarms that stand in the run folder, for people."""
    path = out / ALARMS_NAME
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [f"{one['name']} at step {one['step']}: {one['message']}; {one['hint']}" for one in found]
