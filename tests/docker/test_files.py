"""The deployment files, checked without Docker: they agree with each other and with the code."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
DATASOURCES = DOCKER / "grafana/provisioning/datasources/prometheus.yaml"
DASHBOARDS = DOCKER / "grafana/provisioning/dashboards/attndrop.yaml"
DOCS = ROOT / "docs/metrics.md"

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions in order, each as its word and its joined arguments."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    words = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word, arguments) for word, arguments in words]


def arguments_of(word: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == word]


def environment_of_image() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in arguments_of("ENV") for pair in shlex.split(line))


def copied_from_the_repository() -> list[str]:
    copies = (shlex.split(line) for line in arguments_of("COPY"))
    return [source for copy in copies if not copy[0].startswith("--") for source in copy[:-1]]


def seconds(duration: str) -> int:
    match = re.fullmatch(r"(\d+)(s|m)", duration)
    assert match is not None, duration
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


# The image


def test_the_image_is_built_in_two_stages_from_one_base() -> None:
    assert arguments_of("FROM") == ["python:3.12-slim AS build", "python:3.12-slim AS runtime"]


def test_the_image_runs_as_an_unprivileged_user_that_owns_the_cache() -> None:
    (user,) = arguments_of("USER")
    assert user == "10001:10001"
    (cache,) = arguments_of("VOLUME")
    assert environment_of_image()["ATTNDROP_CACHE_DIR"] == cache
    assert any(f"install -d -o attndrop -g attndrop {cache}" in run for run in arguments_of("RUN"))


def test_the_process_gets_its_signals() -> None:
    assert [json.loads(line) for line in arguments_of("ENTRYPOINT")] == [["attndrop"]]
    assert [json.loads(line) for line in arguments_of("CMD")] == [["serve", "--host", "0.0.0.0"]]
    assert arguments_of("STOPSIGNAL") == ["SIGTERM"]
    assert arguments_of("EXPOSE") == ["8000"]


def test_every_file_the_image_copies_exists() -> None:
    missing = [name for name in copied_from_the_repository() if not (ROOT / name).exists()]
    assert missing == []


def test_the_build_context_holds_what_the_image_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    admitted = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert admitted == set(copied_from_the_repository())


def test_installations_are_pinned() -> None:
    installs = [run for run in arguments_of("RUN") if "pip install" in run]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in run or "==" in run for run in installs)


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


@contextmanager
def health(status: int) -> Iterator[int]:
    """The port of a server that answers /health with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_follows_health(
    status: int, healthy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (check,) = arguments_of("HEALTHCHECK")
    python, *arguments = json.loads(check[check.index("[") :])
    assert python == "python"
    with health(status) as port:
        command = [argument.replace(":8000/", f":{port}/") for argument in arguments]
        result = subprocess.run([sys.executable, *command], capture_output=True)
    assert (result.returncode == 0) is healthy, result.stderr.decode()


# Compose


def mounts() -> Iterator[tuple[str, str, str]]:
    """Every mount as its service, source and target."""
    for name, service in SERVICES.items():
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            yield name, source, target


def test_mounted_paths_exist_and_named_volumes_are_declared() -> None:
    for _, source, _ in mounts():
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]


def test_the_image_is_built_from_the_repository_root() -> None:
    build = SERVICES["attndrop"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    declared = {argument.split("=")[0] for argument in arguments_of("ARG")}
    assert set(build["args"]) == declared


def test_the_cache_volume_is_where_the_image_keeps_its_cache() -> None:
    (cache,) = arguments_of("VOLUME")
    assert ("attndrop", "cache", cache) in mounts()


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_third_party_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_no_privileges_and_listen_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_server_writes_only_to_its_cache_and_tmp() -> None:
    assert SERVICES["attndrop"]["read_only"] is True
    assert SERVICES["attndrop"]["tmpfs"] == ["/tmp"]


def test_the_server_may_drain_before_it_is_killed() -> None:
    command = SERVICES["attndrop"]["command"]
    drain = int(command[command.index("--drain-timeout") + 1])
    assert seconds(SERVICES["attndrop"]["stop_grace_period"]) > drain


def test_grafana_has_no_default_password_and_no_anonymous_viewer() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"].endswith(":-false}")


# Prometheus and Grafana


def test_addresses_are_those_of_services() -> None:
    (scrape,) = PROMETHEUS["scrape_configs"]
    ((target,),) = (config["targets"] for config in scrape["static_configs"])
    (source,) = yaml.safe_load(DATASOURCES.read_text())["datasources"]
    for address in (target, source["url"].removeprefix("http://")):
        host, port = address.split(":")
        assert any(published.endswith(f":{port}") for published in SERVICES[host]["ports"])


def test_grafana_knows_the_scrape_interval() -> None:
    (source,) = yaml.safe_load(DATASOURCES.read_text())["datasources"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_the_dashboard_is_mounted_where_grafana_looks() -> None:
    (provider,) = yaml.safe_load(DASHBOARDS.read_text())["providers"]
    targets = {source: target for name, source, target in mounts() if name == "grafana"}
    assert targets["./grafana/dashboards"] == provider["options"]["path"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/attndrop.json"
    assert (DOCKER / "grafana/dashboards/attndrop.json").exists()


def test_the_rules_are_mounted_where_prometheus_looks() -> None:
    targets = {source: target for name, source, target in mounts() if name == "prometheus"}
    (pattern,) = PROMETHEUS["rule_files"]
    assert targets["./rules"] == f"/etc/prometheus/{Path(pattern).parent}"
    assert any(fnmatch.fnmatch(f"rules/{f.name}", pattern) for f in (DOCKER / "rules").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(DOCKER / "prometheus.yml")],
        ["test", "rules", str(Path(__file__).parent / "alerts.yml")],
    ],
    ids=["configuration", "alerts"],
)
def test_promtool_accepts(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH; install Prometheus to check its configuration")
    result = subprocess.run([promtool, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# Names of metrics


def exported(metrics: Metrics) -> set[str]:
    """The names of all metrics and samples that a server exposes from its start."""
    text = metrics.render()[0].decode()
    return set(re.findall(r"^(?:# HELP )?(attndrop_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    "path",
    [DOCKER / "grafana/dashboards/attndrop.json", DOCKER / "rules/attndrop.yml", DOCS],
    ids=lambda path: path.name,
)
def test_every_metric_named_is_exported(path: Path, idle_metrics: Metrics) -> None:
    named = set(re.findall(r"\battndrop_\w+", path.read_text()))
    assert named - {"attndrop_"} <= exported(idle_metrics)
    assert named


def test_every_metric_is_documented(idle_metrics: Metrics) -> None:
    text = idle_metrics.render()[0].decode()
    families = set(re.findall(r"^# HELP (attndrop_\w+)", text, re.MULTILINE))
    documented = set(re.findall(r"^\| `(attndrop_\w+)` \|", DOCS.read_text(), re.MULTILINE))
    assert {name for name in families if not name.endswith("_created")} == documented


def test_rules_ask_about_the_job_that_is_scraped() -> None:
    jobs = re.findall(r'job="(\w+)"', (DOCKER / "rules/attndrop.yml").read_text())
    assert set(jobs) == {scrape["job_name"] for scrape in PROMETHEUS["scrape_configs"]}
