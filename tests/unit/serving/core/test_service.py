from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivdr_deploy.artifacts.bundle import open_bundle, write_manifest
from ivdr_deploy.errors import ArtifactError, ConfigError, GoldenMismatchError
from ivdr_deploy.pipeline import VideoPredictor, VideoResult
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.video.clips import Clips
from ivdr_deploy.video.reader import VideoSource


def send(service: InferenceService, video: bytes, **options: Any) -> tuple[int, dict[str, Any]]:
    (response,) = service.handle([{"video": video, "options": options}])
    return response.status, json.loads(response.to_json())


def test_answer_is_what_the_predictor_says(service: InferenceService, videos: list[bytes]) -> None:
    expected = service.predictor.predict(videos[2])
    status, body = send(service, videos[2], outputs=["labels", "feature", "inter", "intra"], top_k=3)
    assert status == 200
    assert body["predictions"] == [
        {"label": label, "score": score} for label, score in expected.top(service.predictor.model.labels, 3)
    ]
    for name in ("feature", "inter", "intra"):
        assert np.array_equal(np.float32(body[name]), getattr(expected, name))
    assert body["clip_seconds"] == expected.clip_seconds.tolist()
    assert body["video"] | {"num_frames": 40, "codec": "h264", "width": 64} == body["video"]
    model = service.predictor.model
    assert body["model"] == {
        "name": "tiny",
        "version": model.version,
        "contract_hash": model.contract_hash,
    }


def test_default_answer_is_five_labels_without_vectors_or_timings(
    service: InferenceService, videos: list[bytes]
) -> None:
    _, body = send(service, videos[0])
    assert len(body["predictions"]) == 5
    assert set(body) == {"predictions", "video", "model"}


def test_timings_and_clips_are_those_asked_for(service: InferenceService, videos: list[bytes]) -> None:
    _, body = send(service, videos[2], timings=True, num_clips=7, outputs=["intra"])
    assert set(body["timings"]) == {"decode_ms", "preprocess_ms", "infer_ms"}
    assert all(value > 0 for value in body["timings"].values())
    assert len(body["intra"]) == len(body["clip_seconds"]) == 7
    assert "predictions" not in body


def test_raw_json_and_form_get_the_same_answer(service: InferenceService, videos: list[bytes]) -> None:
    encoded = base64.b64encode(videos[0]).decode()
    requests: list[dict[str, Any]] = [{"body": videos[0]}, {"body": {"video": encoded}}, {"video": videos[0]}]
    answers = [service.handle([request])[0] for request in requests]
    assert answers[0].status == 200
    assert answers[0].body == answers[1].body == answers[2].body


def test_bad_requests_change_no_other_answer_of_their_batch(
    service: InferenceService, videos: list[bytes]
) -> None:
    alone = [send(service, video)[1] for video in videos]
    batch: list[dict[str, Any]] = [
        {"body": b"hello"},
        {"video": videos[0]},
        {"body": b""},
        {"video": videos[1], "options": b'{"top": 3}'},
        {"video": videos[1]},
        {"video": videos[2]},
    ]
    answers = service.handle(batch)
    assert [answer.status for answer in answers] == [400, 200, 400, 422, 200, 200]
    outcomes = [answer.outcome for answer in answers]
    assert outcomes == ["unreadable", "ok", "bad_request", "bad_option", "ok", "ok"]
    for answer, expected in zip((answers[1], answers[4], answers[5]), alone, strict=True):
        got = {item["label"]: item["score"] for item in answer.body["predictions"]}
        assert got == pytest.approx(
            {item["label"]: item["score"] for item in expected["predictions"]}, abs=1e-6
        )
        assert answer.body["video"] == expected["video"]


def test_batch_in_which_everything_fails_is_answered(service: InferenceService) -> None:
    assert [answer.status for answer in service.handle([{"body": b"x"}, {}])] == [400, 400]


def test_output_the_model_lacks_is_an_option_error_naming_those_it_has(
    service: InferenceService, videos: list[bytes]
) -> None:
    model = replace(service.predictor.model, output_names=("feature",))
    without = InferenceService(VideoPredictor(model), ServiceSettings())
    status, body = send(without, videos[0], outputs=["inter"])
    assert (status, body["code"]) == (422, "bad_option")
    assert "feature" in body["hint"]


def test_model_without_classifier_answers_what_it_has(service: InferenceService, videos: list[bytes]) -> None:
    model = replace(service.predictor.model, output_names=("feature", "inter", "intra"))
    status, body = send(InferenceService(VideoPredictor(model), ServiceSettings()), videos[0])
    assert status == 200
    assert {"feature", "inter", "intra"} <= set(body)
    assert "predictions" not in body


