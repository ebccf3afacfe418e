"""What every file for serving needs: plain nested inputs and outputs, a record of them, and numbers measured against torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from surgery.backends.onnx_certify import Case, difference
from surgery.backends.onnx_export import axis_names, input_names
from surgery.model import cost
from surgery.model.program import Program
from surgery.model.pytree import Tree
from surgery.model.sample import placeholders, vocabulary
from surgery.model.threads import one_thread

SCHEMA = "surgery.served/1"

COST_AT = (16, 48, 128)
"""Lengths at which a record states its operations: attention makes them a polynomial of degree two, which three points fix."""

# ------------------------------------------------------------------ values as plain containers


def nest(leaves: Iterator[Any], tree: Tree) -> Any:
    """The value that a tree describes, in tuples, lists and dicts alone, so that a program in any language can build and read it.

    A ``ModelOutput`` is a dict. A cache is a tuple of layers, each ``(key, value)``, with cross-attention ``(key, value, cross key,
    cross value)``. Constants are left out of dicts and are None elsewhere.
    """
    kind = tree["type"]
    if kind == "tensor":
        return next(leaves)
    if kind == "const":
        return None
    if kind == "cache":
        stacked = [[next(leaves) for _ in range(tree["layers"])] for _ in range(columns(tree))]
        return tuple(zip(*stacked, strict=True))
    items = [nest(leaves, item) for item in tree["items"]]
    if kind in ("dict", "output"):
        return {k: v for k, v, item in zip(tree["keys"], items, tree["items"], strict=True) if item["type"] != "const"}
    return items if kind == "list" else tuple(items)


def flat(value: Any, tree: Tree) -> list[Any]:
    """The leaves of a value that :func:`nest` built, in the order of the tree."""
    kind = tree["type"]
    if kind == "tensor":
        return [value]
    if kind == "const":
        return []
    if kind == "cache":
        return [layer[column] for column in range(columns(tree)) for layer in value]
    if kind in ("dict", "output"):
        pairs = [(value[k], item) for k, item in zip(tree["keys"], tree["items"], strict=True) if item["type"] != "const"]
    else:
        pairs = list(zip(value, tree["items"], strict=True))
    return [leaf for v, item in pairs for leaf in flat(v, item)]


def columns(tree: Tree) -> int:
    """How many tensors a layer of a cache has."""
    return 4 if tree["class"] == "EncoderDecoderCache" else 2


def input_tree(program: Program) -> Tree:
    """The inputs by keyword, as a dict tree."""
    tree = program.signature.in_spec
    keys = tree.get("keys") or list(range(len(tree["items"])))
    names = [key if isinstance(key, str) else program.signature.parameters[key] for key in keys]
    return {"type": "dict", "keys": names, "items": tree["items"]}


# ------------------------------------------------------------------ the record


def record(program: Program, outputs: Sequence[str]) -> dict[str, Any]:
    """What a served file says about itself, as JSON: how to call it and what a call costs.

    ``inputs``: name, dtype, shape (numbers, and sums and products of axis names), for ids the number of rows of the table that they index. ``cost``: operations
    of one forward pass of batch 1 at some lengths (see :mod:`surgery.model.cost`), ``bytes`` of all parameters.
    """
    named = axis_names(program)
    longest = _longest(program)
    found = []
    for name, (flat_name, spec) in zip(input_names(program), placeholders(program), strict=True):
        shape = [n if isinstance(n, int) else _axis(n, named) for n in spec.shape]
        below = None if spec.dtype.startswith(("float", "bfloat", "bool")) or "mask" in flat_name else _rows(program, flat_name)
        found.append({"name": name, "dtype": spec.dtype, "shape": shape, "below": below})
    lengths = (
        COST_AT if longest is None or longest >= max(COST_AT) else tuple(sorted({max(1, longest // 4), max(1, longest // 2), longest}))
    )
    return {
        "schema": SCHEMA, "model": program.info.family or program.info.architecture, "inputs": found, "outputs": list(outputs), "longest": longest,
        "params": cost.parameters(program), "bytes": cost.bytes_of(program),
        "cost": [[n, cost.count(program, n).total] for n in lengths],
    }  # fmt: skip


def _axis(size: Any, names: dict[str, str]) -> str | int:
    if not getattr(size, "free_symbols", None):
        return int(size)
    text = str(size)
    for symbol in sorted(map(str, size.free_symbols), key=len, reverse=True):
        text = text.replace(symbol, names.get(symbol, symbol))
    return text.replace(" ", "")


def _rows(program: Program, name: str) -> int | None:
    try:
        return vocabulary(program, name)
    except (AttributeError, KeyError):
        return None


def _longest(program: Program) -> int | None:
    """The length that the model's table of positions allows; None without a limit."""
    from surgery.model.data_text import longest

    found = longest(program)
    return found if found < 1 << 20 else None


def operations(found: dict[str, Any], batch: int, length: int) -> int | None:
    """Operations of one forward pass at a batch and length, from a record: the polynomial through its points."""
    points = [(int(n), int(f)) for n, f in found.get("cost", ())]
    if not points:
        return None
    total = 0.0
    for i, (n, f) in enumerate(points):
        total += f * math.prod((length - m) / (n - m) for j, (m, _) in enumerate(points) if j != i)
    return round(batch * total)


# ------------------------------------------------------------------ measured against torch


def measure(
    measured: Sequence[Case],
    run: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    names: Sequence[str],
    *,
    claim: str,
    tolerance: float,
) -> list[dict[str, Any]]:
    """Per case and output the largest absolute difference between what torch gave and what ``run`` gives for the same flat inputs, on one thread.

    ``tolerance`` is for outputs of size one and grows with the largest value.
    """
    found: list[dict[str, Any]] = []
    for case in measured:
        with one_thread(), torch.no_grad():
            got = run(case.inputs)
        for name, want, have in zip(names, case.expected, got, strict=True):
            error, scale, _ = difference(want.cpu(), have.detach().cpu().double().numpy())
            allowed = tolerance * max(1.0, scale)
            found.append(
                {
                    "claim": claim, "case": case.name, "output": name, **case.sizes, "max_abs_error": error,
                    "tolerance": allowed, "ok": error <= allowed,
                }
            )  # fmt: skip
    return found
