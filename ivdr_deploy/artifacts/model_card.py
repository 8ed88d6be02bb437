"""The model card: what was measured about a bundle, in words. Nothing in it is typed by hand."""

from __future__ import annotations

import json

from ivdr_deploy._text import one_line
from ivdr_deploy.artifacts.manifest import PROVED_ON_KEY, ArtifactManifest
from ivdr_deploy.artifacts.verification import FIGURES, describe_figures
from ivdr_deploy.records import to_dict
from ivdr_deploy.spec import MAX_BATCH

MODEL_CARD_FILE = "MODEL_CARD.md"

_MEANING = {
    "logits": "classifier, before softmax",
    "feature": "globally pooled feature of the backbone",
    "inter": "which video: mean of the slots, unit length",
    "intra": "which moment: one unit vector per slot",
}


def render_model_card(manifest: ArtifactManifest, *, golden_clips: int) -> str:
    """Write the card as Markdown.

    Args:
        manifest: Of the bundle.
        golden_clips: Number of clips that the parity was measured on.
    """
    sections = [
        _head(manifest),
        _outputs(manifest),
        _parity(manifest, golden_clips),
        *_verification(manifest),
        *_speeds(manifest),
        *([_origin(manifest)] if manifest.provenance.origin else []),
        _training(manifest),
        _limits(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _head(manifest: ArtifactManifest) -> str:
    clip, created = manifest.clip, manifest.provenance.created_at
    grid = f"{clip.target_fps:g} frames/s" if clip.target_fps else "the video's own rate"
    size = (
        f"resized to {clip.exact_size[0]}x{clip.exact_size[1]}"
        if clip.exact_size
        else f"shorter side {clip.short_side}"
    )
    backbone = f"Backbone `{manifest.model.backbone}`, exported" if manifest.model else "Exported"
    return f"""# {manifest.name} {manifest.version}

{backbone} {one_line(created)} by ivdr_deploy {manifest.ivdr_version}.

## Input

`video`: uint8 RGB `[N, {", ".join(map(str, clip.clip_shape))}]`, 1 to {MAX_BATCH} clips.
From a video: {manifest.view_plan}; each clip {clip.num_frames} frames, every {clip.frame_stride} frames of {grid},
{size}, crop {clip.crop_size}. Normalisation is inside the network.

Contract `{manifest.contract_hash}`"""


def _outputs(manifest: ArtifactManifest) -> str:
    stale = manifest.stale_outputs
    rows = [
        f"| `{output.name}` | `[N, {', '.join(map(str, output.shape))}]` | {_MEANING[output.name]}"
        f"{' (**stale**: its head was not trained with this backbone)' if output.name in stale else ''} |"
        for output in manifest.outputs
    ]
    text = "## Outputs\n\n| name | shape | what |\n|---|---|---|\n" + "\n".join(rows)
    if manifest.labels:
        text += f"\n\n{len(manifest.labels)} labels: {', '.join(map(one_line, manifest.labels))}."
    return text


def _parity(manifest: ArtifactManifest, golden_clips: int) -> str:
    rows = [
        f"| `{variant.id}` | `{entry.output}` | {entry.max_abs_diff:.1e} "
        f"| {entry.tolerance:.1e} | {entry.min_cosine:.6f} |"
        for variant in manifest.variants
        for entry in variant.parity
    ]
    reference = manifest.reference
    lines = [
        "## Agreement with the trained network",
        "",
        f"Over {golden_clips} golden clips"
        + (f"; the reference is `{reference.id}` on the CPU." if reference else "."),
        "",
        "| variant | output | max difference | tolerance | min cosine |",
        "|---|---|---|---|---|",
        *rows,
    ]
    text = "\n".join(lines)
    for variant in manifest.variants:
        if where := variant.build.get(PROVED_ON_KEY):
            text += f"\n\n`{variant.id}` was run on {one_line(where)}."
        if reason := variant.unverified_reason:
            text += f"\n\n`{variant.id}` is never taken unless asked for: {reason}."
    return text


def _verification(manifest: ArtifactManifest) -> list[str]:
    """Return the section on what `ivdr verify` measured, one column per variant; none where it measured nothing."""
    judged = [(variant, variant.verification) for variant in manifest.variants if variant.verification]
    if not judged:
        return []
    columns = [dict(describe_figures(found.figures)) for _, found in judged]
    meanings = [meaning for meaning in FIGURES.values() if any(meaning in column for column in columns)]
    return [
        "\n".join(
            [
                "## Verified on videos",
                "",
                "| | " + " | ".join(f"`{variant.id}`" for variant, _ in judged) + " |",
                "|---" * (1 + len(judged)) + "|",
                "| verdict | " + " | ".join(str(found) for _, found in judged) + " |",
                "| measured | " + " | ".join(found.measured_at for _, found in judged) + " |",
                "| ran on | " + " | ".join(found.runtime for _, found in judged) + " |",
                *(
                    f"| {meaning} | " + " | ".join(column.get(meaning, "") for column in columns) + " |"
                    for meaning in meanings
                ),
                "",
                "Changes are against the reference on the same videos, with a 95 % interval. All that was measured is"
                " in "
                + ", ".join(f"`{found.record}`" for _, found in judged)
                + "; `ivdr verify BUNDLE --recheck` judges it again.",
            ]
        )
    ]


def _speeds(manifest: ArtifactManifest) -> list[str]:
    """Return the section on what `ivdr bench --speeds` measured, one line per variant; none where there is nothing."""
    timed = [(variant.id, variant.speed) for variant in manifest.variants if variant.speed]
    if not timed:
        return []
    lines = [f"- `{name}`: {speed} ({speed.measured_at}, {speed.runtime})" for name, speed in timed]
    return [
        "## Speed\n\n"
        + "\n".join(lines)
        + "\n\nMedians over turns, with a 95 % interval, each engine in a process of"
        " its own. Decoding is not in them."
    ]


def _origin(manifest: ArtifactManifest) -> str:
    lines = [one_line(f"- {what}: {text}") for what, text in manifest.provenance.origin.items()]
    return "## Origin\n\nIts weights, or those that its training began with, were imported.\n\n" + "\n".join(
        lines
    )


def _training(manifest: ArtifactManifest) -> str:
    provenance, training = manifest.provenance, manifest.training
    lines = [
        f"- code revision: {provenance.git_revision or 'unknown'}",
        f"- data list (SHA-256): {provenance.data_hash or 'unknown'}",
        f"- seed: {'unknown' if provenance.seed is None else provenance.seed}",
        *([f"- optimiser steps of the backbone: {training.backbone_step}"] if training else []),
        *(f"- {name}: {value:.6g}" for name, value in provenance.metrics.items()),
        *(f"- {name} {version}" for name, version in provenance.packages.items()),
    ]
    if not provenance.config:
        return "## Training\n\nNot trained here.\n\n" + "\n".join(map(one_line, lines))
    config = json.dumps(to_dict(provenance.config), indent=2, ensure_ascii=False)
    return "## Training\n\n" + "\n".join(map(one_line, lines)) + f"\n\n```json\n{config}\n```"


def _limits(manifest: ArtifactManifest) -> str:
    lines, metrics = [], manifest.provenance.metrics
    if manifest.labels:
        lines.append(
            "- It answers with one of its labels for every video, also for one that shows none of them."
        )
    if failed := metrics.get("test_videos_failed"):
        among = f" of the {total:.6g}" if (total := metrics.get("test_videos")) else ""
        lines.append(f"- {failed:g}{among} test videos could not be used; they count as wrong.")
    if "video_accuracy" not in metrics and manifest.labels:
        lines.append(
            "- Its accuracy was not measured at training time; `ivdr verify BUNDLE --videos LIST` does."
        )
    lines.append("- What was measured holds for videos like those it was measured on.")
    return "## Limits\n\n" + "\n".join(lines)
