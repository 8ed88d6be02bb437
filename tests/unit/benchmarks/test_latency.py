from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import make_tiny_checkpoint, reseal
from videos import numbered_video

from ivdr_deploy.benchmarks import latency
from ivdr_deploy.benchmarks.latency import measure
from ivdr_deploy.cli import main
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import ConfigError, DataError, ParityError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.runtimes.loading import open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos and, between them, one file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "c.mp4"):
        numbered_video(folder / name, num_frames=12, size=(64, 48))
    (folder / "b.mp4").write_bytes(b"not a video at all")
    return folder


@pytest.fixture
def videos(folder: Path) -> VideoList:
    return read_video_list(folder)


@pytest.fixture
def engine(tiny_bundle: Path) -> Iterator[LoadedModel]:
    model = open_model(tiny_bundle, threads=1)
    with model.runtime:
        yield model


@pytest.fixture
def predictor(engine: LoadedModel) -> Iterator[VideoPredictor]:
    with VideoPredictor(engine) as predictor:
        yield predictor


@pytest.fixture
def torch(tiny_bundle: Path) -> Iterator[LoadedModel]:
    model = open_model(tiny_bundle, variant="torch-fp32")
    with model.runtime:
        yield model


def test_every_usable_video_is_timed_once_a_round(engine, predictor, torch, videos):
    samples = measure(predictor, torch, videos, rounds=3)

    assert samples.videos == 2
    assert samples.failed == {"b.mp4": "unreadable"}
    assert samples.rounds == 3
    assert samples.clips == 2 * engine.view_plan.num_clips
    for stage in (samples.decode_ms, samples.preprocess_ms, samples.infer_ms, samples.reference_ms):
        assert len(stage) == 6
        assert min(stage) > 0
    assert samples.pipeline_seconds > 0
    assert set(samples.max_abs_diff) == set(engine.output_names)
    assert max(samples.max_abs_diff.values()) <= 1e-4


def test_engine_and_torch_take_turns_and_swap_places(engine, torch, videos):
    order = []
    for model, name in ((engine, "engine"), (torch, "torch")):
        _record_calls(model, name, order)

    with VideoPredictor(engine) as predictor:
        measure(predictor, torch, videos, rounds=2)

    warm_up, timed, pipeline = order[:4], order[4:12], order[12:]
    assert sorted(warm_up) == ["engine"] * 2 + ["torch"] * 2
    assert timed == ["engine", "torch", "torch", "engine"] * 2
    assert pipeline in (["engine"], ["engine"] * 2)  # two videos, together in one call or not


def test_without_a_reference_nothing_is_compared(predictor, videos):
    samples = measure(predictor, None, videos, rounds=1)

    assert len(samples.infer_ms) == 2
    assert samples.reference_ms == []
    assert samples.max_abs_diff == {}


def test_times_come_from_the_clock(predictor, torch, videos):
    now = iter(range(1000))

    samples = measure(predictor, torch, videos, rounds=2, clock=lambda: float(next(now)))

    assert samples.infer_ms == [1000.0] * 4
    assert samples.reference_ms == [1000.0] * 4
    assert samples.pipeline_seconds == 1.0


def test_different_answers_are_not_timed(engine, videos, tmp_path):
    other = open_model(make_tiny_checkpoint(tmp_path / "other.safetensors", seed=1))
    order: list[str] = []
    _record_calls(engine, "engine", order)

    with (
        other.runtime,
        VideoPredictor(engine) as predictor,
        pytest.raises(ParityError, match=r"a.mp4: onnxruntime .* does not compute what torch"),
    ):
        measure(predictor, other, videos)
    assert order == ["engine"]


def test_the_coarser_of_two_variants_says_how_far_they_may_be_apart(
    engine, torch, predictor, videos, monkeypatch
):
    """An fp32 variant differs from an int8 one by what 8 bits cost, whichever of the two is timed against the other."""
    exact = torch.runtime.infer
    monkeypatch.setattr(
        torch.runtime, "infer", lambda video: {name: value * 1.05 for name, value in exact(video).items()}
    )
    monkeypatch.setattr(torch.runtime, "precision", "int8")
    assert measure(predictor, torch, videos, rounds=1).videos == 2
    monkeypatch.setattr(torch.runtime, "precision", "fp32")
    with pytest.raises(ParityError):
        measure(predictor, torch, videos, rounds=1)


