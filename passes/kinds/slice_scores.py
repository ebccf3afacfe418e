"""Scores of units: element scores of every stored tensor summed over all positions that belong to a unit.

A unit's score is the sum over the members of its group, that is over every stored parameter and every axis of it on which the unit
has positions: for a head its rows of the query, key and value weights and biases and its columns of the output weight. Sums are in
double precision and in one fixed order, so that they do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from surgery.model import cost
from surgery.model.dims import Dims
from surgery.model.program import Program
from surgery.model.stored import torch_dtype
from surgery.model.streams import stream_of
from surgery.model.study import Study
from surgery.model.threads import alone, one_thread
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.kinds.slice_targets import Target, Units, tensors
from surgery.passes.operation import Resolved

FREE = ("magnitude", "l2")
"""Scores of the weights alone. ``random`` and ``file`` read no weights either; all others read data."""

DATA = ("taylor", "taylor_signed", "taylor_mix", "fisher", "wanda", "activation")

Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Index: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

WORKERS = 4
"""Most parameters that are read and summed at once."""

CHUNK = 1 << 17
"""Elements that are summed at a time: a block in double precision stays in the cache, and little memory is needed beside the tensor."""


@dataclass(frozen=True)
class Use:
    """Positions of one axis of a stored tensor that belong to units of a target: ``index`` holds the unit at each, -1 for none."""

    target: int
    axis: int
    index: Index


def uses(program: Program, targets: Sequence[Target]) -> dict[str, list[Use]]:
    """Where the units of the targets stand in the parameters, by parameter in graph order. Buffers have no say."""
    dims = program.dims
    parameters = set(cost.parameter_names(program))
    found: dict[str, list[Use]] = {}
    for number, target in enumerate(targets):
        for name in tensors(dims, target):
            if name not in parameters or not program.weights[name].dtype.startswith(("float", "bfloat")):
                continue
            for axis, expression in enumerate(dims.parameter(name)):
                index = positions(dims, expression, target.units)
                if (index >= 0).any():
                    found.setdefault(name, []).append(Use(number, axis, index))
    order = {name: i for i, name in enumerate(dims.parameters)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def positions(dims: Dims, expression: Any, units: Units) -> Index:
    """The unit at every position of a stored axis, -1 where there is none; unit ``g R + r`` for the pair of two leaves."""
    inner: Index | None = None
    outer: Index | None = None
    for leaf, index in dims.occurrences(expression):
        if leaf == units.inner:
            inner = index if inner is None else np.maximum(inner, index)
        elif leaf == units.outer:
            outer = index if outer is None else np.maximum(outer, index)
    size = dims.size(expression)
    if inner is None or (units.outer is not None and outer is None):
        return np.full(size, -1, np.int64)
    if units.outer is None:
        return inner
    assert outer is not None
    return np.where((inner >= 0) & (outer >= 0), outer * units.inner.size + inner, -1)


def unit_scores(program: Program, op: Resolved, targets: Sequence[Target]) -> list[Vector] | None:
    """A score for every unit of every target; None while planning where the score reads weights or data.

    Raises S0451 for scores that are not finite, S0453 for units that the score says nothing of, S0277 and S0278 for a file of scores.
    """
    params = op.method.params()
    score = params["score"]
    if score == "random":
        return [_random(target, op.seed) for target in targets]
    if score == "file":
        return _from_file(op, targets)
    if op.study is None:
        return None
    where = uses(program, targets)
    totals = [np.zeros(target.size) for target in targets]
    done = 0
    covered: set[int] = set()
    for name, marginals in _marginals(program, op, score, where):
        done += 1
        op.study.progress(f"scoring by {score}", done, len(where))
        for use in where[name]:
            along = marginals.get(use.axis)
            if along is None:
                continue
            if not np.isfinite(along).all():
                raise faults.not_finite(op, name, "values" if score in FREE else f"{score} scores")
            covered.add(use.target)
            there = use.index >= 0
            member = np.bincount(use.index[there], weights=along[there], minlength=len(totals[use.target]))
            totals[use.target] += np.abs(member) if score == "taylor_signed" else member
    bare = next((t for i, t in enumerate(targets) if i not in covered), None)
    if bare is not None:
        raise faults.without_score(op, getattr(op.method, "noun", "unit"), bare, score)
    return totals


def _marginals(program: Program, op: Resolved, score: str, where: dict[str, list[Use]]) -> Iterator[tuple[str, dict[int, Vector]]]:
    """For each parameter its element scores summed along each axis that is used: ``(name, {axis: sums})``."""
    assert op.study is not None
    if score in FREE:
        study, workers = op.study, max(1, min(WORKERS, torch.get_num_threads()))

        def sums(name: str) -> dict[int, Vector]:
            return {axis: _sums(study, program, name, axis, score == "l2") for axis in {u.axis: None for u in where[name]}}

        with one_thread(), ThreadPoolExecutor(workers, thread_name_prefix="scores", initializer=alone) as pool:
            yield from zip(where, pool.map(sums, where), strict=True)
        return
    from surgery.model.scores import element_scores

    for name, value, axes in element_scores(op.study, program, op.data, score, list(where), span=op.origin.span):
        wanted = {u.axis: None for u in where[name]}
        yield name, {axis: marginal(value, axes.index(axis), squared=False, plain=True) for axis in wanted if axis in axes}


def _sums(study: Study, program: Program, name: str, axis: int, squared: bool) -> Vector:
    """:func:`marginal` of a stored parameter. Its bytes are read block by block where that can be, so that it is never in memory as a whole."""
    expr = program.weights[program.aliases.get(name, name)]
    stream = stream_of(expr)
    plan = _Plan.of(expr.shape, axis)
    if stream is None or not plan.even or not stream.unit:
        # not kept: most tensors are read again only when they are written
        return marginal(study.tensors.fresh(program, name, {}), axis, squared=squared)
    dtype = torch_dtype(expr.dtype)
    buffer = bytearray(plan.most * dtype.itemsize)

    def blocks() -> Iterator[torch.Tensor]:
        assert stream is not None
        for size, fill in stream.pieces(len(buffer)):
            view = memoryview(buffer)[:size]
            fill(view)
            yield torch.frombuffer(view, dtype=dtype)

    return _summed(plan, blocks(), dtype, squared=squared)


@dataclass(frozen=True)
class _Plan:
    """In which blocks a tensor of ``before x size x after`` elements is summed along ``size``: ``many`` of the first axis, ``rows`` of the second."""

    before: int
    size: int
    after: int
    many: int
    rows: int

    @staticmethod
    def of(shape: tuple[int, ...], axis: int) -> _Plan:
        size, after = shape[axis], math.prod(shape[axis + 1 :])
        rows = max(1, CHUNK // max(1, after))
        return _Plan(math.prod(shape[:axis]), size, after, max(1, CHUNK // max(1, size * after)), min(rows, max(1, size)))

    @property
    def most(self) -> int:
        """Elements of the largest block."""
        return min(self.many, self.before) * self.rows * self.after

    @property
    def even(self) -> bool:
        """Whether every block but the last has this size."""
        return self.most > 0 and (self.before == 1 or self.rows == self.size)

    def steps(self) -> Iterator[tuple[int, int, int, int]]:
        """``(first, how many)`` of the first axis and of the second, block by block, in the order of the elements."""
        for i in range(0, self.before, self.many):
            for start in range(0, self.size, self.rows):
                yield i, min(self.many, self.before - i), start, min(self.rows, self.size - start)


def marginal(tensor: torch.Tensor, axis: int, *, squared: bool, plain: bool = False) -> Vector:
    """Absolute values (or squares, or the values themselves if ``plain``) summed over every axis but one, in float64.

    NumPy sums on one thread in a fixed order, which is what makes the result the same everywhere.
    """
    plan = _Plan.of(tuple(tensor.shape), axis)
    view = tensor.detach().reshape(plan.before, plan.size, plan.after)
    blocks = (view[i : i + many, start : start + rows].reshape(-1) for i, many, start, rows in plan.steps())
    return _summed(plan, blocks, tensor.dtype, squared=squared, plain=plain)


def _summed(plan: _Plan, blocks: Iterator[torch.Tensor], dtype: torch.dtype, *, squared: bool, plain: bool = False) -> Vector:
    total = np.zeros(plan.size)
    # one buffer for all blocks: fresh memory for each would cost more than the sums
    buffer = torch.empty(plan.most, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with one_thread():  # blocks are small: handing them to other threads costs more than it saves
        for (_, many, start, rows), part in zip(plan.steps(), blocks, strict=True):
            block = buffer[: part.numel()].copy_(part).view(many, rows, plan.after).numpy()
            if squared:
                block = np.square(block, dtype=np.float64)
            elif not plain:
                np.abs(block, out=block)
            along = block.sum(axis=2, dtype=np.float64) if plan.after > 1 else block[:, :, 0].astype(np.float64)
            total[start : start + rows] += along.sum(axis=0) if plan.before > 1 else along[0]
    return total


def _random(target: Target, seed: int) -> Vector:
    """Seeded by the statement and the first site, so that no other statement or site changes the choice."""
    role = target.sites[0].role if target.sites else ""
    digest = hashlib.sha256(f"slice|{seed}|{role}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big"))).random(target.size)


# ---------------------------------------------------------------- a file of scores


def _from_file(op: Resolved, targets: Sequence[Target]) -> list[Vector]:
    """One vector for each site, under its role; parts that share their units add up."""
    name = str(op.method.params()["scores"])
    base = Path(op.origin.span.source.name).parent if op.origin.span.end else Path()
    table = _read(op, base / name, name)
    unread = sorted(set(table) - {s.role for target in targets for s in target.sites})
    if unread:
        op.tell(f"{name} also has scores of parts that this statement does not cut: {faults.of(unread)}")
    out = []
    for target in targets:
        roles = [s.role for s in target.sites]
        given = [role for role in roles if role in table]
        if not given:
            known = sorted(table)[:4]
            raise faults.file_vector(
                op,
                name,
                f"no scores for {roles[0]}",
                f"add `{roles[0]}` with {target.size} numbers; the file has {', '.join(known) or 'nothing'}",
            )
        total = np.zeros(target.size)
        for role in given:
            vector = table[role]
            if vector.shape != (target.size,):
                raise faults.file_vector(
                    op,
                    name,
                    f"{role} has {_shape(vector)}, and there are {target.size} units",
                    f"give {target.size} numbers, one for each unit",
                )
            if not np.isfinite(vector).all():
                at = int(np.flatnonzero(~np.isfinite(vector))[0])
                raise faults.file_vector(op, name, f"score {at} of {role} is not a finite number", "give a number for each unit")
            total += vector
        out.append(total)
    return out


def _shape(vector: Vector) -> str:
    return f"{vector.size} scores" if vector.ndim == 1 else f"scores of shape {' x '.join(map(str, vector.shape))}"


def _read(op: Resolved, path: Path, name: str) -> dict[str, Vector]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {k: v.double().numpy() for k, v in load_file(str(path)).items()}
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise faults.file_unreadable(op, name, "there is no such file") from None
    except Exception as exc:  # a damaged file fails in the reader's own ways
        first = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise faults.file_unreadable(op, name, first) from exc
    if not isinstance(data, dict):
        raise faults.file_unreadable(op, name, "it holds no object with a list for each site")
    table = {}
    for role, values in data.items():
        if not _numbers(values):
            raise faults.file_unreadable(op, name, f"{role} is no list of numbers")
        table[str(role)] = np.array(values, np.float64)
    return table


def _numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in _flat(values))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value
