"""Which variant of a bundle runs here, where, and why; and opening it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ivdr_deploy._text import QUOTED, cut, few, quoted
from ivdr_deploy.artifacts.bundle import Bundle, open_bundle
from ivdr_deploy.artifacts.kinds import Kind, identify
from ivdr_deploy.artifacts.manifest import SHOWN_VARIANTS, Variant
from ivdr_deploy.artifacts.speed import this_machine
from ivdr_deploy.environment import engine_threads, has_nvidia_driver
from ivdr_deploy.errors import EngineIncompatibleError
from ivdr_deploy.runtimes.base import OpenRequest, Runtime
from ivdr_deploy.runtimes.registry import REGISTRY, load_runtime, misfit, missing_instructions
from ivdr_deploy.spec import Device


def choose_variant(
    bundle: Bundle,
    variant: str | None = None,
    *,
    device: Device | None = None,
    threads: int | None = None,
) -> tuple[Variant, Device, str]:
    """Decide what runs: the variant, the device, and the reason for people.

    Args:
        bundle: The bundle.
        variant: Id of a variant that was asked for, verified or not; None: only verified ones are looked at, a GPU
            before the CPU, then in the order of the registry, unless another one was measured to be faster than the
            first on this kind of machine. Machine code is never chosen unasked: to open a bundle must not mean to run
            what somebody put into it.
        device: The device that was asked for.
        threads: Threads on a CPU; a speed that was measured with another number says nothing.

    Raises:
        ArtifactError: if the bundle has no such variant.
        EngineIncompatibleError: if no verified variant can run here; says why not, for each.
        MissingDependencyError: if one could, were a package there.
    """
    devices: tuple[Device, ...] = (
        (device,) if device else ("cuda", "cpu") if has_nvidia_driver() else ("cpu",)
    )
    if variant is not None:
        wanted = bundle.variant(variant)
        fitting = [place for place in devices if not misfit(wanted, place)]
        # Where it fits nowhere, opening it says why, in the runtime's own words.
        place = fitting[0] if fitting else device or wanted.target.device or devices[-1]
        return wanted, place, "it was asked for"
    refusals = {held.id: held.unverified_reason for held in bundle.manifest.variants if not held.verified}
    verified = []
    for held in bundle.manifest.variants:
        if held.verified and REGISTRY[held.runtime].machine_code:
            refusals[held.id] = "it is machine code, which runs only when it is asked for"
        elif held.verified:
            verified.append(held)
    verified.sort(key=lambda held: REGISTRY[held.runtime].rank)
    for place in devices:
        for held in verified:
            reason = misfit(held, place)
            if not reason:
                taken, why = _faster(verified, held, place, threads)
                return taken, place, why + (f" ({_listed(refusals)})" if refusals else "")
            refusals[held.id] = reason
    for held in verified:
        if held.target.device in (None, *devices):
            load_runtime(held.runtime)  # where only a package is missing, its absence is the error
    reasons = _listed(refusals) if refusals else "it holds none"
    raise EngineIncompatibleError(
        f"{bundle.path}: no verified variant can run here on {' or '.join(devices)} ({reasons})",
        hint="install what is missing (`ivdr doctor`), ask for a variant by name, or export the model again here",
    )


def _listed(refusals: Mapping[str, str]) -> str:
    return few(
        [f"{cut(name, QUOTED)}: {why}" for name, why in refusals.items()], most=SHOWN_VARIANTS, joint="; "
    )


def _faster(
    verified: Sequence[Variant], first: Variant, device: Device, threads: int | None
) -> tuple[Variant, str]:
    """Return the fastest of some variants, and the reason, as far as was measured on this kind of machine.

    What comes first in the order stays where its speed is not known, or another one's may be chance: its interval must
    lie above that of the first.
    """
    why = "the first verified variant that fits"
    if first.speed is None:  # nothing to compare with, and the machine need not be looked at
        return first, why
    machine, least = this_machine(device, threads), first.speed.high
    if not machine.is_known:
        return first, why
    known = [
        held
        for held in verified
        if held.speed is not None and (held.speed.machine, held.speed.batch) == (machine, first.speed.batch)
    ]
    if first not in known:
        return first, why
    known.sort(key=lambda held: held.speed.over_reference if held.speed else 0.0, reverse=True)
    for held in known:
        assert held.speed is not None
        if held != first and held.speed.low > least and not misfit(held, device):
            return held, (
                f"the fastest verified variant that fits: {held.speed}; {first.id}, the first, "
                f"{first.speed.over_reference:.2f} times"
            )
    measured = f": {first.speed}" if len(known) > 1 else ""
    return first, why + (f", and none was measured to be surely faster{measured}" if measured else "")


def reference_id(path: str | Path) -> str | None:
    """Return the id of the reference of a bundle; None where there is none, or ``path`` is no bundle."""
    kind, path = identify(path)
    reference = open_bundle(path).manifest.reference if kind is Kind.BUNDLE else None
    return None if reference is None else reference.id


def open_variant(
    bundle: Bundle, variant: Variant, *, device: Device = "cpu", threads: int | None = None
) -> Runtime:
    """Open one of a bundle's variants without replaying the golden clips; arguments and errors as of ``open_model``."""
    if reason := missing_instructions(variant.target.instruction_set):
        raise EngineIncompatibleError(
            f"{bundle.path}: {variant.id} cannot run here: {reason}",
            hint="take another variant, or export one on this machine",
        )
    threads = threads or engine_threads()
    made_for = variant.target.threads
    if device == "cpu" and made_for not in (None, threads):
        raise EngineIncompatibleError(
            f"{bundle.path}: {variant.id} was made for {quoted(made_for)} threads, and would get {threads}",
            hint=f"set OMP_NUM_THREADS={quoted(made_for)}, or take another variant",
        )
    manifest = bundle.manifest
    source = ""
    if variant.derived_from is not None:
        # A plan is built from the ONNX file, which is itself derived from the checkpoint.
        origins = [held for held in manifest.variants if held.id == variant.derived_from]
        source = manifest.entry(origins[0].files[0]).sha256 if origins else ""
    request = OpenRequest(
        variant=variant,
        path=bundle.variant_file(variant),
        clip=manifest.clip,
        output_names=manifest.output_names,
        device=device,
        threads=threads,
        source_sha256=source,
        labels=manifest.labels,
    )
    return load_runtime(variant.runtime).open_variant(request)
