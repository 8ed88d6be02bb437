from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "bundle").symlink_to(tiny_bundle)
    return folder


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


def test_torchserve_is_given_what_was_counted_since_the_last_batch(
    handler: IvdrHandler, model_dir: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"body": bytearray(b"hello")},
        {"body": bytearray(video.read_bytes())},
        {"body": bytearray(video.read_bytes())},
    ]
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
            handler.handle(rows, make_context(model_dir, rows))
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
    with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
        handler.handle(rows, make_context(model_dir, rows))
    busy = [
        (labels["worker"], value) for name, labels, value in passed_on(caplog.messages) if name == "ivdr_busy"
    ]
    assert busy == [(str(os.getpid()), 1.0), (str(os.getpid()), 0.0)]


def test_question_of_torchserve_in_a_batch_of_videos_is_answered_beside_them(
    handler: IvdrHandler, model_dir: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{}, {"body": bytearray(video.read_bytes())}]
    context = make_context(model_dir, rows, describe=0)
    with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
        facts, answer = (json.loads(text) for text in handler.handle(rows, context))
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
