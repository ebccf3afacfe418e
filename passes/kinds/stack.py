"""Kind ``stack``: layers of one or several checkpoints run one behind the other, as one stack of another depth.

Each layer of the result is a copy of the layer that it is taken from: its own graph, its own tensors (unless the statement shares them), its
own place in the cache. What stands in front of the layers comes from the first source, what stands behind them from the last. Measured
before anything is written: the result computes what the sources' own layers compute when they are called in this order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.plan import group_roles, plural
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.model.running import is_small
from surgery.model.weights import Expr, Scale, Select, Update, Weights, cast, is_float, select
from surgery.passes.kinds import attach
from surgery.passes.kinds.drop_extract import is_layer
from surgery.passes.kinds.merge_fit import shown, unlike
from surgery.passes.kinds.merge_inputs import Source
from surgery.passes.kinds.stack_claim import stacked_claim
from surgery.passes.kinds.stack_config import stack_layers
from surgery.passes.kinds.stack_graph import Chain
from surgery.passes.kinds.stack_order import Order
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class StackMethod(Method):
    """Base of the methods that stack layers. Fields ``slices``, ``scale`` and ``share`` are read by the kind."""

    kind: ClassVar[str] = "stack"
    fold_class: ClassVar[str] = "slice"
    identity: ClassVar[str] = "changed"
    places: ClassVar[tuple[str, ...]] = ()
    needs_sites: ClassVar[bool] = False


@dataclass(frozen=True)
class Stacking:
    """What a statement stacks: the sources with their programs, the order, and the method of each layer of the result."""

    sources: tuple[Source, ...]
    programs: tuple[Program, ...]
    order: Order
    methods: tuple[StackMethod, ...] = field(default=())


# ------------------------------------------------------------------ the pass


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Write the stack. Raises S0775 (factors), S0779 (`on`), S0799 (layers that cannot be stacked)."""
    data = op.data
    assert isinstance(data, Stacking) and isinstance(op.method, StackMethod)
    span = op.origin.span
    if op.sites:
        raise fail("S0779", "`merge stack` takes no `on`: its slices say which layers", span, "selects parts", help="leave `on` out")
    for source in data.sources:
        if source.weight != 1:
            raise fail(
                "S0775", "merge stack: it takes no factors", span, "these factors", help="`scale` says what a layer adds to the stream"
            )
    order = data.order
    _free_of_attachments(program, data, span)
    before = [p if p is not program else program.copy() for p in data.programs]
    chains = {id(p): Chain(p, order.stack, span, s.name) for p, s in zip(before, data.sources, strict=True)}
    mine = Chain(program, order.stack, span, "the model")
    for source, other in zip(data.sources, before, strict=True):
        _same_symbols(program, other, source, span)
        _same_positions(program, source, span)
    sizes = [_size(program, s) for s in mine.sites]
    ends = _ends(program, data, before, mine, op)
    plan = [(chains[id(before[t.source])], t.layer) for t in order.layers]
    made = _layers(program, data, before, mine, op)
    frame = program.copy() if op.study is not None else program
    mine.rewrite(plan)
    _install(program, mine.container, made, op)
    for name, expr in ends.items():
        program.weights[name] = expr
        program.journal.record(name, op.origin)
    wrong = stack_layers(program, order.stack, len(mine.links), [(before[t.source], t.layer) for t in order.layers])
    _tidy(program, order, op)
    program.touch()
    for line in _told(data, order, len(mine.links), wrong):
        op.tell(line)
    _claimed(program, frame, data, before, ends, op)
    return _changes(program, order, data, sizes)


def _claimed(program: Program, frame: Program, data: Stacking, before: Sequence[Program], ends: dict[str, Expr], op: Resolved) -> None:
    """The promise, where the models are small enough to be run side by side."""
    if op.study is None:
        return
    if not all(is_small(p) for p in (program, *before)):
        op.tell("too large to be run beside its sources: that the layers follow in this order was not measured")
        return
    scaled = frozenset(i for i, _ in enumerate(data.order.layers) if _scale_of(data, i) != 1)
    frame.weights.update(ends)
    op.claim(stacked_claim(program.copy(), frame, before, data.order, scaled, op.origin.span))


