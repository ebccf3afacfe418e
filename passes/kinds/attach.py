"""Graph and weight bookkeeping that every kind of attachment shares: names, seeds, nodes, the freezing policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef
from surgery.model.cut_graph import recompile_later as recompile_later
from surgery.model.program import Attachment, Program, ValueSpec
from surgery.model.weights import Apply, Expr, Init
from surgery.passes.operation import Resolved

CONSTANT_INITS = {"zeros", "ones", "constant", "normal", "uniform", "arange"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a method adds at a site.

    ``init`` is ``zeros``, ``ones``, ``constant`` (value), ``normal`` (mean, std), ``uniform`` (low, high), or the name of a
    function of the method: it is then given the site's canonical weight and its result (number ``output``, if it has
    several) is the initial value. ``shared`` tensors with one key are one tensor for all sites of the statement.
    ``dtype`` empty means the dtype of adapters: float32, also beside a half-precision base, as optimizers need.
    ``follows`` names for each axis the size of the site that it follows when units of the site are removed (``out``, ``in``, ``experts``; for
    inserted modules ``inp``, ``out``; "" for none); None finds that out (see :mod:`surgery.passes.kinds.follow`).
    """

    name: str
    shape: tuple[int, ...]
    init: str = "zeros"
    args: tuple[float, ...] = ()
    trainable: bool = True
    buffer: bool = False
    output: int | None = None
    shared: str = ""
    dtype: str = ""
    follows: tuple[str, ...] | None = None


