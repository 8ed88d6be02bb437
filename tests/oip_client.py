"""Triton's client, which nobody here wrote, and a server for it to ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from served import SETTINGS, running_http

from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings

MOST = 6
"""Videos that the server takes at a time."""


@contextmanager
def running_oip(bundle: Path) -> Iterator[HttpServer]:
    """Run a server that speaks the protocol over HTTP and gRPC, in this process."""
    settings = HttpSettings(service=SETTINGS.service, max_requests=MOST, canary_seconds=0.1)
    with running_http(bundle, settings, grpc_port=0) as running:
        yield running


class Triton:
    """Triton's client, over one of the two ways."""

    def __init__(self, module: Any, url: str) -> None:
        self.module = module
        self.client = module.InferenceServerClient(url)

    def infer(
        self,
        files: Sequence[bytes],
        *,
        outputs: Sequence[str] | None = None,
        model: str = "tiny",
        **arguments: Any,
    ) -> Any:
        tensor = self.module.InferInput("video", [len(files)], "BYTES")
        tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
        asked = None if outputs is None else [self.module.InferRequestedOutput(name) for name in outputs]
        return self.client.infer(model, [tensor], outputs=asked, **arguments)

    def said(self, answer: Any) -> dict[str, Any]:
        """What a call without tensors says, as JSON has it."""
        if isinstance(answer, dict):
            return answer
        from google.protobuf.json_format import MessageToDict

        return dict(MessageToDict(answer, preserving_proto_field_name=True))
