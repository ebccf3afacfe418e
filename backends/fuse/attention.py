"""Scaled dot product attention between projections becomes one operation that reads and writes whole rows."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.heads import COPIES, SHAPES, called, merge, merged, replace_attention, through_copies, unrepeated
from surgery.backends.fuse.masks import Mask, classify
from surgery.backends.fuse.ops_attention import fill_of
from surgery.backends.fuse.ops_attention_shared import STANDARD
from surgery.backends.fuse.packing import LINEAR, Product, product
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

SDPA = aten.scaled_dot_product_attention.default
_OPS = torch.ops.surgery


@dataclass(frozen=True)
class Call:
    """One attention taken apart: operands [batch, heads, steps, width], ``times`` how often each head of k and v is repeated."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    heads: int
    groups: int

    @property
    def times(self) -> int:
        return self.heads // self.groups


@dataclass(frozen=True)
class Grown:
    """Keys and values that are a cache and new ones behind it."""

    past_key: fx.Node
    past_value: fx.Node
    key: fx.Node
    value: fx.Node


@dataclass
class FuseAttention:
    """Places are calls of ``scaled_dot_product_attention``. The result is com.microsoft MultiHeadAttention, or Attention where one product makes
    q, k and v from one value and nothing stands between:

    * heads are not moved to an axis of their own and back, and the bias of packed projections is added on the way;
    * a mask that is padding becomes the input ``key_padding_mask``, one that is causal an attribute; any other, and tables of relative
      positions, are added to the scores;
    * a cache in front of new keys becomes ``past_key`` and ``past_value``; where operator set 23 is asked for, attention behind a cache is Attention of the ONNX
      standard, measured to be faster for single steps and no slower for prompts (without a cache it gains nothing);
    * repeated key heads are not repeated: the queries of a group are further queries of their one head, or, where operator set 23 is asked for, it
      is Attention of the ONNX standard, measured to be faster for prompts and short caches and slower for one step behind a long one.
      (GroupQueryAttention is slower for single steps, and takes several new steps behind a cache for a single sequence only.)
    """

    name: str = "attention"
    doc: str = "attention with its reshapes, mask and cache is one operation (com.microsoft MultiHeadAttention)"
    order: int = 300
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        masks: dict[fx.Node, Mask] = {}
        for node in view.calls(aten.softmax.int, aten._softmax.default):
            readers = [r for u in through_copies(node) for r in (through_copies(u) if called(u, *SHAPES) else [u])]
            if any(called(r, aten.matmul.default, aten.bmm.default) for r in readers):
                yield Miss(
                    view.where(node), "the attention is written out in products and a softmax of its own", "written_attention says why"
                )
        for node in view.calls(SDPA):
            found = _take_apart(view, node)
            if isinstance(found, Call):
                found = _unfit(view, found) or found
            if isinstance(found, Miss):
                yield found
                continue
            mask = classify(view, found.mask, masks) if found.mask is not None else Mask(True, found.causal)
            what = _describe(found, mask)
            yield Match(node, lambda c=found, m=mask: _apply(view, c, m), what)  # type: ignore[misc]


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _take_apart(view: FuseView, node: fx.Node) -> Call | Miss:
    place = view.where(node)
    q, k, v = node.args[:3]
    if any(view.rank(t) != 4 for t in (q, k, v)):
        return Miss(place, "an operand has no axis of heads", ", ".join(str(view.rank(t)) for t in (q, k, v)) + " axes")
    if _argument(node, 4, "dropout_p", 0.0):
        return Miss(place, "it drops weights out at random")
    mask = _argument(node, 3, "attn_mask", None)
    causal = bool(_argument(node, 5, "is_causal", False))
    width = view.shape(q)[3]
    if not isinstance(width, int) or not isinstance(view.shape(v)[3], int):
        return Miss(place, "the width of a head is not known")
    scale = node.kwargs.get("scale")
    counts = [view.shape(t)[1] for t in (q, k)]
    if not all(isinstance(n, int) for n in counts):
        return Miss(place, "the number of heads is not known", ", ".join(map(str, counts)))
    key, times = unrepeated(view, k)
    value, again = unrepeated(view, v)
    if times != again:
        key, value, times = k, v, 1
    groups = int(view.shape(key)[1])
    if counts[0] != groups * times and not node.kwargs.get("enable_gqa"):
        return Miss(place, "heads of queries and keys do not fit", f"{counts[0]} and {counts[1]}")
    return Call(node, q, key, value, mask, causal, float(scale if scale is not None else width**-0.5), int(counts[0]), groups)


