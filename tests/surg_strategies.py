"""Hypothesis strategies for syntax trees and texts of the language."""

from __future__ import annotations

from hypothesis import strategies as st

from surgery.core import ast, units
from surgery.grammar.words import CLAUSES, STATEMENTS, VERBS

# Keywords are names like any other outside their places, so they are drawn often.
words = st.sampled_from([*STATEMENTS, *CLAUSES, "own", "base", "by", "layers", "attn", "q", "_y", "A1", "x_2b"])
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)


@st.composite
def numbers(draw: st.DrawFn) -> ast.Number:
    unit = draw(st.sampled_from(["", "", *units.UNITS]))
    if not unit:
        value = draw(st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False)))
        return ast.Number(value)
    digits = draw(st.one_of(st.integers(-9999, 9999).map(str), st.decimals(-999, 999, places=draw(st.integers(1, 3))).map(str)))
    return ast.Number(units.scale(digits, unit), unit)


@st.composite
def ranges(draw: st.DrawFn) -> ast.Range:
    start = draw(st.integers(-99, 99))
    stop = draw(st.one_of(st.none(), st.just(start), st.integers(-99, 99)))
    step = 1 if stop == start else draw(st.sampled_from([1, 1, 2, 7]))
    return ast.Range(start, stop, step)


def tuples(strategy: st.SearchStrategy, low: int = 1, high: int = 2) -> st.SearchStrategy:
    return st.lists(strategy, min_size=low, max_size=high).map(tuple)


indices = st.one_of(st.none(), st.builds(ast.Index, tuples(ranges(), 0)))
steps = st.builds(ast.Step, st.one_of(words, st.sampled_from(["*", "**"])), indices)
set_steps = st.recursive(
    st.builds(ast.SetStep, tuples(tuples(steps)), indices),
    lambda inner: st.builds(ast.SetStep, tuples(tuples(st.one_of(steps, inner))), indices),
    max_leaves=3,
)
paths = tuples(st.one_of(steps, set_steps))
dotted = tuples(words, 1, 2).map(".".join)


def _is_name(path: tuple) -> bool:
    return all(isinstance(s, ast.Step) and s.index is None and s.name[0] != "*" for s in path)


def _clear(selector: ast.Selector) -> bool:
    """Not one bare word that reads as a clause keyword in a list, the one place where a keyword wins."""
    return not (
        selector.raw is None
        and selector.ref is None
        and not selector.optional
        and len(selector.steps) == 1
        and _is_name(selector.steps)
        and selector.steps[0].name in (*CLAUSES, "own")
    )


selectors = st.one_of(
    st.builds(ast.Selector, paths, optional=st.booleans()),
    st.builds(ast.Selector, raw=texts, optional=st.booleans()),
    st.builds(ast.Selector, tuples(st.one_of(steps, set_steps), 0), ref=words, optional=st.booleans()),
).filter(_clear)

value_selectors = st.one_of(
    st.builds(ast.Selector, paths.filter(lambda p: not _is_name(p))),
    st.builds(ast.Selector, paths, optional=st.just(True)),
    st.builds(ast.Selector, raw=texts, optional=st.just(True)),
    st.builds(ast.Selector, tuples(steps, 0), ref=words, optional=st.booleans()),
)
leaves = st.one_of(numbers(), st.builds(ast.String, texts), st.builds(ast.Name, dotted), value_selectors)


@st.composite
def calls(draw: st.DrawFn, values: st.SearchStrategy) -> ast.Call:
    names = draw(st.lists(words, max_size=2, unique=True))
    positional = draw(st.lists(values, max_size=1))
    args = [ast.Arg("", v) for v in positional] + [ast.Arg(n, draw(values)) for n in names]
    return ast.Call(draw(words), tuple(args))


values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(ast.ListValue, tuples(inner)),
        st.builds(ast.Table, tuples(st.builds(ast.TableEntry, ranges(), inner))),
        calls(inner),
    ),
    max_leaves=3,
)
methods = calls(values)

doc_lines = st.text(st.characters(exclude_categories=("C", "Z")), max_size=8)
doc_texts = st.one_of(st.just(""), st.lists(doc_lines, min_size=1, max_size=3).map("\n".join))
some = tuples(selectors)
maybe = tuples(selectors, 0, 2)


@st.composite
def operations(draw: st.DrawFn) -> ast.Operation:
    place = draw(st.sampled_from(["", "on", "after", "before", "beside"]))
    return ast.Operation(
        draw(st.sampled_from(VERBS)), draw(methods), place, draw(some) if place else (), draw(st.one_of(st.just(""), dotted)), draw(maybe),
        draw(tuples(dotted.filter(lambda w: w not in CLAUSES), 0, 2)), draw(maybe), draw(st.one_of(st.just(""), words)), doc=draw(doc_texts),
    )  # fmt: skip


@st.composite
def expectations(draw: st.DrawFn) -> ast.ExpectQuantity:
    return ast.ExpectQuantity(
        draw(words), draw(st.sampled_from(["<=", ">=", "<", ">", "==", "!="])), draw(values), draw(st.booleans()), draw(maybe),
        draw(st.one_of(st.just(""), dotted)), doc=draw(doc_texts),
    )  # fmt: skip


weighted = st.builds(ast.Weighted, dotted.filter(lambda w: w not in CLAUSES), st.one_of(st.none(), numbers()))
simple_statements = st.one_of(
    st.builds(ast.Import, texts, words, doc=doc_texts),
    st.builds(ast.Param, words, st.one_of(st.none(), values), doc=doc_texts),
    st.builds(ast.Let, words, values, doc=doc_texts),
    st.builds(ast.Model, texts, st.one_of(st.just(""), words), doc=doc_texts),
    st.builds(ast.Data, words, methods, st.one_of(st.none(), methods), doc=doc_texts),
    st.builds(ast.Load, st.sampled_from(["adapter", "checkpoint"]), words, methods, doc=doc_texts),
    operations(),
    operations(),
    st.builds(ast.Merge, methods, tuples(weighted), maybe, st.one_of(st.just(""), words), doc=doc_texts),
    st.builds(ast.Train, methods, maybe, doc=doc_texts),
    expectations(),
    st.builds(ast.ExpectCheck, methods, st.one_of(st.none(), values), doc=doc_texts),
    st.builds(ast.Measure, methods, maybe, st.one_of(st.just(""), dotted), doc=doc_texts),
    st.builds(ast.Emit, methods, texts, doc=doc_texts),
)
statements = st.recursive(simple_statements, lambda inner: st.builds(ast.Stage, words, tuples(inner, 0), doc=doc_texts), max_leaves=2)
files = st.lists(statements, min_size=1, max_size=2).map(lambda body: ast.File((ast.Edition(1), *body)))

soup = st.lists(
    st.sampled_from(
        [
            *STATEMENTS,
            *CLAUSES,
            *"(){}[],.:=*?@#;'\"%-+",
            "..",
            "**",
            "<=",
            "==",
            "\n",
            "\n",
            " ",
            "x",
            "layers",
            "8",
            "0.5",
            "30%",
            "1.1B",
            "2q",
            '"s"',
            '"\\q"',
            "own",
            "by",
            "base",
            "\0",
            "\r\n",
            "é",
            "##d\n",
            "surg 1\n",
        ]
    ),
    max_size=60,
).map(" ".join)
