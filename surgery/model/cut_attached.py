"""What a cut does to attached modules: their tensors lose the units that their site loses.

A module that surgery attached (it has ``edits``) says itself how it follows, through ``follow(around) -> Follow | str``; a text is the
reason why it cannot. One that stands on values of several sorts has ``follow_calls(calls)`` instead, which is told the arguments of every call with
what stays around it. The analysis of dimensions sees the model without attachments, so everything here is in terms of what stands
around the module: the stored weight of its site and the values that enter its call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from torch import fx

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef, Site
from surgery.core.source import Span
from surgery.model.dims import Group, Member
from surgery.model.dims.masks import Mask, to_ranges
from surgery.model.program import Attachment, Program
from surgery.model.walk import edits, graphs, inside
from surgery.model.weights import Expr

Kept: TypeAlias = "tuple[Mask | None, ...]"
"""For each axis which positions stay (None: all)."""


@dataclass(frozen=True)
class Around:
    """What stays around an attached module: of the stored weight of its site (empty: it has none) and of each value that enters its call.

    ``groups`` are those of the site's convolution after the cut (1 for anything else).
    """

    weight: Kept
    inputs: tuple[Kept, ...]
    groups: int = 1

    @property
    def touched(self) -> bool:
        return any(m is not None for kept in (self.weight, *self.inputs) for m in kept)


@dataclass(frozen=True)
class Follow:
    """How a module follows: its new ``site``, what stays of its tensors' axes, and tensors whose values change on the way; ``method`` is another one
    where its own parameters must change with the site.

    ``rewrite`` maps a tensor's name to a function of the expressions of the module's tensors and of the site's weight (name ``weight``), all as
    they were before the cut, that gives the tensor's expression before its axes are selected.
    """

    site: Any
    tensors: Mapping[str, Kept] = field(default_factory=dict)
    rewrite: Mapping[str, Callable[[Mapping[str, Expr]], Expr]] = field(default_factory=dict)
    method: Any = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Further attributes of the module, with the values that they have then."""


@dataclass
class AttachedCut:
    """The plan for everything attached: members of tensors, new expressions before selection, new sites of modules."""

    members: list[Member] = field(default_factory=list)
    rewrites: dict[str, Expr] = field(default_factory=dict)
    sites: dict[str, Any] = field(default_factory=dict)
    """New ``site`` of the module at a path."""
    methods: dict[str, Any] = field(default_factory=dict)
    """New ``method`` of the module at a path, where it has another."""
    attributes: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def plan(program: Program, group: Group, groups: Mapping[str, int], span: Span) -> AttachedCut:
    """How every attached module follows a cut. Raises S0431 naming one that cannot.

    ``groups`` maps the paths of convolution leaves to their number of groups after the cut.
    """
    found = AttachedCut()
    calls = _calls(program)
    if not calls:
        return found
    refs = {ref: node for node in group.dims.graph.nodes if node.op != "output" for ref in node.meta["refs"]}
    by_module = {a.module: a for a in program.attachments}
    wanted: dict[str, dict[str, Kept]] = {}
    for path, nodes in calls.items():
        attachment = by_module.get(path)
        label = f"{attachment.name} at {attachment.site.role}" if attachment else f"the module {path}"
        module = program.module(path)
        weight = _weight(program, group, attachment)
        owner = attachment.site.weight.rpartition(".")[0] if attachment else ""
        seen = [
            Around(weight, tuple(_kept(program, group, refs, graph, a) for a in node.args), groups.get(owner, 1)) for graph, node in nodes
        ]
        if not any(a.touched for a in seen):
            continue
        answer = _answer(module, nodes, seen)
        if isinstance(answer, str):
            raise _refused(label, attachment, answer, span)
        found.sites[path] = answer.site
        if answer.attributes:
            found.attributes[path] = answer.attributes
        if answer.method is not None:
            found.methods[path] = answer.method
        for leaf, kept in answer.tensors.items():
            wanted.setdefault(program.aliases.get(f"{path}.{leaf}", f"{path}.{leaf}"), {})[f"{path}.{leaf}"] = kept
        for leaf, make in answer.rewrite.items():
            given = {
                n: _expr(program, f"{path}.{n}")
                for n in (*module._parameters, *module._buffers)
                if _expr(program, f"{path}.{n}") is not None
            }
            assert attachment is not None
            given["weight"] = _expr(program, attachment.site.weight)
            found.rewrites[program.aliases.get(f"{path}.{leaf}", f"{path}.{leaf}")] = make(given)  # type: ignore[arg-type]
    _members(program, found, wanted, by_module, span)
    return found


def _answer(module: Any, nodes: Sequence[tuple[str, fx.Node]], seen: Sequence[Around]) -> Follow | str:
    """How a module follows what stays around its calls, or why it cannot."""
    each = getattr(module, "follow_calls", None)
    if each is not None:
        found: Follow | str = each([(node.args, around) for (_, node), around in zip(nodes, seen, strict=True)])
        return found
    if any(not _equal(a, seen[0]) for a in seen[1:]):
        return "it is called at several places that lose different units"
    follow = getattr(module, "follow", None)
    return "its class does not say how it follows" if follow is None else follow(seen[0])


