"""Opens a bundle, a checkpoint or an ONNX file: what runs is what was asked for, and it has been checked."""

from __future__ import annotations

from pathlib import Path

from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.errors import ArtifactError, ConfigError, ContractMismatchError, GoldenMismatchError
from ivdr_deploy.runtimes.base import LoadedModel, Runtime
from ivdr_deploy.runtimes.compare import compare_outputs, describe_failures
from ivdr_deploy.spec import ClipSpec, Device, OutputParity, Precision, RuntimeName


def open_model(
    path: str | Path,
    *,
    runtime: RuntimeName | None = None,
    precision: Precision = "fp32",
    device: Device = "cpu",
    threads: int | None = None,
    expected_contract: ClipSpec | str | None = None,
) -> LoadedModel:
    """Open a model and check it.

    Args:
        path: A bundle, a checkpoint (``.safetensors``) or an exported ``.onnx`` file.
        runtime: What executes it; by default ONNX Runtime for a bundle and torch for a checkpoint.
        precision: Which of a bundle's models.
        device: Where to run; never another one in its place.
        threads: Threads of one operator on the CPU; None leaves the choice to the runtime.
        expected_contract: Contract that the model must have, or its hash.

    Returns:
        The model, ready to run. A bundle's golden clips have been replayed on it.

    Raises:
        ArtifactError: if the file or folder is not usable.
        CheckpointError: if the checkpoint is not usable.
        ContractMismatchError: if it has another contract; names the fields when the expected contract is
            known.
        GoldenMismatchError: if the golden clips do not give the recorded outputs.
        ConfigError: if the device is not there, or the choice makes no sense for this kind of file.
        MissingDependencyError: if the runtime is not installed.
    """
    path = Path(path)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, found {threads}")
    if path.is_dir():
        bundle = open_bundle(path)
        _check_contract(path, bundle.manifest.clip, expected_contract)
        return _open_from_bundle(bundle, runtime or "onnxruntime", precision, device=device, threads=threads)
    kinds: dict[str, RuntimeName] = {".safetensors": "torch", ".onnx": "onnxruntime"}
    if path.suffix not in kinds:
        raise ArtifactError(
            f"{path} is {'no model' if path.exists() else 'absent'}",
            hint="give a bundle folder, a checkpoint (.safetensors) or an exported .onnx file",
        )
    if runtime not in (None, kinds[path.suffix]) or precision != "fp32":
        raise ConfigError(
            f"{path} runs on {kinds[path.suffix]} in fp32, asked for {runtime or 'default'} {precision}",
            hint="export it with `ivdr export` and give the bundle",
        )
    opened = _open_checkpoint if path.suffix == ".safetensors" else _open_onnx
    model = opened(path, device=device, threads=threads)
    _check_contract(path, model.clip, expected_contract)
    return model


def open_runtime(
    bundle: Bundle,
    runtime: RuntimeName,
    precision: Precision = "fp32",
    *,
    device: Device = "cpu",
    threads: int | None = None,
) -> Runtime:
    """Open one of a bundle's models without replaying the golden clips; raises as ``open_model`` does."""
    manifest, path = bundle.manifest, bundle.model_file(runtime, precision)
    if runtime == "torch":
        from ivdr_deploy.artifacts.checkpoint import load_checkpoint
        from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

        model = load_checkpoint(path, expected_clip=manifest.clip).model
        return TorchRuntime(
            model, clip=manifest.clip, output_names=manifest.output_names, device=device, threads=threads
        )
    if runtime == "onnxruntime":
        from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

        return OrtRuntime(
            path,
            clip=manifest.clip,
            output_names=manifest.output_names,
            precision=precision,
            device=device,
            threads=threads,
        )
    from ivdr_deploy.runtimes.trt_runtime import TrtRuntime

    sources = ("onnxruntime", precision)
    onnx = next(
        (entry.sha256 for entry in manifest.files if (entry.runtime, entry.precision) == sources), None
    )
    return TrtRuntime(path, clip=manifest.clip, device=device, onnx_sha256=onnx)


def replay_golden(bundle: Bundle, runtime: Runtime) -> tuple[OutputParity, ...]:
    """Run the golden clips and compare with what torch gave when the bundle was exported."""
    video, expected = bundle.golden()
    return compare_outputs(expected, runtime.infer(video), runtime=runtime.name, precision=runtime.precision)


def bundle_model(bundle: Bundle, runtime: Runtime, parity: tuple[OutputParity, ...]) -> LoadedModel:
    """Describe one of a bundle's models that is open.

    Args:
        bundle: Where it comes from.
        runtime: What executes it.
        parity: What ``replay_golden`` gave.
    """
    manifest = bundle.manifest
    return LoadedModel(
        path=bundle.path,
        name=manifest.name,
        version=manifest.version,
        clip=manifest.clip,
        labels=manifest.labels,
        output_names=manifest.output_names,
        runtime=runtime,
        golden_max_abs_diff={entry.output: entry.max_abs_diff for entry in parity},
    )


def _open_from_bundle(
    bundle: Bundle, runtime: RuntimeName, precision: Precision, *, device: Device, threads: int | None
) -> LoadedModel:
    opened = open_runtime(bundle, runtime, precision, device=device, threads=threads)
    parity = replay_golden(bundle, opened)
    if failures := describe_failures(parity):
        opened.close()
        raise GoldenMismatchError(
            f"{bundle.path}: the golden clips do not give the recorded outputs on {opened.description}:"
            f" {failures}",
            hint="this model must not be used here; export it again on this machine, or see `ivdr doctor`",
        )
    return bundle_model(bundle, opened, parity)


def _open_checkpoint(path: Path, *, device: Device, threads: int | None) -> LoadedModel:
    from ivdr_deploy.artifacts.checkpoint import load_checkpoint
    from ivdr_deploy.runtimes.torch_runtime import TorchRuntime

    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    names = info.training.valid_outputs()
    runtime = TorchRuntime(
        checkpoint.model, clip=info.clip, output_names=names, device=device, threads=threads
    )
    return LoadedModel(
        path=path,
        name=path.stem,
        version="checkpoint",
        clip=info.clip,
        labels=info.labels if "logits" in names else (),
        output_names=names,
        runtime=runtime,
        golden_max_abs_diff={},
    )


def _open_onnx(path: Path, *, device: Device, threads: int | None) -> LoadedModel:
    if not path.is_file():
        raise ArtifactError(
            f"{path} is absent", hint="`ivdr export CHECKPOINT -o BUNDLE` makes a bundle with one"
        )
    from ivdr_deploy.runtimes.ort_runtime import OrtRuntime

    runtime = OrtRuntime(path, device=device, threads=threads)
    metadata = runtime.metadata
    return LoadedModel(
        path=path,
        name=metadata.name,
        version=metadata.version,
        clip=metadata.contract,
        labels=metadata.labels,
        output_names=runtime.output_names,
        runtime=runtime,
        golden_max_abs_diff={},
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
