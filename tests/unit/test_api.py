from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from videos import numbered_video

import ivdr_deploy as ivdr


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_video(tmp_path_factory.mktemp("videos") / "a.mp4", num_frames=40)


def test_the_public_names_are_these() -> None:
    """A name taken away or added here is a change of the interface: say so in the changelog."""
    assert sorted(ivdr.__all__) == [
        "ArtifactError", "AsyncClient", "CheckpointError", "Client", "ClipSpec", "ConfigError", "DataError", "Event",
        "InferenceError", "IvdrError", "MissingDependencyError", "Model", "OptionError", "Outcome", "RemoteResult",
        "Retry", "ScoreSummary", "ServerError", "TimelineEnd", "TimelinePlan", "VideoError", "VideoInfo", "VideoItem",
        "VideoLimits", "VideoList", "VideoOpenError", "VideoResult", "ViewPlan", "Window",
        "__version__", "load", "read_scores", "read_video_list",
    ]  # fmt: skip
    assert all(getattr(ivdr, name) is not None for name in ivdr.__all__)
    assert dir(ivdr) == sorted(ivdr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        ivdr.lode  # noqa: B018


def test_load_predict_and_score(tiny_bundle: Path, video: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with ivdr.load(tiny_bundle, threads=1) as model:
        assert (model.name, model.variant) == ("tiny", "onnx-fp32")
        result = model.predict(video)
        assert len(result.top(3)) == 3
        assert result.top(1)[0][0] in model.labels
        assert len(model.predict(video.read_bytes(), num_clips=5).clip_seconds) == 5
        outcomes = list(model.predict_many([video, tmp_path / "broken.mp4"]))
        assert outcomes[0].result is not None
        np.testing.assert_array_equal(outcomes[0].result.clip_logits, result.clip_logits)
        assert isinstance(outcomes[1].error, ivdr.VideoError)
        summary = model.score(video.parent, tmp_path / "scores", outputs=["inter"])
    assert (summary.ok, summary.failed) == (1, 0)
    (row,) = ivdr.read_scores(tmp_path / "scores").to_pylist()
    assert row["labels"][0] == result.top(1)[0][0]
    assert (row["variant"], row["view_plan"]) == ("onnx-fp32", "2 clips, centre crop")
    model.close()


def test_it_loads_no_torch(tiny_bundle: Path, video: Path) -> None:
    code = (
        "import sys, ivdr_deploy as ivdr\n"
        "assert not {'numpy', 'av', 'torch', 'onnxruntime'} & set(sys.modules), 'importing is not light'\n"
        f"with ivdr.load({str(tiny_bundle)!r}) as model:\n"
        f"    print(model.predict({str(video)!r}).top(1)[0][0] in model.labels)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\nFalse\n", done.stderr
