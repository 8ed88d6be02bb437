"""One stream, pinned buffers and CUDA graphs: the same numbers as without, whatever comes in between."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY_CLIP, make_tiny_checkpoint
from torch import Tensor

from ivdr_deploy.artifacts.checkpoint import load_checkpoint
from ivdr_deploy.errors import EngineIncompatibleError
from ivdr_deploy.models.network import VideoModel
from ivdr_deploy.runtimes.cuda_calls import GRAPHS, CudaCalls

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("network") / "tiny.safetensors")
    return load_checkpoint(path).model.eval().cuda()


def clips(number: int, seed: int = 0) -> np.ndarray:
    shape = (number, *TINY_CLIP.clip_shape)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain(network: VideoModel, video: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        return [value.cpu().numpy() for value in network(torch.from_numpy(video).cuda()).values()]


def test_every_size_gives_what_a_plain_call_gives_and_leaves_earlier_results_alone(
    network: VideoModel,
) -> None:
    calls = CudaCalls(lambda video: list(network(video).values()), TINY_CLIP.clip_shape)
    kept = []
    for number, seed in ((1, 0), (4, 1), (1, 2), (4, 3), (1, 0)):
        video = clips(number, seed)
        kept.append((calls(video), plain(network, video)))
    assert calls.captured == (1, 4)
    assert not calls.no_graphs
    for found, expected in kept:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_more_sizes_than_there_are_graphs_for_run_without(network: VideoModel) -> None:
    calls = CudaCalls(lambda video: list(network(video).values()), TINY_CLIP.clip_shape)
    for number in range(1, GRAPHS + 3):
        video = clips(number)
        for one, other in zip(calls(video), plain(network, video), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert calls.captured == tuple(range(1, GRAPHS + 1))


def test_what_cannot_be_captured_runs_without_and_says_why(network: VideoModel) -> None:
    def waits(video: Tensor) -> list[Tensor]:
        outputs = list(network(video).values())
        outputs[0].sum().item()  # waits for the GPU, which a capture does not allow
        return outputs

    calls = CudaCalls(waits, TINY_CLIP.clip_shape)
    video = clips(2)
    for _ in range(2):
        for one, other in zip(calls(video), plain(network, video), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert calls.captured == ()
    assert calls.no_graphs


@pytest.mark.parametrize("error", [RuntimeError, EngineIncompatibleError], ids=["torch's", "ours"])
def test_a_refused_capture_is_said_once_and_operators_are_launched(
    network: VideoModel, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    def refuses(video: Tensor) -> list[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            raise error("not while a graph is captured")
        return list(network(video).values())

    calls = CudaCalls(refuses, TINY_CLIP.clip_shape)
    for number in (2, 3, 2):
        video = clips(number)
        for one, other in zip(calls(video), plain(network, video), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert calls.captured == ()
    (said,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "each operator is launched: " in said


class OfOneCall:
    """Writes where the last call told it to, as an execution context does."""

    def __init__(self, network: VideoModel) -> None:
        self.network, self.sizes = network, set[int]()

    def __call__(self, video: Tensor) -> list[Tensor]:
        self.sizes.add(len(video))
        return list(self.network(video).values())


def test_each_graph_is_captured_from_a_network_of_its_own(network: VideoModel) -> None:
    made: list[OfOneCall] = []

    def apart() -> OfOneCall:
        made.append(OfOneCall(network))
        return made[-1]

    shared = OfOneCall(network)
    calls = CudaCalls(shared, TINY_CLIP.clip_shape, apart=apart)
    for number in (1, 4, 1, 2, 4):
        video = clips(number)
        for one, other in zip(calls(video), plain(network, video), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert [network.sizes for network in made] == [{1}, {4}, {2}]
    for number in range(1, GRAPHS + 3):
        calls(clips(number))
    assert (len(made), shared.sizes) == (GRAPHS, {GRAPHS + 1, GRAPHS + 2})


def test_a_network_that_cannot_be_made_is_run_without_a_graph(network: VideoModel) -> None:
    def apart() -> OfOneCall:
        raise EngineIncompatibleError("no memory for it")

    calls = CudaCalls(OfOneCall(network), TINY_CLIP.clip_shape, apart=apart)
    video = clips(2)
    for one, other in zip(calls(video), plain(network, video), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert (calls.captured, calls.no_graphs) == ((), "no memory for it")


def test_a_read_only_batch_is_taken(network: VideoModel) -> None:
    calls = CudaCalls(lambda video: list(network(video).values()), TINY_CLIP.clip_shape)
    video = clips(1)
    video.flags.writeable = False
    assert len(calls(video)) == len(calls(video))


def test_weights_that_change_in_place_are_seen(network: VideoModel, tmp_path: Path) -> None:
    model = load_checkpoint(make_tiny_checkpoint(tmp_path / "tiny.safetensors")).model.eval().cuda()
    calls = CudaCalls(lambda video: list(model(video).values()), TINY_CLIP.clip_shape)
    video = clips(1)
    before = calls(video)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = calls(video)
    assert any(not np.allclose(one, other) for one, other in zip(before, after, strict=True))
    for one, other in zip(after, plain(model, video), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
