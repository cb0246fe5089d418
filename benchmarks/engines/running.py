"""Running an engine's script in its environment, and our own server for what to compare with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import running_server
from server.engine.detokenize import Vocabulary

ENVIRONMENTS = Path(__file__).parents[2] / "build" / "engines"
_START_SECONDS = 300
SCRIPTS = Path(__file__).parent

# Two workers on a machine with one NUMA node, and a KV cache of a size that can be compared.
_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What an engine's script returned, and all that the engine said meanwhile."""

    result: dict[str, Any]
    log: str


@dataclass(frozen=True, slots=True)
class VllmServer:
    """A running vLLM server: its processes are a group of their own."""

    url: str
    process: subprocess.Popen[bytes]

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("vLLM's server did not start")
            time.sleep(0.5)

    def kill(self) -> None:
        """End the server and its workers at once, as a machine that is lost."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.HTTPError:
            return False


def python_of(environment: str) -> str:
    """Return the Python of an engine's environment; `own` is this one."""
    if environment == "own":
        return sys.executable
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"there is no {python}; make it with `make engines`")
    return str(python)


def environment_variables() -> dict[str, str]:
    """Return the variables that engines are run with."""
    return {**os.environ, **_VARIABLES}


def run_engine(environment: str, script: str, **task: Any) -> EngineRun:
    """Run a script of this folder and return its result.

    Raises:
        RuntimeError: it failed; the message is the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python_of(environment), str(SCRIPTS / script), json.dumps(task), str(out)]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment_variables(),
            cwd=folder,
            check=False,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{script} failed:\n{done.stdout[-4000:]}")
        return EngineRun(json.loads(out.read_text(encoding="utf-8")), done.stdout)


@contextmanager
def vllm_server(model: str, name: str) -> Iterator[VllmServer]:
    """Run vLLM's own server on a free port, and end it and its workers afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python_of("vllm"), "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--model", model, "--served-model-name", name, "--port", str(port)]
    fixed = ["--trust-remote-code", "--enforce-eager", "--dtype", "float32", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, *options, *fixed, "--max-model-len", "512"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment_variables(),
        start_new_session=True,
    )
    server = VllmServer(f"http://127.0.0.1:{port}", process)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.kill()


def served_tokens(
    model: str, plan: Path, variant: str, prompts: Sequence[Sequence[int]], count: int
) -> list[list[str]]:
    """Return our server's greedy tokens, as texts, for prompts of token ids."""
    options = ["--model", model, "--plan", str(plan), "--dtype", "float32"]
    with running_server(None, options) as url:
        body = {"prompt": prompts, "temperature": 0, "max_tokens": count, "logprobs": 0}
        answer = httpx.post(
            f"{url}/v1/completions",
            json={**body, "ignore_eos": True},
            headers={"X-Model-Variant": variant},
            timeout=600,
        ).raise_for_status()
    choices = sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))
    return [choice["logprobs"]["tokens"] for choice in choices]


def as_texts(vocabulary: Vocabulary, tokens: Sequence[Sequence[int]]) -> list[list[str]]:
    """Return token ids as the texts that our server gives for them."""
    return [[vocabulary.token_text(token) for token in each] for each in tokens]
