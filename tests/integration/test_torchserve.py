"""The endpoint over HTTP, with the real TorchServe: one server for most tests, a few with their own."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from videos import numbered_video

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.errors import FolderError, ServerError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.serving.torchserve.archive import build_archive, open_archive
from ivdr_deploy.serving.torchserve.config import Ports, ServerConfig
from ivdr_deploy.serving.torchserve.process import TorchServeProcess, serve
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

pytestmark = [pytest.mark.torchserve, pytest.mark.slow]

SETTINGS = EndpointSettings(
    batch_size=4,
    max_batch_delay_ms=150,
    queue_size=8,
    service=ServiceSettings(
        threads=1, device="cpu", limits=replace(ENDPOINT_LIMITS, max_bytes=2_000_000, max_frames=100)
    ),
)


@pytest.fixture(scope="module")
def archive(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(tiny_bundle, model_store=tmp_path_factory.mktemp("store"), settings=SETTINGS).path


@pytest.fixture(scope="module")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeProcess]:
    with serve(archive, run_dir=tmp_path_factory.mktemp("ts")) as running:
        yield running


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[VideoPredictor]:
    model = open_model(tiny_bundle, threads=1)
    with model.runtime, VideoPredictor(model) as opened:
        yield opened


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [numbered_video(folder / f"{n}.mp4", num_frames=n, size=(64, 48)) for n in (12, 25, 40)]


def wait_for(condition: Callable[[], Any], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def processes_using(run_dir: Path) -> list[psutil.Process]:
    """The processes that were started for this run folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TMPDIR", "").startswith(
                str(run_dir)
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_each_form_of_request_gets_the_answer_of_the_predictor(
    server: TorchServeProcess, predictor: VideoPredictor, videos: list[Path]
) -> None:
    model = predictor.model
    for path in videos:
        result = predictor.predict(path)
        body = {
            "video": base64.b64encode(path.read_bytes()).decode(),
            "options": {"outputs": ["labels", "inter"]},
        }
        answers = [
            server.client.predict(path),
            server.client.post(json.dumps(body).encode(), content_type="application/json"),
            server.client.predict(path, options={"outputs": ["labels", "inter"], "timings": True}),
        ]
        for status, answer in answers:
            assert status == 200
            assert answer["predictions"] == [
                {"label": n, "score": pytest.approx(s, abs=1e-6)} for n, s in result.top(5)
            ]
            assert answer["model"]["variant"] == "onnx-fp32"
            assert answer["model"]["contract_hash"] == model.contract_hash
            assert answer["view_plan"] == to_dict(model.view_plan)
            assert answer["video"]["num_frames"] == result.info.num_frames
        assert result.inter is not None
        assert (
            answers[1][1]["inter"] == answers[2][1]["inter"] == pytest.approx(result.inter.tolist(), abs=1e-6)
        )
        assert set(answers[2][1]["timings"]) == {"decode_ms", "preprocess_ms", "infer_ms"}


def test_batch_with_bad_items_answers_each_by_itself(server: TorchServeProcess, videos: list[Path]) -> None:
    expected = [server.client.predict(path)[1]["predictions"][0]["label"] for path in videos]
    sent = [videos[0].read_bytes(), b"hello", videos[1].read_bytes(), videos[2].read_bytes()]

    def value(name: str) -> float:
        return sum(value for key, value in server.client.metrics().items() if key.startswith(name))

    before = value("ivdr_clips_total"), value('ivdr_requests_total{outcome="unreadable"')
    with ThreadPoolExecutor(len(sent)) as pool:
        answers = list(pool.map(server.client.predict, sent))
    assert [status for status, _ in answers] == [200, 400, 200, 200]
    assert [answers[i][1]["predictions"][0]["label"] for i in (0, 2, 3)] == expected
    assert answers[1][1]["code"] == "unreadable"
    wait_for(lambda: value("ivdr_clips_total") == before[0] + 3 * answers[0][1]["view_plan"]["num_clips"])
    assert value('ivdr_requests_total{outcome="unreadable"') == before[1] + 1
    busy = re.findall(r"ivdr_busy\.Count:([\d.]+)", (server.config.logs / "ts_log.log").read_text())
    assert max(map(float, busy)) > 1, "the requests did not share a batch"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "application/octet-stream", 400, "bad_request"),
        (b"hello", "text/plain", 400, "bad_request"),
        (b'{"video": "x', "application/json", 400, "bad_request"),
        (b'{"video": "", "options": {"topk": 1}}', "application/json", 422, "bad_option"),
        (b"\0" * 2_100_000, "video/mp4", 413, "too_large"),
        (b"\0" * 5_000_000, "video/mp4", 413, "server"),
    ],
    ids=["empty", "text", "broken-json", "option", "over-our-limit", "over-the-servers-limit"],
)
def test_error_statuses_reach_the_client(
    server: TorchServeProcess, body: bytes, content_type: str, status: int, code: str
) -> None:
    got, answer = server.client.post(body, content_type=content_type)
    assert (got, answer["code"]) == (status, code)
    assert answer["message"]