@pytest.mark.parametrize(
    ("limit", "status", "code"),
    [
        ({"max_bytes": 100}, 413, "too_large"),
        ({"max_frames": 5}, 413, "too_large"),
        ({"max_pixels": 100}, 413, "too_large"),
        ({"max_decode_seconds": 1e-9}, 504, "too_slow"),
    ],
)
def test_limits_are_kept(
    service: InferenceService, videos: list[bytes], limit: dict[str, Any], status: int, code: str
) -> None:
    settings = ServiceSettings(limits=replace(ENDPOINT_LIMITS, **limit))
    limited = InferenceService(VideoPredictor(service.predictor.model, limits=settings.limits), settings)
    got, body = send(limited, videos[0])
    assert (got, body["code"]) == (status, code)
    assert body["message"]
    assert body["hint"]


def test_every_awkward_file_gets_an_answer(service: InferenceService, shared_data: Path) -> None:
    files = sorted(path for path in (shared_data / "odd").iterdir() if path.suffix != ".md")
    answers = dict(
        zip([f.name for f in files], service.handle([{"body": f.read_bytes()} for f in files]), strict=True)
    )
    assert {answer.status for answer in answers.values()} <= {200, 400, 415, 422}
    assert sum(answer.status == 200 for answer in answers.values()) >= 40
    assert all(
        set(answer.body) == {"code", "message", "hint"} for answer in answers.values() if answer.status != 200
    )
    assert answers["empty.mp4"].status == answers["text_named.mp4"].status == 400
    assert answers["audio_only.m4a"].status == 415
    assert answers["rotated_90.mov"].status == 200


class FlawedPredictor(VideoPredictor):
    """Has a defect that one video brings to light, and another that the network does not survive."""

    def load(self, source: VideoSource, *, num_clips: int | None = None) -> Clips:
        if source == b"defect":
            raise ZeroDivisionError("a defect")
        return super().load(source, num_clips=num_clips)

    def infer(self, batch: Sequence[Clips]) -> list[VideoResult]:
        results = super().infer(batch)
        return [replace(r, feature=r.feature * np.nan) if r.info.num_frames == 25 else r for r in results]


def test_defects_stay_with_the_video_that_shows_them(
    service: InferenceService, videos: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    flawed = InferenceService(FlawedPredictor(service.predictor.model), ServiceSettings())
    answers = flawed.handle([{"body": b"defect"}, {"body": videos[0]}, {"body": videos[1]}])
    assert [(answer.status, answer.outcome) for answer in answers] == [
        (500, "internal"),
        (200, "ok"),
        (500, "server"),
    ]
    assert "ZeroDivisionError: a defect" in caplog.text
    assert "finite" in answers[2].body["message"]


def test_description_says_what_is_loaded_and_how_golden_clips_agreed(service: InferenceService) -> None:
    facts = service.describe()
    assert facts["contract_hash"] == service.predictor.model.contract_hash
    assert set(facts["golden_max_abs_diff"]) == {"logits", "feature", "inter", "intra"}
    assert max(facts["golden_max_abs_diff"].values()) < 1e-4
    assert "onnxruntime" in facts["runtime"]
    json.dumps(facts)


@pytest.mark.parametrize("version", ["0.2.0", "1.0.0"])
def test_bundle_of_another_release_line_is_refused_by_name(
    tiny_bundle: Path, tmp_path: Path, version: str
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version=version))
    with pytest.raises(ArtifactError, match=f"ivdr_deploy {version}"):
        InferenceService.open(folder, ServiceSettings())


def test_bundle_of_another_patch_release_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version="0.1.99"))
    opened = InferenceService.open(folder, ServiceSettings())
    opened.close()
    assert opened.describe()["name"] == "tiny"


def test_golden_clips_that_disagree_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle = open_bundle(folder)
    video, outputs = bundle.golden()
    from ivdr_deploy.artifacts.bundle import GOLDEN_FILE, file_entry, write_golden

    write_golden(folder, video, {**outputs, "feature": outputs["feature"] + 1})
    entries = [
        file_entry(folder, GOLDEN_FILE, kind="golden") if entry.path == GOLDEN_FILE else entry
        for entry in bundle.manifest.files
    ]
    write_manifest(folder, replace(bundle.manifest, files=tuple(entries)))
    with pytest.raises(GoldenMismatchError, match="feature"):
        InferenceService.open(folder, ServiceSettings())


def test_unknown_setting_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'top_k'"):
        InferenceService.from_config(tiny_bundle, {"topk": 1})
