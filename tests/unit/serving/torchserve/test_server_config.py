from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest

from ivdr_deploy.artifacts.bundle import open_bundle
from ivdr_deploy.errors import ConfigError, FolderError, ServerError
from ivdr_deploy.serving.core.answers import MAX_ANSWER_BYTES
from ivdr_deploy.serving.torchserve.archive import Archive
from ivdr_deploy.serving.torchserve.config import Ports, ServerConfig, claim_run_folder
from ivdr_deploy.serving.torchserve.settings import EndpointSettings


def make_config(tiny_bundle: Path, run_dir: Path, *, store: str = "/srv/model_store") -> ServerConfig:
    manifest = open_bundle(tiny_bundle).manifest
    archive = Archive(
        path=Path(store) / "tiny.mar", manifest=manifest, settings=EndpointSettings(queue_size=9)
    )
    return ServerConfig(archive=archive, run_dir=run_dir, ports=Ports.starting_at(8080))


def read_properties(text: str) -> dict[str, str]:
    """Read them as Java does, escapes included."""
    pairs = (line.split("=", 1) for line in text.splitlines())
    return {key: value.encode("ascii").decode("unicode_escape") for key, value in pairs}


def test_nothing_listens_beyond_this_machine(tiny_bundle: Path) -> None:
    values = read_properties(make_config(tiny_bundle, Path("/run/x")).properties())
    addresses = {key: value for key, value in values.items() if key.endswith("_address")}
    assert len(addresses) == 5
    assert all(value.removeprefix("http://").split(":")[0] == "127.0.0.1" for value in addresses.values())
    ports = {value.rsplit(":", 1)[1] for value in addresses.values() if ":" in value.removeprefix("http://")}
    ports |= {value for key, value in values.items() if key.endswith("_port")}
    assert ports == {"8080", "8081", "8082", "8083", "8084"}


def test_models_come_from_the_model_store_alone(tiny_bundle: Path) -> None:
    values = read_properties(make_config(tiny_bundle, Path("/run/x"), store="/srv/a b+ä").properties())
    assert values["enable_model_api"] == "false"
    assert values["install_py_dep_per_model"] == "false"
    assert values["allowed_urls"] == r"file:///srv/a%20b%2B%C3%A4/.*"


def test_sizes_come_from_the_settings_of_the_archive(tiny_bundle: Path) -> None:
    values = read_properties(make_config(tiny_bundle, Path("/run/x")).properties())
    assert values["max_request_size"] == str(EndpointSettings().service.max_request_bytes)
    assert values["job_queue_size"] == "9"
    assert int(values["max_response_size"]) > MAX_ANSWER_BYTES + (1 << 20)


def test_shell_line_survives_blanks_in_paths(tiny_bundle: Path) -> None:
    config = make_config(tiny_bundle, Path("/run/a b"), store="/srv/model store")
    words = shlex.split(config.shell_line(config.start_command()))
    assert "LOG_LOCATION=/run/a b/logs" in words
    assert words[words.index("--model-store") + 1] == "/srv/model store"
    assert words[-2:] == ["--models", "tiny=tiny.mar"]


def test_run_folder_too_deep_for_sockets_is_refused(tiny_bundle: Path) -> None:
    make_config(tiny_bundle, Path("/") / ("d" * 88))
    with pytest.raises(ConfigError, match="1 bytes too long"):
        make_config(tiny_bundle, Path("/") / ("d" * 89))


def test_taken_port_is_named_with_its_use() -> None:
    ports = Ports.unused()
    with socket.create_server(("127.0.0.1", ports.metrics)), pytest.raises(ServerError) as caught:
        ports.check()
    assert f"port {ports.metrics} (metrics)" in caught.value.message
    ports.check()


@pytest.mark.parametrize("first", [0, -1, 65532])
def test_ports_out_of_range_are_refused(first: int) -> None:
    with pytest.raises(ConfigError, match="port must be between"):
        Ports.starting_at(first)


def test_run_folder_that_a_server_made_is_taken_again(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        claim_run_folder(folder)
        (folder / "tmp").mkdir()
        claim_run_folder(folder)


@pytest.mark.parametrize("name", ["tmp", "logs", "model_store", "config.properties", ".hidden"])
def test_folder_of_somebody_else_is_no_run_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path(), Path("/")):
        with pytest.raises(FolderError, match="is not the run folder of a server") as caught:
            claim_run_folder(folder)
        assert "--run-dir" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [name]
