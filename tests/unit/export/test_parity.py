from pathlib import Path

import numpy as np
import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import ExportError, ParityError
from ivdr_deploy.export.parity import check_parity, reference_outputs
from ivdr_deploy.runtimes.loading import open_runtime
from ivdr_deploy.runtimes.torch_runtime import TorchRuntime


def test_the_gate_opens_for_the_same_network_only(bundle: Path, tiny_bundle: Path) -> None:
    opened = open_bundle(bundle)
    video, expected = opened.golden()
    parity = check_parity(expected, open_runtime(opened, "onnxruntime"), video)
    assert [entry.output for entry in parity] == ["logits", "feature"]
    with pytest.raises(ParityError, match="feature differs by"):
        check_parity(expected, open_runtime(open_bundle(tiny_bundle), "onnxruntime"), video)


def test_a_wrong_input_cannot_pass(bundle: Path) -> None:
    """Colour order, frame order and a one-level shift of the pixels all show."""
    opened = open_bundle(bundle)
    video, expected = opened.golden()
    runtime = open_runtime(opened, "onnxruntime")
    for wrong in (video[..., ::-1], video[:, ::-1], video // 2 * 2):
        with pytest.raises(ParityError):
            check_parity(expected, runtime, np.ascontiguousarray(wrong))


def test_reference_outputs_are_finite(bundle: Path) -> None:
    opened = open_bundle(bundle)
    video, expected = opened.golden()
    model = load_checkpoint(opened.model_file("torch")).model
    runtime = TorchRuntime(model, clip=opened.manifest.clip, output_names=opened.manifest.output_names)
    assert set(reference_outputs(runtime, video)) == set(expected)
    next(model.backbone.parameters()).data.fill_(float("inf"))
    with pytest.raises(ExportError, match="NaN or infinity in logits, feature"):
        reference_outputs(runtime, video)
