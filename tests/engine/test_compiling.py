"""Compiled layers against the family's own code, and what their graphs are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import fx

pytest.importorskip("triton")

from pruning.attention import Attend, AttentionForm, CausalAttention
from pruning.loading import BaseModel
from pruning.projections import merge_projections
from server.engine.attention.operator import OperatorAttend
from server.engine.batch import Batch
from server.engine.compiling import Products, compile_layers
from tests.engine.tiny_engine import LAYERS, wrapped
from tests.pruning.tiny_models import tiny_model

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
    ) -> torch.Tensor:
        return CausalAttention()(layer, query, key, value, form).contiguous()


def logits(base: BaseModel, attend: Attend, rows: int, attending: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        output = base.model(
            torch.arange(4, 4 + rows, device=DEVICE)[None],
            position_ids=torch.arange(rows, device=DEVICE)[None],
            attend=attend,
            attending_rows=attending,
        )
    return output.logits.double().cpu()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_layers_are_as_exact_as_the_familys_own_code(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # what earlier tests compiled would do here, and leave nothing to watch
    graphs: list[Counter[str]] = []

    class Watched(Products):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            graphs.append(Counter(str(node.target) for node in graph.nodes))

    monkeypatch.setattr("server.engine.compiling.Products", Watched)
    exact, plain, fast = (
        wrapped(tiny_model(family, layers=LAYERS).to(DEVICE, dtype))  # type: ignore[arg-type]
        for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    merge_projections(fast.model)
    compile_layers(fast.model)
    backend = Dense()
    for rows, attending in STEPS:
        expected = logits(exact, CausalAttention(), rows, attending)
        allowed = (logits(plain, CausalAttention(), rows, attending) - expected).norm()
        with torch.compiler.config.patch(force_disable_caches=True):
            got = (logits(fast, OperatorAttend(backend), rows, attending) - expected).norm()
        assert got < 1.5 * allowed
    attending_layers = [graph for graph in graphs if graph["attndrop.attend.default"]]
    assert attending_layers
    for graph in attending_layers:
        # Queries, keys and values are one product, and so are gate and up.
        products = graph["attndrop.linear.default"] + graph["attndrop.gated.default"]
        assert products == 4 * graph["attndrop.attend.default"]
        assert graph["aten.mm.default"] == graph["aten.addmm.default"] == 0
        assert graph["attndrop.gated.default"] == (1 if family == "llama" else 0)