def test_the_difference_from_the_reference_is_that_of_the_video_where_it_is_largest(
    torch, predictor, videos, monkeypatch
):
    exact, shift = torch.runtime.infer, iter([4e-5, 1e-5, 0.0, 0.0])  # the first run of each is compared

    def shifted(video):
        by = next(shift)
        return {name: value + by for name, value in exact(video).items()}

    monkeypatch.setattr(torch.runtime, "infer", shifted)
    samples = measure(predictor, torch, videos, rounds=1)
    assert samples.max_abs_diff["inter"] == pytest.approx(4e-5, abs=5e-6)


def test_a_list_without_a_usable_video_is_refused(predictor, torch, tmp_path):
    (tmp_path / "b.mp4").write_bytes(b"not a video at all")

    with pytest.raises(DataError, match=r"none of 1 videos can be used \(unreadable\)"):
        measure(predictor, torch, read_video_list(tmp_path))


def test_at_least_one_round_is_needed(predictor, torch, videos):
    with pytest.raises(ConfigError, match="rounds must be at least 1, found 0"):
        measure(predictor, torch, videos, rounds=0)


def test_the_command_writes_a_report_and_prints_a_table(tiny_bundle, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit) as caught:
        main(["bench", str(tiny_bundle), "--data", str(folder), "--rounds", "1", "--threads", "1"])

    report = json.loads((tmp_path / "build" / "bench" / "tiny-onnx-fp32.json").read_text())
    shown = capsys.readouterr().err
    assert caught.value.code == 1  # b.mp4 could not be used
    assert "not timed: b.mp4 (unreadable)" in shown
    assert "speed-up over the reference" in shown
    assert (report["videos"], report["videos_failed"], report["threads"]) == (2, 1, 1)


def test_a_variant_is_not_compared_with_itself_and_a_bundle_does_not_say_where_to_write(
    tiny_bundle_copy, folder, tmp_path, monkeypatch, capsys
):
    reseal(tiny_bundle_copy, name="../../../elsewhere")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    words = [
        "bench",
        str(tiny_bundle_copy),
        "--data",
        str(folder),
        "--rounds",
        "1",
        "--variant",
        "torch-fp32",
    ]

    with pytest.raises(SystemExit) as caught:
        main([*words, "--against", "torch-fp32"])
    assert caught.value.code == 2
    assert "'torch-fp32' would be compared with itself" in capsys.readouterr().err

    with pytest.raises(SystemExit):
        main(words)
    assert "not compared: torch-fp32 is the reference" in capsys.readouterr().err
    assert [path.name for path in Path("build/bench").iterdir()] == ["_.._.._elsewhere-torch-fp32.json"]


def test_the_command_can_write_elsewhere_and_speak_json(tiny_bundle, folder, tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["bench", str(tiny_bundle), "--data", str(folder), "--rounds", "1", "-o", str(path), "--json"]

    with pytest.raises(SystemExit):
        main(arguments)

    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(path.read_text())
    assert report["failed"] == [{"uri": "b.mp4", "code": "unreadable"}], "exit code 1 has its reason"
    assert (report["reference"] is None, report["not_compared"]) == (False, None)


def test_the_report_says_why_nothing_was_compared(tiny_bundle, folder, tmp_path, capsys):
    words = ["--variant", "torch-fp32", "--rounds", "1", "-o", str(tmp_path / "r.json"), "--json"]

    with pytest.raises(SystemExit):
        main(["bench", str(tiny_bundle), "--data", str(folder), *words])

    report = json.loads(capsys.readouterr().out)
    assert (report["reference"], report["not_compared"]) == (None, "torch-fp32 is the reference")


def test_a_report_that_cannot_be_written_is_noticed_before_the_timing_and_loses_no_figure_after_it(
    tiny_bundle, folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    words = ["bench", str(tiny_bundle), "--data", str(folder), "--rounds", "1", "--json", "-o"]
    monkeypatch.setattr(latency, "measure", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(SystemExit) as caught:
        main([*words, str(tmp_path / "file" / "r.json")])
    assert caught.value.code == 9

    def measure_meanwhile(*given, **options):
        (tmp_path / "r.json").mkdir()
        return measure(*given, **options)

    monkeypatch.setattr(latency, "measure", measure_meanwhile)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*words, str(tmp_path / "r.json")])
    assert caught.value.code == 9
    assert json.loads(capsys.readouterr().out)["videos"] == 2


def _record_calls(model: LoadedModel, name: str, order: list[str]) -> None:
    """Let the real runtime note every call."""
    infer = model.runtime.infer

    def noted(video):
        order.append(name)
        return infer(video)

    model.runtime.infer = noted
