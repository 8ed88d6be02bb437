"""Clips of real videos, on which the ranges of an 8-bit network are chosen."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import DataError, VideoError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.reader import VideoLimits

CLIPS = 48
"""Enough that the ranges of a small network hardly move with more; the run over them stays within a minute or two."""

_MAX_BYTES = 256 << 20
_LEAST_CLIPS = 12

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Where the clips come from."""

    videos: VideoList
    limits: VideoLimits


def calibration_clips(calibration: Calibration, clip: ClipSpec) -> np.ndarray:
    """Decode clips of videos that lie evenly over the list; those that cannot be used are passed over and counted.

    Returns:
        uint8 (N, T, H, W, 3), at most 48 clips.

    Raises:
        DataError: if fewer than 12 clips can be had.
    """
    items = calibration.videos.items
    wanted = max(_LEAST_CLIPS, min(CLIPS, _MAX_BYTES // math.prod(clip.clip_shape)))
    chosen = [
        items[index]
        for index in np.unique(np.linspace(0, len(items) - 1, min(wanted, len(items))).astype(int))
    ]
    plan = ViewPlan(num_clips=math.ceil(wanted / max(1, len(chosen))))
    found: list[np.ndarray] = []
    first: VideoError | None = None
    with DecodePool() as pool:
        loading = [
            pool.submit(load_clips, item.source, clip, plan, limits=calibration.limits) for item in chosen
        ]
        for one in loading:
            try:
                found.extend(one.result().video)
            except VideoError as error:
                first = first or error
                _log.warning("not used for calibration: %s", error.message)
    if len(found) < _LEAST_CLIPS:
        why = f" (the first video that cannot be used: {first.message})" if first else ""
        raise DataError(
            f"{calibration.videos.source} gives {len(found)} clips, and calibration needs {_LEAST_CLIPS}{why}",
            hint="give a list of some tens of videos like those that the model will see",
        )
    return np.stack(found[:wanted])
