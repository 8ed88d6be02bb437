"""What has no 8-bit form is refused by its layer or operator, before a video is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hf_folders import write_folder
from int8_graphs import conv, graph_model, weights
from onnx import helper

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.datasets.lists import read_video_list
from ivdr_deploy.errors import ExportError
from ivdr_deploy.export.bundle_export import add_variants
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.importing import import_model
from ivdr_deploy.export.int8.channels_last import lower
from ivdr_deploy.export.int8.qdq import insert_pairs
from ivdr_deploy.export.int8.quantise import calibrate, require_form
from ivdr_deploy.export.layers import LAYER_KEY
from ivdr_deploy.export.steps import StepOptions
from ivdr_deploy.video.reader import VideoLimits

LAYER = "backbone.patches (models.somebody:12)"


def over(axes: int) -> onnx.ModelProto:
    """A convolution over so many axes of a clip, the others of which are laid together."""
    shape = np.array([-1, 3, *[6] * (axes - 1), 144 // 6 ** (axes - 1)])
    node = helper.make_node("Conv", ["laid", "flat_w"], ["flat"], kernel_shape=[1] * axes)
    node.metadata_props.add(key=LAYER_KEY, value=LAYER)
    return graph_model(
        helper.make_node("Reshape", ["x", "shape"], ["laid"]),
        node,
        helper.make_node("Reshape", ["flat", "back"], ["y"]),
        shape=shape,
        back=np.array([-1, 5, 4, 6, 6]),
        flat_w=np.ones((5, 3, *[1] * axes), np.float32),
    )


def computed() -> onnx.ModelProto:
    """A convolution whose weights are no constant."""
    node = conv("x", "y", kernel=(1, 1, 1))
    node.metadata_props.add(key=LAYER_KEY, value=LAYER)
    given = weights("y", (1, 1, 1))
    given["half"] = given.pop("y_w")
    return graph_model(helper.make_node("Add", ["half", "half"], ["y_w"]), node, **given)


@pytest.mark.parametrize(
    ("model", "found"),
    [(over(1), "have 3 axes"), (over(2), "have 4 axes"), (computed(), "are computed")],
    ids=["one axis", "two axes", "computed"],
)
def test_a_convolution_without_a_form_is_refused_by_its_layer(
    model: onnx.ModelProto, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    for refuse in (
        lambda path: require_form(path, lower),
        lambda path: calibrate(path, np.zeros((9, 4, 6, 6, 3), np.uint8)),
    ):
        with pytest.raises(ExportError) as caught:
            refuse(path)
        assert f"no form for the convolution {LAYER}: its weights {found}" in caught.value.message
        assert "another precision" in caught.value.hint


def test_an_operator_without_a_form_is_refused_by_its_name_where_that_form_is_asked_for(
    tmp_path: Path,
) -> None:
    """TensorRT takes it in fp32, and only convolutions in 8 bits."""
    path = tmp_path / "model.onnx"
    shown = helper.make_node("Resize", ["c", "", "", "sizes"], ["y"])
    sizes = np.array([1, 5, 4, 6, 6])
    onnx.save(
        graph_model(conv("x", "c", kernel=(1, 1, 1)), shown, **weights("c", (1, 1, 1)), sizes=sizes), path
    )
    with pytest.raises(ExportError, match="no form for the operator Resize that makes y"):
        require_form(path, lower)
    require_form(path, insert_pairs)


@pytest.mark.hf
@pytest.mark.parametrize(
    ("kind", "engine", "said"),
    [
        ("timesformer", "onnx", r"no form for the convolution backbone.*its weights have 4 axes"),
        ("timesformer", "aoti", r"no form for the convolution backbone.*its weights have 4 axes"),
        ("videomae", "onnx", r"no form for the operator \w+ that makes"),
    ],
)
def test_an_imported_network_is_refused_before_its_videos_are_opened(
    kind: str, engine: str, said: str, tmp_path: Path
) -> None:
    """TimeSformer cuts each frame by itself into patches; VideoMAE cuts clips, and then multiplies matrices."""
    bundle, _ = import_model(f"hf:{write_folder(kind, tmp_path / 'model')}", tmp_path / "bundle")
    (tmp_path / "videos").mkdir()
    for number in range(12):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(b"no video")
    listed = Calibration(videos=read_video_list(tmp_path / "videos"), limits=VideoLimits())
    with pytest.raises(ExportError, match=said):
        add_variants(bundle.path, [(engine, "int8")], StepOptions(calibration=listed))
    assert open_bundle(bundle.path).manifest == bundle.manifest