def _unfit(view: FuseView, call: Call) -> Miss | None:
    place = view.where(call.node)
    if view.dtype(call.q) not in (torch.float32, torch.float16):
        return Miss(place, "the runtime has no kernel of this operation in this type", str(view.dtype(call.q)).removeprefix("torch."))
    if call.causal and (call.mask is not None or not view.same(view.shape(call.q)[2], view.shape(call.k)[2])):
        return Miss(place, "it is causal from the first key on, over fewer queries than keys")
    batch = view.shape(call.q)[0]
    if not all(view.same(view.shape(t)[0], batch) for t in (call.k, call.v)):
        return Miss(place, "operands have different batches", ", ".join(str(view.shape(t)[0]) for t in (call.q, call.k, call.v)))
    widths = [view.shape(t)[3] for t in (call.k, call.v)]
    if widths[0] != widths[1] and (call.times > 1 or _grown(view, call) or any(merged(view, t) is None for t in (call.k, call.v))):
        return Miss(
            place, "keys and values differ in width, which the runtime's operation takes in rows alone", f"{widths[0]} and {widths[1]}"
        )
    if call.mask is None:
        return None
    shape = (1,) * (4 - view.rank(call.mask)) + view.shape(call.mask)
    wanted = (batch, call.heads, view.shape(call.q)[2], view.shape(call.k)[2])
    for i, (have, want) in enumerate(zip(shape, wanted, strict=True)):
        if not view.same(have, 1) and not view.same(have, want) and isinstance(have, int) and isinstance(want, int):
            return Miss(place, "the mask does not fit the scores", f"axis {i}: {have} and {want}")
    if call.times > 1 and not view.same(shape[1], 1):
        return Miss(place, "key heads are repeated and the mask differs between heads")
    return None


def _describe(call: Call, mask: Mask) -> str:
    heads = f"{call.heads} heads" if call.times == 1 else f"{call.heads} heads on {call.groups} of keys"
    if call.mask is None:
        said = "causal" if call.causal else "no mask"
    elif mask.plain:
        said = " and ".join(w for w in ("causal" if mask.causal else "", f"padding by {mask.padding.target}" if mask.padding else "") if w)
        said = said or "a mask that hides nothing"
    else:
        said = f"mask added to the scores ({mask.why})"
    return f"{heads}, {said}"


# ------------------------------------------------------------------ rewriting


def _apply(view: FuseView, call: Call, mask: Mask) -> None:
    with view.before(call.node):
        grown = _grown(view, call)
        if call.times > 1 or (grown and _has_standard(view, call)):
            _grouped(view, call, mask)
            return
        key, value = (grown.key, grown.value) if grown else (call.k, call.v)
        node = call.node
        query = merge(view, call.q, node)
        if grown or (merged(view, key) is not None and merged(view, value) is not None):
            key, value = merge(view, key, node), merge(view, value, node)
        padding = _padding(view, mask) if mask.plain else None
        scores = None if mask.plain else _scores(view, call)
        source = _source(query, key, value)
        if source is not None and grown is None and _packs(view, source):
            out = _packed(view, source, call, padding, scores, mask.causal)
            replace_attention(view, node, out, call.heads)
            return
        bias = _take_bias(view, source) if source is not None else None
        rest = (bias, padding, scores)
        if grown is None:
            out = view.call(_OPS.attention.default, query, key, value, *rest, call.heads, call.scale, mask.causal, like=node)
        else:
            made = view.call(
                _OPS.cached_attention.default, query, key, value, *rest, grown.past_key, grown.past_value, call.heads, call.scale,
                mask.causal, like=node,
            )  # fmt: skip
            out = view.item(made, 0, node)
            for old, index in ((call.k, 1), (call.v, 2)):
                new = view.item(made, index, node)
                old.replace_all_uses_with(new, delete_user_cb=lambda u: u.op == "output")
    replace_attention(view, call.node, out, call.heads)


