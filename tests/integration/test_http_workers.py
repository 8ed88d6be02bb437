"""`ivdr serve --server http` when its processes are killed, and when it changes from one version to another."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import psutil
import pytest
from bundles import reseal
from served import DEAD, Senders, ServingCommand, serving_command, wait_for
from videos import numbered_video

from ivdr_deploy.artifacts.golden import GOLDEN_FILE
from ivdr_deploy.errors import ArtifactError, FolderError, GoldenMismatchError, ServerError
from ivdr_deploy.serving.http.run_folder import RunFolder, ask_server
from ivdr_deploy.serving.remote.client import Client
from ivdr_deploy.serving.remote.retrying import Retry

pytestmark = pytest.mark.slow

DIED = 'ivdr_requests_total{outcome="worker_died"}'

CONFIG = """
max_requests = 16
workers = 2
[service]
threads = 1
device = "cpu"
decode_workers = 2
"""


@pytest.fixture(scope="module")
def serving(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingCommand]:
    folder = tmp_path_factory.mktemp("serving")
    (folder / "serve.toml").write_text(CONFIG)
    with serving_command(tiny_bundle, folder / "run", "--config", str(folder / "serve.toml")) as running:
        yield running


@pytest.fixture(scope="module")
def slow_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that takes a while to decode."""
    return numbered_video(tmp_path_factory.mktemp("slow") / "slow.mp4", num_frames=150, size=(640, 480))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video through which it takes seconds to look with a hop of one frame."""
    return numbered_video(tmp_path_factory.mktemp("long") / "long.mp4", num_frames=3000, size=(64, 48))


@pytest.fixture(scope="module")
def second(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as another version."""
    return reseal(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("second") / "b"), version="2.0")


def restarts(serving: ServingCommand) -> float:
    return serving.client.metrics()["ivdr_worker_restarts_total"]


def wait_until_whole(serving: ServingCommand) -> None:
    wait_for(lambda: serving.client.metrics()["ivdr_workers"] == 2 and serving.client.ready())


@contextmanager
def begun(serving: ServingCommand, video: Path) -> Iterator[HTTPConnection]:
    """A request of which the last bytes have not been sent: a worker has taken it and cannot answer yet."""
    body = video.read_bytes()
    with closing(HTTPConnection(urlsplit(serving.client.inference_url).netloc, timeout=60)) as connection:
        connection.putrequest("POST", "/predictions/tiny")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:-10])
        yield connection


def finished(connection: HTTPConnection, video: Path) -> tuple[int, str | None]:
    """Status and Retry-After of a begun request whose last bytes are sent now."""
    connection.send(video.read_bytes()[-10:])
    answer = connection.getresponse()
    assert answer.headers["X-Model-Version"] == "1.0"
    assert answer.status == 200 or b'"worker_died"' in answer.read()
    return answer.status, answer.headers["Retry-After"]


def held_by(worker: psutil.Process) -> int:
    """How many requests a worker has taken."""
    return sum(each.status == psutil.CONN_ESTABLISHED for each in worker.net_connections("tcp"))


@contextmanager
def suspended(worker: psutil.Process) -> Iterator[None]:
    """Let a worker stand still meanwhile: the signal is sent at once, and each thread heeds it when it gets to it."""
    worker.suspend()
    try:
        threads = Path(f"/proc/{worker.pid}/task")
        wait_for(lambda: all(" T " in each.read_text() for each in threads.glob("*/stat")))
        yield
    finally:
        worker.resume()


def update(serving: ServingCommand, bundle: Path, videos: list[Path]) -> dict[str, Any]:
    """Give the order that `ivdr serve --update` gives; return the answer."""
    order = {"do": "update", "bundle": str(bundle), "videos": list(map(str, videos)), "min_agreement": 0.9}
    *_, answer = ask_server(serving.run_dir, order)
    return answer


def let_second_serve(serving: ServingCommand, second: Path, videos: list[Path]) -> None:
    """Change over to the other version, which another test may have left loaded."""
    if serving.client.describe()["previousVersion"] == "2.0":
        *_, answer = ask_server(serving.run_dir, {"do": "rollback"})
    else:
        answer = update(serving, second, videos)
    assert answer["switched"]
    assert serving.version == "2.0"


