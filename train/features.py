"""What a network gives for each video, computed once and kept: features of a frozen backbone, answers to measure.

They come through ``VideoPredictor`` like every other answer, on the clips of the view plan, and a file is written
for each video as soon as it is there: a run that is stopped loses the video it was at.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
class FrozenNetwork:
    """A network of which one output is kept."""

    weights_sha256: str
    """Of the file that its weights are in; with the id of the variant where what runs is not just that file in fp32."""

    clip: ClipSpec
    view_plan: ViewPlan
    open: Callable[[], LoadedModel]
    """Opens it; not called where all is kept already."""

    output: Literal["feature", "logits"] = "feature"


def video_outputs(
    videos: VideoList,
    network: FrozenNetwork,
    folder: Path,
    *,
    decode: DecodeOptions,
    limits: VideoLimits,
) -> list[np.ndarray | IvdrError]:
    """Return what a network gives for every video of a list, from the files that are kept or from the network.

    Args:
        videos: The list; a file that is absent is a video that cannot be used.
        network: The network, and which output of it.
        folder: Where they are kept; made when absent.
        decode: The decode workers.
        limits: What a video may cost.

    Returns:
        For every video float32 (clips, F or K), or why there is none.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {
        network.output: network.weights_sha256,
        "contract": network.clip.contract_hash,
        "view_plan": to_dict(network.view_plan),
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
        model = network.open()
        with model.runtime, VideoPredictor(model, limits=limits, decode=decode) as predictor:
            outcomes = predictor.predict_many([sources[row] for row in missing], plan=network.view_plan)
            watched = progress(outcomes, total=len(missing), description=network.output)
            for row, outcome in zip(missing, watched, strict=True):
                if outcome.raw is None:
                    assert outcome.error is not None
                    errors[row] = outcome.error
                    continue
                _write(files[row], outcome.raw.outputs[network.output])
    # Copied: a process may hold no more than some ten thousands of maps.
    return [errors[row] if row in errors else np.array(open_kept(files[row])) for row in range(len(sources))]


def forget(folder: Path) -> None:
    """Remove what was kept in a folder, and the folder where nothing else is in it."""
    for file in folder.glob("*.npy"):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(file: Path, output: np.ndarray) -> None:
    packed = io.BytesIO()
    np.save(packed, np.ascontiguousarray(output, np.float32))
    with writing(file) as write:
        write(packed.getbuffer())
