"""The command line in this process, and a network whose answers differ from clip to clip: behind tiny numbers a wrong
export could hide."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP, TINY_LABELS, TINY_PLAN, spread
from videos import numbered_video

from ivdr_deploy.artifacts.checkpoint import save_checkpoint
from ivdr_deploy.cli import main
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import CheckpointInfo, ModelSpec, Provenance, TrainingState


@pytest.fixture
def ivdr(capsys: pytest.CaptureFixture[str]):
    """Run the command line; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network; its series head was left behind by the backbone."""
    spec = ModelSpec(backbone="tiny", num_slots=2, slot_dim=8, clip_dim=8, num_classes=len(TINY_LABELS))
    golden = np.random.default_rng(0).integers(0, 256, (4, *TINY_CLIP.clip_shape), dtype=np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spread(build_model(spec, TINY_CLIP), golden)
    info = CheckpointInfo(
        clip=TINY_CLIP,
        view_plan=TINY_PLAN,
        model=spec,
        labels=TINY_LABELS,
        training=TrainingState(backbone_step=20, head_steps={"classifier": 20, "series_head": 10}),
        provenance=Provenance(
            created_at="2026-01-01T00:00:00+00:00",
            git_revision="abc123",
            data_hash="d" * 64,
            seed=7,
            packages={"torch": "1.0"},
            config={"steps": 20},
            metrics={"video_accuracy": 0.75},
        ),
    )
    path = tmp_path_factory.mktemp("checkpoints") / "lively.safetensors"
    save_checkpoint(path, model=model, info=info, golden=golden)
    return path


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported ``checkpoint`` without its stale head: copy it before changing it."""
    from ivdr_deploy.export.bundle_export import export_bundle

    return export_bundle(checkpoint, tmp_path_factory.mktemp("exported") / "lively").path


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six short videos of different lengths, and lists of them."""
    folder = tmp_path_factory.mktemp("videos")
    names = []
    for index in range(6):
        names.append(f"{index}.mp4")
        numbered_video(folder / names[-1], num_frames=12 + 5 * index, size=(64, 48))
    labels = ["bow", "bow", "jump", "jump", "sit", "sit"]
    rows = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
    (folder / "labelled.csv").write_text("path,label\n" + "".join(rows))
    (folder / "unknown.csv").write_text("path,label\n0.mp4,bow\n1.mp4,tango\n2.mp4,waltz\n")
    (folder / "bare.txt").write_text("\n".join(names) + "\n")
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "mixed.csv").write_text("path,label\n0.mp4,bow\nbroken.mp4,sit\nabsent.mp4,sit\n1.mp4,bow\n")
    (folder / "all_bad.csv").write_text("path,label\nbroken.mp4,sit\n")
    return folder
