"""Modules whose code computes something else in evaluation than in training, which one graph cannot hold.

A model is traced as in training, so that its dropouts stay. Most code that asks for ``self.training`` draws random numbers, which the leaves of a graph switch
off; some takes another branch. Those modules are found by their code, and the two traces are compared.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from surgery.model.capture import dropouts
from surgery.model.capture.stacks import is_drop_path

_DRAWS = ("rand", "uniform_", "normal_", "bernoulli", "exponential_", "gumbel", "dropout")
_ELSEWHERE = ("checkpoint", "past_key_values", "cache", "labels", "mask_time", "mask_feature", "requires_grad")
"""What is asked together with the mode where a branch makes no difference to the outputs or is told elsewhere: memory in training, caches, losses, SpecAugment."""


def two_faced(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in training mode whose class may compute something else in evaluation, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if module.training and _branches(type(module)) and not is_drop_path(module) and not dropouts.is_dropout(module)
    }


def steps(graph: fx.GraphModule) -> list[Any]:
    """What a tree of graphs computes, without names: equal lists compute the same."""
    out: list[Any] = []
    for path, module in graph.named_modules(remove_duplicate=False):
        if not isinstance(module, fx.GraphModule):
            out.append((path, type(module)))
            continue
        place = {node: i for i, node in enumerate(module.graph.nodes)}
        for node in module.graph.nodes:
            given = fx.node.map_arg((node.args, node.kwargs), lambda n, place=place: ("node", place[n]))  # type: ignore[misc]
            out.append((path, node.op, str(node.target) if node.op != "placeholder" else "", repr(given)))
    return out


def _branches(kind: type[nn.Module]) -> bool:
    """Whether a class has a branch on ``self.training`` that is more than random draws."""
    if kind not in _KNOWN:
        _KNOWN[kind] = _has_branches(kind)
    return _KNOWN[kind]


_KNOWN: dict[type, bool] = {}


def _has_branches(kind: type[nn.Module]) -> bool:
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        if owner.__module__.startswith("torch."):
            continue
        for value in vars(owner).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if code is not None and "training" in code.co_names and any(_differs(branch) for branch in _ifs(inspect.unwrap(value))):
                return True
    return False


def _ifs(function: Any) -> Iterator[ast.If]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # code without a source to read
        return
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.If) and _asks(n.test))


def _asks(test: ast.expr) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == "training" for n in ast.walk(test))


def _differs(branch: ast.If) -> bool:
    test = ast.unparse(branch.test)
    if any(word in test for word in _ELSEWHERE):
        return False
    bodies = [branch.orelse] if branch.orelse else [branch.body]
    if not branch.orelse and not any(
        isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not) and _asks(n.operand) for n in ast.walk(branch.test)
    ):
        return not any(word in ast.unparse(n) for n in branch.body for word in _DRAWS)
    return any(not isinstance(n, (ast.Pass, ast.Raise)) for body in bodies for n in body)
