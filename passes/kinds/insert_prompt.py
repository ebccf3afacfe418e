"""Virtual tokens in front of the sequence of a causal language model: how the graph computes with them, and how they become stored keys and values.

In a causal model nothing that stands in front can see what follows, so the keys and values of ``n`` virtual tokens depend on no input. The
graph says so: a *prompt pass* runs the model's own layers on the trained embeddings alone (batch 1, positions ``0 .. n - 1``), and its keys
and values stand in front of every layer's past. From there on the model behaves as with a cache that is ``n`` steps longer: the attention
mask gets ``n`` ones, positions move by ``n``, windows of sliding layers and everything else that counts steps follow. Caches that the model
takes and returns hold the real tokens only, and outputs have the real tokens' positions only.

Folding (class ``kvcache``) computes the pass once, stores its keys and values, and takes it out of the graph. Both forms are one set of
edits at the root of the graph; only where the keys and values come from differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.model import graphjson
from surgery.model.cut_attached import Follow
from surgery.model.live import Tensors, live_root
from surgery.model.modules import register_module
from surgery.model.program import Attachment, ModelInfo, Program, Signature
from surgery.model.weights import Apply, Expr, Held, Scale, Weights, cast
from surgery.passes.kinds import attach, insert_follow
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert_memory import replace_module
from surgery.passes.kinds.insert_prompt_graph import (
    EMBED,
    EMPTY,
    IDS,
    JOIN,
    MASK,
    ONES,
    REST,
    SHIFT,
    STEPS,
    ancestors,
    embedded_at,
    ends_of,
    lookups,
    refused,
    write,
)
from surgery.passes.operation import Resolved, SiteChange

MODULE_TAG = "surgery.prompt"
ROWS = "every token sees its tokens and is seen by them, so nothing can be computed before a call: its embeddings are constants as they are"


@dataclass(frozen=True)
class PromptMethod(Method):
    """Base of the methods that put trained tokens in front of the sequence."""

    kind: ClassVar[str] = "insert"
    fold_class: ClassVar[str] = "kvcache"
    identity: ClassVar[str] = "changed"
    places: ClassVar[tuple[str, ...]] = ("on",)
    stands: ClassVar[str] = "tokens"
    exchange: ClassVar[bool] = False
    """Whether adapter files hold what this method trains, as its only tensor."""

    def entries(self) -> int:
        """How many virtual tokens there are."""
        raise NotImplementedError

    def tensors(self, width: int) -> tuple[TensorSpec, ...]:
        """What is trained, for a model of this width."""
        raise NotImplementedError

    def count(self, width: int) -> int:
        """How many parameters that is, by the published formula."""
        raise NotImplementedError

    def embeddings(self, t: dict[str, Tensor]) -> Tensor:
        """The embeddings of the virtual tokens, ``[entries, width]``."""
        raise NotImplementedError


class PromptModule(nn.Module):
    """Everything that virtual tokens change at the root of a graph; the second argument says what a call makes.

    For the prompt pass, of which only type and place of the first argument matter: ``IDS`` token ids (zeros; their embeddings are not used),
    ``ONES`` a mask, ``STEPS`` positions, ``EMPTY`` an empty past, ``EMBED`` the trained embeddings ``[1, n, width]``. For the model:
    ``(past, JOIN, new)`` puts the prompt's keys or values ``[1, heads, n, width]`` in front (a number in place of ``new``: the stored table of
    that number), ``MASK`` a mask with ``n`` ones in front, ``SHIFT`` positions ``n`` later, ``REST`` a grown cache without its first ``n`` steps.
    """

    in_rows = False
    """Whether its tokens are rows of the sequence, of which nothing can be stored."""
    edits = 0
    """Which argument is the value that passes through when the module is taken out."""
    folded = "its keys and values are stored, and the pass that made them is gone"
    """What a fold made of it, for the plan."""

    def __init__(self, method: PromptMethod, width: int, stored: tuple[tuple[int, int, int], ...] = ()) -> None:
        super().__init__()
        self._setup(method, width, stored)
        for spec in method.tensors(width) if not stored else table_specs(stored):
            self.register_parameter(spec.name, nn.Parameter(torch.empty(spec.shape), requires_grad=spec.trainable))

    def _setup(self, method: PromptMethod, width: int, stored: tuple[tuple[int, int, int], ...]) -> None:
        self.method, self.site, self.stored = method, width, stored
        self.active = True

    @classmethod
    def bare(cls, method: PromptMethod, width: int, stored: tuple[tuple[int, int, int], ...] = ()) -> PromptModule:
        """Without tensors: the pass adds them with their expressions."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(method, width, stored)
        return module

    def forward(self, value: Tensor, what: int, more: Tensor | int | None = None) -> Tensor:
        n = self.method.entries()
        if what == IDS:
            return value.new_zeros(1, n)
        if what == ONES:
            return value.new_ones(1, n)
        if what == STEPS:
            return torch.arange(n, dtype=value.dtype, device=value.device).unsqueeze(0)
        if what == EMPTY:
            return value.new_zeros(1, value.shape[1], 0, value.shape[3])
        if what == EMBED:
            # a copy: what counts operations does not take views of what trains
            return torch.stack([self.method.embeddings(dict(self._parameters)).to(value.dtype)])  # type: ignore[arg-type]
        if not self.active:
            return value
        if what == JOIN:
            table = self._parameters[f"table_{more}"].unsqueeze(0) if isinstance(more, int) else more  # type: ignore[union-attr]
            assert isinstance(table, Tensor)
            return torch.cat([table.to(value.dtype).expand(value.shape[0], -1, -1, -1), value], 2)
        if what == MASK:
            return torch.cat([value.new_ones(value.shape[0], n), value], 1)
        return value + n if what == SHIFT else value[:, :, n:]

    def surgery_events(self) -> tuple[Method, nn.Module]:
        """Who acts during training on whose behalf (see ``surgery.train``)."""
        return self.method, self

    def follow_calls(self, calls: insert_follow.Calls) -> Follow | str:
        """Stored tables lose the heads of their layers, embeddings the features of the stream; a prompt pass runs through the cut layers."""
        return insert_follow.follow_past(self, calls, (EMPTY, JOIN, REST), JOIN, EMBED)

    def module_config(self) -> dict[str, Any]:
        config = {"method": f"{self.method.verb}/{self.method.name}", "params": self.method.params(), "width": self.site}
        return config | ({"stored": [list(s) for s in self.stored]} if self.stored else {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PromptModule:
        from surgery.passes import registry

        verb, _, name = config["method"].partition("/")
        method = registry.get(verb, name)
        if not issubclass(method, PromptMethod):
            raise ValueError(f"{config['method']} gives no virtual tokens")
        shapes = tuple((int(a), int(b), int(c)) for a, b, c in config.get("stored", ()))
        return cls(method(**config["params"]), int(config["width"]), shapes)

    def extra_repr(self) -> str:
        return f"{self.method.verb} {self.method.name}, {self.method.entries()} tokens" + (", stored" if self.stored else "")


register_module(MODULE_TAG, PromptModule)


def table_specs(stored: Sequence[tuple[int, int, int]], trainable: bool = False) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"table_{i}", shape, trainable=trainable) for i, shape in enumerate(stored))


