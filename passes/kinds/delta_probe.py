"""What adapters do to single weights of a large model, without running it.

A model of billions of parameters takes far longer to run than its weights take to be written. What a fold or a sum of adapters promises is a promise
about each weight: the site gives the same for every input. So a few sites of each kind (role, method, parameters, shape) are computed on random
inputs, once as they stand in the graph, adapters and all, and once with the weight that takes their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.model import masked
from surgery.model.live import Tensors
from surgery.model.program import Attachment, Program
from surgery.model.room import widened
from surgery.model.threads import alone, one_thread
from surgery.passes.kinds.calls import ties_outside, weight_names
from surgery.passes.kinds.delta import DeltaModule

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


def outputs(program: Program, tensors: Tensors, found: Sequence[Probe]) -> list[Tensor]:
    """What the sites give for their random inputs, in float32."""
    beside: dict[str, list[Attachment]] = {}
    for a in program.attachments:
        if isinstance(program.module(a.module), DeltaModule):
            name = weight_names(program, a.site)[0]
            beside.setdefault(program.aliases.get(name, name), []).append(a)

    def output(i: int) -> Tensor:
        with torch.no_grad():
            return _output(program, tensors, found[i], i, beside.get(found[i].name, ()))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(WORKERS, cores, len(found))
    if workers < 2:
        return [output(i) for i in range(len(found))]
    with one_thread(), ThreadPoolExecutor(workers, thread_name_prefix="probes", initializer=alone) as pool:
        return list(pool.map(output, range(len(found))))


def _output(program: Program, tensors: Tensors, probe: Probe, seed: int, beside: Sequence[Attachment]) -> Tensor:
    memo: dict[str, Any] = {}  # factors that one decomposition gives are computed together

    def read(name: str) -> Tensor:
        value = tensors.fresh(program, program.aliases.get(name, name), memo)
        return widened(value, torch.float32) if value.is_floating_point() else value

    stored = read(probe.name)
    weight = stored.T if probe.transposed else stored
    bias = read(probe.bias) if probe.bias else None
    x = torch.randn(INPUTS, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    base = out = F.linear(x, weight, bias)
    for a in beside:
        module = program.module(a.module)
        live = DeltaModule.bare(module.method, module.site, module.masked).eval()
        for leaf in module.tensors():
            value = read(f"{a.module}.{leaf}")
            if leaf in module._buffers:
                live.register_buffer(leaf, value)
            else:
                live.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        what = {"weight": stored, "bias": bias, "base": base}
        keep = masked.key_of(program, probe.name) if module.masked else None
        out = live(x, out, *(what[r] for r in module.method.reads), *(() if keep is None else (read(keep),)))
    return out
