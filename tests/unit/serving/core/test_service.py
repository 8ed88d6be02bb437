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
from bundles import make_tiny_checkpoint, reseal

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.golden import write_golden
from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.errors import ArtifactError, ConfigError, GoldenMismatchError, VideoOpenError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import Runtime
from ivdr_deploy.serving.core.schema import Envelope, Response
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ENDPOINT_LIMITS, ServiceSettings
from ivdr_deploy.serving.torchserve.archive import build_archive
from ivdr_deploy.serving.torchserve.settings import EndpointSettings
from ivdr_deploy.spec import ViewPlan


def ask(service: InferenceService, requests: Sequence[dict[str, Any]]) -> list[Response]:
    """Send all of them before the first is answered."""
    waiting = [service.submit(parts) for parts in requests]
    return [answer.result() for answer in waiting]


def send(service: InferenceService, video: bytes, **options: Any) -> tuple[int, dict[str, Any]]:
    (response,) = ask(service, [{"video": video, "options": options}])
    return response.status, json.loads(response.json)


def test_answer_is_what_the_predictor_says(service: InferenceService, videos: list[bytes]) -> None:
    model = service.model
    with VideoPredictor(model) as predictor:
        expected = predictor.predict(videos[2])
    status, body = send(service, videos[2], outputs=["labels", "feature", "inter", "intra"], top_k=3)
    assert status == 200
    assert body["predictions"] == [{"label": label, "score": score} for label, score in expected.top(3)]
    for name in ("feature", "inter", "intra"):
        assert np.array_equal(np.float32(body[name]), getattr(expected, name))
    assert body["clip_seconds"] == expected.clip_seconds.tolist()
    assert body["video"] | {"num_frames": 40, "codec": "h264", "width": 64} == body["video"]
    assert body["view_plan"] == {"placement": "uniform", "num_clips": 2, "hop": 0, "spatial_crops": 1}
    assert body["model"] == {
        "name": "tiny",
        "version": "1.0",
        "variant": "onnx-fp32",
        "contract_hash": model.contract_hash,
    }


def test_default_answer_is_five_labels_without_vectors_or_timings(
    service: InferenceService, videos: list[bytes]
) -> None:
    _, body = send(service, videos[0])
    assert len(body["predictions"]) == 5
    assert set(body) == {"predictions", "video", "view_plan", "model"}


def test_timings_and_clips_are_those_asked_for(service: InferenceService, videos: list[bytes]) -> None:
    _, body = send(service, videos[2], timings=True, num_clips=7, outputs=["intra"])
    assert set(body["timings"]) == {"decode_ms", "preprocess_ms", "infer_ms"}
    assert all(value > 0 for value in body["timings"].values())
    assert len(body["intra"]) == len(body["clip_seconds"]) == body["view_plan"]["num_clips"] == 7
    assert "predictions" not in body


def test_endpoint_says_how_many_clips_a_request_gets_and_may_cost(
    service: InferenceService, videos: list[bytes]
) -> None:
    settings = ServiceSettings(num_clips=3, max_clips=6, decode_workers=1)
    crops = replace(service.model, view_plan=ViewPlan(num_clips=1, spatial_crops=3))
    with pytest.raises(ConfigError, match="num_clips takes 3 clips"):
        InferenceService(crops, settings)
    other = InferenceService(crops, replace(settings, num_clips=2))
    assert send(other, videos[0])[1]["view_plan"]["num_clips"] == 2
    assert send(other, videos[0], num_clips=1)[1]["view_plan"]["num_clips"] == 1
    status, body = send(other, videos[0], num_clips=3)
    assert (status, body["code"]) == (422, "bad_option")
    assert "between 1 and 2" in body["message"]
    other._predictor.close()


