"""Where virtual tokens enter a causal model's graph: its inputs and outputs by what they are, the prompt pass and the edits of the model's own call.

:mod:`surgery.passes.kinds.insert_prompt` says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef, Site
from surgery.model.program import Program, ValueSpec
from surgery.passes.kinds.calls import calls_of, operand
from surgery.passes.operation import Resolved

IDS, ONES, STEPS, EMPTY, EMBED, JOIN, MASK, SHIFT, REST = range(9)
"""What a call of the module makes, see :class:`PromptModule`."""
_MOVES = ("aten.reshape", "aten.view", "aten._to_copy", "aten.to.", "aten.alias", "aten.clone")


@dataclass(frozen=True)
class Ends:
    """Inputs and outputs of a causal model by what they are: placeholders, and for each past its grown form among the outputs."""

    ids: fx.Node
    embedded: fx.Node
    same: tuple[fx.Node, ...]
    """Further inputs of one integer a token that are zero for virtual tokens."""
    mask: fx.Node | None
    positions: fx.Node | None
    pasts: tuple[fx.Node, ...]
    grown: tuple[int, ...]
    """Places among the flat outputs, in the order of ``pasts``."""


def ends_of(program: Program, op: Resolved, site: Site) -> Ends:
    """Raises S0491 when the model is not a causal one with a cache, or takes what virtual tokens have no values for."""
    calls = calls_of(program, site) if site.op == "embedding" else []
    ids = looked_up(calls[0][1]) if len(calls) == 1 and not calls[0][0] else None
    if ids is None:
        raise refused(op, site, "it does not look up the model's token ids", "select the embedding of the tokens: `on embed.tokens`")
    blocks = [s for s in program.anatomy.sites if s.is_region and "causal" in s.facts]
    loose = next((s.role for s in blocks if not s.facts["causal"] or s.facts.get("cross")), None)
    if loose or not blocks:
        why = (
            f"{loose} is no causal self attention, so later tokens would change what the virtual ones are"
            if loose
            else "no attention was found"
        )
        raise refused(op, site, why, "`insert prefix(..) on layers[*].attn` puts keys and values in front of any attention")
    holders = [n for n in program.graph.graph.nodes if n.op == "placeholder"]
    kinds = inputs_of(program)
    pasts = tuple(n for n, (_, cached) in zip(holders, kinds, strict=True) if cached)
    grown = tuple(i for i, cached in enumerate(_cached(program.signature.out_spec)) if cached)
    if not pasts or len(pasts) != len(grown):
        raise refused(op, site, "the model was captured without a cache", "capture it with `past_key_values` among its inputs")
    found: dict[str, fx.Node] = {}
    same = []
    for node, (name, cached) in zip(holders, kinds, strict=True):
        if cached or node is ids:
            continue
        rank = len(node.meta["spec"].shape)
        if name in ("attention_mask", "position_ids") and rank == 2:
            found[name] = node
        elif name == "token_type_ids" and rank == 2:
            same.append(node)
        elif node.users:
            raise refused(op, site, f"virtual tokens have no value for the input `{name}`", "")
    return Ends(
        ids, embedded_at(program, site, calls[0][1])[0], tuple(same), found.get("attention_mask"), found.get("position_ids"), pasts, grown
    )


def looked_up(node: fx.Node) -> fx.Node | None:
    """The input whose ids an embedding looks up, behind changes of shape."""
    value = operand(node)
    while value.op == "call_function" and str(value.target).startswith(_MOVES) and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value if value.op == "placeholder" else None


def lookups(program: Program, site: Site) -> list[tuple[str, fx.Node]]:
    """The calls of an embedding of tokens. An encoder and its decoder read one table: then it is the call on the encoder's tokens alone."""
    calls = calls_of(program, site) if site.op == "embedding" else []
    if len(calls) < 2:
        return calls
    first = [c for c in calls if not c[0] and (ids := looked_up(c[1])) is not None and str(ids.target) == "input_ids"]
    return first if len(first) == 1 else calls


