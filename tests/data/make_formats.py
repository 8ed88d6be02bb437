"""Write one small checkpoint and one bundle in the present format: ``python tests/data/make_formats.py``.

Run it once for every format version and keep what it wrote: ``test_old_formats.py`` reads them all for ever. What is
asserted there is written here, so keep to it.
The weights are a repeating pattern, not trained and not random, so that a few kilobytes hold them.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ivdr_deploy.artifacts.checkpoint import save_checkpoint  # noqa: E402
from ivdr_deploy.export.bundle_export import export_bundle  # noqa: E402
from ivdr_deploy.models.network import build_model  # noqa: E402
from ivdr_deploy.spec import (  # noqa: E402
    FORMAT_VERSION,
    CheckpointInfo,
    ClipSpec,
    ModelSpec,
    TrainingState,
    ViewPlan,
)

CLIP = ClipSpec(num_frames=4, frame_stride=2, short_side=36, crop_size=32)
PLAN = ViewPlan(num_clips=3)
LABELS = ("bow", "jump", "sit", "stand")


def main() -> None:
    """Write ``formats/vN.zip`` with ``checkpoint.safetensors`` and ``bundle/``."""
    target = Path(__file__).parent / "formats" / f"v{FORMAT_VERSION}.zip"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = folder / "checkpoint.safetensors"
        spec = ModelSpec(backbone="tiny", num_slots=2, slot_dim=4, clip_dim=4, num_classes=len(LABELS))
        model = build_model(spec, CLIP).eval()
        with torch.no_grad():
            for value in model.parameters():
                pattern = torch.arange(value.numel(), dtype=torch.float32) % 13 - 6
                value.copy_((pattern / (6 * max(1, value[0].numel()) ** 0.5)).view(value.shape))
        heads = ("clip_head", "series_head", "classifier")
        training = TrainingState(backbone_step=7, head_steps=dict.fromkeys(heads, 7))
        info = CheckpointInfo(clip=CLIP, view_plan=PLAN, model=spec, labels=LABELS, training=training)
        ramp = np.arange(int(np.prod(CLIP.clip_shape)))
        golden = np.stack([(ramp * step % 256).astype(np.uint8).reshape(CLIP.clip_shape) for step in (3, 5)])
        save_checkpoint(checkpoint, model=model, info=info, golden=golden)
        export_bundle(checkpoint, folder / "bundle", name="formats", version="1.0")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.write(path, path.relative_to(folder).as_posix())
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
