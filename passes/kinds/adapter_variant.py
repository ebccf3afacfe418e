"""Which method a part of an adapter file is: looked up by the fields of the file's config, never by a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.adapter import Adapter, Low
from surgery.model.weights import Expr, Reshape
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.lowrank import LowRankMethod


@dataclass(frozen=True)
class Variant:
    """The method with its parameters, its tensors by their names there, and a remark where the file does not hold all that it means."""

    method: DeltaMethod
    tensors: Mapping[str, Expr]


@cache
def _known() -> dict[frozenset[tuple[str, Any]], type[LowRankMethod]]:
    from surgery.passes import registry

    found: dict[frozenset[tuple[str, Any]], type[LowRankMethod]] = {}
    for cls in registry.of("adapt").values():
        if issubclass(cls, LowRankMethod) and cls.exchange is not None:
            found.setdefault(frozenset(cls.exchange.items()), cls)
    return found


def variant(adapter: Adapter, low: Low, span: Span) -> Variant:
    """The method whose ``exchange`` the adapter's flags are. A scale of another rule than the method's goes into its ``alpha``, which is exact.
    Raises S0782 where no method has these flags."""
    flags = dict(adapter.flags)
    more: dict[str, Any] = {}
    if start := re.fullmatch(r"(pissa)(?:_niter_(\d+))?", str(flags.get("init_lora_weights", ""))):
        flags["init_lora_weights"] = start[1]  # a randomised start is computed in full: see :func:`randomised`
    if low.embedding or len(low.a.shape) > 2:
        flags.pop("init_lora_weights", None)  # such starts are for linear layers; others begin as always
    cls = _known().get(frozenset(flags.items())) or _known().get(frozenset((k, v) for k, v in flags.items() if k != "use_rslora"))
    if cls is None:
        said = ", ".join(f"{k} = {str(v).lower()}" for k, v in sorted(flags.items()))
        raise fail(
            "S0782",
            f"{adapter.name} is a LoRA with {said}, for which there is no method",
            span,
            "opened here",
            help="save it as a plain LoRA",
        )
    method = scaled(cls, low.rank, low.scale, adapter.dropout, **more)
    tensors: dict[str, Expr] = {"A": low.a, "B": low.b}
    if low.magnitude is not None:
        m = low.magnitude
        tensors["magnitude"] = m if len(m.shape) == 1 else Reshape((low.b.shape[0],), m.dtype, m)
    return Variant(method, tensors)


def scaled(cls: type[LowRankMethod], rank: int, scale: float, dropout: float, **more: Any) -> LowRankMethod:
    """A method of ``rank`` whose scale is ``scale``."""
    unit = cls(rank=rank, alpha=1.0, **more).scale()
    alpha = scale / unit
    return cls(rank=rank, alpha=float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 else alpha, dropout=dropout, **more)


def plain(rank: int, scale: float = 1.0, dropout: float = 0.0) -> LowRankMethod:
    """The low-rank change without anything else, of ``rank`` and ``scale``."""
    return scaled(_known()[frozenset()], rank, scale, dropout)


def randomised(adapter: Adapter) -> bool:
    """Whether the base that the adapter was trained on was made with a random decomposition, which nothing can repeat exactly."""
    return "_niter_" in str(adapter.flags.get("init_lora_weights", ""))
