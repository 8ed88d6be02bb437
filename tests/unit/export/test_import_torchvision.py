"""A checkpoint of torchvision becomes a bundle that computes what torchvision computes on torchvision's own clip."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import get_model, get_model_weights

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import CheckpointError
from ivdr_deploy.export import from_torchvision
from ivdr_deploy.export.from_torchvision import NETWORKS, _state_dict
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.video import open_video
from ivdr_deploy.video.clips import load_clips
from ivdr_deploy.video.sampling import place_clips, timeline


def checkpoint(name: str, path: Path, *, classes: int = 400) -> Path:
    """Torchvision's own random weights, with large ones in the classifier so that answers differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = get_model(name, weights=None, num_classes=classes)
        for parameter in (*network.parameters(),)[-2:]:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.save(network.state_dict(), path)
    return path


class Runs:
    """What reading would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype, it says
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("mc3_18", tmp_path_factory.mktemp("torchvision") / "mc3_18.pth")


@pytest.mark.parametrize(
    "name",
    [name if name == "r3d_18" else pytest.param(name, marks=pytest.mark.exhaustive) for name in NETWORKS],
)
def test_the_network_computes_what_torchvisions_computes(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path / "weights.pth")
    imported = from_torchvision.read(name, path)
    theirs = get_model(name, weights=None).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    clip = np.random.default_rng(0).integers(0, 256, imported.clip.clip_shape, dtype=np.uint8)
    mean, std = np.array(imported.clip.mean), np.array(imported.clip.std)
    normalised = ((clip / 255.0 - mean) / std).astype(np.float32).transpose(3, 0, 1, 2)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(normalised[None]))[0].numpy()
        found = imported.model(torch.from_numpy(clip[None]))["logits"][0].numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_contract_is_torchvisions_preset(name: str) -> None:
    preset = get_model_weights(name).DEFAULT.transforms()
    clip = from_torchvision._contract(NETWORKS[name], preset)
    assert clip.clip_shape[1:3] == tuple(preset.crop_size)
    assert ([*clip.exact_size] if clip.exact_size else [clip.short_side]) == preset.resize_size
    assert (clip.mean, clip.std) == (tuple(preset.mean), tuple(preset.std))
    prose = get_model_weights(name).DEFAULT.meta["_docs"]
    for fact in (f"`frame_rate={clip.target_fps:g}`", f"`clip_len={clip.num_frames}`"):
        assert fact in prose
    assert f"`clips_per_video={NETWORKS[name].num_clips}`" in prose


@pytest.mark.exhaustive
def test_the_bundle_agrees_with_torchvision_from_the_decoded_frames_on(
    ivdr: Callable[..., Any], weights: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    out, video = tmp_path / "mc3", tiny_bundle / "golden_h264.mp4"
    code, _, stderr = ivdr("import", "torchvision:mc3_18", "--weights", weights, "-o", out)
    assert code == 0, stderr
    manifest = open_bundle(out).manifest
    assert (manifest.clip.exact_size, manifest.clip.crop_size, len(manifest.labels)) == ((128, 171), 112, 400)
    assert "grey levels in the mean" in (out / "MODEL_CARD.md").read_text()
    assert ivdr("predict", out, video)[0] == 0
    # The same frames, at the size of the file, through torchvision's own transforms and network.
    preset = get_model_weights("mc3_18").DEFAULT.transforms()
    theirs = get_model("mc3_18", weights=None).eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    with open_video(video) as reader:
        grid = timeline(reader.pts_seconds, reader.info.fps, manifest.clip)
        places = grid[place_clips(len(grid), manifest.clip, manifest.view_plan)]
        frames = [reader.read(rows.tolist()) for rows in places]
    with torch.inference_mode():
        clips = [preset(torch.from_numpy(clip).permute(0, 3, 1, 2)) for clip in frames]
        expected = torch.cat([theirs(clip[None]) for clip in clips]).numpy()
    opened = open_model(out, variant="onnx-fp32")
    with opened.runtime as runtime:
        found = runtime.infer(load_clips(video, manifest.clip, manifest.view_plan).video)["logits"]
    assert (found.argmax(1) == expected.argmax(1)).all()
    # Of 59 spare columns torchvision leaves 30 on the left and the contract 29; the card shows the difference.
    np.testing.assert_allclose(found, expected, atol=0.05 * float(expected.std()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a readable file of torch.save"),
        (b"PK\x03\x04 no zip", "is damaged: File is not a zip file"),
        (saved({"a": torch.zeros(2)})[:-50], "is damaged: File is not a zip file"),
        (b"cos\nsystem\n(S'touch ran'\ntR.", "names 'os.system'"),
        (pickle.dumps({"a": [{"b": Runs()}]}, protocol=0), "names 'posix.system'"),
        (pickle.dumps({"a": [{"b": Runs()}]}, protocol=2), "names 'posix.system'"),
        (pickle.dumps({"a": [{"b": Runs()}]}, protocol=5), "names 'posix.system'"),
        (saved({"a": [{"b": Runs()}]}), "names 'posix.system'"),
        (saved({"a": [{"b": Runs()}]}, pickle_protocol=4), "names 'posix.system'"),
        (saved({"a": [Runs()]}, _use_new_zipfile_serialization=False), "names 'posix.system'"),
        (saved(torch.nn.Linear(2, 2)), "names 'torch.nn.modules.linear.Linear'"),
        (saved({"a": torch.zeros(2)}, pickle_protocol=4), "is not a readable file of torch.save"),
        (saved({"state_dict": {"a": torch.zeros(2)}}), "is not a state dict"),
        (saved({"a": nested()}), "is not a state dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused_and_nothing_is_written(
    ivdr: Callable[..., Any], content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code, _, stderr = ivdr("import", "torchvision:r3d_18", "--weights", path, "-o", tmp_path / "out")
    assert (code, said in " ".join(stderr.split())) == (5, True), stderr
    assert [*tmp_path.iterdir()] == [path]


def test_a_changed_bit_in_the_weights_is_found(weights: Path, tmp_path: Path) -> None:
    """torch itself reads over it."""
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / "changed.pth").write_bytes(content)
    assert torch.load(tmp_path / "changed.pth", weights_only=True)
    with pytest.raises(CheckpointError, match=r"is damaged: '.*data/\d+' in it does not have its checksum"):
        from_torchvision.read("mc3_18", tmp_path / "changed.pth")


def test_one_damaged_byte_anywhere_changes_no_weight_or_is_refused() -> None:
    """Also in what describes the members: lengths, ways of compression, places, the record at the end."""
    state = {"a": torch.arange(5.0)}
    content = saved(state)
    compressions = (8, 12, 14)  # deflate, bzip2 and LZMA, each with a library and errors of its own
    folder = 0x10  # of which torch reads nothing
    refused = []
    for place, byte in enumerate(content):
        for value in {*compressions, folder, 0xFF} - {byte}:
            try:
                found = _state_dict(content[:place] + bytes([value]) + content[place + 1 :], "w.pth")
            except CheckpointError as error:
                refused.append(error.message)
                continue
            assert found.keys() == state.keys(), (place, value)
            assert all(torch.equal(found[key], state[key]) for key in state), (place, value)
    assert len(refused) > len(content)
    assert max(map(len, refused)) < 300


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(
    weights: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(weights) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content if name.endswith(".pkl") else bytes(len(content)))
    assert packed.stat().st_size < weights.stat().st_size / 100
    with pytest.raises(CheckpointError, match="unpacks to more than it holds"):
        from_torchvision.read("mc3_18", packed)


def test_two_tensors_for_one_place_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["classifier.linear.weight"] = torch.zeros(400, 512)  # as our own checkpoints call it
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(
        CheckpointError, match=r"two tensors for one place: 'fc.weight' and 'classifier.linear.w"
    ):
        from_torchvision.read("mc3_18", tmp_path / "both.pth")


def test_another_number_of_classes_names_the_tensor(ivdr: Callable[..., Any], tmp_path: Path) -> None:
    path = checkpoint("mc3_18", tmp_path / "own.pth", classes=7)
    code, _, stderr = ivdr("import", "torchvision:mc3_18", "--weights", path, "-o", tmp_path / "out")
    assert (code, "'fc.weight' (7, 512) instead of (400, 512)" in " ".join(stderr.split())) == (5, True)


def test_no_file_and_no_such_network_are_wrong_usage(
    ivdr: Callable[..., Any], weights: Path, tmp_path: Path
) -> None:
    code, _, stderr = ivdr("import", "torchvision:r3d_18", "-o", tmp_path / "out")
    assert (code, "download.pytorch.org" in stderr) == (2, True)
    code, _, stderr = ivdr("import", "torchvision:r4d", "--weights", weights, "-o", tmp_path / "out")
    assert (code, "r2plus1d_18" in stderr) == (2, True)
