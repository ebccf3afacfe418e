"""Virtual tokens of a decoder beside an encoder, in a graph without a cache: rows of the decoder's sequence, with embeddings that train, or with keys and
values that are stored.

The decoder gets ``n`` further tokens in front; in every self attention their keys and values are the stored ones, and outputs lose them again. So
positions, distances and masks of the real tokens are those that they have behind a cache of ``n`` entries, whatever the model makes of positions.
What the ``n`` rows themselves compute reaches nothing: a causal attention is the only place where rows meet, and cross attention looks elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from surgery.core.site import Site
from surgery.model.modules import register_module
from surgery.model.program import Attachment, Program
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import calls_of
from surgery.passes.kinds.insert_memory import MemoryMethod, MemoryModule, at_attention
from surgery.passes.kinds.insert_prompt import PromptMethod
from surgery.passes.kinds.insert_prompt_graph import embedded_at, inputs_of, looked_up, refused
from surgery.passes.kinds.insert_prompt_rows import CUT, EMBED, FILL, PromptRows, filler
from surgery.passes.operation import Resolved, SiteChange

ROWS_TAG = "surgery.empty_rows"
MEMORY_TAG = "surgery.memory_rows"
IDS, SEEN = "decoder_input_ids", "decoder_attention_mask"


class EmptyRows(PromptRows):
    """Rows in front of a sequence that hold nothing of their own: ``FILL`` and ``CUT`` of :class:`PromptRows`, and no tensors."""

    stays = "the rows in front are places for keys and values that are stored at the attentions, and the graph keeps them"

    def __init__(self, method: PromptMethod, width: int, stored: tuple[tuple[int, int, int], ...] = ()) -> None:
        nn.Module.__init__(self)
        self._setup(method, width, stored)


class MemoryRows(MemoryModule):
    """``(k, KEYS, k) -> [P_k; k[n:]]`` and the same of values: what stands in the place of the first ``n`` rows."""

    in_place = True
    """Whether its entries stand in the place of rows that the sequence has, whose positions they have."""

    def forward(self, value: Tensor, role: int, keys: Tensor) -> Tensor:
        if not self.active:
            return value
        table = self.tables()[role].to(value.dtype)
        if self.site.repeat > 1:
            table = table.repeat_interleave(self.site.repeat, 0)
        return torch.cat([table.expand(value.shape[0], -1, -1, -1), value[..., table.shape[-2] :, :]], -2)


register_module(ROWS_TAG, EmptyRows)
register_module(MEMORY_TAG, MemoryRows)


def decoder_attentions(program: Program) -> list[Site]:
    """The self attentions of a decoder beside an encoder, in order."""
    crossed = {s.stack for s in program.anatomy.sites if s.is_region and s.facts.get("cross")}
    return [s for s in program.anatomy.sites if s.is_region and s.stack in crossed and s.facts.get("causal") and not s.facts.get("cross")]


def apply_rows(program: Program, op: Resolved, prompt: PromptMethod, width: int = 0) -> SiteChange:
    """Rows in front of a decoder's tokens, as many as ``prompt`` has; with a ``width`` the prompt's embeddings stand in them, whose values are for the
    caller to write. Raises S0491 where the model takes what they have no values for."""
    site = op.sites[0]
    holders = {
        n: name for n, (name, _) in zip([x for x in program.graph.graph.nodes if x.op == "placeholder"], inputs_of(program), strict=True)
    }
    ids = next((n for n, name in holders.items() if name == IDS and n.users), None)
    length: Any = ids.meta["spec"].shape[1] if ids is not None else None
    if ids is None or not isinstance(length, sympy.Symbol):
        raise refused(op, site, f"the model does not take `{IDS}` of any length", "")
    grown = [(ids, filler(program))]
    for node, name in holders.items():
        if node is ids or not node.users or not any(_has(n, length) for n in node.meta["spec"].shape):
            continue
        if name != SEEN or node.meta["spec"].shape[1] != length:
            raise refused(op, site, f"virtual tokens have no value for the input `{name}`", "")
        grown.append((node, 1))
    embedded = _embedded(program, op, site) if width else None
    attach.freeze_base(program)
    path = attach.free_name(program.graph, op.name)
    module = PromptRows.bare(prompt, width) if width else EmptyRows(prompt, 0)
    program.graph.add_submodule(path, module)
    params = tuple((k, v) for k, v in prompt.params().items() if k != "seed")
    names, added, trainable = attach.add_tensors(
        program, module, path, prompt.tensors(width) if width else (), op,
        dtype=attach.adapter_dtype(program.info.dtype), source=program.weights[program.aliases.get(site.weight, site.weight)], params=params, pool={},
    )  # fmt: skip
    first = _write(program, path, grown, length)
    if embedded is not None:
        first = _put(program, path, embedded)
    attach.recompile_later(program.graph)
    program.journal.record(first, op.origin)
    program.journal.record(path, op.origin)
    program.attachments.append(Attachment(op.name, prompt, site, path, first, tuple(names), op.origin))
    program.touch()
    note = f"{prompt.entries()} rows in front of the decoder's tokens: positions move by as many, outputs keep those of the real tokens"
    return SiteChange(site.role, site.path, site.rows, site.shape, site.shape, added, 0, trainable, note)


def _embedded(program: Program, op: Resolved, site: Site) -> fx.Node:
    """Where the embeddings of a decoder's tokens stand. Raises S0491."""
    for table in (s for s in program.anatomy.sites if s.op == "embedding"):
        for graph, call in calls_of(program, table):
            ids = None if graph else looked_up(call)
            if ids is not None and str(ids.target) == IDS:
                return embedded_at(program, table, call)[0]
    raise refused(op, site, f"nothing in the graph shows where `{IDS}` are looked up", "")


