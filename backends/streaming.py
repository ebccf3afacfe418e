"""Weights for writing: kept where a model is small, one tensor at a time where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.model.flows import Parts
from surgery.model.lanes import read_soon
from surgery.model.pieces import held_by
from surgery.model.program import Program
from surgery.model.realise import Realiser
from surgery.model.running import is_small
from surgery.model.streams import Stream, stream_of
from surgery.model.weights import Expr, loads

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "": ""}
WORKERS = 4
"""Most threads that make tensors at once; as many as torch may use otherwise."""
PAGE = 1 << 18
"""Stored tensors below this size are not announced to the system before they are read."""


class _Kept(Mapping[str, torch.Tensor]):
    def __init__(self, program: Program, tensors: Any) -> None:
        self.program, self.tensors = program, tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.tensors.of(self.program, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.program.weights)

    def __len__(self) -> int:
        return len(self.program.weights)


def weights(program: Program, tensors: Any) -> Mapping[str, torch.Tensor]:
    """The program's tensors by name, to be asked for in the order of ``program.weights``."""
    return _Kept(program, tensors) if is_small(program) else Realiser(program.weights, tensors.functions)


@dataclass(frozen=True)
class Lanes:
    """How the tensors of a program are written: the arguments of :func:`surgery.model.shards.write_safetensors` of these names."""

    workers: int
    costs: dict[str, int]
    soon: Callable[[str], None] | None
    streams: dict[str, Stream] = field(default_factory=dict)


def lanes(program: Program, tensors: Any, names: Mapping[str, str] | None = None) -> Lanes:
    """Threads for a large program, none for a small one, whose tensors are kept. ``names`` maps names in the file to names in the program."""
    if is_small(program):
        return Lanes(0, {}, None)
    exprs = dict(program.weights) if names is None else {target: program.weights[source] for target, source in names.items()}

    def soon(name: str) -> None:
        for load in loads(exprs[name]):
            if load.nbytes >= PAGE:
                read_soon(load.file, *load.span)

    streams = {name: stream for name, expr in exprs.items() if (stream := stream_of(expr)) is not None}
    costs = {name: cost(expr, tensors.functions) for name, expr in exprs.items() if name not in streams}
    return Lanes(max(1, min(WORKERS, torch.get_num_threads())), costs, soon, streams)


def parts(
    values: Mapping[str, torch.Tensor], program: Program, sources: Mapping[str, str], dtypes: Mapping[str, str]
) -> Callable[[str, ExitStack], Parts | None]:
    """For :func:`surgery.model.shards.write_safetensors`: tensors that keep their type in parts. ``values`` are those of :func:`weights`, ``sources``
    maps names in the file to names in the program, ``dtypes`` are those of the file."""

    def run(name: str, files: ExitStack) -> Parts | None:
        source = sources[name]
        if not isinstance(values, Realiser) or program.weights[source].dtype != dtypes[name]:
            return None
        return values.parts(source, files)

    return run


def cost(expr: Expr, functions: Callable[[str], Callable[..., Any]]) -> int:
    """Bytes that computing an expression needs, about: what is held of what is read, and the result."""
    held = held_by(expr, functions)
    return (sum(load.nbytes for load in loads(expr)) if held is None else held) + expr.nbytes
