"""Turning what goes wrong inside a trace into a diagnostic that names the line of model code."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from surgery.core.diagnostics import SurgeryError, fail

_TORCH = os.path.dirname(torch.__file__)
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_GENERATED = ("<eval_with_key", "<frozen", "<@beartype", "<attrs", "<lambdifygenerated")
_STDLIB = sysconfig.get_paths()["stdlib"]


class Fallback(Exception):
    """A regional capture is not possible; the text says why, and the whole model is traced instead."""


def chain(error: BaseException) -> list[BaseException]:
    """``error``, what caused it and so on, each once."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def model_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of model code: not torch, not surgery, not the standard library."""
    for link in chain(error):
        frame = _innermost(traceback.extract_tb(link.__traceback__))
        if frame is not None:
            return frame
    return None


def _innermost(frames: traceback.StackSummary) -> traceback.FrameSummary | None:
    for frame in reversed(frames):
        path = frame.filename if frame.filename.startswith("<") else os.path.abspath(frame.filename)
        foreign = path.startswith((_TORCH + os.sep, _OURS + os.sep))
        plain = path.startswith(_STDLIB + os.sep) and "site-packages" not in path
        wrapper = f"{os.sep}transformers{os.sep}utils{os.sep}" in path or f"{os.sep}site-packages{os.sep}sympy{os.sep}" in path
        if not foreign and not plain and not wrapper and not frame.filename.startswith(_GENERATED):
            return frame
    return None


def _describe(frame: traceback.FrameSummary) -> str:
    parts = frame.filename.replace(os.sep, "/").split("/site-packages/")
    return f"{parts[-1]}:{frame.lineno} (in {frame.name})"


def _place(frame: traceback.FrameSummary | None, module: nn.Module) -> str:
    if frame is None:
        return type(module).__name__
    return _describe(frame)


def watch_sizes(shape_env: Any, found: dict[Any, tuple[str, str]]) -> None:
    """Notes, for each open size that becomes a number, the line of model code that runs then, and the number.

    The tracer keeps a place of its own, which is often a line of torch.
    """
    original = getattr(shape_env, "_set_replacement", None)
    if original is None or getattr(original, "watched", False):
        return

    def note(symbol: Any, target: Any, *rest: Any, **more: Any) -> Any:
        if getattr(target, "is_number", False) and symbol not in found:
            frame = _innermost(traceback.extract_stack())
            if frame is not None:
                found[symbol] = (_describe(frame), str(target))
        return original(symbol, target, *rest, **more)

    note.watched = True  # type: ignore[attr-defined]
    shape_env._set_replacement = note
    shape_env.guards = _Guards(shape_env.guards)


class _Guards(list[Any]):
    """What a trace takes for granted, with the lines of model code at which a number became a constant."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__(known)
        self.places: dict[Any, str] = {}

    def append(self, guard: Any) -> None:
        super().append(guard)
        if type(guard.expr).__name__ == "Equality" and any(side.is_number for side in guard.expr.args):
            frame = _innermost(traceback.extract_stack())
            if frame is not None:
                self.places.setdefault(guard.expr, _describe(frame))


def capture_error(error: BaseException, module: nn.Module, fixed: dict[Any, tuple[str, str]] | None = None) -> SurgeryError:
    """The diagnostic for an exception that ended a trace.

    S0501: anything the tracer cannot follow; S0502: code that depends on values in a tensor; S0503: a size that was to stay
    open is fixed by the model.
    """
    for link in chain(error):
        if isinstance(link, SurgeryError):
            return link
    frame = model_frame(error)
    where = _place(frame, module)
    line = f"the line is: {frame.line}" if frame is not None and frame.line else ""
    kinds = {type(link).__name__ for link in chain(error)}
    text = " ".join(str(link) for link in chain(error))
    reason = _first_line(str(error))
    notes = [n for n in (line, f"the tracer says: {reason}" if reason else "") if n]
    name = type(module).__name__
    data = {"GuardOnDataDependentSymNode", "DataDependentOutputException", "UserErrorType"} & kinds
    if (
        data
        or "data-dependent" in text
        or "Cannot call item() on" in text
        or ".item() on a meta" in text
        or "Tensor.item() cannot be called on meta" in text
    ):
        return fail(
            "S0502", f"{name} cannot be captured: {where} depends on values in a tensor",
            notes=notes, help="rewrite that line with tensor operations such as torch.where, or wrap the part that has it and give its result as an input",
        )  # fmt: skip
    if "ConstraintViolation" in " ".join(kinds) or "ConstraintViolationError" in text or "specialized" in text:
        place, number = next(iter((fixed or {}).values()), ("", ""))
        return fail(
            "S0503", f"{name} fixes a size that was to stay open" + (f": {place}" if place else f" at {where}"),
            notes=[f"after that line the size can only be {number}"] if number else notes, help="leave that axis out of `dynamic`, or make the model take any size there",
        )  # fmt: skip
    return fail(
        "S0501", f"{name} cannot be captured: {where} does something that the tracer cannot follow",
        notes=notes, help="the model must run on tensors of any batch size without Python code that looks into them",
    )  # fmt: skip


_LARGER = (*range(33), 101, 1009)
_REMAINDERS = 1100
"""So many lengths up to the model's longest are tried: a remainder by anything smaller comes back among them."""


