"""A bundle proves itself where it is opened: its golden clips on the runtime, its golden videos on the decoder."""

from __future__ import annotations

from ivdr_deploy.artifacts.bundle import Bundle
from ivdr_deploy.artifacts.golden import GOLDEN_PLAN, Golden
from ivdr_deploy.artifacts.golden_video import DECODE_TOLERANCE, compare_clips
from ivdr_deploy.artifacts.manifest import OutputParity
from ivdr_deploy.errors import GoldenMismatchError, VideoError
from ivdr_deploy.runtimes.base import Runtime, infer_all
from ivdr_deploy.runtimes.compare import compare_outputs
from ivdr_deploy.spec import DecoderName
from ivdr_deploy.video.clips import load_clips


def replay_golden(golden: Golden, runtime: Runtime) -> tuple[OutputParity, ...]:
    """Run the golden clips and compare with what the reference gave for them; empty where there are none."""
    video = golden.video
    if video is None:
        return ()
    return compare_outputs(golden.expected, infer_all(runtime, video), precision=runtime.precision)


def prove_decoder(bundle: Bundle, golden: Golden, decoder: DecoderName) -> dict[str, float]:
    """Decode the golden videos and compare with the recorded clips.

    Returns:
        For each golden video the largest mean difference of a frame, in levels; empty where there are none.

    Raises:
        GoldenMismatchError: if a difference is above the tolerance, or a golden video cannot be decoded here.
    """
    differences = {}
    for name, expected in golden.clips.items():
        try:
            found = load_clips(bundle.path / name, bundle.manifest.clip, GOLDEN_PLAN, decoder=decoder).video
        except VideoError as error:  # the file is as it was written, so this is no fault of a video
            raise GoldenMismatchError(
                f"{bundle.path}: the decoder {decoder} cannot read the golden video {name} ({error.message})",
                hint="this installation lacks a codec, see `ivdr doctor`; or use another decoder",
            ) from error
        differences[name] = compare_clips(expected, found)
    if wrong := {name: value for name, value in differences.items() if not value <= DECODE_TOLERANCE}:
        found_text = ", ".join(f"{name} by {value:.1f}" for name, value in wrong.items())
        raise GoldenMismatchError(
            f"{bundle.path}: the decoder {decoder} does not give the recorded clips; mean levels of a frame differ in "
            f"{found_text} (tolerance {DECODE_TOLERANCE:g})",
            hint="this installation reads videos differently; compare its versions with `ivdr show` and `ivdr doctor`",
        )
    return differences
