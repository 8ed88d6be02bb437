from __future__ import annotations

import av
import numpy as np
import pytest

from ivdr_deploy.video.preprocess import crops, resize_frame, resized_size


@pytest.mark.parametrize(
    ("height", "width", "short", "expected"),
    [
        (240, 320, 128, (128, 171)),
        (320, 240, 128, (171, 128)),
        (100, 100, 64, (64, 64)),
        (1080, 1920, 128, (128, 228)),
        (2, 3, 1, (1, 2)),  # 1.5 rounds up
    ],
)
def test_the_shorter_side_is_fixed_and_the_aspect_kept(
    height: int, width: int, short: int, expected: tuple[int, int]
) -> None:
    assert resized_size(height, width, short) == expected


def test_the_crop_is_central_and_rounds_offsets_down() -> None:
    frames = np.arange(2 * 5 * 8).reshape(2, 5, 8, 1)
    (crop,) = crops(frames, 4)
    assert crop.shape == (2, 4, 4, 1)
    assert crop[0, 0, 0, 0] == 2  # top 0, left 2
    assert np.shares_memory(crop, frames)


@pytest.mark.parametrize(
    ("shape", "corners"),
    [
        ((5, 9), [(0, 0), (0, 2), (0, 5)]),  # landscape: left, centre, right
        ((9, 5), [(0, 0), (2, 0), (5, 0)]),  # portrait: top, centre, bottom
        ((6, 9), [(1, 0), (1, 2), (1, 5)]),  # each centred on the other axis
        ((9, 6), [(0, 1), (2, 1), (5, 1)]),
        ((4, 4), [(0, 0)] * 3),
        ((6, 6), [(1, 0), (1, 1), (1, 2)]),
    ],
)
def test_three_crops_lie_along_the_longer_side(
    shape: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    height, width = shape
    frame = np.arange(height * width).reshape(height, width, 1)
    found = crops(frame, 4, count=3)
    assert [crop.shape for crop in found] == [(4, 4, 1)] * 3
    assert [divmod(int(crop[0, 0, 0]), width) for crop in found] == corners
    assert np.array_equal(found[1], crops(frame, 4)[0])


def yuv_frame(
    y: int, u: int, v: int, *, space: int, value_range: int, pix_fmt: str = "yuv420p"
) -> av.VideoFrame:
    frame = av.VideoFrame(64, 48, pix_fmt)
    for plane, value in zip(frame.planes, (y, u, v), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace, frame.color_range = space, value_range
    return frame


BT709, BT601, LIMITED, FULL = 1, 6, 1, 2


@pytest.mark.parametrize("size", [(48, 64), (24, 32), (33, 44), (32, 43)])
@pytest.mark.parametrize(
    ("space", "value_range", "kr", "kb"),
    [(BT709, LIMITED, 0.2126, 0.0722), (BT601, LIMITED, 0.299, 0.114), (BT709, FULL, 0.2126, 0.0722)],
)
def test_colour_matrix_and_range_are_those_of_the_stream(
    space: int, value_range: int, kr: float, kb: float, size: tuple[int, int]
) -> None:
    y, u, v = 120, 90, 170
    if value_range == FULL:
        luma, blue, red = y / 255, (u - 128) / 255, (v - 128) / 255
    else:
        luma, blue, red = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    expected = 255 * np.array([r, (luma - kr * r - kb * b) / (1 - kr - kb), b])
    rgb = resize_frame(yuv_frame(y, u, v, space=space, value_range=value_range), size)
    assert rgb.shape == (*size, 3)
    assert np.abs(rgb - expected).max() <= 1.0


def test_full_range_pixel_formats_need_no_tag() -> None:
    rgb = resize_frame(yuv_frame(255, 128, 128, space=2, value_range=0, pix_fmt="yuvj420p"), (48, 64))
    assert rgb.min() == 255


def test_shrinking_averages_instead_of_dropping_lines() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::2] = 255
    rgb = resize_frame(av.VideoFrame.from_ndarray(stripes, format="rgb24"), (32, 32))
    assert np.abs(rgb[2:-2].astype(int) - 127).max() <= 4


def test_the_result_is_the_same_every_time_and_leaves_the_frame_alone() -> None:
    rng = np.random.default_rng(0)
    frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8), format="rgb24")
    before = frame.to_ndarray().copy()
    first = resize_frame(frame, (48, 64)).copy()
    resize_frame(frame, (20, 30))
    assert np.array_equal(resize_frame(frame, (48, 64)), first)
    assert np.array_equal(frame.to_ndarray(), before)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_counter_clockwise_and_the_size_is_that_of_the_upright_picture(rotation: int) -> None:
    quadrants = np.zeros((40, 80, 3), np.uint8)
    quadrants[:20, :40], quadrants[:20, 40:], quadrants[20:, :40], quadrants[20:, 40:] = 10, 80, 150, 220
    frame = av.VideoFrame.from_ndarray(quadrants, format="rgb24")
    upright = np.rot90(quadrants, rotation // 90)
    height, width = upright.shape[0] // 2, upright.shape[1] // 2
    rgb = resize_frame(frame, (height, width), rotation=rotation)
    assert rgb.shape == (height, width, 3)
    corners = [(2, 2), (2, -3), (-3, 2), (-3, -3)]
    assert [int(rgb[corner][0]) for corner in corners] == [int(upright[corner][0]) for corner in corners]


def test_known_pixels_do_not_change() -> None:
    """Other pixels for the same frame mean another resize: they would need a new name in the contract."""
    frame = av.VideoFrame(64, 48, "yuv420p")
    for plane, factor in zip(frame.planes, (7919, 104729, 1299709), strict=True):
        plane.update(
            (np.arange(plane.buffer_size, dtype=np.int64) * factor % 219 + 16).astype(np.uint8).tobytes()
        )
    rgb = resize_frame(frame, (30, 40))
    assert rgb[10, 10:14].tolist() == [[106, 81, 158], [83, 157, 252], [182, 153, 128], [194, 43, 0]]
    assert int(rgb.astype(np.int64).sum()) == 449878