def _never(expr: Any, hints: dict[Any, int], symbol: Any, sizes: Sequence[int]) -> bool:
    """Whether an equation holds for none of these sizes of a symbol."""
    import sympy

    return all(expr.subs({**hints, symbol: size}) == sympy.false for size in sizes)


def refuse_fixed_counts(module: nn.Module, graph: fx.Graph) -> None:
    """S0503 where a number that grows with an open size, such as how often a loop over blocks runs, is that of the traced size in the graph.

    The tracer takes it as known as long as some sizes have it. Here no larger one may be left: a number that comes back (a remainder) or stays
    (a bound) fixes nothing.
    """
    import sympy

    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    far = range(max(limit - _REMAINDERS, 1), limit + 1) if isinstance(limit, int) else range(0)
    values = (n.meta.get("val") for n in graph.find_nodes(op="placeholder"))
    sizes = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return
    env = sizes[0].node.shape_env
    for guard in env.guards:
        expr = env.simplify(guard.expr)
        if not isinstance(expr, sympy.Eq) or not any(side.is_number for side in expr.args):
            continue
        hints = {s: int(env.backed_var_to_val[s]) for s in expr.free_symbols if s in env.backed_var_to_val}
        if len(hints) != len(expr.free_symbols):
            continue
        for symbol, hint in hints.items():
            near = [2 * hint + more for more in _LARGER]
            if not any(len(larger) and _never(expr, hints, symbol, larger) for larger in (near, far)):
                continue
            fits = [n for n in range(1, 2 * hint + _LARGER[-1]) if expr.subs({**hints, symbol: n}) == sympy.true]
            place = getattr(env.guards, "places", {}).get(guard.expr)
            raise fail(
                "S0503", f"{type(module).__name__} fixes a size that was to stay open" + (f": {place}" if place else ""),
                notes=[f"a number that grows with the size is fixed there: the graph would fit sizes of {min(fits)} to {max(fits)} only"] if fits else [],
                help="leave that axis out of `dynamic`, or make the model take any size there",
            )  # fmt: skip


def _first_line(text: str) -> str:
    for line in text.splitlines():
        if line.strip():
            return line.strip()[:200]
    return ""


_PRODUCTS = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
    "conv1d",
    "conv2d",
    "convolution",
)


def refuse_data_sizes(module: nn.Module, graph: fx.Graph) -> None:
    """S0502 where a product has a size that depends on values in a tensor (``x[x > 0]``): no plan could count it, no other batch would fit.

    The tracer lets such sizes pass as symbols of their own. The line named is the one that makes the size.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def open_sizes(node: fx.Node) -> set[Any]:
        value = node.meta.get("val")
        return set(free_unbacked_symbols(value)) if isinstance(value, torch.Tensor) else set()

    found = next(
        (n for n in graph.nodes if str(n.target).split(".")[-2:-1] and str(n.target).split(".")[-2] in _PRODUCTS and open_sizes(n)), None
    )
    if found is None:
        return
    sizes = open_sizes(found)
    made = next(n for n in graph.nodes if open_sizes(n) & sizes)
    lines = [ln.strip() for ln in str(made.meta.get("stack_trace") or "").splitlines() if ln.strip()]
    at = next((i for i in reversed(range(len(lines))) if lines[i].startswith("File ")), None)
    place = re.sub(r'^File "(.*?)", line (\d+), in (.*)$', r"\1:\2 (in \3)", lines[at]) if at is not None else type(module).__name__
    raise fail(
        "S0502", f"{type(module).__name__} cannot be captured: {place.split('/site-packages/')[-1]} depends on values in a tensor",
        notes=[f"the line is: {lines[at + 1]}"] if at is not None and at + 1 < len(lines) else [],
        help="rewrite that line so that sizes do not depend on values, for example with torch.where or a mask",
    )  # fmt: skip
