"""Selectors that name what an earlier statement took away: the error says what is gone, by which line, and what stands there now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.core import ast
from surgery.core.diagnostics import SurgeryError, error
from surgery.core.near import quoted
from surgery.core.plan import group_roles
from surgery.core.selector import select
from surgery.core.site import Site
from surgery.model.program import Gone, Program

MISSING = ("S0301", "S0302", "S0303", "S0314")
"""The errors of a selector that does not find all that it names."""


def explain(program: Program, selector: ast.Selector, names: Mapping[str, Sequence[Site]], problem: SurgeryError) -> SurgeryError:
    """``problem`` itself, or S0402 where the selector would have matched before an earlier statement removed or replaced parts."""
    there = {s.role: s for s in program.anatomy.sites}
    lost = {role: g for role, g in program.gone.items() if role not in there}
    if not lost or any(d.code not in MISSING for d in problem.diagnostics):
        return problem
    before = replace(program.anatomy, sites=(*program.anatomy.sites, *(g.site for g in lost.values())))
    try:
        found = select(before, selector, names)
    except SurgeryError:
        return problem
    missing = [s for s in found if s.role in lost]
    if not missing:
        return problem
    causes: dict[tuple[int, str], list[str]] = {}
    for site in missing:
        gone = lost[site.role]
        causes.setdefault((id(gone.origin), gone.how), []).append(_whole(site.role, lost, there))
    also = []
    for (origin, how), roles in causes.items():
        names_ = group_roles(list(dict.fromkeys(roles)))
        span = next(g.origin.span for g in lost.values() if id(g.origin) == origin)
        also.append((span, f"{', '.join(names_)} {'was' if len(names_) == 1 else 'were'} {how} here"))
    left = [s.role for s in found if s.role not in lost]
    heirs = _heirs(program, selector, [lost[s.role] for s in missing])
    text = ", ".join([*([short(left)] if left else []), *heirs])
    help = f"name what is there now: `{text}`" if text else "leave the selector out: nothing of what it names is left"
    return SurgeryError(
        error("S0402", "these parts of the model no longer exist", selector.span, _label(found, missing), also=also, help=help)
    )


def _whole(role: str, lost: Mapping[str, Gone], there: Mapping[str, Site]) -> str:
    """The largest part around a role that is gone, or the region whose insides were replaced."""
    while (above := role.rpartition(".")[0]) in lost:
        role = above
    region = there.get(role.rpartition(".")[0])
    return region.role if region is not None and region.is_region and lost[role].heir else role


def _label(found: Sequence[Site], missing: Sequence[Site]) -> str:
    words = quoted(dict.fromkeys(s.role.rpartition(".")[2].partition("[")[0] for s in missing), last="and")
    layers = {(s.stack, s.layer) for s in found if s.layer is not None}
    gone = {(s.stack, s.layer) for s in missing if s.layer is not None}
    if not gone or len(words) > 60:
        layers, gone = {(s.role, 0) for s in found}, {(s.role, 0) for s in missing}
        return f"selects {len(layers)} parts; {_count(len(gone), len(layers))} gone"
    noun = "layer" if len(layers) == 1 else "layers"
    return f"selects {words} of {len(layers)} {noun}; {_count(len(gone), len(layers))} gone"


def _count(some: int, of: int) -> str:
    if some == of:
        return "it is" if of == 1 else "all are"
    return f"{some} {'is' if some == 1 else 'are'}"


def _heirs(program: Program, selector: ast.Selector, gone: Sequence[Gone]) -> list[str]:
    """What selects the successors: ``@name.experts[*].{up, down}``; where another spec made them, by their roles."""
    words: dict[str, dict[str, None]] = {}
    for g in gone:
        heir = g.heir
        if heir and g.origin.span.source is not selector.span.source:
            label, _, rest = heir.removeprefix("@").partition(".")
            places = short([r for r in program.named.get(label, ()) if g.site.role.startswith(f"{r}.")])
            heir = f"{places}.{rest.replace('[*]', '')}" if places else ""
        if heir:
            words.setdefault(heir, {})[g.site.role.rpartition(".")[2]] = None
    return [f"{heir}.{_set(list(parts))}" for heir, parts in words.items()]


def short(roles: Sequence[str]) -> str:
    """Roles as one would write them: ``layers[0..15].ffn.{up, down}``."""
    words: dict[str, dict[str, None]] = {}
    for role in roles:
        above, _, last = role.rpartition(".")
        words.setdefault(above, {})[last] = None
    alike: dict[tuple[str, ...], list[str]] = {}
    for above, parts in words.items():
        alike.setdefault(tuple(parts), []).append(above)
    return ", ".join(f"{place}.{_set(parts)}" if place else _set(parts) for parts, places in alike.items() for place in group_roles(places))


def _set(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else "{" + ", ".join(words) + "}"
