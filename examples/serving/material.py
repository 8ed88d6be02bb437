"""What the servers are measured with: a small network, and videos of given sizes and containers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import CheckpointInfo, ClipSpec, ModelSpec, TrainingState, ViewPlan

CLIP = ClipSpec(num_frames=8, frame_stride=2, short_side=64, crop_size=56)
LABELS = ("bow", "jump", "sit", "stand", "turn", "wave")
MODEL = "bench"

CODECS = {"mp4": "libx264", "avi": "mpeg4", "webm": "libvpx"}
"""Encoder of each container."""


def make_bundle(folder: Path, *, version: str = "1.0") -> Path:
    """Export a tiny network with random weights, which looks at one clip of a video; returns ``folder``."""
    torch.manual_seed(0)
    spec = ModelSpec(backbone="tiny", num_slots=2, slot_dim=8, clip_dim=8, num_classes=len(LABELS))
    heads = ("clip_head", "series_head", "classifier")
    info = CheckpointInfo(
        clip=CLIP,
        view_plan=ViewPlan(num_clips=1),
        model=spec,
        labels=LABELS,
        training=TrainingState(backbone_step=1, head_steps=dict.fromkeys(heads, 1)),
    )
    golden = np.random.default_rng(0).integers(0, 256, (2, *CLIP.clip_shape), dtype=np.uint8)
    checkpoint = folder.with_suffix(".safetensors")
    save_checkpoint(checkpoint, model=build_model(spec, CLIP).eval(), info=info, golden=golden)
    export_bundle(checkpoint, folder, name=MODEL, version=version)
    return folder


def make_video(
    path: Path,
    *,
    num_frames: int | None = None,
    num_bytes: int | None = None,
    size: tuple[int, int] = (320, 240),
    noise: int = 8,
) -> bytes:
    """Encode moving blocks with noise over them; the suffix of ``path`` picks the container.

    Args:
        path: File to write.
        num_frames: How many; without a limit when None.
        num_bytes: Ends where so many are reached; without a limit when None.
        size: (width, height) in pixels.
        noise: Levels of noise: how many bytes a frame takes.

    Returns:
        The file.
    """
    random = np.random.default_rng(len(path.name))
    width, height = size
    coarse = random.integers(40, 215, (height // 16 + 1, width // 16 + 1, 3))
    picture = np.kron(coarse, np.ones((16, 16, 1), np.int64))[:height, :width]
    written, number = 0, 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=Fraction(25))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 12, 1
        while number != num_frames and (num_bytes is None or written < num_bytes):
            moved = np.roll(picture, (number, 2 * number), axis=(0, 1))
            frame = moved + random.integers(-noise, noise + 1, picture.shape)
            packets = stream.encode(av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), "rgb24"))
            written += sum(packet.size for packet in packets)
            container.mux(packets)
            number += 1
        container.mux(stream.encode(None))
    return path.read_bytes()
