"""The golden file: what is in it is what the manifest promises, and reading it costs no more than that."""

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TINY_CLIP, reseal

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.golden import GOLDEN_FILE, Golden, read_golden, write_golden
from ivdr_deploy.artifacts.manifest import OutputSpec
from ivdr_deploy.errors import ArtifactError

OUTPUTS = (OutputSpec(name="logits", shape=(3,)), OutputSpec(name="intra", shape=(2, 4)))
SHAPE = TINY_CLIP.clip_shape
Arrays = dict[str, Any]


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "video": rng.integers(0, 256, (5, *SHAPE), dtype=np.uint8),
        "logits": rng.normal(size=(5, 3)).astype(np.float32),
        "intra": rng.normal(size=(5, 2, 4)).astype(np.float32),
        "clips:a.mp4": rng.integers(0, 256, (2, *SHAPE), dtype=np.uint8),
    }


def read(folder: Path) -> Golden:
    return read_golden(folder, clip=TINY_CLIP, outputs=OUTPUTS)


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read(folder)
    assert GOLDEN_FILE in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.hint
    return caught.value.message


def test_what_was_written_is_read(tmp_path: Path) -> None:
    stored = arrays()
    clips = {"a.mp4": stored.pop("clips:a.mp4")}
    golden = Golden(video=stored.pop("video"), expected=stored, clips=clips)
    write_golden(tmp_path, golden)
    found = read(tmp_path)
    assert np.array_equal(found.video, golden.video)
    for mine, theirs in ((golden.expected, found.expected), (golden.clips, found.clips)):
        assert list(mine) == list(theirs)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_videos_alone_are_legal(tmp_path: Path) -> None:
    write_golden(tmp_path, Golden(clips={"a.mp4": arrays()["clips:a.mp4"]}))
    found = read(tmp_path)
    assert (found.video, found.expected, list(found.clips)) == (None, {}, ["a.mp4"])


def put(name: str, value: Any) -> Callable[[Arrays], object]:
    return lambda stored: stored.update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda stored: stored.pop("intra"), "expected 'intra', 'logits', 'video'"),
        (lambda stored: stored.pop("video"), "expected 'intra', 'logits', 'video'"),
        (put("more", np.zeros(1)), "more"),
        (put("video", np.zeros((5, *SHAPE), np.float32)), "dtype float32"),
        (put("video", np.zeros((5, 2, *SHAPE[1:]), np.uint8)), "shape (5, 2, 32, 32, 3)"),
        (put("video", np.zeros((0, *SHAPE), np.uint8)), "shape (0, 4, 32, 32, 3)"),
        (put("video", np.uint8(3)), "shape ()"),
        (put("logits", np.zeros((4, 3), np.float32)), "logits has dtype float32 and shape (4, 3)"),
        (put("logits", np.zeros((5, 2), np.float32)), "shape (5, 2)"),
        (put("logits", np.zeros((5, 3), np.float64)), "dtype float64"),
        (put("logits", np.float32(0)), "shape ()"),
        (put("logits", np.full((5, 3), "a")), "dtype <U1"),
        (put("logits", np.full((5, 3), np.nan, np.float32)), "expected finite"),
        (put("intra", np.full((5, 2, 4), -np.inf, np.float32)), "intra has"),
        (put("clips:a.mp4", np.zeros((1, *SHAPE), np.uint8)), "'clips:a.mp4' has dtype uint8 and shape (1,"),
        (put("clips:a.mp4", np.zeros((2, *SHAPE), np.int8)), "dtype int8"),
        (put("logits", np.array([object()])), "cannot be read"),  # it is not unpickled
    ],
)
def test_another_content_is_refused(tmp_path: Path, change: Callable[[Arrays], object], reason: str) -> None:
    stored = arrays()
    change(stored)
    np.savez(tmp_path / GOLDEN_FILE, **stored)
    assert reason in refusal(tmp_path)


def claim(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The head of an array of this shape, and not one value."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "shape", [(98 << 30,), (1 << 20, *SHAPE), (10**30,), (10**4000,)], ids=lambda shape: str(shape)[:40]
)
def test_a_claim_of_gigabytes_is_refused_before_it_is_believed(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with zipfile.ZipFile(tmp_path / GOLDEN_FILE, "w") as archive:
        archive.writestr("video.npy", claim(shape))
    tracemalloc.start()
    assert "claims to hold" in refusal(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "shapes",
    [
        [(2 * 10**11,), (-2 * 10**11,)],
        [(-(10**6), 10**6), (10**6, 10**6)],
        [(-1, 10**12), (-(10**6), -(10**6))],
        [(0, -1)],
    ],
    ids=str,
)
def test_a_negative_size_makes_no_room_for_another_array(
    tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    with zipfile.ZipFile(tmp_path / GOLDEN_FILE, "w") as archive:
        for number, shape in enumerate(shapes):
            archive.writestr(f"clips:{number}.npy", claim(shape))
    assert "an array has the shape (" in refusal(tmp_path)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    """Only the second version of the format can have one; packed, it is a small file."""
    size = 32 << 20
    with zipfile.ZipFile(tmp_path / GOLDEN_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("video.npy", b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little") + bytes(size))
    tracemalloc.start()
    assert "version (2, 0) of the format" in refusal(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_many_arrays_are_counted_together(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / GOLDEN_FILE, "w") as archive:
        for number in range(4):
            archive.writestr(f"clips:{number}.npy", claim((300 << 20,)))
    assert "claims to hold" in refusal(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a zip",
        lambda data: data[: len(data) // 2],
        lambda data: data[:40] + bytes(40) + data[80:],
        lambda data: data.replace(b"NUMPY", b"NUMPI"),
        lambda data: data.replace(b"NUMPY\x01", b"NUMPY\x09"),
        lambda data: data.replace(b"'shape': (", b"'shape': {"),
        lambda data: data.replace(b"'shape': (5", b"'shape':(-5"),
        lambda data: data.replace(b"'|u1'", b"'|u9'"),
        lambda data: data.replace(b"PK\x03\x04", b"PK\x03\x09"),
    ],
    ids=["empty", "text", "cut", "zeros", "magic", "version", "header", "negative", "dtype", "member"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    np.savez(tmp_path / GOLDEN_FILE, **arrays())
    data = (tmp_path / GOLDEN_FILE).read_bytes()
    (tmp_path / GOLDEN_FILE).write_bytes(damage(data))
    assert "cannot be read" in refusal(tmp_path)


def test_no_flipped_bit_ends_in_another_exception(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / GOLDEN_FILE, **{**arrays(), "video": np.zeros((5, *SHAPE), np.uint8)})
    data = (tmp_path / GOLDEN_FILE).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (tmp_path / GOLDEN_FILE).write_bytes(changed)
        try:
            read(tmp_path)
        except ArtifactError:
            refused += 1
    assert refused > 200


def test_clips_of_videos_and_videos_belong_together(tiny_bundle_copy: Path) -> None:
    golden = open_bundle(tiny_bundle_copy).golden()
    (tiny_bundle_copy / "golden_mpeg4.avi").unlink()
    reseal(tiny_bundle_copy)
    with pytest.raises(ArtifactError, match=r"clips without their video: 'golden_mpeg4\.avi'"):
        open_bundle(tiny_bundle_copy).golden()
    write_golden(tiny_bundle_copy, Golden(clips={"../secret.mp4": golden.clips["golden_h264.mp4"]}))
    reseal(tiny_bundle_copy)
    with pytest.raises(ArtifactError, match=r"'\.\./secret\.mp4', 'golden_h264\.mp4'"):
        open_bundle(tiny_bundle_copy).golden()
