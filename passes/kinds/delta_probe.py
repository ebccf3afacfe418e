"""What adapters do to single weights of a large model, without running it.

A model of billions of parameters takes far longer to run than its weights take to be written. What a fold or a sum of adapters promises is a promise
about each weight: the site gives the same for every input. So a few sites of each kind (role, method, parameters, shape) are computed on random
inputs, once as they stand in the graph, adapters and all, and once with the weight that takes their place.

Every element of such a weight is looked at, but where its expression allows it never all of them at once: some rows are read, changed and multiplied
while they are in a core's cache (:mod:`surgery.model.byrows`). What two claims ask for is computed once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.model import masked
from surgery.model.byrows import rows_of
from surgery.model.live import Tensors
from surgery.model.program import Attachment, Program
from surgery.model.room import widened
from surgery.model.threads import alone, one_thread
from surgery.model.weights import DTYPE_BYTES, Cast, Expr, is_float
from surgery.passes.kinds.blocks import spans
from surgery.passes.kinds.calls import ties_outside, weight_names
from surgery.passes.kinds.delta import DeltaModule
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.geometry import Geometry

INPUTS = 4
"""Random input vectors of a site."""
WORKERS = 2
"""Most sites that are computed at once: each holds its weight a few times over in float32."""


@dataclass(frozen=True)
class Probe:
    """A weight by its stored name, how it is stored, and the bias beside it (empty: none)."""

    name: str
    transposed: bool
    bias: str


@dataclass(frozen=True)
class _Adapter:
    """One that stands beside a weight: tensors by leaf with whether each is a buffer, and the mask of the weight."""

    method: DeltaMethod
    site: Geometry
    tensors: tuple[tuple[str, Expr, bool], ...]
    keep: Expr | None


@dataclass(frozen=True)
class Site:
    """All that a site computes with; nothing of the program is needed any more, which may change."""

    weight: Expr
    transposed: bool
    bias: Expr | None
    adapters: tuple[_Adapter, ...]

    def mapped(self, change: Callable[[Expr], Expr]) -> Site:
        """The same site with other expressions."""
        adapters = tuple(
            replace(a, tensors=tuple((n, change(e), b) for n, e, b in a.tensors), keep=None if a.keep is None else change(a.keep))
            for a in self.adapters
        )
        return replace(self, weight=change(self.weight), bias=None if self.bias is None else change(self.bias), adapters=adapters)

    @property
    def key(self) -> str:
        """Two sites with one key give the same for the same inputs."""
        parts: list[Any] = [_plain(self.weight).identity, self.transposed, self.bias and _plain(self.bias).identity]
        for a in self.adapters:
            inside = [(leaf, _plain(expr).identity, buffer) for leaf, expr, buffer in a.tensors]
            parts.append([a.method.verb, a.method.name, a.method.params(), a.site.pairs(), inside, a.keep and a.keep.identity])
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _plain(expr: Expr) -> Expr:
    """Without a widening that reading does anyway."""
    narrow = isinstance(expr, Cast) and expr.dtype == "float32" and is_float(expr.source.dtype) and DTYPE_BYTES[expr.source.dtype] < 4
    return expr.source if narrow else expr  # type: ignore[attr-defined]


def probes(program: Program, chosen: Sequence[Attachment]) -> list[Probe] | None:
    """The first, the middle and the last weight of each kind among those that ``chosen`` change.

    None where that cannot be said weight by weight: an attachment of another kind, a convolution, an embedding, experts, or a weight with several
    uses. Then the model has to be run.
    """
    by_weight: dict[str, list[Attachment]] = {}
    for a in chosen:
        module = program.module(a.module)
        if not isinstance(module, DeltaModule) or module.site.op != "linear":
            return None
        names = weight_names(program, a.site)
        if len(names) != 1 or ties_outside(program, names):
            return None
        by_weight.setdefault(program.aliases.get(names[0], names[0]), []).append(a)
    kinds: dict[str, list[Probe]] = {}
    for name, group in by_weight.items():
        sites = [program.module(a.module).site for a in group]
        what = [(a.method.verb, a.method.name, a.method.params(), s.pairs(), bool(a.site.bias)) for a, s in zip(group, sites, strict=True)]
        key = f"{re.sub(r'[0-9]+', '*', name)} {what}"
        kinds.setdefault(key, []).append(Probe(name, sites[0].transposed, group[0].site.bias))
    return [same[i] for same in kinds.values() for i in sorted({0, len(same) // 2, len(same) - 1})]


def sites(program: Program, found: Sequence[Probe]) -> list[Site]:
    """What computes at the probed weights, as the program is now."""
    beside: dict[str, list[Attachment]] = {}
    for a in program.attachments:
        if isinstance(program.module(a.module), DeltaModule):
            name = weight_names(program, a.site)[0]
            beside.setdefault(program.aliases.get(name, name), []).append(a)

    def expr(name: str) -> Expr:
        return program.weights[program.aliases.get(name, name)]

    made = []
    for probe in found:
        adapters = []
        for a in beside.get(probe.name, ()):
            module = program.module(a.module)
            keep = masked.key_of(program, probe.name) if module.masked else None
            tensors = tuple((leaf, expr(f"{a.module}.{leaf}"), leaf in module._buffers) for leaf in module.tensors())
            adapters.append(_Adapter(module.method, module.site, tensors, None if keep is None else expr(keep)))
        made.append(Site(expr(probe.name), probe.transposed, expr(probe.bias) if probe.bias else None, tuple(adapters)))
    return made


def outputs(program: Program, tensors: Tensors, found: Sequence[Probe]) -> list[Tensor]:
    """What the sites of a program give for their random inputs, in float32."""
    return computed(sites(program, found), tensors)


def computed(found: Sequence[Site], tensors: Tensors) -> list[Tensor]:
    """What the sites give for their random inputs, in float32. Raises S0721 when a stored tensor cannot be read any more."""

    def output(i: int) -> Tensor:
        key = f"{i} {found[i].key}"
        if key not in tensors.measured:
            with torch.no_grad():
                tensors.measured[key] = _output(found[i], tensors, i)
        return tensors.measured[key]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(WORKERS, cores, len(found))
    if workers < 2:
        return [output(i) for i in range(len(found))]
    with one_thread(), ThreadPoolExecutor(workers, thread_name_prefix="probes", initializer=alone) as pool:
        return list(pool.map(output, range(len(found))))


def _output(at: Site, tensors: Tensors, seed: int) -> Tensor:
    memo: dict[str, Any] = {}  # factors that one decomposition gives are computed together

    def read(expr: Expr) -> Tensor:
        value = tensors.value(expr, memo)
        return widened(value, torch.float32) if value.is_floating_point() else value

    bias = None if at.bias is None else read(at.bias)
    inputs = at.weight.shape[0 if at.transposed else 1]
    x = torch.randn(INPUTS, inputs, generator=torch.Generator().manual_seed(seed))
    stored: Tensor | None = None
    base = None if at.transposed or any(a.method.wants_weight() for a in at.adapters) else _by_rows(at.weight, x, bias, tensors, memo)
    if base is None:
        stored = read(at.weight)
        base = F.linear(x, stored.T if at.transposed else stored, bias)
    result = base
    for a in at.adapters:
        live = DeltaModule.bare(a.method, a.site, a.keep is not None).eval()
        for leaf, expr, buffer in a.tensors:
            value = read(expr)
            if buffer:
                live.register_buffer(leaf, value)
            else:
                live.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        if stored is None and "weight" in a.method.reads:
            stored = read(at.weight)
        what = {"weight": stored, "bias": bias, "base": base}
        result = live(x, result, *(what[r] for r in a.method.reads), *(() if a.keep is None else (read(a.keep),)))
    return result


def _by_rows(weight: Expr, x: Tensor, bias: Tensor | None, tensors: Tensors, memo: dict[str, Any]) -> Tensor | None:
    """The site's product without the whole weight in memory; None where its rows cannot be had by themselves."""
    with ExitStack() as files:
        rows = rows_of(weight, lambda expr: tensors.value(expr, memo), tensors.functions, files)
        if rows is None:
            return None
        out = torch.empty(len(x), weight.shape[0])
        wide = torch.empty(0)
        for start, stop in spans(*weight.shape):
            block = rows(start, stop)
            if block.dtype != torch.float32:
                if wide.numel() < block.numel():
                    wide = torch.empty(block.numel())
                block = wide[: block.numel()].view_as(block).copy_(block)
            out[:, start:stop] = F.linear(x, block, None if bias is None else bias[start:stop])
        return out