def test_a_worker_that_is_killed_sends_away_what_it_was_answering_and_is_replaced(
    serving: ServingCommand, videos: list[Path]
) -> None:
    wait_until_whole(serving)
    assert serving.client.predict(videos[0])[0] == 200
    before, counted = restarts(serving), serving.client.metrics()["ivdr_clips_total"]
    died = serving.client.metrics().get(DIED, 0.0)
    victim, other = serving.workers
    with ExitStack() as held:
        connections = []
        for idle in (victim, other):
            with suspended(idle):  # on a busy machine one of the two may take all
                for _ in range(2):
                    connections.append(held.enter_context(begun(serving, videos[0])))
                    wait_for(lambda: held_by(victim) + held_by(other) == len(connections))
        assert held_by(victim) == held_by(other) == 2
        in_flight = held_by(victim)
        with Senders(serving.client, videos[0], threads=2) as quiet:
            quiet.wait_for_more(20)
        with Senders(serving.client, videos[0], threads=2) as quick:
            quick.wait_for_more(5)
            victim.kill()
            killed = time.monotonic()
            wait_for(lambda: restarts(serving) == before + 1)
            wait_until_whole(serving)
            replaced = time.monotonic()
            quick.wait_for_more(5)
        statuses = [finished(connection, videos[0]) for connection in connections]
    assert victim.pid not in [worker.pid for worker in serving.workers]
    assert statuses.count((503, "1")) == in_flight, "what the other had taken must be answered"
    assert set(statuses) == {(200, None), (503, "1")}
    assert not quick.lost
    assert {each.status for each in quick.answers} <= {200, 503}
    told = serving.client.metrics()[DIED] - died
    assert in_flight <= told <= in_flight + 2  # and what quick was waiting for
    # The other one goes on: nobody waits for the one that follows, which takes seconds wherever that may be.
    assert [
        each for each in quick.answers if killed < each.begun < each.ended < replaced and each.status == 200
    ]
    assert quick.longest_gap() < max(quiet.longest_gap() + 1.0, (replaced - killed) / 2)
    assert serving.client.metrics()["ivdr_clips_total"] > counted, "counters must not fall"


def test_a_client_that_sends_again_loses_nothing_when_a_worker_is_killed(
    serving: ServingCommand, slow_video: Path
) -> None:
    """Requests that are whole, and wait for their decoder or the network."""
    wait_until_whole(serving)
    before = serving.client.metrics().get(DIED, 0.0)
    stopping, done = threading.Event(), list[str]()

    def send() -> None:
        with Client(serving.client.inference_url, "tiny", retry=Retry(first_seconds=0.1)) as client:
            while not stopping.is_set():
                done.append(client.predict(slow_video, num_clips=2).request_id)

    with ThreadPoolExecutor(8) as pool:
        sending = [pool.submit(send) for _ in range(8)]
        try:
            wait_for(lambda: len(done) >= 16)
            for _ in range(5):  # while looking for it, this process may keep its clients from asking anything
                count = restarts(serving)
                max(
                    serving.workers, key=held_by
                ).kill()  # clients keep their connections: they may be all at one
                wait_for(lambda: restarts(serving) > count)  # noqa: B023  # it is waited for here
                wait_until_whole(serving)
                if serving.client.metrics().get(DIED, 0.0) > before:
                    break
            assert serving.client.metrics().get(DIED, 0.0) > before, "no request was lost"
            count = len(done)
            wait_for(lambda: len(done) >= count + 8)
        finally:
            stopping.set()
    for each in sending:
        each.result()  # raises what a client could not get over


