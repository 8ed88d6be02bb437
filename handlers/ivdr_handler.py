"""TorchServe handler: all of it lies in ``ivdr_deploy.serving.torchserve.adapter``.

TorchServe loads this file by its name and allows one class in it. It would report a failed import at the top as a
missing built-in handler: what is needed is imported where it is used, so that the log shows the true cause.
"""

from __future__ import annotations

from typing import Any


class IvdrHandler:
    """One worker's model."""

    def initialize(self, context: Any) -> None:
        """Load the model; the worker is ready only if the golden clips and videos agree."""
        from ivdr_deploy.serving.torchserve.adapter import TorchServeAdapter

        self._adapter = TorchServeAdapter(context)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer one batch, each request with its own status."""
        return self._adapter.handle(data, context)