class _Watched:
    """A runtime that notes how many clips each call has."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._runtime, name)

    def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append(len(video))
        return self._runtime.infer(video)


def test_no_call_of_the_network_has_more_clips_than_the_settings_say(
    service: InferenceService, videos: list[bytes]
) -> None:
    watched = _Watched(service.model.runtime)
    other = InferenceService(
        replace(service.model, runtime=watched), ServiceSettings(batch_clips=2, decode_workers=1)
    )
    status, body = send(other, videos[0], num_clips=5)
    assert (status, body["view_plan"]["num_clips"]) == (200, 5)
    assert watched.calls == [2, 2, 1]
    other._predictor.close()
    for wrong in (0, 65):
        with pytest.raises(ConfigError, match=f"batch_clips must be between 1 and 64, found {wrong}"):
            ServiceSettings(batch_clips=wrong)


def test_raw_json_and_form_get_the_same_answer(service: InferenceService, videos: list[bytes]) -> None:
    encoded = base64.b64encode(videos[0]).decode()
    answers = ask(service, [{"body": videos[0]}, {"body": {"video": encoded}}, {"video": videos[0]}])
    assert answers[0].status == 200
    labels = [[item["label"] for item in answer.body["predictions"]] for answer in answers]
    assert labels[0] == labels[1] == labels[2]


def test_bad_requests_change_no_other_answer(service: InferenceService, videos: list[bytes]) -> None:
    alone = [send(service, video)[1] for video in videos]
    answers = ask(
        service,
        [
            {"body": b"hello"},
            {"video": videos[0]},
            {"body": b""},
            {"video": videos[1], "options": b'{"top": 3}'},
            {"video": videos[1]},
            {"video": videos[2]},
        ],
    )
    assert [answer.status for answer in answers] == [400, 200, 400, 422, 200, 200]
    codes = [answers[i].body["code"] for i in (0, 2, 3)]
    assert codes == ["unreadable", "bad_request", "bad_option"]
    for answer, expected in zip((answers[1], answers[4], answers[5]), alone, strict=True):
        got = {item["label"]: item["score"] for item in answer.body["predictions"]}
        assert got == pytest.approx(
            {item["label"]: item["score"] for item in expected["predictions"]}, abs=1e-6
        )
        assert answer.body["video"] == expected["video"]


def test_output_the_model_lacks_is_an_option_error_naming_those_it_has(
    service: InferenceService, videos: list[bytes]
) -> None:
    without = InferenceService(replace(service.model, output_names=("feature",)), ServiceSettings())
    status, body = send(without, videos[0], outputs=["inter"])
    assert (status, body["code"]) == (422, "bad_option")
    assert "feature" in body["hint"]


def test_model_without_classifier_answers_what_it_has(service: InferenceService, videos: list[bytes]) -> None:
    model = replace(service.model, output_names=("feature", "inter", "intra"))
    other = InferenceService(model, ServiceSettings(decode_workers=1))
    status, body = send(other, videos[0])
    assert status == 200
    assert {"feature", "inter", "intra"} <= set(body)
    assert "predictions" not in body
    other._predictor.close()


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
    settings = ServiceSettings(limits=replace(ENDPOINT_LIMITS, **limit), decode_workers=1)
    limited = InferenceService(service.model, settings)
    got, body = send(limited, videos[0])
    assert (got, body["code"]) == (status, code)
    assert body["message"]
    assert body["hint"]
    limited._predictor.close()


def test_every_awkward_file_gets_an_answer(service: InferenceService, shared_data: Path) -> None:
    files = sorted(path for path in (shared_data / "odd").iterdir() if path.suffix != ".md")
    answers = dict(
        zip([f.name for f in files], ask(service, [{"body": f.read_bytes()} for f in files]), strict=True)
    )
    assert {answer.status for answer in answers.values()} <= {200, 400, 415, 422}
    assert sum(answer.status == 200 for answer in answers.values()) >= 40
    assert all(
        set(answer.body) == {"code", "message", "hint"} for answer in answers.values() if answer.status != 200
    )
    assert answers["empty.mp4"].status == answers["text_named.mp4"].status == 400
    assert answers["audio_only.m4a"].status == 415
    assert answers["rotated_90.mov"].status == 200


def test_description_says_what_is_loaded_and_what_agreed(service: InferenceService) -> None:
    facts = service.describe()
    assert facts["contract_hash"] == service.model.contract_hash
    assert facts["variant"] == "onnx-fp32"
    assert "verified" in facts["reason"]
    assert set(facts["golden_max_abs_diff"]) == {"logits", "feature", "inter", "intra"}
    assert max(facts["golden_max_abs_diff"].values()) < 1e-4
    assert facts["decode_mean_diff"]
    assert "onnxruntime" in facts["runtime"]
    json.dumps(facts)


def test_variant_that_was_asked_for_is_the_one_that_runs(tiny_bundle: Path, videos: list[bytes]) -> None:
    settings = ServiceSettings(variant="torch-fp32", device="cpu", threads=1, decode_workers=1)
    with InferenceService.open(tiny_bundle, settings) as opened:
        assert send(opened, videos[0])[1]["model"]["variant"] == "torch-fp32"


@pytest.mark.parametrize("version", ["0.2.0", "1.0.0"])
def test_bundle_of_another_release_line_is_refused_by_name(
    tiny_bundle: Path, tmp_path: Path, version: str
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version=version))
    with pytest.raises(ArtifactError, match=f"ivdr_deploy {version}"):
        InferenceService.open(folder, ServiceSettings())


def test_a_manifest_stands_for_its_bundle_and_hides_no_release(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version="1.0.0"))
    with pytest.raises(ArtifactError, match=r"ivdr_deploy 1\.0\.0"):
        InferenceService.open(folder / "manifest.json", ServiceSettings())


@pytest.mark.parametrize(
    "name", ["tiny.mar", "my model{x}.safetensors", "tiny.onnx", "tiny.engine", "tiny.parquet"]
)
def test_what_is_no_bundle_is_not_served(tmp_path: Path, tiny_bundle: Path, name: str) -> None:
    path = tmp_path / name
    if name == "tiny.mar":
        path = build_archive(tiny_bundle, model_store=tmp_path, settings=EndpointSettings()).path
    elif name.endswith(".safetensors"):
        make_tiny_checkpoint(path)
    elif name.endswith(".onnx"):
        shutil.copy(next(tiny_bundle.glob("**/*.onnx")), path)
    else:
        path.touch()
    with pytest.raises(ArtifactError, match="is no bundle"):
        InferenceService.open(path, ServiceSettings(decode_workers=1))


def test_bundle_of_another_patch_release_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    write_manifest(folder, replace(open_bundle(folder).manifest, ivdr_version="0.1.99"))
    with InferenceService.open(folder, ServiceSettings(decode_workers=1)) as opened:
        assert opened.describe()["name"] == "tiny"


def test_golden_clips_that_disagree_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    golden = open_bundle(folder).golden()
    expected = {**golden.expected, "feature": golden.expected["feature"] + 1}
    write_golden(folder, replace(golden, expected=expected))
    with pytest.raises(GoldenMismatchError, match="feature"):
        InferenceService.open(reseal(folder), ServiceSettings())


def test_statuses_of_the_envelope(service: InferenceService, videos: list[bytes]) -> None:
    refused = service.submit({"body": b""}, Envelope(method="GET")).result()
    assert (refused.status, refused.body["code"], refused.headers) == (
        405,
        "bad_method",
        {"Allow": "POST, PUT"},
    )
    refused = service.submit({"body": videos[0]}, Envelope(content_encoding="gzip")).result()
    assert (refused.status, refused.body["code"]) == (415, "bad_encoding")
    answered = service.submit({"body": videos[0], "top_k": b"1"}, Envelope(method="PUT")).result()
    assert len(answered.body["predictions"]) == 1


def test_draining_refuses_what_is_new_and_finishes_what_was_taken(
    service: InferenceService, videos: list[bytes]
) -> None:
    draining = InferenceService(service.model, ServiceSettings(decode_workers=1))
    taken = [draining.submit({"body": video}) for video in videos]
    draining.drain()
    refused = draining.submit({"body": videos[0]})
    assert refused.done(), "a refusal waits for nothing"
    assert (refused.result().status, refused.result().body["code"]) == (503, "draining")
    assert int(refused.result().headers["Retry-After"]) > 0
    assert [answer.result(60).status for answer in taken] == [200] * len(videos)
    draining._predictor.close()


def test_answer_has_a_bound_of_its_own(
    service: InferenceService, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ivdr_deploy.serving.core.answers.MAX_ANSWER_BYTES", 3000)
    assert send(service, videos[2], outputs=["intra"], num_clips=2)[0] == 200
    status, body = send(service, videos[2], outputs=["intra"], num_clips=40)
    assert (status, body["code"]) == (422, "bad_option")
    assert "more than the limit of 3000" in body["message"]


def test_message_of_an_error_is_cut_whatever_raised_it(
    service: InferenceService, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: bytes, **_: object) -> object:
        raise VideoOpenError("x" * 1_000_000, hint="y" * 1_000_000)

    monkeypatch.setattr(service._predictor, "submit", broken)
    (answer,) = ask(service, [{"body": videos[0]}])
    assert answer.status == 400
    assert len(answer.json) < 3000
