"""The bundle: a folder with one model in one or more variants, its contract, and proof that they agree.

``manifest.json`` lists every file with its size and digest, and carries a digest of itself, so that a bundle
is either exactly what ``ivdr export`` wrote or refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ivdr_deploy._files import atomic_directory, locked, sha256_file
from ivdr_deploy._text import as_text, quoted, quoted_few
from ivdr_deploy.artifacts.golden import GOLDEN_FILE, Golden, read_golden
from ivdr_deploy.artifacts.manifest import (
    ADD_PLAN,
    EXPORT_AGAIN,
    MANIFEST_FILE,
    SHOWN_VARIANTS,
    ArtifactManifest,
    FileEntry,
    FileKind,
    Variant,
    file_entry,
    load_manifest,
    write_manifest,
)
from ivdr_deploy.artifacts.model_card import MODEL_CARD_FILE, render_model_card
from ivdr_deploy.errors import ArtifactError, FolderError


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A bundle whose files have all been checked; see ``open_bundle``."""

    path: Path
    manifest: ArtifactManifest
    made: tuple[str, ...] = field(default=(), compare=False)
    """Ids of the variants that were made, and run where they can be, by the export that returns this; empty for a
    bundle that was only opened."""

    dropped: tuple[str, ...] = field(default=(), compare=False)
    """Ids of the variants that the export took out: plans of a file that it made anew."""

    def golden(self) -> Golden:
        """Read the golden clips and what is expected of them; empty where the bundle has none.

        Raises:
            ArtifactError: if the file does not hold what the manifest promises.
        """
        manifest = self.manifest
        listed = {entry.path for entry in manifest.files if entry.kind == "golden"}
        golden = Golden()
        if GOLDEN_FILE in listed:
            golden = read_golden(self.path, clip=manifest.clip, outputs=manifest.outputs)
        if differing := listed - {GOLDEN_FILE} ^ set(golden.clips):
            raise ArtifactError(
                f"{self.path}: a golden video without recorded clips, or clips without their video: "
                f"{_some(sorted(differing))}",
                hint=EXPORT_AGAIN,
            )
        return golden

    def variant(self, variant_id: str) -> Variant:
        """Find a variant by its id.

        Raises:
            ArtifactError: if the bundle does not hold it; names those it holds.
        """
        for variant in self.manifest.variants:
            if variant.id == variant_id:
                return variant
        held = quoted_few([variant.id for variant in self.manifest.variants], most=SHOWN_VARIANTS)
        hint = f"{ADD_PLAN} adds a TensorRT plan" if "trt" in variant_id else ""
        raise ArtifactError(
            f"{self.path} has no variant {quoted(variant_id)}; its variants are: {held}", hint=hint
        )

    def variant_file(self, variant: Variant) -> Path:
        """Return the path of the file that the variant's runtime opens."""
        return self.path / variant.files[0]

    def copy_serving_files(self, dest: str | Path, variant: Variant) -> Bundle:
        """Copy what serving one variant needs into an existing folder, as a bundle of its own.

        Returns:
            The smaller bundle: that variant, the golden clips and videos, and the model card. Everything else in
            its manifest is the same.
        """
        dest = Path(dest)
        kept = tuple(
            entry
            for entry in self.manifest.files
            if entry.kind in ("golden", "document") or entry.path in variant.files
        )
        for entry in kept:
            (dest / entry.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / entry.path, dest / entry.path)
        manifest = replace(self.manifest, files=kept, variants=(variant,))
        write_manifest(dest, manifest)
        return Bundle(path=dest, manifest=manifest)


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check every file it lists; files that it does not list are ignored.

    Raises:
        ArtifactError: if ``path`` is no bundle, or a file is missing, cut short or changed; names the file.
    """
    path = Path(path)
    source = path / MANIFEST_FILE
    if not source.is_file():
        what = (
            "a folder without manifest.json"
            if path.is_dir()
            else "not a folder"
            if path.exists()
            else "absent"
        )
        raise ArtifactError(
            f"{path} is not a bundle: it is {what}", hint="`ivdr export CHECKPOINT -o BUNDLE` makes one"
        )
    manifest = load_manifest(source)
    for entry in manifest.files:
        _check_file(path, entry)
    return Bundle(path=path, manifest=manifest)


@dataclass(kw_only=True)
class Draft:
    """A bundle in the making: a folder that nobody sees yet, and what its manifest will say."""

    folder: Path
    manifest: ArtifactManifest
    """All but ``files`` and ``variants``, which follow from what is added."""

    variants: list[Variant] = field(default_factory=list)
    kinds: dict[str, FileKind] = field(default_factory=dict)
    """Files by name; each is written before the draft is finished."""

    made: list[str] = field(default_factory=list)
    """Ids of the variants that were added."""

    dropped: list[str] = field(default_factory=list)
    """Ids of the variants that were taken out because what they were made from has changed."""

    def add_file(self, name: str, *, kind: FileKind) -> Path:
        """Announce a file and return the path to write it to; one of the same name is taken away."""
        self.kinds[name] = kind
        path = self.folder / name
        path.unlink(missing_ok=True)  # it may be a link into the bundle that is being changed
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_variant(self, variant: Variant) -> None:
        """Add a variant, in the place of one with the same id; its files have been announced."""
        for former in [held for held in self.variants if held.id == variant.id]:
            self._take_out(former, but=_all_files(variant))
        self.variants.append(variant)
        self.made.append(variant.id)

    def _take_out(self, variant: Variant, *, but: Collection[str] = ()) -> None:
        """Remove a variant with its files, except for those that another one has too."""
        self.variants.remove(variant)
        shared = {name for other in self.variants for name in other.files}
        for name in _all_files(variant) - {*but} - shared:
            self.kinds.pop(name, None)  # the record of a verification may be absent
            (self.folder / name).unlink(missing_ok=True)

    def _drop_outdated(self) -> None:
        """Take out the plans of an ONNX file that is another one now: their sidecars name the former one.

        Everything else that was made from it was proved by itself, against the same checkpoint.
        """
        before = {entry.path: entry.sha256 for entry in self.manifest.files}
        changed = {
            variant.id
            for variant in self.variants
            if variant.id in self.made
            and (name := variant.files[0]) in before
            and sha256_file(self.folder / name) != before[name]
        }
        for variant in list(self.variants):
            if (
                variant.runtime == "tensorrt"
                and variant.derived_from in changed
                and variant.id not in self.made
            ):
                self._take_out(variant)
                self.dropped.append(variant.id)

    def finish(self) -> None:
        """Describe every file, and write the model card and, last, the manifest."""
        self._drop_outdated()
        card = self.add_file(MODEL_CARD_FILE, kind="document")
        files = [
            file_entry(self.folder, name, kind=kind)
            for name, kind in self.kinds.items()
            if name != MODEL_CARD_FILE
        ]
        manifest = replace(self.manifest, files=tuple(files), variants=tuple(self.variants))
        golden = Bundle(path=self.folder, manifest=manifest).golden()
        golden_clips = 0 if golden.video is None else len(golden.video)
        card.write_text(render_model_card(manifest, golden_clips=golden_clips), encoding="utf-8")
        files.append(file_entry(self.folder, MODEL_CARD_FILE, kind="document"))
        write_manifest(self.folder, replace(manifest, files=tuple(files)))


def _all_files(variant: Variant) -> set[str]:
    """Name the files that go when a variant goes: its own, and the record of its verification."""
    return {*variant.files, *([variant.verification.record] if variant.verification else [])}


@contextmanager
def new_bundle(out: Path, manifest: ArtifactManifest) -> Iterator[Draft]:
    """Make a bundle; it takes the place of an older one at ``out`` when the block ends well, and not before.

    Args:
        out: Folder to write.
        manifest: What the manifest will say; files and variants are added through the draft.

    Raises:
        FolderError: if ``out`` holds something that is not ours to replace.
    """
    check_replaceable(out)
    with ExitStack() as swapping, atomic_directory(out) as folder:
        draft = Draft(folder=folder, manifest=replace(manifest, files=(), variants=()))
        yield draft
        draft.finish()
        swapping.enter_context(locked(out))  # until the two have changed places
        check_replaceable(out)  # again: the work took minutes, in which somebody may have put something there


@contextmanager
def changed_bundle(bundle: Bundle) -> Iterator[Draft]:
    """Change a bundle, for example add a variant: the old one stays as it was unless the block ends well.

    Raises:
        FolderError: if the bundle was changed by somebody else in the meantime, or holds files that are not its own.
    """
    check_replaceable(bundle.path)
    _require_unchanged(bundle)
    with ExitStack() as swapping, atomic_directory(bundle.path) as folder:
        for entry in bundle.manifest.files:
            _link_or_copy(bundle.path / entry.path, folder / entry.path)
        draft = Draft(
            folder=folder,
            manifest=bundle.manifest,
            variants=list(bundle.manifest.variants),
            kinds={entry.path: entry.kind for entry in bundle.manifest.files},
        )
        yield draft
        draft.finish()
        swapping.enter_context(locked(bundle.path))  # until the two have changed places
        check_replaceable(bundle.path)
        _require_unchanged(bundle)


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an empty folder or a bundle with nothing else in it.

    Raises:
        FolderError: otherwise.
    """
    if not out.exists():
        return
    hint = "give another -o, or remove it yourself"
    if not out.is_dir():
        raise FolderError(f"{out} exists and is a file", hint=hint)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if not found:
        return
    try:
        manifest = load_manifest(out / MANIFEST_FILE)
    except (OSError, ArtifactError) as error:
        raise FolderError(f"{out} exists and is not a bundle", hint=hint) from error
    if foreign := sorted(found - {MANIFEST_FILE, *(entry.path for entry in manifest.files)}):
        raise FolderError(
            f"{out} holds files that are not the bundle's: {_some(foreign)}",
            hint="move them elsewhere: the folder is replaced as a whole",
        )


