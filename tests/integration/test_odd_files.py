"""Awkward real files get the same treatment from prediction, scoring and the endpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivdr_deploy.cli import main
from ivdr_deploy.scoring import read_scores
from ivdr_deploy.serving.core.service import InferenceService
from ivdr_deploy.serving.core.settings import ServiceSettings

REFUSED = {
    "audio_only.m4a": "no_video_stream",
    "audio_only.mp3": "no_video_stream",
    "audio_only.swf": "no_video_stream",
    "audio_only.wav": "no_video_stream",
    "corrupted_tail.mp4": "decode_failed",
    "empty.mp4": "unreadable",
    "text_named.mp4": "unreadable",
    "truncated_60percent.mp4": "decode_failed",
}
"""Every other file gives a label; a 4x4 GIF with a frame larger than its screen may do either."""

EITHER = {"gif_frame_exceeds_screen_4x4.gif"}


@pytest.mark.slow
def test_predict_score_and_the_endpoint_agree_on_every_odd_file(
    tiny_bundle: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(path for path in (shared_data / "odd").iterdir() if path.suffix != ".md")
    listed = tmp_path / "odd.csv"
    listed.write_text("path\n" + "".join(f"{path}\n" for path in files))

    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tiny_bundle), *map(str, files), "--json"])
    assert ended.value.code == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predicted = {Path(line["uri"]).name: line for line in lines}
    codes = {name: line["error"] and line["error"]["code"] for name, line in predicted.items()}
    assert len(codes) == len(files)
    expected = {path.name: REFUSED.get(path.name) for path in files}
    assert {k: v for k, v in codes.items() if k not in EITHER} == {
        k: v for k, v in expected.items() if k not in EITHER
    }
    for line in lines:
        assert bool(line["predictions"]) != bool(line["error"])
        assert not line["error"] or (line["error"]["message"] and line["error"]["hint"])

    with pytest.raises(SystemExit) as ended:
        main(["score", str(tiny_bundle), str(listed), "-o", str(tmp_path / "scores")])
    assert ended.value.code == 1
    rows = read_scores(tmp_path / "scores").to_pylist()
    assert {Path(row["uri"]).name: row["error_code"] for row in rows} == codes

    statuses = {None: 200, "unreadable": 400, "no_video_stream": 415, "decode_failed": 422}
    with InferenceService.open(tiny_bundle, ServiceSettings()) as service:
        answers = [service.submit({"body": path.read_bytes()}).result() for path in files]
    for path, answer in zip(files, answers, strict=True):
        assert answer.status == statuses[codes[path.name]], path.name
        if answer.status == 200:
            first = answer.body["predictions"][0]
            assert first["label"] == predicted[path.name]["predictions"][0]["label"]
        else:
            # A request without bytes never was a video; a file without bytes is an unreadable one.
            assert answer.body["code"] == ("bad_request" if path.name == "empty.mp4" else codes[path.name])
