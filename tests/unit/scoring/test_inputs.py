from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from ivdr_deploy.datasets.entries import Entry
from ivdr_deploy.datasets.lists import VideoList, VideoStream, read_video_list
from ivdr_deploy.errors import ConfigError, DataError
from ivdr_deploy.scoring.inputs import Input, InputStream, Selection, parse_share, parse_since, video_id
from ivdr_deploy.scoring.lister import Lister
from ivdr_deploy.scoring.shard import make_shard, shard_videos


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\nb.mp4,\nc.mp4,y\nabsent.mp4,\nd.mp4,x\n")
    return tmp_path / "list.csv"


def inputs(listed: Path, *, hash_files: bool = False, **selection: object) -> list[Input]:
    return list(InputStream(VideoStream(listed), Selection(**selection), hash_files=hash_files))


def test_a_stream_and_a_list_give_the_same_inputs(listed):
    streamed = inputs(listed)

    assert streamed == list(InputStream(read_video_list(listed), Selection()))
    assert [(item.position, item.uri, item.label) for item in streamed] == [
        (0, "a.mp4", "x"),
        (1, "b.mp4", None),
        (2, "c.mp4", "y"),
        (3, "absent.mp4", None),
        (4, "d.mp4", "x"),
    ]
    assert streamed[0].source.uri == str(listed.parent / "a.mp4")


def test_video_id_depends_on_the_uri_alone(listed):
    assert video_id("walk/a.mp4") == "d6bd5402b1bedf46"
    before = inputs(listed)[0]
    (listed.parent / "a.mp4").write_bytes(b"another")
    assert inputs(listed)[0].video_id == before.video_id


@pytest.mark.parametrize("change", ["size", "time", "appeared", "uri"])
def test_another_file_has_another_key(listed, change):
    before = {item.uri: item.key for item in inputs(listed)}
    file = listed.parent / ("absent.mp4" if change == "appeared" else "a.mp4")
    if change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "uri":
        listed.write_text(listed.read_text().replace("a.mp4,", "./a.mp4,"))
    else:
        file.write_bytes(b"longer")

    after = {item.uri: item.key for item in inputs(listed)}

    changed = {uri for uri in before if before[uri] != after.get(uri)}
    assert changed == {"absent.mp4" if change == "appeared" else "a.mp4"}


def test_a_key_spells_what_the_file_is(listed):
    os.utime(listed.parent / "a.mp4", ns=(5, 7))
    digest = hashlib.sha256(b"a.mp4").hexdigest()

    found = inputs(listed)

    assert found[0].key == f"{digest[:24]}-1-7"
    assert found[3].key.endswith("--1-0"), "no file"
    assert inputs(listed, hash_files=True)[0].key == f"{digest[:24]}-{hashlib.sha256(b'a').hexdigest()}"


def test_with_digests_the_content_alone_makes_the_key(listed):
    before = inputs(listed, hash_files=True)
    file = listed.parent / "a.mp4"
    os.utime(file, ns=(1, 1))
    assert inputs(listed, hash_files=True) == before
    assert before[0].sha256 == hashlib.sha256(b"a").hexdigest()
    assert (before[3].sha256, before[3].unreadable) == (None, None)
    file.write_bytes(b"A")
    os.utime(file, ns=(1, 1))
    assert inputs(listed, hash_files=True)[0].key != before[0].key


def test_shares_are_disjoint_and_whole_and_do_not_depend_on_the_order(listed):
    shares = [{item.uri for item in inputs(listed, share=(i, 3))} for i in (1, 2, 3)]
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([lines[0], *reversed(lines[1:])]))

    assert set().union(*shares) == {"a.mp4", "b.mp4", "c.mp4", "d.mp4", "absent.mp4"}
    assert sum(map(len, shares)) == 5
    assert [{item.uri for item in inputs(listed, share=(i, 3))} for i in (1, 2, 3)] == shares
    for place, share in enumerate(shares, start=1):
        stream = InputStream(VideoStream(listed), Selection(share=(place, 3)))
        assert len([*stream]) == len(share)
        assert [(entry.reason, entry.count) for entry in stream.left_out] == [
            ("of other shares", 5 - len(share))
        ]


