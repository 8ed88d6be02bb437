"""Videos by URL, from a real server on loopback. Tests look names up themselves: what is refused is never contacted."""

from __future__ import annotations

import http.server
import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import websites
from requirements import missing
from test_urls import NOT_URLS, ODD_HOSTS, PRIVATE
from websites import LOOPBACK, Answer, LoopbackSite, redirects

from ivdr_deploy.errors import FetchError, IvdrError, UrlError, VideoLimitError
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.video.fetch import Fetcher
from ivdr_deploy.video.urls import UrlSettings

SECRET = "do-not-show-this"
BODY = bytes(range(256)) * 1000


class Site(LoopbackSite):
    """What a fetcher is tried on."""

    def url(self, path: str = "/a.mp4", host: str = "videos.example") -> str:
        return super().url(path, host)

    def settings(self, **changes: object) -> UrlSettings:
        settings = UrlSettings(
            hosts=(f"videos.example:{self.port}", f"*.videos.example:{self.port}"),
            schemes=("http",),
            seconds=10.0,
        )
        return replace(settings, **changes)  # type: ignore[arg-type]

    def fetcher(self, *, max_bytes: int = len(BODY), **changes: object) -> Fetcher:
        """One that takes loopback for public, and knows where the test's hosts are."""
        return Fetcher(
            self.settings(**changes),
            max_bytes=max_bytes,
            resolve=lambda host, port: [LOOPBACK],
            may_connect=lambda address: address == LOOPBACK,
        )


@pytest.fixture
def site() -> Iterator[Site]:
    with Site().running() as running:
        yield running


def sends(body: bytes = BODY, **more: Any) -> Answer:
    return websites.sends(body, **more)


def drips(handler: http.server.BaseHTTPRequestHandler) -> None:
    """A byte now and then: no single read ever times out."""
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def test_fetches_what_is_there_and_asks_for_it_as_written(site: Site) -> None:
    site.answers["/a.mp4"] = sends()
    assert site.fetcher().fetch(site.url(f"/a.mp4?token={SECRET}&x=%20#y")) == BODY
    assert site.asked == [(f"videos.example:{site.port}", f"/a.mp4?token={SECRET}&x=%20")]


def test_a_body_in_chunks_and_one_that_ends_with_the_connection(site: Site) -> None:
    def chunked(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in (BODY[:1000], BODY[1000:]):
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    def bare(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY)
        handler.close_connection = True

    site.answers |= {"/chunked": chunked, "/bare": bare}
    for path in ("/chunked", "/bare"):
        assert site.fetcher().fetch(site.url(path)) == BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_to_what_is_allowed(site: Site, status: int) -> None:
    site.answers |= {
        "/a.mp4": redirects(site.url("/b.mp4", "cdn.videos.example"), status),
        "/b.mp4": redirects("../c.mp4?x=1"),
        "/c.mp4": sends(),
    }
    assert site.fetcher().fetch(site.url()) == BODY
    assert [host.split(":")[0] for host, _ in site.asked] == ["videos.example", *["cdn.videos.example"] * 2]
    with pytest.raises(UrlError, match="more than 1 redirects"):
        site.fetcher(max_redirects=1).fetch(site.url())


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.1/", "http://localhost/", "http://evil.example/", "file:///etc/passwd", "//evil.example/x",
     "https://videos.example/", "http://videos.example/", "http://user:x@videos.example/", "http://[::1]/",
     "http://2130706433/", "gopher://videos.example/", "http://169.254.169.254/latest/meta-data/", "http://\\evil/"],
)  # fmt: skip
def test_a_redirect_past_the_lists_is_refused(site: Site, to: str) -> None:
    site.answers["/a.mp4"] = redirects(to)
    with pytest.raises(UrlError):
        site.fetcher().fetch(site.url())
    assert len(site.asked) == 1


@pytest.mark.parametrize("to", ["http://[", "//[x"])
def test_a_redirect_that_is_no_url_is_no_defect_of_ours(site: Site, to: str) -> None:
    site.answers["/a.mp4"] = redirects(to)
    with pytest.raises(UrlError, match="redirects to what is no URL"):
        site.fetcher().fetch(site.url())


