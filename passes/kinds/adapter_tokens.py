"""Virtual tokens from adapter files, in front of the model's own: embeddings as ``insert prompt`` has them, keys and values as it stores them.

In peft a prefix is a cache that the model starts from: it moves the positions of what follows. A causal model with a cache here has the same, the
form that a folded prompt has. An encoder gets the keys and values at its attentions, and its table of positions is read ``n`` rows later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.site import Site
from surgery.model.adapter_tokens import VirtualTokens
from surgery.model.dims.masks import to_ranges
from surgery.model.program import Attachment, Program
from surgery.model.weights import Concat, Expr, cast, select
from surgery.passes.kinds import insert_memory, insert_prefix_rows, insert_prompt
from surgery.passes.kinds.adapter_frames import frames_of
from surgery.passes.kinds.adapter_join import Loaded, is_sum, listed
from surgery.passes.kinds.adapter_tables import Layer, layers_of, left, table
from surgery.passes.kinds.insert_memory import MemoryMethod
from surgery.passes.kinds.insert_prompt import PromptMethod
from surgery.passes.kinds.insert_prompt_graph import looked_up, lookups
from surgery.passes.kinds.insert_prompt_rows import stands_as_rows
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.operation import Resolved, SiteChange
from surgery.passes.resolve import within

Whole = dict[str, list[tuple[float, str, Expr]]]
"""Tensors of the base that adapters replace: for each factor, adapter and value."""


def put(program: Program, op: Resolved, loaded: Sequence[Loaded], whole: Whole) -> list[SiteChange]:
    """Puts the virtual tokens of the one adapter that has some in front; nothing where none has. Of a table of positions that moves, and was trained,
    ``whole`` has no parts any more.

    Raises S0786 (several of them, a factor, a merge that is no sum), S0785 (a model of other sizes), S0789 (a cut that they cannot be carried
    over), and what ``insert prompt`` and ``insert prefix`` raise.
    """
    mine = [item for item in loaded if item.adapter.tokens is not None]
    if not mine:
        return []
    item = mine[0]
    tokens = item.adapter.tokens
    assert tokens is not None and isinstance(op.method, MergeMethod)
    site = _embedding(program, item)
    if op.sites and not any(s.role == site.role or within(site.role, s.role) for s in op.sites):
        op.tell(f"left out by the selector: the virtual tokens of {item.adapter.name}, which stand on {site.role}")
        return []
    why = (
        f"{listed([i.adapter.name for i in mine])} have virtual tokens" if len(mine) > 1
        else f"virtual tokens have no factor, and {item.adapter.name} has {item.weight:g}" if item.weight != 1.0
        else "" if is_sum(op.method) else f"{item.adapter.name} has virtual tokens, and it merges low-rank changes"
    )  # fmt: skip
    if why:
        raise fail(
            "S0786", f"merge {op.origin.method} cannot merge {listed([i.adapter.name for i in mine])}: {why}", item.span, "merged here",
            help="`merge linear of NAME * 1` puts one in front, beside low-rank adapters of any factors",
        )  # fmt: skip
    crossed = any(s.facts.get("cross") for s in program.anatomy.sites if s.is_region)
    if tokens.pair != crossed:
        here, there = ("an encoder with a decoder", "one sequence") if tokens.pair else ("one sequence", "an encoder with a decoder")
        raise _unlike(item, f"its virtual tokens are for {here}, and the model is for {there}")
    if not tokens.layers:
        return [_embeddings(program, op, item, tokens, site), *_decoder_embeddings(program, op, item, tokens, site)]
    if tokens.pair:
        return _decoder_rows(program, op, item, tokens, site)
    return _rows_behind(program, op, item, tokens, whole) if stands_as_rows(program) else [_tables(program, op, item, tokens, site)]


def _method(kind: type[Any], **params: Any) -> Any:
    """The method of that kind that trains its tensors themselves: the one whose files people exchange."""
    from surgery.passes import registry

    return next(cls for cls in registry.methods().values() if issubclass(cls, kind) and getattr(cls, "exchange", False))(**params)


def _embedding(program: Program, item: Loaded) -> Site:
    """The lookup of the model's token ids."""
    for site in program.anatomy.sites:
        calls = lookups(program, site) if site.calls else []
        if calls and not calls[0][0] and (ids := looked_up(calls[0][1])) is not None and str(ids.target) == "input_ids":
            return site
    raise fail(
        "S0784", f"{item.adapter.name} has virtual tokens, and the model looks up no tokens", item.span, "merged here",
        help="open the model that it was trained on",
    )  # fmt: skip


def _unlike(item: Loaded, text: str) -> SurgeryError:
    notes = (f"the adapter says that it was trained on {item.adapter.base!r}",) if item.adapter.base else ()
    return fail(
        "S0785",
        f"{item.adapter.name} does not fit: {text}",
        item.span,
        "merged here",
        notes=notes,
        help="open the model that it was trained on",
    )


