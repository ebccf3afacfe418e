"""Inserting keys and values in front of an attention's own: what stands at the core of an attention and how it folds.

An attention block computes ``softmax(q K^T + mask) V``. A *memory* of ``m`` entries makes that ``K' = [P_k; K]``, ``V' = [P_v; V]`` per key
head, and the mask gets ``m`` columns that every query sees. It stands behind rotary embeddings, caches and key norms, so its keys are
neither rotated nor cached: positions, padding and the length of a cache stay what they were.

A method of this sort (:class:`MemoryMethod`) states the tensors it trains and how they become the two tables; this module owns the graph and
the fold, in which the tables become constants and what made them goes (fold class ``const``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model.cut_attached import Follow, Kept
from surgery.model.dims.masks import Mask
from surgery.model.modules import register_module
from surgery.model.program import Attachment, Program, ValueSpec
from surgery.model.weights import Apply, Expr
from surgery.passes.kinds import attach, insert_follow
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.operation import Resolved, SiteChange

MODULE_TAG = "surgery.memory"
KEYS, VALUES, MASK = 0, 1, 2
"""What a call of the module edits."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Core:
    """An attention where a memory stands.

    ``heads`` key heads of width ``key`` with values of width ``value``; ``repeat`` says how many query heads read each of them where the graph
    repeats keys before the attention. ``hidden`` is the width of the model there; cores with one ``group`` (a stack's self or cross attentions)
    share what a method shares.
    """

    heads: int
    key: int
    value: int
    repeat: int = 1
    hidden: int = 0
    group: str = ""


@dataclass(frozen=True)
class MemoryMethod(Method):
    """Base of the methods that give an attention further keys and values."""

    kind: ClassVar[str] = "insert"
    fold_class: ClassVar[str] = "const"
    identity: ClassVar[str] = "changed"
    places: ClassVar[tuple[str, ...]] = ("on",)
    stands: ClassVar[str] = "attention"
    exchange: ClassVar[bool] = False
    """Whether adapter files hold the tables that this method can train."""

    def entries(self) -> int:
        """How many keys and values are put in front."""
        raise NotImplementedError

    def tensors(self, site: Core) -> tuple[TensorSpec, ...]:
        """What is trained at one attention, in order."""
        raise NotImplementedError

    def count(self, site: Core) -> int:
        """How many parameters one attention's module has, by the published formula; shared ones count for each."""
        raise NotImplementedError

    def tables(self, site: Core, t: Tensors) -> tuple[Tensor, Tensor]:
        """Keys ``[heads, entries, key]`` and values ``[heads, entries, value]``."""
        raise NotImplementedError

    def generated(self) -> bool:
        """Whether the tables are made from other tensors, so that folding leaves something out."""
        return True

    def follow(self, site: Core, heads: Mask | None, key: Mask | None, value: Mask | None) -> Mapping[str, Kept] | str:
        """What stays of each tensor's axes when the attention keeps these key heads and these features of its keys and values (None: all); a text
        says why they cannot follow."""
        return "its tables come from a network that says nothing about single heads"


