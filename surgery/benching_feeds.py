"""Inputs for what ``surgery bench`` runs: from names and shapes with axis names to arrays, equal for all arms. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.core.diagnostics import fail

Arrays = dict[str, Any]
"""By name: numpy arrays. Caches are ``past_key_values.LAYER.key`` and ``.value``."""


@dataclass(frozen=True)
class Input:
    """One tensor that an arm takes. ``shape``: numbers, and sums and products of axis names as text. ``below``: how many ids there are."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    below: int | None = None

    @property
    def is_cache(self) -> bool:
        """Whether it is what an earlier step gave; keys and values of an encoder's output stay the same."""
        return self.name.startswith("past_key_values.") and ".encoder." not in self.name


def from_record(record: Mapping[str, Any]) -> list[Input]:
    """The inputs that a served file states. Raises KeyError or TypeError for a damaged record."""
    return [Input(str(i["name"]), str(i["dtype"]), tuple(i["shape"]), i.get("below")) for i in record["inputs"]]


def axis(text: int | str, sizes: Mapping[str, int]) -> int:
    """The size of one axis: ``batch``, ``past+sequence``, ``2*sequence``. Raises S0898 for a name that bench gives no size."""
    if isinstance(text, int):
        return text
    total = 0
    for term in text.replace(" ", "").split("+"):
        factors = []
        for factor in term.split("*"):
            if not factor.isdigit() and factor not in sizes:
                raise fail(
                    "S0898", f"bench gives no size to the axis `{factor}`", notes=[f"an input has the shape part `{text}`"],
                    help="bench what takes a batch of token ids or images",
                )  # fmt: skip
            factors.append(int(factor) if factor.isdigit() else sizes[factor])
        total += math.prod(factors)
    return total


def sizes(inputs: Iterable[Input], batch: int, length: int, past: int = 0) -> dict[str, int]:
    """A size for every axis name: ``batch`` and ``past`` by name, all other open axes are lengths."""
    names = {
        part
        for i in inputs
        for n in i.shape
        if isinstance(n, str)
        for term in n.replace(" ", "").split("+")
        for part in term.split("*")
        if not part.isdigit()
    }
    found = dict.fromkeys(names, length)
    for name in names:
        if name == "batch" or name.startswith("batch_"):
            found[name] = batch
        elif name.startswith("past"):
            found[name] = past
    return found


def arrays(inputs: Iterable[Input], batch: int, length: int, past: int = 0, seed: int = 0) -> Arrays:
    """Seeded values: ids uniform below the vocabulary, masks of ones, types of zeros, positions that count up, floats standard normal."""
    listed = list(inputs)
    at = sizes(listed, batch, length, past)
    generator = np.random.default_rng(seed)
    return {i.name: _values(i, tuple(axis(n, at) for n in i.shape), generator, past) for i in listed}


def _values(i: Input, shape: tuple[int, ...], generator: np.random.Generator, past: int) -> Any:
    if i.dtype.startswith(("float", "bfloat")):
        wanted = i.dtype if i.dtype in ("float16", "float64") else "float32"  # numpy has no bfloat16 of its own
        return generator.standard_normal(shape, dtype=np.float32).astype(wanted)
    kind = np.dtype(i.dtype)
    if kind == np.bool_ or "mask" in i.name:
        return np.ones(shape, kind)
    if "position" in i.name:
        return np.broadcast_to(np.arange(past, past + shape[-1]), shape).astype(kind)
    if "token_type" in i.name:
        return np.zeros(shape, kind)
    high = max(2, i.below or 2)
    return generator.integers(min(3, high - 1), high, shape).astype(kind)


def merged(listed: Iterable[Iterable[Input]]) -> list[Input]:
    """The inputs of several arms, each name once; the smaller range of ids counts, so that every arm can take them. Raises S0898 when two
    arms mean different things by a name."""
    found: dict[str, Input] = {}
    for inputs in listed:
        for i in inputs:
            known = found.get(i.name)
            if known is None:
                found[i.name] = i
                continue
            if len(known.shape) != len(i.shape) or any(
                isinstance(a, int) and isinstance(b, int) and a != b
                for a, b in zip(known.shape[1:], i.shape[1:], strict=True)
                if not i.is_cache
            ):
                raise fail(
                    "S0898", f"two of what is to be compared take different inputs `{i.name}`",
                    notes=[f"one takes {_text(known)}, another {_text(i)}"], help="compare models of one kind, for example a model and what was made of it",
                )  # fmt: skip
            below = min((b for b in (known.below, i.below) if b), default=None)
            found[i.name] = Input(known.name, known.dtype, known.shape, below)
    return list(found.values())


def _text(i: Input) -> str:
    return f"{i.dtype} [{', '.join(map(str, i.shape))}]"
