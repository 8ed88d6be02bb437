"""The endpoint without a server: a request in, its answer out. A server only carries them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ivdr_deploy import __version__
from ivdr_deploy.artifacts.kinds import Kind, identify
from ivdr_deploy.artifacts.manifest import MANIFEST_FILE, load_manifest
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.errors import ArtifactError, DrainingError, OptionError, VideoOpenError
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.records import require_servable
from ivdr_deploy.results import Outcome, VideoResult
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.serving.core import metrics as counted
from ivdr_deploy.serving.core.answers import bounded, refusal
from ivdr_deploy.serving.core.canary import Canary
from ivdr_deploy.serving.core.counted_runtime import CountedRuntime
from ivdr_deploy.serving.core.metrics import Metrics
from ivdr_deploy.serving.core.parsing import parse_request
from ivdr_deploy.serving.core.schema import (
    Envelope,
    Options,
    PredictRequest,
    Response,
    chosen_outputs,
    chosen_plan,
    describe_loaded,
    describe_result,
)
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.core.timelines import Found, Timelines, check_timeline
from ivdr_deploy.spec import MAX_BATCH
from ivdr_deploy.video.fetch import Fetcher

Render = Callable[[VideoResult, Options], Response]
"""Makes an answer of what the network said."""


class InferenceService:
    """Answers requests with one loaded model. Safe to use from many threads; a context manager.

    Args:
        model: Open and checked; ``close`` closes it.
        settings: What to do with it.
        metrics: Where to count; new ones when None.
        fetcher: Fetches videos by URL; one of the settings when None.

    Raises:
        ConfigError: if the model's view plan takes more clips than a request may cost.
    """

    def __init__(
        self,
        model: LoadedModel,
        settings: ServiceSettings,
        *,
        metrics: Metrics | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.settings = settings
        self.view_plan = settings.view_plan(model.view_plan)
        self.metrics = metrics or Metrics()
        self._draining = False
        self.model = replace(model, runtime=CountedRuntime(model.runtime, self.metrics))
        self._fetcher = fetcher or Fetcher(settings.urls, max_bytes=settings.limits.max_bytes)
        self._predictor = VideoPredictor(
            self.model,
            limits=settings.limits,
            decode=DecodeOptions(
                workers=settings.decode_workers, memory_bytes=settings.decode_memory_mib << 20
            ),
            batch_clips=settings.batch_clips,
        )
        self._timelines = Timelines(self._predictor, settings, self.metrics)

    @classmethod
    def open(cls, bundle: Path, settings: ServiceSettings, *, metrics: Metrics | None = None) -> Self:
        """Load a bundle. When this returns, its golden clips and videos agree and the decode workers answer.

        Raises:
            ArtifactError: if it is no bundle, or a damaged one, was exported by an incompatible ``ivdr_deploy``, or its
                golden clips or videos do not agree.
            ConfigError: if the settings do not fit the bundle, or its name or version cannot be served.
            VideoError: if the decode workers do not work.
        """
        kind, bundle = identify(bundle)
        if kind is not Kind.BUNDLE:
            # The others have settings of their own, no name for a URL, or no golden clips.
            raise ArtifactError(
                f"{bundle} is no bundle (its kind is: {kind})",
                hint="name the bundle that it was made from, or make one with `ivdr export`; an archive is for "
                "TorchServe: `ivdr serve` without --server http",
            )
        manifest = load_manifest(bundle / MANIFEST_FILE)
        _check_version(manifest.ivdr_version)
        require_servable(manifest.name, manifest.version)
        model = open_model(bundle, variant=settings.variant, device=settings.device, threads=settings.threads)
        try:
            service = cls(model, settings, metrics=metrics)
        except BaseException:
            model.runtime.close()
            raise
        try:
            with suppress(VideoOpenError):  # starts the decode workers; a broken one says something else
                service._predictor.load(b"no video")
        except BaseException:
            service.close()
            raise
        return service

    def submit(self, parts: Mapping[str, Any], envelope: Envelope | None = None) -> Future[Response]:
        """Answer a request in the background.

        Args:
            parts: Its named parts; see ``parsing.parse_request``.
            envelope: What HTTP says about it.

        Returns:
            The answer. A request that fails is an answer too: the future has no exception.
        """

        def begin(answer: Future[Response]) -> None:
            request = self._checked(parse_request(parts, envelope or Envelope()))
            if request.video_url is None and request.options.timeline is None:
                self._predict(request, answer, self._described)
            else:
                threading.Thread(target=self._take_time, args=(request, answer), daemon=True).start()

        return self._begun(begin)

    def submit_video(self, request: PredictRequest, render: Render) -> Future[Response]:
        """Answer a request that was taken apart already, in a form of the caller's; else as ``submit``.

        Args:
            request: The video itself, and what is asked about it; no timeline.
            render: Makes the answer of what the network said; runs in a thread of the pipeline.
        """
        return self._begun(lambda answer: self._predict(self._checked(request), answer, render))

    def follow(
        self, parts: Mapping[str, Any], envelope: Envelope | None = None
    ) -> Generator[Found | Response, None, None]:
        """Answer a request for a timeline while it is worked on: yield what is found, and the summary last.

        Where it fails, a ``Response`` that says why comes last. Closing the generator ends the work.

        Args:
            parts: Its named parts; see ``parsing.parse_request``.
            envelope: What HTTP says about it.
        """
        self.metrics.add(counted.BUSY)
        outcome = "client_gone"
        try:
            self._refuse_draining()
            request = self._checked(parse_request(parts, envelope or Envelope()))
            if request.options.timeline is None:
                raise OptionError(
                    "only a timeline comes as a stream of events",
                    hint='add the option "timeline": true, or leave the header Accept out',
                )
            yield from self._timelines.find(self._fetched(request))
            outcome = "ok"
        except Exception as error:  # noqa: BLE001  # as in _begun
            response = refusal(error)
            outcome = response.body["code"]
            yield response
        finally:
            self.metrics.add(counted.BUSY, -1.0)
            self.metrics.add(counted.REQUESTS, label=outcome)

    def refuse(self, error: Exception) -> Response:
        """Return the answer to a request that a server could not or would not read, and count it."""
        return self._counted(error)

    def canary(self, *, every_seconds: float, seconds_per_clip: float) -> Canary | None:
        """Make what looks after the network; None where the bundle holds no golden clip.

        Args:
            every_seconds: From one answer to the next question.
            seconds_per_clip: That the network may take.
        """
        golden = self.model.golden
        if golden is None or golden.video is None:
            return None
        clips = golden.video
        longest = max(MAX_BATCH, self.settings.max_clips)  # clips of what may run when the canary asks
        return Canary(
            lambda: self._predictor.infer_next(clips),
            golden,
            precision=self.model.runtime.precision,
            every_seconds=every_seconds,
            patience_seconds=max(every_seconds, 2 * longest * seconds_per_clip),
        )

    def drain(self) -> None:
        """Refuse every further request; those that were submitted are answered."""
        self._draining = True

    def describe(self) -> dict[str, Any]:
        """Return what is loaded, and how closely the golden clips and videos agreed when it was loaded."""
        return describe_loaded(self.model)

    def close(self) -> None:
        """Stop the decode workers and free the model."""
        self._predictor.close()
        self.model.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begun(self, begin: Callable[[Future[Response]], None]) -> Future[Response]:
        """Begin to answer a request; what fails at once is its answer."""
        answer: Future[Response] = Future()
        answer.set_running_or_notify_cancel()
        self.metrics.add(counted.BUSY)
        try:
            self._refuse_draining()
            begin(answer)
        except Exception as error:  # noqa: BLE001  # a defect of ours must not take other requests along
            self._finish(answer, error)
        return answer

    def _refuse_draining(self) -> None:
        if self._draining:
            raise DrainingError("this endpoint is about to stop", hint="send the request again later")

    def _checked(self, request: PredictRequest) -> PredictRequest:
        """Refuse options that cannot be served before the work begins."""
        chosen_outputs(request.options, self.model)
        check_timeline(request.options, self.model)
        chosen_plan(request.options, self.view_plan, max_clips=self.settings.max_clips)
        return request

    def _fetched(self, request: PredictRequest) -> PredictRequest:
        if request.video_url is None:
            return request
        return replace(request, video=self._fetcher.fetch(request.video_url), video_url=None)

    def _take_time(self, request: PredictRequest, answer: Future[Response]) -> None:
        """Fetch a video, and look through it where that was asked for; runs in a thread of its own."""
        try:
            request = self._fetched(request)
            if request.options.timeline is None:
                self._predict(request, answer, self._described)
            else:
                self._finish(answer, bounded(self._timelines.whole(request)))
        except Exception as error:  # noqa: BLE001  # as in _begun
            self._finish(answer, error)

    def _predict(self, request: PredictRequest, answer: Future[Response], render: Render) -> None:
        plan = chosen_plan(request.options, self.view_plan, max_clips=self.settings.max_clips)
        inferring = self._predictor.submit(request.video, plan=plan)
        inferring.add_done_callback(lambda done: self._inferred(done, request.options, answer, render))

    def _described(self, result: VideoResult, options: Options) -> Response:
        """Make the answer of JSON."""
        return bounded(describe_result(result, self.model, options=options, top_k=self.settings.top_k))

    def _inferred(
        self, done: Future[Outcome], options: Options, answer: Future[Response], render: Render
    ) -> None:
        """Turn what the pipeline gave into an answer; runs in one of its threads."""
        try:
            outcome = done.result()
            if outcome.error is not None:
                raise outcome.error
            result = outcome.result
            assert result is not None
            response = render(result, options)
        except Exception as error:  # noqa: BLE001  # as in _begun
            self._finish(answer, error)
            return
        self.metrics.add(counted.CLIPS, len(result.clip_seconds))
        self.metrics.observe(counted.DECODE_SECONDS, result.decode_ms / 1000.0)
        self.metrics.observe(counted.PREPROCESS_SECONDS, result.preprocess_ms / 1000.0)
        self.metrics.observe(counted.INFER_SECONDS, result.infer_ms / 1000.0)
        self._finish(answer, response)

    def _finish(self, answer: Future[Response], found: Response | Exception) -> None:
        """Give an answer and count it, before anyone sees it."""
        response = self._counted(found)
        self.metrics.add(counted.BUSY, -1.0)
        answer.set_result(response)

    def _counted(self, found: Response | Exception) -> Response:
        response = refusal(found) if isinstance(found, Exception) else found
        self.metrics.add(counted.REQUESTS, label="ok" if response is found else response.body["code"])
        return response


def _check_version(recorded: str) -> None:
    """Refuse a bundle of another release line: equal major version, and before 1.0 equal minor version."""
    line = 2 if recorded.startswith("0.") else 1
    if recorded.split(".")[:line] != __version__.split(".")[:line]:
        raise ArtifactError(
            f"the bundle was exported with ivdr_deploy {recorded}, this worker has {__version__}",
            hint=f"install 'ivdr-deploy=={recorded}' in the worker's environment, or export the model again",
        )
