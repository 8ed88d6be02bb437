"""Connections of a worker that ends without a word: here the worker is this process, which closes its ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from ivdr_deploy.serving.http import standby
from ivdr_deploy.serving.http.standby import (
    ANSWERING,
    ASKED,
    IDLE,
    Handover,
    Standby,
    last_words,
    most_connections,
)

SAID = last_words("1.0")


class Worker:
    """A listening port, and the ends of a worker and of what stands by."""

    def __init__(self, most: int = 512) -> None:
        self.port = socket.create_server(("127.0.0.1", 0))
        self.standby = Standby(most)
        table = os.dup(self.standby.table.fileno())
        self.standby.table.close()
        self.handover = Handover(self.standby.theirs, table)
        os.close(table)
        self.accepted: list[socket.socket] = []

    def connect(self, state: int | None = IDLE) -> socket.socket:
        client = socket.create_connection(self.port.getsockname())
        client.settimeout(10)
        connection = self.port.accept()[0]
        self.handover.accepted(connection)
        if state is not None:
            self.handover.note(connection.fileno(), state)
        self.accepted.append(connection)
        return client

    def die(self) -> int:
        """End as the system ends a process: everything is closed at once."""
        for connection in self.accepted:
            connection.close()
        self.standby.theirs.close()
        return self.standby.speak(SAID)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.port.close()


def heard(client: socket.socket) -> bytes:
    """All that a client is sent until the end."""
    with closing(client):
        found = b""
        while piece := client.recv(1 << 16):
            found += piece
        return found


def test_who_has_asked_is_told_and_who_is_being_answered_is_cut_off(worker: Worker) -> None:
    asked, begun, idle = worker.connect(ASKED), worker.connect(ANSWERING), worker.connect(IDLE)
    worker.accepted[1].sendall(b"HTTP/1.1 200 OK\r\n")
    assert worker.die() == 1
    assert heard(asked) == SAID
    assert heard(begun) == b"HTTP/1.1 200 OK\r\n"
    idle.sendall(b"POST / HTTP/1.1\r\n")  # it does not know yet
    assert heard(idle) == SAID


def test_what_they_are_told_is_an_answer_of_http() -> None:
    head, _, body = SAID.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    for line in (b"Retry-After: 1", b"Connection: close", b"X-Model-Version: 1.0"):
        assert line in head.split(b"\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b'"code": "worker_died"' in body


def test_an_idle_client_that_says_nothing_is_let_go(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "_IDLE_SECONDS", 0.1)
    idle = worker.connect(IDLE)
    assert worker.die() == 0
    assert heard(idle) == b""


def test_a_client_that_is_sending_sees_what_it_is_told(worker: Worker) -> None:
    client = worker.connect(ASKED)
    assert worker.die() == 1
    for _ in range(64):
        client.sendall(bytes(1 << 18))
    client.shutdown(socket.SHUT_WR)
    assert heard(client) == SAID


def test_a_connection_that_has_ended_is_closed_and_its_number_is_free(worker: Worker) -> None:
    first = worker.connect(ASKED)
    ended = worker.accepted.pop()
    worker.handover.ended(ended)
    assert heard(first) == b"", "a duplicate must not keep the client waiting for the end"
    second = socket.create_connection(worker.port.getsockname(), timeout=10)
    with worker.port.accept()[0] as accepted:
        again = socket.socket(fileno=os.dup2(accepted.fileno(), ended.detach()))  # it gets the same number
    worker.handover.accepted(again)
    worker.handover.note(again.fileno(), ASKED)
    worker.accepted.append(again)
    assert worker.die() == 1
    assert heard(second) == SAID


def test_a_client_that_has_gone_is_not_counted(worker: Worker) -> None:
    client = worker.connect(ASKED)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # as a killed process: reset
    client.close()
    assert worker.die() == 0


def test_what_there_is_no_room_for_is_cut_off() -> None:
    worker = Worker(most=1)
    client = worker.connect(ASKED)
    assert worker.die() == 0
    assert heard(client) == b""
    worker.port.close()


def test_a_worker_waits_for_nobody_who_takes_no_notes() -> None:
    ours, theirs = socket.socketpair()
    table = os.memfd_create("table")
    os.truncate(table, 512)
    handover = Handover(theirs, table)
    with ours, theirs, socket.socket() as connection:
        begin = time.monotonic()
        for _ in range(3000):
            handover.accepted(connection)
            handover.note(connection.fileno(), ASKED)
        handover.ended(connection)
        assert time.monotonic() - begin < 5
    os.close(table)


def test_there_is_room_for_the_duplicates_of_all_workers() -> None:
    assert most_connections(1) == 512
    assert 1 <= most_connections(10**6) <= 2
