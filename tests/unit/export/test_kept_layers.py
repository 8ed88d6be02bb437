"""A layer that a coarse precision cannot hold is found, kept in fp32 and named; without that the export fails."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles import reseal
from onnx import TensorProto, helper, numpy_helper

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ParityError
from ivdr_deploy.export import int8_steps, layers, onnx_steps
from ivdr_deploy.export.bundle_export import add_variants, export_bundle
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.half import HalfGraph, UnlikeGraphsError
from ivdr_deploy.export.layers import fewest
from ivdr_deploy.export.steps import StepOptions
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.video.reader import VideoLimits

BLOCK = "backbone.4.main"


def planted(checkpoint: Path, folder: Path, change: Callable[[VideoModel], None]) -> Path:
    """A bundle of the same function with weights that are hard to hold."""
    trained = load_checkpoint(checkpoint)
    with torch.no_grad():
        change(trained.model)
    save_checkpoint(
        folder / "hard.safetensors", model=trained.model, info=trained.info, golden=trained.golden
    )
    return export_bundle(folder / "hard.safetensors", folder / "hard").path


def overflow(model: VideoModel, by: float = 1e5) -> None:
    """The first layer of a block gives so many times as much, and the next takes it back: fp16 ends at 65504."""
    block = model.backbone[4].main
    for parameter in block[1].parameters():
        parameter.mul_(by)
    block[3].weight.mul_(1 / by)


def one_loud_channel(model: VideoModel) -> None:
    """One channel is 1e5 times as large as the others and unused: 8 bits for all leave nothing for them."""
    block = model.backbone[4].main
    for parameter in block[1].parameters():
        parameter[0] *= 1e5
    block[3].weight[:, 0] *= 1e-7


def test_a_layer_that_overflows_fp16_is_kept_in_fp32_and_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted(checkpoint, tmp_path, overflow)
    with monkeypatch.context() as patch:
        # The file as the exporter writes it.
        patch.setattr(
            onnx_steps, "_fit_half", lambda *given: (onnx_steps.prove_onnx(*given, precision="fp16"), {})
        )
        with pytest.raises(ParityError):
            add_variants(folder, [("onnx", "fp16")])
    add_variants(folder, [("onnx", "fp16")])
    made = open_bundle(folder).variant("onnx-fp16")
    assert made.verified
    named = made.build["fp32_overflows"].split("; ")
    assert [name.split(" ")[0] for name in named] == [f"{BLOCK}.0", f"{BLOCK}.2", f"{BLOCK}.3"]
    assert all("(ivdr_deploy.models.backbones:" in name for name in named)
    assert "fp32_inexact" not in made.build
    graph = onnx.load(folder / "model-fp16.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = [types[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    assert convolutions.count(TensorProto.FLOAT) == 2
    assert convolutions.count(TensorProto.FLOAT16) == len(convolutions) - 2
    with open_model(folder, variant="onnx-fp16").runtime as runtime:
        assert runtime.precision == "fp16"


def test_a_layer_that_overflows_is_found_where_the_exporter_made_another_graph_than_in_fp32(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Its constants fit, and so a CPU computes the file as if nothing were wrong."""
    folder = planted(checkpoint, tmp_path, lambda model: overflow(model, by=1e4))
    full = onnx.load(folder / "model.onnx")
    last = next(node for node in full.graph.node if full.graph.output[0].name in node.output)
    result, last.output[0] = last.output[0], "before"
    full.graph.node.append(helper.make_node("Identity", ["before"], [result]))
    onnx.save(full, folder / "model.onnx")
    reseal(folder)
    add_variants(folder, [("onnx", "fp16")])
    made = open_bundle(folder).variant("onnx-fp16")
    named = made.build["fp32_overflows"].split("; ")
    assert [name.split(" ")[0] for name in named] == [f"{BLOCK}.0", f"{BLOCK}.2", f"{BLOCK}.3"]
    assert "another graph in half precision than in fp32" in made.build["constants"]


def two_products(factor: float, kind: int) -> onnx.ModelProto:
    """A graph that multiplies pixels by ``factor``, and that by a small number."""
    nodes = [
        helper.make_node("Cast", ["video"], ["pixels"], name="cast", to=kind),
        helper.make_node("Mul", ["pixels", "factor"], ["large"], name="first"),
        helper.make_node("Mul", ["large", "small"], ["product"], name="second"),
        helper.make_node("Cast", ["product"], ["logits"], name="back", to=TensorProto.FLOAT),
    ]
    constants = [
        numpy_helper.from_array(np.array(value, helper.tensor_dtype_to_np_dtype(kind)), name)
        for name, value in (("factor", factor), ("small", 1e-3))
    ]
    video = helper.make_tensor_value_info("video", TensorProto.UINT8, ["batch", 1, 1, 1, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 1, 1, 3])
    graph = helper.make_graph(nodes, "two products", [video], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("pixel", "factor", "kept"),
    [
        (255, 100.0, set()),
        (255, 150.0, {"first", "second"}),  # 38250, more than half of what fp16 holds: other clips give more
        (255, float("nan"), {"first", "second"}),
        (0, 30000.0, set()),
        (0, 40000.0, {"first"}),  # the constant alone
    ],
)
def test_a_node_stays_in_fp32_for_what_it_makes_for_what_it_reads_and_for_its_constants(
    pixel: int, factor: float, kept: set[str]
) -> None:
    graph = HalfGraph(two_products(factor, TensorProto.FLOAT16), two_products(factor, TensorProto.FLOAT))
    assert graph.nodes == ["first", "second"]
    assert graph.overflowing(np.full((2, 1, 1, 1, 3), pixel, np.uint8)) == kept


