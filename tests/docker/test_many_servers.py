"""The Compose file for several GPUs and the Kubernetes manifest: they agree with themselves and the
code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.engines.running import ENVIRONMENTS
from server.gateway.settings import EVERY, GatewaySettings

DOCKER = Path(__file__).parents[2] / "docker"
MANIFEST = DOCKER / "kubernetes.yaml"
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.gpus.yaml").read_text())["services"]
BASE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))
DEPLOYMENTS = {o["metadata"]["name"]: o["spec"] for o in OBJECTS if o["kind"] == "Deployment"}
VARIANTS = {name: DEPLOYMENTS[f"vllm-{name}"] for name in ("full", "pruned")}


def gateway_settings(arguments: list[str]) -> GatewaySettings:
    """Return what the gateway's command line asks for, in either way of writing it."""
    command, *options = arguments
    assert command == "gateway"
    if all("=" in option for option in options):
        options = [word for option in options for word in option.split("=", 1)]
    given: dict[str, Any] = {"upstream": ()}
    for option, value in zip(options[::2], options[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        given[name] = (*given["upstream"], value) if name == "upstream" else value
    return GatewaySettings(**given)


class TestCompose:
    def test_the_gateway_knows_every_server(self):
        settings = gateway_settings(SERVICES["attndrop"]["command"])
        servers = [name for name in SERVICES if name != "attndrop"]
        assert settings.pools() == {EVERY: tuple(f"http://{name}:8000" for name in servers)}
        assert settings.port == 8000  # where Prometheus and the image's health check look

    def test_every_server_has_a_gpu_of_its_own(self):
        gpus = [
            device["device_ids"]
            for name, service in SERVICES.items()
            if name != "attndrop"
            for device in service["deploy"]["resources"]["reservations"]["devices"]
        ]
        assert gpus == [["0"], ["1"]]

    def test_the_second_server_finds_the_plan_of_the_first(self):
        assert SERVICES["gpu1"]["depends_on"] == {"gpu0": {"condition": "service_healthy"}}
        assert (
            SERVICES["gpu0"]["volumes"]
            == SERVICES["gpu1"]["volumes"]
            == BASE["attndrop"]["volumes"]
        )

    @pytest.mark.parametrize("name", ["gpu0", "gpu1"])
    def test_servers_are_as_confined_as_the_one(self, name):
        for key in ("cap_drop", "security_opt", "read_only", "tmpfs", "stop_grace_period"):
            assert SERVICES[name][key] == BASE["attndrop"][key]
        assert "ports" not in SERVICES[name]


class TestKubernetes:
    def pod(self, name: str) -> dict[str, Any]:
        return DEPLOYMENTS[name]["template"]["spec"]

    def container(self, name: str) -> dict[str, Any]:
        (container,) = self.pod(name)["containers"]
        return container

    @pytest.mark.parametrize("name", DEPLOYMENTS)
    def test_selectors_choose_their_own_pods(self, name):
        labels = DEPLOYMENTS[name]["template"]["metadata"]["labels"]
        assert DEPLOYMENTS[name]["selector"]["matchLabels"] == labels
        (service,) = (
            o for o in OBJECTS if o["kind"] == "Service" and o["metadata"]["name"] == name
        )
        assert service["spec"]["selector"] == labels

    def test_the_gateway_knows_every_variant(self):
        settings = gateway_settings(self.container("attndrop-gateway")["args"])
        assert settings.pools() == {name: (f"http://vllm-{name}:8000",) for name in VARIANTS}
        grace = self.pod("attndrop-gateway")["terminationGracePeriodSeconds"]
        assert grace > settings.drain_timeout

    @pytest.mark.parametrize("name", VARIANTS)
    def test_the_tensor_parallel_size_is_the_number_of_gpus(self, name):
        container = self.container(f"vllm-{name}")
        sizes = [e["value"] for e in container["env"] if e["name"] == "TENSOR_PARALLEL_SIZE"]
        assert sizes == [container["resources"]["limits"]["nvidia.com/gpu"]]
        assert "--tensor-parallel-size=$(TENSOR_PARALLEL_SIZE)" in container["args"]

    def test_only_the_export_brings_code_along(self):
        trusting = [
            n for n in VARIANTS if "--trust-remote-code" in self.container(f"vllm-{n}")["args"]
        ]
        assert trusting == ["pruned"]

    @pytest.mark.parametrize("name", DEPLOYMENTS)
    def test_prometheus_is_told_where_to_scrape(self, name):
        (port,) = self.container(name)["ports"]
        assert DEPLOYMENTS[name]["template"]["metadata"]["annotations"] == {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(port["containerPort"]),
            "prometheus.io/path": "/metrics",
        }

    @pytest.mark.parametrize("name", DEPLOYMENTS)
    def test_containers_are_confined_and_pinned(self, name):
        container, pod = self.container(name), self.pod(name)
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", container["image"])

    def test_no_secret_is_shipped(self):
        assert not [o for o in OBJECTS if o["kind"] == "Secret"]

    @pytest.mark.engines
    def test_it_fits_the_schemas_of_kubernetes(self):
        validate = ENVIRONMENTS / "kubernetes" / "bin" / "kubernetes-validate"
        done = subprocess.run(
            [validate, "--strict", MANIFEST], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
