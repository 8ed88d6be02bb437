import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP, reseal

from ivdr_deploy.artifacts.bundle import file_entry, open_bundle, write_manifest
from ivdr_deploy.artifacts.sidecar import EngineInfo, read_sidecar, write_sidecar
from ivdr_deploy.errors import ArtifactError, ConfigError, EngineIncompatibleError, MissingDependencyError
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.trt_runtime import TrtRuntime

pytestmark = pytest.mark.trt

ENGINE = "model.fp32.engine"


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a real plan."""
    from ivdr_deploy.export.to_tensorrt import build_engine
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("trt") / "bundle"))
    build_engine(folder / "model.onnx", folder / ENGINE, metadata=OrtRuntime(folder / "model.onnx").metadata)
    return with_engine(folder)


def with_engine(folder: Path) -> Path:
    """List the plan and its sidecar, as they are now, in the manifest."""
    manifest = open_bundle(folder).manifest
    others = tuple(entry for entry in manifest.files if not entry.path.startswith(ENGINE))
    model = file_entry(folder, ENGINE, kind="model", runtime="tensorrt", precision="fp32")
    write_manifest(
        folder,
        replace(manifest, files=(*others, model, file_entry(folder, f"{ENGINE}.json", kind="sidecar"))),
    )
    return folder


def change_sidecar(built: Path, tmp_path: Path, **changes: object) -> tuple[Path, EngineInfo]:
    engine = tmp_path / ENGINE
    shutil.copyfile(built / ENGINE, engine)
    info = replace(read_sidecar(built / ENGINE), **changes)
    write_sidecar(engine, info)
    return engine, info


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_driver_the_plan_says_so(built: Path) -> None:
    with pytest.raises(EngineIncompatibleError, match="no NVIDIA driver was found") as caught:
        open_model(built, runtime="tensorrt", device="cuda")
    assert "onnxruntime" in caught.value.hint


def test_a_plan_never_runs_on_the_cpu(built: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run on device 'cpu'"):
        open_model(built, runtime="tensorrt")


def test_a_plan_of_another_onnx_file_is_refused(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    write_sidecar(folder / ENGINE, replace(read_sidecar(folder / ENGINE), onnx_sha256="f" * 64))
    with pytest.raises(ArtifactError, match="SHA-256 ffffffffffff, the bundle's is"):
        open_model(reseal(folder), runtime="tensorrt", device="cuda")


def test_a_plan_of_another_contract_is_refused(built: Path) -> None:
    with pytest.raises(ArtifactError, match="was built under the contract"):
        TrtRuntime(built / ENGINE, clip=replace(TINY_CLIP, frame_stride=7))


def test_a_plan_of_another_version_says_which_one_to_install(built: Path, tmp_path: Path) -> None:
    engine, info = change_sidecar(built, tmp_path, provider_version="0.0.1")
    with pytest.raises(EngineIncompatibleError, match=rf"{info.provider} 0\.0\.1, installed is") as caught:
        TrtRuntime(engine, clip=TINY_CLIP)
    assert "==0.0.1" in caught.value.hint


def test_a_plan_of_a_library_that_is_not_installed_names_the_extra(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    engine, info = change_sidecar(built, tmp_path)
    monkeypatch.setitem(sys.modules, info.provider, None)
    extra = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}[info.provider]
    with pytest.raises(MissingDependencyError) as caught:
        TrtRuntime(engine, clip=TINY_CLIP)
    assert f"ivdr-deploy[{extra}]" in caught.value.hint


def test_a_plan_without_its_sidecar_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copyfile(built / ENGINE, tmp_path / ENGINE)
    with pytest.raises(ArtifactError, match=r"engine\.json is missing"):
        TrtRuntime(tmp_path / ENGINE, clip=TINY_CLIP)


def test_serving_files_of_a_plan_are_the_plan_and_its_sidecar(built: Path, tmp_path: Path) -> None:
    open_bundle(built).copy_serving_files(tmp_path, runtime="tensorrt")
    models = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("model"))
    assert models == [ENGINE, f"{ENGINE}.json"]


@pytest.mark.gpu
def test_a_plan_of_another_gpu_is_refused(built: Path, tmp_path: Path) -> None:
    engine, _ = change_sidecar(built, tmp_path, compute_capabilities=("1.0",))
    with pytest.raises(EngineIncompatibleError, match=r"compute capability 1\.0, this GPU has"):
        TrtRuntime(engine, clip=TINY_CLIP)


@pytest.mark.gpu
def test_the_plan_gives_what_torch_gives_at_every_batch(built: Path) -> None:
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    if here not in read_sidecar(built / ENGINE).compute_capabilities:
        pytest.skip(f"the plan was not built for compute capability {here}")
    plan = open_model(built, runtime="tensorrt", device="cuda").runtime
    reference = open_model(built, runtime="torch").runtime
    for number in (1, 2, 7, 64):
        video = np.random.default_rng(number).integers(
            0, 256, (number, *TINY_CLIP.clip_shape), dtype=np.uint8
        )
        expected, found = reference.infer(video), plan.infer(video)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4)
    with pytest.raises(ConfigError, match="at most 64"):
        plan.infer(np.zeros((65, *TINY_CLIP.clip_shape), np.uint8))
