"""Faults that have happened to others, planted one by one: each is caught by name, by opening or by ``verify``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import reseal

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.checkpoint import load_checkpoint, save_checkpoint
from ivdr_deploy.errors import ArtifactError, ContractMismatchError, GoldenMismatchError, IvdrError
from ivdr_deploy.evaluation.verify import verify_bundle
from ivdr_deploy.export.bundle_export import export_bundle
from ivdr_deploy.export.onnx_steps import onnx_metadata
from ivdr_deploy.models.network import VideoModel, build_model
from ivdr_deploy.runtimes import proof
from ivdr_deploy.spec import ClipSpec
from ivdr_deploy.video.clips import Clips, load_clips

Plant = Callable[[Path, pytest.MonkeyPatch], object]


def wrong_graph(change: Callable[[VideoModel, ClipSpec], VideoModel]) -> Plant:
    """Export a changed network in the place of the right one, with metadata and digests that are all in order."""

    def plant(folder: Path, _: pytest.MonkeyPatch) -> None:
        from ivdr_deploy.export.to_onnx import export_onnx

        manifest = open_bundle(folder).manifest
        model = load_checkpoint(folder / "model.safetensors").model
        with torch.no_grad():
            changed = change(model, manifest.clip).eval()
        path = folder / "model.onnx"
        path.unlink()
        export_onnx(changed, path, clip=manifest.clip, metadata=onnx_metadata(manifest))
        reseal(folder)

    return plant


def wrong_decoder(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    def plant(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*arguments: object, **options: object) -> Clips:
            clips = load_clips(*arguments, **options)  # type: ignore[arg-type]
            return replace(clips, video=np.ascontiguousarray(change(clips.video)))

        monkeypatch.setattr(proof, "load_clips", load)

    return plant


def swapped_mean_and_std(model: VideoModel, clip: ClipSpec) -> VideoModel:
    other = build_model(model.spec, replace(clip, mean=clip.std, std=clip.mean))
    other.load_state_dict(model.state_dict())
    return other


def bgr(model: VideoModel, _: ClipSpec) -> VideoModel:
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv3d))
    first.weight.copy_(first.weight.flip(1))
    model.scale.copy_(model.scale.flip(1))
    model.offset.copy_(model.offset.flip(1))
    return model


def one_percent(model: VideoModel, _: ClipSpec) -> VideoModel:
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv3d))
    first.weight.mul_(1.01)
    return model


def constant(model: VideoModel, _: ClipSpec) -> VideoModel:
    for parameter in model.parameters():
        parameter.zero_()
    return model


def wrong_contract(**changes: object) -> Plant:
    def plant(folder: Path, _: pytest.MonkeyPatch) -> None:
        clip = open_bundle(folder).manifest.clip
        values = {
            name: getattr(clip, str(value)) if name in ("mean", "std") else value
            for name, value in changes.items()
        }
        wrong = replace(clip, **values)
        reseal(folder, clip=wrong, contract_hash=wrong.contract_hash)

    return plant


def truncated(folder: Path, _: pytest.MonkeyPatch) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def other_labels(folder: Path, _: pytest.MonkeyPatch) -> None:
    reseal(folder, labels=tuple(reversed(open_bundle(folder).manifest.labels)))


@dataclass(frozen=True)
class Fault:
    name: str
    plant: Plant
    refused: type[IvdrError] | None = None
    """What opening the bundle says; None: it opens, and is judged."""

    said: str = ""
    failed: frozenset[str] = frozenset()
    """Checks that the exported variant must not pass."""


PARITY = frozenset({"golden", "outputs"})
FAULTS = (
    Fault(
        "mean and std swapped in the contract",
        wrong_contract(mean="std", std="mean"),
        ContractMismatchError,
        "mean: ",
    ),
    Fault("mean and std swapped in the graph", wrong_graph(swapped_mean_and_std), failed=PARITY),
    Fault("BGR in the graph", wrong_graph(bgr), failed=frozenset({"golden"})),  # the test videos are grey
    Fault(
        "BGR from the decoder",
        wrong_decoder(lambda video: video[..., ::-1]),
        GoldenMismatchError,
        "the decoder pyav",
    ),
    Fault("wrong stride", wrong_contract(frame_stride=3), ContractMismatchError, "frame_stride: "),
    Fault("a weight perturbed by 1 %", wrong_graph(one_percent), failed=PARITY),
    Fault("a truncated file", truncated, ArtifactError, r"model\.onnx has \d+ bytes"),
    Fault(
        "labels in another order", other_labels, ArtifactError, "number 0 is 'bow', the manifest says 'wave'"
    ),
    Fault(
        "a decoder one frame late",
        wrong_decoder(lambda video: np.roll(video, -1, axis=1)),
        GoldenMismatchError,
        "the decoder pyav",
    ),
    Fault("a constant variant", wrong_graph(constant), failed=PARITY | {"sensitivity", "agreement"}),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(
    fault: Fault, bundle: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    fault.plant(folder, monkeypatch)
    if fault.refused is not None:
        with pytest.raises(fault.refused, match=fault.said):
            verify_bundle(folder, data=videos / "labelled.csv")
        return
    report = verify_bundle(folder, data=videos / "labelled.csv")
    reference, exported = report.variants
    assert reference.passed
    assert not report.passed
    assert {check.name for check in exported.failures} >= fault.failed, exported.checks


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with digests that fit"])
def test_the_manifest_of_another_model_is_refused(
    bundle: Path, tiny_bundle: Path, videos: Path, tmp_path: Path, sealed: bool
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    shutil.copyfile(tiny_bundle / "manifest.json", folder / "manifest.json")
    if sealed:
        reseal(folder)
    with pytest.raises(ArtifactError, match=r"golden\.npz holds" if sealed else "bytes, the manifest says"):
        verify_bundle(folder, data=videos / "labelled.csv")


def test_a_network_that_answers_a_constant_agrees_with_itself_and_still_fails(
    checkpoint: Path, videos: Path, tmp_path: Path
) -> None:
    """Reference and export are both dead: every difference is 0, and only the sensitivity shows it."""
    trained = load_checkpoint(checkpoint)
    with torch.no_grad():
        dead = constant(trained.model, trained.info.clip)
    save_checkpoint(tmp_path / "dead.safetensors", model=dead, info=trained.info, golden=trained.golden)
    bundle = export_bundle(tmp_path / "dead.safetensors", tmp_path / "bundle")
    assert [[check.name for check in found.failures] for found in verify_bundle(bundle.path).variants] == [
        ["sensitivity"]
    ] * 2
    report = verify_bundle(bundle.path, data=videos / "labelled.csv")
    assert all("sensitivity" in {check.name for check in found.failures} for found in report.variants)