def _grouped(view: FuseView, call: Call, mask: Mask) -> None:
    scores = None if call.mask is None or (mask.plain and not mask.causal and mask.padding is None) else _scores(view, call)
    if call.causal:
        scores = _triangle(view, call)
    if _has_standard(view, call):
        _shared(view, call, scores)
        return
    out = view.call(
        _OPS.grouped_attention.default, merge(view, call.q, call.node), call.k, call.v, scores, call.heads, call.groups, call.scale,
        like=call.node,
    )  # fmt: skip
    replace_attention(view, call.node, out, call.heads)


def _has_standard(view: FuseView, call: Call) -> bool:
    """Whether the operator of the standard is there and its kernel is for this type."""
    return view.target.opset >= STANDARD and view.target.device == "cpu" and view.dtype(call.q) is torch.float32


def _shared(view: FuseView, call: Call, scores: fx.Node | None) -> None:
    """Grouped heads as the standard's own operator, which takes the cache, too."""
    node, grown = call.node, _grown(view, call)
    query = merge(view, call.q, node)
    key, value = (merge(view, t, node) for t in ((grown.key, grown.value) if grown else (call.k, call.v)))
    sizes = (call.heads, call.groups, call.scale)
    if grown is None:
        out = view.call(_OPS.shared_attention.default, query, key, value, scores, *sizes, like=node)
    else:
        past = (grown.past_key, grown.past_value)
        made = view.call(_OPS.cached_shared_attention.default, query, key, value, scores, *past, *sizes, like=node)
        out = view.item(made, 0, node)
        for old, index in ((call.k, 1), (call.v, 2)):
            new = view.item(made, index, node)
            old.replace_all_uses_with(new, delete_user_cb=lambda u: u.op == "output")
    replace_attention(view, node, out, call.heads)


def _grown(view: FuseView, call: Call) -> Grown | None:
    """A cache that comes in as an input and goes out grown, and nothing else reads the grown one."""
    parts = []
    for node in (call.k, call.v):
        if not called(node, aten.cat.default):
            return None
        pieces, axis = node.args[0], _argument(node, 1, "dim", 0)
        if not isinstance(pieces, (list, tuple)) or len(pieces) != 2 or axis not in (2, -2):
            return None
        past, new = pieces
        if not isinstance(past, fx.Node) or past.op != "placeholder" or not isinstance(new, fx.Node):
            return None
        if any(u.op != "output" and not _leads_to(u, call.node) for u in node.users):
            return None
        parts.append((past, new))
    (past_key, key), (past_value, value) = parts
    return Grown(past_key, past_value, key, value)


def _leads_to(user: fx.Node, end: fx.Node) -> bool:
    """Whether a reader is ``end``, or repeats heads for it and for nobody else."""
    while user is not end and called(user, *SHAPES, *COPIES, aten.expand.default) and len(user.users) == 1:
        user = next(iter(user.users))
    return user is end


def _source(q: fx.Node, k: fx.Node, v: fx.Node) -> Product | None:
    """The one product that gives q, k and v one behind the other and is read by them alone."""
    for i, node in enumerate((q, k, v)):
        if not called(node, operator.getitem) or node.args[1] != i or len(node.users) != 1:
            return None
    split = q.args[0]
    if not isinstance(split, fx.Node) or k.args[0] is not split or v.args[0] is not split or len(split.users) != 3:
        return None
    if not called(split, aten.split_with_sizes.default) or len(split.args[1]) != 3:  # type: ignore[arg-type]
        return None
    whole = product(split.args[0])  # type: ignore[arg-type]
    return whole if whole is not None and len(whole.node.users) == 1 else None


