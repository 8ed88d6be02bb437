"""A bundle as a TorchServe archive: packed by the real archiver, then read back before it may be seen."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import ivdr_deploy
from ivdr_deploy._files import NO_SPACE, atomic_path, scratch_folder
from ivdr_deploy._optional import pip_install
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.archive import BUNDLE_FOLDER, PACK_AGAIN, opened_archive, seal_archive
from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.artifacts.manifest import MANIFEST_FILE, ArtifactManifest, Variant, read_manifest
from ivdr_deploy.environment import engine_threads
from ivdr_deploy.errors import ArtifactError, MissingDependencyError
from ivdr_deploy.records import require_servable
from ivdr_deploy.runtimes.registry import REGISTRY
from ivdr_deploy.runtimes.variants import choose_variant
from ivdr_deploy.serving.torchserve.settings import (
    EndpointSettings,
    from_model_config,
    to_model_config,
)

HANDLER_FILE = "ivdr_handler.py"
MODEL_CONFIG_FILE = "model-config.yaml"
_ARCHIVE_MANIFEST = "MAR-INF/MANIFEST.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A TorchServe archive that has been read and checked; see ``open_archive``."""

    path: Path
    manifest: ArtifactManifest
    """Of the bundle inside, which holds one variant."""

    settings: EndpointSettings
    reason: str = ""
    """Why this variant was packed, for people; empty for an archive that was read."""


def handler_source() -> Path:
    """Find the handler's file: beside the installed package, or in the checkout that it is imported from."""
    package = Path(ivdr_deploy.__file__).resolve().parent
    for path in (package / "_assets" / HANDLER_FILE, package.parent / "handlers" / HANDLER_FILE):
        if path.is_file():
            return path
    raise MissingDependencyError(
        f"{HANDLER_FILE} lies neither in {package / '_assets'} nor in {package.parent / 'handlers'}",
        hint="the installation is incomplete: pip install --force-reinstall ivdr-deploy",
    )


def why_unverified(variant: Variant) -> str:
    """Say why a variant is served on request only; empty when it is verified."""
    if REGISTRY[variant.runtime].machine_code and variant.verification is None:
        return f"it is machine code, and no `ivdr verify --videos LIST --variant {variant.id}` has judged it"
    return variant.unverified_reason


def build_archive(
    bundle: Path, *, model_store: Path, settings: EndpointSettings, allow_unverified: bool = False
) -> Archive:
    """Pack what serving needs of a bundle into ``model_store/NAME.mar``.

    Args:
        bundle: The bundle.
        model_store: Folder for the archive; made when absent. An older archive there is replaced as a whole.
        settings: Packed with it; nothing has to be typed again to serve it. A variant or device that they leave open is
            decided here, for this machine, and packed as decided.
        allow_unverified: Also pack a variant that was asked for by name and is not verified, or whose verification
            says FAIL. Machine code counts as not verified until it has a verdict over videos.

    Raises:
        ArtifactError: if the bundle is damaged or lacks the variant, the variant is not verified, or the archive holds
            something else.
        EngineIncompatibleError: if the settings leave the variant open and no verified one runs here.
        ConfigError: if its name or version cannot be served, or its view plan takes more clips than a request may cost.
        MissingDependencyError: if a package of the extra ``torchserve`` is not installed.
        OSError: if a file cannot be written; a full disk is named by its folder, the system's temporary one included.
    """
    if find_spec("model_archiver") is None:  # it runs in a process of its own, so it is not imported here
        raise MissingDependencyError(
            "the package 'torch-model-archiver' is not installed",
            hint=f"install it with: {pip_install('torchserve')}",
        )
    opened = open_bundle(bundle)
    name, service = opened.manifest.name, settings.service
    require_servable(name, opened.manifest.version)
    service.view_plan(opened.manifest.view_plan)  # refused here, not by every worker
    variant, device, reason = choose_variant(
        opened,
        service.variant,
        device=service.device,
        threads=service.threads or engine_threads(settings.workers),
    )
    if (why := why_unverified(variant)) and not allow_unverified:
        raise ArtifactError(
            f"{bundle}: {variant.id} must not be served: {why}",
            hint="`ivdr verify BUNDLE --videos LIST` judges it; "
            "`ivdr archive BUNDLE --allow-unverified` packs it all the same",
        )
    settings = replace(settings, service=replace(service, variant=variant.id, device=device))
    target = model_store / f"{name}.mar"
    with scratch_folder("ivdr-archive-") as scratch:
        inside = scratch / "files" / BUNDLE_FOLDER
        inside.mkdir(parents=True)
        packed = opened.copy_serving_files(inside, variant)
        (scratch / MODEL_CONFIG_FILE).write_text(to_model_config(settings), encoding="utf-8")
        made = _run_archiver(scratch, name=name, version=opened.manifest.version)
        seal_archive(made)
        archive = open_archive(made)
        if (archive.manifest, archive.settings) != (packed.manifest, settings):
            raise ArtifactError(f"{target.name} holds another manifest or other settings than were packed")
        with atomic_path(target) as temporary:
            shutil.move(archive.path, temporary)
    return replace(archive, path=target, reason=reason)


