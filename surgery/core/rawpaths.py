"""Selectors that are raw module paths with wildcards. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from surgery.core import ast
from surgery.core.diagnostics import SurgeryError, error
from surgery.core.near import near
from surgery.core.site import Anatomy, Site


def select_paths(anatomy: Anatomy, selector: ast.Selector) -> list[Site]:
    """Sites by module path: ``*`` stands for one part of the path or a piece of it, ``**`` for any number of parts.

    A module whose operation has a role gives the site of that role, a container of a block gives its region, anything else the
    site of the whole module. Raises S0305 when nothing has such a path.
    """
    pattern = selector.raw or ""
    glob = re.compile(_glob(pattern))
    by_path: dict[str, Site] = {}
    for site in anatomy.sites:
        if site.is_region:
            by_path.setdefault(site.path, site)
    roles: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        if not site.is_region and not site.rows:
            roles.setdefault(site.path, []).append(site)
    found: list[Site] = []
    for module in anatomy.modules:
        if not (glob.fullmatch(module.path) or glob.fullmatch(module.weight)):
            continue
        known = [s for s in roles.get(module.path, ()) if s.weight == module.weight and s.op == module.op]
        found.append(known[0] if known else module)
    found += [site for path, site in by_path.items() if path and glob.fullmatch(path)]
    found = list({s.role: s for s in found}.values())
    if found or selector.optional:
        return found
    paths = [m.path for m in anatomy.modules]
    kept = _longest(pattern, paths)
    raise SurgeryError(
        error(
            "S0305", f'no module or parameter has a path like "{pattern}"', selector.span, f"matches none of {len(paths)} paths",
            notes=[f"{kept[1]} of {len(paths)} paths begin like `{kept[0]}`" if kept[0] else f"no path begins like `{pattern.split('.')[0]}`"],
            help=_path_help(pattern, paths),
        )
    )  # fmt: skip


def _glob(pattern: str) -> str:
    out = []
    for piece in re.split(r"(\*\*|\*|\?)", pattern):
        out.append({"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(piece, re.escape(piece)))
    return "".join(out)


def _longest(pattern: str, paths: Sequence[str]) -> tuple[str, int]:
    """The longest beginning of the pattern that some paths have, and how many have it."""
    parts = pattern.split(".")
    for n in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:n])
        glob = re.compile(_glob(head) + r"(\..*)?")
        count = sum(1 for p in paths if glob.fullmatch(p))
        if count:
            return head, count
    return "", 0


def _path_help(pattern: str, paths: Sequence[str]) -> list[str]:
    general = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", p) for p in paths))
    wanted = re.sub(r"(?<![^.])\d+(?![^.])", "*", pattern)
    close = near(wanted, general) or [g for g in general if g.rsplit(".", 1)[-1] == pattern.rsplit(".", 1)[-1]][:4]
    return ["did you mean " + ", ".join(f'"{c}"' for c in close) + "?"] if close else ["`surgery show MODEL` lists the paths"]