def _packs(view: FuseView, source: Product) -> bool:
    """Whether the projections go into the operation: com.microsoft Attention holds one matrix, which no int8 of ours reaches into."""
    sizes = _sizes(source)
    if view.target.precision == "int8" or view.rank(source.x) != 3 or sizes[0] != sizes[1]:
        return False
    stored = [source.weight] if source.bias is None else [source.weight, source.bias]
    return all(view.name(t) and not view.is_live(t) for t in stored)


def _sizes(source: Product) -> list[int]:
    split = next(iter(source.node.users))
    return [int(n) for n in split.args[1]]  # type: ignore[union-attr, arg-type]


def _packed(view: FuseView, source: Product, call: Call, padding: fx.Node | None, scores: fx.Node | None, causal: bool) -> fx.Node:
    name = view.name(source.weight)
    stored = view.attribute(name).detach()
    weight = view.packed(f"{name}_t", [name], lambda: stored.t().contiguous(), call.node)
    bias = source.bias
    if bias is None:
        base = name.removesuffix("weight")
        bias = view.packed(f"{base}bias", [name], lambda: stored.new_zeros(stored.shape[0]), call.node)
    return view.call(
        _OPS.packed_attention.default, source.x, weight, bias, padding, scores, call.heads, _sizes(source), call.scale, causal, like=call.node
    )  # fmt: skip


def _take_bias(view: FuseView, whole: Product) -> fx.Node | None:
    """Takes the bias off a product, for the attention to add."""
    if whole.bias is None:
        return None
    with view.before(whole.node):
        bare = view.call(LINEAR, whole.x, whole.weight, like=whole.node)
    whole.node.replace_all_uses_with(bare)
    view.graph.graph.erase_node(whole.node)
    return whole.bias


def _padding(view: FuseView, mask: Mask) -> fx.Node | None:
    """The padding input as int32, made once, right behind the inputs."""
    source = mask.padding
    if source is None:
        return None

    def make() -> fx.Node:
        with view.after(view.placeholders[-1]):
            node = source
            if view.dtype(source) not in (torch.bool, torch.int64, torch.int32):
                node = view.call(aten.ne.Scalar, node, 0)
            return view.call(aten.to.dtype, node, torch.int32)

    return view.once(("padding", source.name), make)


def _scores(view: FuseView, call: Call) -> fx.Node:
    """The mask as numbers of the scores' type with four axes, the last two in full; made once for each mask, where it is first needed."""
    mask, dtype = call.mask, view.dtype(call.q)
    assert mask is not None and dtype is not None

    def make() -> fx.Node:
        made = mask
        if view.dtype(mask) is torch.bool:
            zero, hidden = (view.call(aten.scalar_tensor.default, x, dtype=dtype) for x in (0.0, fill_of(dtype)))
            made = view.call(aten.where.self, made, zero, hidden)
        elif view.dtype(mask) is not dtype:
            made = view.call(aten.to.dtype, made, dtype)
        while view.rank(made) < 4:
            made = view.call(aten.unsqueeze.default, made, 0)
        queries, keys = view.shape(call.q)[2], view.shape(call.k)[2]
        if any(view.same(have, 1) and not view.same(want, 1) for have, want in zip(view.shape(made)[2:], (queries, keys), strict=True)):
            made = view.call(aten.expand.default, made, [-1, -1, view.size(call.q, 2), view.size(call.k, 2)])
        return made

    return view.once(("scores", mask.name, dtype, str(view.shape(call.q)[2])), make)


def _triangle(view: FuseView, call: Call) -> fx.Node:
    """Scores that hide later keys, for grouped heads without a mask."""
    dtype = view.dtype(call.q)
    assert dtype is not None
    length = view.size(call.q, 2)
    full = view.call(aten.full.default, [1, 1, length, length], fill_of(dtype), dtype=dtype)
    return view.call(aten.triu.default, full, 1)


RULE = FuseAttention()
