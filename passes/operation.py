"""What a pass gets and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.core.ast import Operation
from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model.program import Origin


@dataclass(frozen=True)
class Resolved:
    """One statement on resolved sites: ``methods[i]`` is the method with the parameter values of ``sites[i]``.

    ``name`` labels what the statement creates (the ``as`` name, else the method's name). ``place`` is on, after, before,
    beside or empty. ``seed`` is the base seed of everything random in the statement.
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
