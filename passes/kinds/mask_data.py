"""Masks that depend on data: what is known of a site's inputs is gathered layer by layer, each layer masked before the next is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef
from surgery.model import masked
from surgery.model.program import Program
from surgery.model.tally import Tally
from surgery.model.uses import Use, uses_of
from surgery.passes.kinds.calls import calls_of, operand
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.mask import Target, put, put_under_mask
from surgery.passes.operation import Resolved

WIDE = 4096
"""Up to so many columns a Gram matrix is summed in float64, above in float32 to halve its memory."""


class Statistic:
    """Sums over the inputs of a site: squared ``norms`` of each column, or the ``gram`` matrix ``X^T X``, for canonical columns."""

    def __init__(self, what: str, geometry: Geometry) -> None:
        self.what = what
        self.geometry = geometry
        self.total: Tensor | None = None

    def add(self, value: Tensor, keep: Tensor | None) -> None:
        """The values that enter the site in one batch; ``keep`` says which rows are real."""
        rows = columns_of(self.geometry, value) if self.geometry.op == "conv" else value[keep] if keep is not None else value
        rows = rows.reshape(-1, rows.shape[-1])
        if self.what == "norms":
            found = rows.double().square().sum(0)
        else:
            rows = rows.to(torch.float64 if rows.shape[-1] <= WIDE else torch.float32)
            found = rows.T @ rows
        self.total = found if self.total is None else self.total.add_(found)

    def value(self) -> Tensor | None:
        """The norms, float32 ``[in]`` (of a grouped convolution ``[out, in / groups * k]``), or the Gram matrix; None when nothing came."""
        if self.total is None or self.what == "gram":
            return self.total
        norms = self.total.sqrt().float()
        g = self.geometry
        return norms if g.groups == 1 else norms.reshape(g.groups, -1).repeat_interleave(g.out // g.groups, 0)


def columns_of(site: Geometry, value: Tensor) -> Tensor:
    """What a convolution multiplies its flattened kernel with: ``[n, places, in * k1 * k2]`` of ``[n, in, h, w]`` (or ``[n, in, t]``)."""
    kernel, stride, dilation = site.kernel, site.stride, site.dilation
    padding = (0,) * len(kernel) if site.padding == "valid" else site.padding
    if isinstance(padding, str):  # the same size: what is odd goes behind
        sides = []
        for k, d in zip(reversed(kernel), reversed(dilation), strict=True):
            sides += [d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2]
        value, padding = F.pad(value, sides), (0,) * len(kernel)
    if len(kernel) == 1:
        value, kernel, stride, dilation, padding = value.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation), (0, *padding)
    return F.unfold(value, kernel, dilation, padding, stride).transpose(1, 2)  # type: ignore[arg-type]


class Routed(Statistic):
    """The norms of what each expert sees, float32 ``[experts, 1, in]``; of an expert without tokens they are zero."""

    def __init__(self, what: str, geometry: Geometry, uses: list[Use], shape: tuple[int, ...]) -> None:
        super().__init__(what, geometry)
        self.tallies = [Tally(use, shape, 2) for use in uses]

    def value(self) -> Tensor | None:
        sums = [t.total for t in self.tallies if t.total is not None]
        return torch.stack(sums).sum(0).sqrt().float().unsqueeze(1) if sums else None


def study_targets(program: Program, op: Resolved, targets: list[Target]) -> None:
    """Mask ``targets`` one part of the model after another, each by the inputs that it gets behind the masked parts in front of it.

    Raises S0465 for a site that the data does not reach.
    """
    study = op.study
    assert study is not None
    values: dict[NodeRef, list[Any]] = {}
    calls: dict[NodeRef, list[Any]] = {}
    sums: dict[tuple[Any, ...], Statistic] = {}
    used: dict[str, list[tuple[Target, Statistic]]] = {}
    late: list[Target] = []
    for target in targets:
        geometry = target.geometry
        name = masked.first(program, target.names[0])
        if geometry.experts:
            routed = Routed(target.method.statistic, geometry, _products(program, target), program.weights[name].shape)
            for tally in routed.tallies:
                calls.setdefault(tally.use.ref, []).append(tally)
            used.setdefault(name, []).append((target, routed))
            continue
        refs = tuple(NodeRef(graph, operand(node).name) for graph, node in calls_of(program, target.site))
        shape = (
            geometry.kernel,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            geometry.groups > 1 and geometry.out,
        )
        key = (target.method.statistic, refs, shape)
        if key not in sums:
            sums[key] = Statistic(target.method.statistic, geometry)
            for ref in dict.fromkeys(refs):
                values.setdefault(ref, []).append(sums[key].add)
        used.setdefault(name, []).append((target, sums[key]))

    def settle(names: tuple[str, ...]) -> bool:
        changed = False
        for name in names:
            for target, statistic in used.pop(name, ()):
                value = statistic.value()
                if value is None:
                    raise _unseen(target, op, "the data does not reach it")
                weight = study.tensor(program, name) if statistic.what == "gram" else None
                put(program, op, target, value, weight, wire=False)
                # adapters in the root graph are told when the pass over it is done: it runs a copy of that graph
                if any(not graph for graph, _ in calls_of(program, target.site)):
                    late.append(target)
                else:
                    put_under_mask(program, target)
                changed = True
        return changed

    study.observe(
        program, op.data, outputs={ref: _all(each) for ref, each in values.items()}, calls={ref: _all(each) for ref, each in calls.items()},
        settle=settle, text=f"masking for {op.name}",
    )  # fmt: skip
    settle(tuple(used))
    for target in late:
        put_under_mask(program, target)


def _all(hooks: list[Any]) -> Callable[..., None]:
    def run(*seen: Any) -> None:
        for hook in hooks:
            hook(*seen)

    return run


def _products(program: Program, target: Target) -> list[Use]:
    """Where the experts of a site meet their tokens; empty where the graph does not show it."""
    name = masked.first(program, target.names[0])
    rows = target.geometry.rows or ((0, target.geometry.full_out),)
    found = [u for u in uses_of(program, [name])[name] if u.expert_axis is not None]
    return [u for u in found if u.rows is None or any(u.rows[1] < b and a < u.rows[2] for a, b in rows)]


def check_visible(program: Program, target: Target, op: Resolved) -> None:
    """S0465 where the graph has no one value that enters the site, or one whose columns cannot be told apart."""
    geometry, gram = target.geometry, target.method.statistic == "gram"
    if geometry.experts and gram:
        raise _unseen(target, op, "each expert sees other tokens, and a matrix for each is not kept")
    if geometry.experts and not _products(program, target):
        raise _unseen(target, op, "the graph does not show which tokens its experts see")
    if geometry.op == "conv" and (len(geometry.kernel) > 2 or (geometry.groups > 1 and gram)):
        raise _unseen(target, op, "it is a convolution in groups or over three axes")


def _unseen(target: Target, op: Resolved, why: str) -> Exception:
    return fail(
        "S0465", f"the inputs of {target.site.role} are not known: {why}", op.origin.span, "selected here",
        help="use `score = magnitude` for this part, in a statement of its own",
    )  # fmt: skip