def test_what_had_begun_is_cut_off_and_who_asks_again_on_the_same_connection_is_told(
    serving: ServingCommand, videos: list[Path], long_video: Path
) -> None:
    wait_until_whole(serving)
    before = restarts(serving)
    address = urlsplit(serving.client.inference_url)
    with (
        socket.create_connection((address.hostname, address.port or 0), timeout=60) as stream,
        closing(HTTPConnection(address.netloc, timeout=60)) as kept,
    ):
        kept.request("POST", "/predictions/tiny", body=videos[0].read_bytes())
        assert kept.getresponse().read()
        body = long_video.read_bytes()
        stream.sendall(
            b"POST /predictions/tiny?timeline=%7B%22hop%22:1%7D HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        begun = stream.recv(1 << 16)
        for worker in serving.workers:
            worker.kill()
        kept.request("GET", "/ping")
        answer = kept.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        while piece := stream.recv(1 << 16):
            begun += piece
    assert begun.startswith(b"HTTP/1.1 200")
    assert begun.count(b"HTTP/1.1") == 1, "nothing may be written into an answer"
    assert b"event: summary" not in begun
    wait_for(lambda: restarts(serving) >= before + 2)
    wait_until_whole(serving)


def test_a_decoder_that_is_killed_costs_its_request_alone(
    serving: ServingCommand, videos: list[Path], slow_video: Path
) -> None:
    wait_until_whole(serving)
    pids = {worker.pid for worker in serving.workers}
    before = restarts(serving)
    with Senders(serving.client, videos[0], threads=1) as quick:
        quick.wait_for_more(3)
        with Senders(serving.client, slow_video, threads=2, options={"num_clips": 64}) as held:
            wait_for(lambda: kill_busy_decoder(serving) and any(each.status == 422 for each in held.answers))
        quick.wait_for_more(3)
    crashed = [each.body["code"] for each in held.answers if each.status != 200]
    assert set(crashed) == {"crashed"}
    assert {each.status for each in quick.answers} <= {200, 422}  # 422: it was this one's decoder
    assert not quick.lost
    assert not held.lost
    assert {worker.pid for worker in serving.workers} == pids
    assert restarts(serving) == before


def kill_busy_decoder(serving: ServingCommand) -> bool:
    """Kill the decoder that has computed most of a slow video; False where none has."""
    decoders, shares = [], {}
    for worker in serving.workers:
        for each in worker.children(recursive=True):
            with suppress(psutil.Error):  # it may end at any moment
                if "forkserver" in " ".join(each.cmdline()) and each.ppid() != worker.pid:
                    decoders.append(each)
    for decoder in decoders:
        with suppress(psutil.Error):
            decoder.cpu_percent()
    time.sleep(0.1)  # what a share of the CPU is measured over
    for decoder in decoders:
        with suppress(psutil.Error):
            shares[decoder] = decoder.cpu_percent()
    if not shares or max(shares.values()) < 10:
        return False
    max(shares, key=lambda decoder: shares[decoder]).kill()
    return True


def test_an_update_under_load_fails_no_request_and_can_be_rolled_back(
    serving: ServingCommand, second: Path, videos: list[Path]
) -> None:
    wait_until_whole(serving)
    assert serving.client.predict(videos[0])[0] == 200
    counted = serving.client.metrics()["ivdr_clips_total"]
    with Senders(serving.client, videos[0], threads=4) as senders:
        senders.wait_for_more(5)
        updated = serving.order("--update", second, "--videos", videos[0].parent)
        assert updated.returncode == 0, updated.stderr
        assert "agreement 100.0%" in updated.stderr
        switched = time.monotonic()
        senders.wait_for_more(20)
        assert serving.version == "2.0"
        victim = serving.workers[-1]
        leaving = time.monotonic()
        rolled_back = serving.order("--rollback")
        assert rolled_back.returncode == 0, rolled_back.stderr
        back = time.monotonic()
        senders.wait_for_more(20)
    assert not senders.lost
    assert {each.status for each in senders.answers} == {200}
    told = [(each.begun, each.ended, each.body["model"]["version"]) for each in senders.answers]
    assert {version for *_, version in told} == {"1.0", "2.0"}
    assert told[0][2] == "1.0"
    # One that was begun before may have been taken by the other version, however late it is answered.
    assert {version for begun, ended, version in told if switched < begun and ended < leaving} == {"2.0"}
    assert {version for begun, _, version in told if begun > back} == {"1.0"}
    wait_for(lambda: serving.client.metrics()["ivdr_clips_total"] >= counted + 2 * len(senders.answers))
    assert victim.is_running(), "the version that was left is kept"


def test_a_worker_that_follows_one_after_an_update_is_of_the_new_version(
    serving: ServingCommand, second: Path, videos: list[Path]
) -> None:
    let_second_serve(serving, second, videos)
    wait_until_whole(serving)
    before, counted = restarts(serving), serving.client.metrics()["ivdr_clips_total"]
    for worker in serving.workers:
        worker.kill()
    wait_for(lambda: restarts(serving) >= before + 2)
    wait_until_whole(serving)
    assert serving.client.metrics()["ivdr_clips_total"] == counted, "what the dead have counted stays"
    versions = {serving.client.predict(videos[0])[1]["model"]["version"] for _ in range(8)}
    assert versions == {"2.0"}
    wait_for(lambda: rolled_back(serving))
    assert serving.version == "1.0"
    assert serving.client.predict(videos[0])[1]["model"]["version"] == "1.0"


def rolled_back(serving: ServingCommand) -> bool:
    """Roll back; False where the workers of the version that is kept are being replaced."""
    done = serving.order("--rollback")
    assert done.returncode == 0 or "no worker of tiny 1.0 is left" in done.stderr, done.stderr
    return done.returncode == 0


def test_a_bundle_that_is_no_replacement_is_refused_and_leaves_nothing(
    serving: ServingCommand, tiny_bundle: Path, second: Path, tmp_path: Path, videos: list[Path]
) -> None:
    wait_until_whole(serving)
    version = serving.version
    count = len(serving.workers)

    wrong = shutil.copytree(tiny_bundle, tmp_path / "wrong")
    change_golden(wrong, lambda logits: logits + 1)
    reseal(wrong, version="3.0")
    for bundle, error, said in (
        (tiny_bundle, ArtifactError, "both bundles say that they are version"),
        (wrong, GoldenMismatchError, "golden"),
        (tmp_path, ArtifactError, "is not a bundle"),
    ):
        with pytest.raises(error, match=said):
            update(serving, bundle, videos)
    record = serving.run_dir / "serving.json"
    kept = record.rename(serving.run_dir / "kept.json")
    record.mkdir()  # as a disk that takes no more
    with pytest.raises(ServerError, match=r"cannot be written into .* so that tiny 1\.0 goes on"):
        update(serving, second, videos)
    record.rmdir()
    kept.rename(record)
    assert serving.version == version
    order = {"do": "update", "bundle": str(second), "videos": [str(videos[0])], "min_agreement": 0.9}
    given_up = ask_server(serving.run_dir, order)
    assert "loading" in next(given_up)["say"]
    with pytest.raises(ServerError, match="another change of version is under way"):
        next(ask_server(serving.run_dir, {"do": "rollback"}))
    given_up.close()  # as Ctrl-C does
    wait_for(lambda: "was given up" in serving.log.read_text())
    wait_for(lambda: len(serving.workers) == count)
    assert serving.version == version
    assert serving.client.predict(videos[0])[0] == 200


def test_a_network_that_answers_otherwise_is_not_switched_to(
    serving: ServingCommand, tiny_bundle: Path, tmp_path: Path, videos: list[Path]
) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    model = onnx.load(other / "model.onnx")
    (weights,) = [each for each in model.graph.initializer if each.name.endswith("classifier.linear.weight")]
    weights.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights)[::-1].copy(), weights.name)
    )
    onnx.save(model, other / "model.onnx")
    change_golden(other, lambda logits: logits[:, ::-1])  # it proves itself, and is another network
    reseal(other, version="4.0")
    version = serving.version
    refused = serving.order("--update", other, "--videos", videos[0].parent, "--json")
    assert refused.returncode == 1, refused.stderr
    assert "FAIL" in refused.stderr
    assert '"switched": false' in refused.stdout
    assert "another label" in refused.stderr
    assert serving.version == version


