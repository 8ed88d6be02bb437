"""The public Python interface: open a model, label videos, score collections. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.decoding import DecodeOptions
from ivdr_deploy.events import Event, TimelinePlan
from ivdr_deploy.pipeline import VideoPredictor
from ivdr_deploy.results import Outcome, VideoResult
from ivdr_deploy.runtimes.loading import open_model
from ivdr_deploy.spec import ClipSpec, DecoderName, Device, Isolation, ViewPlan
from ivdr_deploy.timeline import TimelineEnd, Window, look_through
from ivdr_deploy.video.reader import VideoLimits
from ivdr_deploy.video.source import VideoSource

if TYPE_CHECKING:
    from ivdr_deploy.scoring.scorer import ScoreSummary


class Model:
    """A model that is open, checked and ready; made by ``load``. A context manager; safe to use from many threads."""

    def __init__(self, predictor: VideoPredictor) -> None:
        self._predictor = predictor
        self._model = predictor.model

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._model.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; empty for a model without a classifier."""
        return self._model.labels

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives: any of ``logits``, ``feature``, ``inter``, ``intra``."""
        return self._model.output_names

    @property
    def clip_spec(self) -> ClipSpec:
        """The contract: how a video becomes input."""
        return self._model.clip

    @property
    def view_plan(self) -> ViewPlan:
        """Which clips of a video are looked at unless told otherwise."""
        return self._model.view_plan

    @property
    def variant(self) -> str:
        """Id of the variant that runs."""
        return self._model.variant

    @property
    def runtime(self) -> str:
        """What executes it: library, version, device, precision."""
        return self._model.runtime.description

    def predict(self, video: VideoSource, *, num_clips: int | None = None) -> VideoResult:
        """Label one video.

        Args:
            video: Path of a local file, the encoded bytes, or a ``Source``.
            num_clips: Clips to look at instead of the number in the view plan.

        Raises:
            VideoError: if the video cannot be used.
            InferenceError: if the network fails on it.
        """
        return self._predictor.predict(video, plan=self._plan(num_clips))

    def predict_many(
        self, videos: Iterable[VideoSource], *, num_clips: int | None = None
    ) -> Iterator[Outcome]:
        """Label many videos, decoding ahead; yields one ``Outcome`` a video, in order.

        A video that cannot be used is an outcome with its ``error``, and does not stop the others.
        """
        return self._predictor.predict_many(videos, plan=self._plan(num_clips))

    def timeline(
        self, video: VideoSource, *, plan: TimelinePlan | None = None
    ) -> Iterator[Window | Event | TimelineEnd]:
        """Look through a long video; yields windows and events as they are found, then a ``TimelineEnd``.

        Args:
            video: Path of a local file, the encoded bytes, or a ``Source``.
            plan: Windows and thresholds; the defaults when None.

        Raises:
            VideoError: if the video cannot be used; also after some windows.
            InferenceError: if the network fails on it.
            ArtifactError: if the model has no classifier.
        """
        return look_through(self._predictor, video, plan or TimelinePlan())

    def score(
        self,
        videos: str | Path | VideoList,
        out: str | Path,
        *,
        top_k: int = 5,
        outputs: Sequence[str] = (),
        num_clips: int | None = None,
        progress: Callable[[int, int | None], object] = lambda done, total: None,
    ) -> ScoreSummary:
        """Score a collection into a folder of Parquet files; the same call goes on where it was stopped.

        Args:
            videos: A folder, a list file, or a list that was read with ``read_video_list``.
            out: Folder for the table; ``read_scores`` reads it back.
            top_k: Labels and scores per video.
            outputs: Vectors to store as well: any of ``feature``, ``inter``, ``intra``.
            num_clips: Clips of a video instead of the number in the view plan.
            progress: Called with the number of rows so far, and of all that this call adds once that is known.

        Raises:
            DataError: if the list, or the table in the folder, is unusable.
            FolderError: if the folder holds something else, or another process writes to it.
            ConfigError: if the model does not have an output that was asked for.
        """
        from ivdr_deploy.scoring.plan import ScoreOptions
        from ivdr_deploy.scoring.scorer import score

        listed = videos if isinstance(videos, VideoList) else read_video_list(videos)
        options = ScoreOptions(top_k=top_k, outputs=tuple(outputs), view_plan=self._plan(num_clips))
        return score(self._predictor, listed, out, options=options, progress=progress)

    def close(self) -> None:
        """Stop the decode workers and free the model; calling it twice is allowed."""
        self._predictor.close()
        self._model.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.name}: {self.variant} on {self.runtime}>"

    def _plan(self, num_clips: int | None) -> ViewPlan | None:
        return None if num_clips is None else replace(self.view_plan, num_clips=num_clips)


def load(
    path: str | Path,
    *,
    variant: str | None = None,
    device: Device | None = None,
    threads: int | None = None,
    decoder: DecoderName = "pyav",
    decode_workers: int = 1,
    isolation: Isolation = "process",
    limits: VideoLimits | None = None,
) -> Model:
    """Open a bundle, a checkpoint or an exported ONNX file, and check it.

    Args:
        path: What ``ivdr export`` or training wrote.
        variant: Which of a bundle's variants; None takes the best verified one that fits this machine.
        device: Where to run; never another one in its place. None: the GPU where the variant can use it.
        threads: Threads of one operator on the CPU; one for a core when None.
        decoder: Which decoder reads videos.
        decode_workers: Videos decoded at the same time.
        isolation: ``process``: a video that crashes or hangs the decoder costs nothing else.
        limits: What a video may cost.

    Raises:
        ArtifactError: if it is damaged, does not agree with its golden clips or videos, or cannot run here.
        CheckpointError: if the checkpoint is damaged.
        MissingDependencyError: if a package is missing; names the extra that installs it.
    """
    model = open_model(path, variant=variant, device=device, threads=threads, decoder=decoder)
    decode = DecodeOptions(workers=decode_workers, isolation=isolation)
    return Model(VideoPredictor(model, limits=limits, decoder=decoder, decode=decode))