def apply(program: Program, found: AttachedCut) -> None:
    """Write the new sites into modules and attachments; the tensors were cut with all others."""
    for path, site in found.sites.items():
        program.module(path).site = site
    for path, method in found.methods.items():
        program.module(path).method = method
    for path, attributes in found.attributes.items():
        for name, value in attributes.items():
            setattr(program.module(path), name, value)
    for i, a in enumerate(program.attachments):
        if a.module in found.sites:
            program.attachments[i] = replace(a, site=_site(program, a, found.sites[a.module]), method=found.methods.get(a.module, a.method))


def _site(program: Program, a: Attachment, geometry: Any) -> Site:
    """The attachment's site with the sizes that it has now."""
    if not a.site.weight or not hasattr(geometry, "rows"):
        return a.site
    shape = (geometry.out, geometry.inp // geometry.groups, *a.site.shape[2:])
    if getattr(geometry, "experts", 0):
        shape = (geometry.experts, geometry.out, geometry.inp)
    if a.site.op == "expert":  # experts in front of it may have gone
        role = a.site.role.replace(f".experts[{a.site.facts['expert']}].", f".experts[{geometry.member}].")
        return replace(a.site, role=role, shape=shape, rows=tuple(geometry.rows), facts={**a.site.facts, "expert": geometry.member})
    return replace(a.site, rows=tuple(geometry.rows), shape=shape if a.site.shape else ())


def _calls(program: Program) -> dict[str, list[tuple[str, fx.Node]]]:
    """The calls of attached modules by the module's path."""
    found: dict[str, list[tuple[str, fx.Node]]] = {}
    for path, gm in graphs(program.graph):
        for node in gm.graph.nodes:
            if node.op == "call_module" and edits(inside(gm, str(node.target))) is not None:
                found.setdefault(f"{path}.{node.target}" if path else str(node.target), []).append((path, node))
    return found


def _weight(program: Program, group: Group, a: Attachment | None) -> Kept:
    if a is None or not a.site.weight:
        return ()
    name = program.aliases.get(a.site.weight, a.site.weight)
    axes = group.dims.parameters.get(name)
    return () if axes is None else tuple(group.keep.mask(axis) for axis in axes)


def _kept(program: Program, group: Group, refs: Mapping[NodeRef, fx.Node], graph: str, arg: Any) -> Kept:
    while isinstance(arg, fx.Node) and arg.op == "call_module":  # what is attached passes on the axes of what it edits
        at = edits(program.module(graph).get_submodule(str(arg.target)))
        if at is None:
            break
        arg = arg.args[at]
    if not isinstance(arg, fx.Node):
        return ()
    if arg.op == "get_attr":
        name = f"{graph}.{arg.target}" if graph else str(arg.target)
        axes = group.dims.parameters.get(program.aliases.get(name, name))
    else:
        flat = refs.get(NodeRef(graph, arg.name))
        axes = None if flat is None else group.dims.values.get(flat)
    if type(axes) is not tuple:
        return ()
    return tuple(None if group.dims.symbolic(axis) else group.keep.mask(axis) for axis in axes)


def _equal(a: Around, b: Around) -> bool:
    first, second = (a.weight, *a.inputs), (b.weight, *b.inputs)
    return a.groups == b.groups and len(first) == len(second) and all(_alike(p, q) for p, q in zip(first, second, strict=True))


def _alike(a: Kept, b: Kept) -> bool:
    return len(a) == len(b) and all(x is y or (x is not None and y is not None and np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


def _expr(program: Program, name: str) -> Expr | None:
    return program.weights.get(program.aliases.get(name, name))


def _members(
    program: Program, found: AttachedCut, wanted: Mapping[str, Mapping[str, Kept]], by_module: Mapping[str, Attachment], span: Span
) -> None:
    """One selection for each tensor; a tensor that several modules share must lose the same in all of them."""
    for first, holders in wanted.items():
        names = [first, *(k for k, v in program.aliases.items() if v == first)]
        kept = next(iter(holders.values()))
        if all(m is None for k in holders.values() for m in k):
            continue
        same = all(_alike(k, kept) for k in holders.values())
        if not same or set(holders) != set(names):
            a = by_module.get(next(iter(holders)).rpartition(".")[0])
            raise _refused(a.name if a else first, a, f"it shares `{first}` with other sites, which would lose other units", span)
        for axis, mask in enumerate(kept):
            if mask is not None:
                found.members.append(Member(first, axis, to_ranges(~mask), to_ranges(mask)))


def _refused(label: str, a: Attachment | None, why: str, span: Span) -> Exception:
    return fail(
        "S0431", f"{label} cannot lose the units that its place loses: {why}", span, "cut here",
        also=[(a.origin.span, f"{a.name} is attached here")] if a is not None and a.origin.span.source.text else [],
        help=f"fold {'@' + a.name if a else 'it'} before this line, or attach it after the cut",
    )  # fmt: skip
