"""Our own operations as torch's, for packages: what is written in Python cannot be called where this package is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from surgery.model import grouped  # noqa: F401  (registers surgery.grouped_mm)

ROW = 16
"""Bytes that every row of an operand of torch's grouped product must be a multiple of."""


def plain(exported: ExportedProgram) -> ExportedProgram:
    """The program with no operation of ours; the very same where it has none."""
    if not any(node.target in TABLE for node in exported.graph.nodes):
        return exported
    with every_type():
        return exported.run_decompositions(TABLE)


@contextmanager
def every_type() -> Iterator[None]:
    """Torch's grouped product runs on every float type of up to 32 bits and is traced for bfloat16 only; in the block it is traced for all."""
    from torch import _meta_registrations as traced

    usual, made = traced._meta_grouped_mm_common, traced._create_grouped_mm_output_tensor

    def common(mat_a: Tensor, mat_b: Tensor, *rest: Any, offs: Tensor | None = None, out_dtype: Any = None, **more: Any) -> Any:
        if rest or any(v is not None for k, v in more.items() if k.startswith("scale")):
            return usual(mat_a, mat_b, *rest, offs=offs, out_dtype=out_dtype, **more)
        return made(mat_a, mat_b, offs, out_dtype or mat_a.dtype)

    with mock.patch.object(traced, "_meta_grouped_mm_common", common):
        yield


def _products(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows are filled up with zeros where they are no multiple of 16 bytes; a package computes those of weights once, when it is made."""
    step = max(ROW // x.element_size(), 1)
    inner, outer = -weight.shape[1] % step, -weight.shape[2] % step
    wide = weight.shape[2]
    if inner:
        x = F.pad(x, (0, inner))
    if inner or outer:
        weight = F.pad(weight, (0, outer, 0, inner))
    out: Tensor = torch.ops.aten._grouped_mm.default(x, weight.to(x.dtype), offsets)
    return out[:, :wide] if outer else out


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.surgery.grouped_mm.default: _products}


def left(exported: ExportedProgram) -> list[str]:
    """Operations of ours that stay what they are: recurrences along open lengths, which torch cannot compile. Whoever loads the package imports
    this one first, which registers them."""
    return sorted({str(n.target) for n in exported.graph.nodes if getattr(n.target, "namespace", "") == "surgery"})