def _scale_of(data: Stacking, layer: int) -> float:
    return float((data.methods[layer] if len(data.methods) > 1 else data.methods[0]).params()["scale"])


def _free_of_attachments(program: Program, data: Stacking, span: Span) -> None:
    for source, other in zip(data.sources, data.programs, strict=True):
        for a in other.attachments:
            if a.site.stack == data.order.stack:
                raise fail(
                    "S0799", f"{a.name} is attached to {a.site.role} of {source.name}", span, "stacked here",
                    also=[(a.origin.span, "attached here")] if other is program else (), help="stack first, or fold what is attached",
                )  # fmt: skip


def _same_positions(program: Program, source: Source, span: Span) -> None:
    """Layers of several checkpoints read one table of rotary positions, which stands in front of them."""
    for key, (here, there) in unlike(program, source).items():
        if "rope" in key or "rotary" in key:
            raise fail(
                "S0799", f"`{key}` is {shown(there)} in {source.name} and {shown(here)} in the model", source.span if source.span.end else span, "stacked here",
                help="stack checkpoints that turn positions alike; one alone: open it as the model",
            )  # fmt: skip


def _same_symbols(program: Program, other: Program, source: Source, span: Span) -> None:
    mine, theirs = ({k: v[:2] for k, v in p.signature.symbols.items()} for p in (program, other))
    if mine != theirs:
        raise fail(
            "S0799", f"{source.name} is called with other inputs than the model", span, "stacked here",
            help="stack checkpoints of one architecture whose configs agree in everything but the number of layers",
        )  # fmt: skip


# ------------------------------------------------------------------ tensors


@dataclass
class _Layer:
    """A layer of the result before it stands in the program: its module, and by name inside it the expression of each tensor, the first name
    of a tie inside, and whether it is frozen."""

    module: nn.Module
    exprs: dict[str, Expr]
    ties: dict[str, str]
    frozen: set[str]
    first: int | None = None


def _layers(program: Program, data: Stacking, before: Sequence[Program], mine: Chain, op: Resolved) -> list[_Layer]:
    made: list[_Layer] = []
    seen: dict[tuple[int, int], int] = {}
    share = bool(op.method.params()["share"])
    for i, taken in enumerate(data.order.layers):
        other = before[taken.source]
        site = next(s for s in other.anatomy.sites if is_layer(s) and s.stack == data.order.stack and s.layer == taken.layer)
        scale = _scale_of(data, i)
        layer = _copied(program, other, site)
        if scale != 1:
            _scale(other, site, layer, scale)
        key = (id(data.programs[taken.source]), taken.layer)
        if share and scale == 1:
            layer.first = seen.get(key)
            seen.setdefault(key, i)
        made.append(layer)
    return made


def _copied(program: Program, other: Program, site: Site) -> _Layer:
    module = deepcopy(other.module(site.path))
    exprs: dict[str, Expr] = {}
    ties: dict[str, str] = {}
    frozen: set[str] = set()
    by_first: dict[str, str] = {}
    names = [n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))]
    for name in names:
        full = attach.join(site.path, name)
        first = other.aliases.get(full, full)
        if first in by_first:
            ties[name] = by_first[first]
            continue
        by_first[first] = name
        expr = other.weights[first]
        same = is_float(expr.dtype) and expr.dtype == other.info.dtype
        exprs[name] = cast(expr, program.info.dtype) if same else expr
        if first in other.frozen:
            frozen.add(name)
    return _Layer(module, exprs, ties, frozen)


