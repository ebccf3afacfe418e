"""Programs cut down for serving: without the cache, or the encoder and the decoder of a model apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from surgery.model.program import Program, Signature, ValueSpec

Tree = dict[str, Any]


class NotCut(Exception):
    """The graph does not have the form that a cut needs; the text says what stands in the way."""


def copy_of(program: Program) -> Program:
    """A copy whose graph may be rewritten; roles stay those of the whole model."""
    out = program.copy()
    out._anatomy = program._anatomy
    return out


def inputs_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def is_size(node: fx.Node) -> bool:
    """Whether a node reads one size of a tensor."""
    return node.op == "call_function" and "sym_size" in str(node.target)


def same_size(wanted: Any, others: Iterable[fx.Node]) -> tuple[fx.Node, int] | None:
    """An input and its axis that has this size."""
    for other in others:
        shape = getattr(other.meta.get("spec"), "shape", ())
        if wanted in shape:
            return other, list(shape).index(wanted)
    return None


def read_elsewhere(node: fx.Node, others: list[fx.Node]) -> None:
    """Sizes that are read from ``node`` are read from another input with the same size, where there is one."""
    for user in [u for u in node.users if is_size(u)]:
        found = same_size(node.meta["spec"].shape[int(user.args[1])], others)  # type: ignore[arg-type]
        if found is not None:
            user.args = found


def settle(program: Program, keep: Callable[[fx.Node], bool] = lambda node: False) -> None:
    """Dead nodes, unused inputs (unless ``keep``) and unused modules leave the root graph; signature, symbols, attachments follow."""
    gm = program.graph
    gm.graph.eliminate_dead_code()
    given = inputs_of(gm)
    left = [n for n in given if keep(n) or any(not is_size(u) for u in n.users)]
    for node in given:
        if node not in left:
            read_elsewhere(node, left)
            if node.users:
                left.append(node)
    left = [n for n in given if n in left]
    symbols = {}
    for name, (holder, axis, traced) in program.signature.symbols.items():
        if not any(str(n.target) == holder for n in left):
            found = _carrier(name, left)
            if found is None:
                continue
            holder, axis = str(found[0].target), found[1]
        symbols[name] = (holder, axis, traced)
    for node in given:
        if node not in left:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    gm.delete_all_unused_submodules()
    paths = {path for path, _ in gm.named_modules(remove_duplicate=False)}
    program.attachments = [a for a in program.attachments if a.module in paths]
    program.signature = replace(program.signature, symbols=symbols)
    program._dims = None


def _carrier(symbol: str, given: list[fx.Node]) -> tuple[fx.Node, int] | None:
    """An input and its axis that has the size of this name."""
    for node in given:
        for axis, size in enumerate(node.meta["spec"].shape):
            if getattr(size, "is_Symbol", False) and str(size) == symbol:
                return node, axis
    return None


def signature(program: Program, names: Iterable[str], out_spec: Tree) -> Signature:
    """A signature of single tensors by name."""
    names = tuple(names)
    tree = {"type": "dict", "keys": list(names), "items": [{"type": "tensor"} for _ in names]}
    return replace(program.signature, parameters=names, in_spec=tree, out_spec=out_spec)


# ------------------------------------------------------------------ without the cache


def is_cache(name: str) -> bool:
    return name.startswith("past_key_values")


def has_cache(program: Program) -> bool:
    """Whether the flat inputs hold keys and values of earlier steps."""
    return any(is_cache(str(n.target)) for n in inputs_of(program.graph))


def without_cache(program: Program) -> Program:
    """The program for whole sequences only: no past goes in and no keys and values come out.

    It computes what the program computes with an empty cache. Raises :class:`NotCut` when the graph does more with the past than to put
    new keys and values behind it, or is fixed to a length of it.
    """
    out = copy_of(program)
    root = out.graph
    past = [n for n in inputs_of(root) if is_cache(str(n.target))]
    steps = {name for name, (holder, axis, _) in program.signature.symbols.items() if is_cache(holder) and axis != 0}
    gone = {s for n in past for s in _symbols(n.meta["spec"]) if str(s) in steps}
    for node in past:
        if not any(_symbols_in(size) & gone for size in node.meta["spec"].shape):
            raise NotCut("its graph is fixed to one length of the past")
    zero = {s: 0 for s in gone}
    seen: set[int] = set()
    _empty(root, past, zero, seen)
    end = root.graph.output_node()
    values, specs, tree = list(end.args[0]), list(end.meta["spec"]), out.signature.out_spec  # type: ignore[arg-type]
    places = _cache_places(tree)
    end.args = (tuple(v for i, v in enumerate(values) if i not in places),)
    end.meta["spec"] = tuple(s for i, s in enumerate(specs) if i not in places)
    kept = [(k, i) for k, i in zip(out.signature.in_spec["keys"], out.signature.in_spec["items"], strict=True) if i["type"] != "cache"]
    out.signature = replace(
        out.signature, parameters=tuple(p for p in out.signature.parameters if p in {k for k, _ in kept}),
        in_spec={**out.signature.in_spec, "keys": [k for k, _ in kept], "items": [i for _, i in kept]},
        out_spec=_without_cache(tree), constants={**out.signature.constants, "use_cache": False},
    )  # fmt: skip
    for module in out.graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if "spec" in node.meta:
                    node.meta["spec"] = _substitute(node.meta["spec"], zero)
    settle(out, keep=lambda node: not is_cache(str(node.target)))
    if has_cache(out):
        raise NotCut("its graph reads more of the past than its length")
    return out


def _symbols_in(size: Any) -> set[Any]:
    return set(getattr(size, "free_symbols", ()))


def _symbols(spec: ValueSpec) -> set[Any]:
    return {s for size in spec.shape for s in _symbols_in(size)}


def _substitute(spec: Any, zero: dict[Any, int]) -> Any:
    if isinstance(spec, tuple):
        return tuple(_substitute(s, zero) for s in spec)
    if not isinstance(spec, ValueSpec):
        return spec
    shape = []
    for n in spec.shape:
        n = n.subs(zero) if _symbols_in(n) else n
        shape.append(int(n) if getattr(n, "is_Integer", False) else n)
    return replace(spec, shape=tuple(shape))


def _empty(gm: fx.GraphModule, past: list[fx.Node], zero: dict[Any, int], seen: set[int]) -> None:
    """Takes tensors without steps out of one graph and out of those that it calls."""
    if id(gm) in seen:
        raise NotCut("layers that are one module keep a past each")
    seen.add(id(gm))
    others = [n for n in inputs_of(gm) if n not in past]
    for node in past:
        for user in list(node.users):
            if is_size(user):
                _size_of_nothing(gm, node, user, others, zero)
            elif user.op == "call_module" and isinstance(gm.get_submodule(str(user.target)), fx.GraphModule):
                continue
            elif "aten.cat." in str(user.target):
                parts = [p for p in user.args[0] if p is not node]  # type: ignore[union-attr]
                if len(parts) == 1:
                    user.replace_all_uses_with(parts[0])
                    gm.graph.erase_node(user)
                else:
                    user.args = (parts, *user.args[1:])
            else:
                raise NotCut(f"its graph reads the past in {user.name}")
    for call in {u for n in past for u in n.users}:
        child = gm.get_submodule(str(call.target))
        assert isinstance(child, fx.GraphModule)
        takes = inputs_of(child)
        inner = [takes[i] for i, a in enumerate(call.args) if a in past]
        inner += [n for n in takes if call.kwargs.get(str(n.target)) in past]
        _empty(child, inner, zero, seen)
        call.args = tuple(a for a in call.args if a not in past)
        call.kwargs = {k: v for k, v in call.kwargs.items() if v not in past}
    for node in past:
        if node.users:
            raise NotCut(f"its graph reads the past in {next(iter(node.users)).name}")
        gm.graph.erase_node(node)
    gm.recompile()


def _size_of_nothing(gm: fx.GraphModule, node: fx.Node, user: fx.Node, others: list[fx.Node], zero: dict[Any, int]) -> None:
    size = node.meta["spec"].shape[int(user.args[1])]  # type: ignore[arg-type]
    left = size.subs(zero) if _symbols_in(size) else size
    if not _symbols_in(left):
        user.replace_all_uses_with(int(left))  # type: ignore[arg-type]
        gm.graph.erase_node(user)
        return
    found = same_size(size, others)
    if found is None:
        raise NotCut(f"its graph takes a size from the past that no other input has ({user.name})")
    user.args = found


def _cache_places(tree: Tree) -> set[int]:
    places: set[int] = set()

    def walk(spec: Tree, at: int) -> int:
        if spec["type"] == "tensor":
            return at + 1
        if spec["type"] == "cache":
            count = 2 * int(spec["layers"]) * (2 if spec["class"] == "EncoderDecoderCache" else 1)
            places.update(range(at, at + count))
            return at + count
        for item in spec.get("items", ()):
            at = walk(item, at)
        return at

    walk(tree, 0)
    return places


def _without_cache(tree: Tree) -> Tree:
    if "items" not in tree:
        return tree
    kept = [i for i, item in enumerate(tree["items"]) if item["type"] != "cache"]
    new = {**tree, "items": [_without_cache(tree["items"][i]) for i in kept]}
    if "keys" in tree:
        new["keys"] = [tree["keys"][i] for i in kept]
    return new


# ------------------------------------------------------------------ encoder and decoder

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
"""What the decoder's inputs are called: the encoder's output, and the mask that the encoder had as ``attention_mask``."""

BOUNDARY = "encoder_last_hidden_state"
"""The output of the whole model that is the encoder's."""


