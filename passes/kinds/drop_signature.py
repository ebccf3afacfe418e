"""The call of a program when layers go: cache entries and outputs by layer leave the signature, sizes are read elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.program import Program

Tree = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One flat value of a signature: ``kind`` is ``cache`` (``slot`` counts its layers, ``part`` the four or two runs of them),
    ``item`` (an entry of a list or tuple that stands under a name, one for each layer) or ``fixed``."""

    kind: str
    slot: int = 0
    part: int = 0


def leaves(tree: Tree, named: bool = False, depth: int = 0) -> list[Leaf]:
    """The flat values of a tree in order (see ``surgery.model.pytree``)."""
    kind = tree["type"]
    if kind == "tensor":
        return [Leaf("fixed")]
    if kind == "cache":
        runs = 4 if tree["class"] == "EncoderDecoderCache" else 2
        return [Leaf("cache", slot, part) for part in range(runs) for slot in range(tree["layers"])]
    found: list[Leaf] = []
    listed = kind in ("list", "tuple") and named
    for slot, item in enumerate(tree.get("items", ())):
        if listed and item["type"] == "tensor":
            found.append(Leaf("item", slot))
        else:
            found += leaves(item, kind in ("dict", "output"), depth + 1)
    return found


def without(tree: Tree, dropped: set[int], at: int = 0) -> tuple[Tree, int]:
    """The tree less its flat values at ``dropped`` (counted from ``at``), and where the next tree begins.

    Raises ValueError when a cache would lose different layers in its parts.
    """
    kind = tree["type"]
    if kind == "tensor":
        return tree, at + 1
    if kind == "cache":
        runs, layers = (4 if tree["class"] == "EncoderDecoderCache" else 2), tree["layers"]
        lost = [{slot for slot in range(layers) if at + part * layers + slot in dropped} for part in range(runs)]
        if any(one != lost[0] for one in lost):
            raise ValueError("a part of a cache")
        return {**tree, "layers": layers - len(lost[0])}, at + runs * layers
    if "items" not in tree:
        return tree, at
    items, keys = [], []
    for i, item in enumerate(tree["items"]):
        whole = item["type"] == "tensor" and at in dropped
        left, at = without(item, dropped, at)
        if not whole:
            items.append(left)
            keys.append(i)
    new = {**tree, "items": items}
    if "keys" in tree:
        new["keys"] = [tree["keys"][i] for i in keys]
    return new, at


def loose_outputs(program: Program) -> set[int]:
    """The places of the root's outputs that belong to one layer each: caches and tuples by layer."""
    return {i for i, leaf in enumerate(leaves(program.signature.out_spec)) if leaf.kind != "fixed"}


def drop_outputs(program: Program, places: Iterable[int], span: Span, what: str) -> None:
    """Take flat outputs out of the root graph and of the tree that they build."""
    gone = set(places)
    if not gone:
        return
    end = program.graph.graph.output_node()
    values, specs = list(end.args[0]), end.meta.get("spec")  # type: ignore[arg-type]
    kept = [i for i in range(len(values)) if i not in gone]
    end.args = (tuple(values[i] for i in kept),)
    if isinstance(specs, tuple | list):
        end.meta["spec"] = tuple(specs[i] for i in kept)
    program.signature = replace(program.signature, out_spec=_less(program.signature.out_spec, gone, span, what))


def drop_inputs(program: Program, holders: Sequence[fx.Node], span: Span, what: str) -> list[int]:
    """Take those of the given placeholders that only give sizes out of the root graph; their places among the flat inputs.

    Sizes that were read from them are read from another input of the same symbol. Raises S0474 when there is none.
    """
    graph = program.graph.graph
    every = [n for n in graph.nodes if n.op == "placeholder"]
    kinds = leaves(program.signature.in_spec)
    lost = [n for n in holders if n in every and kinds[every.index(n)].kind != "fixed" and all(_is_size(u) for u in n.users)]
    if not lost:
        return []
    left = [n for n in every if n not in lost]
    # a cache input stands in for a cache input: what length it has is said by its name
    ranked = sorted(left, key=lambda n: kinds[every.index(n)].kind == "fixed")
    for node in lost:
        for user in list(node.users):
            source = _same_size(node, int(user.args[1]), ranked)  # type: ignore[arg-type]
            if source is None:
                raise _last(span, what)
            user.args = source
    symbols = {}
    for name, (holder, axis, traced) in program.signature.symbols.items():
        old = next((n for n in lost if str(n.target) == holder), None)
        if old is not None:
            found = _same_size(old, axis, ranked)
            if found is None:
                raise _last(span, what)
            holder, axis = str(found[0].target), found[1]
        symbols[name] = (holder, axis, traced)
    places = [every.index(n) for n in lost]
    tree = _less(program.signature.in_spec, set(places), span, what)
    for node in lost:
        graph.erase_node(node)
    program.signature = replace(program.signature, in_spec=tree, symbols=symbols)
    return places


def _less(tree: Tree, places: set[int], span: Span, what: str) -> Tree:
    try:
        return without(tree, places)[0]
    except ValueError:
        raise fail(
            "S0474", f"{what} holds a part of the cache, whose other part stays", span, "selected here",
            help="bypass both attention blocks of the layer, or capture the model without a cache",
        ) from None  # fmt: skip


def _last(span: Span, what: str) -> Exception:
    return fail(
        "S0474", f"without {what} the model has no cache, and its graph reads the length of the past from it", span, "selected here",
        help="keep at least one attention block that writes to the cache",
    )  # fmt: skip


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and "sym_size" in str(node.target)


def _same_size(node: fx.Node, axis: int, others: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    wanted = node.meta["spec"].shape[axis]
    for other in others:
        shape = getattr(other.meta.get("spec"), "shape", ())
        if wanted in shape:
            return other, list(shape).index(wanted)
    return None
