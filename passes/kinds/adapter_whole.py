"""Weights that an adapter makes functions of themselves, in the program as it is: as they are, or through the index sets of a cut.

An adapter that was trained before a cut changes the weight that stood there then. Its change ``f(W) - W`` is computed on that weight and loses the
rows and columns that the weight lost:

    W' = W_now + select(f(W_then) - W_then)

``W_then`` is known where the cut is a statement of this spec. Kinds that add something that does not depend on the weight need only its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.adapter import Adapter
from surgery.model.adapter_forms import FUNCTIONS, Dense
from surgery.model.dims.masks import to_ranges
from surgery.model.past import Ancestor
from surgery.model.program import Program
from surgery.model.weights import Add, Apply, Cast, Expr, Init, Reshape, Scale, Select, cast, select
from surgery.passes.kinds.adapter_frames import Frame

Function = tuple[str, tuple[Expr, ...], tuple[tuple[str, Any], ...]]
"""Name, arguments behind the weight, and parameters."""


def whole(
    program: Program, adapter: Adapter, part: Dense, frame: Frame, sites: Mapping[str, Site], span: Span
) -> tuple[dict[str, Expr], bool] | None:
    """The weight that a part makes of the program's, its bias where that changes, too, and whether they were carried over a cut; None where a
    statement took the layer away. Raises S0789 where what is needed of the weight before the cut is not known."""
    here = frame.find(f"{part.path}.weight")
    if here is None:
        return None
    name, was = here
    if was.why:
        raise stuck(adapter, part.path, was.why, span)
    site = sites[name.removesuffix(".weight")]
    axis = site.out_axis if part.axis == "out" else site.in_axis
    out: dict[str, Expr] = {}
    if part.function:
        out[name] = _changed(program, adapter, part, name, was, axis, _named(part.function, part.tensors, part.params), span)
    bias = frame.find(f"{part.path}.bias") if site.bias and (part.stretch is not None or part.bias) else None
    if bias is not None:
        if bias[1].why:
            raise stuck(adapter, f"{part.path}.bias", bias[1].why, span)
        if part.stretch is not None:
            out[bias[0]] = _changed(program, adapter, part, *bias, 0, _named("stretched", (part.stretch,), ()), span)
        else:
            own = part.bias_tensors is not None
            tensors: tuple[Expr, ...] = part.bias_tensors if part.bias_tensors is not None else part.tensors
            params = part.bias_params if own else part.params
            if part.reads_weight:
                if was.source is None and was.cut:
                    raise stuck(adapter, part.path, "its bias depends on the weight before the cut, which is not stored any more", span)
                tensors = (was.source if was.cut and was.source is not None else _now(program, name), *tensors)
                params = (("inputs", axis), *params)
            out[bias[0]] = _changed(program, adapter, part, *bias, 0, _named(part.bias, tensors, params), span)
    return out, was.cut or (bias is not None and bias[1].cut)


def _named(function: str, tensors: Iterable[Expr], params: tuple[tuple[str, Any], ...]) -> Function:
    return (function if ":" in function else f"{FUNCTIONS}:{function}"), tuple(tensors), params


def _now(program: Program, name: str) -> Expr:
    return program.weights[program.aliases.get(name, name)]


def _changed(program: Program, adapter: Adapter, part: Dense, name: str, was: Ancestor, axis: int, function: Function, span: Span) -> Expr:
    """One tensor as a function of itself. ``axis`` is that of the inputs (of a bias its only one)."""
    old = _now(program, name)
    called, given, params = function
    if called == f"{FUNCTIONS}:stretched":
        kept = was.kept[axis] if was.cut else None
        made = [Reshape((part.size,), t.dtype, t) for t in given]
        given = tuple(t if kept is None else select(t, 0, to_ranges(kept)) for t in made)
        return Apply(old.shape, "float32", called, (old, *given), (("axis", axis), *params))

    def of(weight: Expr) -> Expr:
        return Apply(tuple(weight.shape), "float32", called, (weight, *given), (("axis", axis), *params))

    if not was.cut or (part.function == "turned" and was.kept[axis] is None):
        return of(old)
    if part.adds:
        zero = Init(was.shape, "float32", "zeros")
        return Add(old.shape, "float32", (cast(old, "float32"), _left(of(zero), was)))
    if was.source is None:
        raise stuck(adapter, part.path, "it changes the weight as a whole, and the weight before the cut is not stored any more", span)
    if _only_cut(old, was.source):
        return _left(of(was.source), was)
    before = cast(was.source, "float32")
    minus = Scale(old.shape, "float32", _left(before, was), -1.0)
    return Add(old.shape, "float32", (cast(old, "float32"), _left(of(was.source), was), minus))


def _left(expr: Expr, was: Ancestor) -> Expr:
    """What is left of a tensor that has the shape from before the cut."""
    for axis, mask in enumerate(was.kept):
        expr = expr if mask is None else select(expr, axis, to_ranges(mask))
    return expr


def _only_cut(expr: Expr, source: Expr) -> bool:
    """Whether nothing but a selection stands between a tensor and the one that it was cut from."""
    while expr is not source:
        if not isinstance(expr, Select | Cast):
            return False
        expr = expr.source
    return True


def stuck(adapter: Adapter, path: str, why: str, span: Span) -> SurgeryError:
    """S0789."""
    return fail(
        "S0789", f"{adapter.name} cannot be carried over to `{path}`: {why}", span, "merged here",
        help="merge the adapter above the statement that changed the model: it is cut along, or folded first where that takes no adapters",
    )  # fmt: skip
