"""A checked spec: statements in order, names resolved, ``let`` and ``param`` values put in place, arguments typed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from surgery.core import ast
from surgery.core.catalogue import Entry
from surgery.core.method import MethodInfo
from surgery.core.source import NOWHERE, Source, Span


@dataclass(frozen=True)
class Bound:
    """A call whose name and arguments were checked.

    ``args`` holds the arguments that were written: Python scalars (shares as fractions, sizes in bytes), tuples for list
    parameters, None for ``none``. A value that differs by layer stays a tree for the resolver: :class:`~surgery.core.ast.ListValue`,
    :class:`~surgery.core.ast.Table` or a ``ramp`` :class:`~surgery.core.ast.Call` whose leaves are numbers, strings and names;
    :func:`scalar` converts a leaf. ``spans`` holds where each value was written.
    """

    name: str
    info: MethodInfo | Entry
    args: dict[str, Any] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    span: Span = NOWHERE

    def get(self, name: str) -> Any:
        """The value of a parameter: as written, else its default. KeyError when the callee has no such parameter."""
        if name in self.args:
            return self.args[name]
        param = self.info.param(name)
        if param is None:
            raise KeyError(name)
        return param.default

    def values(self) -> dict[str, Any]:
        """All parameters with their values; required ones that were not written are left out."""
        return {p.name: self.get(p.name) for p in self.info.params if p.name in self.args or not p.required}


def scalar(value: ast.Value) -> Any:
    """The Python value of a checked leaf: number, text, ``true``, ``false``, ``none`` or an enumeration member.

    Raises TypeError for anything that is not a leaf."""
    if isinstance(value, ast.Number | ast.String):
        return value.value
    if isinstance(value, ast.Name):
        return {"true": True, "false": False, "none": None}.get(value.value, value.value)
    if isinstance(value, ast.ListValue):
        return tuple(scalar(v) for v in value.items)
    raise TypeError(f"{type(value).__name__} is not a scalar")


@dataclass(frozen=True)
class Checked:
    """One statement. ``node`` has its names replaced, ``call`` is its method, backend, check or data source with typed
    arguments, ``select`` the second call of a ``data`` statement, ``stage`` the stage around it, ``within`` the tolerance of a check."""

    node: ast.Statement
    call: Bound | None = None
    select: Bound | None = None
    stage: str = ""
    within: float | None = None


@dataclass(frozen=True)
class Spec:
    """A whole spec. ``statements`` are in order and hold no imports, params, lets or stages; ``data``, ``adapters`` and
    ``checkpoints`` hold by name what statements refer to, imported ones under ``import.name``. ``created`` maps each ``as`` name to its statement's
    position in ``statements``. A relative path in a statement is relative to the file of its span (``node.span.source.name``)."""

    source: Source
    edition: int = 1
    statements: tuple[Checked, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Checked] = field(default_factory=dict)
    data: dict[str, Checked] = field(default_factory=dict)
    adapters: dict[str, Checked] = field(default_factory=dict)
    checkpoints: dict[str, Checked] = field(default_factory=dict)
    created: dict[str, int] = field(default_factory=dict)
    stages: dict[str, Span] = field(default_factory=dict)
    imports: tuple[str, ...] = ()

    @property
    def model(self) -> Checked | None:
        """The model that is operated on: the first ``model`` statement."""
        return next(iter(self.models.values()), None)

    def of(self, *kinds: type[ast.Statement]) -> Iterator[Checked]:
        """The statements of these kinds, in order."""
        return (s for s in self.statements if isinstance(s.node, kinds))
