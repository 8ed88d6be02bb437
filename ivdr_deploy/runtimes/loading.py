"""Opens a bundle, a checkpoint or an ONNX file: what runs is what was asked for, and it has been checked."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ivdr_deploy._files import sha256_file
from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.artifacts.archive import unpacked_bundle
from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.kinds import Kind, identify
from ivdr_deploy.artifacts.manifest import OutputParity, Variant
from ivdr_deploy.environment import engine_threads
from ivdr_deploy.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    ContractMismatchError,
    EngineIncompatibleError,
    GoldenMismatchError,
    IvdrError,
)
from ivdr_deploy.records import to_dict
from ivdr_deploy.runtimes.base import LoadedModel, Runtime, infer_all, not_finite
from ivdr_deploy.runtimes.compare import describe_failures
from ivdr_deploy.runtimes.proof import prove_decoder, replay_golden
from ivdr_deploy.runtimes.registry import load_runtime, missing_instructions
from ivdr_deploy.runtimes.variants import choose_variant, open_variant
from ivdr_deploy.spec import ClipSpec, DecoderName, Device

_log = logging.getLogger(__name__)

UNPROVED = (
    "an ONNX file by itself holds no golden clips, so nothing proves that it computes right; its bundle does"
)


def open_model(
    path: str | Path,
    *,
    variant: str | None = None,
    device: Device | None = None,
    threads: int | None = None,
    decoder: DecoderName = "pyav",
    expected_contract: ClipSpec | str | None = None,
) -> LoadedModel:
    """Open a model and check it.

    Args:
        path: A bundle, an archive of one (``.mar``), a checkpoint (``.safetensors``) or an exported ``.onnx`` file.
        variant: Which of a bundle's variants; None takes the best verified one that fits this machine.
        device: Where to run; never another one in its place. None: the GPU where the variant can use it.
        threads: Threads of one operator on the CPU; as many as ``environment.engine_threads`` says when None.
        decoder: The decoder that will read videos; it is held against the golden videos.
        expected_contract: Contract that the model must have, or its hash.

    Returns:
        The model, ready to run. A bundle's golden clips have been replayed on it, and its golden videos decoded. Of an
        ONNX file by itself nothing has been proved, which is logged.

    Raises:
        ArtifactError: if the file or folder is not usable.
        CheckpointError: if the checkpoint is not usable, or gives NaN or infinity on its golden clips.
        ContractMismatchError: if it has another contract; names the fields when the expected contract is
            known.
        GoldenMismatchError: if the golden clips do not give the recorded outputs, or the golden videos not the
            recorded clips.
        EngineIncompatibleError: if no variant can run here, or the file not on this processor.
        DeviceError: if the device is not there.
        ConfigError: if the choice makes no sense for this kind of file.
        MissingDependencyError: if the runtime is not installed.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, found {threads}")
    threads = threads or engine_threads()
    kind, path = identify(path)
    if kind is Kind.BUNDLE:
        bundle = open_bundle(path)
        _check_contract(path, bundle.manifest.clip, expected_contract)
        return _open_from_bundle(bundle, variant, device=device, threads=threads, decoder=decoder)
    if kind is Kind.ARCHIVE:
        with unpacked_bundle(path) as folder:
            bundle = open_bundle(folder)
            _check_contract(path, bundle.manifest.clip, expected_contract)
            model = _open_from_bundle(bundle, variant, device=device, threads=threads, decoder=decoder)
        return replace(model, path=path)
    if kind not in (Kind.CHECKPOINT, Kind.ONNX):
        raise ArtifactError(
            f"{path} is a {kind}, which cannot be run by itself",
            hint="give a bundle folder, an archive (.mar), a checkpoint (.safetensors) or an exported .onnx file",
        )
    if variant is not None:
        raise ConfigError(
            f"{path} is a single file without variants, asked for {quoted(variant)}",
            hint="leave the variant out, or export it with `ivdr export` and give the bundle",
        )
    opened = _open_checkpoint if kind is Kind.CHECKPOINT else _open_onnx
    model = opened(path, device=device or "cpu", threads=threads)
    try:
        _check_contract(path, model.clip, expected_contract)
    except ContractMismatchError:
        model.runtime.close()
        raise
    return model