def test_large_wrong_requests_cost_their_own_answer_alone(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    (worker,) = server.client.describe()["workers"]
    long = "A" * 3_000_000
    wrong = [[{"video": long}], {"video": "AAAA", "options": long}, {"video": "AAAA", long: 1}]
    bodies = [json.dumps(value).encode() for value in wrong] + [b'{"video": ' + b"[" * 100_000]
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(server.client.post, body, content_type="application/json") for body in bodies]
        good = [pool.submit(server.client.predict, videos[i % 3]) for i in range(4)]
    assert [(status, answer["code"]) for status, answer in (future.result() for future in bad)] == [
        (400, "bad_request"),
        (400, "bad_request"),
        (400, "bad_request"),
        (400, "bad_request"),
    ]
    assert all(len(json.dumps(future.result()[1])) < 1000 for future in bad)
    assert [future.result()[0] for future in good] == [200] * 4
    assert server.client.describe()["workers"][0]["pid"] == worker["pid"], "the worker was killed"


def ask(
    server: TorchServeProcess,
    method: str,
    query: str = "",
    body: bytes | None = None,
    *,
    path: str = "/predictions/tiny",
    **headers: str,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send any HTTP request; returns status, body and headers."""
    ports = server.config.ports
    with closing(HTTPConnection("127.0.0.1", ports.inference, timeout=60)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"{path}{query}", body=body, headers=named)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else {}, dict(answer.getheaders())


def test_query_is_honoured_or_refused_where_torchserve_passes_it_on(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    video, path = videos[0].read_bytes(), "/models/tiny/invoke"
    status, answer, _ = ask(server, "POST", "?top_k=1&timings=true", video, path=path)
    assert (status, len(answer["predictions"])) == (200, 1)
    assert answer["timings"]
    body = json.dumps({"video": base64.encodebytes(video).decode()}).encode()
    json_type = {"Content_Type": "application/json"}
    status, answer, _ = ask(server, "PUT", "?outputs=inter,intra", body, path=path, **json_type)
    assert (status, set(answer) & {"predictions", "inter", "intra"}) == (200, {"inter", "intra"})
    for query in ("?topk=1", "?top_k=x", "?top_k=", "?x=1"):
        status, answer, _ = ask(server, "POST", query, video, path=path)
        assert (status, answer["code"]) == (422, "bad_option"), query


def test_query_of_the_predictions_address_is_dropped_by_torchserve(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    # docs/serving.md says so. When this fails, TorchServe passes it on and the sentence there can go.
    status, answer, _ = ask(server, "POST", "?top_k=1", videos[0].read_bytes())
    assert (status, len(answer["predictions"])) == (200, 5)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_other_methods_are_told_from_empty_requests(server: TorchServeProcess, method: str) -> None:
    status, answer, headers = ask(server, method, "?top_k=1")
    assert (status, headers["Allow"]) == (405, "POST, PUT")
    assert method == "HEAD" or answer["code"] == "bad_method"
    status, answer, _ = ask(server, "POST")
    assert (status, answer["code"]) == (400, "bad_request")


def test_options_is_answered_by_torchserve_itself(server: TorchServeProcess) -> None:
    status, answer, _ = ask(server, "OPTIONS")
    assert (status, "openapi" in answer) == (200, True)


def test_compressed_body_is_refused_by_name(server: TorchServeProcess, videos: list[Path]) -> None:
    body = gzip.compress(videos[0].read_bytes())
    status, answer, _ = ask(server, "POST", body=body, Content_Encoding="gzip")
    assert (status, answer["code"]) == (415, "bad_encoding")
    assert "gzip" in answer["message"]


def test_files_without_pictures_and_with_too_many_are_told_apart(
    server: TorchServeProcess, shared_data: Path, tmp_path: Path
) -> None:
    status, answer = server.client.predict(shared_data / "odd" / "audio_only.m4a")
    assert (status, answer["code"]) == (415, "no_video_stream")
    status, answer = server.client.predict(
        numbered_video(tmp_path / "long.mp4", num_frames=150, size=(64, 48))
    )
    assert (status, answer["code"]) == (413, "too_large")


def test_metrics_endpoint_counts_requests_and_stages(server: TorchServeProcess, videos: list[Path]) -> None:
    def value(prefix: str) -> float:
        return sum(v for name, v in server.client.metrics().items() if name.startswith(prefix))

    before = {
        name: value(name)
        for name in (
            'ivdr_requests_total{outcome="ok"',
            "ivdr_clips_total",
            "ivdr_decode_seconds_count",
            'ivdr_batch_clips_bucket{le="8"',
            'ivdr_batch_clips_bucket{le="4"',
        )
    }
    assert server.client.predict(videos[0], options={"num_clips": 5})[0] == 200
    wait_for(lambda: value("ivdr_clips_total") == before["ivdr_clips_total"] + 5)
    added = dict.fromkeys(before, 1) | {"ivdr_clips_total": 5, 'ivdr_batch_clips_bucket{le="4"': 0}
    for name, more in added.items():
        wait_for(lambda name=name, more=more: value(name) == before[name] + more)  # type: ignore[misc]
    assert value("ivdr_infer_seconds_sum") > 0
    assert value("ivdr_busy") == 0


def test_ready_worker_has_replayed_the_golden_clips(
    server: TorchServeProcess, predictor: VideoPredictor
) -> None:
    assert server.worker_facts["contract_hash"] == predictor.model.contract_hash
    assert server.worker_facts["variant"] == "onnx-fp32"
    assert max(server.worker_facts["decode_mean_diff"].values()) < 2.5
    assert 0 <= max(server.worker_facts["golden_max_abs_diff"].values()) < 1e-4
    assert server.client.ready()


def test_questions_of_the_management_port_do_not_disturb_predictions(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.client.predict, videos[0]) for _ in range(4)]
        questions = [pool.submit(server.client.describe, ask_worker=True) for _ in range(4)]
    assert [answer.result()[0] for answer in answers] == [200] * 4
    assert all(question.result()["customizedMetadata"]["name"] == "tiny" for question in questions)


def test_requests_beyond_the_queue_are_refused_and_the_others_answered(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    def send(_: int) -> int:
        return server.client.predict(videos[2], options={"num_clips": 64})[0]

    with ThreadPoolExecutor(60) as pool:
        statuses = list(pool.map(send, range(60)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= SETTINGS.queue_size
    assert server.client.predict(videos[0])[0] == 200


def test_decode_workers_are_small_and_end_with_their_worker(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    def workers() -> list[psutil.Process]:
        (described,) = server.client.describe()["workers"]
        return psutil.Process(int(described["pid"])).children(recursive=True)

    before = workers()
    assert len(before) == SETTINGS.service.decode_workers + 2
    for process in before:
        assert process.memory_info().rss < 100 << 20
        assert not any("libtorch" in mapped.path for mapped in process.memory_maps())
    (described,) = server.client.describe()["workers"]
    os.kill(int(described["pid"]), signal.SIGKILL)
    _, alive = psutil.wait_procs(before, timeout=20)
    assert not alive
    wait_for(server.client.ready)  # TorchServe starts another one
    assert server.client.predict(videos[0])[0] == 200
    assert not set(before) & set(workers())


def test_run_folder_in_use_is_refused_with_the_line_that_stops_it(
    server: TorchServeProcess, archive: Path
) -> None:
    with pytest.raises(FolderError, match="already uses the run folder") as caught:
        serve(archive, run_dir=server.config.run_dir).start()
    assert "--stop" in caught.value.hint
    assert server.client.ready()


def test_taken_port_is_named_before_anything_starts(
    server: TorchServeProcess, archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match=f"port {server.config.ports.inference} \\(inference\\)"):
        serve(archive, run_dir=tmp_path, ports=server.config.ports).start()
    assert not processes_using(tmp_path)


def test_worker_that_cannot_load_is_reported_by_its_own_error(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version="9.0.0"))
    with pytest.raises(ServerError, match=r"ArtifactError: .* exported with ivdr_deploy 9\.0\.0") as caught:
        serve(folder, run_dir=tmp_path / "run").start()
    assert "pip" not in caught.value.hint
    assert str(tmp_path / "run" / "logs") in caught.value.hint
    assert not processes_using(tmp_path)


def test_archive_that_torchserve_itself_cannot_load_is_reported_at_once(
    archive: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copy(archive, tmp_path / "tiny.mar"))
    prepared = serve(damaged, run_dir=tmp_path / "run")
    damaged.write_bytes(archive.read_bytes()[:1000])  # between the check and the start
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"TorchServe cannot load .*tiny\.mar: \w+Exception") as caught:
        prepared.start()
    assert time.monotonic() - start < 30
    assert "disk" not in caught.value.message
    assert not processes_using(tmp_path)


def test_printed_line_starts_and_stops_the_same_server(
    archive: Path, tmp_path: Path, videos: list[Path]
) -> None:
    prepared = serve(archive, run_dir=tmp_path)
    config, client = prepared.config, prepared.client
    config.write()
    with (tmp_path / "shell.log").open("wb") as log:
        shell = subprocess.Popen(
            prepared.command_line, shell=True, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
        try:
            wait_for(client.ready)
            assert client.predict(videos[0])[0] == 200
            stop = config.shell_line(config.stop_command())
            subprocess.run(stop, shell=True, check=True, stdout=log, stderr=log)
            shell.wait(timeout=30)
            wait_for(lambda: not processes_using(tmp_path))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()


def unused_ports_in_a_row() -> Ports:
    for first in range(20_000, 60_000, 5):
        ports = Ports.starting_at(first)
        with suppress(ServerError):
            ports.check()
            return ports
    pytest.fail("no five unused ports in a row")


@contextmanager
def running_command(
    archive: Path, run_dir: Path, ports: Ports
) -> Iterator[tuple[subprocess.Popen[str], TorchServeProcess]]:
    """`ivdr serve` in a process of its own, ready; killed when the block ends, if it still runs."""
    server = TorchServeProcess(ServerConfig(archive=open_archive(archive), run_dir=run_dir, ports=ports))
    code = "from ivdr_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(archive), "--json"]
    command += ["--port", str(ports.inference), "--run-dir", str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["url"] == server.url
            yield process, server
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_command_answers_what_is_in_flight_and_leaves_nothing_running(
    tiny_bundle: Path, tmp_path: Path, videos: list[Path], number: signal.Signals
) -> None:
    # A lone request waits this long for others: time enough to stop the server while it is unanswered.
    settings = replace(SETTINGS, max_batch_delay_ms=2000)
    archive = build_archive(tiny_bundle, model_store=tmp_path, settings=settings).path
    run_dir = tmp_path / "run"
    answers: list[int] = []
    with running_command(archive, run_dir, unused_ports_in_a_row()) as (process, server):
        client = server.client
        # the guard, torchserve, Java, the worker; then the decode workers, what forks them and what cleans up
        commands = [" ".join(process.cmdline()) for process in processes_using(run_dir)]
        decoding = [command for command in commands if "multiprocessing" in command]
        assert (len(commands) - len(decoding), len(decoding)) == (4, settings.service.decode_workers + 2)
        request = threading.Thread(target=lambda: answers.append(client.predict(videos[0])[0]))
        request.start()
        wait_for(lambda: "ts_inference_requests_total" in " ".join(client.metrics()))
        assert not answers, "the request was answered before the server was stopped"
        process.send_signal(number)
        request.join()
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert "nothing of tiny is left running" in process.stderr.read()
    assert answers == [200]
    assert not processes_using(run_dir)
    assert not list((run_dir / "tmp").iterdir())  # there, and empty: the printed line needs it


def test_command_that_is_killed_leaves_nothing_on_the_ports(archive: Path, tmp_path: Path) -> None:
    ports = unused_ports_in_a_row()
    with running_command(archive, tmp_path / "run", ports) as (process, _):
        assert processes_using(tmp_path / "run")
        process.kill()
        wait_for(lambda: not processes_using(tmp_path / "run"))
    ports.check()


def test_steady_traffic_keeps_the_server_neither_running_nor_from_finishing(
    archive: Path, tmp_path: Path, videos: list[Path]
) -> None:
    server = serve(archive, run_dir=tmp_path / "run")
    answers: list[tuple[float, int]] = []
    stopped = threading.Event()

    def send() -> None:
        while not stopped.is_set():
            begun, status = time.monotonic(), 0
            with suppress(ServerError):  # nobody listens any more, or it was cut off
                status = server.client.predict(videos[2], options={"num_clips": 32})[0]
            answers.append((begun, status))

    server.start()
    senders = [threading.Thread(target=send) for _ in range(6)]
    try:
        for sender in senders:
            sender.start()
        wait_for(lambda: len(answers) > 12)
        stopping = time.monotonic()
        server.stop()
    finally:
        stopped.set()
        for sender in senders:
            sender.join()
        server.stop()
    took = max(begun for begun, _ in answers) - stopping
    assert took < 30, "the traffic kept it from stopping"
    early = [status for begun, status in answers if begun < stopping]
    assert set(early) == {200}, "what was accepted before must be finished"
    late = [status for begun, status in answers if begun >= stopping]
    assert 503 in late, "admission was not closed"
    assert set(late) <= {200, 503, 0}
