"""Videos that are made once for a whole module of tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from made_videos import made_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make the videos of ``VIDEOS`` when first asked for."""
    return partial(made_video, tmp_path_factory.mktemp("videos"))
