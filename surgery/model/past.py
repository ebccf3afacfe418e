"""What the tensors of a program were in the model that it was made from: names before layers were numbered anew, and what is kept of each axis.

An adapter that was trained on the model before a cut fits the model after it through these index sets. Within a spec they stand in the
expressions of the weights (selections of stored tensors); an artifact's tensors are stored cut, so its record keeps them, each set of
positions once, packed.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from surgery.core.source import portable
from surgery.model.graphnames import malformed
from surgery.model.weights import Add, Apply, Cast, Expr, Masked, Scale, Select, Update

Kept = tuple["np.ndarray | None", ...]
"""For each axis which positions are kept (bool, of the earlier size), None where all are."""

SAME_AXES = (":merged", ":fold", ":principal")
"""Functions of methods whose result has the axes of their first argument: merges, folds, and a weight without its principal part."""


@dataclass(frozen=True)
class Ancestor:
    """One tensor of an earlier model: its name and shape there and what is kept of it. ``why`` says why that cannot be told.

    ``source`` is its expression before anything was cut, where that is known.
    """

    name: str
    shape: tuple[int, ...]
    kept: Kept = ()
    why: str = ""
    source: Expr | None = field(default=None, compare=False)

    @property
    def cut(self) -> bool:
        return any(k is not None for k in self.kept)


@dataclass(frozen=True)
class Past:
    """``names`` are the tensors of the model as it was opened, by name with their shapes; ``moved`` maps beginnings of paths to what they were
    then. ``model`` says what the first model of all was (``ref``, ``hash``), ``ancestors`` what opened tensors were there, as far as they
    differ, and ``gone`` its tensors of which nothing was left."""

    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    ancestors: Mapping[str, Ancestor] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()

    def renamed(self, moves: Mapping[str, str]) -> Past:
        """After modules moved: ``moves`` maps the beginning of a path to its new one."""
        made = {new: self.former(old) for old, new in moves.items()}
        kept = {k: v for k, v in self.moved.items() if k not in moves and k not in made}
        return replace(self, moved={**kept, **made})

    def former(self, path: str) -> str:
        """What a path or a name was when the model was opened."""
        parts = path.split(".")
        for n in range(len(parts), 0, -1):
            old = self.moved.get(".".join(parts[:n]))
            if old is not None:
                return ".".join([old, *parts[n:]])
        return path


def begin(program: Any) -> Past:
    """The past of a program that a spec starts from."""
    past: Past = program.past
    added = {t for a in program.attachments for t in a.tensors}
    shapes = {n: tuple(e.shape) for n, e in program.weights.items() if n not in added}
    shapes |= {n: shapes[first] for n, first in program.aliases.items() if first in shapes}
    model = past.model or {"ref": portable(program.info.ref), "hash": program.info.hash}
    return replace(past, names=shapes, moved={}, model=model)


def traced(expr: Expr) -> tuple[Expr, Kept, str]:
    """The expression that ``expr`` selects from, what is kept of each of its axes, and why that cannot be said (else empty)."""
    kept: list[np.ndarray | None] = [None] * len(expr.shape)
    at = expr
    while True:
        below = _below(at)
        if below is None:
            break
        if isinstance(at, Select):
            own = np.concatenate([np.arange(a, b) for a, b in at.ranges]) if at.ranges else np.zeros(0, int)
            before = kept[at.axis]
            kept[at.axis] = own if before is None else own[before]
        at = below
    if isinstance(at, Apply):
        return at, (), f"it is computed by {at.function.partition(':')[0].replace('/', ' ')}"
    masks: list[np.ndarray | None] = []
    for size, positions in zip(at.shape, kept, strict=True):
        if positions is None:
            masks.append(None)
            continue
        if (np.diff(positions) <= 0).any():
            return at, (), "its positions were put into another order"
        mask = np.zeros(size, bool)
        mask[positions] = True
        masks.append(None if mask.all() else mask)
    return at, tuple(masks), ""


def _below(expr: Expr) -> Expr | None:
    match expr:
        case Select() | Cast() | Scale() | Masked() | Update():
            return expr.source
        case Add() if expr.parts and expr.parts[0].shape == expr.shape:
            return expr.parts[0]
        case Apply() if expr.function.endswith(SAME_AXES) and expr.args and expr.args[0].shape == expr.shape:
            return expr.args[0]
    return None


def opened(program: Any) -> dict[str, Ancestor]:
    """For each tensor of ``program`` that was in the model as it was opened: which one it was there, and what is kept of it."""
    past: Past = program.past
    out: dict[str, Ancestor] = {}
    known: dict[str, tuple[Expr, Kept, str]] = {}
    for name in (*program.weights, *program.aliases):
        old = past.former(name)
        if old not in past.names:
            continue
        first = program.aliases.get(name, name)
        if first not in known:
            known[first] = traced(program.weights[first])
        source, kept, why = known[first]
        if not why and tuple(source.shape) != past.names[old]:
            why = "it was rebuilt"
        out[name] = Ancestor(old, past.names[old], () if why else kept, why, source)
    return out


def first(program: Any) -> dict[str, Ancestor]:
    """The same for the first model of all: what :func:`opened` says, on top of what the record of the opened artifact says."""
    past: Past = program.past
    out: dict[str, Ancestor] = {}
    for name, here in opened(program).items():
        before = past.ancestors.get(here.name)
        if before is None:
            out[name] = here
        else:
            why = here.why or before.why
            kept = () if why else tuple(_onto(a, b) for a, b in zip(before.kept, here.kept, strict=True))
            out[name] = Ancestor(before.name, before.shape, kept, why, None if before.cut else here.source)
    return out


def _onto(before: np.ndarray | None, after: np.ndarray | None) -> np.ndarray | None:
    """What two cuts one after the other keep."""
    if before is None or after is None:
        return after if before is None else before
    mask = before.copy()
    mask[np.flatnonzero(before)[~after]] = False
    return mask


def names_of_first(past: Past) -> set[str]:
    """All tensors that the first model had."""
    return {past.ancestors[n].name if n in past.ancestors else n for n in past.names} | past.gone


# ------------------------------------------------------------------ as data


def as_json(program: Any) -> dict[str, Any]:
    """The past of a program as it is now, for a record: for whoever opens it these are ancestors."""
    past: Past = program.past
    if not past.names:  # never taken up by a spec
        return _dump(past.model, past.ancestors, past.gone)
    now = first(program)
    there = {a.name for a in now.values()}
    differs = {n: a for n, a in now.items() if a.cut or a.why or a.name != n}
    return _dump(past.model, differs, frozenset(names_of_first(past) - there))


def _dump(model: Mapping[str, str], ancestors: Mapping[str, Ancestor], gone: frozenset[str]) -> dict[str, Any]:
    sets: dict[str, int] = {}

    def number(mask: np.ndarray | None) -> int | None:
        if mask is None:
            return None
        text = f"{mask.size}:" + base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode("ascii")
        return sets.setdefault(text, len(sets))

    tensors: dict[str, Any] = {}
    for name, a in ancestors.items():
        entry: dict[str, Any] = {"shape": list(a.shape)}
        if a.name != name:
            entry["name"] = a.name
        if a.why:
            entry["why"] = a.why
        elif a.cut:
            entry["kept"] = [number(k) for k in a.kept]
        tensors[name] = entry
    return {"model": dict(model), "sets": list(sets), "tensors": tensors, "gone": sorted(gone)}


def of_json(data: Any) -> Past:
    """The past in a record. Raises S0826 for data that is not what :func:`as_json` writes."""
    if data is None:
        return Past()
    try:
        sets = [_mask(text) for text in data["sets"]]
        ancestors = {str(n): _ancestor(str(n), entry, sets) for n, entry in data["tensors"].items()}
        return Past(
            model={str(k): str(v) for k, v in data["model"].items()}, ancestors=ancestors, gone=frozenset(str(n) for n in data["gone"])
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, zlib.error) as exc:
        raise malformed("what it says of the model that it was made from cannot be read") from exc


def _mask(text: str) -> np.ndarray:
    size, _, packed = text.partition(":")
    count = int(size)
    if not 0 < count < 1 << 31:
        raise ValueError(size)
    room = math.ceil(count / 8)
    raw = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), room)
    bits = np.unpackbits(np.frombuffer(raw, np.uint8))[:count].astype(bool)
    if bits.size != count:
        raise ValueError(size)
    return bits


def _ancestor(name: str, entry: Mapping[str, Any], sets: list[np.ndarray]) -> Ancestor:
    shape = tuple(int(n) for n in entry["shape"])
    numbers = entry.get("kept") or [None] * len(shape)
    kept = tuple(None if i is None else sets[int(i)] for i in numbers)
    if len(kept) != len(shape) or any(k is not None and k.size != n for k, n in zip(kept, shape, strict=True)):
        raise ValueError(name)
    why = str(entry.get("why", ""))
    return Ancestor(str(entry.get("name", name)), shape, () if why else kept, why)
