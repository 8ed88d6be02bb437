"""Videos of a list that are on a web server: a real one, on loopback."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from videos import numbered_video

from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import VideoStream
from ivdr_deploy.errors import ConfigError
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.scoring.inputs import InputStream, Selection, parse_since


class Site:
    """Serves one video under every name, but for names that lead elsewhere."""

    def __init__(self, content: bytes) -> None:
        self.asked: list[str] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                if self.path == "/away.mp4":
                    self.send_response(302)
                    self.send_header("Location", "http://elsewhere.invalid/a.mp4")
                    self.end_headers()
                    return
                self.send_response(200 if self.path != "/absent.mp4" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Site]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    video = numbered_video(tmp_path / "here.mp4", num_frames=8, size=(64, 48))
    with Site(video.read_bytes()).running() as running:
        yield running


@pytest.fixture
def score(site: Site, tiny_bundle: Path, tmp_path: Path) -> Callable[..., dict[str, dict[str, object]]]:
    urls = [f"http://{site.host}/{name}.mp4" for name in ("there", "absent", "away")]
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
    rows = score("--url-host", site.host)

    assert {name: row["status"] for name, row in rows.items() if row["status"] == "ok"} == {
        "here.mp4": "ok",
        "there.mp4": "ok",
    }
    assert rows["there.mp4"]["labels"] == rows["here.mp4"]["labels"]
    assert "answered with status 404" in rows["absent.mp4"]["error_message"]
    for name in ("away.mp4", "b.mp4"):
        assert "elsewhere.invalid is not among the hosts" in rows[name]["error_message"]
    assert sorted(site.asked) == ["/absent.mp4", "/away.mp4", "/there.mp4"]
    score("--url-host", site.host)
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
