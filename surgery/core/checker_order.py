"""What the order of statements alone gets wrong, before any model is looked at."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence

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
    """Reports outputs that overwrite or contain each other, changes that no output contains, folds with nothing before them and
    expectations about folds that are not there."""
    targets: dict[str, ast.Emit] = {}
    last_emit: ast.Emit | None = None
    unseen: list[ast.Statement] = []
    adapted = False
    early_fold: ast.Operation | None = None
    folded = False
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
            else:
                _nested(node, path, targets, sink)
            targets.setdefault(path, node)
            last_emit = node
            unseen.clear()
        elif isinstance(node, ast.ExpectCheck):
            if item.call is not None and item.call.name == "same_output" and item.call.get("at") == "fold" and not folded:
                sink.error(
                    "S0240", "no statement above folds anything", node.check.span if node.check.span.end else place(node),
                    "compares the model before a `fold` with the model after it", help="move it below the `fold`, or leave it out",
                )  # fmt: skip
        elif isinstance(node, CHANGES):
            if last_emit is not None:
                unseen.append(node)
            if isinstance(node, ast.Operation):
                folded |= node.verb == "fold"
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


def _nested(node: ast.Emit, path: str, targets: Mapping[str, ast.Emit], sink: Sink) -> None:
    """Reports an output inside the folder of another: each is replaced as a whole, so the inner one would come and go with the outer."""
    for other, first in targets.items():
        if not (within(path, other) or within(other, path)):
            continue
        inner, outer = (node, first) if within(path, other) else (first, node)
        sink.error(
            "S0845", f'"{inner.to}" is inside "{outer.to}", which is an output of its own', node.to_span if node.to_span.end else node.span,
            "one output in another", also=[(first.to_span if first.to_span.end else first.span, "the other is written here")],
            help="give each output a path beside the others",
        )  # fmt: skip
        return


def within(path: str, folder: str) -> bool:
    """Whether a normalised path lies below another."""
    if folder == ".":
        return not path.startswith(("/", "..")) and path != "."
    return path.startswith(folder.rstrip("/") + "/")


def _early(fold: ast.Operation, later: ast.Operation, sink: Sink) -> None:
    sink.error(
        "S0408", "this `fold` stands above everything in the spec that could be folded", place(fold), "folds only what the model brings along",
        also=[(place(later), "the first adapter comes here")], help="move `fold` below the adapters that it should fold",
        severity=Severity.WARNING,
    )  # fmt: skip
