"""The life of a run whose videos and table are in an object store: a real server of it, on loopback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from score_tables import TIMINGS
from videos import numbered_video

from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import VideoStream
from ivdr_deploy.datasets.remote import UrlStream
from ivdr_deploy.decoding.pool import DecodeOptions, DecodePool
from ivdr_deploy.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    VideoLimitError,
    VideoOpenError,
)
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.inputs import InputStream, Selection
from ivdr_deploy.scoring.reader import refuse_foreign
from ivdr_deploy.scoring.store import FolderStore, UrlStore, as_os_error, open_store
from ivdr_deploy.spec import ClipSpec, ViewPlan
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.decode import open_video
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.remote import UrlSource, file_system, is_url

BUCKET = "collection"
VIDEOS = 200
SHARDS = 7


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MOTO_S3_DEFAULT_MAX_KEYS": "50",  # so that a page is full sooner than after a thousand
        }
    finally:
        server.stop()


@contextmanager
def gs_server() -> Iterator[dict[str, str]]:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server._api._httpd.server_address[1]}",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC, which it lacks
        }
    finally:
        server.stop()


SERVERS = {"s3": (s3_server, ("s3fs", "moto.server")), "gs": (gs_server, ("gcsfs", "gcp_storage_emulator"))}


@pytest.fixture(scope="module", params=SERVERS)
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a bucket."""
    running, needed = SERVERS[request.param]
    for module in needed:
        pytest.importorskip(module)
    before = dict(os.environ)
    file_system.cache_clear()
    with running() as variables:
        os.environ.update(variables)
        try:
            file_system(request.param).mkdir(BUCKET)
            yield f"{request.param}://{BUCKET}"
        finally:
            file_system.cache_clear()
            os.environ.clear()
            os.environ.update(before)


def system_of(url: str) -> Any:
    return file_system(url.partition(":")[0])


