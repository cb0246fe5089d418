"""Compiling a model's layers for a GPU: fused element-wise parts, each matrix product once.

One function is compiled for all layers of a form (regional compilation), with the number of rows
and of attending rows left open. torch keeps what it compiled on disk for the next start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from transformers import PreTrainedModel

_MOST_FORMS = 64
"""Compiled forms of a layer: every way of attending, one row or many, each kind of layer."""


_aten = torch.ops.aten
_SHARED = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        # what lies between a product and its operands
        _aten.view.default,
        _aten.reshape.default,
        _aten.permute.default,
        _aten.t.default,
    }
)


class ShareProducts(CustomGraphPass):
    """Computes a matrix product once where it appears several times.

    Merged projections (pruning/projections.py) ask for the same product and take a slice each;
    torch's own elimination of common parts runs for training only.
    """

    def __call__(self, graph: fx.Graph) -> None:
        known: dict[str, fx.Node] = {}
        for node in list(graph.nodes):
            if node.target in _SHARED:
                first = known.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    graph.erase_node(node)

    def uuid(self) -> Any:
        """Tell torch's cache on disk what this pass does."""
        return get_hash_for_files((__file__,))


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer of a wrapped model, at its first use."""
    # A limit of torch's that counts recompilations over all models of the process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_FORMS)
    options = {"post_grad_custom_pre_pass": ShareProducts()}  # one object: equal for all layers
    for layer in model.get_decoder().layers:  # type: ignore[no-untyped-call]
        layer.compile(dynamic=True, options=options)
