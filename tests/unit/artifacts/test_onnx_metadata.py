import json
from dataclasses import replace

import pytest

from ivdr_deploy.artifacts.onnx_metadata import OnnxMetadata
from ivdr_deploy.errors import ArtifactError
from ivdr_deploy.spec import ClipSpec, ViewPlan

CLIP = ClipSpec(num_frames=8, target_fps=12.5)
METADATA = OnnxMetadata(
    name="walks",
    version="1.0",
    contract_hash=CLIP.contract_hash,
    contract=CLIP,
    view_plan=ViewPlan(placement="sliding", hop=4),
    labels=("sit down", 'été, "so"'),
    outputs=("logits", "inter"),
    ivdr_version="0.1.0",
)


def test_metadata_survives_the_round_trip_beside_foreign_keys() -> None:
    props = {**METADATA.to_props(), "producer": "someone else"}
    assert OnnxMetadata.from_props(props, where="m.onnx") == METADATA


def test_props_are_readable_without_this_package() -> None:
    props = METADATA.to_props()
    assert props["ivdr.contract_hash"] == CLIP.contract_hash
    assert json.loads(props["ivdr.labels"]) == ["sit down", 'été, "so"']
    assert json.loads(props["ivdr.contract"])["num_frames"] == 8
    assert json.loads(props["ivdr.view_plan"])["placement"] == "sliding"


@pytest.mark.parametrize(
    "props",
    [
        {},
        {"ivdr.name": "x"},
        {**METADATA.to_props(), "ivdr.labels": "{"},
        {**METADATA.to_props(), "ivdr.labels": "[" * 100_000},
        {**METADATA.to_props(), "ivdr.format_version": "[" * 500 + "]" * 500},
        {**METADATA.to_props(), "ivdr.contract": '{"mean": [NaN, 0, 0]}'},
        {**METADATA.to_props(), "ivdr.labels": "[" * 200 + "]" * 200},
    ],
    ids=["none", "few", "cut", "deep", "deeper", "nan", "nested"],
)
def test_missing_or_broken_metadata_is_refused(props) -> None:
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        OnnxMetadata.from_props(props, where="m.onnx")


@pytest.mark.parametrize(
    "outputs", ['["embedding"]', '["logits", "embedding"]', '["inter", "inter"]', '[""]']
)
def test_outputs_that_nothing_looks_at_are_refused(outputs: str) -> None:
    with pytest.raises(
        ArtifactError, match=r"m\.onnx .*(is none of logits, feature, inter, intra|two outputs)"
    ):
        OnnxMetadata.from_props({**METADATA.to_props(), "ivdr.outputs": outputs}, where="m.onnx")


def test_a_contract_that_is_not_the_one_of_its_hash_is_refused() -> None:
    props = replace(METADATA, contract=ClipSpec(num_frames=4)).to_props()
    with pytest.raises(ArtifactError, match="not the one of its hash"):
        OnnxMetadata.from_props(props, where="m.onnx")


def test_a_later_format_is_refused_by_name() -> None:
    props = {**METADATA.to_props(), "ivdr.format_version": "99", "ivdr.invented_later": "1"}
    with pytest.raises(ArtifactError, match=r"m\.onnx has format version 99, this ivdr reads 1 to 2"):
        OnnxMetadata.from_props(props, where="m.onnx")
