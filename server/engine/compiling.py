"""Compiling a model's layers for a GPU: fused element-wise parts, each matrix product once.

One function is compiled for all layers of a form (regional compilation), with the number of rows
and of attending rows left open. torch keeps what it compiled on disk for the next start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.choices import InductorChoices
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from transformers import PreTrainedModel

from server.engine import linear
from server.engine.attention import operator
from server.engine.early import launches_early

_MOST_FORMS = 64
"""Compiled forms of a layer: every way of attending, one row or many, each kind of layer."""

_WIDEST_ROW = 16384
"""Numbers that a program holds in registers."""

_aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default
_linear = linear.linear
_gated = linear.gated
_add_product = linear.add_product
_attend = operator.attend
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})
_TURNS = frozenset({_aten.permute.default, _aten.t.default})
_VIEWS = frozenset({_aten.view.default, _aten.reshape.default})


class Products(CustomGraphPass):
    """Rewrites the matrix products of a compiled layer.

    - One that appears several times is computed once: merged projections
      (pruning/projections.py) ask for the same product and take a slice each. (torch's own
      elimination of common parts runs for training only.)
    - All of them go to `linear`, where those with weights in eight bits are from the start.
    - silu(gate) * up goes to `gated`.
    - Rotary embeddings of whole heads are left to `attend`.
    - The sum that ends a layer, with the residual stream, is part of its last product, in place
      where the layer made that stream itself. (The one in the middle is part of the norm after it.)

    What is not written as these patterns expect stays as it is.
    """

    def __call__(self, graph: fx.Graph) -> None:
        _share(graph)
        for rewrite, target in (
            (_use_linear, None),
            (_use_gated, _aten.mul.Tensor),
            (_join_sum, _aten.add.Tensor),
            (_leave_rotation, _attend),
        ):
            for node in list(graph.nodes):
                if node.target is target or (target is None and node.target in _PRODUCTS):
                    rewrite(graph, node)
            graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Tell torch's cache on disk what this pass does."""
        return get_hash_for_files((__file__, linear.__file__, operator.__file__))


class _Choices(InductorChoices):
    """A norm keeps its row in registers, instead of reading it once for the sum and once more."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction:
            width = features.reduction_numel
            if width.is_number and int(width) <= _WIDEST_ROW:
                return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile a wrapped model's decoder layers and its last norm, at their first use.

    Its head is replaced by one with the same weights.
    """
    # A limit of torch's that counts recompilations over all models of the process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_FORMS)
    # One object for all layers: they share what is compiled if their options are equal.
    options = {
        "post_grad_custom_pre_pass": Products(),
        "combo_kernels": True,
        "triton.enable_pdl": launches_early(model.device),
    }
    V.set_choices_handler(_Choices())
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    for layer in decoder.layers:
        layer.compile(dynamic=True, options=options)
    decoder.norm.compile(dynamic=True, options=options)
    if not _looks_at_lengths(rotary := decoder.rotary_emb):
        rotary.compile(dynamic=True)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear:  # torch compiles none that stands alone
        model.set_output_embeddings(_Head(head))  # type: ignore[no-untyped-call]


def _looks_at_lengths(rotary: nn.Module) -> bool:
    """Return whether rotary embeddings change with the longest sequence: no graph holds that."""
    kinds = getattr(rotary, "rope_type", "")
    every = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any("dynamic" in kind or kind == "longrope" for kind in every)


