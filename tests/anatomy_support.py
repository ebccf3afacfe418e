"""Programs of the zoo's families and of plain modules for tests of the anatomy, selectors and cost; captured once a run."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from surgery.core import ast
from surgery.core.site import Site
from surgery.model.capture import Captured, capture_config, capture_module
from surgery.model.program import ModelInfo, Program
from surgery.model.weights import Expr, Weights
from tests.zoo import ZOO


def program_of(captured: Captured, family: str = "", config: dict[str, Any] | None = None) -> Program:
    weights = Weights({n: Expr(tuple(shape), dtype) for n, (shape, dtype) in captured.parameters.items() if n not in captured.aliases})
    info = ModelInfo(family or "module", family=family, config=config or {})
    return Program(captured.graph, captured.signature, weights, info, dict(captured.aliases))


@cache
def zoo_program(family: str, architecture: str = "") -> Program:
    entry = ZOO[family]
    return program_of(capture_config(entry.make_config(), architecture or entry.architecture), family, entry.plain_config)


def module_program(module: nn.Module, inputs: dict[str, Any]) -> Program:
    return program_of(capture_module(module, inputs))


def sites_of(program: Program) -> dict[str, Site]:
    found = {s.role: s for s in program.anatomy.sites}
    assert len(found) == len(program.anatomy.sites), "two sites have one role"
    return found


def parsed(text: str) -> ast.Selector:
    from surgery.inspection import parse_selector

    return parse_selector(text)