def change_golden(bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the logits that a bundle says its golden clips give."""
    with np.load(bundle / GOLDEN_FILE) as kept:
        changed = {name: change(value) if name == "logits" else value for name, value in kept.items()}
    np.savez(bundle / GOLDEN_FILE, **changed)


def test_what_it_takes_to_give_an_order(serving: ServingCommand, tiny_bundle: Path, tmp_path: Path) -> None:
    mode = (serving.run_dir / "control.sock").stat().st_mode
    assert not mode & 0o077, "others could give orders"
    nobody = ServingCommand(serving.process, serving.client, tmp_path, tmp_path)
    refused = nobody.order("--rollback")
    assert (refused.returncode, "no server answers at" in refused.stderr) == (8, True)
    without = serving.order("--update", tiny_bundle)
    assert (without.returncode, "--videos" in without.stderr) == (2, True)


def test_a_command_that_is_killed_leaves_no_process_and_serves_the_same_when_it_is_started_again(
    serving: ServingCommand, tiny_bundle: Path, second: Path, videos: list[Path]
) -> None:
    """The last one here: it ends the server that the tests share."""
    let_second_serve(serving, second, videos)
    family = psutil.Process(serving.process.pid).children(recursive=True)
    assert len(family) >= 8  # two workers of each version, and what decodes for them
    serving.workers[0].suspend()  # it cannot even see that the command is gone
    os.kill(serving.process.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=5)
    assert not [process for process in left if process.status() not in DEAD]
    with serving_command(tiny_bundle, serving.run_dir) as again:
        assert again.version == "2.0"
        assert "an update is why" in again.log.read_text()
        assert again.order("--rollback").returncode == 0  # it is loaded for this
        assert again.client.predict(videos[0])[1]["model"]["version"] == "1.0"
        with pytest.raises(FolderError, match="another server uses the run folder"):
            RunFolder(serving.run_dir).__enter__()
