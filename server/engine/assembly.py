"""Putting an engine together: how much memory the pages get, which parts it is made of."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pruning.families import context_limit, kv_shape
from pruning.loading import BaseModel
from pruning.projections import merge_projections
from pruning.quantised import EightBitHead, four_bit_layers
from pruning.variants import Variants
from server.engine.attention.eight_bits import E4M3
from server.engine.attention.rows import RowsBackend
from server.engine.attention.sdpa import SdpaBackend
from server.engine.engine import Engine
from server.engine.native import NativeFunctions, NormedMap
from server.engine.norms import use_native_norm
from server.engine.pages import PageLayout, PagePool, page_layout
from server.engine.runner import ModelRunner
from server.engine.scheduler import Limits, Scheduler
from server.engine.substitutes import use_native

logger = logging.getLogger(__name__)

CPU_SHARE = 0.25
"""Share of the free memory that pages get on a CPU, which holds much else ..."""
CPU_CEILING = 4 << 30
"""... up to this many bytes."""
CUDA_SHARE = 0.9
"""Share of the device memory left after loading the model."""
ROOM_FOR_LONG_STEPS = 40 << 30
"""Free device memory from which on what pages leave of it holds the activations of long steps."""
WARM_ROWS = 32
"""Decode steps of one variant are recorded at start up to this many rows."""

AttentionChoice = Literal["auto", "sdpa", "paged"]
KvCacheDtype = Literal["auto", "fp8", "fp8_e4m3"]
"""What pages hold: the model's dtype, or E4M3, which vLLM calls both."""
_CONVERTS = (8, 9)
"""The compute capability from which on Triton converts to and from E4M3."""


class EngineConfigError(ValueError):
    """The settings leave no working engine."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What may be chosen about an engine."""

    limits: Limits | None = None
    """None takes those of the device."""
    kv_cache_bytes: int | None = None
    """Bytes of page pool; None takes a share of the free memory."""
    context: int | None = None
    """Longest sequence in tokens; None takes the model's own limit."""
    attention: AttentionChoice = "auto"
    """`auto` takes the fastest backend that the device allows."""
    enforce_eager: bool = False
    """No compiled layers and no recorded steps: starts sooner, decodes slower."""
    prefix_caching: bool = True
    """Keep the pages of what was computed, for prompts that begin alike."""
    compiled: Path | None = None
    """Where layers compiled for a CPU are kept; None compiles none."""
    kv_cache_dtype: KvCacheDtype = "auto"


def default_limits(device: torch.device, tokens_per_step: int | None = None) -> Limits:
    """Return the limits that suit a device, from the memory that is free on it now; with so many
    tokens a step, whatever is in it, where that is given."""
    if device.type != "cuda":
        suitable = Limits()
    else:
        free, _ = torch.cuda.mem_get_info(device)
        long = 8192 if free >= ROOM_FOR_LONG_STEPS else 0
        suitable = Limits(tokens_per_step=2048, tokens_per_prompt_step=long, running=256)
    if not tokens_per_step:
        return suitable
    return replace(suitable, tokens_per_step=tokens_per_step, tokens_per_prompt_step=0)


def kv_dtype(choice: KvCacheDtype, model: torch.dtype) -> torch.dtype:
    """Return the dtype of the page pool of a model that computes in `model`."""
    return model if choice == "auto" else E4M3


def build_engine(
    base: BaseModel,
    variants: Variants,
    config: EngineConfig,
    on_death: Callable[[], None] = lambda: None,
) -> Engine:
    """Make an engine, not started yet.

    Raises:
        EngineConfigError: the context is longer than the model's, the pool holds no sequence, or
            the attention backend does not run here.
    """
    shape = kv_shape(base.model.config)
    limits = config.limits or default_limits(base.device)
    context = _context(base, config)
    elements = shape.bytes_per_token(1)
    layout = page_layout([len(group.layers) for group in variants.groups], elements)
    dtype = kv_dtype(config.kv_cache_dtype, base.model.dtype)
    page_bytes = layout.page_elements * dtype.itemsize
    pages = (config.kv_cache_bytes or _default_pool_bytes(base.device)) // page_bytes
    scheduler = Scheduler(
        limits, variants, layout, PagePool(pages), prefix_caching=config.prefix_caching
    )
    smallest = min(scheduler.capacity(variant.name) for variant in variants)
    if smallest < min(context, layout.tokens_per_page[0]):
        raise EngineConfigError(
            f"a KV cache of {pages * page_bytes} bytes holds {pages} pages of {page_bytes} bytes, "
            "too few for a single sequence; raise --kv-cache-memory"
        )
    logger.info(
        "KV cache: %d pages of %d bytes in %s", pages, page_bytes, str(dtype).removeprefix("torch.")
    )
    pool = torch.zeros(pages, layout.page_elements, dtype=dtype, device=base.device)
    runner = _runner(base, variants, config, layout, pool, limits, context)
    return Engine(scheduler, runner, variants, layout, context, on_death)


