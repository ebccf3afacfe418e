"""From a syntax tree to a checked spec: names, imports, parameters, units and order, without a model and without torch.

All problems of a file are reported in one run. A statement that is wrong is left out of the spec; what it defines stays known, so
that one mistake gives one report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from surgery.core import ast
from surgery.core.catalogue import ADAPTER_LOADERS, LOADERS, SOURCES, Catalogue, load
from surgery.core.checker_names import Definition, Names, Scope, name_span, words_as_selector
from surgery.core.checker_nodes import a, as_written, defines, input_kind, layered, references
from surgery.core.checker_order import order, place
from surgery.core.checker_statements import Statements
from surgery.core.diagnostics import Diagnostic, Sink, SurgeryError
from surgery.core.near import suggestion
from surgery.core.source import Source, Span
from surgery.core.spec import Bound, Checked, Spec, scalar

Read = Callable[[str], tuple[ast.File, Source, list[Diagnostic]]]
"""Reads and parses an imported file. Raises OSError or SurgeryError when it cannot be read."""

Literal = Callable[[str], "ast.Value | None"]
"""Parses one literal of the language, for ``--set``; None when the text is not one."""

MAX_IMPORT_DEPTH = 64


def check(
    file: ast.File,
    source: Source,
    *,
    catalogue: Catalogue | None = None,
    sets: Mapping[str, str] | None = None,
    read: Read | None = None,
    literal: Literal | None = None,
) -> tuple[Spec, list[Diagnostic]]:
    """The checked spec and every finding. ``read`` opens imports, ``sets`` are the ``--set`` values as text, parsed by ``literal``."""
    sink = Sink()
    shared = _Shared(catalogue or load(), sink, read, literal, dict(sets or {}))
    checker = _FileChecker(shared, source, prefix="", chain=((_key(source.name), None),))
    spec = checker.top(file)
    checker.unused_sets()
    order(spec.statements, sink)
    return spec, list(sink)


def _key(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a NUL or a lone surrogate: such a file cannot exist
        return path


@dataclass
class _Shared:
    """What all files of one check have in common. ``scopes`` keeps checked imports, so that a file that is imported many times is read once."""

    catalogue: Catalogue
    sink: Sink
    read: Read | None
    literal: Literal | None
    sets: dict[str, str]
    scopes: dict[tuple[str, tuple[tuple[str, str], ...]], _FileChecker] = field(default_factory=dict)
    files: dict[str, tuple[ast.File, Source]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


class _FileChecker:
    """Checks one file; ``prefix`` is the import name with a dot, ``chain`` the files that lead here."""

    def __init__(self, shared: _Shared, source: Source, prefix: str, chain: tuple[tuple[str, Span | None], ...]) -> None:
        self.shared = shared
        self.sink = shared.sink
        self.source = source
        self.prefix = prefix
        self.chain = chain
        self.scope = Scope()
        self.names = Names(self.scope, shared.sink)
        self.statements = Statements(self.names, shared.catalogue)
        self.calls = self.statements.calls
        self.children: dict[str, _FileChecker] = {}
        self.params: dict[str, object] = {}
        self.inputs: dict[str, Checked] = {}
        self.edition = 1
        self.refused = False

    # ------------------------------------------------------------ files

    def top(self, file: ast.File) -> Spec:
        out: list[Checked] = []
        stages: dict[str, Span] = {}
        self._collect_later(file.statements)
        self._body(file.statements, out, stages, "")
        created = {node.name: i for i, node in enumerate(s.node for s in out) if isinstance(node, ast.Operation | ast.Merge) and node.name}
        inputs = {name: item for name, item in self._inputs_used(out)}

        def by(kind: str) -> dict[str, Checked]:
            return {n: c for n, c in inputs.items() if input_kind(c.node) == kind}

        models = {(s.node.name or s.node.ref): s for s in out if isinstance(s.node, ast.Model)}
        return Spec(
            self.source, self.edition, tuple(out), dict(self._all_params()), models, by("data"), by("adapter"), by("checkpoint"),
            created, stages, tuple(self.shared.paths),
        )  # fmt: skip

    def _inputs_used(self, out: Iterable[Checked]) -> Iterable[tuple[str, Checked]]:
        yield from self.inputs.items()
        for item in out:
            for name in references(item.node):
                if "." in name:
                    found = self._input(name)
                    if found is not None:
                        yield name, found

    def _input(self, name: str) -> Checked | None:
        head, dot, rest = name.partition(".")
        if not dot:
            return self.inputs.get(name)
        child = self.children.get(head)
        return child._input(rest) if child else None

    def _all_params(self) -> Iterable[tuple[str, object]]:
        yield from self.params.items()
        for name, child in self.children.items():
            for inner, value in child.params.items():
                yield f"{name}.{inner}", value

    def _collect_later(self, statements: Iterable[ast.Statement]) -> None:
        """Every definition of the file, so that a use above its definition can be told from an unknown name."""
        for node in statements:
            if isinstance(node, ast.Stage):
                self._collect_later(node.body)
                continue
            kind = defines(node)
            name = getattr(node, "name", "")
            if kind and name:
                self.scope.later.setdefault(name, Definition(name, kind, name_span(node, name), None, node))

    def _body(self, statements: Iterable[ast.Statement], out: list[Checked], stages: dict[str, Span], stage: str) -> None:
        for node in statements:
            if isinstance(node, ast.Stage):
                span = name_span(node, node.name)
                self.names.define(Definition(node.name, "stage", span, None, node))
                if stage:
                    self.sink.error(
                        "S0237",
                        f"the stage `{node.name}` stands inside the stage `{stage}`",
                        span,
                        "a stage in a stage",
                        help="close the first stage before this one",
                    )
                stages.setdefault(node.name, span)
                self._body(node.body, out, stages, node.name)
            elif isinstance(node, ast.Edition):
                self.edition = node.number
            elif not self._definition(node, stage):
                if self.prefix:
                    self._only_names(node)
                    continue
                checked = self.statements.check(node, stage)
                if checked is not None:
                    out.append(checked)
            elif isinstance(node, ast.Model):
                out.append(Checked(node, stage=stage))

    def _only_names(self, node: ast.Statement) -> None:
        if self.refused:
            return
        self.refused = True
        importer = self.chain[-1][1]
        what = node.verb if isinstance(node, ast.Operation) else type(node).__name__.removeprefix("Expect").lower()
        if isinstance(node, ast.ExpectCheck | ast.ExpectQuantity):
            what = "expect"
        self.sink.error(
            "S0233", f"an imported file holds names only, and this one has `{what}`", place(node), "this statement would run nowhere",
            also=[(importer, "imported here")] if importer is not None else (),
            help="keep `param`, `let`, `data`, `adapter` and `checkpoint` in the imported file and move the rest to the spec",
        )  # fmt: skip

    # ------------------------------------------------------------ definitions

    def _definition(self, node: ast.Statement, stage: str) -> bool:
        """Handles a statement that defines a name; False for every other statement."""
        if isinstance(node, ast.Import):
            self._import(node)
        elif isinstance(node, ast.Param):
            self._param(node)
        elif isinstance(node, ast.Let):
            value = self.names.deep(node.value)
            if isinstance(value, ast.Name) and "." in value.value:
                value = self.names.selector(words_as_selector(value))
            self._check_let(value)
            self.names.define(Definition(node.name, "let", name_span(node, node.name), value, node))
        elif isinstance(node, ast.Model):
            self._model(node)
        elif isinstance(node, ast.Data):
            bound = self.calls.entry(node.source, SOURCES, "S0216", "data source", "data sources")
            chosen = self.calls.method("select", node.select) if node.select is not None else None
            self._input_defined(node, "data", bound, chosen)
        elif isinstance(node, ast.Load):
            loaders = ADAPTER_LOADERS if node.what == "adapter" else LOADERS
            bound = self.calls.entry(node.source, loaders, "S0216", "way to open this", f"ways to open {a(node.what)}")
            self._input_defined(node, node.what, bound, None)
        else:
            return False
        return True

    def _check_let(self, value: ast.Value) -> None:
        if isinstance(value, ast.Selector):
            self.calls.values.indexes(value.steps)
        elif isinstance(value, ast.Table):
            for entry in value.entries:
                self.calls.values.range(entry.key)

    def _input_defined(self, node: ast.Data | ast.Load, kind: str, bound: Bound | None, chosen: Bound | None) -> None:
        self.names.define(Definition(node.name, kind, name_span(node, node.name), None, node))
        if bound is not None:
            self.inputs.setdefault(node.name, Checked(node, bound, chosen))

    def _model(self, node: ast.Model) -> None:
        if self.prefix:
            self._only_names(node)
            return
        first = next((d for d in self.scope.names.values() if d.kind == "model"), None)
        if first is not None and not node.name:
            self.sink.error(
                "S0234", "a second model needs a name", node.ref_span if node.ref_span.end else node.span, "no name",
                also=[(first.span, "the model that the spec works on")], help=f'`model "{node.ref}" as other` gives it one',
            )  # fmt: skip
            return
        name = node.name or "\0model"  # an unnamed model takes no name of the user's
        self.names.define(Definition(name, "model", name_span(node, node.name) if node.name else node.span, None, node))

    def _param(self, node: ast.Param) -> None:
        span = name_span(node, node.name)
        full = self.prefix + node.name
        value = node.value
        text = self.shared.sets.get(full)
        if text is not None:
            value = self._set_value(node, full, text, span)
        elif value is None:
            self.scope.broken.add(node.name)
            self.sink.error(
                "S0206", f"the parameter `{full}` has no value", span, "no default and not set",
                help=[f"set it on the command line: `--set {full}=...`", f"or give it a default: `param {node.name} = ...`"],
            )  # fmt: skip
        if value is not None:
            value = self.names.deep(value)
            try:
                self.params[node.name] = scalar(value)
            except TypeError:
                self.params[node.name] = value.span.text
        set_at = value.span if value is not None and value.span.source.name == "--set" else None
        self.names.define(Definition(node.name, "param", span, value, node, set_at))

    def _set_value(self, node: ast.Param, full: str, text: str, span: Span) -> ast.Value | None:
        value = self.shared.literal(text) if self.shared.literal else None
        typed = Source("--set", f"{full}={text}")
        where = Span(typed, len(full) + 1, len(typed.text))
        if value is None:
            self.sink.error(
                "S0208",
                f"`{text}` is not a value for `{full}`",
                where,
                "not a literal of the language",
                also=[(span, "declared here")],
                help="write a number, a word, or text in quotes, as in a spec",
            )
            return node.value
        default = node.value
        if default is not None and type(default) is not type(value) and not layered(default, value):
            self.sink.error(
                "S0208",
                f"`{full}` cannot be set to `{text}`",
                where,
                "not the same kind of value as the default",
                also=[(span, f"the default is {as_written(default)}")],
            )
            return node.value
        return replace(value, span=where)

    def unused_sets(self) -> None:
        """Reports ``--set`` of what is no parameter."""
        for name, text in self.shared.sets.items():
            found = self.scope.find(name)
            if found is None or found.kind != "param":
                known = list(self.scope.known("param"))
                help, notes = suggestion(name, known, "parameters of this spec")
                typed = Source("--set", f"{name}={text}")
                self.sink.error(
                    "S0207",
                    f"`--set {name}`: the spec has no such parameter",
                    Span(typed, 0, len(name)),
                    "unknown parameter",
                    help=help,
                    notes=notes,
                )

    # ------------------------------------------------------------ imports

    def _import(self, node: ast.Import) -> None:
        span = node.path_span if node.path_span.end else node.span
        self.names.define(Definition(node.name, "import", name_span(node, node.name), None, node))
        path = node.path if os.path.isabs(node.path) else os.path.join(os.path.dirname(self.source.name), node.path)
        key = _key(path)
        chain = [k for k, _ in self.chain]
        if key in chain or len(chain) > MAX_IMPORT_DEPTH:
            self.scope.broken.add(node.name)
            self._cycle(key, chain, span)
            return
        child = self._child(node, path, key, span)
        if child is None:
            self.scope.broken.add(node.name)
        if child is not None and node.name not in self.children:
            self.children[node.name] = child
            self.scope.imports[node.name] = child.scope

    def _cycle(self, key: str, chain: list[str], span: Span) -> None:
        names = [os.path.basename(k) for k in chain[chain.index(key) if key in chain else 0 :]] + [os.path.basename(key)]
        shown = " -> ".join(names if len(names) < 9 else [*names[:4], "...", *names[-3:]])
        what = "files import each other in a circle" if key in chain else "imports are nested too deeply"
        also = [(place, "imported here") for _, place in self.chain[1:] if place is not None][-4:]
        self.sink.error(
            "S0235",
            f"{what}: {shown}",
            span,
            "closes the circle" if key in chain else "one file too many",
            also=also,
            help="move the shared names to a file that imports neither",
        )

    def _child(self, node: ast.Import, path: str, key: str, span: Span) -> _FileChecker | None:
        prefix = f"{self.prefix}{node.name}."
        mine = tuple((k[len(prefix) :], v) for k, v in self.shared.sets.items() if k.startswith(prefix))
        cached = self.shared.scopes.get((key, mine))
        if cached is not None:
            return cached
        if key not in self.shared.files:
            try:
                if self.shared.read is None:
                    raise OSError("there is nothing to import from here")
                file, source, findings = self.shared.read(path)
            except SurgeryError as e:
                first = e.diagnostics[0]
                self.sink.error("S0205", f'cannot import "{node.path}"', span, first.message, help=first.help)
                return None
            except (OSError, ValueError) as e:
                reason = getattr(e, "strerror", None) or str(e)
                self.sink.error(
                    "S0205",
                    f'cannot import "{node.path}"',
                    span,
                    reason.lower(),
                    help=f"the path is relative to the importing file: {path}",
                )
                return None
            self.sink.extend(findings)
            self.shared.files[key] = file, source
            self.shared.paths.append(path)
        file, source = self.shared.files[key]
        child = _FileChecker(self.shared, source, prefix, (*self.chain, (key, span)))
        self.shared.scopes[key, mine] = child
        child._collect_later(file.statements)
        child._body(file.statements, [], {}, "")
        return child
