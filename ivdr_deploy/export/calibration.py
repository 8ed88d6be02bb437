"""Clips of real videos, on which the ranges of an 8-bit network are chosen."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ivdr_deploy._text import one_line
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodePool
from ivdr_deploy.errors import DataError, VideoError
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.reader import VideoLimits

if TYPE_CHECKING:
    from ivdr_deploy.export.int8.quantise import Calibrated

CLIPS = 48
"""Enough that the ranges of a small network hardly move with more; the run over them stays within a minute or two."""

_MAX_BYTES = 256 << 20
_LEAST_CLIPS = 12
_MOST_TRIED = 10 * CLIPS
"""Videos that are opened at most; a list of millions may hold none that can be used."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Where the clips come from, and what they told last."""

    videos: VideoList
    limits: VideoLimits
    told: dict[tuple[str, int], Calibrated] = field(default_factory=dict, init=False, repr=False)
    """Of the last graph alone, by its SHA-256 and the bits of its weights: all its 8-bit forms are made from it, and
    finding it takes minutes."""


def calibration_clips(calibration: Calibration, clip: ClipSpec) -> np.ndarray:
    """Decode clips of videos that lie evenly over the list; others take the place of those that cannot be used.

    Returns:
        uint8 (N, T, H, W, 3), at most 48 clips.

    Raises:
        DataError: if fewer than 12 clips can be had.
    """
    wanted = max(_LEAST_CLIPS, min(CLIPS, _MAX_BYTES // math.prod(clip.clip_shape)))
    left = list(calibration.videos.items)
    plan = ViewPlan(num_clips=math.ceil(wanted / max(1, min(wanted, len(left)))))
    found: list[np.ndarray] = []
    unusable: list[VideoError] = []
    tried = 0
    with DecodePool() as pool:
        while left and len(found) < wanted and tried < _MOST_TRIED:
            count = min(math.ceil((wanted - len(found)) / plan.num_clips), len(left))
            places = {int(place) for place in np.linspace(0, len(left) - 1, count)}
            tried += len(places)
            loading = [
                pool.submit(load_clips, left[place].source, clip, plan, limits=calibration.limits)
                for place in sorted(places)
            ]
            for one in loading:
                try:
                    found.extend(one.result().video)
                except VideoError as error:
                    unusable.append(error)
            left = [item for place, item in enumerate(left) if place not in places]
    why = ""
    if unusable:
        why = f"{len(unusable)} of {tried} videos cannot be used, the first: {unusable[0].message}"
        _log.warning("calibration: %s", one_line(why))
    if len(found) < _LEAST_CLIPS:
        raise DataError(
            f"{calibration.videos.source} gives {len(found)} clips, and calibration needs {_LEAST_CLIPS}"
            + f" ({why})" * bool(why),
            hint="give a list of some tens of videos like those that the model will see",
        )
    return np.stack(found[:wanted])
