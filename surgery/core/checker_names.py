"""Names of a spec: what is defined where, and putting values in the place of names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from surgery.core import ast
from surgery.core.diagnostics import Fix, Sink
from surgery.core.near import near, quoted, suggestion
from surgery.core.source import Span

CONSTANTS = ("true", "false", "none")


@dataclass(frozen=True)
class Definition:
    """``kind`` is param, let, data, adapter, checkpoint, model, import, stage or site (the ``as`` name of an operation)."""

    name: str
    kind: str
    span: Span
    value: ast.Value | None = None
    node: ast.Statement | None = None
    set_at: Span | None = None
    """Where the command line gives the value."""


KIND_WORDS = {
    "param": "a parameter", "let": "a value", "data": "data", "adapter": "an adapter", "checkpoint": "a checkpoint", "model": "a model",
    "import": "an imported file", "stage": "a stage", "site": "a name for what an operation created",
}  # fmt: skip


def name_span(node: ast.Statement, name: str) -> Span:
    """The place of a defined name inside its statement; the statement's own place when it is not found."""
    span = node.span
    found = re.search(rf"(?<![\w.@]){re.escape(name)}(?!\w)", span.text[:4096])
    first = re.match(r"\w+\s+", span.text)
    if found and first and found.start() < first.end():  # the keyword itself, as in `data data = ...`
        found = re.compile(rf"(?<![\w.@]){re.escape(name)}(?!\w)").search(span.text[:4096], first.end())
    return Span(span.source, span.start + found.start(), span.start + found.end()) if found else span


def last_word_span(span: Span, name: str) -> Span:
    """The last occurrence of a word in a span, for ``as name``, ``using name``, ``for name`` clauses."""
    hits = list(re.finditer(rf"(?<![\w.@]){re.escape(name)}(?![\w.])", span.text[-4096:]))
    if not hits:
        return span
    base = span.start + max(0, len(span.text) - 4096)
    return Span(span.source, base + hits[-1].start(), base + hits[-1].end())


