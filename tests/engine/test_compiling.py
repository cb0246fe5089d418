"""Compiled layers against the family's own code, and what their graphs are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from pruning.attention import Attend, AttentionForm, CausalAttention
from pruning.loading import BaseModel
from pruning.projections import merge_projections
from pruning.sublayers import last_rows
from server.engine.attention import operator
from server.engine.attention.kernels import Angles
from server.engine.attention.operator import OperatorAttend
from server.engine.batch import Batch
from server.engine.compiling import Products, compile_layers
from server.engine.eight_bits import KINDS, Kind, quantise
from tests.engine.eight_bits import round_weights
from tests.engine.tiny_engine import LAYERS, wrapped
from tests.pruning.tiny_models import tiny_model
from tests.reference.rotary import rotated

MIXED = (6, [6, 2, 6, 0])
"""Rows, and how many of them attend in each layer."""
STEPS: list[tuple[int, list[int]]] = [
    (7, [7] * LAYERS),
    (5, [5, 0, 5, 0]),
    (1, [1] * LAYERS),
    MIXED,
]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Dense:
    """A backend that attends the rows of a step to each other."""

    def prepare(self, batch: Batch) -> None:
        raise AssertionError("no batches here")

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        form: AttentionForm,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        if angles is not None:
            query, key = (rotated(x, angles.cos, angles.sin) for x in (query, key))
        return CausalAttention()(layer, query, key, value, form).contiguous()


def logits(
    base: BaseModel,
    attend: Attend,
    rows: int,
    attending: Sequence[int],
    wanted: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the logits of the wanted rows, None: all. Where all are, none ends before."""
    index = None if wanted is None else torch.tensor(wanted, device=DEVICE)
    with torch.inference_mode():
        output = base.model(
            torch.arange(4, 4 + rows, device=DEVICE)[None],
            position_ids=torch.arange(rows, device=DEVICE)[None],
            attend=attend,
            attending_rows=attending,
            last=last_rows(attending, None, rows, index),
        )
    return output.logits.double().cpu()


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Return a list that will hold what each compiled graph calls, how often."""
    torch._dynamo.reset()  # what earlier tests compiled would leave nothing to watch
    graphs: list[Counter[str]] = []

    class Watched(Products):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            graphs.append(Counter(str(node.target) for node in graph.nodes))

        def uuid(self) -> None:
            """Keep torch from finding on disk what was compiled before: nobody would watch it."""

    monkeypatch.setattr("server.engine.compiling.Products", Watched)
    return graphs


def check_as_exact(exact: BaseModel, plain: BaseModel, fast: BaseModel) -> None:
    """Check that compiled layers are as near to exact logits as plain ones in the same dtype."""
    backend = Dense()
    for rows, attending in STEPS:
        expected = logits(exact, CausalAttention(), rows, attending)
        allowed = (logits(plain, CausalAttention(), rows, attending) - expected).norm()
        got = logits(fast, OperatorAttend(backend), rows, attending) - expected
        wanted = [rows - 1, 0] if rows > 2 else None
        some = logits(fast, OperatorAttend(backend), rows, attending, wanted)
        assert got.norm() < 1.5 * allowed
        if wanted is not None:
            assert (some - expected[:, wanted]).norm() < 1.5 * allowed


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "olmo2"])
def test_compiled_layers_are_as_exact_as_the_familys_own_code(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = watched(monkeypatch)
    exact, plain, fast = (
        wrapped(tiny_model(family, layers=LAYERS).to(DEVICE, dtype))  # type: ignore[arg-type]
        for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    merge_projections(fast.model)
    compile_layers(fast.model)
    check_as_exact(exact, plain, fast)
    attending_layers = [graph for graph in graphs if graph["attndrop.attend.default"]]
    assert attending_layers
    for graph in attending_layers:
        # Queries, keys and values are one product, and so are gate and up.
        out_of_place = graph["attndrop.linear.default"] + graph["attndrop.gated.default"]
        products = out_of_place + graph["attndrop.add_product.default"]
        assert products == 4 * graph["attndrop.attend.default"]
        assert graph["aten.mm.default"] == graph["aten.addmm.default"] == 0
        assert graph["attndrop.gated.default"] == (0 if family == "gemma2" else 1)
        # Attention rotates queries and keys, where the family does not in another dtype.
        assert (graph["aten.neg.default"] == 0) == (family != "olmo2")
    # Where all rows attend and go on, and no norm comes between, the last sum is in place.
    in_place = any(graph["attndrop.add_product.default"] for graph in attending_layers)
    assert in_place == (family in ("llama", "qwen3"))


def turned(x: Tensor, first: slice, second: slice) -> Tensor:
    return torch.cat([-x[..., second], x[..., first]], -1)


def rotated_by(x: Tensor, angles: Angles, first: slice, second: slice, factor: float) -> Tensor:
    """Return x, rotated as families write it if `first` and `second` are its halves."""
    cos, sin = (each.unsqueeze(1) for each in angles)
    return torch.add(x * cos, turned(x, first, second) * sin, alpha=factor)


HALVES = slice(None, 4), slice(4, None)
ROTATIONS: dict[str, Callable[[Tensor, Angles], Tensor]] = {
    "of halves": lambda x, angles: rotated_by(x, angles, *HALVES, 1),
    "swapped halves": lambda x, angles: rotated_by(x, angles, *reversed(HALVES), 1),
    "neighbours": lambda x, angles: rotated_by(x, angles, slice(0, None, 2), slice(1, None, 2), 1),
    "with a factor": lambda x, angles: rotated_by(x, angles, *HALVES, 2),
    "of a part": lambda x, angles: torch.cat(
        [rotated(x[..., :4], angles.cos[0, :, :4], angles.sin[0, :, :4]), x[..., 4:]], -1
    ),
    "none": lambda x, angles: x,
}


@pytest.mark.parametrize("same_angles", [True, False], ids=["", "keys by others"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_only_rotations_of_halves_by_the_same_angles_are_left_to_attention(
    rotation: str, same_angles: bool
) -> None:
    backend, rotate = Dense(), ROTATIONS[rotation]
    attend = OperatorAttend(backend)
    q, k = torch.randn(2, 1, 2, 5, 8)
    angles = torch.randn(4, 1, 5, 4).repeat(1, 1, 1, 2)

    def layer(q: Tensor, k: Tensor, *angles: Tensor) -> Tensor:
        own, other = Angles(*angles[:2]), Angles(*angles[2:])
        q, k = rotate(q, own), rotate(k, own if same_angles else other)
        return attend(0, q, k, k, AttentionForm(1.0))

    traced = make_fx(layer, tracing_mode="fake")(q, k, *angles)
    expected = traced(q, k, *angles)
    Products()(traced.graph)
    traced.recompile()
    torch.testing.assert_close(traced(q, k, *angles), expected)
    (node,) = (each for each in traced.graph.nodes if each.target is operator.attend)
    assert (len(node.args) == 10) == (rotation == "of halves" and same_angles)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_read_eight_bits(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, so that gates are found; in float16, which Triton's interpreter knows."""
    graphs = watched(monkeypatch)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    exact, plain, fast = (
        wrapped(tiny_model(layers=LAYERS).to(DEVICE, dtype))  # type: ignore[arg-type]
        for _ in range(3)
    )
    exact.model.double()  # of weights that were rounded to 16 bits: all have the same bytes
    for base in (exact, plain):
        round_weights(base.model, kind)
    quantise(fast.model, kind)
    assert merge_projections(fast.model) == 0
    compile_layers(fast.model)
    check_as_exact(exact, plain, fast)
    assert graphs
    for graph in graphs:
        if layers := graph["attndrop.attend.default"]:
            assert graph["attndrop.linear.default"] == 3 * layers  # qkv, o, down
        assert graph["aten.mm.default"] == graph["aten.addmm.default"] == 0
    assert sum(graph["attndrop.gated.default"] for graph in graphs) > 0