def test_a_redirect_is_looked_up_and_checked_like_the_first(site: Site) -> None:
    site.answers["/a.mp4"] = redirects(site.url("/b.mp4", "inside.videos.example"))
    site.answers["/b.mp4"] = sends()
    inside = {"videos.example": [LOOPBACK], "inside.videos.example": ["10.0.0.1"]}
    fetcher = Fetcher(
        site.settings(),
        max_bytes=len(BODY),
        resolve=lambda host, port: inside[host],
        may_connect=lambda address: address == LOOPBACK,
    )
    with pytest.raises(UrlError, match="not public"):
        fetcher.fetch(site.url())
    assert len(site.asked) == 1


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every connection that anything in this process begins: none leaves the machine."""
    begun: list[tuple[str, int]] = []
    real = socket.create_connection

    def create(address: tuple[str, int], *arguments: object, **options: object) -> socket.socket:
        begun.append(address)
        assert address[0] == LOOPBACK, f"{address} was contacted"
        return real(address, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_connection", create)
    return begun


REFUSED = [
    *NOT_URLS,
    *(f"http://{host}/a.mp4" for host in ODD_HOSTS),
    *(f"http://[{address}]/" if ":" in address else f"http://{address}/" for address in PRIVATE[:-4]),
    "http://localhost/", "http://metadata.google.internal/computeMetadata/v1/", "http://instance-data/latest/",
    "http://127.0.0.1.nip.io/", "http://localtest.me:22/", "http://router/", "http://kubernetes.default.svc/",
]  # fmt: skip


def test_the_suite_of_forged_requests_is_large_enough() -> None:
    assert len(set(REFUSED)) >= 100


@pytest.mark.parametrize("url", REFUSED)
def test_a_forged_request_is_refused_and_contacts_nobody(url: str, connections: list[object]) -> None:
    """With every host and both schemes allowed, so that only the guard itself is in the way."""
    names = {
        "127.0.0.1.nip.io": "127.0.0.1",
        "localtest.me": "::1",
        "router": "192.168.0.1",
        "localhost": "127.0.0.1",
    }
    looked_up: list[str] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        looked_up.append(host)
        return [names.get(host, "169.254.169.254")]

    fetcher = Fetcher(
        UrlSettings(hosts=("*", "*:22"), schemes=("https", "http")), max_bytes=1000, resolve=resolve
    )
    with pytest.raises(UrlError) as caught:
        fetcher.fetch(url)
    assert not connections
    assert not {"127.0.0.1", "169.254.169.254", "192.168.0.1"} & set(caught.value.message.split())
    assert set(looked_up) <= {"localhost", "metadata.google.internal", "instance-data", "router",
                              "127.0.0.1.nip.io", "localtest.me", "kubernetes.default.svc"}  # fmt: skip


@pytest.mark.parametrize(
    "addresses", [["8.8.8.8", "127.0.0.1"], ["::1", "8.8.8.8"], ["64:ff9b::7f00:1"], [], ["no address"]]
)
def test_one_address_that_is_not_public_is_enough(addresses: list[str], connections: list[object]) -> None:
    fetcher = Fetcher(UrlSettings(hosts=("*",)), max_bytes=1000, resolve=lambda host, port: addresses)
    with pytest.raises(UrlError, match="not public"):
        fetcher.fetch("https://videos.example/")
    assert not connections


def test_a_name_that_changes_between_check_and_connection_is_harmless(
    site: Site, connections: list[tuple[str, int]]
) -> None:
    """The first look-up is the only one, and the connection goes to its address."""
    site.answers["/a.mp4"] = sends()
    answers = iter([[LOOPBACK], ["10.0.0.1"], ["10.0.0.1"]])
    fetcher = Fetcher(
        site.settings(),
        max_bytes=len(BODY),
        resolve=lambda host, port: next(answers),
        may_connect=lambda address: address == LOOPBACK,
    )
    assert fetcher.fetch(site.url()) == BODY
    assert connections == [(LOOPBACK, site.port)]
    with pytest.raises(UrlError):  # it has changed: checked anew, refused
        fetcher.fetch(site.url())
    assert len(connections) == 1


def endless(written: list[int], *, size: str | None = None) -> Answer:
    """More than anybody may hold, after the size of a chunk if there is one; tells how much was taken."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if size is not None:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True
        sent = 0
        try:
            if size is not None:
                handler.wfile.write(f"{size}\r\n".encode())
            while sent < 1 << 28:
                sent += handler.wfile.write(bytes(1 << 16))
        except OSError:
            pass
        written.append(sent)

    return answer


