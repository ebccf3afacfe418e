"""An activation that a model writes out in single operations becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgery.backends.fuse import ops_activation  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import is_call, number, only_user, same
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten

CURVED = (aten.tanh.default, aten.erf.default, aten.sigmoid.default, aten.softplus.default)
ELEMENTWISE = frozenset(
    {
        *CURVED, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.neg.default,
        aten.square.default, aten.to.dtype, aten.rsub.Scalar,
    }
)  # fmt: skip
STEPS = 5
"""How far behind the curved function the activation may end."""


def _forms() -> tuple[tuple[str, Callable[[Tensor], Tensor], Any, tuple[Any, ...], dict[str, Any]], ...]:
    """Name, function, operation, further arguments."""
    return (
        ("GELU", F.gelu, aten.gelu.default, (), {}),
        ("GELU by tanh", lambda x: F.gelu(x, approximate="tanh"), aten.gelu.default, (), {"approximate": "tanh"}),
        ("SiLU", F.silu, aten.silu.default, (), {}),
        ("quick GELU", lambda x: x * torch.sigmoid(1.702 * x), torch.ops.surgery.quick_gelu.default, (1.702,), {}),
        ("Mish", F.mish, aten.mish.default, (), {}),
    )


@cache
def _grid() -> Tensor:
    return torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.linspace(-0.1, 0.1, 21, dtype=torch.float64)])


@dataclass(frozen=True)
class WrittenActivation:
    """Operations on single elements that lead from one value to a product and have a tanh, erf, sigmoid or softplus between them are run on a
    grid of numbers and compared with GELU in both forms, SiLU, quick GELU and Mish, to one part in a million. However a model writes one of
    them, it is found; what is none of them is reported."""

    name: str = "written_activation"
    doc: str = "an activation that is written out in single operations is one operation"
    order: int = 35
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(*CURVED):
            found = self._read(view, node)
            if isinstance(found, str):
                yield Miss(view.where(node), found)
            elif found is not None:
                yield Match(node, lambda n=node: self._write(view, n), found[2][0])  # type: ignore[misc]

    def _write(self, view: FuseView, node: fx.Node) -> None:
        found = self._read(view, node)
        if not isinstance(found, tuple):
            return
        source, end, (_, _, target, more, named) = found
        with view.before(end):
            made = view.call(target, source, *more, like=end, **named)
        view.replace(end, made)

    def _read(self, view: FuseView, node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | str | None:
        """Where the activation starts and ends, and its form; why it is none; None when the function stands alone."""
        products = 0
        end: fx.Node | None = node
        for _ in range(STEPS):
            end = only_user(end)  # type: ignore[arg-type]
            if end is None or not is_call(end, *ELEMENTWISE):
                break
            if not is_call(end, aten.mul.Tensor) or _factor(view, end):
                continue  # a sum with 1 on the way, or a factor of one half behind
            for source in _sources(end):
                form = self._form(view, source, end)
                products += 1
                if form is not None:
                    follower = only_user(end)
                    if follower is not None and is_call(follower, aten.mul.Tensor) and _factor(view, follower):
                        longer = self._form(view, source, follower)
                        if longer is not None:
                            return source, follower, longer
                    return source, end, form
        if not products or (is_call(node, aten.sigmoid.default, aten.tanh.default) and products < 2):
            return None  # a gate of its own, as in a product of a tanh with something else
        return "the function of one value is none of GELU, SiLU, quick GELU and Mish"

    @staticmethod
    def _form(view: FuseView, source: fx.Node, end: fx.Node) -> Any:
        """Which activation the operations between two nodes compute; None: none, or more than one value, or a value that others read."""
        if view.dtype(source) != view.dtype(end) or not same(view, view.shape(source), view.shape(end)):
            return None
        try:
            found = _run(view, end, {source: _grid()}, end)
        except _Leaves:
            return None
        for form in _forms():
            if torch.allclose(found, form[1](_grid()), rtol=1e-6, atol=1e-6):
                return form
        return None


class _Leaves(Exception):
    """The operations read something beside the one value, or give a value in between to somebody else."""


def _run(view: FuseView, node: Any, known: dict[Any, Tensor], end: fx.Node) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if node in known:
        return known[node]
    plain = number(view, node)
    if plain is not None:
        return plain
    if not is_call(node, *ELEMENTWISE) or node.kwargs or len(known) > 24:
        raise _Leaves
    args = [_run(view, a, known, end) for a in node.args]
    if is_call(node, aten.to.dtype):
        known[node] = args[0]
    else:
        target: Any = node.target
        known[node] = target(*args)
    return known[node]


def _factor(view: FuseView, node: fx.Node) -> bool:
    """Whether a product has a plain number as one side."""
    return any(number(view, side) is not None for side in node.args[:2])


def _sources(end: fx.Node) -> list[fx.Node]:
    """The nodes that a product may be a function of, nearest first: what its operations read, and what those read, as far as they work on
    single elements."""
    found: dict[fx.Node, None] = {}
    queue = list(end.all_input_nodes)
    while queue and len(found) < 24:
        node = queue.pop(0)
        if node in found or node.op == "get_attr":
            continue
        found[node] = None
        if is_call(node, *ELEMENTWISE):
            queue.extend(node.all_input_nodes)
    return [n for n in found if len(n.users) > 1]


RULE = WrittenActivation()