def embedded_at(program: Program, site: Site, lookup: fx.Node) -> tuple[fx.Node, float | str]:
    """Where the embeddings of tokens stand, and what the rows of the table were multiplied by until there (a number or a buffer's name).

    A family whose embedding itself multiplies what it looks up has them behind that product: that is what such a model takes for embeddings
    from outside, and what was trained there is stored in that size. One that multiplies later does so to virtual tokens, too.
    """
    from surgery.passes.kinds.insert import end_of_chain

    value = end_of_chain(program.graph, lookup)
    users = [u for u in value.users if u.op != "output"]
    if len(users) != 1 or not str(users[0].target).startswith("aten.mul.") or users[0].args[0] is not value:
        return value, 1.0
    factor = users[0].args[1]
    if isinstance(factor, fx.Node) and factor.op == "get_attr" and str(factor.target).startswith(f"{site.path}."):
        return end_of_chain(program.graph, users[0]), str(factor.target)
    if isinstance(factor, int | float) and _multiplies(program):
        return end_of_chain(program.graph, users[0]), float(factor)
    return value, 1.0


def _multiplies(program: Program) -> bool:
    """Whether the family has an embedding of its own that multiplies, by the name that all of them have."""
    import sys

    import transformers

    family = getattr(transformers, program.info.architecture, None) if program.info.architecture else None
    return family is not None and any(name.endswith("ScaledWordEmbedding") for name in vars(sys.modules[family.__module__]))


def inputs_of(program: Program) -> list[tuple[str, bool]]:
    """For every flat input the parameter that it belongs to and whether it is a part of a cache."""
    tree = program.signature.in_spec
    keys = tree.get("keys") or program.signature.parameters
    return [(str(key), cached) for key, item in zip(keys, tree["items"], strict=True) for cached in _cached(item)]


def _cached(tree: Any) -> list[bool]:
    """For every tensor of a tree whether it is a part of a cache, in order."""
    if tree["type"] == "tensor":
        return [False]
    if tree["type"] == "cache":
        return [True] * (tree["layers"] * (4 if tree["class"] == "EncoderDecoderCache" else 2))
    return [c for item in tree.get("items", ()) for c in _cached(item)]


def refused(op: Resolved, site: Site, why: str, help: str) -> Exception:
    return fail("S0491", f"{op.method.name} cannot stand on {site.role}: {why}", op.origin.span, "asked for here", help=help or ())


# ------------------------------------------------------------------ the graph


def write(program: Program, path: str, ends: Ends, stored: bool = False) -> NodeRef:
    """The prompt pass and the edits of the model's own call; where the embeddings are made, or with ``stored`` the first keys that are joined."""
    graph = program.graph.graph
    n = program.module(path).method.entries()
    results = [graph.output_node().args[0][i] for i in ends.grown]  # type: ignore[index]

    def call(value: fx.Node, what: int, spec: ValueSpec, *more: Any) -> fx.Node:
        made = graph.create_node("call_module", path, (value, what, *more), name=path)
        made.meta["spec"] = spec
        return made

    def spec(node: fx.Node, *shape: Any) -> ValueSpec:
        return ValueSpec("tensor", node.meta["spec"].dtype, tuple(shape))

    inner: dict[fx.Node, Any] = {}
    with graph.inserting_before(graph.output_node()):
        if not stored:
            inner = _pass(program, ends, n, results, call, spec)
        # the model's own call
        fresh = set(inner.values())
        joined = []
        for i, (past, result) in enumerate(zip(ends.pasts, results, strict=True)):
            shape = past.meta["spec"].shape
            joined.append((past, call(past, JOIN, spec(past, *shape[:2], shape[2] + n, shape[3]), i if stored else inner[result])))
        if ends.mask is not None:
            rows, columns = ends.mask.meta["spec"].shape
            joined.append((ends.mask, call(ends.mask, MASK, spec(ends.mask, rows, columns + n))))
        if ends.positions is not None:
            joined.append((ends.positions, call(ends.positions, SHIFT, ends.positions.meta["spec"])))
    for old, new in joined:
        for user in [u for u in old.users if u is not new and u not in fresh]:
            user.replace_input_with(old, new)
    _cut_outputs(program, path, ends, n)
    _sort(graph)
    return NodeRef("", joined[0][1].name if stored else inner[ends.embedded].name)


