"""The Grafana dashboard: its shape, and each of its queries against a real Prometheus.

Prometheus runs with the shipped configuration; only the target's address is replaced by that of
the live server behind the `metrics_url` fixture.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/attndrop.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}
EACH_PANEL = [pytest.param(panel, id=panel["title"]) for panel in PANELS]
PANELS_BY_VARIANT = [
    pytest.param(panel, id=panel["title"])
    for panel in PANELS
    if panel["targets"][0]["legendFormat"] == "{{variant}}"
]
BUILT_IN_VARIABLES = {"__rate_interval"}
# What Grafana computes for a scrape interval of 5 s: at least four of them.
RATE_INTERVAL = "20s"
DEADLINE_SECONDS = 60.0
PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None,  # a mark, since a fixture would skip after the live server has started
    reason="prometheus is not on PATH; install it to run the dashboard's queries",
)

Answer = TypeVar("Answer")
Series = list[dict[str, Any]]


class Prometheus:
    """The few questions the tests put to Prometheus's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def query(self, expr: str) -> Series:
        series: Series = self._get("query", query=expr)["result"]
        return series

    def label_values(self, label: str, selector: str) -> list[str]:
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": selector})
        return values

    def rules(self) -> Series:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]


def eventually(ask: Callable[[], Answer], satisfied: Callable[[Answer], bool]) -> Answer:
    """The first satisfying answer, or the last one before the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not satisfied(answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return answer


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def shipped_configuration(directory: Path, target: str) -> Path:
    """The shipped configuration and rules, with the target's address replaced."""
    text = (DOCKER / "prometheus.yml").read_text()
    assert text.count("attndrop:8000") == 1
    shutil.copytree(DOCKER / "rules", directory / "rules")
    path = directory / "prometheus.yml"
    path.write_text(text.replace("attndrop:8000", target))
    return path


@pytest.fixture(scope="module")
def prometheus(metrics_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    assert PROMETHEUS is not None
    directory = tmp_path_factory.mktemp("prometheus")
    config = shipped_configuration(directory, urllib.parse.urlsplit(metrics_url).netloc)
    address = f"127.0.0.1:{free_port()}"
    command = (
        PROMETHEUS,
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    )
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        assert eventually(prometheus.ready, bool), (directory / "log").read_text()
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def choices(prometheus: Prometheus) -> dict[str, list[str]]:
    """The values Grafana would offer for each variable, asked for in the order of the page."""
    chosen: dict[str, list[str]] = {}
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            chosen[name] = values_offered(prometheus, variable["query"]["query"], chosen)
    return chosen


def values_offered(
    prometheus: Prometheus, definition: str, chosen: dict[str, list[str]]
) -> list[str]:
    match = re.fullmatch(r"label_values\((?P<selector>.+), (?P<label>\w+)\)", definition)
    assert match is not None, definition
    selector = substitute(match["selector"], chosen)
    return eventually(lambda: prometheus.label_values(match["label"], selector), bool)


def substitute(expr: str, chosen: dict[str, list[str]]) -> str:
    """Put every chosen value in place, several as alternatives, as Grafana does."""
    expr = expr.replace("$__rate_interval", RATE_INTERVAL)
    for name, values in chosen.items():
        several = f"({'|'.join(values)})" if len(values) > 1 else "".join(values)
        expr = expr.replace(f"${name}", several)
    return expr


def has_numbers(series: Series) -> bool:
    return bool(series) and all(math.isfinite(float(s["value"][1])) for s in series)


@needs_prometheus
def test_the_variables_offer_the_model_and_its_variants(choices: dict[str, list[str]]) -> None:
    assert len(choices["model_name"]) == 1
    assert set(choices["variant"]) >= {"full", "pruned"}


@needs_prometheus
@pytest.mark.parametrize("expr", QUERIES.values(), ids=QUERIES.keys())
def test_every_query_returns_data(
    expr: str, prometheus: Prometheus, choices: dict[str, list[str]]
) -> None:
    asked = substitute(expr, choices)
    assert "$" not in asked
    expected = set(choices["variant"]) if re.search(r"by \(variant\b", asked) else set()

    def complete(series: Series) -> bool:
        return has_numbers(series) and {s["metric"].get("variant") for s in series} >= expected

    series = eventually(lambda: prometheus.query(asked), complete)
    assert complete(series), f"{asked} returned {series}"


@needs_prometheus
def test_the_rules_are_evaluated_without_errors(prometheus: Prometheus) -> None:
    def evaluated(rules: Series) -> bool:
        return bool(rules) and all(rule["health"] != "unknown" for rule in rules)

    rules = eventually(prometheus.rules, evaluated)
    assert {rule["health"] for rule in rules} == {"ok"}


@needs_prometheus
def test_creation_times_are_not_stored(
    prometheus: Prometheus, choices: dict[str, list[str]]
) -> None:
    assert choices["variant"]
    assert prometheus.query('count({__name__=~"attndrop_.*_created"})') == []


def test_ids_are_unique_and_panels_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        for cell in cells(panel["gridPos"]):
            assert cell not in taken, f"{panel['title']} overlaps {taken[cell]}"
            taken[cell] = panel["title"]


def cells(position: dict[str, int]) -> Iterator[tuple[int, int]]:
    assert position["x"] >= 0
    assert position["x"] + position["w"] <= 24
    for x in range(position["x"], position["x"] + position["w"]):
        for y in range(position["y"], position["y"] + position["h"]):
            yield x, y


@pytest.mark.parametrize("panel", EACH_PANEL)
def test_a_panel_explains_itself_and_asks_the_chosen_source(panel: dict[str, Any]) -> None:
    assert panel["type"] in {"timeseries", "stat", "bargauge", "table"}
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references)) > 0
    for asker in (panel, *panel["targets"]):
        assert asker["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["legendFormat"]
        assert 'model_name="$model_name"' in target["expr"]


@pytest.mark.parametrize("panel", PANELS_BY_VARIANT)
def test_a_variant_has_one_colour_on_the_whole_page(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["color"]["mode"] == "palette-classic-by-name"
    colours = {
        override["matcher"]["options"]: override["properties"][0]["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
    }
    assert colours == {"full": "#5794F2", "pruned": "#FF9830"}


def test_variables_used_are_declared() -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - BUILT_IN_VARIABLES == set(VARIABLES) | {"__all"}
    assert VARIABLES["variant"]["multi"]


def test_rates_follow_the_scrape_interval() -> None:
    windows = re.findall(r"\[([^\]]+)\]", " ".join(QUERIES.values()))
    assert set(windows) == {"$__rate_interval"}


def test_quantiles_are_taken_over_summed_rates() -> None:
    quantiles = [expr for expr in QUERIES.values() if "histogram_quantile" in expr]
    assert len(quantiles) == 7
    assert all("sum by (variant, le) (rate(" in expr for expr in quantiles)
