"""Engines in processes of their own: they take turns, none outlives its use, and one that dies is named."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import Target
from ivdr_deploy.benchmarks import engine_process, engines
from ivdr_deploy.benchmarks.engine_process import Task, rest
from ivdr_deploy.benchmarks.engines import EngineProcess, time_variants, timed_variants
from ivdr_deploy.benchmarks.speeds import found_speeds, keep_speeds
from ivdr_deploy.benchmarks.timing import LEAST_TURNS
from ivdr_deploy.errors import (
    ArtifactError,
    ConfigError,
    EngineIncompatibleError,
    FolderError,
    InferenceError,
    ResourceError,
)
from ivdr_deploy.runtimes.loading import open_model

IDS = ("torch-fp32", "onnx-fp32")


@pytest.fixture(scope="module")
def timed(tiny_bundle: Path):
    """Two variants, timed for as short a time as there are figures for."""
    bundle = open_bundle(tiny_bundle)
    chosen, _ = timed_variants(bundle, device="cpu")
    return bundle, time_variants(bundle, chosen, device="cpu", threads=1, turns=6, turn_seconds=0.01)


@pytest.fixture
def task(tiny_bundle: Path, tmp_path: Path) -> Task:
    bundle = open_bundle(tiny_bundle)
    np.save(tmp_path / "clips.npy", bundle.golden().video)
    return Task(
        bundle=str(tiny_bundle),
        variant="onnx-fp32",
        device="cpu",
        threads=1,
        clips=str(tmp_path / "clips.npy"),
        batch=1,
    )


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if any("engine_process" in word for word in child.cmdline())]


def test_engines_take_turns_and_each_round_gives_a_ratio(timed) -> None:
    _, timing = timed
    assert timing.order == IDS * 6
    assert {name: len(values) for name, values in timing.ms.items()} == dict.fromkeys(IDS, 6)
    assert timing.runtimes["torch-fp32"].startswith("torch ")
    assert timing.runtimes["onnx-fp32"].startswith("onnxruntime ")
    ratio = timing.over_reference("onnx-fp32")
    ratios = [a / b for a, b in zip(timing.ms["torch-fp32"], timing.ms["onnx-fp32"], strict=True)]
    assert (ratio.low, ratio.high) == (min(ratios), max(ratios))
    assert ratio.median in ratios
    own = timing.over_reference("torch-fp32")
    assert (own.median, own.low, own.high) == (1.0, 1.0, 1.0)
    assert children() == []


def test_what_is_kept_of_a_turn_is_its_median_and_of_all_turns_the_time_of_a_clip(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(EngineProcess):
        """Without a process."""

        def __init__(self, task: Task, *, scratch: Path) -> None:
            self.variant = task.variant

        def ready(self) -> str:
            return "an engine"

        def turn(self, seconds: float) -> list[float]:
            return [9.0, 1.0, 4.0]

        def close(self) -> None:
            pass

    monkeypatch.setattr(engines, "EngineProcess", Told)
    bundle = open_bundle(tiny_bundle)
    timing = time_variants(bundle, [], device="cpu", threads=1, batch=2, turns=6)
    assert timing.ms == {"torch-fp32": (4.0,) * 6}
    uneven = replace(timing, ms={"torch-fp32": (1.0, 2.0, 3.0, 4.0, 50.0, 60.0)})
    assert uneven.ms_per_clip("torch-fp32") == 1.5


def test_the_first_calls_of_a_turn_are_not_timed() -> None:
    """They bring back caches and threads that slept while others had their turns."""

    class Cold:
        calls = 0

        def infer(self, video: np.ndarray) -> dict[str, np.ndarray]:
            self.calls += 1
            time.sleep(0.2 if self.calls <= 2 else 0.0)
            return {}

    cold = Cold()
    found = engine_process._turn(cold, np.zeros((1, 1, 1, 1, 3), np.uint8), 1, seconds=0.0)  # type: ignore[arg-type]
    assert (cold.calls, len(found)) == (5, 3)
    assert max(found) < 200


def test_what_was_measured_is_kept_in_the_bundle_with_the_files_it_belongs_to(
    timed, tiny_bundle_copy: Path
) -> None:
    _, timing = timed
    bundle = open_bundle(tiny_bundle_copy)
    speeds = found_speeds(bundle, timing, load_average=0.5)
    keep_speeds(bundle, speeds)
    changed = open_bundle(tiny_bundle_copy)
    speed = changed.variant("onnx-fp32").speed
    assert speed is not None
    assert speed.variant_sha256 == changed.manifest.variant_sha256(changed.variant("onnx-fp32"))
    assert (speed.turns, speed.batch, speed.machine.threads, speed.load_average) == (6, 1, 1, 0.5)
    assert f"`onnx-fp32`: {speed}" in (tiny_bundle_copy / "MODEL_CARD.md").read_text()
    with pytest.raises(FolderError, match="changed by another process"):
        keep_speeds(bundle, speeds)
    foreign = replace(changed.variant("onnx-fp32"), speed=replace(speed, variant_sha256="0" * 64))
    with pytest.raises(ConfigError, match="the speed of 'onnx-fp32' belongs to other files"):
        replace(changed.manifest, variants=(changed.variant("torch-fp32"), foreign))


def test_a_process_that_dies_is_named_with_its_last_lines(task: Task, tmp_path: Path) -> None:
    with EngineProcess(task, scratch=tmp_path) as engine:
        assert engine.ready().startswith("onnxruntime")
        assert len(engine.turn(0.0)) == 3
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(InferenceError, match="timed onnx-fp32 was ended by signal 9"):
            engine.turn(0.0)
    absent = replace(task, clips="absent.npy")
    with EngineProcess(absent, scratch=tmp_path) as engine, pytest.raises(InferenceError) as caught:
        engine.ready()
    assert "timed onnx-fp32 ended with exit code 1" in caught.value.message
    assert "FileNotFoundError" in caught.value.message
    assert "absent.npy" in caught.value.message


def test_what_a_variant_meets_when_it_is_opened_stays_the_error_that_it_is(
    task: Task, tmp_path: Path
) -> None:
    unknown = replace(task, variant="onnx-fp64")
    with EngineProcess(unknown, scratch=tmp_path) as engine, pytest.raises(ArtifactError) as caught:
        engine.ready()
    assert caught.value.message.startswith("onnx-fp64: ")
    assert "has no variant 'onnx-fp64'" in caught.value.message


def test_ctrl_c_leaves_no_process(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(engine: EngineProcess, seconds: float) -> list[float]:
        assert len(children()) == 2
        signal.raise_signal(signal.SIGINT)
        return [1.0]

    monkeypatch.setattr(EngineProcess, "turn", interrupted)
    bundle = open_bundle(tiny_bundle)
    chosen, _ = timed_variants(bundle, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        time_variants(bundle, chosen, device="cpu", threads=1, turns=6)
    assert children() == []


def test_a_turn_ends_when_the_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    busy.start()
    monkeypatch.setattr(engine_process, "_REST_SECONDS", 0.2)
    try:
        with pytest.raises(ResourceError, match=r"still run 0\.2 s after the call"):
            rest()
    finally:
        stop.set()
        busy.join()
    rest()


def test_machine_code_and_what_is_unverified_are_timed_only_where_they_are_named(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    reference, exported = bundle.manifest.variants
    here = Target(device="cpu", instruction_set="avx2")
    compiled = replace(
        exported, id="aoti-fp32", runtime="aoti", build={"torch": torch.__version__}, target=here
    )
    unproved = replace(exported, id="onnx-new", parity=())
    changed = replace(
        bundle, manifest=replace(bundle.manifest, variants=(reference, exported, compiled, unproved))
    )
    chosen, reasons = timed_variants(changed, device="cpu")
    assert [variant.id for variant in chosen] == ["onnx-fp32"]
    assert "machine code" in reasons["aoti-fp32"]
    assert "not verified" in reasons["onnx-new"]
    chosen, reasons = timed_variants(changed, ["aoti-fp32", "onnx-new"], device="cpu")
    assert [variant.id for variant in chosen] == ["aoti-fp32", "onnx-new"]
    assert not reasons
    chosen, _ = timed_variants(changed, ["onnx-new", "aoti-fp32", "onnx-new", "torch-fp32"], device="cpu")
    assert [variant.id for variant in chosen] == ["onnx-new", "aoti-fp32"]  # each has its turns once
    alone = replace(bundle, manifest=replace(bundle.manifest, variants=(reference,)))
    with pytest.raises(EngineIncompatibleError, match="there is only the reference"):
        timed_variants(alone, device="cpu")
    served = replace(bundle, manifest=replace(bundle.manifest, variants=(exported,)))
    with pytest.raises(ArtifactError, match="no reference to time"):
        timed_variants(served, device="cpu")


def test_too_few_turns_or_clips_are_refused_before_anything_runs(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(ConfigError, match="at least 6"):
        time_variants(bundle, [], device="cpu", threads=1, turns=5)
    with pytest.raises(ConfigError, match="batch must be between 1 and"):
        time_variants(bundle, [], device="cpu", threads=1, batch=100)


def test_the_command_keeps_the_speeds_and_the_next_one_runs_by_them(
    tiny_bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ivdr
) -> None:
    monkeypatch.setattr(engines, "TURN_SECONDS", 0.01)
    report = tmp_path / "speeds.json"
    words = ("bench", tiny_bundle_copy, "--speeds", "--rounds", 6, "--threads", 1, "-o", report)
    code, _, err = ivdr(*words)
    assert code == 0, err
    assert "times as fast as" in err
    assert '"order"' in report.read_text()
    model = open_model(tiny_bundle_copy, threads=1)
    assert model.reason.startswith(
        ("the fastest verified variant that fits: ", "the first verified variant that fits, and")
    )
    assert "times as fast as torch-fp32" in model.reason or "ms a clip" in model.reason
    assert open_model(tiny_bundle_copy, threads=2).reason == "the first verified variant that fits"
    assert "speed onnx-fp32" in ivdr("show", tiny_bundle_copy)[1]
    assert ivdr("bench", tiny_bundle_copy)[0] == 2
    assert ivdr(*words, "--against", "torch-fp32")[0] == 2


def test_the_command_names_its_option_where_the_turns_are_too_few(ivdr, tiny_bundle: Path) -> None:
    code, _, err = ivdr("bench", tiny_bundle, "--speeds", "--rounds", LEAST_TURNS - 1)
    assert (code, f"--rounds must be at least {LEAST_TURNS} with --speeds, found 5" in err) == (2, True)
    assert f"turns of each variant, {LEAST_TURNS} at least" in " ".join(ivdr("bench", "--help")[1].split())


@pytest.mark.parametrize("refusing", ["bundle", "report"])
def test_a_place_that_takes_no_result_is_refused_before_the_minutes_of_timing(
    ivdr, tiny_bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    monkeypatch.setattr(engines, "time_variants", lambda *_, **__: pytest.fail("it was timed"))
    bundle, report = tiny_bundle_copy, tmp_path / "speeds.json"
    if refusing == "bundle":  # beside it nothing can be made whose name is longer
        bundle = bundle.rename(bundle.with_name("b" * 250))
    else:
        report = tmp_path / "file" / "speeds.json"
        report.parent.touch()
    code, _, err = ivdr("bench", bundle, "--speeds", "-o", report)
    assert (code, err.count("\n")) == (9, 1), err


def test_speeds_are_printed_and_written_where_the_bundle_does_not_take_them_any_more(
    timed, ivdr, tiny_bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed_meanwhile(*_: object, **__: object) -> engines.Timing:
        (tiny_bundle_copy / "mine.txt").touch()
        return timed[1]

    monkeypatch.setattr(engines, "time_variants", timed_meanwhile)
    report = tmp_path / "speeds.json"
    code, out, err = ivdr("bench", tiny_bundle_copy, "--speeds", "-o", report, "--json")
    assert (code, "holds files that are not the bundle's" in err) == (10, True), err
    assert json.loads(out) == json.loads(report.read_text())
    assert set(json.loads(out)["speeds"]) == set(IDS)