def bundle_model(
    bundle: Bundle,
    runtime: Runtime,
    variant: Variant,
    *,
    reason: str = "",
    parity: tuple[OutputParity, ...] = (),
    decode_mean_diff: dict[str, float] | None = None,
) -> LoadedModel:
    """Describe one of a bundle's variants that is open.

    Args:
        bundle: Where it comes from.
        runtime: What executes it.
        variant: Which one it is.
        reason: Why it runs, for people.
        parity: What ``replay_golden`` gave.
        decode_mean_diff: What ``prove_decoder`` gave.
    """
    manifest = bundle.manifest
    return LoadedModel(
        path=bundle.path,
        name=manifest.name,
        version=manifest.version,
        clip=manifest.clip,
        view_plan=manifest.view_plan,
        labels=manifest.labels,
        output_names=manifest.output_names,
        runtime=runtime,
        variant=variant.id,
        reason=reason,
        sha256=manifest.entry(variant.files[0]).sha256,
        manifest=to_dict(manifest),
        golden_max_abs_diff={entry.output: entry.max_abs_diff for entry in parity},
        decode_mean_diff=decode_mean_diff or {},
    )


def _open_from_bundle(
    bundle: Bundle,
    wanted: str | None,
    *,
    device: Device | None,
    threads: int,
    decoder: DecoderName,
) -> LoadedModel:
    variant, place, reason = choose_variant(bundle, wanted, device=device, threads=threads)
    golden = bundle.golden()
    decode_mean_diff = prove_decoder(bundle, golden, decoder)
    opened = open_variant(bundle, variant, device=place, threads=threads)
    try:
        parity = replay_golden(golden, opened)
        if failures := describe_failures(parity):
            raise GoldenMismatchError(
                f"{bundle.path}: the golden clips do not give the recorded outputs on {opened.description}:"
                f" {failures}",
                hint="this variant must not be used here; export it again on this machine, or see `ivdr doctor`",
            )
    except BaseException as error:
        with suppress(Exception):  # the first error is the one to know
            opened.close()
        if isinstance(error, IvdrError) or not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise GoldenMismatchError(
            f"{bundle.path}: {opened.description} fails on the golden clips ({reason})",
            hint="this variant must not be used here; export it again on this machine, or see `ivdr doctor`",
        ) from error
    model = bundle_model(
        bundle, opened, variant, reason=reason, parity=parity, decode_mean_diff=decode_mean_diff
    )
    return model if golden.video is None else replace(model, golden=golden.first())


def _open_checkpoint(path: Path, *, device: Device, threads: int) -> LoadedModel:
    load_runtime("torch")  # says which extra is missing
    from ivdr_deploy.artifacts.checkpoint import load_checkpoint
    from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    names = info.training.valid_outputs()
    runtime = TorchRuntime(
        checkpoint.model, clip=info.clip, output_names=names, device=device, threads=threads
    )
    if broken := not_finite(infer_all(runtime, checkpoint.golden)):
        runtime.close()
        raise CheckpointError(
            f"{path} gives NaN or infinity in {', '.join(broken)} on its golden clips",
            hint="its training diverged; use an earlier checkpoint, or train with a lower learning rate",
        )
    return LoadedModel(
        path=path,
        name=path.stem,
        version="checkpoint",
        clip=info.clip,
        view_plan=info.view_plan,
        labels=info.labels if "logits" in names else (),
        output_names=names,
        runtime=runtime,
        variant="torch-fp32",
        reason="a checkpoint runs on torch",
        sha256=sha256_file(path),
        manifest=to_dict(info),
        golden_max_abs_diff={},
        decode_mean_diff={},
    )


def _open_onnx(path: Path, *, device: Device, threads: int) -> LoadedModel:
    load_runtime("onnxruntime")
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    runtime = OrtRuntime(path, device=device, threads=threads)
    metadata = runtime.metadata
    if device == "cpu" and (reason := missing_instructions(metadata.instruction_set)):
        runtime.close()
        raise EngineIncompatibleError(
            f"{path} cannot run here: {reason}", hint="take another file, or export one on this machine"
        )
    _log.warning("%s: %s", path, UNPROVED)
    return LoadedModel(
        path=path,
        name=metadata.name,
        version=metadata.version,
        clip=metadata.contract,
        view_plan=metadata.view_plan,
        labels=metadata.labels,
        output_names=runtime.output_names,
        runtime=runtime,
        variant=f"onnx-{runtime.precision}",
        reason="an ONNX file runs on ONNX Runtime",
        sha256=sha256_file(path),
        manifest=to_dict(metadata),
        golden_max_abs_diff={},
        decode_mean_diff={},
    )


def _check_contract(path: Path, clip: ClipSpec, expected: ClipSpec | str | None) -> None:
    if expected is None:
        return
    if isinstance(expected, ClipSpec):
        fields, expected = clip.differences(expected), expected.contract_hash
    else:
        fields = []
    if clip.contract_hash != expected:
        what = f" ({'; '.join(fields)})" if fields else ""
        raise ContractMismatchError(
            f"{path} was made under the contract {clip.contract_hash[:12]}, expected {expected[:12]}{what}",
            hint="the two turn a video into different inputs; compare them with `ivdr show`",
        )
