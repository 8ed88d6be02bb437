"""Checkpoint -> bundle, and bundle -> bundle with more variants: each step proves what it adds.

A step takes a ``Draft`` and adds a variant to it; nobody sees the draft before every step has ended well.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ivdr_deploy import __version__
from ivdr_deploy._files import try_beside
from ivdr_deploy.artifacts.bundle import (
    Bundle,
    Draft,
    changed_bundle,
    check_replaceable,
    new_bundle,
    open_bundle,
)
from ivdr_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint
from ivdr_deploy.artifacts.golden import GOLDEN_FILE, GOLDEN_PLAN, Golden, write_golden
from ivdr_deploy.artifacts.golden_video import make_golden_videos
from ivdr_deploy.artifacts.manifest import ArtifactManifest, OutputSpec, Variant
from ivdr_deploy.errors import FolderError, IvdrError
from ivdr_deploy.export.draft_files import CHECKPOINT_FILE, REFERENCE_ID
from ivdr_deploy.export.steps import STEPS, Request, StepOptions, plan_steps
from ivdr_deploy.records import require_servable
from ivdr_deploy.runtimes.compare import reference_outputs
from ivdr_deploy.spec import OUTPUT_NAMES, CheckpointInfo, Provenance
from ivdr_deploy.video.clips import load_clips

_log = logging.getLogger(__name__)


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    version: str = "1.0",
    include_stale: bool = False,
    steps: Sequence[Request] = (),
    options: StepOptions | None = None,
) -> Bundle:
    """Write a bundle with the variants ``torch-fp32``, ``onnx-fp32`` and what is asked for, or nothing.

    Args:
        checkpoint: What ``python -m train`` wrote.
        out: Folder to write. An older bundle there is replaced as a whole.
        name: Name of the model; the folder's name by default.
        version: Version of the model, as it is served.
        include_stale: Also export the outputs of heads that were trained, but not together with this
            backbone.
        steps: More variants, as engine and precision.
        options: What their steps need to be told.

    Raises:
        CheckpointError: if the checkpoint is not usable.
        ConfigError: if the name or version cannot be served.
        FolderError: if ``out`` holds something that is not ours to replace.
        ExportError: if the export fails; ``ParityError`` if the exported model computes something else.
        MissingDependencyError: if a package that is needed is not installed.
    """
    out = Path(out).resolve()
    name = prepare_export(out, name=name, version=version)
    options = options or StepOptions()
    planned = checked_steps([("onnx", "fp32"), *steps], options)
    loaded = load_checkpoint(checkpoint)
    info = loaded.info
    outputs = choose_outputs(info, include_stale=include_stale)
    manifest = ArtifactManifest(
        name=name,
        version=version,
        clip=info.clip,
        contract_hash=info.clip.contract_hash,
        view_plan=info.view_plan,
        model=info.model,
        labels=info.labels if "logits" in outputs else (),
        outputs=tuple(OutputSpec(name=output, shape=()) for output in outputs),
        training=info.training,
        variants=(),
        files=(),
        provenance=_with_export_versions(info.provenance),
        ivdr_version=__version__,
    )
    with new_bundle(out, manifest) as draft:
        add_reference(draft, loaded)
        for request in planned:
            STEPS[request].add(draft, options)
    return replace(open_bundle(out), made=tuple(draft.made))


def prepare_export(out: Path, *, name: str | None, version: str) -> str:
    """Refuse what cannot end well before any work is done; return the name of the model.

    Raises:
        ConfigError: if the name or version cannot be served.
        FolderError: if ``out`` holds something that is not ours to replace.
        OSError: if it cannot be written.
    """
    name = name or out.name
    require_servable(name, version)
    check_replaceable(out)
    if out.parent.is_dir():
        try_beside(out)
    return name


def add_variants(path: str | Path, steps: Sequence[Request], options: StepOptions | None = None) -> Bundle:
    """Add variants to an existing bundle, in the place of former ones with the same ids.

    Args:
        path: The bundle.
        steps: What to add, as engine and precision; what they are made from is added too where it is missing.
        options: What the steps need to be told.

    Raises:
        ArtifactError: if the bundle is damaged.
        ConfigError: if there is no such engine in that precision, or an option is missing.
        FolderError: if it holds files that are not its own, or was changed meanwhile.
        ExportError: if a variant cannot be made; ``ParityError`` if it computes something else.
        MissingDependencyError: if a package that is needed is not installed.
    """
    options = options or StepOptions()
    bundle = open_bundle(path)
    planned = checked_steps(steps, options, held=[variant.id for variant in bundle.manifest.variants])
    with changed_bundle(bundle) as draft:
        for request in planned:
            STEPS[request].add(draft, options)
    return replace(open_bundle(path), made=tuple(draft.made), dropped=tuple(draft.dropped))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One step of ``add_each``, and what came of it."""

    request: Request
    made: tuple[str, ...] = ()
    """Ids of the variants that it added."""

    dropped: tuple[str, ...] = ()
    """Ids of the variants that it took out, see ``Bundle.dropped``."""

    seconds: float = 0.0
    failure: str = ""
    """Why nothing was added; empty where something was."""


