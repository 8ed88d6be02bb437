"""The control socket of a server's folder."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from served import wait_for

from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.http.channel import Message
from ivdr_deploy.serving.http.run_folder import RunFolder, Say, ask_server


def accepting() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "control-socket"]


def test_orders_are_answered_until_the_end_and_nobody_waits_for_more(tmp_path: Path) -> None:
    before = set(accepting())
    with RunFolder(tmp_path / "run") as folder:
        folder.listen(lambda order, say: {"did": order["do"]})
        assert [*ask_server(folder.path, {"do": "this"})] == [{"did": "this", "last": True}]
        assert len(set(accepting()) - before) == 1
    wait_for(lambda: not set(accepting()) - before)
    with pytest.raises(ServerError, match="no server answers"):
        next(ask_server(tmp_path / "run", {"do": "this"}))


def test_an_order_that_meets_a_full_disk_is_told_so(tmp_path: Path) -> None:
    def full(order: Message, say: Say) -> Message:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder(tmp_path / "run") as folder:
        folder.listen(full)
        with pytest.raises(ServerError, match="No space left on device"):
            next(ask_server(folder.path, {"do": "this"}))


def test_an_order_is_given_up_when_nobody_hears_of_it_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = threading.Event()

    def goes_on(order: Message, say: Say) -> Message:
        say({"say": "it begins"})
        assert gone.wait(20)
        for _ in range(1000):
            say({"say": "it goes on"})
        raise AssertionError("nobody was told that it goes on")

    with RunFolder(tmp_path / "run") as folder:
        folder.listen(goes_on)
        asking = ask_server(folder.path, {"do": "this"})
        assert next(asking) == {"say": "it begins"}
        asking.close()
        gone.set()
        wait_for(lambda: "'this' was given up" in caplog.text)
    assert "refused" not in caplog.text
