"""Substitutes on a CPU: what stands in a dropped sublayer's place, as one native call for few rows.

    hidden --> norm --> map in eight bits, or two of low rank --> + bias, x multiplier --> + hidden

Between torch's operators for these, Python takes longer than their work. Sublayers whose norm is of
another form than the native function's (norms.py) stay as they are, and so do steps of many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from pruning.quantised import EightBitSubstitute
from pruning.sublayers import AttentionSublayer, Substitute
from server.engine.native import MAP_ROWS, NativeFunctions, NormedMap, TiledMap
from server.engine.norms import RootMeanSquare, root_mean_square


def use_native(
    sublayers: Iterable[AttentionSublayer], native: NativeFunctions
) -> dict[int, NormedMap]:
    """Let the native function compute the substitutes in eight bits for few rows; return what it
    is given, by layer.

    Their levels are kept once, as it reads them; steps of many rows compute by the exact maps.
    """
    found: dict[int, NormedMap] = {}
    for sublayer in sublayers:
        substitute = sublayer.substitute
        if not isinstance(substitute, EightBitSubstitute):
            continue
        if (norm := root_mean_square(sublayer.norm)) is not None:
            sublayer.substitute = substitute.exact
            found[sublayer.index] = held = _normed_map(sublayer, substitute, norm)
            sublayer.replace_by(_replacing(sublayer, substitute.exact, held, native))
    return found


def _normed_map(
    sublayer: AttentionSublayer, substitute: EightBitSubstitute, norm: RootMeanSquare
) -> NormedMap:
    return NormedMap(
        norm.gain,
        norm.epsilon,
        sublayer.multiplier,
        tuple(TiledMap.of(*each) for each in substitute.maps),
        substitute.exact.bias.detach().float(),
    )


def _replacing(
    sublayer: AttentionSublayer, exact: Substitute, held: NormedMap, native: NativeFunctions
) -> Callable[[Tensor], Tensor]:
    """Return what computes a sublayer's rows that do not attend."""
    address = held.address()

    def replaced(hidden: Tensor, _held: NormedMap = held) -> Tensor:
        if 0 < hidden.shape[1] <= MAP_ROWS:
            return native.substitute(hidden, address)
        return sublayer.replaced(hidden, exact)

    return replaced