def add_each(path: str | Path, steps: Sequence[Request], options: StepOptions) -> Iterator[Attempt]:
    """Add variants to an existing bundle one by one, so that one that cannot be made costs none of the others.

    Args:
        path: The bundle; it changes with each step that ends well.
        steps: What to add, as ``steps.buildable_steps`` returns them: each comes after those that it is made from.
        options: What the steps need to be told.

    Yields:
        After each step what came of it.

    Raises:
        ArtifactError: if the bundle is damaged.
        FolderError: if it holds files that are not its own, or was changed meanwhile: no other step could end better.
    """
    held = {variant.id for variant in open_bundle(path).manifest.variants}
    failed: set[Request] = set()
    for request in steps:
        lacking = [each for each in STEPS[request].after if each in failed and "-".join(each) not in held]
        if lacking:
            failed.add(request)
            why = f"it is made from {' '.join(lacking[0])}, which could not be made"
            yield Attempt(request=request, failure=why)
            continue
        start = time.perf_counter()
        try:
            bundle = add_variants(path, [request], options)
        except FolderError:
            raise
        except IvdrError as error:
            failed.add(request)
            yield Attempt(request=request, failure=error.message, seconds=time.perf_counter() - start)
            continue
        held = {variant.id for variant in bundle.manifest.variants}
        yield Attempt(
            request=request,
            made=bundle.made,
            dropped=bundle.dropped,
            seconds=time.perf_counter() - start,
        )


def choose_outputs(info: CheckpointInfo, *, include_stale: bool) -> tuple[str, ...]:
    """Name the outputs to export, in order.

    Args:
        info: Of the checkpoint.
        include_stale: Also take a head that was trained, but not together with this backbone. A head that was
            never trained is left out either way.
    """
    heads = {"feature": None, "logits": "classifier", "inter": "series_head", "intra": "series_head"}
    valid = info.training.valid_outputs()
    chosen = []
    for output in OUTPUT_NAMES:
        head = heads[output]
        if output in valid or (include_stale and head in info.training.head_steps):
            chosen.append(output)
        elif head in info.training.head_steps:
            _log.warning("%s is left out: its head is stale; --include-stale exports it anyway", output)
    return tuple(chosen)


def add_reference(draft: Draft, checkpoint: Checkpoint) -> None:
    """Add the checkpoint, which the other variants are held against, and the golden clips and videos."""
    from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

    clip, outputs = draft.manifest.clip, draft.manifest.output_names
    with TorchRuntime(checkpoint.model, clip=clip, output_names=outputs) as reference:
        expected = reference_outputs(reference, checkpoint.golden)
    shutil.copyfile(checkpoint.path, draft.add_file(CHECKPOINT_FILE, kind="model"))
    videos = make_golden_videos(draft.folder)
    for video in videos:
        draft.kinds[video] = "golden"
    clips = {video: load_clips(draft.folder / video, clip, GOLDEN_PLAN).video for video in videos}
    draft.add_file(GOLDEN_FILE, kind="golden")
    write_golden(draft.folder, Golden(video=checkpoint.golden, expected=expected, clips=clips))
    draft.manifest = replace(
        draft.manifest,
        outputs=tuple(OutputSpec(name=name, shape=expected[name].shape[1:]) for name in outputs),
    )
    draft.add_variant(Variant(id=REFERENCE_ID, runtime="torch", precision="fp32", files=(CHECKPOINT_FILE,)))


def checked_steps(
    steps: Sequence[Request], options: StepOptions, *, held: Sequence[str] = ()
) -> list[Request]:
    """Plan steps, and refuse what cannot be built here before the minutes of work that it would waste."""
    planned = plan_steps(steps, held=held)
    for request in planned:
        STEPS[request].check(options)
    return planned


def _with_export_versions(provenance: Provenance) -> Provenance:
    """Add the time of this export, and the packages that shaped the exported files."""
    versions = {
        f"export:{name}": _installed(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "av")
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(provenance, created_at=now, packages={**provenance.packages, **versions})


def _installed(name: str) -> str:
    return str(importlib.import_module(name).__version__)
