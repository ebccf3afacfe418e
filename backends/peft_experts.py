"""Changes of experts in an adapter folder: factors of bare parameters, which its config names in ``target_parameters``.

Such a tensor is ``[experts, out, in]``, or inputs first; gates and values may be parts of one. All changes of one tensor become one, of a rank
that is the sum of theirs: ``A [experts r, in]``, expert by expert, and ``B [out, r experts]``, whose columns go through the experts for every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.backends.transformers_config import original
from surgery.backends.transformers_stacks import layout_of
from surgery.model.adapter_keys import PREFIX
from surgery.model.program import Program


def unreachable(program: Program, names: Sequence[str]) -> str:
    """The first of some tensors of experts that peft cannot reach in the class of the base, with the reason; empty where it reaches all.

    peft changes a bare parameter while its own module runs. Experts that are stored in two dimensions are read from outside of that module, which sees
    no change; and experts that stand one by one in the class are no bare parameter.
    """
    import transformers

    config = original(program)
    cls = getattr(transformers, program.info.architecture, None) if program.info.architecture else None
    if config is None or cls is None:
        return ""
    with torch.device("meta"):
        model = cls(config)
    layout = layout_of(model, program, {program.aliases.get(n, n): n for n in names})
    for name in names:
        first = program.aliases.get(name, name)
        if first in layout.flat:
            return f"{program.info.architecture} keeps `{name}` in two dimensions and reads it where peft does not change it"
        if first in layout.apart:
            return f"{program.info.architecture} keeps its experts one by one (`{layout.apart[first][0]}`), the program as one tensor"
    return ""


def rank_of(parts: Mapping[str, Sequence[Any]]) -> int:
    """The rank that all tensors of experts have in the folder: the largest that one needs."""
    return max((sum(e.rank for e in entries) for entries in parts.values()), default=0)


def factors_of(program: Program, name: str, entries: Sequence[Any], rank: int, tensors: Any) -> tuple[Tensor, Tensor]:
    """The factors of one tensor, as many as ``rank`` says (zeros fill up); the scales stand in ``A``."""
    count = int(program.weights[program.aliases.get(name, name)].shape[0])
    firsts: list[Tensor] = []
    seconds: list[Tensor] = []
    for entry in entries:
        site = entry.site
        t = {n.rpartition(".")[2]: tensors.of(program, n).float() for n in entry.attachment.tensors}
        a, b = entry.method.factors(site, t)
        b = site.spread(b, axis=1)
        if site.member >= 0:
            a, b = (_alone(x, site.member, count) for x in (a, b))
        firsts.append(a * float(entry.method.scale()))
        seconds.append(b)
    a, b = torch.cat(firsts, 1), torch.cat(seconds, 2)
    missing = rank - a.shape[1]
    a = torch.cat([a, a.new_zeros(count, missing, a.shape[2])], 1)
    b = torch.cat([b, b.new_zeros(count, b.shape[1], missing)], 2)
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def _alone(part: Tensor, member: int, count: int) -> Tensor:
    """The factors of one expert among those of all, which are zero."""
    made = part.new_zeros(count, *part.shape[1:])
    made[member] = part[0]
    return made


def keys_of(program: Program, names: Sequence[str]) -> dict[str, str]:
    """The beginning of the keys of each tensor. The wrappers of one module stand in each other, the first parameter's innermost."""
    order: dict[str, int] = {n: i for i, n in enumerate(program.weights)}

    def place(name: str) -> int:
        return order.get(program.aliases.get(name, name), len(order))

    found: dict[str, list[str]] = {}
    for name in sorted(names, key=place):
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: f"{PREFIX}{path}{'.base_layer' * (len(mine) - 1 - i)}" for path, mine in found.items() for i, name in enumerate(mine)
    }  # fmt: skip
