"""Which frames make up a clip: index arithmetic in integers, no I/O.

A video is first laid on a *grid* of evenly spaced frames (``timeline``); clips are indices into that grid.
"""

from __future__ import annotations

import math

import numpy as np

from ivdr_deploy.spec import ClipSpec, ViewPlan

_TICK_SECONDS = 1e-3
"""Containers round times, Matroska to the millisecond: times closer than this count as the same."""


def is_constant_rate(pts_seconds: np.ndarray) -> bool:
    """Whether every frame lies within half a frame of an even time grid through the first and last one."""
    if len(pts_seconds) < 3:
        return True
    even = np.linspace(pts_seconds[0], pts_seconds[-1], len(pts_seconds))
    period = (pts_seconds[-1] - pts_seconds[0]) / (len(pts_seconds) - 1)
    return bool(np.abs(pts_seconds - even).max() < period / 2)


def timeline(pts_seconds: np.ndarray, fps: float, spec: ClipSpec) -> np.ndarray:
    """Lay a video on the sampling grid of a contract.

    Frame k of the grid is the one on display at time k / rate, where the rate is ``spec.target_fps``, or the
    video's own average when that is None. An evenly spaced video without a target rate is its own grid.

    Args:
        pts_seconds: (num_frames,) increasing presentation times, the first 0.
        fps: Average frames per second of the video.
        spec: The contract.

    Returns:
        int64 (L,), L >= 1: the real frame index at each place of the grid, never decreasing.
    """
    count = len(pts_seconds)
    if spec.target_fps is None and is_constant_rate(pts_seconds):
        return np.arange(count, dtype=np.int64)
    rate = spec.target_fps or fps
    slack = min(_TICK_SECONDS, 0.25 / fps)
    end = pts_seconds[-1] + 1.0 / fps
    length = max(1, math.ceil((end - slack) * rate))
    times = np.arange(length) / rate
    return np.searchsorted(pts_seconds, times + slack, side="right").astype(np.int64) - 1


def clip_at(start: int, length: int, spec: ClipSpec) -> np.ndarray:
    """Return int64 (T,): ``start``, ``start + stride``, ...; places off either end repeat the end frame."""
    places = start + spec.frame_stride * np.arange(spec.num_frames, dtype=np.int64)
    return np.clip(places, 0, length - 1)


def count_clips(length: int, spec: ClipSpec, plan: ViewPlan) -> int:
    """Return how many clips a plan takes from a video of ``length`` grid frames, spatial crops not counted.

    With ``sliding`` that may be more than ``plan.num_clips``.
    """
    if plan.placement == "uniform":
        return plan.num_clips
    window = spec.num_frames * spec.frame_stride
    return 1 + max(0, -(-(length - window) // (plan.hop or window)))


def place_clips(length: int, spec: ClipSpec, plan: ViewPlan) -> np.ndarray:
    """Choose the frames of every clip that a plan takes from a video.

    With a clip of W = T * stride grid frames:

    * ``uniform``, the test protocol of the paper's code: the centres are evenly spaced from min(W/2, L) to max(that,
      L - W/2), ends included; a single clip takes the middle of the two. A clip starts at floor(centre - W/2), not
      before 0.
    * ``sliding``: starts 0, hop, 2 hop, ... until a clip reaches the end.

    Args:
        length: Grid frames (L).
        spec: The contract.
        plan: How many clips, and where.

    Returns:
        int64 (clips, T), each in [0, length); ``count_clips`` rows.
    """
    window = spec.num_frames * spec.frame_stride
    if plan.placement == "sliding":
        hop = plan.hop or window
        return np.stack([clip_at(k * hop, length, spec) for k in range(count_clips(length, spec, plan))])
    # Twice the centres, so that half a window stays an integer.
    low = min(window, 2 * length)
    high = max(low, 2 * length - window)
    steps = plan.num_clips - 1
    if steps == 0:
        starts = [(low + high - 2 * window) // 4]
    else:
        starts = [
            (low * steps + (high - low) * k - window * steps) // (2 * steps) for k in range(plan.num_clips)
        ]
    return np.stack([clip_at(max(0, start), length, spec) for start in starts])


def random_centre_clip(length: int, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Draw a pre-training clip, int64 (T,): centred on any frame; places off either end repeat the end."""
    centre = int(rng.integers(length))
    return clip_at(centre - spec.frame_stride * (spec.num_frames // 2), length, spec)


def random_start_clip(length: int, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Draw a fine-tuning clip: a start such that the window fits; int64 (T,).

    A video shorter than the window is padded on one side, drawn by a coin, with its first or last frame.
    """
    spare = length - spec.num_frames * spec.frame_stride
    start = int(rng.integers(spare)) if spare > 0 else spare * int(rng.integers(2))
    return clip_at(start, length, spec)
