"""Scores collections of videos into a table that survives being killed.

``score`` writes it, ``read_scores`` gives it back as a ``pyarrow.Table``: one row per input, in input order.
"""

from __future__ import annotations

from ivdr_deploy.scoring.plan import ScoreOptions
from ivdr_deploy.scoring.reader import read_scores
from ivdr_deploy.scoring.scorer import ScoreSummary, score

__all__ = ["ScoreOptions", "ScoreSummary", "read_scores", "score"]