def _given(program: Program, op: Resolved, made: dict[str, Expr]) -> Attachment:
    """Writes values into the module that was attached last."""
    attached = program.attachments[-1]
    for name in attached.tensors:
        program.weights[name] = cast(made[name.rpartition(".")[2]], program.weights[name].dtype)
        program.journal.record(name, op.origin)
    return attached


# ------------------------------------------------------------------ embeddings


def _embeddings(program: Program, op: Resolved, item: Loaded, tokens: VirtualTokens, site: Site) -> SiteChange:
    width = program.weights[program.aliases.get(site.weight, site.weight)].shape[site.out_axis]
    value = _carried(program, op, item, tokens.stored, site, width)
    method = _method(PromptMethod, length=tokens.count)
    inner = replace(op, verb=method.verb, methods=(method,), sites=(site,), place="on")
    (change,) = insert_prompt.apply(program, inner)
    _given(program, op, {"embeddings": value})
    return change


def _decoder_embeddings(program: Program, op: Resolved, item: Loaded, tokens: VirtualTokens, site: Site) -> list[SiteChange]:
    """In front of a decoder's tokens, where the file has some for it."""
    if tokens.decoder is None:
        return []
    width = program.weights[program.aliases.get(site.weight, site.weight)].shape[site.out_axis]
    value = _carried(program, op, item, tokens.decoder, site, width)
    method = _method(PromptMethod, length=tokens.count)
    inner = replace(op, verb=method.verb, methods=(method,), sites=(site,), place="on")
    change = insert_prefix_rows.apply_rows(program, inner, method, width)
    _given(program, op, {"embeddings": value})
    op.tell(
        f"{item.adapter.name} has {tokens.count} tokens in front of the decoder, too; peft's `forward` puts them there, and its `generate` leaves them out"
    )
    return [change]


def _carried(program: Program, op: Resolved, item: Loaded, stored: Expr, site: Site, width: int) -> Expr:
    """The embeddings with the features that the model still has."""
    had = stored.shape[1]
    if had == width:
        return stored
    for frame in frames_of(program, item.adapter):
        for now, was in frame.there.values():
            if program.aliases.get(now, now) != program.aliases.get(site.weight, site.weight) or was.shape[site.out_axis] != had:
                continue
            kept = was.kept[site.out_axis] if was.kept and not was.why else None
            if kept is None:
                raise fail(
                    "S0789", f"{item.adapter.name} cannot be carried over to `{site.path}`: {was.why or 'what is left of its features is not known'}",
                    item.span, "merged here", help="merge the adapter above the statement that changed the model",
                )  # fmt: skip
            op.tell(f"{item.adapter.name} was trained before the cut and is carried over")
            return select(stored, 1, to_ranges(kept))
    raise _unlike(item, f"its tokens have {had} features, and those of the model {width}")


# ------------------------------------------------------------------ keys and values


def _tables(program: Program, op: Resolved, item: Loaded, tokens: VirtualTokens, site: Site) -> SiteChange:
    """In front of every layer's past: what a prompt is when it is folded."""
    method = _method(PromptMethod, length=tokens.count)
    inner = replace(op, verb=method.verb, methods=(method,), sites=(site,), place="on")
    shapes = insert_prompt.past_shapes(program, inner)
    count = len(shapes) // 2
    blocks = [s for s in program.anatomy.sites if s.is_region and "causal" in s.facts]
    layers = layers_of(program, op, item, tokens, blocks) if len(blocks) == count else _plain(tokens, count)
    if layers is None:
        raise _unlike(item, f"it has keys and values of {tokens.layers} layers, and the model has {count}")
    mine = tuple((left(tokens, layer), tokens.count, tokens.head) for layer in layers) * 2
    for i, (here, there) in enumerate(zip(shapes, mine, strict=True)):
        if (here[0], here[1]) != (there[0], there[2]):
            raise _unlike(
                item,
                f"layer {i % count} has {here[0]} key heads of {here[1]} features here, and {there[0]} of {there[2]} in the adapter",
            )
    change = insert_prompt.apply_stored(program, inner, mine)
    # a past is all keys and then all values, the file goes layer by layer
    _given(program, op, {f"table_{side * count + i}": table(tokens, layer, side) for side in (0, 1) for i, layer in enumerate(layers)})
    return change


def _plain(tokens: VirtualTokens, count: int) -> list[Layer] | None:
    return [Layer(i) for i in range(count)] if count == tokens.layers else None