def _require_unchanged(bundle: Bundle) -> None:
    """Refuse to go on from a bundle that is no longer the one that was opened."""
    source = bundle.path / MANIFEST_FILE
    if not source.is_file() or load_manifest(source) != bundle.manifest:
        raise FolderError(f"{bundle.path} was changed by another process", hint="run the same command again")


def _some(names: Sequence[str]) -> str:
    return quoted_few([as_text(name) for name in names], most=3)


def _link_or_copy(source: Path, target: Path) -> None:
    """Put a file of the old bundle into the new one, without a second copy where the file system allows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_file(folder: Path, entry: FileEntry) -> None:
    relative = PurePosixPath(entry.path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ArtifactError(
            f"{folder / MANIFEST_FILE} lists {quoted(entry.path)}, which lies outside the bundle"
        )
    path = folder / relative
    if not os.path.isfile(path):  # unlike Path.is_file, no OSError for a name that is too long
        raise ArtifactError(f"{path} is listed in the manifest, but missing", hint=EXPORT_AGAIN)
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise ArtifactError(
            f"{path} has {size} bytes, the manifest says {quoted(entry.size_bytes)}", hint=EXPORT_AGAIN
        )
    digest = sha256_file(path)
    if digest != entry.sha256:
        raise ArtifactError(
            f"{path} was changed: its SHA-256 begins {digest[:12]}, the manifest says {entry.sha256[:12]}",
            hint=EXPORT_AGAIN,
        )