class _Head(nn.Module):
    """A language model head whose product goes to `linear`."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight  # tied to the embedding in many models
        self.bias = head.bias

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = linear.linear(rows, self.weight, self.bias)
        return product.view(*inputs.shape[:-1], product.shape[-1])


def _share(graph: fx.Graph) -> None:
    """Compute equal products once, and what lies between them and their operands."""
    known: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in _PRODUCTS | _TURNS | _VIEWS | {_linear}:
            first = known.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _use_linear(graph: fx.Graph, node: fx.Node) -> None:
    """mm(x, weight.T) or addmm(bias, x, weight.T) becomes `linear`."""
    *bias, x, turned = node.args
    if not isinstance(turned, fx.Node) or turned.target not in _TURNS or node.kwargs:
        return
    with graph.inserting_before(node):
        product = _call(graph, _linear, x, turned.args[0], bias[0] if bias else None)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _use_gated(graph: fx.Graph, node: fx.Node) -> None:
    """silu(product[:, :half]) * product[:, half:] becomes `gated`."""
    for opened, up in _factors(node):
        gate = _silu_of(_only(opened, _convert))
        product = _half(gate, 0)
        if product is None or product is not _half(up, 1) or len(product.users) > 2:
            continue
        found = _product_of(product)
        if found is None or found[2] is not None:
            continue
        x, weight, _, *scale = found
        with graph.inserting_before(node):
            rows = _call(graph, _gated, x, weight, *scale)
            shaped = _call(graph, _aten.unsqueeze.default, rows, 0)
        node.replace_all_uses_with(shaped)
        return


def _silu_of(node: fx.Node | None) -> fx.Node | None:
    """Return g if node is g / (1 + exp(-g)) in float32, as torch decomposes it."""
    if node is None or node.target is not _aten.div.Tensor:
        return None
    wide, below = node.args
    if not isinstance(below, fx.Node) or below.target is not _aten.add.Tensor:
        return None
    inverse = _only(_only(below.args[0], _aten.exp.default), _aten.neg.default)
    return _only(wide, _convert) if below.args[1] == 1 and inverse is wide else None


def _half(node: Any, which: int) -> fx.Node | None:
    """Return p if node is the first or second half of p's last dimension."""
    if not isinstance(node, fx.Node) or node.target is not _aten.slice.Tensor:
        return None
    if len(node.args) != 4:  # it takes every second one, or the like
        return None
    whole, dim, start, end = node.args
    assert isinstance(whole, fx.Node)
    width = whole.meta["val"].shape[-1]
    bounds = (which * width // 2, (which + 1) * width // 2)
    found = (start, min(end, width))  # an open end is a very large one
    return whole if dim == whole.meta["val"].dim() - 1 and found == bounds else None


def _join_sum(graph: fx.Graph, node: fx.Node) -> None:
    """residual + linear(x, weight) becomes linear(x, weight, residual), if the layer returns it."""
    if any(user.op != "output" for user in node.users):
        return
    for residual, viewed in _factors(node, _aten.add.Tensor):
        found = _product_of(viewed)
        if found is None or found[2] is not None or len(viewed.users) > 1:
            continue
        if residual.meta["val"].shape != node.meta["val"].shape:
            continue
        x, weight, _, *scale = found
        with graph.inserting_before(node):
            flat = _call(graph, _aten.squeeze.dim, residual, 0)
            if not scale and _is_over(graph, residual):
                _call(graph, _add_product, x, weight, flat)
            else:
                flat = _call(graph, _linear, x, weight, flat, *scale)
            shaped = _call(graph, _aten.unsqueeze.default, flat, 0)
        node.replace_all_uses_with(shaped)
        return


def _is_over(graph: fx.Graph, residual: fx.Node) -> bool:
    """Return whether the residual stream may be overwritten by the last sum: where the layer made
    it by a sum of its own, which nothing that is returned may be a view of."""
    made = residual.target is _aten.add.Tensor
    return made and all(user.op != "output" for user in residual.users)


def _leave_rotation(graph: fx.Graph, node: fx.Node) -> None:
    """attend(rotated query, rotated key, ...) becomes attend(query, key, ..., cos, sin)."""
    query, key = (_unrotated(argument) for argument in node.args[:2])
    if query is None or key is None or query[1:] != key[1:]:
        return
    with graph.inserting_before(node):
        arguments = (query[0], key[0], *node.args[2:], *query[1:])
        attended = _call(graph, _attend, *arguments)
    node.replace_all_uses_with(attended)
    graph.erase_node(node)


def _unrotated(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return x, cos and sin if node is x * cos + [-x2, x1] * sin, where x1 and x2 are the halves of
    x [1, heads, rows, dim], and cos and sin are [1, rows, dim]."""
    for plain, turned in _factors(node, _aten.add.Tensor):
        for x, wide_cos in _factors(plain):
            for halves, wide_sin in _factors(turned):
                cos, sin = (_only(wide, _aten.unsqueeze.default) for wide in (wide_cos, wide_sin))
                if cos is None or sin is None or not _is_turned(halves, x):
                    continue
                angles = (1, 1, *_shape(x)[2:])
                if _shape(wide_cos) == _shape(wide_sin) == angles:
                    return x, cos, sin
    return None


def _is_turned(node: fx.Node, x: fx.Node) -> bool:
    """Return whether node is the halves of x's last dimension, the second one negated, first."""
    if node.target is not _aten.cat.default or len(node.args) != 2:
        return False
    parts, dim = node.args
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return False
    ends = dim in (-1, x.meta["val"].dim() - 1)
    second = _half(_only(parts[0], _aten.neg.default), 1)
    return ends and second is x and _half(parts[1], 0) is x


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _product_of(viewed: fx.Node) -> tuple[Any, ...] | None:
    """Return the arguments of `linear` if node is a view [1, rows, outputs] of its result."""
    if viewed.target not in _VIEWS or not isinstance(viewed.args[0], fx.Node):
        return None
    product, shape = viewed.args[0], viewed.meta["val"].shape
    is_row = len(shape) == 3 and shape[0] == 1 and shape[-1] == product.meta["val"].shape[-1]
    return product.args if product.target is _linear and is_row else None


def _factors(node: Any, target: Any = _aten.mul.Tensor) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield both orders of a product's (or sum's) operands, if node is one of two tensors and
    nothing more, as a factor of the second one is."""
    if isinstance(node, fx.Node) and node.target is target and not node.kwargs:
        first, second = node.args[:2]
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            yield first, second
            yield second, first


def _only(node: Any, target: Any) -> fx.Node | None:
    """Return the operand if node is the `target` of one; else None."""
    if not isinstance(node, fx.Node) or node.target is not target:
        return None
    operand = node.args[0]
    return operand if isinstance(operand, fx.Node) else None


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Insert a call and note the shape of its result."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda argument: argument.meta["val"])
    node.meta["val"] = target(*values)
    return node
