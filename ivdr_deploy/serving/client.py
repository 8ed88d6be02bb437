"""A small HTTP client for the endpoint: for smoke tests, load tests and examples. Standard library only."""

from __future__ import annotations

import json
import secrets
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ivdr_deploy._text import quoted, reason_of
from ivdr_deploy.errors import ServerError


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointClient:
    """Talks to one model of one server. Safe to use from many threads."""

    model: str
    """Name of the model."""

    inference_url: str
    """For example ``http://127.0.0.1:8080``."""

    management_url: str
    metrics_url: str
    timeout_seconds: float = 120.0
    """For one request."""

    @property
    def predict_url(self) -> str:
        """Where videos are sent."""
        return f"{self.inference_url}/predictions/{self.model}"

    def predict(
        self, source: str | Path | bytes, *, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send one video.

        Args:
            source: A path, or the encoded bytes.
            options: As in ``schema.Options``; with options a form is sent, without them the bytes alone.

        Returns:
            HTTP status and body; a body that is not JSON becomes ``{"code", "message", "hint"}``.

        Raises:
            ServerError: if nobody answers.
        """
        video = source if isinstance(source, bytes) else Path(source).read_bytes()
        if options is None:
            return self.post(video, content_type="application/octet-stream")
        border = secrets.token_hex(16)
        head = (
            f'--{border}\r\nContent-Disposition: form-data; name="options"\r\n\r\n{json.dumps(options)}\r\n'
        )
        head += f'--{border}\r\nContent-Disposition: form-data; name="video"; filename="video"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        body = head.encode() + video + f"\r\n--{border}--\r\n".encode()
        return self.post(body, content_type=f"multipart/form-data; boundary={border}")

    def post(self, body: bytes, *, content_type: str) -> tuple[int, dict[str, Any]]:
        """Send a body as it is; see ``predict``."""
        status, answer = self._fetch(self.predict_url, body=body, content_type=content_type)
        try:
            return status, json.loads(answer)
        except ValueError:
            text = answer.decode("utf-8", "replace").strip()
            return status, {
                "code": "server",
                "message": text or f"HTTP status {status} without a body",
                "hint": "",
            }

    def describe(self, *, ask_worker: bool = False) -> dict[str, Any]:
        """Return what the server says about the model: its workers, with TorchServe its queue.

        Args:
            ask_worker: Also ask a worker what it has loaded: ``customizedMetadata``.

        Raises:
            ServerError: if nobody answers, or the model is not there.
        """
        url = f"{self.management_url}/models/{self.model}"
        status, answer = self._fetch(f"{url}?customized=true" if ask_worker else url)
        if status != 200:
            raise ServerError(f"{url} answered {status}: {quoted(answer.decode('utf-8', 'replace').strip())}")
        try:
            described: dict[str, Any] = json.loads(answer)[0]
            for name in ("workers", "minWorkers"):
                described[name]
        except (ValueError, RecursionError, TypeError, LookupError) as error:
            raise ServerError(
                f"{url} answered with {quoted(answer[:200].decode('utf-8', 'replace'))}, which describes no model",
                hint="does another server listen there?",
            ) from error
        return described

    def ready(self) -> bool:
        """Whether every worker the model should have has loaded it; False also when nobody answers yet."""
        try:
            described = self.describe()
        except ServerError:
            return False
        workers = described["workers"]
        return len(workers) >= described["minWorkers"] and all(
            worker["status"] == "READY" for worker in workers
        )

    def lacks_model(self) -> bool:
        """Whether TorchServe answers and does not know the model: it reads its archives before it listens."""
        try:
            return self._fetch(f"{self.management_url}/models/{self.model}")[0] == 404
        except ServerError:
            return False

    def metrics(self) -> dict[str, float]:
        """Return the Prometheus metrics: value by name with labels, as written.

        Raises:
            ServerError: if nobody answers.
        """
        status, answer = self._fetch(f"{self.metrics_url}/metrics")
        if status != 200:
            raise ServerError(f"{self.metrics_url}/metrics answered {status}")
        lines = [line for line in answer.decode("utf-8", "replace").splitlines() if line and line[0] != "#"]
        try:
            return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        except ValueError as error:
            raise ServerError(
                f"{self.metrics_url}/metrics answered with what are no metrics",
                hint="does another server listen there?",
            ) from error

    def _fetch(self, url: str, *, body: bytes | None = None, content_type: str = "") -> tuple[int, bytes]:
        # Not urllib: it sends requests for this machine to a proxy that the environment names, and asks the
        # server to close the connection, which loses the refusal of a body that is still being sent.
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        try:
            with closing(kind(parts.netloc, timeout=self.timeout_seconds)) as connection:
                if body is None:
                    connection.request("GET", target)
                else:
                    connection.request("POST", target, body=body, headers={"Content-Type": content_type})
                answer = connection.getresponse()
                return answer.status, answer.read()
        except (OSError, HTTPException) as error:
            raise ServerError(
                f"no answer from {url} ({reason_of(error)})", hint="is the server running?"
            ) from error
