"""What the export steps of a bundle share: the names of its first files and variants, and its golden clips."""

from __future__ import annotations

from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.artifacts.golden import Golden, read_golden
from ivdr_deploy.spec import Precision

CHECKPOINT_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"
REFERENCE_ID = "torch-fp32"
ONNX_ID = "onnx-fp32"
TRT_FILE_IDS: dict[Precision, str] = {
    "fp32": ONNX_ID,
    "fp16": "onnx-fp16",
    "int8": "onnx-int8-trt",
    "fp8": "onnx-fp8-trt",
}
"""The ONNX variant that a TensorRT plan of a precision is built from."""


def golden_of(draft: Draft) -> Golden:
    """Read the golden clips and what the reference gave for them."""
    return read_golden(draft.folder, clip=draft.manifest.clip, outputs=draft.manifest.outputs)