# ------------------------------------------------------------------ attach


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Put the statement's tokens in front. Raises S0491 (see :func:`ends_of` and :mod:`~surgery.passes.kinds.insert_prompt_rows`) and S0492 for a
    second prompt."""
    return [_attach(program, op, ())]


def apply_stored(program: Program, op: Resolved, shapes: tuple[tuple[int, int, int], ...]) -> SiteChange:
    """The same with keys and values ``[heads, n, width]`` that train themselves, in the place of what a pass makes: for each part of the past one.
    Their values are for the caller to write. Raises what :func:`apply` does."""
    return _attach(program, op, shapes)


def past_shapes(program: Program, op: Resolved) -> tuple[tuple[int, int], ...]:
    """Heads and width of each part of a model's past, in the order of its inputs. Raises S0491 (see :func:`ends_of`)."""
    return tuple((int(p.meta["spec"].shape[1]), int(p.meta["spec"].shape[3])) for p in ends_of(program, op, op.sites[0]).pasts)


def _attach(program: Program, op: Resolved, shapes: tuple[tuple[int, int, int], ...]) -> SiteChange:
    from surgery.passes.kinds import insert_prompt_rows

    if len(op.sites) != 1:
        raise refused(op, op.sites[-1], "virtual tokens stand in front of one sequence", "select one embedding: `on embed.tokens`")
    before = next((a for a in program.attachments if isinstance(a.method, PromptMethod)), None)
    if before is not None:
        raise fail(
            "S0492", f"there are virtual tokens in front already: {before.name}", op.origin.span, "again here",
            also=[(before.origin.span, "put there here")] if before.origin.span.source.text else (),
            help="one statement with more tokens does the same",
        )  # fmt: skip
    site, method = op.sites[0], op.method
    assert isinstance(method, PromptMethod)
    rows = insert_prompt_rows.stands_as_rows(program)
    ends = insert_prompt_rows.row_ends(program, op, site) if rows else ends_of(program, op, site)
    attach.freeze_base(program)
    width = int(ends.embedded.meta["spec"].shape[-1])
    path = attach.free_name(program.graph, op.name)
    module = (insert_prompt_rows.PromptRows if rows else PromptModule).bare(method, width, shapes)
    program.graph.add_submodule(path, module)
    params = tuple((k, v) for k, v in method.params().items() if k != "seed")
    table = program.weights[program.aliases.get(site.weight, site.weight)]
    lookup = lookups(program, site)[0][1]
    factor = embedded_at(program, site, lookup)[1]
    names, added, trainable = attach.add_tensors(
        program, module, path, table_specs(shapes, trainable=True) if shapes else method.tensors(width), op,
        dtype=attach.adapter_dtype(program.info.dtype), source=_sized(program, table, factor), params=params, pool={},
    )  # fmt: skip
    if isinstance(ends, insert_prompt_rows.RowEnds):
        first = insert_prompt_rows.write_rows(program, path, ends)
    else:
        first = write(program, path, ends, bool(shapes))
    attach.recompile_later(program.graph)
    program.journal.record(first, op.origin)
    program.journal.record(path, op.origin)
    program.attachments.append(Attachment(op.name, method, site, path, first, tuple(names), op.origin))
    own = program.aliases.get(site.weight, site.weight)
    trainable += 0 if own in program.frozen else torch.Size(table.shape).numel()
    program.touch()
    kept = "outputs keep" if rows else "outputs and caches keep"
    what = f"keys and values of {method.entries()} tokens" if shapes else f"{method.entries()} tokens"
    note = f"{what} in front: positions move by as many, {kept} those of the real tokens"
    return SiteChange(site.role, site.path, site.rows, site.shape, site.shape, added, 0, trainable, note)


