"""Other servers of the same model, each in a process and an environment of its own.

`make peers` installs what a benchmark can start: llama.cpp's own server (continuous batching, on
the GGUF file that the model comes from) and vLLM, in build/engines; `transformers serve` comes
with this environment. Knows commands and what each server wants to be told; knows nothing of
loads. All of them compute every prompt anew, on all cores that this process may use.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import httpx
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from benchmarks.load import Endpoint, metric
from pruning.loading import checkpoint_folder, gguf_file

ENGINES = Path(__file__).parents[1] / "build" / "engines"
_START_SECONDS = 900
"""A first start compiles: vLLM for minutes on two cores."""
_STOP_SECONDS = 20
_LLAMA_KV = re.compile(r"KV buffer size = +([\d.]+) MiB")
_WORD = re.compile("[\u0120\u2581][a-z]{2,}")
"""A token that is a word with the space before it, in byte-level and in other vocabularies."""
_CB_BLOCK_TOKENS = 256
"""Of transformers' continuous batching, by default."""


class MissingPeerError(RuntimeError):
    """A peer cannot be started here."""


class PeerDiedError(RuntimeError):
    """A peer was started and did not come up."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every peer must be able to take."""

    model: str
    at_once: int
    """Requests in flight."""
    tokens: int
    """Of the longest request, prompt and answer together."""
    kv_gibibytes: int = 2
    """Where a peer is told how much memory its KV cache may take."""


@dataclass(frozen=True, slots=True)
class HttpPeer:
    """A server that can be started."""

    name: str
    command: tuple[str, ...]
    endpoint: Endpoint
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its environment, beside those of this process."""
    kv_pattern: re.Pattern[str] | None = None
    """Finds in its log the mebibytes that its KV cache takes from start to end."""


def llama_cpp(work: Work, port: int, *, repacks: bool = True) -> HttpPeer:
    """Return llama.cpp's server, with as many slots as requests are in flight.

    It crashes where a processor says that it has AMX and the kernel does not allow it, unless it
    leaves weights as they are in the file (not `repacks`).
    """
    file = gguf_file(work.model)
    if file is None:
        raise MissingPeerError(f"llama.cpp reads GGUF files and {work.model} is none")
    options = {
        "--model": file,
        "--host": "127.0.0.1",
        "--port": port,
        "--parallel": work.at_once,
        "--ctx-size": work.at_once * (work.tokens + 16),
        "--threads": _cores(),
        "--threads-batch": _cores(),
        "--cache-ram": 0,
        "--log-verbosity": 4,  # at which the size of the KV cache is said
    }
    flags = ["--no-cache-prompt", "--no-kv-unified", "--no-ui"]
    if not repacks:
        flags.append("--no-repack")
    return HttpPeer(
        "llama.cpp" if repacks else "llama.cpp --no-repack",
        (_installed("llama-server", "llama-server"), *_spelled(options), *flags),
        Endpoint(_url(port), body={"ignore_eos": True, "cache_prompt": False}),
        kv_pattern=_LLAMA_KV,
    )


def vllm(work: Work, port: int) -> HttpPeer:
    """Return vLLM's server, in bfloat16."""
    folder = checkpoint_folder(work.model)
    options = {
        "--model": folder,
        "--served-model-name": work.model,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "bfloat16",
        "--max-model-len": work.tokens + 16,
        "--max-num-seqs": work.at_once,
    }
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": str(work.kv_gibibytes),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    server = (_installed("vllm", "python"), "-m", "vllm.entrypoints.openai.api_server")
    return HttpPeer(
        "vLLM",
        (*server, *_spelled(options), "--no-enable-prefix-caching"),
        Endpoint(
            _url(port),
            body={"ignore_eos": True, "model": work.model},
            kv_bytes=partial(_vllm_kv_bytes, work.kv_gibibytes << 30),
        ),
        variables,
    )


def transformers_serve(work: Work, port: int) -> HttpPeer:
    """Return `transformers serve` with continuous batching.

    It takes texts alone, so prompts must be made of `words_of` its tokenizer.
    """
    if not is_serve_available():
        raise MissingPeerError(
            "transformers serve needs more packages; pip install 'transformers[serving]'"
        )
    folder = str(checkpoint_folder(work.model))
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--cb-num-blocks": work.at_once * (work.tokens // _CB_BLOCK_TOKENS + 1),
        "--cb-max-batch-tokens": work.at_once * work.tokens,
    }
    # No token with this id is ever generated, so that no answer ends early.
    endless = {"generation_config": json.dumps({"eos_token_id": -1, "pad_token_id": 0})}
    return HttpPeer(
        "transformers serve",
        (
            *(sys.executable, "-m", "transformers.cli.transformers", "serve", folder),
            *_spelled(options),
            "--continuous-batching",
        ),
        Endpoint(
            _url(port),
            body={"model": folder, **endless},
            spelled=partial(text_of, AutoTokenizer.from_pretrained(folder)),
        ),
        {"HF_HUB_OFFLINE": "1"},
    )


PEERS: Mapping[str, Callable[[Work, int], HttpPeer]] = {
    "llama.cpp": llama_cpp,
    "llama.cpp-no-repack": partial(llama_cpp, repacks=False),
    "vllm": vllm,
    "transformers-serve": transformers_serve,
}


def words_of(model: str) -> list[int]:
    """Return the tokens of a model that are words, whose texts give the same tokens again."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(model))
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    words = sorted(token for piece, token in vocabulary.items() if _WORD.fullmatch(piece))
    return [word for word in words if _encoded(tokenizer, str(tokenizer.decode([word]))) == [word]]


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Return the text of a prompt.

    Raises:
        ValueError: the text would be other tokens.
    """
    text = str(tokenizer.decode(tokens))
    if _encoded(tokenizer, text) != tokens:
        raise ValueError("a prompt's text is not the same tokens; make it of `words_of` the model")
    return text


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def started(kind: str, work: Work) -> Iterator[tuple[str, Endpoint]]:
    """Start a peer and yield its name and endpoint once it is up; end it and its workers after.

    Raises:
        MissingPeerError: it is not installed, or cannot serve this model.
        PeerDiedError: it did not come up; the message ends with its last words.
    """
    peer = PEERS[kind](work, _free_port())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                peer.command,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, **peer.variables},
                cwd=folder,
                start_new_session=True,
            )
        try:
            _wait_until_up(peer, process, log)
            yield peer.name, _with_kv_bytes(peer, log.read_text(errors="replace"))
        finally:
            _end(process)


def _wait_until_up(peer: HttpPeer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _is_up(peer.endpoint.url):
        if process.poll() is not None or time.monotonic() > deadline:
            told = log.read_text(errors="replace")[-3000:]
            raise PeerDiedError(f"{peer.name} did not come up; it said:\n{told}")
        time.sleep(0.5)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process group to end, and after a while make it."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)


def _with_kv_bytes(peer: HttpPeer, log: str) -> Endpoint:
    """Return the endpoint with the KV bytes that the log tells, all of its buffers together."""
    if peer.kv_pattern is None or not (found := peer.kv_pattern.findall(log)):
        return peer.endpoint
    total = sum(map(float, found)) * 2**20
    return replace(peer.endpoint, kv_bytes=lambda _: total)


def _vllm_kv_bytes(pool: int, metrics: str) -> float:
    return pool * metric(metrics, "vllm:kv_cache_usage_perc")


def _installed(environment: str, program: str) -> str:
    path = ENGINES / environment / "bin" / program
    if not path.exists():
        raise MissingPeerError(f"there is no {path}; install it with `make peers`")
    return str(path)


def _spelled(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        yield from (name, str(value))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
