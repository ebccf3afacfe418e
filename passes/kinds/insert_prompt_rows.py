"""Virtual tokens in front of a sequence that every token sees: encoders, and causal models that take no cache.

What stands in front sees what follows, so nothing of the virtual tokens can be computed once: they are rows of the sequence like any other. The
model gets ids, mask and token types that are ``n`` longer, and the first ``n`` embeddings are replaced by the trained ones; every size
that it computes from its inputs follows. Outputs that have one row (or column) a token keep those of the real tokens, so that masks and
labels of a caller fit; what the model pools, it pools from the longer sequence: from the first position, that is the first virtual
token, as peft does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from surgery.core.site import NodeRef, Site
from surgery.model.cut_attached import Follow
from surgery.model.modules import register_module
from surgery.model.program import Program, ValueSpec
from surgery.passes.kinds import insert_follow
from surgery.passes.kinds.insert_prompt import PromptMethod, PromptModule
from surgery.passes.kinds.insert_prompt_graph import embedded_at, inputs_of, looked_up, lookups, refused
from surgery.passes.operation import Resolved

MODULE_TAG = "surgery.prompt_rows"
FILL, STEPS, EMBED, CUT = range(4)
"""What a call of the module makes, see :class:`PromptRows`."""

GROWN = {"attention_mask": 1, "token_type_ids": 0}
"""Inputs of one number a token, with the number that virtual tokens have there."""


class PromptRows(PromptModule):
    """Everything that virtual tokens change where they are rows of the sequence; the second argument says what a call makes.

    ``(x, FILL, number)`` puts ``n`` columns with ``number`` in front of ``x [batch, length]``, ``(p, STEPS)`` gives positions ``0 .. n - 1`` to the
    virtual tokens and moves the others, ``(e, EMBED)`` puts the trained embeddings over the first ``n`` rows of ``e [batch, length, width]``,
    ``(y, CUT, axis)`` takes the first ``n`` entries off an axis of an output.
    """

    in_rows = True

    def forward(self, value: Tensor, what: int, more: Tensor | int | None = None) -> Tensor:
        if not self.active:
            return value
        n = self.method.entries()
        if what == FILL:
            return torch.cat([value.new_full((value.shape[0], n), more), value], 1)  # type: ignore[arg-type]
        if what == STEPS:
            steps = torch.arange(n, dtype=value.dtype, device=value.device)
            return torch.cat([steps.expand(value.shape[0], -1), value + n], 1)
        if what == EMBED:
            rows = self.method.embeddings(dict(self._parameters)).to(value.dtype)  # type: ignore[arg-type]
            return torch.cat([rows.expand(value.shape[0], -1, -1), value[:, n:]], 1)
        return value.narrow(int(more), n, value.shape[int(more)] - n)  # type: ignore[arg-type]

    @property
    def more_rows(self) -> int:
        """Tokens that the model computes beside those of its caller."""
        return self.method.entries()

    def follow_calls(self, calls: insert_follow.Calls) -> Follow | str:
        """The embeddings lose the features that those of the real tokens lose; inputs and outputs of the model pass through whatever they are."""
        return insert_follow.follow_past(self, [c for c in calls if c[0][1] == EMBED], (), -1, EMBED)


register_module(MODULE_TAG, PromptRows)


@dataclass(frozen=True)
class RowEnds:
    """``grown`` are the inputs that get longer with the number that virtual tokens have there, ``length`` the symbol of the sequence."""

    ids: fx.Node
    embedded: fx.Node
    grown: tuple[tuple[fx.Node, int], ...]
    positions: fx.Node | None
    length: sympy.Symbol


def stands_as_rows(program: Program) -> bool:
    """Whether virtual tokens are rows of the sequence: the model was captured without a cache."""
    return not any(cached for _, cached in inputs_of(program))


def row_ends(program: Program, op: Resolved, site: Site) -> RowEnds:
    """Raises S0491 where the embedding is not that of the one sequence, or the model takes what virtual tokens have no values for."""
    calls = lookups(program, site)
    help = "select the embedding of the tokens: `on embed.tokens`"
    if len(calls) > 1:
        raise refused(
            op,
            site,
            "it embeds more than one sequence",
            "`insert prefix(..) on layers[*].attn` puts keys and values in front of any attention",
        )
    ids = looked_up(calls[0][1]) if calls and not calls[0][0] else None
    shape: tuple[Any, ...] = ids.meta["spec"].shape if ids is not None else ()
    if ids is None or len(shape) != 2 or not isinstance(shape[1], sympy.Symbol):
        raise refused(op, site, "it does not look up the model's token ids", help)
    length = shape[1]
    holders = [n for n in program.graph.graph.nodes if n.op == "placeholder"]
    grown: list[tuple[fx.Node, int]] = [(ids, filler(program))]
    positions = None
    for node, (name, _) in zip(holders, inputs_of(program), strict=True):
        spec = node.meta["spec"].shape
        if node is ids or not node.users or not any(_has(n, length) for n in spec):
            continue
        if name in GROWN and len(spec) == 2 and spec[1] == length:
            grown.append((node, GROWN[name]))
        elif name == "position_ids" and len(spec) == 2 and spec[1] == length:
            positions = node
        else:
            raise refused(op, site, f"virtual tokens have no value for the input `{name}`", "")
    _rooms(program, op, site)
    for result in program.graph.graph.output_node().args[0]:  # type: ignore[union-attr]
        if isinstance(result, fx.Node) and any(_has(n, length) and n != length for n in result.meta["spec"].shape):
            raise refused(op, site, f"an output of the model has {result.meta['spec'].shape} entries, and not one a token", "")
    return RowEnds(ids, embedded_at(program, site, calls[0][1])[0], tuple(grown), positions, length)


def _rooms(program: Program, op: Resolved, site: Site) -> None:
    most = program.info.config.get("max_position_embeddings")
    method = op.method
    assert isinstance(method, PromptMethod)
    if isinstance(most, int) and 0 < most <= method.entries():
        raise refused(op, site, f"the model has {most} positions, and {method.entries()} virtual tokens leave none", "ask for fewer tokens")


def filler(program: Program) -> int:
    """An id that is looked up and not used, and that nothing takes for padding or an end."""
    config = program.info.config
    taken: set[Any] = set()
    for key in ("pad_token_id", "eos_token_id", "sep_token_id", "mask_token_id"):
        value = config.get(key)
        taken |= set(value) if isinstance(value, list) else {value}
    return next(i for i in range(len(taken) + 1) if i not in taken)


def _has(size: Any, symbol: sympy.Symbol) -> bool:
    return symbol in getattr(size, "free_symbols", ())


def write_rows(program: Program, path: str, ends: RowEnds) -> NodeRef:
    """Longer inputs, the embeddings in front, shorter outputs; where the embeddings stand.

    Sizes that the graph's values are annotated with stay those of the caller's sequence: between the edits it is ``n`` longer.
    """
    graph = program.graph.graph
    n = program.module(path).method.entries()
    end = graph.output_node()

    def call(value: fx.Node, what: int, *more: Any) -> fx.Node:
        made = graph.create_node("call_module", path, (value, what, *more), name=path)
        old = value.meta["spec"]
        made.meta["spec"] = ValueSpec(old.kind, old.dtype, (*old.shape[:1], old.shape[1] + n))
        return made

    last = [x for x in graph.nodes if x.op == "placeholder"][-1]
    with graph.inserting_after(last):
        joined = [(old, call(old, FILL, number)) for old, number in reversed(ends.grown)]
        if ends.positions is not None:
            joined.append((ends.positions, call(ends.positions, STEPS)))
    for old, new in joined:
        for user in [u for u in old.users if u is not new]:
            user.replace_input_with(old, new)
    users = list(ends.embedded.users)
    with graph.inserting_after(ends.embedded):
        embedded = graph.create_node("call_module", path, (ends.embedded, EMBED), name=path)
    embedded.meta["spec"] = ends.embedded.meta["spec"]
    for user in users:
        user.replace_input_with(ends.embedded, embedded)
    values = list(end.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(end):
        for i, value in enumerate(values):
            for axis, size in enumerate(value.meta["spec"].shape if isinstance(value, fx.Node) else ()):
                if not _has(size, ends.length):
                    continue
                made = graph.create_node("call_module", path, (values[i], CUT, axis), name=path)
                made.meta["spec"] = value.meta["spec"]
                values[i] = made
    end.args = (tuple(values),)
    return NodeRef("", embedded.name)


__all__ = ["MODULE_TAG", "PromptRows", "row_ends", "stands_as_rows", "write_rows"]