def test_what_is_not_chosen_is_counted(listed):
    for name, day in (("a", 1), ("b", 3), ("c", 2), ("d", 4)):
        moment = datetime(2026, 11, day, tzinfo=UTC).timestamp()
        os.utime(listed.parent / f"{name}.mp4", (moment, moment))
    stream = InputStream(VideoStream(listed), Selection(since=parse_since("2026-11-02"), limit=2))

    assert [item.uri for item in stream] == ["b.mp4", "c.mp4"]
    assert [str(entry) for entry in stream.left_out] == [
        "1 not changed since 2026-11-02 00:00:00+00:00: a.mp4",
        "2 behind the limit: absent.mp4, d.mp4",
    ]


def test_choices_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="there is no share 5 of 4"):
        Selection(share=parse_share("5/4"))
    for text in ("1", "a/b", "1/", "-1/4", "1/4/4"):
        with pytest.raises(ConfigError, match="is no share"):
            parse_share(text)
    with pytest.raises(ConfigError, match="'yesterday' is no date"):
        parse_since("yesterday")
    with pytest.raises(ConfigError, match="the limit must be at least 1"):
        Selection(limit=0)


def listing(count: int) -> list[Input]:
    return [Input(i, f"{i}.mp4", None, f"v{i}", f"k{i}", f"/{i}.mp4") for i in range(count)]


class Stream:
    """Stands for a list, which gives its entries when they are asked for."""

    selection, left_out = Selection(), ()

    def __init__(self, items: Iterator[Input] | list[Input]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Input]:
        return iter(self.items)


def shards(count: int, done: set[str] = frozenset(), size: int | None = 4) -> list[list[int]]:
    with Lister(Stream(listing(count)), done, "run", videos_per_shard=size) as lister:
        return [[item.position for item in shard.inputs] for shard in lister.shards()]


