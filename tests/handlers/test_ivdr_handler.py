from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from contexts import make_context
from ivdr_handler import IvdrHandler
from videos import numbered_video

from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.torchserve import adapter
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.settings import DRAIN_VARIABLE, EndpointSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as TorchServe unpacks it."""
    store = tmp_path_factory.mktemp("store")
    packed = build_archive(tiny_bundle, model_store=store, settings=EndpointSettings()).path
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(store / "model")
    return store / "model"


@pytest.fixture(scope="module")
def handler(model_dir: Path) -> Iterator[IvdrHandler]:
    loaded = IvdrHandler()
    loaded.initialize(make_context(model_dir, []))
    yield loaded
    loaded._adapter.close()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=20, size=(64, 48))


def passed_on(messages: Sequence[str]) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of everything that TorchServe was given, in order."""
    assert not [line for line in messages if "Failed" in line]
    found = []
    for line in messages:
        if match := re.match(r"\[METRICS\](ivdr_\w+)\.(Count|Seconds):([^|]+)\|#([^|]*)\|", line):
            labels = dict(pair.split(":") for pair in match[4].split(","))
            found.append((match[1], labels, float(match[3])))
    return found


def test_each_request_gets_its_own_status_and_answer(
    handler: IvdrHandler, model_dir: Path, tiny_bundle: Path, video: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"body": bytearray(b"hello")},
        {"body": bytearray(video.read_bytes())},
        {"video": bytearray(video.read_bytes()), "options": bytearray(b'{"top_k": 99, "x": 1}')},
    ]
    context = make_context(model_dir, rows)
    answers = [json.loads(answer) for answer in handler.handle(rows, context)]
    assert [context.get_response_status(i)[0] for i in range(3)] == [400, 200, 422]
    assert {context.get_response_content_type(i) for i in range(3)} == {"application/json"}
    with VideoPredictor(open_model(tiny_bundle)) as predictor:
        top = predictor.predict(video).top(2)
        predictor.model.runtime.close()
    assert [item["label"] for item in answers[1]["predictions"]] == [label for label, _ in top]
    assert set(answers[0]) == set(answers[2]) == {"code", "message", "hint"}


def wait_until_told(handler: IvdrHandler) -> None:
    """Counts go out after the answer: wait until all of them have."""
    adapter = handler._adapter

    def told() -> bool:
        with adapter._passing:
            counted = adapter._service.metrics.values().items()
            return not adapter._observed and all(
                adapter._passed.get(series, 0.0) == value
                for series, value in counted
                if series.metric.unit != "seconds"
            )

    deadline = time.monotonic() + 30
    while not told():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_torchserve_is_given_what_was_counted_since_the_last_batch(
    handler: IvdrHandler, model_dir: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"body": bytearray(b"hello")},
        {"body": bytearray(video.read_bytes())},
        {"body": bytearray(video.read_bytes())},
    ]
    wait_until_told(handler)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
            handler.handle(rows, make_context(model_dir, rows))
            wait_until_told(handler)
        found = passed_on(caplog.messages)
        totals: dict[tuple[str, str], list[float]] = {}
        for name, labels, value in found:
            key = (name, labels.get("outcome", labels.get("le", "")))
            totals.setdefault(key, []).append(value)
        assert sum(totals["ivdr_requests_total", "unreadable"]) == 1
        assert sum(totals["ivdr_requests_total", "ok"]) == 2
        assert sum(totals["ivdr_clips_total", ""]) == sum(totals["ivdr_batch_clips_sum", ""]) == 4
        calls = sum(totals["ivdr_batch_clips_count", ""])
        assert sum(totals["ivdr_batch_clips_bucket", "+Inf"]) == calls > 0
        for stage in ("decode", "preprocess", "infer"):
            times = totals[f"ivdr_{stage}_seconds", ""]
            assert len(times) == 2
            assert all(0 < seconds < 30 for seconds in times)


def test_worker_is_busy_while_it_answers_and_free_again_after(
    handler: IvdrHandler, model_dir: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"video": bytearray(video.read_bytes()), "options": {"num_clips": 64}}]
    wait_until_told(handler)
    with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
        handler.handle(rows, make_context(model_dir, rows))
        wait_until_told(handler)
    busy = [
        (labels["worker"], value) for name, labels, value in passed_on(caplog.messages) if name == "ivdr_busy"
    ]
    assert busy == [(str(os.getpid()), 1.0), (str(os.getpid()), 0.0)]


def test_question_of_torchserve_in_a_batch_of_videos_is_answered_beside_them(
    handler: IvdrHandler, model_dir: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{}, {"body": bytearray(video.read_bytes())}]
    context = make_context(model_dir, rows, describe=0)
    wait_until_told(handler)
    with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
        facts, answer = (json.loads(text) for text in handler.handle(rows, context))
        wait_until_told(handler)
    assert facts["golden_max_abs_diff"]
    assert len(facts["contract_hash"]) == 64
    assert len(answer["predictions"]) == 2
    requests = [value for name, _, value in passed_on(caplog.messages) if name == "ivdr_requests_total"]
    assert sum(requests) == 1, "a question is no request"