@pytest.fixture(scope="module")
def videos(store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One good video in ten; some in folders."""
    good = numbered_video(
        tmp_path_factory.mktemp("videos") / "a.mp4", num_frames=8, size=(64, 48)
    ).read_bytes()
    system = system_of(store)
    for index in range(VIDEOS):
        folder = "walk/" if index % 3 else ""
        system.pipe_file(f"{BUCKET}/videos/{folder}{index:03d}.mp4", good if index % 10 == 0 else b"no video")
    system.pipe_file(f"{BUCKET}/videos/readme.txt", b"text")
    return f"{store}/videos"


def score(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["score", *words])
    return int(caught.value.code or 0)


def names(url: str) -> list[str]:
    return open_store(url).names()


def test_objects_are_listed_by_name_and_the_rest_is_counted(videos):
    stream = UrlStream(f"{videos}/")
    found = list(InputStream(stream, Selection()))

    assert len(found) == VIDEOS
    assert [item.uri for item in found[:3]] == ["000.mp4", "003.mp4", "006.mp4"]
    assert found[-1].uri == "walk/199.mp4"
    assert [str(entry) for entry in stream.left_out] == ["1 without the suffix of a video: readme.txt"]
    with pytest.raises(DataError, match=r"cannot be listed .FileNotFoundError"):
        list(UrlStream(f"{videos}/absent"))


def test_a_folder_of_many_objects_is_read_a_page_at_a_time(store, monkeypatch):
    """Each is yielded once, in order, before the next page is asked for, with the identity that a lone look tells."""
    system, number = system_of(store), 110
    odd = ["pages//b.mp4", "pages/c d+%41ü.mp4", "pages/deep/er/x.mp4"]
    for name in [*(f"pages/{index:03d}.mp4" for index in range(number)), *odd]:
        system.pipe_file(f"{BUCKET}/{name}", b"x")
    asked = []
    scheme = store.partition(":")[0]
    call = "call_s3" if scheme == "s3" else "call"
    original = getattr(system, call)
    monkeypatch.setattr(
        system, call, lambda *given, **options: asked.append(options) or original(*given, **options)
    )
    listing = iter(UrlStream(f"{store}/pages"))
    first = next(listing)
    assert len(asked) == 1
    found = [first, *listing]
    # Objects of a folder, then those of the folders in it.
    assert [uri for _, uri, _ in found] == [
        *(f"{index:03d}.mp4" for index in range(number)), "c d+%41ü.mp4", "/b.mp4", "deep/er/x.mp4",
    ]  # fmt: skip
    assert len(asked) >= (6 if scheme == "s3" else 4)  # the server for gs knows no pages
    for source, _, _ in found[-3:]:
        assert source.open().read() == b"x"
        assert source.identity() == UrlSource(source.uri, 1).identity()


@pytest.fixture
def fetched(store, monkeypatch):
    """What was fetched, object by object."""
    system, names = system_of(store), []
    original = system.cat_file
    monkeypatch.setattr(system, "cat_file", lambda name, *rest: names.append(name) or original(name, *rest))
    return names


def test_an_object_larger_than_the_limit_is_not_fetched(store, fetched):
    system_of(store).pipe_file(f"{BUCKET}/large/a.mp4", b"x" * 2000)
    (listed,) = (source for source, _, _ in UrlStream(f"{store}/large"))
    named = UrlSource(listed.uri, listed.max_bytes)
    for source in (listed, named):
        small = replace(source, max_bytes=1999)
        for read in (small.local, small.open, partial(open_video, small)):
            with pytest.raises(VideoLimitError, match=r"a\.mp4' has 2000 bytes, more than the limit of 1999"):
                read()
    assert fetched == []
    for source in (listed, named):
        assert replace(source, max_bytes=2000).local() == b"x" * 2000
    assert len(fetched) == 2


def test_an_empty_object_is_within_every_limit(store):
    system_of(store).pipe_file(f"{BUCKET}/empty.mp4", b"")
    assert UrlSource(f"{store}/empty.mp4", 1).local() == b""


def test_objects_of_a_folder_and_of_a_list_have_the_limit_of_videos(videos, tmp_path):
    (tmp_path / "list.csv").write_text(f"path\n{videos}/000.mp4\n")
    for stream in (UrlStream(videos), VideoStream(tmp_path / "list.csv")):
        first = next(iter(InputStream(stream, Selection())))
        assert (type(first.file), first.file.max_bytes) == (UrlSource, VideoLimits().max_bytes)


def test_an_object_for_which_there_is_no_memory_is_too_large_and_not_unreadable(store, monkeypatch):
    system_of(store).pipe_file(f"{BUCKET}/memory.mp4", b"x")

    monkeypatch.setattr(system_of(store), "cat_file", lambda name: bytearray(1 << 60))
    source = UrlSource(f"{store}/memory.mp4", 1)
    with DecodePool(DecodeOptions(isolation="thread")) as pool:
        error = pool.submit(load_clips, source, ClipSpec(), ViewPlan(), limits=VideoLimits()).exception(60)
    assert type(error) is VideoLimitError
    assert "memory" in error.message


def test_an_object_that_cannot_be_fetched_is_unreadable(store):
    with pytest.raises(VideoOpenError, match=r"cannot be looked at .FileNotFoundError") as caught:
        UrlSource(f"{store}/absent.mp4", 1).local()
    assert "rights" in caught.value.hint
    with pytest.raises(VideoOpenError, match=r"cannot be fetched .FileNotFoundError"):
        UrlSource(f"{store}/absent.mp4", 1, size_bytes=1).local()  # gone since it was listed


@pytest.mark.parametrize("told", [{"size": None}, {}, {"size": 1, "mtime": "yesterday"}])
def test_an_object_of_which_a_store_tells_nonsense_is_unreadable(store, monkeypatch, told):
    monkeypatch.setattr(system_of(store), "info", lambda name: told)
    with pytest.raises(VideoOpenError, match=r"odd\.mp4' cannot be looked at .(Type|Key|Value)Error"):
        UrlSource(f"{store}/odd.mp4", 1).local()


def test_a_folder_without_videos_says_what_it_holds(store):
    system_of(store).pipe_file(f"{BUCKET}/texts/deep/a.txt", b"x")
    with pytest.raises(
        DataError, match=r"texts' holds no videos .left out: 1 without the suffix .*deep/a\.txt"
    ):
        list(UrlStream(f"{store}/texts"))


@pytest.mark.exhaustive
def test_a_run_in_a_store_is_killed_and_goes_on_and_its_list_changes(tiny_bundle, videos, store, tmp_path):
    """Listed, scored, killed, resumed, an object replaced, another removed."""
    out, whole = f"{store}/killed", f"{store}/whole"
    words = ["score", str(tiny_bundle), videos, "-o", out, "--variant", "onnx-fp32"]
    assert score(str(tiny_bundle), videos, "-o", whole, "--variant", "onnx-fp32") == 1
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from ivdr_deploy.cli import main; main()", *words],
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not any(name.startswith("part-") for name in names(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {name for name in names(out) if name.startswith("part-")}
    assert len(kept) < SHARDS, "there was no work outstanding"

    assert score(*words[1:]) == 1

    assert kept < set(names(out))
    assert names(out) == names(whole)
    tables = [read_scores(url).drop_columns(TIMINGS) for url in (out, whole)]
    assert tables[0].equals(tables[1])
    assert tables[0]["status"].to_pylist().count("ok") == VIDEOS // 10

    system = system_of(store)
    content = system.cat_file(f"{BUCKET}/videos/000.mp4")
    system.pipe_file(f"{BUCKET}/videos/003.mp4", content)
    system.rm_file(f"{BUCKET}/videos/006.mp4")
    assert score(*words[1:]) == 1
    rows = {row["uri"]: row for row in read_scores(out).to_pylist()}
    assert len(rows) == VIDEOS - 1
    assert rows["003.mp4"]["labels"] == rows["000.mp4"]["labels"]
    assert "006.mp4" not in rows


def test_a_list_names_objects_beside_files(tiny_bundle, videos, store, tmp_path):
    numbered_video(tmp_path / "here.mp4", num_frames=8, size=(64, 48))
    (tmp_path / "list.csv").write_text(
        f"path,label\n{videos}/000.mp4,walk\nhere.mp4,sit\n{videos}/absent.mp4,\n"
    )

    assert score(str(tiny_bundle), str(tmp_path / "list.csv"), "-o", str(tmp_path / "out"), "--hash") == 1

    rows = read_scores(tmp_path / "out").to_pylist()
    assert [row["error_code"] for row in rows] == [None, None, "unreadable"]
    assert [row["uri"] for row in rows] == [f"{videos}/000.mp4", "here.mp4", f"{videos}/absent.mp4"]
    assert rows[0]["labels"] == rows[1]["labels"]
    assert len(rows[0]["sha256"]) == 64


def test_a_place_with_other_objects_is_refused(tiny_bundle, videos, store, capsys):
    assert score(str(tiny_bundle), videos, "-o", videos) == 10
    assert "is not empty and is no score table" in capsys.readouterr().err


def test_a_store_that_refuses_is_an_error_of_the_system_that_names_it(store):
    absent = f"{store}-that-is-not-there/x"
    with pytest.raises(OSError, match="that-is-not-there") as caught:
        UrlStore(absent).write("a", b"a")
    assert caught.value.errno
    assert caught.value.filename == f"{absent}/a"


def test_a_store_whose_package_is_absent_is_not_one_that_cannot_be_listed(monkeypatch):
    file_system.cache_clear()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match="s3fs") as caught:
        list(UrlStream("s3://bucket/x"))
    assert "ivdr-deploy[s3]" in caught.value.hint


def test_only_what_lies_below_its_prefix_is_of_a_table(store):
    table = UrlStore(f"{store}/odd/table")
    table.write("_run.json", b"{}")
    UrlStore(f"{store}/odd/table-2").write("part.parquet", b"")
    UrlStore(f"{store}/odd").write("table.parquet", b"")
    assert table.names() == ["_run.json"]
    assert table.has("_run.json")
    assert not table.has("part.parquet")
    table.remove("_run.json")
    table.remove("_run.json")
    assert table.names() == []


def test_a_part_of_a_name_in_a_store_may_be_empty(tmp_path):
    class Named(FolderStore):
        def names(self) -> list[str]:
            return ["a//b.parquet", "", "/_c.parquet"]

    with pytest.raises(DataError, match=r"a/b\.parquet is not a part of the run"):
        refuse_foreign(Named(tmp_path), error=DataError)


def test_what_a_store_answers_is_cut_and_on_one_line(monkeypatch):
    answer = ValueError("\x1b[31mno\rroom\x00" + "x" * 5000 + "\nmore")
    with pytest.raises(OSError, match="no") as caught, as_os_error("s3://bucket/x"):
        raise answer
    with pytest.raises(DataError) as refused:
        raise UrlStream._unlisted("s3://bucket/x", answer)
    for text in (str(caught.value.strerror), str(refused.value)):
        assert "\\u001b[31mno" in text
        assert text.isprintable()
        assert len(text) < 400


def test_only_schemes_that_are_named_are_urls():
    assert is_url("s3://bucket/x")
    assert is_url("gs://bucket/x")
    assert not any(map(is_url, ("https://host/x", "file:///x", "s3:/x", "scores:1", "memory://x")))
    with pytest.raises(ConfigError, match="expected s3://"):
        file_system("https")


def test_one_object_is_no_place_of_videos(videos):
    with pytest.raises(DataError, match=r"000\.mp4' is an object; expected a prefix") as caught:
        list(UrlStream(f"{videos}/000.mp4"))
    assert "lies on this machine" in caught.value.hint


class UnlikeError(OSError):
    """An error of a library whose class takes other arguments than those of the system."""

    def __init__(self, key: str, cause: OSError) -> None:
        super().__init__(cause.errno, f"{key}: {cause.strerror}")


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (UnlikeError("host", OSError(errno.ECONNREFUSED, "refused")), ConnectionRefusedError),
        (FileNotFoundError("bucket"), FileNotFoundError),
        (PermissionError("Access Denied"), PermissionError),
        (ValueError("odd"), OSError),
    ],
)
def test_whatever_a_library_raises_is_an_error_of_the_system(raised, kind):
    with pytest.raises(kind) as caught, as_os_error("s3://bucket/x"):
        raise raised
    assert caught.value.filename == "s3://bucket/x"
    assert caught.value.errno
