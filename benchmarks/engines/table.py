"""What holds for every export format in every engine that runs here, as a table.

    python -m benchmarks.engines.table --write docs/export.md

Exports the embedded model with 8 of 30 layers dropped, runs it in the engines and compares their
greedy tokens with those of our own server. Tensor and pipeline parallelism need head counts that
divide, so they are tried with a small random model of 8 heads.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engines.running import EngineRun, as_texts, run_engine, served_tokens
from pruning.cli import plan_cache
from pruning.export.exporting import export
from pruning.export.pruned import Options
from pruning.loading import EMBEDDED_MODEL, BaseModel, load_base_model
from pruning.plan import Plan, new_plan, write_plan
from pruning.plan_cache import PlanRequest
from pruning.selection import DropStep
from server.engine.detokenize import Vocabulary

DROPPED = 8
TOKENS = 24
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "To make bread you need flour, water and",
)
_HEADINGS = ("format", "engine", "version", "loads", "same tokens", "KV saved", "TP=2", "PP=2")
_TABLE = re.compile(r"(?<=<!-- engines -->\n).*?(?=<!-- /engines -->)", re.DOTALL)
_KV_BUFFER = re.compile(r"KV buffer size = +([\d.]+) MiB")


@dataclass(frozen=True, slots=True)
class Row:
    """One format in one engine."""

    format: str
    engine: str
    version: str
    loads: str
    same_tokens: str
    kv_saved: str
    tensor_parallel: str = "-"
    pipeline_parallel: str = "-"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, its plan, and what our server answers with it."""

    model: str
    plan: Plan
    folder: Path
    """Where exports of it go."""
    vocabulary: Vocabulary
    prompts: list[list[int]]
    pruned: list[list[str]]
    full: list[list[str]]

    def exported(self, format_name: str, drop: int, gguf_type: str = "f32") -> str:
        """Export with so many layers dropped, once, and return where it is."""
        suffix = ".gguf" if format_name == "gguf" else ""
        out = self.folder / f"{format_name}-{drop}-{gguf_type}{suffix}"
        if not out.exists():
            options = Options(5 * 10**9, gguf_type)
            export(self.model, self.plan.with_drop(drop), format_name, out, options=options)
        return str(out)

    def run(self, environment: str, script: str, model: str, **task: Any) -> EngineRun:
        return run_engine(
            environment, script, model=model, prompts=self.prompts, tokens=TOKENS, **task
        )

    def same(self, run: EngineRun, expected: Sequence[Sequence[str]]) -> str:
        """Return how many of the answers are token for token the expected ones."""
        found = as_texts(self.vocabulary, run.result["tokens"])
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        return "yes" if equal == len(expected) else f"{equal} of {len(expected)}"


def embedded(folder: Path) -> Subject:
    """The embedded model with its default plan."""
    base = load_base_model(EMBEDDED_MODEL, dtype="float32", device="cpu")
    plan, _ = plan_cache().load_or_compute(base, PlanRequest())
    prompts = [list(base.tokenizer(text)["input_ids"]) for text in TEXTS]
    return _subject(EMBEDDED_MODEL, base, plan.with_drop(DROPPED), folder, prompts)


