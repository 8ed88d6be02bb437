"""The endpoint without a server: requests in, one answer for each out. A server only carries them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ivdr_deploy import __version__, errors
from ivdr_deploy.artifacts.bundle import MANIFEST_FILE, read_manifest
from ivdr_deploy.errors import ArtifactError, IvdrError, ServerError, VideoError
from ivdr_deploy.pipeline import VideoPredictor, VideoResult
from ivdr_deploy.records import from_dict
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core.schema import (
    Options,
    Response,
    chosen_outputs,
    describe_result,
    is_finite,
    parse_request,
)
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.video.clips import Clips

logger = logging.getLogger(__name__)

STATUS: tuple[tuple[type[IvdrError], int], ...] = (
    (errors.OptionError, 422),  # understood, but not to be had
    (errors.RequestError, 400),
    (errors.VideoLimitError, 413),
    (errors.NoVideoStreamError, 415),
    (errors.VideoDecodeError, 422),  # a readable file, but its pictures are damaged
    (errors.VideoTimeoutError, 504),
    (errors.VideoError, 400),
)
"""HTTP status of every error one request can cause; the first match counts, and 500 is what is left. A full
queue is answered by the server itself, with 503."""


class InferenceService:
    """Answers batches of requests with one loaded model. ``handle`` is called from one thread at a time."""

    def __init__(self, predictor: VideoPredictor, settings: ServiceSettings) -> None:
        self.predictor = predictor
        self.settings = settings
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")

    @classmethod
    def open(cls, bundle: Path, settings: ServiceSettings) -> Self:
        """Load a bundle; its golden clips have been replayed when this returns.

        Raises:
            ArtifactError: if the bundle is damaged, was exported by an incompatible ``ivdr_deploy``, or its
                golden clips do not agree.
        """
        source = bundle / MANIFEST_FILE
        if source.is_file():
            _check_version(read_manifest(source.read_bytes(), where=str(source)).ivdr_version)
        model = open_model(
            bundle,
            runtime=settings.runtime,
            precision=settings.precision,
            device=settings.device,
            threads=settings.threads,
        )
        service = cls(VideoPredictor(model, limits=settings.limits), settings)
        # The decoder is imported when a video is opened: a broken one must show now, not in some answer.
        with suppress(VideoError):
            service.predictor.load(b"no video")
        return service

    @classmethod
    def from_config(cls, bundle: Path, values: Mapping[str, Any]) -> Self:
        """Load a bundle with the settings of the ``handler`` table of ``model-config.yaml``.

        Raises:
            ConfigError: if a setting is unknown or wrong.
            ArtifactError: as ``open``.
        """
        return cls.open(bundle, from_dict(ServiceSettings, values, where="model-config.yaml: handler"))

    def handle(self, requests: Sequence[Mapping[str, Any] | None]) -> list[Response]:
        """Answer a batch: decode at the same time, run the network once, answer each by itself.

        Args:
            requests: The named parts of each (see ``schema.parse_request``); None asks for ``describe``.

        Returns:
            One response per request, in order. A request that fails changes no other answer.
        """
        waiting = {
            i: self._decoders.submit(self._prepare, parts)
            for i, parts in enumerate(requests)
            if parts is not None
        }
        answers: dict[int, Response] = {}
        good: list[tuple[int, Options, Clips]] = []
        for i, future in waiting.items():
            error = future.exception()
            if error is None:
                good.append((i, *future.result()))
            else:
                answers[i] = _failure(error)
        results = self.predictor.infer([clips for _, _, clips in good]) if good else []
        for (i, options, clips), result in zip(good, results, strict=True):
            answers[i] = self._success(result, options, num_clips=len(clips.video))
        described = Response(status=200, body=self.describe(), outcome="described")
        return [answers.get(i, described) for i in range(len(requests))]

    def describe(self) -> dict[str, Any]:
        """Return what is loaded, and how closely the golden clips agreed when it was loaded."""
        model = self.predictor.model
        return {
            "name": model.name,
            "version": model.version,
            "contract_hash": model.contract_hash,
            "labels": list(model.labels),
            "outputs": list(model.output_names),
            "runtime": model.runtime.description,
            "golden_max_abs_diff": dict(model.golden_max_abs_diff),
            "ivdr_version": __version__,
        }

    def close(self) -> None:
        """Stop the decoders and free the model."""
        self._decoders.shutdown()
        self.predictor.model.runtime.close()

    def _prepare(self, parts: Mapping[str, Any]) -> tuple[Options, Clips]:
        request = parse_request(parts)
        chosen_outputs(request.options, self.predictor.model)  # refuse before the work of decoding
        num_clips = request.options.num_clips or self.settings.num_clips
        return request.options, self.predictor.load(request.video, num_clips=num_clips)

    def _success(self, result: VideoResult, options: Options, *, num_clips: int) -> Response:
        if not is_finite(result):
            return _failure(ServerError("the network gave values that are not finite numbers"))
        return Response(
            status=200,
            body=describe_result(result, self.predictor.model, options=options, top_k=self.settings.top_k),
            outcome="ok",
            clips=num_clips,
            stage_seconds={
                "decode": result.decode_ms / 1000.0,
                "preprocess": result.preprocess_ms / 1000.0,
                "infer": result.infer_ms / 1000.0,
            },
        )


def status_of(error: IvdrError) -> int:
    """Return the HTTP status of an error, from the table above."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def _failure(error: BaseException) -> Response:
    if isinstance(error, IvdrError):
        return Response(status=status_of(error), body=error.to_dict(), outcome=error.code)
    # A defect of ours that one video brings to light must not take the other requests of the batch with it.
    logger.error("a request failed unexpectedly", exc_info=error)
    body = {
        "code": "internal",
        "message": f"unexpected {type(error).__name__}",
        "hint": "see the log of the worker",
    }
    return Response(status=500, body=body, outcome="internal")


def _check_version(recorded: str) -> None:
    """Refuse a bundle of another release line: equal major version, and before 1.0 equal minor version."""
    line = 2 if recorded.startswith("0.") else 1
    if recorded.split(".")[:line] != __version__.split(".")[:line]:
        raise ArtifactError(
            f"the bundle was exported with ivdr_deploy {recorded}, this worker has {__version__}",
            hint=f"install 'ivdr-deploy=={recorded}' in the worker's environment, or export the model again",
        )
