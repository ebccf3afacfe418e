"""What a pass gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.core.ast import Operation
from surgery.core.diagnostics import Diagnostic
from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model.claims import Claim
from surgery.model.program import Origin
from surgery.model.study import Study


@dataclass(frozen=True)
class Resolved:
    """One statement on resolved sites: ``methods[i]`` is the method with the parameter values of ``sites[i]``.

    ``name`` labels what the statement creates (the ``as`` name, else the method's name). ``place`` is on, after, before,
    beside or empty. ``seed`` is the base seed of everything random in the statement.

    ``study`` lets a pass read weights and run calibration data; it is None while planning, when no weight is read: a pass then makes a
    choice of the same size that depends on nothing (and says in its note what compile decides). ``data`` is the opened data of the ``using``
    clause (None without one). ``claim`` takes what must be measured of this change before anything is emitted, ``warn`` a finding
    that does not stop the walk, ``tell`` a line for the plan about the whole statement, ``later`` one that is made when the plan is. ``base`` holds the params, bytes and flops per
    token of the model before the first statement.
    """

    verb: str
    name: str
    place: str
    sites: tuple[Site, ...]
    methods: tuple[Method, ...]
    origin: Origin
    keep: tuple[Site, ...] = ()
    keep_own: tuple[str, ...] = ()
    seed: int = 0
    statement: Operation | None = None
    study: Study | None = field(default=None, compare=False, repr=False)
    data: Any = field(default=None, compare=False, repr=False)
    claim: Callable[[Claim], None] = field(default=lambda claim: None, compare=False, repr=False)
    warn: Callable[[Diagnostic], None] = field(default=lambda finding: None, compare=False, repr=False)
    tell: Callable[[str], None] = field(default=lambda line: None, compare=False, repr=False)
    later: Callable[[Callable[[], str]], None] = field(default=lambda line: None, compare=False, repr=False)
    base: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def method(self) -> Method:
        return self.methods[0]


@dataclass(frozen=True)
class SiteChange:
    """What one statement did at one site: shapes of the site's weight (or ``()``), parameters added and removed, and how many
    of the parameters of the site (its own and those added) train afterwards."""

    role: str
    path: str
    rows: tuple[tuple[int, int], ...] = ()
    shape_before: tuple[int, ...] = ()
    shape_after: tuple[int, ...] = ()
    added: int = 0
    removed: int = 0
    trainable: int = 0
    note: str = field(default="", compare=False)


def predicted(flops: int, flops_after: int, size: int, size_after: int, unit: str) -> str:
    """For warnings that a change makes nothing faster: what it changes on paper, FLOPs per ``unit`` and bytes of all weights."""
    return f"predicted: {flops:,} -> {flops_after:,} flops per {unit}, {size:,} -> {size_after:,} bytes"
