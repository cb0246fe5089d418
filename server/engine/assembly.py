"""Putting an engine together: how much memory the pages get, which parts it is made of."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pruning.families import context_limit, kv_shape
from pruning.loading import BaseModel
from pruning.variants import Variants
from server.engine.attention import AttentionBackend
from server.engine.attention.sdpa import SdpaBackend
from server.engine.engine import Engine
from server.engine.pages import PageLayout, PagePool, page_layout
from server.engine.runner import Runner
from server.engine.scheduler import Limits, Scheduler

logger = logging.getLogger(__name__)

CPU_SHARE = 0.25
"""Share of the free memory that pages get on a CPU, which holds much else ..."""
CPU_CEILING = 4 << 30
"""... up to this many bytes."""
CUDA_SHARE = 0.9
"""Share of the device memory left after loading the model."""


class EngineConfigError(ValueError):
    """The settings leave no working engine."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What may be chosen about an engine."""

    limits: Limits = field(default_factory=Limits)
    kv_cache_bytes: int | None = None
    """Bytes of page pool; None takes a share of the free memory."""
    context: int | None = None
    """Longest sequence in tokens; None takes the model's own limit."""


def build_engine(
    base: BaseModel,
    variants: Variants,
    config: EngineConfig,
    on_death: Callable[[], None] = lambda: None,
) -> Engine:
    """Make an engine, not started yet.

    Raises:
        EngineConfigError: the context is longer than the model's, or the pool holds no sequence.
    """
    shape = kv_shape(base.model.config)
    context = _context(base, config)
    dtype = base.model.dtype
    elements = shape.bytes_per_token(1)
    layout = page_layout([len(group.layers) for group in variants.groups], elements)
    page_bytes = layout.page_elements * dtype.itemsize
    pages = (config.kv_cache_bytes or _default_pool_bytes(base.device)) // page_bytes
    scheduler = Scheduler(config.limits, variants, layout, PagePool(pages))
    smallest = min(scheduler.capacity(variant.name) for variant in variants)
    if smallest < min(context, layout.tokens_per_page[0]):
        raise EngineConfigError(
            f"a KV cache of {pages * page_bytes} bytes holds {pages} pages of {page_bytes} bytes, "
            "too few for a single sequence; raise --kv-cache-memory"
        )
    pool = torch.zeros(pages, layout.page_elements, dtype=dtype, device=base.device)
    runner = Runner(base, pool, make_backend(pool, layout, variants, shape.kv_heads))
    return Engine(scheduler, runner, variants, layout, context, on_death)


def make_backend(
    pool: torch.Tensor, layout: PageLayout, variants: Variants, kv_heads: int
) -> AttentionBackend:
    """Return the fastest attention backend that the pool's device and dtype allow, and log it."""
    device = pool.device
    if device.type != "cuda" or pool.dtype.itemsize != 2:
        logger.info("attention backend: sdpa (device %s, %s)", device.type, pool.dtype)
        return SdpaBackend(pool, layout, variants, kv_heads)
    if importlib.util.find_spec("triton") is None:
        logger.warning("attention backend: sdpa, slow on a GPU; `paged` needs the package triton")
        return SdpaBackend(pool, layout, variants, kv_heads)
    from server.engine.attention.paged import PagedBackend  # Triton exists on GPU machines only

    logger.info("attention backend: paged (Triton)")
    return PagedBackend(pool, layout, variants, kv_heads)


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
