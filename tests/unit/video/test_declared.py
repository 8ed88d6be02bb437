from __future__ import annotations

import io
from pathlib import Path

import pytest
from hostile_mp4 import box, compressed, fragmented, full, movie, numbers, track

from ivdr_deploy.errors import VideoError, VideoLimitError, VideoOpenError
from ivdr_deploy.video import VideoLimits, open_video
from ivdr_deploy.video._declared import check_declared

MANY = 20_000_000

HARMLESS = {
    "plain": movie(track()),
    "compressed": compressed(track()),
    "fragments": fragmented(3),
    "edits": movie(track(edits=[(40, 0), (80, 40)])),
    "an hour of plain sound": movie(track(), track(handler=b"soun", size=1, samples=8000 * 3600, tick=1)),
}

HOSTILE = {
    "samples of one size": movie(track(samples=MANY, size=1)),
    "most samples": movie(track(samples=0x0FFFFFFF, size=1)),
    "sizes that are not there": movie(track(samples=MANY, sizes=full("stsz", numbers(0, MANY)))),
    "small sizes": movie(track(samples=MANY, sizes=full("stz2", numbers(4, MANY)))),
    "sound": movie(track(), track(handler=b"soun", samples=MANY, size=1, tick=2)),
    "chunks of sound": movie(track(), track(handler=b"soun", size=1, tick=1, per_chunk=0x7FFFFFFF)),
    "data": movie(track(), track(handler=b"meta", samples=MANY, size=1)),
    "no handler": movie(track(samples=MANY, size=1).replace(b"hdlr", b"xxxx")),
    "in another box": movie(track(samples=MANY, size=1).replace(b"minf", b"udta")),
    "in a meta box": movie(box("meta", bytes(4), track(samples=MANY, size=1))),
    "beside the header": movie(track()) + track(samples=MANY, size=1),
    "compressed": compressed(track(samples=MANY, size=1)),
    "fragment": fragmented(MANY),
    "fragments": fragmented(200_000, fragments=100),
    "edits": movie(track(samples=10_000, size=1, tick=1, edits=[(1, 9_999)] * 10_000)),
    "edits of everything": movie(track(samples=100_000, size=1, tick=1, edits=[(100_000, 0)] * 300)),
    "tracks": movie(*[track(samples=200_000, size=1)] * 50),
    "boxes": movie(track()) + box("free") * 900_000,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_header_may_declare_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(HARMLESS[name])
    for source in (path, HARMLESS[name]):
        with open_video(source) as reader:
            assert reader.read([0]).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("decoder", ["pyav", "opencv"])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_header_declares_is_held_against_the_limits_before_a_decoder_sees_it(
    name: str, decoder: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(VideoLimitError, match=r"limit|more than"):
        open_video(path, decoder=decoder)  # type: ignore[arg-type]


def test_a_file_may_have_a_hundred_streams() -> None:
    open_video(movie(*[track()] * 100)).close()
    with pytest.raises(VideoLimitError, match="more than 100 streams, the limit"):
        open_video(movie(*[track()] * 101))


def test_limits_follow_max_frames() -> None:
    data = movie(track(samples=400_000, size=1))
    with pytest.raises(VideoLimitError, match="more than 250000 frames, the limit: it declares 400000"):
        open_video(data)
    check_declared(io.BytesIO(data), name="a", max_frames=400_000)


@pytest.mark.parametrize("lying", [False, True])
def test_a_compressed_header_is_unpacked_no_further_than_a_header_may_be_long(lying: bool) -> None:
    bomb = compressed(track(), padding=1 << 26)
    assert len(bomb) < 1 << 17
    if lying:  # of its size
        before, _, after = bomb.partition(b"cmvd")
        bomb = before + b"cmvd" + numbers(100) + after[4:]
    with pytest.raises(VideoLimitError, match="compressed header of more than 32 MiB"):
        open_video(bomb)


def test_pictures_in_another_file_are_not_looked_for_in_this_one() -> None:
    with pytest.raises(VideoOpenError, match="its pictures lie in another file"):
        open_video(movie(track(reference_flags=0)))


@pytest.mark.parametrize("name", HARMLESS)
def test_a_damaged_header_is_an_error_of_the_video(name: str) -> None:
    data = HARMLESS[name]
    begin = data.index(b"moov") - 4
    for place in range(begin, len(data)):
        for value in (0, 0x7F, 0xFF):
            damaged = bytearray(data)
            damaged[place] = value
            try:
                check_declared(io.BytesIO(damaged), name="a", max_frames=VideoLimits().max_frames)
            except VideoError:
                continue
    for length in range(begin, len(data)):
        check_declared(io.BytesIO(data[:length]), name="a", max_frames=VideoLimits().max_frames)