def test_shards_hold_every_input_without_a_row_exactly_once():
    assert shards(10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert shards(10, {"k0", "k5", "k9"}) == [[1, 2, 3, 4], [6, 7, 8]]


def test_a_lost_shard_comes_back_under_its_name():
    items = listing(12)
    with Lister(
        Stream(items), {f"k{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)}, "run", videos_per_shard=4
    ) as lister:
        (again,) = lister.shards()

    assert again == make_shard("run", items[4:8])
    assert again.name != make_shard("other", items[4:8]).name
    assert again.name != make_shard("run", items[4:7]).name


@pytest.mark.parametrize(("position", "size"), [(0, 32), (32_000, 32), (33_000, 33), (1_000_000, 1000)])
def test_a_kill_loses_32_videos_or_a_thousandth_of_what_came_before(position, size):
    assert shard_videos(position) == size


def test_a_million_inputs_are_a_few_thousand_shards():
    starts = [0]
    while starts[-1] < 1_000_000:
        starts.append(starts[-1] + shard_videos(starts[-1]))
    assert len(starts) < 5000
    assert all(after > before for before, after in pairwise(starts))


def test_shards_come_before_the_listing_ends():
    go_on = threading.Event()

    def slowly() -> Iterator[Input]:
        yield from listing(8)
        assert go_on.wait(30), "nobody asked for the first shard before the list ended"
        yield from [item._replace(position=item.position + 8, key=f"later{item.key}") for item in listing(4)]

    with Lister(Stream(slowly()), (), "run", videos_per_shard=4) as lister:
        found = lister.shards()
        first = next(found)
        assert lister.total is None
        go_on.set()
        rest = list(found)
        assert (len(first.inputs), len(rest), lister.total, len(lister.index)) == (4, 2, 12, 12)
        assert not lister.unscored


def test_a_list_is_not_read_further_than_some_bytes_ahead(monkeypatch):
    monkeypatch.setattr("ivdr_deploy.scoring.lister._AHEAD_BYTES", 1000)
    taken = 0

    def counted() -> Iterator[Input]:
        nonlocal taken
        for item in listing(10_000):
            taken += 1
            yield item

    with Lister(Stream(counted()), (), "run", videos_per_shard=4) as lister:
        found = lister.shards()
        first = next(found)
        lister._thread.join(0.5)  # without a bound it would end in a tenth of that
        assert lister.total is None
        assert taken < 200, "it waits for somebody to take a shard"
        rest = [item for shard in found for item in shard.inputs]
    assert [*first.inputs, *rest] == listing(10_000)
    assert taken == 10_000


def test_an_error_further_down_the_list_is_raised_and_no_shard_after_it():
    def damaged() -> Iterator[Input]:
        yield from listing(4)
        raise DataError("line 5 is damaged")

    with (
        Lister(Stream(damaged()), (), "run", videos_per_shard=4) as lister,
        pytest.raises(DataError, match="line 5"),
    ):
        list(lister.shards())


def test_whoever_stops_gets_no_more_shards_and_the_thread_ends():
    endless = (Input(i, "a", None, "v", f"k{i}", "/a") for i in iter(lambda: 0, 1))
    with Lister(Stream(endless), (), "run", videos_per_shard=4) as lister:
        assert list(lister.shards(lambda: True)) == []
        assert lister.unscored
    assert not lister._thread.is_alive()


def test_a_list_that_gives_one_video_two_labels_names_both_places(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\nb.mp4,x\n./a.mp4,y\n")
    stream = VideoStream(tmp_path / "list.csv")
    found: list[Entry] = []
    with pytest.raises(DataError, match=r"line 2\) and 'y' \(.*line 4\)"):
        found.extend(stream)
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\nb.mp4,x\n./a.mp4,x\n")
    stream = VideoStream(tmp_path / "list.csv")
    assert [entry.uri for entry in stream] == ["a.mp4", "b.mp4"]
    assert [str(entry) for entry in stream.left_out] == ["1 repeated: ./a.mp4"]


def test_names_that_are_spelled_alike_are_two_videos(tmp_path):
    """Bytes that are no text are spelled, and a name may hold that spelling."""
    raw = os.fsencode(tmp_path) + b"/sub/caf\xe9.mp4"
    (tmp_path / "sub").mkdir()
    for file in (raw, os.fsencode(tmp_path) + rb"/sub/caf\xe9.mp4"):
        with open(file, "wb"):
            os.utime(file, (1, 1))
    (tmp_path / "list.txt").write_bytes(
        b"sub/caf\xe9.mp4\nsub/caf\\xe9.mp4\nabsent\xe9.mp4\nabsent\\xe9.mp4\n"
    )

    for source in (tmp_path, tmp_path / "list.txt"):
        found = [*InputStream(VideoStream(source), Selection())]
        assert len({item.uri for item in found}) == len(found) / 2
        assert len({item.key for item in found}) == len(found)
        assert len({item.video_id for item in found}) == len(found)
        for item in found:
            if b"\xe9" not in os.fsencode(item.file):
                assert item.video_id == video_id(item.uri)


def test_a_file_that_was_changed_at_that_very_moment_is_taken(listed):
    moment = parse_since("2026-11-02T10:00:00.123457Z")
    since = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
    for name, changed in (("a", since - 1), ("b", since), ("c", since + 1), ("d", since - 200)):
        os.utime(listed.parent / f"{name}.mp4", ns=(changed, changed))

    assert [item.uri for item in inputs(listed, since=moment)] == ["b.mp4", "c.mp4"]
    assert inputs(listed, since=parse_since("0001-01-01T00:00+23:00"))


def test_a_list_that_somebody_made_may_be_empty_or_hold_a_video_twice(listed):
    videos = read_video_list(listed)
    with pytest.raises(DataError, match="holds no videos"):
        InputStream(VideoList(listed, ()), Selection()).require_any()
    stream = InputStream(VideoList(listed, (*videos.items, videos.items[0])), Selection())
    assert len([*stream]) == 5
    assert [str(entry) for entry in stream.left_out] == ["1 repeated: a.mp4"]
