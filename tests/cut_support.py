"""Cutting captured programs and comparing them with the original under masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from surgery.model import oracle
from surgery.model.cut import CutResult, cut
from surgery.model.dims import Dims, Group, Leaf
from surgery.model.live import Tensors, live_root
from surgery.model.program import Origin, Program
from surgery.passes import registry
from surgery.passes.verify import verify

FULL = bool(os.environ.get("SURGERY_FULL_SWEEP"))
"""Cut every class of every family instead of a few of each."""
NORMALISED = {"norm", "softmax", "topk", "reduce:mean", "reduce:var", "reduce:norm", "reduce:max"}
"""Flags of classes that a normaliser or a selection sees: literal zeroing says something else there."""


@dataclass
class Done:
    """A program after a cut, with what it was made of."""

    before: Program
    after: Program
    group: Group
    result: CutResult

    @property
    def tensors(self) -> Tensors:
        return TENSORS

    def run(self, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Floating outputs of the cut program for inputs of the program before."""
        root = live_root(self.after, TENSORS, dtype=dtype).eval()
        with torch.no_grad():
            return oracle.floats(root(*oracle.cut_inputs(self.group, wide(inputs, dtype))))

    def error(self, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> float:
        """Largest difference from masked execution of the program before, in units of outputs of size one."""
        want = oracle.masked(self.before, self.group, TENSORS, wide(inputs, dtype), dtype)
        return difference(self.run(inputs, dtype), want)

    def literal_error(self, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> float:
        """Largest difference from the program before with the removed slices of every tensor zero."""
        want = oracle.zeroed(self.before, self.group, self.result.members, TENSORS, wide(inputs, dtype), dtype)
        return difference(self.run(inputs, dtype), want)


TENSORS = Tensors(registry.function)


def wide(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in inputs]


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    assert [t.shape for t in a] == [t.shape for t in b], ([t.shape for t in a], [t.shape for t in b])
    scale = max(1.0, *(float(t.abs().max()) for t in b if t.numel()))
    return max(float((x - y).abs().max()) if x.numel() else 0.0 for x, y in zip(a, b, strict=True)) / scale


def remove(program: Program, units: dict[Leaf, list[int]], **more: Any) -> Done:
    """A copy of the program without units of ``program.dims``; it verifies."""
    group = program.dims.remove(units, **more)
    assert not group.refusal, group.refusal
    after = program.copy()
    result = cut(after, group, Origin(verb="prune", method="test"))
    verify(after, "the cut")
    return Done(program, after, group, result)


def free(dims: Dims) -> list[Leaf]:
    return [leaf for leaf in dims.all_leaves() if leaf.free]


def sample(leaves: Sequence[Leaf], most: int = 4) -> list[Leaf]:
    """Leaves of different kinds, spread over the model; all of them in a full sweep."""
    if FULL:
        return list(leaves)
    kinds: dict[Any, Leaf] = {}
    for leaf in reversed(leaves) if len(leaves) % 2 else leaves:
        kinds.setdefault((leaf.letter, leaf.flags), leaf)
    chosen = list(kinds.values())
    step = max(1, -(-len(chosen) // most))
    return chosen[::step]


def some_units(leaf: Leaf, i: int) -> list[int]:
    """One unit or two, the last ones or from both ends."""
    return [leaf.size - 1] if i % 2 or leaf.size < 3 else [0, leaf.size - 2]


def structure(dims: Dims, kept: dict[str, list[Any]] | None = None) -> dict[tuple[str, int], list[np.ndarray[Any, Any]]]:
    """For every stored axis the unit at each position of every class that it is made of, classes in order of appearance."""
    return {
        (name, i): [units for _, units in dims.occurrences(axis)] for name, axes in dims.parameters.items() for i, axis in enumerate(axes)
    }


def same_classes(done: Done) -> None:
    """The analysis of the cut program finds the classes of the one before, minus the units: position by position of every stored axis."""
    old, new, keep = done.before.dims, done.after.dims, done.group.keep
    classes: dict[Leaf, Leaf] = {}
    for name, axes in old.parameters.items():
        for i, axis in enumerate(axes):
            mask = keep.mask(axis)
            positions = np.arange(old.size(axis)) if mask is None else np.flatnonzero(mask)
            before = []
            for leaf, units in old.occurrences(axis):
                there = units[positions]
                left = np.unique(there[there >= 0])
                if len(left) > 1:  # a class with one unit left is no class any more
                    before.append((leaf, np.where(there >= 0, np.searchsorted(left, there), -1)))
            after = new.occurrences(new.parameters[name][i])
            assert len(before) == len(after), (name, i, old.text(axis), new.text(new.parameters[name][i]))
            for (leaf, want), (found, got) in zip(before, after, strict=True):
                assert np.array_equal(want, got), (name, i, leaf, found)
                assert classes.setdefault(leaf, found) == found and found.free == leaf.free, (name, i, leaf, found)
                assert found.size == old_size_left(done, leaf), (leaf, found)


def old_size_left(done: Done, leaf: Leaf) -> int:
    return done.group.keep.size(leaf.axis)


def observed_specs(program: Program, inputs: Sequence[Tensor]) -> Iterable[str]:
    """Nodes whose spec is not what they give at run time."""
    from tests.capture_support import run_with_values, spec_fits

    root = live_root(program, TENSORS, dtype=torch.float32).eval()
    sizes = {s: int(inputs[names.index(name)].shape[axis]) for names in [[n.name for n in root.graph.find_nodes(op="placeholder")]]
             for s, (name, axis, _) in program.signature.symbols.items()}  # fmt: skip
    values = run_with_values(root, list(inputs))
    for path, gm in root.named_modules():
        if isinstance(gm, fx.GraphModule):
            for node in gm.graph.nodes:
                if node.op != "output" and (path, node.name) in values and not spec_fits(node.meta["spec"], values[path, node.name], sizes):
                    yield f"{path}::{node.name} {node.meta['spec']}"
