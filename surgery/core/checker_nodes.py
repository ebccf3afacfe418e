"""Small questions about statements and values that the checker asks."""

from __future__ import annotations

from surgery.core import ast


def references(node: ast.Statement) -> list[str]:
    names = [w.name for w in node.of] if isinstance(node, ast.Merge) else []
    using = getattr(node, "using", "")
    return [*names, using] if using else names


def input_kind(node: ast.Statement) -> str:
    return node.what if isinstance(node, ast.Load) else "data"


def defines(node: ast.Statement) -> str:
    if isinstance(node, ast.Load):
        return node.what
    kinds = {
        ast.Import: "import", ast.Param: "param", ast.Let: "let", ast.Model: "model", ast.Data: "data",
        ast.Operation: "site", ast.Merge: "site",
    }  # fmt: skip
    return kinds.get(type(node), "")


def layered(a: ast.Value, b: ast.Value) -> bool:
    """A number may be set to a list, a table or a ramp and back: the parameter it is given to decides."""
    kinds = (ast.Number, ast.ListValue, ast.Table, ast.Call)
    return isinstance(a, kinds) and isinstance(b, kinds)


def as_written(value: ast.Value) -> str:
    return f"`{value.span.text}`" if value.span.end else "of another kind"


def a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