def open_archive(path: Path) -> Archive:
    """Read an archive and check everything in it.

    Raises:
        ArtifactError: if it is no archive of ours, or a file in it is missing, changed or added; names the file.
    """
    with opened_archive(path) as archive:
        return _read_archive(path, archive)


def _read_archive(path: Path, archive: zipfile.ZipFile) -> Archive:
    held = set(archive.namelist())
    where = f"{BUNDLE_FOLDER}/{MANIFEST_FILE}"
    for name in (MODEL_CONFIG_FILE, HANDLER_FILE, _ARCHIVE_MANIFEST, where):
        if name not in held:
            raise ArtifactError(f"{path} is not an archive of `ivdr archive`: no {name}", hint=PACK_AGAIN)
    settings = from_model_config(archive.read(MODEL_CONFIG_FILE), where=f"{path}: {MODEL_CONFIG_FILE}")
    manifest = read_manifest(archive.read(where), where=f"{path}: {where}")
    for entry in manifest.files:
        name = f"{BUNDLE_FOLDER}/{entry.path}"
        if name not in held:
            raise ArtifactError(f"{path}: {name[:100]} is missing", hint=PACK_AGAIN)
        with archive.open(name) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a binary stream
        if digest != entry.sha256:
            raise ArtifactError(
                f"{path}: {entry.path} was changed: its SHA-256 begins {digest[:12]}, the manifest says "
                f"{entry.sha256[:12]}",
                hint=PACK_AGAIN,
            )
    described = json.loads(archive.read(_ARCHIVE_MANIFEST))
    expected = {
        "modelName": manifest.name,
        "modelVersion": manifest.version,
        "handler": HANDLER_FILE,
        "configFile": MODEL_CONFIG_FILE,
    }
    found = described.get("model") if isinstance(described, dict) else None
    if found != expected:  # anything else in it is something more that TorchServe would load
        raise ArtifactError(
            f"{path}: {_ARCHIVE_MANIFEST} says {quoted(found)}, expected {expected}", hint=PACK_AGAIN
        )
    return Archive(path=path, manifest=manifest, settings=settings)


def _run_archiver(scratch: Path, *, name: str, version: str) -> Path:
    """Run torch-model-archiver over ``scratch/files``; its copies stay inside ``scratch``."""
    out = scratch / "out"
    out.mkdir()
    # In a process of its own: it deletes the folder NAME of the temporary directory, and TMPDIR moves that.
    # Stored, not deflated: weights hardly shrink, and packing would take ten times longer.
    # -P: with -m alone a file in the working directory, torch.py say, would be imported in a package's place.
    command = [sys.executable, "-P", "-m", "model_archiver.model_packaging"]
    command += ["--model-name", name, "--version", version, "--handler", str(handler_source())]
    command += ["--extra-files", str(scratch / "files"), "--config-file", str(scratch / MODEL_CONFIG_FILE)]
    command += ["--archive-format", "zip-store", "--export-path", str(out)]
    temporary = scratch / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    path = out / f"{name}.mar"
    if done.returncode or not path.is_file():
        for number in map(int, re.findall(r"\[Errno (\d+)\]", done.stderr)):
            if number in NO_SPACE:
                raise OSError(number, os.strerror(number), str(scratch))
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtifactError(
            f"torch-model-archiver could not pack {name} (exit code {done.returncode}): {last[:200]}"
        )
    return path