def is_pair(program: Program) -> bool:
    """Whether a model is an encoder and a decoder, called together: its encoder's output is one of its outputs."""
    tree = program.signature.out_spec
    return tree.get("type") == "output" and BOUNDARY in tree.get("keys", ()) and any(
        str(n.target).startswith("decoder_") for n in inputs_of(program.graph)
    )  # fmt: skip


def split(program: Program) -> tuple[Program, Program]:
    """The encoder (its own inputs to ``last_hidden_state``) and the decoder (``encoder_hidden_states``, the encoder's mask where it has
    one, and its own inputs to the other outputs) as programs that share the weights.

    The decoder has no cache: it reads all tokens of the target so far. Raises :class:`NotCut` when the encoder depends on the decoder's
    inputs, or the decoder on more of the encoder than its output and mask.
    """
    return _encoder(program), _decoder(program)


def boundary(program: Program) -> int:
    """The place of the encoder's output among the flat outputs of a pair."""
    tree, at = program.signature.out_spec, 0
    for key, item in zip(tree["keys"], tree["items"], strict=True):
        if key == BOUNDARY:
            return at
        at += _leaves(item)
    raise NotCut("it does not give its encoder's output")


def _leaves(tree: Tree) -> int:
    if tree["type"] == "tensor":
        return 1
    if tree["type"] == "cache":
        return 2 * int(tree["layers"]) * (2 if tree["class"] == "EncoderDecoderCache" else 1)
    return sum(_leaves(item) for item in tree.get("items", ()))


