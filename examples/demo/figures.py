"""A small procedural data set: drawn articulated figures acting in random places, written as real mp4 files.

Six actions. ``sit_down``/``stand_up`` and ``raise_arms``/``lower_arms`` are each other's time reversal, so no single
frame tells them apart; ``wave`` and ``jumping_jack`` are periodic. Actor, place, speed and camera are random; an
actor (body, clothes, manner) occurs in one split only.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

from ivdr_deploy._files import atomic_directory

WIDTH, HEIGHT, FPS = 160, 120, 25
SUPERSAMPLE = 2  # drawn twice as large and averaged down, so that slow limbs move by less than a pixel

Color = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Joint angles in radians. 0 hangs straight down; positive turns towards where the figure faces."""

    shoulders: tuple[float, float]
    elbows: tuple[float, float]
    hips: tuple[float, float]
    knees: tuple[float, float]
    lean: float = 0.0
    lift: float = 0.0
    """How far the feet are off the ground, in leg lengths."""


STANDING = Pose(shoulders=(-0.12, 0.12), elbows=(0.1, 0.1), hips=(-0.06, 0.06), knees=(0.0, 0.0))
SEATED = Pose(shoulders=(0.5, 0.6), elbows=(0.7, 0.7), hips=(1.45, 1.5), knees=(-1.45, -1.5), lean=0.08)
LEANING = Pose(shoulders=(0.3, 0.5), elbows=(0.5, 0.5), hips=(0.9, 0.95), knees=(-1.0, -1.05), lean=0.55)
ARMS_UP = Pose(shoulders=(-2.75, 2.75), elbows=(-0.15, 0.15), hips=(-0.06, 0.06), knees=(0.0, 0.0))
ARMS_MIDWAY = Pose(shoulders=(-1.5, 1.5), elbows=(0.05, 0.1), hips=(-0.06, 0.06), knees=(0.0, 0.0))
JACK_OUT = Pose(shoulders=(-2.6, 2.6), elbows=(0.0, 0.0), hips=(-0.5, 0.5), knees=(0.0, 0.0), lift=0.05)