def _sized(program: Program, table: Expr, factor: float | str) -> Expr:
    """The rows of the table in the size that embeddings have where virtual tokens stand."""
    if isinstance(factor, float):
        return table if factor == 1.0 else Scale(table.shape, "float32", cast(table, "float32"), factor)
    return Apply(table.shape, "float32", "kinds/insert_prompt:multiplied", (table, program.weights[program.aliases.get(factor, factor)]))


def multiplied(table: Tensor, factor: Tensor) -> Tensor:
    return table.float() * factor.float()


# ------------------------------------------------------------------ fold


def fold(program: Program, a: Attachment, op: Resolved) -> str:
    """Replace the prompt pass by its keys and values; a reason when that is done already, else an empty text."""
    module = program.module(a.module)
    assert isinstance(module, PromptModule)
    if module.in_rows:
        return str(getattr(module, "stays", ROWS))
    if module.stored:
        return "its keys and values are stored already"
    graph = program.graph.graph
    joins = [n for n in graph.find_nodes(op="call_module", target=a.module) if n.args[1] == JOIN]
    results = [n.args[2] for n in joins]
    made, shapes = _stored(program, a, results)
    for i, node in enumerate(joins):
        node.args = (node.args[0], JOIN, i)
    for node in reversed(ancestors(results, stop=set())):  # type: ignore[arg-type]
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
    stored = PromptModule.bare(module.method, module.site, shapes)
    first = attach.node_ref("", joins[0])
    new = replace_module(program, a, stored, made, op)
    at = next(i for i, b in enumerate(program.attachments) if b is new)
    program.attachments[at] = replace(new, node=first)
    program.journal.record(first, a.origin)
    attach.recompile_later(program.graph)
    program.touch()
    return ""


class _Pass(str):
    """The data of a prompt pass as text; in a description of weights it is named and not written out."""

    def __format__(self, how: str) -> str:
        return "a prompt pass"