def _pass(program: Program, ends: Ends, n: int, results: list[fx.Node], call: Any, spec: Any) -> dict[fx.Node, Any]:
    """The prompt pass: copies of what the grown caches are made of, with inputs of its own, by what they are copies of."""
    graph = program.graph.graph
    inner: dict[fx.Node, Any] = {i: call(i, IDS, spec(i, 1, n)) for i in (ends.ids, *ends.same)}
    if ends.mask is not None:
        inner[ends.mask] = call(ends.mask, ONES, spec(ends.mask, 1, n))
    if ends.positions is not None:
        inner[ends.positions] = call(ends.positions, STEPS, spec(ends.positions, 1, n))
    for past in ends.pasts:
        shape = past.meta["spec"].shape
        inner[past] = call(past, EMPTY, spec(past, 1, shape[1], 0, shape[3]))
    inner[ends.embedded] = call(ends.embedded, EMBED, spec(ends.embedded, 1, n, ends.embedded.meta["spec"].shape[-1]))
    fixed = _sizes_in_pass(program, ends, n)
    for node in ancestors(results, stop=set(inner)):
        copy = graph.node_copy(node, lambda x: inner[x])
        if "spec" in node.meta:
            copy.meta["spec"] = _fixed_spec(node.meta["spec"], fixed)
        inner[node] = copy
    return inner


def _cut_outputs(program: Program, path: str, ends: Ends, n: int) -> None:
    """Returned caches are those of the real tokens."""
    graph = program.graph.graph
    end = graph.output_node()
    values = list(end.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(end):
        for i in ends.grown:
            made = graph.create_node("call_module", path, (values[i], REST), name=path)
            made.meta["spec"] = values[i].meta["spec"]
            values[i] = made
    end.args = (tuple(values),)


def ancestors(results: Iterable[fx.Node], stop: set[fx.Node]) -> list[fx.Node]:
    """What the results are made of down to ``stop`` (excluded), in the graph's order."""
    seen: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(seen)


def _sizes_in_pass(program: Program, ends: Ends, n: int) -> dict[str, int]:
    """The size symbols of the inputs in the prompt pass: batch 1, ``n`` tokens, no past."""
    held = {p.name for p in ends.pasts} | {str(p.target) for p in ends.pasts}
    return {name: 1 if axis == 0 else 0 if holder in held else n for name, (holder, axis, _) in program.signature.symbols.items()}


def _fixed_spec(spec: Any, fixed: dict[str, int]) -> Any:
    if isinstance(spec, tuple | list):
        return tuple(_fixed_spec(s, fixed) for s in spec)
    if not isinstance(spec, ValueSpec):
        return spec

    def size(value: Any) -> Any:
        symbols = getattr(value, "free_symbols", None)
        if not symbols or any(str(s) not in fixed for s in symbols):
            return value
        found = value.subs({s: fixed[str(s)] for s in symbols})
        return int(found) if getattr(found, "is_Integer", False) else found

    return ValueSpec(spec.kind, spec.dtype, tuple(size(s) for s in spec.shape))


def _sort(graph: fx.Graph) -> None:
    """Put every node behind its inputs, otherwise in the order that they have."""
    placed: set[fx.Node] = set()
    last: fx.Node | None = None
    for start in list(graph.nodes):
        stack = [start]
        while stack:
            node = stack[-1]
            waiting = [i for i in node.all_input_nodes if i not in placed] if node not in placed else []
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if node in placed:
                continue
            placed.add(node)
            if last is not None:
                last.append(node)
            last = node