def _blend(first: Pose, second: Pose, t: float) -> Pose:
    def mix(a: float, b: float) -> float:
        return a + (b - a) * t

    def pair(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        return (mix(a[0], b[0]), mix(a[1], b[1]))

    return Pose(
        shoulders=pair(first.shoulders, second.shoulders),
        elbows=pair(first.elbows, second.elbows),
        hips=pair(first.hips, second.hips),
        knees=pair(first.knees, second.knees),
        lean=mix(first.lean, second.lean),
        lift=mix(first.lift, second.lift),
    )


def _through(poses: tuple[Pose, ...], t: float) -> Pose:
    """Pose at time ``t`` in 0..1 on the way through ``poses``, slow at both ends."""
    eased = (1 - math.cos(math.pi * min(max(t, 0.0), 1.0))) / 2 * (len(poses) - 1)
    index = min(int(eased), len(poses) - 2)
    return _blend(poses[index], poses[index + 1], eased - index)


def _sit_down(t: float, _: float) -> Pose:
    return _through((STANDING, LEANING, SEATED), t)


def _raise_arms(t: float, _: float) -> Pose:
    return _through((STANDING, ARMS_MIDWAY, ARMS_UP), t)


def _wave(_: float, cycle: float) -> Pose:
    swing = 0.55 * math.sin(2 * math.pi * cycle)
    return Pose(
        shoulders=(-0.12, 2.2 + 0.25 * swing), elbows=(0.1, 0.5 + swing), hips=(-0.06, 0.06), knees=(0.0, 0.0)
    )


def _jumping_jack(_: float, cycle: float) -> Pose:
    return _blend(STANDING, JACK_OUT, (1 - math.cos(2 * math.pi * cycle)) / 2)


@dataclass(frozen=True, slots=True)
class Action:
    """A motion: progress through it (0..1) and the count of cycles so far give a pose."""

    pose: Callable[[float, float], Pose]
    reversed: bool = False
    side_view: bool = False
    """Both legs and arms bend the same way, as seen from the side."""


ACTIONS = {
    "jumping_jack": Action(_jumping_jack),
    "lower_arms": Action(_raise_arms, reversed=True),
    "raise_arms": Action(_raise_arms),
    "sit_down": Action(_sit_down, side_view=True),
    "stand_up": Action(_sit_down, reversed=True, side_view=True),
    "wave": Action(_wave),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """A body, its clothes and its manner of moving."""

    height: float
    """Share of the picture's height."""

    girth: float
    torso: float
    shirt: Color
    trousers: Color
    skin: Color
    tempo: float
    facing: int

    @classmethod
    def random(cls, rng: np.random.Generator) -> Actor:
        """Draw one actor."""
        return cls(
            height=rng.uniform(0.6, 0.74),
            girth=rng.uniform(0.8, 1.3),
            torso=rng.uniform(0.29, 0.34),
            shirt=_color(rng),
            trousers=_color(rng),
            skin=tuple(int(v) for v in np.array((224, 172, 140)) * rng.uniform(0.45, 1.05)),  # type: ignore[arg-type]
            tempo=rng.uniform(0.8, 1.25),
            facing=int(rng.choice((-1, 1))),
        )


def _color(rng: np.random.Generator) -> Color:
    red, green, blue = (int(v) for v in rng.integers(20, 236, 3))
    return (red, green, blue)


def _place(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Paint a background: two-tone room, some furniture, grain. Returns uint8 (height, width, 3)."""
    floor = int(height * rng.uniform(0.72, 0.86))
    picture = np.empty((height, width, 3), np.float32)
    picture[:floor] = np.array(_color(rng)) * np.linspace(0.85, 1.1, floor)[:, None, None]
    picture[floor:] = np.array(_color(rng)) * 0.8
    canvas = np.clip(picture, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(2, 7))):
        corner = rng.integers((0, 0), (width, height))
        extent = rng.integers((width // 16, height // 16), (width // 4, height // 3))
        color = _color(rng)
        if rng.random() < 0.5:
            cv2.rectangle(canvas, corner.tolist(), (corner + extent).tolist(), color, -1)
        else:
            cv2.ellipse(
                canvas, corner.tolist(), (extent // 2).tolist(), float(rng.uniform(0, 180)), 0, 360, color, -1
            )
    grain = rng.normal(0, rng.uniform(1, 5), canvas.shape)
    return np.clip(canvas + grain, 0, 255).astype(np.uint8)


def _step(start: Point, angle: float, length: float) -> Point:
    return (start[0] + math.sin(angle) * length, start[1] + math.cos(angle) * length)


def _draw(
    canvas: np.ndarray, pose: Pose, actor: Actor, *, foot: Point, scale: float, side_view: bool
) -> None:
    """Draw the figure so that its lower foot stands at ``foot``."""
    size = actor.height * scale
    leg, torso, arm = 0.24 * size, actor.torso * size, 0.17 * size
    thick = max(int(0.055 * size * actor.girth), 2)
    facing = actor.facing if side_view else 1
    legs = []
    for hip, knee in zip(pose.hips, pose.knees, strict=True):
        middle = _step((0.0, 0.0), facing * hip, leg)
        legs.append((middle, _step(middle, facing * (hip + knee), leg)))
    drop = max(end[1] for _, end in legs)
    hip_point = (foot[0] - (legs[0][1][0] if side_view else 0.0), foot[1] - drop - pose.lift * leg)

    def at(point: Point) -> tuple[int, int]:
        return (round(hip_point[0] + point[0]), round(hip_point[1] + point[1]))

    neck = _step((0.0, 0.0), math.pi - facing * pose.lean, torso)
    head = _step(neck, math.pi - facing * pose.lean, 0.085 * size)
    for middle, end in legs:
        cv2.line(canvas, at((0.0, 0.0)), at(middle), actor.trousers, thick, cv2.LINE_AA)
        cv2.line(canvas, at(middle), at(end), actor.trousers, thick, cv2.LINE_AA)
    cv2.line(canvas, at((0.0, 0.0)), at(neck), actor.shirt, int(thick * 1.9), cv2.LINE_AA)
    for shoulder, elbow in zip(pose.shoulders, pose.elbows, strict=True):
        middle = _step(neck, facing * shoulder, arm)
        hand = _step(middle, facing * (shoulder + elbow), arm)
        cv2.line(canvas, at(neck), at(middle), actor.shirt, int(thick * 0.85), cv2.LINE_AA)
        cv2.line(canvas, at(middle), at(hand), actor.skin, int(thick * 0.8), cv2.LINE_AA)
    cv2.circle(canvas, at(head), int(0.075 * size), actor.skin, -1, cv2.LINE_AA)


def render(action: Action, actor: Actor, rng: np.random.Generator) -> np.ndarray:
    """Draw one video.

    Returns:
        uint8 RGB, shape (T, HEIGHT, WIDTH, 3), T between about 40 and 75.
    """
    width, height = WIDTH * SUPERSAMPLE, HEIGHT * SUPERSAMPLE
    tempo = actor.tempo * rng.uniform(0.85, 1.2)
    before, moving, after = rng.integers(4, 12), int(36 / tempo), rng.integers(4, 12)
    total = int(before + moving + after)
    place = _place(rng, width + 64, height + 32)
    pan = np.cumsum(rng.normal(0, 0.12, (total, 2)), axis=0) + np.linspace(0, 1, total)[:, None] * rng.normal(
        0, 5, 2
    )
    foot = np.array((width * rng.uniform(0.35, 0.65), height * rng.uniform(0.86, 0.95)))
    gain = rng.uniform(0.7, 1.2)
    period = rng.uniform(14, 22) / tempo
    offset = rng.random()
    # Sensor noise from a few pictures of it: as hard for the network as fresh noise, and five times quicker to draw.
    noise = rng.normal(0, 2, (5, HEIGHT, WIDTH, 3)).astype(np.float32)
    frames = []
    for index in range(total):
        progress = (index - before) / moving
        pose = action.pose(1 - progress if action.reversed else progress, index / period + offset)
        shift = np.clip(np.round(np.array((32, 16)) + pan[index] * SUPERSAMPLE), 0, (64, 32)).astype(int)
        canvas = np.ascontiguousarray(place[shift[1] : shift[1] + height, shift[0] : shift[0] + width])
        standing = foot - (shift - np.array((32, 16)))
        _draw(canvas, pose, actor, foot=(standing[0], standing[1]), scale=height, side_view=action.side_view)
        small = cv2.resize(canvas, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA).astype(np.float32)
        frames.append(np.clip(small * gain + noise[rng.integers(len(noise))], 0, 255).astype(np.uint8))
    return np.stack(frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode uint8 RGB frames (T, H, W, 3) as H.264 in mp4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"crf": "20", "preset": "veryfast", "g": "25"}
        )
        stream.codec_context.thread_count = 1  # with more, the output differs from run to run
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_figures(folder: Path, *, train_actors: int, test_actors: int, seed: int = 0) -> None:
    """Write ``folder`` with one video per actor and action, and ``train.csv`` and ``test.csv`` (``path,label``).

    The folder appears whole or not at all. The same arguments give the same pictures.
    """
    splits = {"train": range(train_actors), "test": range(train_actors, train_actors + test_actors)}
    with atomic_directory(folder) as temporary:
        for label in ACTIONS:
            (temporary / label).mkdir()
        for split, numbers in splits.items():
            rows = [(f"{label}/actor{number:02d}.mp4", label) for number in numbers for label in ACTIONS]
            with (temporary / f"{split}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows([("path", "label"), *rows])
        jobs = [(number, label) for numbers in splits.values() for number in numbers for label in ACTIONS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _make_video(temporary, *job, seed=seed), jobs))


def _make_video(folder: Path, number: int, label: str, *, seed: int) -> None:
    actor = Actor.random(np.random.default_rng((seed, number)))
    rng = np.random.default_rng((seed, number, list(ACTIONS).index(label)))
    write_video(folder / label / f"actor{number:02d}.mp4", render(ACTIONS[label], actor, rng))
