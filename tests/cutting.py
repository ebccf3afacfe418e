"""One pruning statement on a captured program, without a spec around it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from surgery.core.diagnostics import Diagnostic
from surgery.model import cost
from surgery.model.live import Tensors
from surgery.model.program import Origin, Program
from surgery.model.study import Study
from surgery.passes import registry
from surgery.passes.kinds import slice as kind
from surgery.passes.operation import Resolved, SiteChange
from tests.captured_programs import live_model, zoo_program


class Cutting:
    """One statement on a captured program; ``told`` and ``warned`` are what it said."""

    def __init__(
        self, family: str | Program, name: str, roles: list[str], *, study: bool = True, keep: tuple[str, ...] = (), **params: Any
    ):
        self.program = zoo_program(family)[0] if isinstance(family, str) else family
        self.base = {"params": cost.parameters(self.program), "flops": cost.flops_per_token(self.program)}
        by_role = {s.role: s for s in self.program.anatomy.sites}
        sites = tuple(by_role[r] for r in roles)
        each = params.pop("each", None)
        methods = tuple(registry.get("prune", name)(**params, **(each[i] if each else {})) for i in range(max(1, len(sites))))
        self.told: list[str] = []
        self.warned: list[Diagnostic] = []
        self.claims: list[Any] = []
        self.op = Resolved(
            "prune", name, "on", sites, methods, Origin(verb="prune", method=name), keep=tuple(by_role[r] for r in keep),
            seed=methods[0].params()["seed"], study=Study(Tensors(registry.function)) if study else None,
            claim=self.claims.append, warn=self.warned.append, tell=self.told.append, base=self.base,
        )  # fmt: skip

    def run(self) -> list[SiteChange]:
        return kind.apply(self.program, self.op)

    def value(self, name: str) -> Tensor:
        return Tensors(registry.function).of(self.program, name)


def roles(pattern: str, layers: int = 3) -> list[str]:
    return [pattern.format(i) for i in range(layers)]


def state(family: str) -> dict[str, np.ndarray[Any, Any]]:
    return {n: p.detach().double().numpy() for n, p in live_model(family).named_parameters()}


def kept(after: Tensor, before: np.ndarray[Any, Any], axis: int = 0) -> list[int]:
    """Which slices of the old tensor stand in the new one, by value."""
    old = np.moveaxis(before, axis, 0).reshape(before.shape[axis], -1)
    new = np.moveaxis(after.double().numpy(), axis, 0).reshape(after.shape[axis], -1)
    width = new.shape[1]
    assert width == old.shape[1]
    return [int(np.flatnonzero((old == row).all(1))[0]) for row in new]