def _stored(program: Program, a: Attachment, results: Sequence[Any]) -> tuple[dict[str, Expr], tuple[tuple[int, int, int], ...]]:
    """Expressions of the keys and values of a prompt pass: one function of every tensor that the pass reads."""
    part = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    inputs: list[list[Any]] = []
    own_calls = set(program.graph.graph.find_nodes(op="call_module", target=a.module))
    for node in ancestors(results, stop=own_calls):
        for source in node.all_input_nodes:
            if source in own_calls and source not in table:
                holder = part.placeholder(f"given_{len(inputs)}")
                holder.meta["spec"] = source.meta["spec"]
                table[source] = holder
                inputs.append([int(source.args[1]), _size(source), source.meta["spec"].dtype])  # type: ignore[call-overload,arg-type]
        copy = part.node_copy(node, lambda x: table[x])
        copy.meta["spec"] = node.meta.get("spec")
        table[node] = copy
    part.output(tuple(table[r] for r in results))
    body = fx.GraphModule(program.graph, part)
    own = {**dict(body.named_parameters(remove_duplicate=False)), **dict(body.named_buffers(remove_duplicate=False))}
    names = [n for n in own if program.aliases.get(n, n) in program.weights]
    firsts = list(dict.fromkeys(program.aliases.get(n, n) for n in names))
    ties = tuple((n, program.aliases[n]) for n in names if n in program.aliases)
    module = program.module(a.module)
    tensors = [spec.name for spec in module.method.tensors(module.site)]
    args = tuple(program.weights[n] for n in firsts) + tuple(program.weights[program.aliases.get(n, n)] for n in a.tensors)
    params = (
        ("graph", _Pass(json.dumps(graphjson.dump(body), separators=(",", ":")))), ("names", tuple(firsts)), ("ties", ties),
        ("given", tuple((w, tuple(s), d) for w, s, d in inputs)), ("width", module.site), ("tensors", tuple(tensors)),
        ("dtype", program.info.dtype), ("prompt", tuple((k, v) for k, v in module.method.params().items())),
    )  # fmt: skip
    shapes = tuple(tuple(int(n) for n in r.meta["spec"].shape[1:]) for r in results)
    dtype = program.weights[a.tensors[0]].dtype
    function = f"{a.method.verb}/{a.method.name}:stored"
    made: dict[str, Expr] = {f"table_{i}": Apply(shape, dtype, function, args, params, i) for i, shape in enumerate(shapes)}
    return made, shapes  # type: ignore[return-value]


def _size(call: fx.Node) -> list[Any]:
    """The shape of what a call gives to the pass; heads and features are those that the model has now."""
    shape, given = list(call.meta["spec"].shape), call.args[0].meta["spec"].shape  # type: ignore[union-attr]
    if call.args[1] == EMPTY:
        shape[1], shape[3] = given[1], given[3]
    elif call.args[1] == EMBED:
        shape[-1] = given[-1]
    return shape


def stored(
    cls: type[PromptMethod],
    *values: Tensor,
    graph: str,
    names: Any,
    ties: Any,
    given: Any,
    width: int,
    tensors: Any,
    dtype: str,
    prompt: Any,
) -> tuple[Tensor, ...]:
    """Keys and values ``[heads, n, width]`` of a prompt pass, computed in float32 (float64 for a float64 model)."""
    wide = torch.float64 if dtype == "float64" else torch.float32
    root = graphjson.load(json.loads(graph))
    weights = {n: Held(tuple(v.shape), str(v.dtype).removeprefix("torch."), n, v) for n, v in zip(names, values, strict=False)}
    module = PromptModule(cls(**dict(prompt)), width)
    for name, value in zip(tensors, values[len(names) :], strict=True):
        module._parameters[name] = nn.Parameter(value.to(wide), requires_grad=False)
    made = Program(root, Signature((), {"type": "tuple", "items": []}, {}), Weights(weights), ModelInfo("", dtype=dtype), dict(ties))
    running = live_root(made, Tensors(_none), dtype=wide).eval()
    inputs = []
    for what, shape, kind in given:
        of = wide if kind.startswith(("bfloat", "float")) else getattr(torch, kind)
        stand_in = torch.zeros([max(1, int(s)) for s in shape], dtype=of)
        inputs.append(module(stand_in, what))
    with torch.no_grad():
        found = running(*inputs)
    return tuple(t.squeeze(0).contiguous() for t in found)


def _none(name: str) -> Any:
    raise KeyError(name)


__all__ = ["PromptMethod", "PromptModule", "apply", "fold", "stored"]
