"""Videos of a list that are on a web server: a real one, on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from videos import numbered_video
from websites import LOOPBACK, LoopbackSite, redirects, sends

from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import VideoStream
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.inputs import InputStream, Selection, parse_since


@pytest.fixture
def site(tmp_path: Path) -> Iterator[LoopbackSite]:
    content = numbered_video(tmp_path / "here.mp4", num_frames=8, size=(64, 48)).read_bytes()
    made = LoopbackSite()
    made.answers |= {
        "/there.mp4": sends(content),
        "/absent.mp4": sends(b"", status=404),
        "/away.mp4": redirects("http://elsewhere.invalid/a.mp4"),
    }
    with made.running() as running:
        yield running


def host(site: LoopbackSite) -> str:
    return f"{LOOPBACK}:{site.port}"


@pytest.fixture
def score(
    site: LoopbackSite, tiny_bundle: Path, tmp_path: Path
) -> Callable[..., dict[str, dict[str, object]]]:
    urls = [site.url(f"/{name}.mp4") for name in ("there", "absent", "away")]
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(["path", "here.mp4", *urls, "http://elsewhere.invalid/b.mp4"]))

    def run(*words: str) -> dict[str, dict[str, object]]:
        with pytest.raises(SystemExit) as caught:
            main(
                [
                    "score",
                    str(tiny_bundle),
                    str(listed),
                    "-o",
                    str(tmp_path / "out"),
                    "--isolation",
                    "thread",
                    *words,
                ]
            )
        assert caught.value.code == 1
        return {row["uri"].rpartition("/")[2]: row for row in read_scores(tmp_path / "out").to_pylist()}

    return run


def test_videos_of_a_named_server_are_fetched_once_and_no_others(score, site):
    rows = score("--url-host", host(site))

    assert {name: row["status"] for name, row in rows.items() if row["status"] == "ok"} == {
        "here.mp4": "ok",
        "there.mp4": "ok",
    }
    assert rows["there.mp4"]["labels"] == rows["here.mp4"]["labels"]
    assert "answered with status 404" in rows["absent.mp4"]["error_message"]
    for name in ("away.mp4", "b.mp4"):
        assert "elsewhere.invalid is not among the hosts" in rows[name]["error_message"]
    assert sorted(path for _, path in site.asked) == ["/absent.mp4", "/away.mp4", "/there.mp4"]
    score("--url-host", host(site))
    assert len(site.asked) == 3, "the table was complete"


@pytest.mark.parametrize("words", [(), ("--url-host", "*"), ("--url-host", "*", "--url-host", "127.0.0.1")])
def test_a_server_that_is_not_named_is_not_asked(score, site, words):
    rows = score(*words)

    assert {row["error_code"] for name, row in rows.items() if name != "here.mp4"} == {"unreadable"}
    assert site.asked == []


def test_of_a_url_it_is_not_claimed_that_it_did_not_change(tmp_path):
    (tmp_path / "list.csv").write_text("path\nhttps://videos.invalid/a.mp4\n")
    stream = InputStream(VideoStream(tmp_path / "list.csv"), Selection(since=parse_since("2026-11-02")))

    assert list(stream) == []
    assert [str(entry) for entry in stream.left_out] == [
        "1 without a time of change: https://videos.invalid/a.mp4"
    ]


def test_what_is_no_host_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("path\na.mp4\n")
    with pytest.raises(ConfigError, match="which is no host"):
        InputStream(VideoStream(tmp_path / "list.csv"), Selection(), hosts=("https://a",))
