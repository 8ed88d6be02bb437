"""``ivdr show`` of files that hold what they should not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import MANIFEST, PLAN, row, shards

from ivdr_deploy.artifacts.manifest import DIGEST_KEY, MANIFEST_FILE
from ivdr_deploy.scoring.inputs import Input
from ivdr_deploy.scoring.shard import METADATA_KEY
from ivdr_deploy.scoring.store import FolderStore
from ivdr_deploy.scoring.table import open_table
from ivdr_deploy.spec import canonical_json


def shard(path: Path, metadata: bytes) -> Path:
    pq.write_table(pa.table({"a\nb": [1]}).replace_schema_metadata({METADATA_KEY: metadata}), path)
    return path


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    del values[DIGEST_KEY]
    digest = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    path.write_text(json.dumps({DIGEST_KEY: digest, **values}))


@pytest.mark.parametrize("number", [b"NaN", b"1e999"])
def test_a_number_that_json_does_not_have_is_refused(ivdr, tmp_path: Path, number: bytes) -> None:
    path = shard(tmp_path / "a.parquet", b'{"run_id": ' + number + b"}")
    for words in ((), ("--json",)):
        code, out, err = ivdr("show", path, *words)
        assert (code, out) == (5, "")
        assert err.startswith(f"ivdr: {path} holds what JSON does not have (")


@pytest.mark.parametrize("words", [("show",), ("show", "--json"), ("predict",), ("verify",)])
def test_settings_nested_without_end_are_refused_by_whoever_opens_the_bundle(
    ivdr, tiny_bundle_copy: Path, words: tuple[str, ...]
) -> None:
    path = tiny_bundle_copy / MANIFEST_FILE
    values = json.loads(path.read_text())
    values["provenance"]["config"] = {"deep": json.loads("[" * 600 + "]" * 600)}
    write_sealed(path, values)
    video = [tiny_bundle_copy / "golden_h264.mp4"] if words == ("predict",) else []
    code, out, err = ivdr(*words, tiny_bundle_copy, *video)
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert "manifest.json is not readable JSON (it is nested deeper than 100 levels)" in err


def test_what_a_file_says_is_one_line_and_not_megabytes(ivdr, tmp_path: Path) -> None:
    code, out, _ = ivdr("show", shard(tmp_path / "a.parquet", b'{"run_id": "a\\nb' + b"x" * 10**6 + b'"}'))
    assert code == 0
    assert len(out) < 1000
    assert "columns a\\u000ab\n" in out
    assert "run     a\\u000abxxx" in out


def test_an_onnx_file_by_itself_says_that_nothing_proves_it(ivdr, tiny_bundle: Path) -> None:
    code, out, _ = ivdr("show", tiny_bundle / "model.onnx")
    (proof,) = (line for line in out.splitlines() if line.startswith("proof "))
    assert (code, proof.split()[1]) == (0, "none:")
    code, out, _ = ivdr("show", tiny_bundle / "model.onnx", "--json")
    assert json.loads(out)["proof"] is None


def test_columns_of_any_number_and_length_are_one_short_row(ivdr, tmp_path: Path) -> None:
    names = ["x" * 10**5, *(f"column{number}" for number in range(10**4))]
    table = pa.table({name: [1] for name in names})
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: b"{}"}), tmp_path / "a.parquet")
    code, out, _ = ivdr("show", tmp_path / "a.parquet")
    assert code == 0
    assert len(out) < 2000
    assert "xxx..., column0, column1" in out
    assert "and 9971 more" in out


def test_error_codes_of_any_number_and_length_are_one_short_row(ivdr, tmp_path: Path) -> None:
    inputs = tuple(
        Input(place, f"{place}.mp4", None, f"id{place}", f"key{place}", f"/{place}.mp4")
        for place in range(99)
    )
    with open_table(FolderStore(tmp_path / "scores"), PLAN, manifest=MANIFEST) as written:
        for shard in shards(inputs, size=len(inputs)):
            codes = [f"code{place:02}" + "y" * 10**4 for place in range(len(inputs))]
            written.write(
                shard, [row(1) | {"input_key": f"key{n}", "error_code": c} for n, c in enumerate(codes)]
            )
    code, out, _ = ivdr("show", tmp_path / "scores")
    assert code == 0
    assert len(out) < 5000
    assert "code00yyy" in out
    assert "and 69 more" in out
    code, out, _ = ivdr("show", tmp_path / "scores", "--json")
    assert (code, len(json.loads(out)["outcomes"])) == (0, 99)


def test_labels_of_any_length_are_one_short_row(ivdr, tmp_path: Path, tiny_bundle_copy: Path) -> None:
    path = tiny_bundle_copy / MANIFEST_FILE
    values = json.loads(path.read_text())
    values["labels"] = [label + "z" * 10**5 for label in values["labels"]]
    write_sealed(path, values)
    code, out, _ = ivdr("show", tiny_bundle_copy)
    assert code == 0
    assert len(out) < 8000
    assert "bowzzz" in out
    assert "..., jumpzzz" in out


def test_whatever_else_a_file_says_is_one_short_row(ivdr, tmp_path: Path, tiny_bundle_copy: Path) -> None:
    path = tiny_bundle_copy / MANIFEST_FILE
    values = json.loads(path.read_text())
    values["provenance"]["origin"] = {"w" * 10**5: "x"}
    write_sealed(path, values)
    code, out, _ = ivdr("show", tiny_bundle_copy)
    assert (code, "wwww..." in out) == (0, True)
    assert len(out) < 10_000
