import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP, keep_variants, reseal
from requirements import missing
from videos import numbered_video

from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.manifest import Variant, labels_sha256
from ivdr_deploy.artifacts.sidecar import BatchProfile, EngineInfo, read_sidecar, write_sidecar
from ivdr_deploy.errors import (
    ArtifactError,
    ConfigError,
    DeviceError,
    EngineIncompatibleError,
    MissingDependencyError,
)
from ivdr_deploy.export.draft_files import TRT_FILE_IDS
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.trt_runtime import TrtRuntime
from ivdr_deploy.runtimes.variants import choose_variant
from ivdr_deploy.spec import Precision

pytestmark = pytest.mark.trt


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a real plan."""
    from ivdr_deploy.export.bundle_export import add_variants

    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("trt") / "bundle"))
    return add_variants(folder, [("trt", "fp32")]).path


def plan_of(folder: Path) -> Variant:
    (variant,) = [held for held in open_bundle(folder).manifest.variants if held.runtime == "tensorrt"]
    return variant


def engine_of(folder: Path) -> Path:
    return folder / plan_of(folder).files[0]


def change_sidecar(built: Path, tmp_path: Path, **changes: object) -> tuple[Path, EngineInfo]:
    engine = tmp_path / engine_of(built).name
    shutil.copyfile(engine_of(built), engine)
    info = replace(read_sidecar(engine_of(built)), **changes)
    write_sidecar(engine, info)
    return engine, info


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensorrt may build where there is a GPU")
@pytest.mark.parametrize(
    ("precision", "target"),
    [("fp16", "8.6"), ("int8", "8.6"), ("fp8", "8.9"), ("fp32", "7.5"), ("fp16", "7.5"), ("int8", "7.5")],
)
def test_a_plan_computes_in_the_types_of_its_onnx_file(
    tiny_bundle: Path, tmp_path: Path, precision: Precision, target: str
) -> None:
    from ivdr_deploy.datasets.lists import read_video_list
    from ivdr_deploy.export.bundle_export import add_variants
    from ivdr_deploy.export.calibration import Calibration
    from ivdr_deploy.export.steps import StepOptions
    from ivdr_deploy.video.reader import VideoLimits

    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for index in range(6):
        numbered_video(tmp_path / f"{index}.mp4", num_frames=20 + index, size=(64, 48))
    videos = Calibration(videos=read_video_list(tmp_path), limits=VideoLimits())
    options = StepOptions(calibration=videos, compute_capabilities=(target,))
    add_variants(folder, [("trt", precision)], options)
    bundle = open_bundle(folder)
    plan = bundle.variant(f"trt-{precision}-sm{target.replace('.', '')}")
    source = bundle.variant(TRT_FILE_IDS[precision])
    info = read_sidecar(bundle.variant_file(plan))
    assert (plan.derived_from, plan.precision, info.precision) == (source.id, precision, precision)
    assert ("form" in plan.build) == (target == "7.5")  # Turing takes convolutions over two axes only
    assert info.onnx_sha256 == bundle.manifest.entry(source.files[0]).sha256
    assert source.verified
    sizes = {path.suffix: path.stat().st_size for path in folder.glob("trt-*.engine")}
    assert sizes[".engine"] > 10_000
    if not torch.cuda.is_available():
        assert not plan.verified


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensorrt may build where there is a GPU")
def test_a_plan_for_another_gpu_shares_the_int8_file_of_the_same_list(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    from ivdr_deploy.datasets.lists import read_video_list
    from ivdr_deploy.export.bundle_export import add_variants
    from ivdr_deploy.export.calibration import Calibration
    from ivdr_deploy.export.steps import StepOptions
    from ivdr_deploy.video.reader import VideoLimits

    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for index in range(7):
        numbered_video(tmp_path / f"{index}.mp4", num_frames=20 + index, size=(64, 48))
    lists = [tmp_path / "six.csv", tmp_path / "seven.csv"]
    for path, count in zip(lists, (6, 7), strict=True):
        path.write_text("path\n" + "".join(f"{index}.mp4\n" for index in range(count)))

    def add(target: str, path: Path) -> Bundle:
        videos = Calibration(videos=read_video_list(path), limits=VideoLimits())
        options = StepOptions(calibration=videos, compute_capabilities=(target,))
        return add_variants(folder, [("trt", "int8")], options)

    def plans(bundle: Bundle) -> list[str]:
        for held in bundle.manifest.variants:
            if held.runtime == "tensorrt":  # each is of the file that lies there
                digest = bundle.manifest.entry("onnx-int8-trt.onnx").sha256
                assert read_sidecar(bundle.variant_file(held)).onnx_sha256 == digest
        return [held.id for held in bundle.manifest.variants if held.runtime == "tensorrt"]

    add("8.6", lists[0])
    second = add("8.9", lists[0])
    assert (plans(second), second.dropped) == (["trt-int8-sm86", "trt-int8-sm89"], ())
    assert second.made == ("trt-int8-sm89",)
    third = add("8.9", lists[1])
    assert (plans(third), third.dropped) == (["trt-int8-sm89"], ("trt-int8-sm86",))


def test_adding_a_plan_adds_a_variant_and_keeps_the_rest(built: Path, tiny_bundle: Path) -> None:
    before, after = open_bundle(tiny_bundle).manifest, open_bundle(built).manifest
    variant = plan_of(built)
    assert after.variants == (*before.variants, variant)
    info = read_sidecar(engine_of(built))
    assert (variant.runtime, variant.precision, variant.provider) == ("tensorrt", "fp32", info.provider)
    assert variant.target.device == "cuda"
    assert variant.target.compute_capabilities == info.compute_capabilities
    digits = "-".join(target.replace(".", "") for target in info.compute_capabilities)
    assert variant.id == f"trt-fp32-sm{digits}"
    assert variant.files == (f"{variant.id}.engine", f"{variant.id}.engine.json")
    assert variant.derived_from == "onnx-fp32"
    assert info.onnx_sha256 == after.entry("model.onnx").sha256
    assert info.contract_hash == TINY_CLIP.contract_hash
    card = (built / "MODEL_CARD.md").read_text()
    assert ("not verified, since it was not run" in card) == (not variant.verified)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_plan_that_was_not_run_is_not_verified_and_not_chosen(built: Path) -> None:
    assert (plan_of(built).parity, plan_of(built).verified) == ((), False)
    variant, _, reason = choose_variant(open_bundle(built))
    assert variant.id == "onnx-fp32"
    assert f"{plan_of(built).id}: not verified" in reason
    with pytest.raises(EngineIncompatibleError, match="no NVIDIA driver was found") as caught:
        open_model(built, variant=plan_of(built).id)
    assert "`ivdr show BUNDLE` lists them" in caught.value.hint


def test_a_plan_never_runs_on_the_cpu(built: Path) -> None:
    with pytest.raises(DeviceError, match="cannot run on device 'cpu'"):
        open_model(built, variant=plan_of(built).id, device="cpu")


def test_a_plan_of_another_onnx_file_is_refused(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    engine = engine_of(folder)
    write_sidecar(engine, replace(read_sidecar(engine), onnx_sha256="f" * 64))
    with pytest.raises(ArtifactError, match="SHA-256 ffffffffffff, the bundle's is"):
        open_model(reseal(folder), variant=plan_of(folder).id, device="cuda")


def test_a_plan_made_for_labels_in_another_order_is_refused(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    labels = open_bundle(folder).manifest.labels
    assert read_sidecar(engine_of(folder)).labels_sha256 == labels_sha256(labels)
    keep_variants(folder, plan_of(folder).id)
    reseal(folder, labels=tuple(reversed(labels)))
    with pytest.raises(ArtifactError, match="was made for other labels, or the same in another order"):
        open_model(folder, variant=plan_of(folder).id, device="cuda")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "int8"}, "the precision is 'int8', in the manifest 'fp32'"),
        ({"provider": "other"}, "the provider is"),
        ({"outputs": ("feature",)}, "the outputs is 'feature', in the manifest"),
        ({"clip_shape": (8, 32, 32, 3)}, r"the clip shape is '\(8, 32, 32, 3\)'"),
        ({"batch": BatchProfile(min=1, opt=2, max=0)}, "no plan takes from 1 to 0 clips"),
        ({"batch": BatchProfile(min=-1, opt=2, max=64)}, "no plan takes from -1 to 64 clips"),
    ],
)
def test_a_sidecar_that_says_something_else_than_the_manifest_is_refused(
    built: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    """By its precision, for example, the plan would be judged: by the tolerance of int8 where it is fp32."""
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    engine = engine_of(folder)
    info = read_sidecar(engine)
    if "provider" in changes:
        changes = {"provider": "tensorrt" if info.provider == "tensorrt_rtx" else "tensorrt_rtx"}
    write_sidecar(engine, replace(info, **changes))
    with pytest.raises(ArtifactError, match=said):
        open_model(reseal(folder), variant=plan_of(folder).id, device="cuda")


def test_a_plan_of_another_contract_is_refused(built: Path) -> None:
    with pytest.raises(ArtifactError, match="was built under the contract"):
        TrtRuntime(engine_of(built), clip=replace(TINY_CLIP, frame_stride=7))


def test_the_hash_in_a_sidecar_of_version_1_had_the_view_plan_in_it(built: Path, tmp_path: Path) -> None:
    """It cannot be compared; the digest of the ONNX file says as much."""
    engine, _ = change_sidecar(
        built, tmp_path, format_version=1, contract_hash="0" * 64, provider_version="0"
    )
    with pytest.raises(EngineIncompatibleError, match="installed is"):
        TrtRuntime(engine, clip=TINY_CLIP)


def test_a_plan_of_another_version_says_which_one_to_install(built: Path, tmp_path: Path) -> None:
    engine, info = change_sidecar(built, tmp_path, provider_version="0.0.1")
    with pytest.raises(EngineIncompatibleError, match=rf"{info.provider} 0\.0\.1, installed is") as caught:
        TrtRuntime(engine, clip=TINY_CLIP)
    assert "==0.0.1" in caught.value.hint
    assert "`ivdr export BUNDLE --engine trt --precision" in caught.value.hint  # -o would replace the bundle


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
    shutil.copyfile(engine_of(built), tmp_path / "a.engine")
    with pytest.raises(ArtifactError, match=r"a\.engine\.json is missing"):
        TrtRuntime(tmp_path / "a.engine", clip=TINY_CLIP)


def test_serving_files_of_a_plan_are_the_plan_and_its_sidecar(built: Path, tmp_path: Path) -> None:
    copied = open_bundle(built).copy_serving_files(tmp_path, plan_of(built))
    models = [entry.path for entry in copied.manifest.files if entry.kind in ("model", "sidecar")]
    assert sorted(models) == sorted(plan_of(built).files)
    assert open_bundle(tmp_path) == copied


@pytest.mark.gpu
def test_a_plan_of_another_gpu_is_refused(built: Path, tmp_path: Path) -> None:
    engine, _ = change_sidecar(built, tmp_path, compute_capabilities=("1.0",))
    with pytest.raises(EngineIncompatibleError, match=r"compute capability 1\.0, this GPU has"):
        TrtRuntime(engine, clip=TINY_CLIP)


@pytest.mark.gpu
def test_the_plan_gives_what_torch_gives_at_every_batch(built: Path) -> None:
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    if here not in plan_of(built).target.compute_capabilities:
        missing("gpu", f"the plan was not built for compute capability {here}")
    assert plan_of(built).verified
    chosen = open_model(built)
    assert chosen.variant == plan_of(built).id
    plan, reference = chosen.runtime, open_model(built, variant="torch-fp32").runtime
    for number in (1, 2, 7, 64, 2, *range(3, 12), 1, 7, 11):  # with graphs and without, in turns
        video = np.random.default_rng(number).integers(
            0, 256, (number, *TINY_CLIP.clip_shape), dtype=np.uint8
        )
        expected, found = reference.infer(video), plan.infer(video)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4)
    with pytest.raises(ConfigError, match="at most 64"):
        plan.infer(np.zeros((65, *TINY_CLIP.clip_shape), np.uint8))
