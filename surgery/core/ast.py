"""The syntax tree of a spec: frozen dataclasses with their places.

Equality ignores places, so ``parse(print(tree)) == tree`` is a meaningful law.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from surgery.core.source import NOWHERE, Span


@dataclass(frozen=True, kw_only=True)
class Node:
    span: Span = field(default=NOWHERE, compare=False, repr=False)


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Number(Node):
    """A literal. ``value`` is already scaled: ``30%`` is 0.3 with unit ``%``, ``10k`` is 10000 with unit ``k``,
    ``2GiB`` is 2147483648 with unit ``GiB``. ``text`` is the literal as written."""

    value: int | float
    unit: str = ""
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class String(Node):
    value: str


@dataclass(frozen=True)
class Name(Node):
    """A bare word: an enumeration member, ``true``/``false``/``none``, a ``param`` or a ``let`` (``calib.text`` is dotted)."""

    value: str


@dataclass(frozen=True)
class ListValue(Node):
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Range(Node):
    """``3`` (start == stop), ``0..11`` inclusive, ``6..`` (stop None), with ``by`` a step; negatives count from the end."""

    start: int
    stop: int | None
    step: int = 1


@dataclass(frozen=True)
class TableEntry(Node):
    key: Range
    value: Value


@dataclass(frozen=True)
class Table(Node):
    """``{0..3: 4, 4..11: 8}``: values by layer index."""

    entries: tuple[TableEntry, ...]


@dataclass(frozen=True)
class Arg(Node):
    """``name = value`` or, with ``name`` empty, a positional argument."""

    name: str
    value: Value
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Call(Node):
    """``method(args)``; ``bare`` when written without parentheses."""

    name: str
    args: tuple[Arg, ...] = ()
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)
    bare: bool = field(default=False, compare=False)


# ---------------------------------------------------------------- selectors


@dataclass(frozen=True)
class Index(Node):
    """``[...]`` behind a step: ``ranges`` empty means ``[*]``."""

    ranges: tuple[Range, ...] = ()

    @property
    def all(self) -> bool:
        return not self.ranges


@dataclass(frozen=True)
class Step(Node):
    """One step ``attn``, ``layers[0..3]``, ``*``, ``**``: ``name`` is the word or the stars."""

    name: str
    index: Index | None = None


@dataclass(frozen=True)
class SetStep(Node):
    """``{q, v}`` or ``{attn.q, ffn.up}``: alternatives, each a path of steps; an index may follow the brace."""

    members: tuple[tuple[Step | SetStep, ...], ...]
    index: Index | None = None


@dataclass(frozen=True)
class Selector(Node):
    """``layers[*].attn.{q, v}``, ``"raw.module.*.glob"`` (``raw``), ``@name.steps`` (``ref``), each with an optional ``?``.

    A selector that is the name of a ``let`` has one plain step; the checker puts the value in its place.
    """

    steps: tuple[Step | SetStep, ...] = ()
    raw: str | None = None
    ref: str | None = None
    optional: bool = False


Value: TypeAlias = Number | String | Name | ListValue | Table | Call | Selector


# ---------------------------------------------------------------- statements


@dataclass(frozen=True, kw_only=True)
class Statement(Node):
    doc: str = ""
    """Text of the ``##`` lines in front, without the marks."""


@dataclass(frozen=True)
class Edition(Statement):
    number: int


@dataclass(frozen=True)
class Import(Statement):
    path: str
    name: str
    path_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Param(Statement):
    """``param r = 8``; without a default (``value`` None, written ``param r``) the command line must set it."""

    name: str
    value: Value | None


@dataclass(frozen=True)
class Let(Statement):
    name: str
    value: Value


@dataclass(frozen=True)
class Model(Statement):
    ref: str
    name: str = ""
    ref_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Data(Statement):
    name: str
    source: Call
    select: Call | None = None


@dataclass(frozen=True)
class Load(Statement):
    """``adapter news = load("dir")`` or ``checkpoint other = load("ref")``; ``what`` is the keyword."""

    what: str
    name: str
    source: Call


@dataclass(frozen=True)
class Operation(Statement):
    """``VERB method(params) PLACE selectors clauses``; ``place`` is on, after, before, beside or empty."""

    verb: str
    method: Call
    place: str
    selectors: tuple[Selector, ...]
    using: str = ""
    keep: tuple[Selector, ...] = ()
    keep_own: tuple[str, ...] = ()
    except_: tuple[Selector, ...] = ()
    name: str = ""
    verb_span: Span = field(default=NOWHERE, compare=False, repr=False)
    name_span: Span = field(default=NOWHERE, compare=False, repr=False)
    using_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Weighted(Node):
    name: str
    weight: Number | None = None


@dataclass(frozen=True)
class Merge(Statement):
    method: Call
    of: tuple[Weighted, ...]
    selectors: tuple[Selector, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Train(Statement):
    method: Call
    selectors: tuple[Selector, ...] = ()


@dataclass(frozen=True)
class ExpectQuantity(Statement):
    """``expect trainable <= 0.5% of base on sel for name``; ``of_base`` only with a percentage."""

    quantity: str
    compare: str
    value: Value
    of_base: bool = False
    selectors: tuple[Selector, ...] = ()
    of: str = ""
    quantity_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class ExpectCheck(Statement):
    check: Call
    within: Value | None = None


@dataclass(frozen=True)
class Measure(Statement):
    method: Call
    selectors: tuple[Selector, ...] = ()
    using: str = ""


@dataclass(frozen=True)
class Emit(Statement):
    backend: Call
    to: str
    to_span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Stage(Statement):
    name: str
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class File(Node):
    """A whole spec as written (imports not yet read).

    ``broken_names`` are names that statements with syntax errors would have declared: uses of them need no second error.
    """

    statements: tuple[Statement, ...]
    broken_names: tuple[str, ...] = field(default=(), compare=False)