def choose_attention(wanted: AttentionChoice, pool: Tensor, dtype: torch.dtype) -> AttentionChoice:
    """Return the backend to use for a page pool and a model that computes in `dtype`, and log it.

    Raises:
        EngineConfigError: the wanted backend does not run here.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if wanted == "paged" and not has_triton:
        raise EngineConfigError("--attention-backend paged needs the package triton")
    if wanted == "paged" and not _converts(pool):
        raise EngineConfigError(
            "--attention-backend paged with --kv-cache-dtype fp8 needs a GPU of compute capability "
            "8.9 or more (Ada, Hopper); use --attention-backend sdpa"
        )
    on_gpu = pool.device.type == "cuda" and dtype.itemsize == 2 and _converts(pool)
    if wanted == "auto" and on_gpu and not has_triton:
        logger.warning("without the package triton, attention is slow on a GPU")
    choice = wanted if wanted != "auto" else ("paged" if on_gpu and has_triton else "sdpa")
    logger.info("attention backend: %s (%s, %s)", choice, pool.device.type, dtype)
    return choice


def _converts(pool: Tensor) -> bool:
    """Return whether Triton's kernels can read and write the pool on its device."""
    if pool.dtype != E4M3 or pool.device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(pool.device) >= _CONVERTS


def _runner(
    base: BaseModel,
    variants: Variants,
    config: EngineConfig,
    layout: PageLayout,
    pool: Tensor,
    limits: Limits,
    context: int,
) -> ModelRunner:
    """Return a runner on pages; on `paged`, unless eager, with compiled layers and recorded
    steps."""
    kv_heads = kv_shape(base.model.config).kv_heads
    last_tokens = torch.zeros(limits.running, dtype=torch.long, device=pool.device)
    if choose_attention(config.attention, pool, base.model.dtype) == "sdpa":
        kept = None if config.enforce_eager else config.compiled
        if kept is not None and four_bit_layers(base.model):
            return _compiled_runner(base, variants, kept, layout, pool, last_tokens, context)
        return _sdpa_runner(base, variants, layout, pool, last_tokens)
    # Triton exists on GPU machines only.
    from server.engine.attention.operator import OperatorAttend
    from server.engine.attention.paged import PagedBackend
    from server.engine.compiling import compile_layers
    from server.engine.graphs import StepGraphs, chunk_sizes_for

    heads = int(base.model.config.num_attention_heads)
    backend = PagedBackend(pool, layout, variants, heads, kv_heads)
    if config.enforce_eager:
        return ModelRunner(base.model, pool, backend, backend, last_tokens, overlaps=True)
    if pool.device.type == "cuda":
        merge_projections(base.model)
        compile_layers(base.model)
    attend = OperatorAttend(backend)
    graphs = StepGraphs(
        base.model,
        attend,
        backend,
        variants,
        most_rows=limits.running,
        vocabulary=int(base.model.config.get_text_config().vocab_size),
        context=context,
        # Interpreted kernels take long over padding, and launches are not what they wait for.
        chunk_sizes=chunk_sizes_for(limits.tokens_per_step) if pool.device.type == "cuda" else (),
    )
    graphs.warm_up(min(limits.running, WARM_ROWS))
    return ModelRunner(base.model, pool, backend, attend, graphs.last_tokens, graphs, overlaps=True)


def _sdpa_runner(
    base: BaseModel, variants: Variants, layout: PageLayout, pool: Tensor, last_tokens: Tensor
) -> ModelRunner:
    sdpa = SdpaBackend(pool, layout, variants, kv_shape(base.model.config).kv_heads)
    overlaps = pool.device.type == "cuda"
    return ModelRunner(base.model, pool, sdpa, sdpa, last_tokens, overlaps=overlaps)


def _compiled_runner(
    base: BaseModel,
    variants: Variants,
    folder: Path,
    layout: PageLayout,
    pool: Tensor,
    last_tokens: Tensor,
    context: int,
) -> ModelRunner:
    """Return a runner of layers in four bits that run by compiled functions, as soon as there are
    any; if there are native ones, of a head, last norm, substitutes, attention and passes of few
    rows that run by those."""
    from server.engine.ahead import CompiledLayers  # brings much of torch along
    from server.engine.forward import Forward

    layers = CompiledLayers(base.model, folder)
    native = layers.native
    substitutes = {} if native is None else _use_native(base, native)
    if native is None or pool.dtype != torch.bfloat16:
        layers.complete()
        return _sdpa_runner(base, variants, layout, pool, last_tokens)
    logger.info("attention is computed by native functions where they take its form")
    kv_heads = kv_shape(base.model.config).kv_heads
    rows = RowsBackend(native, pool, layout, variants, kv_heads)
    forward = Forward(base.model, base.sublayers, substitutes, rows, native, context)
    layers.complete(forward.use)
    return ModelRunner(forward, pool, rows, rows, last_tokens, overlaps=False)


def _use_native(base: BaseModel, native: NativeFunctions) -> dict[int, NormedMap]:
    """Let a model's head, last norm and substitutes run by native functions; return the substitutes
    that do, by layer."""
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(head, EightBitHead):
        head.compute_by(native.eight_bit_product, native.eight_bit_rows)
    use_native_norm(base.model, native)
    return use_native(base.sublayers, native)


def _context(base: BaseModel, config: EngineConfig) -> int:
    limit = context_limit(base.model.config)
    if config.context is not None and config.context > limit:
        raise EngineConfigError(
            f"--max-model-len {config.context} is longer than the {limit} tokens that "
            f"{base.name} was made for"
        )
    return config.context or limit


def _default_pool_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(free * CPU_SHARE), CPU_CEILING)
