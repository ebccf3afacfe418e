"""Keys and values in front of attentions as a folder of peft, where they are the cache that peft's prefix is.

peft's keys stand in a cache of ``n`` entries, so what follows has positions from ``n`` on. Keys that were inserted behind a rotary embedding move no
position: a query at position ``i`` meets them as ``R_i q . k``. With ``R_n k`` in the cache it is ``R_(i + n) q . R_n k``, the same number, and
the real tokens see each other at the distances that they have. So rotary models have an exact form, for every ``n``. Where positions are a
trained table, the folder holds it whole, ``n`` rows further down: row ``i + n`` is what row ``i`` was. A bias by distance has no such form: the entries of
a cache have one, and these have none. Tables that came from such a folder, and stand beside positions that were moved for them, are that form already.

Beside an encoder peft gives attention ``i`` of the decoder the keys and values number ``2 i`` of the file, counted round. A file of twice as many layers
has one for each; those between are never read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.backends.peft_parts import CHANGES_BASE, changed
from surgery.backends.transformers_config import original
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Attachment, Program
from surgery.model.weights import Concat, Select

CLOSE = 1e-4
MASK = 2
"""The second argument of the call that edits an attention's mask."""
CACHE = "keys and values of a folded `insert prompt` are such a cache: `insert prompt(..) on embed.tokens`, then `fold all`"


@dataclass(frozen=True)
class Prefix:
    """``parts`` layer by layer; by how many positions their keys have to be turned (``turn``, 0: they are a cache's already), by how many ``rows`` the
    table ``positions`` has to be moved (empty: none goes along), and whether they are those of a decoder beside an encoder (a ``pair``). ``table`` is a
    table that a merge has moved already."""

    parts: tuple[Attachment, ...]
    turn: int = 0
    positions: str = ""
    rows: int = 0
    pair: bool = False
    table: str = ""

    @property
    def layers(self) -> int:
        """Layers that the file has."""
        return len(self.parts) * (2 if self.pair else 1)


def cannot(a: Attachment, why: str, span: Span | None, help: str = "`emit torch` keeps it as it is") -> SurgeryError:
    return fail(
        "S0793", f"{a.name} on {a.site.role} cannot go into an adapter folder: {why}", span, "asked for here",
        also=[(a.origin.span, "attached here")] if a.origin.span.end else (), help=help,
    )  # fmt: skip


def prefix_of(program: Program, span: Span | None) -> Prefix:
    """The keys and values of a program, as such a folder has them.

    Raises S0792 and S0793, see :func:`surgery.backends.peft_tokens.tokens_of`.
    """
    found = [a for a in program.attachments if a.method.stands == "attention"]
    first = found[0]
    moved = _moved(program)
    unchanged(program, [*found, *(a for a in program.attachments if a.method.stands == "tokens")], {moved}, span)
    blocks, pair = _blocks(program, found, span)
    parts = _in_order(program, found, blocks, pair, span)
    rows = [bool(getattr(program.module(a.module), "in_place", False)) for a in parts]
    if any(rows):
        if not all(rows):
            raise cannot(first, "some of its keys and values move positions, and some do not", span)
        return Prefix(parts, pair=pair)  # they stand in the place of rows, so that positions are those behind a cache
    if moved:  # a table that was trained with the tokens is not the base's
        own = moved not in program.frozen
        count = program.module(first.module).method.entries()
        return Prefix(parts, positions=moved if own else "", rows=count if own else 0, pair=pair, table=moved)
    module: Any = program.module(first.module)
    count = module.method.entries()
    if _windows(program):
        raise cannot(first, "the model's layers see a window, in which a cache's entries count, and these are always seen", span)
    if any(_biased(program, a) for a in parts):
        raise cannot(
            first,
            f"the model adds a bias by distance to its scores; in peft's cache entry j of {count} gets the one of the distance i + {count} - j from token i, and here it gets none",
            span,
            "train a prefix in peft and load it with `adapter NAME = load(..)`" if pair else CACHE,
        )
    table = _table(program, first, blocks, count, span)
    turn = count if _rotary(program) is not None else 0
    if turn:
        _turned(program, first, torch.randn(1, count, module.site.key, generator=torch.Generator().manual_seed(0)), turn, span)
    if not table and not turn:
        raise cannot(
            first,
            f"peft's keys and values are a cache, behind which token i has the position i + {count}, and the model's positions are neither rotary nor one trained table, "
            "so that nothing in the folder can take that back",
            span,
            CACHE,
        )
    return Prefix(parts, turn, table, count if table else 0, pair)


