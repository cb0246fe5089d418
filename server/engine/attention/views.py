"""How a layer finds its keys and values in the page pool.

Each layer group views the same memory as [pages, layers in group, 2, tokens per page, kv heads,
head_dim]; a layer's view is one slice of that, without a copy.
"""

from __future__ import annotations

from torch import Tensor

from pruning.variants import Variants
from server.engine.pages import PageLayout


def layer_views(
    pool: Tensor, layout: PageLayout, variants: Variants, kv_heads: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return per layer its keys and values as [pages, tokens per page, kv_heads, head_dim].

    pool is [pages, page_elements].
    """
    views: dict[int, tuple[Tensor, Tensor]] = {}
    for group, tokens in zip(variants.groups, layout.tokens_per_page, strict=True):
        layers = len(group.layers)
        per_token = _elements_per_layer_token(layout, variants)
        used = pool[:, : layers * tokens * per_token]
        shape = (layers, 2, tokens, kv_heads, per_token // (2 * kv_heads))
        view = used.unflatten(1, shape)  # type: ignore[no-untyped-call]
        for place, layer in enumerate(group.layers):
            views[layer] = (view[:, place, 0], view[:, place, 1])
    return views


def _elements_per_layer_token(layout: PageLayout, variants: Variants) -> int:
    """Return the elements of K and V of one layer and token: the largest group wastes nothing."""
    largest = max(range(len(variants.groups)), key=lambda i: len(variants.groups[i].layers))
    layers = len(variants.groups[largest].layers)
    return layout.page_elements // (layers * layout.tokens_per_page[largest])