def seed_of(base: int, *parts: str) -> int:
    """A 63-bit seed that depends on the statement's seed and on names only, never on the order of work."""
    text = "\0".join([str(base), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def relative(path: str, graph: str) -> str | None:
    """``path`` as seen from the GraphModule at ``graph``; None when it is not inside."""
    if not graph:
        return path
    return path[len(graph) + 1 :] if path.startswith(graph + ".") else None


def join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


def free_name(parent: Any, name: str) -> str:
    """``name``, or ``name_2``, ``name_3`` ... if the module has something of that name."""
    name = name if name.isidentifier() else "added"
    candidate, n = name, 1
    while hasattr(parent, candidate):
        n += 1
        candidate = f"{name}_{n}"
    return candidate


def parent_module(program: Program, path: str) -> Any:
    """The module at ``path``, or None while there is none (added modules then create the way there)."""
    try:
        return program.graph.get_submodule(path)
    except AttributeError:
        return None


def torch_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)


def adapter_dtype(base: str) -> str:
    """Adapters of half-precision models are kept in float32: their updates would vanish in 8 bits of mantissa."""
    return base if base in ("float32", "float64") else "float32"


def add_tensors(
    program: Program, module: nn.Module, path: str, specs: Iterable[TensorSpec], op: Resolved, *,
    dtype: str, source: Expr | None, params: tuple[tuple[str, Any], ...], pool: dict[str, str],
) -> tuple[list[str], int, int]:  # fmt: skip
    """Register the specs as meta parameters of ``module`` (which stands at ``path``) with their weight expressions.

    ``pool`` maps the keys of shared tensors to the first name. Returns the names, the number of parameters added and
    the number of those that train.
    """
    names, added, trainable = [], 0, 0
    for spec in specs:
        name, kind = join(path, spec.name), spec.dtype or dtype
        empty = torch.empty(spec.shape, dtype=torch_dtype(kind), device="meta")
        first = pool.setdefault(spec.shared, name) if spec.shared else name
        if first != name:  # one tensor under several names is one Parameter object and one expression
            owner, _, leaf = first.rpartition(".")
            tensor = getattr(program.module(owner), leaf)
            (module.register_buffer if spec.buffer else module.register_parameter)(spec.name, tensor)
            program.aliases[name] = first
            names.append(name)
            continue
        if spec.buffer:
            module.register_buffer(spec.name, empty)
        else:
            module.register_parameter(spec.name, nn.Parameter(empty, requires_grad=spec.trainable))
        names.append(name)
        program.journal.record(name, op.origin)
        if spec.init in CONSTANT_INITS:
            seed = seed_of(op.seed, op.name, name) if spec.init in ("normal", "uniform") else 0
            expr: Expr = Init(spec.shape, kind, spec.init, tuple(float(a) for a in spec.args), seed)
        else:
            inputs = () if source is None else (source,)
            extra = (("seed", seed_of(op.seed, op.name, path)),)
            expr = Apply(spec.shape, kind, f"{op.verb}/{op.method.name}:{spec.init}", inputs, params + extra, spec.output)
        program.weights[name] = expr
        size = empty.numel()
        if not spec.buffer:
            added += size
            trainable += size if spec.trainable else 0
            if not spec.trainable:
                program.frozen.add(name)
    return names, added, trainable


def freeze_base(program: Program) -> None:
    """The first adapt or insert statement of a program freezes every base parameter; later statements leave that alone.

    What an ``unfreeze`` above it named stays trainable: an explicit wish is not undone by a default.
    """
    if any(o.verb in ("adapt", "insert") for origins in program.journal.entries.values() for o in origins):
        return
    for name in base_parameters(program):
        origins = program.journal.of(name)
        if not origins or origins[-1].verb != "unfreeze":
            program.frozen.add(name)


def base_parameters(program: Program) -> list[str]:
    """Parameter names (tied ones once) that no attachment added, in model order."""
    added = {t for a in program.attachments for t in a.tensors}
    found: dict[str, None] = {}
    for name, _ in program.graph.named_parameters(remove_duplicate=False):
        name = program.aliases.get(name, name)
        if name not in added and name in program.weights:
            found[name] = None
    return list(found)


def spec_of(node: fx.Node) -> dict[str, Any]:
    return {k: node.meta[k] for k in ("spec",) if k in node.meta}


def get_attr(graph_module: fx.GraphModule, target: str, near: fx.Node) -> fx.Node:
    """The node that reads parameter ``target``; an existing one is reused, a new one is put in front of ``near``."""
    for node in graph_module.graph.find_nodes(op="get_attr", target=target):
        if node < near:
            return node
    with graph_module.graph.inserting_before(near):
        node = graph_module.graph.create_node("get_attr", target)
    value = reduce(getattr, target.split("."), graph_module)
    node.meta["spec"] = ValueSpec("tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape))
    return node


def call_after(program: Program, graph: str, current: fx.Node, target: str, args: Callable[[], tuple[Any, ...]]) -> fx.Node:
    """A call_module node behind ``current`` that takes over all its uses, except those by the new node's own arguments."""
    gm = program.module(graph)
    users = list(current.users)
    inputs = args()
    with gm.graph.inserting_after(current):
        # arguments made by `args` stand before `current`, so the new node may stand right behind it
        node = gm.graph.create_node("call_module", target, inputs, name=target.replace(".", "_"))
    node.meta.update(spec_of(current))
    for user in users:
        user.replace_input_with(current, node)
    return node


def detach(program: Program, attachment: Attachment) -> None:
    """Take an added module out of graph and weights; its uses get back the value that it edited (its second argument)."""
    for path in prefixes(attachment.module):
        gm = program.module(path)
        if not isinstance(gm, fx.GraphModule):
            continue
        nodes = gm.graph.find_nodes(op="call_module", target=relative(attachment.module, path))
        for node in nodes:
            inputs = node.all_input_nodes
            node.replace_all_uses_with(program_input(gm, node))
            gm.graph.erase_node(node)
            for arg in inputs:
                if arg.op == "get_attr" and not arg.users:
                    gm.graph.erase_node(arg)
        if nodes:
            recompile_later(gm)
    parent, _, leaf = attachment.module.rpartition(".")
    delattr(program.module(parent), leaf)
    for name in attachment.tensors:
        drop_tensor(program, name)
    program.attachments.remove(attachment)


def prefixes(path: str) -> list[str]:
    """The paths of the modules around ``path``, the root first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def program_input(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The value that an added module edits: which argument it is stands on the module."""
    return node.args[gm.get_submodule(str(node.target)).edits]  # type: ignore[return-value,index]


def drop_tensor(program: Program, name: str) -> None:
    """Forget a tensor; when it is the first of a shared group the next name takes its place."""
    program.frozen.discard(name)
    if name in program.aliases:
        del program.aliases[name]
        return
    expr = program.weights.pop(name)
    heirs = [k for k, v in program.aliases.items() if v == name]
    if heirs:
        first = heirs[0]
        del program.aliases[first]
        program.weights[first] = expr
        for other in heirs[1:]:
            program.aliases[other] = first


def inside(path: str, region: str) -> bool:
    return not region or path == region or path.startswith(region + ".")


def attachments_of(program: Program, op: Resolved) -> list[Attachment]:
    """The attachments that a fold, freeze or unfreeze statement names: those that ``@name`` selects, those on a selected
    site, those inside a selected region, with ``**`` those of a region all of whose parts are selected; without a selector all."""
    if not op.sites:
        return list(program.attachments)
    whole: set[str] = set()
    if op.statement is not None and any(_any_depth(s) for s in op.statement.selectors):
        chosen = {s.role for s in op.sites}
        for region in {a.site.role for a in program.attachments if a.site.is_region}:
            parts = [s.role for s in program.anatomy.sites if not s.is_region and s.role.startswith(region + ".")]
            if parts and chosen.issuperset(parts):
                whole.add(region)
    by_module = {s.path for s in op.sites if s.op == "attachment"}
    by_role = {s.role for s in op.sites if s.op != "attachment"}
    regions = [s for s in op.sites if s.is_region]
    contained = {name for region in regions for name in region.parameters}
    return [
        a for a in program.attachments
        if a.module in by_module or a.site.role in by_role or a.site.role in whole or a.site.weight in contained
        or any(a.site.role.startswith(r.role + ".") for r in regions)
    ]  # fmt: skip


def _any_depth(selector: Any) -> bool:
    """The selector ends in ``**``."""
    last = selector.steps[-1] if selector.steps else None
    return getattr(last, "name", "") == "**"


def no_site(op: Resolved, what: str, help: str) -> Exception:
    return fail("S0370", f"{op.verb} {op.method.name} finds {what} in what it selects", op.origin.span, "selected here", help=help)


def node_ref(graph: str, node: fx.Node) -> NodeRef:
    return NodeRef(graph, node.name)
