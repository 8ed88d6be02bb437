"""Every way to add a variant to a bundle, by engine and precision: what it needs, and what it is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ivdr_deploy._optional import import_onnxruntime, require
from ivdr_deploy._text import quoted
from ivdr_deploy.artifacts.bundle import Draft
from ivdr_deploy.errors import ConfigError, IvdrError
from ivdr_deploy.export.aoti_steps import add_aoti, package_targets
from ivdr_deploy.export.calibration import Calibration
from ivdr_deploy.export.int8_steps import add_aoti_int8, add_onnx_int8, add_onnx_trt, holds_onnx_trt
from ivdr_deploy.export.onnx_steps import add_onnx
from ivdr_deploy.export.torch_steps import add_torch, require_gpu
from ivdr_deploy.export.trt_steps import add_tensorrt
from ivdr_deploy.spec import Engine, Precision

Request = tuple[Engine, Precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    """What some steps need to be told."""

    calibration: Calibration | None = None
    """Videos for int8 and fp8."""

    compute_capabilities: Sequence[str] | None = None
    """GPUs that a plan is for; see ``to_tensorrt.choose_targets``."""


@dataclass(frozen=True, slots=True)
class Step:
    """One way to add a variant."""

    add: Callable[[Draft, StepOptions], None]
    check: Callable[[StepOptions], None]
    """Raises before the minutes of work that something missing would waste."""

    after: tuple[Request, ...] = field(default=())
    """Steps whose variants it is made from."""


def requests(pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Look up what was asked for by the names of engine and precision.

    Raises:
        ConfigError: if there is no such engine in that precision.
    """
    known: dict[tuple[str, str], Request] = {request: request for request in STEPS}
    for engine, precision in pairs:
        if (engine, precision) not in known:
            raise ConfigError(
                f"no {quoted(engine)} engine in {quoted(precision)} can be exported",
                hint="engines and precisions: " + ", ".join(f"{one} {other}" for one, other in STEPS),
            )
    return [known[pair] for pair in pairs]


def plan_steps(asked: Iterable[Request], *, held: Iterable[str] = ()) -> list[Request]:
    """Order steps so that each comes after those that it is made from; these are added where the bundle lacks them.

    Args:
        asked: What was asked for.
        held: Ids of the variants that the bundle has.
    """
    held, planned = set(held), list[Request]()

    def visit(request: Request) -> None:
        if request in planned:
            return
        for needed in STEPS[request].after:
            if f"{needed[0]}-{needed[1]}" not in held:
                visit(needed)
        planned.append(request)

    for request in asked:
        visit(request)
    return planned


def buildable_steps(options: StepOptions) -> tuple[list[Request], dict[Request, str]]:
    """Return every step that can be taken here, and for each other one the reason why not."""
    reasons = {}
    for request, step in STEPS.items():
        try:
            step.check(options)
        except IvdrError as error:
            reasons[request] = error.message
    return [request for request in STEPS if request not in reasons], reasons


def _check_onnx(options: StepOptions) -> None:
    for package in ("torch", "torchvision", "onnx", "onnxscript"):
        require(package, extra="export")
    import_onnxruntime()  # each exported model is run and compared


def _check_int8(options: StepOptions) -> None:
    _check_onnx(options)
    _calibration(options)


def _check_aoti_int8(options: StepOptions) -> None:
    _check_onnx(options)  # before anything looks at the machine through torch
    package_targets("int8")
    _calibration(options)


def _check_tensorrt(options: StepOptions, precision: Precision = "fp32") -> None:
    _check_onnx(options)
    from ivdr_deploy.export.to_tensorrt import choose_targets

    choose_targets(options.compute_capabilities, precision)


def _calibration(options: StepOptions) -> Calibration:
    if options.calibration is None:
        raise ConfigError(
            "int8 and fp8 need real videos to calibrate with",
            hint="give a list of some tens of them: --calibrate LIST; their labels are not used",
        )
    return options.calibration


def _calibrated_plan(precision: Literal["int8", "fp8"]) -> Step:
    def check(options: StepOptions) -> None:
        _check_tensorrt(options, precision)
        _calibration(options)

    def add(draft: Draft, options: StepOptions) -> None:
        calibration = _calibration(options)
        if not holds_onnx_trt(draft, calibration, precision):  # another plan may be of it, for another GPU
            add_onnx_trt(draft, calibration, precision)
        add_tensorrt(draft, options.compute_capabilities, precision=precision)

    return Step(add, check, (("onnx", "fp32"),))


def _by_torch(
    precision: Precision,
    add: Callable[[Draft, Precision], None],
    check_machine: Callable[[Precision], object],
) -> Step:
    def check(options: StepOptions) -> None:
        for package in ("torch", "torchvision"):
            require(package, extra="export")
        check_machine(precision)

    return Step(lambda draft, _: add(draft, precision), check)


STEPS: dict[Request, Step] = {
    ("onnx", "fp32"): Step(lambda draft, _: add_onnx(draft, "fp32"), _check_onnx),
    ("onnx", "fp16"): Step(lambda draft, _: add_onnx(draft, "fp16"), _check_onnx, (("onnx", "fp32"),)),
    ("onnx", "int8"): Step(
        lambda draft, options: add_onnx_int8(draft, _calibration(options)), _check_int8, (("onnx", "fp32"),)
    ),
    ("torch", "fp16"): _by_torch("fp16", add_torch, require_gpu),
    ("torch", "bf16"): _by_torch("bf16", add_torch, require_gpu),
    ("aoti", "fp32"): _by_torch("fp32", add_aoti, package_targets),
    ("aoti", "bf16"): _by_torch("bf16", add_aoti, package_targets),
    ("aoti", "fp16"): _by_torch("fp16", add_aoti, package_targets),
    ("aoti", "int8"): Step(
        lambda draft, options: add_aoti_int8(draft, _calibration(options)),
        _check_aoti_int8,
        (("onnx", "fp32"),),
    ),
    ("trt", "fp32"): Step(
        lambda draft, options: add_tensorrt(draft, options.compute_capabilities),
        _check_tensorrt,
        (("onnx", "fp32"),),
    ),
    ("trt", "fp16"): Step(
        lambda draft, options: add_tensorrt(draft, options.compute_capabilities, precision="fp16"),
        _check_tensorrt,
        (("onnx", "fp16"),),
    ),
    ("trt", "int8"): _calibrated_plan("int8"),
    ("trt", "fp8"): _calibrated_plan("fp8"),
}
