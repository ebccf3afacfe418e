"""Numbering layers anew when some are gone, as deleting from a list of modules does: paths, names and roles move up together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from surgery.core.site import NodeRef, Site
from surgery.model.program import Attachment, Program
from surgery.model.weights import Weights
from surgery.passes.kinds import attach


def moved_paths(program: Program, containers: Sequence[str]) -> dict[str, str]:
    """Old and new path of each numbered element of the containers that has to move up."""
    moves: dict[str, str] = {}
    for container in containers:
        module = program.module(container)
        numbers = sorted(int(n) for n in module._modules if n.isdigit())
        for new, old in enumerate(numbers):
            if new != old:
                moves[attach.join(container, str(old))] = attach.join(container, str(new))
    return moves


def rename(program: Program, moves: Mapping[str, str], roles: Mapping[str, str]) -> None:
    """Give modules and all that is named after them their new paths, and attachments their new roles.

    ``moves`` and ``roles`` map the beginning of a path or role to its new beginning; nothing else changes.
    """
    if moves:
        _modules(program, moves)
        _graph_targets(program, moves)
        _tensors(program, moves)
    program.attachments[:] = [_attachment(a, moves, roles) for a in program.attachments]
    program.gone = {role_of(role, roles): replace(g, site=site_at(g.site, moves, roles)) for role, g in program.gone.items()}


def renamed(name: str, moves: Mapping[str, str]) -> str:
    """``name`` with the longest beginning that moves replaced."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        new = moves.get(".".join(parts[:n]))
        if new is not None:
            return ".".join([new, *parts[n:]])
    return name


def role_of(role: str, roles: Mapping[str, str]) -> str:
    for old, new in roles.items():
        if role == old or role.startswith((old + ".", old + "[")):
            return new + role[len(old) :]
    return role


def _modules(program: Program, moves: Mapping[str, str]) -> None:
    for container in dict.fromkeys(old.rpartition(".")[0] for old in moves):
        module = program.module(container)
        children = module._modules.items()
        module._modules = {renamed(attach.join(container, n), moves).rpartition(".")[2]: child for n, child in children}  # type: ignore[assignment]


def _graph_targets(program: Program, moves: Mapping[str, str]) -> None:
    for path, gm in program.graph.named_modules():
        if not isinstance(gm, fx.GraphModule):
            continue
        for node in gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                full = attach.join(_before(path, moves), str(node.target))
                new = renamed(full, moves)
                if new != full:
                    node.target = attach.relative(new, path)
                    attach.recompile_later(gm)


def _before(path: str, moves: Mapping[str, str]) -> str:
    """What a module that stands at its new path was called before: targets inside it still say so."""
    parts = path.split(".")
    back = {new: old for old, new in moves.items()}
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in back:
            return ".".join([back[head], *parts[n:]])
    return path


def _tensors(program: Program, moves: Mapping[str, str]) -> None:
    old: Any = program.weights
    weights = Weights({renamed(name, moves): expr for name, expr in old.items()})
    weights.notes = old.notes
    weights.twins = [(renamed(name, moves), kept, other) for name, kept, other in old.twins]
    program.weights = weights
    program.aliases = {renamed(k, moves): renamed(v, moves) for k, v in program.aliases.items()}
    program.frozen = {renamed(n, moves) for n in program.frozen}
    program.schedules = [(m, tuple(renamed(n, moves) for n in names)) for m, names in program.schedules]
    entries = {}
    for key, origins in program.journal.entries.items():
        graph, mark, node = key.partition("::")
        entries[renamed(graph, moves) + mark + node] = origins
    program.journal.entries = entries
    program.past = program.past.renamed(moves)


def _attachment(a: Attachment, moves: Mapping[str, str], roles: Mapping[str, str]) -> Attachment:
    return replace(
        a, site=site_at(a.site, moves, roles), module=renamed(a.module, moves), node=_ref(a.node, moves),
        tensors=tuple(renamed(t, moves) for t in a.tensors),
    )  # fmt: skip


def site_at(site: Site, moves: Mapping[str, str], roles: Mapping[str, str]) -> Site:
    """A site with its new role and names."""
    role = role_of(site.role, roles)
    layer = site.layer
    if role != site.role and layer is not None and site.stack:
        layer = int(role[len(site.stack) + 1 :].partition("]")[0])
    places: dict[str, Any] = {
        k: _ref(getattr(site, k), moves) for k in ("input", "output", "residual", "norm_output") if getattr(site, k) is not None
    }
    return replace(
        site, role=role, layer=layer, path=renamed(site.path, moves), weight=renamed(site.weight, moves), bias=renamed(site.bias, moves),
        tied_to=role_of(site.tied_to, roles), parameters=tuple(renamed(n, moves) for n in site.parameters),
        calls=tuple(_ref(c, moves) for c in site.calls), **places,
    )  # fmt: skip


def _ref(ref: NodeRef, moves: Mapping[str, str]) -> NodeRef:
    return NodeRef(renamed(ref.graph, moves), ref.node)
