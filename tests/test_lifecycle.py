"""How the server process ends. Draining is tested with the API."""

from __future__ import annotations

import gc
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from server import __version__
from server.cli import app
from server.lifecycle import without_collecting_what_is_there
from tests.live import LiveServer


def test_a_dead_engine_is_told_to_clients_and_orchestrators_and_ends_the_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.dying_server"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = LiveServer(process)
    server.wait_until_up()
    with server.client() as client:
        assert client.get("/health").status_code == 200
        answer = client.post(
            "/v1/completions", json={"prompt": "On and on", "max_tokens": 1000, "ignore_eos": True}
        )
        assert answer.status_code == 500
        assert "broken on purpose" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 503
    assert process.wait(30) == 1


def test_the_collector_looks_no_more_at_what_start_up_made() -> None:
    held = len(gc.get_objects())
    with without_collecting_what_is_there():
        assert gc.get_freeze_count() > held / 2
        assert len(gc.get_objects()) < held / 2
    assert gc.get_freeze_count() == 0


def test_a_port_that_is_taken_is_one_sentence_and_a_failure(live: LiveServer) -> None:
    port = str(httpx.URL(live.url).port)
    run = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "--port", port],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1
    assert run.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "99999"], "--port: Input should be less than or equal to 65535"),
        (["--kv-cache-memory", "lots"], "'lots' is not a size"),
        (["--variant", "light"], "--variant 'light' must be NAME=DROP"),
        (["--model", "no/such.gguf"], "there is no GGUF file"),
    ],
)
def test_a_mistake_in_the_settings_is_one_sentence(options: list[str], sentence: str) -> None:
    run = CliRunner().invoke(app, ["serve", *options])
    assert run.exit_code == 1
    assert isinstance(run.exception, SystemExit)
    assert run.stdout == ""
    assert sentence in run.stderr
    assert len(run.stderr.splitlines()) <= 2


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, __version__)
