"""What a bundle, a checkpoint and an ONNX file become when they are opened, and what they then give."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import TINY_CLIP, TINY_LABELS, TINY_PLAN, make_tiny_checkpoint, reseal
from requirements import missing

from ivdr_deploy._files import sha256_file
from ivdr_deploy._optional import import_onnxruntime
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import (
    ArtifactError,
    CheckpointError,
    ClipShapeError,
    ClosedError,
    ConfigError,
    ContractMismatchError,
    DeviceError,
    EngineIncompatibleError,
)
from ivdr_deploy.models.backbones import get_backbone
from ivdr_deploy.runtimes import ort_runtime, registry
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.ort_runtime import (
    OrtRuntime,
    operators_on_cpu,
    require_provider,
    session_options,
)
from ivdr_deploy.spec import Precision

VARIANTS = ["torch-fp32", "onnx-fp32"]


def clips(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, *TINY_CLIP.clip_shape), dtype=np.uint8)


def test_a_bundle_runs_on_onnx_runtime_unless_told_otherwise(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    with model.runtime as runtime:
        assert (model.variant, runtime.name) == ("onnx-fp32", "onnxruntime")
        assert model.sha256 == sha256_file(tiny_bundle / "model.onnx")
        assert model.manifest["view_plan"]["num_clips"] == TINY_PLAN.num_clips
        assert "CPUExecutionProvider" in runtime.description


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_opened_bundle_says_what_it_is_and_has_replayed_its_golden_clips(
    tiny_bundle: Path, variant: str
) -> None:
    model = open_model(tiny_bundle, variant=variant)
    with model.runtime:
        assert (model.name, model.version, model.labels) == ("tiny", "1.0", TINY_LABELS)
        assert model.output_names == ("logits", "feature", "inter", "intra") == model.runtime.output_names
        assert set(model.golden_max_abs_diff) == set(model.output_names)
        assert max(model.golden_max_abs_diff.values()) <= 1e-4
        assert model.contract_hash == TINY_CLIP.contract_hash


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_outputs_have_the_promised_shapes_and_types_at_every_batch(
    tiny_bundle: Path, variant: str, number: int
) -> None:
    with open_model(tiny_bundle, variant=variant).runtime as opened:
        outputs = opened.infer(clips(number))
    shapes = {"logits": (6,), "feature": (get_backbone("tiny").feature_dim,), "inter": (8,), "intra": (2, 8)}
    assert {name: value.shape for name, value in outputs.items()} == {
        k: (number, *v) for k, v in shapes.items()
    }
    assert all(value.dtype == np.float32 for value in outputs.values())
    np.testing.assert_allclose(np.linalg.norm(outputs["intra"], axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_clip_gets_the_same_answer_in_any_batch(tiny_bundle: Path, variant: str) -> None:
    video = clips(7)
    with open_model(tiny_bundle, variant=variant).runtime as opened:
        together = opened.infer(video)
        alone = [opened.infer(video[i : i + 1]) for i in range(7)]
    for name, value in together.items():
        np.testing.assert_allclose(value, np.concatenate([one[name] for one in alone]), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_change_nothing_but_the_speed(tiny_bundle: Path, variant: str) -> None:
    before = torch.get_num_threads()
    try:
        one, two = (
            open_model(tiny_bundle, variant=variant, threads=n).runtime.infer(clips(2)) for n in (1, 2)
        )
    finally:
        torch.set_num_threads(before)
    for name, value in one.items():
        np.testing.assert_allclose(value, two[name], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_only_clips_are_taken(tiny_bundle: Path, variant: str) -> None:
    video = clips(1)
    video.setflags(write=False)
    with open_model(tiny_bundle, variant=variant).runtime as opened:
        assert opened.infer(video)["logits"].shape == (1, 6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "video",
    [
        clips(1).astype(np.float32),
        clips(1)[0],
        clips(1)[:, :2],
        clips(1)[..., ::-1, :][..., :2],
        clips(1)[:0],
        clips(1).transpose(0, 4, 1, 2, 3),
    ],
    ids=["float", "no batch", "frames", "channels", "empty", "channels first"],
)
def test_a_batch_that_breaks_the_contract_is_refused(
    tiny_bundle: Path, variant: str, video: np.ndarray
) -> None:
    with (
        open_model(tiny_bundle, variant=variant).runtime as opened,
        pytest.raises(ClipShapeError, match="expected uint8"),
    ):
        opened.infer(video)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_closed_runtime_says_so(tiny_bundle: Path, variant: str) -> None:
    opened = open_model(tiny_bundle, variant=variant).runtime
    opened.close()
    opened.close()
    with pytest.raises(ClosedError, match="was closed"):
        opened.infer(clips(1))


def test_the_expected_contract_is_checked_and_differing_fields_are_named(tiny_bundle: Path) -> None:
    open_model(tiny_bundle, expected_contract=TINY_CLIP.contract_hash).runtime.close()
    open_model(tiny_bundle, expected_contract=TINY_CLIP).runtime.close()
    with pytest.raises(ContractMismatchError, match=r"expected 000000"):
        open_model(tiny_bundle, expected_contract="0" * 64)
    other = replace(TINY_CLIP, frame_stride=4, crop_size=24)
    for path in (tiny_bundle, tiny_bundle / "model.safetensors", tiny_bundle / "model.onnx"):
        with pytest.raises(ContractMismatchError, match=r"\(frame_stride: 2 != 4; crop_size: 32 != 24\)"):
            open_model(path, expected_contract=other)


def test_a_checkpoint_runs_on_torch_and_gives_its_valid_outputs(tmp_path: Path) -> None:
    model = open_model(make_tiny_checkpoint(tmp_path / "a.safetensors"), expected_contract=TINY_CLIP)
    assert (model.runtime.name, model.name, model.labels) == ("torch", "a", TINY_LABELS)
    assert (model.variant, model.view_plan) == ("torch-fp32", TINY_PLAN)
    assert model.golden_max_abs_diff == {}
    assert set(model.runtime.infer(clips(1))) == {"logits", "feature", "inter", "intra"}


def test_an_onnx_file_runs_without_its_bundle(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundled = open_model(tiny_bundle)
    assert not caplog.records
    alone = open_model(tiny_bundle / "model.onnx")
    (said,) = caplog.messages
    assert said.startswith(f"{tiny_bundle / 'model.onnx'}: an ONNX file by itself holds no golden clips")
    assert (alone.name, alone.version, alone.clip, alone.labels) == ("tiny", "1.0", TINY_CLIP, TINY_LABELS)
    assert alone.output_names == bundled.output_names
    assert (alone.variant, alone.view_plan) == ("onnx-fp32", TINY_PLAN)
    np.testing.assert_array_equal(
        alone.runtime.infer(clips(1))["logits"], bundled.runtime.infer(clips(1))["logits"]
    )


def test_an_onnx_file_gives_the_outputs_that_it_speaks_of(tiny_bundle: Path, tmp_path: Path) -> None:
    """Another one in its graph is none of ours: nobody would look for NaN in it."""
    proto = onnx.load(tiny_bundle / "model.onnx")
    proto.graph.node.append(onnx.helper.make_node("Identity", ["inter"], ["embedding"]))
    shape = next(output for output in proto.graph.output if output.name == "inter").type
    proto.graph.output.append(onnx.helper.make_value_info("embedding", shape))
    onnx.save(proto, tmp_path / "more.onnx")
    model = open_model(tmp_path / "more.onnx")
    with model.runtime as runtime:
        assert "embedding" not in {*model.output_names, *runtime.infer(clips(1))}
        assert model.output_names == open_model(tiny_bundle / "model.onnx").output_names


def test_choices_that_make_no_sense_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "a.safetensors")
    for path in (checkpoint, tiny_bundle / "model.onnx"):
        with pytest.raises(ConfigError, match="a single file without variants, asked for 'torch-fp32'"):
            open_model(path, variant="torch-fp32")
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        open_model(tiny_bundle, threads=0)
    with pytest.raises(ArtifactError, match="no variant 'trt-fp32'"):
        open_model(tiny_bundle, variant="trt-fp32")


@pytest.mark.parametrize("name", ["x.safetensors", "x.onnx", "x"])
def test_an_absent_file_says_what_to_give(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="is absent") as caught:
        open_model(tmp_path / name)
    assert ".safetensors" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "what"),
    [("x.engine", "a TensorRT plan"), ("x.parquet", "a shard of a score table")],
)
def test_what_does_not_run_by_itself_says_what_it_is(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ArtifactError, match=f"is {what}, which cannot be run by itself"):
        open_model(tmp_path / name)


def test_a_damaged_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"x\.onnx is not a readable ONNX file"):
        open_model(tmp_path / "x.onnx")


def test_onnx_without_our_metadata_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    proto = onnx.load(tiny_bundle / "model.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(ArtifactError, match=r"bare\.onnx carries no metadata"):
        open_model(tmp_path / "bare.onnx")


def test_an_onnx_file_of_another_contract_is_refused_by_name(tiny_bundle: Path) -> None:
    with pytest.raises(ContractMismatchError, match="mean:"):
        OrtRuntime(tiny_bundle / "model.onnx", clip=replace(TINY_CLIP, mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_under_the_manifest_of_another_model_is_refused_by_every_runtime(
    tiny_bundle_copy: Path, variant: str
) -> None:
    """Outputs that agree to the last bit would have the wrong names, or come of the wrong pixels."""
    reseal(tiny_bundle_copy, labels=tuple(reversed(TINY_LABELS)))
    with pytest.raises(ArtifactError, match="not the same in this order: number 0 is"):
        open_model(tiny_bundle_copy, variant=variant)
    other = replace(TINY_CLIP, mean=(0.5, 0.5, 0.5))
    reseal(tiny_bundle_copy, labels=TINY_LABELS, clip=other, contract_hash=other.contract_hash)
    with pytest.raises(ContractMismatchError, match="mean:"):
        open_model(tiny_bundle_copy, variant=variant)


def test_a_checkpoint_that_gives_no_numbers_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(make_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    with torch.no_grad():
        checkpoint.model.classifier.linear.weight[0, 0] = float("nan")
    save_checkpoint(
        tmp_path / "nan.safetensors", model=checkpoint.model, info=checkpoint.info, golden=checkpoint.golden
    )
    with pytest.raises(CheckpointError, match="gives NaN or infinity in logits on its golden clips"):
        open_model(tmp_path / "nan.safetensors")


def test_a_missing_output_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ArtifactError, match="expected logits, depth"):
        OrtRuntime(tiny_bundle / "model.onnx", output_names=("logits", "depth"))


def test_a_session_that_fell_back_is_refused() -> None:
    require_provider(["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    for providers in (["CPUExecutionProvider"], []):
        with pytest.raises(DeviceError, match="CUDAExecutionProvider was asked for"):
            require_provider(providers, "CUDAExecutionProvider")


@pytest.mark.parametrize(("precision", "tf32"), [(None, "0"), ("fp32", "0"), ("fp16", "1"), ("int8", "1")])
def test_fp32_on_a_gpu_keeps_all_of_its_digits(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision | None, tf32: str
) -> None:
    """ONNX Runtime would compute with ten bits of each factor, unless it is told otherwise."""
    told = []

    def session(path: str, options: object, *, providers: list[object], **_: object) -> None:
        told.append(providers)
        raise RuntimeError("there is no GPU here")

    monkeypatch.setattr(ort_runtime.ort, "InferenceSession", session)
    monkeypatch.setattr(ort_runtime.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ArtifactError, match="there is no GPU here"):
        OrtRuntime(tiny_bundle / "model.onnx", precision=precision, device="cuda")
    assert told == [[("CUDAExecutionProvider", {"use_tf32": tf32})]]


def test_a_session_that_turns_out_to_run_elsewhere_is_not_opened(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways in which ONNX Runtime leaves a GPU: all of a network on the CPU, and some of its operators."""
    start, tried = ort_runtime.ort.InferenceSession, []

    def session(path: str, options: object, *, refuses: bool, **_: object) -> object:
        tried.append(options)
        if refuses and len(tried) == 1:
            raise RuntimeError("operators are assigned to the CPU EP, which is disabled")
        return start(path, session_options("cuda", None, strict=False), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort_runtime.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    for refuses, count, said in (
        (False, 1, "would run on CPUExecutionProvider"),
        (True, 2, "would run .*Conv.* on the CPU"),
    ):
        tried.clear()
        monkeypatch.setattr(ort_runtime.ort, "InferenceSession", partial(session, refuses=refuses))
        with pytest.raises(DeviceError, match=said):
            OrtRuntime(tiny_bundle / "model.onnx", device="cuda")
        assert len(tried) == count


def test_an_onnx_file_for_instructions_that_are_missing_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 8-bit products would saturate on this processor, and nothing would tell."""
    proto = onnx.load(tiny_bundle / "model.onnx")
    props = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = replace(OnnxMetadata.from_props(props, where="it"), instruction_set="vnni")
    onnx.helper.set_model_props(proto, metadata.to_props())
    onnx.save(proto, tmp_path / "vnni.onnx")
    monkeypatch.setattr(registry, "instruction_sets", lambda: frozenset({"avx2", "vnni"}))
    open_model(tmp_path / "vnni.onnx").runtime.close()
    monkeypatch.setattr(registry, "instruction_sets", lambda: frozenset({"avx2"}))
    with pytest.raises(EngineIncompatibleError, match="cannot run here: it needs a processor with vnni"):
        open_model(tmp_path / "vnni.onnx")


def test_no_operator_may_fall_back_to_the_cpu_where_a_gpu_was_asked_for(tiny_bundle: Path) -> None:
    key = "session.disable_cpu_ep_fallback"
    assert session_options("cuda", None).get_session_config_entry(key) == "1"
    for options in (session_options("cpu", None), session_options("cuda", None, strict=False)):
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(key)
    # Arithmetic on shapes would be refused as well at first, so an exported graph holds none.
    shapes = {"Shape", "Size", "Range", "ConstantOfShape", "Expand"}
    assert not shapes & {node.op_type for node in onnx.load(tiny_bundle / "model.onnx").graph.node}


def test_a_session_leaves_cores_to_decoders(tiny_bundle: Path) -> None:
    with OrtRuntime(tiny_bundle / "model.onnx", threads=2) as runtime:
        options = runtime._session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "2000"
    assert options.get_session_config_entry("session.dynamic_block_base") == "4"


def test_what_runs_on_the_cpu_is_told_apart_from_arithmetic_on_shapes(tiny_bundle: Path) -> None:
    options = session_options("cuda", None, strict=False)
    ort = import_onnxruntime()
    cpu = ["CPUExecutionProvider"]
    network = ort.InferenceSession(str(tiny_bundle / "model.onnx"), options, providers=cpu)
    assert {"Conv", "Gemm", "ReduceMean"} <= set(operators_on_cpu(network))
    sizes = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("Shape", ["x"], ["shape"]),
                onnx.helper.make_node("Concat", ["shape", "shape"], ["y"], axis=0),
            ],
            "sizes",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [4])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    assert operators_on_cpu(ort.InferenceSession(sizes.SerializeToString(), options, providers=cpu)) == []
    assert operators_on_cpu(object()), "one that does not tell may have put any of them there"


@pytest.mark.gpu
def test_an_operator_that_the_gpu_lacks_is_refused_not_run_on_the_cpu(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        missing("ort-gpu", "this onnxruntime was built without CUDA")
    proto = onnx.load(tiny_bundle / "model.onnx")
    OrtRuntime(tiny_bundle / "model.onnx", device="cuda").close()
    proto.graph.node.append(onnx.helper.make_node("Unique", ["feature"], ["lost"]))  # CUDA has none
    proto.graph.output.append(onnx.helper.make_tensor_value_info("lost", onnx.TensorProto.FLOAT, None))
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(DeviceError, match="would run Unique on the CPU"):
        OrtRuntime(tmp_path / "model.onnx", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_gives_what_the_cpu_gives(tiny_bundle: Path, variant: str) -> None:
    if (
        variant == "onnx-fp32"
        and "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers()
    ):
        missing("ort-gpu", "this onnxruntime was built without CUDA")
    model = open_model(tiny_bundle, variant=variant, device="cuda")
    assert max(model.golden_max_abs_diff.values()) <= 1e-4