def _rows_behind(program: Program, op: Resolved, item: Loaded, tokens: VirtualTokens, whole: Whole) -> list[SiteChange]:
    """At the attentions of an encoder, whose tokens have positions behind those of the virtual ones."""
    blocks = [s for s in program.anatomy.sites if s.is_region and "causal" in s.facts]
    layers = None if any(s.facts.get("cross") for s in blocks) else layers_of(program, op, item, tokens, blocks)
    if layers is None:
        raise _unlike(item, f"it has keys and values of {tokens.layers} layers, and the model has {len(blocks)} attentions")
    method = _method(MemoryMethod, length=tokens.count, reparametrise=False)
    _move_positions(program, op, item, tokens.count, whole)
    changes: list[SiteChange] = []
    for layer, site in zip(layers, blocks, strict=True):
        inner = replace(op, verb=method.verb, methods=(method,), sites=(site,), place="on")
        _alike(item, tokens, layer, site, insert_memory.core_of(program, inner, site)[0])
        (change,) = insert_memory.apply(program, inner)
        _given(program, op, {"keys": table(tokens, layer, 0), "values": table(tokens, layer, 1)})
        changes.append(change)
    return changes


def _alike(item: Loaded, tokens: VirtualTokens, layer: Layer, site: Site, core: Any) -> None:
    there = left(tokens, layer)
    if (core.heads, core.key, core.value) != (there, tokens.head, tokens.head):
        raise _unlike(item, f"{site.role} has {core.heads} key heads of {core.key} features here, and the adapter {there} of {tokens.head}")


def _decoder_rows(program: Program, op: Resolved, item: Loaded, tokens: VirtualTokens, site: Site) -> list[SiteChange]:
    """In front of a decoder's own keys. peft gives layer ``i`` the keys and values number ``2 i`` of the file, counted round: it cuts a cache for
    self and cross attention out of one that it has doubled, and lets the cross attentions go without. A file of twice as many layers, of which every
    second one is read, has one for each."""
    blocks = insert_prefix_rows.decoder_attentions(program)
    layers = layers_of(program, op, item, tokens, blocks)
    if layers is None and tokens.layers % 2 == 0:
        layers = layers_of(program, op, item, tokens, blocks, tokens.layers // 2)
    if layers is None:
        raise _unlike(item, f"it has keys and values of {tokens.layers} layers, and the model's decoder has {len(blocks)}")
    before = next((a for a in program.attachments if a.method.stands == "tokens"), None)
    if before is not None:
        raise fail(
            "S0492", f"there are virtual tokens in front already: {before.name}", item.span, "again here", help="merge one of the two"
        )
    rows = _method(PromptMethod, length=tokens.count)
    inner = replace(op, verb=rows.verb, methods=(rows,), sites=(site,), place="on")
    changes = [insert_prefix_rows.apply_rows(program, inner, rows)]
    method = _method(MemoryMethod, length=tokens.count, reparametrise=False)
    for layer, block in zip(layers, blocks, strict=True):
        change, core = insert_prefix_rows.apply_memory(program, replace(inner, verb=method.verb, methods=(method,)), block, method)
        _alike(item, tokens, layer, block, core)
        read = replace(layer, number=2 * layer.number % tokens.layers)
        _given(program, op, {"keys": table(tokens, read, 0), "values": table(tokens, read, 1)})
        changes.append(change)
    return changes


def _move_positions(program: Program, op: Resolved, item: Loaded, count: int, whole: Whole) -> None:
    """Row ``i`` of the table of positions becomes row ``i + count``; the last rows, which nothing reaches any more, stay."""
    tables = [s for s in program.anatomy.sites if s.op == "embedding" and s.role.endswith("embed.positions")]
    if len(tables) != 1 or not tables[0].weight or tables[0].in_axis != 0:
        raise fail(
            "S0786", f"merge {op.origin.method} cannot merge {item.adapter.name}: its keys and values move the positions of what follows, and the model "
            "has no table of positions to move", item.span, "merged here", help="`insert prefix(..)` makes keys and values that move no position, trained here",
        )  # fmt: skip
    name = program.aliases.get(tables[0].weight, tables[0].weight)
    old = program.weights[name]
    rows = old.shape[0]
    if count >= rows:
        raise _unlike(item, f"the model has {rows} positions, and {count} virtual tokens leave none")
    key = next((n for n in whole if program.aliases.get(n, n) == name), "")
    own = whole.get(key, [])
    if len(own) > 1:
        raise fail(
            "S0786", f"merge {op.origin.method} cannot merge {listed([n for _, n, _ in own])}: both trained `{name}`, whose rows move behind the virtual tokens",
            item.span, "merged here", help="merge the one with virtual tokens alone, then the other",
        )  # fmt: skip
    given = cast(own[0][2], old.dtype) if own else old
    program.weights[name] = Concat(old.shape, old.dtype, (select(given, 0, ((count, rows),)), select(given, 0, ((rows - count, rows),))), 0)
    program.journal.record(name, op.origin)
    op.tell(f"positions of {tables[0].role} start at {count}, behind the virtual tokens{' that they were trained with' if own else ''}")
    if own:
        whole[key] = []


__all__ = ["put"]
