"""What the endpoint answers over HTTP: one real TorchServe for all tests here."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from served import SETTINGS, ask, wait_for

from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.serving.remote.client import Client
from ivdr_deploy.serving.torchserve.process import TorchServeProcess

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.torchserve, pytest.mark.slow]


def test_batch_with_bad_items_answers_each_by_itself(server: TorchServeProcess, videos: list[Path]) -> None:
    expected = [server.client.predict(path)[1]["predictions"][0]["label"] for path in videos]
    sent = [videos[0].read_bytes(), b"hello", videos[1].read_bytes(), videos[2].read_bytes()]

    def value(name: str) -> float:
        return sum(value for key, value in server.client.metrics().items() if key.startswith(name))

    def most_in_a_batch() -> float:
        found = re.findall(r"ivdr_busy\.Count:([\d.]+)", (server.config.logs / "ts_log.log").read_text())
        return max(map(float, found))

    for _ in range(10):  # until they share a batch: a client that was late is in the next one
        wait_for(lambda: value("ivdr_busy") == 0)
        before = value("ivdr_clips_total"), value('ivdr_requests_total{outcome="unreadable"')
        with ThreadPoolExecutor(len(sent)) as pool:
            answers = list(pool.map(server.client.predict, sent))
        assert [status for status, _ in answers] == [200, 400, 200, 200]
        assert [answers[i][1]["predictions"][0]["label"] for i in (0, 2, 3)] == expected
        assert answers[1][1]["code"] == "unreadable"
        clips = 3 * answers[0][1]["view_plan"]["num_clips"]
        wait_for(lambda: value("ivdr_clips_total") == before[0] + clips)  # noqa: B023  # called here
        wait_for(lambda: value('ivdr_requests_total{outcome="unreadable"') == before[1] + 1)  # noqa: B023
        if most_in_a_batch() > 1:
            break
    assert most_in_a_batch() > 1, "the requests never shared a batch"


def test_query_is_honoured_or_refused_where_torchserve_passes_it_on(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    video, path = videos[0].read_bytes(), "/models/tiny/invoke"
    status, answer, _ = ask(server.client, "POST", "?top_k=1&timings=true", video, path=path)
    assert (status, len(answer["predictions"])) == (200, 1)
    assert answer["timings"]
    body = json.dumps({"video": base64.encodebytes(video).decode()}).encode()
    json_type = {"Content_Type": "application/json"}
    status, answer, _ = ask(server.client, "PUT", "?outputs=inter,intra", body, path=path, **json_type)
    assert (status, set(answer) & {"predictions", "inter", "intra"}) == (200, {"inter", "intra"})
    for query in ("?topk=1", "?top_k=x", "?top_k=", "?x=1"):
        status, answer, _ = ask(server.client, "POST", query, video, path=path)
        assert (status, answer["code"]) == (422, "bad_option"), query


def test_query_of_the_predictions_address_is_dropped_by_torchserve(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    # docs/serving.md says so. When this fails, TorchServe passes it on and the sentence there can go.
    status, answer, _ = ask(server.client, "POST", "?top_k=1", videos[0].read_bytes())
    assert (status, len(answer["predictions"])) == (200, 5)


def test_options_is_answered_by_torchserve_itself(server: TorchServeProcess) -> None:
    status, answer, _ = ask(server.client, "OPTIONS")
    assert (status, "openapi" in answer) == (200, True)


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


def has_another_worker(server: TorchServeProcess, pid: str) -> bool:
    """Whether TorchServe has noticed that a worker is dead, and another one is ready."""
    (described,) = server.client.describe()["workers"]
    return described["pid"] != pid and server.client.ready()


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
    wait_for(lambda: has_another_worker(server, described["pid"]))
    assert server.client.predict(videos[0])[0] == 200
    assert not set(before) & set(workers())


def test_the_images_own_check_knows_a_worker_that_is_ready_from_none(server: TorchServeProcess) -> None:
    text = (ROOT / "deploy" / "torchserve" / "Dockerfile").read_text()
    command = json.loads(text.partition("HEALTHCHECK")[2].partition("CMD ")[2].splitlines()[0])
    assert command[:2] == ["python", "-c"]
    for port, code in ((server.config.ports.management, 0), (server.config.ports.inference, 1)):
        asked = command[2].replace(":8081", f":{port}")
        done = subprocess.run(
            [sys.executable, "-P", "-c", asked], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr


def test_a_worker_that_is_killed_costs_the_typed_client_time_and_no_video(
    server: TorchServeProcess, videos: list[Path]
) -> None:
    log = server.config.logs / "access_log.log"
    before = len(log.read_text().splitlines())
    stopping = threading.Event()
    answered: list[str] = []

    def send(number: int) -> None:
        while not stopping.is_set():
            answered.append(client.predict(videos[number % 3], top_k=1, num_clips=40).model.name)

    def failed() -> list[str]:
        logged = log.read_text().splitlines()[before:]
        return [
            line for line in logged if re.search(r'"POST /predictions/tiny HTTP/1.1" (500|503|507) ', line)
        ]

    def wait_for_more(count: int) -> None:
        have = len(answered)
        wait_for(lambda: len(answered) >= have + count or any(future.done() for future in sending))

    with Client(server.client.inference_url, "tiny") as client, ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send, number) for number in range(4)]
        try:
            for _ in range(3):  # until it dies with a request, and not between two
                wait_for_more(4)
                (described,) = server.client.describe()["workers"]
                os.kill(int(described["pid"]), signal.SIGKILL)
                wait_for(lambda: has_another_worker(server, described["pid"]))  # noqa: B023  # called here
                wait_for_more(4)
                if failed():
                    break
        finally:
            stopping.set()
    for future in sending:
        future.result()  # raises what a client could not get over
    assert failed(), "the worker died between two requests each time: nothing was proved"
