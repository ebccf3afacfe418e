"""Kind ``insert``: a module on the activations, behind (``after``), in front of (``before``) or parallel to (``beside``) a site.

A method of this kind states its tensors and how the branch is computed; this module owns the nodes, the names and the fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.site import NodeRef, Site
from surgery.model.cut_attached import Around, Follow
from surgery.model.modules import register_module
from surgery.model.program import Attachment, Program
from surgery.model.weights import Apply, Expr
from surgery.passes.kinds import attach, insert_memory, insert_prompt
from surgery.passes.kinds import insert_prefix_rows as insert_prefix_rows  # stored graphs name its modules
from surgery.passes.kinds import insert_prompt_rows as insert_prompt_rows  # and this one's
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.axes import feature_axis
from surgery.passes.kinds.calls import calls_of, operand
from surgery.passes.kinds.follow import follow_insert
from surgery.passes.kinds.insert_memory import MemoryMethod
from surgery.passes.kinds.insert_prompt import PromptMethod
from surgery.passes.operation import Resolved, SiteChange

Tensors = Mapping[str, Tensor]
MODULE_TAG = "surgery.insert"


@dataclass(frozen=True)
class Stream:
    """Where an inserted module stands: ``inp`` features enter its branch, ``out`` features have the value that it edits.

    ``inp_axis`` and ``out_axis`` say which axes carry them: the last, or between convolutions the second.
    """

    place: str
    inp: int
    out: int
    inp_axis: int = -1
    out_axis: int = -1


@dataclass(frozen=True)
class InsertMethod(Method):
    """Base of the methods that insert a module."""

    kind: ClassVar[str] = "insert"
    stands: ClassVar[str] = "stream"
    places: ClassVar[tuple[str, ...]] = ("after", "before", "beside")

    def tensors(self, site: Stream) -> tuple[TensorSpec, ...]:
        """The tensors of one inserted module, in order."""
        raise NotImplementedError

    def count(self, site: Stream) -> int:
        """How many parameters one inserted module has, by the published formula."""
        raise NotImplementedError

    def forward(self, site: Stream, t: Tensors, z: Tensor, out: Tensor, training: bool) -> Tensor:
        """The edited value ``out'`` from the branch's input ``z``, features last; ``z`` is ``out`` itself unless the place is ``beside``."""
        raise NotImplementedError

    def check(self, site: Stream) -> str:
        """Why the method cannot stand here, or an empty text."""
        return ""

    def note(self, site: Stream) -> str:
        """A remark for the plan, or an empty text."""
        return ""


class InsertModule(nn.Module):
    """What stands in the graph: ``(value) -> value'``, or beside a site ``(input, value) -> value'``."""

    edits: int
    """Which argument is the value that passes through when the module is taken out."""
    folded = "what made its weights is gone"
    """What a fold made of it, for the plan."""

    def __init__(self, method: InsertMethod, site: Stream) -> None:
        super().__init__()
        self._setup(method, site)
        for spec in method.tensors(site):
            empty = torch.empty(spec.shape, dtype=attach.torch_dtype(spec.dtype or "float32"))
            self.register_parameter(spec.name, nn.Parameter(empty, requires_grad=spec.trainable))

    def _setup(self, method: InsertMethod, site: Stream) -> None:
        self.method = method
        self.site = site
        self.edits = 1 if site.place == "beside" else 0
        self.active = True

    @classmethod
    def bare(cls, method: InsertMethod, site: Stream) -> InsertModule:
        """Without tensors: the attaching pass adds them with their expressions."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(method, site)
        return module

    def forward(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        edited = value if out is None else out
        if not self.active:
            return edited
        tensors: Any = self._parameters
        at, to = self.site.inp_axis, self.site.out_axis
        if at == to == -1:
            return self.method.forward(self.site, tensors, value, edited, self.training)
        return self.method.forward(self.site, tensors, value.movedim(at, -1), edited.movedim(to, -1), self.training).movedim(-1, to)

    def surgery_events(self) -> tuple[Method, nn.Module]:
        """Who acts during training on whose behalf (see ``surgery.train``)."""
        return self.method, self

    def follow(self, around: Around) -> Follow | str:
        """How the tensors follow when the values around the module lose features (see :mod:`surgery.model.cut_attached`)."""
        return follow_insert(self.method, self.site, around)

    def module_config(self) -> dict[str, Any]:
        site = {k: v for k, v in asdict(self.site).items() if not (k.endswith("_axis") and v == -1)}
        return {"method": f"{self.method.verb}/{self.method.name}", "params": self.method.params(), "site": site}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> InsertModule:
        from surgery.passes import registry

        verb, _, name = config["method"].partition("/")
        method = registry.get(verb, name)
        if not issubclass(method, InsertMethod):
            raise ValueError(f"{config['method']} is not a method of kind insert")
        return cls(method(**config["params"]), Stream(**config["site"]))

    def extra_repr(self) -> str:
        return f"{self.method.verb} {self.method.name}, {self.site.place}, {self.site.inp} -> {self.site.out}"


register_module(MODULE_TAG, InsertModule)


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Insert the statement's module at every site. Raises S0271 where it cannot stand and S0571 where the graph gives no place."""
    other = _machinery(op.method)
    if other is not None:
        return other.apply(program, op)  # type: ignore[no-any-return]
    attach.freeze_base(program)
    touched: dict[str, fx.GraphModule] = {}
    pool: dict[str, str] = {}
    changes = [_insert(program, op, site, method, pool, touched) for site, method in zip(op.sites, op.methods, strict=True)]
    for gm in touched.values():
        attach.recompile_later(gm)
    return changes


def _insert(
    program: Program, op: Resolved, site: Site, method: Method, pool: dict[str, str], touched: dict[str, fx.GraphModule]
) -> SiteChange:
    assert isinstance(method, InsertMethod)
    graph, value, entry = _ends(program, op, site, method)
    gm = program.module(graph)
    axes = feature_axis(gm, entry), feature_axis(gm, value)
    stream = Stream(op.place, _width(entry, axes[0], site, op), _width(value, axes[1], site, op), *axes)
    why = method.check(stream)
    if why:
        raise fail("S0271", f"{op.method.name} cannot stand {op.place} {site.role}: {why}", op.origin.span, "asked for here")
    parent = site.path if attach.relative(site.path, graph) is not None else graph
    path = attach.join(parent, attach.free_name(attach.parent_module(program, parent), op.name))
    module = InsertModule.bare(method, stream)
    program.graph.add_submodule(path, module)
    params = tuple((k, v) for k, v in method.params().items() if k != "seed")
    names, added, trainable = attach.add_tensors(
        program, module, path, method.tensors(stream), op,
        dtype=attach.adapter_dtype(program.info.dtype), source=None, params=params, pool=pool,
    )  # fmt: skip
    target = attach.relative(path, graph)
    assert target is not None
    if op.place == "before":
        node = _in_front(gm, value, target, _consumers(program, site, value))
    else:
        current = end_of_chain(gm, value)
        node = attach.call_after(program, graph, current, target, lambda: (entry, current) if op.place == "beside" else (current,))
    touched[graph] = gm
    ref = attach.node_ref(graph, node)
    program.journal.record(ref, op.origin)
    program.journal.record(path, op.origin)
    program.attachments.append(Attachment(op.name, method, site, path, ref, tuple(names), op.origin))
    own = [n for n in (*site.parameters, site.weight, site.bias) if n and program.aliases.get(n, n) not in program.frozen]
    trainable += sum(torch.Size(program.weights[program.aliases.get(n, n)].shape).numel() for n in dict.fromkeys(own))
    return SiteChange(site.role, site.path, site.rows, site.shape, site.shape, added, 0, trainable, method.note(stream))


def _ends(program: Program, op: Resolved, site: Site, method: InsertMethod) -> tuple[str, fx.Node, fx.Node]:
    """The graph, the value that is edited and the value that enters the branch."""
    span = op.origin.span
    if getattr(method, "position", "") == "after_norm":
        if site.norm_output is None or op.place != "after":
            raise fail(
                "S0271", f"{op.method.name} cannot stand behind the norm of {site.role}: no norm follows this part", span, "asked for here",
                help="leave `position` out: only post-norm blocks have a norm behind the residual addition",
            )  # fmt: skip
        ref, entry_ref = site.norm_output, site.norm_output
    elif site.is_region:
        ref, entry_ref = site.output, site.input  # type: ignore[assignment]
    else:
        calls = calls_of(program, site) if site.calls and site.op != "experts" else []
        if len(calls) != 1:
            raise fail(
                "S0571",
                f"{site.role} has no single output to insert something at",
                span,
                "selected here",
                help="select the block around it",
            )
        ref = NodeRef(calls[0][0], calls[0][1].name)
        entry_ref = NodeRef(calls[0][0], operand(calls[0][1]).name)
    if ref is None or entry_ref is None or (op.place == "beside" and ref.graph != entry_ref.graph):
        raise fail(
            "S0571", f"the graph shows no single input and output of {site.role}", span, "selected here", help="select the block around it"
        )
    if op.place == "before":
        return entry_ref.graph, program.node(entry_ref), program.node(entry_ref)
    value = program.node(ref)
    return ref.graph, value, program.node(entry_ref) if op.place == "beside" else value


def _width(node: fx.Node, axis: int, site: Site, op: Resolved) -> int:
    spec = node.meta.get("spec")
    shape = getattr(spec, "shape", ())
    if not shape or (not isinstance(shape[axis], int) and not getattr(shape[axis], "is_Integer", False)):
        raise fail("S0571", f"the width of the values at {site.role} is not fixed", op.origin.span, "selected here")
    return int(shape[axis])


def end_of_chain(gm: fx.GraphModule, base: fx.Node) -> fx.Node:
    """Behind everything that already edits this value."""
    current = base
    while True:
        for user in current.users:
            if user.op == "call_module" and user is not current:
                module = gm.get_submodule(str(user.target))
                edits = getattr(module, "edits", None)
                front = isinstance(module, InsertModule) and module.site.place == "before"
                if edits is not None and not front and user.args[edits] is current:
                    current = user
                    break
        else:
            return current


def _consumers(program: Program, site: Site, value: fx.Node) -> list[fx.Node]:
    """The uses of ``value`` that belong to the site: those its output depends on (a residual addition around it does not count)."""
    if not site.is_region:
        calls = {node for _, node in calls_of(program, site)}
        modules = {a.node for a in program.attachments if a.site.role == site.role}
        return [u for u in value.users if u in calls or any(ref.node == u.name for ref in modules)]
    assert site.output is not None
    end = program.node(site.output)
    seen: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in seen or node is value:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return [u for u in value.users if u in seen]


def _in_front(gm: fx.GraphModule, value: fx.Node, target: str, users: list[fx.Node]) -> fx.Node:
    with gm.graph.inserting_after(value):
        node = gm.graph.create_node("call_module", target, (value,), name=target.replace(".", "_"))
    node.meta.update(attach.spec_of(value))
    for user in users:
        user.replace_input_with(value, node)
    return node


def _machinery(method: Method) -> Any:
    """The module that attaches and folds methods which are no branch on the activations; None for those that are."""
    if isinstance(method, MemoryMethod):
        return insert_memory
    return insert_prompt if isinstance(method, PromptMethod) else None


def fold_attachments(program: Program, group: list[Attachment], op: Resolved) -> str:
    """Widen the feed-forward block around each attachment, pack it into the product in front of it, or store what a generator makes; the
    reason when one has to stay, else an empty text."""
    for a in group:
        other = _machinery(a.method)
        reason = _fold_branch(program, a, op) if other is None else other.fold(program, a, op)
        if reason:
            return reason  # type: ignore[no-any-return]
    return ""


def _fold_branch(program: Program, a: Attachment, op: Resolved) -> str:
    from surgery.passes.kinds.insert_packed import pack
    from surgery.passes.kinds.widen import widen

    made = _generate(program, a, op)
    at = made or a
    reason = pack(program, at, op) if getattr(program.module(at.module).site, "place", "") == "after" else widen(program, at, op)
    return reason if made is None else ""


def _generate(program: Program, a: Attachment, op: Resolved) -> Attachment | None:
    """The plain branch in the place of one whose weights are generated; None where nothing is."""
    from surgery.passes import registry

    params: Any = getattr(a.method, "plain_params", None)
    if params is None:
        return None
    module = program.module(a.module)
    site, method = module.site, registry.get("insert", "bottleneck")(**params())
    assert isinstance(method, InsertMethod)
    inputs: list[Expr] = [program.weights[program.aliases.get(n, n)] for n in a.tensors]
    given = (*((k, v) for k, v in a.method.params().items() if k != "seed"), ("site", tuple(asdict(site).items())))
    function = f"{a.method.verb}/{a.method.name}:plain"
    made: dict[str, Expr] = {
        spec.name: Apply(spec.shape, inputs[0].dtype, function, tuple(inputs), given, i) for i, spec in enumerate(method.tensors(site))
    }
    new = insert_memory.replace_module(program, a, InsertModule.bare(method, site), made, op)
    at = next(i for i, b in enumerate(program.attachments) if b is new)
    program.attachments[at] = replace(new, method=method)
    return program.attachments[at]


def plain(cls: type[Any], *tensors: Tensor, site: Any, **params: Any) -> tuple[Tensor, ...]:
    """The tensors of the plain branch of a generated one, in float32 (float64 for float64)."""
    stream, method = Stream(**dict(site)), cls(**params)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    t = {spec.name: v.to(wide) for spec, v in zip(method.tensors(stream), tensors, strict=True)}
    return tuple(v.contiguous() for v in method.plain(stream, t))


def through(cls: type[InsertMethod], down: Tensor, weight: Tensor, shift: Tensor | None = None, *, axis: int) -> Tensor:
    """``D W`` (plus a shift ``[width]`` for every column) for a weight whose outputs are on ``axis``, in float32 (float64 for float64)."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    down, weight = down.to(wide), weight.to(wide)
    made = down @ weight if axis == 0 else weight @ down.t()
    return made if shift is None else made + shift.to(wide).unsqueeze(1)


def memory(cls: type[MemoryMethod], *tensors: Tensor, **params: Any) -> tuple[Tensor, Tensor]:
    """The function ``insert/NAME:memory``, see :func:`surgery.passes.kinds.insert_memory.memory`."""
    return insert_memory.memory(cls, *tensors, **params)


def stored(cls: type[PromptMethod], *tensors: Tensor, **params: Any) -> tuple[Tensor, ...]:
    """The function ``insert/NAME:stored``, see :func:`surgery.passes.kinds.insert_prompt.stored`."""
    return insert_prompt.stored(cls, *tensors, **params)