class MemoryModule(nn.Module):
    """What stands at a core: ``(k, KEYS, k) -> [P_k; k]``, ``(v, VALUES, k) -> [P_v; v]`` and ``(mask, MASK, k) -> mask`` with open columns.

    ``k`` and ``v`` are ``[batch, heads, length, width]``, ``mask`` broadcasts to ``[batch, heads, queries, length]``. ``stored``: the tensors are
    the tables themselves.
    """

    edits = 0
    """Which argument is the value that passes through when the module is taken out."""
    folded = "its keys and values are constants of the graph now"
    """What a fold made of it, for the plan."""

    def __init__(self, method: MemoryMethod, site: Core, stored: bool) -> None:
        super().__init__()
        self._setup(method, site, stored)
        for spec in self.specs():
            empty = torch.empty(spec.shape, dtype=attach.torch_dtype(spec.dtype or "float32"))
            self.register_parameter(spec.name, nn.Parameter(empty, requires_grad=spec.trainable))

    def _setup(self, method: MemoryMethod, site: Core, stored: bool) -> None:
        self.method, self.site, self.stored = method, site, stored
        self.active = True

    @classmethod
    def bare(cls, method: MemoryMethod, site: Core, stored: bool) -> MemoryModule:
        """Without tensors: the attaching pass adds them with their expressions."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(method, site, stored)
        return module

    def specs(self) -> tuple[TensorSpec, ...]:
        return table_specs(self.method, self.site) if self.stored else self.method.tensors(self.site)

    def forward(self, value: Tensor, role: int, keys: Tensor) -> Tensor:
        if not self.active:
            return value
        if role == MASK:
            shape = (*value.shape[:-1], self.length())
            seen = value.new_ones(shape) if value.dtype == torch.bool else value.new_zeros(shape)
            return torch.cat([seen, value.expand(*value.shape[:-1], keys.shape[-2])], -1)
        table = self.tables()[role].to(value.dtype)
        if self.site.repeat > 1:
            table = table.repeat_interleave(self.site.repeat, 0)
        return torch.cat([table.expand(value.shape[0], -1, -1, -1), value], -2)

    def length(self) -> int:
        """How many entries there are: as many as the tables have where they are tensors, which another set of values may change."""
        return self.tables()[KEYS].shape[-2] if self.stored or not self.method.generated() else self.method.entries()

    def tables(self) -> tuple[Tensor, Tensor]:
        if self.stored:
            return self.keys, self.values  # type: ignore[return-value]
        return self.method.tables(self.site, self._parameters)  # type: ignore[arg-type]

    def surgery_events(self) -> tuple[Method, nn.Module]:
        """Who acts during training on whose behalf (see ``surgery.train``)."""
        return self.method, self

    def follow_calls(self, calls: insert_follow.Calls) -> Follow | str:
        """Tables lose the heads and the width that the keys and values around them lose; of a network that makes them its last layer does."""
        return insert_follow.follow_memory(self, calls, KEYS, VALUES)

    def module_config(self) -> dict[str, Any]:
        config = {"method": f"{self.method.verb}/{self.method.name}", "params": self.method.params(), "site": asdict(self.site)}
        return config | ({"stored": True} if self.stored else {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MemoryModule:
        from surgery.passes import registry

        verb, _, name = config["method"].partition("/")
        method = registry.get(verb, name)
        if not issubclass(method, MemoryMethod):
            raise ValueError(f"{config['method']} gives no keys and values")
        return cls(method(**config["params"]), Core(**config["site"]), bool(config.get("stored", False)))

    def extra_repr(self) -> str:
        return f"{self.method.verb} {self.method.name}, {self.method.entries()} entries, {self.site.heads} heads"


register_module(MODULE_TAG, MemoryModule)


def table_specs(method: MemoryMethod, site: Core) -> tuple[TensorSpec, ...]:
    m = method.entries()
    return TensorSpec("keys", (site.heads, m, site.key), trainable=False), TensorSpec(
        "values", (site.heads, m, site.value), trainable=False
    )


# ------------------------------------------------------------------ attach


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Put the statement's memory at the core of every attention. Raises S0490 where an attention has no core that can take one."""
    attach.freeze_base(program)
    pool: dict[str, str] = {}
    changes = []
    for site, method in zip(op.sites, op.methods, strict=True):
        assert isinstance(method, MemoryMethod)
        changes.append(_attach(program, op, site, method, pool))
    return changes


def _attach(program: Program, op: Resolved, site: Site, method: MemoryMethod, pool: dict[str, str]) -> SiteChange:
    def place(graph: str, node: fx.Node, path: str) -> fx.Node:
        return _place(program, graph, node, path, method.entries())

    change, _ = at_attention(program, op, site, method, MemoryModule, pool, place)
    own = [n for n in site.parameters if program.aliases.get(n, n) not in program.frozen]
    trained = sum(torch.Size(program.weights[program.aliases.get(n, n)].shape).numel() for n in dict.fromkeys(own))
    return replace(change, trainable=change.trainable + trained)