def require_not_taken(written: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not written:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert written[0] < 1 << 26


def test_more_than_is_allowed_is_not_read_to_its_end(site: Site) -> None:
    written: list[int] = []
    site.answers |= {"/declared": sends(BODY, length=10**12), "/endless": endless(written)}
    for path in ("/declared", "/endless"):
        with pytest.raises(VideoLimitError, match="more than 1000 bytes"):
            site.fetcher(max_bytes=1000).fetch(site.url(path))
    require_not_taken(written)


@pytest.mark.parametrize("size", [f"{1 << 62:x}", "F" * 30, f"{0:0100}1000000000 ; of=x"])
def test_a_chunk_larger_than_is_allowed_is_not_read_to_its_end(site: Site, size: str) -> None:
    written: list[int] = []
    site.answers["/a.mp4"] = endless(written, size=size)
    with pytest.raises(VideoLimitError, match="more than 1000 bytes"):
        site.fetcher(max_bytes=1000).fetch(site.url())
    require_not_taken(written)


@pytest.mark.parametrize(
    "size",
    ["-1", "-0", "-ffff", "+5", "0x5", "1_0", " 5", "\x0b5", "5 5", "", ";5", "5.", "ü", " " * (1 << 17)],
)
def test_what_is_no_size_of_a_chunk_is_an_error_of_the_server(site: Site, size: str) -> None:
    """Among them what ``int`` takes for one: below 0 it would mean everything that is sent."""
    written: list[int] = []
    site.answers["/a.mp4"] = endless(written, size=size)
    with pytest.raises(FetchError, match="cannot be asked"):
        site.fetcher(max_bytes=1000).fetch(site.url())
    require_not_taken(written)


@pytest.mark.parametrize(
    ("size", "count"), [("-1", (1 << 16) - 1), ("+5", 5), ("0x5", 5), ("0X5", 5), ("1_0", 16), ("\t5", 5)]
)
def test_a_chunk_is_not_taken_by_a_size_that_only_int_takes(site: Site, size: str, count: int) -> None:
    """Everything around it is in order, and it holds as many bytes as it could be taken to say."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for told, body in ((shown, BODY[:count]), ("0", b"")):
            handler.wfile.write(f"{told}\r\n".encode() + body + b"\r\n")

    site.answers["/a.mp4"] = answer
    shown = f"{count:x}"
    assert site.fetcher().fetch(site.url()) == BODY[:count]
    shown = size
    with pytest.raises(FetchError, match="cannot be asked"):
        site.fetcher().fetch(site.url())


@pytest.mark.parametrize("length", ["-1", "-100", "", "ten", "0x10", "9" * 5000])
def test_a_length_that_is_none_is_an_error_of_the_server(site: Site, length: str) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(BODY)
        handler.close_connection = True

    site.answers["/a.mp4"] = answer
    with pytest.raises(FetchError, match="a length that is none"):
        site.fetcher().fetch(site.url())


def test_a_server_that_takes_its_time_is_left_at_the_deadline(site: Site) -> None:
    gone = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        gone.wait(20)

    def slow_head(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        drips(handler)

    site.answers |= {"/silent": silent, "/drips": drips, "/slow": slow_head}
    for path in site.answers:
        start = time.monotonic()
        with pytest.raises(FetchError, match=r"within 0\.3 s"):
            site.fetcher(seconds=0.3, max_bytes=1 << 20).fetch(site.url(path))
        assert time.monotonic() - start < 5
    gone.set()


def test_a_look_up_that_hangs_is_left_at_the_deadline(site: Site) -> None:
    gone = threading.Event()

    def hangs(host: str, port: int) -> Sequence[str]:
        gone.wait(20)
        return []

    start = time.monotonic()
    with pytest.raises(FetchError, match=r"within 0\.2 s"):
        Fetcher(site.settings(seconds=0.2), max_bytes=1, resolve=hangs).fetch(site.url())
    assert time.monotonic() - start < 5
    gone.set()


def test_what_a_server_may_do_wrong_is_its_error_and_shows_no_secret(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def nonsense(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x00\xff nonsense\r\n\r\n")
        handler.close_connection = True

    site.answers |= {
        "/404": sends(b"", status=404),
        "/304": sends(b"", status=304),
        "/short": sends(BODY[:10], length=1000),
        "/gzip": sends(b"x", Content_Encoding="gzip"),
        "/no-location": sends(b"", status=302),
        "/nonsense": nonsense,
        "/http": sends(),
    }
    with caplog.at_level(logging.DEBUG):
        for path in site.answers:
            fetcher = site.fetcher(schemes=("https",)) if path == "/http" else site.fetcher()
            scheme = "https" if path == "/http" else "http"  # no TLS there: a failed handshake
            url = site.url(f"{path}?token={SECRET}").replace("http:", f"{scheme}:")
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(url)
            assert SECRET not in f"{caught.value} {caught.value.to_dict()}"
            assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert SECRET not in caplog.text
    closed = Site()
    closed._server.server_close()
    with pytest.raises(FetchError, match="ConnectionRefused"):
        closed.fetcher().fetch(closed.url())


def test_https_is_asked_with_the_name_and_believed_with_a_certificate_of_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        missing("openssl", "no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x -addext"
    command = [*words.split(), "subjectAltName=DNS:videos.example", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site._server.socket = context.wrap_socket(site._server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    site.answers["/a.mp4"] = sends()
    fetcher = site.fetcher(schemes=("https",))
    assert fetcher.fetch(site.url().replace("http:", "https:")) == BODY
    with pytest.raises(FetchError, match="SSLCertVerificationError"):
        fetcher.fetch(site.url(host="other.videos.example").replace("http:", "https:"))
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(FetchError, match="SSLCertVerificationError"):
        fetcher.fetch(site.url().replace("http:", "https:"))
    assert len(site.asked) == 1


def test_the_service_fetches_what_json_names_and_says_nothing_of_it(
    service: InferenceService, videos: list[bytes], site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.answers |= {"/a.mp4": sends(videos[0]), "/text": sends(b"no video"), "/404": sends(b"", status=404)}
    settings = ServiceSettings(decode_workers=1, urls=site.settings())
    fetching = InferenceService(service.model, settings, fetcher=site.fetcher())
    expected = service.submit({"body": videos[0]}).result(60)
    assert expected.status == 200

    def ask(body: object) -> tuple[int, str]:
        answer = fetching.submit({"body": json.dumps(body)}).result(60)
        assert SECRET not in answer.json.decode()
        return answer.status, str(answer.body.get("code", answer.body.get("predictions")))

    with caplog.at_level(logging.DEBUG):
        url = site.url(f"/a.mp4?{SECRET}")
        assert ask({"video_url": url}) == (200, str(expected.body["predictions"]))
        assert ask({"video_url": url, "options": {"top_k": 99999, "outputs": ["no"]}})[0] == 422
        assert ask({"video_url": url, "video": "AAAA"}) == (400, "bad_request")
        assert ask({"video_url": None}) == (400, "bad_request")
        assert ask({"video_url": site.url(f"/text?{SECRET}")}) == (400, "unreadable")
        assert ask({"video_url": site.url(f"/404?{SECRET}")}) == (424, "url_failed")
        assert ask({"video_url": f"http://127.0.0.1/{SECRET}"}) == (422, "bad_url")
    assert SECRET not in caplog.text
    assert len(site.asked) == 3
    fetching._predictor.close()
    off = service.submit({"body": json.dumps({"video_url": site.url()})}).result(60)
    assert (off.status, off.body["code"]) == (422, "bad_url")
    assert len(site.asked) == 3


def test_errors_of_urls_have_no_cause_that_a_log_would_show(site: Site) -> None:
    with pytest.raises(IvdrError) as caught:
        site.fetcher().fetch(f"http://[{SECRET}/")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__
