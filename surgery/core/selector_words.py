"""Selectors and what they found in words, for messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

from surgery.core import ast
from surgery.core.roles import RoleNode


def written(step: ast.Step | ast.SetStep) -> str:
    """A step as a spec writes it."""
    if isinstance(step, ast.SetStep):
        return "{" + ", ".join(".".join(map(written, m)) for m in step.members) + "}" + index_text(step.index)
    return step.name + index_text(step.index)


def index_text(index: ast.Index | None) -> str:
    if index is None:
        return ""
    return "[" + (", ".join(map(range_text, index.ranges)) if index.ranges else "*") + "]"


def range_text(r: ast.Range) -> str:
    text = str(r.start) if r.stop == r.start else f"{r.start}..{'' if r.stop is None else r.stop}"
    return text + (f" by {r.step}" if r.step != 1 else "")


def are(count: int, noun: str) -> str:
    return f"is {count} {noun}" if count == 1 else f"are {count} {noun}s"


def counted(count: int, node: RoleNode) -> str:
    return f"`{node.role}`" if count == 1 else f"{count} parts such as `{node.role}`"


def word_of(step: ast.Step | ast.SetStep) -> str:
    return step.name if isinstance(step, ast.Step) else written(step)


def general(node: RoleNode) -> str:
    return re.sub(r"\[\d+\]", "[*]", node.role)


def as_ranges(roles: Sequence[str]) -> list[str]:
    """Roles that differ in one index as ranges: ``layers[0..3]``."""
    groups: dict[tuple[str, str], list[int]] = {}
    plain: list[str] = []
    for role in dict.fromkeys(roles):
        found = re.match(r"^(.*?)\[(\d+)\](.*)$", role)
        if found is None:
            plain.append(f"`{role}`")
        else:
            groups.setdefault((found[1], found[3]), []).append(int(found[2]))
    for (head, tail), numbers in groups.items():
        runs: list[str] = []
        numbers = sorted(numbers)
        start = previous = numbers[0]
        for n in [*numbers[1:], -1]:
            if n == previous + 1:
                previous = n
                continue
            runs.append(str(start) if start == previous else f"{start}..{previous}")
            start = previous = n
        plain.append(f"`{head}[{', '.join(runs)}]{tail}`")
    return plain