def _scale(other: Program, layer: Site, made: _Layer, factor: float) -> None:
    """What the layer's blocks add to the stream times ``factor``: their last projections, weights and biases."""
    for site in other.anatomy.sites:
        if site.stack != layer.stack or site.layer != layer.layer or site.is_region or site.role.rpartition(".")[2] not in ("o", "down"):
            continue
        for full, axis in ((site.weight, site.out_axis), (site.bias, 0)):
            name = attach.relative(other.aliases.get(full, full), layer.path) if full else ""
            if name not in made.exprs:
                continue
            expr = made.exprs[name]
            if not site.rows:
                made.exprs[name] = Scale(expr.shape, expr.dtype, expr, factor)
                continue
            part = select(expr, axis, site.rows)
            assert isinstance(part, Select) or part is expr
            made.exprs[name] = Update(expr.shape, expr.dtype, expr, Scale(part.shape, part.dtype, part, factor), axis, site.rows)


def _install(program: Program, container: str, made: Sequence[_Layer], op: Resolved) -> None:
    """The modules of the result in the place of the layers, with their tensors."""
    holder = program.module(container)
    old = set(holder._modules)
    gone = [
        n
        for n in (*program.weights, *program.aliases)
        if n.startswith(container + ".") and n[len(container) + 1 :].partition(".")[0] in old
    ]
    fixed = set(gone)
    outside = [n for n, first in program.aliases.items() if first in fixed and n not in fixed]
    assert not outside, outside  # refused by _ends
    at = next((i for i, n in enumerate(program.weights) if n in fixed), len(program.weights))
    head = {n: e for n, e in list(program.weights.items())[:at]}
    tail = {n: e for n, e in list(program.weights.items())[at:] if n not in fixed}
    new: dict[str, Expr] = {}
    holder._modules.clear()
    program.frozen -= fixed
    for name in gone:
        program.aliases.pop(name, None)
    program.journal.entries = {k: v for k, v in program.journal.entries.items() if not _inside(k, container, old)}
    for i, layer in enumerate(made):
        path = attach.join(container, str(i))
        holder.add_module(str(i), layer.module)
        for name, first in layer.ties.items():
            program.aliases[attach.join(path, name)] = attach.join(path, first)
        if layer.first is not None:
            other = made[layer.first]
            for name in layer.exprs:
                target = attach.join(container, f"{layer.first}.{name}")
                program.aliases[attach.join(path, name)] = target
                _adopt(layer.module, other.module, name)
            for name, first in layer.ties.items():
                program.aliases[attach.join(path, name)] = attach.join(container, f"{layer.first}.{first}")
                _adopt(layer.module, other.module, name)
            continue
        for name, expr in layer.exprs.items():
            new[attach.join(path, name)] = expr
            program.journal.record(attach.join(path, name), op.origin)
        program.frozen |= {attach.join(path, n) for n in layer.frozen}
    weights = Weights({**head, **new, **tail})
    weights.notes = program.weights.notes
    weights.twins = [t for t in program.weights.twins if t[0] not in fixed]
    program.weights = weights


