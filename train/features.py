"""What a frozen backbone sees in each video, computed once and kept.

Features come through ``VideoPredictor`` like every other answer, on the clips of the view plan, and a file is written
for each video as soon as it is there: a run that is stopped loses the video it was at.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ivdr_deploy._console import progress
from ivdr_deploy.datasets.lists import VideoList
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import IvdrError, VideoError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video import PathSource, VideoLimits
from train.kept import is_whole, kept_name, open_kept, writing


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenBackbone:
    """A network whose features are kept."""

    weights_sha256: str
    """Of the file that its weights are in."""

    clip: ClipSpec
    view_plan: ViewPlan
    open: Callable[[], LoadedModel]
    """Opens it in fp32; not called where all features are kept already."""


def video_features(
    videos: VideoList,
    backbone: FrozenBackbone,
    folder: Path,
    *,
    decode: DecodeOptions,
    limits: VideoLimits,
) -> list[np.ndarray | IvdrError]:
    """Return the features of every video of a list, from the files that are kept or from the network.

    Args:
        videos: The list; a file that is absent is a video that cannot be used.
        backbone: The network.
        folder: Where they are kept; made when absent.
        decode: The decode workers.
        limits: What a video may cost.

    Returns:
        For every video float32 (clips, F), or why there is none.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {
        "feature": backbone.weights_sha256,
        "contract": backbone.clip.contract_hash,
        "view_plan": to_dict(backbone.view_plan),
    }
    errors: dict[int, IvdrError] = {}
    files: dict[int, Path] = {}
    sources = [PathSource(item.path.absolute()) for item in videos.items]
    for row, source in enumerate(sources):
        try:
            files[row] = folder / kept_name(source, made_with)
        except VideoError as error:
            errors[row] = error
    missing = [row for row, file in files.items() if not is_whole(file)]
    if missing:
        model = backbone.open()
        with model.runtime, VideoPredictor(model, limits=limits, decode=decode) as predictor:
            outcomes = predictor.predict_many([sources[row] for row in missing], plan=backbone.view_plan)
            watched = progress(outcomes, total=len(missing), description="features")
            for row, outcome in zip(missing, watched, strict=True):
                if outcome.raw is None:
                    assert outcome.error is not None
                    errors[row] = outcome.error
                    continue
                _write(files[row], outcome.raw.outputs["feature"])
    # Copied: a process may hold no more than some ten thousands of maps.
    return [errors[row] if row in errors else np.array(open_kept(files[row])) for row in range(len(sources))]


def _write(file: Path, feature: np.ndarray) -> None:
    packed = io.BytesIO()
    np.save(packed, np.ascontiguousarray(feature, np.float32))
    with writing(file) as write:
        write(packed.getbuffer())
