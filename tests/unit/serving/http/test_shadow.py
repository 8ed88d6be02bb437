"""What a new version must share with the one that serves, and when their answers agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivdr_deploy.errors import ArtifactError, ContractMismatchError, IvdrError
from ivdr_deploy.serving.http.shadow import Shadow, check_replacement, compare_answers

OLD = {
    "name": "actions",
    "version": "1.0",
    "contract_hash": "aaaa",
    "labels": ["run", "walk"],
    "outputs": ["logits", "inter"],
}


def test_a_version_that_shares_what_callers_see_may_serve() -> None:
    check_replacement(OLD, {**OLD, "version": "1.1", "outputs": ["logits", "inter", "intra"]})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"version": "1.0"}, ArtifactError, "version 1.0"),
        ({"name": "other"}, ArtifactError, "of other"),
        ({"contract_hash": "bbbb"}, ContractMismatchError, "contract bbbb"),
        ({"labels": ["walk", "run"]}, ArtifactError, "not the same in the same order"),
        ({"outputs": ["logits"]}, ArtifactError, "lacks inter"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_one_that_does_not_is_refused(change: dict[str, Any], error: type[IvdrError], said: str) -> None:
    with pytest.raises(error, match=said):
        check_replacement(OLD, {**OLD, "version": "2.0", **change})


def test_a_version_to_go_back_to_may_lack_what_came_later_and_nothing_else() -> None:
    check_replacement(OLD, {**OLD, "version": "0.9", "outputs": ["logits"]}, backwards=True)
    with pytest.raises(ArtifactError, match="of other"):
        check_replacement(OLD, {**OLD, "version": "0.9", "name": "other"}, backwards=True)


def answer(label: str | None, *, score: float = 0.5, code: str = "") -> dict[str, Any]:
    if code:
        return {"status": 422, "body": {"code": code, "message": "", "hint": ""}}
    predictions = {} if label is None else {"predictions": [{"label": label, "score": score}]}
    return {"status": 200, "body": {**predictions, "timings": {"infer_ms": 10.0}}}


def compared(old: list[dict[str, Any]], new: list[dict[str, Any]], *, min_agreement: float = 0.9) -> Shadow:
    videos = [Path(str(number)) for number in range(len(old))]
    seen: list[int] = []
    found = compare_answers(
        lambda video: old[int(video.name)],
        lambda video: new[int(video.name)],
        videos,
        min_agreement=min_agreement,
        on_done=seen.append,
    )
    assert seen == list(range(1, len(old) + 1))
    return found


def test_the_share_of_equal_labels_decides() -> None:
    old = [answer("run")] * 10
    new = [answer("run", score=0.7)] * 9 + [answer("walk")]
    report = compared(old, new)
    assert (report.passed, report.agreement) == (True, 0.9)
    assert not compared(old, new, min_agreement=0.95).passed
    said = report.to_dict()
    assert said["flips"] == [{"video": "9", "old": "run 0.50", "new": "walk 0.50"}]
    assert said["mean_score_change"] == pytest.approx(0.18)
    assert said["median_infer_ms"] == [10.0, 10.0]


def test_a_video_that_is_answered_no_more_is_one_too_many() -> None:
    old = [answer("run")] * 20
    report = compared(old, [*old[:19], answer(None, code="inference_failed")])
    assert (report.passed, report.agreement) == (False, 1.0)
    assert report.to_dict()["lost"] == [{"video": "19", "old": "run 0.50", "new": "422 inference_failed"}]


def test_a_video_that_neither_answers_says_nothing() -> None:
    broken = answer(None, code="decode_failed")
    assert compared([answer("run"), broken], [answer("run"), broken]).passed
    assert not compared([broken], [broken]).passed, "nothing was compared"
    assert not compared([broken], [broken], min_agreement=0.0).passed, "nothing was compared"


def test_a_model_without_labels_has_no_agreement_to_speak_of() -> None:
    report = compared([answer(None)], [answer(None)])
    assert report.passed
    assert report.to_dict()["agreement"] is None
