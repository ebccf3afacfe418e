"""What the order of statements alone gets wrong, before any model is looked at."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from surgery.core import ast
from surgery.core.diagnostics import Severity, Sink
from surgery.core.source import Span
from surgery.core.spec import Checked

CHANGES = (ast.Operation, ast.Merge, ast.Train)


def place(node: ast.Statement) -> Span:
    """What to point at for a whole statement: its first words."""
    if isinstance(node, ast.Operation) and node.verb_span.end:
        return node.verb_span.to(node.method.name_span) if node.method.name_span.end else node.verb_span
    first = node.span.text.split("\n", 1)[0]
    return Span(node.span.source, node.span.start, node.span.start + len(first.rstrip()))


def order(statements: Sequence[Checked], sink: Sink) -> None:
    """Reports outputs that overwrite each other, changes that no output contains, and folds with nothing before them."""
    targets: dict[str, ast.Emit] = {}
    last_emit: ast.Emit | None = None
    unseen: list[ast.Statement] = []
    adapted = False
    early_fold: ast.Operation | None = None
    for item in statements:
        node = item.node
        if isinstance(node, ast.Emit):
            path = posixpath.normpath(node.to) if node.to else ""
            first = targets.get(path)
            if first is not None:
                sink.error(
                    "S0403", f'two statements write to "{node.to}"', node.to_span if node.to_span.end else node.span, "written again here",
                    also=[(first.to_span if first.to_span.end else first.span, "first written here")], help="give each output a path of its own",
                )  # fmt: skip
            targets.setdefault(path, node)
            last_emit = node
            unseen.clear()
        elif isinstance(node, CHANGES):
            if last_emit is not None:
                unseen.append(node)
            if isinstance(node, ast.Operation):
                if node.verb in ("adapt", "insert"):
                    if early_fold is not None and not adapted:
                        _early(early_fold, node, sink)
                    adapted = True
                elif node.verb == "fold" and not adapted and early_fold is None:
                    early_fold = node
    for node in unseen[:1]:
        assert last_emit is not None
        more = f" (and {len(unseen) - 1} more like it)" if len(unseen) > 1 else ""
        sink.error(
            "S0404", f"no output contains what this statement does{more}", place(node), "comes after the last `emit`",
            also=[(place(last_emit), "the last output is written here")], help="move it above the `emit`, or emit again below it",
            severity=Severity.WARNING,
        )  # fmt: skip


def _early(fold: ast.Operation, later: ast.Operation, sink: Sink) -> None:
    sink.error(
        "S0408", "this `fold` stands above everything in the spec that could be folded", place(fold), "folds only what the model brings along",
        also=[(place(later), "the first adapter comes here")], help="move `fold` below the adapters that it should fold",
        severity=Severity.WARNING,
    )  # fmt: skip