@dataclass
class Scope:
    """Names of one file so far, later ones (for a better message), and the scopes of its imports."""

    names: dict[str, Definition] = field(default_factory=dict)
    later: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, Scope] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Names whose definition was reported: their uses are not reported again."""

    def is_broken(self, name: str) -> bool:
        """Whether a use of the name would only repeat an earlier report."""
        head, dot, rest = name.partition(".")
        if name in self.broken or head in self.broken:
            return True
        child = self.imports.get(head) if dot else None
        return child is not None and child.is_broken(rest)

    def find(self, name: str) -> Definition | None:
        found = self.names.get(name)
        if found is not None or "." not in name:
            return found
        head, _, rest = name.partition(".")
        child = self.imports.get(head)
        return child.find(rest) if child else None

    def known(self, *kinds: str) -> Iterator[str]:
        """Names that may be written here, imported ones with their prefix (one level)."""
        for d in self.names.values():
            if d.name[0] != "\0" and (not kinds or d.kind in kinds):  # not an unnamed model
                yield d.name
        for prefix, child in self.imports.items():
            for d in child.names.values():
                if d.kind not in ("import", "stage", "site") and (not kinds or d.kind in kinds):
                    yield f"{prefix}.{d.name}"


class Names:
    """Definition and use of names in one file; reports to ``sink``."""

    def __init__(self, scope: Scope, sink: Sink) -> None:
        self.scope = scope
        self.sink = sink

    def define(self, definition: Definition) -> None:
        first = self.scope.names.get(definition.name)
        if first is not None:
            self.scope.broken.add(definition.name)
            self.sink.error(
                "S0202", f"the name `{definition.name}` is taken", definition.span, "second use of the name",
                also=[(first.span, f"it is {KIND_WORDS[first.kind]} since here")], help="give one of the two another name",
            )  # fmt: skip
            return
        self.scope.names[definition.name] = definition

    def lookup(self, name: str, span: Span, kinds: tuple[str, ...], what: str) -> Definition | None:
        """The definition of a name that must be one of ``kinds``; reports and gives None otherwise."""
        found = self.scope.find(name)
        if self.scope.is_broken(name):
            return None
        if found is None:
            self.unknown(name, span, kinds, what)
            return None
        if found.kind not in kinds:
            help = [f"{what} here can be {quoted(close)}" for close in [list(self.scope.known(*kinds))[:4]] if close]
            self.sink.error(
                "S0204", f"`{name}` is {KIND_WORDS[found.kind]}, not {what}", span, f"{what} is expected here",
                also=[(found.span, f"`{name}` is defined here")], help=help or [f"define {what} above this line"],
            )  # fmt: skip
            return None
        return found

    def unknown(self, name: str, span: Span, kinds: tuple[str, ...], what: str) -> None:
        if self.scope.is_broken(name):
            return
        later = self.scope.later.get(name)
        if later is not None:
            self.sink.error(
                "S0203", f"`{name}` is used before it is defined", span, "not known yet",
                also=[(later.span, "defined here")], help="a spec runs from top to bottom: move the definition above its first use",
            )  # fmt: skip
            return
        known = list(self.scope.known(*kinds))
        help, notes = suggestion(name, known, "names that fit here")
        close = near(name, known)
        fix = Fix(span, close[0], safe=False) if close else None
        self.sink.error(
            "S0201",
            f"there is no {what.removeprefix('a ').removeprefix('an ')} `{name}`",
            span,
            "not defined",
            help=help,
            notes=notes,
            fix=fix,
        )

    # ------------------------------------------------------------ values

    def value(self, value: ast.Value) -> tuple[ast.Value, Definition | None]:
        """The value with its outermost name followed to what it stands for, and the definition that was followed."""
        if isinstance(value, ast.Name):
            found = self.scope.find(value.value)
            if found is not None and found.kind in ("param", "let") and found.value is not None:
                return replace(found.value, span=value.span), found
        elif isinstance(value, ast.Selector):
            plain = dotted(value)
            if plain:
                found = self.scope.find(plain)
                if found is not None and found.kind in ("param", "let") and found.value is not None:
                    return replace(found.value, span=value.span), found
        return value, None

    def deep(self, value: ast.Value) -> ast.Value:
        """The value with every name inside that is defined replaced."""
        value, _ = self.value(value)
        if isinstance(value, ast.ListValue):
            return replace(value, items=tuple(self.deep(v) for v in value.items))
        if isinstance(value, ast.Table):
            return replace(value, entries=tuple(replace(e, value=self.deep(e.value)) for e in value.entries))
        if isinstance(value, ast.Call):
            return replace(value, args=tuple(replace(a, value=self.deep(a.value)) for a in value.args))
        if isinstance(value, ast.Selector):
            return self.selector(value)
        return value

    def selector(self, selector: ast.Selector) -> ast.Selector:
        """The selector with a leading ``let`` name replaced by the selector it stands for."""
        if selector.raw is not None or selector.ref is not None or not selector.steps:
            return selector
        words: list[str] = []
        best: tuple[int, Definition] | None = None
        for step in selector.steps:
            if not isinstance(step, ast.Step) or "*" in step.name:
                break
            words.append(step.name)
            found = self.scope.find(".".join(words))
            if found is not None and found.kind in ("let", "param"):
                best = len(words), found
            if step.index is not None:
                break
        if best is None:
            return self._later(selector)
        count, found = best
        if self.scope.is_broken(".".join(words[:count])):
            return selector
        last = selector.steps[count - 1]
        if isinstance(last, ast.Step) and last.index is not None:
            self.sink.error(
                "S0236", f"`{found.name}` names a whole selector and takes no index", last.span if last.span.end else selector.span,
                "an index behind a name", also=[(found.span, "defined here")], help="write the index inside the `let`, or write the selector out",
            )  # fmt: skip
            return selector
        value = found.value
        if isinstance(value, ast.Name):
            value = words_as_selector(value)
        elif isinstance(value, ast.String):
            value = ast.Selector(raw=value.value, span=value.span)
        if not isinstance(value, ast.Selector):
            self.sink.error(
                "S0236", f"`{found.name}` is not a selector", selector.span, "a selector is expected here",
                also=[(found.span, "defined here")], help=f"`let {found.name} = layers[*].attn` would name a selector",
            )  # fmt: skip
            return selector
        rest = selector.steps[count:]
        if rest and value.raw is not None:
            self.sink.error(
                "S0236", f"`{found.name}` is a module path in quotes and takes no further steps", selector.span, "steps behind a quoted path",
                also=[(found.span, "defined here")], help="write the whole path in quotes",
            )  # fmt: skip
            return selector
        return replace(value, steps=value.steps + rest, optional=value.optional or selector.optional, span=selector.span)

    def _later(self, selector: ast.Selector) -> ast.Selector:
        plain = dotted(selector)
        later = self.scope.later.get(plain) if plain else None
        if plain and later is not None and later.kind == "let" and plain not in self.scope.names:
            self.unknown(plain, selector.span, ("let",), "a value")
        return selector


def dotted(selector: ast.Selector) -> str:
    """``a.b`` when the selector is nothing but plain words, else empty."""
    if selector.raw is not None or selector.ref is not None or selector.optional:
        return ""
    words = [s.name if isinstance(s, ast.Step) and s.index is None and "*" not in s.name else "" for s in selector.steps]
    return ".".join(words) if words and all(words) else ""


def words_as_selector(value: ast.Name) -> ast.Selector:
    """``late.attn``, which reads as a name, as the selector that it also is."""
    return ast.Selector(tuple(ast.Step(word, span=value.span) for word in value.value.split(".")), span=value.span)
