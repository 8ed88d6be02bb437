from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from contexts import make_context
from ivdr_handler import IvdrHandler
from videos import numbered_video

from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.loading import open_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "bundle").symlink_to(tiny_bundle)
    return folder


@pytest.fixture(scope="module")
def handler(model_dir: Path) -> IvdrHandler:
    loaded = IvdrHandler()
    loaded.initialize(make_context(model_dir, []))
    return loaded


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=20, size=(64, 48))


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
    predictor = VideoPredictor(open_model(tiny_bundle))
    top = predictor.predict(video).top(predictor.model.labels, 2)
    assert [item["label"] for item in answers[1]["predictions"]] == [label for label, _ in top]
    assert set(answers[0]) == set(answers[2]) == {"code", "message", "hint"}


def test_metrics_count_outcomes_stages_and_that_the_worker_is_free_again(
    handler: IvdrHandler, model_dir: Path, video: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"body": bytearray(b"hello")}, {"body": bytearray(video.read_bytes())}]
    with caplog.at_level("INFO", logger="ts.metrics.caching_metric"):
        handler.handle(rows, make_context(model_dir, rows))
    lines = [line for line in caplog.messages if line.startswith("[METRICS]ivdr")]
    assert not [line for line in caplog.messages if "Failed" in line]
    values = [re.match(r"\[METRICS\](\w+)\.(\w+):([^|]+)\|#([^|]*)", line) for line in lines]
    found = [(m[1], m[2], m[4].split(",")[0]) for m in values if m]
    assert ("ivdr_requests", "Count", "Outcome:unreadable") in found
    assert ("ivdr_requests", "Count", "Outcome:ok") in found
    names = [name for name, _, _ in found]
    assert {"ivdr_clips", "ivdr_batch_size", "ivdr_decode_seconds", "ivdr_infer_seconds"} <= set(names)
    assert [m[3] for m in values if m and m[1] == "ivdr_busy"] == ["1", "0"]
    units = {unit for _, unit, _ in found}
    assert units <= {"Count", "Seconds"}


def test_worker_is_free_again_after_a_defect(
    handler: IvdrHandler,
    model_dir: Path,
    video: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handler._service.predictor, "infer", None)
    rows = [{"body": bytearray(video.read_bytes())}]
    with caplog.at_level("INFO", logger="ts.metrics.caching_metric"), pytest.raises(TypeError):
        handler.handle(rows, make_context(model_dir, rows))
    assert ["ivdr_busy.Count:1" in line for line in caplog.messages] == [True, False]
    assert "ivdr_busy.Count:0" in caplog.messages[1]


def test_question_of_torchserve_in_a_batch_of_videos_is_answered_beside_them(
    handler: IvdrHandler, model_dir: Path, video: Path
) -> None:
    rows: list[dict[str, Any]] = [{}, {"body": bytearray(video.read_bytes())}]
    context = make_context(model_dir, rows, describe=0)
    facts, answer = (json.loads(text) for text in handler.handle(rows, context))
    assert facts["golden_max_abs_diff"]
    assert len(facts["contract_hash"]) == 64
    assert len(answer["predictions"]) == 2


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