def test_archive_of_the_former_format_says_that_it_must_be_packed_again(model_dir: Path) -> None:
    context = make_context(model_dir, [])
    context.model_yaml_config = {"minWorkers": 1, "handler": {"runtime": "onnxruntime"}}
    with pytest.raises(ArtifactError, match="the archive has format 1") as caught:
        IvdrHandler().initialize(context)
    assert "pack again" in caught.value.hint


def test_file_holds_one_class_and_imports_the_standard_library_alone() -> None:
    code = (
        "import sys, inspect; sys.path.insert(0, sys.argv[1]); import ivdr_handler as h\n"
        "own = [c for _, c in inspect.getmembers(h, inspect.isclass) if c.__module__ == h.__name__]\n"
        "assert [c.__name__ for c in own] == ['IvdrHandler'], own\n"
        "loaded = {'ivdr_deploy', 'numpy', 'torch', 'ts'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "handlers")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_changed_file_of_the_archive_is_refused_by_the_worker(model_dir: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(model_dir, tmp_path / "model"))
    with (changed / "model-config.yaml").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ArtifactError, match=r"model-config\.yaml' was changed"):
        IvdrHandler().initialize(make_context(changed, []))


def ask(handler: IvdrHandler, model_dir: Path, parts: dict[str, Any], **headers: str) -> tuple[int, Any, Any]:
    """Send one request with headers; returns status, body and the headers of the answer."""
    context = make_context(
        model_dir, [parts], headers={name.replace("_", "-"): v for name, v in headers.items()}
    )
    (answer,) = handler.handle([parts], context)
    return context.get_response_status(0)[0], json.loads(answer), context.get_response_headers(0)


def test_query_and_headers_reach_the_service(handler: IvdrHandler, model_dir: Path, video: Path) -> None:
    body = bytearray(video.read_bytes())
    status, answer, _ = ask(handler, model_dir, {"top_k": bytearray(b"1"), "body": body}, Content_Length="9")
    assert (status, len(answer["predictions"])) == (200, 1)
    for name in ("Content_Encoding", "content_encoding"):
        status, answer, _ = ask(handler, model_dir, {"body": body}, **{name: "gzip"})
        assert (status, answer["code"]) == (415, "bad_encoding")
    # As Netty completes what declares no body, and as clients declare an empty one.
    status, answer, headers = ask(handler, model_dir, {"body": bytearray()}, content_length="0")
    assert (status, answer["code"], headers["Allow"]) == (405, "bad_method", "POST, PUT")
    status, answer, _ = ask(handler, model_dir, {"body": bytearray()}, Content_Length="0")
    assert (status, answer["code"]) == (400, "bad_request")


def test_drain_file_closes_admission(
    model_dir: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = tmp_path / "drain"
    monkeypatch.setenv(DRAIN_VARIABLE, str(drain))
    loaded = IvdrHandler()
    loaded.initialize(make_context(model_dir, []))
    parts = {"body": bytearray(video.read_bytes())}
    assert ask(loaded, model_dir, parts)[0] == 200
    drain.touch()
    status, answer, headers = ask(loaded, model_dir, parts)
    assert (status, answer["code"]) == (503, "draining")
    assert headers["Retry-After"]
    loaded._adapter.close()


@pytest.mark.parametrize(
    ("visible", "gpu_id", "expected"),
    [
        (None, 0, "0"),
        (None, 3, "3"),
        ("", 1, ""),
        ("4,5", 1, "5"),
        ("4,5", 2, "4"),
        ("GPU-aa,GPU-bb", 1, "GPU-bb"),
        ("4,5", None, "4,5"),
        ("4,5", -1, "4,5"),
        (None, None, None),
    ],
)
def test_worker_uses_the_gpu_that_torchserve_gave_it(
    visible: str | None,
    gpu_id: int | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "to be restored")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES") if visible is None else monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", visible
    )
    context = make_context(tmp_path, [], gpu_id=gpu_id)
    with pytest.raises(ArtifactError):  # there is no model here: the GPU is chosen before anything is loaded
        IvdrHandler().initialize(context)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


def test_workers_share_the_cores_unless_the_archive_says_how_many_threads_each_has(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(adapter, "engine_threads", lambda workers: 8 // workers)
    monkeypatch.setattr(
        adapter.InferenceService, "open", lambda folder, settings, metrics: opened.append(settings.threads)
    )
    adapter.TorchServeAdapter(make_context(model_dir, [], workers=4))
    adapter.TorchServeAdapter(make_context(model_dir, [], workers=4, settings=ServiceSettings(threads=5)))
    assert opened == [2, 5]