def _encoder(program: Program) -> Program:
    out = copy_of(program)
    end = out.graph.graph.output_node()
    at = boundary(program)
    end.args = ((end.args[0][at],),)  # type: ignore[index]
    end.meta["spec"] = (end.meta["spec"][at],)
    settle(out)
    names = [str(n.target) for n in inputs_of(out.graph)]
    if any(n.startswith("decoder_") for n in names):
        raise NotCut("its encoder reads what the decoder is given")
    tree = {
        "type": "output", "class": "transformers.modeling_outputs:BaseModelOutput", "keys": ["last_hidden_state"], "items": [{"type": "tensor"}],
    }  # fmt: skip
    out.signature = signature(out, names, tree)
    return out


def _decoder(program: Program) -> Program:
    out = copy_of(program)
    graph = out.graph.graph
    end = graph.output_node()
    at = boundary(program)
    states = end.args[0][at]  # type: ignore[index]
    end.args = (tuple(v for i, v in enumerate(end.args[0]) if i != at),)  # type: ignore[arg-type]
    end.meta["spec"] = tuple(s for i, s in enumerate(end.meta["spec"]) if i != at)
    with graph.inserting_before(next(iter(graph.nodes))):
        given = graph.placeholder(STATES)
    given.meta.update(spec=states.meta["spec"])
    states.replace_all_uses_with(given)
    settle(out, keep=lambda node: node is given)
    more = [n for n in inputs_of(out.graph) if n is not given and not str(n.target).startswith("decoder_")]
    if any(str(n.target) != "attention_mask" for n in more):
        raise NotCut(f"its decoder reads `{more[0].target}` of the encoder")
    renamed = {}
    for node in more:
        renamed[str(node.target)] = MASK
        node.target = MASK
    symbols = {s: (renamed.get(h, h), a, n) for s, (h, a, n) in out.signature.symbols.items()}
    out.graph.recompile()
    tree = dict(program.signature.out_spec)
    kept = [i for i, key in enumerate(tree["keys"]) if key != BOUNDARY]
    tree |= {"keys": [tree["keys"][i] for i in kept], "items": [tree["items"][i] for i in kept]}
    out.signature = replace(signature(out, [str(n.target) for n in inputs_of(out.graph)], tree), symbols=symbols)
    return out