def unchanged(program: Program, own: Sequence[Attachment], tables: set[str], span: Span | None) -> None:
    """Raises S0792 or S0793 where another statement than those that made ``own`` changed the base."""
    names = {x for a in own for x in (a.module, *a.tensors)} | tables
    mine = {a.origin for a in own}
    for key, origins in program.journal.entries.items():
        if key in names or key.startswith("::") or any(key.startswith(f"{a.module}.") for a in own):
            continue
        other = next((o for o in origins if o.verb in CHANGES_BASE and o not in mine), None)
        if other is not None:
            raise changed(other, span)


def _blocks(program: Program, found: Sequence[Attachment], span: Span | None) -> tuple[list[Site], bool]:
    """The attentions that have a cache in peft, in order, and whether there is an encoder beside them."""
    every = [s for s in program.anatomy.sites if s.is_region and "causal" in s.facts]
    crossed = {s.stack for s in every if s.facts.get("cross")}
    if not crossed:
        return every, False
    blocks = [s for s in every if s.stack in crossed and s.facts.get("causal") and not s.facts.get("cross")]
    mine = {s.role for s in blocks}
    stray = next((a for a in found if a.site.role not in mine), None)
    if stray is not None:
        kind = "of the encoder" if stray.site.stack not in crossed else "on what the encoder made"
        raise cannot(
            stray,
            f"it is an attention {kind}, and beside an encoder peft puts keys and values in front of the decoder's own alone",
            span,
            f"insert it on those: {', '.join(sorted(mine)[:3])}{', ...' if len(mine) > 3 else ''}",
        )
    return blocks, True


def _in_order(
    program: Program, found: Sequence[Attachment], blocks: Sequence[Site], pair: bool, span: Span | None
) -> tuple[Attachment, ...]:
    """The attachments by layer, one for each. Raises S0793."""
    first, roles = found[0], [a.site.role for a in found]
    if sorted(roles) != sorted(s.role for s in blocks):
        why = (
            "it stands twice at one attention"
            if len(set(roles)) < len(roles)
            else f"{len(blocks)} attentions have a cache, and it stands at {len(set(roles))}"
        )
        raise cannot(
            first, why, span, f"a cache has keys in every layer: `insert prefix(..) on {'decoder.' if pair else ''}layers[*].attn`"
        )
    modules: list[Any] = [program.module(a.module) for a in found]
    sizes = {(m.site.heads, m.site.key, m.site.value, m.method.entries()) for m in modules}
    if len(sizes) > 1 or modules[0].site.key != modules[0].site.value:
        raise cannot(first, "its keys and values differ in size between layers, or from each other, and such a folder has one size", span)
    order = {s.role: i for i, s in enumerate(blocks)}
    return tuple(sorted(found, key=lambda a: order[a.site.role]))


def _biased(program: Program, a: Attachment) -> bool:
    """Whether an attention's mask has a number of its own for every head: a bias by distance."""
    gm = program.module(a.node.graph)
    masks = [n for n in gm.graph.nodes if n.op == "call_module" and n.args[1:2] == (MASK,) and _path(a.node.graph, n) == a.module]
    shapes = [n.args[0].meta["spec"].shape for n in masks]
    return any(len(s) == 4 and s[1] != 1 for s in shapes)


def _path(graph: str, node: Any) -> str:
    return f"{graph}.{node.target}" if graph else str(node.target)


def _table(program: Program, a: Attachment, blocks: Sequence[Site], count: int, span: Span | None) -> str:
    """The trained table of positions in front of these attentions, by name; empty where there is none. Raises S0793 where it cannot be moved."""
    stacks = {s.stack for s in blocks}
    found = [
        s for s in program.anatomy.sites
        if s.role.endswith("embed.positions") and (s.stack in stacks or s.role.rpartition("embed.positions")[0].rstrip(".") in _leads(stacks))
    ]  # fmt: skip
    if not found:
        return ""
    name = program.aliases.get(found[0].weight, found[0].weight)
    rows = program.weights[name].shape[0] if name in program.weights else 0
    why = (
        "the model has several tables of positions" if len(found) > 1
        else "the model's positions are no table of a module of their own" if not rows or not name.endswith(".weight") or len(program.weights[name].shape) != 2
        else f"`{name}` is shared with other parts" if name in program.aliases.values()
        else f"behind {count} entries of peft's cache nothing is left of {rows} positions" if rows <= count
        else ""
    )  # fmt: skip
    if why:
        raise cannot(a, f"peft's keys and values are a cache, behind which token i has the position i + {count}, and {why}", span, CACHE)
    return name


def _leads(stacks: set[str]) -> set[str]:
    """What stands in front of ``layers`` in the names of stacks: ``decoder`` of ``decoder.layers``."""
    return {s.rpartition(".")[0] for s in stacks}