def test_the_node_that_adds_most_error_comes_first() -> None:
    """The first one doubles a whole number; the second multiplies by 0.001, which fp16 does not hold."""
    graph = HalfGraph(two_products(2.0, TensorProto.FLOAT16), two_products(2.0, TensorProto.FLOAT))
    clips = np.full((1, 1, 1, 1, 3), 255, np.uint8)
    assert graph.by_error(clips, without=()) == ["second", "first"]
    graph = HalfGraph(two_products(0.1, TensorProto.FLOAT16), two_products(0.1, TensorProto.FLOAT))
    assert graph.by_error(clips, without=["second"]) == ["first"]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_error_of_a_node_is_that_of_the_clip_where_it_is_largest(order: tuple[int, int]) -> None:
    """Values are cut to whole numbers: of the products 1.5 and 3 the second loses nothing."""

    def cut(name: str, nodes: list[onnx.NodeProto]) -> str:
        nodes.append(helper.make_node("Floor", [name], [f"{name}/cut"]))
        return f"{name}/cut"

    clips = np.stack([np.full((1, 1, 1, 3), pixel, np.uint8) for pixel in order])
    found = layers.layer_errors(
        two_products(1.5, TensorProto.FLOAT),
        clips,
        ["first"],
        round_value=cut,
        round_constant=lambda name: np.float32(1.5) if name == "factor" else None,
    )
    assert found == {"first": pytest.approx(1 / 3)}


def test_graphs_of_other_nodes_or_inputs_are_not_taken_for_one_network() -> None:
    half, full = (two_products(100.0, kind) for kind in (TensorProto.FLOAT16, TensorProto.FLOAT))
    for graph in (half, full):
        graph.graph.node[2].op_type = "Max"
    assert HalfGraph(half, full).nodes == ["first", "second"]
    half.graph.node[2].input.append("factor")
    with pytest.raises(UnlikeGraphsError):
        HalfGraph(half, full)
    full.graph.node[2].input.append("factor")
    full.graph.node[1].op_type = "Add"
    with pytest.raises(UnlikeGraphsError):
        HalfGraph(half, full)


def test_a_network_that_fits_fp16_keeps_no_layer(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    add_variants(folder, [("onnx", "fp16")])
    assert open_bundle(folder).variant("onnx-fp16").build == {
        "proved_on": "a CPU, which computes fp16 in fp32"
    }
    said = "`onnx-fp16` was run on a CPU, which computes fp16 in fp32."
    assert said in (folder / "MODEL_CARD.md").read_text()
    golden = open_bundle(folder).golden()
    assert golden.video is not None
    graph = HalfGraph(onnx.load(folder / "model-fp16.onnx"), onnx.load(folder / "model.onnx"))
    assert graph.overflowing(golden.video) == set()
    order = graph.by_error(golden.video, without=graph.nodes[:1])
    assert sorted(order) == sorted(graph.nodes[1:])
    # With all of them in fp32 it is the fp32 network again.
    full = graph.keeping(graph.nodes)
    session = layers.import_onnxruntime().InferenceSession(
        full.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = dict(
        zip(golden.expected, session.run(list(golden.expected), {"video": golden.video}), strict=True)
    )
    half = [entry.max_abs_diff for entry in open_bundle(folder).variant("onnx-fp16").parity]
    assert max(np.abs(found[name] - value).max() for name, value in golden.expected.items()) < max(half) / 2


def test_a_layer_that_8_bits_cannot_hold_is_kept_in_fp32_and_named(
    checkpoint: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_steps, "instruction_sets", frozenset)
    folder = planted(checkpoint, tmp_path, one_loud_channel)
    options = StepOptions(calibration=Calibration(videos=read_video_list(videos), limits=VideoLimits()))
    with monkeypatch.context() as patch:
        patch.setattr(layers, "fewest", lambda *_: None)
        with pytest.raises(ParityError):
            add_variants(folder, [("onnx", "int8")], options)
    add_variants(folder, [("onnx", "int8")], options)
    made = open_bundle(folder).variant("onnx-int8-cpu")
    assert made.verified
    assert f"{BLOCK}.3 (ivdr_deploy.models.backbones:" in made.build["fp32_inexact"]
    kinds = [node.op_type for node in onnx.load(folder / "onnx-int8-cpu.onnx").graph.node]
    kept = len(made.build["fp32_inexact"].split("; "))
    assert kinds.count("Conv") == kept
    assert kinds.count("QLinearConv") == 7 - kept


@pytest.mark.parametrize(("needed", "tries"), [(1, 1), (2, 2), (3, 4), (6, 6), (7, 6)])
def test_as_few_layers_as_it_takes_are_found_by_halving(needed: int, tries: int) -> None:
    asked: list[int] = []

    def passes(nodes: Collection[str]) -> bool:
        asked.append(len(nodes))
        return len(nodes) >= needed

    order = list("abcdefg")
    assert fewest(order, passes) == order[:needed]
    assert len(asked) == tries
    assert fewest(order, lambda nodes: False) is None


@pytest.mark.parametrize(("needed", "kept"), [(0, []), (2, ["a", "b"]), (3, None)])
def test_a_precision_of_which_only_the_name_would_be_left_is_refused(
    needed: int, kept: list[str] | None
) -> None:
    def prove(nodes: Collection[str]) -> tuple[OutputParity, ...]:
        if len(nodes) < needed:
            raise ParityError("off")
        return ()

    def search() -> tuple[tuple[OutputParity, ...], list[str]]:
        return onnx_steps.keeping(prove, lambda: ["a", "b", "c"])

    if kept is None:
        with pytest.raises(ParityError, match="off"):
            search()
    else:
        assert search() == ((), kept)
