"""Values by layer: lists, tables and ramps spread over the sites of a statement. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.core import ast
from surgery.core.diagnostics import SurgeryError, error
from surgery.core.near import quoted
from surgery.core.site import Site
from surgery.core.source import NOWHERE, Span


def expand_per_layer(
    value: Any, sites: Sequence[Site], *, integer: bool = False, span: Span = NOWHERE, stacks: Mapping[str, int] | None = None
) -> list[Any]:
    """One value for each site.

    ``value`` is a plain value (the same for all), a list (one for each matched layer, in model order), a table by layer index
    (``{0..3: 4, 4..11: 8}``) or ``ramp(a, b)``: linear from the first matched layer to the last, rounded half up when
    ``integer``. Trees of a spec and plain Python values (list, tuple, dict with integer or range keys) are taken. Sites of one
    layer share its value. ``stacks`` gives the number of layers of each stack, for indices that count from the end of a table.
    Raises SurgeryError: S0307 a list of another length, S0303 a table that names a layer past the end, S0308 one that leaves out a layer or has it twice, S0309 a site
    outside of the layers.
    """
    if isinstance(value, ast.ListValue):
        return _list([_plain(v) for v in value.items], sites, span or value.span)
    if isinstance(value, (list, tuple)):
        return _list(list(value), sites, span)
    if isinstance(value, ast.Table):
        return _table([(e.key, _plain(e.value)) for e in value.entries], sites, span, stacks or {})
    if isinstance(value, Mapping):
        return _table([(_key(k), v) for k, v in value.items()], sites, span, stacks or {})
    if isinstance(value, ast.Call) and value.name == "ramp":
        first, last = (_plain(a.value) for a in value.args)
        return _ramp(first, last, sites, integer, span)
    return [_plain(value)] * max(1, len(sites))


def _plain(value: Any) -> Any:
    if isinstance(value, ast.Number | ast.String):
        return value.value
    if isinstance(value, ast.Name):
        return {"true": True, "false": False, "none": None}.get(value.value, value.value)
    return value


def _key(key: Any) -> ast.Range:
    if isinstance(key, ast.Range):
        return key
    if isinstance(key, range):
        return ast.Range(key.start, key[-1] if len(key) else key.start, key.step)
    if isinstance(key, tuple):
        return ast.Range(key[0], key[1])
    return ast.Range(int(key), int(key))


def _layers(sites: Sequence[Site], what: str, span: Span) -> list[tuple[str, int]]:
    """The matched layers as (stack, index) in order of the sites' model order."""
    outside = [s.role for s in sites if s.layer is None]
    if outside:
        raise SurgeryError(
            error(
                "S0309", f"{what} goes by layer, and {quoted(outside[:3], 'and')} {'is' if len(outside) == 1 else 'are'} in no layer",
                span, "goes by layer", help="write a statement of its own with one value for parts outside of the layers",
            )
        )  # fmt: skip
    return list(dict.fromkeys((s.stack, s.layer) for s in sites if s.layer is not None))


def _list(items: list[Any], sites: Sequence[Site], span: Span) -> list[Any]:
    layers = _layers(sites, "a list", span)
    if len(items) != len(layers):
        names = _span_text(layers)
        raise SurgeryError(
            error(
                "S0307", f"the list has {_count(len(items), 'value')}, and the selector matches {_count(len(layers), 'layer')}", span,
                f"{_count(len(items), 'value')} for {_count(len(layers), 'layer')}", notes=[f"matched: {names}"] if names else [],
                help="give one value for each matched layer, or use a table such as `{0..3: 4, 4..11: 8}` or `ramp(4, 16)`",
            )
        )  # fmt: skip
    chosen = dict(zip(layers, items, strict=True))
    return [chosen[s.stack, s.layer] for s in sites]  # type: ignore[index]


def _table(entries: list[tuple[ast.Range, Any]], sites: Sequence[Site], span: Span, stacks: Mapping[str, int]) -> list[Any]:
    layers = _layers(sites, "a table", span)
    counts = {stack: stacks.get(stack, max(i for s, i in layers if s == stack) + 1) for stack, _ in layers}
    _within_stacks(entries, {stack: stacks[stack] for stack in counts if stack in stacks}, span)
    chosen: dict[tuple[str, int], Any] = {}
    missing: list[tuple[str, int]] = []
    for stack, layer in layers:
        hits = [(key, value) for key, value in entries if _holds(key, layer, counts[stack])]
        if len(hits) > 1:
            raise SurgeryError(
                error(
                    "S0308", f"layer {layer} of `{stack or 'layers'}` has {len(hits)} values in this table", hits[1][0].span or span, "another value",
                    also=[(hits[0][0].span, "first value")] if hits[0][0].span is not NOWHERE else (),
                    help="make the ranges meet without overlap",
                )
            )  # fmt: skip
        if hits:
            chosen[stack, layer] = hits[0][1]
        else:
            missing.append((stack, layer))
    if missing:
        raise SurgeryError(
            error(
                "S0308", f"the table has no value for {_span_text(missing)}: {_count(len(missing), 'layer')} of {len(layers)} that the selector matches",
                span, f"leaves out {_count(len(missing), 'layer')}", help="add a range for them, or select only the layers that the table names",
            )
        )  # fmt: skip
    return [chosen[s.stack, s.layer] for s in sites]  # type: ignore[index]


def _within_stacks(entries: list[tuple[ast.Range, Any]], counts: Mapping[str, int], span: Span) -> None:
    """Raises S0303 for an index that none of the stacks has."""
    if not counts:
        return
    stack, most = max(counts.items(), key=lambda c: c[1])
    for key, _ in entries:
        for index in (key.start, key.stop):
            if index is not None and not -most <= index < most:
                raise SurgeryError(
                    error(
                        "S0303", f"{index} goes past the end: `{stack or 'layers'}` has {_count(most, 'layer')}", key.span or span, "in this table",
                        help=f"name layers from 0 to {most - 1}, or leave the end open as in `{min(max(0, key.start), most - 1)}..`",
                    )
                )  # fmt: skip


def _holds(key: ast.Range, layer: int, count: int) -> bool:
    first = key.start + count if key.start < 0 else key.start
    last = count - 1 if key.stop is None else (key.stop + count if key.stop < 0 else key.stop)
    return first <= layer <= last and (layer - first) % max(1, key.step) == 0


def _ramp(first: Any, last: Any, sites: Sequence[Site], integer: bool, span: Span) -> list[Any]:
    layers = _layers(sites, "a ramp", span)
    steps = max(1, len(layers) - 1)
    chosen: dict[tuple[str, int], Any] = {}
    for i, layer in enumerate(layers):
        at = first + (last - first) * i / steps
        # half up, so that ramps in both directions round alike whatever the parity
        chosen[layer] = int(at + 0.5) if integer and at >= 0 else (-int(-at + 0.5) if integer else float(at))
    return [chosen[s.stack, s.layer] for s in sites]  # type: ignore[index]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _span_text(layers: Sequence[tuple[str, int]]) -> str:
    """``layers[0..3, 7]``."""
    parts = []
    for stack in dict.fromkeys(s for s, _ in layers):
        numbers = sorted(i for s, i in layers if s == stack)
        runs: list[list[int]] = []
        for n in numbers:
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        text = ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
        parts.append(f"{stack or 'layers'}[{text}]")
    return ", ".join(parts)