def _moved(program: Program) -> str:
    """The table of positions that a merge moved for a prefix from a folder, by name; else an empty text."""
    for site in program.anatomy.sites:
        if site.op != "embedding" or not site.role.endswith("embed.positions") or not site.weight:
            continue
        name = program.aliases.get(site.weight, site.weight)
        expr = program.weights[name]
        if not isinstance(expr, Concat) or len(expr.parts) != 2 or not all(isinstance(p, Select) for p in expr.parts):
            continue
        one, two = expr.parts
        assert isinstance(one, Select) and isinstance(two, Select)
        rows, n = one.source.shape[0], two.shape[0]
        if one.source is two.source and one.ranges == ((n, rows),) and two.ranges == ((rows - n, rows),):
            return str(name)
    return ""


def _windows(program: Program) -> bool:
    config = program.info.config
    kinds = config.get("layer_types") or ()
    if kinds:
        return any("full" not in str(k) for k in kinds)
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True) is not False


def _rotary(program: Program) -> tuple[Any, Any] | None:
    """The model's rotary embedding and the function that applies it; None where there is not one of them."""
    import transformers

    config = original(program)
    family = getattr(transformers, program.info.architecture, None) if program.info.architecture else None
    if config is None or family is None:
        return None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        kinds = {type(m) for m in family(config).modules() if type(m).__name__.endswith("RotaryEmbedding")}
    apply = getattr(sys.modules[family.__module__], "apply_rotary_pos_emb", None)
    if len(kinds) != 1 or apply is None:
        return None
    return kinds.pop()(config=config.get_text_config()), apply


def tables_of(program: Program, prefix: Prefix, tensors: Any) -> Tensor:
    """``[n, layers 2 heads head]``, keys first. Raises S0793 where the model's rotation cannot be computed."""
    parts: list[Tensor] = []
    for a in prefix.parts:
        module: Any = program.module(a.module)
        t = {n.rpartition(".")[2]: tensors.of(program, n).float() for n in a.tensors}
        keys, values = (t["keys"], t["values"]) if module.stored else module.method.tables(module.site, t)
        keys = _turned(program, a, keys, prefix.turn) if prefix.turn and _turns(program, a) else keys
        flat = [x.transpose(0, 1).flatten(1) for x in (keys, values)]
        parts += [*flat, *(torch.zeros_like(x) for x in flat)] if prefix.pair else flat
    return torch.cat(parts, 1).contiguous()


def moved_table(table: Tensor, rows: int) -> Tensor:
    """A table of positions ``[rows, width]`` whose row ``i + rows`` is what row ``i`` was; the first ones, which nothing reads behind a cache, stay."""
    return torch.cat([table[:rows], table[: len(table) - rows]])


def _turns(program: Program, a: Attachment) -> bool:
    """Whether an attention turns its keys; some families leave that out in the layers that their config names."""
    said = program.info.config.get("no_rope_layers")
    at = a.site.layer
    return not (isinstance(said, list) and at is not None and at < len(said)) or bool(said[at])


def _turned(program: Program, a: Attachment, keys: Tensor, turn: int, span: Span | None = None) -> Tensor:
    """Keys ``[heads, n, head]`` as the model turns those at position ``turn``. Raises S0793 where that is not known."""
    rotary, made = _rotary(program), None
    if rotary is not None:
        module, apply = rotary
        with torch.no_grad():
            made = _applied(module, apply, keys, turn)
            if made is None:  # a part of each head may be turned outside of the function
                width = _width(module, keys, turn)
                part = _applied(module, apply, keys[..., :width], turn) if 0 < width < keys.shape[-1] else None
                made = None if part is None else torch.cat([part, keys[..., width:]], -1)
    lengths = keys.norm(dim=-1)
    if made is None or not torch.allclose(made.norm(dim=-1), lengths, atol=CLOSE * float(lengths.max()), rtol=CLOSE):
        raise cannot(a, "how the model turns its keys by their position is not known", span)
    return made


def _applied(module: Any, apply: Any, keys: Tensor, turn: int) -> Tensor | None:
    """Keys turned by the model's own function; None where it does not take them."""
    try:
        cos, sin = module(keys, torch.tensor([[turn]]))
        made: Tensor = apply(keys.unsqueeze(0), keys.unsqueeze(0), cos, sin)[1].squeeze(0)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    return made / float(getattr(module, "attention_scaling", 1.0)) if made.shape == keys.shape else None


def _width(module: Any, keys: Tensor, turn: int) -> int:
    """How many features of a head are turned."""
    try:
        return int(module(keys, torch.tensor([[turn]]))[0].shape[-1])
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return 0