def at_attention(
    program: Program, op: Resolved, site: Site, method: MemoryMethod, kind: Any, pool: dict[str, str],
    place: Callable[[str, fx.Node, str], fx.Node],
) -> tuple[SiteChange, Any]:  # fmt: skip
    """A module of ``kind`` with the method's tensors beside one attention, and what the attention is. ``place`` puts the calls of the module, whose path
    it is given, at a node of a graph that attends, and gives the first of them. Raises S0490."""
    core, calls = core_of(program, op, site)
    parent = site.path if attach.relative(site.path, calls[0][0]) is not None else calls[0][0]
    path = attach.join(parent, attach.free_name(attach.parent_module(program, parent), op.name))
    module = kind.bare(method, core, stored=False)
    program.graph.add_submodule(path, module)
    params = tuple((k, v) for k, v in method.params().items() if k != "seed")
    names, added, trainable = attach.add_tensors(
        program, module, path, method.tensors(core), op,
        dtype=attach.adapter_dtype(program.info.dtype), source=None, params=params, pool=pool,
    )  # fmt: skip
    first = None
    for graph, node in calls:
        made = place(graph, node, path)
        first = first or attach.node_ref(graph, made)
        attach.recompile_later(program.module(graph))
    assert first is not None
    program.journal.record(first, op.origin)
    program.journal.record(path, op.origin)
    program.attachments.append(Attachment(op.name, method, site, path, first, tuple(names), op.origin))
    return SiteChange(site.role, site.path, site.rows, site.shape, site.shape, added, 0, trainable), core


