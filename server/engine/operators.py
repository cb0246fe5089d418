"""Functions as operators, which a compiler leaves as they are.

`torch.library.custom_op` checks at each call that nothing is aliased, which for the products of a
step that is launched kernel by kernel took the host a third of its time (docs/performance.md).
Registered by the library itself, a function is called and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("attndrop", "FRAGMENT")  # type: ignore[no-untyped-call]

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., object])


def in_place(changed: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Turn a function that returns nothing and changes the argument of this name, and no other,
    into the operator of its name."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        _define(function, (changed,))
        torch.library.register_fake(f"attndrop::{function.__name__}", lambda *_: None, lib=_LIBRARY)
        return _operator(function)

    return register


def operator(shape: Callable[..., Tensor]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Turn a function into the operator of its name. It must change none of its arguments and
    return a tensor of its own; `shape` returns one that is like it, for a compiler."""

    def register(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        _define(function, ())
        torch.library.register_fake(f"attndrop::{function.__name__}", shape, lib=_LIBRARY)
        return _operator(function)

    return register


def _define(function: Callable[..., object], changed: tuple[str, ...]) -> None:
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=changed))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _operator(function: F) -> F:
    return cast("F", getattr(torch.ops.attndrop, function.__name__).default)
