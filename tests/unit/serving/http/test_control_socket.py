"""The control socket of a server's folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from served import wait_for

from ivdr_deploy.errors import ServerError
from ivdr_deploy.serving.http.run_folder import RunFolder, ask_server


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
