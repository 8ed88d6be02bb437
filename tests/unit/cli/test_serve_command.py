"""How ``ivdr serve`` ends. The server is a stand-in: a signal must come at one exact moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rights import make_too_deep

from ivdr_deploy._console import PlainConsole
from ivdr_deploy.serving.http import run_folder
from ivdr_deploy.serving.http.shadow import compare_answers
from ivdr_deploy.serving.torchserve import process


class Server:
    """Ready at once; interrupted while it is watched."""

    command_line, worker_facts = "torchserve", {}
    client = SimpleNamespace(model="tiny", metrics_url="", management_url="", predict_url="")
    config = SimpleNamespace(logs="logs")

    def __init__(self) -> None:
        self.stopped = 0
        self.worker_facts = {"name": "tiny", "version": "1", "variant": "v", "runtime": "r"}
        self.worker_facts |= {"golden_max_abs_diff": {}, "decode_mean_diff": {}}

    def start(self) -> None:
        pass

    def watch(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def stop(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.stopped += 1


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("moment", ["stopping", "READY", None])
def test_a_ready_server_that_is_interrupted_again_stops_in_order(
    ivdr, monkeypatch: pytest.MonkeyPatch, moment: str | None
) -> None:
    """``timeout`` sends its signal twice; a person presses Ctrl-C until something happens."""
    server = Server()
    monkeypatch.setattr(process, "serve", lambda *given, **options: server)
    say = PlainConsole.print

    def interrupted(console: PlainConsole, *objects: object, **options: object) -> None:
        say(console, *objects, **options)
        if moment is not None and str(objects[0]).startswith(moment):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PlainConsole, "print", interrupted)
    code, _, stderr = ivdr("serve", Path("tiny.mar"))
    assert (code, server.stopped) == (0, 1), stderr
    assert stderr.endswith("stopped: nothing of tiny is left running\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["b", "--videos", "v"], "--videos is for --update"),
        (["b", "--min-agreement", "0.5"], "--min-agreement is for --update"),
        (["--rollback", "--videos", "v"], "--videos is for --update"),
        (["--rollback", "--workers", "2"], "--workers is for starting a server"),
        (["--update", "b", "--server", "torchserve"], "--server is for starting a server"),
        (["b.mar", "--grpc-port", "0"], "--grpc-port is for --server http"),
        (["b.mar", "--batch-clips", "8"], "--batch-clips is for --server http"),
        (["--rollback", "--batch-clips", "8"], "--batch-clips is for starting a server"),
        (["b.mar", "--host", "0.0.0.0"], "--host is for --server http"),
        (["b", "--update", "c"], "give one of ARCHIVE"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_would_do_nothing_is_refused(ivdr, words: list[str], said: str) -> None:
    code, _, stderr = ivdr("serve", *words)
    assert code == 2, stderr
    assert said in stderr


@pytest.mark.parametrize("share", ["nan", "inf", "-0.1", "1.1"])
def test_a_share_that_is_none_is_refused(ivdr, tmp_path: Path, share: str) -> None:
    (tmp_path / "a.mp4").touch()
    code, _, stderr = ivdr("serve", "--update", "b", "--videos", tmp_path, "--min-agreement", share)
    assert (code, "--min-agreement must be from 0 to 1, found" in stderr) == (2, True), stderr


def test_an_update_that_cannot_look_at_all_videos_changes_nothing(
    ivdr, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(run_folder, "ask_server", lambda folder, order: iter(asked.append(order) or ()))
    (tmp_path / "a.mp4").touch()
    make_too_deep(tmp_path)
    code, out, stderr = ivdr("serve", "--update", "b", "--videos", tmp_path, "--json")
    assert (code, out, asked) == (1, "", [])
    assert "left out: 1 folders that cannot be read" in stderr
    assert "FAIL: nothing was compared, since some folders could not be read" in stderr


def test_the_http_server_says_what_it_takes(ivdr, tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "my model{x}.onnx"
    path.write_bytes(next(tiny_bundle.glob("**/*.onnx")).read_bytes())
    code, _, stderr = ivdr("serve", path, "--server", "http", "--port", 0, "--run-dir", tmp_path / "run")
    assert code == 5, stderr
    assert "is no bundle (its kind is: ONNX file)" in stderr
    assert "without --server http" in stderr


def test_each_video_of_an_update_stays_on_its_line(
    ivdr, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").touch()
    row = {"video": "a\nPASS: b\x1b[2J.mp4", "old": "sit\n", "new": "bow"}
    shadow = {
        "flips": [row] * 21, "lost": [row], "agreement": 0.5, "min_agreement": 0.9, "videos": 22,
        "answered_by_both": 21,
    }  # fmt: skip
    answer = {"last": True, "shadow": shadow, "switched": False, "serving": "tiny\n1.0"}
    said = [{"say": "loading x\nPASS"}, answer]
    monkeypatch.setattr(run_folder, "ask_server", lambda folder, order: iter(said))
    code, out, stderr = ivdr("serve", "--update", tmp_path / "b", "--videos", tmp_path)
    shown = "a\\u000aPASS: b\\u001b[2J.mp4: sit\\u000a -> bow"
    assert (code, out) == (1, "")
    assert stderr.splitlines() == [
        "loading x\\u000aPASS",
        *[f"  another label: {shown}"] * 20,
        "  another label: 1 more; --json has all",
        f"  no answer any more: {shown}",
        "22 videos, 21 answered by both: agreement 50.0% (at least 90.0%); 1 are answered no more",
        "FAIL: tiny\\u000a1.0 goes on",
    ]


def test_an_update_that_no_video_was_answered_in_does_not_speak_of_labels(
    ivdr, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").touch()
    broken = {"status": 422, "body": {"code": "decode_failed"}}
    shadow = compare_answers(
        lambda video: broken, lambda video: broken, [tmp_path / "a.mp4"], min_agreement=0.9, on_done=int
    )
    answer = {"last": True, "shadow": shadow.to_dict(), "switched": False, "serving": "tiny 1.0"}
    monkeypatch.setattr(run_folder, "ask_server", lambda folder, order: iter([answer]))
    code, _, stderr = ivdr("serve", "--update", tmp_path / "b", "--videos", tmp_path)
    assert (code, "1 videos, 0 answered by both: no video was answered by both (at least" in stderr) == (
        1,
        True,
    )
