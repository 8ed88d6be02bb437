"""A process that holds HTTP and the network. It is started by ``worker_process.WorkerProcess`` and never by hand.

``python -m ivdr_deploy.serving.http.worker CONTROL LISTENING NOTES TABLE``: the numbers of three open sockets and a
file. The first word on the control socket says what to serve; then come questions. When the other end is gone, so is
this process. Notes and table are those of ``standby.Handover``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ivdr_deploy._memory import keep_memory_of_requests
from ivdr_deploy.environment import let_threads_sleep
from ivdr_deploy.errors import IvdrError, VideoOpenError
from ivdr_deploy.records import from_dict
from ivdr_deploy.serving.http.channel import Channel, Message, error_message
from ivdr_deploy.serving.http.listening import SharedSocket
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.standby import Handover


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What a worker serves; goes over the control socket, so that the token stands on no command line."""

    bundle: str
    settings: HttpSettings
    token: str | None
    host: str
    grpc_port: int | None


class Worker:
    """Answers the questions of the supervisor about one server.

    Args:
        server: Open: its golden clips and videos agreed.
        channel: To the supervisor.
    """

    def __init__(self, server: HttpServer, channel: Channel) -> None:
        self._server, self._channel = server, channel

    def run(self, questions: queue.SimpleQueue[Message]) -> None:
        """Answer until the end is asked for; return when every request that was taken is answered."""
        while (question := questions.get())["do"] != "end":
            try:
                answer = getattr(self, f"_{question['do']}")(question)
            except Exception as error:  # noqa: BLE001  # whoever asked gets it
                answer = error_message(error)
            if answer is not None:
                self._channel.send({**answer, "id": question["id"]})
        self._server.stop()
        self._server.wait()
        if "id" in question:  # else it is a signal that asks
            self._channel.send({**self._status(question), "id": question["id"]})

    def _serve(self, question: Message) -> Message:
        if not self._server.accepting:
            self._server.start()
        return {}

    def _pause(self, question: Message) -> Message:
        self._server.pause()
        return {}

    def _status(self, question: Message) -> Message:
        """Say how it is and what it has counted."""
        self._server.wait(0)  # raises if it has ended by itself
        health, reason = self._server.health
        values = self._server.service.metrics.values()
        counted = [
            [series.name, series.metric.name, series.labels, value] for series, value in values.items()
        ]
        return {"health": health, "reason": reason, "counted": counted}

    def _predict(self, question: Message) -> None:
        """Answer for a video as a request would be; the answer goes out when it is done.

        In a thread: the file may lie on a disk that hangs, or be a pipe, and whoever asks for the status meanwhile must
        not take this worker for a dead one.
        """
        threading.Thread(target=self._look_at, args=(question,), name="shadow", daemon=True).start()

    def _look_at(self, question: Message) -> None:
        service = self._server.service
        try:
            with Path(question["path"]).open("rb") as file:
                video = file.read(
                    service.settings.limits.max_bytes + 1
                )  # as much as shows that it is too large
            response = service.submit({"video": video, "options": {"timings": True}}).result()
            answer = {"status": response.status, "body": response.body}
        except OSError as error:
            answer = error_message(VideoOpenError(f"{question['path']} cannot be read ({error.strerror})"))
        with suppress(OSError):  # the supervisor is gone, and so is this process soon
            self._channel.send({**answer, "id": question["id"]})


def main(control: int, listening: int, notes: int, table: int) -> int:
    """Serve until the supervisor asks for the end, or a signal does; return the exit code."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    access = logging.getLogger("ivdr_deploy.access")
    access.addHandler(logging.StreamHandler())
    access.setLevel(logging.INFO)
    access.propagate = False
    let_threads_sleep()
    keep_memory_of_requests()
    _end_with_starter()
    channel = Channel(socket.socket(fileno=control))
    inherited = SharedSocket(fileno=listening)
    first = channel.receive()
    if first is None:
        return 1
    questions: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, questions), name="control", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Handlers, and not SIG_IGN, which the decode workers would inherit.
        signal.signal(number, lambda *_: questions.put({"do": "end"}))
    launch = from_dict(Launch, first, where="the control socket")
    server = HttpServer(
        Path(launch.bundle),
        launch.settings,
        host=launch.host,
        grpc_port=launch.grpc_port,
        token=launch.token,
        inherited=inherited,
        handover=Handover(socket.socket(fileno=notes), table),
    )
    with ExitStack() as opened:
        try:
            opened.enter_context(server)
        except Exception as error:
            channel.send(error_message(error))
            if isinstance(error, IvdrError):
                return 1
            raise  # a defect: its traceback belongs into the log
        channel.send({"facts": server.service.describe()})
        Worker(server, channel).run(questions)
    return 0


def _end_with_starter() -> None:
    """Have the system end this process with the thread that started it, where it can: also if it hangs or is stopped.

    ``_receive`` does the same everywhere, for a process that still runs.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _receive(channel: Channel, questions: queue.SimpleQueue[Message]) -> None:
    """Take questions; end the whole process group, decoders too, when the supervisor is gone."""
    while (question := channel.receive()) is not None:
        questions.put(question)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
