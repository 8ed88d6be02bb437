"""A call on a CPU holds fewer clips where they are large: its memory goes by their pixels."""

from dataclasses import replace

import pytest

from ivdr_deploy.runtimes.base import clips_per_call
from ivdr_deploy.spec import ClipSpec


@pytest.mark.parametrize(
    ("frames", "side", "device", "clips"),
    [
        (16, 112, "cpu", 20),
        (4, 32, "cpu", 20),
        (16, 224, "cpu", 5),
        (64, 224, "cpu", 1),
        (64, 224, "cuda", 64),
    ],
)
def test_large_clips_share_a_call_with_fewer(frames: int, side: int, device: str, clips: int) -> None:
    clip = replace(ClipSpec(short_side=256), num_frames=frames, crop_size=side)
    assert clips_per_call(clip, device) == clips  # type: ignore[arg-type]
