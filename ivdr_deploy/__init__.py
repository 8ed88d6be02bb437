"""From unlabelled video to an action-recognition endpoint that can be trusted. Importing this loads no torch."""

from __future__ import annotations

__version__ = "0.1.0"