def _adopt(module: nn.Module, other: nn.Module, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    here, there = module.get_submodule(owner), other.get_submodule(owner)
    store = here._parameters if leaf in here._parameters else here._buffers
    store[leaf] = getattr(there, leaf)


def _inside(key: str, container: str, old: set[str]) -> bool:
    place = key.partition("::")[0]
    return place.startswith(container + ".") and place[len(container) + 1 :].partition(".")[0] in old


def _ends(program: Program, data: Stacking, before: Sequence[Program], mine: Chain, op: Resolved) -> dict[str, Expr]:
    """The tensors outside of the layers that are not the program's own: in front of them of the first source, behind them of the last."""
    inside = {n for s in mine.sites for n in _names(program, s)}
    crossing = sorted(n for n, first in program.aliases.items() if (n in inside) != (first in inside))
    if crossing:
        raise fail(
            "S0799", f"`{crossing[0]}` is one tensor inside and outside of the layers", op.origin.span, "stacked here", help="stack before the line that shares it",
        )  # fmt: skip
    late = _behind_layers(program, mine)
    out: dict[str, Expr] = {}
    first, last = 0, len(before) - 1
    for name, expr in program.weights.items():
        if name in inside:
            continue
        tied = {name, *(k for k, v in program.aliases.items() if v == name)}
        at = last if tied <= late else first
        source, other = data.sources[at], before[at]
        if source.own or not is_float(expr.dtype):
            continue
        theirs = other.weights.get(other.aliases.get(name, name))
        if theirs is None or theirs.shape != expr.shape:
            what = "has no" if theirs is None else f"has {list(theirs.shape)} for"
            raise fail(
                "S0774", f"{source.name} {what} `{name}`" + ("" if theirs is None else f", {list(expr.shape)} here"), source.span, "stacked here",
                help="stack checkpoints of one architecture, width and vocabulary",
            )  # fmt: skip
        out[name] = cast(theirs, expr.dtype)
    return out


def _behind_layers(program: Program, mine: Chain) -> set[str]:
    """Tensors that only what follows the layers reads."""
    used: dict[str, bool] = {}
    for node in program.graph.graph.nodes:
        if node.op not in ("call_module", "get_attr") or node in {x.call for x in mine.links}:
            continue
        readers = [node] if node.op == "call_module" else list(node.users)
        late = all(n in mine.behind for n in readers)
        target = str(node.target)
        for name in program.weights.keys() | program.aliases.keys():
            if name == target or name.startswith(target + "."):
                used[name] = used.get(name, True) and late
    return {n for n, late in used.items() if late}


def _names(program: Program, site: Site) -> list[str]:
    module = program.module(site.path)
    return [
        attach.join(site.path, n)
        for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    ]


def _size(program: Program, site: Site) -> int:
    names = {program.aliases.get(n, n) for n in _names(program, site)}
    parameters = {n for n, _ in program.graph.named_parameters(remove_duplicate=False)}
    return sum(
        math.prod(program.weights[n].shape) for n in names if n in parameters and n in program.weights and n.startswith(site.path + ".")
    )


# ------------------------------------------------------------------ what else follows


def _tidy(program: Program, order: Order, op: Resolved) -> None:
    known = {*program.weights, *program.aliases}
    program.schedules = [(m, tuple(n for n in names if n in known)) for m, names in program.schedules]
    pattern = re.compile(re.escape(order.stack) + r"\[\d+\]")
    program.named = {k: kept for k, roles in program.named.items() if (kept := tuple(r for r in roles if not pattern.match(r)))}
    if op.name != op.method.name:
        program.named[op.name] = tuple(s.role for s in order.sites())


def _told(data: Stacking, order: Order, before: int, wrong: Sequence[str]) -> list[str]:
    runs: list[tuple[str, list[int]]] = []
    for t in order.layers:
        name = data.sources[t.source].name
        if runs and runs[-1][0] == name and runs[-1][1][-1] + 1 == t.layer:
            runs[-1][1].append(t.layer)
        else:
            runs.append((name, [t.layer]))
    parts = [f"{group_roles([f'{order.stack}[{j}]' for j in layers])[0]} of {name}" for name, layers in runs]
    shown = ", ".join(parts[:6]) + (f" and {plural(len(parts) - 6, 'run')} more" if len(parts) > 6 else "")
    lines = [f"{plural(before, 'layer')} -> {len(order.layers)}: {shown}"]
    first, last = data.sources[0].name, data.sources[-1].name
    lines.append(f"in front of the layers: {first}; behind them: {last}" + (" (tied tensors of the first)" if first != last else ""))
    lines += [f"the config's `{name}` counts first layers of one kind, and the order mixes them" for name in wrong]
    return lines


def _changes(program: Program, order: Order, data: Stacking, before: Sequence[int]) -> list[SiteChange]:
    """Parameters by place: what a layer has more or less than the one that stood there."""
    sites = {s.layer: s for s in program.anatomy.sites if is_layer(s) and s.stack == order.stack}
    changes = []
    for i in range(len(order.layers)):
        site, was = sites[i], before[i] if i < len(before) else 0
        now = _size(program, site)
        lost = sum(before[len(order.layers) :]) if i == len(order.layers) - 1 else 0
        trainable = sum(math.prod(program.weights[n].shape) for n in site.parameters if n in program.weights and n not in program.frozen)
        changes.append(SiteChange(site.role, site.path, added=max(0, now - was), removed=max(0, was - now) + lost, trainable=trainable))
    return changes