def _put(program: Program, path: str, embedded: fx.Node) -> Any:
    """The trained embeddings over the first rows."""
    graph = program.graph.graph
    users = list(embedded.users)
    with graph.inserting_after(embedded):
        made = graph.create_node("call_module", path, (embedded, EMBED), name=path)
    made.meta["spec"] = embedded.meta["spec"]
    for user in users:
        user.replace_input_with(embedded, made)
    return attach.node_ref("", made)


def _has(size: Any, symbol: sympy.Symbol) -> bool:
    return symbol in getattr(size, "free_symbols", ())


def _write(program: Program, path: str, grown: list[tuple[fx.Node, int]], length: sympy.Symbol) -> Any:
    graph = program.graph.graph
    end = graph.output_node()

    def call(value: fx.Node, what: int, more: int) -> fx.Node:
        made = graph.create_node("call_module", path, (value, what, more), name=path)
        made.meta["spec"] = value.meta["spec"]
        return made

    with graph.inserting_after([x for x in graph.nodes if x.op == "placeholder"][-1]):
        joined = [(old, call(old, FILL, number)) for old, number in reversed(grown)]
    for old, new in joined:
        for user in [u for u in old.users if u is not new]:
            user.replace_input_with(old, new)
    values = list(end.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(end):
        for i, value in enumerate(values):
            for axis, size in enumerate(value.meta["spec"].shape if isinstance(value, fx.Node) else ()):
                if size == length:
                    values[i] = call(values[i], CUT, axis)
    end.args = (tuple(values),)
    return attach.node_ref("", joined[-1][1])


def apply_memory(program: Program, op: Resolved, site: Site, method: MemoryMethod) -> tuple[SiteChange, Any]:
    """Stored keys and values in the place of those rows at one attention, which train; their values are for the caller to write. Also what the
    attention is. Raises S0490."""

    def place(graph: str, node: fx.Node, path: str) -> fx.Node:
        target = attach.relative(path, graph)
        assert target is not None
        calls = []
        for role, slot in enumerate((1, 2)):
            value = node.args[slot]
            assert isinstance(value, fx.Node)
            with node.graph.inserting_before(node):
                made = node.graph.create_node("call_module", target, (value, role, value), name=target.replace(".", "_"))
            made.meta["spec"] = value.meta["spec"]
            node.args = tuple(made if i == slot else a for i, a in enumerate(node.args))
            calls.append(made)
        return calls[0]

    return at_attention(program, replace(op, sites=(site,)), site, method, MemoryRows, {}, place)
