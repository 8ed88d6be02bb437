"""What lies in deploy/ fits the program: commands, ports, paths, metrics; and nothing may do more than it needs."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from served import SETTINGS, ask

from ivdr_deploy import __version__
from ivdr_deploy.cli import app
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.serving.core.metrics import METRICS
from ivdr_deploy.serving.core.settings import ServiceSettings
from ivdr_deploy.serving.http.deployment import Deployment
from ivdr_deploy.serving.http.server import HttpServer
from ivdr_deploy.serving.http.settings import HttpSettings
from ivdr_deploy.serving.http.versions import RESTARTS, WORKERS
from ivdr_deploy.serving.torchserve.settings import EndpointSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*/Dockerfile"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
PORT = inspect.signature(HttpServer).parameters["port"].default
OWN = {"ivdr-deploy", "ivdr-deploy-torchserve"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [item for item in documents("ivdr.yaml") if item["kind"] == kind]
    return dict(found)


PODS: dict[str, dict[str, Any]] = {
    "ivdr": of_kind("Deployment")["spec"]["template"]["spec"],
    "kserve": documents("kserve.yaml")[0]["spec"]["predictor"],
}
CONTAINERS = {
    f"{pod}/{container['name']}": container for pod, spec in PODS.items() for container in spec["containers"]
}
SERVING = {name: container for name, container in CONTAINERS.items() if "args" in container}


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def last(path: Path, word: str) -> str:
    return [rest for name, rest in instructions(path) if name == word][-1]


def commands() -> dict[str, list[str]]:
    found = {f"image {path.parent.name}": json.loads(last(path, "CMD")) for path in DOCKERFILES}
    found |= {
        f"compose {name}": [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service["command"]]
        for name, service in COMPOSE.items()
        if service["image"].partition(":")[0] in OWN
    }
    return found | {name: container["args"] for name, container in SERVING.items()}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([program, "--no-color", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_run_the_command_as_nobody(path: Path) -> None:
    assert json.loads(last(path, "ENTRYPOINT")) == ["ivdr"]
    user, _, group = last(path, "USER").partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000
    words = [word for word, _ in instructions(path)]
    assert words.index("USER") > words.index("COPY"), "what it runs is not its own to change"
    for word, rest in instructions(path):
        for source in rest.split()[:-1] if word == "COPY" and "--from" not in rest else []:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("command", commands().values(), ids=commands())
def test_commands_are_those_of_the_program(command: list[str]) -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert command[0] == "serve"
    given = serve.make_context("serve", command[1:]).params
    assert given["port"] == PORT
    assert given["server"] == ("torchserve" if "torchserve" in command else "http")


def test_ports_are_the_same_everywhere() -> None:
    image = DEPLOY / "http" / "Dockerfile"
    command = json.loads(last(image, "CMD"))
    grpc = int(command[command.index("--grpc-port") + 1])
    assert last(image, "EXPOSE").split() == [str(PORT), str(grpc)]
    assert f"127.0.0.1:{PORT}/ready" in last(image, "HEALTHCHECK")
    assert {port.rpartition(":")[2] for port in COMPOSE["ivdr"]["ports"]} == {str(PORT), str(grpc), "9090"}
    assert COMPOSE["ivdr"]["command"] == command == CONTAINERS["ivdr/ivdr"]["args"]
    ports = {port["name"]: port["containerPort"] for port in CONTAINERS["ivdr/ivdr"]["ports"]}
    assert ports == {"http": PORT, "grpc": grpc}
    assert {port["targetPort"] for port in of_kind("Service")["spec"]["ports"]} == set(ports)
    assert [port["containerPort"] for port in CONTAINERS["kserve/kserve-container"]["ports"]] == [PORT]
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": [f"127.0.0.1:{PORT + 1}"]}]
    # The server asks for a token, for its metrics too.
    assert scraped["authorization"] == {
        "credentials_file": f"/run/secrets/{COMPOSE['prometheus']['secrets'][0]}"
    }
    for name in ("prometheus", "torchserve-proxy"):
        assert COMPOSE[name]["network_mode"].startswith("service:"), "it asks a port of the loopback"
    conf = of_kind("ConfigMap")["data"]["nginx.conf"]
    assert f"location = /metrics {{ proxy_pass http://127.0.0.1:{PORT + 1}; }}" in conf
    (listening,) = re.findall(r"listen (\d+);", conf)
    template = of_kind("Deployment")["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == listening
    assert CONTAINERS["ivdr/metrics"]["ports"][0]["containerPort"] == int(listening)
    allowed = of_kind("NetworkPolicy")["spec"]["ingress"][0]["ports"]
    assert [entry["port"] for entry in allowed] == [PORT, grpc, int(listening)]


def test_the_proxy_of_torchserve_lets_through_what_the_endpoint_takes() -> None:
    conf = (DEPLOY / "torchserve" / "nginx.conf").read_text()
    (size,) = re.findall(r"client_max_body_size (\d+)m;", conf)
    assert int(size) << 20 >= ServiceSettings().max_request_bytes
    assert set(re.findall(r"proxy_pass (\S+);", conf)) == {f"http://127.0.0.1:{PORT}"}
    assert f"127.0.0.1:{re.findall(r'listen ([0-9]+);', conf)[0]}" in str(COMPOSE["torchserve"]["ports"])


def test_nothing_on_the_way_gives_up_earlier_than_the_endpoint() -> None:
    conf = (DEPLOY / "torchserve" / "nginx.conf").read_text()
    (seconds,) = re.findall(r"proxy_read_timeout (\d+)s;", conf)
    assert int(seconds) > 2 * EndpointSettings().response_timeout_seconds
    settings = HttpSettings()
    assert PODS["kserve"]["timeout"] > settings.receive_seconds + settings.service.slow_seconds


def test_the_proxys_tokens_are_told_apart_by_case_and_may_be_long() -> None:
    for path in (DEPLOY / "torchserve" / "nginx.conf", ROOT / "docs" / "deploying.md"):
        (line,) = re.findall(r'"[^"\n]*Bearer TOKEN[^"\n]*" 1;', path.read_text())
        assert line == '"~^Bearer TOKEN$" 1;', (
            "a plain text of nginx's map matches in any case, within 50 characters"
        )


def test_a_pod_goes_on_until_nobody_sends_to_it_any_more() -> None:
    waits = CONTAINERS["ivdr/ivdr"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 0 < waits < PODS["ivdr"]["terminationGracePeriodSeconds"] / 2


def images() -> set[str]:
    found = {rest.split()[0] for path in DOCKERFILES for word, rest in instructions(path) if word == "FROM"}
    found |= {service["image"] for service in COMPOSE.values()}
    return found | {container["image"] for container in CONTAINERS.values()}


@pytest.mark.parametrize("image", sorted(images()))
def test_images_have_a_whole_version(image: str) -> None:
    name, _, tag = image.rpartition(":")
    assert re.match(r"v?\d+\.\d+\.\d+\b", tag), "a tag that moves is another image tomorrow"
    if name.rpartition("/")[2] in OWN:
        assert tag == __version__


def requirements(extras: set[str]) -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from map(Requirement, project["dependencies"])
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == project["name"]:
                yield from requirements(requirement.extras)
            else:
                yield requirement


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_hold_tested_versions_of_what_the_extras_need(path: Path) -> None:
    (extras,) = re.findall(r'"/src\[(.*)\]"', path.read_text())
    lines = (path.parent / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in requirements(set(extras.split(","))):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert ("torch" in pins) == (path.parent.name == "torchserve")


def test_kubernetes_knows_every_field() -> None:
    for document in documents("ivdr.yaml"):
        kubernetes_validate.validate(document, "1.31", strict=True)
    predictor = copy.deepcopy(PODS["kserve"])
    for name in ("minReplicas", "maxReplicas", "timeout"):
        del predictor[name]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": predictor}
    kubernetes_validate.validate(pod, "1.31", strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_pods_may_do_nothing_that_they_need_not(pod: str) -> None:
    spec = PODS[pod]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert (
            {"cpu", "memory"}
            == set(container["resources"]["limits"])
            == set(container["resources"]["requests"])
        )
        writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert "/tmp" in writable
        assert writable <= {"/tmp", "/dev/shm"}


@pytest.mark.parametrize("name", COMPOSE)
def test_services_of_compose_may_do_nothing_that_they_need_not(name: str) -> None:
    service = COMPOSE[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "a proxy serves others"
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (DEPLOY / source).exists(), volume
    if "build" in service:
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.fixture(scope="module")
def running(
    tiny_bundle: Path, videos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """What `ivdr serve` runs; it has counted everything there is to count."""
    settings = HttpSettings(service=SETTINGS.service)
    run_dir = tmp_path_factory.mktemp("run")
    with Deployment(tiny_bundle, settings, host="127.0.0.1", port=0, run_dir=run_dir, auth=False) as opened:
        assert opened.client.predict(videos[0])[0] == 200
        assert opened.client.predict(b"no video")[0] == 400
        yield opened


@pytest.mark.parametrize("name", SERVING)
def test_probes_ask_for_paths_that_are_there(name: str, running: Deployment) -> None:
    container = SERVING[name]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe, live in (("startupProbe", False), ("readinessProbe", False), ("livenessProbe", True)):
        asked = container[probe]["httpGet"]
        assert ports.get(asked["port"], asked["port"]) == PORT
        assert ask(running.client, "GET", path=asked["path"])[0] == 200
        # One that is not ready must not be killed for it: it may be busy, or about to stop.
        assert (asked["path"] in ("/ping", "/v2/health/live")) == live


def test_the_images_own_check_knows_a_server_that_is_ready_from_none(running: Deployment) -> None:
    text = (DEPLOY / "http" / "Dockerfile").read_text()
    command = json.loads(text.partition("HEALTHCHECK")[2].partition("CMD ")[2].splitlines()[0])
    ready = int(running.client.inference_url.rpartition(":")[2])
    management = int(running.client.management_url.rpartition(":")[2])
    for port, code in ((ready, 0), (management, 1)):
        asked = command[2].replace(f":{PORT}/", f":{port}/")
        done = subprocess.run(
            [sys.executable, "-P", "-c", asked], capture_output=True, text=True, check=False
        )
        assert (done.returncode, command[:2]) == (code, ["python", "-c"]), done.stderr


def selectors(expression: Any) -> Iterator[Any]:
    """Every selector of series in a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(expression, name, None)
        if inner is not None:
            yield from selectors(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from selectors(inner)


def expressions() -> dict[str, str]:
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return found | {rule["alert"]: rule["expr"] for group in alerts for rule in group["rules"]}


@pytest.mark.parametrize("expression", expressions().values(), ids=expressions())
def test_queries_ask_for_metrics_and_labels_that_a_server_has(expression: str, running: Deployment) -> None:
    text = expression.replace("$__rate_interval", "5m").replace("$instance", ".*")
    assert "$" not in text
    held: dict[str, set[str]] = {"up": {"job"}}
    for series in running.client.metrics():
        name, _, labels = series.partition("{")
        held.setdefault(name, {"instance", "job"}).update(re.findall(r'(\w+)="', labels))
    found = list(selectors(promql_parser.parse(text)))
    assert found
    for selector in found:
        assert selector.name in held, selector.name
        assert {matcher.name for matcher in selector.matchers.matchers} <= held[selector.name]
        for matcher in selector.matchers.matchers:
            if matcher.name == "outcome":
                assert set(matcher.value.split("|")) <= outcomes(IvdrError)


def outcomes(kind: type[IvdrError]) -> set[str]:
    """The codes that an error can have, and a defect of ours."""
    return {kind.code, "internal"}.union(*map(outcomes, kind.__subclasses__()))


def test_every_metric_is_on_the_dashboard() -> None:
    shown = (DEPLOY / "grafana" / "dashboard.json").read_text()
    assert [metric.name for metric in (*METRICS, WORKERS, RESTARTS) if metric.name not in shown] == []


def test_grafana_finds_its_dashboard_and_its_data() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    assert board["templating"]["list"][0]["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/ivdr.yaml").read_text())[
        "providers"
    ]
    assert any(provider["options"]["path"] in volume for volume in COMPOSE["grafana"]["volumes"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