def core_of(program: Program, op: Resolved, site: Site) -> tuple[Core, list[tuple[str, fx.Node]]]:
    """The core of an attention block and its calls. Raises S0490."""
    if not site.is_region or "causal" not in site.facts:
        raise _refused(op, site, "it is no attention block", "select attention blocks, for example `layers[*].attn`")
    calls = [(ref.graph, program.node(ref)) for ref in site.calls]
    if not calls:
        raise _refused(op, site, "the graph shows no place where its queries meet its keys")
    found: list[tuple[int, int, int]] = []
    for graph, node in calls:
        gm = program.module(graph)
        if not is_core(gm, node):
            raise _refused(
                op, site, "it computes its scores, their softmax and the product with the values as separate operations",
                "keys and values in front of a decoder's cache: `insert prompt(..) on embed.tokens`, then `fold all`; or leave this block out",
            )  # fmt: skip
        if takes_causal_flag(gm, node):
            raise _refused(op, site, "its attention is causal by a flag and has no mask that could be extended")
        k, v = (a.meta["spec"].shape for a in node.args[1:3])  # type: ignore[union-attr]
        if len(k) != 4 or len(v) != 4 or any(not _fixed(n) for n in (k[1], k[3], v[1], v[3])):
            raise _refused(op, site, "the shape of its keys is not fixed")
        found.append((int(k[1]), int(k[3]), int(v[3])))
    if any(f != found[0] for f in found) or len({graph for graph, _ in calls}) > 1:
        raise _refused(op, site, "its calls differ from each other")
    heads, key, value = found[0]
    own = site.kv_heads or heads
    repeat = heads // own if heads % own == 0 else 1
    hidden = _hidden(program, site) or (site.heads or heads) * key
    group = f"{site.stack}.{'cross' if site.facts.get('cross') else 'self'}"
    return Core(heads // repeat, key, value, repeat, hidden, group), calls


def is_core(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is one fused attention, in a graph or as the module that capture puts there."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__ == "Attention"
    return node.op == "call_function" and "scaled_dot_product_attention" in str(node.target)


def takes_causal_flag(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(gm.get_submodule(str(node.target)), "is_causal", False))
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def mask_key(node: fx.Node) -> int | str | None:
    """Where a core has its mask: the place among its arguments, or its keyword; None without one."""
    if len(node.args) > 3 and isinstance(node.args[3], fx.Node):
        return 3
    return next((k for k in ("attn_mask", "mask") if isinstance(node.kwargs.get(k), fx.Node)), None)


def _place(program: Program, graph: str, node: fx.Node, path: str, entries: int) -> fx.Node:
    """Calls of the module on keys, values and mask of a core; the first of them."""
    gm = program.module(graph)
    target = attach.relative(path, graph)
    assert target is not None
    first = None
    bare = node.args[1]
    at = mask_key(node)
    places: list[tuple[int | str, int]] = [(1, KEYS), (2, VALUES), *([] if at is None else [(at, MASK)])]
    for slot, role in places:
        value = node.args[slot] if isinstance(slot, int) else node.kwargs[slot]
        assert isinstance(value, fx.Node)
        with gm.graph.inserting_before(node):
            made = gm.graph.create_node("call_module", target, (value, role, bare), name=target.replace(".", "_"))
        made.meta["spec"] = longer(value.meta["spec"], entries, -1 if role == MASK else -2, None if role != MASK else bare.meta["spec"])  # type: ignore[union-attr]
        if isinstance(slot, int):
            node.args = tuple(made if i == slot else a for i, a in enumerate(node.args))
        else:
            node.kwargs = {**node.kwargs, slot: made}
        first = first or made
    assert first is not None
    return first


def longer(spec: ValueSpec, more: int, axis: int, like: ValueSpec | None = None) -> ValueSpec:
    """A spec that is ``more`` longer on an axis; the length itself is that of ``like``'s second to last axis, if it is given."""
    shape = list(spec.shape)
    shape[axis] = (shape[axis] if like is None else like.shape[-2]) + more
    return ValueSpec(spec.kind, spec.dtype, tuple(shape))


def _fixed(n: Any) -> bool:
    return isinstance(n, int) or bool(getattr(n, "is_Integer", False))


def _hidden(program: Program, site: Site) -> int:
    """Features of what enters the attention."""
    if site.input is None:
        return 0
    spec = program.node(site.input).meta.get("spec")
    shape = getattr(spec, "shape", ())
    return int(shape[-1]) if shape and _fixed(shape[-1]) else 0


def _refused(op: Resolved, site: Site, why: str, help: str = "leave this block out: `except` takes a selector") -> Exception:
    return fail("S0490", f"{op.method.name} cannot stand on {site.role}: {why}", op.origin.span, "asked for here", help=help)


# ------------------------------------------------------------------ fold


def fold(program: Program, a: Attachment, op: Resolved) -> str:
    """Replace what makes the tables by the tables; a reason where there is nothing to replace, else an empty text."""
    module = program.module(a.module)
    assert isinstance(module, MemoryModule)
    method, core = module.method, module.site
    if module.stored:
        return "its keys and values are constants already, and an attention has no place for them"
    inputs: list[Expr] = [program.weights[program.aliases.get(n, n)] for n in a.tensors]
    params = (*((k, tuple(v) if isinstance(v, list) else v) for k, v in method.params().items() if k != "seed"), ("site", _pairs(core)))
    stored = type(module).bare(method, core, stored=True)
    made: dict[str, Expr] = {}
    for i, spec in enumerate(stored.specs()):
        made[spec.name] = Apply(spec.shape, inputs[0].dtype, f"{method.verb}/{method.name}:memory", tuple(inputs), params, i)
    replace_module(program, a, stored, made, op)
    return ""


def replace_module(program: Program, a: Attachment, stored: nn.Module, made: Mapping[str, Expr], op: Resolved) -> Attachment:
    """Put ``stored`` with the given tensors in the place of an attachment's module; the calls in the graph stay. The tensors are frozen."""
    stored.train(program.module(a.module).training)
    for name in a.tensors:
        attach.drop_tensor(program, name)
    names = []
    for leaf, expr in made.items():
        name = attach.join(a.module, leaf)
        stored.register_parameter(leaf, nn.Parameter(torch.empty(expr.shape, dtype=attach.torch_dtype(expr.dtype), device="meta"), False))
        program.weights[name] = expr
        program.frozen.add(name)
        program.journal.fold(name, a.origin, op.origin)
        names.append(name)
    parent, _, leaf = a.module.rpartition(".")
    setattr(program.module(parent), leaf, stored)
    new = replace(a, tensors=tuple(names))
    program.attachments[next(i for i, b in enumerate(program.attachments) if b is a)] = new
    return new


def _pairs(core: Core) -> tuple[tuple[str, Any], ...]:
    return tuple(asdict(core).items())


def memory(cls: type[MemoryMethod], *tensors: Tensor, site: Any, **params: Any) -> tuple[Tensor, Tensor]:
    """The two tables from a method's tensors, computed in float32 (float64 for float64)."""
    core, method = Core(**dict(site)), cls(**params)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    t = {spec.name: v.to(wide) for spec, v in zip(method.tensors(core), tensors, strict=True)}
    keys, values = method.tables(core, t)
    return keys.contiguous(), values.contiguous()
