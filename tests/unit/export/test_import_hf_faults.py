"""Folders of Hugging Face that are damaged, foreign or of another mind: refused by name, and nothing is written."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import LABELS, write_folder
from safetensors.torch import load_file, save_file

from ivdr_deploy._files import sha256_file
from ivdr_deploy.errors import CheckpointError, MissingDependencyError
from ivdr_deploy.export import from_hf
from ivdr_deploy.export.importing import compare_preprocessing, import_model

pytestmark = pytest.mark.hf


@pytest.fixture
def changeable(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("videomae", tmp_path / "model")


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"model_type": "bert"}, "has the model_type 'bert'"),
        ("config.json", {"num_frames": None}, "None for 'num_frames'"),
        ("config.json", {"image_size": [32, 48]}, "for 'image_size'"),
        ("config.json", {"id2label": None}, "the key 'id2label' is missing"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "does not number labels from 0 on"),
        ("config.json", {"id2label": {"0": "a", "1": "a"}}, "two labels of 'id2label' are the same"),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "do not fit|cannot be loaded|another shape"),
        ("config.json", {"hidden_size": 64}, "do not fit|cannot be loaded|describes a network of"),
        ("preprocessor_config.json", {"image_mean": None}, "the key 'image_mean' is missing"),
        ("preprocessor_config.json", {"resample": 3}, "resample is 3, which the contract does not express"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is None"),
        ("preprocessor_config.json", {"crop_size": {"height": 32, "width": 30}}, r"crop_size is \(32, 30\)"),
        ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 24}}, "the network takes 32"),
        ("preprocessor_config.json", {"offset": True}, "offset is True"),
        ("preprocessor_config.json", {"resample": "cubic"}, "resample is 'cubic'"),
        ("preprocessor_config.json", {"do_pad": True}, "do_pad is True"),
        (
            "preprocessor_config.json",
            {"rescale_factor": 0},
            "rescale_factor is 0.*expected a positive number",
        ),
        ("preprocessor_config.json", {"rescale_factor": "1/255"}, "'1/255', expected 1 finite number"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "expected 3 finite numbers"),
        ("preprocessor_config.json", {"image_mean": "0.5"}, "'0.5', expected 3 finite numbers"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, None]}, "expected 3 finite numbers"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0]}, "every std must be positive"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, math.nan]}, "is not readable JSON"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": "36"}},
            "positive whole numbers of pixels|refuses it",
        ),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 36.5}},
            "positive whole numbers of pixels|refuses it",
        ),
        (
            "preprocessor_config.json",
            {"size": {"height": -1, "width": 3}},
            "positive whole numbers of pixels",
        ),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 10**12}},
            "short_side must be between 0 and 8192, found 1000000000000",
        ),
        (
            "preprocessor_config.json",
            {"size": {"height": 10**6, "width": 40}},
            "exact_size must be between 1 and 8192, found 1000000",
        ),
        ("preprocessor_config.json", {"size": [1, 2, 3]}, "refuses it|crop_size 32 is larger"),
        ("config.json", {"layer_norm_eps": math.nan}, "is not readable JSON"),
        ("config.json", {"eps": [-math.inf]}, "JSON does not have"),
        ("config.json", {"deep": json.loads("[" * 200 + "]" * 200)}, "deeper than 100 levels"),
        ("preprocessor_config.json", {"deep": json.loads("[" * 600 + "]" * 600)}, "deeper than 100 levels"),
        ("config.json", {"id2label": {"0": "a", "1": " "}}, "has the label ' '"),
        ("config.json", {"id2label": {"0": "a", "1": "b\n# c"}}, r"has the label 'b\\n# c'"),
        ("config.json", {"id2label": {"0": "a", "1": "b" * 10**6}}, "has the label 'bbb"),
        (
            "config.json",
            {"attn_implementation": "somebody/kernel"},
            "attn_implementation is 'somebody/kernel'",
        ),
        ("config.json", {"_attn_implementation": ["x"]}, "_attn_implementation is"),
        ("config.json", {"quantization_config": {"quant_method": "x"}}, "quantization_config is"),
        ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights is 'other"),
        (
            "config.json",
            {"num_frames": 10**9},
            "num_frames must be between 1 and 4096, found 1000000000",
        ),
        (
            "config.json",
            {"num_frames": 4096, "image_size": 224},
            "the preprocessor gives 32 pixels, the network takes 224",
        ),
        ("config.json", {"hidden_size": 10**6}, "1000000 for 'hidden_size', and the weights are of"),
        ("config.json", {"hidden_size": 2000}, r"a network of [\d,]+ numbers, the weights hold [\d,]+"),
        ("config.json", {"num_hidden_layers": 10**3}, "1000 for 'num_hidden_layers'"),
        ("config.json", {"intermediate_size": 10**9}, "1000000000 for 'intermediate_size'"),
        ("config.json", {"patch_size": [8, 10**9]}, "1000000000 for 'patch_size'"),
    ],
)
def test_what_is_missing_or_cannot_be_expressed_is_refused_by_name(
    changeable: Path, file: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    change_json(changeable / file, **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        import_model(f"hf:{changeable}", tmp_path / "out")
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


def test_one_mean_for_all_colours_is_expressed(changeable: Path) -> None:
    change_json(changeable / "preprocessor_config.json", image_mean=0.25, image_std=0.5)
    imported = from_hf.read(str(changeable), None)
    assert imported.clip.mean == pytest.approx((0.25, 0.25, 0.25))
    assert imported.own_preprocess is not None
    assert "by 0." in compare_preprocessing(imported.own_preprocess, imported.clip, enlarged=5)


def test_weights_in_several_files_are_all_named_by_their_digests(changeable: Path, tmp_path: Path) -> None:
    tensors = load_file(changeable / "model.safetensors")
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, changeable / file, metadata={"format": "pt"})
    (changeable / "model.safetensors").unlink()
    index = changeable / "model.safetensors.index.json"
    table = {name: file for file, part in halves.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    origin = from_hf.read(str(changeable), None).origin
    assert origin["sha256"] == ", ".join(sha256_file(changeable / file) for file in halves)
    names_of_files = ("../one.safetensors", 3, "", "\ud800.safetensors", "a\0b", "a\nb", "a" * 256)
    for wrong in ({}, [1], *({names[0]: name} for name in names_of_files)):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match="does not say in which files"):
            from_hf.read(str(changeable), None)
    index.write_text(json.dumps({"weight_map": {**table, "x": "three.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"three\.safetensors is not a readable"):
        from_hf.read(str(changeable), None)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"device": "cuda"},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="only where it is not there"),
        ),
        {"device": "nowhere"},
        {"device": "meta"},
    ],
)
def test_a_processor_that_fails_when_it_is_called_is_named(
    changeable: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    change_json(changeable / "preprocessor_config.json", **changes)
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json: the model's own preprocessing fails"
    ) as caught:
        import_model(f"hf:{changeable}", tmp_path / "out")
    assert "take it out" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_in_a_compressed_form_are_refused(changeable: Path, dtype: torch.dtype) -> None:
    tensors = load_file(changeable / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].to(dtype)
    save_file(tensors, changeable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"'classifier\.weight' of [A-Z0-9_]+, expected F64, F32, F16, BF16"
    ):
        from_hf.read(str(changeable), None)


@pytest.mark.parametrize("change", ["missing", "more", "NaN"])
def test_weights_that_are_not_whole_are_refused(changeable: Path, change: str) -> None:
    tensors = load_file(changeable / "model.safetensors")
    if change == "missing":
        del tensors["classifier.bias"]
    elif change == "more":
        tensors["classifier.second"] = torch.zeros(3)
    else:
        tensors["classifier.bias"][1] = torch.nan
    save_file(tensors, changeable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.(bias|second)"):
        from_hf.read(str(changeable), None)


def test_a_home_folder_is_found_behind_the_colon(changeable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(changeable.parent))
    assert from_hf.read("~/model", None).labels == LABELS


def test_an_exact_size_without_a_crop_is_expressed(changeable: Path) -> None:
    size = {"height": 32, "width": 32}
    change_json(changeable / "preprocessor_config.json", do_center_crop=False, size=size, crop_size=None)
    imported = from_hf.read(str(changeable), None)
    assert (imported.clip.exact_size, imported.clip.crop_size) == ((32, 32), 32)
    assert imported.own_preprocess is not None
    assert "by 0." in compare_preprocessing(imported.own_preprocess, imported.clip, enlarged=1)


@pytest.mark.parametrize("damage", ["cut", "gone", "pickle", "adapter", "no json", "no folder"])
def test_damaged_folders_end_with_the_code_of_a_damaged_checkpoint(
    ivdr: Callable[..., Any], changeable: Path, damage: str, tmp_path: Path
) -> None:
    weights = changeable / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "pickle":
        weights.rename(changeable / "pytorch_model.bin")
    elif damage == "adapter":
        (changeable / "adapter_config.json").write_text("{}")
    elif damage == "no json":
        (changeable / "config.json").write_text("{")
    else:
        shutil.rmtree(changeable)
    code, _, stderr = ivdr("import", f"hf:{changeable}", "-o", tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (5, False), stderr


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError) as caught:
        import_model("hf:somewhere", tmp_path / "out")
    assert "ivdr-deploy[hf]" in caught.value.hint
