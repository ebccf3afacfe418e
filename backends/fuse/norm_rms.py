"""A root-mean-square norm that is written out becomes one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_norm  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import hoist, is_call, number, only_user, operand, pair, same, with_number
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.type_as.default, aten._to_copy.default)


@dataclass(frozen=True)
class _Norm:
    """The parts of a norm: what is normalised, the gain (None: none), eps, and the node that the norm ends with."""

    x: fx.Node
    weight: fx.Node | None
    eps: float
    end: fx.Node
    steps: frozenset[fx.Node] = field(default_factory=frozenset)


@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x^2) + eps)``, times a gain. The square may be a power or a product, the mean over the last axis; casts to float32 and
    back belong to it, and so does a gain of ``1 + w``. The result has the type of ``x``, otherwise the norm stays as it is."""

    name: str = "rms_norm"
    doc: str = "a written-out root-mean-square norm is one operation"
    order: int = 36
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(aten.rms_norm.default):
            shape = operand(node, "normalized_shape")
            if len(shape) == 1 and operand(node, "eps") is not None:
                yield Match(node, lambda n=node: self._direct(view, n), "one norm")  # type: ignore[misc]
            else:
                yield Miss(
                    view.where(node), "the norm is over several axes or has no eps", f"axes {list(shape)}, eps {operand(node, 'eps')}"
                )
        for node in view.calls(aten.rsqrt.default):
            found = self._read(view, node)
            if isinstance(found, tuple):
                yield Miss(view.where(node), *found)
            elif found is not None:
                gain = "" if found.weight is None else " with its gain"
                yield Match(node, lambda n=node: self._write(view, n), f"one norm{gain}")  # type: ignore[misc]

    def _direct(self, view: FuseView, node: fx.Node) -> None:
        with view.before(node):
            made = view.call(torch.ops.surgery.rms_norm.default, node.args[0], operand(node, "weight"), operand(node, "eps"), like=node)
        view.replace(node, made)

    def _write(self, view: FuseView, node: fx.Node) -> None:
        found = self._read(view, node)
        if not isinstance(found, _Norm) or (found.weight is not None and not hoist(view, found.weight, found.end)):
            return
        with view.before(found.end):
            made = view.call(torch.ops.surgery.rms_norm.default, found.x, found.weight, found.eps, like=found.end)
        view.replace(found.end, made)

    # ---------------------------------------------------------------- reading

    def _read(self, view: FuseView, root: fx.Node) -> _Norm | tuple[str, str] | None:
        """The norm around an inverse root; the first condition that fails; None when this is no mean of squares at all."""
        shifted = with_number(view, root.args[0], aten.add.Tensor)
        mean: Any = shifted[0] if shifted is not None else root.args[0]
        if not is_call(mean, aten.mean.dim):
            return None
        squared = _squared(view, mean.args[0])
        if squared is None:
            return None
        if shifted is None:
            return "no number is added to the mean of squares", mean.name
        axes = [int(a) % view.rank(squared) for a in operand(mean, "dim") or ()]
        if axes != [view.rank(squared) - 1] or not operand(mean, "keepdim"):
            return "the mean is not over the last axis alone", f"axes {axes}"
        eps = float(shifted[1])
        scaled = only_user(root)
        sides = pair(scaled, aten.mul.Tensor)
        if scaled is None or sides is None:
            return "the inverse root is more than a factor of one value", root.name
        value = sides[0] if sides[1] is root else sides[1]
        x = _uncast(squared)
        if _uncast(value) is not x:
            return "what is divided is not what was squared", f"{value.name} and {squared.name}"
        return self._gain(view, _Norm(x, None, eps, scaled))

    def _gain(self, view: FuseView, norm: _Norm) -> _Norm | tuple[str, str]:
        """The norm with its gain and the casts behind it, as far as one value is read by one node."""
        width = view.shape(norm.x)[-1]
        end, weight = norm.end, None
        while True:
            user = only_user(end)
            sides = pair(user, aten.mul.Tensor)
            if is_call(user, *_CASTS) and user.args[0] is end:  # type: ignore[union-attr]
                end = user  # type: ignore[assignment]
            elif weight is None and sides is not None and user is not None:
                other = sides[0] if sides[1] is end else sides[1]
                if other is end or not same(view, view.shape(other), (width,)):
                    break
                end, weight = user, other
            else:
                break
        while is_call(end, *_CASTS) and view.dtype(end) != view.dtype(norm.x) and view.dtype(end.args[0]) == view.dtype(norm.x):
            end = end.args[0]  # type: ignore[assignment]  # a cast to a third type behind the norm is not the norm's
        if view.dtype(end) != view.dtype(norm.x):
            types = [str(view.dtype(n)).removeprefix("torch.") for n in (norm.x, end)]
            return "the result has another type than the input", " and ".join(types)
        return _Norm(norm.x, weight, norm.eps, end)


def _squared(view: FuseView, node: Any) -> fx.Node | None:
    """The value whose square a node is."""
    if is_call(node, aten.pow.Tensor_Scalar) and number(view, node.args[1]) == 2:
        return node.args[0]  # type: ignore[no-any-return]
    if is_call(node, aten.square.default):
        return node.args[0]  # type: ignore[no-any-return]
    sides = pair(node, aten.mul.Tensor)
    return sides[0] if sides is not None and sides[0] is sides[1] else None


def _uncast(node: fx.Node) -> fx.Node:
    """What a value was before a cast to float32."""
    if is_call(node, *_CASTS) and isinstance(node.args[0], fx.Node):
        wide, narrow = node.meta.get("val"), node.args[0].meta.get("val")
        if wide is not None and narrow is not None and wide.dtype in (torch.float32, torch.float64) and narrow.is_floating_point():
            return node.args[0]
    return node


RULE = RmsNorm()
