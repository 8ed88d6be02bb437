"""The network itself in half precision and another layout, as a bundle asks for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import write_manifest
from ivdr_deploy.errors import EngineIncompatibleError
from ivdr_deploy.runtimes.compare import compare_outputs, describe_failures
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.runtimes.torch_runtime import LAYOUT_KEY


def with_half(folder: Path, layout: str) -> Path:
    """Give a bundle the variant that an export on a GPU adds, for whatever device there is."""
    manifest = open_bundle(folder).manifest
    parity = manifest.variants[1].parity
    half = replace(
        manifest.variants[0],
        id="torch-bf16",
        precision="bf16",
        derived_from="torch-fp32",
        parity=parity,
        build={LAYOUT_KEY: layout},
    )
    write_manifest(folder, replace(manifest, variants=(*manifest.variants, half)))
    return folder


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_the_backbone_computes_in_the_precision_of_its_variant(tiny_bundle_copy: Path, layout: str) -> None:
    bundle = with_half(tiny_bundle_copy, layout)
    video = np.random.default_rng(0).integers(0, 256, (3, *TINY_CLIP.clip_shape), dtype=np.uint8)
    expected = open_model(bundle, variant="torch-fp32", device="cpu").runtime.infer(video)
    with open_model(bundle, variant="torch-bf16", device="cpu").runtime as runtime:
        assert runtime.precision == "bf16"
        assert runtime.description.endswith("bf16")
        weights = [
            value
            for value in runtime._model.backbone.parameters()
            if value.ndim == 5  # type: ignore[attr-defined]
        ]
        assert {value.dtype for value in weights} == {torch.bfloat16}
        if layout != "contiguous":
            assert all(value.is_contiguous(memory_format=torch.channels_last_3d) for value in weights)
        found = runtime.infer(video)
    assert not describe_failures(compare_outputs(expected, found, precision="bf16"))
    assert any(np.abs(found[name] - value).max() > 1e-6 for name, value in expected.items()), "it is fp32"


def test_an_unknown_layout_is_refused_by_name(tiny_bundle_copy: Path) -> None:
    bundle = with_half(tiny_bundle_copy, "diagonal")
    with pytest.raises(EngineIncompatibleError, match="diagonal"):
        open_model(bundle, variant="torch-bf16", device="cpu")
