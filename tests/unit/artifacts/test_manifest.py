"""The manifest: nothing in it can change unnoticed, and nothing that is in it ends in a traceback."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import (
    DIGEST_KEY,
    MANIFEST_FILE,
    ArtifactManifest,
    OutputParity,
    OutputSpec,
    Variant,
    read_manifest,
    write_manifest,
)
from ivdr_deploy.artifacts.model_card import render_model_card
from ivdr_deploy.errors import ArtifactError, ConfigError
from ivdr_deploy.spec import FORMAT_VERSION

Values = dict[str, Any]


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> ArtifactManifest:
    return open_bundle(tiny_bundle).manifest


@pytest.fixture
def written(manifest: ArtifactManifest, tmp_path: Path) -> Values:
    write_manifest(tmp_path, manifest)
    values: Values = json.loads((tmp_path / MANIFEST_FILE).read_text())
    return values


def sealed(values: Values) -> str:
    """The text with a digest that fits, as somebody who knows how could write it."""
    import hashlib

    from ivdr_deploy.spec import canonical_json

    content = {key: value for key, value in values.items() if key != DIGEST_KEY}
    return json.dumps({**content, DIGEST_KEY: hashlib.sha256(canonical_json(content).encode()).hexdigest()})


def nested(levels: int) -> list[object]:
    """A list in a list in a list."""
    return json.loads("[" * levels + "]" * levels)  # type: ignore[no-any-return]


def refusal(text: str | bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(text, where="manifest.json")
    assert caught.value.hint
    assert len(caught.value.message) < 500
    return caught.value.message


def copies(values: Values, count: int) -> list[Values]:
    """The second variant under other names."""
    return [{**values["variants"][1], "id": f"onnx-{number}"} for number in range(count)]


def test_a_manifest_comes_back_as_it_was(manifest: ArtifactManifest, written: Values) -> None:
    assert read_manifest(json.dumps(written), where="m") == manifest
    assert read_manifest(sealed(written), where="m") == manifest
    assert written["format_version"] == FORMAT_VERSION == 2


def test_no_changed_byte_of_the_manifest_changes_what_is_read(tiny_bundle: Path) -> None:
    content = (tiny_bundle / MANIFEST_FILE).read_bytes()
    original = read_manifest(content, where="m")
    accepted = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        try:
            found = read_manifest(bytes(changed), where="m")
        except ArtifactError:
            continue
        accepted += 1
        assert found == original
    assert accepted < len(content) / 10  # a digit of the layout at most, never one of the content


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["labels"].reverse(),
        lambda values: values["clip"].update(frame_stride=3),
        lambda values: values["view_plan"].update(num_clips=3),
        lambda values: values["variants"].pop(),
        lambda values: values["variants"][1]["parity"][0].update(max_abs_diff=0.0),
        lambda values: values.update(contract_hash="0" * 64),
        lambda values: values["files"].pop(),
        lambda values: values.pop(DIGEST_KEY),
    ],
    ids=["labels", "contract", "plan", "variants", "parity", "hash", "files", "digest"],
)
def test_an_edited_manifest_is_refused(written: Values, change: Callable[[Values], object]) -> None:
    change(written)
    assert "was changed after it was written" in refusal(json.dumps(written))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda values: values["clip"].update(short_side=144), "contract hash"),
        (lambda values: values["variants"].append(values["variants"][0]), "two variants have the same id"),
        (lambda values: values["variants"][1].update(derived_from=None), "'onnx-fp32' all claim to be it"),
        (lambda values: values["variants"][0].update(files=["x.bin"]), "not listed: 'x.bin'"),
        (lambda values: values["variants"][0].update(files=[]), "'torch-fp32' has no files"),
        (lambda values: values["labels"].pop(), "5 labels for logits of shape (6,)"),
        (lambda values: values["outputs"][0].update(shape=[1] * 200_000), "expected at most 8 sizes"),
        (lambda values: values["outputs"][1].update(shape=[10**4000]), "expected at most 8 sizes"),
        (lambda values: values["outputs"][1].update(shape=[-3]), "the shape of an output is (-3,)"),
        (lambda values: values["outputs"][1].update(shape=[0, 2]), "the shape of an output is (0, 2)"),
        (lambda values: values["outputs"][0].update(shape=[2**31 - 1] * 8), "labels for logits of shape"),
        (lambda values: values["variants"].extend(copies(values, 99)), "there are 101 variants"),
        (lambda values: values["variants"].extend(copies(values, 100_000)), "expected at most 100"),
        (lambda values: values["clip"].update(short_side=10**12), "short_side must be between 0 and 8192"),
        (lambda values: values["view_plan"].update(num_clips=10**4000), "num_clips must be between"),
        (lambda values: values["variants"][0].update(runtime="openvino"), "expected one of 'torch'"),
        (lambda values: values["variants"][0].update(invented=1), "unknown key 'invented'"),
        (lambda values: values.update(files=3), "files: expected a list"),
        (lambda values: values.update(clip=None), "clip: expected a table"),
        (lambda values: values.pop("outputs"), "'outputs' is missing"),
        (lambda values: values.update(format_version=True), "format version True"),
        (lambda values: values.update(format_version=None), "format version None"),
        (lambda values: values["provenance"]["config"].update(deep=nested(200)), "deeper than 100 levels"),
        (lambda values: values["model"]["backbone_config"].update(deep=nested(600)), "deeper than 100 levels"),
    ],
    ids=[
        "contract", "ids", "references", "files", "no files", "labels", "axes", "axis", "negative", "zero",
        "large", "variants", "many variants", "pixels", "clips", "runtime", "key", "list", "table",
        "missing", "bool", "none", "deep", "deep backbone",
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(
    written: Values, change: Callable[[Values], object], reason: str
) -> None:
    change(written)
    assert reason in refusal(sealed(written))


def test_a_later_format_is_refused_by_name(written: Values) -> None:
    written.update(format_version=99, invented_later=1)
    assert "format version 99, this ivdr reads 1 to 2" in refusal(json.dumps(written))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"3",
        b"\xff\xfe",
        b'{"name": "a web app"}',
        b"[" * 100_000,
        b'{"format_version": 2, "name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format_version": 2, "name": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"format_version": 2, "name": NaN}',
        b'{"format_version": 2, "name": 1e999}',
        b'{"format_version": 2, "name": "\\ud800"}',
        b'{"format_version": 2, "name": ' + b"9" * 5000 + b"}",
        b'{"format_version": ' + b"9" * 4000 + b"}",
        b'{"format_version": "' + b"9" * 1_000_000 + b'"}',
    ],
    ids=[
        "empty", "cut", "list", "table", "number", "bytes", "foreign", "open", "deep", "deeper", "nan", "infinity",
        "surrogate", "digits", "version", "long version",
    ],
)  # fmt: skip
def test_something_else_called_manifest_is_refused(content: bytes) -> None:
    assert "manifest.json" in refusal(content)


def test_a_variant_is_verified_by_a_measurement_that_passed() -> None:
    near = OutputParity(output="logits", max_abs_diff=1e-5, min_cosine=1.0, tolerance=1e-4)
    variant = Variant(
        id="a", runtime="onnxruntime", precision="fp32", files=("a",), derived_from="r", parity=(near,)
    )
    assert variant.verified
    for bad in (1e-3, float("inf")):
        assert not replace(variant, parity=(near, replace(near, max_abs_diff=bad))).verified
    with pytest.raises(ConfigError, match="difference of an output is nan"):
        replace(near, max_abs_diff=float("nan"))
    assert not replace(variant, parity=()).verified  # it was never run
    assert replace(variant, parity=(), derived_from=None).verified  # it is the reference


def test_logits_need_a_label_each(manifest: ArtifactManifest) -> None:
    with pytest.raises(ConfigError, match=r"6 labels for logits of shape \(7,\)"):
        replace(manifest, outputs=(OutputSpec(name="logits", shape=(7,)),))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("embedding",), "the output 'embedding' is none of logits, feature, inter, intra"),
        (("feature", "Logits"), "the output 'Logits' is none of"),
        (("feature", "feature"), "there are two outputs 'feature'"),
    ],
)
def test_outputs_that_nothing_looks_at_are_refused(
    written: Values, names: tuple[str, ...], reason: str
) -> None:
    """Such an output was never searched for NaN, and the card had no words for it after all the work."""
    written["outputs"] = [{"name": name, "shape": [8]} for name in names]
    assert reason in refusal(sealed(written))


def test_the_card_has_each_figure_of_the_agreement_in_its_own_column(manifest: ArtifactManifest) -> None:
    reference, exported = manifest.variants
    entry = OutputParity(output="logits", max_abs_diff=2.5e-5, min_cosine=0.9999871, tolerance=1e-4)
    variants = (reference, replace(exported, parity=(entry,)))
    card = render_model_card(replace(manifest, variants=variants), golden_clips=3)
    assert "Over 3 golden clips; the reference is `torch-fp32` on the CPU." in card
    assert "| variant | output | max difference | tolerance | min cosine |" in card
    assert "| `onnx-fp32` | `logits` | 2.5e-05 | 1.0e-04 | 0.999987 |" in card


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"test_videos_failed": 3.0}, "\n- 3 test videos could not be used"),
        ({"test_videos_failed": 3.0, "test_videos": 20.0}, "\n- 3 of the 20 test videos could not be used"),
        ({"test_videos_failed": 0.0}, ""),
        ({"test_videos": 20.0}, ""),
    ],
)
def test_the_card_needs_no_metric_beside_another(
    manifest: ArtifactManifest, metrics: dict[str, float], said: str
) -> None:
    provenance = replace(manifest.provenance, metrics=metrics)
    card = render_model_card(replace(manifest, provenance=provenance), golden_clips=2)
    assert said in card
    assert ("could not be used" in card) == bool(said)
