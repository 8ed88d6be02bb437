"""Folders of small Hugging Face video classifiers with random weights, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LABELS = ("bow", "jump", "sit", "stand", "turn")
ARCHITECTURES = ("videomae", "timesformer", "vivit", "vjepa2")


def write_folder(kind: str, folder: Path) -> Path:
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    common: dict[str, Any] = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: number for number, label in enumerate(LABELS)},
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    pixels: dict[str, Any] = {"image_size": 32, "num_frames": 4, "intermediate_size": 64}
    sizes: dict[str, Any] = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    config: Any
    processor: Any
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "videomae":
            config = hf.VideoMAEConfig(patch_size=8, tubelet_size=2, **pixels, **common)
            model, processor = hf.VideoMAEForVideoClassification(config), hf.VideoMAEImageProcessor(**sizes)
        elif kind == "timesformer":
            config = hf.TimesformerConfig(patch_size=8, **pixels, **common)
            model = hf.TimesformerForVideoClassification(config)
            processor = hf.VideoMAEImageProcessor(**sizes, image_mean=[0.45] * 3, image_std=[0.225] * 3)
        elif kind == "vivit":
            config = hf.VivitConfig(tubelet_size=[2, 8, 8], **pixels, **common)
            model, processor = hf.VivitForVideoClassification(config), hf.VivitImageProcessor(**sizes)
        else:
            config = hf.VJEPA2Config(
                crop_size=32, patch_size=8, frames_per_clip=4, tubelet_size=2, mlp_ratio=2, num_pooler_layers=1,
                pred_hidden_size=32, pred_num_hidden_layers=1, pred_num_attention_heads=2, **common,
            )  # fmt: skip
            model, processor = hf.VJEPA2ForVideoClassification(config), hf.VJEPA2VideoProcessor(crop_size=32)
        for parameter in model.classifier.parameters():
            torch.nn.init.normal_(parameter)  # so that answers differ
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