def eight_heads(folder: Path) -> Subject:
    """A small random Llama of 8 heads, with the embedded model's tokenizer.

    Layer 3 is the first of the second pipeline stage; a layer without attention there is the
    hardest case.
    """
    torch.manual_seed(0)
    tokenizer = load_base_model(EMBEDDED_MODEL, dtype="float32", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    path = folder / "eight-heads"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    base = load_base_model(str(path), dtype="float32", device="cpu")
    ranking = tuple(DropStep(layer, None) for layer in (3, 1, 5))
    plan = new_plan(base, "by hand", ranking, (0,), None).with_drop(3)
    prompts = [[5, 66, 777, 8888, 21], [4000, 3000, 2000], [12, 34, 56, 78, 90, 123, 456]]
    return _subject(str(path), base, plan, folder, prompts)


def _subject(
    model: str, base: BaseModel, plan: Plan, folder: Path, prompts: list[list[int]]
) -> Subject:
    folder.mkdir(exist_ok=True)
    path = folder / "plan.json"
    write_plan(path, plan)
    pruned, full = (
        served_tokens(model, path, variant, prompts, TOKENS) for variant in ("pruned", "full")
    )
    return Subject(model, plan, folder, Vocabulary(base.tokenizer), prompts, pruned, full)


def vllm(subject: Subject, divisible: Subject) -> Row:
    """`nemotron-nas` in vLLM."""

    def run(of: Subject, drop: int, tensor: int = 1, pipeline: int = 1) -> EngineRun:
        model = of.exported("nemotron-nas", drop)
        return of.run(
            "vllm", "run_vllm.py", model, tensor_parallel=tensor, pipeline_parallel=pipeline
        )

    full, pruned = run(subject, 0), run(subject, subject.plan.drop)
    before, after = (each.result["kv_capacity_tokens"] for each in (full, pruned))
    drop = divisible.plan.drop
    return Row(
        "nemotron-nas",
        "vLLM (CPU)",
        pruned.result["version"],
        "yes",
        subject.same(pruned, subject.pruned),
        f"{before:,} → {after:,} tokens",
        divisible.same(run(divisible, drop, tensor=2), divisible.pruned),
        divisible.same(run(divisible, drop, pipeline=2), divisible.pruned),
    )


def llama_cpp(subject: Subject) -> Row:
    """`gguf` in llama.cpp, with flash attention."""
    full, pruned = (
        subject.run("llama-cpp", "run_llama_cpp.py", subject.exported("gguf", drop))
        for drop in (0, subject.plan.drop)
    )
    before, after = (_kv_buffer(each.log) for each in (full, pruned))
    return Row(
        "gguf",
        "llama.cpp (llama-cpp-python)",
        pruned.result["version"],
        "yes",
        subject.same(pruned, subject.pruned),
        f"{before:g} → {after:g} MiB",
    )


def _kv_buffer(log: str) -> float:
    """Return the size of the KV buffer that llama.cpp's log tells, in MiB."""
    match = _KV_BUFFER.search(log)
    if match is None:
        raise RuntimeError("llama.cpp did not say how large its KV buffer is")
    return float(match[1])


def transformers(subject: Subject, format_name: str, environment: str) -> Row:
    """A folder in transformers, of this environment or of vLLM's, which is older."""
    drop = subject.plan.drop
    run = subject.run(environment, "run_transformers.py", subject.exported(format_name, drop))
    layers = subject.plan.model.layers
    plain = format_name == "llm-drop"  # transformers does not read LLM-Drop's keys
    same = subject.same(run, subject.full if plain else subject.pruned)
    return Row(
        format_name,
        "transformers",
        run.result["version"],
        "yes, as the full model" if plain else "yes",
        f"{same}, of `full`" if plain else same,
        f"{layers} → {run.result['kv_layers']} layers",
    )


def rows(folder: Path) -> Iterator[Row]:
    """Yield the table's rows as they are measured."""
    subject, divisible = embedded(folder / "embedded"), eight_heads(folder / "divisible")
    yield vllm(subject, divisible)
    for environment in ("own", "vllm"):
        for format_name in ("nemotron-nas", "transformers"):
            yield transformers(subject, format_name, environment)
    yield llama_cpp(subject)
    yield transformers(subject, "llm-drop", "own")


def markdown(found: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [_HEADINGS, ("---",) * len(_HEADINGS), *(astuple(row) for row in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(
    write: Annotated[
        Path | None, typer.Option(help="A page whose table between the marks is replaced.")
    ] = None,
) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        text = markdown(list(rows(Path(folder))))
    typer.echo(text)
    if write is not None:
        page = write.read_text(encoding="utf-8")
        write.write_text(_TABLE.sub(lambda _: text, page), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
