"""Keys and values in front of attentions as a folder of peft, where they are the cache that peft's prefix is.

peft's keys stand in a cache of ``n`` entries, so what follows has positions from ``n`` on. Keys that were inserted behind a rotary embedding move no
position: a query at position ``i`` meets them as ``R_i q . k``. With ``R_n k`` in the cache it is ``R_(i + n) q . R_n k``, the same number, and
the real tokens see each other at the distances that they have. So rotary models have an exact form, for every ``n``. Tables that came from such a
folder, and stand beside positions that were moved for them, are that form already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.backends.peft_parts import CHANGES_BASE, changed
from surgery.backends.transformers_config import original
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model.program import Attachment, Program
from surgery.model.weights import Concat, Select

CLOSE = 1e-4


def cannot(a: Attachment, why: str, span: Span | None, help: str = "`emit torch` keeps it as it is") -> SurgeryError:
    return fail(
        "S0793", f"{a.name} on {a.site.role} cannot go into an adapter folder: {why}", span, "asked for here",
        also=[(a.origin.span, "attached here")] if a.origin.span.end else (), help=help,
    )  # fmt: skip


def prefix_of(program: Program, span: Span | None) -> tuple[tuple[Attachment, ...], int]:
    """The attachments of a prefix, layer by layer, and by how many positions their keys have to be turned (0: they are a cache's already).

    Raises S0792 and S0793, see :func:`surgery.backends.peft_tokens.tokens_of`.
    """
    found = [a for a in program.attachments if a.method.stands == "attention"]
    first = found[0]
    moved = _moved(program)
    own = {x for a in found for x in (a.module, *a.tensors)} | ({moved} if moved else set())
    for key, origins in program.journal.entries.items():
        if key in own or key.startswith("::") or any(key.startswith(f"{a.module}.") for a in found):
            continue
        other = next((o for o in origins if o.verb in CHANGES_BASE and o not in {a.origin for a in found}), None)
        if other is not None:
            raise changed(other, span)
    beside = next((a for a in program.attachments if a not in found), None)
    if beside is not None:
        raise cannot(
            first, f"{beside.name} on {beside.site.role} is of another kind, and a folder holds one", span, "emit them from two specs"
        )
    blocks = [s.role for s in program.anatomy.sites if s.is_region and "causal" in s.facts]
    if any(s.facts.get("cross") for s in program.anatomy.sites if s.is_region and "causal" in s.facts):
        raise cannot(first, "peft's keys and values of an encoder with a decoder are one cache for every second layer", span)
    roles = [a.site.role for a in found]
    if sorted(roles) != sorted(blocks):
        why = (
            "it stands twice at one attention"
            if len(set(roles)) < len(roles)
            else f"{len(blocks)} attentions have a cache, and it stands at {len(set(roles))}"
        )
        raise cannot(first, why, span, "a cache has keys in every layer: `insert prefix(..) on layers[*].attn`")
    modules: list[Any] = [program.module(a.module) for a in found]
    if (
        len({(m.site.heads, m.site.key, m.site.value, m.method.entries()) for m in modules}) > 1
        or modules[0].site.key != modules[0].site.value
    ):
        raise cannot(first, "its keys and values differ in size between layers, or from each other, and such a folder has one size", span)
    order = {role: i for i, role in enumerate(blocks)}
    found.sort(key=lambda a: order[a.site.role])
    count = modules[0].method.entries()
    if moved:
        return tuple(found), 0
    if _windows(program):
        raise cannot(first, "the model's layers see a window, in which a cache's entries count, and these are always seen", span)
    if any(s.op == "embedding" and s.role.endswith("embed.positions") for s in program.anatomy.sites) or _rotary(program) is None:
        why = "peft's keys and values are a cache, which moves the positions of what follows, and these move none"
        raise cannot(
            first,
            why,
            span,
            "keys and values of a folded `insert prompt` go into such a folder, and these do where positions are rotary alone",
        )
    return tuple(found), count


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


def tables_of(program: Program, found: Sequence[Attachment], turn: int, tensors: Any) -> Tensor:
    """``[n, layers 2 heads head]``, keys first. Raises S0793 where the model's rotation cannot be computed."""
    parts: list[Tensor] = []
    for a in found:
        module: Any = program.module(a.module)
        t = {n.rpartition(".")[2]: tensors.of(program, n).float() for n in a.tensors}
        keys, values = (t["keys"], t["values"]) if module.stored else module.method.tables(module.site, t)
        keys = _turned(program, a, keys, turn) if turn else keys
        parts += [x.transpose(0, 1).flatten(1) for x in (keys, values)]
    return torch.cat(parts, 1).contiguous()


def _turned(program: Program, a: Attachment, keys: Tensor, turn: int) -> Tensor:
    """Keys ``[heads, n, head]`` as the model turns those at position ``turn``."""
    rotary = _rotary(program)
    made = None
    if rotary is not None:
        try:
            with torch.no_grad():
                cos, sin = rotary[0](keys, torch.tensor([[turn]]))
                made = rotary[1](keys.unsqueeze(0), keys.unsqueeze(0), cos, sin)[1].squeeze(0) / float(
                    getattr(rotary[0], "attention_scaling", 1.0)
                )
        except (TypeError, ValueError, RuntimeError, AttributeError):
            made = None
    lengths = keys.norm(dim=-1)
    if (
        made is None
        or made.shape != keys.shape
        or not torch.allclose(made.norm(dim=-1), lengths, atol=CLOSE * float(lengths.max()), rtol=CLOSE)
    ):
        raise cannot(a, "how the model turns its keys by their position is not known", None)
    return made
